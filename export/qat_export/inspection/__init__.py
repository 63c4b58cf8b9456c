"""Inspection of exported files for ``qat inspect``: ONNX models and integer networks.

``exports`` describes both layer by layer, and ``weight_graph`` finds the weights in an ONNX graph. The
dataclasses of descriptions, the verdict and the inspection of checkpoints are in :mod:`qat.inspection`, which
doesn't import this package. Imports that, :mod:`qat_export.verify` and what lies below. Begin with
``exports``.
"""
