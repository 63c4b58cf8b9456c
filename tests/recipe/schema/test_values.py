"""Every key has values that are kept and values that are refused with what is allowed."""

from __future__ import annotations

from typing import Any

import pytest

from qat.recipe.loading import parse_recipe
from tests.helpers.recipes import FINETUNE, PRETRAIN, changed, leaves, problems, value_at

FREE = [
    ("seed", [0, 7], [-1, True, 1.0, "0", 2**32], "an integer >= 0"),
    ("device", ["cpu", "auto", "cuda", "cuda:3"], ["mps", "gpu", "cuda:", "cuda:x", "cpu:0", 0], ""),
    ("threads", [None, 1], [0, 1.5, "2"], "an integer >= 1, or null"),
    ("model.size", ["tiny", "large"], ["huge", 1, None], "'tiny', 'small', 'middle', 'large'"),
    ("model.widths", [None, [8, 16, 16]], [[8], [8, 0], [8, 24], [8, 4], [8, True], "8"], ""),
    ("model.num_classes", [None, 2, 1000], [1, "10", 10.0], "an integer >= 2"),
    ("model.classifier", ["auto", "keep", "new"], ["old", True, None], "'auto', 'keep', 'new'"),
    ("model.stem_stride", [None, 1, 2], [0, 3, True, 1.0, "1"], "1, 2, or null"),
    ("model.elm_attention", [True, False], [1, "yes", None], "true or false"),
    ("model.infor_recoupling", [True, False], [0, "no"], "true or false"),
    ("model.checkpoint", ["a.pth"], ["", 3], "a text that is not empty, or null"),
    ("model.state_key", [None, "state_dict_ema"], ["", 1], "a text that is not empty, or null"),
    ("model.latent", [1, 0.1], [0, -1.0, float("nan"), float("inf"), "1"], "number > 0"),
    ("data.dataset", ["digits", "imagefolder", "cifar10", "parquet"], ["mnist", None], "'digits', 'imag"),
    ("data.root", [None], ["", 1], "a text that is not empty, or null"),
    ("data.name", [None], ["", 1], "a text that is not empty, or null"),
    ("data.config", [None], ["", 1], "a text that is not empty, or null"),
    ("data.revision", [None], ["", 1], "a text that is not empty, or null"),
    ("data.image_column", [None], ["", 1], "a text that is not empty, or null"),
    ("data.label_column", [None], ["", 1], "a text that is not empty, or null"),
    ("data.in_memory", [None, True, False], ["yes", 1], "true or false, or null"),
    ("data.streaming", [False], [1, None], "true or false"),
    ("data.shuffle_buffer", [1, 10000], [0, 1.5, None], "an integer >= 1"),
    ("data.image_size", [8, 224], [7, 16.0], "an integer >= 8"),
    ("data.resize", [None, 16, 256], [0, 15, "16"], ""),
    ("data.mean", [[0, 0.5, -1]], [[0, 0], [0, 0, 0, 0], [0, 0, "0"], 0, "abc", None], ""),
    ("data.std", [[1, 0.5, 2]], [[1, 1], [1, 1, 0], [1, 1, -1], [1, 1, float("inf")]], ""),
    ("data.batch_size", [1], [0, 1.0], "an integer >= 1"),
    ("data.eval_batch_size", [1], [0], "an integer >= 1"),
    ("data.workers", [0, 8], [-1], "an integer >= 0"),
    ("data.train_split", ["train"], ["", None], "a text that is not empty"),
    ("data.test_split", [None, "test"], ["", 1], "a text that is not empty, or null"),
    ("data.validation_share", [None], [0, 1, "0.2"], "a number > 0 and < 1, or null"),
    ("data.final_split", [None], ["", 1], "a text that is not empty, or null"),
    ("data.exif_orientation", [True, False], [1, "yes", None], "true or false"),
    ("data.on_error", ["stop", "skip"], ["ignore", None], "'stop', 'skip'"),
    ("data.augment.flip", [True], [1], "true or false"),
    ("data.augment.translate", [0, 0.5], [-0.1, 0.51], "a number from 0"),
    ("data.augment.rotate", [0, 180], [-1, 181], "a number from 0"),
    ("data.augment.scale", [None, [0.9, 1.1], [1, 1]], [[1.1, 0.9], [0, 1], [1], [1, 2, 3], 1], ""),
    ("data.augment.crop", [None, [0.3, 1]], [[1, 0.3], [0, 1], [0.5, 1.1]], ""),
    ("data.augment.pad", [0, 4], [-1, 4.0], "an integer >= 0"),
    ("data.augment.randaugment", [None], [7, "m7"], "a section with keys count, magnitude, or null"),
    ("data.augment.randaugment.count", [1, 15], [0, 16, 2.0], "an integer from 1"),
    ("data.augment.randaugment.magnitude", [1, 9], [0, 10, "7"], "an integer from 1"),
    ("data.augment.jitter", [0, 1], [-0.1, 1.1], "a number from 0"),
    ("data.augment.erasing", [0, 1], [-0.1, 1.1], "a number from 0"),
    ("data.augment.mixup", [0, 0.8], [-0.1, True], "a number >= 0"),
    ("data.augment.cutmix", [0, 1], [-1, "1"], "a number >= 0"),
    ("precision", ["float32", "bfloat16", "float16"], ["float64", 16, None], "'float32', 'bfloat16'"),
    ("schedule.accumulate", [1, 8], [0, 2.0, None], "an integer >= 1"),
    ("schedule.ema", [None, 0.999], [0, 1, -0.1, "0.9"], "a number > 0 and < 1, or null"),
    ("optimizer.kernel_decay", [None, 0, 1e-8], [-1e-8, "1"], "a number >= 0, or null"),
    ("loss.label_smoothing", [0, 0.1], [1, -0.1], "a number >= 0 and < 1"),
    ("distillation.teacher_weights", [None], [[], 1], ""),
    ("optimizer.name", ["adamw", "sgd"], ["adam", None], "'adamw', 'sgd'"),
    ("optimizer.lr", [1, 1e-5], [0, -1, True, float("inf")], "number > 0"),
    ("optimizer.binary_lr", [None, 1e-5], [0, "1e-3"], "a number > 0, or null"),
    ("optimizer.head_lr", [None, 1e-2], [0, "1e-3"], "a number > 0, or null"),
    ("optimizer.weight_decay", [0, 0.1], [-0.1], "a number >= 0"),
    ("optimizer.momentum", [0, 0.99], [1, -0.1], "a number >= 0 and < 1"),
    ("optimizer.warmup", [0, 1], [1.1, -0.1], "a number from 0"),
    ("optimizer.min_lr", [0, 1], [1.1, -0.1], "a number from 0"),
    ("optimizer.clip_norm", [None, 1], [0], "a number > 0, or null"),
    ("distillation.weight", [0, 1], [1.5, -0.5], "a number from 0"),
    ("distillation.temperature", [1, 4.0], [0], "a number > 0"),
    ("output.dir", ["out"], ["", None], "a text that is not empty"),
    ("output.name", [None, "mine", "v2.1 b"], ["", "a/b", "..", ".x", 3], ""),
    ("output.float_weights", ["float32", "float16"], ["float64", 16], "'float32', 'float16'"),
    ("tracking.trackers", [[], ["tensorboard", "wandb"]], [[""], "wandb", None], ""),
    ("tracking.project", ["bnext-qat", "a_b.c", "7"], ["", "a/b", "..", "-a", None], ""),
    ("tracking.every", [1, 500], [0, 1.5], "an integer >= 1"),
]
GROUPS = [
    (f"quantization.{group}.{key}", fine, broken, allowed)
    for key, fine, broken, allowed, groups in [
        ("enabled", [True, False], [1, "yes"], "true or false", ["stem", "se", "classifier", "trunk"]),
        ("weight_bits", [2, 8], [1, 9, True, 8.0, "8"], "an integer from 2", ["stem", "se", "classifier"]),
        ("activation_bits", [2, 8], [1, 9, True], "an integer from 2 to 8", ["se", "classifier"]),
        ("activation_bits", [2, 8, 16], [1, 17, True], "an integer from 2 to 16", ["trunk"]),
        ("observer", ["minmax", "histogram"], ["mean", None], "'moving_av", ["se", "classifier", "trunk"]),
        ("averaging_constant", [1, 0.01], [0, 1.1], "a number > 0", ["se", "classifier", "trunk"]),
        ("percentile", [100, 99.9, 0.1], [0, 100.1, "99"], "a number > 0", ["se", "classifier", "trunk"]),
        ("clip", [None, 0.5, 6], [0, -1.0, "6"], "a number > 0, or null", ["se", "classifier", "trunk"]),
    ]
    for group in groups
]
FINETUNING = [
    ("parallel", ["ddp"], ["fsdp", "FSDP", None], "'ddp'"),
    ("quantization.backend", ["torch_ao", "brevitas"], ["brevita", None], "'torch_ao', 'brevitas'"),
    ("quantization.power_of_two", [True, False], [1, None], "true or false"),
    ("quantization.overrides", [[], [{"match": "fc", "weight_bits": 4}]], [None, "fc", [1]], ""),
    ("quantization.include", [["*"], ["feature.3.*", "fc"]], [[], [""], [1], "fc"], ""),
    ("quantization.exclude", [[], ["fc"]], [[""], "fc", None], ""),
    ("schedule.epochs", [0, 3], [-1, 1.0], "an integer >= 0"),
    ("schedule.float_epochs", [None, 0, 3], [-1, 1.0, "2"], "an integer >= 0, or null"),
    ("schedule.calibration_batches", [1], [0], "an integer >= 1"),
    ("schedule.freeze_observers", [0, 1], [-0.1, 1.1], "a number from 0"),
    ("schedule.freeze_batch_norm", [0, 1], [-0.1, 1.1], "a number from 0"),
    ("schedule.reestimate_batch_norm", [0, 16], [-1, None, 1.0], "an integer >= 0"),
    ("schedule.freeze_binary", [True], [1], "true or false"),
    ("schedule.save_steps", [None, 1, 1000], [0, "1"], "an integer >= 1"),
    ("schedule.keep_states", [1, 5], [0, None], "an integer >= 1"),
    ("distillation.teacher", [None, "self", "none"], ["selv", True], "'self', 'none', or null"),
]
PRETRAINING = [
    ("parallel", ["ddp", "fsdp"], ["FSDP", True, None], "'ddp', 'fsdp'"),
    ("schedule.epochs", [1, 14], [0], "an integer of at least 1"),
    ("schedule.temperature.start", [1, 1e-7], [0, 1e-8, "1"], "a number >= 1e-07"),
    ("schedule.temperature.end", [1e-8, 9e-8], [0, 1e-7], "a number > 0 and < 1e-07"),
    ("schedule.temperature.share", [0.5, 1], [0, 1.1], "a number > 0"),
    ("schedule.temperature.decay", [None, 1e-3], [0, 1, "0.9"], "a number > 0 and < 1, or null"),
    ("distillation.teachers", [[], ["a.pth", "timm:net"]], [[""], ["timm:"], "a.pth", None], ""),
    ("distillation.teacher", [None, "none"], ["self"], "'none'"),
]
VALUES = [
    *((FINETUNE, *row) for row in [*FREE, *GROUPS, *FINETUNING]),
    *((PRETRAIN, *row) for row in PRETRAINING),
]
ids = [f"{base['task']}-{key}" for base, key, *_ in VALUES]


