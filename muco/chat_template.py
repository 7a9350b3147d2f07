"""A model's own chat template -> the strings of its prompt, by rendering marked messages through it."""

from __future__ import annotations

from collections.abc import Sequence
from os.path import commonprefix
from typing import Any

from muco.errors import CheckpointError
from muco.released import ReleasedPrompt
from muco.stock import small_picture
from muco.template import EMB, Template

FIRST, SECOND = "MARKFIRST", "MARKSECOND"


def from_chat_template(
    tokenizer: Any, image_token: str, special: Sequence[str], released: ReleasedPrompt | None = None
) -> Template:
    """The template of a model by its chat template and tokenizer.

    Args:
        tokenizer: Has the chat template.
        image_token: The placeholder that the family's processor replaces.
        special: The special tokens of the tokenizer.
        released: Of an embedding model; the last token of its prompt is read instead of ``<|emb|>``.
    Raises:
        CheckpointError: If there is no chat template, or it drops text, images or the assistant's turns.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise CheckpointError("the model has no chat template, from which MuCo derives the prompt of its family")

    def render(*messages: tuple[str, list[dict[str, str]]]) -> str:
        chat = [{"role": role, "content": content} for role, content in (*system, *messages)]
        return tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=generation)

    stated = released.system if released else None
    system = [("system", [{"type": "text", "text": stated}])] if stated else []
    generation = released is None or released.generation
    one, two, reply = ([{"type": "text", "text": text}] for text in (FIRST, SECOND, EMB))
    image = {"type": "image"}
    plain = render(("user", one))
    pictured, pair = (render(("user", [image] * count + one)) for count in (1, 2))
    double = render(("user", one), ("assistant", reply), ("user", two))
    marks = {plain: [FIRST], pictured: [FIRST, image_token], double: [FIRST, SECOND, EMB]}
    for rendered, parts in marks.items():
        if any(rendered.count(mark) != 1 for mark in parts):
            raise CheckpointError(f"the model's chat template drops or repeats a part of a message: {rendered!r}")

    added = _added(tokenizer)
    bos = "" if plain.startswith(added) else added
    opening, tail = plain.split(FIRST)
    before, after = pictured.split(FIRST)[0].split(image_token)
    head = opening[: _after_last(special, commonprefix([opening, before]))]
    before, pair = before.removeprefix(head), pair.split(FIRST)[0].removeprefix(head).split(image_token)
    between = _between(before, pair, after)
    image_open, image_end, images_end = between or ("", after, "")
    close = _after_last(special, image_end)
    read = EMB if released is None else _last_token(tokenizer, tail)
    return Template(
        head=bos + head,
        user_open=opening.removeprefix(head),
        user_open_image=before.removesuffix(image_open),
        image_open=image_open,
        image_close=image_end[:close],
        image_end=image_end[close:],
        tail=tail if released is None else tail.removesuffix(read),
        next_turn=double.split(EMB)[1].split(SECOND)[0],
        image_token=image_token,
        images_end=images_end,
        read=read,
        one_image=between is None,
    )


def from_processor(processor: Any) -> Template:
    """The template of a model without a chat template, whose processor writes the prompt around text by itself."""
    image, token = small_picture(), processor.image_token
    ids = processor(text=[token + FIRST], images=[[image]], return_tensors="pt")["input_ids"][0]
    before, after = processor.tokenizer.decode(ids).split(FIRST)
    opening = before.split(token)[-1]
    return Template(
        head="",
        user_open=opening,
        user_open_image="",
        image_open="",
        image_close="",
        image_end="",
        tail=after,
        next_turn=after,
        image_token=token,
        images_end=opening,
    )


def _last_token(tokenizer: Any, tail: str) -> str:
    """The text of the last token of a prompt's end."""
    ids = tokenizer(tail, add_special_tokens=False)["input_ids"]
    last = tokenizer.decode(ids[-1:]) if ids else ""
    if not last or tokenizer(tail.removesuffix(last), add_special_tokens=False)["input_ids"] != ids[:-1]:
        raise CheckpointError(f"the model's prompt ends with {tail!r}, of which the last token cannot be told")
    return last


def _after_last(special: Sequence[str], text: str) -> int:
    """The place after the last special token of a text."""
    return max((text.rfind(token) + len(token) for token in special if token and token in text), default=0)


def _added(tokenizer: Any) -> str:
    """The tokens that a tokenizer puts before every text by itself, which a chat template may leave to it."""
    whole, own = (tokenizer("x", add_special_tokens=add)["input_ids"] for add in (True, False))
    count = len(whole) - len(own)
    if whole[count:] != own:
        ends = tokenizer.convert_ids_to_tokens(whole)
        raise CheckpointError(f"the tokenizer puts tokens after a text, {ends}, where MuCo reads the vector")
    return "".join(tokenizer.convert_ids_to_tokens(whole[:count]))


def _between(before: str, pair: Sequence[str], after: str) -> tuple[str, str, str] | None:
    """The text before each image, after each, and after the last one; None if two images are not written as one is.

    Args:
        before, after: The text around one image.
        pair: The text before, between and after two.
    """
    if len(pair) != 3 or (pair[0], pair[2]) != (before, after):
        return None
    for cut in range(len(pair[1]), -1, -1):
        image_end, image_open = pair[1][:cut], pair[1][cut:]
        if before.endswith(image_open) and after.startswith(image_end):
            return image_open, image_end, after.removeprefix(image_end)
    return None
