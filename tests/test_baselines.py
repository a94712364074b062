"""The nine baselines: one interface, save and load bit for bit, odd sizes, and errors that name the thing."""
import copy
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load, save

from hsi_mamba_nb.errors import InputError
from hsi_mamba_nb.models import ClassicalModel, create_model, list_models
from hsi_mamba_nb.scene import coords_only_accuracy, split_random
from hsi_mamba_nb.start.testing import check_batch_independent, compare

CLASSICAL = ["nearest-coords", "nearest-spectrum", "logistic", "svm", "random-forest"]
NETS = ["cnn-1d", "cnn-2d", "hybridsn", "spectral-transformer"]
SHAPES = {"coords": lambda m, c: (2,), "pixel": lambda m, c: (c,), "patch": lambda m, c: (c, m.patch, m.patch)}
each = pytest.mark.parametrize("name", CLASSICAL + NETS)
classical = pytest.mark.parametrize("name", CLASSICAL)
nets = pytest.mark.parametrize("name", NETS)


def made(name, bands=13, classes=4, **config):
    torch.manual_seed(0)
    return create_model(name, bands, classes, **config).eval()


def some(model, n, seed=0):
    shape, generator = SHAPES[model.takes](model, model.bands), torch.Generator().manual_seed(seed)
    if model.takes == "coords":
        return torch.randint(0, 50, (n, 2), generator=generator).float()
    return torch.randn(n, *shape, generator=generator)


def learned(name, bands=13, classes=4, labels=(1, 2, 4), n=40, seed=5, **config):
    "A model that has learned from samples with these labels only."
    model = made(name, bands, classes, **config)
    y = np.random.default_rng(1).choice(labels, n)
    if name in CLASSICAL:
        x, x_val = (some(model, n, i).numpy() for i in (3, 4))
        facts = model.learn(x, y, x_val, y, seed=seed)
        assert set(facts) == {*model.settings, "tried", "val_oa"} and 0 <= facts["val_oa"] <= 1
    return model


def test_names():
    assert set(CLASSICAL + NETS) <= set(list_models())
    for name in CLASSICAL + NETS:
        model = made(name)
        assert isinstance(model, ClassicalModel) == (name in CLASSICAL) == hasattr(model, "learn")
        assert (model.name, model.bands, model.classes) == (name, 13, 4) and model.patch % 2 == 1


@each
def test_scores(name):
    model = learned(name)
    x = some(model, 9)
    y = model(x)
    assert y.shape == (9, 4) and y.dtype == torch.float32 and y.isfinite().all()
    assert model(x[:1]).shape == (1, 4)
    loss, terms = model.loss(x, torch.tensor([0, 1, 2, 3, 4, 1, 2, 3, 4]))
    assert loss.isfinite() and set(terms) == {"ce"}
    check_batch_independent(model, x)
    model.train()
    assert model(x[:2]).shape == (2, 4)


@each
@pytest.mark.parametrize("bands, classes", [(1, 2), (2, 3), (3, 2), (8, 2), (9, 21), (40, 3)])
def test_any_size(name, bands, classes):
    model = learned(name, bands, classes, labels=range(1, classes + 1), n=45)
    assert model(some(model, 1)).shape == (1, classes)
    if name in NETS:
        assert model.train()(some(model, 2)).shape == (2, classes)


@each
def test_round_trip(name):
    "Through the bytes of a safetensors file, into a new model, and into one that had learned something else."
    model = learned(name)
    x, state = some(model, 30), load(save(model.state_dict()))
    for other in (made(name), learned(name, n=17, labels=(2, 3))):
        other.load_state_dict(state)
        assert torch.equal(other(x), model(x))
        assert all(torch.equal(a, b) for a, b in zip(other.state_dict().values(), model.state_dict().values(), strict=True))
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(x), model(x))


@classical
def test_repeats(name):
    a, b = learned(name), learned(name)
    x = some(a, 30)
    assert torch.equal(a(x), b(x))
    assert torch.equal(a.train()(x), b(x)) and not list(a.parameters())
    assert not a(x).requires_grad and a(x[:0]).shape == (0, 4)


