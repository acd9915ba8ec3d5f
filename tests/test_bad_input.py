"""Whatever is wrong with what a user gives, the answer is one sentence on standard error and exit code 2, and nothing is left behind."""

import json
from pathlib import Path

import h5py
import numpy as np
import pytest
from PIL import Image

from snn.data import h5 as data
from snn.data import models
from snn.maths import model, network
from snn.maths.parameters import from_dict


def good_arrays(size: int = 8) -> dict[str, np.ndarray]:
    "What a datasets.h5 holds, by name: 6 images to train on and 3 to test."
    rng = np.random.default_rng(0)
    images = lambda m: rng.integers(0, 256, (m, size, size, 3), np.uint8)
    return {
        "train_set_x": images(6),
        "train_set_y": np.array([0, 1, 0, 1, 0, 1]),
        "test_set_x": images(3),
        "test_set_y": np.array([0, 1, 0]),
        "list_classes": np.array([b"non-cat", b"cat"]),
    }


def good_values() -> dict:
    "What a parameters.json holds."
    return {
        "epochs": 2,
        "layers": 2,
        "neurons": {"layer1": 3, "layer2": 1},
        "activations": {"layer1": "relu", "layer2": "sigmoid"},
        "learning_rate": 0.01,
        "batch_size": 4,
        "threshold": 0,
        "granularity": "network",
    }


@pytest.fixture
def write_data(tmp_path):
    "Writes a datasets.h5 with some arrays changed, or left out where the change is None."

    def write(**changes) -> Path:
        path = tmp_path / "datasets.h5"
        with h5py.File(path, "w") as file:
            for name, array in {**good_arrays(), **changes}.items():
                if array is not None:
                    file[name] = array
        return path

    return write


@pytest.fixture
def write_parameters(tmp_path):
    "Writes a parameters.json with some values changed, or left out where the change is None; or any text."

    def write(text: str | bytes | None = None, **changes) -> Path:
        values = {
            key: value
            for key, value in {**good_values(), **changes}.items()
            if value is not None
        }
        path = tmp_path / "parameters.json"
        text = json.dumps(values) if text is None else text
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


@pytest.fixture
def write_model(tmp_path):
    "Writes a params.h5 for images of a size, and then lets `spoil` change the open file."

    def write(size: int = 8, spoil=lambda file: None) -> Path:
        chosen, path = from_dict(good_values()), tmp_path / "params.h5"
        layers = [layer[:2] for layer in network.initialise(chosen, size * size * 3)]
        models.write(model.Model(chosen, layers, size=size), path)
        with h5py.File(path, "r+") as file:
            spoil(file)
        return path

    return write


@pytest.fixture
def refused(snn, tmp_path, monkeypatch):
    "Runs a command that must be refused, and nothing left behind; returns its sentence."

    def call(*arguments, words: list[str]) -> str:
        monkeypatch.chdir(tmp_path)
        before = sorted(tmp_path.rglob("*"))
        code, said, error = snn(*arguments)
        lines = error.strip().splitlines()
        assert (code, said, len(lines)) == (2, "", 1), error
        assert "Traceback" not in error
        for word in words:
            assert word in error
        assert sorted(tmp_path.rglob("*")) == before, "something was left behind"
        return lines[0]

    return call


@pytest.fixture
def nothing_trains(monkeypatch):
    "Makes a training that should not have begun end at once."

    def begin(*arguments):
        pytest.fail("the training began")

    monkeypatch.setattr("snn.local.training.train", begin)


@pytest.fixture
def refused_training(nothing_trains, refused, write_data, write_parameters, tmp_path):
    "Trains with wrong data or parameters."

    def call(
        words: list[str],
        datasets: Path | None = None,
        chosen: Path | None = None,
        more: list = (),
    ) -> str:
        datasets, chosen = datasets or write_data(), chosen or write_parameters()
        return refused(
            "train",
            "--data",
            datasets,
            "--parameters",
            chosen,
            "--out",
            tmp_path / "left" / "here",
            *more,
            words=words,
        )

    return call


