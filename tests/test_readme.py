"""README.md is the landing page, and the commands it gives exist."""
import re
import shlex
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT/"tools"))


def test_readme_is_written_from_the_index():
    from readme import readme
    assert (ROOT/"README.md").read_text(encoding="utf-8") == readme(), "run `make readme`"


def shell_lines():
    text = (ROOT/"README.md").read_text(encoding="utf-8")
    for block in re.findall(r"```sh\n(.*?)```", text, re.S):
        yield from (line.split("    #")[0].strip() for line in block.splitlines() if line.strip())


def test_commands_exist():
    from hsi_mamba_nb.cli import _parser
    targets = set(re.findall(r"^([a-z]+):", (ROOT/"Makefile").read_text(), re.M))
    seen = set()
    for line in shell_lines():
        for command in re.split(r"; (?:do )?|&& ", line):
            words = shlex.split(command)
            if words[:1] == ["make"]:
                assert words[1] in targets, line
                seen.add(words[1])
            elif words[:1] == ["hsi-mamba"]:
                _parser().parse_args([w.replace("$s", "0") for w in words[1:]])
                seen.add(words[1])
    assert {"demo", "test", "fit", "evaluate", "map", "split", "doctor"} <= seen
