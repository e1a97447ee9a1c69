"""Linear probes of a model: features of the labelled pairs it may learn from, and of those it is judged on."""
