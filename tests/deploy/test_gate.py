"""The quality gate: its decision on made-up models, and the real handler between real services, S3 and SNS.

Each service is a process of its own, `snn serve` as the image starts it, with the files that the image would hold.
"""

import json
import re
import ssl
import subprocess
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import boto3
import h5py
import msgspec
import numpy as np
import pytest

from snn.data import h5 as data
from snn.data import models
from snn.deploy.gate import (
    Answer,
    Service,
    Trial,
    decide,
    find_data,
    lambda_handler,
    questions,
    said_of,
    smoke,
    trial,
)
from snn.deploy.image import collect
from snn.errors import InputError
from snn.local.server import local_aws
from snn.maths import model, network, sampling
from snn.maths.parameters import from_dict
from snn.serve.model import model_id

EVENT = {
    "executionDetails": {
        "testTrafficWeights": {},
        "productionTrafficWeights": {},
        "serviceArn": "arn:aws:ecs:here-1:111111111111:service/Cats/Cats",
        "targetServiceRevisionArn": "arn:aws:ecs:here-1:111111111111:service-revision/Cats/Cats/2",
    },
    "executionId": "5f0c4d1e",
    "lifecycleStage": "POST_TEST_TRAFFIC_SHIFT",
    "resourceArn": "arn:aws:ecs:here-1:111111111111:service-deployment/Cats/Cats/a",
}


# The decision


def made_up(right, images=50, failures=(), name="made-up"):
    return Trial(name, images, right, tuple(failures))


LIVE = made_up(37, name="live")


@pytest.mark.parametrize(
    "candidate, live, margin, accepted",
    [
        (made_up(45), LIVE, 0.05, True),  # better
        (made_up(37), LIVE, 0.05, True),  # equal
        (made_up(35), LIVE, 0.05, True),  # worse, by 4 %
        (made_up(34), LIVE, 0.05, False),  # worse, by 6 %
        (made_up(36), LIVE, 0, False),  # worse, with no margin
        (made_up(37), LIVE, 0, True),
        (
            made_up(19, 20),
            made_up(20, 20),
            0.05,
            True,
        ),  # exactly the margin is not more than the margin
        (
            made_up(50, failures=["POST /predict gave 500"]),
            LIVE,
            0.05,
            False,
        ),  # broken, though all it said was right
        (
            made_up(50, failures=["GET /readyz gave 503"]),
            None,
            0.05,
            False,
        ),  # broken, and the first
        (made_up(0), None, 0.05, True),  # the first is taken as it is
        (made_up(0, 0), None, 0.05, False),  # no images, no judgement
        (
            made_up(30),
            made_up(0, failures=["POST /predict gave 500"] * 4),
            0.05,
            True,
        ),  # the live one fails: what it does not say is wrong
    ],
)
def test_the_decision(candidate, live, margin, accepted):
    assert decide(candidate, live, margin).accepted is accepted


def test_the_reason_says_what_was_compared():
    assert (
        decide(made_up(34, name="new"), LIVE, 0.05).reason
        == "new is right on 34 of 50 test images, the live model live on 37 of 50; that is worse by more than 5%"
    )
    assert (
        decide(made_up(34, name="new"), None, 0.05).reason
        == "new is right on 34 of 50 test images, and no model answers yet"
    )
    assert decide(
        made_up(0, failures=[f"GET /{n} gave 500" for n in range(9)]), LIVE, 0.05
    ).reason.endswith("GET /2 gave 500; and 6 more")


@pytest.mark.parametrize(
    "answer, said",
    [
        (
            Answer(
                200,
                b'{"model": "a", "predictions": [{"probability": 0.5}, {"probability": 0.49}]}',
            ),
            [True, False],
        ),
        (Answer(500, b"{}"), "gave 500"),
        (Answer(0, b"refused"), "gave no answer"),
        (
            Answer(200, b'{"model": "b", "predictions": []}'),
            "was answered by the model b, not by a",
        ),
        (
            Answer(200, b'{"model": "a", "predictions": [{"probability": 0.5}]}'),
            "gave 1 answers to 2 pictures",
        ),
        (
            Answer(200, b'{"model": "a", "predictions": [{"probability": null}, {}]}'),
            "gave something else than predictions",
        ),
        (Answer(200, b'{"model": "a"}'), "gave something else than predictions"),
        (Answer(200, b"<html>"), "was answered by the model None, not by a"),
    ],
)
def test_an_answer_is_read_with_care(answer, said):
    assert said_of(answer, 2, "a") == said


