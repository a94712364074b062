"""Cluster centres against closed forms, token packing against round trips, and no state across a cluster's border."""
import copy
import math

import pytest
import torch
import torch.nn.functional as F

from hsi_mamba_nb.errors import InputError
from hsi_mamba_nb.parts import (Centres, assign, cluster_loss, dual_scores, ema_update, gather_tokens, group_means, pack_order, scatter_tokens,
                                select_tokens)
from hsi_mamba_nb.scan import Mamba
from hsi_mamba_nb.start.testing import check_batch_independent, check_gradient, compare, expect_fail, same_with_gradients

F64 = dict(dtype=torch.float64)


def draw(*shape, seed=0, **options): return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), **{**F64, **options})
def whole(high, *shape, seed=0, low=0): return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("n, k", [(1, 1), (7, 3), (40, 5), (6, 6), (0, 2)])
def test_group_means_are_the_loop_s(n, k):
    f, group = draw(n, 4), whole(k, n, low=-1)
    means, counts = group_means(f, group, k)
    for j in range(k):
        mine = [f[i] for i in range(n) if group[i] == j]
        assert counts[j] == len(mine)
        compare(means[j], sum(mine)/len(mine) if mine else torch.zeros(4, **F64), 1e-14)
    if n == 40: same_with_gradients(lambda f: group_means(f, group, k)[0], lambda f: torch.stack([f[group == j].mean(0) for j in range(k)]), f.requires_grad_())
    assert group_means(f.detach().bfloat16(), group, k)[0].dtype == torch.float32


@pytest.mark.parametrize("gamma", [0., .5, .9, .99, 1.])
def test_centres_after_n_steps_are_the_closed_form(gamma):
    c0, still, moving, ones, n = draw(3, 4), draw(3, 4, seed=1), draw(25, 3, 4, seed=2), torch.ones(3), 25
    c = e = c0
    for t in range(n): c, e = ema_update(c, still, ones, gamma), ema_update(e, moving[t], ones, gamma)
    compare(c, gamma**n*c0 + (1 - gamma**n)*still, 1e-13)
    compare(e, gamma**n*c0 + sum((1 - gamma)*gamma**(n - 1 - t)*moving[t] for t in range(n)), 1e-13)
    with expect_fail(): compare(c, gamma**(n - 1)*c0 + (1 - gamma**(n - 1))*still + 1e-3, 1e-4)


def test_centres_of_a_module_follow_the_closed_form():
    net, z, y = Centres(3, 1, 4).double(), draw(2, 9, 4), torch.tensor([1, 2, 2, 0, 3, 3, 1, 0, 2]).repeat(2, 1)
    mean = lambda z: torch.stack([z[y == k].mean(0) for k in (1, 2, 3)])
    net.update(z, y)
    compare(net.centres, mean(z), 1e-13)  # the first one is the mean itself
    for _ in range(20): net.update(z + 1, y)
    compare(net.centres, mean(z) + 1 - .9**20, 1e-12)


def test_an_absent_class_leaves_its_centre():
    z, y = draw(12, 5), torch.arange(12) % 3 + 1
    nets = {absent: Centres(3, 1, 5, absent=absent, metric="euclidean").double() for absent in ("keep", "zero")}
    for net in nets.values(): net.update(z, y)
    start = nets["keep"].centres
    some = y != 2
    for net in nets.values():
        for _ in range(10): net.update(z[some], y[some])
    compare(nets["keep"].centres, start, 1e-12)
    compare(nets["zero"].centres[1], .9**10*start[1], 1e-12)
    compare(nets["zero"].centres[[0, 2]], start[[0, 2]], 1e-12)
    before = nets["keep"].centres
    nets["keep"].update(z, torch.zeros_like(y))
    compare(nets["keep"].centres, before, 0.)  # nobody is labelled


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
@pytest.mark.parametrize("start", ["means", "ones"])
@pytest.mark.parametrize("learn", ["labels", "assignment"])
def test_only_labelled_pixels_move_centres(metric, start, learn):
    z, y = draw(3, 20, 4), whole(4, 3, 20)
    nets = [Centres(3, 2, 4, metric=metric, start=start, learn=learn).double() for _ in range(2)]
    for _ in range(4):
        nets[0].update(z, y)
        nets[1].update(torch.where(y[..., None] > 0, z, draw(3, 20, 4, seed=7)), y)
    if learn == "labels": compare(nets[1].centres, nets[0].centres, 0.)
    else:
        with expect_fail(): compare(nets[1].centres, nets[0].centres, .01)
        other = Centres(3, 2, 4, metric=metric, start=start, learn=learn).double()
        for _ in range(4): other.update(z)  # no labels at all
        compare(other.centres, nets[0].centres, 0.)
    assert nets[0].known.all() and not list(nets[0].parameters())


