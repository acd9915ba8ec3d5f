"""Images changed at random, values dropped, the mean subtracted: the same for everybody, and nothing for whoever did not ask."""

import hashlib
import json
import time
from io import BytesIO
from itertools import product
from types import SimpleNamespace

import h5py
import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from snn.cloud.messages import Upload
from snn.data import h5 as data
from snn.data import models
from snn.handlers import checkpoint
from snn.handlers import upload as uploads
from snn.lab.faults import (
    SMALL,
    LabBucket,
    Schedule,
    _weights,
    run_in_lab,
    same,
    small_datasets,
)
from snn.local.server import parameter_server
from snn.maths import network, sampling
from snn.maths.augment import augment, batch_inputs, dropout_mask, move
from snn.maths.parameters import encode, from_dict, parse, read
from snn.replay.compute import message_of, replay
from snn.replay.record import Record
from snn.serve.model import Sources, load, model_id

GRANULARITIES, AGGREGATIONS = ("neuron", "layer", "network"), ("best", "mean")
LEARNS = {
    "augment": {"flip": True, "shift": 2},
    "dropout": {"inputs": 0.3, "hidden": 0.2},
    "standardise": "mean",
    "schedule": "linear",
}
OFF = {
    "augment": {"flip": False, "shift": 0},
    "dropout": {"inputs": 0, "hidden": 0.0},
    "standardise": "range",
    "checkpoint_seconds": 0,
    "schedule": "constant",
}


@pytest.fixture(scope="module")
def server():
    with parameter_server() as started:
        yield started


@pytest.fixture
def lab(server, monkeypatch):
    "Trains in the fault lab; returns the files that lie in the bucket afterwards."

    def train(**changes) -> dict[str, bytes]:
        buckets, made = [], LabBucket.__init__

        def note(bucket, *files):
            made(bucket, *files)
            buckets.append(bucket)

        monkeypatch.setattr(LabBucket, "__init__", note)
        run_in_lab(
            Schedule(0, ()), server.url, from_dict({**SMALL, **changes}), small_datasets()
        )
        return buckets[-1]

    return train


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> data.Datasets:
    "The data that the lab trains on."
    path = tmp_path_factory.mktemp("small") / "datasets.h5"
    path.write_bytes(small_datasets())
    return data.read(path)


# Whoever does not ask for it


NAMED = {  # from before there were these keys
    ("neuron", "best"): "998c821848a5",
    ("layer", "best"): "d50fdaf4fd4f",
    ("network", "best"): "a64795b30455",
    ("neuron", "mean"): "cc1bc7e1f9ad",
    ("layer", "mean"): "f6efe6741222",
    ("network", "mean"): "0794b15b3c2c",
}
WEIGHTS = {"best": "d2e36189bffa60ee", "mean": "85e02d0dff46c119"}  # to nine digits
WRITTEN = (
    '{"epochs":6,"layers":3,"neurons":{"layer1":4,"layer2":3,"layer3":1},'
    '"activations":{"layer1":"relu","layer2":"tanh","layer3":"sigmoid"},"learning_rate":0.1,'
    '"batch_size":6,"threshold":0.0,"aggregation":"mean","optimizer":{"name":"sgd",'
    '"momentum":0.9,"beta1":0.9,"beta2":0.999,"epsilon":1e-8,"l2":0.0},'
    '"granularity":"network","seed":0,"dtype":"float64","checkpoint_every":2,'
    '"validation_fraction":0.0,"patience":0,"notify_every":0,"stall_after":20.0,'
    '"max_cost":0.0,"deadline":0.0,"residents":0}'
)


@pytest.mark.parametrize("changes", [{}, OFF], ids=["absent", "off"])
@pytest.mark.parametrize("granularity, aggregation", NAMED)
def test_a_run_without_the_new_keys_keeps_its_name(granularity, aggregation, changes):
    chosen = from_dict(
        {**SMALL, "granularity": granularity, "aggregation": aggregation, **changes}
    )
    upload = Upload("lab", "training_input/datasets.h5", "1")
    assert uploads.run_id(upload, chosen) == NAMED[granularity, aggregation]


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_a_model_without_the_new_keys_is_what_it_was(aggregation, lab):
    content = lab(granularity="network", aggregation=aggregation)["prediction_input/params.h5"]
    with h5py.File(BytesIO(content)) as file:
        assert sorted(file) == ["W1", "W2", "W3", "b1", "b2", "b3"]
        rounded = b"".join((np.round(file[name][()], 9)).tobytes() for name in sorted(file))
        text = file.attrs["parameters"]
    assert hashlib.sha256(rounded).hexdigest()[:16] == WEIGHTS[aggregation]
    assert text == WRITTEN.replace('"mean"', f'"{aggregation}"')


