"""What the scripts on the parameter server leave there, field by field, and how long it stays."""

from concurrent.futures import ThreadPoolExecutor

import msgspec
import numpy as np
import pytest
import redis

from snn.backends.aws.invoke import LambdaBus
from snn.backends.valkey import store as store_module
from snn.backends.valkey.queue import (
    IDLE,
    KEEP,
    MOST,
    QUEUE,
    WORTH,
    Queue,
    meant_for,
    taken_by,
)
from snn.backends.valkey.residents import LEASE, Residents, queue_key
from snn.backends.valkey.store import (
    LARGE,
    Packer,
    Store,
    connect,
    in_namespace,
    keys_in,
    patiently,
    shown,
)
from snn.cloud.arrays import BEST, MASTER, decode, encode, tag
from snn.cloud.interfaces import Count, Incomplete, Joined, Opened, Refusing
from snn.cloud.messages import Envelope, Message, Plan, encoded_envelope
from snn.cloud.runs import Runs, Status
from snn.cloud.seats import Seat
from snn.errors import InputError
from snn.local.server import parameter_server
from snn.maths.parameters import from_dict

WEEK = 7 * 24 * 3600


@pytest.fixture(scope="module")
def server():
    with parameter_server() as started:
        yield started


@pytest.fixture
def store(server):
    found = Store(connect(server.url))
    found.client.execute_command("FLUSHALL")
    return found


def neuron(epoch=0, batch=0, first=0, **changes):
    "A message to a neuron of layer 2."
    return Message("NeuronLambda", "forward", "demo", epoch, batch, 2, first, 1, **changes)


def trainer(epoch=0, batch=0):
    return Message("TrainerLambda", "forward", "demo", epoch, batch, 2)


def fields(store, key):
    "A hash on the server, without what a duration makes different each time."
    found = store.client.hgetall(key)
    own = {name.decode(): value.decode() for name, value in found.items()}
    return {name: value for name, value in own.items() if name not in TIMED}


TIMED = {f"NeuronLambda:{name}" for name in ("billed", "starts", "init")}
STEP = "NeuronLambda/forward/2/0"


# To begin


def test_what_an_opening_leaves(store):
    assert store.open(neuron()) == Opened("open", [])
    assert fields(store, "{demo/0}") == {"epoch": "0", "NeuronLambda:attempts": "1"}
    assert fields(store, "{demo/0}:0") == {"epoch": "0", f"attempts:{STEP}": "1"}
    for name in ("{demo/0}", "{demo/0}:0"):
        assert 23 * 3600 < store.client.ttl(name) <= 24 * 3600 == store.ttl


def test_an_opening_fetches_what_is_there(store):
    store.put(neuron(), {"a": b"1", "b": b"2"})
    store.put(neuron(batch=3), {"w": b"3"})
    found = store.open(neuron(), ["b", "none"], "{demo/3}:0", ["none", "w"])
    assert found == Opened("open", [b"2", None], [None, b"3"])


def test_an_opening_of_finished_work_is_a_duplicate(store):
    store.open(neuron())
    store.finish(neuron(), 0.25)
    assert store.open(neuron(), ["a"]) == Opened("finished", [])
    counters = fields(store, "{demo/0}")
    assert counters["NeuronLambda:attempts"] == "2"
    assert counters["NeuronLambda:duplicates"] == counters["NeuronLambda:finished"] == "1"
    assert counters["NeuronLambda:microseconds"] == "250000"


def test_an_epoch_throws_away_the_one_before_the_last(store):
    there = lambda: sorted(key.decode() for key in store.client.scan_iter("{demo/0}:*"))
    for epoch, left in ((0, [0]), (1, [0, 1]), (2, [1, 2]), (3, [2, 3])):
        store.put(neuron(epoch), {"a": b"1"})
        store.flush()
        assert there() == [f"{{demo/0}}:{number}" for number in left]
    assert fields(store, "{demo/0}")["epoch"] == "3"
    assert store.client.ttl("{demo/0}:3") > 0


def test_what_is_late_changes_nothing_and_is_counted_as_stale(store):
    store.open(neuron(epoch=5))
    before = fields(store, "{demo/0}:5"), fields(store, "{demo/0}:4")
    assert store.open(neuron(epoch=4)).status == "stale"
    store.put(neuron(epoch=4), {"a": b"1"})
    store.finish(neuron(epoch=4), 0.1, {"a": b"1"}, [b"message"], QUEUE)
    assert store.join(neuron(epoch=4), 1, trainer(4), 0.1) == Joined(0, False)
    assert (fields(store, "{demo/0}:5"), fields(store, "{demo/0}:4")) == before
    assert fields(store, "{demo/0}")["stale"] == "4" and store.client.llen(QUEUE) == 0
    assert store.open(neuron(epoch=5)).status == "open"  # an equal one is not late


