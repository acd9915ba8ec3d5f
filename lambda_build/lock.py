"""Writes the lock files anew: `python lambda_build/lock.py [NAME...]`, with the newest versions of what is named here.

A lock file names each wheel that may go into a package, by version and SHA-256, for every Python and platform that
packages are built for. pip refuses any other, so a package is made of the same files next year as today.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

PACKAGES = {
    "training": [
        "numpy",
        "redis",
        "hiredis",
        "msgspec",
        "aws-lambda-powertools",
    ],  # TrainerLambda and NeuronLambda
    "launch": ["numpy", "redis", "hiredis", "msgspec", "aws-lambda-powertools", "h5py"],
    "runtime": [
        "awslambdaric",
        "boto3",
    ],  # what Lambda itself provides, for functions on this machine
    "python311": [
        "async-timeout"
    ],  # redis needs it before 3.11.3; pip looks at its own Python there, not at the package's
    # The Prediction API's image, see infra/service/Dockerfile; setuptools installs snn itself and does not stay.
    "service": [
        "numpy",
        "h5py",
        "msgspec",
        "pillow",
        "typer",
        "rich",
        "fastapi",
        "uvicorn",
        "httptools",
        "uvloop",
        "python-multipart",
        "httpcore2",
        "prometheus-client",
        "redis",
        "setuptools",
    ],  # redis: the snn command imports it for its other uses
}
PYTHONS = {"service": ["3.13"], "python311": ["3.11"]}  # service: the image's own
ANY = ["3.11", "3.12", "3.13", "3.14"]
LINUX = [
    ["manylinux_2_28_aarch64", "manylinux_2_17_aarch64"],
    ["manylinux_2_28_x86_64", "manylinux_2_17_x86_64"],
]
PLATFORMS = {
    "training": [*LINUX, ["macosx_14_0_arm64"]],
    "launch": [*LINUX, ["macosx_14_0_arm64"]],
    "python311": LINUX,
    "runtime": LINUX,
    "service": LINUX,
}  # awslambdaric has no wheels for others


def resolve(names: list[str], python: str, platforms: list[str]) -> dict[str, str]:
    "What pip would install: `name==version` and its hash."
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable,
            "-m",
            "pip",
            "install",
            "--quiet",
            "--dry-run",
            "--ignore-installed",
            "--only-binary=:all:",
            "--python-version",
            python,
            "--implementation",
            "cp",
            *(f"--platform={p}" for p in platforms),
            "--target",
            folder,
            "--report",
            f"{folder}/report.json",
            *names,
        ]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        items = json.loads(Path(folder, "report.json").read_text())["install"]
    pin = lambda item: (
        f"{item['metadata']['name'].lower().replace('_', '-')}=={item['metadata']['version']}"
    )
    return {
        pin(item): item["download_info"]["archive_info"]["hashes"]["sha256"] for item in items
    }


def lock(name: str) -> str:
    "The text of a lock file."
    hashes: dict[str, set[str]] = {}
    for python in PYTHONS.get(name, ANY):
        for platforms in PLATFORMS[name]:
            for pin, digest in resolve(PACKAGES[name], python, platforms).items():
                hashes.setdefault(pin, set()).add(digest)
    lines = [
        " \\\n".join([pin, *(f"    --hash=sha256:{digest}" for digest in sorted(hashes[pin]))])
        for pin in sorted(hashes)
    ]
    return (
        "# Written by lock.py; which wheels go into the package.\n" + "\n".join(lines) + "\n"
    )


if __name__ == "__main__":
    for name in sys.argv[1:] or PACKAGES:
        Path(__file__).with_name(f"{name}.txt").write_text(lock(name))
        print(f"{name}.txt")
