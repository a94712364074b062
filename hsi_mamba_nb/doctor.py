"""What is installed, what works, and what to do about the rest."""
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

__all__ = ["report"]

_OPTIONAL = {  # package: what it adds, how to get it
    "triton": ("the GPU scan", 'pip install "hsi-mamba-nb[gpu]" (Linux)'),
    "mamba_ssm": ("the authors' CUDA kernel", 'pip install "hsi-mamba-nb[mamba-ssm]" (Linux, NVIDIA, compiles)'),
    "rasterio": ("GeoTIFF files, and where ENVI files lie", 'pip install "hsi-mamba-nb[geo]"'),
    "ipywidgets": ("the interactive cells", 'pip install "hsi-mamba-nb[notebooks]"'),
}


def _version(package):
    try:
        return version(package.replace("_", "-"))
    except PackageNotFoundError:
        return None


def _core() -> list:
    rows = [("ok", "python", platform.python_version(), platform.platform())]
    for name in ("hsi-mamba-nb", "torch", "numpy", "scipy", "numba", "scikit-learn", "accelerate", "safetensors", "matplotlib"):
        v = _version(name)
        rows.append(("ok", name, v, "") if v else ("missing", name, "", f"pip install {name}"))
    return rows


def _devices() -> list:
    import torch
    rows = [("ok", "cpu", f"{torch.get_num_threads()} threads", f"of {os.cpu_count()} cores")]
    if torch.cuda.is_available():
        rows += [("ok", f"cuda:{i}", torch.cuda.get_device_name(i), f"compute capability {'.'.join(map(str, torch.cuda.get_device_capability(i)))}")
                 for i in range(torch.cuda.device_count())]
    elif torch.backends.mps.is_available():
        rows.append(("ok", "mps", "Apple GPU", ""))
    else:
        rows.append(("none", "gpu", "", "not needed; torch sees none" + ("" if torch.version.cuda else " (this torch is a CPU build)")))
    return rows


def _scans() -> list:
    "Each way to compute a scan, run on a small case and compared with the loop."
    import torch
    from hsi_mamba_nb.scan.recurrence import lti_scan, lti_scan_ref
    g = torch.Generator().manual_seed(0)
    x, Abar, (Bbar, C), D = torch.randn(2, 9, 3, generator=g), torch.rand(3, 4, generator=g), torch.randn(2, 3, 4, generator=g), torch.randn(3, generator=g)
    want, got = lti_scan_ref(x, Abar, Bbar, C, D), lti_scan(x, Abar, Bbar, C, D)
    err = float((got - want).abs().max()/want.abs().max())
    rows = [("ok", "ref", "the loop", "the oracle of every other form"),
            ("ok" if err < 1e-5 else "WRONG", "convolution", f"error {err:.0e}", "time-invariant SSM as a Toeplitz product")]
    from hsi_mamba_nb.scan.backends import available_backends, selective_scan, why_not_triton
    u, delta = torch.randn(2, 3, 40, generator=g), torch.rand(2, 3, 40, generator=g)
    args = u, delta, -torch.rand(3, 4, generator=g), torch.randn(2, 4, 40, generator=g), torch.randn(2, 4, 40, generator=g)
    want = selective_scan(*args, backend="ref")
    about = {"torch": "selective scan in chunks, any device", "numba": "selective scan compiled for the CPU; the first call ever compiles",
             "triton": "selective scan on the GPU", "mamba_ssm": "the authors' selective scan"}
    gpu = torch.cuda.is_available()
    for name in available_backends():
        if name != "ref":
            x = [v.cuda() for v in args] if gpu and name in ("triton", "mamba_ssm") else args
            err = float((selective_scan(*x, backend=name).cpu() - want).norm()/want.norm())
            rows.append(("ok" if err < 1e-5 else "WRONG", name, f"error {err:.0e}", about[name]))
    if "triton" not in available_backends():
        rows.append(("none", "triton", "", "selective scan on the GPU: " + (why_not_triton(torch.cuda.current_device()) if gpu else "no GPU here")))
    return rows


def _optional() -> list:
    rows = []
    for name, (adds, way) in _OPTIONAL.items():
        there = find_spec(name) is not None
        rows.append(("ok", name, _version(name) or "", adds) if there else ("none", name, "", f"adds {adds}: {way}"))
    return rows


def report() -> str:
    "A table in four parts: packages, devices, scans, extras, and where scenes are looked for."
    from hsi_mamba_nb.scene.registry import data_folder
    lines = []
    for title, rows in (("packages", _core()), ("devices", _devices()), ("scans", _scans()), ("extras", _optional())):
        lines += [title] + [f"  {state:<8}{name:<14}{value or '':<22}{note}".rstrip() for state, name, value, note in rows]
    folder = data_folder()
    here = "exists" if folder.is_dir() else "not there yet; make it, or set HSI_DATA to where your scenes are"
    return "\n".join(lines + ["scenes", f"  {folder}: {here}"])
