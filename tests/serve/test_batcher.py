"""The batcher alone: what passes together, what waits, what leaves, what fails; then with a real model."""

from __future__ import annotations

import asyncio
import io
import math
import threading
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from muco.dialogue import single_turn
from muco.serve.batcher import Batcher, BatchLimits, QueueFull, ShuttingDown
from muco.serve.engine import Engine, Item
from muco.serve.images import ImageLimits
from muco.template import QWEN_VL

SOON = 120  # seconds in which anything that is going to happen has happened


@dataclass(frozen=True)
class Word:
    """An item that becomes its text in capitals; some cannot be prepared, some not run."""

    text: str
    tokens: int = 1
    light: bool = True


@dataclass
class Machine:
    """Prepares and runs words, and remembers what passed together. ``hold`` makes runs wait."""

    passes: list[list[str]] = field(default_factory=list)
    prepared: list[str] = field(default_factory=list)
    hold: threading.Event = field(default_factory=threading.Event)
    entered: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self.hold.set()

    def prepare(self, word: Word) -> Word:
        if word.text == "unreadable":
            raise ValueError("cannot be prepared")
        self.prepared.append(word.text)
        return word

    def run(self, words: Sequence[Word]) -> list[str]:
        self.passes.append([word.text for word in words])
        self.entered.set()
        assert self.hold.wait(SOON)
        if any(word.text == "poison" for word in words):
            raise RuntimeError("cannot be run")
        return [word.text.upper() for word in words]


def running(action: Callable[[Batcher], Coroutine[Any, Any, Any]], machine: Machine, limits: BatchLimits) -> Any:
    async def main() -> Any:
        batcher: Batcher = Batcher(machine.prepare, machine.run, limits)
        await batcher.start()
        try:
            return await asyncio.wait_for(action(batcher), SOON)
        finally:
            machine.hold.set()
            await batcher.close()

    return asyncio.run(main())


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.001)


def words(*texts: str) -> list[Word]:
    return [Word(text) for text in texts]


# ---------------------------------------------------------------- together


@given(
    st.lists(st.lists(st.tuples(st.integers(1, 9), st.booleans()), max_size=6), max_size=8),
    st.integers(1, 30),
)
@settings(max_examples=50)
def test_order_is_kept_and_no_pass_is_too_large(requests, most):
    numbers = iter(range(1000))
    items = [[Word(f"w{next(numbers)}", tokens, light) for tokens, light in request] for request in requests]
    machine = Machine()

    async def all_at_once(batcher: Batcher) -> list[list[str]]:
        return await asyncio.gather(*map(batcher.submit, items))

    results = running(all_at_once, machine, BatchLimits(tokens=most, milliseconds=0))
    assert results == [[word.text.upper() for word in request] for request in items]
    tokens = {word.text: word.tokens for request in items for word in request}
    assert sorted(text for some in machine.passes for text in some) == sorted(tokens), "each passed once"
    for some in machine.passes:
        assert len(some) == 1 or len(some) * max(tokens[text] for text in some) <= most


def test_requests_within_the_window_share_a_pass():
    machine = Machine()

    async def one_after_another(batcher: Batcher) -> list[list[str]]:
        first = asyncio.create_task(batcher.submit(words("a")))
        await until(lambda: machine.prepared == ["a"])
        assert not machine.passes, "the first waits for others"
        return [*await asyncio.gather(first, batcher.submit(words("b", "c")))]

    limits = BatchLimits(tokens=3, milliseconds=1000 * SOON)  # full at three, long before the time is over
    assert running(one_after_another, machine, limits) == [["A"], ["B", "C"]]
    assert machine.passes == [["a", "b", "c"]]


def test_a_lone_request_waits_no_longer_than_the_window():
    machine = Machine()
    assert running(lambda b: b.submit(words("a")), machine, BatchLimits(tokens=99, milliseconds=20)) == ["A"]
    assert running(lambda b: b.submit([]), machine, BatchLimits()) == []


def test_what_arrives_during_a_pass_shares_the_next():
    machine = Machine()
    machine.hold.clear()

    async def during(batcher: Batcher) -> None:
        first = asyncio.create_task(batcher.submit(words("a")))
        await until(machine.entered.is_set)
        others = [asyncio.create_task(batcher.submit(words(text))) for text in "bcd"]
        await until(lambda: len(machine.prepared) == 4)
        machine.hold.set()
        await asyncio.gather(first, *others)

    running(during, machine, BatchLimits(milliseconds=0))
    assert machine.passes == [["a"], ["b", "c", "d"]]


