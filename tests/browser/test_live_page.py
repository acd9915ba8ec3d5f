"""The microscope in a real browser: a run that has ended, every neuron at any epoch."""

import shutil
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Queue

import pytest

sync_api = pytest.importorskip(
    "playwright.sync_api", reason="playwright is not installed: pip install 'snn[test]'"
)
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
if not CHROMIUM:
    pytest.skip("Chromium is not installed: apt-get install chromium", allow_module_level=True)

from snn.backends.local.services import Services
from snn.data import h5 as data
from snn.live.host import hosted, stage_on
from snn.live.watching import Onlooker
from snn.live.widget import stage_of
from snn.local import training

SCREENS = Path(__file__).parents[2] / "out" / "screens"


@pytest.fixture(scope="module")
def stage(parameters, small_data, tmp_path_factory):
    chosen = parameters((5, 3, 1), epochs=30, granularity="network", learning_rate=0.1)
    out = tmp_path_factory.mktemp("shown")
    training.train(chosen, small_data, out)
    found = stage_of(out, data.read(small_data))
    found.watcher.thread.join(60)
    return found


@pytest.fixture(scope="module")
def address(stage):
    with hosted(stage, socket.create_server(("127.0.0.1", 0))) as address:
        yield address


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser, address, request):
    "The page; at the end, no script has failed and nothing came from another host."
    asked, errors = [], []
    options = getattr(request, "param", {})
    context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **options})
    page = context.new_page()
    page.set_default_timeout(20_000)
    page.on("request", lambda sent: asked.append(sent.url))
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda told: errors.append(told.text) if told.type == "error" else None)
    page.goto(address)
    page.wait_for_selector("main.live[data-state=finished]")
    page.wait_for_selector('[data-node="1/0"]')
    yield page
    context.close()
    here = address.split("/?")[0]
    assert not errors and all(url.startswith((here, "data:", "blob:")) for url in asked)


def answer(page) -> str:
    return page.locator("h2").first.inner_text()


def test_a_neuron_shows_its_numbers(page, stage):
    page.locator('[data-node="2/1"]').click()
    panel = page.get_by_label("the chosen neuron")
    panel.get_by_text("Neuron 1 of layer 2").wait_for()
    panel.get_by_text("its gradient reaches").wait_for()
    W, b = stage.film.nearest(30).layers[0]
    W2, b2 = stage.film.nearest(30).layers[1]
    x = stage.film.test_x[0].reshape(-1) / 255
    z = W2[1] @ (W @ x + b[:, 0]).clip(0) + b2[1, 0]
    assert f"= {z:.4f}" in panel.inner_text()


def test_one_can_slide_to_the_beginning_and_back(page, stage):
    newest = answer(page)
    page.get_by_label("epoch", exact=True).fill("0")
    page.get_by_text("epoch 0 of 30").wait_for()
    first = stage.film.nearest(0)
    probability = stage.film.model._replace(layers=first.layers).probabilities
    p = probability(stage.film.test_x[:1])[0]
    assert f"{100 * p:.0f} %" in answer(page)
    page.get_by_label("epoch", exact=True).fill("30")
    page.get_by_text("epoch 30 of 30").wait_for()
    assert answer(page) == newest


def test_a_silenced_neuron_shows_what_would_change(page, stage):
    page.locator('[data-node="2/0"]').click()
    page.get_by_role("button", name="Silence this neuron").click()
    flipped = int(page.locator("[data-flipped]").get_attribute("data-flipped"))
    last = stage.film.nearest(30)
    plain = stage.film.model._replace(layers=last.layers)
    layers = [(W.copy(), b) for W, b in last.layers]
    layers[2][0][:, 0] = 0
    without = plain._replace(layers=layers)
    answers = [m.probabilities(stage.film.test_x) >= 0.5 for m in (plain, without)]
    assert flipped == (answers[0] != answers[1]).sum()
    page.get_by_role("button", name="Train on from here").click()
    page.get_by_text("After 50 epochs").wait_for()


