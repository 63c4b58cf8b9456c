"""Image files of every mode become RGB pixels of the size asked for."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from qat.data.decode import decode
from qat.data.loading import load_split
from qat.errors import DataError
from tests.helpers.image_folders import augment, everything, folder, write_image


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


@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_turned_upright_only_on_request(tmp_path: Path, orientation: int) -> None:
    pixels = np.zeros((24, 24, 3), np.uint8)
    pixels[:12, :6] = 255  # stored: higher than wide, in the corner of the first pixel
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(pixels).save(tmp_path / "i.png", exif=exif)
    stored, upright = (decode(tmp_path / "i.png", 24, 24, turn=turn)[0] for turn in (False, True))
    expected = np.asarray(ImageOps.exif_transpose(Image.open(tmp_path / "i.png")))[..., 0]
    assert np.array_equal(stored.numpy(), pixels[..., 0])
    assert np.array_equal(upright.numpy(), expected)
    assert torch.equal(stored, upright) == (orientation == 1)


def test_a_recipe_says_whether_images_are_turned(tree: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 3
    first = tree / "train" / "cat" / "0.png"
    Image.open(first).save(first, exif=exif)
    for workers in (0, 1):
        kept, turned = (
            everything(load_split(folder(tree, exif_orientation=turn, workers=workers), "train"))[0]
            for turn in (False, True)
        )
        assert not torch.equal(kept[0], turned[0])
        assert torch.equal(kept[1:], turned[1:])


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize(
    "exif",
    [
        b"Exif\0\0",
        b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03",
        b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x02\0\0\0\x04six\0\0\0\0\0",
        b"nonsense",
    ],
)
def test_an_image_whose_orientation_cannot_be_read_is_as_stored(tmp_path: Path, exif: bytes) -> None:
    write_image(tmp_path / "i.jpg")
    with Image.open(tmp_path / "i.jpg") as image:
        image.save(tmp_path / "i.jpg", exif=exif)
    kept, turned = (decode(tmp_path / "i.jpg", 8, 8, turn=turn) for turn in (False, True))
    assert torch.equal(kept, turned)


def test_a_program_that_calls_itself_an_image_is_not_run(tmp_path: Path) -> None:
    path = tmp_path / "x.jpg"
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n")
    with pytest.raises(DataError, match=r"x\.jpg: cannot be decoded: cannot identify image file"):
        decode(path, 8, 8)
