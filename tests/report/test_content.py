"""The report's page: what is on it, that names are escaped, and that it stays small."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from qat.report import costs, layers, sections
from tests.helpers.reports import answers, binary_layer, layer, page

#: Bytes that a report must stay below.
LIMIT = 2_000_000


@pytest.fixture
def _undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Don't draw charts, which take nearly all of a page's time, in tests of texts."""
    for module, name in (
        (sections, "bar_chart"),
        (sections, "heat_map"),
        (sections, "line_chart"),
        (costs, "bar_chart"),
        (layers, "bar_chart"),
        (layers, "line_chart"),
    ):
        monkeypatch.setattr(module, name, lambda *_, **__: "<svg></svg>")


in_words = pytest.mark.usefixtures("_undrawn")


def headings(text: str) -> list[str]:
    return re.findall(r"<h2[^>]*>([^<]*)</h2>", text)


def test_a_fine_tuning_has_all_sections_and_a_pretraining_those_it_can(tmp_path: Path) -> None:
    both = answers([0, 1], [0, 2], [0, 1])
    assert headings(page(tmp_path, both, [layer("feature.1.trunk_mid")])) == [
        "Accuracy",
        "Training",
        "Classes",
        "Images that changed class",
        "Layers",
        "Size and operations",
        "Latency",
        "Origin",
    ]
    alone = page(tmp_path, answers([0, 1], [0, 2]), quantization=None)
    assert headings(alone) == ["Accuracy", "Training", "Classes", "Size and operations", "Latency", "Origin"]
    assert "int8 top-1" not in alone
    assert f"Pretraining report</p>\n<h1>{tmp_path.name}</h1>" in alone


def test_every_link_has_its_section(tmp_path: Path) -> None:
    for text in (
        page(tmp_path, answers([0], [1], [0]), [layer("feature.1.trunk_mid")]),
        page(tmp_path, answers([0], [1]), quantization=None),
    ):
        targets = re.findall(r'href="#([^"]+)"', text)
        assert len(targets) > 5
        assert set(targets) <= set(re.findall(r' id="([^"]+)"', text))


def test_no_identifier_is_used_twice(tmp_path: Path) -> None:
    rows = [{"epoch": n, "loss": 1.0, "top1": 50, "learning_rate": 0.1} for n in (1, 2)]
    text = page(tmp_path, answers([0], [1], [0]), [binary_layer("feature.1.a")] * 2, metrics=rows)
    found = re.findall(r' id="([^"]+)"', text)
    assert len(found) == len(set(found)) > 10


@in_words
def test_key_figures_stand_on_top(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"0" * 10_000)
    text = page(tmp_path, answers([0] * 200, [0] * 200, [0] * 150 + [1] * 50))
    tiles = re.findall(r'<dt>([^<]*)</dt>\n<dd class="value ?(\w*)">([^<]*)<', text)
    assert tiles[:3] == [
        ("Float-rest top-1", "", "75.00 %"),
        ("int8 top-1", "", "100.00 %"),
        ("Change in points", "good", "+25.00"),
    ]
    assert ("model.onnx", "", "10.0 kB") in tiles
    assert [name for name, _, _ in tiles][-1] == "OPs per image"


@in_words
def test_a_change_that_may_be_chance_has_no_colour(tmp_path: Path) -> None:
    for lost, tone in ((1, ""), (50, "bad")):
        text = page(tmp_path, answers([0] * 200, [1] * lost + [0] * (200 - lost), [0] * 200))
        assert re.findall(r'Change in points</dt>\n<dd class="value ?(\w*)">', text) == [tone]


