"""Benchmark scripts; a package so that configs can name the models in it by class path."""
