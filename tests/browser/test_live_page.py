"""The microscope in a real browser: a run that has ended, every neuron at any epoch."""

import base64
import re
import shutil
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Queue

import h5py
import numpy as np
import pytest

sync_api = pytest.importorskip(
    "playwright.sync_api", reason="playwright is not installed: pip install 'snn[test]'"
)
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
if not CHROMIUM:
    pytest.skip("Chromium is not installed: apt-get install chromium", allow_module_level=True)

from snn.backends.local.services import Services
from snn.cloud.messages import Message
from snn.data import h5 as data
from snn.data import models
from snn.handlers.protocol import invocations_per_epoch
from snn.live.host import hosted, stage_on
from snn.live.stage import answer as stage_answer
from snn.live.watching import Onlooker
from snn.live.widget import stage_of
from snn.local import training
from snn.maths.network import cost, train_epoch

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
    page.errors = errors
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


def test_what_is_drawn_anew_while_the_button_is_down_is_clicked_all_the_same(page):
    panel = page.get_by_label("the chosen neuron")

    def press(where, x: float, y: float) -> None:
        box = where.bounding_box()
        page.mouse.move(box["x"] + x * box["width"], box["y"] + y * box["height"])
        page.mouse.down()
        epoch = page.get_by_label("epoch", exact=True)
        epoch.evaluate(
            "slider => { slider.value = 3; slider.dispatchEvent(new Event('input')); }"
        )
        page.get_by_text("epoch 3 of 30").wait_for()
        page.mouse.up()
        page.get_by_label("epoch", exact=True).fill("30")

    press(page.locator('[data-node="1/3"]'), 0.5, 0.5)
    panel.get_by_text("Neuron 3 of layer 1").wait_for()
    picture = panel.get_by_role("img", name="its weights as a picture", exact=True)
    press(picture, 1.5 / 8, 6.5 / 8)
    chosen = [
        panel.get_by_label(f"{axis} of the pixel").input_value() for axis in ("row", "column")
    ]
    assert chosen == ["6", "1"]


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


def answers(stage, layers) -> np.ndarray:
    model = stage.film.model._replace(layers=layers)
    return model.probabilities(stage.film.test_x)


def test_a_weight_that_is_turned_shows_what_would_change_and_the_training_goes_on_from_it(
    page, stage
):
    page.locator('[data-node="3/0"]').click()
    panel = page.get_by_label("the chosen neuron")
    slider = panel.get_by_role("slider", name="weight 0, from neuron 0 of layer 2")
    slider.focus()
    page.keyboard.press("End")  # as far up as it goes
    assert slider.evaluate("it => it === document.activeElement")
    value = float(slider.input_value())
    page.keyboard.press("ArrowLeft")
    assert float(slider.input_value()) < value
    page.keyboard.press("ArrowRight")
    number = panel.get_by_role("spinbutton", name="bias, as a number")
    number.fill("0")
    last = stage.film.nearest(30).layers
    layers = [(W.copy(), b.copy()) for W, b in last]
    layers[2][0][0, 0], layers[2][1][0] = value, 0
    plain, now = answers(stage, last), answers(stage, layers)
    truth = stage.film.test_y[None]
    flipped = [i for i in range(len(now)) if (now[i] >= 0.5) != (plain[i] >= 0.5)]
    assert flipped, "this change was chosen because it changes answers"
    said = panel.get_by_text("A thought experiment").inner_text()
    assert f"is {cost(now[None], truth):.4f} instead of {cost(plain[None], truth):.4f}" in said
    assert f"{len(flipped)} of {len(now)} answers change" in said
    shown = panel.locator("[data-flipped] canvas").all()
    names = [canvas.get_attribute("aria-label").split(",")[0] for canvas in shown]
    assert names == [f"test picture {i}" for i in flipped[:24]]
    with page.expect_response("**/fork**") as told:
        page.get_by_role("button", name="Train on from here").click()
    panel.get_by_text("After 50 epochs").wait_for()
    parameters, costs, layers = stage.film.model.parameters, [], stage.weights(30)
    layers = [tuple(array.copy() for array in layer) for layer in layers]
    layers[2][0][0, 0], layers[2][1][0] = value, 0
    for epoch in range(30, 80):
        total, layers = train_epoch(parameters, layers, stage.X / 255, stage.Y, epoch)
        costs.append(total)
    assert told.value.json()["costs"] == costs
    page.get_by_role("button", name="All as it was").click()
    assert "A thought experiment" not in panel.inner_text()


