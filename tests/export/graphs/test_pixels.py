"""The normalization as one multiplication and one addition of raw pixels."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from qat_export.graphs.pixels import fold_normalization, pixel_table
from qat_export.integer.network import IntegerNetwork

from qat.data.augment import normalize
from qat.errors import QuantizationError
from qat.grid import Grid
from qat.quantize.image_grid import image_grid
from tests.helpers.networks import ordinary


def normalized_by(mean: tuple[float, float, float], std: tuple[float, float, float]) -> IntegerNetwork:
    network = ordinary()[1]
    scale, zero_point = image_grid(mean, std)
    stem = replace(network.stem, image=Grid(scale, 8, signed=False, zero_point=zero_point))
    return replace(network, mean=mean, std=std, stem=stem)


def folded(network: IntegerNetwork) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    gain, offset = fold_normalization(network)
    assert gain.dtype == offset.dtype == np.float32
    steps = np.rint(np.arange(256, dtype=np.float32) * gain[:, None] + offset[:, None])
    return np.clip(steps + network.stem.image.zero_point, 0, 255).astype(np.uint8)


def test_the_table_is_what_a_float_image_goes_through() -> None:
    network = ordinary()[1]
    raw = torch.arange(256, dtype=torch.uint8).view(1, 1, 1, 256).expand(1, 3, 1, 256)
    images = normalize(raw, network.mean, network.std)[0, :, 0]
    grid = network.stem.image
    expected = torch.clamp(torch.round(images / grid.scale) + grid.zero_point, 0, 255)
    np.testing.assert_array_equal(pixel_table(network), expected.numpy())


@pytest.mark.parametrize(
    ("mean", "std"),
    [
        ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ((0.4914, 0.4822, 0.4465), (0.247, 0.2435, 0.2616)),
        ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
        ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
        ((1.0, 0.0, 0.5), (0.1, 1.0, 0.3)),
    ],
)
def test_usual_normalizations_fold_exactly(
    mean: tuple[float, float, float], std: tuple[float, float, float]
) -> None:
    network = normalized_by(mean, std)
    np.testing.assert_array_equal(folded(network), pixel_table(network))


fractions = st.floats(0, 1).map(lambda v: round(v, 4))
spreads = st.floats(0.05, 2).map(lambda v: round(v, 4))


@given(st.tuples(*[fractions] * 3), st.tuples(*[spreads] * 3))
def test_any_normalization_folds_exactly_or_is_refused(
    mean: tuple[float, float, float], std: tuple[float, float, float]
) -> None:
    network = normalized_by(mean, std)
    try:
        found = folded(network)
    except QuantizationError as error:
        assert "can't be folded" in str(error)  # noqa: PT017
        return
    np.testing.assert_array_equal(found, pixel_table(network))


def test_a_grid_on_which_every_pixel_is_a_tie_is_refused() -> None:
    network = normalized_by((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    stem = replace(network.stem, image=Grid(2 / 255, 8, signed=False, zero_point=0))
    network = replace(network, stem=stem)
    with pytest.raises(QuantizationError, match=r"channel 0 .*export for float32 input"):
        fold_normalization(network)
