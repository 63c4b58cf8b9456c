"""The listing of a network."""

from __future__ import annotations

import math
import re

import pytest
from qat_export.integer.fields import named_arrays
from qat_export.integer.listing import describe, layers
from qat_export.integer.network import IntegerNetwork

from tests.helpers.network_changes import changed
from tests.helpers.networks import lowered, ordinary, quantization, toy

#: The blocks of BNext-Tiny at a quarter of a percent of its weights: the same 31 sub-blocks.
TINY_BLOCKS = (2, 4, *[8] * 2, *[16] * 2, *[32] * 6, *[64] * 2)


def table(network: IntegerNetwork) -> list[list[str]]:
    """Cells of the listing's lines, headings first; cells are at least two blanks apart."""
    lines = describe(network).split("\n")
    start = next(number for number, line in enumerate(lines) if line.startswith("layer "))
    return [re.split(r"\s{2,}", line) for line in lines[start : lines.index("", start)]]


def test_every_layer_with_weights_has_a_line_in_forward_order() -> None:
    model, network, _ = ordinary()
    names = [cells[0] for cells in table(network)[1:]]
    subs = [
        name.removesuffix(".binary_conv") for name, _ in model.named_modules() if name.endswith("binary_conv")
    ]
    expected = [line for sub in subs for line in (sub, f"{sub}.se")]
    assert names == ["feature.0", *expected, "fc"]
    for name in names:
        model.get_submodule(name)


def test_a_line_says_kind_shape_bits_stride_bytes_result_and_range() -> None:
    _, network, _ = ordinary()
    lines = {cells[0]: cells[1:] for cells in table(network)}
    assert lines["layer"] == ["kind", "weights", "bits", "stride", "bytes", "result", "multipliers"]
    assert lines["feature.0"][:6] == ["stem", "8×3×3×3", "8", "1", "216", "int8"]
    assert lines["feature.1.Attention"][:6] == ["bias 3×3", "8×8×3×3", "1", "1", "72", "int8"]
    assert lines["feature.3.Attention"][:6] == ["bias 3×3", "16×16×3×3", "1", "2", "288", "int8"]
    assert lines["feature.2.Attention"][0] == "scale 3×3"
    assert lines["feature.2.FFN"][:6] == ["bias 1×1", "16×16×1×1", "1", "1", "32", "int8"]
    # No stride: one cell less.
    assert lines["feature.2.FFN.se"][:5] == ["attention", "16 → 2 → 16", "8", "64", "uint8"]
    assert lines["fc"][:5] == ["classifier", "10×32", "8", "320", "float32"]
    for sub in network.sub_blocks():
        low, high = (float(number) for number in lines[sub.name][6].split(" … "))
        assert low == pytest.approx(float(sub.conv.multiplier.min()), rel=0.01)
        assert high == pytest.approx(float(sub.conv.multiplier.max()), rel=0.01)
        assert sub.attention is not None
        both = [*sub.attention.reduce.multiplier, *sub.attention.expand.multiplier]
        low, high = (float(number) for number in lines[f"{sub.name}.se"][5].split(" … "))
        assert (low, high) == (pytest.approx(min(both), rel=0.01), pytest.approx(max(both), rel=0.01))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_bits_are_those_that_the_network_was_quantized_to(bits: int) -> None:
    settings = quantization(trunk=bits, se=bits, se_weight=bits, stem_weight=bits, fc_weight=bits)
    for layer in layers(lowered(toy(0, settings))):
        assert layer.bits == (1 if layer.kind.endswith(("1×1", "3×3")) else bits), layer.name
        if layer.name != "fc":
            assert layer.result == f"{'uint' if layer.kind == 'attention' else 'int'}{bits}"


def test_the_totals_are_the_sums_of_all_lines_and_of_every_array() -> None:
    network = ordinary()[1]
    text = describe(network)
    listed = list(layers(network))
    binary = [layer for layer in listed if layer.bits == 1]
    weights = sum(math.prod(sub.conv.shape) for sub in network.sub_blocks())
    assert re.search(
        rf"^{len(binary)} binary convolutions +{weights:,} weights +{weights // 8:,} bytes$", text, re.M
    )
    other = sum(affine.weight.size for affine in network.affines())
    assert re.search(
        rf"^{len(listed) - len(binary)} layers of integer weights +{other:,} weights", text, re.M
    )
    everything = sum(array.nbytes for _, array in named_arrays(network))
    assert re.search(rf"^total +{everything:,} bytes$", text, re.M)
    parts = [int(number.replace(",", "")) for number in re.findall(r"([\d,]+) bytes$", text, re.M)]
    assert len(parts) == 4
    assert sum(parts[:-1]) == parts[-1] == everything
    cells = [row[-3].replace(",", "") for row in table(network)[1:]]
    assert sum(map(int, cells)) == parts[0] + parts[1]


def test_a_network_without_attention_lists_none() -> None:
    network = lowered(toy(0, infor_recoupling=False, elm_attention=False))
    kinds = {cells[1] for cells in table(network)[1:]}
    assert kinds == {"stem", "bias 3×3", "bias 1×1", "classifier"}
    assert "2 layers of integer weights" in describe(network)


def test_all_31_sub_blocks_of_tiny_are_listed_in_straight_columns_that_fit_a_terminal() -> None:
    network = lowered(toy(0, widths=TINY_BLOCKS))
    text = describe(network)
    assert text.startswith(f"{network.architecture}\n\nlayer ")
    assert len([layer for layer in layers(network) if layer.bits == 1]) == 31
    lines = text.split("\n")[2:]
    lines = lines[: lines.index("")]
    assert len(lines) == 1 + 1 + 31 + 31 + 1
    assert max(map(len, lines)) <= 110
    assert not [line for line in lines if line != line.rstrip()]
    # Each column begins where its heading does, or ends there where it holds numbers.
    for heading in ("kind", "weights", "result", "multipliers"):
        at = lines[0].index(f" {heading}")
        assert {line[at] for line in lines} == {" "}
        assert " " not in {line[at + 1] for line in lines}
    for heading in ("bits", "bytes"):
        end = lines[0].index(heading) + len(heading)
        assert {line[end] for line in lines} == {" "}
        assert " " not in {line[end - 1] for line in lines}


def test_extreme_multipliers_keep_the_columns_straight() -> None:
    network = changed(
        ordinary()[1], "blocks.0.spatial.conv.multiplier", lambda m: m * 0 + m.dtype.type(2.0**-22)
    )
    lines = describe(changed(network, "head.classifier.multiplier", lambda m: m * m.dtype.type(1e20))).split(
        "\n"
    )
    cells = [line for line in lines if " … " in line]
    assert len({line.index(" … ") for line in cells}) == 1
    assert any("2.38e-07 … 2.38e-07" in line for line in cells)
