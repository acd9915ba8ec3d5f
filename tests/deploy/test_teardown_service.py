"""`snn destroy` also takes what the pipeline has made: on a local AWS, with the service's own template and a stand-in for the
rest, since MiniStack knows no CodePipeline. Approval is tried against the API's description, since it knows no pauses either."""

import json
import time

import pytest
from botocore.stub import Stubber

from snn.deploy.approval import answer, waiting
from snn.deploy.inputs import TAG, Account, describe
from snn.deploy.stack import infra_folder
from snn.deploy.teardown import destroy, own_stacks, resources
from snn.errors import InputError
from snn.local.server import local_aws

REST = {
    "Parameters": {"BucketName": {"Type": "String"}},
    "Resources": {
        "Bucket": {
            "Type": "AWS::S3::Bucket",
            "Properties": {
                "BucketName": {"Ref": "BucketName"},
                "VersioningConfiguration": {"Status": "Enabled"},
            },
        },
        "Artifacts": {
            "Type": "AWS::S3::Bucket",
            "Properties": {
                "BucketName": "cats-pipeline",
                "VersioningConfiguration": {"Status": "Enabled"},
            },
        },
        "Repository": {
            "Type": "AWS::ECR::Repository",
            "Properties": {"RepositoryName": "cats"},
        },
        "Cluster": {"Type": "AWS::ECS::Cluster", "Properties": {"ClusterName": "Cats"}},
        "ServiceLogs": {
            "Type": "AWS::Logs::LogGroup",
            "Properties": {"LogGroupName": "/ecs/Cats"},
        },
        "Build": {
            "Type": "AWS::CodeBuild::Project",
            "Properties": {
                "Name": "Cats-build",
                "ServiceRole": "arn:aws:iam::000000000000:role/b",
                "Artifacts": {"Type": "NO_ARTIFACTS"},
                "Source": {"Type": "NO_SOURCE", "BuildSpec": "version: 0.2"},
                "Environment": {
                    "Type": "ARM_CONTAINER",
                    "Image": "a",
                    "ComputeType": "BUILD_GENERAL1_SMALL",
                },
            },
        },
    },
}
SERVICE = {
    "StackName": "Cats",
    "Image": "cats@sha256:1",
    "Model": "3f2a",
    "Architecture": "arm64",
    "Cluster": "Cats",
    "LogGroup": "/ecs/Cats",
    "ExecutionRole": "arn:aws:iam::000000000000:role/e",
    "BalancerRole": "arn:aws:iam::000000000000:role/b",
    "HookRole": "arn:aws:iam::000000000000:role/h",
    "Gate": "arn:aws:lambda:us-east-1:000000000000:function:Cats-Gate",
    "Subnets": "subnet-1",
    "SecurityGroup": "sg-1",
    "BlueGroup": "arn:blue",
    "GreenGroup": "arn:green",
    "ProductionRule": "arn:rule/1",
    "TestRule": "arn:rule/2",
    "Alarms": "errors",
    "Tasks": "0",
    "BakeMinutes": "1",
}


@pytest.fixture
def account():
    with local_aws() as aws:
        yield Account("us-east-1", aws.url)


def create(account, name, body, parameters, tags=(("snn:stack", "Cats"),)):
    account.client("cloudformation").create_stack(
        StackName=name,
        TemplateBody=body,
        Parameters=[{"ParameterKey": k, "ParameterValue": v} for k, v in parameters.items()],
        Tags=[{"Key": k, "Value": v} for k, v in tags],
    )
    deadline = time.monotonic() + 120
    while (
        status := describe(account, name)["StackStatus"]
    ) == "CREATE_IN_PROGRESS" and time.monotonic() < deadline:
        time.sleep(0.05)
    assert status == "CREATE_COMPLETE", account.client("cloudformation").describe_stack_events(
        StackName=name
    )["StackEvents"][:3]


