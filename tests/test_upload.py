"""An upload starts a run, however it comes; a wrong one is refused with a sentence."""

import json
import os
import shutil
import subprocess
from io import BytesIO

import msgspec
import numpy as np
import pytest
from boto3.s3.transfer import TransferConfig

from snn.backends.valkey.queue import DEAD, QUEUE, taken_by
from snn.cloud.messages import Upload
from snn.data import h5 as data
from snn.handlers.upload import run_id


def event(*uploads: Upload) -> dict:
    "What S3 sends: one record per file."
    return {
        "Records": [
            {
                "eventSource": "aws:s3",
                "eventName": "ObjectCreated:Put",
                "s3": {
                    "bucket": {"name": upload.bucket},
                    "object": {"key": upload.key, "eTag": upload.etag},
                },
            }
            for upload in uploads
        ]
    }


@pytest.fixture
def tell(cloud):
    "Sends a body to the queue that the bucket tells of uploads."
    return lambda body: cloud.sqs.send_message(
        QueueUrl=cloud.inbox, MessageBody=json.dumps(body)
    )


@pytest.fixture
def put(cloud, parameters):
    "Puts parameters and a data set into a folder, which no one is told of; returns the upload and the run it makes."

    def put(folder: str, datasets: bytes, seed: int = 0) -> tuple[Upload, str]:
        chosen = parameters((3, 1), granularity="network", seed=seed)
        cloud.bucket.put(f"elsewhere/{folder}/parameters.json", msgspec.json.encode(chosen))
        answer = cloud.bucket.client.put_object(
            Bucket=cloud.bucket_name, Key=f"elsewhere/{folder}/datasets.h5", Body=datasets
        )
        upload = Upload(
            cloud.bucket_name, f"elsewhere/{folder}/datasets.h5", answer["ETag"].strip('"')
        )
        return upload, run_id(upload, chosen)

    return put


@pytest.fixture
def idle(cloud, until):
    "Waits until every event that was sent has been dealt with."

    def wait() -> None:
        client = cloud.services.store.client
        names = ("ApproximateNumberOfMessages", "ApproximateNumberOfMessagesNotVisible")
        waiting = lambda: cloud.sqs.get_queue_attributes(
            QueueUrl=cloud.inbox, AttributeNames=[*names]
        )["Attributes"]
        in_hand = [QUEUE, *(taken_by(worker) for worker in cloud.workers.processes)]
        until(
            lambda: (
                all(int(waiting()[name]) == 0 for name in names)
                and not client.exists(*in_hand)
            ),
            "all events are dealt with",
        )

    return wait


def test_an_upload_by_boto3_starts_a_run(cloud, parameters, small_data, start_run, finished):
    run = start_run(cloud, "boto3", parameters((3, 1), granularity="network"), small_data)
    finished(cloud, run)
    left = cloud.bucket.keys(f"training_results/{run}/")
    assert {key.split("/")[-1] for key in left} >= {"results.json", "run.json", "params.h5"}
    newest = cloud.bucket.get(f"training_results/{run}/params.h5")
    assert cloud.bucket.get("prediction_input/params.h5") == newest
    assert cloud.bucket.get("training_results/results.json") == cloud.bucket.get(
        f"training_results/{run}/results.json"
    )


