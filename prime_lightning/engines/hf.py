"""Sampling with Hugging Face transformers in the trainer's process: batched, KV cache, any device.

The engine to start with, to debug with and to compare others with. One batch at a time: rows that finish leave the
batch, and new prompts wait for the next one. It leaves out continuous batching and paged attention; for those, and for
speed on a GPU, take `engines/vllm/`. Keys and values of the growing batch are written in place: a concatenation for
each token would copy all of them.

Shapes: R rows (samples) alive, V vocabulary.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig, PreTrainedTokenizerBase
from transformers.cache_utils import DynamicLayer

from prime_lightning.engines import FinishedSamples
from prime_lightning.engines.number_format import dtype_of, warn_of_float32
from prime_lightning.engines.samples import Groups, check_fits, completion_of, end_token_ids, mix, sample_keys
from prime_lightning.models.attention import GROUPED
from prime_lightning.models.pretrained import ids_without_token, load_causal_lm, load_tokenizer
from prime_lightning.rollout import Completion, Prompt, Sampling

BLOCK = 256  # tokens whose probabilities are summed at once
COMPACT_BELOW = 0.8  # copy the cache without its finished rows once fewer than this share of rows is alive


class HFEngine:
    """An `Engine` on `transformers`.

    Args:
        batch_size: Most samples at a time.
        dtype: Of the engine's copy of the weights; `auto` is bfloat16 on GPUs, float32 on CPU.
        device: `auto` takes the current CUDA device if there is one.
        attention: Attention kind of `transformers` (`sdpa`, `eager`, `flash_attention_2`).
    """

    def __init__(
        self,
        batch_size: int = 256,
        dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
        device: str = "auto",
        attention: str = "sdpa",
    ) -> None:
        self.version = -1
        self.context: int | None = None
        self.batch_size, self.attention = batch_size, attention
        name = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
        self.device = torch.device(name)
        self.dtype = dtype_of(dtype, self.device.type == "cuda")
        self._can_sleep, self._no_weights = self.device.type != "cpu", False
        self._lock = threading.Lock()  # weights come between two forward passes, from whichever thread

    def start(self, model: str) -> None:
        """Load model and tokenizer; the weights are replaced by the trainer's later."""
        self.tokenizer = load_tokenizer(model)
        self.model = load_causal_lm(model, dtype=self.dtype, attention=self.attention).to(self.device)  # type: ignore[arg-type]
        self.model.eval().requires_grad_(False)
        if self.attention == "sdpa" and self.device.type == "cpu" and self.model._supports_attention_backend:
            self.model.set_attn_implementation(GROUPED)
        warn_of_float32(self.dtype, self.device.type == "cuda", self.model.num_parameters())
        self.last = torch.tensor([-1], device=self.device)  # the number 1 would copy the vocabulary head for each row
        self.unused = torch.tensor(ids_without_token(model, self.tokenizer), dtype=torch.long, device=self.device)
        self.context = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        self.version, self._no_weights = -1, False
        self.end_ids = end_token_ids(self.tokenizer, self.model.generation_config.eos_token_id)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Copy the trainer's weights into the engine's model; tied ones need to come only once."""
        own = dict(self.model.named_parameters(remove_duplicate=False))
        missing = {id(parameter): name for name, parameter in self.model.named_parameters()}
        with self._lock:
            for name, tensor in weights:
                if name not in own or own[name].shape != tensor.shape:
                    known = f"shape {tuple(own[name].shape)}" if name in own else "no such weight"
                    raise ValueError(
                        f"Expected weights of the engine's model, got {name!r} with shape {tuple(tensor.shape)} "
                        f"({known}). Engine and policy must be built from the same model."
                    )
                own[name].copy_(tensor)
                missing.pop(id(own[name]), None)
            if missing:
                raise ValueError(f"Expected all weights of the policy, got none for {sorted(missing.values())[:3]} ...")
            self.version, self._no_weights = version, False

    def stream(
        self, prompts: Sequence[Prompt], sampling: Sampling, finished: FinishedSamples | None = None
    ) -> Iterator[tuple[Prompt, list[Completion]]]:
        """Yield groups as they finish, batch by batch in the order of the prompts."""
        if self._no_weights:
            raise ValueError("Expected an engine with weights, got one that slept: `wake` and sync it.")
        step, done = max(1, self.batch_size // sampling.samples), 0
        while done < len(prompts):  # which may have become more
            check_fits(prompts[done:], sampling, self.context)
            begun = prompts[done : done + step]
            yield from self._sample(begun, sampling, finished)
            done += len(begun)

    def sleep(self) -> None:
        """Give up the weights' memory on a GPU: they are sent again before the next sample."""
        with self._lock:
            if self._can_sleep and not self._no_weights:
                self._sizes = {storage: storage.nbytes() for storage in self._storages()}
                for storage in self._sizes:
                    storage.resize_(0)
                self.version, self._no_weights = -1, True

    def wake(self) -> None:
        """Take the memory back; the weights must be sent."""
        with self._lock:
            if self._no_weights:
                torch.cuda.empty_cache()
                for storage, nbytes in self._sizes.items():
                    storage.resize_(nbytes)

    def _storages(self) -> list[torch.UntypedStorage]:
        return list({(s := p.untyped_storage()).data_ptr(): s for p in self.model.parameters()}.values())

    def close(self) -> None:
        """Nothing runs beside the trainer's process, so there is nothing to end."""

    @torch.inference_mode()
    def _sample(
        self, prompts: Sequence[Prompt], sampling: Sampling, finished: FinishedSamples | None
    ) -> Iterator[tuple[Prompt, list[Completion]]]:
        rows, groups = _Rows.of(prompts, sampling), Groups(prompts, sampling.samples, finished)
        # Which row stands in each place of the batch:
        slots = np.array([i * sampling.samples + k for i, k in groups.missing()])
        logits_RV, cache, mask_RL = self._prefill(prompts, slots // sampling.samples)
        for step in range(sampling.max_tokens):
            if sampling.mask_padding:
                logits_RV.index_fill_(1, self.unused, -torch.inf)
            tokens_R, logprobs_R = draw(logits_RV, sampling, uniform(rows.keys[slots], step))
            ended = self._record(rows, slots, tokens_R, logprobs_R, sampling)
            for row in ended:
                yield from groups.add(*divmod(row, sampling.samples), rows.completion(row, self.tokenizer))
            alive = ~rows.done[slots]
            if not alive.any():
                return
            if alive.mean() < COMPACT_BELOW:
                keep = torch.from_numpy(np.flatnonzero(alive)).to(self.device)
                cache.batch_select_indices(keep)
                tokens_R, slots = tokens_R[keep], slots[alive]
                mask_RL = None if mask_RL is None else mask_RL[keep]
            mask_RL = None if mask_RL is None else torch.cat([mask_RL, mask_RL.new_ones(len(slots), 1)], 1)
            logits_RV = self._forward(tokens_R[:, None], cache, mask_RL)

    def _prefill(self, prompts: Sequence[Prompt], prompt_of: np.ndarray) -> tuple[Tensor, DynamicCache, Tensor | None]:
        """Run each prompt once and repeat its cache for its samples. Prompts are padded on the left."""
        longest = max(len(prompt.token_ids) for prompt in prompts)
        tokens = np.full((len(prompts), longest), self.end_ids[0], dtype=np.int64)
        mask = np.zeros((len(prompts), longest), dtype=np.int64)
        for i, prompt in enumerate(prompts):
            tokens[i, longest - len(prompt.token_ids) :] = prompt.token_ids
            mask[i, longest - len(prompt.token_ids) :] = 1
        mask_RL = None if mask.all() else torch.from_numpy(mask).to(self.device)
        cache = grown_cache(self.model.config)
        logits_RV = self._forward(torch.from_numpy(tokens).to(self.device), cache, mask_RL)
        rows_R = torch.from_numpy(prompt_of).to(self.device)
        cache.batch_select_indices(rows_R)
        return logits_RV[rows_R], cache, None if mask_RL is None else mask_RL[rows_R]

    def _forward(self, tokens_RX: Tensor, cache: DynamicCache, mask_RL: Tensor | None) -> Tensor:
        """Logits `[R, V]` behind the last token."""
        positions = None
        if mask_RL is not None:
            positions = (mask_RL.cumsum(-1) - 1).clamp_min(0)[:, -tokens_RX.shape[1] :]
        with self._lock:
            self._version_of_logits = self.version
            out = self.model(
                input_ids=tokens_RX,
                attention_mask=mask_RL,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=self.last,
            )
        return out.logits[:, -1].float()  # type: ignore[no-any-return]

    def _record(
        self, rows: _Rows, slots: np.ndarray, tokens_R: Tensor, logprobs_R: Tensor, sampling: Sampling
    ) -> list[int]:
        """Append the sampled tokens to the rows that are alive; return the rows that this finishes."""
        alive = ~rows.done[slots]
        these = slots[alive]
        tokens = tokens_R.cpu().numpy()[alive]
        rows.append(these, tokens, logprobs_R.cpu().numpy()[alive], self._version_of_logits)
        stopped = np.isin(tokens, self.end_ids)
        if sampling.stop:
            stopped |= [
                self._stop_string(rows.tokens[row, : rows.length[row]].tolist(), sampling.stop) for row in these
            ]
        rows.stopped[these] = stopped
        rows.done[these] = stopped | (rows.length[these] == sampling.max_tokens)
        return [int(row) for row in these[rows.done[these]]]

    def _stop_string(self, tokens: list[int], stop: tuple[str, ...]) -> bool:
        longest = max(len(text.encode()) for text in stop)  # byte-level tokenizers may spend a token on each byte
        tail = self.tokenizer.decode(tokens[-(longest + 4) :])
        return any(text in tail for text in stop)


@dataclass
class _Rows:
    """Book-keeping of the samples of one batch, row = prompt * samples + sample."""

    keys: np.ndarray
    done: np.ndarray
    stopped: np.ndarray
    length: np.ndarray
    tokens: np.ndarray
    logprobs: np.ndarray
    versions: np.ndarray

    @classmethod
    def of(cls, prompts: Sequence[Prompt], sampling: Sampling) -> _Rows:
        n = len(prompts) * sampling.samples
        shape = n, sampling.max_tokens
        return cls(
            keys=sample_keys(sampling.seed, [prompt.draw for prompt in prompts], sampling.samples),
            done=np.zeros(n, bool),
            stopped=np.zeros(n, bool),
            length=np.zeros(n, np.int64),
            tokens=np.zeros(shape, np.int32),
            logprobs=np.zeros(shape, np.float32),
            versions=np.zeros(shape, np.int32),
        )

    def append(self, rows: np.ndarray, tokens: np.ndarray, logprobs: np.ndarray, version: int) -> None:
        """One more token for each of these rows."""
        place = rows, self.length[rows]
        self.tokens[place], self.logprobs[place], self.versions[place] = tokens, logprobs, version
        self.length[rows] += 1

    def completion(self, row: int, tokenizer: PreTrainedTokenizerBase) -> Completion:
        n, finish = self.length[row], "stop" if self.stopped[row] else "length"
        tokens, logprobs, versions = (x[row, :n].tolist() for x in (self.tokens, self.logprobs, self.versions))
        return completion_of(tokenizer, tokens, logprobs, finish, versions)


def draw(logits_RV: Tensor, sampling: Sampling, uniform_R: np.ndarray) -> tuple[Tensor, Tensor]:
    """Draw one token a row by inverting the cumulative distribution at a given uniform number.

    Returns:
        Tokens `[R]` and their log-probs `[R]` (nats) under the distribution that was drawn from. Greedy choices
        (temperature 0) carry the log-prob of temperature 1.

    Example:
        >>> token, logprob = draw(torch.tensor([[0.0, 0.0]]), Sampling(), np.array([0.75]))
        >>> token.item(), round(logprob.item(), 4)
        (1, -0.6931)
    """
    if sampling.temperature == 0:
        logprobs_RV = logits_RV.log_softmax(-1)
        tokens_R = logits_RV.argmax(-1)
    else:
        logprobs_RV = truncate(logits_RV / sampling.temperature, sampling.top_k, sampling.top_p).log_softmax(-1)
        tokens_R = inverted(logprobs_RV.exp(), torch.from_numpy(uniform_R).to(logits_RV.device))
    return tokens_R, logprobs_RV.gather(-1, tokens_R[:, None]).squeeze(-1)


def inverted(weights_RV: Tensor, uniform_R: Tensor) -> Tensor:
    """The first index at which the cumulative sum of a row exceeds `uniform * its sum`; one of weight 0 never is.

    Sums are float64. They are taken over blocks first and then within the one block that is met, because a scan over a
    whole vocabulary costs more than the softmax.

    Example:
        >>> inverted(torch.tensor([[0.0, 1.0, 1.0, 0.0]]), torch.tensor([0.75], dtype=torch.double))
        tensor([2])
    """
    R, V = weights_RV.shape
    blocks_RBb = torch.nn.functional.pad(weights_RV, (0, -V % BLOCK)).view(R, -1, BLOCK)
    ends_RB = blocks_RBb.sum(-1, dtype=torch.double).cumsum(-1)
    target_R1 = uniform_R[:, None] * ends_RB[:, -1:]
    # right=True: what has weight zero spans no interval, so it is never drawn
    met_R = torch.searchsorted(ends_RB, target_R1, right=True).squeeze(-1).clamp_max(ends_RB.shape[1] - 1)
    weights_Rb = blocks_RBb[torch.arange(R, device=met_R.device), met_R].double()
    before_R1 = torch.nn.functional.pad(ends_RB, (1, 0)).gather(1, met_R[:, None])
    within_R = torch.searchsorted(weights_Rb.cumsum(-1), target_R1 - before_R1, right=True).squeeze(-1)
    last_R = BLOCK - 1 - (weights_Rb.flip(-1) > 0).int().argmax(-1)  # where rounding leaves the target at the end
    return met_R * BLOCK + torch.minimum(within_R, last_R)


def truncate(logits_RV: Tensor, top_k: int, top_p: float) -> Tensor:
    """Set all logits outside of the `top_k` likeliest tokens, then outside of the top-p set, to minus infinity.

    The top-p set is the smallest set of likeliest tokens whose probability reaches `top_p`.

    Example:
        >>> truncate(torch.tensor([[0.6, 0.3, 0.1]]).log(), 0, 0.7).exp()
        tensor([[0.6000, 0.3000, 0.0000]])
    """
    if 0 < top_k < logits_RV.shape[-1]:
        kth_R1 = logits_RV.topk(top_k).values[:, -1:]
        logits_RV = logits_RV.masked_fill(logits_RV < kth_R1, -torch.inf)
    if top_p < 1:
        sorted_RV, order_RV = logits_RV.sort(descending=True)
        before_RV = sorted_RV.softmax(-1).cumsum(-1) - sorted_RV.softmax(-1)
        drop_RV = torch.zeros_like(before_RV, dtype=torch.bool).scatter(-1, order_RV, before_RV >= top_p)
        logits_RV = logits_RV.masked_fill(drop_RV, -torch.inf)
    return logits_RV


def uniform(keys: np.ndarray, step: int) -> np.ndarray:
    """A uniform number in [0, 1) for each key at this step: counter-based, so no generator has to be saved.

    Example:
        >>> bool(uniform(sample_keys(0, [3], 1), 5)[0] == uniform(sample_keys(0, [1, 3], 1), 5)[1])
        True
    """
    counter = np.uint64((step * 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF)
    return (mix(keys + counter) >> np.uint64(11)).astype(np.float64) * 2.0**-53


CHUNK = 128  # positions that are added at a time


class GrownLayer(DynamicLayer):
    """A `DynamicLayer` with room for more positions than it has; `keys` and `values` are views of the used ones."""

    keys: Any
    values: Any

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Append positions `[R, heads, X, size]`; returns all."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self._room: list[Tensor] = [key_states[..., :0, :], value_states[..., :0, :]]
        used = self.get_seq_length()
        length = used + key_states.shape[-2]
        if length > self._room[0].shape[-2]:
            self._grow([key_states, value_states], used, length)
        for room, new in zip(self._room, (key_states, value_states), strict=True):
            room[..., used:length, :] = new
        self.keys, self.values = (room[..., :length, :] for room in self._room)
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows, without spare room."""
        super().batch_select_indices(indices)
        self._room = [self.keys, self.values]

    def _grow(self, new: list[Tensor], used: int, length: int) -> None:
        """Make room for `length` positions and some more, for as many rows as the new ones have."""
        positions = -(-length // CHUNK) * CHUNK
        bigger = [torch.empty(*x.shape[:-2], positions, x.shape[-1], dtype=x.dtype, device=x.device) for x in new]
        if used:
            for room, old in zip(bigger, (self.keys, self.values), strict=True):
                room[..., :used, :] = old
        self._room = bigger


def grown_cache(config: PreTrainedConfig) -> DynamicCache:
    """The cache of transformers for a model, with `GrownLayer` wherever a layer keeps all positions."""
    cache = DynamicCache(config=config)
    cache.layers = [GrownLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]  # type: ignore
    return cache