def test_a_stopped_run_does_nothing_more(store):
    store.client.hset("{demo/0}", "stopped", 1)
    assert store.open(neuron()) == Opened("stopped", [])
    assert store.join(neuron(), 1, trainer(), 0.1) == Joined(0, False)
    store.put(neuron(), {"a": b"1"})
    store.finish(neuron(), 0.1, {"a": b"1"}, [b"message"], QUEUE)
    store.flush()
    assert fields(store, "{demo/0}") == {"stopped": "1"}
    assert not store.client.exists("{demo/0}:0", QUEUE)


# To end


def test_who_did_not_ask_is_counted_at_its_end_and_once(store):
    store.open_later(neuron())
    store.finish(neuron(), 0.5, {"a": b"1"})
    store.flush()
    assert fields(store, "{demo/0}:0") == {
        "epoch": "0",
        f"attempts:{STEP}": "1",
        f"finished:{STEP}": "500000",
        "a": "1",
    }
    once = {"epoch": "0", "NeuronLambda:attempts": "1", "NeuronLambda:finished": "1"}
    assert fields(store, "{demo/0}") == once | {"NeuronLambda:microseconds": "500000"}
    store.open_later(neuron())
    store.finish(neuron(), 7.0, {"a": b"2"})
    store.flush()
    counters = fields(store, "{demo/0}")
    assert counters["NeuronLambda:attempts"] == "2"
    assert counters["NeuronLambda:duplicates"] == counters["NeuronLambda:finished"] == "1"
    assert counters["NeuronLambda:microseconds"] == "500000"
    found = fields(store, "{demo/0}:0")
    assert found["a"] == "1" and found[f"finished:{STEP}"] == "500000"
    store.finish(neuron(), 7.0)  # one that had asked, and was counted then
    store.flush()
    assert fields(store, "{demo/0}")["NeuronLambda:duplicates"] == "1"


def test_what_an_invocation_has_counted_is_added_once(store):
    store.meter.used.costs = 3
    store.finish(neuron(), 0.1)
    store.flush()
    billed = int(store.client.hget("{demo/0}", "NeuronLambda:billed"))
    assert billed > 0 and store.client.hget("{demo/0}", "NeuronLambda:starts") == b"1"
    assert store.client.hget("{demo/0}", "NeuronLambda:costs") == b"3"
    store.meter.used.costs = 3
    store.finish(neuron(), 0.1)
    store.finish(neuron(first=1), 0.1)
    store.flush()
    assert store.client.hget("{demo/0}", "NeuronLambda:costs") == b"3"
    assert store.client.hget("{demo/0}", "NeuronLambda:starts") == b"1"  # of the process
    assert int(store.client.hget("{demo/0}", "NeuronLambda:billed")) > billed


@pytest.mark.parametrize("members", [1, 3])
def test_whoever_completes_a_barrier_sends_and_who_comes_later_mends(store, members):
    for number in range(members):
        told = store.join(neuron(first=number), members, trainer(), 0.1, {f"a{number}": b"1"})
        assert told == Joined(number + 1, number + 1 == members)
    again = store.join(neuron(first=0), members, trainer(), 0.2, {"a0": b"2"})
    assert again == Joined(members, True)  # the next step was never begun
    store.open(trainer())
    assert store.join(neuron(first=0), members, trainer(), 0.1) == Joined(members, False)
    found = fields(store, "{demo/0}:0")
    assert found["a0"] == "1" and found["joined:NeuronLambda/forward/2"] == str(members)
    assert (
        found["finished:NeuronLambda/forward/2/0"] == "100000"
    )  # µs: a duplicate's do not count


def test_a_barrier_on_this_server_leaves_the_message_once(store):
    for number in range(3):
        store.join_later(neuron(first=number), 3, trainer(), 0.1, {}, b"the message", QUEUE)
        store.flush()
        assert store.client.llen(QUEUE) == (number == 2)
    store.open(trainer())
    store.join_later(neuron(first=2), 3, trainer(), 0.1, {}, b"the message", QUEUE)
    store.flush()
    assert store.client.lrange(QUEUE, 0, -1) == [b"the message"]


