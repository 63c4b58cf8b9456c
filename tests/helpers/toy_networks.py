"""Toy networks whose every part has something to do, built in milliseconds."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qat.models.bnext import BNext, set_temperature
from qat.nn.layers import BinaryConv2d, SqueezeExcitation
from qat.nn.sub_block import SubBlock
from qat.quantize.calibration import calibrate
from qat.recipe.schema import Quantization, TrunkGroup

#: Stem, a block that stays, one that doubles (stride 2), one that stays, one that doubles.
TOY_WIDTHS = (8, 8, 16, 16, 32)
#: The architecture whole, and without either or both of its parts.
ABLATIONS = [
    {"elm_attention": elm, "infor_recoupling": recoupling}
    for elm in (True, False)
    for recoupling in (True, False)
]


def toy_images(count: int = 16, seed: int = 1) -> Tensor:
    """Normalized images (count, 3, 16, 16)."""
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


def enliven(model: nn.Module, seed: int = 0) -> None:
    """Give a float network non-trivial parameters and the batch statistics of some images, in place."""
    random = torch.Generator().manual_seed(seed)

    def uniform_(tensor: Tensor, low: float, high: float) -> None:
        tensor.copy_(torch.rand(tensor.shape, generator=random) * (high - low) + low)

    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                uniform_(module.weight, 0.5, 1.5)
                uniform_(module.bias, -0.3, 0.3)
            elif isinstance(module, nn.PReLU):
                uniform_(module.weight, 0.1, 0.4)
            elif isinstance(module, BinaryConv2d | nn.Conv2d | nn.Linear):
                bound = module.weight[0].numel() ** -0.5
                uniform_(module.weight, -bound, bound)
            if isinstance(module, SubBlock):
                uniform_(module.move.bias, -0.5, 0.5)
                if module.infor_recoupling:
                    uniform_(module.scale, 0.1, 0.9)
            if isinstance(module, SqueezeExcitation):
                # A toy's hidden layer is one or two units wide: positive biases keep them from dying.
                uniform_(module.se[1].bias, 0.3, 0.9)
                uniform_(module.se[3].bias, -0.5, 0.5)
        for norm in norms:
            norm.momentum = 1.0
        training = model.training
        model.train()
        model(toy_images(64, seed=seed + 100))
        model.train(training)
        for norm in norms:
            norm.momentum = 0.1


def build_float_toy(temperature: float = 1e-8, seed: int = 0, **options: object) -> BNext:
    """A lively float network with 10 classes, in evaluation mode."""
    torch.manual_seed(seed)
    options.setdefault("widths", TOY_WIDTHS)
    model = BNext(10, **options)  # type: ignore[arg-type]
    set_temperature(model, temperature)
    enliven(model, seed)
    return model.eval()


def build_toy(quant: object = True, seed: int = 0, **options: object) -> BNext:
    """The quantized, calibrated network with the parameters of :func:`build_float_toy`, evaluating."""
    torch.manual_seed(seed)
    state = build_float_toy(seed=seed, **options).state_dict()
    options.setdefault("widths", TOY_WIDTHS)
    if quant is True:  # with ranges that go on moving in training
        quant = Quantization(trunk=TrunkGroup(observer="moving_average"))
    model = BNext(10, quant=quant, **options)  # type: ignore[arg-type]
    model.load_state_dict(state)
    calibrate(model, lambda: model(toy_images(64, seed=2)))
    return model.eval()
