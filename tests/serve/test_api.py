"What the Prediction API promises to those who use it as it is meant."

import base64
import re

import pytest
from serving import photograph, saved, small_model

from snn.data.photographs import read_photograph
from snn.serve.model import model_id

PERSON = {"Accept": "text/html,application/xhtml+xml,*/*;q=0.8"}


def form(*contents):
    return [("image", (f"{number}.png", content)) for number, content in enumerate(contents)]


def as_json(content):
    return {"base64": base64.b64encode(content).decode()}


@pytest.mark.parametrize(
    "kind, options",
    [("PNG", {}), ("JPEG", {"quality": 80}), ("WEBP", {}), ("GIF", {}), ("BMP", {})],
)
def test_an_answer_has_the_same_digits_as_in_training(client, tmp_path, kind, options):
    content = saved(photograph(), kind, **options)
    (tmp_path / "photograph").write_bytes(content)
    expected = small_model().probabilities(read_photograph(tmp_path / "photograph", 16)[None])[
        0
    ]
    [prediction] = client.post("/predict", files=form(content)).json()["predictions"]
    assert prediction["probability"] == expected
    assert prediction["class"] == ("cat" if expected >= 0.5 else "non-cat")


def test_a_telephone_picture_is_turned_as_in_training(client, tmp_path):
    from PIL import Image

    exif = Image.Exif()
    exif[0x0112] = 6
    content = saved(photograph(), "JPEG", exif=exif)
    (tmp_path / "photograph").write_bytes(content)
    expected = small_model().probabilities(read_photograph(tmp_path / "photograph", 16)[None])[
        0
    ]
    assert (
        client.post("/predict", files=form(content)).json()["predictions"][0]["probability"]
        == expected
    )


def test_forms_and_json_give_the_same_answers_in_order(client):
    contents = [saved(photograph(seed=seed)) for seed in range(4)]
    by_form = client.post("/predict", files=form(*contents)).json()
    by_json = client.post(
        "/predict", json={"images": [as_json(content) for content in contents]}
    ).json()
    alone = [
        client.post("/predict", files=form(content)).json()["predictions"][0]["probability"]
        for content in contents
    ]
    assert (
        [p["probability"] for p in by_form["predictions"]]
        == [p["probability"] for p in by_json["predictions"]]
        == alone
    )
    assert by_form["model"] == by_json["model"] == model_id(small_model())
    assert [p["name"] for p in by_form["predictions"]] == ["0.png", "1.png", "2.png", "3.png"]


def test_addresses_are_fetched(local_client, web):
    url = f"http://pictures.example:{web.server_port}/cat.png"
    expected = local_client.post(
        "/predict", files=form(web.RequestHandlerClass.picture)
    ).json()["predictions"][0]["probability"]
    by_json = local_client.post("/predict", json={"images": [{"url": url}]}).json()[
        "predictions"
    ][0]
    by_form = local_client.post("/predict", files=[("url", (None, url))]).json()[
        "predictions"
    ][0]
    moved = local_client.post(
        "/predict", json={"images": [{"url": url.replace("cat", "moved")}]}
    ).json()["predictions"][0]
    assert (
        by_json["probability"] == by_form["probability"] == moved["probability"] == expected
        and by_json["name"] == url
    )
    assert web.seen[-1] == (
        "/cat.png",
        f"pictures.example:{web.server_port}",
    )  # the name goes into the Host header


def test_an_explanation_comes_when_it_is_asked_for(client):
    content = saved(photograph())
    assert (
        "explanation"
        not in client.post("/predict", files=form(content)).json()["predictions"][0]
    )
    prediction = client.post("/predict?explain=true", files=form(content)).json()[
        "predictions"
    ][0]
    why = prediction["explanation"]
    assert [len(layer["values"]) for layer in why["layers"]] == [6, 4, 1]
    assert why["layers"][-1]["values"] == [prediction["probability"]]
    assert all(why[key].startswith("data:image/") for key in ("picture", "seen", "saliency"))


def test_image_shows_picture_and_verdict_as_a_page(local_client, web):
    answer = local_client.get(
        "/image", params={"image": f"http://pictures.example:{web.server_port}/cat.png"}
    )
    assert answer.status_code == 200 and answer.headers["content-type"].startswith("text/html")
    assert "data:image/jpeg;base64," in answer.text and re.search(
        r'class="verdict (yes|no)">(non-)?cat<', answer.text
    )