def test_a_run_with_a_new_key_has_another_name():
    upload = Upload("lab", "training_input/datasets.h5", "1")
    asked = [{}, *({name: value} for name, value in LEARNS.items()), {"checkpoint_seconds": 3}]
    names = {uploads.run_id(upload, from_dict({**SMALL, **changes})) for changes in asked}
    assert len(names) == len(asked)


# What is drawn


@given(st.integers(0, 2**63 - 1), st.integers(0, 10**6), st.integers(0, 500))
def test_what_is_random_is_the_same_for_everybody_and_another_each_time(seed, epoch, batch):
    chosen = from_dict({**SMALL, **LEARNS, "seed": seed})
    images = np.random.default_rng(0).integers(0, 256, (8, 75), dtype=np.uint8)
    for draw in (
        lambda e, b: augment(chosen, images, e, b),
        lambda e, b: dropout_mask(chosen, 0, 75, 8, e, b),
        lambda e, b: dropout_mask(chosen, 1, 40, 8, e, b),
    ):
        assert (draw(epoch, batch) == draw(epoch, batch)).all()
        assert (draw(epoch, batch) != draw(epoch + 1, batch)).any()
        assert (draw(epoch, batch) != draw(epoch, batch + 1)).any()
    one, other = (dropout_mask(chosen, l, 75, 8, epoch, batch) for l in (0, 1))
    assert ((one == 0) != (other == 0)).any()


@given(st.integers(1, 9), st.booleans(), st.integers(-9, 9), st.integers(-9, 9))
def test_a_moved_image_is_the_one_that_loops_make(size, flip, down, right):
    image = np.random.default_rng(size).integers(0, 256, (size, size, 3), dtype=np.uint8)
    expected = np.empty_like(image)
    for r, c in product(range(size), range(size)):
        source = min(max(c - right, 0), size - 1)
        row = min(max(r - down, 0), size - 1)
        expected[r, c] = image[row, size - 1 - source if flip else source]
    found = move(image[None], np.array([flip]), np.array([down]), np.array([right]))[0]
    assert (found == expected).all()


def test_half_of_the_images_are_mirrored_and_all_shifts_are_as_frequent():
    images = np.tile(np.arange(49, dtype=np.uint8).repeat(3), (7000, 1))
    chosen = from_dict({**SMALL, "augment": {"flip": True, "shift": 3}})
    centre = augment(chosen, images, 0, 0).reshape(-1, 7, 7, 3)[:, 3, :, 0].astype(int)
    rows, columns = centre[:, 3] // 7, centre[:, 3] % 7  # what has come to the middle
    mirrored = centre[:, 6] < centre[:, 0]
    assert abs(mirrored.mean() - 0.5) < 0.02
    for found in (rows, columns):
        assert np.allclose(np.bincount(found, minlength=7) / 7000, 1 / 7, atol=0.02)


def test_dropped_values_are_zero_and_the_others_larger_by_as_much():
    chosen = from_dict({**SMALL, "dropout": {"inputs": 0.3}, "dtype": "float32"})
    X = np.full((400, 300), 0.5, dtype=np.float32)
    A0 = batch_inputs(chosen, X, None, 0, 0)
    assert A0.dtype == np.float32 and A0.shape == (300, 400)
    assert set(np.unique(A0)) == {np.float32(0), np.float32(0.5) * np.float32(1 / 0.7)}
    assert abs((A0 == 0).mean() - 0.3) < 0.01
    assert dropout_mask(chosen, 1, 4, 6, 0, 0) is None


def test_images_that_are_numbers_already_are_not_silently_left_as_they_are():
    chosen = from_dict({**SMALL, "augment": {"flip": True}})
    with pytest.raises(ValueError, match="augment changes images as bytes"):
        next(network.train(chosen, np.zeros((6, 12)), np.arange(6) % 2))


# The same numbers by everybody


