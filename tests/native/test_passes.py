"""Passes of the native library: rounded like torch's, alike with any number of threads, refused in words."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from qat.errors import NativeLibraryError
from qat.grid import Grid
from qat.native import bindings as nativecalls
from qat.native import passes as nativepasses
from qat.native.bindings import Library, torch_alone, usable
from qat.native.library import library_function
from qat.native.passes import NormPrelu
from qat.ops.scale_add import scaled, scaled_norm_add
from tests.helpers.native_passes import need_passes
from tests.helpers.rounding_bounds import assert_within, gamma, sum_bound

GRID = Grid(0.02, 8, signed=True)

INNER = Grid(0.5, 4, signed=True)


def random(*shape: int, seed: int = 0, kind: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(kind)


def vectors(channels: int, count: int, kind: torch.dtype = torch.float32) -> list[Tensor]:
    return [random(channels, seed=7 + i, kind=kind) for i in range(count)]


@pytest.fixture(autouse=True)
def _library() -> None:
    need_passes()


@pytest.fixture
def looked_for_anew() -> Iterator[None]:
    """The library is looked for in the test, and again behind it."""
    nativecalls.library.cache_clear()
    yield
    nativecalls.library.cache_clear()


def every_pass(x: Tensor) -> dict[str, Tensor]:
    """What each pass makes of ``x`` (N, C, H, W) and other tensors, by names of results."""
    images, channels = x.shape[:2]
    grad, other = random(*x.shape, seed=1, kind=x.dtype), random(*x.shape, seed=2, kind=x.dtype)
    factor = random(images, channels, seed=3)
    gain, offset, slope, center, shift, tilt = vectors(channels, 6)
    by = NormPrelu(gain, offset, slope)
    results: dict[str, object] = {
        "sign": nativepasses.sign(x, offset, True),
        "sign_gradient": nativepasses.sign_gradient(grad, x, offset, 1.5),
        "moments": nativepasses.moments(x),
        "scale": nativepasses.scale(x, factor, factor),
        "fake_quantize": nativepasses.fake_quantize(x, GRID, False),
        "fake_quantize_gradient": nativepasses.fake_quantize_gradient(grad, other > 0),
    }
    for on, grid in (("", None), (" on grid", GRID)):
        results[f"prelu{on}"] = nativepasses.prelu(x, slope, grid)
        results[f"prelu_gradient{on}"] = nativepasses.prelu_gradient(grad, x, slope, grid)
        results[f"norm_prelu{on}"] = nativepasses.norm_prelu(x, by, grid)
        results[f"norm_prelu_sums{on}"] = nativepasses.norm_prelu_sums(grad, x, by, center, grid)
        results[f"norm_prelu_gradient{on}"] = nativepasses.norm_prelu_gradient(
            grad, x, by, center, shift, tilt, grid
        )
    for on, grids in (("", ()), (" on grid", (GRID,)), (" on grids", (GRID, INNER))):
        results[f"add{on}"] = nativepasses.add(x, factor, offset, other, *grids)
        results[f"add_gradient{on}"] = nativepasses.add_gradient(grad, x, factor, offset, other, *grids)
    return {
        f"{name} {i}": one
        for name, found in results.items()
        for i, one in enumerate(found if isinstance(found, tuple) else (found,))
        if isinstance(one, Tensor)
    }


def the_library() -> Library:
    found = nativecalls.library()
    assert found is not None
    return found


def test_every_pass_of_the_library_is_called_and_with_all_its_fields(monkeypatch: pytest.MonkeyPatch) -> None:
    library, called = the_library(), set()

    def recorded(number: int, *arguments: object) -> object:
        called.add(number)
        return library.run_pass(number, *arguments)

    monkeypatch.setattr(nativepasses, "library", lambda: library._replace(run_pass=recorded))
    every_pass(random(2, 3, 4, 4))
    assert called == set(library.numbers.values())


@pytest.mark.parametrize("kind", [torch.float32, torch.float64, torch.bfloat16])
def test_any_number_of_threads_gives_the_same_bits(kind: torch.dtype) -> None:
    # More values than a thread takes at once, and a remainder.
    x = random(5, 7, 33, 31, kind=kind)
    alone = every_pass(x)
    torch.set_num_threads(3)
    try:
        together = every_pass(x)
    finally:
        torch.set_num_threads(1)
    for name, one in alone.items():
        assert torch.equal(one, together[name]), name


def test_what_threads_share_is_done_by_more_than_one() -> None:
    """The library calls what torch starts its threads with, where there is more than one portion."""
    library = the_library()
    if library.parallel is None:
        pytest.skip("torch's threads are not found here")
    asked: list[int] = []
    kind = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)

    @kind
    def start(work: int, data: int, threads: int, flags: int) -> None:
        asked.append(threads)
        ctypes.CFUNCTYPE(None, ctypes.c_void_p)(work)(data)

    watched = library._replace(parallel=ctypes.cast(start, ctypes.c_void_p))
    large, small = random(4, 16, 32, 32), random(2, 3, 4, 4)
    torch.set_num_threads(2)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(nativepasses, "library", lambda: watched)
            found = nativepasses.prelu(large, torch.full((16,), 0.5))
            nativepasses.prelu(small, torch.full((3,), 0.5))
    finally:
        torch.set_num_threads(1)
    assert asked == [2]
    assert torch.equal(found, torch.where(large > 0, large, 0.5 * large))


def test_every_number_of_half_precision_is_read_and_written_as_torch_does() -> None:
    """All 65536, through a product that rounds: no numbers, infinities, subnormal ones and ties."""
    x = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).view(1, 1, 256, 256)
    for factor in (1.0, 1.0 + 2.0**-9, 1.0 / 3.0, 2.0**-40):
        found = nativepasses.scale(x, torch.full((1, 1), factor))
        expected = (x.float() * factor).to(torch.bfloat16)
        assert torch.equal(found.isnan(), expected.isnan())
        assert torch.equal(found.nan_to_num(7.0), expected.nan_to_num(7.0))


def bounds(x: Tensor) -> dict[str, Tensor]:
    """How far what :func:`every_pass` makes in float32 of ``x``, without a grid, may be from exact."""
    kind = x.dtype
    x, grad, other = (one.double().abs() for one in (x, *(random(*x.shape, seed=seed) for seed in (1, 2))))
    factor = random(*x.shape[:2], seed=3).double().abs()[..., None, None]
    gain, offset, slope, center, shift, tilt = (
        one.double().abs().view(-1, 1, 1) for one in vectors(x.shape[1], 6)
    )
    pixels = x[0, 0].numel()
    before = gain * x + offset
    behind = grad * slope.clamp_min(1.0)  # the gradient before PReLU
    apart = x + center

    def of(magnitudes: Tensor, count: int) -> Tensor:
        return sum_bound(magnitudes, count, kind)

    def of_sum(terms: Tensor, count: int) -> Tensor:
        return of(terms.sum((2, 3)), pixels + count)

    return {
        "sign 0": torch.zeros_like(x),
        "sign_gradient 0": torch.zeros_like(x),
        "sign_gradient 1": of_sum(grad, 0),
        "moments 0": of_sum(x / pixels, 1),
        "moments 1": of_variance(x, gamma(pixels + 1, kind)),
        "scale 0": of(factor * x + factor, 2),
        "prelu 0": of(x * slope.clamp_min(1.0), 1),
        "prelu_gradient 0": of(behind, 1),
        "prelu_gradient 1": of_sum(grad * x, 1),
        "norm_prelu 0": of(before * slope.clamp_min(1.0), 3),
        "norm_prelu_sums 0": of_sum(behind, 1),
        "norm_prelu_sums 1": of_sum(behind * apart, 3),
        "norm_prelu_sums 2": of_sum(grad * before, 3),
        "norm_prelu_gradient 0": of(gain * behind + shift + tilt * apart, 5),
        "add 0": of(factor * x + offset + other, 3),
        "add_gradient 0": of(factor * grad, 1),
        "add_gradient 1": torch.zeros_like(x),
        "add_gradient 2": of_sum(grad * x, 1),
        "add_gradient 3": of_sum(grad, 0),
    }


def of_variance(magnitudes: Tensor, of_mean: float) -> Tensor:
    """Bound on the error of a mean of squares of distances from a mean of relative error ``of_mean``.

    A distance d is off by the error e of the mean and one rounding. The sum of d e is 0 but for rounding, so
    that e² is what remains of them.
    """
    off = of_mean * magnitudes.mean((2, 3))
    largest = magnitudes.square().mean((2, 3))  # no variance is larger
    return off.square() + sum_bound(largest + off.square(), magnitudes[0, 0].numel() + 4, torch.float32)


@pytest.mark.parametrize("side", [1, 2, 3, 4, 7, 8, 9, 16])
def test_images_of_any_size_are_computed_whole(side: int) -> None:
    """Vectors and what remains beside them: against float64, which has vectors of another length."""
    x = random(2, 3, side, side)
    exact = every_pass(x.double())
    found = {  # rounding to a grid may fall to either side
        name: one
        for name, one in every_pass(x).items()
        if one.dtype != torch.bool and "grid" not in name and "fake_quantize" not in name
    }
    allowed = bounds(x)
    assert found.keys() == allowed.keys()
    for name, one in found.items():
        assert_within(one, exact[name], allowed[name], name)


def test_no_number_stays_none() -> None:
    x = torch.full((1, 1, 2, 2), float("nan"))
    assert nativepasses.sign(x, torch.zeros(1), True).isnan().all()
    assert nativepasses.prelu(x, torch.ones(1), GRID).isnan().all()
    found, inside = nativepasses.fake_quantize(x, GRID, False)
    assert found.isnan().all()
    assert inside is not None
    assert not inside.any()


@pytest.mark.parametrize(
    "x",
    [
        torch.ones(2, 3, 4, 4).to(torch.float16),
        torch.ones(2, 3, 4, 4).mT,
        torch.ones(2, 3, 4, 5).mT,
        torch.ones(0, 3, 4, 4),
        torch.ones(2, 3, 4, 4).to(memory_format=torch.channels_last),
        torch.ones(2, 3, 4, 4, dtype=torch.int64),
        torch.ones(1, device="meta"),
    ],
    ids=["float16", "transposed", "transposed too", "empty", "channels last", "integers", "elsewhere"],
)
def test_other_tensors_are_left_to_torch(x: Tensor) -> None:
    assert not usable(x)


def test_it_can_be_switched_off_and_the_switch_returns() -> None:
    x = torch.ones(2)
    with torch_alone():
        assert not usable(x)
        with torch_alone():
            pass
        assert not usable(x)
    assert usable(x)


@pytest.mark.usefixtures("looked_for_anew")
def test_without_a_library_torch_does_it_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nativecalls, "has_library", lambda: False)
    assert not usable(torch.ones(2))


def test_without_torchs_threads_it_works_alone_or_not_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    alone = the_library()._replace(parallel=None)
    monkeypatch.setattr(nativecalls, "library", lambda: alone)
    assert usable(torch.ones(2))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert not usable(torch.ones(2))


ANOTHER_VERSION = r"not of this version of the package; build it again: make native"


@pytest.mark.usefixtures("looked_for_anew")
def test_a_library_from_before_there_was_a_description_is_refused_in_words(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def none_of_these(name: str) -> None:
        raise NativeLibraryError("undefined symbol")

    with monkeypatch.context() as patch:
        patch.setattr(nativecalls, "library_function", none_of_these)
        with pytest.raises(NativeLibraryError, match=ANOTHER_VERSION):
            usable(torch.ones(2))
    assert usable(torch.ones(2))


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("enum Type", "enum Kind"),
        ("float32", "float33"),
        ("struct SignSums", "struct SumsOfSigns"),
        ("pass prelu ", "pass PReLU "),
        ("slope:ChannelVector", "slopes:ChannelVector"),
        ("offset:ChannelVector ", ""),
        ("grid:OptionalGrid", "grid:Lattice"),
        ("struct Grid 32", "struct Grid 24"),
        ("inverse:Number", "reciprocal:Number"),
    ],
)
@pytest.mark.usefixtures("looked_for_anew")
def test_a_library_with_other_passes_or_fields_is_refused_in_words(
    ours: str, theirs: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The real library, of which something else is said than what the passes give."""

    def function(name: str) -> object:
        found = library_function(name)
        if name != "bnext_qat_description":
            return found
        assert ours.encode() in found()
        return lambda: found().replace(ours.encode(), theirs.encode())

    monkeypatch.setattr(nativecalls, "library_function", function)
    with pytest.raises(NativeLibraryError, match=ANOTHER_VERSION):
        every_pass(random(2, 3, 4, 4))


