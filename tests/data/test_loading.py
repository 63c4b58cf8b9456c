import socket
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from qat.data.augment import Augmenter, normalize
from qat.data.decode import decode
from qat.data.loading import check_fits, load_split, load_splits
from qat.data.split import MemorySplit, Split
from qat.errors import DataError
from qat.quantize.image_grid import image_grid
from qat.recipe.schema import Augment, Data

pytestmark = pytest.mark.filterwarnings("error")

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
BASE: dict[str, Any] = {
    "root": None,
    "image_size": 16,
    "resize": None,
    "mean": (0.5, 0.5, 0.5),
    "std": (0.5, 0.5, 0.5),
    "batch_size": 4,
    "eval_batch_size": 4,
    "workers": 0,
    "train_split": "train",
    "test_split": "test",
}
NO_AUGMENT: dict[str, Any] = {"flip": False, "translate": 0.0, "rotate": 0.0, "scale": None, "crop": None}


def augment(**changes: Any) -> Augment:
    return Augment(**(NO_AUGMENT | changes))


def digits(**changes: Any) -> Data:
    return Data(**({**BASE, "dataset": "digits", "augment": augment()} | changes))


def folder(root: Path | None, **changes: Any) -> Data:
    settings = {**BASE, "dataset": "imagefolder", "root": root and str(root), "augment": augment()}
    return Data(**(settings | changes))


def write_image(path: Path, seed: int = 0, size: tuple[int, int] = (24, 20), mode: str = "RGB") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(path)


def make_tree(root: Path, **splits: dict[str, int]) -> Path:
    for split, classes in splits.items():
        for name, count in classes.items():
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                write_image(root / split / name / f"{i}.png", seed=zlib.crc32(f"{split}/{name}/{i}".encode()))
    return root


@pytest.fixture(autouse=True, scope="module")
def _caches_stay_out_of_the_home_directory(tmp_path_factory: pytest.TempPathFactory) -> Any:
    import datasets

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("arrow"))
        yield


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    return make_tree(tmp_path / "images", train={"cat": 3, "dog": 2}, test={"cat": 1, "dog": 2})


