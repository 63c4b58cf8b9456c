"""Collective operations of several processes, and what happens if one of the processes fails."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from qat.models.bnext import BNext
from qat.ops.batch_norm import BatchNorm2d, batch_gain_and_offset
from qat.ops.norm_prelu import norm_prelu
from qat.ops.pooling import moments
from qat.ops.scale_add import scaled
from qat.quantize.activation_quantizers import ActivationQuantizer
from qat.quantize.calibration import freeze_observers
from qat.quantize.observers import MOVING, OBSERVERS, observed_grid
from qat.system.collectives import (
    any_process,
    extremes,
    from_main,
    gathered,
    is_main,
    permuted_rows,
    rows_of_all,
    total,
    world,
)
from qat.system.launch import Share, World, launched
from qat.train.batch_norm_reestimation import reestimate_batch_norm
from tests.helpers.joined_processes import call, together
from tests.helpers.toy_networks import toy_images

NAN = float("nan")


def test_a_process_alone_is_given_back_what_it_gives() -> None:
    x = torch.randn(4, 3, requires_grad=True)
    assert world() == World()
    assert is_main()
    assert total([1.5, 2.0]) == [1.5, 2.0]
    assert any_process(True)
    assert not any_process(False)
    assert from_main("a") == "a"
    assert rows_of_all(x) is x
    assert gathered(x).shape == (1, 4, 3)
    assert torch.equal(permuted_rows(x, [2, 0, 1, 3]), x[[2, 0, 1, 3]])


@pytest.mark.parametrize("environment", [{}, {"RANK": "1"}, {"RANK": "x", "WORLD_SIZE": "2"}])
def test_without_a_launcher_there_is_one_process(
    environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert launched() == World()


@pytest.mark.parametrize("count", [0, 1, 2, 7, 8])
def test_shares_are_a_batch_cut_into_consecutive_parts_of_nearly_one_size(count: int) -> None:
    parts = [list(range(count))[Share(rank, 3).of(count)] for rank in range(3)]
    assert [row for part in parts for row in part] == list(range(count))
    sizes = [len(part) for part in parts]
    assert max(sizes) - min(sizes) <= 1


def _everything() -> dict[str, object]:
    rank = world().rank
    rows = torch.arange(3.0 if rank == 0 else 1.0)[:, None] + 10 * rank
    order = [5, 0, 3, 1, 4, 2]
    mine = torch.arange(3)[:, None] + 3 * rank
    return {
        "world": (world().rank, world().size, is_main()),
        "total": total([rank + 1, 0.5]),
        "any": (any_process(rank == 1), any_process(False)),
        "text": from_main(f"of {rank}"),
        "rows": rows_of_all(rows).flatten().tolist(),
        "nothing": rows_of_all(rows if rank else torch.empty(0, 0)).tolist(),
        "extremes": extremes(torch.tensor([1.0, 2.0]) * (1 - 3 * rank)).tolist(),
        "of_few": extremes(torch.tensor([4.0, 5.0][:rank])).tolist(),
        "no_number": extremes(torch.tensor([1.0, NAN][: 2 - rank])).tolist(),
        "permuted": permuted_rows(mine, order).flatten().tolist(),
    }


def test_each_process_is_told_what_the_others_have() -> None:
    first, second = call(_everything)
    assert first.pop("world") == (0, 2, True)
    assert second.pop("world") == (1, 2, False)
    assert first.pop("permuted") == [5, 0, 3]
    assert second.pop("permuted") == [1, 4, 2]
    assert first == second
    assert first["total"] == [3.0, 1.0]
    assert first["any"] == (True, False)
    assert first["text"] == "of 0"
    assert first["rows"] == [0.0, 1.0, 2.0, 10.0]
    assert first["nothing"] == [[10.0]]
    assert first["extremes"] == [-4.0, 2.0]
    assert first["of_few"] == [4.0, 4.0]
    assert first["no_number"] == [-torch.inf, torch.inf]


# Batch statistics


def _network() -> nn.Module:
    torch.manual_seed(0)
    norms = [BatchNorm2d(4), BatchNorm2d(4, momentum=None)]
    for norm in norms:
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    return nn.Sequential(norms[0], nn.Conv2d(4, 4, 3), nn.ReLU(), norms[1]).double()


def _trained(network: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """Outputs, gradients and running statistics. Gradients of parameters are averaged over the processes."""
    images = images.clone().requires_grad_()
    out = network.train()(images)
    (
        out.square() * torch.linspace(0, 1, out[0].numel(), dtype=out.dtype).view(out[0].shape)
    ).mean().backward()
    assert images.grad is not None
    found = {"out": out.detach(), "input": images.grad}
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None
        found[name] = gathered(parameter.grad).mean(0)
    return found | {name: value.clone() for name, value in network.named_buffers()}


def _shared_norm(images: Tensor) -> dict[str, Tensor]:
    return _trained(_network(), images[world().share.of(len(images))])


def test_batch_normalization_is_that_of_all_processes_images_forward_and_backward() -> None:
    images = torch.randn(6, 4, 7, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) + 3
    whole = _trained(_network(), images)
    first, second = call(_shared_norm, images)
    for name, expected in whole.items():
        if name in ("out", "input"):
            # Each process's loss is a mean over half of the images.
            scale = 1.0 if name == "out" else 0.5
            found = torch.cat([first[name], second[name]]) * scale
        else:
            found = first[name]
            assert torch.equal(found, second[name])
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


def _uneven_norm(images: Tensor) -> dict[str, Tensor]:
    norm = BatchNorm2d(4)
    norm(images[: len(images) - 1] if world().rank == 0 else images[len(images) - 1 :])
    norm(images if world().rank == 0 else images[:0])
    return {name: value.clone() for name, value in norm.named_buffers()}


def test_statistics_weigh_each_process_by_its_values_even_by_none() -> None:
    images = torch.randn(5, 4, 3, 3, generator=torch.Generator().manual_seed(2))
    norm = BatchNorm2d(4)
    norm(images)
    norm(images)
    for found in call(_uneven_norm, images):
        for name, value in norm.named_buffers():
            torch.testing.assert_close(found[name], value)


def _reestimated(models: list[BNext], share: Share) -> list[dict[str, Tensor]]:
    found = []
    for model in models:
        batches = [toy_images(count, seed=count)[share.of(count)] for count in (8, 7, 1)]
        batches = [batch.to(model.fc.weight.dtype) for batch in batches]

        def forward(model: BNext = model, batches: list[Tensor] = batches) -> None:
            for batch in batches:
                model(batch)

        reestimate_batch_norm(model, forward)
        found.append({name: value.clone() for name, value in model.named_buffers() if "running" in name})
    return found


def _shared_reestimation(models: list[BNext]) -> list[dict[str, Tensor]]:
    return _reestimated(models, world().share)


def test_statistics_averaged_anew_are_those_of_one_process(float_toy: BNext, toy: BNext) -> None:
    """Both for a network with a float rest and for a quantized one.

    7 images are divided into shares of different sizes, and one image leaves a process without any. The float
    network computes in float64. The quantized one can't: a value half-way between two steps can be rounded
    either way, which changes a channel's mean by a fraction of a step.
    """
    models = [float_toy.double(), toy]
    first, second = call(_shared_reestimation, models)
    expected = _reestimated(models, Share())
    for one, mine, other, bound in zip(expected, first, second, (1e-10, 5e-3), strict=True):
        for name, value in one.items():
            assert torch.equal(mine[name], other[name])
            torch.testing.assert_close(mine[name], value, rtol=bound, atol=bound)


def _gradients_of_gain_and_offset(share: Share) -> list[Tensor]:
    """Of a scaled batch through its normalization; then the parameters' and the running statistics."""
    generator = torch.Generator().manual_seed(4)
    x, factor, weights = (
        torch.randn(7, 4, *size, generator=generator, dtype=torch.float64)[share.of(7)]
        for size in ((3, 5), (), (3, 5))
    )
    x.requires_grad_()
    factor.requires_grad_()
    norm = BatchNorm2d(4).double()
    gain, offset = batch_gain_and_offset(norm, factor, *moments(x), 15)
    out = scaled(x, factor * gain) + offset.view(1, -1, 1, 1)
    (out * weights).sum().backward()
    found = [out.detach(), x.grad, factor.grad, norm.weight.grad, norm.bias.grad]
    assert norm.running_mean is not None
    assert norm.running_var is not None
    return [value for value in found if value is not None] + [norm.running_mean, norm.running_var]


