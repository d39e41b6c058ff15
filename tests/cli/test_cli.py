"""The command: every shipped configuration builds, layers resolve, options are golden, mistakes get clear words."""

import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml

from prime_lightning.__main__ import main
from prime_lightning.cli.commands import quickstart
from prime_lightning.cli.lightning_cli import PrimeCLI
from prime_lightning.sampling.datamodule import RolloutDataModule
from prime_lightning.training.callbacks.progress import PrimeProgress
from prime_lightning.training.module import PrimeModule
from prime_lightning.training.sft import LessonDataModule, SFTModule

REPOSITORY = Path(__file__).parents[2]
CONF = REPOSITORY / "conf"
OVERLAYS = sorted(p.relative_to(CONF).as_posix() for p in CONF.glob("*/*.yaml"))
ROWS = [{"problem": "What is 1+1?", "question": "What is 1+1?", "answer": "#### 2"}]


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return str(path)


def build(*args, model=PrimeModule, data=RolloutDataModule):
    """Parse and instantiate as `fit` does, without running."""
    return PrimeCLI(model, data, [str(a) for a in args], run=False)


def local(folder, model, rows):
    """Options that turn a configuration for GPUs and the hub into one that can be built here."""
    arithmetic = '{"class_path": "prime_lightning.prompts.ArithmeticPrompts"}'
    return (
        *("--config", CONF / "strategy/cpu.yaml", "--trainer.default_root_dir", folder, "--model.policy", model),
        *("--data.train", arithmetic, "--data.validation", arithmetic),
    )


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_overlay_builds_on_the_papers_config(overlay, warm_model, rows, tmp_path):
    cli = build(
        *("--config", CONF / "prime.yaml", "--config", CONF / overlay),
        *local(tmp_path, warm_model, rows),
        *(("--data.train", data_with(CONF / overlay, rows)) if overlay.startswith("data/") else ()),
    )
    assert cli.model.names["policy"] == cli.datamodule.model == str(warm_model)
    changed = yaml.safe_load((CONF / overlay).read_text())
    assert set(changed) <= {"model", "data", "trainer"}
    if overlay.startswith("ablation/"):  # an ablation changes what its name says, and little else
        whole = Path(overlay).stem in ("cispo", "dapo", "dr_grpo", "gspo")  # objectives of others, with all their parts
        assert sum(len(section) for section in changed.values()) <= (5 if whole else 2)


def data_with(overlay, rows):
    """The overlay's prompts, read from a local file."""
    prompts = yaml.safe_load(overlay.read_text())["data"]["train"]
    prompts["init_args"] |= {"path": rows, "name": None, "seed": 0}
    return json.dumps(prompts)


def test_the_papers_numbers(warm_model, rows, tmp_path):
    cli = build("--config", CONF / "prime.yaml", *local(tmp_path, warm_model, rows))
    module, data = cli.model, cli.datamodule
    assert (data.prompts_per_batch, data.sampling.samples) == (256, 4)
    assert (data.accuracy_filter.low, data.accuracy_filter.high) == (0.2, 0.8)
    assert module.reward.beta == 0.05
    assert tuple(module.stepper.updates[role].grad_clip for role in ("policy", "prm")) == (1.0, 10.0)
    module.configure_model()
    optimizers = [made["optimizer"] for made in module.configure_optimizers()]
    assert module.trained == ["prm", "policy"]
    assert [o.defaults["lr"] for o in optimizers] == [1e-6, 5e-7]
    assert [o.defaults["weight_decay"] for o in optimizers] == [0.0, 0.01]
    assert module.names["reference"] == str(warm_model)  # ${model.policy} followed the override
    assert cli.trainer.max_steps == 592


@pytest.mark.parametrize("name", ["quickstart_sft.yaml", "sft.yaml"])
def test_supervised_configs_build(name, warm_model, tmp_path):
    lessons = '{"class_path": "prime_lightning.prompts.ArithmeticLessons"}'
    cpu = ("--trainer.accelerator", "cpu", "--trainer.devices", 1, "--trainer.precision", "32-true")
    where = ("--trainer.default_root_dir", tmp_path, "--model.policy", warm_model, "--data.lessons", lessons)
    cli = build("--config", CONF / name, *cpu, *where, model=SFTModule, data=LessonDataModule)
    assert cli.datamodule.model == str(warm_model)


