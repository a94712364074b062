"""The style gate: one row a notebook, then what a script can find wrong with it.  Usage: gate.py [NOTEBOOK_OR_FOLDER ...]

A rule is a function of a `Notebook` that yields (cell number or None, message); `fail` rules are tests, `warn` rules advice."""
import ast
import io
import json
import re
import statistics
import sys
import tokenize
import tomllib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PYPROJECT = tomllib.loads((ROOT/"pyproject.toml").read_text(encoding="utf-8"))
NAME = PYPROJECT["project"]["name"]
PACKAGE = NAME.replace("-", "_")
REPO = PYPROJECT["project"]["urls"]["Repository"].removeprefix("https://github.com/")
BRANCH = PYPROJECT["tool"]["nbdev"]["branch"]
BADGE = ("[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]"
         "(https://colab.research.google.com/github/{repo}/blob/{branch}/{path})")
INSTALL = f'#| hide\nfrom importlib.util import find_spec\nif find_spec("{PACKAGE}") is None:\n    %pip install -q {NAME}'
LAST = '#| hide\n#| eval: false\nfrom nbdev.export import nb_export\nnb_export("{name}", "../../' + PACKAGE + '")'

DIRECTIVE = re.compile(r"^\s*#\s*\|\s*([\w-]+):?[ \t]*(.*)$", re.M)
PLOT = re.compile(r"plt\.(subplots|subplot_mosaic|figure|plot|scatter|bar|imshow|hist)|(\w+\.)*show_(image|labels|spectra)")
EQUATION = re.compile(r"\$\$|\\begin\{(?:align|equation)")
MACHINE = re.compile(r"(?<![\w.~:/-])/(?:work|tmp|root|home)\b[\w./-]*")
DEFINITION = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
CHECK = re.compile(r"compare|expect_fail|same_with_gradients|(check|test|assert)_\w+")
VALUE = {"allclose", "isclose", "array_equal", "array_equiv", "equal"}  # says yes or no, raises nothing


def called(node):
    "The name that a call calls: `f` for f(...) and for a.b.f(...)."
    f = node.func if isinstance(node, ast.Call) else None
    return f.id if isinstance(f, ast.Name) else f.attr if isinstance(f, ast.Attribute) else ""


def is_check(node): return isinstance(node, ast.Assert) or bool(CHECK.fullmatch(called(node)))
def expects_failure(node): return isinstance(node, ast.With) and any(called(i.context_expr) == "expect_fail" for i in node.items)


def walk_run(node):
    "Nodes that surely run to their end with the cell: nothing inside a definition, a lambda, an `if`, an `except` or an expected failure."
    for child in [i.context_expr for i in node.items] if expects_failure(node) else ast.iter_child_nodes(node):
        if not isinstance(child, (*DEFINITION, ast.Lambda, ast.If, ast.IfExp, ast.ExceptHandler)):
            yield child
            yield from walk_run(child)


def count_checks(node):
    "An expected failure is one check with all it holds; what a definition holds is none until it is called."
    if isinstance(node, DEFINITION): return 0
    return 1 if expects_failure(node) else is_check(node) + sum(map(count_checks, ast.iter_child_nodes(node)))


