"""The command line: hsi-mamba demo | scenes | fetch | split | fit | evaluate | map | compare | bench | doctor."""
import argparse
import json
import sys
from pathlib import Path

from hsi_mamba_nb import __version__
from hsi_mamba_nb.errors import InputError

__all__ = ["main"]


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def _scene(args):
    "The scene an argument names: a file where there is one, else a name."
    from hsi_mamba_nb.scene.formats import read_scene
    from hsi_mamba_nb.scene.registry import list_scenes, load_scene
    path, masks = Path(args.scene), getattr(args, "masks", None)
    options = {k: v for k, v in dict(labels=masks, drop_bands=args.drop_bands, nodata=args.nodata).items() if v is not None}
    if path.suffix or path.is_file() or path.exists() and args.scene not in [c.name for c in list_scenes()]:
        scene = read_scene(path, **dict(labels=args.labels) | options, key=args.key, labels_key=args.labels_key, shape=args.shape and tuple(args.shape), purity=args.purity)
    elif args.labels or args.key or args.labels_key or args.shape or args.purity:
        raise InputError(f"{args.scene}: no such file, and a scene by name knows its own files; drop --labels and what describes a file, or correct the path")
    else:
        scene = load_scene(args.scene, **options)
    for note in scene.notes:
        print(f"note: {note}")
    return scene


def _split(args, scene):
    "The split an argument names: a strategy, a pair of masks, or a file written by `hsi-mamba split`."
    from hsi_mamba_nb.scene import split as s
    for option, default in SPLIT.items():
        if getattr(args, option) is None:
            setattr(args, option, default)
    if args.masks:
        import numpy as np
        from hsi_mamba_nb.scene.formats import read_labels
        if args.labels:
            raise InputError(f"--labels {args.labels}: with --masks the two masks are the labels; drop one of the two options")
        pair = [np.where(scene.labels > 0, read_labels(f), 0) for f in args.masks]  # pixels without data have lost their label
        return s.split_published(*pair, seed=args.seed, min_per_class=args.min_per_class, name=" and ".join(args.masks))[0]
    how = args.split or "blocks"
    if how.endswith(".json"):
        return s.load_split(how)
    if scene.labels is None:
        raise InputError(f"{args.scene}: has no labels; give the label map with --labels")
    make = {"blocks": lambda: s.split_blocks(scene, buffer=args.buffer, block=args.block, min_per_class=args.min_per_class, seed=args.seed),
            "random": lambda: s.split_random(scene, min_per_class=args.min_per_class, seed=args.seed),
            "per-class": lambda: s.split_per_class(scene, train=args.per_class, min_per_class=args.min_per_class, seed=args.seed),
            "halves": lambda: s.split_halves(scene, buffer=args.buffer, min_per_class=args.min_per_class, seed=args.seed)}
    if how not in make:
        raise InputError(f"--split {how}: not one of {', '.join(make)}, nor a .json file")
    return make[how]()


SPLIT = dict(buffer=4, block=6, per_class=30, min_per_class=5)  # filled in late, so that what was given can be told


def _value(text):
    "A model option from the command line: JSON where it parses, else a word."
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def demo(args):
    from hsi_mamba_nb.demo import run_demo
    run_demo(Path(args.out), args.seed, args.overwrite)


def scenes(args):
    from hsi_mamba_nb.scene.registry import data_folder, list_scenes, missing
    print(f"data folder: {data_folder()} (set HSI_DATA to change it)")
    for c in list_scenes():
        gone = missing(c)
        state = "generated" if c.files is None else "found" if not gone else "missing" if len(gone) == len(c.files) else f"{len(gone)} of {len(c.files)} missing"
        about = [f"{c.classes} classes" if c.classes else "", c.sensor, c.title]
        last = [c.note]
        if gone:
            last = [f"get it: hsi-mamba fetch {c.name}" if c.fetchable else f"get it: {c.where}; put it in {c.folder.name}/"] + last
        print(f"{c.name:<15} {state:<15} {c.size:<17} {', '.join(filter(None, about))}\n{'':<15} licence: {c.licence}")
        if any(last):
            print(f"{'':<15} {'; '.join(filter(None, last))}")


