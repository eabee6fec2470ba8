"""Compiled loops: ``cpu/`` for numba, ``triton.py`` for CUDA."""
