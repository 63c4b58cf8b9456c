"""The header of a checkpoint: the JSON text in its metadata, with all that is not a tensor."""

from __future__ import annotations

import json
from typing import Annotated, Any, Final

import pydantic

from qat import __version__
from qat.errors import CheckpointError, QuantizationError, first_line
from qat.models.bnext import Architecture

#: Name of the format, and the key of the header in the metadata of the safetensors file.
FORMAT: Final = "bnext-qat"
#: Newest version of the format that is read, and the one that is written.
FORMAT_VERSION: Final = 1

#: Length of one axis of a weight. It has an upper bound because a damaged header could otherwise name a
#: number with more digits than Python prints.
_Side = Annotated[int, pydantic.Field(ge=1, lt=2**31)]


class Header(pydantic.BaseModel):
    """The header of one checkpoint. The names of the fields are the keys of the JSON text.

    Attributes:
        format_version: version of the format that the file was written in.
        tensors_sha256: hash of the tensors as the file stores them, from
            :func:`qat.checkpoints.format.tensors_hash`.
        architecture: which BNext the network is.
        recipe: the recipe of the run that wrote the file, if it was one.
        quantization: the recipe section that the network was prepared with; null for a float network.
        quantization_map: see :func:`qat.quantize.preparation.quantization_map`.
        sign_bits: shape (out, in, rows, columns) of each weight that is stored as sign bits, by state-dict
            key.
        versions: version of each package that wrote the file.
        metadata: free facts, such as accuracies.
    """

    model_config = pydantic.ConfigDict(extra="forbid", strict=True)

    format_version: int
    tensors_sha256: str
    architecture: Architecture
    recipe: dict[str, Any] | None
    quantization: dict[str, Any] | None
    quantization_map: dict[str, dict[str, Any]]
    sign_bits: dict[str, tuple[_Side, _Side, _Side, _Side]]
    versions: dict[str, str]
    metadata: dict[str, str]


def read_header(text: str) -> Header:
    """Parse and check the JSON text of a header.

    Raises:
        CheckpointError: the text is not JSON, was written by a newer version of this package, lacks a key or
            has an unknown one, or describes an architecture that no BNext has.
    """
    try:
        raw = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"its metadata is not JSON: {first_line(error)}") from error
    version = raw.get("format_version") if isinstance(raw, dict) else None
    if type(version) is not int or version < 1:
        raise CheckpointError("its metadata has no format version")
    # The version is checked before the keys, because a newer version may have other keys.
    if version > FORMAT_VERSION:
        raise CheckpointError(
            f"has format version {version}; this bnext-qat {__version__} reads up to {FORMAT_VERSION}"
        )
    try:
        header = Header.model_validate_json(text)
        # pydantic checks the types; this checks that a network can have these widths.
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
