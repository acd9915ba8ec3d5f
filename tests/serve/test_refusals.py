"Every wrong request is refused with a sentence, and none with more."

import pytest
from serving import photograph, saved

PERSON = {"Accept": "text/html"}


def assert_problem(answer, kind, status):
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    problem = answer.json()
    assert (
        problem["type"] == f"/docs#{kind}"
        and problem["status"] == status
        and problem["detail"]
        and problem["title"]
    )
    return problem["detail"]


@pytest.mark.parametrize(
    "body, kind, status",
    [
        (b"{", "unreadable-request", 400),
        (b"\xff", "unreadable-request", 400),
        (b"[" * 100_000, "unreadable-request", 400),
        (b"null", "wrong-request", 422),
        (b'{"images": []}', "wrong-request", 422),
        (b'{"images": "cat"}', "wrong-request", 422),
        (b'{"images": [{}]}', "wrong-request", 422),
        (b'{"images": [{"base64": "%%"}]}', "wrong-request", 422),
        (b'{"images": [{"base64": "\\ud800"}]}', "wrong-request", 422),
        (b'{"images": [{"base64": ""}]}', "not-an-image", 422),
        (b'{"images": [{"url": "\\ud800"}]}', "wrong-request", 422),
        (b'{"images": [{"\\ud800\\n": 1}]}', "wrong-request", 422),
        (b'{"images": [{"base64": "bWVvdw==", "url": "http://a/"}]}', "wrong-request", 422),
        (
            b'{"images": [' + b",".join([b'{"base64": "bWVvdw=="}'] * 17) + b"]}",
            "wrong-request",
            422,
        ),
        (
            b'{"images": [' + b",".join([b'{"url": "http://a/"}'] * 5) + b"]}",
            "wrong-request",
            422,
        ),
    ],
)
def test_wrong_json_is_refused(client, body, kind, status):
    assert_problem(
        client.post("/predict", content=body, headers={"Content-Type": "application/json"}),
        kind,
        status,
    )


@pytest.mark.parametrize(
    "headers, body, kind, status",
    [
        ({"Content-Type": "multipart/form-data"}, b"meow", "unreadable-request", 400),
        (
            {"Content-Type": "multipart/form-data; boundary=x"},
            b"meow",
            "unreadable-request",
            400,
        ),
        (
            {"Content-Type": "multipart/form-data; boundary=x"},
            b"--x\r\n\r\nmeow\r\n--x--",
            "unreadable-request",
            400,
        ),
        (
            {"Content-Type": "multipart/form-data; boundary=\xff"},
            b"--\xff",
            "unreadable-request",
            400,
        ),
        (
            {"Content-Type": "multipart/form-data; boundary=x"},
            b"--x--\r\n",
            "wrong-request",
            422,
        ),
        ({"Content-Type": "text/plain"}, b"meow", "unknown-content-type", 415),
        (
            {"Content-Type": "application/x-www-form-urlencoded"},
            b"image=meow",
            "unknown-content-type",
            415,
        ),
        ({}, b"", "unknown-content-type", 415),
    ],
)
def test_wrong_forms_are_refused(client, headers, body, kind, status):
    headers = [(name.encode(), value.encode("latin-1")) for name, value in headers.items()]
    assert_problem(client.post("/predict", content=body, headers=headers), kind, status)


def test_a_form_without_a_file_is_refused(client):
    as_browsers_do = b'--x\r\nContent-Disposition: form-data; name="image"; filename=""\r\nContent-Type: application/octet-stream\r\n\r\n\r\n--x--\r\n'
    answer = client.post(
        "/predict",
        content=as_browsers_do,
        headers={"Content-Type": "multipart/form-data; boundary=x"},
    )
    assert "choose a file" in assert_problem(answer, "wrong-request", 422)
    assert "known are image" in assert_problem(
        client.post("/predict", files=[("cat", ("cat.png", b"meow"))]), "wrong-request", 422
    )
    assert "may only hold files" in assert_problem(
        client.post("/predict", files=[("image", (None, "cat.png"))]), "wrong-request", 422
    )


def test_a_problem_names_its_picture(client):
    files = [
        ("image", ("good.png", saved(photograph()))),
        ("image", ("letter\n<b>.jpg", b"Dear cat,")),
    ]
    assert assert_problem(
        client.post("/predict", files=files), "not-an-image", 422
    ).startswith("letter%0A<b>.jpg: this is not an image")
    page = client.post("/predict", files=files, headers=PERSON).text
    assert "&lt;b&gt;.jpg" in page and "<b>.jpg" not in page


def test_wrong_paths_methods_and_parameters_are_refused(client):
    assert_problem(client.get("/nowhere"), "not-found", 404)
    assert_problem(client.get("/static/../api.py"), "not-found", 404)
    assert_problem(client.get("/static/%2e%2e/%2e%2e/__init__.py"), "not-found", 404)
    assert_problem(client.put("/predict"), "wrong-method", 405)
    assert client.put("/predict").headers["allow"] == "POST"
    assert (
        assert_problem(client.get("/image"), "wrong-request", 422)
        == "the parameter image is missing"
    )
    assert "explain" in assert_problem(
        client.post("/predict?explain=perhaps", json={"images": []}), "wrong-request", 422
    )


def test_a_script_in_an_address_stays_a_text(client):
    page = client.get(
        "/image", params={"image": '"><script>alert(1)</script>'}, headers=PERSON
    )
    assert (
        page.status_code == 422
        and "<script>alert" not in page.text
        and "&lt;script&gt;" in page.text
    )


def test_an_announced_length_is_refused_before_it_is_read(client):
    sent = []

    def body():
        for _ in range(11):
            sent.append(1)
            yield bytes(2**20)

    assert_problem(
        client.post(
            "/predict",
            content=b"x",
            headers={"Content-Length": str(11 * 2**20), "Content-Type": "application/json"},
        ),
        "too-large",
        413,
    )
    assert_problem(
        client.post("/predict", content=body(), headers={"Content-Type": "application/json"}),
        "too-large",
        413,
    )  # chunked
    assert_problem(
        client.post(
            "/predict",
            content=body(),
            headers={"Content-Type": "multipart/form-data; boundary=x"},
        ),
        "too-large",
        413,
    )


def test_a_mistake_of_ours_shows_nothing_of_the_inside(client, caplog):
    client.app.state.service.live.current = None
    answer = client.post("/predict", files=[("image", ("a.png", saved(photograph())))])
    assert_problem(answer, "unexpected", 500)
    assert (
        "Traceback" not in answer.text
        and "NoneType" not in answer.text
        and "NoneType" in caplog.text
    )
    assert answer.headers["x-content-type-options"] == "nosniff"


def test_more_requests_than_places_are_told_to_come_back(make_client):
    client = make_client(requests=0)
    answer = client.post("/predict", files=[("image", ("a.png", saved(photograph())))])
    assert_problem(answer, "busy", 503)
    assert answer.headers["retry-after"] == "1"
    assert client.get("/healthz").status_code == client.get("/").status_code == 200
    assert "Busy" in client.get("/image?image=http://a/", headers=PERSON).text


def test_more_downloads_than_places_are_told_to_come_back(make_client):
    answer = make_client(downloads=0).post(
        "/predict", json={"images": [{"url": "http://pictures.example/"}]}
    )
    assert_problem(answer, "busy", 503)
    assert answer.headers["retry-after"] == "1"
