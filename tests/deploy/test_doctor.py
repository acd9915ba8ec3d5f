"""What is wrong is said in one sentence each, and what could not be looked at is no success."""

import json
from io import BytesIO

import pytest

from snn.deploy import doctor as doctors
from snn.deploy.account import FAILED, OK, UNKNOWN, Finding, look
from snn.deploy.teardown import Resource
from snn.errors import InputError
from snn.handlers import launch, protocol


class Answers:
    "An account in which each call gives this answer."

    endpoint_url = region = None

    def __init__(self, **answers):
        self.answers = answers

    def client(self, service):
        return self

    def __getattr__(self, call):
        return lambda **arguments: self.answers[call]


FOUND = [
    Resource("AWS::EC2::VPC", "vpc-1"),
    Resource("AWS::EC2::VPCEndpoint", "vpce-1"),
    Resource("AWS::EC2::VPCEndpoint", "vpce-2"),
    Resource("AWS::ElastiCache::ReplicationGroup", "cats"),
]
ON = {"Value": True}


def said(payload, **more):
    return {"Payload": BytesIO(json.dumps(payload).encode()), **more}


def through(answer, state="Active"):
    account = Answers(get_function={"Configuration": {"State": state}}, invoke=answer)
    return look("NeuronLambda", lambda: doctors.through(account, "Cats", "NeuronLambda"))


WHOLE = {"lambda": "", "sns": "", "parameter server": ""}
SICK = [
    (
        lambda: through(said({**WHOLE, "sns": "sns.here has no address (DNS): unknown"})),
        FAILED,
        "Cats-NeuronLambda does not reach sns: sns.here has no address (DNS): unknown",
    ),
    (
        lambda: through(said({"errorMessage": "no module"}, FunctionError="Unhandled")),
        FAILED,
        "Cats-NeuronLambda failed: no module; its log is /aws/lambda/Cats-NeuronLambda",
    ),
    (lambda: through(said(WHOLE), "Inactive"), FAILED, "Cats-NeuronLambda is Inactive"),
    (lambda: through(said(None)), UNKNOWN, "gave no answer that it would give on AWS"),
    (lambda: through(said(WHOLE)), OK, "reaches lambda, sns, parameter server"),
    (
        lambda: look(
            "DNS",
            lambda: doctors.names(
                Answers(
                    describe_vpc_attribute={
                        "EnableDnsSupport": {"Value": False},
                        "EnableDnsHostnames": ON,
                    }
                ),
                FOUND,
            ),
        ),
        FAILED,
        "enableDnsSupport of vpc-1 is off, so no endpoint is found by its name",
    ),
    (
        lambda: look(
            "endpoints",
            lambda: doctors.endpoints(
                Answers(
                    describe_vpc_endpoints={
                        "VpcEndpoints": [{"ServiceName": "sns", "State": "pending"}]
                    }
                ),
                FOUND,
            ),
        ),
        FAILED,
        "sns is pending; 1 are gone",
    ),
    (
        lambda: look(
            "cache",
            lambda: doctors.cache(
                Answers(
                    describe_replication_groups={"ReplicationGroups": [{"Status": "deleting"}]}
                ),
                FOUND,
            ),
        ),
        FAILED,
        "cats is deleting; wait until it is available",
    ),
    (
        lambda: look(
            "cache",
            lambda: doctors.cache(
                Answers(
                    describe_serverless_caches={"ServerlessCaches": [{"Status": "creating"}]}
                ),
                [Resource("AWS::ElastiCache::ServerlessCache", "snn-1a2b3c4d")],
            ),
        ),
        FAILED,
        "snn-1a2b3c4d is creating; wait until it is available",
    ),
    (
        lambda: look(
            "uploads",
            lambda: doctors.notification(
                Answers(get_bucket_notification_configuration={}), "Cats", "cats"
            ),
        ),
        FAILED,
        "s3://cats tells Cats-LaunchLambda nothing, so no upload starts a run",
    ),
]


@pytest.mark.parametrize("case, state, words", SICK, ids=range(len(SICK)))
def test_each_failure_has_its_sentence(case, state, words):
    finding = case()
    assert finding.state == state and words in finding.words


def test_a_mail_that_nobody_confirmed_is_found(monkeypatch):
    topic = {"Outputs": [{"OutputKey": "Topic", "OutputValue": "arn:topic"}]}
    monkeypatch.setattr(doctors, "describe", lambda account, stack: topic)
    waits = {"Subscriptions": [{"SubscriptionArn": "PendingConfirmation"}]}
    with pytest.raises(InputError, match="nobody has confirmed"):
        doctors.mail(Answers(list_subscriptions_by_topic=waits), "Cats")


def test_a_budget_that_counts_nothing_is_said():
    "AWS counts by a tag only when somebody has activated it."
    ask = lambda tags: look(
        "budget",
        lambda: doctors.budget(
            Answers(list_cost_allocation_tags={"CostAllocationTags": tags}),
            {"MonthlyBudget": "150"},
        ),
    )
    assert ask([])[1:] == (
        UNKNOWN,
        "could not be looked at: the tag snn:stack is not active for cost allocation, so AWS counts "
        "nothing by it; activate it in the Billing console, a day after the first deployment",
    )
    assert ask([{"TagKey": "snn:stack", "Status": "Active"}])[1:] == (OK, "150 USD a month")


def test_of_a_stack_that_sleeps_what_is_gone_is_not_a_failure(monkeypatch):
    put = lambda name, value: monkeypatch.setattr(doctors, name, lambda *rest: value)
    put("describe", {"StackStatus": "UPDATE_COMPLETE", "Outputs": []})
    put("kept", {"Asleep": "yes"})
    put("resources", [*FOUND[:1], Resource("AWS::S3::Bucket", "cats")])
    put("notification", "told")
    put("mail", "1 subscribed")
    put("names", "vpc-1 looks up names")
    found = doctors.stack_findings(Answers(), "Cats")
    assert [f.what for f in found if f.state == UNKNOWN] == [
        *("budget", "endpoints", "parameter server"),
        *doctors.FUNCTIONS,
    ]
    assert not any(f.state == FAILED for f in found)


@pytest.mark.parametrize("handler", [launch.lambda_handler, protocol.lambda_handler])
def test_each_function_says_what_it_reaches(handler, cloud, monkeypatch):
    "Here all of AWS is one address, and the parameter server another."
    module = launch if handler is launch.lambda_handler else protocol
    monkeypatch.setattr(module, "process_services", lambda: cloud.services)
    assert set(handler({"state": "check"}, None).values()) == {""}


@pytest.mark.parametrize("state, code", [(OK, 0), (UNKNOWN, 0), (FAILED, 2)])
def test_the_exit_code_says_whether_something_failed(state, code, monkeypatch, snn):
    finding = Finding("Lambda", state, "10 functions at once")
    monkeypatch.setattr(doctors, "doctor", lambda *rest: [finding])
    ended, printed, errors = snn("doctor", "--json")
    assert ended == code
    assert json.loads(printed) == [finding._asdict()]
    assert ("1 of 1 failed, 0 could not be checked" in errors) == (code == 2)
    assert "10 functions at once" in snn("doctor")[1]
