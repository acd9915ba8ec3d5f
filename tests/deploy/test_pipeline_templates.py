"""The pipeline and the service as CloudFormation would make them: who may do what, how the parts fit, and whether the
services' own descriptions of their calls agree. cfn-lint and checkov look at these templates in test_templates.py."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from botocore.session import get_session
from botocore.validate import validate_parameters

sys.path.insert(0, str(Path(__file__).parent))
from templates import all_templates, allowed, render, statements

from snn.deploy.package import HANDLERS

TEMPLATES = all_templates()
MAIN, PIPELINE, SERVICE, CLUSTER, BALANCER = (
    TEMPLATES[name]
    for name in (
        "main.yaml",
        "pipeline/pipeline.yaml",
        "service/service.yaml",
        "service/cluster.yaml",
        "service/balancer.yaml",
    )
)
HERE = "here-1:111111111111"
BUCKET, ECS, FORMATION = (
    "arn:aws-cn:s3:::cats",
    f"arn:aws-cn:ecs:{HERE}",
    f"arn:aws-cn:cloudformation:{HERE}:stack",
)
GIVEN = {
    "StackName": "Cats",
    "BucketName": "cats",
    "Topic": "arn:topic",
    "Cluster": "Cats",
    "GitHubUser": "somebody",
    "GitHubRepository": "serverless-neural-network",
    "ConnectionArn": "arn:connection",
    "Branch": "main",
    "Repository": "cats",
    "RepositoryArn": "arn:repository",
    "RepositoryUri": "111111111111.dkr.ecr.here-1.example/cats",
    "ExecutionRole": "arn:execution",
    "BalancerRole": "arn:balancer",
    "HookRole": "arn:hook",
    "Gate": "arn:gate",
    "BlueGroup": "arn:blue",
    "GreenGroup": "arn:green",
    "ProductionRule": "arn:production-rule",
    "TestRule": "arn:test-rule",
    "Listeners": ["arn:production", "arn:test"],
    "Subnets": "subnet-1,subnet-2",
    "SecurityGroup": "sg-1",
    "Alarms": "errors,slow",
    "Tasks": 1,
    "BakeMinutes": 10,
    "LogGroup": "/ecs/Cats",
    "Architecture": "arm64",
    "Bucket": "artifacts",
    "Pipeline": "Cats",
}
CODE = {"lambda__SourceFunctionArn": f"arn:aws-cn:lambda:{HERE}:function:Cats-Gate"}
OURS, OTHERS = (
    {"codeconnections__FullRepositoryId": "somebody/serverless-neural-network"},
    {"codeconnections__FullRepositoryId": "somebody/diary"},
)
TO = lambda service: {"iam__PassedToService": f"{service}.amazonaws.com"}

POLICIES = [
    # the quality gate reads test images, and tells; nothing else
    (
        "cluster",
        "Gate",
        "s3:GetObjectVersion",
        f"{BUCKET}/training_input/datasets.h5",
        {},
        True,
    ),
    (
        "cluster",
        "Gate",
        "s3:ListBucketVersions",
        BUCKET,
        {"s3__prefix": "training_input/"},
        True,
    ),
    ("cluster", "Gate", "s3:ListBucketVersions", BUCKET, {"s3__prefix": ""}, False),
    ("cluster", "Gate", "s3:GetObject", f"{BUCKET}/prediction_input/params.h5", {}, False),
    ("cluster", "Gate", "s3:PutObject", f"{BUCKET}/training_input/datasets.h5", {}, False),
    ("cluster", "Gate", "sns:Publish", "arn:topic", {}, True),
    ("cluster", "Gate", "sns:Publish", "arn:other", {}, False),
    (
        "cluster",
        "Gate",
        "ecs:ContinueServiceDeployment",
        f"{ECS}:service-deployment/Cats/Cats/a",
        {},
        False,
    ),  # it can't approve for a person
    (
        "cluster",
        "Gate",
        "lambda:InvokeFunction",
        f"arn:aws-cn:lambda:{HERE}:function:Cats-LaunchLambda",
        {},
        False,
    ),
    (
        "cluster",
        "Gate",
        "ec2:CreateNetworkInterface",
        f"arn:aws-cn:ec2:{HERE}:network-interface/*",
        {},
        True,
    ),
    (
        "cluster",
        "Gate",
        "ec2:CreateNetworkInterface",
        f"arn:aws-cn:ec2:{HERE}:network-interface/*",
        CODE,
        False,
    ),
    ("cluster", "Gate", "logs:PutLogEvents", "arn:GateLogs", {}, True),
    # what starts a task pulls and logs
    ("cluster", "Execution", "ecr:BatchGetImage", "arn:Repository", {}, True),
    ("cluster", "Execution", "ecr:BatchGetImage", "arn:other", {}, False),
    ("cluster", "Execution", "ecr:PutImage", "arn:Repository", {}, False),
    ("cluster", "Execution", "logs:PutLogEvents", "arn:ServiceLogs", {}, True),
    (
        "cluster",
        "Execution",
        "s3:GetObject",
        f"{BUCKET}/training_input/datasets.h5",
        {},
        False,
    ),
    # ECS turns our rules and no others
    (
        "cluster",
        "Balancer",
        "elasticloadbalancing:ModifyRule",
        "arn:production-rule",
        {},
        True,
    ),
    ("cluster", "Balancer", "elasticloadbalancing:ModifyRule", "arn:other", {}, False),
    ("cluster", "Balancer", "elasticloadbalancing:ModifyListener", "arn:test", {}, True),
    ("cluster", "Balancer", "elasticloadbalancing:RegisterTargets", "arn:green", {}, True),
    ("cluster", "Balancer", "elasticloadbalancing:RegisterTargets", "arn:other", {}, False),
    ("cluster", "Balancer", "elasticloadbalancing:DeleteLoadBalancer", "*", {}, False),
    ("cluster", "Hook", "lambda:InvokeFunction", "arn:Gate", {}, True),
    ("cluster", "Hook", "lambda:InvokeFunction", "arn:other", {}, False),
    # the model starts the pipeline
    (
        "pipeline",
        "Model",
        "codepipeline:StartPipelineExecution",
        f"arn:aws-cn:codepipeline:{HERE}:Cats",
        {},
        True,
    ),
    (
        "pipeline",
        "Model",
        "codepipeline:StartPipelineExecution",
        f"arn:aws-cn:codepipeline:{HERE}:Payroll",
        {},
        False,
    ),
    # tests see the code alone
    ("pipeline", "Test", "s3:GetObject", "Bucket.Arn/Cats/Code/a", {}, True),
    ("pipeline", "Test", "s3:PutObject", "Bucket.Arn/Cats/Code/a", {}, False),
    ("pipeline", "Test", "s3:GetObject", f"{BUCKET}/training_input/datasets.h5", {}, False),
    ("pipeline", "Test", "ecr:PutImage", "arn:repository", {}, False),
    # the build takes model, run and data, and pushes
    (
        "pipeline",
        "Build",
        "s3:GetObjectVersion",
        f"{BUCKET}/prediction_input/params.h5",
        {},
        True,
    ),
    (
        "pipeline",
        "Build",
        "s3:GetObject",
        f"{BUCKET}/training_results/3f2a/run.json",
        {},
        True,
    ),
    (
        "pipeline",
        "Build",
        "s3:GetObject",
        f"{BUCKET}/training_checkpoints/3f2a/0.npz",
        {},
        False,
    ),
    (
        "pipeline",
        "Build",
        "s3:PutObject",
        f"{BUCKET}/prediction_input/params.h5",
        {},
        False,
    ),  # it could start itself for ever
    ("pipeline", "Build", "ecr:PutImage", "arn:repository", {}, True),
    ("pipeline", "Build", "ecr:BatchDeleteImage", "arn:repository", {}, False),
    (
        "pipeline",
        "Build",
        "cloudformation:DeleteStack",
        f"{FORMATION}/Cats-service/1",
        {},
        True,
    ),
    ("pipeline", "Build", "cloudformation:DeleteStack", f"{FORMATION}/Cats/1", {}, False),
    (
        "pipeline",
        "Build",
        "ecs:UpdateService",
        f"{ECS}:service/Cats/Cats",
        {},
        False,
    ),  # not around the gate
    ("pipeline", "Build", "iam:PassRole", "arn:execution", TO("ecs-tasks"), False),
    # CloudFormation makes the service
    ("pipeline", "Deploy", "ecs:UpdateService", f"{ECS}:service/Cats/Cats", {}, True),
    ("pipeline", "Deploy", "ecs:UpdateService", f"{ECS}:service/Others/Cats", {}, False),
    (
        "pipeline",
        "Deploy",
        "ecs:ContinueServiceDeployment",
        f"{ECS}:service-deployment/Cats/Cats/a",
        {},
        False,
    ),  # nor past the person
    ("pipeline", "Deploy", "iam:PassRole", "arn:execution", TO("ecs-tasks"), True),
    ("pipeline", "Deploy", "iam:PassRole", "arn:execution", TO("lambda"), False),
    ("pipeline", "Deploy", "iam:PassRole", "arn:hook", TO("ecs"), True),
    ("pipeline", "Deploy", "iam:PassRole", "arn:administrator", TO("ecs"), False),
    (
        "pipeline",
        "Deploy",
        "iam:CreateServiceLinkedRole",
        "arn:aws-cn:iam::111111111111:role/aws-service-role/ecs.amazonaws.com/AWSServiceRoleForECS",
        {"iam__AWSServiceName": "ecs.amazonaws.com"},
        True,
    ),
    (
        "pipeline",
        "Deploy",
        "iam:CreateServiceLinkedRole",
        "arn:aws-cn:iam::111111111111:role/aws-service-role/rds.amazonaws.com/AWSServiceRoleForRDS",
        {"iam__AWSServiceName": "rds.amazonaws.com"},
        False,
    ),
    # the pipeline hands things on
    (
        "pipeline",
        "Pipeline",
        "s3:GetObjectVersion",
        f"{BUCKET}/prediction_input/params.h5",
        {},
        True,
    ),
    (
        "pipeline",
        "Pipeline",
        "s3:GetObject",
        f"{BUCKET}/training_input/datasets.h5",
        {},
        False,
    ),
    ("pipeline", "Pipeline", "codeconnections:UseConnection", "arn:connection", OURS, True),
    ("pipeline", "Pipeline", "codeconnections:UseConnection", "arn:connection", OTHERS, False),
    ("pipeline", "Pipeline", "codebuild:StartBuild", "arn:Build", {}, True),
    ("pipeline", "Pipeline", "codebuild:StartBuild", "arn:other", {}, False),
    (
        "pipeline",
        "Pipeline",
        "cloudformation:UpdateStack",
        f"{FORMATION}/Cats-service/1",
        {},
        True,
    ),
    ("pipeline", "Pipeline", "cloudformation:UpdateStack", f"{FORMATION}/Cats/1", {}, False),
    (
        "pipeline",
        "Pipeline",
        "cloudformation:DeleteStack",
        f"{FORMATION}/Cats-service/1",
        {},
        False,
    ),
    ("pipeline", "Pipeline", "iam:PassRole", "arn:DeployRole", TO("cloudformation"), True),
    ("pipeline", "Pipeline", "iam:PassRole", "arn:DeployRole", TO("ec2"), False),
]


def role(template, name):
    return statements(
        (PIPELINE if template == "pipeline" else CLUSTER)["Resources"][f"{name}Role"],
        GIVEN,
        {},
    )


@pytest.mark.parametrize("template, name, action, resource, context, expected", POLICIES)
def test_who_may_do_what(template, name, action, resource, context, expected):
    assert allowed(role(template, name), action, resource, **context) is expected


def test_every_role_is_in_the_table():
    roles = {
        (template, name.removesuffix("Role"))
        for template, found in (("pipeline", PIPELINE), ("cluster", CLUSTER))
        for name, r in found["Resources"].items()
        if r["Type"] == "AWS::IAM::Role"
    }
    assert roles == {(template, name) for template, name, *_ in POLICIES}


def test_cloudformation_may_do_all_that_it_says_it_needs():
    "Its own list is in the description of each resource type."
    from cfnlint.schema import PROVIDER_SCHEMA_MANAGER as schemas

    actions = {
        action
        for statement in role("pipeline", "Deploy")
        for action in (
            [statement["Action"]]
            if isinstance(statement["Action"], str)
            else statement["Action"]
        )
    }
    for kind in {resource["Type"] for resource in SERVICE["Resources"].values()}:
        handlers = schemas.get_resource_schema("us-east-1", kind).schema["handlers"]
        assert {
            action
            for name in ("create", "read", "update", "delete")
            for action in handlers[name]["permissions"]
        } <= actions, kind


# How the parts fit


def required(template):
    return {name for name, p in template["Parameters"].items() if "Default" not in p}


@pytest.mark.parametrize(
    "name",
    [
        name
        for name, r in MAIN["Resources"].items()
        if r["Type"] == "AWS::CloudFormation::Stack"
    ],
)
def test_a_nested_stack_gets_what_it_asks_for(name):
    properties = MAIN["Resources"][name]["Properties"]
    template, passed = (
        TEMPLATES[properties["TemplateURL"]["Fn::Sub"].removeprefix("${Templates}/")],
        properties["Parameters"],
    )
    assert required(template) <= passed.keys() <= template["Parameters"].keys()
    for value in passed.values():
        if "Ref" in value:
            assert value["Ref"] in MAIN["Parameters"] or value["Ref"].startswith("AWS::")
        else:
            nested, output = (
                value["Fn::GetAtt"][0],
                value["Fn::GetAtt"][1].removeprefix("Outputs."),
            )
            assert (
                output
                in TEMPLATES[
                    MAIN["Resources"][nested]["Properties"]["TemplateURL"][
                        "Fn::Sub"
                    ].removeprefix("${Templates}/")
                ]["Outputs"]
            )
            assert MAIN["Resources"][nested].get("Condition") in (
                None,
                MAIN["Resources"][name].get("Condition"),
            )


def test_the_build_hands_over_what_the_services_template_asks_for():
    [text] = [
        v["Value"]
        for v in PIPELINE["Resources"]["Build"]["Properties"]["Environment"][
            "EnvironmentVariables"
        ]
        if v["Name"] == "SERVICE"
    ]
    handed = json.loads(render(text, GIVEN, {}))
    assert handed["Tags"] == {"snn:stack": "Cats"}
    assert required(SERVICE) == handed["Parameters"].keys() | {"Image", "Model"}
    assert all(isinstance(value, str) for value in handed["Parameters"].values())


def lower(value):
    "With keys as the API writes them."
    if isinstance(value, list):
        return [lower(item) for item in value]
    return (
        {
            key[:1].lower() + key[1:]: item
            if key in ("Configuration", "Options")
            else lower(item)
            for key, item in value.items()
        }
        if isinstance(value, dict)
        else value
    )


def check_call(service, operation, **arguments):
    "Raises unless the service takes such a call."
    shape = get_session().get_service_model(service).operation_model(operation).input_shape
    unknown = [key for key in arguments if key not in shape.members]
    assert not unknown
    validate_parameters(arguments, shape)


def test_the_pipeline_is_one():
    found = render(PIPELINE["Resources"]["Pipeline"]["Properties"], GIVEN, {})
    check_call("codepipeline", "CreatePipeline", pipeline=lower({**found, "Version": 1}))
    assert found["PipelineType"] == "V2" and found["ExecutionMode"] == "QUEUED"
    assert [stage["Name"] for stage in found["Stages"]] == [
        "Source",
        "Test",
        "Build",
        "Deploy",
    ]
    made = {
        artifact["Name"]
        for stage in found["Stages"]
        for action in stage["Actions"]
        for artifact in action.get("OutputArtifacts", [])
    }
    used = {
        artifact["Name"]
        for stage in found["Stages"]
        for action in stage["Actions"]
        for artifact in action.get("InputArtifacts", [])
    }
    assert used == made - {"Model"}  # one file is no zip: it is fetched by its version
    variables = {
        v["name"]: v["value"]
        for v in json.loads(
            found["Stages"][2]["Actions"][0]["Configuration"]["EnvironmentVariables"]
        )
    }
    assert variables == {
        "MODEL_BUCKET": "cats",
        "MODEL_KEY": "prediction_input/params.h5",
        "MODEL_VERSION": "#{Model.VersionId}",
        "CODE_COMMIT": "#{Code.CommitId}",
    }


def test_a_model_starts_it_in_its_own_version():
    rule = PIPELINE["Resources"]["ModelArrived"]["Properties"]
    transformer = rule["Targets"][0]["InputTransformer"]
    check_call(
        "codepipeline",
        "StartPipelineExecution",
        name="Cats",
        **json.loads(transformer["InputTemplate"].replace("<version>", "v1")),
    )
    assert render(rule["EventPattern"], GIVEN, {})["detail"] == {
        "bucket": {"name": ["cats"]},
        "object": {"key": ["prediction_input/params.h5"]},
    }
    assert TEMPLATES["storage.yaml"]["Resources"]["Bucket"]["Properties"][
        "NotificationConfiguration"
    ]["EventBridgeConfiguration"] == {"EventBridgeEnabled": True}


def service():
    given = {
        **GIVEN,
        "Subnets": ["subnet-1"],
        "Alarms": ["errors"],
        "Image": "image@sha256:1",
        "Model": "3f2a",
        "ApprovalMinutes": SERVICE["Parameters"]["ApprovalMinutes"]["Default"],
    }
    return (
        render(SERVICE["Resources"][name]["Properties"], given, {"Arm": True})
        for name in ("Service", "Task")
    )


def test_a_new_version_passes_the_gate_then_a_person_then_bakes():
    found, _ = service()
    check_call("ecs", "CreateService", **lower(found))
    how = found["DeploymentConfiguration"]
    gate, person = how["LifecycleHooks"]
    stages = (
        get_session().get_service_model("ecs").shape_for("DeploymentLifecycleHookStage").enum
    )
    assert (
        how["Strategy"] == "BLUE_GREEN"
        and how["BakeTimeInMinutes"] == 10
        and how["Alarms"] == {"AlarmNames": ["errors"], "Enable": True, "Rollback": True}
    )
    assert (gate["TargetType"], gate["LifecycleStages"], json.loads(gate["HookDetails"])) == (
        "AWS_LAMBDA",
        ["POST_TEST_TRAFFIC_SHIFT"],
        {"model": "3f2a"},
    )
    assert (
        person["TargetType"],
        person["LifecycleStages"],
        person["TimeoutConfiguration"]["Action"],
    ) == ("PAUSE", ["PRE_PRODUCTION_TRAFFIC_SHIFT"], "ROLLBACK")
    assert {*gate["LifecycleStages"], *person["LifecycleStages"]} <= set(stages)
    assert found["LoadBalancers"][0]["AdvancedConfiguration"].keys() == {
        "AlternateTargetGroupArn",
        "ProductionListenerRule",
        "TestListenerRule",
        "RoleArn",
    }


def test_cloudformation_waits_long_enough_for_a_person():
    from cfnlint.schema import PROVIDER_SCHEMA_MANAGER as schemas

    handlers = schemas.get_resource_schema("us-east-1", "AWS::ECS::Service").schema["handlers"]
    longest = (
        SERVICE["Parameters"]["ApprovalMinutes"]["MaxValue"] + 60
    )  # and start, gate, bake
    assert longest + MAIN["Parameters"]["BakeMinutes"]["Default"] < min(
        handlers["create"]["timeoutInMinutes"], handlers["update"]["timeoutInMinutes"]
    )


def test_the_task_can_do_nothing_but_serve(root):
    _, task = service()
    check_call("ecs", "RegisterTaskDefinition", **lower(task))
    [container] = task["ContainerDefinitions"]
    assert (
        container["ReadonlyRootFilesystem"]
        and container["User"] == "10001"
        and container["LinuxParameters"]["Capabilities"] == {"Drop": ["ALL"]}
    )
    assert (
        "TaskRoleArn" not in task
        and "Privileged" not in container
        and "Environment" not in container
    )
    dockerfile = (root / "infra" / "service" / "Dockerfile").read_text()
    check, command = (json.loads(found) for found in re.findall(r"CMD (\[.*\])", dockerfile))
    assert (
        container["HealthCheck"]["Command"] == ["CMD", *check]
        and f"USER {container['User']}" in dockerfile
    )
    assert (
        command[command.index("--port") + 1]
        == str(container["PortMappings"][0]["ContainerPort"])
        == "8000"
    )


@pytest.mark.parametrize(
    "encrypted, production, test",
    [(True, ("HTTPS", 443), ("HTTPS", 8443)), (False, ("HTTP", 80), ("HTTP", 8080))],
)
def test_https_with_a_certificate(encrypted, production, test):
    resources = render(
        BALANCER["Resources"],
        {**GIVEN, "Certificate": "arn:certificate", "Domain": "cats.example"},
        {"Encrypted": encrypted, "Reviewed": False},
    )
    for name, right in (("Production", production), ("Test", test)):
        listener = resources[name]["Properties"]
        assert (listener["Protocol"], listener["Port"]) == right and (
            listener["Certificates"] == [{"CertificateArn": "arn:certificate"}]
            if encrypted
            else not listener["Certificates"]
        )


def test_no_two_listeners_ever_want_one_port():
    "Not in a stack, and not while a certificate comes or goes: in an update, the new one is made before the old one ends."
    ports = {}
    for encrypted in (True, False):
        resources = render(
            BALANCER["Resources"], GIVEN, {"Encrypted": encrypted, "Reviewed": False}
        )
        for name, resource in resources.items():
            if resource["Type"] == "AWS::ElasticLoadBalancingV2::Listener":
                ports.setdefault(resource["Properties"]["Port"], set()).add(name)
    assert sorted(ports) == [80, 443, 8080, 8443]
    assert all(len(names) == 1 for names in ports.values()), ports


def test_the_world_reaches_production_and_nobody_the_new_version():
    ingress = [
        {"GroupId": "BalancerSecurityGroup", **rule}
        for encrypted in (True, False)
        for rule in render(
            BALANCER["Resources"]["BalancerSecurityGroup"]["Properties"][
                "SecurityGroupIngress"
            ],
            GIVEN,
            {"Encrypted": encrypted},
        )
    ]
    ingress += [
        r["Properties"]
        for r in BALANCER["Resources"].values()
        if r["Type"] == "AWS::EC2::SecurityGroupIngress"
    ]
    open_ports = {
        rule["FromPort"]
        for rule in ingress
        if rule.get("CidrIp") == "0.0.0.0/0" or rule.get("CidrIpv6") == "::/0"
    }
    assert open_ports == {80, 443}
    assert (
        BALANCER["Resources"]["FromReviewer"]["Condition"] == "Reviewed"
        and MAIN["Parameters"]["ReviewRange"]["Default"] == ""
    )
    patterns = {
        r["Properties"]["Priority"]: r["Properties"]
        for r in BALANCER["Resources"].values()
        if r["Type"] == "AWS::ElasticLoadBalancingV2::ListenerRule"
        and r["Properties"]["ListenerArn"] == {"Ref": "Production"}
    }
    assert (
        patterns[1]["Conditions"][0]["PathPatternConfig"]["Values"] == ["/metrics"]
        and patterns[1]["Actions"][0]["Type"] == "fixed-response"
    )


def test_the_gate_finds_its_handler_and_its_settings():
    from snn.deploy.gate import settings

    gate = CLUSTER["Resources"]["Gate"]["Properties"]
    assert gate["Handler"].removesuffix(".lambda_handler") in HANDLERS["launch"] and gate[
        "Code"
    ]["S3Key"] == {"Ref": "LaunchPackage"}
    variables = {
        name: str(
            render(
                value,
                {
                    **GIVEN,
                    "Margin": 0.05,
                    "Domain": "",
                    "TestUrl": "http://test",
                    "ProductionUrl": "http://live",
                },
                {},
            )
        )
        for name, value in gate["Environment"]["Variables"].items()
    }
    assert (
        settings(variables)["margin"] == 0.05
        and settings(variables)["candidate"].url == "http://test"
    )
    assert (
        gate["VpcConfig"]["Ipv6AllowedForDualStack"] is True and gate["Timeout"] == 900
    )  # ECS waits for 15 minutes


# The build


def spec(root, name):
    return yaml.safe_load((root / "infra" / "pipeline" / f"{name}.yml").read_text())


@pytest.mark.parametrize("name", ["build", "test"])
def test_a_buildspec_is_shell_and_python(name, root):
    lines = [
        line
        for phase in spec(root, name)["phases"].values()
        for line in phase.get("commands", [])
    ]
    for line in lines:
        subprocess.run(["bash", "-n"], input=line, text=True, check=True)
        for code in re.findall(r'python -c "([^"]+)"', line):
            compile(code, name, "exec")
    assert (
        f"infra/pipeline/{name}.yml"
        == PIPELINE["Resources"][name.title()]["Properties"]["Source"]["BuildSpec"]
    )


def test_the_build_knows_every_variable_that_it_uses(root):
    text = (root / "infra" / "pipeline" / "build.yml").read_text()
    used = set(re.findall(r"\$\{?([A-Z_]+)", text)) | set(
        re.findall(r"(?:environ|\be)\['([A-Z_]+)'\]", text)
    )
    set_here = set(re.findall(r"(?:- |\s)([A-Z]+)=", text))
    project = {
        v["Name"]
        for v in PIPELINE["Resources"]["Build"]["Properties"]["Environment"][
            "EnvironmentVariables"
        ]
    }
    action = set(
        re.findall(
            r'"name": "([A-Z_]+)"',
            PIPELINE["Resources"]["Pipeline"]["Properties"]["Stages"][2]["Actions"][0][
                "Configuration"
            ]["EnvironmentVariables"]["Fn::Sub"],
        )
    )
    assert (
        used - set_here - {"CODEBUILD_BUILD_NUMBER", "CODEBUILD_BUILD_SUCCEEDING"}
        == project | action
    )


def test_the_build_tells_the_service_image_and_model(root, tmp_path):
    "The very line of the buildspec."
    [line] = [
        line
        for line in spec(root, "build")["phases"]["post_build"]["commands"]
        if "service.json" in line
    ]
    (tmp_path / "deployment").mkdir()
    subprocess.run(
        ["bash", "-ec", line.replace(".venv/bin/python", sys.executable)],
        cwd=tmp_path,
        check=True,
        env={
            "REPOSITORY_URI": "registry/cats",
            "DIGEST": "sha256:1",
            "MODEL": "3f2a",
            "SERVICE": '{"Tags": {"snn:stack": "Cats"}, "Parameters": {"Tasks": "1"}}',
        },
    )
    assert json.loads((tmp_path / "deployment" / "service.json").read_text()) == {
        "Tags": {"snn:stack": "Cats"},
        "Parameters": {"Tasks": "1", "Image": "registry/cats@sha256:1", "Model": "3f2a"},
    }


def test_what_the_pipeline_tests_is_there(root):
    words = " ".join(spec(root, "test")["phases"]["build"]["commands"]).split()
    assert all((root / word).exists() for word in words)


def test_images_are_never_overwritten_and_old_ones_go():
    repository = CLUSTER["Resources"]["Repository"]["Properties"]
    assert repository["ImageTagMutability"] == "IMMUTABLE" and repository[
        "ImageScanningConfiguration"
    ] == {"ScanOnPush": True}
    assert [
        rule["action"]
        for rule in json.loads(repository["LifecyclePolicy"]["LifecyclePolicyText"])["rules"]
    ] == [{"type": "expire"}] * 3


def test_what_was_live_is_not_expired_with_what_was_refused(root):
    rules = json.loads(
        CLUSTER["Resources"]["Repository"]["Properties"]["LifecyclePolicy"][
            "LifecyclePolicyText"
        ]
    )["rules"]
    first, *_, last = sorted(rules, key=lambda rule: rule["rulePriority"])
    assert first["selection"] == {
        "tagStatus": "tagged",
        "tagPrefixList": ["live-"],
        "countType": "imageCountMoreThan",
        "countNumber": 10,
    }
    assert last["selection"]["tagStatus"] == "any"  # ECR takes it in no other place
    (tagged,) = (
        line
        for line in spec(root, "build")["phases"]["pre_build"]["commands"]
        if "put-image" in line
    )
    assert '--image-tag "live-' in tagged


def test_the_live_image_gets_a_tag_before_the_next_is_built(root, tmp_path):
    "The very lines of the buildspec, with an aws that writes down what it is asked."
    lines = [
        line
        for line in spec(root, "build")["phases"]["pre_build"]["commands"]
        if "LIVE" in line
    ]
    (tmp_path / "aws").write_text(
        '#!/bin/bash\necho "$1 $2 ${*: -4}" >> asked\n'
        'case "$2" in describe-stacks) echo "$STACK";; batch-get-image) echo manifest;; esac\n'
    )
    (tmp_path / "aws").chmod(0o755)
    for stack, asked in (
        ("registry/cats@sha256:1", ["describe-stacks", "batch-get-image", "put-image"]),
        ("", ["describe-stacks"]),
    ):
        (tmp_path / "asked").unlink(missing_ok=True)
        subprocess.run(
            ["bash", "-ec", "\n".join(lines)],
            cwd=tmp_path,
            check=True,
            capture_output=True,
            env={
                "PATH": f"{tmp_path}:/usr/bin:/bin",
                "STACK": stack,
                "SERVICE_STACK": "Cats-service",
                "REPOSITORY": "cats",
                "CODEBUILD_BUILD_NUMBER": "7",
            },
        )
        assert [
            line.split()[1] for line in (tmp_path / "asked").read_text().splitlines()
        ] == asked


def test_only_flaws_with_a_fix_stop_the_build(root):
    from snn.deploy.image import critical

    shape = (
        get_session()
        .get_service_model("ecr")
        .operation_model("DescribeImageScanFindings")
        .output_shape.members["imageScanFindings"]
    )
    enhanced = lambda name, fix: {
        "severity": "CRITICAL",
        "fixAvailable": fix,
        "packageVulnerabilityDetails": {"vulnerabilityId": name},
    }
    found = {
        "findings": [
            {"name": "CVE-1", "severity": "CRITICAL"},
            {"name": "CVE-2", "severity": "MEDIUM"},
        ],
        "enhancedFindings": [enhanced("CVE-3", "NO"), enhanced("CVE-4", "YES")],
    }
    validate_parameters(found, shape)
    assert critical({"imageScanFindings": found}) == (["CVE-1", "CVE-3"], ["CVE-4"])
    assert "apt-get upgrade" in (root / "infra" / "service" / "Dockerfile").read_text()


def test_the_image_is_one_that_ecr_can_scan(root):
    assert spec(root, "build")["env"]["variables"]["BUILDX_NO_DEFAULT_ATTESTATIONS"] == "1"


@pytest.mark.parametrize("name", ["build", "test"])
def test_a_source_without_run_bits_is_built(name, root, tmp_path):
    "CodePipeline's zip of the repository keeps none, and the scripts call one another."
    (tmp_path / "bin").mkdir()
    for path in (root / "bin").iterdir():
        (tmp_path / "bin" / path.name).write_bytes(path.read_bytes())
    first = spec(root, name)["phases"]["install"]["commands"][0]
    subprocess.run(["bash", "-ec", first], cwd=tmp_path, check=True)
    assert all(os.access(path, os.X_OK) for path in (tmp_path / "bin").iterdir())


def test_a_push_starts_nothing():
    source = PIPELINE["Resources"]["Pipeline"]["Properties"]["Stages"][0]["Actions"][0][
        "Configuration"
    ]
    assert source["DetectChanges"] == "false"


def test_ecs_is_trusted_as_its_documentation_shows():
    "Developer Guide, 'Amazon ECS infrastructure IAM role for load balancers': no condition on the source."
    for template in TEMPLATES.values():
        for resource in template["Resources"].values():
            if resource["Type"] != "AWS::IAM::Role":
                continue
            for statement in resource["Properties"]["AssumeRolePolicyDocument"]["Statement"]:
                if statement["Principal"] == {"Service": "ecs.amazonaws.com"}:
                    assert "Condition" not in statement
