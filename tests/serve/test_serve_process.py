"""The model in a process of its own: the same vectors, the same errors, and both processes end together."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import families
import numpy as np
import processes
import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from servers import FORKED, command, data_uri, picture, until

from muco import CheckpointError
from muco.model import load
from muco.serve.engine import Engine, Item
from muco.serve.images import ImageLimits
from muco.serve.process import SMALL, ModelProcess, receive, send


@pytest.fixture(scope="module")
def folder(tiny_path) -> Path:
    return tiny_path


@pytest.fixture(scope="module")
def engine(folder) -> Engine:
    return Engine(load(folder, device="cpu"), ImageLimits(), 4096)


@pytest.fixture(scope="module")
def process(folder, forked) -> Iterator[ModelProcess]:
    made = ModelProcess(str(folder), "cpu", ImageLimits(), 4096, image_memory=0.1, fingerprint=True)
    yield made
    made.close()


ITEMS = [
    Item(("a ring",)),
    Item(("",), (data_uri(picture("red")),)),
    Item(("What is it?",), (data_uri(picture("blue")), data_uri(picture("red")))),
    Item(("What?", "", "Why?"), (data_uri(picture("green")),), mode="isolated"),
    Item(("What?", "Where?"), (data_uri(picture("green")),), mode="compounded"),
]


def test_the_same_vectors(engine, process):
    prepared = [process.prepare(item) for item in ITEMS]
    for found, expected in zip(process.run(prepared), engine.run([*map(engine.prepare, ITEMS)]), strict=True):
        np.testing.assert_allclose(found.vectors, expected.vectors, atol=1e-6)  # what was seen passes among others
        assert found.vectors.dtype == np.float32
        assert (found.tokens, found.image_tokens) == (expected.tokens, expected.image_tokens)
    assert [one.vectors.shape[0] for one in process.run(prepared)] == [1, 1, 1, 3, 2]


@pytest.mark.slow
@pytest.mark.parametrize("family", ["idefics3", "qwen3_vl"])
def test_the_same_vectors_of_other_families(family, tmp_path, forked):
    families.model(family).save(str(tmp_path / family))
    process = ModelProcess(str(tmp_path / family), "cpu", ImageLimits(), 4096)
    here = Engine(load(tmp_path / family, device="cpu"), ImageLimits(), 4096)
    found, expected = (one.run([*map(one.prepare, ITEMS[:4])]) for one in (process, here))
    process.close()
    assert all(np.array_equal(a.vectors, b.vectors) for a, b in zip(found, expected, strict=True))


def test_pictures_that_are_large_together(engine, process, monkeypatch):
    """More than goes through the pipe itself."""
    monkeypatch.setattr("muco.serve.process.SMALL", 10_000)
    items = [Item(("",), (data_uri(picture((n, 0, 0), (280, 280))),)) for n in range(4)]
    prepared = [process.prepare(item) for item in items]
    assert sum(one.batch["images"][0]["pixel_values"].numel() * 4 for one in prepared) > 10_000
    expected = engine.run([engine.prepare(item) for item in items])
    for found, one in zip(process.run(prepared), expected, strict=True):
        assert np.array_equal(found.vectors, one.vectors)


def test_facts(engine, process):
    assert process.dimension == engine.dimension and process.facts.device == "cpu"
    assert process.facts.fingerprint == engine.model.fingerprint


def test_many_threads_get_their_own_results(engine, process):
    texts = [f"text {n}" for n in range(24)]
    expected = engine.model.encode(texts)
    found: dict[int, np.ndarray] = {}

    def ask(n: int) -> None:
        [found[n]] = [one.vectors[0] for one in process.run([process.prepare(Item((texts[n],)))])]

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(24)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert np.allclose([found[n] for n in range(24)], expected, atol=1e-6)


def test_what_fails_there_is_raised_here_and_the_process_goes_on(process):
    good = process.prepare(Item(("a",)))
    broken = process.prepare(Item(("b",)))
    broken.batch["input_ids"][:] = 1 << 30  # no such token
    with pytest.raises(RuntimeError, match="the model's process failed: IndexError"):
        process.run([broken])
    assert process.run([good])[0].vectors.shape == (1, process.dimension)


def test_a_model_that_cannot_be_loaded_is_the_users_error(tmp_path, forked):
    with pytest.raises(CheckpointError, match="none"):
        ModelProcess(str(tmp_path / "none"), "cpu", ImageLimits(), 100)


def test_a_process_that_ends_is_noticed(folder, forked):
    codes: list[int | None] = []
    process = ModelProcess(str(folder), "cpu", ImageLimits(), 4096, gone=codes.append)
    prepared = process.prepare(Item(("a",)))
    process._process.kill()
    until(lambda: codes)
    assert codes == [-signal.SIGKILL]
    with pytest.raises(RuntimeError, match="the model's process has ended"):
        process.run([prepared])
    process.close()
    asked = ModelProcess(str(folder), "cpu", ImageLimits(), 4096, gone=codes.append)
    asked.close()
    assert asked._process.exitcode == 0 and len(codes) == 1


# ── the pipe ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def _echo(pipe: Any) -> None:
    while True:
        try:
            send(pipe, receive(pipe))
        except EOFError:
            return


@pytest.fixture(scope="module")
def pipe() -> Iterator[Any]:
    ours, theirs = processes.context.Pipe()
    other = processes.context.Process(target=_echo, args=(theirs,), daemon=True)
    other.start()
    theirs.close()
    yield ours
    ours.close()
    other.join(300)
    assert other.exitcode == 0


shapes = st.lists(st.integers(0, 5), max_size=3).map(tuple)
arrays = st.tuples(shapes, st.sampled_from(["f4", "i8", "?", "f2"])).map(lambda given: np.arange(
    int(np.prod(given[0]))).reshape(given[0]).astype(given[1]))  # fmt: skip


@given(st.lists(st.one_of(arrays, st.text(), st.none()), max_size=5), st.sampled_from([0, 1, 2]))
@settings(max_examples=60)
def test_anything_comes_back(pipe, values, large):
    values = [*values, *(np.full((SMALL // 4 + n, 1), n, dtype=np.float32) for n in range(large))]
    send(pipe, values)
    back = receive(pipe)
    assert len(back) == len(values)
    for found, value in zip(back, values, strict=True):
        if isinstance(value, np.ndarray):
            assert found.dtype == value.dtype and np.array_equal(found, value)
            found += found.dtype.type(1)  # and can be written to
        else:
            assert found == value


# ── the server ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_server_ends_with_its_model(folder, process):
    server = psutil.Process(process._process.pid).parent()  # that forks
    before = server.children()
    with command(folder, forked=True) as running:
        [child] = {*server.children()} - {*before, psutil.Process(running.process.pid)}
        child.kill()
        out, err = running.process.communicate(timeout=300)
    assert running.process.returncode == 1 and not out
    assert "muco: the model's process ended (exit code -9)" in err and "Traceback" not in err


OWNER = f"""{FORKED}
import signal
made = process.ModelProcess(sys.argv[1], "cpu", process.ImageLimits(), 4096)
print(made._process.pid, flush=True)
signal.pause()
"""


@pytest.mark.skipif(not Path("/proc").exists(), reason="looks at processes there")
def test_a_model_ends_with_its_server(folder):
    """However that ends; here it is a process that has nothing but the model."""
    with processes.Popen([sys.executable, "-c", OWNER, folder], stdout=processes.PIPE) as owner:
        child = int(owner.stdout.readline())
        assert Path(f"/proc/{child}").exists()
        owner.kill()
        owner.wait()
        until(lambda: not Path(f"/proc/{child}").exists() or "Z" in Path(f"/proc/{child}/stat").read_text().split()[2])
