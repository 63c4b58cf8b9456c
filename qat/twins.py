"""Fake-quantized twins of a network's modules.

Each twin takes over the parameters of the module it replaces under the same names. What it computes, with
``Q`` for a quantization point on a grid of its own and ``[·]`` for a value put on a grid already chosen:

- stem: ``Q_trunk(BN(conv(Q_image(x), Q_weight(w))))``
- sub-block with input ``x`` on the trunk's grid::

    q = Q_y(BN1(conv(sign(x + bias), ±1)))        sign(0) = +1
    y = [PReLU2(q)]_y                             slopes on an 8-bit grid of a power of two
    p = [pool(x)]_x    r = [pool([PReLU1(x)]_x)]_x
    m = Q_pooled(scale · mean(x) + (1 − scale) · mean(y))
    h = Q_hidden(relu(W1 · m + b1))    z = Q_logits(W3 · h + b3)    a = Q_attention(σ(z))
    g = Q_gain(a · A2)                            BN2(v) = A2 · v + B2
    t = Q_branch(g ⊙ y)  or  Q_branch(Q_product(g ⊙ y) ⊙ r)
    out = Q_trunk([t + [B2]_branch]_branch + (p or r))

- head: ``fc(Q_input(mean([PReLU(x)]_x)))``

BN1's result is quantized before PReLU2 rather than after, and the attention's logits are quantized too:
then PReLU and sigmoid are functions of one 8-bit integer, which every runtime computes exactly.

While training, values are rounded in float32 with straight-through gradients. In evaluation mode, once every
grid a module needs is calibrated, it computes the integers themselves (:mod:`qat.integers`), with the
constants that lowering exports: ``integers()`` of each twin.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qat.binary import sign
from qat.dyadic import ACCUMULATOR_UNIT, PRODUCT_BITS, Dyadic, SumMultipliers, dyadic, sum_multipliers
from qat.fakequant import (
    ActivationQuantizer,
    FixedQuantizer,
    Quantizer,
    WeightQuantizer,
    fake_quantize_symmetric,
)
from qat.integers import (
    Requantization,
    mean_steps,
    prelu_steps,
    requantization,
    saturate,
    sigmoid_table,
    snap_up,
)
from qat.layers import GlobalAveragePool, SqueezeExcitation, Stem, SubBlock, pad_to_even, pool2x2
from qat.recipe import Group, TrunkGroup

#: Bits of PReLU slopes and of folded batch-norm offsets and gains in a quantized trunk.
CONSTANT_BITS: Final = 8


@dataclass(frozen=True, eq=False)
class Grid:
    """Reference to the quantizer that another module owns, so that it is not registered twice."""

    quantizer: Quantizer


def activation_point(group: Group | TrunkGroup | None, *, signed: bool) -> Quantizer:
    """Activation quantizer as ``group`` asks for, or a float point."""
    if group is None:
        return Quantizer()
    return ActivationQuantizer(group.activation_bits, signed, group.observer, group.averaging_constant)


def fold_batch_norm(norm: nn.BatchNorm2d, x: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
    """The affine form of a batch normalization: ``norm(x) = gain · x + offset``.

    In training mode with batch statistics (through which gradients flow; the running ones are updated),
    else with the running ones; ``x`` is only evaluated when it is needed.

    Returns:
        gain and offset, (1, C, 1, 1) each.
    """
    running_mean, running_var = cast(Tensor, norm.running_mean), cast(Tensor, norm.running_var)
    if norm.training:
        values = x()
        variance, mean = torch.var_mean(values, (0, 2, 3), correction=0)
        with torch.no_grad():
            count = values.numel() / values.shape[1]
            momentum = norm.momentum or 0.0
            unbiased = variance * (count / max(count - 1, 1))
            running_mean.lerp_(mean.to(running_mean.dtype), momentum)
            running_var.lerp_(unbiased.to(running_var.dtype), momentum)
            cast(Tensor, norm.num_batches_tracked).add_(1)
    else:
        mean, variance = running_mean, running_var
    gain = norm.weight * torch.rsqrt(variance + norm.eps)
    offset = norm.bias - mean * gain
    return gain.view(1, -1, 1, 1), offset.view(1, -1, 1, 1)


def folded_constants(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Gain and offset (C,) of a batch normalization with its running statistics, float64."""
    mean, variance = cast(Tensor, norm.running_mean).double(), cast(Tensor, norm.running_var).double()
    gain = norm.weight.detach().double() / torch.sqrt(variance + norm.eps)
    return gain, norm.bias.detach().double() - mean * gain