# Data sets

good = good_arrays()
BAD_DATA = {
    **{
        f"no {name}": (
            {name: None},
            [
                f"has no {name}",
                "a data set needs train_set_x, train_set_y, test_set_x, test_set_y, list_classes",
            ],
        )
        for name in data.NAMES
    },
    "images unrolled": (
        {"train_set_x": good["train_set_x"].reshape(6, -1)},
        ["train_set_x has the shape (6, 192)", "must be (images, size, size, 3)"],
    ),
    "images grey": (
        {"test_set_x": good["test_set_x"][..., :1]},
        ["test_set_x has the shape (3, 8, 8, 1)", "must be (images, size, size, 3)"],
    ),
    "labels as a column": (
        {"train_set_y": good["train_set_y"][:, None]},
        ["train_set_y has the shape (6, 1)", "must be (6,)"],
    ),
    "one label for all": (
        {"train_set_y": np.array(1)},
        ["train_set_y has the shape ()", "must be (6,)"],
    ),
    "images of floats": (
        {"train_set_x": good["train_set_x"] / 255},
        ["train_set_x is float64", "must be uint8, 0 to 255"],
    ),
    "images signed": (
        {"train_set_x": good["train_set_x"].astype(np.int64)},
        ["train_set_x is int64", "must be uint8"],
    ),
    "images of text": (
        {"train_set_x": np.full((6, 8, 8, 3), b"x")},
        ["train_set_x is |S1", "must be uint8"],
    ),
    "labels of floats": (
        {"train_set_y": good["train_set_y"] * 1.0},
        ["train_set_y is float64", "must be whole numbers, 0 or 1"],
    ),
    "labels not a number": (
        {"test_set_y": np.array([0, 1, np.nan])},
        ["test_set_y is float64", "whole numbers"],
    ),
    "labels of text": (
        {"train_set_y": np.array([b"cat"] * 6)},
        ["train_set_y is |S3", "whole numbers"],
    ),
    "labels of strings": (
        {"train_set_y": ["cat"] * 6},
        ["train_set_y is object", "whole numbers"],
    ),
    "labels one and two": (
        {"train_set_y": good["train_set_y"] + 1},
        ["train_set_y holds the label 2", "labels are 0 (not a cat) and 1 (cat)"],
    ),
    "labels below zero": (
        {"test_set_y": -good["test_set_y"]},
        ["test_set_y holds the label -1", "labels are 0"],
    ),
    "no images": (
        {"train_set_x": good["train_set_x"][:0], "train_set_y": good["train_set_y"][:0]},
        ["train_set_x holds no images", "needs at least one"],
    ),
    "no test images": (
        {"test_set_x": good["test_set_x"][:0], "test_set_y": good["test_set_y"][:0]},
        ["test_set_x holds no images", "needs at least one"],
    ),
    "a label too few": (
        {"train_set_y": good["train_set_y"][:5]},
        ["train_set_y has 5 labels for 6 images", "each image needs one"],
    ),
    "a label too many": (
        {"test_set_y": np.array([0, 1, 0, 1])},
        ["test_set_y has 4 labels for 3 images", "each image needs one"],
    ),
    "one class": (
        {"train_set_y": np.ones(6, int)},
        ["train_set_y holds the class 1 alone", "needs both 0 and 1"],
    ),
    "not square": (
        {"train_set_x": good["train_set_x"][:, :4]},
        ["train_set_x holds images of 4x8 pixels", "must be square"],
    ),
    "no pixels": (
        {"train_set_x": good["train_set_x"][:, :0, :0]},
        ["train_set_x holds images without pixels"],
    ),
    "two sizes": (
        {"test_set_x": good["test_set_x"][:, :4, :4]},
        ["test_set_x holds images of 4 pixels", "train_set_x of 8"],
    ),
    "three classes": (
        {"list_classes": np.array([b"cat", b"dog", b"owl"])},
        ["list_classes holds 3 names", "must be two"],
    ),
}