def fetch(args):
    from hsi_mamba_nb.scene.registry import fetch_scene, get_card
    card = get_card(args.name)
    print(f"{card.name}: {card.title}, {card.size}\nlicence: {card.licence}" + (f"\n{card.note}" if card.note else ""), flush=True)
    try:
        paths = fetch_scene(card.name, overwrite=args.overwrite)
    except KeyboardInterrupt:
        print(f"stopped; `hsi-mamba fetch {card.name}` goes on where it stopped", file=sys.stderr)
        raise
    for path, file in zip(paths, card.files.values()):
        print(f"{path}  {path.stat().st_size:,} bytes, {'checksum as published' if file.sha1 else 'array as expected' if file.mirrors else 'found, not checked'}")
    print(f"next: hsi-mamba split {card.name}")


def split(args):
    from hsi_mamba_nb.scene import split as s
    if args.figure and Path(args.figure).suffix.lower() not in (".png", ".svg", ".pdf"):  # before the work, not after it
        raise InputError(f"{args.figure}: a figure is written as .png, .svg or .pdf; choose one of these endings")
    scene = _scene(args)
    made = _split(args, scene)
    print(scene, made, sep="\n")
    if made.note:
        print(made.note)
    print(s.counts_table(made, scene))
    for k, v in s.leakage_report(made, args.patch, scene).items():
        if isinstance(v, dict):
            v = "  ".join(f"{at}: {n:,}" for at, n in v.items())
        print(f"{k.replace('_', ' ')}: {f'{v:.4f}' if isinstance(v, float) else 'none on this map' if v is None else v}")
    if args.ladder:
        print(s.ladder_table(s.split_ladder(scene, args.patch, range(args.seed, args.seed + 3))))
    if args.figure:
        import matplotlib.pyplot as plt
        from hsi_mamba_nb.start.notation import style
        from hsi_mamba_nb.viz import save_figure
        style()
        fig, ax = plt.subplots(1, 2, figsize=(11, 4.4), width_ratios=(1, 1.3))
        s.show_split(made, ax[0])
        s.show_leakage(made, args.patch, ax[1])
        print(f"wrote {save_figure(fig, args.figure)}")
    if args.out:
        print(f"wrote {s.save_split(made, args.out)}")


def fit(args):
    import torch
    from hsi_mamba_nb.learn.training import fit as train
    from hsi_mamba_nb.models.registry import create_model
    teacher, lesson = _teacher(args)
    scene = _scene(args)
    made = teacher.split if teacher and not (args.split or args.masks) else _split(args, scene)
    options = {}
    for item in args.set:
        key, sep, value = item.partition("=")
        if not sep:
            raise InputError(f"--set {item}: write option=value, e.g. --set d_model=128")
        options[key] = _value(value)
    torch.manual_seed(args.seed)
    model = create_model(args.model, scene.bands, scene.classes, **options)
    print(scene, made, sep="\n")
    if made.note:
        print(made.note)
    if teacher:
        from hsi_mamba_nb.learn.distill import Lesson
        lesson = dict(lesson=Lesson(teacher, model, scene, made, **lesson))
        print(f"taught by {teacher.model.name} in {args.teacher}")
    run = train(model, scene, made, **lesson, epochs=args.epochs, batch_size=args.batch_size, lr=args.lr, patience=args.patience, seed=args.seed,
                out=args.out, resume=args.resume, overwrite=args.overwrite, cpu=args.cpu, precision=args.precision)
    best = max(row["val_oa"] for row in run.history)
    print(f"{len(run.history)} epochs, best validation OA {best:.4f}\nwrote {args.out}; next: hsi-mamba evaluate {args.out}")


LESSON = dict(temperature=dict(type=float, metavar="T", help="above 0; the higher, the more of the teacher's second thoughts are heard (default: 4)"),
              schedule=dict(metavar="NAME", help="how the teacher's weight changes: warmup, linear, cap, constant, down (default: cap)"),
              warmup=dict(type=float, metavar="SHARE", help="share of the training until the teacher's weight is full, 0 to 1 (default: 0.25); the learning rate has a warm-up of its own"),
              cap=dict(type=float, metavar="WEIGHT", help="the teacher's largest weight in cap, constant and down, 0 to 1 (default: 0.9)"),
              adaptive=dict(action="store_true", default=None, help="trust the teacher where it is right"),
              features=dict(type=float, metavar="WEIGHT", help="also compare what goes into the two classifiers, with this weight (default: 0); the term is of the order 1/pixels of a batch, so hundreds to thousands are usual"),
              calibrated=dict(action="store_true", default=None, help="first make the teacher's probabilities honest on its validation pixels"))


