"""The library that supplies the quantizers, which a recipe chooses by ``quantization.backend``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from qat.errors import QuantizationError
from qat.quantize.activation_quantizers import ActivationQuantizer
from qat.quantize.quantizer_base import Quantizer
from qat.quantize.weight_quantizers import WeightQuantizer
from qat.recipe.schema import Quantization, TrunkGroup


@dataclass(frozen=True)
class Backend:
    """Makes the quantizers of one library.

    Attributes:
        activations: class of the quantizers of activations.
        weights: makes a quantizer of weights from its bits, ``power_of_two`` and the rows of its layers.
        power_of_two: whether scales are powers of two.
    """

    activations: type[ActivationQuantizer] = ActivationQuantizer
    weights: Callable[[int, bool, Sequence[int]], WeightQuantizer] = WeightQuantizer
    power_of_two: bool = False

    def point(self, group: TrunkGroup | None, *, signed: bool) -> Quantizer:
        """A quantization point for activations with a group's settings; ``None`` leaves them in float."""
        if group is None:
            return Quantizer()
        return self.activations(
            group.activation_bits,
            signed,
            group.observer,
            group.averaging_constant,
            group.percentile,
            group.clip,
            self.power_of_two,
        )

    def weight(self, bits: int, *weights: Tensor) -> WeightQuantizer:
        """One quantizer for the weights (O, ...) of one or more layers."""
        return self.weights(bits, self.power_of_two, [len(weight) for weight in weights])


def backend_of(quantization: Quantization) -> Backend:
    """The backend that a recipe asks for.

    Raises:
        QuantizationError: its library is not installed.
    """
    if quantization.backend == "torch_ao":
        return Backend(power_of_two=quantization.power_of_two)
    try:
        # Imported only if needed: brevitas is an optional dependency, and importing it takes seconds.
        from qat.quantize.learned_scales import LearnedActivationQuantizer, LearnedWeightQuantizer
    except ImportError as error:
        raise QuantizationError(
            f"quantization.backend: 'brevitas' cannot be used here: {error}; "
            "install it with: pip install 'bnext-qat[brevitas]'"
        ) from error
    return Backend(LearnedActivationQuantizer, LearnedWeightQuantizer, quantization.power_of_two)
