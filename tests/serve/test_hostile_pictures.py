"A corpus of hostile pictures: each is answered or refused, at once, and never with an accident."

import struct
import zlib

import pytest
from PIL import Image, ImageFile
from serving import photograph, saved

from snn.serve.pictures import MEGAPIXELS


def chunk(kind, body):
    return (
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    )


def png(width, height, data=b"", bits=8, colour=0, extra=b""):
    "A PNG that says what it likes about itself."
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0))
        + extra
        + chunk(b"IDAT", zlib.compress(data))
        + chunk(b"IEND", b"")
    )


JPEG, PNG = saved(photograph(), "JPEG"), saved(photograph())
FRAMES = [Image.new("P", (9, 9), i % 250) for i in range(300)]

# Made when they are wanted: some take a while, and each process that collects tests reads this file.
ANSWERED = {
    "one pixel": lambda: saved(Image.new("RGB", (1, 1), "red")),
    "a line of 20,000 pixels": lambda: saved(Image.new("L", (20_000, 1))),
    "20,000 pixels wide, 800 high": lambda: saved(Image.new("1", (20_000, 800))),
    "made for print (CMYK)": lambda: saved(Image.new("CMYK", (30, 20)), "JPEG"),
    "transparent": lambda: saved(Image.new("RGBA", (30, 20), (0, 0, 0, 0))),
    "black and white": lambda: saved(Image.new("1", (30, 20))),
    "16 bits of grey": lambda: saved(Image.new("I;16", (30, 20))),
    "palette with transparency": lambda: saved(Image.new("P", (30, 20)), transparency=0),
    "animated GIF": lambda: saved(FRAMES[0], "GIF", save_all=True, append_images=FRAMES[1:]),
    "animated PNG": lambda: saved(FRAMES[0], "PNG", save_all=True, append_images=FRAMES[1:5]),
    "animated WebP": lambda: saved(
        FRAMES[0], "WEBP", save_all=True, append_images=FRAMES[1:5]
    ),
    "JPEG that is also a page": lambda: JPEG + b"<html><script>alert(1)</script></html>",
    "JPEG that is also an archive": lambda: (
        JPEG + b"PK\x03\x04" + bytes(100) + b"PK\x05\x06" + bytes(18)
    ),
    "GIF that is also a script": lambda: (
        saved(Image.new("P", (9, 9)), "GIF") + b"*/=1;alert(1)"
    ),
}

REFUSED = {
    "nothing": lambda: (b"", "not-an-image"),
    "a letter named .jpg": lambda: (b"Dear cat,", "not-an-image"),
    "a page": lambda: (b"<!doctype html><img src=x onerror=alert(1)>", "not-an-image"),
    "SVG": lambda: (
        b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>',
        "not-an-image",
    ),
    "SVG that asks for a billion laughs": lambda: (
        b'<!DOCTYPE svg [<!ENTITY a "ha"><!ENTITY b "&a;&a;">]><svg>&b;</svg>',
        "not-an-image",
    ),
    "TIFF": lambda: (saved(Image.new("L", (9, 9)), "TIFF"), "not-an-image"),
    "PostScript": lambda: (
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(/etc/passwd) run\n",
        "not-an-image",
    ),
    "PDF": lambda: (b"%PDF-1.7\n", "not-an-image"),
    "icon": lambda: (saved(Image.new("RGBA", (16, 16)), "ICO"), "not-an-image"),
    "program": lambda: (b"\x7fELF" + bytes(100), "not-an-image"),
    "archive": lambda: (b"PK\x03\x04" + bytes(100), "not-an-image"),
    "only the beginning of a PNG": lambda: (PNG[:8], "not-an-image"),
    "half a JPEG": lambda: (JPEG[: len(JPEG) // 2], "damaged-image"),
    "half a PNG": lambda: (PNG[: len(PNG) // 2], "damaged-image"),
    "half a WebP": lambda: (
        saved(photograph(), "WEBP")[:200],
        ("damaged-image", "not-an-image"),
    ),
    "PNG with a wrong checksum": lambda: (
        PNG[:60] + b"\x00\x01\x02" + PNG[63:],
        ("damaged-image", "not-an-image"),
    ),
    "PNG with no pixels in it": lambda: (png(100, 100), "damaged-image"),
    "PNG of no width": lambda: (png(0, 100), ("damaged-image", "not-an-image")),
    "BMP of negative size": lambda: (
        b"BM"
        + struct.pack("<IHHIIiiHHIIiiII", 100, 0, 0, 54, 40, -9, -9, 1, 24, 0, 0, 0, 0, 0, 0),
        ("damaged-image", "not-an-image", "too-many-pixels"),
    ),
    "20,000 by 20,000 pixels": lambda: (
        saved(Image.new("1", (20_000, 20_000))),
        "too-many-pixels",
    ),
    "17 million pixels": lambda: (saved(Image.new("1", (17_000, 1_000))), "too-many-pixels"),
    "bomb that Pillow only warns of": lambda: (
        saved(Image.new("1", (10_000, 10_000))),
        "too-many-pixels",
    ),
    "header that claims 4 billion by 4 billion": lambda: (
        png(2**31 - 1, 2**31 - 1),
        ("too-many-pixels", "not-an-image"),
    ),
    "GIF that claims 65,535 by 65,535": lambda: (
        b"GIF89a\xff\xff\xff\xff\x00\x00\x00,\x00\x00\x00\x00\xff\xff\xff\xff\x00\x02\x02D\x01\x00;",
        "too-many-pixels",
    ),
    "JPEG that claims 65,500 by 65,500": lambda: (
        JPEG[: JPEG.index(b"\xff\xc0") + 5]
        + struct.pack(">HH", 65_500, 65_500)
        + JPEG[JPEG.index(b"\xff\xc0") + 9 :],
        "too-many-pixels",
    ),
    "PNG with a text bomb": lambda: (
        png(
            9, 9, bytes(90), extra=chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(80 * 2**20)))
        ),
        ("not-an-image", "damaged-image"),
    ),
    "PNG with a colour-profile bomb": lambda: (
        png(9, 9, b"", extra=chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(80 * 2**20)))),
        ("not-an-image", "damaged-image"),
    ),
}


