"""Commands on a Ray cluster, which here is this machine alone."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

import processes
import pytest

MAIN = (
    "import sys, ray; ray.init(num_cpus=2, include_dashboard=False); "
    "from muco.cli import main; sys.exit(main(sys.argv[1:]))"
)


def on_ray(arguments: Sequence[str]) -> str:
    """What ``muco ARGUMENTS --ray auto`` prints; a cluster begins and ends with it."""
    pytest.importorskip("ray", reason="the package ray is not installed")
    line = [sys.executable, "-c", MAIN, *arguments, "--ray", "auto"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
    done = processes.run(line, capture_output=True, timeout=900, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout
