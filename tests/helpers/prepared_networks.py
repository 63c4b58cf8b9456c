"""Parts of fake-quantized networks, and the gradients of their parameters."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from qat.models.bnext import BNext
from qat.nn.sub_block import SubBlock
from qat.quantize.sub_block import FakeQuantSubBlock
from qat.recipe.schema import Group, StemGroup, TrunkGroup

OFF = {
    "stem": StemGroup(enabled=False),
    "se": Group(enabled=False),
    "classifier": Group(enabled=False),
    "trunk": TrunkGroup(enabled=False),
}


def gradients(model: nn.Module, images: Tensor) -> dict[str, Tensor | None]:
    """Gradient of each parameter after one training step's backward pass."""
    logits = model.train()(images)
    labels = torch.arange(len(images)) % logits.shape[1]
    nn.functional.cross_entropy(logits.float(), labels.to(logits.device)).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def sub_blocks(model: nn.Module) -> dict[str, SubBlock]:
    return {name: module for name, module in model.named_modules() if isinstance(module, SubBlock)}


def fake_quantized_sub_blocks(model: nn.Module) -> dict[str, FakeQuantSubBlock]:
    return {name: module for name, module in model.named_modules() if isinstance(module, FakeQuantSubBlock)}


def without_gradient(model: BNext) -> set[str]:
    """Names of parameters that the published network has but never uses."""
    unused = {"feature.0.prelu.weight"}
    for name, block in sub_blocks(model).items():
        if block.kind == "bias":
            unused.add(f"{name}.activation1.weight")
            if not block.infor_recoupling:
                unused |= {f"{name}.norm2.weight", f"{name}.norm2.bias"}
    return unused


def assert_every_used_parameter_learns(model: BNext, images: Tensor) -> None:
    found = gradients(model, images)
    assert {name for name, grad in found.items() if grad is None} == without_gradient(model)
    idle = [name for name, grad in found.items() if grad is not None and not grad.abs().max() > 0]
    assert idle == []
    assert all(grad.isfinite().all() for grad in found.values() if grad is not None)


PARTS: dict[str, Callable[[str], bool]] = {
    "stem": lambda name: name in ("feature.0.image", "feature.0.weight_quantizer"),
    "se": lambda name: ".se." in name,
    "classifier": lambda name: name.startswith("fc."),
}
PARTS["trunk"] = lambda name: not any(PARTS[part](name) for part in ("stem", "se", "classifier"))