def test_destroy_takes_service_images_and_the_pipelines_bucket(account):
    create(account, "Cats", json.dumps(REST), {"BucketName": "cats"})
    template = (infra_folder() / "service" / "service.yaml").read_text()
    create(
        account,
        "Cats-service",
        template.replace("DesiredCount: !Ref Tasks", "DesiredCount: 0"),
        SERVICE,
    )  # MiniStack takes a number's parameter for a text
    assert {r.kind for r in resources(account, "Cats-service")} == {
        "AWS::ECS::Service",
        "AWS::ECS::TaskDefinition",
    }
    s3, ecr, ecs, logs = (account.client(name) for name in ("s3", "ecr", "ecs", "logs"))
    for content in (b"1", b"2"):
        s3.put_object(Bucket="cats-pipeline", Key="Code/a.zip", Body=content)
    ecr.put_image(repositoryName="cats", imageManifest='{"schemaVersion": 2}', imageTag="3f2a")
    logs.create_log_group(logGroupName="/aws/codebuild/Cats-build")

    order = []
    assert (
        destroy(
            account,
            "Cats",
            lambda event: order.append((event.stack, event.resource)),
            every=0.1,
        )
        == []
    )
    assert describe(account, "Cats") is None and describe(account, "Cats-service") is None
    assert [name for name, _ in order].index("Cats-service") < [
        name for name, _ in order
    ].index("Cats")  # the service stands on the rest
    assert (
        s3.list_buckets()["Buckets"] == []
        and ecr.describe_repositories()["repositories"] == []
        and logs.describe_log_groups()["logGroups"] == []
    )
    assert not any(
        ecs.list_task_definitions(familyPrefix="Cats", status=status)["taskDefinitionArns"]
        for status in ("ACTIVE", "INACTIVE")
    )
    assert ecs.list_clusters()["clusterArns"] == []


@pytest.mark.parametrize("tags", [(), (("snn:stack", "Cats-service"),)])
def test_a_stack_of_somebody_else_with_that_name_is_left_alone(account, tags):
    create(
        account,
        "Cats",
        json.dumps({**REST, "Resources": {"Bucket": REST["Resources"]["Bucket"]}}),
        {"BucketName": "cats"},
    )
    create(
        account,
        "Cats-service",
        '{"Resources": {"Topic": {"Type": "AWS::SNS::Topic"}}}',
        {},
        tags,
    )
    assert own_stacks(account, "Cats") == ["Cats"]
    assert (
        destroy(account, "Cats", every=0.1) == []
        and describe(account, "Cats-service")["StackStatus"] == "CREATE_COMPLETE"
    )


def test_a_version_that_waits_must_be_answered_first(account, monkeypatch):
    from snn.deploy import teardown

    stacks = {
        "Cats": {"StackStatus": "CREATE_COMPLETE"},
        "Cats-service": {"StackStatus": "UPDATE_IN_PROGRESS"},
    }
    monkeypatch.setattr(
        teardown,
        "describe",
        lambda account, name: {**stacks[name], "Tags": [{"Key": TAG, "Value": "Cats"}]},
    )
    with pytest.raises(InputError, match="snn approve --stack Cats --no"):
        own_stacks(account, "Cats")


ARN = "arn:aws:ecs:us-east-1:000000000000:service-deployment/Cats/Cats/a"


@pytest.mark.parametrize("yes, action", [(True, "CONTINUE"), (False, "ROLLBACK")])
def test_approval_is_one_call(account, yes, action):
    stub = Stubber(account.client("ecs"))
    stub.add_response(
        "list_service_deployments",
        {"serviceDeployments": [{"serviceDeploymentArn": ARN}]},
        {"cluster": "Cats", "service": "Cats", "status": ["IN_PROGRESS"]},
    )
    hooks = [
        {"hookId": "gate", "targetType": "AWS_LAMBDA", "status": "SUCCEEDED"},
        {"hookId": "ecs-pause-1", "targetType": "PAUSE", "status": "AWAITING_ACTION"},
    ]
    stub.add_response(
        "describe_service_deployments",
        {"serviceDeployments": [{"serviceDeploymentArn": ARN, "lifecycleHookDetails": hooks}]},
        {"serviceDeploymentArns": [ARN]},
    )
    stub.add_response(
        "continue_service_deployment",
        {"serviceDeploymentArn": ARN},
        {"serviceDeploymentArn": ARN, "hookId": "ecs-pause-1", "action": action},
    )
    with stub:
        assert answer(account, "Cats", yes).deployment == ARN
    stub.assert_no_pending_responses()


def test_nothing_waits(account):
    with Stubber(account.client("ecs")) as stub:
        stub.add_client_error("list_service_deployments", "ClusterNotFoundException")
        with pytest.raises(InputError, match="has no Prediction API"):
            waiting(account, "Cats")
        stub.add_response(
            "list_service_deployments", {"serviceDeployments": [{"serviceDeploymentArn": ARN}]}
        )
        stub.add_response(
            "describe_service_deployments",
            {"serviceDeployments": [{"serviceDeploymentArn": ARN}]},
        )
        with pytest.raises(
            InputError,
            match="no new version of Cats waits for an answer; one is just being deployed",
        ):
            waiting(account, "Cats")
