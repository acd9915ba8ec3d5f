"The customs of the web: clients that leave, HEAD, and proxies that show the service in a folder."

import random
import re
import socket
from urllib.parse import urlsplit

import httpx2
import pytest
from serving import photograph, saved

PERSON = {"Accept": "text/html"}


def leave(port, request, end):
    "Send the beginning of a request, and go."
    with socket.create_connection(("127.0.0.1", port), timeout=10) as client:
        client.sendall(request[:end])


def test_500_clients_that_leave_anywhere_are_no_mistake_of_ours(running, until, caplog):
    url, app = running()
    chance, body = random.Random(24), saved(photograph())
    form = (
        b'--b\r\nContent-Disposition: form-data; name="image"; filename="a.png"\r\n\r\n'
        + body
        + b"\r\n--b--\r\n"
    )
    head = (
        f"POST /predict HTTP/1.1\r\nHost: a\r\nContent-Length: {len(form)}\r\n"
        "Content-Type: multipart/form-data; boundary=b\r\n\r\n"
    ).encode()
    places, port = app.state.service.places, urlsplit(url).port
    for _ in range(500):
        leave(port, head + form, chance.randrange(1, len(head + form)))
    until(lambda: places.taken == 0, "all places are free again")
    counted = httpx2.get(f"{url}/metrics").text
    assert 'status="499"' in counted and not re.search(r'status="5\d\d"', counted)
    assert "Traceback" not in caplog.text and "Unexpected error" not in caplog.text
    assert places.bytes == 0
    assert httpx2.get(f"{url}/readyz").status_code == 200


@pytest.mark.parametrize(
    "path", ["/", "/docs", "/model", "/healthz", "/static/style.css", "/nowhere"]
)
def test_a_head_is_a_get_without_its_body(client, path):
    whole, head = client.get(path), client.head(path)
    assert (head.status_code, head.content) == (whole.status_code, b"")
    assert head.headers["content-type"] == whole.headers["content-type"]


@pytest.mark.parametrize(
    "path, top", [("/", ""), ("/docs", ""), ("/model", ""), ("/a/b/c", "../../")]
)
def test_pages_work_in_a_folder_of_a_proxy(client, path, top):
    text = client.get(path, headers=PERSON).text
    addresses = re.findall(r'(?:href|src|action)="([^"#]+)', text)
    assert f"{top}static/style.css" in addresses
    assert not [address for address in addresses if address.startswith("/")]


def test_a_proxy_that_names_its_folder_gets_the_same(client):
    client.app.root_path = "/cats"
    assert client.get("/cats/image?image=", headers=PERSON).status_code == 422
    assert "static/style.css" in client.get("/cats/image?image=", headers=PERSON).text
    assert "../static" not in client.get("/cats/image?image=", headers=PERSON).text


def test_an_empty_address_and_40_pictures_are_named(client):
    assert "parameter image is empty" in client.get("/image?image=").json()["detail"]
    answer = client.post("/predict", files=[("image", (f"{n}.png", b"x")) for n in range(40)])
    assert answer.status_code == 422 and "at most 16 pictures" in answer.json()["detail"]