def _teacher(args):
    "The run that teaches, or None, and the options of its lesson that were given."
    from hsi_mamba_nb.learn.checkpoint import load
    given = {k: v for k in LESSON if (v := getattr(args, k)) is not None}
    if not args.teacher:
        return (None, {}) if not given else _wrong(f"--{next(iter(given))}: says how a teacher is heard; name one with --teacher RUN")
    from hsi_mamba_nb.learn.distill import lesson_options
    from hsi_mamba_nb.learn.training import _check_folder
    lesson_options(**given)
    if extra := [k for k in SPLIT if getattr(args, k) is not None and not (args.split or args.masks)]:
        raise InputError(f"--{extra[0].replace('_', '-')}: the split is the teacher's; add --split to make a new one")
    if Path(args.out).resolve() == Path(args.teacher).resolve():
        raise InputError(f"--out {args.out}: is the teacher's folder; choose another")
    _check_folder(Path(args.out), args.resume, args.overwrite)  # before the teacher is asked, not after it
    return load(args.teacher), given


def _run_and_scene(args):
    "A finished run and the scene to use it on: the one it was trained on unless another is given."
    from hsi_mamba_nb.learn.checkpoint import load
    from hsi_mamba_nb.scene.registry import open_again
    run = load(args.run)
    return run, _scene(args) if args.scene else open_again(run.scene.get("origin"))


def evaluate(args):
    from hsi_mamba_nb.learn.training import evaluate as score
    from hsi_mamba_nb.scene.split import coords_only_accuracy
    run, scene = _run_and_scene(args)
    scores = score(run, scene, part=args.part)
    print(f"{run.model.name} on {args.part} pixels of {scene.name}; {run.split}")
    if run.split.note:
        print(run.split.note)
    print(scores.table())
    print(f"coordinates-only baseline (1-nearest neighbour on row and column): OA {coords_only_accuracy(scene, run.split, args.part):.4f}")


def map_(args):
    from hsi_mamba_nb.learn.map import MAP_SUFFIXES, predict_map, save_map
    if Path(args.out).suffix.lower() not in MAP_SUFFIXES:  # before the work, not after it
        raise InputError(f"{args.out}: a map is written as {', '.join(MAP_SUFFIXES)}; choose one of these endings")
    run, scene = _run_and_scene(args)
    if Path(args.out).suffix.lower() == ".tif" and not scene.transform:
        print(f"note: {scene.name} has no place on the ground, nor will the GeoTIFF")
    print(f"wrote {save_map(predict_map(run, scene), args.out)}")


def compare(args):
    import os
    from hsi_mamba_nb.learn import protocol as p
    if args.figure and Path(args.figure).suffix.lower() not in (".png", ".svg", ".pdf"):
        raise InputError(f"--figure {args.figure}: a figure is written as .png, .svg or .pdf; choose one of these endings")
    number = lambda text: None if text == "all" else int(text) if text.isdecimal() else _wrong(f"--labels {text}: numbers of pixels a class, or all")
    models, scenes, splits, labels = (_words(v) for v in (args.models, args.scenes, args.split, args.labels))
    labels = [number(t) for t in labels]
    rows = p.compare(models, scenes, splits, args.seeds, inits=args.inits, labels=labels, budget=args.budget, out=args.out)
    if os.environ.get("RANK", "0") != "0":
        return
    print(p.board_table(rows, args.per_class))
    if missing := len(set(models))*len(set(scenes))*len(set(splits))*len(set(labels))*args.seeds*args.inits - len(rows):
        print(f"{missing} runs of other processes are not done yet; run the command again to see them")
    if args.figure:
        from hsi_mamba_nb.viz import save_figure
        print(f"wrote {save_figure(p.show_board(rows), args.figure)}")


def _words(text):
    return [w.strip() for w in text.split(",") if w.strip()] or _wrong(f"{text!r}: name at least one")


def _wrong(message):
    raise InputError(message)


def bench(args):
    from hsi_mamba_nb import bench as b
    if args.json and Path(args.json).is_dir():  # before the work, not after it
        raise InputError(f"{args.json}: is a folder; name a file in it")
    measure, show = {"scan": (b.bench_scan, b.table), "block": (b.bench_block, b.table_block), "map": (b.bench_map, b.table_map),
                     "models": (b.bench_models, b.table_models), "clusters": (b.bench_clusters, b.table_clusters),
                     "experts": (b.bench_experts, b.table_experts), "students": (b.bench_students, b.table_students)}[args.what]
    result = measure(args.quick, **{} if args.what == "map" else dict(repeats=args.repeats), **dict(device=args.device) if args.what in ("scan", "block", "experts") else {})
    print(show(result))
    if args.json:
        print(f"wrote {b.save(result, args.json)}")


def doctor(args):
    from hsi_mamba_nb.doctor import report
    print(report())


