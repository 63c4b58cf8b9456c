"""Fake quantization of a network for training, and its integer arithmetic for evaluation and export.

``preparation`` replaces the modules of a float network, ``activation_quantizers`` and ``weight_quantizers``
put values on grids, whose ranges ``observers`` find. ``sub_block``, ``attention`` and ``stem_and_head`` are
the quantized modules. ``integers``, ``dyadic`` and ``folding`` hold the arithmetic that lowering shares.
Imports :mod:`qat.nn`, :mod:`qat.ops`, recipes and what lies below. This file imports nothing, so that the
integer network can use ``dyadic`` without torch. Begin with ``sub_block``.
"""
