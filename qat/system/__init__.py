"""The machine around a run: files, processes, memory, signals.

Imports ``qat.errors`` alone. Begin with ``files``; ``launch`` and ``collectives`` are about several
processes.
"""
