"""The stories: notebooks that run as they are and as stages of a pipeline, and an invocation that is replayed."""
import base64
import json
import re
import time
from pathlib import Path

import msgspec
import nbformat
import numpy as np
import pytest
from PIL import Image

from snn.cloud.messages import Message
from snn.cloud.services import Services
from snn.cloud.store import decode
from snn.handlers import launch, neuron as neuron_lambda, trainer
from snn.local.pipeline import NotebookFailed, Request, StageFailed, default_notebooks, run_notebook, run_pipeline, train_in_cloud
from snn.local.replay import Record, as_dict, explain, hop_of_epoch, read_record, replay, weights_before
from snn.local.server import local_aws, parameter_server
from snn.local.training import train
from snn.maths import data, network
from snn.maths.parameters import InputError

STORIES = ["Introduction", "Codebook", "Analysis"]
PHOTOGRAPHS = Path(__file__).resolve().parent.parent.parent / "shared" / "data"


def outputs(notebook: Path) -> list:
    "All that the cells of a notebook gave."
    return [output for cell in nbformat.read(notebook, 4).cells if cell.cell_type == "code" for output in cell.outputs]


def check_outputs(notebook: Path) -> None:
    "No errors, no warnings, no widgets, no text instead of a picture."
    for output in outputs(notebook):
        assert output.output_type != "error", output
        assert output.get("name") != "stderr", output.text
        said = output.get("text", "") or output.get("data", {}).get("text/plain", "")
        assert not re.search(r"Traceback|Warning:|\x1b\[|it/s\]|widget", said), said
        if "image/png" not in output.get("data", {}): assert not re.match(r"<?(Sheet|Figure|\[?<matplotlib)", said), said


# The notebooks

@pytest.mark.parametrize("name", STORIES)
def test_a_story_in_the_repository_is_small_and_has_its_pictures(name):
    notebook = default_notebooks() / f"{name}.ipynb"
    pictures = [base64.b64decode(output.data["image/png"]) for output in outputs(notebook) if "image/png" in output.get("data", {})]
    assert len(pictures) >= 4 and sum(map(len, pictures)) < 300_000
    check_outputs(notebook)


@pytest.fixture(scope="module")
def told(tmp_path_factory, drawn_data) -> tuple[Path, float]:
    "All three stories, run with drawn data: their folder, and how many seconds they took."
    folder, began = tmp_path_factory.mktemp("stories"), time.monotonic()
    for name in STORIES: run_notebook(default_notebooks() / f"{name}.ipynb", folder / f"{name}.ipynb", {"data": str(drawn_data)})
    return folder, time.monotonic() - began


@pytest.mark.timeout(600)
def test_the_three_stories_take_less_than_two_minutes(told):
    assert told[1] < 120


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", STORIES)
def test_a_story_tells_itself_without_warnings(told, name):
    check_outputs(told[0] / f"{name}.ipynb")


@pytest.mark.timeout(600)
@pytest.mark.parametrize("granularity", ["layer", "network"])
def test_the_codebook_runs_at_every_granularity(granularity, small_data, tmp_path):
    ran = run_notebook(default_notebooks() / "Codebook.ipynb", tmp_path / "Codebook.ipynb", {"data": str(small_data), "granularity": granularity, "epochs": 2, "out": str(tmp_path / "out")})
    check_outputs(ran)
    assert read_record(tmp_path / "out").plan.parameters.granularity == granularity


def test_the_codebook_runs_with_a_single_mini_batch_and_a_single_epoch(small_datasets, tmp_path):
    data.write(small_datasets(train=30), tmp_path / "datasets.h5")
    check_outputs(run_notebook(default_notebooks() / "Codebook.ipynb", tmp_path / "Codebook.ipynb", {"data": str(tmp_path / "datasets.h5"), "epochs": 1}))


@pytest.mark.timeout(600)
def test_the_stories_run_with_photographs(real_data, tmp_path):
    for name in STORIES: check_outputs(run_notebook(default_notebooks() / f"{name}.ipynb", tmp_path / f"{name}.ipynb", {"data": str(real_data), "epochs": 4}))


