"""The Mamba block against mambapy's and the loop in float64; packed, streamed, both ways, in 16 bits, and what it refuses."""
import copy
import io
import math

import pytest
import torch
from torch.func import functional_call

from hsi_mamba_nb.errors import InputError
from hsi_mamba_nb.scan import BiMamba, Mamba, init_weights, mamba_ref, selective_scan, short_conv, softplus
from hsi_mamba_nb.scan import mamba_block as module

SIZES = [dict(d_model=8), dict(d_model=33, d_state=5, d_conv=3, expand_factor=3), dict(d_model=16, d_conv=1, dt_rank=7, bias=True), dict(d_model=128, conv_bias=False)]


def theirs(**options):
    pytest.importorskip("mambapy")
    from mambapy.mamba import MambaBlock, MambaConfig
    return MambaBlock(MambaConfig(n_layers=1, **options))


def ours(backend="auto", **options):
    options = {"expand" if k == "expand_factor" else k: v for k, v in options.items()}
    return Mamba(**options, backend=backend)


def tokens(*size, seed=0, scale=1.): return scale*torch.randn(*size, generator=torch.Generator().manual_seed(seed))


def gradients(net, x, dtype=torch.float32, **options):
    "Output, and gradients of a random projection of it, by name."
    net, x = copy.deepcopy(net).to(dtype), x.detach().to(dtype).requires_grad_()
    y = net(x, **options)
    (y*tokens(*y.shape, seed=9).to(dtype)).sum().backward()
    return dict(y=y.detach(), x=x.grad) | {name: p.grad for name, p in net.named_parameters()}


def check(got, want, limit):
    assert got.keys() == want.keys()
    for name, w in want.items():
        error, size = float((got[name].double() - w.double()).norm()), float(w.double().norm())
        assert torch.isfinite(got[name]).all() and size > 0 and error <= limit*size, (name, error/size)


def finite(net, x, kind):
    net.zero_grad()
    x = x.detach().requires_grad_()
    with torch.autocast("cpu", dtype=kind): y = net(x)
    y.float().mean().backward()
    return y.isfinite().all() and x.grad.isfinite().all() and all(p.grad.isfinite().all() for p in net.parameters())


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_mambapy(sizes):
    torch.manual_seed(0)
    one = theirs(**sizes)
    two = ours(**sizes)
    two.load_state_dict(one.state_dict())
    for l in (1, 7, 49):
        x = tokens(3, l, sizes["d_model"])
        if l == 1:  # rates and older taps have no gradient there: compare values
            torch.testing.assert_close(two(x), one(x), rtol=1e-5, atol=1e-6)
            continue
        got, want = gradients(two, x), gradients(one, x, torch.float64)
        check(got, want, 2e-6)
    swapped = copy.deepcopy(two)
    with torch.no_grad(): swapped.D.mul_(1.0001)
    with pytest.raises(AssertionError): check(gradients(swapped, x), want, 2e-6)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_state_dicts_go_both_ways(sizes):
    one, two = theirs(**sizes), ours(**sizes)
    assert {k: v.shape for k, v in one.state_dict().items()} == {k: v.shape for k, v in two.state_dict().items()}
    one.load_state_dict(two.state_dict())
    assert all(torch.equal(v, two.state_dict()[k]) for k, v in one.state_dict().items())
    ours(**sizes).load_state_dict(one.state_dict())
    with pytest.raises(RuntimeError): ours(**sizes | dict(d_state=3)).load_state_dict(one.state_dict())


@pytest.mark.parametrize("backend", ["ref", "torch", "numba"])
@pytest.mark.parametrize("packed", [False, True])
def test_loop(backend, packed):
    torch.manual_seed(1)
    net, x = Mamba(6, 5, 3, 1.5, 2, bias=True, backend=backend), tokens(2, 11, 6)
    seq_idx = torch.tensor([[0]*4 + [1]*2 + [0]*5, [3]*1 + [2]*9 + [5]]) if packed else None
    got, x = gradients(net, x, seq_idx=seq_idx), x.double().requires_grad_()
    params = {name: p.detach().double().requires_grad_() for name, p in net.named_parameters()}
    y = mamba_ref(params, x, seq_idx)
    (y*tokens(*y.shape, seed=9)).sum().backward()
    check(got, dict(y=y.detach(), x=x.grad) | {name: p.grad for name, p in params.items()}, 2e-6)


