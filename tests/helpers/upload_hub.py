"""A Hugging Face Hub on the loopback interface to which a folder can be uploaded, with faults."""

import base64
import json
import threading
from collections import Counter
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class UploadHub:
    """What was uploaded, and which requests fail."""

    token: str = "hf_right"
    cut: int = 0  # uploads of large files whose connection ends half way
    refused: dict[str, list[int]] = field(default_factory=dict)  # part of a path -> statuses of the next requests
    blobs: dict[str, bytes] = field(default_factory=dict)  # large files by sha256
    files: dict[str, dict[str, bytes]] = field(default_factory=dict)  # by repository, after a commit
    requests: Counter = field(default_factory=Counter)  # by kind

    def __enter__(self) -> "UploadHub":
        handler = type("Bound", (Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        return self

    def __exit__(self, *_) -> None:
        self.server.shutdown()
        self.server.server_close()


class Handler(BaseHTTPRequestHandler):
    hub: UploadHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_) -> None:
        pass

    def do_GET(self) -> None:
        self.answer(404 if self.headers.get("Authorization") == f"Bearer {self.hub.token}" else 401)

    def do_PUT(self) -> None:
        size = int(self.headers["Content-Length"])
        self.hub.requests["put"] += 1
        if self.hub.cut:
            self.hub.cut -= 1
            self.rfile.read(size // 2)
            self.connection.close()
            return
        self.hub.blobs[self.path.rpartition("/")[2]] = self.rfile.read(size)
        self.answer(200)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        path = self.path.split("?")[0]
        for part, statuses in self.hub.refused.items():
            if part in path and statuses:
                return self.answer(statuses.pop(0))
        if path.endswith("/api/validate-yaml"):
            return self.answer(200, {"errors": [], "warnings": []})
        if self.headers.get("Authorization") != f"Bearer {self.hub.token}":
            return self.answer(401)

        if path.endswith("/api/repos/create"):
            content = json.loads(body)
            repo = f"{content['organization']}/{content['name']}"
            existed = repo in self.hub.files
            self.hub.files.setdefault(repo, {})
            return self.answer(409 if existed else 200, {"url": f"{self.hub.url}/{repo}"})
        if "/preupload/" in path:
            files = [
                {"path": file["path"], "shouldIgnore": False, "oid": None}
                | {"uploadMode": "lfs" if file["path"].endswith((".safetensors", ".png")) else "regular"}
                for file in json.loads(body)["files"]
            ]
            return self.answer(200, {"files": files})
        if path.endswith("/info/lfs/objects/batch"):
            return self.answer(
                200, {"transfer": "basic", "objects": list(map(self.place, json.loads(body)["objects"]))}
            )
        return self.commit(path.removeprefix("/api/models/").partition("/commit/")[0], body)

    def place(self, file: dict) -> dict:
        """Where a large file is to be sent; nowhere if it is there."""
        entry = {"oid": file["oid"], "size": file["size"]}
        if file["oid"] in self.hub.blobs:
            return entry
        return entry | {"actions": {"upload": {"href": f"{self.hub.url}/upload/{file['oid']}"}}}

    def commit(self, repo: str, body: bytes) -> None:
        self.hub.requests["commit"] += 1
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                self.hub.files[repo][value["path"]] = base64.b64decode(value["content"])
            if line["key"] == "lfsFile":
                self.hub.files[repo][value["path"]] = self.hub.blobs[value["oid"]]
        self.answer(200, {"commitUrl": f"{self.hub.url}/{repo}/commit/1", "commitOid": "1"})

    def answer(self, status: int, content: dict | None = None) -> None:
        body = json.dumps(content or {}).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
