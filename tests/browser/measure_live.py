"""How much the microscope slows a training down, and how soon it answers a click: `measure_live.py --help`.

    .venv/bin/python tests/browser/measure_live.py watch     # alone and watched, in turns
    .venv/bin/python tests/browser/measure_live.py click     # from a click to the drawn numbers

The shipped network learns the drawn pictures, neuron by neuron, on this machine. `watch` trains the
same epochs alone, watched by the page's server for a listener, and with the page open in Chromium; it
prints the median of the ratios of neighbours, and their quartiles, of seconds and of what the
processors had to do. `click` clicks one neuron after the other as a person does, who keeps the button
down for 80 ms, during a run and while sliding through a run that has ended; a click is answered when
the neuron's numbers, forward and backward, are painted. On a busy machine all of it takes longer.
"""

import argparse
import os
import random
import shutil
import socket
import statistics
import tempfile
import time
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Thread
from typing import NamedTuple
from urllib.request import urlopen

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # as the `snn` command does

import msgspec
from playwright.sync_api import sync_playwright

from snn.backends.local.services import Services
from snn.data import h5
from snn.handlers.upload import run_id
from snn.live.host import hosted, stage_on
from snn.live.watching import Onlooker
from snn.live.widget import stage_of
from snn.local import training
from snn.local.cloud import LocalCloud
from snn.maths.parameters import read
from snn.replay.record import Record

ROOT = Path(__file__).resolve().parents[2]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
GOAL = 200  # milliseconds from a click to its numbers
HOW = ("alone", "watched", "page")  # the page is a real one, in Chromium
LISTEN = """() => {
  window.answered = new Promise((done) => {
    addEventListener("pointerup", ({ target, timeStamp }) => {
      const [layer, neuron] = target.closest("[data-node]").dataset.node.split("/");
      const look = () => {
        const panel = document.querySelector('[aria-label="the chosen neuron"]');
        const told = panel.innerText;
        const all = told.includes(`Neuron ${neuron} of layer ${layer}`) && told.includes("its gradient reaches");
        if (all) requestAnimationFrame(() => setTimeout(() => done(performance.now() - timeStamp)));
        else requestAnimationFrame(look);
      };
      look();
    }, { capture: true, once: true });
  });
}"""


def parameters_of(turn: int, epochs: int):
    "The shipped parameters; the threshold only makes each run another one."
    shipped = read(ROOT / "parameters.json")
    return msgspec.structs.replace(shipped, epochs=epochs, threshold=turn * 1e-12)


def begin(cloud: LocalCloud, parameters, data: Path) -> str:
    "Upload; returns the run's name."
    return run_id(cloud.upload(parameters, data), parameters)


def shown_run(cloud: LocalCloud, run: str, parameters, datasets):
    "A stage as `snn train --live` makes it."
    own = lambda: Services(cloud.workers.environment)
    onlooker = Onlooker(run, cloud.workers.pace, own())
    return stage_on(run, own(), parameters, datasets, onlooker)


@contextmanager
def shown_page(browser, stage):
    "The stage's page in a real browser."
    with hosted(stage, socket.create_server(("127.0.0.1", 0))) as address:
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.set_default_timeout(60_000)
        page.goto(address)
        page.wait_for_selector("main.live h1")
        try:
            yield page
        finally:
            page.close()


def processor_seconds() -> float:
    "What this program and all that it has started have used so far."
    found = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it has ended
            fields = path.read_text().rpartition(")")[2].split()
            found[int(path.parent.name)] = int(fields[1]), int(fields[11]) + int(fields[12])
    ours = {os.getpid()}
    while more := {pid for pid, (parent, _) in found.items() if parent in ours} - ours:
        ours |= more
    return sum(found[pid][1] for pid in ours if pid in found) / os.sysconf("SC_CLK_TCK")


class Turn(NamedTuple):
    "One training, from when it is let go until its end."

    seconds: float
    used: float  # seconds of processors, by all processes


def measure_watch(turns: int, epochs: int, browser) -> dict[str, list[Turn]]:
    "All turns, by how they were looked at."
    data = training.drawn_datasets()
    datasets, found = h5.read(data), {how: [] for how in HOW}
    with LocalCloud() as cloud, tempfile.TemporaryDirectory() as mirror:
        for turn in range(turns + 1):
            for how in HOW if turn % 2 else reversed(HOW):
                parameters = parameters_of(len(HOW) * turn + HOW.index(how) + 1, epochs)
                run = held_run(cloud, parameters, data)
                with looked_at(how, cloud, run, parameters, datasets, browser):
                    measured = one_turn(cloud, run, Path(mirror))
                if turn:  # in the first, everything is still cold
                    found[how].append(measured)
            if turn:
                said = (f"{how} {found[how][-1].seconds:.2f} s" for how in HOW)
                print(f"turn {turn}:", *said, flush=True)
    return found


