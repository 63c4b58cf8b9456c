"""Pretraining and quantization-aware fine-tuning: one loop, two ways into it."""

from __future__ import annotations

import copy
import json
import math
import platform
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qat import __version__
from qat.augment import Augmenter, image_grid, normalize
from qat.bnext import Architecture, BNext, binary_convolutions, is_binary, set_temperature
from qat.checkpoint import load_checkpoint, load_state, save_checkpoint, without_quantizers
from qat.data import Split, check_fits, load_splits
from qat.errors import CheckpointError, DataError, RecipeError, TrainingError
from qat.evaluate import Accuracy, correct_in_top, evaluate, predictor
from qat.fakequant import freeze_observers
from qat.prepare import calibrate, prepare, quantization_map
from qat.recipe import LoadedRecipe, Optimizer, Recipe, Temperature, resolve_checkpoint
from qat.rundir import SUMMARY, RunDirectory


class Reporter(Protocol):
    """What a training run tells whoever watches it."""

    def message(self, text: str) -> None:
        """One line of news."""

    def warning(self, text: str) -> None:
        """Something the user should know and may want to change."""

    def start(self, epochs: int, steps: int) -> None:
        """Training begins: ``epochs`` of ``steps`` batches."""

    def step(self, epoch: int, metrics: Mapping[str, float]) -> None:
        """One batch is done: loss, top1 (percent), images_per_second, all running means of the epoch."""

    def epoch(self, metrics: Mapping[str, Any]) -> None:
        """One epoch is done, with its metrics."""

    def stop(self) -> None:
        """Training is over, well or not."""


@dataclass
class _Job:
    """Everything the loop works on."""

    recipe: Recipe
    model: BNext
    train: Split
    test: Split
    device: torch.device
    run: RunDirectory
    report: Reporter
    teacher: BNext | None = None
    #: Called before each step with the share of all steps that are done.
    before_step: Callable[[float], None] = lambda share: None
    metadata: dict[str, str] = field(default_factory=dict)
    best: Accuracy | None = None
    best_epoch: int | None = None


def finetune(loaded: LoadedRecipe, report: Reporter) -> RunDirectory:
    """Calibrate and fine-tune a pretrained binary network with fake quantization.

    Args:
        loaded: a recipe with ``task: finetune``.
        report: told about progress.

    Returns:
        The finished run's directory.

    Raises:
        QatError: see the tree in :mod:`qat.errors`.
    """
    recipe = _for_task(loaded, "finetune")
    assert recipe.quantization is not None  # the schema requires it for this task
    device = _start(recipe)
    train, test = _data(recipe)
    float_model = _pretrained(loaded, report).to(device)
    model = copy.deepcopy(float_model)
    prepare(model, recipe.quantization, image_grid(recipe.data.mean, recipe.data.std))
    run = RunDirectory.create(loaded)
    report.message(f"{float_model.architecture}, run directory {run.path}")

    float_accuracy = evaluate(predictor(float_model), test, recipe.data, device)
    report.message(f"float rest: top-1 {float_accuracy.top1:.2f}% of {float_accuracy.n} images")
    calibrate(model, lambda: _calibration_pass(model, train, recipe, device))
    calibrated = evaluate(predictor(model), test, recipe.data, device)
    points = quantization_map(model)
    report.message(
        f"calibrated {len(points)} quantization points: top-1 {calibrated.top1:.2f}% before training"
    )
    run.write_json("quantization.json", points)

    if recipe.schedule.freeze_binary:
        for conv in binary_convolutions(model).values():
            conv.weight.requires_grad_(False)
    job = _Job(recipe, model, train, test, device, run, report, metadata=_metadata(train, test))
    if recipe.teacher == "self":
        job.teacher = float_model.eval().requires_grad_(False)
    job.before_step = lambda share: _apply_freezes(model, recipe, share)
    _keep(job, 0, calibrated)
    started = time.time()
    _fit(job)
    assert job.best is not None
    _summarize(job, started, {"float": asdict(float_accuracy), "calibrated": asdict(calibrated)}, "int8")
    report.message(
        f"int8: top-1 {job.best.top1:.2f}% (epoch {job.best_epoch}), "
        f"{job.best.top1 - float_accuracy.top1:+.2f} points against float rest"
    )
    return run


