"""Malformed models of native operators end in an error of onnxruntime in words, never in a crash.

The models run in a process of their own, so that a crash is a failed test.
"""

from __future__ import annotations

import copy
import functools
import json
import os
import re
import subprocess
import sys
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper
from qat_export.nativelibrary import register

from tests.helpers.native_models import OUTPUTS, Array, Fed, Node, needs_library
from tests.helpers.paths import ROOT

# One process: each would run all models for itself.
pytestmark = [needs_library, pytest.mark.xdist_group("nativerefusals")]

F32 = np.float32
#: Change of a valid node: the value of an input (by index) or an attribute (by name); `GONE` leaves it out.
Change = dict[int | str, Any]
GONE = "left out"
#: Random models of each operator.
ROUNDS = 200
#: Wherever onnxruntime itself refuses a type.
TYPE = r"Type Error: Type .* of input parameter"
#: Wherever it misses an input.
MISSING = r"This is an invalid model.*([Ii]nput|[Nn]ode)"


def ints(*shape: int, dtype: Any = np.int8) -> Array:
    return (np.arange(np.prod(shape, dtype=int)) % 7 - 3).reshape(shape).astype(dtype)


def ones(*shape: int) -> Array:
    return np.ones(shape, F32)


def valid(operator: str) -> Node:
    """A node of each operator in which nothing is wrong."""
    grid: dict[str, int | float] = {"low": -128, "high": 127}
    if operator == "BinaryConv":
        weight, bias = ints(24, 3, 3, 5, dtype=np.uint8), ints(24, dtype=np.int32)
        inputs = [Fed(ints(2, 4, 5, 40)), weight, ints(40, dtype=np.int16), bias, ones(24), ints(24)]
        return Node(operator, inputs, {"stride": 2, "slope_shift": 7, **grid})
    if operator == "TrunkUpdate":
        inputs = [Fed(ints(2, 2, 3, 20)), Fed(ints(2, 4, 5, 20)), Fed(ints(2, 20)), ints(20), ints(20)]
        names = ("residual", "product", "branch")
        grids = {f"{name}_{end}": grid[end] for name in names for end in grid}
        factors = dict.fromkeys(("first", "second", "branch_multiplier", "residual_multiplier"), 0.5)
        return Node(
            operator, inputs, {"stride": 2, "scales": 1, "residual_shift": 7, **grids, **factors, **grid}
        )
    if operator == "ChannelAttention":
        sums = [Fed(ints(2, 20, dtype=np.int32)), Fed(ints(2, 20, dtype=np.int32))]
        reduce = [ints(6, 20), ints(6, dtype=np.int32), ones(6)]
        expand = [ints(20, 6), ints(20, dtype=np.int32), ones(20)]
        inputs = [*sums, ones(20), ones(20), *reduce, *expand, ints(256, dtype=np.uint8), ones(20)]
        ends = {"pooled_low": -128, "pooled_high": 127, "hidden_low": 0, "hidden_high": 255}
        return Node(operator, inputs, {**ends, "logits_low": -128, "logits_high": 127})
    if operator == "Stem":
        image = Fed(ints(2, 3, 6, 5, dtype=np.uint8))
        inputs = [image, ints(10, 3, 3, 3), ints(10, dtype=np.int32), ones(10)]
        return Node(operator, inputs, {"stride": 2, "zero_point": 128, **grid})
    return Node("ChannelSums", [Fed(ints(2, 4, 5, 20)), ints(20)], {"slope_shift": 7, **grid})


def changed(operator: str, change: Change) -> Node:
    node = copy.deepcopy(valid(operator))
    for key, value in change.items():
        if isinstance(key, str):
            node.attributes[key] = value
            if value is GONE:
                del node.attributes[key]
        elif key == len(node.inputs):
            node.inputs.append(value)
        else:
            node.inputs[key] = None if value is GONE else value
    while node.inputs[-1] is None:
        node.inputs.pop()
    return node


def attribute_cases(ranges: dict[str, tuple[int, int]], reals: tuple[str, ...] = ()) -> dict[str, Any]:
    cases: dict[str, Any] = {}
    for name, (low, high) in ranges.items():
        said = rf"{name} is .*allowed are {low} to {high}"
        cases[f"{name} too small"] = {name: low - 1}, said
        cases[f"{name} too large"] = {name: high + 1}, said
        cases[f"{name} far too large"] = {name: 2**62}, said
        said = f"attribute {name} is missing or not an integer"
        cases[f"{name} of another type"] = {name: 0.5}, said
        cases[f"{name} missing"] = {name: GONE}, said
    for name in reals:
        cases[f"{name} infinite"] = {name: float("inf")}, f"{name} is not finite"
        cases[f"{name} not a number"] = {name: float("nan")}, f"{name} is not finite"
        said = f"attribute {name} is missing or not a real number"
        cases[f"{name} of another type"] = {name: 1}, said
        cases[f"{name} missing"] = {name: GONE}, said
    return cases


