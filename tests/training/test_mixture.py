"""Which samples, turns and paraphrases a step gets: shares, orders, and independence of everything but (seed, step)."""

from __future__ import annotations

import pickle
import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from muco import Content, DataError, ImageError, RecipeError, Sample, Turn
from muco import processor as processor_module
from muco.batch import join, split
from muco.data import open_data
from muco.data.source import InMemory
from muco.images import image_digest, opened_image
from muco.info_nce import multi_turn_info_nce
from muco.loss import MultiTurnLoss
from muco.masks import tree_mask
from muco.negatives import TurnIds
from muco.training import batches as batches_module
from muco.training import mixture as mixture_module
from muco.training.batches import PartSampler, StepLoader, TrainingBatches, with_image_turn
from muco.training.mixture import Draw, Mixture, turn_order
from muco.training.recipe import TurnsRecipe, from_dict


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 40), st.floats(0.5, 3)), min_size=1, max_size=3),
    st.integers(16, 40),
    st.integers(0, 5),
)
def test_every_batch_is_full_and_every_epoch_a_permutation(sources, size, seed):
    lengths, weights = zip(*sources, strict=True)
    mixture = Mixture(lengths, weights, size, seed)
    draws = [mixture.draws(step) for step in range(12)]
    assert all(len(batch) == size for batch in draws)
    for source, length in enumerate(lengths):
        own = [d for batch in draws for d in batch if d.source == source]
        assert [d.position for d in own] == list(range(len(own)))  # nothing skipped, nothing twice
        share = weights[source] / sum(weights)
        assert abs(len(own) - 12 * size * share) <= 1
        for epoch in range(len(own) // length):
            assert sorted(d.index for d in own[epoch * length : (epoch + 1) * length]) == list(range(length))


@settings(max_examples=20, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 40), st.floats(0.01, 3)), min_size=1, max_size=3), st.integers(1, 9))
@example([(1, 1.0), (1, 0.01), (1, 1.0)], 1)  # a share that is less than a step of a round
def test_batches_of_one_source_have_its_share_and_skip_nothing(sources, size):
    lengths, weights = zip(*sources, strict=True)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(mixture_module, "ROUND", 50)
        mixture = Mixture(lengths, weights, size, seed=3, group=size)
        steps = [mixture.draws(step) for step in range(120)]
        assert mixture.draws(77) == steps[77], "a function of the step alone"
    assert all(len({draw.source for draw in batch}) == 1 and len(batch) == size for batch in steps)
    for source in range(len(lengths)):
        own = [draw.position for batch in steps for draw in batch if draw.source == source]
        assert own == list(range(len(own)))
        rounds = [sum(batch[0].source == source for batch in steps[a : a + 50]) for a in (0, 50)]
        assert all(abs(n - 50 * weights[source] / sum(weights)) <= 2 for n in rounds)


def seen(mixture: Mixture, steps: int) -> list[Counter]:
    """How often every sample of every source is drawn in the first steps."""
    counts = [Counter(dict.fromkeys(range(length), 0)) for length in mixture.lengths]
    for step in range(steps):
        for draw in mixture.draws(step):
            counts[draw.source][draw.index] += 1
    return counts


def test_an_epoch_of_several_sources_sees_every_row_once():
    mixture = Mixture([5000, 500], None, 50, seed=3)
    assert mixture.steps_per_epoch == 110
    assert all(set(counts.values()) == {1} for counts in seen(mixture, 110))
    assert mixture.passes(110) == [1, 1] and mixture.passes(220) == [2, 2]
    assert pickle.loads(pickle.dumps(mixture)).draws(150) == mixture.draws(150)  # noqa: S301 - our own object
    places = [(draw.source, draw.position) for step in range(220) for draw in mixture.draws(step)]
    assert len({*places}) == 11_000, "every draw has random choices of its own"


