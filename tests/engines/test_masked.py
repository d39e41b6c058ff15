"""Ids without a token under `mask_padding`: vLLM and a vLLM server draw as the hf engine does."""

import os
from importlib.util import find_spec

import pytest
import torch

from prime_lightning.engines.hf import HFEngine
from prime_lightning.engines.server.engine import ServerEngine
from prime_lightning.engines.vllm.engine import VLLMEngine
from prime_lightning.models.pretrained import load_causal_lm
from prime_lightning.prompts.arithmetic import ArithmeticPrompts, build_tokenizer, write_model
from prime_lightning.rollout import Sampling

pytestmark = pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed (docs/vllm.md)")

TOKENS, ROWS = 41, 64
SAMPLINGS = [
    Sampling(samples=1, max_tokens=16, temperature=0.0, mask_padding=True),
    Sampling(samples=4, max_tokens=16, seed=3, mask_padding=True),
    Sampling(samples=4, max_tokens=16, temperature=0.7, top_p=0.9, mask_padding=True),
]


@pytest.fixture(scope="module")
def padded(tmp_path_factory):
    """A random model, to which all 64 ids are about as likely."""
    torch.set_num_threads(1)
    folder = str(write_model(tmp_path_factory.mktemp("padded"), hidden_size=128))
    model = load_causal_lm(folder)
    torch.manual_seed(0)
    model.resize_token_embeddings(ROWS, mean_resizing=False)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(params=["vllm", "server"])
def engine(request, padded, tmp_path):
    if request.param == "vllm":
        made, serving = VLLMEngine(device="cpu", max_sequences=64), None
    else:
        import test_server  # which needs what vLLM brings

        os.environ["PRIME_TEST_KEY"] = test_server.KEY
        serving = test_server.Serving(padded, tmp_path)
        made = ServerEngine([serving.url], api_key_variable="PRIME_TEST_KEY", in_flight=16, start_timeout=500)
    made.start(padded)
    yield made
    made.close()
    if serving:
        serving.kill()


@pytest.mark.timeout(900)
def test_no_masked_id_is_drawn_and_log_probs_are_the_trainers(engine, padded):
    prompts = [ArithmeticPrompts(seed=5, operations=6).prompt(draw, build_tokenizer()) for draw in range(8)]
    plain = Sampling(samples=4, max_tokens=16, seed=3)
    drawn = {token for _, group in engine.stream(prompts, plain) for done in group for token in done.token_ids}
    assert max(drawn) >= TOKENS
    hf, model = HFEngine(device="cpu"), load_causal_lm(padded).eval()
    hf.start(padded)
    for sampling in SAMPLINGS:
        groups = {prompt.draw: group for prompt, group in engine.stream(prompts, sampling)}
        assert max(token for group in groups.values() for done in group for token in done.token_ids) < TOKENS
        for prompt in prompts if sampling.top_p == 1 else []:
            for done in groups[prompt.draw]:
                with torch.no_grad():
                    logits = model(torch.tensor([[*prompt.token_ids, *done.token_ids]])).logits[0, :, :TOKENS]
                logprobs = logits[len(prompt.token_ids) - 1 : -1].log_softmax(-1)
                expected = logprobs.gather(1, torch.tensor(done.token_ids)[:, None])[:, 0]
                torch.testing.assert_close(torch.tensor(done.logprobs), expected, atol=1e-4, rtol=0)
        if sampling.temperature == 0:
            theirs = {prompt.draw: group[0].token_ids for prompt, group in hf.stream(prompts, sampling)}
            assert {draw: group[0].token_ids for draw, group in groups.items()} == theirs