def everything(split: Split, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    images, labels = zip(*split.batches(4, **options), strict=True)
    return torch.cat(images), torch.cat(labels)


# Digits


def test_digits_are_1437_training_and_360_stratified_test_images() -> None:
    train, test = load_splits(digits())
    assert (len(train), len(test), train.num_classes) == (1437, 360, 10)
    assert train.class_names == [str(i) for i in range(10)]
    _, labels = everything(test)
    assert labels.bincount().min() >= 34
    assert labels.bincount().max() <= 38


def test_digits_arrive_as_uint8_with_three_equal_channels_and_the_full_range() -> None:
    images, labels = next(load_split(digits(image_size=8), "test").batches(360))
    assert (images.dtype, labels.dtype) == (torch.uint8, torch.int64)
    assert images.shape == (360, 3, 8, 8)
    assert torch.equal(images[:, 0], images[:, 2])
    assert (images.min(), images.max()) == (0, 255)
    assert set(images.unique().tolist()) <= {round(v * 255 / 16) for v in range(17)}


def test_training_and_test_digits_do_not_share_an_image() -> None:
    train, test = load_splits(digits(image_size=8))
    seen = {image.numpy().tobytes() for image in everything(train)[0]}
    assert not seen & {image.numpy().tobytes() for image in everything(test)[0]}


def test_digits_of_one_size_are_made_once() -> None:
    assert load_split(digits(), "test") is load_split(digits(), "test")
    assert load_split(digits(), "test") is not load_split(digits(image_size=8), "test")


# Batches


def small_split(count: int = 10) -> MemorySplit:
    images = torch.arange(count, dtype=torch.uint8).view(-1, 1, 1, 1)
    return MemorySplit(["even", "odd"], images, torch.arange(count) % 2)


def test_the_order_without_a_seed_is_the_splits_own() -> None:
    images, labels = everything(small_split())
    assert images[:, 0, 0, 0].tolist() == list(range(10))
    assert labels.tolist() == [0, 1] * 5


def test_a_seed_alone_decides_the_order() -> None:
    first, labels = everything(small_split(), shuffle_seed=3)
    torch.rand(5)
    again, _ = everything(small_split(), shuffle_seed=3)
    other, _ = everything(small_split(), shuffle_seed=4)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert sorted(first[:, 0, 0, 0].tolist()) == list(range(10))
    assert torch.equal(first[:, 0, 0, 0] % 2, labels)


@pytest.mark.parametrize("skip", [0, 1, 2, 3])
def test_skipped_batches_are_the_first_and_the_others_stay_as_they_are(skip: int) -> None:
    every = list(small_split().batches(4, shuffle_seed=3))
    left = list(small_split().batches(4, shuffle_seed=3, skip=skip))
    assert len(left) == len(every) - skip
    for (images, labels), (others, other_labels) in zip(left, every[skip:], strict=True):
        assert torch.equal(images, others)
        assert torch.equal(labels, other_labels)


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("count", [3, 8, 10])
def test_batch_count_is_the_number_of_batches(count: int, drop_last: bool) -> None:
    batches = list(small_split(count).batches(4, drop_last=drop_last))
    assert len(batches) == small_split(count).batch_count(4, drop_last)
    if drop_last:
        assert all(len(images) == 4 for images, _ in batches)
    else:
        assert sum(len(images) for images, _ in batches) == count


def test_a_fingerprint_changes_with_a_pixel_a_label_and_the_order() -> None:
    split = small_split()
    pixel = split._images.clone()
    pixel[4] += 1
    variants = [
        split,
        MemorySplit(split.class_names, pixel, split.labels),
        MemorySplit(split.class_names, split._images, 1 - split.labels),
        MemorySplit(split.class_names, split._images.flip(0), split.labels.flip(0)),
    ]
    assert len({variant.fingerprint() for variant in variants}) == 4
    assert small_split().fingerprint() == split.fingerprint() == split.content_fingerprint()


def test_a_network_with_other_classes_than_the_data_is_refused() -> None:
    check_fits(small_split(), 2)
    with pytest.raises(DataError, match="the data has 2 classes, the network 1000"):
        check_fits(small_split(), 1000)


# Image folders


def test_a_folder_gives_square_images_and_labels_in_a_fixed_order(tree: Path) -> None:
    train, test = load_splits(folder(tree))
    images, labels = everything(train)
    assert images.shape == (5, 3, 16, 16)
    assert images.dtype == torch.uint8
    assert labels.tolist() == [0, 0, 0, 1, 1]
    assert everything(test)[1].tolist() == [0, 1, 1]
    assert train.class_names == test.class_names == ["cat", "dog"]


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


def test_a_folder_inside_a_class_is_refused(tree: Path) -> None:
    (tree / "train" / "cat" / "more").mkdir()
    with pytest.raises(DataError, match=r"cat: has a folder 'more'"):
        load_split(folder(tree), "train")


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


# Decoding


@pytest.mark.parametrize(
    ("mode", "suffix"),
    [
        ("RGB", "jpg"),
        ("L", "jpg"),
        ("CMYK", "jpg"),
        ("1", "png"),
        ("L", "png"),
        ("P", "png"),
        ("RGBA", "png"),
    ],
)
def test_any_mode_becomes_rgb(tmp_path: Path, mode: str, suffix: str) -> None:
    path = tmp_path / f"image.{suffix}"
    write_image(path, mode=mode)
    image = decode(path, 16, 16)
    assert (image.shape, image.dtype) == ((3, 16, 16), torch.uint8)
    assert image.float().std() > 10
    if mode in ("1", "L"):
        assert torch.equal(image[0], image[1])


def test_a_palette_with_transparency_becomes_rgb_without_a_warning(tmp_path: Path) -> None:
    image = Image.fromarray(np.full((4, 4), 7, np.uint8), mode=None).convert("P")
    image.save(tmp_path / "p.png", transparency=bytes(range(256)))
    assert torch.equal(decode(tmp_path / "p.png", 4, 4), torch.full((3, 4, 4), 7, dtype=torch.uint8))


def test_sixteen_bit_greyscale_keeps_its_range(tmp_path: Path) -> None:
    Image.fromarray(np.arange(0, 65536, 1024, dtype=np.uint16).reshape(8, 8)).save(tmp_path / "deep.png")
    image = decode(tmp_path / "deep.png", 8, 8)
    assert image[0].flatten().tolist() == list(range(0, 256, 4))


def test_floating_point_pixels_are_refused(tmp_path: Path) -> None:
    Image.fromarray(np.ones((4, 4), np.float32)).save(tmp_path / "f.tiff")
    with pytest.raises(DataError, match="no defined range"):
        decode(tmp_path / "f.tiff", 4, 4)


@pytest.mark.parametrize("size", [(40, 20), (20, 40)])
def test_the_centre_of_the_shorter_side_is_kept(tmp_path: Path, size: tuple[int, int]) -> None:
    pixels = np.zeros((size[1], size[0], 3), np.uint8)
    pixels[size[1] // 2 - 5 : size[1] // 2 + 5, size[0] // 2 - 5 : size[0] // 2 + 5] = 255
    Image.fromarray(pixels).save(tmp_path / "i.png")
    image = decode(tmp_path / "i.png", 20, 10)
    assert torch.equal(image, torch.full((3, 10, 10), 255, dtype=torch.uint8))


def test_training_images_are_larger_only_when_a_random_crop_follows(tree: Path) -> None:
    cropped = folder(tree, image_size=14, augment=augment(crop=(0.5, 1.0)))
    assert everything(load_split(cropped, "train"))[0].shape[-2:] == (16, 16)
    assert everything(load_split(cropped, "test"))[0].shape[-2:] == (14, 14)
    assert everything(load_split(folder(tree, image_size=14), "train"))[0].shape[-2:] == (14, 14)


# Arithmetic


def test_normalize_is_the_formula_per_channel() -> None:
    images = torch.randint(0, 256, (2, 3, 4, 4), dtype=torch.uint8)
    result = normalize(images, IMAGENET_MEAN, IMAGENET_STD)
    expected = (images[:, 1].double() / 255 - 0.456) / 0.224
    torch.testing.assert_close(result[:, 1].double(), expected, rtol=0, atol=1e-6)
    assert normalize(images, IMAGENET_MEAN, IMAGENET_STD, torch.bfloat16).dtype == torch.bfloat16
    assert torch.equal(normalize(images.float() / 255, IMAGENET_MEAN, IMAGENET_STD), result)


@pytest.mark.parametrize(
    ("mean", "std"),
    [
        (IMAGENET_MEAN, IMAGENET_STD),
        ((0.0,) * 3, (1.0,) * 3),
        ((0.5,) * 3, (0.5,) * 3),
        ((-1.0,) * 3, (1.0,) * 3),
        ((2.0,) * 3, (0.5,) * 3),
    ],
)
def test_the_image_grid_covers_every_pixel_value_and_zero(mean: Any, std: Any) -> None:
    scale, zero_point = image_grid(mean, std)
    assert 0 <= zero_point <= 255
    assert scale == float(np.float32(scale))
    pixels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 3, 16, 16)
    values = normalize(pixels, mean, std)
    steps = values / scale + zero_point
    assert steps.min() >= -0.001  # float32 rounding alone: no value saturates
    assert steps.max() <= 255.001
    # Every one of the 256 integers is needed but for the step by which the grid was widened.
    low, high = min(0.0, values.min().item()), max(0.0, values.max().item())
    assert high - low <= 255 * scale * (1 + 1e-6) <= high - low + scale * (1 + 1e-3)


def test_the_image_grid_of_raw_pixels_is_the_pixel_grid() -> None:
    assert image_grid((0.0,) * 3, (1.0,) * 3) == (float(np.float32(1 / 255)), 0)


# Augmentation

FULL: dict[str, Any] = {
    "flip": True,
    "translate": 0.1,
    "rotate": 10.0,
    "scale": (0.9, 1.1),
    "crop": (0.5, 1.0),
}


def noise(side: int = 20, count: int = 4) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8, generator=generator)


