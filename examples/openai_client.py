"""Ranks texts for an image with the stock OpenAI client and a running `muco serve`; muco itself is not imported.

    muco serve --model starter
    python examples/openai_client.py ring.jpg "a red ring" "a blue mug" --base-url http://127.0.0.1:8000/v1

Texts go as strings, the image as an item with a data URI, and a question about it is fused with it by --question.
"""

import argparse
import base64
import mimetypes
import os
import sys
from pathlib import Path

import numpy as np
import openai


def data_uri(path: Path) -> str:
    kind = mimetypes.guess_type(path.name)[0] or "image/png"  # the server looks at the bytes
    return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"


def embed(client: openai.OpenAI, model: str, items: list, encoding: str) -> np.ndarray:
    """float32 [n, d], rows of length 1; the client decodes base64 only where it asked for it by itself."""
    answer = client.embeddings.create(model=model, input=items, encoding_format=encoding)
    numbers = [row.embedding for row in answer.data]
    if encoding == "base64":
        numbers = [np.frombuffer(base64.b64decode(text), dtype="<f4") for text in numbers]
    print(f"{len(items)} vectors as {encoding}, {answer.usage.prompt_tokens} tokens", file=sys.stderr)
    return np.array(numbers, dtype=np.float32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("image", type=Path)
    parser.add_argument("texts", nargs="+", metavar="text")
    parser.add_argument("--question", default="", help="asked about the image; it and the image give one vector")
    parser.add_argument("--base-url", default="http://127.0.0.1:8000/v1", help="(default: %(default)s)")
    args = parser.parse_args()
    item = {"image": data_uri(args.image)} | ({"text": args.question} if args.question else {})
    with openai.OpenAI(base_url=args.base_url, api_key=os.environ.get("MUCO_SERVE_TOKEN", "none")) as client:
        model = client.models.list().data[0].id
        texts = embed(client, model, args.texts, "base64")  # fewer bytes than "float"
        scores = texts @ embed(client, model, [item], "float")[0]  # cosines
    for i in np.argsort(-scores, kind="stable"):
        print(f"{scores[i]:.4f}  {args.texts[i]}")


if __name__ == "__main__":
    try:
        main()
    except openai.APIError as error:
        sys.exit(f"error: {error.request.url}: {error}")
    except OSError as error:
        sys.exit(f"error: {error}")
