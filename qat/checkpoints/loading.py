"""Makes a network from a checkpoint, or loads a checkpoint into a network after checking that it fits."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, Final, Literal

import torch
from torch import Tensor

from qat.checkpoints.architecture import float_shapes, has_classifier, infer_architecture
from qat.checkpoints.format import Checkpoint
from qat.checkpoints.header import FORMAT
from qat.checkpoints.tensor_checks import dtype_name, has_negative_variance, listed, not_finite, overflow
from qat.errors import CheckpointError, QuantizationError
from qat.models.bnext import Architecture, BNext, binary_convolutions
from qat.models.facts import Facts
from qat.nn.layers import BinaryActivation
from qat.quantize.image_grid import image_grid
from qat.quantize.preparation import prepare
from qat.recipe.dotted_keys import flatten
from qat.recipe.schema import Model, Quantization

#: Keys of the classifier in a state dict begin so.
_CLASSIFIER: Final = "fc."


def architecture_of(
    model: Model, num_classes: int | None = None, stem_stride: int | None = None
) -> Architecture:
    """The architecture that a recipe's ``model`` section asks for.

    Args:
        model: the section.
        num_classes: taken where the section leaves it open; 1000 by default.
        stem_stride: taken where the section leaves it open; by default as :meth:`Architecture.of` says.
    """
    return Architecture.of(
        model.size,
        model.num_classes or num_classes or 1000,
        widths=model.widths,
        stem_stride=model.stem_stride or stem_stride,
        elm_attention=model.elm_attention,
        infor_recoupling=model.infor_recoupling,
    )


def highest_temperature(model: BNext) -> float:
    """The highest temperature of the binary convolutions. Below 1e-7 all weights in use are exactly ±1."""
    return max(float(conv.temperature) for conv in binary_convolutions(model).values())


def load_state(
    model: BNext,
    checkpoint: Checkpoint | Mapping[str, Tensor],
    classifier: Literal["keep", "new"] = "keep",
) -> None:
    """Load ``checkpoint`` into ``model``, all of it or, on an error, nothing.

    A float checkpoint may go into a prepared network: quantizers then keep the state they have.

    Args:
        model: the network; changed in place.
        checkpoint: from :func:`qat.checkpoints.format.load_checkpoint`, or a state dict.
        classifier: ``keep`` loads the checkpoint's, which must tell as many classes apart; ``new`` leaves
            the classifier of ``model`` as it is, whatever the checkpoint has.

    Raises:
        CheckpointError: keys are missing or unexpected, shapes or types differ, values are not finite, or the
            two networks were prepared differently. The message lists all problems.
    """
    network = model.architecture
    if not isinstance(checkpoint, Checkpoint):
        state = dict(checkpoint)
        checkpoint = Checkpoint(
            infer_architecture(state, network.stem_stride, network.num_classes),
            state,
            format="state dict",
            has_classifier=has_classifier(state),
        )
    if classifier == "new":
        checkpoint = _without_classifier(checkpoint, network)
    elif not checkpoint.has_classifier:
        raise CheckpointError(
            f"{checkpoint.source}: has no classifier (fc.weight); qat finetune and qat pretrain can start "
            "a new one (model.classifier=new)"
        )
    problems = []
    if _differ(checkpoint, network):
        problems.append(f"the checkpoint is {checkpoint.architecture}; the network is {network}")
    float_keys = float_shapes(network)
    target: dict[str, Tensor] = model.state_dict()
    state = checkpoint.state
    quantizer_keys = {key for key in state if key not in float_shapes(checkpoint.architecture)}
    quantized = bool(quantizer_keys) or checkpoint.quantization is not None
    own = _CLASSIFIER if classifier == "new" else "\0"  # no key begins so
    missing = [
        key
        for key in target
        if key not in state and (key in float_keys or quantized) and not key.startswith(own)
    ]
    unexpected = [key for key in state if key not in target]
    # A prepared network that was saved by other means than `save_checkpoint` comes without its settings, but
    # keys of zero points show that it was quantized.
    of_quantized = checkpoint.quantization is not None or any(
        key.endswith("zero_point") for key in unexpected
    )
    if of_quantized and target.keys() == float_keys.keys():
        problems.append("the checkpoint is of a quantized network; the network is in float")
    elif quantizer_keys and (difference := _prepared_differently(model, checkpoint)):
        problems.append(difference)
    shared = [(key, value, target[key]) for key, value in state.items() if key in target]
    misshapen = [
        f"{key} (checkpoint {list(value.shape)}, network {list(wanted.shape)})"
        for key, value, wanted in shared
        if value.shape != wanted.shape
    ]
    mistyped = [
        f"{key} (checkpoint {dtype_name(value.dtype)}, network {dtype_name(wanted.dtype)})"
        for key, value, wanted in shared
        if value.dtype != wanted.dtype and not (value.is_floating_point() and wanted.is_floating_point())
    ]
    unusable = [
        f"{key} ({problem})"
        for key, value, wanted in shared
        if (problem := not_finite(key, value, key in float_keys))
        or (value.is_floating_point() and (problem := overflow(key, value, wanted.dtype, key in float_keys)))
    ]
    for what, keys in (
        ("missing", missing),
        ("unexpected", unexpected),
        ("of another shape", misshapen),
        ("of another type", mistyped),
        ("with values that are not finite", unusable),
        ("with negative variances", [key for key, value, _ in shared if has_negative_variance(key, value)]),
    ):
        if keys:
            problems.append(f"{len(keys)} {'key' if len(keys) == 1 else 'keys'} {what}: {listed(keys)}")
    if problems:
        raise CheckpointError("\n  ".join([f"{checkpoint.source}: does not fit the network:", *problems]))
    try:
        # Not strict, because quantizer keys may be absent; the checks above found all other problems.
        model.load_state_dict(state, strict=False)
    except RuntimeError as error:
        raise CheckpointError(f"{checkpoint.source}: does not fit the network: {error}") from error


def _without_classifier(checkpoint: Checkpoint, network: Architecture) -> Checkpoint:
    """``checkpoint`` without the classifier's tensors, and with the number of classes of ``network``."""
    state = {key: value for key, value in checkpoint.state.items() if not key.startswith(_CLASSIFIER)}
    architecture = replace(checkpoint.architecture, num_classes=network.num_classes)
    return replace(checkpoint, architecture=architecture, state=state)


