"""Runs that are killed, stopped, hung or damaged: they resume, and end bitwise equal to an uninterrupted run."""

import random
import shutil
import signal
import time
from pathlib import Path

import pytest

from tests.helpers.train_processes import Run, files, finish, lines

LAST = Path("checkpoints/step_00000012")
SMALL_BATCH = "trainer.total_batch_size=4"  # one micro-batch per process and step


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """Two processes, twelve steps, a checkpoint every two, left alone."""
    folder = tmp_path_factory.mktemp("whole")
    finish(folder, 2, SMALL_BATCH)
    return folder


def slow(seconds: float) -> tuple[str, str]:
    return (
        "system.objective.module=tests.helpers.faulty_parts.SlowObjective",
        f"system.objective.params.seconds={seconds}",
    )


def test_killed_at_any_moment(whole, tmp_path, pytestconfig):
    """SIGKILL to one process or to both, at a random moment or in the middle of a save."""
    for number in range(pytestconfig.getoption("--kill-rounds")):
        chance, folder = random.Random(number), tmp_path / str(number)
        run = Run(folder, 2, SMALL_BATCH)
        if number % 2:
            aside = folder / "checkpoints" / f"step_{2 * chance.randint(1, 6):08d}.partial"
            while not aside.exists() and all(process.is_alive() for process in run.processes):
                time.sleep(0.001)
        else:
            run.wait_for("training 1/") if number else None
            time.sleep(chance.uniform(0, 1.5))
        run.send(signal.SIGKILL, *chance.choice([(0,), (1,), (0, 1)]))
        time.sleep(0.2)
        run.end()  # as the launcher ends the rest
        finish(folder, 2, SMALL_BATCH)
        assert files(folder / LAST) == files(whole / LAST), f"round {number}"
        assert lines(folder) == lines(whole), f"round {number}"
        shutil.rmtree(folder)


def test_asked_to_stop(whole, tmp_path):
    """One of two processes hears a signal; both finish the same step, save and say so. Three times in one run."""
    done, overrides = 0, (SMALL_BATCH, *slow(0.2), "trainer.checkpoint_every=100")
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        run = Run(tmp_path, 2, *overrides)
        run.wait_for(f"training {done + 1}/")
        run.send(number, 1)
        assert run.wait() == [128 + number] * 2
        assert f"stopped by {number.name}: " in run.out
        before, done = done, int(run.out.split(f"{number.name}: ")[1].split()[0])
        assert before < done < 12
        assert run.failures[0]["message"].endswith("run the same command again to resume")
    assert f"resuming from {tmp_path}/checkpoints/step_{done:08d}" in finish(tmp_path, 2, *overrides)
    assert files(tmp_path / LAST) == files(whole / LAST)
    assert lines(tmp_path) == lines(whole)


def test_ctrl_c_twice_quits_at_once(tmp_path):
    """In the middle of the step that the first one lets finish. One key that arrives twice is still one."""
    run = Run(tmp_path, 1, *slow(60))
    run.wait_for("a slow step")
    run.send(signal.SIGINT), run.send(signal.SIGINT)
    assert run.wait(1) == [None]
    run.send(signal.SIGINT)
    assert run.wait(20) == [130]
    assert "stopped by" not in run.out
    assert not list(tmp_path.glob("checkpoints/step_*"))


def test_a_hung_process_is_named(tmp_path):
    """SIGSTOP on one rank: the other ends within the timeout and says who did not answer, in which step."""
    run = Run(tmp_path, 2, "trainer.max_steps=100000", "trainer.timeout_minutes=0.05")
    run.wait_for("training 1/")
    run.send(signal.SIGSTOP, 1)
    run.processes[0].join(60)
    assert [process.exitcode for process in run.processes] == [1, None]
    run.end()
    message = run.failures[0]["message"]
    assert message.startswith("step ")
    assert message.endswith("waited 0.05 minutes (trainer.timeout_minutes); no response from process 1")


def test_a_stop_signal_ends_a_process_that_hangs_in_a_collective(tmp_path):
    """Python runs no handler there; the process ends before its time is up, and names the step."""
    run = Run(tmp_path, 2, "trainer.max_steps=100000", env={"GRACE_SECONDS": "2"})
    run.wait_for("training 1/")
    run.send(signal.SIGSTOP, 1)
    run.send(signal.SIGTERM, 0)
    run.processes[0].join(60)
    assert run.processes[0].exitcode == 128 + signal.SIGTERM
    run.end()
    message = run.failures[0]["message"]
    assert message.startswith("stopped by SIGTERM in step ")
    assert "did not end within GRACE_SECONDS=2" in message