def test_no_more_than_two_passes_are_prepared_ahead():
    machine = Machine()
    machine.hold.clear()
    heavy = [Word(f"w{n}", tokens=4, light=False) for n in range(50)]

    async def busy(batcher: Batcher) -> list[str]:
        task = asyncio.create_task(batcher.submit(heavy))
        await until(machine.entered.is_set)
        await asyncio.sleep(0.05)
        assert len(machine.prepared) <= 2 + 4 + 4, "a pass, two passes ahead, and what threads had begun"
        machine.hold.set()
        return await task

    assert len(running(busy, machine, BatchLimits(tokens=8, milliseconds=0))) == 50


# ---------------------------------------------------------------- turns of requests


@pytest.mark.parametrize(("count", "light"), [(2000, True), (100, False)])
def test_a_short_request_does_not_wait_behind_a_large_one(count, light):
    machine = Machine()
    machine.hold.clear()

    async def behind(batcher: Batcher) -> None:
        bulk = asyncio.create_task(batcher.submit([Word(f"w{n}", light=light) for n in range(count)]))
        await until(machine.entered.is_set)
        short = asyncio.create_task(batcher.submit(words("short")))
        await until(lambda: "short" in machine.prepared and len(machine.prepared) > 16)
        machine.hold.set()
        assert await short == ["SHORT"]
        assert await bulk == [f"W{n}" for n in range(count)]

    limits = BatchLimits(tokens=8, milliseconds=0, queue=4000, share_milliseconds=math.inf)  # the first pass was held
    running(behind, machine, limits)
    assert machine.passes[1][0] == "short", "the next pass after the one that ran"
    assert len(machine.passes[1]) == (8 if light else 1), "shared with what is light"
    assert len(machine.passes[2]) == 8, "no other is less full for that"


@pytest.mark.parametrize("light", [True, False])
def test_an_image_does_not_wait_behind_large_requests(light):
    machine = Machine()
    machine.hold.clear()

    async def behind(batcher: Batcher) -> None:
        large = [[Word(f"{name}{n}", tokens=4, light=light) for n in range(64)] for name in "ab"]
        bulk = [asyncio.create_task(batcher.submit(words)) for words in large]
        await until(lambda: machine.entered.is_set() and len(machine.prepared) >= 8)
        image = asyncio.create_task(batcher.submit([Word("image", tokens=4, light=False)]))
        await until(lambda: batcher.unfinished == 129)
        machine.hold.set()
        assert await image == ["IMAGE"]
        await asyncio.gather(*bulk)

    running(behind, machine, BatchLimits(tokens=16, milliseconds=0))
    assert [number for number, some in enumerate(machine.passes) if "image" in some][0] <= 6, "of 33"


def test_a_pass_takes_one_item_of_each_request_and_more_only_while_that_is_quick():
    machine, seconds = Machine(), 0.02  # of an item
    run = machine.run

    def slow(words: Sequence[Word]) -> list[str]:
        time.sleep(seconds * len(words))
        return run(words)

    machine.run = slow

    async def together(batcher: Batcher) -> None:
        bulk = batcher.submit(words(*(f"w{n}" for n in range(60))))
        others = [batcher.submit(words(f"{name}0", f"{name}1")) for name in "abcdefgh"]
        await asyncio.gather(bulk, *others)

    running(together, machine, BatchLimits(tokens=50, milliseconds=50, share_milliseconds=90))
    later = machine.passes[1:]  # the first one is made before the pace is known
    for some in later:
        firsts = {word[0] for word in some}
        assert len(some) == len(firsts) or len(some) <= 4, "several items of a request only within 90 ms"
    assert max(map(len, later)) >= 3 and sum(map(len, machine.passes)) == 76


def test_texts_and_images_of_one_request_take_turns():
    machine = Machine()
    machine.hold.clear()
    asked = [Word(f"text{n}") for n in range(3)] + [Word(f"image{n}", light=False) for n in range(3)]

    async def together(batcher: Batcher) -> list[str]:
        first = asyncio.create_task(batcher.submit([Word("first", light=False)]))
        await until(machine.entered.is_set)
        mixed = asyncio.create_task(batcher.submit(asked))
        await until(lambda: len(machine.prepared) == 7)
        machine.hold.set()
        await first
        return await mixed

    limits = BatchLimits(milliseconds=0, share_milliseconds=0)  # one item of a request in each pass
    assert running(together, machine, limits) == [word.text.upper() for word in asked]
    kinds = [some[0].rstrip("012") for some in machine.passes[1:]]
    assert kinds == ["text", "image"] * 3 and all(len(some) == 1 for some in machine.passes)


