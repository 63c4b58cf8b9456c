"""Settings of single modules: those of the recipe's groups, changed by ``quantization.overrides``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, Final, Literal, TypeVar

from qat.errors import QuantizationError, nearest
from qat.recipe.schema import Group, LayerOverride, Quantization, StemGroup, TrunkGroup

#: A group of the recipe's ``quantization`` section.
GroupName = Literal["stem", "se", "classifier", "trunk"]
_Section = TypeVar("_Section", StemGroup, TrunkGroup, Group)

#: For messages: why a group has no use for some keys.
_NO_USE: Final[Mapping[GroupName, str]] = {
    "stem": "it has weights alone: its output is the trunk's, feature.0.trunk",
    "trunk": "its weights are the 1 bit of the binary convolutions",
    "se": "",
    "classifier": "",
}


def group_of(layer: str) -> GroupName:
    """The recipe's group that a module belongs to, by the name that a recipe's globs match."""
    if layer == "feature.0":
        return "stem"
    if layer == "fc":
        return "classifier"
    return "se" if layer.endswith(".se") else "trunk"


def check_glob(key: str, glob: str, names: Sequence[str]) -> list[str]:
    """The names that ``glob`` matches.

    Args:
        key: key of the recipe that has the glob, for the message.
        glob: pattern as in :mod:`fnmatch`.
        names: names of all modules that a recipe can choose.

    Raises:
        QuantizationError: it matches no name.
    """
    matched = [name for name in names if fnmatchcase(name, glob)]
    if not matched:
        raise QuantizationError(
            f"quantization.{key}: {glob!r} matches no module{nearest(glob, names)}; "
            f"modules are {', '.join(names[:4])}, … {', '.join(names[-2:])}"
        )
    return matched


def check_overrides(quantization: Quantization, names: Sequence[str]) -> None:
    """Refuse overrides that have no effect.

    Args:
        quantization: the section with the overrides.
        names: names of all modules that a recipe can choose.

    Raises:
        QuantizationError: a glob that matches nothing, an override that sets nothing, a key that none of the
            matched modules has a use for, or more than 8 bits outside of the trunk.
    """
    for index, override in enumerate(quantization.overrides):
        where = f"overrides[{index}]"
        matched = check_glob(f"{where}.match", override.match, names)
        settings = _settings(override)
        if not settings:
            raise QuantizationError(f"quantization.{where}: sets nothing for {override.match!r}")
        for key, value in settings.items():
            users = [name for name in matched if key in _keys(quantization, name)]
            if not users:
                name = matched[0]
                why = "its grid is that of its input" if name == "prelu" else _NO_USE[group_of(name)]
                raise QuantizationError(
                    f"quantization.{where}.{key}: {override.match!r} matches {name}, which has no use for "
                    f"it: {why}"
                )
            narrow = next((name for name in users if group_of(name) != "trunk"), None)
            if key == "activation_bits" and value > 8 and narrow is not None:
                raise QuantizationError(
                    f"quantization.{where}.activation_bits: found {value} for {narrow}, "
                    "allowed outside of the trunk: an integer from 2 to 8"
                )


def settings_of(quantization: Quantization, name: str, group: _Section) -> _Section:
    """The settings of one module: those of its group with all overrides that match it, in their order.

    Args:
        quantization: the section with the overrides.
        name: name of the module, as globs match it.
        group: settings of its group.
    """
    update: dict[str, Any] = {}
    for override in quantization.overrides:
        if fnmatchcase(name, override.match):
            update |= {key: value for key, value in _settings(override).items() if hasattr(group, key)}
    return group.model_copy(update=update) if update else group


def _settings(override: LayerOverride) -> dict[str, Any]:
    return {key: value for key, value in override if key != "match" and value is not None}


def _keys(quantization: Quantization, name: str) -> set[str]:
    """Keys of an override that have an effect on the module ``name``."""
    if name == "prelu":
        return set()
    return set(type(getattr(quantization, group_of(name))).model_fields) - {"enabled"}
