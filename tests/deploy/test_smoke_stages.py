"""The smoke test goes on where it stopped, and says what it did not try. tests/fresh runs all of it."""

import json
from io import BytesIO
from types import SimpleNamespace

import boto3
import pytest
from botocore.response import StreamingBody
from botocore.stub import Stubber

from snn.deploy import smoke as smoking
from snn.deploy.smoke import Record, Result, report, smoke
from snn.errors import InputError

ACCOUNT = SimpleNamespace(endpoint_url=None)
INPUTS = SimpleNamespace(stack="scratch")


@pytest.fixture
def stages(monkeypatch):
    "Stages that only note that they ran; the first name in `failing` fails, once."
    ran, failing = [], []

    def stage(name):
        def run(*rest, **more):
            ran.append(name)
            if failing == [name]:
                failing.clear()
                raise RuntimeError(f"{name} failed")
            facts = {"run": str(len(ran)), "granularity": "layer", "dollars": 0.5}
            return {
                "deploy": "created",
                "train": Result("5 epochs", facts=facts),
                "approve": Result("not tried", ("approve: the profile has no pipeline",)),
            }.get(name, Result("done"))

        return run

    for name in ("deploy", "examine", "train", "measure", "predict", "approve", "destroy"):
        monkeypatch.setattr(smoking, name, stage(name))
    return ran, failing


def run(path, said, installed=lambda: None):
    record = Record(path, "scratch")
    smoke(ACCOUNT, INPUTS, {}, {}, record, said.append, installed)
    return record


def test_a_smoke_test_that_was_interrupted_goes_on_where_it_stopped(stages, tmp_path):
    (ran, failing), path, said = stages, tmp_path / "smoke.json", []
    failing.append("predict")
    with pytest.raises(RuntimeError, match="predict failed"):
        run(path, said)
    assert ran == ["deploy", "examine", *["train"] * 6, "measure", "predict"]
    ran.clear()
    record = run(path, said)
    assert ran == ["predict", "approve", "destroy"]
    assert "deploy: was done before" in said
    lines = report(record, {}, "us-east-1")
    assert "3.0000 USD for the runs" in lines[-2]
    assert lines[-1] == "Not tried: approve: the profile has no pipeline"


def test_one_that_has_ended_does_nothing_more(stages, tmp_path):
    run(tmp_path / "smoke.json", [])
    stages[0].clear()
    run(tmp_path / "smoke.json", [], lambda: pytest.fail("there is no stack any more"))
    assert stages[0] == []


def test_a_record_of_another_stack_is_refused(stages, tmp_path):
    run(tmp_path / "smoke.json", [])
    with pytest.raises(InputError, match="is of the stack scratch; give another --record"):
        Record(tmp_path / "smoke.json", "dogs")


def test_without_an_address_for_mails_nothing_is_touched(snn, tmp_path):
    code, _, errors = snn("smoke", "--record", tmp_path / "smoke.json")
    assert code == 2 and "--email says who is told" in errors.replace("\n", " ")
    assert not (tmp_path / "smoke.json").exists()


def said(value, **more):
    "What the API of Lambda answers."
    content = json.dumps(value).encode()
    return {
        "StatusCode": 200,
        "Payload": StreamingBody(BytesIO(content), len(content)),
        **more,
    }


def test_measuring_waits_for_a_place_and_for_nothing_else():
    client = boto3.client("lambda", region_name="eu-west-1")
    account = SimpleNamespace(client=lambda service: client)
    full = {"errorMessage": "Proxy target returned HTTP 429: Rate Exceeded"}
    with Stubber(client) as stub:
        stub.add_client_error("invoke", "TooManyRequestsException")
        stub.add_response("invoke", said(full, FunctionError="Unhandled"))
        stub.add_response("invoke", said({"deliver": [0.02]}))
        assert smoking.latencies(account, "scratch", every=0) == {"deliver": [0.02]}
        stub.add_response(
            "invoke", said({"errorMessage": "no cache"}, FunctionError="Unhandled")
        )
        with pytest.raises(
            RuntimeError, match="scratch-NeuronLambda could not measure.*no cache"
        ):
            smoking.latencies(account, "scratch", every=0)
        for _ in range(2):
            stub.add_response("invoke", said(full, FunctionError="Unhandled"))
        with pytest.raises(RuntimeError, match="429"):
            smoking.latencies(account, "scratch", every=0, tries=2)
        stub.assert_no_pending_responses()
