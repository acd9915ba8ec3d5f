"""What can't be deployed is refused before anything is touched, in a sentence."""

import pytest
from botocore.exceptions import ClientError

from snn.deploy.inputs import check, check_artifacts, check_words
from snn.errors import InputError
from snn.local.server import local_aws


@pytest.fixture(scope="module")
def aws():
    with local_aws() as opened:
        yield opened


@pytest.mark.parametrize(
    "bucket",
    [
        "amzn-s3-demo-bucket",
        "cats--x-s3",
        "cats--ol-s3",
        "cats--table-s3",
        "cats.mrap",
        "cats-s3alias",
        "xn--cats",
        "sthree-cats",
        "cats..dogs",
        "192.168.5.4",
        "Cats",
        "cats-",
        "ca",
    ],
)
def test_a_bucket_name_that_s3_would_refuse_is_refused(bucket, inputs):
    with pytest.raises(InputError, match="S3 keeps some beginnings") as refused:
        check_words(inputs._replace(bucket=bucket))
    assert repr(bucket) in str(refused.value)


@pytest.mark.parametrize("stack", ["Cats-", "C-", "-Cats", "1Cats", "Cats_", "C" * 51, ""])
def test_a_stack_name_that_no_template_can_hold_is_refused(stack, inputs):
    with pytest.raises(InputError, match="does not end in a hyphen"):
        check_words(inputs._replace(stack=stack))


@pytest.mark.parametrize("stack", ["C", "Cats", "my-cats-2", "C" * 50])
def test_a_good_name_is_taken(stack, inputs):
    check_words(inputs._replace(stack=stack, bucket="cats.of-2026"))


def test_an_artifacts_bucket_of_somebody_else_is_refused_before_anything_is_touched(
    account, inputs, monkeypatch
):
    s3, asked = account.client("s3"), []

    def head_bucket(**call):
        asked.append(call)
        code = "403" if call["Bucket"].endswith("-artifacts") else "404"
        raise ClientError({"Error": {"Code": code, "Message": "no"}}, "HeadBucket")

    monkeypatch.setattr(s3, "head_bucket", head_bucket)
    with pytest.raises(
        InputError,
        match="the bucket cats-of-2026-artifacts, for templates and packages, belongs to somebody else; "
        "choose a bucket name other than cats-of-2026",
    ):
        check(account, inputs)
    assert asked[-1]["ExpectedBucketOwner"] == "000000000000"


def test_an_artifacts_bucket_in_another_region_is_refused(account, inputs, monkeypatch):
    monkeypatch.setattr(
        account.client("s3"), "head_bucket", lambda **call: {"BucketRegion": "eu-west-3"}
    )
    with pytest.raises(
        InputError, match="is in eu-west-3, and the stack would be in us-east-1"
    ):
        check_artifacts(account, inputs)


def test_an_artifacts_bucket_of_our_own_is_taken(account, inputs):
    check_artifacts(account, inputs)  # there is none yet
    account.client("s3").create_bucket(Bucket="cats-of-2026-artifacts")
    check_artifacts(account, inputs)
