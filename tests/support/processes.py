"""Two processes on this machine, as a user starts them."""

from __future__ import annotations

import os
import subprocess
import sys

LAUNCHERS = {
    "torchrun": "torch.distributed.run --standalone --nproc-per-node=2",
    "accelerate": "accelerate.commands.launch --cpu --num_processes=2 --num_machines=1 --mixed_precision=no",
}


def launch(*arguments: str, launcher: str = "torchrun", **popen) -> subprocess.Popen:
    """Two processes on this machine, as a user starts them."""
    command = [sys.executable, "-m", *LAUNCHERS[launcher].split()]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([*command, *arguments], env=environment, stdout=subprocess.PIPE, text=True, **popen)


def finished(process: subprocess.Popen, seconds: int = 300) -> str:
    out, error = process.communicate(timeout=seconds)
    assert process.returncode == 0, error
    return out
