"""Small changes of the code, each of which a test should notice.

Python is mutated by cosmic-ray's operators; the Lua in the store's scripts, which no tool knows,
by a small mutator of our own. A chapter runs its own cells, so a mutant changes the notebook too.
"""

import ast
import json
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple


class Cell(NamedTuple):
    "An exported cell, as the module has it."

    module: str  # path from the root
    notebook: str  # path from the root
    name: str  # the cell's id
    line: int  # of the module, at which the cell begins, from 1
    source: str


class Mutant(NamedTuple):
    "A cell with some lines changed."

    cell: Cell
    first: int  # of the changed lines, from 0
    was: tuple[str, ...]
    now: tuple[str, ...]

    @property
    def place(self) -> str:
        "Where it is."
        return f"{self.cell.module}:{self.cell.line + self.first}"

    @property
    def change(self) -> tuple[str, str]:
        "What it changes, without the space around it."
        return tuple(" ".join(line.strip() for line in part) for part in (self.was, self.now))

    @property
    def parts(self) -> tuple[list[str], list[str]]:
        "Old and new lines of the cell."
        lines = self.cell.source.splitlines()
        last = self.first + len(self.was)
        return lines, [*lines[: self.first], *self.now, *lines[last:]]


HEAD = re.compile(r"^# %% (?:\.\./)+(nbs/\S+\.ipynb) #(\S+)\n", re.MULTILINE)


def cells(root: Path, module: str) -> list[Cell]:
    "The exported cells of a module."
    text = (root / module).read_text()
    heads = list(HEAD.finditer(text))
    ends = [head.start() for head in heads[1:]] + [len(text)]
    return [
        Cell(
            module,
            head[1],
            head[2],
            text.count("\n", 0, head.end()) + 1,
            text[head.end() : end].rstrip() + "\n",
        )
        for head, end in zip(heads, ends)
    ]


def changed(cell: Cell, after: str) -> Mutant:
    "A mutant, from the cell's source after the change."
    old, new = cell.source.splitlines(), after.splitlines()
    same = next((i for i, (a, b) in enumerate(zip(old, new)) if a != b), len(new))
    tail = 0
    while tail < min(len(old), len(new)) - same and old[-1 - tail] == new[-1 - tail]:
        tail += 1
    return Mutant(
        cell, same, tuple(old[same : len(old) - tail]), tuple(new[same : len(new) - tail])
    )


# Python

OPERATORS = re.compile(
    "core/(ReplaceComparisonOperator_(Eq_NotEq|NotEq_Eq|Lt_LtE|LtE_Lt|Gt_GtE|GtE_Gt|Is_IsNot|IsNot_Is)"
    "|ReplaceBinaryOperator_(Add_Sub|Sub_Add|Mul_Div|Div_Mul|Mod_Add|FloorDiv_Mul)"
    "|AddNot|ReplaceTrueWithFalse|ReplaceFalseWithTrue|ReplaceAndWithOr|ReplaceOrWithAnd"
    "|ReplaceBreakWithContinue|ReplaceContinueWithBreak|NumberReplacer"
    "|ZeroIterationForLoop|ReplaceUnaryOperator_Delete_Not)$"
)
TEXTS = {"note", "exception", "info", "lru_cache"}  # calls whose arguments are for a log


def python_mutants(cell: Cell) -> Iterator[Mutant]:
    "What cosmic-ray makes of a cell, but for what only a reader of a log or of types would see."
    from cosmic_ray.mutating import mutate_code
    from cosmic_ray.plugins import get_operator, operator_names

    silent = silent_places(cell.source)
    for name in filter(OPERATORS.match, operator_names()):
        for occurrence in range(10_000):
            mutated = mutate_code(cell.source.encode(), get_operator(name)(), occurrence)
            if mutated is None:
                break
            text = mutated.decode() if isinstance(mutated, bytes) else mutated
            if (
                text != cell.source
                and parses(text)
                and difference(cell.source, text) not in silent
            ):
                yield changed(cell, text)


def difference(before: str, after: str) -> int:
    "Where two texts begin to differ."
    pairs = enumerate(zip(before, after))
    return next((i for i, (a, b) in pairs if a != b), min(len(before), len(after)))


