"""What fewer bits cost, for one setting of a recipe at a time, and how many bytes the weights take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from qat.models.bnext import Architecture
from qat.models.operation_count import operations
from qat.quantize.naming import group_of_point
from qat.quantize.overrides import GroupName, group_of
from qat.quantize.preparation import quantized_layers
from qat.recipe.schema import Quantization
from qat.sensitivity.variants import Measure, QuantizerState, Variants, Watcher, difference, quantizer_state

Key = Literal["weight_bits", "activation_bits"]


@dataclass(frozen=True)
class Setting:
    """One number of bits in a recipe, such as ``se.weight_bits``."""

    group: GroupName
    key: Key

    def __str__(self) -> str:
        """The setting's key in a recipe, such as ``se.weight_bits``."""
        return f"{self.group}.{self.key}"

    @property
    def label(self) -> str:
        """The setting's name in tables, such as ``se weights``."""
        return f"{self.group} {'weights' if self.key == 'weight_bits' else 'activations'}"


@dataclass(frozen=True)
class Limits:
    """How much fewer bits may cost, compared with the recipe's own bits and without fine-tuning.

    Attributes:
        tolerance: percentage points of top-1.
        noise_budget: dB of the logits' SQNR.
    """

    tolerance: float
    noise_budget: float


@dataclass(frozen=True)
class Width:
    """One setting at fewer bits, everything else as in the recipe.

    Attributes:
        setting, bits: the changed setting, and its number of bits.
        measure: accuracy and noise of the network with it.
        loss: percentage points of top-1 lost against the recipe's own bits.
        drop: dB of SQNR lost against them.
        within: whether both losses are within the limits.
    """

    setting: Setting
    bits: int
    measure: Measure
    loss: float
    drop: float
    within: bool


def settings_of(quantization: Quantization, groups: Sequence[GroupName]) -> dict[Setting, int]:
    """The settings that ``groups`` have in a recipe, each with its number of bits."""
    keys: tuple[Key, ...] = ("weight_bits", "activation_bits")
    return {
        Setting(group, key): getattr(section, key)
        for group in groups
        for section in [getattr(quantization, group)]
        for key in keys
        if hasattr(section, key)
    }


def with_bits(quantization: Quantization, bits: dict[Setting, int]) -> Quantization:
    """A copy of ``quantization`` with other numbers of bits for some settings."""
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
    state: QuantizerState,
    settings: dict[Setting, int],
    widths: Sequence[int],
    limits: Limits,
    watch: Watcher,
) -> list[Width]:
    """Measure each setting at each lower number of bits, everything else as in the recipe; most bits first.

    Activations with fewer bits need other grids. So the whole network is calibrated once per number of bits
    (with every activation at that number, or at the recipe's if it is lower), and only the group in question
    takes its quantizers' state from there.

    Args:
        variants: makes and measures variants of the float-rest network.
        recipe: measure of the network quantized by the recipe.
        quantization: the recipe's section.
        state: state of the quantizers of the network quantized by the recipe.
        settings: from :func:`settings_of`.
        widths: numbers of bits to try; those that are not lower than a setting's own are skipped.
        limits: how much fewer bits may cost.
        watch: receives the progress, variant by variant.
    """
    tried = [
        (setting, width)
        for setting, own in settings.items()
        for width in sorted(set(widths), reverse=True)
        if width < own
    ]
    watch.expect(len(tried))
    by_width: dict[int, QuantizerState] = {}
    found = []
    for setting, width in tried:
        taken: QuantizerState = state
        if setting.key == "activation_bits":
            if width not in by_width:
                lower = {s: min(width, own) for s, own in settings.items() if s.key == "activation_bits"}
                by_width[width] = quantizer_state(
                    variants.calibrated(with_bits(quantization, lower)), variants.model
                )
            taken = _replaced(state, by_width[width], setting.group)
        model = variants.build(with_bits(quantization, {setting: width}), taken)
        measure = variants.measure(model)
        loss, drop = recipe.top1 - measure.top1, difference(recipe.sqnr, measure.sqnr)
        within = loss <= limits.tolerance and drop <= limits.noise_budget
        found.append(Width(setting, width, measure, loss, drop, within))
        watch.done(f"{setting} {width}")
    return found


def _replaced(state: QuantizerState, others: QuantizerState, group: GroupName) -> dict[str, Tensor]:
    """``state`` with the quantizers of one group replaced by those of ``others``."""
    return {key: (others if group_of_point(key) == group else state)[key] for key in state}


def weight_bytes(variants: Variants, quantization: Quantization) -> int:
    """Bytes of all weights if each took only its bits: 1 if binary, 32 if float, else the recipe's."""
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
