"""Two ranks that share one vLLM engine: `python shared_ranks.py MODEL FOLDER VICTIM`; a victim ends itself half-way."""

import itertools
import json
import os
import signal
import sys
import time
import warnings
from dataclasses import asdict
from pathlib import Path

import torch
from torch import distributed

from prime_lightning.engines.host_group import of_all_ranks, rank
from prime_lightning.engines.vllm.shared import SharedVLLMEngine
from prime_lightning.models.pretrained import load_causal_lm, load_tokenizer
from prime_lightning.prompts.arithmetic import ArithmeticPrompts
from prime_lightning.rollout import Prompt, Sampling

GREEDY = Sampling(samples=1, max_tokens=24, temperature=0.0)
SAMPLING = Sampling(samples=16, max_tokens=60, seed=3)


class Watched(SharedVLLMEngine):
    """Says how many samples the process has when it is to sleep, in place of sleeping, which it cannot on a CPU."""

    def __init__(self, **options):
        super().__init__(**options)
        self._can_sleep, self.unfinished = True, {}

    def _call(self, method, **arguments):
        if self.owns:
            self.unfinished[method] = self.process.call("unfinished")


def weights(model: str, version: int) -> list[tuple[str, torch.Tensor]]:
    lm = load_causal_lm(model)
    torch.manual_seed(version)
    return [(name, p.detach() + 0.03 * torch.randn_like(p)) for name, p in lm.named_parameters()]


def prompts_of(rank: int, model: str, world: int = 2) -> list[Prompt]:
    source, tokenizer = ArithmeticPrompts(seed=5, operations=6), load_tokenizer(model)
    return [source.prompt(draw, tokenizer) for draw in range(rank, 12, world)]


def samples(groups) -> dict[int, list[dict]]:
    return {prompt.draw: [asdict(completion) for completion in group] for prompt, group in groups}


def error_of(act) -> str:
    try:
        act()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def visit(engine: Watched, model: str) -> dict:
    """All that two ranks do with an engine that they share."""
    mine, found = prompts_of(rank(), model), {}
    for version in range(2):
        passed = list(weights(model, version))
        taken = iter(passed)
        engine.load_weights(taken, version)
        assert next(taken, None) is None  # every rank takes part in gathering all of them
        time.sleep(rank() * 0.5)  # the other one is done long before, and waits with the next weights
        found[f"greedy{version}"] = samples(engine.stream(mine, GREEDY))
    found["sampled"] = samples(engine.stream(mine, SAMPLING))

    # The process is killed by the rank that does not own it, while both sample.
    groups = engine.stream(mine, SAMPLING)
    first = [next(groups)]
    of_all_ranks()
    if not engine.owns:
        os.kill(engine.channel().pid, signal.SIGKILL)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found["survived"] = samples(itertools.chain(first, groups))
        of_all_ranks()
    found["deaths"], found["warnings"] = engine.deaths, [str(w.message)[-200:] for w in said]

    # One rank breaks off, and has to finish before the engine sleeps; the other one is there long before.
    kept = {}
    if not engine.owns:
        time.sleep(1.0)
        groups = engine.stream(mine, SAMPLING, finished=kept)
        next(groups)
        groups.close()
    engine.sleep()
    found["asleep"] = [engine.version, error_of(lambda: next(engine.stream(mine, GREEDY)))]
    engine.wake()
    engine.load_weights(iter(weights(model, 1)), 1)
    found["unfinished"] = engine.unfinished
    found["kept"] = sum(map(len, kept.values()))
    found["with_kept"] = samples(engine.stream(mine, SAMPLING, finished=kept))

    found["too_long"] = error_of(lambda: list(engine.stream(mine, Sampling(samples=1, max_tokens=4000))))
    found["wrong"] = error_of(lambda: engine.load_weights(iter(weights(model, 1)[:-1]), 2))
    found["version"], found["context"] = engine.version, engine.context
    return found


def main(model: str, folder: Path, victim: int) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo")
    world = distributed.get_world_size()
    parts = 2 if world == 2 and victim < 0 else 1
    engine = Watched(device="cpu", tensor_parallel=parts, ranks=2, max_sequences=16, restarts=1)
    engine.start(model)
    if world > 2:
        engine.load_weights(iter(weights(model, 0)), 0)
        greedy = samples(engine.stream(prompts_of(rank(), model, world), GREEDY))
        found = {"owner": engine.owner, "pid": engine.channel().pid if not engine.owns else 0, "greedy0": greedy}
        of_all_ranks()
    elif victim < 0:
        found = visit(engine, model)
    else:
        engine.load_weights(iter(weights(model, 0)), 0)
        groups = engine.stream(prompts_of(rank(), model), SAMPLING)
        next(groups)
        pids = of_all_ranks(engine.process.process.pid if engine.owns else 0)
        if rank() == victim:
            os.kill(os.getpid(), signal.SIGKILL)
        found = {"pid": pids[0], "error": error_of(lambda: list(groups))}
    engine.close()
    (folder / f"rank{rank()}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
