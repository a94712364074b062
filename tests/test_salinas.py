"""The thread on a real scene: Salinas-A from its files to a map, by the commands of the README."""
import json
import subprocess
import sys

import numpy as np
import pytest

SEEDS = (0, 1, 2)


@pytest.fixture(scope="module")
def scene(data):
    from hsi_mamba_nb.scene import read_scene
    return read_scene(data/"salinas_a"/"SalinasA_corrected.mat", data/"salinas_a"/"SalinasA_gt.mat")


def test_labels_are_compacted(scene):
    assert scene.cube.shape == (83, 86, 204)
    assert scene.label_values == (1, 10, 11, 12, 13, 14)
    assert np.bincount(scene.labels.ravel())[1:].tolist() == [391, 1343, 616, 1525, 674, 799]


@pytest.mark.parametrize("seed", range(10))
def test_block_split_keeps_every_class_and_leaks_nothing(scene, seed):
    from hsi_mamba_nb.scene import leakage_report, split_blocks
    split = split_blocks(scene, seed=seed)
    assert split.left_out == ()
    for part in ("train", "val", "test"):
        assert np.bincount(scene.labels.flat[getattr(split, part)], minlength=7)[1:].min() >= 5, part
    assert leakage_report(split, patch=9)["holds_training_pixel"] == 0
    where = np.stack(np.unravel_index(np.concatenate([split.train, split.val]), split.shape), 1)
    test = np.stack(np.unravel_index(split.test, split.shape), 1)
    assert np.abs(where[:, None] - test[None]).max(-1).min() > 4  # the slow way, all pairs


def svm_accuracy(scene, split):
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    from sklearn.svm import SVC
    x, y = scene.cube.reshape(-1, scene.bands).astype(float), scene.labels.ravel()
    fits = [make_pipeline(StandardScaler(), SVC(C=c)).fit(x[split.train], y[split.train]) for c in (1, 10, 100, 1000)]
    best = max(fits, key=lambda f: f.score(x[split.val], y[split.val]))
    return best.score(x[split.test], y[split.test])


def test_fit_evaluate_map_reach_the_svm(data, scene, tmp_path):
    from hsi_mamba_nb.scene import load_split
    folder, got, floor = data/"salinas_a", [], []
    for seed in SEEDS:
        out = tmp_path/f"run{seed}"
        run = lambda *a: subprocess.run([sys.executable, "-m", "hsi_mamba_nb", *map(str, a)], capture_output=True, text=True, timeout=900)
        done = run("fit", folder/"SalinasA_corrected.mat", "--labels", folder/"SalinasA_gt.mat", "--model", "ssa-mamba", "--split", "blocks",
                   "--seed", seed, "--epochs", 12, "--out", out)
        assert done.returncode == 0, done.stderr
        done = run("evaluate", out)
        assert done.returncode == 0, done.stderr
        for word in ("OA", "AA", "kappa", "coordinates-only"):
            assert word in done.stdout
        got.append(float(next(line for line in done.stdout.splitlines() if line.startswith("OA")).split()[1]))
        floor.append(svm_accuracy(scene, load_split(out/"split.json")))
        assert json.loads((out/"card.json").read_text())["split"]["strategy"] == "blocks"
    done = run("map", out, "--out", tmp_path/"map.png")
    assert done.returncode == 0, done.stderr
    assert (tmp_path/"map.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    print(f"mean OA {np.mean(got):.4f} (SVM {np.mean(floor):.4f})")
    assert np.mean(got) >= np.mean(floor) - .01, (got, floor)
