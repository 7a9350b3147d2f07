"""Dialogue -> prompt: which text comes where, and where each turn's ``<|emb|>`` is read.

A prompt is a list of *pieces*, strings and images. It is cut only beside a special token, or where the tokenizer is
known to split anyway, so that the token ids of the joined parts are those of the whole.

Source: arXiv 2602.06393, the prompt of the released checkpoints (docs/paper.md).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import MISSING, asdict, dataclass, fields
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
    image_open: str  # before an image's own tokens; may be empty
    image_close: str  # special tokens after them; may be empty
    image_end: str  # plain text after an image
    tail: str  # from the end of the content to the token that is read, which is not part of it
    next_turn: str  # from after that token to the next user content
    image_token: str  # the placeholder that stock processors replace by an image's own tokens
    newline_at_end: bool = False  # runs of newlines become one and text ends with one, as in the paper's evaluation
    # Whether the tokenizer splits between plain opening text and a content that does not begin with white space, so
    # that the opening may be part of the trunk.
    shared_opening: bool = False
    images_end: str = ""  # plain text after the last image
    image_lead: str = ""  # plain text that the family's processor writes before an image's own tokens by itself
    image_trail: str = ""  # the same after them
    image_glue: str = ""  # what it puts between an image and a word right behind it
    read: str = EMB  # the token whose state is a turn's vector; another one in embedding models of other trainers
    one_image: bool = False  # the family's chat template writes several images in another way, which is not known here

    def stated(self) -> dict[str, Any]:
        """All fields but those of rare families that are as usual, which files of older versions do not have."""
        rare = ("images_end", "image_lead", "image_trail", "image_glue", "read", "one_image")
        usual = {field.name: field.default for field in fields(self) if field.name in rare}
        return {name: value for name, value in asdict(self).items() if usual.get(name, MISSING) != value}

    def special_tokens(self) -> list[str]:
        """All ``<|...|>`` of the prompt, the image placeholder included."""
        texts = (getattr(self, field.name) for field in fields(self) if field.type == "str")
        return sorted({token for text in texts for token in re.findall(r"<\|\w+\|>", text)})

    def prompt(self, dialogue: Dialogue) -> Prompt:
        """Lays a dialogue out; images are numbered in the order of ``dialogue.images``."""
        return self._isolated(dialogue) if dialogue.isolated else self._compounded(dialogue)

    def _isolated(self, dialogue: Dialogue) -> Prompt:
        context, trunk = self._images(0, len(dialogue.context)), (self.head,)
        openings = [self.user_open_image if turn.images else self.user_open for turn in dialogue.turns]
        if context:  # the text after its last image opens every turn
            *images, last, close, end = context
            shared, opening = ("", f"{close}{end}") if self.image_trail else (close, end)
            trunk, openings = (self.head, self.user_open_image, *images, last, shared), [opening] * len(dialogue.turns)
        texts = [self._text(turn, bool(turn.images or context)) for turn in dialogue.turns]
        if self.shared_opening and len(set(openings)) == 1 and not any(text[:1].isspace() for text in texts):
            trunk, openings = (*trunk, openings[0]), [""] * len(openings)
        branches, seen = [], len(dialogue.context)
        for opening, text, turn in zip(openings, texts, dialogue.turns, strict=True):
            images = self._images(seen, len(turn.images))
            branches.append(_joined((opening, *images, text, self.tail + self.read)))
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
            branches.append(_joined((opening, *images, text, self.tail + self.read)))
            seen += count
        return Prompt((), tuple(branches), False)

    def _images(self, first: int, count: int) -> Pieces:
        pieces: Pieces = ()
        opening, closing = self.image_open + self.image_lead, self.image_trail + self.image_close
        for index in range(first, first + count):
            last = self.images_end if index == first + count - 1 else ""
            pieces += (opening, ImageSlot(index), closing, self.image_end + last)
        return pieces

    def _text(self, content: Content, has_image: bool) -> str:
        if not self.newline_at_end:
            behind = has_image and not self.image_end + self.images_end and re.match(r"[^\s<]", content.text)
            return self.image_glue + content.text if behind else content.text
        text = re.sub(r"\n+", "\n", content.text)
        if has_image:
            text = text.removeprefix("\n")  # the newline after the image is already one
        return text if not text or text.endswith("\n") else text + "\n"

    def jinja(self) -> str:
        """The chat template by which stock libraries render one user message, images first, up to ``<|emb|>``."""
        image = self.image_open + self.image_token + self.image_close + self.image_end
        end = f"{{{{ {_quoted(self.images_end)} if ns.images else '' }}}}" if self.images_end else ""
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
            f"{end}"
            f"{text}{{{{ {_quoted(self.tail + self.read)} }}}}"
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
    known = {field.name: field.default is MISSING for field in fields(Template)}
    pixels = settings.get("pixels", [1, 1]) if isinstance(settings, dict) else None
    sound = isinstance(pixels, list) and [type(limit) for limit in pixels] == [int, int]
    stated = {*settings.get("template", ())} if sound else set()
    needed = {name for name, required in known.items() if required}
    if not sound or settings.get("format") != 1 or not needed <= stated <= {*known}:
        raise CheckpointError(f"{file or path}: written by another version of MuCo; this one reads format 1")
    return settings
