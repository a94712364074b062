"""How a compiled scan becomes an operator of torch: its gradient, and any call brought into the one form that kernels take."""
import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual
from torch.utils.flop_counter import register_flop_formula

from hsi_mamba_nb.errors import InputError

__all__ = ["differentiable", "through"]


def differentiable(scan, back, name: str) -> None:
    """Register `back` as the gradient of `scan`, a refusal as the gradient of `back`, and how many operations both take.

    scan(u, delta, A, B, C, D, z, delta_bias, W, seq_idx, softplus, save) -> y, last, saved;
    back(dy, dlast, saved, <the same without save>) -> nine slopes, of u to W."""
    def remember(ctx, inputs, output):
        *tensors, softplus, _ = inputs
        ctx.save_for_backward(*tensors, output[2])
        ctx.mark_non_differentiable(output[2])
        ctx.set_materialize_grads(False)
        ctx.softplus = softplus

    def gradient(ctx, dy, dlast, dsaved):
        *tensors, saved = ctx.saved_tensors
        if dy is None:  # only the last state was used
            dy = torch.zeros((), dtype=tensors[0].dtype, device=tensors[0].device).expand(tensors[0].shape)
        slopes = back(dy, dlast, saved, *tensors, ctx.softplus)
        return *(None if x is None else dx for x, dx in zip(tensors, slopes)), None, None, None

    def no_second(ctx, *_):
        raise InputError(f"selective_scan: the {name} backend has no second derivative; use backend='ref' or 'torch'")

    scan.register_autograd(gradient, setup_context=remember)
    back.register_autograd(no_second, setup_context=lambda ctx, inputs, output: None)
    ops = torch.ops.hsi_mamba_nb
    register_flop_formula(getattr(ops, f"selective_scan_{name}"))(_flops)
    register_flop_formula(getattr(ops, f"selective_scan_{name}_backward"))(lambda dy, dlast, saved, *args, **_: 3*_flops(*args))


def _flops(u, delta, A, *_, **__) -> int:
    "Nine a state, channel and step, from shapes (b,d,l) and (d,n): step times A, exponential, step times u times B, state, output."
    return 9*u[0]*u[1]*u[2]*A[1]


def through(scan, name: str, convert, u, delta, A, B, C, D, z, delta_bias, delta_softplus: bool, return_last_state: bool, seq_idx):
    "Call the operator `scan` with tensors put through `convert`, grouped B and C, and what is constant in time as W, read with the state."
    (b, d, l), n = u.shape, A.shape[1]
    tensors = [x for x in (u, delta, A, B, C, D, z, delta_bias) if x is not None]
    if not torch.compiler.is_compiling() and any(unpack_dual(x).tangent is not None for x in tensors):
        raise InputError(f"selective_scan: the {name} backend has no forward-mode derivative; use backend='ref'")
    groups = max(x.shape[1] if x.ndim == 4 else 1 for x in (B, C))
    fixed = [x.float() for x in (B, C) if x.ndim == 2]
    W = None if not fixed else fixed[0] if len(fixed) == 1 else fixed[0]*fixed[1]

    def full(x: Tensor) -> Tensor:  # (b,g,n,l)
        return torch.ones(n, device=x.device)[:, None].expand(b, groups, n, l) if x.ndim == 2 else convert(x if x.ndim == 4 else x[:, None])
    save = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
    D, z, delta_bias = (x if x is None else convert(x) for x in (D, z, delta_bias))
    y, last, _ = scan(convert(u), convert(delta), convert(A), full(B), full(C), D, z, delta_bias, W, seq_idx, delta_softplus, save)
    if B.ndim == 2:
        last = last*B.float()
    return (y.to(u.dtype), last) if return_last_state else y.to(u.dtype)
