"""ElastiCache Serverless: what it needs of a template, and what a parameter server in cluster mode needs of a run."""

import shutil
import tempfile
from urllib.parse import quote

import h5py
import msgspec
import pytest
import redis
from templates import all_templates, render

from snn.cloud.prices import load
from snn.deploy.stack import infra_folder
from snn.deploy.standing import monthly, standing
from snn.local.lambda_runtime import LambdaWorkers
from snn.local.server import Server, answers, find_server_program
from snn.local.training import train

TEMPLATE = all_templates()["parameter_server.yaml"]
USER = TEMPLATE["Resources"]["User"]["Properties"]
NAMESPACE = render(TEMPLATE["Outputs"]["Namespace"]["Value"], {}, {"Serverless": True})


@pytest.fixture(scope="module")
def cluster(until):
    "A server in cluster mode, whose one node has all slots, with the template's user; its address."
    folder = tempfile.mkdtemp(prefix="snn-", dir="/tmp")
    path = f"{folder}/server.sock"
    listens = ("--port", "0", "--unixsocket", path, "--save", "", "--dir", folder)
    server = Server(
        f"unix://{quote(path)}", [find_server_program(), *listens, "--cluster-enabled", "yes"]
    )
    try:
        server.wait(answers(server.url))
        client = redis.Redis.from_url(server.url)
        client.execute_command("CLUSTER", "ADDSLOTSRANGE", 0, 16383)
        healthy = lambda: b"cluster_state:ok" in client.execute_command("CLUSTER", "INFO")
        until(healthy, "the cluster is there")
        rules = (*USER["AccessString"].split(), "+cluster|slots")  # for who examines it here
        client.execute_command("ACL", "SETUSER", USER["UserName"], ">hidden", *rules)
        yield server.url.replace("unix://", f"unix://{USER['UserName']}:hidden@")
    finally:
        server.close()
        shutil.rmtree(folder, ignore_errors=True)


def weights(path) -> dict[str, bytes]:
    with h5py.File(path) as file:
        return {name: file[name][()].tobytes() for name in file}


@pytest.mark.parametrize(
    "granularity, residents, runtime",
    [("neuron", 0, "inline"), ("neuron", 2, "lambda"), ("layer", 0, "lambda")],
)
def test_a_run_in_cluster_mode_leaves_the_same_bytes(
    granularity,
    residents,
    runtime,
    cluster,
    parameters,
    datasets,
    packages,
    tmp_path,
    monkeypatch,
):
    monkeypatch.setattr(LambdaWorkers, "every", 1e6)  # no watchdog calls a second time
    chosen = msgspec.structs.replace(parameters, granularity=granularity, residents=residents)
    expected = train(chosen, datasets, tmp_path / "alone", workers=2).files["params.h5"]
    monkeypatch.setenv("SNN_REDIS_URL", cluster)
    found = train(chosen, datasets, tmp_path / "cluster", workers=2, runtime=runtime)
    assert weights(found.files["params.h5"]) == weights(expected)


def test_without_a_hash_tag_a_request_would_touch_two_slots(cluster):
    client = redis.Redis.from_url(cluster)
    both = lambda tag: client.pipeline().set(f"{tag}{{r/0}}:1", 1).set(f"{tag}{{r/1}}:1", 1)
    with pytest.raises(redis.ResponseError, match="same slot"):
        both("").execute()
    assert both(NAMESPACE).execute() == [True, True]


def test_functions_and_notebook_have_the_hash_tag():
    for name in ("Launch", "Trainer", "Neuron"):
        function = all_templates()["functions.yaml"]["Resources"][f"{name}Function"]
        variables = function["Properties"]["Environment"]["Variables"]
        assert variables["SNN_REDIS_NAMESPACE"] == {"Ref": "CacheNamespace"}
    notebook = (infra_folder() / "notebook.yaml").read_text()
    assert "SNN_REDIS_NAMESPACE='${CacheNamespace}'" in notebook
    assert render(TEMPLATE["Outputs"]["Namespace"]["Value"], {}, {"Serverless": False}) == ""


@pytest.mark.parametrize("serverless", [True, False])
@pytest.mark.parametrize("awake", [True, False])
def test_there_is_one_parameter_server_while_the_stack_is_awake(awake, serverless):
    node, own = TEMPLATE["Resources"]["Server"], TEMPLATE["Resources"]["ServerlessServer"]
    assert (node["Condition"], own["Condition"]) == ("AwakeNode", "AwakeServerless")
    conditions = {
        "Serverless": serverless,
        "AwakeNode": awake and not serverless,
        "AwakeServerless": awake and serverless,
    }
    address = render(TEMPLATE["Outputs"]["Url"]["Value"], {}, conditions)
    begins = "rediss://snn@Serverless" if serverless else "rediss://Server.P"
    assert str(address).startswith(begins if awake else "asleep")
    assert own["Properties"]["UserGroupId"] == {"Ref": "Users"}
    assert (
        "MajorEngineVersion" in own["Properties"]
        and "CacheUsageLimits" not in own["Properties"]
    )


def test_its_monthly_minimum_is_in_the_costs():
    cost = lambda **options: monthly(standing({"Notebook": "no", **options}, load()))
    node = load().prices["valkey_hour"].value * 730
    assert cost() - cost(CacheNodeType="serverless") == pytest.approx(node - 0.1 * 0.084 * 730)
