"""Tar files in the WebDataset layout: consecutive members with the same name up to the first dot form a sample.

Read by random access through an index of all members, so that order, mixing and resuming work as for a manifest.
"""

from __future__ import annotations

import json
import os
import sys
import tarfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image
from tqdm import tqdm

from selfe import log
from selfe.data import captions, index, patterns
from selfe.data.captions import Captions
from selfe.data.containers import Container, Entry
from selfe.data.dataset import BucketedDataset, Reading, Source
from selfe.errors import BadSample, UserError
from selfe.io import image_decode, text_files
from selfe.io.storage import RemotePath

# sizes as in `index`; format: place in CAPTIONS
FIELDS = "shard:<u4 image:<u8 image_bytes:<u4 prompt:<u8 prompt_bytes:<u4 height:<u2 width:<u2 format:<u1"
RECORD = np.dtype([tuple(field.split(":")) for field in FIELDS.split()])
IMAGES = image_decode.SUFFIXES | {"img"}  # `make-shards` calls files of other suffixes .img
CAPTIONS = ("txt", "caption", "json")  # in order of preference; of a .json, its "caption" and "captions" count
AGAIN = "write the shard again"
NOT_SHARDS = {".tsv", ".csv", ".jsonl"}


class ShardData(BucketedDataset):
    """As `ManifestData`, with patterns such as `shards/train-*.tar` as `train_manifest` and `val_manifest`."""

    def open(self, path: Path | RemotePath, base_dir: Path | RemotePath) -> Shards | Container:
        if isinstance(path, RemotePath):
            return open_remote(path, self.reading(base_dir))
        return Shards(path, self.max_pixels, self.index_dir, self.on_bad_image == "error", self.convert_icc)


def open_remote(pattern: RemotePath, reading: Reading) -> Container:
    """The source for tar files in a store."""
    return Container(str(pattern), matching_files(pattern), TarReader(), reading)


class Shards(Source):
    """The samples of all tar files that match a pattern, by index, files in the order of their names."""

    def __init__(
        self,
        pattern: Path,
        max_pixels: int,
        index_dir: Path | None = None,
        strict: bool = True,
        convert_icc: bool = True,
    ):
        self.pattern, self.max_pixels, self.index_dir, self.strict = pattern, max_pixels, index_dir, strict
        self.convert_icc = convert_icc
        self.tars = matching_files(pattern)
        self.opened = lru_cache(maxsize=64)(lambda number: self.tars[number].open("rb", buffering=0))

        facts = [(tar.name, tar.stat().st_size, tar.stat().st_mtime_ns) for tar in self.tars]
        key = index.stamp(RECORD, facts, max_pixels)
        self.records = index.load(self.tars[0], key, index_dir, RECORD, self.scan, self.measure)

    def __reduce__(self) -> tuple:
        return Shards, (self.pattern, self.max_pixels, self.index_dir, self.strict, self.convert_icc)

    def __len__(self) -> int:
        return len(self.records)

    def sizes(self, indices: np.ndarray) -> np.ndarray:
        return self.records.sizes(indices)

    def lengths(self, indices: np.ndarray) -> np.ndarray:
        return self.records.take(indices)["prompt_bytes"].astype(np.int64)

    def captions(self, index: int) -> Captions:
        content = self.bytes_of(index, "prompt")
        return read_captions(content, CAPTIONS[self.records[index]["format"]], self.name(index))

    def name(self, index: int) -> str:
        record = self.records[index]
        return f"{self.tars[record['shard']]}, image at byte {record['image']}"

    def location(self, index: int) -> tuple[Path, int, int | None]:
        record = self.records[index]
        return self.tars[record["shard"]], int(record["image"]), int(record["image_bytes"])

    def image(self, index: int, enough: int | None) -> Image.Image:
        file = BytesIO(self.bytes_of(index, "image"))
        return image_decode.read(file, self.name(index), self.max_pixels, enough, self.convert_icc)

    def size(self, index: int) -> tuple[int, int]:
        """(height, width) in pixels, from the image header."""
        return image_decode.size(BytesIO(self.bytes_of(index, "image")), self.name(index), self.max_pixels)

    def digest(self) -> str:
        """Digest of the names and sizes of the tar files and of up to 1024 evenly spaced records."""
        some = np.unique(np.linspace(0, len(self) - 1, 1024).astype(np.int64))
        return index.stamp([(tar.name, tar.stat().st_size) for tar in self.tars], self.records.take(some).tolist())

    def bytes_of(self, index: int, member: str) -> bytes:
        """The content of one member of a sample; `member` is `image` or `prompt`."""
        record = self.records[index]
        file = self.opened(int(record["shard"]))
        return os.pread(file.fileno(), int(record[f"{member}_bytes"]), int(record[member]))

    def measure(self, records: np.ndarray) -> None:
        self.records = records  # needed by `size`, which reads members by index
        index.measure(records, self.size, self.pattern.name, self.strict)

    def scan(self, out: Path) -> None:
        """Write one record per sample, from the tar headers of all members. Prints how many members are not used.

        Raises:
            BadSample: in strict mode, the first sample that is not one image and one caption.
            UserError: as `read_samples`, or there is no sample.
        """
        unused = Counter()
        with out.open("wb") as file:
            for number, tar in enumerate(tqdm(self.tars, desc="tar files", disable=not sys.stderr.isatty())):
                samples = list(read_samples(tar, unused))
                if self.strict:
                    raise_if_unusable(samples)
                np.array([sample.record(number) for sample in samples], RECORD).tofile(file)

        if not out.stat().st_size:
            raise UserError(
                f"{self.pattern}: no images{describe_unused(unused)}; a sample is NAME.jpg (or .png, .webp ...), then "
                f"NAME.{CAPTIONS[0]}"
            )
        if unused:
            log.print_line(f"{self.pattern}{describe_unused(unused)}")


