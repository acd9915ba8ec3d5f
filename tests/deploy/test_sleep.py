"""A stack that sleeps costs next to nothing, and an upload wakes it."""

import json
from datetime import UTC, datetime, timedelta
from io import BytesIO
from types import SimpleNamespace

import pytest
from templates import all_templates, allowed, render, statements
from test_templates import GIVEN

from snn.backends.aws.events import uploads
from snn.backends.local.services import Services
from snn.cloud.prices import load
from snn.deploy import sleep
from snn.deploy.inputs import Account, describe
from snn.deploy.stack import infra_folder
from snn.deploy.standing import PROFILES, monthly, standing
from snn.errors import InputError
from snn.handlers import launch, upload
from snn.local.server import local_aws

TEMPLATES = all_templates()
TRAINING = ("network", "parameter_server", "functions", "storage", "observability", "wake")
EVENT = {
    "source": "aws.s3",
    "detail-type": "Object Created",
    "detail": {
        "bucket": {"name": "cats"},
        "object": {"key": "training_input/datasets.h5", "etag": "e", "sequencer": "1"},
    },
}


@pytest.fixture(scope="module")
def aws():
    with local_aws() as opened:
        yield opened


def test_an_idle_stack_that_sleeps_costs_less_than_a_dollar():
    asleep = {**PROFILES["minimal"], "Asleep": "yes"}
    assert 0 < monthly(standing(asleep, load())) < 1


def goes(template):
    "Resources that are there only while the stack is awake."
    return {
        name: resource["Type"]
        for name, resource in TEMPLATES[f"{template}.yaml"]["Resources"].items()
        if resource.get("Condition") in ("Awake", "AwakeOnAws", "AwakeNode", "AwakeServerless")
    }


def test_what_costs_by_the_hour_goes_and_nothing_with_data_does():
    assert goes("network").keys() == {"LambdaEndpoint", "TopicEndpoint", "SecretEndpoint"}
    assert goes("parameter_server") == {
        "Server": "AWS::ElastiCache::ReplicationGroup",
        "ServerlessServer": "AWS::ElastiCache::ServerlessCache",
    }
    assert set(goes("observability").values()) == {
        "AWS::CloudWatch::Alarm",
        "AWS::CloudWatch::Dashboard",
    }
    assert not any(goes(name) for name in ("functions", "storage", "wake"))
    stay = {
        (resource["Type"], resource["Properties"].get("VpcEndpointType"))
        for name in TRAINING
        for logical, resource in TEMPLATES[f"{name}.yaml"]["Resources"].items()
        if logical not in goes(name)
    }
    assert (
        not {
            ("AWS::ElastiCache::ReplicationGroup", None),
            ("AWS::ElastiCache::ServerlessCache", None),
            ("AWS::EC2::VPCEndpoint", "Interface"),
            ("AWS::CloudWatch::Alarm", None),
            ("AWS::CloudWatch::Dashboard", None),
        }
        & stay
    )
    watch = TEMPLATES["functions.yaml"]["Resources"]["Watch"]["Properties"]["State"]
    assert render(watch, {}, {"Sleeping": True}) == "DISABLED"


# What the update that wakes a stack does to which resources, and what CloudFormation's description of each type asks for.
MADE, CHANGED = ("create", "read", "delete"), ("update", "read")
WAKES = {
    "AWS::ElastiCache::ReplicationGroup": MADE,
    "AWS::ElastiCache::ServerlessCache": MADE,
    "AWS::EC2::VPCEndpoint": MADE,
    "AWS::CloudWatch::Alarm": MADE,
    "AWS::CloudWatch::Dashboard": MADE,
    "AWS::Lambda::Function": CHANGED,
    "AWS::Scheduler::Schedule": CHANGED,
    "AWS::SageMaker::NotebookInstanceLifecycleConfig": CHANGED,
}
UNUSED = (
    *("kms:", "firehose:", "vpc-lattice:", "vpce:", "elasticfilesystem:", "s3files:"),
    *("logs:", "iam:CreateServiceLinkedRole", "elasticache:CreateSnapshot"),
    *(
        "lambda:PutFunctionCodeSigning",
        "lambda:DeleteFunctionCodeSigning",
        "lambda:GetCodeSigning",
    ),
    *("lambda:PublishVersion", "lambda:AssociateRuntimeAlias", "lambda:PutRuntimeManagement"),
    *("lambda:PassCapacityProvider", "lambda:PutFunctionScaling", "lambda:GetFunctionScaling"),
    *("lambda:UpdateFunctionCode", "lambda:PutFunctionConcurrency"),
    *("lambda:DeleteFunctionConcurrency", "s3:GetObjectVersion"),
)  # for what our templates do not set, or what waking does not change


