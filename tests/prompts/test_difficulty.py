"""The order that passes over problems that were too easy: how often, in a real run, and after a resume."""

import pytest
import tiny
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from toys import write_jsonl

from prime_lightning.prompts.dataset import DatasetPrompts, MixedPrompts, Template
from prime_lightning.prompts.difficulty import ByDifficulty


def rows(tmp_path, count=8):
    chains = tiny.ArithmeticPrompts(seed=1, operations=2)
    path = write_jsonl(tmp_path / "rows.jsonl", [dict(chains.row(i)) for i in range(count)])
    return DatasetPrompts(path, kind="exact", template=Template(user="{problem}", chat=False))


def test_easy_and_hopeless_problems_come_back_at_the_given_share(tmp_path):
    source = rows(tmp_path)
    order = ByDifficulty(source, easy=0.9, hopeless=0.0, keep=0.25, seed=3)
    for draw, pass_rate in enumerate((1.0, 1.0, 0.95, 0.5, 0.25, 0.0, 0.75, 0.01)):
        order.learn(draw, [pass_rate])
    rate = {source.place(d): p for d, p in enumerate((1.0, 1.0, 0.95, 0.5, 0.25, 0.0, 0.75, 0.01))}
    taken = [source.place(draw) for draw in range(8, 8 * 1001) if order.wanted(draw)]
    for row, pass_rate in rate.items():
        expected = 250 if pass_rate >= 0.9 or pass_rate <= 0.0 else 1000
        assert taken.count(row) == pytest.approx(expected, abs=45)  # three deviations of a binomial are 41


def test_what_was_learnt_last_counts_and_is_restored(tmp_path):
    order = ByDifficulty(rows(tmp_path), keep=1e-9)
    order.learn(0, [1.0, 1.0])
    order.learn(0, [])  # nothing known
    again = 8 + next(d for d in range(8) if order.prompts.place(8 + d) == order.prompts.place(0))
    assert not order.wanted(again)
    restored = ByDifficulty(rows(tmp_path), keep=1e-9)
    restored.load_state_dict(order.state_dict())
    assert [restored.wanted(d) for d in range(32)] == [order.wanted(d) for d in range(32)]
    order.learn(again, [1.0, 0.0])
    assert order.wanted(0)


def test_in_a_mixture_each_source_keeps_its_own_history(tmp_path):
    def mixed():
        return MixedPrompts([tiny.ArithmeticPrompts(seed=2, operations=2), ByDifficulty(rows(tmp_path), keep=1e-9)])

    order, restored = mixed(), mixed()
    for draw in range(16):  # both sources take turns
        order.learn(draw, [1.0])
    assert [order.wanted(draw) for draw in range(16, 20)] == [True, False, True, False]
    restored.load_state_dict(order.state_dict())
    assert [restored.wanted(draw) for draw in range(16, 48)] == [order.wanted(draw) for draw in range(16, 48)]


def test_around_a_mixture_each_problem_has_its_own_history(tmp_path):
    def around():
        return ByDifficulty(MixedPrompts([rows(tmp_path, 3), rows(tmp_path, 3)], weights=[1, 2]), keep=1e-9)

    order, restored = around(), around()
    for draw, pass_rate in enumerate((1.0, 1.0, 0.5)):  # of the second source, the first, the second
        order.learn(draw, [pass_rate])
    easy = {order.prompts.place(0), order.prompts.place(1)}
    assert len(easy) == 2
    restored.load_state_dict(order.state_dict())
    for draw in range(9, 36):
        assert order.wanted(draw) == (order.prompts.place(draw) not in easy) == restored.wanted(draw)
    assert order.parts() == order.prompts.parts()  # whose references are checked before training
    assert order.source == "rows + rows"


@pytest.mark.parametrize("wrong", [{"keep": 0}, {"keep": 1.5}, {"easy": 0.5, "hopeless": 0.5}])
def test_mistakes(wrong):
    with pytest.raises(ValueError, match="Expected 0 < keep <= 1 and hopeless < easy"):
        ByDifficulty(tiny.ArithmeticPrompts(), **wrong)


def test_a_real_run_passes_problems_over_and_resumes_with_the_next_one(warm_model, tmp_path):
    def run(steps, *callbacks, ckpt=None):
        history = tiny.History()
        data = tiny.data(warm_model, train=ByDifficulty(rows(tmp_path), easy=0.5, keep=0.1), prompts_per_batch=2)
        torch.manual_seed(0)
        trainer = tiny.trainer(tmp_path, steps, *callbacks, history=history)
        trainer.fit(tiny.module(warm_model), data, ckpt_path=ckpt)
        return history

    whole = run(8)
    assert sum(row.get("rollout/passed_over", 0) for row in whole.rows) > 0
    run(5, ModelCheckpoint(tmp_path, "five", every_n_train_steps=5))
    rest = run(8, ckpt=str(tmp_path / "five.ckpt"))
    assert rest.rows == whole.rows[5:]