def held_run(cloud: LocalCloud, parameters, data: Path) -> str:
    "A run that has begun, and is held; returns its name."
    cloud.workers.pace.hold()
    run = begin(cloud, parameters, data)
    while not cloud.services.runs.knows(run):
        cloud.workers.pace.let_one(0.2)
    return run


@contextmanager
def looked_at(how: str, cloud: LocalCloud, run: str, parameters, datasets, browser):
    "Somebody looks at the run, or nobody."
    if how == "alone":
        yield
        return
    stage = shown_run(cloud, run, parameters, datasets)
    if how == "watched":
        with hosted(stage, socket.create_server(("127.0.0.1", 0))) as address:
            listen = lambda: list(urlopen(address.replace("/?", "/events?")))
            Thread(target=listen, daemon=True).start()  # until the page is closed
            yield
        return
    with shown_page(browser, stage) as page:
        page.wait_for_selector("[data-node]")
        page.wait_for_timeout(1000)  # it opens before the training, not in it
        yield


def one_turn(cloud: LocalCloud, run: str, mirror: Path) -> Turn:
    "Let the run go, and wait until it has ended."
    began, used = time.time(), processor_seconds()
    cloud.workers.pace.release()
    plan = training.watch(cloud, run, lambda progress: None, mirror)
    seconds = cloud.services.runs.status(plan.run).updated - began
    return Turn(seconds, processor_seconds() - used)


def clicks(page, stage, count: int, between=lambda: None) -> list[float]:
    "Milliseconds from a click to the drawn numbers."
    chance, found, last = random.Random(0), [], None
    sizes = stage.film.model.parameters.sizes
    nodes = [f"{layer}/{i}" for layer, n in enumerate(sizes, start=1) for i in range(n)]
    while len(found) < count and stage.watcher.state["state"] not in ("failed", "stopped"):
        last = chance.choice([node for node in nodes if node != last])
        between()
        page.evaluate(LISTEN)
        page.locator(f'[data-node="{last}"]').click(delay=80)
        found.append(page.evaluate("() => window.answered"))
    return found


def measure_clicks(count: int, browser) -> dict[str, list[float]]:
    "Milliseconds of each click, during a run and on one that has ended."
    data = training.drawn_datasets()
    datasets, parameters = h5.read(data), parameters_of(0, 100_000)
    with LocalCloud() as cloud:
        run = begin(cloud, parameters, data)
        stage = shown_run(cloud, run, parameters, datasets)
        with shown_page(browser, stage) as page:
            page.wait_for_function(
                "() => document.querySelector('main[data-state=running] [data-node]')"
            )
            found = {"during a run": clicks(page, stage, count)}
            plan = cloud.services.runs.plan(run)
            cloud.services.runs.stop(plan, "stopped", "measured")
    parameters = parameters_of(0, 60)
    plan = msgspec.structs.replace(plan, parameters=parameters)
    stage = stage_of(Record(plan, 60, []), datasets)
    stage.watcher.thread.join()
    chance = random.Random(1)
    with shown_page(browser, stage) as page:
        page.wait_for_selector("[data-node]")
        slide = lambda: page.get_by_label("epoch", exact=True).fill(str(chance.randrange(61)))
        found["sliding through a run that has ended"] = clicks(page, stage, count, slide)
    return found


def spread(values: list[float]) -> str:
    low, middle, high = statistics.quantiles(values, n=4)
    return f"median {middle:.3f}, quartiles {low:.3f} and {high:.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("watch", "click"))
    parser.add_argument(
        "--turns", type=int, default=12, help="of watch: trainings of each kind"
    )
    parser.add_argument("--epochs", type=int, default=40, help="of watch: of each training")
    parser.add_argument(
        "--clicks", type=int, default=40, help="of click: in each of both cases"
    )
    chosen = parser.parse_args()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        if chosen.what == "watch":
            found = measure_watch(chosen.turns, chosen.epochs, browser)
            for how in HOW[1:]:
                pairs = list(zip(found[how], found["alone"]))
                for name in Turn._fields:
                    ratios = [getattr(a, name) / getattr(b, name) for a, b in pairs]
                    print(f"{how} / alone, {name}: {spread(ratios)} of {len(pairs)} pairs")
        else:
            for where, times in measure_clicks(chosen.clicks, browser).items():
                slow = [f"{time:.0f}" for time in times if time > GOAL]
                middle, worst = statistics.median(times), max(times)
                print(
                    f"{where}: {len(times)} clicks, median {middle:.0f} ms, worst {worst:.0f} ms"
                )
                print(f"  above {GOAL} ms: {', '.join(slow) or 'none'}")
        browser.close()


if __name__ == "__main__":
    main()
