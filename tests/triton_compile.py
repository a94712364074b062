"""Compile every Triton kernel to machine code without a card; one line a kernel: architecture, name, flags, bytes."""
import itertools
import sys

from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from hsi_mamba_nb.scan import gpu_scan

KERNELS = gpu_scan._walk, gpu_scan._ends, gpu_scan._carry, gpu_scan._ends_back, gpu_scan._back
SIZES = {"d", "n", "l", "groups", "blocks", "spans", "span", "every", "size"}
FLAGS = "GATE FIXED SEQ SOFTPLUS SAVE".split()


SIXTEEN = {"u", "delta", "z", "B", "C", "y", "dy", "du", "ddelta", "dz"}  # what comes and goes in the caller's dtype


def kind(name, half=None):
    if half and name in SIXTEEN: return f"*{half}"
    if name == "fresh": return "*i8"
    return "i32" if name in SIZES or len(name) == 2 and name[0] in "stg" and name[1] in "udzBCy" else "*fp32"


def row(kernel, arch, half=None, W=32, N=16, **flags):
    names = kernel.arg_names
    fixed = {k: flags.get(k, True) for k in FLAGS if k in names} | dict(W=W if "d" in names else 256) | (dict(N=N) if "N" in names else dict(BACK=True))
    absent = {"z": "GATE", "dz": "GATE", "weight": "FIXED", "dweight": "FIXED", "fresh": "SEQ"}
    fixed |= {k: None for k, flag in absent.items() if k in names and not fixed.get(flag, True)}
    signature = {k: "constexpr" if k in fixed else kind(k, half) for k in names}
    done = compile(ASTSource(kernel, signature, constexprs={(names.index(k),): v for k, v in fixed.items()}), target=GPUTarget("cuda", arch, 32), options=dict(num_warps=1))
    print(f"sm_{arch}", kernel.__name__, half or "fp32", f"{W}x{N}", "+".join(k for k in FLAGS if fixed.get(k)) or "-", len(done.asm["cubin"]))
    sys.stdout.flush()


for arch in (75, 80, 90):
    for kernel in KERNELS: row(kernel, arch)
for gate, fixed, seq in itertools.product((False, True), repeat=3): row(gpu_scan._back, 80, GATE=gate, FIXED=fixed, SEQ=seq)
for kernel, arch, half in itertools.product((gpu_scan._walk, gpu_scan._back), (75, 90), ("fp16", "bf16")): row(kernel, arch, half, FIXED=False)
for W, N in ((1, 1), (4, 128)): row(gpu_scan._back, 75, W=W, N=N)
