"""Who comes from the system of 2018 misses nothing: its files are read, and what it did has its counterpart here."""

import json
import re

import h5py
import numpy as np
import pytest
from PIL import Image

from snn.cli.main import command as command_of
from snn.cloud.messages import Upload
from snn.data import h5 as data
from snn.data import models
from snn.data.photographs import square
from snn.deploy.gate import Service, questions, said_of
from snn.handlers.upload import make_plan
from snn.local.pipeline import default_notebooks, run_notebook
from snn.local.server import local_aws
from snn.maths import model, network
from snn.serve.answer import predict
from snn.serve.model import Sources, load, model_id
from snn.serve.pictures import data_url


@pytest.fixture
def weights_alone(tmp_path, parameters):
    "Writes what the original wrote: W1, b1, ... and nothing else. Returns the file and the whole model."

    def write(sizes=(20, 7, 5, 1), size=8, hidden="relu", scale=1.5):
        chosen = parameters(sizes, hidden)
        layers = [layer[:2] for layer in network.initialise(chosen, size * size * 3)]
        layers = [(W * scale, b + 0.01) for W, b in layers]
        path = tmp_path / "original.h5"
        with h5py.File(path, "w") as file:
            for l, (W, b) in enumerate(layers, start=1):
                file.create_dataset(f"W{l}", data=W)
                file.create_dataset(f"b{l}", data=b)
        return path, model.Model(chosen, layers, size=size)

    return write


@pytest.fixture
def pictures(tmp_path):
    "Some pictures of noise, as files."
    rng, paths = np.random.default_rng(3), []
    for i in range(4):
        paths.append(tmp_path / f"{i}.png")
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).save(paths[-1])
    return paths


def seen(paths) -> np.ndarray:
    return np.stack([np.asarray(Image.open(path)) for path in paths])


ASSUMED = "assumed: relu in each layer and sigmoid in the last, images of 8x8 pixels, pictures squashed to squares, classes non-cat and cat"


def test_a_model_file_of_weights_alone_predicts_and_says_what_was_assumed(
    snn, weights_alone, pictures
):
    path, whole = weights_alone()
    code, said, error = snn("predict", "--model", path, "--json", *pictures)
    answers = [answer["probability"] for answer in json.loads(said)]
    assert code == 0 and np.ptp(answers) > 0.001
    np.testing.assert_allclose(answers, whole.probabilities(seen(pictures)), rtol=1e-12)
    assert error == (
        f"{path} holds weights alone; {ASSUMED} (--parameters FILE says otherwise)\n"
    )


def test_a_parameters_file_says_otherwise(snn, weights_alone, pictures, tmp_path):
    path, whole = weights_alone(hidden="tanh")
    values = {
        "epochs": 5000,
        "layers": 4,
        "activations": whole.parameters.activations,
        "neurons": whole.parameters.neurons,
        "learning_rate": 0.0075,
        "batch_size": 64,
        "threshold": 0.0019,
    }
    (tmp_path / "parameters.json").write_text(json.dumps(values))
    given = ("--parameters", tmp_path / "parameters.json")
    code, said, error = snn("predict", "--model", path, *given, "--json", *pictures)
    answers = [answer["probability"] for answer in json.loads(said)]
    np.testing.assert_allclose(answers, whole.probabilities(seen(pictures)), rtol=1e-12)
    assert code == 0 and "relu" not in error and "images of 8x8 pixels" in error


def test_it_is_evaluated_as_the_whole_model(snn, weights_alone, small_data):
    path, whole = weights_alone()
    code, said, error = snn("evaluate", "--model", path, "--data", small_data, "--json")
    found = data.read(small_data)
    right = (whole.probabilities(found.test_x) >= 0.5) == found.test_y
    assert code == 0 and json.loads(said)["accuracy"] == right.mean() and ASSUMED in error