def test_large_requests_take_turns():
    machine = Machine()
    machine.hold.clear()

    async def together(batcher: Batcher) -> None:
        first = asyncio.create_task(batcher.submit(words("first")))
        await until(machine.entered.is_set)
        asked = [asyncio.create_task(batcher.submit([Word(f"{name}{n}") for n in range(40)])) for name in "abc"]
        await until(lambda: all(f"{name}0" in machine.prepared for name in "abc"))
        machine.hold.set()
        await asyncio.gather(first, *asked)

    running(together, machine, BatchLimits(tokens=8, milliseconds=0))
    leaders = [some[0][0] for some in machine.passes[1:]]
    assert sorted(leaders[:3]) == sorted(leaders[3:6]) == ["a", "b", "c"]
    for name in "abc":
        own = [text for some in machine.passes for text in some if text[0] == name and text != "first"]
        assert own == [f"{name}{n}" for n in range(40)], "each in its own order"


# ---------------------------------------------------------------- failing, leaving, ending


@pytest.mark.parametrize("bad", ["poison", "unreadable"])
def test_a_bad_item_fails_its_own_request_only(bad):
    machine = Machine()

    async def mixed(batcher: Batcher) -> list[Any]:
        requests = [words("a"), words("b", bad, "c"), words("d")]
        return [*await asyncio.gather(*map(batcher.submit, requests), return_exceptions=True)]

    first, second, third = running(mixed, machine, BatchLimits(tokens=99, milliseconds=100))
    assert (first, third) == (["A"], ["D"])
    assert str(second) == ("cannot be run" if bad == "poison" else "cannot be prepared")


def test_a_batcher_goes_on_after_failures():
    machine = Machine()

    async def again(batcher: Batcher) -> list[str]:
        for _ in range(3):
            with pytest.raises(RuntimeError):
                await batcher.submit(words("poison"))
        assert batcher.unfinished == 0
        return await batcher.submit(words("a"))

    assert running(again, machine, BatchLimits(milliseconds=0)) == ["A"]


def test_who_is_cancelled_leaves_the_queue():
    machine = Machine()
    machine.hold.clear()

    async def leaving(batcher: Batcher) -> None:
        first = asyncio.create_task(batcher.submit(words("a")))
        await until(machine.entered.is_set)
        ready = asyncio.create_task(batcher.submit(words("b")))
        await until(lambda: "b" in machine.prepared)
        waiting = asyncio.create_task(batcher.submit([Word(f"c{n}", tokens=9, light=False) for n in range(20)]))
        await until(lambda: batcher.unfinished == 22)
        for task in (ready, waiting):
            task.cancel()
        await asyncio.wait([ready, waiting])
        assert batcher.unfinished == 1
        machine.hold.set()
        assert await first == ["A"]
        assert await batcher.submit(words("d")) == ["D"]

    running(leaving, machine, BatchLimits(tokens=9, milliseconds=0))
    assert machine.passes == [["a"], ["d"]], "neither the ready nor the waiting ones passed"


def test_a_full_queue_accepts_nothing():
    machine = Machine()
    machine.hold.clear()

    async def full(batcher: Batcher) -> None:
        first = asyncio.create_task(batcher.submit(words("a", "b")))
        await until(lambda: batcher.unfinished == 2)
        with pytest.raises(QueueFull):
            await batcher.submit(words("c", "d"))
        assert batcher.unfinished == 2
        second = asyncio.create_task(batcher.submit(words("c")))
        await until(lambda: batcher.unfinished == 3)
        machine.hold.set()
        assert await first == ["A", "B"] and await second == ["C"]
        assert await batcher.submit(words("d", "e")) == ["D", "E"]

    running(full, machine, BatchLimits(milliseconds=0, queue=3))


def test_large_requests_do_not_keep_a_short_one_out():
    machine = Machine()
    machine.hold.clear()

    async def admitted(batcher: Batcher) -> None:
        bulk = [asyncio.create_task(batcher.submit([Word("bulk")] * 4)) for _ in range(2)]
        await until(lambda: batcher.unfinished == 8)
        for more in (3, 4):
            with pytest.raises(QueueFull):
                await batcher.submit([Word("more")] * more)
        short = [asyncio.create_task(batcher.submit(words("short"))) for _ in range(6)]
        await until(lambda: batcher.unfinished == 14)
        with pytest.raises(QueueFull):
            await batcher.submit(words("the ninth request"))
        machine.hold.set()
        assert await asyncio.gather(*bulk, *short) == [["BULK"] * 4] * 2 + [["SHORT"]] * 6
        assert batcher.unfinished == 0

    running(admitted, machine, BatchLimits(milliseconds=0, queue=8))


