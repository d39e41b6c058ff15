"""Token log-probs and entropy of a causal language model, for the response tokens only.

The vocabulary is projected onto only where a response token is predicted; `head.py` says how.

Shapes: B responses, L prompt and response tokens, T response tokens, N response tokens of all rows, H hidden width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from prime_lightning.models.attention import check_packed, pack, packed_arguments
from prime_lightning.models.head import Entropy, Kind, Scores, head_logprobs, open_head

SCALED_HEADS = ("logit_scale", "logits_scaling", "lm_head_multiplier", "output_multiplier")


def response_index(prompt_length_B: Tensor, response_length_B: Tensor) -> tuple[Tensor, Tensor]:
    """Row and response position of each response token, both `[N]`, row by row.

    Example:
        >>> response_index(torch.tensor([5, 2]), torch.tensor([2, 1]))
        (tensor([0, 0, 1]), tensor([0, 1, 0]))
    """
    T = int(response_length_B.max())
    positions_T = torch.arange(T, device=response_length_B.device)
    rows_N, steps_N = (positions_T[None] < response_length_B[:, None]).nonzero(as_tuple=True)
    return rows_N, steps_N


def response_places(prompt_length_B: Tensor, response_length_B: Tensor, device: torch.device) -> tuple[Tensor, ...]:
    """`response_index` and the place `[N]` of each response token in its row, on a device.

    Of lengths on the host they are computed there, and the host does not wait for the device.
    """
    rows_N, steps_N = response_index(prompt_length_B, response_length_B)
    found = rows_N, steps_N, prompt_length_B[rows_N] + steps_N
    return tuple(x_N.to(device, non_blocking=True) for x_N in found)


class ResponseModule(nn.Module):
    """A decoder that is asked about response tokens only."""

    model: nn.Module
    packed: bool
    shared_prompts: bool

    def before_responses(
        self, tokens_BL: Tensor, prompt_length_B: Tensor, response_length_B: Tensor
    ) -> tuple[Tensor, Tensor, Callable[[Tensor], Tensor]]:
        """Hidden states `[N, H]` before each response token, these tokens `[N]`, and how numbers `[N]` become `[B, T]`.

        Behind each response are zeros.
        """
        rows_N, steps_N, places_N = response_places(prompt_length_B, response_length_B, tokens_BL.device)
        length_B = prompt_length_B + response_length_B
        shared_B = prompt_length_B if self.shared_prompts else None
        hidden_NH = hidden_states(
            self.model, tokens_BL, length_B, rows_N, places_N - 1, packed=self.packed, prompts_B=shared_B
        )
        shape = len(tokens_BL), int(response_length_B.max())

        def laid_out(numbers_N: Tensor) -> Tensor:
            return torch.zeros(shape, device=tokens_BL.device).index_put((rows_N, steps_N), numbers_N)

        return hidden_NH, tokens_BL[rows_N, places_N], laid_out


class ScoringLM(ResponseModule):
    """A causal LM whose forward returns log-probs of given responses instead of logits.

    It is one module so that DDP, FSDP and DeepSpeed wrap forward, projection and all.

    Args:
        model: A Hugging Face causal LM (or a PEFT model around one).
        chunk_tokens: Response tokens projected onto the vocabulary at a time.
        packed: Put all rows one behind another without padding (position ids restart at each row). For the attention
            kind `varlen` or flash attention; with others it costs a mask of (all tokens)^2.
        shared_prompts: Run a prompt once for all of its responses in a batch; for packed rows and `varlen`.
        head: How logits become log-probs, see `options.Loading`.
        head_dtype: Type that the vocabulary is projected onto in.
        unused: Ids without a token, which `masked` leaves out.

    Raises:
        ValueError: for models whose head does more than a projection and a soft cap, or that cannot be
            packed.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        chunk_tokens: int = 1024,
        packed: bool = False,
        shared_prompts: bool = False,
        head: Kind = "auto",
        head_dtype: str | None = None,
        unused: Sequence[int] = (),
    ) -> None:
        super().__init__()
        config = causal_lm(model).config.get_text_config()
        for name in SCALED_HEADS:
            if getattr(config, name, None) not in (None, 1, 1.0):
                raise ValueError(
                    f"Expected a model whose head is a projection, got {type(model).__name__} with {name}="
                    f"{getattr(config, name)}. Its log-probs would be wrong; take another architecture."
                )
        if packed:
            check_packed(causal_lm(model))
        self.model = model
        self.chunk_tokens = chunk_tokens
        self.packed, self.shared_prompts = packed, shared_prompts
        self.kind, self.dtype = head, getattr(torch, head_dtype) if head_dtype else None
        rows = torch.arange(causal_lm(model).config.get_text_config().vocab_size)
        unused_V = torch.isin(rows, torch.tensor(unused)) if len(unused) else None
        self.unused_V: Tensor | None
        self.register_buffer("unused_V", unused_V, persistent=False)
        open_head(causal_lm(model).get_output_embeddings(), self.kind, self.dtype)

    def forward(
        self,
        tokens_BL: Tensor,
        prompt_length_B: Tensor,
        response_length_B: Tensor,
        temperature: float = 1.0,
        entropy: Entropy = "none",
        masked: bool = False,
    ) -> Scores:
        """Log-prob of each response token and entropy at its place.

        Args:
            tokens_BL: Prompt and response, padded on the right; what stands in the padding does not matter.
            prompt_length_B: Tokens of each prompt, at least 1; lengths are best on the host.
            response_length_B: Tokens of each response.
            temperature: Divides the logits.
            entropy: Whether it is computed, and has a gradient; or the log-prob of the likeliest token instead.
            masked: Whether ids without a token have the probability 0.

        Returns:
            Two tensors `[B, T]`, T the longest response, zero behind each response; None in the place of the second
            where `entropy` is "none".
        """
        hidden_NH, targets_N, laid_out = self.before_responses(tokens_BL, prompt_length_B, response_length_B)
        logprobs_N, entropy_N = self.head_scores(hidden_NH, targets_N, temperature, entropy, masked)
        return laid_out(logprobs_N), None if entropy_N is None else laid_out(entropy_N)

    def head_scores(
        self, hidden_NH: Tensor, targets_N: Tensor, temperature: float, entropy: Entropy, masked: bool = False
    ) -> Scores:
        """Log-probs and entropies `[N]` from last hidden states, in one call of the vocabulary head."""
        lm = causal_lm(self.model)
        cap = getattr(lm.config.get_text_config(), "final_logit_softcapping", None)
        how: dict[str, Any] = {"kind": self.kind, "dtype": self.dtype, "chunk_tokens": self.chunk_tokens}
        within = partial(head_logprobs, soft_cap=cap, masked_V=self.unused_V if masked else None, **how)
        return lm.get_output_embeddings()(hidden_NH, targets_N, temperature, entropy, within=within)  # type: ignore


