"""A file from the first mirror that gives it whole: resumed where it broke off, and checked before it gets its name."""
import errno
import hashlib
import json
import os
import re
import ssl
import sys
import time
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import HTTPRedirectHandler, HTTPSHandler, Request, build_opener

from tqdm.auto import tqdm

from hsi_mamba_nb import __version__
from hsi_mamba_nb.errors import InputError

__all__ = ["download", "fault", "git_sha1"]

_BLOCK = 1 << 16
_PAUSE = 1.0  # seconds before a mirror that gave nothing is asked again, times how often that was


class _Broken(Exception):
    "This connection did not bring the file; another one to the same mirror may, perhaps from the first byte."

    def __init__(self, why, drop=False):
        super().__init__(why)
        self.drop = drop


class _Refused(_Broken):
    "This mirror does not give the file."


def git_sha1(
    path: str | Path,
) -> str:  # 40 hexadecimal digits
    "The hash under which git stores a file: sha1 of `blob <size>`, a zero byte, and the bytes."
    with open(path, "rb") as f:
        h = hashlib.sha1(b"blob %d\0" % os.fstat(f.fileno()).st_size, usedforsecurity=False)
        while block := f.read(1 << 20):
            h.update(block)
    return h.hexdigest()


def fault(
    path: Path,
    sha1: str | None = None,  # git blob hash it must have
    size: int | None = None,  # bytes it must have
    check=None,  # path -> what is wrong with it, "" where nothing is
) -> str:
    "What is wrong with a file on disk; empty where nothing is."
    try:
        held = path.stat().st_size
        if not held or size not in (None, held):
            return f"holds {held:,} bytes" + (f", not {size:,}" if size else "")
        if sha1 and git_sha1(path) != sha1:
            return "its checksum is not the published one"
        return check(path) if check else ""
    except OSError as e:
        return f"cannot be read ({e.strerror or e})"


class _Redirects(HTTPRedirectHandler):
    def redirect_request(self, req, fp, code, msg, headers, newurl):
        if urlsplit(newurl).scheme not in ("https", req.type):  # from http to either, from https to https alone
            raise HTTPError(req.full_url, code, f"redirects from {req.type} to {urlsplit(newurl).scheme}, which is refused", headers, fp)
        fp.close()  # what comes with a redirect is of no use, and may have no end
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _opener(legacy):
    context = ssl.create_default_context()
    if legacy:
        context.options |= getattr(ssl, "OP_LEGACY_SERVER_CONNECT", 0x4)  # named so from Python 3.12 on; certificates are verified as ever
    return build_opener(HTTPSHandler(context=context), _Redirects)


def _validator(answer):
    "What names the very bytes of an answer: its tag, unless that is a weak one, else its date."
    tag = answer.headers.get("ETag", "")
    return tag if tag.startswith('"') else answer.headers.get("Last-Modified", "")


def _ask(url, headers, timeout, legacy):
    # Some universities' servers lack secure renegotiation (RFC 5746), and OpenSSL 3 hangs up on them. Without it a stranger can put a
    # request of his before ours, so that we get another file of that server: allowed only where the file itself is checked.
    request = Request(url, headers={"User-Agent": f"hsi-mamba-nb/{__version__}"} | headers)
    try:
        return _opener(False).open(request, timeout=timeout)
    except URLError as e:
        if not (legacy and getattr(e.reason, "reason", None) == "UNSAFE_LEGACY_RENEGOTIATION_DISABLED"):
            raise
    return _opener(True).open(request, timeout=timeout)


@contextmanager
def _network(timeout):
    "Only what the network does inside becomes `_Broken` or `_Refused`; an `OSError` elsewhere is the disk's."
    try:
        yield
    except HTTPError as e:
        e.close()
        kind = _Broken if e.code >= 500 or e.code in (408, 416, 429) else _Refused
        raise kind(f"HTTP {e.code} {' '.join(str(e.reason).split())}", drop=e.code == 416) from e  # 416: our part is longer than the file
    except (OSError, HTTPException) as e:
        reason = e.reason if isinstance(e, URLError) else e
        if isinstance(reason, ssl.SSLCertVerificationError):
            raise _Refused(f"certificate not valid ({reason.verify_message})") from e
        if isinstance(reason, TimeoutError):  # a host that does not even take the call is not waited for again
            raise (_Broken if reason is e else _Refused)(f"silent for {timeout:g} s") from e
        raise _Broken(" ".join(str(getattr(reason, "strerror", None) or reason or type(reason).__name__).split())) from e


@contextmanager
def _alone(path, progress):
    # One at a time works on a file. The lock is the system's, which frees it however its holder ends; one made of a file that holds
    # a process number has to be taken over when stale, and two may do that at once.
    lock, silent = path.with_name(path.name + ".lock"), not progress
    while True:
        f = open(lock, "wb")
        while not _locked(f):
            if not silent:
                print(f"{path.name}: waiting for another download of it", file=sys.stderr)
            silent = True
            time.sleep(.1)
        with suppress(OSError):
            if os.path.samestat(os.fstat(f.fileno()), os.stat(lock)):
                break
        f.close()  # its holder has removed it: by now others lock a new one
    try:
        yield
    finally:
        for step in (f.close, lock.unlink) if os.name == "nt" else (lock.unlink, f.close):  # Windows removes no open file
            with suppress(OSError):
                step()


