"""``muco synth`` as a whole: against a real server, whatever that does, killed, resumed, in several processes."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import processes
import pyarrow.parquet as pq
import pytest
from chat_server import REFUSAL, ChatServer, Fault

import muco
from muco.cli import main
from muco.data import open_data
from muco.data.check import check as check_data
from muco.errors import DataError, OutputError
from muco.synth.chat import Budget, Limits
from muco.synth.endpoint import EndpointError
from muco.synth.pictures import Filter
from muco.synth.pipeline import Job, Server
from muco.synth.prompts import Prompts
from muco.synth.run import Price, estimate, synth
from muco.synth.sources import open_source
from muco.synth.writing import Setting
from muco.training.recipe import from_dict

QUICK = Limits(concurrency=8, backoff=0.01, retries=3, timeout=120)
ALL = Filter(min_side=64, near=-1)  # scenes are small, and some look alike
SHARD = 10
PICTURES = 32


@pytest.fixture(scope="module")
def pictures(scenes, tmp_path_factory) -> Path:
    """A folder with 32 pictures of scenes, in two folders."""
    folder = tmp_path_factory.mktemp("pictures")
    for split in ("dev", "test"):
        shutil.copytree(scenes / "images" / split, folder / split)
    return folder


def job(server: ChatServer, source: Path, output: Path, **changes: Any) -> Job:
    made = Job(
        open_source(source),
        output,
        Server(server.url, "seer", {"temperature": 0.2}, QUICK),
        Server(server.url, "scribe", {}, QUICK),
        filter=ALL,
        shard=SHARD,
    )
    return replace(made, **changes)


def written(output: Path) -> dict[str, Any]:
    """Everything that a run has made, as far as it may not depend on how it went."""
    shards = sorted((output / "shards").glob("*.parquet"))
    rejected = [file.read_text() for file in sorted((output / "shards").glob("*.jsonl"))]
    rows = [pq.read_table(shard).to_pylist() for shard in shards]
    assert not (output / "train.jsonl").exists() or len(open_data(output / "train.jsonl")) == sum(map(len, rows))
    return {"rows": rows, "rejected": rejected}


def turns_written(output: Path) -> list[list[Any]]:
    """Of every shard what was said about each picture."""
    keys = ("picture", "qry", "pos_text", "neg_text", "kind")
    return [[[row[key] for key in keys] for row in shard] for shard in written(output)["rows"]]


@pytest.fixture(scope="module")
def whole(scenes, pictures, tmp_path_factory) -> Path:
    """The output of a run that nothing disturbed."""
    output = tmp_path_factory.mktemp("whole") / "out"
    with ChatServer(scenes) as server:
        synth(job(server, pictures, output))
    return output


# ── what comes out ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_both_forms_hold_the_same_samples(whole, pictures):
    ours = open_data(whole / "train.jsonl")
    theirs = open_data(whole, "m3t", {"images": str(pictures)})
    assert len(ours) == len(theirs) == PICTURES
    for number in range(PICTURES):
        mine, other = ours[number], theirs[number]
        assert Path(mine.images[0]).resolve() == Path(other.images[0]).resolve()
        assert [(t.query, t.target, t.kind) for t in mine.turns] == [(t.query, t.target, t.kind) for t in other.turns]
        assert [len(turn.negatives) for turn in mine.turns] == [1, 0, 0, 0, 0, 0, 0]
    assert check_data(ours).ok


def test_turns_are_true_of_their_picture(whole, scenes):
    """The retrieval turn's target is the caption of the scene that the picture shows."""
    truth = {}
    for split in ("dev", "test"):
        for line in (scenes / f"{split}.jsonl").read_text().splitlines():
            row = json.loads(line)
            truth[(scenes / row["image"]).read_bytes()] = row["turns"][-1]["target"]
    data = open_data(whole / "train.jsonl")
    found = {Path(data[n].images[0]).read_bytes(): data[n].turns[-1].target[0].text for n in range(len(data))}
    assert found == truth


def test_a_shard_says_how_it_was_made(whole):
    told = json.loads(pq.read_schema(whole / "shards/00000.parquet").metadata[b"muco.synth"])
    assert told["captioner"] == {"model": "seer", "sampling": {"temperature": 0.2}}
    assert told["prompt"] == Prompts().name and told["filter"]["min_side"] == 64 and told["shard"] == SHARD
    assert json.loads((whole / "synth.json").read_text()) == told


