"""Where steps end in a text, and which tokens belong to them."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from prime_lightning.models.steps import StepRule, steps_of_tokens
from prime_lightning.prompts.arithmetic import build_tokenizer

RULES = [
    StepRule(rule="newline"),
    StepRule(),
    StepRule(rule="text", separator=";"),
    StepRule(rule="regex", separator=r"\d\."),
]
TEXTS = st.text(alphabet="ab;\n\t 1.", max_size=30)


@pytest.mark.parametrize("rule", RULES, ids=lambda r: r.rule)
@given(text=TEXTS)
def test_every_character_is_in_one_step_and_no_step_is_blank(rule, text):
    spans = rule.spans(text)
    assert "".join(text[a:b] for a, b in spans) == text
    assert all(text[a:b].strip() for a, b in spans) or len(spans) == 1


@given(text=TEXTS)
def test_lines_are_the_lines_that_are_not_blank(text):
    spans = StepRule(rule="newline").spans(text)
    assert [text[a:b].strip() for a, b in spans if text[a:b].strip()] == [
        x.strip() for x in text.split("\n") if x.strip()
    ]


@given(text=st.text(alphabet="a;b", max_size=20))
def test_a_text_ends_each_step_but_perhaps_the_last(text):
    spans = StepRule(rule="text", separator=";").spans(text)
    assert all(text[:b].endswith(";") for _, b in spans[:-1])
    for a, b in spans:  # inside a step, nothing stands behind a separator, but for a leading one
        assert ";" not in text[a:b].strip(";")


@pytest.mark.parametrize(
    ("rule", "steps"),
    [
        (StepRule(), ["One\ntwo.\n \n\n", "Three.\n\n", "Four\n"]),
        (StepRule(rule="newline"), ["One\n", "two.\n \n\n", "Three.\n\n", "Four\n"]),
        (StepRule(rule="regex", separator=r"[.]\s*"), ["One\ntwo.\n \n\n", "Three.\n\n", "Four\n"]),
        (StepRule(rule="text", separator="nothing"), ["One\ntwo.\n \n\nThree.\n\nFour\n"]),
    ],
)
def test_rules_by_example(rule, steps):
    text = "One\ntwo.\n \n\nThree.\n\nFour\n"
    assert [text[a:b] for a, b in rule.spans(text)] == steps


@given(st.lists(st.integers(1, 5), min_size=1, max_size=6), st.lists(st.integers(0, 40), max_size=10))
def test_a_token_belongs_to_the_step_of_its_first_character(lengths, starts):
    ends = [sum(lengths[: i + 1]) for i in range(len(lengths))]
    spans = list(zip([0, *ends[:-1]], ends, strict=True))
    slow = [next((i for i, (a, b) in enumerate(spans) if a <= s < b), len(spans) - 1) for s in starts]
    assert steps_of_tokens(starts, spans) == slow


def test_steps_of_a_text_are_those_of_the_online_prm(warm_model):
    """`PrimeModule.step_ids`, from tokens: any token that contains the separator ends a step."""
    from toys import rollout

    from prime_lightning.models.batch import Batch
    from prime_lightning.training.module import PrimeModule
    from prime_lightning.training.options import ProcessReward

    texts, tokenizer = ["7;4;#4", ";7", "7;", "#4;;4"], build_tokenizer()
    module = PrimeModule(str(warm_model), process_reward=ProcessReward(granularity="step", step_separator=";"))
    module.configure_model()
    batch = Batch.of_groups([[rollout(response=tokenizer(text)["input_ids"])] for text in texts])
    online_BT = module.step_ids(batch)
    for text, online_T in zip(texts[:3:2], online_BT[::2], strict=False):
        spans = StepRule(rule="text", separator=";").spans(text)
        assert steps_of_tokens(range(len(text)), spans) == online_T[: len(text)].tolist()
    assert torch.equal(online_BT[1, :2], torch.tensor([0, 1]))  # there, a separator alone is a step; here it is none
    assert [text for text in texts if len(StepRule(rule="text", separator=";").spans(text)) == 1] == [";7", "7;"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rule": "text"}, "Expected `steps.separator` for the step rule 'text', got none"),
        ({"rule": "newline", "separator": ";"}, "Expected no `steps.separator` for the step rule 'newline'"),
        ({"rule": "regex", "separator": "("}, "Expected a regular expression in `steps.separator`, got '\\('"),
        ({"rule": "regex", "separator": "x*"}, "at least one character, got 'x\\*'"),
    ],
)
def test_rules_that_cannot_work_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        StepRule(**options)