@classical
def test_absent_classes(name):
    model = learned(name, classes=6, labels=(2, 5))
    y = model(some(model, 50))
    absent = y[:, [0, 2, 3, 5]]
    compare(absent, torch.full_like(absent, float(np.log(1e-12))))
    assert set((y.argmax(1) + 1).tolist()) <= {2, 5}
    compare(y.exp().sum(1), torch.ones(50), 1e-5)
    alone = learned(name, classes=3, labels=(2,))
    assert (alone(some(alone, 5)).argmax(1) == 1).all()


@classical
def test_errors(name):
    model = made(name)
    x, y = some(model, 12).numpy(), np.array([1, 2, 3, 4]*3)
    with pytest.raises(InputError, match=f"{name}: has learned nothing"):
        model(some(model, 2))
    for bad, what in (((x[:, :1], y, x, y), "training: must be"), ((x, y[:3], x, y), "training: 12 samples"), ((x, y - 1, x, y), "training: labels"),
                      ((x, y + 1, x, y), "labels must be whole numbers 1 to 4"), ((x, y*1., x, y), "whole numbers"), ((x*np.nan, y, x, y), "training: 12 samples hold nan"),
                      ((x[:0], y[:0], x, y), "training: holds no samples"), ((x, y, x[:0], y[:0]), "validation: holds no samples"),
                      ((x, y, x, y, -1), "seed must be"), ((x, y, x[None], y), "validation: must be")):
        with pytest.raises(InputError, match=what):
            model.learn(*bad)
    with pytest.raises(InputError, match="learned nothing"):
        model(some(model, 2))  # what failed has left nothing behind
    model.learn(x, y, x, y)
    for shape in ((2, 1), (2, 99), (13,)):
        with pytest.raises(InputError, match="x: must be"):
            model(torch.zeros(shape))


@classical
def test_wrong_state(name):
    model = learned(name)
    with pytest.raises(RuntimeError, match="classes 1 to 4, this model has 3"):
        made(name, classes=3).load_state_dict(model.state_dict())
    if model.takes == "pixel":
        with pytest.raises(RuntimeError, match="size mismatch"):
            made(name, bands=5).load_state_dict(model.state_dict())


def before_and_after(model, state, match, **options):
    "A refused load leaves a model that has learned as it was."
    x, old = some(model, 20), {k: v.clone() for k, v in model.state_dict().items()}
    said, made_before = model(x), model._made
    with pytest.raises(RuntimeError, match=match) as e:
        model.load_state_dict(state, **options)
    assert len(str(e.value).strip().splitlines()) == 2  # torch's own head line, and one of ours
    assert model._made is made_before and torch.equal(model(x), said)
    assert all(torch.equal(v, old[k]) for k, v in model.state_dict().items())
    return model


@pytest.mark.parametrize("source, target, match", [
    ("nearest-spectrum", "svm", "chosen: 0 settings, svm has 2"), ("svm", "logistic", "chosen: 2 settings, logistic has 1"), ("logistic", "svm", "chosen: 1 settings, svm has 2"),
    ("svm", "nearest-spectrum", "chosen: 2 settings, nearest-spectrum has 0"), ("nearest-coords", "svm", "size mismatch"), ("cnn-1d", "svm", "another kind of model"),
    ("random-forest", "nearest-coords", "size mismatch")])
def test_foreign_states(source, target, match):
    state = learned(source).state_dict()
    before_and_after(learned(target), state, match)
    fresh = made(target)
    with pytest.raises(RuntimeError, match=match):
        fresh.load_state_dict(state)
    with pytest.raises(InputError, match="learned nothing"):
        fresh(some(fresh, 2))


