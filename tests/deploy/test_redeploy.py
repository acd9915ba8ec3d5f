"""What a second deployment keeps of the first, and what it counts."""

import boto3
import pytest
from botocore.exceptions import ClientError
from botocore.stub import ANY, Stubber

from snn.cli.deploy import _options
from snn.deploy.inputs import (
    FEW,
    concurrency,
    kept,
    options_known,
    quota,
    reserved,
    settings,
    zones,
)
from snn.deploy.runs import errors_since
from snn.deploy.teardown import (
    NOTEBOOK_LOGS,
    Resource,
    delete_stack,
    empty_bucket,
    forget_notebook,
)
from snn.errors import InputError

NOTHING = dict.fromkeys(
    (
        "Architecture",
        "NeuronConcurrency",
        "Notebook",
        "Tracing",
        "Pipeline",
        "Certificate",
        "Domain",
        "ReviewRange",
        "GitHubRepository",
        "ModelCopy",
    )
)
FIRST = {
    "Architecture": "x86_64",
    "NeuronConcurrency": 40,
    "Notebook": False,
    "Tracing": True,
    "Pipeline": False,
    "Certificate": "arn:aws:acm:1",
    "Domain": "cats.example",
    "ReviewRange": "203.0.113.7/32",
    "GitHubRepository": "my-network",
    "ModelCopy": True,
}


class Answers:
    "An account in which every service gives these answers."

    endpoint_url = None

    def __init__(self, **answers):
        self.answers = answers

    def client(self, service):
        return self

    def __getattr__(self, call):
        return lambda **arguments: self.answers[call]


def test_what_is_not_said_again_stays():
    first = _options({}, FIRST, False, {})
    stack = {
        "Parameters": [
            {"ParameterKey": name, "ParameterValue": value}
            for name, value in {
                **first,
                "CacheNodeType": "cache.r7g.large",
                "Templates": "old",
            }.items()
        ]
    }
    before = kept(Answers(describe_stacks={"Stacks": [stack]}), "Cats")
    again = _options(before, NOTHING, False, {})
    assert again == {**first, "CacheNodeType": "cache.r7g.large"}
    assert (
        again["Notebook"],
        again["Pipeline"],
        again["Certificate"],
        again["Architecture"],
        again["ModelCopy"],
    ) == ("no", "no", "arn:aws:acm:1", "x86_64", "predict_input/params.h5")
    assert _options(before, {**NOTHING, "Notebook": True, "Certificate": ""}, False, {}) == {
        **again,
        "Notebook": "yes",
        "Certificate": "",
    }


def test_every_option_is_a_parameter_of_the_template():
    assert (
        NOTHING.keys() | {"CacheNodeType", "DailySpend", "FirstZone"} <= options_known()
        and "BucketName" not in options_known()
    )


def test_what_the_stack_has_reserved_is_its_own():
    "895 are reserved of 1,000, all by this stack: it may keep them, and another may not have them."
    account = Answers(
        get_account_settings={
            "AccountLimit": {
                "ConcurrentExecutions": 1000,
                "UnreservedConcurrentExecutions": 105,
            }
        }
    )
    assert concurrency(account, 445, reserved({"NeuronConcurrency": "445"})) == 445
    with pytest.raises(InputError, match="too few to reserve 895"):
        concurrency(account, 445)
    assert (
        reserved({}) == reserved({"NeuronConcurrency": "0"}) == 0
        and quota(account) == 1000 > FEW
    )


class Bucket:
    "One that holds a file and will not let go of it."

    def get_paginator(self, name):
        return self

    def paginate(self, **where):
        return [{"Versions": [{"Key": "kept.h5", "VersionId": "1"}]}]

    def delete_objects(self, **what):
        return {
            "Errors": [
                {
                    "Key": "kept.h5",
                    "VersionId": "1",
                    "Code": "AccessDenied",
                    "Message": "Access Denied",
                }
            ]
        }


def test_a_file_that_could_not_be_deleted_is_named():
    account = Answers()
    account.client = lambda service: Bucket()
    with pytest.raises(ClientError, match="kept.h5.*Access Denied|Access Denied.*kept.h5"):
        empty_bucket(account, "cats")


class Real:
    "An account whose clients are botocore's, with answers that botocore's models allow."

    region = "us-east-1"

    def __init__(self):
        self.clients = {}

    def client(self, service):
        if service not in self.clients:
            made = boto3.client(service, region_name=self.region)
            self.clients[service] = made, Stubber(made)
            self.clients[service][1].activate()
        return self.clients[service][0]

    def answer(self, service, *answers):
        self.client(service)
        for call, answer in answers:
            self.clients[service][1].add_response(call, answer)

    def done(self):
        for _, stubber in self.clients.values():
            stubber.assert_no_pending_responses()


