"""Walks over images of any size: permutations with exact inverses, Hilbert's steps, and code that does not come home."""
import copy
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

from hsi_mamba_nb.errors import InputError
from hsi_mamba_nb.scan import BandOrder, ScanOrder, check_returns_home, list_orders, named_order, neighbour_gap

NAMES = list_orders()
SIZES = [(1, 1), (1, 2), (1, 13), (13, 1), (2, 2), (2, 3), (3, 2), (5, 7), (8, 8), (7, 24), (25, 6)]
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int16, torch.uint8, torch.bool, torch.complex64)
each = pytest.mark.parametrize("name", NAMES)
names, side = st.sampled_from(NAMES), st.integers(1, 40)
quick = settings(max_examples=60, deadline=None, derandomize=True)


def image(b, h, w, d, dtype=torch.float64):
    "Every value different in a wide type."
    return torch.arange(1, b*h*w*d + 1).view(b, h, w, d).to(dtype)


def walks(h, w):
    "The walks as lists of places, by the rule in their name."
    pixels = [(i, j) for i in range(h) for j in range(w)]
    found = {"row": pixels, "column": sorted(pixels, key=lambda p: p[::-1]),
             "serpentine": [p for i in range(h) for p in [(i, j) for j in range(w)][::-1 if i % 2 else 1]],
             "diagonal": [p for s in range(h + w - 1) for p in [(i, s - i) for i in range(h) if 0 <= s - i < w][::1 if s % 2 else -1]]}
    return {name: [i*w + j for i, j in walk] for name, walk in found.items()}


@pytest.mark.parametrize("h, w", SIZES)
def test_walks_against_lists(h, w):
    for name, walk in walks(h, w).items():
        assert named_order(name, h, w).index.tolist() == walk
        assert named_order(f"{name}-reversed", h, w).index.tolist() == walk[::-1]


@each
@pytest.mark.parametrize("h, w", SIZES)
def test_round_trip(name, h, w):
    order = named_order(name, h, w)
    for dtype in DTYPES:
        x = image(3, h, w, 2, dtype)
        y = order(x)
        assert y.shape == (3, h*w, 2) and y.dtype == dtype and y.is_contiguous()
        assert torch.equal(order.inverse(y), x)
        assert torch.equal(order(order.inverse(y)), y)
    assert torch.equal(y[:, 0], x.flatten(1, 2)[:, order.index[0]])


@quick
@given(names, side, side)
def test_permutation(name, h, w):
    order = named_order(name, h, w)
    steps = torch.arange(h*w)
    assert order.index.dtype == order.rank.dtype == torch.int64
    assert torch.equal(order.rank[order.index], steps) and torch.equal(order.index[order.rank], steps)
    assert torch.equal(order.rank, order.index.argsort())
    x = torch.arange(2.*h*w).view(2, h, w, 1)
    assert torch.equal(order.inverse(order(x)), x)


@quick
@given(st.integers(1, 150), st.integers(1, 150))
def test_hilbert_goes_to_a_nearest_neighbour(h, w):
    i, j = np.divmod(named_order("hilbert", h, w).index.numpy(), w)
    assert (abs(np.diff(i)) + abs(np.diff(j)) == 1).all()
    assert (i[0], j[0]) == (0, 0)


def test_hilbert_on_every_small_size():
    for h in range(1, 30):
        for w in range(1, 30):
            i, j = np.divmod(named_order("hilbert", h, w).index.numpy(), w)
            assert (abs(np.diff(i)) + abs(np.diff(j)) == 1).all() and len(set(zip(i.tolist(), j.tolist()))) == h*w, (h, w)


def test_hilbert_fills_squares_one_after_the_other():
    "On a side of 2**k each block of 4**m steps is one square."
    i, j = np.divmod(named_order("hilbert", 32, 32).index.numpy(), 32)
    for m in range(1, 5):
        blocks = np.stack([i >> m, j >> m], 1).reshape(-1, 4**m, 2)
        assert (blocks == blocks[:, :1]).all()


@pytest.mark.parametrize("h, w", [(610, 340), (341, 610), (1096, 3), (1, 4000)])
def test_hilbert_of_a_scene(h, w):
    i, j = np.divmod(named_order("hilbert", h, w).index.numpy(), w)
    assert (abs(np.diff(i)) + abs(np.diff(j)) == 1).all()


def test_diagonal_and_serpentine_stay_near():
    for h, w in SIZES:
        for name, far in (("diagonal", 2), ("serpentine", 1)):
            i, j = np.divmod(named_order(name, h, w).index.numpy(), w)
            assert (np.maximum(abs(np.diff(i)), abs(np.diff(j))) <= 1).all()
            assert (abs(np.diff(i)) + abs(np.diff(j)) <= far).all()


