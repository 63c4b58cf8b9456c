"""What quantization costs: each part of the network alone, with fewer bits, and what follows for a recipe.

``variants`` makes networks that differ in one part, ``parts`` and ``bitwidths`` measure them, ``findings``
holds the results and ``suggestion`` turns them into a recipe's section. Imports models, quantization,
data and what lies below. Begin with ``parts``.
"""