def _gradients_of_norm_prelu(share: Share, images: int) -> list[Tensor]:
    """Of a batch through normalization and PReLU, by the native library where there are images."""
    generator = torch.Generator().manual_seed(5)
    x, weights = (torch.randn(images, 4, 3, 5, generator=generator).double()[share.of(images)] for _ in "xw")
    x.requires_grad_()
    norm, activation = BatchNorm2d(4).double(), nn.PReLU(4).double()
    out = norm_prelu(x, norm, activation.weight)
    (out * weights).sum().backward()
    found = [out.detach(), x.grad, activation.weight.grad, norm.weight.grad, norm.bias.grad]
    return [value for value in found if value is not None] + [norm.running_mean, norm.running_var]


def _trained_quantized(toy: BNext, share: Share, frozen: bool) -> dict[str, Tensor]:
    """Statistics and ranges of a quantized network after a batch of training.

    With frozen ranges steps are put together, as far as batch statistics let them.
    """
    toy = copy.deepcopy(toy)
    if frozen:
        freeze_observers(toy)
    toy.train()(toy_images(8)[share.of(8)])
    kinds = ("running_mean", "running_var", "min_val", "max_val", "fake.scale")
    return {name: value.clone() for name, value in toy.named_buffers() if name.endswith(kinds)}


