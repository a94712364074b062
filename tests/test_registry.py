"""Scenes by name: what each card says, where files are looked for, what is fetched, and how the rest is refused."""
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from scipy.io import savemat
from test_cli import run

from hsi_mamba_nb.errors import InputError
from hsi_mamba_nb.scene import download as d
from hsi_mamba_nb.scene import fetch_scene, load_scene
from hsi_mamba_nb.scene import registry as r

CARDS = {c.name: c for c in r.list_scenes()}
READ = [c.name for c in CARDS.values() if c.files]
FETCHED = {"salinas-a", "indian-pines", "pavia-u", "salinas", "ksc", "botswana"}
BY_HAND = sorted(set(READ) - FETCHED)


@pytest.fixture
def folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HSI_DATA", str(tmp_path))
    return tmp_path


@pytest.fixture
def shared(monkeypatch, data):
    monkeypatch.setenv("HSI_DATA", str(data))
    return data


def refused(f, *words):
    with pytest.raises(InputError) as e: f()
    assert "\n" not in str(e.value)
    for w in words: assert w in str(e.value), (w, str(e.value))
    return str(e.value)


def test_all_are_here():
    assert set(CARDS) == FETCHED | {"synthetic", "samson", "berlin", "houston-2013", "houston-2018", "whu-hi-longkou", "whu-hi-hanchuan", "whu-hi-honghu",
                                    "xiongan", "ln01"}
    assert {c.name for c in CARDS.values() if c.fetchable} == FETCHED


@pytest.mark.parametrize("name", CARDS)
def test_a_card_is_complete(name):
    c = CARDS[name]
    assert c.title and c.licence and (c.shape or name == "ln01") and c.size
    assert len(c.class_names) in (0, c.classes) and len(set(c.class_names)) == len(c.class_names)
    if c.files:
        assert c.where and list(c.files)[0] == "cube" and "labels" in c.files
        assert len({str(Path(f.path).parent) for f in c.files.values()}) == 1, "one folder a scene"
    for f in (c.files or {}).values():
        assert f.sha1 is None or len(f.sha1) == 40 and int(f.sha1, 16)
        for url in f.mirrors: assert url.startswith("https://") and url.endswith("/" + Path(f.path).name)
        assert not f.mirrors or f.sha1 or "no published checksum" in c.note and c.legacy_tls
    assert len({f.path for c in CARDS.values() for f in (c.files or {}).values()}) == sum(len(c.files or ()) for c in CARDS.values())


def test_the_well_known_counts():
    for name, n in dict(zip(("indian-pines", "pavia-u", "salinas", "salinas-a", "ksc", "botswana", "samson", "berlin"), (16, 9, 16, 6, 13, 14, 3, 6))).items():
        assert len(CARDS[name].class_names) == CARDS[name].classes == n


def test_published_checksums_are_those_of_the_files_here(data):
    "The files at hand, by the hash that the card gives: a digit mistyped there would refuse a good download."
    for name, role, path in (("salinas-a", "cube", "salinas_a/SalinasA_corrected.mat"), ("salinas-a", "labels", "salinas_a/SalinasA_gt.mat"),
                             ("indian-pines", "labels", "gt_maps/Indian_pines_gt.mat"), ("pavia-u", "labels", "gt_maps/PaviaU_gt.mat"),
                             ("salinas", "labels", "gt_maps/Salinas_gt.mat")):
        f = CARDS[name].files[role]
        assert d.fault(data/path, f.sha1, f.size) == "" and f.size


@pytest.mark.parametrize("name, shape, pixels", [("salinas-a", (83, 86, 204), [391, 1343, 616, 1525, 674, 799]), ("berlin", (100, 67, 111), [445, 443, 82, 422, 9, 243]),
                                                ("samson", (95, 95, 156), None)])
def test_real_scenes_load_by_name(shared, name, shape, pixels):
    scene = load_scene(name)
    assert scene.cube.shape == shape == CARDS[name].shape and scene.class_names == CARDS[name].class_names and scene.name == name
    assert scene.licence == CARDS[name].licence and scene.origin == dict(scene=name)
    counts = np.bincount(scene.labels.ravel(), minlength=scene.classes + 1)[1:]
    assert counts.min() > 0 and (pixels is None or counts.tolist() == pixels)
    if name == "samson": assert scene.wavelengths_nm[[0, -1]].tolist() == [401, 889] and 0 < counts.sum() < 9025
    if name == "berlin": assert scene.wavelengths_nm is not None and scene.crs == "EPSG:32633"
    again = r.open_again(scene.origin)
    assert np.array_equal(again.cube, scene.cube) and np.array_equal(again.labels, scene.labels)


