"""The accuracy gate: whether a model got worse than a recorded baseline, by a paired test.

Imports evaluation, data and recipes. Begin with ``decision``; the statistics are in ``paired_statistics``.
"""
