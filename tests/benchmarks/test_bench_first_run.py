"""The first run on a new machine, as far as a CPU goes: every part runs and passes, and a broken one is reported."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks" / "gpu"))

import first_run
import judge


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_all_parts_run_and_pass_on_a_cpu(tmp_path):
    pytest.importorskip("deepspeed")
    out = tmp_path / "results.json"
    words = [sys.executable, first_run.__file__, "--device", "cpu", "--tiny", "--out", str(out)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    found = json.loads(out.read_text())["parts"]
    assert done.returncode == 0, done.stdout
    assert list(found) == ["machine", "qwen", "plain", "zero3", "fsdp2", "smollm"]
    for name, part in found.items():
        assert "error" not in part
        assert part["checks"], name
        assert first_run.passed(part)
    for name in ("qwen", "smollm"):
        judged = {check["what"]: check["passed"] for check in found[name]["checks"]}
        assert judged.pop("MFU of the training phases") is None  # a CPU has no bar
        assert all(judged.values())
        assert found[name]["greedy"]["tokens"] > 0
        assert found[name]["engine"]["version"] == len(found[name]["iterations"]) == 2
    assert found["zero3"]["iterations"][0]["policy/grad_norm"] > 0
    assert "FAILED" not in done.stdout


def test_a_broken_part_is_reported_and_the_next_one_runs(tmp_path, monkeypatch, capsys):
    broken = tmp_path / "broken.py"
    broken.write_text("import sys\nprint('no such card')\nsys.exit(3 if sys.argv[2] == 'qwen' else 4)\n")
    monkeypatch.setattr(first_run, "__file__", str(broken))
    out = tmp_path / "results.json"
    assert first_run.main(["--device", "cpu", "--tiny", "--parts", "qwen", "smollm", "--out", str(out)]) == 1
    found = json.loads(out.read_text())["parts"]
    assert [part["error"] for part in found.values()] == ["ended with status 3", "ended with status 4"]
    assert "no such card" in capsys.readouterr().out


def test_a_part_that_hangs_is_ended_with_what_it_started(tmp_path, monkeypatch):
    broken, child = tmp_path / "broken.py", tmp_path / "child"
    broken.write_text(
        "import pathlib, subprocess, time\nother = subprocess.Popen(['sleep', '1000'])\n"
        f"pathlib.Path({str(child)!r}).write_text(str(other.pid))\ntime.sleep(1000)\n"
    )
    monkeypatch.setattr(first_run, "__file__", str(broken))
    monkeypatch.setattr(first_run, "CPU_LIMIT", 10)
    options = first_run.parser().parse_args(["--device", "cpu"])
    assert first_run.in_child("qwen", tmp_path, options)["error"] == "ended with nothing after 10 s"
    deadline = time.monotonic() + 30
    while alive(int(child.read_text())):
        assert time.monotonic() < deadline


def alive(pid):
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


GOOD = {
    "engine": {"transfer": "ipc", "version": 2, "iterations": 2},
    "greedy": {"tokens": 8, "equal": 0.9, "regret": 0.01},
    "iterations": [
        {"importance/abs_diff": 0.01},
        {"importance/abs_diff": 0.01, "time/score": 1.0, "time/prm": 2.0, "time/policy": 2.0},
    ],
    "forward_flops": 100.0,
    "freed_bytes": [30, 31],
    "total_bytes": 80,
    "engine_share": 0.4,
    "peak_bytes": {"prm": 95, "policy": 110},
    "planned_bytes": 100,
}
BAD = {
    "weights sent and read back (ipc)": {"engine": GOOD["engine"] | {"version": 1}},
    "first batch, log-prob gap (nats a token)": {
        "iterations": [{"importance/abs_diff": 0.2}, GOOD["iterations"][1]],
    },
    "greedy tokens, greatest regret (nats)": {"greedy": GOOD["greedy"] | {"regret": 1.0}},
    "MFU of the training phases (6 N a token)": {"forward_flops": 50.0},
    "sleep frees, share of the engine's memory": {"freed_bytes": [30, 1]},
    "peak memory in policy, over the plan's": {"peak_bytes": {"prm": 95, "policy": 130}},
}


def failed(found):
    checks = judge.checks_of_training(found, dtype="bfloat16", cuda=True, peak=400.0)
    return [check["what"] for check in checks if check["passed"] is False], {c["what"]: c["value"] for c in checks}


def test_a_good_run_on_a_gpu_passes_and_mfu_is_useful_work_over_the_peak():
    bad, values = failed(GOOD)
    assert bad == []
    assert values["MFU of the training phases (6 N a token)"] == pytest.approx(2 * 3 * 100 / 4 / 400)
    assert values["MFU of scoring (2 N a token)"] == pytest.approx(3 * 100 / 1 / 400)


@pytest.mark.parametrize("what", BAD)
def test_each_fault_on_a_gpu_fails_its_own_check(what):
    assert failed(GOOD | BAD[what])[0] == [what]


def test_a_strategy_that_trains_otherwise_fails():
    row = dict.fromkeys(judge.COMPARED, 1.0) | {"importance/abs_diff": 1e-6}
    plain = {"iterations": [row, row], "greedy": {"tokens": 8, "equal": 1.0, "regret": 0.0}}
    other = plain | {"iterations": [row | {"policy/grad_norm": 1.01}, row]}
    judged = {check["what"]: check["passed"] for check in judge.checks_of_strategy(other, plain)}
    assert [what for what, good in judged.items() if not good] == ["policy/grad_norm, relative to plain"]
    assert all(check["passed"] for check in judge.checks_of_strategy(plain, plain))


@pytest.mark.parametrize(
    ("card", "tflops"),
    [("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 PCIe", 756), ("NVIDIA L40S", 362), ("Else", None)],
)
def test_peaks_are_found_by_the_card_s_name(card, tflops):
    assert judge.peak_of(card) == (tflops and tflops * 1e12)
