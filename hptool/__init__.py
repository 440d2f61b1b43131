"""hptool finds the fastest way to train a language model on the GPUs that you have."""

__version__ = "0.1.0"
