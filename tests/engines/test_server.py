"""`ServerEngine` with two real vLLM servers on loopback, one of them by https, started once for the file.

One is killed and comes back.
"""

import itertools
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from importlib.util import find_spec
from ipaddress import IPv4Address
from pathlib import Path

import pytest
import torch

if find_spec("vllm"):  # which brings it
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.hashes import SHA256
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
    from cryptography.x509.oid import NameOID

from prime_lightning.engines import Engine
from prime_lightning.engines.hf import HFEngine, truncate
from prime_lightning.engines.server.client import SampleCall, ServerClient
from prime_lightning.engines.server.engine import ServerEngine
from prime_lightning.engines.vllm import group as vllm_group
from prime_lightning.models.pretrained import load_causal_lm
from prime_lightning.prompts.arithmetic import ArithmeticPrompts, build_tokenizer, write_model
from prime_lightning.rollout import Completion, Prompt, Sampling

pytestmark = pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed (docs/vllm.md)")

KEY = "a key"
GREEDY = Sampling(samples=1, max_tokens=24, temperature=0.0)
SAMPLING = Sampling(samples=4, max_tokens=24, seed=3)


class Serving:
    """A `vllm serve` process with the options in docs/vllm.md."""

    def __init__(self, model: str, folder: Path, tls: tuple[Path, Path] | None = None) -> None:
        self.model, self.folder, self.tls = model, folder, tls
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.url = f"{'https' if tls else 'http'}://127.0.0.1:{self.port}"
        self.start()

    def start(self) -> None:
        options = {
            "model": self.model,
            "served-model-name": "tiny",
            "host": "127.0.0.1",
            "port": self.port,
            "api-key": KEY,
            "dtype": "float32",
            "logprobs-mode": "processed_logprobs",
            "weight-transfer-config": '{"backend":"prime_host"}',
            "worker-extension-cls": "prime_lightning.engines.vllm.worker.VLLMWorker",
            "max-num-seqs": 16,
            "kv-cache-memory-bytes": 2**27,
            "block-size": 32,
            **(dict(zip(("ssl-certfile", "ssl-keyfile"), self.tls, strict=True)) if self.tls else {}),
        }
        flags = ["--enforce-eager", "--no-enable-chunked-prefill"]
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *flags]
        settings = {
            "VLLM_SERVER_DEV_MODE": "1",
            "TORCHDYNAMO_DISABLE": "1",
            "OMP_NUM_THREADS": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "VLLM_NO_USAGE_STATS": "1",
            "TMPDIR": str(self.folder),
        }
        with (self.folder / f"{self.port}.log").open("ab") as log:
            self.process = subprocess.Popen(
                [*command, *(word for name, value in options.items() for word in (f"--{name}", str(value)))],
                env=os.environ | settings,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def kill(self) -> None:
        vllm_group.end(self.process.pid)
        self.process.wait()


def self_signed(folder: Path) -> tuple[Path, Path]:
    """A certificate for 127.0.0.1 and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "a server of a test")])
    now = datetime.now(UTC)
    made = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(IPv4Address("127.0.0.1"))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, SHA256())
    )
    (folder / "certificate.pem").write_bytes(made.public_bytes(Encoding.PEM))
    form = (Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    (folder / "key.pem").write_bytes(key.private_bytes(*form))
    return folder / "certificate.pem", folder / "key.pem"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    torch.set_num_threads(1)
    return str(write_model(tmp_path_factory.mktemp("model"), hidden_size=128))


@pytest.fixture(scope="module")
def servings(model: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Serving]]:
    folder = tmp_path_factory.mktemp("servers")
    made = [Serving(model, folder), Serving(model, folder, tls=self_signed(folder))]
    yield made
    for serving in made:
        if serving.process.poll() is None:
            serving.kill()


@pytest.fixture(scope="module")
def engine(model: str, servings: list[Serving]) -> Iterator[ServerEngine]:
    os.environ["PRIME_TEST_KEY"] = KEY
    made = ServerEngine(
        [s.url for s in servings],
        api_key_variable="PRIME_TEST_KEY",
        certificate=str(servings[1].tls[0]),
        in_flight=16,
        start_timeout=500,
    )
    made.start(model)
    yield made
    made.close()


@pytest.fixture(scope="module")
def prompts() -> list[Prompt]:
    return [ArithmeticPrompts(seed=5, operations=6).prompt(draw, build_tokenizer()) for draw in range(16)]


def weights(model: str, noise: int) -> list[tuple[str, torch.Tensor]]:
    lm = load_causal_lm(model)
    torch.manual_seed(noise)
    return [(name, p.detach() + 0.03 * torch.randn_like(p)) for name, p in lm.named_parameters()]


def collect(engine: Engine, prompts: list[Prompt], sampling: Sampling) -> dict[int, list[Completion]]:
    return {prompt.draw: group for prompt, group in engine.stream(prompts, sampling)}


def test_servers_sample_what_the_hf_engine_does_over_weight_updates(engine, model, prompts):
    assert isinstance(engine, Engine)
    hf = HFEngine()
    hf.start(model)
    lm = load_causal_lm(model).eval()
    nucleus = Sampling(samples=2, max_tokens=24, temperature=0.7, top_p=0.9)
    for version in range(3):
        named = weights(model, noise=version)
        engine.load_weights(named, version)
        hf.load_weights(named, version)
        lm.load_state_dict(dict(named))
        mine, theirs = collect(engine, prompts, GREEDY), collect(hf, prompts, GREEDY)
        assert {d: g[0].token_ids for d, g in mine.items()} == {d: g[0].token_ids for d, g in theirs.items()}
        assert {v for g in mine.values() for v in g[0].versions} == {version}
        for prompt, group in engine.stream(prompts, nucleus):
            for done in group:
                with torch.no_grad():
                    logits = lm(torch.tensor([[*prompt.token_ids, *done.token_ids]])).logits[0]
                logits = truncate(logits[len(prompt.token_ids) - 1 : -1] / 0.7, 0, 0.9)
                expected = logits.log_softmax(-1).gather(1, torch.tensor(done.token_ids)[:, None])[:, 0]
                torch.testing.assert_close(torch.tensor(done.logprobs), expected, atol=1e-4, rtol=0)


def test_samples_repeat_and_both_servers_work(engine, prompts):
    first, second = collect(engine, prompts, SAMPLING), collect(engine, prompts[::-1], SAMPLING)
    assert {d: [c.token_ids for c in g] for d, g in first.items()} == {
        d: [c.token_ids for c in g] for d, g in second.items()
    }
    assert all(len(group) == 4 and len({tuple(c.token_ids) for c in group}) > 1 for group in first.values())
    metrics = [
        server.client.answer(server.client.connect(5), "GET", "/metrics", None).read() for server in engine.servers
    ]
    assert all(b"vllm:generation_tokens_total" in text for text in metrics)


def test_a_stop_string_stays(engine, prompts):
    groups = collect(engine, prompts, Sampling(samples=2, max_tokens=60, stop=(";",), seed=1))
    stopped = [c for group in groups.values() for c in group if ";" in c.text]
    assert stopped
    assert all(c.text.endswith(";") and c.text.count(";") == 1 for c in stopped)


def running(engine: ServerEngine) -> float:
    """Samples that the servers compute now."""
    total = 0.0
    for server in engine.servers:
        text = server.client.answer(server.client.connect(5), "GET", "/metrics", None).read().decode()
        total += sum(float(line.split()[-1]) for line in text.splitlines() if line.startswith("vllm:num_requests_r"))
    return total


def test_closing_a_stream_aborts_the_rest(engine, prompts):
    stream = engine.stream(prompts * 8, Sampling(samples=4, max_tokens=90))
    next(stream)
    stream.close()
    deadline = time.monotonic() + 60
    while running(engine) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert running(engine) == 0


def test_updates_amid_sampling_cut_samples_that_go_on(engine, model, prompts, monkeypatch):
    """No update loses a sample, and each token is of the version that it says."""
    lost = []
    monkeypatch.setattr(SampleCall, "cut", lost.append)
    versions = range(4, 9)
    named = {version: weights(model, noise=version) for version in versions}
    engine.load_weights(named[4], 4)
    stream = engine.stream(prompts * 4, Sampling(samples=4, max_tokens=100, seed=2))
    groups = []
    for version in versions[1:]:
        groups += itertools.islice(stream, 8)
        update = threading.Thread(target=engine.load_weights, args=(named[version], version))
        update.start()
        groups += itertools.islice(stream, 4)
        update.join()
    groups += stream
    assert len(groups) == 4 * len(prompts)
    assert lost == []
    done = [(prompt, c) for prompt, group in groups for c in group]
    assert {v for _, c in done for v in c.versions} == {*versions}
    assert all(c.versions == sorted(c.versions) for _, c in done)
    mixed = [(prompt, c) for prompt, c in done if len(set(c.versions)) > 1]
    assert mixed
    for version in versions:
        lm = load_causal_lm(model).eval()
        lm.load_state_dict(dict(named[version]))
        for prompt, c in mixed:
            with torch.no_grad():
                logits = lm(torch.tensor([[*prompt.token_ids, *c.token_ids]])).logits
            logprobs = logits[0, len(prompt.token_ids) - 1 : -1].log_softmax(-1)
            picked = torch.tensor([v == version for v in c.versions])
            expected = logprobs.gather(1, torch.tensor(c.token_ids)[:, None])[:, 0][picked]
            torch.testing.assert_close(torch.tensor(c.logprobs)[picked], expected, atol=1e-4, rtol=0)


def test_wrong_weights_and_long_prompts_are_refused(engine, model, prompts):
    engine.load_weights(weights(model, noise=5), 5)
    with pytest.raises(ValueError, match="got none for"):
        engine.load_weights(weights(model, noise=4)[:-1], 9)
    assert (engine.version, engine.context) == (5, 128)
    with pytest.raises(ValueError, match="fit the model's 128 positions"):
        next(engine.stream(prompts, Sampling(max_tokens=128)))
    engine.load_weights(weights(model, noise=5), 5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"served_model": "huge"}, r"to serve 'huge'.*got \['tiny'\]"),
        ({"dtype": "bfloat16"}, r"'--dtype': 'bfloat16'.*got .*'float32'"),
        ({"api_key_variable": "NO_SUCH_VARIABLE"}, "refused \\(401\\)"),
        ({"urls": ["http://127.0.0.1:9"], "start_timeout": 0.1}, "Expected a vLLM server at http://127.0.0.1:9"),
        ({"urls": ["127.0.0.1:8000"]}, "server URLs such as"),
        ({"urls": "https", "start_timeout": 0.1}, "certificate verify failed"),
        ({"transfer": "disk"}, "`shared_folder` with transfer `disk`"),
    ],
)
def test_servers_that_do_not_fit_are_refused(engine, model, servings, options, message):
    if options.get("urls") == "https":
        options = options | {"urls": [servings[1].url]}
    with pytest.raises(ValueError, match=message):
        ServerEngine(**{"urls": [servings[0].url], "api_key_variable": "PRIME_TEST_KEY", **options}).start(model)


def test_another_tokenizer_is_noticed(engine, servings, tmp_path):
    from tokenizers import Regex, Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Split
    from transformers import PreTrainedTokenizerFast

    folder = write_model(tmp_path, hidden_size=128)
    vocabulary = build_tokenizer().get_vocab()
    shuffled = {token: (i + 3) % len(vocabulary) for token, i in vocabulary.items()}
    inner = Tokenizer(WordLevel(shuffled, unk_token="<pad>"))
    inner.pre_tokenizer = Split(Regex("."), "isolated")
    PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>").save_pretrained(folder)
    with pytest.raises(ValueError, match="to have the trainer's tokenizer"):
        ServerEngine([servings[0].url], api_key_variable="PRIME_TEST_KEY").start(str(folder))


def test_a_server_dies_and_comes_back_with_the_present_weights(engine, model, servings, prompts):
    stream = engine.stream(prompts * 4, SAMPLING)
    groups = [next(stream)]

    def rest_without_the_first_server() -> list:
        servings[0].kill()
        return list(stream)

    with pytest.warns(UserWarning, match="A server is left out"):
        groups += rest_without_the_first_server()
    assert sorted(prompt.draw for prompt, _ in groups) == sorted([*range(16)] * 4)
    engine.load_weights(weights(model, noise=6), 6)  # the other one alone
    before = collect(engine, prompts, GREEDY)
    servings[0].start()
    deadline = time.monotonic() + 500
    while not engine.servers[0].well and time.monotonic() < deadline:
        time.sleep(0.5)
    alone = ServerEngine([servings[0].url])
    alone.tokenizer, alone.end_ids, alone.token_ids = engine.tokenizer, engine.end_ids, engine.token_ids
    alone.channel().servers, alone.channel().version = engine.servers[:1], engine.version
    assert collect(alone, prompts, GREEDY) == before
    assert ServerClient(servings[0].url).get("/weight_info")["weight_version"] == "6"


@pytest.mark.timeout(1500)
def test_two_ranks_share_the_servers(engine, model, servings, tmp_path, monkeypatch):
    """The last one here: the servers then have the weights of other trainers."""
    import vllm_ranks  # needs DeepSpeed, as all test environments have it

    monkeypatch.setenv("PRIME_TEST_CERTIFICATE", str(servings[1].tls[0]))
    vllm_ranks.run(model, tmp_path, *(serving.url for serving in servings))
    assert [server.client.get("/weight_info")["weight_version"] for server in engine.servers] == ["2", "2"]


@pytest.mark.timeout(900)
def test_a_server_that_ranks_share_dies_and_comes_back_for_all_of_them(engine, model, servings, tmp_path, monkeypatch):
    import launching
    import server_ranks

    engine.close()  # or it would give the server that comes back weights of its own
    monkeypatch.setenv("PRIME_TEST_CERTIFICATE", str(servings[1].tls[0]))

    def strike() -> None:
        wait_for_files(tmp_path, "kill")
        servings[0].kill()
        (tmp_path / "killed").touch()
        wait_for_files(tmp_path, "start")
        servings[0].start()

    hand = threading.Thread(target=strike, daemon=True)
    hand.start()
    urls = [serving.url for serving in servings]
    codes, said = launching.launch(server_ranks.__file__, tmp_path, model, str(tmp_path), *urls, seconds=600)
    assert codes == [0, 0], "\n".join(text[-4000:] for text in said)
    for rank in range(2):
        found = json.loads((tmp_path / f"rank{rank}.json").read_text())
        assert found["survived"] == found["draws"] == [*range(rank, 12, 2)]
        assert found["well"] == [False, True]
        assert "A server is left out, and its samples are drawn elsewhere" in found["said"][0]
        assert found["same"]
        assert found["versions"] == ["3", "3"]
        assert found["wrong"].startswith("ValueError: " + "Rank 0: " * rank + "Expected all weights of the policy")
        assert found["after"] == 6  # and the servers go on


def wait_for_files(folder: Path, name: str) -> None:
    """Until each rank has written its own."""
    while not all((folder / f"{name}{rank}").exists() for rank in range(2)):
        time.sleep(0.1)
