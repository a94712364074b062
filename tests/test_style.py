"""The style gate on every notebook, and the gate itself: a good notebook passes, each fault is found by its rule."""
import json

import gate
import pytest
from conftest import ROOT

NOTEBOOKS = gate.notebooks()
PATH = ROOT/"nbs"/"2_scan"/"29_double.ipynb"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=[p.relative_to(ROOT/"nbs").as_posix() for p in NOTEBOOKS])
def test_gate(path):
    found = gate.findings(gate.Notebook(path))
    assert not found, "\n".join(found)


GOOD = f"""%%%% md
# Does it double?
> It does, whatever the shape.
%%%% md
{gate.BADGE.format(repo=gate.REPO, branch=gate.BRANCH, path="nbs/2_scan/29_double.ipynb")}
%%%% code
{gate.INSTALL}
%%%% md
After this you can double.
%%%% code
#| default_exp scan.double
%%%% md
$$ y = 2x $$
%%%% code
#| export
import numpy as np
from numpy import ndarray
%%%% code
#| exports
def double(
    x:ndarray, # (n,) what to double
    *,
    times:int = 1, # how often
) -> ndarray: # (n,)
    "x + x, `times` times."
    return x*2**times
%%%% md
It is linear.
%%%% code
#| fig-alt: "A rising line."
plt.plot(double(np.arange(3)))
%%%% md
The line rises by two.
## Break it
Is half a double?
%%%% code
compare(double(np.arange(3)), np.arange(3)*2)
with expect_fail(): compare(double(np.arange(3)), np.arange(3)/2)
%%%% md
## Exercises
Undo it.
%%%% code
def halve(x): raise NotImplementedError
def check_halve(f): compare(f(2), 1)
attempt(check_halve, halve)
%%%% md
## Solutions
%%%% code
check_halve(lambda x: x/2)
with expect_fail(): check_halve(lambda x: x/3)
%%%% code
{gate.LAST.format(name="29_double.ipynb")}"""


def notebook(text=GOOD, edit=lambda cells: None):
    cells = []
    for part in text.split("%%%% ")[1:]:
        kind, source = part.split("\n", 1)
        cell = dict(cell_type="markdown" if kind == "md" else "code", source=source.rstrip("\n"), metadata={})
        if kind == "code":
            data = {"data": {"image/png": "x"}, "output_type": "display_data"} if "plt.plot" in source else {"text": "1.0", "output_type": "stream", "name": "stdout"}
            cell |= dict(execution_count=None, outputs=[data])
        cells.append(cell)
    edit(cells)
    return gate.Notebook(PATH, json.dumps(dict(cells=cells)))


def test_a_good_notebook_passes():
    assert gate.findings(notebook()) == gate.findings(notebook(), "warn") == []


LONG = "\n".join("1 + 1" for _ in range(26))
FAULTS = [  # (rule, text of GOOD, what it becomes)
    ("head", "double?", "double"), ("head", "whatever the shape.", "whatever the shape.\n\nMore."), ("head", "/blob/main/", "/blob/master/"), ("head", "install -q", "install"),
    ("address", "scan.double", "scan.triple"), ("last", "#| eval: false\n", ""), ("syntax", "double(np.arange(3)))", "double("),
    ("paths", "Undo it.", "Undo /tmp/it."), ("paths", "np.arange(3)*2)", "np.load('/work/x.npy'))"), ("length", "check_halve(lambda x: x/2)", "check_halve(lambda x: x/2)\n" + LONG),
    ("silence", "%%%% md\nIt is linear.", "%%%% code\n1\n%%%% code\n1"), ("share", "Undo it.", "Undo it.\n" + "%%%% code\n1\n%%%% code\n2\n%%%% code\n3\n"*5),
    ("size", "Undo it.", "Undo it. " + "x"*2**20), ("named", "#| exports", "#| exports\nN = 3"), ("tested", "compare(double(np.arange(3)), np.arange(3)*2)", "1"),
    ("tested", "expect_fail()", "suppress(Exception)"), ("exported", "#| exports", "#| export"), ("exported", "#| exports", "#| exporti"),
    ("definition_length", "    return x*2", "    x = x\n"*30 + "    return x*2"), ("documented", "times:int = 1, # how often", "times:int = 1,"), ("documented", ' # (n,) what to double\n    *,\n   ', " *,"),
    ("documented", '    "x + x, `times` times."\n', ""), ("alternative", '#| fig-alt: "A rising line."\n', ""), ("alternative", '"A rising line."', '""'),
    ("imports", "import numpy as np", "import numpy as np\nN = 3"), ("imports", "from numpy import ndarray", "from .errors import InputError"), ("imports", "from numpy import ndarray", "from hsi_mamba_nb.scan import *"),
    ("dead", "plt.plot", "if False: plt.plot"), ("dead", "compare(double", "# compare(double"), ("dead", "compare(double", "# assert x == 2\ncompare(double"), ("dead", "compare(double", "# with expect_fail():\ncompare(double"),
    ("unused", "check_halve(lambda x: x/2)", "check_halve(lambda x: x/2)\nnp.allclose(1, 2)"), ("unused", "check_halve(lambda x: x/2)", "check_halve(lambda x: x/2)\nprint(torch.allclose(a, b))"),
    ("exercises", "attempt(check_halve, halve)", "halve"), ("exercises", "## Solutions", "## More"), ("exercises", "check_halve(lambda x: x/2)", "1"), ("exercises", "expect_fail(): check_halve(lambda x: x/3)", "expect_fail(): 1"),
]


@pytest.mark.parametrize("rule, old, new", FAULTS, ids=[f"{rule}-{i}" for i, (rule, _, _) in enumerate(FAULTS)])
def test_a_fault_is_found_by_its_rule(rule, old, new):
    assert old in GOOD
    assert rule in [f.split()[1].rstrip(":") for f in gate.findings(notebook(GOOD.replace(old, new)))]


def first(text, **change): return lambda cells: next(c for c in cells if text in c["source"]).update(change)
def shown(**change): return lambda cells: next(c for c in cells if "fail()" in c["source"])["outputs"][0].update(change)


OUTPUTS = {"no outputs": lambda cells: [c.update(outputs=[]) for c in cells if "outputs" in c], "yet has no output": first("expect_fail()", outputs=[]),
           "no figure": first("plt.plot", outputs=[]), "execution count": first("plt.plot", execution_count=1), "holds an error": shown(output_type="error"),
           "stderr": shown(name="stderr"), "one machine": shown(text="in /root/x.py")}


@pytest.mark.parametrize("message", OUTPUTS)
def test_a_faulty_output_is_found(message):
    assert message in "\n".join(gate.findings(notebook(edit=OUTPUTS[message])))


def test_every_rule_has_a_fault():
    assert {f.__name__ for level, f in gate.RULES if level == "fail"} == {rule for rule, _, _ in FAULTS} | {"outputs"}
