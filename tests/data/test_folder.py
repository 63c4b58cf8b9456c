"""Folders of images: which images and labels are read, and that errors name what is wrong."""

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from qat.data.decode import decode
from qat.data.loading import load_for_training, load_split, load_splits
from qat.errors import DataError
from tests.helpers.image_folders import everything, folder, make_tree, write_image


def test_a_folder_gives_square_images_and_labels_in_a_fixed_order(tree: Path) -> None:
    train, test = load_splits(folder(tree))
    images, labels = everything(train)
    assert images.shape == (5, 3, 16, 16)
    assert images.dtype == torch.uint8
    assert labels.tolist() == [0, 0, 0, 1, 1]
    assert everything(test)[1].tolist() == [0, 1, 1]
    assert train.class_names == test.class_names == ["cat", "dog"]
    names = [train.image_name(index) for index in range(5)]
    assert [str(name).split("/")[0] for name in names] == ["cat"] * 3 + ["dog"] * 2
    assert all((tree / "train" / str(name)).is_file() for name in names)


def test_worker_processes_give_the_same_batches(tree: Path) -> None:
    alone = everything(load_split(folder(tree), "train"), shuffle_seed=1)
    helped = everything(load_split(folder(tree, workers=1), "train"), shuffle_seed=1)
    assert torch.equal(alone[0], helped[0])
    assert torch.equal(alone[1], helped[1])


def test_reading_batches_leaves_the_global_random_state_alone(tree: Path) -> None:
    before = torch.get_rng_state()
    everything(load_split(folder(tree), "train"), shuffle_seed=1)
    assert torch.equal(before, torch.get_rng_state())


def test_classes_named_like_splits_stay_in_their_split(tmp_path: Path) -> None:
    classes = {"test_tube": 2, "train": 1, "val": 1}
    train, test = load_splits(folder(make_tree(tmp_path, train=classes, test=classes)))
    assert (len(train), len(test)) == (4, 4)
    assert train.class_names == ["test_tube", "train", "val"]


def test_a_single_class_keeps_its_label(tmp_path: Path) -> None:
    split = load_split(folder(make_tree(tmp_path, train={"cat": 2})), "train")
    assert split.class_names == ["cat"]
    assert everything(split)[1].tolist() == [0, 0]


def test_class_folders_may_be_symbolic_links(tmp_path: Path) -> None:
    root = make_tree(tmp_path, train={"cat": 1}, elsewhere={"dog": 2})
    (root / "train" / "dog").symlink_to(root / "elsewhere" / "dog")
    assert everything(load_split(folder(root), "train"))[1].tolist() == [0, 1, 1]


def test_folder_names_may_hold_pattern_characters(tmp_path: Path) -> None:
    root = make_tree(tmp_path / "a[b]*", train={"[x]": 1, "d?g": 2, "dog": 1})
    assert everything(load_split(folder(root), "train"))[1].tolist() == [0, 1, 1, 2]


def test_files_that_are_not_images_are_passed_over(tree: Path) -> None:
    (tree / "train" / "cat" / "notes.txt").write_text("x")
    (tree / "train" / "cat" / "metadata.csv").write_text("file_name,label\n0.png,7\n")
    (tree / "train" / "README.md").write_text("x")
    assert everything(load_split(folder(tree), "train"))[1].tolist() == [0, 0, 0, 1, 1]


def test_an_image_added_later_is_seen_and_changes_the_fingerprint(tree: Path) -> None:
    before = load_split(folder(tree), "train")
    assert before.fingerprint() == load_split(folder(tree), "train").fingerprint()
    write_image(tree / "train" / "cat" / "new.JPEG")
    after = load_split(folder(tree), "train")
    assert len(after) == len(before) + 1
    assert after.fingerprint() != before.fingerprint()


def test_a_fingerprint_does_not_depend_on_where_the_folder_lies(tree: Path, tmp_path: Path) -> None:
    before = load_split(folder(tree), "train").fingerprint()
    tree.rename(tmp_path / "moved")
    assert load_split(folder(tmp_path / "moved"), "train").fingerprint() == before


