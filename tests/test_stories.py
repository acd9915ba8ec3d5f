"""The stories: notebooks that run as they are and as stages of a pipeline, and an invocation that is replayed."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from pathlib import Path

import msgspec
import nbformat
import numpy as np
import pytest
from nbconvert import HTMLExporter
from PIL import Image

from snn.backends.aws.bucket import Bucket
from snn.backends.local.services import Services
from snn.cloud.arrays import decode
from snn.cloud.messages import Message, Upload
from snn.data import h5 as data
from snn.errors import InputError
from snn.handlers.protocol import handle, invocations_per_epoch
from snn.handlers.upload import start
from snn.local.pipeline import (
    NotebookFailed,
    Request,
    StageFailed,
    default_notebooks,
    run_notebook,
    run_pipeline,
    train_in_cloud,
)
from snn.local.server import local_aws, parameter_server
from snn.local.training import train
from snn.maths.augment import prepare
from snn.maths.network import activations, cost, epoch_batches
from snn.replay.compute import replay, replay_on, weights_before
from snn.replay.explain import as_dict, explain
from snn.replay.record import (
    Record,
    find_record,
    images_in_bucket,
    read_record,
    record_in_bucket,
    training_part,
)

STORIES = ["Introduction", "Codebook", "Analysis"]
SCREENS = (
    Path(__file__).resolve().parent.parent / "out" / "screens"
)  # pictures of what was seen are left here
PHOTOGRAPHS = Path(__file__).resolve().parent.parent.parent / "shared" / "data"


def outputs(notebook: Path) -> list:
    "All that the cells of a notebook gave."
    return [
        output
        for cell in nbformat.read(notebook, 4).cells
        if cell.cell_type == "code"
        for output in cell.outputs
    ]


def check_outputs(notebook: Path) -> None:
    "No errors, no warnings, no widgets, no text instead of a picture."
    for output in outputs(notebook):
        assert output.output_type != "error", output
        assert output.get("name") != "stderr", output.text
        said = output.get("text", "") or output.get("data", {}).get("text/plain", "")
        assert not re.search(r"Traceback|Warning:|\x1b\[|it/s\]|widget", said), said
        if "image/png" not in output.get("data", {}):
            assert not re.match(r"<?(Sheet|Figure|\[?<matplotlib)", said), said


# The notebooks


def pictures(notebook: Path) -> list:
    "The outputs of a notebook that are pictures."
    return [output for output in outputs(notebook) if "image/png" in output.get("data", {})]


def described(notebook: Path) -> list[str]:
    "What the pictures of a notebook are described as."
    return [output.metadata["image/png"]["alt"] for output in pictures(notebook)]


def said_in(notebook: Path) -> str:
    "All that the cells of a notebook printed, and its tables."
    return "\n".join(
        output.get("text", "") or output.get("data", {}).get("text/markdown", "")
        for output in outputs(notebook)
    )


@pytest.mark.parametrize(
    "notebook",
    [
        pytest.param(path, id=path.stem)
        for path in sorted(default_notebooks().glob("[A-Z]*.ipynb"))
    ],
)
def test_a_story_in_the_repository_is_small_and_shows_its_pictures(notebook):
    assert notebook.stat().st_size < 700_000, "fewer or smaller pictures"
    assert len(pictures(notebook)) >= 4 and all(described(notebook))
    check_outputs(notebook)


def test_every_cell_of_a_story_has_been_run():
    for name in STORIES:
        silent = [
            cell.source
            for cell in nbformat.read(default_notebooks() / f"{name}.ipynb", 4).cells
            if cell.cell_type == "code"
            and not cell.outputs
            and re.search(
                r"^(print|show|display|table|learning|neurons|answers|structure|style)\W",
                cell.source,
                re.M,
            )
        ]
        assert not silent, f"{name} was changed and not run again"


# What a reader meets


def cells_of(name: str, kind: str) -> list:
    "The cells of a story as it is kept, of one kind."
    found = nbformat.read(default_notebooks() / f"{name}.ipynb", 4).cells
    return [cell for cell in found if cell.cell_type == kind]


def prose(name: str) -> str:
    "All that a story says between its cells."
    return "\n\n".join(cell.source for cell in cells_of(name, "markdown"))


def too_wide(notebook: Path) -> list[str]:
    "Lines of code, and printed lines, of more columns than JupyterLab shows on a laptop."
    texts = [output.get("text", "") for output in outputs(notebook)]
    texts += [
        cell.source for cell in nbformat.read(notebook, 4).cells if cell.cell_type == "code"
    ]
    return [line for text in texts for line in text.splitlines() if len(line) > 95]


@pytest.mark.parametrize("name", STORIES)
def test_no_line_of_a_story_is_out_of_sight(name):
    assert too_wide(default_notebooks() / f"{name}.ipynb") == []


@pytest.mark.parametrize("name", [*STORIES, "Benchmark"])
def test_every_link_of_a_story_leads_somewhere(name):
    text = "\n".join([prose(name), *(cell.source for cell in cells_of(name, "code"))])
    links = re.findall(r"\]\(([^)\s]+)\)|href='([^']+)'", text)
    near = {one or other for one, other in links if not (one or other).startswith("http")}
    gone = [link for link in near if not (default_notebooks() / link.split("#")[0]).is_file()]
    assert near and gone == []


def test_stories_and_chapters_are_linked():
    for name in STORIES:
        others = [other for other in STORIES if other != name]
        assert any(f"({other}.ipynb)" in prose(name) for other in others), name
        chapters = set(re.findall(r"\]\((\w+/\d\d_\w+)\.ipynb\)", prose(name)))
        assert len(chapters) >= 3, f"{name} leads to {chapters}"


def test_the_terms_of_the_field_are_in_bold_where_they_are_met():
    whole = "\n".join(map(prose, STORIES))
    for term in (
        "activation function",
        "loss",
        "gradient descent",
        "backpropagation",
        "overfitting",
    ):
        assert whole.count(f"**{term}**") == 1, term


def test_the_stories_name_the_file_of_the_settings_of_2018():
    for name in ("Introduction", "Codebook"):
        assert "`parameters-2018.json`" in prose(name)


def chapters_of(notebook: Path) -> dict[str, list]:
    "The cells of each chapter, by its title."
    found, title = {}, ""
    for cell in nbformat.read(notebook, 4).cells:
        if cell.cell_type == "markdown" and cell.source.startswith("## "):
            title = cell.source.splitlines()[0]
        found.setdefault(title, []).append(cell)
    return found


def test_each_chapter_of_the_introduction_ends_with_a_prediction():
    chapters = chapters_of(default_notebooks() / "Introduction.ipynb")
    titles = [title for title in chapters if title][:-1]  # the last one says what comes next
    assert len(titles) == 13
    for title in titles:
        asked = [
            number
            for number, cell in enumerate(chapters[title])
            if cell.source.startswith("### Predict, then run")
        ]
        assert len(asked) == 1, title
        code = chapters[title][asked[0] + 1]
        folded = [
            output.data["text/html"]
            for output in code.outputs
            if "text/html" in output.get("data", {})
        ]
        assert len(folded) == 1 and folded[0].startswith("<details>"), title
        after = chapters[title][asked[0] + 2 :]
        assert all(
            cell.source.startswith("(stored,)") for cell in after if cell.cell_type == "code"
        )


LONGEST = 300  # seconds that a cell may take before the test gives up; how long they take is measured, and not asserted on a machine that does other things as well


# Of the trainings in the stories, as few as show what the tests below ask for.
EPOCHS = {
    "Introduction": {},
    "Codebook": {"epochs": 14},
    "Analysis": {"epochs": 40, "compared": 12},
}


@pytest.fixture(scope="module")
def told(tmp_path_factory) -> Path:
    "All three stories, from top to bottom: their folder."
    folder, began = tmp_path_factory.mktemp("stories"), time.monotonic()
    for name in STORIES:
        run_notebook(
            default_notebooks() / f"{name}.ipynb",
            folder / f"{name}.ipynb",
            EPOCHS[name],
            longest=LONGEST,
        )
    print(f"the three stories took {time.monotonic() - began:.0f} s together")
    return folder


@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", STORIES)
def test_a_story_tells_itself_from_top_to_bottom(told, name):
    check_outputs(told / f"{name}.ipynb")
    assert len(pictures(told / f"{name}.ipynb")) == len(
        pictures(default_notebooks() / f"{name}.ipynb")
    )


@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", STORIES)
def test_no_line_that_a_story_prints_is_out_of_sight(told, name):
    assert too_wide(told / f"{name}.ipynb") == []


@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", ["Introduction", "Codebook"])
def test_the_microscope_is_alive_in_a_notebook_and_a_picture_elsewhere(told, name):
    notebook = nbformat.read(told / f"{name}.ipynb", 4)
    view = "application/vnd.jupyter.widget-view+json"
    (alive,) = [out for out in outputs(told / f"{name}.ipynb") if view in out.get("data", {})]
    page, _ = HTMLExporter(template_name="lab").from_notebook_node(notebook)
    assert alive.data["image/png"].strip() in page and view not in page


@pytest.mark.timeout(900)
def test_the_introduction_tells_why_many_cats_get_one_answer(told):
    said = said_in(told / "Introduction.ipynb")
    silent, images, cats, all_cats = map(int, re.search(
        r"layer 2 is silent for (\d+) of (\d+) test images,\nand (\d+) of the (\d+) cats", said
    ).groups())  # fmt: skip
    assert 0 < cats <= silent < images and cats > all_cats / 2
    answers = re.search(r"their answers: (.+)", said)[1].split()
    by_biases = re.search(r"the answer of the biases alone.* = ([\d.]+)", said)[1]
    assert set(answers) == {by_biases} and len(answers) == silent
    assert re.search(r"leaky ReLU  layer 2 silent for  0 images, (\d+)", said)


@pytest.mark.timeout(900)
def test_the_picture_of_the_race_says_what_was_printed(told):
    missing = re.search(r"finds missing: (.+)", said_in(told / "Introduction.ipynb"))[1]
    title = f"The highest number fires, and {missing} is missing"
    assert missing == "row 2" and title in described(told / "Introduction.ipynb")


@pytest.mark.timeout(900)
def test_the_codebook_learns_more_than_the_larger_class_and_says_that_seeds_matter(told):
    said = said_in(told / "Codebook.ipynb")
    right = float(re.search(r"right for (\d+)% of", said)[1])
    always = float(re.search(r"always naming the larger class: (\d+)%", said)[1])
    seeds = [float(share) for share in re.findall(r"^seed \d: (\d+)%$", said, re.M)]
    assert right > always + 10 and len(seeds) == 4 and seeds[0] == right
    assert min(seeds) > always and len(set(seeds)) > 1
    message = re.search(r"NeuronLambdas that are asked: 20, for instance\n(.+\n.+)", said)[1]
    assert json.loads(message)["first"] == 3, "its neuron is in it"


@pytest.mark.timeout(900)
def test_the_analysis_shows_weights_on_their_way_and_what_the_run_would_cost(told):
    analysis = told / "Analysis.ipynb"
    assert "Layer 1 from epoch to epoch: what training has added to the weights" in described(
        analysis
    )
    dollars = float(
        re.search(r"\*\*in all\*\* \| \*\*([\d.]+)\*\*", said_in(analysis)).group(1)
    )
    assert 0 < dollars < 1


@pytest.mark.timeout(900)
def test_the_analysis_names_all_measures_of_the_test_set(told):
    said = said_in(told / "Analysis.ipynb")
    for measure in (
        "accuracy",
        "classification error",
        "majority baseline",
        "sensitivity",
        "specificity",
        "false-positive rate",
        "precision",
    ):
        assert re.search(rf"\| {measure} \| .* \| \*\*[\d.]+%\*\* \| \d+% to \d+% \|", said), (
            measure
        )
    assert any(
        re.match(r"ROC curve, AUC [01]\.", text) for text in described(told / "Analysis.ipynb")
    )


def verdict(notebook: Path) -> tuple[float, float, bool]:
    "The lower end of the accuracy's interval, the baseline, and whether better is said."
    said = said_in(notebook)
    low = float(re.search(r"right: [\d.]+%, 95 % interval ([\d.]+)%", said)[1])
    baseline = float(re.search(r"Who is right for ([\d.]+)% of all pictures", said)[1])
    return low, baseline, "these images show that it is better" in said


@pytest.mark.timeout(900)
def test_the_analysis_calls_it_better_only_if_the_interval_lies_above_the_baseline(
    told, pipeline
):
    for notebook in (told / "Analysis.ipynb", pipeline[0] / "Analysis.ipynb"):
        low, baseline, better = verdict(notebook)
        assert better == (low > baseline), notebook
        assert ("these images do not show that it is" in said_in(notebook)) != better


@pytest.mark.timeout(900)
def test_the_analysis_draws_the_cost_on_training_and_test_images(told):
    drawn = described(told / "Analysis.ipynb")
    assert "Cost on all training and on all test images, 40 epochs" in drawn


@pytest.mark.timeout(900)
def test_the_analysis_compares_the_settings_of_today_and_of_2018(told, pipeline):
    said = said_in(told / "Analysis.ipynb")
    for name in ("parameters.json", "parameters-2018.json"):
        row = rf"\| `{name}` \| 12 \| \*\*[\d.]+%\*\* \(\d+% to \d+%\)((?: \| \d+){{4}}) \|"
        counts = re.findall(r"\d+", re.search(row, said)[1])
        assert sum(map(int, counts)) == 50, "TP, FN, FP and TN are all of the test images"
    assert re.search(r"\d+ of 50 test images only the settings of today get right,", said)
    assert "Cost on all training and on all test images" in described(told / "Analysis.ipynb")
    assert any(
        text.startswith("Where they differ most")
        for text in described(told / "Analysis.ipynb")
    )


def test_sensitivity_and_auc_are_explained_before_they_are_met():
    cells = nbformat.read(default_notebooks() / "Analysis.ipynb", 4).cells
    for term, met in [("**Sensitivity**", "def measure"), ("the **AUC**", "answers.roc(")]:
        explained = next(i for i, cell in enumerate(cells) if term in cell.source)
        shown = next(i for i, cell in enumerate(cells) if met in cell.source)
        assert cells[explained].cell_type == "markdown" and explained == shown - 1, term


@pytest.mark.parametrize("name", STORIES)
def test_no_cell_of_a_story_is_mostly_plumbing(name):
    for cell in cells_of(name, "code"):
        assert len(cell.source.splitlines()) <= 55, cell.source


def check_granularity(out: Path, said: str, granularity: str) -> None:
    "A Codebook of two epochs has run at this granularity, and has counted its invocations rightly."
    plan = read_record(out).plan
    count = invocations_per_epoch(plan)
    assert plan.parameters.granularity == granularity
    assert f"1 upload + 2 epochs · {count} invocations = {1 + 2 * count:,}" in said


def test_the_codebook_runs_with_a_single_mini_batch_and_a_single_epoch(
    small_datasets, tmp_path
):
    data.write(small_datasets(train=30), tmp_path / "datasets.h5")
    check_outputs(
        run_notebook(
            default_notebooks() / "Codebook.ipynb",
            tmp_path / "Codebook.ipynb",
            {"data": str(tmp_path / "datasets.h5"), "epochs": 1},
        )
    )


@pytest.mark.timeout(600)
def test_the_stories_run_with_photographs(real_data, tmp_path):
    given = {"data": str(real_data), "epochs": 4}
    unseen = [
        path
        for name in ("grumpy_cat.jpeg", "gargouille.jpeg")
        if (path := PHOTOGRAPHS / name).is_file()
    ]
    (tmp_path / "unseen").mkdir()
    for path in unseen:
        shutil.copy(path, tmp_path / "unseen")
    for name in STORIES:
        more = (
            {"unseen": str(tmp_path / "unseen"), "compared": 4} if name == "Analysis" else {}
        )
        ran = run_notebook(
            default_notebooks() / f"{name}.ipynb",
            tmp_path / f"{name}.ipynb",
            given | more,
            longest=LONGEST,
        )
        check_outputs(ran)
    for path in unseen:
        assert re.search(rf"\| {path.stem} \| (non-)?cat \| [\d.]+% \|", said_in(ran)), (
            path.name
        )


def test_the_analysis_refuses_data_of_another_run(run_folder, small_datasets, tmp_path):
    data.write(small_datasets(seed=5), tmp_path / "other.h5")
    with pytest.raises(NotebookFailed, match="this is not the data of run"):
        run_notebook(
            default_notebooks() / "Analysis.ipynb",
            tmp_path / "Analysis.ipynb",
            {"results": str(run_folder), "data": str(tmp_path / "other.h5")},
        )


@pytest.mark.timeout(300)
def test_a_story_runs_by_papermill_itself_from_another_folder(
    run_folder, small_data, tmp_path
):
    story, ran = default_notebooks() / "Analysis.ipynb", tmp_path / "Analysis.ipynb"
    given = {"results": run_folder, "data": small_data, "compared": 3}
    options = [part for name, value in given.items() for part in ("-p", name, str(value))]
    command = [sys.executable, "-P", "-m", "papermill", story, ran, "--kernel", "python3"]
    subprocess.run([*command, *options], cwd=tmp_path, check=True, capture_output=True)
    check_outputs(ran)
    assert "only the settings of today get right," in said_in(ran)
    assert [path.name for path in tmp_path.iterdir()] == ["Analysis.ipynb"]


def test_a_cell_that_takes_for_ever_is_given_up(tmp_path):
    nbformat.write(
        nbformat.v4.new_notebook(
            cells=[nbformat.v4.new_code_cell("import time; time.sleep(60)")]
        ),
        tmp_path / "Slow.ipynb",
    )
    with pytest.raises(NotebookFailed, match="Slow.ipynb stopped: a cell took more than 1 s"):
        run_notebook(tmp_path / "Slow.ipynb", tmp_path / "out.ipynb", {}, longest=1)


@pytest.mark.timeout(600)
def test_introduction_and_codebook_look_at_the_data_of_a_bucket(
    cloud, small_data, tmp_path, monkeypatch
):
    "The Codebook with a NeuronLambda for the whole network."
    for name, value in cloud.environment.items():
        monkeypatch.setenv(name, value)
    cloud.aws.client("s3").create_bucket(Bucket="stack")  # nobody listens to this one
    Bucket(cloud.aws.client("s3"), "stack").put(
        "training_input/datasets.h5", small_data.read_bytes()
    )
    for name, said in [
        ("Introduction", "8 · 8 · 3 = 192 numbers per picture"),
        ("Codebook", "167 images, 3 mini-batches"),
    ]:
        if name == "Codebook":
            monkeypatch.delenv(
                "SNN_REDIS_URL"
            )  # its queue has workers here; the Introduction leaves a stack's server alone in any case
        more = (
            {"granularity": "network", "out": str(tmp_path / "out")}
            if name == "Codebook"
            else {}
        )
        ran = run_notebook(
            default_notebooks() / f"{name}.ipynb",
            tmp_path / f"{name}.ipynb",
            {"bucket": "stack", "region": "us-east-1", "epochs": 2} | more,
            longest=LONGEST,
        )
        check_outputs(ran)
        assert said in said_in(ran)
    check_granularity(tmp_path / "out", said_in(ran), "network")


def test_bin_lab_opens_the_introduction(root, until, tmp_path):
    jupyter = Path(sys.executable).with_name("jupyter")
    if not jupyter.exists():
        pytest.skip("JupyterLab is not installed: pip install 'snn[notebooks]'")
    for folder in ("bin", ".venv/bin", "nbs"):
        (tmp_path / folder).mkdir(parents=True)
    shutil.copy(root / "bin" / "lab", tmp_path / "bin")
    shutil.copy(root / "nbs" / "Introduction.ipynb", tmp_path / "nbs")
    (tmp_path / "bin" / "venv").write_text(
        '#!/bin/sh\ntest "$1" = notebooks\n'
    )  # all is installed already
    (tmp_path / "bin" / "venv").chmod(0o755)
    (tmp_path / ".venv" / "bin" / "jupyter").symlink_to(jupyter)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    browser, opened, log = tmp_path / "browser", tmp_path / "opened", tmp_path / "log"
    browser.write_text(f'#!/bin/sh\necho "$1" > {opened}\n')
    browser.chmod(0o755)
    with log.open("w") as file:
        lab = subprocess.Popen(
            [
                tmp_path / "bin" / "lab",
                f"--port={port}",
                "--port-retries=0",
                "--IdentityProvider.token=",
            ],
            stdout=file,
            stderr=file,
            start_new_session=True,
            env={**os.environ, "BROWSER": f"{browser} %s"},
        )

    def answer(path):
        try:
            return (
                urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=5)
                .read()
                .decode()
            )
        except OSError:
            return ""

    try:
        address = until(
            lambda: opened.is_file() and opened.read_text().strip(),
            "JupyterLab opens a browser",
        )
        redirect = (
            Path(urllib.parse.urlparse(address).path).read_text()
            if address.startswith("file:")
            else address
        )
        assert f":{port}/lab/tree/Introduction.ipynb" in redirect, log.read_text()
        assert "JupyterLab" in answer(
            "/lab/tree/Introduction.ipynb"
        ) and "Introduction.ipynb" in answer("/api/contents/Introduction.ipynb?content=0")
    finally:
        lab.terminate()
        lab.wait(30)


# Replay


@pytest.fixture
def cloud_in_hand(monkeypatch):
    "A bucket and a parameter server, but nobody who takes messages."
    with local_aws() as aws, parameter_server() as server:
        for name, value in {**aws.environment(), "SNN_REDIS_URL": server.url}.items():
            monkeypatch.setenv(name, value)
        aws.client("s3").create_bucket(Bucket="hand")
        yield Services()


def run_until(services: Services, wanted) -> None:
    "Run messages one after the other until one is as wanted, which is not run."
    waiting = []
    while True:
        waiting += [
            msgspec.json.decode(envelope.event, type=Message)
            for envelope in services.bus.take("test", 0)
        ]
        message = waiting.pop(0)
        if wanted(message):
            return
        handle(message, services)
        services.store.flush()


@pytest.mark.parametrize("granularity", ["neuron", "layer"])
def test_a_replay_gives_the_numbers_of_the_invocation(
    cloud_in_hand, granularity, parameters, small_datasets, small_data
):
    services, chosen = (
        cloud_in_hand,
        parameters(
            (6, 4, 1), hidden="tanh", epochs=4, granularity=granularity, learning_rate=0.1
        ),
    )
    bucket = services.bucket("hand")
    bucket.put("input/parameters.json", msgspec.json.encode(chosen))
    bucket.put("input/datasets.h5", small_data.read_bytes())
    run = start(Upload("hand", "input/datasets.h5", ""), services)
    run_until(
        services, lambda message: message.function == "LaunchLambda" and message.epoch == 2
    )

    record, block = (
        Record(services.runs.plan(run), 3, services.runs.costs(run)),
        3 if granularity == "neuron" else 0,
    )
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


@pytest.mark.parametrize("granularity", ["neuron", "layer", "network"])
def test_a_replayed_event_is_the_one_that_was_sent(
    cloud_in_hand, granularity, parameters, small_datasets, small_data
):
    services, chosen = (
        cloud_in_hand,
        parameters((5, 3, 1), epochs=3, learning_rate=0.1, granularity=granularity),
    )
    bucket = services.bucket("hand")
    bucket.put("input/parameters.json", msgspec.json.encode(chosen))
    bucket.put("input/datasets.h5", small_data.read_bytes())
    run = start(Upload("hand", "input/datasets.h5", ""), services)
    sent = []
    run_until(
        services,
        lambda message: (
            sent.append(message) or message.function == "LaunchLambda" and message.epoch == 1
        ),
    )
    record = Record(services.runs.plan(run), 2, [])
    for direction, layer, number in [
        ("forward", 1, 4),
        ("forward", 3, 0),
        ("backward", 2, 2),
        ("backward", 1, 0),
    ]:
        found = replay(record, small_datasets(), 1, 2, layer, number, direction)
        same = [message for message in sent if message.id == found.message.id]
        assert len(same) == 1 and msgspec.structs.replace(same[0], learn=True) == found.message


@pytest.fixture(scope="module")
def run_folder(parameters, small_data, tmp_path_factory) -> Path:
    "A finished run with checkpoints."
    folder = tmp_path_factory.mktemp("run")
    train(
        parameters(
            (6, 4, 1),
            epochs=9,
            granularity="network",
            checkpoint_every=3,
            learning_rate=0.05,
            optimizer={"name": "momentum"},
            validation_fraction=0.1,
        ),
        small_data,
        folder,
    )
    return folder


def test_a_checkpoint_gives_the_weights_that_training_gives(run_folder, small_datasets):
    record = read_record(run_folder)
    assert sorted(record.checkpoints) == [2, 5] or sorted(record.checkpoints) == [2, 5, 8]
    whole = record._replace(checkpoints={})
    for epoch in (0, 3, 4, 7):
        one, other = (
            replay(each, small_datasets(), epoch, 1, 1, 2, "backward")
            for each in (record, whole)
        )
        assert (
            np.allclose(one.w, other.w, rtol=1e-9)
            and np.allclose(one.dw, other.dw, rtol=1e-6)
            and one.message == other.message
        )


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_the_explanation_has_the_numbers_in_it(run_folder, small_datasets, direction):
    found = replay(read_record(run_folder), small_datasets(), 4, 0, 2, 1, direction)
    text = explain(found)
    i = int(np.argmax(found.a > 0))
    for number in (
        (found.z[i], found.a[i])
        if direction == "forward"
        else (found.da[i], found.dz[i], np.abs(found.dw).max(), abs(found.db))
    ):
        assert f"{number:.6g}" in text
    assert max(map(len, text.splitlines())) <= 95, "what a terminal or a notebook shows"
    flat = " ".join(text.split())
    assert json.dumps(msgspec.to_builtins(found.message)) in flat, "no number is broken in two"
    assert json.loads(json.dumps(as_dict(found)))["neuron"] == 1


def test_a_run_is_found_by_its_name(run_folder, tmp_path):
    name = read_record(run_folder).plan.name
    for run, out in [
        (name, run_folder),
        (name, run_folder.parent),
        (f"{name}~2", run_folder),
        (str(run_folder), tmp_path),
        (str(run_folder / "run.json"), tmp_path),
    ]:
        assert find_record(run, out).plan.name == name
    with pytest.raises(InputError, match=f"no run of that name in .*which holds {name}"):
        find_record("another", run_folder)
    with pytest.raises(InputError, match="which holds no run"):
        find_record(name, tmp_path)


def test_replay_takes_the_name_of_a_run(snn, run_folder, small_data, cloud, monkeypatch):
    name, where = (
        read_record(run_folder).plan.name,
        ["--epoch", 4, "--batch", 1, "--layer", 2, "--neuron", 3],
    )
    code, said, _ = snn(
        "replay",
        name,
        *where,
        "--out",
        run_folder,
        "--data",
        small_data,
        "--direction",
        "backward",
    )
    assert code == 0 and f"NeuronLambda {name}/4/1/" in said and "dz = da · g'(z)" in said
    code, said, error = snn("replay", "another", *where, "--out", run_folder)
    assert (
        code == 2
        and error.startswith("another: no such folder, and no run of that name")
        and not said
    )
    for variable, value in cloud.environment.items():
        monkeypatch.setenv(variable, value)  # the bucket is looked for on this machine
    code, said, error = snn(
        "replay", name, *where, "--bucket", "no-such-bucket-of-ours", "--region", "mars"
    )
    assert (
        code == 2
        and error.startswith("s3://no-such-bucket-of-ours: ")
        and "Traceback" not in error
    )


def test_a_counterfactual_is_told_in_a_terminal(snn, run_folder, small_data, small_datasets):
    where = ("--epoch", 4, "--layer", 1, "--neuron", 2, "--data", small_data, "--image", 62)
    code, said, errors = snn("replay", run_folder, *where, "--set", "w14=3")
    assert code == 0, errors
    assert "Image 62," in said and "Its weights" in said and "(a counterfactual;" in said
    found = json.loads(snn("replay", run_folder, *where, "--set", "w14=3", "--json")[1])
    record = read_record(run_folder)
    X, Y = training_part(record, small_datasets())
    layers, _ = weights_before(record, X, Y, 4)
    layers[0][0][2, 14] = 3.0  # as somebody would do by hand
    parameters = record.plan.parameters
    X, mean = prepare(parameters, X)
    batch = list(epoch_batches(parameters, X, Y, 4, mean))[found["event"]["batch"]]
    A = activations(parameters, layers, batch.X, batch.masks)
    assert found["what_if"]["answers"][1] == A[-1][0].tolist()
    assert found["what_if"]["costs"][1] == cost(A[-1], batch.Y) != found["what_if"]["costs"][0]
    for words, sentence in (
        (("--set", "w999=0"), "has the weights 0 to 191"),
        (("--set", "c=1"), "it looks like w14=0"),
        (("--batch", 99), "batch is 99"),
    ):
        code, _, errors = snn("replay", run_folder, *where, *words)
        assert code == 2 and sentence in " ".join(errors.split())


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"epoch": 9}, "epoch is 9"),
        ({"epoch": -1}, "epoch is -1"),
        ({"batch": 3}, "batch is 3"),
        ({"layer": 0}, "layer is 0"),
        ({"layer": 4}, "layer is 4"),
        ({"neuron": 6}, "neuron is 6"),
        ({"direction": "up"}, "forward or backward"),
    ],
)
def test_an_invocation_that_never_was_is_refused(run_folder, small_datasets, changes, said):
    with pytest.raises(InputError, match=said):
        replay(
            read_record(run_folder),
            small_datasets(),
            **{
                "epoch": 0,
                "batch": 0,
                "layer": 1,
                "neuron": 0,
                "direction": "forward",
                **changes,
            },
        )


def test_other_data_is_refused(run_folder, small_datasets):
    for other in (small_datasets(seed=1), small_datasets(train=100), small_datasets(size=9)):
        with pytest.raises(InputError, match="trained on|not the data"):
            replay(read_record(run_folder), other, 0, 0, 1, 0, "forward")


def test_a_record_that_is_not_there_or_broken_is_refused(tmp_path):
    with pytest.raises(InputError, match="no run here"):
        read_record(tmp_path)
    (tmp_path / "run.json").write_text('{"plan": 3}')
    with pytest.raises(InputError, match="damaged"):
        read_record(tmp_path)


# Pipeline


@pytest.fixture(scope="module")
def pipeline(parameters, small_data, tmp_path_factory):
    "A whole pipeline on images of 8x8 pixels: its folder and its news."
    out, news = tmp_path_factory.mktemp("pipeline") / "out", []
    run_pipeline(
        Request(
            parameters(epochs=5, granularity="network"),
            out,
            default_notebooks(),
            small_data,
            codebook_epochs=2,
        ),
        news.append,
    )
    return out, news


@pytest.mark.timeout(600)
def test_a_pipeline_leaves_notebooks_model_and_report(pipeline):
    out, news = pipeline
    assert [event.stage for event in news if event.seconds is not None] == [
        "data",
        "Codebook",
        "training",
        "Analysis",
        "report",
    ]
    for name in (
        "Codebook.ipynb",
        "Analysis.ipynb",
        "report.html",
        "codebook/params.h5",
        "training/params.h5",
        "training/results.json",
    ):
        assert (out / name).is_file(), name
    for name in ("Codebook", "Analysis"):
        check_outputs(out / f"{name}.ipynb")
    assert any(event.training for event in news)


@pytest.mark.timeout(600)
def test_the_report_needs_nothing_from_elsewhere_and_describes_its_pictures(pipeline):
    page = (pipeline[0] / "report.html").read_text()
    assert not re.search(r"<script|<link[^>]+href=.http|src=.http|@import", page)
    assert "Traceback" not in page and "jp-OutputArea-error" not in re.sub(
        r"<style.*?</style>", "", page, flags=re.DOTALL
    )
    pictures = re.findall(r"<img\b[^>]*>", page)
    assert len(pictures) >= 10 and all(
        re.search(r'alt="[^"]+', picture) and "No description" not in picture
        for picture in pictures
    )
    links = re.findall(r'<a href="#([^"]+)">', page)
    assert "Codebook" in links and "Analysis" in links and "1-The-training" in links
    assert all(
        f'id="{urllib.parse.unquote(link)}"' in urllib.parse.unquote(page) for link in links
    )


@pytest.mark.timeout(600)
@pytest.mark.parametrize("width", [1280, 700])
def test_the_report_as_a_browser_draws_it(pipeline, width, tmp_path):
    sync_api = pytest.importorskip(
        "playwright.sync_api", reason="playwright is not installed: pip install 'snn[test]'"
    )
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if not chromium:
        pytest.skip("Chromium is not installed: apt-get install chromium")
    said, asked = [], []
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": width, "height": 1000})
        page.on("console", lambda message: said.append(message.text))
        page.on("request", lambda request: asked.append(request.url))
        page.goto((pipeline[0] / "report.html").as_uri())
        assert page.evaluate("document.documentElement.scrollWidth") <= width, (
            "it can be read without scrolling sideways"
        )
        assert page.evaluate("[...document.images].every(image => image.naturalWidth > 0)")
        cut = page.evaluate("""[...document.querySelectorAll('pre, table, img, h1, h2, h3, p')]
            .filter(part => part.getBoundingClientRect().width && (part.scrollWidth > part.clientWidth + 2 && part.tagName != 'TABLE' || part.getBoundingClientRect().right > innerWidth))
            .map(part => part.tagName + ': ' + part.textContent.slice(0, 60))""")
        SCREENS.mkdir(parents=True, exist_ok=True)
        page.screenshot(path=SCREENS / f"report-{width}.png", full_page=True)
        text = page.inner_text("body")
        browser.close()
    assert cut == [] and said == []
    assert all(url.startswith(("file:", "data:")) for url in asked), "nothing is fetched"
    assert not re.search(r"Traceback|Warning:|<IPython|\bFigure\(|Sheet size|\[0m", text)


@pytest.mark.timeout(600)
def test_a_stage_that_fails_is_named_and_what_was_made_is_kept(
    pipeline, parameters, small_data, tmp_path
):
    notebooks = tmp_path / "notebooks"
    notebooks.mkdir()
    cells = lambda *sources: nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_code_cell(source) for source in sources]
    )
    nbformat.write(cells("print('fine')"), notebooks / "Codebook.ipynb")
    nbformat.write(cells("x = {}", "x['the key']"), notebooks / "Analysis.ipynb")
    out = tmp_path / "out"
    with pytest.raises(StageFailed) as failed:
        run_pipeline(
            Request(
                parameters((3, 1), epochs=2, granularity="network"), out, notebooks, small_data
            )
        )
    said = str(failed.value)
    assert (
        "stage Analysis failed" in said
        and "KeyError" in said
        and "the key" in said
        and "data, Codebook, training" in said
    )
    assert (
        (out / "Codebook.ipynb").is_file()
        and (out / "training" / "params.h5").is_file()
        and not (out / "report.html").exists()
    )


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"notebooks": Path("nowhere")}, "has no Codebook.ipynb"),
        ({"datasets": Path("nowhere.h5")}, "no such file"),
        ({"unseen": Path("nowhere")}, "no such folder"),
        ({"codebook_epochs": 0}, "1 or more"),
        ({"out": Path(__file__)}, "is a file"),
    ],
)
def test_what_is_wrong_is_found_before_the_first_stage(
    parameters, small_data, tmp_path, changes, said
):
    news = []
    with pytest.raises(InputError, match=said):
        run_pipeline(
            Request(parameters(), tmp_path / "out", default_notebooks(), small_data)._replace(
                **changes
            ),
            news.append,
        )
    assert news == [] and not (tmp_path / "out").exists()


def test_a_run_that_fails_in_the_cloud_ends_the_waiting_and_can_be_looked_into(
    cloud, parameters, small_datasets, small_data, tmp_path, snn, monkeypatch
):
    wild = parameters((5, 1), epochs=50, granularity="layer", learning_rate=1e308)
    with pytest.raises(
        RuntimeError,
        match=r"Run \w+ failed after \d+ epochs: .*infinite or not a number.*snn resume \w+ --bucket",
    ) as failed:
        train_in_cloud(
            wild, small_data, tmp_path / "fetched", cloud.bucket, every=0.1, soon=60
        )
    assert not (tmp_path / "fetched").exists()

    run = re.search(r"Run (\w+)", str(failed.value)).group(1)
    record = record_in_bucket(cloud.bucket, run)
    last = record.epochs - 1  # the one in which it failed
    found = replay_on(
        record, *images_in_bucket(record, cloud.bucket), last, 0, 1, 0, "backward"
    )
    assert found.message.id.startswith(f"{run}/{last}/0/NeuronLambda/backward")

    for name, value in cloud.environment.items():
        monkeypatch.setenv(name, value)
    code, said, _ = snn(
        "replay",
        run,
        "--epoch",
        0,
        "--batch",
        0,
        "--layer",
        1,
        "--neuron",
        2,
        "--bucket",
        cloud.bucket_name,
        "--region",
        "us-east-1",
    )
    assert code == 0 and f"NeuronLambda {run}/0/0/NeuronLambda/forward/1/0" in said
    code, said, error = snn(
        "replay",
        "another",
        "--epoch",
        0,
        "--batch",
        0,
        "--layer",
        1,
        "--neuron",
        2,
        "--bucket",
        cloud.bucket_name,
        "--region",
        "us-east-1",
    )
    assert code == 2 and "no run another has ended here" in error and run in error


def test_a_run_that_never_begins_is_not_waited_for(parameters, small_data, tmp_path):
    with local_aws() as aws:
        aws.client("s3").create_bucket(Bucket="quiet")
        with pytest.raises(
            RuntimeError, match="started no run within 0.2 s. Does a stack listen"
        ):
            train_in_cloud(
                parameters(),
                small_data,
                tmp_path,
                Bucket(aws.client("s3"), "quiet"),
                every=0.05,
                soon=0.2,
            )


def test_a_bucket_that_is_not_there_is_found_before_the_first_stage(
    cloud, parameters, small_data, tmp_path, monkeypatch
):
    for name, value in cloud.environment.items():
        monkeypatch.setenv(name, value)
    news = []
    with pytest.raises(InputError, match="s3://nowhere: there is no such bucket"):
        run_pipeline(
            Request(
                parameters(),
                tmp_path / "out",
                default_notebooks(),
                small_data,
                bucket="nowhere",
                region="us-east-1",
            ),
            news.append,
        )
    assert news == []


@pytest.mark.timeout(600)
def test_the_analysis_reads_a_bucket_and_takes_pictures_of_every_kind(
    cloud, parameters, small_data, tmp_path, monkeypatch
):
    for name, value in cloud.environment.items():
        monkeypatch.setenv(name, value)
    chosen = parameters(epochs=3, granularity="network", checkpoint_every=1)
    train_in_cloud(chosen, small_data, tmp_path / "fetched", cloud.bucket, every=0.1)
    assert (tmp_path / "fetched" / "run.json").is_file() and sorted(
        read_record(tmp_path / "fetched").checkpoints
    ) == [0, 1]
    found = replay(
        read_record(tmp_path / "fetched"), data.read(small_data), 2, 1, 2, 3, "backward"
    )
    there = record_in_bucket(cloud.bucket, found.plan.run)
    assert as_dict(
        replay_on(there, *images_in_bucket(there, cloud.bucket), 2, 1, 2, 3, "backward")
    ) == as_dict(found)

    unseen = tmp_path / "unseen"
    unseen.mkdir()
    picture = Image.fromarray(
        np.random.default_rng(0).integers(0, 256, (90, 140, 3), dtype=np.uint8)
    )
    for kind, name in [
        ("L", "grey.png"),
        ("RGBA", "rgba.png"),
        ("CMYK", "cmyk.jpeg"),
        ("P", "palette.gif"),
        ("1", "ink.png"),
    ]:
        picture.convert(kind).save(unseen / name)
    (unseen / "broken.jpeg").write_bytes(b"not a picture")
    for name, size in [("upright.jpeg", (300, 400)), ("wide.jpeg", (900, 200))]:
        picture.resize(size).save(unseen / name)
    ran = run_notebook(
        default_notebooks() / "Analysis.ipynb",
        tmp_path / "Analysis.ipynb",
        {
            "bucket": cloud.bucket_name,
            "region": "us-east-1",
            "unseen": str(unseen),
            "compared": 0,
        },
    )
    check_outputs(ran)
    said = said_in(ran)
    assert "broken.jpeg: not an image" in said
    assert "all 3 epochs are done" in said and "of all test sets of 42" in said, (
        "the data is the run's own, out of the bucket"
    )
    for path in unseen.iterdir():
        if path.stem != "broken":
            assert re.search(rf"\| {path.stem} \| (non-)?cat \| [\d.]+% \|", said), path.name


@pytest.mark.timeout(600)
def test_the_codebook_runs_layer_by_layer_in_a_bucket_that_is_there(
    cloud, small_data, tmp_path, monkeypatch
):
    for name, value in cloud.environment.items():
        if name != "SNN_REDIS_URL":
            monkeypatch.setenv(name, value)
    before = set(cloud.services.runs.names())
    ran = run_notebook(
        default_notebooks() / "Codebook.ipynb",
        tmp_path / "Codebook.ipynb",
        {
            "bucket": cloud.bucket_name,
            "region": "us-east-1",
            "data": str(small_data),
            "epochs": 2,
            "granularity": "layer",
            "out": str(tmp_path / "out"),
        },
    )
    check_outputs(ran)
    check_granularity(tmp_path / "out", said_in(ran), "layer")
    assert "prediction_input/params.h5" in cloud.bucket.keys("prediction_input/")
    assert set(cloud.services.runs.names()) == before, (
        "the stack must not start a run of its own"
    )
