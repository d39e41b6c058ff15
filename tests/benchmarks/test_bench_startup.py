"""The benchmark of start-up times runs, and says so if a command fails."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_each_command_is_timed(tmp_path, capsys):
    import startup

    startup.main(["--turns", "1", "--out", str(tmp_path / "found.json")])
    found = json.loads((tmp_path / "found.json").read_text())
    assert list(found) == list(startup.COMMANDS)
    assert all(seconds > 0 for (seconds,) in found.values())
    assert found["--help"][0] < found["fit --print_config"][0]
    assert "| `--version` |" in capsys.readouterr().out


def test_a_command_that_fails_is_no_number(monkeypatch):
    import startup

    monkeypatch.setitem(startup.COMMANDS, "bad", ([sys.executable, "-c", "raise SystemExit('no such thing')"], 0))
    with pytest.raises(RuntimeError, match="Expected 0 from `bad`, got 1: no such thing"):
        startup.seconds_of("bad")