def test_a_picture_of_weights_is_scaled_and_what_no_training_survives_is_refused(page, stage):
    page.locator('[data-node="1/2"]').click()
    panel = page.get_by_label("the chosen neuron")
    panel.get_by_role("spinbutton", name="all weights, times, as a number").fill("-2")
    layers = [(W.copy(), b) for W, b in stage.film.nearest(30).layers]
    layers[0][0][2] *= -2
    now = answers(stage, layers)
    said = panel.get_by_text("A thought experiment").inner_text()
    assert f"is {cost(now[None], stage.film.test_y[None]):.4f} instead of" in said
    panel.get_by_role("spinbutton", name="bias, as a number").fill("1e308")
    page.locator('[data-node="2/0"]').click()
    panel.get_by_role("spinbutton", name="weight 2, as a number").fill("1e308")
    page.get_by_role("button", name="Train on from here").click()
    panel.get_by_text("Refused: with this change, the cost of epoch").wait_for()
    page.errors.clear()  # the browser names each answer that is a refusal


def test_a_pixel_is_clicked_and_one_of_its_three_weights_is_turned(page, stage):
    page.locator('[data-node="1/2"]').click()
    panel = page.get_by_label("the chosen neuron")
    panel.get_by_text("its gradient reaches").wait_for()
    picture = panel.get_by_role("img", name="its weights as a picture", exact=True)
    edge = picture.bounding_box()["width"] / 8
    picture.click(position={"x": 5.5 * edge, "y": 2.5 * edge})
    W, _ = stage.film.nearest(30).layers[0]
    asked = {"epoch": 30, "batch": 0, "layer": 1, "neuron": 2}
    told = stage_answer(stage, "neuron", asked.__getitem__)
    dw = np.frombuffer(base64.b64decode(told["dw"]), "<f4")

    def shown(row: int, column: int) -> list[list[float]]:
        first = 3 * (8 * row + column)
        pixel = stage.film.test_x[0].reshape(-1)[first : first + 3]
        w, a = W[2, first : first + 3], pixel / 255
        cells = zip(w, pixel, a, w * a, dw[first : first + 3])
        return [[float(x) for x in line] for line in cells]

    def table() -> list[list[float]]:
        rows = panel.get_by_role("row").filter(has_text=re.compile("red|green|blue")).all()
        return [
            [float(cell) for cell in row.get_by_role("cell").all_inner_texts()] for row in rows
        ]

    np.testing.assert_allclose(table(), shown(2, 5), rtol=2e-2, atol=6e-5)
    panel.get_by_role("spinbutton", name="row of the pixel").fill("7")
    np.testing.assert_allclose(table(), shown(7, 5), rtol=2e-2, atol=6e-5)
    panel.get_by_role("spinbutton", name="green weight of the pixel, as a number").fill("3")
    layers = [(W.copy(), b) for W, b in stage.film.nearest(30).layers]
    layers[0][0][2, 3 * (8 * 7 + 5) + 1] = 3
    said = panel.get_by_text("A thought experiment").inner_text()
    now = answers(stage, layers)
    assert f"is {cost(now[None], stage.film.test_y[None]):.4f} instead of" in said
    slider = panel.get_by_role("slider", name="green weight of the pixel")
    slider.focus()
    page.keyboard.press("Home")
    assert "at -" in panel.get_by_text("A thought experiment").inner_text()
    page.locator('[data-node="2/0"]').click()
    assert not panel.get_by_text("One pixel").is_visible()


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

    page.locator('[data-node="1/0"]').click()
    page.get_by_role("spinbutton", name="bias, as a number").fill("3")
    page.get_by_text("A thought experiment").wait_for()
    page.get_by_text("dw: how the cost changes").wait_for()
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    found = Axe().run(page).response["violations"]
    assert found == [], [(v["id"], [n["html"][:200] for n in v["nodes"]]) for v in found]
    SCREENS.mkdir(parents=True, exist_ok=True)
    width = page.viewport_size["width"]
    page.screenshot(path=SCREENS / f"live-{width}.png", full_page=True)


