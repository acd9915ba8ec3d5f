"""What is chosen is what playing every candidate would choose."""

import json

import msgspec
import numpy as np
import pytest

from snn.cloud.prices import load
from snn.estimate.choice import CHEAPEST, FASTEST, Search, Taken, choose, play
from snn.estimate.designs import default_plan

MESSAGES = 1  # three epochs of each candidate: enough to tell them apart
MEMORIES = (512, 1769)


def network(seed: int):
    "A small network, and how many epochs it trains."
    draw = np.random.default_rng(seed).integers
    sizes = (*(int(draw(1, 4)) for _ in range(draw(0, 2))), 1)
    images = int(draw(8, 25))
    changes = dict(
        images=images, sizes=sizes, size=int(draw(2, 9)), batch_size=int(draw(8, 17))
    )
    aggregation = ("best", "mean")[draw(2)]
    return default_plan(**changes, aggregation=aggregation), int(draw(20, 3000))


@pytest.mark.parametrize("seed", range(50))
def test_the_search_finds_what_playing_all_candidates_finds(seed):
    plan, epochs = network(seed)
    search = Search(plan, load(), epochs, MEMORIES, MESSAGES)
    every = {c: play(plan, load(), c, epochs, MESSAGES) for c in search.candidates}
    assert all(
        least <= taken for c in every for least, taken in zip(search.least[c], every[c])
    ), "a bound is above what a run takes"
    seconds, dollars = (sorted(taken[k] for taken in every.values()) for k in (0, 1))
    draw = np.random.default_rng(seed)
    for deadline, budget in (
        (draw.choice(seconds), draw.choice(dollars)),
        (draw.choice(seconds), None),
        (None, draw.choice(dollars)),
        (seconds[0] / 2, dollars[-1]),
    ):
        limits = Taken(deadline or float("inf"), budget or float("inf"))
        kept = [c for c in every if every[c] <= limits and every[c].dollars <= limits.dollars]
        kept = [c for c in kept if every[c].seconds <= limits.seconds]
        aim = CHEAPEST if deadline else FASTEST
        best = min(kept, key=lambda c: (aim(every[c]), c), default=None)
        assert choose(search, deadline, budget).chosen == best


def test_not_all_candidates_need_to_be_played():
    search = Search(default_plan(), load(), 2957, messages=MESSAGES)
    choice = choose(search, deadline=600, budget=0.10)
    assert choice.chosen.granularity == "network"
    assert len(search.played) < len(search.candidates) / 3


@pytest.fixture
def ask(snn, tmp_path, parameters, small_data):
    file = tmp_path / "parameters.json"
    file.write_bytes(msgspec.json.encode(parameters((1,), epochs=50, batch_size=256)))
    base = ("estimate", "--parameters", file, "--data", small_data)
    return lambda *more: snn(*base, *more)


def test_it_says_what_to_take_and_why(ask):
    code, said, _ = ask("--deadline", "10m", "--budget", "0.10")
    words = " ".join(said.split())
    assert code == 0 and "It is the cheapest of at most 10 min and at most $0.100" in words
    assert "chosen" in said and "bin/deploy --set FunctionMemory=" in words
    found = json.loads(ask("--deadline", "10m", "--budget", "0.10", "--json")[1])
    table = [line.split() for line in said.splitlines()]
    (row,) = [line for line in table if line[-1:] == ["chosen"]]
    assert row[0] == found["chosen"]["granularity"]
    assert len(found["candidates"]) == sum(line[3:4] == ["MB"] for line in table)


def test_what_comes_nearest_is_said_where_nothing_keeps_to_the_limits(ask):
    code, said, _ = ask("--deadline", "1s", "--budget", "0.000001")
    assert code == 0 and "Nothing keeps to at most 1.0 s and at most $0.000001" in said


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (("--deadline", "soon"), "--deadline is soon; it may be a time span above 0, as 90s"),
        (("--budget", "0"), "--budget is 0; it may be US dollars above 0"),
        (("--budget", "nan"), "--budget is nan; it may be US dollars above 0"),
        (("--deadline", "1m", "--granularity", "layer"), "leave it out"),
    ],
)
def test_limits_that_are_none_are_refused(arguments, sentence, ask):
    code, said, error = ask(*arguments)
    assert code == 2 and not said and sentence in " ".join(error.split())
