"""`prime-lightning plan`: its formulas against memory and arithmetic that were measured on small models."""

import copy
import json
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, DynamicCache, Gemma2Config, Qwen2Config

from prime_lightning.__main__ import main
from prime_lightning.cli.lightning_cli import parsed
from prime_lightning.models.logprobs import ScoringLM
from prime_lightning.training.plan import estimates
from prime_lightning.training.plan.estimates import Sharding
from prime_lightning.training.plan.report import Rollouts, iteration_of, memory_of, switched
from prime_lightning.training.plan.setup import setup_of
from prime_lightning.training.plan.shape import adapter_parameters, shape_of, work_bytes

SMALL = {
    "vocab_size": 1000,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
QWEN_7B = {
    "vocab_size": 152_064,
    "hidden_size": 3584,
    "intermediate_size": 18_944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "tie_word_embeddings": False,
}
SMALL_HEADS = {"num_attention_heads": 14, "num_key_value_heads": 2, "tie_word_embeddings": True}
CONFIGS = {
    "tied": Qwen2Config(**SMALL, tie_word_embeddings=True),
    "untied": Qwen2Config(**SMALL, tie_word_embeddings=False),
    "gemma2": Gemma2Config(**SMALL | {"num_hidden_layers": 4}, head_dim=24),
}


def size(tensors):
    return sum(t.numel() * t.element_size() for t in {id(t): t for t in tensors}.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_parameters_gradients_and_moments_are_exact(name, dtype):
    model = AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS[name]), dtype=dtype)
    shape, width, alone = shape_of(CONFIGS[name]), dtype.itemsize, Sharding()
    optimizer = torch.optim.AdamW(model.parameters())
    model(input_ids=torch.arange(6)[None], labels=torch.arange(6)[None]).loss.backward()
    optimizer.step()
    moments = [t for state in optimizer.state.values() for t in state.values() if t.ndim]
    assert estimates.parameter_bytes(shape.parameters, width, alone) == size(model.parameters())
    assert estimates.gradient_bytes(shape.parameters, width, alone) == size(p.grad for p in model.parameters())
    assert estimates.moment_bytes(shape.parameters, 2, width, alone) == size(moments)
    assert shape.lookup == (0 if model.lm_head.weight is model.get_input_embeddings().weight else 64_000)


def test_the_stages_are_those_of_the_zero_paper():
    """Figure 1 of arXiv 1910.02054: 7.5 billion parameters on 64 GPUs in mixed precision with Adam, in GB."""

    def kept(stage):
        shard = Sharding(gpus=64, stage=stage, masters=True)
        parts = estimates.parameter_bytes(7.5e9, 2, shard) + estimates.gradient_bytes(7.5e9, 2, shard)
        return (parts + estimates.moment_bytes(7.5e9, 2, 2, shard) + estimates.master_bytes(7.5e9, shard)) / 1e9

    assert [round(kept(stage), 1) for stage in range(4)] == [120.0, 31.4, 16.6, 1.9]
    offloaded = Sharding(gpus=64, stage=3, masters=True, offload_optimizer=True, offload_parameters=True)
    assert estimates.moment_bytes(7.5e9, 2, 2, offloaded) == estimates.parameter_bytes(7.5e9, 2, offloaded) == 0
    assert estimates.host_bytes(7.5e9, 2, 2, offloaded) == 7.5e9 * (12 + 2) / 64