def test_a_single_source_has_the_same_batches_with_and_without_a_weight():
    for group in (None, 8, 4):
        one, other = (Mixture([41], weights, 8, 5, group=group) for weights in (None, [3.0]))
        assert [one.draws(step) for step in range(30)] == [other.draws(step) for step in range(30)]
        assert one.steps_per_epoch == other.steps_per_epoch == 6


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=4), st.integers(1, 20), st.booleans())
def test_an_epoch_without_weights_ends_when_every_row_was_seen(lengths, size, one_source):
    mixture = Mixture(lengths, None, size, seed=1, group=size if one_source else None)
    epochs = [seen(mixture, n * mixture.steps_per_epoch) for n in (1, 2)]
    for n, counts in enumerate(epochs, start=1):
        assert all(min(own.values()) >= n for own in counts)
        more = [own.total() - n * length for own, length in zip(counts, lengths, strict=True)]
        assert max(more) < n * size and (one_source or sum(more) < n * size), "never a batch more than is needed"
    assert mixture.steps_per_epoch == (
        sum(-(-length // size) for length in lengths) if one_source else -(-sum(lengths) // size)
    )
    assert min(min(own.values()) for own in seen(mixture, mixture.steps_per_epoch - 1)) == 0


@pytest.mark.parametrize("one_source", [False, True])
def test_with_weights_the_recipe_says_what_an_epoch_is(one_source):
    lengths, weights = [5000, 500], [1.0, 1.0]
    group = 50 if one_source else None
    every = Mixture(lengths, weights, 50, 3, group=group)
    count = Mixture(lengths, weights, 50, 3, group=group, epoch="row_count")
    assert count.steps_per_epoch == 110 and every.steps_per_epoch > 180
    assert min(every.passes(every.steps_per_epoch)) == 1 > min(every.passes(every.steps_per_epoch - 1))
    assert [every.draws(step) for step in range(9)] == [count.draws(step) for step in range(9)]
    if not one_source:
        assert every.passes(200) == [1, 10] and count.passes(110) == [0.55, 5.5]


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.integers(1, 60), min_size=1, max_size=4), st.integers(1, 8), st.integers(1, 5), st.none() | st.just(1.0)
)
def test_a_batch_of_groups_is_that_many_batches_of_one_source(lengths, group, groups, weight):
    weights = weight and [weight] * len(lengths)
    mixture = Mixture(lengths, weights, group * groups, seed=2, group=group)
    small = Mixture(lengths, weights, group, seed=2, group=group)
    for step in (7, 0, 3):
        drawn = mixture.draws(step)
        parts = [drawn[start : start + group] for start in range(0, len(drawn), group)]
        assert parts == [small.draws(step * groups + number) for number in range(groups)]
        assert all(len({draw.source for draw in part}) == 1 for part in parts)
    enough = mixture.steps_per_epoch
    assert enough == -(-small.steps_per_epoch // groups)
    assert all(min(own.values()) >= 1 for own in seen(mixture, enough))
    assert mixture.passes(enough) == small.passes(enough * groups)


def test_a_recipe_has_groups_or_one_source_or_neither():
    values = {"output": "run", "model": {"path": "model"}, "data": {"train": [{"path": "a"}, {"path": "b"}]}}
    how = {None: [20, 30], 1: [20, 30], 4: [20, 30]}
    drawn = {}
    for group, lengths in how.items():
        drawn[group] = Mixture.of(from_dict(values | {"batch": {"size": 8, "group": group}}), lengths)
    assert drawn[None].draws(3) == drawn[1].draws(3) != drawn[4].draws(3)
    whole = Mixture.of(from_dict(values | {"batch": {"size": 8, "group": 8}}), [20, 30])
    data = values["data"] | {"one_source": True}
    assert whole.draws(3) == Mixture.of(from_dict(values | {"data": data, "batch": {"size": 8}}), [20, 30]).draws(3)
    for batch, changed in (({"size": 8, "group": 3}, {}), ({"size": 8, "group": 4}, {"data": data})):
        with pytest.raises(RecipeError, match=r"batch\.group: \d samples: "):
            from_dict(values | changed | {"batch": batch})


def test_rounds_grow_with_the_number_of_sources(monkeypatch):
    monkeypatch.setattr(mixture_module, "ROUND", 50)
    sources = 40  # in rounds of 50 steps, 39 of them could want two each
    mixture = Mixture([1] * sources, [1.0] * sources, 1, seed=3, group=1)
    seen = Counter(draw.source for step in range(3 * sources**2) for draw in mixture.draws(step))
    assert set(seen) == set(range(sources)) and all(abs(n - 3 * sources) <= 1 for n in seen.values())


def test_samples_are_one_by_their_image_else_by_id_and_source(tiny_model, scenes, tmp_path):
    """A copy of a file, and its bytes, are the same image in every source; an id means something in its source only."""
    first, second = sorted((scenes / "images" / "train").glob("*.png"))[:2]
    copy = shutil.copy(first, tmp_path / "copy.png")

    def source(number: int, image: Path | bytes | str) -> InMemory:
        seen = [Sample(image, [Turn("what?", f"{number} seen")], id=f"{number} own"), Sample(image, [Turn("a", "b")])]
        named = [Sample(turns=[Turn("what?", f"{number}.{n}")], id="0001") for n in range(2)]
        return InMemory([*seen, Sample(second, [Turn("c", "d")], id="0001"), *named, Sample(turns=[Turn("e", "f")])])

    sources = [source(n, image) for n, image in enumerate((first, copy, first.read_bytes()))]
    processor, mixture = tiny_model.encoder.muco_processor, Mixture([6] * 3, [1.0] * 3, 18, 0)
    one = TrainingBatches(sources, mixture, processor, TurnsRecipe())[0]
    kinds = ["first", "first", "second", "named", "named", "alone"]
    expected = [kinds[d.index] if d.index < 3 else (kinds[d.index], d.source) for d in mixture.draws(0)]
    ids = one["ids"].sample_ids.tolist()
    assert [[a == b for b in ids] for a in ids] == [[a == b for b in expected] for a in expected]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(batches_module, "SameImage", image_digest)  # slower, and the same
        slow = TrainingBatches(sources, mixture, processor, TurnsRecipe(), leave_out_duplicates=True)[0]
    kept = TrainingBatches(sources, mixture, processor, TurnsRecipe(), leave_out_duplicates=True)[0]
    assert same(kept, slow) and len(kept["places"]) == len(set(expected)) - 2, "e and f is one turn, not three"


def test_a_source_without_a_place_in_a_batch_or_without_samples_is_an_error():
    with pytest.raises(RecipeError, match="less than one"):
        Mixture([10, 10], [1.0, 0.01], 32, 0)
    with pytest.raises(DataError, match="empty"):
        Mixture([10, 0], [1.0, 1.0], 32, 0)


def test_orders_per_sample_per_batch_and_in_groups():
    def orders(turns, rows=8, step=3):
        return [tuple(turn_order(7, Draw(0, i, 100 + i), i, step, turns, 0)) for i in range(rows)]

    assert all(sorted(order) == list(range(7)) for order in orders(TurnsRecipe(order="sample")))
    assert len(set(orders(TurnsRecipe(order="sample")))) > 4
    assert len(set(orders(TurnsRecipe(order="batch")))) == 1
    assert orders(TurnsRecipe(order="batch"), step=4) != orders(TurnsRecipe(order="batch"), step=5)
    groups = orders(TurnsRecipe(order=2))
    assert len(set(groups)) == 2 and groups[0] == groups[2] != groups[1]


def test_ragged_samples_of_a_batch_share_one_order():
    full = turn_order(7, Draw(0, 0, 0), 0, 1, TurnsRecipe(order="batch"), 0)
    short = turn_order(4, Draw(0, 1, 1), 1, 1, TurnsRecipe(order="batch"), 0)
    assert short == [turn for turn in full if turn < 4]
    long = turn_order(70, Draw(0, 2, 2), 2, 1, TurnsRecipe(order="batch"), 0)
    assert full == [turn for turn in long if turn < 7]


def test_limit_draws_other_turns_each_time():
    seen = {tuple(turn_order(7, Draw(0, 0, p), 0, 0, TurnsRecipe(limit=2), 0)) for p in range(30)}
    assert all(len(set(order)) == 2 for order in seen) and len(seen) > 10


def same(a, b) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, TurnIds):
        return same(vars(a), vars(b))
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, torch.Tensor) and a.is_floating_point():
        a, b = a.nan_to_num(-1), b.nan_to_num(-1)  # a score that is missing
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


