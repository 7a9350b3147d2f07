"""``muco data caption``: every image of training data captioned once, whatever happens, and read back by training."""

from __future__ import annotations

import asyncio
import json
import os
import pickle
import re
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import processes
import pytest
from chat_server import REFUSAL, ChatServer, Fault

from muco.cli import main
from muco.data import open_data
from muco.data.captions import CaptionedData, Captions
from muco.data.jsonl import write_jsonl
from muco.errors import DataError
from muco.images import image_digest
from muco.synth.caption import caption
from muco.synth.chat import Budget, Limits
from muco.synth.endpoint import Endpoint, EndpointError
from muco.synth.prompts import Prompts

QUICK = Limits(backoff=0.01, retries=2, timeout=120)


def run(server: ChatServer, data: Any, output: Path, limits: Limits = QUICK, **options: Any) -> dict[str, Any]:
    async def inside() -> dict[str, Any]:
        async with Endpoint(server.url, "seer", limits=limits, **options) as endpoint:
            return await caption(data, endpoint, output, prompts=Prompts())

    return asyncio.run(inside())


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def truth(scenes: Path, split: str) -> dict[str, str]:
    """Digest of the image -> its caption."""
    rows = lines(scenes / f"{split}.jsonl")
    return {image_digest(scenes / row["image"]): row["turns"][-1]["target"] for row in rows}


@pytest.fixture
def dev(scenes):
    return open_data(scenes / "dev.jsonl")


def test_every_image_gets_its_caption_once(scenes, dev, tmp_path):
    output = tmp_path / "captions.jsonl"
    with ChatServer(scenes) as server:
        found = run(server, dev, output)
        assert {key: found[key] for key in ("images", "found", "captioned", "failed", "stopped")} == {
            "images": 16,
            "found": 0,
            "captioned": 16,
            "failed": 0,
            "stopped": None,
        }
        assert found["usage"]["requests"] == 17  # and a first question
        again = run(server, dev, output)
        assert (again["found"], again["captioned"]) == (16, 0) and server.asked("caption") == 16
    made = lines(output)
    assert {line["image"]: line["caption"] for line in made} == truth(scenes, "dev")
    assert {(line["model"], line["prompt"]) for line in made} == {("seer", Prompts().name)}


def test_which_images_are_asked_about(scenes, tmp_path):
    """The same image twice, one with a caption of its own, one of a negative, targets and queries."""
    pictures = [str(scenes / f"images/dev/{n:05}.png") for n in range(5)]
    turn = {"query": {"text": "this", "image": pictures[0]}, "target": {"image": pictures[1], "caption": "my own"}}
    rows = [
        {"turns": [turn, {"query": "a", "target": {"image": pictures[0]}, "negatives": [{"image": pictures[2]}]}]},
        {
            "image": pictures[3],
            "turns": [{"query": "", "target": "b"}, {"query": "c", "target": {"image": pictures[4]}}],
        },
    ]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    data = open_data(tmp_path / "rows.jsonl")
    with ChatServer(scenes) as server:
        assert run(server, data, tmp_path / "captions.jsonl")["images"] == 3
    known = truth(scenes, "dev")
    told = [known[image_digest(picture)] for picture in pictures]
    first, second = (CaptionedData(data, tmp_path / "captions.jsonl")[n] for n in range(2))
    assert [first.turns[0].query[0].caption, first.turns[0].target[0].caption] == [told[0], "my own"]
    assert [first.turns[1].query[0].caption, first.turns[1].target[0].caption] == ["", told[0]]
    assert [turn.query[0].caption for turn in second.turns] == [told[3], told[3]]  # of the sample's image
    assert [turn.target[0].caption for turn in second.turns] == ["", told[4]]


def test_captions_are_hidden_by_reconstruction(scenes, tmp_path):
    import numpy as np

    from muco.reconstruction import reconstruction_dialogues

    pairs = open_data(scenes / "train_pairs.jsonl")
    with ChatServer(scenes) as server:
        run(server, pairs, tmp_path / "captions.jsonl")
    data = CaptionedData(pairs, tmp_path / "captions.jsonl")
    assert len(data) == len(pairs) and data.path == pairs.path
    assert data.fingerprint != pairs.fingerprint and re.fullmatch("[0-9a-f]{64}", data.fingerprint)
    sample = pickle.loads(pickle.dumps(data))[3]  # as a worker gets it
    words = set(sample.turns[0].query[0].text.split())  # the caption, by which the image is asked for
    dialogue, _ = reconstruction_dialogues(
        sample, sample.turns[0].query[0], sample.turns[0].target[0], np.random.default_rng(1)
    )
    hidden = dialogue.turns[1].text
    assert "<|mask|>" in hidden and len(words & set(hidden.split())) > 3


