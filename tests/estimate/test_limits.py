"""A run ends at its owner's limits, cleanly, with the best model so far, and says so."""

import json
import os

import msgspec
import numpy as np
import pytest

from snn.cloud.meter import uploaded_at
from snn.cloud.runs import Status
from snn.data import h5 as data
from snn.errors import InputError
from snn.estimate.designs import default_plan
from snn.handlers import epoch
from snn.handlers.epoch import over_limit
from snn.local.cloud import LocalCloud
from snn.maths import network, sampling
from snn.maths.parameters import from_dict

TOPIC = "arn:aws:sns:us-east-1:000000000000:limits"


@pytest.fixture(scope="module")
def told_cloud():
    "A cloud whose runs send mails, and the queue that gets them."
    os.environ["SNN_TOPIC"] = TOPIC
    try:
        with LocalCloud() as cloud:
            sns, url = (
                cloud.aws.client("sns"),
                cloud.sqs.create_queue(QueueName="mails")["QueueUrl"],
            )
            assert sns.create_topic(Name="limits")["TopicArn"] == TOPIC
            arn = cloud.sqs.get_queue_attributes(QueueUrl=url, AttributeNames=["QueueArn"])[
                "Attributes"
            ]["QueueArn"]
            sns.subscribe(TopicArn=TOPIC, Protocol="sqs", Endpoint=arn)
            yield cloud, url
    finally:
        os.environ.pop("SNN_TOPIC")


def mails(cloud, url: str) -> list[str]:
    "Subjects and texts of the mails so far."
    found = []
    while messages := cloud.sqs.receive_message(QueueUrl=url, MaxNumberOfMessages=10).get(
        "Messages", []
    ):
        for message in messages:
            body = json.loads(message["Body"])
            found.append(f"{body['Subject']}: {body['Message']}")
            cloud.sqs.delete_message(QueueUrl=url, ReceiptHandle=message["ReceiptHandle"])
    return found


def record_of(cloud, run: str) -> dict:
    return json.loads(cloud.bucket.get(f"training_results/{run}/run.json"))


@pytest.fixture
def limited(told_cloud, parameters, small_data, start_run, finished):
    "Trains a small network under a limit; returns its parameters, plan, record and mails."
    cloud, url = told_cloud

    def run(name: str, **limit):
        mails(cloud, url)
        chosen = parameters((4, 1), epochs=100_000, granularity="network", **limit)
        plan = finished(cloud, start_run(cloud, name, chosen, small_data))
        return chosen, plan, record_of(cloud, plan.run), mails(cloud, url)

    return run


@pytest.fixture
def reference(small_data):
    "Weights of plain NumPy after so many epochs."

    def train(chosen, epochs: int) -> dict[str, np.ndarray]:
        found = data.read(small_data)
        chosen = msgspec.structs.replace(chosen, epochs=epochs)
        *_, (_, layers) = network.train(
            chosen, sampling.standardise(found.train_x), found.train_y
        )
        return {
            f"{name}{l}": array
            for l, layer in enumerate(layers, start=1)
            for name, array in zip("Wb", layer)
        }

    return train


def test_max_cost_ends_a_run_before_it_is_passed(limited, told_cloud, weights_of, reference):
    limit = 2e-3
    chosen, plan, record, said = limited("max-cost", max_cost=limit)
    assert record["reason"].startswith(
        "another epoch would cost more than max_cost allows: of 0.002 USD, 0.00"
    )
    assert (
        1 < record["epochs"] < 100_000
        and 0.5 * limit < record["meter"]["dollars"] < 1.02 * limit
    )
    found, expected = weights_of(told_cloud[0], plan.run), reference(chosen, record["epochs"])
    for name in expected:
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-9)
    assert any(
        mail.startswith(f"Run {plan.name} finished early") and "max_cost allows" in mail
        for mail in said
    )


def test_a_cost_that_one_epoch_passes_ends_the_run_after_it(limited):
    _, _, record, _ = limited("tiny-cost", max_cost=1e-12)
    assert record["epochs"] == 1