@pytest.mark.usefixtures("looked_for_anew")
def test_kernels_that_do_not_run_here_are_named_before_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BNEXT_QAT_KERNELS", "avx1024")
    with pytest.raises(NativeLibraryError, match="BNEXT_QAT_KERNELS is 'avx1024'"):
        usable(torch.ones(2))


def test_a_variable_that_changes_later_ends_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels are chosen once; what Python has no part in must not throw."""
    monkeypatch.setenv("BNEXT_QAT_KERNELS", "avx1024")
    assert nativepasses.prelu(torch.ones(1, 1, 2, 2), torch.ones(1)).sum() == 4


@pytest.mark.parametrize("slope", [torch.ones(1), torch.ones(5)])
def test_vectors_of_other_lengths_are_refused(slope: Tensor) -> None:
    with pytest.raises(ValueError, match=r"for the channels of \(2, 4, 3, 3\)"):
        nativepasses.prelu(torch.ones(2, 4, 3, 3), slope)


def test_tensors_elsewhere_are_refused() -> None:
    with pytest.raises(ValueError, match="slope lies on meta, the images on the CPU"):
        nativepasses.prelu(torch.ones(2, 4, 3, 3), torch.ones(4, device="meta"))


def test_another_default_device_changes_nothing() -> None:
    x = random(2, 3, 4, 4)
    with torch.device("meta"):
        found, inside = nativepasses.fake_quantize(x, GRID, False)
    assert torch.equal(found, nativepasses.fake_quantize(x, GRID, False)[0])
    assert inside is None or inside.device.type == "cpu"


def test_subclasses_of_tensors_are_left_to_torch() -> None:
    with FakeTensorMode() as mode:
        assert not usable(mode.from_tensor(torch.ones(2)))
    assert usable(torch.nn.Parameter(torch.ones(2)))


@pytest.mark.parametrize(
    "other",
    [
        torch.ones(2, 3, 1, 1),
        torch.ones(1, 3, 4, 4),
        torch.ones(2, 3, 4, 4, dtype=torch.float64),
        torch.ones(2, 3, 4, 4).mT,
    ],
    ids=["one pixel", "one image", "another type", "transposed"],
)
def test_a_residual_of_another_form_is_added_by_torch(other: Tensor) -> None:
    x, factor = random(2, 3, 4, 4), random(2, 3, seed=1)
    mean, variance = x.mean((2, 3)), x.var((2, 3), correction=0)
    results = []
    for context in (nullcontext(), torch_alone()):
        with context:
            norm = torch.nn.BatchNorm2d(3)
            results.append(scaled_norm_add(x, factor, mean, variance, norm, other))
    torch.testing.assert_close(*results)


def test_a_gradient_has_no_gradient_and_says_so() -> None:
    x = random(1, 2, 3, 3).requires_grad_()
    (gradient,) = torch.autograd.grad(scaled(x, torch.ones(1, 2)).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()
