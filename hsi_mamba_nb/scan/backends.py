"""One selective scan, several ways to compute it: chosen by device, dtype and shape, or by name."""
import os
import warnings
from functools import lru_cache
from importlib.util import find_spec

import torch
from torch import Tensor

from hsi_mamba_nb.errors import InputError
from hsi_mamba_nb.scan.selection import check_scan_inputs, selective_scan_ref

__all__ = ["available_backends", "selective_scan", "why_not_triton"]

_THERE = {name: find_spec(name) is not None for name in ("numba", "triton", "mamba_ssm")}  # once: a compiled graph cannot ask


def _torch(*args, **options):
    from hsi_mamba_nb.scan.parallel_scan import selective_scan_torch
    return selective_scan_torch(*args, **options)


def _numba(*args, **options):
    from hsi_mamba_nb.scan.cpu_kernel import selective_scan_numba
    return selective_scan_numba(*args, **options)


def _triton(*args, **options):
    if not _THERE["triton"]:
        raise InputError('selective_scan: backend \'triton\' needs triton; pip install "hsi-mamba-nb[gpu]" (Linux), or use backend=\'auto\'')
    from hsi_mamba_nb.scan.gpu_scan import selective_scan_triton
    return selective_scan_triton(*args, **options)


def _mamba_ssm(u, delta, A, B, C, D, z, delta_bias, delta_softplus, return_last_state, seq_idx):
    "The authors' CUDA kernel, through their own function; it has no resets."
    if seq_idx is not None:
        raise InputError("selective_scan: mamba_ssm's kernel knows no seq_idx; use backend='triton' or 'torch'")
    if not u.is_cuda and "mamba_ssm" not in available_backends():
        raise InputError(f"selective_scan: the mamba_ssm backend runs on an NVIDIA GPU, u is on {u.device}; use backend='auto'")
    try:
        from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
    except ImportError as e:
        raise InputError(f"selective_scan: backend 'mamba_ssm' cannot be used ({e}); its 2.x releases have it: pip install \"hsi-mamba-nb[mamba-ssm]\"") from None
    wide = lambda x: x if x is None else x.float()  # its parameters are 32 bits whatever the input
    B, C = (x.float() if x.ndim == 2 else x for x in (B, C))
    return selective_scan_fn(u, delta, A.float(), B, C, wide(D), z, wide(delta_bias), delta_softplus, return_last_state)


_BACKENDS = {"ref": selective_scan_ref, "torch": _torch, "numba": _numba, "triton": _triton, "mamba_ssm": _mamba_ssm}


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")


@lru_cache(None)
def why_not_triton(index: int = 0) -> str:  # empty where it can
    "Why the Triton kernel cannot be used on a CUDA device: found out by one small scan against the loop."
    if not _THERE["triton"]:
        return "triton is not installed"
    try:
        with torch.inference_mode(False), torch.enable_grad(), torch.autocast("cuda", enabled=False):
            g = torch.Generator().manual_seed(0)
            x = [torch.rand(*shape, generator=g)*size for shape, size in (((1, 4, 130), 1), ((1, 4, 130), .1), ((4, 4), -1), ((1, 4, 130), 1), ((1, 4, 130), 1))]  # 130 steps: two spans
            found = []
            for scan, device in ((_triton, f"cuda:{index}"), (selective_scan_ref, "cpu")):
                leaves = [v.to(device).requires_grad_() for v in x]
                y = scan(*leaves, None, None, None, False, False, None)
                found.append([v.detach().cpu() for v in (y, *torch.autograd.grad(y.square().sum(), leaves))])
        error = max(float((a - b).norm()/b.norm()) for a, b in zip(*found))
        return "" if error < 1e-4 else f"its result is off by {error:.0e}"
    except Exception as e:  # whatever a compiler, a driver or a card may say
        return f"{type(e).__name__}: {' '.join(str(e).split())[:120]}"


@torch.compiler.assume_constant_result
def _on_gpu(index: int) -> str:
    "triton where it works; otherwise one line of warning, once, and the next best."
    why = why_not_triton(index)
    if why:
        _warn_once(index, why)
    return "torch" if why else "triton"


@lru_cache(None)
def _warn_once(index, why):
    warnings.warn(f"cuda:{index}: the Triton scan cannot be used ({why}); using the slower chunked scan", stacklevel=5)


def available_backends() -> list[str]:
    "Names that `selective_scan(backend=...)` takes here: ref (the loop), torch (chunked, any device), numba (CPU), triton and mamba_ssm (GPU)."
    gpu = torch.cuda.is_available()
    works = {"numba": _THERE["numba"], "triton": _THERE["triton"] and (_interpreted() or gpu and not why_not_triton(torch.cuda.current_device())),
             "mamba_ssm": _THERE["mamba_ssm"] and gpu}
    return [name for name in _BACKENDS if works.get(name, True)]


def _choose(u: Tensor) -> str:
    "What computes in float32 where that is enough: numba on a CPU, triton on a GPU. Otherwise the loop where it is short, else chunks."
    if u.dtype != torch.float64:
        if u.device.type == "cpu" and _THERE["numba"]:
            return "numba"
        if u.is_cuda:
            return _on_gpu(u.device.index)
    return "ref" if u.shape[-1] <= 32 else "torch"


def selective_scan(
    u: Tensor,  # (b,d,l) input
    delta: Tensor,  # (b,d,l) step, before bias and softplus
    A: Tensor,  # (d,n) rates, negative where the state decays
    B: Tensor,  # (b,n,l), (b,g,n,l) for g groups of channels, or (d,n) constant in time
    C: Tensor,  # likewise
    D: Tensor | None = None,  # (d,) skip from input to output
    z: Tensor | None = None,  # (b,d,l) gate: the output is multiplied by silu(z)
    delta_bias: Tensor | None = None,  # (d,) added to delta
    delta_softplus: bool = False,  # step = softplus(delta + delta_bias)
    return_last_state: bool = False,  # also return the state after the last step
    seq_idx: Tensor | None = None,  # (b,l) integers: the state is reset where they change
    backend: str = "auto",  # "auto" or one of `available_backends()`
):  # y (b,d,l) of u's dtype, and with return_last_state the state (b,d,n)
    """The selective scan h_t = exp(step_t A) h_(t-1) + step_t B_t u_t, y_t = <C_t, h_t> + D u_t, with mamba_ssm's layout and meaning.

    The state is float32, or float64 where u is and the backend is "ref" or "torch". Gradients for every tensor but seq_idx; a second
    derivative with "ref" and "torch", forward mode with "ref". No state crosses a reset; with "torch" a value that is not finite does.
    Raises `InputError` that names the argument."""
    if backend != "auto" and backend not in _BACKENDS:
        raise InputError(f"selective_scan: no backend {backend!r}; here are auto, {', '.join(available_backends())}")
    check_scan_inputs(u, delta, A, B, C, D, z, delta_bias, seq_idx)
    name = _choose(u) if backend == "auto" else backend
    return _BACKENDS[name](u, delta, A, B, C, D, z, delta_bias, delta_softplus, return_last_state, seq_idx)
