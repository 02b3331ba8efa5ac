"""Pack the pictures of a manifest into tar files in WebDataset's layout, for storage that dislikes small files.

    .venv/bin/python scripts/make_shards.py MANIFEST --base-dir DIR --out DIR

Picture files are copied as they are. Started again, it goes on where it was. Train with

    data.module=selfe.data.shards.ShardData data.params.train_manifest='DIR/*.tar'
"""

from __future__ import annotations

import argparse
import tarfile
from io import BytesIO
from pathlib import Path

from selfe import images, launch, log
from selfe.data.manifest import Manifest
from selfe.data.shards import PICTURES, PROMPT, Shards


def write(tar: Path, manifest: Manifest, indices: range) -> None:
    """One tar file with these samples, written aside and renamed; the same bytes each time."""
    aside = tar.with_suffix(".partial")
    with tarfile.open(aside, "w", format=tarfile.GNU_FORMAT) as file:
        for index in indices:
            path = Path(manifest.name(index))
            suffix = path.suffix[1:].lower()
            parts = {
                suffix if suffix in PICTURES else "img": path.read_bytes(),
                PROMPT: manifest.prompt(index).encode(),
            }
            for name, content in parts.items():
                member = tarfile.TarInfo(f"{index:010d}.{name}")
                member.size = len(content)
                file.addfile(member, BytesIO(content))
    aside.rename(tar)


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("manifest", type=Path)
    parser.add_argument("--base-dir", type=Path, default=Path(), help="where relative picture paths start")
    parser.add_argument("--out", type=Path, required=True, help="the folder of the tar files")
    parser.add_argument("--prefix", default="train", help="tar files are called PREFIX-000000.tar and so on")
    parser.add_argument("--samples", type=int, default=10_000, help="per tar file")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    manifest = Manifest(options.manifest, options.base_dir, images.MAX_PIXELS, options.out)
    progress = log.Progress("samples", len(manifest))
    for number, first in enumerate(range(0, len(manifest), options.samples)):
        tar = options.out / f"{options.prefix}-{number:06d}.tar"
        indices = range(first, min(first + options.samples, len(manifest)))
        if not tar.exists():
            write(tar, manifest, indices)
        progress.advance(len(indices))
    progress.close()
    shards = Shards(options.out / f"{options.prefix}-*.tar", images.MAX_PIXELS)
    log.say(f"{len(shards)} samples in {len(shards.tars)} tar files in {options.out}")


if __name__ == "__main__":
    launch.worker(main)
