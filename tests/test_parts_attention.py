"""Cross attention against its definition, its laws, and the four directions."""
import copy
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from torch import nn

from hsi_mamba_nb.errors import InputError
from hsi_mamba_nb.parts import DIRECTIONS, CrossAttention, CrossDomain, attention_ref, attention_weights
from hsi_mamba_nb.start.testing import check_batch_independent, compare, expect_fail, same_with_gradients

SIZES = [(1, 1, 1, 4, 1), (2, 1, 5, 6, 3), (1, 7, 1, 6, 2), (3, 4, 9, 8, 8), (2, 13, 6, 10, 5)]  # b, l, m, d, heads


def tensors(b, l, m, d, dtype=torch.float64):
    g = torch.Generator().manual_seed(b + 10*l + 100*m)
    return [torch.randn(b, n, d, dtype=dtype, generator=g).requires_grad_() for n in (l, m, m)]


@pytest.mark.parametrize("dtype, rtol", [(torch.float64, 1e-11), (torch.float32, 2e-5)])
@pytest.mark.parametrize("b, l, m, d, heads", SIZES)
def test_definition(b, l, m, d, heads, dtype, rtol):
    "The loops, a plain softmax and torch's own kernel agree in value and gradient."
    split = lambda x: x.unflatten(-1, (heads, -1)).transpose(1, 2)
    join = lambda x: x.transpose(1, 2).flatten(2)
    ref = lambda q, k, v: attention_ref(q, k, v, heads)
    plain = lambda q, k, v: join(attention_weights(q, k, heads) @ split(v))
    fused = lambda q, k, v: join(F.scaled_dot_product_attention(split(q), split(k), split(v)))
    for f in (plain, fused):
        compare(f(*tensors(b, l, m, d, dtype)), ref(*tensors(b, l, m, d, dtype)), rtol)
        if m > 1: same_with_gradients(f, ref, *tensors(b, l, m, d, dtype), rtol=rtol)  # a single answer leaves q and k no slope but rounding


@pytest.mark.parametrize("b, l, m, d, heads", SIZES)
def test_laws(b, l, m, d, heads):
    q, k, v = (x.detach() for x in tensors(b, l, m, d))
    a, y = attention_weights(q, k, heads), attention_ref(q, k, v, heads)
    assert a.shape == (b, heads, l, m) and y.shape == (b, l, d)
    compare(a.sum(-1), torch.ones(b, heads, l, dtype=a.dtype), 1e-14)
    order, turn = torch.randperm(m), torch.randperm(l)
    compare(attention_ref(q, k[:, order], v[:, order], heads), y, 1e-12)
    compare(attention_ref(q[:, turn], k, v, heads), y[:, turn], 1e-12)
    compare(attention_ref(q[:, :1], k, v, heads), y[:, :1], 1e-12)  # a question alone: the softmax over the wrong axis fails here
    compare(attention_weights(q, k[:, order], heads), a[..., order], 1e-12)
    compare(attention_ref(q, k[:, :1].expand_as(k), v, heads), v.mean(1, keepdim=True).expand_as(q), 1e-12)
    assert v.min() - 1e-12 <= y.min() and y.max() <= v.max() + 1e-12  # a mean


def test_large_scores_take_the_best_and_stay_finite():
    q, k, v = (x.detach() for x in tensors(2, 5, 7, 8))
    for scale in (1e6, 1e150):
        a = attention_weights(scale*q, k, 2)
        best = F.one_hot(attention_weights(q, k, 2).argmax(-1), 7).double()
        compare(a, best, 1e-9)
        compare(attention_ref(scale*q, k, v, 2), (best @ v.unflatten(-1, (2, 4)).transpose(1, 2)).transpose(1, 2).flatten(2), 1e-9)


def test_softmax_over_the_wrong_axis_is_caught():
    q, k, _ = (x.detach() for x in tensors(2, 3, 5, 6))
    wrong = lambda q, k: attention_weights(k, q, 3).mT
    with expect_fail(): compare(wrong(q, k), attention_weights(q, k, 3))
    with expect_fail(): compare(wrong(q[:, :1], k), wrong(q, k)[:, :, :1])
    with expect_fail(): compare(attention_weights(q*2**.5, k, 3), attention_weights(q, k, 3))


@pytest.mark.parametrize("b, l, m, d, heads", SIZES)
def test_module(b, l, m, d, heads):
    torch.manual_seed(0)
    net = CrossAttention(d, heads).double()
    s, t, _ = tensors(b, l, m, d)
    ref = lambda s, t: net.norm(net.o(attention_ref(net.q(s), net.k(t), net.v(t), heads)))
    compare(net(s, t), ref(s, t), 1e-9)
    if m > 1: same_with_gradients(net, ref, s, t, rtol=1e-8)
    compare(net.weights(s, t), attention_weights(net.q(s), net.k(t), heads), 0.)
    assert [name for name, _ in net.named_parameters()] == ["q.weight", "k.weight", "v.weight", "o.weight", "norm.weight", "norm.bias"]
    assert sum(p.numel() for p in net.parameters()) == 4*d*d + 2*d


