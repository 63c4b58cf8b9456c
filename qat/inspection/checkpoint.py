"""Inspection of checkpoints, this project's and those of BNext's authors."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, cast

import torch
from torch import Tensor, nn

from qat.checkpoints.format import Checkpoint, load_checkpoint
from qat.checkpoints.header import FORMAT
from qat.checkpoints.published import is_safetensors, read_published, read_safetensors
from qat.checkpoints.tensor_checks import dtype_name, listed
from qat.errors import CheckpointError
from qat.inspection.facts import PLUS_MINUS_ONE, SIGN_BITS, InspectedLayer, Inspection, Range, Total, facts_of
from qat.models.bnext import BNext
from qat.nn.layers import Stem
from qat.nn.sub_block import SubBlock
from qat.quantize.quantizer_base import Quantizer
from qat.quantize.weight_quantizers import WeightQuantizer

#: Descriptions of the formats that :class:`qat.checkpoints.format.Checkpoint` names.
_FORMATS: Final = {
    "published weights": "weights in the format of BNext's authors (a bare state dict)",
    "published training checkpoint": "training checkpoint in the format of BNext's authors",
    "published quantized": "weights of the quantized variant of BNext's authors",
}
#: Number of keys of a foreign file that an error message lists.
_SHOWN: Final = 4


@dataclass(frozen=True)
class StoredTensor:
    """How a tensor lies in a file.

    Attributes:
        type: type of its values, such as ``float32``, or ``sign bits``.
        bits: bits of one value.
        size: bytes of the whole tensor.
    """

    type: str
    bits: int
    size: int


def open_checkpoint(path: Path) -> Checkpoint:
    """Load a checkpoint with :func:`qat.checkpoints.loading.load_checkpoint`.

    Raises:
        CheckpointError: the file is absent or damaged, or holds another network than BNext; in the last case
            the message lists some tensors of the file.
    """
    try:
        return load_checkpoint(path)
    except CheckpointError as error:
        if "not a BNext" not in str(error):
            raise
        keys = list(stored_tensors(path)[0])
        found = f"found {len(keys)} tensors: {listed(keys[:_SHOWN])}{', …' if len(keys) > _SHOWN else ''}"
        raise CheckpointError(f"{error}; {found}") from error


def inspect_checkpoint(path: Path, checkpoint: Checkpoint, network: BNext) -> Inspection:
    """Describe the checkpoint in ``path``, layer by layer.

    Args:
        path: the file.
        checkpoint: the checkpoint that was read from it.
        network: the network that was built from ``checkpoint``.

    Raises:
        CheckpointError: the file can't be read again.
    """
    stored, metadata = stored_tensors(path)
    layers = tuple(_layers(network, stored))
    # Tensors of the network alone: those of an optimizer count as part of the container.
    everything = sum(tensor.size for tensor in stored.values())
    values = sum(value.numel() for value in checkpoint.state.values())
    other = Total(
        values - sum(layer.weights for layer in layers), everything - sum(layer.size for layer in layers)
    )
    recipe = None if checkpoint.recipe is None else checkpoint.recipe.model_dump(mode="json")
    facts = facts_of(checkpoint.metadata, recipe or {})
    if checkpoint.notes:
        facts["notes"] = list(checkpoint.notes)
    if FORMAT in metadata:
        facts["versions"] = json.loads(metadata[FORMAT])["versions"]
    return Inspection(
        path=str(path),
        format=_format(path, checkpoint),
        file_size=path.stat().st_size,
        architecture=str(checkpoint.architecture),
        widths=checkpoint.architecture.widths,
        num_classes=checkpoint.architecture.num_classes,
        layers=layers,
        other=other,
        facts=facts,
        exported=False,
        published=checkpoint.format != FORMAT,
    )


def stored_tensors(path: Path) -> tuple[dict[str, StoredTensor], Mapping[str, str]]:
    """Find out how each tensor of a network is stored in a file.

    Returns:
        The tensors by state-dict key, and the metadata of the file, which may be empty.

    Raises:
        CheckpointError: the file is absent or damaged.
    """
    metadata: dict[str, str] = {}
    tensors: Mapping[str, Tensor] = {}
    if is_safetensors(path):
        tensors, metadata = read_safetensors(path)
    if FORMAT not in metadata:
        tensors = read_published(path).state
    ending = ".sign_bits"
    return {
        key.removesuffix(ending): StoredTensor(
            SIGN_BITS if key.endswith(ending) else dtype_name(value.dtype),
            1 if key.endswith(ending) else 8 * value.element_size(),
            value.numel() * value.element_size(),
        )
        for key, value in tensors.items()
    }, metadata


def _format(path: Path, checkpoint: Checkpoint) -> str:
    if checkpoint.format == FORMAT:
        return f"bnext-qat checkpoint, {'float rest' if checkpoint.quantization is None else 'fine-tuned'}"
    return f"{_FORMATS[checkpoint.format]}, {'safetensors' if is_safetensors(path) else 'torch.save'}"


def _layers(network: BNext, stored: Mapping[str, StoredTensor]) -> Iterator[InspectedLayer]:
    stem = cast(Stem, network.feature[0])
    yield _rest("feature.0", "stem", {"conv1.weight": stem.conv1.weight}, stem, stem.trunk, stored)
    for name, module in network.named_modules():
        if isinstance(module, SubBlock):
            yield _binary(name, module, stored[f"{name}.binary_conv.weight"])
            if module.infor_recoupling:
                weights = {
                    f"se.{index}.weight": cast(nn.Conv2d, module.se.se[index]).weight for index in (1, 3)
                }
                result = getattr(module.se, "attention", None)
                yield _rest(f"{name}.se", "attention", weights, module.se, result, stored)
    yield _rest("fc", "classifier", {"weight": network.fc.weight}, network.fc, None, stored)


def _binary(name: str, module: SubBlock, stored: StoredTensor) -> InspectedLayer:
    conv = module.binary_conv
    with torch.no_grad():
        used = conv.effective_weight()
    return InspectedLayer(
        name,
        f"{module.kind} {module.kernel_size}×{module.kernel_size}",
        (tuple(conv.weight.shape),),
        stored.type,
        stored.bits,
        stored.size,
        _range([conv.weight]),
        in_use=PLUS_MINUS_ONE if (share := _exact(used)) == 1.0 else "clamp(w / T, -1, 1)",
        result=_type(getattr(module, "y", None)),
        exact_stored=_exact(conv.weight),
        temperature=float(conv.temperature),
        exact_in_use=share,
    )


def _rest(
    name: str,
    kind: str,
    weights: Mapping[str, Tensor],
    module: nn.Module,
    result: object,
    stored: Mapping[str, StoredTensor],
) -> InspectedLayer:
    """Describe the stem, a channel attention or the classifier.

    Args:
        name, kind: see :class:`qat.inspection.facts.InspectedLayer`.
        weights: the weights by their key in the state dict, less the prefix ``name``.
        module: the layer.
        result: the quantization point of its result, if it has one.
        stored: how the tensors are stored, by state-dict key.
    """
    found = [stored[f"{name}.{leaf}"] for leaf in weights]
    quantizer = getattr(module, "weight_quantizer", None)
    scale = None
    if isinstance(quantizer, WeightQuantizer):
        scale = _range([quantizer.scale(weight) for weight in weights.values()])
    return InspectedLayer(
        name,
        kind,
        tuple(tuple(weight.shape) for weight in weights.values()),
        " and ".join(sorted({tensor.type for tensor in found})),
        max(tensor.bits for tensor in found),
        sum(tensor.size for tensor in found),
        _range(list(weights.values())),
        in_use=f"int{quantizer.bits}" if isinstance(quantizer, WeightQuantizer) else "float32",
        result=_type(result),
        scale=scale,
    )


def _type(point: object) -> str:
    """Type of the values of a quantization point, such as ``int8``; ``float32`` if there is none."""
    if isinstance(point, Quantizer) and (kind := str(point.describe()["type"])) != "float":
        return kind
    return "float32"


def _exact(weights: Tensor) -> float:
    return int(torch.count_nonzero(weights.detach().abs() == 1.0)) / weights.numel()


def _range(tensors: Sequence[Tensor]) -> Range:
    ends = [torch.aminmax(tensor.detach()) for tensor in tensors]
    return min(float(end.min) for end in ends), max(float(end.max) for end in ends)
