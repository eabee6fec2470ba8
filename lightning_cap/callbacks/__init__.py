"""What a run of the Trainer is told by us."""