@pytest.mark.parametrize("name", ANSWERED)
def test_an_odd_picture_is_answered(client, name):
    answer = client.post(
        "/predict?explain=true", files=[("image", ("cat.jpg", ANSWERED[name]()))]
    )
    assert answer.status_code == 200, answer.text
    assert 0 < answer.json()["predictions"][0]["probability"] < 1


@pytest.fixture
def decoded(monkeypatch):
    "The sizes of all pictures whose pixels were decoded."
    sizes, load = [], ImageFile.ImageFile.load

    def recorded(self):
        sizes.append(self.size)
        return load(self)

    monkeypatch.setattr(ImageFile.ImageFile, "load", recorded)
    return sizes


@pytest.mark.parametrize("name", REFUSED)
def test_a_hostile_picture_is_refused(client, name, decoded):
    content, kinds = REFUSED[name]()
    answer = client.post("/predict", files=[("image", ("cat.jpg", content))])
    assert answer.status_code in (413, 422), answer.text
    assert answer.json()["type"].removeprefix("/docs#") in kinds
    assert all(width * height <= MEGAPIXELS * 10**6 for width, height in decoded), (
        "a picture that is too large is refused before any work is done"
    )


def test_nothing_of_a_polyglot_comes_back(client):
    import base64

    answer = client.post(
        "/predict?explain=true",
        files=[("image", ("cat.jpg", ANSWERED["JPEG that is also a page"]()))],
    )
    why = answer.json()["predictions"][0]["explanation"]
    for key in ("picture", "seen", "saliency"):
        assert b"script" not in base64.b64decode(why[key].split(",")[1])


def test_a_picture_cut_anywhere_is_no_accident(client):
    for kind in ("PNG", "JPEG", "GIF", "WEBP", "BMP"):
        content = saved(photograph(8, 8), kind)
        for cut in range(1, len(content), max(1, len(content) // 40)):
            assert client.post(
                "/predict", files=[("image", ("a", content[:cut]))]
            ).status_code in (200, 413, 422)


def test_a_picture_with_any_byte_changed_is_no_accident(client):
    import numpy as np

    rng = np.random.default_rng(0)
    for kind in ("PNG", "JPEG", "GIF", "WEBP", "BMP"):
        content = saved(photograph(8, 8), kind)
        for _ in range(40):
            broken = bytearray(content)
            for place in rng.integers(0, len(content), 3):
                broken[place] = rng.integers(256)
            assert client.post(
                "/predict", files=[("image", ("a", bytes(broken)))]
            ).status_code in (200, 413, 422)
