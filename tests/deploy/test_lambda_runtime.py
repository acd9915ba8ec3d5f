import json
import os
import subprocess
import sys
import time

import boto3
import msgspec
import pytest

from snn.cloud.messages import Plan
from snn.deploy.wheels import Target, find_python, here
from snn.local import cloud as local_cloud
from snn.local.lambda_runtime import Function, LambdaWorkers, Runtime
from snn.local.server import local_aws, parameter_server
from snn.local.training import train

HANDLER = """
import os, time
def lambda_handler(event, context):
    time.sleep(event.get("sleep", 0))
    if "allocate" in event: bytearray(event["allocate"] * 2**20)
    if "stumble" in event: raise ValueError(event["stumble"])
    return os.getpid()
"""


def until(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert condition()


@pytest.fixture
def lambda_client(tmp_path):
    (tmp_path / "demo.py").write_text(HANDLER)
    function = Function(
        "Demo", "demo.lambda_handler", tmp_path, {}, timeout=2, memory=256, concurrency=2
    )
    with Runtime([function]) as runtime:
        client = boto3.client(
            "lambda",
            endpoint_url=runtime.url,
            region_name="us-east-1",
            aws_access_key_id="x",
            aws_secret_access_key="x",
            config=boto3.session.Config(retries={"total_max_attempts": 1}),
        )
        client.runtime = runtime
        yield client


def ask(client, **event):
    answer = client.invoke(FunctionName="Demo", Payload=json.dumps(event))
    return answer.get("FunctionError"), json.loads(answer["Payload"].read())


def test_a_process_stays_warm_and_others_are_started_as_needed(lambda_client):
    (_, first), (_, second) = ask(lambda_client), ask(lambda_client)
    assert first == second
    for _ in range(2):
        lambda_client.invoke(
            FunctionName="Demo", InvocationType="Event", Payload=b'{"sleep": 1}'
        )
    until(lambda: len(lambda_client.runtime.pools["Demo"].environments) == 2)
    with pytest.raises(lambda_client.exceptions.TooManyRequestsException):
        ask(lambda_client)
    with pytest.raises(lambda_client.exceptions.ResourceNotFoundException):
        lambda_client.invoke(FunctionName="Nobody")


def test_a_timeout_ends_the_process(lambda_client):
    _, pid = ask(lambda_client)
    failed, answer = ask(lambda_client, sleep=10)
    assert failed and "timed out after 2.00 seconds" in answer["errorMessage"]
    assert ask(lambda_client)[1] != pid


@pytest.mark.skipif(
    sys.platform != "linux", reason="only Linux can limit another process's memory"
)
def test_memory_is_limited(lambda_client):
    assert ask(lambda_client, allocate=10)[0] is None
    failed, answer = ask(lambda_client, allocate=1000)
    assert failed and answer["errorType"] == "MemoryError"


def test_an_event_is_tried_three_times_and_then_put_aside(lambda_client):
    lambda_client.invoke(
        FunctionName="Demo", InvocationType="Event", Payload=b'{"stumble": "over a root"}'
    )
    until(lambda: lambda_client.runtime.dead)
    (letter,) = lambda_client.runtime.dead
    assert (
        letter["requestPayload"] == {"stumble": "over a root"}
        and letter["responsePayload"]["errorMessage"] == "over a root"
    )
    assert (
        letter["requestContext"]["condition"] == "RetriesExhausted"
        and letter["requestContext"]["approximateInvokeCount"] == 3
    )


def test_a_handler_that_is_not_there_fails_and_does_not_spin(tmp_path):
    with Runtime([Function("Demo", "nothing.lambda_handler", tmp_path, {})]) as runtime:
        for _ in range(2):
            runtime.put("Demo", b"{}")
        until(lambda: len(runtime.dead) == 2)
        assert (
            "No module named 'nothing'" in runtime.dead[0]["responsePayload"]["errorMessage"]
        )


def test_nothing_is_left_when_the_program_is_killed(tmp_path):
    (tmp_path / "demo.py").write_text(HANDLER)
    program = f"""
import time; from pathlib import Path; from snn.local.lambda_runtime import Function, Runtime
runtime = Runtime([Function("Demo", "demo.lambda_handler", Path({str(tmp_path)!r}), {{}})])
runtime.put("Demo", b"{{}}")
while not runtime.pools["Demo"].idle: time.sleep(.01)
print(runtime.pools["Demo"].idle[0].process.pid, flush=True); time.sleep(60)
"""
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, text=True
    )
    pid = int(process.stdout.readline())
    process.kill()
    process.wait()

    def gone():
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        try:
            return open(f"/proc/{pid}/stat").read().split()[2] == "Z"
        except OSError:
            return True

    until(gone)


def test_an_event_that_fails_for_good_ends_its_run(packages, parameters):
    endless = msgspec.structs.replace(parameters, epochs=10**6)
    with parameter_server() as server, local_aws() as aws:
        aws.client("s3").create_bucket(Bucket="cats")
        workers = LambdaWorkers({**aws.environment(), "SNN_REDIS_URL": server.url}, 1)
        services = workers.services
        services.runs.begin(
            Plan(
                "demo",
                endless,
                "cats",
                "images.npz",
                20,
                192,
                8,
                ("non-cat", "cat"),
                "etag",
                "",
            )
        )
        event = {
            "function": "NeuronLambda",
            "direction": "forward",
            "run": "demo",
            "epoch": 3,
            "batch": 0,
            "layer": 9,
            "count": 1,
        }
        workers.runtime.put("NeuronLambda", json.dumps(event).encode())
        until(lambda: workers.look_after() or services.runs.status("demo").state == "failed")
        assert services.runs.status("demo").reason.startswith(
            "demo/3/0/NeuronLambda/forward/9/0 failed 3 times: IndexError"
        )
        assert [letter["event"] for letter in services.bus.dead()] == [event]
        workers.close()


def trained(folder, parameters, datasets, workers):
    "The model that a training with these workers leaves."
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(local_cloud, "Workers", workers)
        outcome = train(parameters, datasets, folder, workers=2)
    assert outcome.epochs == 3
    return outcome.files["params.h5"].read_bytes()


@pytest.fixture(scope="module")
def inline(tmp_path_factory, parameters, datasets):
    "The model that the handlers leave, called as functions."
    return trained(
        tmp_path_factory.mktemp("inline"), parameters, datasets, local_cloud.Workers
    )


def test_the_packages_train_to_the_same_bytes_as_the_handlers_inline(
    tmp_path, packages, parameters, datasets, inline
):
    assert trained(tmp_path, parameters, datasets, LambdaWorkers) == inline


@pytest.mark.skipif(
    here().system != "linux"
    or here().machine != "x86_64"
    or not find_python("3.13")
    or here().python == "3.13",
    reason="needs a python3.13 for x86-64 on Linux, on the PATH or in pyenv, beside the one that runs the tests",
)
def test_the_very_package_for_python_3_13_trains_to_the_same_bytes(
    tmp_path, parameters, datasets, inline
):
    on_3_13 = lambda environment, count: LambdaWorkers(
        environment, count, Target("3.13", "x86_64")
    )
    assert trained(tmp_path, parameters, datasets, on_3_13) == inline
