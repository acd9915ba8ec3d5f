"""bin/smoke on this machine, twice in a row: every stage that a local AWS supports, and nothing is left."""

import json

import pytest

STAGES = [
    *("deploy", "doctor", "train neuron", "train neuron, 2 stay", "train layer"),
    *("train layer, 2 stay", "train network", "train network, 2 stay"),
    *("measure", "predict", "approve", "destroy"),
]


@pytest.mark.timeout(600)  # deploys and trains twice
def test_the_smoke_test_passes_twice_and_lists_what_it_did_not_try(run_snn, tmp_path):
    for _ in range(2):
        record = tmp_path / "smoke.json"
        code, said, errors = run_snn("smoke", "--local", "--record", record)
        assert code == 0, errors
        found = json.loads(record.read_text())["stages"]
        assert list(found) == STAGES
        assert all(found[name]["facts"]["epochs"] == 5 for name in STAGES if "train" in name)
        assert found["destroy"]["words"] == "nothing is left"
        assert "Not tried: approve: a local AWS has no CodePipeline" in said
        assert "Bill at list prices: 0.00" in said
        waits = found["measure"]["facts"]["latencies"]
        assert all(0 <= low <= value <= high for value, low, high in waits.values())
    code, said, errors = run_snn("estimate", "--measured", record)
    assert code == 0, errors
    assert all(name in said for name in (*waits, "handler", "init"))
    assert "say nothing about AWS" in said