def test_it_can_be_used_with_the_keyboard_alone(page):
    page.locator('[data-node="1/0"]').focus()
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowRight")
    page.get_by_role("heading", name="Neuron 1 of layer 2").wait_for()
    assert page.evaluate("document.activeElement.dataset.node") == "2/1"


def test_an_own_picture_goes_through(page):
    import io

    from PIL import Image

    file = io.BytesIO()
    Image.new("RGB", (30, 20), "orange").save(file, "PNG")
    picture = {"name": "orange.png", "mimeType": "image/png", "buffer": file.getvalue()}
    page.locator("input[type=file]").set_input_files(picture)
    page.get_by_text("orange.png:").wait_for()


PHONE = {"viewport": {"width": 360, "height": 740}, "color_scheme": "dark"}


@pytest.mark.parametrize("page", [{}, PHONE], indirect=True, ids=["desk", "phone"])
def test_everybody_can_read_it(page):
    from axe_playwright_python.sync_playwright import Axe

    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    found = Axe().run(page).response["violations"]
    assert found == [], [(v["id"], [n["html"][:200] for n in v["nodes"]]) for v in found]
    SCREENS.mkdir(parents=True, exist_ok=True)
    width = page.viewport_size["width"]
    page.screenshot(path=SCREENS / f"live-{width}.png", full_page=True)


def test_a_training_is_held_and_led_neuron_by_neuron_from_the_page(
    browser, parameters, small_data, tmp_path, until
):
    chosen = parameters((5, 3, 1), epochs=4, granularity="neuron", batch_size=256)
    stages = Queue()

    def begun(cloud, run):
        own = lambda: Services(cloud.workers.environment)
        cloud.workers.pace.hold()
        onlooker = Onlooker(run, cloud.workers.pace, own())
        stages.put(stage_on(run, own(), chosen, data.read(small_data), onlooker))

    def report(progress):
        if progress.status.state != "running":
            seen.watcher.thread.join(60)

    with ThreadPoolExecutor(1) as thread:
        trained = thread.submit(
            training.train, chosen, small_data, tmp_path, report, begun=begun
        )
        seen = stages.get(timeout=60)
        try:
            with hosted(seen, socket.create_server(("127.0.0.1", 0))) as address:
                lead(browser, address, seen, until)
        finally:
            seen.pace.release()
        assert trained.result(120).epochs == 4


def lead(browser, address, seen, until) -> None:
    "What a person does who looks at each neuron."
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.set_default_timeout(20_000)
    page.goto(address)

    def press(name: str) -> None:
        "Press a button, and wait until what it asks for is done."
        with page.expect_response(lambda response: "/pace" in response.url):
            page.get_by_role("button", name=name, exact=True).click()

    services = seen.pace.services
    until(
        lambda: press("neuron") or services.runs.knows(services.runs.newest(seen.pace.run)),
        "the run has begun",
    )
    plan = services.runs.plan(services.runs.newest(seen.pace.run))
    finished = lambda: services.ledger.counts(plan)["NeuronLambda"].finished
    until(lambda: press("neuron") or finished(), "a neuron has finished")
    page.locator(".node.forward").first.wait_for()
    lit = "n => document.querySelectorAll('.node.forward').length == n"
    before = finished()
    page.wait_for_function(lit, arg=before)
    press("neuron")
    until(lambda: finished() == before + 1, "one more neuron has finished")
    page.wait_for_function(lit, arg=before + 1)
    page.locator('[data-node="1/0"]').click()
    page.get_by_text("forward finished").wait_for()
    page.get_by_text("its gradient reaches").wait_for()
    SCREENS.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=SCREENS / "live-held.png", full_page=True)
    press("epoch")
    page.get_by_text("Running, 1 of at most 4 epochs").wait_for()
    press("Let it go on")
    page.wait_for_selector("main.live[data-state=finished]")
    assert not page.get_by_role("group", name="pace of the training").is_visible()
    page.close()
