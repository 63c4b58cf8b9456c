"""Verification of exported models: comparison with the network that they were exported from.

``model`` opens an exported model in onnxruntime (through ``sessions``). ``agreement`` compares its answers
with those of the torch network on a whole data set. ``exactness`` compares every integer in it with the
interpreter's: ``probes`` makes them outputs of the model, ``constants`` compares those in the file, and
``figures`` counts differences and judges them. Imports :mod:`qat_export.graphs` and what lies below. Begin
with ``agreement``.
"""
