"""From an integer network to ONNX graphs."""
