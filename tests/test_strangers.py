"""What strangers bring: data sets in several files, pictures with odd notes, names of any kind. Handled as they are meant, or refused with one sentence."""

import fcntl
import io
import json
import os
import struct
import subprocess
import sys

import h5py
import numpy as np
import pytest
from fuzzing import VALUES
from hypothesis import HealthCheck, example, given, seed, settings, strategies
from matplotlib.cbook import is_math_text
from matplotlib.text import Text
from PIL import Image, PngImagePlugin

from snn.cli.console import shown
from snn.cloud.messages import LAMBDA, check_run, weight_bytes
from snn.data import apart, models, photographs
from snn.data import h5 as data
from snn.errors import InputError
from snn.maths import model, network
from snn.maths.parameters import from_dict, parse
from snn.viz import answers


def arrays(size: int = 8, train: int = 24, test: int = 8) -> dict[str, np.ndarray]:
    "What a datasets.h5 holds."
    rng = np.random.default_rng(1)
    images = lambda m: rng.integers(0, 256, (m, size, size, 3)).astype(np.uint8)
    return {
        "train_set_x": images(train),
        "train_set_y": np.arange(train) % 2,
        "test_set_x": images(test),
        "test_set_y": np.arange(test) % 2,
        "list_classes": np.array([b"non-cat", b"cat"]),
    }


def saved(path, **changes):
    "A plain file of these arrays; without those that are None."
    with h5py.File(path, "w") as file:
        for name, values in {**arrays(), **changes}.items():
            if values is not None:
                file[name] = values
    return path


def virtual(folder):
    "Training images that are put together from two files."
    whole, path = arrays(), folder / "virtual.h5"
    layout = h5py.VirtualLayout((24, 8, 8, 3), np.uint8)
    for number in (0, 1):
        with h5py.File(folder / f"images-{number}.h5", "w") as file:
            file["x"] = whole["train_set_x"][12 * number : 12 * number + 12]
        layout[12 * number : 12 * number + 12] = h5py.VirtualSource(
            f"images-{number}.h5", "x", (12, 8, 8, 3)
        )
    saved(path, train_set_x=None)
    with h5py.File(path, "r+", libver="latest") as file:
        file.create_virtual_dataset("train_set_x", layout, fillvalue=0)
    return path, "images-1.h5"


def linked(folder):
    "Every array in another file."
    saved(folder / "part.h5")
    with h5py.File(folder / "links.h5", "w") as file:
        for name in data.NAMES:
            file[name] = h5py.ExternalLink("part.h5", name)
    return folder / "links.h5", "part.h5"


def raw(folder):
    "Training images as bare numbers beside the file."
    whole, path = arrays(), folder / "raw.h5"
    (folder / "images.raw").write_bytes(whole["train_set_x"].tobytes())
    saved(path, train_set_x=None)
    with h5py.File(path, "r+") as file:
        file.create_dataset(
            "train_set_x",
            (24, 8, 8, 3),
            np.uint8,
            external=[("images.raw", 0, h5py.h5f.UNLIMITED)],
        )
    return path, "images.raw"


LEADING = {"virtual": virtual, "linked": linked, "raw": raw}