def silent_places(source: str) -> set[int]:
    "Characters of annotations, of texts put together, and of what is written into a log."
    starts = [0]
    for line in source.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    silent: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.arg(annotation=ast.expr() as part) | ast.AnnAssign(annotation=part):
                found = [part]
            case ast.FunctionDef(returns=ast.expr() as part):
                found = [part]
            case ast.JoinedStr():
                found = [node]
            case ast.Call(func=ast.Name(id=name) | ast.Attribute(attr=name)) if name in TEXTS:
                found = [*node.args, *node.keywords]
            case _:
                continue
        for part in found:
            begin = starts[part.lineno - 1] + part.col_offset
            silent.update(range(begin, starts[part.end_lineno - 1] + part.end_col_offset))
    return silent


def parses(source: str) -> bool:
    "Is it still Python?"
    try:
        ast.parse(source)
    except SyntaxError:
        return False
    return True


# Lua

SWAPS = (
    ("==", "~="),
    ("~=", "=="),
    (">=", ">"),
    (" < ", " <= "),
    (" > ", " >= "),
    (" and ", " or "),
    (" or ", " and "),
    ("'RIGHT', 'LEFT'", "'LEFT', 'RIGHT'"),
    ("HSETNX", "HSET"),
    ("math.max", "math.min"),
    ("first and ", ""),
    ("not ", ""),
)
WHOLE = re.compile(r"^\s*(redis\.call\(.*\)|if .* end|elseif .* end)\s*$")


def lua_lines(source: str) -> Iterator[int]:
    "Numbers of the lines inside scripts, from 0."
    inside = False
    for number, line in enumerate(source.splitlines()):
        if inside and line.startswith('"""'):
            inside = False
        elif inside:
            yield number
        elif re.match(r'(_?[A-Z_]+ = ([A-Z_]+ \+ )*| +\+ )"""$', line):
            inside = True


def lua_mutants(cell: Cell) -> Iterator[Mutant]:
    "Each line of a script without what can be left out of it, and with each comparison turned."
    lines = cell.source.splitlines(keepends=True)
    for number in lua_lines(cell.source):
        line = lines[number]
        replaced = {line.replace(a, b, 1) for a, b in SWAPS if a in line}
        if WHOLE.match(line):
            replaced.add("\n")
        for text in sorted(replaced - {line}):
            yield changed(cell, "".join([*lines[:number], text, *lines[number + 1 :]]))


def mutants(root: Path, modules: tuple[str, ...], lua: bool) -> list[Mutant]:
    "All mutants of some modules, by their paths from the root."
    make = lua_mutants if lua else python_mutants
    found = (cell for module in modules for cell in cells(root, module))
    return [mutant for cell in found for mutant in make(cell)]


# Into the files and out again


def in_notebook(mutant: Mutant, text: str) -> str:
    "The notebook with the mutant; unchanged if its cell is written otherwise there."
    notebook = json.loads(text)
    (cell,) = (cell for cell in notebook["cells"] if cell.get("id") == mutant.cell.name)
    lines = "".join(cell["source"]).splitlines()
    skipped = len(lines) - len(mutant.parts[0])  # `#| export` and the empty line after it
    first, last = skipped + mutant.first, skipped + mutant.first + len(mutant.was)
    if tuple(lines[first:last]) == mutant.was:
        lines[first:last] = mutant.now
    cell["source"] = "\n".join(lines).splitlines(keepends=True)
    return json.dumps(notebook)


def in_module(mutant: Mutant, text: str) -> str:
    "The module with the mutant."
    lines = text.splitlines()
    first = mutant.cell.line - 1 + mutant.first
    last = first + len(mutant.was)
    assert tuple(lines[first:last]) == mutant.was, mutant.place
    lines[first:last] = mutant.now
    return "\n".join(lines) + "\n"


# What no test can notice

EQUIVALENT = Path(__file__).with_name("equivalent.toml")


def equivalent() -> dict[tuple[str, str, str], str]:
    "Why a mutant changes nothing that anybody could see, by module, and by what it changes."
    listed = tomllib.loads(EQUIVALENT.read_text()).get("mutant", [])
    return {(one["module"], one["was"], one["now"]): one["because"] for one in listed}


def reason(mutant: Mutant, known: dict[tuple[str, str, str], str]) -> str:
    "Why a mutant is equivalent; empty if nobody has said so."
    return known.get((mutant.cell.module, *mutant.change), "")
