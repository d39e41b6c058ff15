"""One frozen base below policy, PRM and reference: trained as with a base each, in the memory of one."""

import lightning.pytorch as pl
import pytest
import tiny
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from prime_lightning.__main__ import main
from prime_lightning.cli.lightning_cli import parsed
from prime_lightning.models.options import Loading, Lora
from prime_lightning.models.pretrained import load_causal_lm
from prime_lightning.prompts.arithmetic import build_tokenizer
from prime_lightning.training.plan.setup import setup_of
from prime_lightning.training.scoring import load_scoring
from prime_lightning.training.stepping import RoleStrategy
from prime_lightning.training.strategies.ddp_fsdp import PrimeDDPStrategy, PrimeFSDPStrategy

POLICY, PRM = Lora(rank=4, alpha=8.0), Lora(rank=3, alpha=9.0, target_modules=["q_proj", "down_proj"])


def pieces(model, share, **options):
    """Adapters of other ranks and other layers on the two, and a reference below them."""
    settings = {"policy_lora": POLICY, "prm_lora": PRM, "reference": str(model), "policy_optimizer": tiny.adam(1e-2)}
    prime = tiny.module(model, share_base=share, **(settings | options))
    return prime, tiny.data(model)


def run(folder, model, share, **options):
    saving = pl.callbacks.ModelCheckpoint(folder, filename="{step}", every_n_train_steps=2, save_top_k=-1)
    (prime, rollouts), history = pieces(model, share, **options), tiny.History()
    tiny.trainer(folder, 3, saving, history=history).fit(prime, rollouts)
    return prime, history.rows


def held(module):
    """Bytes of all different storages."""
    tensors = [*module.parameters(), *module.buffers()]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


@pytest.fixture(scope="module")
def both(tmp_path_factory, warm_model):
    folders = {share: tmp_path_factory.mktemp(f"share{share}") for share in (True, False)}
    return {share: (folder, *run(folder, warm_model, share)) for share, folder in folders.items()}


def test_it_trains_as_with_a_base_each(both, warm_model):
    (_, one, rows), (_, two, others) = both[True], both[False]
    assert rows == others
    assert rows[-1]["importance/abs_diff_max"] < 1e-4  # the engine has the policy's weights
    state, other = one.state_dict(), two.state_dict()
    assert state.keys() == other.keys()
    assert all(torch.equal(state[name], other[name]) for name in state)
    before = dict(load_causal_lm(str(warm_model)).named_parameters())
    for role in ("policy", "prm"):
        for name, tensor in getattr(one, role).model.get_base_model().named_parameters():
            if ".lora_" not in name:
                assert torch.equal(tensor, before[name.replace(".base_layer", "")])
            elif ".lora_B" in name:
                assert tensor.abs().max() > 0


def test_only_adapters_are_apart(both):
    _, prime, _ = both[True]
    policy, prm = ({id(p): name for name, p in getattr(prime, role).named_parameters()} for role in ("policy", "prm"))
    assert policy.keys() & prm.keys() == {key for key, name in policy.items() if ".lora_" not in name}
    assert not any(".lora_" in prm[key] for key in policy.keys() & prm.keys())
    assert not list(prime.reference.parameters())


@pytest.mark.parametrize(("saved", "share"), [(True, True), (True, False), (False, True)])
def test_resume_is_bit_equal_whoever_wrote_the_checkpoint(both, warm_model, tmp_path, saved, share):
    folder, _, rows = both[saved]
    (prime, rollouts), history = pieces(warm_model, share), tiny.History()
    tiny.trainer(tmp_path, 3, history=history).fit(prime, rollouts, ckpt_path=folder / "step=2.ckpt")
    assert history.rows == rows[2:]
    state = both[saved][1].state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in prime.state_dict().items())


