"""The operating system around a run: files, processes, memory, signals.

It imports nothing of this project but ``qat.errors``. Begin with ``files``. ``launch`` and ``collectives``
are about several processes that compute together.
"""
