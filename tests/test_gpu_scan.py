"""The Triton kernels: right under the interpreter, compiled for three generations of cards, and what happens where they cannot run."""
import os
import subprocess
import sys
import types
from importlib.util import find_spec

import pytest
import torch
from conftest import ROOT
from test_scan import case

from hsi_mamba_nb.errors import InputError
from hsi_mamba_nb.scan import backends, selective_scan, selective_scan_ref

triton = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is for Linux")


def script(*args, **env):
    path = os.pathsep.join([str(ROOT/"tests"), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run([sys.executable, *map(str, args)], capture_output=True, text=True, cwd=ROOT, env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **env})
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@triton
@pytest.mark.parametrize("part, rows", [("grid", 48), ("more", 5)])
def test_interpreted_kernels_equal_the_loop(part, rows):
    assert script(ROOT/"tests"/"triton_grid.py", part).count("ok") == rows


@triton
def test_kernels_compile_for_cards_that_are_not_here():
    "Down to machine code, for a T4 (Colab's free card), an A100 and an H100; every combination of flags for the largest kernel."
    out = script(ROOT/"tests"/"triton_compile.py", TRITON_INTERPRET="0")
    rows = [line.split() for line in out.splitlines() if line.startswith("sm_")]
    assert {r[0] for r in rows} == {"sm_75", "sm_80", "sm_90"} and len(rows) == 3*5 + 8 + 8 + 2
    assert all(int(r[-1]) > 0 for r in rows)


def test_triton_says_why_not_on_a_cpu():
    x = {k: v.float() for k, v in case(4)[0].items()}
    with pytest.raises(InputError, match="triton"): selective_scan(**x, backend="triton")
    if not torch.cuda.is_available(): assert backends.why_not_triton()


def test_one_line_of_warning_and_the_next_best(monkeypatch):
    backends._warn_once.cache_clear()
    monkeypatch.setattr(backends, "why_not_triton", lambda index: "no such card")
    with pytest.warns(UserWarning, match="cuda:0: the Triton scan cannot be used .no such card.; using the slower"): assert backends._on_gpu(0) == "torch"
    assert backends._on_gpu(0) == "torch"  # said once


def test_mamba_ssm_is_called_as_it_wants_to_be(monkeypatch):
    "The package cannot be built here; a stand-in with its signature is the loop."
    seen = {}

    def selective_scan_fn(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, return_last_state=False):
        seen.update(A=A.dtype, D=D.dtype, B=B.dtype)
        return selective_scan_ref(u, delta, A, B, C, D, z, delta_bias, delta_softplus, return_last_state)
    x, rest = case(9, D=1, z=1, delta_bias=1, delta_softplus=True)
    with pytest.raises(InputError, match="mamba_ssm"): selective_scan(**x, **rest, backend="mamba_ssm")
    for name, holds in (("mamba_ssm", {}), ("mamba_ssm.ops", {}), ("mamba_ssm.ops.selective_scan_interface", dict(selective_scan_fn=selective_scan_fn))):
        module = types.ModuleType(name)
        vars(module).update(holds)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(backends, "available_backends", lambda: ["ref", "mamba_ssm"])
    half = {k: v.to(torch.bfloat16) for k, v in x.items()}
    y, h = selective_scan(**half, **rest, return_last_state=True, backend="mamba_ssm")
    assert y.dtype == torch.bfloat16 and h.shape == (3, 20, 5) and seen == dict(A=torch.float32, D=torch.float32, B=torch.bfloat16)
    f = {k: v.float() for k, v in x.items()}
    assert torch.equal(selective_scan(**f, **rest, backend="mamba_ssm"), selective_scan_ref(**f, **rest))
    with pytest.raises(InputError, match="seq_idx"): selective_scan(**f, seq_idx=torch.zeros(3, 9, dtype=torch.long), backend="mamba_ssm")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
@pytest.mark.parametrize("l", [1, 49, 1000])
def test_on_a_gpu(l):
    from test_scan import OPTIONS, check, run
    for options in OPTIONS.values():
        x, rest = case(l, **options)
        want = run("oracle", x, rest, torch.float64)
        move = lambda d: {k: v.cuda() if torch.is_tensor(v) else v for k, v in d.items()}
        got = run("triton", move(x), move(rest), torch.float32)
        check({k: v.cpu() for k, v in got.items()}, want, 1e-5)  # its exponential is not NumPy's
        check({k: v.cpu() for k, v in run("triton", move(x), move(rest), torch.bfloat16).items()}, want, .05)
