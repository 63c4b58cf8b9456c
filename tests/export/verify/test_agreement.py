"""Comparing exported models with the network they came from."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from qat_export.graphs.float32 import emit_float
from qat_export.graphs.metadata import InputKind
from qat_export.graphs.portable import emit_portable
from qat_export.integer.network import IntegerNetwork
from qat_export.integer.reference import Interpreter
from qat_export.verify.agreement import LOGIT_DIFFERENCE, TOP1_AGREEMENT, Comparison, compare
from qat_export.verify.model import OnnxModel

from qat.data.loading import load_split
from qat.data.split import MemorySplit
from qat.errors import CheckpointError, VerificationError
from qat.evaluation import collect_logits, predictor
from qat.recipe.schema import Data
from tests.helpers.cases import combinations
from tests.helpers.cifar10 import COUNT, cifar10
from tests.helpers.networks import (
    MEAN,
    STD,
    float_network,
    lowered,
    ordinary,
    quantization,
    saved,
    toy,
    with_conv,
)

DATA = Data(image_size=16, mean=MEAN, std=STD, eval_batch_size=16)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(ordinary()[2], tmp_path_factory.mktemp("model") / "model.onnx")


@pytest.fixture(scope="module")
def split() -> MemorySplit:
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(40, 1, 4, 4, generator=generator)
    images = torch.nn.functional.interpolate(coarse, (16, 16), mode="bilinear").mul(255).to(torch.uint8)
    return MemorySplit([str(i) for i in range(10)], images, torch.arange(40) % 10)


def test_a_fresh_export_equals_the_torch_network_and_the_reference_in_every_logit(
    path: Path, split: MemorySplit
) -> None:
    model, network, _ = ordinary()
    result = compare(predictor(model), OnnxModel(path), network, split, DATA)
    assert (result.n, result.reference_n) == (40, 32)
    assert result.reference_equal == 100.0
    assert (result.agreement, result.largest, result.rms, result.relative) == (100.0, 0.0, 0.0, 0.0)
    assert (result.median, result.percentile_99) == (0.0, 0.0)
    assert result.network_top1 == result.model_top1
    result.require()
    assert len(result.rows()) == 10


@pytest.mark.parametrize("kind", ["uint8 NCHW", "uint8 NHWC"])
def test_a_model_that_takes_raw_pixels_equals_both_too(
    kind: InputKind, tmp_path: Path, split: MemorySplit
) -> None:
    model, network, _ = ordinary()
    exported = OnnxModel(saved(emit_portable(network, input_kind=kind), tmp_path / "model.onnx"))
    result = compare(predictor(model), exported, network, split, DATA)
    assert (result.n, result.agreement, result.largest, result.reference_equal) == (40, 100.0, 0.0, 100.0)


# Whole test sets.


def test_torch_and_the_reference_give_the_same_logits_on_all_test_digits() -> None:
    model, network, _ = ordinary()
    data = DATA.model_copy(update={"eval_batch_size": 60})
    digits = load_split(data, "test")
    ours = collect_logits(predictor(model), digits, data)
    interpreter = Interpreter(network)
    specified = collect_logits(lambda images: torch.from_numpy(interpreter(images.numpy())), digits, data)
    assert len(ours) == 360
    assert torch.equal(ours, specified)
    assert len(ours.argmax(1).unique()) > 1


@pytest.mark.slow
@pytest.mark.parametrize("count", [1000, pytest.param(COUNT, marks=pytest.mark.exhaustive)])
def test_torch_and_the_export_agree_on_photographs(count: int, tmp_path: Path) -> None:
    photographs = cifar10(count)
    model = toy(6, size=32, widths=(8, 16, 16), stem_stride=2)
    network = lowered(model, 32)
    exported = OnnxModel(saved(emit_portable(network), tmp_path / "model.onnx"))
    data = DATA.model_copy(update={"image_size": 32, "eval_batch_size": 500})
    result = compare(predictor(model), exported, network, photographs, data)
    assert (result.n, result.reference_n) == (count, 32)
    assert (result.agreement, result.largest, result.reference_equal) == (100.0, 0.0, 100.0)


# What is seen, and what is refused.


def test_the_distribution_of_the_logit_differences_is_that_of_all_logits(
    path: Path, split: MemorySplit
) -> None:
    model = OnnxModel(path)
    # 400 logits; one of a hundred differs by 3, one of four by 1 or more.
    shift = torch.zeros(40, 10)
    shift.view(-1)[::4] = -1.0
    shift.view(-1)[::100] = 3.0

    def shifted(images: torch.Tensor) -> torch.Tensor:
        rows, shifted.done = slice(shifted.done, shifted.done + len(images)), shifted.done + len(images)
        return model(images) + shift[rows]

    shifted.done = 0
    result = compare(shifted, model, ordinary()[1], split, DATA)
    difference = shift.abs().flatten().double().numpy()
    assert result.median == 0.0
    assert result.percentile_99 == pytest.approx(np.quantile(difference, 0.99), abs=1e-5)
    assert result.largest == pytest.approx(3.0, abs=1e-5)
    assert result.rms == pytest.approx(np.sqrt((difference**2).mean()), rel=1e-5)
    rows = {row[0]: row[1] for row in result.rows()}
    assert rows["logit difference, median"] == "0"
    assert rows["logit difference, largest"] == "3"


def test_a_float_export_is_refused_by_name(tmp_path: Path, split: MemorySplit) -> None:
    exported = emit_float(float_network(), image_size=16, mean=MEAN, std=STD)
    model = OnnxModel(saved(exported, tmp_path / "float.onnx"))
    with pytest.raises(
        CheckpointError, match=r"float\.onnx: a float export \('bnext-qat float32 1'\) has no"
    ):
        compare(model, model, ordinary()[1], split, DATA)


@combinations({"trunk": [3, 8], "options": [{"elm_attention": False}, {"infor_recoupling": False}]})
def test_an_ablated_export_passes_its_verification(
    options: dict[str, bool], trunk: int, tmp_path: Path, split: MemorySplit
) -> None:
    model = toy(4, quantization(trunk=trunk, se=trunk), **options)
    network = lowered(model)
    exported = OnnxModel(saved(emit_portable(network), tmp_path / "model.onnx"))
    result = compare(predictor(model), exported, network, split, DATA)
    assert (result.largest, result.reference_equal) == (0.0, 100.0)
    result.require()


def test_a_model_compared_with_itself_passes(path: Path, split: MemorySplit) -> None:
    model = OnnxModel(path)
    result = compare(model, model, ordinary()[1], split, DATA)
    assert (result.agreement, result.rms, result.largest, result.relative) == (100.0, 0.0, 0.0, 0.0)
    result.require()


def damaged(network: IntegerNetwork, kind: str) -> IntegerNetwork:
    """``network`` with a byte of signs inverted, or one multiplier 1 % too large."""
    if kind == "sign bits":
        bits = network.blocks[2].pointwise[0].conv.sign_bits.copy()
        bits[0] ^= 0xFF
        return with_conv(network, network.blocks[2].pointwise[0].name, sign_bits=bits)
    layer = network.blocks[0].pointwise[0].conv if kind == "requantization" else network.head.classifier
    multiplier = layer.multiplier.copy()
    multiplier[0] *= np.float32(1.01)
    if kind == "requantization":
        return with_conv(network, network.blocks[0].pointwise[0].name, multiplier=multiplier)
    classifier = replace(network.head.classifier, multiplier=multiplier)
    return replace(network, head=replace(network.head, classifier=classifier))


@pytest.mark.parametrize("kind", ["sign bits", "requantization", "logit"])
def test_one_wrong_constant_in_the_file_fails_the_verification(
    kind: str, tmp_path: Path, split: MemorySplit
) -> None:
    _, network, model = ordinary()
    good = OnnxModel(saved(model, tmp_path / "good.onnx"))
    bad = OnnxModel(saved(emit_portable(damaged(network, kind)), tmp_path / "bad.onnx"))
    result = compare(good, bad, network, split, DATA)
    assert result.reference_equal < 100.0
    with pytest.raises(VerificationError, match="of the logits equal the integer reference"):
        result.require()


def test_a_model_of_another_network_fails_on_every_bound(tmp_path: Path, split: MemorySplit) -> None:
    other = OnnxModel(saved(emit_portable(lowered(toy(50))), tmp_path / "other.onnx"))
    torch_model, network, _ = ordinary()
    result = compare(predictor(torch_model), other, network, split, DATA)
    with pytest.raises(VerificationError) as caught:
        result.require()
    assert all(part in str(caught.value) for part in ("top-1 agrees", "logits differ", "integer reference"))


GOOD = Comparison(1000, 90.0, 90.0, TOP1_AGREEMENT, 0.0, 0.1, 0.1, 0.1, LOGIT_DIFFERENCE, 32, 100.0)


def test_the_bounds_themselves_pass() -> None:
    GOOD.require()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"agreement": 99.89}, "top-1 agrees on 99.89%"),
        ({"agreement": float("nan")}, "top-1 agrees"),
        ({"relative": 1.01e-3}, "logits differ by 0.101% RMS"),
        ({"relative": float("nan")}, "logits differ"),
        ({"reference_equal": 99.99}, "only 99.99%"),
        ({"reference_equal": float("nan")}, "of the logits equal"),
    ],
)
def test_each_bound_is_enforced_and_named(change: dict[str, float], message: str) -> None:
    with pytest.raises(VerificationError, match=message):
        replace(GOOD, **change).require()


def test_a_share_is_not_rounded_up_to_100() -> None:
    shown = {row[0]: row[1] for row in replace(GOOD, agreement=99.999, reference_equal=99.9999).rows()}
    assert shown["same top-1"] == "99.99 %"
    assert shown["logits equal to the reference (32 images)"] == "99.99 %"
