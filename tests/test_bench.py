"""Every bench runs on small sizes; its numbers are for people and are asserted nowhere."""
import json

import pytest
from test_cli import run


@pytest.mark.parametrize("what, word", [("block", "x mambapy"), ("models", "without its state space"), ("experts", "share of the cost"), ("students", "scene x teacher"), ("clusters", "x no clusters"), ("map", "strips of 17 rows give the same classes")])
def test_bench(what, word, tmp_path):
    done = run("bench", what, "--quick", "--repeats", 1, "--json", "b.json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert word in done.stdout and json.loads((tmp_path/"b.json").read_text())["command"].startswith(f"hsi-mamba bench {what} --quick")


def test_a_gpu_that_is_not_there(tmp_path):
    import torch
    if torch.cuda.is_available(): pytest.skip("there is one")
    done = run("bench", "scan", "--device", "cuda", cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "torch sees no GPU" in done.stderr
