import json

import pytest
import typer
from typer.testing import CliRunner

from snn.cli import deploy as commands
from snn.deploy import runs
from snn.deploy.inputs import Account
from snn.deploy.wheels import here
from snn.errors import InputError
from snn.local.server import local_aws

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
    return lambda *words, **options: CliRunner().invoke(app, words, **options)


def test_package_says_size_fingerprint_and_import_times(snn, tmp_path, packages):
    answer = snn("package", "--out", str(tmp_path / "build"), "--json", *TARGET)
    facts = json.loads(answer.stdout)
    assert [f["sha256"] for f in facts] == [
        packages["training"].sha256,
        packages["launch"].sha256,
    ]
    assert (
        len(list((tmp_path / "build").glob("*.zip"))) == 2
        and facts[0]["milliseconds"]["snn.handlers.protocol"] > 0
        and facts[0]["milliseconds_with_clients"]["snn.handlers.protocol"] > 0
    )


@pytest.mark.parametrize(
    "words, sentence",
    [
        (["package", "--architecture", "sparc"], "may be arm64 or x86_64"),
        (["deploy", *FIVE[2:]], "not given: --bucket"),
        (["deploy", *FIVE, "--profile", "small"], "may be minimal, standard, full"),
        (["deploy", *FIVE, "--set", "LogRetention=long"], "it may be a number"),
        (
            ["deploy", *FIVE, "--sleep-after", "5m"],
            "--sleep-after is 5m; it may be 15m or longer",
        ),
        (
            ["deploy", *FIVE, "--sleep-after", "soon"],
            "--sleep-after is soon; it may be a time",
        ),
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


@pytest.fixture
def at_a_terminal(monkeypatch):
    "Deployments by somebody who can be asked, to an AWS that is not there; returns the options of each."
    deployed = []
    patch = monkeypatch.setattr
    patch("snn.cli.deploy._can_ask", lambda: True)
    patch("snn.deploy.inputs.check", lambda account, inputs: None)
    patch("snn.deploy.inputs.kept", lambda account, stack: deployed[-1] if deployed else {})
    patch("snn.deploy.inputs.concurrency", lambda *rest: 0)
    patch("snn.deploy.inputs.quota", lambda account: 1000)
    patch("snn.deploy.inputs.zones", lambda *rest: ["eu-west-1b", "eu-west-1c"])
    patch("snn.deploy.inputs.last_time", lambda *rest: ({}, {}))
    patch("snn.deploy.inputs.own_address", lambda: "203.0.113.9")
    patch("snn.deploy.package.build", lambda name, target: None)
    patch("snn.deploy.runs.parameters_there", lambda *rest: runs.project_parameters())

    def deploy(account, inputs, packages, options, *rest):
        deployed.append({**options, **inputs._asdict()})
        return "created"

    patch("snn.deploy.stack.deploy", deploy)
    return deployed


def test_deploy_asks_five_questions_and_from_where_a_new_version_may_be_seen(
    snn, at_a_terminal
):
    answers = [*FIVE[1:6:2], FIVE[9], FIVE[7], ""]
    said = snn("deploy", "--region", "eu-west-1", input="\n".join(answers) + "\n").output
    asked = [
        "S3 bucket",
        "stack",
        "GitHub user",
        "connection to GitHub",
        "E-mail",
        "new version may be looked at, - for none [203.0.113.9]",
        "Successfully created/updated stack - Cats",
        "Confirm the subscription: a mail has gone to somebody@example.com",
    ]
    places = [said.index(words) for words in asked]
    assert places == sorted(places)
    assert at_a_terminal[0]["ReviewRange"] == "203.0.113.9/32"
    assert at_a_terminal[0]["bucket"] == "cats-of-2026"
    # A second deployment keeps the answer, and the name of the repository.
    snn("deploy", *FIVE, "--repository", "my-network", "--region", "eu-west-1")
    snn("deploy", *FIVE, "--region", "eu-west-1")
    assert at_a_terminal[2]["ReviewRange"] == "203.0.113.9/32"
    assert at_a_terminal[2]["GitHubRepository"] == "my-network"


@pytest.mark.parametrize(
    "words",
    [
        ["--profile", "minimal"],
        ["--no-pipeline", "--no-notebook"],
        ["--set", "Pipeline=no", "--set", "Notebook=no"],
    ],
)
def test_without_pipeline_and_notebook_nobody_asks_for_github(words, snn, at_a_terminal):
    said = snn("deploy", *FIVE[:4], *FIVE[6:8], *words, "--region", "eu-west-1")
    assert "GitHub" not in said.output and said.exit_code == 0, said.exception
    (made,) = at_a_terminal
    assert (made["github_user"], made["connection"]) == ("", "")
    assert (made["Notebook"], made["Pipeline"]) == ("no", "no")
    assert (made["FirstZone"], made["SecondZone"]) == ("eu-west-1b", "eu-west-1c")


def test_a_notebook_needs_the_clone_and_no_connection(snn, at_a_terminal):
    words = [*FIVE[:4], *FIVE[6:8], "--no-pipeline", "--region", "eu-west-1"]
    said = snn("deploy", *words, input="somebody\n").output
    assert "GitHub user" in said and "connection" not in said
    assert (at_a_terminal[0]["github_user"], at_a_terminal[0]["connection"]) == (
        "somebody",
        "",
    )


@pytest.mark.parametrize("answer, range", [("-", ""), ("198.51.100.0/24", "198.51.100.0/24")])
def test_nobody_or_others_may_look_at_a_new_version(answer, range, snn, at_a_terminal):
    snn("deploy", *FIVE, "--region", "eu-west-1", input=f"{answer}\n")
    assert at_a_terminal[0]["ReviewRange"] == range


def test_deploy_and_destroy_say_what_they_have_done(snn, packages, root, monkeypatch):
    with local_aws() as aws:
        where = ["--endpoint-url", aws.url, "--region", "us-east-1"]
        assert (
            "Successfully created/updated stack - Cats"
            in (first := snn("deploy", *FIVE, *TARGET, *where)).output
        ), first.exception
        s3, place = (
            Account("us-east-1", aws.url).client("s3"),
            "training_input/parameters.json",
        )
        ours = (root / "parameters.json").read_bytes()
        there = lambda: s3.get_object(Bucket="cats-of-2026", Key=place)["Body"].read()
        assert there() == ours, "a data set is enough to start a run"
        assert "confirm the subscription" in first.output.lower()
        s3.put_object(Bucket="cats-of-2026", Key=place, Body=b'{"epochs": 7}')
        again = snn("deploy", *FIVE, *TARGET, *where).output
        assert "Nothing has changed" in again and "stays as it is" in again
        assert there() == b'{"epochs": 7}'
        short = snn("deploy", "--stack", "Cats", *TARGET, *where)
        assert "Nothing has changed" in short.output, short.exception
        with monkeypatch.context() as patch:
            patch.setattr(commands, "_can_ask", lambda: True)
            answer = lambda word: snn("deploy", *FIVE, *TARGET, *where, input=word).output
            assert "Replace it?" in answer("n\n") and there() == b'{"epochs": 7}'
            assert "Replace it?" in answer("y\n") and there() == ours
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
