"""The native library: where it is, and how Python calls its passes; the C++ sources lie in ``src``.

Imports ``qat.system``, ``qat.grid`` and ``qat.errors`` alone. Begin with ``library``, then ``passes``. Who
may use it is decided in :mod:`qat.ops`.
"""
