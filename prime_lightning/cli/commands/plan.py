"""`prime-lightning plan`: what a configuration of `fit` needs, before a GPU is rented or a weight is loaded.

Prints the memory of one GPU by part, whether it fits, which changes would make it fit, and an estimate of the time and
cost of an iteration with its assumptions. Options that it does not know are those of `fit`.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Sequence

from prime_lightning.cli.lightning_cli import parsed
from prime_lightning.cli.usage import Parser
from prime_lightning.training.plan.estimates import GIB, Hardware
from prime_lightning.training.plan.report import Iteration, Memory, Rollouts, iteration_of, memory_of, switched
from prime_lightning.training.plan.setup import ROLES, Setup, setup_of


def main(args: Sequence[str]) -> int:
    """Print the plan; 0 if the run fits, 1 if it does not."""
    options, rest = parser().parse_known_args(args)
    config = parsed(rest)
    setup = setup_of(config, options.gpus, dict(options.model_config))
    gpu_bytes = options.gpu_memory * GIB
    rollouts = Rollouts(
        prompt=options.prompt_tokens,
        response=options.response_tokens or setup.response_tokens / 2,
        acceptance=options.acceptance,
    )
    hardware = Hardware(
        flops=options.gpu_flops,
        bandwidth=options.gpu_bandwidth,
        utilisation=options.mfu,
        sampling_efficiency=options.sampling_efficiency,
    )
    memory = memory_of(setup, gpu_bytes)
    iteration = iteration_of(setup, rollouts, hardware, gpu_bytes)
    print("\n".join(memory_lines(setup, memory, gpu_bytes)))
    print("\n".join(time_lines(setup, iteration, rollouts, hardware, options.price, int(config.trainer.max_steps))))
    return int(memory.peak > gpu_bytes)


def parser() -> argparse.ArgumentParser:
    """Options of the command."""
    made = Parser(prog="prime-lightning plan", description=__doc__)
    add = made.add_argument
    add("--gpus", type=_count, help="over all nodes; the configuration's by default")
    add("--gpu-memory", type=_positive, default=80.0, help="GiB of one GPU")
    add("--gpu-flops", type=_positive, default=Hardware.flops, help="peak operations a second of one GPU")
    add("--gpu-bandwidth", type=_positive, default=Hardware.bandwidth, help="bytes a second of its memory")
    add("--mfu", type=_share, default=Hardware.utilisation, help="share of the peak that training reaches")
    add("--sampling-efficiency", type=_share, default=Hardware.sampling_efficiency, help="the same, there")
    add("--price", type=_positive, help="of one GPU for an hour")
    add("--prompt-tokens", type=_positive, default=200.0, help="mean length of a prompt")
    add("--response-tokens", type=_positive, help="mean length of a response; half of the limit by default")
    add("--acceptance", type=_share, default=0.5, help="share of groups that the accuracy filter keeps")
    add(
        "--model-config",
        type=_role_and_file,
        action="append",
        default=[],
        metavar="[ROLE=]FILE",
        help="a config.json in place of the hub's; for one role (policy, prm, reference, critic) or for all",
    )
    return made


def _positive(given: str) -> float:
    number = float(given)
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {given}")
    return number


def _share(given: str) -> float:
    if _positive(given) > 1:
        raise argparse.ArgumentTypeError(f"expected a share of at most 1, got {given}")
    return float(given)


def _count(given: str) -> int:
    if not given.isdecimal() or int(given) < 1:
        raise argparse.ArgumentTypeError(f"expected a number of GPUs, at least 1, got {given}")
    return int(given)


def _role_and_file(given: str) -> tuple[str, str]:
    role, found, file = given.partition("=")
    if found and role not in ROLES:
        raise argparse.ArgumentTypeError(f"expected a role of {', '.join(ROLES)} before the `=`, got {role!r}")
    return (role, file) if found else ("", given)


def memory_lines(setup: Setup, memory: Memory, gpu_bytes: float) -> Iterator[str]:
    """The table of memory, the verdict, and what would help."""
    shard, roles = setup.sharding, list(setup.shapes)
    weights = f"{setup.weights}".removeprefix("torch.")
    arithmetic = f"bfloat16 products of {weights} weights" if setup.autocast else weights
    yield f"Memory of one GPU in GiB: {shard.gpus} GPUs, {shard.name}, {arithmetic}"
    for role, shape in setup.shapes.items():
        yield f"  {role:<10} {setup.configs[role].model_type}, {shape.parameters:,} parameters, {shape.layers} layers"
    yield f"\n{'':<30}" + "".join(f"{role:>11}" for role in roles)
    for part, row in memory.models.items():
        if any(row.values()):
            yield f"{part:<30}" + "".join(f"{_gib(row[r]) if r in row else '-':>11}" for r in roles)
    tokens = max(setup.micro_tokens.values())
    words = {"activations": f"activations ({tokens:,} tokens)", "logits": f"logits ({setup.chunk_tokens:,} tokens)"}
    words["logits"] += ", head in float32" if setup.head_dtype else ""
    phases = {"": memory.held, "training: ": memory.training, "sampling: ": memory.sampling}
    sizes = {phase + words.get(part, part): size for phase, rows in phases.items() for part, size in rows.items()}
    yield from (f"{part:<44}{_gib(size):>8}" for part, size in sizes.items() if size)
    verdict = "fits" if memory.peak <= gpu_bytes else "does not fit"
    yield f"{'at the peak':<44}{_gib(memory.peak):>8}  of {_gib(gpu_bytes)}: {verdict}"
    if memory.host:
        yield f"{'host memory for each GPU (offload)':<44}{_gib(memory.host):>8}"
    if memory.loading:
        kind = f"  in {setup.loaded}; next to none from files in it".replace("torch.", "")
        yield f"{'host memory for each GPU (loading a model)':<44}{_gib(memory.loading):>8}{kind}"
    if memory.peak > gpu_bytes:
        yield from _switch_lines(setup, gpu_bytes)


def _switch_lines(setup: Setup, gpu_bytes: float) -> Iterator[str]:
    yield f"\n{'What would help (peak, GiB)':<60}{'alone':>8}{'with those above':>18}"
    for switch in switched(setup, gpu_bytes):
        marks = ["  fits" if size <= gpu_bytes else "" for size in (switch.alone, switch.together)]
        yield f"  {switch.words:<58}{_gib(switch.alone):>8}{marks[0]:<6}{_gib(switch.together):>12}{marks[1]}"


def time_lines(
    setup: Setup, iteration: Iteration, rollouts: Rollouts, hardware: Hardware, price: float | None, iterations: int
) -> Iterator[str]:
    """The estimate and what it assumes."""
    gpus, seconds = setup.sharding.gpus, iteration.seconds
    yield f"\nAn iteration: about {seconds:.0f} s"
    for name in ("sampling", "scoring", "training"):
        yield f"  {name:<10}{getattr(iteration, name):>8.0f} s"
    hours = gpus * seconds / 3600
    total = f", {hours * iterations:,.0f} for {iterations} iterations" if iterations > 0 else ""
    yield f"GPU hours: {hours:.2f} an iteration{total}"
    if price is not None:
        total = f", {hours * iterations * price:,.0f} for {iterations} iterations" if iterations > 0 else ""
        yield f"Cost at {price:g} a GPU hour: {hours * price:.2f} an iteration{total}"
    yield (
        f"Assumed: {setup.groups * setup.samples:,} responses of {rollouts.response:.0f} tokens to prompts of "
        f"{rollouts.prompt:.0f}; {rollouts.acceptance:.0%} of groups pass the filter; {hardware.flops / 1e12:g} "
        f"TFLOP/s and {hardware.bandwidth / 1e12:g} TB/s a GPU, of which training reaches {hardware.utilisation:.0%} "
        f"and sampling {hardware.sampling_efficiency:.0%}; {iteration.running:.0f} samples at a time on a GPU "
        f"({setup.sampler.name}); no time for verifiers, communication, validation and checkpoints beyond that. --help "
        "lists what to change."
    )


def _gib(size: float) -> str:
    return f"{size / GIB:.2f}" if size < 100 * GIB else f"{size / GIB:.0f}"