def test_a_content_fingerprint_depends_on_bytes_labels_and_order_not_on_names(
    tree: Path, tmp_path: Path
) -> None:
    def found() -> str:
        return load_split(folder(tree), "train").content_fingerprint()

    before, cat = found(), tree / "train" / "cat"
    (cat / "0.png").rename(cat / "00.png")
    for split in ("train", "test"):
        (tree / split / "cat").rename(tree / split / "bird")
    assert found() == before
    bird = tree / "train" / "bird"
    (bird / "00.png").rename(bird / "9.png")  # now the last of its class
    assert found() != before
    (bird / "9.png").rename(bird / "00.png")
    content = (bird / "1.png").read_bytes()
    (bird / "1.png").write_bytes(content[:-1] + bytes([content[-1] ^ 1]))  # of the same size
    assert found() != before
    (bird / "1.png").write_bytes(content)
    assert found() == before
    (bird / "2.png").rename(tree / "train" / "dog" / "!.png")  # the same bytes in the same order
    assert found() != before


def test_a_content_fingerprint_names_a_file_that_has_gone(tree: Path) -> None:
    split = load_split(folder(tree), "train")
    (tree / "train" / "dog" / "1.png").unlink()
    with pytest.raises(DataError, match=r"dog/1\.png: cannot be read: No such file"):
        split.content_fingerprint()