def test_laws():
    x = image(2, 5, 9, 3)
    assert torch.equal(named_order("column", 5, 9)(x), named_order("row", 9, 5)(x.transpose(1, 2)))
    for name in NAMES[::2]:
        order, back = named_order(name, 5, 9), named_order(f"{name}-reversed", 5, 9)
        assert torch.equal(back(x), order(x).flip(1))
        assert torch.equal(order(x[1:]), order(x)[1:])


@each
def test_gradient(name):
    order = named_order(name, 3, 4)
    x = torch.randn(2, 3, 4, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(order, x) and torch.autograd.gradgradcheck(order, x)
    slope = torch.randn(2, 12, 2, dtype=torch.float64)
    assert torch.equal(torch.autograd.grad(order(x), x, slope)[0], order.inverse(slope))
    y = slope.clone().requires_grad_()
    assert torch.equal(torch.autograd.grad(order.inverse(y), y, x.detach())[0], order(x.detach()))


def test_input_is_left_alone():
    x = image(2, 3, 4, 2)
    for name in NAMES:
        y = named_order(name, 3, 4)(x)
        y.zero_()
    assert torch.equal(x, image(2, 3, 4, 2))


@pytest.mark.parametrize("shape", [(0, 3, 4, 2), (2, 3, 4, 0), (1, 3, 4, 1)])
def test_empty_batches(shape):
    order = named_order("hilbert", 3, 4)
    x = torch.zeros(shape)
    assert order(x).shape == (shape[0], 12, shape[3]) and order.inverse(order(x)).shape == shape


def test_memory_layouts():
    x = image(2, 3, 4, 5)
    first = x.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)  # channels first in memory
    order = named_order("hilbert", 3, 4)
    assert not first.is_contiguous() and torch.equal(order(first), order(x))


def test_shared_and_copied():
    order = named_order("hilbert", 6, 5)
    assert named_order("hilbert", 6, 5) is order and named_order("hilbert", np.int64(6), 5) is order
    x = image(2, 6, 5, 1)
    for twin in (copy.copy(order), copy.deepcopy(order), pickle.loads(pickle.dumps(order))):
        assert (twin.name, twin.h, twin.w) == ("hilbert", 6, 5)
        assert torch.equal(twin(x), order(x)) and torch.equal(twin.inverse(twin(x)), x)
    assert len(pickle.dumps(named_order("row", 100, 100))) < 10_000*8 + 2000  # one list, not two
    with pytest.raises(AttributeError): order.h = 5


def test_names_of_modules_do_not_hide_functions():
    "A part's attribute of the same name as a module would become the module once that is loaded."
    code = "import hsi_mamba_nb.scan.scan_order as m, hsi_mamba_nb.scan as s; assert all(getattr(s, n) is getattr(m, n) for n in m.__all__)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)


def test_stand_ins_of_a_tracer_are_not_kept():
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
    order = ScanOrder("fresh", 4, 5, named_order("hilbert", 4, 5).index)
    with FakeTensorMode(allow_non_fake_inputs=True): y = order(torch.zeros(1, 4, 5, 2, device="meta"))
    assert isinstance(y, FakeTensor) and not order._there
    order(torch.zeros(1, 4, 5, 2, device="meta"))
    assert [type(v) for lists in order._there.values() for v in lists] == [torch.Tensor]*2


def test_farthest_neighbours():
    "No walk keeps all neighbours nearer than the shorter side; lines along it attain that (Chvatalova 1975)."
    for h, w in SIZES[1:]:
        gap = {}
        for name in NAMES:
            rank = named_order(name, h, w).rank.view(h, w)
            gap[name] = max(int(v.max()) for v in (rank.diff(dim=0).abs(), rank.diff(dim=1).abs()) if v.numel())
        assert min(gap.values()) == gap["row" if w <= h else "column"] == min(h, w)


DEVICES = ["meta"] + ["cuda"]*torch.cuda.is_available() + ["mps"]*torch.backends.mps.is_available()


@pytest.mark.parametrize("device", DEVICES)
def test_other_devices(device):
    order = ScanOrder("fresh", 4, 5, named_order("hilbert", 4, 5).index)
    x = image(2, 4, 5, 3, torch.float32)
    with torch.inference_mode(): order(x.to(device))  # the copies are made here
    moved = x.to(device).requires_grad_()
    y = order(moved)
    home = order.inverse(y)
    home.sum().backward()
    assert y.device.type == home.device.type == moved.grad.device.type == device and home.shape == x.shape
    assert len(order._there) == 1 and order.index.device.type == "cpu"
    if device != "meta": assert torch.equal(home.detach().cpu(), x) and torch.equal(y.detach().cpu(), order(x))
    assert not pickle.loads(pickle.dumps(order))._there


