"""Every file that is put under training_input/ gets an answer: in a mail, in the bucket, for `snn local` and `snn watch`."""

import json

import msgspec
import pytest

from snn.backends.aws.events import failures, uploads
from snn.backends.aws.ledger import create_tables
from snn.backends.local.services import Services
from snn.cli.train import news
from snn.cloud.messages import Upload
from snn.data import h5 as data
from snn.deploy import runs
from snn.deploy.inputs import Account
from snn.errors import InputError
from snn.handlers import launch
from snn.handlers.upload import handle_uploads, run_id
from snn.local.server import local_aws, parameter_server

KEY = "training_input/datasets.h5"


@pytest.fixture(scope="module")
def places():
    with local_aws() as aws, parameter_server() as server:
        create_tables(aws.client("dynamodb"), "Cats-")
        yield aws, server


class Mails(list):
    "A topic that keeps what it is told."

    def tell(self, subject: str, text: str) -> None:
        self.append((subject, text))


class Owner:
    "Somebody with a bucket, who uploads and reads mails."

    def __init__(self, aws, server, bucket: str):
        self.aws, self.bucket, self.s3 = aws, bucket, aws.client("s3")
        self.s3.create_bucket(Bucket=bucket)
        self.services = Services({**aws.environment(), "SNN_REDIS_URL": server.url})
        self.services.store.client.flushall()
        self.services.__dict__["topic"] = self.mails = Mails()
        self.runs = self.services.runs

    def put(self, key: str, content: bytes) -> Upload:
        "Upload a file, of which nobody is told yet."
        answer = self.s3.put_object(Bucket=self.bucket, Key=key, Body=content)
        return Upload(self.bucket, key, answer["ETag"].strip('"'))

    def tell(self, *told: Upload) -> list[Exception]:
        "LaunchLambda is told of uploads."
        return handle_uploads([*told], self.services)

    def answer(self, upload: Upload) -> str:
        "The answer to an upload, which is the same everywhere."
        (words,) = [text for _, text in self.mails if upload.address in text][-1:]
        left = self.services.bucket(self.bucket).get(
            f"training_results/answers/{upload.key}.json"
        )
        assert json.loads(left)["words"] == words == self.runs.answers()[upload.address]
        assert words in news(self.runs, {}) or f"Refused: {words}" in news(self.runs, {})
        return words


@pytest.fixture
def owner(places, request):
    return Owner(*places, f"bucket-{abs(hash(request.node.name))}")


@pytest.fixture(scope="module")
def content(small_datasets, tmp_path_factory) -> bytes:
    "A small datasets.h5."
    path = tmp_path_factory.mktemp("content") / "datasets.h5"
    data.write(small_datasets(4, 24, 4), path)
    return path.read_bytes()


@pytest.fixture
def small(parameters):
    return parameters((3, 1), granularity="network")


@pytest.fixture
def text(small) -> bytes:
    "A parameters.json."
    return msgspec.json.encode(small)


def record(upload: Upload, name: str = "ObjectCreated:Put") -> dict:
    return {
        "eventSource": "aws:s3",
        "eventName": name,
        "s3": {
            "bucket": {"name": upload.bucket},
            "object": {"key": upload.key, "eTag": upload.etag},
        },
    }


def by_s3(upload: Upload) -> dict:
    return {"Records": [record(upload)]}


def by_eventbridge(upload: Upload) -> dict:
    return {
        "source": "aws.s3",
        "detail-type": "Object Created",
        "detail": {
            "bucket": {"name": upload.bucket},
            "object": {"key": upload.key, "etag": upload.etag},
        },
    }


def in_sns(event: dict) -> dict:
    return {"Records": [{"EventSource": "aws:sns", "Sns": {"Message": json.dumps(event)}}]}


def in_sqs(event: dict) -> dict:
    return {"Records": [{"eventSource": "aws:sqs", "body": json.dumps(event)}]}


def in_letter(event: dict) -> dict:
    "As SNS writes it into a queue."
    return {"Type": "Notification", "Message": json.dumps(event)}