@classical
def test_broken_states(name):
    model = learned(name, n=30)
    state = model.state_dict()
    for change, match in ((dict(y_train=state["y_train"][:9]), "30 samples need as many"), (dict(x_train=state["x_train"][:, :1]), "size mismatch"),
                          (dict(x_train=state["x_train"][0]), "size mismatch"), (dict(y_train=state["y_train"] + 1), "classes 2 to 5, this model has 4"),
                          (dict(y_train=state["y_train"] - 1), "classes 0 to 3"), (dict(y_train=state["y_train"].float()), "whole labels"), (dict(seed=torch.zeros(2)), "one seed"),
                          (dict(chosen=torch.ones(7)), "chosen: 7 settings")):
        before_and_after(learned(name, n=17, labels=(1, 2, 3, 4)), {**state, **change}, match)
    part = {k: v for k, v in state.items() if k != "chosen"}
    for options in ({}, dict(strict=False)):  # half a memory is none, and one with more is another's
        before_and_after(learned(name, n=17), part, "keeps x_train", **options)
        before_and_after(learned(name, n=17), {**state, "extra": torch.ones(1)}, "keeps x_train", **options)
    other = learned(name, n=17)
    said = other(some(other, 9))
    result = other.load_state_dict({}, strict=False)
    assert len(result.missing_keys) == 4 and torch.equal(other(some(other, 9)), said)
    nothing = made(name).state_dict()  # a model that has learned nothing can be loaded too
    other.load_state_dict(nothing)
    with pytest.raises(InputError, match="learned nothing"):
        other(some(other, 2))


@classical
def test_inside_another_module(name):
    pair, other = torch.nn.ModuleList([learned(name), torch.nn.Linear(2, 2)]), torch.nn.ModuleList([made(name), torch.nn.Linear(2, 2)])
    other.load_state_dict(pair.state_dict())
    x = some(pair[0], 9)
    assert torch.equal(pair[0](x), other[0](x))
    with pytest.raises(RuntimeError, match="0.y_train: classes"):
        torch.nn.ModuleList([made(name, classes=3), torch.nn.Linear(2, 2)]).load_state_dict(pair.state_dict())


@classical
@pytest.mark.parametrize("cast", ["float", "half", "bfloat16", "double"])
def test_casts_change_nothing(name, cast):
    "Neither what is remembered nor what is answered, also where the estimator is fitted after the cast."
    model = learned(name)
    x, old = some(model, 30), model.state_dict()
    said = model(x)
    for m in (copy.deepcopy(model), made(name)):
        m.load_state_dict(old)
        assert getattr(m, cast)() is m
        assert torch.equal(m(x), said)
        assert all(torch.equal(v, old[k]) and v.dtype == old[k].dtype for k, v in m.state_dict().items())
    away = made(name).to("meta")
    assert all(v.is_meta for v in away.state_dict().values())


def test_samples_are_copied_once(monkeypatch):
    "After the first answer the samples stay where they are, also for a model of a single class."
    for labels in ((1, 2, 4), (2,)):
        model = learned("svm", labels=labels)
        x, said = some(model, 9), model(some(model, 9))
        model.x_train = model.x_train*float("nan")  # never looked at again
        monkeypatch.setattr(model, "_make", None)
        assert torch.equal(model(x), said)


def test_options():
    for name, config, what in (("svm", dict(C=0.), "C must be"), ("svm", dict(gamma=float("nan")), "gamma must be"), ("logistic", dict(C=-1.), "C must be"),
                               ("random-forest", dict(trees=0), "trees must be"), ("cnn-1d", dict(kernel=0), "kernel must be"), ("cnn-2d", dict(patch=4), "odd"),
                               ("hybridsn", dict(patch=0), "odd"), ("hybridsn", dict(reduce=0), "reduce must be"), ("spectral-transformer", dict(heads=5), "divide"),
                               ("spectral-transformer", dict(stride=0), "stride"), ("spectral-transformer", dict(group=0), "kernel must be"), ("svm", dict(patch=3), "no option")):
        with pytest.raises(InputError, match=what):
            create_model(name, 10, 3, **config)
    x, y = some(made("svm"), 40).numpy(), np.array([1, 2, 3, 4]*10)
    facts = made("svm", C=5., gamma=.3).learn(x, y, x, y)
    assert (facts["C"], facts["gamma"], facts["tried"]) == (5., .3, 1)
    assert made("svm", gamma=.3).learn(x, y, x, y)["tried"] == 4 and made("svm").learn(x, y, x, y)["tried"] == 12


