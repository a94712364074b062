"""How much memory this process has had."""
import sys
from contextlib import suppress
from pathlib import Path

__all__ = ["peak_memory"]


def peak_memory(
    reset: bool = False,  # start again from what is in memory now, where the system can (Linux)
) -> float:
    "Most bytes this process ever had in memory; nan where the system does not tell. getrusage would count its parent's as well."
    status = Path("/proc/self/status")
    if reset:
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
    if status.exists():
        return int(next(line for line in status.read_text().splitlines() if line.startswith("VmHWM")).split()[1])*1024
    try:
        import resource
    except ImportError:  # Windows
        return float("nan")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss*(1 if sys.platform == "darwin" else 1024)
