"""What each group and layer costs: which parts there are, what a variant quantizes, how parts are ranked."""

from __future__ import annotations

import math
from fnmatch import fnmatchcase
from pathlib import Path

import pytest
import torch

from qat.data.loading import load_split
from qat.errors import CheckpointError, QuantizationError
from qat.models.bnext import BNext
from qat.quantize.activation_quantizers import activation_quantizers
from qat.quantize.overrides import group_of
from qat.quantize.preparation import quantization_map
from qat.recipe.schema import Quantization
from qat.sensitivity.parts import GROUPS, Part, Sensitivity, measure_parts, parts_of, ranks_of, without
from qat.sensitivity.variants import Measure, QuantizerState, Variants, quantizer_state, signal_to_noise
from tests.helpers import toy_runs as toyruns
from tests.helpers.cases import slow
from tests.helpers.toy_networks import build_float_toy
from tests.helpers.toy_runs import image_folder
from tests.helpers.toy_variants import FULL, Counter, layer_of, make_variants


@pytest.fixture(scope="module")
def variants() -> Variants:
    """Variants that share the parameters of one network, which tests must not change."""
    return make_variants(build_float_toy(widths=(8, 8, 16)))


@pytest.fixture(scope="module")
def state(variants: Variants) -> QuantizerState:
    return quantizer_state(variants.calibrated(FULL), variants.model)


def every_part(variants: Variants) -> list[Part]:
    return [part for kind in ("group", "layer") for part in parts_of(variants.model, FULL, kind, GROUPS)]


# Noise


def test_a_tenth_of_the_signal_as_noise_is_20_db_and_a_shift_is_none() -> None:
    z = torch.tensor([[1.0, -1.0], [3.0, -3.0]])
    assert signal_to_noise(z, 1.1 * z) == pytest.approx(20.0, abs=1e-4)
    assert signal_to_noise(z + 5, 1.1 * z - 7) == pytest.approx(20.0, abs=1e-4)
    assert signal_to_noise(z, -z) == pytest.approx(-10 * math.log10(4))
    assert signal_to_noise(z, z + 1) == math.inf
    assert signal_to_noise(0 * z, z) == -math.inf


def test_an_unchanged_network_has_no_noise_and_changes_no_answer(variants: Variants) -> None:
    assert variants.measure(variants.model) == Measure(100.0, 0, math.inf)


# Parts


def test_parts_are_the_four_groups_and_every_layer_that_globs_know(float_toy: BNext) -> None:
    assert [part.name for part in parts_of(float_toy, FULL, "group", GROUPS)] == list(GROUPS)
    layers = [part.name for part in parts_of(float_toy, FULL, "layer", GROUPS)]
    assert layers[:4] == ["feature.0", "feature.0.trunk", "feature.1.Attention", "feature.1.Attention.se"]
    assert layers[-3:] == ["feature.4.trunk_out", "prelu", "fc"]
    assert len(layers) == len(set(layers))


def test_what_the_recipe_leaves_in_float_is_no_part(float_toy: BNext) -> None:
    recipe = Quantization.model_validate({"stem": {"enabled": False}, "exclude": ["fc", "*.2.*"]})
    assert [part.name for part in parts_of(float_toy, recipe, "group", GROUPS)] == ["se", "trunk"]
    layers = [part.name for part in parts_of(float_toy, recipe, "layer", ["se"])]
    assert layers
    assert all(name.endswith(".se") and ".2." not in name for name in layers)
    with pytest.raises(QuantizationError, match=r"exclude: 'prelu2' matches .* \(did you mean 'prelu'\?\)"):
        parts_of(float_toy, Quantization(exclude=["prelu2"]), "layer", GROUPS)


def test_each_part_alone_is_all_that_is_quantized_and_left_out_all_that_is_not(variants: Variants) -> None:
    full = set(quantization_map(variants.build(FULL)))
    layers = [part.name for part in parts_of(variants.model, FULL, "layer", GROUPS)]
    owners = {point: layer_of(point, layers) for point in full}
    for part in every_part(variants):
        own = {p for p in full if part.name in (owners[p], group_of(owners[p]))}
        assert set(quantization_map(variants.build(part.alone))) == own, part.name
        assert set(quantization_map(variants.build(part.left_out))) == full - own, part.name
        # The head's PReLU has 8-bit slopes and no point of its own.
        assert own or part.name == "prelu"


@pytest.mark.parametrize("kind", ["group", "layer"])
def test_the_parts_of_a_kind_make_up_the_whole_map_without_overlap(variants: Variants, kind: str) -> None:
    parts = parts_of(variants.model, FULL, kind, GROUPS)  # type: ignore[arg-type]
    points = [point for part in parts for point in quantization_map(variants.build(part.alone))]
    assert sorted(points) == sorted(quantization_map(variants.build(FULL)))


def test_a_layer_is_excluded_by_its_very_name() -> None:
    (glob,) = without(FULL, ["a[1].*"]).exclude
    assert fnmatchcase("a[1].*", glob)
    assert not fnmatchcase("a1.b", glob)
    assert without(Quantization(exclude=["fc"]), ["prelu"]).exclude == ["fc", "prelu"]


# Variants