def test_every_key_of_the_schema_has_fine_and_broken_values_here() -> None:
    keys = leaves(parse_recipe(changed(FINETUNE, "data.augment.randaugment", {}), "r.yaml").model_dump())
    assert {key for _, key, *_ in VALUES} == (keys | {"data.augment.randaugment"}) - {"task"}
    assert all(fine and broken for _, _, fine, broken, _ in VALUES)


@pytest.mark.parametrize(("base", "key", "fine", "broken", "allowed"), VALUES, ids=ids)
def test_a_value_in_range_is_kept(
    base: dict[str, Any], key: str, fine: list[Any], broken: list[Any], allowed: str
) -> None:
    for value in fine:
        kept = value_at(parse_recipe(changed(base, key, value), "r.yaml"), key)
        if key == "quantization.overrides":
            kept = [entry.model_dump(exclude_unset=True) for entry in kept]  # type: ignore[attr-defined]
        assert (list(kept) if isinstance(kept, tuple) else kept) == value


@pytest.mark.parametrize(("base", "key", "fine", "broken", "allowed"), VALUES, ids=ids)
def test_a_value_out_of_range_is_refused_with_what_was_found_and_is_allowed(
    base: dict[str, Any], key: str, fine: list[Any], broken: list[Any], allowed: str
) -> None:
    for value in broken:
        lines = problems(changed(base, key, value))
        assert len(lines) == 1, value
        assert lines[0].startswith((f"r.yaml: {key}: found ", f"r.yaml: {key}[")), value
        assert ", allowed" in lines[0]
        assert allowed in lines[0], value
