"""The networks, and what they cost in parameters and operations.

Imports :mod:`qat.nn`, :mod:`qat.quantize` and recipes. Begin with ``bnext``.
"""
