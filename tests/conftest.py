"""What several tests use: parameters, data sets of a few pixels, a cloud, and the `snn` command."""

import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest

# Before NumPy computes anything, and inherited by all that the tests start.
os.environ["OPENBLAS_NUM_THREADS"] = "1"
# As in a terminal, also where the tests were started with nohup: what they start inherits that a signal is ignored.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # or in the background of a script
    signal.signal(signal.SIGINT, signal.default_int_handler)
# The tests bring their own servers and settings.
for name in ("AWS_ENDPOINT_URL", "AWS_PROFILE", "SNN_REDIS_URL", "SNN_PARAMETERS"):
    os.environ.pop(name, None)
# As bin/test does: where containers set it, each of a thousand processes would compile all that it imports.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

# No test asks the real AWS, least of all with the keys of whoever runs it.
os.environ |= {
    "AWS_ACCESS_KEY_ID": "nobody",
    "AWS_SECRET_ACCESS_KEY": "nothing",
    "AWS_EC2_METADATA_DISABLED": "true",
    "AWS_CONFIG_FILE": os.devnull,
    "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
}
os.environ.pop("AWS_SESSION_TOKEN", None)

# jsonschema would first build a grammar of web addresses, for a second in each of the processes that
# collect tests: no test has any to check.
sys.modules["rfc3987_syntax"] = None

import h5py
import hypothesis
import msgspec

from snn.cloud.messages import Upload
from snn.data import h5 as data
from snn.handlers.upload import run_id
from snn.local.cloud import LocalCloud
from snn.maths.parameters import Parameters, from_dict

# Chance is seeded, and a slow machine fails no property. `pytest --hypothesis-seed N` throws other dice.
hypothesis.settings.register_profile(
    "seeded", max_examples=50, deadline=None, derandomize=True, print_blob=True
)
hypothesis.settings.load_profile("seeded")

ROOT = Path(__file__).resolve().parent.parent
REAL = (
    ROOT.parent / "shared" / "data" / "datasets.h5"
)  # photographs that are not ours to publish


HERE = {"localhost", "localhost.", "", "0.0.0.0", "::", "::1"}


def stay_here(event: str, arguments: tuple) -> None:
    "An audit hook: a test that leaves this machine fails."
    if event not in ("socket.connect", "socket.getaddrinfo"):
        return
    address = arguments[1] if event == "socket.connect" else arguments
    if not isinstance(address, tuple):
        return  # a Unix socket
    host = address[0].decode() if isinstance(address[0], bytes) else address[0]
    if host is None or host in HERE or host.removeprefix("::ffff:").startswith("127."):
        return
    raise ConnectionRefusedError(f"a test wanted to leave this machine: {event} to {host}")


sys.addaudithook(stay_here)


@pytest.fixture(scope="session")
def root() -> Path:
    "The repository."
    return ROOT


@pytest.fixture(scope="session")
def until():
    "Waits for something to become true, but not for ever; `what` is words, or says them at the end."

    def wait(condition, what, seconds: float = 60):
        deadline = time.monotonic() + seconds
        while not (value := condition()):
            if time.monotonic() > deadline:
                said = what() if callable(what) else what
                pytest.fail(f"after {seconds:g} s still not so: {said}")
            time.sleep(0.02)
        return value

    return wait


@pytest.fixture(scope="session")
def parameters():
    "Makes parameters: the original's network and rule, with changes."

    def make(sizes=(20, 7, 5, 1), hidden="relu", **changes) -> Parameters:
        layers = [f"layer{l}" for l in range(1, len(sizes) + 1)]
        kinds = [*[hidden] * (len(sizes) - 1), "sigmoid"]
        values = dict(
            epochs=2,
            layers=len(sizes),
            neurons=dict(zip(layers, sizes)),
            activations=dict(zip(layers, kinds)),
            learning_rate=0.0075,
            batch_size=64,
            threshold=0,
        )
        return from_dict({**values, **changes})

    return make


