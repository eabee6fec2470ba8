"""A table of bad input, one file per room: what is given, the error that is due, and words that its message must hold."""