def slope_scale(slope: Tensor) -> Tensor:
    """Smallest power of two (at least 2^-14) whose signed 8-bit grid holds every slope: scalar tensor.

    A power of two makes slope times integer exact in float32, in any order of operations.
    """
    largest = slope.detach().float().abs().amax().clamp_min(torch.finfo(torch.float32).tiny)
    return torch.exp2(torch.ceil(torch.log2(largest / 127.0))).clamp_min(2.0**-14)


def quantized_slope(slope: Tensor) -> Tensor:
    """Slopes (C,) on their grid; straight-through gradient."""
    return fake_quantize_symmetric(slope, slope_scale(slope), CONSTANT_BITS)


def gain_scale(gain: Tensor, y: Tensor, product: Tensor) -> Tensor:
    """Scale of the attention times BN2's gain, per tensor: scalar tensor.

    The largest magnitude it can take (attention 1) over 127, raised a little so that the multiplier from
    ``gain · y`` to the product's grid has few bits.

    Args:
        gain: BN2's gain, any shape.
        y: scale of ``y``.
        product: scale of the grid on which ``gain · y`` is put.
    """
    smallest = gain.detach().float().abs().amax().clamp_min(1e-20) / 127.0
    return snap_up(smallest * y / product) * product / y


def product_scale(product: Tensor, residual: Tensor, branch: Tensor) -> Tensor:
    """Scale of ``gain · y`` in a sub-block of the scale kind: scalar tensor.

    The observed one, raised a little so that the multiplier from product times residual to the branch's grid
    has few bits.
    """
    return snap_up(product * residual / branch) * branch / residual


def _ready(module: nn.Module, *points: Quantizer) -> bool:
    """Whether ``module`` can compute integers: evaluating, and every grid is known."""
    return not module.training and all(point.has_grid for point in points)


def _flipped(weight: Tensor, gain: Tensor) -> Tensor:
    """Weights whose output channels of negative gain change sign, so that multipliers are positive."""
    flip = torch.where(gain < 0, -1.0, 1.0).to(weight.dtype)
    return weight * flip.view(-1, *[1] * (weight.ndim - 1))


@dataclass(frozen=True, eq=False)
class LayerIntegers:
    """Integer weights (O, ...) in float32, and the requantization of their accumulator."""

    weight: Tensor
    requantization: Requantization


class FakeQuantStem(Stem):
    """Twin of :class:`qat.layers.Stem` with a quantized image and quantized weights.

    Args:
        stem: its parameters are taken over.
        bits: of the weights.
        grid: scale and zero point of the uint8 image.
    """

    def __init__(self, stem: Stem, bits: int, grid: tuple[float, int]) -> None:
        nn.Module.__init__(self)
        self.conv1, self.bn1, self.prelu, self.trunk = stem.conv1, stem.bn1, stem.prelu, stem.trunk
        self.image = FixedQuantizer(*grid)
        self.weight_quantizer = WeightQuantizer(bits)

    def integers(self) -> LayerIntegers:
        """Constants of the integer stem."""
        weight, scale = self.weight_quantizer.integers(self.conv1.weight)
        gain, offset = folded_constants(self.bn1)
        unit, step = self.image.scale.double(), cast(ActivationQuantizer, self.trunk).scale.double()
        rule = requantization(gain.abs() * scale * unit / step, offset / step, weight[0].numel() * 127 * 255)
        weight = _flipped(weight, gain) * ~rule.constant.view(-1, 1, 1, 1)
        return LayerIntegers(weight, rule)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, H, W) → (N, C, ⌈H/stride⌉, ⌈W/stride⌉)."""
        stride, padding = self.conv1.stride, self.conv1.padding
        if _ready(self, cast(Quantizer, self.trunk)):
            layer, trunk = self.integers(), cast(ActivationQuantizer, self.trunk)
            out = F.conv2d(self.image.steps(x), layer.weight, stride=stride, padding=padding)
            return trunk.values(layer.requantization(out)).to(x.dtype)
        weight = self.weight_quantizer(self.conv1.weight)
        out = F.conv2d(self.image(x), weight, stride=stride, padding=padding)
        result: Tensor = self.trunk(self.bn1(out))
        return result


@dataclass(frozen=True, eq=False)
class AttentionIntegers:
    """Both layers of the channel attention, and the sigmoid's table (256,)."""

    reduce: LayerIntegers
    expand: LayerIntegers
    table: Tensor


class FakeQuantSqueezeExcitation(SqueezeExcitation):
    """Twin of :class:`qat.layers.SqueezeExcitation`: 8-bit vectors and weights throughout."""

    def __init__(self, module: SqueezeExcitation, group: Group) -> None:
        nn.Module.__init__(self)
        self.se = module.se
        self.pooled = activation_point(group, signed=True)
        self.hidden = activation_point(group, signed=False)
        self.logits = activation_point(group, signed=True)
        self.attention = FixedQuantizer(1.0 / (2**group.activation_bits - 1), 0, group.activation_bits)
        self.weight_quantizer = WeightQuantizer(group.weight_bits)

    @property
    def has_grids(self) -> bool:
        """Whether every vector's grid is known."""
        return all(point.has_grid for point in (self.pooled, self.hidden, self.logits))

    def integers(self) -> AttentionIntegers:
        """Constants of the integer attention."""
        pooled, hidden, logits = (
            cast(ActivationQuantizer, point) for point in (self.pooled, self.hidden, self.logits)
        )
        return AttentionIntegers(
            self._layer(cast(nn.Conv2d, self.se[1]), pooled, hidden),
            self._layer(cast(nn.Conv2d, self.se[3]), hidden, logits),
            sigmoid_table(float(logits.scale), self.attention.quant_max).to(logits.scale.device),
        )

    def _layer(
        self, layer: nn.Conv2d, source: ActivationQuantizer, target: ActivationQuantizer
    ) -> LayerIntegers:
        weight, scale = self.weight_quantizer.integers(layer.weight)
        step = target.scale.double()
        reach = weight[0].numel() * 127 * max(-source.quant_min, source.quant_max)
        bias = cast(Tensor, layer.bias).detach().double()
        rule = requantization(scale * source.scale.double() / step, bias / step, reach)
        return LayerIntegers(weight * ~rule.constant.view(-1, 1, 1, 1), rule)

    def attention_steps(self, pooled: Tensor) -> Tensor:
        """Pooled vector (N, C, 1, 1), in steps before rounding → attention in steps, by integers alone."""
        constants = self.integers()
        q = cast(ActivationQuantizer, self.pooled).saturate(pooled)
        for layer, point in ((constants.reduce, self.hidden), (constants.expand, self.logits)):
            # float64: a sum of thousands of products can pass 2**24.
            accumulator = F.conv2d(q.double(), layer.weight.double())
            q = cast(ActivationQuantizer, point).saturate(layer.requantization(accumulator))
        # Whatever is not finite stays so, for the caller to see; an index can't.
        return constants.table[(q + 128).nan_to_num(0.0, 0.0, 0.0).long()] + 0.0 * q.float()

    def forward(self, pooled: Tensor) -> Tensor:
        """(N, C, 1, 1) → attention (N, C, 1, 1) in [0, 1]."""
        reduce, expand = cast(nn.Conv2d, self.se[1]), cast(nn.Conv2d, self.se[3])
        hidden = F.conv2d(self.pooled(pooled), self.weight_quantizer(reduce.weight), reduce.bias)
        hidden = self.hidden(F.relu(hidden))
        logits = self.logits(F.conv2d(hidden, self.weight_quantizer(expand.weight), expand.bias))
        attention: Tensor = self.attention(torch.sigmoid(logits))
        return attention