def vector_cases(index: int, name: str, size: int, dtype: Any, other: Any) -> dict[str, Any]:
    """A constant vector that is of another length, rank or type, empty, no constant, or missing."""
    said = rf"{name}.* has shape .*need \({size}\)"
    cases = {
        f"{name} {what}": ({index: ints(*shape, dtype=dtype)}, said)
        for what, shape in {
            "too short": (size - 1,),
            "too long": (size + 1,),
            "of 64": (64,),
            "empty": (0,),
            "of rank 2": (1, size),
            "of rank 0": (),
        }.items()
    }
    cases[f"{name} of another type"] = {index: ints(size, dtype=other)}, TYPE
    cases[f"{name} fed"] = {index: Fed(ints(size, dtype=dtype))}, f"{name} must be a constant"
    cases[f"{name} missing"] = {index: GONE}, MISSING
    if dtype == F32:
        for what, value in {"infinite": np.inf, "not a number": np.nan}.items():
            broken = np.where(np.arange(size) == size - 1, F32(value), F32(1)).astype(F32)
            cases[f"{name} {what}"] = {index: broken}, "a multiplier is not finite"
    return cases


def activation_cases(index: int, name: str, shape: tuple[int, ...], dtype: Any, other: Any) -> dict[str, Any]:
    """Activations of another rank or type, or without pixels or channels."""
    said = f"{name} has shape .*need 4 dimensions, those after the first at least 1"
    shapes = {"rank 3": shape[1:], "rank 5": (1, *shape), "rank 0": (), "rank 1": (shape[0],)}
    for axis, side in enumerate(["height", "width", "channels"], 1):
        shapes[f"no {side}"] = (*shape[:axis], 0, *shape[axis + 1 :])
    cases: dict[str, Any] = {
        f"{name} of {what}": ({index: Fed(ints(*changed, dtype=dtype))}, said)
        for what, changed in shapes.items()
    }
    # Their sums would not fit.
    wide = np.zeros((1, 1, 2**23 + 1, 1), dtype)
    cases[f"{name} of too many pixels"] = {index: Fed(wide)}, f"{name} has shape .*more than 8388608 pixels"
    cases[f"{name} of another type"] = {index: Fed(ints(*shape, dtype=other))}, TYPE
    cases[f"{name} missing"] = {index: GONE}, MISSING
    return cases


def binary_conv() -> dict[str, Any]:
    cases = attribute_cases(
        {"stride": (1, 2), "low": (-128, 0), "high": (0, 127), "slope_shift": (-24, 24)}
    ) | activation_cases(0, "x", (2, 4, 5, 40), np.int8, np.uint8)
    cases |= vector_cases(3, "bias", 24, np.int32, np.int16)
    cases |= vector_cases(4, "multiplier", 24, F32, np.float64)
    cases |= vector_cases(5, "slopes", 24, np.int8, np.uint8)
    for channels in (39, 41, 64, 1):
        said = f"x has shape .*, {channels}.*need 40 channels"
        cases[f"x of {channels} channels"] = {0: Fed(ints(2, 4, 5, channels))}, said
    sides = [(2, 2, 5), (5, 5, 5), (3, 1, 5), (1, 3, 5), (3, 3, 4), (3, 3, 6), (0, 0, 5), (3, 3, 0)]
    for shape in [(24, 3, 3), (24, 3, 3, 5, 1), (0, 3, 3, 5), (), *((24, *side) for side in sides)]:
        said = r"weight has shape .*need \(outputs, k, k, 5\) with k 1 or 3"
        cases[f"weight {shape}"] = {1: ints(*shape, dtype=np.uint8)}, said
    cases["weight of another type"] = {1: ints(24, 3, 3, 5)}, TYPE
    cases["weight fed"] = {1: Fed(ints(24, 3, 3, 5, dtype=np.uint8))}, "weight must be a constant"
    for shape in [(0,), (1, 40), ()]:
        cases[f"threshold {shape}"] = {2: ints(*shape, dtype=np.int16)}, "threshold has shape"
    cases["threshold too long"] = {2: ints(41, dtype=np.int16)}, r"weight has shape .*need .*, 6\)"
    cases["threshold of another type"] = {2: ints(40, dtype=np.int8)}, TYPE
    for value in (129, -129, 32767, -32768):
        broken = np.where(np.arange(40) == 39, value, 0).astype(np.int16)
        cases[f"threshold {value}"] = {2: broken}, f"threshold {value}, allowed are -128 to 128"
    cases["seven inputs"] = {6: ints(24)}, "[Ii]nput"
    return cases


