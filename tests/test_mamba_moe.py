"""MambaMoE: both variants' parameters by formula, modes, sizes, directions, dice, gradients of who is asked, checkpoints, and what it refuses."""
import copy
import math
import pickle

import pytest
import torch
import torch.nn.functional as F

from hsi_mamba_nb.errors import InputError
from hsi_mamba_nb.models import mamba_moe as module
from hsi_mamba_nb.models.mamba_moe import BandScan, ChannelScan, FeatureFusion, MambaMoE, MixtureBlock, Pyramid, ResidualUnit, corrective_loss, enlarge, guided_labels, halve
from hsi_mamba_nb.models.registry import create_model, list_models
from hsi_mamba_nb.parts.experts import Experts
from hsi_mamba_nb.scan.scan_order import check_returns_home
from hsi_mamba_nb.start.testing import check_batch_independent, compare

VARIANTS, SIZES = ("paper", "fixed"), [(1, 1), (1, 9), (9, 1), (2, 3), (8, 16), (13, 22)]


def draw(*size, seed=0): return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


def make(*args, seed=0, **options):
    torch.manual_seed(seed)
    return create_model("mamba-moe", *(args or (10, 3)), **{"d": 8, **options})


def some_labels(*size, k=3): return torch.randint(0, k + 1, size, generator=torch.Generator().manual_seed(0))


def count(net): return sum(p.numel() for p in net.parameters())