@pytest.fixture
def batches(scenes, tiny_model):
    sources = [open_data(scenes / "train.jsonl"), open_data(scenes / "train_pairs.jsonl")]
    mixture = Mixture([len(s) for s in sources], [2, 1], 6, 0)
    return TrainingBatches(sources, mixture, tiny_model.encoder.muco_processor, TurnsRecipe(image_turn="retrieval"))


@pytest.mark.parametrize(("mode", "other"), [("isolated", "run_on"), ("compounded", "restart")])
def test_positions_are_the_recipes_on_both_sides(mode, other, scenes, tiny_model):
    sources, mixture = [open_data(scenes / "train.jsonl")], Mixture([7], [1.0], 4, 0)
    made = [
        TrainingBatches(
            sources, mixture, tiny_model.encoder.muco_processor, TurnsRecipe(mode=mode, positions=positions)
        )
        for positions in (None, other)
    ]
    usual, changed = (batches[0] for batches in made)
    for side in ("query", "target"):
        assert torch.equal(usual[side]["input_ids"], changed[side]["input_ids"])
        assert not torch.equal(usual[side]["position_ids"], changed[side]["position_ids"])
    assert same(usual["ids"], changed["ids"])


def loader(batches, steps: int, workers: int = 0, first: int = 0) -> StepLoader:
    sampler = PartSampler(steps, batches.parts, lambda: first)
    return StepLoader(DataLoader(batches, batch_sampler=sampler, collate_fn=lambda x: x[0], num_workers=workers))


