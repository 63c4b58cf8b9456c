"""Checkpoints: one safetensors file with 1-bit binary weights, and everything needed to rebuild the network.

The file holds the network's state dict with two changes. A binary convolution whose temperature lies below
1e-7 uses nothing of its latent weights but their signs, so ``<name>.weight`` is replaced by
``<name>.weight.sign_bits``: uint8, one bit per weight in C order of (out, in, row, column), the first weight
in the most significant bit, 1 for ``weight >= 0``, the last byte filled up with zeros
(``numpy.packbits``). And the matrices of stem, channel attention and classifier may be float16.

The metadata holds a SHA-256 over the tensors (:func:`tensors_hash`), so that damage to them is found: most
flipped bytes would otherwise be weights like any other.

All metadata is one JSON text under one key: safetensors keeps several keys in no fixed order, and equal
checkpoints shall be equal files.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import numpy as np
import pydantic
import safetensors.torch
import torch
from torch import Tensor

from qat import __version__
from qat.checkpoints.published import is_safetensors, read_published, read_safetensors
from qat.checkpoints.tensor_checks import dtype_name, listed, not_finite, overflow
from qat.checkpoints.wrappers import with_batch_counts
from qat.errors import CheckpointError, QatError, QuantizationError, first_line
from qat.models.bnext import Architecture, BNext, binary_convolutions
from qat.quantize.preparation import quantization_map
from qat.recipe.loading import parse_recipe
from qat.recipe.schema import Quantization, Recipe
from qat.system.files import write_atomically
from qat.system.tensor_hash import tensors_sha256

FORMAT: Final = "bnext-qat"
FORMAT_VERSION: Final = 1
_BITS: Final = ".sign_bits"
#: Float matrices, which half precision may store. By name: a vector and a matrix can have equal shapes.
_MATRIX: Final = re.compile(r"feature\.0\.conv1\.weight|feature\.\d+\.\w+\.se\.se\.[13]\.weight|fc\.weight")


@dataclass(frozen=True)
class Checkpoint:
    """A network at rest.

    Attributes:
        architecture: which BNext.
        state: network tensors by state-dict key, floating ones float32; quantizer state too, if any.
        recipe: of the run that wrote it.
        quantization: what the network was prepared with; ``None`` for a float network.
        format: ``bnext-qat``, ``published weights``, ``published training checkpoint`` or
            ``published quantized``.
        metadata: free facts such as accuracies.
        quantization_map: see :func:`qat.quantize.preparation.quantization_map`, as it was when saved.
        source: file it came from, for messages.
        has_classifier: whether ``state`` has one; without it ``architecture.num_classes`` means nothing.
        notes: how the file was read where that isn't plain, in words, for the user to read.
    """

    architecture: Architecture
    state: dict[str, Tensor]
    recipe: Recipe | None = None
    quantization: Quantization | None = None
    format: str = FORMAT
    metadata: dict[str, str] = field(default_factory=dict)
    quantization_map: dict[str, dict[str, Any]] = field(default_factory=dict)
    source: str = "checkpoint"
    has_classifier: bool = True
    notes: tuple[str, ...] = ()


#: Bounded, so that a damaged header can't name a number too long to print.
_Side = Annotated[int, pydantic.Field(ge=1, lt=2**31)]


class _Header(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid", strict=True)

    format_version: int
    #: Of the tensors as they are in the file, see :func:`tensors_hash`.
    tensors_sha256: str
    architecture: Architecture
    recipe: dict[str, Any] | None
    quantization: dict[str, Any] | None
    quantization_map: dict[str, dict[str, Any]]
    #: Shape of each weight stored as sign bits, by state-dict key.
    sign_bits: dict[str, tuple[_Side, _Side, _Side, _Side]]
    versions: dict[str, str]
    metadata: dict[str, str]


def infer_architecture(
    state: Mapping[str, Tensor], stem_stride: int | None = None, num_classes: int | None = None
) -> Architecture:
    """The architecture that a state dict belongs to, from its keys and shapes.

    Args:
        state: tensors by key, without prefix; quantizer keys are ignored.
        stem_stride: the one option that leaves no trace in a state dict; ``None`` means 2 at 1000 classes,
            else 1.
        num_classes: taken where the state has no classifier, which is refused by default.

    Raises:
        CheckpointError: no BNext has these keys; the message names a key that is missing or contradicts.
    """

    def shape(key: str, ndim: int) -> tuple[int, ...]:
        if key not in state:
            raise CheckpointError(f"not a BNext: key {key!r} is missing")
        if state[key].ndim != ndim:
            raise CheckpointError(
                f"not a BNext: {key}: shape {list(state[key].shape)}, expected {ndim} sides"
            )
        return tuple(state[key].shape)

    widths = [shape("feature.0.conv1.weight", 4)[0]]
    numbers = {int(found[1]) for key in state if (found := re.match(r"feature\.(\d{1,4})\.", key))}
    elm_attention = "feature.1.FFN_3x3.binary_conv.weight" not in state
    spatial = "Attention" if elm_attention else "FFN_3x3"
    for i in range(1, max(max(numbers), 1) + 1):
        key = f"feature.{i}.{spatial}.binary_conv.weight"
        channels = shape(key, 4)[0]
        if channels != widths[-1]:
            raise CheckpointError(f"not a BNext: {key}: {channels} channels after a width of {widths[-1]}")
        doubles = any(key.startswith((f"feature.{i}.FFN_1.", f"feature.{i}.FFN_2.")) for key in state)
        for name in ("FFN_1", "FFN_2") if doubles else ("FFN",):
            shape(f"feature.{i}.{name}.binary_conv.weight", 4)
        widths.append(2 * channels if doubles else channels)
    if num_classes is None or has_classifier(state):
        num_classes = shape("fc.weight", 2)[0]
    try:
        return Architecture.of(
            num_classes=num_classes,
            widths=widths,
            stem_stride=stem_stride,
            elm_attention=elm_attention,
            infor_recoupling=any(".se.se.1." in key for key in state),
        )
    except QuantizationError as error:
        raise CheckpointError(f"not a BNext: {error}") from error


def has_classifier(state: Mapping[str, Tensor]) -> bool:
    """Whether a state dict has a classifier; that of a backbone hasn't."""
    return any(key.startswith("fc.") for key in state)