@pytest.fixture
def led(browser, parameters, small_data, tmp_path, until):
    "Leads a training that is held from its page, by a function; returns its model's file."
    chosen = parameters((5, 3, 1), epochs=4, granularity="neuron", batch_size=256)

    def lead_it(lead) -> Path:
        train_led(
            lambda address, seen: lead(browser, address, seen, until),
            chosen,
            small_data,
            tmp_path,
        )
        return tmp_path / "params.h5"

    return lead_it


def train_led(lead, chosen, small_data, out) -> None:
    "Train, held from the beginning, while somebody leads the training."
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
        trained = thread.submit(training.train, chosen, small_data, out, report, begun=begun)
        seen = stages.get(timeout=60)
        try:
            with hosted(seen, socket.create_server(("127.0.0.1", 0))) as address:
                lead(address, seen)
        finally:
            seen.pace.release()
        assert trained.result(120).epochs == 4


def first_neuron(browser, address, seen, until) -> tuple:
    "Lead a training to where its first neuron has finished: the page, how to press a button, and the plan."
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.set_default_timeout(20_000)
    page.goto(address)

    def press(name: str, asks: str = "/pace") -> None:
        "Press a button, and wait until what it asks for is done."
        with page.expect_response(lambda response: asks in response.url):
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
    return page, press, plan


def test_a_training_is_held_and_led_neuron_by_neuron_from_the_page(led):
    led(lead)


def lead(browser, address, seen, until) -> None:
    "What a person does who looks at each neuron."
    page, press, plan = first_neuron(browser, address, seen, until)
    services = seen.pace.services
    finished = lambda: services.ledger.counts(plan)["NeuronLambda"].finished
    lit = "n => document.querySelectorAll('.node.forward').length == n"
    before = finished()
    page.wait_for_function(lit, arg=before)
    press("neuron")
    until(lambda: finished() == before + 1, "one more neuron has finished")
    page.wait_for_function(lit, arg=before + 1)
    page.locator(".node.forward").first.click()  # whichever went first
    page.get_by_text("Its invocations in epoch 1, which is under way").wait_for()
    page.get_by_text("its gradient reaches").wait_for()
    look_at_timeline(page, plan, services)
    SCREENS.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=SCREENS / "live-held.png", full_page=True)
    press("epoch")
    page.get_by_text("Running, 1 of at most 4 epochs").wait_for()
    press("Let it go on")
    page.wait_for_selector("main.live[data-state=finished]")
    assert not page.get_by_role("group", name="pace of the training").is_visible()
    page.get_by_label("epoch", exact=True).fill("1")  # that the page has led it through
    page.get_by_text("A bar per Lambda invocation of epoch 1").wait_for()
    whole = "n => document.querySelectorAll('[data-call]:not(.open)').length == n"
    page.wait_for_function(whole, arg=invocations_per_epoch(plan) + 1)  # and the start
    page.close()


