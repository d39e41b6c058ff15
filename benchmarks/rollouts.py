"""How fast rollouts are: the data module against its engine, the engine against bare vLLM and `transformers`.

    python benchmarks/rollouts.py --out rollouts.json
    python benchmarks/rollouts.py --engines hf          needs no vLLM
    python benchmarks/rollouts.py --engines hf --model HuggingFaceTB/SmolLM2-135M-Instruct --prompts 8
    python benchmarks/rollouts.py --sync 1 50 500       weight syncs of models with so many million parameters too
    python benchmarks/rollouts.py --engines --iterations 1 50   whole iterations, in turns with sampling and ahead of it

Everything that is compared runs in turns on the same prompts, seeds and weights, so that a busy machine slows all of it
alike; a ratio is the median over turns. Written for a CPU; `--device cuda` takes the engines' GPU settings.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from bare import bare_trainer
from lightning.pytorch.callbacks import Callback
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM

from prime_lightning.engines import Engine
from prime_lightning.engines.hf import HFEngine
from prime_lightning.engines.samples import sample_seeds, sampling_arguments
from prime_lightning.engines.vllm.arguments import arguments_of, environment_of
from prime_lightning.engines.vllm.engine import VLLMEngine
from prime_lightning.engines.vllm.process import clean_environment
from prime_lightning.models.batch import Batch
from prime_lightning.prompts.arithmetic import ArithmeticPrompts, write_model
from prime_lightning.rollout import Prompt, Sampling
from prime_lightning.sampling.acceptance import AccuracyFilter
from prime_lightning.sampling.datamodule import RolloutDataModule
from prime_lightning.sampling.loader import TrainingLoader
from prime_lightning.sampling.sync import PolicyWeights
from prime_lightning.training.module import PrimeModule
from prime_lightning.training.options import Update

SHAPES = {1: (128, 5), 50: (768, 7), 500: (2048, 9)}  # million parameters: hidden size, layers
Draw = Callable[[list[Prompt]], int]
"""Draws the samples of some prompts and returns the number of tokens."""


def main(args: Sequence[str] | None = None) -> None:
    options = parser().parse_args(args)
    torch.set_num_threads(options.threads)
    found: dict[str, Any] = {"torch": torch.__version__, "cores": os.cpu_count(), "device": options.device}
    with tempfile.TemporaryDirectory() as folder:
        hidden, layers = SHAPES[1]
        model = options.model or str(write_model(Path(folder) / "model", hidden_size=hidden, layers=layers))
        for kind in options.engines:
            found[kind] = throughput(kind, model, options)
        for what, measure in (("sync", sync), ("iterations", iterations)):
            found[what] = [measure(size, Path(folder) / f"{what}{size}", options) for size in getattr(options, what)]
    found["load"] = os.getloadavg()
    print(table(found))
    if options.out:
        Path(options.out).write_text(json.dumps(found, indent=2) + "\n")


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--engines", nargs="*", default=["hf", "vllm"], choices=["hf", "vllm"])
    made.add_argument("--model", help="a folder or a Hugging Face id; without it a random model of 1 M parameters")
    made.add_argument("--sync", nargs="*", type=int, default=[], choices=[*SHAPES], help="million parameters")
    made.add_argument("--iterations", nargs="*", type=int, default=[], choices=[*SHAPES], help="million parameters")
    made.add_argument("--iterate_with", default="vllm", choices=["hf", "vllm"])
    made.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    made.add_argument("--turns", type=int, default=5)
    made.add_argument("--prompts", type=int, default=64)
    made.add_argument("--max_tokens", type=int, default=64)
    made.add_argument("--threads", type=int, default=1)
    made.add_argument("--out")
    return made


def engine_of(kind: str, device: str) -> Engine:
    return HFEngine(device=device) if kind == "hf" else VLLMEngine(device=device)  # type: ignore[arg-type]


def throughput(kind: str, model: str, options: argparse.Namespace) -> dict[str, Any]:
    """Tokens per second of the data module, its engine, and what lies under that, in turns."""
    started = time.perf_counter()
    sampling = Sampling(samples=4, max_tokens=options.max_tokens, seed=1)
    data = RolloutDataModule(
        model,
        train=ArithmeticPrompts(seed=1),
        engine=engine_of(kind, options.device),
        sampling=sampling,
        prompts_per_batch=options.prompts,
        accuracy_filter=AccuracyFilter(low=0.0, high=1.0),
    )
    data.setup("fit")
    loader = data.training_loader(0, 1)
    loader.collect()
    first = time.perf_counter() - started
    bare = (Generate if kind == "hf" else Bare)(model, sampling, data.engine)
    ways: dict[str, Draw] = {
        "module": lambda _: tokens_of(loader.collect().rollouts),
        "engine": lambda prompts: sum(
            len(c.token_ids) for _, group in data.engine.stream(prompts, sampling) for c in group
        ),
        "bare": bare.draw,
    }
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(options.turns + 1):
        start = loader.position
        prompts = [loader._prompt(draw) for draw in range(start, start + options.prompts)]
        order = [*ways][turn % 3 :] + [*ways][: turn % 3]
        for name in order:
            begun = time.perf_counter()
            tokens = ways[name](prompts)
            if turn:  # the first one warms up
                rates[name].append(tokens / (time.perf_counter() - begun))
    bare.close()
    data.close()
    return {
        "seconds_to_first_batch": first,
        "tokens_per_second": {name: statistics.median(many) for name, many in rates.items()},
        "module_over_engine": ratio(rates["module"], rates["engine"]),
        "module_over_bare": ratio(rates["module"], rates["bare"]),
        "engine_over_bare": ratio(rates["engine"], rates["bare"]),
    }


def tokens_of(rollouts: Sequence[Any]) -> int:
    return sum(len(rollout.completion.token_ids) for rollout in rollouts)


def ratio(above: list[float], below: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(above, below, strict=True))


class Generate:
    """`generate` of transformers with the same batch, log-probs of the sampled tokens included."""

    def __init__(self, model: str, sampling: Sampling, engine: Any) -> None:
        self.model, self.sampling, self.end_ids = engine.model, sampling, engine.end_ids

    @torch.inference_mode()
    def draw(self, prompts: list[Prompt]) -> int:
        rows = [torch.tensor(prompt.token_ids) for prompt in prompts for _ in range(self.sampling.samples)]
        tokens, mask = (
            pad_sequence(what, batch_first=True, padding_value=value, padding_side="left").to(self.model.device)
            for what, value in ((rows, self.end_ids[0]), ([torch.ones_like(row) for row in rows], 0))
        )
        out = self.model.generate(
            input_ids=tokens,
            attention_mask=mask,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            eos_token_id=self.end_ids,
            pad_token_id=self.end_ids[0],
            max_new_tokens=self.sampling.max_tokens,
            return_dict_in_generate=True,
            output_logits=True,
        )
        new = out.sequences[:, tokens.shape[1] :]
        logprobs = torch.stack(out.logits, 1).float().log_softmax(-1).gather(-1, new[..., None])
        ends = torch.isin(new, torch.tensor(self.end_ids, device=new.device)).long()
        ended = ends.cumsum(1) - ends > 0
        assert logprobs.shape[:2] == new.shape
        return int((~ended).sum())

    def close(self) -> None:
        pass


class Bare:
    """VLLM's own `LLMEngine` in a process that does nothing else, with the engine's settings, seeds and prompts."""

    def __init__(self, model: str, sampling: Sampling, engine: Any) -> None:
        self.sampling, self.end_ids = sampling, engine.end_ids
        self.process = subprocess.Popen(
            [sys.executable, __file__, "bare"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=clean_environment(environment_of(engine, [])),
        )
        self._tell(arguments_of(engine, None, can_sleep=False))

    def draw(self, prompts: list[Prompt]) -> int:
        seeds = {prompt.draw: sample_seeds(self.sampling.seed, prompt.draw, 4) for prompt in prompts}
        requests = [(list(prompt.token_ids), seed) for prompt in prompts for seed in seeds[prompt.draw]]
        return int(self._tell([requests, sampling_arguments(self.sampling, self.end_ids, [])]))

    def _tell(self, what: Any) -> Any:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(what) + "\n")
        self.process.stdin.flush()
        while not (line := self.process.stdout.readline()).startswith("answer "):
            assert line, "the bare engine died"
        return json.loads(line.removeprefix("answer "))

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


def bare_child() -> None:
    """The other end of `Bare`."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.sampling_params import RequestOutputKind, SamplingParams
    from vllm.v1.engine.llm_engine import LLMEngine

    engine = LLMEngine.from_engine_args(EngineArgs(disable_log_stats=True, **json.loads(sys.stdin.readline())))
    print("answer 0", flush=True)
    for line in sys.stdin:
        requests, sampling = json.loads(line)
        for i, (token_ids, seed) in enumerate(requests):
            params = SamplingParams(
                **sampling,
                seed=seed,
                logprobs=0,
                flat_logprobs=True,
                detokenize=False,
                output_kind=RequestOutputKind.FINAL_ONLY,
            )
            engine.add_request(str(i), {"prompt_token_ids": token_ids}, params)
        tokens = 0
        while engine.has_unfinished_requests():
            tokens += sum(len(output.outputs[0].token_ids) for output in engine.step() if output.finished)
        print("answer", tokens, flush=True)


