"""Passes over images by the native library (C++: ``src/training/passes_impl.h``): memory is read once.

torch's operators take two to five times as many passes for the same formulas. Sums are taken plane by plane,
so that nothing depends on the number of threads. Where :func:`qat.native.bindings.usable` says no, callers
use torch's operators.

Images are (N, C, H, W) here, vectors are (C,) of a channel or (N, C) of an image's channel.
"""

from __future__ import annotations

from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from qat.grid import Grid
from qat.native.bindings import TYPES, GridStruct, Pass, library, usable

#: Values that make up a plane of a tensor without images.
_FLAT: Final = 4096


def fits(x: Tensor, other: Tensor) -> bool:
    """Whether the passes can work on both, value by value."""
    return usable(x) and usable(other) and other.dtype == x.dtype and other.shape == x.shape


def _run(name: str, like: Tensor, planes: int, channels: int, pixels: int, **fields: Any) -> Pass:
    """Run a pass. Tensors among the fields are contiguous, and of the size and type that it takes."""
    native = library()
    assert native is not None
    values: dict[str, Any] = {}
    for key, one in fields.items():
        if isinstance(one, Tensor) and one.device.type != "cpu":
            raise ValueError(f"{key} lies on {one.device}, the images on the CPU")
        values[key] = _in_c(one)
    work = Pass(planes=planes, channels=channels, pixels=pixels, **values)
    native.run_pass(native.numbers[name], TYPES[like.dtype], work, native.parallel, torch.get_num_threads())
    return work


def _in_c(one: Any) -> Any:
    if isinstance(one, Tensor):
        return one.data_ptr()
    if isinstance(one, Grid):
        return GridStruct(one.low, one.high, one.scale, one.inverse)
    return one


def _over_planes(name: str, x: Tensor, **fields: Any) -> None:
    images, channels = x.shape[:2]
    _run(name, x, images * channels, channels, x.shape[2:].numel(), x=x, **fields)


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
    _over_planes("sign", x, out=out, offset=_vector(offset, x), positive_zero=zero_is_positive)
    return out


def sign_gradient(grad: Tensor, x: Tensor, offset: Tensor, clip: float) -> tuple[Tensor, Tensor]:
    """Gradient of :func:`sign`, which passes where ``|x + offset| < clip``, and its sums (N, C)."""
    out, sums, grad = torch.empty_like(x), _sums(x), _like(grad, x)
    _over_planes("sign_gradient", x, grad=grad, out=out, offset=_vector(offset, x), sums=sums, clip=clip)
    return out, sums


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance without correction, (N, C) each."""
    mean, variance = _sums(x), _sums(x)
    _over_planes("moments", x, sums=mean, products=variance)
    return mean, variance


class Affine(NamedTuple):
    """What a normalization and its PReLU do to each channel: (C,) each."""

    gain: Tensor
    offset: Tensor
    slope: Tensor


def norm_prelu(x: Tensor, by: Affine, grid: Grid | None = None) -> Tensor:
    """``PReLU(gain x + offset)``; with a grid ``Q(PReLU(Q(gain x + offset)))``."""
    out = torch.empty_like(x)
    _on_grid("norm_prelu", "", x, grid, out=out, **_vectors(x, by))
    return out


def _on_grid(name: str, suffix: str, x: Tensor, grid: Grid | None, **fields: Any) -> None:
    if grid is None:
        _over_planes(name + suffix, x, **fields)
    else:
        _over_planes(f"grid_{name}{suffix}", x, grid=grid, **fields)


def _vectors(x: Tensor, by: Affine, **others: Tensor) -> dict[str, Tensor]:
    return {name: _vector(one, x) for name, one in (by._asdict() | others).items()}


class NormSums(NamedTuple):
    """Sums (N, C) of a gradient before PReLU: itself, times ``x - center``; and the slopes' gradient."""

    grad: Tensor
    product: Tensor
    slope: Tensor


def norm_prelu_sums(
    grad: Tensor, x: Tensor, by: Affine, center: Tensor, grid: Grid | None = None
) -> NormSums:
    """Sums that the gradient of a normalization takes of the whole batch; center (C,)."""
    found = NormSums(_sums(x), _sums(x), _sums(x))
    sums = {"sums": found.grad, "products": found.product, "slopes": found.slope}
    vectors = _vectors(x, by, center=center)
    grad = _like(grad, x)
    _on_grid("norm_prelu", "_sums", x, grid, grad=grad, **sums, **vectors)
    return found


