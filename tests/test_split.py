"""Splits on real label maps: what the chapter quotes is measured here; what must hold of any pair of masks; and the command."""
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.io import loadmat
from test_cli import run

from hsi_mamba_nb.errors import InputError
from hsi_mamba_nb.scene import (Split, coords_only_accuracy, counts, label_range, leakage_report, load_split, merge_masks, same_classes,
                                split_halves, split_ladder, split_published)

SCENES = ("Indian_pines", "PaviaU", "Salinas")
# Overall accuracy (%) of the nearest training pixel's label, ten seeds, from an earlier measurement: random 10 %, random 5 %,
# 30 and 10 pixels a class, and classes cut in halves by row, the whole upper half training.
EARLIER = dict(Indian_pines=(97.38, 94.88, 89.65, 78.36, 52.75), PaviaU=(98.89, 97.40, 82.27, 70.50, 61.28), Salinas=(99.83, 99.52, 95.10, 87.36, 56.65))
BLOCKS = dict(Indian_pines=.70, PaviaU=.80, Salinas=.90)  # what position still scores, ten seeds
RANGE = dict(Indian_pines=16, PaviaU=67, Salinas=42)  # pixels


def label_map(data, name):
    path = data/"gt_maps"/f"{name}_gt.mat"
    if not path.is_file():
        pytest.skip(f"no {path}")
    return next(v for k, v in loadmat(path).items() if not k.startswith("_"))


@pytest.fixture(scope="module")
def masks(data):
    "The pair of maps for Indian Pines that many papers train and test on."
    rasterio = pytest.importorskip("rasterio")
    out = []
    for part in ("TR", "TE"):
        path = data/"gt_maps"/f"Indian{part}123_temp123.tif"
        if not path.is_file():
            pytest.skip(f"no {path}")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the files say nothing about where on earth they lie
            with rasterio.open(path) as f:
                out.append(f.read(1))
    return out


@pytest.mark.parametrize("name", SCENES)
def test_ladder_gives_the_numbers_measured_earlier(data, name):
    y = label_map(data, name)
    rows = split_ladder(y, patch=9, seeds=range(10))
    got = np.array([100*r["coords_only_mean"] for r in rows])
    assert np.abs(got[:2] - EARLIER[name][:2]).max() < .5, got
    assert np.abs(got[2:4] - EARLIER[name][2:4]).max() < 1.5, got
    halves = split_halves(y)
    whole = Split(np.union1d(halves.train, halves.val), [], halves.test, halves.shape, "halves without validation")
    assert abs(100*coords_only_accuracy(y, whole) - EARLIER[name][4]) < .5
    assert abs(rows[5]["coords_only_mean"] - BLOCKS[name]) < .01, got
    held = [r["holds_training_pixel"] for r in rows]
    assert held[0] > .97 and held[5] == 0 < min(held[:5])
    assert [len(set(r["hashes"])) for r in rows] == [10, 10, 10, 10, 1, 10]
    assert label_range(y) == RANGE[name]


def test_indian_pines_loses_its_rare_classes_to_the_margin(data):
    from hsi_mamba_nb.scene import split_blocks
    y = label_map(data, "Indian_pines")
    left = [split_blocks(y, seed=i).left_out for i in range(10)]
    size = np.bincount(y.ravel())
    always, some = set.intersection(*map(set, left)), set.union(*map(set, left))
    assert sorted(size[list(always)]) == [20, 28, 46] and sorted(size[list(some)]) == [20, 28, 46, 93]


def test_salinas_a_at_random_and_in_blocks(data):
    from hsi_mamba_nb.scene import compact_labels, split_blocks, split_random
    y = compact_labels(loadmat(data/"salinas_a"/"SalinasA_gt.mat")["salinasA_gt"])[0]
    random, blocks = (np.mean([coords_only_accuracy(y, make(y, seed=i)) for i in range(10)]) for make in (split_random, split_blocks))
    assert abs(random - .997) < .001 and abs(blocks - .79) < .01, (random, blocks)


def test_published_masks_are_another_label_map(data, masks):
    y = label_map(data, "Indian_pines")
    merged = merge_masks(*masks)
    assert [(m > 0).sum() for m in (*masks, merged, y)] == [695, 9671, 10366, 10249]
    same = same_classes(merged, y)
    assert (same["both"], same["only_a"], same["only_b"], same["agree"]) == (10110, 256, 139, 1)
    assert same["match"] == {1: 2, 2: 3, 3: 4, 4: 5, 5: 6, 6: 8, 7: 10, 8: 11, 9: 12, 10: 13, 11: 14, 12: 15, 13: 16, 14: 1, 15: 7, 16: 9}
    assert same_classes(y, merged)["match"] == {v: k for k, v in same["match"].items()}


def test_published_masks_are_disjoint_and_not_apart(masks):
    split, y = split_published(*masks)
    assert np.array_equal(split.test, np.flatnonzero(masks[1])) and len(split.train) + len(split.val) == 695
    assert counts(split, y)[:2].min() == 5
    as_published = Split(np.flatnonzero(masks[0]), [], split.test, split.shape, "as published")
    report = leakage_report(as_published, 9, y)
    assert round(report["holds_training_pixel"], 2) == .90 and round(report["coords_only_accuracy"], 2) == .92
    assert leakage_report(split, 9)["holds_training_pixel"] > .85


