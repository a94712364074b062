"""A run killed with SIGKILL at a random moment and resumed ends in the same weights, bit for bit."""
import os
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from safetensors.numpy import load_file

EPOCHS = 6


@pytest.fixture(scope="module")
def scene_files(tmp_path_factory):
    from hsi_mamba_nb.scene import synthetic_scene
    folder = tmp_path_factory.mktemp("scene")
    scene = synthetic_scene(h=48, w=48, bands=16, classes=3, seed=1)
    np.save(folder/"cube.npy", scene.cube)
    np.save(folder/"labels.npy", scene.labels)
    return folder


def fit(folder, out, *extra, **options):
    return subprocess.Popen(
        [sys.executable, "-m", "hsi_mamba_nb", "fit", folder/"cube.npy", "--labels", folder/"labels.npy", "--set", "d_model=16", "--set", "depth=1",
         "--epochs", str(EPOCHS), "--batch-size", "16", "--seed", "3", "--cpu", "--out", out, *extra],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


def finish(process):
    out, err = process.communicate(timeout=900)
    assert process.returncode == 0, err
    return out


def test_killed_and_resumed_equals_uninterrupted(scene_files, tmp_path):
    finish(fit(scene_files, tmp_path/"whole"))
    chance = random.Random(os.urandom(8))
    for attempt in range(20):  # until a kill has landed while training was under way
        out = tmp_path/f"killed{attempt}"
        process = fit(scene_files, out)
        while not (out/"state.safetensors").is_file() and process.poll() is None:
            time.sleep(.005)
        time.sleep(chance.uniform(0, .3))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        if (out/"state.safetensors").is_file() and not (out/"card.json").exists():
            break
    else:
        pytest.fail("no kill landed between the first epoch and the end")
    assert not list(out.glob("model.safetensors")), "weights of an unfinished run lie under the final name"
    finish(fit(scene_files, out, "--resume"))
    whole, resumed = (load_file(f/"model.safetensors") for f in (tmp_path/"whole", out))
    assert whole.keys() == resumed.keys()
    for name in whole:
        assert whole[name].tobytes() == resumed[name].tobytes(), f"{name} differs after the resume"
    assert not (out/"state.safetensors").exists()


def test_killed_before_the_first_epoch(scene_files, tmp_path):
    process = fit(scene_files, tmp_path/"early")
    time.sleep(.2)
    process.kill()
    process.communicate()
    finish(fit(scene_files, tmp_path/"early", "--resume"))
    assert (tmp_path/"early"/"card.json").is_file()
