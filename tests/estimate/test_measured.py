"""What bin/smoke has measured takes the place of what was assumed, number by number, and is named."""

import json

import msgspec
import pytest

from snn.cloud.prices import load
from snn.estimate.designs import default_plan, with_residents
from snn.estimate.measured import as_record, changed

TRUTH = {"deliver": 0.12, "dynamodb": 0.009, "round_trip": 0.001}


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    "Of an AWS that is slower than we assume."
    slow = changed(
        load(), {name: [value] * 3 for name, value in TRUTH.items()}, "it", "2027-01"
    )
    small = dict(images=40, sizes=(3, 1), size=8, batch_size=20, epochs=3)
    plans = [default_plan(g, **small) for g in ("neuron", "network")]
    plans.append(with_residents(plans[0], 2))
    path = tmp_path_factory.mktemp("record") / "smoke.json"
    path.write_bytes(msgspec.json.encode(as_record(slow, plans, tuple(TRUTH))))
    return path


@pytest.fixture
def ask(snn, tmp_path, parameters):
    file = tmp_path / "parameters.json"
    file.write_bytes(msgspec.json.encode(parameters((4, 1), epochs=50)))
    base = ("estimate", "--parameters", file, "--granularity", "network")
    return lambda *more: snn(*base, *more)


def test_each_number_that_was_measured_is_named_and_counts(ask, record):
    code, said, _ = ask("--measured", record)
    assert code == 0
    for name, value in TRUTH.items():
        line = next(line for line in said.splitlines() if line.split()[:1] == [name])
        assert line.split()[1:3] == [f"{value:.3g}", f"{load().latencies[name].value:.3g}"]
    assert "neuron, 2 stay" in said and "says nothing about AWS" not in said
    plain, found = (json.loads(ask("--json", *m)[1]) for m in ((), ("--measured", record)))
    assert {"handler", "init", *TRUTH} == {one["name"] for one in found["measured"]}
    seconds = lambda one: one["estimates"]["network"]["seconds_per_epoch"]["value"]
    assert seconds(found) > seconds(plain) + 0.05 and plain["measured"] == []


def test_that_it_was_no_aws_is_said(ask, record, tmp_path):
    path = tmp_path / "local.json"
    path.write_text(json.dumps({**json.loads(record.read_bytes()), "local": True}))
    assert "say nothing about AWS" in ask("--measured", path)[1]


@pytest.mark.parametrize(
    "content, sentence",
    [
        (None, "no such file; bin/smoke leaves one"),
        ("[]", "is no record of bin/smoke"),
        ('{"stages": {}}', "nothing was measured yet"),
        ('{"stages": {"deploy": {"facts": {}, "ended": 1}}}', "nothing was measured yet"),
    ],
)
def test_a_file_that_is_no_record_is_refused_in_a_sentence(content, sentence, ask, tmp_path):
    path = tmp_path / "smoke.json"
    if content is not None:
        path.write_text(content)
    code, said, error = ask("--measured", path)
    assert code == 2 and not said and sentence in " ".join(error.split())
