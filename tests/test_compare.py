"""Boards: nothing repeated, nothing lost, the same rows however they are made; and six mistakes of public code that must not come back."""
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from test_cli import run as command

from hsi_mamba_nb.errors import InputError
from hsi_mamba_nb.files import append_row, read_rows, result_rows
from hsi_mamba_nb.learn import Run, compare, evaluate, fit, predict_map
from hsi_mamba_nb.learn.feed import TileData, feed, release
from hsi_mamba_nb.learn.protocol import BUDGETS, best_possible, board_table, few_labels, run_row, variance_parts
from hsi_mamba_nb.learn.training import predict_proba
from hsi_mamba_nb.models import create_model, list_models
from hsi_mamba_nb.models.base import HSIModel
from hsi_mamba_nb.scene import PatchDataset, Scene, Split, Standardizer, split_blocks, synthetic_scene

COSTS = {"train_seconds", "pixel_microseconds", "extra_mb", "date"}  # what a clock says


@pytest.fixture(scope="module")
def scene(): return replace(synthetic_scene(40, 40, bands=20, classes=3, seed=1), name="toy")


@pytest.fixture(scope="module")
def split(scene): return few_labels(split_blocks(scene, buffer=2), scene.labels, 6)


def facts(rows): return sorted(json.dumps({k: v for k, v in r.items() if k not in COSTS}, sort_keys=True) for r in rows)


BOARD = ("compare", "--models", "nearest-coords,nearest-spectrum", "--scenes", "hard-few", "--labels", "5", "--budget", "tiny")


