"""Checkpoints: this project's file format, the formats of BNext's authors, and networks made from either.

It imports models, quantization, recipes and the packages below these, and nothing about training. Begin with
``format``, whose docstring describes the file. ``loading`` makes a network from a checkpoint.
"""
