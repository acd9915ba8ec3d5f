"""The whole way on a local AWS: deploy, upload, train on the packages that were deployed, update, destroy.

MiniStack differs from AWS in ways that these tests do not lean on, and has a fault that they go around: when a nested
stack is updated, it forgets the attributes of those resources in it that stay as they are. So the update here is of
nested stacks without such references.
"""
import os
import shutil
import subprocess
import time
import urllib.request
import zipfile
from pathlib import Path

import msgspec
import pytest

from snn.cloud.bucket import Bucket
from snn.deploy import runs
from snn.deploy.inputs import Account, check, check_stack, describe
from snn.deploy.stack import deploy
from snn.deploy.teardown import destroy, log_groups, tables, tagged
from snn.local.lambda_runtime import Function, Pool, Runtime
from snn.local.server import local_aws, parameter_server
from snn.maths import model
from snn.maths.parameters import InputError

OPTIONS = {"NeuronConcurrency": "20", "Notebook": "no"}


@pytest.fixture
def cloud():
    "A Lambda, a parameter server and an AWS."
    runtime, server, aws = Runtime([]), parameter_server(), local_aws()
    yield runtime, server, aws
    aws.close(); server.close(); runtime.close()


@pytest.fixture
def account(cloud):
    return Account("us-east-1", cloud[2].url)


def install(cloud, account, folder: Path) -> None:
    """Let the local Lambda run the functions just as they were deployed; only the addresses of services are those here.

    The AWS hands events of LaunchLambda to it, if a variable of the function says where."""
    runtime, server, aws = cloud
    here = {**aws.environment(), "SNN_REDIS_URL": server.url, "SNN_REDIS_SECRET": "", "HOME": str(folder)}
    for name in ("LaunchLambda", "TrainerLambda", "NeuronLambda"):
        deployed = account.client("lambda").get_function(FunctionName=f"Cats-{name}")
        settings, place = deployed["Configuration"], folder / name
        with urllib.request.urlopen(deployed["Code"]["Location"]) as answer: (folder / f"{name}.zip").write_bytes(answer.read())
        with zipfile.ZipFile(folder / f"{name}.zip") as file: file.extractall(place)
        function = Function(f"Cats-{name}", settings["Handler"], place, {**settings["Environment"]["Variables"], **here}, settings["Timeout"], settings["MemorySize"])
        runtime.pools[function.name] = Pool(function, runtime)
    variables = {**account.client("lambda").get_function(FunctionName="Cats-LaunchLambda")["Configuration"]["Environment"]["Variables"],
                 "MINISTACK_LAMBDA_PROXY_URL": f"{runtime.url}/2015-03-31/functions/Cats-LaunchLambda/invocations"}
    account.client("lambda").update_function_configuration(FunctionName="Cats-LaunchLambda", Environment={"Variables": variables})


def wait_for(account, run: str):
    return runs.watch(account, "Cats", run, lambda news: None, every=.2, patience=60)


def model_of(account, folder: Path):
    path = folder / "params.h5"
    path.write_bytes(Bucket(account.client("s3"), "cats-of-2026").get("prediction_input/params.h5"))
    return model.read(path)


