"""Each fact stands once, and what is derived from another file is up to date."""
import re
from configparser import ConfigParser

import gate
import sidebar
import yaml
from conftest import ROOT

PROJECT = gate.PYPROJECT["project"]
MINORS = re.findall(r"Python :: (3\.\d+)", "\n".join(PROJECT["classifiers"]))


def read(name): return (ROOT/name).read_text(encoding="utf-8")


def settings():
    config = ConfigParser(delimiters=["="])
    config.read(ROOT/"settings.ini", encoding="utf-8")
    return dict(config["DEFAULT"])


def test_settings_and_pyproject_share_no_fact():
    known = {k.replace("-", "_") for k in PROJECT} | set(gate.PYPROJECT["tool"]["nbdev"])
    assert not known & settings().keys()
    assert not {"version", "description", "dependencies"} & PROJECT.keys(), "setup.py gives these"
    values = [v for v in settings().values() if len(v) > 20]
    assert not [v for v in values if v in read("pyproject.toml")]
    assert not (ROOT/"setup.cfg").exists()


def test_version_stands_in_the_package_alone():
    version = re.search(r'__version__ = "([\d.]+)"', read(f"{gate.PACKAGE}/__init__.py"))[1]
    for name in ("pyproject.toml", "settings.ini", "setup.py", "CITATION.cff"): assert f'"{version}"' not in read(name) and f": {version}" not in read(name)


def test_citation():
    cite = yaml.safe_load(read("CITATION.cff"))
    assert {"cff-version", "message", "title", "authors"} <= cite.keys()
    assert str(cite["cff-version"]) == "1.2.0" and cite["type"] == "software"
    assert cite["title"] == PROJECT["name"] and cite["license"] == PROJECT["license"] and cite["repository-code"] == PROJECT["urls"]["Repository"]
    assert [a["name"] for a in cite["authors"]] == [a["name"] for a in PROJECT["authors"]]


def test_licence_is_the_one_named():
    assert PROJECT["license"] == "Apache-2.0" and PROJECT["license-files"] == ["LICENSE"]
    assert "Apache License\n                           Version 2.0" in read("LICENSE") and "END OF TERMS AND CONDITIONS" in read("LICENSE")


def test_python_versions_agree():
    assert PROJECT["requires-python"] == f">={MINORS[0]}"
    assert yaml.safe_load(read(".github/workflows/test.yaml"))["jobs"]["test"]["strategy"]["matrix"]["python"] == MINORS


def test_workflows_are_yaml_with_jobs():
    files = sorted((ROOT/".github"/"workflows").iterdir())
    assert {f.name for f in files} >= {"test.yaml", "docs.yaml", "release.yaml", "weekly.yaml"} and all(f.suffix == ".yaml" for f in files)
    for f in files: assert yaml.safe_load(f.read_text(encoding="utf-8"))["jobs"]


def test_constraints_pin_every_requirement_above_its_floor():
    pins = dict(re.findall(r"^([\w-]+)==([\d.]+)$", read("constraints.txt").lower(), re.M))
    number = lambda v: tuple(map(int, v.split(".")))
    needs = re.findall(r"^([\w-]+)>=([\d.]+)", settings()["requirements"] + "\n" + settings()["dev_requirements"], re.M)
    assert len(needs) > 15
    for name, floor in needs:
        if name != "setuptools": assert number(pins[name]) >= number(floor), name
    assert pins["torch"], "asked for exactly, torch comes as its CPU build"


def test_site_files():
    assert (ROOT/"nbs"/"_quarto.yml").is_symlink() and (ROOT/"nbs"/"_quarto.yml").resolve() == ROOT/"_quarto.yml"
    assert read("nbs/sidebar.yml") == sidebar.sidebar(), "run python tools/sidebar.py"
    for name in ("_quarto.yml", "nbs/nbdev.yml", "nbs/sidebar.yml"): assert yaml.safe_load(read(name))