def save_checkpoint(
    path: Path,
    model: BNext,
    *,
    recipe: Recipe | None,
    metadata: Mapping[str, str] | None = None,
    float_dtype: Literal["float32", "float16"] = "float32",
) -> None:
    """Write ``model`` to ``path``, atomically; equal input gives equal bytes.

    Args:
        path: file to create or replace.
        model: float or prepared network, on any device.
        recipe: of the run; stored with every default written out.
        metadata: free facts to keep.
        float_dtype: how stem, channel-attention and classifier weights are stored. Everything else that is
            floating is float32.

    Raises:
        CheckpointError: a tensor holds NaN, or a value too large for its stored type.
        OutputError: ``path`` cannot be written.
    """
    tensors: dict[str, Tensor] = {}
    sign_bits: dict[str, list[int]] = {}
    binary = {
        f"{name}.weight"
        for name, convolution in binary_convolutions(model).items()
        if convolution.is_binary()
    }
    float_keys = float_shapes(model.architecture)
    for key, value in model.state_dict().items():
        value = value.detach().cpu()
        stored = value
        if value.is_floating_point():
            half = float_dtype == "float16" and _MATRIX.fullmatch(key)
            stored = value.to(torch.float16 if half else torch.float32)
        in_float_network = key in float_keys
        if problem := not_finite(key, value, in_float_network) or overflow(
            key, value, stored.dtype, in_float_network
        ):
            raise CheckpointError(f"{path}: not written: {key}: {problem}")
        if key in binary:
            bits = np.packbits((value >= 0).numpy().reshape(-1))
            tensors[key + _BITS] = torch.from_numpy(bits)
            sign_bits[key] = list(value.shape)
        else:
            # A copy of its own: safetensors refuses tensors that share memory.
            tensors[key] = stored.clone(memory_format=torch.contiguous_format)
    quantization = getattr(model, "quantization", None)
    header = {
        "format_version": FORMAT_VERSION,
        "tensors_sha256": tensors_hash(tensors),
        "architecture": asdict(model.architecture),
        "recipe": None if recipe is None else recipe.model_dump(mode="json"),
        "quantization": None if quantization is None else quantization.model_dump(mode="json"),
        "quantization_map": quantization_map(model),
        "sign_bits": sign_bits,
        "versions": {"bnext-qat": __version__, "torch": str(torch.__version__)},
        "metadata": {str(name): str(fact) for name, fact in (metadata or {}).items()},
    }
    text = json.dumps(header, sort_keys=True, separators=(",", ":"), allow_nan=False)
    write_atomically(path, safetensors.torch.save(tensors, {FORMAT: text}))


