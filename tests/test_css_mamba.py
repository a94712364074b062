"""CSSMamba: images of any size, clusters apart in value and gradient, numbers of clusters only names, centres moved by given labels alone, and what it refuses."""
import copy
import pickle

import pytest
import torch
import torch.nn.functional as F

from hsi_mamba_nb.errors import InputError
from hsi_mamba_nb.learn.protocol import count_flops
from hsi_mamba_nb.models import ClusterScan, CSSMamba, GlobalScan, PerClusterLocal, SharedLocal, create_model, local_scan, local_scan_ref
from hsi_mamba_nb.parts.clustering_ema import Centres, select_tokens
from hsi_mamba_nb.scan.mamba_block import BiMamba, Mamba
from hsi_mamba_nb.start.testing import check_batch_independent, compare, same_with_gradients

SMALL = dict(d_model=8, clusters=2)
VARIANTS = ["fixed", "paper"]


def draw(*size, seed=0): return torch.randn(*size, generator=torch.Generator().manual_seed(seed))
def labels(b=2, h=7, w=10, k=3, seed=0): return torch.randint(0, k + 1, (b, h, w), generator=torch.Generator().manual_seed(seed))
def count(net): return sum(p.numel() for p in net.parameters())
def centres(net): return [b.local.centres.centres.clone() for b in net.blocks]


def make(*args, seed=0, taught=True, **options):
    "A net whose centres have seen labels once."
    torch.manual_seed(seed)
    net = create_model("css-mamba", *(args or (6, 3)), **{**SMALL, **options})
    if taught: net.loss(draw(2, 6, 7, 10, seed=7), labels())
    return net