@st.composite
def pairs(draw):
    "A label map with classes 1..3, and which of its pixels train."
    shape = draw(st.tuples(st.integers(2, 9), st.integers(2, 9)))
    return draw(arrays(np.int64, shape, elements=st.integers(0, 3))), draw(arrays(bool, shape))


@settings(max_examples=150, deadline=None)
@given(pairs(), st.integers(0, 9), st.sampled_from([np.uint8, np.int16, np.float64]))
def test_any_pair_is_merged_and_split_or_refused(pair, seed, kind):
    y, chosen = pair
    train, test = (y*chosen).astype(kind), (y*~chosen).astype(kind)
    a, b = (set(np.unique(m[m > 0]).tolist()) for m in (train, test))
    if a != b or len(a) < 2:
        with pytest.raises(InputError, match="^pair"):
            split_published(train, test, name="pair")
        return
    split, labels = split_published(train, test, seed=seed)
    assert np.array_equal(labels, y) and np.array_equal(merge_masks(train, test), y)
    parts = [set(getattr(split, p).tolist()) for p in ("train", "val", "test")]
    assert sum(map(len, parts)) == len(set.union(*parts)) == (y > 0).sum()
    assert parts[0] | parts[1] == set(np.flatnonzero(chosen & (y > 0)).tolist())
    n = counts(split, y)
    assert all(v == min(max(5, round(.1*(t + v))), (t + v)//2) for t, v in n[:2].T)
    assert split.hash == split_published(train.copy(order="F"), test.astype(np.int32), seed=seed)[0].hash
    order = np.array([0, 7, 9, 8])
    assert same_classes(y, order[y])["match"] == {k: order[k] for k in map(int, a)}


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(0, 3))
def test_halves_keep_their_buffer_and_their_order(seed, buffer):
    rng = np.random.default_rng(seed)
    y = np.kron(rng.integers(0, 4, (4, 3)), np.ones((8, 8), int))
    try:
        split = split_halves(y, buffer, min_per_class=3)
    except InputError as e:
        assert "smaller buffer" in str(e)
        return
    assert leakage_report(split, 2*buffer + 1)["holds_training_pixel"] == 0
    rows = {p: np.unravel_index(getattr(split, p), y.shape)[0] for p in ("train", "val", "test")}
    for k in set(range(1, y.max() + 1)) - set(split.left_out):
        of = {p: r[y.flat[getattr(split, p)] == k] for p, r in rows.items()}
        assert min(map(len, of.values())) >= 3
        assert of["val"].max() <= of["train"].min() and of["train"].max() <= of["test"].min()


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    from hsi_mamba_nb.scene import synthetic_scene
    folder = tmp_path_factory.mktemp("split")
    scene = synthetic_scene(h=48, w=48, bands=8, classes=3, seed=1)
    chosen = np.random.default_rng(0).random(scene.labels.shape) < .1
    for name, array in dict(cube=scene.cube, labels=scene.labels, train=scene.labels*chosen, test=scene.labels*~chosen).items():
        np.save(folder/f"{name}.npy", array)
    return folder


def test_command_draws_and_climbs_the_ladder(files):
    done = run("split", "cube.npy", "--labels", "labels.npy", "--ladder", "--figure", "split.png", cwd=files)
    assert done.returncode == 0, done.stderr
    assert (files/"split.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and (files/"split.png").stat().st_size > 10_000
    lines = done.stdout.splitlines()
    assert sum(line.startswith(("random 10 %", "random 5 %", "30 per class", "10 per class", "class halves", "blocks, buffer 4")) for line in lines) == 6
    histogram = next(line for line in lines if line.startswith("distance counts"))
    assert "1: 0  2: 0  3: 0  4: 0  5: " in histogram and ">=10: " in histogram
    assert next(line for line in lines if line.startswith("class ")).split() == ["class", "train", "val", "test", "left", "out"]


def test_command_cuts_halves_and_takes_masks(files):
    done = run("split", "cube.npy", "--labels", "labels.npy", "--split", "halves", "--out", "halves.json", cwd=files)
    assert done.returncode == 0, done.stderr
    assert (load_split(files/"halves.json").strategy, load_split(files/"halves.json").buffer) == ("halves", 4)
    done = run("split", "cube.npy", "--masks", "train.npy", "test.npy", "--out", "masks.json", cwd=files)
    assert done.returncode == 0, done.stderr
    assert "validation flatters" in done.stdout
    split, _ = split_published(np.load(files/"train.npy"), np.load(files/"test.npy"))
    assert load_split(files/"masks.json").hash == split.hash


REFUSED = [(["--masks", "train.npy", "test.npy", "--split", "random"], "--masks"), (["--masks", "train.npy", "test.npy", "--labels", "labels.npy"], "drop one"),
           (["--masks", "train.npy", "labels.npy"], "set them to 0 in one"), (["--masks", "train.npy", "none.npy"], "no such"),
           (["--labels", "labels.npy", "--figure", "split.gif"], ".png"), (["--labels", "labels.npy", "--split", "halves", "--buffer", "40"], "smaller buffer")]


@pytest.mark.parametrize("args, way", REFUSED, ids=[" ".join(r[0]) for r in REFUSED])
def test_command_refuses_in_one_line(files, args, way):
    before = sorted(files.iterdir())
    done = run("split", "cube.npy", *args, cwd=files)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and way in done.stderr, done.stderr
    assert sorted(files.iterdir()) == before
