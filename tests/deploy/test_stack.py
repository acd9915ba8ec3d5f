"""The whole way on a local AWS: deploy, upload, train on the packages that were deployed, update, destroy.

MiniStack differs from AWS in ways that these tests do not lean on, and has a fault that they go around: when a nested
stack is updated, it forgets the attributes of those resources in it that stay as they are. So the update of the whole
here is of nested stacks without such references, and the functions' code is updated in a stack of their own.
"""

import base64
import hashlib
import json
import os
import shutil
import subprocess
import time
import warnings
import zipfile
from pathlib import Path

import msgspec
import pytest

from snn.backends.aws.bucket import Bucket
from snn.data import models
from snn.deploy import runs
from snn.deploy.doctor import doctor
from snn.deploy.inputs import Account, check, check_stack, describe
from snn.deploy.stack import deploy, failure, follow, infra_folder, put_once, upload_artifacts
from snn.deploy.teardown import (
    Resource,
    delete_interfaces,
    destroy,
    empty_registry,
    stop_service,
    tables,
    tagged,
)
from snn.errors import InputError
from snn.local.lambda_runtime import Runtime
from snn.local.server import local_aws, parameter_server
from snn.local.stack import install

UNSEEN = {
    "zones",
    "network",
    "service-linked roles",
    "mail",
    "budget",
}  # what a local AWS can't tell
OPTIONS = {"NeuronConcurrency": "20", "Notebook": "no"}


@pytest.fixture
def cloud():
    "A Lambda, a parameter server and an AWS."
    runtime, server, aws = Runtime([]), parameter_server(), local_aws()
    yield runtime, server, aws
    aws.close()
    server.close()
    runtime.close()


@pytest.fixture
def account(cloud):
    return Account("us-east-1", cloud[2].url)


def wait_for(account, run: str):
    return runs.watch(account, "Cats", run, lambda news: None, every=0.2, patience=60)


def model_of(account, folder: Path):
    path = folder / "params.h5"
    path.write_bytes(
        Bucket(account.client("s3"), "cats-of-2026").get("prediction_input/params.h5")
    )
    return models.read(path)


