"""A user's own verifiers, as tests name them by import path."""

from __future__ import annotations

import os
import socket
import time

from prime_lightning.rollout import Prompt


def share_of_a(prompt: Prompt, completion: str) -> float:
    return completion.count("a") / len(completion)


def answer_is_in(prompt: Prompt, completion: str) -> bool:
    return prompt.answer in completion and prompt.row["n"] == 3


def hangs(prompt: Prompt, completion: str) -> float:
    while completion == "hang":
        pass
    return 1.0


def sleeps(prompt: Prompt, completion: str) -> float:
    time.sleep(1000)
    return 1.0


def raises(prompt: Prompt, completion: str) -> float:
    raise KeyError("lost")


def dies(prompt: Prompt, completion: str) -> float:
    os._exit(3)


def too_much(prompt: Prompt, completion: str) -> float:
    return 7.0


def no_number(prompt: Prompt, completion: str) -> str:
    return "good"


def opens_socket(prompt: Prompt, completion: str) -> float:
    socket.socket().close()
    return 1.0


def sees_environment(prompt: Prompt, completion: str) -> float:
    return float(os.environ.get("PRIME_TEST_TOKEN") == "seen")
