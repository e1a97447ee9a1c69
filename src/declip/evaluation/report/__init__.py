"""Pages a person opens: of training runs (`training`) and of evaluations (`evaluation`), with one style and one kind of
charts. Every page is one file that needs no network and has no scripts.
"""