def test_large_images_go_in_smaller_handfuls():
    noise = np.random.default_rng(0).integers(0, 256, (4, 1000, 1000, 3), dtype=np.uint8)
    asked = list(questions(noise))
    assert [count for count, _ in asked] == [2, 2] and all(
        len(body) < 10 * 2**20 for _, body in asked
    )


# The handler, between real services


@pytest.fixture(scope="module")
def aws():
    with local_aws() as running:
        yield running


@pytest.fixture(scope="module")
def s3(aws, drawn_data):
    client = boto3.client(
        "s3",
        endpoint_url=aws.url,
        region_name="us-east-1",
        aws_access_key_id="test",
        aws_secret_access_key="test",
    )
    client.create_bucket(Bucket="cats")
    client.put_bucket_versioning(Bucket="cats", VersioningConfiguration={"Status": "Enabled"})
    put_data(client, drawn_data)
    return client


@pytest.fixture(scope="module")
def mails(aws):
    "Subscribes a queue to a topic; returns the topic, and what takes the next mail from the queue."
    client = lambda name: boto3.client(
        name,
        endpoint_url=aws.url,
        region_name="us-east-1",
        aws_access_key_id="test",
        aws_secret_access_key="test",
    )
    topic, queue = (
        client("sns").create_topic(Name="Cats")["TopicArn"],
        client("sqs").create_queue(QueueName="mails")["QueueUrl"],
    )
    arn = client("sqs").get_queue_attributes(QueueUrl=queue, AttributeNames=["QueueArn"])[
        "Attributes"
    ]["QueueArn"]
    client("sns").subscribe(TopicArn=topic, Protocol="sqs", Endpoint=arn)

    def take():
        found = client("sqs").receive_message(QueueUrl=queue, WaitTimeSeconds=5)["Messages"][0]
        client("sqs").delete_message(QueueUrl=queue, ReceiptHandle=found["ReceiptHandle"])
        mail = json.loads(found["Body"])
        return mail["Subject"], mail["Message"]

    return topic, take


@pytest.fixture(scope="module")
def trained(drawn_data, root):
    "The original's network after 10 epochs, as the Codebook leaves it, and after 300, when it knows its cats."
    datasets = data.read(drawn_data)
    parameters = from_dict(
        {**json.loads((root / "parameters-2018.json").read_bytes()), "epochs": 300}
    )
    models = {}
    for epoch, (_, layers) in enumerate(
        network.train(parameters, sampling.standardise(datasets.train_x), datasets.train_y), 1
    ):
        if epoch in (10, 300):
            models[epoch] = model.Model(
                msgspec.structs.replace(parameters, epochs=epoch),
                [(W, b) for W, b, *_ in layers],
                datasets.classes,
                datasets.size,
            )
    assert (
        model.evaluate(models[10], datasets.test_x, datasets.test_y).accuracy
        < 0.75
        < model.evaluate(models[300], datasets.test_x, datasets.test_y).accuracy
    )
    return models


@pytest.fixture(scope="module")
def right(trained, drawn_data):
    "On how many test images each model is right; a processor's last digit may decide about one of them."
    datasets = data.read(drawn_data)
    return {
        epochs: round(
            model.evaluate(it, datasets.test_x, datasets.test_y).accuracy
            * len(datasets.test_y)
        )
        for epochs, it in trained.items()
    }


