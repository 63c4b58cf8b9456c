"""Recipes: read, checked, changed and written."""
