import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from templates import PSEUDO, all_templates, allowed, paths, render, statements

from snn.deploy.stack import infra_folder
from snn.local.lambda_runtime import announced

TEMPLATES = all_templates()
GIVEN = {
    "StackName": "Cats",
    "BucketName": "cats",
    "CacheSecret": "arn:secret",
    "Topic": "arn:topic",
}
BUCKET, HERE = "arn:aws-cn:s3:::cats", "here-1:111111111111"
FUNCTION = "arn:aws-cn:lambda:here-1:111111111111:function:Cats-{}Lambda"
TABLE = "arn:aws-cn:dynamodb:here-1:111111111111:table/Cats-{}"


def test_cfn_lint_finds_nothing():
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "import sys; from cfnlint.runner import main; sys.exit(main())",
            *map(str, paths()),
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.skipif(
    not shutil.which("checkov"),
    reason="checkov is not on the PATH; it pins too much to share an environment with: pipx install checkov",
)
def test_checkov_finds_nothing_unexplained(tmp_path):
    done = subprocess.run(
        ["checkov", "-d", str(infra_folder()), "--framework", "cloudformation", "-o", "json"],
        capture_output=True,
        text=True,
    )
    results = json.loads(done.stdout)["results"]
    assert [(c["check_id"], c["resource"]) for c in results["failed_checks"]] == []
    used = {(c["resource"].split(".")[-1], c["check_id"]) for c in results["skipped_checks"]}
    said = {
        (name, skip["id"])
        for template in TEMPLATES.values()
        for name, resource in template["Resources"].items()
        for skip in resource.get("Metadata", {}).get("checkov", {}).get("skip", [])
    }
    assert said == used  # no skip without a finding


def test_every_skip_has_its_reason():
    for name, template in TEMPLATES.items():
        for resource in template["Resources"].values():
            for skip in resource.get("Metadata", {}).get("checkov", {}).get("skip", []):
                assert len(skip["comment"]) > 15, (name, skip)


def test_no_account_region_or_partition_is_written_down():
    for path in paths():
        text = path.read_text()
        for wrong in (
            r"\b\d{12}\b",
            r"\b(us|eu|ap|sa|ca|me|af|il|mx|cn)-[a-z]+-\d\b",
            r"arn:aws\b",
            r"amazonaws\.com/",
        ):
            assert not re.search(wrong, text), (path.name, wrong)


