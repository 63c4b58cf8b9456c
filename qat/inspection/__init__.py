"""What is binary in a file, for ``qat inspect``: the facts layer by layer, and a verdict in words.

``facts`` has the descriptions that all kinds of files share, ``checkpoint`` makes them of a checkpoint and
``verdict`` judges them; exported files are read in ``qat_export.inspection``. Imports checkpoints and what
lies below. Begin with ``facts``.
"""
