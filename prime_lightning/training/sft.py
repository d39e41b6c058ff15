"""Supervised warm start: maximise the log-prob of given responses, prompts masked out.

PRIME starts from a model fine-tuned like this (arXiv 2502.01456, section 4: learning rate 1e-5, cosine, warm-up 10 %,
batch 96, 3 epochs). Ordinary Lightning automatic optimization; started by `prime-lightning sft`.

Shapes: B responses, L prompt and response tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import lightning.pytorch as pl
import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor
from torch.optim import Optimizer
from transformers import PreTrainedTokenizerBase

from prime_lightning.models.batch import pad
from prime_lightning.models.options import Loading, precision_of
from prime_lightning.models.pretrained import load_tokenizer
from prime_lightning.prompts.dataset import permutation
from prime_lightning.prompts.rows import check_filled, load_rows
from prime_lightning.prompts.template import Template, at, has, messages_of, renamed
from prime_lightning.training.run_metadata import run_metadata
from prime_lightning.training.scoring import load_scoring
from prime_lightning.training.stepping import devices

Lesson = tuple[Tensor, Tensor, Tensor]
"""`tokens_BL`, `prompt_length_B`, `response_length_B`: ready for `ScoringLM`, padded or packed."""


class Lessons(Protocol):
    """Worked examples: rows whose template gives the prompt, with the `response` to learn."""

    template: Template

    def __len__(self) -> int:
        """Number of lessons in an epoch."""
        ...

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        """A row with the template's fields and `response`."""
        ...


class DatasetLessons:
    """Lessons from a file or a hub data set.

    Args:
        path: A jsonl, parquet or csv file (`.gz` too), or a hub id.
        columns: What these rows call otherwise: our name, and theirs or a path. The `response` may be chat messages, of
            which the last answer is learnt, and what stands before it is the prompt.
        template: How a row becomes the prompt; by default PRIME's for mathematics, or the row's own messages.
        split: Split of a hub data set.
        name: Configuration of a hub data set.
        revision: Commit of a hub data set.
    """

    def __init__(
        self,
        path: str,
        columns: dict[str, str] | None = None,
        template: Template | None = None,
        split: str = "train",
        name: str | None = None,
        revision: str | None = None,
    ) -> None:
        self.columns = columns or {}
        self.response = self.columns.get("response", "response")
        self.rows = load_rows(path, split=split, name=name, revision=revision)
        check_filled(self.rows, self.response, path, option="columns")
        without = [i for i, row in enumerate(self.rows) if not response_of(at(row, self.response))]
        if without:
            raise ValueError(
                f"Expected an answer at the end of `{self.response}` in every row of {path!r}, got none in "
                f"{len(without)} of {len(self.rows)} (rows {without[:5]} ..., counted from 0). Drop these rows."
            )
        self.template = template or self._usual_template()
        for field in dict.fromkeys(self.template.fields(renamed(self.rows[0], self.columns))):
            option = "columns" if field in self.columns else "template.user"
            check_filled(self.rows, self.columns.get(field, field), path, option=option, blank=True)

    def _usual_template(self) -> Template:
        """The messages before the response, where there are some; otherwise that of PRIME's authors."""
        row = self.rows[0]
        for field in (self.response, "prompt"):
            if has(row, field) and any(part["role"] == "user" for part in messages_of(at(row, field)) or ()):
                return Template(user=f"{{{field}}}")
        return Template()

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.rows)

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        """A row, its response under `response`."""
        row = renamed(self.rows[index], self.columns)
        return {**row, "response": response_of(row["response"])}


def response_of(value: Any) -> str:
    """The response that a field holds: its text, or the last message if that is an assistant's; empty without one.

    Example:
        >>> response_of("4"), response_of([{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4"}])
        ('4', '4')
    """
    talk = messages_of(value)
    if talk is None:
        return str(value)
    return talk[-1]["content"] if talk[-1]["role"] == "assistant" else ""


class Feed(Protocol):
    """What a `LessonLoader` asks of a data module."""

    seed: int
    batch_size: int

    @property
    def lessons(self) -> Any:
        """Anything with a length and places."""
        ...

    def collate(self, rows: list[Any]) -> Any:
        """Some of the lessons as one batch."""
        ...


class LessonLoader:
    """Batches in a seeded order of each epoch, from where training has come to.

    Args:
        options: What is dealt out.
        rank: Which part of each batch.
        world: How many parts.
        done: How many batches were trained on, in all epochs; asked before an epoch.
    """

    def __init__(self, options: Feed, rank: int, world: int, done: Callable[[], int] = lambda: 0) -> None:
        self.options, self.rank, self.world, self.done = options, rank, world, done

    @classmethod
    def inside(cls, trainer: pl.Trainer, options: Feed) -> LessonLoader:
        """The loader of this rank; where a resumed run goes on, the trainer knows."""
        progress = trainer.fit_loop.epoch_loop.batch_progress
        return cls(options, trainer.global_rank, trainer.world_size, lambda: progress.total.processed)  # type: ignore[attr-defined]

    @property
    def lessons(self) -> Any:
        """All of an epoch."""
        return self.options.lessons

    def __len__(self) -> int:
        """Batches of an epoch."""
        return len(self.lessons) // self.options.batch_size

    def __iter__(self) -> Iterator[Any]:
        size, lessons = self.options.batch_size, self.lessons
        epoch, first = divmod(self.done(), len(self))
        order = permutation(len(lessons), self.options.seed, epoch)
        for start in range(first * size, len(self) * size, size):
            indices = order[start : start + size][self.rank :: self.world]
            yield self.options.collate([lessons[int(i)] for i in indices])


