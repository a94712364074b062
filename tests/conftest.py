import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def data():
    "The folder of real scenes; they carry other licences, so the project holds no copy."
    folder = Path(os.environ.get("HSI_DATA") or ROOT.parent/"shared"/"data")
    if not folder.is_dir():
        pytest.skip(f"no real scenes at {folder}; set HSI_DATA to a folder that holds them")
    return folder
