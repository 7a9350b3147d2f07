"""Requests as they may come, and the items to embed that they become. What is not documented is refused by name."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    StringConstraints,
    Tag,
    model_validator,
)
from pydantic_core import PydanticCustomError

from muco.errors import ImageError, MucoError
from muco.serve.engine import Item
from muco.serve.images import ImageLimits, check_source

COHERE_TYPES = ("search_document", "search_query", "classification", "clustering", "image")
EMBEDDING_TYPES = Literal["float", "int8", "binary", "ubinary", "base64"]
LAYOUT = "prompts and images are laid out as the model was trained; a request cannot change that"
PYDANTIC = re.compile(r" or instance of \w+| or object to extract fields from| after validation")  # its own words
LENGTH = "what is too long is refused here; /v2/embed cuts it with 'truncate'"
REFUSED = {  # fields of vLLM that would change a vector
    "chat_template": LAYOUT,
    "chat_template_kwargs": LAYOUT,
    "mm_processor_kwargs": LAYOUT,
    "media_io_kwargs": LAYOUT,
    "truncate_prompt_tokens": LENGTH,
    "truncation_side": LENGTH,
}


@dataclass(frozen=True)
class Limits:
    """What one request may ask for; more is an answer 400 or 413 that says so.

    Args:
        body_bytes: Of a request's body.
        depth: Brackets within brackets in its JSON.
        seconds: For reading a body, and again for answering it.
        items: Embedded by one request; every turn counts.
        turns: Of one conversation.
        images: In one request.
        characters: Of one text.
        tokens: Of one item, its images included.
        hits: Of one search.
        image: Of one image.
    """

    body_bytes: int = 64 * 2**20
    depth: int = 32
    seconds: float = 60.0
    items: int = 256
    turns: int = 64
    images: int = 64
    characters: int = 100_000
    tokens: int = 8192
    hits: int = 100
    image: ImageLimits = field(default_factory=ImageLimits)


class RequestError(MucoError):
    """A request that cannot be answered as it is.

    Args:
        param: The part of the request that is wrong.
    """

    def __init__(self, message: str, param: str | None = None, *, status: int = 400, code: str | None = None) -> None:
        super().__init__(message)
        self.param, self.status, self.code = param, status, code


class _Strict(BaseModel):
    """Null and an empty list mean "not given": clients send them for what their user left out."""

    model_config = ConfigDict(strict=True, extra="forbid", hide_input_in_errors=True)

    @model_validator(mode="before")
    @classmethod
    def _given(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        return {name: value for name, value in values.items() if value is not None and value != []}


# ---------------------------------------------------------------- parts
# Tags in <> say which form of a union was taken to be meant; an error message leaves them out.


def _form(**types: type) -> Discriminator:
    """The form whose type the value has; the last one where none fits, so that its error is the one shown."""

    def tag(value: Any) -> str:
        name = next((name for name, kind in types.items() if isinstance(value, kind)), [*types][-1])
        return f"<{name}>"

    return Discriminator(tag)


MANY = Field(fail_fast=True, min_length=1, max_length=4096)  # a server's own limits are smaller
Source = Annotated[
    str,
    StringConstraints(strip_whitespace=True),
    Field(description="A data:image/…;base64 URI; an http(s) URL where the server allows it."),
]


class ItemInput(_Strict):
    """A text, an image, images, or text and images fused into one vector."""

    text: str | None = None
    image: Source | None = None
    images: list[Source] = Field(default_factory=list, fail_fast=True, max_length=4096)


class TextPart(_Strict):
    type: Literal["text"]
    text: str


class ImageURL(_Strict):
    url: Source
    detail: str | None = Field(default=None, description="Accepted, without a meaning.")


class ImagePart(_Strict):
    type: Literal["image_url"]
    image_url: Annotated[
        Annotated[Source, Tag("<text>")] | Annotated[ImageURL, Tag("<object>")], _form(text=str, object=dict)
    ]


Part = Annotated[TextPart | ImagePart, Field(discriminator="type")]
Parts = Annotated[list[Part], MANY]
MessageContent = Annotated[
    Annotated[str, Tag("<text>")] | Annotated[Parts, Tag("<parts>")], _form(text=str, parts=list)
]


class Message(_Strict):
    """``system`` text is the instruction, ``user`` content is embedded, ``assistant`` content is empty."""

    role: Literal["system", "user", "assistant"]
    content: MessageContent = ""


def _flat(value: Any) -> Any:
    if not isinstance(value, list) or not value:
        return value
    nested = isinstance(value[0], list)
    if isinstance((value[0] or [None])[0] if nested else value[0], int):
        raise PydanticCustomError("token_ids", "token ids are not accepted; send text")
    if nested:
        raise PydanticCustomError("nested", "there is a list in the list; send one list of texts and items")
    return value


Entry = Annotated[
    Annotated[str, Tag("<text>")] | Annotated[ItemInput, Tag("<item>")],
    _form(text=str, item=dict),
]
Entries = Annotated[list[Entry], MANY]
Conversation = Annotated[list[Message], MANY]
Conversations = Annotated[list[Conversation], MANY]


def _one_or_many(value: Any) -> str:
    return "<conversations>" if isinstance(value, list) and value and isinstance(value[0], list) else "<conversation>"


# ---------------------------------------------------------------- requests


class VLLMOptions(_Strict):
    """What vLLM's embeddings take besides, with the values that change nothing here."""

    add_special_tokens: bool = Field(default=True, description="Without a meaning: the model's template has its own.")
    add_generation_prompt: bool = Field(default=False, description="After a user message, as is done here anyway.")
    continue_final_message: bool = Field(default=False, description="After an empty assistant message.")
    use_activation: Literal[True] = Field(default=True, description="Vectors have length 1.")
    padding: Literal["do_not_pad"] = "do_not_pad"
    embed_dtype: Literal["float32"] = "float32"
    endianness: Literal["native", "little"] = "little"
    priority: Literal[0] = 0
    request_id: str = Field(default="", description="Accepted, without a meaning.")
    cache_salt: str = Field(default="", description="Accepted, without a meaning.")


