"""Routing against loops, sparse dispatch against running all, and answers that come home from every direction."""
import copy
import math

import pytest
import torch
from torch import nn

from hsi_mamba_nb.errors import InputError
from hsi_mamba_nb.parts import Experts, Router, SpatialExpert, balance_loss, expert_flops, expert_load, route, sample_mask, uncertainty
from hsi_mamba_nb.scan import check_returns_home, list_orders, named_order
from hsi_mamba_nb.start.testing import check_batch_independent, check_gradient, compare, expect_fail, same_with_gradients

DIRECTIONS = ("row", "column", "row-reversed", "column-reversed")
LEVELS = ("image", "region", "pixel")


def draw(*shape, seed=0): return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("k", [1, 3, 4])
@pytest.mark.parametrize("renormalise", [True, False])
def test_route_is_the_loop_s(k, renormalise):
    g = draw(3, 5, k)
    for top in range(1, k + 1):
        w = route(g, top, renormalise)
        for i in range(3):
            for j in range(5):
                p = [math.exp(v)/sum(map(math.exp, g[i, j].tolist())) for v in g[i, j].tolist()]
                kept = [v if v >= sorted(p)[-top] else 0 for v in p]
                compare(w[i, j], torch.tensor(kept, dtype=torch.float64)/(sum(kept) if renormalise else 1), 1e-12)
        assert expert_load(w).sum() == pytest.approx(1)
    assert route(g.bfloat16(), 1).dtype == torch.float32
    for top in (0, k + 1):
        with pytest.raises(InputError, match=f"top={top}"): route(g, top)


def test_ties_still_ask_exactly_top_and_underflow_fewer():
    assert ((route(torch.zeros(7, 4), 2) > 0).sum(1) == 2).all()
    w = route(torch.tensor([120., 0, 0, 0]), 2)
    assert w.tolist() == [1, 0, 0, 0] and expert_load(w).tolist() == [1, 0, 0, 0]


def test_balance_loss_reaches_those_left_out():
    g = (torch.tensor([[3., 1, 0, -1]], dtype=torch.float64) + .1*draw(6, 4)).requires_grad_()
    slope = torch.autograd.grad(balance_loss(g, route(g, 2)), g)[0]
    assert (slope[:, 2:] < 0).all() and slope[:, 0].mean() > 0
    check_gradient(lambda g: balance_loss(g, route(g, 2)), g)
    even = 9*torch.eye(4)
    compare(balance_loss(even, route(even, 1)), torch.tensor(1.), 1e-5)
    sure = 40*torch.eye(4, dtype=torch.float64)[[0, 0, 0]]
    for top in (1, 2): compare(balance_loss(sure, route(sure, top)).item(), 4/top, 1e-6)