def test_loading_a_folder_asks_the_network_nothing(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []

    def refuse(*arguments: object, **_: object) -> None:
        asked.append(arguments)
        raise OSError("no network")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    assert len(load_split(folder(tree), "train")) == 5
    assert asked == []


def test_loading_a_folder_prints_nothing_and_restores_the_progress_bars(
    tree: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    import datasets

    assert not datasets.are_progress_bars_disabled()
    load_split(folder(tree), "train")
    assert capfd.readouterr() == ("", "")
    assert not datasets.are_progress_bars_disabled()


def test_an_unset_root_is_refused_with_the_option_to_set_it() -> None:
    with pytest.raises(DataError, match=r"--set data\.root=DIR"):
        load_split(folder(None), "train")


def test_a_root_that_does_not_exist_or_is_a_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data\.root: .*nowhere does not exist"):
        load_split(folder(tmp_path / "nowhere"), "train")
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="is not a folder"):
        load_split(folder(tmp_path / "file"), "train")


def test_a_missing_split_is_refused_naming_those_that_exist(tree: Path) -> None:
    with pytest.raises(
        DataError, match=r"data\.test_split: .*'tests' \(did you mean 'test'\?\).* test, train"
    ):
        load_split(folder(tree, test_split="tests"), "test")
    assert len(load_split(folder(tree, test_split="tests"), "train")) == 5


def test_any_folder_name_can_be_a_split(tmp_path: Path) -> None:
    root = make_tree(tmp_path, fold_1={"a": 1, "b": 2}, val={"a": 1, "b": 1})
    train, test = load_splits(folder(root, train_split="fold_1", test_split="val"))
    assert (len(train), len(test)) == (3, 2)


@pytest.mark.parametrize("name", ["train", "test"])
def test_splits_with_different_classes_are_refused(tmp_path: Path, name: Any) -> None:
    root = make_tree(tmp_path, train={"cat": 1, "dog": 1}, test={"cat": 1})
    with pytest.raises(DataError, match=r"same classes.* 'dog', which is in 'train' and not in 'test'"):
        load_split(folder(root), name)


def test_an_empty_class_folder_is_refused(tmp_path: Path) -> None:
    root = make_tree(tmp_path, train={"cat": 1, "dog": 0, "emu": 0})
    (root / "train" / "emu" / "notes.txt").write_text("x")
    with pytest.raises(DataError, match="no images in the folder of class 'dog', 'emu'"):
        load_split(folder(root), "train")


def test_a_split_without_any_image_is_refused(tmp_path: Path) -> None:
    make_tree(tmp_path, train={"cat": 0}, text={"cat": 0})
    with pytest.raises(DataError, match="no images in the folder of class 'cat'"):
        load_split(folder(tmp_path), "train")
    (tmp_path / "text" / "cat" / "notes.txt").write_text("x")
    with pytest.raises(DataError):
        load_split(folder(tmp_path, train_split="text"), "train")
    (tmp_path / "bare").mkdir()
    with pytest.raises(DataError, match="a folder of images per class"):
        load_split(folder(tmp_path, train_split="bare"), "train")


def test_images_in_folders_inside_a_class_are_of_that_class(tree: Path) -> None:
    write_image(tree / "train" / "cat" / "siamese" / "x.png")
    split = load_split(folder(tree), "train")
    assert split.labels.tolist() == [0, 0, 0, 0, 1, 1]
    assert split.image_name(3) == "cat/siamese/x.png"


def test_a_fingerprint_is_the_one_that_version_0_1_computed(tmp_path: Path) -> None:
    names = ("b/10.png", "b/9.PNG", "a/x.jpg", "a.b/é.webp", "a/X.jpeg", "a/sub.bmp", "a/notes.txt")
    for index, name in enumerate(names):
        file = tmp_path / "train" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(bytes(range(index + 3)))
    split = load_split(folder(tmp_path), "train")
    assert split.fingerprint().startswith("ec82d0008a660d8558e784da8356e205")
    assert split.content_fingerprint().startswith("daea8ad611e6ae3b92d238b8093ad462")


def test_files_that_cannot_be_used_are_named_all_at_once_of_all_splits(tree: Path) -> None:
    (tree / "train" / "cat" / "dead.png").symlink_to("/nowhere")
    (tree / "train" / "dog" / "text.jpg").write_text("hello")
    (tree / "train" / "dog" / "0.png").write_bytes((tree / "train" / "dog" / "0.png").read_bytes()[:500])
    (tree / "test" / "cat" / "empty.png").touch()
    with pytest.raises(DataError) as caught:
        load_for_training(folder(tree))
    line = str(caught.value)
    assert (
        "3 files cannot be used: 1 dangling link (train/cat/dead.png), 2 foreign (train/dog/text.jpg, "
        in line
    )
    assert "test/cat/empty.png" in line
    assert "--set data.on_error=skip" in line
    assert "\n" not in line


def test_skipping_leaves_out_what_cannot_be_decoded_and_says_so(tree: Path) -> None:
    (tree / "train" / "cat" / "dead.png").symlink_to("/nowhere")
    broken = tree / "train" / "dog" / "0.png"
    whole = load_split(folder(tree, on_error="skip", test_split="train"), "test").fingerprint()
    broken.write_bytes(broken.read_bytes()[:500])
    train, test, _ = load_for_training(folder(tree, on_error="skip"))
    assert everything(train)[1].tolist() == [0, 0, 0, 1]
    assert train.left_out == "train: left out: 1 dangling link (cat/dead.png), 1 broken (dog/0.png)"
    assert train.fingerprint() != whole
    assert test.left_out is None


def test_skipping_every_image_of_a_class_is_refused(tree: Path) -> None:
    for file in (tree / "train" / "dog").iterdir():
        file.write_text("no image")
    with pytest.raises(DataError, match="no images in the folder of class 'dog'"):
        load_split(folder(tree, on_error="skip"), "train")


def test_a_local_folder_needs_neither_datasets_nor_a_home(tree: Path) -> None:
    code = (
        "import sys; sys.modules['datasets'] = None\n"
        "from qat.data.loading import load_for_training\n"
        "from qat.recipe.schema import Data\n"
        f"data = Data(dataset='imagefolder', root={str(tree)!r}, image_size=8, test_split='test')\n"
        "print(len(load_for_training(data).train))"
    )
    environment = os.environ | {"HOME": "/proc/nowhere", "HF_HOME": "/proc/nowhere"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout == "5\n"


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_image_is_named(tree: Path, workers: int) -> None:
    (tree / "train" / "cat" / "broken.png").write_bytes(b"not an image")
    split = load_split(folder(tree, workers=workers), "train")
    with pytest.raises(DataError, match=r"cat/broken\.png: cannot be decoded") as caught:
        everything(split)
    assert "Traceback" not in str(caught.value)


def test_images_of_skipped_batches_are_not_decoded(tree: Path) -> None:
    (tree / "train" / "cat" / "0.png").write_bytes(b"not an image")
    split = load_split(folder(tree), "train")
    with pytest.raises(DataError, match=r"0\.png"):
        next(split.batches(2))
    assert [len(labels) for _, labels in split.batches(2, skip=1)] == [2, 1]


def test_a_truncated_image_is_named(tmp_path: Path) -> None:
    write_image(tmp_path / "whole.png")
    (tmp_path / "half.png").write_bytes((tmp_path / "whole.png").read_bytes()[:500])
    decode(tmp_path / "whole.png", 16, 16)
    with pytest.raises(DataError, match=r"half\.png: cannot be decoded"):
        decode(tmp_path / "half.png", 16, 16)
