"""Data sets as labelled batches of uint8 images, and what is done to images before a network sees them.

It imports recipes, ``qat.system`` and ``qat.errors``. Begin with ``split``, the interface of every data set.
``loading`` finds the data set that a recipe names; ``folder``, ``parquet`` and ``hub`` read it.
"""
