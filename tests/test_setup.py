"""Set-up: installs once, however many start at once; writes nothing outside .venv and .uv; keeps the user's torch."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
UV = """\
#!/bin/sh
# a stand-in for uv: records its calls, and installs a torch that is only a name
echo "$@" >> "$CALLS"
case "$1 $2" in
    "venv "*) mkdir -p .venv/bin .venv/lib/python3/site-packages; ln -sf "$(command -v python3)" .venv/bin/python ;;
    "export "*) echo "torch==2.13.0 ; sys_platform != 'none'" ;;
    "pip install") [ -z "$FAILS" ] || exit 1
                   rm -rf .venv/lib/python3/site-packages/torch-*.dist-info
                   mkdir -p .venv/lib/python3/site-packages/torch-2.13.0.dist-info ;;
esac
"""


@pytest.fixture
def checkout(tmp_path, monkeypatch) -> Path:
    """A copy of what set-up reads, with a stand-in for uv on the PATH."""
    folder = tmp_path / "checkout"
    (folder / "scripts").mkdir(parents=True)
    for name in ("scripts/setup.sh", "scripts/setup.py", "pyproject.toml", "uv.lock"):
        shutil.copy(ROOT / name, folder / name)
    tool(tmp_path / "bin/uv", UV)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("CALLS", str(tmp_path / "calls"))
    return folder


def tool(path: Path, text: str) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


def start(checkout: Path, *options: str) -> subprocess.Popen:
    return subprocess.Popen([checkout / "scripts/setup.sh", *options], stderr=subprocess.PIPE, text=True)


def calls(checkout: Path) -> list[str]:
    path = checkout.parent / "calls"
    calls = path.read_text().splitlines() if path.exists() else []
    path.unlink(missing_ok=True)
    return calls


def setup(checkout: Path, *options: str) -> tuple[list[str], str]:
    """Run it; the calls of uv, and what it printed."""
    process = start(checkout, *options)
    printed = process.communicate(timeout=60)[1]
    assert process.returncode == 0, printed
    return calls(checkout), printed


def test_eight_processes_at_once_install_once(checkout):
    for number in range(5):
        with (checkout / "pyproject.toml").open("a") as file:
            file.write(f"# version {number}\n")
        processes = [start(checkout) for _ in range(8)]
        printed = [process.communicate(timeout=60)[1] for process in processes]
        assert [process.returncode for process in processes] == [0] * 8, printed
        assert sum(call.startswith("pip install") for call in calls(checkout)) == 2  # the packages, the project


def test_a_second_start_calls_nothing(checkout):
    assert setup(checkout, "--dev")[0]
    assert setup(checkout, "--dev")[0] == []
    assert setup(checkout, "--extra", "demo")[0]  # other options are another installation
    assert setup(checkout, "--dev")[0] == []


def test_writes_to_its_own_folders_only(checkout):
    before = {path.name: path.read_bytes() for path in checkout.iterdir() if path.is_file()}
    setup(checkout)
    after = {path.name: path.read_bytes() for path in checkout.iterdir() if path.is_file()}
    assert after == before | {".setup.lock": b""}
    assert "git" not in (checkout / "scripts/setup.py").read_text().replace("no git configuration", "")


def test_the_users_torch_is_kept(checkout):
    setup(checkout)
    packages = checkout / ".venv/lib/python3/site-packages"
    (packages / "torch-2.13.0.dist-info").rename(packages / "torch-2.11.0+cu126.dist-info")
    (checkout / "uv.lock").write_text("other")
    calls, printed = setup(checkout)
    assert "keeping the torch 2.11.0+cu126" in printed
    assert any(call.startswith("export") and call.endswith("--prune torch") for call in calls)


@pytest.mark.parametrize(("cuda", "other"), [("12.4", True), ("13.0", False)])
def test_an_old_driver_gets_the_build_that_fits(checkout, cuda, other):
    tool(checkout.parent / "bin/nvidia-smi", f"#!/bin/sh\necho '| Driver Version: 550.54   CUDA Version: {cuda} |'\n")
    calls, _ = setup(checkout)
    builds = [call for call in calls if "--torch-backend=auto" in call]
    assert [call.split()[-1] for call in builds] == ["torch==2.13.0"] * other
    assert sum(call.endswith("--prune torch") for call in calls) == other
    assert setup(checkout)[0] == []


def test_a_failed_update_keeps_what_is_there(checkout, monkeypatch):
    monkeypatch.setenv("FAILS", "1")
    process = start(checkout)
    assert "installation failed" in process.communicate(timeout=60)[1]
    assert process.returncode == 1
    monkeypatch.setenv("FAILS", "")
    setup(checkout)
    monkeypatch.setenv("FAILS", "1")
    (checkout / "uv.lock").write_text("other")
    calls, printed = setup(checkout)
    assert calls
    assert "warning: could not update .venv" in printed
