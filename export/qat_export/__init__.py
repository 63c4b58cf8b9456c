"""Lowering of fake-quantized BNext networks to integers, and the ONNX graph emitted from there."""