@pytest.mark.parametrize("kind", LEADING)
def test_a_data_set_that_leads_to_other_files_is_sent_whole(kind, tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir(), monkeypatch.chdir(tmp_path / "elsewhere")
    path, _ = LEADING[kind](tmp_path)
    (tmp_path / "copy.h5").write_bytes(data.content(path))
    for got, right in zip(data.read(tmp_path / "copy.h5", alone=True)[:4], arrays().values()):
        assert (got == right).all()


@pytest.mark.parametrize("kind", LEADING)
def test_a_missing_source_is_named(kind, snn, tmp_path):
    path, source = LEADING[kind](tmp_path)
    (tmp_path / source).unlink()
    code, said, error = snn("data", "info", path)
    assert (
        (code, said) == (2, "")
        and str(path) in error
        and source in error
        and "not there" in error
    )


@pytest.mark.parametrize("kind", LEADING)
def test_what_travels_alone_may_not_lead_elsewhere(kind, tmp_path):
    path, _ = LEADING[kind](tmp_path)
    with pytest.raises(InputError, match="leads to another file, which has not come along"):
        data.read(path, "s3://b/x.h5", alone=True)


def test_plain_virtual_and_two_files_train_to_the_same_bytes(snn, tmp_path):
    (tmp_path / "parameters.json").write_text(json.dumps(VALUES))
    saved(tmp_path / "plain.h5")
    (
        saved(tmp_path / "train.h5", test_set_x=None, test_set_y=None),
        saved(tmp_path / "test.h5", train_set_x=None, train_set_y=None),
    )
    made = []
    for number, given_data in enumerate(
        [
            [tmp_path / "plain.h5"],
            [virtual(tmp_path)[0]],
            [tmp_path / "train.h5", "--test", tmp_path / "test.h5"],
        ]
    ):
        out = tmp_path / f"out [v{number}]"
        code, said, error = snn(
            "train",
            "--data",
            *given_data,
            "--parameters",
            tmp_path / "parameters.json",
            "--out",
            out,
        )
        assert code == 0 and f"params.h5       {out / 'params.h5'}" in said, error
        made.append((out / "params.h5").read_bytes())
    assert made[0] == made[1] == made[2]
    code, said, error = snn(
        "evaluate",
        "--json",
        "--model",
        tmp_path / "out [v0]" / "params.h5",
        "--data",
        tmp_path / "test.h5",
    )
    assert code == 0 and json.loads(said)["images"] == 8, error


def test_two_files_are_joined_and_checked(snn, tmp_path):
    train, test = (
        saved(tmp_path / "train.h5", test_set_x=None, test_set_y=None),
        saved(tmp_path / "test.h5", train_set_x=None, train_set_y=None),
    )
    assert snn("data", "join", train, test, "--out", tmp_path / "both.h5")[0] == 0
    assert (data.read(tmp_path / "both.h5").test_x == arrays()["test_set_x"]).all()
    assert "nothing is wrong" in snn("data", "check", train, test)[1]
    saved(tmp_path / "same.h5", test_set_x=arrays()["train_set_x"][:8])
    assert (
        "8 of the test images are also among the training images"
        in snn("data", "check", tmp_path / "same.h5")[1]
    )
    saved(
        tmp_path / "odd.h5",
        train_set_x=arrays()["train_set_x"][:, :4],
        train_set_y=np.ones(3, int),
        list_classes=[b"cat", b"cat"],
    )
    code, _, error = snn("data", "check", tmp_path / "odd.h5")
    assert code == 2 and all(
        word in error for word in ("4x8 pixels", "3 labels for 24", "both classes cat")
    ), error


def test_a_filter_that_is_missing_is_named(snn, tmp_path):
    whole = arrays()
    with h5py.File(tmp_path / "packed.h5", "w") as file:
        made = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        (
            made.set_chunk(whole["train_set_x"].shape),
            made.set_filter(32001, h5py.h5z.FLAG_OPTIONAL, (2,)),
        )
        h5py.h5d.create(
            file.id,
            b"train_set_x",
            h5py.h5t.NATIVE_UINT8,
            h5py.h5s.create_simple(whole["train_set_x"].shape),
            made,
        )
        for name in data.NAMES[1:]:
            file[name] = whole[name]
    code, _, error = snn("data", "info", tmp_path / "packed.h5")
    assert code == 2 and "filter number 32001" in error


# Class names


@pytest.mark.parametrize("names", [[b"cat", b"cat"], [b"", b"cat"], [b" ", b"cat"]])
def test_class_names_must_tell_the_classes_apart(names, tmp_path):
    with pytest.raises(InputError, match="list_classes"):
        data.read(saved(tmp_path / "x.h5", list_classes=names))


@pytest.mark.parametrize(
    "names", [("images", "cat"), ("[/no]", "[/cat]"), (":cat:", "$x$"), ("猫", "\t")]
)
def test_counts_and_names_of_any_class(names, snn, tmp_path):
    if names[1].isspace():
        names = (names[0], "a\tb")
    path = saved(tmp_path / "x.h5", list_classes=[name.encode() for name in names])
    facts, said = (
        json.loads(snn("data", "info", "--json", path)[1]),
        snn("data", "info", path)[1],
    )
    assert (
        facts["counts"]["training"] == [12, 12]
        and facts["training"]["images"] == 24
        and facts["classes"] == list(names)
    )
    assert "24 images" in said and all(shown(name) in said for name in names)


def test_class_names_as_matlab_writes_them(tmp_path):
    path = saved(tmp_path / "x.h5", list_classes=None)
    with h5py.File(path, "r+") as file:
        for name in ("non-cat", "cat"):
            file[f"#refs#/{name}"] = np.array([[ord(c)] for c in name], np.uint16)
        file["list_classes"] = np.array(
            [[file["#refs#/non-cat"].ref, file["#refs#/cat"].ref]], dtype=h5py.ref_dtype
        )
    assert data.read(path).classes == ("non-cat", "cat")


# Pictures


def scene(width=60, height=40) -> Image.Image:
    "A picture of which each corner is another."
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[..., 0], pixels[..., 1] = (
        np.linspace(0, 255, width)[None],
        np.linspace(0, 255, height)[:, None],
    )
    return Image.fromarray(pixels)


def exif(*entries) -> bytes:
    "EXIF of these (tag, type, count, four bytes)."
    return (
        b"II*\0\x08\0\0\0"
        + struct.pack("<H", len(entries))
        + b"".join(struct.pack("<HHI4s", *entry) for entry in entries)
        + bytes(4)
    )


ODD = {
    "beyond the file": (0x11A, 5, 1, b"\xff\xff\xff\x7f"),
    "of no type": (0x10F, 99, 1, b"abcd"),
    "a text for a number": (0x11B, 2, 4, b"abc\0"),
    "a number for a folder": (0x8769, 4, 1, b"\xff\xff\0\0"),
    "of four billion": (0x131, 2, 2**32 - 1, b"\x08\0\0\0"),
}


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("odd", ODD)
def test_an_odd_note_does_not_change_the_picture(kind, odd, tmp_path):
    turned, right, name = (
        scene().transpose(Image.Transpose.ROTATE_90),
        tmp_path / "right",
        tmp_path / "odd",
    )
    turn = (0x112, 3, 1, b"\x06\0\0\0")
    if kind == "TIFF":
        tags = {0x112: 6, 0x13B: "somebody"}
        turned.save(right, kind, tiffinfo={0x112: 6}), turned.save(name, kind, tiffinfo=tags)
        content = bytearray(name.read_bytes())
        (start,) = struct.unpack_from("<I", content, 4)
        for i in range(*struct.unpack_from("<H", content, start)):
            if content[start + 2 + 12 * i : start + 4 + 12 * i] == b"\x3b\x01":
                content[start + 2 + 12 * i : start + 14 + 12 * i] = struct.pack(
                    "<HHI4s", 0x13B, *ODD[odd][1:]
                )
        name.write_bytes(content)
    else:
        for path, entries in ((right, [turn]), (name, [turn, ODD[odd]])):
            turned.save(
                path,
                kind,
                quality=95,
                exif=(b"Exif\0\0" if kind != "PNG" else b"") + exif(*entries),
            )
    assert (photographs.read_photograph(name) == photographs.read_photograph(right)).all()


def test_junk_long_texts_and_profiles_do_not_hide_a_png(tmp_path):
    right, note = photographs.square(scene()), PngImagePlugin.PngInfo()
    note.add_text("note", "x" * 3_000_000, zip=True), note.add(b"eXIf", b"junk")
    scene().save(tmp_path / "note.png", pnginfo=note, icc_profile=os.urandom(10) * 200_000)
    assert (photographs.read_photograph(tmp_path / "note.png") == right).all()


@pytest.mark.parametrize(
    "error",
    [RuntimeError, struct.error, KeyError, AttributeError, ZeroDivisionError, MemoryError],
)
def test_whatever_a_decoder_raises_is_a_sentence(error, monkeypatch, tmp_path):
    def fail(image):
        raise error("within the decoder")

    scene().save(tmp_path / "a.png")
    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", fail)
    with pytest.raises(InputError, match="a.png: not an image, or a damaged one"):
        photographs.read_photograph(tmp_path / "a.png")


def test_a_decoder_that_speaks_for_itself_is_not_heard(small_model, tmp_path, run_snn):
    scene().save(path := tmp_path / "a.tiff")
    content = bytearray(path.read_bytes())
    at = content.index(struct.pack("<HHI", 277, 3, 1)) + 8  # samples of a pixel
    content[at : at + 2] = struct.pack("<H", 194)
    path.write_bytes(content)
    code, said, error = run_snn("predict", "--model", small_model, path)
    assert (code, said) == (2, "") and len(error.splitlines()) == 1 and str(path) in error


def test_twelve_bits_in_sixteen_are_as_bright_as_the_file_says(tmp_path):
    Image.fromarray(np.full((9, 9), 2048, np.uint16)).save(
        tmp_path / "a.tiff", tiffinfo={281: 4095}
    )
    assert abs(photographs.read_photograph(tmp_path / "a.tiff").astype(int) - 128).max() <= 1


# Folders


@pytest.fixture
def folders(tmp_path):
    "Two folders of six pictures, and how to pack them."
    for number, name in enumerate(("cats", "others")):
        (tmp_path / name).mkdir()
        for n in range(6):
            scene().rotate(30 * number + 7 * n).save(tmp_path / name / f"{n}.png")
    return [
        "data",
        "pack",
        "--cat",
        tmp_path / "cats",
        "--non-cat",
        tmp_path / "others",
        "--size",
        16,
        "--out",
        tmp_path / "new.h5",
    ]


def test_what_is_left_out_of_a_data_set_is_told(snn, folders, tmp_path):
    cats = tmp_path / "cats"
    for name in ("Thumbs.db", "desktop.ini", "README.md", ".hidden", "Icon\r"):
        (cats / name).write_bytes(b"x")
    (
        (cats / "more").mkdir(),
        scene().save(cats / "more" / "a.png"),
        (cats / "gone.png").symlink_to("/nowhere/gone.png"),
    )
    code, said, error = snn(*folders)
    assert (
        code == 0
        and "5 skipped that are no pictures" in error
        and "1 files left out that lie in folders below it: more" in error
    )
    assert "1 left out that are links to files which are not there: gone.png" in error


def test_copies_of_a_picture_are_on_one_side(snn, folders, tmp_path):
    for n in range(6):
        (tmp_path / "cats" / f"{n} (copy).png").write_bytes(
            (tmp_path / "cats" / f"{n}.png").read_bytes()
        )
    code, said, error = snn(*folders)
    found = data.read(tmp_path / "new.h5")
    assert (
        code == 0
        and "6 images are there twice" in error
        and data.doubles(found) == 0
        and len(found.train_x) + len(found.test_x) == 18
    )


def test_a_picture_or_a_folder_of_both_classes_is_refused(snn, folders, tmp_path):
    scene().save(tmp_path / "others" / "again.png")
    code, _, error = snn(*folders)
    assert (
        code == 2 and "0.png" in error and "again.png" in error and "the same image" in error
    )
    folders[5] = tmp_path / "others" / ".." / "cats"
    assert snn(*folders)[0] == 2 and not (tmp_path / "new.h5").exists()


# Runs that can't come to their end


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"validation_fraction": 0.01}, "holds back no image of 24"),
        ({"neurons": {"layer1": 10**9, "layer2": 1}}, "TiB of memory"),
        ({"neurons": {"layer1": 10**5, "layer2": 1}}, "in one piece"),
    ],
)
def test_a_run_that_would_fail_is_refused_before_it_starts(
    changes, words, snn, tmp_path, monkeypatch
):
    monkeypatch.setattr(
        "snn.local.training.train", lambda *_, **__: pytest.fail("the training began")
    )
    monkeypatch.setattr("snn.cloud.messages.memory_here", lambda: 2**35)
    saved(
        tmp_path / "d.h5",
        **{
            name: np.zeros((len(values), 64, 64, 3), np.uint8)
            for name, values in arrays().items()
            if name.endswith("x")
        },
    )
    (tmp_path / "p.json").write_text(json.dumps({**VALUES, **changes}))
    code, _, error = snn(
        "train",
        "--data",
        tmp_path / "d.h5",
        "--parameters",
        tmp_path / "p.json",
        "--quiet",
        "--out",
        tmp_path / "out",
    )
    assert (
        code == 2
        and words in error
        and str(tmp_path / "p.json") in error
        and not (tmp_path / "out").exists()
    )


