"""Exported models against the network they came from.

``model`` opens an exported model in onnxruntime (through ``sessions``). ``agreement`` compares its answers
with the torch network's on a whole data set. ``exactness`` compares every integer in it with the
interpreter's: ``probes`` makes them visible, ``constants`` compares those in the file, ``figures`` counts and
judges. Imports :mod:`qat_export.graphs` and what lies below. Begin with ``agreement``.
"""
