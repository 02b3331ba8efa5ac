"""A Hugging Face Hub on the loopback interface: the endpoints that a download needs, and its errors."""

import hashlib
import json
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"
LARGE = (".safetensors", ".bin", ".model")  # kept outside git, with sha256


@dataclass
class Hub:
    """Folders as repositories. Every request is recorded; `gated`, `stall` and `wrong` select faults."""

    repos: dict[str, Path]
    token: str = "hf_right"
    gated: str | None = None
    stall: str | None = None  # a file that stops half way, until the hub is closed
    wrong: dict[str, bytes] = field(default_factory=dict)  # other contents under the promised size and hash
    requests: list[tuple[str, str, str | None]] = field(default_factory=list)  # method, path, Range
    served: int = 0  # bytes of files
    half_way: threading.Event = field(default_factory=threading.Event)
    closing: threading.Event = field(default_factory=threading.Event)

    def gets(self) -> list[tuple[str, str]]:
        """(repository, file) of every file that was requested."""
        paths = [path for method, path, _ in self.requests if method == "GET" and "/resolve/" in path]
        return [tuple(path[1:].split(f"/resolve/{COMMIT}/")) for path in paths]

    def __enter__(self) -> "Hub":
        handler = type("Bound", (Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        return self

    def __exit__(self, *_) -> None:
        self.closing.set()
        self.server.shutdown()
        self.server.server_close()


class Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        hub, path = self.hub, self.path.split("?")[0]
        hub.requests.append((self.command, path, self.headers.get("Range")))
        given = self.headers.get("Authorization")
        if given not in (None, f"Bearer {hub.token}"):
            return self.refuse(401, {"X-Error-Message": "Invalid credentials in Authorization header"})
        for repo, folder in hub.repos.items():
            if path == f"/api/models/{repo}":
                names = [{"rfilename": str(file.relative_to(folder))} for file in folder.rglob("*") if file.is_file()]
                return self.send(json.dumps({"id": repo, "sha": COMMIT, "siblings": names}).encode(), body)
            if path.startswith(prefix := f"/{repo}/resolve/{COMMIT}/"):
                if repo == hub.gated:
                    return self.refuse(403, {"X-Error-Code": "GatedRepo"})
                return self.send_file(folder / path.removeprefix(prefix), body)
        return self.refuse(404, {"X-Error-Code": "RepoNotFound"})

    def refuse(self, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in (headers | {"Content-Length": "0"}).items():
            self.send_header(name, value)
        self.end_headers()

    def send(self, content: bytes, body: bool) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if body:
            self.wfile.write(content)

    def send_file(self, path: Path, body: bool) -> None:
        content = path.read_bytes()
        if path.name.endswith(LARGE):
            etag = hashlib.sha256(content).hexdigest()
        else:
            etag = hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()

        # possibly not the content of its hash; only the requested range
        content = self.hub.wrong.get(path.name, content)
        start = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").split("-")[0])

        self.send_response(206 if start else 200)
        self.send_header("ETag", f'"{etag}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Length", str(len(content) - start))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        if not body:
            return

        # some files stop half way, until the hub closes
        content = content[start:]
        stalls = path.name == self.hub.stall
        self.wfile.write(content[: len(content) // 2] if stalls else content)
        self.hub.served += len(content) // 2 if stalls else len(content)
        if stalls:
            self.wfile.flush()
            self.hub.half_way.set()
            self.hub.closing.wait()
            self.close_connection = True
