"""BLM-KD: parameters and operations by formula, the bound before and after steps, bytes there and back, fast scan and loop, modes, batches, gradients, checkpoints, what it refuses."""
import copy
import pickle

import pytest
import torch
import torch.nn.functional as F

from hsi_mamba_nb.errors import InputError
from hsi_mamba_nb.learn.protocol import count_flops
from hsi_mamba_nb.models.blm_kd import BLM, AffineCore, ByteInput, LatentEncoder, SelectiveCore, affine_scan, affine_scan_ref, bounded, from_bytes, state_bound, to_bytes
from hsi_mamba_nb.models.registry import create_model, list_models
from hsi_mamba_nb.scan.selection import selective_scan_ref
from hsi_mamba_nb.start.testing import check_batch_independent, check_causal, check_linear, compare, same_with_gradients

ROLES, VARIANTS, ENCODERS, CORES = ("teacher", "student"), ("paper", "fixed"), ("conv", "bytes"), ("affine", "selective")
KINDS = [dict(role=r, variant=v, encoder=e, core=c) for r in ROLES for v in VARIANTS for e in ENCODERS for c in CORES]
SIZES = {("paper", "teacher"): (64, 128), ("paper", "student"): (64, 64), ("fixed", "teacher"): (64, 128), ("fixed", "student"): (32, 32)}


def draw(*size, seed=0): return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


def make(*args, seed=0, **options):
    torch.manual_seed(seed)
    return create_model("blm", *(args or (10, 3)), **options)


def count(net): return sum(p.numel() for p in net.parameters())
def norm2(A): return float(torch.linalg.matrix_norm(A.detach().double(), 2))


