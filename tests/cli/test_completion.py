"""What a shell offers, asked of a real bash; and that nothing that a command takes is left out."""

import os
import pty
import select
import shutil
import subprocess
import time

import pytest

from prime_lightning.__main__ import main
from prime_lightning.cli.commands import COMMANDS, LIGHTNING
from prime_lightning.cli.commands.completion import whole


@pytest.fixture(scope="module")
def tree():
    """The parsers of all commands by name."""
    (below,) = [action.choices for action in whole()._actions if isinstance(action.choices, dict)]
    return below


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    """The file that `prime-lightning completion bash` prints."""
    with pytest.MonkeyPatch.context() as patch:
        printed = []
        patch.setattr("builtins.print", lambda *words, **_: printed.append(" ".join(map(str, words))))
        assert main(["completion", "bash"]) == 0
    file = tmp_path_factory.mktemp("bash") / "prime-lightning"
    file.write_text("\n".join(printed) + "\n")
    return file


@pytest.fixture
def offered(script, tmp_path):
    """What bash offers behind the last word of a line."""

    def of(line):
        words = line.split(" ")
        array = " ".join(f"'{word}'" for word in words)
        asked = (
            f"source '{script}'; COMP_WORDS=({array}); COMP_CWORD={len(words) - 1}\n"
            "ask=$(complete -p prime-lightning); ask=${ask#*-F }; ${ask%% *} prime-lightning "
            f"'{words[-1]}' '{words[-2]}'; printf '%s\\n' \"${{COMPREPLY[@]}}\""
        )
        ended = subprocess.run(["bash", "-c", asked], cwd=tmp_path, capture_output=True, text=True, check=True)
        return set(ended.stdout.split())

    return of


@pytest.mark.parametrize(
    ("line", "among", "never"),
    [
        ("prime-lightning ", {"fit", "sft", "evaluate", "completion"}, {"--model.policy"}),
        ("prime-lightning ev", {"evaluate"}, {"fit"}),
        ("prime-lightning fit --model.policy_loss.cl", {"--model.policy_loss.clip_low"}, {"--model.policy"}),
        ("prime-lightning fit --model.process_reward.update ", {"before", "after", "none"}, {"fit"}),
        ("prime-lightning sft --data.", {"--data.lessons"}, {"--data.sampling.samples"}),
        ("prime-lightning plan --", {"--gpu-memory", "--model.policy", "--config"}, set()),
        ("prime-lightning evaluate --benchmark ", {"math500", "aime2024"}, set()),
        ("prime-lightning data ", {"check"}, {"fit"}),
        ("prime-lightning data check --", {"--field", "--share"}, set()),
        ("prime-lightning completion ", {"bash", "zsh"}, set()),
    ],
)
def test_bash_offers_what_comes_next(line, among, never, offered):
    found = offered(line)
    assert among <= found
    assert not never & found


def test_a_value_that_cannot_be_listed_is_a_file(offered, tmp_path):
    (tmp_path / "layer.yaml").touch()
    assert offered("prime-lightning fit --config lay") == {"layer.yaml"}


def test_every_command_completes_every_option(tree, request):
    assert tree.keys() == LIGHTNING.keys() | COMMANDS.keys()
    golden = request.path.parents[1] / "golden" / "options.txt"
    given = {word.removeprefix("--") for action in tree["fit"]._actions for word in action.option_strings}
    assert set(golden.read_text().split()) - given == {"data.model"}  # which is always `model.policy`


@pytest.fixture(scope="module")
def typed(tmp_path_factory):
    """What an interactive zsh shows when a line and two tabs are typed."""
    folder = tmp_path_factory.mktemp("zsh")
    with pytest.MonkeyPatch.context() as patch:
        printed = []
        patch.setattr("builtins.print", lambda *words, **_: printed.append(" ".join(map(str, words))))
        assert main(["completion", "zsh"]) == 0
    (folder / "_prime-lightning").write_text("\n".join(printed) + "\n")
    ready = f"stty columns 200; PS1='> '; LISTMAX=1000; fpath=({folder} $fpath); autoload -U compinit; compinit -D -u"

    def of(line):
        child, terminal = pty.fork()
        if child == 0:
            os.execvpe("zsh", ["zsh", "-f", "-i"], os.environ | {"TERM": "dumb"})
        os.write(terminal, f"{ready}; print re''ady\n".encode())
        shown_until("ready", terminal)
        os.write(terminal, f"{line}\t\t".encode())
        found = shown_until("\n> ", terminal)
        os.close(terminal)  # which hangs up
        os.waitpid(child, 0)
        return found

    return of


def shown_until(text, terminal, seconds=30.0):
    """What a terminal shows until it shows this."""
    shown, end = "", time.monotonic() + seconds
    while text not in shown and time.monotonic() < end:
        if select.select([terminal], [], [], 0.1)[0]:
            shown += os.read(terminal, 65536).decode(errors="replace").replace("\r", "")
    return shown


@pytest.mark.skipif(not shutil.which("zsh"), reason="needs zsh")
@pytest.mark.parametrize(
    ("line", "among"),
    [
        ("prime-lightning ", ["completion", "train by PRIME"]),
        (
            "prime-lightning fit --model.policy_loss.cl",
            ["--model.policy_loss.clip_high", "--model.policy_loss.clip_low"],
        ),
        ("prime-lightning fit --model.process_reward.update ", ["after", "before", "none"]),
        ("prime-lightning evaluate --benchmark ", ["aime2024", "svamp"]),
    ],
)
def test_zsh_offers_what_comes_next(line, among, typed):
    shown = typed(line)
    assert all(word in shown for word in among), shown
    assert "None" not in shown  # an option without a description has none
