"""Step-level AUC where the truth of each step is known."""

import json

import pytest
from prm_rows import CHAINS, labelled_rows

from prime_lightning.prm import ImplicitPRM
from prime_lightning.prm.credit import STEPS, held_out, of_run, online, step_auc, summary
from prime_lightning.prompts.arithmetic import DIGITS, step_truth


def slow_auc(rewards, truths):
    pairs = [(r, t) for rs, ts in zip(rewards, truths, strict=True) for r, t in zip(rs, ts, strict=False)]
    right, wrong = [r for r, t in pairs if t], [r for r, t in pairs if not t]
    return sum((a > b) + (a == b) / 2 for a in right for b in wrong) / (len(right) * len(wrong))


def test_step_auc_compares_all_right_with_all_wrong_steps(prm_run):
    problems = [f"^{DIGITS[a]}+{b}*{b}=" for a in range(10) for b in (1, 2, 7)]
    answers = ["7;4;#4" if i % 2 else "3;9;#9" for i in range(len(problems))]
    prm = ImplicitPRM.from_pretrained(prm_run / "prm")
    rewards = [one.step_rewards for one in prm.score(problems, answers, steps=STEPS)]
    truths = [step_truth(p, a, CHAINS) for p, a in zip(problems, answers, strict=True)]
    found = step_auc(rewards, truths)
    assert found["auc"] == pytest.approx(slow_auc(rewards, truths))
    assert found["steps"] == 2 * len(problems)
    assert found["wrong_steps"] == sum(t.count(False) for t in truths)
    assert step_auc([[0.1, 0.2]], [[True, True]])["auc"] is None


def test_a_prm_that_learned_outcomes_blames_wrong_steps_of_problems_it_never_saw(prm_run, warm_model):
    prm, rows = ImplicitPRM.from_pretrained(prm_run / "prm"), list(labelled_rows(100, 1, seed=99))
    scored = prm.score([row["prompt"] for row in rows], [row["response"] for row in rows], steps=STEPS)
    found = step_auc([s.step_rewards for s in scored], [step_truth(r["prompt"], r["response"], CHAINS) for r in rows])
    assert found["wrong_steps"] > 20
    assert found["auc"] > 0.8
    other = held_out(prm, str(warm_model), problems=50, operations=2)  # mistakes of another kind
    assert other["steps"] >= 50
    assert other["wrong_steps"] > 0


def test_the_log_of_a_run_gives_its_own_rewards(prime_run):
    rows = [json.loads(line) for line in (prime_run / "rollouts.jsonl").read_text().splitlines()]
    rewards, truths = [], []
    for row in rows:  # one token a character here, and steps are "d;"
        written = [i for i, token in enumerate(row["tokens"]) if token == ";"]
        starts = [0, *(i + 1 for i in written)]
        rewards.append([sum(row["process_reward"][a : b + 1]) for a, b in zip(starts, written, strict=False)])
        truths.append(step_truth(row["prompt"], row["completion"], CHAINS))
    kept = [(r, t) for r, t, row in zip(rewards, truths, rows, strict=True) if ";;" not in row["completion"]]
    assert len(kept) > 0.9 * len(rows)
    found = online(prime_run / "rollouts.jsonl", CHAINS)
    assert found["steps"] >= sum(len(t) for _, t in kept)
    if len(kept) == len(rows):
        assert found["auc"] == pytest.approx(slow_auc(rewards, truths))


def test_a_run_is_told_of_in_three_lines(prime_run, warm_model, tmp_path):
    for name in ("prm", "policy", "rollouts.jsonl"):
        (tmp_path / name).symlink_to(prime_run / name)
    (tmp_path / "warm").mkdir()
    (tmp_path / "warm" / "policy").symlink_to(warm_model)
    found = of_run(tmp_path)
    assert {name: set(one) for name, one in found.items()} == {
        name: {"auc", "steps", "wrong_steps"} for name in ("online", "trained_policy", "warm_start")
    }
    assert [
        f"{one['steps']:,} steps" in line
        for one, line in zip(found.values(), summary(found).splitlines()[1:], strict=True)
    ]