@dataclass
class Cell:
    number: int
    raw: dict

    @cached_property
    def source(self): return "".join(self.raw.get("source", ""))
    @cached_property
    def is_md(self): return self.raw["cell_type"] == "markdown"
    @cached_property
    def is_code(self): return self.raw["cell_type"] == "code" and bool(self.source.strip())
    @cached_property
    def directives(self): return dict(DIRECTIVE.findall(self.source)) if self.is_code else {}
    @cached_property
    def lines(self): return [s for s in self.source.split("\n") if s.strip() and not DIRECTIVE.match(s)]
    @property
    def outputs(self): return self.raw.get("outputs", [])
    @cached_property
    def hidden(self): return "hide" in self.directives
    @cached_property
    def evaluated(self): return self.is_code and self.directives.get("eval") != "false" and bool(self.lines)
    @cached_property
    def export(self): return next((d for d in ("export", "exports", "exporti") if d in self.directives), None)
    @cached_property
    def python(self): return re.sub(r"^(\s*)[%!].*", r"\1pass", self.source, flags=re.M) if self.is_code else ""
    @cached_property
    def tree(self):
        try: return ast.parse(self.python)
        except SyntaxError: return ast.Module([], [])
    @cached_property
    def comments(self):
        tokens = tokenize.generate_tokens(io.StringIO(self.python).readline) if self.tree.body else []
        return {t.start[0]: t.string.lstrip("# ") for t in tokens if t.type == tokenize.COMMENT}
    @cached_property
    def definitions(self): return [n for n in self.tree.body if isinstance(n, DEFINITION) and not n.name.startswith("_")]
    @cached_property
    def constants(self):
        targets = [t for n in self.tree.body if isinstance(n, (ast.Assign, ast.AnnAssign)) for t in getattr(n, "targets", [getattr(n, "target", None)])]
        return [t.id for t in targets if isinstance(t, ast.Name) and not t.id.startswith("_")]
    @cached_property
    def is_test(self): return not self.export and not self.hidden and any(is_check(n) or called(n) == "attempt" for n in ast.walk(self.tree))
    @cached_property
    def names(self): return {getattr(n, "id", getattr(n, "attr", None)) for n in ast.walk(self.tree)}
    @cached_property
    def image_bytes(self): return [len("".join(d)) for o in self.outputs for k, d in o.get("data", {}).items() if k in ("image/png", "image/svg+xml")]
    @cached_property
    def plots(self): return bool(self.image_bytes) or any(isinstance(n, ast.Call) and PLOT.fullmatch(ast.unparse(n.func)) for n in walk_run(self.tree))


class Notebook:
    def __init__(self, path, text=None):
        self.path = Path(path)
        self.text = self.path.read_text(encoding="utf-8") if text is None else text
        self.cells = [Cell(i, c) for i, c in enumerate(json.loads(self.text)["cells"])]
        self.code = [c for c in self.cells if c.is_code]
        self.md = [c for c in self.cells if c.is_md]
        shared = [c for c in self.code if c.export in ("export", "exports")]
        self.defined = [(c, d) for c in shared for d in c.definitions]
        self.public = [d.name for _, d in self.defined] + [k for c in shared for k in c.constants]
        self.exports = any("default_exp" in c.directives for c in self.code) or bool(self.public)
        self.tests = [c for c in self.code if c.is_test]
        solutions = self.after_heading("Solutions")
        self.checks = sum(count_checks(c.tree) for c in self.tests if c not in solutions)
        named = set().union(*(c.names for c in self.tests))
        self.unnamed = [n for n in self.public if n not in named]

    @property
    def relative(self):
        path = self.path.resolve()
        return path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else self.path.as_posix()

    @property
    def md_share(self): return len(self.md)/max(1, len(self.md) + len(self.code))

    def after_heading(self, word):
        "The cells after the last markdown heading that holds `word`; none where there is no such heading."
        at = [c.number for c in self.md if re.search(rf"^#+ .*{word}", c.source, re.M | re.I)]
        return self.cells[at[-1] + 1:] if at else []

    @property
    def equations(self):
        "(cell, is code within the next two cells) of each cell with a display equation"
        return [(c, any(d.is_code for d in self.cells[c.number + 1:c.number + 3])) for c in self.md if EQUATION.search(c.source)]

    @property
    def silent(self):
        "The longest run of visible code cells without prose, and where it ends."
        run = longest = end = 0
        for c in self.cells:
            run = 0 if c.is_md else run + bool(c.is_code and c.lines and not c.hidden)
            if run > longest: longest, end = run, c.number
        return longest, end


RULES = []
def fail(f): RULES.append(("fail", f))
def warn(f): RULES.append(("warn", f))


@fail
def head(nb):
    order = [c.source for c in nb.cells[:3]] + [""]*3
    if nb.exports and not re.fullmatch(r"# [^\n]+\?\n> [^\n]+", order[0]): yield 0, "not `# Question?` and `> answer`, and nothing else"
    if not order[0].startswith("# "): yield 0, "no title"
    badge = BADGE.format(repo=REPO, branch=BRANCH, path=nb.relative)
    if badge not in (order[1:2] if nb.exports else [c.source for c in nb.md]): yield 1, f"is not the badge: {badge}"
    if nb.exports and order[2] != INSTALL: yield 2, "is not the install cell, to the letter"
    if not nb.exports and INSTALL not in [c.source for c in nb.code]: yield None, "no install cell"


