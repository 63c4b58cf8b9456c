"""Checkpoints: one safetensors file with 1-bit binary weights, and everything needed to rebuild the network.

The file holds the network's state dict with two changes:

- A binary convolution whose temperature lies below 1e-7 uses only the signs of its latent weights. So
  ``<name>.weight`` is replaced by ``<name>.weight.sign_bits``, uint8 with one bit per weight as
  ``numpy.packbits`` writes them: in C order of (out, in, row, column), the first weight in the most
  significant bit, 1 for ``weight >= 0``, and the last byte filled up with zeros.
- The matrices of stem, channel attention and classifier may be float16.

The metadata holds a SHA-256 over the tensors (:func:`tensors_hash`). Without it most damage to the tensors
would go unnoticed, since nearly any byte is a valid part of some weight.

All metadata is one JSON text under one key (:mod:`qat.checkpoints.header`). safetensors keeps several keys in
no fixed order, and equal checkpoints should be equal files.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import pydantic
import safetensors.torch
import torch
from torch import Tensor

from qat import __version__
from qat.checkpoints.architecture import float_shapes, has_classifier, infer_architecture
from qat.checkpoints.header import FORMAT, FORMAT_VERSION, read_header
from qat.checkpoints.published import is_safetensors, read_published, read_safetensors
from qat.checkpoints.tensor_checks import dtype_name, listed, not_finite, overflow
from qat.checkpoints.wrappers import with_batch_counts
from qat.errors import CheckpointError, QatError, first_line
from qat.models.bnext import Architecture, BNext, binary_convolutions
from qat.quantize.preparation import quantization_map
from qat.recipe.loading import parse_recipe
from qat.recipe.schema import Quantization, Recipe
from qat.system.files import write_atomically
from qat.system.tensor_hash import tensors_sha256

_BITS: Final = ".sign_bits"
#: Keys of the float matrices that may be stored in half precision. They are known by their names, because a
#: vector and a matrix can have equal shapes.
_MATRIX: Final = re.compile(r"feature\.0\.conv1\.weight|feature\.\d+\.\w+\.se\.se\.[13]\.weight|fc\.weight")


@dataclass(frozen=True)
class Checkpoint:
    """The content of a checkpoint file.

    Attributes:
        architecture: which BNext the network is.
        state: the network's tensors by state-dict key, the state of quantizers included. Floating-point
            tensors are float32.
        recipe: recipe of the run that wrote the file.
        quantization: recipe section that the network was prepared with; ``None`` for a float network.
        format: ``bnext-qat``, ``published weights``, ``published training checkpoint`` or
            ``published quantized``.
        metadata: free facts, such as accuracies.
        quantization_map: result of :func:`qat.quantize.preparation.quantization_map` when the file was
            written.
        source: path of the file, for messages.
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


def save_checkpoint(
    path: Path,
    model: BNext,
    *,
    recipe: Recipe | None,
    metadata: Mapping[str, str] | None = None,
    float_dtype: Literal["float32", "float16"] = "float32",
) -> None:
    """Write ``model`` to ``path``, atomically. Equal arguments give equal bytes.

    Args:
        path: file to create or replace.
        model: float or prepared network, on any device.
        recipe: recipe of the run, which is stored with every default written out.
        metadata: free facts to store.
        float_dtype: type in which the weights of stem, channel attention and classifier are stored. All other
            floating-point tensors are stored as float32.

    Raises:
        CheckpointError: a tensor holds NaN, an infinity, or a value too large for the type in which it is
            stored.
        OutputError: ``path`` can't be written.
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
            # Each tensor is copied, because safetensors refuses tensors that share memory.
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
    """``model`` with its weights rounded as :func:`save_checkpoint` stores them.

    For ``float32`` it is ``model`` itself, for ``float16`` a copy.
    """
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
        CheckpointError: the file doesn't exist, is damaged, was written by a newer version of this package,
            or doesn't hold a BNext.
    """
    if not 0 < latent < math.inf:
        raise CheckpointError(f"latent {latent}: need a finite number above 0")
    try:
        if is_safetensors(path):
            tensors, metadata = read_safetensors(path)
            if FORMAT in metadata:
                return _decode(path, tensors, metadata[FORMAT], latent)
        found = read_published(path, state_key)
        state = {key: _in_float32(value) for key, value in with_batch_counts(found.state).items()}
        architecture = infer_architecture(state, stem_stride, num_classes or 1000)
    except CheckpointError as error:
        # Most checks don't know the file, so its name is put in front of their messages here.
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
    """SHA-256 of named tensors as 64 hexadecimal digits, independent of the order of ``tensors``.

    It is :func:`qat.system.tensor_hash.tensors_sha256` of the tensors sorted by name, with the facts ``[name,
    dtype, shape]``. The values are hashed as they lie in memory, which is little-endian on all machines that
    torch runs on.

    Args:
        tensors: tensors on the CPU, by name.
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
        CheckpointError: the file can't be read.
    """
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error


def _decode(path: Path, tensors: dict[str, Tensor], text: str, latent: float) -> Checkpoint:
    """The checkpoint in a file of this package, from its tensors and the JSON text of its header."""
    header = read_header(text)
    try:
        found = tensors_hash(tensors)
    except (
        RuntimeError,
        TypeError,
    ) as error:  # a type whose bytes torch can't give, and which is never written
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
            state[key] = _in_float32(value)
    inferred = infer_architecture(state, header.architecture.stem_stride)
    if inferred != header.architecture:
        raise CheckpointError(f"says it is {header.architecture}, but its tensors are {inferred}")
    if quantization is None and (extra := [key for key in state if key not in float_shapes(inferred)]):
        raise CheckpointError(f"says it is a float network, but has further keys: {listed(extra)}")
    return Checkpoint(
        inferred, state, recipe, quantization, FORMAT, header.metadata, header.quantization_map, str(path)
    )


def _unpack(key: str, bits: Tensor, shape: tuple[int, ...], latent: float) -> Tensor:
    """Latent weights of ``±latent``, float32 of ``shape``, from their packed sign bits."""
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


def _in_float32(value: Tensor) -> Tensor:
    """A floating-point tensor as float32, any other tensor as it is."""
    return value.to(torch.float32) if value.is_floating_point() else value
