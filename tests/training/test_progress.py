"""Bars on a terminal and lines elsewhere, of real runs; and the steps that a bar counts to."""

import io
import logging
import re
import sys
import threading

import lightning.pytorch as pl
import pytest
import tiny

from prime_lightning.evaluation.callback import Benchmarks
from prime_lightning.prompts.arithmetic import ArithmeticPrompts
from prime_lightning.rollout import Sampling
from prime_lightning.training.callbacks import heartbeat
from prime_lightning.training.callbacks.progress import PrimeProgress, _number, _total


class Terminal(io.StringIO):
    def isatty(self):
        return True


def run(tmp_path, model, steps, *callbacks, validate=False):
    rollouts = tiny.data(
        model,
        validation=ArithmeticPrompts(seed=7, operations=2),
        validation_sampling=Sampling(samples=1, max_tokens=8),
        validation_prompts=8,
        max_staleness=int(validate),
    )
    options = {"enable_progress_bar": True, "val_check_interval": 2, "check_val_every_n_epoch": None}
    trainer = tiny.trainer(tmp_path, steps, PrimeProgress(), *callbacks, **options)
    trainer.fit(tiny.module(model), rollouts)
    if validate:
        trainer.validate(trainer.lightning_module, rollouts, verbose=False)


def test_a_terminal_sees_bars_of_all_phases(model_folder, tmp_path, monkeypatch, capsys):
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    for name, value in {"TERM": "xterm-256color", "COLUMNS": "80"}.items():
        monkeypatch.setenv(name, value)
    draw = PrimeProgress._open

    def eagerly(self, *args):
        """Draws at each change of phase, as a slow run would be seen at ten frames a second."""
        draw(self, *args)
        self._bar.live.auto_refresh = False

    monkeypatch.setattr(PrimeProgress, "_open", eagerly)
    from prime_lightning.sampling.acceptance import Tally
    from prime_lightning.training.stepping import Stepper

    bars = []
    opened = PrimeProgress._open
    monkeypatch.setattr(PrimeProgress, "_open", lambda self, *a: (opened(self, *a), bars.append(self._bar))[0])
    for kind in (Tally, Stepper):
        original = kind.timed

        def timed(self, phase, original=original):
            context = original(self, phase)

            class Drawn:
                def __enter__(self):
                    context.__enter__()
                    bars[-1].refresh()

                def __exit__(self, *error):
                    return context.__exit__(*error)

            return Drawn()

        monkeypatch.setattr(kind, "timed", timed)
    handler = logging.StreamHandler(screen)
    monkeypatch.setattr(logging.getLogger("lightning.pytorch"), "handlers", [handler])
    run(tmp_path, model_folder, 2, Benchmarks(str(tmp_path), ["arithmetic"], limit=4, after=False))
    shown = screen.getvalue()
    phases = ("sampling", "verifying", "scoring", "training the PRM", "training the policy", "sending weights")
    for words in (*phases, "2/2"):
        assert words in shown, words
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown)
    assert re.search(r"iteration [^\n]*━[^\n]* 1/2", plain)  # on a narrow terminal, too
    assert re.search(r"evaluating [^\n]*1/2", plain)
    assert re.search(r"evaluating arithmetic [^\n]*/4", plain)
    assert shown.index("`Trainer.fit` stopped") < shown.rindex("iteration")  # above the bars, not through them
    assert handler.stream is screen
    assert "\x1b[?25h" in shown.split("training the policy")[-1]  # the cursor is given back
    assert "iteration 1/" not in capsys.readouterr().out


def test_a_log_file_gets_one_line_an_iteration(model_folder, tmp_path, capsys):
    run(tmp_path, model_folder, 4, validate=True)
    said = capsys.readouterr()
    lines = said.out.splitlines()
    assert [line.split()[1] for line in lines if line.startswith("iteration")] == ["1/4", "2/4", "3/4", "4/4"]
    assert [line.split()[3] for line in lines if line.startswith("evaluated")] == ["2", "4"]
    assert all("rollout/accuracy" in line and "s left" in line for line in lines if line.startswith("iteration"))
    assert "\x1b" not in said.out


def test_a_log_file_is_never_silent_for_long(model_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(heartbeat, "SECONDS", 0.005)  # several to a phase
    run(tmp_path, model_folder, 2, validate=True)
    lines = [line for line in capsys.readouterr().out.splitlines() if re.match(r"iteration \d/2: ", line)]
    assert any(re.search(r": (sampling|verifying|scoring|training|sending)", line) for line in lines)
    assert not [thread for thread in threading.enumerate() if thread.name == "heartbeat"]


def test_numbers_are_short_and_without_needless_exponents():
    assert [_number(x) for x in (0.93014, 18979.6, 1e-7, 2.0)] == ["0.9301", "18,980", "1e-07", "2"]


@pytest.mark.parametrize(
    ("max_steps", "max_epochs", "batches", "expected"),
    [
        (100, 1, 100, 100),
        (30, 1, 100, 30),
        (-1, 3, 100, 300),
        (50, -1, 100, 50),
        (50, -1, float("inf"), 50),
        (-1, -1, 9, 0),
    ],
)
def test_the_progress_bar_knows_where_it_ends(tmp_path, max_steps, max_epochs, batches, expected):
    options = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "default_root_dir": tmp_path}
    trainer = pl.Trainer(max_steps=max_steps, max_epochs=max_epochs, **options)
    trainer.fit_loop.max_batches = batches
    assert _total(trainer) == expected