def _moved_ranges(share: Share) -> list[Tensor]:
    """What points give back that observe while they quantize, and what they then know."""
    found = []
    for observer in MOVING:
        point = ActivationQuantizer(observer=observer, averaging=0.3).train()
        for calibrating in (True, False):
            if calibrating:
                point.start_calibration()
            results = [point(batch[share.of(len(batch))]) for batch in _batches()]
            if calibrating:
                point.finish_calibration()
            found += [*results, *(value.clone() for value in point.state_dict().values())]
    return found


def _each_gradients(share: Share) -> list[list[Tensor]]:
    # One image leaves a process none.
    return [
        _gradients_of_gain_and_offset(share),
        *(_gradients_of_norm_prelu(share, images) for images in (7, 1)),
    ]


def _shared_training(toy: BNext) -> tuple[list[list[Tensor]], list[dict[str, Tensor]], list[Tensor]]:
    share = world().share
    quantized = [_trained_quantized(toy, share, frozen) for frozen in (False, True)]
    return _each_gradients(share), quantized, _moved_ranges(share)


def test_training_knows_statistics_and_extremes_of_all_images(toy: BNext) -> None:
    """Equality is bit for bit where no sums are computed; see above for the bound of a whole network."""
    results = call(_shared_training, toy)
    for alone, *parts in zip(_each_gradients(Share()), *(result[0] for result in results), strict=True):
        assert len(alone) == 7
        for number, (expected, first, second) in enumerate(zip(alone, *parts, strict=True)):
            if expected.ndim == 4 or expected.shape[0] == 7:  # of images
                found = torch.cat([first, second])
            elif number < 5:  # of parameters, which are added up behind it
                found = first + second
            else:
                found = first
                assert torch.equal(first, second)
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)
    for frozen in (False, True):
        first, second = (result[1][frozen] for result in results)
        for name, value in _trained_quantized(toy, Share(), frozen).items():
            assert torch.equal(first[name], second[name]), name
            torch.testing.assert_close(first[name], value, rtol=5e-3, atol=5e-3, msg=name)
    for expected, first, second in zip(_moved_ranges(Share()), results[0][2], results[1][2], strict=True):
        found = torch.cat([first, second]) if expected.ndim == 4 else first
        assert torch.equal(found, expected)
        assert expected.ndim == 4 or torch.equal(first, second)


# Observers


def _batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(count, 3, 5, 5, generator=generator) * 2**i for i, count in enumerate((8, 7, 1, 6))]


def _observed(share: Share) -> dict[str, list[Tensor]]:
    found = {}
    for observer in OBSERVERS:
        for signed in (True, False):
            seen = observed_grid(8, signed, observer, averaging=0.3, percentile=97.0).activation_post_process
            for batch in _batches():
                part = batch[share.of(len(batch))]
                seen(part if signed else part.relu())
            found[f"{observer} {signed}"] = [value.clone() for value in seen.state_dict().values()]
            found[f"{observer} {signed}"] += list(seen.calculate_qparams())
    return found


def _shared_observers() -> dict[str, list[Tensor]]:
    return _observed(world().share)


def test_observers_see_bit_for_bit_what_one_process_would() -> None:
    """With a batch of one image, one process has no image."""
    alone = _observed(Share())
    for found in call(_shared_observers):
        assert found.keys() == alone.keys()
        for name, expected in alone.items():
            for mine, value in zip(found[name], expected, strict=True):
                assert torch.equal(mine, value), name


# Endings


def test_other_commands_are_not_run_several_times(tmp_path: object) -> None:
    first, second = together(["export", "--onnx", "--runs", str(tmp_path)])
    assert (first.code, second.code) == (2, 2)
    assert (
        "`qat export` runs in one process, 2 were launched; several share the work of evaluate"
        in first.errors
    )
    assert second.errors == ""


def test_an_error_of_all_is_told_once() -> None:
    ended = together(["pretrain", "--set", "data.batch_size=63"])
    assert [one.code for one in ended] == [2, 2]
    (said,) = [one.errors for one in ended if one.errors]
    assert "data.batch_size: found 63, allowed with 2 processes, which share it: a multiple of 2" in said
