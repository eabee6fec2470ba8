"""Every exception of this package. Each message names the argument, its value and what to do about it."""

from __future__ import annotations


class CAPError(Exception):
    """Base of all exceptions that this package raises on purpose."""


class ConfigError(CAPError, ValueError):
    """An argument has a value that cannot work. Raised before any training or pruning starts."""


class TargetError(ConfigError):
    """The choice of weights to prune cannot work: no match, frozen, tied, or not divisible by the pattern."""


class PatternError(ConfigError):
    """A sparsity pattern is malformed, or a sparsity was asked of it that it cannot give."""


class ScheduleError(ConfigError):
    """A sparsity schedule is malformed or does not fit into the run."""


class DataError(CAPError):
    """What is on the disk cannot be read: a path that does not exist, an empty class, a broken image, a foreign record."""


class GradientError(CAPError, RuntimeError):
    """Gradients for the empirical Fisher could not be had from the loss."""


class UnsupportedError(CAPError):
    """A combination of features that is refused by name because it could not be made right."""


class ExportError(CAPError, RuntimeError):
    """A model cannot be written in a format, or the file does not give the model's outputs. No file is left."""
