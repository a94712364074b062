"""SSA-Mamba: both variants' parameters by formula, the paper variant by loops, options, laws, sizes, gradients everywhere, and what it refuses."""
import copy
import pickle

import pytest
import torch

from hsi_mamba_nb.errors import InputError
from hsi_mamba_nb.learn.training import fit
from hsi_mamba_nb.models.registry import create_model
from hsi_mamba_nb.models.ssa_mamba import PAPER, FixedBlock, Fusion, PaperBlock, Read, Spectrum, SSAMamba, Unit, ssa_mamba_ref
from hsi_mamba_nb.scan.scan_order import named_order
from hsi_mamba_nb.scene.split import counts, split_random
from hsi_mamba_nb.scene.synthetic import synthetic_scene
from hsi_mamba_nb.start.testing import check_batch_independent, check_causal, compare, expect_fail

VARIANTS, FORMS = ("paper", "fixed"), ("asymmetric", "reverse", "symmetric", "none")
SMALL = dict(d_model=16, depth=2, heads=4, d_state=4, patch=5)


def draw(*size, seed=0): return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


def make(*args, seed=0, **options):
    torch.manual_seed(seed)
    return create_model("ssa-mamba", *(args or (10, 3)), **{**SMALL, **options})


def count(net): return sum(p.numel() for p in net.parameters())