def test_an_upload_by_the_aws_command_line_starts_a_run(
    cloud, parameters, small_data, tmp_path, until, finished
):
    if not shutil.which("aws"):
        pytest.skip("no aws on the PATH")
    (tmp_path / "parameters.json").write_bytes(
        msgspec.json.encode(parameters((3, 1), granularity="network", seed=7))
    )
    before = set(cloud.services.runs.names())
    for source in (tmp_path / "parameters.json", small_data):
        command = [
            "aws",
            "--endpoint-url",
            cloud.aws.url,
            "s3",
            "cp",
            str(source),
            f"s3://{cloud.bucket_name}/training_input/cli/{source.name}",
        ]
        done = subprocess.run(
            command,
            env={**os.environ, **cloud.aws.environment()},
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0, done.stderr
    (run,) = until(lambda: set(cloud.services.runs.names()) - before, "a run has begun")
    assert finished(cloud, run).parameters.seed == 7


def test_an_upload_in_parts_starts_one_run(cloud, parameters, tmp_path, until, finished):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (120, 150, 150, 3), np.uint8)
    data.write(
        data.Datasets(images, np.arange(120) % 2, images[:2], np.arange(2)),
        tmp_path / "datasets.h5",
    )
    cloud.bucket.put(
        "training_input/parts/parameters.json",
        msgspec.json.encode(parameters((1,), epochs=1, granularity="network")),
    )
    before = set(cloud.services.runs.names())
    parts = TransferConfig(multipart_threshold=5 * 2**20, multipart_chunksize=5 * 2**20)
    cloud.bucket.client.upload_file(
        str(tmp_path / "datasets.h5"),
        cloud.bucket_name,
        "training_input/parts/datasets.h5",
        Config=parts,
    )
    (run,) = until(lambda: set(cloud.services.runs.names()) - before, "a run has begun")
    assert finished(cloud, run).etag.endswith("-2")


def test_a_folder_with_a_blank_and_an_umlaut_is_found(
    cloud, parameters, small_data, start_run, finished
):
    run = start_run(
        cloud, "my cats+dogs/größer", parameters((3, 1), granularity="network"), small_data
    )
    finished(cloud, run)


def test_the_same_upload_told_twice_is_one_run(cloud, small_data, put, tell, idle, finished):
    upload, run = put("twice", small_data.read_bytes())
    for _ in range(2):
        tell(event(upload))
    plan = finished(cloud, run)
    idle()
    assert cloud.services.runs.names().count(run) == 1
    counts = cloud.services.ledger.counts(plan)
    assert (
        counts["LaunchLambda"].finished == 1 + 2 and counts["NeuronLambda"].finished == 2 * 3
    )  # two epochs, three mini-batches


def test_an_upload_told_again_after_the_run_changes_nothing(
    cloud, small_data, put, tell, idle, finished
):
    upload, run = put("again", small_data.read_bytes())
    tell(event(upload))
    finished(cloud, run)
    idle()
    before = cloud.bucket.get(f"training_results/{run}/results.json")
    tell(event(upload))
    idle()
    assert cloud.bucket.get(f"training_results/{run}/results.json") == before


def test_an_event_with_several_records_starts_a_run_for_each(
    cloud, small_data, put, tell, finished
):
    some = [put(f"several-{seed}", small_data.read_bytes(), seed) for seed in range(3)]
    tell(event(*(upload for upload, _ in some)))
    for _, run in some:
        finished(cloud, run)


def test_one_wrong_record_does_not_keep_the_others_from_starting(
    cloud, small_data, put, tell, finished
):
    wrong, _ = put("wrong-one", b"no HDF5 at all")
    right, run = put("right-one", small_data.read_bytes())
    tell(event(wrong, right))
    finished(cloud, run)
    assert "not an HDF5 file" in cloud.services.runs.refused()[wrong.etag]


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(
            {
                "Service": "Amazon S3",
                "Event": "s3:TestEvent",
                "Time": "2026-01-01T00:00:00.000Z",
                "Bucket": "snn",
            },
            id="test event",
        ),
        pytest.param({"Records": []}, id="no records"),
        pytest.param(
            {
                "Records": [
                    {
                        "eventName": "ObjectRemoved:Delete",
                        "s3": {"bucket": {"name": "snn"}, "object": {"key": "a.h5"}},
                    }
                ]
            },
            id="deleted",
        ),
    ],
)
def test_an_event_that_tells_of_no_upload_starts_nothing(body, cloud, tell, idle):
    names, refused, dead = (
        cloud.services.runs.names(),
        cloud.services.runs.refused(),
        cloud.services.store.client.llen(DEAD),
    )
    tell(body)
    idle()
    assert cloud.services.runs.names() == names and cloud.services.runs.refused() == refused
    assert cloud.services.store.client.llen(DEAD) == dead


