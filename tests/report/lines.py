"""Lines of rollouts.jsonl, hostile ones among them."""

import json

HOSTILE = [
    "</script><script>window.pwned=1</script>",
    "<img src=x onerror=window.pwned=1>",
    "<!--<script>",
    "\x1b[31mred\x1b[0m \x1b]0;title\x07",
    "\ud800 lone \udfff",
    "\u202eright to left\u202c \u200f",
    "nul \x00 bell \x07 \u2028 \u2029",
    "' onmouseover='window.pwned=1' \"&amp;&lt;",
    "\U000e0041 tag \ufeff",
    "{{ 7 * 7 }} {% raw %} ${window.pwned=1}",
    "javascript:window.pwned=1",
]


def row(iteration=0, draw=0, verdict="correct", tokens=("7", ";"), **more):
    """A line of rollouts.jsonl."""
    values = [0.25 * (i + 1) * (-1) ** i for i in range(len(tokens))]
    return {
        "iteration": iteration, "draw": draw, "source": "sums", "prompt": f"^{draw}+1=", "answer": "7",
        "completion": "".join(tokens), "tokens": list(tokens), "finish": "stop", "verdict": verdict,
        "score": float(verdict == "correct"), "beta": 0.5, "scale": 2.0, "process_reward": values, "advantage": values,
    } | more  # fmt: skip


def write_rollouts(folder, rows):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "rollouts.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return folder