def allocated(run):
    """Peak bytes of the CPU allocator, as torch's profiler saw them: another witness than the one in the package."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        run()
    events = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("name", ["tied", "untied"])
def test_activations_and_logits_are_what_a_real_backward_allocates(name, autocast, checkpointing):
    """8 rows of 64 tokens through the training code itself; the plan counts without data, and never less than is real.

    It comes to 0 to 20 % more: an operation's operands are let go one operation later than they are in a real run.
    """
    model = AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS[name])).train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    for parameter in model.parameters():  # gradients are counted elsewhere
        parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    scoring = ScoringLM(model, chunk_tokens=100)
    tokens, prompts, responses = torch.randint(1000, (8, 64)), torch.full((8,), 1), torch.full((8,), 63)

    def run():
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast, cache_enabled=False):
            scoring(tokens, prompts, responses)[0].sum().backward()

    run()
    real = allocated(run)
    planned = work_bytes(CONFIGS[name], 512, 100, torch.float32, autocast=autocast, checkpointing=checkpointing)
    assert real <= planned <= 1.2 * real


@pytest.mark.parametrize("checkpointing", [False, True])
def test_deep_models_are_the_shallow_ones_continued(checkpointing):
    def count(layers):
        config = Qwen2Config(**SMALL | {"num_hidden_layers": layers})
        return work_bytes(config, 256, 64, torch.bfloat16, autocast=False, checkpointing=checkpointing)

    counted = [count(layers) for layers in (2, 3, 4)]
    assert counted[1] - counted[0] == counted[2] - counted[1] > 0
    assert count(9) == counted[2] + 5 * (counted[2] - counted[1])


def test_keys_and_values_are_exact():
    model = AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS["tied"]))
    cache = DynamicCache(config=CONFIGS["tied"])
    model(input_ids=torch.zeros(3, 11, dtype=torch.long), past_key_values=cache, use_cache=True)
    held = size(t for layer in cache.layers for t in (layer.keys, layer.values))
    assert estimates.cache_bytes(3, 11, shape_of(CONFIGS["tied"]).cache_width, 4) == held


@pytest.mark.parametrize("name", ["tied", "untied"])
def test_operations_are_those_that_torch_counts(name):
    model = AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS[name]), attn_implementation="eager")
    shape = shape_of(CONFIGS[name])
    with FlopCounterMode(display=False) as counter:
        model(input_ids=torch.zeros(2, 32, dtype=torch.long), use_cache=False)
    norms_and_biases = sum(p.numel() for p in model.parameters() if p.ndim == 1)
    matrix = estimates.matrix_parameters(shape.parameters, shape.lookup) - norms_and_biases
    full = estimates.forward_flops(
        matrix, shape.layers, shape.hidden, tokens=64, length=2 * 32
    )  # it knows no causality
    assert counter.get_total_flops() == full


def test_sampling_is_bound_by_bandwidth_then_by_arithmetic():
    gpu = estimates.Hardware(flops=1e12, bandwidth=1e9, sampling_efficiency=1.0)

    def seconds(running, **more):
        numbers = {"length": 0, "weight_bytes": 1e9, "cache_bytes_per_token": 0.0, "forward_flops_per_token": 1e9}
        return estimates.sampling_seconds(1000, running=running, gpus=1, hardware=gpu, **numbers | more)

    assert seconds(1) == 1000  # the weights are read once a token: 1 s
    assert seconds(10) == 100  # ten samples share a reading
    assert seconds(2000) == seconds(4000) == 1  # 1e9 operations a token
    assert seconds(10, length=2000, cache_bytes_per_token=1e5) == 200  # 10 caches of 1,000 tokens on average


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "v_proj"]], ids=str)
def test_adapters_are_those_of_peft(targets):
    peft = pytest.importorskip("peft")
    model = AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS["tied"]))
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM"))
    trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    assert adapter_parameters(CONFIGS["tied"], 4, targets) == trained


# ---- the command


@pytest.fixture(scope="module")
def seven_billion(tmp_path_factory):
    path = tmp_path_factory.mktemp("plan") / "config.json"
    path.write_text(json.dumps({"model_type": "qwen2", **QWEN_7B}))
    return str(path)


def plan(*args):
    return main(["plan", "--config", "conf/prime.yaml", *map(str, args)])


@pytest.fixture
def _here(monkeypatch, request):
    monkeypatch.chdir(request.config.rootpath)


@pytest.mark.usefixtures("_here")
def test_the_papers_run_on_eight_gpus(seven_billion, capsys):
    """7,615,616,512 parameters is what Qwen2.5-7B has; DDP keeps 16 bytes of each of two and 4 of the third."""
    assert plan("--gpus", 8, "--trainer.strategy", "ddp", "--model-config", seven_billion, "--price", 2) == 1
    said = capsys.readouterr().out
    assert "7,615,616,512 parameters" in said
    row = next(line for line in said.splitlines() if line.startswith("optimizer moments"))
    assert row.split()[2:] == [f"{7_615_616_512 * 8 / 2**30:.2f}"] * 2 + ["-"]
    assert "does not fit" in said
    assert "ZeRO-3 over the same GPUs" in said
    assert "Cost at 2 a GPU hour" in said


@pytest.mark.usefixtures("_here")
def test_zero_3_fits_where_ddp_does_not(seven_billion, capsys):
    assert plan("--gpus", 8, "--trainer.strategy", "deepspeed_stage_3", "--model-config", seven_billion) == 0
    said = capsys.readouterr().out
    assert "8 GPUs, ZeRO-3, bfloat16" in said
    assert "of 80.00: fits" in said
    assert "What would help" not in said
    row = next(line for line in said.splitlines() if line.startswith("float32 masters"))
    assert row.split()[2] == f"{7_615_616_512 * 4 / 8 / 2**30:.2f}"


def documented(command):
    """Lines of docs/nodes.md that show this subcommand, as words."""
    lines = (Path(__file__).parents[2] / "docs/nodes.md").read_text().splitlines()
    return [shlex.split(line)[1:] for line in lines if line.startswith(f"    prime-lightning {command} ")]


@pytest.mark.usefixtures("_here")
def test_the_documented_plan(seven_billion, capsys):
    (words,) = documented("plan")
    assert main([*words, "--model-config", f"policy={seven_billion}", "--model-config", seven_billion]) in (0, 1)
    assert "at the peak" in capsys.readouterr().out


@pytest.mark.usefixtures("_here")
@pytest.mark.parametrize("words", documented("fit"), ids=" ".join)
def test_the_documented_fits_parse(words, capsys):
    with pytest.raises(SystemExit) as ended:
        main([*words, "--print_config"])
    assert ended.value.code == 0


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("--gpus 0", "expected a number of GPUs, at least 1, got 0"),
        ("--gpus=-3", "expected a number of GPUs, at least 1, got -3"),
        ("--gpu-memory 0", "expected a number above 0, got 0"),
        ("--price=-1", "expected a number above 0, got -1"),
        ("--mfu 1.5", "expected a share of at most 1, got 1.5"),
        ("--acceptance nan", "expected a number above 0, got nan"),
        ("--model-config critik=x.json", "expected a role of policy, prm, critic, reference before the `=`"),
    ],
)
@pytest.mark.usefixtures("_here")
def test_numbers_that_make_no_sense_are_refused(words, told, capsys):
    with pytest.raises(SystemExit) as ended:
        plan(*words.split())
    assert ended.value.code == 2
    assert told in capsys.readouterr().err


@pytest.mark.usefixtures("_here")
def test_prompts_that_cannot_be_shared_are_refused_as_in_fit(seven_billion, capsys):
    assert plan("--gpus", 7, "--model-config", seven_billion) == 2
    assert "divisible by the number of GPUs, got 256 prompts on 7 GPUs" in capsys.readouterr().err


@pytest.mark.usefixtures("_here")
def test_compiled_layers_are_refused_under_zero3_as_in_fit(seven_billion, capsys):
    words = ("--gpus", 8, "--model-config", seven_billion, "--model.loading.kernels", "compile")
    assert plan(*words) == 2
    assert "another strategy than ZeRO-3" in capsys.readouterr().err
    assert plan(*words, "--config", "conf/strategy/fsdp2.yaml") != 2


@pytest.mark.usefixtures("_here")
def test_a_small_model_on_one_small_gpu(tmp_path, capsys):
    """Qwen2.5-0.5B has 494,032,768 parameters, tied embeddings once."""
    path = tmp_path / "config.json"
    small = {"vocab_size": 151_936, "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24}
    path.write_text(json.dumps({"model_type": "qwen2", **QWEN_7B, **small} | SMALL_HEADS))
    layers = ["strategy/one_gpu", "model/qwen2.5-0.5b-instruct", "data/gsm8k"]
    words = [word for layer in layers for word in ("--config", f"conf/{layer}.yaml")]
    assert plan(*words, "--gpu-memory", 24, "--model-config", path) == 0
    said = capsys.readouterr().out
    assert "494,032,768 parameters" in said
    assert "of 24.00: fits" in said
    assert plan(*words, "--gpu-memory", 16, "--model-config", path) == 1
    assert "What would help" in capsys.readouterr().out


@pytest.mark.usefixtures("_here")
def test_no_hub_and_no_file(capsys):
    assert plan() == 2
    assert "give the model's config.json by --model-config" in capsys.readouterr().err


def setup(warm_model, *more):
    """The quickstart's run, with the tiny model."""
    return setup_of(parsed(["--config", "conf/quickstart.yaml", "--model.policy", str(warm_model), *more]), None, {})