def test_mini_batches_meet_at_a_barrier_of_the_epoch(store):
    following = Message("LaunchLambda", "next", "demo", 0)
    ends = [Message("TrainerLambda", "backward", "demo", 0, batch, 1) for batch in range(2)]
    told = [store.join(end, 2, following, 0.1, {f"cost/{end.batch}": b"1"}) for end in ends]
    assert told == [Joined(1, False), Joined(2, True)]
    found = fields(store, "{demo}:0")
    assert found["joined:mini-batches/backward/1"] == "2"
    assert {"cost/0", "cost/1", "finished:TrainerLambda/backward/1/0/1"} <= set(found)
    assert not store.client.exists("{demo/0}:0")  # each counts for itself when it finishes


def test_a_finish_stores_and_sends_once_and_in_order(store):
    for values, envelopes in (
        ({}, []),
        ({"a": b"1"}, []),
        ({}, [b"x"]),
        ({"a": b"1"}, [b"x", b"y"]),
    ):
        store.client.execute_command("FLUSHALL")
        for _ in range(2):
            store.finish(neuron(), 0.1, values, envelopes, QUEUE)
            store.flush()
            assert store.client.lrange(QUEUE, 0, -1) == envelopes
            assert store.client.hget("{demo/0}:0", "a") == values.get("a")


@pytest.mark.parametrize("size", [LARGE - 1, LARGE, LARGE + 1])
def test_values_of_any_size_are_stored_and_go_by_themselves(store, size):
    value = bytes(size)
    store.put(neuron(), {"a": value, "b": b"small"})
    store.join(neuron(first=1), 2, trainer(), 0.1, {"c": value})
    store.finish(neuron(first=2), 0.1, {"d": value})
    assert store.read("demo", 0, 0, ["a", "b", "c", "d"]) == [value, b"small", value, value]
    assert store.client.ttl("{demo/0}:0") > 0
    with pytest.raises(Incomplete, match="no e"):
        store.read("demo", 0, 0, ["a", "e"])


def test_a_bid_is_won_by_the_lowest_cost_and_of_equals_by_the_first(store):
    bid = lambda batch, cost, epoch=0: store.bid(neuron(epoch, batch), cost)
    assert [bid(2, 0.5), bid(3, 0.5), bid(3, 0.6), bid(1, 0.5), bid(2, 0.5)] == [
        True,
        False,
        False,
        True,
        False,
    ]
    assert bid(1, 0.5) and bid(4, 0.4) and not bid(1, 0.5)
    assert bid(5, 0.9, epoch=1)  # another epoch
    assert not bid(5, 0.1)  # which is over
    assert fields(store, "{demo}:1") == {"epoch": "1", "lowest": "0.9", "leader": "5"}


# The queue


def test_a_worker_takes_a_fair_share_and_no_more_than_so_many(store):
    queue = Queue(store, workers=4)
    for count, share in ((1, 1), (3, 1), (8, 2), (4 * 64, 64), (8 * 64, 64)):
        store.client.delete(QUEUE)
        store.client.rpush(QUEUE, *[encoded_envelope(neuron(first=n)) for n in range(count)])
        taken = queue.take("one", wait=0)
        assert len(taken) == share
        assert msgspec.json.decode(taken[0].event, type=Message).first == 0  # the oldest first
        assert store.client.llen(QUEUE) == count - share
        assert store.client.llen(taken_by("one")) == share  # what it had before is done
        assert KEEP - 60 < store.client.ttl(taken_by("one")) <= KEEP == 24 * 3600
    store.client.delete(QUEUE)
    assert queue.take("one", wait=0) == [] and not store.client.exists(taken_by("one"))


def test_what_is_meant_for_a_worker_comes_first_and_all_of_it(store):
    queue = Queue(store, workers=4)
    store.client.rpush(QUEUE, encoded_envelope(neuron(first=9)))
    mine = [encoded_envelope(neuron(first=n)) for n in range(MOST + 2)]
    store.client.rpush(meant_for("one"), *mine)
    assert len(queue.take("one", wait=0)) == MOST and len(queue.take("one", wait=0)) == 2
    assert len(queue.take("two", wait=0)) == 1


def test_what_a_dead_worker_had_goes_back_in_its_order(store):
    queue = Queue(store, workers=1)
    envelopes = [encoded_envelope(neuron(first=n)) for n in range(5)]
    store.client.rpush(QUEUE, *envelopes)
    queue.take("one", wait=0)
    store.client.rpush(meant_for("one"), b"meant for it")
    assert queue.recover("one") == 6 and queue.recover("one") == 0
    assert store.client.lrange(QUEUE, 0, -1) == [b"meant for it", *envelopes]
    assert not store.client.exists(taken_by("one"), meant_for("one"))


