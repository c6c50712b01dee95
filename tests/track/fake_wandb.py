"""A server that answers the requests of the wandb library, as far as a run needs them."""

from __future__ import annotations

import gzip
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class FakeWandb(ThreadingHTTPServer):
    """The history of a single run, whose lines a client places by their offset."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Answer)
        self.run: str | None = None
        self.history: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    @property
    def steps(self) -> list[int]:
        return [json.loads(line)["_step"] for line in self.history]

    def graphql(self, name: str, variables: dict[str, Any]) -> dict[str, Any]:
        place = {"id": "p", "name": "project", "entity": {"id": "e", "name": "entity"}}
        viewer = {"id": "v", "entity": "entity", "username": "u", "flags": "{}", "teams": {"edges": []}}
        bucket = {"id": "UnVu", "name": self.run, "displayName": "n", "config": "{}"}
        match name:
            case "RunResumeStatus":
                last = self.history[-1:]
                counts = {"logLineCount": 0, "historyLineCount": len(self.history), "eventsLineCount": 0}
                tails = {
                    "historyTail": json.dumps(last),
                    "eventsTail": "[]",
                    "summaryMetrics": last[0] if last else "{}",
                }
                known = bucket | counts | tails | {"tags": [], "wandbConfig": '{"t": 1}'}
                return {"model": {**place, "bucket": known if self.run else None}}
            case "UpsertBucket":
                self.run = self.run or variables["name"]
                return {"upsertBucket": {"bucket": bucket | {"name": self.run, "project": place}, "inserted": False}}
            case "CreateRunFiles":
                files = [{"name": file, "uploadUrl": f"{self.url}/upload"} for file in variables["files"]]
                return {"createRunFiles": {"runID": "UnVu", "uploadHeaders": [], "files": files}}
            case "ServerInfo":
                return {"viewer": viewer, "serverInfo": {"cliVersionInfo": {}, "latestLocalVersionInfo": None}}
            case "Viewer":
                return {"viewer": viewer}
        return {}


class _Answer(BaseHTTPRequestHandler):
    server: FakeWandb

    def log_message(self, format: str, *args: Any) -> None:
        """Print nothing."""

    def do_GET(self) -> None:
        self._send({})

    def do_PUT(self) -> None:
        self._body()
        self._send({})

    def do_POST(self) -> None:
        body = json.loads(self._body() or b"{}")
        if self.path == "/graphql":
            name = re.search(r"(?:query|mutation)\s+(\w+)", body["query"])
            self._send({"data": self.server.graphql(name[1] if name else "", body.get("variables") or {})})
            return
        for file, chunk in (body.get("files") or {}).items():
            if "history" in file:
                self.server.history[chunk.get("offset", 0) :] = chunk["content"]
        self._send({"exitcode": None, "limits": {}})

    def _body(self) -> bytes:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        return gzip.decompress(body) if self.headers.get("Content-Encoding") == "gzip" else body

    def _send(self, value: dict[str, Any]) -> None:
        body = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@contextmanager
def fake_wandb() -> Iterator[FakeWandb]:
    with FakeWandb() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()
