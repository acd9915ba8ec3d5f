"""Training on one machine asks for no account: whatever AWS settings its user has, they are not used, and nothing leaves the machine."""

import os
import socket

import msgspec
import pytest

WATCH = """
import os, sys

def hook(event, arguments):
    if event not in ("socket.connect", "socket.getaddrinfo"):
        return
    address = arguments[1] if event == "socket.connect" else arguments[:2]
    if isinstance(address, tuple) and address[0] is not None:
        with open(os.environ["SEEN"], "a") as file:
            file.write(f"{address[0]} {address[1]}\\n")

sys.addaudithook(hook)
"""
# The example of the AWS documentation, in parts: no scanner for keys need stop at it.
KEY, SECRET = "AKIA" + "IOSFODNN7EXAMPLE", "wJalrXUtnFEMI/K7MDENG/" + "bPxRfiCYEXAMPLEKEY"


@pytest.fixture
def proxy():
    "A proxy that nobody should ask."
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        yield server


def was_asked(server: socket.socket) -> bool:
    try:
        server.accept()
    except BlockingIOError:
        return False
    return True


def test_no_setting_of_the_user_is_used_and_no_request_leaves(
    proxy, run_snn, small_data, parameters, tmp_path
):
    (tmp_path / "sitecustomize.py").write_text(WATCH)
    (tmp_path / "config").write_text("[default\nregion: here\n\x00")
    (tmp_path / "parameters.json").write_bytes(
        msgspec.json.encode(parameters((3, 1), granularity="network"))
    )
    address = f"http://127.0.0.1:{proxy.getsockname()[1]}"
    kept = {name: v for name, v in os.environ.items() if not name.startswith("AWS_")}
    environment = {
        **kept,
        "PYTHONPATH": str(tmp_path),
        "SEEN": str(tmp_path / "seen"),
        "AWS_PROFILE": "nobody-has-this",
        "AWS_CONFIG_FILE": str(tmp_path / "config"),
        "AWS_SHARED_CREDENTIALS_FILE": str(tmp_path / "config"),
        "AWS_ACCESS_KEY_ID": KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_SESSION_TOKEN": "FwoGZXIvYXdzEXAMPLE",
        "AWS_DEFAULT_REGION": "eu-west-9",
        "AWS_ENDPOINT_URL_S3": address,
        "AWS_ENDPOINT_URL_SQS": address,
        "AWS_USE_FIPS_ENDPOINT": "true",
        "AWS_USE_DUALSTACK_ENDPOINT": "true",
        "AWS_CA_BUNDLE": str(tmp_path / "none.pem"),
        **dict.fromkeys(
            ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy"), address
        ),
    }
    for name in ("NO_PROXY", "no_proxy"):
        environment.pop(name, None)
    code, out, err = run_snn(
        "train",
        *("--data", small_data, "--parameters", tmp_path / "parameters.json"),
        *("--workers", 1, "--out", tmp_path / "out"),
        env=environment,
    )
    assert code == 0 and (tmp_path / "out" / "params.h5").is_file(), err
    assert not was_asked(proxy)
    assert KEY not in out + err and SECRET not in out + err
    asked = {line.split()[0] for line in (tmp_path / "seen").read_text().splitlines()}
    assert asked and asked <= {"127.0.0.1", "localhost", "::1", "0.0.0.0"}