# Replay

@pytest.fixture
def cloud_in_hand(monkeypatch):
    "A bucket and a parameter server, but nobody who takes messages."
    with local_aws() as aws, parameter_server() as server:
        for name, value in {**aws.environment(), "SNN_REDIS_URL": server.url}.items(): monkeypatch.setenv(name, value)
        aws.client("s3").create_bucket(Bucket="hand")
        yield Services()


def run_until(services: Services, wanted) -> None:
    "Run messages one after the other until one is as wanted, which is not run."
    handlers = {"LaunchLambda": launch.handle, "TrainerLambda": trainer.handle, "NeuronLambda": neuron_lambda.handle}
    waiting = []
    while True:
        waiting += [msgspec.json.decode(envelope.event, type=Message) for envelope in services.bus.take("test", 0)]
        message = waiting.pop(0)
        if wanted(message): return
        handlers[message.function](message, services)
        services.store.flush()


@pytest.mark.parametrize("granularity", ["neuron", "layer"])
def test_a_replay_gives_the_numbers_of_the_invocation(cloud_in_hand, granularity, parameters, small_datasets, small_data):
    services, chosen = cloud_in_hand, parameters((6, 4, 1), hidden="tanh", epochs=4, granularity=granularity, learning_rate=.1)
    bucket = services.bucket("hand")
    bucket.put("input/parameters.json", msgspec.json.encode(chosen))
    bucket.put("input/datasets.h5", small_data.read_bytes())
    run = launch.start(launch.Upload("hand", "input/datasets.h5", "etag"), services)
    run_until(services, lambda message: message.function == "LaunchLambda" and message.epoch == 2)

    record, block = Record(services.runs.plan(run), 3, services.runs.costs(run)), 3 if granularity == "neuron" else 0
    for batch in range(3):
        found = replay(record, small_datasets(), 2, batch, 2, 3, "backward")
        read = lambda name: decode(services.store.read(run, batch, 2, [name])[0])
        row = slice(None) if granularity == "neuron" else 3
        assert np.allclose(read(f"a2/{block}")[0][row].ravel(), found.a, rtol=1e-12)
        assert np.allclose(read(f"dz2/{block}")[0][row].ravel(), found.dz, rtol=1e-10)
        assert np.isclose(read("cost")[0], found.cost, rtol=1e-12)
    winner = int(found.message.source.split("/")[1])
    assert found.message.source == f"1/{winner}" and found.message.first == block
    stored = decode(services.store.read(run, winner, 1, [f"w2/{block}"])[0])
    assert np.allclose(stored[0][0 if granularity == "neuron" else 3], found.w, rtol=1e-12)


def test_a_replayed_event_is_the_one_that_was_sent(cloud_in_hand, parameters, small_datasets, small_data):
    services, chosen = cloud_in_hand, parameters((5, 3, 1), epochs=3, learning_rate=.1)
    bucket = services.bucket("hand")
    bucket.put("input/parameters.json", msgspec.json.encode(chosen))
    bucket.put("input/datasets.h5", small_data.read_bytes())
    run = launch.start(launch.Upload("hand", "input/datasets.h5", "etag"), services)
    sent = []
    run_until(services, lambda message: sent.append(message) or message.function == "LaunchLambda" and message.epoch == 1)
    record = Record(services.runs.plan(run), 2, [])
    for direction, layer, number in [("forward", 1, 4), ("forward", 3, 0), ("backward", 2, 2), ("backward", 1, 0)]:
        found = replay(record, small_datasets(), 1, 2, layer, number, direction)
        same = [message for message in sent if message.id == found.message.id]
        assert len(same) == 1 and msgspec.structs.replace(same[0], learn=True) == found.message


@pytest.fixture(scope="module")
def run_folder(parameters, small_data, tmp_path_factory) -> Path:
    "A finished run with checkpoints."
    folder = tmp_path_factory.mktemp("run")
    train(parameters((6, 4, 1), epochs=9, granularity="network", checkpoint_every=3, learning_rate=.05, optimizer={"name": "momentum"}, validation_fraction=.1),
          small_data, folder)
    return folder


