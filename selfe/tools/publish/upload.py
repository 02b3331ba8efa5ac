"""Upload of a folder to the Hugging Face Hub. Files that it already has are not sent again."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import HfApi, constants
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError
from huggingface_hub.utils import validate_repo_id

from selfe.errors import UserError

AGAIN = "run the same command again: files that are complete on the Hub are not sent again"
ADVICE = {
    401: "the token is missing, invalid or expired; log in with `hf auth login`, or set HF_TOKEN",
    403: "the token has no write access to this repository; create one with write access",
    429: f"too many requests; wait some minutes, then {AGAIN}",
}


def check_name(repo: str) -> None:
    """Raise UserError unless a name is USER/NAME."""
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise UserError(f"--to: {repo!r} is no name of a repository ({error}); give USER/NAME") from error
    if "/" not in repo:
        raise UserError(f"--to: {repo!r} has no user or organisation; give USER/NAME")


def push(folder: Path, repo: str, private: bool, ignore: Sequence[str]) -> str:
    """Upload a folder and return the address of its commit. Raises UserError.

    huggingface_hub repeats requests that fail for a moment: cut connections, 429 and 5xx.
    """
    api = HfApi()
    try:
        api.create_repo(repo, private=private, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo, folder_path=folder, ignore_patterns=list(ignore), commit_message="Upload by selfe publish"
        )
    except (HTTPError, OSError, RuntimeError) as error:
        raise UserError(f"{repo}: {describe(http_error(error) or error)}") from error
    return commit.commit_url


def http_error(error: BaseException | None) -> HTTPError | None:
    """The failed request behind an error; huggingface_hub wraps those of large files."""
    while error is not None and not isinstance(error, HTTPError):
        error = error.__cause__
    return error


def describe(error: Exception) -> str:
    """What failed, and what to do."""
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        return f"the Hub returned {status}: {ADVICE.get(status, AGAIN)}"
    if isinstance(error, HTTPError):
        return f"no connection to {constants.ENDPOINT} ({type(error).__name__}); {AGAIN}"
    return f"the upload was interrupted ({str(error).splitlines()[0]}); {AGAIN}"
