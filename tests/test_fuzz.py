"""2,000 broken files, in a process of their own: a reader that dies must not take the suite along. `make fuzz` tries 20,000."""
import os
import string
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from hsi_mamba_nb.errors import InputError
from hsi_mamba_nb.scene.formats import envi_header, parse_bands, read_file

HERE = Path(__file__).parent
quick = settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])


@pytest.mark.parametrize("seed", [0, 1])
def test_a_thousand_broken_files(seed):
    real = Path(os.environ.get("HSI_DATA") or HERE.parent.parent/"shared"/"data")
    done = subprocess.run([sys.executable, HERE/"fuzz.py", "--inputs", "1000", "--seed", str(seed), *(["--data", real] if (real/"gt_maps").is_dir() else [])],
                          capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, (done.stdout[-4000:], done.stderr[-2000:])
    assert "1,000 inputs" in done.stdout and ", 0 faults" in done.stdout


MARKS = [b"", b"\x93NUMPY\x01\x00", b"PK\x03\x04", b"MATLAB 5.0 MAT-file".ljust(124) + b"\x00\x01IM", b"\x89HDF\r\n\x1a\n", b"II*\0", b"MM\0*", b"ENVI\n"]


@quick
@given(st.sampled_from(MARKS), st.binary(max_size=600), st.sampled_from([".mat", ".tif", ".npy", ".npz", ".hdr", ""]))
def test_any_bytes_behind_any_mark(tmp_path, mark, body, end):
    for old in tmp_path.iterdir():
        old.unlink()
    path = tmp_path/f"file{end}"
    path.write_bytes(mark + body)
    try:
        read_file(path)
    except InputError as e:
        assert str(e).startswith(str(path)) and "\n" not in str(e)


WORDS = st.one_of(st.integers(-3, 10**18).map(str), st.floats().map(str), st.text(string.printable, max_size=12), st.sampled_from(["bsq", "bil", "bip", "1", "2", "4", "12", "{1, 2", "{}"]))
KEYS = ["samples", "lines", "bands", "header offset", "data type", "interleave", "byte order", "wavelength", "wavelength units", "bbl", "data ignore value",
        "band names", "class names", "map info", "coordinate system string", "file compression"]


@quick
@given(st.dictionaries(st.sampled_from(KEYS), WORDS))
def test_any_envi_header(tmp_path, facts):
    "Whatever the header says: a cube of the promised size, or one line."
    (tmp_path/"x.hdr").write_text("ENVI\n" + "".join(f"{k} = {v}\n" for k, v in ({"samples": 3, "lines": 2, "bands": 4, "data type": 1} | facts).items()), encoding="utf-8")
    (tmp_path/"x.img").write_bytes(bytes(range(48)))
    assert isinstance(envi_header(tmp_path/"x.hdr"), dict)
    try:
        found = read_file(tmp_path/"x.img")
    except InputError as e:
        assert "\n" not in str(e)
    else:
        assert all(1 <= np.asarray(a).nbytes <= 48 for a in found.arrays.values())


@quick
@given(st.sets(st.integers(1, 40), min_size=1))
def test_band_lists_round_trip(bands):
    assert parse_bands(",".join(map(str, bands)), 40) == tuple(sorted(bands))


@quick
@given(st.text(max_size=20), st.integers(1, 300))
def test_any_band_list(text, bands):
    try:
        assert all(1 <= b <= bands for b in parse_bands(text, bands))
    except InputError as e:
        assert "bands" in str(e)