@pytest.mark.parametrize(
    "wrap",
    [
        by_s3,
        by_eventbridge,
        lambda upload: in_sns(by_s3(upload)),
        lambda upload: in_sqs(by_s3(upload)),
        lambda upload: in_sqs(in_letter(by_s3(upload))),
        lambda upload: in_sqs(by_eventbridge(upload)),
        lambda upload: in_sns(by_eventbridge(upload)),
    ],
    ids=[
        "S3",
        "EventBridge",
        "SNS",
        "SQS",
        "SNS and SQS",
        "EventBridge and SQS",
        "EventBridge and SNS",
    ],
)
def test_whoever_brings_the_event_the_run_begins(
    wrap, owner, content, text, small, monkeypatch
):
    owner.put("training_input/parameters.json", text)
    upload = owner.put(KEY, content)
    monkeypatch.setattr(launch, "process_services", lambda: owner.services)
    launch.lambda_handler(wrap(upload), None)
    assert owner.runs.names() == [run_id(upload, small)]


@pytest.mark.parametrize(
    "name", ["datasets.H5", "cats.hdf5", "cats.he5", "CATS.HDF", "my cats.h5"]
)
def test_a_data_set_begins_a_run_however_its_name_ends(name, owner, content, text, small):
    where = owner.put("training_input/parameters.json", text)
    upload = owner.put(f"training_input/{name}", content)
    assert owner.tell(upload) == [] and owner.runs.names() == [run_id(upload, small)]
    said = owner.answer(upload)
    assert upload.address in said and f"parameters.json (ETag {where.etag})" in said
    assert f"(ETag {upload.etag}), 24 images" in said
    assert "at most 2 epochs, layers of 3, 1 neurons" in said


def test_a_data_set_waits_for_its_parameters_and_their_upload_begins_the_run(
    owner, content, text, small
):
    upload = owner.put(KEY, content)
    owner.tell(upload)
    address = f"s3://{owner.bucket}/training_input/parameters.json"
    assert owner.runs.names() == []
    assert owner.answer(upload) == (
        f"{address}: no such file; {upload.address} waits for it and is trained as soon as it is there"
    )
    elsewhere = owner.put("training_input/other/parameters.json", text)
    owner.tell(elsewhere)
    assert owner.runs.names() == []
    owner.tell(owner.put("training_input/parameters.json", text))
    assert owner.runs.names() == [run_id(upload, small)]
    assert "is trained with" in owner.answer(upload)
    assert owner.runs.refused() == {} and owner.runs.waiting() == []


def test_parameters_that_come_while_the_data_set_looks_for_them_are_found(
    owner, content, text, small, monkeypatch
):
    upload, wait = owner.put(KEY, content), owner.runs.wait

    def just_before(waiting: Upload) -> None:
        owner.tell(owner.put("training_input/parameters.json", text))  # nobody waits yet
        wait(waiting)

    monkeypatch.setattr(owner.runs, "wait", just_before)
    owner.tell(upload)
    assert owner.runs.names() == [run_id(upload, small)] and owner.runs.waiting() == []


def test_parameters_that_come_after_the_run_has_begun_are_answered_with_what_to_do(
    owner, content, text, small
):
    owner.put("training_input/parameters.json", text)
    owner.tell(upload := owner.put(KEY, content))
    changed = msgspec.json.encode(msgspec.structs.replace(small, epochs=9))
    owner.tell(later := owner.put("training_input/parameters.json", changed))
    said = owner.answer(later)
    assert f"(ETag {later.etag}: at most 9 epochs, layers of 3, 1 neurons)" in said
    assert "is for data that is uploaded from now on" in said
    assert f"keeps its parameters: run {run_id(upload, small)}. To train the same data" in said
    assert said.endswith("with the new ones, upload the data again.")


def test_wrong_parameters_are_refused_when_they_are_uploaded(owner):
    wrong = owner.put("training_input/parameters.json", b"{'epochs': 3}")
    owner.tell(wrong)
    assert owner.answer(wrong) == owner.runs.refused()[wrong.etag]
    assert owner.mails[0][0] == "No run was started"


def test_what_is_no_data_set_is_left_alone_with_one_mail_for_its_folder(owner):
    pictures = [owner.put(f"training_input/cats/{i}.png", b"x") for i in range(5)]
    assert owner.tell(*pictures, owner.put("training_input/dogs/", b"")) == []
    first = owner.answer(pictures[0])
    assert "was left alone: the name of a data set ends in .h5, .hdf5, .he5 or .hdf" in first
    assert len(owner.mails) == 2 and len(owner.runs.answers()) == 6