# Who may do what. The context is what IAM would know besides: the prefix that is listed, or that the call comes from
# the function's own code.
CODE = {"lambda__SourceFunctionArn": FUNCTION.format("Launch")}
POLICIES = [
    ("Launch", "s3:GetObject", f"{BUCKET}/training_input/datasets.h5", {}, True),
    ("Launch", "s3:GetObject", f"{BUCKET}/prediction_input/params.h5", {}, False),
    ("Launch", "s3:PutObject", f"{BUCKET}/training_results/results.json", {}, True),
    ("Launch", "s3:PutObject", f"{BUCKET}/prediction_input/params.h5", {}, True),
    ("Launch", "s3:PutObject", f"{BUCKET}/training_checkpoints/run/00000003.npz", {}, True),
    (
        "Launch",
        "s3:PutObject",
        f"{BUCKET}/training_input/datasets.h5",
        {},
        False,
    ),  # else it could start itself for ever
    ("Launch", "s3:DeleteObject", f"{BUCKET}/training_results/results.json", {}, False),
    ("Launch", "s3:GetObject", "arn:aws-cn:s3:::others/training_input/datasets.h5", {}, False),
    (
        "Launch",
        "s3:ListBucket",
        BUCKET,
        {"s3__prefix": "training_input/parameters.json"},
        True,
    ),
    ("Launch", "s3:ListBucket", BUCKET, {"s3__prefix": "training_checkpoints/"}, True),
    ("Launch", "s3:ListBucket", BUCKET, {"s3__prefix": "prediction_input/"}, False),
    (
        "Launch",
        "s3:ListBucket",
        BUCKET,
        {},
        True,
    ),  # so S3 asks before it says "no such file" (404) and not "forbidden" (403)
    ("Neuron", "s3:ListBucket", BUCKET, {}, True),
    ("Launch", "lambda:InvokeFunction", FUNCTION.format("Trainer"), {}, True),
    (
        "Launch",
        "lambda:InvokeFunction",
        FUNCTION.format("Neuron"),
        {},
        True,
    ),  # the watchdog sends what is missing
    (
        "Launch",
        "lambda:InvokeFunction",
        "arn:aws-cn:lambda:here-1:111111111111:function:Payroll",
        {},
        False,
    ),
    ("Launch", "lambda:UpdateFunctionCode", FUNCTION.format("Launch"), {}, False),
    ("Launch", "dynamodb:UpdateItem", TABLE.format("LaunchLambda"), {}, True),
    ("Launch", "dynamodb:DeleteTable", TABLE.format("LaunchLambda"), {}, False),
    ("Launch", "sns:Publish", "arn:topic", {}, True),
    ("Launch", "secretsmanager:GetSecretValue", "arn:secret", {}, True),
    ("Launch", "secretsmanager:GetSecretValue", "arn:other", {}, False),
    ("Launch", "sns:Publish", "Failures", {}, True),  # where its own failures go
    ("Launch", "sqs:SendMessage", "arn:DeadLetters", {}, False),  # only the topic writes there
    ("Launch", "logs:PutLogEvents", "arn:LaunchLogs", {}, True),
    ("Launch", "logs:PutLogEvents", "arn:NeuronLogs", {}, False),
    (
        "Launch",
        "logs:CreateLogGroup",
        "arn:LaunchLogs",
        {},
        False,
    ),  # it has a retention: nobody makes one without
    (
        "Launch",
        "ec2:CreateNetworkInterface",
        f"arn:aws-cn:ec2:{HERE}:network-interface/*",
        {},
        True,
    ),
    (
        "Launch",
        "ec2:CreateNetworkInterface",
        f"arn:aws-cn:ec2:{HERE}:network-interface/*",
        CODE,
        False,
    ),
    ("Launch", "ec2:RunInstances", f"arn:aws-cn:ec2:{HERE}:instance/*", {}, False),
    ("Trainer", "lambda:InvokeFunction", FUNCTION.format("Neuron"), {}, True),
    ("Trainer", "lambda:InvokeFunction", FUNCTION.format("Launch"), {}, True),
    (
        "Trainer",
        "lambda:InvokeFunction",
        FUNCTION.format("Trainer"),
        {},
        True,
    ),  # its successor, where functions stay
    ("Trainer", "lambda:InvokeFunction", FUNCTION.format("Payroll"), {}, False),
    ("Trainer", "dynamodb:UpdateItem", TABLE.format("Costs"), {}, True),
    ("Trainer", "dynamodb:UpdateItem", TABLE.format("NeuronLambda"), {}, False),
    ("Trainer", "s3:GetObject", f"{BUCKET}/training_data/run.npz", {}, True),
    ("Trainer", "s3:PutObject", f"{BUCKET}/training_results/results.json", {}, False),
    (
        "Trainer",
        "s3:PutObject",
        f"{BUCKET}/training_results/run/stopped.json",
        {},
        True,
    ),  # whoever ends a run says why
    ("Trainer", "sns:Publish", "arn:topic", {}, True),
    ("Trainer", "sns:Publish", "Failures", {}, True),
    ("Trainer", "sns:Publish", "arn:other", {}, False),
    ("Neuron", "lambda:InvokeFunction", FUNCTION.format("Trainer"), {}, True),
    ("Neuron", "sns:Publish", "Failures", {}, True),
    (
        "Neuron",
        "lambda:InvokeFunction",
        FUNCTION.format("Launch"),
        {},
        True,
    ),  # after the epoch, where it is the whole network
    (
        "Neuron",
        "lambda:InvokeFunction",
        FUNCTION.format("Neuron"),
        {},
        True,
    ),  # its successor, where functions stay
    ("Neuron", "lambda:InvokeFunction", FUNCTION.format("Payroll"), {}, False),
    ("Neuron", "dynamodb:UpdateItem", TABLE.format("NeuronLambda"), {}, True),
    ("Neuron", "dynamodb:UpdateItem", TABLE.format("Costs"), {}, True),  # its mini-batch's
    ("Neuron", "dynamodb:UpdateItem", TABLE.format("TrainerLambda"), {}, False),
    ("Neuron", "s3:GetObject", f"{BUCKET}/training_data/run.npz", {}, True),
    ("Neuron", "s3:GetObject", f"{BUCKET}/training_input/datasets.h5", {}, False),
    ("Neuron", "xray:PutTraceSegments", "*", {}, False),  # X-Ray is off
    ("Watch", "lambda:InvokeFunction", "arn:LaunchFunction", {}, True),
    ("Watch", "lambda:InvokeFunction", "arn:NeuronFunction", {}, False),
]


