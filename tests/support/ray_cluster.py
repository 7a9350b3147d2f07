"""Commands on a Ray cluster, which here is this machine alone."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence

import processes
import pytest

MAIN = """
import json, sys, ray
from muco.cli import main
ray.init(num_cpus=2, include_dashboard=False)
sys.exit(max(main(arguments) for arguments in json.loads(sys.argv[1])))
"""


def on_ray(*commands: Sequence[str]) -> str:
    """What the commands ``muco ARGUMENTS --ray auto`` print; a cluster begins and ends with them, as it takes long."""
    pytest.importorskip("ray", reason="the package ray is not installed")
    line = [sys.executable, "-c", MAIN, json.dumps([[*arguments, "--ray", "auto"] for arguments in commands])]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
    done = processes.run(line, capture_output=True, timeout=900, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout
