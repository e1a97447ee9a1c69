"""`declip finetune`: pretrained weights and a few pairs, and nothing else to choose.

`prepare` looks at both and makes a plan by the rules of `training.finetuning`; `run` trains, judges before and after,
and writes the report.
"""
