"""The page in a real browser: Debian's Chromium, driven by Playwright. Skipped where either is absent; no browser is ever downloaded.

Pictures of what was seen are left in out/screens."""

import shutil
import sys
from pathlib import Path

import pytest

sync_api = pytest.importorskip(
    "playwright.sync_api", reason="playwright is not installed: pip install 'snn[test]'"
)
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
if not CHROMIUM:
    pytest.skip("Chromium is not installed: apt-get install chromium", allow_module_level=True)

pytest.importorskip("fastapi", reason="the service is not installed: pip install 'snn[serve]'")
sys.path.insert(0, str(Path(__file__).parents[1] / "serve"))
from serving import LOCAL, Running, WebServer, photograph, saved, small_model

from snn.data.models import write
from snn.serve.fetch import Limits

SCREENS = Path(__file__).parents[2] / "out" / "screens"
PICTURE = {"name": "cat.png", "mimeType": "image/png", "buffer": saved(photograph())}
LETTER = {"name": "letter.jpg", "mimeType": "image/jpeg", "buffer": b"Dear cat,"}
DESKTOP, PHONE = {"width": 1280, "height": 900}, {"width": 360, "height": 740}


@pytest.fixture(scope="module")
def service(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "params.h5"
    write(small_model(), path)
    running = Running(path, network=LOCAL, fetching=Limits(seconds=3.0))
    yield running.url
    running.stop()


@pytest.fixture(scope="module")
def web():
    server = WebServer()
    yield f"http://pictures.example:{server.server_port}"
    server.shutdown()


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox"]
        )  # CI runs as root
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser, service):
    "Open the page; at the end, no script has failed and nothing came from another host."
    contexts, asked, errors = [], [], []

    def open_page(path="/", **options):
        context = browser.new_context(
            **{"viewport": DESKTOP, "reduced_motion": "reduce", **options}
        )
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(10_000)
        page.on("request", lambda request: asked.append(request.url))
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on(
            "console",
            lambda message: (
                errors.append(message.text)
                if "Content Security Policy" in message.text
                else None
            ),
        )
        page.goto(service + path)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert not errors
    assert all(url.startswith((service, "data:")) for url in asked)


def screen(page, name):
    SCREENS.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=SCREENS / f"{name}.png", full_page=True)


def verdict(page):
    page.wait_for_selector(".verdict")
    assert page.locator(".verdict").first.inner_text() in ("cat", "non-cat")
    return page.locator("#answer")


def fits(page):
    return page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_a_chosen_file_is_answered_with_reasons(open_page):
    page = open_page()
    screen(page, "home")
    page.set_input_files("#image", PICTURE)
    answer = verdict(page)
    screen(page, "answer")
    assert "sure" in answer.inner_text() and answer.locator(".bar [role=img]").get_attribute(
        "aria-label"
    ).startswith("Probability of cat:")
    assert (
        answer.locator("figure").count() == 2
        and answer.locator("svg.network circle").count() == 11
    )
    assert all(
        page.evaluate(
            "[...document.querySelectorAll('#answer figure img')].map(i => i.complete && i.naturalWidth > 0)"
        )
    )
    assert (
        page.evaluate("document.activeElement.tagName") == "H2"
    )  # a screen reader goes on there
    assert (
        "sure" not in page.title()
        and "%" in page.title()
        and page.locator("#status").inner_text() == ""
    )


def test_several_files_get_an_answer_each(open_page):
    page = open_page()
    page.set_input_files("#image", [PICTURE, {**PICTURE, "name": "second.png"}])
    verdict(page)
    assert (
        page.locator(".verdict").count() == 2
        and page.locator(".name").last.inner_text() == "second.png"
    )


def test_the_same_file_can_be_asked_about_again(open_page):
    page = open_page()
    for _ in range(2):
        with page.expect_response("**/predict"):
            page.set_input_files("#image", PICTURE)
    verdict(page)


def with_files(event, target):
    return f"""([name, bytes]) => {{
    const data = new DataTransfer(); data.items.add(new File([new Uint8Array(bytes)], name, {{type: "image/png"}}))
    {target}.dispatchEvent({event})
}}"""


def test_a_dropped_file_is_answered(open_page):
    page = open_page()
    drag = "new DragEvent('{}', {{dataTransfer: data, bubbles: true, cancelable: true}})"
    file = ["dropped.png", list(PICTURE["buffer"])]
    page.evaluate(with_files(drag.format("dragover"), "document.body"), file)
    assert "over" in page.locator(".drop").get_attribute("class")
    page.evaluate(with_files(drag.format("drop"), "document.body"), file)
    verdict(page)
    assert (
        page.locator(".name").inner_text() == "dropped.png"
        and "over" not in page.locator(".drop").get_attribute("class").split()
    )


def test_a_pasted_picture_is_answered(open_page):
    page = open_page()
    page.evaluate(
        with_files(
            "new ClipboardEvent('paste', {clipboardData: data, bubbles: true})",
            "document.body",
        ),
        ["pasted.png", list(PICTURE["buffer"])],
    )
    verdict(page)


