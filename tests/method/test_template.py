"""The prompt as a string and as token ids, against the literal prompt of docs/paper.md and against stock rendering."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
from families import FAMILIES, TEXTS, TRAINING_TEXTS, model, smolvlm_tokenizer
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from muco.chat_template import from_chat_template
from muco.dialogue import Content, Dialogue, Exchange, single_turn
from muco.errors import CheckpointError, DataError
from muco.processor import Processor
from muco.template import (
    EMB,
    MASK,
    QWEN_VL,
    ImageSlot,
    Prompt,
    SpecialTokenGuard,
    Template,
)
from muco.tiny import tiny_qwen2_vl

SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
ANSWER = "<|im_end|>\n<|im_start|>assistant\n<|emb|>"
VISION = "<|vision_start|><|image_pad|><|vision_end|>"
EVALUATION = replace(QWEN_VL, newline_at_end=True)  # the newline rule of the released checkpoints
IMAGE = b"never opened: a template only counts images"

PROCESSORS = (*FAMILIES, "tiny")  # "tiny": the strings of the prompt are single tokens

# What tokenizers treat differently: white space of all kinds, digits, punctuation, marks that combine, other scripts.
awkward = st.text(st.sampled_from(" \n\t\r\v\x1c\x85\u3000.,!?'\"<|>_-0127abAé\u0301ß中文ا\u200d🙂́"), max_size=12)
any_text = st.one_of(awkward, st.text(max_size=12), st.sampled_from(TEXTS))
texts = any_text.filter(lambda text: not re.search(r"<[^<> ]+>", text))  # Hypothesis does come up with "<|mask|>"
quick = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@cache
def processor(name: str) -> Processor:
    return tiny_qwen2_vl(TRAINING_TEXTS)[1] if name == "tiny" else model(name).encoder.muco_processor


def as_text(pieces: Sequence[str | ImageSlot], template: Template) -> str:
    return "".join(piece if isinstance(piece, str) else template.image_token for piece in pieces)


def prompts(template: Template, dialogue: Dialogue) -> list[str]:
    """Each turn's whole prompt as a string: all that it can see."""
    prompt, seen, whole = template.prompt(dialogue), "", []
    trunk = as_text(prompt.trunk, template)
    for branch in prompt.branches:
        own = as_text(branch, template)
        whole.append(trunk + (own if prompt.isolated else seen + own))
        seen += own
    return whole


def ids(name: str, pieces: Sequence[str | ImageSlot]) -> list[int]:
    return [i for piece in pieces for i in processor(name).text_ids(as_text((piece,), processor(name).template))]


def slots(prompt: Prompt) -> list[int]:
    return [piece.index for part in (prompt.trunk, *prompt.branches) for piece in part if isinstance(piece, ImageSlot)]


# The literal prompt


def test_a_single_turn_is_the_papers_prompt():
    picture = b"1"
    cases: list[tuple[Any, str]] = [
        ("hello", "hello"),
        (picture, f"{VISION}\n"),
        ({"text": "what is it?", "image": picture}, f"{VISION}\nwhat is it?"),
        ({"text": "both", "images": [picture, picture]}, f"{VISION}\n{VISION}\nboth"),
    ]
    for value, content in cases:
        assert prompts(QWEN_VL, single_turn(value)) == [SYSTEM + content + ANSWER]


def test_further_turns_continue_the_dialogue():
    turns = (Content("one"), Content("two"), Content("three", (IMAGE,)))
    following = "<|im_end|>\n<|im_start|>user\n"
    first = SYSTEM + f"{VISION}\none" + ANSWER
    second = first + following + "two" + ANSWER
    third = second + following + f"{VISION}\nthree" + ANSWER
    assert prompts(QWEN_VL, Dialogue((IMAGE,), turns, False)) == [first, second, third]