def test_a_browser_without_scripts_gets_a_page(client):
    answer = client.post(
        "/predict", files=form(saved(photograph()), saved(photograph(seed=1))), headers=PERSON
    )
    assert (
        answer.status_code == 200
        and answer.text.count('class="verdict') == 2
        and "<title>2 answers" in answer.text
    )
    refused = client.post("/predict", files=form(b"meow"), headers=PERSON)
    assert (
        refused.status_code == 422
        and "Not an image" in refused.text
        and 'role="alert"' in refused.text
    )


def test_the_state_is_told(client):
    assert (
        client.get("/healthz").json()
        == client.get("/readyz").json()
        == {"status": "ok", "model": model_id(small_model())}
    )
    facts = client.get("/model").json()
    assert (
        facts["size"] == 16
        and facts["parameters"]["neurons"]["layer1"] == 6
        and facts["evaluation"] is None
    )
    assert "<h1>The model" in client.get("/model", headers=PERSON).text


def test_a_data_set_and_a_run_tell_how_good_the_model_is(model_path, tmp_path):
    import json

    import numpy as np
    from starlette.testclient import TestClient

    from snn.data import h5 as data
    from snn.serve.api import create
    from snn.serve.model import Live, Sources

    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (20, 16, 16, 3), dtype=np.uint8)
    data.write(
        data.Datasets(images, np.arange(20) % 2, images[:10], np.arange(10) % 2),
        tmp_path / "datasets.h5",
    )
    (tmp_path / "run.json").write_text(
        json.dumps(
            {
                "run": "first",
                "cost": 0.25,
                "plan": {"etag": "abc"},
                "warning": "layer 2 is silent",
            }
        )
    )
    client = TestClient(
        create(Live(Sources(model_path, tmp_path / "datasets.h5", tmp_path / "run.json")))
    )
    facts = client.get("/model").json()
    low, high = facts["evaluation"]["interval"]
    assert (
        low < facts["evaluation"]["accuracy"] < high
        and facts["training_cost"] == 0.25
        and facts["data_etag"] == "abc"
        and facts["run"] == "first"
        and facts["warning"] == "layer 2 is silent"
    )
    page = client.get("/model", headers=PERSON).text
    assert "layer 2 is silent" in page
    assert "of 10 test pictures right" in page and "said non-cat" in page


def test_what_happens_is_counted(client):
    client.post("/predict", files=form(saved(photograph())))
    client.post("/predict", files=form(b"meow"))
    client.get("/nowhere-" + "x" * 50)
    text = client.get("/metrics").text
    for line in [
        'snn_requests_total{method="POST",route="/predict",status="200"} 1.0',
        'snn_problems_total{kind="not-an-image"} 1.0',
        'snn_request_seconds_count{route="/predict"} 2.0',
        f'snn_model_info{{model="{model_id(small_model())}"}} 1.0',
        "process_resident_memory_bytes",
    ]:
        assert line in text
    assert "xxx" not in text


@pytest.mark.parametrize(
    "path",
    [
        "/",
        "/docs",
        "/model",
        "/static/page.js",
        "/static/style.css",
        "/predict",
        "/nowhere",
        "/image",
        "/metrics",
    ],
)
def test_every_answer_carries_the_security_headers(client, path):
    headers = client.get(path, headers=PERSON).headers
    assert (
        "default-src 'none'" in headers["content-security-policy"]
        and "unsafe" not in headers["content-security-policy"]
    )
    assert (
        headers["x-content-type-options"] == "nosniff"
        and headers["referrer-policy"] == "no-referrer"
        and headers["x-frame-options"] == "DENY"
    )


@pytest.mark.parametrize(
    "path", ["/", "/docs", "/model", "/static/style.css", "/static/page.js"]
)
def test_pages_load_nothing_from_another_host(client, path):
    text = client.get(path, headers=PERSON).text
    assert not re.search(
        r"""(src|href|action)=["']?(https?:)?//|url\(|@import|<style|\sstyle=|\son\w+=""", text
    )


def test_all_problems_are_explained(client):
    from snn.serve.problems import KINDS

    page = client.get("/docs").text
    assert all(f'id="{kind}"' in page for kind in KINDS)
