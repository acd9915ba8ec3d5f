"""Whatever the functions ask of AWS in a run, their roles allow. A local AWS asks nobody for permission, so this looks."""

import re
import sys
from pathlib import Path

import msgspec
import pytest

sys.path.insert(0, str(Path(__file__).parent))
from templates import all_templates, allowed, statements

from snn.backends.aws import services as adapters
from snn.backends.aws.ledger import create_tables
from snn.backends.aws.services import Services
from snn.cloud.messages import Message, Upload
from snn.cloud.seats import Seat
from snn.data import h5 as data
from snn.handlers import checkpoint, invocation, protocol, watch
from snn.handlers.upload import handle_upload, run_id
from snn.local.server import local_aws, parameter_server
from snn.maths.parameters import from_dict

NAMES = ("LaunchLambda", "TrainerLambda", "NeuronLambda")
GIVEN = {
    "StackName": "Cats",
    "BucketName": "cats",
    "CacheSecret": "arn:secret",
    "Topic": "arn:topic",
}
ROLES = {
    name: statements(
        all_templates()["functions.yaml"]["Resources"][name.replace("Lambda", "Role")],
        GIVEN,
        {"Traced": False},
    )
    for name in NAMES
}
ACTIONS = {"ListObjectsV2": "s3:ListBucket", "Invoke": "lambda:InvokeFunction"}
HERE = "here-1:111111111111"


@pytest.fixture(scope="module")
def aws():
    opened = local_aws()
    create_tables(opened.client("dynamodb"), "Cats-")
    opened.client("s3").create_bucket(Bucket="cats")
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def server():
    with parameter_server() as opened:
        yield opened


class Account:
    "Functions that run here, one after another; what each asks of AWS is written down."

    def __init__(self, aws, url: str, monkeypatch):
        self.asked: set[tuple] = set()  # function, action, resource, prefix that is listed
        self.running, self.events = "LaunchLambda", []
        self.real, self.seats = adapters.aws_client, {}
        monkeypatch.setattr(adapters, "aws_client", self.client)
        topic = aws.client("sns").create_topic(Name="Cats")["TopicArn"]
        self.services = Services(
            {
                **aws.environment(),
                "SNN_REDIS_URL": url,
                "SNN_LEDGER": "dynamodb",
                "SNN_TABLES": "Cats-",
                "SNN_TOPIC": topic,
                "SNN_FUNCTIONS": ",".join(f"Cats-{name}" for name in NAMES),
            }
        )
        self.services.bus.freezes = True

    def client(self, service: str, environment):
        if service == "lambda":
            return self
        made = self.real(service, environment)
        made.meta.events.register(
            f"provide-client-params.{service}.*",
            lambda params, model, **_: self.note(service, model.name, params),
        )
        return made

    def note(self, service: str, operation: str, params: dict) -> None:
        where = {
            "s3": lambda: (
                f"arn:aws-cn:s3:::{params['Bucket']}"
                + (f"/{params['Key']}" if "Key" in params else "")
            ),
            "dynamodb": lambda: f"arn:aws-cn:dynamodb:{HERE}:table/{params['TableName']}",
            "lambda": lambda: f"arn:aws-cn:lambda:{HERE}:function:{params['FunctionName']}",
            "sns": lambda: "arn:topic",
        }[service]()
        self.asked.add(
            (
                self.running,
                ACTIONS.get(operation, f"{service}:{operation}"),
                where,
                params.get("Prefix"),
            )
        )

    def invoke(self, **call) -> None:
        self.note("lambda", "Invoke", call)
        self.events.append(msgspec.json.decode(call["Payload"]))

    def handle(self, message: Message) -> None:
        self.running = message.function
        invocation.forget()
        protocol.handle(message, self.services)
        self.services.bus.settle()

    def sit(self, seat: Seat) -> None:
        "A function comes to stay, and at once calls its successor."
        self.running = seat.function
        self.services.residents.sit(seat, "me")
        if seat not in self.seats:
            self.seats[seat] = self.services.bus.call([seat])

    def go_on(self, limit: int = 10**6) -> None:
        "Let the functions run until nothing is left to do."
        while limit > 0:
            events, self.events = self.events, []
            for event in events:
                (self.sit if "state" in event else self.handle)(
                    msgspec.convert(event, Seat if "state" in event else Message)
                )
                limit -= 1
            for seat in list(self.seats):
                for envelope in self.services.residents.take(seat, "me", wait=0) or []:
                    self.handle(msgspec.json.decode(envelope.event, type=Message))
                    events = True
                    limit -= 1
            if not events:
                return

    def start(self, chosen, path: Path) -> str:
        s3 = self.services.bucket("cats").client
        s3.put_object(
            Bucket="cats",
            Key="training_input/parameters.json",
            Body=msgspec.json.encode(chosen),
        )
        etag = s3.put_object(
            Bucket="cats", Key="training_input/datasets.h5", Body=path.read_bytes()
        )["ETag"].strip('"')
        self.asked.clear()
        self.running = "LaunchLambda"
        handle_upload(Upload("cats", "training_input/datasets.h5", etag), self.services)
        self.services.bus.settle()
        return run_id(Upload("cats", "training_input/datasets.h5", etag), chosen)

    def forbidden(self) -> list[tuple]:
        "What was asked and is not allowed."
        context = lambda prefix: {} if prefix is None else {"s3__prefix": prefix}
        return sorted(
            call[:3]
            for call in self.asked
            if not allowed(ROLES[call[0]], *call[1:3], **context(call[3]))
        )