def test_a_folder_that_cannot_be_written_to_is_enough(shared, monkeypatch):
    def never(*args, **options): raise AssertionError("nothing is to be downloaded")
    monkeypatch.setattr(d, "download", never)
    assert [p.name for p in fetch_scene("salinas-a")] == ["SalinasA_corrected.mat", "SalinasA_gt.mat"]
    done = run("fetch", "berlin")
    assert done.returncode == 0 and "CC BY-SA 4.0" in done.stdout and "10.5880/enmap.2016.002" in done.stdout and done.stdout.endswith("next: hsi-mamba split berlin\n")


def test_files_lie_in_their_folder_or_flat(folder):
    cube, gt = np.arange(24).reshape(2, 3, 4), np.array([[1, 2, 0], [0, 2, 1]])
    for place in (folder, folder/"xiongan"):
        place.mkdir(exist_ok=True)
        np.save(place/"cube.npy", cube)
        savemat(place/"labels.mat", dict(gt=gt))
        assert r.is_here(CARDS["xiongan"]) == (place != folder), "cube.npy could be of any scene"
    assert load_scene("xiongan").label_values == (1, 2)
    for f in ("SalinasA_corrected.mat", "SalinasA_gt.mat"): (folder/f).write_bytes(b"x")
    assert r.is_here(CARDS["salinas-a"])


@pytest.mark.parametrize("name", READ)
def test_missing_files_are_named_with_the_way_out(folder, name):
    c, fetchable = CARDS[name], name in FETCHED
    text = refused(lambda: load_scene(name), name, "HSI_DATA", str(folder), str(c.folder), c.where, *[f.path for f in c.files.values()])
    assert ("hsi-mamba fetch " + name in text) == fetchable
    done = run("split", name)
    assert done.returncode == 2 and done.stderr == f"hsi-mamba: error: {text}\n"


def test_only_what_is_missing_is_named(folder):
    c = CARDS["pavia-u"]
    c.folder.mkdir()
    (c.folder/"PaviaU.mat").write_bytes(b"x")
    assert "PaviaU.mat" not in refused(lambda: load_scene("pavia-u"), "PaviaU_gt.mat")


@pytest.mark.parametrize("name", BY_HAND)
def test_what_cannot_be_fetched_says_where_it_is(folder, name):
    text = refused(lambda: fetch_scene(name), name, CARDS[name].where, str(CARDS[name].folder), CARDS[name].licence)
    done = run("fetch", name)
    assert done.returncode == 2 and done.stderr == f"hsi-mamba: error: {text}\n" and not list(folder.iterdir())


def test_names(folder):
    for text, near in (("salinas_a", "salinas-a"), ("Indian Pines", "indian-pines"), ("paviau", "pavia-u"), ("houston2013", "houston-2013")):
        refused(lambda: load_scene(text), text, f"did you mean '{near}'?")
        assert run("fetch", text).returncode == 2
    refused(lambda: fetch_scene("nowhere"), "known by name")
    refused(lambda: fetch_scene("synthetic"), "synthetic", "needs no download")
    refused(lambda: load_scene("salinas-a", seed=1), "takes labels, drop_bands and nodata")


def test_the_data_folder(monkeypatch, tmp_path):
    monkeypatch.delenv("HSI_DATA", raising=False)
    assert r.data_folder() == Path.home()/"hsi-data"
    monkeypatch.setenv("HSI_DATA", "~/elsewhere")  # as a notebook's %env leaves it
    assert r.data_folder() == Path.home()/"elsewhere"


@pytest.fixture
def tiny(folder, monkeypatch):
    "Two cards cut to 4 x 3 x 5: salinas-a with checksums, ksc without; and the server that has their files."
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(d, "_PAUSE", 0)
    cube, labels = np.arange(60, dtype=np.int16).reshape(4, 3, 5), np.arange(12, dtype=np.uint8).reshape(4, 3) % 7
    for name, array in (("a", dict(x=cube)), ("b", dict(y=labels)), ("c", dict(KSC=cube)), ("d", dict(KSC=cube[:3])), ("e", dict(other=cube))):
        savemat(folder/name, array, appendmat=False)
    held = {n: (folder/n).read_bytes() for n in "abcde"} | {"html": b"<html>please log in</html>"}
    hashes = {n: d.git_sha1(folder/n) for n in "abcde"}
    for n in "abcde": (folder/n).unlink()

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *args): pass
        def do_GET(self):
            name = self.path.strip("/")
            if name not in held: return self.send_error(404)
            self.send_response(200)
            self.send_header("Content-Length", str(len(held[name])))
            self.end_headers()
            self.wfile.write(held[name])

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as s:
        threading.Thread(target=lambda: s.serve_forever(.01), daemon=True).start()

        def cards(cube="a", labels="b", name="salinas-a"):
            "Let the card's files come from these names on the server, all known by their checksums, or none."
            known, url = CARDS[name], lambda names: tuple(f"http://127.0.0.1:{s.server_port}/{n}" for n in names.split())
            sha1 = (lambda n: hashes.get(n)) if name == "salinas-a" else (lambda n: None)
            files = {role: r.File(f.path, sha1(n), None, url(names)) for (role, f), names, n in zip(known.files.items(), (cube, labels), "ab")}
            monkeypatch.setitem(r._CARDS, name, replace(known, shape=(4, 3, 5), class_names=known.class_names[:6], files=files))
        yield cards, held
        s.shutdown()


