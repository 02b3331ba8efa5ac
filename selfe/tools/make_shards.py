"""The verb `selfe make-shards`: pack the images of a manifest into tar files (WebDataset layout).

For storage that is slow on many small files. Existing tar files are kept, so a rerun resumes. PREFIX.json records what
they were written from, so that a folder never has shards of two manifests.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import tarfile
from collections.abc import Iterable, Iterator
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

from selfe import log
from selfe.data import captions
from selfe.data.captions import Captions
from selfe.data.manifest import Manifest
from selfe.data.shards import IMAGES, Shards
from selfe.errors import UserError
from selfe.io import image_decode

CHUNK = 1 << 24  # bytes read at once


class Sample(NamedTuple):
    """What is written for a sample."""

    number: int  # unique over all tar files
    suffix: str  # of the image file, without the dot
    image: bytes
    captions: Captions


def write(tar: Path, samples: Iterable[Sample]) -> None:
    """Write one tar file with these samples, atomically (`.partial`, then rename); its bytes are reproducible."""
    partial = tar.with_suffix(".partial")
    with tarfile.open(partial, "w", format=tarfile.GNU_FORMAT) as file:
        for sample in samples:
            suffix = sample.suffix if sample.suffix in IMAGES else "img"
            members = {suffix: sample.image} | caption_member(sample.captions)

            # a new TarInfo has no owner, mode or time of the source file
            for name, content in members.items():
                member = tarfile.TarInfo(f"{sample.number:010d}.{name}")
                member.size = len(content)
                file.addfile(member, BytesIO(content))
    partial.rename(tar)


def caption_member(of_sample: Captions) -> dict[str, bytes]:
    """The member with the captions, by suffix: .txt for a single one, .json for several."""
    record = captions.to_record(of_sample)
    if captions.LIST not in record:
        return {"txt": of_sample.first.encode()}
    return {"json": json.dumps(record, ensure_ascii=False).encode()}


def samples_of(manifest: Manifest, indices: range) -> Iterator[Sample]:
    for index in indices:
        path = manifest.image_path(index)
        yield Sample(index, path.suffix[1:].lower(), path.read_bytes(), manifest.captions(index))


def check_folder(options: argparse.Namespace) -> None:
    """Record what the shards are written from. Raises UserError if the folder has shards of something else."""
    digest = hashlib.blake2b(digest_size=16)
    with options.manifest.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    origin = {"manifest": digest.hexdigest(), "base_dir": str(options.base_dir.resolve()), "samples": options.samples}

    record = options.out / f"{options.prefix}.json"
    if record.exists():
        if json.loads(record.read_text()) != origin:
            raise UserError(
                f"{options.out}: its shards were written from another manifest, or with another --base-dir or "
                "--samples; choose another --out, or remove this folder"
            )
        return
    if any(options.out.glob(f"{options.prefix}-*.tar")):
        raise UserError(f"{options.out}: has shards that are not of this manifest; choose another --out or --prefix")

    partial = record.with_suffix(".partial")
    partial.write_text(json.dumps(origin) + "\n")
    partial.rename(record)


def open_result(folder: Path, prefix: str) -> None:
    """Open shards as training does, and print how many there are."""
    shards = Shards(folder / f"{prefix}-*.tar", image_decode.MAX_PIXELS)
    log.print_line(f"{len(shards)} samples in {len(shards.tars)} tar files in {folder}")


def main(options: argparse.Namespace) -> None:
    """Entry point of `selfe make-shards`."""
    options.out.mkdir(parents=True, exist_ok=True)
    manifest = Manifest(options.manifest, options.base_dir, image_decode.MAX_PIXELS, options.out)
    check_folder(options)

    progress = log.Progress("samples", len(manifest))
    for number, first in enumerate(range(0, len(manifest), options.samples)):
        tar = options.out / f"{options.prefix}-{number:06d}.tar"
        indices = range(first, min(first + options.samples, len(manifest)))
        if not tar.exists():
            write(tar, samples_of(manifest, indices))
        progress.advance(len(indices))
    progress.close()
    open_result(options.out, options.prefix)
