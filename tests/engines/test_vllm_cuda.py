"""What goes to a GPU, without one: vLLM's own classes on both sides; stood in for are shared memory and broadcast."""

import inspect
import queue
from contextlib import nullcontext
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch

from prime_lightning.engines.vllm.arguments import arguments_of
from prime_lightning.engines.vllm.engine import VLLMEngine
from prime_lightning.engines.weights.transfer import WeightCopy, column_of
from prime_lightning.models.pretrained import load_causal_lm
from prime_lightning.prompts.arithmetic import write_model

pytestmark = pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed (docs/vllm.md)")

PIECE = 40_000  # bytes: a model of 112,000 parameters comes in pieces


class Receiver:
    """The engine's end of the control calls, with vLLM's receiving class; it keeps what that loads."""

    def __init__(self, engine_class, copy, gpu=0):
        self.loaded, self.calls, self.copy = {}, [], copy
        model = SimpleNamespace(load_weights=lambda weights: self.loaded.update((n, w.clone()) for n, w in weights))
        config = SimpleNamespace(parallel_config=None, model_config=None)
        self.engine = engine_class(None, config, torch.device("cpu", gpu), model)

    def init_weight_transfer_engine(self, init_info):
        self.engine.init_transfer_engine(self.engine.parse_init_info(init_info))
        self.calls.append("init")

    def start_weight_update(self):
        self.calls.append("start")

    def update_weights(self, update_info):
        self.engine.receive_weights(self.engine.parse_update_info(update_info))
        self.calls.append("update")

    def finish_weight_update(self, weight_version=None):
        self.calls.append(f"finish {weight_version}")

    def read_back(self, columns):
        return {name: column_of(self.loaded[name], column).tolist() for name, column in columns.items()}


@pytest.fixture
def cuda(monkeypatch):
    """The sending side, with a CPU in place of the GPU."""
    from prime_lightning.engines.weights import cuda

    stream, empty = SimpleNamespace(synchronize=lambda: None), torch.empty
    monkeypatch.setattr(cuda, "PIECE", PIECE)
    monkeypatch.setattr(cuda, "on_device", lambda weights, dtype: ((n, p.detach().to(dtype)) for n, p in weights))
    monkeypatch.setattr(torch, "empty", lambda *a, **k: empty(*a, **(k | {"device": "cpu"})))
    for name, stand_in in {
        "current_device": lambda: 0,
        "device": lambda device: nullcontext(),
        "get_device_properties": lambda device: SimpleNamespace(uuid=f"GPU-{device}"),
        "current_stream": lambda: stream,
        "stream": lambda stream: nullcontext(),
        "synchronize": lambda: None,
        "ipc_collect": lambda: None,
    }.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: 0)
    return cuda


@pytest.fixture
def model(tmp_path):
    return str(write_model(tmp_path / "model"))


@pytest.fixture(params=["float32", "bfloat16"])
def copy(request, model):
    made = WeightCopy(model, request.param)
    yield made
    made.close()


def arrives(sender, receiver, copy, model):
    """Send, and send again, and see that each time all weights came as they are in the engine's format."""
    named = dict(load_causal_lm(model).named_parameters())
    for send in (lambda: sender.send(copy.passing(named.items(), 7)), sender.resend):
        receiver.loaded.clear()
        receiver.calls.clear()
        send()
        assert receiver.calls[0] == "start"
        assert receiver.calls[-1] == "finish 7"
        assert set(receiver.loaded) == set(named)
        for name, tensor in receiver.loaded.items():
            torch.testing.assert_close(tensor, named[name].detach().to(copy.dtype), rtol=0, atol=0)


class OnAllGPUs:
    """The control calls, to the worker of each GPU."""

    def __init__(self, receivers):
        self.receivers = receivers

    def __getattr__(self, name):
        def call(*arguments):
            answers = [getattr(receiver, name)(*arguments) for receiver in self.receivers]
            return answers[0]

        return call


@pytest.mark.parametrize("devices", [[0], [0, 1, 2]])
def test_vllm_takes_the_pieces_that_go_by_ipc(cuda, copy, model, devices, monkeypatch):
    from torch.multiprocessing import reductions
    from vllm.distributed.weight_transfer import ipc_engine, packed_tensor

    shared = []  # what `reduce_tensor` exports on a GPU, and `rebuild_cuda_tensor` opens in the other process
    monkeypatch.setattr(packed_tensor, "reduce_tensor", lambda t: (None, (shared.append(t) or len(shared) - 1,) * 7))
    monkeypatch.setattr(reductions, "rebuild_cuda_tensor", lambda number, *_: shared[number])
    receivers = [Receiver(ipc_engine.IPCWeightTransferEngine, copy, device) for device in devices]
    sender = cuda.sender_of("ipc", OnAllGPUs(receivers), copy, len(devices), devices=devices)
    assert all(receiver.calls == ["init"] for receiver in receivers)
    for receiver in receivers:
        arrives(sender, receiver, copy, model)
        assert receiver.calls.count("update") > 3
    assert len(shared) == len(devices) * len(devices) * 2  # a buffer on each GPU, for two transfers a receiver
    assert all(buffer.nbytes >= max(t.nbytes for t in copy.tensors.values()) for buffer in shared)


