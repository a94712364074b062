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
    (["fit", "broken.npy", "--labels", "labels.npy", "--out", "x"], "broken.npy", "not a readable"),
    (["fit", "empty.mat", "--labels", "labels.npy", "--out", "x"], "empty.mat", ""),
    (["fit", "text.mat", "--labels", "labels.npy", "--out", "x"], "text.mat", ""),
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
    (["split", "cube.npy"], "cube.npy", "--labels"),
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


def test_scenes_doctor_and_help():
    assert "salinas-a" in run("scenes").stdout
    done = run("doctor")
    assert done.returncode == 0 and "torch" in done.stdout and "WRONG" not in done.stdout
    for command in ([], ["fit"], ["split"], ["evaluate"], ["map"], ["demo"]):
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
