"A corpus of hostile addresses: none leads into our network, none ends in an accident."

import json

import pytest
from serving import LOCAL, NAMES

from snn.serve.addresses import INTERNET, Network

INSIDE = [
    "http://127.0.0.1/",
    "http://127.1/",
    "http://2130706433/",
    "http://0x7f000001/",
    "http://0x7f.0.0.1/",
    "http://017700000001/",
    "http://0177.0.0.1/",
    "http://127.000.000.001/",
    "http://0/",
    "http://0.0.0.0/",
    "http://localhost/",
    "http://LOCALHOST/",
    "http://localhost./",
    "http://[::1]/",
    "http://[::]/",
    "http://[0:0:0:0:0:0:0:1]/",
    "http://[::ffff:127.0.0.1]/",
    "http://[::ffff:7f00:1]/",
    "http://[::127.0.0.1]/",
    "http://[64:ff9b::7f00:1]/",
    "http://[2002:7f00:1::]/",
    "http://①②⑦.⓪.⓪.①/",
    "http://127。0。0。1/",
    "http://127.255.255.254/",
    "https://127.0.0.1/",
    "http://169.254.169.254/latest/meta-data/iam/security-credentials/",
    "http://2852039166/",
    "http://0xa9fea9fe/",
    "http://[::ffff:169.254.169.254]/",
    "http://[fd00:ec2::254]/",
    "http://169.254.170.2/v2/credentials",
    "http://10.215.0.1/",
    "http://172.16.0.1/",
    "http://192.168.0.1/",
    "http://100.64.0.1/",
    "http://[fe80::1]/",
    "http://[fe80::1%25eth0]/",
    "http://[fc00::1]/",
    "http://224.0.0.1/",
    "http://255.255.255.255/",
    "http://198.18.0.1/",
    "http://168.63.129.16/",
]
MALFORMED = [
    "",
    " ",
    "cat.jpg",
    "//127.0.0.1/",
    "ftp://example.org/cat.jpg",
    "file:///etc/passwd",
    "gopher://127.0.0.1:6379/_INFO",
    "data:image/png;base64,AAAA",
    "javascript:alert(1)",
    "http://",
    "http:///",
    "http://[",
    "http://[::1",
    "http://]/",
    "http://example.org:99999/",
    "http://example.org:-1/",
    "http://example.org:x/",
    "http://a b/",
    "http://example.org/\r\nX: y",
    "http://example.org/\x00",
    "http://exam\tple.org/",
    "http://\ud800/",
    "http://" + "a" * 64 + ".example/",
    "http://" + "a." * 200 + "example/",
    "http://..example/",
    "http://xn--/",
    "http://example.org/" + "x" * 3000,
]
FORBIDDEN = [
    "http://user@example.org/",
    "http://user:password@example.org/",
    "http://good.example@127.0.0.1/",
    "http://example.org:22/",
    "http://example.org:6379/",
    "http://127.0.0.1:8000/",
]


@pytest.mark.parametrize("url", INSIDE)
def test_no_spelling_leads_inside(client, url):
    answer = client.post("/predict", json={"images": [{"url": url}]})
    # A resolver may not know an odd spelling at all; then there is nothing to connect to.
    assert (
        answer.status_code == 403
        or answer.json()["type"] == "/docs#not-fetched"
        and "no server has the name" in answer.json()["detail"]
    ), answer.text
    assert client.get("/image", params={"image": url}).status_code == answer.status_code


@pytest.mark.parametrize("url", MALFORMED)
def test_a_malformed_address_is_refused(client, url):
    body = json.dumps(
        {"images": [{"url": url}]}
    )  # in ASCII, so that a lone surrogate can travel
    assert (
        client.post(
            "/predict", content=body, headers={"Content-Type": "application/json"}
        ).status_code
        == 422
    )


@pytest.mark.parametrize("url", FORBIDDEN)
def test_passwords_and_other_ports_are_refused(client, url):
    assert client.post("/predict", json={"images": [{"url": url}]}).status_code == 403