@pytest.mark.usefixtures("_here")
def test_what_the_configuration_says(warm_model):
    plain = setup(warm_model)
    assert plain.trained == ("policy", "prm")
    assert (plain.weights, plain.autocast, plain.sharding) == (torch.float32, False, Sharding())
    assert setup(warm_model, "--trainer.precision=bf16-mixed").autocast
    varlen = ("--model.loading.attention=varlen", "--model.loading.packed=true")
    assert not plain.shared_prompts
    assert setup(warm_model, *varlen).shared_prompts
    assert not setup(warm_model, *varlen, "--model.loading.shared_prompts=off").shared_prompts
    assert setup(warm_model, "--model.process_reward.update=none").trained == ("policy",)
    assert setup(warm_model, "--model.policy_optimizer=torch.optim.SGD").moments["policy"] == 0
    assert setup(warm_model, "--model.prm_loss=prime_lightning.algorithms.dpo").micro_tokens["prm"] == 16_384
    half = setup(warm_model, "--trainer.precision=bf16-mixed", "--trainer.strategy=deepspeed_stage_2")
    assert (half.weights, half.sharding.stage, half.sharding.masters) == (torch.bfloat16, 2, True)
    kind = "prime_lightning.training.strategies.PrimeDeepSpeedStrategy"
    ours = f"{{class_path: {kind}, init_args: {{stage: 3, frozen: replicate}}}}"
    strategy = setup(warm_model, f"--trainer.strategy={ours}").sharding
    assert (strategy.name, strategy.masters, strategy.replicate_frozen) == ("ZeRO-3", True, True)
    assert setup(warm_model, "--config=conf/strategy/fsdp2.yaml", "--trainer.devices=2").sharding.name == "FSDP2"
    nodes = ("--config=conf/strategy/hsdp.yaml", "--trainer.devices=4", "--trainer.num_nodes=2")
    hybrid = setup(warm_model, *nodes, "--data.prompts_per_batch=8").sharding
    assert (hybrid.name, hybrid.gpus, hybrid.replicas, hybrid.share(3)) == ("FSDP2 x 2", 8, 2, 4)
    with pytest.raises(ValueError, match="to divide the number of ranks, got 3 and 8 ranks"):
        setup(warm_model, *nodes, "--trainer.strategy.init_args.replicas=3")
    assert setup(warm_model, "--config=conf/engine/vllm.yaml").sampler.fraction == 0.4
    shared = setup(warm_model, "--config=conf/engine/vllm_shared.yaml").sampler
    assert (shared.tensor_parallel, shared.beside) == (2, True)
    assert not setup(warm_model, "--config=conf/engine/server.yaml").sampler.beside