@pytest.mark.parametrize(
    "granularity, aggregation, dtype",
    [*product(GRANULARITIES, AGGREGATIONS, ["float64"]), ("neuron", "mean", "float32")],
)
def test_the_handlers_weights_equal_plain_numpy(lab, small, granularity, aggregation, dtype):
    changes = {**LEARNS, "granularity": granularity, "aggregation": aggregation}
    changes |= {"dtype": dtype, "optimizer": {"name": "adam"}, "learning_rate": 0.01}
    files = lab(**changes)
    chosen = from_dict({**SMALL, **changes})
    costs, layers = zip(*network.train(chosen, small.train_x, small.train_y))
    precision = 1e-9 if dtype == "float64" else 1e-3
    for found, expected in zip(
        _weights(files["prediction_input/params.h5"]), layers[-1], strict=True
    ):
        for a, b in zip(found, expected):
            np.testing.assert_allclose(a, b, rtol=precision, atol=precision / 1000)
    results = json.loads(files["training_results/results.json"])
    found = [value["cost"] for name, value in results.items() if name.startswith("epoch")]
    np.testing.assert_allclose(found, costs, rtol=precision)


@pytest.mark.parametrize("name", LEARNS)
def test_each_key_makes_another_network(small, name):
    one, other = (
        list(network.train(from_dict({**SMALL, **keys}), small.train_x, small.train_y))[-1][1]
        for keys in ({}, {name: LEARNS[name]})
    )
    assert not np.allclose(one[0][0], other[0][0])


def test_plain_numpy_takes_images_as_bytes_or_standardised(small):
    chosen = from_dict(SMALL)
    X = sampling.standardise(small.train_x)
    ends = [list(network.train(chosen, x, small.train_y))[-1] for x in (small.train_x, X)]
    assert ends[0][0] == ends[1][0] and same(ends[0][1], ends[1][1])


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_a_replayed_neuron_has_the_numbers_of_plain_numpy(small, granularity):
    chosen = from_dict({**SMALL, **LEARNS, "granularity": granularity, "aggregation": "mean"})
    costs, layers = zip(*network.train(chosen, small.train_x, small.train_y))
    plan = uploads.make_plan(Upload("lab", "datasets.h5", "1"), chosen, small)
    found = replay(Record(plan, 6, list(costs)), small, 3, 1, 2, 1, "backward")
    W, b = layers[2][1]
    mean = sampling.mean_image(small.train_x)
    batch = list(
        network.epoch_batches(
            chosen, small.train_x.reshape(len(small.train_x), -1), small.train_y, 3, mean
        )
    )[1]
    assert (found.A_prev == 0).mean() > 0.05  # some are dropped
    assert found.message.id == message_of(plan, 3, 1, 2, 1, "backward", "2/-2").id
    assert np.allclose(found.w, W[1]) and np.allclose(
        found.z, W[1] @ found.A_prev + b[1], rtol=1e-12
    )
    _, gradients = network.gradients(chosen, layers[2], *batch)
    np.testing.assert_allclose(found.dw, gradients[1][0][1], rtol=1e-9, atol=1e-15)
    np.testing.assert_allclose(found.db, gradients[1][1][1, 0], rtol=1e-9)


# A model file is enough to predict


@pytest.fixture(scope="module")
def centred(tmp_path_factory, server, small):
    "A model that was trained with the mean subtracted, by the handlers; and its weights by plain NumPy."
    chosen = from_dict({**SMALL, **LEARNS, "validation_fraction": 0.25})
    kept, held = sampling.split(len(small.train_x), 0.25, 0)
    put, files = LabBucket.put, {}

    def keep(bucket, key, content):
        files[key] = content
        put(bucket, key, content)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LabBucket, "put", keep)
        run_in_lab(Schedule(0, ()), server.url, chosen, small_datasets())
    folder = tmp_path_factory.mktemp("centred")
    (folder / "params.h5").write_bytes(files["prediction_input/params.h5"])
    (folder / "datasets.h5").write_bytes(small_datasets())
    *_, (_, layers) = network.train(chosen, small.train_x[kept], small.train_y[kept])
    mean = small.train_x[kept].reshape(len(kept), -1).mean(axis=0) / 255
    answer = lambda images: network.activations(
        chosen, layers, (images.reshape(len(images), -1) / 255 - mean).T
    )[-1]
    status = msgspec.json.decode(files["training_results/" + _run(files) + "/run.json"])
    return SimpleNamespace(folder=folder, answer=answer, held=held, run=status, files=files)