# Seats


@pytest.fixture
def residents(store):
    network = {"epochs": 9, "layers": 1, "neurons": {"layer1": 1}, "learning_rate": 1}
    rest = {"activations": {"layer1": "sigmoid"}, "batch_size": 8, "threshold": 0}
    named = ("no", "yes")
    plans = [
        Plan(
            name,
            from_dict({**network, **rest, "residents": n}),
            "",
            "",
            16,
            3,
            1,
            named,
            "",
            "",
        )
        for name, n in (("demo", 2), ("apart", 0), ("single", 1))
    ]
    runs = Runs(store)
    for plan in plans:
        runs.begin(plan)
    found = Residents(store, runs)
    found.plan = plans[0]
    return found


SEAT = Seat("demo", "NeuronLambda", 1)
NAME, HAND = "{demo}:seat:NeuronLambda/1", "{demo}:hand:NeuronLambda/1"


def test_a_seat_is_held_for_a_lease_which_taking_renews(residents, store):
    assert "demo" in residents and "single" in residents and "apart" not in residents
    residents.sit(SEAT, "Ada")
    assert store.client.get(NAME) == b"Ada" and 0 < store.client.ttl(NAME) <= LEASE == 30
    store.client.expire(NAME, 5)
    assert residents.take(SEAT, "Ada", wait=0) == []
    assert store.client.ttl(NAME) > 5
    assert residents.take(SEAT, "Bob", wait=0) is None
    assert SEAT not in residents.vacant(residents.plan)
    assert {SEAT: "Ada"}[Seat("demo", "NeuronLambda", 1)] == "Ada"  # one stands for the other
    residents.leave(SEAT, "Bob")
    assert store.client.get(NAME) == b"Ada"  # whose it is
    residents.leave(SEAT, "Ada")
    assert SEAT in residents.vacant(residents.plan)


@pytest.mark.parametrize("leaves", [True, False])
def test_what_somebody_had_in_hand_goes_back_in_its_order(residents, store, leaves):
    residents.sit(SEAT, "Ada")
    residents.send([neuron(first=n) for n in range(4)])
    where, hand = queue_key("demo", "NeuronLambda"), HAND
    assert KEEP - 60 < store.client.ttl(where) <= KEEP
    taken = residents.take(SEAT, "Ada", wait=60)  # does not wait where something is
    assert [msgspec.json.decode(one.event, type=Message).first for one in taken] == [0, 1]
    assert store.client.llen(hand) == 2 and KEEP - 60 < store.client.ttl(hand) <= KEEP
    residents.sit(SEAT, "Ada")  # once more, and alive
    assert store.client.llen(hand) == 2
    if leaves:
        residents.leave(SEAT, "Ada")
    else:
        store.client.delete(NAME)  # its lease is over
        residents.sit(SEAT, "Bob")
    waiting = store.client.lrange(where, 0, -1)
    assert waiting == [encoded_envelope(neuron(first=n)) for n in range(4)]
    assert not store.client.exists(hand)


# Runs


def test_what_a_server_knows_of_a_run_goes_after_a_week(store, residents):
    runs, plan = residents.runs, residents.plan
    assert Status() == Status(
        "running", -1, None, "", "", 0.0, None, None, -1, 0.0, 0.0, 0.0, "", False, 0.0
    )
    assert runs.status("demo") == Status()
    runs.update("demo", Status(epoch=0, cost=0.5))
    runs.update("demo", Status(epoch=1))  # of an epoch that has no cost
    runs.count("demo", "mended")
    runs.refuse("etag", "no such file")
    runs.miss("a mail of demo", "no topic")
    store.flush()
    assert runs.costs("demo") == [0.5] and runs.counted("demo", "mended") == 1
    assert runs.counted("demo", "lost") == 0 and Count() == (0,) * 8
    for key in ("{demo}:run", "{demo}:costs", "snn:refused", "snn:missed"):
        assert WEEK - 60 < store.client.ttl(key) <= WEEK, key
    assert runs.names() == ["demo", "apart", "single"]
    runs.begin(plan)  # told twice
    assert runs.names() == ["demo", "apart", "single"] and runs.newest("demo") == "demo"
    assert runs.is_first("this", 3600) and not runs.is_first("this", 3600)
    assert 3_540_000 < store.client.pttl("snn:first:this") <= 3_600_000
    assert runs.note_progress("demo", 7) == 0.0 and 0 <= runs.note_progress("demo", 7) < 60
    assert runs.note_progress("demo", 8) == 0.0
    runs.stop(plan, "stopped", "its owner said so")
    statuses = {store.open(neuron(batch=batch)).status for batch in range(2)}
    assert statuses == {"stopped"} and not store.bid(neuron(batch=1), 0.1)
    assert runs.status("demo").epoch == 1 and runs.status("demo").reason == "its owner said so"