def test_first_use_in_other_modes():
    "A list made in inference mode, or under another default device, must serve everybody else."
    with torch.inference_mode(): early = named_order("hilbert", 9, 14)
    with torch.device("meta"): other = named_order("hilbert", 14, 9)
    assert not early.index.is_inference() and other.index.device.type == other.rank.device.type == "cpu"
    x = torch.ones(1, 9, 14, 1, requires_grad=True)
    early.inverse(early(x)).sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))


@pytest.mark.parametrize("device", DEVICES)
def test_compiles(device):
    order = ScanOrder("fresh", 4, 5, named_order("hilbert", 4, 5).index)
    f = torch.compile(lambda v: order.inverse(3*order(v)), backend="eager", fullgraph=True)
    x = image(2, 4, 5, 3, torch.float32).to(device)
    for _ in range(2): y = f(x)
    assert y.shape == x.shape
    if device != "meta": assert torch.equal(y, 3*x)


@pytest.mark.parametrize("bad, words", [(("hilbrt", 3, 4), "did you mean 'hilbert'"), (("Row", 3, 4), "there are row, row-reversed"), ((None, 3, 4), "None"),
                                        (("row", 0, 4), "h: expected a whole number of 1 or more, got 0"), (("row", 3, -1), "w: expected a whole number of 1 or more, got -1"),
                                        (("row", 3., 4), "h: expected a whole number of 1 or more, got 3.0"), (("row", "3", 4), "h: expected a whole number of 1 or more, got '3'")])
def test_wrong_names_and_sizes(bad, words):
    with pytest.raises(InputError) as e: named_order(*bad)
    assert words in str(e.value) and "\n" not in str(e.value)


@pytest.mark.parametrize("shape", [(2, 4, 3, 1), (3, 4, 1), (2, 12, 1), (2, 1, 3, 4), (2, 3, 4)])
def test_wrong_images(shape):
    with pytest.raises(InputError, match=r"x: expected \(b,h,w,d\) with h, w = 3, 4, got"): named_order("row", 3, 4)(torch.zeros(shape))


@pytest.mark.parametrize("shape", [(2, 11, 1), (2, 3, 4, 1), (12, 1)])
def test_wrong_sequences(shape):
    with pytest.raises(InputError, match=r"y: expected \(b,l,d\) with l = 3\*4 = 12, got"): named_order("row", 3, 4).inverse(torch.zeros(shape))


@pytest.mark.parametrize("index", [torch.arange(5), torch.arange(6.), torch.tensor([0, 1, 2, 3, 4, 4]), torch.arange(1, 7), torch.arange(6).view(2, 3), [0, 1, 2, 3, 4, -1]])
def test_no_permutation(index):
    with pytest.raises(InputError, match="each whole number from 0 to 5 once"): ScanOrder("mine", 2, 3, index)


@pytest.mark.parametrize("h, w", [(-2, -3), (2., 3), (2, "3"), (0, 0), (2, None)])
def test_no_sizes(h, w):
    with pytest.raises(InputError, match="[hw]: expected a whole number of 1 or more, got"): ScanOrder("mine", h, w, torch.arange(6))


def test_sizes_become_plain_numbers():
    order, bands = ScanOrder("mine", np.int64(2), torch.tensor(3), torch.arange(6)), BandOrder(np.int16(7), 3)
    assert [type(v) for v in (order.h, order.w, bands.bands, bands.groups)] == [int]*4 and bands == BandOrder(7, 3)


def test_own_walk():
    order = ScanOrder("by value", 2, 3, np.array([5, 0, 4, 1, 3, 2], np.int32)[::-1])
    x = image(2, 2, 3, 1)
    assert order.index.tolist() == [2, 3, 1, 4, 0, 5] and torch.equal(order.inverse(order(x)), x)


def test_neighbour_gap():
    for h, w in SIZES[1:]:
        pairs = h*(w - 1) + (h - 1)*w
        assert neighbour_gap(named_order("row", h, w))["mean"] == pytest.approx((h*(w - 1) + (h - 1)*w*w)/pairs)
        assert neighbour_gap(named_order("column", h, w)) == pytest.approx(neighbour_gap(named_order("row", w, h)))
        assert neighbour_gap(named_order("serpentine", h, w))["mean"] == pytest.approx(neighbour_gap(named_order("row", h, w))["mean"])
    assert neighbour_gap(named_order("row", 2, 3)) == pytest.approx({"mean": 13/7, "p95": 3})
    with pytest.raises(InputError, match="no neighbours"): neighbour_gap(named_order("hilbert", 1, 1))


def directions(names, back):
    "The mean of walks out and home, or, as in MambaMoE's code of 2025, viewed as an image as they are."
    def f(x):
        orders = [named_order(name, *x.shape[1:3]) for name in names]
        return sum(order.inverse(order(x)) if back else order(x).view_as(x) for order in orders)/len(orders)
    return f


FOUR = ("row", "column", "row-reversed", "column-reversed")


