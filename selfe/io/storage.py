"""Files of object stores and web servers: s3://, gs://, hf://, https:// and all others that fsspec knows.

They are read in ranges of bytes. A failed request is repeated with growing delays, so that throttling, cut connections
and short outages do not end a run. Credentials come from the environment, as each store's own tools expect them;
messages never contain queries or user names of URLs, which may hold some.
"""

from __future__ import annotations

import errno
import hashlib
import io
import math
import os
import random
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache, cached_property
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeVar
from urllib.parse import urljoin, urlsplit

from selfe import log
from selfe.errors import BadSample, UserError
from selfe.io.disk_cache import DiskCache

T = TypeVar("T")

OPENING, READING = 20.0, 300.0  # seconds over which requests are repeated: when a data set is opened, and later
FIRST_DELAY, LONGEST_DELAY = 0.5, 20.0  # seconds between two requests
NOTES = 30.0  # seconds between two lines of output about failed requests
PART, PARTS = 8 << 20, 8  # bytes of a part of a download, and parts in flight
BLOCK = 256 << 10  # bytes that a file object reads ahead
BEHIND_END = re.compile(r"^416\b|InvalidRange|Range Not Satisfiable", re.IGNORECASE)
REFUSED = {400, 401, 403, 405, 410}  # status codes of HTTP that another try does not change
CREDENTIALS = {"NoCredentialsError", "PartialCredentialsError", "TokenRetrievalError", "RefreshError", "GatedRepoError"}
REMEDIES = {
    "s3": "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or AWS_PROFILE, or FSSPEC_S3_ANON=true for a public bucket",
    "gs": "run gcloud auth application-default login, or set GOOGLE_APPLICATION_CREDENTIALS",
    "hf": "set HF_TOKEN, and accept the terms of the data set",
}
SECRET = re.compile(r"(?<=//)[^/\s@]+@|\?[^\s'\"<>)]+|\b(?:AKIA|ASIA)[A-Z0-9]{12,}|(?<=earer )\S+")
URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")
VERSION_FIELDS = (  # of what stores state about a file
    *("ETag", "etag", "VersionId", "generation", "md5Hash", "Content-MD5", "Digest", "blob_id", "lfs", "sha256"),
    *("LastModified", "Last-Modified", "last_modified", "mtime", "updated"),
)


class Stat(NamedTuple):
    """What `Path.stat` names so."""

    st_size: int
    st_mtime_ns: int  # of a remote file, a number that changes with its version


