"""One HTML page that shows the images of a job at any number of steps: `selfe gallery FOLDER [FOLDER ...]`.

Images of a small job are embedded in the page; a large job's stay in separate files, with thumbnails. The page opens
from disk, makes no network requests and never interprets prompts as markup or code.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import os
import sysconfig
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import quote

from PIL import Image

from selfe import config
from selfe.errors import UserError
from selfe.inference.prompts import shipped_class
from selfe.io import image_encode

EMBED_BYTES = 24 * 2**20  # jobs up to this size are embedded in the page
MOST = 20_000  # maximum number of images for a gallery that is built automatically
THUMBNAIL = 384  # longer side, pixels
MIME = {".png": "image/png", ".jpg": "image/jpeg", ".webp": "image/webp"}
FACTS = (
    "prompt",
    "negative_prompt",
    "seed",
    "sample",
    "height",
    "width",
    "cfg_scale",
    "s_ratio",
    "sampler",
    "weights",
    "fingerprint",
)
# all other keys are sampler parameters
NOT_PARAMETERS = {*FACTS, "file", "num_steps", "nfe", "guidance_interval", "step", "checkpoint", "category"}


def build(folders: Sequence[Path], output: Path, embed_bytes: int = EMBED_BYTES) -> None:
    """Write the gallery of one job, or of several jobs side by side."""
    jobs = [read(folder) for folder in folders]
    paths = [folder / record["file"] for folder, job in zip(folders, jobs, strict=True) for record in job]
    embed = sum(path.stat().st_size for path in paths) <= embed_bytes
    thumbs = {} if embed else thumbnails(paths, output.parent / "thumbs")

    # group images that differ only in the number of steps: one sweep per group
    prompts: dict[str, int] = {}
    sweeps: dict[tuple, dict] = {}
    for number, (folder, job) in enumerate(zip(folders, jobs, strict=True)):
        for record in job:
            facts = describe(record) | {"folder": number, "files": {}}
            facts["prompt"] = prompts.setdefault(record["prompt"], len(prompts))
            sweep = sweeps.setdefault((number, json.dumps(facts)), facts)

            path, num_steps = folder / record["file"], record["num_steps"]
            sweep["files"][num_steps] = inline(path) if embed else relative(path, output)
            if embed:
                sweep.setdefault("names", {})[num_steps] = path.name
            if path in thumbs:
                sweep.setdefault("thumbs", {})[num_steps] = relative(thumbs[path], output)

    one_title = "/".join(folders[0].resolve().parts[-2:])
    data = {
        "title": " and ".join(names(folders)) if len(folders) > 1 else one_title,
        "about": ", ".join(dict.fromkeys(f"step {job[0]['step']:,}" for job in jobs)),
        "folders": [about(*each) for each in zip(folders, names(folders), jobs, strict=True)],
        "prompts": list(prompts),
        # images to compare are adjacent: the same sample of all folders, then of all weights
        "sweeps": sorted(sweeps.values(), key=lambda s: (s["sample"], s["cfg_scale"], s["s_ratio"], s["sampler"])),
    }
    image_encode.write(output, page(data).encode())


def describe(record: dict) -> dict:
    """The settings of an image that the page shows."""
    facts = {name: record[name] for name in FACTS} | {"guidance_interval": record.get("guidance_interval")}
    facts["parameters"] = {name: record[name] for name in record if name not in NOT_PARAMETERS}
    facts["sampler_setting"] = sampler_setting(record["sampler"], facts["parameters"])
    return facts


def page(data: dict) -> str:
    """The page with its data and script inserted.

    Characters that could end the JSON element are escaped, and the Content Security Policy allows only the script with
    the given digest.
    """
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")

    template, code = ((files("selfe.gallery") / name).read_text(encoding="utf-8") for name in ("page.html", "page.js"))
    digest = base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()

    before, _, rest = template.replace("{{hash}}", f"sha256-{digest}").partition("{{data}}")
    between, _, after = rest.partition("{{code}}")
    return before + text + between + code + after


def read(folder: Path) -> list[dict]:
    """The records of `metadata.jsonl` whose images exist.

    Raises:
        UserError: the file is missing or invalid, or none of its images exist.
    """
    path = folder / "metadata.jsonl"
    try:
        records = [json.loads(line) for line in path.read_bytes().split(b"\n") if line]
        there = [record for record in records if (folder / record["file"]).is_file()]
        if not there or any(name not in record for record in there for name in (*FACTS, "num_steps", "step")):
            raise UserError(f"{path}: no images that exist, or incomplete records; run infer.sh again")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; give the output directory of a completed infer.sh") from error
    except (ValueError, KeyError, TypeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path}: not a metadata file of infer.sh ({error}); run infer.sh again") from error
    return there


def sampler_setting(name: str, parameters: dict) -> str:
    """The value of `inferencer.defaults.sampler` as JSON."""
    module = name if "." in name else shipped_class(name)
    return json.dumps({"module": module, "params": parameters}, ensure_ascii=False)


def python_path(config_file: Path, job: Sequence[dict]) -> str:
    """The folders from which Python imports classes outside of selfe, as a value of PYTHONPATH.

    Empty if there are none, or if Python finds them anyway: installed packages and modules in the working directory.
    """
    samplers = {record["sampler"] for record in job if "." in record["sampler"]}
    parts = config.foreign_modules(config.resolve(config_file)) if config_file.is_file() else []
    standard = {Path(path).resolve() for path in sysconfig.get_paths().values()} | {Path.cwd()}

    folders: list[str] = []
    for package in dict.fromkeys(path.partition(".")[0] for path in (*samplers, *parts)):
        spec = find_spec(package) if package.isidentifier() and package != "selfe" else None
        if spec is None or not (spec.origin or spec.submodule_search_locations):
            continue

        # a package is a folder, a module a file
        is_package = spec.submodule_search_locations is not None
        location = Path(spec.submodule_search_locations[0] if is_package else spec.origin)
        folder = location.parent.resolve()
        if folder not in standard:
            folders.append(str(folder))
    return os.pathsep.join(dict.fromkeys(folders))


def about(folder: Path, name: str, job: Sequence[dict]) -> dict:
    """The facts of a job that the page shows."""
    config_file = folder / "config.yaml"
    return {
        "name": name,
        "path": str(folder),
        "config": str(config_file),
        "python_path": python_path(config_file, job),
        "checkpoint": job[0].get("checkpoint", ""),
        "step": job[0]["step"],
    }


def names(folders: Sequence[Path]) -> list[str]:
    """The shortest trailing paths that distinguish the folders."""
    parts = [folder.resolve().parts for folder in folders]
    depth = next((n for n in range(1, max(map(len, parts))) if len({p[-n:] for p in parts}) == len(parts)), 1)
    return ["/".join(p[-depth:]) for p in parts]


def inline(path: Path) -> str:
    """An image file as a data URL."""
    return f"data:{MIME[path.suffix]};base64,{base64.b64encode(path.read_bytes()).decode()}"


def relative(path: Path, output: Path) -> str:
    """The URL of a file relative to the page."""
    return quote(Path(os.path.relpath(path.resolve(), output.parent.resolve())).as_posix())


def thumbnails(paths: Iterable[Path], folder: Path) -> dict[Path, Path]:
    """Write thumbnails of images larger than `THUMBNAIL` that are missing or outdated; returns image -> thumbnail."""

    def small(path: Path) -> tuple[Path, Path] | None:
        place = Path(os.path.relpath(path.with_suffix(".webp").resolve(), folder.parent.resolve()))
        thumb = folder / "_".join(part for part in place.parts if part != "..")
        if thumb.exists() and thumb.stat().st_mtime >= path.stat().st_mtime:
            return path, thumb
        with Image.open(path) as image:
            if max(image.size) <= THUMBNAIL:
                return None
            image = image.convert("RGB")
            image.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
        partial = thumb.with_name(thumb.name + image_encode.PARTIAL)
        image.save(partial, "webp", quality=85)
        partial.replace(thumb)
        return path, thumb

    folder.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(filter(None, pool.map(small, dict.fromkeys(paths))))


def main(options: argparse.Namespace) -> None:
    """The verb `gallery`."""
    output = options.output or options.folders[0] / ("gallery.html" if len(options.folders) == 1 else "compare.html")
    build(options.folders, output, int(options.embed_mb * 2**20))
    print(output)
