"""The Triton kernels under the interpreter, on a CPU, against the float64 loop; run by test_gpu_scan.py in a process of its own."""
import os
import sys
import warnings

os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton

import torch  # noqa: E402
from test_scan import OPTIONS, case, check, run  # noqa: E402

from hsi_mamba_nb.errors import InputError  # noqa: E402
from hsi_mamba_nb.scan import available_backends, plan_programs, selective_scan  # noqa: E402

warnings.simplefilter("ignore")


def same(l, name, **sizes):
    x, rest = case(l, **sizes, **OPTIONS[name])
    check(run("triton", x, rest, torch.float32), run("oracle", x, rest, torch.float64))
    print("ok", l, name, sizes)


def grid():
    for name in OPTIONS:
        for l in (1, 2, 31, 49, 81, 128): same(l, name, b=2 if l < 49 else 1)


def more():
    assert plan_programs(1, 1000, 20, 5)["spans"] == 13
    same(1000, "all packed", b=1)
    for b, d, n, l in ((1, 1, 1, 3), (2, 70, 16, 5), (1, 40, 3, 130)): same(l, "all", b=b, d=d, n=n)
    assert available_backends() == ["ref", "torch", "numba", "triton"]
    x, _ = case(20, b=2)
    few = {k: v.float() for k, v in x.items()}
    assert torch.equal(selective_scan(**few), selective_scan(**few, backend="numba"))  # auto does not take the interpreter
    empty = {k: v[:0] if v.ndim == 3 else v for k, v in few.items()}
    y, h = selective_scan(**empty, backend="triton", return_last_state=True)
    assert y.shape == (0, 20, 20) and h.shape == (0, 20, 5)
    for kind in (torch.float16, torch.bfloat16, torch.float64):
        y = selective_scan(**{k: v.to(kind) for k, v in x.items()}, backend="triton")
        assert y.dtype == kind and torch.isfinite(y).all()
    u = few["u"].clone().requires_grad_()
    slope, = torch.autograd.grad(selective_scan(**few | dict(u=u), backend="triton").square().sum(), u, create_graph=True)
    try: torch.autograd.grad(slope.sum(), u)
    except InputError as e: assert "second derivative" in str(e)
    else: raise AssertionError("a second derivative of what has none")
    huge = {k: v.clone() for k, v in few.items()} | dict(seq_idx=torch.tensor([[0]*9 + [1]*11]*2))
    huge["u"][..., :9] = 3e38
    huge["delta"][..., :9] = 30.
    part = {k: v[..., 9:] if v.ndim == 3 else v for k, v in few.items()}
    assert torch.allclose(selective_scan(**huge, backend="triton")[..., 9:], selective_scan(**part, backend="triton"), rtol=1e-5, atol=1e-6)  # inf stays before the border
    from hsi_mamba_nb.scan.gpu_scan import _scan_op
    f = {k: v.float().requires_grad_() for k, v in case(20, b=2, D=1, z=1)[0].items()}
    torch.library.opcheck(_scan_op, (f["u"], f["delta"], f["A"], f["B"].detach()[:, None].requires_grad_(), f["C"].detach()[:, None].requires_grad_(), f["D"], f["z"], None, None, None, True, True))
    f["A"] = f["A"].detach().T.contiguous().T.requires_grad_()  # not contiguous
    torch.library.opcheck(_scan_op, (f["u"], f["delta"], f["A"], f["B"].detach()[:, None], f["C"].detach()[:, None], None, None, None, None, None, False, True))
    half = {k: v.half() if v.ndim == 3 else v for k, v in few.items()}
    leaves = {k: v.clone().requires_grad_() for k, v in half.items()}
    y = selective_scan(**leaves, backend="triton")
    want = selective_scan(**{k: v.float() for k, v in half.items()}, backend="ref")
    assert y.dtype == torch.float16 and float((y.float() - want).norm()/want.norm()) < 1e-3
    assert all(g.dtype == v.dtype and torch.isfinite(g).all() for g, v in zip(torch.autograd.grad(y.float().sum(), list(leaves.values())), leaves.values()))
    compiled = torch.compile(lambda u: selective_scan(**few | dict(u=u), backend="triton"), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(few["u"]), selective_scan(**few, backend="triton"))
    from hsi_mamba_nb.scan import backends
    true = torch.Tensor.to
    torch.Tensor.to = lambda self, *a, **k: self.clone() if a and str(a[0]).startswith("cuda") else true(self, *a, **k)  # a card that is this processor
    with torch.inference_mode(): assert backends.why_not_triton(0) == ""
    torch.Tensor.to = true
    print("ok more")


if __name__ == "__main__": {"grid": grid, "more": more}[sys.argv[1]]()
