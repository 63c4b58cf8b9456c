"""The training loop: one epoch after another, each evaluated and kept.

It knows nothing of pretraining or fine-tuning, which give it a :class:`~qat.train.job.Job` each.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qat.checkpoints.format import as_stored
from qat.data.augment import Augmenter, normalize
from qat.data.mixup import Mixer
from qat.data.split import Split
from qat.errors import QuantizationError, Stopped, TrainingError
from qat.evaluation import Accuracy, correct_in_top
from qat.models.bnext import binary_convolutions
from qat.recipe.schema import Recipe
from qat.system.collectives import total, world
from qat.system.launch import Share
from qat.train.capture import Parts, restore
from qat.train.job import Job
from qat.train.keeping import keep_checkpoints, last_good, save_state
from qat.train.optimizer import learning_rate_factors, make_optimizer
from qat.train.parallel import Parallel
from qat.train.precision import autocast, gradient_scaler
from qat.train.progress import Progress
from qat.train.sharding import first_with_nan, shard, shards, whole_network
from qat.train.state_file import Running
from qat.train.weight_average import average_of


@dataclass(frozen=True)
class Inputs:
    """From a batch of a split to what is trained on: augmented, then mixed."""

    augment: Augmenter
    mix: Mixer
    share: Share

    def __call__(self, images: Tensor, labels: Tensor, epoch: int, batch: int) -> tuple[Tensor, Tensor]:
        """Pixels in 0 to 1 (N, 3, H, W) and targets: labels (N,), or shares of the classes (N, classes)."""
        return self.mix(self.augment(images, epoch, batch, self.share), labels, epoch, batch)


def step_count(recipe: Recipe, train: Split) -> int:
    """Optimizer steps of an epoch; the last batches are left out where they are too few for a step."""
    return train.batch_count(recipe.data.batch_size, drop_last=True) // recipe.schedule.accumulate


def fit(job: Job, progress: Progress) -> None:
    """Train for those of the recipe's epochs that ``progress`` leaves; evaluate and keep each.

    A state is saved before metrics and checkpoints are written, so that these never tell of an epoch that a
    resumed run doesn't know.

    Args:
        job: what to train; ``job.state`` is put back first, if it has tensors.
        progress: brought up to date under way.

    Raises:
        Stopped: SIGTERM came; the state is saved.
        TrainingError: a loss or a tensor is not finite any more.
        CheckpointError: ``job.state`` is of another network.
        OutputError: the run's directory can't be written.
    """
    recipe, model = job.recipe, job.model
    epochs, steps = recipe.schedule.epochs, step_count(recipe, job.splits.train)
    if shards(recipe):
        shard(model, job.device)
    optimizer = make_optimizer(model, recipe.optimizer, own_head=job.head_epochs > 0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, learning_rate_factors(optimizer, recipe.optimizer, epochs * steps, job.head_epochs * steps)
    )
    inputs = Inputs(
        Augmenter(recipe.data.augment, recipe.data.image_size, recipe.seed),
        Mixer(recipe.data.augment, model.architecture.num_classes, recipe.seed),
        world().share,
    )
    average = average_of(model, recipe.schedule.ema)
    scaler = gradient_scaler(recipe.precision, job.device)
    parts = Parts(model, optimizer, scheduler, job.device, average, scaler)
    if job.state.tensors:
        restore(parts, job.state)
    else:
        save_state(job, progress, parts)
    training = _Training(job, progress, parts, inputs, Parallel(model, job.device), steps)
    job.run.rewrite_log(progress.rows)  # it may have lines of epochs after the state
    keep_checkpoints(job, progress, average.network)  # a resumed run may have ended before it did this
    job.reporter.start(epochs, steps, progress.epoch * steps + progress.running.step)
    try:
        for epoch in range(progress.epoch + 1, epochs + 1):
            metrics = training.epoch(epoch)
            if epoch == epochs:
                training.finish()
            accuracy = training.evaluate(epoch)
            metrics |= {"test_top1": accuracy.top1, "test_top5": accuracy.top5, "test_loss": accuracy.loss}
            progress.epoch, progress.accuracy, progress.running = epoch, accuracy, Running()
            progress.rows.append(metrics)
            save_state(job, progress, parts)
            job.run.log(metrics)
            keep_checkpoints(job, progress, average.network)
            job.reporter.epoch(metrics)
            if epoch < epochs:
                job.check_stop()
    except Stopped:
        if progress.running.step:  # else a state was saved after the last step
            save_state(job, progress, parts)
        raise
    finally:
        job.reporter.stop()


@dataclass(frozen=True)
class _Training:
    """A job under way, with ``steps`` optimizer steps in each epoch."""

    job: Job
    progress: Progress
    parts: Parts
    inputs: Inputs
    network: Parallel
    steps: int

    def epoch(self, epoch: int) -> dict[str, Any]:
        """Do the steps that are left of an epoch; its metrics, but for those of the evaluation."""
        job, recipe, parts = self.job, self.job.recipe, self.parts
        sums, model = self.progress.running, parts.model
        save_steps, accumulate = recipe.schedule.save_steps, recipe.schedule.accumulate
        started = time.perf_counter() - sums.seconds
        batches = job.splits.train.batches(
            recipe.data.batch_size,
            shuffle_seed=recipe.seed + epoch,
            drop_last=True,
            skip=sums.step * accumulate,
        )
        for step in range(sums.step, self.steps):
            done = (epoch - 1) * self.steps + step
            model.train()
            job.hooks.before_step(job, done / (recipe.schedule.epochs * self.steps))
            parts.optimizer.zero_grad(set_to_none=True)
            for number, (images, labels) in enumerate(islice(batches, accumulate), start=step * accumulate):
                batch = self.inputs(images.to(job.device), labels.to(job.device), epoch, number)
                with self.network.gathering(last=(number + 1) % accumulate == 0):
                    loss, correct = self._loss(*batch)
                    self._count(f"epoch {epoch}, step {step + 1}", float(loss.detach()), len(labels), correct)
                    # All batches have one size, so the mean of their gradients is that of all their images.
                    loss = loss if accumulate == 1 else loss / accumulate
                    parts.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]  # torch has no types
            sums.learning_rate = float(parts.scheduler.get_last_lr()[-1])
            self._step()
            parts.average.update(model, done + 1)
            sums.step = step + 1
            sums.seconds = time.perf_counter() - started
            figures = {**_means(sums), "learning_rate": sums.learning_rate, "step": float(done + 1)}
            job.reporter.step(epoch, figures)
            job.check_stop()
            if save_steps and (done + 1) % save_steps == 0:
                save_state(job, self.progress, parts)
        # Weights that the last step spoils show in no loss of this epoch, and a network with NaN can't be
        # evaluated: its integers have no meaning.
        spoilt = first_with_nan(model)
        if spoilt is not None:
            raise self._not_finite(f"epoch {epoch}, step {self.steps}", spoilt, math.nan)
        # The network is evaluated and kept as the schedule has it now, not one step earlier: annealing that
        # ends with the training would otherwise never reach its end.
        job.hooks.before_step(job, epoch / recipe.schedule.epochs)
        parts.average.follow(model)
        means = _means(sums)
        return {
            "epoch": epoch,
            **{key: means[key] for key in ("loss", "top1")},
            "learning_rate": sums.learning_rate,
            "temperature": float(next(iter(binary_convolutions(model).values())).temperature),
            "images_per_second": means["images_per_second"],
            "seconds": sums.seconds,
        }

    def finish(self) -> None:
        """Do what the task does with the network that is kept, after the last step."""
        try:
            self.job.hooks.after_training(self.job, whole_network(self.parts.average.network))
        except QuantizationError as error:  # statistics that are not finite
            epoch = self.job.recipe.schedule.epochs
            raise TrainingError(f"epoch {epoch}: {error}; {last_good(self.job.run)}") from error

    def evaluate(self, epoch: int) -> Accuracy:
        """Accuracy on the test images of the network that is kept."""
        job = self.job
        try:
            # As stored: rounding to half precision may move an image or two, and the file is what is used.
            network = whole_network(self.parts.average.network)
            accuracy = job.evaluate(as_stored(network, job.recipe.output.float_weights))
        except QuantizationError as error:  # constants that are not finite
            raise self._not_finite(f"epoch {epoch}", "test loss", math.nan) from error
        if not math.isfinite(accuracy.loss):
            raise self._not_finite(f"epoch {epoch}", "test loss", accuracy.loss)
        return accuracy

    def _loss(self, pixels: Tensor, targets: Tensor) -> tuple[Tensor, int]:
        """Loss of a batch from :class:`Inputs`, in float32, and how many of its images were recognized."""
        job, recipe = self.job, self.job.recipe
        images = normalize(pixels, recipe.data.mean, recipe.data.std)
        with autocast(recipe.precision, job.device):
            logits = self.network(images).float()
            loss = F.cross_entropy(logits, targets, label_smoothing=recipe.loss.label_smoothing)
            loss = job.teachers.blend(loss, logits, pixels, images)
        # Of a mixed image, what counts is the class that has the larger share.
        labels = targets if targets.ndim == 1 else targets.argmax(1)
        return loss, correct_in_top(logits.detach(), labels, 1)

    def _count(self, when: str, loss: float, images: int, correct: int) -> None:
        """Add a batch to the sums of the epoch, with all processes' shares of it."""
        sums = self.progress.running
        loss_sum, seen, recognized = total([loss * images, images, correct])
        if not math.isfinite(loss_sum):
            raise self._not_finite(when, "loss", loss_sum)
        sums.loss_sum += loss_sum
        sums.seen += round(seen)
        sums.correct += round(recognized)

    def _step(self) -> None:
        """One step of optimizer and schedule with the gradients that were gathered."""
        parts, clip_norm = self.parts, self.job.recipe.optimizer.clip_norm
        if clip_norm is not None:
            parts.scaler.unscale_(parts.optimizer)
            nn.utils.clip_grad_norm_(parts.model.parameters(), clip_norm)
        parts.scaler.step(parts.optimizer)  # in float16 without effect where a gradient is too large
        parts.scaler.update()
        parts.scheduler.step()

    def _not_finite(self, when: str, what: str, value: float) -> TrainingError:
        settings = self.job.recipe.optimizer
        if settings.clip_norm is None:
            advice = f"a smaller optimizer.lr (it is {settings.lr:g}) or an optimizer.clip_norm"
        else:
            advice = (
                f"a smaller optimizer.lr (it is {settings.lr:g}) or optimizer.clip_norm "
                f"({settings.clip_norm:g})"
            )
        return TrainingError(
            f"{when}: the {what} is {value}, training stops; {last_good(self.job.run)}. May help: {advice}"
        )


def _means(sums: Running) -> dict[str, float]:
    return {
        "loss": sums.loss_sum / sums.seen,
        "top1": 100.0 * sums.correct / sums.seen,
        "images_per_second": sums.seen / sums.seconds,
    }