def test_too_many_mini_batches_are_refused():
    chosen = from_dict({**VALUES, "batch_size": 1})
    check_run(chosen, 7000, 12, 2**30)
    with pytest.raises(InputError, match="8,500 mini-batches"):
        check_run(chosen, 8500, 12, 2**30)
    assert sum(weight_bytes(chosen, 12)) == 8 * (3 * 13 + 4)


def test_whole_numbers_may_be_written_with_a_point():
    assert from_dict({**VALUES, "epochs": 3.0}).epochs == 3


# Names


@pytest.fixture(scope="module")
def small_model(tmp_path_factory):
    "A model of 8x8 pixels."
    chosen, path = from_dict(VALUES), tmp_path_factory.mktemp("model") / "params.h5"
    models.write(
        model.Model(
            chosen,
            [layer[:2] for layer in network.initialise(chosen, 192)],
            ("[/no]", "[bold]cat"),
            8,
        ),
        path,
    )
    return path


@pytest.mark.parametrize(
    "name",
    [
        b"cat [edited].png",
        b"[/b].png",
        b":cat:.png",
        b"caf\xe9.png",
        "猫 ́.png".encode(),
        b"a\rb\x1b[31m.png",
        b"two\nlines.png",
    ],
)
def test_a_name_is_printed_as_it_is(name, snn, small_model, tmp_path):
    path = os.path.join(os.fsencode(tmp_path), name)
    content = io.BytesIO()
    os.makedirs(os.path.dirname(path), exist_ok=True), scene().save(content, "PNG")
    with open(path, "wb") as file:
        file.write(content.getvalue())
    code, said, error = snn("predict", "--model", small_model, os.fsdecode(path))
    assert (
        code == 0
        and shown(os.fsdecode(path)).replace("\\n", "\n") in said.replace("\\n", "\n")
        and ("[/no]" in said or "[bold]cat" in said)
    ), error
    code, said, error = snn("predict", "--json", "--model", small_model, os.fsdecode(path))
    assert code == 0 and len(json.loads(said)) == 1, error