@pytest.mark.parametrize("name", ["qwen2_vl", "tiny"])
def test_the_released_reconstruction_is_its_literal_token_sequence(name):
    """Three user turns; the first request is left open, as in the released code."""
    exchange = Exchange("Say it.", f"a {MASK} ring\n")
    dialogue = Dialogue((IMAGE,), (Content("hello"), Content("Guess it.")), False, reconstructs=True, exchange=exchange)
    literal = (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>\nhello\n<|im_end|>\n"
        "<|im_start|>assistant\n<|emb|><|im_end|>\n"
        "<|im_start|>user\nSay it.\n"
        "<|im_start|>assistant\na <|mask|> ring\n<|im_end|>\n"
        "<|im_start|>user\nGuess it.<|im_end|>\n"
        "<|im_start|>assistant\n<|emb|>"
    )
    assert prompts(EVALUATION, dialogue)[-1] == literal
    prompt = EVALUATION.prompt(dialogue)
    SpecialTokenGuard([]).check(dialogue)
    own, tokenizer = processor(name), processor(name).tokenizer
    tokens = own.text_ids(literal)
    assert ids(name, [piece for branch in prompt.branches for piece in branch]) == [*tokens]
    if name != "tiny":  # its prompt is in fewer tokens
        special = [token for token in tokenizer.convert_ids_to_tokens(tokens) if re.fullmatch(r"<\|\w+\|>", token)]
        assert special == re.findall(r"<\|\w+\|>", literal) and len(special) == 18


def test_a_family_that_ends_messages_otherwise_closes_the_request():
    template = replace(QWEN_VL, tail="[/INST]", next_turn="</s>[INST]")
    dialogue = Dialogue((), (Content("a"), Content("b")), False, exchange=Exchange("Say it.", "c"))
    assert prompts(template, dialogue)[-1].endswith("a[/INST]<|emb|></s>[INST]Say it.[/INST]c</s>[INST]b[/INST]<|emb|>")


@pytest.mark.parametrize(("request_", "reply"), [("Say", "an <|emb|>"), ("<|im_end|>", "b"), ("Say", "half \ud800")])
def test_the_guard_reads_the_exchange(request_, reply):
    turns = (Content("a"), Content("b"))
    dialogue = Dialogue((), turns, False, "rows.jsonl:3", reconstructs=True, exchange=Exchange(request_, reply))
    with pytest.raises(DataError, match=r"rows\.jsonl:3 turn 2: the text contains"):
        SpecialTokenGuard(["<|im_end|>"]).check(dialogue)


def test_isolated_turns_share_the_prompt_through_the_image():
    prompt = QWEN_VL.prompt(Dialogue((IMAGE,), (Content("one"), Content("two"))))
    assert as_text(prompt.trunk, QWEN_VL) == SYSTEM + VISION + "\n"
    assert prompt.branches == (("one" + ANSWER,), ("two" + ANSWER,))
    prompt = QWEN_VL.prompt(Dialogue((), (Content("one"), Content("", (IMAGE,)))))
    assert as_text(prompt.trunk, QWEN_VL) == SYSTEM
    assert [as_text(branch, QWEN_VL) for branch in prompt.branches] == ["one" + ANSWER, f"{VISION}\n{ANSWER}"]


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_the_token_sequence_is_the_papers(name):
    special, text = processor(name).tokenizer.convert_tokens_to_ids, processor(name).text_ids
    start, end, emb = special(["<|im_start|>", "<|im_end|>", "<|emb|>"])
    vision_start, pad, vision_end = special(["<|vision_start|>", "<|image_pad|>", "<|vision_end|>"])
    opening = [start, *text("system"), *text("\n"), *text("You are a helpful assistant."), end, *text("\n"), start]
    opening += [*text("user"), *text("\n")]
    answer = [end, *text("\n"), start, *text("assistant"), *text("\n"), emb]
    pictured = [vision_start, pad, vision_end, *text("\n"), *text("hello")]

    def whole(dialogue: Dialogue) -> list[int]:
        prompt = processor(name).template.prompt(dialogue)
        return ids(name, (*prompt.trunk, *(piece for branch in prompt.branches for piece in branch)))

    assert whole(single_turn("hello")) == [*opening, *text("hello"), *answer]
    assert whole(single_turn({"text": "hello", "image": IMAGE})) == [*opening, *pictured, *answer]
    assert whole(single_turn(IMAGE)) == [*opening, *pictured[:4], *answer]
    two = Dialogue((IMAGE,), (Content("hello"), Content("again")), False)
    following = [end, *text("\n"), start, *text("user"), *text("\n"), *text("again")]
    assert whole(two) == [*opening, *pictured, *answer, *following, *answer]
    assert not {start, end, emb, vision_start, pad, vision_end} & {*text("system\nYou are a helpful assistant.user\n")}