def test_vllm_takes_what_is_broadcast_by_nccl(cuda, copy, model, monkeypatch):
    from vllm.distributed.weight_transfer import nccl_engine, packed_tensor

    sent, ends = queue.SimpleQueue(), []
    stream = SimpleNamespace(synchronize=lambda: None)
    trainer = SimpleNamespace(broadcast=lambda tensor, src: sent.put(tensor.clone()), destroy=lambda: None)
    worker = SimpleNamespace(broadcast=lambda tensor, src: tensor.copy_(sent.get(timeout=20)), destroy=lambda: None)

    def join(rank, info, group):
        ends.append((rank, info.master_address, info.master_port, info.world_size))
        return group

    monkeypatch.setattr(packed_tensor, "_get_streams", lambda device, count: (stream,) * count)
    monkeypatch.setattr(nccl_engine, "open_trainer_endpoint", lambda info: join(0, info, trainer))
    monkeypatch.setattr(
        nccl_engine, "worker_init_process_group", lambda info, parallel: join(info.rank_offset, info, worker)
    )
    receiver = Receiver(nccl_engine.NCCLWeightTransferEngine, copy)
    sender = cuda.sender_of("nccl", receiver, copy, 2, "10.0.0.7")
    (first, *there), (second, *here) = sorted(ends)
    assert (first, second) == (0, 1)
    assert here == there
    assert (here[0], here[2]) == ("10.0.0.7", 3)
    arrives(sender, receiver, copy, model)


def test_wrong_weights_break_a_broadcast_off(cuda, copy, model, monkeypatch):
    from vllm.distributed.weight_transfer import nccl_engine

    monkeypatch.setattr(nccl_engine, "open_trainer_endpoint", lambda info: None)
    receiver = SimpleNamespace(
        init_weight_transfer_engine=lambda info: None,
        start_weight_update=lambda: None,
        update_weights=lambda info: None,
    )
    sender = cuda.sender_of("nccl", receiver, copy, 1)
    named = list(load_causal_lm(model).named_parameters())
    monkeypatch.setattr(
        nccl_engine.NCCLTrainerWeightTransferEngine,
        "_broadcast",
        lambda self, source, meta: list(self._checked_iter(source, meta)),
    )
    with pytest.raises(ValueError, match="got none for"):
        sender.send(copy.passing(named[:-1], 1))
    with pytest.raises(ValueError, match="disagrees with iteration at index 0"):
        sender.send(copy.passing(named[::-1], 1))


@pytest.mark.parametrize(
    "options", [{}, {"sleep_level": 0}, {"devices": [2, 3], "tensor_parallel": 2}, {"transfer": "host"}]
)
def test_vllm_knows_all_arguments_of_an_engine_on_gpus(model, options):
    from vllm.engine.arg_utils import EngineArgs

    engine = VLLMEngine(device="cuda", **options)
    engine.model = model
    made = EngineArgs(disable_log_stats=True, **arguments_of(engine, engine._room, engine._can_sleep))
    assert made.enable_sleep_mode is (options in ({}, {"transfer": "host"}))
    backend = {"transfer": "prime_host"}.get(next(iter(options), ""), "nccl" if "devices" in options else "ipc")
    assert made.weight_transfer_config.backend == backend


def test_vllm_has_the_methods_that_are_called_on_gpus():
    from vllm.v1.engine.core import EngineCore
    from vllm.v1.engine.core_client import InprocClient
    from vllm.v1.engine.llm_engine import LLMEngine
    from vllm.v1.worker.gpu_worker import Worker

    for owner, method, arguments in (
        *((owner, "sleep", (2,)) for owner in (LLMEngine, InprocClient, EngineCore, Worker)),
        *((owner, "wake_up", (["weights"],)) for owner in (LLMEngine, InprocClient, EngineCore, Worker)),
        (LLMEngine, "set_weight_version", ("1",)),
    ):
        inspect.signature(getattr(owner, method)).bind(None, *arguments)
    for method, arguments in (
        ("init_weight_transfer_engine", {"init_info": {}}),
        ("start_weight_update", {}),
        ("update_weights", {"update_info": {}}),
        ("finish_weight_update", {}),
    ):
        inspect.signature(getattr(Worker, method)).bind(None, **arguments)


def test_our_clients_are_vllms(copy):
    from vllm.distributed.weight_transfer.base import VLLMWeightSyncClient

    from prime_lightning.engines.server.fleet import Fleet
    from prime_lightning.engines.vllm.process import EngineProcess

    assert isinstance(object.__new__(EngineProcess), VLLMWeightSyncClient)
    assert isinstance(Fleet([]), VLLMWeightSyncClient)