@pytest.mark.parametrize(
    "change, sentence",
    [
        (lambda file: file.pop("W3"), "has no W3, but a W4"),
        (lambda file: file.pop("b2"), "has no b2, but a W4"),
        (lambda file: (file.pop("W1"), file.create_dataset("W1", data=np.ones((20, 100)))),
         "W1 takes 100 inputs, which are no square picture in RGB"),
        (lambda file: (file.pop("W1"), file.create_dataset("W1", data=np.ones(192))),
         "holds a W that is no matrix"),
        (lambda file: (file.pop("W2"), file.create_dataset("W2", data=np.ones((7, 21)))),
         "W2 is (7, 21)"),
        (lambda file: (file.pop("W4"), file.pop("b4")), "the last layer must be one sigmoid neuron"),
    ],
    ids=["no W3", "no b2", "no picture", "flat", "another shape", "no end"],
)  # fmt: skip
def test_a_damaged_one_is_refused_with_a_sentence(
    change, sentence, snn, weights_alone, pictures
):
    path, _ = weights_alone()
    with h5py.File(path, "r+") as file:
        change(file)
    code, said, error = snn("predict", "--model", path, *pictures)
    assert (code, said, error.count("\n")) == (2, "", 1) and sentence in error


def test_a_whole_model_takes_no_other_parameters(snn, weights_alone, pictures, root):
    path, whole = weights_alone()
    models.write(whole, path)
    given = ("--parameters", root / "parameters.json")
    code, _, error = snn("predict", "--model", path, *given, *pictures)
    assert code == 2 and "says itself what its parameters are; give no others" in error


def test_it_is_served_and_the_first_line_says_what_was_assumed(spawn, weights_alone, pictures):
    path, whole = weights_alone()
    with spawn("serve", "--port", 0, "--model", path) as process:
        url = re.search(r"http://[\d.:]+", process.stdout.readline())[0]
        found = said_of(
            Service(url).ask("POST", "/predict", next(questions(seen(pictures)))[1]),
            len(pictures),
            model_id(whole),
        )
        process.terminate()
        assert ASSUMED in process.communicate(timeout=30)[1]
    assert found == (whole.probabilities(seen(pictures)) >= 0.5).tolist()


@pytest.mark.timeout(300)
def test_the_analysis_reads_the_bucket_of_the_original(
    weights_alone, small_data, tmp_path, monkeypatch
):
    path, whole = weights_alone(size=8)
    costs = {f"epoch{i}": {"cost": 0.7 - i / 100} for i in range(9)}
    start, end = "2018-06-07 16:18:11.128182", "2018-06-08 14:15:01.000001"
    left = {
        "training_results/results.json": json.dumps({"Start": start, **costs, "End": end}),
        "prediction_input/params.h5": path.read_bytes(),
        "training_input/datasets.h5": small_data.read_bytes(),
    }
    with local_aws() as aws:
        for name, value in aws.environment().items():
            monkeypatch.setenv(name, value)
        s3 = aws.client("s3")
        s3.create_bucket(Bucket="cats-of-2018")
        for key, content in left.items():
            s3.put_object(Bucket="cats-of-2018", Key=key, Body=content)
        ran = run_notebook(
            default_notebooks() / "Analysis.ipynb",
            tmp_path / "ran.ipynb",
            {"bucket": "cats-of-2018", "region": "us-east-1", "compared": 0},
        )
    said = ran.read_text()
    evaluation = model.evaluate(whole, *data.read_test(small_data))
    assert "results of 2018, a 20-7-5-1 network" in said and ASSUMED in said
    assert "| final cost | 0.620000 |" in said and f"**{evaluation.accuracy:.1%}**" in said


# How pictures become squares


def halves() -> Image.Image:
    "Three times as wide as high: red at the left, blue in the middle, green at the right."
    picture = Image.new("RGB", (90, 30), "blue")
    picture.paste("red", (0, 0, 30, 30))
    picture.paste("lime", (60, 0, 90, 30))
    return picture


