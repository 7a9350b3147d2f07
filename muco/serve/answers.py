"""Answers as they are, for the description at /openapi.json; routes.py and guard.py write them, without these classes.

``tests/serve/test_serve_description.py`` compares the two.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, Field

Floats = list[list[float]]
Integers = list[list[int]]


class TokenDetails(BaseModel):
    text_tokens: int
    image_tokens: int


class Usage(BaseModel):
    prompt_tokens: int
    total_tokens: int
    prompt_tokens_details: TokenDetails


class Embedding(BaseModel):
    object: Literal["embedding"]
    index: int
    embedding: list[float] | str = Field(description="A vector of length 1; in base64 its little-endian float32.")


class EmbeddingsAnswer(BaseModel):
    """OpenAI's shape."""

    object: Literal["list"]
    data: list[Embedding]
    model: str
    usage: Usage


class EmbeddingsByType(BaseModel):
    """The vectors in each of the ``embedding_types`` that were asked for; other types are absent."""

    floats: Floats = Field(default_factory=list, alias="float")
    int8: Integers = Field(default_factory=list, description="Each scaled to ±127: compare by cosine.")
    binary: Integers = Field(default_factory=list, description="As ubinary, minus 128.")
    ubinary: Integers = Field(default_factory=list, description="One bit per dimension, eight to a byte.")
    base64: list[str] = Field(default_factory=list, description="Little-endian float32.")


class ApiVersion(BaseModel):
    version: str


class BilledUnits(BaseModel):
    input_tokens: int
    images: int


class EmbedMeta(BaseModel):
    api_version: ApiVersion
    billed_units: BilledUnits


class EmbedAnswer(BaseModel):
    """Cohere's shape."""

    id: str
    embeddings: EmbeddingsByType
    texts: list[str] = Field(description="Those of the request.")
    meta: EmbedMeta
    response_type: Literal["embeddings_by_type"]


class EmbedFirstAnswer(BaseModel):
    """Cohere's first shape; without ``embedding_types`` in the request there is one list of vectors."""

    id: str
    embeddings: Floats | EmbeddingsByType
    texts: list[str]
    meta: EmbedMeta
    response_type: Literal["embeddings_floats", "embeddings_by_type"]


class ModelFacts(BaseModel):
    id: str
    object: Literal["model"]
    created: int = Field(description="When the server was started, in seconds since 1970.")
    owned_by: str
    dimension: int
    dimensions: list[int] = Field(description="Lengths that its vectors may have.")
    input_types: list[str] = Field(description="Names of the server's instructions.")
    max_tokens: int = Field(description="Of one item.")
    max_items: int = Field(description="Of one request.")


class ModelsAnswer(BaseModel):
    object: Literal["list"]
    data: list[ModelFacts]


class HealthAnswer(BaseModel):
    status: Literal["ok"]


class FoundRow(BaseModel):
    id: str
    score: float = Field(ge=-1, le=1, description="A cosine.")
    text: str | None
    thumbnail: str | None = Field(description="A data:image/jpeg;base64 URI.")
    extra: dict[str, Any] = Field(description="The further columns of the index.")


class SearchAnswer(BaseModel):
    """The nearest rows, best first."""

    hits: list[FoundRow]


class ErrorFacts(BaseModel):
    message: str
    type: Literal["invalid_request_error", "server_error"]
    param: str | None = Field(description="The part of the request that is wrong.")
    code: str | None


class ErrorAnswer(BaseModel):
    """OpenAI's shape, and ``message`` once more for clients of Cohere."""

    error: ErrorFacts
    message: str
