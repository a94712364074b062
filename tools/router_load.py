"""Which experts MambaMoE asks on each scene of the board, trained and not: python tools/router_load.py results/load-moe.jsonl

One row a scene, variant and seed; rows that are there are not repeated. Needs the scenes (`hsi-mamba scenes`); about 25 s of one processor a row.
"""
import sys

import torch
from tqdm.auto import tqdm

from hsi_mamba_nb.files import append_row, read_rows
from hsi_mamba_nb.learn.protocol import board_scene, few_labels
from hsi_mamba_nb.learn.training import fit
from hsi_mamba_nb.models.registry import create_model
from hsi_mamba_nb.parts.experts import expert_load
from hsi_mamba_nb.scene.split import coords_only_accuracy, split_blocks

SCENES, LABELS, STEPS = ("berlin", "salinas-a", "samson", "hard-few", "hard-space"), 5, 150


def loads(model, x) -> list:  # (3,E), finest first
    "Share of the choices of each expert at each of the three sizes, over a whole scene."
    with torch.no_grad():
        return [[round(float(v), 4) for v in expert_load(g.movedim(1, -1).flatten(0, -2))] for g in model.eval().routes(x)]


def row(name: str, variant: str, seed: int) -> dict:
    "Train on few labels of a block split, and count choices before and after."
    scene = board_scene(name)
    split = few_labels(split_blocks(scene, seed=seed), scene.labels, LABELS, seed)
    torch.manual_seed(1000*seed)
    model = create_model("mamba-moe", scene.bands, scene.classes, variant=variant)
    fresh = {k: v.clone() for k, v in model.state_dict().items()}
    run = fit(model, scene, split, steps=STEPS, epoch_steps=25, patience=10**6, seed=0, cpu=True, progress=False)
    x = torch.from_numpy(run.scale(scene.cube)).permute(2, 0, 1)[None]
    after = loads(model, x)
    model.load_state_dict(fresh)
    before = loads(model, x)
    return dict(scene=name, variant=variant, seed=seed, load=after, load_untrained=before, val_oa=max(r["val_oa"] for r in run.history), split="blocks", buffer=split.buffer,
                hash=split.hash, labels=LABELS, steps=STEPS, coords_only=coords_only_accuracy(scene, split))


def main(out: str) -> None:
    torch.set_num_threads(1)
    done = {(r["scene"], r["variant"], r["seed"]) for r in read_rows(out)}
    jobs = [(s, v, seed) for s in SCENES for v in ("fixed", "paper") for seed in range(3)]
    for job in tqdm([j for j in jobs if j not in done], unit="run"):
        append_row(out, row(*job))


if __name__ == "__main__":
    main(sys.argv[1])
