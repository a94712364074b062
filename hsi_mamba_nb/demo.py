"""The whole way on a synthetic scene: what `hsi-mamba demo` runs."""
import json
import time
from pathlib import Path

from hsi_mamba_nb.errors import InputError

__all__ = ["run_demo"]

MODEL = dict(patch=5, d_model=32, depth=1)  # small enough for two trainings in half a minute on 2 cores
EPOCHS = 20


def _train(scene, split, seed, out):
    import torch
    from hsi_mamba_nb.learn.training import fit
    from hsi_mamba_nb.models.registry import create_model
    torch.manual_seed(seed)
    model = create_model("ssa-mamba", scene.bands, scene.classes, **MODEL)
    return fit(model, scene, split, epochs=EPOCHS, patience=EPOCHS, batch_size=32, lr=3e-3, seed=seed, out=out, overwrite=True, cpu=True)


def run_demo(
    out: Path,  # folder to write
    seed: int = 0,
    overwrite: bool = False,  # replace a folder that is not an earlier demo
) -> dict:  # split name -> {who: overall accuracy}
    "Train one small model under a block and a random split, score both beside coordinates alone, draw the map."
    if out.is_dir() and any(out.iterdir()) and not overwrite and not (out/"demo.json").is_file():
        raise InputError(f"{out}: exists and is no earlier demo; use --overwrite or another --out")
    from hsi_mamba_nb.files import write_file
    from hsi_mamba_nb.learn.map import predict_map
    from hsi_mamba_nb.learn.training import evaluate
    from hsi_mamba_nb.scene.registry import load_scene
    from hsi_mamba_nb.scene.split import coords_only_accuracy, split_blocks, split_random
    from hsi_mamba_nb.viz import save_figure, thread_picture
    start = time.perf_counter()
    scene = load_scene("synthetic", seed=seed)
    print(scene)
    write_file(out/"demo.json", "{}\n")  # from here on the folder is known as a demo's
    table, runs, scores = {}, {}, {}
    blocks = split_blocks(scene, seed=seed)
    share = len(blocks.train)/(scene.labels > 0).sum()  # as many training pixels, so that only their place differs
    for name, split in (("blocks", blocks), ("random", split_random(scene, train=share, seed=seed))):
        print(split, split.note, sep="\n" if split.note else "")
        run = runs[name] = _train(scene, split, seed, out/name)
        scores[name] = evaluate(run, scene)
        table[f"{name} split"] = {"ssa-mamba": scores[name].oa, "coordinates only": coords_only_accuracy(scene, split)}
    print(scores["blocks"].table(), "", sep="\n")
    print(f"{'overall accuracy on test pixels':<34}{'ssa-mamba':>12}{'coordinates only':>20}")
    for name, row in table.items():
        print(f"{name + ', seed ' + str(seed) + ', ' + str(len(runs[name.split()[0]].split.train)) + ' training pixels':<34}"
              f"{row['ssa-mamba']:>12.4f}{row['coordinates only']:>20.4f}")
    print("Coordinates alone never see a spectrum: where they score high, so does anything, and the score says little.")
    picture = save_figure(thread_picture(scene, runs["blocks"], predict_map(runs["blocks"], scene, progress=False), table), out/"picture.png")
    facts = dict(seed=seed, model=dict(name="ssa-mamba", **MODEL), epochs=EPOCHS, overall_accuracy=table,
                 splits={k: r.split.hash for k, r in runs.items()}, seconds=round(time.perf_counter() - start, 1))
    write_file(out/"demo.json", json.dumps(facts, indent=1) + "\n")
    print(f"done in {facts['seconds']:.0f} s; written:")
    for path in (picture, out/"demo.json", out/"blocks", out/"random"):
        print(f"  {path}" + ("  <- look at this" if path == picture else ""))
    return table
