"""Every backend of the selective scan against the loop in float64: values, all gradients, and what goes wrong at the edges."""
import os
import subprocess
import sys

import pytest
import torch

from hsi_mamba_nb.errors import InputError
from hsi_mamba_nb.scan import available_backends, selective_scan, selective_scan_ref

LENGTHS = (1, 2, 31, 49, 81, 128, 1000)
OPTIONS = {  # which optional inputs a case has
    "plain": {},
    "all": dict(D=1, z=1, delta_bias=1, delta_softplus=True),
    "packed": dict(D=1, seq_idx=1, delta_softplus=True),
    "all packed": dict(D=1, z=1, delta_bias=1, delta_softplus=True, seq_idx=1),
    "gate": dict(z=1),
    "groups": dict(D=1, groups=2, z=1),
    "fixed C": dict(D=1, fixed="C"),
    "fixed BC": dict(fixed="BC", delta_bias=1, z=1, seq_idx=1),
}


def case(l, b=3, d=20, n=5, groups=None, fixed="", seed=0, **options):
    "Inputs by name, float64, and the options that are no tensors."
    g = torch.Generator().manual_seed(seed + l)
    r = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)
    part = lambda name: r(d, n) if name in fixed else r(b, groups, n, l) if groups else r(b, n, l)
    x = dict(u=r(b, d, l), delta=r(b, d, l) if options.get("delta_softplus") else torch.rand(b, d, l, generator=g, dtype=torch.float64)*.3,
             A=-torch.rand(d, n, generator=g, dtype=torch.float64)*6 - .05, B=part("B"), C=part("C"))
    for name, shape in dict(D=(d,), z=(b, d, l), delta_bias=(d,)).items():
        if options.get(name): x[name] = r(*shape)
    if "delta_bias" in x and not options.get("delta_softplus"): x["delta_bias"] = x["delta_bias"].abs()*.1  # a negative step would grow, not decay
    rest = dict(delta_softplus=bool(options.get("delta_softplus")))
    if options.get("seq_idx"): rest["seq_idx"] = torch.randint(0, 4, (b, l), generator=g).sort(1).values
    return {k: v.float().double() for k, v in x.items()}, rest


def run(backend, x, rest, dtype, last=True):
    "Output, last state, and gradients of a random projection of both."
    leaves = {k: v.detach().to(dtype).requires_grad_() for k, v in x.items()}
    scan = selective_scan_ref if backend == "oracle" else lambda **k: selective_scan(**k, backend=backend)
    y, h = scan(**leaves, **rest, return_last_state=True)
    g = torch.Generator().manual_seed(7)
    loss = (y.double()*torch.randn(y.shape, generator=g, dtype=torch.float64)).sum()
    if last: loss = loss + (h.double()*torch.randn(h.shape, generator=g, dtype=torch.float64)).sum()
    return dict(y=y, last=h) | dict(zip((f"d{k}" for k in leaves), torch.autograd.grad(loss, list(leaves.values()))))


def check(got, want, limit=2e-6):
    for name, w in want.items():
        g, w = got[name].detach().double(), w.detach()
        assert torch.isfinite(g).all(), name
        error = float((g - w).norm())
        assert error <= limit*float(w.norm()) or error < 1e-30 and float(w.norm()) == 0, (name, error/float(w.norm().clamp_min(1e-300)))


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("l", LENGTHS)
def test_grid(l, name):
    x, rest = case(l, **OPTIONS[name])
    want = run("oracle", x, rest, torch.float64)
    for backend in available_backends(): check(run(backend, x, rest, torch.float32), want)


@pytest.mark.parametrize("backend", available_backends())
@pytest.mark.parametrize("b, d, n, l", [(1, 1, 1, 3), (2, 130, 16, 40), (1, 64, 16, 700), (9, 33, 4, 17)])
def test_sizes(backend, b, d, n, l):
    "Blocks that are not full, one channel, several ranges of blocks."
    x, rest = case(l, b=b, d=d, n=n, D=1, z=1, delta_softplus=True)
    check(run(backend, x, rest, torch.float32), run("oracle", x, rest, torch.float64))


def test_a_sequence_of_several_windows():
    "The kernel's backward pass goes window by window through 8192 steps each; cut and chained, the loop is its oracle."
    x, rest = case(9000, b=1, d=34, n=3, D=1, z=1, delta_softplus=True)
    check(run("numba", x, rest, torch.float32), run("oracle", x, rest, torch.float64), 5e-6)


