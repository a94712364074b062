"""MambaHSI: its parameters by count, name and shape, images of any size, a batch kept apart, gradients everywhere, and what it refuses."""
import copy
import pickle

import pytest
import torch

from hsi_mamba_nb.errors import InputError
from hsi_mamba_nb.models import BothMamba, MambaHSI, SpaMamba, SpeMamba, create_model, list_models
from hsi_mamba_nb.models import mamba_hsi as module
from hsi_mamba_nb.start.testing import check_batch_independent, compare

SMALL = dict(hidden_dim=8)


def draw(*size, seed=0): return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


def make(*args, seed=0, **options):
    torch.manual_seed(seed)
    return create_model("mamba-hsi", *(args or (6, 3)), **{**SMALL, **options})


@pytest.mark.parametrize("bands, classes, total", [(103, 9, 412_239), (144, 15, 418_261), (274, 16, 435_030), (270, 22, 435_292), (200, 16, 425_558), (204, 16, 426_070)])
def test_counts_of_the_authors_code(bands, classes, total):
    assert sum(p.numel() for p in MambaHSI(bands, classes).parameters()) == total


def mamba_shapes(d, n=16, k=4):
    e, r = 2*d, -(-d//16)
    return {"A_log": (e, n), "D": (e,), "in_proj.weight": (2*e, d), "conv1d.weight": (e, 1, k), "conv1d.bias": (e,), "x_proj.weight": (r + 2*n, e),
            "dt_proj.weight": (e, r), "dt_proj.bias": (e,), "out_proj.weight": (d, e)}


def branch_shapes(token, d): return {f"mamba.{k}": v for k, v in mamba_shapes(token).items()} | {"proj.0.weight": (d,), "proj.0.bias": (d,)}


@pytest.mark.parametrize("kind", ["both", "spa", "spe"])
def test_names_and_shapes_of_the_authors_code(kind, c=103, k=9, d=128):
    spa, spe = branch_shapes(d, d), branch_shapes(d//4, d)
    block = {"spa": spa, "spe": spe, "both": {"weights": (2,)} | {f"spa_mamba.{n}": v for n, v in spa.items()} | {f"spe_mamba.{n}": v for n, v in spe.items()}}[kind]
    want = {"patch_embedding.0.weight": (d, c, 1, 1), "patch_embedding.0.bias": (d,), "patch_embedding.1.weight": (d,), "patch_embedding.1.bias": (d,)}
    for i in (0, 2, 4): want |= {f"mamba.{i}.{n}": v for n, v in block.items()}
    want |= {"cls_head.0.weight": (128, d, 1, 1), "cls_head.0.bias": (128,), "cls_head.1.weight": (128,), "cls_head.1.bias": (128,),
             "cls_head.3.weight": (k, 128, 1, 1), "cls_head.3.bias": (k,)}
    state = MambaHSI(c, k, mamba_type=kind).state_dict()
    assert {n: tuple(v.shape) for n, v in state.items()} == want
    assert list(state) == list(want)


def test_plain_sum_has_no_shares():
    assert not any(n.endswith(".weights") for n in make(use_att=False).state_dict())
    assert make(use_att=False)(draw(1, 6, 5, 7)).shape == (1, 3, 5, 7)


@pytest.mark.parametrize("h, w", [(1, 1), (1, 9), (9, 1), (2, 3), (7, 5), (8, 12), (13, 22), (17, 4)])
@pytest.mark.parametrize("kind", ["both", "spa", "spe"])
def test_any_size(h, w, kind):
    net, x = make(mamba_type=kind), draw(2, 6, h, w)
    y = net(x)
    assert y.shape == (2, 3, h, w) and y.isfinite().all()
    compare(net.eval()(x), net.train()(x), 0.)


@pytest.mark.parametrize("depth", [1, 2, 5])
def test_depth(depth): assert make(depth=depth)(draw(1, 6, 9, 7)).shape == (1, 3, 9, 7)


@pytest.mark.parametrize("recompute", [False, True])
def test_images_of_a_batch_are_kept_apart(recompute):
    net = make(recompute=recompute)
    check_batch_independent(lambda x: net(x).detach(), draw(3, 6, 9, 14))


def test_paper_joins_the_images_of_a_batch():
    fixed, paper, x = make(), make(variant="paper"), draw(3, 6, 9, 14)
    compare(paper(x[:1]), fixed(x[:1]), 1e-5)
    with pytest.raises(AssertionError): check_batch_independent(paper, x)
    with pytest.raises(AssertionError): compare(paper(x), fixed(x), 1e-3)
    compare(paper(x)[0], fixed(x)[0], 1e-5)  # nothing comes before the first


def test_paper_is_one_sequence_row_by_row():
    torch.manual_seed(0)
    spa, x = SpaMamba(8, variant="paper"), draw(2, 8, 3, 5)
    y = spa.mamba(torch.stack([x[i, :, r, c] for i in range(2) for r in range(3) for c in range(5)])[None])
    want = x + torch.nn.functional.silu(spa.proj[0](y.view(2, 3, 5, 8).permute(0, 3, 1, 2)))
    compare(spa(x), want)


def test_spectral_portions_and_filled_tokens(monkeypatch):
    torch.manual_seed(0)
    spe, x = SpeMamba(12, tokens=5, groups=3), draw(2, 12, 5, 7)
    whole = spe(x)
    assert whole.shape == x.shape
    monkeypatch.setattr(module, "_PORTION", 16)
    compare(spe(x), whole)
    pixel = spe.mamba(torch.nn.functional.pad(x[1, :, 4, 6], (0, 3)).view(1, 5, 3)).flatten()
    tokens = torch.stack([spe.mamba(torch.nn.functional.pad(v, (0, 3)).view(1, 5, 3)).flatten() for v in x[1].flatten(1).T]).T.view(1, 15, 5, 7)
    compare(tokens[0, :, 4, 6], pixel)
    compare(whole[1], x[1] + spe.proj(tokens)[0, :12])


def test_mute_branches_double_the_input():
    both, x = BothMamba(8), draw(2, 8, 3, 5)
    for branch in (both.spa_mamba, both.spe_mamba): torch.nn.init.zeros_(branch.proj[0].weight)
    compare(both(x), 2*x)
    bare = BothMamba(8, residual=False)
    for branch in (bare.spa_mamba, bare.spe_mamba): torch.nn.init.zeros_(branch.proj[0].weight)
    compare(bare(x), 0*x)


@pytest.mark.parametrize("options", [{}, dict(mamba_type="spa"), dict(mamba_type="spe"), dict(variant="paper"), dict(use_residual=False), dict(use_att=False)])
def test_gradients_reach_all_parameters(options):
    net, x, y = make(**options), draw(2, 6, 9, 14), torch.randint(0, 4, (2, 9, 14), generator=torch.Generator().manual_seed(0))
    again = make(**options, recompute=True)
    for m in (net, again): m.loss(x, y)[0].backward()
    for (name, p), q in zip(net.named_parameters(), again.parameters()):
        assert p.grad is not None and p.grad.isfinite().all() and p.grad.abs().max() > 0, name
        compare(q.grad, p.grad, 1e-4, atol=1e-7, name=name)


def test_loss_reads_labelled_pixels_alone():
    net, x, y = make(), draw(2, 6, 5, 7), torch.zeros(2, 5, 7, dtype=torch.long)
    loss, terms = net.loss(x, y)
    loss.backward()
    assert loss.item() == 0 and all(p.grad is None or p.grad.isfinite().all() for p in net.parameters())
    y[1, 2, 3] = 2
    compare(net.loss(x, y)[0], torch.nn.functional.cross_entropy(net(x)[1, :, 2, 3][None], torch.tensor([1])))


def test_tiles_matter_by_the_norms_alone():
    "Halves cut where coarse cells meet: the spectral branch reads pixel by pixel, so without group norms halves and whole agree, and with them they do not."
    net, x = make(mamba_type="spe"), draw(1, 6, 8, 16)
    coarse = lambda net, x: net.cls_head(net.mamba(net.patch_embedding(x)))
    apart = lambda net: torch.cat([coarse(net, half) for half in x.split(8, 3)], 3)
    with pytest.raises(AssertionError): compare(apart(net), coarse(net, x), 1e-2)
    for parent in list(net.modules()):
        for name, m in parent.named_children():
            if isinstance(m, torch.nn.GroupNorm): setattr(parent, name, torch.nn.Identity())
    compare(apart(net), coarse(net, x), 1e-4)


@pytest.mark.parametrize("kind", ["spa", "both"])
def test_state_and_taps_switch_off_the_past(kind):
    "With the state unread and the past taps at zero, a token of the scan knows itself alone; each of them alone carries the past."
    net, z = make(mamba_type=kind).mamba[0], draw(1, 12, 8, seed=2)
    block, kicked = (net.spa_mamba if kind == "both" else net).mamba, z.clone()
    kicked[0, 4] += 1
    for state, taps, reach in ((True, True, True), (True, False, True), (False, True, True), (False, False, False)):
        m = copy.deepcopy(block)
        if not state: m.x_proj.weight.data[-16:] = 0
        if not taps: m.conv1d.weight.data[..., :-1] = 0
        moved = (m(kicked) - m(z)).abs().amax(2)[0]
        assert not moved[:4].any() and moved[4] > 0 and bool(moved[5:].any()) == reach


def test_weights_travel():
    net, x = make(), draw(1, 6, 5, 7)
    for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net)), make(seed=1)):
        other.load_state_dict(net.state_dict())
        compare(other(x), net(x), 0.)


