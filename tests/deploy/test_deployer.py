"""Who deploys needs what CloudFormation needs for each resource, and what our own commands ask; and no more."""

import json
import re
from fnmatch import fnmatchcase

import pytest
from templates import all_templates

from snn.deploy.stack import infra_folder

TEMPLATES = all_templates()
POLICY = json.loads((infra_folder() / "deployer.json").read_text())["Statement"]
FILL = {
    "STACK": "Cats",
    "LOWER": "cats",
    "BUCKET": "cats-of-2026",
    "REGION": "here-1",
    "ACCOUNT": "111111111111",
}


def as_list(value):
    return value if isinstance(value, list) else [value]


def fill(text):
    for name, value in FILL.items():
        text = text.replace(name, value)
    return text


def allowed(action, resource=None):
    return any(
        fnmatchcase(action.lower(), pattern.lower())
        and (
            resource is None
            or any(fnmatchcase(resource, fill(r)) for r in as_list(s["Resource"]))
        )
        for s in POLICY
        for pattern in as_list(s["Action"])
    )


# What a resource type would ask for if we used what we do not.
UNUSED = {
    "kms:": "no key of our own",
    "firehose:": "no slow log",
    "kinesis:": "no stream of a table",
    "vpc-lattice:": "no service network",
    "vpce:": "no endpoint in another region",
    "elasticfilesystem:": "no file system",
    "s3files:": "no file system",
    "s3tables:": "no metadata tables",
    "cognito-idp:": "no login at the load balancer",
    "lambda:AssociateRuntimeAlias": "no capacity provider",
    "lambda:PassCapacityProvider": "no capacity provider",
    "lambda:DeleteCodeSigning": "no code signing",
    "lambda:GetLayerVersion": "no layers",
    "secretsmanager:Re": "no copies of the secret in other regions",
    "sns:PutDataProtection": "no data protection policy",
    "s3:REST": "no action of IAM",
    "s3:UpdateBucketMetadata": "no metadata tables",
    "s3:CreateBucketMetadata": "no metadata tables",
    "iam:DeleteRolePermissionsBoundary": "no boundary",
    "iam:PutRolePermissionsBoundary": "no boundary",
    "ecs:PutAccountSetting": "no setting of the account's",
}
# Words in the names of actions that are for replicas, imports, machines, VPN, deliveries and the like.
NOT_OURS = {
    "dynamodb": r"Replica|Import|Kinesis|ResourcePolicy|Item|BatchWrite|Scan",
    "ec2": r"Ipam|Vpn|Tenancy|Encryption|CreateNetworkInterface|NetworkInterfacePermission",
    "logs": r"KmsKey|Deliver|DataProtection|Index|ResourcePolicy|BearerToken|Protection|LogStream|PutLogEvents",
}


def needed(action):
    service, name = action.split(":")
    if service in NOT_OURS:
        return not re.search(NOT_OURS[service], name)
    return not action.startswith(tuple(UNUSED))


def declared():
    "Actions by resource type, as CloudFormation describes them; the service's own stack is the pipeline's."
    from cfnlint.schema import PROVIDER_SCHEMA_MANAGER as schemas

    kinds = {
        resource["Type"]
        for name, template in TEMPLATES.items()
        if name != "service/service.yaml"
        for resource in template["Resources"].values()
    }
    for kind in sorted(kinds):
        handlers = schemas.get_resource_schema("us-east-1", kind).schema.get("handlers", {})
        yield (
            kind,
            {
                action
                for name in ("create", "read", "update", "delete")
                for action in handlers.get(name, {}).get("permissions", [])
            },
        )


def test_a_deployer_may_do_what_each_resource_needs():
    missing = {
        kind: lacks
        for kind, actions in declared()
        if (lacks := sorted(a for a in actions if needed(a) and not allowed(a)))
    }
    assert missing == {}


CALLS = {
    "HeadBucket": "s3:ListBucket",
    "HeadObject": "s3:GetObject",
    "ListBuckets": "s3:ListAllMyBuckets",
    "ListObjectVersions": "s3:ListBucketVersions",
    "DeleteObjects": "s3:DeleteObject",
    "PutPublicAccessBlock": "s3:PutBucketPublicAccessBlock",
    "GetBucketNotificationConfiguration": "s3:GetBucketNotification",
    "Invoke": "lambda:InvokeFunction",
    "UploadFileobj": "s3:PutObject",
    "ListObjectsV2": "s3:ListBucket",
}
SERVICES = {"service-quotas": "servicequotas", "resourcegroupstaggingapi": "tag"}
SELDOM = {"GetWaiter", "GetPaginator", "CanPaginate"}


