"""The name of a network's quantization in summaries, reports and messages, such as ``int8``."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final

from torch import nn

from qat.quantize.overrides import GroupName
from qat.quantize.preparation import quantization_map, quantized_layers
from qat.recipe.schema import Quantization

#: Names of the recipe's groups in sentences, in the order of the network.
_GROUPS: Final[dict[GroupName, str]] = {
    "stem": "stem",
    "se": "channel attention",
    "classifier": "classifier",
    "trunk": "trunk",
}
#: Endings of the names of points that have 8 bits whatever the recipe says: the image, and the gains of
#: branches. The name of a quantization does not count them.
_FIXED: Final = ("feature.0.image", ".gain")


def quantization_name(model: nn.Module, quantization: Quantization) -> str:
    """The name of a network's quantization: the bits of its integers, and which groups are left in float.

    Args:
        model: a prepared :class:`qat.models.bnext.BNext`.
        quantization: the section that it was prepared with.

    Returns:
        ``int8``, ``int8 (trunk in float)``, ``int8 (classifier in float, trunk partly in float)`` and the
        like; ``int4/int8`` for integers of 4 and 8 bits, signed or not; ``float rest`` for a network without
        a quantization point.
    """
    types = [
        str(point["type"]) for name, point in quantization_map(model).items() if not name.endswith(_FIXED)
    ]
    if not types:
        return "float rest"
    widths = "/".join(f"int{bits}" for bits in sorted({int(re.sub(r"\D", "", kind)) for kind in types}))
    chosen = list(quantized_layers(model, quantization).values())
    every = list(quantized_layers(model, Quantization()).values())
    absent: list[str] = []
    partial: list[str] = []
    for group, name in _GROUPS.items():
        if every.count(group) and not chosen.count(group):
            absent.append(name)
        elif chosen.count(group) < every.count(group):
            partial.append(name)
    left = [
        f"{_listed(names)} {how}"
        for names, how in ((absent, "in float"), (partial, "partly in float"))
        if names
    ]
    return f"{widths} ({', '.join(left)})" if left else widths


def group_of_point(name: str) -> GroupName:
    """The recipe's group that a quantization point or weight quantizer belongs to.

    Args:
        name: module name of the quantizer, or the key of one of its tensors in the network's state dict.
    """
    if name.startswith("fc."):
        return "classifier"
    if ".se." in name:
        return "se"
    in_stem = name.startswith("feature.0.") and not f"{name}.".startswith("feature.0.trunk.")
    return "stem" if in_stem else "trunk"


def _listed(names: Sequence[str]) -> str:
    *others, last = names
    return f"{', '.join(others)} and {last}" if others else last
