"""Scenes by name: what is known of each, where its files lie under HSI_DATA, and how to get them where they do not."""
import difflib
import os
from dataclasses import dataclass, field, replace
from functools import partial
from math import prod
from pathlib import Path

import numpy as np

from hsi_mamba_nb.errors import InputError
from hsi_mamba_nb.scene.formats import read_file, read_scene
from hsi_mamba_nb.scene.scene import Scene

__all__ = ["Card", "File", "data_folder", "fetch_scene", "get_card", "is_here", "list_scenes", "load_scene", "missing", "open_again"]

_ANY = (".mat", ".tif", ".hdr", ".npy", ".npz")  # what `cube.*` stands for


@dataclass(frozen=True)
class File:
    "A file of a scene, and how to get it."
    path: str  # under the data folder; an ending of .* leaves the format to you
    sha1: str | None = None  # git blob hash
    size: int | None = None  # bytes
    mirrors: tuple = ()  # addresses that hold these very bytes


@dataclass(frozen=True, eq=False)
class Card:
    "What is known of a scene before its files are read."
    name: str
    title: str
    shape: tuple  # (rows, columns, bands); empty where not known
    licence: str
    files: dict | None = None  # role -> File; none for a scene that is made, not read
    class_names: tuple = ()  # in the order of the label values; empty: "class <value>"
    classes: int = 0  # how many; 0 where not known
    sensor: str = ""
    where: str = ""  # who has the files
    note: str = ""  # what to know before you use it
    reading: dict = field(default_factory=dict)  # more arguments of `read_scene`
    legacy_tls: bool = False  # its server may be asked without secure renegotiation although no checksum is known

    @property
    def size(self) -> str: return " x ".join(map(str, self.shape)) or "size unknown"
    @property
    def fetchable(self) -> bool: return bool(self.files) and all(f.mirrors for f in self.files.values())
    @property
    def folder(self) -> Path: return (data_folder()/next(iter(self.files.values())).path).parent


def _ehu(path): return f"https://www.ehu.eus/ccwintco/uploads/{path}"
def _hybridsn(name): return f"https://raw.githubusercontent.com/gokriznastic/HybridSN/master/data/{name}"


def _pair(folder, cube, labels, copied=False):
    "The files of a scene at the University of the Basque Country: (path there, sha1, bytes) each; some are copied elsewhere."
    return {role: File(f"{folder}/{(name := path.rpartition('/')[2])}", sha1, size, (_ehu(path), *([_hybridsn(name)] if copied else [])))
            for role, (path, sha1, size) in dict(cube=cube, labels=labels).items()}


def _by_hand(folder): return dict(cube=File(f"{folder}/cube.*"), labels=File(f"{folder}/labels.*"))
def _names(text): return tuple(text.split(", "))


_EHU = "University of the Basque Country (GIC), page 'Hyperspectral Remote Sensing Scenes'"
_GIC = "GIC, University of the Basque Country"
_CITE = f"no formal licence; cite the provider, {_GIC}"
_GRSS = "redistribution not allowed (IEEE GRSS Data Fusion Contest)"
_WHU = "redistribution not allowed; cite RSIDEA, Wuhan University"
_UNHASHED = "no published checksum: checked by its array's shape"

