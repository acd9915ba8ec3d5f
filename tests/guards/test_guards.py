"""Small guards on which the great promises rest; each test here fails without its guard."""

import asyncio
import json
import time
from datetime import UTC, datetime
from types import SimpleNamespace

import msgspec
import numpy as np
import pytest

from snn.backends.valkey.queue import Queue
from snn.backends.valkey.store import LARGE
from snn.cloud.messages import Message, Upload, epoch_messages
from snn.cloud.runs import Runs, Status
from snn.data import h5 as data
from snn.data import models
from snn.handlers import checkpoint, epoch, watch
from snn.handlers.ending import end_early
from snn.handlers.epoch import NAME
from snn.handlers.invocation import forget
from snn.handlers.upload import handle_upload, run_id
from snn.lab.faults import SMALL, Lab, Schedule, invoke, run_in_lab, small_datasets
from snn.local.server import parameter_server
from snn.local.worker import unique_names
from snn.maths import model, network, sampling
from snn.maths.parameters import from_dict

GRANULARITIES = ("neuron", "layer", "network")
PEACE = Schedule(0, ())
UPLOAD = Upload("lab", "training_input/datasets.h5", "etag")


@pytest.fixture(scope="module")
def server():
    with parameter_server() as started:
        yield started


def small(**changes):
    "A network of eight neurons, with changes."
    return from_dict({**SMALL, **changes})


class Mails(list):
    "A topic that keeps what it is told."

    def tell(self, subject: str, text: str) -> None:
        self.append(subject)


@pytest.fixture
def lab(server):
    "Makes a lab whose run has just begun; its messages wait in `lab.bus.sent`."

    def begin(parameters, datasets: bytes | None = None) -> Lab:
        files = {
            "training_input/datasets.h5": datasets or small_datasets(),
            "training_input/parameters.json": msgspec.json.encode(parameters),
        }
        forget()
        made = Lab(PEACE, server.url, files)
        made.services.__dict__["topic"] = made.mails = Mails()
        made.services.store.adapter.client.execute_command("FLUSHALL")
        handle_upload(UPLOAD, made.services)
        made.services.bus.settle()
        made.run = run_id(UPLOAD, parameters)
        return made

    return begin


def take(lab: Lab) -> list[Message]:
    "The messages that were sent since the last look."
    sent, lab.bus.sent[:] = list(lab.bus.sent), []
    return sent


def play(lab: Lab, until=lambda message: False) -> Message | None:
    "Deliver messages, oldest first, up to the first that `until` is true of, or to the end."
    while lab.queue or lab.bus.sent:
        lab.queue += take(lab)
        message = lab.queue.pop(0)
        if until(message):
            return message
        invoke(lab, message)
    return None


def record_of(lab: Lab, run: str) -> dict:
    "The content of run.json."
    return json.loads(lab.bucket[f"training_results/{run.split('~')[0]}/run.json"])


# Protocol


def black_pictures(tmp_path) -> bytes:
    "Sixteen black pictures: every mini-batch has the same cost to the last bit."
    labels = lambda m: np.arange(m) % 2
    black = lambda m: np.zeros((m, 4, 4, 3), dtype=np.uint8)
    data.write(
        data.Datasets(black(16), labels(16), black(4), labels(4)), tmp_path / "black.h5"
    )
    return (tmp_path / "black.h5").read_bytes()


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_a_tie_of_costs_goes_to_one_mini_batch(granularity, server, tmp_path):
    content = black_pictures(tmp_path)
    parameters = small(granularity=granularity, batch_size=4)
    result = run_in_lab(PEACE, server.url, parameters, content, limit=3000)
    pictures = sampling.standardise(np.zeros((16, 4, 4, 3), np.uint8))
    costs, layers = zip(*network.train(parameters, pictures, np.arange(16) % 2))
    assert result.mended == 0
    for (W, b), (expected_W, expected_b, *_) in zip(result.layers, layers[-1], strict=True):
        np.testing.assert_allclose(W, expected_W, rtol=1e-12)
        np.testing.assert_allclose(b, expected_b, rtol=1e-12, atol=1e-15)


def test_mini_batches_that_tie_do_not_all_learn(lab, tmp_path):
    begun = lab(small(batch_size=4, epochs=1), black_pictures(tmp_path))
    play(begun)
    client = begun.services.store.adapter.client
    learned = [client.hexists(f"{{{begun.run}/{batch}}}:0", "w1/0") for batch in range(4)]
    assert learned == [True, False, False, False]


def test_an_upload_told_twice_sends_nothing_twice(lab):
    begun = lab(small())
    first = take(begun)
    handle_upload(UPLOAD, begun.services)
    begun.services.bus.settle()
    plan = begun.services.runs.plan(begun.run)
    assert first == epoch_messages(plan, 0, "")
    assert take(begun) == []
    assert sum(subject.endswith("started") for subject in begun.mails) == 1


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_a_finished_block_that_is_asked_again_sends_what_was_lost(direction, lab):
    begun = lab(small())
    wanted = ("TrainerLambda", direction)
    last = None
    while not any((m.function, m.direction) == wanted for m in begun.bus.sent):
        begun.queue += take(begun)
        last = begun.queue.pop(0)
        invoke(begun, last)
    lost = take(begun)
    invoke(begun, last)  # Lambda delivers the block's message once more
    assert take(begun) == lost
    begun.queue += lost
    play(begun)
    assert record_of(begun, begun.run)["epochs"] == 6


