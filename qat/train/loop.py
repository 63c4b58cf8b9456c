"""The training loop: one epoch after another, and what is kept.

It knows nothing of pretraining or fine-tuning: :mod:`qat.train.finetuning` makes a :class:`Job` of either.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qat.checkpoints.format import as_stored, save_checkpoint
from qat.data.augment import Augmenter, normalize
from qat.data.mixup import Mixer
from qat.data.split import Split
from qat.errors import CheckpointError, QuantizationError, Stopped, TrainingError
from qat.evaluation import Accuracy, correct_in_top, evaluate, predictor
from qat.models.bnext import BNext, binary_convolutions, is_binary
from qat.recipe.schema import Recipe
from qat.runs import RunDirectory
from qat.system.collectives import any_of, greatest, is_main, total, world
from qat.system.launch import Share
from qat.system.sigterm import StopRequest
from qat.train.optimizer import distillation_loss, learning_rate_factor, make_optimizer
from qat.train.parallel import Parallel
from qat.train.precision import autocast, gradient_scaler
from qat.train.resume import Parts, begun, capture, restore, resume_command
from qat.train.sharding import is_sharded, own_part, shard, shards, whole_network
from qat.train.state_file import Running, State, write_state
from qat.train.weight_average import WeightAverage


class Reporter(Protocol):
    """What a training run tells whoever watches it."""

    def message(self, text: str) -> None:
        """One line of news."""

    def warning(self, text: str) -> None:
        """Something the user should know and may want to change."""

    def start(self, epochs: int, steps: int, done: int = 0) -> None:
        """Training begins: ``epochs`` of ``steps`` batches, of which ``done`` are behind a resumed run."""

    def step(self, epoch: int, metrics: Mapping[str, float]) -> None:
        """One step is done: loss, top1 (percent), images_per_second, all running means of the epoch; its
        learning_rate, and its number in all epochs, ``step``.
        """

    def epoch(self, metrics: Mapping[str, Any]) -> None:
        """One epoch is done, with its metrics."""

    def stop(self) -> None:
        """Training is over, well or not."""


@dataclass
class Job:
    """Everything the loop works on, how far it is, and the best epoch so far.

    ``epoch`` counts whole epochs, ``accuracy`` is the one after the last of them and ``rows`` are their
    metrics; ``running`` is the epoch after these. Several processes have a job each, which are equal but for
    their shares of the batches.
    """

    recipe: Recipe
    model: BNext
    train: Split
    test: Split
    device: torch.device
    run: RunDirectory
    report: Reporter
    #: Logits for pixels in 0 to 1, and the same as the network gets them.
    teacher: Callable[[Tensor, Tensor], Tensor] | None = None
    #: Called before each step with the share of all steps that are done.
    before_step: Callable[[float], None] = lambda share: None
    #: Called with the network that is kept, once the last step is done and before it is evaluated.
    after_training: Callable[[BNext], None] = lambda model: None
    metadata: dict[str, str] = field(default_factory=dict)
    best: Accuracy | None = None
    best_epoch: int | None = None
    epoch: int = 0
    accuracy: Accuracy | None = None
    rows: list[dict[str, Any]] = field(default_factory=list)
    running: Running = field(default_factory=Running)
    #: Of the weights, where the recipe asks for it; made by :func:`fit`.
    average: WeightAverage | None = None
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

    @property
    def kept(self) -> BNext:
        """The network that is evaluated and stored: the one that trains, or the average of its weights.

        Where processes share it, this one's parts: see :func:`qat.train.sharding.whole_network`.
        """
        return self.model if self.average is None else cast(BNext, self.average.network)

    def check_stop(self) -> None:
        """Raise ``Stopped`` where SIGTERM asked for it, any process; all of them call this alike."""
        if any_of(self.stop.requested):
            again = resume_command(self.recipe.task, self.run.path)
            raise Stopped(f"stopped by SIGTERM, everything is saved; go on with: {again}")

    def evaluate(self, model: BNext) -> Accuracy:
        """Accuracy of ``model`` on the test split; ends between two batches where SIGTERM asks for it."""
        return evaluate(predictor(model), self.test, self.recipe.data, self.device, self.check_stop)


@dataclass(frozen=True)
class Inputs:
    """From a batch of a split to what is trained on: augmented, then mixed."""

    augment: Augmenter
    mix: Mixer
    share: Share

    def __call__(self, images: Tensor, labels: Tensor, epoch: int, batch: int) -> tuple[Tensor, Tensor]:
        """Pixels in 0 to 1 (N, 3, H, W) and targets: labels (N,), or shares of the classes (N, classes)."""
        return self.mix(self.augment(images, epoch, batch, self.share), labels, epoch, batch)


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
    steps = step_count(recipe, job.train)
    if shards(recipe):
        shard(model, job.device)
    optimizer = make_optimizer(model, recipe.optimizer)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: learning_rate_factor(recipe.optimizer, step, epochs * steps)
    )
    inputs = Inputs(
        Augmenter(recipe.data.augment, recipe.data.image_size, recipe.seed),
        Mixer(recipe.data.augment, recipe.model.num_classes, recipe.seed),
        world().share,
    )
    if recipe.schedule.ema is not None:
        job.average = WeightAverage(model, recipe.schedule.ema)
    scaler = gradient_scaler(recipe.precision, job.device)
    parts = Parts(model, optimizer, scheduler, job.device, job.average, scaler)
    if job.state is None:
        _save(job, parts)
    else:
        restore(parts, job.state)
    network = Parallel(model, job.device)
    job.run.rewrite_log(job.rows)  # it may have lines from beyond the state
    # Of a resumed run, too, which may have ended before it kept the epoch.
    if job.accuracy is not None and not job.running.step:
        keep(job, job.epoch, job.accuracy)
    job.report.start(epochs, steps, job.epoch * steps + job.running.step)
    try:
        for epoch in range(job.epoch + 1, epochs + 1):
            metrics = _epoch(job, epoch, steps, parts, inputs, network)
            if epoch == epochs:
                _after_training(job, epoch)
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


def step_count(recipe: Recipe, train: Split) -> int:
    """Optimizer steps of an epoch; batches that fill no step any more are left out."""
    return train.batch_count(recipe.data.batch_size, drop_last=True) // recipe.schedule.accumulate


def _save(job: Job, parts: Parts) -> None:
    main = is_main()
    if not (main or is_sharded(parts.model)):  # the others would write the same
        return
    tensors, fields = capture(parts)
    if not main:  # it gave its parts
        return
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


def _epoch(
    job: Job, epoch: int, steps: int, parts: Parts, inputs: Inputs, network: Parallel
) -> dict[str, Any]:
    recipe, model, sums = job.recipe, job.model, job.running
    optimizer, scheduler, scaler = parts.optimizer, parts.scheduler, parts.scaler
    save_steps, accumulate = recipe.schedule.save_steps, recipe.schedule.accumulate
    started = time.perf_counter() - sums.seconds
    batches = job.train.batches(
        recipe.data.batch_size,
        shuffle_seed=recipe.seed + epoch,
        drop_last=True,
        skip=sums.step * accumulate,
    )
    for step in range(sums.step, steps):
        done = (epoch - 1) * steps + step
        model.train()
        job.before_step(done / (recipe.schedule.epochs * steps))
        optimizer.zero_grad(set_to_none=True)
        for number, (images, labels) in enumerate(islice(batches, accumulate), start=step * accumulate):
            batch = inputs(images.to(job.device), labels.to(job.device), epoch, number)
            with network.gathering(last=(number + 1) % accumulate == 0):
                loss, correct = _loss(job, network, *batch)
                _count(job, f"epoch {epoch}, step {step + 1}", float(loss.detach()), len(labels), correct)
                # All batches have one size, so the mean of their gradients is that of all their images.
                loss = loss if accumulate == 1 else loss / accumulate
                loss = loss if scaler is None else scaler.scale(loss)
                loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it without types
        sums.learning_rate = float(scheduler.get_last_lr()[-1])
        _step(parts, recipe.optimizer.clip_norm)
        if job.average is not None:
            job.average.update(model, done + 1)
        sums.step = step + 1
        sums.seconds = time.perf_counter() - started
        job.report.step(epoch, {**_means(sums), "learning_rate": sums.learning_rate, "step": float(done + 1)})
        job.check_stop()
        if save_steps and (done + 1) % save_steps == 0:
            _save(job, parts)
    # A last step that spoils the weights shows in no loss any more, and a network with NaN must not go on
    # to be evaluated: its integers have no meaning.
    spoilt = _spoilt(model)
    if spoilt is not None:
        raise TrainingError(_not_finite(job, f"epoch {epoch}, step {steps}", spoilt, math.nan))
    # What is evaluated and kept is the network as the schedule has it now, not one step earlier: annealing
    # that ends with the training would otherwise never reach its end.
    job.before_step(epoch / recipe.schedule.epochs)
    if job.average is not None:
        job.average.follow(model)
    means = _means(sums)
    return {
        "epoch": epoch,
        **{key: means[key] for key in ("loss", "top1")},
        "learning_rate": sums.learning_rate,
        "temperature": float(next(iter(binary_convolutions(model).values())).temperature),
        "images_per_second": means["images_per_second"],
        "seconds": sums.seconds,
    }


def _loss(job: Job, network: Parallel, pixels: Tensor, targets: Tensor) -> tuple[Tensor, int]:
    """Loss of a batch from :class:`Inputs`, in float32, and how many of its images were recognized."""
    recipe = job.recipe
    images = normalize(pixels, recipe.data.mean, recipe.data.std)
    with autocast(recipe.precision, job.device):
        logits = network(images).float()
        loss = F.cross_entropy(logits, targets, label_smoothing=recipe.loss.label_smoothing)
        if job.teacher is not None:
            with torch.no_grad():
                target = job.teacher(pixels, images)
            distilled = distillation_loss(logits, target, recipe.distillation.temperature)
            loss = torch.lerp(loss, distilled, recipe.distillation.weight)
    # Of a mixed image, what counts is the class that has the larger share.
    labels = targets if targets.ndim == 1 else targets.argmax(1)
    return loss, correct_in_top(logits.detach(), labels, 1)


def _count(job: Job, when: str, loss: float, images: int, correct: int) -> None:
    """Add a batch to the sums of the epoch, with all processes' shares of it."""
    sums = job.running
    loss_sum, seen, recognized = total([loss * images, images, correct])
    if not math.isfinite(loss_sum):
        raise TrainingError(_not_finite(job, when, "loss", loss_sum))
    sums.loss_sum += loss_sum
    sums.seen += round(seen)
    sums.correct += round(recognized)