def test_a_batch_is_a_function_of_the_step_alone(batches):
    alone, parallel = ([[*step["parts"]] for step in loader(batches, 4, workers)] for workers in (0, 2))
    assert len(alone) == 4 == len(parallel)
    assert all(same(*parts) for a, b in zip(alone, parallel, strict=True) for parts in zip(a, b, strict=True))
    assert same(batches[2], pickle.loads(pickle.dumps(batches))[2])  # noqa: S301 - our own object
    assert not same(batches[1], batches[2])


def test_a_step_comes_in_parts_and_goes_on_where_it_is_asked_to(batches, monkeypatch):
    whole = [batches[step] for step in range(4)]
    monkeypatch.setattr(batches_module, "PART", 4)  # 6 samples: 4 and 2
    steps = [[*step["parts"]] for step in loader(batches, 4, first=1)]
    assert [[len(part["places"]) for part in parts] for parts in steps] == [[4, 2]] * 3
    for parts, item in zip(steps, whole[1:], strict=True):
        assert [place for part in parts for place in part["places"]] == item["places"]
        assert same(TurnIds.join([part["ids"] for part in parts]), item["ids"])
        for side in ("query", "target"):
            joined = join([part[side] for part in parts])
            (cut, turns), (expected, _) = (split(batch, 10**6)[0] for batch in (joined, item[side]))
            assert sorted(turns.tolist()) == list(range(len(turns)))
            for chunk in (cut, expected):
                chunk["input_ids"] = chunk["input_ids"] * chunk["attention_mask"]  # padding is any token
                # who sees whom; a row of one turn may be all trunk or trunk and branch
                chunk["branch_ids"] = tree_mask(chunk) * chunk["attention_mask"][:, None, :, None]
            assert same(cut, expected)