def test_the_tiny_models_prompt_is_the_same_string_in_fewer_tokens():
    tokenizer = processor("tiny").tokenizer
    prompt = prompts(processor("tiny").template, single_turn("a ring"))[0]
    assert prompt == SYSTEM + "a ring" + ANSWER
    tokens = tokenizer.convert_ids_to_tokens(processor("tiny").text_ids(prompt))
    assert tokens[0] == QWEN_VL.head and tokens[-2:] == [QWEN_VL.tail, EMB]
    assert tokenizer.convert_tokens_to_ids(MASK) == tokenizer.convert_tokens_to_ids(EMB) + 1
    assert tokenizer.decode(processor("tiny").text_ids(prompt)) == prompt
    assert len(tokens) < len(processor("qwen2_vl").text_ids(prompt)) / 2


@pytest.mark.parametrize(
    ("text", "pictured", "expected"),
    [
        ("what is it?", False, "what is it?\n"),
        ("what is it?\n\n", False, "what is it?\n"),
        ("a\n\n\nb\nc", False, "a\nb\nc\n"),
        ("\n\na", False, "\na\n"),
        ("what is it?", True, f"{VISION}\nwhat is it?\n"),
        ("\n\na", True, f"{VISION}\na\n"),
        ("", True, f"{VISION}\n"),
        ("\n", True, f"{VISION}\n"),
        ("a\r\n\r\nb ", True, f"{VISION}\na\r\n\r\nb \n"),
    ],
)
def test_the_newline_rule_of_the_released_checkpoints(text, pictured, expected):
    turn = Dialogue((IMAGE,) * pictured, (Content(text),))
    assert prompts(EVALUATION, turn) == [SYSTEM + expected + ANSWER]


@quick
@given(texts, st.integers(0, 3))
def test_the_newline_rule_holds_for_the_content_as_a_whole(text, pictures):
    content = re.sub(r"\n+", "\n", f"{VISION}\n" * pictures + text)
    content = content if content.endswith("\n") or not content else content + "\n"
    turn = Dialogue((IMAGE,) * pictures, (Content(text),))
    assert prompts(EVALUATION, turn) == [SYSTEM + content + ANSWER]
    assert prompts(EVALUATION, Dialogue((), (Content(text, (IMAGE,) * pictures),))) == [SYSTEM + content + ANSWER]


def test_idefics3_reads_its_prompt_off_its_chat_template():
    template = processor("idefics3").template
    end = "<end_of_utterance>\nAssistant:<|emb|>"
    assert prompts(template, single_turn("hello")) == [f"<|im_start|>User: hello{end}"]
    assert prompts(template, single_turn({"text": "hello", "image": IMAGE})) == [f"<|im_start|>User:<image>hello{end}"]
    assert prompts(template, single_turn({"images": [IMAGE, IMAGE]})) == [f"<|im_start|>User:<image><image>{end}"]
    two = prompts(template, Dialogue((IMAGE,), (Content("one"), Content("two")), False))
    assert two[1] == f"<|im_start|>User:<image>one{end}<end_of_utterance>\nUser: two{end}"


# A prompt cut in parts has the tokens of the whole prompt


@pytest.mark.parametrize("name", PROCESSORS)
def test_the_tokenizers_join_what_a_bad_cut_would_part(name):
    """Else the test that follows would prove little."""
    joined = ["\n\n"] if name == "idefics3" else ["\n\n", "\n \n", "\n\t\n"]
    assert [len(processor(name).text_ids(text)) for text in joined] == [1] * len(joined)


turns = st.lists(st.tuples(texts, st.integers(0, 2)), min_size=1, max_size=4)


@pytest.mark.parametrize("name", PROCESSORS)
@pytest.mark.parametrize("newline_at_end", [False, True])
@quick
@given(st.integers(0, 2), turns, st.booleans())
@example(0, [("\na", 0), ("b", 1)], True)
@example(1, [("", 0), (" a", 0), ("1", 0)], True)
@example(0, [("\u0301e", 0), ("\x1c", 0)], True)
def test_parts_have_the_tokens_of_the_whole(name, newline_at_end, context, turns, isolated):
    template = replace(processor(name).template, newline_at_end=newline_at_end)
    dialogue = Dialogue((IMAGE,) * context, tuple(Content(text, (IMAGE,) * n) for text, n in turns), isolated)
    processor(name).guard.check(dialogue)
    prompt = template.prompt(dialogue)
    assert slots(prompt) == list(range(len(dialogue.images)))
    seen = ids(name, prompt.trunk)
    for j, (whole, branch) in enumerate(zip(prompts(template, dialogue), prompt.branches, strict=True), start=1):
        parts = seen + ids(name, branch)
        assert parts == processor(name).tokenizer(whole, add_special_tokens=False)["input_ids"]
        assert parts[-1] == processor(name).read_id and parts.count(parts[-1]) == (1 if isolated else j)
        seen = seen if isolated else parts