def formula(c, k, role="student", variant="fixed", encoder="conv", core="affine", d=None, n=None, patch=9):
    (d, n), l, tables = (d or SIZES[variant, role][0], n or SIZES[variant, role][1]), patch*patch, 4096
    states = (lambda m: m*(d + l + m)) if core == "affine" else (lambda m: m*(2*d + l + 2) + 2*d + 2)
    read = tables + d*c//8 if encoder == "bytes" else 0
    if variant == "paper":
        C = d if read else c
        return read + 36*C*C + 3*C + C*d + d + states(n) + n*d + d + d*k + k
    E = 36*d*d + 3*d if role == "teacher" else 4*d*d + 30*d
    return (read or c*d + d) + 2*d + E + 2*d + 2*states(n//2) + 2*n + n*d + d + 4*d + 2*d*k + k


def operations(c, k, role="student", variant="fixed", encoder="conv", core="affine", l=81):
    d, n = SIZES[variant, role]
    states = (lambda m: 2*l*d*m + 2*(l - 1)*m*m + 2*m**3) if core == "affine" else (lambda m: 2*l*d*(2*m + 2) + 9*l*m)
    if variant == "paper":
        C, read = (d, 2*l*c*d) if encoder == "bytes" else (c, 0)
        return read + 2*l*(36*C*C + C*d + n*d) + states(n) + 2*d*k
    return 2*l*(c*d + (36*d*d if role == "teacher" else 4*d*d + 27*d) + n*d) + 2*states(n//2) + 4*d*k


@pytest.mark.parametrize("kind", KINDS, ids=lambda o: "-".join(o.values()))
def test_parameters_operations_and_a_step(kind):
    for c, k in ((7, 2), (64, 9)):
        net = make(c, k, **kind)
        assert count(net) == formula(c, k, **kind)
        assert count_flops(net) == operations(c, k, **kind)
    net = make(**kind, dropout=0.)
    x, y = draw(6, 10, 9, 9), torch.tensor([1, 2, 3, 1, 0, 2])
    train = net.train()(x).detach()
    compare(net.eval()(x), train, 0.)
    check_batch_independent(lambda x: net(x).detach(), x, 1e-4)
    net.loss(x, y)[0].backward()
    for name, p in net.named_parameters(): assert p.grad is not None and p.grad.abs().max() > 0 and p.grad.isfinite().all(), name


def test_sizes_can_be_given():
    for o in (dict(d=16, n=8), dict(d=24, n=6, role="teacher", patch=5), dict(variant="paper", d=8, n=3), dict(encoder="bytes", d=40), dict(patch=1)):
        net = make(5, 4, **o)
        assert count(net) == formula(5, 4, **o)
        assert net(draw(2, 5, net.patch, net.patch)).shape == (2, 4)


@pytest.mark.parametrize("encoder", ENCODERS)
@pytest.mark.parametrize("core", CORES)
def test_the_fixed_student_costs_at_most_a_tenth(encoder, core):
    def ratio(c, v="fixed"): return operations(c, 9, "student", v, encoder, core)/operations(c, 9, "teacher", v, encoder, core)
    assert max(ratio(c) for c in range(4, 301)) <= .1
    for c in (4, 33, 300):
        student, teacher = (count_flops(make(c, 9, role=r, encoder=encoder, core=core)) for r in ("student", "teacher"))
        assert student/teacher == ratio(c) <= .1
    if encoder == "conv": assert ratio(204, "paper") > .95  # the paper's is as slow as its teacher


def test_the_papers_encoder_and_what_tells_its_roles_apart():
    assert count(LatentEncoder(15, fixed=False)) == 8145 and count(LatentEncoder(204, fixed=False)) == 1_498_788
    t, s = (dict(make(variant="paper", role=r).named_parameters()) for r in ROLES)
    assert set(t) == set(s) and {n for n in t if t[n].shape != s[n].shape} == {"cores.0.position", "cores.0.W", "cores.0.enter.weight", "read.weight"}


def test_bytes_there_and_back():
    x = torch.cat([16*torch.rand(2000, generator=torch.Generator().manual_seed(0)) - 8, torch.tensor([-8., 8, 0])])
    v = to_bytes(x)
    assert v.dtype == torch.int64 and v.min() >= 0 and v.max() <= 255
    assert (from_bytes(v) - x).abs().max() <= .51*16/65535
    assert torch.equal(to_bytes(from_bytes(v)), v)
    every = torch.cartesian_prod(torch.arange(256), torch.arange(0, 256, 17))
    assert torch.equal(to_bytes(from_bytes(every)), every)
    assert to_bytes(torch.tensor([-99., 99, float("inf")])).tolist() == [[0, 0], [255, 255], [255, 255]]
    assert (from_bytes(to_bytes(2*x, 16.), 16.) - 2*x).abs().max() <= 1.02*16/65535
    with pytest.raises(InputError, match="nan"): to_bytes(torch.tensor([float("nan")]))


def test_byte_input():
    net, x = ByteInput(9, groups=2, width=4), draw(2, 9, 3, 5)
    net.low.data.copy_(draw(256, 4))
    v, w = to_bytes(x), net.window.softmax(-1)
    slow = torch.einsum("bcijw,gc->bwgij", net.high[v[..., 0]] + net.low[v[..., 1]], w).flatten(1, 2)
    compare(net(x), slow, 1e-5)
    silent = ByteInput(3)
    compare(silent(torch.full((1, 3, 1, 1), .01)), silent(torch.full((1, 3, 1, 1), .05)), 0.)
    for c in (1, 2, 300): assert ByteInput(c)(draw(1, c, 2, 2)).shape == (1, 64, 2, 2)


@pytest.mark.parametrize("l, b, n", [(1, 1, 1), (1, 3, 4), (2, 1, 3), (7, 3, 5), (81, 2, 16)])
def test_fast_scan_equals_loop(l, b, n):
    A, u = (.9*draw(n, n)/n**.5).double().requires_grad_(), draw(b, l, n, seed=1).double().requires_grad_()
    same_with_gradients(affine_scan, affine_scan_ref, A, u, rtol=1e-9)
    compare(affine_scan(A.float(), u.float()), affine_scan_ref(A.float(), u.float()), 1e-5)
    same_with_gradients(lambda A, u: affine_scan(A, u.flip(1)[:, :, :n]), lambda A, u: affine_scan_ref(A, u.flip(1)), A, u, rtol=1e-9)


def test_scan_laws():
    A, u = (.4*draw(3, 3)).double(), draw(3, 6, 3).double()
    check_causal(lambda u: affine_scan(A, u), u)
    check_linear(lambda u: affine_scan(A, u), u, draw(3, 6, 3, seed=2).double())
    check_batch_independent(lambda u: affine_scan(A, u), u)
    assert torch.autograd.gradgradcheck(affine_scan, (A.requires_grad_(), u[:, :4].clone().requires_grad_()))
    for wrong in ((A, u[..., :2]), (A, u[:, :0]), (A, u[0]), (A[:2], u)):
        with pytest.raises(InputError, match="affine_scan"): affine_scan(*wrong)


def test_bounded_for_any_matrix():
    for n in (1, 2, 5, 32, 128):
        for size in (1e-3, .1, 1., 10., 1e3, 1e6):
            for rho in (.5, .95, .999): assert norm2(bounded(size*draw(n, n, seed=n), rho)) <= rho*(1 + 1e-5)
        q = torch.linalg.qr(draw(n, n)).Q
        compare(bounded(q, .9), .9*q, 1e-4)  # a rotation reaches it
    W = draw(4, 4).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda W: bounded(W, .9), (W,))
    assert bounded(torch.zeros(3, 3), .9).abs().max() == 0
    for rho in (0., 1., -1.):
        with pytest.raises(InputError, match="rho"): bounded(W, rho)
    for kind in (torch.float16, torch.bfloat16):
        with pytest.raises(InputError, match="float32"): bounded(W.to(kind), .9)
        with pytest.raises(InputError, match="keep the weights in float32"): make().to(kind)(draw(2, 10, 9, 9).to(kind))
    s = torch.tensor([.5, 1., 2.], dtype=torch.float64)
    slope = torch.stack([torch.autograd.functional.jacobian(lambda v: bounded(v.view(1, 1), .9), v).squeeze() for v in s])
    compare(slope, 1.8*(1 - s**2)/(1 + s**2)**2, 1e-9)  # beyond s = 1 a larger W gives a smaller A


def test_a_radius_below_one_is_no_bound():
    A, u = torch.tensor([[.9, 5], [0, .9]]), torch.tensor([0., 1]).expand(1, 150, 2)
    assert torch.linalg.eigvals(A).abs().max() < .9 + 1e-5
    h = affine_scan(A, u).norm(dim=-1)
    assert h.max() > 40*state_bound(.9, u)[0]
    A = bounded(A, .9)
    assert affine_scan(A, u).norm(dim=-1).max() <= state_bound(norm2(A), u)[0]
    q = torch.linalg.qr(draw(6, 6)).Q
    h, pushes = torch.zeros(6), [F.normalize(torch.ones(6), dim=0)]
    for _ in range(300):
        h = .9*q @ h + pushes[-1]
        pushes.append(F.normalize(q @ h, dim=0))
    u = torch.stack(pushes)[None]
    assert .99 < affine_scan(bounded(q, .9), u).norm(dim=-1).max()/state_bound(.9, u)[0] <= 1 + 1e-5  # and it is met


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("role", ROLES)
def test_states_stay_within_the_bound(variant, role):
    net, seen = make(variant=variant, role=role, dropout=0.), []
    for core in net.cores:
        core.register_forward_hook(lambda core, v, h: seen.append((h.detach().norm(dim=-1).amax(-1)/state_bound(.95, core.drive(v[0]).detach())).max()))
    optimizer, y = torch.optim.SGD(net.parameters(), lr=3.), torch.tensor([1, 2, 3, 1])
    for seed in range(4):
        for scale in (1., 30.): net(scale*draw(4, 10, 9, 9, seed=seed))
        assert all(norm2(core.matrix()) <= .95*(1 + 1e-5) for core in net.cores)
        optimizer.zero_grad()
        net.loss(draw(4, 10, 9, 9, seed=seed), y)[0].backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.)
        optimizer.step()
    assert torch.stack(seen).isfinite().all() and max(seen) <= 1


