"""`prime-lightning doctor`: what it finds on this machine, and on machines that lack something."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from packaging.requirements import Requirement

from prime_lightning.cli.commands import doctor
from prime_lightning.verifiers.workers.launch import machine_tiers


def run(*arguments: str, path: str | None = None) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "HF_HUB_OFFLINE": "1"}
    environment |= {} if path is None else {"PATH": path}
    command = [sys.executable, "-m", "prime_lightning", "doctor", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_everything_is_looked_at_on_this_machine():
    done = run("--json")
    findings = [json.loads(line) for line in done.stdout.splitlines()]
    assert not done.stderr
    assert {"packages", "GPU", "attention", "sandbox", "disk", "hub cache"} <= {found["what"] for found in findings}
    assert done.returncode == int(any(found["state"] == "fault" for found in findings))
    assert not [found for found in findings if "could not be looked at" in found["said"]]
    assert {"HF_HUB_OFFLINE"} == {found["said"].split()[0] for found in findings if found["what"] == "hub"}


@pytest.mark.skipif(not machine_tiers(), reason="no sandbox on this system")
def test_the_sandbox_that_holds_is_named_and_what_would_make_it_better(tmp_path):
    done = run(path=str(tmp_path))
    (line,) = [line for line in done.stdout.splitlines() if " sandbox: " in line]
    tier = next(tier for tier in machine_tiers() if tier != "bubblewrap")
    assert line == f"note  sandbox: the tier `{tier}` holds. -> apt install bubblewrap, for one more wall"


def test_packages_are_held_against_what_the_package_says_of_itself(monkeypatch):
    said = ["pytest>=8", "pytest<2; extra == 'vllm'", "no-such-thing; extra == 'lora'", "pluggy<0.1"]
    monkeypatch.setattr(doctor.metadata, "requires", lambda name: said)
    found = {finding.what: finding for finding in doctor.packages()}
    assert found["packages"].state == "fault"
    assert "pluggy" in found["packages"].said
    assert "pytest" not in found["packages"].said
    assert found["extra `vllm`"].state == "note"
    assert "is not <2" in found["extra `vllm`"].said
    assert "pluggy" not in found["extra `vllm`"].said
    assert found["extra `lora`"].said.startswith("no-such-thing is not installed")
    assert found["extra `wandb`"].state == "ok"


def test_a_version_within_the_bounds_is_no_finding():
    assert not list(doctor._amiss(Requirement("pytest>=8")))


def test_little_room_is_a_note_that_says_what_to_do(monkeypatch):
    monkeypatch.setattr(doctor, "LEAST_DISK_GIB", 1e9)
    monkeypatch.setattr(doctor, "LEAST_FILES", 10**9)
    assert {(f.what, f.state) for f in doctor.disk() if f.what != "hub"} == {("disk", "note"), ("hub cache", "note")}
    assert [f.do for f in doctor._files()] == ["ulimit -n 1000000000"]


def test_what_cannot_be_looked_at_is_a_note(monkeypatch):
    def faints():
        raise RuntimeError("no such file")
        yield

    monkeypatch.setattr(doctor, "CHECKS", {"weather": faints})
    (finding,) = doctor.examine()
    assert str(finding) == "note  weather: could not be looked at: RuntimeError: no such file"
