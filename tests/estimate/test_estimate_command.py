"""`snn estimate`: what it prints, and what it refuses."""

import json
import socket

import msgspec
import pytest

from snn.data import h5 as data


@pytest.fixture
def file(parameters, tmp_path):
    path = tmp_path / "parameters.json"
    path.write_bytes(msgspec.json.encode(parameters((4, 3, 1), epochs=50)))
    return path


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    "Whoever connects to anything fails."

    def refuse(*arguments):
        raise AssertionError("snn estimate needs no network")

    monkeypatch.setattr(socket.socket, "connect", refuse)


def test_it_says_what_to_expect_at_each_granularity(snn, file):
    code, said, _ = snn("estimate", "--parameters", file)
    assert code == 0
    for word in (
        "neuron",
        "layer",
        "network",
        "invocations",
        "messages",
        "ledger writes",
        "bytes stored",
        "Valkey",
        "DynamoDB",
        "Endpoints",
        "CloudWatch",
        "in all",
        "nearest quota",
        "209 images of 64x64 pixels in 4 mini-batches, 4-3-1 neurons",
        "Cheapest",
    ):
        assert word in said


def test_json_says_all_numbers(snn, file, small_data):
    code, said, _ = snn(
        "estimate", "--parameters", file, "--data", small_data, "--json", "--epochs", 20
    )
    found = json.loads(said)
    assert code == 0 and (found["images"], found["size"], found["batches"]) == (167, 8, 3)
    for granularity, e in found["estimates"].items():
        assert e["epochs"] == 20 and sum(e["bill"].values()) == pytest.approx(
            e["dollars"]["value"]
        )
        assert sum(e["work"]["invocations"].values()) == 1 + 20 * sum(
            e["per_epoch"]["invocations"].values()
        )
        assert e["seconds"]["low"] <= e["seconds"]["value"] <= e["seconds"]["high"]
    assert found["cheapest"] in found["estimates"] and found["fastest"] in found["estimates"]
    assert (
        min(found["estimates"], key=lambda g: found["estimates"][g]["dollars"]["value"])
        == found["cheapest"]
    )


def test_ones_own_prices_change_the_bill(snn, file, tmp_path):
    mine = tmp_path / "mine.json"
    mine.write_text('{"prices": {"us-east-1": {"dynamodb_write": 0}}}')
    bills = [
        json.loads(
            snn("estimate", "--parameters", file, "--granularity", "network", "--json", *more)[
                1
            ]
        )["estimates"]["network"]["bill"]
        for more in ([], ["--prices", mine])
    ]
    assert bills[0].pop("DynamoDB") > 0 == bills[1].pop("DynamoDB") and bills[0] == bills[1]


def test_a_bare_image_file_is_enough(snn, file, small_datasets, tmp_path):
    path = tmp_path / "datasets.h5"
    data.write(small_datasets(train=20, test=4), path)
    code, said, _ = snn(
        "estimate", "--parameters", file, "--data", path, "--granularity", "network"
    )
    assert code == 0 and "20 images of 8x8 pixels in 1 mini-batches" in said


def test_other_services_are_shown_with_prices_and_why_not(snn, file):
    code, said, _ = snn("estimate", "--parameters", file, "--designs", "--epochs", 2957)
    words = " ".join(said.split())
    assert code == 0
    for name in ("durable functions", "Step Functions", "Managed Instances", "SnapStart"):
        assert name in said
    assert "durable_operation: 8e-06 USD per durable operation (2026-09" in words
    assert "not confirmed)" in words
    found = json.loads(
        snn("estimate", "--parameters", file, "--designs", "--epochs", 2957, "--json")[1]
    )
    steps, (durable, *_) = found["ours"]["steps"], found["others"]
    assert durable["run"] == pytest.approx(2957 * steps * 8 / 1e6)
    assert set(durable["numbers"]) <= set(found["numbers"])


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (["--designs", "--deadline", "1m"], "leave out --deadline and --budget"),
        (
            ["--granularity", "cell"],
            "--granularity is cell; it may be neuron, layer or network",
        ),
        (["--region", "mars-north-1"], "there are no prices for mars-north-1"),
        (["--prices", "nowhere.json"], "nowhere.json: no such file"),
        (["--data", "nowhere.h5"], "nowhere.h5: no such file"),
        (["--data", __file__], "not an HDF5 file with train_set_x"),
        (["--parameters", "nowhere.json"], "nowhere.json: no such file"),
    ],
)
def test_bad_input_is_refused_in_a_sentence(arguments, sentence, snn, file):
    code, said, error = snn(
        "estimate",
        *(["--parameters", file] if "--parameters" not in arguments else []),
        *arguments,
    )
    assert (
        code == 2
        and not said
        and sentence in " ".join(error.split())
        and "Traceback" not in error
    )


def test_without_simpy_it_says_what_brings_it(snn, file, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "simpy", None)
    code, _, error = snn("estimate", "--parameters", file)
    assert code == 2 and "pip install 'snn[estimate]' brings it" in error


def test_the_accounts_quota_makes_the_estimate_of_that_account(snn, root):
    "As many functions at once as a new account may run, and as many as others."

    def seconds(*words):
        place = ("--parameters", root / "parameters-2018.json", "--granularity", "neuron")
        code, said, _ = snn("estimate", *place, "--json", *words)
        assert code == 0
        return json.loads(said)["estimates"]["neuron"]["seconds"]["value"]

    assert seconds("--quota", "10") > 2 * seconds()
