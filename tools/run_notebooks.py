"""Run notebooks from a fresh kernel and keep their outputs: python tools/run_notebooks.py [NOTEBOOK ...]  (all by default)

Execution counts and timings are stripped, so that a re-run of unchanged cells changes no byte but what they print."""
import base64
import io
import sys
from pathlib import Path

from PIL import Image
from fastcore.nbio import read_nb, write_nb
from nbdev.test import test_nb

ROOT = Path(__file__).resolve().parent.parent
KEPT = ("jupyter", "cellView")  # cell metadata that folds a source


def lighten(png: str) -> str:
    "A base64 PNG with at most 256 colours: a third of the size, and no visible difference in a plot."
    image = Image.open(io.BytesIO(base64.b64decode(png)))
    if image.mode == "P":
        return png
    flat = Image.new("RGB", image.size, "white")
    flat.paste(image, mask=image.getchannel("A") if image.mode == "RGBA" else None)
    out = io.BytesIO()
    flat.quantize(256, dither=Image.Dither.NONE).save(out, "PNG", optimize=True)
    return base64.b64encode(out.getvalue()).decode()


def is_noise(out) -> bool:
    "What a plotting call returns: the name of an object at an address, which nobody reads and no two runs share."
    return out["output_type"] == "execute_result" and "<matplotlib." in "".join(out["data"].get("text/plain", ""))


def clean(path):
    nb = read_nb(path)
    for cell in nb.cells:
        cell.metadata = {k: v for k, v in cell.metadata.items() if k in KEPT}
        if cell.cell_type != "code":
            continue
        cell.execution_count = None
        cell.outputs = [out for out in cell.outputs if not is_noise(out)]
        for out in cell.outputs:
            if "image/png" in out.get("data", {}):
                out["data"]["image/png"] = lighten(out["data"]["image/png"])
            if "execution_count" in out:
                out["execution_count"] = None
            out.pop("metadata", None) if out["output_type"] == "stream" else out.update(metadata={})
    nb.metadata = {"kernelspec": {"display_name": "python3", "language": "python", "name": "python3"}}
    write_nb(nb, path)


def main(names):
    paths = [Path(n).resolve() for n in names] or sorted((ROOT/"nbs").rglob("*.ipynb"))
    failed = []
    for path in paths:
        ok, seconds = test_nb(path, save=True, profile=False)
        clean(path)
        print(f"{path.relative_to(ROOT)}: {'ran' if ok else 'FAILED'} in {seconds:.1f} s", flush=True)
        failed += [] if ok else [path]
    return len(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