def test_nothing_configured_only_divides_by_255() -> None:
    images = noise(16)
    assert torch.equal(Augmenter(augment(), 16, seed=0)(images, 0, 0), images.float() / 255)


def test_augmented_batches_have_the_networks_size_and_range() -> None:
    result = Augmenter(augment(**FULL), 16, seed=0)(noise(), 0, 0)
    assert (result.shape, result.dtype) == ((4, 3, 16, 16), torch.float32)
    assert result.min() >= 0
    assert result.max() <= 1


def test_seed_epoch_and_step_alone_decide_the_result() -> None:
    augmenter = Augmenter(augment(**FULL), 16, seed=1)
    first = augmenter(noise(), 2, 3)
    augmenter(noise(), 2, 4)
    torch.rand(7)
    assert torch.equal(augmenter(noise(), 2, 3), first)
    assert torch.equal(Augmenter(augment(**FULL), 16, seed=1)(noise(), 2, 3), first)
    for seed, epoch, step in [(2, 2, 3), (1, 3, 3), (1, 2, 4)]:
        assert not torch.equal(Augmenter(augment(**FULL), 16, seed)(noise(), epoch, step), first)


def test_augmenting_leaves_the_global_random_state_alone() -> None:
    before = torch.get_rng_state()
    Augmenter(augment(**FULL), 16, seed=1)(noise(), 0, 0)
    assert torch.equal(before, torch.get_rng_state())