def mamba(d, n=16):
    e, r = 2*d, -(-d//16)
    return e*n + e + 3*e*d + 5*e + e*(r + 2*n) + r*e + e


def formula(c, k, variant="fixed", d=32, ranks=None, experts=None, shared=True, literal=False, n=16, v=8, **_):
    r, e, G, ranks = -(-d//16), 2*d, min(8, c), (ranks or ((2, 4, 8, 16) if variant == "paper" else (8, 8, 8, 8)))[:experts]
    S = 256*(4*r + 6*n + 6) + 3*e*d + 3*e*e + e if variant == "paper" else (-(-c//G) + 3)*v + 2*mamba(v) + G*v*d + d
    mixture = 12*d*d + 12*d + len(ranks)*d + sum(ranks)*(3*d + 2*r + 3*n + 14) + S*(shared and not literal)
    return (c*d + d)*(variant == "fixed") + c*d + 2*d*d + 9*d + 3*mixture + 10*(9*d*d + d) + 3*(128*d + 384 + 129*k)


@pytest.mark.parametrize("options", [{}, dict(d=64), dict(experts=1, top=1), dict(experts=2), dict(ranks=(2, 4, 8, 16)), dict(ranks=(4, 8, 3), experts=2), dict(shared=False), dict(top=4), dict(level="region"), dict(d=4)], ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_parameters(variant, options):
    for c, k in ((103, 9), (5, 2), (1, 2)): assert count(make(c, k, variant=variant, **{"d": 32, **options})) == formula(c, k, variant, **options)


def test_parameters_of_the_literal_form_and_of_a_whole_scene():
    assert count(make(variant="paper", literal=True)) == formula(10, 3, "paper", d=8, literal=True)
    assert [count(ChannelScan(64, (m, 1))) - count(ChannelScan(64, (1, 1))) for m in (2, 11)] == [118, 1180]
    net = make()
    for h, w in SIZES: net(draw(1, 10, h, w))
    assert count(net) == formula(10, 3, d=8)  # nothing appears later


@pytest.mark.parametrize("h, w", SIZES)
@pytest.mark.parametrize("options", [{}, dict(level="image"), dict(level="region", region=3), dict(variant="paper"), dict(variant="paper", literal=True)], ids=str)
def test_any_size(h, w, options):
    net, x, y = make(**options), draw(2, 10, h, w), some_labels(2, h, w)
    loss, terms = net.loss(x, y)
    loss.backward()
    assert net(x).shape == (2, 3, h, w) and loss.isfinite() and list(terms) == ["ce_3", "ce_2", "ce_1", "ce_full", "balance"][:5 if net.balance else 4]
    assert all(p.grad is None or p.grad.isfinite().all() for p in net.parameters())


@pytest.mark.parametrize("options", [{}, dict(top=1), dict(level="image", top=4), dict(level="region", region=2), dict(variant="paper"), dict(variant="paper", shared=False)], ids=str)
def test_modes_and_batches(options):
    net, x = make(**options), draw(3, 10, 9, 14)
    y = net.train()(x).detach()
    compare(net.eval()(x), y, 0.)
    check_batch_independent(lambda x: net(x).detach(), x)
    again = make(seed=1, **options)
    with pytest.raises(AssertionError): compare(again(x), y, 1e-3)
    again.load_state_dict(net.state_dict(), strict=True)
    other = draw(1, 10, 6, 17)
    for twin in (again, copy.deepcopy(net), pickle.loads(pickle.dumps(net))): compare(twin(other), net(other), 0.)


def test_double():
    for variant in VARIANTS:
        net, x = make(variant=variant), draw(1, 10, 5, 7)
        compare(copy.deepcopy(net).double()(x.double()).float(), net(x), 1e-4)


def test_literal_shows_the_faults():
    net, x = make(variant="paper", literal=True).eval(), draw(1, 10, 12, 20)
    with pytest.raises(AssertionError): compare(net(x), net(x), 1e-3)  # a new shared expert at each call
    layer = module._LiteralExperts(8, (2, 4, 8, 16), 2)
    a, w = draw(1, 8, 12, 7), torch.tensor([0., 0, .5, .3]).view(1, 4, 1, 1).expand(1, 4, 12, 7)
    with torch.no_grad():
        compare(layer.eval()(a, w.roll(2, 1)), layer.train()(a, w.roll(2, 1)))
        with pytest.raises(AssertionError): compare(layer.eval()(a, w), layer.train()(a, w), .5)
    layer.experts = torch.nn.ModuleList(torch.nn.Identity() for _ in range(4))
    dot = torch.zeros(1, 8, 6, 4)
    dot[0, 0, 1, 2] = 1
    assert layer.train()(dot, torch.full((1, 4, 6, 4), .25))[0, 0].nonzero().tolist() == [[1, 2], [2, 2], [3, 1], [4, 1]]


@pytest.mark.parametrize("options", [{}, dict(variant="paper")], ids=str)
def test_an_impulse_stays_in_place_for_every_expert(options):
    ground = draw(1, 8, 3, 5, seed=1)  # the gate shuts where there is nothing
    for block in make(**options).blocks:
        for e in block.experts.experts:
            check = lambda: check_returns_home(lambda x: e(ground + x.movedim(-1, 1)).movedim(1, -1), d=8)
            if e.D.numel() > 2:  # a norm of two numbers keeps nothing but their order
                with pytest.raises(AssertionError): check()  # neighbours hear it
            middle = e.conv2d.weight.data[:, :, 1, 1].clone()
            e.conv2d.weight.data.zero_()[:, :, 1, 1] = middle
            e.x_proj.weight.data[-16:] = 0
            check()


def test_weights_of_the_asked():
    x = draw(2, 10, 9, 14)
    for g in make().routes(x): compare(g.sum(1), torch.ones_like(g[:, 0]), 1e-6)
    assert [tuple(g.shape[2:]) for g in make().routes(x)] == [(5, 7), (3, 4), (2, 2)]
    for g in make(variant="paper").routes(x): assert (g.sum(1) < 1).all() and g.flatten(2).std(2).max() < 1e-6 and ((g > 0).sum(1) == 2).all()
    g = make(level="region", region=2).routes(x)[0]
    assert (g[:, :, 0, 0] == g[:, :, 1, 1]).all() and (g[:, :, 0, 0] != g[:, :, 0, 2]).any()


def touched(net, x, y):
    net.zero_grad()
    net.loss(x, y)[0].backward()
    return {n for n, p in net.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}


@pytest.mark.parametrize("options", [dict(top=4), dict(level="image"), dict(variant="paper")], ids=str)
def test_who_is_not_asked_is_not_taught(options):
    net, x, y = make(**options), draw(2, 10, 13, 22), some_labels(2, 13, 22)
    idle = [(j, i) for j, g in enumerate(net.routes(x)) for i in range(4) if not g[:, i].any()]
    names = {n for n, _ in net.named_parameters()}
    unasked = {n for n in names for j, i in idle if n.startswith(f"blocks.{j}.experts.experts.{i}.")}
    assert names - touched(net, x, y) == unasked and bool(unasked) == ("top" not in options)


def test_a_gradient_reaches_every_parameter():
    net, seen = make(), set()
    optimizer = torch.optim.Adam(net.parameters(), lr=.01)
    for seed in range(16):  # an expert that one pixel asks has no memory to teach
        seen |= touched(net, 2*draw(2, 10, 19, 22, seed=seed), some_labels(2, 19, 22))
        optimizer.step()
    assert seen == {n for n, _ in net.named_parameters()}


def test_rates_are_not_decayed():
    for variant in VARIANTS:
        net = make(variant=variant)
        for twin in (net, copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
            rates = [p for n, p in twin.named_parameters() if n.endswith("A_log")]
            assert rates and all(getattr(p, "_no_weight_decay", False) for p in rates)


def terms_at(net, x, y, seed):
    torch.manual_seed(seed)
    return torch.stack(list(net.loss(x, y)[1].values()))


def test_dice():
    net, x, y = make().train(), draw(2, 10, 13, 22), some_labels(2, 13, 22)
    compare(terms_at(net, x, y, 1), terms_at(net, x, y, 1), 0.)
    assert not torch.equal(terms_at(net, x, y, 1)[:3], terms_at(net, x, y, 2)[:3]) and torch.equal(terms_at(net, x, y, 1)[3:], terms_at(net, x, y, 2)[3:])
    for quiet in (make(uncertainty="off"), make().eval()): compare(terms_at(quiet, x, y, 1), terms_at(quiet, x, y, 2), 0.)
    before = torch.get_rng_state()
    net(x)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_label_that_is_not_given_counts_nothing():
    for variant in VARIANTS:
        net, x, none = make(variant=variant), draw(2, 10, 9, 7), torch.zeros(2, 9, 7, dtype=torch.long)
        loss, terms = net.loss(x, none)
        loss.backward()
        assert all(float(terms[n]) == 0 for n in ("ce_3", "ce_2", "ce_1", "ce_full"))
        compare(loss.detach(), net.balance*terms["balance"] if net.balance else torch.zeros(()), 1e-6)


@pytest.mark.parametrize("kind", ["paper", "entropy", "margin", "confidence"])
def test_drawn_labels(kind):
    logits, y, dice = draw(3, 4, 5, 6), some_labels(3, 9, 11, k=4), torch.Generator().manual_seed(0)
    kept = guided_labels(logits, y, kind, dice)
    assert ((kept == y) | (kept == 0)).all() and 0 < int((kept > 0).sum()) < int((y > 0).sum())
    assert torch.equal(guided_labels(logits, y, "off"), y)
    count_kept = lambda floor: sum(int((guided_labels(logits, y, kind, dice, floor) > 0).sum()) for _ in range(50))
    assert count_kept(1.) == 50*int((y > 0).sum()) > count_kept(.5) > count_kept(0.)
    flat = guided_labels(torch.zeros(1, 4, 9, 11), y[:1], kind, dice)  # all alike: nothing would be drawn
    assert torch.equal(flat, y[:1])


def test_the_loss_by_parts():
    logits, y = [draw(2, 4, h, w) for h, w in ((2, 2), (3, 3), (9, 11))], some_labels(2, 9, 11, k=4)
    for full, corners in ((0, True), (-1, True), (0, False), (-1, False)):
        ce = [F.cross_entropy(enlarge(z, (9, 11), corners), y - 1, ignore_index=-1) for z in logits]
        loss, terms = corrective_loss(logits, y, "off", full, corners=corners)
        compare(loss, sum(ce) + ce[full], 1e-5)
        compare(terms["ce_full"], ce[full], 1e-5)


def test_fixed_teaches_the_predicting_head_all_labels():
    x, y = draw(1, 10, 13, 22), some_labels(1, 13, 22)
    for variant, head in (("fixed", 2), ("paper", 0)):
        net = make(variant=variant)
        logits = net.heads[head](module._features(net, x)[0][head])
        compare(net.loss(x, y)[1]["ce_full"], F.cross_entropy(enlarge(logits, y.shape[1:], net.corners), y - 1, ignore_index=-1).detach(), 1e-5)


def test_pyramid_reads_every_pixel():
    x = draw(1, 1, 13, 22).requires_grad_()
    halve(halve(halve(x))).sum().backward()
    assert (x.grad > 0).all()
    assert [tuple(f.shape) for f in Pyramid(10, 8)(draw(2, 10, 13, 22))] == [(2, 8, 7, 11), (2, 8, 4, 6), (2, 8, 2, 3)]
    with pytest.raises(AssertionError): compare(F.avg_pool2d(x, 2), halve(x))


def test_decoder():
    torch.manual_seed(0)
    unit, fuse, fine = ResidualUnit(4), FeatureFusion(4), draw(1, 4, 5, 7)
    for conv in (unit.convs[3], fuse.skip.convs[3], fuse.end.convs[3]):
        for p in conv.parameters(): p.data.zero_()
    compare(unit(fine), fine, 0.)
    compare(fuse(draw(1, 4, 3, 4), fine), enlarge(draw(1, 4, 3, 4), (5, 7)) + fine, 1e-6)


@pytest.mark.parametrize("h", [64, 61, 40])
def test_a_ramp_comes_home(h):
    x = torch.arange(float(h)).view(1, 1, h, 1).expand(1, 1, h, 8)
    for levels in (1, 2, 3):
        y, edge = x, 2*2**levels  # at an odd end a cell is shorter
        for _ in range(levels): y = halve(y)
        compare(enlarge(y, (h, 8))[:, :, edge:-edge], x[:, :, edge:-edge], 1e-5)
        with pytest.raises(AssertionError): compare(enlarge(y, (h, 8), corners=True)[:, :, edge:-edge], x[:, :, edge:-edge], 1e-3)
    with pytest.raises(InputError, match="halves"): enlarge(draw(1, 1, 3, 4), (9, 11))


def test_a_pixel_is_seen_at_full_size():
    for variant, seen in (("fixed", True), ("paper", False)):
        net, x = make(variant=variant).eval(), draw(1, 10, 8, 8)
        swapped = x.clone()
        swapped[..., 2, 2], swapped[..., 2, 3] = x[..., 2, 3], x[..., 2, 2]  # within a cell of halve
        change = (net.pyramid(swapped)[0] - net.pyramid(x)[0]).abs().max()
        assert change < 1e-5 and bool((net(swapped) - net(x)).abs().max() > 1e-3) == seen


def test_band_scan_is_pixel_by_pixel_in_band_order(monkeypatch):
    torch.manual_seed(0)
    net, s, x = BandScan(10, 8), draw(2, 8, 4, 5), draw(2, 10, 4, 5)
    whole = net(s, x).detach()
    for i, j in ((0, 0), (2, 3)): compare(net(s[..., i:i + 1, j:j + 1], x[..., i:i + 1, j:j + 1]), whole[..., i:i + 1, j:j + 1], 1e-5)
    with pytest.raises(AssertionError): compare(net(s, x.flip(1)), whole, 1e-3)
    monkeypatch.setattr(module, "_PORTION", 7)
    compare(net(s, x), whole, 1e-5)


@pytest.mark.parametrize("portion", [7, 4096])
def test_recompute(portion, monkeypatch):
    monkeypatch.setattr(module, "_PORTION", portion)
    plain, again, x, y = make(), make(recompute=True), draw(2, 10, 9, 14), some_labels(2, 9, 14)
    again.load_state_dict(plain.state_dict())
    for net in (plain, again):
        torch.manual_seed(0)
        net.loss(x, y)[0].backward()
    for (name, p), q in zip(plain.named_parameters(), again.parameters()):
        if p.grad is not None: compare(q.grad, p.grad, 1e-4, atol=1e-7, name=name)


def test_sparse_block_is_the_dense_one():
    torch.manual_seed(0)
    block, f, x = MixtureBlock(8, Experts(8, level="pixel"), BandScan(10, 8)), draw(2, 8, 5, 7), draw(2, 10, 5, 7)
    sparse = block(f, x)[0]
    block.experts.sparse = False
    compare(block(f, x)[0], sparse, 1e-4)


@pytest.mark.parametrize("variant", VARIANTS)
def test_bfloat16(variant):
    net, x, y = make(variant=variant), draw(1, 10, 13, 22), some_labels(1, 13, 22)
    plain = net.eval().loss(x, y)[0].detach()
    with torch.autocast("cpu", torch.bfloat16): loss = net.loss(x, y)[0]
    loss.backward()
    compare(loss.detach().float(), plain, .05)


def test_registry():
    net = create_model("mamba-moe", 6, 3)
    assert "mamba-moe" in list_models() and isinstance(net, MambaMoE) and net.takes == "image" and net.config["variant"] == "fixed" and net.config["d"] == 32


@pytest.mark.parametrize("options, match", [(dict(variant="best"), "variant"), (dict(level="class"), "level"), (dict(uncertainty="doubt"), "uncertainty"), (dict(d=10), "use 12"), (dict(d=0), "d:"),
                                            (dict(experts=5), "experts"), (dict(experts="2"), "experts"), (dict(ranks=()), "ranks"), (dict(ranks=8), "ranks"), (dict(ranks="2,4"), "ranks"),
                                            (dict(ranks=(2, 0)), "ranks"), (dict(ranks=(4, 4, 4), experts=4), "experts"), (dict(ranks=(4,)), "use top=1"), (dict(balance="a"), "balance"), (dict(balance=True), "balance"),
                                            (dict(balance=.1, top=4), "balance"), (dict(balance=math.nan), "balance"), (dict(region=3), "level='region'"), (dict(level="region", region=2.), "region"),
                                            (dict(variant="paper", recompute=True), "recompute"), (dict(shared=False, recompute=True), "recompute"), (dict(shared=1), "shared"), (dict(recompute="no"), "recompute"), (dict(experts=1), "use top=1"), (dict(top=0), "top"), (dict(level="region", region=0), "region"), (dict(balance=-1.), "balance"),
                                            (dict(literal=True), "literal"), (dict(variant="paper", level="pixel", literal=True), "literal"), (dict(width=3), "width")], ids=str)
def test_refusals(options, match):
    with pytest.raises(InputError, match=match): make(**options)


def test_refused_sizes():
    with pytest.raises(InputError, match="classes"): make(10, 1)
    with pytest.raises(InputError, match="bands"): make(0, 3)


def test_ranks_as_text():
    net = make(ranks="2-4-8-16")
    net.load_state_dict(make(ranks=[2, 4, 8, 16]).state_dict())
    assert [e.D.numel() for e in net.blocks[0].experts.experts] == [2, 4, 8, 16] and [e.D.numel() for e in make().blocks[0].experts.experts] == [8]*4


@pytest.mark.parametrize("x", [draw(2, 9, 5, 5), draw(10, 5, 5), draw(2, 10, 0, 5), "images"], ids=["bands", "no batch", "empty", "text"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_refused_images(variant, x):
    with pytest.raises(InputError, match="c = 10"): make(variant=variant)(x)
