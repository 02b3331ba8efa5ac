"""The verb `selfe cache-pretrained`: download the frozen encoders into SELFE_CACHE_DIR.

    t5-v1_1-xxl/             google/t5-v1_1-xxl: tokenizer, and the encoder in bf16, converted once from the Hub's 45 GB
                             checkpoint of the complete model, which is then deleted
    clip-vit-large-patch14/  openai/clip-vit-large-patch14
    ae.safetensors           black-forest-labs/FLUX.1-dev (gated)
    flux1-dev.safetensors    the same repository; skipped with --flux-vae-only
    OWNER/NAME/              with --text-encoder, --autoencoder or --vision-model OWNER/NAME, and then nothing else: a
                             model for HFText, DiffusersVAE, or HFVision and HFExtractor
    fetched.json             source repository, commit and file sizes of each part

Partial downloads are resumed, and every file is verified against the Hub's hash.
"""

from __future__ import annotations

import argparse
import errno
import hashlib
import json
import re
import shutil
from collections.abc import Iterator
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

from selfe.errors import UserError
from selfe.io.safetensors_files import INDEX, write

RECORD = "fetched.json"
TOKENIZER = {"config.json", "tokenizer_config.json", "special_tokens_map.json", "tokenizer.json"}
# files of tokenizers of other models
TOKENIZERS = TOKENIZER | {
    "added_tokens.json",
    "merges.txt",
    "sentencepiece.bpe.model",
    "spiece.model",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
}
STEMS = {"model": "pytorch_model", "diffusion_pytorch_model": "diffusion_pytorch_model"}  # safetensors: torch.save
KEPT = "downloaded data is kept, run again"


@dataclass(frozen=True)
class Part:
    """What to download from one repository into one folder of the cache."""

    repo: str
    folder: str  # relative to the cache
    files: frozenset[str]  # optional files: those that the repository has
    needed: str  # required file, or the stem of weight files in any format
    safetensors_only: bool = False
    inside: str = ""  # folder of the repository that holds the files, with a slash at its end


@dataclass(frozen=True)
class File:
    """A file on the Hub; `hash` is the sha256 of large (LFS) files and the git blob sha1 of small ones."""

    repo: str
    commit: str
    name: str
    remote: str  # the name with its folder in the repository
    size: int
    hash: str
    location: str


def parts(options: argparse.Namespace) -> list[Part]:
    """What to download: the models that are named, if any are, otherwise the encoders of the paper."""
    named = [text_encoder(name) for name in options.text_encoder]
    named += [autoencoder(name) for name in options.autoencoder]
    named += [vision_model(name) for name in options.vision_model]
    return list(dict.fromkeys(named)) or paper(options.flux_vae_only)


def paper(vae_only: bool) -> list[Part]:
    """T5, CLIP, and FLUX's autoencoder and transformer."""

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


def text_encoder(repo: str) -> Part:
    """A text encoder by its name on the Hub, for `selfe.encoders.hf_text.HFText`. Raises UserError for other text."""
    if not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", repo):
        raise UserError(f"--text-encoder {repo}: give a name on the Hub, such as Qwen/Qwen3-0.6B")
    return Part(repo, repo, frozenset(TOKENIZERS), "model", safetensors_only=True)


def autoencoder(name: str) -> Part:
    """An autoencoder by its name on the Hub, for `selfe.encoders.diffusers_vae.DiffusersVAE`; that of a pipeline is in
    a folder of the repository. Raises UserError for other text.
    """
    parsed = re.fullmatch(r"(\w[\w.-]*/\w[\w.-]*)(?:/(\w[\w.-]*))?", name)
    if parsed is None:
        raise UserError(
            f"--autoencoder {name}: give a name on the Hub, such as stabilityai/sdxl-vae, or with the folder of a "
            "pipeline, such as stabilityai/stable-diffusion-3.5-large/vae"
        )
    repo, folder = parsed.groups()
    inside = f"{folder}/" if folder else ""
    return Part(repo, name, frozenset({"config.json"}), "diffusion_pytorch_model", safetensors_only=True, inside=inside)


def vision_model(repo: str) -> Part:
    """A vision model by its name on the Hub, for `selfe.encoders.hf_vision.HFVision` and for evaluation. Raises
    UserError for other text.
    """
    if not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", repo):
        raise UserError(f"--vision-model {repo}: give a name on the Hub, such as facebook/dinov2-base")
    # CLIP and SigLIP have a tokenizer, which evaluation of captions reads
    files = frozenset(TOKENIZERS | {"preprocessor_config.json"})
    return Part(repo, repo, files, "model", safetensors_only=True)


def main(options: argparse.Namespace) -> None:
    """Entry point of `selfe cache-pretrained`."""
    cache, token = options.cache_dir, options.hf_token
    record = read_record(cache)
    todo = [part for part in parts(options) if not is_done(cache, part, record)]

    # check access to every repository before the first download
    plan = [(part, list_files(part, token)) for part in todo]
    check_space(cache, plan)

    for part, files in plan:
        folder = cache / part.folder
        folder.mkdir(parents=True, exist_ok=True)
        for file in files:
            fetch(file, folder, token)

        # T5 is published in the torch.save format only
        names = [file.name for file in files]
        if pickles := [name for name in names if name.endswith(".bin")]:
            names = [name for name in names if name not in pickles] + convert(folder, pickles)

        # recorded last: an entry means that the part is complete
        sizes = {name: (folder / name).stat().st_size for name in names}
        record[f"{part.folder}/{part.needed}"] = {"repo": part.repo, "commit": files[0].commit, "files": sizes}
        (cache / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(f"{cache} is complete; export SELFE_CACHE_DIR={cache.resolve()}")


# ---- what is cached, what is missing ----


def read_record(cache: Path) -> dict:
    path = cache / RECORD
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error}); remove it and run again, complete files are kept") from error