class RemotePath:
    """The methods of `Path` that readers of data use, for the URL of a file."""

    def __init__(self, url: str):
        self.url = url
        self.protocol = url.partition("://")[0].lower()

    def __str__(self) -> str:
        return shown(self.url)

    def __repr__(self) -> str:
        return f"RemotePath({str(self)!r})"

    def __fspath__(self) -> str:
        raise TypeError(f"{self} is not a file of this machine")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RemotePath) and self.url == other.url

    def __hash__(self) -> int:
        return hash(self.url)

    def __lt__(self, other: RemotePath) -> bool:
        return self.url < other.url

    def __truediv__(self, name: str) -> RemotePath:
        if is_url(name):
            return RemotePath(name)
        if name.startswith("/"):
            return RemotePath(urljoin(self.url, name))
        return RemotePath(f"{self.url.rstrip('/')}/{name}")

    @property
    def name(self) -> str:
        return urlsplit(self.url).path.rpartition("/")[2] or urlsplit(self.url).netloc

    @property
    def suffix(self) -> str:
        return Path(self.name).suffix

    @cached_property
    def known(self) -> Stat:
        """As `stat`, asked for once."""
        return self.stat()

    def stat(self, patience: float = OPENING) -> Stat:
        """Size and version. Raises FileNotFoundError and UserError."""
        return self.stat_of(self.request(lambda: filesystem(self.protocol).info(self.url), patience))

    def stat_of(self, facts: dict[str, Any]) -> Stat:
        """Size and version from what fsspec states about a file."""
        if facts.get("size") is None:
            raise UserError(f"{self}: the server does not state the size of this file; use one that serves byte ranges")
        version = next((str(facts[name]) for name in VERSION_FIELDS if facts.get(name)), "")
        digest = hashlib.blake2b(version.strip('"').encode(), digest_size=7).digest()
        return Stat(int(facts["size"]), int.from_bytes(digest, "little"))

    def is_file(self) -> bool:
        try:
            return bool(self.known)
        except FileNotFoundError:
            return False

    def is_dir(self) -> bool:
        return self.url.endswith("/")

    def read(self, offset: int, size: int, patience: float = READING) -> bytes:
        """These bytes; fewer if the file is shorter.

        Raises:
            FileNotFoundError: there is no such file any more.
            UserError: the store cannot be reached or refuses access.
        """

        def fetch() -> bytes:
            try:
                content = filesystem(self.protocol).cat_file(self.url, start=offset, end=offset + size)
            except Exception as error:  # every store raises its own classes
                if BEHIND_END.search(f"{getattr(error, 'status', '')} {error}"):
                    return b""
                raise
            if len(content) > size:
                raise UserError(f"{self}: the server does not support byte ranges; use one that does, or copy the file")
            if len(content) < size and self.stat(patience).st_size >= offset + size:
                raise ConnectionError(f"{len(content)} of {size} bytes")
            return content

        return self.request(fetch, patience) if size else b""

    def read_bytes(self) -> bytes:
        return self.request(lambda: filesystem(self.protocol).cat_file(self.url), READING)

    def open(self, mode: str = "rb", **_: Any) -> BinaryIO:
        """A file object that reads ahead by `BLOCK` bytes."""
        return io.BufferedReader(RangeReader(self), BLOCK)

    def request(self, action: Callable[[], T], patience: float) -> T:
        """The result of an action, which is repeated over `patience` seconds while it fails in a way that may pass."""
        end, delay = time.monotonic() + patience, FIRST_DELAY
        while True:
            try:
                return action()
            except Exception as error:  # every store raises its own classes
                self.raise_if_final(error)
                reason = describe(error)
                if time.monotonic() + delay > end:
                    message = f"{self}: cannot be read ({reason}), after tries over {patience:g} seconds"
                    raise UserError(f"{message}; check the address, the network and the store") from None

            # delays differ between processes, so that they do not come back all at once
            note_retry(f"{self}: {reason}; trying again, for {patience:g} seconds in all")
            sleep(delay * random.SystemRandom().uniform(0.5, 1))
            delay = min(2 * delay, LONGEST_DELAY)

    def raise_if_final(self, error: Exception) -> None:
        """Raise the error for the user, if another try would fail as well."""
        response = getattr(error, "response", None)
        status = (
            getattr(error, "status", None) or getattr(response, "status_code", None) or getattr(error, "code", None)
        )
        if isinstance(error, UserError):
            raise error
        if isinstance(error, ImportError) or str(error).startswith("Protocol not known"):
            message = f"{self}: needs a package for {self.protocol}:// ({describe(error)})"
            raise UserError(
                f"{message}; run ./scripts/setup.sh --extra remote, or pip install 'selfe[remote]'"
            ) from None
        if isinstance(error, FileNotFoundError) or status == 404:
            raise FileNotFoundError(errno.ENOENT, "no such file", str(self)) from None
        is_refused = isinstance(error, PermissionError) or str(error).startswith("Forbidden:")  # the second: gcsfs
        if is_refused or status in REFUSED or type(error).__name__ in CREDENTIALS:
            remedy = REMEDIES.get(self.protocol, "check the address and your access to it")
            raise UserError(f"{self}: access is refused ({describe(error)}); {remedy}") from None


class RangeReader(io.RawIOBase):
    """A remote file as a raw stream."""

    def __init__(self, path: RemotePath):
        self.path, self.size, self.position = path, path.known.st_size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self.position, io.SEEK_END: self.size}[whence]
        self.position = max(start + offset, 0)
        return self.position

    def tell(self) -> int:
        return self.position

    def readinto(self, buffer: Any) -> int:
        size = max(min(len(buffer), self.size - self.position), 0)
        content = self.path.read(self.position, size)
        buffer[: len(content)] = content
        self.position += len(content)
        return len(content)


# ---- paths ----


def is_url(path: object) -> bool:
    """Whether a path of a config or a manifest is a URL."""
    return isinstance(path, str) and "://" in path and bool(URL.match(path))


def as_path(path: str | Path | RemotePath) -> Path | RemotePath:
    """A path of a config: a URL, or a file of this machine.

    Raises:
        UserError: the URL has a user name or a password, which would be saved with the config of a run.
    """
    if not is_url(path):
        return path if isinstance(path, RemotePath) else Path(path).expanduser()
    if "@" in urlsplit(path).netloc or re.search(r"[?&][^=]*(sig|token|key|cred|pass)[^=]*=", path, re.IGNORECASE):
        raise UserError(f"{shown(path)}: contains credentials; give them to the store's own tools, not in a config")
    return RemotePath(path)