def block_parameters(d, n=16, k=4):
    e, r = 2*d, -(-d//16)
    return e*n + e + 3*e*d + (k + 1)*e + e*(r + 2*n) + r*e + e


def parameters(c, k, variant, d, clusters, depth=1, cluster=True, two_way=True):
    M, paper, ways = block_parameters, variant == "paper", 1 + two_way
    wide, K = d*(1 + paper), k*clusters
    local = d + (d + 1)*wide + 2*max(1, d//4)*wide + 1 + (K*(5*wide + M(wide) + (wide + 1)*d) if paper else ways*M(wide))
    spread = d + ways*M(wide) + 2*d + (((d + 1)*wide + (wide + 1)*d) if paper else 0)
    return c*d + 3*d + depth*(local*cluster + spread + M(d//4) + 2*d + 2) + 128*d + 384 + 129*k


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("options", [{}, dict(d_model=16, clusters=3), dict(depth=2, clusters=1), dict(cluster=False), dict(d_model=4)])
def test_parameters(variant, options):
    o = {**SMALL, **options}
    assert count(make(variant=variant, taught=False, **options)) == parameters(6, 3, variant, o["d_model"], o["clusters"], o.get("depth", 1), o.get("cluster", True), variant == "fixed")


def test_parameters_do_not_grow_with_clusters():
    assert len({count(make(clusters=k, taught=False)) for k in (1, 3, 5)}) == 1
    assert len({count(make(clusters=k, taught=False, variant="paper")) for k in (1, 3, 5)}) == 3
    assert {n for n, _ in make().named_buffers()} == {"blocks.0.local.centres.centres", "blocks.0.local.centres.known", "blocks.0.local.centres.idle"}


@pytest.mark.parametrize("h, w", [(1, 1), (1, 9), (9, 1), (2, 3), (13, 8)])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("taught", [False, True])
def test_any_size(h, w, variant, taught):
    net, x = make(variant=variant, taught=taught), draw(2, 6, h, w)
    y = net(x)
    assert y.shape == (2, 3, h, w) and y.isfinite().all()
    compare(net.eval()(x), net.train()(x), 0.)
    loss, terms = net.loss(x, labels(2, h, w))
    loss.backward()
    assert set(terms) == {"ce", "cluster"} and all(p.grad is None or p.grad.isfinite().all() for p in net.parameters())


@pytest.mark.parametrize("options", [{}, dict(variant="paper"), dict(ratio=.4), dict(order="score"), dict(two_way=False), dict(cluster=False), dict(depth=2), dict(variant="paper", depth=2, order="raster", ratio=1.)])
def test_images_of_a_batch_are_kept_apart(options):
    net = make(**options)
    check_batch_independent(lambda x: net(x).detach(), draw(3, 6, 7, 10))
    y = net(draw(1, 6, 7, 10))
    blank = net(torch.zeros(1, 6, 7, 10))  # equal scores everywhere
    assert y.isfinite().all() and blank.isfinite().all()


@pytest.mark.parametrize("how", [{}, "S", "keep", "both"])
@pytest.mark.parametrize("kind", [Mamba, BiMamba])
def test_one_call_is_the_loop(how, kind):
    torch.manual_seed(0)
    scan, z, S = kind(4, d_state=3).double(), draw(3, 29, 4).double().requires_grad_(), draw(3, 29, seed=2).double()
    cluster = torch.randint(0, 5, (3, 29), generator=torch.Generator().manual_seed(3))
    cluster[1] = 2  # all in one
    how = {**({"S": S} if how in ("S", "both") else {}), **({"keep": S > 0} if how in ("keep", "both") else {})}
    same_with_gradients(lambda z: local_scan(scan, z, cluster, **how), lambda z: local_scan_ref(scan, z, cluster, **how), z, rtol=1e-9)


def test_as_many_clusters_as_pixels():
    scan, z = BiMamba(4), draw(2, 9, 4)
    each = torch.arange(9).expand(2, 9)
    compare(local_scan(scan, z, each), scan(z.reshape(18, 1, 4)).view(2, 9, 4), 1e-5)
    compare(local_scan(scan, z, torch.zeros_like(each)), scan(z), 1e-5)


@pytest.mark.parametrize("order, ratio, two_way", [("raster", 1., True), ("raster", .5, False), ("score", 1., False), ("score", .5, True)])
def test_no_state_crosses_a_border(order, ratio, two_way):
    torch.manual_seed(0)
    local, z, S = SharedLocal(4, 3, ratio, order, two_way), draw(2, 20, 4).requires_grad_(), draw(2, 20, seed=1).sigmoid()
    cluster = torch.arange(40).view(2, 20)//2 % 3
    inside = torch.zeros(2, 20, dtype=torch.bool)
    inside[0] = cluster[0] == 1
    g, = torch.autograd.grad(local(z, cluster, S)[inside].square().sum(), z)
    assert g[inside].abs().max() > 0 and g[~inside].abs().max() == 0


@pytest.mark.parametrize("order, ratio", [("raster", 1.), ("score", .5), ("raster", .5)])
def test_numbers_of_clusters_are_only_names(order, ratio):
    net, x = make(clusters=3, order=order, ratio=ratio), draw(2, 6, 7, 10)
    y, twin = net(x), copy.deepcopy(net)
    c = twin.blocks[0].local.centres
    assert c.known.all() and len(c(net.features(x)[1][0][0]).argmax(-1).unique()) > 3
    for order in ([2, 0, 1, 3, 4, 5, 6, 8, 7], list(range(8, -1, -1))):
        c.centres, c.known = c.centres[order], c.known[order]
        compare(twin(x).detach(), y.detach(), 1e-4)
    changed = copy.deepcopy(net)
    changed.blocks[0].local.centres.centres = draw(*c.centres.shape, seed=9)
    with pytest.raises(AssertionError): compare(changed(x).detach(), y.detach(), 1e-4)


def test_paper_reads_each_cluster_with_its_own_weights():
    torch.manual_seed(0)
    local, z, S, cluster = PerClusterLocal(4, 3), draw(1, 30, 8), draw(1, 30, seed=1), torch.arange(30)[None] % 3
    y = local(z, cluster, S)
    assert (y.abs().sum(-1) > 0).sum() == 15 == local(z, torch.zeros_like(cluster), S).abs().sum(-1).gt(0).sum()
    local.out[1].weight.data.zero_(), local.out[1].bias.data.zero_()
    new = local(z, cluster, S)
    assert not new[cluster == 1].any()
    compare(new[cluster != 1], y[cluster != 1], 0.)


@pytest.mark.parametrize("order", ["score", "raster"])
def test_paper_local_scan_is_the_loop(order):
    torch.manual_seed(0)
    local, z, S, cluster = PerClusterLocal(4, 5, .4, order), draw(2, 40, 8), draw(2, 40, seed=1), torch.arange(80).view(2, 40) % 4  # cluster 4 is empty
    def own(k): return lambda u: F.pad(local.out[k](local.mamba[k](local.conv[k](F.pad(u.mT, (3, 0))).mT)), (0, 4))
    def loop(S):
        keep = select_tokens(S, cluster, 5, .4)
        return sum(local_scan_ref(own(k), z, cluster, S if order == "score" else None, keep & (cluster == k)) for k in range(5))[..., :4]
    compare(local(z, cluster, S), loop(S), 1e-5)
    with pytest.raises(AssertionError): compare(local(z, cluster, S), loop(-S), 1e-3)


@pytest.mark.parametrize("two_way, wide", [(True, False), (False, True)])
def test_global_scan_written_out(two_way, wide):
    torch.manual_seed(0)
    net, t = GlobalScan(8, two_way, wide), draw(2, 30, 8)
    for p in (net.norm.weight, net.end[0].weight, net.end[0].bias): torch.nn.init.uniform_(p, .5, 2)
    u = net.down(net.scan(net.up(t/t.square().mean(-1, keepdim=True).sqrt()*net.norm.weight)))
    end = lambda y: F.silu(F.group_norm(y.mT, 4, net.end[0].weight, net.end[0].bias)).mT
    compare(net(t), end(t + u), 1e-4)
    for wrong in (t, u):
        with pytest.raises(AssertionError): compare(net(t), end(wrong), 1e-3)


def test_gradient_reaches_every_parameter_of_fixed():
    for options in ({}, dict(ratio=.5), dict(order="score", two_way=False), dict(depth=2), dict(cluster_weight=0.), dict(cluster=False)):
        net = make(**options)
        net.zero_grad()
        net.loss(draw(2, 6, 7, 10), labels())[0].backward()
        assert [n for n, p in net.named_parameters() if p.grad is None or not p.grad.abs().max() > 0] == []


def test_indices_teach_the_attention_of_paper_nothing():
    net = make(variant="paper")
    net.loss(draw(2, 6, 7, 10), labels())[0].backward()
    assert all(p.grad is None for p in net.blocks[0].local.attention.parameters())


@pytest.mark.parametrize("variant", VARIANTS)
def test_who_moves_the_centres(variant):
    net, x, y = make(variant=variant, depth=2), draw(2, 6, 7, 10), labels()
    def after(what):
        twin = copy.deepcopy(net)
        what(twin)
        return centres(twin)
    for nothing in (lambda n: n(x), lambda n: n.loss(x, torch.zeros_like(y)), lambda n: n.eval().loss(x, y), lambda n: [n(x) for _ in range(3)]):
        for a, b in zip(after(nothing), centres(net)): compare(a, b, 0.)
    one = after(lambda n: n.loss(x, torch.where(y == 2, y, 0)))
    for a, b in zip(one, centres(net)): assert ((a - b).abs().amax(1) > 0).nonzero()[:, 0].tolist() == [2, 3]
    once, twice = (after(lambda n, k=k: [n.loss(x, y) for _ in range(k)]) for k in (1, 2))
    for a, b, c in zip(centres(net), once, twice): assert not torch.equal(a, b) and not torch.equal(b, c)


def test_one_step_is_one_ema_step():
    net, x, y = make(gamma=.75), draw(2, 6, 7, 10), labels()
    z, want = net.features(x)[1][0][0].detach(), copy.deepcopy(net.blocks[0].local.centres)
    want.update(z, y)
    net.loss(x, y)
    compare(net.blocks[0].local.centres.centres, want.centres, 1e-6)


def test_label_free_centres_read_no_label():
    runs = []
    for y in (labels(), torch.zeros_like(labels())):
        net = make(centres="assignment", taught=False)
        for _ in range(2): net.loss(draw(2, 6, 7, 10), y)
        runs.append(net.blocks[0].local.centres)
    compare(runs[0].centres, runs[1].centres, 0.)
    assert runs[0].known.any()


def test_without_clusters():
    net = make(cluster=False, taught=False)
    assert not list(net.named_buffers())
    assert set(net.loss(draw(1, 6, 7, 10), labels(1))[1]) == {"ce"}


def test_loss_terms_and_no_labels():
    net, x = make().eval(), draw(2, 6, 7, 10)
    loss, terms = net.loss(x, labels())
    compare(loss.detach(), terms["ce"] + terms["cluster"], 1e-6)
    compare(terms["ce"], super(CSSMamba, net).loss(x, labels())[0].detach(), 1e-6)
    net.cluster_weight = 0.
    none, _ = net.loss(x, torch.zeros_like(labels()))
    assert none.item() == 0 and none.requires_grad


def loss_ref(net, x, y, blocks=None, gone=None):
    "Pixel by pixel, centre by centre."
    t, seen = net.features(x)
    share = net.head(t).softmax(1)
    total = -sum(share[b, y[b, r, c] - 1, r, c].log() for b, r, c in (y > 0).nonzero().tolist())/int((y > 0).sum())
    for z, p in seen[:blocks]:
        z, p = (v.flatten(0, 1) if gone is None else v[~gone.flatten(1)] for v in (z, p))
        z, (n, K) = z/z.norm(dim=1, keepdim=True), p.shape
        mu = [sum(p[i, k]*z[i] for i in range(n))/sum(p[i, k] for i in range(n)) for k in range(K)]
        near = sum(p[i, k]*(z[i] - mu[k]).square().sum() for i in range(n) for k in range(K))/n
        total = total + net.cluster_weight*(near + sum(F.cosine_similarity(mu[k], mu[j], dim=0) for k in range(K) for j in range(K) if k != j)/(K*(K - 1)))
    return total


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_loss_as_it_stands(variant):
    net, x, y = make(variant=variant, depth=2, cluster_weight=.3).eval(), draw(2, 6, 3, 4), labels(2, 3, 4)
    assert all(b.local.centres.known.all() for b in net.blocks)
    compare(net.loss(x, y)[0], loss_ref(net, x, y), 1e-5)
    with pytest.raises(AssertionError): compare(net.loss(x, y)[0], loss_ref(net, x, y, blocks=1), 1e-3)
    gone = torch.zeros(2, 3, 4, dtype=torch.bool)
    gone[0, :, 1], gone[1, 2] = True, True
    x = x*~gone[:, None]
    compare(net.loss(x, y)[0], loss_ref(net, x, y, gone=gone), 1e-5)
    with pytest.raises(AssertionError): compare(net.loss(x, y)[0], loss_ref(net, x, y), 1e-3)


@pytest.mark.parametrize("free", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_pixels_without_data_move_no_centre(variant, free):
    x, y, moved = draw(2, 6, 7, 10), labels(), []
    x[..., :4] = 0
    for hidden in (y, torch.cat((y[..., :4]*0, y[..., 4:]), 2)):
        net = make(variant=variant, centres="assignment" if free else "labels", taught=False)
        for _ in range(2): net.loss(x, hidden)
        moved.append(net.blocks[0].local.centres)
    compare(moved[0].centres, moved[1].centres, 0.)
    want = copy.deepcopy(make(variant=variant, centres="assignment" if free else "labels", taught=False))
    z = want.features(x)[1][0][0].detach()[:, torch.arange(70) % 10 > 3]
    for _ in range(2): want.blocks[0].local.centres.update(z, y[..., 4:].flatten(1))
    compare(moved[0].centres, want.blocks[0].local.centres.centres, 1e-5)


@pytest.mark.parametrize("free", [False, True])
def test_an_image_without_data(free):
    net = make(centres="assignment" if free else "labels", taught=False)
    loss, terms = net.loss(torch.zeros(1, 6, 4, 5), labels(1, 4, 5))
    loss.backward()
    assert loss.isfinite() and terms["cluster"] == 0 and not net.blocks[0].local.centres.known.any()


@pytest.mark.parametrize("variant", VARIANTS)
def test_no_cluster_loss_before_the_first_centre(variant):
    net = make(variant=variant, taught=False)
    (loss, terms), (_, later) = (net.loss(draw(2, 6, 7, 10), labels()) for _ in range(2))
    assert terms["cluster"] == 0 and loss.item() == terms["ce"] and later["cluster"] != 0


@pytest.mark.parametrize("variant", VARIANTS)
def test_checkpoint_and_copies(variant):
    net, x = make(variant=variant), draw(1, 6, 5, 9)
    new = make(variant=variant, seed=1, taught=False)
    assert not new.blocks[0].local.centres.known.any()
    new.load_state_dict(net.state_dict())
    for twin in (new, copy.deepcopy(net), pickle.loads(pickle.dumps(net))): compare(twin(x).detach(), net(x).detach(), 0.)


def test_unlabelled_classes_stay_unknown():
    net = make(taught=False)
    net.loss(draw(1, 6, 4, 5), torch.full((1, 4, 5), 2))
    assert net.blocks[0].local.centres.known.tolist() == [False, False, True, True, False, False]
    assert net(draw(1, 6, 4, 5)).isfinite().all()


def test_operations_are_counted():
    flops = [count_flops(make(taught=False, **o)) for o in (dict(cluster=False), {}, dict(clusters=5))]
    assert 0 < flops[0] < flops[1] < flops[2] < 1.2*flops[1]  # more centres cost their cosines
    assert count_flops(make(variant="paper", taught=False)) > flops[0]


def test_options_and_defaults():
    assert make(taught=False).config["ratio"] is None and make(taught=False).blocks[0].local.local.ratio == 1
    paper = make(variant="paper", taught=False).blocks[0]
    assert (paper.local.local.ratio, paper.local.local.order, paper.local.centres.tau, type(paper.spread.scan)) == (.5, "score", 1., Mamba)
    assert paper.local.centres.patience is None and make(taught=False).blocks[0].local.centres.patience == 50
    assert isinstance(paper.local, ClusterScan) and isinstance(paper.local.centres, Centres)


@pytest.mark.parametrize("options, word", [(dict(variant="best"), "variant"), (dict(centres="none"), "centres"), (dict(order="best"), "order"), (dict(d_model=10), "use 12"), (dict(d_model=0), "d_model"),
                                           (dict(clusters=0), "clusters"), (dict(depth=1.5), "depth"), (dict(tau=0.), "tau"), (dict(ratio=1.2), "ratio"), (dict(gamma=2), "gamma"), (dict(cluster_weight=-1), "cluster_weight"),
                                           (dict(tau="0.1"), "tau"), (dict(gamma="x"), "gamma"), (dict(ratio=True), "ratio"), (dict(tau=float("nan")), "tau"), (dict(cluster_weight=float("inf")), "cluster_weight"), (dict(cluster="no"), "cluster"), (dict(two_way=3), "two_way"), (dict(variant=["paper"]), "variant")])
def test_refuses(options, word):
    with pytest.raises(InputError, match=word): make(taught=False, **options)


@pytest.mark.parametrize("x", [draw(1, 7, 5, 6), draw(6, 5, 6), draw(0, 6, 5, 5), draw(1, 6, 0, 5), None])
def test_refuses_an_image(x):
    with pytest.raises(InputError, match="c = 6"): make(taught=False)(x)