@pytest.fixture(scope="module")
def leave(s3, tmp_path_factory):
    "Puts a model into the bucket as a run does when it ends; returns the version of prediction_input/params.h5."

    def put(trained_model, run, alone=False):
        path = tmp_path_factory.mktemp("run") / "params.h5"
        models.write(trained_model, path)
        if alone:  # as the original wrote it
            with h5py.File(path, "r+") as file:
                for key in list(file.attrs):
                    del file.attrs[key]
        etag = s3.head_object(Bucket="cats", Key="training_input/datasets.h5")["ETag"].strip(
            '"'
        )
        s3.put_object(
            Bucket="cats",
            Key=f"training_results/{run}/run.json",
            Body=json.dumps({"run": run, "cost": 0.5, "plan": {"etag": etag}}).encode(),
        )
        s3.put_object(
            Bucket="cats", Key=f"training_results/{run}/params.h5", Body=path.read_bytes()
        )
        return s3.put_object(
            Bucket="cats", Key="prediction_input/params.h5", Body=path.read_bytes()
        )["VersionId"]

    return put


@pytest.fixture(scope="module")
def serve(s3, spawn, tmp_path_factory):
    "Starts the service as its image would hold it; returns the id of its model and its address."
    started = []

    def start(version):
        folder = tmp_path_factory.mktemp("image") / "model"
        collect(s3, "cats", "prediction_input/params.h5", version, folder)
        process = spawn(
            "serve",
            "--port",
            0,
            "--model",
            folder / "params.h5",
            "--data",
            folder / "datasets.h5",
            "--run",
            folder / "run.json",
        )
        started.append(process)
        found = re.match(
            r"Model (\w+) answers at (http://[\d.:]+)/", process.stdout.readline()
        )
        return found[1], found[2]

    yield start
    for process in started:
        process.terminate()
    for process in started:
        process.communicate(timeout=30)


class Between(BaseHTTPRequestHandler):
    "Passes requests on to a service, and spoils some answers on the way back. Without a service it is a load balancer with nobody behind it."

    def answer(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0)) or None
        found = (
            self.server.behind.ask(self.command, self.path, body)
            if self.server.behind
            else Answer(503, b"")
        )
        found = self.server.spoil(self.command, self.path, body, found)
        self.send_response(found.status)
        self.send_header("Content-Length", str(len(found.content)))
        self.end_headers()
        self.wfile.write(found.content)

    do_GET = do_POST = answer

    def log_message(self, *rest):
        pass


@pytest.fixture
def between():
    servers = []

    def start(behind=None, spoil=lambda method, path, body, answer: answer):
        server = ThreadingHTTPServer(("127.0.0.1", 0), Between)
        server.behind, server.spoil = behind and Service(behind), spoil
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture
def ask(aws, mails, monkeypatch):
    "Asks the handler as ECS would; returns its answer and the mail."
    for name, value in {
        **aws.environment(),
        "SNN_BUCKET": "cats",
        "SNN_MARGIN": ".05",
        "SNN_STACK": "Cats",
        "SNN_TOPIC": mails[0],
        "SNN_PATIENCE": "1",
    }.items():
        monkeypatch.setenv(name, value)

    def call(test_url, production_url, expected=""):
        monkeypatch.setenv("SNN_TEST_URL", test_url)
        monkeypatch.setenv("SNN_PRODUCTION_URL", production_url)
        answer = lambda_handler(
            {**EVENT, "hookDetails": {"model": expected} if expected else None}, None
        )
        assert json.loads(json.dumps(answer)) == answer and answer.keys() == {"hookStatus"}
        return answer["hookStatus"], *mails[1]()

    return call