@dataclass
class Sample:
    """Consecutive members of a tar file with the same key: each a name, and (offset, size) of its content in bytes."""

    tar: Path
    key: str  # folder and name up to the first dot
    images: dict[str, tuple[int, int]] = field(default_factory=dict)  # by member name
    captions: dict[str, tuple[int, int]] = field(default_factory=dict)  # by suffix
    repeated: str = ""  # a member that came twice

    def problem(self) -> BadSample | None:
        """Why this cannot be used, or None."""
        where = f"{self.tar}: {self.key.lstrip('/')}"
        if self.repeated:
            return BadSample("ambiguous", f"{where}: {self.repeated} comes twice; {AGAIN}")
        if len(self.images) > 1:
            return BadSample("ambiguous", f"{where}: has the images {' and '.join(self.images)}; keep one")
        if not self.images or not self.captions:
            missing = "image" if not self.images else " or ".join(f".{suffix}" for suffix in CAPTIONS)
            return BadSample("incomplete", f"{where}: has no {missing}; {AGAIN}")
        return None

    def content(self, place: tuple[int, int]) -> bytes:
        """The bytes at (offset, size)."""
        with self.tar.open("rb") as file:
            return os.pread(file.fileno(), place[1], place[0])

    def __len__(self) -> int:
        """Bytes of all members."""
        return sum(size for members in (self.images, self.captions) for _, size in members.values())

    def record(self, shard: int) -> tuple:
        """The fields of `RECORD`; zero bytes of what is missing or ambiguous, which cannot be decoded later."""
        image, (suffix, caption) = (0, 0), (CAPTIONS[0], (0, 0))
        if not self.repeated and len(self.images) == 1:
            (image,) = self.images.values()
        if self.captions:
            suffix, caption = self.caption()
        return (shard, *image, *caption, 0, 0, CAPTIONS.index(suffix))

    def caption(self) -> tuple[str, tuple[int, int]]:
        """Suffix, and (offset, size), of the preferred caption."""
        suffix = min(self.captions, key=CAPTIONS.index)
        return suffix, self.captions[suffix]


def raise_if_unusable(samples: list[Sample]) -> None:
    """Raise `BadSample` for the first sample that is not one image and one caption."""
    for sample in samples:
        if problem := sample.problem():
            raise problem


def read_samples(tar: Path, unused: Counter) -> Iterator[Sample]:
    """The samples of one tar file, from member headers only. Members that are not used are counted by reason.

    Raises:
        UserError: the tar file is truncated or compressed, or a key returns after another one.
    """
    sample = None
    first: dict[str, tarfile.TarInfo] = {}  # the first member of each key

    for member in read_members(tar):
        key, suffix, reason = split_name(member)
        if reason:
            unused[reason] += 1
            continue

        # a new key ends the sample; one that returns could belong to either
        if sample is None or key != sample.key:
            if key in first:
                raise UserError(
                    f"{tar}: the key {key.lstrip('/')} comes twice: {first[key].name} at byte {first[key].offset} and, "
                    f"behind other samples, {member.name} at byte {member.offset}; the members of a sample must follow "
                    f"each other, and each key must come once: {AGAIN}, for instance with tar --sort=name"
                )
            if sample is not None:
                yield finish(sample, unused)
            sample, first[key] = Sample(tar, key), member

        members, name = (sample.images, member.name) if suffix in IMAGES else (sample.captions, suffix)
        if name in members:
            sample.repeated = member.name
        members[name] = (member.offset_data, member.size)

    if sample is not None:
        yield finish(sample, unused)


def finish(sample: Sample, unused: Counter) -> Sample:
    """Count the captions of a complete sample that are not used, and incomplete samples."""
    if len(sample.captions) > 1:
        chosen, _ = sample.caption()
        unused.update(f".{suffix} beside .{chosen}" for suffix in sample.captions if suffix != chosen)
    if problem := sample.problem():
        unused[f"{problem.kind} sample"] += len(sample.images) + len(sample.captions)
    return sample