def is_done(cache: Path, part: Part, record: dict) -> bool:
    folder, entry = cache / part.folder, record.get(f"{part.folder}/{part.needed}")
    return entry is not None and all(
        (folder / name).is_file() and (folder / name).stat().st_size == size for name, size in entry["files"].items()
    )


def list_files(part: Part, token: str | None) -> list[File]:
    """The files to download from a repository; weights in one format only, safetensors if available."""
    with explained(part.repo):
        info = HfApi(token=token).model_info(part.repo)
        everything = {sibling.rfilename for sibling in info.siblings}
        names = {name.removeprefix(part.inside) for name in everything if name.startswith(part.inside)}
        wanted = sorted(names & part.files)

        if stem := STEMS.get(part.needed):
            weights = rf"{part.needed}(-\d+-of-\d+)?\.safetensors|{part.needed}{re.escape(INDEX)}"
            safetensors = [name for name in names if re.fullmatch(weights, name)]
            pickles = [name for name in names if re.fullmatch(rf"{stem}(-\d+-of-\d+)?\.bin", name)]
            if part.safetensors_only and pickles and not safetensors:
                raise UserError(
                    f"{part.repo}: the repository has its weights only as {pickles[0]}, which is not loaded because it "
                    "can run code; choose one with safetensors"
                )
            wanted += sorted(safetensors or pickles)
        if not any(name.startswith((part.needed, "pytorch_model")) for name in wanted):
            raise UserError(
                f"{part.repo}: the repository has no {part.inside}{part.needed} file; check that it has not moved"
            )
        return [head(part.repo, part.inside + name, info.sha, token) for name in wanted]


def head(repo: str, remote: str, commit: str, token: str | None) -> File:
    """Size, hash and current download address of a file, from a HEAD request."""
    metadata = get_hf_file_metadata(hf_hub_url(repo, remote, revision=commit), token=token)
    name = remote.rpartition("/")[2]
    return File(repo, commit, name, remote, metadata.size, metadata.etag, metadata.location)


def check_space(cache: Path, plan: list[tuple[Part, list[File]]]) -> None:
    """Raise a UserError unless the disk has space for all that is still to be downloaded and converted."""
    needed = 0
    for part, files in plan:
        folder = cache / part.folder
        for file in files:
            have = next(
                (path.stat().st_size for path in (folder / file.name, partial(folder, file)) if path.is_file()), 0
            )
            needed += max(file.size - have, 0)
            if file.name.endswith(".bin"):
                needed += file.size // 4  # the converted encoder: half of the parameters, in half precision

    existing = next(path for path in (cache, *cache.resolve().parents) if path.is_dir())
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise UserError(
            f"{cache}: {needed / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB are free; "
            "free some disk space or choose another --cache-dir"
        )
    if needed:
        print(f"downloading {needed / 1e9:.1f} GB to {cache} ({free / 1e9:.1f} GB free)", flush=True)


# ---- downloads ----


def partial(folder: Path, file: File) -> Path:
    """Path of a partial download; the hash in its name keeps versions apart."""
    return folder / f"{file.name}.{file.hash[:12]}.part"


def fetch(file: File, folder: Path, token: str | None) -> None:
    """Download a file and verify its hash. Partial downloads are resumed; http_get retries short interruptions.

    hf_hub_download would start a file of 45 GB from the beginning: it removes what an interrupted download has written.
    """
    final, incomplete = folder / file.name, partial(folder, file)
    if final.is_file() and final.stat().st_size == file.size and digest(final, file) == file.hash:
        return

    with explained(file.repo):
        file = head(file.repo, file.remote, file.commit, token)  # signed addresses of large files expire
        headers = build_hf_headers(token=token)
        if urlsplit(file.location).netloc != urlsplit(constants.ENDPOINT).netloc:
            headers.pop("authorization", None)  # a signed address on another host: do not send it the token
        with incomplete.open("ab") as stream:
            have = stream.tell()
            if have < file.size:
                http_get(file.location, stream, resume_size=have, headers=headers, expected_size=file.size)

    if (size := incomplete.stat().st_size) != file.size or digest(incomplete, file) != file.hash:
        incomplete.unlink()
        raise UserError(
            f"{final}: received {size} bytes that do not match size {file.size} and hash {file.hash} listed by "
            f"{file.repo}; the download is removed, run again"
        )
    incomplete.replace(final)


def digest(path: Path, file: File) -> str:
    """The hash of a local file, of the kind that the Hub lists for it."""
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
    """Turn errors of requests to the Hub, and of the disk, into UserErrors."""
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
            401: "pass a valid token with --hf-token",
            403: "the token lacks the permission to read this repository",
            404: "no such repository or file, or the token has no access to it",
        }
        raise UserError(f"{repo}: the Hub returned {status}: {advice.get(status, KEPT)}") from error
    except HTTPError as error:
        raise UserError(
            f"{repo}: no connection to {constants.ENDPOINT} ({type(error).__name__}); "
            f"{KEPT} once the network is available"
        ) from error
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise UserError(f"{repo}: the disk is full; free some space, {KEPT}") from error
        raise UserError(f"{repo}: download interrupted ({str(error).splitlines()[0]}); {KEPT}") from error


# ---- extract T5's encoder from a torch.save file of the complete model ----


def convert(folder: Path, names: list[str]) -> list[str]:
    """Write the encoder in bf16 as safetensors and delete the torch.save files; returns the names of the new files."""
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
    """Tensors only (`weights_only`), memory-mapped where the file format supports it."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except RuntimeError:  # the legacy format (before torch 1.6) cannot be memory-mapped
        return torch.load(path, map_location="cpu", weights_only=True)
