"""Every reader against broken files: python tests/fuzz.py [--inputs 20000] [--seed 0] [--data FOLDER]

A reader may return something or raise `InputError`, in one line; nothing else, and not slowly, and not in much memory.
What breaks the rule is kept under its seed, so that `--seed S --only N` shows it again."""
import argparse
import io
import json
import re
import resource
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path

import h5py
import numpy as np
import rasterio
from scipy.io import savemat

from hsi_mamba_nb.errors import InputError
from hsi_mamba_nb.learn.checkpoint import load
from hsi_mamba_nb.scene.formats import read_file, read_labels, read_scene
from hsi_mamba_nb.scene.split import load_split, save_split, split_per_class

SECONDS, MEGABYTES = 20, 1500  # for one input, and for the whole process at its peak
WHOLE = ("salinas_a/SalinasA_gt.mat", "gt_maps/Indian_pines_gt.mat", "gt_maps/KSC_gt_v73.mat", "gt_maps/IndianTR123_temp123.tif", "berlin/berlin_hymap02_labels_9m.tif")


def small_run(folder):
    "A run folder as `fit` leaves it, of the smallest model."
    import torch
    from hsi_mamba_nb.learn.training import fit
    from hsi_mamba_nb.models.registry import create_model
    from hsi_mamba_nb.scene.synthetic import synthetic_scene
    scene = synthetic_scene(24, 24, bands=8, classes=3, seed=0)
    split = split_per_class(scene, train=6, val=3, min_per_class=3)
    torch.manual_seed(0)
    fit(create_model("ssa-mamba", 8, scene.classes, d_model=8, depth=1, patch=3), scene, split, epochs=1, out=folder, cpu=True, progress=False)
    return split


def made(folder):
    "Small files of every kind: (what, its files, the reader)."
    rng = np.random.default_rng(0)
    cube, y = rng.integers(0, 4000, (9, 7, 5)).astype(np.int16), rng.integers(0, 4, (9, 7)).astype(np.uint8)
    put = lambda name, data: (folder/name).write_bytes(data) and name
    np.save(folder/"cube.npy", cube)
    np.savez_compressed(folder/"cube.npz", cube=cube, gt=y)
    savemat(folder/"packed.mat", dict(cube=cube, gt=y, nRow=9, note="text", cells=np.array([1, "a"], object)), do_compression=True)
    savemat(folder/"plain.mat", dict(V=rng.random((5, 63)), nRow=9, nCol=7, S=dict(a=1)))
    savemat(folder/"four.mat", dict(gt=y.astype(float)), format="4")
    for name, how in (("v73.mat", dict(compression="gzip", chunks=True)), ("flat73.mat", {})):
        with h5py.File(folder/name, "w", userblock_size=512) as f:
            f.create_dataset("cube", data=cube.T, **how).attrs["MATLAB_class"] = np.bytes_("int16")
            f.create_dataset("gt", data=y.T, **how).attrs["MATLAB_class"] = np.bytes_("uint8")
            f.create_group("struct").create_dataset("x", data=[1, 2])
    for name, how in (("deflate.tif", dict(compress="deflate")), ("lzw.tif", dict(compress="lzw", predictor=2)), ("plain.tif", {})):
        with rasterio.open(folder/name, "w", driver="GTiff", height=9, width=7, count=5, dtype="int16", crs="EPSG:32633", nodata=-1,
                           transform=rasterio.Affine(9, 0, 4e5, 0, -9, 5e6), **how) as f:
            f.write(cube.transpose(2, 0, 1))
    header = ("ENVI\nsamples = 7\nlines = 9\nbands = 5\nheader offset = 0\ndata type = 2\ninterleave = bil\nbyte order = 0\nwavelength units = nm\n"
              "wavelength = {400, 500, 600, 700, 800}\nbbl = {1, 1, 0, 1, 1}\ndata ignore value = -1\nmap info = {UTM, 1, 1, 4e5, 5e6, 9, 9, 33, North, WGS-84}\n")
    put("pair.hdr", header.encode())
    put("pair.img", cube.transpose(0, 2, 1).tobytes())
    save_split(small_run(folder/"run"), folder/"split.json")
    yield from ((name, [name], read_scene) for name in ("cube.npy", "cube.npz", "packed.mat", "plain.mat", "v73.mat", "flat73.mat", "deflate.tif", "lzw.tif", "plain.tif"))
    yield "four.mat", ["four.mat"], read_labels
    yield "pair.img", ["pair.img", "pair.hdr"], read_scene
    yield "pair.hdr", ["pair.hdr", "pair.img"], read_scene
    yield "split.json", ["split.json"], load_split
    yield "run", sorted(p.relative_to(folder).as_posix() for p in (folder/"run").iterdir()), load