def test_failures_are_kept_and_their_images_stay_without(scenes, dev, tmp_path):
    output = tmp_path / "captions.jsonl"
    with ChatServer(scenes) as server:
        run(server, dev, tmp_path / "first.jsonl")  # which requests there are, to choose one of them by its content
        server.faults = [Fault("400", every=4), Fault("empty", every=3, to="caption")]
        found = run(server, dev, output, limits=replace(QUICK, concurrency=1, max_failures=100))
        asked = server.asked()
        again = run(server, dev, output)
        assert server.asked() == asked + 1 and again["found"] == 16
    failed = [line for line in lines(output) if "error" in line]
    assert found["failed"] == len(failed) > 0 < found["captioned"]
    assert found["captioned"] + found["failed"] == 16
    assert {line["error"].split(":")[0] for line in failed} <= {"HTTP 400", "empty"}
    captions = Captions(output)
    assert [captions[line["image"]] for line in failed] == [""] * len(failed)
    known = truth(scenes, "dev")
    assert all(captions[line["image"]] == known[line["image"]] for line in lines(output) if "caption" in line)


def test_a_missing_image_is_said_and_the_rest_goes_on(scenes, tmp_path, caplog):
    picture = str(scenes / "images/dev/00000.png")
    rows = [{"image": name, "turns": [{"query": "", "target": "b"}]} for name in ("gone.png", "broken.png", picture)]
    (tmp_path / "broken.png").write_bytes(b"no image")
    write_jsonl(tmp_path / "rows.jsonl", rows)
    data = open_data(tmp_path / "rows.jsonl")
    with ChatServer(scenes) as server:
        found = run(server, data, tmp_path / "captions.jsonl")
    assert (found["images"], found["captioned"], found["failed"]) == (2, 1, 2)
    assert "gone.png: no such image file" in caplog.text
    captioned = CaptionedData(data, tmp_path / "captions.jsonl")
    assert [captioned[n].turns[0].query[0].caption for n in (0, 1)] == ["", ""]
    assert captioned[2].turns[0].query[0].caption


@pytest.mark.parametrize("kind", ["refusal", "empty", "short", "html", "500"])
def test_a_server_that_is_of_no_use_stops_the_run_and_blames_no_image(kind, scenes, dev, tmp_path):
    says = {"refusal": REFUSAL, "empty": "empty", "short": "too short: red", "html": "502 Bad", "500": "out of order"}
    output = tmp_path / "captions.jsonl"
    with ChatServer(scenes, faults=[Fault(kind, to="caption")]) as server:
        with pytest.raises(EndpointError, match=f"6 answers of 'seer' in a row.*{says[kind]}"):
            run(server, dev, output, limits=Limits(backoff=0.01, retries=1, max_failures=6))
        assert output.read_text() == ""
        server.faults = []
        assert run(server, dev, output)["captioned"] == 16


@pytest.mark.parametrize("kind", ["refusal", "empty", "400"])
def test_a_useless_server_blames_no_image_though_they_are_too_few_to_stop_it(kind, scenes, tmp_path):
    """Nor one that an earlier run could not caption: only a caption shows that the server is sound."""
    pictures = [str(scenes / f"images/dev/{n:05}.png") for n in range(6)]
    write_jsonl(tmp_path / "rows.jsonl", [{"image": p, "turns": [{"query": "", "target": "b"}]} for p in pictures])
    data, output = open_data(tmp_path / "rows.jsonl"), tmp_path / "captions.jsonl"
    earlier = {"image": image_digest(pictures[0]), "error": "empty: ", "model": "seer", "prompt": "old"}
    output.write_text(json.dumps(earlier) + "\n")
    with ChatServer(scenes, faults=[Fault(kind, to="caption")]) as server:
        found = run(server, data, output)
        assert (found["found"], found["captioned"], found["failed"]) == (1, 0, 5)
        assert re.match(r"no image got a caption, the last: (refusal|empty|HTTP 400)", found["stopped"])
        assert lines(output) == [earlier]
        server.faults = []
        again = run(server, data, output)
        assert (again["found"], again["captioned"], again["stopped"]) == (1, 5, None)
        write_jsonl(
            tmp_path / "one.jsonl",
            [{"image": str(scenes / "images/dev/00007.png"), "turns": [{"query": "", "target": "b"}]}],
        )
        server.faults = [Fault(kind, to="caption")]
        last = run(server, open_data(tmp_path / "one.jsonl"), output)  # which answered before, so it is the image
        assert (last["failed"], last["stopped"], len(lines(output))) == (1, None, 7)