@pytest.mark.parametrize("processes", [1, 2, 3, 5])
def test_processes_share_a_step_whole_and_without_overlap(batches, processes):
    settings = (batches.sources, batches.mixture, batches.processor, TurnsRecipe(image_turn="retrieval", order=2))
    whole = TrainingBatches(*settings)[3]
    shares = [TrainingBatches(*settings, rank=rank, world_size=processes)[3] for rank in range(processes)]
    places = [share["places"] for share in shares]
    assert sorted(sum(places, [])) == sorted(whole["places"]) and all(places)
    ids = TurnIds.join([share["ids"] for share in shares])
    for key in ("sample_ids", "target_ids"):  # the same image and the same text have one id everywhere
        assert sorted(getattr(ids, key).tolist()) == sorted(getattr(whole["ids"], key).tolist())
    assert len(ids) == len(whole["ids"])


def test_ids_mark_samples_and_identical_targets(tiny_model):
    rows = InMemory(
        [
            Sample(turns=[Turn("a", "Ring"), Turn("b", "Gold")], id="x"),
            Sample(turns=[Turn("c", "Ring ", negatives=["Gold", "Stone"])]),
            Sample(turns=[Turn("d", "Tin")], id="x"),
        ]
    )
    processor = tiny_model.encoder.muco_processor
    made = TrainingBatches([rows], Mixture([3], [1.0], 3, 0), processor, TurnsRecipe(order="batch"))[0]
    ids = made["ids"]
    target_ids, hard_ids = ids.target_ids.tolist(), ids.hard_ids.tolist()
    place = {d.index: i for i, d in enumerate(Mixture([3], [1.0], 3, 0).draws(0))}
    assert len(ids) == 4 and len(set(ids.sample_ids.tolist())) == 2  # "x" twice is one image
    assert sorted(Counter(target_ids).values()) == [1, 1, 2]  # Ring twice
    assert len(hard_ids) == 2 and len(set(ids.hard_turns.tolist())) == 1
    assert hard_ids[0] in target_ids  # Gold is known
    assert len(made["target"]["turn_rows"]) == 6 and place


@pytest.mark.parametrize("mode", ["isolated", "reconstruction"])
def test_a_hard_negative_is_drawn_per_row_and_step_and_the_same_by_any_number_of_processes(tiny_model, mode):
    rows = InMemory(
        Sample(turns=[Turn(f"q{n}", [f"p{n}", f"other p{n}"], negatives=[f"n{n}.{m}" for m in range(4)])])
        for n in range(6)
    )
    mixture, processor = Mixture([6], None, 6, 0), tiny_model.encoder.muco_processor

    def drawn(negatives: int | None, step: int, **processes) -> list[tuple[str, str, tuple[str, ...]]]:
        made = TrainingBatches([rows], mixture, processor, TurnsRecipe(mode=mode, negatives=negatives), **processes)
        turns = [made._chosen(draw, n, step)[1][0] for n, draw in enumerate(mixture.draws(step))]
        hard = made[step]["ids"].hard_rows
        own = len(range(made.rank, 6, made.world_size))
        assert len(hard) == own * (4 if negatives is None else negatives)
        return [(turn.query.text, turn.target.text, tuple(c.text for c in turn.negatives)) for turn in turns]

    one = [drawn(1, step) for step in range(6)]
    for step, turns in enumerate(one):
        assert turns == drawn(1, step, rank=1, world_size=4), "a function of seed and step alone"
        everything = drawn(None, step)
        assert [turn[:2] for turn in turns] == [turn[:2] for turn in everything], "other draws stay as they are"
        assert all(len(own[2]) == 1 and own[2][0] in whole[2] for own, whole in zip(turns, everything, strict=True))
    assert len({turn[2] for turns in one for turn in turns if turn[0] == "q0"}) > 1, "another one in another epoch"
    assert all(len(set(turn[2])) == 2 for turn in drawn(2, 0)) and all(turn[2] == () for turn in drawn(0, 0))
    ids = [
        TrainingBatches([rows], mixture, processor, TurnsRecipe(negatives=1), rank=r, world_size=3) for r in range(3)
    ]
    shared = sorted(number for made in ids for number in made[2]["ids"].hard_ids.tolist())
    alone = TrainingBatches([rows], mixture, processor, TurnsRecipe(negatives=1))[2]["ids"].hard_ids
    assert shared == sorted(alone.tolist())