def sync(millions: int, folder: Path, options: argparse.Namespace) -> dict[str, float]:
    """Seconds of a weight sync by shared memory, from the trainer's tensors to a checked engine."""
    hidden, layers = SHAPES[millions]
    model = write_model(folder, hidden_size=hidden, layers=layers)
    policy = AutoModelForCausalLM.from_pretrained(model)
    engine = VLLMEngine(device=options.device, args={"load_format": "dummy"})  # type: ignore[arg-type]
    engine.start(str(model))
    engine.ready()
    seconds = []
    for version in range(options.turns + 1):
        begun = time.perf_counter()
        engine.load_weights(((name, p.detach()) for name, p in policy.named_parameters()), version)
        seconds.append(time.perf_counter() - begun)
    engine.close()
    return {
        "parameters": float(sum(p.numel() for p in policy.parameters())),
        "first_seconds": seconds[0],
        "seconds": statistics.median(seconds[1:]),
    }


class Clock(Callback):
    """When training steps begin and end, the sync at their end included."""

    def __init__(self) -> None:
        self.begun: list[float] = []
        self.ended: list[float] = []

    def on_train_batch_start(self, *_: Any) -> None:
        self.begun.append(time.perf_counter())

    def on_train_batch_end(self, *_: Any) -> None:
        self.ended.append(time.perf_counter())


