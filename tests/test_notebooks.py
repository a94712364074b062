"""Every notebook runs, alone, from a fresh kernel, within its time."""
import subprocess
import sys
from importlib.util import find_spec

import gate
import pytest
from alone import run_alone
from conftest import ROOT
from fastcore.nbio import mk_cell, new_nb, write_nb
from run_notebooks import clean

NOTEBOOKS = gate.notebooks()
each = pytest.mark.parametrize("path", NOTEBOOKS, ids=[p.relative_to(ROOT/"nbs").as_posix() for p in NOTEBOOKS])


def notebook(path, *cells):
    write_nb(new_nb([mk_cell(c) for c in cells]), path)
    return path


@each
def test_runs(path, tmp_path):
    if "24_gpu_scan" in path.name and find_spec("triton") is None: pytest.skip("Triton is for Linux")
    run_alone(path, tmp_path)


@each
def test_is_clean(path, tmp_path):
    copy = tmp_path/path.name
    copy.write_bytes(path.read_bytes())
    clean(copy)
    same = copy.read_bytes() == path.read_bytes()  # pytest would spend minutes on what differs
    assert same, f"python tools/run_notebooks.py {path.relative_to(ROOT)}"


def test_hooks_change_nothing(tmp_path):
    "What nbdev's hooks would write on saving is what is committed."
    (tmp_path/"pyproject.toml").write_bytes((ROOT/"pyproject.toml").read_bytes())
    for i, path in enumerate(NOTEBOOKS): (tmp_path/f"{i}.ipynb").write_bytes(path.read_bytes())
    subprocess.run([sys.executable, "-c", "from nbdev.clean import nbdev_clean; nbdev_clean('.')"], cwd=tmp_path, check=True, timeout=600)
    changed = [p.name for i, p in enumerate(NOTEBOOKS) if (tmp_path/f"{i}.ipynb").read_bytes() != p.read_bytes()]
    assert not changed


def test_a_failing_cell_fails(tmp_path):
    (tmp_path/"empty").mkdir()
    with pytest.raises(AssertionError, match="two is not three"):
        run_alone(notebook(tmp_path/"wrong.ipynb", "1 + 1", "assert 2 == 3, 'two is not three'"), tmp_path/"empty")


def test_a_slow_notebook_fails(tmp_path):
    (tmp_path/"empty").mkdir()
    with pytest.raises(AssertionError, match="takes longer than 4 s"):
        run_alone(notebook(tmp_path/"slow.ipynb", "while True: pass"), tmp_path/"empty", limit=4)


def test_a_hanging_notebook_fails(tmp_path):
    (tmp_path/"empty").mkdir()
    with pytest.raises(AssertionError, match="hangs"):
        run_alone(notebook(tmp_path/"hangs.ipynb", "import time", "time.sleep(600)"), tmp_path/"empty", wall=5)