def test_from_nothing_to_a_model_and_back_to_nothing(
    cloud, account, inputs, packages, parameters, datasets, tmp_path, until
):
    check(account, inputs)
    seen = []
    assert deploy(account, inputs, packages, OPTIONS, seen.append, 0.2) == "created"
    assert {e.resource for e in seen} >= {
        "Network",
        "Functions",
        "Storage",
        "Bucket",
        "NeuronFunction",
    }  # nested ones, too

    # Twice changes nothing.
    seen.clear()
    assert (
        deploy(account, inputs, packages, OPTIONS, seen.append, 0.2) == "unchanged"
        and seen == []
    )
    with pytest.raises(InputError, match="has the bucket cats-of-2026"):
        check_stack(account, inputs._replace(bucket="dogs"))

    # An upload with snn upload starts a run on the packages that were deployed.
    install(*cloud, account, "Cats", tmp_path)
    file = tmp_path / "parameters.json"
    file.write_bytes(msgspec.json.encode(parameters))
    run = runs.upload(account, "Cats", datasets, file)
    assert wait_for(account, run).epochs == 3
    first = model_of(account, tmp_path)
    assert first.parameters == parameters

    # The doctor finds nothing wrong, from outside and from inside each function.
    found = {f.what: f for f in doctor(account, "Cats")}
    assert {what for what, f in found.items() if f.state != "ok"} <= UNSEEN, found
    assert "reaches lambda, sns" in found["NeuronLambda"].words

    # An update keeps the data.
    assert (
        deploy(
            account,
            inputs,
            packages,
            {**OPTIONS, "DailySpend": "30", "CacheNodeType": "cache.t4g.micro"},
            seen.append,
            0.2,
        )
        == "updated"
    )
    assert Bucket(account.client("s3"), "cats-of-2026").keys(
        f"training_results/{run}/results.json"
    )
    assert (
        account.client("dynamodb").scan(TableName="Cats-Costs", Select="COUNT")["Count"] == 3
    )

    # So does an upload with the AWS command line.
    aws = shutil.which("aws")
    if not aws:
        warnings.warn(
            "there is no AWS command line on the PATH, so no upload was made with it"
        )
    else:
        shorter = msgspec.structs.replace(parameters, epochs=2)
        file.write_bytes(msgspec.json.encode(shorter))
        for path, name in ((file, "parameters.json"), (datasets, "datasets.h5")):
            subprocess.run(
                [
                    aws,
                    "--endpoint-url",
                    account.endpoint_url,
                    "s3",
                    "cp",
                    "--quiet",
                    path,
                    f"s3://cats-of-2026/training_input/{name}",
                ],
                env={**os.environ, **cloud[2].environment()},
                check=True,
            )
        assert wait_for(account, runs.newest_run(account, "cats-of-2026")).epochs == 2
        assert model_of(account, tmp_path).parameters == shorter

    # From a laptop, which can't reach the parameter server, a run is stopped and taken up again.
    file.write_bytes(
        msgspec.json.encode(msgspec.structs.replace(parameters, epochs=10**6 + 1))
    )
    run = runs.upload(account, "Cats", datasets, file)
    until(lambda: runs.newest_cost(account, "Cats", run)[0], "the run has begun")
    order = lambda state: runs.order(account, "Cats", state, run)
    with pytest.raises(InputError, match="is running; stop it first"):
        order("resume")
    assert order("stop").startswith(f"Stopped run {run} after")
    assert runs.standings(account, "cats-of-2026")[run] == "stopped"
    with pytest.raises(InputError, match="is not running: it has stopped"):
        order("stop")
    assert order("resume") == f"Run {run} goes on as {run}~1."
    assert runs.standings(account, "cats-of-2026")[run] == "begun"
    assert order("stop").startswith(f"Stopped run {run} after")

    # The same files as a run of its own. A message that fails for good ends it: Lambda publishes it, and the topic does the rest.
    stopped = run
    run = runs.upload(account, "Cats", datasets, None, again=True)
    assert run not in (stopped, *runs.standings(account, "cats-of-2026"))
    until(lambda: runs.newest_cost(account, "Cats", run)[0], "the run has begun")
    cloud[0].put(
        "Cats-NeuronLambda",
        json.dumps(
            {
                "function": "NeuronLambda",
                "direction": "forward",
                "run": run,
                "epoch": 10**6,
                "batch": 0,
                "layer": 9,
                "count": 1,
            }
        ).encode(),
    )
    until(lambda: cloud[0].dead, "it has failed three times")
    (topic,) = (
        item["TopicArn"]
        for item in account.client("sns").list_topics()["Topics"]
        if item["TopicArn"].endswith("Cats-failures")
    )
    account.client("sns").publish(TopicArn=topic, Message=json.dumps(cloud[0].dead[0]))
    with pytest.raises(
        RuntimeError, match="NeuronLambda/forward/9/0 failed 3 times: IndexError"
    ):
        wait_for(account, run)
    queue = account.client("sqs").get_queue_url(QueueName="Cats-dead-letters")["QueueUrl"]
    (kept,) = account.client("sqs").receive_message(QueueUrl=queue)["Messages"]
    assert json.loads(kept["Body"])["requestPayload"]["layer"] == 9

    # Nothing is left, of versions, tables, logs, buckets or what has the tag; what is another stack's stays.
    logs, another = account.client("logs"), "/aws/lambda/Cats-and-dogs-NeuronLambda"
    logs.delete_log_group(logGroupName="/aws/lambda/Cats-NeuronLambda")
    for name in ("/aws/lambda/Cats-NeuronLambda", another):
        logs.create_log_group(logGroupName=name)  # the first as Lambda makes it, not the stack
    assert len(tagged(account, "Cats")) > 10
    assert destroy(account, "Cats", every=0.2) == []
    assert (
        describe(account, "Cats") is None
        and not tables(account, "Cats")
        and not tagged(account, "Cats")
    )
    assert [group["logGroupName"] for group in logs.describe_log_groups()["logGroups"]] == [
        another
    ]
    assert account.client("s3").list_buckets()["Buckets"] == []
    with pytest.raises(InputError, match="there is no stack Cats"):
        destroy(account, "Cats")