@seed(0)
@settings(max_examples=200, deadline=None, database=None)
@given(strategies.text(min_size=1))
def test_no_name_is_changed_by_the_console(name):
    from snn.cli.console import PlainConsole

    file = io.StringIO()
    PlainConsole(file=file, width=40).print(name)
    assert file.getvalue().replace("\n", "") == shown(name).replace("\\n", "").replace(
        "\n", ""
    )


# Chance


def test_files_changed_by_chance_are_read_or_refused_in_one_sentence(root, tmp_path, request):
    "Data sets, models, parameters and pictures, by the real commands; `--fuzz SECONDS` for each of the ten kinds."
    seconds = request.config.getoption("--fuzz")
    numbers = [str(10**9), str(seconds), "100"] if seconds else ["20"]
    tried = subprocess.run(
        [sys.executable, root / "tests" / "fuzzing.py", tmp_path, *numbers],
        capture_output=True,
        text=True,
    )
    assert tried.returncode == 0, tried.stderr[-2000:]
    found = [json.loads(line) for line in tried.stdout.splitlines()]
    print(*(f"{one['kind']}: {one['cases']} cases, {one['ends']}" for one in found), sep="\n")
    assert len(found) == 10 and all(one["cases"] >= 1 for one in found)
    assert not [one for one in found if one["wrong"]]


