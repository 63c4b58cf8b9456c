"""How long models take, how large they are and how much memory they need: ``qat bench``.

``measurement`` measures models in turn, ``any_model`` opens whatever model takes images, ``peak_memory``
measures in a process of its own. ``targets`` exports one network in several forms, ``random_networks`` makes
such a network, ``comparison`` puts it all together into a report. Imports :mod:`qat_export.verify`,
:mod:`qat_export.graphs`, :mod:`qat_export.lowering` and what lies below. Begin with ``comparison``.
"""
