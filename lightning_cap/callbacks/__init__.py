"""The callback that prunes during training, and what it needs of a run."""