def test_a_refused_address_is_never_connected_to(make_client, web):
    before = len(web.seen)
    client = make_client(network=INTERNET._replace(ports=None))
    for host in ("127.0.0.1", "localhost", "127.1", "[::ffff:127.0.0.1]"):
        assert (
            client.post(
                "/predict",
                json={"images": [{"url": f"http://{host}:{web.server_port}/cat.png"}]},
            ).status_code
            == 403
        )
    assert len(web.seen) == before


@pytest.mark.parametrize(
    "path, status, words",
    [
        ("metadata", 403, "169.254.169.254"),
        ("inside", 403, "public"),
        ("name", 403, "inside.example"),
        ("file", 422, "not a web address"),
        ("nowhere", 422, "redirect"),
        ("loop", 422, "at most 3 redirects"),
        ("missing", 422, "404"),
        ("announced", 413, "1 MiB"),
        ("endless", 413, "1 MiB"),
        ("slow", 422, "longer than 1 seconds"),
        ("letter.jpg", 422, "not an image"),
        ("gzip", 422, "not an image"),
        ("headers", 422, "could not be reached"),
    ],
)
def test_another_server_may_behave_as_it_likes(local_client, web, path, status, words):
    "Two of these never end their answer: that there is one of ours shows that we have hung up."
    before = len(web.seen)
    answer = local_client.post(
        "/predict",
        json={"images": [{"url": f"http://pictures.example:{web.server_port}/{path}"}]},
    )
    assert answer.status_code == status and words in answer.json()["detail"], answer.text
    assert len(web.seen) - before <= 4  # the address and three redirects


def test_a_name_with_one_private_number_is_refused(local_client, web):
    assert (
        local_client.post(
            "/predict",
            json={"images": [{"url": f"http://mixed.example:{web.server_port}/cat.png"}]},
        ).status_code
        == 403
    )


def test_a_closed_port_and_an_unknown_name_are_no_accident(local_client, monkeypatch):
    monkeypatch.setitem(NAMES, "nobody.example", [])
    for url in ("http://pictures.example:9/", "http://nobody.example/"):
        assert (
            local_client.post("/predict", json={"images": [{"url": url}]}).json()["type"]
            == "/docs#not-fetched"
        )


def test_a_rebinding_name_is_connected_to_as_it_was_judged(make_client, web):
    "First public (here 127.0.0.1 stands for it), then private: the second answer is never asked for within a connection."
    answers = [["127.0.0.1"], ["10.0.0.1"]]

    async def resolve(host, port):
        return answers.pop(0)

    client = make_client(network=LOCAL._replace(resolve=resolve))
    url = f"http://rebind.example:{web.server_port}/cat.png"
    assert (
        client.post("/predict", json={"images": [{"url": url}]}).status_code == 200
        and len(answers) == 1
    )
    assert (
        client.post("/predict", json={"images": [{"url": url}]}).status_code == 403
        and not answers
    )


def test_a_rebinding_name_is_judged_again_at_a_redirect(make_client, web):
    answers = [["127.0.0.1"], ["10.0.0.1"]]

    async def resolve(host, port):
        return answers.pop(0)

    client = make_client(network=LOCAL._replace(resolve=resolve))
    assert (
        client.post(
            "/predict",
            json={"images": [{"url": f"http://rebind.example:{web.server_port}/moved"}]},
        ).status_code
        == 403
    )


def test_a_name_that_leads_inside_is_refused_by_the_rules_of_the_internet(make_client):
    async def resolve(host, port):
        return ["10.0.0.1"]

    assert (
        make_client(network=Network(resolve=resolve))
        .post("/predict", json={"images": [{"url": "http://127.0.0.1.nip.example/"}]})
        .status_code
        == 403
    )


def test_https_is_checked_against_the_name(make_client, web):
    "The server speaks no TLS, so this ends as unreachable; that the number is not what the certificate is asked for shows in `fetch`."
    answer = make_client(network=LOCAL).post(
        "/predict",
        json={"images": [{"url": f"https://pictures.example:{web.server_port}/cat.png"}]},
    )
    assert answer.json()["type"] == "/docs#not-fetched"
