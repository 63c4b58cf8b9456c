"""The part of a record on training steps: losses, gradients, weights and answers."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from importlib.util import find_spec
from itertools import product
from typing import Any, Final, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.behaviour.project import (
    WIDTHS,
    BNext,
    Quantization,
    autocast,
    binary_convolutions,
    calibrate,
    set_temperature,
    torch_alone,
)
from benchmarks.behaviour.values import Values, tensors_digest

Precision = Literal["float32", "bfloat16"]
PRECISIONS: Final[tuple[Precision, ...]] = ("float32", "bfloat16")
#: Widths of the toy network: after the stem, then after each block. Two blocks keep the width, two double it.
TOY_WIDTHS: Final = (8, 8, 16, 16, 32)
#: Quantization sections that are tried in every combination with the other settings.
QUANTIZATIONS: Final[Mapping[str, Mapping[str, Any] | None]] = {
    "float": None,
    "fake-quantized": {"trunk": {"observer": "moving_average"}},
    "learned scales": {"backend": "brevitas"},
}
#: Quantization sections that are tried at one temperature, with channel attention.
MORE_QUANTIZATIONS: Final[Mapping[str, Mapping[str, Any]]] = {
    "histogram and minmax": {"trunk": {"observer": "histogram"}, "se": {"observer": "minmax"}},
    "percentile, clipped": {"trunk": {"percentile": 99.0, "clip": 4.0}},
    "4 bits": {
        "stem": {"weight_bits": 4},
        "se": {"weight_bits": 4, "activation_bits": 4},
        "classifier": {"weight_bits": 4, "activation_bits": 4},
        "trunk": {"activation_bits": 4},
    },
    "powers of two": {"power_of_two": True},
    "learned powers of two": {"backend": "brevitas", "power_of_two": True},
    "float trunk": {"trunk": {"enabled": False}},
}
#: Temperature of the weights, and whether they are frozen; only binary weights can be frozen.
WEIGHTS: Final = ((0.3, False), (1e-8, False), (1e-8, True))


def toy() -> Values:
    """Every combination of settings on a toy network, and special cases."""
    torch.set_num_threads(1)
    found: Values = {}
    images = noise(12, 16)
    for kind, (temperature, frozen), attention, precision in product(
        _installed(QUANTIZATIONS), WEIGHTS, (True, False), PRECISIONS
    ):
        name = (
            f"{_name(kind, temperature, frozen, precision)}, {'with' if attention else 'without'} attention"
        )
        model = {"quantization": QUANTIZATIONS[kind], "infor_recoupling": attention}
        found[name] = _both(3, images, temperature, frozen, precision, model)
    for kind in _installed(MORE_QUANTIZATIONS):
        found[kind] = _both(3, images, model={"quantization": MORE_QUANTIZATIONS[kind]})
    for kind in ("float", "fake-quantized"):
        model = {"quantization": QUANTIZATIONS[kind]}
        found[f"{kind}, bias kind alone"] = _both(3, images, model=model | {"elm_attention": False})
        found[f"{kind}, odd sides"] = _both(2, noise(5, 13), model=model)
        last = images.contiguous(memory_format=torch.channels_last)
        found[f"{kind}, channels last"] = _both(2, last, model=model)
    return found


def tiny() -> Values:
    """BNext-Tiny on a few images."""
    found: Values = {}
    for kind, (temperature, frozen) in product(_installed(QUANTIZATIONS), WEIGHTS):
        model = {"widths": WIDTHS["tiny"], "quantization": QUANTIZATIONS[kind]}
        for precision in PRECISIONS if frozen or kind == "float" else PRECISIONS[:1]:
            name = _name(kind, temperature, frozen, precision)
            found[name] = _both(2, noise(4, 32), temperature, frozen, precision, model)
    return found


def _installed(kinds: Mapping[str, object]) -> Iterator[str]:
    return (kind for kind in kinds if not kind.startswith("learned") or find_spec("brevitas") is not None)


def _name(kind: str, temperature: float, frozen: bool, precision: str) -> str:
    return f"{kind}, {precision}, temperature {temperature:g}{', frozen' if frozen else ''}"


def noise(count: int, side: int) -> Tensor:
    """Normalized images (count, 3, side, side)."""
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(1))


def _both(
    count: int,
    images: Tensor,
    temperature: float = 1e-8,
    frozen: bool = False,
    precision: Precision = "float32",
    model: Mapping[str, Any] | None = None,
) -> Values:
    """One case, computed by the native library's passes (if it was built) and by torch alone."""
    found: Values = {}
    for name, passes in (("native", nullcontext), ("torch", torch_alone)):
        with passes():
            made = network(images, temperature, **{"widths": TOY_WIDTHS, **(model or {})})
            found[name] = train(made, images, count, frozen, precision)
    return found


def network(
    images: Tensor, temperature: float, quantization: Mapping[str, Any] | None, **options: Any
) -> BNext:
    """A network with the batch statistics of ``images``; if quantized, it is calibrated on them."""
    model = BNext(10, **options)
    fill(model)
    set_temperature(model, temperature)
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():
        model.train()(images)
    for norm in norms:
        norm.momentum = 0.1
    if quantization is None:
        return model
    state = model.state_dict()
    model = BNext(10, quant=Quantization.model_validate(quantization), **options)
    model.load_state_dict(state)
    calibrate(model, lambda: model(images))
    return model


def fill(model: nn.Module) -> None:
    """Set each parameter to values that depend only on its name and shape, in place."""
    ranges = {"scale": (0.1, 0.9), "move.bias": (-0.5, 0.5), "se.1.bias": (0.3, 0.9)}
    ranges |= {f"{norm}.weight": (0.5, 1.5) for norm in ("bn1", "norm1", "norm2")}
    ranges |= {f"{prelu}.weight": (0.1, 0.4) for prelu in ("prelu", "activation1", "activation2")}
    with torch.no_grad():
        for name, value in model.named_parameters():
            words = name.split(".")
            endings = [".".join(words[-count:]) for count in (3, 2, 1)]
            bound = value[0].numel() ** -0.5 if value.ndim > 1 else 0.3
            low, high = next((ranges[end] for end in endings if end in ranges), (-bound, bound))
            generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            value.copy_(torch.rand(value.shape, generator=generator) * (high - low) + low)


def train(model: BNext, images: Tensor, count: int, frozen: bool, precision: Precision) -> Values:
    """Losses and gradients of ``count`` training steps, then the weights and the network's answers."""
    if frozen:
        for convolution in binary_convolutions(model).values():
            convolution.weight.requires_grad_(False)
    labels = torch.arange(len(images)) % 10
    optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=1e-3)
    steps = []
    for _ in range(count):
        model.train()
        with autocast(precision, images.device):
            loss = F.cross_entropy(model(images).float(), labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it without types
        gradients = {name: one.grad for name, one in model.named_parameters() if one.grad is not None}
        steps.append(
            {
                "loss": repr(loss.item()),
                "gradients": tensors_digest(gradients.items()),
                "norms": {name: repr(one.double().norm().item()) for name, one in gradients.items()},
            }
        )
        optimizer.step()
    with torch.no_grad():
        logits = model.eval()(images)
    weights = tensors_digest(model.state_dict().items())
    return {"steps": steps, "weights": weights, "logits": tensors_digest([("logits", logits)])}