@pytest.mark.parametrize("function, action, resource, context, expected", POLICIES)
def test_who_may_do_what(function, action, resource, context, expected):
    role = TEMPLATES["functions.yaml"]["Resources"][f"{function}Role"]
    assert (
        allowed(statements(role, GIVEN, {"Traced": False}), action, resource, **context)
        is expected
    )


def test_tracing_allows_tracing():
    role = TEMPLATES["functions.yaml"]["Resources"]["NeuronRole"]
    assert allowed(statements(role, GIVEN, {"Traced": True}), "xray:PutTraceSegments", "*")


def test_no_policy_allows_every_action_and_few_every_resource():
    for template in TEMPLATES.values():
        for resource in template["Resources"].values():
            if resource["Type"] != "AWS::IAM::Role":
                continue
            for statement in statements(resource, GIVEN, {"Traced": True}):
                actions = (
                    statement["Action"]
                    if isinstance(statement["Action"], list)
                    else [statement["Action"]]
                )
                if statement["Effect"] == "Allow":
                    assert not any("*" in action for action in actions)
                if statement["Effect"] == "Allow" and statement["Resource"] == "*":
                    assert statement["Sid"] in (
                        "NetworkWithoutResources",
                        "Trace",
                        "LogInToRegistry",
                        "LookAtBalancers",
                        "TaskWithoutResources",
                    )


def test_the_functions_can_go_on_and_on():
    for name in ("Launch", "Trainer", "Neuron"):
        function = TEMPLATES["functions.yaml"]["Resources"][f"{name}Function"]["Properties"]
        events = TEMPLATES["functions.yaml"]["Resources"][f"{name}Events"]["Properties"]
        assert function["RecursiveLoop"] == "Allow" and function["Runtime"] == "python3.13"
        assert events["MaximumRetryAttempts"] == 2 and events["DestinationConfig"][
            "OnFailure"
        ] == {"Destination": {"Ref": "Failures"}}


def brought(policy: dict, body: dict) -> bool:
    "Whether a subscription with this filter on the message's body brings it; enough of SNS for ours."
    return all(
        name in body
        and (
            brought(rule, body[name]) if isinstance(rule, dict) else rule == [{"exists": True}]
        )
        for name, rule in policy.items()
    )


def test_a_failed_event_is_kept_and_ends_its_run_but_a_failure_to_do_so_leads_to_no_other():
    resources = TEMPLATES["functions.yaml"]["Resources"]
    queue, function = (
        resources["FailuresAreKept"]["Properties"],
        resources["FailuresEndRuns"]["Properties"],
    )
    assert (queue["Protocol"], queue["Endpoint"]) == (
        "sqs",
        {"Fn::GetAtt": ["DeadLetters", "Arn"]},
    ) and "FilterPolicy" not in queue
    assert (function["Protocol"], function["Endpoint"]) == (
        "lambda",
        {"Fn::GetAtt": ["LaunchFunction", "Arn"]},
    ) and function["FilterPolicyScope"] == "MessageBody"
    sent = {
        "requestPayload": {"function": "NeuronLambda", "run": "demo", "epoch": 3},
        "responsePayload": {"errorMessage": "no"},
    }
    assert brought(function["FilterPolicy"], sent)
    for other in (json.loads(announced(sent)), {"state": "watch"}, {"Records": [{"s3": {}}]}):
        assert not brought(function["FilterPolicy"], {**sent, "requestPayload": other})
    assert resources["FailurePermission"]["Properties"]["Principal"] == "sns.amazonaws.com"
    (policy,) = resources["DeadLettersPolicy"]["Properties"]["PolicyDocument"]["Statement"]
    assert policy["Principal"] == {"Service": "sns.amazonaws.com"} and policy["Condition"] == {
        "ArnEquals": {"aws:SourceArn": {"Ref": "Failures"}}
    }


# A deployment changes what has new parameters. On AWS, that is all that CloudFormation looks at.
CHANGES = [
    ("functions.yaml", {"TrainingPackage"}, {"TrainerFunction", "NeuronFunction"}),
    ("functions.yaml", {"LaunchPackage"}, {"LaunchFunction"}),
    ("functions.yaml", {"Email"}, {"Topic"}),
    ("observability.yaml", {"DailySpend"}, {"SpendAlarm"}),
    ("parameter_server.yaml", {"NodeType"}, {"Server"}),
    (
        "functions.yaml",
        {"FunctionMemory"},
        {"LaunchFunction", "TrainerFunction", "NeuronFunction"},
    ),
]


