"""Recipes: each valid case stands beside a broken one, and errors are checked for what they tell."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_origin

import pytest
import yaml

from qat.errors import OutputError, RecipeError
from qat.recipe import files as recipefiles
from qat.recipe import loading as recipe_module
from qat.recipe.files import copy_recipe, recipe_names, recipes_dir
from qat.recipe.loading import load_recipe, parse_recipe, recipe_schema, recipe_yaml, resolve_checkpoint
from qat.recipe.schema import Recipe, Section

SHIPPED = [
    "large_imagenet_pretrain",
    "middle_imagenet_pretrain",
    "small_imagenet_pretrain",
    "tiny_cifar10_pretrain",
    "tiny_digits_pretrain",
    "tiny_imagenet_pretrain",
    "tiny_int8",
    "tiny_int8_cifar10",
    "tiny_int8_imagenet",
    "tiny_int8_paper",
]

FINETUNE: dict[str, Any] = {
    "task": "finetune",
    "model": {"checkpoint": "a.safetensors"},
    "data": {},
    "quantization": {},
}
PRETRAIN: dict[str, Any] = {"task": "pretrain", "model": {}, "data": {}}


def changed(base: dict[str, Any], key: str, value: object) -> dict[str, Any]:
    """``base`` with one dotted key set, sections created as needed."""
    result = copy.deepcopy(base)
    *sections, last = key.split(".")
    inner = result
    for name in sections:
        inner = inner.setdefault(name, {})
    inner[last] = value
    return result


def problems(raw: object, source: str = "r.yaml") -> list[str]:
    """The lines of the error a mapping is refused with."""
    with pytest.raises(RecipeError) as caught:
        parse_recipe(raw, source)
    return str(caught.value).splitlines()


def file_problems(path: Path | str, *overrides: str) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, overrides)
    return str(caught.value).splitlines()


def value_at(recipe: Recipe, key: str) -> object:
    value: object = recipe
    for name in key.split("."):
        value = getattr(value, name)
    return value


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory outside the checkout."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(folder: Path, text: str | bytes, name: str = "r.yaml") -> str:
    (folder / name).write_bytes(text.encode() if isinstance(text, str) else text)
    return name


# ---- shipped recipes


def test_the_shipped_recipes_are_those_listed() -> None:
    assert recipe_names() == SHIPPED
    assert sorted(path.name for path in recipes_dir().glob("*.y*ml")) == [f"{name}.yaml" for name in SHIPPED]


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_recipe_loads_and_an_altered_one_does_not(name: str) -> None:
    loaded = load_recipe(name)
    assert (loaded.name, loaded.path) == (name, recipes_dir() / f"{name}.yaml")
    assert loaded.recipe.task == ("pretrain" if name.endswith("pretrain") else "finetune")
    [line] = file_problems(name, "model.sizes=tiny")
    assert line == "--set model.sizes=tiny: model.sizes: unknown key (did you mean 'size'?)"


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_recipe_opens_with_the_command_that_runs_it(name: str) -> None:
    first = (recipes_dir() / f"{name}.yaml").read_text(encoding="utf-8").splitlines()[0]
    command = "pretrain" if name.endswith("pretrain") else "finetune"
    assert first.startswith(f"# qat {command} --recipe recipes/{name}.yaml")


def test_the_digits_recipes_agree_with_the_one_that_makes_their_checkpoint() -> None:
    made = load_recipe("tiny_digits_pretrain").recipe
    for name in ("tiny_int8", "tiny_int8_paper"):
        used = load_recipe(name).recipe
        assert used.model.model_copy(update={"checkpoint": None}) == made.model
        for key in ("dataset", "image_size", "mean", "std", "train_split", "test_split"):
            assert getattr(used.data, key) == getattr(made.data, key), f"{name}: data.{key}"


def test_the_paper_recipe_differs_from_tiny_int8_in_the_trunk_only() -> None:
    full, paper = (load_recipe(name).recipe.model_dump() for name in ("tiny_int8", "tiny_int8_paper"))
    assert full["quantization"]["trunk"].pop("enabled") is True
    assert paper["quantization"]["trunk"].pop("enabled") is False
    full["quantization"].pop("trunk"), paper["quantization"].pop("trunk")
    assert paper == full


def test_the_imagenet_recipes_differ_in_size_teachers_and_how_a_step_is_cut_up() -> None:
    names = [name for name in SHIPPED if name.endswith("imagenet_pretrain")]
    common, images = [], []
    for name in names:
        recipe = load_recipe(name).recipe.model_dump()
        assert f"{recipe['model'].pop('size')}_imagenet_pretrain" == name
        assert len(recipe["distillation"].pop("teachers")) == 2
        images.append(recipe["data"].pop("batch_size") * recipe["schedule"].pop("accumulate"))
        common.append(recipe)
    assert images == [512] * 4
    assert all(recipe == common[0] for recipe in common)


# ---- keys


def key_paths(model: type[Any], prefix: str = "") -> Iterator[str]:
    """Dotted path of each section below ``model``."""
    for name, field in model.model_fields.items():
        if get_origin(field.annotation) is list:  # a list of sections; it has tests of its own
            continue
        kinds = [field.annotation, *getattr(field.annotation, "__args__", ())]
        for kind in kinds:
            if isinstance(kind, type) and issubclass(kind, Section):
                yield f"{prefix}{name}"
                yield from key_paths(kind, f"{prefix}{name}.")


SECTIONS = list(key_paths(Recipe))


def test_every_section_is_known_to_these_tests() -> None:
    groups = [f"quantization.{name}" for name in ("stem", "se", "classifier", "trunk")]
    others = ["model", "data", "data.augment", "data.augment.randaugment", "schedule"]
    others += ["schedule.temperature", "optimizer", "loss", "distillation", "output", "tracking"]
    assert sorted(SECTIONS) == sorted([*groups, *others, "quantization"])


@pytest.mark.parametrize("section", ["", *SECTIONS])
def test_an_unknown_key_is_refused_in_every_section(section: str) -> None:
    key = f"{section}.qqq".lstrip(".")
    line = next(line for line in problems(changed(FINETUNE, key, 1)) if line.startswith(f"r.yaml: {key}: "))
    assert line.startswith(f"r.yaml: {key}: unknown key; allowed: ")
    assert not line.endswith("allowed: ")


def test_an_unknown_key_comes_with_the_nearest_known_one() -> None:
    assert parse_recipe(changed(FINETUNE, "quantization.se.weight_bits", 4), "r.yaml")
    assert problems(changed(FINETUNE, "quantization.se.weight_bit", 4), "recipes/tiny_int8.yaml") == [
        "recipes/tiny_int8.yaml: quantization.se.weight_bit: unknown key (did you mean 'weight_bits'?)"
    ]


def test_a_key_that_is_a_number_is_refused() -> None:
    [line] = problems({**FINETUNE, 1: 2})
    assert line.startswith("r.yaml: 1: unknown key; allowed: task, ")


def test_weights_of_the_trunk_are_refused_with_the_reason() -> None:
    assert parse_recipe(changed(FINETUNE, "quantization.trunk.activation_bits", 4), "r.yaml")
    [line] = problems(changed(FINETUNE, "quantization.trunk.weight_bits", 4))
    assert line.startswith("r.yaml: quantization.trunk.weight_bits: ")
    assert "the trunk has no weights of its own beyond the 1 bit" in line


@pytest.mark.parametrize("key", ["activation_bits", "observer", "averaging_constant", "percentile", "clip"])
def test_activations_of_the_stem_are_refused_with_the_reason(key: str) -> None:
    [line] = problems(changed(FINETUNE, f"quantization.stem.{key}", 8))
    assert line.startswith(f"r.yaml: quantization.stem.{key}: ")
    assert "only the stem's weights are quantized" in line


def test_required_keys_that_are_absent_are_named_together() -> None:
    lines = problems({})
    assert [line.split(": ")[1:3] for line in lines] == [
        ["task", "missing; allowed"],
        ["model", "missing; allowed"],
        ["data", "missing; allowed"],
    ]


def test_every_problem_is_reported_at_once() -> None:
    raw = {
        "task": "finetune",
        "seed": -1,
        "model": {"size": "tinny"},
        "data": {"image_size": 32, "resize": 20, "mean": [0.0, 1.0]},
        "quantization": {"se": {"weight_bit": 4}},
        "optimizer": {"lr": "fast"},
    }
    assert sorted(problems(raw)) == [
        "r.yaml: data.mean: found [0.0, 1.0], allowed: a list of 3, each a number",
        "r.yaml: data.resize: found 20, allowed: at least data.image_size, which is 32",
        "r.yaml: model.checkpoint: missing; task 'finetune' starts from a trained network",
        "r.yaml: model.size: found 'tinny', allowed: 'tiny', 'small', 'middle', 'large' "
        "(did you mean 'tiny'?)",
        "r.yaml: optimizer.lr: found 'fast', allowed: a number > 0",
        "r.yaml: quantization.se.weight_bit: unknown key (did you mean 'weight_bits'?)",
        "r.yaml: seed: found -1, allowed: an integer >= 0 and < 4294967296",
    ]


OVERRIDE = "r.yaml: quantization.overrides[1]"


@pytest.mark.parametrize(
    ("entry", "line"),
    [
        ({"match": "fc", "weight_bit": 4}, ".weight_bit: unknown key (did you mean 'weight_bits'?)"),
        ({"weight_bits": 4}, ".match: missing; allowed: a text that is not empty"),
        ({"match": "", "weight_bits": 4}, ".match: found '', allowed: a text that is not empty"),
        (
            {"match": "fc", "weight_bits": 9},
            ".weight_bits: found 9, allowed: an integer from 2 to 8, or null",
        ),
        (
            {"match": "*", "activation_bits": 17},
            ".activation_bits: found 17, allowed: an integer from 2 to 16",
        ),
        ({"match": "*", "percentile": 0}, ".percentile: found 0, allowed: a number > 0 and <= 100"),
        ({"match": "*", "clip": -1.0}, ".clip: found -1.0, allowed: a number > 0, or null"),
        ({"match": "*", "observer": "max"}, ".observer: found 'max', allowed: 'moving_average', 'minmax'"),
        (7, ": found 7, allowed: a section with keys match, weight_bits"),
    ],
)
def test_a_wrong_override_is_refused_with_its_place_in_the_list(entry: object, line: str) -> None:
    entries = [{"match": "fc", "weight_bits": 4}, entry]
    found = problems(changed(FINETUNE, "quantization.overrides", entries))
    assert len(found) == 1
    assert found[0].startswith(OVERRIDE + line)


# ---- values: key, values that are fine, values that are not, and what the error says is allowed

FREE = [
    ("seed", [0, 7], [-1, True, 1.0, "0", 2**32], "an integer >= 0"),
    ("device", ["cpu", "auto", "cuda", "cuda:3"], ["mps", "gpu", "cuda:", "cuda:x", "cpu:0", 0], ""),
    ("threads", [None, 1], [0, 1.5, "2"], "an integer >= 1, or null"),
    ("model.size", ["tiny", "large"], ["huge", 1, None], "'tiny', 'small', 'middle', 'large'"),
    ("model.widths", [None, [8, 16, 16]], [[8], [8, 0], [8, 24], [8, 4], [8, True], "8"], ""),
    ("model.num_classes", [2, 1000], [1, "10", 10.0], "an integer >= 2"),
    ("model.stem_stride", [None, 1, 2], [0, 3, True, 1.0, "1"], "1, 2, or null"),
    ("model.elm_attention", [True, False], [1, "yes", None], "true or false"),
    ("model.infor_recoupling", [True, False], [0, "no"], "true or false"),
    ("model.checkpoint", ["a.pth"], ["", 3], "a text that is not empty, or null"),
    ("model.latent", [1, 0.1], [0, -1.0, float("nan"), float("inf"), "1"], "number > 0"),
    ("data.dataset", ["digits", "imagefolder", "cifar10", "parquet"], ["mnist", None], "'digits', 'imag"),
    ("data.root", [None, "images"], ["", 1], "a text that is not empty, or null"),
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
    ("optimizer.weight_decay", [0, 0.1], [-0.1], "a number >= 0"),
    ("optimizer.momentum", [0, 0.99], [1, -0.1], "a number >= 0 and < 1"),
    ("optimizer.warmup", [0, 1], [1.1, -0.1], "a number from 0"),
    ("optimizer.min_lr", [0, 1], [1.1, -0.1], "a number from 0"),
    ("optimizer.clip_norm", [None, 1], [0], "a number > 0, or null"),
    ("distillation.weight", [0, 1], [1.5, -0.5], "a number from 0"),
    ("distillation.temperature", [1, 4.0], [0], "a number > 0"),
    ("output.dir", ["out"], ["", None], "a text that is not empty"),
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


def leaves(value: object, prefix: str = "") -> set[str]:
    if not isinstance(value, dict):
        return {prefix.rstrip(".")}
    return set().union(*(leaves(inner, f"{prefix}{key}.") for key, inner in value.items()))


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


@pytest.mark.parametrize("key", ["name", "config", "revision", "image_column", "label_column", "streaming"])
def test_a_key_of_another_data_set_is_refused(key: str) -> None:
    value = True if key == "streaming" else "x"
    data = {"dataset": "hub", "name": "someone/images", key: value}
    assert value_at(parse_recipe({**PRETRAIN, "data": data}, "r.yaml"), f"data.{key}") == value
    for other in ("digits", "imagefolder", "cifar10"):
        [line] = problems({**PRETRAIN, "data": {"dataset": other, key: value}})
        assert line.startswith(f"r.yaml: data.{key}: found ")
        assert "'hub' has it" in line


def test_a_data_set_of_the_hub_needs_its_name() -> None:
    [line] = problems({**PRETRAIN, "data": {"dataset": "hub"}})
    assert line.startswith("r.yaml: data.name: missing; dataset 'hub' needs a repository")


def test_what_null_means_depends_on_the_data_set() -> None:
    folder = parse_recipe({**PRETRAIN, "data": {"dataset": "imagefolder", "image_size": 224}}, "r").data
    assert (folder.evaluated_split, folder.shorter_side) == ("validation", 256)
    cifar10 = parse_recipe({**PRETRAIN, "data": {"dataset": "cifar10", "image_size": 32}}, "r").data
    assert (cifar10.evaluated_split, cifar10.shorter_side) == ("test", 32)
    given = {"dataset": "cifar10", "image_size": 32, "resize": 40, "test_split": "train"}
    explicit = parse_recipe({**PRETRAIN, "data": given}, "r").data
    assert (explicit.evaluated_split, explicit.shorter_side) == ("train", 40)


def test_a_task_has_no_default_and_no_other_name() -> None:
    assert parse_recipe(PRETRAIN, "r.yaml").task == "pretrain"
    assert problems({**PRETRAIN, "task": "pretrian"}) == [
        "r.yaml: task: found 'pretrian', allowed: 'pretrain', 'finetune' (did you mean 'pretrain'?)"
    ]


def test_a_number_that_is_not_finite_is_called_so() -> None:
    [line] = problems(changed(FINETUNE, "model.latent", float("nan")))
    assert line == "r.yaml: model.latent: found nan, allowed: a finite number > 0"


def test_a_width_that_neither_stays_nor_doubles_is_named_with_its_position() -> None:
    assert problems(changed(FINETUNE, "model.widths", [8, 16, 48])) == [
        "r.yaml: model.widths: found 48 at position 2, allowed after 16: 16 or 32 "
        "(a block keeps its width or doubles it)"
    ]


def test_a_section_that_is_not_a_mapping_is_refused_with_its_keys() -> None:
    for value in (None, 3, ["teacher"]):
        [line] = problems(changed(FINETUNE, "distillation", value))
        assert line.endswith(
            "allowed: a section with keys teacher, teachers, teacher_weights, weight, temperature"
        )


@pytest.mark.parametrize("value", [None, 3, "text", ["task"]])
def test_a_recipe_that_is_not_a_mapping_is_refused(value: object) -> None:
    [line] = problems(value)
    assert line.startswith("r.yaml: found ")
    assert "at the top level, allowed: a section with keys task, " in line


# ---- keys that depend on the task


def test_finetuning_needs_quantization_and_pretraining_refuses_it() -> None:
    assert parse_recipe(FINETUNE, "r.yaml").quantization is not None
    assert parse_recipe({**PRETRAIN, "quantization": None}, "r.yaml").quantization is None
    [missing] = problems({key: value for key, value in FINETUNE.items() if key != "quantization"})
    assert missing.startswith("r.yaml: quantization: missing; task 'finetune' needs it")
    [extra] = problems({**PRETRAIN, "quantization": {}})
    assert extra.startswith("r.yaml: quantization: task 'pretrain' trains in float")


def test_finetuning_needs_a_checkpoint_and_pretraining_does_not() -> None:
    assert parse_recipe(PRETRAIN, "r.yaml").model.checkpoint is None
    [line] = problems({**FINETUNE, "model": {}})
    assert line == "r.yaml: model.checkpoint: missing; task 'finetune' starts from a trained network"


@pytest.mark.parametrize(
    ("key", "value", "used"),
    [
        ("temperature.start", 2.0, "pretrain"),
        ("temperature.end", 1e-9, "pretrain"),
        ("temperature.share", 0.3, "pretrain"),
        ("temperature.decay", 1e-3, "pretrain"),
        ("calibration_batches", 4, "finetune"),
        ("freeze_observers", 0.1, "finetune"),
        ("freeze_batch_norm", 0.1, "finetune"),
        ("freeze_binary", True, "finetune"),
    ],
)
def test_a_schedule_key_that_the_task_would_ignore_is_refused(key: str, value: object, used: str) -> None:
    fitting, other = (PRETRAIN, FINETUNE) if used == "pretrain" else (FINETUNE, PRETRAIN)
    assert (
        value_at(parse_recipe(changed(fitting, f"schedule.{key}", value), "r.yaml"), f"schedule.{key}")
        == value
    )
    [line] = problems(changed(other, f"schedule.{key}", value))
    assert line.startswith(f"r.yaml: schedule.{key}: only task '{used}' ")


@pytest.mark.parametrize(
    ("base", "named", "teacher"),
    [
        (FINETUNE, None, "self"),
        (FINETUNE, "none", "none"),
        (FINETUNE, "self", "self"),
        (PRETRAIN, None, "none"),
        (PRETRAIN, "none", "none"),
    ],
)
def test_the_teacher_follows_the_task_unless_named(
    base: dict[str, Any], named: str | None, teacher: str
) -> None:
    assert parse_recipe(changed(base, "distillation.teacher", named), "r.yaml").teacher == teacher


def test_named_teachers_stand_alone_and_each_may_have_a_weight() -> None:
    named = changed(PRETRAIN, "distillation.teachers", ["a.pth", "timm:net"])
    assert parse_recipe(named, "r.yaml").teacher == "named"
    assert parse_recipe(changed(named, "distillation.teacher_weights", [1, 2.5]), "r.yaml")
    assert problems(changed(named, "distillation.teacher_weights", [1])) == [
        "r.yaml: distillation.teacher_weights: found 1 weights, allowed: one for each of "
        "distillation.teachers, which are 2"
    ]
    assert problems(changed(named, "distillation.teacher", "none")) == [
        "r.yaml: distillation.teacher: found 'none', allowed beside distillation.teachers: null"
    ]


@pytest.mark.parametrize("key", ["weight", "temperature"])
def test_distillation_without_a_teacher_is_refused(key: str) -> None:
    named = changed(PRETRAIN, "distillation.teachers", ["a.pth"])
    assert parse_recipe(changed(named, f"distillation.{key}", 0.9), "r.yaml")
    assert problems(changed(PRETRAIN, f"distillation.{key}", 0.9)) == [
        f"r.yaml: distillation.{key}: not used without a teacher; name some with distillation.teachers, "
        "or remove it"
    ]


def test_a_temperature_that_falls_by_steps_must_end_binary() -> None:
    stepped = changed(PRETRAIN, "schedule.temperature.decay", 0.9)
    assert parse_recipe(changed(stepped, "schedule.epochs", 153), "r.yaml").schedule.epochs == 153
    for epochs in (1, 152):
        assert problems(changed(stepped, "schedule.epochs", epochs)) == [
            f"r.yaml: schedule.epochs: found {epochs}, allowed: at least 153; a temperature that falls from "
            "1.0 by a factor of 0.9 per epoch makes the weights binary after 153"
        ]
    [line] = problems(changed(changed(stepped, "schedule.epochs", 153), "schedule.temperature.share", 0.5))
    assert line.startswith("r.yaml: schedule.temperature.share: not used beside schedule.temperature.decay")


@pytest.mark.parametrize(("start", "decay"), [(1.0, 0.1), (1.0, 0.5), (2.0, 0.97), (1e-7, 0.9)])
def test_the_number_of_epochs_named_is_the_smallest_that_is_enough(start: float, decay: float) -> None:
    raw = changed(changed(PRETRAIN, "schedule.temperature.start", start), "schedule.temperature.decay", decay)
    needed = next(n for n in range(1, 1000) if start * decay**n < 1e-7)
    assert parse_recipe(changed(raw, "schedule.epochs", needed), "r.yaml")
    if needed > 1:
        [line] = problems(changed(raw, "schedule.epochs", needed - 1))
        assert f"allowed: at least {needed};" in line


def test_a_recipe_built_in_python_is_checked_like_one_from_a_file() -> None:
    sections = {"model": recipe_module.Model(), "data": recipe_module.Data()}
    assert Recipe(task="pretrain", **sections).teacher == "none"
    with pytest.raises(ValueError, match="quantization: missing"):
        Recipe(task="finetune", **sections)


def test_a_recipe_cannot_be_changed() -> None:
    recipe = parse_recipe(PRETRAIN, "r.yaml")
    for frozen, key in ((recipe, "seed"), (recipe.data, "batch_size"), (recipe.data.augment, "flip")):
        with pytest.raises(ValueError, match="frozen"):
            setattr(frozen, key, 1)


# ---- files


def test_numbers_are_read_as_people_write_them(folder: Path) -> None:
    text = "task: pretrain\nmodel: {}\ndata: {root: 2024-01-01}\noptimizer: {lr: %s}\n"
    for written, value in (("1e-3", 1e-3), ("2E-4", 2e-4), ("1.5e-3", 1.5e-3), (".5e-2", 5e-3), ("1", 1.0)):
        loaded = load_recipe(write(folder, text % written)).recipe
        assert (loaded.optimizer.lr, loaded.data.root) == (value, "2024-01-01")
    for written in ("1e-", "e-3", "'1e-3'", "1e999", ".nan"):
        [line] = file_problems(write(folder, text % written))
        assert line.startswith("r.yaml: optimizer.lr: found ")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("task: [pretrain\nmodel: {}\n", "r.yaml: line 2, column 6: not valid YAML: "),
        ("task: pretrain\n\tseed: 1\n", "r.yaml: line 2, column 1: not valid YAML: "),
        ("task: a\x00b\n", "r.yaml: line 1, column 8: "),
        (b"task: pretrain\nseed: \xff\n", "r.yaml: line 2: byte 0xff is not UTF-8"),
        ("task: !!python/object:os.system {}\n", "r.yaml: line 1, column 7: not valid YAML: "),
        ("task: !!int x\n", "r.yaml: not valid YAML: a value does not fit its type: "),
        ("task: !!bool x\n", "r.yaml: not valid YAML: a value does not fit its type: "),
        ("? [a]\n: 1\n", "r.yaml: line 1, column 3: not valid YAML: "),
        ("task: *a\n", "r.yaml: line 1, column 7: not valid YAML: "),
        ("task: pretrain\n---\ntask: pretrain\n", "r.yaml: line 2, column 1: not valid YAML: "),
        ("[" * 5000, "r.yaml: not valid YAML: nested too deeply"),
        ("", "r.yaml: found nothing at the top level, "),
        ("# only a comment\n", "r.yaml: found nothing at the top level, "),
        ("- task\n", "r.yaml: found ['task'] at the top level, "),
    ],
)
def test_a_file_that_is_not_yaml_is_refused_with_the_place(
    folder: Path, text: str | bytes, expected: str
) -> None:
    [line] = file_problems(write(folder, text))
    assert line.startswith(expected)


def test_keys_written_twice_are_refused_with_their_lines(folder: Path) -> None:
    text = "task: pretrain\nmodel: {}\ndata:\n  workers: 1\n  workers: 2\nmodel: {}\n"
    assert file_problems(write(folder, text)) == [
        "r.yaml: line 5: key 'workers' appears twice (first on line 4)",
        "r.yaml: line 6: key 'model' appears twice (first on line 2)",
    ]


def test_a_key_may_override_a_merged_one(folder: Path) -> None:
    text = (
        "task: finetune\nmodel: {checkpoint: a}\ndata: {}\nquantization:\n"
        "  se: &g {weight_bits: 4}\n  classifier: {<<: *g, weight_bits: 6}\n"
    )
    quantization = load_recipe(write(folder, text)).recipe.quantization
    assert quantization is not None
    assert (quantization.se.weight_bits, quantization.classifier.weight_bits) == (4, 6)


def test_a_byte_order_mark_is_skipped(folder: Path) -> None:
    assert (
        load_recipe(write(folder, b"\xef\xbb\xbftask: pretrain\nmodel: {}\ndata: {}\n")).recipe.task
        == "pretrain"
    )


def test_a_path_wins_over_a_packaged_name(folder: Path) -> None:
    assert load_recipe("tiny_int8").path == recipes_dir() / "tiny_int8.yaml"
    write(folder, "task: pretrain\nmodel: {}\ndata: {}\n", "tiny_int8")
    loaded = load_recipe("tiny_int8")
    assert (loaded.name, loaded.path, loaded.recipe.task) == ("tiny_int8", Path("tiny_int8"), "pretrain")


@pytest.mark.parametrize(
    "typed", ["tiny_int8", "tiny_int8.yaml", "recipes/tiny_int8.yaml", Path("tiny_int8")]
)
def test_a_packaged_recipe_is_found_from_anywhere(folder: Path, typed: str | Path) -> None:
    loaded = load_recipe(typed)
    assert (loaded.name, loaded.path) == ("tiny_int8", recipes_dir() / "tiny_int8.yaml")


@pytest.mark.parametrize("typed", ["other/tiny_int8.yaml", "./sub/recipes/tiny_int8.yaml", "tiny_int8.yml"])
def test_another_folder_is_taken_literally(folder: Path, typed: str) -> None:
    [line] = file_problems(typed)
    assert line.startswith(f"{typed!r}: no such recipe file (did you mean 'tiny_int8'?)")


def test_an_absent_recipe_is_refused_with_the_known_names(folder: Path) -> None:
    assert file_problems("tiny_int") == [
        "'tiny_int': no such recipe file (did you mean 'tiny_int8'?); recipes known by name: "
        + ", ".join(SHIPPED)
        + " (see `qat recipe list`)"
    ]
    [line] = file_problems("")
    assert line.startswith("'': no such recipe file; ")


def test_a_directory_is_refused_unless_a_packaged_recipe_has_its_name(folder: Path) -> None:
    (folder / "tiny_int8").mkdir()
    (folder / "mine").mkdir()
    assert load_recipe("tiny_int8").path == recipes_dir() / "tiny_int8.yaml"
    assert file_problems("mine") == ["mine: is a directory; a recipe is a YAML file"]


@pytest.mark.parametrize(
    ("typed", "why"), [("x" * 5000, "cannot be read: "), ("a\0b", "'a\\x00b': no such recipe file")]
)
def test_a_name_no_file_can_have_is_refused(folder: Path, typed: str, why: str) -> None:
    [line] = file_problems(typed)
    assert why in line


def test_an_installed_package_reads_the_recipes_inside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "qat"
    (package / "_recipes").mkdir(parents=True)
    (tmp_path / "recipes").mkdir()
    monkeypatch.setattr(recipefiles, "__file__", str(package / "recipe" / "files.py"))
    assert recipefiles.recipes_dir() == package.resolve() / "_recipes"
    (package / "_recipes").rmdir()
    assert recipefiles.recipes_dir() == tmp_path.resolve() / "recipes"


# ---- overrides


def test_overrides_change_values_at_every_level_and_the_last_one_wins() -> None:
    loaded = load_recipe(
        "tiny_int8",
        [
            "seed=3",
            "optimizer.lr=1e-2",
            "quantization.se.weight_bits=6",
            "quantization.se.weight_bits=4",
            "quantization.exclude=[fc]",
            "data.augment={flip: true}",
            "data.root=a=b",
            "output.dir=out",
        ],
    ).recipe
    assert (loaded.seed, loaded.optimizer.lr, loaded.data.root, loaded.output.dir) == (3, 0.01, "a=b", "out")
    assert loaded.quantization is not None
    assert (loaded.quantization.se.weight_bits, loaded.quantization.exclude) == (4, ["fc"])
    assert loaded.data.augment == recipe_module.Augment(flip=True)
    untouched = load_recipe("tiny_int8").recipe
    assert (untouched.seed, untouched.optimizer.lr) == (0, 2e-4)


def test_an_override_creates_the_sections_it_needs(folder: Path) -> None:
    path = write(folder, "task: pretrain\nmodel: {}\ndata: {}\nschedule:\n")
    loaded = load_recipe(path, ["schedule.temperature.share=0.3", "output.dir=out"]).recipe
    assert (loaded.schedule.temperature.share, loaded.output.dir) == (0.3, "out")
    # Without the override the empty section is what it was: null.
    assert file_problems(path)[0].startswith("r.yaml: schedule: found null, ")


def test_an_override_leaves_a_section_that_shares_an_anchor_alone(folder: Path) -> None:
    text = (
        "task: finetune\nmodel: {checkpoint: a}\ndata: {}\n"
        "quantization: {se: &g {weight_bits: 4}, classifier: *g}\n"
    )
    quantization = load_recipe(write(folder, text), ["quantization.se.weight_bits=2"]).recipe.quantization
    assert quantization is not None
    assert (quantization.se.weight_bits, quantization.classifier.weight_bits) == (2, 4)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("seed", "--set seed: has no '='; write section.key=value"),
        ("=1", "--set =1: has an empty key; write section.key=value"),
        ("data.=1", "--set data.=1: has an empty key; write section.key=value"),
        ("seed=", "--set seed=: has no value; write seed=null for none"),
        ("task.a=1", "--set task.a=1: task holds a value, not a section: it has no keys to set"),
        ("seed=-1", "--set seed=-1: seed: found -1, allowed: an integer >= 0 and < 4294967296"),
        ("optimiser.lr=1", "--set optimiser.lr=1: optimiser: unknown key (did you mean 'optimizer'?)"),
        (
            "quantization.se.weight_bit=4",
            "--set quantization.se.weight_bit=4: quantization.se.weight_bit: unknown key "
            "(did you mean 'weight_bits'?)",
        ),
        (
            "model={}",
            "--set model={}: model.checkpoint: missing; task 'finetune' starts from a trained network",
        ),
    ],
)
def test_a_broken_override_is_refused_under_its_own_text(text: str, line: str) -> None:
    assert file_problems("tiny_int8", text) == [line]


def test_an_override_that_is_not_yaml_is_refused_with_the_place() -> None:
    [line] = file_problems("tiny_int8", "data.mean=[0, 0")
    assert line.startswith("--set data.mean=[0, 0: line 1, column 6: not valid YAML: ")


def test_problems_of_the_file_and_of_overrides_are_reported_together(folder: Path) -> None:
    path = write(folder, "task: pretrain\nseed: -1\nmodel: {}\ndata: {}\n")
    assert file_problems(path, "seed", "optimizer.lr=0", "output.dirs=x") == [
        "--set seed: has no '='; write section.key=value",
        "r.yaml: seed: found -1, allowed: an integer >= 0 and < 4294967296",
        "--set optimizer.lr=0: optimizer.lr: found 0, allowed: a number > 0",
        "--set output.dirs=x: output.dirs: unknown key (did you mean 'dir'?)",
    ]


def test_an_override_mends_what_the_file_has_wrong(folder: Path) -> None:
    path = write(folder, "task: pretrain\nseed: -1\nmodel: {}\ndata: {}\n")
    assert len(file_problems(path)) == 1
    assert load_recipe(path, ["seed=1"]).recipe.seed == 1


# ---- writing


@pytest.mark.parametrize("name", SHIPPED)
def test_a_written_recipe_loads_back_equal(name: str, folder: Path) -> None:
    recipe = load_recipe(name).recipe
    text = recipe_yaml(recipe)
    assert load_recipe(write(folder, text)).recipe == recipe
    assert parse_recipe(yaml.safe_load(text), "r.yaml") == recipe
    assert recipe_yaml(load_recipe("r.yaml").recipe) == text


def test_a_written_recipe_has_every_key() -> None:
    recipe = parse_recipe(FINETUNE, "r.yaml")
    written = yaml.safe_load(recipe_yaml(recipe))
    assert list(written) == list(Recipe.model_fields)
    assert leaves(written) == leaves(recipe.model_dump())


@pytest.mark.parametrize("text", ["1e3", "2024-01-01", "null", "yes", "010", "a: b", "ü\n#", " x "])
def test_a_text_that_looks_like_something_else_survives_writing(text: str, folder: Path) -> None:
    recipe = parse_recipe(changed(PRETRAIN, "data.root", text), "r.yaml")
    assert load_recipe(write(folder, recipe_yaml(recipe))).recipe.data.root == text


# ---- schema


def test_the_schema_describes_every_key_and_section() -> None:
    schema = recipe_schema()
    described = {"Recipe": schema, **schema["$defs"]}
    names = {cls.__name__ for cls in Section.__subclasses__()} | {"Group"}
    assert set(described) == names
    for name, section in described.items():
        assert section["additionalProperties"] is False, name
        assert section["description"].strip(), name
        assert set(section["properties"]) == set(getattr(recipe_module, name).model_fields), name
        for key, entry in section["properties"].items():
            assert len(entry.get("description", "")) > 10, f"{name}.{key}"


def test_the_schema_requires_what_has_no_default() -> None:
    schema = recipe_schema()
    assert schema["required"] == ["task", "model", "data"]
    required = {
        name: section["required"] for name, section in schema["$defs"].items() if "required" in section
    }
    assert required == {"LayerOverride": ["match"]}


# ---- copying


def test_a_copied_recipe_keeps_its_comments_and_loads(folder: Path) -> None:
    original = (recipes_dir() / "tiny_int8.yaml").read_bytes()
    assert copy_recipe("tiny_int8", "mine.yaml") == Path("mine.yaml")
    (folder / "sub").mkdir()
    assert copy_recipe("tiny_int8", folder / "sub") == folder / "sub" / "tiny_int8.yaml"
    assert (folder / "mine.yaml").read_bytes() == (folder / "sub" / "tiny_int8.yaml").read_bytes() == original
    assert load_recipe("mine.yaml").recipe == load_recipe("tiny_int8").recipe


def test_a_file_is_overwritten_only_when_forced(folder: Path) -> None:
    write(folder, "precious", "mine.yaml")
    with pytest.raises(OutputError, match=r"mine\.yaml: exists already; overwrite it with --force"):
        copy_recipe("tiny_int8", "mine.yaml")
    assert (folder / "mine.yaml").read_text() == "precious"
    copy_recipe("tiny_int8", "mine.yaml", force=True)
    assert (folder / "mine.yaml").read_bytes() == (recipes_dir() / "tiny_int8.yaml").read_bytes()


def test_a_copy_that_cannot_be_written_or_read_is_refused(folder: Path) -> None:
    with pytest.raises(OutputError, match=r"r\.yaml: cannot be written: No such file or directory"):
        copy_recipe("tiny_int8", folder / "absent" / "r.yaml")
    with pytest.raises(RecipeError, match="did you mean 'tiny_int8'"):
        copy_recipe("tiny_int", "r.yaml")
    assert list(folder.iterdir()) == []


# ---- checkpoints


def test_a_checkpoint_is_looked_up_beside_the_recipe_then_here_then_packaged(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packaged = folder / "packaged"
    monkeypatch.setattr(recipe_module, "recipes_dir", lambda: packaged)
    beside = folder / "beside"
    for place in (packaged, beside):
        place.mkdir()
    write(beside, yaml.safe_dump(FINETUNE))
    loaded = load_recipe("beside/r.yaml")
    for place in (packaged, folder, beside):  # from the last place looked at to the first
        write(place, "", "a.safetensors")
        assert resolve_checkpoint(loaded) == place / "a.safetensors"
    absolute = load_recipe("beside/r.yaml", [f"model.checkpoint={packaged / 'a.safetensors'}"])
    assert resolve_checkpoint(absolute) == packaged / "a.safetensors"


def test_an_absent_checkpoint_is_refused_with_the_places_looked_at(folder: Path) -> None:
    write(folder, yaml.safe_dump(FINETUNE))
    (folder / "a.safetensors").mkdir()  # a folder is no checkpoint
    with pytest.raises(RecipeError) as caught:
        resolve_checkpoint(load_recipe("r.yaml"))
    assert str(caught.value) == (
        "r.yaml: model.checkpoint: found no file 'a.safetensors'; looked for a.safetensors, "
        f"{recipes_dir() / 'a.safetensors'}"
    )
    with pytest.raises(RecipeError, match=r"r\.yaml: model\.checkpoint: found no file 'x{4000}"):
        resolve_checkpoint(load_recipe("r.yaml", ["model.checkpoint=" + "x" * 4000]))


def test_a_recipe_without_checkpoint_has_none_to_resolve() -> None:
    with pytest.raises(RecipeError, match=r"model\.checkpoint: missing"):
        resolve_checkpoint(load_recipe("tiny_digits_pretrain"))
