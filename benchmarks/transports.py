"""What HTTP costs beside a pipe: `ServerEngine` with a `vllm serve` process of its own, against `VLLMEngine`.

    python benchmarks/transports.py --out transports.json
    python benchmarks/transports.py --model HuggingFaceTB/SmolLM2-135M-Instruct --prompts 8 --max_model_len 512

Both engines have the same model, dtype, cache, batch size and number of threads; they sample the same prompts with the
same seeds, and take the same weights, in turns, so that a busy machine slows both alike. A ratio
is the median over turns. Sleep is left out: no engine has it on a CPU.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rollouts import SHAPES, ratio
from transformers import AutoModelForCausalLM

from prime_lightning.engines import Engine
from prime_lightning.engines.server.engine import ServerEngine
from prime_lightning.engines.vllm import group
from prime_lightning.engines.vllm.arguments import arguments_of, environment_of
from prime_lightning.engines.vllm.engine import VLLMEngine
from prime_lightning.engines.vllm.process import clean_environment
from prime_lightning.engines.weights.cuda import free_port
from prime_lightning.models.pretrained import load_tokenizer
from prime_lightning.prompts.arithmetic import ArithmeticPrompts, write_model
from prime_lightning.rollout import Prompt, Sampling


def main(args: Sequence[str] | None = None) -> None:
    options = parser().parse_args(args)
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        hidden, layers = SHAPES[1]
        model = options.model or str(write_model(Path(folder) / "model", hidden_size=hidden, layers=layers))
        sizes = {"max_sequences": options.batch, "max_model_len": options.max_model_len, "threads": options.threads}
        pipe = VLLMEngine(dtype="float32", **sizes)
        pipe.start(model)
        pipe.ready()
        port = free_port()
        server = serving(pipe, port, Path(folder) / "server.log")
        http = ServerEngine([f"http://127.0.0.1:{port}"], in_flight=options.batch)
        try:
            http.start(model)
            found = compared(model, {"pipe": pipe, "http": http}, options)
        finally:
            http.close()
            pipe.close()
            group.end(server.pid)
            server.wait()
    found |= {"model": options.model or "1 M, random", "torch": torch.__version__, "load": os.getloadavg()}
    print(json.dumps(found, indent=2))
    if options.out:
        Path(options.out).write_text(json.dumps(found, indent=2) + "\n")


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--model", help="a folder or a Hugging Face id; without it a random model of 1 M parameters")
    made.add_argument("--prompts", type=int, default=64)
    made.add_argument("--samples", type=int, default=4, help="of a prompt")
    made.add_argument("--max_tokens", type=int, default=64)
    made.add_argument("--batch", type=int, default=64, help="samples that an engine computes at a time")
    made.add_argument("--max_model_len", type=int, help="of both engines; the model's own limit by default")
    made.add_argument("--turns", type=int, default=5, help="behind one that is not measured")
    made.add_argument("--threads", type=int, default=1)
    made.add_argument("--out")
    return made


def serving(engine: VLLMEngine, port: int, log: Path) -> subprocess.Popen[bytes]:
    """A server with the settings of an engine that was started."""
    flags = []
    for name, value in {**arguments_of(engine, None, can_sleep=False), "port": port}.items():
        if isinstance(value, bool):
            flags.append(f"--{'' if value else 'no-'}{name.replace('_', '-')}")
        elif value is not None:
            said = json.dumps(value) if isinstance(value, dict) else str(value)
            flags += [f"--{name.replace('_', '-')}", said]
    return subprocess.Popen(
        [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *flags],
        env=clean_environment(environment_of(engine, [])) | {"VLLM_SERVER_DEV_MODE": "1"},
        stdout=log.open("wb"),
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def compared(model: str, engines: dict[str, Engine], options: argparse.Namespace) -> dict[str, Any]:
    """Tokens per second and seconds of a weight sync of each engine, in turns."""
    policy, tokenizer = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32), load_tokenizer(model)
    weights = [(name, p.detach()) for name, p in policy.named_parameters()]
    problems = ArithmeticPrompts(seed=1)
    sampling = Sampling(samples=options.samples, max_tokens=options.max_tokens, seed=1)
    rates: dict[str, list[float]] = {name: [] for name in engines}
    syncs: dict[str, list[float]] = {name: [] for name in engines}
    for turn in range(options.turns + 1):
        texts = [problems.row(turn * options.prompts + i)["problem"] for i in range(options.prompts)]
        tokens_of = [tuple(tokenizer.encode(text)) for text in texts]
        prompts = [
            Prompt(draw=draw, text=text, token_ids=ids, kind="exact")
            for draw, (text, ids) in enumerate(zip(texts, tokens_of, strict=True))
        ]
        for name in [*engines][:: 1 if turn % 2 else -1]:
            begun = time.perf_counter()
            engines[name].load_weights(iter(weights), turn)
            sent = time.perf_counter()
            tokens = drawn(engines[name], prompts, sampling)
            if turn:
                syncs[name].append(sent - begun)
                rates[name].append(tokens / (time.perf_counter() - sent))
    return {
        "tokens_per_second": {name: round(statistics.median(many), 1) for name, many in rates.items()},
        "sync_seconds": {name: round(statistics.median(many), 4) for name, many in syncs.items()},
        "http_over_pipe": {
            "tokens_per_second": round(ratio(rates["http"], rates["pipe"]), 3),
            "sync_seconds": round(ratio(syncs["http"], syncs["pipe"]), 3),
        },
    }


def drawn(engine: Engine, prompts: list[Prompt], sampling: Sampling) -> int:
    return sum(len(c.token_ids) for _, completions in engine.stream(prompts, sampling) for c in completions)


if __name__ == "__main__":
    main()