def test_an_address_is_answered_and_can_be_shared(open_page, web):
    page = open_page()
    page.fill("#address", f"{web}/cat.png")
    page.click("#fetch button")
    verdict(page)
    assert "/image?image=" in page.url and page.input_value("#address") == f"{web}/cat.png"
    shared = page.url
    page.goto(shared)
    verdict(page)


def test_a_refusal_is_said_and_the_page_goes_on(open_page, web):
    page = open_page()
    page.set_input_files("#image", LETTER)
    page.wait_for_selector(".problem")
    screen(page, "problem")
    assert (
        "Not an image" in page.locator("[role=alert]").inner_text()
        and page.locator("#status").inner_text() == ""
    )
    page.set_input_files("#image", PICTURE)
    verdict(page)
    page.fill("#address", "http://169.254.169.254/latest/meta-data/")
    page.click("#fetch button")
    page.wait_for_selector(".problem")
    assert "Address refused" in page.locator("[role=alert]").inner_text()
    page.click("text=About this problem")
    assert (
        page.url.endswith("/docs#address-refused")
        and page.locator("#address-refused").is_visible()
    )


def test_a_file_that_is_too_large_is_not_even_sent(open_page):
    page = open_page()
    page.evaluate("""() => {
        const data = new DataTransfer(); data.items.add(new File([new Uint8Array(11 * 2 ** 20)], "large.png"))
        document.body.dispatchEvent(new DragEvent("drop", {dataTransfer: data, bubbles: true, cancelable: true}))
    }""")
    page.wait_for_selector(".problem")
    assert "11.0 MiB; at most 10 MiB" in page.locator("[role=alert]").inner_text()


def test_a_lost_connection_is_said(open_page):
    page = open_page()
    page.context.set_offline(True)
    page.set_input_files("#image", PICTURE)
    page.wait_for_selector(".problem")
    assert "could not be reached" in page.locator("[role=alert]").inner_text()


def test_the_keyboard_is_enough(open_page, web):
    page = open_page()
    page.on(
        "filechooser", lambda chooser: None
    )  # from now on the browser leaves files to us; told at the last moment, it may miss it

    def tab_to(selector):
        for _ in range(20):
            page.keyboard.press("Tab")
            if page.evaluate("selector => document.activeElement.matches(selector)", selector):
                return
        assert False, f"{selector} is not reached"

    tab_to(".skip")
    tab_to("#image")
    assert (
        page.evaluate("getComputedStyle(document.querySelector('.drop')).outlineStyle")
        == "solid"
    )  # the focus is seen
    with page.expect_file_chooser() as chooser:
        page.keyboard.press("Space")
    chooser.value.set_files(PICTURE)
    verdict(page)
    tab_to("summary")
    page.keyboard.press("Enter")
    assert page.locator("details table").is_visible()
    screen(page, "table")
    page.goto(page.url)
    tab_to("#address")
    page.keyboard.type(f"{web}/cat.png")
    page.keyboard.press("Enter")
    verdict(page)


def test_it_fits_a_telephone(open_page, web):
    page = open_page(viewport=PHONE, is_mobile=True, has_touch=True)
    screen(page, "phone-home")
    assert fits(page) and not page.locator(".hint").is_visible()
    page.set_input_files("#image", {**PICTURE, "name": "a-very-long-name-" * 8 + ".png"})
    verdict(page)
    screen(page, "phone-answer")
    assert fits(page) and page.locator("#answer h2").is_visible()
    assert page.evaluate(
        "document.querySelector('#answer h2').getBoundingClientRect().top < innerHeight"
    )  # the answer is scrolled to
    for path in ("/docs", "/model"):
        page.goto(
            page.url.split("/image")[0].rstrip("/") + path
            if path == "/docs"
            else page.url.replace("/docs", path)
        )
        screen(page, f"phone{path.replace('/', '-')}")
        assert fits(page)


def test_it_works_without_scripts(open_page, web):
    page = open_page(java_script_enabled=False)
    page.set_input_files("#image", PICTURE)
    page.click("text=Ask the network")
    verdict(page)
    page.set_input_files("#image", LETTER)
    page.click("text=Ask the network")
    page.wait_for_selector(".problem")
    page.fill("#address", f"{web}/cat.png")
    page.click("#fetch button")
    verdict(page)


@pytest.mark.parametrize(
    "path, ask, scheme",
    [
        ("/", None, "light"),
        ("/", PICTURE, "light"),
        ("/", PICTURE, "dark"),
        ("/", LETTER, "light"),
        ("/", LETTER, "dark"),
        ("/docs", None, "light"),
        ("/model", None, "dark"),
    ],
    ids=["home", "answer", "answer-dark", "problem", "problem-dark", "docs", "model-dark"],
)
def test_axe_finds_no_violation(open_page, path, ask, scheme):
    axe = pytest.importorskip(
        "axe_playwright_python.sync_playwright",
        reason="axe is not installed: pip install 'snn[test]'",
    )
    page = open_page(path, color_scheme=scheme)
    if ask:
        page.set_input_files("#image", ask)
        page.wait_for_selector(".verdict, .problem")
        if ask is PICTURE:
            page.click("summary")
    screen(
        page,
        f"{scheme}-{(path.strip('/') or 'home')}{'-' + ask['name'].split('.')[0] if ask else ''}",
    )
    found = axe.Axe().run(page)
    assert found.violations_count == 0, found.generate_report()