def test_from_nothing_to_a_model_and_back_to_nothing(cloud, account, inputs, packages, parameters, datasets, tmp_path):
    check(account, inputs)
    seen = []
    assert deploy(account, inputs, packages, OPTIONS, seen.append, .2) == "created"
    assert {e.resource for e in seen} >= {"Network", "Functions", "Storage", "Bucket", "NeuronFunction"}       # nested ones, too

    # Twice changes nothing.
    seen.clear()
    assert deploy(account, inputs, packages, OPTIONS, seen.append, .2) == "unchanged" and seen == []
    with pytest.raises(InputError, match="has the bucket cats-of-2026"): check_stack(account, inputs._replace(bucket="dogs"))

    # An upload with snn upload starts a run on the packages that were deployed.
    install(cloud, account, tmp_path)
    file = tmp_path / "parameters.json"
    file.write_bytes(msgspec.json.encode(parameters))
    run = runs.upload(account, "Cats", datasets, file)
    assert wait_for(account, run).epochs == 3
    first = model_of(account, tmp_path)
    assert first.parameters == parameters

    # An update keeps the data.
    assert deploy(account, inputs, packages, {**OPTIONS, "DailySpend": "30", "CacheNodeType": "cache.t4g.micro"}, seen.append, .2) == "updated"
    assert Bucket(account.client("s3"), "cats-of-2026").keys(f"training_results/{run}/results.json")
    assert account.client("dynamodb").scan(TableName="Cats-Costs", Select="COUNT")["Count"] == 3

    # So does an upload with the AWS command line.
    aws = shutil.which("aws")
    if aws:
        shorter = msgspec.structs.replace(parameters, epochs=2)
        file.write_bytes(msgspec.json.encode(shorter))
        for path, name in ((file, "parameters.json"), (datasets, "datasets.h5")):
            subprocess.run([aws, "--endpoint-url", account.endpoint_url, "s3", "cp", "--quiet", path, f"s3://cats-of-2026/training_input/{name}"],
                           env={**os.environ, **cloud[2].environment()}, check=True)
        assert wait_for(account, runs.newest_run(account, "cats-of-2026")).epochs == 2
        assert model_of(account, tmp_path).parameters == shorter

    # Nothing is left, of versions, tables, logs, buckets or what has the tag.
    account.client("logs").create_log_group(logGroupName="/aws/lambda/Cats-left-by-a-service")
    assert destroy(account, "Cats", every=.2) == []
    assert describe(account, "Cats") is None and not tables(account, "Cats") and not log_groups(account, "Cats") and not tagged(account, "Cats")
    assert account.client("s3").list_buckets()["Buckets"] == []
    with pytest.raises(InputError, match="there is no stack Cats"): destroy(account, "Cats")


def test_a_failed_deployment_says_what_failed_and_can_be_repeated(account, inputs, packages, tmp_path, monkeypatch):
    from snn.deploy import stack
    broken = tmp_path / "infra"
    shutil.copytree(stack.infra_folder(), broken)
    (broken / "observability.yaml").write_text((broken / "observability.yaml").read_text().replace("AWS::CloudWatch::Dashboard", "AWS::CloudWatch::Dashbored"))
    with monkeypatch.context() as patched:
        patched.setattr(stack, "infra_folder", lambda: broken)
        with pytest.raises(RuntimeError, match="Observability.*Dashbored"): deploy(account, inputs, packages, OPTIONS, every=.2)
    assert deploy(account, inputs, packages, OPTIONS, every=.2) == "created"
    assert destroy(account, "Cats", every=.2) == []


def test_a_stack_that_is_not_ours_is_left_alone(account, inputs):
    formation = account.client("cloudformation")
    formation.create_stack(StackName="Cats", TemplateBody='{"Resources": {"Topic": {"Type": "AWS::SNS::Topic"}}}')
    deadline = time.monotonic() + 10
    while describe(account, "Cats")["StackStatus"] != "CREATE_COMPLETE" and time.monotonic() < deadline: time.sleep(.05)
    with pytest.raises(InputError, match="not ours"): check(account, inputs)
    with pytest.raises(InputError, match="not one of ours"): destroy(account, "Cats")
    formation.delete_stack(StackName="Cats")


def test_what_cannot_be_deleted_is_named(account, inputs, packages, monkeypatch):
    from botocore.exceptions import ClientError
    from snn.deploy import teardown
    assert deploy(account, inputs, packages, OPTIONS, every=.2) == "created"
    with monkeypatch.context() as patched:
        def refuse(account, name): raise ClientError({"Error": {"Code": "AccessDenied", "Message": "not yours"}}, "DeleteObjects")
        patched.setitem(teardown.EMPTY, "AWS::S3::Bucket", refuse)
        remains = destroy(account, "Cats", every=.2)
    assert any("cats-of-2026" in r.what and "not yours" in r.why for r in remains)