def pretrain(loaded: LoadedRecipe, report: Reporter) -> RunDirectory:
    """Train a binary network from random weights, annealing the weight temperature to binary.

    Args:
        loaded: a recipe with ``task: pretrain``.
        report: told about progress.

    Returns:
        The finished run's directory; ``best`` is the best epoch whose weights were exactly ±1.
    """
    recipe = _for_task(loaded, "pretrain")
    device = _start(recipe)
    train, test = _data(recipe)
    model = BNext.from_architecture(_architecture(recipe))
    if recipe.model.checkpoint is not None:
        load_state(
            model, without_quantizers(load_checkpoint(resolve_checkpoint(loaded), latent=recipe.model.latent))
        )
    model.to(device)
    run = RunDirectory.create(loaded)
    report.message(f"{model.architecture}, run directory {run.path}")
    job = _Job(recipe, model, train, test, device, run, report, metadata=_metadata(train, test))
    job.before_step = lambda share: set_temperature(model, temperature_at(recipe.schedule.temperature, share))
    started = time.time()
    _fit(job)
    assert job.best is not None  # the schema puts the end of the annealing below 1e-7
    _summarize(job, started, {}, "binary")
    report.message(f"binary: top-1 {job.best.top1:.2f}% of {job.best.n} images (epoch {job.best_epoch})")
    return run


def temperature_at(schedule: Temperature, share: float) -> float:
    """Weight temperature after ``share`` of the training: geometric from start to end, then constant."""
    progress = min(share / schedule.share, 1.0)
    return schedule.end if progress == 1.0 else schedule.start * (schedule.end / schedule.start) ** progress


def learning_rate_factor(optimizer: Optimizer, step: int, steps: int) -> float:
    """Factor of the peak learning rate at ``step`` of ``steps``: linear warm-up, then a cosine."""
    warmup = optimizer.warmup * steps
    if step < warmup:
        return (step + 1) / (warmup + 1)
    progress = (step - warmup) / max(steps - warmup, 1)
    return optimizer.min_lr + (1.0 - optimizer.min_lr) * 0.5 * (1.0 + math.cos(math.pi * min(progress, 1.0)))


def distillation_loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """``T² · KL(softmax(teacher / T) ‖ softmax(student / T))``, mean over the batch, in nats.

    Hinton et al. 2015 (arXiv 1503.02531); the factor keeps the gradient's size independent of ``T``.
    """
    log_student = F.log_softmax(student / temperature, dim=1)
    log_teacher = F.log_softmax(teacher / temperature, dim=1)
    return F.kl_div(log_student, log_teacher, reduction="batchmean", log_target=True) * temperature**2


def _fit(job: _Job) -> None:
    recipe, model = job.recipe, job.model
    epochs = recipe.schedule.epochs
    steps = job.train.batch_count(recipe.data.batch_size, drop_last=True)
    optimizer = make_optimizer(model, recipe.optimizer)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: learning_rate_factor(recipe.optimizer, step, epochs * steps)
    )
    augment = Augmenter(recipe.data.augment, recipe.data.image_size, recipe.seed)
    job.report.start(epochs, steps)
    try:
        for epoch in range(1, epochs + 1):
            metrics = _epoch(job, epoch, steps, optimizer, scheduler, augment)
            accuracy = _evaluate(job, epoch)
            metrics |= {"test_top1": accuracy.top1, "test_top5": accuracy.top5, "test_loss": accuracy.loss}
            job.run.log(metrics)
            _keep(job, epoch, accuracy)
            job.report.epoch(metrics)
    finally:
        job.report.stop()


def _evaluate(job: _Job, epoch: int) -> Accuracy:
    """Accuracy on the test split; a network that computes no numbers any more ends the training."""
    accuracy = evaluate(predictor(job.model), job.test, job.recipe.data, job.device)
    if not math.isfinite(accuracy.loss):
        raise TrainingError(_not_finite(job, f"epoch {epoch}", "test loss", accuracy.loss))
    return accuracy


