"""Mails, metrics and the ledger are looked at; a run that can't deliver them goes on, and says so at its end."""

import json

import pytest

from snn.backends.aws.ledger import create_tables
from snn.cloud import telemetry
from snn.deploy import runs
from snn.deploy.inputs import Account
from snn.local.cloud import LocalCloud

GONE = "arn:aws:sns:us-east-1:000000000000:gone"


@pytest.fixture(scope="module")
def cloud():
    "A cloud whose topic and whose tables are gone."
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SNN_TOPIC", GONE)
        patch.setenv("SNN_TABLES", "Gone-")
        with LocalCloud(1, ledger="dynamodb") as opened:
            yield opened


def test_a_run_without_topic_and_tables_does_all_its_epochs_and_says_what_is_lost(
    cloud, parameters, small_data, start_run, finished
):
    chosen = parameters((3, 1), granularity="layer", notify_every=1, batch_size=167)
    run = start_run(cloud, "gone", chosen, small_data)
    finished(cloud, run)
    left = {key.split("/")[-1] for key in cloud.bucket.keys(f"training_results/{run}/")}
    assert left == {"params.h5", "results.json", "run.json"}
    said = json.loads(cloud.bucket.get(f"training_results/{run}/run.json"))["undelivered"]
    for subject in (f"Run {run} started", f"Run {run}: epoch 1"):
        assert sum(line.startswith(f"mail, {subject}: ") for line in said) == 1
    for table in ("LaunchLambda", "TrainerLambda", "NeuronLambda", "Costs"):
        assert sum(f"ledger of run {run}, table Gone-{table}: " in line for line in said) == 1
    assert len(said) == 6
    assert "epoch1" in json.loads(cloud.bucket.get(f"training_results/{run}/results.json"))
    assert runs.undelivered(Account("us-east-1", cloud.aws.url), "snn", run) == said


def test_watch_names_the_table_that_is_gone_and_goes_on(
    cloud, start_run, parameters, finished, small_data, monkeypatch
):
    run = start_run(cloud, "watched", parameters((3, 1), granularity="network"), small_data)
    finished(cloud, run)
    account, news = Account("us-east-1", cloud.aws.url), []
    monkeypatch.setattr(runs, "bucket_of", lambda account, stack: "snn")
    assert runs.watch(account, "Gone", run, news.append, every=0.01).finished
    assert news[0].errors == [
        "there is no table Gone-Costs, so no epochs are shown; bin/deploy makes it"
    ]
    create_tables(account.client("dynamodb"), "Gone-")
    assert runs.watch(account, "Gone", run, news.append, every=0.01).errors == []


def test_metrics_that_fail_do_not_fail_what_they_measure(monkeypatch, capsys):
    monkeypatch.setenv("AWS_LAMBDA_FUNCTION_NAME", "Cats-LaunchLambda")
    monkeypatch.setenv("POWERTOOLS_SERVICE_NAME", "Cats")
    handled = []
    handler = telemetry.logged(
        lambda event, context: handled.append(event) or telemetry.note("x", Cost="a word")
    )
    context = type("Context", (), {"aws_request_id": "1"})
    handler({"run": "demo"}, context)
    line = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert handled == [{"run": "demo"}] and "a word" in line["no_metrics"]
    handler({"run": "demo"}, context)
