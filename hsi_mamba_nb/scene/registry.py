"""Scenes by name: where their files lie under HSI_DATA, and what to say where they do not."""
import difflib
import os
from dataclasses import dataclass, replace
from pathlib import Path

from hsi_mamba_nb.errors import InputError
from hsi_mamba_nb.scene.scene import Scene, read_scene

__all__ = ["Card", "data_folder", "is_here", "list_scenes", "load_scene", "open_again"]


@dataclass(frozen=True)
class Card:
    "What is known of a scene before its files are read."
    name: str
    title: str
    size: str  # rows x columns x bands
    licence: str
    files: dict = None  # role -> path under the data folder; none for a scene that is made, not read
    class_names: tuple = ()
    where: str = ""  # how to get the files


_CARDS = {c.name: c for c in (
    Card("synthetic", "fields, roads, roofs and water from a generator with known spectra", "64 x 64 x 64", "none needed: generated"),
    Card("salinas-a", "AVIRIS, Salinas Valley, California: six crop stages", "83 x 86 x 204", "no formal licence; cite the provider (GIC, University of the Basque Country)",
         dict(cube="salinas_a/SalinasA_corrected.mat", labels="salinas_a/SalinasA_gt.mat"),
         ("Brocoli green weeds 1", "Corn senesced green weeds", "Lettuce romaine 4wk", "Lettuce romaine 5wk", "Lettuce romaine 6wk", "Lettuce romaine 7wk"),
         "download SalinasA_corrected.mat and SalinasA_gt.mat from the page 'Hyperspectral Remote Sensing Scenes' of the University of the Basque Country"),
)}


def data_folder() -> Path:
    "Where scenes lie: the environment variable HSI_DATA, else ~/hsi-data."
    return Path(os.environ.get("HSI_DATA") or Path.home()/"hsi-data")


def list_scenes() -> list[Card]:
    "The cards of all scenes known by name."
    return list(_CARDS.values())


def is_here(card: Card) -> bool:
    "Whether every file of the scene is in the data folder (a generated scene always is)."
    return all((data_folder()/f).is_file() for f in (card.files or {}).values())


def load_scene(
    name: str,  # one of `list_scenes()`, e.g. "salinas-a"
    **options,  # for "synthetic": the arguments of `synthetic_scene`
) -> Scene:
    "A scene by name. Raises `InputError` that says where to get missing files and where to put them."
    if name not in _CARDS:
        near = difflib.get_close_matches(name, _CARDS, 1)
        raise InputError(f"no scene {name!r}; " + (f"did you mean {near[0]!r}?" if near else f"known by name: {', '.join(_CARDS)}; or give a file"))
    card = _CARDS[name]
    if card.files is None:
        from hsi_mamba_nb.scene.synthetic import synthetic_scene
        return replace(synthetic_scene(**options), origin=dict(scene=name, **options))
    if options:
        raise InputError(f"{name}: takes no options, got {', '.join(options)}")
    if not is_here(card):
        raise InputError(f"{name}: {' and '.join(card.files.values())} not found in {data_folder()}; {card.where}, "
                         "and put them there (or set HSI_DATA)")
    scene = read_scene(data_folder()/card.files["cube"], data_folder()/card.files["labels"], class_names=card.class_names, name=name)
    return replace(scene, licence=card.licence, origin=dict(scene=name))


def open_again(
    origin: dict,  # a scene's `origin`
) -> Scene:
    "The scene an `origin` describes: by name where it came by name, else from its files."
    if not origin:
        raise InputError("the scene of this run was made from arrays; give it with --scene and --labels")
    return load_scene(origin["scene"], **{k: v for k, v in origin.items() if k != "scene"}) if "scene" in origin else read_scene(**origin)