def break_text(text, rng):
    "A number in a text file becomes a silly one."
    found = list(re.finditer(rb"-?\d+(\.\d+)?", text))
    m = found[rng.integers(len(found))] if found else None
    silly = [b"0", b"-1", b"1e99", b"99999999999999999999", b"2147483648", b"nan", b"", b"3.5", b"{", b"null", b"[]", b'"x"']
    return text if m is None else text[:m.start()] + silly[rng.integers(len(silly))] + text[m.end():]


def break_bytes(data, rng):
    "Flip, overwrite, cut, drop or insert bytes; half of the blows fall on the first kilobyte, where headers are."
    data = bytearray(data)
    for _ in range(int(rng.integers(1, 5))):
        if not data: break
        at = int(rng.integers(min(len(data), 1024) if rng.random() < .5 else len(data)))
        match int(rng.integers(6)):
            case 0: data[at] ^= 1 << int(rng.integers(8))
            case 1: data[at:at + 4] = bytes([int(rng.choice([0, 0x7F, 0xFF, 0x80]))])*len(data[at:at + 4])
            case 2: data[at:at + 8] = rng.bytes(len(data[at:at + 8]))
            case 3: del data[at:None if rng.random() < .5 else at + int(rng.integers(1, 64))]
            case 4: data[at:at] = rng.bytes(int(rng.integers(1, 64)))
            case 5: data[at:at + 4] = int(rng.integers(2**31)).to_bytes(4, "little")[:len(data[at:at + 4])]
    return bytes(data)


class Hang(BaseException):
    pass


def attempt(read, path):
    "What the reader did: read, refused, or else what was wrong with that."
    def stop(*_): raise Hang
    signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        got = read(path)
        if hasattr(got, "cube"): np.asarray(got.cube[:1]).sum()  # a map is read when it is used
    except InputError as e:
        return "refused" if str(e) and "\n" not in str(e) else f"the message is {str(e)!r}"
    except Hang:
        return f"still reading after {SECONDS} s"
    except BaseException:
        return traceback.format_exc()
    finally:
        signal.alarm(0)
    return "read"


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--inputs", type=int, default=20_000)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--only", type=int, help="this input alone")
    p.add_argument("--data", type=Path, help="folder with real scenes, broken as well")
    args = p.parse_args()
    start, faults, count = time.perf_counter(), [], dict(read=0, refused=0)
    with tempfile.TemporaryDirectory() as home:
        home = Path(home)
        bases = [(what, {n: (home/n).read_bytes() for n in names}, read) for what, names, read in made(home)]
        if args.data: bases += [(n, {Path(n).name: (args.data/n).read_bytes()}, read_labels) for n in WHOLE]
        work = home/"work"
        for n in range(args.inputs) if args.only is None else [args.only]:
            rng = np.random.default_rng((args.seed, n))
            what, files, read = bases[n % len(bases)]
            victim = list(files)[int(rng.integers(len(files)))]
            for name, data in files.items():
                (work/name).parent.mkdir(parents=True, exist_ok=True)
                if name == victim: data = break_text(data, rng) if name.endswith((".hdr", ".json", ".csv")) and rng.random() < .6 else break_bytes(data, rng)
                (work/name).write_bytes(data)
            print(f"\r{n} {what} {victim}", end="", flush=True)  # the last line of a process that died
            outcome = attempt(read, work/(what if len(files) > 1 else victim))
            if outcome in count: count[outcome] += 1
            else:
                faults.append(n)
                print(f"\ninput {n}: {what}, {victim} broken: {outcome[-1500:]}")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/1024
    print(f"\n{args.inputs if args.only is None else 1:,} inputs of {len(bases)} kinds in {time.perf_counter() - start:.0f} s, peak memory {peak:.0f} MB: {count['read']:,} read, {count['refused']:,} refused, {len(faults)} faults {faults[:20] or ''}")
    return bool(faults) or peak > MEGABYTES


if __name__ == "__main__":
    sys.exit(main())