def join(folder: Path | RemotePath, name: str) -> Path | RemotePath:
    """A path that a manifest states: relative to a folder, absolute, or a URL."""
    return RemotePath(name) if is_url(name) else folder / name


def shown(url: str) -> str:
    """A URL without user name and query, for messages."""
    return SECRET.sub("", url)


def matching(pattern: RemotePath) -> list[RemotePath]:
    """The files of a pattern with `*`, `?` or `[]`, sorted. Their sizes and versions are known from the list."""
    fs = filesystem(pattern.protocol)
    try:
        facts = pattern.request(lambda: fs.glob(pattern.url, detail=True), OPENING)
    except FileNotFoundError:  # of the Hub, where the folder does not exist
        return []
    files = []
    for name, of_file in facts.items():
        if of_file.get("type") == "directory":
            continue
        path = RemotePath(fs.unstrip_protocol(name))
        if of_file.get("size") is not None:
            path.known = path.stat_of(of_file)
        files.append(path)
    return sorted(files)


@cache
def filesystem(protocol: str) -> Any:
    """The file system of fsspec, which repeats nothing by itself, so that there is one policy."""
    import fsspec  # slow to import, and only needed here

    options = {"use_listings_cache": False, "skip_instance_cache": True}
    if protocol in ("http", "https"):
        import aiohttp

        timeout = aiohttp.ClientTimeout(total=None, sock_connect=10, sock_read=60)
        options["client_kwargs"] = {"timeout": timeout}
    if protocol == "s3":
        options["max_concurrency"] = 1  # one request for a file, without one for its size
        options["config_kwargs"] = {"retries": {"total_max_attempts": 1}, "connect_timeout": 10, "read_timeout": 60}

    kind = fsspec.get_filesystem_class(protocol)
    if protocol in ("gs", "gcs"):
        # the default class asks for the kind of the bucket with every request, and warns without credentials
        from gcsfs.core import GCSFileSystem as kind
    opened = kind(**options)
    if protocol == "s3":
        opened.retries = 1
    return opened


os.register_at_fork(after_in_child=filesystem.cache_clear)  # its thread does not exist in a forked process


# ---- downloads ----


def download(source: RemotePath, file: BinaryIO) -> None:
    """Copy a file in parts, several at a time. Raises UserError if it changes meanwhile, and as `RemotePath.read`."""
    before = source.stat()
    with ThreadPoolExecutor(PARTS, thread_name_prefix="download") as pool:

        def copy(offset: int) -> None:
            os.pwrite(file.fileno(), source.read(offset, min(PART, before.st_size - offset)), offset)

        for _ in pool.map(copy, range(0, before.st_size, PART)):
            pass
    if source.stat() != before:
        raise UserError(f"{source}: changed while it was read; run the same command again")


@contextmanager
def local_copy(source: Path | RemotePath, folder: Path) -> Iterator[Path]:
    """The file on this machine: itself, or a copy in `folder` that has no name, so that nothing of it is left behind.

    Raises:
        UserError: the file is gone, or the copy cannot be written.
    """
    if isinstance(source, Path):
        yield source
        return
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder) as file:
        try:
            download(source, file)
        except OSError as error:
            if error.errno == errno.ENOENT:
                raise UserError(f"{source}: no such file any more; run the same command again") from error
            reason = f"a copy of {source} cannot be written ({error.strerror})"
            raise UserError(f"{folder}: {reason}; set data.params.cache_dir") from error
        yield Path(f"/dev/fd/{file.fileno()}")


def image_file(path: Path | RemotePath, cache: DiskCache, version: str) -> Path | BinaryIO:
    """An image file: its path on this machine, or its content from a store. `version` is that of the list naming it.

    Raises:
        BadSample: kind `missing`, for a remote file.
    """
    if isinstance(path, Path):
        return path
    try:
        return io.BytesIO(cache.read(f"{path.url} in {version}", path.read_bytes))
    except FileNotFoundError as error:
        raise BadSample("missing", f"{path}: no such image; correct the line or data.params.base_dir") from error


# ---- messages ----

sleep = time.sleep


last_note = -math.inf  # when this process last printed that it tries again


def note_retry(message: str) -> None:
    """Print that a file is read again, at most every `NOTES` seconds."""
    global last_note
    if time.monotonic() - last_note >= NOTES:
        last_note = time.monotonic()
        log.print_line(message)


def describe(error: Exception) -> str:
    """The reason of an error in a few words, without secrets."""
    text = SECRET.sub("", str(error).strip().splitlines()[0]) if str(error).strip() else type(error).__name__
    return text[:200]
