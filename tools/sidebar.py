"""Write nbs/sidebar.yml from the folders: parts in order, chapters in order within them.  Usage: sidebar.py"""
import re
from pathlib import Path

NBS = Path(__file__).resolve().parent.parent/"nbs"
TITLES = {"howto": "How to"}  # other folders: 2_scan -> Scan


def sidebar(nbs=NBS):
    "The file's text."
    out = ["# Written by tools/sidebar.py", "website:", "  sidebar:", "    contents:"]
    out += ["      - index.ipynb"] if (nbs/"index.ipynb").exists() else []
    for folder in sorted(p for p in nbs.iterdir() if p.is_dir() and p.name[0] not in "._"):
        name = re.sub(r"^\d+_", "", folder.name)
        chapters = [f"          - {folder.name}/{p.name}" for p in sorted(folder.glob("*.ipynb"))]
        if chapters: out += [f"      - section: {TITLES.get(name, name.capitalize())}", "        contents:", *chapters]
    return "\n".join(out) + "\n"


if __name__ == "__main__":
    (NBS/"sidebar.yml").write_text(sidebar(), encoding="utf-8")
