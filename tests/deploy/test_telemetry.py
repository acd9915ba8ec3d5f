"""What the functions write is what the stack looks for: a run on the real packages with the settings of the rendered
template, on Lambda's own client, and every line of it read."""

import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest

sys.path.insert(0, str(Path(__file__).parent))
from templates import all_templates, dashboard_metrics, render

from snn.backends.aws.bucket import Bucket
from snn.backends.aws.ledger import create_tables
from snn.backends.aws.logs import NAMESPACE
from snn.backends.local.services import Services
from snn.cloud.arrays import tag
from snn.cloud.messages import Message, Upload
from snn.deploy.package import HANDLERS, unzip
from snn.handlers.upload import run_id
from snn.local.lambda_runtime import Function, Runtime, announced
from snn.local.server import local_aws, parameter_server

TEMPLATES = all_templates()
MEMORY = TEMPLATES["main.yaml"]["Parameters"]["FunctionMemory"]["Default"]
GIVEN = {
    "StackName": "Cats",
    "Topic": "",
    "CacheNamespace": "",
    "FunctionMemory": str(MEMORY),
}
FUNCTIONS = ("Launch", "Trainer", "Neuron")


def function(name: str, packages: dict, here: dict[str, str]) -> Function:
    "A function as the template describes it; only the addresses of services are those here."
    properties = TEMPLATES["functions.yaml"]["Resources"][f"{name}Function"]["Properties"]
    module, entry = properties["Handler"].rsplit(".", 1)
    (package,) = (package for package, modules in HANDLERS.items() if module in modules)
    settings = render(properties["Environment"]["Variables"], GIVEN, {})
    return Function(
        render(properties["FunctionName"], GIVEN, {}),
        f"{module}.{entry}",
        unzip(packages[package]),
        {**settings, **here},
        30,
        concurrency=1,
    )


class Cloud:
    "What a run needs, and the file that takes what the functions write."

    def __init__(self, packages, folder: Path):
        self.server, self.aws, self.log = parameter_server(), local_aws(), folder / "lines"
        here = {
            **self.aws.environment(),
            "SNN_REDIS_URL": self.server.url,
            "SNN_REDIS_SECRET": "",
            "HOME": str(folder),
            "SNN_BUCKET": "cats",
        }
        self.file = self.log.open("w")
        self.runtime = Runtime(
            [function(name, packages, here) for name in FUNCTIONS], log=self.file.fileno()
        )
        self.services, self.bucket = (
            Services({**here, "SNN_LEDGER": "store"}),
            Bucket(self.aws.client("s3"), "cats"),
        )
        self.aws.client("s3").create_bucket(Bucket="cats")
        create_tables(self.aws.client("dynamodb"), "Cats-")

    def start(self, parameters, datasets: Path) -> str:
        "Upload, and tell LaunchLambda as S3 would."
        self.bucket.put("training_input/parameters.json", msgspec.json.encode(parameters))
        key = "training_input/datasets.h5"
        answer = self.bucket.client.put_object(
            Bucket="cats", Key=key, Body=datasets.read_bytes()
        )
        etag = answer["ETag"].strip('"')
        self.put(
            "Launch",
            {
                "Records": [
                    {
                        "eventName": "ObjectCreated:Put",
                        "s3": {
                            "bucket": {"name": "cats"},
                            "object": {"key": key, "eTag": etag},
                        },
                    }
                ]
            },
        )
        return run_id(Upload("cats", key, etag), parameters)

    def put(self, name: str, event) -> None:
        self.runtime.put(f"Cats-{name}Lambda", msgspec.json.encode(event))

    def state(self, run: str) -> str:
        return self.services.runs.status(run).state

    def lines(self) -> list[dict]:
        "What was written so far, but for what the client of Lambda says itself."
        return [
            json.loads(line)
            for line in self.log.read_text().splitlines()
            if line.startswith('{"level"')
        ]

    def close(self):
        for opened in (self.runtime, self.server, self.aws, self.file):
            opened.close()


