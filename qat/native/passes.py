"""Passes over images by the native library (C++: ``src/training/*_impl.h``): memory is read once.

torch's operators take two to five times as many passes for the same formulas. Sums are taken plane by plane,
so that nothing depends on the number of threads. Where :func:`qat.native.bindings.usable` says no, callers
use torch's operators. What each pass computes of its fields, and what the fields are, says
``src/training/shared.def``.

Images are (N, C, H, W) here, vectors are (C,) of a channel or (N, C) of an image's channel.
"""

from __future__ import annotations

import ctypes
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from qat.grid import Grid
from qat.native.bindings import library, usable
from qat.native.structures import another_version

#: Values that make up a plane of a tensor without images.
_FLAT: Final = 4096


def fits(x: Tensor, other: Tensor) -> bool:
    """Whether the passes can work on both, value by value."""
    return usable(x) and usable(other) and other.dtype == x.dtype and other.shape == x.shape


def _run(name: str, like: Tensor, channels: int, pixels: int, fields: dict[str, Any]) -> Any:
    """Run a pass over as many values as ``like`` has, and of its type; returns the arguments' struct.

    Raises `NativeLibraryError` where the library has no such pass, or one with other fields.
    """
    native = library()
    assert native is not None
    if name not in native.passes:
        raise another_version()
    arguments = native.passes[name].filled(fields)
    native.run_pass(
        native.numbers[name],
        native.types[like.dtype],
        like.numel(),
        channels,
        pixels,
        ctypes.byref(arguments),
        native.parallel,
        torch.get_num_threads(),
    )
    return arguments


def _over_planes(name: str, x: Tensor, **fields: Any) -> None:
    _run(name, x, x.shape[1], x.shape[2:].numel(), {"x": x, **fields})


def _vector(values: Tensor, like: Tensor) -> Tensor:
    """``values`` (..., C) in the type of sums of ``like``, one behind the other."""
    if values.shape[-1] != like.shape[1]:
        raise ValueError(f"{tuple(values.shape)} for the channels of {tuple(like.shape)}")
    return values.detach().to(sum_type(like)).contiguous()


def _of_planes(values: Tensor, like: Tensor) -> Tensor:
    """(N, C) or (1, C) as (N, C)."""
    return _vector(values.expand(like.shape[:2]), like)


def _like(grad: Tensor, x: Tensor) -> Tensor:
    """A gradient as the passes take it."""
    return grad.to(x.dtype).contiguous()


def _sums(x: Tensor) -> Tensor:
    return x.new_empty(x.shape[:2], dtype=sum_type(x))


def sum_type(x: Tensor) -> torch.dtype:
    """Type of coefficients and sums: float64's own, float32 for the others."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def sign(x: Tensor, offset: Tensor, zero_is_positive: bool) -> Tensor:
    """``sign(x + offset)``, offset (C,)."""
    out = torch.empty_like(x)
    _over_planes("sign", x, offset=_vector(offset, x), zero_is_positive=zero_is_positive, out=out)
    return out


def sign_gradient(grad: Tensor, x: Tensor, offset: Tensor, clip: float) -> tuple[Tensor, Tensor]:
    """Gradient of :func:`sign`, which passes where ``|x + offset| < clip``, and its sums (N, C)."""
    grad, grad_x, grad_offset = _like(grad, x), torch.empty_like(x), _sums(x)
    results = {"grad_x": grad_x, "grad_offset": grad_offset}
    _over_planes("sign_gradient", x, grad=grad, offset=_vector(offset, x), clip=clip, **results)
    return grad_x, grad_offset


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance without correction, (N, C) each."""
    mean, variance = _sums(x), _sums(x)
    _over_planes("moments", x, mean=mean, variance=variance)
    return mean, variance


class NormPrelu(NamedTuple):
    """What a normalization and its PReLU do to each channel: (C,) each."""

    gain: Tensor
    offset: Tensor
    slope: Tensor


def norm_prelu(x: Tensor, by: NormPrelu, grid: Grid | None = None) -> Tensor:
    """``PReLU(gain x + offset)``; with a grid ``Q(PReLU(Q(gain x + offset)))``."""
    out = torch.empty_like(x)
    _over_planes("norm_prelu", x, grid=grid, out=out, **_vectors(x, by))
    return out


def _vectors(x: Tensor, by: NormPrelu, **others: Tensor) -> dict[str, Tensor]:
    return {name: _vector(one, x) for name, one in (by._asdict() | others).items()}


class NormSums(NamedTuple):
    """Sums (N, C) of a gradient before PReLU: itself, times ``x - center``; and the slopes' gradient."""

    grad: Tensor
    product: Tensor
    slope: Tensor


def norm_prelu_sums(
    grad: Tensor, x: Tensor, by: NormPrelu, center: Tensor, grid: Grid | None = None
) -> NormSums:
    """Sums that the gradient of a normalization takes of the whole batch; center (C,)."""
    found = NormSums(_sums(x), _sums(x), _sums(x))
    sums = {"grad_sum": found.grad, "grad_product": found.product, "grad_slope": found.slope}
    vectors = _vectors(x, by, center=center)
    _over_planes("norm_prelu_sums", x, grad=_like(grad, x), grid=grid, **vectors, **sums)
    return found


