"""Fewer bits, setting by setting: what each costs, and the bytes that weights take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from qat.models.bnext import Architecture
from qat.models.operation_count import operations
from qat.quantize.overrides import GroupName, group_of
from qat.quantize.preparation import quantized_layers
from qat.recipe.schema import Quantization
from qat.sensitivity.variants import Grids, Measure, Variants, Watcher, difference, grids_of

Key = Literal["weight_bits", "activation_bits"]


@dataclass(frozen=True)
class Setting:
    """One number of bits in a recipe, such as ``se.weight_bits``."""

    group: GroupName
    key: Key

    def __str__(self) -> str:
        """As recipes have it."""
        return f"{self.group}.{self.key}"

    @property
    def label(self) -> str:
        """As readers have it, such as ``se weights``."""
        return f"{self.group} {'weights' if self.key == 'weight_bits' else 'activations'}"


@dataclass(frozen=True)
class Limits:
    """What fewer bits may cost, against the recipe's own bits and before fine-tuning.

    Attributes:
        tolerance: points of top-1.
        noise_budget: dB of the logits' signal to noise.
    """

    tolerance: float
    noise_budget: float


@dataclass(frozen=True)
class Width:
    """One setting at fewer bits, everything else as in the recipe.

    Attributes:
        setting, bits: what was changed.
        measure: of the network with it.
        loss: points of top-1 below the recipe's own network.
        drop: dB of signal to noise below it.
        within: whether both are within the limits.
    """

    setting: Setting
    bits: int
    measure: Measure
    loss: float
    drop: float
    within: bool


def settings_of(quantization: Quantization, groups: Sequence[GroupName]) -> dict[Setting, int]:
    """Each number of bits that ``groups`` have in a recipe."""
    keys: tuple[Key, ...] = ("weight_bits", "activation_bits")
    return {
        Setting(group, key): getattr(section, key)
        for group in groups
        for section in [getattr(quantization, group)]
        for key in keys
        if hasattr(section, key)
    }


def with_bits(quantization: Quantization, bits: dict[Setting, int]) -> Quantization:
    """The same with other numbers of bits."""
    update: dict[str, dict[str, int]] = {}
    for setting, width in bits.items():
        update.setdefault(setting.group, {})[setting.key] = width
    return quantization.model_copy(
        update={
            group: getattr(quantization, group).model_copy(update=values) for group, values in update.items()
        }
    )


def measure_widths(
    variants: Variants,
    recipe: Measure,
    quantization: Quantization,
    grids: Grids,
    settings: dict[Setting, int],
    widths: Sequence[int],
    limits: Limits,
    watch: Watcher,
) -> list[Width]:
    """Each setting at each lower width, everything else as in the recipe; widest first.

    Activations of fewer bits need other grids: the whole network is calibrated once per width, and the group
    in question takes its grids from there.

    Args:
        variants: of the float-rest network.
        recipe: measure of the recipe's own network.
        quantization: the recipe's.
        grids: of the recipe's own network.
        settings: from :func:`settings_of`.
        widths: to try; those that aren't lower than a setting's own are passed over.
        limits: what is acceptable.
        watch: told of each variant.
    """
    tried = [
        (setting, width)
        for setting, own in settings.items()
        for width in sorted(set(widths), reverse=True)
        if width < own
    ]
    watch.expect(len(tried))
    by_width: dict[int, Grids] = {}
    found = []
    for setting, width in tried:
        taken: Grids = grids
        if setting.key == "activation_bits":
            if width not in by_width:
                lower = {s: min(width, own) for s, own in settings.items() if s.key == "activation_bits"}
                by_width[width] = grids_of(
                    variants.calibrated(with_bits(quantization, lower)), variants.model
                )
            taken = _replaced(grids, by_width[width], setting.group)
        model = variants.build(with_bits(quantization, {setting: width}), taken)
        measure = variants.measure(model)
        loss, drop = recipe.top1 - measure.top1, difference(recipe.sqnr, measure.sqnr)
        within = loss <= limits.tolerance and drop <= limits.noise_budget
        found.append(Width(setting, width, measure, loss, drop, within))
        watch.done(f"{setting} {width}")
    return found


def _replaced(grids: Grids, others: Grids, group: GroupName) -> dict[str, Tensor]:
    """``grids``, those of one group taken from ``others``."""
    return {key: (others if _group_of_key(key) == group else grids)[key] for key in grids}


def _group_of_key(key: str) -> GroupName:
    """The group of a quantizer's state: that of the innermost layer around it."""
    if key.startswith("fc."):
        return "classifier"
    if ".se." in key:
        return "se"
    return "trunk" if not key.startswith("feature.0.") or key.startswith("feature.0.trunk.") else "stem"


def weight_bytes(variants: Variants, quantization: Quantization) -> int:
    """Bytes of all weights packed at their bits: 1 in binary convolutions, 32 where left in float."""
    architecture: Architecture = variants.model.architecture
    layers = quantized_layers(variants.model, quantization)
    bits = 0
    for layer in operations(architecture, variants.images.shape[-1]).layers:
        name = "feature.0" if layer.kind == "stem" else layer.name
        if layer.kind == "binary":
            bits += layer.weights
        else:
            width = getattr(quantization, group_of(name)).weight_bits if name in layers else 32
            bits += layer.weights * width
    return -(-bits // 8)
