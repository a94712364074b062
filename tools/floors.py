"""The oldest versions that settings.ini promises, as a constraints file.  Usage: floors.py > floors.txt"""
import re
from configparser import ConfigParser
from pathlib import Path

TOOLS = {"fastcore"}  # nbdev, which runs the tests, needs a newer one

if __name__ == "__main__":
    settings = ConfigParser(delimiters=["="])
    settings.read(Path(__file__).resolve().parent.parent/"settings.ini", encoding="utf-8")
    for name, floor in re.findall(r"^([\w-]+)>=([\d.]+)", settings["DEFAULT"]["requirements"], re.M):
        print(f"{name}=={floor}.*" if name not in TOOLS else f"{name}>={floor}")