@pytest.mark.parametrize("name, changed, expected", CHANGES)
def test_an_update_changes_what_it_is_about_and_nothing_else(name, changed, expected):
    template, all_conditions = (
        TEMPLATES[name],
        {c: True for t in TEMPLATES.values() for c in t.get("Conditions", {})},
    )
    assert changed <= template["Parameters"].keys()
    before, after = (
        {
            logical: render(
                resource["Properties"],
                {**GIVEN, **dict.fromkeys(changed, edition)},
                all_conditions,
            )
            for logical, resource in template["Resources"].items()
        }
        for edition in ("old", "new")
    )
    assert {logical for logical in before if before[logical] != after[logical]} == expected


def test_nothing_secret_is_in_a_functions_environment():
    for name in ("Launch", "Trainer", "Neuron"):
        variables = TEMPLATES["functions.yaml"]["Resources"][f"{name}Function"]["Properties"][
            "Environment"
        ]["Variables"]
        assert (
            "resolve:" not in json.dumps(variables) and "SNN_REDIS_PASSWORD" not in variables
        )


def test_what_a_local_aws_lacks_is_left_out_there():
    "These and no others: on AWS the conditions are true."
    left_out = {
        (name, logical, resource["Type"])
        for name, template in TEMPLATES.items()
        for logical, resource in template["Resources"].items()
        if resource.get("Condition") in ("OnAws", "AwakeOnAws", "WithBudget", "WithNotebook")
    }
    assert {(name, kind) for name, _, kind in left_out} == {
        ("observability.yaml", "AWS::Logs::QueryDefinition"),
        ("observability.yaml", "AWS::CloudWatch::Alarm"),
        ("main.yaml", "AWS::CloudFormation::Stack"),
        ("observability.yaml", "AWS::Budgets::Budget"),
        ("wake.yaml", "AWS::Events::Rule"),
        ("wake.yaml", "AWS::Lambda::Permission"),
    }
    assert {
        logical for _, logical, kind in left_out if kind != "AWS::Logs::QueryDefinition"
    } == {"SpendAlarm", "Budget", "NotebookInstance", "Uploads", "UploadPermission"}
    assert TEMPLATES["main.yaml"]["Parameters"]["Local"]["Default"] == "no"
    assert TEMPLATES["observability.yaml"]["Conditions"]["OnAws"] == {
        "Fn::Equals": [{"Ref": "Local"}, "no"]
    }


def test_the_dashboard_is_json():
    body = TEMPLATES["observability.yaml"]["Resources"]["Dashboard"]["Properties"][
        "DashboardBody"
    ]
    widgets = json.loads(render(body, GIVEN, {}))["widgets"]
    assert [w["properties"]["title"] for w in widgets][0] == "Cost of each epoch" and all(
        w["properties"]["region"] == PSEUDO["AWS::Region"] for w in widgets
    )


def lifecycle(when: str) -> str:
    script = TEMPLATES["notebook.yaml"]["Resources"]["Lifecycle"]["Properties"][when][0][
        "Content"
    ]["Fn::Base64"]
    return render(
        script,
        {**GIVEN, "IdleMinutes": 60, "GitHubUser": "somebody", "CacheUrl": "rediss://there"},
        {},
    )


def run_lifecycle(when: str, home: Path, **commands: str) -> subprocess.CompletedProcess:
    "Run a script in a folder, with these commands and the usual ones; what it leaves in the background is waited for."
    folder = home / "bin"
    folder.mkdir(exist_ok=True)
    usual = {
        "sudo": 'shift 2; exec "$@"',
        "nohup": 'exec "$@"',
        "sleep": f'touch "{home}/slept"',
    }
    for name, body in {**usual, **commands}.items():
        (folder / name).write_text(f"#!/bin/bash\n{body}\n")
        (folder / name).chmod(0o755)
    (home / "SageMaker").mkdir(exist_ok=True)
    text = (
        lifecycle(when)
        .replace("/home/ec2-user", str(home))
        .replace("/usr/local/bin/stop", f"{home}/stop")
    )
    return subprocess.run(
        ["bash", "-c", f"({text}\ncode=$?; wait; exit $code)"],
        capture_output=True,
        text=True,
        env={"PATH": f"{folder}:/usr/bin:/bin", "HOME": str(home)},
    )