def endless(path):
    "A model of whose heap the HDF5 library never comes to the end."
    content = bytearray(path.read_bytes())
    content[content.index(b"GCOL") + 25] = 3
    path.write_bytes(content)


def test_a_model_that_hdf5_does_not_survive_is_refused(
    small_model, snn, tmp_path, monkeypatch
):
    path = tmp_path / "params.h5"
    path.write_bytes(small_model.read_bytes()), scene().save(tmp_path / "a.png")
    endless(path)
    monkeypatch.setattr(apart, "SECONDS", 1)
    code, said, error = snn("predict", "--model", path, tmp_path / "a.png")
    assert (code, said, error.strip()) == (
        2,
        "",
        f"{path}: damaged; HDF5 breaks down on it, or reads it without an end",
    )


def test_a_service_survives_a_model_that_hdf5_does_not(small_model, tmp_path, monkeypatch):
    from snn.serve.model import Live, Sources

    path, failed = tmp_path / "params.h5", []
    path.write_bytes(small_model.read_bytes())
    live = Live(Sources(path), lambda: failed.append(True))
    before = live.current
    monkeypatch.setattr(apart, "SECONDS", 1)
    endless(path)
    assert not live.refresh() and failed == [True] and live.current is before


def test_a_file_that_needs_more_than_all_memory_is_refused_before_it_is_read(
    small_model, snn, tmp_path, monkeypatch
):
    monkeypatch.setattr(apart, "_memory", lambda: 2**31)
    with h5py.File(path := tmp_path / "d.h5", "w") as file:
        large = file.create_dataset(
            "train_set_x", (2**10, 2**11, 2**11), np.uint8, chunks=True
        )
        large[0, 0, 0] = 1
    assert snn("data", "info", path)[2].strip() == (
        f"{path}: more than fits into this computer's memory"
    )


# What is no data set, no model, no parameters


@pytest.mark.parametrize(
    "command",
    [
        ("data", "info", "it"),
        ("data", "check", "it"),
        ("train", "--data", "it"),
        ("train", "--parameters", "it"),
        ("evaluate", "--model", "it", "--data", "it"),
        ("predict", "--model", "it", "it"),
        ("data", "join", "it", "it"),
        ("tune", "--data", "it", "it"),
    ],
    ids=" ".join,
)
@pytest.mark.parametrize("kind", ["pipe", "folder", "loop", "long"])
def test_what_is_no_file_is_said_and_never_waited_for(
    kind, command, snn, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "parameters.json").write_text(json.dumps(VALUES))
    name = "x" * 300 if kind == "long" else "it"
    if kind == "pipe":
        os.mkfifo(name)
    elif kind == "folder":
        os.mkdir(name)
    elif kind == "loop":
        os.symlink(name, name)
    code, said, error = snn(*(name if word == "it" else word for word in command))
    assert (code, said) == (2, "") and len(error.splitlines()) == 1 and name in error
    assert "it" not in os.listdir() or kind != "long"


