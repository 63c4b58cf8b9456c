"""The integer network: a whole network as plain integers, what they compute, and its file.

``network`` describes it in dataclasses, ``reference`` executes it in NumPy and thereby defines its numbers,
``consistency`` says which networks are valid, ``file`` writes and reads them (through ``fields``), and
``listing`` prints one. Imports NumPy, :mod:`qat.grid`, :mod:`qat.quantize.dyadic` and what lies below, and no
torch: whoever has the file needs none. Begin with ``network``, then ``reference``.
"""
