"""The training loop, which trains, evaluates and saves one epoch after another.

It is the same for pretraining and fine-tuning, which differ in the :class:`~qat.train.job.Job` that they
pass.
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
from qat.train.weight_average import make_average


@dataclass(frozen=True)
class Inputs:
    """Turns a batch of a split into the input of a training step: augmentation, then mixup or cutmix."""

    augment: Augmenter
    mix: Mixer
    share: Share

    def __call__(self, images: Tensor, labels: Tensor, epoch: int, batch: int) -> tuple[Tensor, Tensor]:
        """Prepare one batch, or this process's share of it.

        Args:
            images: uint8 (N, 3, H, W).
            labels: int64 (N,) on the same device.
            epoch: number of the epoch, from 1.
            batch: number of the batch within the epoch, from 0.

        Returns:
            Pixels in 0 to 1, float32 (N, 3, image_size, image_size), and the targets: labels, int64 (N,), or
            with mixup or cutmix the share of each class, float32 (N, classes).
        """
        return self.mix(self.augment(images, epoch, batch, self.share), labels, epoch, batch)


def step_count(recipe: Recipe, train: Split) -> int:
    """Number of optimizer steps in an epoch. Last batches that are too few for a step are left out."""
    return train.batch_count(recipe.data.batch_size, drop_last=True) // recipe.schedule.accumulate


def fit(job: Job, progress: Progress) -> None:
    """Train for the recipe's epochs that are not done yet, and evaluate and save each.

    The state of an epoch is saved before its metrics and checkpoints are written. So these never include an
    epoch that a resumed run has still to do.

    Args:
        job: what to train. If ``job.state`` has tensors, it is restored first.
        progress: how far the run is; it is updated after each step and epoch.

    Raises:
        Stopped: SIGTERM came; the state is saved.
        TrainingError: a loss or a tensor became NaN or infinite.
        CheckpointError: ``job.state`` belongs to another network.
        OutputError: the run directory can't be written.
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
    average = make_average(model, recipe.schedule.ema)
    scaler = gradient_scaler(recipe.precision, job.device)
    parts = Parts(model, optimizer, scheduler, job.device, average, scaler)
    if job.state.tensors:
        restore(parts, job.state)
    else:
        save_state(job, progress, parts)
    training = _Training(job, progress, parts, inputs, Parallel(model, job.device), steps)
    # A resumed run may have been interrupted between saving a state and writing metrics and checkpoints. Or
    # it was resumed from an older state, so that the metrics have lines of epochs after it.
    job.run.rewrite_log(progress.rows)
    keep_checkpoints(job, progress, average.network)
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
        if progress.running.step:  # otherwise the state was saved at the end of the epoch
            save_state(job, progress, parts)
        raise
    finally:
        job.reporter.stop()


@dataclass(frozen=True)
class _Training:
    """The training of a job, with ``steps`` optimizer steps in each epoch."""

    job: Job
    progress: Progress
    parts: Parts
    inputs: Inputs
    network: Parallel
    steps: int

    def epoch(self, epoch: int) -> dict[str, Any]:
        """Do the remaining steps of an epoch, and return its metrics without those of the evaluation."""
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
                    # All batches have the same size, so the mean over all images is the mean over batches.
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
        # NaN that the last step causes shows in no loss of this epoch. A network with NaN can't be evaluated,
        # because its integers would have no meaning.
        nan_tensor = first_with_nan(model)
        if nan_tensor is not None:
            raise self._not_finite(f"epoch {epoch}, step {self.steps}", nan_tensor, math.nan)
        # The hook is called once more, so that the network is evaluated at the schedule's values for the end
        # of the epoch. An anneal that ends with the training would otherwise never reach its end.
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
        """Call the task's hook with the network that is kept, after the last step.

        Raises:
            TrainingError: batch-norm statistics became NaN or infinite.
        """
        try:
            self.job.hooks.after_training(self.job, whole_network(self.parts.average.network))
        except QuantizationError as error:  # statistics that are not finite
            epoch = self.job.recipe.schedule.epochs
            raise TrainingError(f"epoch {epoch}: {error}; {last_good(self.job.run)}") from error

    def evaluate(self, epoch: int) -> Accuracy:
        """Accuracy on the test images of the network that is kept.

        Raises:
            TrainingError: the loss or a constant is NaN or infinite.
        """
        job = self.job
        try:
            # The network is evaluated with the values that its file will hold. Rounding them to half
            # precision can change the answers to a few images.
            network = whole_network(self.parts.average.network)
            accuracy = job.evaluate(as_stored(network, job.recipe.output.float_weights))
        except QuantizationError as error:  # constants that are not finite
            raise self._not_finite(f"epoch {epoch}", "test loss", math.nan) from error
        if not math.isfinite(accuracy.loss):
            raise self._not_finite(f"epoch {epoch}", "test loss", accuracy.loss)
        return accuracy

    def _loss(self, pixels: Tensor, targets: Tensor) -> tuple[Tensor, int]:
        """Loss of a batch from :class:`Inputs`, a float32 scalar, and the number of right answers."""
        job, recipe = self.job, self.job.recipe
        images = normalize(pixels, recipe.data.mean, recipe.data.std)
        with autocast(recipe.precision, job.device):
            logits = self.network(images).float()
            loss = F.cross_entropy(logits, targets, label_smoothing=recipe.loss.label_smoothing)
            loss = job.teachers.blend(loss, logits, pixels, images)
        # A mixed image counts as right if the answer is the class with the larger share.
        labels = targets if targets.ndim == 1 else targets.argmax(1)
        return loss, correct_in_top(logits.detach(), labels, 1)

    def _count(self, when: str, loss: float, images: int, correct: int) -> None:
        """Add a batch, with the shares of all processes, to the sums of the epoch.

        Raises:
            TrainingError: the loss is NaN or infinite.
        """
        sums = self.progress.running
        loss_sum, seen, recognized = total([loss * images, images, correct])
        if not math.isfinite(loss_sum):
            raise self._not_finite(when, "loss", loss_sum)
        sums.loss_sum += loss_sum
        sums.seen += round(seen)
        sums.correct += round(recognized)

    def _step(self) -> None:
        """Do one step of the optimizer and the learning-rate schedule with the accumulated gradients."""
        parts, clip_norm = self.parts, self.job.recipe.optimizer.clip_norm
        if clip_norm is not None:
            parts.scaler.unscale_(parts.optimizer)
            nn.utils.clip_grad_norm_(parts.model.parameters(), clip_norm)
        parts.scaler.step(parts.optimizer)  # with float16, the step is skipped if a gradient is infinite
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