def test_a_free_matrix_is_free():
    core = AffineCore(4, 3, 5, rho=None)
    core.W.data.mul_(100)
    assert norm2(core.matrix()) > 1 and torch.equal(core.matrix(), core.W)
    assert make(rho=None, variant="paper")(draw(2, 10, 9, 9)).shape == (2, 3)


def test_selective_core_is_the_packages_scan():
    torch.manual_seed(0)
    core, x = SelectiveCore(6, 4, 9), draw(2, 9, 6)
    B, C = core.gates(x).mT.split(1, 1)
    slow = selective_scan_ref((core.enter(x) + core.position).mT, core.step(x).mT, -core.A_log.exp()[:, None], B, C, delta_softplus=True).mT
    compare(core(x), slow, 1e-5)
    check_causal(lambda x: core(x).detach(), x, 1e-5)
    flat = lambda c: lambda v: (c(v) - c(torch.zeros_like(v))).detach()
    check_linear(flat(AffineCore(6, 4, 9)), x, draw(2, 9, 6, seed=1), 1e-4)
    with pytest.raises(AssertionError): check_linear(flat(core), x, draw(2, 9, 6, seed=1), 1e-2)


def test_the_selective_state_has_a_bound_of_its_own():
    torch.manual_seed(0)
    core, x = SelectiveCore(6, 4, 30), 3*draw(5, 1, 6).expand(-1, 30, -1)
    with torch.no_grad():
        (write, read), step = core.gates(x).unbind(-1), F.softplus(core.step(x)).amax(1)
        h, most = (core(x)/read[..., None]).abs().amax(1), (write[..., None]*(core.enter(x) + core.position)).abs().amax(1)
        assert (h <= most*step/(1 - torch.exp(-core.A_log.exp()*step))*(1 + 1e-4)).all()
        assert not (h <= most*step).all()  # what one step lets in is no bound