@pytest.mark.parametrize("changes, words", BAD_DATA.values(), ids=BAD_DATA)
def test_a_wrong_data_set_is_refused(changes, words, refused_training, write_data):
    refused_training([str(path := write_data(**changes)), *words], datasets=path)


@pytest.mark.parametrize("name", data.NAMES)
def test_a_group_in_place_of_an_array_is_refused(name, refused_training, write_data):
    path = write_data(**{name: None})
    with h5py.File(path, "r+") as file:
        file.create_group(name)
    refused_training([f"has no {name}"], datasets=path)


def test_an_array_without_content_is_refused(refused_training, write_data):
    path = write_data(train_set_x=h5py.Empty("uint8"))
    refused_training(["has no train_set_x"], datasets=path)


def test_an_array_larger_than_any_memory_is_refused(refused_training, write_data):
    path = write_data(train_set_x=None)
    with h5py.File(path, "r+") as file:
        file.create_dataset("train_set_x", (10**12, 64, 64, 3), "uint8", chunks=(1, 64, 64, 3))
    refused_training([f"{path}: more than fits into this computer's memory"], datasets=path)


def test_data_that_is_not_there_is_refused(refused_training, tmp_path):
    refused_training(
        [f"{tmp_path / 'absent.h5'}: no such file"], datasets=tmp_path / "absent.h5"
    )


def test_a_folder_in_place_of_data_is_refused(refused_training, tmp_path):
    refused_training([f"{tmp_path}: no such file"], datasets=tmp_path)


@pytest.mark.parametrize(
    "content",
    [b"", b"hello", b"\x89HDF\r\n\x1a\n", b"{}"],
    ids=["empty", "text", "only a signature", "JSON"],
)
def test_data_that_is_not_hdf5_is_refused(content, refused_training, tmp_path):
    path = tmp_path / "datasets.h5"
    path.write_bytes(content)
    refused_training([f"{path}: not an HDF5 file, or a damaged one"], datasets=path)


@pytest.mark.parametrize("kept", [0.3, 0.6, 0.99])
def test_data_that_was_cut_off_is_refused(kept, refused_training, write_data):
    path = write_data()
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * kept)])
    refused_training([f"{path}: not an HDF5 file, or a damaged one"], datasets=path)


