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
    for regime in ("plain", "busy", "quick", "shuffled", "offline", "homeless", "newest"):
        assert f"\n  {regime} " in said.stdout
    wrong = subprocess.run([command, "elsewhere"], capture_output=True, text=True)
    assert wrong.returncode == 2 and wrong.stderr.startswith(
        "elsewhere is no regime; there are: plain"
    )


@pytest.fixture
def skipping(root, tmp_path):
    "Runs a test that is skipped for a reason, with our conftest.py and our settings."

    def run(reason: str, *options: str) -> subprocess.CompletedProcess:
        (tmp_path / "conftest.py").write_text((root / "tests" / "conftest.py").read_text())
        (tmp_path / "test_it.py").write_text(
            f"import pytest\ndef test_one(): pytest.skip({reason!r})\n"
        )
        settings = ["-c", root / "pyproject.toml", "-p", "no:cacheprovider"]
        return subprocess.run(
            [sys.executable, "-m", "pytest", "-q", *settings, *options, tmp_path],
            capture_output=True,
            text=True,
            cwd=tmp_path,
        )

    return run


def test_what_was_skipped_is_told_with_how_to_get_it(skipping):
    done = skipping("no aws on the PATH")
    *_, last, fresh, outcome = done.stdout.splitlines()
    assert "1 test: no aws on the PATH; to get it: pipx install awscli" in done.stdout
    assert "to get all: bin/test --faults" in last and "to get them: bin/test --fresh" in fresh
    assert outcome.startswith("1 skipped in"), "nothing else comes after it"


@pytest.mark.parametrize(
    "reason, code", [("no aws on the PATH", 0), ("Chromium is not installed", 1)]
)
def test_where_all_is_installed_a_skip_for_no_named_reason_fails(reason, code, skipping):
    done = skipping(reason, "--named-skips")
    assert done.returncode == code, done.stdout
    assert (f"nobody has named this reason to skip: {reason}" in done.stdout) == bool(code)