def test_names_of_classes_are_text(tmp_path: Path) -> None:
    names = ["<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "a\udcffb\x01", "$\\frac{1}{2}$"]
    for extra in (0, 40):
        named = names + [f"class {index}" for index in range(extra)]
        text = page(tmp_path, answers([0, 1, 2, 3], [1, 0, 3, 2], [0, 1, 2, 3], named))
        text.encode("utf-8")
        assert "<script" not in text
        assert not re.search(r"<img src=x", text)
        assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text


@in_words
def test_a_measurement_is_shown(tmp_path: Path) -> None:
    results = [{"target": "model", "ms_median": 8.25}]
    bench = {"machine": {}, "settings": {"threads": 1, "batch": 1, "repeats": 3}, "results": results}
    text = page(tmp_path, answers([0], [0]), bench=bench)
    assert "<td>8.25</td>" in text
    assert "Not measured" not in text
    assert "Not measured" in page(tmp_path, answers([0], [0]))


@in_words
def test_a_recipe_is_text(tmp_path: Path) -> None:
    assert "# &lt;b&gt;" in page(tmp_path, answers([0], [0]), recipe="# <b>")


@in_words
def test_what_went_wrong_is_said_on_top(tmp_path: Path) -> None:
    text = page(tmp_path, answers([0], [0]), problems=["First."], bench={"results": 3})
    assert re.findall(r'<p class="callout">([^<]*)</p>', text) == [
        "First.",
        "bench.json is not what `qat bench --json` prints, and is left out.",
    ]


@in_words
@pytest.mark.parametrize(("best", "words"), [(3, "is of epoch 3"), (0, "is the one before training")])
def test_the_best_epoch_is_named(tmp_path: Path, best: int, words: str) -> None:
    text = page(tmp_path, answers([0], [0]), summary={"best_epoch": best}, metrics=[{"epoch": 1}])
    assert f"The best checkpoint {words}" in text
    assert "It was chosen by its accuracy on the test images" in text


@in_words
@pytest.mark.parametrize("finished", [1e300, -1e18, 10**400, "today", [1]])
def test_a_date_that_no_calendar_has_is_left_out(tmp_path: Path, finished: object) -> None:
    assert "finished" not in page(tmp_path, answers([0], [0]), summary={"finished": finished})


@in_words
def test_the_date_is_shown(tmp_path: Path) -> None:
    assert "finished\u00a01\u00a0Jan\u00a01970" in page(tmp_path, answers([0], [0]), summary={"finished": 0})


@in_words
def test_a_run_of_no_epochs_says_so(tmp_path: Path) -> None:
    assert "No epoch was trained, so there are no curves: this is the network as calibrated." in page(
        tmp_path, answers([0], [0])
    )


@in_words
def test_widths_other_than_eight_are_said_since_their_operations_count_like_int8(tmp_path: Path) -> None:
    eight = [layer("feature.1.FFN.input"), binary_layer("feature.1.FFN.binary_conv")]
    assert "counted like those of int8" not in page(tmp_path, answers([0], [0]), eight)
    fewer = [*eight, layer("fc.input", group="classifier", bits=4, type="int4")]
    assert "Some points have 4 bits. Multiply-accumulates of" in page(tmp_path, answers([0], [0]), fewer)


@pytest.mark.parametrize("name", ["int4/int8", "int8 (trunk in float)"])
def test_the_report_calls_the_network_by_what_was_quantized(tmp_path: Path, name: str) -> None:
    changed = page(tmp_path, answers([0, 1], [0, 2], [0, 1]), quantization=name)
    same = page(tmp_path, answers([0], [0], [0]), quantization=name)
    for words in (
        f"<dt>{name} top-1</dt>",
        f"{name} loses 50.00 points of top-1 accuracy",
        f"Float rest against {name}, image by image",
        f">{name}, fine-tuned</text>",
        f"<span>{name}: 2</span>",
        f">all, {name}</text>",
    ):
        assert words in changed, words
    assert f"None: the {name} network puts every test image" in same
    assert "int8" not in re.sub(rf"{re.escape(name)}", "", changed)


@in_words
def test_no_change_and_no_error_are_said(tmp_path: Path) -> None:
    text = page(tmp_path, answers([0], [0], [0]))
    assert (
        "None: the int8 network puts every test image into the class that the float-rest network did." in text
    )
    assert "No test image is put into a wrong class." in text


@in_words
def test_versions_and_fingerprints_are_listed(tmp_path: Path) -> None:
    summary = {
        "versions": {"torch": "9.9"},
        "data": {"train": "abc", "test": "def"},
        "pretrained_sha256": "123",
        "seconds": 1234.5,
    }
    text = page(tmp_path, answers([0], [0]), summary=summary)
    for pair in (
        ("Versions", "torch 9.9"),
        ("Training images, SHA-256", "abc"),
        ("Test images, SHA-256", "def"),
        ("SHA-256 of that file", "123"),
        ("Training time", "1,234 s"),
    ):
        assert "<dt>{}</dt>\n<dd>{}</dd>".format(*pair) in text


def test_the_largest_report_is_below_two_megabytes(tmp_path: Path) -> None:
    names = [f"a class with quite a long name, number {index:04}" * 3 for index in range(1000)]
    labels = list(range(1000))
    found = answers(
        labels, [(label + 1) % 1000 for label in labels[:48]] + labels[48:], labels, names, side=224
    )
    assert len(found.changed) == 48
    shown = [
        one
        for block in range(1, 31)
        for part in ("Attention", "FFN_1", "FFN_2")
        for one in (
            *(layer(f"feature.{block}.{part}.se.point_{index}", group="se") for index in range(9)),
            binary_layer(f"feature.{block}.{part}.binary_conv"),
        )
    ]
    metrics = [{"epoch": n, "loss": 1.0 / n, "top1": 90.0, "test_loss": 1.1 / n} for n in range(1, 513)]
    text = page(tmp_path, found, shown, size="large", metrics=metrics, recipe="# a line\n" * 200)
    assert text.count('src="data:image/png') == 48
    assert 500_000 < len(text.encode()) < LIMIT