def asked():
    "What our commands ask AWS for, where client and call stand in one expression, or as `items` is told."
    found = set()
    for path in (infra_folder().parent / "snn" / "deploy").glob("*.py"):
        if path.name in ("gate.py", "sleep.py"):
            continue  # functions, with roles of their own
        text = path.read_text()
        call = r"client\(\s*\"([\w-]+)\"\s*\)\s*\.(?:get_paginator\(\"(\w+)\"\)|(\w+)\()"
        listed = r"\"([\w-]+)\",\s*\"((?:describe|filter|get|list)_\w+)\""  # of `items`
        calls = [(service, a or b) for service, a, b in re.findall(call, text)]
        for service, said in calls + re.findall(listed, text):
            name = "".join(word.capitalize() for word in said.split("_"))
            found.add((SERVICES.get(service, service), name))
    return sorted((s, n) for s, n in found if n not in SELDOM)


def test_a_deployer_may_do_what_our_commands_ask():
    actions = {CALLS.get(name, f"{service}:{name}") for service, name in asked()}
    assert len(actions) > 25
    assert [action for action in sorted(actions) if not allowed(action)] == []


def test_no_statement_allows_a_whole_service_and_one_names_every_resource():
    for statement in POLICY:
        assert statement["Effect"] == "Allow"
        for action in as_list(statement["Action"]):
            assert re.fullmatch(r"[\w-]+:\*?[A-Za-z]+\*?\w*", action), action
        assert ("*" in as_list(statement["Resource"])) == (
            statement["Sid"] == "WithoutResources"
        )
    (free,) = [s["Action"] for s in POLICY if s["Sid"] == "WithoutResources"]
    changes = [a for a in free if not re.match(r"[\w-]+:(Describe|Get|List)", a)]
    assert changes == [
        *("ecs:DeleteTaskDefinitions", "ecs:DeregisterTaskDefinition", "ecs:CreateCluster"),
        *("logs:DeleteQueryDefinition", "logs:PutQueryDefinition", "sns:Unsubscribe"),
    ]


def test_it_fits_into_a_role():
    "Inline policies of a role may have 10,240 characters, white space not counted: IAM and AWS STS quotas."
    assert len(re.sub(r"\s", "", json.dumps(POLICY))) < 10_000


HERE = "here-1:111111111111"


@pytest.mark.parametrize(
    "action, resource, expected",
    [
        ("lambda:DeleteFunction", f"arn:aws:lambda:{HERE}:function:Cats-LaunchLambda", True),
        ("lambda:DeleteFunction", f"arn:aws:lambda:{HERE}:function:Payroll", False),
        (
            "iam:CreateRole",
            "arn:aws:iam::111111111111:role/Cats-Functions-1-LaunchRole-2",
            True,
        ),
        ("iam:CreateRole", "arn:aws:iam::111111111111:role/Admin", False),
        ("iam:PassRole", "arn:aws:iam::111111111111:role/Admin", False),
        ("iam:CreateUser", "arn:aws:iam::111111111111:user/me", False),
        ("s3:DeleteObject", "arn:aws:s3:::cats-of-2026/training_input/datasets.h5", True),
        ("s3:DeleteObject", "arn:aws:s3:::payroll/2026.csv", False),
        ("cloudformation:DeleteStack", f"arn:aws:cloudformation:{HERE}:stack/Dogs/1", False),
        ("dynamodb:DeleteTable", f"arn:aws:dynamodb:{HERE}:table/Payroll", False),
    ],
)
def test_a_deployer_may_touch_only_the_stacks_own(action, resource, expected):
    assert allowed(action, resource) == expected


# Tags: what is billed can be counted by stack.


def test_what_cannot_have_the_stacks_tag_costs_nothing():
    "CloudFormation gives a stack's tags to all that can have them; what can't is not billed by itself."
    from cfnlint.schema import PROVIDER_SCHEMA_MANAGER as schemas

    untagged = set()
    for kind, _ in declared():
        schema = schemas.get_resource_schema("us-east-1", kind).schema
        if not schema.get("tagging", {}).get("taggable", True):
            untagged.add(kind)
    assert untagged <= {
        "AWS::CloudWatch::Dashboard",
        "AWS::EC2::Route",
        "AWS::EC2::SecurityGroupIngress",
        "AWS::EC2::SubnetRouteTableAssociation",
        "AWS::EC2::VPCCidrBlock",
        "AWS::EC2::VPCGatewayAttachment",
        "AWS::Lambda::EventInvokeConfig",
        "AWS::Lambda::Permission",
        "AWS::Logs::QueryDefinition",
        "AWS::S3::BucketPolicy",
        "AWS::SNS::Subscription",
        "AWS::SQS::QueuePolicy",
        "AWS::Scheduler::Schedule",
        "AWS::ElastiCache::SubnetGroup",
    }


def test_the_budget_counts_what_has_the_stacks_tag():
    budget = TEMPLATES["observability.yaml"]["Resources"]["Budget"]["Properties"]
    assert budget["Budget"]["CostFilters"] == {
        "TagKeyValue": [{"Fn::Sub": "user:snn:stack$${StackName}"}]
    }
    assert {
        n["Notification"]["NotificationType"] for n in budget["NotificationsWithSubscribers"]
    } == {
        "ACTUAL",
        "FORECASTED",
    }
    assert TEMPLATES["main.yaml"]["Parameters"]["MonthlyBudget"]["Default"] > 91