def test_variants_have_the_grids_of_the_fully_quantized_network(
    variants: Variants, state: QuantizerState
) -> None:
    for part in every_part(variants):
        for section in (part.alone, part.left_out):
            model = variants.build(section, state)
            own = quantizer_state(model, variants.model)
            assert all(torch.equal(value, state[key]) for key, value in own.items())
            assert all(point.has_grid for _, point in activation_quantizers(model))


def test_measuring_changes_nothing_in_the_float_rest_network(
    variants: Variants, state: QuantizerState
) -> None:
    before = {key: value.clone() for key, value in variants.model.state_dict().items()}
    measure_parts(variants, every_part(variants)[:6], FULL, state, Counter())
    variants.calibrated(FULL)
    after = variants.model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(value, before[key]) for key, value in after.items())
    assert variants.measure(variants.model).sqnr == math.inf


def test_the_figures_are_those_of_the_variants(variants: Variants, state: QuantizerState) -> None:
    parts, watch = every_part(variants)[:3], Counter()
    found = measure_parts(variants, parts, FULL, state, watch)
    assert watch.expected == len(watch.names) == 2 * len(parts) + 2
    whole = variants.measure(variants.build(FULL, state))
    for part, one in zip(parts, found, strict=True):
        assert one.alone == variants.measure(variants.build(part.alone, state))
        assert one.left_out == variants.measure(variants.build(part.left_out, state))
        assert one.loss == 100.0 - one.alone.top1
        assert one.gain == one.left_out.top1 - whole.top1
        assert one.gain_db == one.left_out.sqnr - whole.sqnr
    assert found == measure_parts(variants, parts, FULL, state, Counter())


@pytest.mark.parametrize(
    ("ruined", "factor"),
    [
        ("feature.2.trunk_mid", 0.02),
        pytest.param("feature.1.trunk_out", 60.0, marks=pytest.mark.exhaustive),
        slow("feature.2.Attention", 60.0),
    ],
)
def test_a_ruined_layer_ranks_first_everywhere(
    variants: Variants, state: QuantizerState, ruined: str, factor: float
) -> None:
    """With a grid far too fine, which saturates all values, or far too coarse, as after a huge outlier."""
    spoilt = {
        key: value * factor if key.startswith(f"{ruined}.") and key.endswith("fake.scale") else value
        for key, value in state.items()
    }
    parts = parts_of(variants.model, FULL, "layer", GROUPS)
    ranks = ranks_of(measure_parts(variants, parts, FULL, spoilt, Counter()))
    assert ranks[ruined].by_loss == ranks[ruined].by_noise == 1
    assert ranks[ruined].by_gain == ranks[ruined].by_noise_gain == 1


def test_fewer_images_are_evenly_spaced(variants: Variants) -> None:
    few = variants.fewer(16)
    assert torch.equal(few.images, variants.images[::4])
    assert torch.equal(few.labels, variants.labels[::4])
    assert variants.fewer(64) is variants


def test_evenly_spaced_images_are_of_all_classes_of_a_sorted_folder(tmp_path: Path) -> None:
    root = image_folder(tmp_path, train=1, test=50)
    overrides = ("data.dataset=imagefolder", f"data.root={root}", "model.num_classes=2")
    split = load_split(toyruns.recipe("tiny_int8", tmp_path, *overrides).recipe.data, "test")
    images, labels = split.evenly(80)
    assert images.shape == (80, 3, 8, 8)
    assert images.dtype == torch.uint8
    assert labels.bincount().tolist() == [40, 40]
    every, _ = next(iter(split.batches(100)))
    assert torch.equal(images, every[torch.arange(80) * 100 // 80])


def test_logits_that_are_not_finite_are_refused(float_toy: BNext) -> None:
    with torch.no_grad():
        float_toy.fc.bias[0] = torch.inf
    with pytest.raises(CheckpointError, match="logits that are not finite"):
        make_variants(float_toy)


# Ranks


def sensitivity(name: str, loss: float, sqnr: float, gain: float = 0.0, gain_db: float = 0.0) -> Sensitivity:
    measure = Measure(90.0, 0, sqnr)
    return Sensitivity(name, "layer", "trunk", measure, measure, loss, gain, gain_db)


def test_accuracy_decides_and_noise_where_accuracies_are_equal() -> None:
    found = [
        sensitivity("quiet", 1.0, 30.0, gain=2.0, gain_db=0.1),
        sensitivity("loud", 1.0, 10.0, gain=2.0, gain_db=0.2),
        sensitivity("worst", 2.0, 20.0, gain=3.0, gain_db=-1.0),
        sensitivity("exact", 0.0, math.inf, gain=0.0, gain_db=0.0),
    ]
    ranks = ranks_of(found)
    orders = {
        attribute: sorted(ranks, key=lambda name: getattr(ranks[name], attribute))
        for attribute in ("by_loss", "by_noise", "by_gain", "by_noise_gain")
    }
    assert orders["by_loss"] == ["worst", "loud", "quiet", "exact"]
    assert orders["by_noise"] == ["loud", "worst", "quiet", "exact"]
    assert orders["by_gain"] == ["worst", "loud", "quiet", "exact"]
    assert orders["by_noise_gain"] == ["loud", "quiet", "exact", "worst"]
