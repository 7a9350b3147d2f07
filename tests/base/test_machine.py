"""What the process asks of the machine."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from muco.base.machine import machine, machine_in_words, usable_cores

LARGE = """
import resource, sys
from muco.base.machine import keep_freed_memory
import numpy as np

kept = keep_freed_memory() if sys.argv[1] == "keep" else None
for _ in range(3):  # the first times the memory is new either way
    np.ones(50 << 17)  # 50 MiB
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    np.ones(50 << 17)
print(kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only glibc has these settings")
def test_freed_memory_is_used_again_unless_the_user_has_a_say():
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_TUNABLES"))}

    def pages(word: str, **settings: str) -> tuple[str, int]:
        command = [sys.executable, "-c", LARGE, word]
        own = {"NUMPY_MADVISE_HUGEPAGE": "0"}  # torch asks for no large pages either
        done = subprocess.run(command, env=clean | own | settings, capture_output=True, text=True, check=True)
        kept, count = done.stdout.split()
        return kept, int(count)

    kept, new = pages("keep")
    if kept == "False":
        pytest.skip("the C library of this machine is another one")
    assert new < 1_000 < 10_000 < pages("leave")[1]  # pages of 4 KiB that the system had to clear
    assert pages("keep", MALLOC_ARENA_MAX="2")[0] == "False"


def test_what_is_there_is_left_out_of_later_collections():
    line = (
        "import gc; from muco.base.machine import leave_out_of_collections; before = len(gc.get_objects()); "
        "leave_out_of_collections(); print(before, gc.get_freeze_count(), len(gc.get_objects()))"
    )
    done = subprocess.run([sys.executable, "-c", line], capture_output=True, text=True, check=True)
    before, frozen, looked_at = map(int, done.stdout.split())
    assert frozen > 0.9 * before and looked_at < 0.1 * before


def test_a_machine_in_words_names_what_computes():
    here = machine()
    assert here["cores"] == usable_cores() and here["threads"] >= 1
    made = {"processor": "P", "cores": 2, "device": "cpu"}
    assert machine_in_words(made) == "P (2 cores)" and machine_in_words(made | {"cores": 1}) == "P (1 core)"
    assert machine_in_words(made | {"device": "NVIDIA H200"}) == "NVIDIA H200 (2 cores)"
    assert machine_in_words(made | {"processor": None}) == "an unnamed processor (2 cores)"