@dataclass(frozen=True, eq=False)
class BranchIntegers:
    """From ``y`` to BN2's result.

    Attributes:
        gain: (C,) float32; attention steps to gain steps, or the gain itself where there is no attention.
        input_mean, y_mean: (C,) float32 multipliers of the two means (attention only).
        first, second: multipliers of gain times ``y``, and of product times residual (scale kind).
        product_step: scale of the product (scale kind).
        offset: (C,) float32 integers, BN2's offset.
    """

    gain: Tensor
    input_mean: Tensor | None
    y_mean: Tensor | None
    first: Dyadic
    second: Dyadic | None
    product_step: float | None
    offset: Tensor


@dataclass(frozen=True, eq=False)
class SubBlockIntegers:
    """Constants of an integer sub-block; ``conv.weight`` is ±1, its accumulator counts in 1/64."""

    conv: LayerIntegers
    slopes: Tensor
    residual_slopes: Tensor | None
    branch: BranchIntegers | None
    sum: SumMultipliers


class FakeQuantSubBlock(SubBlock):
    """Twin of :class:`qat.layers.SubBlock` whose values all lie on 8-bit grids.

    Args:
        module: the sub-block whose parameters are taken over.
        group: quantization of the values inside, ``None`` leaves them in float.
        source, target: the trunk's quantizers before and after the sub-block.
    """

    def __init__(
        self, module: SubBlock, group: TrunkGroup | None, source: Quantizer, target: Quantizer
    ) -> None:
        nn.Module.__init__(self)
        self.channels, self.kernel_size, self.stride = module.channels, module.kernel_size, module.stride
        self.kind, self.infor_recoupling = module.kind, module.infor_recoupling
        for name, child in module.named_children():
            self.add_module(name, child)
        for name, parameter in module.named_parameters(recurse=False):
            self.register_parameter(name, parameter)
        self.binary_activation.zero_is_positive = True
        self.source, self.target = Grid(source), Grid(target)
        self.quantized = group is not None
        scale_kind = module.kind == "scale"
        self.has_branch = module.infor_recoupling or scale_kind
        self.y = activation_point(group, signed=True)
        self.product = activation_point(group if scale_kind else None, signed=True)
        self.branch = activation_point(group if self.has_branch else None, signed=True)

    def slope(self, activation: nn.PReLU) -> Tensor:
        """Slopes of one PReLU as the integer network has them, (C,)."""
        return quantized_slope(activation.weight) if self.quantized else activation.weight

    def product_step(self) -> Tensor:
        """Scale of the product in a sub-block of the scale kind."""
        if not self.source.quantizer.enabled:  # a trunk left in float has no steps to multiply with
            return _scale(self.product)
        return product_scale(_scale(self.product), _scale(self.source.quantizer), _scale(self.branch))

    def gain_step(self, gain: Tensor) -> Tensor:
        """Scale of the attention times BN2's ``gain``."""
        step = self.product_step() if self.kind == "scale" else _scale(self.branch)
        return gain_scale(gain, _scale(self.y), step)

    def _computes_integers(self) -> bool:
        points = [self.y, self.source.quantizer, self.target.quantizer]
        points += [self.branch] if self.has_branch else []
        points += [self.product] if self.kind == "scale" else []
        if not _ready(self, *points) or not self.binary_conv.is_binary():
            return False
        return not self.infor_recoupling or (
            isinstance(self.se, FakeQuantSqueezeExcitation) and self.se.has_grids
        )

    def integers(self) -> SubBlockIntegers:
        """Constants of the integer sub-block."""
        source, target, y = _scale(self.source.quantizer), _scale(self.target.quantizer), _scale(self.y)
        gain, offset = folded_constants(self.norm1)
        weight = sign(self.binary_conv.weight.detach().float())
        conv = requantization(
            gain.abs() / ACCUMULATOR_UNIT / y.double(),
            offset / y.double(),
            ACCUMULATOR_UNIT * weight[0].numel(),
        )
        branch = self._branch_integers() if self.has_branch else None
        term = y if branch is None else _scale(self.branch)
        return SubBlockIntegers(
            conv=LayerIntegers(_flipped(weight, gain), conv),
            slopes=self.slope(self.activation2).detach().float(),
            residual_slopes=self.slope(self.activation1).detach().float() if self.kind == "scale" else None,
            branch=branch,
            sum=sum_multipliers(float(term) / float(target), float(source) / float(target)),
        )

    def _branch_integers(self) -> BranchIntegers:
        gain, offset = folded_constants(self.norm2)
        source, y, branch = _scale(self.source.quantizer), _scale(self.y), _scale(self.branch)
        step = self.gain_step(gain).double()
        product = float(self.product_step()) if self.kind == "scale" else None
        second = None if product is None else dyadic(product * float(source) / float(branch), PRODUCT_BITS)
        input_mean = y_mean = None
        if self.infor_recoupling:
            se = cast(FakeQuantSqueezeExcitation, self.se)
            pooled = _scale(se.pooled).double()
            mix = self.scale.detach().double().reshape(-1).clamp(0.0, 1.0)
            input_mean = (mix * source.double() / pooled).float()
            y_mean = ((1.0 - mix) * y.double() / pooled).float()
            factor = (gain / step * se.attention.scale.double()).float()
        else:
            factor = saturate(gain / step, -128, 127).float()
        return BranchIntegers(
            gain=factor,
            input_mean=input_mean,
            y_mean=y_mean,
            first=dyadic(float(y) * float(step) / (product or float(branch)), PRODUCT_BITS),
            second=second,
            product_step=product,
            offset=cast(ActivationQuantizer, self.branch).saturate(offset / branch.double()).float(),
        )

    def _forward_integers(self, x: Tensor) -> Tensor:
        constants = self.integers()
        source, target, y_point = (
            cast(ActivationQuantizer, point)
            for point in (self.source.quantizer, self.target.quantizer, self.y)
        )
        q = source.steps(x)
        signs = sign(q * source.scale + self.move.bias.float())
        accumulator = F.conv2d(
            signs, constants.conv.weight, stride=self.stride, padding=self.binary_conv.padding
        )
        y = y_point.saturate(constants.conv.requantization(accumulator * ACCUMULATOR_UNIT))
        y = prelu_steps(y, constants.slopes, y_point.quant_min, y_point.quant_max)
        residual = q
        if constants.residual_slopes is not None:
            residual = prelu_steps(q, constants.residual_slopes, source.quant_min, source.quant_max)
        if self.stride == 2:
            residual = source.saturate(pool2x2(residual))
        branch = y
        if constants.branch is not None:
            even = pad_to_even(q) if self.stride == 2 else q
            branch = self._branch_steps(constants.branch, even, y, residual)
        total = branch * constants.sum.branch.value + residual * constants.sum.residual.value
        return target.values(total).to(x.dtype)

    def _branch_steps(self, constants: BranchIntegers, x: Tensor, y: Tensor, residual: Tensor) -> Tensor:
        gain = constants.gain.view(1, -1, 1, 1)
        if constants.input_mean is not None and constants.y_mean is not None:
            pooled = mean_steps(x, constants.input_mean) + mean_steps(y, constants.y_mean)
            attention = cast(FakeQuantSqueezeExcitation, self.se).attention_steps(pooled)
            gain = saturate(attention * gain, -128, 127)
        point = cast(ActivationQuantizer, self.branch)
        branch = y * gain * constants.first.value
        if constants.second is not None:
            branch = (
                cast(ActivationQuantizer, self.product).saturate(branch) * residual * constants.second.value
            )
        return point.saturate(point.saturate(branch) + constants.offset.view(1, -1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) → (N, C, ⌈H/stride⌉, ⌈W/stride⌉); the trunk's quantizer follows."""
        if self._computes_integers():
            return self._forward_integers(x)
        on_trunk = self.source.quantizer.requantize
        accumulated = self.binary_conv(self.binary_activation(self.move(x)))
        gain1, offset1 = fold_batch_norm(self.norm1, lambda: accumulated)
        y = self.y(torch.addcmul(offset1, accumulated, gain1))
        y = self.y.requantize(F.prelu(y, self.slope(self.activation2)))

        residual = on_trunk(F.prelu(x, self.slope(self.activation1))) if self.kind == "scale" else x
        if self.stride == 2:
            residual = on_trunk(pool2x2(residual))
        if not self.has_branch:
            return y + residual

        attention = (
            self.se(self.mix_means(x, y)) if self.infor_recoupling else torch.ones_like(self.move.bias)
        )
        gain2, offset2 = fold_batch_norm(
            self.norm2, lambda: attention * y * residual if self.kind == "scale" else attention * y
        )
        gain = attention * gain2
        if self.quantized:
            gain = fake_quantize_symmetric(gain, self.gain_step(gain2), CONSTANT_BITS)
        branch = gain * y
        if self.kind == "scale":
            branch = self.product(branch) * residual
        # The same grid holds the branch before and after BN2's offset, and the offset: it must span all.
        observed = torch.maximum(torch.maximum(branch.abs(), (branch + offset2).abs()), offset2.abs())
        branch = self.branch(branch, observed.detach())
        branch = self.branch.requantize(branch + self.branch.requantize(offset2))
        return branch + residual


class FakeQuantPReLU(nn.PReLU):
    """Twin of the head's PReLU: 8-bit slopes, result on the grid of its input."""

    def __init__(self, module: nn.PReLU, source: Quantizer) -> None:
        nn.Module.__init__(self)
        self.num_parameters, self.weight = module.num_parameters, module.weight
        self.source = Grid(source)

    def forward(self, input: Tensor) -> Tensor:
        """(N, C, H, W) → same shape."""
        source, slopes = self.source.quantizer, quantized_slope(self.weight)
        if _ready(self, source):
            point = cast(ActivationQuantizer, source)
            q = prelu_steps(point.steps(input), slopes.detach().float(), point.quant_min, point.quant_max)
            return point.values(q).to(input.dtype)
        return source.requantize(F.prelu(input, slopes))


class FakeQuantPool(GlobalAveragePool):
    """Twin of the head's pooling: from the trunk's grid straight to the classifier's."""

    def __init__(self, source: Quantizer, target: Quantizer) -> None:
        super().__init__()
        self.source, self.target = Grid(source), Grid(target)

    def multiplier(self) -> Tensor:
        """Trunk steps to steps of the classifier's input: (1,) float32."""
        return (_scale(self.source.quantizer).double() / _scale(self.target.quantizer).double()).float()

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) → (N, C)."""
        if not _ready(self, self.source.quantizer, self.target.quantizer):
            return super().forward(x)
        source, target = (cast(ActivationQuantizer, grid.quantizer) for grid in (self.source, self.target))
        return target.values(mean_steps(source.steps(x), self.multiplier())).flatten(1).to(x.dtype)


class FakeQuantLinear(nn.Linear):
    """Twin of the classifier: quantized input and weights, float logits."""

    def __init__(self, module: nn.Linear, group: Group) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = module.in_features, module.out_features
        self.weight, self.bias = module.weight, module.bias
        self.input = activation_point(group, signed=True)
        self.weight_quantizer = WeightQuantizer(group.weight_bits)

    def integers(self) -> LayerIntegers:
        """Constants of the integer classifier; its multiplier gives logits."""
        weight, scale = self.weight_quantizer.integers(self.weight)
        offset, step = self.bias.detach().double(), scale * _scale(self.input).double()
        # A row of zeros has a tiny scale: raised until the bias fits int32, the products are zero anyway.
        raised = torch.maximum(step, offset.abs() / 2.0**30)
        constant = raised > step
        multiplier = raised.float()
        rule = Requantization(multiplier, torch.round(offset / multiplier.double()), constant)
        return LayerIntegers(weight * ~constant.view(-1, 1), rule)

    def forward(self, input: Tensor) -> Tensor:
        """(N, C) → logits (N, num_classes)."""
        if _ready(self, self.input):
            layer = self.integers()
            q = cast(ActivationQuantizer, self.input).steps(input)
            return layer.requantization(F.linear(q.double(), layer.weight.double())).to(input.dtype)
        return F.linear(self.input(input), self.weight_quantizer(self.weight), self.bias)


def _scale(point: Quantizer) -> Tensor:
    """Step of a quantized point's grid, (1,) float32."""
    return cast(ActivationQuantizer, point).scale
