"""Every chapter runs, and leaves the process as it found it."""

import io
import multiprocessing
import os
import signal
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stderr
from functools import partial
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted(
    str(path.relative_to(ROOT))
    for path in (ROOT / "nbs").rglob("*.ipynb")
    if ".ipynb_checkpoints" not in path.parts
)
ELSEWHERE = {
    "nbs/Benchmark.ipynb",  # test_speed_is_measured runs it in its quick mode
    *(f"nbs/{story}.ipynb" for story in ("Introduction", "Codebook", "Analysis")),
}  # test_stories runs them


SECONDS = 240  # that a notebook may take


def give_up(number, frame):
    raise TimeoutError(f"the notebook took more than {SECONDS} s")


def surroundings() -> dict[str, str]:
    "What the chapters of one process share: its environment and working folder."
    return {**os.environ, "IN_TEST": "1", "the working folder": os.getcwd()}


def changed(before: dict[str, str]) -> list[str]:
    "What a chapter has left otherwise than it found it: settings, and processes that run on."
    after = surroundings()
    names = {name for name in before | after if before.get(name) != after.get(name)}
    names = {name for name in names if not name.startswith("KMP_")}  # scikit-learn's, for good
    helpers = ("resource_tracker", "forkserver")  # of Python's own, for as long as the process
    children = [
        child
        for child in psutil.Process().children(recursive=True)
        if not any(helper in " ".join(child.cmdline()) for helper in helpers)
    ]
    _, alive = psutil.wait_procs(children, timeout=20)
    return [*sorted(names), *(str(process) for process in alive)]


def run(notebook: str) -> tuple[bool, str]:
    "Run a notebook in this process; True, or False and what it said, or has left changed."
    import nbdev.test
    from execnb.shell import CaptureShell

    # Nobody looks at the pictures on a fine screen.
    nbdev.test.CaptureShell = partial(CaptureShell, mpl_format="png")
    # The hook shows nothing; what it would format is formatted again for the cell's outputs.
    CaptureShell.displayhook_class.compute_format_data = lambda hook, result: ({}, {})
    os.chdir(ROOT)
    before = surroundings()
    signal.signal(signal.SIGALRM, give_up)
    signal.alarm(SECONDS)
    with redirect_stderr(io.StringIO()) as said:
        passed, _ = nbdev.test.test_nb(ROOT / notebook, skip_flags=["notest"])
    signal.alarm(0)
    left = changed(before)
    return passed and not left, f"{said.getvalue()}{left and f'It has left changed: {left}'}"


@pytest.fixture(scope="module")
def running(request):
    "All notebooks that were asked for, by two processes one after the other, as nbdev_test does; {notebook: future}."
    wanted = [
        item.callspec.params["notebook"]
        for item in request.session.items
        if item.originalname == "test_the_notebook_runs"
    ]
    with ProcessPoolExecutor(2, multiprocessing.get_context("forkserver")) as pool:
        yield {notebook: pool.submit(run, notebook) for notebook in wanted}


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "notebook", [pytest.param(name, id=name) for name in NOTEBOOKS if name not in ELSEWHERE]
)
def test_the_notebook_runs(notebook, running):
    passed, said = running[notebook].result()
    assert passed, said


def test_all_notebooks_that_are_run_elsewhere_exist():
    assert ELSEWHERE <= set(NOTEBOOKS)