_CARDS = {c.name: c for c in (
    Card("synthetic", "fields, roads, roofs and water from a generator with known spectra", (64, 64, 64), "none needed: generated"),
    Card("salinas-a", "a corner of Salinas Valley: six crop stages", (83, 86, 204), _CITE,
         _pair("salinas_a", ("d/df/SalinasA_corrected.mat", "90ca5fd2a4e06691605112d6c168d2e682c3e95f", 1539086),
               ("a/aa/SalinasA_gt.mat", "68eb51f938e2305c5d7ca61a0ee5906516d70008", 587)),
         _names("Brocoli green weeds 1, Corn senesced green weeds, Lettuce romaine 4wk, Lettuce romaine 5wk, Lettuce romaine 6wk, Lettuce romaine 7wk"),
         6, "AVIRIS", _EHU),
    Card("indian-pines", "farmland and forest in Indiana", (145, 145, 200), f"no formal licence; cite Purdue University and {_GIC}",
         _pair("indian_pines", ("6/67/Indian_pines_corrected.mat", "75b6d6e7df046fce91eda23e7559e274c92da711", None),
               ("c/c4/Indian_pines_gt.mat", "8e308e6d2ad7cbb81dc1cd7849a2b7b768f4be6d", 1125), copied=True),
         _names("Alfalfa, Corn-notill, Corn-mintill, Corn, Grass-pasture, Grass-trees, Grass-pasture-mowed, Hay-windrowed, Oats, Soybean-notill, "
                "Soybean-mintill, Soybean-clean, Wheat, Woods, Buildings-Grass-Trees-Drives, Stone-Steel-Towers"), 16, "AVIRIS", _EHU),
    Card("pavia-u", "the university's quarter of Pavia", (610, 340, 103), f"no formal licence; cite University of Pavia and {_GIC}",
         _pair("pavia_u", ("e/ee/PaviaU.mat", "6eecc933bedec1130bb046483dd12e25cf091b24", None),
               ("5/50/PaviaU_gt.mat", "85d57a7f2fec6fc2b05a810b31808b88f9357dc6", 11005), copied=True),
         _names("Asphalt, Meadows, Gravel, Trees, Painted metal sheets, Bare soil, Bitumen, Self-blocking bricks, Shadows"), 9, "ROSIS", _EHU),
    Card("salinas", "Salinas Valley: vegetables and vineyards", (512, 217, 204), _CITE,
         _pair("salinas", ("a/a3/Salinas_corrected.mat", "2a745377a77369bd5a9d430c722f0bf5e0d0ffc1", None),
               ("f/fa/Salinas_gt.mat", "a0781d95c9fa20bb3c31751a0cf24b7dc09be65b", 4277), copied=True),
         _names("Brocoli green weeds 1, Brocoli green weeds 2, Fallow, Fallow rough plow, Fallow smooth, Stubble, Celery, Grapes untrained, "
                "Soil vinyard develop, Corn senesced green weeds, Lettuce romaine 4wk, Lettuce romaine 5wk, Lettuce romaine 6wk, Lettuce romaine 7wk, "
                "Vinyard untrained, Vinyard vertical trellis"), 16, "AVIRIS", _EHU),
    Card("ksc", "Kennedy Space Center, Florida: wetlands", (512, 614, 176), _CITE,
         _pair("ksc", ("2/26/KSC.mat", None, None), ("a/a6/KSC_gt.mat", None, None)),
         _names("Scrub, Willow swamp, Cabbage palm hammock, Cabbage palm/oak hammock, Slash pine, Oak/broadleaf hammock, Hardwood swamp, "
                "Graminoid marsh, Spartina marsh, Cattail marsh, Salt marsh, Mud flats, Water"),
         13, "AVIRIS", _EHU, _UNHASHED, dict(key="KSC"), legacy_tls=True),
    Card("botswana", "Okavango Delta, Botswana: swamps and woodlands", (1476, 256, 145), _CITE,
         _pair("botswana", ("7/72/Botswana.mat", None, None), ("5/58/Botswana_gt.mat", None, None)),
         _names("Water, Hippo grass, Floodplain grasses 1, Floodplain grasses 2, Reeds, Riparian, Firescar, Island interior, Acacia woodlands, "
                "Acacia shrublands, Acacia grasslands, Short mopane, Mixed mopane, Exposed soils"),
         14, "Hyperion", _EHU, _UNHASHED, dict(key="Botswana"), legacy_tls=True),
    Card("samson", "rock, tree, water: what covers 80 % of a pixel", (95, 95, 156), "no formal licence",
         dict(cube=File("samson/samson_1.mat"), labels=File("samson/end3.mat")), _names("rock, tree, water"), 3, "SAMSON",
         "michalhuras/Unsupervised-hyperspectral-image-classification on GitHub",
         reading=dict(labels_key="A", purity=.8, wavelengths_nm=np.linspace(401, 889, 156))),
    Card("berlin", "Berlin-Urban-Gradient 2009, a part of the city", (100, 67, 111), "CC BY-SA 4.0; cite Okujeni et al. 2016, doi 10.5880/enmap.2016.002",
         dict(cube=File("berlin/HyMap02_Berlin_Urban_Gradient_2009.bsq"), header=File("berlin/HyMap02_Berlin_Urban_Gradient_2009.hdr"),
              labels=File("berlin/berlin_hymap02_labels_9m.tif")), _names("roof, pavement, low vegetation, tree, soil, water"), 6, "HyMap",
         "doi 10.5880/enmap.2016.002", "labels: the class that covers 75 % of a pixel"),
    Card("houston-2013", "campus of the University of Houston", (349, 1905, 144), _GRSS, _by_hand("houston_2013"), classes=15, sensor="CASI",
         where="IEEE GRSS Data Fusion Contest 2013 (form)"),
    Card("houston-2018", "campus of the University of Houston, five years on", (601, 2384, 48), _GRSS, _by_hand("houston_2018"), classes=20, sensor="CASI",
         where="IEEE GRSS Data Fusion Contest 2018 (form)", note="labels finer than the cube"),
    Card("whu-hi-longkou", "farmland in Longkou, Hubei, from a drone", (550, 400, 270), _WHU, _by_hand("whu_hi_longkou"), classes=9,
         where="WHU-Hi by RSIDEA, Wuhan University (form)"),
    Card("whu-hi-hanchuan", "farms and houses in Hanchuan, Hubei, from a drone", (1217, 303, 274), _WHU, _by_hand("whu_hi_hanchuan"), classes=16,
         where="WHU-Hi by RSIDEA, Wuhan University (form)"),
    Card("whu-hi-honghu", "farmland in Honghu, Hubei, from a drone", (940, 475, 270), _WHU, _by_hand("whu_hi_honghu"), classes=22,
         where="WHU-Hi by RSIDEA, Wuhan University (form)"),
    Card("xiongan", "Xiong'an New Area", (1580, 3750, 256), "redistribution not allowed", _by_hand("xiongan"),
         where="the providers of the Xiong'an scene (form)"),
    Card("ln01", "a scene of recent papers on state-space models", (), "redistribution not allowed", _by_hand("ln01"),
         where="the authors of the papers that use it, on request"),
)}