@pytest.mark.parametrize(
    "content, words",
    [
        (b"", "it is empty"),
        (b"\x1f\x8b\x08", "packed with gzip"),
        (b"PK\x03\x04", "a zip archive"),
        (b"CDF\x01", "NetCDF 3"),
        (b"<!DOCTYPE html>", "a page of the web"),
        (b"version https://git-lfs.github.com/spec/v1", "git lfs pull"),
    ],
)
def test_what_is_taken_for_a_data_set_is_called_what_it_is(content, words, tmp_path):
    (tmp_path / "d.h5").write_bytes(content)
    with pytest.raises(InputError, match=f"not an HDF5 file, or a damaged one; .*{words}"):
        data.read(tmp_path / "d.h5")


@pytest.mark.parametrize("chunks, words", [((1, 8, 8, 3), "12 of its 24"), (None, "nothing")])
def test_an_array_that_was_never_filled_is_no_black_picture(chunks, words, tmp_path):
    path = saved(tmp_path / "d.h5", train_set_x=None)
    with h5py.File(path, "r+") as file:
        made = file.create_dataset("train_set_x", (24, 8, 8, 3), np.uint8, chunks=chunks)
        if chunks:
            made[:12] = arrays()["train_set_x"][:12]
    with pytest.raises(InputError, match=f"train_set_x was made but never filled; {words}"):
        data.read(path)


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda file: file.__setitem__("W1", h5py.SoftLink("/no")), "has no W1"),
        (lambda file: file.create_group("W1"), "has no W1"),
        (
            lambda file: file.__setitem__("W1", h5py.ExternalLink("no.h5", "/W1")),
            "W1 lies in another file, no.h5, which is not there",
        ),
        (
            lambda file: file.create_dataset("W1", (3, 192), "f8"),
            "W1 was made but never filled",
        ),
        (lambda file: file.attrs.__setitem__("image_size", 8.5), "image_size is 8.5"),
        (lambda file: file.attrs.__setitem__("image_size", [8, 8]), r"image_size is \[8 8\]"),
        (lambda file: file.attrs.__setitem__("parameters", 3), "parameters is no text"),
        (lambda file: file.__setitem__("W1", np.zeros((3, 192), int)), "W1 is int64"),
        (lambda file: file.__setitem__("W1", np.zeros((192, 3))), r"W1 is \(192, 3\)"),
        (lambda file: file.__setitem__("W1", np.full((3, 192), np.nan)), "not a number"),
    ],
)
def test_what_is_wrong_with_a_model_is_named(change, words, small_model, tmp_path):
    path = tmp_path / "params.h5"
    path.write_bytes(small_model.read_bytes())
    with h5py.File(path, "r+") as file:
        if "W1" in change.__code__.co_consts:
            del file["W1"]
        change(file)
    with pytest.raises(InputError, match=f"params.h5: {words}" if words[0] != "n" else words):
        models.read(path)


def test_weights_of_a_virtual_array_are_not_zeros_where_their_source_is_missing(
    small_model, tmp_path
):
    path, layout = tmp_path / "params.h5", h5py.VirtualLayout((3, 192), "f8")
    path.write_bytes(small_model.read_bytes())
    layout[:] = h5py.VirtualSource("gone.h5", "W1", (3, 192))
    with h5py.File(path, "r+") as file:
        del file["W1"]
        file.create_virtual_dataset("W1", layout)
    with pytest.raises(
        InputError, match="W1 is put together from gone.h5, which is not there"
    ):
        models.read(path)


@pytest.mark.parametrize("text", ['"\\ud800"', b'"\xed\xa0\x80"'])
def test_a_lone_surrogate_is_named_as_what_it_is(text):
    content = json.dumps(VALUES).encode()
    text = text if isinstance(text, bytes) else text.encode()
    with pytest.raises(
        InputError, match=r"activations.layer1 holds .*ud800.*; it may hold relu"
    ):
        parse(content.replace(b'"relu"', text))


# Files that may not be read, or that another program has