@pytest.mark.parametrize(
    "folder", ["training_input/", "training_input//", "training_input/./"]
)
def test_a_key_is_no_path(folder, owner, content, small):
    for seed, place in enumerate(["training_input/", "training_input//", "training_input/./"]):
        chosen = msgspec.structs.replace(small, seed=seed)
        owner.put(f"{place}parameters.json", msgspec.json.encode(chosen))
    owner.tell(owner.put(f"{folder}datasets.h5", content))
    (run,) = owner.runs.names()
    assert len(folder) - len("training_input/") == owner.runs.plan(run).parameters.seed


def test_a_file_that_was_replaced_before_its_event_begins_one_run_of_what_is_there(
    owner, content, text, small
):
    owner.put("training_input/parameters.json", text)
    empty, full = owner.put(KEY, b""), owner.put(KEY, content)
    owner.tell(empty)
    assert owner.runs.names() == []
    assert owner.runs.refused()[empty.etag] == (
        f"{empty.address}: was replaced before it was read; what replaced it gets an answer of its own"
    )
    owner.tell(full)
    owner.tell(empty)
    (run,) = owner.runs.names()
    assert run == run_id(full, small) and owner.runs.plan(run).etag == full.etag


def test_the_event_of_a_run_that_comes_again_after_its_data_was_replaced_refuses_nothing(
    owner, content, text, small
):
    owner.put("training_input/parameters.json", text)
    owner.tell(upload := owner.put(KEY, content))
    owner.put(KEY, b"another")
    owner.tell(upload)
    assert owner.runs.names() == [run_id(upload, small)] and owner.runs.refused() == {}


def test_each_record_of_an_event_is_on_its_own(owner, content, text, small, monkeypatch):
    owner.put("training_input/parameters.json", text)
    upload = owner.put(KEY, content)
    gone = upload._replace(bucket="nobodys-bucket")
    deleted = upload._replace(key="training_input/deleted.h5")
    event = {"Records": [record(u) for u in (gone, deleted, upload)]}
    monkeypatch.setattr(launch, "process_services", lambda: owner.services)
    launch.lambda_handler(event, None)
    assert owner.runs.names() == [run_id(upload, small)]
    mails = [text for subject, text in owner.mails if subject == "No run was started"]
    assert len(mails) == 2 and "S3 refuses to give it: NoSuchBucket" in mails[0]
    assert mails[1] == f"{deleted.address}: no such file"


def test_a_record_that_may_succeed_later_is_tried_again_after_the_others(
    owner, content, text, small, monkeypatch
):
    owner.put("training_input/parameters.json", text)
    upload = owner.put(KEY, content)
    busy = upload._replace(bucket="busy-bucket")
    ask = owner.services.bucket

    def bucket(name: str):
        if name == "busy-bucket":
            raise ConnectionError("reset by peer")
        return ask(name)

    monkeypatch.setattr(owner.services, "bucket", bucket)
    monkeypatch.setattr(launch, "process_services", lambda: owner.services)
    with pytest.raises(ConnectionError, match="reset by peer"):
        launch.lambda_handler({"Records": [record(busy), record(upload)]}, None)
    assert owner.runs.names() == [run_id(upload, small)]


def test_watch_tells_the_answers_and_ends_when_the_run_is_refused(
    owner, content, text, small, monkeypatch
):
    account, said = Account("us-east-1", owner.aws.url), []
    monkeypatch.setattr(runs, "bucket_of", lambda account, stack: owner.bucket)
    owner.put("training_input/parameters.json", text)
    upload = owner.put(KEY, b"no data set")
    owner.tell(upload)
    run = runs.newest_run(account, owner.bucket)
    with pytest.raises(InputError, match=f"run {run} was not begun: {upload.address}: "):
        runs.watch(account, "Cats", run, lambda seen: said.extend(seen.answers), every=0.01)
    assert said == [owner.answer(upload)]
    known, bad = set(), said.pop()
    owner.tell(upload := owner.put(KEY, content))
    fresh = [answer.words for answer in runs.new_answers(account, owner.bucket, known)]
    assert fresh == [owner.answer(upload)] and bad not in fresh
    assert runs.new_answers(account, owner.bucket, known) == []


def test_an_event_that_is_cut_short_or_strange_tells_of_nothing():
    for event in (
        {"Records": None},
        {"Records": [{"Sns": {"Message": "hello"}}]},
        {"Records": [{"body": "[1, 2]"}]},
        {"Type": "Notification", "Message": '"text"'},
        {"source": "aws.s3", "detail-type": "Object Deleted", "detail": {}},
    ):
        assert uploads(event) == [] and failures(event) == []
    assert len(uploads(by_s3(Upload("b", "k", "e")))) == 1
