"""Chooses *Run All Cells* of each story in a real JupyterLab, again and again: `run_all.py --help`.

A run that stands still is told with all that is known of it: which cell, what the page shows,
what the server says of the kernel, and whether the kernel goes on when it is asked something.
`--control` runs a notebook of as many cells that only count, in which nothing is ours.
"""

import argparse
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import nbformat
from playwright.sync_api import Page, sync_playwright

ROOT = Path(__file__).resolve().parents[2]
STORIES = ("Introduction", "Codebook", "Analysis")
CELLS = """() => {
  const book = window.jupyterapp.shell.currentWidget.content;
  const cells = Array.from(book.model.cells).filter(
    cell => cell.type === 'code' && cell.sharedModel.getSource().trim());
  const failed = cell => Array.from({length: cell.outputs.length}, (_, i) => cell.outputs.get(i))
    .some(output => output.type === 'error');
  return cells.map(cell => [cell.executionCount, cell.executionState, failed(cell)]);
}"""
STATUS = "() => window.jupyterapp.shell.currentWidget.sessionContext.session?.kernel?.status"
CONNECTED = """() => {
  const kernel = window.jupyterapp?.shell?.currentWidget?.sessionContext?.session?.kernel;
  return kernel?.connectionStatus === 'connected' && kernel.status === 'idle';
}"""
ASK = """() => Promise.race([
  window.jupyterapp.shell.currentWidget.sessionContext.session.kernel
    .requestKernelInfo().then(() => 'answered'),
  new Promise(tell => setTimeout(() => tell('no answer in 20 s'), 20000))])"""
SHUT = "() => { window.jupyterapp.serviceManager.sessions.shutdownAll(); }"
NEVER = "jupyterlab.NeverCheckForUpdate"


def copied(folder: Path) -> Path:
    "The checkout's files, in a folder of their own."
    listed = subprocess.check_output(["git", "ls-files", "-z"], cwd=ROOT, text=True)
    for name in filter(None, listed.split("\0")):
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, target)
    for book in (folder / "nbs").glob("*.ipynb"):  # what was kept is no sign of a run
        read = nbformat.read(book, as_version=4)
        for cell in read.cells:
            if cell.cell_type == "code":
                cell.outputs, cell.execution_count = [], None
        nbformat.write(read, book)
    return folder


def control(path: Path, cells: int) -> None:
    "A notebook whose cells only count."
    code = [nbformat.v4.new_code_cell(f"{number} + 1") for number in range(cells)]
    book = nbformat.v4.new_notebook(cells=code)
    book.metadata.kernelspec = {"name": "python3", "display_name": "Python 3"}
    nbformat.write(book, path)


@contextmanager
def jupyterlab(folder: Path) -> Iterator[str]:
    "A JupyterLab over a folder; gives its address."
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ["--no-browser", "--allow-root", "--port-retries=0", "--IdentityProvider.token="]
    options += ["--LabApp.news_url=None", f"--LabApp.check_for_updates_class={NEVER}"]
    options += ["--LabApp.expose_app_in_browser=True", f"--port={port}"]
    with open(folder / "jupyterlab.log", "w") as log:
        process = subprocess.Popen(
            [Path(sys.executable).with_name("jupyter"), "lab", *options],
            cwd=folder,
            stdout=log,
            stderr=log,
            env={**os.environ, "JUPYTER_CONFIG_DIR": str(folder / "jupyter")},
        )
    try:
        while process.poll() is None:
            with socket.socket() as asked:
                if asked.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.1)
        else:
            sys.exit((folder / "jupyterlab.log").read_text())
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(60)


def ask_server(address: str, path: str):
    "What JupyterLab's server says."
    with urllib.request.urlopen(f"{address}/api/{path}", timeout=60) as answer:
        return json.load(answer)


def run_all(page: Page, address: str, book: str, patience: float) -> dict:
    "One *Run All Cells*, from a fresh kernel; what came of it."
    page.goto(f"{address}/lab/tree/nbs/{book}.ipynb?reset")
    page.wait_for_function(CONNECTED)
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
    begun = moved = time.monotonic()
    before = None
    while True:
        cells = page.evaluate(CELLS)
        now = time.monotonic()
        if any(failed for _, _, failed in cells):
            return {"end": "failed", "cells": cells, "seconds": now - begun}
        if all(count for count, _, _ in cells):
            return {"end": "whole", "seconds": now - begun}
        if cells != before:
            before, moved = cells, now
        if now - moved > patience:
            return {"end": "stands still", "seconds": now - begun} | looked_at(page, address)
        time.sleep(0.2)


def looked_at(page: Page, address: str) -> dict:
    "All that is known of a run that stands still."
    known = {
        "cells": page.evaluate(CELLS),
        "page": page.evaluate(STATUS),
        "server": ask_server(address, "kernels"),
    }
    known["asked"] = page.evaluate(ASK)
    return known | {"after it was asked": page.evaluate(CELLS)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("story", nargs="*", help=f"of {', '.join(STORIES)}; all by default")
    parser.add_argument("--times", type=int, default=30, help="how often each (default 30)")
    parser.add_argument("--control", action="store_true", help="cells that only count instead")
    parser.add_argument(
        "--patience",
        type=float,
        default=300,
        help="seconds without a cell's end until a run stands still (default 300)",
    )
    given = parser.parse_args()
    stories = given.story or STORIES
    ends: dict[str, int] = {}
    with tempfile.TemporaryDirectory() as temporary, sync_playwright() as playwright:
        folder = copied(Path(temporary))
        if given.control:
            stories = ["Control"]
            control(folder / "nbs" / "Control.ipynb", 60)
        chromium = shutil.which("chromium") or shutil.which("chromium-browser")
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        with jupyterlab(folder) as address:
            for turn in range(1, given.times + 1):
                for story in stories:
                    kept = (folder / "nbs" / f"{story}.ipynb").read_bytes()
                    page = browser.new_page(viewport={"width": 1280, "height": 900})
                    page.set_default_timeout(300_000)
                    found = run_all(page, address, story, given.patience)
                    if found["end"] != "whole":
                        page.screenshot(path=f"run-all-{story}-{turn}.png")
                        print(json.dumps(found), flush=True)
                    page.evaluate(SHUT)
                    while ask_server(address, "sessions"):
                        time.sleep(0.1)
                    page.close()
                    (folder / "nbs" / f"{story}.ipynb").write_bytes(kept)
                    name = f"{story}: {found['end']}"
                    ends[name] = ends.get(name, 0) + 1
                    print(f"{turn:3} {name}, {found['seconds']:.0f} s", flush=True)
        browser.close()
    print(json.dumps(ends))
    sys.exit(any("whole" not in name for name in ends))


if __name__ == "__main__":
    main()
