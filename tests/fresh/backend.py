"""Builds what a stub of the project is installed from, without a network: links to the packages that are here already."""

import os
import tomllib
import zipfile
from pathlib import Path

INFO = {
    "METADATA": "Metadata-Version: 2.1\nName: snn\nVersion: 0\n",
    "WHEEL": "Wheel-Version: 1.0\nGenerator: stub\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    "entry_points.txt": "[console_scripts]\nsnn = snn.__main__:main\n",
}


def build_editable(wheel_directory, config_settings=None, metadata_directory=None):
    "A wheel that leads to the folder of the project, and to the packages of `packages`."
    here = Path(__file__).parent
    project = tomllib.loads((here / "pyproject.toml").read_text())["project"]
    files = {f"snn-0.dist-info/{name}": text for name, text in INFO.items()}
    files["snn-0.dist-info/METADATA"] += "".join(
        f"Requires-Dist: {name}\n" for name in project["dependencies"]
    )
    files["snn.pth"] = f"{here}\n{(here / 'packages').read_text()}\n"
    record = "".join(f"{name},,\n" for name in [*files, "snn-0.dist-info/RECORD"])
    with zipfile.ZipFile(
        os.path.join(wheel_directory, "snn-0-py3-none-any.whl"), "w"
    ) as wheel:
        for name, text in (files | {"snn-0.dist-info/RECORD": record}).items():
            wheel.writestr(name, text)
    return "snn-0-py3-none-any.whl"