@fail
def address(nb):
    part, stem = re.sub(r"^\d+_", "", nb.path.parent.name), re.sub(r"^\d+[a-z]?_", "", nb.path.stem)
    for c in nb.code:
        if (m := c.directives.get("default_exp", f"{part}.{stem}")) != f"{part}.{stem}": yield c.number, f"exports to {m}, its name says {part}.{stem}"


@fail
def last(nb):
    if nb.exports and nb.cells[-1].source != LAST.format(name=nb.path.name): yield nb.cells[-1].number, "the last cell is not the export call"


@fail
def syntax(nb):
    for c in nb.code:
        try: ast.parse(c.python)
        except SyntaxError as e: yield c.number, f"does not parse: {e}"


@fail
def outputs(nb):
    run = [c for c in nb.code if c.evaluated and not c.hidden]
    kept = any(c.outputs for c in run)
    if run and not kept: yield None, "no outputs: tools/run_notebooks.py keeps them"
    for c in run if kept else ():
        prints = {called(n) for n in walk_run(c.tree)} & {"print", "display", "expect_fail", "attempt"}
        if prints and not c.outputs: yield c.number, f"calls {min(prints)}, yet has no output"
        if c.plots and not c.image_bytes and "close" not in c.names: yield c.number, "plots, yet holds no figure"
    for c in nb.code:
        if c.raw.get("execution_count") or any(o.get("execution_count") for o in c.outputs): yield c.number, "holds an execution count"
        if any(o["output_type"] == "error" for o in c.outputs): yield c.number, "holds an error"
        if any(o.get("name") == "stderr" for o in c.outputs): yield c.number, "holds a warning or other stderr"


@fail
def paths(nb):
    for c in nb.cells:
        shown = "".join(["".join(o.get("text", "")) for o in c.outputs] + ["".join(d) for o in c.outputs for k, d in o.get("data", {}).items() if k.startswith("text/")])
        for m in sorted(set(MACHINE.findall(c.source) + MACHINE.findall(shown))): yield c.number, f"a path of one machine: {m}"


@fail
def length(nb):
    for c in nb.code:
        cap = (45 if any(isinstance(d, ast.ClassDef) for d in c.tree.body) else 30) if c.export else 30 if c.plots else 25
        if len(c.lines) > cap: yield c.number, f"{len(c.lines)} lines, at most {cap}"


@fail
def silence(nb):
    run, end = nb.silent
    if run > 3: yield end, f"{run} code cells in a row without prose, at most 3"


@fail
def share(nb):
    if not .40 <= nb.md_share <= .80: yield None, f"markdown is {nb.md_share:.2f} of the cells, not .40 to .80"


@fail
def size(nb):
    if (n := len(nb.text.encode())) > 2**20: yield None, f"{n/2**20:.1f} MB, at most 1"


@fail
def named(nb):
    for n in nb.unnamed: yield None, f"{n} is exported and named in no visible test cell"


@fail
def tested(nb):
    if nb.checks < 2*len(nb.defined): yield None, f"{nb.checks} checks before the solutions for {len(nb.defined)} exported definitions, at least two each"
    if nb.exports and not any(expects_failure(n) for c in nb.tests for n in ast.walk(c.tree)): yield None, "no wrong variant in expect_fail"


@fail
def exported(nb):
    for c in nb.code:
        if c.export == "export" and any(isinstance(n, DEFINITION) for n in c.tree.body): yield c.number, "`export` is for imports and constants; functions and classes say `exports`"
        if c.export == "exporti" and (c.definitions or c.constants): yield c.number, "`exporti` is for names with an underscore"