def test_new_code_goes_to_the_functions_that_it_is_of(account, inputs, packages, tmp_path):
    formation, artifacts = (
        account.client("cloudformation"),
        upload_artifacts(account, inputs, packages),
    )
    given = {
        "StackName": "Cats",
        "BucketName": inputs.bucket,
        "Email": inputs.email,
        "NeuronConcurrency": "0",
        "FunctionMemory": "1024",
        "CacheNamespace": "",
        "LogRetention": "7",
        "Tracing": "PassThrough",
        "Subnets": "subnet-1",
        "SecurityGroup": "sg-1",
        "CacheUrl": "rediss://there",
        "CacheSecret": "arn:there",
        "ModelCopy": "",
        **{
            name: artifacts[name]
            for name in ("Artifacts", "LaunchPackage", "TrainingPackage", "Architecture")
        },
    }

    def bring(change, **changed):
        change(
            StackName="Cats",
            TemplateBody=(infra_folder() / "functions.yaml").read_text(),
            Capabilities=["CAPABILITY_IAM"],
            Parameters=[
                {"ParameterKey": name, "ParameterValue": value}
                for name, value in {**given, **changed}.items()
            ],
        )
        status, events = follow(
            account, describe(account, "Cats")["StackId"], set(), lambda event: None, 0.1
        )
        assert status.endswith("_COMPLETE") and "ROLLBACK" not in status, failure(events)
        return {
            name: account.client("lambda").get_function(FunctionName=f"Cats-{name}Lambda")[
                "Configuration"
            ]["CodeSha256"]
            for name in ("Launch", "Trainer", "Neuron")
        }

    before = bring(formation.create_stack)
    package = tmp_path / "new.zip"
    shutil.copy(packages["training"].path, package)
    with zipfile.ZipFile(package, "a") as file:
        file.writestr("news.txt", "an epoch ago")
    put_once(account, artifacts["Artifacts"], "packages/new.zip", package.read_bytes())
    after = bring(formation.update_stack, TrainingPackage="packages/new.zip")
    assert after["Launch"] == before["Launch"]
    assert (
        after["Trainer"]
        == after["Neuron"]
        == base64.b64encode(hashlib.sha256(package.read_bytes()).digest()).decode()
        != before["Neuron"]
    )


def test_an_upload_puts_parameters_first_and_wrong_files_nowhere(
    account, inputs, parameters, datasets, tmp_path, monkeypatch
):
    s3, put = account.client("s3"), []
    s3.create_bucket(Bucket=inputs.bucket)
    monkeypatch.setattr(runs, "bucket_of", lambda account, stack: inputs.bucket)
    s3.meta.events.register(
        "provide-client-params.s3.PutObject", lambda params, **rest: put.append(params["Key"])
    )
    file = tmp_path / "parameters.json"
    file.write_bytes(b'{"epochs": -1}')
    with pytest.raises(InputError):
        runs.upload(account, "Cats", datasets, file)
    with pytest.raises(InputError, match="give --parameters"):
        runs.upload(account, "Cats", datasets, None)
    assert put == []
    file.write_bytes(msgspec.json.encode(parameters))
    first = runs.upload(account, "Cats", datasets, file)
    assert put == ["training_input/parameters.json", "training_input/datasets.h5"]
    assert (
        runs.upload(account, "Cats", datasets, None)
        == first
        == runs.newest_run(account, inputs.bucket)
    )


def test_watch_shows_what_went_wrong(account):
    logs, group = (
        account.client("logs"),
        {"logGroupName": "/aws/lambda/Cats-NeuronLambda", "logStreamName": "one"},
    )
    logs.create_log_group(logGroupName=group["logGroupName"])
    logs.create_log_stream(**group)
    lines = [
        {"level": "INFO", "run": "demo", "message": "finished"},
        {
            "level": "ERROR",
            "run": "demo",
            "epoch": 3,
            "neuron": 4,
            "message": "ValueError: over a stone",
        },
    ]
    began = time.time()
    logs.put_log_events(
        **group,
        logEvents=[
            {"timestamp": round(time.time() * 1000), "message": json.dumps(line)}
            for line in lines
        ],
    )
    assert runs.errors_since(account, "Cats", began - 1) == [
        "NeuronLambda: run demo, epoch 3, neuron 4: ValueError: over a stone"
    ]
    assert runs.errors_since(account, "Cats", began + 60) == []


