"""What a run's owner is told by mail: the same data and parameters uploaded once more, and a network that hardly learns."""

import json
import os
import shutil
import subprocess
import threading

import msgspec
import pytest
from msgspec import Raw

from snn.backends.aws.events import uploads
from snn.cli.console import PlainConsole, TrainingProgress
from snn.cloud.messages import Envelope, Upload
from snn.cloud.runs import Status
from snn.handlers.upload import run_id
from snn.local.cloud import LocalCloud
from snn.local.training import Progress
from snn.maths.parameters import from_dict, parse

TOPIC = "arn:aws:sns:us-east-1:000000000000:mails"


@pytest.fixture(scope="module")
def cloud():
    "A cloud that sends mails."
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SNN_TOPIC", TOPIC)
        patch.setenv("SNN_MODEL_COPY", "predict_input/params.h5")
        with LocalCloud() as opened:
            topic = opened.aws.client("sns").create_topic(Name="mails")["TopicArn"]
            queue = opened.sqs.create_queue(QueueName="mails")["QueueUrl"]
            arn = opened.sqs.get_queue_attributes(QueueUrl=queue, AttributeNames=["QueueArn"])
            opened.aws.client("sns").subscribe(
                TopicArn=topic, Protocol="sqs", Endpoint=arn["Attributes"]["QueueArn"]
            )
            opened.mails, opened.letters = queue, []
            assert topic == TOPIC
            yield opened


@pytest.fixture
def mails(cloud):
    "All mails about a run so far, as (subject, text)."

    def read(run: str) -> list[tuple[str, str]]:
        while found := cloud.sqs.receive_message(
            QueueUrl=cloud.mails, MaxNumberOfMessages=10, WaitTimeSeconds=0
        ).get("Messages", []):
            for message in found:
                letter = json.loads(message["Body"])
                cloud.letters.append((letter["Subject"], letter["Message"]))
                cloud.sqs.delete_message(
                    QueueUrl=cloud.mails, ReceiptHandle=message["ReceiptHandle"]
                )
        return [letter for letter in cloud.letters if run in letter[0]]

    return read


@pytest.fixture
def aws(cloud):
    "The AWS command line, at this cloud."
    if not shutil.which("aws"):
        pytest.skip("no aws on the PATH")

    def call(*words) -> None:
        subprocess.run(
            ["aws", "--endpoint-url", cloud.aws.url, "s3", *map(str, words)],
            env={**os.environ, **cloud.aws.environment()},
            check=True,
            capture_output=True,
            timeout=120,
        )

    return call


@pytest.fixture
def upload(cloud, small_data):
    "Uploads into a folder of training_input/; returns the run."

    def put(folder: str, chosen=None) -> str:
        place = f"training_input/{folder}"
        if chosen:
            cloud.bucket.put(f"{place}/parameters.json", msgspec.json.encode(chosen))
        cloud.bucket.put(f"{place}/datasets.h5", small_data.read_bytes())
        return there(cloud, folder)

    return put


def there(cloud, folder: str) -> str:
    "The run of the files that lie in a folder of training_input/."
    key = f"training_input/{folder}/datasets.h5"
    head = cloud.bucket.client.head_object(Bucket="snn", Key=key)
    chosen = parse(cloud.bucket.get(f"training_input/{folder}/parameters.json"))
    return run_id(Upload("snn", key, head["ETag"].strip('"')), chosen)


def again(mails, run: str) -> list[str]:
    "What the mails say of a run's further uploads."
    return [text for subject, text in mails(run) if subject == f"Run {run}: uploaded again"]


