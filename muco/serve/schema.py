"""Requests as they may come. A field that is not documented is refused by name."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
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

from muco.errors import MucoError
from muco.serve.images import ImageLimits

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
class RequestLimits:
    """What one request may ask for; more is an answer 400 or 413 that says so."""

    body_bytes: int = 64 * 2**20
    depth: int = 32  # brackets within brackets in its JSON
    seconds: float = 60.0  # for reading a body, and again for answering it
    items: int = 256  # embedded; every turn counts
    turns: int = 64  # of one conversation
    images: int = 64
    characters: int = 100_000  # of one text
    tokens: int = 8192  # of one item, its images included
    hits: int = 100  # of one search
    image: ImageLimits = field(default_factory=ImageLimits)


class RequestError(MucoError):
    """A request that cannot be answered as it is; ``param`` is the part of it that is wrong."""

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


# Tags in <> say which form of a union was taken to be meant; an error message leaves them out.


def _form(**types: type) -> Discriminator:
    """The form whose type the value has; the last one where none fits, so that its error is the one shown."""

    def tag(value: Any) -> str:
        name = next((name for name, kind in types.items() if isinstance(value, kind)), [*types][-1])
        return f"<{name}>"

    return Discriminator(tag)


MANY = Field(fail_fast=True, min_length=1, max_length=4096)  # a server's own limits are smaller
ImageSource = Annotated[
    str,
    StringConstraints(strip_whitespace=True),
    Field(description="A data:image/…;base64 URI; an http(s) URL where the server allows it."),
]


VideoFrames = Annotated[
    list[ImageSource], Field(fail_fast=True, max_length=4096, description="The frames of one video, in order.")
]
FrameRate = Annotated[
    float, Field(gt=0, allow_inf_nan=False, description="Frames per second of a video; 2 if not given.")
]


class ItemInput(_Strict):
    """A text, an image, images or a video, or several of these fused into one vector."""

    text: str | None = None
    image: ImageSource | None = None
    images: list[ImageSource] = Field(default_factory=list, fail_fast=True, max_length=4096)
    video: VideoFrames = []
    fps: FrameRate | None = None


class TextPart(_Strict):
    type: Literal["text"]
    text: str


class ImageURL(_Strict):
    url: ImageSource
    detail: str | None = Field(default=None, description="Accepted, without a meaning.")


class ImagePart(_Strict):
    type: Literal["image_url"]
    image_url: Annotated[
        Annotated[ImageSource, Tag("<text>")] | Annotated[ImageURL, Tag("<object>")], _form(text=str, object=dict)
    ]


class VideoPart(_Strict):
    type: Literal["video"]
    video: Annotated[VideoFrames, Field(min_length=1)]
    fps: FrameRate | None = None


Part = Annotated[TextPart | ImagePart | VideoPart, Field(discriminator="type")]
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


Entry = Annotated[Annotated[str, Tag("<text>")] | Annotated[ItemInput, Tag("<item>")], _form(text=str, item=dict)]
Entries = Annotated[list[Entry], MANY]
Conversation = Annotated[list[Message], MANY]
Conversations = Annotated[list[Conversation], MANY]


def _one_or_many(value: Any) -> str:
    return "<conversations>" if isinstance(value, list) and value and isinstance(value[0], list) else "<conversation>"


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
        default=None, description="Every user message gives a vector; images are in the first."
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
    images: Annotated[list[ImageSource], MANY] | None = None
    inputs: Annotated[list[CohereInput], MANY] | None = None
    embedding_types: list[EMBEDDING_TYPES] = Field(default=["float"], fail_fast=True, min_length=1, max_length=8)
    output_dimension: int | None = Field(default=None, ge=1)
    truncate: Literal["NONE", "START", "END"] = "END"


class SearchRequest(_Strict):
    """By text, image, video or several of these, or by ``like``, the id of a row."""

    text: str | None = None
    image: ImageSource | None = None
    video: VideoFrames = []
    fps: FrameRate | None = None
    like: str | None = Field(default=None, min_length=1, max_length=4096)
    k: int = Field(default=10, ge=1, le=10_000)
    where: str | None = Field(default=None, max_length=2000, description="A filter on columns, e.g. colour = 'red'.")
    exact: bool = False
    instruction: str | None = None


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
        why = REFUSED.get(place, "unknown field")
        return RequestError(f"{place}: {why}", place, code="unknown_field")
    if error["type"] == "missing" and not place:
        return RequestError("the request has no body; send a JSON object")
    message = PYDANTIC.sub("", error["msg"]).replace("dictionary", "object")
    return RequestError(f"{place or 'the body'}: {message[:1].lower()}{message[1:]}", place or None)
