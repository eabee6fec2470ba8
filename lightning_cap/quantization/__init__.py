"""Fake quantization of Linear layers by torchao, and the integers that they are trained for."""