@pytest.mark.parametrize("level, h, w", [("image", 6, 5), ("region", 6, 5), ("region", 2, 3), ("pixel", 6, 5)])
def test_router_decides_in_its_cells(level, h, w):
    torch.manual_seed(0)
    net, x = Router(4, 3, level=level, region=4).double(), draw(2, 4, h, w)
    weights, logits = net(x)
    side = dict(image=max(h, w), region=4, pixel=1)[level]
    for i in range(h):
        for j in range(w):
            cell = x[:, :, i//side*side:(i//side + 1)*side, j//side*side:(j//side + 1)*side]
            compare(weights[:, :, i, j], route(net.linear(cell.mean((2, 3))), 2), 1e-12)
    assert logits.shape == (2*math.ceil(h/side)*math.ceil(w/side), 3)
    check_batch_independent(lambda x: net(x)[0], x, 1e-10)


def test_noise_is_for_training_only():
    net, x = Router(4, 3, noise=1.), draw(2, 4, 3, 3).float()
    assert not torch.equal(net(x)[1], net(x)[1])
    assert torch.equal(net.eval()(x)[1], net(x)[1])
    assert not torch.equal(net.train()(x)[1], net.eval()(x)[1])


@pytest.mark.parametrize("level", LEVELS)
def test_a_router_that_asks_one_learns(level):
    x = draw(2, 8, 4, 6).float()
    for renormalise, learns in ((None, True), (False, True), (True, False)):
        torch.manual_seed(0)
        net = Experts(8, top=1, level=level, renormalise=renormalise)
        net(x).square().sum().backward()
        assert (net.router.linear.weight.grad.abs().max() > 1e-4) == learns
    compare(Experts(8, top=2, level=level).weights(x).sum(1), torch.ones(2, 4, 6))
    net.router.top, net.router.renormalise = 2, None  # decided when it is asked, so top may change
    compare(net.weights(x).sum(1), torch.ones(2, 4, 6))


def test_weights_that_change_within_an_image_need_a_finer_level():
    x, w = draw(2, 8, 4, 6).float(), Router(8, 4, level="pixel")(draw(2, 8, 4, 6).float())[0]
    for sparse in (True, False):
        with pytest.raises(InputError, match="within an image"): Experts(8, sparse=sparse)(x, w)
        assert Experts(8, sparse=sparse)(x, w[..., :1, :1].expand_as(w).contiguous()).shape == x.shape


def test_parameters_and_starts():
    assert [sum(p.numel() for p in SpatialExpert(64, r).parameters()) for r in (2, 4, 8, 16)] == [524, 1048, 2096, 4192]
    twin = copy.deepcopy(SpatialExpert(16, 4))
    assert twin.A_log._no_weight_decay and twin.D._no_weight_decay and twin.dt_proj.bias._no_reinit


@pytest.mark.parametrize("order", list_orders())
def test_packed_is_passing_over(order):
    torch.manual_seed(1)
    x, own, expert = draw(3, 6, 4, 5).requires_grad_(), draw(3, 4, 5, seed=2) < .2, SpatialExpert(6, 3, order, 2).double()

    def packed(x, own):
        answer, place = expert.packed(x, own)
        return x.new_zeros(own.numel(), 6).index_copy(0, place, answer).view(*own.shape, 6).movedim(-1, 1)
    same_with_gradients(lambda x: packed(x, own), lambda x: expert(x, own), x, rtol=1e-10)
    compare(packed(x, torch.ones_like(own)), expert(x), 1e-12)
    strangers = torch.where(own[:, None], x, x + 5)  # what others' pixels hold is nobody's business
    compare(expert(strangers, own), expert(x, own), 1e-12)
    compare(packed(strangers, own), packed(x, own), 1e-12)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("top", [1, 2, 4])
def test_sparse_is_dense(level, top):
    torch.manual_seed(0)
    net, x = Experts(8, (1, 2, 3, 4), top, level, region=3, d_state=4, renormalise=top > 1).double(), draw(3, 8, 5, 7).requires_grad_()
    inputs, found = [x, *net.parameters()], []
    for net.sparse in (True, False):
        y = net(x)
        slopes = torch.autograd.grad(y.square().sum(), inputs, allow_unused=True)
        found.append([y, *(torch.zeros_like(p) if s is None else s for p, s in zip(inputs, slopes))])
    for i, (a, b) in enumerate(zip(*found)): compare(a, b, 1e-9, atol=1e-12, name=f"tensor {i}") if b.abs().max() > 1e-9 else None
    compare(net.weights(x).sum(1), torch.ones(3, 5, 7, dtype=torch.float64), 1e-12) if top > 1 else None
    net.sparse = True
    check_batch_independent(net, x.detach(), 1e-9)


@pytest.mark.parametrize("level", LEVELS)
def test_who_is_not_asked_neither_works_nor_learns(level):
    net, x = Experts(8, (4,)*4, level=level, d_state=4), draw(2, 8, 4, 6).float()
    weights = torch.tensor([0, .3, 0, .7]).view(1, 4, 1, 1).expand(2, 4, 4, 6)
    worked = []
    for i, e in enumerate(net.experts): e.x_proj.register_forward_hook(lambda *_, i=i: worked.append(i))
    net(x, weights).sum().backward()
    assert worked == [1, 3]
    assert [e.D.grad is None for e in net.experts] == [True, False, True, False]
    assert net.flops(weights) == 2*expert_flops(8, 4, 4, 48)


@pytest.mark.parametrize("level", LEVELS)
def test_an_impulse_comes_home(level):
    net = Experts(4, (2,)*4, level=level, region=2)
    with torch.no_grad():
        for e in net.experts: e.x_proj.weight.zero_(), e.conv2d.bias.zero_(), e.conv2d.weight.zero_()[:, :, 1, 1].fill_(1)
    for net.sparse in (True, False): check_returns_home(lambda x: net(x.movedim(-1, 1)).movedim(1, -1), 3, 5, 4)
    assert [e.order for e in net.experts] == list(DIRECTIONS)

    class Forgotten(SpatialExpert):  # its walk is read as if it were an image
        def forward(self, x, own=None):
            v, z = self.in_proj(x.movedim(1, -1)).chunk(2, -1)
            walked = named_order(self.order, *x.shape[2:])(v*self.D)
            return self.out_proj(self.norm(walked.view(v.shape))*(1 + z)).movedim(-1, 1)
    torch.manual_seed(0)
    straight, lost = Forgotten(4, 2, "row"), Forgotten(4, 2, "column")
    check_returns_home(lambda x: straight(x.movedim(-1, 1)).movedim(1, -1), 3, 5, 4)  # along rows there is nothing to turn
    with expect_fail(match="lands at"): check_returns_home(lambda x: lost(x.movedim(-1, 1)).movedim(1, -1), 3, 5, 4)


def test_train_is_eval_and_low_precision_runs():
    net, x = Experts(16, level="pixel"), draw(2, 16, 5, 4).float()
    compare(net.eval()(x), net.train()(x), 0.)
    with torch.autocast("cpu", torch.bfloat16): compare(net(x), net(x), 0.)
    with torch.autocast("cpu", torch.bfloat16): y = Experts(16)(x)
    assert y.dtype == torch.float32 and y.isfinite().all()


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("pixels", [1, 50, None])
def test_operations_are_predicted(level, pixels):
    from torch.utils.flop_counter import FlopCounterMode
    net, x = Experts(32, (8,)*4, level=level), draw(4, 32, 8, 8).float()
    with torch.no_grad():
        w = net.weights(x)
        if pixels is not None:  # so many ask expert 1, nobody asks another
            few = (torch.arange(256) < pixels).view(4, 1, 8, 8) if level != "image" else (torch.arange(4) < pixels % 4).view(4, 1, 1, 1).expand(4, 1, 8, 8)
            w = torch.eye(4)[1].view(1, 4, 1, 1)*few
        net(x, w)
        with FlopCounterMode(display=False) as counter: net(x, w)
    compare(float(counter.get_total_flops()), float(net.flops(w)), 1e-9)


def test_uncertainty_and_its_samples():
    uniform = torch.full((1, 9, 1, 1), 1/9, dtype=torch.float64)
    compare(uncertainty(uniform).item(), math.log(9)/9, 1e-4)
    compare(uncertainty(uniform, "entropy").item(), math.log(9), 1e-9)
    assert uncertainty(torch.eye(3)[None], "entropy").tolist() == [[0, 0, 0]]  # 0 ln 0
    p = (3*draw(2, 5, 6, 7)).softmax(1)
    best = p.sort(1).values
    compare(uncertainty(p, "margin"), 1 - best[:, -1] + best[:, -2], 1e-12)
    u, seed = uncertainty(p, "confidence"), lambda: torch.Generator().manual_seed(3)
    compare(u, 1 - best[:, -1], 1e-12)
    assert torch.equal(sample_mask(u, seed()), sample_mask(u, seed())) and not sample_mask(torch.ones(2, 6, 7)).any()
    many = torch.stack([sample_mask(u, seed().manual_seed(i)) for i in range(400)]).double().mean(0)
    q = (u - u.amin((1, 2), keepdim=True))/(u.amax((1, 2), keepdim=True) - u.amin((1, 2), keepdim=True))
    assert (many - q).abs().max() < .12
    for bad in (lambda: uncertainty(p, "luck"), lambda: uncertainty(p[:, :1])):
        with pytest.raises(InputError): bad()


@pytest.mark.parametrize("make", [lambda: Experts(8, ()), lambda: Experts(8, (2,), top=2), lambda: Router(4, 3, level="class"), lambda: Router(4, 3, region=0),
                                  lambda: SpatialExpert(8, 0), lambda: SpatialExpert(8, 2, "rows"), lambda: Router(4, 3)(torch.zeros(4, 5, 5))])
def test_what_the_user_can_mend_is_said(make):
    with pytest.raises(InputError): make()