def trunk_update() -> dict[str, Any]:
    ranges = {"stride": (1, 2), "scales": (0, 1), "residual_shift": (-24, 24)}
    for name in ("residual_", "product_", "branch_", ""):
        ranges |= {f"{name}low": (-128, 0), f"{name}high": (0, 127)}
    cases = attribute_cases(ranges, ("first", "second", "branch_multiplier", "residual_multiplier"))
    cases |= activation_cases(0, "y", (2, 2, 3, 20), np.int8, np.uint8)
    cases |= activation_cases(1, "x", (2, 4, 5, 20), np.int8, np.uint8)
    for shape in [(1, 2, 3, 20), (3, 2, 3, 20), (2, 4, 5, 20), (2, 3, 3, 20), (2, 2, 2, 20), (2, 2, 3, 21)]:
        cases[f"y {shape}"] = {0: Fed(ints(*shape))}, r"y has shape .*needs \(2, 2, 3, 20\)"
    both = {0: Fed(ints(2, 2, 3, 21)), 1: Fed(ints(2, 4, 5, 21))}
    cases["channels that the constants don't have"] = both, r"x has shape .*need 20 channels"
    for shape in [(20,), (3, 20), (0, 20), (2, 19), (2, 21), (2, 20, 1), (), (2, 0)]:
        cases[f"gain {shape}"] = {2: Fed(ints(*shape))}, r"gain has shape .*need \(2 or 1, 20\)"
        cases[f"constant gain {shape}"] = {2: ints(*shape)}, r"gain has shape .*need \(2 or 1, 20\)"
    cases["gain of another type"] = {2: Fed(ints(2, 20, dtype=np.int32))}, TYPE
    cases["gain without offset"] = {3: GONE}, "gain and offset go together"
    cases["offset without gain"] = {2: GONE}, "gain and offset go together"
    for index, name in [(3, "offset"), (4, "residual_slopes")]:
        for shape in [(0,), (1, 20), ()]:
            cases[f"{name} {shape}"] = {index: ints(*shape)}, "a vector has shape"
        cases[f"{name} too long"] = {index: ints(21)}, "differ in length"
        cases[f"{name} of another type"] = {index: ints(20, dtype=np.int16)}, TYPE
        cases[f"{name} fed"] = {index: Fed(ints(20))}, f"{name} must be a constant"
    return cases


def channel_attention() -> dict[str, Any]:
    ranges = {"pooled_low": (-128, 0), "pooled_high": (0, 127), "hidden_low": (-128, 0)}
    cases = attribute_cases(ranges | {"hidden_high": (0, 255), "logits_low": (-128, 0)})
    cases["logits_high too large"] = {"logits_high": 128}, "beyond -128 to 127 have no place in the table"
    cases["logits_high missing"] = {"logits_high": GONE}, "logits_high"
    for index, name in enumerate(["x_sum", "y_sum"]):
        for shape in [(20,), (2, 20, 1), (2, 19), (2, 21), (3, 20), (0, 20), (2, 0), ()]:
            said = r"sums have shapes .*need \(images, 20\)"
            cases[f"{name} {shape}"] = {index: Fed(ints(*shape, dtype=np.int32))}, said
        cases[f"{name} of another type"] = {index: Fed(ints(2, 20, dtype=np.int16))}, TYPE
        cases[f"{name} missing"] = {index: GONE}, MISSING
    for index, name in [(2, "x_multiplier"), (3, "y_multiplier"), (11, "gain")]:
        cases |= vector_cases(index, name, 20, F32, np.float64)
    for index, name, outputs in [(4, "reduce", 6), (7, "expand", 20)]:
        cases |= vector_cases(index + 1, f"{name}_bias", outputs, np.int32, np.int16)
        cases |= vector_cases(index + 2, f"{name}_multiplier", outputs, F32, np.float64)
        for shape in [(6,), (6, 20, 1), (0, 20), (6, 0), ()]:
            cases[f"{name}_weight {shape}"] = {index: ints(*shape)}, f"{name}_weight has shape"
        cases[f"{name}_weight of another type"] = {index: ints(6, 20, dtype=np.uint8)}, TYPE
        cases[f"{name}_weight fed"] = {index: Fed(ints(6, 20))}, f"{name}_weight must be a constant"
    cases["reduce_weight too wide"] = {4: ints(6, 65537)}, "more than 65536 inputs"
    cases["other channels in expand"] = {
        7: ints(21, 6), 8: ints(21, dtype=np.int32), 9: ones(21)
    }, "expand is 21×6, reduce 6×20"  # fmt: skip
    cases["other hidden units in expand"] = {7: ints(20, 5)}, "expand is 20×5, reduce 6×20"
    for shape in [(255,), (257,), (0,), (16, 16), ()]:
        said = r"table has shape .*need \(256\)"
        cases[f"table {shape}"] = {10: ints(*shape, dtype=np.uint8)}, said
    return cases


