"""From a fake-quantized network to an integer network."""