def _epoch(
    job: _Job,
    epoch: int,
    steps: int,
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
    augment: Augmenter,
) -> dict[str, Any]:
    recipe, model, device = job.recipe, job.model, job.device
    seen, correct, loss_sum, started = 0, 0, 0.0, time.perf_counter()
    learning_rate = 0.0
    batches = job.train.batches(recipe.data.batch_size, shuffle_seed=recipe.seed + epoch, drop_last=True)
    for step, (images, labels) in enumerate(batches):
        model.train()
        job.before_step(((epoch - 1) * steps + step) / (recipe.schedule.epochs * steps))
        images = normalize(augment(images.to(device), epoch, step), recipe.data.mean, recipe.data.std)
        labels = labels.to(device)
        logits = model(images)
        loss = F.cross_entropy(logits, labels)
        if job.teacher is not None:
            with torch.no_grad():
                target = job.teacher(images)
            distilled = distillation_loss(logits, target, recipe.distillation.temperature)
            loss = torch.lerp(loss, distilled, recipe.distillation.weight)
        value = float(loss.detach())
        if not math.isfinite(value):
            raise TrainingError(_not_finite(job, f"epoch {epoch}, step {step + 1}", "loss", value))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it without types
        if recipe.optimizer.clip_norm is not None:
            nn.utils.clip_grad_norm_(model.parameters(), recipe.optimizer.clip_norm)
        learning_rate = float(scheduler.get_last_lr()[-1])
        optimizer.step()
        scheduler.step()
        seen += len(labels)
        correct += correct_in_top(logits.detach(), labels, 1)
        loss_sum += value * len(labels)
        rate = seen / (time.perf_counter() - started)
        job.report.step(
            epoch, {"loss": loss_sum / seen, "top1": 100.0 * correct / seen, "images_per_second": rate}
        )
    # A last step that spoils the weights shows in no loss any more, and a network with NaN must not go on
    # to be evaluated: its integers have no meaning.
    spoilt = next((name for name, value in model.state_dict().items() if _has_nan(value)), None)
    if spoilt is not None:
        raise TrainingError(_not_finite(job, f"epoch {epoch}, step {steps}", spoilt, math.nan))
    # What is evaluated and kept is the network as the schedule has it now, not one step earlier: annealing
    # that ends with the training would otherwise never reach its end.
    job.before_step(epoch / recipe.schedule.epochs)
    return {
        "epoch": epoch,
        "loss": loss_sum / seen,
        "top1": 100.0 * correct / seen,
        "learning_rate": learning_rate,
        "temperature": float(next(iter(binary_convolutions(model).values())).temperature),
        "images_per_second": seen / (time.perf_counter() - started),
        "seconds": time.perf_counter() - started,
    }


def make_optimizer(model: nn.Module, settings: Optimizer) -> torch.optim.Optimizer:
    """Optimizer with three groups: binary latent weights, matrices (decayed), vectors.

    Latent weights are not decayed: only their sign counts, and decay would move all of them towards the
    point where it flips. Parameters that need no gradient are left out.
    """
    binary = {id(conv.weight) for conv in binary_convolutions(model).values()}
    groups: dict[str, list[nn.Parameter]] = {"binary": [], "matrix": [], "vector": []}
    for parameter in model.parameters():
        if parameter.requires_grad:
            matrix = parameter.ndim >= 2 and parameter[0].numel() > 1 and parameter.shape[0] > 1
            kind = "binary" if id(parameter) in binary else "matrix" if matrix else "vector"
            groups[kind].append(parameter)
    options: list[dict[str, Any]] = [
        {"params": groups["binary"], "lr": settings.binary_lr or settings.lr, "weight_decay": 0.0},
        {"params": groups["matrix"], "lr": settings.lr, "weight_decay": settings.weight_decay},
        {"params": groups["vector"], "lr": settings.lr, "weight_decay": 0.0},
    ]
    options = [group for group in options if group["params"]]
    if settings.name == "sgd":
        return torch.optim.SGD(
            options, lr=settings.lr, momentum=settings.momentum, nesterov=settings.momentum > 0
        )
    return torch.optim.AdamW(options, lr=settings.lr, fused=True)


def _apply_freezes(model: BNext, recipe: Recipe, share: float) -> None:
    """Fix observers and batch-norm statistics once their share of the training is over."""
    if share >= recipe.schedule.freeze_observers:
        freeze_observers(model)
    if share >= recipe.schedule.freeze_batch_norm:
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()


def _keep(job: _Job, epoch: int, accuracy: Accuracy) -> None:
    """Write the last checkpoint, and the best one if this is it. Networks not yet binary can't be best."""
    recipe = job.recipe
    better = job.best is None or (accuracy.top1, -accuracy.loss) > (job.best.top1, -job.best.loss)
    targets = [job.run.last]
    if better and is_binary(job.model):
        job.best, job.best_epoch = accuracy, epoch
        targets.append(job.run.best)
    metadata = job.metadata | {"epoch": str(epoch), "accuracy": accuracy.to_json()}
    for path in targets:
        try:
            save_checkpoint(
                path, job.model, recipe=recipe, metadata=metadata, float_dtype=recipe.output.float_weights
            )
        except CheckpointError as error:  # values that the file can't hold: of the training, not of the user
            raise TrainingError(f"epoch {epoch}: {error}; {_kept(job)}") from error


def _summarize(job: _Job, started: float, accuracies: dict[str, Any], name: str) -> None:
    assert job.best is not None
    job.run.write_json(
        SUMMARY,
        {
            "task": job.recipe.task,
            "architecture": str(job.model.architecture),
            **accuracies,
            name: asdict(job.best),
            "best_epoch": job.best_epoch,
            "checkpoint": job.run.best.name,
            "seconds": time.time() - started,
            "finished": time.time(),
            "data": {"train": job.metadata["train_fingerprint"], "test": job.metadata["test_fingerprint"]},
            "versions": json.loads(job.metadata["versions"]),
        },
    )


