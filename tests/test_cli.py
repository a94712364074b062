"""The command line: what it prints, and how it refuses."""
import io
import subprocess
import sys
from contextlib import chdir, redirect_stderr, redirect_stdout
from types import SimpleNamespace

import numpy as np
import pytest
from scipy.io import savemat

from hsi_mamba_nb.cli import main


def run(*args, cwd="."):
    "The command in this process: a Python and a torch less to start for each of many refusals."
    out, err = io.StringIO(), io.StringIO()
    with chdir(cwd), redirect_stdout(out), redirect_stderr(err):
        try:
            code = main([str(a) for a in args])
        except SystemExit as e:
            code = e.code
    return SimpleNamespace(returncode=code or 0, stdout=out.getvalue(), stderr=err.getvalue())


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    from hsi_mamba_nb.scene import synthetic_scene
    folder = tmp_path_factory.mktemp("files")
    scene = synthetic_scene(h=48, w=48, bands=16, classes=3, seed=1)
    np.save(folder/"cube.npy", scene.cube)
    np.save(folder/"labels.npy", scene.labels)
    savemat(folder/"two.mat", dict(a=scene.cube, b=scene.cube, gt=scene.labels))
    np.save(folder/"wide.npy", scene.cube[:, :40])
    np.save(folder/"transposed.npy", scene.labels[:, :40].T)
    np.save(folder/"halves.npy", scene.labels + .5)
    np.save(folder/"zeros.npy", scene.labels*0)
    np.save(folder/"minus.npy", scene.labels.astype(int) - 1)
    np.save(folder/"one.npy", np.minimum(scene.labels, 1))
    faulty = scene.cube.astype(np.float32)
    faulty[..., 4], faulty[..., 9] = 3, np.nan
    np.save(folder/"dead.npy", faulty)
    np.save(folder/"spoilt.npy", np.where(np.arange(16) == 6, np.where(scene.labels[..., None] == 1, np.inf, scene.cube), scene.cube).astype(np.float32))
    header = "ENVI\nsamples = 48\nlines = 48\nbands = 16\ndata type = 4\ninterleave = bip\nbyte order = 0\n"
    (folder/"envi.hdr").write_text(header)
    (folder/"envi.dat").write_bytes(scene.cube.astype("<f4").tobytes())
    (folder/"greedy.hdr").write_text(header.replace("lines = 48", "lines = 48000000"))
    (folder/"greedy.dat").write_bytes(scene.cube.astype("<f4").tobytes())
    (folder/"alone.hdr").write_text(header)
    (folder/"random.bin").write_bytes(np.random.default_rng(0).bytes(5000))
    savemat(folder/"matrix.mat", dict(V=scene.cube.transpose(2, 1, 0).reshape(16, -1)))
    (folder/"broken.npy").write_bytes((folder/"cube.npy").read_bytes()[:500])
    (folder/"empty.mat").write_bytes(b"")
    (folder/"text.mat").write_text("not a MATLAB file, but long enough to look at the header of" * 5)
    return folder


@pytest.fixture(scope="module")
def fitted(files):
    out = files/"run"
    done = run("fit", "cube.npy", "--labels", "labels.npy", "--set", "d_model=16", "--set", "depth=1", "--epochs", 2, "--out", out, cwd=files)
    assert done.returncode == 0, done.stderr
    return out


