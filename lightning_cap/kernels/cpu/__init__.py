"""The compiled loops of the CPU solver. Its files need numba; import them when they are used, it takes a second."""