# Namespaces


@pytest.mark.parametrize(
    "command, keys",
    [
        (("GET", "a"), ["a"]),
        (("HSET", "a", "b", "c"), ["a"]),
        (("DEL", "a", "b", "c"), ["a", "b", "c"]),
        (("exists", "a", "b"), ["a", "b"]),
        (("LMOVE", "a", "b", "LEFT", "RIGHT"), ["a", "b"]),
        (("BLMOVE", "a", "b", "LEFT", "RIGHT", 1), ["a", "b"]),
        (("EVALSHA", "sha", 2, "a", "b", "c"), ["a", "b"]),
        (("EVAL", "text", 0, "a"), []),
        (("PING",), []),
        (("SCRIPT LOAD", "text"), []),
        (("CONFIG GET", "a"), []),
    ],
)
def test_a_namespace_goes_before_each_key_and_nothing_else(command, keys):
    assert list(command[keys_in(command)]) == keys
    named = in_namespace("mine:", command)
    changed = [after for before, after in zip(command, named, strict=True) if before != after]
    assert changed == [f"mine:{key}" for key in keys]
    assert in_namespace("mine:", ("GET", b"a")) == ("GET", b"mine:a")


@pytest.mark.parametrize("size", [3, LARGE, LARGE + 1])
def test_a_command_is_written_the_same_whatever_its_size(size):
    written = b"".join(Packer().pack("HSET", "a", "b", bytes(size)))
    assert written == b"*4\r\n$4\r\nHSET\r\n$1\r\na\r\n$1\r\nb\r\n$%d\r\n%s\r\n" % (
        size,
        bytes(size),
    )
    assert b"$6\r\nmine:a\r\n" in b"".join(Packer("mine:").pack("HSET", "a", "b", bytes(size)))


# The connection


class Clock:
    "A clock that moves when somebody sleeps."

    def __init__(self):
        self.now, self.slept = 1000.0, []

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds


def refusing(times: float):
    "Refuses so many times, and then answers."
    left = iter(range(int(times)) if times < 1e6 else iter(int, 1))

    def ask():
        if next(left, None) is not None:
            raise redis.exceptions.OutOfMemoryError("it is full")
        return b"OK"

    return ask


@pytest.fixture
def clock(monkeypatch):
    made = Clock()
    monkeypatch.setattr(store_module, "time", made)
    return made


@pytest.mark.parametrize("times, warned", [(0, 0), (3, 0), (5, 0), (6, 0), (7, 2), (30, 2)])
def test_a_server_that_refuses_is_asked_again_and_a_person_hears_of_it_once(
    clock, caplog, times, warned
):
    assert patiently(refusing(times)) == b"OK"
    pauses = [0.02, 0.04, 0.08, 0.16, 0.32, *[0.5] * 30]
    assert clock.slept == pytest.approx(pauses[:times])
    assert len(caplog.records) == warned  # after more than a second, and when it is over
    if warned:
        refuses, answers = (record.getMessage() for record in caplog.records)
        assert refuses.endswith("it says: OOM it is full") and "answers again" in answers


def test_a_server_that_refuses_for_a_minute_ends_the_run(clock):
    with pytest.raises(Refusing, match="has refused for 60 s; it says: OOM it is full"):
        patiently(refusing(float("inf")))
    assert 60 < clock.now - 1000 <= 60.5


def test_what_is_no_refusal_is_raised_at_once(clock):
    def ask():
        raise redis.ResponseError("wrong number of arguments")

    with pytest.raises(redis.ResponseError, match="wrong number"):
        patiently(ask)
    assert clock.slept == []


@pytest.mark.parametrize(
    "url, words",
    [
        ("redis://here:6379", "redis://here:6379"),
        ("rediss://user:pa/ss#@here:6379/0?x=1#y", "rediss://here:6379/0"),
        ("unix:///tmp/socket", "unix:///tmp/socket"),
        ("redis://user:password@", "its address"),
        ("nonsense", "its address"),
    ],
)
def test_an_address_is_shown_without_its_password(url, words):
    assert shown(url) == words


