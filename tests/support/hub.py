"""A Hugging Face Hub on this machine: what uploads and downloads ask for, of one repository, large files in LFS.

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
        self.history: dict[str, dict[str, bytes]] = {}
        """Files by commit, for downloads; `files` is what an upload changes."""
        self.branches: dict[str, str] = {}
        self.refusal: tuple[int, str] | None = None
        """Status and code with which every download is refused, unless it comes with the token."""
        self.downloads: list[str] = []
        self.requests = 0

    def publish(self, files: dict[str, bytes], branch: str = "main") -> str:
        """Make a commit of these files, which a branch then is, and return it."""
        commit = hashlib.sha1(f"{branch} {len(self.history)}".encode()).hexdigest()
        self.history[commit], self.branches[branch] = files, commit
        return commit

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


def described(name: str, content: bytes) -> dict[str, Any]:
    """What the Hub tells of a file."""
    oid = hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()
    lfs = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}
    large = {"lfs": lfs | {"sha256": lfs["oid"]}} if ".safetensors" in name and "index" not in name else {}
    return {"type": "file", "path": name, "size": len(content), "oid": oid} | large


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

    def do_HEAD(self) -> None:
        self._resolve(*self._place())

    def _place(self) -> list[str]:
        """Commit or branch, and file, of a path."""
        *_, revision, name = self.path.split("?")[0].split("/", 5)
        return [revision, name]

    def _refused(self, status: int, code: str) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", f"the stand-in says {code}")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _commit(self, revision: str) -> str | None:
        """The commit that is asked for, None when the answer is given."""
        self.hub.requests += 1
        commit = self.hub.branches.get(revision, revision)
        if self.hub.refusal and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._refused(*self.hub.refusal)
        elif commit not in self.hub.history:
            self._refused(404, "RevisionNotFound")
        else:
            return commit
        return None

    def _resolve(self, revision: str, name: str) -> None:
        if (commit := self._commit(revision)) is None:
            return None
        if (content := self.hub.history[commit].get(name)) is None:
            return self._refused(404, "EntryNotFound")
        self.send_response(200)
        self.send_header("X-Repo-Commit", commit)
        self.send_header("ETag", f'"{described(name, content)["oid"]}"')
        if lfs := described(name, content).get("lfs"):
            self.send_header("X-Linked-Etag", f'"{lfs["oid"]}"')
            self.send_header("X-Linked-Size", str(len(content)))
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            self.hub.downloads.append(name)
            self.wfile.write(content)
        return None

    def do_GET(self) -> None:
        if "/resolve/" in self.path:
            return self._resolve(*self._place())
        if self.hub.history and "/models/" in self.path:
            return self._listing()
        if "/tree/" in self.path:
            tree = [{"type": "file", "path": p, "size": len(c), "oid": "0" * 40} for p, c in self.hub.files.items()]
            return self._answer(tree)
        self._answer({"id": "org/name", "sha": "0" * 40, "private": True, "siblings": []})

    def _listing(self) -> None:
        *_, kind, revision = self.path.split("?")[0].split("/")
        if (commit := self._commit(revision)) is None:
            return None
        files = [described(name, content) for name, content in self.hub.history[commit].items()]
        if kind == "tree":
            return self._answer(files)
        siblings = [each | {"rfilename": each["path"], "blobId": each["oid"]} for each in files]
        return self._answer({"id": "org/name", "sha": commit, "private": False, "siblings": siblings})

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