@pytest.fixture(scope="session")
def small_datasets():
    "Makes data sets of noise in which the cats are a little brighter."

    def make(size=8, train=167, test=42, seed=0) -> data.Datasets:
        rng = np.random.default_rng(seed)
        labels = [np.arange(m) % 3 // 2 for m in (train, test)]
        images = [
            np.clip(
                rng.normal(110 + 40 * y[:, None, None, None], 50, (len(y), size, size, 3)),
                0,
                255,
            ).astype(np.uint8)
            for y in labels
        ]
        return data.Datasets(images[0], labels[0], images[1], labels[1])

    return make


@pytest.fixture(scope="session")
def small_data(small_datasets, tmp_path_factory) -> Path:
    "A datasets.h5 of 167 and 42 images of 8x8 pixels."
    path = tmp_path_factory.mktemp("small") / "datasets.h5"
    data.write(small_datasets(), path)
    return path


@pytest.fixture(scope="session")
def drawn_data() -> Path:
    "The data set that the project draws."
    from snn.local.training import drawn_datasets

    return drawn_datasets()


@pytest.fixture(scope="session")
def real_data() -> Path:
    "Photographs, where a developer has them."
    if not REAL.is_file():
        pytest.skip("no photographs at ../shared/data/datasets.h5")
    return REAL


@pytest.fixture(scope="module")
def cloud():
    "A cloud on this machine, for all tests of a file."
    with LocalCloud() as opened:
        yield opened


@pytest.fixture(scope="session")
def start_run():
    "Puts parameters and data into a folder of training_input/, as anybody could; returns the run that must follow."

    def start(cloud: LocalCloud, folder: str, chosen: Parameters, datasets: Path) -> str:
        cloud.bucket.put(
            f"training_input/{folder}/parameters.json", msgspec.json.encode(chosen)
        )
        key = f"training_input/{folder}/datasets.h5"
        answer = cloud.bucket.client.put_object(
            Bucket=cloud.bucket_name, Key=key, Body=datasets.read_bytes()
        )
        return run_id(Upload(cloud.bucket_name, key, answer["ETag"].strip('"')), chosen)

    return start


@pytest.fixture(scope="session")
def finished(until):
    "Waits for the end of a run; returns its plan."

    def wait(cloud: LocalCloud, run: str, seconds: float = 120):
        runs, bus = cloud.services.runs, cloud.services.bus
        ended = lambda: run in runs.names() and runs.status(run).state != "running"
        until(lambda: ended() or bus.dead(), f"run {run} has ended", seconds)
        status = runs.status(run)
        assert status.state == "finished", f"{status}, put aside: {bus.dead()}"
        return runs.plan(run)

    return wait


@pytest.fixture(scope="session")
def weights():
    "Reads a params.h5, from a path or from its bytes, into {name: array}."

    def read(source) -> dict[str, np.ndarray]:
        with h5py.File(BytesIO(source) if isinstance(source, bytes) else source, "r") as file:
            return {name: file[name][()] for name in sorted(file)}

    return read


@pytest.fixture(scope="session")
def weights_of(weights):
    "Reads the weights that a run has left in the bucket."
    return lambda cloud, run: weights(cloud.bucket.get(f"training_results/{run}/params.h5"))


@pytest.fixture
def snn(capfd, monkeypatch):
    "Runs the snn command in this process; returns exit code, standard output and standard error."
    from snn.cli.main import main

    def call(*arguments) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["snn", *map(str, arguments)])
        handlers = {
            number: signal.getsignal(number)
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        }
        capfd.readouterr()
        try:
            main()
            code = 0
        except SystemExit as end:
            code = end.code or 0
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        return code, *capfd.readouterr()

    return call


@pytest.fixture(scope="session")
def spawn():
    "Starts the snn command as a process in a session of its own, which Ctrl-C reaches even where the shell has it ignored."

    def start(*arguments, **options) -> subprocess.Popen:
        options = (
            dict(
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                start_new_session=True,
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
            )
            | options
        )
        return subprocess.Popen(
            [
                sys.executable,
                "-P",
                "-c",
                "from snn.cli.main import main; main()",
                *map(str, arguments),
            ],
            **options,
        )

    return start


@pytest.fixture(scope="session")
def run_snn(spawn):
    "Runs the snn command as a process; returns exit code, standard output and standard error."

    def run(*arguments, **options) -> tuple[int, str, str]:
        with spawn(*arguments, **options) as process:
            said = process.communicate(timeout=120)
        return process.returncode, *said

    return run


def shorten_pauses() -> None:
    "Shorten the pauses with which the tests poll tenfold, and leave those of the code that is tested."
    pause = time.sleep

    def short(seconds: float) -> None:
        own = sys._getframe(1).f_code.co_filename.startswith(str(ROOT / "tests"))
        pause(seconds / 10 if own and seconds <= 1 else seconds)

    time.sleep = short


if os.environ.get("SNN_TESTS_QUICK"):
    shorten_pauses()  # tests/anywhere quick


# Files that take longest, the longest first: a worker that begins one of them last keeps all others waiting.
LONGEST = (
    "test_stories.py",
    "test_notebooks.py",
    "test_speed_is_measured.py",
    "test_training.py",
    "deploy/test_residents.py",
    "faults/test_accidents.py",
    "faults/test_servers.py",
    "deploy/test_lambda_runtime.py",
    "test_cli.py",
    "deploy/test_stack.py",
    "test_strangers.py",
    "deploy/test_deploy_commands.py",
    "test_viz.py",
    "deploy/test_cluster.py",
    "test_strange_machines.py",
    "test_mails.py",
    "serve/test_image.py",
    "deploy/test_package.py",
    "deploy/test_gate.py",
    "test_bad_input.py",
    "test_original.py",
    "browser/test_page.py",
    "browser/test_live_page.py",
    "faults/test_schedules.py",
    "estimate/test_choice.py",
)


def pytest_xdist_auto_num_workers(config) -> int:
    "One more than there are processors: a test often waits for a server, a browser or a pause."
    processors = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    )
    return (processors or 1) + 1