@pytest.mark.parametrize("net", [Mamba(8, d_state=4), Mamba(8, d_state=4, d_conv=1), Mamba(8, d_state=4, d_conv=9), BiMamba(8, d_state=4)], ids=["4 taps", "1", "9", "both"])
@pytest.mark.parametrize("lengths", [(1,), (1, 1, 1), (5, 2, 9), (33, 16), (1, 48, 3)])
def test_packed_is_each_alone(net, lengths):
    x, seq_idx = tokens(2, sum(lengths), 8), torch.tensor([4, -1, 4])[:len(lengths)].repeat_interleave(torch.tensor(lengths)).expand(2, -1)
    class Apart(torch.nn.Module):
        def __init__(self, net): super().__init__(); self.net = net
        def forward(self, x): return torch.cat([self.net(v) for v in x.split(lengths, 1)], 1)
    got = gradients(net, x, seq_idx=seq_idx)
    want = {k.removeprefix("net."): v for k, v in gradients(Apart(net), x).items()}
    for name, w in want.items(): assert float((got[name] - w).norm()) <= 2e-6*float(w.norm()) + 1e-9, name


def test_seq_idx_keeps_infinities_apart():
    net, x, seq_idx = Mamba(8), tokens(1, 12, 8), torch.arange(12)[None]//5
    clean = net(x, seq_idx)
    x[:, 4] = torch.inf
    assert torch.equal(net(x, seq_idx)[:, 5:], clean[:, 5:]) and not net(x)[:, 5:].isfinite().all()


@pytest.mark.parametrize("options", [dict(), dict(d_conv=1), dict(conv_bias=False, bias=True), dict(dtype=torch.float64)], ids=str)
def test_step(options):
    net = Mamba(8, d_state=4, **options)
    x = tokens(3, 20, 8).to(net.D.dtype)
    state, out, first = net.allocate_state(3), [], None
    for t in range(20):
        y, state = net.step(x[:, t], state)
        out.append(y)
        if t == 9: first = state
    torch.testing.assert_close(torch.stack(out, 1), net(x), rtol=1e-4, atol=1e-6)
    kept = [v.clone() for v in first]
    a, b = (net.step(x[:, 10], first)[0] for _ in range(2))
    assert torch.equal(a, b) and torch.equal(a, out[10]) and all(torch.equal(v, w) for v, w in zip(first, kept))
    assert [tuple(v.shape) for v in state] == [(3, 16, options.get("d_conv", 4) - 1), (3, 16, 4)]


def test_both_directions():
    net, x = BiMamba(8), tokens(2, 13, 8)
    torch.testing.assert_close(net(x), (net.forth(x) + net.back(x.flip(1)).flip(1))/2)
    torch.manual_seed(0)
    x, worst = 4*torch.randn(2, 49, 32), []
    with torch.no_grad():
        for factor in (1, 2):  # mean, sum
            torch.manual_seed(0)
            z = x
            for _ in range(24): z = z + factor*BiMamba(32)(z)
            worst.append(z.abs().max())
    assert worst[0] < 1000 and not worst[1] < 1e6


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("d_model", [8, 128])
def test_large_activations_stay_finite(kind, d_model):
    torch.manual_seed(0)
    for net in (Mamba(d_model), BiMamba(d_model), Mamba(d_model, bias=True, backend="torch")):
        assert finite(net, tokens(2, 49, d_model, scale=1e4), kind)
        assert finite(net, torch.full((2, 49, d_model), 1e4), kind)
        assert finite(net, tokens(2, 49, d_model, scale=1e4), torch.float16)


