"""Data sets as labelled batches of uint8 images, and what is done to images before a network sees them.

Imports recipes and ``qat.system`` alone. Begin with ``split``, which says what every data set is here;
``loading`` finds the one that a recipe names, ``folder``, ``parquet`` and ``hub`` read it.
"""
