"""Writing files so that a reader never sees half of one."""
import os
import threading
from contextlib import suppress
from pathlib import Path

from hsi_mamba_nb.errors import InputError

__all__ = ["append_line", "write_file"]


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


def append_line(
    path: str | Path,
    line: str,  # without its end
) -> Path:
    "Add a line to a file in one write, so that processes that share it never mix theirs; what a killed writer left unfinished is cut off first."
    try:
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a+b") as f:
            with suppress(ImportError, OSError):  # Windows, or a disk that knows no locks
                import fcntl
                fcntl.flock(f, fcntl.LOCK_EX)
            size = f.seek(0, os.SEEK_END)
            f.seek(max(0, size - 1))
            if size and f.read(1) != b"\n":
                f.seek(0)
                f.truncate(f.read().rfind(b"\n") + 1)
            f.write(line.encode("utf-8") + b"\n")
            f.flush()
            os.fsync(f.fileno())
    except FileExistsError:
        raise InputError(f"{path}: cannot be written ({path.parent} is not a folder); choose another place") from None
    except (OSError, ValueError) as e:
        raise InputError(f"{path}: cannot be written ({getattr(e, 'strerror', None) or e}); choose another place or make room") from None
    return path


def _sync_folder(folder: Path) -> None:
    "Put the new name itself on the disk, where the system lets a folder be opened."
    with suppress(OSError):
        fd = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