def test_the_card_and_the_sheet(whole):
    card = (whole / "README.md").read_text()
    assert "32 pictures with 224 pairs" in card and "| global | 64 |" in card and "| kept | 32 |" in card
    assert "captioner: seer" in card and Prompts().name in card and "Nothing." in card
    sheet = (whole / "sheet.html").read_text()
    assert sheet.count("data:image/") >= PICTURES
    assert not (whole / "answers/00000.jsonl").exists()


def test_nothing_is_asked_twice(scenes, pictures, tmp_path):
    output = tmp_path / "out"
    with ChatServer(scenes) as server:
        first = synth(job(server, pictures, output))
        assert (server.asked("caption"), server.asked("pairs")) == (PICTURES, PICTURES)
        before = written(output)
        again = synth(job(server, pictures, output))
        assert (server.asked("caption"), server.asked("pairs")) == (PICTURES, PICTURES)
    assert written(output) == before
    assert (first["rows"], first["shards"], first["finished"], first["pairs"]) == (PICTURES, 4, 4, 7 * PICTURES)
    assert first["kinds"]["global"] == 2 * PICTURES and first["rejected"] == [] and first["stopped"] is None
    assert again["rows"] == PICTURES and again["estimate"]["writer"]["requests"] == 0


def test_pictures_by_url_and_in_tar_files_are_stored(scenes, pictures, tmp_path, whole):
    import tarfile

    with tarfile.open(tmp_path / "shard-000.tar", "w") as tar:
        for file in sorted(pictures.rglob("*.png")):
            tar.add(file, arcname=f"{file.parent.name}-{file.name}")
    output = tmp_path / "out"
    with ChatServer(scenes) as server:
        synth(job(server, tmp_path / "shard-000.tar", output))
    data = open_data(output / "train.jsonl")
    moved = tmp_path / "elsewhere"
    shutil.move(output, moved)  # with its pictures it can be taken anywhere
    data, known = open_data(moved / "train.jsonl"), open_data(whole / "train.jsonl")
    assert [Path(data[n].images[0]).is_relative_to(moved / "images") for n in range(len(data))] == [True] * PICTURES
    assert [data[n].turns for n in range(len(data))] == [known[n].turns for n in range(len(known))]


# ── servers that fail ────────────────────────────────────────────────────────────────────────────────────────────────


def test_transport_that_fails_changes_nothing(scenes, pictures, whole, tmp_path):
    faults = [
        Fault("429", every=5, times=1, seconds=0.01),
        Fault("500", every=4, times=2),
        Fault("cut", every=6, times=1),
        Fault("html", every=7, times=1),
        Fault("slow", every=9, times=1, seconds=0.3),
    ]
    with ChatServer(scenes, faults=faults, capacity=12) as server:
        mine, patient = job(server, pictures, tmp_path / "out"), replace(QUICK, retries=9)
        mine = replace(mine, captioner=replace(mine.captioner, limits=patient))
        found = synth(replace(mine, writer=replace(mine.writer, limits=patient)))
    assert written(tmp_path / "out") == written(whole)
    assert found["usage"]["captioner"]["retries"] + found["usage"]["writer"]["retries"] > PICTURES / 4


@pytest.mark.parametrize("kind", ["invalid", "schema", "refusal", "empty"])
def test_answers_of_no_use_are_asked_for_again_and_counted(scenes, pictures, kind, tmp_path):
    with ChatServer(scenes, faults=[Fault(kind, every=3, to="pairs")]) as server:
        found = synth(job(server, pictures, tmp_path / "out"))
        asked = Counter(digest for what, digest, _ in server.log if what == "pairs")
    reasons = {"invalid": "not JSON", "schema": "missing field", "refusal": "not JSON", "empty": "not JSON"}
    counted = {line["reason"]: line["count"] for line in found["rejected"] if line["what"] == "answer"}
    bad = server.asked("pairs") - found["rows"]
    assert bad > 3 and counted == {reasons[kind]: 7 * bad}
    assert max(asked.values()) == 1  # asked for again in other words, with another seed


