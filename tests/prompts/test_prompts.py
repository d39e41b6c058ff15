"""Prompts: rows of files, templates, and an endless order in which a position is one integer."""

import gzip
import json
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from toys import write_jsonl

from prime_lightning.prompts.arithmetic import ArithmeticPrompts, build_tokenizer
from prime_lightning.prompts.dataset import CODE_USER, DatasetPrompts, MixedPrompts, Template

SUMS = [{"id": f"sums/{i}", "problem": f"{i}+1=", "answer": str(i + 1), "level": 1} for i in range(7)]
PLAIN = Template(user="{problem}", chat=False)
CHATML = (
    "{% for m in messages %}#{{ m['role'] }}^{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}#={% endif %}"
)


@pytest.fixture
def tokenizer():
    return build_tokenizer()


@pytest.fixture
def sums(tmp_path):
    return write_jsonl(tmp_path / "sums.jsonl", SUMS)


def ids(prompts, draws):
    return [prompts.row(draw)["id"] for draw in draws]


def test_a_prompt_has_what_engine_and_verifier_need(sums, tokenizer):
    prompt = DatasetPrompts(sums, template=PLAIN, shuffle=False).prompt(9, tokenizer)
    assert (prompt.draw, prompt.text, prompt.answer) == (9, "2+1=", "3")
    assert (prompt.kind, prompt.source) == ("math", "sums")
    assert prompt.token_ids == tuple(tokenizer("2+1=")["input_ids"])
    assert prompt.row["id"] == "sums/2"


def test_without_shuffling_the_order_is_the_files(sums):
    expected = [row["id"] for row in SUMS] * 3
    assert ids(DatasetPrompts(sums, shuffle=False), range(21)) == expected


def test_each_pass_is_another_permutation_of_all_rows(sums):
    prompts = DatasetPrompts(sums, seed=3)
    passes = [tuple(ids(prompts, range(7 * lap, 7 * lap + 7))) for lap in range(20)]
    assert all(sorted(one) == sorted(row["id"] for row in SUMS) for one in passes)
    assert len(set(passes)) > 15
    assert passes != [tuple(ids(DatasetPrompts(sums, seed=4), range(7 * lap, 7 * lap + 7))) for lap in range(20)]


def test_a_position_says_all_there_is_to_resume(sums):
    straight = ids(DatasetPrompts(sums, seed=3), range(40))
    resumed = DatasetPrompts(sums, seed=3)
    assert ids(resumed, range(25, 40)) == straight[25:]
    assert ids(resumed, reversed(range(40))) == straight[::-1]  # whatever was read before


def test_limit_takes_the_first_rows(sums):
    assert len(DatasetPrompts(sums, limit=3)) == 3
    assert sorted(ids(DatasetPrompts(sums, limit=3), range(3))) == ["sums/0", "sums/1", "sums/2"]
    assert len(DatasetPrompts(sums, limit=99)) == 7


def test_gzipped_and_several_files(tmp_path):
    halves = SUMS[:3], SUMS[3:]
    paths = [tmp_path / "a.jsonl.gz", tmp_path / "b.jsonl.gz"]
    for path, rows in zip(paths, halves, strict=True):
        path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    one = DatasetPrompts(str(paths[0]), shuffle=False)
    assert (one.source, ids(one, range(3))) == ("a", ["sums/0", "sums/1", "sums/2"])
    both = DatasetPrompts([str(path) for path in paths], shuffle=False, source="sums")
    assert (both.source, ids(both, range(7))) == ("sums", [row["id"] for row in SUMS])


def test_code_rows_carry_their_tests_and_need_no_answer(tmp_path, tokenizer):
    row = {
        "id": "mbpp/1",
        "prompt": "1+1",
        "entry_point": "f",
        "setup": "",
        "tests": ["assert f(1) == 2"],
        "answer": None,
    }
    prompt = DatasetPrompts(write_jsonl(tmp_path / "code.jsonl", [row]), kind="code", template=None)
    assert prompt.template.user == CODE_USER
    prompt.template = Template(user="{prompt}", chat=False)
    made = prompt.prompt(0, tokenizer)
    assert (made.answer, made.row["tests"], made.row["entry_point"]) == ("", ["assert f(1) == 2"], "f")


def test_answers_that_are_numbers_become_text(tmp_path, tokenizer):
    path = write_jsonl(tmp_path / "n.jsonl", [{"problem": "1", "final": n} for n in (0, 12)])
    prompts = DatasetPrompts(path, template=PLAIN, columns={"answer": "final"}, shuffle=False)
    assert [prompts.prompt(draw, tokenizer).answer for draw in (0, 1)] == ["0", "12"]


