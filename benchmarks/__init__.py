"""Measurements that need a baseline of their own."""
