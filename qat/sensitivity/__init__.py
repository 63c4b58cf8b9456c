"""What quantization costs, part by part and bit by bit, and which mixed bits a recipe can do with.

``variants`` makes networks that differ in one part, ``parts`` and ``bitwidths`` measure them, ``findings``
holds the results and ``suggestion`` turns them into a recipe's section. Imports models, quantization,
data and what lies below. Begin with ``parts``.
"""
