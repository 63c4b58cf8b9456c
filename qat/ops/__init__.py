"""The operations of training and evaluation, each once, forward and backward.

Each function decides by itself whether the native library (:mod:`qat.native`) or torch computes it; callers
never ask. Where both exist, the two autograd functions lie side by side in one file, and tests compare them.
Imports :mod:`qat.native`, :mod:`qat.system` and :mod:`qat.grid`. Begin with ``binary``, then ``norm_prelu``
and ``scale_add``: a sub-block consists of these and a convolution.
"""