@pytest.mark.parametrize("b, l, m, d, heads", SIZES)
def test_module_keeps_the_laws_and_reports_the_weights_it_uses(b, l, m, d, heads):
    torch.manual_seed(1)
    net, (s, t, _) = CrossAttention(d, heads).double(), [x.detach() for x in tensors(b, l, m, d)]
    for p in net.parameters(): nn.init.normal_(p)
    with torch.no_grad():
        y, a, values = net(s, t), net.weights(s, t), net.v(t).unflatten(-1, (heads, -1)).transpose(1, 2)
        rebuilt = lambda a: net.norm(net.o((a @ values).transpose(1, 2).flatten(2)))
        compare(rebuilt(a), y, 1e-9)
        if heads > 1 and m > 1:
            with expect_fail(): compare(rebuilt(a.flip(1)), y)
        compare(net(s, t.flip(1)), y, 1e-9)
        compare(net(s[:, :1], t), y[:, :1], 1e-9)
        net.q.weight *= 1e8
        compare(net(s, t), rebuilt(F.one_hot(a.argmax(-1), m).double()), 1e-9)
        net.k.weight.zero_()
        compare(net(s, t), rebuilt(torch.full_like(a, 1/m)), 1e-9)


def test_defaults_and_the_paper_s_size():
    net = CrossAttention(256)
    assert net.heads == 8 and sum(p.numel() for p in net.parameters()) == 262_656
    assert net(torch.zeros(0, 49, 256), torch.zeros(0, 49, 256)).shape == (0, 49, 256)


def parts(net, s, t):
    "What a direction says, from attention modules alone."
    l = s.shape[1]
    home = lambda rows: rows if net.aligned else (net.voice(t).softmax(1)*rows).sum(1, keepdim=True).expand(-1, l, -1)
    if net.direction == "none": return home(t)
    return sum(([net.ask(s, t)] if net.ask else []) + ([home(net.back(t, s))] if net.back else []))


@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_directions(direction, aligned):
    torch.manual_seed(1)
    l, m, d = 5, 5 if aligned else 8, 12
    net, s, t = CrossDomain(d, 3, direction, aligned=aligned), torch.randn(4, l, d), torch.randn(4, m, d)
    if net.voice: nn.init.normal_(net.voice.weight)
    y = net(s, t)
    assert y.shape == (4, l, d)
    compare(y, parts(net, s, t))
    if net.voice and net.back:  # the voice hears the bands, not what they bring home
        rows = net.back(t, s)
        wrong = (net.voice(rows).softmax(1)*rows).sum(1, keepdim=True).expand(-1, l, -1) + (net.ask(s, t) if net.ask else 0)
        with expect_fail(): compare(y, wrong)
    check_batch_independent(lambda x: net(x[:, :l], x[:, l:]), torch.cat([s, t], 1))
    attentions, voice = {"asymmetric": 1, "reverse": 1, "symmetric": 2, "none": 0}[direction], direction != "asymmetric" and not aligned
    assert sum(p.numel() for p in net.parameters()) == attentions*(4*d*d + 2*d) + voice*d
    again = copy.deepcopy(net)
    again.load_state_dict(net.state_dict())
    compare(again(s, t), y, 0.)
    if list(net.parameters()): y.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())


def test_who_hears_whom():
    "A changed pixel reaches itself alone where pixels ask, all pixels where bands ask, and none where nobody asks."
    torch.manual_seed(2)
    s, t = torch.randn(1, 6, 8), torch.randn(1, 4, 8)
    changed = s.clone()
    changed[:, 2] += torch.randn(8)
    reach = {name: ((net := CrossDomain(8, 2, name))(changed, t) - net(s, t)).abs().amax((0, 2)).gt(1e-6).nonzero()[:, 0].tolist() for name in DIRECTIONS}
    assert reach == {"asymmetric": [2], "reverse": [0, 1, 2, 3, 4, 5], "symmetric": [0, 1, 2, 3, 4, 5], "none": []}


def test_shuffled_bands_change_nothing_shuffled_pixels_are_shuffled():
    torch.manual_seed(3)
    s, t, turn = torch.randn(2, 6, 8), torch.randn(2, 5, 8), torch.tensor([3, 0, 5, 1, 4, 2])
    for name in DIRECTIONS:
        net = CrossDomain(8, 2, name)
        compare(net(s, t.flip(1)), net(s, t))
        compare(net(s[:, turn], t), net(s, t)[:, turn])


def test_errors():
    q, k, v = (x.detach() for x in tensors(2, 3, 5, 6))
    net = CrossAttention(6, 3).double()
    cases = [("heads=4 does not divide d=6", lambda: CrossAttention(6, 4)), ("heads=0", lambda: CrossAttention(6, 0)),
             ("heads=8 does not divide d=12", lambda: CrossDomain(12)), ("heads=4", lambda: attention_weights(q, k, 4)),
             ("batch and width must agree", lambda: net(q, k[:1])), ("batch and width must agree", lambda: attention_weights(q, k[..., :3], 3)),
             ("nobody answers", lambda: net(q, k[:, :0])), ("(b,l,d)", lambda: net(q[0], k[0])), ("one value", lambda: attention_ref(q, k, v[:, :2], 3)),
             ("use one of asymmetric, reverse, symmetric, none", lambda: CrossDomain(8, 2, "Symmetric")),
             ("got 3 and 5", lambda: CrossDomain(6, 3, "reverse", aligned=True).double()(q, k))]
    for words, call in cases:
        with pytest.raises(InputError) as e: call()
        assert words in str(e.value) and "\n" not in str(e.value)


def test_parts_are_lazy():
    code = "import sys, hsi_mamba_nb.parts as p; assert 'torch' not in sys.modules; p.CrossDomain; assert 'torch' in sys.modules; " \
           "assert not any(m.startswith('hsi_mamba_nb.scene') for m in sys.modules); print(dir(p))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "attention_ref" in done.stdout
