"""A file of lines that only grows: what a kill leaves of it, who writes to it, and which failures get into it."""

from __future__ import annotations

import pytest

from muco.base.journal import Journal, read_lines
from muco.errors import OutputError


def lines(path) -> list[str]:
    return [line["a"] for _, line in read_lines(path)]


def test_a_torn_line_is_cut_off(tmp_path):
    path = tmp_path / "lines.jsonl"
    path.write_bytes(b'{"a": 1}\n{"a": "' + b"x" * 200_000)
    with Journal(path) as journal:
        journal.add({"a": "é\n"})
    assert path.read_bytes() == '{"a": 1}\n{"a": "é\\n"}\n'.encode()
    path.write_bytes(b"x" * 200_000)
    with Journal(path):
        pass
    assert path.read_bytes() == b""


def test_one_writer_at_a_time(tmp_path):
    with Journal(tmp_path / "a.jsonl"), pytest.raises(OutputError, match="another process is writing"):
        Journal(tmp_path / "a.jsonl")
    with Journal(tmp_path / "a.jsonl"):
        pass


def test_failures_wait_for_a_success_of_the_same_server(tmp_path):
    path = tmp_path / "a.jsonl"
    with Journal(path) as journal:
        journal.hold({"a": "bad 1"}, by="one")
        journal.hold({"a": "bad 2"}, by="two")
        assert lines(path) == []
        journal.succeed({"a": "good"}, by="one")
        assert lines(path) == ["good", "bad 1"]
        journal.hold({"a": "bad 3"}, by="one")
        journal.release()
        assert lines(path) == ["good", "bad 1", "bad 2", "bad 3"]
        journal.hold({"a": "never"})
    assert lines(path) == ["good", "bad 1", "bad 2", "bad 3"]


def test_without_any_success_a_run_ends_with_no_failure_written(tmp_path):
    path = tmp_path / "a.jsonl"
    with Journal(path) as journal:
        assert journal.settle(False) is None
        journal.hold({"a": "bad"})
        journal.hold({"a": "last"})
        assert journal.settle(False) == {"a": "last"} and lines(path) == []
        assert journal.settle(True) is None and lines(path) == ["bad", "last"]