def test_later_configs_win_and_references_follow(warm_model, tmp_path):
    late = tmp_path / "late.yaml"
    late.write_text("seed_everything: 5\nmodel: {credit: {gamma_process: 0.5}}\n")
    where = ("--trainer.default_root_dir", tmp_path)
    cli = build("--config", CONF / "quickstart.yaml", "--config", late, *where)
    assert cli.model.weights.gamma_process == 0.5
    assert cli.model.weights.whiten  # the quickstart's, beside the changed one
    assert cli.model.seed == cli.datamodule.train.seed == cli.datamodule.sampling.seed == 5
    assert cli.model.names["policy"] == cli.datamodule.model == f"{tmp_path}/warm/policy"


def test_the_set_of_options_is_golden():
    """Adding or renaming an option is a decision: change tests/golden/options.txt with it."""
    cli = build("--config", CONF / "quickstart.yaml")
    names = {a.dest for a in cli.parser._actions if a.dest.startswith(("model.", "data."))}
    golden = (Path(__file__).parents[1] / "golden" / "options.txt").read_text().split()
    assert sorted(n for n in names if not n.endswith(".help")) == golden


def fit(tmp_path, model, *more):
    """`prime-lightning fit` on the quickstart's config; returns the exit status."""
    where = ("--trainer.default_root_dir", str(tmp_path), "--model.policy", str(model), "--trainer.max_steps=1")
    small = ("--data.prompts_per_batch=2", "--data.sampling.max_tokens=4", "--model.prm_update.minibatches=1")
    return main(["fit", "--config", str(CONF / "quickstart.yaml"), *where, *small, *map(str, more)])


def jsonl(tmp_path, *rows):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return json.dumps(
        {
            "class_path": "prime_lightning.prompts.DatasetPrompts",
            "init_args": {"path": str(path), "template": {"chat": False, "user": "{problem}"}},
        }
    )


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--model.policy=no/such-model"], "Expected a folder or a Hugging Face id with a .*, got 'no/such-model'"),
        (["--data.prompts_per_batch=0"], "Expected `data.prompts_per_batch` of at least 1, got 0"),
        (["--data.sampling.top_p=1.5"], r"Expected sampling `top_p` in \(0, 1\], got 1.5"),
        (["--data.accuracy_filter.low=0.9"], "Expected 0 <= low <= high <= 1 in the accuracy filter, got 0.9 and 0.8"),
        (["--data.sampling.samples=1", "--data.accuracy_filter={low: 0, high: 1, min_valid: 1}"], "lone|single|group"),
        (["--data.sampling.samples=1"], "Expected `data.sampling.samples` of at least the filter's `min_valid` 2"),
        (["--model.policy_update.minibatches=3"], "Expected at least one prompt for each of 3 minibatches, got 2"),
        (["--trainer.max_steps=-1"], "Expected `trainer.max_steps`, the number of iterations"),
        (["--data.sampling.max_tokens=500"], "Expected prompt and completion to fit the model's 128 positions"),
        (["--data.patience=1", "--data.accuracy_filter={low: 0.6, high: 0.6}"], "The accuracy filter accepted 0 of"),
        (["--data.max_prompt_tokens=3"], "Expected prompts of at most 3 tokens"),
        (["--model.policy=${model.nothing}"], "A .* in the configuration leads nowhere|nothing"),
    ],
)
def test_mistakes_get_clear_words(more, words, warm_model, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("prime_lightning.sampling.loader.LONG_PROMPTS_IN_A_ROW", 10)
    import re

    filtered = any("accuracy_filter" in option for option in more)
    open_filter = [] if filtered else ["--data.accuracy_filter={low: 0, high: 1}"]
    assert fit(tmp_path, warm_model, *open_filter, *more) == 2
    said = capsys.readouterr().err
    assert re.search(words, said), said
    assert "Traceback" not in said


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([], "empty"),
        ([{"problem": "1+1="}], "Expected the field 'answer' in"),
        ([{"problem": "1+1=", "answer": "2"}, {"problem": "2+2=", "answer": None}], r"got none in 1 of 2 \(rows \[1\]"),
        ([{"question": "1+1=", "answer": "2"}], "Expected the row to have the field 'problem'"),
    ],
)
def test_bad_rows_get_clear_words(rows, words, warm_model, tmp_path, capsys):
    import re

    assert fit(tmp_path, warm_model, f"--data.train={jsonl(tmp_path, *rows)}") == 2
    said = capsys.readouterr().err
    assert re.search(words, said), said


