"""Multi-turn data made by models: checks, prompts, pairs, and many requests at once."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from chat_server import REFUSAL, pairs_of
from hypothesis import given
from hypothesis import strategies as st

from muco.data import scenes as scene_data
from muco.errors import DataError
from muco.synth import pairs as checks
from muco.synth.chat import Answer, BudgetSpent
from muco.synth.flow import in_order
from muco.synth.pairs import ALL_KEYS, SLOTS, Pairs, read_object, schema
from muco.synth.prompts import Prompts, load_prompts

PROMPTS = Prompts()
SCENE = scene_data.describe(0, 0)
CAPTION = scene_data.caption(SCENE)
GOOD = pairs_of(SCENE, 0)


# ── checks ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("a small red ring", None),
        ("  \n", checks.EMPTY),
        ("a ring \ud83d", checks.HALF),
        ("a ring<|im_end|>", checks.SPECIAL),
        ("a ring</s>", checks.SPECIAL),
        ("[INST] a ring", checks.SPECIAL),
        ("a < b and a > c | d", None),
        (REFUSAL, checks.REFUSAL),
        ("I’m sorry, no.", checks.REFUSAL),
        ("As an AI model, I see a ring", checks.REFUSAL),
        ("Sorry girl sits on a bench", checks.REFUSAL),
        ("A sign says: I'm sorry", None),
        ("一枚银戒指放在木桌上", checks.LANGUAGE),
        ("кольцо", checks.LANGUAGE),
        ("a sign that says 東京", None),
        ("3 × 4 = 12", None),
    ],
)
def test_any_text(text, reason):
    assert checks.text_problem(text, PROMPTS) == reason


@pytest.mark.parametrize(
    ("question", "reason"),
    [
        ("What is it made of?", None),
        ("What does the description say about the ring?", checks.NAMES_SOURCE),
        ("According to the caption, what is shown?", checks.NAMES_SOURCE),
        ("What type of jewelry is being described?", checks.NAMES_SOURCE),
        ("What is in photo_0012.jpg?", checks.NAMES_SOURCE),
        ("What is in IMG_0012?", checks.NAMES_SOURCE),
        ("Describe the scene in detail.", None),
        ("What does the text on the sign say?", None),
        ("what " * 41, checks.TOO_LONG),
        ("", checks.EMPTY),
    ],
)
def test_a_question(question, reason):
    assert checks.question_problem(question, PROMPTS, "IMG_0012.jpg") == reason


@pytest.mark.parametrize(
    ("question", "answer", "reason"),
    [
        ("What is it?", "a ring", None),
        ("What is it?", "What is it? A ring.", checks.REPEATS),
        ("What colour is the red ring?", "red", checks.GIVEN_AWAY),
        ("Is the ring red?", "Yes", None),
        ("Which metal is it?", "It cannot be determined.", checks.REFUSAL),
        ("Which metal is it?", "Not specified", checks.REFUSAL),
        ("Which metal is it?", "word " * 9, checks.TOO_LONG),
        ("Which metal is it?", " ", checks.EMPTY),
    ],
)
def test_an_answer(question, answer, reason):
    assert checks.answer_problem(question, answer, 8, PROMPTS) == reason


def test_a_caption():
    assert checks.caption_problem(Answer(CAPTION), PROMPTS) is None
    assert checks.caption_problem(Answer(CAPTION, "length"), PROMPTS) == checks.CUT_OFF
    assert checks.caption_problem(Answer("No.", "refusal"), PROMPTS) == checks.REFUSAL
    assert checks.caption_problem(Answer("red"), PROMPTS) == checks.TOO_SHORT
    assert checks.caption_problem(Answer("一枚银戒指"), replace(PROMPTS, script="CJK")) is None


@given(st.text(), st.text())
def test_checks_never_fail(question, answer):
    checks.text_problem(question, PROMPTS)
    checks.question_problem(question, PROMPTS, answer)
    checks.answer_problem(question, answer, 8, PROMPTS)
    assert checks.plain(question) == checks.plain(checks.plain(question)) or not checks.plain(question).isascii()


# ── pairs ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def pairs(**changes: Any) -> Pairs:
    """What is left after one answer that is good but for the changes; None removes a key."""
    made = Pairs(CAPTION, "a.png", PROMPTS)
    made.take(json.dumps({key: value for key, value in (GOOD | changes).items() if value is not None}))
    return made


def test_a_good_answer_gives_seven_turns_in_the_order_of_m3t():
    made = pairs()
    assert not made.missing and not made.rejected and not made.reasons
    assert [slot.kind for slot in made.good] == [turn.kind for turn in scene_data.turns(SCENE)]
    for slot, turn in zip(made.good, scene_data.turns(SCENE), strict=True):
        assert made.good[slot].answer == turn.target[0].text and made.good[slot].query == turn.query[0].text
    assert made.good[SLOTS[0]].negative == GOOD["negative_answer_cls"] and set(GOOD) == set(ALL_KEYS)


@pytest.mark.parametrize(
    ("changes", "slot", "reason"),
    [
        ({"answer_cls": None}, 0, checks.MISSING),
        ({"negative_answer_cls": 3}, 0, checks.MISSING),
        ({"negative_answer_cls": GOOD["answer_cls"].upper() + "."}, 0, checks.NOT_WRONG),
        ({"negative_answer_cls": ""}, 0, checks.EMPTY),
        ({"answer_vqa_local1": "word " * 21}, 3, checks.TOO_LONG),
        ({"query_vqa_local1": "What does the caption say?"}, 3, checks.NAMES_SOURCE),
        ({"answer_vqa_local1": GOOD["query_vqa_local1"]}, 3, checks.REPEATS),
        ({"query_vqa_local2": GOOD["query_vqa_local1"].lower()}, 4, checks.SAME_QUESTION),
        ({"answer_vqa_local2": "A " + GOOD["answer_vqa_local1"]}, 4, checks.SAME_TARGET),
        ({"answer_vqa_global1": CAPTION}, 1, checks.SAME_TARGET),
        ({"answer_vqa_global2": "один два три"}, 2, checks.LANGUAGE),
        ({"answer_vqa_creative": "Sorry, I cannot."}, 5, checks.REFUSAL),
        ({"query_retrieval": "<|image_1|> Describe it."}, 6, checks.SPECIAL),
    ],
)
def test_what_is_wrong_with_one_pair_leaves_the_others(changes, slot, reason):
    made = pairs(**changes)
    assert made.missing == [SLOTS[slot]] and len(made.good) == 6
    assert made.rejected[SLOTS[slot]].reason == reason and made.reasons == [reason]


@pytest.mark.parametrize("text", ["", "no", "[1, 2]", '{"query_cls": "a', "[" * 100_000, REFUSAL])
def test_what_is_no_json(text):
    made = Pairs(CAPTION, "a.png", PROMPTS)
    assert not made.take(text)
    assert {rejected.reason for rejected in made.rejected.values()} == {checks.NOT_JSON} and len(made.reasons) == 7


def test_json_in_a_fence_or_among_words_is_read():
    for text in ('{"a": "b"}', 'Here it is:\n```json\n{"a": "b"}\n```', 'Sure! {"a": "b"} I hope it helps.'):
        assert read_object(text) == {"a": "b"}


def test_only_what_is_missing_is_asked_for_again():
    made = pairs(answer_vqa_local1="word " * 21)
    text, wanted = made.request()
    assert wanted == schema(["query_vqa_local1", "answer_vqa_local1"])
    assert "- local, too long: " in text and f"- {GOOD['query_cls']} {GOOD['answer_cls']}" in text
    assert CAPTION in text and "query_vqa_global1" not in text
    assert made.take(json.dumps(GOOD)) and not made.missing and not made.rejected
    assert made.reasons == [checks.TOO_LONG] and [*made.good] == [*SLOTS]


# ── prompts ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_caption_is_never_filled_in():
    text, _ = Pairs("A sign says {keys} {language}.", "a.png", PROMPTS).request()
    assert "A sign says {keys} {language}." in text and "Everything is in English." in text
    assert "{" not in text.replace("{keys} {language}", "")


def test_prompts_of_ones_own(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("version: mine-1\nlanguage: German\nwords: {local: 5}\nkeys: {query_cls: the species}\n")
    prompts = load_prompts(file)
    assert (prompts.language, prompts.words["local"], prompts.words["global"]) == ("German", 5, 40)
    assert prompts.keys["query_cls"] == "the species" and prompts.keys["answer_cls"] == PROMPTS.keys["answer_cls"]
    assert prompts.name.startswith("mine-1 (") and prompts.name[-9:] != PROMPTS.name[-9:]
    assert load_prompts(None) == PROMPTS


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a: [", "not YAML"),
        ("version: a\nversion: b", "the key 'version' is there twice"),
        ("language: German", "a 'version' of your own"),
        ("version: 1\nlanguge: x", "a 'version' of your own"),
        ("version: a\nlanguge: German", "unknown key 'languge'; did you mean 'language'"),
        ("version: a\nwords: {locl: 3}", "words: unknown key 'locl'; did you mean 'local'"),
        ("version: a\nwords: {local: x}", "'local' must be a whole number"),
        ("version: a\npairs: write", r"'pairs' must hold \{caption\}"),
        ("version: a\ncaption: 3", "'caption' must be a text"),
    ],
)
def test_prompts_that_are_none(text, says, tmp_path):
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(DataError, match=f"mine.yaml.*{says}"):
        load_prompts(tmp_path / "mine.yaml")


# ── flow ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


@given(st.lists(st.integers(0, 3), max_size=30), st.integers(1, 8))
def test_results_come_in_order_and_within_bounds(delays, ahead):
    drawn, most = 0, 0

    def items() -> Iterator[tuple[int, int]]:
        nonlocal drawn
        for pair in enumerate(delays):
            drawn += 1
            yield pair

    async def work(item: tuple[int, int]) -> int:
        for _ in range(item[1]):
            await asyncio.sleep(0)
        return item[0]

    async def go() -> list[int]:
        nonlocal most
        found = []
        async for result in in_order(items(), work, ahead=ahead):
            most = max(most, drawn - len(found))
            found.append(result)
        return found

    assert asyncio.run(go()) == [*range(len(delays))]
    assert most <= ahead


def flow(fail: dict[int, Exception], finished: list[int], *, count: int = 12) -> list[int]:
    async def work(n: int) -> int:
        if n in fail:
            raise fail[n]
        await asyncio.sleep(0.02)
        finished.append(n)
        return n

    async def go() -> list[int]:
        found: list[int] = []
        try:
            async for result in in_order(iter(range(count)), work, ahead=4):
                found.append(result)
        except BudgetSpent:
            found.append(-1)
        return found

    return asyncio.run(go())


def test_a_spent_budget_lets_what_is_under_way_finish():
    finished: list[int] = []
    assert flow({5: BudgetSpent("b")}, finished) == [0, 1, 2, 3, 4, -1]
    assert {0, 1, 2, 3, 4} <= set(finished) and len(finished) < 10


def test_an_error_ends_all():
    finished: list[int] = []
    with pytest.raises(KeyError, match="six"):
        flow({6: KeyError("six")}, finished)
    assert len(finished) < 10


def test_an_error_of_the_source_ends_all():
    def items() -> Iterator[int]:
        yield 1
        raise DataError("a broken file")

    async def work(n: int) -> int:
        await asyncio.sleep(10)
        return n

    async def go() -> None:
        async for _ in in_order(items(), work, ahead=4):
            raise AssertionError

    with pytest.raises(DataError, match="a broken file"):
        asyncio.run(go())