def test_autocast_dtypes(monkeypatch):
    seen = []
    monkeypatch.setattr(module, "selective_scan", lambda *args, **options: (seen.append(args), selective_scan(*args, **options))[1])
    net, x = Mamba(16), tokens(2, 9, 16)
    exact = net(x)
    for kind, out, limit in ((torch.bfloat16, torch.bfloat16, .1), (torch.float16, torch.float32, 1e-6)):
        with torch.autocast("cpu", dtype=kind):
            y = net(x)
            state = net.allocate_state(2)
            for t in range(9): last, state = net.step(x[:, t], state)
        assert y.dtype == last.dtype == out and state[1].dtype == torch.float32
        for got, want in ((y, exact), (last, exact[:, -1])): assert (got.float() - want).norm() <= limit*want.norm()
    u_in = torch.nn.functional.linear(x.bfloat16(), net.in_proj.weight.bfloat16())[..., :32].mT  # before the taps, which are summed in float32
    u = torch.nn.functional.silu(short_conv(u_in.float(), net.conv1d.weight[:, 0], net.conv1d.bias)).bfloat16()
    assert torch.equal(seen[1][0], u)
    assert all(args[2].dtype == torch.float32 for args in seen) and [args[0].dtype for args in seen] == [torch.float32, torch.bfloat16, torch.float32]


SHORT, WIDE = (torch.float32, torch.bfloat16, torch.float16), torch.float64


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_crossed_dtypes(kind):
    "Any short weights with any short tokens, whole and streamed; float64 only with float64, which autocast leaves alone."
    torch.manual_seed(0)
    net, x = Mamba(16, bias=True), tokens(2, 9, 16)
    exact = net(x)
    for weights, inputs, out in [(w, i, torch.bfloat16 if kind == torch.bfloat16 else torch.float32) for w in SHORT for i in SHORT] + [(WIDE,)*3]:
        new, leaf = copy.deepcopy(net).to(weights), x.detach().to(inputs).requires_grad_()
        state = new.allocate_state(2)
        with torch.autocast("cpu", dtype=kind):
            y = new(leaf)
            for t in range(9): last, state = new.step(leaf[:, t], state)
        y.float().sum().backward()
        assert y.dtype == last.dtype == out and leaf.grad.dtype == inputs and all(p.grad.dtype == weights and p.grad.isfinite().all() for p in new.parameters())
        for got, want in ((y, exact), (last, exact[:, -1])): assert (got.double() - want).norm() <= (1e-5 if out == WIDE else .1)*want.norm(), (weights, inputs)
    for short in SHORT:
        for weights, inputs in ((WIDE, short), (short, WIDE)):
            new = copy.deepcopy(net).to(weights)
            for auto in (True, False):
                with torch.autocast("cpu", dtype=kind, enabled=auto):
                    with pytest.raises(InputError, match="x: expected .* like the block's weights, got .*; use x.to$"): new(x.to(inputs))
                    with pytest.raises(InputError, match="like the block's weights"): new.step(x[:, 0].to(inputs), new.allocate_state(2))


@pytest.mark.parametrize("l", [5, 50])
def test_meta(l):
    net = Mamba(8, device="meta")
    x = torch.zeros(2, l, 8, device="meta", requires_grad=True)
    for auto in (True, False):
        with torch.autocast("cpu", enabled=auto): y, (last, _) = net(x), net.step(x[:, 0], net.allocate_state(2))
        assert y.is_meta and y.shape == x.shape and last.is_meta and last.shape == (2, 8)
    y.sum().backward()
    assert x.grad.is_meta and net.A_log.grad.shape == net.A_log.shape


@pytest.mark.parametrize("kind", [None, torch.bfloat16], ids=str)
def test_mamba_ssm(kind):
    "The authors' own block, where it is installed: names, shapes and dtypes; outputs on a GPU, which its kernels need."
    pytest.importorskip("mamba_ssm", exc_type=ImportError)  # or one that this torch cannot load
    from mamba_ssm.modules.mamba_simple import Mamba as Theirs
    for options in (dict(), dict(d_state=8, d_conv=3, expand=1, dt_rank=5, conv_bias=False, bias=True)):
        one, two = (block(64, dtype=kind, **options) for block in (Theirs, Mamba))
        assert {k: (v.shape, v.dtype) for k, v in one.named_parameters()} == {k: (v.shape, v.dtype) for k, v in two.named_parameters()}
        two.load_state_dict(one.state_dict()), one.load_state_dict(two.state_dict())
        if not torch.cuda.is_available(): continue
        x = tokens(2, 49, 64).to("cuda", kind)
        got, want = two.cuda()(x).float(), one.cuda()(x).float()
        assert (got - want).norm() <= (1e-4 if kind is None else .05)*want.norm()


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16, torch.float64])
def test_converted_weights(kind):
    net, x = Mamba(16), tokens(2, 9, 16)
    exact, y = net(x), copy.deepcopy(net).to(kind)(x.to(kind))
    assert y.dtype == kind and (y.float() - exact).norm() < .05*exact.norm()
    assert gradients(net, x, kind)["A_log"].dtype == kind
    assert Mamba(8, dtype=kind).A_log.dtype == (torch.float64 if kind == torch.float64 else torch.float32)