def _step(parts: Parts, clip_norm: float | None) -> None:
    """One step of optimizer and schedule with the gradients that were gathered."""
    if clip_norm is not None:
        if parts.scaler is not None:
            parts.scaler.unscale_(parts.optimizer)
        nn.utils.clip_grad_norm_(parts.model.parameters(), clip_norm)
    if parts.scaler is None:
        parts.optimizer.step()
    else:
        parts.scaler.step(parts.optimizer)  # leaves the weights alone where a gradient is too large
        parts.scaler.update()
    parts.scheduler.step()


def _means(sums: Running) -> dict[str, float]:
    return {
        "loss": sums.loss_sum / sums.seen,
        "top1": 100.0 * sums.correct / sums.seen,
        "images_per_second": sums.seen / sums.seconds,
    }


def _after_training(job: Job, epoch: int) -> None:
    try:
        job.after_training(whole_network(job.kept))
    except QuantizationError as error:  # statistics that are no numbers
        raise TrainingError(f"epoch {epoch}: {error}; {_kept(job)}") from error


def _evaluate(job: Job, epoch: int) -> Accuracy:
    """Accuracy on the test split; a network that computes no numbers any more ends the training."""
    try:
        # As stored: rounding to half precision may move an image or two, and the file is what is used.
        model = as_stored(whole_network(job.kept), job.recipe.output.float_weights)
        accuracy = job.evaluate(model)
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
    if better and is_binary(job.kept):
        job.best, job.best_epoch = accuracy, epoch
        targets.append(job.run.best)
    network = whole_network(job.kept)
    metadata = job.metadata | {"epoch": str(epoch), "accuracy": accuracy.to_json()}
    for path in targets if is_main() else ():
        try:
            save_checkpoint(
                path, network, recipe=recipe, metadata=metadata, float_dtype=recipe.output.float_weights
            )
        except CheckpointError as error:  # values that the file can't hold: of the training, not of the user
            raise TrainingError(f"epoch {epoch}: {error}; {_kept(job)}") from error


def _spoilt(model: nn.Module) -> str | None:
    """The first tensor of the network that holds NaN, if one does; a part of it may lie in any process."""
    tensors = model.state_dict()
    first = next((place for place, value in enumerate(tensors.values()) if _has_nan(value)), len(tensors))
    if is_sharded(model):
        first = -round(float(greatest(torch.tensor([-float(first)]))))
    return None if first == len(tensors) else list(tensors)[first]


def _has_nan(value: Tensor) -> bool:
    value = own_part(value)
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