def test_a_failed_deployment_says_what_failed_and_can_be_repeated(
    account, inputs, packages, tmp_path, monkeypatch
):
    from snn.deploy import stack

    broken = tmp_path / "infra"
    shutil.copytree(stack.infra_folder(), broken)
    (broken / "observability.yaml").write_text(
        (broken / "observability.yaml")
        .read_text()
        .replace("AWS::CloudWatch::Dashboard", "AWS::CloudWatch::Dashbored")
    )
    with monkeypatch.context() as patched:
        patched.setattr(stack, "infra_folder", lambda: broken)
        with pytest.raises(RuntimeError, match="Observability.*Dashbored"):
            deploy(account, inputs, packages, OPTIONS, every=0.2)
    assert deploy(account, inputs, packages, OPTIONS, every=0.2) == "created"
    assert destroy(account, "Cats", every=0.2) == []


def test_a_stack_that_is_not_ours_is_left_alone(account, inputs, until):
    formation = account.client("cloudformation")
    formation.create_stack(
        StackName="Cats", TemplateBody='{"Resources": {"Topic": {"Type": "AWS::SNS::Topic"}}}'
    )
    until(
        lambda: describe(account, "Cats")["StackStatus"] == "CREATE_COMPLETE",
        "the stack is there",
    )
    with pytest.raises(InputError, match="not ours"):
        check(account, inputs)
    with pytest.raises(InputError, match="not one of ours"):
        destroy(account, "Cats")
    formation.delete_stack(StackName="Cats")


def test_a_stack_that_is_stuck_says_what_frees_it(account, inputs, monkeypatch):
    from snn.deploy import inputs as asked

    monkeypatch.setattr(
        asked, "describe", lambda account, stack: {"StackStatus": "UPDATE_ROLLBACK_FAILED"}
    )
    with pytest.raises(InputError, match="Continue update rollback"):
        check_stack(account, inputs)


def test_what_a_service_and_an_image_would_leave_is_removed(account):
    ecr, ecs, ec2 = (account.client(name) for name in ("ecr", "ecs", "ec2"))
    ecr.create_repository(repositoryName="cats")
    for tag in ("one", "two"):
        ecr.put_image(
            repositoryName="cats",
            imageTag=tag,
            imageManifest=json.dumps({"schemaVersion": 2, "config": {"digest": tag}}),
        )
    assert empty_registry(account, "cats") == 2 and empty_registry(account, "cats") == 0
    ecs.create_cluster(clusterName="cats")
    task = ecs.register_task_definition(
        family="cats", containerDefinitions=[{"name": "api", "image": "cats", "memory": 128}]
    )["taskDefinition"]["taskDefinitionArn"]
    service = ecs.create_service(
        cluster="cats", serviceName="api", taskDefinition=task, desiredCount=0
    )["service"]["serviceArn"]
    ecs.update_service(cluster="cats", service="api", desiredCount=1)
    stop_service(account, service)
    assert (
        ecs.describe_services(cluster="cats", services=["api"])["services"][0]["desiredCount"]
        == 0
    )
    vpc = ec2.create_vpc(CidrBlock="10.0.0.0/16")["Vpc"]["VpcId"]
    subnet = ec2.create_subnet(VpcId=vpc, CidrBlock="10.0.0.0/24")["Subnet"]["SubnetId"]
    group = ec2.create_security_group(GroupName="cats", Description="cats", VpcId=vpc)[
        "GroupId"
    ]
    ec2.create_network_interface(SubnetId=subnet, Groups=[group])
    assert delete_interfaces(account, []) == 0
    assert (
        delete_interfaces(account, [Resource("AWS::EC2::SecurityGroup", group)]) == 1
        and not ec2.describe_network_interfaces()["NetworkInterfaces"]
    )


def test_what_cannot_be_deleted_is_named(account, inputs, packages, monkeypatch):
    from botocore.exceptions import ClientError

    from snn.deploy import teardown

    assert deploy(account, inputs, packages, OPTIONS, every=0.2) == "created"
    with monkeypatch.context() as patched:

        def refuse(account, name):
            raise ClientError(
                {"Error": {"Code": "AccessDenied", "Message": "not yours"}}, "DeleteObjects"
            )

        patched.setitem(teardown.EMPTY, "AWS::S3::Bucket", refuse)
        remains = destroy(account, "Cats", every=0.2)
    assert any("cats-of-2026" in r.what and "not yours" in r.why for r in remains)
