"The microscope below a cell of a real JupyterLab, which asks the kernel and no server of ours."

import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

sync_api = pytest.importorskip(
    "playwright.sync_api", reason="playwright is not installed: pip install 'snn[test]'"
)
pytest.importorskip("anywidget", reason="anywidget is not installed: pip install 'snn[test]'")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
if not CHROMIUM:
    pytest.skip("Chromium is not installed: apt-get install chromium", allow_module_level=True)
JUPYTER = Path(sys.executable).with_name("jupyter")
if not JUPYTER.exists():
    pytest.skip("JupyterLab is not installed: bin/venv test", allow_module_level=True)

from snn.local import training

SHOW = """from pathlib import Path
from snn.data import h5
from snn.live.widget import Live
Live(Path({out!r}), h5.read(Path({data!r})))"""


@pytest.fixture
def lab(parameters, small_data, tmp_path, until):
    "A JupyterLab with a notebook that shows a run: the notebook's address."
    chosen = parameters((5, 3, 1), epochs=20, granularity="network", learning_rate=0.1)
    training.train(chosen, small_data, tmp_path / "out")
    (tmp_path / "books").mkdir()
    cell = nbformat.v4.new_code_cell(
        SHOW.format(out=str(tmp_path / "out"), data=str(small_data))
    )
    book = nbformat.v4.new_notebook(cells=[cell])
    book.metadata.kernelspec = {"name": "python3", "display_name": "Python 3"}
    nbformat.write(book, tmp_path / "books" / "Show.ipynb")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ["--no-browser", "--allow-root", "--port-retries=0", "--IdentityProvider.token="]
    never = "jupyterlab.NeverCheckForUpdate"  # no news: a test stays on this machine
    options += ["--LabApp.news_url=None", f"--LabApp.check_for_updates_class={never}"]
    process = subprocess.Popen(
        [JUPYTER, "lab", *options, f"--port={port}", f"--notebook-dir={tmp_path / 'books'}"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "JUPYTER_CONFIG_DIR": str(tmp_path / "config")},
    )

    def answers() -> bool:
        with socket.socket() as asked:
            return asked.connect_ex(("127.0.0.1", port)) == 0

    try:
        until(answers, "JupyterLab answers")
        yield f"http://127.0.0.1:{port}/lab/tree/Show.ipynb"
    finally:
        process.terminate()
        process.wait(60)


def ran(page, address: str) -> bool:
    """Open the notebook and run its cell.

    Before JupyterLab is wholly connected it drops what it is told, and on a slow machine it may ask
    for a kernel instead: then the page is loaded again, as anybody would."""
    page.goto(address)
    number = page.locator(".jp-InputPrompt").get_by_text(re.compile(r"\[\d+\]"))
    try:
        page.wait_for_selector(
            ".jp-Notebook-ExecutionIndicator[data-status=idle]", timeout=60_000
        )
        page.locator(".jp-CodeCell .cm-content").first.click(timeout=10_000)
        page.keyboard.press("Control+Enter")
        number.wait_for(timeout=30_000)
    except sync_api.TimeoutError:
        print("JupyterLab says:", page.locator(".jp-Dialog").all_inner_texts())
        return False
    return True


@pytest.mark.timeout(600)
def test_a_neuron_is_clicked_and_silenced_at_any_epoch_below_a_cell(lab, until):
    from axe_playwright_python.sync_playwright import Axe

    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 1400})
        asked = []
        page.on("request", lambda sent: asked.append(sent.url))
        page.set_default_timeout(150_000)
        until(lambda: ran(page, lab), "the cell is run", 300)
        page.wait_for_selector('[data-state=finished] [data-node="2/1"]')
        page.locator('[data-node="2/1"]').click()
        panel = page.get_by_label("the chosen neuron")
        panel.get_by_text("Neuron 1 of layer 2").wait_for()
        panel.get_by_text("its gradient reaches").wait_for()
        panel.get_by_role("button", name="Silence this neuron").click()
        panel.get_by_text("A thought experiment").wait_for()
        panel.get_by_role("button", name="All as it was").click()
        shown = page.locator(".live h2").first
        newest = shown.inner_text()
        page.get_by_label("epoch", exact=True).fill("0")
        page.get_by_text("epoch 0 of 20").wait_for()
        until(lambda: shown.inner_text() != newest, "the first network answers")
        page.get_by_label("epoch", exact=True).fill("20")
        page.get_by_text("epoch 20 of 20").wait_for()
        until(lambda: shown.inner_text() == newest, "the last network answers as before")
        page.locator('[data-node="1/2"]').click()
        panel.get_by_text("dw: how the cost changes").wait_for()
        panel.get_by_role("spinbutton", name="red weight of the pixel, as a number").fill("1")
        panel.get_by_text("A thought experiment").wait_for()
        assert not panel.get_by_role("button", name="Kill it").is_visible()  # it has ended
        found = Axe().run(page, ".live").response["violations"]
        assert found == [], [(v["id"], [n["html"][:200] for n in v["nodes"]]) for v in found]
        here = ("http://127.0.0.1:", "ws://127.0.0.1:", "data:", "blob:")
        assert [url for url in asked if not url.startswith(here)] == []
        browser.close()