@pytest.mark.parametrize("when", ["OnCreate", "OnStart"])
def test_a_notebook_without_network_or_timers_is_made_all_the_same(when, tmp_path):
    no = "echo no such thing >&2; exit 1"
    done = run_lifecycle(when, tmp_path, curl=no, git=no, **{"systemd-run": no})
    assert done.returncode == 0, done.stderr
    logs = {path.name: path.read_text() for path in (tmp_path / "SageMaker").glob("*.log")}
    if when == "OnCreate":
        assert (
            "no such thing" in logs["install.log"]
            and "The installation failed" in logs["install.log"]
        )
    else:
        assert (
            "It will not stop by itself" in logs["idle.log"]
            and "There is no kernel; install.log says why" in logs["kernel.log"]
        )


def test_a_notebook_brings_its_own_python_and_waits_for_it(tmp_path):
    uv = "mkdir -p .uv && printf '#!/bin/sh\\n[ \"$2\" = find ] && echo its-python || true\\n' > .uv/uv && chmod +x .uv/uv"
    venv = "mkdir -p serverless-neural-network/bin && echo 'echo \"$PYTHON $1\" > made' > serverless-neural-network/bin/venv"
    assert (
        run_lifecycle(
            "OnCreate", tmp_path, curl=f"cat > uv-install.sh <<'E'\n{uv}\nE", git=venv
        ).returncode
        == 0
    )
    assert (tmp_path / "SageMaker" / "made").read_text().split() == [
        "its-python",
        "notebooks",
    ], (tmp_path / "SageMaker" / "install.log").read_text()
    arrives = "b=serverless-neural-network/.venv/bin; mkdir -p $b; printf '#!/bin/sh\\necho \"$@\" > kernel\\n' > $b/python; chmod +x $b/python; touch $b/../installed-notebooks"
    assert (
        run_lifecycle(
            "OnStart", tmp_path, sleep=arrives, **{"systemd-run": 'echo "$@"'}
        ).returncode
        == 0
    )
    assert (
        "ipykernel install --user --name snn"
        in (tmp_path / "SageMaker" / "kernel").read_text()
    )
    assert "--on-unit-active=5min" in (tmp_path / "SageMaker" / "idle.log").read_text()


def test_a_second_failed_event_is_mailed_too():
    "An alarm on what lies in the queue would stay on for the two weeks that it lies there."
    alarm = TEMPLATES["observability.yaml"]["Resources"]["DeadLetterAlarm"]["Properties"]
    assert (alarm["MetricName"], alarm["Statistic"]) == ("NumberOfMessagesSent", "Sum")


def test_training_stays_in_one_zone():
    "Between zones each gigabyte is paid for on both sides, and an endpoint costs in each."
    network, main = TEMPLATES["network.yaml"]["Resources"], TEMPLATES["main.yaml"]["Resources"]
    subnets = {n: r for n, r in network.items() if r["Type"] == "AWS::EC2::Subnet"}
    assert subnets.keys() == {"Subnet", "SecondSubnet"}
    assert subnets["SecondSubnet"]["Condition"] == "Serverless"  # which spreads by itself
    cache = TEMPLATES["network.yaml"]["Outputs"]["CacheSubnets"]["Value"]
    assert render(cache, {}, {"Serverless": False}) == "Subnet"
    for name, output in (("ParameterServer", "CacheSubnets"), ("Functions", "Subnet")):
        assert main[name]["Properties"]["Parameters"]["Subnets"] == {
            "Fn::GetAtt": ["Network", f"Outputs.{output}"]
        }
    for given, right in (("", {"Fn::GetAZs": ""}), ("here-1c", "here-1c")):
        zone = network["Subnet"]["Properties"]["AvailabilityZone"]
        assert render(zone, {**GIVEN, "Zone": given}, {"AnyZone": not given}) in (
            right,
            {"Fn::Select": [0, right]},
        )


@pytest.mark.parametrize("when", ["OnCreate", "OnStart"])
def test_the_notebooks_scripts_are_shell(when, tmp_path):
    script = TEMPLATES["notebook.yaml"]["Resources"]["Lifecycle"]["Properties"][when][0][
        "Content"
    ]["Fn::Base64"]
    text = render(script, {**GIVEN, "IdleMinutes": 60}, {})
    assert len(text) < 16384 * 3 / 4
    subprocess.run(["bash", "-n"], input=text, text=True, check=True)
    embedded = re.search(r"<<'END'\n(.*?)\nEND\n", text, re.S)
    if embedded:
        compile(embedded[1], "stop-when-idle", "exec")
