"""What docs/evaluation.md says to type is parsed, and its first command and its YAML are used."""

import re
import shlex

import pytest
import yaml
from real_files import REPOSITORY, write

from prime_lightning.__main__ import main
from prime_lightning.cli.commands import contamination
from prime_lightning.cli.commands import evaluate as command
from prime_lightning.evaluation.benchmark import benchmark_names
from prime_lightning.prompts.difficulty import ByDifficulty

TEXT = (REPOSITORY / "docs" / "evaluation.md").read_text()
COMMANDS = [
    shlex.split(line)[1:]
    for block in re.findall(r"```bash\n(.*?)```", TEXT, re.DOTALL)
    for line in block.strip().splitlines()
]


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_commands_parse(words, monkeypatch, capsys):
    monkeypatch.chdir(REPOSITORY)
    if words[0] == "evaluate":
        parsed = command.parser().parse_args(words[1:])
        assert set(parsed.benchmark) <= set(benchmark_names())
    elif words[0] == "data":
        assert contamination.parser().parse_args(words[1:]).benchmarks
    else:
        with pytest.raises(SystemExit) as ended:
            main([*words, "--print_config"])
        assert ended.value.code == 0
        assert "aime2024/avg16" in capsys.readouterr().out


def test_the_first_command_runs(warm_model, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = [str(warm_model) if word == "runs/quickstart/policy" else word for word in COMMANDS[0]]
    words[words.index("--limit") + 1] = "4"
    assert main(words) == 0
    assert (tmp_path / "runs/quickstart/evaluation/results.json").is_file()
    assert "4 x 1 | accuracy" in capsys.readouterr().out


def test_every_benchmark_is_listed():
    assert set(benchmark_names()) <= set(re.findall(r"`(\w+)`", TEXT.partition("## Of a model")[0]))


def test_the_yaml_builds(tmp_path):
    from prime_lightning.cli.lightning_cli import PrimeCLI
    from prime_lightning.sampling.datamodule import RolloutDataModule
    from prime_lightning.training.module import PrimeModule

    layer = yaml.safe_load(re.search(r"```yaml\n(.*?)```", TEXT, re.DOTALL).group(1))
    rows = write(tmp_path / "rows.jsonl", [{"problem": "1+1?", "answer": "2"}])
    layer["data"]["train"]["init_args"]["prompts"]["init_args"]["path"] = rows
    (tmp_path / "layer.yaml").write_text(yaml.safe_dump(layer))
    configs = ["--config", f"{REPOSITORY}/conf/quickstart.yaml", "--config", f"{tmp_path}/layer.yaml"]
    built = PrimeCLI(PrimeModule, RolloutDataModule, configs, run=False)
    assert isinstance(built.datamodule.train, ByDifficulty)
    assert built.datamodule.train.row(0)["answer"] == "2"


def test_linked_files_exist():
    for target in re.findall(r"\]\(([^)#]+)\)", TEXT):
        assert (REPOSITORY / "docs" / target).exists(), target
