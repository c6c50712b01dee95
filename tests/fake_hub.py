"""A server that answers the requests of huggingface_hub for an upload, as the hub does.

Keeps repositories and large files in memory. Large files are safetensors, all others are sent
within the commit.
"""

from __future__ import annotations

import base64
import json
import re
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "hf_right"


@dataclass
class Hub:
    """The content of the hub, and a log of the requests."""

    address: str = ""
    repositories: dict[str, dict[str, bytes]] = field(default_factory=dict)
    """Name of a repository -> content of its files by path."""
    private: dict[str, bool] = field(default_factory=dict)
    large: dict[str, bytes] = field(default_factory=dict)
    """Content of the large files that arrived, by SHA-256."""
    commits: list[str] = field(default_factory=list)
    """Message of each commit."""
    requests: list[str] = field(default_factory=list)
    breaks_at: str = ""
    """Part of a path at which the connection breaks."""
    hangs_at: str = ""
    """Part of a path at which no answer comes."""
    forbidden: str = ""
    """Organisation in which the token may not write."""
    hung: threading.Event = field(default_factory=threading.Event)
    """Set when a request hangs."""


@contextmanager
def running(hub: Hub) -> Iterator[Hub]:
    """Serve the hub at `hub.address`."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._answer(b"")

    def do_POST(self) -> None:
        self._answer(self.rfile.read(int(self.headers.get("Content-Length", "0"))))

    def do_PUT(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", "0")))
        self._answer(body)

    def _answer(self, body: bytes) -> None:
        hub, path = self.hub, self.path.partition("?")[0]
        hub.requests.append(f"{self.command} {path}")
        if hub.hangs_at and hub.hangs_at in path:
            hub.hung.set()
            threading.Event().wait()
        if hub.breaks_at and hub.breaks_at in path:
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        if path.startswith("/large/"):
            hub.large[path.removeprefix("/large/")] = body
            self._send(200, {})
        elif self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._send(401, {"error": "Invalid username or password."})
        else:
            self._send(*self._route(path, body))

    def _route(self, path: str, body: bytes) -> tuple[int, Any]:
        hub = self.hub
        if path == "/api/whoami-v2":
            return 200, {"type": "user", "name": "somebody", "auth": {"accessToken": {"role": "write"}}}
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            if asked["organization"] == hub.forbidden:
                return 403, {"error": f"You don't have the rights to create a model under {hub.forbidden}"}
            code = 409 if name in hub.repositories else 200
            hub.repositories.setdefault(name, {".gitattributes": b""})
            hub.private.setdefault(name, bool(asked.get("private") or asked.get("visibility") == "private"))
            return code, {"url": f"{hub.address}/{name}"}
        if found := re.fullmatch(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
            return 200, {"transfer": "basic", "objects": [self._place(item) for item in json.loads(body)["objects"]]}
        found = re.fullmatch(r"/api/models/([^/]+/[^/]+)(/.*)?", path)
        if not found or found[1] not in hub.repositories:
            return 404, {"error": "Repository not found"}
        return self._of_repository(found[1], found[2] or "", body)

    def _place(self, item: dict[str, Any]) -> dict[str, Any]:
        if item["oid"] in self.hub.large:
            return item
        return item | {"actions": {"upload": {"href": f"{self.hub.address}/large/{item['oid']}", "header": {}}}}

    def _of_repository(self, name: str, rest: str, body: bytes) -> tuple[int, Any]:
        hub = self.hub
        files = hub.repositories[name]
        if rest.startswith("/preupload/"):
            modes = [
                {
                    "path": item["path"],
                    "uploadMode": "lfs" if item["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                    "oid": None,
                }
                for item in json.loads(body)["files"]
            ]
            return 200, {"files": modes}
        if rest.startswith("/commit/"):
            for line in map(json.loads, body.splitlines()):
                match line:
                    case {"key": "header", "value": value}:
                        hub.commits.append(value["summary"])
                    case {"key": "file", "value": value}:
                        files[value["path"]] = base64.b64decode(value["content"])
                    case {"key": "deletedFile", "value": value}:
                        del files[value["path"]]
                    case {"key": "lfsFile", "value": value}:
                        files[value["path"]] = hub.large[value["oid"]]
            oid = f"{len(hub.commits):040x}"
            return 200, {"success": True, "commitOid": oid, "commitUrl": f"{hub.address}/{name}/commit/{oid}"}
        if rest.startswith("/tree/"):
            entries = [
                {"type": "file", "path": path, "size": len(data), "oid": "0" * 40} for path, data in files.items()
            ]
            return 200, entries
        siblings = [{"rfilename": path} for path in files]
        return 200, {"id": name, "modelId": name, "sha": "0" * 40, "siblings": siblings, "private": hub.private[name]}

    def _send(self, code: int, value: Any) -> None:
        body = json.dumps(value).encode()
        self.send_response(code)
        if code == 404:
            self.send_header("X-Error-Code", "RepoNotFound")
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