class LessonDataModule(pl.LightningDataModule):
    """Feeds lessons.

    Args:
        model: Hugging Face id or folder, for the tokenizer.
        lessons: What to learn from.
        batch_size: Lessons of an optimizer step, over all ranks.
        max_tokens: Longer lessons are cut at the end.
        seed: Of the order.
    """

    def __init__(
        self, model: str, lessons: Lessons, batch_size: int = 96, max_tokens: int = 4096, seed: int = 42
    ) -> None:
        super().__init__()
        if len(lessons) < batch_size:
            raise ValueError(f"Expected at least one batch of {batch_size} lessons, got {len(lessons)} lessons.")
        self.model, self.lessons, self.batch_size = model, lessons, batch_size
        self.max_tokens, self.seed = max_tokens, seed
        self.tokenizer: PreTrainedTokenizerBase | None = None

    def setup(self, stage: str) -> None:
        """Load the tokenizer."""
        self.tokenizer = load_tokenizer(self.model)

    def train_dataloader(self) -> LessonLoader:
        """The loader of this rank."""
        assert self.trainer is not None
        return LessonLoader.inside(self.trainer, self)

    def collate(self, rows: list[Mapping[str, Any]]) -> Lesson:
        """Tokenize rows; each response ends with the end token."""
        assert self.tokenizer is not None
        prompts = [list(self.lessons.template.encode(row, self.tokenizer)[1]) for row in rows]
        texts = [row["response"] for row in rows]
        encoded = self.tokenizer(texts, add_special_tokens=False)["input_ids"]
        end = self.tokenizer.eos_token_id
        tokens = [
            (prompt + list(response) + [end])[: self.max_tokens]
            for prompt, response in zip(prompts, encoded, strict=True)
        ]
        length_B = torch.tensor([len(row) for row in tokens])
        prompt_length_B = torch.tensor([len(prompt) for prompt in prompts]).minimum(length_B)
        return pad(tokens, torch.long), prompt_length_B, length_B - prompt_length_B


class SFTModule(pl.LightningModule):
    """A causal LM that learns responses: loss = - mean over response tokens of their log-prob, in nats.

    Args:
        policy: Hugging Face id or folder.
        loading: How the model is loaded.
        optimizer: Optimizer.
        warmup: Share of all steps in which the learning rate rises from 0; then it falls as a cosine, to 0.
    """

    def __init__(
        self,
        policy: str,
        loading: Loading = Loading(),
        optimizer: OptimizerCallable = lambda p: torch.optim.AdamW(p, lr=1e-5, weight_decay=0.0),
        warmup: float = 0.1,
    ) -> None:
        super().__init__()
        self.name, self.loading, self.optimizer, self.warmup = policy, loading, optimizer, warmup

    command = ""
    """What started the run, for the model's card."""

    def metadata(self) -> dict[str, Any]:
        """What the model's card says."""
        return {"names": {"policy": self.name}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Put in what a reader of the model has to know."""
        checkpoint["prime"] = {"metadata": run_metadata(self)}

    def setup(self, stage: str) -> None:
        """Refuse precisions that runs may not have."""
        precision_of(self.trainer.precision)

    def configure_model(self) -> None:
        """Load the model, once."""
        if hasattr(self, "policy"):
            return
        self.tokenizer = load_tokenizer(self.name)
        self.policy = load_scoring(self.name, self.loading, devices(self._trainer))

    def training_step(self, batch: Lesson, batch_idx: int) -> Tensor:
        """Mean negative log-prob of the response tokens."""
        logprobs_BT, _ = self.policy(*batch)
        tokens, world = batch[2].sum().float(), 1
        if self._trainer is not None:
            tokens, world = self.trainer.strategy.reduce(tokens, reduce_op="sum"), self.trainer.world_size
        mean_tokens = tokens.clamp_min(1) / world  # of a rank; prompts may have left no room for responses
        loss = -logprobs_BT.sum() / mean_tokens  # the strategy averages gradients over ranks
        self.log("loss", loss, prog_bar=True, sync_dist=True)
        return loss

    def configure_optimizers(self) -> dict[str, Any]:  # type: ignore[override]
        """Cosine schedule with warm-up over all steps of the run."""
        return cosine(self.optimizer(self.policy.parameters()), self.warmup, self.trainer)


def cosine(optimizer: Optimizer, warmup: float, trainer: pl.Trainer) -> dict[str, Any]:
    """For `configure_optimizers`: a cosine to 0 over all steps, after a linear rise over the share `warmup` of them."""
    from transformers import get_cosine_schedule_with_warmup  # here, because it brings transformers' trainer and peft

    steps = int(trainer.estimated_stepping_batches)
    schedule = get_cosine_schedule_with_warmup(optimizer, int(warmup * steps), steps)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
