"""Distillation: the loss against loops and torch, its laws, schedules, trust, calibration and feature similarity."""
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from hsi_mamba_nb.errors import InputError
from hsi_mamba_nb.parts import (SCHEDULES, adaptive_weights, calibrate, calibration_error, distillation_loss, kd_loss, schedule, similarity_loss,
                                soften)
from hsi_mamba_nb.start.testing import check_gradient, compare, expect_fail, same_with_gradients


def logits(n=7, k=5, scale=2., dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed + 10*n + k)
    s, z = (scale*torch.randn(n, k, dtype=torch.float64, generator=g).to(dtype) for _ in range(2))
    return s.requires_grad_(), z, torch.randint(1, k + 1, (n,), generator=g)


@pytest.mark.parametrize("T", [.1, 1., 4., 50.])
@pytest.mark.parametrize("n, k", [(1, 2), (7, 5), (3, 1), (2, 40)])
@pytest.mark.parametrize("dtype, rtol", [(torch.float64, 1e-10), (torch.float32, 1e-3)])
def test_kd_is_torchs_batch_mean(n, k, T, dtype, rtol):
    s, z, _ = logits(n, k, dtype=dtype)
    ref = lambda s: F.kl_div((s/T).log_softmax(1), (z/T).softmax(1), reduction="batchmean")*T**2
    same_with_gradients(lambda s: kd_loss(s, z, T), ref, s, rtol=rtol)
    compare(kd_loss(s, z, T, scale=False)*T**2, kd_loss(s, z, T), 1e-6)
    compare(kd_loss(s, z, T, reduce=False).mean(), kd_loss(s, z, T), 1e-6)


def test_kd_is_zero_for_the_same_up_to_a_shift_and_only_then():
    s, z, _ = logits(1000, 6)
    assert kd_loss(z, z).item() == 0. and kd_loss(z.float(), z.float()).item() == 0.
    compare(kd_loss(z + torch.arange(1000.)[:, None], z), torch.tensor(0.).double(), atol=1e-10)
    kl, gap = kd_loss(s, z, 1., reduce=False), (soften(s) - soften(z)).abs().sum(1)
    assert (kl >= gap.square()/2).all() and gap.min() > 0  # Pinsker
    assert kd_loss(s[:0], z[:0]).item() == 0. and kd_loss(s[:0], z[:0], reduce=False).shape == (0,)


def test_gradient_and_its_scale():
    s, z, _ = logits()
    slope = lambda a, b, T, scale=True: torch.autograd.grad(kd_loss(a, b, T, scale, reduce=False).sum(), a)[0]
    for T in (.5, 1., 4., 20.): compare(slope(s, z, T, False), (soften(s, T) - soften(z, T)).detach()/T, 1e-12)
    a, b = (.01*s).detach().requires_grad_(), .01*z
    want = ((a - a.mean(1, keepdim=True)) - (b - b.mean(1, keepdim=True))).detach()/5
    for T in (1., 2., 8., 64.): compare(slope(a, b, T), want, .02)
    with expect_fail(): compare(slope(a, b, 4., False), want, .1, name="no T^2")
    with expect_fail(): compare(slope(s, z, 8.), slope(s, z, 1.), .1, name="large logits")


def test_teacher_is_left_alone_and_may_rule_out_a_class():
    s, z, y = logits()
    z.requires_grad_()
    for loss in (kd_loss(s, z), distillation_loss(s, z, y, .5, adaptive=True)[0], similarity_loss(s, z)): loss.backward()
    assert z.grad is None and s.grad.abs().sum() > 0
    free = torch.zeros(1, 3, requires_grad=True)
    loss = kd_loss(free, torch.tensor([[0., 1, -math.inf]]))
    loss.backward()
    assert loss.isfinite() and free.grad.isfinite().all()
    compare(kd_loss(s, soften(z).log(), 4.), kd_loss(s, z, 4.), 1e-9, name="log-probabilities are logits")
    assert kd_loss(s.half(), z.half()).dtype == torch.float32


def test_soften():
    _, z, _ = logits()
    compare(soften(z, 3.), (z/3).softmax(1), 1e-12)
    compare(soften(z, 1e-9), F.one_hot(z.argmax(1), 5).double(), 1e-12)
    compare(soften(z, 1e9), torch.full_like(z, .2), 1e-8)
    assert soften(1e30*z.float(), 1e-3).isfinite().all() and soften(z[None, 0]).shape == (1, 5) and soften(z.bfloat16()).dtype == torch.float32
    for T in (0., -1., math.inf, math.nan):
        with pytest.raises(InputError, match="above 0"): soften(z, T)