def test_closing_finishes_what_was_accepted_and_refuses_more():
    machine = Machine()
    machine.hold.clear()

    async def closing(batcher: Batcher) -> None:
        accepted = [asyncio.create_task(batcher.submit(words(text))) for text in "abc"]
        await until(lambda: batcher.unfinished == 3)
        end = asyncio.create_task(batcher.close())
        await asyncio.sleep(0.01)
        assert not end.done()
        with pytest.raises(ShuttingDown):
            await batcher.submit(words("d"))
        machine.hold.set()
        await end
        assert [task.result() for task in accepted] == [["A"], ["B"], ["C"]]

    running(closing, machine, BatchLimits(tokens=1, milliseconds=0))


# ---------------------------------------------------------------- a real model


def png(seed: int, size: tuple[int, int]) -> bytes:
    noise = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def engine(tiny_model, tmp_path_factory) -> Engine:
    from muco.model import load

    folder = tmp_path_factory.mktemp("model")
    tiny_model.save(str(folder))
    return Engine(load(folder, device="cpu"), ImageLimits(), 512)


TEXTS = st.text(st.characters(codec="utf-8", exclude_characters="<"), min_size=1, max_size=60)
IMAGES = st.lists(st.builds(png, st.integers(0, 3), st.sampled_from([(28, 28), (60, 40), (90, 90)])), max_size=2)
SINGLE = st.builds(lambda text, images: Item((text,), tuple(images)), TEXTS, IMAGES)
TURNS = st.builds(
    lambda texts, images, mode: Item(tuple(texts), tuple(images), mode),
    st.lists(TEXTS, min_size=1, max_size=3),
    IMAGES,
    st.sampled_from(["isolated", "compounded"]),
)


@given(st.lists(st.lists(SINGLE | TURNS, min_size=1, max_size=3), min_size=1, max_size=4))
@settings(max_examples=15)
def test_vectors_are_those_of_encode_whatever_passed_with_them(engine, requests):
    async def together() -> list[list[Any]]:
        batcher: Batcher = Batcher(engine.prepare, engine.run, BatchLimits(tokens=400, milliseconds=50))
        await batcher.start()
        try:
            return [*await asyncio.gather(*map(batcher.submit, requests))]
        finally:
            await batcher.close()

    for items, results in zip(requests, asyncio.run(together()), strict=True):
        for item, result in zip(items, results, strict=True):
            if item.mode == "compounded":
                expected = engine.model.encode_turns(item.images, item.texts, mode="compounded")
            else:  # an isolated turn is the vector of a call with it alone
                contents = [{"text": text, "images": list(item.images)} for text in item.texts]
                expected = engine.model.encode(contents)
            assert np.abs(result.vectors - expected).max() < 1e-5
            assert result.vectors.dtype == np.float32 and result.tokens > result.image_tokens >= 0
            assert (result.image_tokens > 0) == bool(item.images)


def test_many_long_texts_are_not_kept(engine):
    before = engine.processor._short_text_ids.cache_info().currsize
    for number in range(20):
        engine.prepare(Item((f"{number} " + "word " * 100,)))
    assert engine.processor._short_text_ids.cache_info().currsize == before


@pytest.mark.parametrize("end", ["START", "END"])
@given(text=st.text(st.characters(codec="utf-8", exclude_characters="<"), min_size=500, max_size=700))
@settings(max_examples=15)
def test_a_long_text_is_cut_at_the_end_that_was_asked_for(engine, end, text):
    prepared = engine.prepare(Item((text,), truncate=end))
    assert prepared.tokens <= 512
    whole = engine.model.encoder.collate([single_turn(text)])["input_ids"][0].tolist()
    if len(whole) > 512:
        assert prepared.tokens > 490, "no more was cut than had to be"
    own, first = prepared.batch["input_ids"][0].tolist(), len(engine.model.tokenizer(QWEN_VL.head)["input_ids"]) + 2
    if end == "END":
        assert own[first : first + 400] == whole[first : first + 400]
    else:
        assert own[-400:] == whole[-400:]


def test_an_item_that_is_too_long_is_an_error_that_counts(engine):
    from muco.errors import DataError

    with pytest.raises(DataError, match=r"input 0: 3,\d\d\d tokens; this server takes at most 512"):
        engine.prepare(Item(("x y " * 1000,)))


def test_a_wrong_item_fails_at_once_and_leaves_the_others_alone():
    async def action(batcher: Batcher) -> list[str]:
        with pytest.raises(AttributeError, match="light"):
            await batcher.submit([Word("a"), "not an item"])
        assert not batcher.unfinished
        return await batcher.submit([Word("b")])

    assert running(action, Machine(), BatchLimits()) == ["B"]