def data_folder() -> Path:
    "Where scenes lie: the environment variable HSI_DATA, else ~/hsi-data."
    return Path(os.environ.get("HSI_DATA") or "~/hsi-data").expanduser()


def list_scenes() -> list[Card]:
    "The cards of all scenes known by name."
    return list(_CARDS.values())


def get_card(
    name: str,  # one of `list_scenes()`, e.g. "salinas-a"
) -> Card:
    "The card of a scene; an unknown name is refused with the nearest known one."
    if name in _CARDS:
        return _CARDS[name]
    near = difflib.get_close_matches(name.lower().replace("_", "-"), _CARDS, 1)
    raise InputError(f"no scene {name!r}; " + (f"did you mean {near[0]!r}?" if near else f"known by name: {', '.join(_CARDS)}; or give a file"))


def _find(file):
    "Where a file lies: in its folder, else flat in the data folder; none where it is missing."
    at = data_folder()/file.path
    places = [at.with_suffix(s) for s in _ANY] if at.suffix == ".*" else [at, data_folder()/at.name]
    return next((p for p in places if os.path.isfile(p)), None)  # False, too, where a folder is closed to us


def missing(card: Card) -> list[File]:
    "The files of a scene that are not in the data folder; a generated scene misses none."
    return [f for f in (card.files or {}).values() if _find(f) is None]


def is_here(card: Card) -> bool:
    "Whether every file of the scene is in the data folder (a generated scene always is)."
    return not missing(card)


def _by_hand_way(card):
    "Where to get what is missing of a scene, and where to put it."
    names = " and ".join(Path(f.path).name for f in missing(card))
    free = f" (.* is {', '.join(_ANY[:-1])} or {_ANY[-1]})" if ".*" in names else ""
    return f"get it from {card.where}, and put {names} in {card.folder}{free}"


