r"""Templates: fields, paths and other braces, messages, chat templates without a system role or with variables."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from toys import write_jsonl

from prime_lightning.prompts.arithmetic import build_tokenizer
from prime_lightning.prompts.dataset import DatasetPrompts
from prime_lightning.prompts.template import Template, at, is_conversation, rendered

ROW = {"problem": "6*7?", "answer": "42", "tests": ["a", "b"], "extra_info": {"question": "q", "answer": "42"}, "n": 3}
CHATML = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
GEMMA = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + CHATML
DROPS = "{% for m in messages if m.role != 'system' %}<{{ m.role }}>{{ m.content }}{% endfor %}"
THINKS = CHATML + "{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}"


def user(template, row=ROW, hidden=("answer",)):
    return Template(user=template).messages(row, hidden)[-1]["content"]


@pytest.fixture
def tokenizer():
    made = build_tokenizer()
    made.chat_template = CHATML
    return made


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{problem}", "6*7?"),
        ("{problem} {n}", "6*7? 3"),
        ("{problem} {tests[0]} {tests[-1]} {tests.1}", "6*7? a b b"),
        ("{problem} {extra_info.question}", "6*7? q"),
        (r"{problem} \boxed{{Your answer}}", r"6*7? \boxed{Your answer}"),
        (r"{problem} \boxed{Your answer}", r"6*7? \boxed{Your answer}"),
        (r"{problem} \boxed{}", r"6*7? \boxed{}"),
        (r"{problem} \boxed{{}}", r"6*7? \boxed{}"),
        (r"{problem} \boxed{answer}", r"6*7? \boxed{answer}"),
        (r"{problem} \boxed{{answer}}", r"6*7? \boxed{answer}"),
        (r"{problem} \boxed{\text{answer}}", r"6*7? \boxed{\text{answer}}"),
        (r"{problem} \boxed {answer.}", r"6*7? \boxed {answer.}"),
        (r"{problem} \frac{answer}{answer}", r"6*7? \frac{answer}{answer}"),
        (r"{problem} \sqrt[3]{answer}", r"6*7? \sqrt[3]{answer}"),
        (r"{problem} \{answer\}", r"6*7? \{answer\}"),
        (r"\boxed{{{problem}}}", r"\boxed{6*7?}"),
        ("{problem} {", "6*7? {"),
        ("{problem} }", "6*7? }"),
        ("{problem} {{", "6*7? {"),
        ("{problem} }}", "6*7? }"),
        ("{problem} {1, 2} {x+y}", "6*7? {1, 2} {x+y}"),
        ('{problem} {"result": 5}', '6*7? {"result": 5}'),
        ("{problem} {x}", "6*7? {x}"),
        ("```python\n{problem}\n```", "```python\n6*7?\n```"),
    ],
)
def test_fields_are_filled_in_and_other_braces_stand_for_themselves(template, text):
    assert user(template) == text


@pytest.mark.parametrize(
    "template",
    [
        "{problem} {answer}",
        r"{problem} \boxed{{{answer}}}",
        r"{problem} \frac{\sqrt{2}}{answer}",
        "{problem} x^{answer}",
        "{problem} Answer: {answer}.",
    ],
)
def test_a_template_that_would_show_the_reference_is_refused(template):
    with pytest.raises(ValueError, match=r"without the reference, got \{answer\} .*`template.reveal: \[answer\]"):
        user(template)


def test_the_reference_is_hidden_by_its_path_and_shown_by_name_only():
    template = "{extra_info.question} {extra_info.answer}"
    with pytest.raises(ValueError, match=r"got \{extra_info.answer\}"):
        user(template, hidden=("extra_info.answer",))
    with pytest.raises(ValueError, match=r"got \{extra_info\}"):
        user("{problem} {extra_info}", hidden=("extra_info.answer",))
    shown = Template(user=template, reveal=("extra_info.answer",)).messages(ROW, ("extra_info.answer",))
    assert shown[0]["content"] == "q 42"


pieces = st.sampled_from(
    [
        "{answer}",
        "answer",
        "{",
        "}",
        "{{",
        "}}",
        "\\boxed",
        "\\text",
        "\\",
        "\\{",
        "\\}",
        "[",
        "]",
        " ",
        "^",
        "_",
        "\\frac{1}",
    ]
)


@given(st.lists(pieces, max_size=12))
def test_no_template_shows_the_reference(parts):
    secret = {"problem": "6*7?", "answer": "SECRET"}
    try:
        text = user("{problem} " + "".join(parts), secret)
    except ValueError:
        return
    assert "SECRET" not in text


def test_a_data_set_never_shows_its_reference(tmp_path, tokenizer):
    path = write_jsonl(tmp_path / "rows.jsonl", [{"problem": "6*7?", "solution": "42"}])
    template = Template(user="{problem} {solution}", chat=False)
    with pytest.raises(ValueError, match=r"without the reference, got \{solution\}"):
        DatasetPrompts(path, template=template, columns={"answer": "solution"})
    boxed = Template(user=r"{problem} Write \boxed{solution}.", chat=False)
    assert "42" not in DatasetPrompts(path, template=boxed, columns={"answer": "solution"}).prompt(0, tokenizer).text


def test_names_that_are_no_fields_are_said_at_the_start(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", [{"problem": "6*7?", "answer": "42"}])
    with pytest.warns(UserWarning, match=r"\['problm'\] in the template .* stand for themselves"):
        DatasetPrompts(path, template=Template(user="{problm} {problem}"))
    with pytest.raises(ValueError, match="field 'problm' that the template"):
        DatasetPrompts(path, template=Template(user="{problm}"))


@pytest.mark.parametrize(
    ("field", "said"),
    [
        ({"problem": None}, "null"),
        ({"problem": {"text": "x"}}, r"a mapping with the fields \['text'\]"),
        ({"problem": " "}, "none"),
    ],
)
def test_a_field_that_is_no_text_is_refused(field, said):
    with pytest.raises(ValueError, match=f"Expected text .*{said}"):
        Template(user="{problem}").messages(field)


@pytest.mark.parametrize("value", [None, ""])
def test_rows_without_a_problem_are_named_before_training(tmp_path, value):
    rows = [{"problem": "6*7?", "answer": "42"}, {"problem": value, "answer": "1"}, {"problem": "1", "answer": "1"}]
    with pytest.raises(ValueError, match=r"Expected `problem` in every row .* none in 1 of 3 \(rows \[1\]"):
        DatasetPrompts(write_jsonl(tmp_path / "rows.jsonl", rows))


# ---- messages --------------------------------------------------------------------------------------------------------

ASKED = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "6*7?"}]
SHAREGPT = [
    {"from": "system", "value": "Be brief."},
    {"from": "human", "value": "6*7?"},
    {"from": "gpt", "value": "42"},
]
PARTS = [{"role": "user", "content": [{"type": "text", "text": "6*"}, {"type": "text", "text": "7?"}]}]


@pytest.mark.parametrize(
    ("talk", "messages"),
    [
        (ASKED, ASKED),
        ([*ASKED, {"role": "assistant", "content": "42"}], ASKED),
        (SHAREGPT, ASKED),
        (PARTS, ASKED[1:]),
        (json.dumps(ASKED), ASKED),
        (str(ASKED), ASKED),
        ([ASKED[1], {"role": "assistant", "content": "42"}, {"role": "user", "content": "And 7*7?"}],
         [ASKED[1], {"role": "assistant", "content": "42"}, {"role": "user", "content": "And 7*7?"}]),
    ],
)  # fmt: skip
def test_messages_in_a_field_are_messages(talk, messages):
    assert Template(user="{prompt}").messages({"prompt": talk}) == messages


def test_text_around_messages_goes_to_the_last_user_and_a_system_message_in_place_of_theirs():
    said = Template(user=r"{prompt} Use \boxed{}.", system="Think.").messages({"prompt": ASKED})
    assert said == [{"role": "system", "content": "Think."}, {"role": "user", "content": r"6*7? Use \boxed{}."}]


@pytest.mark.parametrize(
    ("talk", "said"),
    [
        ([{"role": "assistant", "content": "42"}], "a user's message at the end"),
        ([{"role": "user", "content": [{"type": "image", "url": "x"}]}], "messages of text"),
        ([{"role": "user", "content": None}], "text as the content"),
    ],
)
def test_messages_that_cannot_be_asked_are_refused(talk, said):
    with pytest.raises(ValueError, match=said):
        Template(user="{prompt}").messages({"prompt": talk})


@pytest.mark.parametrize("column", ["prompt", "messages", "conversations"])
def test_a_column_of_messages_needs_no_template(tmp_path, tokenizer, column):
    path = write_jsonl(
        tmp_path / "rows.jsonl", [{column: [*ASKED, {"role": "assistant", "content": "42"}], "answer": "42"}]
    )
    prompt = DatasetPrompts(path).prompt(0, tokenizer)
    assert prompt.text == "<system>Be brief.<user>6*7?<assistant>"


# ---- chat templates --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chat_template", [GEMMA, DROPS])
def test_a_system_message_moves_to_the_user_where_there_is_no_such_role(tokenizer, chat_template):
    tokenizer.chat_template = chat_template
    with pytest.warns(UserWarning, match="no system role"):
        text = Template(user="{problem}", system="Be brief.").encode(ROW, tokenizer)[0]
    assert text.startswith("<user>Be brief.\n\n6*7?")


def test_a_template_that_refuses_even_so_says_what_to_do(tokenizer):
    tokenizer.chat_template = "{{ raise_exception('No.') }}"
    with (
        pytest.warns(UserWarning, match="no system role"),
        pytest.raises(ValueError, match=r"got its error No\.. Leave `template.system` out"),
    ):
        Template(user="{problem}", system="Be brief.").encode(ROW, tokenizer)
    with pytest.raises(ValueError, match=r"got its error No\."):
        Template(user="{problem}").encode(ROW, tokenizer)


def test_variables_reach_the_chat_template(tokenizer):
    tokenizer.chat_template = THINKS
    texts = [
        Template(user="{problem}", chat_template_kwargs=variables).encode(ROW, tokenizer)[0]
        for variables in ({}, {"enable_thinking": True}, {"enable_thinking": False})
    ]
    assert texts == ["<user>6*7?<assistant>", "<user>6*7?<assistant>", "<user>6*7?<assistant><think></think>"]


@pytest.mark.parametrize("name", ["enable_thinkin", "tokenize", "add_generation_prompt"])
def test_variables_that_the_chat_template_does_not_read_are_refused(tokenizer, name):
    tokenizer.chat_template = THINKS
    with pytest.raises(ValueError, match=rf"chat_template_kwargs` .* got \['{name}'\]"):
        rendered(ASKED, tokenizer, {name: False})


def test_a_prompt_of_no_tokens_is_refused(tokenizer):
    with pytest.raises(ValueError, match="at least one token of a prompt, got none for the text 'ü'"):
        Template(user="{problem}", chat=False).encode({"problem": "ü"}, tokenizer)


@pytest.mark.parametrize(
    ("row", "path", "value"),
    [
        ({"a": 1}, "a", 1),
        ({"a.b": 1, "a": {"b": 2}}, "a.b", 1),
        ({"a": {"b": {"c": 3}}}, "a.b.c", 3),
        ({"a": [{"b": 3}, {"b": 4}]}, "a[1].b", 4),
        ({"a": [{"b": 3}, {"b": 4}]}, "a.1.b", 4),
        ({"a": '{"b": "3"}'}, "a.b", "3"),
        ({"a": "{'b': ['x', 'y']}"}, "a.b[-1]", "y"),
    ],
)
def test_a_path_finds_a_field(row, path, value):
    assert at(row, path) == value


@pytest.mark.parametrize("path", ["b", "a.c", "a.b.c", "a[0]", "a.b[0]", "d[7]", "t[0]"])
def test_a_path_to_nowhere_is_a_key_error(path):
    with pytest.raises(KeyError):
        at({"a": {"b": 1}, "d": [1], "t": "text"}, path)


def test_conversations_are_known_by_their_fields():
    assert is_conversation([{"role": "user", "content": "x"}])
    assert is_conversation([{"from": "human", "value": "x", "weight": 1}])
    for other in (
        [],
        "x",
        [1],
        [{"role": "user"}],
        [{"role": "user", "content": "x"}, {"a": 1}],
        None,
        {"role": "user"},
    ):
        assert not is_conversation(other)