def test_wakelambda_may_do_what_waking_needs():
    from cfnlint.schema import PROVIDER_SCHEMA_MANAGER as schemas

    role = TEMPLATES["wake.yaml"]["Resources"]["WakeRole"]
    may = set()
    for statement in statements(role, GIVEN, {}):
        actions = statement["Action"]
        may |= {actions} if isinstance(actions, str) else set(actions)
    for kind, handlers in WAKES.items():
        schema = schemas.get_resource_schema("us-east-1", kind).schema["handlers"]
        needs = {a for name in handlers for a in schema[name]["permissions"]}
        assert {a for a in needs if not a.startswith(UNUSED)} <= may, kind
    assert not any(a.startswith(("dynamodb:", "iam:Create", "iam:Put")) for a in may)


HERE = "here-1:111111111111"


@pytest.mark.parametrize(
    "action, resource, expected",
    [
        ("cloudformation:UpdateStack", f"arn:aws-cn:cloudformation:{HERE}:stack/Cats/1", True),
        (
            "cloudformation:UpdateStack",
            f"arn:aws-cn:cloudformation:{HERE}:stack/Dogs/1",
            False,
        ),
        (
            "cloudformation:DeleteStack",
            f"arn:aws-cn:cloudformation:{HERE}:stack/Cats/1",
            False,
        ),
        (
            "lambda:InvokeFunction",
            f"arn:aws-cn:lambda:{HERE}:function:Cats-LaunchLambda",
            True,
        ),
        ("lambda:InvokeFunction", f"arn:aws-cn:lambda:{HERE}:function:Payroll", False),
        ("s3:GetObject", "arn:aws-cn:s3:::cats/training_input/datasets.h5", False),
        ("secretsmanager:GetSecretValue", "arn:secret", True),
    ],
)
def test_wakelambda_may_do_no_more(action, resource, expected):
    role = TEMPLATES["wake.yaml"]["Resources"]["WakeRole"]
    given = {**GIVEN, "Artifacts": "cats-artifacts", "Roles": ["arn:role"]}
    assert allowed(statements(role, given, {}), action, resource) == expected


class Cloud:
    "What WakeLambda asks for: a stack, LaunchLambda, a topic."

    def __init__(self, asleep, broken=False):
        self.asleep, self.broken, self.status = asleep, broken, "UPDATE_COMPLETE"
        self.invoked, self.mails, self.topic = [], [], self

    def client(self, service):
        return self

    def describe_stacks(self, StackName):
        value = "yes" if self.asleep else "no"
        parameters = [{"ParameterKey": "Asleep", "ParameterValue": value}]
        return {"Stacks": [{"StackStatus": self.status, "Parameters": parameters}]}

    def update_stack(self, **call):
        self.asleep = self.broken
        self.status = "UPDATE_ROLLBACK_COMPLETE" if self.broken else "UPDATE_COMPLETE"

    def invoke(self, **call):
        self.invoked.append((call["FunctionName"], json.loads(call["Payload"])))

    def tell(self, subject, text):
        self.mails.append(subject)


@pytest.fixture
def handle(monkeypatch):
    context = SimpleNamespace(get_remaining_time_in_millis=lambda: 900_000)
    monkeypatch.setenv("SNN_STACK", "Cats")
    monkeypatch.setattr(sleep, "EVERY", 0)

    def call(cloud, event=EVENT):
        monkeypatch.setattr(sleep, "Services", lambda: cloud)
        sleep.lambda_handler(event, context)
        return cloud

    return call


def test_an_upload_wakes_the_stack_and_reaches_launchlambda(handle):
    cloud = handle(Cloud(asleep=True))
    assert not cloud.asleep
    ((function, event),) = cloud.invoked
    assert function == "Cats-LaunchLambda"
    (found,) = uploads(event)
    assert (found.bucket, found.key, found.etag) == ("cats", "training_input/datasets.h5", "e")
    assert cloud.mails == ["Cats is awake"]


