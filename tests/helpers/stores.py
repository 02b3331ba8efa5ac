"""An S3 store and a web server on this machine, with faults where they are asked for."""

import hashlib
import json
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import parse_qs
from urllib.request import Request, urlopen

import boto3
import pytest
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import WSGIRequestHandler, make_server

from selfe.io import storage

BUCKET = "data"
ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "AKIAIOSFODNN7EXAMPLE",
    "AWS_SECRET_ACCESS_KEY": "wJalrXUtnFEMIK7MDENGbPxRfiCYEXAMPLEKEY",
    "AWS_DEFAULT_REGION": "us-east-1",
}
SLOW_DOWN = b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"


class Faults:
    """A WSGI application in front of another. `kind` of every `every`th request that reads a file fails."""

    def __init__(self, app: Callable):
        self.app, self.every, self.kinds = app, 0, ()
        self.requests, self.lock = 0, threading.Lock()

    def __call__(self, environ: dict, start_response: Callable) -> Iterable[bytes]:
        if environ["REQUEST_METHOD"] != "GET" or "HTTP_RANGE" not in environ:
            return self.app(environ, start_response)
        with self.lock:
            self.requests += 1
            number = self.requests
        if not self.every or number % self.every:
            return self.app(environ, start_response)

        kind = self.kinds[number // self.every % len(self.kinds)]
        if kind == "throttled":
            start_response(
                "503 Slow Down", [("Content-Type", "application/xml"), ("Content-Length", str(len(SLOW_DOWN)))]
            )
            return [SLOW_DOWN]
        return self.cut(environ, start_response)

    def cut(self, environ: dict, start_response: Callable) -> Iterator[bytes]:
        """Half of the answer, and the end of the connection."""
        content = b"".join(self.app(environ, start_response))
        yield content[: len(content) // 2]
        raise ConnectionAbortedError


class Quiet(WSGIRequestHandler):
    def log(self, *args: object) -> None: ...


@contextmanager
def serving(app: Callable) -> Iterator[str]:
    """Serve an application in threads; yields its address."""
    server = make_server("127.0.0.1", 0, app, threaded=True, request_handler=Quiet)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class Store:
    """A bucket of moto's S3."""

    def __init__(self, address: str, faults: Faults):
        self.address, self.faults, self.app, self.url = address, faults, faults.app, f"s3://{BUCKET}"
        keys = {name.lower(): ENVIRONMENT[name] for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")}
        self.client = boto3.client("s3", endpoint_url=address, region_name="us-east-1", **keys)

    def put(self, path: Path, name: str | None = None) -> str:
        """Upload a file; returns its URL."""
        self.client.put_object(Bucket=BUCKET, Key=name or path.name, Body=path.read_bytes())
        return f"{self.url}/{name or path.name}"

    def empty(self) -> None:
        """Remove all objects and faults."""
        self.faults.every, self.faults.kinds, self.faults.requests, self.faults.app = 0, (), 0, self.app
        with urlopen(Request(f"{self.address}/moto-api/reset", method="POST")):
            self.client.create_bucket(Bucket=BUCKET)


@contextmanager
def s3() -> Iterator[Store]:
    """An S3 store that `storage` reads."""
    faults = Faults(DomainDispatcherApplication(create_backend_app))
    with serving(faults) as address, pytest.MonkeyPatch.context() as patch:
        for name, value in (ENVIRONMENT | {"AWS_ENDPOINT_URL": address}).items():
            patch.setenv(name, value)
        patch.setattr(storage, "sleep", lambda seconds: None)
        storage.filesystem.cache_clear()
        yield Store(address, faults)
    storage.filesystem.cache_clear()


def folder_app(folder: Path, ranges: bool = True) -> Callable:
    """Files of a folder by their names, in ranges of bytes."""

    def app(environ: dict, start_response: Callable) -> Iterable[bytes]:
        path = folder / environ["PATH_INFO"].lstrip("/")
        if not path.is_file():
            start_response("404 Not Found", [("Content-Length", "0")])
            return [b""]
        content = path.read_bytes()
        headers = [("ETag", f'"{path.stat().st_mtime_ns}"'), ("Accept-Ranges", "bytes")]
        status = "200 OK"
        if ranges and (asked := environ.get("HTTP_RANGE")):
            first, last = asked.removeprefix("bytes=").split("-")
            status, size = "206 Partial Content", len(content)
            content = content[int(first) : int(last) + 1]
            headers.append(("Content-Range", f"bytes {first}-{int(first) + len(content) - 1}/{size}"))
        start_response(status, [*headers, ("Content-Length", str(len(content)))])
        return [b""] if environ["REQUEST_METHOD"] == "HEAD" else [content]

    return app


def as_json(start_response: Callable, value: object, status: str = "200 OK") -> list[bytes]:
    content = json.dumps(value).encode()
    start_response(status, [("Content-Type", "application/json"), ("Content-Length", str(len(content)))])
    return [content]


def files_below(folder: Path, prefix: str) -> list[Path]:
    """Files whose name relative to a folder starts with a prefix."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return [path for path in files if path.relative_to(folder).as_posix().startswith(prefix)]


def gcs_app(folder: Path) -> Callable:
    """The requests of Google Cloud Storage's JSON interface that reading needs. A bucket has the files of a folder."""
    content = folder_app(folder)

    def described(path: Path) -> dict:
        name, facts = path.relative_to(folder).as_posix(), path.stat()
        return {"name": name, "bucket": BUCKET, "size": str(facts.st_size), "generation": str(facts.st_mtime_ns)}

    def app(environ: dict, start_response: Callable) -> Iterable[bytes]:
        asked = environ["PATH_INFO"].partition(f"/b/{BUCKET}/o")[2].lstrip("/")
        if environ["PATH_INFO"].startswith("/download/"):
            return content(environ | {"PATH_INFO": asked}, start_response)
        if not asked:
            (prefix,) = parse_qs(environ["QUERY_STRING"]).get("prefix", [""])
            return as_json(start_response, {"items": [described(path) for path in files_below(folder, prefix)]})
        if not (folder / asked).is_file():
            return as_json(start_response, {"error": {"message": "No such object"}}, "404 Not Found")
        return as_json(start_response, described(folder / asked))

    return app


def hub_app(folder: Path, repo: str) -> Callable:
    """The requests of the Hugging Face Hub that reading a data set needs. The repository has the files of a folder."""
    content = folder_app(folder)

    def described(path: Path) -> dict:
        name = path.relative_to(folder).as_posix()
        if path.is_dir():
            return {"type": "directory", "path": name, "size": 0, "oid": hashlib.sha1(name.encode()).hexdigest()}
        oid = hashlib.sha1(path.read_bytes()).hexdigest()
        return {"type": "file", "path": name, "size": path.stat().st_size, "oid": oid}

    def app(environ: dict, start_response: Callable) -> Iterable[bytes]:
        path = environ["PATH_INFO"]
        if path.startswith(f"/datasets/{repo}/resolve/"):
            name = path.removeprefix(f"/datasets/{repo}/resolve/").partition("/")[2]
            return content(environ | {"PATH_INFO": name}, start_response)
        verb, _, rest = path.removeprefix(f"/api/datasets/{repo}").lstrip("/").partition("/")
        if not path.startswith(f"/api/datasets/{repo}"):
            return as_json(start_response, {"error": "Repository not found"}, "404 Not Found")
        if verb == "paths-info":
            body = environ["wsgi.input"].read(int(environ["CONTENT_LENGTH"]))
            names = json.loads(body)["paths"] if body.startswith(b"{") else parse_qs(body.decode())["paths"]
            files = [folder / name for name in names]
            return as_json(start_response, [described(file) for file in files if file.is_file()])
        if verb == "tree":
            inside = folder / rest.partition("/")[2]
            paths = inside.rglob("*") if "recursive=true" in environ["QUERY_STRING"].lower() else inside.glob("*")
            return as_json(start_response, [described(path) for path in sorted(paths)])
        return as_json(start_response, {"id": repo, "sha": "0" * 40, "siblings": []})

    return app
