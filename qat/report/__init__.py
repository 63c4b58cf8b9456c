"""Self-contained HTML pages: the report on a run, and the page on what quantization costs.

``content`` puts the report together from ``sections``, ``layers`` and ``costs``; ``page``, ``charts`` and
``svg`` draw. A page loads nothing from anywhere. Imports models, evaluation, data, the gate's statistics and
what lies below. Begin with ``content``.
"""
