"""Rewards by the PRM, token by token, against plain forward passes; the command; what is refused."""

import json
import re
import shutil
from types import SimpleNamespace

import pytest
import torch
from prm_rows import labelled_rows
from tokenizers.processors import TemplateProcessing
from toys import write_jsonl
from transformers import AutoModelForCausalLM, AutoTokenizer

from prime_lightning.__main__ import main
from prime_lightning.models.batch import Batch
from prime_lightning.models.options import Loading
from prime_lightning.models.prm_folder import PRMConfig
from prime_lightning.prm import ImplicitPRM, StepRule
from prime_lightning.prm.responses import prompt_ids
from prime_lightning.prompts.dataset import Template
from prime_lightning.rollout import Rollout, Sampling, Verdict
from prime_lightning.training.module import PrimeModule
from prime_lightning.training.options import ProcessReward

ROWS = list(labelled_rows(9, 1, seed=5))
PROMPTS, RESPONSES = [row["prompt"] for row in ROWS], [row["response"] for row in ROWS]


def slow_logprobs(folder, prompt, response, *, end=True):
    """Log-prob of each response token by one forward pass over one response."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    head, tail = tokenizer(prompt)["input_ids"], tokenizer(response)["input_ids"] + [tokenizer.eos_token_id] * end
    with torch.no_grad():
        table = model(torch.tensor([head + tail])).logits[0].log_softmax(-1)
    return [float(table[len(head) + t - 1, token]) for t, token in enumerate(tail)]


@pytest.mark.parametrize("end", [True, False])
def test_rewards_are_beta_times_the_log_ratio(prm_run, warm_model, end):
    for prompt, response, scored in zip(
        PROMPTS[:3],
        RESPONSES,
        ImplicitPRM.from_pretrained(prm_run / "prm").score(PROMPTS, RESPONSES, finished=end),
        strict=False,
    ):
        prm, reference = (slow_logprobs(f, prompt, response, end=end) for f in (prm_run / "prm", warm_model))
        expected = [0.5 * (a - b) for a, b in zip(prm, reference, strict=True)]
        assert scored.token_rewards == pytest.approx(expected, abs=1e-5)
        assert scored.reward == pytest.approx(sum(expected), abs=1e-5)
        assert scored.tokens == [*response, *["<eos>"] * end]  # one token a character
        a, b = (i + 1 for i, c in enumerate(response) if c == ";")
        assert scored.step_rewards == pytest.approx(
            [sum(expected[:a]), sum(expected[a:b]), sum(expected[b:])], abs=1e-5
        )
        assert (scored.steps, sum(scored.step_tokens)) == ([response[:a], response[a:b], response[b:]], len(expected))


def test_without_the_reference_it_is_beta_times_the_log_prob(prm_run):
    prm = ImplicitPRM.from_pretrained(prm_run / "prm", reference=None)
    for scored, prompt, response in zip(prm.score(PROMPTS[:2], RESPONSES[:2]), PROMPTS, RESPONSES, strict=False):
        expected = [0.5 * x for x in slow_logprobs(prm_run / "prm", prompt, response)]
        assert scored.token_rewards == pytest.approx(expected, abs=1e-5)


def test_what_else_is_in_the_batch_does_not_matter(prm_run):
    whole = ImplicitPRM.from_pretrained(prm_run / "prm").score(PROMPTS, RESPONSES)
    packed = Loading(packed=True, chunk_tokens=3)
    shared = Loading(packed=True, attention="varlen")
    for options in (
        {"micro_tokens": 1},
        {"loading": packed, "micro_tokens": 40},
        {"loading": shared, "micro_tokens": 40},
        {"loading": shared},
    ):
        other = ImplicitPRM.from_pretrained(prm_run / "prm", **options).score(PROMPTS[::-1], RESPONSES[::-1])
        for a, b in zip(whole, other[::-1], strict=True):
            assert a.token_rewards == pytest.approx(b.token_rewards, abs=1e-5)
    assert ImplicitPRM.from_pretrained(prm_run / "prm").score([], []) == []


def test_they_are_the_rewards_of_the_online_prm(prm_run, warm_model, engine):
    from prime_lightning.prompts.arithmetic import ArithmeticPrompts

    prompts = [ArithmeticPrompts(operations=2).prompt(i, engine.tokenizer) for i in range(4)]
    sampled = engine.stream(prompts, Sampling(samples=2, max_tokens=9))
    groups = [[Rollout(prompt=p, completion=c, verdict=Verdict.of_score(1.0)) for c in done] for p, done in sampled]
    module = PrimeModule(
        str(warm_model), prm=str(prm_run / "prm"), reference=str(warm_model), process_reward=ProcessReward(beta=0.5)
    )
    module.configure_model()
    module._trainer = SimpleNamespace(world_size=1, global_step=0)
    batch = Batch.of_groups(groups)
    online_BT = module.predict_step(batch, 0)["process_BT"]
    prm, compared = ImplicitPRM.from_pretrained(prm_run / "prm"), 0
    for rollout, online_T in zip(batch.rollouts, online_BT, strict=True):
        done = rollout.completion
        if done.text.strip() and prm.tokenizer(done.text)["input_ids"] == [t for t in done.token_ids if t > 1]:
            [scored] = prm.score([rollout.prompt.text], [done.text], finished=not done.truncated)
            if len(scored.tokens) == len(done.token_ids):
                assert scored.token_rewards == pytest.approx(online_T[: len(done.token_ids)].tolist(), abs=1e-5)
                compared += 1
    assert compared >= 3


def tokens(prompt, tokenizer):
    return prompt_ids(Rollout.from_row({"prompt": prompt, "completion": ""}, "").prompt, tokenizer)


def test_prompts_are_texts_or_chat_messages(chat_model, prm_run):
    tokenizer = AutoTokenizer.from_pretrained(chat_model)
    asked = [{"role": "user", "content": "How many hens?"}]
    text, ids = Template(user="How many hens?").encode({}, tokenizer)
    assert tokens(asked, tokenizer) == list(ids) == tokens(text, tokenizer)
    config = PRMConfig(beta=1.0, reference=None, steps=StepRule(rule="newline"))
    prm = ImplicitPRM.from_pretrained(chat_model, config=config, reference=None)
    rows = prm.score([asked, text], ["Two\nhens: é.\n"] * 2)
    assert rows[0] == rows[1]
    assert rows[0].steps == ["Two\n", "hens: é.\n"]
    assert sum(rows[0].step_rewards) == pytest.approx(rows[0].reward)
    with pytest.raises(ValueError, match="Expected a tokenizer with a chat template"):
        ImplicitPRM.from_pretrained(prm_run / "prm").score([asked], ["7"])


def test_a_begin_token_comes_once(chat_model):
    tokenizer = AutoTokenizer.from_pretrained(chat_model)
    begin = tokenizer.convert_tokens_to_ids("<|user|>")
    tokenizer.bos_token = "<|user|>"
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|user|> $A", special_tokens=[("<|user|>", begin)]
    )
    once = [begin, *tokenizer("How", add_special_tokens=False)["input_ids"]]
    assert tokens("How", tokenizer) == once == tokens("<|user|>How", tokenizer)


def score(prm, rows, output, *more):
    return main(["score", f"--input={rows}", f"--out={output}", f"--prm.folder={prm}", *map(str, more)])


def test_the_command_adds_rewards_to_each_row(prm_run, tmp_path, capsys):
    rows = [{"id": str(i), "prompt": p, "response": r} for i, (p, r) in enumerate(zip(PROMPTS, RESPONSES, strict=True))]
    out = tmp_path / "deep" / "out.jsonl"
    assert score(prm_run / "prm", write_jsonl(tmp_path / "in.jsonl", rows), out) == 0
    expected = ImplicitPRM.from_pretrained(prm_run / "prm").score(PROMPTS, RESPONSES)
    written = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["id"] for row in written] == [row["id"] for row in rows]
    for row, one in zip(written, expected, strict=True):
        assert (row["token_texts"], row["step_texts"]) == (one.tokens, one.steps)
        assert row["token_rewards"] == pytest.approx(one.token_rewards, abs=1e-6)
        assert row["reward"] == pytest.approx(one.reward, abs=1e-6)
    assert f"Scored {len(rows)} responses with the reference" in capsys.readouterr().out
    several = write_jsonl(tmp_path / "several.jsonl", [{"prompt": PROMPTS[0], "responses": RESPONSES[:2]}])
    for detail, names in (("step", {"step_texts", "step_rewards"}), ("response", set())):
        out = tmp_path / f"{detail}.jsonl"
        assert (
            score(prm_run / "prm", several, out, f"--detail={detail}", "--prm.reference=null", "--steps.rule=newline")
            == 0
        )
        [row] = [json.loads(line) for line in out.read_text().splitlines()]
        assert row.keys() == {"prompt", "responses", "reward"} | names
        assert len(row["reward"]) == 2
        assert max(row["reward"]) < 0


def test_a_runs_rollouts_are_scored_as_they_are(prime_run, tmp_path):
    lines = [json.loads(line) for line in (prime_run / "rollouts.jsonl").read_text().splitlines()]
    rows = write_jsonl(tmp_path / "rollouts.jsonl", [line for line in lines if line["completion"].strip()])
    assert score(prime_run / "prm", rows, tmp_path / "out.jsonl") == 0
    for line in map(json.loads, (tmp_path / "out.jsonl").read_text().splitlines()):
        assert len(line["token_rewards"]) == len(line["tokens"])


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"prompt": "1"}, r"Expected exactly one of completion, response in line 1 of .* got \['prompt'\]"),
        ({"prompt": "1", "response": "2", "completion": "2"}, r"exactly one of .* got \['completion', 'response'\]"),
        ({"response": "2"}, r"Expected a prompt in line 1 of .* got none in the columns \['response'\]"),
        ({"prompt": "", "response": "2"}, "Expected a prompt in line 1 of"),
        ({"prompt": "1", "response": " "}, r"Expected no empty responses .* got 1 of 1 \(rows \[0\]"),
        ({"prompt": "1", "responses": []}, r"Expected a list of responses in line 1 of .* got \[\]"),
        ({"prompt": "1", "response": 2}, "Expected text in `response` of line 1 of .* got 2"),
        (
            {"prompt": "1", "response": "2", "reward": 3},
            r"the columns that are to be written, got \['reward'\]",
        ),
        (
            {"prompt": "1", "response": "2" * 200},
            "prompt and response to fit the PRM's 128 positions, got 202",
        ),
    ],
)
def test_rows_that_cannot_be_scored_are_refused(row, words, prm_run, tmp_path, capsys):
    assert score(prm_run / "prm", write_jsonl(tmp_path / "in.jsonl", [row]), tmp_path / "out.jsonl") == 2
    said = capsys.readouterr().err
    assert re.search(words, said), said
    assert "Traceback" not in said


def test_folders_that_are_no_prm_are_refused(prm_run, warm_model, chat_model, tmp_path, capsys):
    rows = write_jsonl(tmp_path / "in.jsonl", [{"prompt": "^1+1=", "response": "2;#2"}])
    bare, odd = tmp_path / "bare", tmp_path / "odd"
    shutil.copytree(prm_run / "prm", bare, ignore=shutil.ignore_patterns("implicit*"))
    shutil.copytree(prm_run / "prm", odd)
    (odd / "implicit_prm.json").write_text('{"beta": 0.1, "references": "x"}')
    (tmp_path / "out").write_text("mine")
    given = ("--prm.config.beta=0.5", f"--prm.config.reference={warm_model}")
    assert score(bare, rows, tmp_path / "given.jsonl", *given) == 0
    for prm, output, more, words in (
        (bare, "a", (), r"Expected implicit_prm.json in the PRM's folder .* got none"),
        (odd, "b", (), "Expected the configuration of a PRM in .* got something else: .*references"),
        (
            prm_run / "prm",
            "c",
            (f"--prm.reference={chat_model}",),
            "the reference to have the PRM's tokenizer",
        ),
        (tmp_path / "none", "d", (), "Expected implicit_prm.json in the PRM's folder"),
        (prm_run / "prm", "out", (), "Expected a new file to write"),
        (prm_run / "prm", "e", ("--prm.reference=no/where",), "got 'no/where': there is no such folder"),
    ):
        assert score(prm, rows, tmp_path / output, *more) == 2
        said = capsys.readouterr().err
        assert re.search(words, said), said
    assert (tmp_path / "out").read_text() == "mine"
