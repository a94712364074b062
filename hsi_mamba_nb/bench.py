"""Timings, side by side in one run: ratios mean something, seconds belong to one machine and one hour."""
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from tqdm.auto import tqdm

from hsi_mamba_nb.errors import InputError
from hsi_mamba_nb.files import write_file
from hsi_mamba_nb.memory import peak_memory
from hsi_mamba_nb.scan.backends import available_backends, selective_scan

__all__ = ["bench_block", "bench_clusters", "bench_experts", "bench_map", "bench_models", "bench_scan", "bench_students", "machine", "table", "table_block", "table_clusters", "table_experts", "table_map", "table_models",
           "table_students"]

SHAPES = [("patches", 64, 49, 512, 16), ("patches", 512, 81, 128, 16), ("sequences", 4, 1024, 256, 16), ("sequences", 16, 1024, 128, 16), ("image", 1, 16_384, 128, 16)]
QUICK = [("patches", 4, 49, 64, 16), ("sequences", 2, 128, 32, 16)]
WHOLE = (1, 207_400, 128, 16)  # PaviaU's 610 x 340 pixels as one sequence
MEMORY = """
import sys
from hsi_mamba_nb.bench import make, once
from hsi_mamba_nb.memory import peak_memory
b, l, d, n = map(int, sys.argv[1:5])
once("numba", make(1, 8, d, n, False))
x = make(b, l, d, n, False)
before = peak_memory()
once("numba", x)
print((peak_memory() - before)/(4*b*l*d))
"""
COMPILE = """
import time, torch
from hsi_mamba_nb.bench import make, once
x, start = make(1, 8, 32, 16, False), time.perf_counter()
once("numba", x)
print(time.perf_counter() - start)
"""


def _version(package):
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def machine(device: str = "cpu") -> dict:
    "What the numbers were measured on."
    cpu = next((line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")), "") \
        if Path("/proc/cpuinfo").exists() else platform.processor()
    return dict(date=date.today().isoformat(), cpu=cpu or platform.machine(), cores=os.cpu_count(), threads=torch.get_num_threads(), system=platform.system(),
                python=platform.python_version(), **{p: _version(p) for p in ("torch", "numba", "mambapy", *(("triton", "mamba-ssm") if device == "cuda" else ()))},
                **(dict(gpu=torch.cuda.get_device_name(), cuda=torch.version.cuda) if device == "cuda" else {}))


def make(b: int, l: int, d: int, n: int, contiguous: bool, device: str = "cpu") -> list:
    "Leaves of a scan: u, delta, A, B, C, D as (b,d,l), contiguous or as transposed views of (b,l,d) storage, as a Mamba block makes them."
    g = torch.Generator().manual_seed(0)
    turn = (lambda x: x.transpose(1, 2).contiguous()) if contiguous else (lambda x: x.transpose(1, 2))
    x = [turn(torch.randn(b, l, d, generator=g)), turn(torch.rand(b, l, d, generator=g).mul_(.1)), -torch.arange(1., n + 1).repeat(d, 1),
         turn(torch.randn(b, l, n, generator=g)), turn(torch.randn(b, l, n, generator=g)), torch.ones(d)]
    return [v.to(device).requires_grad_() for v in x]  # keeps strides


def _mambapy(u, delta, A, B, C, D):
    "mambapy's parallel scan, as its MambaBlock calls it: it takes (b,l,d,n) decays and inputs."
    from mambapy.pscan import pscan
    u, delta, B, C = (x.transpose(1, 2) for x in (u, delta, B, C))
    h = pscan(torch.exp(delta.unsqueeze(-1)*A), delta.unsqueeze(-1)*B.unsqueeze(2)*u.unsqueeze(-1))
    return (h @ C.unsqueeze(-1)).squeeze(3) + D*u


def once(name: str, x: list) -> None:
    "One forward and backward."
    y = _mambapy(*x) if name == "mambapy" else selective_scan(*x, backend=name)
    y.sum().backward()
    for v in x:
        v.grad = None
    if x[0].is_cuda:
        torch.cuda.synchronize()


def _time(f) -> float:
    start = time.perf_counter()
    f()
    return time.perf_counter() - start


def _child(code, *args, **env) -> float | None:
    "A measurement in a process of its own, whose memory and compiled code are new; None where there is none to be had."
    done = subprocess.run([sys.executable, "-c", code, *map(str, args)], capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads()), **env})
    value = float(done.stdout.split()[-1]) if done.returncode == 0 else float("nan")
    return round(value, 2) if value == value else None


