"""The live page: a server on the loopback interface that reads the run folders again whenever the page requests it."""

from __future__ import annotations

import gzip
import json
import re
import signal
import threading
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from selfe.errors import UserError
from selfe.tools.report import page, sheets
from selfe.tools.report.run_folder import RunFolder

ADDRESS = "127.0.0.1"
FIRST_PORT, NUM_PORTS = 7870, 20  # tried in order without --port
REFRESH_SECONDS = 5.0


class Server(ThreadingHTTPServer):
    """Serves `/`, `/data.json` and `/sheet/RUN/WEIGHTS/STEP`. Port 0 is any free one."""

    daemon_threads = True
    allow_reuse_address = False  # on some systems two servers could share a port

    def __init__(self, runs: Sequence[RunFolder], port: int, refresh_seconds: float = REFRESH_SECONDS):
        self.runs, self.refresh_seconds = runs, refresh_seconds
        self.reading = threading.Lock()  # requests are threads
        super().__init__((ADDRESS, port), Handler)

    @property
    def url(self) -> str:
        return f"http://{ADDRESS}:{self.server_port}/"

    def html(self) -> str:
        with self.reading:
            for run in self.runs:
                run.refresh()
            return page.page(page.live(self.runs, self.refresh_seconds))

    def data(self, known: list[int]) -> dict:
        """The data of the page; only the states of the runs if nothing else has changed since version `known`."""
        with self.reading:
            try:
                for run in self.runs:
                    run.refresh()
                if known == [run.version for run in self.runs]:
                    return {"states": [run.state() for run in self.runs]}
                return page.live(self.runs, self.refresh_seconds)
            except (UserError, OSError) as error:
                return {"error": str(error)}

    def sheet(self, index: int, weights: str, step: int) -> bytes | None:
        """The file of a sample sheet, None if there is none."""
        if index >= len(self.runs) or weights not in sheets.FOLDERS:
            return None
        try:
            path, _ = self.runs[index].sheets[weights][step]
            return path.read_bytes()
        except (KeyError, FileNotFoundError):
            return None


class Handler(BaseHTTPRequestHandler):
    """Answers the requests of the page."""

    server: Server

    def do_GET(self) -> None:
        # A page of another site whose name points to this machine must not read the runs.
        if self.headers.get("Host", "").rpartition(":")[0] not in (ADDRESS, "localhost"):
            return self.respond(403, "text/plain", b"open the page as 127.0.0.1 or localhost")

        path, _, query = self.path.partition("?")
        if path == "/":
            try:
                return self.respond(200, "text/html; charset=utf-8", self.server.html().encode())
            except (UserError, OSError) as error:
                return self.respond(500, "text/plain; charset=utf-8", str(error).encode())
        if path == "/data.json":
            known = [int(number) for number in re.findall(r"\d+", query)]
            text = json.dumps(self.server.data(known), ensure_ascii=False, allow_nan=False)
            return self.respond(200, "application/json", text.encode())
        if match := re.fullmatch(r"/sheet/(\d+)/(\w+)/(\d+)", path):
            data = self.server.sheet(int(match[1]), match[2], int(match[3]))
            if data is not None:
                return self.respond(200, "image/png", data)
        return self.respond(404, "text/plain", b"not found")

    def respond(self, code: int, kind: str, body: bytes) -> None:
        # numbers as text become a third as long, which counts over an SSH tunnel
        compress = kind != "image/png" and "gzip" in self.headers.get("Accept-Encoding", "")
        body = gzip.compress(body, compresslevel=1) if compress else body
        try:
            self.send_response(code)
            self.send_header("Content-Type", kind)
            if compress:
                self.send_header("Content-Encoding", "gzip")
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Cache-Control", "no-store")
            self.end_headers()
            self.wfile.write(body)
        except (BrokenPipeError, ConnectionResetError):
            pass  # the page was closed

    def log_message(self, *arguments: object) -> None:
        """Requests are not printed."""


def start(runs: Sequence[RunFolder], port: int | None) -> Server:
    """A server on this port, or on the first free one of the default ports. Raises UserError."""
    last: OSError | None = None
    for candidate in range(FIRST_PORT, FIRST_PORT + NUM_PORTS) if port is None else (port,):
        try:
            return Server(runs, candidate)
        except (OSError, OverflowError) as error:
            last = error
    name = f"ports {FIRST_PORT} to {FIRST_PORT + NUM_PORTS - 1}" if port is None else f"--port {port}"
    raise UserError(f"{name}: cannot be listened on ({last}); choose another with --port") from last


def serve(runs: Sequence[RunFolder], port: int | None) -> None:
    """Serve until Ctrl-C."""
    server = start(runs, port)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # KeyboardInterrupt
    print(f"open {server.url} (Ctrl-C ends it)", flush=True)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        print("\nstopped", flush=True)
    finally:
        server.server_close()
