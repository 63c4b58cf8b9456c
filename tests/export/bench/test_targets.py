"""One network in all its forms of export."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from qat_export.bench import targets
from qat_export.bench.any_model import AnyModel
from qat_export.bench.measurement import Candidate
from qat_export.bench.targets import TARGETS, Subject, Target, export_targets
from qat_export.graphs.portable import emit_portable

from qat.errors import QatError, VerificationError
from qat.models.bnext import Architecture

THIN = Architecture.of(widths=(8, 16, 16, 32), num_classes=10)
SIZE = 32


@pytest.fixture
def subject(tmp_path: Path) -> Subject:
    return Subject.at_random(THIN, image_size=SIZE, folder=tmp_path, seed=3)


def formats(candidates: list[Candidate]) -> list[str]:
    return [AnyModel(candidate.path).metadata["format"] for candidate in candidates]


def test_every_target_is_a_model_of_the_same_network(subject: Subject) -> None:
    candidates = export_targets(subject, list(TARGETS))
    assert [candidate.target for candidate in candidates] == list(TARGETS)
    images = subject.images(6)
    with torch.no_grad():
        expected = subject.model(images).numpy()
    for candidate in candidates:
        (logits,) = AnyModel(candidate.path, batch=6).run(images.numpy())
        assert np.corrcoef(logits.ravel(), expected.ravel())[0, 1] > 0.9, candidate.target
    assert len(set(formats(candidates))) == len(TARGETS)


def test_each_model_is_written_once(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[str] = []
    plain = TARGETS["float32"]

    def write(subject: Subject, path: Path) -> None:
        written.append(path.name)
        plain.write(subject, path)

    monkeypatch.setitem(TARGETS, "float32", Target(write))
    export_targets(subject, ["ort_static", "float32"])
    assert written == ["float32.onnx"]


def test_the_static_model_needs_no_float_target(subject: Subject) -> None:
    (candidate,) = export_targets(subject, ["ort_static"])
    assert formats([candidate]) == ["bnext-qat float32 quantized by onnxruntime"]


def test_an_integer_target_that_computes_something_else_is_refused(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(subject: Subject, path: Path) -> None:
        head = subject.network.head
        classifier = replace(head.classifier, bias=head.classifier.bias + np.int32(1))
        model = emit_portable(replace(subject.network, head=replace(head, classifier=classifier)))
        path.write_bytes(model.SerializeToString())

    monkeypatch.setitem(TARGETS, "native", Target(wrong, exact=True))
    with pytest.raises(VerificationError, match=r"native\.onnx: its logits are not the network's"):
        export_targets(subject, ["native"])


def test_an_unknown_target_is_refused_before_anything_is_written(subject: Subject, tmp_path: Path) -> None:
    with pytest.raises(
        QatError, match=r"'portabel' is unknown, allowed: float32, ort_static, .*mean 'portable'"
    ):
        export_targets(subject, ["float32", "portabel"])
    assert list(tmp_path.iterdir()) == []


def test_one_says_what_is_happening(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(
        targets, "TARGETS", {"a": Target(lambda _, path: path.touch()), "b": TARGETS["float32"]}
    )
    export_targets(subject, ["a", "b"], said.append)
    assert said == ["exporting a", "exporting b"]
