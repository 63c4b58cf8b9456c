"""ONNX models of a network: an integer network in portable, strict or native form, and the float32 network.

``portable`` emits the portable form with ``operators`` and the strict form with ``strict_operators``;
``storage`` decides how both hold integers in tensors. ``native`` emits this project's own operators.
``integer_emitter`` is what these forms share. ``float32`` and ``ort_static`` make the baselines. ``walk`` has
the order of a network's blocks, and ``builder`` builds graphs. Imports :mod:`qat_export.integer` and what
lies below; only ``float32`` needs torch. Begin with ``portable``.
"""