class ValueLM(ResponseModule):
    """A critic: a causal LM's decoder with a scalar head, `v(prompt, y_<t)` for each response token t.

    Args:
        model: A Hugging Face causal LM; its vocabulary head is dropped.
        packed: As in `ScoringLM`.
        shared_prompts: As in `ScoringLM`.
        head: Options of a vocabulary head, which it has none of; taken so that it is made like `ScoringLM`.
    """

    def __init__(
        self, model: PreTrainedModel, *, packed: bool = False, shared_prompts: bool = False, **head: Any
    ) -> None:
        super().__init__()
        if packed:
            check_packed(causal_lm(model))
        self.model = causal_lm(model).base_model
        self.head = nn.Linear(model.config.get_text_config().hidden_size, 1, bias=False, dtype=model.dtype)
        nn.init.zeros_(self.head.weight)  # a critic that knows nothing says 0
        self.packed, self.shared_prompts = packed, shared_prompts

    def forward(
        self,
        tokens_BL: Tensor,
        prompt_length_B: Tensor,
        response_length_B: Tensor,
        temperature: float = 1.0,
        entropy: Entropy = "none",
        masked: bool = False,
    ) -> Scores:
        """Values `[B, T]` before each response token is sampled, zero behind each response; called like `ScoringLM`."""
        hidden_NH, _, laid_out = self.before_responses(tokens_BL, prompt_length_B, response_length_B)
        return laid_out(self.head(hidden_NH).squeeze(-1).float()), None


def hidden_states(
    model: nn.Module,
    tokens_BL: Tensor,
    length_B: Tensor,
    rows_N: Tensor,
    places_N: Tensor,
    *,
    packed: bool,
    prompts_B: Tensor | None = None,
) -> Tensor:
    """Last hidden states `[N, H]` at the given places of right-padded rows.

    Padding stands on the right and attention is causal, so no real token sees it and no mask is needed.

    Args:
        model: Of `ScoringLM`, or its decoder.
        tokens_BL: The rows.
        length_B: Their tokens.
        rows_N: Row of each place.
        places_N: Token of each place in its row.
        packed: Without padding.
        prompts_B: Lengths of prompts that are run once for all of their responses, in packed rows; None shares none.
    """
    decoder: Any = causal_lm(model).base_model
    if not packed:
        states_BLH = decoder(input_ids=tokens_BL, use_cache=False).last_hidden_state
        return states_BLH[rows_N, places_N]
    row = pack(tokens_BL, length_B, prompts_B)
    arguments = packed_arguments(decoder.config.get_text_config()._attn_implementation, row.sequences)
    states_1XH = decoder(
        input_ids=row.tokens_X[None], position_ids=row.positions_X[None], use_cache=False, **arguments
    ).last_hidden_state
    return states_1XH[0, row.place_BL[rows_N, places_N]]


def causal_lm(model: nn.Module) -> PreTrainedModel:
    """The Hugging Face causal LM itself, without a PEFT wrapper."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore
