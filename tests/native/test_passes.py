"""Passes of the native library: rounded like torch's, alike with any number of threads, refused in words."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from qat.errors import NativeLibraryError
from qat.grid import Grid
from qat.native import bindings as nativecalls
from qat.native import passes as nativepasses
from qat.native.bindings import PASSES, torch_alone, usable
from qat.native.passes import Affine
from qat.ops.scale_add import scaled, scaled_norm_add
from tests.conftest import need_passes

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
    by = Affine(gain, offset, slope)
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


def test_these_are_all_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    run, called = nativepasses._run, set()

    def recorded(name: str, *arguments: object, **fields: object) -> object:
        called.add(name)
        return run(name, *arguments, **fields)  # type: ignore[arg-type]

    monkeypatch.setattr(nativepasses, "_run", recorded)
    every_pass(random(2, 3, 4, 4))
    assert called == PASSES


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
    library = nativecalls.library()
    assert library is not None
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


@pytest.mark.parametrize("side", [1, 2, 3, 4, 7, 8, 9, 16])
def test_images_of_any_size_are_computed_whole(side: int) -> None:
    """Vectors and what remains beside them: against float64, which has vectors of another length."""
    x = random(2, 3, side, side)
    wide = every_pass(x.double())
    for name, one in every_pass(x).items():
        if one.dtype == torch.bool or "grid" in name or "fake_quantize" in name:
            continue  # rounding to a grid may fall to either side
        torch.testing.assert_close(one.double(), wide[name], rtol=1e-5, atol=1e-5, msg=name)


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


@pytest.mark.usefixtures("looked_for_anew")
def test_without_torchs_threads_it_works_alone_or_not_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nativecalls, "_parallel", lambda: None)
    assert usable(torch.ones(2))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert not usable(torch.ones(2))


@pytest.mark.usefixtures("looked_for_anew")
def test_a_library_of_another_version_is_refused_in_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that knows another structure, and one from before there were passes."""

    class Function:
        restype: object = None

        def __call__(self) -> int:
            return 8

    def none_of_these(name: str) -> None:
        raise NativeLibraryError("undefined symbol")

    for function in (lambda name: Function(), none_of_these):
        with monkeypatch.context() as patch:
            patch.setattr(nativecalls, "library_function", function)
            with pytest.raises(NativeLibraryError, match=r"not of this version of the package.*make native"):
                usable(torch.ones(2))
    assert usable(torch.ones(2))


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