def test_a_misspelt_option_is_refused(warm_model, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        fit(tmp_path, warm_model, "--model.policy_update.mini_batches=2")
    assert ended.value.code == 2
    assert "mini_batches" in capsys.readouterr().err


def test_a_folder_without_tokenizer_is_named(warm_model, tmp_path, capsys):
    import shutil

    bare = tmp_path / "bare"
    shutil.copytree(warm_model, bare, ignore=shutil.ignore_patterns("tokenizer*"))
    assert fit(tmp_path, bare) == 2
    assert f"Expected a tokenizer in the folder '{bare}'" in capsys.readouterr().err


def test_help(capsys):
    assert main([]) == 0
    assert "quickstart" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_config_for_gpus_without_a_gpu(warm_model, tmp_path, capsys):
    assert fit(tmp_path, warm_model, "--trainer.accelerator=gpu") == 2
    said = capsys.readouterr().err
    assert "No supported gpu backend found" in said
    assert "Traceback" not in said


def test_a_strategy_without_its_package(warm_model, tmp_path, capsys, monkeypatch):
    there = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda *name: None if name[0] == "deepspeed" else there(*name))
    assert fit(tmp_path, warm_model, "--config", str(CONF / "strategy" / "zero3.yaml")) == 2
    said = capsys.readouterr().err
    assert 'got no module `deepspeed`: pip install "prime-lightning[deepspeed]"' in said
    assert len(said) < 700, said  # jsonargparse's own words hold the whole configuration


def test_a_checkpoint_that_is_not_there(warm_model, tmp_path, capsys):
    assert fit(tmp_path, warm_model, f"--ckpt_path={tmp_path}/none.ckpt") == 2
    assert "none.ckpt" in capsys.readouterr().err


def test_a_misspelt_command_gets_all_of_them(capsys):
    assert main(["fitt"]) == 2
    said = capsys.readouterr().err
    assert "got 'fitt'" in said
    assert all(name in said for name in ("fit,", "sft", "evaluate", "report", "export", "plan"))


def test_bars_are_there_before_other_callbacks_work(warm_model, rows, tmp_path):
    cli = build("--config", CONF / "prime.yaml", *local(tmp_path, warm_model, rows))
    assert isinstance(cli.trainer.callbacks[0], PrimeProgress)
    assert len(cli.trainer.callbacks) > 5


def test_a_mistake_in_a_layer_of_the_quickstart_shows_before_it_works(tmp_path, capsys):
    (tmp_path / "layer.yaml").write_text("data: {no_such_option: 3}")
    for layer, words in (("layer.yaml", "no_such_option"), ("none.yaml", "none.yaml")):
        with pytest.raises(SystemExit):
            main(["quickstart", "--out", str(tmp_path / "out"), "--config", str(tmp_path / layer)])
        assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_layers_of_the_quickstart_come_behind_its_own(monkeypatch, tmp_path):
    asked = []

    def noted(args):
        asked.append([args[0], *(Path(args[i + 1]).name for i, word in enumerate(args) if word == "--config")])
        trainer = SimpleNamespace(callback_metrics={"val/pass1": 0.5}, global_step=40)
        return SimpleNamespace(trainer=trainer, datamodule=SimpleNamespace(validation_prompts=9))

    monkeypatch.setattr(quickstart, "run_command", noted)
    monkeypatch.setattr(quickstart.credit, "of_run", lambda folder: None)
    quickstart.run(tmp_path, quickstart.parser().parse_args(["--config", "conf/engine/vllm.yaml"]))
    assert asked == [
        ["sft", "quickstart_sft.yaml"],
        *([command, "quickstart.yaml", "vllm.yaml"] for command in ("validate", "fit", "validate")),
    ]