def test_a_pattern_finds_the_answer_in_its_field(tmp_path, tokenizer):
    rows = [{"problem": "1", "answer": f"Six and six is 12.\n#### {text}"} for text in ("12", "1,200", "none")]
    options = {"template": PLAIN, "answer_pattern": r"#### ([\d,]+)", "shuffle": False}
    prompts = DatasetPrompts(write_jsonl(tmp_path / "two.jsonl", rows[:2]), **options)
    assert [prompts.prompt(draw, tokenizer).answer for draw in (0, 1)] == ["12", "1,200"]
    with pytest.raises(ValueError, match=r"(?s)matches `answer_pattern` .*#### none"):
        DatasetPrompts(write_jsonl(tmp_path / "three.jsonl", rows), **options)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.jsonl", "", "Expected rows in .*empty.jsonl.*no rows"),
        ("cut.jsonl", '{"problem": "a", "answer": "b"}\n{"problem": "c", "ans', "cannot be read: JSON parse error"),
        (
            "none.jsonl",
            '{"problem": "a", "answer": "b"}\n{"problem": "c", "answer": null}\n',
            r"in 1 of 2 \(rows \[1\]",
        ),
        ("blank.jsonl", '{"problem": "a", "answer": "  "}\n', r"`answer` in every row .* none in 1 of 1"),
        ("other.jsonl", '{"question": "a"}\n', r"field 'answer' .* got \['question'\]. Set `columns`"),
    ],
)
def test_data_that_cannot_work_is_refused(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        DatasetPrompts(str(tmp_path / name))


def test_columns_of_other_names_are_read_as_ours(tmp_path, tokenizer):
    rows = [{"problem": "not this", "asked": {"text": f"{i}+1="}, "solution": str(i + 1)} for i in range(2)]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    prompts = DatasetPrompts(
        path, template=PLAIN, columns={"problem": "asked.text", "answer": "solution"}, shuffle=False
    )
    prompt = prompts.prompt(1, tokenizer)
    assert (prompt.text, prompt.answer, prompt.row["problem"]) == ("1+1=", "2", "1+1=")
    with pytest.raises(ValueError, match=r"Expected 'askt' \(`columns`\) in each row, got \['asked', 'problem'"):
        DatasetPrompts(path, template=PLAIN, columns={"problem": "askt", "answer": "solution"})


def test_missing_data_is_refused(tmp_path, sums):
    with pytest.raises(ValueError, match=r"got '.*gone.jsonl', which does not exist"):
        DatasetPrompts([sums, str(tmp_path / "gone.jsonl")])
    with pytest.raises(ValueError, match="a data set of the hub, got 'nobody/nothing'"):
        DatasetPrompts("nobody/nothing")
    with pytest.raises(ValueError, match="at least one row"):
        DatasetPrompts(sums, limit=0)


def test_the_chat_template_is_the_tokenizers(tokenizer):
    tokenizer.chat_template = CHATML
    text, token_ids = Template(user="{problem}", system="+").encode({"problem": "1+1"}, tokenizer)
    assert text == "#system^+#user^1+1#="
    assert token_ids == tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
    assert Template(user="{problem}").encode({"problem": "1+1"}, tokenizer)[0] == "#user^1+1#="


def test_a_system_text_without_chat_stands_before_the_user(tokenizer):
    text, token_ids = Template(user="{problem}", system="^", chat=False).encode({"problem": "1+1="}, tokenizer)
    assert text == "^1+1="
    assert tokenizer.decode(token_ids) == text


def test_a_template_that_does_not_fit_is_refused(tokenizer):
    with pytest.raises(ValueError, match=r"field 'question' .* got the fields \['answer', 'problem'\]"):
        Template(user="{question}").messages({"problem": "1", "answer": "2"})
    with pytest.raises(ValueError, match=r"chat template, got .* Set `template.chat: false`"):
        Template().encode({"problem": "1"}, tokenizer)


def test_braces_in_rows_are_left_alone():
    problem = r"Find \frac{1}{x} for {x}."
    assert Template(user="{problem} \\boxed{{}}").messages({"problem": problem})[0]["content"] == problem + " \\boxed{}"


weights = st.lists(st.integers(1, 6), min_size=1, max_size=4)


@given(weights, st.integers(0, 3))
def test_mixed_prompts_keep_proportions_and_orders(shares, start):
    mixed = MixedPrompts([ArithmeticPrompts(seed=seed) for seed in range(len(shares))], shares)
    stretch = sum(shares)
    places = [mixed.locate(draw) for draw in range(4 * stretch)]
    window = places[start * stretch : (start + 1) * stretch]
    assert Counter(part for part, _ in window) == dict(enumerate(shares))
    for part, share in enumerate(shares):
        assert [k for p, k in places if p == part] == list(range(4 * share))  # its own order, without gaps
    for seen in range(1, 4 * stretch):
        for part, share in enumerate(shares):  # and evenly spread, not one source after the other
            assert abs(sum(p == part for p, _ in places[:seen]) - seen * share / stretch) < len(shares)


def test_mixed_prompts_are_their_parts_with_the_draw_of_the_run(sums, tokenizer):
    chains = ArithmeticPrompts(seed=5)
    mixed = MixedPrompts([DatasetPrompts(sums, template=PLAIN), chains], [2, 1])
    for draw in range(30):
        part, inner = mixed.locate(draw)
        own, prompt = mixed.parts()[part].prompt(inner, tokenizer), mixed.prompt(draw, tokenizer)
        assert prompt.draw == draw
        for name in ("token_ids", "text", "kind", "answer", "source", "row"):
            assert getattr(prompt, name) == getattr(own, name)
        assert mixed.row(draw) == own.row
    assert Counter(mixed.prompt(draw, tokenizer).kind for draw in range(30)) == {"math": 20, "exact": 10}


@pytest.mark.parametrize("shares", [[1], [1, 0], [1, 1, 1]])
def test_weights_that_do_not_fit_are_refused(shares):
    with pytest.raises(ValueError, match="one whole weight >= 1 for each of 2 parts"):
        MixedPrompts([ArithmeticPrompts(), ArithmeticPrompts()], shares)
