"""Templates as CloudFormation would see them, and who may do what by their policies. Enough of both for ours."""

import re
from copy import deepcopy
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path

import yaml

from snn.deploy.stack import infra_folder

PSEUDO = {
    "AWS::Partition": "aws-cn",
    "AWS::Region": "here-1",
    "AWS::AccountId": "111111111111",
    "AWS::StackName": "Cats",
    "AWS::NoValue": None,
}


class Loader(yaml.CSafeLoader):
    "Reads !Ref and its like as {'Ref': ...}."


def _intrinsic(loader, suffix, node):
    kind = {
        yaml.ScalarNode: loader.construct_scalar,
        yaml.SequenceNode: lambda n: loader.construct_sequence(n, deep=True),
        yaml.MappingNode: lambda n: loader.construct_mapping(n, deep=True),
    }
    value = kind[type(node)](node)
    if suffix == "GetAtt" and isinstance(value, str):
        value = value.split(".", 1)
    return {suffix if suffix in ("Ref", "Condition") else f"Fn::{suffix}": value}


Loader.add_multi_constructor("!", _intrinsic)


@cache
def _parsed(path: Path) -> dict:
    return yaml.load(path.read_text(), Loader)


def read(path: Path) -> dict:
    return deepcopy(_parsed(path))


def paths() -> list[Path]:
    return sorted(infra_folder().rglob("*.yaml"))


def all_templates() -> dict[str, dict]:
    "By their path in infra."
    return {path.relative_to(infra_folder()).as_posix(): read(path) for path in paths()}


def render(value, given: dict[str, str], conditions: dict[str, bool]):
    "A value with its intrinsic functions worked out; an attribute becomes arn:RESOURCE or its like."
    again = lambda v: render(v, given, conditions)
    if isinstance(value, list):
        return [item for item in map(again, value) if item is not None]
    if not isinstance(value, dict):
        return value
    if "Ref" in value:
        return given.get(
            value["Ref"],
            PSEUDO.get(value["Ref"], value["Ref"]) if value["Ref"] != "AWS::NoValue" else None,
        )
    if "Fn::GetAtt" in value:
        return "{}:{}".format(value["Fn::GetAtt"][1].lower(), value["Fn::GetAtt"][0])
    if "Fn::Sub" in value:
        text, own = value["Fn::Sub"], {}
        if isinstance(text, list):
            text, own = text[0], again(text[1])
        word = lambda m: str(own[m[1]] if m[1] in own else again({"Ref": m[1]}))
        return re.sub(r"\$\{([\w:.]+)\}", word, text)
    if "Fn::If" in value:
        return again(value["Fn::If"][1 if conditions[value["Fn::If"][0]] else 2])
    return {key: again(item) for key, item in value.items()}


def statements(role: dict, given: dict[str, str], conditions: dict[str, bool]) -> list[dict]:
    "All statements of a role's own policies."
    policies = render(role["Properties"]["Policies"], given, conditions)
    return [
        statement for policy in policies for statement in policy["PolicyDocument"]["Statement"]
    ]


def _holds(condition: dict, context: dict) -> bool:
    "Whether a statement's condition is met; what is not in the context is not."
    tests = {"StringLike": fnmatchcase, "ArnEquals": fnmatchcase, "StringEquals": str.__eq__}
    as_list = lambda v: v if isinstance(v, list) else [v]
    met = lambda operator, key, values: (
        any(tests[operator](context[key], v) for v in as_list(values))
        if key in context
        else False
    )
    if_there = lambda operator, key, values: (
        key not in context or met(operator.removesuffix("IfExists"), key, values)
    )
    return all(
        (if_there if operator.endswith("IfExists") else met)(operator, key, values)
        for operator, keys in condition.items()
        for key, values in keys.items()
    )


def allowed(found: list[dict], action: str, resource: str, **context: str) -> bool:
    "What IAM would say: a deny wins, and what nobody allows is denied."
    as_list = lambda v: v if isinstance(v, list) else [v]
    context = {key.replace("__", ":"): value for key, value in context.items()}
    matching = [
        s
        for s in found
        if any(fnmatchcase(action, a) for a in as_list(s["Action"]))
        and any(fnmatchcase(resource, r) for r in as_list(s["Resource"]))
        and _holds(s.get("Condition", {}), context)
    ]
    return any(s["Effect"] == "Allow" for s in matching) and not any(
        s["Effect"] == "Deny" for s in matching
    )


def dashboard_metrics(widgets: list[dict]) -> set:
    "Namespace, name and dimensions of each metric on a dashboard, whose shorthands refer to the line before."
    found = set()
    for widget in widgets:
        before: list[str] = []
        for line in widget["properties"]["metrics"]:
            line = [word for word in line if isinstance(word, str)]
            if line[0] == "...":
                line = before[: len(before) - len(line) + 1] + line[1:]
            before = line = [before[i] if word == "." else word for i, word in enumerate(line)]
            found.add((line[0], line[1], frozenset(zip(line[2::2], line[3::2]))))
    return found