def _calibration_pass(model: BNext, train: Split, recipe: Recipe, device: torch.device) -> None:
    """Some batches of clean training images, in an order that depends on the seed alone."""
    batches = train.batches(recipe.data.batch_size, shuffle_seed=recipe.seed)
    for _, (images, _) in zip(range(recipe.schedule.calibration_batches), batches, strict=False):
        if images.shape[-1] != recipe.data.image_size:  # larger where training crops at random
            images = _centre(images, recipe.data.image_size)
        model(normalize(images.to(device), recipe.data.mean, recipe.data.std))


def _centre(images: Tensor, side: int) -> Tensor:
    top, left = ((length - side) // 2 for length in images.shape[-2:])
    return images[..., top : top + side, left : left + side]


def _pretrained(loaded: LoadedRecipe, report: Reporter) -> BNext:
    """The recipe's network with the weights of its checkpoint."""
    recipe = loaded.recipe
    path = resolve_checkpoint(loaded)
    architecture = _architecture(recipe)
    checkpoint = load_checkpoint(path, latent=recipe.model.latent, stem_stride=architecture.stem_stride)
    if checkpoint.quantization is not None:
        report.warning(f"{path}: already fine-tuned; starting from its weights, its ranges are found anew")
    model = BNext.from_architecture(architecture)
    load_state(model, without_quantizers(checkpoint))
    if not is_binary(model):
        worst = max(float(conv.temperature) for conv in binary_convolutions(model).values())
        raise CheckpointError(
            f"{path}: the weights in use are not binary yet: the temperature is {worst:.3g}, binary "
            "means below 1e-7. Train on until it has annealed (qat pretrain)"
        )
    if checkpoint.recipe is not None:
        for key in ("image_size", "mean", "std"):
            trained, asked = getattr(checkpoint.recipe.data, key), getattr(recipe.data, key)
            if trained != asked:
                report.warning(f"data.{key} is {asked}, the checkpoint was trained with {trained}")
    return model


def _architecture(recipe: Recipe) -> Architecture:
    model = recipe.model
    return Architecture.of(
        model.size,
        model.num_classes,
        widths=model.widths,
        stem_stride=model.stem_stride,
        elm_attention=model.elm_attention,
        infor_recoupling=model.infor_recoupling,
    )


def _data(recipe: Recipe) -> tuple[Split, Split]:
    train, test = load_splits(recipe.data)
    for split in (train, test):
        check_fits(split, recipe.model.num_classes)
    if recipe.schedule.epochs and not train.batch_count(recipe.data.batch_size, drop_last=True):
        raise DataError(
            f"data.batch_size: {recipe.data.batch_size} is more than the {len(train)} training images"
        )
    return train, test


def _start(recipe: Recipe) -> torch.device:
    """Seed, thread count and device of a run."""
    torch.manual_seed(recipe.seed)
    if recipe.threads is not None:
        torch.set_num_threads(recipe.threads)
    return choose_device(recipe.device)


def choose_device(name: str) -> torch.device:
    """The device called ``name``; ``auto`` is CUDA where there is one, else the CPU.

    Raises:
        RecipeError: the device isn't there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.zeros(1, device=name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().splitlines()[0]
        raise RecipeError(f"device: {name!r} cannot be used here: {reason}") from error
    return torch.device(name)


def _for_task(loaded: LoadedRecipe, task: str) -> Recipe:
    if loaded.recipe.task != task:
        raise RecipeError(
            f"{loaded.path}: task: this recipe is for `qat {loaded.recipe.task}`, not `qat {task}`"
        )
    return loaded.recipe


def _metadata(train: Split, test: Split) -> dict[str, str]:
    return {
        "class_names": json.dumps(test.class_names),
        "train_fingerprint": train.fingerprint(),
        "test_fingerprint": test.fingerprint(),
        "versions": json.dumps(dict(_versions())),
    }


def _versions() -> Iterator[tuple[str, str]]:
    yield "bnext-qat", __version__
    yield "python", platform.python_version()
    for name in ("torch", "numpy"):
        yield name, version(name)


def _has_nan(value: Tensor) -> bool:
    return value.is_floating_point() and bool(value.isnan().any())


def _not_finite(job: _Job, when: str, what: str, value: float) -> str:
    return (
        f"{when}: the {what} is {value}, training stops; {_kept(job)}. "
        "A smaller optimizer.lr or an optimizer.clip_norm may help"
    )


def _kept(job: _Job) -> str:
    if job.run.last.exists():
        return f"the last good checkpoint is {job.run.last}"
    return "no checkpoint was written yet"
