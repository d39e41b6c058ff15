"""Rounds that stop when the batch is full: what is kept, how many prompts begin, and top-p with honest log-probs."""

import dataclasses

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st

from prime_lightning.rollout import Sampling
from prime_lightning.sampling.acceptance import Acceptance, AccuracyFilter

FILTER = AccuracyFilter(low=0.1, high=0.9)


class Interleaved(tiny.HFEngine):
    """All prompts of a round in one batch, so that groups which are not whole have finished samples."""

    def __init__(self):
        super().__init__(batch_size=4096)
        self.drawn, self.taken = [], 0

    def stream(self, prompts, sampling, finished=None):
        self.drawn.append([prompt.draw for prompt in prompts])
        self.taken += sum(len((finished or {}).get(prompt.draw, ())) for prompt in prompts)
        yield from super().stream(prompts, sampling, finished)


@pytest.fixture
def module(warm_model):
    """Samples of very different lengths: any operator ends one."""
    data = tiny.data(
        warm_model, accuracy_filter=FILTER, patience=1000, engine=Interleaved(), oversample=4.0, max_staleness=1
    )  # ahead, so that two batches may be of the same weights
    data.setup("fit")
    data.engine.end_ids = [1, *range(9, 18)]
    data.verifiers.submit = tiny.parity
    yield data
    data.close()


def rollouts(batch):
    return [(r.prompt.draw, r.completion.token_ids, r.completion.versions) for r in batch.rollouts]


def test_kept_samples_change_nothing_at_equal_weights(module):
    loader = module.training_loader(0, 1)
    got = [loader.collect() for _ in range(5)]
    assert module.engine.taken > 10
    assert sum(batch.metrics.means()["rollout/kept_samples"] for batch in got) == module.engine.taken
    module.engine.taken = 0
    forgetful = module.training_loader(0, 1)
    expected = []
    for _ in range(5):
        expected.append(forgetful.collect())
        forgetful.finished.clear()
    assert module.engine.taken == 0
    assert [rollouts(batch) for batch in got] == [rollouts(batch) for batch in expected]


def test_kept_samples_of_older_weights_are_drawn_again(module):
    """Otherwise a slot would hold its old sample if that was short and a fresh one if it was long."""
    loader = module.training_loader(0, 1)
    loader.collect()
    assert any(loader.finished.values())
    module.engine.version += 1
    batch = loader.collect()
    assert module.engine.taken == 0 == batch.metrics.means()["rollout/kept_samples"]
    assert {v for _, _, versions in rollouts(batch) for v in versions} == {module.engine.version}


def test_without_oversampling_nothing_is_kept_or_aborted(module):
    module.oversample = 1.0
    loader = module.training_loader(0, 1)
    for _ in range(3):
        loader.collect()
    assert not loader.finished
    assert not loader.returned
    assert module.engine.taken == 0


# ---- how many prompts begin


@given(st.lists(st.tuples(st.integers(1, 50), st.integers(0, 50)), max_size=30), st.integers(1, 64))
def test_prompts_begun_follow_the_acceptance(batches, missing):
    lately, accepted, decided = Acceptance(), 1.0, 1.0
    for a, rejected in batches:
        lately.next_batch()
        lately.add(accepted=a, decided=a + rejected)
        accepted, decided = 0.8 * accepted + a, 0.8 * decided + a + rejected
    wanted = min(10.0, decided / accepted) * missing
    assert wanted <= lately.prompts(missing) < wanted + 1 + 1e-9
    assert lately.prompts(missing) >= missing


def test_auto_oversampling_finds_the_acceptance_rate_and_resumes_with_it(module):
    module.oversample = "auto"
    first, again = module.training_loader(0, 1), module.training_loader(0, 1)
    batches = [first.collect() for _ in range(6)]
    assert [rollouts(batch) for batch in batches] == [rollouts(again.collect()) for _ in range(6)]
    asked = module.engine.drawn
    assert len(asked[0]) == 4  # nothing is known before the first round
    rate = first.acceptance.accepted / first.acceptance.decided
    assert 0.3 < rate < 0.95
    resumed = module.training_loader(0, 1)
    resumed.load_state_dict(first.state_dict())
    module.engine.drawn.clear()
    assert rollouts(first.collect()) == rollouts(resumed.collect())
    half = len(module.engine.drawn) // 2
    assert module.engine.drawn[:half] == module.engine.drawn[half:]


def test_auto_is_an_option_and_numbers_below_one_are_refused(warm_model):
    assert tiny.data(warm_model, oversample="auto").training_loader
    with pytest.raises(ValueError, match=r"`data\.oversample` of at least 1, got 0\.5"):
        tiny.data(warm_model, oversample=0.5)


# ---- top-p and top-k


class Raw(tiny.HFEngine):
    """Gives log-probs of the full softmax, as vLLM does by default."""

    def stream(self, prompts, sampling, finished=None):
        full = dataclasses.replace(sampling, top_p=1.0, top_k=0)
        for prompt, group in super().stream(prompts, sampling, finished):
            for done in group:
                again = self.score(prompt, done.token_ids, full)
                done.logprobs[:] = again
            yield prompt, group

    def score(self, prompt, tokens, sampling):
        ids = torch.tensor([[*prompt.token_ids, *tokens]])
        with torch.no_grad():
            logits = self.model(ids).logits[0, len(prompt.token_ids) - 1 : -1] / (sampling.temperature or 1)
        return logits.log_softmax(-1).gather(1, torch.tensor(tokens)[:, None])[:, 0].tolist()


@pytest.mark.parametrize("cut", [{"top_p": 0.9}, {"top_k": 5}])
def test_truncated_sampling_wants_truncated_logprobs(warm_model, tmp_path, cut):
    sampling = Sampling(samples=4, max_tokens=8, **cut)
    with pytest.raises(ValueError, match="Expected log-probs of the truncated distribution") as raised:
        tiny.fit(tmp_path, tiny.module(warm_model), tiny.data(warm_model, engine=Raw(), sampling=sampling), 1)
    assert len(str(raised.value).splitlines()) == 2
    tiny.fit(tmp_path, tiny.module(warm_model), tiny.data(warm_model, engine=Raw()), 1)  # nothing is cut: fine


@pytest.mark.parametrize("top_p", [0.9, 0.2])
def test_the_importance_weight_of_top_p_is_the_mass_that_it_keeps(model_folder, tmp_path, top_p):
    """`policy / behaviour = Z`, the policy's probability of the top-p set: in [top_p, 1] where set and policy agree."""
    data = tiny.data(model_folder, sampling=Sampling(samples=4, max_tokens=8, top_p=top_p))
    history = tiny.fit(tmp_path, tiny.module(model_folder), data, 1)
    row, batch = history.rows[0], history.outputs[0].batch
    assert batch.truncation == pytest.approx(-torch.tensor(top_p).log().item())
    assert top_p - 1e-3 < row["importance/weight"] <= 1 + 1e-5
    assert row["importance/abs_diff_max"] <= batch.truncation + 1e-4
    assert row["importance/weight"] < 0.99  # a random model: the set does leave something out
    assert row["importance/capped"] == 0


def test_what_truncation_is_in_nats():
    assert Sampling().truncation == 0
    assert Sampling(top_p=0.5).truncation == pytest.approx(0.6931472)
    assert Sampling(top_k=3).truncation == float("inf")
