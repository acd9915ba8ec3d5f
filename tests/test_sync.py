"""`snn/` is what the notebooks say, the notebooks are clean, and every module keeps to its room."""

import ast
import configparser
import json
import re
import shutil
import subprocess
import sys
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import snn

ROOT = Path(__file__).resolve().parent.parent
MODULES = sorted(path for path in (ROOT / "snn").rglob("*.py"))
NAMES = [pytest.param(path, id=str(path.relative_to(ROOT))) for path in MODULES]


def python_files(folder: Path) -> dict[str, str]:
    "Text of all modules below a folder, by their path in it."
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*.py")}


def nbdev(module: str, command: str, folder: Path) -> None:
    "Run a command of nbdev in a folder."
    call = f"from nbdev.{module} import {command}; {command}()"
    done = subprocess.run(
        [sys.executable, "-c", call], cwd=folder, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def copy(tmp_path_factory) -> Path:
    "The notebooks and their settings, without what was exported from them."
    folder = tmp_path_factory.mktemp("copy")
    shutil.copytree(
        ROOT / "nbs", folder / "nbs", ignore=shutil.ignore_patterns(".ipynb_checkpoints")
    )
    shutil.copy(ROOT / "settings.ini", folder)
    return folder


@pytest.fixture(scope="module")
def fresh(copy) -> dict[str, str]:
    "A fresh export of all notebooks."
    nbdev("doclinks", "nbdev_export", copy)
    return python_files(copy / "snn")


def test_every_module_has_a_notebook_and_every_exporting_notebook_a_module(fresh):
    assert sorted(python_files(ROOT / "snn")) == sorted(fresh), (
        "a renamed notebook leaves its old module behind: delete it"
    )


def test_every_module_is_what_its_notebook_exports(fresh):
    exported = python_files(ROOT / "snn")
    differ = [name for name, text in fresh.items() if exported.get(name) != text]
    assert not differ, "run nbdev_export, and edit notebooks only"


def test_notebooks_are_clean(copy):
    before = {path: path.read_bytes() for path in (copy / "nbs").rglob("*.ipynb")}
    nbdev("clean", "nbdev_clean", copy)
    dirty = [
        str(path.relative_to(copy))
        for path, content in before.items()
        if path.read_bytes() != content
    ]
    assert not dirty, "run nbdev_clean"


def test_the_version_is_the_same_everywhere():
    settings = configparser.ConfigParser()
    settings.read(ROOT / "settings.ini")
    assert settings["DEFAULT"]["version"] == snn.__version__


@pytest.mark.parametrize("handler", ["launch", "trainer", "neuron"])
def test_a_handler_imports_nothing_that_a_lambda_does_not_need(handler):
    heavy = ["nbdev", "fastcore", "IPython", "matplotlib", "h5py", "PIL", "typer", "rich"]
    heavy += ["boto3", "botocore", "redis", "snn.backends"]  # loaded for those that need them
    program = f"import sys, snn.handlers.{handler}; print(*(name for name in {heavy} if name in sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.split() == []


BELOW = {  # what each room may import, itself apart; rooms that are not named here are above all others
    "maths": {"errors"},
    "data": {"errors", "maths"},
    "cloud": {"errors", "maths"},
    "handlers": {"errors", "maths", "data", "cloud"},
    "backends": {"errors", "maths", "cloud"},
    "replay": {"errors", "maths", "data", "cloud", "backends", "handlers"},
    "live": {"errors", "maths", "data", "cloud", "handlers", "replay"},
    "viz": {"errors", "maths"},
    "serve": {"errors", "maths", "data"},
    "deploy": {"errors", "maths", "data", "cloud", "backends", "handlers"},
    "local": {
        "errors",
        "maths",
        "data",
        "cloud",
        "backends",
        "handlers",
        "replay",
        "deploy",
    },  # runs what deploy has packed
    "lab": {"errors", "maths", "data", "cloud", "backends", "handlers", "local"},
    "estimate": {
        "errors",
        "maths",
        "data",
        "viz",
        "cloud",
        "backends",
        "handlers",
        "local",
    },  # is calibrated on local runs
}


@cache
def nodes(path: Path) -> list[ast.AST]:
    "All of a module's code."
    return list(ast.walk(ast.parse(path.read_text())))


def imported(path: Path) -> set[str]:
    "The rooms of snn that a module imports, at its top or in a function."
    package, found = ["snn", *path.relative_to(ROOT / "snn").parts[:-1]], set()
    for node in nodes(path):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else []
            whole = ".".join([*start, *([node.module] if node.module else [])])
            names = [f"{whole}.{alias.name}" for alias in node.names]
        else:
            continue
        found |= {name.split(".")[1] for name in names if name.startswith("snn.")}
    return found - {"__version__"}


@pytest.mark.parametrize(
    "path", [param for param in NAMES if param.values[0].parent != ROOT / "snn"]
)
def test_imports_point_down(path):
    room = path.relative_to(ROOT / "snn").parts[0]
    if room in BELOW:
        assert imported(path) <= BELOW[room] | {room}


def test_the_rooms_are_listed_in_the_order_of_their_imports():
    "In CONTRIBUTING.md a room stands below all that it imports."
    listed = re.findall(r"^nbs/(\w+) ", (ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE)
    rooms = {path.parent.name for path in (ROOT / "snn").glob("*/__init__.py")}
    assert sorted(listed) == sorted(rooms)
    for path in (ROOT / "snn").glob("*/**/*.py"):
        room = path.relative_to(ROOT / "snn").parts[0]
        allowed = ["errors", *listed[: listed.index(room) + 1]]
        assert imported(path) <= set(allowed), path


VENDORS = {"boto3", "botocore", "redis", "hiredis", "aws_lambda_powertools"}


def packages(path: Path) -> set[str]:
    "The packages of others that a module imports, at its top or in a function."
    found = set()
    for node in nodes(path):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.add((node.module or "").split(".")[0])
    return found - {"snn"}


@pytest.mark.parametrize("room", ["maths", "data", "cloud", "handlers"])
def test_a_run_names_no_vendor_and_no_backend(room):
    "What it needs of its surroundings it asks of the interfaces in `cloud`."
    for path in (ROOT / "snn" / room).glob("*.py"):
        assert not packages(path) & VENDORS and "backends" not in imported(path), path


def test_a_vendor_would_be_found():
    found = set().union(*map(packages, (ROOT / "snn" / "backends").rglob("*.py")))
    assert found >= {"boto3", "botocore", "redis", "aws_lambda_powertools"}


def test_no_backend_imports_one_that_is_not_shared():
    "A new one is a folder of its own. Valkey serves several; one machine stands in for AWS."
    shared = {"aws": {"valkey"}, "local": {"valkey", "aws"}, "memory": set(), "valkey": set()}
    for path in (ROOT / "snn" / "backends").rglob("*.py"):
        mine = path.parent.name
        others = {name.split(".")[2] for name in modules_of(path) if name.count(".") > 2}
        assert path.name == "__init__.py" or others <= {mine, *shared[mine]}, path


def modules_of(path: Path) -> set[str]:
    "The modules of ours that a module imports, at its top, in a function, or by their names."
    package, found = list(path.relative_to(ROOT).parts[:-1]), set()
    for node in nodes(path):
        if isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else []
            whole = ".".join([*start, *([node.module] if node.module else [])])
            found |= {whole, *(f"{whole}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "import_module":
            found |= {argument.value for argument in node.args if hasattr(argument, "value")}
    return found & {dotted(other) for other in MODULES}


@cache
def dotted(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def test_no_module_imports_one_that_imports_it():
    "Neither directly nor through others, nor by its name when it is needed."
    every = {dotted(path): modules_of(path) for path in MODULES if path.stem != "__init__"}
    assert "snn.handlers.epoch" in every["snn.handlers.protocol"]
    order = list(TopologicalSorter(every).static_order())  # raises CycleError
    assert order.index("snn.handlers.epoch") < order.index("snn.handlers.protocol")


SWEEPING = {
    "scan_iter",
    "flushdb",
    "flushall",
    "sscan_iter",
    "hscan_iter",
    "randomkey",
}  # look at more than one run's keys
IN_LUA = re.compile(
    r"""(?:call|execute_command)\(\s*['"](KEYS|SCAN|FLUSHDB|FLUSHALL|SELECT)\b""", re.I
)


def faults(path: Path) -> list[str]:
    "What a module does that no module here does."
    text, found = path.read_text(), []
    for node in nodes(path):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [alias.name for alias in node.names] + [getattr(node, "module", "") or ""]
            found += [
                f"imports {name}"
                for name in names
                if name.split(".")[0] in ("pickle", "marshal", "shelve", "dill", "cloudpickle")
            ]
        if not isinstance(node, ast.Call):
            continue
        name = (
            node.func.attr
            if isinstance(node.func, ast.Attribute)
            else getattr(node.func, "id", "")
        )
        numbers = [
            a for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, int)
        ]
        if name in SWEEPING or name in ("eval", "exec") or name == "select" and numbers:
            found.append(f"calls {name}")
        if name == "keys" and any(
            isinstance(a, ast.Constant) and "*" in str(a.value) for a in node.args
        ):
            found.append("calls keys with a pattern")
        for keyword in node.keywords:
            if keyword.arg == "db" and "redis" in ast.unparse(node).lower():
                found.append("names a numbered database")
            if keyword.arg == "allow_pickle" and ast.unparse(keyword.value) != "False":
                found.append("allows pickle")
    return found + [f"has the command {match}" for match in IN_LUA.findall(text)]


@pytest.mark.parametrize("path", NAMES)
def test_no_module_pickles_evaluates_or_sweeps_the_server(path):
    assert faults(path) == []


def test_such_faults_would_be_found(tmp_path):
    bad = tmp_path / "bad.py"
    bad.write_text("""import pickle
client.flushdb(); client.keys('snn*'); client.select(3); eval('1'); redis.Redis(db=2); np.load(f, allow_pickle=True)
client.register_script("redis.call('KEYS', '*')")""")
    assert len(faults(bad)) == 8


@pytest.mark.parametrize(
    "command", [["format", "--check"], ["check"]], ids=["format", "check"]
)
def test_code_is_formatted(command):
    ruff = [sys.executable, "-m", "ruff", *command, "--no-cache"]
    folders = ["nbs", "tests", "bin", "lambda_build"]
    done = subprocess.run([*ruff, *folders], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def checked(*arguments: str | Path) -> subprocess.CompletedProcess:
    "What the type checker says."
    pytest.importorskip("ty", reason="ty is not installed: bin/venv test")
    ty = [sys.executable, "-m", "ty", "check", "--python", sys.prefix]
    return subprocess.run([*ty, *arguments], cwd=ROOT, capture_output=True, text=True)


def test_types_hold():
    done = checked("--output-format", "concise")
    assert done.returncode == 0, done.stdout + done.stderr
    assert (ROOT / "snn" / "py.typed").is_file()


def test_a_wrong_type_would_be_found(tmp_path):
    wrong = "from snn.maths.sampling import mini_batches\n\nmini_batches('many', 1, 2, 3)\n"
    (tmp_path / "wrong.py").write_text(wrong)
    done = checked("--project", ROOT, tmp_path / "wrong.py")
    assert done.returncode == 1 and "invalid-argument-type" in done.stdout


# Chapters

DEFINES = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Assign, ast.AnnAssign)


def code_cells(chapter: Path) -> list[tuple[bool, str]]:
    "Whether a cell is exported, and its code, in their order."
    cells = json.loads(chapter.read_text())["cells"]
    found = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    return [(text.startswith("#| export"), text) for text in found]


def parsed(text: str) -> list[ast.AST]:
    "All of a cell's code; nothing of a cell with magics."
    try:
        return list(ast.walk(ast.parse(text)))
    except SyntaxError:
        return []


def test_chapters_show_what_they_define():
    "Cells that define something: how many are followed by a demonstration within two cells, and assertions for each."
    defining = shown = assertions = 0
    for chapter in (ROOT / "nbs").rglob("[0-9]*.ipynb"):
        cells = code_cells(chapter)
        for number, (exported, text) in enumerate(cells):
            found = parsed(text)
            if not exported:
                assertions += sum(isinstance(node, ast.Assert) for node in found)
            elif any(isinstance(node, DEFINES) for node in found):
                defining += 1
                following = cells[number + 1 : number + 3]
                shown += any(not exported for exported, _ in following)
    assert shown / defining >= 0.75, f"{shown} of {defining}"
    assert assertions / defining >= 1.5, f"{assertions} in {defining}"