def test_start():
    net = Mamba(256, dt_min=.002, dt_max=.05)
    step = softplus(net.dt_proj.bias.detach())
    assert .00199 < step.min() and step.max() < .0501 and abs(float((step < math.sqrt(.002*.05)).float().mean()) - .5) < .1
    torch.testing.assert_close(net.A_log.exp(), torch.arange(1., 17).expand(512, 16))
    assert (net.D == 1).all() and net.dt_proj.weight.abs().max() <= 16**-.5
    assert softplus(Mamba(8, dt_min=1e-9, dt_max=1e-8, dt_init_floor=.01).dt_proj.bias.detach()).allclose(torch.tensor(.01))
    torch.manual_seed(3); one = Mamba(8)
    torch.manual_seed(3); two = Mamba(8)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters()))


def marks(net): return sorted((name, mark) for name, p in net.named_parameters() for mark in ("_no_reinit", "_no_weight_decay") if getattr(p, mark, False))


def test_marks_and_model_wide_start():
    want, net = [("A_log", "_no_weight_decay"), ("D", "_no_weight_decay"), ("conv1d.bias", "_no_reinit"), ("conv1d.weight", "_no_reinit"), ("dt_proj.bias", "_no_reinit"), ("dt_proj.weight", "_no_reinit")], Mamba(8)
    stored = io.BytesIO()
    torch.save(net, stored); stored.seek(0)
    assigned = Mamba(8); assigned.load_state_dict(net.state_dict(), assign=True)
    for one in (net, copy.deepcopy(net), torch.load(stored, weights_only=False), net.double(), assigned, Mamba(8, device="meta").to_empty(device="cpu")): assert marks(one) == want
    with torch.device("meta"): assert marks(Mamba(8)) == want

    model = torch.nn.Sequential(torch.nn.Linear(3, 8), BiMamba(8), torch.nn.Conv2d(1, 1, 3))
    new = init_weights(copy.deepcopy(model))
    same = {name for name, p in new.named_parameters() if torch.equal(p, model.get_parameter(name))}
    assert same == {f"1.{way}.{name}" for way in ("forth", "back") for name in ("A_log", "D", "conv1d.weight", "conv1d.bias", "dt_proj.weight", "dt_proj.bias")}
    assert (new[0].bias == 0).all() and (new[2].bias == 0).all()
    assert marks(Mamba(8, conv_bias=False)) == [m for m in want if m[0] != "conv1d.bias"]
    naive = copy.deepcopy(model)
    naive.apply(lambda m: torch.nn.init.zeros_(m.bias) if isinstance(m, torch.nn.Linear) and m.bias is not None else None)
    assert softplus(naive[1].forth.dt_proj.bias.detach()).min() > .69  # what the marks prevent


def test_model_wide_start_keeps_the_output_alive():
    "Drawing the taps anew as well would leave a few thousandths of it."
    torch.manual_seed(0)
    net, x = Mamba(128), tokens(4, 49, 128)
    fresh, new = net(x).std(), init_weights(copy.deepcopy(net))(x).std()
    for p in net.conv1d.parameters(): del p._no_reinit
    starved = init_weights(net)(x).std()
    assert fresh/20 < new < fresh and starved < fresh/100


def test_training_spares_what_is_marked():
    from hsi_mamba_nb.learn.training import parameter_groups
    net = Mamba(8)
    decayed, spared = (group["params"] for group in parameter_groups(copy.deepcopy(net), .1))
    assert any(p.shape == net.A_log.shape for p in spared) and not any(p.shape == net.A_log.shape for p in decayed)


