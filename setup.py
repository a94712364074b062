"""Build metadata that changes with the code: read from settings.ini, the version from the package itself."""
import ast
from configparser import ConfigParser
from pathlib import Path
from setuptools import find_packages, setup

here = Path(__file__).parent
cfg = ConfigParser(delimiters=["="])
cfg.read(here/"settings.ini", encoding="utf-8")
cfg = cfg["DEFAULT"]


def lines(key): return [line.strip() for line in cfg[key].splitlines() if line.strip()]


def version():
    tree = ast.parse((here/cfg["lib_path"]/"__init__.py").read_text(encoding="utf-8"))
    return next(ast.literal_eval(n.value) for n in tree.body
                if isinstance(n, ast.Assign) and n.targets[0].id == "__version__")


extras = {key.removesuffix("_requirements").replace("_", "-"): lines(key) for key in cfg if key.endswith("_requirements")}
setup(version=version(), description=cfg["description"], install_requires=lines("requirements"), extras_require=extras,
      packages=find_packages(include=[cfg["lib_path"], cfg["lib_path"] + ".*"]), include_package_data=True,
      package_data={cfg["lib_path"]: ["py.typed"]},
      entry_points={"console_scripts": lines("console_scripts"),
                    "nbdev": [f"{cfg['lib_path']}={cfg['lib_path']}._modidx:d"]})