@pytest.mark.parametrize("name", ["svm", "logistic"])
def test_choice_is_on_validation(name):
    "Validation labels alone decide: the chosen setting scores best on them, the first of equals stays, and test accuracy has no say."
    rng = np.random.default_rng(4)
    x, x_val, y = rng.normal(size=(40, 13)).astype(np.float32), rng.normal(size=(40, 13)).astype(np.float32), rng.integers(1, 5, 40)
    model = made(name)
    facts = model.learn(x, y, x_val, y)
    scores = []
    for setting in model._candidates(x):
        one = made(name, **dict(zip(model.settings, setting)))
        scores.append(one.learn(x, y, x_val, y)["val_oa"])
    assert facts["val_oa"] == max(scores) and len(set(scores)) > 1
    assert tuple(model.chosen.tolist()) == model._candidates(x)[scores.index(max(scores))]


@pytest.mark.parametrize("seed", range(6))
def test_nearest_coords(seed):
    "To the pixel the accuracy of the split chapter, whatever the order of learning, ties included."
    rng = np.random.default_rng(seed)
    h, w = rng.integers(8, 30, 2)
    labels = rng.integers(0, 4, (h, w))
    split = split_random(labels, train=.2, val=.1, seed=seed)
    model, order = create_model("nearest-coords", 5, 3), rng.permutation(split.train)
    where = lambda i: np.stack(np.divmod(i, w), 1).astype(np.float32)
    model.learn(where(order), labels.flat[order], where(split.val), labels.flat[split.val])
    got = model(torch.from_numpy(where(split.test))).argmax(1).numpy() + 1
    assert np.mean(got == labels.flat[split.test]) == coords_only_accuracy(labels, split)


@nets
def test_gradients(name):
    model = made(name, 24).train()
    x, y = some(model, 12), torch.tensor([1, 2, 3, 4]*3)
    model.loss(x, y)[0].backward()
    for key, p in model.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all() and p.grad.abs().max() > 0, key


@nets
def test_learns(name):
    "Two spectra in noise, in a few steps."
    model = made(name, 16, 2)
    spectra = torch.randn(2, 16, generator=torch.Generator().manual_seed(2))
    def draw(n, seed):
        y = torch.arange(n) % 2
        x = some(model, n, seed)
        return x + spectra[y].reshape(n, 16, *[1]*(x.ndim - 2)), y + 1
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for i in range(25):
        optimizer.zero_grad()
        model.train().loss(*draw(32, i))[0].backward()
        optimizer.step()
    x, y = draw(200, 99)
    assert (model.eval()(x).argmax(1) + 1 == y).float().mean() > .85


def test_parameters():
    "By hand, for 200 bands and 16 classes."
    w = 24
    cnn1d = w*7 + 2*w + w*w*7 + 2*w + (w*50 + 1)*16
    cnn2d = 200*32 + 64 + 4*(9*32*32 + 64) + 33*16
    mix, volume, plane = 200*16 + 32, 8*63 + 16 + 8*16*45 + 32 + 16*32*27 + 64, 32*4*64*9 + 128
    hybrid = mix + volume + plane + 65*64 + 65*16
    d = 32
    layer = 4*(d*d + d) + (d*2*d + 2*d) + (2*d*d + d) + 4*d
    transformer = 8*d + d + 51*d + 2*layer + 2*d + 33*16
    for name, want in (("cnn-1d", cnn1d), ("cnn-2d", cnn2d), ("hybridsn", hybrid), ("spectral-transformer", transformer)):
        assert sum(p.numel() for p in made(name, 200, 16).parameters()) == want, name
    assert transformer < 100_000


@pytest.mark.parametrize("patch", [1, 3, 5, 7, 9, 11])
@pytest.mark.parametrize("name", ["cnn-2d", "hybridsn"])
def test_patches(name, patch):
    "Every pixel of the patch is seen."
    model = made(name, 6, 3, patch=patch)
    x = some(model, 8).requires_grad_()
    (model(x)*torch.randn(8, 3)).sum().backward()
    assert x.grad.shape[2:] == (patch, patch) and (x.grad.abs().amax((0, 1)) > 0).all()


def test_import_is_cheap():
    "The networks do not wait for scikit-learn."
    code = "import sys, hsi_mamba_nb.models as m; m.create_model('cnn-1d', 9, 3); m.create_model('svm', 9, 3); sys.exit('sklearn' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