def stem() -> dict[str, Any]:
    ranges = {"stride": (1, 2), "zero_point": (0, 255), "low": (-128, 0), "high": (0, 127)}
    cases = attribute_cases(ranges) | activation_cases(0, "x", (2, 3, 6, 5), np.uint8, np.int8)
    cases |= vector_cases(2, "bias", 10, np.int32, np.int8) | vector_cases(
        3, "multiplier", 10, F32, np.float64
    )
    for colors in (1, 4):
        image = Fed(ints(2, colors, 6, 5, dtype=np.uint8))
        cases[f"{colors} colors"] = {0: image}, r"x has shape .*need \(images, 3, height, width\)"
    for shape in [(10, 3, 3), (10, 4, 3, 3), (10, 3, 5, 5), (10, 3, 3, 1), (0, 3, 3, 3), (10, 0, 3, 3), ()]:
        said = r"weight has shape .*need \(channels, 3, 3, 3\)"
        cases[f"weight {shape}"] = {1: ints(*shape)}, said
    cases["weight of another type"] = {1: ints(10, 3, 3, 3, dtype=np.uint8)}, TYPE
    cases["weight fed"] = {1: Fed(ints(10, 3, 3, 3))}, "weight must be a constant"
    return cases


def channel_sums() -> dict[str, Any]:
    cases = attribute_cases({"low": (-128, 0), "high": (0, 127), "slope_shift": (-24, 24)})
    cases |= activation_cases(0, "x", (2, 4, 5, 20), np.int8, np.uint8)
    for channels in (19, 21, 64):
        cases[f"x of {channels} channels"] = {0: Fed(ints(2, 4, 5, channels))}, "need 20 channels"
    for shape in [(0,), (1, 20), ()]:
        cases[f"slopes {shape}"] = {1: ints(*shape)}, "slopes has shape"
    cases["slopes of another type"] = {1: ints(20, dtype=np.int16)}, TYPE
    cases["slopes fed"] = {1: Fed(ints(20))}, "slopes must be a constant"
    return cases


GROUPS = {
    "BinaryConv": binary_conv(),
    "TrunkUpdate": trunk_update(),
    "ChannelAttention": channel_attention(),
    "Stem": stem(),
    "ChannelSums": channel_sums(),
}


# ---- in the child


def refuse(operator: str) -> dict[str, str]:
    """What each malformed model is answered with; an empty text where it runs."""
    answers = {}
    for name, (change, _) in {"valid": ({}, ""), **GROUPS[operator]}.items():
        answers[name] = ""
        try:
            changed(operator, change).run()
        except Exception as error:
            answers[name] = f"{type(error).__module__}: {error}"
    return answers


def fuzz(operator: str, rounds: int = ROUNDS) -> dict[str, str]:
    """Random shapes, types and attributes: everything ends in a result or an error of onnxruntime."""
    random = np.random.default_rng(len(operator))
    dtypes = [np.int8, np.uint8, np.int16, np.int32, F32]
    counts = {"runs": 0, "refused": 0}
    for _ in range(rounds):
        node = valid(operator)
        for _ in range(random.integers(1, 4)):
            index = int(random.integers(0, len(node.inputs)))
            old = node.inputs[index]
            value = old.value if isinstance(old, Fed) else old
            if random.random() < 0.3:
                name = str(random.choice(list(node.attributes)))
                node.attributes[name] = type(node.attributes[name])(
                    random.choice([-1, 0, 1, 2, 100, 1 << 40])
                )
                continue
            if value is None:
                continue
            shape = [int(random.choice([side, side, side, 0, 1, 2, 65])) for side in value.shape]
            dtype = random.choice(dtypes) if random.random() < 0.1 else value.dtype
            new = ints(*shape, dtype=dtype)
            node.inputs[index] = Fed(new) if isinstance(old, Fed) else new
            if random.random() < 0.05:
                node.inputs[index] = new if isinstance(old, Fed) else Fed(new)
        try:
            node.run(threads=int(random.integers(1, 3)))
            counts["runs"] += 1
        except Exception as error:
            if not type(error).__module__.startswith("onnxruntime"):
                raise
            counts["refused"] += 1
    return {key: str(value) for key, value in counts.items()}