@pytest.mark.usefixtures("_here")
@pytest.mark.parametrize(
    ("more", "scored"),
    [
        ([], {"policy": 1, "prm": 1}),  # of its two optimizer steps the PRM's rewards come before
        (["--model.prm_update.minibatches=1"], {"policy": 1, "prm": 0}),
        (["--model.prm_update.minibatches=1", "--model.process_reward.update=before"], {"policy": 1, "prm": 1}),
        (["--model.policy_loss.proximal=engine"], {"policy": 0, "prm": 1}),
        (["--data.sampling.temperature=0.7"], {"policy": 1, "prm": 1}),
        (["--data.sampling.temperature=0.7", "--model.policy_update.minibatches=2"], {"policy": 2, "prm": 1}),
        (["--model.reference=${model.policy}"], {"policy": 0, "prm": 1, "reference": 1}),
        (
            ["--model.reference=${model.policy}", "--model.policy_loss.kl=reward"],
            {"policy": 1, "prm": 1, "reference": 1},
        ),
        (["--model.prm=null"], {"policy": 0}),
    ],
)
def test_passes_without_gradient_are_counted_as_docs_concepts_has_them(warm_model, more, scored):
    assert setup(warm_model, *more).scored == scored


@pytest.mark.usefixtures("_here")
def test_replayed_passes_are_counted(warm_model):
    replay = "--model.process_reward.replay"
    asked = [f"{replay}.passes=3", f"{replay}.reference=present", "--model.prm_update.epochs=2"]
    off, on = (setup(warm_model, f"{replay}.iterations={count}", *asked) for count in (0, 5))
    assert (off.epochs["prm"], on.epochs["prm"]) == (2, 2 * 4)
    assert (off.scored["policy"], on.scored["policy"]) == (1, 1 + 3)
    assert off.epochs["policy"] == on.epochs["policy"] == 1