class EmbeddingsRequest(VLLMOptions):
    """OpenAI's shape, and vLLM's ``messages`` in place of ``input``."""

    model: str | None = None
    input: (
        Annotated[
            Annotated[str, Tag("<text>")] | Annotated[Entries, Tag("<list>")],
            _form(text=str, list=list),
            BeforeValidator(_flat),
        ]
        | None
    ) = Field(default=None, description="A text, or a list of texts and items.")
    messages: (
        Annotated[
            Annotated[Conversation, Tag("<conversation>")] | Annotated[Conversations, Tag("<conversations>")],
            Discriminator(_one_or_many),
        ]
        | None
    ) = Field(default=None, description="One conversation or a list of them, one vector each.")
    turns: Literal["isolated", "compounded"] | None = Field(
        default=None, description="Every user message gives a vector; images stand in the first."
    )
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = Field(default=None, ge=1, description="For models trained with loss.dimensions.")
    instruction: str | None = Field(default=None, description="Put before every text, on a line of its own.")
    input_type: str | None = Field(default=None, description="The name of an instruction of the server.")
    user: str | None = Field(default=None, description="Accepted, without a meaning.")


class CohereInput(_Strict):
    content: Parts


class EmbedRequest(_Strict):
    """Cohere's shape; exactly one of ``texts``, ``images`` and ``inputs``."""

    model: str | None = None
    input_type: str | None = None
    texts: Annotated[list[str], MANY] | None = None
    images: Annotated[list[Source], MANY] | None = None
    inputs: Annotated[list[CohereInput], MANY] | None = None
    embedding_types: list[EMBEDDING_TYPES] = Field(default=["float"], fail_fast=True, min_length=1, max_length=8)
    output_dimension: int | None = Field(default=None, ge=1)
    truncate: Literal["NONE", "START", "END"] = "END"


