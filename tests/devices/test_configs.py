"""Every strategy that is shipped as a configuration is instantiated by it, as on a machine with GPUs."""

from pathlib import Path

import lightning.pytorch as pl
import pytest
import tiny
import torch
from deepspeed.runtime.config import DeepSpeedConfig
from transformers import AutoConfig, AutoModelForCausalLM, Qwen2Config

from prime_lightning.cli.lightning_cli import PrimeCLI
from prime_lightning.models.pretrained import load_tokenizer
from prime_lightning.sampling.datamodule import RolloutDataModule
from prime_lightning.training.module import PrimeModule
from prime_lightning.training.strategies.ddp_fsdp import PrimeDDPStrategy, PrimeFSDPStrategy
from prime_lightning.training.strategies.deepspeed import PrimeDeepSpeedStrategy, merged
from prime_lightning.training.strategies.placement import owners_of, settle

CONF = Path(__file__).parents[2] / "conf"
KINDS = {
    "ddp": PrimeDDPStrategy,
    "fsdp2": PrimeFSDPStrategy,
    "hsdp": PrimeFSDPStrategy,
    "zero1": PrimeDeepSpeedStrategy,
    "zero2": PrimeDeepSpeedStrategy,
    "zero3": PrimeDeepSpeedStrategy,
    "zero3_offload": PrimeDeepSpeedStrategy,
}


def cli_of(*args):
    """The papers's config with more layers, on eight imagined devices."""
    arithmetic = '{"class_path": "prime_lightning.prompts.ArithmeticPrompts"}'
    local = ["--data.train", arithmetic, "--data.validation", arithmetic, "--trainer.default_root_dir", "/dev/null"]
    layers = ["--config", CONF / "prime.yaml", *args, *local, "--trainer.accelerator", "cpu", "--trainer.devices", "8"]
    return PrimeCLI(PrimeModule, RolloutDataModule, [str(arg) for arg in layers], run=False)


def built(*args):
    """Its strategy."""
    return cli_of(*args).trainer.strategy


@pytest.mark.parametrize("name", KINDS)
def test_each_strategy_is_built_by_its_config(name):
    strategy = built("--config", CONF / f"strategy/{name}.yaml")
    assert type(strategy) is KINDS[name]
    assert strategy.num_processes == 8
    assert getattr(strategy, "replicas", 1) == ("nodes" if name == "hsdp" else 1)
    if name.startswith("zero"):
        zero = strategy.config["zero_optimization"]
        assert zero["stage"] == int(name[4])
        assert ("offload_optimizer" in zero, "offload_param" in zero) == (2 * ("offload" in name,))


def test_one_model_may_have_a_config_of_its_own():
    other = '{"prm": {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}}'
    strategy = built("--config", CONF / "strategy/zero2.yaml", "--trainer.strategy.init_args.roles", other)
    assert strategy.config_of("prm")["zero_optimization"] == strategy.config["zero_optimization"] | {
        "offload_optimizer": {"device": "cpu"}
    }
    assert strategy.config_of("policy") == strategy.config
    assert merged({"a": {"b": 1}}, {"a": 2}) == {"a": 2}


def test_an_optimizer_over_two_models_is_refused():
    module = torch.nn.ModuleDict({"policy": torch.nn.Linear(1, 1), "prm": torch.nn.Linear(1, 1)})
    each = [torch.optim.SGD(model.parameters(), lr=1.0) for model in module.values()]
    assert owners_of(module, each) == ["policy", "prm"]
    for wrong in ([torch.optim.SGD(module.parameters(), lr=1.0)], [each[0], each[0]]):
        with pytest.raises(ValueError, match="Expected each optimizer to have the parameters of one model"):
            owners_of(module, wrong)


def test_the_papers_run_is_built_on_a_meta_device(warm_model, tmp_path, monkeypatch):
    """conf/prime.yaml as it is, ZeRO-3 on eight devices, with models of the real size whose weights have no memory."""
    size = {"hidden_size": 3584, "intermediate_size": 18_944, "num_hidden_layers": 28}
    heads = {"num_attention_heads": 28, "num_key_value_heads": 4}
    Qwen2Config(vocab_size=152_064, tie_word_embeddings=False, **size, **heads).save_pretrained(tmp_path / "7b")
    load_tokenizer(str(warm_model)).save_pretrained(tmp_path / "7b")

    def without_weights(name, *, dtype, attention):
        with torch.device("meta"):
            config, kind = AutoConfig.from_pretrained(name), getattr(torch, dtype)
            return AutoModelForCausalLM.from_config(config, dtype=kind, attn_implementation=attention).train()

    monkeypatch.setattr("prime_lightning.training.scoring.load_causal_lm", without_weights)
    cli = cli_of("--model.policy", tmp_path / "7b")
    module, strategy = cli.model, cli.trainer.strategy
    module.configure_model()
    assert module.policy.model.config._attn_implementation == "varlen"  # which needs no package
    for model in (module.policy, module.prm, module.reference):
        assert sum(p.numel() for p in model.parameters() if p.is_meta) == 7_615_616_512
    optimizers = [made["optimizer"] for made in module.configure_optimizers()]
    assert owners_of(module, optimizers) == ["prm", "policy"]
    strategy._init_config_if_needed()
    for role in ("policy", "prm", "reference"):
        read = DeepSpeedConfig(strategy.config_of(role))
        assert (read.zero_optimization_stage, read.bfloat16_config.enabled) == (3, True)
        assert read.zero_config.overlap_comm  # or nothing is gathered while something else is computed


def test_stages_without_overlap_have_none():
    strategy = built("--config", CONF / "strategy/zero2.yaml")
    strategy.roles = {"prm": {"zero_optimization": {"stage": 1}}}
    overlap = [strategy.config_of(role)["zero_optimization"]["overlap_comm"] for role in ("policy", "prm")]
    assert overlap == [True, False]


@pytest.mark.parametrize("alone", [False, True])
def test_a_second_partition_of_weights_is_refused(alone):
    asked = {"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 2}}
    strategy = PrimeDeepSpeedStrategy(roles={"prm": asked}) if alone else PrimeDeepSpeedStrategy(config=asked)
    with pytest.raises(ValueError, match=r"one model a process only, got 2\. conf/strategy/hsdp\.yaml"):
        strategy._init_config_if_needed()


def test_a_config_for_a_model_that_is_not_there_is_refused(warm_model):
    module = tiny.module(warm_model)
    module.configure_model()
    strategy = PrimeDeepSpeedStrategy(roles={"actor": {}})
    with pytest.raises(ValueError, match=r"to name some of \['policy', 'prm'\], got \['actor'\]"):
        strategy._prepare(module)


def test_a_module_with_engines_knows_where_they_are(warm_model):
    """Without CUDA, the device without data stands for it."""
    module = tiny.module(warm_model)
    module.configure_model()
    settle(module, torch.device("meta"))
    assert module.device.type == module.pass_rate.device.type == "meta"
    assert module.pass_rate.mean_value.device.type == "meta"
    assert module.policy.model.device.type == "cpu"  # it moves when its engine is made


def test_strategies_that_take_all_models_for_one_are_refused(warm_model):
    module = tiny.module(warm_model)
    module.trainer = pl.Trainer(accelerator="cpu", devices=2, strategy="ddp", logger=False)
    with pytest.raises(ValueError, match="got DDPStrategy"):
        module.setup("fit")
    module.trainer = pl.Trainer(accelerator="cpu", devices=2, strategy=PrimeDDPStrategy(), logger=False)
    with pytest.raises(ValueError, match="a data module that takes the policy's weights"):
        module.setup("fit")  # the strategy is accepted
