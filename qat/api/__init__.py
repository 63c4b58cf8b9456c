"""What ``import qat`` offers: from a checkpoint to a verified ONNX model, in Python.

Thin functions over what the commands use, so that both do the same. Imports everything but :mod:`qat.cli`.
``qat/__init__.pyi`` lists the public names. Begin with ``networks``.
"""
