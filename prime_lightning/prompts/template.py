r"""How a row becomes the text that the model sees: fields in braces, chat messages, the tokenizer's chat template.

In a template, braces around the name of a field, or its path (`{tests[0]}`, `{extra_info.question}`), are its value.
All other braces stand for themselves: `\boxed{}`, `\frac{1}{2}`, a lone `{`, and the argument of a LaTeX command
whatever it says, so that `\boxed{answer}` never is the answer. Doubled braces stand for single ones, as in Python's
format strings.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Self

from transformers import PreTrainedTokenizerBase

from prime_lightning.verifiers.references import structure

MATHS_USER = "{problem}\n\nPresent the answer in LaTex format: \\boxed{{Your answer}}"
CODE_USER = (
    "{prompt}\n\nWrite Python code to solve the problem. Present the code in \n```python\nYour code\n```\nat the end."
)
_BRACES = re.compile(
    r"(?P<escaped>\\?\{\{|\\?\}\})"
    r"|(?P<latex>\\(?![nt]\{)[A-Za-z]+\*?(?:\[[^\[\]{}]*\])?(?:\{[^{}]*\})+|\\[{}])"
    r"|\{(?P<field>[^{}]*)\}"
)
_STEP = re.compile(r"\.?([^.\[\]]+)|\[(-?\d+)\]")
_STEPS = r"(?:\.\w+|\[-?\d+\])"
_PATH = re.compile(rf"[A-Za-z_]\w*{_STEPS}*|\d+{_STEPS}+")
_OWN = frozenset({"tokenize", "add_generation_prompt", "conversation", "return_tensors", "return_dict", "padding"})
_ROLES = ({"role", "content"}, {"from", "value"})
_SPEAKERS = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "model": "assistant"}

Message = dict[str, str]


@dataclass(frozen=True, kw_only=True)
class Template:
    r"""How a row becomes the text that the model sees.

    A field that holds chat messages (`role` and `content`, or `from` and `value`) stands for the conversation: what the
    template says around it goes into the last user's message, what stands before is kept, and an assistant's
    message at the end, being an answer, is left out.

    Example:
        >>> Template(user="{problem} =", chat=False).messages({"problem": "1+1"})
        [{'role': 'user', 'content': '1+1 ='}]
        >>> messages = Template(user=r"{problem} Write \boxed{answer}.").messages({"problem": "1+1", "answer": "2"})
        >>> messages[0].get("content")
        '1+1 Write \\boxed{answer}.'
        >>> Template(user="{prompt}").messages({"prompt": [{"role": "user", "content": "Hello"}]})
        [{'role': 'user', 'content': 'Hello'}]
    """

    user: str = MATHS_USER
    """Text with the row's fields in braces; other braces stand for themselves. The default is the one of PRIME's
    authors for mathematics."""
    system: str | None = None
    """System message; None leaves it out, or takes that of a row's messages. A chat template without such a role gets
    it at the head of the user's message."""
    chat: bool = True
    """Use the tokenizer's chat template; False gives the user text as it is."""
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    """Variables of the tokenizer's chat template, such as `enable_thinking: false`."""
    reveal: tuple[str, ...] = ()
    """Fields with the reference that `user` may show all the same; without, naming one is an error."""

    def __post_init__(self) -> None:
        if self.chat_template_kwargs and not self.chat:
            raise ValueError(
                f"Expected no `chat_template_kwargs` without the chat template, got {self.chat_template_kwargs} and "
                "`chat: false`."
            )

    def with_variables(self, variables: Mapping[str, Any]) -> Self:
        """The same template with these variables of the chat template under its own; none without one."""
        return replace(self, chat_template_kwargs={**variables, **self.chat_template_kwargs}) if self.chat else self

    def fields(self, row: Mapping[str, Any]) -> Iterator[str]:
        """Names and paths in `user` that are fields of this row."""
        found = (match["field"] for match in _BRACES.finditer(self.user))
        return (name for name in found if name is not None and _is_field(name, row))

    def strangers(self, row: Mapping[str, Any]) -> list[str]:
        """Names in `user` that look like fields and are none of this row: they stand for themselves."""
        found = (match["field"] for match in _BRACES.finditer(self.user))
        return [
            name
            for name in found
            if name is not None and _PATH.fullmatch(name) and not name[0].isdigit() and not _is_field(name, row)
        ]

    def messages(self, row: Mapping[str, Any], hidden: tuple[str, ...] = ()) -> list[Message]:
        """The row as chat messages.

        Args:
            row: Fields and values.
            hidden: Fields with the reference, as paths; only those of `reveal` may be shown.

        Raises:
            ValueError: if the template names no field of the row, a hidden one, or one that is null or a mapping.
        """
        names = list(self.fields(row))
        strangers = self.strangers(row)
        if strangers and not names:
            raise ValueError(
                f"Expected the row to have the field {strangers[0]!r} that the template {self.user!r} names, "
                f"got the fields {sorted(row)}. Change `template.user` or the data."
            )
        values = {name: self._value(name, row, hidden) for name in names}
        talks = {name: value for name, value in values.items() if isinstance(value, list)}
        if len(talks) > 1:
            raise ValueError(f"Expected one field with messages in the template {self.user!r}, got {[*talks]}.")
        before, last = next((_split(talk, name) for name, talk in talks.items()), ([], ""))
        user = _filled(self.user, {**values, **dict.fromkeys(talks, last)})
        if not user.strip():
            raise ValueError(f"Expected text for the model, got none: {', '.join(names) or 'the template'} is empty.")
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        before = [message for message in before if not (system and message["role"] == "system")]
        return [*system, *before, {"role": "user", "content": user}]

    def _value(self, name: str, row: Mapping[str, Any], hidden: tuple[str, ...]) -> str | list[Message]:
        value = at(row, name)
        talk = messages_of(value)
        if any(_overlap(name, path) and not (talk and name != path) for path in hidden) and name not in self.reveal:
            raise ValueError(
                f"Expected a template without the reference, got {{{name}}} in {self.user!r}: it would show the model "
                f"the answer. Double the braces for the word itself, or set `template.reveal: [{name}]` if it is meant."
            )
        if talk is not None:
            return talk
        if value is None or isinstance(value, Mapping):
            what = "null" if value is None else f"a mapping with the fields {sorted(value)}; name one by its path"
            raise ValueError(f"Expected text in the field {name!r} that the template {self.user!r} names, got {what}.")
        return str(value)

    def encode(
        self, row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, hidden: tuple[str, ...] = ()
    ) -> tuple[str, tuple[int, ...]]:
        """The text that the model sees, and its tokens.

        Raises:
            ValueError: as `messages`; also without a chat template where one is needed, and for no tokens at all.
        """
        messages = self.messages(row, hidden)
        if self.chat:
            text = rendered(messages, tokenizer, self.chat_template_kwargs)
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        else:
            text = "".join(message["content"] for message in messages)
            ids = tokenizer(text)["input_ids"]
        if not len(ids):
            raise ValueError(
                f"Expected at least one token of a prompt, got none for the text {text[:80]!r}: the tokenizer "
                f"{tokenizer.name_or_path!r} knows nothing of it. Change the data, the template or the tokenizer."
            )
        return text, tuple(ids)


