"""The layers of the float network, as PyTorch modules.

Imports :mod:`qat.ops` and what lies below. Begin with ``sub_block``: its docstring is the formula of BNext's
sub-block, which the other packages quantize, lower and export.
"""