@fail
def definition_length(nb):
    for c, d in ((c, d) for c in nb.code if c.export for d in c.tree.body if isinstance(d, DEFINITION)):
        n = sum(bool(s.strip()) for s in c.python.split("\n")[d.lineno - 1:d.end_lineno])
        if n > (cap := 45 if isinstance(d, ast.ClassDef) else 30): yield c.number, f"{d.name} has {n} lines, at most {cap}"


def parameters(d):
    "(name, annotation, first line, last line) of what a caller passes: parameters, or the fields of a dataclass."
    if isinstance(d, ast.ClassDef):
        if any("dataclass" in ast.unparse(x) for x in d.decorator_list):
            return [(n.target.id, n.annotation, n.lineno, n.end_lineno) for n in d.body if isinstance(n, ast.AnnAssign) and not n.target.id.startswith("_")]
        return next((parameters(n) for n in d.body if getattr(n, "name", "") == "__init__"), [])
    a = d.args
    defaults = [None]*(len(a.posonlyargs + a.args) - len(a.defaults)) + a.defaults + a.kw_defaults
    pairs = list(zip(a.posonlyargs + a.args + a.kwonlyargs, defaults)) + [(x, None) for x in (a.vararg, a.kwarg) if x]
    return [(x.arg, x.annotation, x.lineno, (v or x).end_lineno) for x, v in pairs if x.arg not in ("self", "cls")]


@fail
def documented(nb):
    for c, d in nb.defined:
        if not ast.get_docstring(d): yield c.number, f"{d.name} has no docstring"
        took = [p[2] for p in parameters(d)]
        for name, _, first, end in parameters(d):
            if took.count(first) > 1 or not c.comments.get(end): yield c.number, f"{d.name}: parameter {name} needs a line and a comment of its own"


@fail
def alternative(nb):
    for c in nb.code:
        if c.plots and len(c.directives.get("fig-alt", "").strip('"\' ')) < 10: yield c.number, "plots without `#| fig-alt: \"what it shows\"`"


@fail
def imports(nb):
    for c in nb.code:
        found = [n for n in c.tree.body if isinstance(n, (ast.Import, ast.ImportFrom))]
        if found and len(found) < len(c.tree.body) and not c.hidden: yield c.number, "mixes imports with other code"
        for n in ast.walk(c.tree):
            if isinstance(n, ast.ImportFrom) and n.level: yield c.number, "relative import"
            if isinstance(n, ast.ImportFrom) and (n.module or "").startswith(PACKAGE) and n.names[0].name == "*": yield c.number, f"star import from {n.module}"


@fail
def dead(nb):
    for c in nb.code:
        for n in ast.walk(c.tree):
            if isinstance(n, (ast.If, ast.While)) and isinstance(n.test, ast.Constant) and not n.test.value: yield c.number, "code behind `if False`"
        for text in (s.lstrip(" #") for s in c.source.split("\n") if re.match(r"\s*#(?!\s*\|)", s)):
            try: body = ast.parse(text + (" pass" if text.endswith(":") else "")).body
            except SyntaxError: continue
            if any(is_check(n) for b in body for n in ast.walk(b)): yield c.number, f"a test that is commented out: {text}"


@fail
def unused(nb):
    for c in nb.code:
        for n in ast.walk(c.tree):
            value = n.value if isinstance(n, ast.Expr) else None
            if called(value) in VALUE or called(value) == "print" and any(called(a) in VALUE for a in value.args):
                yield c.number, f"{ast.unparse(value)[:60]}: nothing fails when this is false"


