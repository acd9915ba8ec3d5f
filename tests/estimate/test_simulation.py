"""The simulated run plays what the real handlers were recorded to do, and behaves as waits and limits demand."""

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from snn.cloud.messages import epoch_messages
from snn.cloud.meter import bill
from snn.cloud.prices import load, with_quota
from snn.estimate.designs import (
    ORIGINAL_EPOCH,
    default_plan,
    designs,
    original,
    with_residents,
)
from snn.estimate.estimate import paid_for, run_seconds
from snn.estimate.figures import assumptions, priced, swings, tornado
from snn.estimate.simulation import Clock, Luck, Pools, aws, on_aws, simulate
from snn.estimate.trace import recorded
from snn.estimate.work import epoch_work
from snn.handlers.protocol import stages, step_of

GRANULARITIES = ("neuron", "layer", "network")


@pytest.fixture(scope="module")
def book():
    return load()


@settings(max_examples=10, deadline=None)
@given(
    st.sampled_from(GRANULARITIES),
    st.sampled_from(("best", "mean")),
    st.lists(st.integers(1, 9), max_size=3),
    st.integers(1, 300),
    st.integers(0, 9),
)
def test_a_simulated_epoch_has_as_many_invocations_as_are_counted(
    granularity, aggregation, hidden, images, residents
):
    plan = default_plan(
        granularity, images, (*hidden, 1), 8, aggregation=aggregation, residents=residents
    )
    outcome, counted = simulate(plan, on_aws(plan, load()), 3), epoch_work(plan).invocations
    assert {name: count for name, count in outcome.invocations.items() if count} == {
        name: 3 * count for name, count in counted.items()
    }


def test_the_same_seed_gives_the_same_run(book):
    plan = default_plan("layer")
    assert (
        simulate(plan, aws(book), 3, seed=1)
        == simulate(plan, aws(book), 3, seed=1)
        != simulate(plan, aws(book), 3, seed=2)
    )


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_longer_waits_make_longer_epochs(granularity, book):
    plan = default_plan(granularity)
    low, usual, high = (
        simulate(plan, aws(book, end), 3).per_epoch for end in ("low", "value", "high")
    )
    assert low < usual < high


def test_no_epoch_is_faster_than_its_chain_of_messages(book):
    environment = aws(book, jitter=0.0, straggler=0.0)
    hop = book.latencies["invoke"].value + book.latencies["deliver"].value
    for granularity, hops in (("neuron", 4 * 4 + 2), ("layer", 4 * 4 + 2), ("network", 2)):
        assert simulate(default_plan(granularity), environment, 3).per_epoch > hops * hop


def test_no_more_functions_run_than_may(book):
    environment = msgspec.structs.replace(aws(book), concurrency=7)
    outcome, free = (
        simulate(default_plan(), environment, 2),
        simulate(default_plan(), aws(book), 2),
    )
    assert outcome.peak <= 7 < free.peak and outcome.per_epoch > free.per_epoch


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_a_higher_quota_is_never_slower_nor_dearer(granularity, book):
    "A message has the same luck whatever the quota is, so the quota alone makes the difference."
    plan, epochs = default_plan(granularity), {"neuron": 30}.get(granularity, 60)
    found = [
        simulate(plan, on_aws(plan, with_quota(book, quota)), epochs)
        for quota in (10, 50, 1000)
    ]
    dollars = lambda outcome: sum(bill(paid_for(plan, outcome, 2957, book), book).values())
    slow, middle, fast = (run_seconds(outcome, 2957) for outcome in found)
    assert slow >= middle >= fast
    dear, medium, cheap = map(dollars, found)
    assert dear >= medium >= 0.995 * cheap  # fewer environments fetch a few weights less
    assert found[2].throttles == 0
    if granularity == "neuron":
        assert found[0].throttles > found[1].throttles > 0


def test_what_a_low_quota_costs_is_what_the_changelog_says(book, root):
    plan = default_plan("neuron")
    few, many = (
        run_seconds(simulate(plan, on_aws(plan, with_quota(book, count)), 12), 2957)
        for count in (10, 1000)
    )
    assert round(few / many) == 4
    said = (root / "CHANGELOG.md").read_text()
    assert (
        "quota of 10, a run at granularity neuron takes about four times as long"
        in " ".join(said.split())
    )


