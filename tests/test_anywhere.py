"""What keeps the tests on this machine, and the command that runs them as other machines would."""

import socket
import subprocess
import sys

import pytest


def test_a_test_that_leaves_this_machine_fails():
    with pytest.raises(ConnectionRefusedError, match="wanted to leave this machine"):
        socket.getaddrinfo("snn.example", 443)
    with socket.socket() as client, pytest.raises(ConnectionRefusedError, match="192.0.2.1"):
        client.connect(("192.0.2.1", 443))
    with socket.create_server(("127.0.0.1", 0)) as server:
        socket.create_connection(server.getsockname()).close()


def test_anywhere_names_its_regimes_and_refuses_others(root):
    command = root / "tests" / "anywhere"
    said = subprocess.run([command, "--help"], capture_output=True, text=True)
    for regime in ("plain", "busy", "quick", "shuffled", "offline", "homeless"):
        assert f"\n  {regime} " in said.stdout
    wrong = subprocess.run([command, "elsewhere"], capture_output=True, text=True)
    assert wrong.returncode == 2 and wrong.stderr.startswith(
        "elsewhere is no regime; there are: plain"
    )


def test_what_was_skipped_is_told_with_how_to_get_it(root, tmp_path):
    (tmp_path / "conftest.py").write_text((root / "tests" / "conftest.py").read_text())
    (tmp_path / "test_it.py").write_text(
        "import pytest\ndef test_one(): pytest.skip('no aws on the PATH')\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-c", "/dev/null", tmp_path],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert "1 test: no aws on the PATH; to get it: pipx install awscli" in done.stdout
    assert "to get all: bin/test --faults" in done.stdout
