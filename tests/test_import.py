"""Importing is silent and cheap; a part's names load their module when used."""
import json
import subprocess
import sys

import gate
import pytest
from conftest import ROOT

HEAVY = ("torch", "numba", "triton", "matplotlib", "sklearn", "accelerate", "mamba_ssm")
PARTS = sorted(p.parent.name for p in (ROOT/gate.PACKAGE).glob("*/__init__.py"))
MODULES = [gate.PACKAGE] + [f"{gate.PACKAGE}.{name}" for name in ("errors", "files", "cli", *PARTS)]


def python(code, folder):
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, cwd=folder, timeout=900)
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    return done.stdout


@pytest.mark.parametrize("module", MODULES)
def test_import_is_silent_and_loads_nothing_heavy(module, tmp_path):
    shown = python(f"import {module}, sys, json; dir({module}); print(json.dumps([m for m in {HEAVY} if m in sys.modules]))", tmp_path)
    assert json.loads(shown) == []
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("part", PARTS)
def test_a_part_gives_the_names_it_lists(part, tmp_path):
    code = f"""import importlib, json
part = importlib.import_module("{gate.PACKAGE}.{part}")
missing = []
for name in part.__all__:
    try: getattr(part, name)
    except (AttributeError, ImportError) as e: missing.append(f"{{name}}: {{e}}")
assert set(part.__all__) <= set(dir(part))
assert not hasattr(part, "no_such_name")
print(json.dumps([len(part.__all__), missing]))"""
    count, missing = json.loads(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, timeout=900, check=True).stdout)
    assert count and not missing