def load_scene(
    name: str,  # one of `list_scenes()`, e.g. "salinas-a"
    **options,  # for "synthetic": the arguments of `synthetic_scene`; else `labels`, `drop_bands`, `nodata` of `read_scene`
) -> Scene:
    "A scene by name. Raises `InputError` that says where to get missing files and where to put them."
    card = get_card(name)
    if card.files is None:
        from hsi_mamba_nb.scene.synthetic import synthetic_scene
        return replace(synthetic_scene(**options), origin=dict(scene=name, **options))
    if unknown := set(options) - {"labels", "drop_bands", "nodata"}:
        raise InputError(f"{name}: takes labels, drop_bands and nodata, not {', '.join(unknown)}")
    if gone := missing(card):
        way = f"run `hsi-mamba fetch {name}`, or {_by_hand_way(card)}" if card.fetchable else _by_hand_way(card)
        raise InputError(f"{name}: {' and '.join(f.path for f in gone)} not found in {data_folder()}; {way}; HSI_DATA names another data folder")
    own = dict(labels=_find(card.files["labels"]), class_names=card.class_names, **card.reading)
    if "labels" in options:  # another map has classes of its own
        own = {k: v for k, v in own.items() if k not in ("class_names", "labels_key", "purity")}
    scene = read_scene(_find(card.files["cube"]), name=name, **own | options)
    again = {k: v for k, v in options.items() if k != "labels"} | ({"labels": scene.origin["labels"]} if scene.origin["labels"] and "labels" in options else {})
    return replace(scene, licence=card.licence, origin=dict(scene=name, **again))


def _wrong_array(path, key, shape):
    "What is wrong with a file that should hold an array of this shape; empty where nothing is."
    try:
        held = {k: v.shape for k, v in read_file(path).arrays.items()}
    except InputError as e:
        return str(e).removeprefix(f"{path}: ")
    fits = shape in (held.values() if key is None else [held.get(key)])
    return "" if fits else f"holds {', '.join(f'{k} {v}' for k, v in held.items()) or 'no array'}, not {key or 'an array'} {shape}"


def _checks(card, role):
    "How `download` and `fault` check a file: by checksum where there is one, else by the array in it."
    file = card.files[role]
    if file.sha1 or not file.mirrors:
        return dict(sha1=file.sha1, size=file.size)
    key, shape = (card.reading.get("key"), card.shape) if role == "cube" else (None, card.shape[:2])
    return dict(check=partial(_wrong_array, key=key, shape=shape))


def fetch_scene(
    name: str,  # one of `list_scenes()`, e.g. "salinas-a"
    progress: bool = True,  # show a bar a file
    overwrite: bool = False,  # replace a file that is here and not what it should be
) -> list[Path]:  # the scene's files, downloaded or found
    "Download what is missing of a scene, and check what is here already."
    from hsi_mamba_nb.scene.download import download, fault
    card = get_card(name)
    if card.files is None:
        raise InputError(f"{name}: is generated and needs no download; use it by its name")
    if missing(card) and not card.fetchable:
        raise InputError(f"{name}: cannot be downloaded from here ({card.licence}); {_by_hand_way(card)}; HSI_DATA names another data folder")
    paths = {role: _find(f) for role, f in card.files.items()}
    bad = {role: why for role, path in paths.items() if path and (why := fault(path, **_checks(card, role)))}
    for role, why in bad.items():
        if not (overwrite and card.fetchable):
            way = f"replace it with `hsi-mamba fetch {name} --overwrite`" if card.fetchable else f"get it again from {card.where}"
            raise InputError(f"{paths[role]}: {why}; {way}")
    for role, f in card.files.items():
        if not paths[role] or role in bad:  # what is here and good needs no folder that can be written to
            paths[role] = download(f.mirrors, paths[role] or data_folder()/f.path, limit=8*prod(card.shape) + 10**6,
                                   legacy_tls=card.legacy_tls, progress=progress, **_checks(card, role))
    return list(paths.values())


def open_again(
    origin: dict,  # a scene's `origin`
) -> Scene:
    "The scene an `origin` describes: by name where it came by name, else from its files."
    if not origin:
        raise InputError("the scene of this run was made from arrays; give it with --scene and --labels")
    return load_scene(origin["scene"], **{k: v for k, v in origin.items() if k != "scene"}) if "scene" in origin else read_scene(**origin)
