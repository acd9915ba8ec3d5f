"""What a run has cost can be seen from outside its network."""

import pytest

from snn.backends.aws.ledger import DynamoLedger, create_tables
from snn.backends.valkey.store import Store, connect
from snn.cloud.messages import Message
from snn.deploy import runs
from snn.deploy.inputs import Account
from snn.deploy.runs import newest_cost, newest_spent
from snn.local.server import local_aws, parameter_server


@pytest.fixture(scope="module")
def ledger_and_account():
    with parameter_server() as server, local_aws() as aws:
        dynamodb = aws.client("dynamodb")
        create_tables(dynamodb, "Cats-")
        yield (
            DynamoLedger(Store(connect(server.url)), dynamodb, "Cats-"),
            Account("us-east-1", aws.url),
        )


def test_the_newest_amount_is_found_whatever_epochs_have_none(ledger_and_account):
    ledger, account = ledger_and_account
    assert newest_spent(account, "Cats", "run") is None
    for epoch in range(6):
        ledger.cost(Message("TrainerLambda", "backward", "run", epoch, batch=0, layer=1), 0.5)
    for epoch, dollars in ((1, 0.01), (3, 0.0305)):
        ledger.spent(Message("LaunchLambda", "next", "run", epoch), dollars)
    assert newest_spent(account, "Cats", "run") == 0.0305
    assert newest_cost(account, "Cats", "run") == (6, 0.5)
    assert ledger.costs("run", 3) == {"batch0": 0.5}


def test_a_run_that_was_taken_up_again_tells_its_own(ledger_and_account):
    ledger, account = ledger_and_account
    ledger.spent(Message("LaunchLambda", "next", "again", 3), 0.02)
    ledger.cost(Message("TrainerLambda", "backward", "again~1", 4, batch=0, layer=1), 0.4)
    assert newest_spent(account, "Cats", "again") == 0.02
    ledger.spent(Message("LaunchLambda", "next", "again~1", 4), 0.07)
    assert newest_spent(account, "Cats", "again") == 0.07


def test_the_last_news_of_a_run_has_its_last_epoch_though_it_ends_while_it_is_asked(
    ledger_and_account, monkeypatch
):
    ledger, account = ledger_and_account
    s3, news = account.client("s3"), []
    s3.create_bucket(Bucket="cats")

    def end(*asked) -> list[str]:
        "What happens between the question for the figures and the next."
        ledger.cost(Message("TrainerLambda", "backward", "late", 1, batch=0, layer=1), 0.25)
        for key in ("training_results/late/run.json", "training_results/late/params.h5"):
            s3.put_object(Bucket="cats", Key=key, Body=b"{}")
        s3.put_object(Bucket="cats", Key="prediction_input/params.h5", Body=b"{}")
        return []

    ledger.cost(Message("TrainerLambda", "backward", "late", 0, batch=0, layer=1), 0.5)
    monkeypatch.setattr(runs, "bucket_of", lambda account, stack: "cats")
    monkeypatch.setattr(runs, "errors_since", end)
    assert runs.watch(account, "Cats", "late", news.append, every=0.01) == news[-1]
    assert [(seen.epochs, seen.cost, seen.finished) for seen in news] == [
        (1, 0.5, False),
        (2, 0.25, True),
    ]