def as_stored(model: BNext, float_dtype: Literal["float32", "float16"]) -> BNext:
    """``model`` with the values that :func:`save_checkpoint` would store: a copy where they differ."""
    if float_dtype == "float32":
        return model
    stored = copy.deepcopy(model)
    with torch.no_grad():
        for key, parameter in stored.named_parameters():
            if _MATRIX.fullmatch(key):
                parameter.copy_(parameter.half())
    return stored


def load_checkpoint(
    path: Path,
    *,
    latent: float = 1.0,
    stem_stride: int | None = None,
    num_classes: int | None = None,
    state_key: str | None = None,
) -> Checkpoint:
    """Read a checkpoint of this package, or one that other code wrote.

    Args:
        path: file to read.
        latent: magnitude of the latent weights that sign bits become, above 0.
        stem_stride: stem stride of a published checkpoint, which doesn't say; ``None`` means 2 at 1000
            classes, else 1. Checkpoints of this package know theirs.
        num_classes: of the architecture where the file has no classifier; ``None`` means 1000.
        state_key: which state dict to take where the file holds several; ``None`` chooses, see
            :func:`qat.checkpoints.network_search.find_network`. Checkpoints of this package hold one.

    Raises:
        CheckpointError: the file is absent, damaged, of a newer version, or no BNext.
    """
    if not 0 < latent < math.inf:
        raise CheckpointError(f"latent {latent}: need a finite number above 0")
    try:
        if is_safetensors(path):
            tensors, metadata = read_safetensors(path)
            if FORMAT in metadata:
                return _decode(path, tensors, metadata[FORMAT], latent)
        found = read_published(path, state_key)
        state = {key: _widened(value) for key, value in with_batch_counts(found.state).items()}
        architecture = infer_architecture(state, stem_stride, num_classes or 1000)
    except CheckpointError as error:
        # Problems of the content, found without knowing where it came from, get the file's name here.
        if str(error).startswith(f"{path}: "):
            raise
        raise CheckpointError(f"{path}: {error}") from error
    return Checkpoint(
        architecture,
        state,
        format=found.format,
        metadata={key: str(value) for key, value in found.facts.items()},
        source=str(path),
        has_classifier=has_classifier(state),
        notes=found.notes,
    )