@quick
@given(st.integers(0, 2), turns)
def test_an_isolated_turn_has_the_prompt_of_a_single_turn(context, turns):
    for template in (QWEN_VL, EVALUATION, processor("idefics3").template):
        contents = tuple(Content(text, (IMAGE,) * n) for text, n in turns)
        together = prompts(template, Dialogue((IMAGE,) * context, contents))
        for whole, content in zip(together, contents, strict=True):
            assert prompts(template, Dialogue((IMAGE,) * context + content.images, (Content(content.text),))) == [whole]


# The chat template that is saved with a model

ODD = Template(
    head="<s>'quoted' \\n \"twice\"\n",
    user_open="{{ user }}: ",
    user_open_image="{% user %}:",
    image_open="[",
    image_close="]",
    image_end=" {# end #}\r\n",
    tail="\\end'\n\n",
    next_turn="",
    image_token="<image>",
)


@pytest.mark.parametrize("newline_at_end", [False, True])
@quick
@given(texts, st.integers(0, 3), st.booleans())
@example("", 1, True)
@example("\n", 0, False)
@example("\n\n", 2, True)
@example("a\n\n b\n", 0, True)
@example("{{ raise_exception('run') }}", 0, True)
def test_stock_rendering_is_our_rendering(newline_at_end, text, pictures, generate):
    tokenizer = processor("qwen2_vl").tokenizer
    for template in (QWEN_VL, processor("idefics3").template, ODD):
        template = replace(template, newline_at_end=newline_at_end)
        expected = prompts(template, Dialogue((IMAGE,) * pictures, (Content(text),)))

        def render(content: Any, template: Template = template) -> str:
            chat, source = [{"role": "user", "content": content}], template.jinja()
            return tokenizer.apply_chat_template(
                chat, chat_template=source, tokenize=False, add_generation_prompt=generate
            )

        parts = [{"type": "image"}] * pictures + [{"type": "text", "text": text}]
        assert [render(parts)] == expected
        assert [render(parts[::-1])] == expected, "images stand before the text whatever the order of the parts"
        if not text:
            assert [render(parts[:-1])] == expected
        if not pictures:
            assert [render(text)] == expected


def test_stock_rendering_refuses_other_roles():
    chat = [{"role": "assistant", "content": "hello"}]
    with pytest.raises(Exception, match="only user messages are embedded"):
        processor("qwen2_vl").tokenizer.apply_chat_template(chat, chat_template=QWEN_VL.jinja(), tokenize=False)


# Deriving the template of another family

BODY = "{% for p in m['content'] %}{% if p['type'] == 'text' %}{{ p['text'] }}{% else %}<image>{% endif %}{% endfor %}"
GOOD = f"{{% for m in messages %}}<|im_start|>{{{{ m['role'] }}}}:{BODY}<|im_end|>{{% endfor %}}<|im_start|>reply:"


def derived(chat_template: str | None) -> Template:
    tokenizer = smolvlm_tokenizer((EMB, MASK))
    tokenizer.chat_template = chat_template
    return from_chat_template(tokenizer, "<image>", [*tokenizer.all_special_tokens, "<|im_start|>", "<|im_end|>"])


def test_a_chat_template_is_read_off():
    assert derived(GOOD) == Template(
        head="<|im_start|>",
        user_open="user:",
        user_open_image="user:",
        image_open="",
        image_close="",
        image_end="",
        tail="<|im_end|><|im_start|>reply:",
        next_turn="<|im_end|><|im_start|>user:",
        image_token="<image>",
    )