def offers(account, machines, endpoints):
    "An account with four zones, of which some have machines and some have endpoints."
    in_ = lambda letters: [f"us-east-1{letter}" for letter in letters]
    service = lambda name: {
        "ServiceName": f"com.amazonaws.us-east-1.{name}",
        "AvailabilityZones": in_(endpoints[name]),
    }
    account.answer(
        "ec2",
        (
            "describe_availability_zones",
            {"AvailabilityZones": [{"ZoneName": name} for name in in_("abcd")]},
        ),
        (
            "describe_instance_type_offerings",
            {"InstanceTypeOfferings": [{"Location": name} for name in in_(machines)]},
        ),
        ("describe_vpc_endpoint_services", {"ServiceDetails": [*map(service, endpoints)]}),
    )
    return account


def test_zones_are_chosen_that_have_all_that_is_needed():
    "us-east-1a is a zone without Lambda's endpoint here, us-east-1c one without machines of the type."
    account = offers(Real(), "abd", {"lambda": "bcd", "sns": "abcd", "secretsmanager": "abcd"})
    assert zones(account) == ["us-east-1b", "us-east-1d"]
    account.done()
    with pytest.raises(InputError, match="us-east-1 has 1 zones with r7g.large"):
        nothing = {"lambda": "b", "sns": "abcd", "secretsmanager": "abcd"}
        zones(offers(Real(), "ab", nothing), "cache.r7g.large")


def test_every_parameter_can_be_set_by_its_name():
    assert settings(["LogRetention=30", "CacheNodeType=cache.r7g.large"]) == {
        "LogRetention": "30",
        "CacheNodeType": "cache.r7g.large",
    }
    chosen = settings(["LogRetention=30", "Notebook=no"])
    options = _options({"LogRetention": "7"}, NOTHING, False, chosen)
    assert (options["LogRetention"], options["Notebook"]) == ("30", "no")


@pytest.mark.parametrize(
    "word, sentence",
    [
        ("LogRetention", "it looks like LogRetention=30"),
        ("LogRetentio=3", "did you mean LogRetention"),
        ("LogRetention=long", "may be a number"),
        ("Tracing=on", "may be PassThrough or Active"),
        ("BucketName=other", "--set BucketName is not known"),
    ],
)
def test_a_setting_that_cannot_be_is_refused(word, sentence):
    with pytest.raises(InputError, match=sentence):
        settings([word])


def test_errors_behind_an_empty_page_of_the_log_are_found():
    account = Real()
    account.answer(
        "logs",
        ("filter_log_events", {"events": [], "nextToken": "more"}),
        ("filter_log_events", {"events": [{"message": "ERROR no room"}]}),
        ("filter_log_events", {"events": []}),
        ("filter_log_events", {"events": []}),
    )
    assert errors_since(account, "Cats", 0) == ["LaunchLambda: ERROR no room"]
    account.done()


def test_only_the_stacks_own_notebook_logs_are_deleted():
    account = Real()
    account.answer(
        "logs",
        (
            "describe_log_streams",
            {"logStreams": [{"logStreamName": "Cats/jupyter.log"}], "nextToken": "more"},
        ),
    )
    stubber = account.clients["logs"][1]
    stream = {"logGroupName": NOTEBOOK_LOGS, "logStreamName": "Cats/jupyter.log"}
    more = {"logGroupName": NOTEBOOK_LOGS, "logStreamNamePrefix": "Cats/", "nextToken": ANY}
    stubber.add_response("describe_log_streams", {"logStreams": []}, more)
    stubber.add_response("delete_log_stream", {}, stream)
    arn = "arn:aws:sagemaker:us-east-1:123456789012:notebook-instance/Cats"
    assert forget_notebook(account, arn) == 1
    account.done()


def test_a_bucket_that_has_filled_again_is_emptied_before_the_next_try(monkeypatch):
    "A function that was still running has written a file after the bucket had been emptied."
    bucket, account = ["late.h5"], Answers(delete_stack=None)
    put = lambda name, value: monkeypatch.setattr(f"snn.deploy.teardown.{name}", value)
    put("describe", lambda *rest: {"StackId": "Cats"})
    put("all_events", lambda *rest: [])
    put(
        "follow",
        lambda *rest: ("DELETE_FAILED" if bucket else "DELETE_COMPLETE", []),
    )
    put("EMPTY", {"AWS::S3::Bucket": lambda account, name: bucket.clear()})
    found = [Resource("AWS::S3::Bucket", "cats")]
    assert delete_stack(account, "Cats", found, print, 0) == ""
