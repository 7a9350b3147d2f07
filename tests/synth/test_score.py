"""``muco data score``: a teacher's scores beside targets and negatives, whatever happens, for distillation."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from chat_server import ChatServer, Fault, likeness

import muco
from muco.cli import main
from muco.data import open_data
from muco.data.jsonl import write_jsonl
from muco.errors import DataError, MucoError, OutputError
from muco.synth.chat import Budget, Limits
from muco.synth.endpoint import Endpoint, EndpointError
from muco.synth.score import QUESTION, SAMPLING, score
from muco.training.recipe import from_dict

QUICK = Limits(backoff=0.01, retries=2, timeout=120)
WORDS = ("a red ring", "a red square", "a blue ring", "the green star", "a ring", "red")


def run(
    server: ChatServer, data: Any, output: Path, by: str = "rerank", limits: Limits = QUICK, **options: Any
) -> dict[str, Any]:
    async def inside() -> dict[str, Any]:
        sampling = SAMPLING if by == "chat" else {}
        async with Endpoint(server.url, "seer", limits=limits, sampling=sampling, **options) as endpoint:
            return await score(data, endpoint, output, by=by)

    return asyncio.run(inside())


def turn(query: str, target: Any, *negatives: Any, **more: Any) -> dict[str, Any]:
    return {"query": query, "target": target, **({"negatives": [*negatives]} if negatives else {}), **more}


@pytest.fixture
def rows(scenes) -> list[dict[str, Any]]:
    picture = str(scenes / "images/dev/00000.png")
    return [
        {"turns": [turn("a red thing", WORDS[0], *WORDS[1:4], kind="x"), turn("no negatives", "red")]},
        {"turns": [turn("a red thing", WORDS[0], *WORDS[1:4])]},  # asked about once
        {"image": picture, "turns": [turn("which ring is it?", WORDS[2], WORDS[3], {"image": picture})]},
        {"turns": [turn("taught already", "red", "blue", scores=[3, 1.5])]},
        {"turns": [turn(["a star", "stars"], [WORDS[3], "other"], {"text": "a star", "image": picture})]},
    ]


@pytest.fixture
def data(rows, tmp_path):
    write_jsonl(tmp_path / "rows.jsonl", rows)
    return open_data(tmp_path / "rows.jsonl")


def expected() -> list[list[list[float]]]:
    """The scores of every turn of the rows."""
    red = [likeness("a red thing", words) for words in WORDS[:4]]
    ring = [likeness("picture which ring is it?", words) for words in (WORDS[2], WORDS[3], "picture")]
    star = [likeness("a star", words) for words in (WORDS[3], "picture a star")]
    return [[red, []], [red], [ring], [[3, 1.5]], [star]]


def scores_of(file: Path) -> list[list[list[float]]]:
    found = open_data(file)
    return [[[*turn.scores] for turn in found[number].turns] for number in range(len(found))]


@pytest.mark.parametrize("by", ["rerank", "chat"])
def test_every_turn_with_negatives_gets_its_scores_in_their_order(data, rows, tmp_path, by):
    with ChatServer() as server:
        found = run(server, data, tmp_path / "out.jsonl", by)
        requests = {"rerank": 3, "chat": 4 + 3 + 2}[by]
        assert server.asked("rerank" if by == "rerank" else "judge") == requests
    assert {key: found[key] for key in ("turns", "found", "scored", "failed", "stopped")} == {
        "turns": 3,
        "found": 0,
        "scored": 3,
        "failed": 0,
        "stopped": None,
    }
    assert found["usage"]["requests"] == requests + 1 and found["usage"]["prompt_tokens"] > 0
    for own, wanted in zip(scores_of(tmp_path / "out.jsonl"), expected(), strict=True):
        for one, other in zip(own, wanted, strict=True):
            assert one == pytest.approx(other, abs=1e-6)
    before, after = open_data(tmp_path / "rows.jsonl"), open_data(tmp_path / "out.jsonl")
    for number in range(len(rows)):
        for one, other in zip(before[number].turns, after[number].turns, strict=True):
            assert (one.query, one.target, one.kind, one.negatives) == (
                other.query,
                other.target,
                other.kind,
                other.negatives,
            )


def test_images_are_sent_as_parts_and_texts_as_they_are(data, tmp_path):
    with ChatServer() as server:
        server.keep_bodies = True
        run(server, data, tmp_path / "out.jsonl")
        bodies = [body for body in server.bodies if "This is a test." not in body["documents"]]
    plain, seen = (next(body for body in bodies if isinstance(body["query"], kind)) for kind in (str, dict))
    assert all(isinstance(document, str) for document in plain["documents"][:3])
    assert [part["type"] for part in seen["query"]["content"]] == ["image_url", "text"]
    assert seen["query"]["content"][0]["image_url"]["url"].startswith("data:image/jpeg;base64,")
    assert [type(document) for document in seen["documents"]] == [str, str, dict]


def test_a_budget_stops_it_and_the_same_command_resumes(data, tmp_path):
    output = tmp_path / "out.jsonl"
    with ChatServer() as server:
        first = run(server, data, output, budget=Budget(requests=2))
        assert first["output"] is None and "budget of 2 requests" in first["stopped"] and not output.exists()
        second = run(server, data, output)
        assert second["found"] == 1 and second["scored"] == 2 and server.asked("rerank") == 3
    assert scores_of(output)[0][0] == pytest.approx(expected()[0][0])
    with ChatServer() as server, pytest.raises(OutputError, match="exists"):
        run(server, data, output)


def test_another_teacher_or_question_is_asked_anew(data, tmp_path):
    with ChatServer() as server:
        run(server, data, tmp_path / "out.jsonl")
        (tmp_path / "out.jsonl").unlink()
        found = run(server, data, tmp_path / "out.jsonl", "chat")
    assert (found["found"], found["scored"]) == (0, 3)
    assert len((tmp_path / "out.jsonl.journal").read_text().splitlines()) == 6


def test_passing_faults_change_nothing(data, tmp_path):
    faults = (Fault("500", times=1), Fault("html", every=2, times=1), Fault("429", every=2, times=1))
    with ChatServer(faults=faults) as server:
        found = run(server, data, tmp_path / "out.jsonl", limits=Limits(backoff=0.01, retries=9))
    assert found["scored"] == 3 and found["usage"]["retries"] >= 3
    assert scores_of(tmp_path / "out.jsonl")[4][0] == pytest.approx(expected()[4][0])


def test_turns_without_an_answer_for_now_are_asked_again_before_anything_is_written(data, tmp_path):
    output = tmp_path / "out.jsonl"
    with ChatServer(faults=[Fault("500", every=2, to="rerank")]) as server:
        found = run(server, data, output)
    assert 0 < found["unanswered"] < 3 and found["scored"] == 3 - found["unanswered"]
    assert "run the same command again" in found["stopped"] and not output.exists()
    with ChatServer() as server:
        assert run(server, data, output)["found"] == found["scored"]
    assert scores_of(output)[0][0] == pytest.approx(expected()[0][0])


def test_turns_without_an_answer_stay_without_scores(data, tmp_path):
    """Where others get one; of a server that refuses all, nothing is kept."""
    output = tmp_path / "out.jsonl"
    with ChatServer(faults=[Fault("400", to="rerank")]) as server:
        found = run(server, data, output)
    assert (found["scored"], found["failed"]) == (0, 3) and not output.exists()
    assert "HTTP 400" in found["stopped"] and "run the same command again" in found["stopped"]
    with ChatServer(faults=[Fault("400", every=2, to="rerank")]) as server:
        found = run(server, data, output)
    assert found["scored"] and found["failed"] and found["scored"] + found["failed"] == 3
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl.journal").read_text().splitlines()]
    errors = [line["error"] for line in lines if "error" in line]
    assert len(errors) == found["failed"] and all("HTTP 400" in error for error in errors)
    output.unlink()
    with ChatServer() as server:
        again = run(server, data, output)
    assert (again["found"], again["scored"], again["failed"]) == (found["scored"], 0, found["failed"])


def test_servers_that_cannot_judge_are_told_apart(data, tmp_path):
    with ChatServer(tells_logprobs=False) as server:
        found = run(server, data, tmp_path / "a.jsonl", "chat")
        assert found["failed"] == 3 and "no log-probability" in found["stopped"]
    with ChatServer(ranks=False) as server, pytest.raises(EndpointError, match="refuses a first question.*404"):
        run(server, data, tmp_path / "b.jsonl")
    with ChatServer() as server, pytest.raises(MucoError, match="'rerank' or 'chat'"):
        run(server, data, tmp_path / "c.jsonl", "vote")


@pytest.mark.parametrize("by", ["rerank", "chat"])
def test_turns_that_a_broken_server_refused_are_asked_again(data, tmp_path, by):
    faults = [Fault("400", to="rerank")]
    with ChatServer(faults=faults, tells_logprobs=False) as server, pytest.raises(EndpointError, match="in a row"):
        run(server, data, tmp_path / "out.jsonl", by, limits=Limits(max_failures=3, concurrency=1))
    with ChatServer() as server:
        found = run(server, data, tmp_path / "out.jsonl", by)
    assert (found["found"], found["scored"], found["failed"]) == (0, 3, 0)


def test_an_image_that_cannot_be_read_is_named(rows, tmp_path):
    rows[2]["image"] = "gone.png"
    write_jsonl(tmp_path / "rows.jsonl", rows)
    with ChatServer() as server, pytest.raises(DataError, match=r"rows\.jsonl:3.*gone\.png"):
        run(server, open_data(tmp_path / "rows.jsonl"), tmp_path / "out.jsonl")
    assert not (tmp_path / "out.jsonl").exists()


def test_the_command_scores_and_training_learns_from_it(scenes, tmp_path, capsys):
    """From a file of pairs with negatives to a run with distillation; the question is ours to change."""
    samples = open_data(scenes / "train.jsonl")
    captions = [samples[number].turns[-1].target[0].text for number in range(16)]
    rows = [
        {
            "image": str(samples[number].images[0]),
            "turns": [turn("", captions[number], *(captions[(number + step) % 16] for step in (1, 2)))],
        }
        for number in range(16)
    ]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    output = tmp_path / "scored.jsonl"
    with ChatServer() as server:
        command = ["data", "score", str(tmp_path / "rows.jsonl"), "--endpoint", server.url, "--model", "seer"]
        question = f"Does it fit? {QUESTION}"
        assert main([*command, "-o", str(output), "--by", "chat", "--question", question, "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["scored"] == 16
        assert main([*command, "-o", str(output)]) == 1 and "exists" in capsys.readouterr().err
    tiny = {"width": 64, "feed_forward": 128, "vision_width": 32, "vision_depth": 1, "vocabulary": 512}
    values = {
        "output": str(tmp_path / "run"),
        "model": {"tiny": tiny, "vision": "trained"},
        "data": {"train": [{"path": str(output)}]},
        "turns": {"negatives": 1},
        "loss": {"distillation": {"kind": "symmetric_kl", "teacher_temperature": 0.1}},
        "batch": {"size": 8, "token_budget": 300},
        "trainer": {"max_steps": 2, "logging_steps": 1, "save_strategy": "no", "report_to": []},
    }
    recorded = json.loads((muco.train(from_dict(values)) / "run.json").read_text())
    assert len(recorded["loss"]) == 2 and all(0 < loss < 1 for _, loss in recorded["loss"])  # a divergence, no InfoNCE