@pytest.mark.parametrize("mode", ["isolated", "compounded"])
def test_the_loss_of_a_batch_equals_that_of_contents_embedded_one_by_one(scenes, tiny_model, mode):
    """Isolated targets that stand twice in a sample are embedded once, hard negatives are told from targets."""
    image = next((scenes / "images" / "train").glob("*.png"))
    turns = [
        Turn("a", "Ring"),
        Turn("", "Ring", negatives=["Gold", {"image": image}]),
        Turn("b", " Ring"),
        Turn("c", "Tin"),
    ]
    rows = InMemory([Sample(image=image, turns=turns), Sample(turns=[Turn("d", {"image": image}), Turn("e", "Ring")])])
    if mode == "compounded":  # one turn each: there the dialogue is the single prompt
        rows = InMemory([Sample(image=image, turns=[turns[1]]), Sample(turns=[Turn("d", "Tin")])])
    settings, mixture = TurnsRecipe(mode=mode), Mixture([2], [1.0], 2, 0)
    made = TrainingBatches([rows], mixture, tiny_model.encoder.muco_processor, settings)
    pairs = [made._chosen(draw, row, 0) for row, draw in enumerate(mixture.draws(0))]

    def embed(contents):
        return torch.from_numpy(tiny_model.encode(contents))

    chosen = [(number, sample, turn) for number, (sample, own) in enumerate(pairs) for turn in own]
    texts = [turn.target.text.strip() for *_, turn in chosen]
    negatives = [(i, content) for i, (*_, turn) in enumerate(chosen) for content in turn.negatives]
    known = {text: i for i, text in enumerate(dict.fromkeys(t or "image" for t in [*texts, "Gold", "image"]))}
    expected = multi_turn_info_nce(
        embed([Content(turn.query.text, sample.images) for _, sample, turn in chosen]),
        embed([turn.target for *_, turn in chosen]),
        torch.tensor([number for number, *_ in chosen]),
        target_ids=torch.tensor([known[text or "image"] for text in texts]),
        hard_negatives=embed([content for _, content in negatives]),
        hard_negative_turns=torch.tensor([i for i, _ in negatives]),
        hard_negative_ids=torch.tensor([known[content.text or "image"] for _, content in negatives]),
    )
    batch = made[0]
    if mode == "isolated":
        assert len(batch["target"]["turn_rows"]) == len(texts) - 1 + len(negatives)  # "Ring" once, " Ring" is another
    value = MultiTurnLoss(tiny_model)([dict(batch["query"]), dict(batch["target"])], batch["ids"])
    assert value.item() == pytest.approx(expected.item(), abs=1e-3) and value.item() > 0.1


def test_the_image_turn_is_the_image_alone_with_the_caption():
    sample = Sample(image="a.png", turns=[Turn("q", "short", kind="local"), Turn("r", "long", kind="retrieval")])
    added = with_image_turn(sample, "retrieval").turns[-1]
    assert added.query[0].empty and added.target[0].text == "long"
    assert with_image_turn(sample, "none") is sample
    no_image = Sample(turns=[Turn("r", "long", kind="retrieval")])
    assert with_image_turn(no_image, "retrieval") is no_image


