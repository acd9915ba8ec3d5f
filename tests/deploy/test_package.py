import zipfile

import pytest

from snn.deploy import package as packages_
from snn.deploy.package import HANDLERS, LIMITS, build, cold_import
from snn.deploy.wheels import Target, build_folder, here

FORBIDDEN = {"h5py", "matplotlib", "nbdev", "boto3", "PIL", "rich", "typer"}


def test_the_same_files_give_the_same_bytes(packages, monkeypatch, tmp_path):
    monkeypatch.setattr(
        packages_, "cache_folder", lambda: tmp_path
    )  # of packages; the wheels are where they were
    again = build("training", here())
    assert (
        again.path != packages["training"].path and again.sha256 == packages["training"].sha256
    )


def test_packages_for_lambda_are_small_enough():
    for name, limit in LIMITS.items():
        built = build(name, Target())
        print(f"{name}: {built.zipped:,} bytes zipped, {built.unzipped:,} unzipped")
        assert built.zipped <= limit and built.unzipped < 250 * 2**20


def test_only_launch_carries_hdf5(packages):
    names = {
        name: set(zipfile.ZipFile(package.path).namelist())
        for name, package in packages.items()
    }
    assert any(n.startswith("h5py/") for n in names["launch"]) and not any(
        n.startswith("h5py") for n in names["training"]
    )
    for found in names.values():
        assert not {n.split("/")[0] for n in found} & {
            "boto3",
            "botocore",
            "matplotlib",
            "nbdev",
        }


def test_no_handler_imports_what_it_does_not_need_at_a_cold_start(packages):
    for name, modules in HANDLERS.items():
        for module in modules:
            measured = cold_import(packages[name], module, times=1)
            print(f"{module}: {measured.seconds * 1000:.0f} ms")
            assert not measured.modules & FORBIDDEN


def test_a_cold_start_of_a_neuron_imports_little(packages):
    "What takes a cold start's time is the number of modules: 170 of them are NumPy's, half of all are what redis and Powertools need."
    neuron, numpy = (
        cold_import(packages["training"], module, times=1)
        for module in ("snn.handlers.protocol", "numpy")
    )
    print(
        f"{len(neuron.modules)} modules, {neuron.seconds * 1000:.0f} ms; NumPy alone {len(numpy.modules)}, {numpy.seconds * 1000:.0f} ms"
    )
    assert (
        "aws_lambda_powertools" in neuron.modules
    )  # as on Lambda, where it tells of its invocations
    assert len(neuron.modules) <= 500


def test_powertools_work_without_what_was_left_out(packages):
    for module in ("aws_lambda_powertools.logging", "aws_lambda_powertools.metrics"):
        assert cold_import(packages["training"], module, times=1)


def test_our_modules_are_readable_and_compiled(packages):
    names = set(zipfile.ZipFile(packages["training"].path).namelist())
    tag = f"cpython-{here().python.replace('.', '')}"
    assert {
        "snn/handlers/neuron.py",
        f"snn/handlers/__pycache__/neuron.{tag}.pyc",
        "redis/client.pyc",
    } <= names
    assert not any(
        n.startswith(("snn/cli", "snn/local", "snn/deploy", "snn/serve")) for n in names
    )


@pytest.mark.parametrize("name", ["training", "launch", "runtime", "service"])
def test_every_wheel_is_pinned_by_its_hash(name):
    lines = (build_folder() / f"{name}.txt").read_text().splitlines()[1:]
    assert all("==" in line or line.strip().startswith("--hash=sha256:") for line in lines)