def test_a_checkpoint_has_the_base_once(both):
    sizes = {share: (folder / "step=2.ckpt").stat().st_size for share, (folder, *_) in both.items()}
    base = sum(p.numel() * 4 for n, p in both[True][1].policy.named_parameters() if ".lora_" not in n)
    assert sizes[False] - sizes[True] == pytest.approx(base, rel=0.02)


@pytest.fixture(scope="module")
def fifty_million(tmp_path_factory):
    folder, tokenizer = tmp_path_factory.mktemp("fifty"), build_tokenizer()
    config = Qwen2Config(
        vocab_size=24_000, hidden_size=512, intermediate_size=2048, num_hidden_layers=9, num_attention_heads=8,
        num_key_value_heads=4, tie_word_embeddings=True, bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    Qwen2ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_three_roles_of_50_million_weights_take_the_memory_of_one(fifty_million):
    sizes = {}
    for share in (True, False):
        prime, _ = pieces(fifty_million, share)
        prime.configure_model()
        sizes[share] = held(prime)
        moved = held(prime.to(torch.float64))  # what casts or moves a model does it to both, once
        assert moved == pytest.approx(2 * sizes[share], rel=1e-3)
    weights = sum(p.numel() for p in load_causal_lm(fifty_million).parameters())
    assert 45e6 < weights < 55e6
    adapters = sum(p.numel() for p in prime.parameters() if p.requires_grad)
    assert sizes[False] - sizes[True] == pytest.approx(4 * weights, rel=1e-3)
    assert sizes[True] == pytest.approx(4 * (weights + adapters), rel=1e-3)
    words = ["--config", "conf/quickstart.yaml", f"--model.policy={fifty_million}", "--model.reference=${model.policy}"]
    loras = ["--model.policy_lora={rank: 4}", "--model.prm_lora={rank: 3, target_modules: [q_proj, down_proj]}"]
    setup = setup_of(parsed([*words, *loras, "--model.share_base=true"]), None, {})
    assert sum(setup.stored(role) for role in setup.shapes) == weights + adapters


def test_gradient_checkpointing_and_packed_rows(warm_model, tmp_path):
    loading = Loading(dtype="bfloat16", gradient_checkpointing=True, attention="varlen", packed=True)
    rows = [run(tmp_path / str(share), warm_model, share, loading=loading)[1] for share in (True, False)]
    assert rows[0] == rows[1]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"policy_lora": None}, "got no `model.policy_lora`, so that all weights of the policy would be trained"),
        ({"prm_lora": None}, "got no `model.prm_lora`, so that all weights of the prm would be trained"),
        ({"prm": "another"}, "Expected one model below policy and PRM with `share_base: true`, got .* and 'another'"),
        ({"prm": None}, "Expected one model below policy and PRM .* and None"),
    ],
)
def test_weights_that_are_trained_or_of_two_models_are_not_shared(warm_model, options, words):
    with pytest.raises(ValueError, match=words):
        pieces(warm_model, True, **options)


def test_strategies_that_spread_weights_are_refused(warm_model):
    policy = load_scoring(str(warm_model), Loading(), RoleStrategy(), lora=POLICY)
    with pytest.raises(ValueError, match=r"keeps whole models with `share_base: true`, got PrimeFSDPStrategy"):
        load_scoring(str(warm_model), Loading(), PrimeFSDPStrategy(), lora=PRM, beside=policy)
    assert PrimeDDPStrategy.shares_weights


@pytest.mark.parametrize("strategy", ["fsdp2", "zero2", "zero3"])
def test_the_plan_refuses_what_the_run_does(warm_model, capsys, strategy):
    words = ["--config", "conf/quickstart.yaml", "--config", "conf/model/lora.yaml", f"--model.policy={warm_model}"]
    assert main(["plan", *words, "--model.share_base=true", "--config", f"conf/strategy/{strategy}.yaml"]) == 2
    assert "Expected a strategy that keeps whole models with `share_base: true`, got" in capsys.readouterr().err