def test_broken_images_stop_a_run_or_are_skipped_and_counted(scenes, tiny_model, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"not an image")
    good = next((scenes / "images" / "train").glob("*.png"))
    rows = InMemory(
        [
            Sample(image=image, turns=[Turn("q", "p")])
            for image in (good, tmp_path / "broken.png", tmp_path / "none.png")
        ]
    )
    arguments = ([rows], Mixture([3], [1.0], 3, 0), tiny_model.encoder.muco_processor, TurnsRecipe())
    with pytest.raises(ImageError, match=r"broken\.png|none\.png"):
        TrainingBatches(*arguments)[0]
    batch = TrainingBatches(*arguments, skip_broken=True)[0]
    assert sorted(row["row"] for row in batch["skipped"]) == [1, 2] and len(batch["ids"]) == 1


@pytest.mark.parametrize(("mode", "duplicates"), [("isolated", True), ("compounded", False), ("reconstruction", False)])
def test_what_is_wrong_with_a_sample_concerns_no_other(scenes, tiny_model, tmp_path, monkeypatch, mode, duplicates):
    """Whatever it is and wherever it shows: the rest of the step is what it is without the sample, part by part."""
    (tmp_path / "broken.png").write_bytes(b"not an image")
    good = sorted((scenes / "images" / "train").glob("*.png"))[:4]
    faults = [
        Sample(tmp_path / "broken.png", [Turn("q", "p")]),
        Sample(turns=[Turn("q", "an <|emb|> here")]),
        Sample(turns=[Turn("half \ud83d", "r")]),
        Sample(turns=[Turn("q", "s", negatives=[{"image": tmp_path / "none.png"}])]),
        Sample(turns=[Turn("q", {"image": tmp_path / "none.png"})]),
    ]
    rows = InMemory([*(Sample(image, [Turn("", f"answer {n}")]) for n, image in enumerate(good)), *faults])
    mixture = Mixture([9], [1.0], 9, 0)
    monkeypatch.setattr(batches_module, "PART", 2)
    opened = []
    monkeypatch.setattr(
        processor_module, "opened_image", lambda image, **_: opened.append(image) or opened_image(image)
    )
    batches = TrainingBatches(
        [rows],
        mixture,
        tiny_model.encoder.muco_processor,
        TurnsRecipe(mode=mode),
        skip_broken=True,
        leave_out_duplicates=duplicates,
    )
    parts = [batches[0, part] for part in range(batches.parts)]
    assert sorted(line["row"] for part in parts for line in part["skipped"]) == [4, 5, 6, 7, 8]
    assert [len(part["places"]) + len(part["skipped"]) for part in parts] == [2, 2, 2, 2, 1]
    made = [part for part in parts if part["places"]]
    assert len(made) < len(parts)
    assert all(("query" in part) == ("target" in part) == bool(part["places"]) for part in parts)
    order = [draw.index for draw in mixture.draws(0) if draw.index < 4]
    assert [image for image in opened if image in good] == [good[i] for i in order], "each is opened once"
    clean = TrainingBatches([InMemory(rows[:4])], Mixture([4], [1.0], 4, 0), batches.processor, batches.turns)[0]
    ids = TurnIds.join([part["ids"] for part in parts])
    for key in ("sample_ids", "target_ids"):
        assert sorted(getattr(ids, key).tolist()) == sorted(getattr(clean["ids"], key).tolist())
    assert join([part["query"] for part in made])["image_tokens"].sum() == clean["query"]["image_tokens"].sum()


def test_blind_pixels_are_all_equal(batches):
    blind = TrainingBatches(batches.sources, batches.mixture, batches.processor, batches.turns, blind=True)[0]
    shown = [image for side in ("query", "target") for image in blind[side]["images"]]
    assert all(image["pixel_values"].unique().numel() == 1 for image in shown)
    seen = batches[0]["query"]["images"]
    assert seen[0]["pixel_values"].unique().numel() > 10
    assert torch.equal(shown[0]["image_grid_thw"], seen[0]["image_grid_thw"]), "sizes stay"


