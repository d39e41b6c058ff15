"""The model's side of `script` mode: runs the program, then does what the judge asks, one frame at a time.

Frames from the judge: `["call", id, args, kwargs]`, `["get", id, name]`, `["set", id, name, value]`, `["item", id,
key]`, `["put", id, key, value]`, `["len", id]`, `["iter", id]`, `["next", id]`, `["str", id]`. Answers: `["V", value,
changed arguments]`, `["S"]` (StopIteration), `["E", exception, message]`; `["K", id, args, kwargs]` calls a function
of the judge and waits for `["R", value]` or `["RX", exception, message]`.

Protects nothing: everything here belongs to the program once it runs. The judge believes no frame.
"""

from __future__ import annotations

import builtins
from typing import Any

from prime_lightning.verifiers.jail import codec, wire

_CHANGEABLE = (list, dict, set, bytearray)


class Callback:
    """A function of the judge, as the program sees it."""

    __slots__ = ("_conversation", "_id")

    def __init__(self, conversation: _Conversation, number: int) -> None:
        self._conversation, self._id = conversation, number

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Have the judge call it."""
        talk = self._conversation
        talk.send(["K", self._id, talk.encode(list(args)), talk.encode(kwargs)])
        return talk.serve(nested=True)


class _Conversation:
    def __init__(self, channel: int) -> None:
        self._channel = channel
        self._objects: list[Any] = []

    def send(self, frame: list[Any]) -> None:
        """One frame to the judge."""
        wire.write_frame(self._channel, wire.dumps(frame))

    def handle(self, value: Any) -> list[Any]:
        """Keep an object here and send a handle to it."""
        if type(value) is Callback:
            return ["cb", value._id]
        self._objects.append(value)
        return ["h", len(self._objects) - 1, type(value).__name__[:60], hasattr(value, "__iter__")]

    def encode(self, value: Any) -> Any:
        """A value for the judge."""
        return codec.encode(value, self.handle)

    def _decode(self, data: Any) -> Any:
        return codec.decode(
            data, lambda tag, parts: self._objects[parts[0]] if tag == "h" else Callback(self, parts[0])
        )

    def serve(self, *, nested: bool = False) -> Any:
        """Answer frames until the judge hangs up, or (nested, after a callback) returns its value."""
        while True:
            frame = wire.loads(wire.read_frame(self._channel))
            if nested and frame[0] == "R":
                return self._decode(frame[1])
            if nested and frame[0] == "RX":
                raise getattr(builtins, frame[1], Exception)(frame[2])
            try:
                answer = self._do(frame[0], *frame[1:])
            except EOFError:
                raise
            except BaseException as error:
                answer = ["E", _builtin_name(error), str(error)[:300]]
            self.send(answer)

    def _do(self, action: str, number: int, *data: Any) -> list[Any]:
        target = self._objects[number]
        if action == "call":
            args, kwargs = self._decode(data[0]), self._decode(data[1])
            value = self.encode(target(*args, **kwargs))
            return ["V", value, [[i, self.encode(arg)] for i, arg in enumerate(args) if type(arg) in _CHANGEABLE]]
        if action == "next":
            try:
                return ["V", self.encode(next(target)), []]
            except StopIteration:
                return ["S"]
        return ["V", self._look(action, target, data), []]

    def _look(self, action: str, target: Any, data: tuple[Any, ...]) -> Any:
        if action == "get":
            return self.encode(getattr(target, data[0]))
        if action == "set":
            return setattr(target, data[0], self._decode(data[1]))
        if action == "item":
            return self.encode(target[self._decode(data[0])])
        if action == "put":
            target[self._decode(data[0])] = self._decode(data[1])
            return None
        if action == "iter":
            return self.handle(iter(target))
        if action == "len":
            return len(target)
        if action == "str":
            return str(target)
        raise ValueError(action)


def _builtin_name(error: BaseException) -> str:
    """The nearest builtin class of an exception: only those have a meaning for the judge."""
    names = [kind.__name__ for kind in type(error).__mro__ if kind.__module__ == "builtins"]
    return next((name for name in names if name not in ("object", "BaseException")), "Exception")


def load(source: str, names: dict[str, Any]) -> None:
    """Run a program to its end, which `exit()` brings, too: what it defined before can be called."""
    try:
        exec(compile(source, "<solution>", "exec"), names)
    except SystemExit as end:
        if end.code not in (None, 0):
            raise


def serve(channel: int, source: str, wanted: list[str], names: dict[str, Any]) -> None:
    """Run the program, announce what it made of the names that the tests want, answer the judge."""
    talk = _Conversation(channel)
    try:
        load(source, names)
    except BaseException as error:
        talk.send(["E", type(error).__name__[:60], str(error)[:200]])
        return
    talk.send(["names", [[name, talk.encode(names[name])] for name in wanted if name in names]])
    talk.serve()
