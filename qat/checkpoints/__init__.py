"""Checkpoints: this project's file format, the formats of BNext's authors, and from either to a network.

Imports models, quantization, recipes and what lies below; knows nothing of training. Begin with ``format``,
whose docstring describes the file; ``loading`` makes a network of one.
"""