REFUSED = [
    (["fit", "none.npy", "--labels", "labels.npy", "--out", "x"], "none.npy", "no such file"),
    (["fit", "nowhere", "--out", "x"], "nowhere", "known by name"),
    (["fit", "salinas-b", "--out", "x"], "salinas-b", "salinas-a"),
    (["fit", "cube.npy", "--out", "x"], "cube.npy", "--labels"),
    (["fit", "two.mat", "--labels", "two.mat", "--out", "x"], "two.mat", "--key"),
    (["fit", "broken.npy", "--labels", "labels.npy", "--out", "x"], "broken.npy", "cannot be read"),
    (["fit", "empty.mat", "--labels", "labels.npy", "--out", "x"], "empty.mat", "0 bytes"),
    (["fit", "text.mat", "--labels", "labels.npy", "--out", "x"], "text.mat", "cannot be read"),
    (["fit", "random.bin", "--labels", "labels.npy", "--out", "x"], "random.bin", "cannot tell what this is"),
    (["fit", ".", "--labels", "labels.npy", "--out", "x"], ".", "a folder, not a file"),
    (["fit", "matrix.mat", "--labels", "labels.npy", "--out", "x"], "matrix.mat", "--shape ROWS COLUMNS"),
    (["fit", "labels.npy", "--labels", "labels.npy", "--out", "x"], "labels.npy", "no cube with 3 axes"),
    (["fit", "greedy.dat", "--labels", "labels.npy", "--out", "x"], "greedy.dat", "promises 147,456,000,000 bytes, the file has 147,456"),
    (["fit", "alone.hdr", "--labels", "labels.npy", "--out", "x"], "alone.hdr", "no data file"),
    (["fit", "dead.npy", "--labels", "labels.npy", "--out", "x"], "dead", "--drop-bands 5,10"),
    (["fit", "dead.npy", "--labels", "labels.npy", "--drop-bands", "5", "--out", "x"], "dead", "--drop-bands 9"),
    (["fit", "dead.npy", "--labels", "labels.npy", "--drop-bands", "5,17", "--out", "x"], "17", "1-16"),
    (["fit", "spoilt.npy", "--labels", "labels.npy", "--out", "x"], "spoilt", "--drop-bands 7"),
    (["fit", "cube.npy", "--labels", "minus.npy", "--out", "x"], "minus.npy", "smallest is -1"),
    (["fit", "cube.npy", "--labels", "one.npy", "--out", "x"], "one class", "at least two"),
    (["fit", "wide.npy", "--labels", "labels.npy", "--out", "x"], "wide", "labels are"),
    (["fit", "wide.npy", "--labels", "transposed.npy", "--out", "x"], "wide", "transpose"),
    (["fit", "cube.npy", "--labels", "halves.npy", "--out", "x"], "cube", "whole numbers"),
    (["fit", "cube.npy", "--labels", "zeros.npy", "--out", "x"], "cube", "all labels are 0"),
    (["fit", "cube.npy", "--labels", "labels.npy", "--split", "stripes", "--out", "x"], "stripes", "blocks"),
    (["fit", "cube.npy", "--labels", "labels.npy", "--split", "none.json", "--out", "x"], "none.json", "no such"),
    (["fit", "cube.npy", "--labels", "labels.npy", "--buffer", "40", "--out", "x"], "buffer", "smaller"),
    (["fit", "cube.npy", "--labels", "labels.npy", "--set", "patch=8", "--out", "x"], "patch", "odd"),
    (["fit", "cube.npy", "--labels", "labels.npy", "--set", "patch=11", "--out", "x"], "patch 11", "--buffer 5"),
    (["fit", "cube.npy", "--labels", "labels.npy", "--set", "widht=8", "--out", "x"], "widht", "options"),
    (["fit", "cube.npy", "--labels", "labels.npy", "--set", "d_model", "--out", "x"], "d_model", "option=value"),
    (["fit", "cube.npy", "--labels", "labels.npy", "--model", "ssa-manba", "--out", "x"], "ssa-manba", "ssa-mamba"),
    (["fit", "cube.npy", "--labels", "labels.npy", "--epochs", "0", "--out", "x"], "epochs", "at least 1"),
    (["fit", "cube.npy", "--labels", "labels.npy", "--out", "run"], "run", "--overwrite"),
    (["fit", "cube.npy", "--labels", "labels.npy", "--out", "labels.npy"], "labels.npy", "not a folder"),
    (["evaluate", "norun"], "norun", "hsi-mamba fit"),
    (["evaluate", "run", "--scene", "wide.npy", "--labels", "labels.npy"], "wide", "labels"),
    (["map", "run", "--out", "map.jpeg2"], "map.jpeg2", ".png"),
    (["map", "run"], "--out", "required"),
    (["map", "run", "--scene", "cube.npy", "--drop-bands", "1-3", "--out", "m.png"], "13 bands", "trained on 16"),
    (["map", "run", "--scene", "spoilt.npy", "--out", "m.png"], "bands 7", "--drop-bands 7"),
    (["map", "run", "--out", "cube.npy/m.png"], "cube.npy", "not a folder"),
    (["split", "cube.npy"], "cube.npy", "--labels"),
    (["fetch", "synthetic"], "synthetic", "needs no download"),
    (["fetch", "houston-2013"], "houston-2013", "IEEE"),
    (["fetch", "pavia"], "pavia", "pavia-u"),
    (["bench", "scan", "--repeats", "0"], "--repeats 0", "at least 1"),
    (["bench", "scan", "--json", "."], ".", "name a file in it"),
    (["nonsense"], "nonsense", "demo"),
]