def look_at_timeline(page, plan, services) -> None:
    "While the run is held: each bar says what the ledger has, with the mouse and the keyboard."
    from axe_playwright_python.sync_playwright import Axe

    noted = services.runs.invocations(plan.run, 0, 0)
    neuron = min(step for step in noted if step.startswith("NeuronLambda"))
    said = lambda step: f"{step} of mini-batch 0: {noted[step].microseconds:,} µs, 1 attempt"
    bar = page.get_by_role("option", name=said(neuron))
    bar.hover()
    told = page.locator(".call-told")
    assert told.inner_text() == said(neuron)
    page.locator('[data-call][tabindex="0"]').focus()
    page.keyboard.press("Home")
    assert told.inner_text() == said("TrainerLambda/start/0/0")
    page.keyboard.press("ArrowRight")
    assert told.inner_text() == said(neuron) and bar.get_attribute("aria-selected") == "true"
    duplicate = Message(
        "NeuronLambda", "forward", plan.run, 0, 0, 1, int(neuron.split("/")[3])
    )
    assert services.store.open(duplicate).status == "finished"
    page.locator(".call.again").wait_for()
    assert told.inner_text() == said(neuron).replace("1 attempt", "2 attempts")
    assert page.evaluate("() => document.activeElement.dataset.call") == f"0/{neuron}"
    timeline = page.get_by_role("listbox")
    assert "Epoch 1, 1 of 1 mini-batches" in timeline.get_attribute("aria-label")
    found = Axe().run(page).response["violations"]
    assert found == [], [(v["id"], [n["html"][:200] for n in v["nodes"]]) for v in found]


def test_a_neuron_is_killed_doubled_and_delayed_from_the_page(led, small_data, tmp_path):
    chosen = led(break_neurons)
    alone = tmp_path / "alone"
    training.train(models.read(chosen).parameters, small_data, alone)
    assert arrays(chosen) == arrays(alone / "params.h5")


def arrays(path: Path) -> dict[str, bytes]:
    with h5py.File(path) as file:
        return {name: file[name][()].tobytes() for name in file}


def break_neurons(browser, address, seen, until) -> None:
    "What a person does who wants to see what the barrier is for."
    from axe_playwright_python.sync_playwright import Axe

    page, press, plan = first_neuron(browser, address, seen, until)
    panel, services = page.get_by_label("the chosen neuron"), seen.pace.services
    joined = lambda: {
        int(step.split("/")[3])
        for step in services.runs.finished_steps(plan.run, 0, 0)
        if step.startswith("NeuronLambda/forward/2/")
    }
    page.locator('[data-node="2/1"]').click()
    press("Kill it", "/fault")
    panel.get_by_text("Kill: waits for the next invocation of neuron 1 of layer 2.").wait_for()
    until(lambda: joined() == {0, 2} or press("neuron"), "the others of the layer have joined")
    panel.get_by_text("2 of 3 have joined, missing: neuron 1.").wait_for()
    panel.get_by_text("The training is held: the watchdog looks when it goes on").wait_for()
    assert page.locator('[data-node="2/1"].hit').count() == 1
    found = Axe().run(page).response["violations"]
    assert found == [], [(v["id"], [n["html"][:200] for n in v["nodes"]]) for v in found]
    SCREENS.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=SCREENS / "live-killed.png", full_page=True)
    page.get_by_role("button", name="neuron", exact=True).click()  # waits for the neuron
    panel.get_by_text("Waiting for the watchdog").wait_for()
    panel.get_by_text("The watchdog found that the run stood still").wait_for()
    assert services.runs.counted(plan.run, "mended") == 1 and joined() == {0, 1, 2}
    press("Deliver it twice", "/fault")
    until(
        lambda: press("neuron") or panel.get_by_text("Delivered twice").is_visible(),
        "its backward step is delivered twice",
    )
    panel.get_by_text("The ledger has 2 attempts, and one result.").wait_for()
    panel.get_by_role("cell", name=", 2 attempts").wait_for()
    press("Delay it", "/fault")
    panel.get_by_text("Delay: waits for the next invocation").wait_for()
    press("Let it go on")
    panel.get_by_text("The barrier waits").wait_for()
    panel.get_by_text("2 of 3 have joined, missing: neuron 1.").wait_for()
    page.wait_for_selector("main.live[data-state=finished]")
    panel.get_by_text("It came late, and the barrier waited.").wait_for()
    assert not page.get_by_role("button", name="Kill it").is_visible()
    page.close()