def rendered(messages: list[Message], tokenizer: PreTrainedTokenizerBase, variables: Mapping[str, Any] = {}) -> str:
    """Messages by the tokenizer's chat template, ready for an answer.

    A system message that the template refuses, or drops, goes to the head of the first user's message.

    Raises:
        ValueError: if there is no chat template, it refuses the messages, or does not know the variables.
    """
    if tokenizer.chat_template is None:
        raise ValueError(
            f"Expected a tokenizer with a chat template, got {tokenizer.name_or_path!r} without one. "
            "Set `template.chat: false` (`--chat false` of `evaluate`), or take an instruct model's tokenizer."
        )
    _check_variables(variables, tokenizer)
    system = messages[0]["content"] if messages[0]["role"] == "system" else ""
    try:
        text = _rendered(messages, tokenizer, variables)
        if system.strip() in text:
            return text
    except Exception as error:  # the template's own, whatever they are
        if not system:
            raise ValueError(f"Expected messages that the chat template takes, got its error {error}.") from error
    warnings.warn(
        f"The chat template of {tokenizer.name_or_path!r} has no system role; the system message is put at the head of "
        "the user's.",
        stacklevel=2,
    )
    first, *rest = messages[1:]
    merged = [{**first, "content": f"{system}\n\n{first['content']}"}, *rest]
    try:
        return _rendered(merged, tokenizer, variables)
    except Exception as error:
        raise ValueError(
            f"Expected messages that the chat template takes, got its error {error}. Leave `template.system` out."
        ) from error


def _rendered(messages: list[Message], tokenizer: PreTrainedTokenizerBase, variables: Mapping[str, Any]) -> str:
    return str(tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False, **variables))