def pytest_collection_modifyitems(items):
    "The longest files first; or files in random order, and the tests of each too (tests/anywhere shuffled)."
    groups = {}
    for item in items:
        groups.setdefault(item.path, []).append(item)
    if seed := os.environ.get("SNN_TESTS_SEED"):
        dice, files = random.Random(int(seed)), list(groups)
        dice.shuffle(files)
        for path in files:
            dice.shuffle(groups[path])
    else:
        rank = {ROOT / "tests" / name: number for number, name in enumerate(LONGEST)}
        files = sorted(groups, key=lambda path: rank.get(path, len(rank)))
    items[:] = [item for path in files for item in groups[path]]


# What brings tests that were skipped, by a word of the reason; a reason that has no word here says it itself.
BRINGS = {
    "no photographs": "put a datasets.h5 of photographs there",
    "no ../shared/data/": "put the photograph there",
    "no aws": "pipx install awscli",
    "PyTorch": ".venv/bin/pip install torch --index-url https://download.pytorch.org/whl/cpu",
    "scikit-learn": ".venv/bin/pip install scikit-learn",
    "no engine": ".venv/bin/pip install ray 'dask[distributed]' celery",
    "Chromium": "apt-get install chromium",
    "checkov": "pipx install checkov",
    "Python 3.13": "put a python3.13 on the PATH (uv python install 3.13)",
}


# Why a test may be skipped where none should be (bin/test --named-skips, as .ci/run does), by a word of the reason.
MAY_BE_SKIPPED = {
    "no photographs": "they are not ours to publish",
    "no ../shared/data/": "they are not ours to publish",
    "no aws": "Amazon's command line is not on PyPI as it is now; boto3 makes the same calls",
    "no PyTorch": "gigabytes, for a comparison that scikit-learn makes too",
    "no engine": "hundreds of megabytes, for a comparison",
    "python3.13": "another Python than the one that runs the tests",
    "no Python 3.13": "another Python than the one that runs the tests",
    "20 s for each kind with --faults": "long schedules, of which a slice runs",
    "rounds otherwise": "another processor's BLAS; hashes are written for two kinds",
    "no mount namespace": "a container may forbid it",
    "only Linux": "another system",
    "/proc": "another system",
}


def reason_of(report) -> str:
    "Why a test or a file was skipped."
    said = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    return said.removeprefix("Skipped: ")


def skipped(config) -> Counter:
    "How many tests were skipped, for each reason."
    reports = config.pluginmanager.get_plugin("terminalreporter").stats.get("skipped", [])
    return Counter(map(reason_of, reports))


def unnamed(config) -> list[str]:
    "Reasons that nobody has named, where that was asked for."
    named = lambda reason: any(word in reason for word in MAY_BE_SKIPPED)
    asked = config.getoption("--named-skips") and not hasattr(config, "workerinput")
    return [reason for reason in skipped(config) if not named(reason)] if asked else []


def pytest_sessionfinish(session, exitstatus):
    "A skip that nobody has named is a failure, where that was asked for."
    if exitstatus == 0 and unnamed(session.config):
        session.exitstatus = 1


def pytest_terminal_summary(terminalreporter):
    "What was skipped, a line for each reason, and how to get it."
    reasons = skipped(terminalreporter.config)
    terminalreporter.section("skipped, and how to get it")
    for reason, count in sorted(reasons.items()):
        how = next(
            (how for word, how in BRINGS.items() if word in reason and how not in reason), ""
        )
        line = (
            f"{count} test{'s' * (count > 1)}: {reason}{'; to get it: ' + how if how else ''}"
        )
        terminalreporter.write_line(line)
    for reason in unnamed(terminalreporter.config):
        terminalreporter.write_line(f"FAILED: nobody has named this reason to skip: {reason}")
    if not terminalreporter.config.getoption("--faults"):
        terminalreporter.write_line(
            "of the fault schedules a slice; to get all: bin/test --faults"
        )
    if not terminalreporter.config.getoption("--fresh"):
        terminalreporter.write_line("no fresh clones; to get them: bin/test --fresh")


def pytest_addoption(parser):
    parser.addoption(
        "--faults",
        action="store_true",
        help="run all fault schedules, not only a slice of them",
    )
    parser.addoption(
        "--fuzz",
        type=float,
        default=0,
        help="seconds for which files of each kind are changed by chance and tried; -s shows figures",
    )
    parser.addoption(
        "--fresh",
        action="store_true",
        help="make clones and environments, and use them in strange places",
    )
    parser.addoption(
        "--named-skips",
        action="store_true",
        help="fail if a test is skipped for a reason that tests/conftest.py does not name",
    )


def pytest_ignore_collect(collection_path, config):
    "The fresh clones take minutes: only by name or option."
    named = any("fresh" in argument for argument in config.invocation_params.args)
    if collection_path.name == "fresh" and not named:
        return True


@pytest.fixture(scope="session")
def all_faults(request) -> bool:
    "Were all fault schedules asked for?"
    return request.config.getoption("--faults")
