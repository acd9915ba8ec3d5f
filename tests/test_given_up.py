"""A message that failed for good ends its run only if the run still needs it."""

import msgspec
import pytest

from snn.backends.local.services import Services
from snn.cloud.messages import Message, Plan
from snn.cloud.runs import Status
from snn.handlers.ending import give_up
from snn.local.server import parameter_server
from snn.maths.parameters import from_dict

PARAMETERS = {
    "epochs": 9,
    "layers": 1,
    "neurons": {"layer1": 1},
    "activations": {"layer1": "sigmoid"},
    "learning_rate": 1,
    "batch_size": 4,
    "threshold": 0,
}


class Folder:
    "A bucket that only remembers."

    def __init__(self):
        self.files = {}

    def put(self, key, content):
        self.files[key] = content


@pytest.fixture
def services():
    server = parameter_server()
    found = Services({"SNN_REDIS_URL": server.url})
    found._buckets["bucket"] = Folder()
    found.runs.begin(
        Plan(
            "demo",
            from_dict(PARAMETERS),
            "bucket",
            "images.npz",
            4,
            12,
            2,
            ("no", "yes"),
            "",
            "",
        )
    )
    found.runs.update("demo", Status(epoch=5, cost=0.5))
    yield found
    server.close()


def fail(message: Message, services: Services) -> str:
    "The state of the run after this message has expired."
    give_up(
        message.function,
        msgspec.json.decode(msgspec.json.encode(message)),
        0,
        "EventAgeExceeded",
        services,
    )
    services.store.now("PING")
    return services.runs.status("demo").state


def test_work_that_is_still_to_be_done_ends_the_run(services):
    assert fail(Message("NeuronLambda", "forward", "demo", 6, 0, 1), services) == "failed"
    assert "training_results/demo/stopped.json" in services.bucket("bucket").files


def test_the_duplicate_of_a_finished_step_does_not(services):
    message = Message("NeuronLambda", "forward", "demo", 6, 0, 1)
    services.store.open(message)
    services.store.now("HSET", "{demo/0}:6", f"finished:{message.step}", 1)
    assert fail(message, services) == "running"
    assert (
        fail(msgspec.structs.replace(message, first=1), services) == "failed"
    )  # its neighbour is not finished


@pytest.mark.parametrize(
    "function, direction",
    [("NeuronLambda", "backward"), ("TrainerLambda", "forward"), ("LaunchLambda", "next")],
)
def test_a_message_of_an_epoch_that_is_past_does_not(function, direction, services):
    assert fail(Message(function, direction, "demo", 4, 0, 1), services) == "running"
    assert not services.bucket("bucket").files


def test_a_message_of_a_run_that_was_taken_up_again_does_not(services):
    again = msgspec.structs.replace(services.runs.plan("demo"), run="demo~1")
    services.runs.begin(again)
    assert fail(Message("NeuronLambda", "forward", "demo", 6, 0, 1), services) == "running"
    assert (
        services.runs.status("demo~1").state == "running"
        and not services.bucket("bucket").files
    )