def test_while_it_is_awake_an_upload_is_left_to_launchlambda(handle):
    cloud = handle(Cloud(asleep=False))
    assert cloud.invoked == cloud.mails == []


def test_parameters_alone_wake_nobody(handle):
    event = json.loads(json.dumps(EVENT).replace("datasets.h5", "parameters.json"))
    assert handle(Cloud(asleep=True), event).asleep
    assert sleep.DATA == upload.DATA


def test_a_stack_that_cannot_be_woken_is_mailed_and_tried_again_by_lambda(handle):
    cloud = Cloud(asleep=True, broken=True)
    with pytest.raises(sleep.StillAsleep, match="UPDATE_ROLLBACK_COMPLETE"):
        handle(cloud)
    assert cloud.mails == ["Cats does not wake"] and cloud.invoked == []


def test_launchlambda_leaves_alone_what_comes_while_the_stack_sleeps(monkeypatch):
    "There is no parameter server to ask; WakeLambda brings the event again."
    monkeypatch.setattr(
        launch, "process_services", lambda: Services({"SNN_REDIS_URL": "asleep"})
    )
    assert "snn wake" in launch.lambda_handler(EVENT, None)["refused"]
    servers = TEMPLATES["parameter_server.yaml"]["Outputs"]["Url"]["Value"]
    asleep = {"AwakeNode": False, "AwakeServerless": False}
    assert render(servers, {}, asleep) == launch.ASLEEP


class Idle(Cloud):
    "The same, with a bucket, and a LaunchLambda that says what runs."

    def __init__(self, changed=600, written=600, running=(), says=None, **more):
        super().__init__(asleep=False, **more)
        ago = lambda minutes: datetime.now(UTC) - timedelta(minutes=minutes)
        self.changed, self.written = ago(changed), ago(written)
        self.says = {"running": list(running)} if says is None else says

    def describe_stacks(self, StackName):
        found = super().describe_stacks(StackName)
        found["Stacks"][0]["CreationTime"] = self.changed
        return found

    def get_paginator(self, name):
        return self

    def paginate(self, Bucket, Prefix):
        assert Bucket == "cats"
        written = Prefix == "training_results/"
        yield {"Contents": [{"LastModified": self.written}]} if written else {}

    def invoke(self, FunctionName, Payload):
        assert (FunctionName, json.loads(Payload)) == ("Cats-LaunchLambda", {"state": "runs"})
        return {"Payload": BytesIO(json.dumps(self.says).encode())}

    def update_stack(self, **call):
        self.asleep = True


@pytest.fixture
def look(handle, monkeypatch):
    monkeypatch.setenv("SNN_SLEEP_AFTER", "120")
    monkeypatch.setenv("SNN_BUCKET", "cats")
    return lambda cloud: handle(cloud, {"state": "sleep"})


def test_a_stack_in_which_nothing_happens_falls_asleep(look):
    cloud = look(Idle())
    assert cloud.asleep and cloud.mails == ["Cats falls asleep"]


@pytest.mark.parametrize(
    "busy",
    [{"changed": 60}, {"written": 60}, {"running": ["cats-1"]}],
    ids=lambda busy: next(iter(busy)),
)
def test_one_in_which_something_happened_stays_awake(busy, look):
    cloud = look(Idle(**busy))
    assert not cloud.asleep and not cloud.mails


def test_if_nobody_says_what_runs_it_stays_awake(look):
    cloud = Idle(says={"errorMessage": "no parameter server"})
    with pytest.raises(RuntimeError, match="stays awake: LaunchLambda does not say what runs"):
        look(cloud)
    assert not cloud.asleep


def test_by_itself_it_sleeps_only_where_somebody_has_asked_for_it():
    template, main = TEMPLATES["wake.yaml"], TEMPLATES["main.yaml"]
    assert main["Parameters"]["SleepAfter"]["Default"] == 0
    assert template["Resources"]["Sleep"]["Condition"] == "ByItself"
    both = template["Conditions"]["ByItself"]["Fn::And"]
    assert {"Fn::Not": [{"Fn::Equals": [{"Ref": "SleepAfter"}, 0]}]} in both
    target = template["Resources"]["Sleep"]["Properties"]["Target"]
    assert json.loads(target["Input"]) == {"state": "sleep"}
    names = template["Resources"]["WakeFunction"]["Properties"]["Environment"]["Variables"]
    assert {"SNN_SLEEP_AFTER", "SNN_BUCKET", "SNN_STACK", "SNN_TOPIC"} == names.keys()