def kept_turns(rows, mixture, settings, step, processor) -> list[tuple[str, str]]:
    """The slow, obvious reference: query and target of the turns that are left, in the order of the step."""
    all_of_it = TrainingBatches([rows], mixture, processor, settings)
    kept: list[tuple[str, str]] = []
    images, targets = [], []
    for number, draw in enumerate(mixture.draws(step)):
        sample, turns = all_of_it._chosen(draw, number, step)
        if sample.id in images:
            continue
        own = [turn for turn in turns if turn.target.text.strip() not in targets]
        images.append(sample.id)
        targets += [turn.target.text.strip() for turn in own]
        kept += [(turn.query.text, turn.target.text) for turn in own]
    return kept


@settings(max_examples=30, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from("abcd"), st.lists(st.sampled_from(["Ring", "Ring ", "Tin", "Gold", "Oak"]), min_size=1)
        ),
        min_size=4,
        max_size=9,
    ),
    st.integers(1, 3),
    st.sampled_from(["isolated", "reconstruction"]),
)
def test_without_duplicates_every_image_and_target_is_trained_once_however_the_step_is_shared(
    tiny_model, samples, processes, mode
):
    rows = InMemory(
        [
            Sample(turns=[Turn(f"{i}.{j}", target) for j, target in enumerate(targets)], id=key)
            for i, (key, targets) in enumerate(samples)
        ]
    )
    processor = tiny_model.encoder.muco_processor
    mixture, turns = Mixture([len(rows)], [1.0], len(rows), 0), TurnsRecipe(mode=mode)
    expected = kept_turns(rows, mixture, turns, 0, processor)
    made = []
    for rank in range(processes):
        share = TrainingBatches(
            [rows], mixture, processor, turns, leave_out_duplicates=True, rank=rank, world_size=processes
        )
        try:
            made.append(share[0])
        except DataError as error:
            assert "data.duplicates: mask" in str(error)
            assert len({query.split(".")[0] for query, _ in expected}) < processes
            return
    ids = [number for item in made for number in item["ids"].target_ids.tolist()]
    assert len(ids) == len(expected)
    trained = sum(min(1, len(s.turns)) if mode == "reconstruction" else len(s.turns) for s in rows)
    assert sum(item["left_out"] for item in made) == trained - len(expected)
    for item in made:
        for other in made:
            apart = item["ids"].sample_ids[:, None] != other["ids"].sample_ids[None]
            same_target = item["ids"].target_ids[:, None] == other["ids"].target_ids[None]
            assert not (apart & same_target).any()


def test_what_is_left_out_of_a_step_does_not_depend_on_the_steps_before(tiny_model):
    rows = InMemory([Sample(turns=[Turn(str(i), "Ring" if i % 2 else f"t{i}")], id=str(i)) for i in range(12)])
    settings = ([rows], Mixture([12], [1.0], 5, 0), tiny_model.encoder.muco_processor, TurnsRecipe())
    one = TrainingBatches(*settings, leave_out_duplicates=True)
    for step in (0, 1, 2, 1, 1, 0):
        assert same(one[step], TrainingBatches(*settings, leave_out_duplicates=True)[step])
    assert len({len(one[step]["places"]) for step in range(4)}) > 1


def test_a_part_that_is_left_with_nothing_is_none(tiny_model, monkeypatch):
    monkeypatch.setattr(batches_module, "PART", 2)
    rows = InMemory([Sample(turns=[Turn(str(i), "Ring")], id=str(i)) for i in range(4)])
    processor = tiny_model.encoder.muco_processor
    made = TrainingBatches([rows], Mixture([4], [1.0], 4, 0), processor, TurnsRecipe(), leave_out_duplicates=True)
    assert made.parts == 2 and made[0, 1] is None
    assert len(made[0, 0]["places"]) == 1 and made[0, 0]["left_out"] == 3