def test_both_variants_written_out():
    x, walk = draw(3, 10, 9, 9), lambda core, v: affine_scan_ref(core.matrix(), core.drive(v))
    net, old = (make(variant=v, dropout=0.) for v in ("fixed", "paper"))
    with torch.no_grad():
        t = net.encoder(net.input(x)).flatten(2).mT
        v = net.project(t)
        y = t + net.read(torch.cat([walk(net.cores[0], v), walk(net.cores[1], v.flip(1)).flip(1)], -1))
        compare(net(x), net.head(net.norm(torch.cat([y[:, 40], y.mean(1)], -1))), 1e-5)
        compare(old(x), old.head(old.read(walk(old.cores[0], old.project(old.encoder(x).flatten(2).mT))).mean(1)), 1e-5)


def test_reach_of_the_encoders():
    x, push = draw(1, 6, 9, 9), torch.zeros(1, 6, 9, 9)
    push[0, 0, 4, 4] = 1
    torch.manual_seed(0)
    for fixed in (False, True):
        f = LatentEncoder(6, fixed=fixed).eval()
        seen = (f(x + push) - f(x)).abs().sum(1)[0] > 0
        assert seen.all() if fixed else 9 < seen.sum() == seen[2:7, 2:7].sum()  # ours hears the whole patch through its norm


def test_the_centre_counts_more_than_a_corner():
    net, x = make(dropout=0.).eval(), draw(1, 10, 9, 9).requires_grad_()
    g = torch.autograd.grad(net(x).square().sum(), x)[0].norm(dim=1)[0]
    assert (g > 0).all() and g[4, 4] > 3*g.median()


def test_copies_checkpoints_and_decay():
    x = draw(2, 10, 9, 9)
    for o in (dict(), dict(core="selective", encoder="bytes"), dict(variant="paper", role="teacher")):
        net = make(**o).eval()
        for again in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
            compare(again(x), net(x), 0.)
            for core in again.cores: assert isinstance(core, SelectiveCore) or core.W._no_weight_decay
        other = make(seed=1, **o).eval()
        other.load_state_dict(net.state_dict(), strict=True)
        compare(other(x), net(x), 0.)
        assert list(net.named_modules())[-1][0] == "head" and net.head.out_features == 3  # the last linear layer


def test_reduced_precision_keeps_its_states():
    net = make()
    with torch.autocast("cpu", torch.bfloat16): loss = net.loss(draw(4, 10, 9, 9), torch.tensor([1, 2, 3, 0]))[0]
    loss.backward()
    assert loss.isfinite() and all(p.grad.isfinite().all() for p in net.parameters())


def test_refusals():
    assert "blm" in list_models() and BLM.takes == "patch" and make().patch == 9
    for word, wrong in {"role": dict(role="pupil"), "variant": dict(variant="x"), "use 9": dict(patch=8), "patch": dict(patch=0), "encoder": dict(encoder="byte"), "core": dict(core="mamba"), "d: expected": dict(d=0),
                        "rho": dict(rho=1.), "use 40": dict(encoder="bytes", d=36), "use 8": dict(n=7), "dropout": dict(dropout=1.), "no option": dict(depth=2)}.items():
        with pytest.raises(InputError, match=word): make(**wrong)
    for wrong in (draw(2, 10, 7, 7), draw(2, 9, 9, 9), draw(10, 9, 9), [1]):
        with pytest.raises(InputError, match="b,10,9,9"): make()(wrong)
