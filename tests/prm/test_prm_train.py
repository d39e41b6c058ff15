"""Offline training: each loss against a plain one, what validation measures, resuming, and files that cannot work."""

import copy
import csv
import re

import lightning.pytorch as pl
import pytest
import tiny
import torch
from prm_rows import labelled_rows, train_prm
from test_prm_scoring import slow_logprobs
from toys import write_jsonl

from prime_lightning import algorithms as alg
from prime_lightning.prm import ImplicitPRM
from prime_lightning.prm.responses import read_rollouts
from prime_lightning.prm.train import LabelledDataModule, PRMModule
from prime_lightning.training.options import Update

LOSSES = [alg.ce, alg.dpo, alg.kto, alg.nca]
every_loss = pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.__name__)


def data(model, path, **options):
    return LabelledDataModule(str(model), path, **({"prompts_per_batch": 8, "validation_share": 0.2} | options))


def module(model, lr=2e-3, **options):
    return PRMModule(str(model), optimizer=tiny.adam(lr), beta=0.5, **options)


def fit(folder, prm, rows, steps, **options):
    history = tiny.History()
    trainer = tiny.trainer(folder, steps, history=history, callbacks=[], val_check_interval=1.0, **options)
    trainer.fit(prm, rows)
    return [row for row in history.rows if "loss" in row], trainer


@every_loss
def test_the_first_loss_is_that_of_the_untrained_rewards(loss, sharp_folder, warm_model, labelled, tmp_path):
    rows = data(warm_model, labelled, prompts_per_batch=4)
    rows.setup("fit")
    update = Update(minibatches=1, micro_tokens=150)
    prm = module(warm_model, reference=sharp_folder, prm_loss=loss, update=update, warmup=0.0)
    logged, trainer = fit(tmp_path, prm, rows, 1)
    [batch] = [rows.collate([rows.lessons[int(i)] for i in order]) for order in first_order(rows)]
    reward, outcome, group = [], [], []
    for i in range(len(batch)):
        end = int(batch.prompt_length_B[i] + batch.response_length_B[i])
        tokens = batch.tokens_BL[i, :end].tolist()
        head = int(batch.prompt_length_B[i])
        prompt, response = (rows.tokenizer.decode(part) for part in (tokens[:head], tokens[head:-1]))
        both = [slow_logprobs(folder, prompt, response) for folder in (warm_model, sharp_folder)]
        reward.append(0.5 * (sum(both[0]) - sum(both[1])))
        outcome.append(float(batch.outcome_B[i]))
        group.append(prompt)
    number = torch.tensor([sorted(set(group)).index(prompt) for prompt in group])
    total, count = loss(torch.tensor(reward), torch.tensor(outcome), number, torch.ones(len(number)).bool())
    assert logged[0]["loss"] == pytest.approx(float(total / count), rel=1e-4)
    assert trainer.global_step == 1


def first_order(rows):
    from prime_lightning.prompts.dataset import permutation

    yield permutation(len(rows.lessons), rows.seed, 0)[: rows.batch_size]


@pytest.mark.parametrize("loss", LOSSES[1:], ids=lambda loss: loss.__name__)
def test_every_loss_teaches_which_responses_are_right(loss, warm_model, labelled, tmp_path):
    prm, rows = module(warm_model, lr=1e-3, prm_loss=loss), data(warm_model, labelled, prompts_per_batch=16)
    _, trainer = fit(tmp_path, prm, rows, 80, max_epochs=3)
    found = trainer.validate(prm, rows, verbose=False)[0]
    assert found["val/auc"] > 0.75
    assert found["val/pairwise_accuracy"] > 0.7


def auc_of(right, wrong):
    above, level = right[:, None] > wrong[None], (right[:, None] - wrong[None]).abs() < 1e-6
    return float(((above & ~level).float() + level.float() / 2).mean())


def test_validation_measures_what_the_saved_prm_gives(prm_run, labelled, warm_model):
    with (prm_run / "csv" / "version_0" / "metrics.csv").open() as file:
        last = [row for row in csv.DictReader(file) if row["val/auc"]][-1]
    rows = data(warm_model, labelled, seed=0, validation_share=0.1)
    rows.setup("fit")
    held_out = [one for group in rows.validation for one in group]
    prm = ImplicitPRM.from_pretrained(prm_run / "prm")
    scored = prm.score([r.prompt.text for r in held_out], [r.completion.text for r in held_out])
    reward_B, label_B = torch.tensor([s.reward for s in scored]), torch.tensor([r.verdict.score for r in held_out])
    right, wrong = reward_B[label_B == 1], reward_B[label_B == 0]
    assert float(last["val/auc"]) == pytest.approx(auc_of(right, wrong), abs=1e-4)
    assert float(last["val/accuracy"]) == pytest.approx(float(((reward_B > 0) == (label_B == 1)).float().mean()))
    ce = torch.nn.functional.binary_cross_entropy(reward_B.sigmoid(), label_B)
    assert float(last["val/ce"]) == pytest.approx(float(ce), abs=1e-4)
    assert float(last["val/auc"]) > 0.8
    assert not {one.prompt.text for one in held_out} & {one.prompt.text for group in rows.lessons for one in group}


class StopAt(pl.Callback):
    def __init__(self, step, path):
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer, *args):
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)
            trainer.should_stop = True


def test_a_resumed_run_equals_one_that_was_never_stopped(warm_model, labelled, tmp_path):
    def run(steps=4, resume=None, callbacks=()):
        prm = module(warm_model)
        tiny.trainer(tmp_path, steps, callbacks=list(callbacks)).fit(prm, data(warm_model, labelled), ckpt_path=resume)
        return prm.prm.state_dict()

    straight, path = run(), tmp_path / "2.ckpt"
    stopped = run(callbacks=[StopAt(2, path)])
    resumed = run(resume=path)
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in straight.items())
    assert not all(torch.equal(tensor, stopped[name]) for name, tensor in straight.items())