@pytest.mark.parametrize(
    "given, of_the_environment, used",
    [(None, None, None), ("a", None, "a"), (None, "b", "b"), ("a", "b", "a")],
)
def test_a_password_that_is_given_goes_before_the_environments(
    monkeypatch, given, of_the_environment, used
):
    monkeypatch.delenv("SNN_REDIS_PASSWORD", raising=False)
    monkeypatch.setenv("SNN_REDIS_USER", "Ada")
    if of_the_environment:
        monkeypatch.setenv("SNN_REDIS_PASSWORD", of_the_environment)
    asked = connect("redis://here:6379", given).connection_pool.connection_kwargs
    assert (asked["username"], asked.get("password"), asked["protocol"]) == ("Ada", used, 3)
    with pytest.raises(InputError, match="must be redis://HOST:PORT"):
        connect("http://here")


def test_commands_wait_for_the_next_that_needs_an_answer(store):
    store.later("SET", "a", 1)
    store.later("SET", "b", 2)
    assert store.client.get("a") is None
    assert store.now("GET", "b") == b"2" and store.waiting == []
    assert store.ask(("GET", "a"), ("GET", "b"), ("GET", "c")) == [b"1", b"2", None]
    with pytest.raises(redis.ResponseError):
        store.ask(("SET", "a", 3), ("INCR", "a", "b", "c"))
    assert store.now("GET", "a") == b"1"  # none of them was done
    store.flush()
    store.later("SET", "a", 4)
    store.flush()
    assert store.client.get("a") == b"4"
    store.client.script_flush()  # as a server that was started again
    assert store.open(neuron()).status == "open"
    store.connection.disconnect()
    assert store.now("GET", "a") == b"4"


def test_arrays_are_laid_out_for_a_processor():
    for shapes in (((1,),), ((3, 4), (3, 1)), ((2, 2),) * 9, ((), (0, 5))):
        arrays = [np.arange(float(np.prod(shape))).reshape(shape) for shape in shapes]
        value = encode(*arrays)
        head = value.index(b"\n") + 1
        assert head % 64 == 0 and len(value) == head + sum(array.nbytes for array in arrays)
        for before, after in zip(arrays, decode(value), strict=True):
            assert after.shape == before.shape and (after == before).all()
    assert len({tag("demo"), tag("demo", 0), tag("demo", MASTER), tag("demo", BEST)}) == 4


# How a message leaves


class Recorder:
    "Stands in for Lambda, and keeps what it was asked."

    def __init__(self):
        self.asked = []

    def invoke(self, FunctionName, InvocationType, Payload):
        self.asked.append((FunctionName, InvocationType, msgspec.json.decode(Payload)))


@pytest.fixture
def lambda_bus(store, residents):
    names = {
        name: f"cats-{name}" for name in ("LaunchLambda", "TrainerLambda", "NeuronLambda")
    }
    return LambdaBus(Recorder(), names, store, residents)


@pytest.mark.parametrize("count", [0, 1, 2, 20])
def test_lambda_is_asked_once_for_each_message(lambda_bus, count, store):
    messages = [neuron(first=n) for n in range(count)]
    apart = [msgspec.structs.replace(message, run="apart") for message in messages]
    store.later("SET", "a", 1)
    lambda_bus.send(apart)
    asked = sorted(event.get("first", 0) for _, _, event in lambda_bus.client.asked)
    assert asked == list(range(count))
    assert {call[:2] for call in lambda_bus.client.asked} <= {("cats-NeuronLambda", "Event")}
    assert bool(store.client.get("a")) == bool(count)  # what waits goes first
    lambda_bus.send(messages)  # of a run whose functions stay
    assert len(lambda_bus.client.asked) == count
    assert store.client.llen(queue_key("demo", "NeuronLambda")) == count


def test_functions_are_called_to_the_seats_that_are_vacant(lambda_bus, residents):
    lambda_bus.ready(msgspec.structs.replace(residents.plan, run="apart"))
    assert lambda_bus.client.asked == []
    residents.sit(SEAT, "Ada")
    lambda_bus.ready(residents.plan)
    called = sorted(
        (event["function"], event["number"]) for _, _, event in lambda_bus.client.asked
    )
    everybody = [("LaunchLambda", 0), ("NeuronLambda", 0), ("NeuronLambda", 1)]
    everybody += [("TrainerLambda", 0), ("TrainerLambda", 1)]
    assert called == [one for one in everybody if one != ("NeuronLambda", 1)]