@pytest.mark.usefixtures("_here")
def test_adapters_have_little_state_and_a_free_reference(warm_model):
    whole = setup(warm_model, "--model.reference", str(warm_model))
    few = replace(whole, trainable={"policy": 1000, "prm": 1000}, shared_reference=True)
    before, after = memory_of(whole, estimates.GIB), memory_of(few, estimates.GIB)
    assert after.models["optimizer moments"] == {"policy": 8000, "prm": 8000}
    assert after.models["parameters"]["reference"] == 0
    assert after.models["parameters"]["policy"] == before.models["parameters"]["policy"] + 4000


@pytest.mark.usefixtures("_here")
def test_every_switch_does_what_it_says(warm_model, monkeypatch):
    """More state, activations or engine, and each change brings the peak down; all together most."""
    large = setup(warm_model, "--model.reference", str(warm_model), "--trainer.devices=2")
    monkeypatch.setattr("prime_lightning.training.plan.report.CONTEXT", 0)  # larger than all of so small a run
    monkeypatch.setattr("prime_lightning.training.plan.report.WORTH", 1.0)
    found, before = switched(large, estimates.GIB), memory_of(large, estimates.GIB).peak
    assert len(found) == len({switch.words for switch in found}) >= 6
    assert all(switch.alone <= 1.0001 * before for switch in found)
    together = [before, *(switch.together for switch in found)]
    assert together == sorted(together, reverse=True)
    assert memory_of(replace(large, checkpointing=True), estimates.GIB).peak == found[0].alone


@pytest.mark.usefixtures("_here")
def test_a_shared_prompt_is_counted_once_in_time(warm_model):
    whole = setup(warm_model)
    rollouts = Rollouts(prompt=30, response=20, acceptance=1.0)
    apart, shared = (
        iteration_of(replace(whole, shared_prompts=on), rollouts, estimates.Hardware(), 80 * 2**30)
        for on in (False, True)
    )
    share = (30 + whole.samples * 20) / (whole.samples * 50)
    assert shared.scoring == pytest.approx(share * apart.scoring)
    assert shared.training == pytest.approx(share * apart.training)
    assert shared.sampling == apart.sampling