def test_a_budget_stops_and_the_next_run_goes_on(scenes, dev, tmp_path):
    output = tmp_path / "captions.jsonl"
    with ChatServer(scenes) as server:
        first = run(server, dev, output, budget=Budget(requests=6))
        assert first["captioned"] == 5 and first["stopped"] == "the budget of 6 requests is spent"
        second = run(server, dev, output, budget=Budget(tokens=500), limits=replace(QUICK, concurrency=1))
        assert second["found"] > 0 and "500 tokens" in second["stopped"]
        third = run(server, dev, output)
        assert (third["stopped"], third["found"] + third["captioned"]) == (None, 16)
        assert server.asked("caption") == 16
    assert {line["image"]: line["caption"] for line in lines(output)} == truth(scenes, "dev")


def command(server: ChatServer, scenes: Path, output: Path, *more: str) -> list[str]:
    asked = ["--endpoint", server.url, "--model", "seer", "--output", str(output), "--json"]
    return ["data", "caption", str(scenes / "train.jsonl"), *asked, *more]


def test_the_command(scenes, tmp_path, capsys):
    output = tmp_path / "captions.jsonl"
    with ChatServer(scenes) as server:
        server.keep_bodies = True
        (tmp_path / "mine.yaml").write_text("version: mine-1\npicture: Was ist das?\nlanguage: German\n")
        words = ["--prompts", str(tmp_path / "mine.yaml"), "--sampling", "top_p=0.9", "--sampling", "temperature=null"]
        assert main(command(server, scenes, output, *words)) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["captioned"], found["failed"], found["output"]) == (64, 0, str(output))
    body = server.bodies[-1]
    assert body["messages"][0]["content"][1]["text"] == "Was ist das?"
    assert (body["top_p"], body["max_tokens"], "temperature" in body) == (0.9, 256, False)
    assert lines(output)[0]["prompt"].startswith("mine-1 (")


def test_what_a_user_can_cause_is_one_line_and_1(scenes, tmp_path, capsys):
    with ChatServer(scenes) as server:
        output = tmp_path / "captions.jsonl"
        for words, says in (
            (["--model", "seen"], "did you mean 'seer'?"),
            (["--endpoint", "http://127.0.0.1:9"], "cannot be reached"),
            (["--prompts", str(tmp_path / "gone.yaml")], "gone.yaml: cannot be read (No such file"),
        ):
            assert main([*command(server, scenes, output), *words]) == 1
            err = capsys.readouterr().err
            assert says in err and err.count("\n") == 1
        assert not output.exists() and not server.log


@pytest.mark.slow
def test_killed_ten_times_nothing_is_lost_or_asked_twice(scenes, tmp_path):
    output = tmp_path / "captions.jsonl"
    with ChatServer(scenes, latency=0.1) as server:
        words = [sys.executable, "-m", "muco", *command(server, scenes, output, "--concurrency", "1")]
        for kill in range(10):
            process = processes.Popen(words, stdout=processes.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"})
            until = server.asked("caption", 200) + 4
            while server.asked("caption", 200) < until and process.poll() is None:
                time.sleep(0.01)
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
            assert len(output.read_bytes().split(b"\n")) > 3 * kill
        assert processes.run(words, capture_output=True, check=True).returncode == 0
        assert server.asked("caption") <= 64 + 10  # at each kill one question was under way
    assert {line["image"]: line["caption"] for line in lines(output)} == truth(scenes, "train")
    assert len(lines(output)) == 64


# ── the file ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("no json", "captions.jsonl:1: not a line of JSON"),
        ("[1]", "captions.jsonl:1: not an object"),
        ('{"image": "12"}', "neither a caption nor an error"),
        ('{"image": "12", "caption": "a"}', "'image' must be the SHA-256 of an image, not '12'"),
        ('{"caption": "a"}', "'image' must be the SHA-256"),
    ],
)
def test_a_file_that_is_none(line, says, tmp_path):
    (tmp_path / "captions.jsonl").write_text(line + "\n")
    with pytest.raises(DataError, match=says):
        Captions(tmp_path / "captions.jsonl")


def test_the_later_line_counts_and_digests_are_compared_whole(tmp_path):
    same = "ab" * 8
    one, two, three = (same + part * 24 for part in ("01", "02", "03"))
    given = [(one, "first"), (two, "second"), (one, "later")]
    (tmp_path / "captions.jsonl").write_text("".join(json.dumps({"image": i, "caption": c}) + "\n" for i, c in given))
    captions = Captions(tmp_path / "captions.jsonl")
    assert (len(captions), captions[one], captions[two]) == (2, "later", "second")
    with pytest.raises(DataError, match="nothing about the image abababababab…; run `muco data caption` again"):
        captions[three]


def test_an_image_without_a_line_is_an_error_with_its_row(scenes, dev, tmp_path):
    with pytest.raises(DataError, match="no such file of captions"):
        CaptionedData(dev, tmp_path / "captions.jsonl")
    (tmp_path / "captions.jsonl").write_text("")
    with pytest.raises(DataError, match=r"dev.jsonl:1: .*captions.jsonl: nothing about the image"):
        CaptionedData(dev, tmp_path / "captions.jsonl")[0]