def test_after_its_end_the_model_is_put_in_place_again(
    cloud, aws, parameters, small_data, tmp_path, finished, mails, until
):
    "The original's remedy, delete and upload again, when the Codebook has left its model meanwhile."
    chosen, place = tmp_path / "parameters.json", "s3://snn/training_input/ended"
    chosen.write_bytes(msgspec.json.encode(parameters((3, 1), granularity="network")))
    aws("cp", chosen, f"{place}/")
    aws("cp", small_data, f"{place}/datasets.h5")
    run = there(cloud, "ended")
    finished(cloud, run)
    left = {
        key: cloud.bucket.get(f"training_results/{run}/{key}")
        for key in ("params.h5", "results.json", "run.json")
    }
    assert cloud.bucket.get("predict_input/params.h5") == left["params.h5"]  # as it was asked
    cloud.bucket.put("prediction_input/params.h5", b"the Codebook's, of ten epochs")
    cloud.bucket.put("training_results/results.json", b"{}")
    names = cloud.services.runs.names()
    aws("rm", f"{place}/datasets.h5")
    aws("cp", small_data, f"{place}/datasets.h5")
    assert there(cloud, "ended") == run
    (text,) = until(lambda: again(mails, run), "a mail has come")
    assert cloud.bucket.get("prediction_input/params.h5") == left["params.h5"]
    assert cloud.bucket.get("training_results/results.json") == left["results.json"]
    assert cloud.bucket.get(f"training_results/{run}/run.json") == left["run.json"]
    assert cloud.services.runs.names() == names
    assert "had finished before" in text and '"run": "second"' in text
    assert "had finished before" in cloud.services.runs.answers()[f"{place}/datasets.h5"]


def test_another_name_in_its_parameters_makes_a_run_of_its_own(
    cloud, upload, parameters, finished, weights_of
):
    chosen = parameters((3, 1), granularity="network", seed=3)
    first = upload("named", chosen)
    finished(cloud, first)
    second = upload("named", msgspec.structs.replace(chosen, run="second"))
    assert first != second
    finished(cloud, second)
    one, two = weights_of(cloud, first), weights_of(cloud, second)
    assert all((one[name] == two[name]).all() for name in one)


def test_while_it_runs_and_after_it_was_stopped(
    cloud, upload, parameters, mails, until, snn, monkeypatch
):
    runs = cloud.services.runs
    long = parameters(
        (3, 1), granularity="network", epochs=10**6, checkpoint_every=3, learning_rate=1e-9
    )
    run = upload("long", long)
    until(lambda: run in runs.names() and runs.status(run).epoch > 3, "the run is on its way")
    # While it runs.
    assert upload("long") == run
    (text,) = until(lambda: again(mails, run), "a mail has come")
    assert f"Run {run} runs already" in text and "of at most 1000000 epochs" in text
    assert runs.newest(run) == run
    # Stopped by a message to LaunchLambda, as from a laptop.
    order = Raw(json.dumps({"state": "stop", "run": run}).encode())
    cloud.services.bus.put(Envelope("LaunchLambda", order))
    cloud.services.store.flush()
    until(lambda: runs.status(run).state == "stopped", "the run is stopped")
    stopped = f"training_results/{run}/stopped.json"
    assert "its owner asked for it" in cloud.bucket.get(stopped).decode()
    # Deleted and uploaded again: it goes on.
    cloud.bucket.client.delete_object(Bucket="snn", Key="training_input/long/datasets.h5")
    assert upload("long") == run
    until(lambda: len(again(mails, run)) == 2, "another mail has come")
    text = again(mails, run)[1]
    assert "had stopped (its owner asked for it" in text
    assert "goes on from its checkpoint after" in text
    life = f"{run}~1"
    until(
        lambda: runs.newest(run) == life and runs.status(life).state == "running",
        lambda: f"it goes on; {runs.newest(run)} is the newest, and {runs.status(life)}",
    )
    until(lambda: not cloud.bucket.keys(stopped), "it is no stopped run any more")
    for name, value in cloud.environment.items():
        monkeypatch.setenv(name, value)
    assert snn("stop", run)[0] == 0
    until(lambda: cloud.bucket.keys(stopped), "it is stopped again")


def test_a_failed_run_without_a_checkpoint_begins_anew(
    cloud, upload, parameters, mails, until
):
    runs = cloud.services.runs
    wild = parameters((5, 1), granularity="layer", epochs=50, learning_rate=1e308)
    run = upload("failed", wild)
    until(lambda: run in runs.names() and runs.status(run).state == "failed", "it has failed")
    assert upload("failed") == run
    (text,) = until(lambda: again(mails, run), "a mail has come")
    assert "had failed (" in text and "goes on from the beginning" in text
    until(lambda: runs.status(f"{run}~1").state == "failed", "it has failed as before")


