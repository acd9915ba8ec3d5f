"""Photographs as people have them: any size, turned, grey, transparent, made for print. The network sees a square in RGB."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from snn.data.photographs import read_photograph
from snn.errors import InputError

PHOTOGRAPHS = Path(__file__).resolve().parent.parent.parent / "shared" / "data"


def scene(width=90, height=60) -> Image.Image:
    "A red, a green, a blue and a yellow quarter: whatever is turned or mirrored, is seen."
    picture = Image.new("RGB", (width, height), "red")
    picture.paste((0, 153, 0), (width // 2, 0, width, height // 2))
    picture.paste((0, 0, 255), (0, height // 2, width // 2, height))
    picture.paste((255, 255, 0), (width // 2, height // 2, width, height))
    return picture


UPRIGHT = np.asarray(scene(64, 64)).astype(int)


def far_from_upright(seen: np.ndarray) -> int:
    "The largest difference to the scene, its edges apart."
    inside = np.zeros((64, 64), bool)
    inside[6:26, 6:26] = inside[6:26, 38:58] = inside[38:58, 6:26] = inside[38:58, 38:58] = (
        True
    )
    return int(np.abs(seen.astype(int) - UPRIGHT)[inside].max())


UNDO = {
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}  # how a camera held that way stores what it saw


@pytest.mark.parametrize("orientation", UNDO)
def test_a_camera_may_be_held_in_any_way(orientation, tmp_path):
    exif, way = Image.Exif(), UNDO[orientation]
    exif[0x0112] = orientation
    (scene().transpose(way) if way is not None else scene()).save(
        tmp_path / "camera.jpeg", exif=exif, quality=95
    )
    assert far_from_upright(read_photograph(tmp_path / "camera.jpeg")) < 25


@pytest.mark.parametrize(
    "mode, name",
    [
        ("RGB", "a.jpeg"),
        ("RGB", "a.png"),
        ("RGB", "a.bmp"),
        ("RGB", "a.tiff"),
        ("RGB", "a.webp"),
        ("P", "a.gif"),
        ("P", "a.png"),
        ("RGBA", "a.png"),
        ("RGBA", "a.webp"),
        ("CMYK", "a.jpeg"),
        ("CMYK", "a.tiff"),
        ("YCbCr", "a.jpeg"),
    ],
)
def test_any_kind_of_file_and_colour_is_seen_as_it_is(mode, name, tmp_path):
    scene().convert(mode).save(tmp_path / name)
    assert (
        far_from_upright(read_photograph(tmp_path / name)) < 40
    )  # printing colours and palettes are a little off


@pytest.mark.parametrize(
    "mode, name",
    [
        ("L", "a.jpeg"),
        ("L", "a.png"),
        ("LA", "a.png"),
        ("1", "a.png"),
        ("I;16", "a.png"),
        ("I;16", "a.tiff"),
        ("I", "a.tiff"),
        ("F", "a.tiff"),
    ],
)
def test_a_grey_picture_has_three_equal_colours(mode, name, tmp_path):
    grey = np.tile(np.linspace(0, 255, 64), (64, 1)).round().astype(np.uint8)
    depth = {
        "I;16": lambda: Image.fromarray(grey.astype(np.uint16) * 257),
        "I": lambda: Image.fromarray(grey.astype(np.int32) * 257),
        "F": lambda: Image.fromarray(grey.astype(np.float32) / 255),
    }.get(mode, lambda: Image.fromarray(grey).convert(mode))
    depth().save(tmp_path / name)
    seen = read_photograph(tmp_path / name)
    assert (seen == seen[..., :1]).all()
    assert seen[:, :8].mean() < 30 and seen[:, -8:].mean() > 225, "it goes from black to white"
    if mode != "1":
        assert np.abs(seen[..., 0].astype(int) - grey).max() < 12


def test_what_is_transparent_stands_on_white(tmp_path):
    picture = Image.new("RGBA", (80, 80), (0, 0, 0, 0))
    picture.paste((0, 0, 255, 255), (20, 20, 60, 60))
    picture.save(tmp_path / "cut out.png")
    seen = read_photograph(tmp_path / "cut out.png")
    assert (seen[:8] == 255).all() and (seen[30, 30] == [0, 0, 255]).all()


@pytest.mark.parametrize(
    "size", [(1, 1), (3, 2), (64, 64), (65, 63), (2000, 10), (10, 2000), (4000, 3000)]
)
@pytest.mark.parametrize("edge", [8, 64])
def test_any_size_becomes_the_square_that_the_network_takes(size, edge, tmp_path):
    Image.new("RGB", size, (10, 200, 30)).save(tmp_path / "photo.png")
    seen = read_photograph(tmp_path / "photo.png", edge)
    assert (
        seen.shape == (edge, edge, 3)
        and seen.dtype == np.uint8
        and (seen == [10, 200, 30]).all()
    )


def test_the_square_is_the_middle_of_the_picture(tmp_path):
    picture = Image.new("RGB", (300, 100), "red")
    picture.paste("blue", (100, 0, 200, 100))
    picture.save(tmp_path / "wide.png")
    assert (
        read_photograph(tmp_path / "wide.png", prepared="crop")[5:-5, 5:-5] == [0, 0, 255]
    ).all()


def test_an_odd_note_in_a_file_is_no_warning(tmp_path, recwarn):
    picture = Image.new("P", (20, 20))
    picture.putpalette([255, 0, 0] * 256)
    picture.save(tmp_path / "palette.png", transparency=bytes([128] * 256))
    assert read_photograph(tmp_path / "palette.png").shape == (64, 64, 3) and not recwarn.list


@pytest.mark.parametrize(
    "name, brightness", [("grumpy_cat.jpeg", 176), ("gargouille.jpeg", 96)]
)
def test_photographs_of_a_camera(name, brightness):
    if not (PHOTOGRAPHS / name).is_file():
        pytest.skip(f"no ../shared/data/{name}")
    seen = read_photograph(PHOTOGRAPHS / name)
    assert seen.shape == (64, 64, 3) and abs(seen.mean() - brightness) < 3 and seen.std() > 40


def test_a_letter_is_refused(tmp_path):
    (tmp_path / "letter.jpeg").write_text("Dear cat,")
    with pytest.raises(InputError, match="not an image"):
        read_photograph(tmp_path / "letter.jpeg")