@pytest.mark.parametrize("args, names, way", REFUSED, ids=[" ".join(map(str, r[0]))[:70] for r in REFUSED])
def test_refusal_is_one_line_that_names_the_thing_and_the_way_out(files, fitted, args, names, way):
    before = sorted(p.name for p in files.rglob("*"))
    done = run(*args, cwd=files)
    assert done.returncode == 2, done.stdout + done.stderr
    assert done.stderr.count("\n") == 1 and "Traceback" not in done.stderr, done.stderr
    assert names in done.stderr and way in done.stderr, done.stderr
    assert sorted(p.name for p in files.rglob("*")) == before, "something was left behind"


def test_fit_split_evaluate_map(files, fitted):
    done = run("evaluate", fitted, cwd=files/"run")  # from another folder: the card knows where the scene is
    assert done.returncode == 0, done.stderr
    assert all(word in done.stdout for word in ("OA", "AA", "kappa", "coordinates-only", "hash"))
    done = run("split", "cube.npy", "--labels", "labels.npy", "--seed", 4, "--out", "split.json", cwd=files)
    assert done.returncode == 0 and "holds training pixel: 0.0000" in done.stdout, done.stdout + done.stderr
    done = run("fit", "cube.npy", "--labels", "labels.npy", "--split", "split.json", "--set", "d_model=16", "--set", "depth=1", "--epochs", 1,
               "--out", "run2", cwd=files)
    assert done.returncode == 0, done.stderr
    assert (files/"run2"/"split.json").read_text() == (files/"split.json").read_text()
    for name in ("map.png", "map.npy"):
        done = run("map", fitted, "--out", files/name)
        assert done.returncode == 0, done.stderr
        assert (files/name).is_file()
    assert np.load(files/"map.npy").shape == (48, 48)
    done = run("fit", "cube.npy", "--labels", "labels.npy", "--out", fitted, "--resume", cwd=files)
    assert done.returncode == 2 and "finished" in done.stderr


def test_every_kind_of_file_gives_the_same_scene(files):
    import h5py
    import rasterio
    from hsi_mamba_nb.scene import read_scene
    want = np.load(files/"cube.npy")
    with h5py.File(files/"v73.mat", "w", userblock_size=512) as f:
        f.create_dataset("cube", data=want.T, compression="gzip").attrs["MATLAB_class"] = np.bytes_("single")
    with rasterio.open(files/"cube.tif", "w", driver="GTiff", height=48, width=48, count=16, dtype=want.dtype, crs="EPSG:32633",
                       transform=rasterio.Affine(9, 0, 4e5, 0, -9, 5e6)) as f:
        f.write(want.transpose(2, 0, 1))
    np.savez(files/"all.npz", cube=want, gt=np.load(files/"labels.npy"))
    for name, options in {"envi.dat": {}, "envi.hdr": {}, "v73.mat": {}, "cube.tif": {}, "all.npz": dict(labels_key="gt"), "matrix.mat": dict(shape=(48, 48))}.items():
        got = read_scene(files/name, **({} if options.get("labels_key") else dict(labels=files/"labels.npy")), **options)
        assert (np.asarray(got.cube) == want).all() and (got.labels == np.load(files/"labels.npy")).all(), name


