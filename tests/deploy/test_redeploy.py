"""What a second deployment keeps of the first, and what it counts."""

import pytest
from botocore.exceptions import ClientError

from snn.cli.deploy import _options
from snn.deploy.inputs import FEW, concurrency, kept, options_known, quota, reserved
from snn.deploy.teardown import empty_bucket
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
    first = _options({}, FIRST, False)
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
    again = _options(before, NOTHING, False)
    assert again == {**first, "CacheNodeType": "cache.r7g.large"}
    assert (
        again["Notebook"],
        again["Pipeline"],
        again["Certificate"],
        again["Architecture"],
        again["ModelCopy"],
    ) == ("no", "no", "arn:aws:acm:1", "x86_64", "predict_input/params.h5")
    assert _options(before, {**NOTHING, "Notebook": True, "Certificate": ""}, False) == {
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
