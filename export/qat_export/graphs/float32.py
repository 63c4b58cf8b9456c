"""The float32 target: an ONNX graph of the network without quantization, the baseline of the integer ones.

It has the operators that torch's own exporter writes, in forms that onnxruntime runs as fast or faster, so
that a comparison with it is fair:

- Batch normalizations are nodes of their own. onnxruntime folds them into convolutions when it loads the
  file, and in the file the weights of a binary convolution are ±1.
- The sign is the operator ``Sign``, 0 at 0, as in the float network. In a network that was prepared for
  quantization, the sign of 0 is +1; there it is a selection by ``x >= -bias``, which in IEEE arithmetic gives
  the sign of ``x + bias``.
- At an odd side, the mean of 2×2 pixels is that of the pixels inside the image. This is the same as repeating
  the edge.

Tensors of the trunk have the names that they have in the integer targets. Initializers have the names of the
state dict if their values are the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, cast

import numpy as np
import onnx
from torch import Tensor, nn

from qat import __version__
from qat.checkpoints.architecture import float_shapes
from qat.checkpoints.tensor_checks import not_finite
from qat.errors import QuantizationError
from qat.models.bnext import BNext
from qat.nn.block import Block
from qat.nn.layers import Stem
from qat.nn.sub_block import SubBlock
from qat_export.graphs.builder import FLOAT, OPSET, GraphBuilder, tensor_info
from qat_export.graphs.metadata import INPUT, OUTPUT, model_metadata
from qat_export.graphs.walk import EmittedBlock, emit_blocks, side_behind

FORMAT: Final = "bnext-qat float32 1"


def emit_float(
    model: BNext,
    *,
    image_size: int,
    mean: Sequence[float],
    std: Sequence[float],
    class_names: Sequence[str] = (),
    metadata: Mapping[str, str] | None = None,
) -> onnx.ModelProto:
    """The ONNX model of ``model`` in float32: normalized images (batch, 3, S, S) → logits (batch, classes).

    A prepared network is exported without its quantizers: as the float network with the same parameters and
    the same sign of 0. Binary weights are those in use at the network's temperature, which need not be ±1.

    Args:
        model: float-rest or prepared network, in either mode; it is not changed.
        image_size: side ``S`` of the images in pixels.
        mean, std: normalization of the network's inputs, per channel.
        class_names: names in the order of the logits; if empty, classes are named by number.
        metadata: texts by name that are copied into the model's metadata.

    Raises:
        QuantizationError: a tensor of the network has a value that is not finite, or a negative variance.
    """
    _refuse_values(model)
    emitter = _Emitter(model, image_size)
    classes = model.architecture.num_classes
    return emitter.builder.model(
        "bnext",
        [tensor_info(INPUT, FLOAT, ["batch", 3, image_size, image_size])],
        [tensor_info(OUTPUT, FLOAT, ["batch", classes])],
        opset=OPSET,
        metadata=model_metadata(
            FORMAT,
            architecture=str(model.architecture),
            class_names=tuple(class_names) or tuple(str(i) for i in range(classes)),
            mean=mean,
            std=std,
            image_size=image_size,
            facts=dict(metadata or {}) | {"input": "float32 NCHW"},
        ),
        description=f"{model.architecture}\nfloat32 throughout, signs and binary weights too",
        producer_version=__version__,
    )


def _refuse_values(model: BNext) -> None:
    """Refuse values that are not finite, and negative variances, in the tensors of the float network.

    Tensors of quantizers are not checked: the range of an observer is infinite until it has seen a batch.
    """
    state: dict[str, Tensor] = model.state_dict()
    for key in float_shapes(model.architecture):
        value = state[key].float()
        if problem := not_finite(key, value, in_float_network=True):
            raise QuantizationError(f"{key}: {problem}")
        if key.endswith("running_var") and bool((value < 0).any()):
            raise QuantizationError(f"{key}: a variance is negative")


@dataclass(frozen=True)
class _SubBlock:
    """A sub-block of the torch network, and its module name."""

    name: str
    module: SubBlock

    @property
    def stride(self) -> int:
        """Stride of its convolution."""
        return self.module.stride


def _blocks(model: BNext) -> Iterator[EmittedBlock[_SubBlock]]:
    for index, block in enumerate(cast(Sequence[Block], list(model.feature)[1:]), start=1):
        name = f"feature.{index}"
        spatial, *pointwise = (
            _SubBlock(f"{name}.{leaf}", cast(SubBlock, block.get_submodule(leaf)))
            for leaf in (block.spatial_name, *block.pointwise_names)
        )
        yield EmittedBlock(name, spatial, pointwise)


class _Emitter:
    """Appends the network to a graph, in forward order."""

    def __init__(self, model: BNext, size: int) -> None:
        self.builder = GraphBuilder()
        self._means: dict[str, str] = {}
        stem = cast(Stem, model.feature[0])
        products = self.convolution(INPUT, stem.conv1, "feature.0.conv1", "feature.0/products")
        x = self.batch_norm(products, stem.bn1, "feature.0.bn1", "feature.0/trunk")
        x, _ = emit_blocks(self, _blocks(model), x, side_behind(size, int(stem.conv1.stride[0])))
        x = self.prelu(x, model.prelu, "prelu", "head/prelu")
        flat = self.builder.node("Flatten", [self.mean(x)], "head/input")
        layer = [self.tensor(model.fc.weight, "fc.weight"), self.tensor(model.fc.bias, "fc.bias")]
        self.builder.node("Gemm", [flat, *layer], OUTPUT, transB=1)

    def tensor(self, values: Tensor, name: str) -> str:
        """Add an initializer with this name; returns the name."""
        return self.builder.constant(values.detach().float().cpu().numpy(), name)

    # Layers.

    def convolution(self, x: str, layer: nn.Conv2d, key: str, output: str) -> str:
        """A convolution with the layer's own weights, and its bias where it has one."""
        parameters = [self.tensor(layer.weight, f"{key}.weight")]
        if layer.bias is not None:
            parameters.append(self.tensor(layer.bias, f"{key}.bias"))
        return self.conv(x, parameters, output, layer.kernel_size[0], layer.stride[0], int(layer.padding[0]))

    def conv(self, x: str, parameters: list[str], output: str, kernel: int, stride: int, padding: int) -> str:
        """Append a convolution with a square kernel and the same padding on all sides."""
        return self.builder.node(
            "Conv",
            [x, *parameters],
            output,
            kernel_shape=[kernel] * 2,
            strides=[stride] * 2,
            pads=[padding] * 4,
        )

    def batch_norm(self, x: str, norm: nn.BatchNorm2d, key: str, output: str) -> str:
        """Append a batch normalization with its running statistics."""
        parameters = [
            self.tensor(cast(Tensor, getattr(norm, leaf)), f"{key}.{leaf}")
            for leaf in ("weight", "bias", "running_mean", "running_var")
        ]
        return self.builder.node("BatchNormalization", [x, *parameters], output, epsilon=norm.eps)

    def prelu(self, x: str, module: nn.PReLU, key: str, output: str) -> str:
        """Append a PReLU; its slopes are stored as (C, 1, 1), which broadcasts over the image."""
        slopes = self.tensor(module.weight.view(-1, 1, 1), f"{key}.weight")
        return self.builder.node("PRelu", [x, slopes], output)

    def sign(self, x: str, module: SubBlock, name: str) -> str:
        """Append the sign of ``x`` plus the channel's bias; this file's docstring says what sign 0 has."""
        if not module.binary_activation.zero_is_positive:
            moved = self.builder.node(
                "Add", [x, self.tensor(module.move.bias, f"{name}.move.bias")], f"{name}/moved"
            )
            return self.builder.node("Sign", [moved], f"{name}/sign")
        threshold = self.tensor(-module.move.bias, f"{name}.move.threshold")
        positive = self.builder.node("GreaterOrEqual", [x, threshold], f"{name}/positive")
        signs = [self.builder.constant(np.float32(value)) for value in (1, -1)]
        return self.builder.node("Where", [positive, *signs], f"{name}/sign")

    # Means.

    def mean(self, x: str) -> str:
        """The mean over the image, (N, C, 1, 1); sub-blocks with the same input share one node."""
        if x not in self._means:
            self._means[x] = self.builder.node("ReduceMean", [x], f"{x}.mean", axes=[2, 3], keepdims=1)
        return self._means[x]

    def pool(self, x: str, side: int, output: str) -> str:
        """Append the mean of each 2×2 window; at the end of an odd side, of the pixels inside the image."""
        end = side % 2
        return self.builder.node(
            "AveragePool", [x], output, kernel_shape=[2, 2], strides=[2, 2], pads=[0, 0, end, end]
        )

    # Blocks.

    def concatenate(self, parts: Sequence[str], output: str) -> str:
        """Append the concatenation of ``parts`` along the channels."""
        return self.builder.node("Concat", parts, output, axis=1)

    def sub_block(self, sub: _SubBlock, x: str, side: int, output: str) -> str:
        """Append one sub-block; :class:`qat.nn.sub_block.SubBlock` has its formula."""
        module, name, conv = sub.module, sub.name, sub.module.binary_conv
        weight = self.tensor(conv.effective_weight(), f"{name}.binary_conv.effective_weight")
        signs = self.sign(x, module, name)
        products = self.conv(signs, [weight], f"{name}/products", conv.kernel_size, conv.stride, conv.padding)
        normalized = self.batch_norm(products, module.norm1, f"{name}.norm1", f"{name}/conv")
        y = self.prelu(normalized, module.activation2, f"{name}.activation2", f"{name}/y")

        scale_kind, residual = module.kind == "scale", x
        if scale_kind:
            residual = self.prelu(x, module.activation1, f"{name}.activation1", f"{name}/prelu1")
        if module.stride == 2:
            residual = self.pool(residual, side, f"{name}/residual")
        branch = y
        if module.infor_recoupling:
            pooled = x
            if module.stride == 2 and side % 2:  # as in pooling, the last row and column count twice
                pooled = self.pool(x, side, f"{name}/even") if scale_kind else residual
            attention = self.attention(module, name, pooled, y)
            branch = self.builder.node("Mul", [y, attention], f"{name}/attended")
        if scale_kind:
            branch = self.builder.node("Mul", [branch, residual], f"{name}/product")
        if scale_kind or module.infor_recoupling:
            branch = self.batch_norm(branch, module.norm2, f"{name}.norm2", f"{name}/normalized")
        return self.builder.node("Add", [branch, residual], output)

    def attention(self, module: SubBlock, name: str, x: str, y: str) -> str:
        """Append channel attention (N, C, 1, 1) of the mixed means of ``x`` and ``y``."""
        share = module.scale.detach().clamp(0.0, 1.0)  # mix_scale() would change a network in training mode
        means = [
            self.builder.node(
                "Mul", [self.mean(source), self.tensor(values, f"{name}.{leaf}_share")], f"{name}/{leaf}_mean"
            )
            for source, values, leaf in ((x, share, "input"), (y, 1 - share, "y"))
        ]
        mix = self.builder.node("Add", means, f"{name}/pooled")
        layers = (cast(nn.Conv2d, module.se.se[index]) for index in (1, 3))
        hidden = self.convolution(mix, next(layers), f"{name}.se.se.1", f"{name}/hidden.products")
        hidden = self.builder.node("Relu", [hidden], f"{name}/hidden")
        logits = self.convolution(hidden, next(layers), f"{name}.se.se.3", f"{name}/logits")
        return self.builder.node("Sigmoid", [logits], f"{name}/attention")
