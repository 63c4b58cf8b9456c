"""The fused sub-block equals the plain one, forward and backward."""

import itertools

import pytest
import torch

from qat.nn.fused_sub_block import FusedSubBlock
from qat.nn.sub_block import SubBlock
from tests.helpers.gradients import assert_same, gradients, values

pytestmark = pytest.mark.usefixtures("passes")


@pytest.mark.parametrize(
    ("kernel", "stride", "kind", "recoupling"),
    [
        (k, s, kind, recoupling)
        for k, s, kind, recoupling in itertools.product((1, 3), (1, 2), ("scale", "bias"), (True, False))
        if k == 3 or (s == 1 and kind == "bias")
    ],
)
@pytest.mark.parametrize("side", [2, 7])
def test_a_fused_sub_block_equals_the_plain_one(
    kernel: int, stride: int, kind: str, recoupling: bool, side: int
) -> None:
    torch.manual_seed(0)
    fused = FusedSubBlock(16, kernel, stride, kind, recoupling).double()  # type: ignore[arg-type]  # parametrized
    plain = SubBlock(16, kernel, stride, kind, recoupling).double()  # type: ignore[arg-type]
    plain.load_state_dict(fused.state_dict())
    x = values(4, 16, side, side).requires_grad_()
    one, other = fused(x), plain(x)
    assert_same((one,), (other,))
    used = [name for name, _ in fused.named_parameters()]
    if kind == "bias":
        used.remove("activation1.weight")
    if kind == "bias" and not recoupling:
        used = [name for name in used if not name.startswith("norm2")]
    assert_same(
        gradients(one, x, *(fused.get_parameter(name) for name in used)),
        gradients(other, x, *(plain.get_parameter(name) for name in used)),
    )


def test_half_precision_stays_near_float32() -> None:
    torch.manual_seed(0)
    block = FusedSubBlock(32, 3, 1, "bias")
    x = torch.randn(8, 32, 8, 8)
    exact = block(x)
    with torch.autocast("cpu", torch.bfloat16):
        rough = block(x.bfloat16())
    assert rough.dtype == torch.bfloat16
    # A value next to a threshold may change its sign: most must agree, not all.
    near = (rough.float() - exact).abs() < 0.05 * exact.abs().amax()
    assert float(near.float().mean()) > 0.97
    rough.float().square().mean().backward()
    assert all(p.grad is None or bool(torch.isfinite(p.grad).all()) for p in block.parameters())
