"""An inference server for vision models that keep learning while they serve."""

__version__ = "0.1.0"
