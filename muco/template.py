"""Dialogue -> prompt: which text comes where, and where each turn's ``<|emb|>`` is read.

A prompt is a list of *pieces*, strings and images. It is cut only beside a special token, or where the tokenizer is
known to split anyway, so that the token ids of the joined parts are those of the whole.

Source: arXiv 2602.06393, the prompt of the released checkpoints (docs/paper.md).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from muco.base.text import LONE_SURROGATE
from muco.dialogue import Content, Dialogue
from muco.errors import CheckpointError, DataError

EMB = "<|emb|>"
MASK = "<|mask|>"
END = "<|im_end|>"  # of a message, in Qwen's prompt
SPECIAL_TOKENS = (EMB, MASK)  # added to a tokenizer in this order
SETTINGS_FILE = "muco.json"
SETTINGS_NOTE = re.compile(r"\{#- muco (.*?) -#\}")  # the same, at the head of the chat template


@dataclass(frozen=True)
class ImageSlot:
    """The place of image number ``index`` of the dialogue in a prompt."""

    index: int


Pieces = tuple[str | ImageSlot, ...]


@dataclass(frozen=True)
class Prompt:
    """``trunk`` is read by all turns, ``branches[j]`` is turn j's part and ends at its ``<|emb|>``.

    If ``isolated``, a branch continues the trunk; otherwise it continues the branch before it (and there is no trunk).
    """

    trunk: Pieces
    branches: tuple[Pieces, ...]
    isolated: bool


@dataclass(frozen=True)
class Template:
    """The strings around a user's message."""

    head: str  # from the start of the prompt to the last special token before the user's content
    user_open: str  # plain text between the head and a content that begins with text
    user_open_image: str  # the same for a content that begins with an image
    image_open: str  # special tokens before an image's own tokens; may be empty
    image_close: str  # special tokens after them; may be empty
    image_end: str  # plain text after an image
    tail: str  # from the end of the content to <|emb|>, which is not part of it
    next_turn: str  # from after <|emb|> to the next user content
    image_token: str  # the placeholder that stock processors replace by an image's own tokens
    newline_at_end: bool = False  # runs of newlines become one and text ends with one, as in the paper's evaluation
    # Whether the tokenizer splits between plain opening text and a content that does not begin with white space, so
    # that the opening may be part of the trunk.
    shared_opening: bool = False

    def prompt(self, dialogue: Dialogue) -> Prompt:
        """Lays a dialogue out; images are numbered in the order of ``dialogue.images``."""
        return self._isolated(dialogue) if dialogue.isolated else self._compounded(dialogue)

    def _isolated(self, dialogue: Dialogue) -> Prompt:
        context, trunk = self._images(0, len(dialogue.context)), (self.head,)
        openings = [self.user_open_image if turn.images else self.user_open for turn in dialogue.turns]
        if context:  # the text after its last image opens every turn
            trunk, openings = (self.head, self.user_open_image, *context[:-1]), [context[-1]] * len(dialogue.turns)
        texts = [self._text(turn, bool(turn.images or context)) for turn in dialogue.turns]
        if self.shared_opening and len(set(openings)) == 1 and not any(text[:1].isspace() for text in texts):
            trunk, openings = (*trunk, openings[0]), [""] * len(openings)
        branches, seen = [], len(dialogue.context)
        for opening, text, turn in zip(openings, texts, dialogue.turns, strict=True):
            images = self._images(seen, len(turn.images))
            branches.append(_joined((opening, *images, text, self.tail, EMB)))
            seen += len(turn.images)
        return Prompt(_joined(trunk), tuple(branches), True)

    def _compounded(self, dialogue: Dialogue) -> Prompt:
        branches, seen = [], 0
        for j, turn in enumerate(dialogue.turns):
            count = len(turn.images) + (len(dialogue.context) if j == 0 else 0)
            first = self.head + (self.user_open_image if count else self.user_open)
            images, text = self._images(seen, count), self._text(turn, count > 0)
            opening = self.next_turn if j else first
            if dialogue.exchange and 0 < j == len(dialogue.turns) - 1:
                said, text = dialogue.exchange, turn.text
                # The released code leaves the user's turn of the request open, and its models have learnt it so.
                opening += f"{said.request}{self.tail.removeprefix(END)}{said.reply}{self.next_turn}"
            branches.append(_joined((opening, *images, text, self.tail, EMB)))
            seen += count
        return Prompt((), tuple(branches), False)

    def _images(self, first: int, count: int) -> Pieces:
        pieces: Pieces = ()
        for index in range(first, first + count):
            pieces += (self.image_open, ImageSlot(index), self.image_close, self.image_end)
        return pieces

    def _text(self, content: Content, has_image: bool) -> str:
        if not self.newline_at_end:
            return content.text
        text = re.sub(r"\n+", "\n", content.text)
        if has_image:
            text = text.removeprefix("\n")  # the newline after the image is already one
        return text if not text or text.endswith("\n") else text + "\n"

    def jinja(self) -> str:
        """The chat template by which stock libraries render one user message, images first, up to ``<|emb|>``."""
        image = self.image_open + self.image_token + self.image_close + self.image_end
        text = "{{ ns.text }}"
        if self.newline_at_end:
            text = (
                "{%- if ns.text.startswith('\\n') and not ns.images -%}{{ '\\n' }}{%- endif -%}"
                "{%- set ns.text = ns.text.split('\\n') | reject('equalto', '') | join('\\n') -%}"
                "{{ ns.text }}{%- if ns.text -%}{{ '\\n' }}{%- endif -%}"
            )
        return (
            "{%- set ns = namespace(text='', images=0) -%}"
            "{%- for message in messages -%}"
            "{%- if message['role'] != 'user' -%}{{ raise_exception('only user messages are embedded') }}{%- endif -%}"
            "{%- if message['content'] is string -%}{%- set ns.text = ns.text + message['content'] -%}"
            "{%- else -%}{%- for part in message['content'] -%}"
            "{%- if part['type'] == 'image' -%}{%- set ns.images = ns.images + 1 -%}"
            "{%- elif part['type'] == 'text' -%}{%- set ns.text = ns.text + part['text'] -%}{%- endif -%}"
            "{%- endfor -%}{%- endif -%}{%- endfor -%}"
            f"{{{{ {_quoted(self.head)} }}}}"
            f"{{{{ {_quoted(self.user_open_image)} if ns.images else {_quoted(self.user_open)} }}}}"
            f"{{%- for _ in range(ns.images) -%}}{{{{ {_quoted(image)} }}}}{{%- endfor -%}}"
            f"{text}{{{{ {_quoted(self.tail + EMB)} }}}}"
        )


