"""A Hugging Face Hub on this machine: what an upload asks for, of one repository, with large files as LFS objects.

Clients need HF_HUB_DISABLE_XET=1: the other way of sending large files is no plain HTTP.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "hf_good"


class Hub:
    """The state of the repository, and what was asked."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.objects: dict[str, bytes] = {}
        self.commits: list[str] = []
        self.created: list[dict[str, Any]] = []
        self.uploads: list[str] = []
        self.fail_commits = 0
        self.url = ""

    def commit(self, lines: list[dict[str, Any]]) -> None:
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                self.files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                self.files[value["path"]] = self.objects[value["oid"]]
            elif line["key"] == "deletedFile":
                del self.files[value["path"]]
        self.commits.append(hashlib.sha1(str(len(self.commits)).encode()).hexdigest())


class _Handler(BaseHTTPRequestHandler):
    hub: Hub

    def log_message(self, *args: Any) -> None: ...

    def _answer(self, value: Any, status: int = 200) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        if "/tree/" in self.path:
            tree = [{"type": "file", "path": p, "size": len(c), "oid": "0" * 40} for p, c in self.hub.files.items()]
            return self._answer(tree)
        self._answer({"id": "org/name", "sha": "0" * 40, "private": True, "siblings": []})

    def do_PUT(self) -> None:
        oid = self.path.rsplit("/", 1)[1]
        self.hub.objects[oid] = self.rfile.read(int(self.headers["Content-Length"]))
        assert hashlib.sha256(self.hub.objects[oid]).hexdigest() == oid
        self.hub.uploads.append(oid)
        self._answer({})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._answer({"error": "You may not write here"}, 403)
        if self.path == "/api/repos/create":
            self.hub.created.append(json.loads(body))
            return self._answer({"url": f"{self.hub.url}/org/name", "id": "org/name"})
        if "/preupload/" in self.path:
            files = json.loads(body)["files"]
            modes = [{"path": f["path"], "uploadMode": "lfs" if ".safetensors" in f["path"] else "regular",
                      "shouldIgnore": False} for f in files]  # fmt: skip
            return self._answer({"files": modes})
        if self.path.endswith("/objects/batch"):
            objects = [self._object(o) for o in json.loads(body)["objects"]]
            return self._answer({"transfer": "basic", "objects": objects})
        if "/commit/" in self.path:
            if self.hub.fail_commits:
                self.hub.fail_commits -= 1
                return self._answer({"error": "busy"}, 520)  # which the library does not try again
            self.hub.commit([json.loads(line) for line in body.splitlines() if line.strip()])
            oid = self.hub.commits[-1]
            url = f"{self.hub.url}/org/name/commit/{oid}"
            return self._answer({"commitUrl": url, "commitOid": oid, "success": True})
        self._answer({})

    def _object(self, asked: dict[str, Any]) -> dict[str, Any]:
        known = asked["oid"] in self.hub.objects
        actions = {} if known else {"actions": {"upload": {"href": f"{self.hub.url}/put/{asked['oid']}"}}}
        return {"oid": asked["oid"], "size": asked["size"], **actions}


@contextmanager
def hub() -> Iterator[Hub]:
    """Serve a Hub for the body."""
    state = Hub()
    handler = type("Handler", (_Handler,), {"hub": state})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    state.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
