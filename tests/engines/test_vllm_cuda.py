"""What goes to a GPU, without one: messages as vLLM wants them, weights in order. IPC and NCCL are stood in for."""

from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch

from prime_lightning.arithmetic import write_model
from prime_lightning.engines.weight_transfer import WeightCopy, column_of
from prime_lightning.pretrained import load_causal_lm

pytestmark = pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed (docs/vllm.md)")


class Receiver:
    """Takes the control calls down, and has the weights of the copy."""

    def __init__(self, copy):
        self.copy, self.calls, self.updates = copy, [], []

    def init_weight_transfer_engine(self, init_info):
        self.calls.append(("init", init_info))

    def start_weight_update(self):
        self.calls.append("start")

    def update_weights(self, update_info):
        self.updates.append(update_info)

    def finish_weight_update(self, weight_version=None):
        self.calls.append(f"finish {weight_version}")

    def read_back(self, columns):
        return {name: column_of(self.copy.tensors[name], column).tolist() for name, column in columns.items()}


@pytest.fixture
def cuda(monkeypatch):
    from prime_lightning.engines import weight_transfer_cuda as cuda

    monkeypatch.setattr(cuda, "on_device", lambda weights, dtype: ((name, p.detach()) for name, p in weights))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="GPU-1"))
    monkeypatch.setattr(torch.cuda, "ipc_collect", lambda: None)
    return cuda


@pytest.fixture
def copy(tmp_path):
    made = WeightCopy(str(write_model(tmp_path / "model")), "float32")
    yield made
    made.close()


def test_pieces_for_ipc_are_what_vllm_takes(cuda, copy, monkeypatch, tmp_path):
    from vllm.distributed.weight_transfer.ipc_engine import IPCWeightTransferInitInfo, IPCWeightTransferUpdateInfo
    from vllm.distributed.weight_transfer.packed_tensor import PackedIpcChunk

    def producer(weights, gpu_uuid, post_iter_func, buffer_size_bytes):
        for item in weights:
            tensor = post_iter_func(item)
            assert tensor.nbytes <= buffer_size_bytes
            yield PackedIpcChunk([item[0]], [list(tensor.shape)], ["float32"], [tensor.nbytes], {gpu_uuid: ()})

    monkeypatch.setattr(cuda, "packed_ipc_producer", producer)
    receiver = Receiver(copy)
    sender = cuda.sender_of("ipc", receiver, copy, 1)
    sender.send(copy.passing(load_causal_lm(str(tmp_path / "model")).named_parameters(), 7))
    (_, init), start, finish = receiver.calls
    assert IPCWeightTransferInitInfo(**init).packed
    assert (start, finish) == ("start", "finish 7")
    assert [IPCWeightTransferUpdateInfo(**update).names[0] for update in receiver.updates] == list(copy.shapes)
    sender.resend()
    assert receiver.calls[-1] == "finish 7"


def test_nccl_sends_all_weights_once_in_the_order_that_was_announced(cuda, copy, monkeypatch, tmp_path):
    sent = []

    class Engine:
        """VLLM's trainer side, as far as its callers see it."""

        def __init__(self, init, client, source):
            assert (init.world_size, init.rank) == (3, 0)
            self.client, self.source = client, source

        def send_weights(self):
            self.client.start_weight_update()
            meta = self.source.metadata()
            for expected, (name, tensor) in zip(meta, self.source, strict=True):
                assert (name, tuple(tensor.shape), tensor.dtype) == (expected.name, expected.shape, expected.dtype)
                sent.append(name)
            self.client.finish_weight_update()

    monkeypatch.setattr(
        cuda.NCCLTrainerWeightTransferEngine,
        "trainer_init",
        classmethod(lambda cls, init, client, source: Engine(init, client, source)),
    )
    receiver = Receiver(copy)
    sender = cuda.sender_of("nccl", receiver, copy, 2)
    sender.send(copy.passing(load_causal_lm(str(tmp_path / "model")).named_parameters(), 4))
    assert sent == list(copy.shapes)
    assert receiver.calls == ["start", "finish 4"]
    sender.resend()
    assert len(sent) == 2 * len(copy.shapes)


def test_our_clients_are_vllms(copy):
    from vllm.distributed.weight_transfer.base import VLLMWeightSyncClient

    from prime_lightning.engines.server_fleet import Fleet
    from prime_lightning.engines.vllm_process import ProcessClient

    assert isinstance(ProcessClient(None, 1.0), VLLMWeightSyncClient)
    assert isinstance(Fleet([]), VLLMWeightSyncClient)
