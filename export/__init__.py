"""Lowering of fake-quantized BNext networks to integers, and the targets emitted from there."""
