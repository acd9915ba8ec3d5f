"""The price file, and the bill that follows from it."""

import json

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from snn.cloud.meter import FUNCTIONS, Usage, bill, cost_units
from snn.cloud.prices import OURS, load
from snn.errors import InputError
from snn.estimate.designs import default_plan
from snn.estimate.estimate import estimate


@pytest.fixture(scope="module")
def book():
    return load()


def test_every_number_has_a_source_and_a_date(book):
    for part in book[1:]:
        for name, number in part.items():
            assert number.date and (
                number.source.startswith("https://")
                or number.source.split(":")[0].startswith(("infra/", "nbs/"))
            ), name


def test_every_assumption_of_the_simulation_has_two_ends(book):
    for name, number in book.latencies.items():
        assert number.low is not None and number.high is not None, name


def test_sources_in_this_repository_exist(book, root):
    for part in book[1:]:
        for number in part.values():
            if not number.source.startswith("https://"):
                assert (root / number.source).is_file(), number.source


def test_the_setup_is_what_the_templates_deploy(book, root):
    class Loader(yaml.CSafeLoader):
        pass

    Loader.add_multi_constructor("!", lambda loader, suffix, node: None)
    functions = yaml.load((root / "infra/functions.yaml").read_text(), Loader)["Resources"]
    main = yaml.load((root / "infra/main.yaml").read_text(), Loader)["Parameters"]
    for name, memory in FUNCTIONS.items():
        properties = functions[name.replace("Lambda", "Function")]["Properties"]
        size = properties["MemorySize"] or main["FunctionMemory"]["Default"]
        assert size == book.setup[memory].value
    launch = functions["LaunchFunction"]["Properties"]["Environment"]["Variables"]
    assert "SNN_MEMORY" in launch  # where a run is metered
    for name, quota in (
        ("Neuron", "timeout"),
        ("Trainer", "timeout"),
        ("Launch", "launch_timeout"),
    ):
        assert (
            functions[f"{name}Function"]["Properties"]["Timeout"] == book.quotas[quota].value
        )
    network = yaml.load((root / "infra/network.yaml").read_text(), Loader)["Resources"]
    doors = [
        r
        for r in network.values()
        if r["Type"] == "AWS::EC2::VPCEndpoint"
        and r["Properties"]["VpcEndpointType"] == "Interface"
    ]
    assert (
        sum(len(door["Properties"]["SubnetIds"]) for door in doors)
        == book.setup["endpoints"].value
    )
    main = yaml.load((root / "infra/main.yaml").read_text(), Loader)
    assert (
        main["Parameters"]["CacheNodeType"]["Default"]
        == "cache.t4g.small"
        in book.prices["valkey_hour"].note
    )


def test_one_case_by_hand():
    raw = {
        name: number["value"]
        for name, number in json.loads(OURS.read_bytes())["prices"]["us-east-1"].items()
    }
    setup = {
        name: number["value"]
        for name, number in json.loads(OURS.read_bytes())["setup"].items()
    }
    usage = Usage(
        {"LaunchLambda": 3, "TrainerLambda": 50, "NeuronLambda": 1000},
        {"LaunchLambda": 1.5, "TrainerLambda": 2.0, "NeuronLambda": 20.0},
        {"LaunchLambda": 1, "TrainerLambda": 2, "NeuronLambda": 7},
        {"NeuronLambda": 2.8},
        messages=1052,
        writes=2110,
        puts=8,
        gets=12,
        mails=2,
        hours=0.25,
    )
    by_hand = {
        "Lambda, requests": 1053 * raw["lambda_request"],
        "Lambda, time": (1.5 * 1769 / 1024 + 2.0 + 20.0 + 2.8) * raw["lambda_gb_second"],
        "Valkey": 0.25 * raw["valkey_hour"],
        "DynamoDB": 2110 * raw["dynamodb_write"],
        "Endpoints": 0.25 * 3 * raw["endpoint_hour"]
        + 1052 * setup["message_bytes"] / 1e9 * raw["endpoint_gb"],
        "CloudWatch": 1053
        * (setup["record_bytes"] + setup["line_bytes"])
        / 1e9
        * raw["logs_gb"]
        + 0.25 * 12 * raw["metric_hour"],
        "S3": 8 * raw["s3_put"] + 12 * raw["s3_get"],
        "SNS": 2 * raw["mail"],
        "Secrets Manager": 10 * raw["secret_call"] + 0.25 * raw["secret_hour"],
    }
    assert bill(usage, load()) == pytest.approx(by_hand, rel=1e-12)
    assert by_hand["DynamoDB"] == pytest.approx(
        0.00131875
    )  # 2110 writes at 0.625 USD per million


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**7), st.floats(0, 1e6), st.integers(0, 10**6), st.floats(0, 100))
def test_nothing_is_free_and_nothing_costs_less_when_more_is_used(
    invocations, seconds, writes, hours
):
    usage = lambda k: Usage(
        {"NeuronLambda": k * invocations},
        {"NeuronLambda": k * seconds},
        messages=k * invocations,
        writes=k * writes,
        hours=k * hours,
    )
    once, twice = (bill(usage(k), load()) for k in (1, 2))
    assert all(
        twice[name] == pytest.approx(2 * once[name]) and once[name] >= 0 for name in once
    )


def test_the_parts_of_an_estimate_sum_to_its_total(book):
    for granularity in ("neuron", "layer", "network"):
        found = estimate(default_plan(granularity, sizes=(3, 1)), book, 100, draws=2)
        assert sum(found.bill.values()) == pytest.approx(found.dollars.value, rel=1e-12)


def test_an_entry_in_the_costs_table_is_paid_by_the_kilobyte():
    assert (cost_units(1), cost_units(30), cost_units(31), cost_units(100)) == (1, 1, 2, 4)


@pytest.mark.parametrize(
    "text, sentence",
    [
        (
            '{"prices": {"us-east-1": {"lambda_requests": 1}}}',
            "prices.us-east-1.lambda_requests is not known; did you mean lambda_request?",
        ),
        ('{"pricess": {}}', "pricess is not known; did you mean prices?"),
        (
            '{"prices": {"eu-west-1": {"lambda_request": 1}}}',
            "prices.eu-west-1 is new and must have all prices; it has no lambda_gb_second",
        ),
        (
            '{"latencies": {"deliver": "slow"}}',
            'latencies.deliver holds "slow"; it may hold a number',
        ),
        ('{"latencies": {"deliver": {"value": "slow"}}}', "Expected `float`, got `str`"),
        ('{"latencies": 3}', "latencies must hold an object"),
        ("[]", "must hold an object"),
        ("{", "not valid JSON"),
    ],
)
def test_a_wrong_price_file_is_refused_in_a_sentence(text, sentence, tmp_path):
    path = tmp_path / "mine.json"
    path.write_text(text)
    with pytest.raises(InputError, match="mine.json") as error:
        load(path)
    assert sentence in str(error.value)


def test_a_region_without_prices_is_refused():
    with pytest.raises(
        InputError, match="there are no prices for mars-north-1, only for us-east-1"
    ):
        load(region="mars-north-1")


def test_ones_own_price_is_taken_and_names_its_file(tmp_path):
    path = tmp_path / "mine.json"
    path.write_text('{"prices": {"us-west-2": {"valkey_hour": 1.5}}}')
    assert load(path, "us-west-2").prices["valkey_hour"].value == 1.5 and load(
        path, "us-west-2"
    ).prices["valkey_hour"].source == str(path)
    assert load(path, "us-east-1").prices["valkey_hour"].value == 0.0256
