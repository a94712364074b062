"""Writing files so that a reader never sees half of one."""
import os
from pathlib import Path

from hsi_mamba_nb.errors import InputError

__all__ = ["write_file"]


def write_file(
    path: str | Path,
    data: str | bytes,
) -> Path:
    "Write `data` beside `path`, then put it in place in one step: under its name the file is whole or absent."
    path = Path(path)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "wb") as f:
            f.write(data.encode("utf-8") if isinstance(data, str) else data)
            f.flush()
            os.fsync(f.fileno())
        os.replace(part, path)
    except OSError as e:
        raise InputError(f"{path}: cannot be written ({e.strerror}); choose another --out") from None
    finally:
        part.unlink(missing_ok=True)
    return path