@fail
def exercises(nb):
    def raises(d): return any(isinstance(n, ast.Raise) and "NotImplementedError" in ast.unparse(n) for n in ast.walk(d))
    stubs = {d.name: c for c in nb.code if not c.export for d in c.tree.body if isinstance(d, ast.FunctionDef) and raises(d)}
    attempts = [n for c in nb.code for n in ast.walk(c.tree) if called(n) == "attempt" and len(n.args) == 2]
    tries = {ast.unparse(n.args[1]): ast.unparse(n.args[0]) for n in attempts}
    def use(n): return ast.unparse(n.args[0]) if n in attempts and ast.unparse(n.args[1]) not in stubs else called(n)
    wrong = {n for c in nb.code for w in ast.walk(c.tree) if expects_failure(w) for b in w.body for n in ast.walk(b)}
    right = {n for c in nb.code for n in ast.walk(c.tree)} - wrong
    for stub, c in stubs.items():
        if stub not in tries: yield c.number, f"{stub} is a stub, and no attempt(check_..., {stub}) follows"
        elif tries[stub] not in map(use, right): yield c.number, f"{stub}: no solution is given to {tries[stub]}"
        elif tries[stub] not in map(use, wrong): yield c.number, f"{stub}: no wrong solution is given to {tries[stub]} in expect_fail"
    solutions = [c for c in nb.after_heading("Solutions") if c.is_code]
    if stubs and not any(expects_failure(n) for c in solutions for n in ast.walk(c.tree)): yield None, "no section Solutions, or nothing in expect_fail there"


@warn
def equation(nb):
    for c, near in nb.equations:
        if not near: yield c.number, "no code within two cells of the equation"


@warn
def sections(nb):
    for word in ("Break", "Exercises", "Solutions") if nb.exports else ():
        if not nb.after_heading(word): yield None, f"no section named {word}"


@warn
def alone(nb):
    for c in nb.code:
        if c.export and len(c.definitions) > 1: yield c.number, f"exports {', '.join(d.name for d in c.definitions)} in one cell"


@warn
def shapes(nb):
    for c, d in nb.defined:
        for name, kind, _, end in parameters(d):
            if kind and re.fullmatch(r"(torch\.)?Tensor( \| None)?|np\.ndarray( \| None)?", ast.unparse(kind)) and not c.comments.get(end, "(").startswith("("):
                yield c.number, f"{d.name}: the comment on {name} does not begin with its shape"


@warn
def weight(nb):
    for c in nb.code:
        for n in c.image_bytes:
            if n*3/4 > 150e3: yield c.number, f"a figure of {n*3/4e3:.0f} kB, at most 150"


def findings(nb, level="fail"):
    "One line each, what a rule of this level finds."
    at = lambda number: "" if number is None else f" cell {number}"
    return [f"{level} {f.__name__}:{at(number)} {message}" for kind, f in RULES if kind == level for number, message in f(nb)]


def row(nb):
    lines = [len(c.lines) for c in nb.code] or [0]
    prose = [re.sub(r"```.*?```|\$\$.*?\$\$|!?\[[^\]]*\]\([^)]*\)|<[^>]+>", "", c.source, flags=re.S) for c in nb.md]
    words = sum(len(re.findall(r"[A-Za-z][A-Za-z'-]+", p)) for p in prose)
    share = lambda a, b: f"{a/b:.2f}" if b else "-"
    return [nb.relative, f"{nb.md_share:.2f}", f"{statistics.median(lines):g} ({max(lines)})", share(words, sum(lines)), nb.silent[0],
            sum(len(c.image_bytes) for c in nb.code), share(nb.checks, len(nb.defined)), share(len(nb.public) - len(nb.unnamed), len(nb.public)),
            share(sum(near for _, near in nb.equations), len(nb.equations)), f"{len(nb.text.encode())/1024:.0f} kB", len(findings(nb)), len(findings(nb, "warn"))]


def notebooks(names=("nbs",)):
    paths = [p for n in names for p in ([Path(n)] if n.endswith(".ipynb") else sorted((ROOT/n).rglob("*.ipynb")))]
    return [p for p in paths if not any(q.startswith((".", "_")) for q in p.parts)]


def main(names):
    nbs = [Notebook(p) for p in notebooks(names or ("nbs",))]
    table = [["notebook", "md", "lines/cell", "words/line", "silent", "figures", "checks/def", "named", "eq->code", "size", "fail", "warn"]]
    table += [[str(x) for x in row(nb)] for nb in nbs]
    width = [max(map(len, column)) for column in zip(*table)]
    for r in table: print("  ".join(x.ljust(w) for x, w in zip(r, width)).rstrip())
    for nb in nbs:
        found = findings(nb) + findings(nb, "warn")
        if found: print(f"\n{nb.relative}", *found, sep="\n  ")
    return any(findings(nb) for nb in nbs)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
