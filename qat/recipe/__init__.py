"""Recipes are the YAML files that say what a run does. They are read, overridden, checked and written here.

It imports ``qat.system`` and ``qat.errors``. Begin with ``schema``, which has every key with its range.
``loading`` reads a recipe. ``problems`` says in words what is wrong with one.
"""