def test_a_picture_that_no_answer_fits_is_recorded(scenes, pictures, tmp_path):
    """A third of the pictures never get a caption; the others are as ever."""
    faults = [Fault("refusal", every=3, to="caption")]
    setting = Setting(attempts=1)
    with ChatServer(scenes, faults=faults) as server:
        found = synth(job(server, pictures, tmp_path / "out", setting=setting))
    lost = {line["reason"]: line["count"] for line in found["rejected"] if line["what"] == "picture"}
    assert lost == {"no caption": PICTURES - found["rows"]} and 3 < lost["no caption"] < PICTURES
    lines = [json.loads(line) for text in written(tmp_path / "out")["rejected"] for line in text.splitlines()]
    said = [line for line in lines if line["what"] == "last answer"]
    assert len(said) == lost["no caption"]
    assert {(line["reason"], line["text"]) for line in said} == {("refusal", REFUSAL)}
    assert all(re.fullmatch("[0-9a-f]{64}", line["picture"]) and line["name"].endswith(".png") for line in said)


def test_a_server_that_talks_nonsense_stops_the_run_and_is_not_held_against_pictures(scenes, pictures, whole, tmp_path):
    output = tmp_path / "out"
    limits = replace(QUICK, max_failures=6)
    with ChatServer(scenes, faults=[Fault("noise", to="pairs")]) as server:
        bad = job(server, pictures, output)
        with pytest.raises(EndpointError, match=r"6 answers of 'scribe' in a row were of no use.*lorem ipsum"):
            synth(replace(bad, writer=replace(bad.writer, limits=limits)))
    assert not list((output / "shards").glob("*")) if (output / "shards").exists() else True
    with ChatServer(scenes) as server:
        synth(job(server, pictures, output))
        assert server.asked("caption") < PICTURES  # those of before were kept
    assert written(output) == written(whole)


def test_a_server_that_goes_away_for_good_leaves_the_rest_for_later(scenes, pictures, whole, tmp_path):
    output = tmp_path / "out"
    with ChatServer(scenes, faults=[Fault("500", every=8, to="pairs")]) as server:
        found = synth(job(server, pictures, output))
    assert 0 < found["unanswered"] < PICTURES and found["finished"] < 4
    with ChatServer(scenes) as server:
        found = synth(job(server, pictures, output))
        assert found["unanswered"] == 0 and server.asked("pairs") < PICTURES
    assert written(output) == written(whole)


def test_a_question_that_is_refused_is_recorded(scenes, pictures, tmp_path):
    with ChatServer(scenes, faults=[Fault("400", every=6, to="pairs")]) as server:
        found = synth(job(server, pictures, tmp_path / "out"))
    lost = [line for line in found["rejected"] if line["what"] == "picture"]
    assert [line["reason"] for line in lost] == ["refused by the server"]
    assert lost[0]["count"] == PICTURES - found["rows"] > 0 and found["finished"] == 4


def test_the_few_good_turns_of_a_picture_are_kept(scenes, pictures, tmp_path):
    """Words that are too few for two kinds of answers: those pairs go, the others stay."""
    words = {**Prompts().words, "classification": 2, "creative": 4}
    setting = Setting(replace(Prompts(), words=words), attempts=2)
    with ChatServer(scenes) as server:
        found = synth(job(server, pictures, tmp_path / "out", setting=setting))
        assert server.asked("pairs") == 2 * PICTURES
    assert found["kinds"] == {"global": 64, "local": 64, "retrieval": 32}
    missing = {line["reason"]: line["count"] for line in found["rejected"] if line["what"] == "pair"}
    assert missing == {"too long": 2 * PICTURES}
    data = open_data(tmp_path / "out", "m3t", {"images": str(pictures)})
    assert [turn.kind for turn in data[0].turns] == ["global", "global", "local", "local", "retrieval"]
    with ChatServer(scenes) as server, pytest.raises(OutputError, match="was begun with setting"):
        synth(job(server, pictures, tmp_path / "out", setting=replace(setting, min_turns=6)))
    with ChatServer(scenes) as server:
        found = synth(job(server, pictures, tmp_path / "none", setting=replace(setting, min_turns=6)))
    assert found["rows"] == 0 and {"what": "picture", "reason": "too few turns", "count": PICTURES} in found["rejected"]
    assert not (tmp_path / "none/sheet.html").exists()


# ── budgets, and what is said before ─────────────────────────────────────────────────────────────────────────────────