class SearchRequest(_Strict):
    """By text, image or both, or by ``like``, the id of a row."""

    text: str | None = None
    image: Source | None = None
    like: str | None = Field(default=None, min_length=1, max_length=4096)
    k: int = Field(default=10, ge=1, le=10_000)
    where: str | None = Field(default=None, max_length=2000, description="A filter on columns, e.g. colour = 'red'.")
    exact: bool = False
    instruction: str | None = None


# ---------------------------------------------------------------- requests -> items


@dataclass(frozen=True)
class Reader:
    """Reads requests for one server.

    Args:
        instructions: input_type -> instruction.
    """

    limits: Limits
    instructions: Mapping[str, str] = field(default_factory=dict)

    def embeddings(self, request: EmbeddingsRequest) -> list[Item]:
        if (request.input is None) == (request.messages is None):
            raise RequestError("give either 'input' or 'messages'; an empty list counts as not given", "input")
        for name in ("turns", "add_generation_prompt", "continue_final_message"):
            if getattr(request, name) and request.messages is None:
                raise RequestError(f"{name!r} belongs to 'messages'; with 'input' it has no meaning", name)
        instruction = self._instruction(request.instruction, request.input_type)
        if request.input is not None:
            entries = [request.input] if isinstance(request.input, str) else request.input
            items = [self._entry(entry, f"input[{n}]", instruction) for n, entry in enumerate(entries)]
        else:
            many: Any = request.messages if isinstance(request.messages[0], list) else [request.messages]
            for number, conversation in enumerate(many):
                _check_assistant(conversation, f"messages[{number}]", request)
            items = [self._conversation(c, f"messages[{n}]", instruction, request.turns) for n, c in enumerate(many)]
        return self._checked(items)

    def embed(self, request: EmbedRequest) -> list[Item]:
        given = [name for name in ("texts", "images", "inputs") if getattr(request, name) is not None]
        if len(given) != 1:
            message = "give exactly one of 'texts', 'images' and 'inputs'; an empty list counts as not given"
            raise RequestError(message, "texts")
        instruction = self._instruction(None, request.input_type)
        items = []
        for number, value in enumerate(getattr(request, given[0])):
            where = f"{given[0]}[{number}]"
            if given[0] == "inputs":
                items.append(self._item(*_parts(value.content), where, instruction))
            else:
                text, images = (value, []) if given[0] == "texts" else ("", [value])
                items.append(self._item(text, images, where, instruction))
        return [replace(item, truncate=request.truncate) for item in self._checked(items)]

    def search(self, request: SearchRequest) -> Item | None:
        """What to search by; None: the row ``like``."""
        asked = request.text or request.image
        if bool(asked) == (request.like is not None):
            raise RequestError("give 'text', 'image' or both, or 'like'", "text")
        if request.k > self.limits.hits:
            raise RequestError(f"at most {self.limits.hits} hits", "k")
        if not asked:
            return None
        images = [request.image] if request.image else []
        item = self._item(request.text or "", images, "query", request.instruction or "")
        return self._checked([item])[0]

    def _instruction(self, text: str | None, input_type: str | None) -> str:
        if input_type is None:
            return text or ""
        if text is not None:
            raise RequestError("give either 'instruction' or 'input_type'", "input_type")
        if input_type not in self.instructions and input_type not in COHERE_TYPES:
            known = ", ".join(sorted({*self.instructions, *COHERE_TYPES}))
            raise RequestError(f"unknown input_type; known are {known}", "input_type")
        return self.instructions.get(input_type, "")

    def _entry(self, entry: str | ItemInput, where: str, instruction: str) -> Item:
        if isinstance(entry, str):
            return self._item(entry, [], where, instruction)
        images = [*([entry.image] if entry.image is not None else []), *entry.images]
        return self._item(entry.text or "", images, where, instruction)

    def _item(self, text: str, images: Sequence[str], where: str, instruction: str) -> Item:
        if not text and not images:
            raise RequestError(f"{where}: nothing to embed; give text, an image or both", where)
        return Item((_instructed(text, instruction),), tuple(images), where=where)

    def _conversation(
        self, messages: Sequence[Message], where: str, instruction: str, turns: Literal["isolated", "compounded"] | None
    ) -> Item:
        system = [message for message in messages if message.role == "system"]
        user = [_parts(message.content) for message in messages if message.role == "user"]
        if system and (len(system) > 1 or messages[0].role != "system" or instruction):
            raise RequestError(f"{where}: one system message, at the beginning, is the instruction", where)
        if system:
            instruction, pictures = _parts(system[0].content)
            if pictures:
                raise RequestError(f"{where}: a system message holds text only", where)
        if not user:
            raise RequestError(f"{where}: no user message to embed", where)
        if turns is None:
            if len(user) > 1:
                raise RequestError(f"{where}: several user messages; for a vector each, set 'turns'", where)
            return self._item(*user[0], where, instruction)
        images = user[0][1]
        if any(others for _, others in user[1:]):
            raise RequestError(f"{where}: with 'turns', images stand in the first user message", where)
        if not images and not all(text for text, _ in user):
            raise RequestError(f"{where}: an empty user message, and no image that it could stand for", where)
        texts = tuple(_instructed(text, instruction) for text, _ in user)
        return Item(texts, tuple(images), turns, where=where)

    def _checked(self, items: list[Item]) -> list[Item]:
        limits = self.limits
        for name, count, most in (
            ("items", sum(len(item.texts) for item in items), limits.items),
            ("turns of a conversation", max(len(item.texts) for item in items), limits.turns),
            ("images", sum(len(item.images) for item in items), limits.images),
        ):
            if count > most:
                raise RequestError(f"{count} {name}; at most {most} in one request", code="too_many")
        for item in items:
            if max(map(len, item.texts)) > limits.characters:
                raise RequestError(f"{item.where}: a text of more than {limits.characters:,} characters", item.where)
            for image in item.images:
                try:
                    check_source(image, limits.image, item.where)
                except ImageError as error:
                    raise RequestError(str(error), item.where) from None
        return items