class TimedData(RolloutDataModule):
    """Takes down how long each batch was sampled and graded, in whatever thread, and each sync."""

    syncs: list[float]

    def training_loader(self, rank: int, world: int) -> TrainingLoader:
        loader = super().training_loader(rank, world)
        collect, self.seconds, self.syncs = loader.collect, [], []

        def timed(**options: Any) -> Batch:
            begun = time.perf_counter()
            batch = collect(**options)
            self.seconds.append(time.perf_counter() - begun)
            return batch

        loader.collect = timed  # type: ignore[method-assign]
        return loader

    def sync(self, weights: PolicyWeights, version: int) -> None:
        begun = time.perf_counter()
        super().sync(weights, version)
        self.syncs.append(time.perf_counter() - begun)


def iterations(millions: int, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of an iteration's parts where sampling and training take turns, and where they overlap.

    `overlap` is an overlapped iteration over the longer of its own parts, which stands still on a busy machine.
    """
    hidden, layers = SHAPES[millions]
    model = str(write_model(folder, hidden_size=hidden, layers=layers))
    turns, overlapped = iterate(model, 0, options), iterate(model, 1, options)
    return {
        "million_parameters": millions,
        **turns,
        "sync_share": turns["sync"] / turns["iteration"],
        "overlapped": overlapped,
        "overlap": overlapped["iteration"] / max(overlapped["sampling"], overlapped["training"]),
    }


def iterate(model: str, staleness: int, options: argparse.Namespace) -> dict[str, float]:
    """Mean seconds of the parts of an iteration, the first ones left out.

    There is no PRM and no filter, so that the sync's share is at its most.
    """
    data = TimedData(
        model,
        train=ArithmeticPrompts(seed=1),
        engine=engine_of(options.iterate_with, options.device),
        sampling=Sampling(samples=4, max_tokens=options.max_tokens, seed=1),
        prompts_per_batch=options.prompts,
        accuracy_filter=AccuracyFilter(low=0.0, high=1.0),
        max_staleness=staleness,
    )
    clock = Clock()
    first = 1 + staleness  # batches that were begun before the first update are out of step
    accelerator = "cpu" if options.device == "cpu" else "gpu"
    trainer = bare_trainer(clock, steps=options.turns + first, accelerator=accelerator)
    prime = PrimeModule(
        model,
        policy_update=Update(minibatches=1, micro_tokens=2048),
        policy_optimizer=lambda parameters: torch.optim.SGD(parameters, lr=1e-4),
    )
    trainer.fit(prime, data)
    syncs = data.syncs[1 + first :]  # one before the first iteration
    steps = zip(clock.begun[first:], clock.ended[first:], syncs, strict=True)
    parts = {
        "sampling": data.seconds[first : first + options.turns],
        "training": [ended - begun - sync for begun, ended, sync in steps],
        "sync": syncs,
        "iteration": [after - before for before, after in itertools.pairwise(clock.ended[first - 1 :])],
    }
    return {name: statistics.mean(seconds) for name, seconds in parts.items()}


def table(found: dict[str, Any]) -> str:
    lines = ["tokens/s       module   engine     bare   module/engine  module/bare  engine/bare  first batch"]
    for kind in ("hf", "vllm"):
        if kind in found:
            row, rate = found[kind], found[kind]["tokens_per_second"]
            lines.append(
                f"{kind:12} {rate['module']:8.0f} {rate['engine']:8.0f} {rate['bare']:8.0f}   "
                f"{row['module_over_engine']:13.3f}  {row['module_over_bare']:11.3f}  {row['engine_over_bare']:11.3f}  "
                f"{row['seconds_to_first_batch']:9.1f} s"
            )
    for row in found["sync"]:
        size = f"weight sync  {row['parameters'] / 1e6:8.1f} M parameters"
        lines.append(f"{size}  {row['seconds']:.3f} s (first {row['first_seconds']:.3f} s)")
    lines += [
        f"iteration   {row['million_parameters']:5} M parameters: {parts_of(row)} ({row['sync_share']:.1%})\n"
        f"  overlapped, {row['overlap']:.3f} of the longer part: {parts_of(row['overlapped'])}"
        for row in found["iterations"]
    ]
    lines.append("load averages of the machine: " + ", ".join(f"{load:.1f}" for load in found["load"]))
    return "\n".join(lines)


def parts_of(row: dict[str, float]) -> str:
    return ", ".join(f"{name} {row[name]:.3f} s" for name in ("iteration", "sampling", "training", "sync"))


if __name__ == "__main__":
    if sys.argv[1:] == ["bare"]:
        bare_child()
    else:
        main()
