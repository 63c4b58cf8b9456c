"""What an exported file holds, for ``qat inspect``: ONNX models and integer networks.

``exports`` describes both layer by layer, ``weight_graph`` finds the weights in an ONNX graph. The
descriptions themselves, the verdict on them, and the inspection of checkpoints are in :mod:`qat.inspection`,
which knows nothing of exports. Imports that, :mod:`qat_export.verify` and what lies below. Begin with
``exports``.
"""
