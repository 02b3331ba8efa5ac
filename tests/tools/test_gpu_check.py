"""The checks for a GPU, on small sizes and the CPU."""

import json

from tests.helpers.train_processes import script

# the others start further processes or compile
CHECKS = ["card", "attention", "parity", "step_0.5b", "encoders", "sampling", "save"]


def test_every_check_reports_results_on_small_sizes(tmp_path):
    out = tmp_path / "gpu.jsonl"
    script("scripts/gpu_check.py", "--tiny", "--out", str(out), "--only", ",".join(CHECKS))

    lines = [json.loads(line) for line in out.read_text().splitlines()]
    facts = {name: [line for line in lines if line["check"] == name] for name in CHECKS}
    assert all(facts.values())
    assert not any("failed" in line or "skipped" in line for line in lines)

    # on the CPU itself parity in fp32 is exact, and a saved state is restored
    assert [facts["parity"][0][name] for name in ("loss", "gradient", "sample", "score_difference")] == [0, 0, 0, 0]
    assert facts["parity"][1]["loss"] < 5e-2
    assert facts["attention"][0]["fp32_error"] < 1e-5
    assert facts["save"][0]["restored"]


def test_an_unknown_check_and_a_machine_without_gpu_are_named():
    printed = script("scripts/gpu_check.py", "--out", "unused.jsonl", "--tiny", "--only", "spede", code=2)
    assert "--only: unknown check spede; choose from card, attention" in printed
