"""`ImplicitPRM`: rewards of tokens, steps and responses from a trained PRM and its reference.

    r(token) = beta * (log p_PRM(token) - log p_reference(token))

The reward of a step, and of a response, is the sum over its tokens.
Free Process Rewards without Process Labels, arXiv 2412.01981, and PRIME, arXiv 2502.01456, Eq. 3.
Without the reference, `beta * log p_PRM` is what is left; see `ImplicitPRM.from_pretrained`.

Shapes: B responses, T response tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from prime_lightning.algorithms import process_reward
from prime_lightning.models.batch import Batch, inside
from prime_lightning.models.logprobs import ScoringLM
from prime_lightning.models.options import Loading
from prime_lightning.models.pretrained import check_same_vocabulary, load_tokenizer
from prime_lightning.models.prm_folder import PRMConfig
from prime_lightning.models.steps import Span, StepRule, steps_of_tokens
from prime_lightning.prm.responses import Given, is_empty, numbers, prompt_ids, with_tokens
from prime_lightning.rollout import Finish, Rollout
from prime_lightning.training.scoring import load_scoring
from prime_lightning.training.stepping import RoleStrategy

RECORDED = "recorded"
"""Take the reference that the PRM's JSON file names."""
AT_A_TIME = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Scored:
    """The rewards of one response, in units of `beta` times nats.

    Example:
        >>> tokens = {"tokens": ["7", ";"], "token_rewards": [0.5, -0.25]}
        >>> one = Scored(**tokens, steps=["7;"], step_rewards=[0.25], step_tokens=[2], reward=0.25)
        >>> sum(one.token_rewards) == sum(one.step_rewards) == one.reward
        True
    """

    tokens: list[str]
    """`[T]` the response's tokens as text, the end token included."""
    token_rewards: list[float]
    """`[T]` one a token."""
    steps: list[str]
    """Text of each step."""
    step_rewards: list[float]
    """One a step: the sum of its tokens' rewards. The end token belongs to the last step."""
    step_tokens: list[int]
    """Tokens of each step."""
    reward: float
    """Sum of all token rewards; after CE training, its sigmoid is the chance of a right answer."""