def test_a_checkpoint_gives_the_weights_that_training_gives(run_folder, small_datasets):
    record = read_record(run_folder)
    assert sorted(record.checkpoints) == [2, 5] or sorted(record.checkpoints) == [2, 5, 8]
    whole = record._replace(checkpoints={})
    for epoch in (0, 3, 4, 7):
        one, other = (replay(each, small_datasets(), epoch, 1, 1, 2, "backward") for each in (record, whole))
        assert np.allclose(one.w, other.w, rtol=1e-9) and np.allclose(one.dw, other.dw, rtol=1e-6) and one.message == other.message


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_the_explanation_has_the_numbers_in_it(run_folder, small_datasets, direction):
    found = replay(read_record(run_folder), small_datasets(), 4, 0, 2, 1, direction)
    text = explain(found)
    i = int(np.argmax(found.a > 0))
    for number in (found.z[i], found.a[i]) if direction == "forward" else (found.da[i], found.dz[i], np.abs(found.dw).max(), abs(found.db)):
        assert f"{number:.6g}" in text
    assert json.loads(json.dumps(as_dict(found)))["neuron"] == 1


@pytest.mark.parametrize("changes, said", [
    ({"epoch": 9}, "epoch is 9"), ({"epoch": -1}, "epoch is -1"), ({"batch": 3}, "batch is 3"), ({"layer": 0}, "layer is 0"), ({"layer": 4}, "layer is 4"),
    ({"neuron": 6}, "neuron is 6"), ({"direction": "up"}, "forward or backward")])
def test_an_invocation_that_never_was_is_refused(run_folder, small_datasets, changes, said):
    with pytest.raises(InputError, match=said): replay(read_record(run_folder), small_datasets(), **{"epoch": 0, "batch": 0, "layer": 1, "neuron": 0, "direction": "forward", **changes})


def test_other_data_is_refused(run_folder, small_datasets):
    for other in (small_datasets(seed=1), small_datasets(train=100), small_datasets(size=9)):
        with pytest.raises(InputError, match="trained on|not the data"): replay(read_record(run_folder), other, 0, 0, 1, 0, "forward")


def test_a_record_that_is_not_there_or_broken_is_refused(tmp_path):
    with pytest.raises(InputError, match="no run here"): read_record(tmp_path)
    (tmp_path / "run.json").write_text('{"plan": 3}')
    with pytest.raises(InputError, match="damaged"): read_record(tmp_path)


# Pipeline

@pytest.fixture(scope="module")
def pipeline(parameters, small_data, tmp_path_factory):
    "A whole pipeline on images of 8x8 pixels: its folder and its news."
    out, news = tmp_path_factory.mktemp("pipeline") / "out", []
    run_pipeline(Request(parameters(epochs=5, granularity="network"), out, default_notebooks(), small_data, codebook_epochs=2), news.append)
    return out, news


@pytest.mark.timeout(600)
def test_a_pipeline_leaves_notebooks_model_and_report(pipeline):
    out, news = pipeline
    assert [event.stage for event in news if event.seconds is not None] == ["data", "Codebook", "training", "Analysis", "report"]
    for name in ("Codebook.ipynb", "Analysis.ipynb", "report.html", "codebook/params.h5", "training/params.h5", "training/results.json"): assert (out / name).is_file(), name
    for name in ("Codebook", "Analysis"): check_outputs(out / f"{name}.ipynb")
    assert any(event.training for event in news)


@pytest.mark.timeout(600)
def test_the_report_needs_nothing_from_elsewhere_and_describes_its_pictures(pipeline):
    page = (pipeline[0] / "report.html").read_text()
    assert not re.search(r"<script|<link[^>]+href=.http|src=.http|@import", page)
    assert "Traceback" not in page and "jp-OutputArea-error" not in re.sub(r"<style.*?</style>", "", page, flags=re.DOTALL)
    pictures = re.findall(r"<img\b[^>]*>", page)
    assert len(pictures) >= 10 and all(re.search(r'alt="[^"]+', picture) and "No description" not in picture for picture in pictures)


@pytest.mark.timeout(600)
def test_a_stage_that_fails_is_named_and_what_was_made_is_kept(pipeline, parameters, small_data, tmp_path):
    notebooks = tmp_path / "notebooks"
    notebooks.mkdir()
    cells = lambda *sources: nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in sources])
    nbformat.write(cells("print('fine')"), notebooks / "Codebook.ipynb")
    nbformat.write(cells("x = {}", "x['the key']"), notebooks / "Analysis.ipynb")
    out = tmp_path / "out"
    with pytest.raises(StageFailed) as failed:
        run_pipeline(Request(parameters((3, 1), epochs=2, granularity="network"), out, notebooks, small_data))
    said = str(failed.value)
    assert "stage Analysis failed" in said and "KeyError" in said and "the key" in said and "data, Codebook, training" in said
    assert (out / "Codebook.ipynb").is_file() and (out / "training" / "params.h5").is_file() and not (out / "report.html").exists()


@pytest.mark.parametrize("changes, said", [
    ({"notebooks": Path("nowhere")}, "has no Codebook.ipynb"), ({"datasets": Path("nowhere.h5")}, "no such file"), ({"unseen": Path("nowhere")}, "no such folder"),
    ({"codebook_epochs": 0}, "1 or more"), ({"out": Path(__file__)}, "is a file")])
def test_what_is_wrong_is_found_before_the_first_stage(parameters, small_data, tmp_path, changes, said):
    news = []
    with pytest.raises(InputError, match=said): run_pipeline(Request(parameters(), tmp_path / "out", default_notebooks(), small_data)._replace(**changes), news.append)
    assert news == [] and not (tmp_path / "out").exists()


@pytest.mark.timeout(600)
def test_the_analysis_reads_a_bucket_and_takes_pictures_of_every_kind(cloud, parameters, small_data, tmp_path, monkeypatch):
    for name, value in cloud.environment.items(): monkeypatch.setenv(name, value)
    chosen = parameters(epochs=3, granularity="network")
    train_in_cloud(chosen, small_data, tmp_path / "fetched", cloud.bucket, every=.1)
    assert (tmp_path / "fetched" / "run.json").is_file()

    unseen = tmp_path / "unseen"
    unseen.mkdir()
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 140, 3), dtype=np.uint8))
    for kind, name in [("L", "grey.png"), ("RGBA", "rgba.png"), ("CMYK", "cmyk.jpeg"), ("P", "palette.gif"), ("1", "ink.png")]: picture.convert(kind).save(unseen / name)
    (unseen / "broken.jpeg").write_bytes(b"not a picture")
    for name in ("grumpy_cat.jpeg", "gargouille.jpeg"):
        if (PHOTOGRAPHS / name).is_file(): (unseen / name).write_bytes((PHOTOGRAPHS / name).read_bytes())
    ran = run_notebook(default_notebooks() / "Analysis.ipynb", tmp_path / "Analysis.ipynb", {"bucket": cloud.bucket_name, "region": "us-east-1", "data": str(small_data), "unseen": str(unseen)})
    check_outputs(ran)
    said = "".join(output.get("text", "") for output in outputs(ran))
    assert "broken.jpeg: not an image" in said


@pytest.mark.timeout(600)
def test_the_codebook_runs_in_a_bucket_that_is_there(cloud, small_data, tmp_path, monkeypatch):
    for name, value in cloud.environment.items():
        if name != "SNN_REDIS_URL": monkeypatch.setenv(name, value)
    before = set(cloud.services.runs.names())
    ran = run_notebook(default_notebooks() / "Codebook.ipynb", tmp_path / "Codebook.ipynb", {"bucket": cloud.bucket_name, "region": "us-east-1", "data": str(small_data), "epochs": 2})
    check_outputs(ran)
    assert "prediction_input/params.h5" in cloud.bucket.keys("prediction_input/")
    assert set(cloud.services.runs.names()) == before, "the stack must not start a run of its own"