def test_data_with_a_spoilt_middle_is_refused(refused_training, tmp_path, small_datasets):
    path = tmp_path / "datasets.h5"
    data.write(small_datasets(), path)
    content = bytearray(path.read_bytes())
    content[len(content) // 2 : len(content) // 2 + 64] = b"\xff" * 64
    path.write_bytes(content)
    refused_training([f"{path}: not an HDF5 file, or a damaged one"], datasets=path)


# Parameters

OBJECT = "an object with layer1, layer2, ..."
BAD_VALUES = {
    "layers without neurons": (
        {
            "layers": 3,
            "activations": {"layer1": "relu", "layer2": "relu", "layer3": "sigmoid"},
        },
        ["layers is 3, but neurons has no layer3"],
    ),
    "layers without activations": (
        {"layers": 3, "neurons": {"layer1": 3, "layer2": 2, "layer3": 1}},
        ["layers is 3, but activations has no layer3"],
    ),
    "more neurons than layers": ({"layers": 1}, ["neurons has layer2, but layers is 1"]),
    "a layer too wide for single neurons": (
        {"neurons": {"layer1": 8000, "layer2": 1}, "granularity": "neuron"},
        ["neurons.layer1 is 8000", "at most 7000"],
    ),
    "a layer zero": (
        {"neurons": {"layer0": 3, "layer1": 3, "layer2": 1}},
        ["neurons has layer0, but layers is 2"],
    ),
    "unknown activation": (
        {"activations": {"layer1": "softmax", "layer2": "sigmoid"}},
        [
            'activations.layer1 holds "softmax"',
            "relu, leaky_relu, tanh, sigmoid, gelu or swish",
        ],
    ),
    "last layer of two": (
        {"neurons": {"layer1": 3, "layer2": 2}},
        ["the last layer must be one sigmoid neuron", "neurons.layer2 is 2"],
    ),
    "last layer relu": (
        {"activations": {"layer1": "relu", "layer2": "relu"}},
        ["the last layer must be one sigmoid neuron", "activations.layer2 is relu"],
    ),
    "negative epochs": ({"epochs": -1}, ["epochs holds -1", "a whole number, 1 or more"]),
    "no epochs": ({"epochs": 0}, ["epochs holds 0", "a whole number, 1 or more"]),
    "half an epoch": ({"epochs": 1.5}, ["epochs holds 1.5", "a whole number, 1 or more"]),
    "true epochs": ({"epochs": True}, ["epochs holds true", "a whole number, 1 or more"]),
    "epochs in words": (
        {"epochs": "ten"},
        ['epochs holds "ten"', "a whole number, 1 or more"],
    ),
    "epochs in digits": ({"epochs": "10"}, ['epochs holds "10"', "a whole number, 1 or more"]),
    "epochs in a list": ({"epochs": [10]}, ["epochs holds [10]", "a whole number, 1 or more"]),
    "more epochs than can be": (
        {"epochs": 10**30},
        ["epochs holds 1000", "a whole number, 1 or more"],
    ),
    "negative learning rate": (
        {"learning_rate": -0.1},
        ["learning_rate holds -0.1", "a number above 0"],
    ),
    "no learning rate": ({"learning_rate": 0}, ["learning_rate holds 0", "a number above 0"]),
    "learning rate in digits": (
        {"learning_rate": "0.1"},
        ['learning_rate holds "0.1"', "a number above 0"],
    ),
    "negative threshold": ({"threshold": -1}, ["threshold holds -1", "a number, 0 or more"]),
    "no batch": ({"batch_size": 0}, ["batch_size holds 0", "a whole number, 1 or more"]),
    "negative batch": (
        {"batch_size": -64},
        ["batch_size holds -64", "a whole number, 1 or more"],
    ),
    "no layers": (
        {"layers": 0, "neurons": {}, "activations": {}},
        ["layers holds 0", "a whole number"],
    ),
    "too many layers": (
        {"layers": 10**9},
        ["layers holds 1000000000", "a whole number from 1 to 1000"],
    ),
    "no neurons": (
        {"neurons": {"layer1": 0, "layer2": 1}},
        ["neurons.layer1 holds 0", "a whole number, 1 or more"],
    ),
    "neurons in a list": ({"neurons": [3, 1]}, ["neurons holds [3, 1]", OBJECT]),
    "activations in a list": (
        {"activations": ["relu", "sigmoid"]},
        ['activations holds ["relu", "sigmoid"]', OBJECT],
    ),
    "unknown granularity": (
        {"granularity": "batch"},
        ['granularity holds "batch"', "neuron, layer or network"],
    ),
    "unknown aggregation": (
        {"aggregation": "worst"},
        ['aggregation holds "worst"', "best or mean"],
    ),
    "unknown optimizer": (
        {"optimizer": {"name": "lion"}},
        ['optimizer.name holds "lion"', "sgd, momentum or adam"],
    ),
    "optimizer in a word": ({"optimizer": "adam"}, ['optimizer holds "adam"', "an object"]),
    "negative decay": (
        {"optimizer": {"l2": -1}},
        ["optimizer.l2 holds -1", "a number, 0 or more"],
    ),
    "momentum of one": (
        {"optimizer": {"name": "momentum", "momentum": 1}},
        ["optimizer.momentum holds 1", "a number from 0 up to, but not including, 1"],
    ),
    "negative seed": ({"seed": -1}, ["seed holds -1", "a whole number, 0 or more"]),
    "all held back": (
        {"validation_fraction": 1},
        ["validation_fraction holds 1", "but not including, 1"],
    ),
    "unknown dtype": ({"dtype": "float16"}, ['dtype holds "float16"', "float64 or float32"]),
    "misspelt key": (
        {"learnig_rate": 0.1},
        ["unknown key learnig_rate", "did you mean learning_rate?"],
    ),
    "key in another case": ({"Epochs": 3}, ["unknown key Epochs", "did you mean epochs?"]),
    "key like no other": (
        {"xyzzy": 3},
        ["unknown key xyzzy", "known are epochs, layers, neurons"],
    ),
    "a flip in a word": (
        {"augment": {"flip": "yes"}},
        ['augment.flip holds "yes"', "true or false"],
    ),
    "half a pixel": (
        {"augment": {"shift": 0.5}},
        ["augment.shift holds 0.5", "a whole number, 0 or more"],
    ),
    "a shift to the other side": (
        {"augment": {"shift": -1}},
        ["augment.shift holds -1", "a whole number, 0 or more"],
    ),
    "augment in a word": (
        {"augment": True},
        ["augment holds true", "an object with flip and shift"],
    ),
    "augment by what there is not": (
        {"augment": {"flop": True}},
        ["unknown key augment.flop", "did you mean flip?"],
    ),
    "dropout in a number": (
        {"dropout": 0.5},
        ["dropout holds 0.5", "an object with inputs and hidden"],
    ),
    "all dropped": (
        {"dropout": {"hidden": 1}},
        ["dropout.hidden holds 1", "a number from 0 up to, but not including, 1"],
    ),
    "fewer than none dropped": (
        {"dropout": {"inputs": -0.1}},
        ["dropout.inputs holds -0.1", "a number from 0 up to, but not including, 1"],
    ),
    "another standardisation": (
        {"standardise": "zscore"},
        ['standardise holds "zscore"', "range or mean"],
    ),
    "another schedule": (
        {"schedule": "cosine"},
        ['schedule holds "cosine"', "constant or linear"],
    ),
    "checkpoints in the past": (
        {"checkpoint_seconds": -30},
        ["checkpoint_seconds holds -30", "a number, 0 or more"],
    ),
    "misspelt key of the optimizer": (
        {"optimizer": {"nam": "adam"}},
        ["unknown key optimizer.nam", "did you mean name?"],
    ),
    **{
        f"no {key}": ({key: None}, [f"{key} is missing", "it may hold"])
        for key in (
            "epochs",
            "layers",
            "neurons",
            "activations",
            "learning_rate",
            "batch_size",
            "threshold",
        )
    },
}


@pytest.mark.parametrize("changes, words", BAD_VALUES.values(), ids=BAD_VALUES)
def test_a_wrong_value_is_refused(changes, words, refused_training, write_parameters):
    refused_training([str(path := write_parameters(**changes)), *words], chosen=path)


def test_a_shift_that_moves_the_images_out_of_sight_is_refused(
    refused_training, write_parameters
):
    path = write_parameters(augment={"shift": 8})
    said = "augment.shift is 8, which moves images of 8x8 pixels out of sight; it may be at most 7"
    refused_training([said], chosen=path)


BAD_JSON = {
    "no comma": ('{\n  "epochs": 2\n  "layers": 1\n}', ["not valid JSON at line 3, column 3"]),
    "cut off": ('{"epochs": 2,', ["not valid JSON at line 1, column 1"]),
    "empty": ("", ["not valid JSON at line 1, column 1"]),
    "NaN": ('{"epochs": NaN}', ["holds NaN", "not a number"]),
    "Infinity": ('{"learning_rate": Infinity}', ["holds Infinity", "not a number"]),
    "beyond all floats": (
        json.dumps(good_values()).replace("0.01", "1e999"),
        ["learning_rate holds Infinity", "a number above 0"],
    ),
    "a list": ("[1, 2]", ["holds [1, 2]", "must be an object"]),
    "a null": ("null", ["holds null", "must be an object"]),
    "not text": (b"\xff\xfe\x00\x80\x80", ["parameters.json"]),
    "Latin-1": ('{"epochs": "größer"}'.encode("latin-1"), ["not a text file in UTF-8"]),
    "a key twice": (
        json.dumps(good_values())[:-1] + ', "epochs": 3}',
        ["has the key epochs twice"],
    ),
    "nested without end": ("[" * 100_000, ["nested too deeply"]),
    "digits without end": ('{"epochs": ' + "9" * 5000 + "}", ["a number is too long"]),
}


@pytest.mark.parametrize("text, words", BAD_JSON.values(), ids=BAD_JSON)
def test_parameters_that_are_no_json_are_refused(
    text, words, refused_training, write_parameters
):
    refused_training([str(path := write_parameters(text)), *words], chosen=path)


def test_parameters_that_are_not_there_are_refused(refused_training, tmp_path):
    refused_training(
        [f"{tmp_path / 'absent.json'}: no such file"], chosen=tmp_path / "absent.json"
    )


def test_parameters_with_a_byte_order_mark_are_read(
    snn, write_parameters, write_data, tmp_path
):
    path = write_parameters("\ufeff" + json.dumps(good_values()))
    code, *_, error = snn("train", "--data", tmp_path / "absent.h5", "--parameters", path)
    assert (code, error) == (2, f"{tmp_path / 'absent.h5'}: no such file\n")


@pytest.mark.parametrize(
    "option, value, words",
    [
        ("--epochs", 0, ["epochs holds 0", "1 or more"]),
        ("--epochs", -5, ["epochs holds -5", "1 or more"]),
        ("--seed", -1, ["seed holds -1", "0 or more"]),
        ("--granularity", "epoch", ['granularity holds "epoch"', "neuron, layer or network"]),
        ("--aggregation", "sum", ['aggregation holds "sum"', "best or mean"]),
    ],
)
def test_a_wrong_option_is_refused_as_in_the_file(option, value, words, refused_training):
    refused_training(["on the command line", *words], more=[option, value])


@pytest.mark.parametrize("option", [["--epochs", "ten"], ["--workers", "0"], ["--bogus"]])
def test_a_command_line_that_cannot_be_read_ends_with_two(option, snn, tmp_path):
    code, said, error = snn("train", *option, "--out", tmp_path / "left")
    assert (
        code == 2
        and said == ""
        and option[0] in error
        and "Traceback" not in error
        and not (tmp_path / "left").exists()
    )


def test_a_file_in_place_of_the_out_folder_is_refused(
    nothing_trains, refused, write_data, write_parameters, tmp_path
):
    (tmp_path / "taken").write_text("mine")
    refused(
        "train",
        "--data",
        write_data(),
        "--parameters",
        write_parameters(),
        "--out",
        tmp_path / "taken",
        words=["taken: is a file; --out needs a folder"],
    )
    assert (tmp_path / "taken").read_text() == "mine"


def test_an_out_folder_below_a_file_is_refused(
    nothing_trains, refused, write_data, write_parameters, tmp_path
):
    (tmp_path / "taken").write_text("mine")
    refused(
        "train",
        "--data",
        write_data(),
        "--parameters",
        write_parameters(),
        "--out",
        tmp_path / "taken" / "out",
        words=["taken: is a file; --out needs a folder"],
    )


# Models and pictures


@pytest.fixture
def picture(tmp_path) -> Path:
    "A picture like any other."
    Image.new("RGB", (30, 20), "orange").save(tmp_path / "cat.png")
    return tmp_path / "cat.png"


def drop(name):
    def spoil(file):
        del file[name]

    return spoil


def replace(name, value):
    def spoil(file):
        del file[name]
        file[name] = value

    return spoil


def attribute(name, value):
    def spoil(file):
        file.attrs[name] = value

    return spoil


def no_attribute(name):
    def spoil(file):
        del file.attrs[name]

    return spoil


BAD_MODELS = {
    "no weights": (drop("W2"), ["has no W2", "2 layers"]),
    "no biases": (drop("b1"), ["has no b1", "2 layers"]),
    "weights of another shape": (
        replace("W1", np.zeros((3, 5))),
        ["W1 is (3, 5)", "(3, 192)"],
    ),
    "flat biases": (replace("b1", np.zeros(3)), ["b1 (3,)", "(3, 1)"]),
    "weights of text": (
        replace("W2", np.full((1, 3), b"x")),
        ["W2 is |S1", "must be float64"],
    ),
    "weights not a number": (
        replace("W2", np.full((1, 3), np.nan)),
        ["W2 holds a value that is infinite or not a number"],
    ),
    "infinite biases": (
        replace("b1", np.full((3, 1), np.inf)),
        ["b1 holds a value that is infinite or not a number"],
    ),
    "a group of weights": (
        lambda file: (drop("W1")(file), file.create_group("W1")),
        ["has no W1"],
    ),
    "weights without content": (replace("W1", h5py.Empty("f8")), ["W1"]),
    "no parameters": (
        no_attribute("parameters"),
        ["has no attribute parameters", "written by snn?"],
    ),
    "no image size": (no_attribute("image_size"), ["has no attribute image_size"]),
    "no classes": (no_attribute("classes"), ["has no attribute classes"]),
    "wrong parameters": (attribute("parameters", "{}"), ["its parameters", "is missing"]),
    "parameters not text": (attribute("parameters", 3), ["params.h5"]),
    "another image size": (attribute("image_size", 64), ["images of 64 pixels", "(3, 12288)"]),
    "image size in words": (
        attribute("image_size", "big"),
        ["image_size is big; it must be a whole number"],
    ),
    "infinite image size": (
        attribute("image_size", np.inf),
        ["image_size is inf; it must be a whole number"],
    ),
    "negative image size": (
        attribute("image_size", -8),
        ["image_size is -8", "must be 1 pixel or more"],
    ),
    "one class": (attribute("classes", ["cat"]), ["classes holds 1 names", "must be two"]),
}


@pytest.mark.parametrize("command", ["predict", "evaluate"])
@pytest.mark.parametrize("spoil, words", BAD_MODELS.values(), ids=BAD_MODELS)
def test_a_wrong_model_is_refused(
    spoil, words, command, refused, write_model, write_data, picture
):
    path = write_model(spoil=spoil)
    refused(
        command,
        "--model",
        path,
        *([picture] if command == "predict" else ["--data", write_data()]),
        words=[str(path), *words],
    )


@pytest.mark.parametrize("content", [b"", b"hello"], ids=["empty", "text"])
def test_a_model_that_is_not_hdf5_is_refused(content, refused, picture, tmp_path):
    (tmp_path / "params.h5").write_bytes(content)
    refused(
        "predict",
        "--model",
        tmp_path / "params.h5",
        picture,
        words=["params.h5: not a model file, or a damaged one"],
    )


def test_a_model_that_is_not_there_is_refused(refused, picture, tmp_path):
    refused(
        "predict",
        "--model",
        tmp_path / "absent.h5",
        picture,
        words=["absent.h5: no such file"],
    )


def test_a_data_set_in_place_of_a_model_is_refused(refused, picture, write_data):
    refused(
        "predict",
        "--model",
        write_data(),
        picture,
        words=["has no attribute parameters", "written by snn?"],
    )


def test_a_model_that_does_not_fit_the_images_is_refused(refused, write_model, write_data):
    refused(
        "evaluate",
        "--model",
        write_model(size=16),
        "--data",
        write_data(),
        words=["params.h5 takes images of 16x16 pixels", "datasets.h5 holds images of 8x8"],
    )


def test_evaluating_wrong_data_is_refused(refused, write_model, write_data):
    refused(
        "evaluate",
        "--model",
        write_model(),
        "--data",
        write_data(test_set_y=np.array([0, 1, 2])),
        words=["test_set_y holds the label 2"],
    )


@pytest.mark.parametrize(
    "content",
    [b"", b"hello", b"\x89PNG\r\n\x1a\n", b"GIF89a"],
    ids=["empty", "text", "half a PNG", "half a GIF"],
)
def test_a_file_that_is_no_image_is_refused(content, refused, write_model, picture, tmp_path):
    (tmp_path / "notes.png").write_bytes(content)
    refused(
        "predict",
        "--model",
        write_model(),
        picture,
        tmp_path / "notes.png",
        words=["notes.png: not an image, or a damaged one"],
    )


@pytest.mark.parametrize("kind", ["png", "jpeg", "gif", "bmp", "tiff", "webp"])
def test_an_image_that_was_cut_off_is_refused(kind, refused, write_model, tmp_path):
    path = tmp_path / f"cat.{kind}"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)).save(
        path
    )
    path.write_bytes(path.read_bytes()[: -path.stat().st_size // 2])
    refused(
        "predict",
        "--model",
        write_model(),
        path,
        words=[f"cat.{kind}: not an image, or a damaged one"],
    )


def test_an_image_that_is_not_there_is_refused(refused, write_model, tmp_path):
    refused(
        "predict",
        "--model",
        write_model(),
        tmp_path / "absent.png",
        words=["absent.png: no such file"],
    )


def test_an_image_of_too_many_pixels_is_refused(refused, write_model, tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    Image.new("RGB", (30, 20)).save(tmp_path / "wide.png")
    refused(
        "predict",
        "--model",
        write_model(),
        tmp_path / "wide.png",
        words=["wide.png: too many pixels", "at most 100"],
    )


# Drawing and packing


@pytest.fixture
def folders(tmp_path) -> tuple[Path, Path]:
    "Folders of two pictures each."
    for name in ("cats", "others"):
        (tmp_path / name).mkdir()
        for i in range(2):
            Image.new("RGB", (20, 20), (i * 100, 50, 50)).save(tmp_path / name / f"{i}.png")
    return tmp_path / "cats", tmp_path / "others"


def test_packing_a_folder_that_is_not_there_is_refused(refused, folders, tmp_path):
    refused(
        "data",
        "pack",
        "--cat",
        tmp_path / "absent",
        "--non-cat",
        folders[1],
        "--out",
        tmp_path / "new.h5",
        words=["absent: no such folder"],
    )


def test_packing_a_single_picture_is_refused(refused, folders, tmp_path):
    (folders[1] / "1.png").unlink()
    refused(
        "data",
        "pack",
        "--cat",
        folders[0],
        "--non-cat",
        folders[1],
        "--out",
        tmp_path / "new.h5",
        words=["others: holds 1 images", "needs at least two"],
    )


def test_packing_what_is_no_image_is_refused(refused, folders, tmp_path):
    (folders[0] / "notes.txt").write_text("hello")
    refused(
        "data",
        "pack",
        "--cat",
        folders[0],
        "--non-cat",
        folders[1],
        "--out",
        tmp_path / "new.h5",
        words=["notes.txt: not an image"],
    )


@pytest.mark.parametrize("command", [["draw"], ["pack"]], ids=["draw", "pack"])
def test_a_data_set_in_a_folder_that_is_not_there_is_refused(
    command, refused, folders, tmp_path
):
    more = ["--cat", folders[0], "--non-cat", folders[1]] if command == ["pack"] else []
    refused(
        "data",
        *command,
        *more,
        "--out",
        tmp_path / "absent" / "new.h5",
        words=["absent: no such folder"],
    )
    refused(
        "data", *command, *more, "--out", tmp_path, words=["is a folder; --out names a file"]
    )


def test_looking_into_a_wrong_data_set_is_refused(refused, write_data):
    refused("data", "info", write_data(list_classes=None), words=["has no list_classes"])


# And as a process of its own


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (
            [
                "train",
                "--data",
                "absent.h5",
                "--parameters",
                "parameters.json",
                "--out",
                "left",
            ],
            "absent.h5: no such file",
        ),
        (
            ["train", "--parameters", "absent.json", "--out", "left"],
            "absent.json: no such file",
        ),
        (
            ["predict", "--model", "parameters.json", "parameters.json"],
            "parameters.json: not a model file, or a damaged one",
        ),
        (["local", "--ledger", "paper"], "--ledger is paper; it may be store or dynamodb"),
    ],
    ids=["data", "parameters", "model", "ledger"],
)
def test_the_command_says_one_sentence_and_ends_with_two(
    arguments, sentence, run_snn, write_parameters, tmp_path
):
    write_parameters()
    assert run_snn(*arguments, cwd=tmp_path) == (2, "", sentence + "\n")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["parameters.json"]