@pytest.fixture(scope="module")
def cloud(packages, tmp_path_factory):
    opened = Cloud(packages, tmp_path_factory.mktemp("lines"))
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def lines(cloud, until, parameters, datasets):
    "All that was written about a run, a duplicate, a stall, and a message that failed for good."
    run = cloud.start(parameters, datasets)
    until(
        lambda: cloud.services.runs.knows(run) and cloud.state(run) == "finished",
        "the run has finished",
    )
    cloud.put("Neuron", Message("NeuronLambda", "forward", run, 2, 0, 1, 0, 1, source="1/0"))
    said = lambda word: any(word in line["message"] for line in cloud.lines())
    until(lambda: said("duplicate"), "the duplicate was told")

    other = msgspec.structs.replace(
        cloud.services.runs.plan(run),
        run="other",
        parameters=msgspec.structs.replace(parameters, epochs=10**6 + 1),
    )
    cloud.services.runs.begin(other)  # and nobody sends its first messages
    record, store = f"{tag('other')}:run", cloud.services.store.client
    cloud.put("Launch", {"state": "watch"})
    until(lambda: store.hexists(record, "since"), "the watchdog has looked for the first time")
    store.hset(record, "since", 0)  # as if that had been long ago
    cloud.put("Launch", {"state": "watch"})
    until(lambda: said("stalled"), "the stall was told")
    cloud.put("Neuron", Message("NeuronLambda", "forward", "other", 10**6, 0, 9, 0, 1))
    until(lambda: cloud.runtime.dead, "the message has failed for good")
    cloud.put("Launch", json.loads(announced(cloud.runtime.dead[0])))
    until(lambda: said("run failed"), "its run was ended")
    return SimpleNamespace(run=run, all=cloud.lines())


def of(lines, name: str) -> list[dict]:
    "Lines of a function."
    return [line for line in lines.all if line.get("function_name") == f"Cats-{name}Lambda"]


def test_each_invocation_writes_one_line_that_says_what_it_was_about(lines):
    for line in lines.all:
        assert {
            "level",
            "message",
            "timestamp",
            "service",
            "function_name",
            "function_request_id",
            "_aws",
        } <= line.keys()
    neurons = [
        line
        for line in of(lines, "Neuron")
        if line.get("run") == lines.run and line["message"] == "finished"
    ]
    # Three epochs of two mini-batches, three neurons and one, forward; and back where it was worth it.
    forward = {
        (line["epoch"], line["batch"], line["layer"], line["neuron"])
        for line in neurons
        if line["direction"] == "forward"
    }
    assert forward == {
        (epoch, batch, layer, neuron)
        for epoch in range(3)
        for batch in range(2)
        for layer, n in ((1, 3), (2, 1))
        for neuron in range(n)
    }
    ids = [line["function_request_id"] for line in lines.all if line["level"] != "ERROR"]
    assert len(set(ids)) == len(ids)
    assert {
        (line["epoch"], line["direction"])
        for line in of(lines, "Trainer")
        if line["run"] == lines.run
    } >= {(2, "start"), (2, "forward"), (2, "backward")}


def test_the_costs_of_a_run_are_its_results(lines, cloud):
    told = [
        line["Cost"][0]
        for line in of(lines, "Launch")
        if "Cost" in line and line["run"] == lines.run
    ]
    results = json.loads(cloud.bucket.get(f"training_results/{lines.run}/results.json"))
    assert told == [results[f"epoch{epoch}"]["cost"] for epoch in range(3)]


def emitted(lines) -> set:
    "All metrics, with their dimensions, as CloudWatch reads them from the lines."
    found = set()
    for line in lines.all:
        for part in line["_aws"]["CloudWatchMetrics"]:
            for dimensions in part["Dimensions"]:
                for metric in part["Metrics"]:
                    assert line[metric["Name"]] and all(
                        isinstance(line[name], str) for name in dimensions
                    )
                    found.add(
                        (
                            part["Namespace"],
                            metric["Name"],
                            frozenset((name, line[name]) for name in dimensions),
                        )
                    )
    return found


def test_dashboard_and_alarms_look_for_metrics_that_are_written(lines):
    resources = TEMPLATES["observability.yaml"]["Resources"]
    wanted = dashboard_metrics(
        json.loads(render(resources["Dashboard"]["Properties"]["DashboardBody"], GIVEN, {}))[
            "widgets"
        ]
    )
    for resource in resources.values():
        if (
            resource["Type"] != "AWS::CloudWatch::Alarm"
            or "Namespace" not in resource["Properties"]
        ):
            continue
        alarm = render(resource["Properties"], GIVEN, {})
        wanted.add(
            (
                alarm["Namespace"],
                alarm["MetricName"],
                frozenset((d["Name"], d["Value"]) for d in alarm["Dimensions"]),
            )
        )
    ours = {metric for metric in wanted if metric[0] == NAMESPACE}
    assert {name for _, name, _ in ours} == {
        "Cost",
        "Spent",
        "Invocations",
        "Duplicates",
        "Stalls",
        "Duration",
    }
    seldom = {
        metric for metric in ours if metric[1] == "Duplicates"
    }  # only a neuron has met one here
    assert ours - seldom <= emitted(lines) and seldom & emitted(lines)
    # Those of AWS itself are of functions and queues that there are.
    names = {
        render(r["Properties"][key], GIVEN, {})
        for r in TEMPLATES["functions.yaml"]["Resources"].values()
        for key in ("FunctionName", "QueueName")
        if isinstance(r["Properties"].get(key), dict)
    }
    assert {
        dict(dimensions).popitem()[1]
        for namespace, _, dimensions in wanted
        if namespace != NAMESPACE
    } <= names


