"""Downloads against a server that does everything wrong: what lies under the final name is whole and checked, or is not there."""
import errno
import io
import json
import ssl
import subprocess
import sys
import threading
from hashlib import sha1
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.error import URLError

import numpy as np
import pytest

from hsi_mamba_nb.errors import InputError
from hsi_mamba_nb.scene import download as d

BODY = np.random.default_rng(0).bytes(300_001)
HASH = sha1(b"blob 300001\0" + BODY).hexdigest()
OTHER = bytes(255 - b for b in BODY)


def whole(h): h.give()
def ignores_range(h): h.give(range=False)
def drops(n): return lambda h: h.give(stop=n)
def corrupt(h): h.give(BODY[:70_000] + bytes([BODY[70_000] ^ 1]) + BODY[70_001:])
def wrong_range(h): h.give(shift=10)
def status(n): return lambda h: h.send_error(n)
def silent(h): h.give(stop=1000, stall=True)
def changed(h): h.give(OTHER, etag='"b"')
def no_tag(h): h.give(etag=None)
def weak_tag(stop=None): return lambda h: h.give(etag='W/"a"', stop=stop)
def no_length(stop=None): return lambda h: h.give(length=False, stop=stop)
def endless(h): h.give(BODY*20, length=False)
def redirect(to): return lambda h: h.redirect(to)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args): pass

    def do_GET(self):
        s, name = self.server, self.path.strip("/")
        s.log.append((name, self.headers.get("Range"), self.headers.get("If-Range")))
        plan = s.plans.setdefault(name, [])
        (plan.pop(0) if plan else s.then.get(name, whole))(self)

    def redirect(self, to, stall=False):
        self.send_response(302)
        self.send_header("Location", to)
        self.send_header("Content-Length", str(10*stall))
        self.end_headers()
        if stall: self.server.over.wait(10)

    def give(self, body=BODY, etag='"a"', range=True, shift=0, stop=None, length=True, stall=False, of=None):
        "Answer with `body`, or the part of it that was asked for, and perhaps hang up after `stop` bytes."
        asked, condition = self.headers.get("Range"), self.headers.get("If-Range")
        at = int(asked[6:-1]) if range and asked and condition in (None, etag) else None
        if at is not None and at >= len(body): return self.send_error(416)
        self.send_response(200 if at is None else 206)
        if at is not None: self.send_header("Content-Range", f"bytes {at + shift}-{len(body) - 1}/{of or len(body)}")
        rest = body[(at or 0) + shift:]
        if etag: self.send_header("ETag", etag)
        if length: self.send_header("Content-Length", str(len(rest)))
        self.send_header("Connection", "close")
        self.end_headers()
        try:
            self.wfile.write(rest[:stop])
            if stall: self.server.over.wait(10)
        except OSError: pass
        self.close_connection = True


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(d, "_PAUSE", 0)
    monkeypatch.setenv("no_proxy", "*")
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as s:
        s.daemon_threads, s.log, s.plans, s.then, s.over = True, [], {}, {}, threading.Event()
        s.url = lambda name="f": f"http://127.0.0.1:{s.server_port}/{name}"
        threading.Thread(target=lambda: s.serve_forever(.01), daemon=True).start()
        yield s
        s.over.set()
        s.shutdown()


@pytest.fixture
def fetch(server, tmp_path):
    "fetch(behaviour, ...): what the file `f` does request by request, then the download and what lies in the folder after it."
    def run(*plan, names=("f",), hash=HASH, **options):
        server.plans["f"] = list(plan)
        return d.download([server.url(n) for n in names], tmp_path/"f.mat", hash, progress=False, **options)
    run.path, run.files = tmp_path/"f.mat", lambda: sorted(p.name for p in tmp_path.iterdir())
    return run


def asked(server): return [0 if r is None else int(r[6:-1]) for _, r, _ in server.log]


def refused(run, *words):
    with pytest.raises(InputError) as e: run()
    text = str(e.value)
    assert "\n" not in text and "f.mat" in text, text
    for w in words: assert w in text, text
    return text


