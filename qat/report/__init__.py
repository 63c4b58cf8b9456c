"""Self-contained HTML pages: the report on a run, and the page on what quantization costs.

``content`` puts the report together from ``sections``, ``layers`` and ``costs``. ``page`` renders a page,
``charts`` and ``svg`` draw its charts. A page is one file that loads nothing. Imports models, evaluation,
data, the gate's statistics and what lies below. Begin with ``content``.
"""