def test_what_waits_leaves_before_lambda_may_freeze_the_process(lambda_bus, store):
    with lambda_bus.staying():
        store.later("SET", "a", 1)
        lambda_bus.settle()
        assert store.waiting and not store.client.exists("a")
    lambda_bus.settle()
    assert store.client.get("a") == b"1" and not store.waiting
    with pytest.raises(KeyError), lambda_bus.staying():
        raise KeyError
    store.later("SET", "a", 2)
    lambda_bus.settle()
    assert store.client.get("a") == b"2"


def test_a_barrier_sends_what_follows_when_it_is_complete(lambda_bus):
    following = msgspec.structs.replace(trainer(), run="apart")
    ends = [msgspec.structs.replace(neuron(first=n), run="apart") for n in range(2)]
    for number, end in enumerate(ends):
        lambda_bus.join(end, 2, following, 0.1, {"a": b"1"})
        assert len(lambda_bus.client.asked) == number
    lambda_bus.finish(following, ends, 0.1, {"A": b"1"})
    assert len(lambda_bus.client.asked) == 3
    assert lambda_bus.store.read("apart", 0, 0, ["a", "A"]) == [b"1", b"1"]


def fan_out(queue, epoch, seconds, batch=0, members=5):
    "A trainer asks a layer, all of whose neurons join from here; returns what the trainer left where."
    queue.take("one", wait=0)
    layer = [neuron(epoch, batch, first) for first in range(members)]
    queue.finish(trainer(epoch, batch), layer, 0.1)
    queue.store.flush()
    lists = (taken_by("one"), meant_for("one"), QUEUE)
    found = [queue.client.llen(name) for name in lists]
    while queue.take("one", wait=0):
        pass
    for one in layer:
        queue.join(one, members, trainer(epoch, batch), seconds)
    queue.take("one", wait=0)
    return found


def test_a_layer_is_kept_if_it_takes_no_time_and_else_shared_with_who_is_idle(store):
    queue = Queue(store, workers=2)
    assert fan_out(queue, 0, WORTH) == [0, 5, 0]  # nobody knows how long it takes
    assert fan_out(queue, 1, WORTH / 10) == [0, 5, 0]  # too long to be kept in hand
    assert fan_out(queue, 2, WORTH) == [5, 0, 0]  # half a millisecond
    assert Queue(Store(store.client)).take("two", wait=0.001) == []
    assert store.client.hkeys(IDLE) == [b"two"]
    assert fan_out(queue, 3, WORTH / 10) == [0, 0, 5]
    assert queue.recover("two") == 0 and not store.client.exists(IDLE)
    assert fan_out(queue, 4, WORTH) == [5, 0, 0]
    queue.take("one", wait=0)
    first = Message("LaunchLambda", "next", "demo", 4)
    queue.finish(first, [trainer(5, batch) for batch in range(3)], 0.1)
    queue.store.flush()
    assert queue.client.llen(QUEUE) == 3  # an epoch's mini-batches are for all


@pytest.mark.parametrize("kept", [False, True])  # in hand, the first time
def test_a_trainer_that_comes_twice_asks_its_layer_once(store, kept):
    queue = Queue(store, workers=2)
    fan_out(queue, 0, WORTH / 100 if kept else WORTH)
    assert fan_out(queue, 1, WORTH / 100) == ([5, 0, 0] if kept else [0, 5, 0])
    queue.finish(trainer(1), [neuron(1, 0, first) for first in range(5)], 0.1)
    queue.store.flush()
    assert queue.take("one", wait=0) == []


def test_who_wakes_is_not_idle(store):
    queue = Queue(store)
    assert queue.take("one", wait=0.001) == []
    store.flush()
    assert not store.client.exists(IDLE)


def test_what_others_wait_for_leaves_before_a_worker_goes_on(store):
    queue = Queue(store, workers=2)
    queue.take("one", wait=0)
    queue.join(neuron(first=1), 5, trainer(), 0.1)  # four are elsewhere
    queue.send([neuron(batch=1)])
    joined = lambda: store.client.hget("{demo/0}:0", "joined:NeuronLambda/forward/2")
    assert joined() is None and len(queue.take("one", wait=0)) == 1 and joined() == b"1"