def test_hash_is_the_one_git_gives(tmp_path):
    (tmp_path/"f").write_bytes(BODY)
    assert d.git_sha1(tmp_path/"f") == HASH
    (tmp_path/"f").write_bytes(b"")
    assert d.git_sha1(tmp_path/"f") == "e69de29bb2d1d6434b8b29ae775ad8c2e48c5391"  # git's empty file


@pytest.mark.parametrize("plan", [[whole], [ignores_range], [no_tag], [weak_tag()], [no_length()], [redirect("g")], [redirect("g"), redirect("h")]],
                         ids="whole ignores no_tag weak no_length redirect redirects".split())
def test_a_file_arrives(fetch, plan):
    assert fetch(*plan).read_bytes() == BODY
    assert fetch.files() == ["f.mat"], "something is left beside it"


def test_a_download_that_breaks_off_asks_only_for_what_is_missing(fetch, server):
    fetch(drops(100_000), drops(1), drops(70_000))
    assert fetch.path.read_bytes() == BODY and fetch.files() == ["f.mat"]
    assert asked(server) == [0, 100_000, 100_001, 170_001]
    assert [c for *_, c in server.log] == [None] + ['"a"']*3


def test_more_breaks_than_retries_are_fine_while_bytes_come(fetch, server):
    fetch(*[drops(20_000)]*14, retries=1)
    assert fetch.path.read_bytes() == BODY and asked(server) == [20_000*i for i in range(15)]


def test_a_later_call_goes_on_where_an_earlier_one_stopped(fetch, server):
    text = refused(lambda: fetch(drops(50_000), *[drops(0)]*9, retries=2), "50,000 of 300,001", "by hand", "127.0.0.1")
    assert str(fetch.path) in text
    assert fetch.files() == ["f.mat.part", "f.mat.part.json"] and len(server.log) == 4
    server.log.clear()
    assert fetch().read_bytes() == BODY and asked(server) == [50_000]


def test_a_whole_part_is_not_fetched_again(fetch, server):
    refused(lambda: fetch(drops(50_000), status(404)))
    fetch.path.with_name("f.mat.part").write_bytes(BODY)  # as if stopped before it got its name
    server.log.clear()
    assert fetch().read_bytes() == BODY and not server.log


@pytest.mark.parametrize("after", [ignores_range, wrong_range, changed, status(416), status(500)], ids="ignores wrong_range changed 416 500".split())
def test_nothing_is_glued_together(fetch, server, after):
    body = OTHER if after is changed else BODY
    server.then["f"] = changed if after is changed else whole
    fetch(drops(100_000), after, hash=sha1(b"blob 300001\0" + body).hexdigest())
    assert fetch.path.read_bytes() == body and fetch.files() == ["f.mat"]


def test_a_changed_file_whose_server_ignores_if_range_is_noticed(fetch):
    def lies(h):
        del h.headers["If-Range"]
        h.headers["If-Range"] = '"b"'
        changed(h)
    assert fetch(drops(100_000), lies, changed, hash=None).read_bytes() == OTHER


@pytest.mark.parametrize("total", [True, False])
def test_a_file_that_has_changed_its_length_is_noticed(fetch, server, total):
    "Its server knows no tags, and goes on with the new file, or has less than we have of the old one."
    server.then["f"] = lambda h: status(416)(h) if h.headers.get("Range") and not total else h.give(etag=None, of="300002" if total else None)
    assert fetch(lambda h: h.give(etag=None, stop=100_000)).read_bytes() == BODY and asked(server) == [0, 100_000, 0]


@pytest.mark.parametrize("tag", [None, 'W/"a"'])
def test_without_tag_and_checksum_the_rest_is_never_trusted(fetch, server, tag):
    fetch(lambda h: h.give(etag=tag, stop=100_000), lambda h: h.give(etag=tag), hash=None)
    assert asked(server) == [0, 0] and fetch.path.read_bytes() == BODY
    fetch.path.unlink()
    server.log.clear()
    fetch(lambda h: h.give(etag=tag, stop=100_000), lambda h: h.give(etag=tag))  # the checksum will tell
    assert asked(server) == [0, 100_000] and fetch.path.read_bytes() == BODY