def left(folder): return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def test_fetch_then_load(tiny, folder):
    cards, held = tiny
    cards("none a", "b")
    done = run("fetch", "salinas-a")
    assert done.returncode == 0, done.stderr
    assert left(folder) == ["salinas_a/SalinasA_corrected.mat", "salinas_a/SalinasA_gt.mat"]
    for word in ("no formal licence", str(folder/"salinas_a"/"SalinasA_gt.mat"), "checksum as published", "next: hsi-mamba split salinas-a"): assert word in done.stdout
    assert load_scene("salinas-a").cube.shape == (4, 3, 5)
    held.clear()  # all is here: the server is not asked again
    assert [p.name for p in fetch_scene("salinas-a", progress=False)] == ["SalinasA_corrected.mat", "SalinasA_gt.mat"]


def test_a_bad_file_here_is_named_and_replaced_when_told_to(tiny, folder):
    cards, held = tiny
    cards()
    fetch_scene("salinas-a", progress=False)
    path = folder/"salinas_a"/"SalinasA_corrected.mat"
    bad = bytearray(path.read_bytes())
    bad[200] ^= 1
    path.write_bytes(bad)
    text = refused(lambda: fetch_scene("salinas-a"), str(path), "checksum", "hsi-mamba fetch salinas-a --overwrite")
    done = run("fetch", "salinas-a")
    assert done.returncode == 2 and done.stderr == f"hsi-mamba: error: {text}\n" and path.read_bytes() == bad
    assert run("fetch", "salinas-a", "--overwrite").returncode == 0 and path.read_bytes() == held["a"]
    path.rename(folder/path.name)  # flat: replaced where it is
    (folder/path.name).write_bytes(bad)
    assert fetch_scene("salinas-a", progress=False, overwrite=True)[0] == folder/path.name and (folder/path.name).read_bytes() == held["a"]


@pytest.mark.parametrize("cube, reason", [("d", "(3, 3, 5)"), ("e", "other"), ("html", "cannot tell what this is"), ("none", "HTTP 404"), ("b", "not KSC")])
def test_without_a_checksum_the_array_is_checked(tiny, folder, cube, reason):
    cards, _ = tiny
    cards(cube, "b", "ksc")
    text = refused(lambda: fetch_scene("ksc", progress=False), "KSC.mat", reason, "127.0.0.1", "by hand", str(folder/"ksc"/"KSC.mat"))
    assert left(folder) == [] and ".part" not in text
    cards(f"{cube} c", "c b", "ksc")
    done = run("fetch", "ksc")
    assert done.returncode == 0 and "no published checksum" in done.stdout and "array as expected" in done.stdout, done.stderr
    assert load_scene("ksc").cube.shape == (4, 3, 5)


def test_control_c_says_how_to_go_on(monkeypatch, folder):
    def stop(*args, **options): raise KeyboardInterrupt
    monkeypatch.setattr(d, "download", stop)
    done = run("fetch", "salinas-a")
    assert done.returncode == 130 and "`hsi-mamba fetch salinas-a` goes on" in done.stderr


def test_the_list_fits_a_terminal(folder, monkeypatch, data):
    for place in (folder, data):
        monkeypatch.setenv("HSI_DATA", str(place))
        lines = run("scenes").stdout.splitlines()
        assert max(map(len, lines[1:])) <= 120 and str(place) in lines[0]
        starts = [i for i, line in enumerate(lines) if i and not line.startswith(" ")]
        assert [lines[i].split()[0] for i in starts] == list(CARDS) and max(np.diff([*starts, len(lines)])) <= 3
        text = "\n".join(lines)
        assert "hsi-mamba fetch indian-pines" in text and "houston_2013/" in text and ("hsi-mamba fetch salinas-a" in text) == (place == folder)
    (folder/"PaviaU.mat").write_bytes(b"x")
    monkeypatch.setenv("HSI_DATA", str(folder))
    assert "1 of 2 missing" in run("scenes").stdout