class ImplicitPRM:
    """A trained implicit PRM with its reference.

    Args:
        prm: The PRM.
        reference: The reference it was trained against; None goes without.
        tokenizer: Of both.
        config: Beta and the step rule.
        micro_tokens: Tokens, padding counted, of one forward.
    """

    def __init__(
        self,
        prm: ScoringLM,
        reference: ScoringLM | None,
        tokenizer: PreTrainedTokenizerBase,
        config: PRMConfig,
        micro_tokens: int = 16_384,
    ) -> None:
        if not getattr(tokenizer, "is_fast", False):
            raise ValueError(
                "Expected a fast tokenizer, which says where in the text each token stands, got "
                f"{type(tokenizer).__name__}."
            )
        self.prm, self.reference, self.tokenizer, self.config = prm, reference, tokenizer, config
        self.micro_tokens = micro_tokens

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        *,
        reference: str | None = RECORDED,
        config: PRMConfig | None = None,
        loading: Loading = Loading(),
        device: str = "auto",
        micro_tokens: int = 16_384,
    ) -> ImplicitPRM:
        """Load a PRM's folder, as `prime-lightning export` and `prime-lightning prm` write it.

        Without the reference (`reference=None`) half of the work goes away, and the rewards become
        `beta * log p_PRM`: not the reward that the PRM was trained with, never positive, lower the longer the text.
        They can only be compared between responses of one prompt. The authors of ImplicitPRM drop it for best-of-n,
        where they lose nothing (arXiv 2412.01981: 50.4 with, 50.6 without, DPO, mean of best-of-n on MATH-500).

        Args:
            folder: Hub id or folder.
            reference: Hub id or folder of the reference; "recorded" takes the one in the JSON file, None goes without.
            config: In place of the JSON file.
            loading: How the models are loaded.
            device: `auto` takes the current CUDA device if there is one.
            micro_tokens: Tokens, padding counted, of one forward.

        Raises:
            ValueError: if the folder is no PRM, its reference is not known, or the two have different tokenizers.
        """
        config = config or PRMConfig.read(folder)
        if reference == RECORDED:
            reference = config.reference_beside(folder)
            if reference is None:
                raise ValueError(
                    f"Expected the PRM in {str(folder)!r} to name its reference, got none: it was trained against the "
                    "policy of each iteration. Give that run's last policy as `reference`, or None to go without."
                )
        where = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device

        def load(name: str) -> ScoringLM:
            return load_scoring(name, loading, RoleStrategy()).to(where).eval().requires_grad_(False)  # type: ignore

        tokenizer = load_tokenizer(str(folder))
        if reference is not None:
            check_same_vocabulary("reference", reference, "PRM", str(folder))
        return cls(load(str(folder)), load(reference) if reference else None, tokenizer, config, micro_tokens)

    def score(
        self,
        prompts: Sequence[Given],
        responses: Sequence[str],
        *,
        steps: StepRule | None = None,
        finished: bool | Sequence[bool] = True,
    ) -> list[Scored]:
        """Score responses.

        Args:
            prompts: What the model saw, once a response: its text, or chat messages.
            responses: The texts after it.
            steps: Where steps end; by default as the PRM's JSON file says.
            finished: Whether the model ended each response, so that the end token belongs to it.

        Returns:
            One `Scored` a response, in their order.

        Raises:
            ValueError: for an empty response, or one that does not fit the model's positions.
        """
        rule = steps or self.config.steps
        return self.score_spans(prompts, responses, [rule.spans(text) for text in responses], finished=finished)

    def score_spans(
        self,
        prompts: Sequence[Given],
        responses: Sequence[str],
        spans: Sequence[Sequence[Span]],
        *,
        finished: bool | Sequence[bool] = True,
    ) -> list[Scored]:
        """As `score`, with the first and last character of each step given."""
        ended = [finished] * len(responses) if isinstance(finished, bool) else list(finished)
        rows = [
            {"prompt": prompt, "completion": text, "finish": Finish.STOP if end else Finish.LENGTH, "draw": draw}
            for prompt, text, end, draw in zip(prompts, responses, ended, numbers(prompts), strict=True)
        ]
        given = [Rollout.from_row(row, f"response {place}, counted from 0") for place, row in enumerate(rows)]
        for place, one in enumerate(given):
            if is_empty(one):
                raise ValueError(f"Expected no empty responses, got one at place {place}, counted from 0.")
        scored: list[Scored] = []
        for start in range(0, len(given), AT_A_TIME):
            scored += self._score(given[start : start + AT_A_TIME], spans[start : start + AT_A_TIME])
        return scored

    def _score(self, given: Sequence[Rollout], spans: Sequence[Sequence[Span]]) -> list[Scored]:
        responses = [one.completion for one in given]
        encoded = self.tokenizer([r.text for r in responses], add_special_tokens=False, return_offsets_mapping=True)
        end = int(self.tokenizer.eos_token_id)
        ids = [row if r.truncated else [*row, end] for r, row in zip(responses, encoded["input_ids"], strict=True)]
        prompts = [prompt_ids(one.prompt, self.tokenizer) for one in given]
        batch = Batch.of_groups([[with_tokens(*one) for one in zip(given, prompts, ids, strict=True)]])
        batch = replace(batch, group_B=torch.tensor([one.prompt.draw for one in given]))
        self._check_fits(batch)
        reward_BT = self.token_rewards(batch)
        out = []
        for i, response in enumerate(responses):
            starts = [a for a, _ in encoded["offset_mapping"][i]] + [len(response.text)] * (not response.truncated)
            rewards = reward_BT[i, : len(ids[i])]
            step_N = torch.tensor(steps_of_tokens(starts, spans[i]), dtype=torch.long)
            step_rewards = torch.zeros(len(spans[i])).index_add(0, step_N, rewards)
            out.append(
                Scored(
                    tokens=[str(self.tokenizer.decode([token])) for token in ids[i]],
                    token_rewards=rewards.tolist(),
                    steps=[response.text[a:b] for a, b in spans[i]],
                    step_rewards=step_rewards.tolist(),
                    step_tokens=step_N.bincount(minlength=len(spans[i])).tolist(),
                    reward=float(rewards.sum()),
                )
            )
        return out

    def token_rewards(self, batch: Batch) -> Tensor:
        """`[B, T]` rewards of all response tokens, 0 behind each response, on the CPU."""
        prm_BT = self._logprobs(self.prm, batch)
        reference_BT = self._logprobs(self.reference, batch) if self.reference else torch.zeros_like(prm_BT)
        return process_reward(prm_BT, reference_BT, inside(batch.response_length_B), beta=self.config.beta)

    @torch.no_grad()
    def _logprobs(self, model: ScoringLM, batch: Batch) -> Tensor:
        """`[B, T]` log-probs, responses of similar length together."""
        out_BT = torch.zeros(batch.mask_BT.shape)
        device = next(model.parameters()).device
        shared = model.shared_prompts
        for rows in batch.microbatches(torch.arange(len(batch)), self.micro_tokens, shared_prompts=shared):
            part = batch.select(rows).to(device)
            logprobs_bt, _ = model(part.tokens_BL, part.prompt_length_B, part.response_length_B)
            out_BT[rows, : logprobs_bt.shape[1]] = logprobs_bt.cpu()
        return out_BT

    def _check_fits(self, batch: Batch) -> None:
        limit = getattr(self.prm.model.config, "max_position_embeddings", None)
        longest = int((batch.prompt_length_B + batch.response_length_B).max())
        if limit is not None and longest > limit:
            raise ValueError(f"Expected prompt and response to fit the PRM's {limit} positions, got {longest} tokens.")
