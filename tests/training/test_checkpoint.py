"""Checkpoints are whole or absent, whatever stops the write."""

import subprocess
import sys
import textwrap

import pytest
import torch

from prime_lightning.training.strategies.checkpoint import AtomicCheckpointIO

OLD = {"step": 1, "weights": torch.arange(4.0)}


@pytest.fixture
def target(tmp_path):
    path = tmp_path / "deep" / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint(OLD, path)
    return path


def assert_old_and_alone(target):
    assert [path.name for path in target.parent.iterdir()] == ["last.ckpt"]
    kept = AtomicCheckpointIO().load_checkpoint(target)
    assert kept["step"] == 1
    assert torch.equal(kept["weights"], OLD["weights"])


def test_a_checkpoint_is_written_and_replaced(target):
    assert_old_and_alone(target)
    AtomicCheckpointIO().save_checkpoint({"step": 2}, str(target))
    assert [path.name for path in target.parent.iterdir()] == ["last.ckpt"]
    assert AtomicCheckpointIO().load_checkpoint(target) == {"step": 2}


def test_a_reader_of_the_old_file_is_not_disturbed(target):
    with target.open("rb") as file:
        AtomicCheckpointIO().save_checkpoint({"step": 2}, target)
        assert torch.load(file)["step"] == 1  # the name moved to a new file; this one was not written into


class Interrupts:
    """Cannot be saved: its turn comes after that of a large tensor."""

    def __init__(self, error):
        self.error = error

    def __reduce__(self):
        raise self.error


@pytest.mark.parametrize("error", [TypeError("cannot pickle"), KeyboardInterrupt(), MemoryError()])
def test_a_write_that_fails_half_way_leaves_the_old_file(target, error):
    with pytest.raises(type(error)):
        AtomicCheckpointIO().save_checkpoint({"step": 2, "x": torch.zeros(10**6), "y": Interrupts(error)}, target)
    assert_old_and_alone(target)


LIMITED = """
    import resource, sys, torch
    from prime_lightning.training.strategies.checkpoint import AtomicCheckpointIO
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    try:
        AtomicCheckpointIO().save_checkpoint({"weights": torch.randn(10**6)}, sys.argv[1])
    except OSError as error:
        print(error)
"""


def run(code, *args, **options):
    return subprocess.run([sys.executable, "-c", textwrap.dedent(code), *map(str, args)], timeout=60, **options)


def test_a_full_disk_is_reported_and_leaves_the_old_file(target):
    done = run(LIMITED, target, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"Could not write the checkpoint {target}" in done.stdout
    assert "free some space and resume from it with --ckpt_path" in done.stdout
    assert_old_and_alone(target)


KILLED = """
    import os, signal, sys, torch
    from prime_lightning.training.strategies.checkpoint import AtomicCheckpointIO
    class Kills:
        def __reduce__(self):
            os.kill(os.getpid(), signal.SIGKILL)
    AtomicCheckpointIO().save_checkpoint({"x": torch.randn(10**6), "y": Kills()}, sys.argv[1])
"""


def test_a_kill_in_the_middle_leaves_the_old_file_and_the_next_save_cleans_up(target):
    assert run(KILLED, target).returncode == -9
    assert AtomicCheckpointIO().load_checkpoint(target)["step"] == 1
    AtomicCheckpointIO().save_checkpoint(OLD, target)
    assert_old_and_alone(target)
