"""The simulated handlers ask the parameter server as often as the real ones do, and for as many bytes."""

from collections import Counter

import msgspec
import pytest

from snn.cloud.bucket import Topic, Upload
from snn.cloud.bus import LambdaBus
from snn.cloud.messages import Message
from snn.cloud.prices import load
from snn.cloud.residents import seats
from snn.cloud.services import Services
from snn.cloud.store import Outbox, Store
from snn.data import h5 as data
from snn.estimate.designs import default_plan
from snn.estimate.simulation import Simulation, on_aws
from snn.handlers import invocation, launch, protocol
from snn.handlers.upload import start
from snn.lab.faults import LabBucket, LabBus
from snn.local.server import parameter_server

FUNCTIONS = ("LaunchLambda", "TrainerLambda", "NeuronLambda")


@pytest.fixture(scope="module")
def server():
    with parameter_server() as opened:
        yield opened


@pytest.fixture
def exchanges(monkeypatch):
    "Counts exchanges with the parameter server."
    count, real = [0], Outbox._exchange

    def counted(self, commands):
        count[0] += 1
        return real(self, commands)

    monkeypatch.setattr(Outbox, "_exchange", counted)
    bid = Store.bid
    monkeypatch.setattr(
        Store, "bid", lambda *arguments: bid(*arguments) or True
    )  # who leads is chance; here, everybody does
    monkeypatch.setattr(
        launch, "note_meter", lambda *arguments: None
    )  # once a second, and not part of the protocol
    return count


class Nobody:
    "Stands in for Lambda: nobody comes when a function is called to stay."

    def invoke(self, **call):
        pass


def messages_of(services: Services, residents: bool):
    "Messages that wait, one after the other; where functions stay, from their queues."
    free = [
        seat
        for seat in seats(services.runs.plan(services.runs.names()[-1]))
        if seat.number == 0
    ]
    for seat in free:
        services.residents.sit(seat, "me")
    while True:
        taken = [services.bus.sent.pop(0)] if not residents and services.bus.sent else []
        for seat in free:
            taken += [
                msgspec.json.decode(e.event, type=Message)
                for e in services.residents.take(seat, "me", wait=0)
            ]
        if not taken:
            return
        yield from taken


def step(message: Message) -> str:
    return f"{message.function} {message.direction} {message.layer}"


def real_exchanges(server, exchanges, chosen, path, epoch: int) -> Counter:
    "Of real handlers, one after another, each in a process that has just begun; by step."
    services, found = Services({"SNN_REDIS_URL": server.url}), Counter()
    stay = LambdaBus(
        Nobody(), dict.fromkeys(FUNCTIONS, ""), services.store, services.residents
    )
    services.__dict__["bus"], services.__dict__["topic"] = (
        stay if chosen.residents else LabBus(services.store),
        Topic(),
    )
    stay.freezes = False
    services._buckets["lab"] = LabBucket(
        {
            "in/datasets.h5": path.read_bytes(),
            "in/parameters.json": msgspec.json.encode(chosen),
        }
    )
    run = start(
        Upload("lab", "in/datasets.h5", f"{chosen.granularity}{chosen.aggregation}"), services
    )
    services.bus.settle()
    for message in messages_of(services, chosen.residents > 0):
        before = exchanges[0]
        invocation.forget()
        protocol.handle(message, services)
        services.bus.settle()
        if message.epoch == epoch:
            found[step(message)] += exchanges[0] - before
    assert services.runs.status(run).state == "finished"
    return found


class Counting(Simulation):
    "A simulation that counts requests by step, but for those by which functions that stay ask for messages."

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.found = Counter()

    def invocation(self, host, message):
        host.message = message
        yield from super().invocation(host, message)
        host.message = None

    def may_still_win(self, host, message):
        yield from super().may_still_win(host, message)
        return True

    def request(self, host, *arguments, **named):
        if message := getattr(host, "message", None):
            self.found[message.epoch, step(message)] += 1
        yield from super().request(host, *arguments, **named)


@pytest.mark.parametrize("aggregation", ["best", "mean"])
@pytest.mark.parametrize("granularity", ["neuron", "layer", "network"])
@pytest.mark.parametrize("residents", [0, 2])
def test_each_simulated_step_asks_the_server_as_often_as_the_real_one(
    residents,
    granularity,
    aggregation,
    server,
    exchanges,
    parameters,
    small_datasets,
    tmp_path,
):
    chosen = parameters(
        (3, 2, 1),
        granularity=granularity,
        aggregation=aggregation,
        residents=residents,
        epochs=4,
        batch_size=8,
    )
    path = tmp_path / "datasets.h5"
    data.write(small_datasets(size=4, train=20, test=2), path)
    real = real_exchanges(server, exchanges, chosen, path, 1)
    plan = default_plan(
        granularity,
        20,
        (3, 2, 1),
        4,
        aggregation=aggregation,
        residents=residents,
        batch_size=8,
    )
    simulation = Counting(plan, msgspec.structs.replace(on_aws(plan, load()), warm=False), 3)
    simulation.run()
    assert {
        name: count for (epoch, name), count in simulation.found.items() if epoch == 1
    } == dict(real)