def _run(files) -> str:
    return next(key.split("/")[1] for key in files if key.endswith("/run.json"))


def test_a_model_with_a_mean_answers_as_it_was_trained(centred, small):
    found = models.read(centred.folder / "params.h5")
    np.testing.assert_allclose(
        found.probabilities(small.test_x), centred.answer(small.test_x)[0], rtol=1e-9
    )
    plain = found._replace(mean=None).probabilities(small.test_x)
    assert not np.allclose(plain, centred.answer(small.test_x)[0], rtol=1e-3)


def test_evaluate_and_the_service_subtract_the_mean(centred, small, snn):
    code, said, _ = snn(
        "evaluate",
        "--model",
        centred.folder / "params.h5",
        "--data",
        centred.folder / "datasets.h5",
        "--json",
    )
    expected = network.cost(centred.answer(small.test_x), small.test_y[None])
    assert code == 0 and json.loads(said)["cost"] == pytest.approx(expected, rel=1e-9)
    served = load(Sources(centred.folder / "params.h5", centred.folder / "datasets.h5"))
    assert served.evaluation.cost == pytest.approx(expected, rel=1e-9)
    other = served.model._replace(mean=served.model.mean + 0.1)
    assert model_id(other) != served.id  # another mean, other answers


def test_predict_subtracts_the_mean(centred, small, snn, tmp_path):
    Image.fromarray(small.test_x[0]).save(tmp_path / "picture.png")
    code, said, _ = snn(
        "predict", "--model", centred.folder / "params.h5", tmp_path / "picture.png", "--json"
    )
    (answer,) = json.loads(said)
    assert code == 0 and answer["probability"] == pytest.approx(
        centred.answer(small.test_x[:1])[0, 0], rel=1e-9
    )


SPOILT = {
    "no mean": (lambda file: file.pop("mean"), "has no mean, but its parameters say"),
    "a mean of other images": (
        lambda file: (file.pop("mean"), file.create_dataset("mean", data=np.zeros(5))),
        "mean is (5,); images of",
    ),
    "no number": (
        lambda file: file["mean"].__setitem__(0, np.nan),
        "mean holds a value that is infinite or not a number",
    ),
}


@pytest.mark.parametrize("spoil, words", SPOILT.values(), ids=SPOILT)
def test_a_model_with_a_wrong_mean_is_refused(centred, snn, tmp_path, spoil, words):
    path = tmp_path / "params.h5"
    path.write_bytes((centred.folder / "params.h5").read_bytes())
    with h5py.File(path, "r+") as file:
        spoil(file)
    code, said, error = snn("evaluate", "--model", path, "--data", centred.folder)
    assert (code, said) == (2, "") and words in error and len(error.splitlines()) == 1


# Checkpoints by the clock


@pytest.fixture
def clock(monkeypatch):
    "A clock that goes seven seconds each time it is asked, from the beginning of the run."
    asked = []

    def now() -> float:
        asked.append(time.time() + 7 * (len(asked) + 1))
        return asked[-1]

    monkeypatch.setattr(checkpoint, "time", SimpleNamespace(time=now))


@pytest.mark.parametrize(
    "every, seconds, expected",
    [(0, 20, [2, 5]), (4, 20, [2, 3, 6]), (4, 0, [3]), (0, 0, []), (0, 7, list(range(7)))],
)
def test_checkpoints_are_made_by_the_clock_too(lab, clock, every, seconds, expected):
    files = lab(
        epochs=8, granularity="network", checkpoint_every=every, checkpoint_seconds=seconds
    )
    made = [int(key[-12:-4]) for key in files if key.endswith(".npz") and "checkpoints" in key]
    assert sorted(made) == expected


def test_parameters_come_back_from_their_text():
    for changes in ({}, LEARNS, {"checkpoint_seconds": 30}, {"dropout": {"hidden": 0.1}}):
        chosen = from_dict({**SMALL, **changes})
        assert parse(encode(chosen)) == chosen
        assert parse(msgspec.json.encode(chosen)) == chosen


@pytest.mark.parametrize("name", ["parameters.json", "parameters-2018.json"])
def test_a_run_with_shipped_settings_loses_at_most_half_a_minute(name, root):
    assert read(root / name).checkpoint_seconds == 30