def test_four_directions_left_in_place_are_caught():
    check_returns_home(directions(FOUR, True))
    check_returns_home(directions(NAMES, True), 7, 4, d=3)
    spot = torch.zeros(1, 6, 4, 1)
    spot[0, 1, 2] = 1
    assert directions(FOUR, False)(spot)[0, ..., 0].nonzero().tolist() == [[1, 2], [2, 2], [3, 1], [4, 1]]
    with pytest.raises(AssertionError, match=r"6 x 4: pixel \(0, 0\) lands at \(0, 0\), \(5, 3\), expected \(0, 0\) alone"): check_returns_home(directions(FOUR, False), 6, 4)


@pytest.mark.parametrize("name", [n for n in NAMES if n != "row"])
def test_each_order_left_in_place_is_caught(name):
    with pytest.raises(AssertionError, match="lands at"): check_returns_home(directions([name], False))


def test_what_a_square_hides():
    def swapped(x):
        b, h, w, d = x.shape
        return x.transpose(1, 2).flatten(1, 2).view(b, h, w, d).transpose(1, 2).reshape(b, h, w, d)
    check_returns_home(swapped, 5, 5)
    with pytest.raises(AssertionError, match=r"pixel \(0, 1\) lands at"): check_returns_home(swapped)


def test_ways_not_to_come_home():
    keep = directions(FOUR, True)
    check_returns_home(lambda x: keep(x) + 7)  # what is added to any input does not count
    check_returns_home(lambda x: torch.cat([keep(x), -x], -1), d=2)  # more channels
    check_returns_home(lambda x: keep(x)[..., 0])
    for wrong, words in ((lambda x: x*0, "no place"), (lambda x: x.flip(0), "lands at"), (lambda x: x.roll(1, 2), "lands at"), (lambda x: x[:, :2], "came out"),
                         (lambda x: torch.where(x > 0, torch.nan, x), "no place"), (lambda x: x.reshape(1, -1, x.shape[2], 1).flip(1).view_as(x), "lands at")):
        with pytest.raises(AssertionError, match=words): check_returns_home(wrong)


@quick
@given(st.integers(1, 250).flatmap(lambda c: st.tuples(st.just(c), st.integers(1, c))), st.booleans(), st.sampled_from(DTYPES))
def test_bands(sizes, reverse, dtype):
    c, g = sizes
    order = BandOrder(c, g, reverse)
    x = torch.arange(1, 2*c + 1).view(2, 1, c).to(dtype)
    y = order(x)
    assert y.shape == (2, 1, g, -(-c//g)) and y.dtype == dtype and torch.equal(order.inverse(y), x)
    assert torch.equal(y, BandOrder(c, g, not reverse)(x).flip(-2))
    filled = (BandOrder(c, g)(torch.ones(c)) != 0).sum(-1)
    assert filled.sum() == c and filled.max() - filled.min() <= 1
    assert order(x[0, 0]).shape == (g, -(-c//g))


def test_bands_against_numpy():
    for c, g in ((7, 3), (200, 32), (5, 5), (9, 1), (103, 4)):
        order, x = BandOrder(c, g), torch.arange(1, c + 1)
        for row, want in zip(order(x).tolist(), np.array_split(np.arange(1, c + 1), g)):
            assert row == want.tolist() + [0]*(order.size - len(want))


def test_bands_gradient_and_copies():
    order = BandOrder(7, 3, reverse=True)
    x = torch.randn(2, 7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(order, x)
    assert torch.autograd.gradcheck(order.inverse, torch.randn(2, 3, 3, dtype=torch.float64, requires_grad=True))
    assert pickle.loads(pickle.dumps(order)) == order == copy.deepcopy(order)
    f = torch.compile(lambda v: order.inverse(order(v)), backend="eager", fullgraph=True)
    assert torch.equal(f(x), x)


def test_wrong_bands():
    with pytest.raises(InputError, match="groups: expected 1 to 7"): BandOrder(7, 8)
    for bad, name in (((7, 0), "groups"), ((0, 1), "bands"), ((7, 3.), "groups"), ((7., 3), "bands"), ((7, None), "groups")):
        with pytest.raises(InputError, match=f"{name}: expected a whole number of 1 or more, got"): BandOrder(*bad)
    with pytest.raises(InputError, match=r"x: expected \(...,c\) with c = 7"): BandOrder(7, 3)(torch.zeros(2, 8))
    with pytest.raises(InputError, match=r"y: expected .* = \(...,3,3\)"): BandOrder(7, 3).inverse(torch.zeros(2, 3, 2))


def test_the_chapter_holds_no_widget():
    "Its slider is for a running kernel; a stored one would be a dead button, different at every run."
    assert "jupyter.widget" not in (ROOT/"nbs"/"2_scan"/"26_scan_order.ipynb").read_text(encoding="utf-8")
