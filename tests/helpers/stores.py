"""An S3 store and a web server on this machine, with faults where they are asked for."""

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
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
