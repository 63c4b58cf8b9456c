"""The network's layers, as plain PyTorch modules."""