def _check_variables(variables: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> None:
    template = str(tokenizer.chat_template)
    wrong = [name for name in variables if name in _OWN or not re.search(rf"\b{re.escape(name)}\b", template)]
    if wrong:
        raise ValueError(
            f"Expected `template.chat_template_kwargs` that the chat template of {tokenizer.name_or_path!r} reads, got "
            f"{wrong}, of which it says nothing. Look for the name in its `chat_template`."
        )


def at(row: Any, path: str) -> Any:
    """The value of a field by its path; a field may stand in a mapping, a list or the JSON text of one.

    Raises:
        KeyError: if there is none.

    Example:
        >>> at({"a": {"b": [1, 2]}}, "a.b[1]"), at({"a": '{"b": 3}'}, "a.b"), at({"a.b": 4}, "a.b")
        (2, 3, 4)
    """
    if isinstance(row, Mapping) and path in row:
        return row[path]
    for name, index in _STEP.findall(path):
        row = structure(row)
        if isinstance(row, str):
            raise KeyError(path)
        try:
            row = row[int(index)] if index else row[name] if isinstance(row, Mapping) else row[int(name)]
        except (KeyError, IndexError, TypeError, ValueError):
            raise KeyError(path) from None
    return row


def has(row: Any, path: str) -> bool:
    """Whether there is such a value."""
    try:
        at(row, path)
    except KeyError:
        return False
    return True


def renamed(row: Mapping[str, Any], columns: Mapping[str, str]) -> Mapping[str, Any]:
    """A row with values under our names as well.

    Args:
        row: As it was read.
        columns: Our names, and those of the row, or paths.

    Raises:
        ValueError: if the row lacks one.

    Example:
        >>> renamed({"q": {"text": "1+1"}}, {"problem": "q.text"})
        {'q': {'text': '1+1'}, 'problem': '1+1'}
    """
    try:
        return {**row, **{ours: at(row, theirs) for ours, theirs in columns.items()}}
    except KeyError as error:
        raise ValueError(f"Expected {error} (`columns`) in each row, got {sorted(row)}.") from None


def _is_field(name: str, row: Mapping[str, Any]) -> bool:
    return name in row or (_PATH.fullmatch(name) is not None and has(row, name))


def _overlap(name: str, hidden: str) -> bool:
    """Whether two paths are the same, or one lies in the other."""
    return name == hidden or any(a.startswith((f"{b}.", f"{b}[")) for a, b in ((name, hidden), (hidden, name)))


def _filled(template: str, values: Mapping[str, Any]) -> str:
    def one(match: re.Match[str]) -> str:
        if match["escaped"]:
            return match["escaped"][:-1]
        return match[0] if match["latex"] else str(values.get(match["field"], match[0]))

    return _BRACES.sub(one, template)


def is_conversation(value: Any) -> bool:
    """Whether a value is a list of chat messages, `role` and `content`, or `from` and `value` as ShareGPT writes."""
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(part, Mapping) and any(keys <= part.keys() for keys in _ROLES) for part in value)
    )


def messages_of(value: Any) -> list[Message] | None:
    """The chat messages that a value, or its text as JSON, is; None if it is something else.

    Example:
        >>> messages_of([{"from": "human", "value": "2+2?"}]), messages_of("2+2?")
        ([{'role': 'user', 'content': '2+2?'}], None)
    """
    talk = structure(value)
    return [_message(part) for part in talk] if is_conversation(talk) else None


def _message(part: Mapping[str, Any]) -> Message:
    """A message of a row, whichever way it is written; content in parts is joined, if all of them are text."""
    role, content = (part["role"], part["content"]) if "role" in part else (part["from"], part["value"])
    if isinstance(content, list):
        if not all(isinstance(piece, Mapping) and isinstance(piece.get("text"), str) for piece in content):
            raise ValueError(f"Expected messages of text, got content with other parts: {str(content)[:80]}.")
        content = "".join(piece["text"] for piece in content)
    if not isinstance(content, str):
        raise ValueError(f"Expected text as the content of a message, got {content!r}.")
    return {"role": _SPEAKERS.get(role, role), "content": content}


def _split(talk: list[Message], name: str) -> tuple[list[Message], str]:
    """What stands before the last user's message, and its text; answers at the end are left out."""
    while talk and talk[-1]["role"] == "assistant":
        talk = talk[:-1]
    if not talk or talk[-1]["role"] != "user":
        raise ValueError(f"Expected a user's message at the end of {name!r}, got {[m['role'] for m in talk]}.")
    return talk[:-1], talk[-1]["content"]