def test_centres_belong_to_their_class():
    z, y = draw(200, 3), whole(5, 200)
    net = Centres(4, 3, 3, metric="euclidean").double()
    for _ in range(3):
        there, group = net.groups(z, y)
        compare(there, z[y > 0], 0.)
        assert torch.equal(group//3, y[y > 0] - 1)
        net.update(z, y)


def test_start_at_ones_is_uniform_and_unknown_gets_nothing():
    z = draw(2, 7, 4)
    compare(Centres(3, 2, 4, start="ones").double()(z), torch.full((2, 7, 6), 1/6, **F64), 1e-12)
    for metric in ("cosine", "euclidean"):
        net = Centres(3, 2, 4, metric=metric).double()
        compare(net(z), torch.full((2, 7, 6), 1/6, **F64), 1e-12)
        net.update(z, torch.full((2, 7), 2))
        assert net.known.tolist() == [False, False, True, True, False, False]
        compare(net(z).sum(-1), torch.ones(2, 7, **F64), 1e-12)
        assert (net(z)[..., [0, 1, 4, 5]] == 0).all()


def test_fewer_pixels_than_centres():
    z = draw(4, 3)
    net = Centres(2, 3, 3).double()
    net.update(z, torch.tensor([1, 2, 2, 0]))
    assert net.known.tolist() == [True, False, False, True, True, False]
    more = draw(20, 3, seed=4)
    net.update(more, torch.ones(20, dtype=torch.int64))
    assert net.known.tolist() == [True, True, True, True, True, False]  # as soon as there are enough
    c = net.centres[:3]  # the two new ones sit near pixels, a tenth of the way to their group's mean
    assert (F.normalize(c, dim=1) @ F.normalize(more, dim=1).T).amax(1)[1:].min() > .9
    same = Centres(1, 3, 3).double()
    same.update(z[:1].expand(5, 3), torch.ones(5, dtype=torch.int64))
    assert same.known.sum() == 1
    compare(same.centres[0], z[0], 1e-12)
    for _ in range(3): same.update(z[:1].expand(5, 3), torch.ones(5, dtype=torch.int64))
    assert same.known.sum() == 1  # many pixels, but one kind


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
@pytest.mark.parametrize("learn", ["labels", "assignment"])
@pytest.mark.parametrize("start", ["means", "ones"])
def test_a_late_centre_is_reseeded(metric, learn, start):
    on = lambda *degrees: torch.tensor([[math.cos(math.radians(a)), math.sin(math.radians(a))] for a in degrees], **F64)
    early, late, y = on(0, 4, 80, 84), on(120, 124, 170, 174), torch.ones(4, dtype=torch.int64)
    nets = {p: Centres(1, 2, 2, metric=metric, learn=learn, start=start, patience=p).double() for p in (5, None)}
    for net in nets.values():
        for _ in range(30): net.update(early, y)
        assert net.idle.tolist() == [0, 0]
        old = net.centres
        for t in range(1, 6):
            net.update(late, y)
            assert sorted(net.idle.tolist()) == [0, t]
            lost = net.idle.argmax()
            compare(net.centres[lost], old[lost], 0.)
            if learn == "labels":  # its class is not there: nothing is counted
                net.update(late, 0*y)
                assert net.idle.max() == t
    moved = nets[5].centres
    distance = lambda c: (late - c).square().sum(1) if metric == "euclidean" else 1 - F.cosine_similarity(late, c[None], dim=1)
    seed = late[distance(moved[1 - lost]).argmax()]
    for net in nets.values(): net.update(late, y)
    group = nets[5].groups(late, y)[1]
    compare(nets[5].centres[lost], .9*seed + .1*late[group == lost].mean(0), 1e-12)  # on the farthest pixel, then one step
    assert nets[5].idle.tolist() == [0, 0] and len(group.unique()) == 2
    compare(nets[None].centres[lost], old[lost], 0.)
    for _ in range(60):
        for net in nets.values(): net.update(late, y)
    compare(nets[5].centres[nets[5].groups(late, y)[1]], torch.stack([late[:2].mean(0)]*2 + [late[2:].mean(0)]*2), .02)
    with expect_fail(): compare(nets[None].centres[nets[None].groups(late, y)[1]], torch.stack([late[:2].mean(0)]*2 + [late[2:].mean(0)]*2), .02)


def test_idle_counts_survive_a_checkpoint():
    x, y = torch.tensor([[0.], [1.], [10.], [11.]]), torch.ones(4, dtype=torch.int64)
    net, again = (Centres(1, 2, 1, metric="euclidean", patience=8) for _ in range(2))
    net.update(x, y)
    for t in range(20):
        if t == 4: again.load_state_dict(copy.deepcopy(net.state_dict()))
        net.update(x + 20, y)
        if t >= 4: again.update(x + 20, y)
    compare(again.centres, net.centres, 0.)
    assert net.centres.min() > 20


def test_two_materials_need_two_centres():
    a, b = torch.tensor([4., 0, 0]), torch.tensor([0., 4, 0])
    z = torch.cat([a + .1*draw(30, 3, dtype=torch.float32), b + .1*draw(50, 3, seed=1, dtype=torch.float32)])
    z = z[torch.randperm(80, generator=torch.Generator().manual_seed(0))]
    net = Centres(1, 2, 3, metric="euclidean")
    net.update(z, torch.ones(80, dtype=torch.int64))
    near = torch.cdist(torch.stack([a, b]), net.centres).amin(1)
    assert near.max() < .1
    one = Centres(1, 1, 3)
    one.update(z, torch.ones(80, dtype=torch.int64))
    assert torch.cdist(torch.stack([a, b]), one.centres).min() > 1
    again = Centres(1, 2, 3, metric="euclidean")
    again.update(z, torch.ones(80, dtype=torch.int64))
    compare(again.centres, net.centres, 0.)  # no dice


def test_an_update_between_forward_and_backward_harms_no_gradient():
    grads = []
    for late in (False, True):
        net, z, y = Centres(2, 2, 4).double(), draw(2, 6, 4).requires_grad_(), whole(3, 2, 6)
        net.update(z, y)
        p = net(z)
        if late: net.update(z + 1, y)
        cluster_loss(z, p).backward()
        grads.append(z.grad)
        assert net.centres.grad_fn is None and not net.centres.requires_grad
    compare(grads[1], grads[0], 0.)


def test_checkpoint_round_trip():
    net, z, y = Centres(3, 2, 4), draw(9, 4, dtype=torch.float32), whole(3, 9)
    net.update(z, y)
    again = Centres(3, 2, 4)
    again.load_state_dict(copy.deepcopy(net.state_dict()))
    for _ in range(2):
        compare(again.centres, net.centres, 0.)
        compare(again(z), net(z), 0.)
        assert torch.equal(again.known, net.known) and set(net.state_dict()) == {"centres", "known", "idle"}
        for n in (net, again): n.update(z + 1, y)


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
@pytest.mark.parametrize("k", [1, 2, 9])
def test_assign(metric, k):
    z, centres = 3 + draw(2, 9, 4), 3 + draw(k, 4, seed=1)
    p = assign(z, centres, .5, metric)
    d = (z[:, :, None] - centres).square().sum(-1) if metric == "euclidean" else 1 - F.cosine_similarity(z[:, :, None], centres, dim=-1)
    compare(p, (-d/.5).softmax(-1), 1e-12)
    order = torch.randperm(k, generator=torch.Generator().manual_seed(3))
    compare(assign(z, centres[order], .5, metric), p[..., order], 1e-12)  # numbers of clusters mean nothing
    check_gradient(lambda z, c: assign(z, c, .5, metric), z[:, :2].clone().requires_grad_(), centres.clone().requires_grad_())
    if k > 2:
        known = torch.arange(k) % 2 == 0
        compare(assign(z, centres, .5, metric, known)[..., known], assign(z, centres[known], .5, metric), 1e-12)


def loss_ref(z, p):
    z, p = z.flatten(0, -2), p.flatten(0, -2)
    n, k, zn = len(z), p.shape[-1], [v/v.norm() for v in z]
    m = [sum(p[i, j]*zn[i] for i in range(n))/p[:, j].sum() for j in range(k)]
    spread = sum(p[i, j]*(zn[i] - m[j]).square().sum() for i in range(n) for j in range(k))/n
    cos = [m[i] @ m[j]/m[i].norm()/m[j].norm() for i in range(k) for j in range(k) if i != j]
    return spread + (sum(cos)/len(cos) if cos else 0)


@pytest.mark.parametrize("k", [1, 2, 5])
def test_cluster_loss(k):
    z, p = draw(2, 6, 4).requires_grad_(), draw(2, 6, k, seed=1).softmax(-1).requires_grad_()
    same_with_gradients(cluster_loss, loss_ref, z, p, rtol=1e-10)
    padded = torch.cat([p, torch.zeros(2, 6, 3, **F64)], -1)
    compare(cluster_loss(z, padded), cluster_loss(z, p), 1e-12)  # centres that nobody uses cost nothing
    far = F.one_hot(torch.arange(6) % 2, 2).double()
    compare(cluster_loss(far, far), torch.tensor(0., **F64), atol=1e-14)  # two points, right angle


@pytest.mark.parametrize("standardise", [True, False])
def test_dual_scores(standardise):
    z, p, q, k = draw(3, 7, 4), draw(3, 7, 5, seed=1).softmax(-1), draw(2, 4, seed=2), draw(2, 4, seed=3)
    alpha = torch.tensor(.3, **F64)
    S = dual_scores(z, p, q, k, alpha, standardise)
    a = torch.stack([torch.stack([(q @ t) @ (k @ t)/2**.5 for t in image]) for image in z])
    s, w = p.max(-1).values, 1/(1 + math.exp(-.3))
    scale = lambda x: (x - x.mean(1, keepdim=True))/x.std(1, correction=0, keepdim=True)
    want = (w*scale(a) + (1 - w)*scale(s)).sigmoid() if standardise else w*a.softmax(1) + (1 - w)*s.softmax(1)
    compare(S, want, 1e-9)
    check_batch_independent(lambda x: dual_scores(x[..., :4], x[..., 4:], q, k, alpha, standardise), torch.cat([z, p], -1), 1e-10)
    inputs = [x.clone().requires_grad_() for x in (z[:1, :4], p[:1, :4], q, k, alpha)]
    check_gradient(lambda *x: dual_scores(*x, standardise), *inputs)
    flat = dual_scores(z[:, :1], p[:, :1].requires_grad_(), q, k, alpha, standardise)
    flat.sum().backward()
    assert flat.isfinite().all()


@pytest.mark.parametrize("b, l, k, ratio", [(1, 1, 1, .5), (2, 30, 4, .3), (3, 13, 13, .01), (2, 20, 2, 1.), (2, 30, 1, .1)])
def test_select_tokens(b, l, k, ratio):
    S, cluster = draw(b, l), whole(k, b, l)
    keep = select_tokens(S, cluster, k, ratio)
    for i in range(b):
        for c in range(k):
            mine = (cluster[i] == c).nonzero()[:, 0]
            best = mine[S[i, mine].argsort(descending=True)][:math.ceil(round(ratio*len(mine), 9))]
            assert set(keep[i].nonzero()[:, 0].tolist()) & set(mine.tolist()) == set(best.tolist())
    if ratio == 1: assert keep.all()


@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("ratio", [1., .4])
@pytest.mark.parametrize("b, l, k", [(1, 1, 1), (2, 12, 1), (3, 12, 5), (2, 12, 12)])
def test_packing(b, l, k, ratio, ordered):
    x, S = draw(b, l, 3), draw(b, l, seed=1)
    cluster = torch.arange(l).expand(b, l) if k == l else whole(k, b, l)
    keep = select_tokens(S, cluster, k, ratio)
    index, seq_idx, valid = pack_order(cluster, S if ordered else None, keep)
    y = gather_tokens(x, index)
    compare(scatter_tokens(y, index, valid, l), torch.where(keep[..., None], x, 0), 0.)
    assert index.shape[1] == keep.sum(1).max() and torch.equal(valid.sum(1), keep.sum(1))
    for i in range(b):
        assert len(set(index[i].tolist())) == index.shape[1]
        own = index[i, valid[i]]
        assert torch.equal(seq_idx[i, valid[i]], cluster[i, own]) and (seq_idx[i, ~valid[i]] == cluster.max() + 1).all()
        for c in cluster[i].unique():
            mine = own[cluster[i, own] == c]
            order = S[i, mine] if ordered else -mine
            assert (order[1:] <= order[:-1]).all()
    y = torch.where(valid[..., None], y, torch.nan)  # what fillers hold goes nowhere
    compare(scatter_tokens(y, index, valid, l), torch.where(keep[..., None], x, 0), 0.)


def local(mamba, x, cluster, border=True):
    index, seq_idx, valid = pack_order(cluster)
    return scatter_tokens(mamba(gather_tokens(x, index), seq_idx if border else None), index, valid, x.shape[1])


def test_no_state_crosses_a_border_and_numbers_mean_nothing():
    torch.manual_seed(0)
    mamba, x, cluster = Mamba(6, 4).double(), draw(2, 20, 6), whole(3, 2, 20)
    y = local(mamba, x, cluster)
    for c in range(3):
        inside = cluster == c
        changed = torch.where(inside[..., None], draw(2, 20, 6, seed=5), x)
        compare(local(mamba, changed, cluster)[~inside], y[~inside], 0.)
        if c == 2: continue  # nothing comes after the last one
        with expect_fail(): compare(local(mamba, changed, cluster, False)[~inside], local(mamba, x, cluster, False)[~inside], 1e-9)
    for c in range(3):  # each cluster by itself, image by image
        for i in range(2): compare(y[i, cluster[i] == c], mamba(x[i, cluster[i] == c][None])[0], 1e-10)
    compare(local(mamba, x, torch.tensor([2, 0, 1])[cluster]), y, 1e-12)
    compare(local(mamba, x, torch.zeros_like(cluster)), mamba(x), 1e-12)  # one cluster
    compare(local(mamba, x, torch.arange(20).expand(2, 20)), mamba(x.reshape(40, 1, 6)).reshape(x.shape), 1e-10)  # as many as pixels


def test_one_centre_and_as_many_as_pixels():
    z = draw(1, 8, 4)
    for k in (1, 8):
        net = Centres(k, 1, 4, learn="assignment", metric="euclidean").double()
        net.update(z)
        p = net(z)
        assert p.shape == (1, 8, k) and net.known.all() and cluster_loss(z, p).isfinite()
        assert len(p.argmax(-1).unique()) == k


def test_a_hard_choice_stops_the_gradient_and_a_product_mends_it():
    z, p, cluster = draw(1, 10, 4), draw(1, 10, 3, seed=1).softmax(-1), whole(3, 1, 10)
    q, k, alpha = (x.requires_grad_() for x in (draw(2, 4, seed=2), draw(2, 4, seed=3), torch.tensor(.5, **F64)))
    S = dual_scores(z, p, q, k, alpha)
    index, _, valid = pack_order(cluster, S, select_tokens(S, cluster, 3, .5))
    kept = gather_tokens(z.requires_grad_(), index)
    grads = torch.autograd.grad(kept.square().sum(), [q, k, alpha], allow_unused=True)
    assert all(g is None for g in grads)
    grads = torch.autograd.grad((kept*gather_tokens(S[..., None], index)).square().sum(), [q, k, alpha])
    assert all(g.abs().max() > 1e-4 for g in grads)


def test_errors():
    z, centres = draw(5, 4), draw(3, 4)
    net, zero, S = Centres(2, 1, 4), torch.zeros(1, 5, dtype=torch.int64), draw(1, 5)
    cases = [("-1 for none", lambda: group_means(z, torch.tensor([0, 1, 2, 3, 0]), 3)), ("(n,d)", lambda: group_means(z[0], torch.zeros(4), 2)),
             ("gamma=1.2", lambda: ema_update(centres, centres, torch.ones(3), 1.2)), ("tau=0", lambda: assign(z, centres, 0)),
             ("'cosine' or 'euclidean'", lambda: assign(z, centres, metric="cos")), ("(...,d) and (k,d)", lambda: assign(z, centres[:, :3])),
             ("absent='drop'", lambda: Centres(2, 1, 4, absent="drop")), ("use 1 or more", lambda: Centres(0, 1, 4)),
             ("y: expected 5 labels", lambda: net.update(z)), ("label 3, but there are 2", lambda: net.update(z, torch.full((5,), 3))),
             ("label -1, but", lambda: net.update(z, torch.full((5,), -1))),
             ("patience=0", lambda: Centres(2, 1, 4, patience=0)), ("0 to k-1 = 1", lambda: select_tokens(S, zero + 2, 2, .5)),
             ("from -1 to -1", lambda: select_tokens(S, zero - 1, 2, .5)), ("ratio=0", lambda: select_tokens(z[:1], zero[:, :4], 1, 0)), ("(b,l) twice", lambda: select_tokens(z, zero, 1, .5)),
             ("keep is (5, 4)", lambda: pack_order(zero, keep=z > 0)), ("(b,l,d) and (b,l,k)", lambda: dual_scores(z, z, z, z, .5)),
             ("(...,d) and (...,k)", lambda: cluster_loss(z, z[:3]))]
    for words, call in cases:
        with pytest.raises(InputError) as e: call()
        assert words in str(e.value) and "\n" not in str(e.value), e.value