@pytest.mark.parametrize("backend", available_backends())
class TestEveryBackend:
    def test_no_state_crosses_a_reset(self, backend):
        x, _ = case(30)
        rest = dict(seq_idx=torch.tensor([[0]*11 + [4]*19]*3))
        whole = selective_scan(**x, **rest, backend=backend)
        cut = lambda t, s: t[..., s] if t.ndim == 3 else t
        parts = [selective_scan(**{k: cut(v, s) for k, v in x.items()}, backend=backend) for s in (slice(0, 11), slice(11, 30))]
        assert torch.allclose(whole, torch.cat(parts, -1), rtol=1e-5, atol=1e-6)
        x["u"][..., :11] = 1e30  # however large
        assert torch.allclose(selective_scan(**x, **rest, backend=backend)[..., 11:], parts[1], rtol=1e-5, atol=1e-6)

    def test_any_strides(self, backend):
        x, rest = case(40, d=32, D=1, z=1)
        want = selective_scan(**{k: v.float() for k, v in x.items()}, backend=backend)
        views = dict(x)
        for k in ("u", "delta", "z"):
            views[k] = x[k].float().transpose(1, 2).contiguous().transpose(1, 2)  # (b,l,d) storage
        wide = torch.zeros(3, 64, 80)
        wide[:, ::2, ::2] = x["u"].float()
        for u in (views["u"], wide[:, ::2, ::2], x["u"].float().flip(0).flip(0)):
            got = selective_scan(**{k: v.float() for k, v in (views | dict(u=u)).items()}, backend=backend)
            assert torch.allclose(got, want, rtol=1e-5, atol=1e-5)

    def test_empty_batch(self, backend):
        x, rest = case(7)
        x = {k: (v[:0] if v.ndim == 3 else v).float().requires_grad_() for k, v in x.items()}
        y = selective_scan(**x, backend=backend)
        assert y.shape == (0, 20, 7)
        y.sum().backward()
        assert all(v.grad.shape == v.shape and not v.grad.any() for v in x.values())

    def test_steps_that_forget_everything_and_steps_that_do_nothing(self, backend):
        x, _ = case(50)
        for scale in (1e4, 1e-8):
            x["delta"] = torch.full_like(x["delta"], scale)
            want = run("oracle", x, {}, torch.float64)
            got = run(backend, x, {}, torch.float32)
            check({k: got[k] for k in ("y", "last", "du", "dB", "dC")}, {k: want[k] for k in ("y", "last", "du", "dB", "dC")}, 1e-5)
            assert all(torch.isfinite(v).all() for v in got.values())

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_precision_in_and_out_keeps_a_float32_state(self, backend, dtype):
        x, rest = case(200, **OPTIONS["all"])
        low = {k: v.to(dtype) for k, v in x.items()}
        y, last = selective_scan(**low, **rest, return_last_state=True, backend=backend)
        assert y.dtype == dtype and last.dtype == torch.float32
        want, h = selective_scan_ref(**{k: v.double() for k, v in low.items()}, **rest, return_last_state=True)
        assert (last.double() - h).norm() < 2e-6*h.norm() and (y.double() - want).norm() < torch.finfo(dtype).eps*want.norm()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y, last = selective_scan(**{k: v.float() for k, v in low.items()}, **rest, return_last_state=True, backend=backend)
        assert y.dtype == torch.float32 and (last.double() - h).norm() < 2e-6*h.norm()

    def test_the_same_bits_twice(self, backend):
        x, rest = case(300, b=2, d=100, n=16, **OPTIONS["all packed"])
        a, b = (run(backend, x, rest, torch.float32) for _ in range(2))
        assert all(torch.equal(a[k], b[k]) for k in a)

    def test_an_unused_last_state_or_output(self, backend):
        x, rest = case(20)
        for pick in (0, 1):
            grads = []
            for dtype, name in ((torch.float64, "ref"), (torch.float32, backend)):
                leaves = {k: v.to(dtype).requires_grad_() for k, v in x.items()}
                out = selective_scan(**leaves, return_last_state=True, backend=name)[pick]
                grads.append(torch.autograd.grad(out.square().sum(), list(leaves.values()), allow_unused=True, materialize_grads=True))
            for a, b in zip(*grads): assert (a - b).norm() <= 5e-6*a.norm()

    def test_under_torch_compile(self, backend):
        x, rest = case(12, **OPTIONS["all"])
        x = {k: v.float().requires_grad_() for k, v in x.items()}
        f = lambda u: (selective_scan(**(x | dict(u=u)), **rest, backend=backend)*2).sum()
        g = torch.compile(f, fullgraph=True, backend="aot_eager")
        assert torch.allclose(f(x["u"]), g(x["u"]), rtol=1e-5)
        assert torch.allclose(torch.autograd.grad(f(x["u"]), x["u"])[0], torch.autograd.grad(g(x["u"]), x["u"])[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", ["ref", "numba"])  # torch multiplies by 0, which an infinite value survives: its docstring says so
def test_a_broken_sequence_spoils_no_other(backend):
    x, _ = case(30)
    x["u"][..., 5] = torch.inf
    x = {k: v.float().requires_grad_() for k, v in x.items()}
    y = selective_scan(**x, seq_idx=torch.tensor([[0]*11 + [4]*19]*3), backend=backend)
    grads = torch.autograd.grad(y[..., 11:].sum(), [x["u"], x["delta"]])
    assert torch.isfinite(y[..., 11:]).all() and all(torch.isfinite(g[..., 11:]).all() for g in grads)


@pytest.mark.parametrize("backend", ["ref", "torch"])
def test_second_derivatives(backend):
    x, rest = case(5, b=1, d=2, n=2, **OPTIONS["all packed"])
    f = lambda *v: selective_scan(**dict(zip(x, v)), **rest, backend=backend)
    leaves = tuple(v.requires_grad_() for v in x.values())
    assert torch.autograd.gradcheck(f, leaves) and torch.autograd.gradgradcheck(f, leaves)


def test_numba_says_that_it_has_no_second_derivative():
    x, rest = case(5)
    u = x["u"].float().requires_grad_()
    y = selective_scan(**{k: v.float() for k, v in x.items()} | dict(u=u), backend="numba")
    g, = torch.autograd.grad(y.square().sum(), u, create_graph=True)
    with pytest.raises(InputError, match="backend='ref' or 'torch'"): g.sum().backward()


def test_numba_says_that_it_has_no_forward_mode():
    x, _ = case(5)
    f = {k: v.float() for k, v in x.items()}
    with pytest.raises(InputError, match="forward-mode"): torch.func.jvp(lambda u: selective_scan(**f | dict(u=u), backend="numba"), (f["u"],), (f["u"],))
    with torch.autograd.forward_ad.dual_level(), pytest.raises(InputError, match="forward-mode"):
        selective_scan(**f | dict(u=torch.autograd.forward_ad.make_dual(f["u"], f["u"])), backend="numba")


def test_numba_operator_is_what_torch_expects():
    from hsi_mamba_nb.scan.cpu_kernel import _scan_op
    x, _ = case(20, b=2, d=40, n=4, D=1, z=1)
    f = {k: v.float().requires_grad_() for k, v in x.items()}
    args = (f["u"], f["delta"], f["A"], f["B"].detach()[:, None].requires_grad_(), f["C"].detach()[:, None].requires_grad_(), f["D"], f["z"], None, None, None, True, True)
    torch.library.opcheck(_scan_op, args)


def test_bits_do_not_depend_on_the_number_of_threads():
    x, rest = case(60, b=3, d=400, n=16, **OPTIONS["all"])
    before, runs = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            runs.append(run("numba", x, rest, torch.float32))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(runs[0][k], other[k]) for other in runs[1:] for k in runs[0])


def test_a_pool_of_our_own_does_what_torchs_threads_do(monkeypatch):
    from hsi_mamba_nb.scan import cpu_kernel
    x, rest = case(60, b=3, d=400, n=16, **OPTIONS["all"])
    before, runs = torch.get_num_threads(), []
    try:
        torch.set_num_threads(2)
        runs.append(run("numba", x, rest, torch.float32))
        with pytest.raises(ZeroDivisionError): cpu_kernel._spread(lambda lo, hi: lo//0, 4)
        monkeypatch.setattr(cpu_kernel, "_TEAM", [])
        runs.append(run("numba", x, rest, torch.float32))
        with pytest.raises(ZeroDivisionError): cpu_kernel._spread(lambda lo, hi: lo//0, 4)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(runs[0][k], runs[1][k]) for k in runs[0])


def test_a_forked_process_has_threads_of_its_own():
    if not hasattr(os, "fork"): pytest.skip("no fork here")
    code = ("import os, torch\nfrom hsi_mamba_nb.scan import selective_scan\ntorch.set_num_threads(2)\nx = torch.ones(4, 40, 9)\n"
            "go = lambda: selective_scan(x, x, -torch.ones(40, 3), torch.ones(4, 3, 9), torch.ones(4, 3, 9), backend='numba')\n"
            "y = go()\npid = os.fork()\nif pid == 0: os._exit(0 if torch.equal(go(), y) else 1)\nprint(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "0", done.stderr


def test_choice_and_refusals():
    x, _ = case(4)
    assert {"ref", "torch", "numba"} <= set(available_backends())
    with pytest.raises(InputError, match="no backend 'cuda'"): selective_scan(**x, backend="cuda")
    with pytest.raises(InputError, match="B"): selective_scan(**x | dict(B=x["B"][:, :, :-1]))
    with pytest.raises(InputError, match="d and l >= 1"): selective_scan(**x | dict(u=x["u"][:, :0]))
    with pytest.raises(InputError, match="delta"): selective_scan(**x | dict(delta=x["delta"][:1]))
    assert selective_scan(**x).dtype == torch.float64  # auto keeps what it is given
    assert torch.equal(selective_scan(**x), selective_scan(**x, backend="ref"))
    few = {k: v.float() for k, v in x.items()}
    assert torch.equal(selective_scan(**few), selective_scan(**few, backend="numba"))


def test_bench_runs(tmp_path):
    import json
    from test_cli import run as command
    done = command("bench", "scan", "--quick", "--repeats", 1, "--json", "b.json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path/"b.json").read_text())
    assert {r["backend"] for r in result["rows"]} >= {"ref", "torch", "numba"} and all(r["seconds"] > 0 for r in result["rows"])
    assert (result["whole"]["peak_memory_over_u"] or 0) < 50 and result["compile_seconds"] > 0 and "x mambapy" in done.stdout