def read_members(tar: Path) -> Iterator[tarfile.TarInfo]:
    """The headers of all members. Raises UserError for a tar file that is truncated or compressed."""
    try:
        with tarfile.open(tar, "r:") as members:
            yield from members

            # tarfile accepts a file that ends between two members
            members.fileobj.seek(members.offset)
            if members.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise tarfile.ReadError("cut short: it has no end-of-archive block")
    except (tarfile.TarError, OSError) as error:
        message = f"{tar}: not a complete, uncompressed tar file ({error}); write or download it again"
        raise UserError(message) from error


def split_name(member: tarfile.TarInfo) -> tuple[str, str, str]:
    """Key and suffix of a member, or the reason why it is not used."""
    folder, _, base = member.name.rpartition("/")
    stem, _, suffix = base.partition(".")
    suffix = suffix.lower()

    reason = ""
    if not member.isfile():
        reason = "folder or link"
    elif base.startswith("._") or "__MACOSX" in folder.split("/"):
        reason = "metadata of macOS (__MACOSX, ._*)"
    elif not stem or not suffix:
        reason = "hidden file, or no suffix"
    elif suffix not in IMAGES and suffix not in CAPTIONS:
        reason = f"suffix .{suffix}"
    return f"{folder}/{stem}", suffix, reason


def describe_unused(unused: Counter) -> str:
    """Text to append to the name of a pattern; empty if every member is used."""
    reasons = ", ".join(f"{count} x {reason}" for reason, count in unused.most_common(10))
    return f": {unused.total()} members are not used: {reasons}" if unused else ""


def read_captions(content: bytes, suffix: str, name: str) -> Captions:
    """The captions in a member with this suffix. Raises BadSample; `name` is that of the sample."""
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        message = f"{name}: the text is not UTF-8 at byte {error.start}; {AGAIN}"
        raise BadSample("invalid UTF-8", message) from error

    of_sample = Captions((text.strip(),))
    if suffix == "json":
        of_sample = read_json_captions(text, name)

    if not any(of_sample.texts):
        raise BadSample("empty caption", f"{name}: empty text; write the shard without it")
    words = " ".join(" ".join(of_sample.texts).split())  # line breaks and tabs are spaces to the encoders
    if control := text_files.CONTROL.search(words):
        message = f"{name}: the text contains the control character U+{ord(control[0]):04X}; {AGAIN}"
        raise BadSample("control character", message)
    return of_sample


def read_json_captions(text: str, name: str) -> Captions:
    """The captions of a .json member: "caption", "captions" or both."""
    try:
        record = json.loads(text)
        caption, texts = record.get("caption"), record.get(captions.LIST)
        if caption is None and texts is None:
            raise KeyError("caption")
        return captions.read(caption, texts, record.get(captions.WEIGHTS), captions.stripped)
    except BadSample as problem:
        raise BadSample(problem.kind, f"{name}: {problem}; {AGAIN}") from problem
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise BadSample("no caption", f'{name}: its .json has no "caption" that is a text; {AGAIN}') from error


# ---- in a store ----


@dataclass
class TarReader:
    """The samples of tar files, for `Container`."""

    grouped, in_rows = False, False

    def __post_init__(self):
        self.unused = Counter()

    def entries(self, path: Path) -> Iterator[Entry | BadSample]:
        for row, sample in enumerate(read_samples(path, self.unused), start=1):
            try:
                yield self.entry(row, sample)
            except BadSample as problem:
                yield problem

    def entry(self, row: int, sample: Sample) -> Entry:
        """Raises BadSample for an incomplete sample or one without a usable caption."""
        if problem := sample.problem():
            raise problem
        ((name, place),) = sample.images.items()
        suffix, caption = sample.caption()
        of_sample = read_captions(sample.content(caption), suffix, f"{sample.tar}, {name}")
        return Entry(row, 0, place[0], sample.content(place), of_sample, caption[1])

    def notes(self) -> str:
        return describe_unused(self.unused)

    def write_group(self, file: Path, group: int, out: BinaryIO) -> None:
        raise NotImplementedError("an image is read from its file")


# ---- patterns ----


def matching_files(pattern: Path | RemotePath) -> list[Path] | list[RemotePath]:
    """The tar files of a pattern, sorted by name. Raises UserError if one is missing."""
    what = "tar file; set data.params.train_manifest to a pattern such as a/b-*.tar"
    files = patterns.matching(pattern, what)
    if folder := next((path for path in files if path.is_dir()), None):
        raise UserError(
            f"{folder}: is a folder; give a pattern such as {folder}/*.tar. selfe make-manifest SOURCE --shards DIR "
            "writes shards of the images of a folder and of other sources"
        )
    if table := next((path for path in files if path.suffix.lower() in (".parquet", ".arrow")), None):
        raise UserError(f"{table}: is not a tar file; it is read by data.module=selfe.data.tables.TableData")
    if other := next((path for path in files if path.suffix.lower() in NOT_SHARDS), None):
        raise UserError(
            f"{other}: is not a tar file; manifests are read by data.module=selfe.data.manifest.ManifestData, and "
            "selfe make-manifest SOURCE --shards DIR writes shards"
        )
    return files