def _contenders(device):
    there = {"cpu": {"numba", "torch", "ref"}, "cuda": {"triton", "mamba_ssm", "torch", "ref"}}[device] & set(available_backends())
    return [*(name for name in ("numba", "triton", "mamba_ssm", "torch", "ref") if name in there), *["mambapy"]*bool(_version("mambapy"))]


def _floor(b, l, d, n, device):
    "What no scan can be faster than: on a CPU one exponential an element, on a GPU u, delta, B, C and y moved once."
    source = torch.rand(b*l*d*n if device == "cpu" else b*l*(3*d + 2*n)//2, device=device)
    target = torch.empty_like(source)

    def go():
        if device == "cpu":
            return torch.exp(source, out=target)
        target.copy_(source)  # half is read, half is written
        torch.cuda.synchronize()
    return go


def _shape(kind, b, l, d, n, repeats, bar, device) -> list:
    "All contenders and the floor on one shape, in turns, so that a busy minute hits all alike."
    rows = [(name, contiguous, make(b, l, d, n, contiguous, device)) for name in _contenders(device) for contiguous in (False, True) if not (contiguous and name == "ref")]
    times, floor, least = {(name, contiguous): [] for name, contiguous, _ in rows}, [], _floor(b, l, d, n, device)
    for _ in range(repeats + 1):  # the first compiles and warms
        floor.append(_time(least))
        for name, contiguous, x in rows:
            bar.set_postfix_str(f"{b}x{l}x{d}x{n} {name}")
            times[name, contiguous].append(_time(lambda: once(name, x)))
            bar.update()
    medians, floor = {key: statistics.median(t[1:]) for key, t in times.items()}, statistics.median(floor[1:])
    return [dict(kind=kind, shape=[b, l, d, n], backend=name, layout="(b,d,l)" if contiguous else "(b,l,d)", seconds=round(t, 6), ns_per_element=round(t/(b*l*d*n)*1e9, 3),
                 times_mambapy=round(medians["mambapy", contiguous]/t, 1) if ("mambapy", contiguous) in medians else None,
                 times_mamba_ssm=round(medians["mamba_ssm", contiguous]/t, 2) if ("mamba_ssm", contiguous) in medians else None,
                 times_loop=round(medians["ref", False]/t, 1), of_floor=round(t/floor, 2)) for (name, contiguous), t in medians.items()]


def bench_scan(
    quick: bool = False,  # two small shapes, to see that it runs
    repeats: int = 3,  # rounds, of which the median counts
    progress: bool = True,
    device: str = "cpu",  # or "cuda"
) -> dict:
    "Forward and backward of the selective scan: every backend, the loop and mambapy, on patches, sequences and images; on a CPU also growth, memory, compile time."
    _check(repeats, device)
    shapes = QUICK if quick else SHAPES
    result = dict(command="hsi-mamba bench scan" + " --quick"*quick + f" --repeats {repeats}"*(repeats != 3) + f" --device {device}"*(device != "cpu"), machine=machine(device), rows=[])
    with tqdm(total=len(shapes)*(repeats + 1)*(2*len(_contenders(device)) - 1), desc="bench scan", unit="run", disable=None if progress else True) as bar:
        for shape in shapes:
            result["rows"] += _shape(*shape, repeats, bar, device)
    return result if device == "cuda" else result | _long_ones(quick)


def _check(repeats, device):
    if repeats < 1:
        raise InputError(f"--repeats {repeats}: at least 1 round is needed, beside the first, which compiles")
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: torch sees no GPU here; leave it out to time the CPU")


def _long_ones(quick) -> dict:
    "How time grows with length, peak memory on the longest sequence, and the first compilation."
    result = {}
    lengths = [1000*2**k for k in range(4 if quick else 8)] + ([] if quick else [100_000, 200_000])
    grow = {}
    for l in lengths:
        x = make(1, l, 32 if quick else 128, 16, False)
        once("numba", x)
        grow[l] = statistics.median(_time(lambda: once("numba", x)) for _ in range(5))
    result["growth"] = [dict(length=l, seconds=round(t, 6), times_half=round(t/grow[l//2], 2) if l//2 in grow else None) for l, t in grow.items()]
    b, l, d, n = QUICK[1][1:] if quick else WHOLE
    x = make(b, l, d, n, False)
    once("numba", x)
    result["whole"] = dict(shape=[b, l, d, n], seconds=round(statistics.median(_time(lambda: once("numba", x)) for _ in range(3)), 4),
                           peak_memory_over_u=_child(MEMORY, b, l, d, n))
    result["compile_seconds"] = _compile_seconds()
    return result


def _compile_seconds() -> float | None:
    import tempfile
    with tempfile.TemporaryDirectory() as empty:
        return _child(COMPILE, NUMBA_CACHE_DIR=empty)


def _head(result) -> list:
    m = result["machine"]
    return [", ".join([m[k] for k in ("gpu",) if k in m] + [m["cpu"], f"{m['cores']} cores", f"{m['threads']} threads; "])
            + ", ".join(f"{p} {m[p] or 'not installed'}" for p in ("torch", "numba", "triton", "mamba-ssm", "mambapy") if p in m) + f"; {m['date']}"]


def table(result: dict) -> str:
    "The result for people."
    lines = [*_head(result), "forward + backward, float32, b x l x d x n; ratios in one run, > 1 is faster than the other", "",
             f"{'shape':<22}{'storage':<10}{'backend':<11}{'ms':>10}{'x mambapy':>11}{'x loop':>9}{'of floor':>10}"]
    for r in result["rows"]:
        lines.append(f"{'x'.join(map(str, r['shape'])):<22}{r['layout']:<10}{r['backend']:<11}{1e3*r['seconds']:>10.1f}"
                     f"{r['times_mambapy'] or '-':>11}{r['times_loop']:>9}{r['of_floor']:>10}" + (f"  {r['times_mamba_ssm']} x mamba_ssm" if r.get("times_mamba_ssm") else ""))
    if "whole" in result:
        growth = [g["times_half"] for g in result["growth"] if g["times_half"]]
        w = result["whole"]
        lines += ["", f"doubling the length: {min(growth)} to {max(growth)} times the time, from {result['growth'][0]['length']:,} to {result['growth'][-1]['length']:,} steps",
                  f"{'x'.join(map(str, w['shape']))}: {w['seconds']} s, peak memory beyond its inputs {w['peak_memory_over_u'] or '?'} times u; first compilation {result['compile_seconds'] or '?'} s"]
    return "\n".join(lines)


def bench_block(
    quick: bool = False,  # a small block, to see that it runs
    repeats: int = 3,  # rounds of 5, of which the median counts
    progress: bool = True,
    device: str = "cpu",  # or "cuda"
) -> dict:
    "Forward and backward of a Mamba block (d_model 128, 49 steps, batch 64) beside mambapy's with the same weights, where that is installed."
    from hsi_mamba_nb.scan.mamba_block import Mamba
    _check(repeats, device)
    b, l, d = (4, 9, 16) if quick else (64, 49, 128)
    torch.manual_seed(0)
    blocks = dict(ours=Mamba(d).to(device))
    if _version("mambapy"):
        from mambapy.mamba import MambaBlock, MambaConfig
        blocks["mambapy"] = MambaBlock(MambaConfig(d_model=d, n_layers=1)).to(device)
        blocks["mambapy"].load_state_dict(blocks["ours"].state_dict())
    x = torch.randn(b, l, d, device=device, requires_grad=True)

    def go(block):
        block.zero_grad(set_to_none=True)
        block(x).sum().backward()
        if x.is_cuda:
            torch.cuda.synchronize()
    times = {name: [] for name in blocks}
    for _ in tqdm(range(5*repeats + 1), desc="bench block", unit="round", disable=None if progress else True):  # the first compiles and warms
        for name, block in blocks.items():
            times[name].append(_time(lambda: go(block)))
    medians = {name: statistics.median(t[1:]) for name, t in times.items()}
    return dict(command="hsi-mamba bench block" + " --quick"*quick + f" --repeats {repeats}"*(repeats != 3) + f" --device {device}"*(device != "cpu"), machine=machine(device),
                shape=[b, l, d], rows=[dict(block=name, seconds=round(t, 6), times_mambapy=round(medians["mambapy"]/t, 1) if "mambapy" in medians else None) for name, t in medians.items()])


def table_block(result: dict) -> str:
    "The result for people."
    return "\n".join([*_head(result), f"Mamba block, forward + backward, float32, batch x length x d_model {' x '.join(map(str, result['shape']))}", "",
                      *(f"{r['block']:<10}{1e3*r['seconds']:>10.1f} ms{r['times_mambapy'] or '-':>9} x mambapy" for r in result["rows"])])


def _step_times(nets, x, y, rounds, desc, progress) -> dict:
    "Median seconds of a training step of each net, in turn; the first round compiles and does not count."
    optimizers = {name: torch.optim.AdamW(net.parameters()) for name, net in nets.items()}

    def step(name):
        loss, _ = nets[name].loss(x, y)
        loss.backward()
        optimizers[name].step()
        optimizers[name].zero_grad()
    times = {name: [] for name in nets}
    for _ in tqdm(range(rounds + 1), desc=desc, unit="round", disable=None if progress else True):
        for name in nets:
            times[name].append(_time(lambda: step(name)))
    return {name: statistics.median(t[1:]) for name, t in times.items()}


def bench_models(
    quick: bool = False,  # a narrow net, to see that it runs
    repeats: int = 3,  # rounds of 3 steps, of which the median counts
    progress: bool = True,
) -> dict:
    "A training step of SSA-Mamba's paper variant (batch 16, 144 bands), beside the same net with a loop for its state space, and with none."
    from copy import deepcopy

    from torch import nn

    from hsi_mamba_nb.models.registry import create_model
    from hsi_mamba_nb.models.ssa_mamba import SSM
    from hsi_mamba_nb.scan.recurrence import lti_scan_ref
    _check(repeats, "cpu")

    class Loop(nn.Module):
        def __init__(self, ssm):
            super().__init__()
            self.ssm = ssm

        def forward(self, x):
            return lti_scan_ref(x, *self.ssm.discrete())

    def swapped(net, make):
        for module in list(net.modules()):
            for name, child in list(module.named_children()):
                if isinstance(child, SSM):
                    setattr(module, name, make(child))
        return net
    torch.manual_seed(0)
    whole = create_model("ssa-mamba", 144, 15, variant="paper", **dict(d_model=32, depth=1) if quick else dict(d_model=256, depth=4)).train()
    nets = {"as it is": whole, "state space in a loop": swapped(deepcopy(whole), Loop), "without state space": swapped(deepcopy(whole), lambda ssm: nn.Identity())}
    medians = _step_times(nets, torch.randn(16, 144, 7, 7), torch.randint(1, 16, (16,)), 3*repeats, "bench models", progress)
    return dict(command="hsi-mamba bench models" + " --quick"*quick + f" --repeats {repeats}"*(repeats != 3), machine=machine(),
                rows=[dict(net=name, seconds=round(t, 5), over_none=round(t/medians["without state space"], 2)) for name, t in medians.items()])


def table_models(result: dict) -> str:
    "The result for people."
    return "\n".join([*_head(result), "SSA-Mamba, paper variant: training step, batch 16, 144 bands, float32", "",
                      *(f"{r['net']:<24}{1e3*r['seconds']:>10.1f} ms{r['over_none']:>8} x the net without its state space" for r in result["rows"])])


STEP_MEMORY = """
import json, sys
import torch
from hsi_mamba_nb.memory import peak_memory
from hsi_mamba_nb.models import create_model
options, (side, bands, classes) = json.loads(sys.argv[1]), map(int, sys.argv[2:5])
net = create_model("css-mamba", bands, classes, **options).train()
draw = lambda n: (torch.randn(1, bands, n, n), torch.randint(1, classes + 1, (1, n, n)))
net.loss(*draw(12))[0].backward()
x, y = draw(side)
before = peak_memory(reset=True)
net.loss(x, y)[0].backward()
print((peak_memory() - before)/1e6)
"""


def bench_clusters(
    quick: bool = False,  # a small image, to see that it runs
    repeats: int = 3,  # rounds of 3 steps, of which the median counts
    progress: bool = True,
) -> dict:
    "A training step of CSSMamba on one image beside the same net without clusters, and what clustering, scores and local scans take alone."
    from hsi_mamba_nb.learn.protocol import count_flops
    from hsi_mamba_nb.models.registry import create_model
    from hsi_mamba_nb.parts.clustering_ema import cluster_loss
    _check(repeats, "cpu")
    side, bands, classes = (16, 8, 3) if quick else (72, 64, 6)
    given = {"no clusters": dict(cluster=False), "1 centre a class": dict(clusters=1), "3 centres a class": {}, "5 centres a class": dict(clusters=5), "paper variant, 3": dict(variant="paper")}
    torch.manual_seed(0)
    nets = {name: create_model("css-mamba", bands, classes, **o).train() for name, o in given.items()}
    x, y = torch.randn(1, bands, side, side), torch.randint(1, classes + 1, (1, side, side))
    medians = _step_times(nets, x, y, 3*repeats, "bench clusters", progress)
    rows = []
    for name, net in nets.items():
        rows.append(dict(net=name, seconds=round(medians[name], 5), over_none=round(medians[name]/medians["no clusters"], 2), parameters=sum(p.numel() for p in net.parameters()),
                         flops=round(count_flops(net)), extra_mb=_child(STEP_MEMORY, json.dumps(given[name]), side, bands, classes)))
    local = nets["3 centres a class"].blocks[0].local
    t = torch.randn(1, side*side, nets["3 centres a class"].embed[0].out_channels)
    z = local.proj(local.norm(t)).detach().requires_grad_()
    with torch.no_grad():
        p, S = local.centres(z), local.attention(z, local.centres(z))
    parts = {"clustering": lambda: (local.centres.update(z, y.flatten(1)), cluster_loss(z, local.centres(z)).backward()),
             "token scores": lambda: local.attention(z, p).sum().backward(), "local scan": lambda: local.local(z, p.argmax(-1), S).sum().backward()}
    times = {name: [] for name in parts}
    for _ in range(3*repeats + 1):
        for name, part in parts.items():
            times[name].append(_time(part))
    return dict(command="hsi-mamba bench clusters" + " --quick"*quick + f" --repeats {repeats}"*(repeats != 3), machine=machine(), image=[side, side, bands], rows=rows,
                parts=[dict(part=name, seconds=round(m, 5), of_none=round(m/medians["no clusters"], 3)) for name, v in times.items() for m in [statistics.median(v[1:])]])


def table_clusters(result: dict) -> str:
    "The result for people."
    return "\n".join([*_head(result), f"CSSMamba, a training step on an image of {' x '.join(map(str, result['image']))}, float32", "",
                      f"{'net':<20}{'ms':>9}{'x no clusters':>15}{'parameters':>12}{'kFLOP/pixel':>13}{'step MB':>9}",
                      *(f"{r['net']:<20}{1e3*r['seconds']:>9.1f}{r['over_none']:>15}{r['parameters']:>12,}{r['flops']/1e3:>13.0f}{r['extra_mb'] or float('nan'):>9.0f}" for r in result["rows"]), "",
                      "parts of the net with 3 centres a class alone, forward + backward; share of a step without clusters",
                      *(f"{p['part']:<20}{1e3*p['seconds']:>9.1f}{p['of_none']:>15}" for p in result["parts"])])


def bench_experts(
    quick: bool = False,  # a small image, to see that it runs
    repeats: int = 3,  # rounds of 5, of which the median counts
    progress: bool = True,
    device: str = "cpu",  # or "cuda"
) -> dict:
    "Forward and backward of a routed layer: four experts of one size, the two that are asked beside all four, decided by image and by pixel."
    from torch.utils.flop_counter import FlopCounterMode

    from hsi_mamba_nb.parts.experts import Experts
    _check(repeats, device)
    b, d, side, rank = (2, 16, 8, 4) if quick else (8, 64, 48, 16)
    torch.manual_seed(0)
    x, nets = torch.randn(b, d, side, side).to(device), {level: Experts(d, (rank,)*4, level=level).to(device) for level in ("image", "pixel")}

    def go(level, sparse):
        nets[level].zero_grad(set_to_none=True)
        nets[level].sparse = sparse
        nets[level](x).sum().backward()
        if x.is_cuda:
            torch.cuda.synchronize()
    times = {(level, sparse): [] for level in nets for sparse in (True, False)}
    for _ in tqdm(range(5*repeats + 1), desc="bench experts", unit="round", disable=None if progress else True):  # the first compiles and warms
        for key in times:
            times[key].append(_time(lambda: go(*key)))
    medians, rows = {key: statistics.median(t[1:]) for key, t in times.items()}, []
    for level, net in nets.items():
        net.sparse = True
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            net(x)
        with torch.no_grad():
            weights = net.weights(x)
        share, measured = net.flops(weights)/net.flops(torch.ones_like(weights)), medians[level, True]/medians[level, False]
        rows.append(dict(level=level, seconds_all=round(medians[level, False], 6), seconds_asked=round(medians[level, True], 6), times_all=round(1/measured, 2),
                         predicted_share=round(share, 4), measured_share=round(measured, 4), measured_over_predicted=round(measured/share, 3),
                         predicted_flops=net.flops(weights), counted_flops=counter.get_total_flops()))
    return dict(command="hsi-mamba bench experts" + " --quick"*quick + f" --repeats {repeats}"*(repeats != 3) + f" --device {device}"*(device != "cpu"), machine=machine(device),
                shape=[b, d, side, side], rank=rank, rows=rows)


def table_experts(result: dict) -> str:
    "The result for people."
    return "\n".join([*_head(result), f"routed layer, forward + backward, float32, images {' x '.join(map(str, result['shape']))}, four experts of rank {result['rank']}, two asked", "",
                      f"{'decided by':<12}{'all ms':>9}{'asked ms':>10}{'x all':>8}{'share of the cost: predicted':>31}{'measured':>10}{'measured/predicted':>20}{'Mflop forward: predicted':>27}{'counted':>9}",
                      *(f"{r['level']:<12}{1e3*r['seconds_all']:>9.1f}{1e3*r['seconds_asked']:>10.1f}{r['times_all']:>8}{r['predicted_share']:>31}{r['measured_share']:>10}"
                        f"{r['measured_over_predicted']:>20}{r['predicted_flops']/1e6:>27.1f}{r['counted_flops']/1e6:>9.1f}" for r in result["rows"])])


STUDENTS = {"ssa-mamba": ("ssa-mamba", {}), **{f"blm, {variant}, {role}": ("blm", dict(variant=variant, role=role)) for variant in ("fixed", "paper") for role in ("teacher", "student")}}


def bench_students(
    quick: bool = False,  # few bands and a small scene, to see that it runs
    repeats: int = 3,  # rounds, of which the median counts
    progress: bool = True,
) -> dict:
    "What teachers and students cost once they are trained: a pixel among many, a pixel alone, and a whole scene, turn by turn."
    import numpy as np

    from hsi_mamba_nb.learn.checkpoint import Run
    from hsi_mamba_nb.learn.map import predict_map
    from hsi_mamba_nb.learn.protocol import count_flops
    from hsi_mamba_nb.models.registry import create_model
    from hsi_mamba_nb.scene import Scene, Standardizer
    _check(repeats, "cpu")
    b, side, classes, rows = 32 if quick else 1024, 12 if quick else 72, 10, []

    @torch.no_grad()
    def go(net, x):
        net(x)
    for bands in (12,) if quick else (64, 204):
        torch.manual_seed(0)
        nets = {name: create_model(model, bands, classes, **options).eval() for name, (model, options) in STUDENTS.items()}
        runs = {name: Run(net, Standardizer(np.zeros(bands, np.float32), np.ones(bands, np.float32)), tuple(map(str, range(classes))), None) for name, net in nets.items()}
        scene = Scene(np.random.default_rng(0).normal(size=(side, side, bands)).astype(np.float32), name="noise")
        times = {(name, what): [] for name in nets for what in ("many", "one", "scene")}
        for net in nets.values():  # the first call compiles, the first large one takes its memory
            go(net, torch.randn(b, bands, net.patch, net.patch))
        for _ in tqdm(range(repeats), desc=f"bench students, {bands} bands", unit="round", disable=None if progress else True):
            for name, net in nets.items():
                many = torch.randn(b, bands, net.patch, net.patch)
                times[name, "many"].append(_time(lambda: go(net, many))/b)
                times[name, "one"].append(statistics.median(_time(lambda: go(net, many[:1])) for _ in range(10)))
                times[name, "scene"].append(_time(lambda: predict_map(runs[name], scene, progress=False)))
        medians = {key: statistics.median(t) for key, t in times.items()}
        for name, net in nets.items():
            teacher = name.replace("student", "teacher")
            rows.append(dict(bands=bands, model=name, patch=net.patch, parameters=sum(p.numel() for p in net.parameters()), flops=count_flops(net),
                             many_microseconds=round(1e6*medians[name, "many"], 2), one_microseconds=round(1e6*medians[name, "one"], 1), scene_seconds=round(medians[name, "scene"], 4),
                             flops_of_teacher=None if name == "ssa-mamba" else round(count_flops(net)/count_flops(nets[teacher]), 4),  # it has none
                             **{f"{what}_of_{whom}": None if (name, whom) == ("ssa-mamba", "teacher") else round(medians[name, what]/medians[other, what], 4) for what in ("many", "one", "scene") for whom, other in (("teacher", teacher), ("ssa_mamba", "ssa-mamba"))}))
    return dict(command="hsi-mamba bench students" + " --quick"*quick + f" --repeats {repeats}"*(repeats != 3), machine=machine(), batch=b, side=side, rows=rows)


def table_students(result: dict) -> str:
    "The result for people."
    side, of = result["side"], {"many x teacher": "many_of_teacher", "alone x teacher": "one_of_teacher", "scene x teacher": "scene_of_teacher", "scene x SSA-Mamba": "scene_of_ssa_mamba"}

    def ratio(row, key):  # SSA-Mamba has no teacher
        return "-" if row[key] is None or row["model"] == "ssa-mamba" and key.endswith("teacher") else row[key]
    return "\n".join([*_head(result), f"evaluation, float32; a pixel among {result['batch']}, a pixel alone, a scene of {side} x {side}; x: of the teacher's time (of the same variant), of SSA-Mamba's", "",
                      f"{'bands':>5}  {'model':<22}{'param.':>10}{'MFLOP':>9}{'us among many':>15}{'us alone':>10}{'scene s':>9}" + "".join(f"{k:>{len(k) + 2}}" for k in of),
                      *(f"{r['bands']:>5}  {r['model']:<22}{r['parameters']:>10}{r['flops']/1e6:>9.2f}{r['many_microseconds']:>15}{r['one_microseconds']:>10}{r['scene_seconds']:>9.3f}"
                        + "".join(f"{ratio(r, key):>{len(k) + 2}}" for k, key in of.items()) for r in result["rows"])])


XIONGAN = (1580, 3750, 256)  # rows, columns, bands: 3 GB of 16-bit numbers
MAP = """
import sys, time
import numpy as np
import torch
from hsi_mamba_nb.learn import Run, predict_map
from hsi_mamba_nb.learn.protocol import count_flops
from hsi_mamba_nb.memory import peak_memory
from hsi_mamba_nb.models import create_model
from hsi_mamba_nb.scene import Scene, Standardizer
h, w, c, strip = map(int, sys.argv[2:6])
cube = np.memmap(sys.argv[1], np.uint16, "r", shape=(h, w, c))
torch.manual_seed(0)
model = create_model("cnn-2d", c, 20).eval()
run = Run(model, Standardizer(np.full(c, 3000, np.float32), np.full(c, 800, np.float32)), tuple(map(str, range(20))), None)
flops, start = count_flops(model), time.perf_counter()
result = predict_map(run, Scene(cube), strip)
np.save(sys.argv[6], result.classes)
print(flops, time.perf_counter() - start, peak_memory())
"""


def _big_file(path, h, w, c) -> None:
    "A made-up scene on the disk, written some rows at a time: smooth in space, 16 spectra, noise."
    import numpy as np
    rng = np.random.default_rng(0)
    spectra = rng.normal(3000, 800, (16, c)).clip(0)
    with open(path, "wb") as f:
        for top in range(0, h, 16):
            i, j = np.mgrid[top:min(top + 16, h), 0:w]
            kind = (i//90*7 + j//110*5 + (i*j)//9000) % 16
            noise = rng.normal(0, 200, (1, w, c))
            f.write((spectra[kind] + noise).clip(0, 65535).astype(np.uint16).tobytes())


def bench_map(
    quick: bool = False,  # a small scene, in two heights of strip, to see that it runs
    progress: bool = True,
) -> dict:
    "A scene of XiongAn's size on the disk, mapped by a small CNN in a process of its own: time and peak memory."
    import tempfile

    import numpy as np
    h, w, c = (60, 80, 32) if quick else XIONGAN
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)/"scene.bin"
        _big_file(path, h, w, c)
        heights, runs = (32, 17), []
        for strip in heights[:2 if quick else 1]:
            done = subprocess.run([sys.executable, "-c", MAP, path, *map(str, (h, w, c, strip)), Path(folder)/f"{strip}.npy"], text=True, stdout=subprocess.PIPE,
                                  stderr=None if progress else subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())})
            if done.returncode:
                raise InputError("bench map: the process that maps has failed; its message is above")
            runs.append([float(v) for v in done.stdout.split()[-3:]])
        classes = np.load(Path(folder)/"32.npy")
        same = bool(np.array_equal(classes, np.load(Path(folder)/"17.npy"))) if quick else None
    flops, seconds, peak = runs[0]
    return dict(command="hsi-mamba bench map" + " --quick"*quick, machine=machine(), shape=[h, w, c], model="cnn-2d, patch 9", mflop_per_pixel=round(flops/1e6, 2),
                seconds=round(seconds, 1), pixels_per_second=round(h*w/seconds), peak_mb=round(peak/1e6), classes_seen=int(len(np.unique(classes))), same_for_another_strip=same)


def table_map(result: dict) -> str:
    "The result for people."
    h, w, c = result["shape"]
    return "\n".join([*_head(result), f"map of {h} x {w} x {c} uint16 ({2*h*w*c/1e9:.1f} GB on disk) by {result['model']}, {result['mflop_per_pixel']} MFLOP a pixel",
                      f"{result['seconds']/60:.1f} minutes, {result['pixels_per_second']:,} pixels a second, peak resident memory {result['peak_mb']:,} MB"
                      + "; strips of 17 rows give the same classes"*bool(result["same_for_another_strip"])])


def save(result: dict, path) -> Path:
    return write_file(path, json.dumps(result, indent=1) + "\n")
