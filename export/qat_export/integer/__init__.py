"""The integer network: a whole network as plain integers, what they compute, and its file.

``network`` describes it in dataclasses, ``reference`` executes it in NumPy and so defines its numbers,
``consistency`` checks that a network is valid, ``file`` writes and reads networks (with the help of
``fields``), and ``listing`` prints one. Imports NumPy, :mod:`qat.grid`, :mod:`qat.quantize.dyadic` and what
lies below. It imports no torch, so that a file can be used without it. Begin with ``network``, then
``reference``.
"""
