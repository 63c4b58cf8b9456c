"""Quantization-aware fine-tuning of binary BNext networks."""

__version__ = "0.2.0"