def queries() -> dict[str, str]:
    return {
        name: render(resource["Properties"]["QueryString"], GIVEN, {})
        for name, resource in TEMPLATES["observability.yaml"]["Resources"].items()
        if resource["Type"] == "AWS::Logs::QueryDefinition"
    }


WORDS = {
    "fields",
    "filter",
    "sort",
    "limit",
    "stats",
    "desc",
    "as",
    "and",
    "in",
    "by",
    "count",
    "min",
    "max",
    "sum",
    "ispresent",
}


@pytest.mark.parametrize(
    "name, of_lines",
    [
        ("NeuronQuery", lambda line: line["function_name"] == "Cats-NeuronLambda"),
        # of a message that failed for good; what a watchdog complains of is about no neuron
        ("ErrorQuery", lambda line: line["level"] == "ERROR" and "neuron" in line),
        ("EpochQuery", lambda line: line["function_name"] == "Cats-NeuronLambda"),
    ],
)
def test_questions_ask_for_fields_that_lines_have(lines, name, of_lines):
    query = re.sub(r'"[^"]*"', "", queries()[name])
    aliases = set(re.findall(r"\bas (\w+)", query))
    asked = (
        {word.split(".")[0] for word in re.findall(r"(?<![\w@])[A-Za-z][\w.]*", query)}
        - WORDS
        - aliases
    )
    line = next(line for line in lines.all if of_lines(line))
    assert len(asked) > 1 and asked <= line.keys()


def test_the_log_says_what_neuron_2_of_layer_1_did_in_epoch_1(lines):
    condition = re.search(r"filter (.*)", queries()["NeuronQuery"])[1]
    python = (
        condition.replace("epoch = 12", "epoch == 1")
        .replace("layer = 1", "layer == 1")
        .replace("7", "2")
    )
    assert python == "epoch == 1 and layer == 1 and neuron <= 2 and neuron + neurons > 2"
    found = [
        line
        for line in of(lines, "Neuron")
        if line["run"] == lines.run
        and line["epoch"] == 1
        and line["layer"] == 1
        and line["neuron"] <= 2 < line["neuron"] + line["neurons"]
    ]
    assert {(line["batch"], line["direction"]) for line in found} >= {
        (0, "forward"),
        (1, "forward"),
    } and any(line["direction"] == "backward" for line in found)
    assert all(line["neuron"] == 2 and line["Duration"][0] > 0 for line in found)


def test_a_message_that_fails_for_good_ends_its_run_with_the_reason(lines, cloud):
    status = cloud.services.runs.status("other")
    assert (
        status.state == "failed"
        and "other/1000000/0/NeuronLambda/forward/9/0 failed 3 times: " in status.reason
    )
    assert (
        json.loads(cloud.bucket.get("training_results/other/stopped.json"))["reason"]
        == status.reason
    )
    failed = [line for line in of(lines, "Neuron") if line["level"] == "ERROR"]
    assert len(failed) == 3 and all(
        line["layer"] == 9 and line["exception"] for line in failed
    )
    ending = next(line for line in of(lines, "Launch") if "run failed" in line["message"])
    assert "NeuronLambda/forward/9/0" in ending["message"]


def test_a_function_that_runs_out_of_time_says_so_and_stays_warm(cloud, until):
    pool = cloud.runtime.pools["Cats-LaunchLambda"]
    patient = pool.function
    cloud.put("Launch", {"state": "watch"})  # it may never have been called before
    until(lambda: pool.idle and not pool.queue, "LaunchLambda is idle")
    process = pool.idle[0].process.pid
    pool.function = patient._replace(timeout=1)  # its reserve and nothing more
    cloud.put("Launch", {"state": "watch"})
    until(lambda: any("OutOfTime" in line["message"] for line in cloud.lines()), "it said so")
    pool.function = patient
    until(lambda: len(pool.idle) == 1 and not pool.queue, "the retry is done")
    assert pool.idle[0].process.pid == process