def _add_scene(p, optional=False):
    what = "a cube file (.mat, ENVI, GeoTIFF, .npy, .npz) or a scene's name"
    if optional:
        p.add_argument("--scene", metavar="SCENE", help=f"{what}; default: the one the run was trained on")
    else:
        p.add_argument("scene", metavar="SCENE", help=f"{what}, see `hsi-mamba scenes`")
    g = p.add_argument_group("about the file")
    g.add_argument("--labels", metavar="FILE", help="the label map of a cube file; 0 = unlabelled")
    g.add_argument("--key", help="name of the cube inside the file, where several fit")
    g.add_argument("--labels-key", help="name of the label map inside its file; without --labels, inside the cube's")
    g.add_argument("--shape", nargs=2, type=int, metavar=("ROWS", "COLUMNS"), help="of a matrix of bands x pixels, pixels down the columns")
    g.add_argument("--purity", type=float, help="the labels are abundances: the share from which a pixel counts as pure, e.g. 0.8")
    g.add_argument("--drop-bands", metavar="LIST", help="bands to leave out, counted from 1, like 1-3,12; or dead: those that are constant or empty")
    g.add_argument("--nodata", type=float, metavar="VALUE", help="value of pixels without data, e.g. -9999 (default: what the file's header says)")


def _add_split(p):
    how = p.add_mutually_exclusive_group()
    how.add_argument("--split", metavar="blocks|halves|random|per-class|FILE.json",
                     help="how pixels are dealt to train, val and test (default: blocks)")
    how.add_argument("--masks", nargs=2, metavar=("TRAIN", "TEST"), help="a published pair of label maps instead: their numbers are the labels, their pixels the parts")
    p.add_argument("--seed", type=int, default=0, help="of the split and of training (default: 0)")
    p.add_argument("--buffer", type=int, help="blocks and halves: pixels kept free between parts, at least the patch radius (default: 4)")
    p.add_argument("--block", type=int, help="blocks: side of a block in pixels (default: 6)")
    p.add_argument("--per-class", type=int, help="per-class: training pixels a class (default: 30)")
    p.add_argument("--min-per-class", type=int, help="pixels each class must have in each part (default: 5)")


