"""A chat-completions server that knows scenes: it describes their pictures, writes pairs from captions, and can fail.

    python tests/support/chat_server.py --scenes data/scenes --latency 0.05 --fault 500:7:1   # prints its URL as JSON

What it answers depends on the request alone, never on when it comes. Whether a fault strikes does so too: of all
requests one in ``every`` is chosen by its content, and is struck for the first ``times`` times that it arrives.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import hashlib
import io
import json
import math
import re
import sys
import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from muco.data import scenes
from muco.data.scenes import Scene, SceneObject

FOREVER = 1 << 30
REFUSAL = "I'm sorry, but I can't help with that."
HTML = b"<html><body><h1>502 Bad Gateway</h1></body></html>"
WORDS = {
    "invalid": '{"query_cls": "What is',
    "schema": '{"question": "What is it?", "answer": "a ring"}',
    "refusal": REFUSAL,
    "empty": "",
    "short": "red",
    "noise": "lorem ipsum dolor sit amet",
}
KEYS = {  # of the pairs, in the order of scenes.turns
    "cls": 0,
    "vqa_global1": 1,
    "vqa_global2": 2,
    "vqa_local1": 3,
    "vqa_local2": 4,
    "vqa_creative": 5,
    "retrieval": 6,
}
_OBJECT = re.compile(r"\ba (small|medium|large) (\w+) (\w+) at ((?:\w+ )?\w+)(?=,| and )")
_GROUND = re.compile(r"on a (\w+) (\w+) background")


@dataclass(frozen=True)
class Fault:
    """``kind``: 429, 500, 400, slow, cut, html, or one of ``WORDS``, which a model says that fails.

    Args:
        every: One request in so many is struck; 1 means all.
        times: So many times each; what the request's content or seed changes is another request.
        seconds: Of Retry-After, or of being slow.
        to: "caption", "pairs", "trial" or "" for all.
    """

    kind: str
    every: int = 1
    times: int = FOREVER
    seconds: float = 0.0
    to: str = ""


class ChatServer:
    """Serves on a thread of its own within ``with``; ``url`` is the base of its API.

    Args:
        folder: Scenes whose pictures it knows; any other picture is taken for a scene that its bytes choose.
        models: Names that it serves.
        latency: Seconds before every answer.
        structured: Whether it takes ``response_format``.
        lists_models: Whether it has /v1/models.
        sees: Whether it takes images.
        key: The API key that it asks for; refused ones it repeats, as careless servers do.
        capacity: More requests at once get 429.
        counts: Whether it says how many tokens were used.
        ranks: Whether it has /v1/rerank.
        tells_logprobs: Whether it gives log-probabilities where they are asked for.
        faults: What goes wrong.
    Attributes:
        log: (kind of request, content's digest, status) of every request, in order of arrival.
        most_at_once: The largest number of requests under way.
    """

    def __init__(
        self,
        folder: Path | None = None,
        *,
        models: Sequence[str] = ("seer", "scribe"),
        latency: float = 0.0,
        structured: bool = True,
        lists_models: bool = True,
        sees: bool = True,
        key: str = "",
        capacity: int = FOREVER,
        counts: bool = True,
        ranks: bool = True,
        tells_logprobs: bool = True,
        faults: Sequence[Fault] = (),
        port: int = 0,
    ) -> None:
        self.models, self.latency, self.structured, self.lists_models = tuple(models), latency, structured, lists_models
        self.sees, self.key, self.capacity, self.counts, self.faults = sees, key, capacity, counts, list(faults)
        self.port, self.ranks, self.tells_logprobs = port, ranks, tells_logprobs
        self.log: list[tuple[str, str, int]] = []
        self.bodies: list[dict[str, Any]] = []  # of requests, where keep_bodies is set
        self.keep_bodies = False
        self.most_at_once = self.at_once = 0
        self._arrivals: Counter[tuple[str, Fault]] = Counter()
        self._known, self._thumbnails = _scenes_of(folder) if folder else ([], np.zeros((0, 1)))
        self._ready = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def __enter__(self) -> ChatServer:
        self._thread = threading.Thread(target=lambda: asyncio.run(self.serve()), daemon=True)
        self._thread.start()
        assert self._ready.wait(300)
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(300)

    def asked(self, kind: str = "", status: int | None = None) -> int:
        return sum(kind in ("", k) and status in (None, s) for k, _, s in list(self.log))

    async def serve(self) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        connections: set[asyncio.Task[None]] = set()

        def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            task = asyncio.ensure_future(self._talk(reader, writer))
            connections.add(task)
            task.add_done_callback(connections.discard)

        server = await asyncio.start_server(connected, "127.0.0.1", self.port, limit=1 << 26, backlog=512)
        self.port = server.sockets[0].getsockname()[1]
        self._ready.set()
        await self._stop.wait()
        server.close()
        for task in list(connections):
            task.cancel()
        await asyncio.gather(*connections, return_exceptions=True)

    # ── HTTP ─────────────────────────────────────────────────────────────────────────────────────────────────────────

    async def _talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                request, *lines = head.decode("latin-1").split("\r\n")
                headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
                body = await reader.readexactly(int(headers.get("content-length", 0)))
                method, path, _ = request.split(" ")
                self.at_once += 1
                self.most_at_once = max(self.most_at_once, self.at_once)
                try:
                    status, content, extra = await self._answer(method, path, headers, body)
                finally:
                    self.at_once -= 1
                kind = "text/html" if content is HTML else "application/json"
                top = f"HTTP/1.1 {status} X\r\nContent-Type: {kind}\r\nContent-Length: {len(content)}\r\n{extra}\r\n"
                if status == 0:  # the connection is cut in the middle of an answer
                    writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 999\r\n\r\n{")
                    await writer.drain()
                    return
                writer.write(top.encode() + content)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass  # the client went
        finally:
            writer.close()

    async def _answer(self, method: str, path: str, headers: dict[str, str], body: bytes) -> tuple[int, bytes, str]:
        if self.key and headers.get("authorization") != f"Bearer {self.key}":
            return _error(401, f"bad key: {headers.get('authorization')}")
        if (method, path) == ("GET", "/v1/models") and self.lists_models:
            return 200, json.dumps({"object": "list", "data": [{"id": name} for name in self.models]}).encode(), ""
        ranked = path == "/v1/rerank" and self.ranks
        if method != "POST" or not (ranked or path == "/v1/chat/completions"):
            return _error(404, f"no route {method} {path}")
        request = json.loads(body)
        asked = [request.get("messages") or [request["query"], request["documents"]], request.get("seed")]
        digest = hashlib.sha256(json.dumps(asked).encode()).hexdigest()
        kind = _kind(request)
        if self.keep_bodies:
            self.bodies.append(request)
        fault = self._fault(kind, digest)
        if self.at_once > self.capacity:
            reply = _error(429, "too many at once", retry_after=0.05)
        else:
            await asyncio.sleep(self.latency + (fault.seconds if fault and fault.kind == "slow" else 0))
            reply = _broken(fault) or (self._ranking(request) if ranked else self._completion(request, fault))
        self.log.append((kind, digest, reply[0]))
        return reply

    def _fault(self, kind: str, digest: str) -> Fault | None:
        for number, fault in enumerate(self.faults):
            chosen = int(hashlib.sha256(f"{digest} {number}".encode()).hexdigest()[:8], 16)
            if fault.to not in ("", kind) or chosen % fault.every:
                continue
            self._arrivals[digest, fault] += 1
            if self._arrivals[digest, fault] <= fault.times:
                return fault
        return None

    def _completion(self, request: dict[str, Any], fault: Fault | None) -> tuple[int, bytes, str]:
        if request["model"] not in self.models:
            return _error(404, f"The model `{request['model']}` does not exist.")
        if "response_format" in request and not self.structured:
            return _error(400, "response_format is not supported")
        if _image(request) and not self.sees:
            return _error(400, "this model takes no images")
        text = WORDS[fault.kind] if fault and fault.kind in WORDS else self._text(request)
        message = {"role": "assistant", "content": text}
        choice: dict[str, Any] = {"index": 0, "message": message, "finish_reason": "stop"}
        if request.get("logprobs") and self.tells_logprobs:
            choice["logprobs"] = {"content": [_first_token(_judged(request))]}
        value: dict[str, Any] = {
            "id": "1",
            "object": "chat.completion",
            "created": 1,
            "model": request["model"],
            "choices": [choice],
        }
        if self.counts:
            value["usage"] = {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110}
        return 200, json.dumps(value).encode(), ""

    def _ranking(self, request: dict[str, Any]) -> tuple[int, bytes, str]:
        if request["model"] not in self.models:
            return _error(404, f"The model `{request['model']}` does not exist.")
        documents = [_said(document) for document in request["documents"]]
        scores = [likeness(_said(request["query"]), document) for document in documents]
        ranked = [
            {"index": n, "relevance_score": scores[n]} for n in sorted(range(len(scores)), key=lambda n: -scores[n])
        ]
        value = {"id": "1", "results": ranked, "usage": {"total_tokens": 50}} if self.counts else {"results": ranked}
        return 200, json.dumps(value).encode(), ""

    # ── what it knows ────────────────────────────────────────────────────────────────────────────────────────────────

    def _text(self, request: dict[str, Any]) -> str:
        uri = _image(request)
        if uri is not None:
            return scenes.caption(self._seen(uri))
        words = _words(request)
        scene = parse(words)
        if scene is None:
            return "Yes."
        schema = request.get("response_format", {}).get("json_schema", {}).get("schema", {})
        wanted = [*schema.get("properties", {})] or [
            *dict.fromkeys(re.findall(r"\b(?:\w+_)?answer_\w+|\bquery_\w+", words))
        ]
        pairs = pairs_of(scene, int(request.get("seed") or 0))
        return json.dumps({name: pairs[name] for name in wanted if name in pairs})

    def _seen(self, uri: str) -> Scene:
        data = base64.b64decode(uri.partition("base64,")[2], validate=True)
        digest = int.from_bytes(hashlib.sha256(data).digest()[:4])
        if not self._known:
            return scenes.describe(1, digest)
        distances = np.abs(self._thumbnails - _thumbnail(Image.open(io.BytesIO(data)))).mean(1)
        nearest = int(distances.argmin())
        return self._known[nearest] if distances[nearest] < 6 else scenes.describe(1, digest)


def pairs_of(scene: Scene, seed: int) -> dict[str, str]:
    """Good pairs about a scene; the seed chooses the wording."""
    made: dict[str, str] = {}
    for name, number in KEYS.items():
        turn = scenes.turns(scene)[number]
        made[f"query_{name}"] = turn.query[seed % len(turn.query)].text
        if name != "retrieval":
            made[f"answer_{name}"] = turn.target[0].text
    others = (scenes.turns(scenes.describe(2, number))[0].target[0].text for number in range(100))
    made["negative_answer_cls"] = next(other for other in others if other != made["answer_cls"])
    return made


def likeness(one: str, other: str) -> float:
    """What it takes two texts for, 0 to 1: the share of words that they have in common."""
    words = [set(re.findall(r"\w+", text.lower())) for text in (one, other)]
    return max(0.01, min(0.99, len(words[0] & words[1]) / max(1, len(words[0] | words[1]))))


def _said(value: Any) -> str:
    """The texts of what is ranked, and "picture" for an image."""
    parts = [{"type": "text", "text": value}] if isinstance(value, str) else value["content"]
    return " ".join(part["text"] if part["type"] == "text" else "picture" for part in parts)


def _judged(request: dict[str, Any]) -> float:
    said = " ".join(part["text"] if part["type"] == "text" else "picture" for part in _parts(request))
    found = re.fullmatch(r"Query: (.*) Candidate: (.*) Does .*", said, re.DOTALL)
    return likeness(found[1], found[2]) if found else 0.5


def _first_token(share: float) -> dict[str, Any]:
    """Log-probabilities of which yes, in two spellings, has a share of nine tenths, and something else the rest."""
    spellings = {"Yes": 0.8 * share, " yes": 0.2 * share, "No": 1 - share}
    listed = [{"token": token, "logprob": math.log(0.9 * part)} for token, part in spellings.items()]
    listed.append({"token": "Maybe", "logprob": math.log(0.1)})
    return {**listed[0], "top_logprobs": listed}


def parse(text: str) -> Scene | None:
    """The scene that a caption within the text describes."""
    objects, ground = _OBJECT.findall(text.replace("A ", "a ")), _GROUND.search(text)
    if not objects or ground is None:
        return None
    cells = {name: number for number, name in enumerate(scenes.CELLS)}
    things = tuple(SceneObject(color, shape, size, cells[place]) for size, color, shape, place in objects)
    return Scene(things, background=ground[2], texture=ground[1])


def _scenes_of(folder: Path) -> tuple[list[Scene], np.ndarray]:
    known, thumbnails = [], []
    for file in (folder / f"{split}.jsonl" for split in scenes.SPLITS):
        for line in file.read_text().splitlines():
            row = json.loads(line)
            scene = parse(row["turns"][-1]["target"])
            assert scene is not None
            known.append(scene)
            thumbnails.append(_thumbnail(Image.open(folder / row["image"])))
    return known, np.array(thumbnails)


def _thumbnail(image: Image.Image) -> np.ndarray:
    return np.asarray(image.convert("RGB").resize((24, 24), Image.Resampling.BOX), dtype=np.float32).reshape(-1)


# ── requests ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def _kind(request: dict[str, Any]) -> str:
    if "documents" in request:
        return "trial" if "This is a test." in request["documents"] else "rerank"
    if "This is a test." not in _words(request) and request.get("logprobs"):
        return "judge"
    if "This is a test." in _words(request):
        return "trial"
    return "caption" if _image(request) else "pairs"


def _parts(request: dict[str, Any]) -> list[dict[str, Any]]:
    contents = [message["content"] for message in request["messages"]]
    return [p for c in contents for p in ([{"type": "text", "text": c}] if isinstance(c, str) else c)]


def _words(request: dict[str, Any]) -> str:
    return "\n".join(part["text"] for part in _parts(request) if part["type"] == "text")


def _image(request: dict[str, Any]) -> str | None:
    return next((part["image_url"]["url"] for part in _parts(request) if part["type"] == "image_url"), None)


# ── faults ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def _error(status: int, message: str, retry_after: float | None = None) -> tuple[int, bytes, str]:
    extra = "" if retry_after is None else f"Retry-After: {retry_after:g}\r\n"
    return status, json.dumps({"error": {"message": message, "type": "error"}}).encode(), extra


def _broken(fault: Fault | None) -> tuple[int, bytes, str] | None:
    """An answer that is none."""
    if fault is None:
        return None
    if fault.kind == "429":
        return _error(429, "slow down", retry_after=fault.seconds)
    if fault.kind in ("500", "400"):
        return _error(int(fault.kind), "out of order")
    return {"cut": (0, b"", ""), "html": (200, HTML, "")}.get(fault.kind)


def _fault_option(text: str) -> Fault:
    """KIND[:EVERY[:TIMES[:SECONDS]]]"""
    kind, *rest = text.split(":")
    every, times, seconds = (*rest, *("1", str(FOREVER), "0")[len(rest) :])
    return Fault(kind, int(every), int(times), float(seconds))


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", type=Path, help="folder of scenes that it knows")
    parser.add_argument("--latency", type=float, default=0.0, help="seconds before every answer")
    parser.add_argument("--fault", type=_fault_option, action="append", default=[], help=_fault_option.__doc__)
    parser.add_argument("--port", type=int, default=0)
    args = parser.parse_args(argv)
    server = ChatServer(args.scenes, latency=args.latency, faults=args.fault, port=args.port)
    with server:
        print(json.dumps({"url": server.url}), flush=True)
        threading.Event().wait()


if __name__ == "__main__":
    main(sys.argv[1:])
