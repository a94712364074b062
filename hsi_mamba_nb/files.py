"""Writing files so that a reader never sees half of one."""
import json
import os
import threading
from contextlib import suppress
from pathlib import Path

from hsi_mamba_nb.errors import InputError

__all__ = ["append_row", "read_rows", "result_rows", "write_file"]


def write_file(
    path: str | Path,
    data: str | bytes,
) -> Path:
    "Write `data` beside `path`, then put it in place in one step: under its name the file is the old one or the new one, never half."
    try:
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.part")
        try:
            with open(part, "wb") as f:
                f.write(data.encode("utf-8") if isinstance(data, str) else data)
                f.flush()
                os.fsync(f.fileno())  # the bytes before the name: after a power cut the new name never holds less
            os.replace(part, path)
        except BaseException:
            with suppress(OSError):
                part.unlink()
            raise
        _sync_folder(path.parent)
    except FileExistsError:  # from mkdir
        raise InputError(f"{path}: cannot be written ({path.parent} is not a folder); choose another place") from None
    except (OSError, ValueError) as e:  # ValueError: no file name, a null character in it
        raise InputError(f"{path}: cannot be written ({getattr(e, 'strerror', None) or e}); choose another place or make room") from None
    return path


def append_row(
    path: str | Path,  # a file of rows, one JSON object a line
    row: dict,
) -> Path:
    "Add a line in one write, so that processes that share a file never mix theirs. A line that a killed writer left unfinished is cut off first."
    try:
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        line = json.dumps(row, allow_nan=False).encode() + b"\n"
        with open(path, "a+b") as f:
            with suppress(ImportError, OSError):  # Windows, or a disk that knows no locks
                import fcntl
                fcntl.flock(f, fcntl.LOCK_EX)
            f.seek(0)
            text = f.read()
            last = text[text.rfind(b"\n") + 1:]
            if last and _whole(last):
                line = b"\n" + line
            elif last:
                f.truncate(len(text) - len(last))
            f.write(line)
            f.flush()
            os.fsync(f.fileno())
    except FileExistsError:
        raise InputError(f"{path}: cannot be written ({path.parent} is not a folder); choose another place") from None
    except OSError as e:
        raise InputError(f"{path}: cannot be written ({e.strerror or e}); choose another place or make room") from None
    return path


def _whole(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False


def read_rows(
    path: str | Path,  # as `append_row` writes it; need not exist
) -> list[dict]:
    "The rows of a file; a last line that a killed writer left unfinished is ignored."
    try:
        lines = Path(path).read_bytes().split(b"\n") if Path(path).exists() else []
    except OSError as e:
        raise InputError(f"{path}: cannot be read ({e.strerror or e}); choose another file") from None
    rows = []
    for i, line in enumerate(lines):
        if _whole(line):
            rows.append(json.loads(line))
        elif line.strip() and (i < len(lines) - 1 or not rows):
            raise InputError(f"{path}: line {i + 1} is not a row; delete that line, or choose another file")
    return rows


def result_rows(
    name: str,  # of a file in the repository's folder results
) -> list[dict]:
    "The rows of a published result file, one for a .json: from the checkout, or where the package is installed alone, from the project's page."
    path, whole = Path(__file__).parents[1]/"results"/name, name.endswith(".json")
    if path.is_file():
        return [json.loads(path.read_bytes())] if whole else read_rows(path)
    from urllib.request import urlopen
    url = f"https://raw.githubusercontent.com/hsi-mamba-nb/hsi-mamba-nb/main/results/{name}"
    try:
        with urlopen(url, timeout=30) as answer:
            return [json.loads(text) for text in ([answer.read()] if whole else answer.read().splitlines()) if text.strip()]
    except (OSError, ValueError) as e:
        raise InputError(f"results/{name}: not beside the package, and {url} cannot be read ({getattr(e, 'reason', e)}); clone the repository") from None


def _sync_folder(folder: Path) -> None:
    "Put the new name itself on the disk, where the system lets a folder be opened."
    with suppress(OSError):
        fd = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
