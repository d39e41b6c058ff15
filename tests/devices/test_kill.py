"""`last` of a sharded run survives a kill of one rank, or of all of them, in the middle of a save."""

import time

import pytest
import ranks
import torch

from prime_lightning.checkpoint import INDEX, AtomicCheckpointIO, Folder, read, role_weights

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