def _check_assistant(messages: Sequence[Message], where: str, request: VLLMOptions) -> None:
    """The model's layout ends in an open message of the assistant; anything else would be another vector."""
    for before, message in zip([None, *messages], messages, strict=False):
        if message.role != "assistant":
            continue
        if before is None or before.role != "user" or _parts(message.content) != ("", []):
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


def _parts(content: str | Sequence[TextPart | ImagePart]) -> tuple[str, list[str]]:
    """Text and images of a message, as the model's own chat template takes them: texts joined, images first."""
    if isinstance(content, str):
        return content, []
    texts = [part.text for part in content if isinstance(part, TextPart)]
    images = [part.image_url for part in content if isinstance(part, ImagePart)]
    return "".join(texts), [image if isinstance(image, str) else image.url for image in images]


def first_error(errors: Sequence[Mapping[str, Any]]) -> RequestError:
    """The first of pydantic's errors as a sentence that names the place, e.g. ``input[3].text``."""
    error = errors[0]
    place = ""
    for part in error["loc"]:
        if part == "body" or str(part).startswith("<"):
            continue
        place += f"[{part}]" if isinstance(part, int) else f".{part}"
    place = place.lstrip(".")[:120]
    if error["type"] == "json_invalid":
        return RequestError("the body is not valid JSON")
    if error["type"] == "extra_forbidden":
        why = REFUSED.get(place, "there is no such field")
        return RequestError(f"{place}: {why}", place, code="unknown_field")
    if error["type"] == "missing" and not place:
        return RequestError("the request has no body; send a JSON object")
    message = PYDANTIC.sub("", error["msg"]).replace("dictionary", "object")
    return RequestError(f"{place or 'the body'}: {message[:1].lower()}{message[1:]}", place or None)
