"""Fetch the frozen encoders into the folder that SELFE_CACHE_DIR names. Run again, it continues where it stopped.

    t5-v1_1-xxl/             google/t5-v1_1-xxl: tokenizer, and the encoder in bf16, converted once from the 45 GB that
                             the Hub keeps of the whole model, which are then deleted
    clip-vit-large-patch14/  openai/clip-vit-large-patch14
    ae.safetensors           black-forest-labs/FLUX.1-dev, which is gated: accept its licence on its page first
    flux1-dev.safetensors    the same; left out with --flux-vae-only
    fetched.json             what came from where

Every file is checked against the Hub's hash. Exit code: 0 done, 2 with one line that says what to do.
"""

from __future__ import annotations

import argparse
import errno
import hashlib
import json
import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import torch
from huggingface_hub import HfApi, constants, get_hf_file_metadata, hf_hub_url
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, HTTPError
from huggingface_hub.file_download import http_get
from huggingface_hub.utils import build_hf_headers
from tqdm import tqdm

from selfe.types import UserError
from selfe.weights import INDEX, write

RECORD = "fetched.json"
TOKENIZER = {"config.json", "tokenizer_config.json", "special_tokens_map.json", "tokenizer.json"}
KEPT = "what was fetched is kept, run again"


@dataclass(frozen=True)
class Part:
    repo: str
    folder: str  # in the cache
    files: frozenset[str]  # as many of them as the repository has
    needed: str  # one that it must have, or the stem of weights in some format


@dataclass(frozen=True)
class File:
    """A file on the Hub: `hash` is sha256 of large files, git's sha1 of small ones."""

    repo: str
    commit: str
    name: str
    size: int
    hash: str
    location: str


def parts(vae_only: bool) -> list[Part]:
    flux = ["ae.safetensors"] if vae_only else ["ae.safetensors", "flux1-dev.safetensors"]
    return [
        Part("google/t5-v1_1-xxl", "t5-v1_1-xxl", frozenset(TOKENIZER | {"spiece.model"}), "model"),
        Part(
            "openai/clip-vit-large-patch14",
            "clip-vit-large-patch14",
            frozenset(TOKENIZER | {"vocab.json", "merges.txt"}),
            "model",
        ),
        *(Part("black-forest-labs/FLUX.1-dev", ".", frozenset([name]), name) for name in flux),
    ]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="scripts/cache_pretrained_only.sh",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--cache-dir", type=Path, required=True, metavar="DIR", help="where to; made if it is missing")
    parser.add_argument("--hf-token", metavar="TOKEN", help="a Hugging Face token (default: HF_TOKEN); not stored")
    parser.add_argument("--flux-vae-only", action="store_true", help="without FLUX's transformer (24 GB)")
    arguments = parser.parse_args(argv)
    cache, token = arguments.cache_dir, arguments.hf_token
    record = read_record(cache)
    todo = [part for part in parts(arguments.flux_vae_only) if not is_done(cache, part, record)]
    plan = [(part, list_files(part, token)) for part in todo]  # every access is tried before anything is fetched
    check_space(cache, plan)
    for part, files in plan:
        folder = cache / part.folder
        folder.mkdir(parents=True, exist_ok=True)
        for file in files:
            fetch(file, folder, token)
        names = [file.name for file in files]
        if pickles := [name for name in names if name.endswith(".bin")]:
            names = [name for name in names if name not in pickles] + convert(folder, pickles)
        sizes = {name: (folder / name).stat().st_size for name in names}
        record[f"{part.folder}/{part.needed}"] = {"repo": part.repo, "commit": files[0].commit, "files": sizes}
        (cache / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(f"{cache} is complete; export SELFE_CACHE_DIR={cache.resolve()}")


# ---- what is there, what is wanted ----


def read_record(cache: Path) -> dict:
    path = cache / RECORD
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error}); remove it and run again, whole files are kept") from error


def is_done(cache: Path, part: Part, record: dict) -> bool:
    folder, entry = cache / part.folder, record.get(f"{part.folder}/{part.needed}")
    return entry is not None and all(
        (folder / name).is_file() and (folder / name).stat().st_size == size for name, size in entry["files"].items()
    )


def list_files(part: Part, token: str | None) -> list[File]:
    """What to fetch of a repository: of weights one format, safetensors if it has them."""
    with explained(part.repo):
        info = HfApi(token=token).model_info(part.repo)
        names = {sibling.rfilename for sibling in info.siblings}
        wanted = sorted(names & part.files)
        if part.needed == "model":
            found = [name for name in names if re.fullmatch(rf"model(-\d+-of-\d+)?\.safetensors|model{INDEX}", name)]
            wanted += sorted(
                found or [name for name in names if re.fullmatch(r"pytorch_model(-\d+-of-\d+)?\.bin", name)]
            )
        if not any(name.startswith((part.needed, "pytorch_model")) for name in wanted):
            raise UserError(f"{part.repo}: the repository has no {part.needed} file; has it moved?")
        return [head(part.repo, name, info.sha, token) for name in wanted]


