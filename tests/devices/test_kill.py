"""`last` of a sharded run survives a kill of one rank, or of all of them, in the middle of a save."""

import subprocess
import sys
import textwrap
import time

import pytest
import ranks
import torch

from prime_lightning.training.strategies.checkpoint import (
    INDEX,
    AtomicCheckpointIO,
    Folder,
    exchange,
    read,
    role_weights,
)

WEIGHTS = {f"policy.model.w{i}": torch.full((4,), float(i)) for i in range(6)}
TIED = WEIGHTS | {"policy.model.head": WEIGHTS["policy.model.w0"]}


def save(target, version, step, world=2, until=None, factor=1.0):
    """What all ranks do in a save, one after another, up to a point."""
    folders = [Folder(target, version, rank, world) for rank in range(world)]
    folders[0].begin()
    if until == "begun":
        return
    keys = {}
    for folder in folders:
        keys = {name: folder.add(id(w), lambda w=w: w * factor) for name, w in TIED.items()}
        folder.flush()
        if until == "one rank wrote":
            return
    if until != "all ranks wrote":
        folders[0].commit({"step": step, "state_dict": keys, "optimizer_states": []})
    assert all(folder.error is None for folder in folders)


@pytest.mark.parametrize("until", ["begun", "one rank wrote", "all ranks wrote"])
def test_the_old_content_counts_until_the_new_is_whole(tmp_path, until):
    target = tmp_path / "last.ckpt"
    save(target, "a", 1)
    save(target, "b", 2, until=until, factor=2.0)
    assert read(target)["step"] == 1
    for name, weight in role_weights(target, "policy"):
        assert torch.equal(weight, TIED[f"policy.model.{name}"])
    save(target, "c", 3, world=3, factor=3.0)
    assert sorted(path.name for path in target.iterdir()) == ["c", INDEX]  # what was left over is gone
    plain = AtomicCheckpointIO().load_checkpoint(target)
    assert plain["step"] == 3
    assert all(torch.equal(plain["state_dict"][name], 3 * weight) for name, weight in TIED.items())


def test_tied_weights_are_written_once_and_ranks_share_the_work(tmp_path):
    save(tmp_path / "x", "a", 1)
    sizes = [file.stat().st_size for file in sorted((tmp_path / "x/a").iterdir())]
    assert len(sizes) == 2
    assert sizes[0] == sizes[1]  # three tensors each, the tied one is none


def test_folders_and_files_take_each_others_place(tmp_path):
    target = tmp_path / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint({"step": 1}, target)
    save(target, "a", 2)
    assert read(target)["step"] == 2
    AtomicCheckpointIO().save_checkpoint({"step": 3}, target)
    assert target.is_file()
    assert read(target)["step"] == 3


def test_an_old_folder_that_cannot_be_deleted_costs_nothing(tmp_path, monkeypatch):
    """The new content counts by then: an error of the cleaning must not make a save undo itself."""
    target = tmp_path / "last.ckpt"
    save(target, "a", 1)
    with monkeypatch.context() as patched:

        def busy(*_, **__):
            raise OSError(16, "Device or resource busy")

        patched.setattr("os.rmdir", busy)
        save(target, "b", 2)
    assert (target / "a").is_dir()
    assert read(target)["step"] == 2
    assert len(dict(role_weights(target, "policy"))) == len(TIED)
    save(target, "c", 3)
    assert sorted(path.name for path in target.iterdir()) == ["c", INDEX]


@pytest.mark.parametrize("in_one_step", [True, False])
def test_a_file_and_a_folder_swap_their_names(tmp_path, in_one_step, monkeypatch):
    if not in_one_step:  # as over NFS, or not on Linux
        monkeypatch.setattr("ctypes.CDLL", lambda *_, **__: None)
    file, folder = tmp_path / "file", tmp_path / "folder"
    file.write_text("x")
    (folder / "inner").mkdir(parents=True)
    exchange(file, folder)
    assert folder.read_text() == "x"
    assert (file / "inner").is_dir()
    assert len(list(tmp_path.iterdir())) == 2


SWAPS = """
    import sys, torch
    from prime_lightning.training.strategies.checkpoint import AtomicCheckpointIO, Folder
    for step in range(10**6):
        if step % 2:
            AtomicCheckpointIO().save_checkpoint({"step": step}, sys.argv[1])
        else:
            folder = Folder(__import__("pathlib").Path(sys.argv[1]), str(step), 0, 1)
            folder.begin()
            folder.flush()
            folder.commit({"step": step, "state_dict": {}, "optimizer_states": []})
"""


def test_there_is_a_checkpoint_at_any_moment_while_a_folder_and_a_file_take_turns(tmp_path):
    """What a kill would leave is what is there at a moment; thousands of moments."""
    target = tmp_path / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint({"step": -1}, target)
    saving = subprocess.Popen([sys.executable, "-c", textwrap.dedent(SWAPS), str(target)])
    try:
        end, flips, folder = time.monotonic() + 60, 0, False
        while flips < 20 and time.monotonic() < end:
            assert target.exists()
            flips, folder = flips + (folder != target.is_dir()), target.is_dir()
        assert saving.poll() is None
        assert flips >= 20
    finally:
        saving.kill()
        saving.wait()
    assert read(target)["step"] >= 0


def test_what_is_no_checkpoint_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"Expected a checkpoint file, or a folder with lightning.pt"):
        read(tmp_path)
    save(tmp_path / "x", "a", 1)
    with pytest.raises(ValueError, match=r"with a prm, got .* with \['policy'\]"):
        next(role_weights(tmp_path / "x", "prm"))


def kill_in_a_save(folder, victims):
    """Start a run that saves again and again, and kill ranks as soon as the tensors of a second save appear."""
    processes, target = ranks.launch(folder, "endless"), folder / "endless.ckpt"
    deadline = time.monotonic() + 120
    while not (target / INDEX).is_file() or len(list(target.iterdir())) < 3:
        assert time.monotonic() < deadline
        assert all(process.poll() is None for process in processes)
        time.sleep(0.0005)
    for rank in victims:
        processes[rank].kill()
    ended = [process.wait(timeout=60) for process in processes]  # the others do not wait for ever
    assert all(ended)
    return target


@pytest.mark.parametrize("victims", [[1], [0, 1]])
def test_last_survives_a_kill_during_a_save(tmp_path, victims):
    target = kill_in_a_save(tmp_path, victims)
    step = read(target)["step"]
    weights = dict(role_weights(target, "policy"))
    assert len(weights) == 40
    assert all(torch.equal(weight, torch.full((1000,), float(step))) for weight in weights.values())