def test_a_part_of_unknown_origin_is_not_used(fetch, server):
    fetch.path.with_name("f.mat.part").write_bytes(OTHER[:1000])
    for note in (None, "[1]", "{", json.dumps(dict(url="elsewhere", validator='"a"', total=300_001)), json.dumps(dict(url=server.url()))):
        fetch.path.unlink(missing_ok=True)
        fetch.path.with_name("f.mat.part").write_bytes(OTHER[:1000])
        if note: fetch.path.with_name("f.mat.part.json").write_text(note)
        assert fetch().read_bytes() == BODY and fetch.files() == ["f.mat"], note


def test_a_bad_old_part_costs_one_fresh_download(fetch, server):
    refused(lambda: fetch(drops(50_000), status(404)))
    fetch.path.with_name("f.mat.part").write_bytes(b"x"*50_000)  # a power cut
    server.log.clear()
    assert fetch().read_bytes() == BODY and asked(server) == [50_000, 0]


@pytest.mark.parametrize("plan", [corrupt, drops(0), lambda h: h.give(b""), no_length(100_000), lambda h: h.give(BODY + b"x")],
                         ids="corrupt nothing empty cut_without_length longer".split())
def test_what_is_wrong_never_gets_the_name(fetch, server, plan):
    server.then["f"] = plan
    refused(lambda: fetch(retries=1), "no mirror gave it whole")
    assert not fetch.path.exists() and "f.mat.lock" not in fetch.files()


def test_nothing_is_no_file(fetch, server):
    refused(lambda: fetch(lambda h: h.give(b""), hash=None), "holds 0 bytes")


def test_a_size_notices_what_a_missing_length_hides(fetch, server):
    fetch(no_length(100_000), hash=None, size=300_001)
    assert asked(server) == [0, 100_000] and fetch.path.read_bytes() == BODY
    fetch.path.unlink()
    refused(lambda: fetch(hash=None, size=300_000), "offers 300,001 bytes, more than 300,000")
    refused(lambda: fetch(hash=None, size=300_002), "holds 300,001 bytes, not 300,002")


def test_a_check_of_your_own(fetch, server):
    refused(lambda: fetch(hash=None, check=lambda p: "is no array" if p.read_bytes() == BODY else ""), "127.0.0.1", "is no array")
    assert fetch.files() == []
    assert fetch(hash=None, check=lambda p: "" if p.read_bytes() == BODY else "is no array").is_file()


@pytest.mark.parametrize("bad, reason", [(status(404), "HTTP 404"), (status(500), "HTTP 500"), (corrupt, "checksum"), (redirect("/f"), "HTTP 302"),
                                         (redirect("ftp://127.0.0.1/f"), "refused"), (lambda h: h.send_error(204), "HTTP 204")],
                         ids="404 500 corrupt loop ftp 204".split())
def test_the_next_mirror_is_asked(fetch, server, bad, reason):
    server.then["f"] = bad
    assert fetch(names=["f", "g"]).read_bytes() == BODY
    fetch.path.unlink()
    server.then["g"] = status(403)
    text = refused(lambda: fetch(names=["f", "g"]), reason, "HTTP 403", "by hand")
    assert text.count("127.0.0.1") == 2 and fetch.files() == []


def test_what_comes_with_a_redirect_is_not_read(fetch, server):
    assert fetch(lambda h: h.redirect("g", stall=True), timeout=1).read_bytes() == BODY
    assert [name for name, *_ in server.log] == ["f", "g"]


def test_a_mirror_that_has_gone_and_one_that_never_was(fetch, server):
    import socket
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        dead = f"http://127.0.0.1:{s.getsockname()[1]}/f"
    assert d.download([dead, server.url()], fetch.path, HASH, progress=False).read_bytes() == BODY
    fetch.path.unlink()
    refused(lambda: d.download([dead], fetch.path, HASH, progress=False), "refused")


def test_a_host_that_does_not_take_the_call_is_waited_for_once(monkeypatch, tmp_path):
    seen = []
    def ask(url, *args):
        seen.append(url)
        raise URLError(TimeoutError())
    monkeypatch.setattr(d, "_ask", ask)
    with pytest.raises(InputError, match="a.org: silent for 7 s; b.org: silent for 7 s"):
        d.download(["https://a.org/f", "https://b.org/f"], tmp_path/"f", HASH, timeout=7, progress=False)
    assert len(seen) == 2


