"""What knows nothing of pruning: processes, random state, files, memory, precision, progress."""
