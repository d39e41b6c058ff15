"""Training prompts that stand in a benchmark: known positives, and texts that only look alike."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from real_files import real, write

from prime_lightning.__main__ import main
from prime_lightning.evaluation.overlap import Index, words

LONG = "A farmer has three hens and buys four more of them at the market, so how many hens are in the yard now?"


def check(*args):
    return main(["data", "check", *map(str, args)])


def found(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def test_known_positives(tmp_path, capsys):
    """Four MATH-500 problems stand word for word in AIME 1983 to 2023; all of AIME 2024 in aimo_validation."""
    old, validation, math500 = real("aime_1983_2023.jsonl"), real("aimo_validation_aime.jsonl"), real("math500")
    assert check(old, math500, real("aime2024"), "--out", tmp_path / "found.jsonl") == 1
    texts = [[json.loads(line)["problem"] for line in Path(path).read_text().splitlines()] for path in (old, math500)]
    exact = [(m["train"], m["problem"]) for m in found(tmp_path / "found.jsonl") if m["exact"]]
    bare = [["".join(text.split()) for text in side] for side in texts]
    same = [(t, p) for t, a in enumerate(bare[0]) for p, b in enumerate(bare[1]) if a == b]
    assert len(same) == 4
    assert set(same) <= set(exact)
    assert len(exact) == 6  # two more differ in LaTeX only
    assert "| aime2024 | 30 | 0 | 0 | 0 |" in capsys.readouterr().out
    assert check(validation, real("aime2024"), math500) == 1
    said = capsys.readouterr().out
    assert "| aime2024 | 30 | 30 | 30 | 0 |" in said
    assert "| math500 | 500 | 0 | 0 | 0 |  |" in said


def test_exact_near_and_far(tmp_path, capsys):
    near = LONG.replace("three", "nine")
    train = write(tmp_path / "train.jsonl", [{"question": q} for q in (LONG.upper() + " !", near, "Three hens?")])
    quiz = write(tmp_path / "quiz.jsonl", [{"problem": LONG}, {"problem": "What is 2+2?"}])
    assert check(train, quiz, "--out", tmp_path / "out.jsonl") == 1
    rows = found(tmp_path / "out.jsonl")
    assert [(r["train"], r["problem"], r["exact"]) for r in rows] == [(0, 0, True), (1, 0, False)]
    assert "| quiz | 2 | 1 | 1 | 0 | 0, 1 |" in capsys.readouterr().out
    assert check(train, quiz, "--out", tmp_path / "out.jsonl") == 2
    assert "which exists" in capsys.readouterr().err
    clean = write(tmp_path / "clean.jsonl", [{"prompt": [{"role": "user", "content": "Unlike."}]}])
    assert check(clean, quiz) == 0


def test_mistakes(tmp_path, capsys):
    train = write(tmp_path / "train.jsonl", [{"words": LONG}])
    for args, said in (
        ((train, train), "Expected the column problem or question"),
        ((train, tmp_path / "none.jsonl"), "which does not exist"),
        ((train, "mathematics"), "Expected a benchmark of"),
        ((train, "arithmetic"), "whose problems are made up"),
        ((train, train, "--n", 0), "Expected n of at least 1"),
    ):
        assert check(*args) == 2
        assert said in capsys.readouterr().err


@given(st.text("abX 12.,$\n", max_size=80), st.sampled_from([r"\left(", "$", "\n", r"\,", "...", "!"]))
def test_typography_and_case_do_not_tell_texts_apart(text, noise):
    assert words(f"{noise} {text.upper()} {noise}") == words(text)
    index = Index()
    index.add("b", [text])
    assert [m.exact for m in index.matches(0, f"{text} {noise}")] == [True] * bool(words(text))


@given(st.lists(st.sampled_from("abcd"), min_size=4, max_size=30), st.lists(st.sampled_from("abcd"), max_size=30))
def test_the_share_of_ngrams_is_counted_by_hand(problem, prompt):
    index = Index(n=3, share=0.01)
    index.add("b", [" ".join(problem)])
    grams, seen = ({tuple(x[i : i + 3]) for i in range(len(x) - 2)} for x in (problem, prompt))
    shares = [m.share for m in index.matches(0, " ".join(prompt))]
    expected = 1.0 if "".join(problem) == "".join(prompt) else len(grams & seen) / len(grams)
    assert shares == ([pytest.approx(expected)] if expected else [])
