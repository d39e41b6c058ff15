"""The greedy probe: right engines pass, at the times that are asked for; wrong ones end the run before it samples."""

import math

import pytest
import tiny
import torch
from toys import tiny_lm

from prime_lightning.models.head import chosen_logprobs
from prime_lightning.models.logprobs import ScoringLM
from prime_lightning.sampling.sync import PolicyWeights
from prime_lightning.training.options import Probe
from prime_lightning.training.passes import check_greedy


class Tampered(tiny.HFEngine):
    """Loses one weight after it was sent, from a version on."""

    def __init__(self, version=0):
        super().__init__(batch_size=32)
        self.spoilt_from, self.asked = version, []

    def load_weights(self, weights, version):
        super().load_weights(weights, version)
        if version >= self.spoilt_from:
            with torch.no_grad():
                self.model.model.layers[0].mlp.down_proj.weight.neg_()

    def stream(self, prompts, sampling, finished=None):
        self.asked.append((self.version, sampling.temperature))
        return super().stream(prompts, sampling, finished)


def looks(engine):
    """Versions of the weights that were probed."""
    return [version for version, temperature in engine.asked if temperature == 0]


@pytest.mark.parametrize(("every", "versions"), [(0, [0]), (2, [0, 2, 4]), (None, [])])
def test_a_right_engine_is_asked_at_the_start_and_at_the_interval(warm_model, tmp_path, every, versions):
    data = tiny.data(warm_model, engine=Tampered(version=99))
    tiny.fit(tmp_path, tiny.module(warm_model, probe=Probe(every=every)), data, 4)
    assert looks(data.engine) == versions


@pytest.mark.parametrize("options", [{"max_staleness": 1}, {"max_prompt_tokens": 1024}])
def test_regrets_of_a_right_engine_are_those_of_a_plain_forward(warm_model, tmp_path, options):
    prime, data = tiny.module(warm_model), tiny.data(warm_model, **options)
    found = []
    look = tiny.pl.callbacks.LambdaCallback(
        on_train_batch_end=lambda *_: found.append(check_greedy(prime.stepper, data, Probe(prompts=3, tokens=6)))
    )
    tiny.fit(tmp_path, prime, data, 1, callbacks=[look])
    regrets = []
    data.setup("fit")
    data.sync(PolicyWeights(prime.policy.model), 1)
    for prompt, done in data.greedy(3, 6):
        ids = torch.tensor([[*prompt.token_ids, *done.token_ids]])
        logits_TV = prime.policy.model(ids).logits[0, -len(done.token_ids) - 1 : -1]
        regrets += (logits_TV.amax(-1) - logits_TV[range(len(done.token_ids)), done.token_ids]).tolist()
    assert len(regrets) > 3
    assert found[0].tolist() == pytest.approx(regrets, abs=1e-5)
    assert max(regrets) < 1e-3


def test_an_engine_that_loses_a_weight_ends_the_run_before_it_samples(warm_model, tmp_path):
    data = tiny.data(warm_model, engine=Tampered())
    with pytest.raises(ValueError, match=r"asked greedily.*as token \d+ of the answer .* nats and .* weights did not"):
        tiny.fit(tmp_path, tiny.module(warm_model), data, 4)
    assert data.engine.asked == [(0, 0.0)]


def test_an_engine_that_loses_a_weight_later_is_found_at_the_interval(warm_model, tmp_path):
    data = tiny.data(warm_model, engine=Tampered(version=2))
    with pytest.raises(ValueError, match="asked greedily"):
        tiny.fit(tmp_path, tiny.module(warm_model, probe=Probe(every=1)), data, 4)
    assert looks(data.engine) == [0, 1, 2]


def test_what_is_within_the_margin_passes(warm_model, tmp_path):
    data = tiny.data(warm_model, engine=Tampered())
    prime = tiny.module(warm_model, probe=Probe(margin=math.inf))
    with pytest.raises(ValueError, match="mean difference"):  # of the first batch, one iteration later
        tiny.fit(tmp_path, prime, data, 4)


def test_a_data_module_that_cannot_be_asked_is_not():
    assert check_greedy(None, object(), Probe()).numel() == 0


def test_the_likeliest_token_s_log_prob_is_the_greatest_of_all():
    logits_NV = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    own_N, best_N = chosen_logprobs(logits_NV, torch.arange(5), temperature=0.7, entropy="likeliest")
    all_NV = (logits_NV / 0.7).log_softmax(-1)
    torch.testing.assert_close(own_N, all_NV[range(5), range(5)])
    torch.testing.assert_close(best_N, all_NV.max(-1).values)


def test_the_likeliest_has_no_gradient_in_chunks():
    scoring = ScoringLM(tiny_lm(), chunk_tokens=2)
    tokens, prompts, responses = torch.randint(2, 29, (2, 9)), torch.tensor([2, 3]), torch.tensor([7, 4])
    logprobs_BT, best_BT = scoring(tokens, prompts, responses, entropy="likeliest")
    assert logprobs_BT.requires_grad
    assert not best_BT.requires_grad
    assert (best_BT >= logprobs_BT - 1e-6).all()
    assert best_BT[1, 4:].eq(0).all()


@pytest.mark.parametrize("wrong", [{"every": -1}, {"prompts": 0}, {"tokens": 0}, {"margin": -0.1}])
def test_impossible_numbers_are_refused(wrong):
    with pytest.raises(ValueError, match=f"`probe.{next(iter(wrong))}`"):
        Probe(**wrong)