def _locked(f):
    "Take the lock on an open file; False where another has it."
    try:
        if os.name == "nt":
            import msvcrt
            msvcrt.locking(f.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as e:
        return e.errno not in (errno.EAGAIN, errno.EACCES, errno.EDEADLK)  # a file system without locks: go on without
    return True


@dataclass
class _Transfer:
    "A file on its way: what has come lies in `path`.part, and in `path`.part.json of what it is a part."
    path: Path
    sha1: str | None
    size: int | None
    limit: int
    check: object
    legacy: bool
    timeout: float
    retries: int
    bar: tqdm

    def __post_init__(self):
        self.part, self.note = (self.path.with_name(self.path.name + end) for end in (".part", ".part.json"))

    def at(self): return self.part.stat().st_size if self.part.is_file() else 0

    def known(self):
        with suppress(OSError, ValueError, TypeError):
            return dict(json.loads(self.note.read_text(encoding="utf-8")))
        return {}

    def drop(self):
        for f in (self.note, self.part):
            f.unlink(missing_ok=True)

    def connect(self, url):
        "Bring what is missing over one connection."
        at, known = self.at(), self.known()
        tag = known.get("validator")
        if known.get("url") != url or not (tag or self.sha1):
            at = 0  # nothing would tell whether the rest is of the same file
        elif at and at == known.get("total"):
            return
        with _network(self.timeout):
            answer = _ask(url, ({"Range": f"bytes={at}-"} if at else {}) | ({"If-Range": tag} if at and tag else {}), self.timeout, self.legacy)
        with answer:
            at, total = self.rest(answer, at, known) if answer.status == 206 else self.start(answer, url)
            self.bar.reset(total)
            self.bar.initial = self.bar.n = at
            end = self.limit + 1 if total is None else total
            with open(self.part, "ab") as f:
                while at < end:
                    with _network(self.timeout):
                        block = answer.read1(min(_BLOCK, end - at))
                    if not block:
                        break
                    at += f.write(block)
                    self.bar.update(len(block))
                f.flush()
                os.fsync(f.fileno())  # the bytes before the name
        if at > self.limit:
            raise _Refused(f"sends more than {self.limit:,} bytes", drop=True)
        if at < (total or self.size or at):
            raise _Broken(f"broke off at {at:,} of {total or self.size:,} bytes")

    def rest(self, answer, at, known):
        "(first byte to come, bytes of the whole) of an answer that says it continues our part."
        got = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", answer.headers.get("Content-Range", ""))
        same = got and int(got[2]) == known.get("total", int(got[2])) and _validator(answer) in ("", known.get("validator"))
        if not (at and same and int(got[1]) == at):
            raise _Broken("answers with bytes that were not asked for", drop=True)
        return at, int(got[2])

    def start(self, answer, url):
        "(0, bytes of the whole or None) of an answer that brings it from the first byte."
        total = answer.length
        if answer.status != 200:
            raise _Refused(f"HTTP {answer.status}")
        if total is not None and total > self.limit:
            raise _Refused(f"offers {total:,} bytes, more than {self.limit:,}")
        self.part.write_bytes(b"")  # emptied before the note changes: never old bytes under a new note; half a note is no note
        self.note.write_text(json.dumps(dict(url=url, validator=_validator(answer)) | ({} if total is None else dict(total=total))), encoding="utf-8")
        return 0, total

    def bring(self, url):
        "Connect until all is there; only a connection that gets further than any before it is for free. Returns what is wrong with the file."
        furthest = idle = 0
        while True:
            try:
                self.connect(url)
                return fault(self.part, self.sha1, self.size, self.check)
            except _Broken as e:
                if e.drop:
                    self.drop()
                idle, furthest = 0 if self.at() > furthest else idle + 1, max(furthest, self.at())
                if isinstance(e, _Refused) or idle > self.retries:
                    raise _Refused(str(e)) from e
            time.sleep(_PAUSE*idle)

    def get(self, url):
        "Put the file in place, or return why this mirror does not give it."
        old = self.at()
        try:
            why = self.bring(url)
            if why and old:  # perhaps only the old part was bad
                self.drop()
                why = self.bring(url)
        except _Refused as e:
            return str(e)
        if not why:
            os.replace(self.part, self.path)
        self.drop()
        return why


def download(
    urls: list[str],  # the same file at several places, tried in turn
    path: str | Path,  # where to put it; a file there that passes the checks is kept, another one replaced
    sha1: str | None = None,  # git blob hash it must have
    size: int | None = None,  # bytes it must have
    *,
    limit: int = 2*10**9,  # most bytes to accept where `size` is not known
    check=None,  # path -> what is wrong with the file that came, "" where nothing is
    legacy_tls: bool = False,  # also talk to servers without secure renegotiation where no `sha1` is known
    progress: bool = True,  # show a bar
    timeout: float = 30,  # seconds of silence after which a connection counts as dead
    retries: int = 3,  # connections to a mirror, one after the other, that may bring nothing new
) -> Path:
    "Fetch a file. Under its name there is only ever a whole and checked one; what came of it so far stays beside it for the next time."
    path, reasons = Path(path), []
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _alone(path, progress):
            if path.is_file() and not fault(path, sha1, size, check):
                return path
            with tqdm(desc=path.name, unit="B", unit_scale=True, disable=not progress) as bar:
                job = _Transfer(path, sha1, size, size or limit, check, legacy_tls or bool(sha1), timeout, retries, bar)
                for url in urls:
                    why = job.get(url)
                    if not why:
                        return path
                    reasons.append(f"{urlsplit(url).netloc}: {why}")
    except OSError as e:
        raise InputError(f"{path}: cannot be written ({e.strerror or e}); make room there or choose another folder, then start again") from None
    raise InputError(f"{path.name}: no mirror gave it whole ({'; '.join(reasons)}); try again later, or put the file at {path} by hand")
