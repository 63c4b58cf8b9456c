"""Fake quantization of a network, and its integer arithmetic."""
