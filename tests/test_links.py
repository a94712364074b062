"""Links and images lead somewhere, and every formula is valid in strict KaTeX."""
import json
import os
import re
import shutil
import subprocess
from urllib.parse import unquote, urlsplit

import gate
import pytest
from conftest import ROOT

CODE = re.compile(r"(```|~~~).*?\1|(`+)[^`\n]+\2", re.S)
DISPLAY = re.compile(r"\$\$(.+?)\$\$", re.S)
INLINE = re.compile(r"(?<![\\$\w])\$(?=\S)([^$]+?)(?<=\S)\$(?![\d$])")
LINK = re.compile(r"!?\[(?:[^\[\]]|!?\[[^\[\]]*\](?:\([^()]*\))?)*\]\(\s*<?([^()<>]*?)>?(?:\s+\"[^\"]*\")?\s*\)|<(?:img|a)\b[^>]*\b(?:src|href)=\"([^\"]*)\"")
BADGES = re.compile(r"!\[[^\[\]]*\]\(([^()]*)\)")  # an image inside a link


def texts():
    "(where, file, markdown) of every page"
    for path in sorted(ROOT.glob("*.md")): yield path.name, path, path.read_text(encoding="utf-8")
    for path in gate.notebooks():
        nb = gate.Notebook(path)
        for c in nb.md: yield f"{nb.relative} cell {c.number}", path, c.source


def links(md):
    md = INLINE.sub("", DISPLAY.sub("", CODE.sub("", md)))
    return sorted({a or b for a, b in LINK.findall(md)} | set(BADGES.findall(md)))


def formulas(md):
    md = CODE.sub("", md)
    return [(tex, True) for tex in DISPLAY.findall(md)] + [(tex, False) for tex in INLINE.findall(DISPLAY.sub("", md))]


def broken(path, link):
    "What is wrong with a link on the page at `path`; empty where nothing is."
    url = urlsplit(link)
    if url.scheme in ("http", "https"): return "" if re.fullmatch(r"https://[\w.-]+\.\w+(:\d+)?(/\S*)?", link) else "is no https address"
    if url.scheme: return "" if url.scheme in ("mailto", "attachment") else f"has the scheme {url.scheme}"
    return "" if not url.path or (path.parent/unquote(url.path)).exists() else "leads nowhere"


def test_links():
    wrong = [f"{where}: {link} {why}" for where, path, md in texts() for link in links(md) if (why := broken(path, link))]
    assert not wrong, "\n".join(wrong)


def refused(formulas):
    if not (shutil.which("node") and (ROOT/".node"/"node_modules"/"katex").is_dir()):
        missing = "KaTeX is not here: `make test` installs it where npm is"
        pytest.fail(missing) if os.environ.get("CI") == "true" else pytest.skip(missing)
    done = subprocess.run(["node", ROOT/"tools"/"katex_check.mjs"], input=json.dumps(formulas), capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_formulas():
    wrong = refused([(f"{where}: {tex.strip()[:60]}", tex, display) for where, _, md in texts() for tex, display in formulas(md)])
    assert not wrong, "\n".join(wrong)


def test_what_is_found():
    md = ('[![a](https://x.org/a.svg)](https://x.org/b) ![c](c.png) [d](d.ipynb#e "title") `[f](g)` $x[1](2)$ <img src="h.png"> [a [b]](i.md)\n'
          "$$\ny = 1\n$$\nIt costs $5 and $6. `$z$` and $h_t$\n```\n$$n$$\n```")
    assert links(md) == ["c.png", "d.ipynb#e", "h.png", "https://x.org/a.svg", "https://x.org/b", "i.md"]
    assert formulas(md) == [("\ny = 1\n", True), ("x[1](2)", False), ("h_t", False)]
    assert broken(ROOT/"README.md", "nowhere.md") and broken(ROOT/"README.md", "http://x.org") and broken(ROOT/"README.md", "https://x.org/a b")
    assert not broken(ROOT/"README.md", "pyproject.toml#x") and not broken(ROOT/"README.md", "https://x.org/a_b?c=d#e")


def test_a_wrong_formula_is_refused():
    assert [r.split(":")[0] for r in refused([("good", r"\bar{A}_t = \exp(\Delta A)", True), ("command", r"\nosuch{x}", False), ("brace", r"\frac{1}{2", False), ("text", "α ≤ β und ä", False)])] == ["command", "brace", "text"]