def test_an_event_that_finds_no_place_comes_again_later_and_later(book):
    "An event waits for another, which takes long: at 1, 3, 7 ... seconds it asks again."
    pools, waits = Pools(Clock(msgspec.structs.replace(aws(book), concurrency=1))), []
    pools.running, events = 1, pools.clock.events

    def ask():
        yield from pools.come_again("NeuronLambda")
        waits.append(events.now)

    def free():
        yield events.timeout(700)
        pools.running = 0

    events.process(ask())
    events.process(free())
    events.run()
    assert waits == [1 + 2 + 4 + 8 + 16 + 32 + 64 + 128 + 256 + 300] and pools.throttles == 10


def test_a_failure_costs_its_retry(book):
    plan = default_plan("network")
    assert simulate(plan, aws(book, failure=1.0), 2).per_epoch > 2 * 60


def test_functions_that_stay_are_faster_by_far(book):
    found = designs(book, 600)
    for granularity in GRANULARITIES:
        assert found[f"{granularity}, resident"].per_epoch < found[granularity].per_epoch / 2


def test_the_aims_are_reached_by_functions_that_stay(book):
    found = {design.name: design for design in priced(designs(book, 1500), book)}
    assert (
        found["neuron, resident"].seconds < 30 * 60 and found["neuron, resident"].dollars < 1
    )
    assert (
        found["network, resident"].seconds < 5 * 60
        and found["network, resident"].dollars < 0.1
    )
    for granularity in GRANULARITIES:
        assert found[f"{granularity}, resident"].dollars < found[granularity].dollars


def test_no_more_functions_stay_than_have_something_to_do(book):
    crowd, enough = (
        simulate(plan, on_aws(plan, book), 2)
        for plan in (with_residents(default_plan("network"), n) for n in (1000, 4))
    )
    assert crowd == enough and sum(crowd.starts.values()) == 5


def test_the_original_is_simulated_within_what_is_not_known_of_it(book):
    low, high = (
        simulate(default_plan(), original(book, end), 2).per_epoch for end in ("low", "high")
    )
    assert low < ORIGINAL_EPOCH < high
    assert (
        simulate(default_plan(), original(book), 2).per_epoch
        > 4 * simulate(default_plan(), aws(book), 2).per_epoch
    )


def test_every_assumption_is_listed_with_its_source(book):
    listed = {entry["name"]: entry for entry in assumptions(book)}
    assert set(aws(book).times) == set(listed)
    assert all(
        entry["source"] and entry["date"] and entry["unit"] for entry in listed.values()
    )


def test_the_tornado_moves_every_assumption_that_has_a_range(book):
    found = swings(default_plan("network"), book, 100)
    assert {swing.name for swing in found} == {
        name for name, number in book.latencies.items() if number.low != number.high
    }
    widths = [abs(swing.high - swing.low) for swing in found]
    assert widths == sorted(widths, reverse=True) and widths[0] > 0
    names = [
        tick.get_text() for tick in tornado(found, 1.0, most=99).axes[0].get_yticklabels()
    ]
    assert len(names) == len(found)
    assert not [name for name in names if "_" in name], "words, and no names of keys"


def test_a_messages_luck_is_its_own():
    "It hangs on the seed, the message and what is waited for: nothing else that is drawn changes it."
    draw = lambda seed=0, name="run/3/1/step", what="invoke": Luck(seed, name).draw(what)
    first = draw()
    assert draw() == first
    assert len({first, draw(1), draw(name="run/3/2/step"), draw(what="deliver")}) == 4


@pytest.mark.parametrize("transport", ["invoke", "resident", "queue"])
def test_what_is_recorded_is_what_the_table_says(transport):
    "Each step reads the arrays of its row, and leaves what the steps after it read."
    plan = default_plan("neuron", 20, (3, 2, 1), 4, batch_size=8)
    recording, left = recorded(plan, transport), set()
    for start in epoch_messages(plan, 1, "0/0"):
        for stage in stages(plan, start):
            trace, row = recording.trace(stage[0]), step_of(stage[0])
            read = {name for exchange in trace.exchanges for name in exchange.arrays}
            assert read == set(row.reads(plan, stage[0]))
            first = {f"{name.split('/')[0]}/0" if "/" in name else name for name in read}
            assert first <= left
            left |= set(trace.left)
