"""Each precision that Lightning has either trains or is refused in one line, by every command that trains."""

import json
from pathlib import Path
from typing import get_args

import lightning.pytorch as pl
import pytest
import tiny
import torch
from lightning.fabric.plugins.precision.precision import _PRECISION_INPUT_STR

from prime_lightning.__main__ import main
from prime_lightning.cli.lightning_cli import parsed
from prime_lightning.models.options import PRECISIONS, Loading, precision_of
from prime_lightning.training.plan.setup import setup_of
from prime_lightning.training.sft import SFTModule

CONF = Path(__file__).parents[2] / "conf"
REFUSED = [name for name in get_args(_PRECISION_INPUT_STR) if name not in PRECISIONS]
LESSONS = '{"class_path": "prime_lightning.prompts.ArithmeticLessons", "init_args": {"size": 8}}'


def start(command, model, folder, *more):
    """One step of a command on a tiny model; its exit status."""
    rows = folder / "rows.jsonl"
    rows.write_text(
        "".join(json.dumps({"prompt": "^1+2=", "response": "3;#3", "label": i % 2}) + "\n" for i in range(8))
    )
    config = {"fit": "quickstart.yaml", "sft": "quickstart_sft.yaml", "prm": "prm.yaml"}[command]
    loading = "--model.loading={attention: sdpa, packed: false, gradient_checkpointing: false}"
    options = {
        "fit": [f"--model.policy={model}", "--data.prompts_per_batch=2", "--data.sampling.max_tokens=4",
                "--data.accuracy_filter={low: 0, high: 1}", "--model.policy_update.minibatches=1",
                "--model.prm_update.minibatches=1"],
        "sft": [f"--model.policy={model}", f"--data.lessons={LESSONS}", "--data.batch_size=4"],
        "prm": [f"--model.prm={model}", f"--data.path={rows}", loading, "--data.prompts_per_batch=1",
                "--data.validation_share=0"],
    }[command]  # fmt: skip
    here = [f"--trainer.default_root_dir={folder}", "--trainer.accelerator=cpu", "--trainer.max_steps=1"]
    return main([command, "--config", str(CONF / config), *options, *here, *more])


@pytest.mark.parametrize(
    ("capabilities", "chosen"),
    [({"avx512_bf16": True}, "bf16-mixed"), ({"amx_bf16": True}, "bf16-mixed"), ({"avx512_f": True}, "32-true")],
)
def test_a_cpu_takes_bfloat16_where_it_multiplies_it(capabilities, chosen, monkeypatch, capsys):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    layers = [f"--config={CONF}/prime.yaml", f"--config={CONF}/strategy/cpu.yaml"]
    with pytest.raises(SystemExit):
        main(["fit", *layers, "--print_config"])
    assert f"  precision: {chosen}\n" in capsys.readouterr().out
    assert parsed([f"--config={CONF}/quickstart.yaml"]).trainer.precision != "bf16-mixed"


@pytest.mark.parametrize("command", ["fit", "sft", "prm"])
@pytest.mark.parametrize("name", ["bf16-mixed", "bf16", "32-true", "32"])
def test_these_train(command, name, warm_model, tmp_path):
    assert start(command, warm_model, tmp_path, f"--trainer.precision={name}") == 0


@pytest.mark.parametrize(
    ("command", "name"),
    [*(("fit", name) for name in REFUSED), ("sft", "bf16-true"), ("prm", "bf16-true"), ("fit", "16")],
)
def test_the_others_are_refused_in_one_line(command, name, warm_model, tmp_path, capsys):
    assert start(command, warm_model, tmp_path, f"--trainer.precision={name}") == 2
    said = capsys.readouterr().err
    assert "Expected `trainer.precision` 32-true or bf16-mixed, got" in said
    assert name in said
    assert "Traceback" not in said
    assert not list(tmp_path.glob("**/config.yaml"))  # nothing has begun


@pytest.mark.parametrize("kind", [tiny.module, SFTModule])
def test_modules_refuse_them_too(kind, warm_model, tmp_path):
    module = kind(str(warm_model))
    module.trainer = pl.Trainer(accelerator="cpu", precision="bf16-true", logger=False, default_root_dir=tmp_path)
    with pytest.raises(ValueError, match=r"Expected `trainer.precision` 32-true or bf16-mixed, got 'bf16-true'"):
        module.setup("fit")


def test_a_plan_refuses_what_a_run_refuses(warm_model):
    args = ["--config", str(CONF / "quickstart.yaml"), "--model.policy", str(warm_model)]
    assert setup_of(parsed([*args, "--trainer.precision=bf16"]), None, {}).autocast
    with pytest.raises(ValueError, match=r"Expected `trainer.precision` 32-true or bf16-mixed, got 'bf16-true'"):
        setup_of(parsed([*args, "--trainer.precision=bf16-true"]), None, {})


def test_the_default_is_lightning_s():
    assert precision_of(None) == pl.Trainer(accelerator="cpu", logger=False).precision


@pytest.mark.parametrize("way", ["bf16-mixed", "bfloat16 weights"])
def test_what_is_summed_and_learnt_from_stays_float32(way, warm_model, tmp_path):
    """Labels, log-probs, rewards and advantages; masks stay bool."""
    mixed = way == "bf16-mixed"
    prime = tiny.module(warm_model, loading=Loading(dtype="float32" if mixed else "bfloat16"))
    scored, inner = [], prime.stepper.score

    def score(*args, **options):
        scored.append(inner(*args, **options))
        return scored[-1]

    prime.stepper.score = score
    history = tiny.fit(tmp_path, prime, tiny.data(warm_model), 1, precision="bf16-mixed" if mixed else "32-true")
    [out] = history.outputs
    batch = out.batch
    floats = [batch.outcome_B, batch.behaviour_logprobs_BT, out.process_BT, out.advantage_BT, *scored]
    assert {x.dtype for x in floats} == {torch.float32}
    assert batch.mask_BT.dtype == batch.valid_B.dtype == torch.bool
    assert {p.dtype for p in prime.parameters()} == {torch.float32 if mixed else torch.bfloat16}
    assert torch.get_default_dtype() == torch.float32
