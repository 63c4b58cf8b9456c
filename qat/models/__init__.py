"""The BNext networks, and the number of their parameters and operations.

It imports :mod:`qat.nn`, :mod:`qat.quantize` and recipes. Begin with ``bnext``.
"""