def _joined(pieces: Iterable[str | ImageSlot]) -> Pieces:
    joined: list[str | ImageSlot] = []
    for piece in pieces:
        if isinstance(piece, str) and joined and isinstance(joined[-1], str):
            joined[-1] += piece
        elif piece != "":
            joined.append(piece)
    return tuple(joined)


def _quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n").replace("\r", "\\r")
    return f"'{escaped}'"


QWEN_VL = Template(
    head="<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>",
    user_open="user\n",
    user_open_image="user\n",
    image_open="<|vision_start|>",
    image_close="<|vision_end|>",
    image_end="\n",
    tail="<|im_end|>\n<|im_start|>assistant\n",
    next_turn="<|im_end|>\n<|im_start|>user\n",
    image_token="<|image_pad|>",
    shared_opening=True,
)
QWEN_MODEL_TYPES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")


def from_chat_template(tokenizer: Any, image_token: str, special: Sequence[str]) -> Template:
    """Reads the strings around a message off a model's own chat template, by rendering marked messages through it.

    Raises:
        CheckpointError: If there is no chat template, or it drops text, images or the assistant's turns.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise CheckpointError("the model has no chat template, from which MuCo derives the prompt of its family")
    first, second = "MARKFIRST", "MARKSECOND"

    def render(*messages: tuple[str, list[dict[str, str]]]) -> str:
        chat = [{"role": role, "content": content} for role, content in messages]
        return tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)

    one, two, reply = ([{"type": "text", "text": text}] for text in (first, second, EMB))
    plain = render(("user", one))
    pictured = render(("user", [{"type": "image"}, *one]))
    double = render(("user", one), ("assistant", reply), ("user", two))
    for rendered, marks in ((plain, (first,)), (pictured, (first, image_token)), (double, (first, second, EMB))):
        if any(rendered.count(mark) != 1 for mark in marks):
            raise CheckpointError(f"the model's chat template drops or repeats a part of a message: {rendered!r}")

    opening, tail = plain.split(first)
    before_image, after_image = pictured.split(first)[0].split(image_token)
    head = opening[: max((opening.rfind(t) + len(t) for t in special if t and t in opening), default=0)]
    if not before_image.startswith(head):
        raise CheckpointError(f"the model's chat template opens differently with an image: {before_image!r}")
    return Template(
        head=head,
        user_open=opening.removeprefix(head),
        user_open_image=before_image.removeprefix(head),
        image_open="",
        image_close="",
        image_end=after_image,
        tail=tail,
        next_turn=double.split(EMB)[1].split(second)[0],
        image_token=image_token,
    )


class SpecialTokenGuard:
    """Refuses data text with a special token, which would be a second embedding position, an image or a role, or with
    half a character (JSON can spell it), which no tokenizer takes.
    """

    def __init__(self, special: Iterable[str]) -> None:
        tokens = sorted({*special, *SPECIAL_TOKENS} - {""}, key=len, reverse=True)
        self._pattern = re.compile("|".join(re.escape(token) for token in tokens))

    def check(self, dialogue: Dialogue) -> None:
        """Raises a DataError that names the row, the turn and the token."""
        texts = [(number, turn.text) for number, turn in enumerate(dialogue.turns, start=1)]
        if dialogue.exchange:
            texts += [(len(texts), dialogue.exchange.request), (len(texts), dialogue.exchange.reply)]
        for number, text in texts:
            place = f"{dialogue.where or 'input'} turn {number}"
            text = text.replace(MASK, "") if dialogue.reconstructs and number > 1 else text
            if found := self._pattern.search(text):
                what = (
                    f"the special token {found[0]!r}; take it out of the data, in a prompt it has a meaning of its own"
                )
                raise DataError(f"{place}: the text contains {what}")
            if found := LONE_SURROGATE.search(text):
                what = f"half of a character, {found[0]!r}; take it out of the data"
                raise DataError(f"{place}: the text contains {what}")


def read_settings(path: str, local_files_only: bool, chat_template: Any) -> dict[str, Any] | None:
    """The ``muco.json`` of a model, the note in its chat template, or None; a CheckpointError if it cannot be used."""
    from transformers.utils.hub import cached_file

    found = {"local_files_only": local_files_only, "_raise_exceptions_for_missing_entries": False}
    file = cached_file(path, SETTINGS_FILE, **found)
    note = SETTINGS_NOTE.match(chat_template) if isinstance(chat_template, str) else None
    if file is None and note is None:
        return None
    try:
        settings = json.loads(Path(file).read_text(encoding="utf-8") if file else note[1])
    except ValueError as error:
        raise CheckpointError(f"{file or path}: not valid JSON: {error}") from error
    known = {field.name for field in fields(Template)}
    pixels = settings.get("pixels", [1, 1]) if isinstance(settings, dict) else None
    sound = isinstance(pixels, list) and [type(limit) for limit in pixels] == [int, int]
    if not sound or settings.get("format") != 1 or set(settings.get("template", ())) != known:
        raise CheckpointError(f"{file or path}: written by another version of MuCo; this one reads format 1")
    return settings