def build(checkpoint: Checkpoint) -> BNext:
    """The network that ``checkpoint`` holds, on the CPU and in evaluation mode.

    No random numbers are drawn.

    Args:
        checkpoint: from :func:`qat.checkpoints.format.load_checkpoint`.

    Raises:
        CheckpointError: the state doesn't fit the architecture, or the network can't be prepared as recorded.
    """
    with torch.device("meta"):
        model = BNext.from_architecture(checkpoint.architecture)
    model.to_empty(device="cpu")
    # Float weights are loaded before the network is prepared, because preparing may read the weights, which
    # are uninitialized memory so far.
    if checkpoint.quantization is None:
        load_state(model, checkpoint)
    else:
        load_state(model, without_quantizers(checkpoint))
        data = checkpoint.recipe.data if checkpoint.recipe else None
        try:
            prepare(model, checkpoint.quantization, image_grid(data.mean, data.std) if data else None)
        except QuantizationError as error:
            raise CheckpointError(f"{checkpoint.source}: cannot be prepared: {error}") from error
        load_state(model, checkpoint)
    model.facts = facts_of(checkpoint)
    return model.eval()


def facts_of(checkpoint: Checkpoint) -> Facts:
    """What ``checkpoint`` knows about images and classes."""
    names = class_names(checkpoint)
    if checkpoint.recipe is None:
        return Facts(class_names=names)
    data = checkpoint.recipe.data
    return Facts(data.mean, data.std, data.image_size, names, checkpoint.recipe)


def class_names(checkpoint: Checkpoint) -> tuple[str, ...]:
    """Class names a checkpoint carries; empty where it carries none or not as many as classes."""
    try:
        names = json.loads(checkpoint.metadata.get("class_names", "[]"))
    except ValueError:
        return ()
    fits = isinstance(names, list) and len(names) == checkpoint.architecture.num_classes
    return tuple(str(name) for name in names) if fits else ()


def float_network(checkpoint: Checkpoint) -> BNext:
    """The network of ``checkpoint`` without quantizers.

    From a quantized checkpoint it keeps one property: binary activations map 0 to +1.

    Raises:
        CheckpointError: the state doesn't fit the architecture.
    """
    model = build(without_quantizers(checkpoint))
    for module in model.modules():
        if isinstance(module, BinaryActivation):
            module.zero_is_positive = checkpoint.quantization is not None
    return model


def without_quantizers(checkpoint: Checkpoint) -> Checkpoint:
    """A copy of ``checkpoint`` without the state of quantizers and without quantization settings."""
    keys = float_shapes(checkpoint.architecture)
    state = {key: value for key, value in checkpoint.state.items() if key in keys}
    return replace(checkpoint, state=state, quantization=None)


def _differ(checkpoint: Checkpoint, network: Architecture) -> bool:
    """Whether the checkpoint's architecture is another one than ``network``."""
    known = checkpoint.architecture
    if checkpoint.format != FORMAT:
        # Published checkpoints don't record the stem's stride, so the stride assumed for them is ignored.
        known = replace(known, stem_stride=network.stem_stride)
    return known != network


def _prepared_differently(model: BNext, checkpoint: Checkpoint) -> str:
    """A message about the first quantization setting that differs, or an empty string.

    The settings have to be compared, because the state dicts of grids with different bits have equal keys.
    """
    network: Quantization | None = getattr(model, "quantization", None)
    if network is None or checkpoint.quantization is None:
        return ""
    theirs, ours = (dict(_settings(one)) for one in (checkpoint.quantization, network))
    for key in theirs:
        if theirs[key] != ours.get(key):
            return f"the checkpoint was prepared with {key} {theirs[key]}; the network with {ours.get(key)}"
    return ""


def _settings(quantization: Quantization) -> Iterator[tuple[str, Any]]:
    """Dotted key and value of each setting that decides what the values of a quantizer's state mean."""
    for key, value in flatten(quantization.model_dump(mode="json"), "quantization."):
        # The averaging constant says how a range is tracked from here on, not what the saved grid is.
        if not key.endswith(".averaging_constant"):
            yield key, value