def mamba(d, e, n, k=3):
    r = -(-d//16)
    return 3*e*d + (k + 1)*e + e*(r + 2*n) + (r + 1)*e + e*n + e


def excite(d): return (2*d + 1)*max(4, d//16) + d


def formula(c, k, variant="fixed", d_model=256, depth=4, d_state=16, expand=2, groups=16, gate=True, attention="asymmetric", **_):
    d, n, e, asked = d_model, d_state, int(expand*d_model), 4*d_model**2 + 2*d_model
    paper = variant == "paper"
    attends = {"asymmetric": asked, "reverse": asked, "symmetric": 2*asked, "none": 0}[attention] + (0 if paper or attention == "asymmetric" else d)
    both = c*(d//2) + d + 9*(d//2)*d + 2*d + 10*d + (d + 1)*d + 2*d + excite(d) + (d + 1)*k
    if paper:
        unit = 4*d + (d + 1)*2*e + (e + 1)*d + 4*e + 2*e + 3*e*n + 2*e
        return both + depth*(2*unit + attends + gate*(2*d + 1)*d + (2*d + 1)*d + (d + 1)*d + 4*d + 2*d + excite(d) + 6*d)
    read, size = 2*d + 2*mamba(d, int(expand/4*d), n), -(-c//min(groups, c))
    return both + (2*size + 1)*d + read + 2*d + depth*(read + 2*d + attends + gate*(2*d + 1)*d) + 2*d


@pytest.mark.parametrize("bands, classes, total", [(144, 15, 6_199_391), (270, 22, 6_217_318), (256, 20, 6_215_012)])
def test_counts_of_the_paper_and_half_of_them(bands, classes, total):
    size = dict(d_model=256, depth=4)
    new = count(SSAMamba(bands, classes, **size))
    assert count(SSAMamba(bands, classes, variant="paper", **size)) == total == formula(bands, classes, "paper")
    assert new == formula(bands, classes) <= total/2


@pytest.mark.parametrize("options", [{}, dict(gate=False), dict(attention="none"), dict(attention="symmetric"), dict(attention="reverse"), dict(residuals=False), dict(expand=1, groups=3), dict(d_model=8, depth=1)], ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_formula_with_options(variant, options):
    options = {**SMALL, "variant": variant, **options}
    assert count(make(10, 3, **options)) == formula(10, 3, **options)


def scrambled(**options):
    "The paper variant in float64 with random weights and random stored means: nothing that starts at 0 or 1 hides."
    net = make(variant="paper", **options).double().eval()
    for name, v in net.state_dict().items():
        if v.is_floating_point(): v.copy_(torch.rand_like(v) + .5 if "running_var" in name else v + .3*torch.randn_like(v))
    return net


@pytest.mark.parametrize("options", [{}, dict(depth=1, d_conv=4), dict(expand=1, d_state=1), dict(d_model=8)], ids=str)
def test_paper_variant_is_its_loops(options):
    net, x = scrambled(**options), draw(3, 10, 5, 5).double()
    compare(net(x), ssa_mamba_ref(net.state_dict(), x, heads=4), 1e-9)
    with expect_fail(): compare(net(x), ssa_mamba_ref(net.state_dict(), x, heads=2), 1e-4)


def test_a_step_is_the_softplus_of_its_logarithm():
    net, x = scrambled(), draw(2, 10, 5, 5).double()
    state = {k: v.exp().exp().sub(1).log() if k.endswith("dt_log") else v for k, v in net.state_dict().items()}  # softplus of this is exp(dt_log)
    with expect_fail(): compare(net(x), ssa_mamba_ref(state, x, heads=4), 1e-4)


def reached(f, pixel, d=8, l=49):
    x = draw(1, l, d).double()
    y = x.clone()
    y[:, pixel] += draw(d, seed=1)
    return (f(y) - f(x)).abs().amax((0, 2)) > 0


def test_reach_of_the_last_pixel():
    torch.manual_seed(0)
    unit, read = Unit(8, 4).double().eval(), Read(8, 4).double()
    check_causal(unit, draw(2, 49, 8).double())
    assert reached(unit, 48).sum() == 1 and reached(unit, 24).sum() == 25
    assert all(reached(read, pixel).all() for pixel in (0, 24, 48))
    assert reached(PaperBlock(8, (4, 3, 2), 4, 0.).double().eval(), 48).all()  # attention asks all pixels


def test_the_paper_takes_bands_for_a_set_and_we_do_not():
    order, x = torch.randperm(10, generator=torch.Generator().manual_seed(0)), draw(4, 10, 5, 5)
    for variant in VARIANTS:
        net = make(variant=variant).eval()
        twin = copy.deepcopy(net)
        twin.input_proj[0].weight.data = net.input_proj[0].weight.data[:, order]
        if variant == "paper": compare(twin(x[:, order]), net(x), 1e-4)
        else:
            with expect_fail(): compare(twin(x[:, order]), net(x), 1e-3)


def stateless(read):
    "Without states: B and C are 0, the convolutions and the skip stay."
    for one in (read.scan.forth, read.scan.back): one.x_proj.weight.data[one.dt_proj.in_features:] = 0
    return read


def test_states_carry_every_band_to_every_token():
    torch.manual_seed(0)
    spectrum, x = Spectrum(12, 8, groups=12, n=4).double(), draw(2, 12, 3, 3).double()
    deaf = copy.deepcopy(spectrum)
    stateless(deaf.read)
    for band in range(12):
        y = x.clone()
        y[:, band] += draw(2, 3, 3, seed=1)
        assert ((spectrum(y) - spectrum(x)).abs().amax((0, 2)) > 0).all()
        assert ((deaf(y) - deaf(x)).abs().amax((0, 2)) > 0).tolist() == [abs(token - band) <= 2 for token in range(12)]


def test_states_start_loud_and_last():
    for v in (make(d_model=64, heads=8, d_state=16).spectrum.read.scan.forth, make(d_model=64, heads=8, d_state=16, seed=1).blocks[1].read.scan.back):
        compare(v.A_log.exp()[0].detach(), torch.linspace(.1, 1.1, 16), 1e-6)
        step = torch.nn.functional.softplus(v.dt_proj.bias)
        assert .019 < step.min() and step.max() < .51
        assert (1/(step[:, None]*v.A_log.exp())).median() > 10 and (1/(step[:, None]*v.A_log.exp())).min() > 1
        B_and_C, rest = v.x_proj.weight[4:], v.x_proj.weight[:4]
        assert 3 < B_and_C.std()/rest.std() < 5


def entering(net, x, *layers):
    seen = []
    hooks = [layer.register_forward_pre_hook(lambda _, args: seen.append(args)) for layer in layers]
    net(x)
    for hook in hooks: hook.remove()
    return seen


def test_who_reads_what():
    x, nets = draw(2, 10, 5, 5), {v: make(variant=v).eval() for v in VARIANTS}
    (spatial,), (spectral,) = entering(nets["paper"], x, nets["paper"].blocks[0].spatial, nets["paper"].blocks[0].spectral)
    assert spatial is spectral
    (pixels,), (bands,) = sorted(entering(nets["fixed"], x, nets["fixed"].blocks[0].read, nets["fixed"].spectrum.read), key=lambda args: -args[0].shape[1])
    assert pixels.shape == (2, 25, 16) and bands.shape == (2, 10, 16)
    for net in nets.values():
        (asks, answers), = entering(net, x, net.blocks[0].attention)
        compare(net.blocks[0].attention.ask.weights(asks, answers).sum(-1), torch.ones(2, 4, 25), 1e-5)


def test_order_of_the_tokens_is_heard_through_the_reading_block_alone():
    net, x, order = make(30, 3).eval(), draw(4, 30, 5, 5), torch.randperm(16, generator=torch.Generator().manual_seed(0))

    def exchanged(net):
        net = copy.deepcopy(net)
        net.spectrum.embed.register_forward_hook(lambda *args: args[2][:, order])
        return net(x)
    with expect_fail(): compare(exchanged(net), net(x), 1e-4)
    for one in (net.spectrum.read.scan.forth, net.spectrum.read.scan.back): one.out_proj.weight.data.zero_()
    compare(exchanged(net), net(x), 1e-5)


def test_a_unit_needs_no_last_norm_and_a_fusion_does():
    torch.manual_seed(0)
    block, x = PaperBlock(16, (4, 3, 2), 4, .1).eval(), draw(2, 9, 16)
    for of in ("spatial", "spectral", "fusion"):
        loud = copy.deepcopy(block)
        getattr(loud, of).norm_out.weight.data *= 4
        if of != "fusion": compare(loud(x), block(x), 1e-4)
        else:
            with expect_fail(): compare(loud(x), block(x), 1e-2)


def test_our_unit_keeps_a_batch_apart_in_training_too():
    torch.manual_seed(0)
    read, unit, x = Read(8, 4).train(), Unit(8, 4).train(), draw(4, 9, 8)
    check_batch_independent(read, x)
    with expect_fail(): check_batch_independent(unit, x)


def test_walks_change_from_block_to_block():
    assert [b.order for b in make(depth=3).blocks] == ["row", "column", "row"]
    torch.manual_seed(0)
    row, column, m, y = FixedBlock(16, (4, 3, 2), 4, 0.).eval(), FixedBlock(16, (4, 3, 2), 4, 0., order="column").eval(), draw(2, 5, 16, seed=1), draw(2, 3, 3, 16)
    column.load_state_dict(row.state_dict())
    compare(column(y.transpose(1, 2), m), row(y, m).transpose(1, 2), 1e-5)
    assert (named_order("column", 3, 3)(y)[:, 1] == y[:, 1, 0]).all()


def test_shut_gates_leave_the_way_through():
    torch.manual_seed(0)
    s, a = draw(2, 9, 16), draw(2, 9, 16, seed=1)
    fusion = Fusion(16).eval()
    fusion.gate.weight.data.zero_(), fusion.gate.bias.data.fill_(-100)
    compare(fusion(s, a), torch.nn.functional.layer_norm(s, (16,)), 1e-5)
    block = FixedBlock(16, (4, 3, 2), 4, .1).eval()
    block.gate.weight.data.zero_(), block.gate.bias.data.fill_(-100)
    compare(block(s.view(2, 3, 3, 16), a), block.read(s).view(2, 3, 3, 16), 1e-5)
    silent = PaperBlock(16, (4, 3, 2), 4, .1, residuals=False).eval()
    silent.fusion.norm_out.weight.data.zero_(), silent.fusion.norm_out.bias.data.zero_()
    assert silent(s).abs().max() == 0  # without residuals nothing slips around


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("attention", FORMS)
@pytest.mark.parametrize("gate, residuals", [(True, True), (False, False)])
def test_a_gradient_reaches_every_parameter(variant, attention, gate, residuals):
    options = dict(variant=variant, attention=attention, gate=gate, residuals=residuals, dropout=0.)
    if options == dict(variant="fixed", attention="none", gate=False, residuals=False, dropout=0.):
        with pytest.raises(InputError, match="no pixel"): make(**options)
        return
    net = make(**options)
    for name, p in net.named_parameters():
        if name.endswith("se.down.bias"): p.data.fill_(1.)  # a ReLU may be shut at the start
    loss, terms = net.loss(draw(6, 10, 5, 5), torch.tensor([1, 2, 3, 1, 2, 0]))
    loss.backward()
    assert torch.isfinite(loss) and list(terms) == ["ce"]
    for name, p in net.named_parameters(): assert p.grad is not None and 0 < float(p.grad.abs().max()) < float("inf"), name


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_batch_is_kept_apart_in_evaluation(variant):
    net, x = make(variant=variant), draw(5, 10, 5, 5)
    check_batch_independent(net.eval(), x)
    with expect_fail(): check_batch_independent(net.train(), x)
    assert net.eval()(x[:0]).shape == (0, 3)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("bands, classes, patch", [(1, 2, 1), (1, 2, 3), (2, 9, 5), (15, 2, 3), (16, 2, 3), (17, 2, 3), (33, 4, 9)])
def test_any_size(variant, bands, classes, patch):
    net, x = make(bands, classes, variant=variant, patch=patch), draw(3, bands, patch, patch)
    loss = net.loss(x[:2], torch.tensor([1, classes]))[0]  # two samples are the least that batch norm can train on
    loss.backward()
    for b in (1, 3): assert net.eval()(x[:b]).shape == (b, classes)
    assert torch.isfinite(loss)


@pytest.mark.parametrize("variant", VARIANTS)
def test_state_copies_and_double(variant):
    net, x = make(variant=variant).eval(), draw(2, 10, 5, 5)
    again = make(variant=variant, seed=1).eval()
    with expect_fail(): compare(again(x), net(x), 1e-3)
    again.load_state_dict(net.state_dict())
    for other in (again, copy.deepcopy(net), pickle.loads(pickle.dumps(net))): compare(other(x), net(x), 1e-6)
    compare(copy.deepcopy(net).double()(x.double()).float(), net(x), 1e-4)


def test_no_decay_on_rates():
    for variant in VARIANTS:
        rates = [p for name, p in make(variant=variant).named_parameters() if name.endswith("A_log")]
        assert rates and all(getattr(p, "_no_weight_decay", False) for p in rates)


@pytest.mark.parametrize("options, match", [(dict(variant="best"), "variant"), (dict(attention="all"), "attention"), (dict(patch=4), "odd"), (dict(patch=0), "patch"), (dict(d_model=15), "d_model"),
                                            (dict(d_model=18), "heads"), (dict(heads=0), "heads"), (dict(depth=0), "depth"), (dict(d_state=1.5), "d_state"), (dict(groups=0), "groups"),
                                            (dict(expand=.1), "expand"), (dict(width=3), "width"), (dict(batch_size=32), "batch_size")], ids=str)
def test_refusals(options, match):
    with pytest.raises(InputError, match=match): make(**options)


@pytest.mark.parametrize("x", [draw(2, 9, 5, 5), draw(10, 5, 5), draw(2, 10, 0, 5), "patches"], ids=["bands", "no batch", "empty", "text"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_refused_patches(variant, x):
    with pytest.raises(InputError, match="c = 10"): make(variant=variant)(x)


def test_the_papers_settings():
    assert set(PAPER) == {"model", "fit", "splits"} and PAPER["model"]["variant"] == "paper"
    assert set(PAPER["fit"]) == set(PAPER["splits"]) and [PAPER["fit"][k]["batch_size"] for k in ("houston", "honghu", "xiongan")] == [16, 16, 32]
    scene = synthetic_scene(48, 48, bands=8, classes=4, seed=1)
    for how in PAPER["splits"].values(): assert counts(split_random(scene, **how), scene)[:2].min() >= 20
    run = fit(make(8, 4, variant="paper"), scene, split_random(scene, .1, .1), **(PAPER["fit"]["xiongan"] | dict(epochs=1)), cpu=True, progress=False)
    assert len(run.history) == 1
