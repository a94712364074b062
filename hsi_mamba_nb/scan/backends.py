"""One selective scan, several ways to compute it: chosen by device, dtype and shape, or by name."""
from importlib.util import find_spec

import torch
from torch import Tensor

from hsi_mamba_nb.errors import InputError
from hsi_mamba_nb.scan.selection import check_scan_inputs, selective_scan_ref

__all__ = ["available_backends", "selective_scan"]


def _torch(*args, **options):
    from hsi_mamba_nb.scan.parallel_scan import selective_scan_torch
    return selective_scan_torch(*args, **options)


def _numba(*args, **options):
    from hsi_mamba_nb.scan.cpu_kernel import selective_scan_numba
    return selective_scan_numba(*args, **options)


_BACKENDS = {"ref": selective_scan_ref, "torch": _torch, "numba": _numba}


def available_backends() -> list[str]:
    "Names that `selective_scan(backend=...)` takes here: ref (the loop), torch (chunked, any device), numba (compiled, CPU)."
    return [name for name in _BACKENDS if name != "numba" or find_spec("numba") is not None]


def _choose(u: Tensor) -> str:
    "numba for what it computes in: CPU, float32 or less. Otherwise the loop where it is short, else chunks."
    if u.device.type == "cpu" and u.dtype != torch.float64 and "numba" in available_backends():
        return "numba"
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

    The state is float32, or float64 where u is. Gradients for every tensor but seq_idx; a second derivative with "ref" and "torch",
    forward mode with "ref". No state crosses a reset; with "torch" a value that is not finite does. Raises `InputError` that names
    the argument."""
    if backend != "auto" and backend not in _BACKENDS:
        raise InputError(f"selective_scan: no backend {backend!r}; here are auto, {', '.join(available_backends())}")
    check_scan_inputs(u, delta, A, B, C, D, z, delta_bias, seq_idx)
    name = _choose(u) if backend == "auto" else backend
    return _BACKENDS[name](u, delta, A, B, C, D, z, delta_bias, delta_softplus, return_last_state, seq_idx)