def test_a_flip_mirrors_some_images_and_leaves_the_others() -> None:
    images = noise(16, 32)
    result = Augmenter(augment(flip=True), 16, seed=0)(images, 0, 0)
    plain = images.float() / 255
    same = [torch.equal(a, b) for a, b in zip(result, plain, strict=True)]
    mirrored = [torch.equal(a, b) for a, b in zip(result, plain.flip(-1), strict=True)]
    assert all(s != m for s, m in zip(same, mirrored, strict=True))
    assert 8 <= sum(same) <= 24


def test_images_of_a_batch_get_different_crops() -> None:
    images = noise(20, 1).expand(4, -1, -1, -1)
    result = Augmenter(augment(crop=(0.3, 1.0)), 16, seed=0)(images, 0, 0)
    assert not torch.equal(result[0], result[1])


def test_translation_moves_by_at_most_its_share_and_fills_with_black() -> None:
    images = torch.zeros(16, 3, 20, 20, dtype=torch.uint8)
    images[:, :, 10, 10] = 255
    mass = Augmenter(augment(translate=0.1), 20, seed=0)(images, 0, 0)
    assert mass[:, :, 7:14, 7:14].sum() == pytest.approx(mass.sum().item())
    assert not torch.equal(mass[0], mass[1])
    white = torch.full((16, 3, 20, 20), 255, dtype=torch.uint8)
    assert Augmenter(augment(translate=0.1), 20, seed=0)(white, 0, 0).min() < 0.5


def test_images_of_another_size_or_type_are_refused() -> None:
    with pytest.raises(ValueError, match="no random crop"):
        Augmenter(augment(flip=True), 16, seed=0)(noise(20), 0, 0)
    with pytest.raises(ValueError, match="uint8"):
        Augmenter(augment(), 16, seed=0)(noise(16).float(), 0, 0)
