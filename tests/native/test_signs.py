"""Binary convolutions by XNOR and popcount: exact sums, and what they refuse."""

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from qat.native import signs as nativesigns
from qat.native.bindings import library, torch_alone
from qat.native.signs import can_sum, sign_sums
from tests.helpers.native_passes import need_passes


@pytest.fixture(autouse=True)
def _library() -> None:
    need_passes()


@pytest.fixture
def three_threads() -> Iterator[None]:
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(1)


def signs(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 2, shape, generator=torch.Generator().manual_seed(seed)).float() * 2 - 1


def exact(x: Tensor, weight: Tensor, stride: int) -> Tensor:
    return F.conv2d(x.double(), weight.double(), stride=stride, padding=weight.shape[-1] // 2)


@given(
    st.tuples(st.integers(1, 5), st.integers(1, 80), st.integers(1, 13), st.integers(1, 13)),
    st.integers(1, 70),
    st.sampled_from([1, 3]),
    st.integers(1, 3),
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
)
def test_sums_of_any_size_and_type_are_exact(
    shape: tuple[int, int, int, int],
    outputs: int,
    kernel: int,
    stride: int,
    kind: torch.dtype,
    weight_kind: torch.dtype,
) -> None:
    x, weight = signs(*shape), signs(outputs, shape[1], kernel, kernel, seed=1)
    found = sign_sums(x.to(kind), weight.to(weight_kind), stride)
    assert found is not None
    assert found.dtype == kind
    assert torch.equal(found, exact(x, weight, stride).to(kind))  # of bfloat16 rounded once


@pytest.mark.usefixtures("three_threads")
@pytest.mark.parametrize(("channels", "side", "kernel"), [(1024, 3, 3), (64, 40, 3), (256, 9, 1)])
def test_threads_share_large_ones(channels: int, side: int, kernel: int) -> None:
    x, weight = signs(3, channels, side, side), signs(channels, channels, kernel, kernel, seed=1)
    found = sign_sums(x, weight, 1)
    assert found is not None
    assert torch.equal(found.double(), exact(x, weight, 1))


def test_a_sum_of_equal_signs_is_as_large_as_it_can_be() -> None:
    x, weight = torch.ones(1, 4096, 3, 3), torch.ones(2, 4096, 3, 3)
    found, opposite = sign_sums(x, weight, 1), sign_sums(x, -weight, 1)
    assert found is not None
    assert opposite is not None
    assert found.amax() == 9 * 4096 == -opposite.amin()


@pytest.mark.parametrize("wrong", [0.0, -0.0, 0.5, 2.0, float("inf"), float("nan")])
@pytest.mark.parametrize("kind", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("kernel", [1, 3])
def test_what_is_no_sign_is_noticed_anywhere(wrong: float, kind: torch.dtype, kernel: int) -> None:
    x, weight = signs(2, 37, 5, 9).to(kind), signs(19, 37, kernel, kernel, seed=1).to(kind)
    for one in (x, weight):
        for at in (0, one.numel() // 2, one.numel() - 1):
            before = one.view(-1)[at].clone()
            one.view(-1)[at] = wrong
            assert sign_sums(x, weight, 1) is None
            one.view(-1)[at] = before
    assert sign_sums(x, weight, 1) is not None


@pytest.mark.parametrize(
    ("x", "weight", "stride", "why"),
    [
        (signs(2, 8, 5, 5), signs(8, 8, 3, 3), 1, None),
        (signs(2, 8, 5, 5), signs(8, 8, 5, 5), 1, "a kernel of 5"),
        (signs(2, 8, 5, 5), signs(8, 8, 1, 3), 1, "an oblong kernel"),
        (signs(2, 8, 5, 5), signs(8, 4, 3, 3), 1, "groups"),
        (signs(2, 8, 5, 5), signs(8, 8, 3, 3), 0, "no stride"),
        (signs(0, 8, 5, 5), signs(8, 8, 3, 3), 1, "no images"),
        (signs(2, 8, 5, 5), signs(0, 8, 3, 3), 1, "no outputs"),
        (signs(2, 8, 5, 5).mT, signs(8, 8, 3, 3), 1, "pixels in another order"),
        (signs(2, 8, 5, 5), signs(8, 8, 3, 3).mT, 1, "weights in another order"),
        (signs(2, 8, 5, 5).half(), signs(8, 8, 3, 3), 1, "half precision"),
        (signs(2, 8, 5, 5), signs(8, 8, 3, 3).to("meta"), 1, "another device"),
        (signs(8, 5, 5), signs(8, 8, 3, 3), 1, "an image alone"),
        (
            torch.empty(1, 3_728_271, 1, 1, dtype=torch.bfloat16),
            torch.empty(1, 3_728_271, 3, 3, dtype=torch.bfloat16),
            1,
            "more than int32 holds",
        ),
    ],
)
def test_what_it_can_not_sum_it_says(x: Tensor, weight: Tensor, stride: int, why: str | None) -> None:
    assert can_sum(x, weight, stride) == (why is None), why
    with torch_alone():
        assert not can_sum(x, weight, stride)


def test_missing_memory_is_an_error_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    native = library()
    assert native is not None
    status = native.sign_statuses.index("no_memory")
    out_of_memory = native._replace(sign_sums=lambda *arguments: status)
    monkeypatch.setattr(nativesigns, "library", lambda: out_of_memory)
    with pytest.raises(MemoryError, match="signs of a convolution"):
        sign_sums(signs(1, 1, 1, 1), signs(1, 1, 1, 1), 1)
