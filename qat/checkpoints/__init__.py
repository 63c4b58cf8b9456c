"""Checkpoints: the file format, those that the authors publish, and from either to a network."""