def test_what_is_left_on_the_server_goes_by_itself(lab):
    begun = lab(small(epochs=4, aggregation="mean"))
    play(begun)
    client = begun.services.store.adapter.client
    kept = [key for key in client.scan_iter("{*")]
    assert len(kept) > 10
    assert [key for key in kept if client.ttl(key) <= 0] == []


def test_a_late_large_value_goes_by_itself(lab):
    begun = lab(small(epochs=4))
    late = play(begun, until=lambda message: message.epoch == 3)
    store = begun.services.store.adapter
    stale = msgspec.structs.replace(late, epoch=0)
    store.put(stale, {"a9/0": b"x" * (LARGE + 1)})
    store.flush()
    client = store.client
    assert [key for key in client.scan_iter("{*") if client.ttl(key) <= 0] == []


def test_an_opened_mini_batch_goes_by_itself(lab):
    begun = lab(small())
    store = begun.services.store.adapter
    store.open(take(begun)[0], [])
    client = store.client
    found = [key for key in client.scan_iter("{*/0}*")]
    assert len(found) == 2 and all(client.ttl(key) > 0 for key in found)


def test_two_machines_do_not_take_each_others_work_in_hand(lab):
    services = lab(small()).services
    one, two = (Queue(services.store.adapter) for _ in range(2))
    (first,), (second,) = unique_names(1), unique_names(1)
    one.send([Message("TrainerLambda", "start", "demo", 0, 0)])
    (taken,) = one.take(first, wait=0)
    assert taken.function == "TrainerLambda" and two.take(second, wait=0) == []
    assert two.recover(second) == 0
    assert one.recover(first) == 1  # as whoever looks after it does when it has died


# A run that goes on, and one that does not


def test_an_epoch_that_ends_while_the_run_is_stopped_does_not_say_that_it_runs(lab):
    begun = lab(small())
    runs = begun.services.runs
    status = runs.status(begun.run)  # read by an epoch that is about to end
    end_early(runs.plan(begun.run), begun.services, "stopped", "its owner said so")
    runs.update(begun.run, msgspec.structs.replace(status, epoch=1, cost=0.5))
    begun.services.store.flush()
    found = runs.status(begun.run)
    assert found.state == "stopped" and found.reason == "its owner said so"


class Died(BaseException):
    "What kills a process between two of its requests."


@pytest.mark.parametrize("step", ["begin", "leave_plan"])
def test_a_launch_that_dies_after_a_step_leaves_what_the_neurons_need(step, lab, monkeypatch):
    begun = lab(small(stall_after=0.01))
    services, done = begun.services, getattr(Runs if step == "begin" else checkpoint, step)
    begun.bus.sent.clear()
    for name in [name for name in begun.bucket if not name.startswith("training_input/")]:
        del begun.bucket[name]
    services.store.adapter.client.execute_command("FLUSHALL")
    forget()

    def die(*arguments):
        done(*arguments)
        raise Died

    with monkeypatch.context() as patched:
        patched.setattr(Runs if step == "begin" else checkpoint, step, die)
        with pytest.raises(Died):
            handle_upload(UPLOAD, services)
    services.bus.settle()
    forget()
    watch.watch(services, "lab")  # sees how far the run is
    later = SimpleNamespace(time=lambda: time.time() + 1)  # longer than stall_after
    monkeypatch.setattr("snn.cloud.runs.time", later)
    watch.watch(services, "lab")
    assert play(begun) is None
    assert record_of(begun, begun.run)["epochs"] == 6


def test_a_run_that_was_stopped_is_not_taken_up_when_the_server_forgets_it(lab):
    begun = lab(small())
    services = begun.services
    end_early(services.runs.plan(begun.run), services, "stopped", "its owner said so")
    take(begun)
    services.store.adapter.client.execute_command("FLUSHALL")
    watch.watch(services, "lab")
    assert take(begun) == [] and services.runs.names() == []


def test_a_run_that_was_not_stopped_is_taken_up_when_the_server_forgets_it(lab):
    begun = lab(small())
    take(begun)
    begun.services.store.adapter.client.execute_command("FLUSHALL")
    watch.watch(begun.services, "lab")
    assert {message.run for message in take(begun)} == {f"{begun.run}~1"}