def _parser():
    from hsi_mamba_nb.models.registry import list_models
    p = _Parser(prog="hsi-mamba", description="State-space models for hyperspectral images: one scene in, one honest map out.")
    p.add_argument("--version", action="version", version=f"hsi-mamba-nb {__version__}")
    sub = p.add_subparsers(title="commands", metavar="COMMAND", required=True, parser_class=_Parser)

    def command(name, run, text):
        c = sub.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".", formatter_class=argparse.HelpFormatter)
        c.set_defaults(run_command=run)
        return c

    c = command("demo", demo, "the whole way on a synthetic scene, no file needed")
    c.add_argument("--out", default="hsi-mamba-demo", help="folder to write (default: hsi-mamba-demo)")
    c.add_argument("--seed", type=int, default=0)
    c.add_argument("--overwrite", action="store_true", help="replace a folder that is not an earlier demo")

    command("scenes", scenes, "the scenes known by name, and which are on this machine")

    c = command("fetch", fetch, "download a scene, checked")
    c.add_argument("name", metavar="NAME", help="a scene's name, see `hsi-mamba scenes`")
    c.add_argument("--overwrite", action="store_true", help="replace a file that is here and not what it should be")

    c = command("split", split, "deal a scene's labelled pixels to train, val and test, and say what leaks")
    _add_scene(c)
    _add_split(c)
    c.add_argument("--patch", type=int, default=9, help="patch side for the leakage report (default: 9)")
    c.add_argument("--ladder", action="store_true", help="also compare six ways to split this scene: what leaks, and what position alone scores")
    c.add_argument("--figure", metavar="FILE.png", help="draw the split, and how far test pixels are from training")
    c.add_argument("--out", metavar="FILE.json", help="write the split")

    c = command("fit", fit, "train a model on a scene")
    _add_scene(c)
    _add_split(c)
    c.add_argument("--model", default="ssa-mamba", metavar="NAME", help=f"one of: {', '.join(list_models())} (default: ssa-mamba)")
    c.add_argument("--set", action="append", default=[], metavar="OPTION=VALUE", help="an option of the model, e.g. --set d_model=128; may be repeated")
    c.add_argument("--epochs", type=int, default=30)
    c.add_argument("--batch-size", type=int, default=64)
    c.add_argument("--lr", type=float, default=1e-3, help="highest learning rate (default: 0.001)")
    c.add_argument("--patience", type=int, default=10, help="epochs without a better validation score before stopping (default: 10)")
    c.add_argument("--out", required=True, metavar="FOLDER", help="run folder to write")
    c.add_argument("--resume", action="store_true", help="continue a run that was interrupted")
    c.add_argument("--overwrite", action="store_true", help="replace an existing run")
    c.add_argument("--cpu", action="store_true", help="do not use a GPU")
    c.add_argument("--precision", choices=("no", "bf16", "fp16"), default="no", help="mixed precision on a GPU (default: no)")
    g = c.add_argument_group("learning from a teacher")
    g.add_argument("--teacher", metavar="RUN", help="a folder that `fit` wrote: the model also learns what that one says; without --split or --masks, on the teacher's split")
    for name, how in LESSON.items():
        g.add_argument(f"--{name}", **how)

    c = command("evaluate", evaluate, "score a run: OA, AA, kappa, per class, beside the coordinates-only baseline")
    c.add_argument("run", metavar="RUN", help="a folder that `fit` wrote")
    c.add_argument("--part", choices=("train", "val", "test"), default="test")
    _add_scene(c, optional=True)

    c = command("map", map_, "classify every pixel and draw the map")
    c.add_argument("run", metavar="RUN", help="a folder that `fit` wrote")
    c.add_argument("--out", required=True, metavar="FILE", help=".png (map with legend), .tif (GeoTIFF, on the ground) or .npy (class numbers)")
    _add_scene(c, optional=True)

    c = command("compare", compare, "train and test models on identical pixels under one budget; one row a run, continued where it stopped")
    c.add_argument("--models", required=True, metavar="A,B", help=f"some of: {', '.join(list_models())}; with options: ssa-mamba:patch=5:depth=1; taught by another: cnn-1d@ssa-mamba:patch=5@temperature=2")
    c.add_argument("--scenes", required=True, metavar="A,B", help="names, see `hsi-mamba scenes`; also hard-few and hard-space, synthetic scenes with known best accuracy")
    c.add_argument("--split", default="blocks", metavar="A,B", help="blocks, halves, random, per-class (default: blocks)")
    c.add_argument("--labels", default="all", metavar="N,all", help="training pixels a class, and as many to choose the epoch on (default: all of the split's)")
    c.add_argument("--seeds", type=int, default=3, help="splits, each with first weights of its own (default: 3)")
    c.add_argument("--inits", type=int, default=1, help="first weights on each split (default: 1)")
    c.add_argument("--budget", default="default", help="default: 60 s of one processor or 600 steps a run; tiny: 3 s or 20; paper: 20,000 steps, no clock; or a number of steps")
    c.add_argument("--per-class", action="store_true", help="also the accuracy of each class")
    c.add_argument("--out", metavar="FILE.jsonl", help="file of rows; runs that are there are not repeated")
    c.add_argument("--figure", metavar="FILE.png", help="draw the board")

    c = command("bench", bench, "time scans, blocks and training steps beside others' in one run")
    c.add_argument("what", choices=("scan", "block", "models", "clusters", "experts", "students", "map"), help="scan: every backend, a loop and mambapy; block: ours and mambapy's with the same weights; models: SSA-Mamba's training step with and without its state space; clusters: CSSMamba's with and without clusters; experts: a routed layer, the two experts that are asked beside all four; students: teachers and students, a pixel and a scene; map: a scene of 3 GB on the disk")
    c.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="what to time on (default: cpu); on a GPU mamba_ssm is timed too, where installed")
    c.add_argument("--json", metavar="FILE", help="also write the numbers")
    c.add_argument("--repeats", type=int, default=3, help="rounds, of which the median counts (default: 3)")
    c.add_argument("--quick", action="store_true", help="two small shapes, to see that it runs")

    command("doctor", doctor, "what is installed, what works here, and what to do about the rest")
    return p


def main(argv=None):
    "Run a command; 0 when done, 2 with one line on stderr when something the user can mend stood in the way."
    args = _parser().parse_args(argv)
    try:
        args.run_command(args)
    except (InputError, FloatingPointError) as e:
        print(f"hsi-mamba: error: {' '.join(str(e).split())}", file=sys.stderr)
        return 2
    except MemoryError:
        print("hsi-mamba: error: not enough memory; save the cube as ENVI or .npy, which are read piece by piece, or use a smaller --batch-size", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("hsi-mamba: stopped" + ("; continue with --resume" if getattr(args, "resume", None) is not None else ""), file=sys.stderr)
        return 130
    except BrokenPipeError:
        return 0
    return 0


if __name__ == "__main__":
    sys.exit(main())