def test_schedules():
    ends = {kind: (schedule(kind, 0.), schedule(kind, .25), schedule(kind, 1.)) for kind in SCHEDULES}
    assert ends == {"warmup": (0, 1, 1), "linear": (0, .25, 1), "cap": (0, .9, .9), "constant": (.9, .9, .9), "down": (.9, .675, 0)}
    for kind in SCHEDULES:
        for warmup in (0., .3, 1.):
            for cap in (0., .5, 1.):
                c = np.array([schedule(kind, t, warmup, cap) for t in np.linspace(0, 1, 51)])
                assert 0 <= c.min() and c.max() <= (1 if kind in ("warmup", "linear") else cap)
                assert (np.diff(c)*(-1 if kind == "down" else 1) >= -1e-12).all()
    with pytest.raises(InputError, match="warmup, linear, cap, constant, down"): schedule("cosine", .5)
    for wrong in (dict(share=-.1), dict(share=.5, warmup=2), dict(share=.5, cap=math.nan)):
        with pytest.raises(InputError, match="0 to 1"): schedule("cap", **wrong)


@pytest.mark.parametrize("adaptive", [False, True])
def test_whole_loss(adaptive):
    s, z, y = logits()
    loss = lambda s, z=z, y=y, lam=.3: distillation_loss(s, z, y, lam, adaptive=adaptive)[0]
    compare(loss(s, lam=0.), F.cross_entropy(s, y - 1), 1e-12)
    w = .3*(adaptive_weights(z, y) if adaptive else torch.ones(7).double())
    compare(loss(s), ((1 - w)*F.cross_entropy(s, y - 1, reduction="none") + w*kd_loss(s, z, reduce=False)).mean(), 1e-12)
    order = torch.tensor([3, 1, 6, 0, 2, 5, 4])
    compare(loss(s[order], z[order], y[order]), loss(s), 1e-12)
    check_gradient(loss, s)
    if not adaptive:
        compare(loss(s, lam=1.), kd_loss(s, z), 1e-12)
        assert torch.equal(loss(s, y=y.flip(0), lam=1.), loss(s, lam=1.))


def test_unlabelled_rows_are_heard_by_the_teachers_term_only():
    s, z, y = logits()
    part = torch.where(torch.arange(7) < 3, 0, y)
    compare(distillation_loss(s, z, part, 0.)[0], F.cross_entropy(s[3:], y[3:] - 1), 1e-12)
    loss, terms = distillation_loss(s, z, part, .4)
    compare(loss.detach(), .6*terms["ce"] + .4*terms["kd"], 1e-12)
    compare(terms["kd"], kd_loss(s, z).detach(), 1e-12)
    row = torch.autograd.grad(loss, s)[0][:3]
    compare(row, .4*torch.autograd.grad(kd_loss(s, z), s)[0][:3], 1e-12)
    assert distillation_loss(s, z, 0*y, 0.)[0].item() == 0. and distillation_loss(s[:0], z[:0], y[:0], .5)[0].item() == 0.


def test_bad_input_is_one_line():
    s, z, y = logits()
    for f, word in ((lambda: kd_loss(s, z[:, :4]), "same samples"), (lambda: distillation_loss(s, z, y, 1.5), "lam"), (lambda: distillation_loss(s, z, y + 5, .5), "1 to k = 5"),
                    (lambda: distillation_loss(s, z, y[:3], .5), "pass"), (lambda: adaptive_weights(z, y.double()), "whole numbers"), (lambda: calibration_error(z, y), "soften"),
                    (lambda: calibration_error(soften(z), 0*y), "unlabelled"), (lambda: calibration_error(soften(z), y, 0), "bins"), (lambda: calibration_error(z[:0], y[:0]), "unlabelled"), (lambda: calibrate(z, 0*y), "unlabelled"),
                    (lambda: calibrate(z.log(), y), "finite"), (lambda: calibrate(z, y, (2., 1.)), "limits"), (lambda: calibrate(z, y, (0., 1.)), "limits"), (lambda: similarity_loss(s, z[:3]), "same n samples")):
        with pytest.raises(InputError, match=word) as caught: f()
        assert "\n" not in str(caught.value)


def test_trust():
    hand = torch.tensor([[3., 1, 4], [1, 1, 2], [1, 1, 2]]).log()
    compare(adaptive_weights(hand, torch.tensor([1, 3, 0])), torch.tensor([3/8, .5, .5]))
    _, z, y = logits(200, 6)
    w = adaptive_weights(z, y)
    assert 0 <= w.min() and w.max() <= 1 and (w <= adaptive_weights(z, 0*y)).all()


def test_border_where_a_wrong_teacher_overrules_a_label():
    "At the undecided student the pulls cancel at 1/(1 + T tanh(g/2T))."
    for gap, T, scale in ((2., 1., True), (10., 4., True), (30., 4., False)):
        lam = 1/(1 + (T if scale else 1/T)*math.tanh(gap/2/T))
        s = torch.zeros(1, 2, dtype=torch.float64, requires_grad=True)
        force = lambda lam: torch.autograd.grad(distillation_loss(s, torch.tensor([[0., gap]]).double(), torch.tensor([1]), lam, T, scale=scale)[0], s)[0][0, 0].item()
        assert abs(force(lam)) < 1e-12 and force(lam - .02) < 0 < force(lam + .02)


