"""The wheel holds the package and nothing else, and a chapter runs with it alone."""
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
from email import message_from_bytes
from zipfile import ZipFile

import gate
import pytest
from alone import RUN, run_alone
from conftest import ROOT

EXTRAS = {"gpu", "mamba-ssm", "geo", "notebooks", "dev"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")  # a copy, so that no build/ is left in the project
    ignore = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist", "nbs", "_proc", "_docs", "runs")
    shutil.copytree(ROOT, folder/"project", ignore=ignore)
    done = subprocess.run([sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, folder/"project"], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def names(wheel): return ZipFile(wheel).namelist()


@pytest.fixture(scope="module")
def metadata(wheel, names): return message_from_bytes(ZipFile(wheel).read(next(n for n in names if n.endswith(".dist-info/METADATA"))))


def test_contents(wheel, names):
    assert {n.split("/")[0].split("-")[0] for n in names} == {gate.PACKAGE}
    inside = {n for n in names if n.startswith(f"{gate.PACKAGE}/")}
    assert inside == {p.relative_to(ROOT).as_posix() for p in (ROOT/gate.PACKAGE).rglob("*.py")} | {f"{gate.PACKAGE}/py.typed"}
    assert any(n.endswith("/LICENSE") for n in names)
    points = ZipFile(wheel).read(next(n for n in names if n.endswith("/entry_points.txt"))).decode()
    assert f"hsi-mamba = {gate.PACKAGE}.cli:main" in points and f"{gate.PACKAGE} = {gate.PACKAGE}._modidx:d" in points


def test_requirements_are_floors(metadata):
    needs = metadata.get_all("Requires-Dist")
    core = [n for n in needs if "extra ==" not in n]
    assert len(core) > 5 and all(re.fullmatch(r"[\w-]+>=[\d.]+", n) for n in core), core
    assert not [n for n in needs if re.search(r"[=~]=\s*\d", n.split(";")[0])], "a pin would replace what a notebook server has"
    assert set(metadata.get_all("Provides-Extra")) == EXTRAS
    assert metadata["Requires-Python"] == gate.PYPROJECT["project"]["requires-python"]
    assert metadata["License-Expression"] == gate.PYPROJECT["project"]["license"]


@pytest.fixture(scope="module")
def stranger(wheel, tmp_path_factory):
    "A python that has the wheel, and what it needs from here; a .pth in a borrowed folder is not read, so no editable install."
    env = tmp_path_factory.mktemp("stranger")/"env"
    venv.create(env, with_pip=False)
    python = env/"bin"/"python"
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index", wheel]
    subprocess.run(pip, check=True, timeout=900)
    site = subprocess.run([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], capture_output=True, text=True, check=True).stdout.strip()
    with open(f"{site}/borrowed.pth", "w") as f: f.write("\n".join({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}) + "\n")
    return python


def test_chapter_runs_with_the_wheel_alone(stranger, tmp_path):
    check = f"import {gate.PACKAGE} as p, sys; assert p.__file__.startswith(sys.prefix), p.__file__\n"
    run_alone(ROOT/"nbs"/"2_scan"/"20_recurrence.ipynb", tmp_path, python=stranger, code=check + RUN)


def test_command(stranger, tmp_path):
    done = subprocess.run([stranger.with_name("hsi-mamba"), "--help"], capture_output=True, text=True, cwd=tmp_path, timeout=900)
    assert done.returncode == 0 and "hsi-mamba" in done.stdout, done.stderr