def test_the_two_models_of_the_original_go_through_it_one_after_the_other(
    leave, serve, ask, between, trained, right, capsys, monkeypatch
):
    "The Codebook's 10 epochs first; then the fully trained one; and then no way back to the first."
    nobody = between()
    early_id, early = serve(leave(trained[10], "codebook"))
    status, subject, text = ask(early, nobody, early_id)
    assert (status, subject) == ("SUCCEEDED", "Cats: a new version waits for you")
    assert (
        f"{early_id} is right on {right[10]} of 50 test images, and no model answers yet"
        in text
        and "snn approve --stack Cats" in text
        and early in text
    )

    assert "bin/deploy --stack Cats --reviewers YOUR.IP.ADDRESS/32" in text  # nobody may look
    monkeypatch.setenv("SNN_REVIEWERS", "203.0.113.7/32")
    status, subject, text = ask(early, nobody, early_id)
    assert f"Look at it: {early}/ (open to 203.0.113.7/32)" in text

    full_id, full = serve(leave(trained[300], "full"))
    status, _, text = ask(full, early, full_id)
    assert (
        status == "SUCCEEDED"
        and f"{full_id} is right on {right[300]} of 50 test images, the live model {early_id} on {right[10]} of 50"
        in text
    )

    status, subject, text = ask(early, full, early_id)
    assert (status, subject) == (
        "FAILED",
        "Cats: a new version was refused",
    ) and "worse by more than 5%" in text

    status, _, text = ask(full, full, full_id)  # the same model with other code around it
    assert status == "SUCCEEDED"
    logged = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["accepted"] for line in logged] == [True, True, True, False, True] and logged[
        0
    ]["deployment"] == EVENT["resourceArn"]


def test_a_model_file_of_weights_alone_passes_as_the_whole_one_does(
    leave, serve, ask, between, trained, right
):
    name, url = serve(leave(trained[300], "alone", alone=True))
    assert name == model_id(trained[300])
    status, _, text = ask(url, between(), name)
    assert status == "SUCCEEDED" and f"is right on {right[300]} of 50 test images" in text


@pytest.fixture(scope="module")
def pair(leave, serve, trained):
    "A service of each model: id and address."
    return {epochs: serve(leave(trained[epochs], f"run-{epochs}")) for epochs in (10, 300)}


def spoiled(path, status=500, content=b"{}", when=lambda body: True):
    return lambda method, asked, body, answer: (
        Answer(status, content) if asked == path and when(body) else answer
    )


