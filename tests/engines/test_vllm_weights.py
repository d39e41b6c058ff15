"""The copy of the weights that another process maps, and the book-keeping of samples; neither needs vLLM."""

import os
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from prime_lightning.engines import hf
from prime_lightning.engines.samples import Work, completion_of, sample_keys
from prime_lightning.engines.weights.transfer import HostSender, WeightCopy, column_of
from prime_lightning.models.pretrained import load_causal_lm
from prime_lightning.prompts.arithmetic import write_model
from prime_lightning.rollout import Completion, Finish, Prompt, Sampling


@pytest.fixture
def model(tmp_path: Path) -> str:
    return str(write_model(tmp_path / "model"))


class Receiver:
    """A process of vLLM's, as far as the trainer sees it: it maps the memory and keeps what it read."""

    def __init__(self, spoiled: bool = False) -> None:
        self.calls, self.spoiled = [], spoiled

    def init_weight_transfer_engine(self, init_info):
        dtype, self.weights = getattr(torch, init_info["dtype_name"]), {}
        memory = torch.from_file(init_info["path"], shared=True, size=init_info["nbytes"], dtype=torch.uint8)
        for name, shape, start in zip(init_info["names"], init_info["shapes"], init_info["offsets"], strict=True):
            length = torch.Size(shape).numel() * dtype.itemsize
            self.weights[name] = memory[start : start + length].view(dtype).view(shape)

    def start_weight_update(self):
        self.calls.append("start")

    def update_weights(self, update_info):
        self.calls.append("update")

    def finish_weight_update(self, weight_version=None):
        self.calls.append(f"finish {weight_version}")

    def read_back(self, columns):
        shift = 0.01 if self.spoiled else 0.0
        return {n: (column_of(self.weights[n], c).float() + shift).tolist() for n, c in columns.items()}


class Crossings(TorchDispatchMode):
    """Numbers that are copied from one tensor to another of a different format."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.copy_.default and args[0].dtype != args[1].dtype:
            self.count += 1
        return func(*args, **(kwargs or {}))


def test_weights_are_cast_where_they_are_before_they_go_anywhere(model):
    copy, named = WeightCopy(model, "bfloat16"), list(load_causal_lm(model).named_parameters())
    with Crossings() as crossings:
        passed = list(copy.passing(named, 1))
    assert crossings.count == 0
    for name, tensor in passed:
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor, copy.tensors[name])
    copy.close()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("on_disk", [False, True])
def test_all_weights_arrive_in_the_engines_format(model, tmp_path, dtype, on_disk):
    copy, receiver = WeightCopy(model, dtype, tmp_path if on_disk else None), Receiver()
    named = dict(load_causal_lm(model).named_parameters())
    HostSender(receiver, copy).send(copy.passing(named.items(), 3))
    assert receiver.calls == ["start", "update", "finish 3"]
    for name, tensor in receiver.weights.items():
        torch.testing.assert_close(tensor, named[name].detach().to(tensor.dtype), rtol=0, atol=0)
    assert os.path.exists(copy.path)
    copy.close()
    assert not os.path.exists(copy.path)


def test_an_engine_with_other_weights_is_noticed(model):
    copy = WeightCopy(model, "float32")
    named = load_causal_lm(model).named_parameters()
    with pytest.raises(RuntimeError, match="would train on rubbish"):
        HostSender(Receiver(spoiled=True), copy).send(copy.passing(named, 1))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda named: named[1:], "got none for"),
        (lambda named: [*named, ("model.extra", named[0][1])], "'model.extra'.*no such weight"),
        (lambda named: [(named[0][0], named[0][1].T), *named[1:]], "with shape .*Engine and policy must be"),
    ],
)
def test_wrong_weights_never_reach_the_engine(model, spoil, message):
    copy, receiver = WeightCopy(model, "float32"), Receiver()
    sender = HostSender(receiver, copy)
    with pytest.raises(ValueError, match=message):
        sender.send(copy.passing(spoil(list(load_causal_lm(model).named_parameters())), 1))
    assert receiver.calls == []
    assert copy.version is None


def test_every_weight_is_compared_sooner_or_later(model):
    copy, seen = WeightCopy(model, "float32"), set()
    for copy.version in range(40):
        seen |= set(copy.columns())
    assert seen == set(copy.shapes)


def test_keys_are_those_of_the_hf_engine():
    assert (sample_keys(3, [5, 9], 4) == hf.sample_keys(3, [5, 9], 4)).all()


def prompts(count: int) -> list[Prompt]:
    return [Prompt(draw=i, token_ids=(5,), text="1", kind="exact") for i in range(count)]


def done() -> Completion:
    return Completion(text="", token_ids=[1], logprobs=[0.0], finish=Finish.STOP, versions=[0])


def test_samples_that_are_given_back_are_drawn_first_and_once():
    work = Work("s0", prompts(3), Sampling(samples=2))
    flying = [request.name for request in work.take(window=4)]
    assert flying == ["s0.0.0", "s0.0.1", "s0.1.0", "s0.1.1"]
    assert [prompt.draw for prompt, _ in work.finish("s0.1.0", done())] == []
    assert [prompt.draw for prompt, _ in work.finish("s0.1.1", done())] == [1]
    work.give_back()
    again = [request.name for request in work.take(window=4)]
    assert again == ["s0.0.0", "s0.0.1", "s0.2.0", "s0.2.1"]
    assert [list(work.finish(name, done())) for name in ("s0.1.0", "s0.9.9")] == [[], []]
    finished = [prompt.draw for name in again for prompt, _ in work.finish(name, done())]
    assert finished == [0, 2]
    assert not work.unfinished


def test_a_sample_without_a_reason_to_end_is_not_counted():
    with pytest.raises(RuntimeError, match="`stop` or `length`, got 'abort'"):
        completion_of(None, [1], [0.0], "abort", [0])
