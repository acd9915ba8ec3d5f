"""What a function's first invocation has still to do, in the package as Lambda has it, beside Lambda's own boto3."""

import json
import subprocess
import sys

from snn.backends.valkey.store import Store, connect
from snn.cloud.messages import Plan
from snn.cloud.runs import Runs
from snn.deploy.package import runtime_folder, unzip
from snn.local.lambda_runtime import Function, Runtime, addresses
from snn.local.server import local_aws, parameter_server

FIRST = """
import json, sys
sys.path[:0], event = sys.argv[1:3], json.loads(sys.argv[3])
from types import SimpleNamespace
context = SimpleNamespace(
    aws_request_id="1", function_name="TrainerLambda", memory_limit_in_mb=1024,
    invoked_function_arn="arn", get_remaining_time_in_millis=lambda: 60000,
)
from snn.handlers.protocol import lambda_handler
ready = set(sys.modules)
lambda_handler(event, context)
print(json.dumps([sorted(ready), sorted(set(sys.modules) - ready)]), file=sys.stderr)
"""


def test_the_first_invocation_imports_nothing_any_more(packages, parameters, tmp_path):
    "A Trainer's start: it reads the plan, writes the ledger in DynamoDB and invokes NeuronLambda, three times."
    (tmp_path / "idle.py").write_text("def lambda_handler(event, context): pass")
    idle = Function("NeuronLambda", "idle.lambda_handler", tmp_path, {})
    plan = Plan(
        *("demo", parameters, "cats", "images.npz", 20, 192, 8, ("no", "cat"), "etag", "")
    )
    event = {"function": "TrainerLambda", "direction": "start", "run": "demo", "epoch": 0}
    event |= {"batch": 0, "source": "demo"}
    with parameter_server() as server, local_aws() as aws, Runtime([idle]) as runtime:
        Runs(Store(connect(server.url))).begin(plan)
        aws.client("dynamodb").create_table(
            TableName="TrainerLambda",
            KeySchema=[{"AttributeName": "invID", "KeyType": "HASH"}],
            AttributeDefinitions=[{"AttributeName": "invID", "AttributeType": "S"}],
            BillingMode="PAY_PER_REQUEST",
        )
        environment = addresses(
            {
                **aws.environment(),
                "SNN_REDIS_URL": server.url,
                "SNN_LEDGER": "dynamodb",
                "SNN_FUNCTIONS": "LaunchLambda,TrainerLambda,NeuronLambda",
                "AWS_LAMBDA_FUNCTION_NAME": "TrainerLambda",
                "AWS_DEFAULT_REGION": "us-east-1",
                "PATH": "",
            },
            runtime.url,
        )
        folders = [str(unzip(packages["training"])), str(runtime_folder())]
        said = subprocess.run(
            [sys.executable, "-I", "-S", "-B", "-c", FIRST, *folders, json.dumps(event)],
            capture_output=True,
            text=True,
            env=environment,
        )
        assert said.returncode == 0, said.stderr[-2000:]
        assert len(aws.client("dynamodb").scan(TableName="TrainerLambda")["Items"]) == 1
    ready, late = json.loads(said.stderr.splitlines()[-1])
    assert "boto3" in ready and "botocore.client" in ready
    assert late == []
