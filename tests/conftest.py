"""What every test finds: the real scenes, and one thread a process."""
import os
from pathlib import Path

import pytest

# The tensors here are small: on a busy machine threads only wait for each other. Two processes share the work instead.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "agg")

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def data():
    "The folder of real scenes; they carry other licences, so the project holds no copy."
    folder = Path(os.environ.get("HSI_DATA") or ROOT.parent/"shared"/"data")
    if not folder.is_dir():
        pytest.skip(f"no real scenes at {folder}; set HSI_DATA to a folder that holds them")
    return folder
