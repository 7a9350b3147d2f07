"""Requests become items to embed, within the limits of the server. What cannot be embedded is refused by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from muco.errors import ImageError
from muco.serve.engine import Item
from muco.serve.images import check_source
from muco.serve.schema import (
    COHERE_TYPES,
    EmbeddingsRequest,
    EmbedRequest,
    ImagePart,
    ItemInput,
    Message,
    Part,
    RequestError,
    RequestLimits,
    SearchRequest,
    TextPart,
    VideoPart,
    VLLMOptions,
)


@dataclass(frozen=True)
class Reader:
    """Reads requests for one server."""

    limits: RequestLimits
    instructions: Mapping[str, str] = field(default_factory=dict)  # by input_type

    def embeddings(self, request: EmbeddingsRequest) -> list[Item]:
        if (request.input is None) == (request.messages is None):
            raise RequestError("pass either 'input' or 'messages'; an empty list counts as not given", "input")
        for name in ("turns", "add_generation_prompt", "continue_final_message"):
            if getattr(request, name) and request.messages is None:
                raise RequestError(f"{name!r} belongs to 'messages'; with 'input' it has no meaning", name)
        instruction = self._instruction(request.instruction, request.input_type)
        if request.input is not None:
            entries = [request.input] if isinstance(request.input, str) else request.input
            given = [ItemInput(text=entry) if isinstance(entry, str) else entry for entry in entries]
            items = [self._item(_asked(each), f"input[{n}]", instruction) for n, each in enumerate(given)]
        else:
            many: Any = request.messages if isinstance(request.messages[0], list) else [request.messages]
            for number, conversation in enumerate(many):
                _check_assistant(conversation, f"messages[{number}]", request)
            items = [self._conversation(c, f"messages[{n}]", instruction, request.turns) for n, c in enumerate(many)]
        return self._checked(items)

    def embed(self, request: EmbedRequest) -> list[Item]:
        given = [name for name in ("texts", "images", "inputs") if getattr(request, name) is not None]
        if len(given) != 1:
            message = "pass exactly one of 'texts', 'images' and 'inputs'; an empty list counts as not given"
            raise RequestError(message, "texts")
        instruction = self._instruction(None, request.input_type)
        items = []
        for number, value in enumerate(getattr(request, given[0])):
            where = f"{given[0]}[{number}]"
            if given[0] == "inputs":
                asked = _parts(value.content, where)
            else:
                asked = Asked(value) if given[0] == "texts" else Asked(images=(value,))
            items.append(self._item(asked, where, instruction))
        return [replace(item, truncate=request.truncate) for item in self._checked(items)]

    def search(self, request: SearchRequest) -> Item | None:
        """What to search by; None: the row ``like``."""
        asked = request.text or request.image or request.video
        if bool(asked) == (request.like is not None):
            raise RequestError("pass 'text', 'image', 'video' or several of them, or 'like'", "text")
        if request.k > self.limits.hits:
            raise RequestError(f"at most {self.limits.hits} hits", "k")
        if not asked:
            return None
        asked = Asked(request.text or "", _given(request.image or None), (*request.video,), request.fps)
        return self._checked([self._item(asked, "query", request.instruction or "")])[0]

    def _instruction(self, text: str | None, input_type: str | None) -> str:
        if input_type is None:
            return text or ""
        if text is not None:
            raise RequestError("pass either 'instruction' or 'input_type'", "input_type")
        if input_type not in self.instructions and input_type not in COHERE_TYPES:
            known = ", ".join(sorted({*self.instructions, *COHERE_TYPES}))
            raise RequestError(f"unknown input_type; known are {known}", "input_type")
        return self.instructions.get(input_type, "")

    def _item(self, asked: Asked, where: str, instruction: str) -> Item:
        if not asked.text and not asked.seen:
            raise RequestError(f"{where}: nothing to embed; pass text, an image or both", where)
        if asked.fps is not None and not asked.video:
            raise RequestError(f"{where}: 'fps' belongs to a video, and there is none", where)
        texts = (_instructed(asked.text, instruction),)
        return Item(texts, asked.images, where=where, video=asked.video, fps=asked.fps)

    def _conversation(
        self, messages: Sequence[Message], where: str, instruction: str, turns: Literal["isolated", "compounded"] | None
    ) -> Item:
        instruction = _system(messages, where, instruction)
        user = [_parts(message.content, where) for message in messages if message.role == "user"]
        if not user:
            raise RequestError(f"{where}: no user message to embed", where)
        if turns is None:
            if len(user) > 1:
                raise RequestError(f"{where}: several user messages; for a vector each, set 'turns'", where)
            return self._item(user[0], where, instruction)
        first = user[0]
        if any(other.seen for other in user[1:]):
            raise RequestError(f"{where}: with 'turns', put images in the first user message", where)
        if not first.seen and not all(asked.text for asked in user):
            raise RequestError(f"{where}: an empty user message means the image, but there is no image", where)
        texts = tuple(_instructed(asked.text, instruction) for asked in user)
        return Item(texts, first.images, turns, where=where, video=first.video, fps=first.fps)

    def _checked(self, items: list[Item]) -> list[Item]:
        limits = self.limits
        for name, count, most in (
            ("items", sum(len(item.texts) for item in items), limits.items),
            ("turns of a conversation", max(len(item.texts) for item in items), limits.turns),
            ("images", sum(len(item.pictures) for item in items), limits.images),
        ):
            if count > most:
                raise RequestError(f"{count} {name}; at most {most} in one request", code="too_many")
        for item in items:
            if max(map(len, item.texts)) > limits.characters:
                raise RequestError(f"{item.where}: a text of more than {limits.characters:,} characters", item.where)
            for image in item.pictures:
                try:
                    check_source(image, limits.image, item.where)
                except ImageError as error:
                    raise RequestError(str(error), item.where) from None
        return items


def _system(messages: Sequence[Message], where: str, instruction: str) -> str:
    """The instruction: that of the request, or that of a system message at the beginning."""
    system = [message for message in messages if message.role == "system"]
    if not system:
        return instruction
    if len(system) > 1 or messages[0].role != "system" or instruction:
        raise RequestError(f"{where}: one system message, at the beginning, is the instruction", where)
    said = _parts(system[0].content, where)
    if said.seen:
        raise RequestError(f"{where}: a system message holds text only", where)
    return said.text


def _check_assistant(messages: Sequence[Message], where: str, request: VLLMOptions) -> None:
    """The model's layout ends in an open message of the assistant; anything else would be another vector."""
    for before, message in zip([None, *messages], messages, strict=False):
        if message.role != "assistant":
            continue
        if before is None or before.role != "user" or _parts(message.content, where) != Asked():
            raise RequestError(f"{where}: an assistant message is empty and follows a user message", where)
    ends = messages[-1].role == "assistant"
    if request.continue_final_message and not ends:
        message = f"{where}: the last message must be an empty one of the assistant to be continued"
        raise RequestError(message, "continue_final_message")
    if request.add_generation_prompt and ends:
        message = f"{where}: there is a message of the assistant already"
        raise RequestError(message, "add_generation_prompt")


