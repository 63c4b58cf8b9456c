"""The lowered description."""

from __future__ import annotations

import numpy as np
import pytest
from qat_export.integer.network import BinaryConv

from qat.grid import Grid
from tests.helpers.networks import lowered, ordinary, toy


@pytest.mark.parametrize("bits", range(2, 9))
def test_a_grid_spans_all_integers_of_its_bits(bits: int) -> None:
    signed, unsigned = Grid(1.0, bits, signed=True), Grid(1.0, bits, signed=False)
    assert signed.high - signed.low == unsigned.high - unsigned.low == 2**bits - 1
    assert signed.low == -signed.high - 1
    assert unsigned.low == 0


@pytest.mark.parametrize(("channels", "size"), [(1, 1), (3, 1), (3, 3), (8, 3), (5, 3)])
def test_weights_come_back_from_their_bits_also_where_the_last_byte_is_not_full(
    channels: int, size: int
) -> None:
    shape = (channels, channels, size, size)
    weight = np.random.default_rng(channels).choice(np.array([-1, 1], np.int8), shape)
    vector = np.zeros(channels)
    bits = np.packbits(weight.reshape(-1) > 0)
    assert len(bits) == -(-weight.size // 8)
    conv = BinaryConv(
        vector.astype(np.int16), bits, size, 1, vector.astype(np.int32), vector.astype(np.float32)
    )
    assert conv.shape == shape
    assert conv.weight().dtype == np.int8
    np.testing.assert_array_equal(conv.weight(), weight)


def test_arrays_have_the_types_the_description_states() -> None:
    network = ordinary()[1]
    for affine in network.affines():
        assert (affine.weight.dtype, affine.bias.dtype, affine.multiplier.dtype) == (
            np.int8,
            np.int32,
            np.float32,
        )
    for sub in network.sub_blocks():
        conv = sub.conv
        types = (conv.threshold.dtype, conv.sign_bits.dtype, conv.bias.dtype, conv.multiplier.dtype)
        assert types == (np.int16, np.uint8, np.int32, np.float32)
        assert (conv.multiplier > 0).all()
        assert sub.slopes.integers.dtype == np.int8
        assert sub.slopes.shift <= 14
        assert sub.branch_multiplier.shift == sub.residual_multiplier.shift


def test_the_description_counts_its_layers_and_weights() -> None:
    model, network, _ = ordinary()
    text = str(network)
    binary = sum(m.weight.numel() for name, m in model.named_modules() if name.endswith(".binary_conv"))
    assert f"8 binary convolutions, {binary:,} weights at 1 bit" in text
    assert f"{len(network.grids)} integer tensors" in text


def test_no_grid_is_missing_where_attention_and_scale_kind_are_ablated() -> None:
    network = lowered(toy(elm_attention=False, infor_recoupling=False))
    assert not [
        name for name in network.grids if name.endswith(("/pooled", "/branch", "/product", "/prelu1"))
    ]
    assert all(sub.branch is None and sub.attention is None for sub in network.sub_blocks())