def test_another_mirror_starts_over(fetch, server):
    fetch(drops(100_000), status(404), names=["f", "g"])
    assert fetch.path.read_bytes() == BODY and asked(server) == [0, 100_000, 0]


@pytest.mark.parametrize("total", [True, False])
def test_a_stream_without_end_does_not_fill_the_disk(fetch, server, total):
    server.then["f"] = endless if not total else lambda h: h.give(BODY*20)
    refused(lambda: fetch(hash=None, limit=400_000), "offers 6,000,020 bytes" if total else "sends more than 400,000")
    assert fetch.files() == []


def test_silence_counts_as_broken_off(fetch, server):
    assert fetch(silent, timeout=.5).read_bytes() == BODY and asked(server) == [0, 1000]
    fetch.path.unlink()
    server.then["f"] = lambda h: h.give(stop=0, stall=True)
    refused(lambda: fetch(timeout=.1, retries=1), "silent for 0.1 s")


def test_a_server_that_changes_its_file_each_time_does_not_hold_us_for_ever(fetch, server):
    tags = iter(range(1000))
    server.then["f"] = lambda h: h.give(etag=f'"{next(tags)}"', stop=50_000)
    refused(lambda: fetch(retries=3), "broke off")
    assert len(server.log) == 5


def test_a_good_file_is_kept_and_a_bad_one_replaced(fetch, server):
    fetch.path.write_bytes(BODY)
    assert fetch() == fetch.path and not server.log
    fetch.path.write_bytes(OTHER)
    refused(lambda: fetch(status(404)))
    assert fetch.path.read_bytes() == OTHER, "the old file went before the new one was there"
    assert fetch().read_bytes() == BODY


def test_a_file_that_cannot_be_read(tmp_path, monkeypatch):
    def closed(path): raise PermissionError(errno.EACCES, "Permission denied")
    monkeypatch.setattr(d, "git_sha1", closed)
    (tmp_path/"f").write_bytes(BODY)
    assert d.fault(tmp_path/"f", HASH) == "cannot be read (Permission denied)"


def test_threads_at_once_end_well(fetch, server):
    server.plans["f"] = [drops(100_000), drops(100_000)]
    got, run = [], lambda: got.append(d.download([server.url()], fetch.path, HASH, progress=False).read_bytes() == BODY)
    threads = [threading.Thread(target=run) for _ in range(4)]
    for t in threads: t.start()
    for t in threads: t.join(30)
    assert got == [True]*4 and fetch.files() == ["f.mat"] and asked(server) == [0, 100_000, 200_000]


def test_who_waited_holds_the_lock_that_others_see(tmp_path, monkeypatch):
    "The one before removes the lock file: a lock on what it removed keeps nobody out."
    path, waits, entered, locked = tmp_path/"f", threading.Event(), [], d._locked
    def told(f):
        got = locked(f)
        if not got: waits.set()
        return got
    monkeypatch.setattr(d, "_locked", told)
    def second():
        with d._alone(path, False): entered.append((tmp_path/"f.lock").exists())
    with d._alone(path, False):
        thread = threading.Thread(target=second)
        thread.start()
        assert waits.wait(10) and not entered
    thread.join(10)
    assert entered == [True] and not list(tmp_path.iterdir())


def test_processes_at_once_end_well_and_a_killed_one_frees_the_file(fetch, server):
    code = f"from hsi_mamba_nb.scene.download import download; download([{server.url()!r}], {str(fetch.path)!r}, {HASH!r}, progress=False)"
    start = lambda: subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True)
    came = threading.Event()
    def holds(h):
        came.set()
        silent(h)
    server.plans["f"] = [holds]
    killed = start()
    assert came.wait(30)
    killed.kill()  # by its own handle, while it holds the lock
    killed.communicate()
    both = [start(), start()]
    assert [p.communicate(timeout=30)[1] for p in both] == ["", ""] and [p.returncode for p in both] == [0, 0]
    assert fetch.path.read_bytes() == BODY and fetch.files() == ["f.mat"] and len(server.log) == 2