@pytest.fixture
def resumed(lab):
    "A run of long ago that had spent 7 dollars, taken up from its checkpoint under other limits."

    def resume(**limits):
        begun = lab(small())
        play(begun, until=lambda message: message.epoch == 3)
        take(begun)
        begun.queue.clear()
        folder = f"training_checkpoints/{begun.run}"
        newest = max(key for key in begun.bucket.keys(folder) if key.endswith(".npz"))
        status, *rest = checkpoint.unpack(begun.bucket[newest])
        begun.bucket[newest] = checkpoint.pack(
            msgspec.structs.replace(status, spent=7.0), *rest
        )
        plan = json.loads(begun.bucket[f"{folder}/plan.json"])
        plan["parameters"] |= limits
        plan["started"] = "2020-01-01 00:00:00.000000"
        begun.bucket[f"{folder}/plan.json"] = json.dumps(plan).encode()
        begun.services.store.adapter.client.execute_command("FLUSHALL")
        forget()
        checkpoint.resume(begun.run, begun.services.bucket("lab"), begun.services)
        play(begun)
        return record_of(begun, begun.run)

    return resume


def test_what_a_run_had_spent_counts_after_it_is_taken_up_and_the_pause_does_not(resumed):
    assert 7 < resumed()["meter"]["dollars"] < 7.5


def test_max_cost_counts_what_was_spent_before(resumed):
    record = resumed(max_cost=7.0)
    assert record["epochs"] == 3 and "max_cost allows" in record["reason"]


def test_the_deadline_counts_the_epoch_to_come(lab, monkeypatch):
    plan = lab(small()).services.runs
    plan = plan.plan(plan.names()[-1])
    now = 1_000_000.0
    monkeypatch.setattr(epoch.time, "time", lambda: now)
    started = datetime.fromtimestamp(now - 8, UTC).strftime(NAME)
    limited = msgspec.structs.replace(plan.parameters, deadline=10.0)
    plan = msgspec.structs.replace(plan, parameters=limited, started=started)
    after = lambda seconds: epoch.over_limit(plan, Status(), Status(updated=now - seconds))
    assert after(5) == "another epoch would end after the deadline of 10 s"
    assert after(1) == ""


def test_a_cost_equal_to_the_threshold_ends_the_run(lab):
    begun = lab(small())
    play(begun)
    costs = begun.services.runs.costs(begun.run)
    lowest = min(range(5), key=costs.__getitem__)
    again = lab(small(threshold=costs[lowest]))
    play(again)
    assert record_of(again, again.run)["epochs"] == lowest + 1


# Files


@pytest.mark.parametrize("fault", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_files_are_written_whole(fault, tmp_path):
    path = tmp_path / "params.h5"
    path.write_bytes(b"the old model")
    with pytest.raises((KeyboardInterrupt, OSError)), data.written_whole(path) as partial:
        partial.write_bytes(b"half of")
        raise fault
    assert path.read_bytes() == b"the old model"
    assert [file.name for file in tmp_path.iterdir()] == ["params.h5"]


def test_a_model_that_cannot_be_written_leaves_the_old_one(tmp_path):
    path = tmp_path / "params.h5"
    path.write_bytes(b"the old model")
    good = (np.zeros((4, 48)), np.zeros((4, 1)))
    broken = model.Model(small(), [good, ("no", "arrays")], size=4)
    with pytest.raises(AttributeError):
        models.write(broken, path)
    assert path.read_bytes() == b"the old model"
    assert [file.name for file in tmp_path.iterdir()] == ["params.h5"]


def test_packing_leaves_a_picture_to_train_on(tmp_path, snn):
    from PIL import Image

    rng = np.random.default_rng(0)
    for folder in ("cats", "others"):
        (tmp_path / folder).mkdir()
        for number in range(2):
            pixels = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / folder / f"{number}.png")
    out = tmp_path / "datasets.h5"
    folders = ("--cat", tmp_path / "cats", "--non-cat", tmp_path / "others")
    code, _, _ = snn("data", "pack", *folders, "--out", out, "--test-fraction", ".9")
    packed = data.read(out)
    assert code == 0
    assert sorted(packed.train_y) == [0, 1] and sorted(packed.test_y) == [0, 1]


# The service


def test_a_body_of_unknown_length_takes_a_place_in_memorys_limit():
    from snn.serve.guard import Places, admitting

    places, answers = Places(requests=8, size=150), []
    arrived = asyncio.Event()

    async def application(scope, receive, send):
        arrived.set()
        await receive()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    async def post(body: asyncio.Event):
        async def receive():
            await body.wait()
            return {"type": "http.request", "body": b"x" * 50, "more_body": False}

        async def send(message):
            if message["type"] == "http.response.start":
                answers.append(message["status"])

        headers = [(b"transfer-encoding", b"chunked")]
        scope = {"type": "http", "method": "POST", "path": "/predict", "headers": headers}
        await admitting(application, places, size=100)(scope, receive, send)

    async def two_at_once():
        body = asyncio.Event()
        first = asyncio.create_task(post(body))
        await arrived.wait()
        await post(body)
        body.set()
        await first

    asyncio.run(two_at_once())
    assert answers == [503, 200]
    assert places.bytes == places.taken == 0