def head(repo: str, name: str, commit: str, token: str | None) -> File:
    found = get_hf_file_metadata(hf_hub_url(repo, name, revision=commit), token=token)
    return File(repo, commit, name, found.size, found.etag, found.location)


def check_space(cache: Path, plan: list[tuple[Part, list[File]]]) -> None:
    needed = 0
    for part, files in plan:
        folder = cache / part.folder
        for file in files:
            have = next(
                (path.stat().st_size for path in (folder / file.name, partial(folder, file)) if path.is_file()), 0
            )
            needed += max(file.size - have, 0)
            if file.name.endswith(".bin"):
                needed += file.size // 4  # the encoder in half precision: half the tensors at half the width
    existing = next(path for path in (cache, *cache.resolve().parents) if path.is_dir())
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise UserError(
            f"{cache}: {needed / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB are free; make room or name another folder"
        )
    if needed:
        print(f"fetching {needed / 1e9:.1f} GB into {cache} ({free / 1e9:.1f} GB are free)", flush=True)


# ---- fetching ----


def partial(folder: Path, file: File) -> Path:
    """A file on its way; another version of it has another name."""
    return folder / f"{file.name}.{file.hash[:12]}.part"


def fetch(file: File, folder: Path, token: str | None) -> None:
    """A whole, checked file in the folder. A partial one is continued; short breaks http_get survives by itself."""
    final, part = folder / file.name, partial(folder, file)
    if final.is_file() and final.stat().st_size == file.size and digest(final, file) == file.hash:
        return
    with explained(file.repo):
        file = head(file.repo, file.name, file.commit, token)  # addresses of large files expire
        headers = build_hf_headers(token=token)
        if urlsplit(file.location).netloc != urlsplit(constants.ENDPOINT).netloc:
            headers.pop("authorization", None)  # a signed address of another host: the token is not for it
        with part.open("ab") as stream:
            have = stream.tell()
            if have < file.size:
                http_get(file.location, stream, resume_size=have, headers=headers, expected_size=file.size)
    if (size := part.stat().st_size) != file.size or digest(part, file) != file.hash:
        part.unlink()
        raise UserError(
            f"{final}: {size} bytes came, and they are not the {file.size} bytes with hash {file.hash} that "
            f"{file.repo} promises; they are removed, run again"
        )
    part.replace(final)


def digest(path: Path, file: File) -> str:
    """The Hub's hash of a local file."""
    if re.fullmatch("[0-9a-f]{64}", file.hash):
        hasher = hashlib.sha256()
    else:
        hasher = hashlib.sha1(f"blob {path.stat().st_size}\0".encode())
    with (
        path.open("rb") as stream,
        tqdm(
            desc=f"checking {file.name}", total=file.size, unit="B", unit_scale=True, disable=file.size < 10**9
        ) as bar,
    ):
        while chunk := stream.read(1 << 24):
            hasher.update(chunk)
            bar.update(len(chunk))
    return hasher.hexdigest()


@contextmanager
def explained(repo: str) -> Iterator[None]:
    """Whatever goes wrong between here and the Hub, as one line."""
    try:
        yield
    except GatedRepoError as error:
        page = f"{constants.ENDPOINT}/{repo}"
        raise UserError(
            f"{repo}: gated; accept its licence on {page}, then run again with --hf-token and a token of that account"
        ) from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        advice = {
            401: "give --hf-token a valid token",
            403: "the token lacks the permission to read this repository",
            404: "there is no such repository or file, or the token may not see it",
        }
        raise UserError(f"{repo}: the Hub answers {status}: {advice.get(status, KEPT)}") from error
    except HTTPError as error:
        raise UserError(
            f"{repo}: no connection to {constants.ENDPOINT} ({type(error).__name__}); {KEPT} when there is one"
        ) from error
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise UserError(f"{repo}: the disk is full; make room, {KEPT}") from error
        raise UserError(f"{repo}: broken off ({str(error).splitlines()[0]}); {KEPT}") from error


# ---- T5's encoder out of a pickle of the whole model ----


def convert(folder: Path, names: list[str]) -> list[str]:
    """The encoder in bf16 as safetensors, from files of torch.save that are then deleted; returns the new names."""
    print(f"converting T5's encoder to bf16 in {folder}", flush=True)
    tensors = {}
    for name in names:
        for key, tensor in load_pickle(folder / name).items():
            if key == "shared.weight" or (key.startswith("encoder.") and key != "encoder.embed_tokens.weight"):
                tensors[key] = tensor
    sizes = {key: 2 * tensors[key].numel() for key in sorted(tensors)}
    written = write(folder, "model", sizes, lambda key: {key: tensors[key].to(torch.bfloat16)})
    for name in names:
        (folder / name).unlink()
    return written


def load_pickle(path: Path) -> dict[str, torch.Tensor]:
    """Tensors only (`weights_only`), mapped from the file where its format allows that."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except RuntimeError:  # the format of 2020 and before, which has to be read as a whole
        return torch.load(path, map_location="cpu", weights_only=True)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(f"selfe: error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"selfe: interrupted; {KEPT}", file=sys.stderr)
        sys.exit(130)
