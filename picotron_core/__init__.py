"""Picotron's core: the training engine and the registry its kernels come through."""

__version__ = "0.1.0"