def small(**changes):
    return from_dict(
        {
            "layers": 2,
            "neurons": {"layer1": 3, "layer2": 1},
            "activations": {"layer1": "relu", "layer2": "sigmoid"},
            "learning_rate": 0.01,
            "threshold": 0,
            **changes,
        }
    )


@pytest.fixture
def account(aws, server, monkeypatch):
    return Account(aws, server.url, monkeypatch)


@pytest.fixture
def path(small_datasets, tmp_path):
    data.write(small_datasets(size=4, train=24, test=4), tmp_path / "datasets.h5")
    return tmp_path / "datasets.h5"


@pytest.mark.parametrize("residents", [0, 2])
@pytest.mark.parametrize("aggregation", ["best", "mean"])
@pytest.mark.parametrize("granularity", ["neuron", "layer", "network"])
def test_a_run_asks_for_nothing_that_its_functions_may_not_do(
    account, path, granularity, aggregation, residents
):
    chosen = small(
        granularity=granularity,
        aggregation=aggregation,
        residents=residents,
        epochs=2,
        batch_size=12,
        validation_fraction=0.2,
        patience=3,
        checkpoint_every=1,
        notify_every=1,
        max_cost=5.0,
    )
    run = account.start(chosen, path)
    account.go_on()
    assert account.services.runs.status(run).state == "finished"
    assert account.forbidden() == []
    actions = {
        (function.removesuffix("Lambda"), action) for function, action, _, _ in account.asked
    }
    assert {
        ("Launch", "s3:PutObject"),
        ("Launch", "sns:Publish"),
        ("Neuron", "lambda:InvokeFunction"),
        ("Launch", "dynamodb:UpdateItem"),
    } <= actions
    assert (
        ("Neuron", "lambda:InvokeFunction", "Neuron")
        in {
            (f.removesuffix("Lambda"), a, re.sub(r".*Cats-|Lambda$", "", r))
            for f, a, r, _ in account.asked
        }
    ) == (residents > 0)


@pytest.mark.parametrize("granularity", ["neuron", "network"])
def test_a_run_that_diverges_is_ended_by_whoever_finds_it(account, path, granularity):
    run = account.start(
        small(
            granularity=granularity,
            epochs=9,
            batch_size=24,
            learning_rate=1e200,
            activations={"layer1": "leaky_relu", "layer2": "sigmoid"},
        ),
        path,
    )
    account.go_on()
    assert account.services.runs.status(run).state == "failed"
    assert account.forbidden() == []
    assert any(resource.endswith("stopped.json") for _, _, resource, _ in account.asked)


def test_the_watchdog_mends_and_takes_up_again_what_it_may(account, path):
    run = account.start(
        small(
            granularity="layer",
            residents=2,
            epochs=4,
            batch_size=12,
            checkpoint_every=1,
            stall_after=1e-9,
        ),
        path,
    )
    account.go_on(30)
    account.running = "LaunchLambda"
    for _ in range(2):
        watch.watch(account.services, "cats")
    assert account.services.runs.counted(run, "mended") > 0
    again = checkpoint.resume(run, account.services.bucket("cats"), account.services)
    account.go_on()
    assert account.services.runs.status(again).state == "finished"
    assert account.forbidden() == []
