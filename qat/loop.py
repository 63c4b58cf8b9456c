"""The training loop: schedules, losses, optimizer groups, one epoch after another, and what is kept.

It knows nothing of pretraining or fine-tuning: :mod:`qat.train` makes a :class:`Job` of either.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qat.augment import Augmenter, normalize
from qat.bnext import BNext, binary_convolutions, is_binary
from qat.checkpoint import as_stored, save_checkpoint
from qat.data import Split
from qat.errors import CheckpointError, QuantizationError, Stopped, TrainingError
from qat.evaluate import Accuracy, Predict, correct_in_top, evaluate, predictor
from qat.recipe import Optimizer, Recipe, Temperature
from qat.resume import Parts, begun, capture, restore, resume_command
from qat.rundir import RunDirectory
from qat.statefile import Running, State, write_state
from qat.stopping import StopRequest


class Reporter(Protocol):
    """What a training run tells whoever watches it."""

    def message(self, text: str) -> None:
        """One line of news."""

    def warning(self, text: str) -> None:
        """Something the user should know and may want to change."""

    def start(self, epochs: int, steps: int, done: int = 0) -> None:
        """Training begins: ``epochs`` of ``steps`` batches, of which ``done`` are behind a resumed run."""

    def step(self, epoch: int, metrics: Mapping[str, float]) -> None:
        """One batch is done: loss, top1 (percent), images_per_second, all running means of the epoch."""

    def epoch(self, metrics: Mapping[str, Any]) -> None:
        """One epoch is done, with its metrics."""

    def stop(self) -> None:
        """Training is over, well or not."""


@dataclass
class Job:
    """Everything the loop works on, how far it is, and the best epoch so far.

    ``epoch`` counts whole epochs, ``accuracy`` is the one after the last of them and ``rows`` are their
    metrics; ``running`` is the epoch after these.
    """

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
    epoch: int = 0
    accuracy: Accuracy | None = None
    rows: list[dict[str, Any]] = field(default_factory=list)
    running: Running = field(default_factory=Running)
    #: Before training, by name.
    accuracies: dict[str, Accuracy] = field(default_factory=dict)
    #: Where to go on; ``None`` for a run that begins.
    state: State | None = None
    stop: StopRequest = field(default_factory=StopRequest)
    #: When it began, and the seconds it had taken before that if it was resumed.
    started: float = field(default_factory=time.time)
    seconds_before: float = 0.0

    @property
    def seconds(self) -> float:
        """What the run took so far, without the time that it lay idle."""
        return self.seconds_before + time.time() - self.started

    def check_stop(self) -> None:
        """Raise ``Stopped`` where SIGTERM asked for it."""
        if self.stop.requested:
            again = resume_command(self.recipe.task, self.run.path)
            raise Stopped(f"stopped by SIGTERM, everything is saved; go on with: {again}")

    def predictor(self, model: BNext) -> Predict:
        """:func:`qat.evaluate.predictor` of ``model`` that ends between two batches where SIGTERM asks."""
        predict = predictor(model)

        def stoppable(images: Tensor) -> Tensor:
            self.check_stop()
            return predict(images)

        return stoppable


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


def fit(job: Job) -> None:
    """Train for the recipe's epochs, or for those that ``job.state`` leaves; each is evaluated and kept.

    The state is saved first and the rest made of it: metrics and checkpoints never run ahead of what a
    resumed run knows.

    Raises:
        Stopped: SIGTERM came; the state is saved.
        TrainingError: a loss or a tensor is not finite any more.
        CheckpointError: ``job.state`` is of another network.
        OutputError: the run's directory can't be written.
    """
    recipe, model = job.recipe, job.model
    epochs = recipe.schedule.epochs
    steps = job.train.batch_count(recipe.data.batch_size, drop_last=True)
    optimizer = make_optimizer(model, recipe.optimizer)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: learning_rate_factor(recipe.optimizer, step, epochs * steps)
    )
    augment = Augmenter(recipe.data.augment, recipe.data.image_size, recipe.seed)
    parts = Parts(model, optimizer, scheduler, job.device)
    if job.state is None:
        _save(job, parts)
    else:
        restore(parts, job.state)
    job.run.rewrite_log(job.rows)  # it may have lines from beyond the state
    # Of a resumed run, too, which may have ended before it kept the epoch.
    if job.accuracy is not None and not job.running.step:
        keep(job, job.epoch, job.accuracy)
    job.report.start(epochs, steps, job.epoch * steps + job.running.step)
    try:
        for epoch in range(job.epoch + 1, epochs + 1):
            metrics = _epoch(job, epoch, steps, parts, augment)
            accuracy = _evaluate(job, epoch)
            metrics |= {"test_top1": accuracy.top1, "test_top5": accuracy.top5, "test_loss": accuracy.loss}
            job.epoch, job.accuracy, job.running = epoch, accuracy, Running()
            job.rows.append(metrics)
            _save(job, parts)
            job.run.log(metrics)
            keep(job, epoch, accuracy)
            job.report.epoch(metrics)
            if epoch < epochs:
                job.check_stop()
    except Stopped:
        if job.running.step:  # else nothing was done since the last one
            _save(job, parts)
        raise
    finally:
        job.report.stop()


def _save(job: Job, parts: Parts) -> None:
    tensors, fields = capture(parts)
    record = begun(job.recipe, job.metadata, job.device).model_copy(
        update={
            "epoch": job.epoch,
            "running": job.running,
            "rows": job.rows,
            "accuracy": job.accuracy,
            "best": job.best,
            "best_epoch": job.best_epoch,
            "accuracies": job.accuracies,
            "seconds": job.seconds,
            **fields,
        }
    )
    write_state(job.run.path, record, tensors, job.recipe.schedule.keep_states)


def _epoch(job: Job, epoch: int, steps: int, parts: Parts, augment: Augmenter) -> dict[str, Any]:
    recipe, model, device, sums = job.recipe, job.model, job.device, job.running
    optimizer, scheduler, save_steps = parts.optimizer, parts.scheduler, recipe.schedule.save_steps
    started = time.perf_counter() - sums.seconds
    batches = job.train.batches(
        recipe.data.batch_size, shuffle_seed=recipe.seed + epoch, drop_last=True, skip=sums.step
    )
    for step, (images, labels) in enumerate(batches, start=sums.step):
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
        sums.learning_rate = float(scheduler.get_last_lr()[-1])
        optimizer.step()
        scheduler.step()
        sums.step = step + 1
        sums.seen += len(labels)
        sums.correct += correct_in_top(logits.detach(), labels, 1)
        sums.loss_sum += value * len(labels)
        sums.seconds = time.perf_counter() - started
        job.report.step(epoch, _means(sums))
        job.check_stop()
        if save_steps and ((epoch - 1) * steps + sums.step) % save_steps == 0:
            _save(job, parts)
    # A last step that spoils the weights shows in no loss any more, and a network with NaN must not go on
    # to be evaluated: its integers have no meaning.
    spoilt = next((name for name, value in model.state_dict().items() if _has_nan(value)), None)
    if spoilt is not None:
        raise TrainingError(_not_finite(job, f"epoch {epoch}, step {steps}", spoilt, math.nan))
    # What is evaluated and kept is the network as the schedule has it now, not one step earlier: annealing
    # that ends with the training would otherwise never reach its end.
    job.before_step(epoch / recipe.schedule.epochs)
    means = _means(sums)
    return {
        "epoch": epoch,
        **{key: means[key] for key in ("loss", "top1")},
        "learning_rate": sums.learning_rate,
        "temperature": float(next(iter(binary_convolutions(model).values())).temperature),
        "images_per_second": means["images_per_second"],
        "seconds": sums.seconds,
    }


def _means(sums: Running) -> dict[str, float]:
    return {
        "loss": sums.loss_sum / sums.seen,
        "top1": 100.0 * sums.correct / sums.seen,
        "images_per_second": sums.seen / sums.seconds,
    }


def _evaluate(job: Job, epoch: int) -> Accuracy:
    """Accuracy on the test split; a network that computes no numbers any more ends the training."""
    try:
        # As stored: rounding to half precision may move an image or two, and the file is what is used.
        model = as_stored(job.model, job.recipe.output.float_weights)
        accuracy = evaluate(job.predictor(model), job.test, job.recipe.data, job.device)
    except QuantizationError as error:  # constants that are no numbers
        raise TrainingError(_not_finite(job, f"epoch {epoch}", "test loss", math.nan)) from error
    if not math.isfinite(accuracy.loss):
        raise TrainingError(_not_finite(job, f"epoch {epoch}", "test loss", accuracy.loss))
    return accuracy


def keep(job: Job, epoch: int, accuracy: Accuracy) -> None:
    """Write the last checkpoint, and the best one if this is it. Networks not yet binary can't be best.

    Raises:
        TrainingError: a tensor holds values that the file can't.
        OutputError: the run's directory can't be written.
    """
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


def _has_nan(value: Tensor) -> bool:
    return value.is_floating_point() and bool(value.isnan().any())


def _not_finite(job: Job, when: str, what: str, value: float) -> str:
    return (
        f"{when}: the {what} is {value}, training stops; {_kept(job)}. "
        "A smaller optimizer.lr or an optimizer.clip_norm may help"
    )


def _kept(job: Job) -> str:
    if job.run.last.exists():
        return f"the last good checkpoint is {job.run.last}"
    return "no checkpoint was written yet"
