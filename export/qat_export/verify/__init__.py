"""Exported models against the network they came from."""