def test_two_uploads_at_once_are_one_run(
    cloud, parameters, small_data, finished, until, mails
):
    chosen = parameters((3, 1), granularity="network", seed=11)
    place = "training_input/at once"
    cloud.bucket.put(f"{place}/parameters.json", msgspec.json.encode(chosen))
    content, before = small_data.read_bytes(), set(cloud.services.runs.names())
    both = [
        threading.Thread(target=cloud.bucket.put, args=(f"{place}/datasets.h5", content))
        for _ in range(2)
    ]
    for one in both:
        one.start()
    for one in both:
        one.join()
    (run,) = until(lambda: set(cloud.services.runs.names()) - before, "a run has begun")
    finished(cloud, run)
    # Each upload is answered: by the mail of the start, or by one that says how the run stood.
    kinds = ("started", "uploaded again")
    answers = lambda: [s for s, _ in mails(run) if s.endswith(kinds)]
    until(lambda: len(answers()) == 2, "both uploads are answered")
    assert {*cloud.services.runs.names()} - before == {run}


def test_the_event_of_one_upload_told_again_is_no_new_upload(
    cloud, parameters, small_data, finished, until, mails
):
    chosen = parameters((3, 1), granularity="network", seed=12)
    cloud.bucket.put("elsewhere/told/parameters.json", msgspec.json.encode(chosen))
    key = "elsewhere/told/datasets.h5"
    answer = cloud.bucket.client.put_object(
        Bucket="snn", Key=key, Body=small_data.read_bytes()
    )
    event = lambda mark: {
        "Records": [
            {
                "eventName": "ObjectCreated:Put",
                "s3": {
                    "bucket": {"name": "snn"},
                    "object": {"key": key, "eTag": answer["ETag"], "sequencer": mark},
                },
            }
        ]
    }
    tell = lambda mark: cloud.sqs.send_message(
        QueueUrl=cloud.inbox, MessageBody=json.dumps(event(mark))
    )
    run = run_id(uploads(event("0A"))[0], chosen)
    tell("0A")
    finished(cloud, run)
    tell("0A")  # S3 tells of it twice ...
    tell("0B")  # ... and then it is uploaded again
    until(lambda: again(mails, run), "the upload is answered")
    tell("0B")
    tell("0C")
    until(lambda: len(again(mails, run)) == 2, "the third upload is answered, and no event")


def test_a_network_that_hardly_learns_is_told_of_once_and_with_advice(
    cloud, upload, parameters, finished, mails, until, snn, monkeypatch
):
    chosen = parameters(
        (3, 2, 1), granularity="network", epochs=210, learning_rate=0.5, seed=1
    )
    run = upload("stuck", chosen)
    finished(cloud, run)
    last = until(lambda: [m for m in mails(run) if "finished" in m[0]], "it has ended")[0]
    (told,) = [text for subject, text in mails(run) if subject == f"Run {run} hardly learns"]
    silent = "layer 2 is silent: it gives 0 for every image"
    assert told.startswith(f"After 100 epochs, {silent}")
    assert "begin anew with another seed, a lower learning rate, or leaky_relu" in told
    assert silent in last[1]
    record = json.loads(cloud.bucket.get(f"training_results/{run}/run.json"))
    assert record["warning"].startswith(silent)
    for name, value in cloud.environment.items():
        monkeypatch.setenv(name, value)
    assert silent in snn("status", run)[1]


def test_a_warning_is_shown_once_in_the_progress(capsys):
    shown = TrainingProgress(1000, console=PlainConsole(), every=0)
    for epoch in range(99, 102):
        status = Status(epoch=epoch, cost=0.6, warning="layer 2 is silent")
        shown.report(Progress(status, 10 * epoch, float(epoch)))
    assert capsys.readouterr().out.count("Warning: layer 2 is silent.") == 1


def test_the_new_key_leaves_the_names_of_runs_as_they_were():
    chosen = from_dict(
        {
            "epochs": 30,
            "layers": 2,
            "neurons": {"layer1": 4, "layer2": 1},
            "learning_rate": 0.1,
            "batch_size": 6,
            "activations": {"layer1": "relu", "layer2": "sigmoid"},
            "threshold": 0,
        }
    )
    upload = Upload("cats", "training_input/datasets.h5", "abc", "0A")
    assert run_id(upload, chosen) == "3a1440f1b952"
    assert run_id(upload, msgspec.structs.replace(chosen, run="second")) != "3a1440f1b952"