def test_what_looks_whether_to_sleep_is_in_the_costs():
    asleep = {**PROFILES["minimal"], "Asleep": "yes"}
    cost = lambda **more: monthly(standing({**asleep, **more}, load()))
    assert cost() < cost(SleepAfter="120") < cost() + 0.1


def test_launchlambda_knows_which_runs_are_under_way(cloud, parameters, monkeypatch):
    runs = cloud.services.runs
    monkeypatch.setattr(launch, "process_services", lambda: cloud.services)
    monkeypatch.setattr(runs, "names", lambda: ["a", "b"])
    state = lambda run: SimpleNamespace(state="running" if run == "b" else "finished")
    monkeypatch.setattr(runs, "status", state)
    assert launch.lambda_handler({"state": "runs"}, None) == {"running": ["b"]}


# The local AWS forgets attributes of what stays in a nested stack that is updated, so templates sleep here one by one.
ALONE = {
    "network": ("ec2", "describe_vpc_endpoints", "VpcEndpoints", 5, 2, {}),
    "parameter_server": (
        *("elasticache", "describe_replication_groups", "ReplicationGroups", 1, 0),
        {"NodeType": "cache.t4g.small", "Subnets": "SUBNET", "SecurityGroup": "sg-1"},
    ),
    "observability": (
        *("cloudwatch", "describe_alarms", "MetricAlarms", 3, 0),
        {"Topic": "t", "DailySpend": "9", "Email": "e", "MonthlyBudget": "0", "Local": "yes"},
    ),
}


@pytest.mark.parametrize("name", ALONE)
def test_a_template_on_this_machine_sleeps_and_wakes(name, aws, snn, monkeypatch, until):
    service, call, key, awake, asleep, given = ALONE[name]
    account, stack = Account("us-east-1", aws.url), name.replace("_", "-")
    count = lambda: len(getattr(account.client(service), call)()[key])
    if "Subnets" in given:
        vpc = account.client("ec2").create_vpc(CidrBlock="10.0.0.0/16")["Vpc"]["VpcId"]
        made = account.client("ec2").create_subnet(VpcId=vpc, CidrBlock="10.0.0.0/24")
        given = {**given, "Subnets": made["Subnet"]["SubnetId"]}
    account.client("cloudformation").create_stack(
        StackName=stack,
        TemplateBody=(infra_folder() / f"{name}.yaml").read_text(),
        Parameters=[
            {"ParameterKey": k, "ParameterValue": v}
            for k, v in {"StackName": stack, "Asleep": "no", **given}.items()
        ],
    )
    status = lambda: describe(account, stack)["StackStatus"]
    until(lambda: status() == "CREATE_COMPLETE", "the stack is there")
    before = count()
    monkeypatch.setattr("snn.cli.care._under_way", lambda *rest: [])
    there = ("--stack", stack, "--endpoint-url", aws.url, "--region", "us-east-1")
    code, said, errors = snn("sleep", *there)
    assert code == 0, errors
    assert "an upload wakes it" in said.replace("\n", " ")
    assert before - count() == awake - asleep
    assert "sleeps already" in snn("sleep", *there)[1]
    code, said, errors = snn("wake", *there)
    assert code == 0, errors
    assert count() == before
    assert "awake already" in snn("wake", *there)[1]


def test_a_stack_from_before_says_so(aws):
    formation = Account("us-east-1", aws.url).client("cloudformation")
    body = '{"Resources": {"Topic": {"Type": "AWS::SNS::Topic"}}}'
    formation.create_stack(StackName="Old", TemplateBody=body)
    with pytest.raises(InputError, match="older than sleep; bin/deploy"):
        sleep.state_of(formation, "Old")


def test_a_run_under_way_is_not_put_to_sleep_without_a_word(monkeypatch, snn):
    from snn.cli import care

    changed = []
    monkeypatch.setattr(care, "_under_way", lambda *rest: ["cats-1"])
    monkeypatch.setattr(care, "_change", lambda *rest: bool(changed.append(rest)))
    code, _, errors = snn("sleep", "--stack", "Cats")
    assert code == 2 and "run cats-1 is under way" in errors.replace("\n", " ") and not changed
    assert snn("sleep", "--stack", "Cats", "--yes")[0] == 0 and changed
