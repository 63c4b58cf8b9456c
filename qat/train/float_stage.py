"""The stage before quantization: a new classifier is trained, then the whole network, in float.

It is a run of its own in the folder ``float`` of the run that it is part of, with states, metrics and
checkpoints. Quantization starts from its best checkpoint, as from any other: what an interrupted run goes on
with is the same as what an uninterrupted one has.
"""

from __future__ import annotations

import time
from dataclasses import asdict, replace

import torch
from torch import nn

from qat.checkpoints.format import load_checkpoint
from qat.checkpoints.loading import load_state
from qat.models.bnext import BNext, binary_convolutions
from qat.recipe.schema import Recipe
from qat.runs import SUMMARY
from qat.system.collectives import is_main
from qat.train.capture import first_record
from qat.train.job import Hooks, Job
from qat.train.loop import fit
from qat.train.progress import Progress
from qat.train.reporter import Reporter
from qat.train.resume import is_finished
from qat.train.setup import reestimate
from qat.train.state_file import NOTHING_SAVED, newest_state, remove_states, write_state
from qat.train.teachers import Teachers


def train_in_float(job: Job, network: BNext, epochs: int, head_epochs: int, reporter: Reporter) -> None:
    """Train ``network`` in float for the stage of the run of ``job``, or load what the stage has trained.

    Args:
        job: of the whole run.
        network: the float-rest network, on the job's device; has the best epoch's weights afterwards, with
            latent weights as a checkpoint gives them back, and is in evaluation mode.
        epochs: passes over the training images.
        head_epochs: the first of these, in which the classifier alone is trained.
        reporter: told about progress; trackers are not, whose steps are those of the quantized network.

    Raises:
        Stopped: SIGTERM came; the run can be resumed.
        QatError: see :func:`qat.train.loop.fit`.
    """
    folder = job.run.float_stage
    if not is_finished(folder.path):
        _train(job, network, epochs, head_epochs, reporter)
    kept = load_checkpoint(folder.best, latent=job.recipe.model.latent)
    network.cpu()
    load_state(network, kept)
    network.to(job.device).requires_grad_(True).eval()
    # What follows must not depend on whether the stage was trained by this process.
    torch.manual_seed(job.recipe.seed)


def _train(job: Job, network: BNext, epochs: int, head_epochs: int, reporter: Reporter) -> None:
    folder, recipe = job.run.float_stage, _recipe(job.recipe, epochs)
    if is_main():
        folder.path.mkdir(exist_ok=True)
    state = newest_state(folder.path, reporter.warning)
    resumes = state is not None and bool(state.tensors)
    own = replace(
        job,
        recipe=recipe,
        model=network,
        run=folder,
        reporter=reporter,
        teachers=Teachers(),
        hooks=Hooks(before_step=_follow, after_training=reestimate),
        state=state if state is not None and resumes else NOTHING_SAVED,
        head_epochs=head_epochs,
    )
    first = "the classifier alone, then " if head_epochs else ""
    reporter.message(f"float rest: {first}the whole network, before it is quantized")
    if not resumes and is_main():
        write_state(folder.path, first_record(recipe, job.provenance, job.device), {}, keep=1)
    network.requires_grad_(True).train()
    if recipe.schedule.freeze_binary:
        for conv in binary_convolutions(network).values():
            conv.weight.requires_grad_(False)
    progress = Progress.of(own.state.record)
    fit(own, progress)
    assert progress.best is not None  # binary weights stay binary
    content = {"epochs": epochs, "float": asdict(progress.best), "best_epoch": progress.best_epoch}
    folder.write_json(SUMMARY, {**content, "seconds": progress.seconds, "finished": time.time()})
    if is_main():
        remove_states(folder.path)


def _recipe(recipe: Recipe, epochs: int) -> Recipe:
    """The recipe as the loop reads it for this stage."""
    return recipe.model_copy(update={"schedule": recipe.schedule.model_copy(update={"epochs": epochs})})


def _follow(job: Job, share: float) -> None:
    """Keep batch-norm statistics as they are while the classifier alone is trained; a hook."""
    follows = share * job.recipe.schedule.epochs >= job.head_epochs
    for module in job.model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.train(follows)