@pytest.mark.parametrize("way", ["squash", "crop", "pad"])
def test_new_pictures_become_squares_as_the_training_pictures_did(
    way, snn, weights_alone, tmp_path
):
    "From the folders to the data set, the model file, the command and the service."
    rng = np.random.default_rng(0)
    for kind in ("cats", "others"):
        (tmp_path / kind).mkdir()
        for i in range(6):
            pixels = rng.integers(0, 256, (8, 24, 3), np.uint8)
            Image.fromarray(pixels).save(tmp_path / kind / f"{i}.png")
    given = () if way == "squash" else ("--prepare", way)
    folders = ("--cat", tmp_path / "cats", "--non-cat", tmp_path / "others")
    path = tmp_path / "datasets.h5"
    assert snn("data", "pack", *folders, "--out", path, "--size", 8, *given)[0] == 0
    found = data.read(path)
    assert found.prepared == way
    plan = make_plan(Upload("b", "k", "e"), weights_alone()[1].parameters, found)
    trained = weights_alone()[1]._replace(prepared=plan.prepared)
    models.write(trained, tmp_path / "params.h5")
    halves().save(tmp_path / "wide.png")
    seen = square(halves(), 8, way)
    left, middle, right = seen[4, 0], seen[4, 4], seen[4, 7]
    assert middle[2] > 200, "blue in the middle, whatever the way"
    assert (left[0] > 200 and right[1] > 200) == (way != "crop"), "the sides are seen, or not"
    assert (abs(seen[0, 4].astype(int) - seen[4, 4]).max() > 50) == (way == "pad"), (
        "bars, or none"
    )
    expected = trained.probabilities(seen[None])[0]
    said = snn("predict", "--model", tmp_path / "params.h5", "--json", tmp_path / "wide.png")[
        1
    ]
    assert json.loads(said)[0]["probability"] == pytest.approx(expected, rel=1e-12)
    served = load(Sources(tmp_path / "params.h5"))
    answer = predict(served, "wide", (tmp_path / "wide.png").read_bytes(), explain=True)
    assert answer.probability == pytest.approx(expected, rel=1e-12)
    assert answer.explanation.seen == data_url(seen)


def test_a_run_passes_it_on_from_the_data_set_to_the_model_file(snn, small_datasets, tmp_path):
    path, out = tmp_path / "datasets.h5", tmp_path / "out"
    data.write(small_datasets()._replace(prepared="pad"), path)
    snn("train", "--data", path, "--out", out, "--epochs", 1, "--quiet")
    assert models.read(out / "params.h5").prepared == "pad"


def test_a_model_of_the_original_sees_what_the_original_saw(snn, weights_alone, tmp_path):
    "The whole picture, squashed with bilinear filtering."
    path, whole = weights_alone()
    halves().save(tmp_path / "wide.png")
    seen = np.asarray(halves().resize((8, 8), Image.Resampling.BILINEAR))
    said = snn("predict", "--model", path, "--json", tmp_path / "wide.png")[1]
    expected = whole.probabilities(seen[None])[0]
    assert json.loads(said)[0]["probability"] == pytest.approx(expected, rel=1e-12)


def test_another_way_is_refused(snn, tmp_path):
    code, _, error = snn(
        "data", "pack", "--cat", tmp_path, "--non-cat", tmp_path, "--prepare", "fold",
        "--out", tmp_path / "d.h5",
    )  # fmt: skip
    assert code == 2 and "--prepare is fold; it may be squash, crop, pad" in error


# The page "Coming from the original"

PARTS = [
    "Configuration",
    "Deployment",
    "SageMaker",
    "LaunchLambda",
    "TrainerLambda",
    "NeuronLambda",
    "Files",
    "Notebooks",
    "Prediction API",
    "Pipeline",
    "Cleanup",
    "Known troubles",
]


@pytest.fixture(scope="module")
def page(root) -> str:
    return (root / "nbs" / "coming-from-the-original.md").read_text()


def test_every_part_of_the_original_has_its_rows_and_what_does_it_now(page, root):
    for part in PARTS:
        (section,) = re.findall(rf"^### {part}$(.*?)(?=^##|\Z)", page, re.M | re.S)
        rows = re.findall(r"^\| (.+) \| (.+) \|$", section, re.M)
        assert rows[0] == ("2018", "now") and len(rows) > 2 and all(now for _, now in rows)
    assert "nbs/coming-from-the-original.md" in (root / "README.md").read_text()


def test_every_command_on_the_page_is_there_with_its_options(page, root):
    asked = re.findall(r"`(?:\.venv/bin/)?(snn|bin/\w+)( [^`]*)?`", page)
    assert len(asked) > 15
    for program, words in asked:
        words = words.split()
        if program != "snn":
            assert (root / program).is_file()
            words.insert(
                0, {"bin/deploy": "deploy", "bin/destroy": "destroy"}.get(program, "train")
            )
        command = command_of(words[0])
        command = command.commands[words[1]] if words[0] == "data" else command
        known = {
            name
            for option in command.params
            for name in (*option.opts, *option.secondary_opts)
        }
        assert {word for word in words if word.startswith("--")} <= known, words


def test_every_file_that_the_page_names_is_there(page, root):
    for name in re.findall(r"\]\(\.\./([^)#]+)", page) + re.findall(r"`(nbs/[^`]+)`", page):
        assert (root / name).exists(), name