@pytest.mark.slow
def test_small_budgets_come_to_the_same(scenes, pictures, whole, tmp_path):
    output, runs = tmp_path / "out", 0
    with ChatServer(scenes, faults=[Fault("invalid", every=4, times=1, to="pairs")]) as server:
        while (found := synth(job(server, pictures, output), budget=Budget(requests=9)))["stopped"]:
            runs += 1
            assert found["stopped"] == "the budget of 9 requests is spent" and runs < 20
        undisturbed = tmp_path / "undisturbed"
        asked = server.asked()
    with ChatServer(scenes, faults=[Fault("invalid", every=4, times=1, to="pairs")]) as server:
        synth(job(server, pictures, undisturbed))
        trials = 2 * (runs + 1) - 2
        assert asked == server.asked() + trials  # each run asks both servers one question first
    assert runs > 5 and written(output) == written(undisturbed)


def test_a_dry_run_asks_one_question_of_each_and_tells_the_cost(scenes, pictures, tmp_path):
    said: list[str] = []
    with ChatServer(scenes) as server:
        prices = (Price(1.0, 2.0), Price(3.0, 4.0))
        found = synth(job(server, pictures, tmp_path / "out"), dry_run=True, prices=prices, say=said.append)
        assert server.asked() == server.asked("trial") == 2
    assert found["pictures"] == {"pictures": 32, "kept": 32}
    need = estimate(Prompts(), 32, 84 * 84, prices)
    assert found["estimate"].pop("seconds") < 60
    assert found["estimate"] == {role: vars(one) | {"cost": round(one.cost, 2)} for role, one in need.items()}
    assert need["captioner"].cost == pytest.approx(
        (need["captioner"].read * 1.0 + need["captioner"].written * 2.0) / 1e6
    )
    assert said[0].startswith("32 of 32 pictures are kept, 32 of them not finished: about 64 requests, ")
    assert re.search(r"; at least \d+ s at the pace of a first question$", said[0])
    assert not (tmp_path / "out/train.jsonl").exists()


def test_the_time_told_beforehand(scenes, pictures, tmp_path):
    """From how long a first question takes, or from the pace that is asked for."""
    with ChatServer(scenes, latency=0.8) as server:
        found = synth(job(server, pictures, tmp_path / "out"), dry_run=True)
        assert 0.8 * PICTURES / 8 <= found["estimate"]["seconds"] < 4 * 0.8 * PICTURES / 8
        mine = job(server, pictures, tmp_path / "out")
        slow = replace(mine, writer=replace(mine.writer, limits=replace(QUICK, requests_per_minute=2)))
        assert synth(slow, dry_run=True)["estimate"]["seconds"] == pytest.approx(30 * PICTURES)


def test_a_run_says_how_long_the_rest_takes(scenes, pictures, tmp_path, monkeypatch):
    said: list[str] = []
    monkeypatch.setattr("muco.synth.run.FIRST", 5)
    with ChatServer(scenes) as server:
        synth(job(server, pictures, tmp_path / "out"), say=said.append)
    assert re.fullmatch(r"the first 5 pictures are through; at this pace the rest takes \d+ s", said[1])


# ── killed, resumed, in several processes ────────────────────────────────────────────────────────────────────────────


def command(server: ChatServer, source: Path, output: Path, *more: str) -> list[str]:
    line = [sys.executable, "-m", "muco", "synth", str(source), "--captioner", server.url, "--captioner-model", "seer"]
    line += ["--writer", server.url, "--writer-model", "scribe", "--output", str(output), "--min-side", "64"]
    line += ["--near", "-1", "--shard-size", str(SHARD), "--concurrency", "4", "--json", *more]
    return line


def run_command(line: list[str], **more: Any) -> processes.CompletedProcess[str]:
    return processes.run(line, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, **more)


