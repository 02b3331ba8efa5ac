"""The verb `selfe make-shards`: pack the images of a manifest into tar files (WebDataset layout).

For storage that is slow on many small files. Existing tar files are kept, so a rerun resumes.
"""

from __future__ import annotations

import argparse
import tarfile
from io import BytesIO
from pathlib import Path

from selfe import log
from selfe.data.manifest import Manifest
from selfe.data.shards import CAPTIONS, IMAGES, Shards
from selfe.io import image_decode


def write(tar: Path, manifest: Manifest, indices: range) -> None:
    """Write one tar file with these samples, atomically (`.partial`, then rename); its bytes are reproducible."""
    partial = tar.with_suffix(".partial")
    with tarfile.open(partial, "w", format=tarfile.GNU_FORMAT) as file:
        for index in indices:
            path = Path(manifest.name(index))
            suffix = path.suffix[1:].lower()

            parts = {
                suffix if suffix in IMAGES else "img": path.read_bytes(),
                CAPTIONS[0]: manifest.prompt(index).encode(),
            }

            # a new TarInfo has no owner, mode or time of the source file
            for name, content in parts.items():
                member = tarfile.TarInfo(f"{index:010d}.{name}")
                member.size = len(content)
                file.addfile(member, BytesIO(content))
    partial.rename(tar)


def main(options: argparse.Namespace) -> None:
    """Entry point of `selfe make-shards`."""
    options.out.mkdir(parents=True, exist_ok=True)
    manifest = Manifest(options.manifest, options.base_dir, image_decode.MAX_PIXELS, options.out)

    progress = log.Progress("samples", len(manifest))
    for number, first in enumerate(range(0, len(manifest), options.samples)):
        tar = options.out / f"{options.prefix}-{number:06d}.tar"
        indices = range(first, min(first + options.samples, len(manifest)))
        if not tar.exists():
            write(tar, manifest, indices)
        progress.advance(len(indices))
    progress.close()

    # open the result as training does
    shards = Shards(options.out / f"{options.prefix}-*.tar", image_decode.MAX_PIXELS)
    log.print_line(f"{len(shards)} samples in {len(shards.tars)} tar files in {options.out}")
