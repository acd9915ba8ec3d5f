"""What a deployment would do, what stays on and what it costs a month, and whether the account is ready."""

import re

import pytest
from templates import all_templates
from test_redeploy import Real

from snn.cli.deploy import _bill
from snn.cloud.prices import load
from snn.deploy import standing
from snn.deploy.account import FAILED, OK, UNKNOWN, account_findings, look
from snn.deploy.inputs import Account, describe, zones
from snn.deploy.stack import Change, deploy, in_words
from snn.local.server import local_aws

TEMPLATES = all_templates()
FULL = {"Pipeline": "yes", "Notebook": "yes"}


@pytest.fixture(scope="module")
def aws():
    with local_aws() as opened:
        yield opened


def of(template, kind):
    return [
        resource["Properties"]
        for resource in TEMPLATES[template]["Resources"].values()
        if resource["Type"] == kind
    ]


def test_what_is_counted_is_what_the_templates_make():
    "An alarm on metric math watches each metric that it asks for."
    watched = lambda alarm: sum("MetricStat" in m for m in alarm.get("Metrics", [])) or 1
    alarms = lambda name: sum(map(watched, of(name, "AWS::CloudWatch::Alarm")))
    assert alarms("observability.yaml") == standing.ALARMS
    assert alarms("service/balancer.yaml") == standing.SERVICE_ALARMS
    assert len(of("observability.yaml", "AWS::CloudWatch::Dashboard")) == 1
    assert len(of("parameter_server.yaml", "AWS::SecretsManager::Secret")) == 1
    (task,) = of("service/service.yaml", "AWS::ECS::TaskDefinition")
    assert (int(task["Cpu"]) / 1024, int(task["Memory"]) / 1024) == (
        standing.CPU,
        standing.MEMORY,
    )
    (notebook,) = of("notebook.yaml", "AWS::SageMaker::NotebookInstance")
    assert notebook["VolumeSizeInGB"] == standing.VOLUME
    assert len(of("service/network.yaml", "AWS::EC2::Subnet")) == standing.ADDRESSES
    (watch,) = of("functions.yaml", "AWS::Scheduler::Schedule")
    assert watch["ScheduleExpression"] == "rate(1 minute)" and standing.MINUTES == 60
    assert not any("AWS::EC2::NatGateway" in str(template) for template in TEMPLATES.values())


def test_a_month_by_hand():
    "The parameter server and the endpoints, 730 hours; the rest of the minimal profile is under six dollars."
    items = {item.what: item.dollars for item in standing.standing({}, load())}
    assert items["parameter server, cache.t4g.small"] == pytest.approx(0.0256 * 730)
    assert items["3 interface endpoints"] == pytest.approx(3 * 0.01 * 730)
    assert 40.59 < sum(items.values()) < 46.6
    two = standing.standing({**FULL, "Tasks": "2"}, load())
    one = standing.standing(FULL, load())
    task = (0.5 * 0.03238 + 0.00356 + 0.005) * 730
    assert standing.monthly(two) - standing.monthly(one) == pytest.approx(task)


def test_the_readme_says_what_the_price_file_says(root):
    assert standing.table(load()) in (root / "infra" / "README.md").read_text()
    (said,) = re.findall(
        r"about \$(\d+) a month \(`minimal`\) to \$(\d+) \(`full`\)",
        (root / "README.md").read_text(),
    )
    months = [
        standing.monthly(standing.standing(standing.PROFILES[name], load()))
        for name in ("minimal", "full")
    ]
    assert [int(dollars) for dollars in said] == [round(month) for month in months]


def test_a_machine_without_a_price_is_said_not_left_out():
    lines = _bill(standing.standing({"CacheNodeType": "cache.r7g.large"}, load()))
    assert "? parameter server, cache.r7g.large (prices.json has no price of it)" in lines[1]
    assert lines[-1].endswith("in all but what has no price")


def test_what_is_lost_is_named_and_what_is_new_is_counted():
    changes = [
        Change("Add", "Storage/Bucket", "AWS::S3::Bucket"),
        Change("Replace", "Storage/CostTable", "AWS::DynamoDB::Table"),
        Change("Remove", "NotebookInstance", "AWS::CloudFormation::Stack"),
    ]
    assert in_words(changes) == [
        "makes 1 resources: 1 S3::Bucket",
        "replaces Storage/CostTable (AWS::DynamoDB::Table)",
        "deletes NotebookInstance (AWS::CloudFormation::Stack)",
    ]


def test_a_plan_that_nobody_agrees_to_leaves_nothing(aws, inputs, packages):
    account, asked = Account("us-east-1", aws.url), []
    no = lambda changes: bool(asked.append(changes))
    assert (
        deploy(account, inputs, packages, {"Notebook": "no"}, every=0.1, agree=no) == "planned"
    )
    (changes,) = asked
    assert {"Functions", "Network", "Storage"} <= {change.resource for change in changes}
    found = describe(account, inputs.stack)
    assert found is None or found["StackStatus"] in ("REVIEW_IN_PROGRESS", "DELETE_COMPLETE")
    assert not account.client("lambda").list_functions()["Functions"]