def norm_prelu_gradient(
    grad: Tensor,
    x: Tensor,
    by: NormPrelu,
    center: Tensor,
    shift: Tensor,
    tilt: Tensor,
    grid: Grid | None = None,
) -> Tensor:
    """``gain`` times the gradient before PReLU, ``+ shift + tilt (x - center)``; vectors (C,)."""
    grad_x = torch.empty_like(x)
    vectors = _vectors(x, by, center=center, shift=shift, tilt=tilt)
    _over_planes("norm_prelu_gradient", x, grad=_like(grad, x), grid=grid, grad_x=grad_x, **vectors)
    return grad_x


def prelu(x: Tensor, slope: Tensor, grid: Grid | None = None) -> Tensor:
    """``PReLU(x)``, slopes (C,); on the grid where there is one."""
    out = torch.empty_like(x)
    _over_planes("prelu", x, slope=_vector(slope, x), grid=grid, out=out)
    return out


def prelu_gradient(grad: Tensor, x: Tensor, slope: Tensor, grid: Grid | None = None) -> tuple[Tensor, Tensor]:
    """Gradient of :func:`prelu` by ``x``, and that by the slope of each image (N, C)."""
    grad, grad_x, grad_slope = _like(grad, x), torch.empty_like(x), _sums(x)
    results = {"grad_x": grad_x, "grad_slope": grad_slope}
    _over_planes("prelu_gradient", x, grad=grad, slope=_vector(slope, x), grid=grid, **results)
    return grad_x, grad_slope


def scale(x: Tensor, factor: Tensor, shift: Tensor | None = None) -> Tensor:
    """``factor x + shift``, both (N, C) or (1, C)."""
    out = torch.empty_like(x)
    shift = None if shift is None else _of_planes(shift, x)
    _over_planes("scale", x, factor=_of_planes(factor, x), shift=shift, out=out)
    return out


def fake_quantize(x: Tensor, grid: Grid, overwrite: bool) -> tuple[Tensor, Tensor | None]:
    """``x`` on the grid, any shape; and where a gradient passes, ``None`` for everywhere."""
    out = x if overwrite else torch.empty_like(x)
    inside = torch.empty_like(x, dtype=torch.bool)
    fields = {"x": x, "grid": grid, "out": out, "inside": inside, "outside": 0}
    done = _run("fake_quantize", x, 1, _FLAT, fields)
    return out, inside if done.outside else None


def fake_quantize_gradient(grad: Tensor, inside: Tensor) -> Tensor:
    """``grad`` where ``inside``, else 0; any shape."""
    grad = grad.contiguous()
    grad_x = torch.empty_like(grad)
    fields = {"grad": grad, "inside": inside, "grad_x": grad_x}
    _run("fake_quantize_gradient", grad, 1, _FLAT, fields)
    return grad_x


def add(
    x: Tensor,
    factor: Tensor,
    offset: Tensor,
    residual: Tensor,
    grid: Grid | None = None,
    product_grid: Grid | None = None,
) -> Tensor:
    """``factor x + offset + residual``; factor (N, C) or (1, C), offset (C,), residual like ``x``.

    With a grid ``Q(Q(v) + offset) + residual`` with ``v = factor x``; with a grid of the product, too,
    ``v = Q_product(factor x) residual``.
    """
    out = torch.empty_like(x)
    fields = {**_scaled(x, factor, offset), "residual": residual, "grid": grid, "out": out}
    if product_grid is None:
        _over_planes("add", x, **fields)
    else:
        _over_planes("product_add", x, product_grid=product_grid, **fields)
    return out


class AddGradients(NamedTuple):
    """Of :func:`add`, by x and the residual, by factor and offset (N, C)."""

    x: Tensor
    residual: Tensor
    factor: Tensor
    offset: Tensor


def add_gradient(
    grad: Tensor,
    x: Tensor,
    factor: Tensor,
    offset: Tensor,
    residual: Tensor,
    grid: Grid | None = None,
    product_grid: Grid | None = None,
) -> AddGradients:
    """Gradients of :func:`add`; only with a grid of the product does the residual matter."""
    grad = _like(grad, x)
    by_residual = grad if product_grid is None else torch.empty_like(x)
    found = AddGradients(torch.empty_like(x), by_residual, _sums(x), _sums(x))
    results = {"grad_x": found.x, "grad_factor": found.factor, "grad_offset": found.offset}
    fields = {**_scaled(x, factor, offset), "grad": grad, "grid": grid, **results}
    if product_grid is None:
        _over_planes("add_gradient", x, **fields)
    else:
        fields |= {"residual": residual, "product_grid": product_grid, "grad_residual": found.residual}
        _over_planes("product_add_gradient", x, **fields)
    return found


def _scaled(x: Tensor, factor: Tensor, offset: Tensor) -> dict[str, Any]:
    return {"factor": _of_planes(factor, x), "offset": _vector(offset, x)}


def scale_gradient(grad: Tensor, x: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of :func:`scale` by ``x`` and by the factor (N, C)."""
    found = add_gradient(grad, x, factor, torch.zeros_like(factor[0]), x)
    return found.x, found.factor