@pytest.mark.slow
def test_killed_ten_times_it_comes_to_the_same(scenes, pictures, tmp_path):
    """At moments drawn anew in each run of the tests: whatever they are, the result is that of an undisturbed run."""
    moments = random.Random()
    faults = [Fault("invalid", every=4, to="pairs"), Fault("500", every=5, times=1)]
    with ChatServer(scenes, latency=0.1, faults=faults) as server:
        done = run_command(command(server, pictures, tmp_path / "undisturbed"))
        assert done.returncode == 0, done.stderr
        asked = server.asked()
    output = tmp_path / "killed"
    with ChatServer(scenes, latency=0.1, faults=faults) as server:
        line, kills, seen = command(server, pictures, output), 0, 0
        while kills < 10:
            process = processes.Popen(line, stdout=processes.DEVNULL, stderr=processes.DEVNULL)
            until = server.asked() + moments.randint(1, 12)
            while server.asked() < until and process.poll() is None:
                time.sleep(0.005)
            if process.poll() is not None:
                break
            time.sleep(moments.random() * 0.1)
            process.send_signal(signal.SIGKILL)
            process.wait()
            kills += 1
            seen = max(seen, len(list((output / "shards").glob("*.parquet"))))
        done = run_command(line)
        assert done.returncode == 0, done.stderr
        # what was under way at a kill, four questions of each model and two first ones, is asked again
        assert server.asked() <= asked + (kills + 1) * (2 * 4 * 2 + 2)
    assert kills == 10
    assert written(output) == written(tmp_path / "undisturbed")
    assert json.loads(done.stdout)["rows"] == PICTURES


def test_interrupted_by_hand_it_says_so_and_goes_on(scenes, pictures, whole, tmp_path):
    with ChatServer(scenes, latency=0.2) as server:
        line = command(server, pictures, tmp_path / "out")
        process = processes.Popen(line, stdout=processes.PIPE, stderr=processes.PIPE, text=True)
        while server.asked("caption") < 6:
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=300)
        assert process.returncode == 130 and "Traceback" not in said
    with ChatServer(scenes) as server:
        assert run_command(command(server, pictures, tmp_path / "out")).returncode == 0
        assert server.asked("caption") < PICTURES
    assert turns_written(tmp_path / "out") == turns_written(whole)


@pytest.mark.slow
def test_processes_come_to_the_same(scenes, pictures, whole, tmp_path):
    with ChatServer(scenes) as server:
        done = run_command(command(server, pictures, tmp_path / "out", "--workers", "2"))
        assert done.returncode == 0, done.stderr
        assert server.asked("caption") == PICTURES
    assert turns_written(tmp_path / "out") == turns_written(whole)
    assert json.loads(done.stdout)["usage"]["writer"]["answers"] == PICTURES


@pytest.mark.slow
def test_a_worker_that_fails_says_why_and_the_rest_is_kept(scenes, pictures, whole, tmp_path):
    output = tmp_path / "out"
    with ChatServer(scenes, faults=[Fault("noise", to="pairs")]) as server:
        done = run_command(command(server, pictures, output, "--workers", "2", "--max-failures", "4"))
        assert done.returncode == 1 and "Traceback" not in done.stderr
        assert re.search(r"4 answers of 'scribe' in a row were of no use.*lorem ipsum", done.stderr)
    with ChatServer(scenes) as server:
        assert run_command(command(server, pictures, output)).returncode == 0
    assert turns_written(output) == turns_written(whole)


def test_one_process_at_a_time(scenes, pictures, tmp_path):
    with ChatServer(scenes) as server:
        mine = job(server, pictures, tmp_path / "out")
        synth(mine, dry_run=True)
        with mine.open_catalogue(), pytest.raises(OutputError, match="another process is writing to it"):
            synth(mine)


# ── bad input, and the command line ──────────────────────────────────────────────────────────────────────────────────


