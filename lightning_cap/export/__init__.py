"""Plain files of a pruned model."""
