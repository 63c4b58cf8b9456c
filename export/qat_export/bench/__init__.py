"""Time, size and memory of models, for ``qat bench``.

``measurement`` measures the time of several models by turns, ``any_model`` opens any model that takes images,
and ``peak_memory`` measures memory in a child process. ``random_networks`` makes a network, ``targets``
exports it in several forms, and ``comparison`` makes a report of all measurements. Imports
:mod:`qat_export.verify`, :mod:`qat_export.graphs`, :mod:`qat_export.lowering` and what lies below. Begin with
``comparison``.
"""
