"""Inspection of checkpoints for ``qat inspect``: facts layer by layer, and whether the network is binary.

``facts`` has the dataclasses that describe a file of any kind, ``checkpoint`` fills them in for a checkpoint,
and ``verdict`` judges them. ``qat_export.inspection`` does the same as ``checkpoint`` for exported files.
Imports checkpoints and what lies below. Begin with ``facts``.
"""
