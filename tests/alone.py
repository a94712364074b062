"""Run a notebook as a stranger does: its file alone in an empty folder, a fresh interpreter, a limit on its computing time."""
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

RUN = """import sys
from nbdev.test import test_nb
sys.exit(not test_nb(sys.argv[1], profile=False)[0])"""


def run_alone(
    notebook,  # path
    folder,  # an empty folder
    limit=90,  # seconds on 2 cores; counted as processor time, so that a busy machine does not decide
    python=sys.executable,
    code=RUN,
    wall=1200,  # seconds after which it hangs, however busy the machine
):
    "Raise AssertionError with the notebook's own error, or where it takes longer than `limit`."
    name = shutil.copy(notebook, folder)
    env = {k: v for k, v in os.environ.items() if k not in ("HSI_DATA", "IN_TEST", "PYTHONPATH")} | {"MPLBACKEND": "agg"}
    stop = lambda: resource.setrlimit(resource.RLIMIT_CPU, (2*limit, 2*limit + 5))
    process = subprocess.Popen([python, "-c", code, name], cwd=folder, env=env, text=True, start_new_session=True, preexec_fn=stop,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        shown = process.communicate(timeout=wall)[0]
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        raise AssertionError(f"{Path(notebook).name} hangs: no end after {wall} s") from None
    assert process.returncode not in (-signal.SIGXCPU, -signal.SIGKILL), f"{Path(notebook).name} takes longer than {limit} s on 2 cores"
    assert process.returncode == 0, f"{Path(notebook).name} fails:\n{shown}"
