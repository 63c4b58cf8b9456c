"""ONNX models of a network: the portable, the strict and the native form of an integer network, and float32.

``walk`` is the order of a network, ``integer_emitter`` what both integer targets share. ``portable`` emits
through ``operators`` or ``strict_operators`` (and ``storage``, how integers lie in tensors), ``native``
through this project's own operators. ``float32`` and ``ort_static`` are the baselines. All build with
``builder``. Imports :mod:`qat_export.integer` and what lies below; only ``float32`` needs torch. Begin with
``portable``.
"""
