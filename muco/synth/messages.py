"""Messages in the form of OpenAI's chat protocol: texts, and images as data URIs."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from muco.dialogue import ImageLike

QUALITY = 92  # of the JPEG that is sent
IMAGE_LENGTH = 4000  # characters that an image counts as, where a server does not count tokens

Message = dict[str, Any]


def user(*parts: str | Message) -> Message:
    """A user's message of texts and of images as :func:`image_part` makes them."""
    if len(parts) == 1 and isinstance(parts[0], str):
        return {"role": "user", "content": parts[0]}  # the form that every server knows
    content = [{"type": "text", "text": part} if isinstance(part, str) else part for part in parts]
    return {"role": "user", "content": content}


def system(text: str) -> Message:
    return {"role": "system", "content": text}


def image_part(image: ImageLike, max_pixels: int) -> Message:
    """An image as a data URI: upright RGB, at most ``max_pixels`` pixels, JPEG, without metadata.

    Raises:
        ImageError: As :func:`muco.images.open_image`.
    """
    from muco.images import open_image, resize_to_budget

    buffer = io.BytesIO()
    resize_to_budget(open_image(image), max_pixels).save(buffer, "JPEG", quality=QUALITY, subsampling=0)
    encoded = base64.b64encode(buffer.getvalue()).decode("ascii")
    return {"type": "image_url", "image_url": {"url": f"data:image/jpeg;base64,{encoded}"}}


def trial(image: bool) -> Message:
    """A first question, which any model can answer, with an image or without."""
    if not image:
        return user("This is a test. Answer with a few words, as JSON where that is asked of you.")
    from PIL import Image

    return user(image_part(Image.new("RGB", (64, 64), "gray"), 64 * 64), "This is a test. Which colour is it?")


def response_format(schema: Mapping[str, Any]) -> dict[str, Any]:
    """The field of a request that holds the answer to a JSON schema."""
    return {"type": "json_schema", "json_schema": {"name": "answer", "strict": True, "schema": dict(schema)}}


def length(message: Message) -> int:
    """Characters of a message."""
    content = message["content"]
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    return sum(len(part["text"]) if part["type"] == "text" else IMAGE_LENGTH for part in parts)