def norm_prelu_gradient(
    grad: Tensor,
    x: Tensor,
    by: Affine,
    center: Tensor,
    shift: Tensor,
    tilt: Tensor,
    grid: Grid | None = None,
) -> Tensor:
    """``gain`` times the gradient before PReLU, ``+ shift + tilt (x - center)``; vectors (C,)."""
    out, grad = torch.empty_like(x), _like(grad, x)
    vectors = _vectors(x, by, center=center, shift=shift, tilt=tilt)
    _on_grid("norm_prelu", "_gradient", x, grid, grad=grad, out=out, **vectors)
    return out


def prelu(x: Tensor, slope: Tensor, grid: Grid | None = None) -> Tensor:
    """``PReLU(x)``, slopes (C,); on the grid where there is one."""
    out = torch.empty_like(x)
    _on_grid("prelu", "", x, grid, out=out, slope=_vector(slope, x))
    return out


def prelu_gradient(grad: Tensor, x: Tensor, slope: Tensor, grid: Grid | None = None) -> tuple[Tensor, Tensor]:
    """Gradient of :func:`prelu` by ``x``, and that by the slope of each image (N, C)."""
    out, slopes, grad = torch.empty_like(x), _sums(x), _like(grad, x)
    _on_grid("prelu", "_gradient", x, grid, grad=grad, out=out, slope=_vector(slope, x), slopes=slopes)
    return out, slopes


def scale(x: Tensor, factor: Tensor, shift: Tensor | None = None) -> Tensor:
    """``factor x + shift``, both (N, C) or (1, C)."""
    out = torch.empty_like(x)
    shift = None if shift is None else _of_planes(shift, x)
    _over_planes("scale", x, out=out, factor=_of_planes(factor, x), shift=shift)
    return out


def _over_values(name: str, like: Tensor, **fields: Any) -> Pass:
    planes = -(-like.numel() // _FLAT)
    return _run(name, like, planes, 1, _FLAT, last=like.numel() - (planes - 1) * _FLAT, **fields)


def fake_quantize(x: Tensor, grid: Grid, overwrite: bool) -> tuple[Tensor, Tensor | None]:
    """``x`` on the grid, any shape; and where a gradient passes, ``None`` for everywhere."""
    out = x if overwrite else torch.empty_like(x)
    inside = torch.empty_like(x, dtype=torch.bool)
    done = _over_values("fake_quantize", x, x=x, out=out, inside=inside, grid=grid)
    return out, inside if done.outside else None


def fake_quantize_gradient(grad: Tensor, inside: Tensor) -> Tensor:
    """``grad`` where ``inside``, else 0; any shape."""
    grad = grad.contiguous()
    out = torch.empty_like(grad)
    _over_values("fake_quantize_gradient", grad, grad=grad, out=out, inside=inside)
    return out


def add(
    x: Tensor,
    factor: Tensor,
    offset: Tensor,
    other: Tensor,
    grid: Grid | None = None,
    inner: Grid | None = None,
) -> Tensor:
    """``factor x + offset + other``; factor (N, C) or (1, C), offset (C,), other like ``x``.

    With a grid ``Q(Q(v) + offset) + other`` with ``v = factor x``; with an inner one, too,
    ``v = Q_inner(factor x) other``.
    """
    out = torch.empty_like(x)
    _added(x, "", factor, offset, grid, inner, other=other, out=out)
    return out


class AddGradients(NamedTuple):
    """Of :func:`add`, by x and other, by factor and offset (N, C)."""

    x: Tensor
    other: Tensor
    factor: Tensor
    offset: Tensor


def add_gradient(
    grad: Tensor,
    x: Tensor,
    factor: Tensor,
    offset: Tensor,
    other: Tensor,
    grid: Grid | None = None,
    inner: Grid | None = None,
) -> AddGradients:
    """Gradients of :func:`add`."""
    grad, out, sums, products = _like(grad, x), torch.empty_like(x), _sums(x), _sums(x)
    by_other = grad if inner is None else torch.empty_like(x)
    fields = {"grad": grad, "out": out, "sums": sums, "products": products}
    _added(x, "_gradient", factor, offset, grid, inner, other=other, other_out=by_other, **fields)
    return AddGradients(out, by_other, products, sums)


def _added(
    x: Tensor,
    suffix: str,
    factor: Tensor,
    offset: Tensor,
    grid: Grid | None,
    inner: Grid | None,
    **fields: Tensor,
) -> None:
    vectors = {"factor": _of_planes(factor, x), "offset": _vector(offset, x)}
    if inner is None:
        _on_grid("add", suffix, x, grid, **vectors, **fields)
    else:
        _over_planes(f"product_add{suffix}", x, grid=grid, inner=inner, **vectors, **fields)


def scale_gradient(grad: Tensor, x: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of :func:`scale` by ``x`` and by the factor (N, C)."""
    found = add_gradient(grad, x, factor, torch.zeros_like(factor[0]), x)
    return found.x, found.factor
