"""Install into .venv what uv.lock lists. Called by setup.sh, and so by run.sh, infer.sh and test.sh at every start.

Writes to .venv and .uv only: no git configuration, no tracked file. A stamp makes the next start immediate. Several
nodes may start at once on one file system: one installs, the others wait. A torch that the user has put into .venv is
kept. `.venv` is never emptied: extras and packages that the user has added stay.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
VENV, UV = ROOT / ".venv", ROOT / ".uv"
PYTHON = VENV / "bin/python"
STAMPS = VENV / ".selfe"  # what has been installed: a file for each set of options, and `torch`


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/setup.sh", description="Install into .venv what uv.lock lists.")
    parser.add_argument("--dev", action="store_true", help="also the tools that the tests need")
    parser.add_argument("--extra", action="append", default=[], metavar="NAME", help="of pyproject.toml, such as demo")
    parser.add_argument("--group", action="append", default=[], metavar="NAME", help="bench")
    options = parser.parse_args()

    stamp = STAMPS / fingerprint(options)
    if stamp.exists() and PYTHON.exists():
        return 0

    # released by the system when the process ends, however it ends
    with (ROOT / ".setup.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if stamp.exists() and PYTHON.exists():
            return 0  # another process has installed it meanwhile
        try:
            install(options)
        except subprocess.CalledProcessError as error:
            if not usable():
                report(f"installation failed: {' '.join(map(str, error.cmd[:3]))} ended with {error.returncode}")
                return error.returncode
            report("warning: could not update .venv (see above); continuing with what it holds")
            return 0
        STAMPS.mkdir(exist_ok=True)
        stamp.touch()
    return 0


def fingerprint(options: argparse.Namespace) -> str:
    """A name for what these options install."""
    digest = hashlib.sha256(repr(sorted(vars(options).items())).encode())
    for name in ("pyproject.toml", "uv.lock"):
        digest.update((ROOT / name).read_bytes())
    return digest.hexdigest()[:16]


def install(options: argparse.Namespace) -> None:
    uv = find_uv()
    if not PYTHON.exists():
        report("installing into .venv (once; several GB with the GPU libraries)")
        run(uv, "venv", "--quiet", "--allow-existing", VENV)

    # the list of pinned packages comes from uv.lock without resolving anything
    wanted = [word for kind in ("extra", "group") for name in getattr(options, kind) for word in (f"--{kind}", name)]
    wanted += [] if options.dev else ["--no-dev"]
    export = [uv, "export", "--frozen", "--quiet", "--no-hashes", "--no-emit-project", *wanted]
    version = re.search(r"^torch==([\w.]+)", output(*export), re.MULTILINE)[1]
    installed, ours = installed_torch(), recorded_torch()
    keeps_torch = installed is not None and installed != ours
    if keeps_torch:
        report(f"keeping the torch {installed} that is in .venv")
    other_build = not keeps_torch and needs_other_build()
    if keeps_torch or other_build:
        export += ["--prune", "torch"]

    if other_build:
        report("the GPU driver is older than CUDA 13: installing the build of torch that fits it")
        run(uv, "pip", "install", "--quiet", "--python", PYTHON, "--torch-backend=auto", f"torch=={version}")
    run(uv, "pip", "install", "--quiet", "--python", PYTHON, "--no-deps", "-r", "-", given=output(*export))
    run(uv, "pip", "install", "--quiet", "--python", PYTHON, "--no-deps", "--editable", ROOT)

    if not keeps_torch and (installed := installed_torch()):
        STAMPS.mkdir(exist_ok=True)
        (STAMPS / "torch").write_text(installed)


def find_uv() -> Path:
    """uv from the PATH, or our own copy in .uv."""
    if uv := shutil.which("uv"):
        return Path(uv)
    uv = UV / "bin/uv"
    if not uv.exists():
        report("installing uv into .uv")
        quiet = ["--quiet", "--disable-pip-version-check"]
        run(sys.executable, "-m", "pip", "install", *quiet, "--target", UV, "uv")
    return uv


def installed_torch() -> str | None:
    """Version of the torch in .venv, with its build: 2.13.0+cu126."""
    installed = sorted(VENV.glob("lib/python*/site-packages/torch-*.dist-info"))
    return installed[0].name[len("torch-") : -len(".dist-info")] if installed else None


def recorded_torch() -> str | None:
    """Version of the torch that this script has installed."""
    path = STAMPS / "torch"
    return path.read_text() if path.exists() else None


def needs_other_build() -> bool:
    """Whether there is a GPU whose driver is too old for the locked build of torch, which needs CUDA 13."""
    if not shutil.which("nvidia-smi"):
        return False
    done = subprocess.run(["nvidia-smi"], capture_output=True, text=True, check=False)
    version = re.search(r"CUDA Version: (\d+)\.", done.stdout)
    return bool(version) and int(version[1]) < 13


def usable() -> bool:
    return PYTHON.exists() and installed_torch() is not None


def run(*words: object, given: str | None = None) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "VIRTUAL_ENV"}
    subprocess.run([*map(str, words)], input=given, text=True, cwd=ROOT, env=environment, stdout=sys.stderr, check=True)


def output(*words: object) -> str:
    return subprocess.run([*map(str, words)], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True).stdout


def report(message: str) -> None:
    print(f"selfe: {message}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
