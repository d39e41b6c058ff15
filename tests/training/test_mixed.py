"""One run over arithmetic, maths and code rows, each graded by its own verifier, with verdicts counted per source."""

import json
import math
from dataclasses import replace

import tiny

from prime_lightning.prompts.dataset import DatasetPrompts, MixedPrompts, Template
from prime_lightning.rollout import Prompt
from prime_lightning.training.options import Probe

MATHS = [{"problem": "Half of 3?", "answer": r"\frac{3}{2}"}, {"problem": "2^10?", "answer": "1024"}]
CODE = [
    {
        "prompt": "Write a function triple(x) that gives three times x.",
        "entry_point": "triple",
        "tests": ["assert triple(2) == 6", "assert triple('a') == 'aaa'"],
        "setup": "",
        "reference_solution": "def triple(x):\n    return 3 * x\n",
    }
]
RIGHT = {
    "maths": lambda p: f"It is \\boxed{{{p.answer}}}.",
    "code": lambda p: f"```python\n{p.row['reference_solution']}```",
    "arithmetic": lambda p: f"#{p.answer}",
}
HALF = {"code": "```python\ndef triple(x):\n    return x + x + x if isinstance(x, int) else ''\n```"}


class Tutored(tiny.HFEngine):
    """The random model's completions, but one of each group is right, and one program passes half of its tests."""

    def stream(self, prompts, sampling, finished=None):
        for prompt, completions in super().stream(prompts, sampling, finished):
            completions[0] = self.say(completions[0], RIGHT[prompt.source](prompt))
            if prompt.source in HALF:
                completions[1] = self.say(completions[1], HALF[prompt.source])
            yield prompt, completions

    def say(self, completion, text):
        tokens = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return replace(
            completion,
            text=text,
            token_ids=tokens,
            logprobs=[-1.0] * len(tokens),
            versions=[self.version] * len(tokens),
        )


def test_three_kinds_in_one_run(chat_model, tmp_path, monkeypatch):
    monkeypatch.setattr("prime_lightning.training.passes.ENGINE_GAP", math.inf)  # a tutor's words are not the policy's
    paths = {}
    for name, rows in (("maths", MATHS), ("code", CODE)):
        paths[name] = tmp_path / f"{name}.jsonl"
        paths[name].write_text("".join(json.dumps(row) + "\n" for row in rows))
    mixed = MixedPrompts(
        [
            tiny.ArithmeticPrompts(seed=1, operations=2),
            DatasetPrompts(str(paths["maths"]), kind="math", source="maths"),
            DatasetPrompts(str(paths["code"]), kind="code", source="code", template=Template(user="{prompt}")),
        ],
        weights=[2, 1, 1],
    )
    rollouts = tiny.data(chat_model, train=mixed, engine=Tutored(), prompts_per_batch=8)
    history = tiny.fit(tmp_path, tiny.module(chat_model, probe=Probe(every=None)), rollouts, 1)
    (row,) = history.rows
    assert row["verdict/arithmetic/correct"] == 4  # four of eight prompts, one right answer each
    assert row["verdict/arithmetic/wrong"] == 12
    assert row["verdict/maths/correct"] == row["verdict/code/correct"] == row["verdict/code/partial"] == 2
    assert row["verdict/maths/wrong"] == 6
    assert row["rollout/unknown"] == 0
    batch = history.outputs[0].batch
    scores = {r.prompt.source: [] for r in batch.rollouts}
    for rollout in batch.rollouts:
        assert isinstance(rollout.prompt, Prompt)
        scores[rollout.prompt.source].append(rollout.verdict.score)
    assert scores["code"][:4] == [1.0, 0.5, 0.0, 0.0]  # the share of tests passed is the label