def test_a_file_that_another_program_writes_is_said_to_be_locked(snn, tmp_path):
    path = saved(tmp_path / "d.h5")
    with open(path, "rb+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        code, _, error = snn("data", "info", path)
    assert code == 2 and error.strip() == (
        f"{path}: another program has it open to write; try again when it has ended"
    )


@pytest.mark.parametrize(
    "command",
    [("data", "info"), ("evaluate", "--data", "x", "--model"), ("predict", "--model", "x")],
    ids=" ".join,
)
def test_a_file_that_may_not_be_read_is_said_to_be_so(command, snn, tmp_path, monkeypatch):
    "Root may read everything, so the system's answer is played."
    path, real = saved(tmp_path / "d.h5"), open

    def refuse(file, *arguments, **options):
        if str(file) == str(path):
            raise PermissionError(13, "Permission denied", str(file))
        return real(file, *arguments, **options)

    monkeypatch.setattr("builtins.open", refuse)
    monkeypatch.chdir(tmp_path)
    command = [path if word == "x" else word for word in command]
    code, said, error = snn(*command, path)
    assert (code, said, error.strip()) == (2, "", f"{path}: you may not read it")


@pytest.mark.parametrize(
    "arguments, option",
    [
        (("train", "--data", "train.h5", "--data", "test.h5"), "--data"),
        (("train", "--data=train.h5", "--data", "test.h5"), "--data"),
        (("evaluate", "--model", "a", "--model", "b", "--data", "c"), "--model"),
        (("data", "pack", "--cat", "a", "--cat", "b", "--non-cat", "c"), "--cat"),
    ],
)
def test_an_option_that_is_given_twice_is_not_silently_the_last(arguments, option, snn):
    code, out, err = snn(*arguments)
    assert (code, out) == (2, "")
    assert err.strip() == f"{option} is given 2 times; it may be given once"


@pytest.mark.parametrize("form", [("--data", "s3://b//x.h5"), ("--data=s3://b//x.h5",)])
def test_an_address_in_s3_is_no_file_and_keeps_its_slashes(form, snn):
    code, out, err = snn("train", *form)
    assert (code, out) == (2, "")
    assert err.strip() == (
        "s3://b//x.h5: --data takes a file on this machine; copy it here with aws s3 cp"
    )


# Names of any kind, by every command that prints them

NASTY = "[]/:$\\{}<>&*_`'\"\x1b\x07\r\t\u202e\u200f猫e\u0301\U0001f408 ab-"
FILE_NAMES = strategies.text(NASTY.replace("/", "") + "\udce9\udcff", min_size=1, max_size=12)
CLASS_NAMES = strategies.text(NASTY, min_size=1, max_size=12).filter(
    lambda name: name == name.strip(" \0\t\r\n") and name.strip()
)


def said_by(snn, *arguments) -> str:
    "What a command prints, with line breaks that a narrow terminal would not add."
    code, said, error = snn(*arguments)
    assert code == 0 and "Traceback" not in error, error
    return said + error


@seed(0)
@settings(
    max_examples=4,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    files=strategies.lists(FILE_NAMES, min_size=2, max_size=2, unique=True),
    classes=strategies.lists(CLASS_NAMES, min_size=2, max_size=2, unique=True),
)
@example(files=["[b] :cat: $x$", "caf\udce9\udcff"], classes=["[/no]", "[bold]$\\frac$ a$"])
@example(files=["a\x1b[31mb", "\u202e猫"], classes=[":cat:", "\U0001f408\x07"])
def test_no_command_changes_a_name(files, classes, snn, tmp_path_factory, monkeypatch):
    done = type(
        "Done", (), {"returncode": 0}
    )  # each name makes another file, half a second each
    monkeypatch.setattr(apart.subprocess, "run", lambda *_, **__: done)
    folder = tmp_path_factory.mktemp("names")
    one, two = (folder / f"1{files[0]}", folder / f"2{files[1]}")
    saved(one, list_classes=[name.encode() for name in classes])
    no, yes = map(shown, classes)
    for command in (("info", one), ("check", one), ("join", one, one, "--out", two)):
        said = said_by(snn, "data", *command)
        assert shown(str(command[-1])) in said and all(
            f" {name}" in said for name in (no, yes)
        )
    facts = json.loads(said_by(snn, "data", "info", "--json", one))
    assert facts["classes"] == classes
    chosen = from_dict(VALUES)
    layers = [layer[:2] for layer in network.initialise(chosen, 192)]
    trained = folder / f"3{files[0]}"
    models.write(model.Model(chosen, layers, tuple(classes), 8), trained)
    said = said_by(snn, "evaluate", "--model", trained, "--data", one)
    assert f"it is {no}" in said and f"called {yes}" in said
    picture = folder / f"4{files[1]}"
    with open(picture, "wb") as file:
        scene().save(file, "PNG")
    said = said_by(snn, "predict", "--model", trained, picture)
    assert shown(str(picture)) in said and f"it is a {yes})" in said
    found = json.loads(said_by(snn, "predict", "--json", "--model", trained, picture))
    assert found[0]["class"] in classes
    assert found[0]["image"] == os.fsencode(picture).decode("utf-8", "backslashreplace")
    for missing in (("data", "info"), ("predict", "--model", trained), ("train", "--data")):
        code, said, error = snn(*missing, folder / f"5{files[1]}")
        assert code == 2 and said == "" and len(error.splitlines()) == 1
        assert f"5{shown(files[1])}" in error or missing[0] == "train"
    matrix = answers.confusion(((1, 2), (3, 4)), tuple(classes))
    sure = answers.sureness(np.array([0, 1]), np.array([0.1, 0.9]), tuple(classes))
    told = answers.told(arrays()["test_set_x"][:2], np.array([0.1, 0.9]), tuple(classes))
    for figure in (matrix, sure, told):
        drawn = [text.get_text() for text in figure.findobj(Text)]
        assert any(answers.verbatim(classes[1]) in text for text in drawn)
        assert not any(is_math_text(text) for text in drawn if classes[1].strip() in text)


def test_a_class_name_between_dollars_is_drawn_and_described_as_it_is():
    figure = answers.told(arrays()["test_set_x"][:1], np.array([0.9]), ("no", r"$\nope$"))
    assert figure.png() and figure.description == r"$\nope$, 90%"


@pytest.mark.parametrize(
    "name, right",
    [(b"caf\xe9", "caf\\xe9"), (b"\xff", "\\xff"), ("猫".encode(), "猫")],
)
def test_a_class_name_that_is_not_utf_8_is_escaped_and_stays_another(
    name, right, snn, tmp_path
):
    path = saved(tmp_path / "d.h5", list_classes=[name, b"\xfe"])
    assert data.read(path).classes == (right, "\\xfe")
    assert json.loads(snn("data", "info", "--json", path)[1])["classes"] == [right, "\\xfe"]


# A run that no machine or server can hold is the same to all


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"neurons": {"layer1": 8000, "layer2": 1}, "granularity": "neuron"}, "at most 7000"),
        ({"batch_size": 1}, "9,000 mini-batches of 9,000 images"),
        ({"neurons": {"layer1": 10**9, "layer2": 1}}, "of memory; there are"),
        ({"neurons": {"layer1": 5 * 10**5, "layer2": 1}}, "in one piece"),
        ({"validation_fraction": 0.00001}, "holds back no image of 9000"),
        ({"augment": {"shift": 8}}, "out of sight"),
    ],
)
def test_train_upload_estimate_and_launch_refuse_a_run_in_the_same_words(
    changes, words, snn, tmp_path, monkeypatch
):
    from snn.cloud.messages import Upload
    from snn.deploy import runs
    from snn.handlers import upload

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("snn.cloud.messages.memory_here", lambda: LAMBDA)
    monkeypatch.setattr(upload, "memory_here", lambda: LAMBDA)
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (9000, 8, 8, 3)).astype(np.uint8)
    saved(tmp_path / "d.h5", train_set_x=images, train_set_y=np.arange(9000) % 2)
    (tmp_path / "p.json").write_text(text := json.dumps({**VALUES, **changes}))
    given = ("--data", "d.h5", "--parameters", "p.json")
    said = [snn(command, *given)[2].strip() for command in ("train", "estimate")]
    with pytest.raises(InputError) as refused:
        runs.upload(None, "Cats", tmp_path / "d.h5", tmp_path / "p.json")
    said.append(str(refused.value))
    with pytest.raises(InputError) as refused:
        chosen = parse(text)
        monkeypatch.setattr(upload, "read_parameters", lambda *_: (chosen, None))
        monkeypatch.setattr(
            upload, "read_datasets", lambda *_: (data.read(tmp_path / "d.h5"), "e")
        )
        monkeypatch.setattr(upload.checkpoint, "is_new_upload", lambda *_: False)
        bucket = type("Services", (), {"bucket": lambda self, name: None})()
        upload.start(Upload("b", "training_input/d.h5", "e"), bucket)
    said.append(str(refused.value))
    assert all(words in sentence for sentence in said), said
    assert len({sentence.split(": ", 1)[-1] for sentence in said}) == 1, said


def test_plain_and_leading_files_train_to_the_same_bytes_when_they_are_uploaded(
    cloud, finished, tmp_path, monkeypatch
):
    from snn.deploy import runs
    from snn.deploy.inputs import Account

    monkeypatch.setattr(runs, "bucket_of", lambda account, stack: cloud.bucket_name)
    made = {}
    for kind in ("plain", *LEADING):
        (folder := tmp_path / kind).mkdir()
        path = LEADING[kind](folder)[0] if kind in LEADING else saved(folder / "plain.h5")
        (folder / "p.json").write_text(json.dumps({**VALUES, "run": kind}))
        account = Account("us-east-1", cloud.aws.url)
        run = runs.upload(account, "Cats", path, folder / "p.json")
        finished(cloud, run)
        with h5py.File(io.BytesIO(cloud.bucket.get(f"training_results/{run}/params.h5"))) as f:
            made[kind] = {name: f[name][()].tobytes() for name in f}
    assert all(weights == made["plain"] for weights in made.values()) and len(made) == 4