def test_double_and_bfloat16():
    net, x = make(), draw(1, 6, 5, 7)
    wide = copy.deepcopy(net).double()(x.double())
    compare(net(x), wide, 1e-4, dtype=False)
    with torch.autocast("cpu", torch.bfloat16): compare(net(x).float(), wide.float(), .1)


@pytest.mark.parametrize("options, word", [
    (dict(hidden_dim=0), "hidden_dim"), (dict(hidden_dim=8.), "hidden_dim"), (dict(depth=0), "depth"), (dict(token_num=True), "token_num"), (dict(group_num=3), "group_num"),
    (dict(token_num=3, hidden_dim=8), "group_num"), (dict(hidden_dim=12, group_num=3), "head"), (dict(mamba_type="all"), "mamba_type"), (dict(variant="Fixed"), "variant"),
    (dict(hidden=8), "no option")])
def test_options_it_refuses(options, word):
    with pytest.raises(InputError, match=word) as e: make(**options)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("x", [draw(6, 5, 7), draw(1, 5, 7, 6), draw(1, 6, 0, 7), "image", draw(0, 6, 5, 7)])
def test_images_it_refuses(x):
    with pytest.raises(InputError, match=r"\(b,c,h,w\) with c = 6") as e: make()(x)
    assert "\n" not in str(e.value)


def test_it_is_listed():
    net = create_model("mamba-hsi", 6, 3, **SMALL)
    assert "mamba-hsi" in list_models() and net.takes == "image" and net.config["variant"] == "fixed" and net.config["hidden_dim"] == 8
    assert create_model("mamba-hsi", 6, 3).config["hidden_dim"] == 128