def main() -> None:
    """Entry of the child process: what was begun on the error stream, all answers on the other."""
    answers: dict[str, dict[str, dict[str, str]]] = {}
    for operator in GROUPS:
        for task in (refuse, fuzz):
            print(f"{task.__name__} {operator}", file=sys.stderr, flush=True)
            answers.setdefault(operator, {})[task.__name__] = task(operator)
    print(json.dumps(answers))


@functools.cache
def all_answers() -> dict[str, dict[str, dict[str, str]]]:
    # One child for all: to start takes longer than to run an operator's models.
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    command = [sys.executable, "-c", f"import {__name__} as here; here.main()"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"ended with {done.returncode}\n{done.stderr[-4000:]}"
    answers: dict[str, dict[str, dict[str, str]]] = json.loads(done.stdout)
    return answers


def answers_of(task: str, operator: str) -> dict[str, str]:
    return all_answers()[operator][task]


# ---- tests


@pytest.mark.parametrize(
    ("operator", "name"), [(operator, name) for operator, cases in GROUPS.items() for name in cases]
)
def test_a_malformed_model_is_refused_in_words(operator: str, name: str) -> None:
    answer = answers_of("refuse", operator)[name]
    assert answer.startswith("onnxruntime"), answer or "it ran"
    assert re.search(GROUPS[operator][name][1], answer), answer


@pytest.mark.parametrize("operator", GROUPS)
def test_a_valid_model_is_not_refused(operator: str) -> None:
    assert answers_of("refuse", operator)["valid"] == ""


@pytest.mark.parametrize("operator", GROUPS)
def test_random_models_run_or_are_refused(operator: str) -> None:
    answers = answers_of("fuzz", operator)
    assert int(answers["runs"]) + int(answers["refused"]) == ROUNDS
    assert min(map(int, answers.values())) >= 20


def test_errors_of_the_operators_name_them() -> None:
    for operator in GROUPS:
        answers = answers_of("refuse", operator).values()
        ours = [answer for answer in answers if f"bnext_qat.{operator}: " in answer]
        assert len(ours) > len(answers) // 2


def refusal(model: Any) -> str:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    register(options)
    with pytest.raises(Exception) as caught:  # noqa: PT011 - onnxruntime's exceptions share no class
        ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    assert type(caught.value).__module__.startswith("onnxruntime")
    return str(caught.value)


def test_unknown_operators_and_outputs_are_refused() -> None:
    def model(operator: str, outputs: list[str]) -> Any:
        infos = [helper.make_tensor_value_info(name, TensorProto.INT8, None) for name in (*outputs, "x", "y")]
        node = helper.make_node(operator, ["x", "y"], outputs, domain="bnext_qat", stride=1)
        graph = helper.make_graph([node], "graph", infos[-2:], infos[:-2])
        opsets = [helper.make_opsetid("", 13), helper.make_opsetid("bnext_qat", 1)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=8)

    assert "BinaryDense" in refusal(model("BinaryDense", ["z"]))
    assert "TrunkUpdate" in refusal(model("TrunkUpdate", ["z", *"abc"]))


def test_constants_whose_sizes_lie_are_refused() -> None:
    for dims in ([-24], [2**40], [23], [25]):
        model = onnx.load_from_string(valid("BinaryConv").model())
        bias = next(tensor for tensor in model.graph.initializer if tensor.name == "i3")
        del bias.dims[:]
        bias.dims.extend(dims)
        assert refusal(model)


def test_a_model_needs_the_library() -> None:
    with pytest.raises(Exception, match="bnext_qat") as caught:
        ort.InferenceSession(valid("Stem").model(), providers=["CPUExecutionProvider"])
    assert type(caught.value).__module__.startswith("onnxruntime")


def test_every_operator_has_malformed_models() -> None:
    assert set(GROUPS) == set(OUTPUTS)
