import json

import pytest
import typer
from typer.testing import CliRunner

from snn.cli import deploy as commands
from snn.deploy.wheels import here
from snn.local.server import local_aws
from snn.maths.parameters import InputError

FIVE = [
    "--bucket",
    "cats-of-2026",
    "--stack",
    "Cats",
    "--github-user",
    "somebody",
    "--email",
    "somebody@example.com",
    "--connection",
    "arn:aws:codeconnections:eu-west-1:123456789012:connection/12345678-1234-1234-1234-123456789012",
]
TARGET = ["--python", here().python, "--architecture", here().machine]


@pytest.fixture(scope="module")
def snn():
    app = typer.Typer()
    for name in ("package", "deploy", "upload", "watch", "approve", "destroy"):
        app.command()(getattr(commands, name))
    return lambda *words: CliRunner().invoke(app, words)


def test_package_says_size_fingerprint_and_import_times(snn, tmp_path, packages):
    answer = snn("package", "--out", str(tmp_path / "build"), "--json", *TARGET)
    facts = json.loads(answer.stdout)
    assert [f["sha256"] for f in facts] == [
        packages["training"].sha256,
        packages["launch"].sha256,
    ]
    assert (
        len(list((tmp_path / "build").glob("*.zip"))) == 2
        and facts[0]["milliseconds"]["snn.handlers.neuron"] > 0
    )


@pytest.mark.parametrize(
    "words, sentence",
    [
        (["package", "--architecture", "sparc"], "may be arm64 or x86_64"),
        (["deploy", *FIVE[2:]], "not given: --bucket"),
        (["deploy", *FIVE, "--bucket", "Cats!"], "'Cats!' is not one"),
        (["deploy", *FIVE, "--email", "somebody"], "it looks like somebody@example.com"),
        (["deploy", *FIVE, "--connection", "ghp_token"], "codeconnections"),
        (
            [
                "deploy",
                *FIVE,
                "--certificate",
                "arn:aws:acm:eu-west-1:123456789012:certificate/1",
            ],
            "--certificate and --domain go together",
        ),
        (
            ["deploy", *FIVE, "--reviewers", "everybody"],
            "--reviewers is everybody; it looks like 203.0.113.7/32",
        ),
    ],
)
def test_a_mistake_is_one_sentence(snn, words, sentence):
    error = snn(*words).exception
    assert isinstance(error, InputError) and sentence in str(error) and "\n" not in str(error)


def test_deploy_and_destroy_say_what_they_have_done(snn, packages):
    with local_aws() as aws:
        where = ["--endpoint-url", aws.url, "--region", "us-east-1"]
        assert (
            "Successfully created stack - Cats"
            in (first := snn("deploy", *FIVE, *TARGET, *where)).output
        ), first.exception
        assert "Nothing has changed" in snn("deploy", *FIVE, *TARGET, *where).output
        assert "there is no s3://cats-of-2026/training_input/datasets.h5" in str(
            snn("watch", "--stack", "Cats", *where).exception
        )
        assert "no new version of Cats waits" in str(
            snn("approve", "--stack", "Cats", *where).exception
        )
        assert "nobody to ask" in str(snn("destroy", "--stack", "Cats", *where).exception)
        assert (
            "Successfully deleted stack - Cats"
            in snn("destroy", "--stack", "Cats", "--yes", *where).output
        )