CASES = {
    "crashes on pictures": (
        spoiled("/predict", when=lambda body: body and b"iVBOR" in body),
        "POST /predict with the test images from 0 on gave 500",
    ),
    "crashes on nonsense": (
        spoiled("/predict", when=lambda body: body and b"neither" in body),
        "POST /predict with nonsense gave 500 where a refusal (4xx) is right",
    ),
    "takes nonsense for a picture": (
        spoiled("/predict", 200, when=lambda body: body and b"neither" in body),
        "POST /predict with nonsense gave 200 where a refusal (4xx) is right",
    ),
    "is never ready": (spoiled("/readyz", 503), "GET /readyz gave 503 where 200 is right"),
    "is not healthy": (spoiled("/healthz"), "GET /healthz gave 500"),
    "has no page": (spoiled("/", 404), "GET / gave 404"),
    "does not know its model": (spoiled("/model"), "the test listener answers with no model"),
    "says no JSON": (
        spoiled("/predict", 200, b"<html>", when=lambda body: body and b"iVBOR" in body),
        "was answered by the model None",
    ),
    "answers in part": (
        lambda method, path, body, answer: (
            Answer(
                200,
                json.dumps(
                    {**answer.said, "predictions": answer.said["predictions"][1:]}
                ).encode(),
            )
            if answer.said.get("predictions")
            else answer
        ),
        "gave 15 answers to 16 pictures",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_a_new_version_is_refused_that(name, pair, between, ask):
    spoil, why = CASES[name]
    status, _, text = ask(between(pair[300][1], spoil), pair[10][1], pair[300][0])
    assert status == "FAILED" and why in text


def test_one_failed_request_of_many_is_enough(pair, between, ask):
    seen = []

    def spoil(method, path, body, answer):
        if path == "/predict" and b"iVBOR" in body:
            seen.append(1)
        return Answer(502, b"") if len(seen) == 3 and path == "/predict" else answer

    status, _, text = ask(between(pair[300][1], spoil), pair[10][1])
    assert (
        status == "FAILED" and "the test images from 32 on gave 502" in text and len(seen) == 4
    )


def test_the_old_version_cannot_sit_the_exam_for_the_new_one(pair, ask):
    status, _, text = ask(pair[10][1], pair[10][1], expected=pair[300][0])
    assert (
        status == "FAILED"
        and f"answers with the model {pair[10][0]}, not with {pair[300][0]}" in text
    )


def test_a_version_that_did_not_start_is_refused(pair, ask):
    status, _, text = ask("http://127.0.0.1:9", pair[10][1], expected=pair[300][0])
    assert status == "FAILED" and "answers with no model" in text


def test_a_broken_live_model_does_not_keep_a_good_one_out(pair, between, ask):
    broken = between(pair[300][1], spoiled("/predict"))
    status, _, text = ask(pair[10][1], broken)
    assert status == "SUCCEEDED" and f"the live model {pair[300][0]} on 0 of 50" in text


def test_the_images_are_those_of_the_data_that_the_model_was_trained_on(s3, pair, drawn_data):
    "Also when the next data set lies in its place."
    trained_on = Service(pair[300][1]).ask("GET", "/model").said["data_etag"]
    s3.put_object(Bucket="cats", Key="training_input/datasets.h5", Body=b"the next one")
    found = find_data(s3, "cats", trained_on)
    assert (
        s3.get_object(Bucket="cats", Key=found.key, VersionId=found.version)["Body"].read()
        == drawn_data.read_bytes()
    )
    s3.delete_object(Bucket="cats", Key="training_input/datasets.h5")
    assert find_data(s3, "cats", trained_on) == found
    with pytest.raises(InputError, match="does not hold a datasets.h5"):
        find_data(s3, "cats")
    with pytest.raises(InputError, match="does not hold a file with the ETag 0000"):
        find_data(s3, "cats", "0" * 32)
    put_data(s3, drawn_data)


def put_data(s3, drawn_data) -> None:
    "The data lies under its usual name, as before a test and for those after it."
    s3.put_object(
        Bucket="cats", Key="training_input/datasets.h5", Body=drawn_data.read_bytes()
    )


def test_without_test_images_there_is_no_judgement(between, ask, pair, s3, drawn_data):
    "A model put there by hand names no data, and none lies under the usual name."
    s3.delete_object(Bucket="cats", Key="training_input/datasets.h5")

    def nameless(method, path, body, answer):
        return (
            Answer(200, json.dumps({**answer.said, "data_etag": None}).encode())
            if path == "/model"
            else answer
        )

    status, _, text = ask(between(pair[300][1], nameless), pair[10][1])
    put_data(s3, drawn_data)
    assert status == "FAILED" and "without its test images the model can't be judged" in text


def test_the_gate_counts_what_the_model_itself_says(pair, trained, drawn_data):
    "Through HTTP, PNG and the service's preprocessing come the same answers as from the weights."
    datasets = data.read(drawn_data)
    for epochs, (name, url) in pair.items():
        seen, own = (
            trial(Service(url), name, datasets.test_x, datasets.test_y),
            model.evaluate(trained[epochs], datasets.test_x, datasets.test_y),
        )
        assert (
            seen.failures == () and seen.accuracy == own.accuracy and smoke(Service(url)) == []
        )


def test_it_reaches_a_service_by_https_under_the_name_in_its_certificate(
    between, pair, tmp_path, monkeypatch
):
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    subprocess.run(
        [
            "openssl",
            "req",
            "-x509",
            "-newkey",
            "ec",
            "-pkeyopt",
            "ec_paramgen_curve:prime256v1",
            "-nodes",
            "-days",
            "2",
            "-keyout",
            key,
            "-out",
            certificate,
            "-subj",
            "/CN=cats.example",
            "-addext",
            "subjectAltName=DNS:cats.example",
        ],
        check=True,
        capture_output=True,
    )
    server = ThreadingHTTPServer(("127.0.0.1", 0), Between)
    server.behind, server.spoil = (
        Service(pair[10][1]),
        lambda method, path, body, answer: answer,
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    server.handle_error = lambda *rest: None
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    url = f"https://127.0.0.1:{server.server_port}"
    assert (
        Service(url, "cats.example").ask("GET", "/healthz").status == 0
    )  # signed by nobody we know
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    assert Service(url, "cats.example").ask("GET", "/healthz").status == 200
    assert Service(url, "dogs.example").ask("GET", "/healthz").status == 0
    assert Service(url).ask("GET", "/healthz").status == 0
    server.shutdown()
    server.server_close()
