"""Write README.md from nbs/index.ipynb: python tools/readme.py  (a test checks that it was done)."""
import json
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LINK = re.compile(r"(\]\()(?!https?:|#|mailto:)([^)]+)\)")


def readme() -> str:
    "The landing page as Markdown: hidden cells dropped, code fenced, printed output kept, links made relative to the root."
    parts = []
    for cell in json.loads((ROOT/"nbs"/"index.ipynb").read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(LINK.sub(r"\1nbs/\2)", source))
        elif not source.startswith("#| hide"):
            parts.append(f"```python\n{source}\n```")
            printed = "".join("".join(o["text"]) for o in cell["outputs"] if o["output_type"] == "stream")
            if printed:
                parts.append(f"```text\n{printed.rstrip()}\n```")
    return "<!-- Written by tools/readme.py from nbs/index.ipynb: edit that, then run `make readme`. -->\n\n" + "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    (ROOT/"README.md").write_text(readme(), encoding="utf-8")