def test_a_template_may_open_differently_with_an_image():
    template = derived("{% if messages[0]['content'][0]['type'] == 'image' %}<|im_end|>{% endif %}" + GOOD)
    assert (template.head, template.user_open) == ("", "<|im_start|>user:")
    assert template.user_open_image == "<|im_end|><|im_start|>user:"


IMAGES = "{% for p in m['content'] if p['type'] == 'image' %}BEFORE<image>AFTER{% endfor %}END"
TEXTS = "{% for p in m['content'] if p['type'] == 'text' %}{{ p['text'] }}{% endfor %}"


@pytest.mark.parametrize(
    ("before", "after", "end"), [("", "\n", ""), ("", "", "\n"), ("\n\n", "\n\n", ""), ("a ", " b", " c")]
)
def test_the_text_around_each_of_several_images_is_read_off(before, after, end):
    images = f"{{% if m['content'][0]['type'] == 'image' %}}{IMAGES}{{% endif %}}"
    for name, text in (("BEFORE", before), ("AFTER", after), ("END", end)):
        images = images.replace(name, f"{{{{ {text!r} }}}}")
    body = images + TEXTS
    template = derived(f"{{% for m in messages %}}<|im_start|>{{{{ m['role'] }}}}:{body}<|im_end|>{{% endfor %}}")
    assert (template.image_open, template.image_close + template.image_end, template.images_end) == (before, after, end)
    assert not template.one_image


def test_a_template_that_numbers_images_takes_one():
    numbered = "{% for p in m['content'] %}{% if p['type'] == 'text' %}{{ p['text'] }}{% else %}{{ loop.index }}<image>"
    body = numbered + "{% endif %}{% endfor %}"
    assert derived(GOOD.replace(BODY, body)).one_image


def test_a_template_without_special_tokens_has_no_head():
    template = derived(f"{{% for m in messages %}}{{{{ m['role'] }}}}: {BODY}; {{% endfor %}}reply: ")
    assert (template.head, template.user_open, template.tail) == ("", "user: ", "; reply: ")


@pytest.mark.parametrize(
    ("chat_template", "message"),
    [
        (None, "no chat template"),
        ("{{ messages[0]['content'][0]['type'] }}", "drops or repeats a part"),
        (GOOD.replace("<image>", ""), "drops or repeats a part"),
        (GOOD.replace("<image>", "<image><image>"), "drops or repeats a part"),
        (GOOD.replace("{% for m in messages %}", "{% for m in messages if m['role'] == 'user' %}"), "drops or repeats"),
        (GOOD.replace("{{ p['text'] }}", "{{ p['text'] }}{{ p['text'] }}"), "drops or repeats a part"),
    ],
)
def test_a_chat_template_that_loses_a_part_is_refused(chat_template, message):
    with pytest.raises(CheckpointError, match=message):
        derived(chat_template)


# Special tokens in data


def test_the_guard_names_row_turn_and_token():
    guard = SpecialTokenGuard(["<|im_end|>", "<|im_end|>x", ""])
    for token in (EMB, MASK, "<|im_end|>", "<|im_end|>x"):
        with pytest.raises(DataError) as error:
            guard.check(Dialogue((), (Content("fine"), Content(f"before{token}")), where="rows.jsonl:7"))
        assert f"rows.jsonl:7 turn 2: the text contains the special token {token!r}" in str(error.value)
    guard.check(Dialogue((), (Content("<|emb|"), Content("<| emb |>"), Content("im_end"))))


def test_half_a_character_is_refused():
    with pytest.raises(DataError, match=r"rows.jsonl:7 turn 1: the text contains half of a character, '\\ud83d'"):
        SpecialTokenGuard([]).check(Dialogue((), (Content("a \ud83d b"),), where="rows.jsonl:7"))


@pytest.mark.parametrize("name", PROCESSORS)
@quick
@given(any_text | st.sampled_from(["a <|emb|>", "<|mask|>b", "<|im_start|>", "<|emb|<|emb|>", "<|emb|"]))
def test_the_guard_refuses_exactly_the_texts_with_special_tokens(name, text):
    tokens = processor(name).tokenizer.added_tokens_decoder
    special = {i for i, token in tokens.items() if token.special} & set(processor(name).text_ids(text))
    if special:
        with pytest.raises(DataError, match="special token"):
            processor(name).guard.check(single_turn(text))
    else:
        processor(name).guard.check(single_turn(text or "a"))
