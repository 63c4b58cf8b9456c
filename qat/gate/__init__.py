"""The accuracy gate: did a model get worse than a recorded baseline, and can the data tell?

Imports evaluation, data and recipes. Begin with ``decision``; its statistics are in ``paired_statistics``.
"""
