"""The answer to "is this network binary?": one line, and an explanation of float32 weights in the file."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final, Literal

from qat.inspection.facts import SIGN_BITS, InspectedLayer, Inspection
from qat.ops.binary import BINARY_TEMPERATURE

#: Factor by which the authors' training script changes the temperature after each epoch.
THEIR_FACTOR: Final = 0.9


@dataclass(frozen=True)
class Verdict:
    """Whether the weights that a network uses are binary.

    Attributes:
        answer: ``yes`` if all are ±1 and stored at 1 bit; ``in use`` if all are ±1 but stored at more bits;
            ``in part`` if those of some layers are ±1; ``not yet`` if those of no layer are.
        line: the answer in one line.
        explanation: sentences that explain an answer other than ``yes``; else empty.
    """

    answer: Literal["yes", "in use", "in part", "not yet"]
    line: str
    explanation: tuple[str, ...] = ()

    @property
    def binary(self) -> bool:
        """Whether every weight that a binary convolution uses is exactly ±1."""
        return self.answer in ("yes", "in use")


def verdict(found: Inspection) -> Verdict:
    """Judge whether the network that ``found`` describes is binary."""
    layers = found.binary_layers
    done, open_ = [x for x in layers if x.binary], [x for x in layers if not x.binary]
    count, rest = f"{len(done)} of {len(layers)} layers", f"rest {_rest(found.rest_layers)}"
    weights = f"{sum(layer.weights for layer in layers):,} weights"
    if not open_ and all(layer.stored == SIGN_BITS for layer in layers):
        return Verdict("yes", f"binary: yes, {weights} at 1 bit; {count}; {rest}")
    if not open_:
        stored = _joined(layer.stored for layer in layers)
        bits = " and ".join(str(bits) for bits in sorted({layer.bits for layer in layers}))
        line = (
            f"binary: yes in use, but stored as {stored}: {weights} at {bits} bits; {count}; {rest} "
            f"({_cure(found)})"
        )
        return Verdict("in use", line, tuple(_why_float(found, layers)))
    answer: Literal["in part", "not yet"] = "in part" if done else "not yet"
    line = f"binary: {answer}: {count}; {_state(found, open_, in_part=bool(done))}"
    return Verdict(answer, line, tuple(_why_float(found, open_)))


def epochs_left(temperature: float) -> int:
    """Epochs that the authors' training needs to bring ``temperature`` below 1e-7; 0 if it is below."""
    if temperature < BINARY_TEMPERATURE:
        return 0
    # The temperature must fall below the bound: if the quotient is whole, it only reaches it, and one more
    # epoch is needed.
    return math.floor(math.log(BINARY_TEMPERATURE / temperature) / math.log(THEIR_FACTOR)) + 1


def percent(share: float) -> str:
    """A share, 0 to 1, as percent with one decimal.

    "100 %" and "0 %" are exact: what would only round to them is given as "> 99.9 %" and "< 0.1 %".
    """
    if share in (0.0, 1.0):
        return f"{100 * share:.0f} %"
    text = f"{100 * share:.1f} %"
    return {"100.0 %": "> 99.9 %", "0.0 %": "< 0.1 %"}.get(text, text)


def _state(found: Inspection, layers: Sequence[InspectedLayer], in_part: bool) -> str:
    """The part of a verdict's line that says why ``layers`` are not binary, and when they will be."""
    share = percent(exact_share(layers))
    temperatures = [layer.temperature for layer in layers if layer.temperature is not None]
    if not temperatures:
        weights = "their weights" if in_part else "the weights"
        return (
            f"{'in the others, ' if in_part else ''}{weights} are stored as they are used, and {share} are "
            "exactly ±1: the network was exported before its temperature fell below 1e-7"
        )
    low, high = (f"{value:.3g}" for value in (min(temperatures), max(temperatures)))
    divisor, shown = (low, low) if low == high else ("T", f"{low} to {high}")
    subject, weights = ("of the others ", "their weights") if in_part else ("", "weights")
    return (
        f"the temperature {subject}is {shown}, and {weights} in use are clamp(w / {divisor}, -1, 1), "
        f"of which {share} are exactly ±1; they become ±1 when it falls below 1e-7 "
        f"({_schedule(found, max(temperatures))})"
    )


def _schedule(found: Inspection, temperature: float) -> str:
    if not found.published:
        return "qat pretrain lowers it until it does"
    rule = f"their training multiplies it by {THEIR_FACTOR} an epoch"
    epoch, left = found.facts.get("epoch"), epochs_left(temperature)
    epochs = f"{left} {'epoch' if left == 1 else 'epochs'}"
    start = f"from {temperature:.3g}" if epoch is None else f"after epoch {epoch}"
    return f"{rule}: {epochs} {start}"


def exact_share(layers: Sequence[InspectedLayer]) -> float:
    """Share of the weights in use, of all binary ``layers`` together, that are exactly ±1: 0 to 1."""
    exact = sum(round((layer.exact_in_use or 0.0) * layer.weights) for layer in layers)
    return exact / sum(layer.weights for layer in layers)


def _cure(found: Inspection) -> str:
    if found.exported:
        return "qat export --onnx without --float32 writes them at 1 bit"
    return "qat finetune or pretrain writes them at 1 bit"


def _why_float(found: Inspection, layers: Sequence[InspectedLayer]) -> list[str]:
    """Sentences that explain why a binary network has float parameters in its file."""
    if found.exported:
        return ["A float32 export holds the weights as they are used, one float32 number for each."]
    temperatures = [layer.temperature for layer in layers if layer.temperature is not None]
    stored = _joined(layer.stored for layer in layers if layer.stored != SIGN_BITS)
    lines = [
        f"The {stored} parameters are latent weights: training adds its small steps to them, and the network "
        "uses b = clamp(w / T, -1, 1) in their place, sign(w) once T is below 1e-7."
    ]
    if all(layer.binary for layer in layers):
        if max(temperatures) < BINARY_TEMPERATURE:
            return [*lines, "T is below 1e-7 here: of each latent weight only the sign, one bit, is used."]
        return [
            *lines,
            f"T is {max(temperatures):.3g} here, but every latent weight is so large that b is ±1 all the "
            "same; training may change that.",
        ]
    return [*lines, "So what tells whether a network is binary is T, not the type of its parameters."]


def _rest(layers: Sequence[InspectedLayer]) -> str:
    """Types of the other layers' weights in use, and the types in the file if those differ."""
    used, stored = _joined(layer.in_use for layer in layers), _joined(layer.stored for layer in layers)
    # Integers may be stored in a wider integer type, but have the same values as in use.
    as_used = all(layer.in_use == layer.stored or "float" not in layer.stored for layer in layers)
    return used if as_used else f"{used}, stored as {stored}"


def _joined(words: Iterable[str]) -> str:
    return " and ".join(sorted(set(words)))