def test_bands_left_out_are_left_out_again_on_the_map(files):
    done = run("fit", "dead.npy", "--labels", "labels.npy", "--drop-bands", "dead", "--set", "d_model=16", "--set", "depth=1", "--epochs", 1, "--out", "run3", cwd=files)
    assert done.returncode == 0 and "note: bands left out: 5, 10" in done.stdout, done.stdout + done.stderr
    done = run("map", "run3", "--out", "run3.npy", cwd=files)
    assert done.returncode == 0 and np.load(files/"run3.npy").shape == (48, 48), done.stderr


def test_a_corner_without_data_is_no_class(files):
    cube = np.load(files/"cube.npy").astype(np.float32)
    cube[:10, :10] = -9999
    np.save(files/"corner.npy", cube)
    how = ("--labels", "labels.npy", "--nodata", "-9999")
    done = run("fit", "corner.npy", *how, "--set", "d_model=16", "--set", "depth=1", "--epochs", 1, "--out", "run4", cwd=files)
    assert done.returncode == 0 and "hold no data" in done.stdout, done.stdout + done.stderr
    for command in (["evaluate", "run4"], ["map", "run4", "--out", "corner_map.npy"]):
        assert run(*command, cwd=files).returncode == 0
    got = np.load(files/"corner_map.npy")
    assert (got[:10, :10] == 0).all() and (got > 0).sum() == 48*48 - 100


def test_files_without_rasterio(files, monkeypatch):
    "ENVI is read, and says what is missing; GeoTIFF is refused with the line that helps."
    import rasterio  # noqa: F401  (so that it is in sys.modules)
    (files/"placed.dat").write_bytes((files/"envi.dat").read_bytes())
    (files/"placed.hdr").write_text((files/"envi.hdr").read_text() + "map info = {UTM, 1, 1, 4e5, 5e6, 9, 9, 33, North, WGS-84}\n")
    (files/"some.tif").write_bytes(b"II*\0" + bytes(100))
    for name in [m for m in sys.modules if m.split(".")[0] == "rasterio"] + ["rasterio"]:
        monkeypatch.setitem(sys.modules, name, None)
    done = run("split", "placed.dat", "--labels", "labels.npy", cwd=files)
    assert done.returncode == 0 and 'pip install "hsi-mamba-nb[geo]"' in done.stdout, done.stdout + done.stderr
    done = run("split", "some.tif", "--labels", "labels.npy", cwd=files)
    assert done.returncode == 2 and 'pip install "hsi-mamba-nb[geo]"' in done.stderr


def test_scenes_doctor_and_help():
    assert "salinas-a" in run("scenes").stdout
    done = run("doctor")
    assert done.returncode == 0 and "torch" in done.stdout and "WRONG" not in done.stdout
    for command in ([], ["fit"], ["fetch"], ["split"], ["evaluate"], ["map"], ["demo"]):
        done = run(*command, "--help")
        assert done.returncode == 0 and "usage" in done.stdout


def test_exit_code_and_stderr_of_the_installed_command(files):
    done = subprocess.run([sys.executable, "-m", "hsi_mamba_nb", "fit", "none.npy", "--out", "x"], capture_output=True, text=True, cwd=files, timeout=900)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("hsi-mamba: error: none.npy") and done.stderr.count("\n") == 1


def test_demo_from_an_empty_folder(tmp_path):
    done = run("demo", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "picture.png" in done.stdout and (tmp_path/"hsi-mamba-demo"/"picture.png").stat().st_size > 10_000
    assert "coordinates only" in done.stdout
    (tmp_path/"mine").mkdir()
    (tmp_path/"mine"/"thesis.txt").write_text("precious")
    done = run("demo", "--out", "mine", cwd=tmp_path)
    assert done.returncode == 2 and "--overwrite" in done.stderr