def said(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    code = main(arguments)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_what_is_wrong_is_said_before_any_work(scenes, pictures, tmp_path, capsys):
    output = tmp_path / "out"
    (tmp_path / "empty").mkdir()
    with ChatServer(scenes) as server:
        line = command(server, pictures, output)[3:]
        for old, new, message in (
            ("seer", "sehr", "no model 'sehr'; did you mean 'seer'?"),
            (str(pictures), str(tmp_path / "empty"), "no pictures here; looked for"),
            (str(pictures), str(tmp_path / "none"), "no such file or folder"),
            (server.url, "http://127.0.0.1:9", "cannot be reached"),
        ):
            code, _, errors = said([new if part == old else part for part in line], capsys)
            assert code == 1 and message in errors and "Traceback" not in errors
        assert server.asked("caption") == 0 and not output.exists()
        code, _, errors = said([*line, "--min-side", "100"], capsys)
        assert code == 1 and "none of the 32 pictures is kept (32 too small); see --min-side" in errors
        code, _, errors = said([*line, "--workers", "2", "--max-requests", "5"], capsys)
        assert code == 1 and "hold for one process" in errors
        code, _, errors = said([*line, "--captioner-price", "cheap"], capsys)
        assert code == 1 and "write it as READ:WRITTEN" in errors
        (tmp_path / "mine").mkdir()
        (tmp_path / "mine/file").write_text("x")
        code, _, errors = said([str(tmp_path / "mine") if part == str(output) else part for part in line], capsys)
        assert code == 1 and "is not empty and was not made by muco synth" in errors


def test_a_server_with_one_model_needs_no_name(scenes, pictures, tmp_path, capsys):
    with ChatServer(scenes, models=["only"]) as server:
        line = ["synth", str(pictures), "--captioner", server.url, "--writer", server.url, "--json"]
        code, out, _ = said([*line, "-o", str(tmp_path / "out"), "--min-side", "64", "--near", "-1"], capsys)
    assert code == 0 and json.loads(out)["rows"] == PICTURES
    assert json.loads((tmp_path / "out/synth.json").read_text())["writer"]["model"] == "only"
    with ChatServer(scenes) as server:
        line[3] = line[5] = server.url
        code, _, errors = said([*line, "-o", str(tmp_path / "other")], capsys)
        assert code == 1 and "serves seer, scribe; name the one to ask" in errors


def test_what_people_read(scenes, pictures, tmp_path, capsys):
    with ChatServer(scenes, faults=[Fault("invalid", every=3, to="pairs")]) as server:
        line = [part for part in command(server, pictures, tmp_path / "out")[3:] if part != "--json"]
        code, out, errors = said([*line, "--max-requests", "12"], capsys)
        assert code == 0 and "stopped" in out and "the budget of 12 requests is spent" in out
        assert "muco synth: 32 of 32 pictures are kept" in errors
        code, out, _ = said(line, capsys)
    assert code == 0 and "looked at 32, kept 32" in out and "rows" in out and "shards" in out and "4 of 4" in out
    assert "answer, not JSON" in out and "stopped" not in out and "{" not in out


def test_other_models_or_prompts_need_another_folder(scenes, pictures, whole):
    with ChatServer(scenes, models=["seer", "scribe", "poet"]) as server:
        mine = job(server, pictures, whole)
        for other, key in (
            (replace(mine, writer=replace(mine.writer, model="poet")), "writer"),
            (replace(mine, setting=Setting(replace(Prompts(), version="mine"))), "prompt"),
            (replace(mine, shard=11), "shard"),
            (replace(mine, filter=Filter(min_side=65)), "filter"),
        ):
            with pytest.raises(OutputError, match=f"was begun with {key} .*name another output folder"):
                synth(other)
        assert server.asked("caption") == 0


def test_a_picture_that_goes_between_the_passes_is_named(scenes, pictures, tmp_path):
    folder = tmp_path / "pictures"
    shutil.copytree(pictures, folder)
    with ChatServer(scenes) as server:
        mine = job(server, folder, tmp_path / "out")
        synth(mine, dry_run=True)
        (folder / "dev/00003.png").write_bytes(b"gone")
        with pytest.raises(DataError, match="00003.png: the picture was sound when it was looked at"):
            synth(mine)


# ── to the end ───────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.slow
def test_a_model_learns_from_what_was_made(tmp_path):
    """Pictures alone, the server, training, and a score on other scenes that is far above chance."""
    from muco.data.scenes import write_scenes
    from muco.evaluate.retrieval import evaluate_retrieval

    scenes = write_scenes(tmp_path / "scenes", train=300, dev=1, test=50)
    with ChatServer(scenes) as server:
        found = synth(job(server, scenes / "images/train", tmp_path / "made", shard=100))
    assert found["rows"] == 300
    tiny = {"width": 48, "feed_forward": 96, "vision_width": 32, "vision_depth": 1}
    recipe = from_dict(
        {
            "output": str(tmp_path / "run"),
            "model": {"tiny": tiny, "vision": "trained"},
            "data": {"train": [{"path": str(tmp_path / "made/train.jsonl")}]},
            "batch": {"size": 8},
            "trainer": {"max_steps": 120, "learning_rate": 3e-3, "warmup_steps": 6, "report_to": []},
        }
    )
    scores = evaluate_retrieval(muco.load(muco.train(recipe)), open_data(scenes / "test.jsonl"))
    assert scores["tasks"]["within"]["hit@1"] > 0.6  # 0.14 by chance
    assert scores["tasks"]["image_to_caption"]["hit@10"] > 0.35  # 0.2 by chance
