"""Files changed by chance, given to the real commands: what comes of them is an answer or one sentence.

usage: python tests/fuzzing.py FOLDER COUNT [SECONDS [FIRST]]   (of each of `KINDS`; prints figures, a line of JSON for each)

Each file is a case with a number; kind and number say how it was made. The command runs in a fork of its own, so that
a file which brings down a library, or never ends, is a failure like others.
"""

import contextlib
import json
import os
import random
import resource
import sys
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import h5py
import numpy as np
from PIL import Image

from snn.cli.main import main
from snn.data import apart, models
from snn.data import h5 as data
from snn.local import training
from snn.maths import model, network
from snn.maths.parameters import from_dict

PICTURES = ("jpeg", "png", "gif", "webp", "tiff", "bmp")
KINDS = ("data", "classes", "model", "parameters", *PICTURES)
VALUES = {
    "epochs": 2,
    "layers": 2,
    "neurons": {"layer1": 3, "layer2": 1},
    "activations": {"layer1": "relu", "layer2": "sigmoid"},
    "learning_rate": 0.01,
    "batch_size": 8,
    "threshold": 0,
    "granularity": "layer",
}
PROCESSOR = 20  # seconds that a command may take; it takes a hundredth


def datasets() -> data.Datasets:
    rng = np.random.default_rng(1)
    images = lambda m: rng.integers(0, 256, (m, 8, 8, 3)).astype(np.uint8)
    return data.Datasets(images(24), np.arange(24) % 2, images(8), np.arange(8) % 2)


def whole(kind: str, folder: Path) -> bytes:
    "The file that is changed."
    path, chosen = folder / f"whole-{kind}", from_dict(VALUES)
    if kind in PICTURES:
        Image.fromarray(datasets().train_x.reshape(48, 32, 3)).save(path, kind)
    elif kind == "model":
        layers = [layer[:2] for layer in network.initialise(chosen, 192)]
        models.write(model.Model(chosen, layers, size=8), path)
    elif kind == "parameters":
        path.write_text(json.dumps(VALUES))
    else:
        data.write(datasets(), path)
    if kind == "classes":  # names as text in a heap, where `data` has bytes in place
        with h5py.File(path, "r+") as file:
            del file["list_classes"]
            file["list_classes"] = ["non-cat", "cat"]
    return path.read_bytes()


def changed(content: bytes, chance: random.Random) -> bytes:
    "Some bytes are others; now and then the end is missing, or a part is there twice or not at all."
    new = bytearray(content)
    for _ in range(chance.choice((1, 4, 30))):
        new[chance.randrange(len(new))] = chance.choice((chance.randrange(256), 0, 255, 0x39))
    at, end = sorted(chance.randrange(len(new)) for _ in range(2))
    way = chance.random()
    if way < 0.1:
        return bytes(new[:end])
    if way < 0.2:
        return bytes(new[:at] + new[end:])
    return bytes(new[:end] + new[at:] if way < 0.3 else new)


def command(kind: str, file: Path, folder: Path) -> list[str | Path]:
    "What a user does with such a file."
    out = folder / "made"
    if kind in PICTURES:
        return ["predict", "--model", folder / "whole-model", file]
    if kind == "model":
        return ["predict", "--model", file, folder / "whole-png"]
    if kind == "parameters":
        return ["train", "--data", folder / "whole-data", "--parameters", file, "--out", out]
    return ["data", "join", file, file, "--out", out]


def in_a_fork(work, output: Path) -> int:
    "Do something in a process of its own that prints into files; returns its end, negative for a signal."
    if process := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CPU, (PROCESSOR, PROCESSOR))
    for number in (1, 2):
        os.dup2(os.open(f"{output}-{number}", os.O_CREAT | os.O_TRUNC | os.O_WRONLY), number)
    code = 70  # a traceback
    try:
        work()
        code = 0
    except SystemExit as end:
        code = end.code or 0
    finally:
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(code)


def look_in_a_fork(arguments: list, **_) -> object:
    "As `subprocess.run` for `try_apart`, a hundred times as fast."
    program, output = arguments[-1], Path(os.environ["FUZZING"], "look")
    code = in_a_fork(lambda: exec(program), output)
    return type("Ended", (), {"returncode": code})


class Case(NamedTuple):
    "What a command made of a file."

    code: int
    out: str
    err: str
    left: list[str]  # files that were not there before

    def wrong(self, name: str) -> str:  # empty if nothing is
        "What no file may bring about."
        if self.code not in (0, 2):
            return f"ended with {self.code}"
        if "Traceback" in self.out + self.err:
            return "a traceback"
        if any(one != "made" for one in self.left) or self.code and self.left:
            return f"left {self.left}"
        if self.code and (self.out or len(self.err.splitlines()) != 1 or name not in self.err):
            return "not one sentence that names the file"
        return ""


def tried(kind: str, content: bytes, folder: Path) -> Case:
    "Give a file to its command."
    file, before = folder / "changed", set(os.listdir(folder))
    file.write_bytes(content)
    sys.argv = ["snn", *map(str, command(kind, file, folder))]
    code = in_a_fork(main, folder / "said")
    out, err = ((folder / f"said-{n}").read_text(errors="replace") for n in (1, 2))
    known = before | {"changed", "said-1", "said-2", "look-1", "look-2"}
    left = sorted(set(os.listdir(folder)) - known)
    for name in left:
        (folder / name).unlink()
    return Case(code, out, err, left)


def import_all(kind: str, content: bytes, folder: Path) -> None:
    "Run the command once in this process, so that no fork has to import anything."
    file = folder / "changed"
    file.write_bytes(content)
    sys.argv = ["snn", *map(str, command(kind, file, folder))]
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        with contextlib.redirect_stderr(nowhere), contextlib.suppress(SystemExit):
            main()
    (folder / "made").unlink(missing_ok=True)


def fuzz(kind: str, folder: Path, first: int, count: int, seconds: float) -> dict:
    "Try some cases; returns how many ended how, and what was wrong."
    os.environ["FUZZING"] = str(folder)
    apart.subprocess = type("Subprocess", (), {"run": look_in_a_fork, "DEVNULL": None})
    apart.SECONDS = 1
    training.train = lambda *_, **__: sys.exit(0)  # it would begin: the parameters are good
    for each in ("data", "model", "png"):
        whole(each, folder)
    content, ends, wrong = whole(kind, folder), Counter(), []
    import_all(kind, content, folder)
    stop = time.monotonic() + seconds
    for number in range(first, first + count):
        if time.monotonic() > stop:
            break
        case = tried(kind, changed(content, random.Random(f"{kind} {number}")), folder)
        ends[case.code] += 1
        if why := case.wrong("changed"):
            wrong.append([number, why, case.err[-300:]])
    return {"kind": kind, "cases": sum(ends.values()), "ends": ends, "wrong": wrong}


if __name__ == "__main__":
    place, count, seconds, first = sys.argv[1:] + [None, "60", "inf", "0"][len(sys.argv) - 1 :]
    for kind in KINDS:
        print(json.dumps(fuzz(kind, Path(place), int(first), int(count), float(seconds))))
