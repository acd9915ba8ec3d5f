"""Every chapter runs."""

import io
import multiprocessing
import os
import signal
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stderr
from pathlib import Path

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


def run(notebook: str) -> tuple[bool, str]:
    "Run a notebook in this process; True, or False and what it said."
    from nbdev.test import test_nb

    os.chdir(ROOT)
    signal.signal(signal.SIGALRM, give_up)
    signal.alarm(SECONDS)
    with redirect_stderr(io.StringIO()) as said:
        passed, _ = test_nb(ROOT / notebook, skip_flags=["notest"])
    return passed, said.getvalue()


@pytest.fixture(scope="module")
def running(request):
    "All notebooks that were asked for, each in a process of its own, two at a time; {notebook: future}."
    wanted = [
        item.callspec.params["notebook"]
        for item in request.session.items
        if item.originalname == "test_the_notebook_runs"
    ]
    context = multiprocessing.get_context(
        "forkserver"
    )  # imports nbdev once, not once per notebook
    context.set_forkserver_preload(["nbdev.test"])
    with ProcessPoolExecutor(2, context, max_tasks_per_child=1) as pool:
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