def test_layout(monkeypatch):
    seen = []
    monkeypatch.setattr(module, "selective_scan", lambda *args, **options: (seen.append(args), selective_scan(*args, **options))[1])
    Mamba(8)(tokens(2, 5, 8), torch.zeros(2, 5, dtype=torch.int64))
    u, delta, _, B, C, _, z, *_ = seen[0]
    assert all(v.stride(1) == 1 for v in (u, delta, B, C, z))


def test_edges():
    net = Mamba(8)
    assert net(tokens(0, 5, 8)).shape == (0, 5, 8) and net(tokens(2, 1, 8)).shape == (2, 1, 8)
    torch.testing.assert_close(net(tokens(2, 8, 7).mT), net(tokens(2, 8, 7).mT.contiguous()))
    wide = functional_call(net, {name: p.detach() for name, p in net.named_parameters()}, (tokens(1, 2, 8),))
    assert wide.shape == (1, 2, 8)


@pytest.mark.parametrize("match, call", [
    ("d_model: expected a whole number of at least 1, got 0", lambda: Mamba(0)),
    ("d_model: .* got 8.0", lambda: Mamba(8.)),
    ("d_state: ", lambda: Mamba(8, d_state=0)),
    ("d_conv: ", lambda: Mamba(8, d_conv=0)),
    ("dt_rank: .* got 'full'", lambda: Mamba(8, dt_rank="full")),
    ("expand: ", lambda: Mamba(8, expand=0)),
    ("dt_init: ", lambda: Mamba(8, dt_init="zeros")),
    ("dt_min", lambda: Mamba(8, dt_min=.2)),
    ("backend: expected one of auto, ref, torch, numba, triton, mamba_ssm, got 'cuda'", lambda: Mamba(8, backend="cuda")),
    ("backend: expected one of .* got None", lambda: BiMamba(8, backend=None)),
    (r"x: expected \(b,l,d_model\) with d_model = 8, got \(2, 8, 5\)", lambda: Mamba(8)(tokens(2, 8, 5))),
    (r"x: .* got \(5, 8\)", lambda: Mamba(8)(tokens(5, 8))),
    ("x: .* l >= 1", lambda: Mamba(8)(tokens(2, 0, 8))),
    ("x: expected real floating-point numbers, got torch.int64", lambda: Mamba(8)(torch.ones(2, 5, 8, dtype=torch.int64))),
    ("x: .* got torch.complex64", lambda: Mamba(8)(torch.ones(2, 5, 8, dtype=torch.complex64))),
    ("x: expected a tensor .* got list", lambda: BiMamba(8)([1])),
    ("x: expected torch.float32 like the block's weights, got torch.bfloat16; use x.to or torch.autocast", lambda: Mamba(8)(tokens(2, 5, 8).bfloat16())),
    ("x: expected torch.float32 like the block's weights, got torch.float64; use x.to$", lambda: Mamba(8)(tokens(2, 5, 8).double())),
    (r"seq_idx: expected \(b,l\) = \(2, 5\), got \(2, 4\)", lambda: Mamba(8)(tokens(2, 5, 8), torch.zeros(2, 4, dtype=torch.int64))),
    ("seq_idx: expected whole numbers, got torch.float32", lambda: Mamba(8)(tokens(2, 5, 8), torch.zeros(2, 5))),
    ("x_t: ", lambda: Mamba(8).step(tokens(2, 1, 8), Mamba(8).allocate_state(2))),
    ("state, window: ", lambda: Mamba(8).step(tokens(2, 8), Mamba(8).allocate_state(3))),
    ("state, h: ", lambda: Mamba(8).step(tokens(2, 8), Mamba(8, d_state=3).allocate_state(2))),
    ("state: expected", lambda: Mamba(8).step(tokens(2, 8), None)),
    (r"weight: expected \(d,k\) with d = 3", lambda: short_conv(tokens(1, 3, 5), tokens(2, 4))),
    ("weight: .* k >= 1", lambda: short_conv(tokens(1, 3, 5), tokens(3, 0))),
    ("bias: ", lambda: short_conv(tokens(1, 3, 5), tokens(3, 4), tokens(4))),
])
def test_refuses(match, call):
    with pytest.raises(InputError, match=match) as caught: call()
    assert "\n" not in str(caught.value)
