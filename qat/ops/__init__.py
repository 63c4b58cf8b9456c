"""The operations of training and evaluation, each once."""
