"""The three real scenes, by name and by file, from the command line to a map that lies in the right place."""
import numpy as np
import pytest

from test_cli import run

FILES = {
    "salinas-a": ["salinas_a/SalinasA_corrected.mat", "--labels", "salinas_a/SalinasA_gt.mat"],
    "samson": ["samson/samson_1.mat", "--labels", "samson/end3.mat", "--labels-key", "A", "--purity", ".8"],
    "berlin": ["berlin/HyMap02_Berlin_Urban_Gradient_2009.bsq", "--labels", "berlin/berlin_hymap02_labels_9m.tif"],
}
SHAPES = {"salinas-a": (83, 86, 204, 6), "samson": (95, 95, 156, 3), "berlin": (100, 67, 111, 6)}
QUICK = ["--set", "d_model=16", "--set", "depth=1", "--set", "patch=3", "--epochs", 1, "--batch-size", 256]


@pytest.mark.parametrize("name", FILES)
def test_by_name_and_by_file(data, tmp_path, monkeypatch, name):
    monkeypatch.setenv("HSI_DATA", str(data))
    runs = {}
    for way, scene in dict(name=[name], file=FILES[name]).items():
        done = run("fit", *scene, *QUICK, "--out", tmp_path/way, cwd=data)
        assert done.returncode == 0, done.stderr
        done = run("evaluate", tmp_path/way, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        runs[way] = [line.split() for line in done.stdout.splitlines() if line.startswith(("OA", "AA", "kappa", "coordinates"))]
        assert len(runs[way]) == 4, done.stdout
        for kind in ("png", "npy", "tif"):
            done = run("map", tmp_path/way, "--out", tmp_path/f"{way}.{kind}", cwd=tmp_path)
            assert done.returncode == 0, done.stderr
        h, w, _, k = SHAPES[name]
        classes = np.load(tmp_path/f"{way}.npy")
        assert classes.shape == (h, w) and 1 <= classes.min() and classes.max() <= k
    assert runs["name"] == runs["file"]


def test_the_map_of_berlin_lies_in_berlin(data, tmp_path, monkeypatch):
    rasterio = pytest.importorskip("rasterio")
    monkeypatch.setenv("HSI_DATA", str(data))
    assert run("fit", "berlin", *QUICK, "--out", tmp_path/"run").returncode == 0
    assert run("map", tmp_path/"run", "--out", tmp_path/"map.tif").returncode == 0
    with rasterio.open(tmp_path/"map.tif") as got, rasterio.open(data/"berlin"/"berlin_hymap02_labels_9m.tif") as labels:
        assert got.crs.to_epsg() == 32633 and got.transform == labels.transform == rasterio.Affine(9, 0, 383851.349, 0, -9, 5819308.225)
        assert got.shape == labels.shape == (100, 67) and got.nodata == 0 and got.tags()["CLASS_6"] == "water"
        assert got.read(1).min() >= 1


def test_real_files_and_their_headers(data):
    from hsi_mamba_nb.scene import read_labels, read_scene
    ksc = read_labels(data/"gt_maps"/"KSC_gt_v73.mat")
    assert ksc.shape == (512, 614) and np.unique(ksc).tolist() == list(range(14))
    berlin = read_scene(*(data/f for f in (FILES["berlin"][0], FILES["berlin"][2])))
    assert isinstance(berlin.cube, np.memmap) and berlin.cube.shape == (100, 67, 111)
    assert berlin.wavelengths_nm[[0, -1]].round(1).tolist() == [455.4, 2446.5]  # from the names of its bands
    assert np.bincount(berlin.labels.ravel())[1:].tolist() == [445, 443, 82, 422, 9, 243]
    import rasterio
    with rasterio.open(data/FILES["berlin"][0]) as f:
        assert (f.read().transpose(1, 2, 0) == berlin.cube).all()
    samson = read_scene(data/"samson"/"samson_1.mat", data/"samson"/"end3.mat", labels_key="A", purity=.8)
    assert np.bincount(samson.labels.ravel())[1:].tolist() == [2008, 1947, 1615]


def test_published_masks_are_labels_and_split_at_once(data, tmp_path):
    "The masks of Indian Pines, with a cube of noise in its size: what counts here is which pixels and classes are used."
    np.save(tmp_path/"cube.npy", np.random.default_rng(0).normal(size=(145, 145, 4)).astype(np.float32))
    masks = [data/"gt_maps"/f"Indian{part}123_temp123.tif" for part in ("TR", "TE")]
    done = run("fit", "cube.npy", "--masks", *masks, *QUICK, "--out", "run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    done = run("evaluate", tmp_path/"run", cwd=data)
    assert done.returncode == 0 and "'published'" in done.stdout and "test 9,671" in done.stdout, done.stdout + done.stderr
    done = run("fit", "cube.npy", "--masks", *masks, "--labels", masks[0], "--out", "other", cwd=tmp_path)
    assert done.returncode == 2 and "--masks" in done.stderr and not (tmp_path/"other").exists()