@pytest.mark.parametrize(
    "change, sentence",
    [
        (
            lambda found: found._replace(train_y=np.zeros_like(found.train_y)),
            "train_set_y holds the class 0 alone; it needs both 0 and 1",
        ),
        (
            lambda found: found._replace(test_y=found.test_y[:-1]),
            "test_set_y has 41 labels for 42 images; each image needs one",
        ),
    ],
    ids=["one class", "a label too few"],
)
def test_a_bad_data_set_starts_nothing_and_is_refused_with_its_sentence(
    change, sentence, cloud, parameters, small_datasets, tmp_path, start_run, until, idle
):
    data.write(change(small_datasets()), tmp_path / "datasets.h5")
    names = cloud.services.runs.names()
    run = start_run(cloud, "bad", parameters((3, 1)), tmp_path / "datasets.h5")
    until(
        lambda: (
            f"s3://snn/training_input/bad/datasets.h5: {sentence}"
            in cloud.services.runs.refused().values()
        ),
        "the data set is refused",
    )
    idle()
    assert cloud.services.runs.names() == names and run not in names
    assert not cloud.bucket.keys(f"training_data/{run}")


def test_bad_parameters_start_nothing_and_are_refused_with_their_sentence(
    cloud, small_data, until
):
    names = cloud.services.runs.names()
    cloud.bucket.put("training_input/worse/parameters.json", b'{"epochs": "many"}')
    cloud.bucket.put("training_input/worse/datasets.h5", small_data.read_bytes())
    expected = "s3://snn/training_input/worse/parameters.json: layers is missing; it may hold a whole number, 1 or more"
    until(
        lambda: expected in cloud.services.runs.refused().values(),
        "the parameters are refused",
    )
    assert cloud.services.runs.names() == names


def test_data_without_parameters_waits_for_them(
    cloud, parameters, small_datasets, tmp_path, until, finished
):
    data.write(small_datasets(seed=171), tmp_path / "datasets.h5")
    key = "training_input/alone/datasets.h5"
    etag = cloud.bucket.client.put_object(
        Bucket=cloud.bucket_name, Key=key, Body=(tmp_path / "datasets.h5").read_bytes()
    )["ETag"].strip('"')
    expected = (
        "s3://snn/training_input/alone/parameters.json: no such file; "
        f"s3://snn/{key} waits for it and is trained as soon as it is there"
    )
    until(lambda: expected in cloud.services.runs.refused().values(), "the data set waits")
    chosen = parameters((3, 1), granularity="network")
    cloud.bucket.put("training_input/alone/parameters.json", msgspec.json.encode(chosen))
    finished(cloud, run_id(Upload(cloud.bucket_name, key, etag), chosen))
    assert expected not in cloud.services.runs.refused().values()


def test_a_file_that_is_no_data_set_is_left_alone(
    cloud, parameters, small_datasets, tmp_path, start_run, finished, idle
):
    data.write(small_datasets(seed=170), tmp_path / "datasets.h5")
    names, refused = cloud.services.runs.names(), cloud.services.runs.refused()
    cloud.bucket.client.upload_fileobj(
        BytesIO(b"hello"), cloud.bucket_name, "training_input/notes.txt"
    )
    cloud.bucket.client.upload_fileobj(
        BytesIO(b"hello"), cloud.bucket_name, "elsewhere/datasets.h5"
    )
    after = start_run(
        cloud,
        "after-the-notes",
        parameters((3, 1), granularity="network", seed=170),
        tmp_path / "datasets.h5",
    )
    finished(cloud, after)  # what was told before it has been told by now
    idle()
    assert (
        set(cloud.services.runs.names()) == {*names, after}
        and cloud.services.runs.refused() == refused
    )