def test_a_runs_rollouts_train_a_prm_that_starts_the_next_run(prime_run, warm_model, tmp_path, capsys):
    assert train_prm(tmp_path, warm_model, prime_run / "rollouts.jsonl", "--data.drop_empty=true") == 0
    assert re.search(r"evaluated after iteration \d+  val/accuracy \S+  val/auc ", capsys.readouterr().out)
    online = tiny.module(warm_model, prm=str(tmp_path / "prm"))
    history = tiny.fit(tmp_path, online, tiny.data(warm_model), 1)
    assert 0 < history.rows[0]["prm/ce"] != pytest.approx(0.693147, abs=1e-4)  # it comes with an opinion
    assert ImplicitPRM.from_pretrained(tmp_path / "prm").config.beta == 0.5


def test_the_columns_of_a_log_are_read(tmp_path):
    log = [
        {"prompt": "1+1=", "completion": "2", "score": 1.0, "verdict": "correct", "finish": "stop", "tokens": ["2"]},
        {"prompt": "1+1=", "completion": "3", "score": None, "verdict": "unknown", "finish": "length", "tokens": ["3"]},
        {"prompt": "2+1=", "completion": "3", "score": 0.25, "verdict": "partial", "finish": "stop", "tokens": ["3"]},
    ]
    rows = read_rollouts(write_jsonl(tmp_path / "log.jsonl", log), labelled=True, only_known_columns=True)
    found = [one for _, [one] in rows]
    said = [(one.verdict.known_score, one.completion.truncated) for one in found]
    assert said == [(1.0, False), (None, True), (0.25, False)]
    assert [one.prompt.draw for one in found] == [0, 0, 1]
    assert [row for row, _ in rows] == log
    several = [{"prompt": [{"role": "user", "content": "1"}], "responses": ["a", "b"], "labels": [1, 0]}]
    [(_, found)] = read_rollouts(write_jsonl(tmp_path / "several.jsonl", several), labelled=True)
    assert [(one.prompt.draw, one.completion.text, one.verdict.score) for one in found] == [
        (0, "a", 1.0),
        (0, "b", 0.0),
    ]
    assert [list(one.prompt.messages) for one in found] == [several[0]["prompt"]] * 2


GOOD = {"prompt": "^1+1=", "response": "2;#2", "label": 1}


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        (
            [{"prompt": "1", "response": "2"}],
            "Expected exactly one of label, labels, score in line 1 of .* got .'prompt', 'response'",
        ),
        ([GOOD | {"label": 2}], "Expected 0 or 1 in `label` of line 1 of .* got 2"),
        ([GOOD | {"label": 0.5}], "Expected 0 or 1 in `label` .* got 0.5"),
        ([GOOD, GOOD | {"label": None}], "Expected 0 or 1 in `label` of line 2 of .* got None"),
        ([{"prompt": "1", "response": "2", "score": 1.5}], r"Expected a number in \[0, 1\], or null, in `score`"),
        ([{"prompt": "1", "responses": ["2", "3"], "labels": [1]}], "one label for each of 2 responses in line 1 of"),
        ([{"prompt": "1", "response": "2", "labels": [1]}], "Expected a list of responses in line 1 of .* got None"),
        ([GOOD | {"rating": 1}], r"Expected only the columns that are read in .* got also \['rating'\]"),
        ([GOOD, GOOD | {"response": ""}], r"Expected no empty responses .* got 1 of 2 \(rows \[1\].*drop_empty"),
        ([GOOD | {"response": ""}], "Expected no empty responses"),
        ([GOOD], "Expected at least one batch of 16 prompts to train on, got 1"),
        ([GOOD | {"prompt": f"^{i}+1="} for i in range(20)], "right and wrong responses to learn from, got only"),
        ([], "Expected rows in .* got an empty file"),
    ],
)
def test_files_that_cannot_be_meant_are_refused(rows, words, warm_model, tmp_path, capsys):
    assert train_prm(tmp_path / "run", warm_model, write_jsonl(tmp_path / "rows.jsonl", rows)) == 2
    said = capsys.readouterr().err
    assert re.search(words, said), said
    assert "Traceback" not in said


def test_what_is_left_out_is_counted_and_pairs_are_missed_aloud(warm_model, tmp_path):
    rows = list(labelled_rows(12, 1))
    rows = [{"prompt": r["prompt"], "response": r["response"], "score": r["label"]} for r in rows]
    rows += [{"prompt": "^1=", "response": "1;" * 60, "score": 1}, {"prompt": "^1=", "response": "1;#1", "score": None}]
    made = data(warm_model, write_jsonl(tmp_path / "rows.jsonl", rows), max_tokens=50, prompts_per_batch=4)
    with pytest.warns(UserWarning, match="Of 14 responses, 1 have no known label and 1 are longer than 50 tokens"):
        made.setup("fit")
    with pytest.warns(UserWarning, match="dpo compares responses to one prompt, but no prompt here has right and"):
        fit(tmp_path, module(warm_model, prm_loss=alg.dpo), copy.copy(made), 1)


def test_the_reference_must_read_the_same_tokens(warm_model, chat_model):
    with pytest.raises(ValueError, match="Expected the reference to have the PRM's tokenizer"):
        module(warm_model, reference=str(chat_model)).configure_model()


def test_extra_columns_can_be_ignored(warm_model, tmp_path):
    rows = [row | {"note": "x"} for row in labelled_rows(8, 2)]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    assert len(data(warm_model, path, extra_columns=True).responses) == len(rows)