def test_neurons_of_a_layer_join_with_one_command_and_are_counted_one_by_one(store):
    queue = Queue(store)
    for first in (0, 1, 1, 2):
        store.open_later(neuron(first=first))
        large = {f"w2/{first}": bytes(LARGE + 1)} if first else {}
        due = b"trainer", meant_for("one")
        store.join_later(
            neuron(first=first),
            3,
            trainer(),
            0.5,
            large | {f"a2/{first}": b"%d" % first},
            *due,
        )
    assert [one[0] for one in store.waiting].count("EVALSHA") == 1
    store.join_later(neuron(batch=1), 3, trainer(batch=1), 0.5, {}, *due)
    assert [one[0] for one in store.waiting].count("EVALSHA") == 2
    assert queue.client.llen(meant_for("one")) == 0
    store.flush()
    assert queue.client.lrange(meant_for("one"), 0, -1) == [b"trainer"]
    found = store.client.hgetall("{demo/0}:0")
    assert found[b"joined:NeuronLambda/forward/2"] == b"3" and found[b"a2/2"] == b"2"
    assert found[b"attempts:NeuronLambda/forward/2/1"] == b"2"
    assert len(found[b"w2/2"]) == LARGE + 1
    counted = store.client.hgetall("{demo/0}")
    expected = {"attempts": 4, "finished": 3, "duplicates": 1, "microseconds": 1_500_000}
    for name, count in expected.items():
        assert int(counted[f"NeuronLambda:{name}".encode()]) == count, name


def test_one_message_stays_with_the_worker_that_made_it_due(store):
    queue = Queue(store)
    ids = lambda envelopes: [
        msgspec.json.decode(one.event, type=Message).first for one in envelopes
    ]
    queue.send([neuron(first=1)])  # nobody takes here: a launch, say
    assert ids(queue.take("one", wait=0)) == [1] and queue.workers == 1
    queue.send([neuron(first=2)])
    queue.join(neuron(first=3), 1, neuron(first=4), 0.1)
    queue.finish(neuron(first=5), [neuron(first=6)], 0.1)
    assert ids(queue.take("one", wait=0)) == [2, 4, 6]
    store.flush()
    assert store.client.llen(taken_by("one")) == 4 and store.client.llen(QUEUE) == 0
    queue.send([neuron(first=7), neuron(first=8)])
    queue.join(neuron(first=9), 3, neuron(first=10), 0.1)
    queue.join(neuron(first=11), 3, neuron(first=10), 0.1)
    queue.send([])
    store.flush()
    assert store.client.llen(QUEUE) == 2 and store.client.llen(meant_for("one")) == 1
    assert ids(queue.take("one", wait=0)) == [10] and ids(queue.take("two", wait=0)) == [7, 8]
    queue.put(Envelope("NeuronLambda", msgspec.Raw(b"{}"), attempt=2))
    assert queue.take("two", wait=5)[0].attempt == 2
    assert (
        queue.take("two", wait=0.01) == [] and Envelope("a", msgspec.Raw(b"{}")).attempt == 1
    )


@pytest.mark.parametrize("who", ["worker", "seat"])
def test_who_waits_gets_the_first_message_that_comes(store, residents, server, until, who):
    queue, other = Queue(store), connect(server.url)
    where = QUEUE if who == "worker" else queue_key("demo", "NeuronLambda")
    residents.sit(SEAT, "Ada")
    take = {
        "worker": lambda seconds: queue.take("one", wait=seconds),
        "seat": lambda seconds: residents.take(SEAT, "Ada", wait=seconds),
    }[who]
    assert take(0.01) == []
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(take, 60)
        until(lambda: other.info("clients")["blocked_clients"] == 1, "somebody waits")
        other.rpush(where, *(encoded_envelope(neuron(first=n)) for n in range(2)))
        (taken,) = waiting.result()
    assert msgspec.json.decode(taken.event, type=Message).first == 0
    assert (
        other.llen(where) == 1
        and other.llen(taken_by("one") if who == "worker" else HAND) == 1
    )


def test_what_is_put_aside_is_kept_with_its_reason(store):
    queue = Queue(store)
    store.client.rpush(QUEUE, b"no message")
    assert queue.take("one", wait=0) == []
    queue.put_aside(msgspec.Raw(b'{"run":"demo"}'), "it failed", "NeuronLambda")
    store.flush()
    first, second = queue.dead()
    assert (first["event"], first["function"]) == ("no message", "")
    assert first["reason"].startswith("no message of ours")
    assert second == {
        "function": "NeuronLambda",
        "event": {"run": "demo"},
        "reason": "it failed",
    }
