"""One pruning event inside a Trainer, without a trace in the run."""
