"""Settings are chosen by trainings of plain NumPy on the training images, and by nothing else."""

import json

import msgspec
import numpy as np
import pytest

from snn.data import h5 as data
from snn.lab import tune
from snn.maths import network, sampling
from snn.maths.network import activations
from snn.maths.parameters import encode


@pytest.fixture(params=["constant", "linear"])
def candidate(request, parameters):
    "Settings with all that is drawn at random, and a rate that may fall with the epochs."
    return parameters(
        (4, 3, 1),
        "leaky_relu",
        epochs=6,
        aggregation="mean",
        learning_rate=0.05,
        augment={"flip": True, "shift": 1},
        dropout={"inputs": 0.2, "hidden": 0.1},
        standardise="mean",
        schedule=request.param,
    )


def accuracies(
    chosen, found: data.Datasets, folds: int, seed: int, epochs: int
) -> list[float]:
    "In each fold, by hand."
    shares = []
    for held in tune.divide(found.train_y, folds, 0, 0):
        kept = np.setdiff1d(np.arange(len(found.train_y)), held)
        asked = msgspec.structs.replace(chosen, epochs=epochs, seed=seed)
        *_, (_, layers) = network.train(asked, found.train_x[kept], found.train_y[kept])
        mean = sampling.mean_image(found.train_x[kept])
        X = sampling.standardise(found.train_x[held], mean=mean).T
        says = activations(asked, layers, X)[-1][0] >= 0.5
        shares.append((says == found.train_y[held]).mean())
    return shares


def test_tune_says_how_often_plain_numpy_is_right_on_images_it_has_not_learned_from(
    snn, tmp_path, small_data, candidate
):
    found = data.read(small_data)
    nothing = found._replace(test_x=255 - found.test_x, test_y=1 - found.test_y)
    data.write(
        nothing, tmp_path / "datasets.h5"
    )  # whoever looks at the test part learns wrong
    (tmp_path / "one.json").write_bytes(encode(candidate))
    code, said, _ = snn(
        "tune",
        tmp_path / "one.json",
        *("--data", tmp_path / "datasets.h5", "--vary", "epochs=3,6"),
        *("--folds", 3, "--repeats", 1, "--seeds", 2, "--workers", 2, "--json"),
    )
    rows = {row["parameters"]["epochs"]: row for row in json.loads(said)["candidates"]}
    assert code == 0 and sorted(rows) == [3, 6]
    for epochs, row in rows.items():
        expected = np.mean(
            [accuracies(candidate, found, 3, seed, epochs) for seed in (0, 1)], axis=0
        )
        np.testing.assert_allclose(row["folds"], expected, rtol=1e-12)
        assert row["accuracy"] == pytest.approx(expected.mean())
        spread = expected.std(ddof=1) * (1 / 3 + 1 / 2) ** 0.5
        assert row["error"] == pytest.approx(spread)
    best = max(rows.values(), key=lambda row: row["accuracy"])
    assert json.loads(said)["candidates"][0] == best and best["behind"] == 0


def test_of_those_that_are_as_good_the_cheapest_is_chosen(candidate):
    cheaper = {"epochs 6": candidate, "epochs 3": msgspec.structs.replace(candidate, epochs=3)}
    as_good = {"epochs 6": np.array([0.8, 0.7, 0.8]), "epochs 3": np.array([0.8, 0.7, 0.7])}
    worse = {"epochs 6": np.array([0.8, 0.7, 0.8]), "epochs 3": np.array([0.6, 0.5, 0.6])}
    for found, expected in ((as_good, "epochs 3"), (worse, "epochs 6")):
        scores = tune.scores(cheaper, found, folds=3)
        assert scores[0].name == "epochs 6" and tune.choice(scores, 100).name == expected
    assert scores[1].behind == pytest.approx(0.2) and scores[1].behind_error < 1e-9


@pytest.mark.parametrize(
    "more, sentence",
    [
        (["--vary", "epochs"], "--vary is epochs; it must be KEY=VALUE,VALUE,..."),
        (
            ["--vary", "epochs=0"],
            "--vary: epochs holds 0; it may hold a whole number, 1 or more",
        ),
        (["--vary", "epoch=3"], "--vary: unknown key epoch; did you mean epochs?"),
        (["--vary", "augment.flip.x=3"], "--vary: augment.flip has no x"),
        (["--folds", "900"], "900 folds need 900 images of each class; there are "),
        (["nowhere.json"], "nowhere.json: no such file"),
    ],
)
def test_what_can_not_be_tried_is_refused(
    snn, tmp_path, small_data, candidate, more, sentence, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "parameters.json").write_bytes(encode(candidate))
    code, said, error = snn("tune", "parameters.json", "--data", small_data, *more)
    assert (code, said) == (2, "") and error.startswith(sentence)
    assert len(error.splitlines()) == 1