def test_the_command_says_it_all_and_changes_nothing_without_an_answer(
    aws, snn, packages, monkeypatch
):
    monkeypatch.setattr("snn.deploy.package.build", lambda name, target: packages[name])
    code, said, errors = snn(
        *("deploy", "--plan", "--stack", "Planned", "--bucket", "planned-cats"),
        *("--email", "somebody@example.com", "--profile", "minimal"),
        *("--endpoint-url", aws.url, "--region", "us-east-1"),
    )
    assert code == 0, errors
    for line in (
        "makes ",
        "18.69 parameter server, cache.t4g.small",
        "46.05 in all",
        "ok          Lambda:",
        "not checked zones:",
        "Nothing has been changed.",
    ):
        assert line in said, line
    assert "There is nobody to ask" in errors


QUOTAS = {
    "codebuild": "Concurrently running builds for ARM/Small environment",
    "fargate": "Fargate On-Demand vCPU resource count",
    "vpc": "VPCs per Region",
}


class New(Real):
    "An account with these quotas, by service."

    endpoint_url = None

    def __init__(self, **quotas):
        super().__init__()
        self.quotas = quotas

    def client(self, service):
        if service != "service-quotas":
            return super().client(service)
        return self

    def get_paginator(self, name):
        return self

    def paginate(self, ServiceCode):
        value = self.quotas[ServiceCode]
        return [{"Quotas": [{"QuotaName": QUOTAS[ServiceCode], "Value": value}]}]


def findings(limit, **quotas):
    account = New(**quotas)
    account.answer(
        "sts",
        *[
            (
                "get_caller_identity",
                {"Arn": "arn:aws:iam::111111111111:user/me", "Account": "1" * 12},
            )
        ]
        * 2,
    )
    account.answer(
        "lambda", ("get_account_settings", {"AccountLimit": {"ConcurrentExecutions": limit}})
    )
    account.answer("ec2", ("describe_vpcs", {"Vpcs": [{"VpcId": "vpc-1"}] * 5}))
    options = {"Pipeline": "yes", "Tasks": "4"}
    return {f.what: (f.state, f.words) for f in account_findings(account, options, {})}


def test_a_new_account_hears_what_it_lacks():
    found = findings(10, codebuild=0, fargate=2, vpc=5)
    assert found["account"][0] == OK
    assert found["Lambda"][1].startswith("10 functions at once, as in new accounts")
    assert found["CodeBuild"] == (
        FAILED,
        "0 builds at once, and 1 are needed for the Prediction API's image; "
        "Service Quotas in the console raises it",
    )
    assert found["Fargate"][0] == FAILED and "4 are needed" in found["Fargate"][1]
    assert found["network"][0] == FAILED and "6 are needed" in found["network"][1]


def test_an_account_with_room_hears_so():
    found = findings(1000, codebuild=1, fargate=6, vpc=6)
    states = {what: found[what][0] for what in ("Lambda", "CodeBuild", "Fargate", "network")}
    assert set(states.values()) == {OK}


def test_what_could_not_be_looked_at_is_no_success():
    def unseen():
        raise LookupError("no such page")

    assert look("quota", unseen) == ("quota", UNKNOWN, "could not be looked at: no such page")


def test_a_zone_without_fargate_is_not_chosen(monkeypatch):
    "us-west-1 has Fargate in usw1-az1 and usw1-az3 alone; names of zones differ from account to account."
    account = Real()
    account.region = "us-west-1"
    in_ = lambda letters: [f"us-west-1{letter}" for letter in letters]
    ids = dict(zip("abc", ("usw1-az3", "usw1-az2", "usw1-az1")))
    services = ("lambda", "sns", "secretsmanager")
    account.answer(
        "ec2",
        (
            "describe_availability_zones",
            {
                "AvailabilityZones": [
                    {"ZoneName": f"us-west-1{letter}", "ZoneId": ids[letter]} for letter in ids
                ]
            },
        ),
        (
            "describe_instance_type_offerings",
            {"InstanceTypeOfferings": [{"Location": name} for name in in_("abc")]},
        ),
        (
            "describe_vpc_endpoint_services",
            {
                "ServiceDetails": [
                    {
                        "ServiceName": f"com.amazonaws.us-west-1.{name}",
                        "AvailabilityZones": in_("abc"),
                    }
                    for name in services
                ]
            },
        ),
    )
    assert zones(account) == ["us-west-1a", "us-west-1c"]


def test_a_word_that_is_no_profile_is_refused(snn):
    code, _, errors = snn("deploy", "--profile", "tiny")
    assert code == 2 and "it may be minimal, standard, full" in errors.replace("\n", " ")