def test_control_c_leaves_the_part(fetch, server, monkeypatch):
    def stop(self, n): raise KeyboardInterrupt
    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(d.tqdm, "update", stop)
        fetch()
    assert fetch.files() == ["f.mat.part", "f.mat.part.json"]
    server.log.clear()
    assert fetch().read_bytes() == BODY and asked(server)[0] > 0


def test_a_disk_that_cannot_hold_it(fetch, server, monkeypatch, tmp_path):
    (tmp_path/"file").write_text("")
    with pytest.raises(InputError, match="cannot be written"): d.download([server.url()], tmp_path/"file"/"x.mat", HASH, progress=False)
    def full(*args): raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(d.os, "fsync", full)
    refused(lambda: fetch(), "No space left", "make room", str(fetch.path))
    assert not fetch.path.exists()


class TestLegacyTLS:
    "A server without secure renegotiation: the stub stands for what OpenSSL 3 says of one."

    def ask(self, monkeypatch, legacy, reason="UNSAFE_LEGACY_RENEGOTIATION_DISABLED"):
        asked = []
        class Opener:
            def __init__(self, legacy): self.legacy = legacy
            def open(self, request, timeout):
                asked.append(self.legacy)
                if self.legacy: return "answer"
                error = ssl.SSLError(1, "handshake")
                error.reason = reason
                raise URLError(error)
        monkeypatch.setattr(d, "_opener", Opener)
        try: return d._ask("https://127.0.0.1/f", {}, 1, legacy), asked
        except URLError: return None, asked

    def test_is_asked_as_usual_first(self, monkeypatch): assert self.ask(monkeypatch, True) == ("answer", [False, True])
    def test_is_refused_where_nothing_checks_the_file(self, monkeypatch): assert self.ask(monkeypatch, False) == (None, [False])
    def test_is_allowed_for_this_reason_alone(self, monkeypatch): assert self.ask(monkeypatch, True, "CERTIFICATE_VERIFY_FAILED") == (None, [False])

    def test_the_certificate_is_verified_either_way(self):
        for legacy in (False, True):
            context = next(h for h in d._opener(legacy).handlers if isinstance(h, d.HTTPSHandler))._context
            assert context.verify_mode == ssl.CERT_REQUIRED and context.check_hostname and bool(context.options & 0x4) == legacy

    @pytest.mark.parametrize("hash, option, allowed", [(HASH, False, True), (None, False, False), (None, True, True)])
    def test_a_checksum_or_the_card_allows_it(self, monkeypatch, tmp_path, hash, option, allowed):
        seen = []
        def ask(url, headers, timeout, legacy):
            seen.append(legacy)
            raise URLError("gone")
        monkeypatch.setattr(d, "_ask", ask)
        with pytest.raises(InputError, match="gone"): d.download(["https://x.org/f"], tmp_path/"f", hash, legacy_tls=option, progress=False, retries=0)
        assert seen == [allowed]

    def test_a_bad_certificate_is_not_asked_twice(self, monkeypatch, tmp_path):
        seen, error = [], ssl.SSLCertVerificationError(1, "failed")
        error.verify_message = "self-signed certificate"
        def ask(*args):
            seen.append(args)
            raise URLError(error)
        monkeypatch.setattr(d, "_ask", ask)
        with pytest.raises(InputError, match="self-signed"): d.download(["https://x.org/f"], tmp_path/"f", HASH, progress=False)
        assert len(seen) == 1


def test_https_never_leads_to_http():
    from urllib.request import Request
    from urllib.error import HTTPError
    for start, to, fine in (("https", "http", False), ("http", "https", True), ("http", "http", True), ("https", "https", True), ("http", "ftp", False)):
        go = lambda: d._Redirects().redirect_request(Request(f"{start}://x.org/f"), io.BytesIO(), 302, "Found", {}, f"{to}://y.org/f")
        if fine: assert go().full_url == f"{to}://y.org/f"
        else:
            with pytest.raises(HTTPError, match="refused"): go()
