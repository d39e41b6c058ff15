"""A rollout as the line of a file, and back."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prime_lightning.rollout import Completion, Finish, Prompt, Rollout, Verdict

TEXT = st.text(max_size=20)
MESSAGES = st.lists(st.fixed_dictionaries({"role": TEXT, "content": TEXT}), min_size=1, max_size=3)
VERDICTS = st.one_of(
    st.builds(Verdict.of_score, st.sampled_from([0.0, 1.0]) | st.floats(0, 1), reason=TEXT),
    st.builds(Verdict.unknown, TEXT),
)


@st.composite
def rollouts(draw):
    """Of a run, with tokens, or of a file, without."""
    length = draw(st.integers(0, 4))
    given_as_messages = draw(st.none() | MESSAGES)
    prompt = Prompt(
        draw=draw(st.integers(0, 2**40)),
        token_ids=(1,) * draw(st.integers(0, 3)),
        text="" if given_as_messages else draw(TEXT),
        messages=tuple(given_as_messages or ()),
        kind=draw(TEXT),
        answer=draw(TEXT),
        source=draw(TEXT),
        row=draw(st.sampled_from([{}, {"id": 7}, {"id": "a/b", "tests": ["assert f"]}])),
    )
    completion = Completion(
        text=draw(TEXT),
        token_ids=[2] * length,
        logprobs=[-0.5] * length,
        finish=draw(st.none() | st.sampled_from(list(Finish))),
        versions=[0] * length,
        counted=None if length else draw(st.none() | st.integers(1, 99)),
    )
    return Rollout(prompt=prompt, completion=completion, verdict=draw(VERDICTS))


@given(rollouts())
def test_a_row_comes_back_as_it_was_written(one):
    row = json.loads(json.dumps(one.to_row(), allow_nan=False))
    back = Rollout.from_row(row, "line 1", kind=one.prompt.kind)
    assert back.to_row() == row
    for name in ("draw", "text", "kind", "answer", "source", "messages"):
        assert getattr(back.prompt, name) == getattr(one.prompt, name)
    for name in ("text", "finish", "length", "truncated"):
        assert getattr(back.completion, name) == getattr(one.completion, name)
    for name in ("label", "known_score", "reason"):
        assert getattr(back.verdict, name) == getattr(one.verdict, name)


WILD = {
    "labelled": ({"response": "2", "label": 1}, {"completion": "2", "score": 1.0, "verdict": "correct"}),
    "true": ({"response": "2", "label": True}, {"score": 1.0}),
    "no verdict": ({"completion": "2"}, {"score": None, "verdict": "unknown"}),
    "unknown": ({"completion": "2", "score": None, "reason": "died"}, {"verdict": "unknown", "reason": "died"}),
    "a part": ({"completion": "2", "score": 0.25}, {"verdict": "partial"}),
    "position": ({"completion": "2", "problem": 3}, {"draw": 3, "id": "3"}),
    "text": ({"completion": "2", "problem": "1+1?"}, {"draw": 0}),
    "named": ({"completion": "2", "problem": 3, "draw": 4, "id": 9}, {"draw": 4, "id": "9"}),
    "count": ({"completion": "2", "tokens": 5}, {"length": 5}),
    "texts": ({"completion": "2", "tokens": ["2", ";"]}, {"length": 2}),
    "number": ({"completion": "2", "answer": 0}, {"answer": "0"}),
    "nothing": ({"completion": "2", "answer": None, "prompt": None, "finish": None}, {"answer": "", "prompt": ""}),
}


@pytest.mark.parametrize("name", WILD)
def test_keys_of_other_tools_are_read(name):
    row, expected = WILD[name]
    found = Rollout.from_row(row, "line 1").to_row()
    assert {key: found[key] for key in expected} == expected


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({}, r"Expected exactly one of completion, response in line 2, got \[\]"),
        ({"completion": "a", "response": "a"}, r"got \['completion', 'response'\]"),
        ({"completion": None}, "Expected text in `completion` of line 2, got None"),
        ({"completion": "a", "prompt": 7}, "Expected text or a list of chat messages in `prompt` of line 2, got 7"),
        ({"completion": "a", "prompt": ["x"]}, "chat messages in `prompt`"),
        ({"completion": "a", "score": 1.5}, r"Expected a number in \[0, 1\], or null, in `score` of line 2, got 1.5"),
        ({"completion": "a", "score": float("nan")}, "in `score` of line 2, got nan"),
        ({"completion": "a", "score": "1"}, "in `score` of line 2, got '1'"),
        ({"completion": "a", "label": 0.5}, "Expected 0 or 1 in `label` of line 2, got 0.5"),
        ({"completion": "a", "label": 1, "score": 1}, "exactly one of score, label in line 2"),
        ({"completion": "a", "finish": "eos"}, "Expected stop, length or null in `finish` of line 2, got 'eos'"),
        ({"completion": "a", "draw": "3"}, "Expected a number of 0 or more, or null, in `draw` of line 2, got '3'"),
        ({"completion": "a", "length": -1}, "in `length` of line 2, got -1"),
        ({"completion": "a", "tokens": True}, "in `tokens` of line 2, got True"),
        ({"completion": ["x" * 900]}, r"in `completion` of line 2, got \['x{78}\.$"),
    ],
)
def test_a_row_that_cannot_be_meant_is_refused(row, words):
    with pytest.raises(ValueError, match=words):
        Rollout.from_row(row, "line 2")
