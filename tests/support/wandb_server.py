"""A W&B server of a few lines: it takes runs and their rows, says how far it has a run, and has bad days on request."""

from __future__ import annotations

import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

HISTORY = "wandb-history.jsonl"


class WandbServer:
    """Answers at `url`. Its mood is up, error (500 to all) or hang (no answer); POST /mood/MOOD changes it.

    The mood `gone` closes the port for good. `rows` are each run's rows by their line, as W&B's own server keeps them,
    and `views` the workspaces that were saved.
    """

    def __init__(self, mood: str = "up") -> None:
        self.mood = mood
        self.rows: dict[str, dict[int, dict[str, Any]]] = {}
        self.runs: dict[str, dict[str, Any]] = {}
        self.views: list[dict[str, Any]] = []
        self._wakes_up = threading.Event()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._server.daemon_threads, self._server.block_on_close = True, False
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        if mood == "gone":
            self.close()

    def close(self) -> None:
        """Refuse every connection from now on, and leave those that wait without an answer."""
        self._wakes_up.set()
        self._server.shutdown()
        self._server.server_close()

    def steps(self, run: str) -> list[int]:
        """W&B's own step of every row of a run, in order."""
        return [row["_step"] for _, row in sorted(self.rows[run].items())]

    def answer(self, path: str, body: bytes) -> tuple[int, Any]:
        if path.startswith("/mood/"):
            self.mood = path.removeprefix("/mood/")
            if self.mood == "gone":
                threading.Thread(target=self.close).start()
            return 200, {}
        if self.mood in ("hang", "gone"):
            self._wakes_up.wait()
        if self.mood != "up":
            return 500, {}
        if path == "/graphql":
            request = json.loads(body)
            name = re.search(r"\b(?:query|mutation) (\w+)", request["query"])
            return 200, {
                "data": self._graphql(name[1] if name else "", request.get("variables") or {}, request["query"])
            }
        if path.endswith("/file_stream"):
            run, sent = path.split("/")[-2], json.loads(body).get("files", {}).get(HISTORY)
            if sent:
                lines = {sent["offset"] + i: json.loads(line) for i, line in enumerate(sent["content"])}
                self.rows.setdefault(run, {}).update(lines)
        return 200, {}

    def _graphql(self, name: str, given: dict[str, Any], query: str) -> dict[str, Any]:
        if name in ("Viewer", "GetDefaultEntity"):
            return {"viewer": {"id": "u", "entity": "e", "username": "u", "flags": "{}", "teams": {"edges": []}}}
        if name == "RunResumeStatus":
            return {"model": self._resumed(given["name"])}
        if name == "UpsertBucket":
            known = self.runs.setdefault(given["name"], {})
            known.update({key: value for key, value in given.items() if value is not None})
            project = {"id": "p", "name": given["project"], "entity": {"id": "e", "name": "e"}}
            bucket = {"id": given["name"], "name": given["name"], "displayName": known["displayName"]}
            bucket |= {"project": project, "historyLineCount": len(self.rows.get(given["name"], {}))}
            return {"upsertBucket": {"bucket": bucket, "inserted": len(known) == 0}}
        if name == "CreateRunFiles":
            files = [{"name": file, "uploadUrl": f"{self.url}/upload/{file}"} for file in given["files"]]
            return {"createRunFiles": {"runID": given["run"], "uploadHeaders": [], "files": files}}
        if "upsertView" in query:
            self.views.append(given)
            return {"upsertView": {"view": {"id": "v", "name": given["name"]}, "inserted": True}}
        return {}

    def _resumed(self, run: str) -> dict[str, Any] | None:
        if run not in self.runs:
            return None
        rows = [row for _, row in sorted(self.rows.get(run, {}).items())]
        bucket = {
            "id": run, "name": run, "displayName": self.runs[run]["displayName"], "summaryMetrics": "{}",
            "logLineCount": 0, "historyLineCount": len(rows), "eventsLineCount": 0,
            "historyTail": json.dumps([json.dumps(row) for row in rows[-1:]]), "eventsTail": "[]", "config": "{}",
            "notes": None, "tags": [], "wandbConfig": '{"t": 1}',
        }  # fmt: skip
        return {"id": "p", "name": "p", "entity": {"id": "e", "name": "e"}, "bucket": bucket}


def _handler(server: WandbServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            pass

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            code, answer = server.answer(self.path, body)
            data = json.dumps(answer).encode()
            try:
                self.send_response(code)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)
            except OSError:  # who asked has gone
                self.close_connection = True

        do_GET = do_PUT = do_POST

    return Handler
