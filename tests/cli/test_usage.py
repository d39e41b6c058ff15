"""Mistakes on the command line and in files: a few lines that say what, where, and what comes near."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from prime_lightning.__main__ import main
from prime_lightning.cli.lightning_cli import PrimeCLI, lightning
from prime_lightning.cli.usage import accepted_by, line_of, place_of
from prime_lightning.sampling.datamodule import RolloutDataModule
from prime_lightning.training.module import PrimeModule

CONF = Path(__file__).parents[2] / "conf"
FIT = ["fit", "--config", str(CONF / "quickstart.yaml")]
ENGINE = "data: {{engine: {{class_path: prime_lightning.engines.hf.HFEngine, init_args: {{{}}}}}}}"

MISTAKES = [
    (["--model.polcy", "x"], r"`model.polcy` is no option .* \(on the command line\)", "`model.policy`"),
    (["--trainer.max_stepz", "3"], "`trainer.max_stepz` is no option", "`trainer.max_steps`"),
    (["--data.sampling.sample=3"], "`data.sampling.sample` is no option", "`data.sampling.samples`"),
    (["--model.policy_update.mini_batches=2"], "mini_batches", "`model.policy_update.minibatches`"),
    (["--data.prompts=4"], "`data.prompts` is no option", "`data.prompts_per_batch`"),
    (["--modle.policy=x"], "`modle.policy` is no option", "`model.policy`"),
    (["--loading.packed=true"], "`loading.packed` is no option", "`model.loading.packed`"),
    (["--seed=3"], "`seed` is no option", "seed"),
    (
        ["--data.prompts_per_batch=two"],
        r"`data.prompts_per_batch` \(on the command line\): Expected .*int",
        "--help data",
    ),
    (["--model.process_reward.update=later"], "`model.process_reward.update`", "--help model"),
    (["--data.engine=vllm"], "`data.engine`", "--help data"),
    (["--data.engine.init_args.batch_sise=3"], "`batch_sise` is no option of .*HFEngine", "`batch_size`"),
    (["--config", "nowhere.yaml"], "nowhere.yaml", "--help"),
    (["--config", "data: {sampling: {sample: 3}}"], r"data.sampling.*sample.*layer\.yaml", ""),
    (["--config", "model:\n  polcy: x\n"], r"`model.polcy` is no option .*layer\.yaml, line 2\)", "`model.policy`"),
    (["--config", ENGINE.format("batch_sise: 3")], r"batch_sise.*layer\.yaml, line 1\)", "`batch_size`"),
    (["--config", "trainer: {max_steps: many}"], r"`trainer.max_steps` \(.*layer\.yaml, line 1\)", "--help trainer"),
    (["--config", "model: [1, 2"], r"layer\.yaml", ""),
    (
        ["--config", "data: {engine: {class_path: prime_lightning.vllm.VLLMEngine}}"],
        r"prime_lightning\.vllm\.VLLMEngine",
        "`VLLMEngine` is prime_lightning.engines.vllm.VLLMEngine.",
    ),
    (
        ["--model.policy_loss.surrogate=prime_lightning.algorithms.gsp"],
        "surrogate",
        "`prime_lightning.algorithms.gspo`",
    ),
    (
        ["--config", "trainer: {callbacks: [{class_path: prime_lightning.training.callbacks.RolloutLogs}]}"],
        r"`trainer.callbacks` .*: Problem with given class_path 'prime_lightning.training.callbacks.RolloutLogs'",
        "Did you mean `prime_lightning.training.callbacks.RolloutLog`?",
    ),
    (["--model.advantage=prime_lightning.rloo"], "`model.advantage`", "`rloo` is prime_lightning.algorithms.rloo."),
]
OTHERS = [
    (["plan", "--gpus", "none"], "gpus", "plan --help"),
    (["quickstart", "--iteration", "3"], "`iteration` is no option", "`iterations`"),
    (["report"], "required", "report --help"),
    (["evaluate", "--modle", "x"], "modle", ""),
    (["score", "--prm.folders", "x"], "prm.folders", ""),
    (["export", "--ckpt"], "ckpt", "export --help"),
    (["verify", "--knd", "math"], "knd", ""),
    (
        ["processbench", "--data", "x.jsonl", "--out", "x.json"],
        "`data` is no option",
        "Expected --input and --prm.folder, got none.",
    ),
]


def said(arguments, capsys):
    try:
        status = main(arguments)
    except SystemExit as ended:
        status = ended.code
    assert status == 2
    return capsys.readouterr().err


@pytest.mark.parametrize(("arguments", "words", "hint"), MISTAKES, ids=lambda x: str(x)[:40])
def test_a_mistake_in_fit_is_six_lines_with_a_hint(arguments, words, hint, tmp_path, capsys):
    if arguments[0] == "--config" and "{" in arguments[1] + "{" * (":" in arguments[1]):
        (tmp_path / "layer.yaml").write_text(arguments[1])
        arguments = ["--config", str(tmp_path / "layer.yaml")]
    text = said([*FIT, *arguments], capsys)
    assert re.search(words, text, re.DOTALL), text
    assert hint in text
    assert text.count("\n") <= 6, text


@pytest.mark.parametrize(("arguments", "words", "hint"), OTHERS, ids=lambda x: str(x)[:40])
def test_a_mistake_in_another_command(arguments, words, hint, capsys):
    text = said(arguments, capsys)
    assert words in text
    assert hint in text
    assert text.count("\n") <= 6, text


def test_a_mistake_in_a_script_that_calls_fit(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["mine.py", "--mine=3"])
    with pytest.raises(SystemExit):
        lightning([*FIT, "--model.polcy", "x"])
    text = capsys.readouterr().err
    assert "`model.polcy` is no option of `prime-lightning fit`" in text
    assert "`prime-lightning fit --help model` lists the options." in text


def test_help_of_one_group(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["fit", "--help", "data"])
    text = capsys.readouterr().out
    assert not ended.value.code
    assert "--data.prompts_per_batch" in text
    assert "--model" not in text
    with pytest.raises(SystemExit):
        main(["fit", "--help", "date"])
    assert "There are" in capsys.readouterr().err


def test_the_place_of_an_option(tmp_path):
    early, late = tmp_path / "early.yaml", tmp_path / "late.yaml"
    early.write_text("model:\n  policy: x\n  loading:\n    packed: true\n")
    late.write_text("# nothing\nmodel: {policy: y}\n")
    layers = ["fit", "--config", str(early), f"--config={late}"]
    assert line_of("model.loading.packed", str(early)) == 4
    assert line_of("model.loading.dtype", str(early)) is None
    assert place_of("model.policy", layers) == f" ({late}, line 2)"  # the last one wins, there as here
    assert place_of("model.loading.packed", layers) == f" ({early}, line 4)"
    assert place_of("model.policy", [*layers, "--model.policy=z"]) == " (on the command line)"
    assert place_of("model.prm", layers) == ""


@pytest.mark.parametrize("words", [["--help"], ["--version"], ["fitt"]])
def test_help_versions_and_misspelt_commands_import_nothing_heavy(words):
    code = (
        "import sys; from prime_lightning.__main__ import main; main(sys.argv[1:]); "
        "print(*sorted({name.split('.')[0] for name in sys.modules}), file=sys.stderr)"
    )
    ran = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=True)
    heavy = {
        "torch",
        "lightning",
        "transformers",
        "numpy",
        "jsonargparse",
        "omegaconf",
        "yaml",
        "sympy",
        "datasets",
        "vllm",
    }
    assert not heavy & set(ran.stderr.splitlines()[-1].split())


def test_planning_imports_neither_data_sets_nor_vllm():
    heavy = "{'datasets', 'vllm', 'deepspeed', 'evaluate'}"
    code = f"import sys, prime_lightning.cli.commands.plan; print({heavy} & set(sys.modules))"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout == "set()\n"


def test_printing_a_configuration_imports_nothing_that_only_a_run_needs(tmp_path):
    code = (
        "import sys; from prime_lightning.__main__ import main\n"
        "try: main(sys.argv[1:])\n"
        "finally: print(*sorted(sys.modules), file=sys.stderr)"
    )
    words = [sys.executable, "-c", code, *FIT, "--print_config"]
    ran = subprocess.run(words, capture_output=True, text=True, check=True)
    loaded = set(ran.stderr.splitlines()[-1].split())
    heavy = {"datasets", "pandas", "pyarrow", "evaluate", "peft", "vllm", "deepspeed", "math_verify", "plotly", "wandb"}
    heavy |= {"prime_lightning.engines.vllm.engine", "transformers.trainer"}
    assert "prime_lightning.evaluation.callback" in loaded  # which quickstart.yaml names
    assert not heavy & loaded
    assert "prime_lightning.evaluation.callback.Benchmarks" in ran.stdout


class OnlyParsed(PrimeCLI):
    def instantiate_classes(self):
        pass

    def _run_subcommand(self, subcommand):
        pass


@pytest.mark.parametrize("command", ["fit", "validate"])
def test_only_the_command_that_was_asked_for_gets_a_parser(command):
    cli = OnlyParsed(PrimeModule, RolloutDataModule, [command, *FIT[1:]])
    assert cli.subcommand == command
    assert set(cli._subcommand_parsers) == {command}


def test_versions_name_what_a_report_needs(capsys):
    assert main(["--version"]) == 0
    text = capsys.readouterr().out
    assert all(
        re.search(rf"^{name} (\S+)", text, re.MULTILINE) for name in ("prime-lightning", "python", "torch", "vllm")
    )
    assert "NVIDIA driver" in text


def test_options_that_a_class_hands_on_to_its_parent_are_its_own():
    names = accepted_by("prime_lightning.prompts.EurusPrompts")
    assert {"path", "columns", "answer_pattern"} <= {*names}
    assert "options" not in names