def test_calibration():
    g = torch.Generator().manual_seed(0)
    z = 2*torch.randn(20000, 5, generator=g)
    y = torch.multinomial(z.softmax(1), 1, generator=g)[:, 0] + 1
    T = calibrate(z, y)
    compare(T, 1., .03)
    compare(calibrate(3*z, y), 3*T, 1e-6)
    compare(calibrate(z.numpy(), y.numpy()), T, 1e-9)
    compare(calibrate(torch.cat([z, -z]), torch.cat([y, 0*y])), T, 1e-9, name="unlabelled rows")
    nll = lambda t: F.cross_entropy(z.double()/t, y - 1).item()
    assert nll(T) <= min(nll(.99*T), nll(1.01*T))
    assert calibration_error(soften(z), y) < .02 < .15 < calibration_error(soften(3*z), y)
    compare(calibrate(torch.tensor([[5., 0], [0, 5]]), torch.tensor([1, 2])), .05, 1e-6, name="all right: the limit")
    compare(calibrate(torch.tensor([[5., 0], [0, 5]]), torch.tensor([2, 1])), 20., 1e-6, name="all wrong: the other one")
    assert calibrate(torch.full((3, 5), .1), torch.tensor([1, 2, 3])) == 1 == calibrate(torch.tensor([[2., 2], [5, 0]]), torch.tensor([1, 0])), "logits without spread"
    p = torch.tensor([[.9, .1]]*4 + [[.6, .4]]*2)
    compare(calibration_error(p, torch.tensor([1, 1, 1, 2, 1, 1])), 1.4/6, 1e-6)
    compare(calibration_error(torch.eye(3), torch.tensor([1, 2, 3])), 0., atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.int16])
def test_labels_of_any_whole_type(dtype):
    s, z, y = logits()
    small = y.to(dtype)
    assert torch.equal(distillation_loss(s, z, small, .4, adaptive=True)[0], distillation_loss(s, z, y, .4, adaptive=True)[0])
    assert calibrate(z, small) == calibrate(z, y) and calibrate(z.numpy(), small.numpy()) == calibrate(z, y)
    assert calibration_error(soften(z), small) == calibration_error(soften(z), y)


def test_similarity_of_a_sample_without_features():
    "A row of zeros has no direction: it adds a constant, and its gradient stays of the size of the others'."
    g = torch.Generator().manual_seed(0)
    f, h = torch.randn(6, 3, generator=g), torch.randn(6, 5, generator=g)
    for student, teacher in ((f*(torch.arange(6) > 0)[:, None], h), (f, h*(torch.arange(6) > 0)[:, None]), (0*f, h), (0*f, 0*h)):
        student.requires_grad_()
        loss = similarity_loss(student, teacher)
        loss.backward()
        assert loss.isfinite() and student.grad.isfinite().all() and student.grad.abs().max() < 1
    assert similarity_loss(0*f, 0*h).item() == 0


def test_similarity_is_not_lost_in_half_precision():
    f, h = 500*torch.eye(4), 500*torch.ones(4, 2) # squares pass 65,504, the largest half
    want = similarity_loss(f, h)
    compare(similarity_loss(f.half(), h.half()), want, 1e-6)
    with torch.autocast("cpu", torch.float16): compare(similarity_loss(f, h), want, 1e-6)


@pytest.mark.parametrize("n, d, e", [(1, 3, 4), (6, 3, 5), (5, 8, 2)])
def test_similarity(n, d, e):
    g = torch.Generator().manual_seed(n)
    f, h = torch.randn(n, d, dtype=torch.float64, generator=g, requires_grad=True), torch.randn(n, e, dtype=torch.float64, generator=g)
    rows = lambda v: torch.stack([(v @ v[i])/(v @ v[i]).norm() for i in range(n)])
    same_with_gradients(lambda f: similarity_loss(f, h), lambda f: (rows(f) - rows(h)).square().mean(), f, rtol=1e-10) if n > 1 else None
    turn = torch.linalg.qr(torch.randn(e, e, dtype=torch.float64, generator=g))[0]
    for same in (h @ turn, 7*h, torch.cat([h, 0*h], 1)): compare(similarity_loss(same, h), torch.tensor(0.).double(), atol=1e-12)
    order = torch.randperm(n, generator=g)
    compare(similarity_loss(f[order], h[order]), similarity_loss(f, h), 1e-12, atol=1e-12)
    assert similarity_loss(f[:0], h[:0]).item() == 0. and similarity_loss(0*f, h).isfinite()
    assert n == 1 or similarity_loss(h + 3, h) > 1e-3