def tensors_hash(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of named tensors as 64 hexadecimal digits, whatever their order.

    Sorted by name, each with the facts ``[name, dtype, shape]``. The values are covered as they lie in
    memory, which is little-endian on all machines that torch runs on.
    """
    return tensors_sha256(
        (
            [name, dtype_name(value.dtype), list(value.shape)],
            value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes(),
        )
        for name, value in sorted(tensors.items())
    )


def file_hash(path: Path) -> str:
    """SHA-256 of a file's bytes as 64 hexadecimal digits.

    Raises:
        CheckpointError: the file cannot be read.
    """
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error


def _decode(path: Path, tensors: dict[str, Tensor], text: str, latent: float) -> Checkpoint:
    header = _read_header(text)
    try:
        found = tensors_hash(tensors)
    except (RuntimeError, TypeError) as error:  # types that torch can't show the bytes of; we write none
        raise CheckpointError(f"its tensors are damaged: {first_line(error)}") from error
    if found != header.tensors_sha256:
        raise CheckpointError(
            f"its tensors are damaged: their SHA-256 is {found[:12]}…, {header.tensors_sha256[:12]!r}… was "
            "recorded when they were written"
        )
    try:
        recipe = None if header.recipe is None else parse_recipe(header.recipe, "recipe")
        quantization = (
            None if header.quantization is None else Quantization.model_validate(header.quantization)
        )
    except (QatError, pydantic.ValidationError) as error:
        raise CheckpointError(f"its settings are not valid: {first_line(error)}") from error
    packed = {key.removesuffix(_BITS) for key in tensors if key.endswith(_BITS)}
    if odd := sorted(packed ^ header.sign_bits.keys()):
        raise CheckpointError(f"sign bits and recorded shapes disagree: {listed(odd)}")
    state: dict[str, Tensor] = {}
    for key, value in tensors.items():
        if key.endswith(_BITS):
            name = key.removesuffix(_BITS)
            if name in tensors:
                raise CheckpointError(f"{name}: stored twice, as sign bits and as weights")
            state[name] = _unpack(key, value, header.sign_bits[name], latent)
        else:
            state[key] = _widened(value)
    inferred = infer_architecture(state, header.architecture.stem_stride)
    if inferred != header.architecture:
        raise CheckpointError(f"says it is {header.architecture}, but its tensors are {inferred}")
    if quantization is None and (extra := [key for key in state if key not in float_shapes(inferred)]):
        raise CheckpointError(f"says it is a float network, but has further keys: {listed(extra)}")
    return Checkpoint(
        inferred, state, recipe, quantization, FORMAT, header.metadata, header.quantization_map, str(path)
    )


def _read_header(text: str) -> _Header:
    try:
        raw = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"its metadata is not JSON: {first_line(error)}") from error
    version = raw.get("format_version") if isinstance(raw, dict) else None
    if type(version) is not int or version < 1:
        raise CheckpointError("its metadata has no format version")
    # Before anything else: a newer version may have other keys.
    if version > FORMAT_VERSION:
        raise CheckpointError(
            f"has format version {version}; this bnext-qat {__version__} reads up to {FORMAT_VERSION}"
        )
    try:
        header = _Header.model_validate_json(text)
        # Not only the types: widths that no network has, too.
        Architecture.of(num_classes=header.architecture.num_classes, widths=header.architecture.widths)
    except pydantic.ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise CheckpointError(f"its metadata is not valid: {where}: {first['msg']}") from error
    except QuantizationError as error:
        raise CheckpointError(f"its metadata is not valid: architecture: {error}") from error
    if header.architecture.stem_stride not in (1, 2):
        raise CheckpointError(
            f"its metadata is not valid: stem stride {header.architecture.stem_stride}, allowed: 1, 2"
        )
    return header


def _unpack(key: str, bits: Tensor, shape: tuple[int, ...], latent: float) -> Tensor:
    count = math.prod(shape)
    length = -(-count // 8)
    if bits.dtype != torch.uint8 or bits.ndim != 1 or bits.numel() != length:
        found = f"{dtype_name(bits.dtype)} {list(bits.shape)}"
        raise CheckpointError(f"{key}: found {found}, expected uint8 [{length}] for shape {list(shape)}")
    unpacked = np.unpackbits(bits.numpy())
    if unpacked[count:].any():
        raise CheckpointError(f"{key}: bits are set beyond the last weight")
    return torch.from_numpy(
        np.where(unpacked[:count], np.float32(latent), np.float32(-latent)).reshape(shape)
    )


def _widened(value: Tensor) -> Tensor:
    return value.to(torch.float32) if value.is_floating_point() else value


@lru_cache(maxsize=8)
def float_shapes(architecture: Architecture) -> Mapping[str, torch.Size]:
    """Shapes of the float network's state by key. Keys beyond these belong to quantizers."""
    with torch.device("meta"):
        state: dict[str, Tensor] = BNext.from_architecture(architecture).state_dict()
    return {key: value.shape for key, value in state.items()}