def _instructed(text: str, instruction: str) -> str:
    return "\n".join(part for part in (instruction, text) if part)


@dataclass(frozen=True)
class Asked:
    """What one item of a request holds."""

    text: str = ""
    images: tuple[str, ...] = ()
    video: tuple[str, ...] = ()  # its frames
    fps: float | None = None

    @property
    def seen(self) -> bool:
        return bool(self.images or self.video)


def _asked(given: ItemInput) -> Asked:
    return Asked(given.text or "", _given(given.image, *given.images), tuple(given.video), given.fps)


def _given(*images: str | None) -> tuple[str, ...]:
    return tuple(image for image in images if image is not None)


def _parts(content: str | Sequence[Part], where: str) -> Asked:
    """What a message holds, as the model's own chat template takes it: texts joined, images first, then a video."""
    if isinstance(content, str):
        return Asked(content)
    texts = [part.text for part in content if isinstance(part, TextPart)]
    images = [part.image_url for part in content if isinstance(part, ImagePart)]
    videos = [part for part in content if isinstance(part, VideoPart)]
    if len(videos) > 1:
        raise RequestError(f"{where}: several videos; send one", where)
    sources = tuple(image if isinstance(image, str) else image.url for image in images)
    asked = Asked("".join(texts), sources)
    return replace(asked, video=tuple(videos[0].video), fps=videos[0].fps) if videos else asked