def test_the_deadline_ends_a_run_in_time(limited, told_cloud):
    for seconds in (
        2.5,
        10.0,
        40.0,
    ):  # until there is time for more than the one epoch that is always done
        _, plan, record, said = limited(f"deadline-{seconds:g}", deadline=seconds)
        if record["epochs"] > 1:
            break
    assert record["reason"] == f"another epoch would end after the deadline of {seconds:g} s"
    assert record["epochs"] > 1
    assert record["ended"] > uploaded_at(plan) and record["epochs"] < 100_000
    assert any(
        "finished early" in mail and f"the deadline of {seconds:g} s" in mail for mail in said
    )
    results = json.loads(told_cloud[0].bucket.get(f"training_results/{plan.run}/results.json"))
    assert (
        list(results)[0] == "Start"
        and list(results)[-1] == "End"
        and len(results) == 2 + record["epochs"]
    )


def test_a_run_that_is_cut_short_keeps_the_best_model(
    told_cloud, parameters, small_data, start_run, finished, weights_of
):
    cloud, _ = told_cloud
    for seconds in (2.0, 8.0, 32.0):  # until there is time to become worse again
        chosen = parameters(
            (5, 1),
            epochs=100_000,
            learning_rate=0.5,
            granularity="network",
            validation_fraction=0.3,
            deadline=seconds,
        )
        plan = finished(cloud, start_run(cloud, f"cut-{seconds:g}", chosen, small_data))
        status, found = cloud.services.runs.status(plan.run), data.read(small_data)
        if status.best_epoch < status.epoch:
            break
    kept, _ = sampling.split(167, 0.3, 0)
    reference = msgspec.structs.replace(chosen, epochs=status.best_epoch + 1)
    *_, (_, layers) = network.train(
        reference, sampling.standardise(found.train_x)[kept], found.train_y[kept]
    )
    left = weights_of(cloud, plan.run)
    assert status.cut and status.best_epoch < status.epoch
    for l, (W, b, *_) in enumerate(layers, start=1):
        np.testing.assert_allclose(left[f"W{l}"], W, rtol=1e-7)
        np.testing.assert_allclose(left[f"b{l}"], b, rtol=1e-7, atol=1e-12)


@pytest.mark.parametrize(
    "now, goes_on", [(10.0, True), (14.9, True), (15.1, False), (19.0, False), (30.0, False)]
)
def test_the_deadline_counts_the_next_epoch_too(now, goes_on, parameters, monkeypatch):
    "A clock that the test sets: the deadline is 20 s after the upload, and an epoch takes 5 s."
    plan = default_plan()
    plan = msgspec.structs.replace(
        plan,
        started="2026-01-01 00:00:00.000000",
        parameters=msgspec.structs.replace(plan.parameters, deadline=20.0),
    )
    began = uploaded_at(plan)
    monkeypatch.setattr(epoch.time, "time", lambda: began + now)
    why = over_limit(plan, Status(), Status(updated=began + now - 5))
    assert why == ("" if goes_on else "another epoch would end after the deadline of 20 s")


def test_without_limits_a_run_goes_on(parameters):
    plan = msgspec.structs.replace(default_plan(), started="2026-01-01 00:00:00.000000")
    assert over_limit(plan, Status(spent=1e6), Status()) == ""


@pytest.mark.parametrize("key", ["max_cost", "deadline"])
@pytest.mark.parametrize("value", [-1, "soon", None, float("nan")])
def test_wrong_limits_are_refused(key, value, parameters):
    values = msgspec.to_builtins(parameters())
    with pytest.raises(InputError, match=f"{key} holds .*; it may hold a number, 0 or more"):
        from_dict({**values, key: value})


def test_status_tells_what_was_spent(told_cloud, limited, snn, monkeypatch):
    cloud, _ = told_cloud
    _, plan, record, _ = limited("status", deadline=1.5)
    monkeypatch.setenv("SNN_REDIS_URL", cloud.server.url)
    code, said, _ = snn("status", plan.run, "--json")
    assert code == 0 and json.loads(said)["spent"]["dollars"] == pytest.approx(
        record["meter"]["dollars"], rel=0.5
    )
    code, said, _ = snn("status", plan.run)
    assert "at AWS's prices in us-east-1" in said
