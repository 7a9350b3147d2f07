"""The part of a Hugging Face hub that takes uploads of models: repositories are dictionaries in memory."""

from __future__ import annotations

import base64
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class HubServer:
    """Serves on a thread within ``with``. Weights come as large files, all else within the commit.

    Attributes:
        files: Of every repository, the content by path.
        private: Of every repository.
        tokens: That came with requests.
    """

    def __init__(self) -> None:
        self.files: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.tokens: set[str] = set()
        self._large: dict[str, bytes] = {}
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                self._answer(hub._post(self.path, self._body()))

            def do_PUT(self) -> None:
                hub._large[self.path.removeprefix("/large/")] = self._body()
                self._answer({})

            def _body(self) -> bytes:
                hub.tokens.add(self.headers.get("Authorization", ""))
                return self.rfile.read(int(self.headers.get("Content-Length", 0)))

            def _answer(self, value: dict[str, Any] | None) -> None:
                content = json.dumps(value or {"error": "no such route"}).encode()
                self.send_response(200 if value is not None else 404)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_: object) -> None:
                return

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> HubServer:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def _post(self, path: str, body: bytes) -> dict[str, Any] | None:
        if path == "/api/validate-yaml":
            return {"errors": [], "warnings": []}
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else asked["name"]
            self.files.setdefault(name, {})
            self.private.setdefault(name, asked.get("visibility") == "private")
            return {"url": f"{self.url}/{name}", "name": name}
        if found := re.fullmatch(r"/api/models/(.+)/(preupload|commit)/main", path):
            return self._preupload(body) if found[2] == "preupload" else self._commit(found[1], body)
        return self._large_files(body) if path.endswith("/objects/batch") else None

    def _preupload(self, body: bytes) -> dict[str, Any]:
        names = [file["path"] for file in json.loads(body)["files"]]
        modes = ("lfs" if name.endswith(".safetensors") else "regular" for name in names)
        return {
            "files": [{"path": n, "uploadMode": m, "shouldIgnore": False} for n, m in zip(names, modes, strict=True)]
        }

    def _large_files(self, body: bytes) -> dict[str, Any]:
        objects = json.loads(body)["objects"]
        return {
            "transfer": "basic",
            "objects": [o | {"actions": {"upload": {"href": f"{self.url}/large/{o['oid']}"}}} for o in objects],
        }

    def _commit(self, name: str, body: bytes) -> dict[str, Any]:
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                self.files[name][value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                self.files[name][value["path"]] = self._large[value["oid"]]
        return {"commitUrl": f"{self.url}/{name}/commit/1", "commitOid": "1", "success": True}