def test_a_killed_board_goes_on_and_repeats_nothing(tmp_path):
    out = tmp_path/"board.jsonl"
    child = subprocess.Popen([sys.executable, "-m", "hsi_mamba_nb", *BOARD, "--seeds", "6", "--out", out], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    for _ in range(1200):
        if len(read_rows(out)) >= 2: break
        time.sleep(.05)
    child.send_signal(signal.SIGKILL)
    child.wait()
    kept = out.read_text()
    assert 2 <= len(read_rows(out)) < 12
    out.write_text(kept + '{"scene": "hard-f')  # killed while it wrote
    done = command(*BOARD, "--seeds", 6, "--out", out, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    text = out.read_text()
    assert text.startswith(kept) and len(read_rows(out)) == 12
    assert command(*BOARD, "--seeds", 6, "--out", out, cwd=tmp_path).returncode == 0 and out.read_text() == text


def test_two_processes_make_the_rows_of_one(tmp_path):
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "-m", "hsi_mamba_nb"]
    board = ("compare", "--models", "nearest-spectrum,cnn-1d", "--scenes", "hard-few", "--labels", "5", "--budget", "12")
    done = subprocess.run([*launch, *board, "--seeds", "2", "--out", "two.jsonl"], cwd=tmp_path, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("coordinates alone") == 1  # one of them speaks
    assert command(*board, "--seeds", 2, "--out", "one.jsonl", cwd=tmp_path).returncode == 0
    two, one = (read_rows(tmp_path/f"{n}.jsonl") for n in ("two", "one"))
    assert len(two) == 4 and facts(two) == facts(one)
    refused = subprocess.run([*launch, *board], cwd=tmp_path, capture_output=True, text=True)
    assert "give it with out=" in refused.stderr


@pytest.mark.parametrize("model", ["svm", "cnn-1d"])
def test_a_row_of_the_committed_board_can_be_made_again(model):
    "From the number of its steps, without a clock; processors may round the last bits differently."
    from conftest import ROOT
    row = next(r for r in read_rows(ROOT/"results"/"board.jsonl") if r["model"] == model and r["scene"] == "hard-few" and r["seed"] == 0)
    steps = row["steps"] or 1
    again, = compare([model], ["hard-few"], labels=[row["labels"]], seeds=1, progress=False, budget=str(steps))
    assert again["hash"] == row["hash"] and again["data"] == row["data"] and again["coords_only"] == row["coords_only"]
    assert again["oa"] == pytest.approx(row["oa"], abs=.01 if model == "svm" else .05)


def test_a_failing_run_does_not_stop_the_others(tmp_path, monkeypatch):
    from hsi_mamba_nb.learn import protocol
    true = protocol.run_row
    def sometimes(job, *args):
        if job["seed"] == 1: raise FloatingPointError("epoch 1: not finite")
        return true(job, *args)
    monkeypatch.setattr(protocol, "run_row", sometimes)
    with pytest.raises(InputError, match="1 of 3 runs failed.*seed 1: epoch 1: not finite"): compare(["svm"], ["hard-few"], labels=[5], out=tmp_path/"b.jsonl", progress=False)
    assert [r["seed"] for r in read_rows(tmp_path/"b.jsonl")] == [0, 2]


def test_rows_of_a_file(tmp_path):
    path = tmp_path/"rows.jsonl"
    assert read_rows(path) == []
    append_row(path, dict(a=1))
    with open(path, "a") as f: f.write('{"a": 2}')  # whole, but for its end
    append_row(path, dict(a=3))
    with open(path, "a") as f: f.write('{"a": ')
    assert [r["a"] for r in read_rows(path)] == [1, 2, 3]
    append_row(path, dict(a=4))
    assert [r["a"] for r in read_rows(path)] == [1, 2, 3, 4]
    for text in (b"a letter of mine", b"[1]\n", b"\xff\xfe\n", b'{"a": 1}\n{"a\n'):
        path.write_bytes(text)
        with pytest.raises(InputError, match="is not a row"): read_rows(path)
    with pytest.raises(InputError, match="cannot be read"): read_rows(tmp_path)


def test_what_a_table_counts(scene):
    rows = compare(["svm", "nearest-spectrum"], [scene], ["halves"], labels=[5], seeds=3, budget="tiny", progress=False)
    assert len({r["hash"] for r in rows}) <= 3 and board_table(rows).count("svm") == 1
    same = [dict(r, seed=r["seed"] + s) for s in range(12) for r in rows if r["seed"] == 0]
    assert "1 splits" in board_table(same) and "+-" not in board_table(same)  # one split twelve times is one split
    ten = [dict(r, seed=s, hash=str(s), oa=r["oa"] + .01*s) for s in range(10) for r in rows if r["seed"] == 0]
    inits = [dict(r, init=i, oa=r["oa"] + .001*i) for r in ten for i in range(2)]
    assert "of its spread: split 0.03" in board_table(inits) and variance_parts(np.array([[0., 0], [2, 2]]))["init"] == 0


@pytest.mark.parametrize("name", list_models())
def test_every_model_runs_on_a_board(name, scene):
    row = run_row(dict(scene="toy", model=name, split="blocks", labels=5, seed=0, init=0), scene, replace(BUDGETS["tiny"], seconds=.2, steps=3, epoch_steps=3))
    assert 0 < row["oa"] <= 1 and row["n_train"] == 15 and json.dumps(row, allow_nan=False)


def test_bad_boards_are_refused(tmp_path):
    for args, word in (((["svn"], ["hard-few"]), "no model 'svn'"), ((["svm"], ["hard-few"], ["block"]), "no split 'block'"), ((["svm"], ["berlim"]), "berlim")):
        with pytest.raises(InputError, match=word): compare(*args, progress=False)
    with pytest.raises(InputError, match="no budget"): compare(["svm"], ["hard-few"], budget="huge")
    done = command("compare", "--models", "svm", "--scenes", "hard-few", "--labels", "some", cwd=tmp_path)
    assert done.returncode == 2 and "--labels some" in done.stderr and not list(tmp_path.iterdir())
    for spec in ("svm:C=abc", "cnn-2d:patch=big", "cnn-2d:patch=8", "svm:colour=red", "svm:fast"):
        with pytest.raises(InputError, match="svm|cnn-2d"): compare([spec], ["hard-few"], seeds=1, progress=False)
    done = command("compare", "--models", "svm", "--scenes", "hard-few", "--figure", "a.xyz", cwd=tmp_path)
    assert done.returncode == 2 and "--figure a.xyz" in done.stderr
    with pytest.raises(InputError, match="not a folder"): append_row(append_row(tmp_path/"file", {})/"below", {})


class Mean(HSIModel):
    "An image model with a known reach: the mean over 5 x 5 pixels."
    takes, name, config = "image", "mean", {}

    def __init__(self, bands):
        super().__init__()
        self.conv = torch.nn.Conv2d(bands, bands, 5, padding=2, groups=bands, bias=False)
        self.bands = self.classes = bands
        torch.nn.init.constant_(self.conv.weight, 1/25)

    def forward(self, x): return self.conv(x)


@pytest.mark.parametrize("h, w, tile, overlap", [(30, 41, 12, 4), (7, 60, 16, 6), (33, 5, 9, 4), (40, 40, 64, 32), (1, 30, 8, 5)])
def test_tiles_of_a_model_with_a_known_reach(h, w, tile, overlap):
    cube = np.random.default_rng(0).normal(size=(h, w, 3)).astype(np.float32)
    run = Run(Mean(3), Standardizer(np.zeros(3, np.float32), np.ones(3, np.float32)), ("a", "b", "c"), None)
    whole, tiled = (predict_map(run, Scene(cube), tile=t, overlap=o, progress=False) for t, o in ((10**6, 0), (tile, overlap)))
    assert np.array_equal(whole.classes, tiled.classes) and np.allclose(whole.confidence, tiled.confidence, atol=1e-6)
    data = TileData(cube, np.arange(h*w), tile=tile, overlap=overlap)
    seen = np.concatenate([i for _, i, _ in data.chunks(1)])
    assert sorted(seen) == list(range(h*w))


def test_an_image_model_sees_no_labels_but_those_it_trains_on(scene, split):
    model = create_model("mamba-hsi", scene.bands, scene.classes)
    data = feed(model, scene.cube, split.train, scene.labels)
    _, y = data.batch(np.arange(len(data)))
    assert int((y > 0).sum()) == len(split.train)
    run = fit(model, scene, split, steps=3, epoch_steps=3, cpu=True, progress=False)
    assert evaluate(run, scene).cm.sum() == len(split.test)


def test_pages_of_a_mapped_file_are_handed_back(tmp_path):
    x = np.random.default_rng(0).integers(0, 9, (50, 40, 30)).astype(np.uint16)
    np.save(tmp_path/"x.npy", x)
    cube = np.load(tmp_path/"x.npy", mmap_mode="r")
    mine = np.load(tmp_path/"x.npy", mmap_mode="c")
    mine[:] += 1  # in memory only
    for view in (cube, cube[3:], cube.transpose(1, 0, 2)[::2], x, mine):
        before = np.array(view)
        release(view)
        assert np.array_equal(view, before)


class TestKnownBugs:
    "Each was found in public code of this field."
    def test_test_kappa_from_the_validation_evaluator(self, scene, split):
        run = fit(create_model("nearest-spectrum", scene.bands, scene.classes), scene, split, cpu=True, progress=False)
        alone = evaluate(run, scene, part="test").kappa
        evaluate(run, scene, part="val")
        assert evaluate(run, scene, part="test").kappa == alone

    def test_list_indexed_sampling_puts_training_pixels_into_test(self, scene):
        for strategy in ("blocks", "random", "halves", "per-class"):
            from hsi_mamba_nb.learn.protocol import _SPLITS
            s = _SPLITS[strategy](scene, 0)
            assert not set(s.train) & set(s.test) and not set(s.val) & set(s.test)
        with pytest.raises(InputError, match="more than one part"): Split(np.array([1, 2]), np.array([3]), np.array([2, 4]), shape=(4, 4), strategy="by hand", seed=0)

    @pytest.mark.parametrize("name", ["svm", "cnn-2d", "hybridsn"])
    def test_nothing_is_fitted_on_test_pixels(self, name, scene, split):
        "PCA or a scaler on the whole scene: spectra of test pixels far from all patches of training must not matter."
        far = np.setdiff1d(split.test, np.concatenate([np.unique(np.clip(split.train[:, None, None]//40 + np.arange(-4, 5)[:, None], 0, 39)*40 +
                                                                np.clip(split.train[:, None, None] % 40 + np.arange(-4, 5), 0, 39))]))
        assert len(far) > 50
        cube = scene.cube.copy()
        cube.reshape(-1, scene.bands)[far] *= 7
        found = []
        for c in (scene.cube, cube):
            torch.manual_seed(0)
            run = fit(create_model(name, scene.bands, scene.classes, **({} if name == "svm" else dict(patch=5))), replace(scene, cube=c), split, steps=4, epoch_steps=4, cpu=True, progress=False)
            found.append({k: v.clone() for k, v in run.model.state_dict().items()} | dict(mean=torch.from_numpy(run.scale.mean)))
        assert found[0].keys() == found[1].keys() and all(torch.equal(found[0][k], found[1][k]) for k in found[0])

    def test_the_epoch_is_not_chosen_on_test(self, scene, split):
        wrong = scene.labels.copy()
        wrong.flat[split.test] = wrong.flat[split.test] % scene.classes + 1
        runs = []
        for labels in (scene.labels, wrong):
            torch.manual_seed(0)
            runs.append(fit(create_model("cnn-1d", scene.bands, scene.classes), replace(scene, labels=labels), split, steps=12, epoch_steps=4, cpu=True, progress=False))
        assert [r["val_oa"] for r in runs[0].history] == [r["val_oa"] for r in runs[1].history]
        assert all(torch.equal(a, b) for a, b in zip(runs[0].model.parameters(), runs[1].model.parameters()))

    def test_out_of_memory_is_not_swallowed(self, scene, split, monkeypatch, tmp_path):
        run = fit(create_model("cnn-1d", scene.bands, scene.classes), scene, split, steps=2, cpu=True, progress=False)
        forward = type(run.model).forward

        def greedy(self, x):
            if len(x) > 100: raise MemoryError
            return forward(self, x)
        monkeypatch.setattr(type(run.model), "forward", greedy)
        with pytest.raises(MemoryError): predict_proba(run, feed(run.model, scene.cube, split.test, scene.labels, run.scale))
        with pytest.raises(MemoryError): compare(["cnn-1d"], [scene], labels=[5], seeds=1, budget="tiny", out=tmp_path/"b.jsonl", progress=False)
        assert read_rows(tmp_path/"b.jsonl") == []

    def test_even_patches_have_no_centre(self, scene, split):
        with pytest.raises(InputError, match="odd"): PatchDataset(scene.cube, split.train, patch=8)
        for name in ("cnn-2d", "hybridsn", "ssa-mamba"):
            with pytest.raises(InputError): fit(create_model(name, scene.bands, scene.classes, patch=8), scene, split, steps=1, cpu=True, progress=False)


def test_best_possible():
    assert np.isnan(best_possible("berlin", 1)) and best_possible("hard-space", 5) > best_possible("hard-space", 1)


def test_published_rows_are_read_from_the_checkout_or_refused_in_one_line(monkeypatch):
    assert len(result_rows("board.jsonl")) >= 198 and [r["command"] for r in result_rows("clusters-cpu.json")] == ["hsi-mamba bench clusters"]

    def offline(*_, **__): raise OSError("no network")
    monkeypatch.setattr("urllib.request.urlopen", offline)
    with pytest.raises(InputError, match="no-such.jsonl.*clone the repository"): result_rows("no-such.jsonl")
