"""Every conf/model/*.yaml: parsed, planned and built without weights, by the published numbers of its model."""

import json
import re
from pathlib import Path

import pytest
import tiny
from toys import write_jsonl

from prime_lightning.__main__ import main
from prime_lightning.cli.lightning_cli import parsed
from prime_lightning.prompts.arithmetic import build_tokenizer
from prime_lightning.prompts.dataset import DatasetPrompts, MixedPrompts, Template
from prime_lightning.training.plan.setup import setup_of
from prime_lightning.training.plan.shape import read_config, shape_of

HERE = Path(__file__).parent
PUBLISHED = json.loads((HERE / "published.json").read_text())
ZERO3, ONE = ("--config", "conf/engine/vllm.yaml"), ("--config", "conf/strategy/one_gpu.yaml")
SMALL = ("--config", "conf/strategy/one_gpu_24gb.yaml")
PLANS = [  # GiB of a GPU that is enough, as the files say, and of one that is not
    ("qwen2.5-1.5b-instruct", ONE, 80, 40),
    ("qwen2.5-1.5b-instruct", SMALL, 24, 16),
    ("qwen2.5-7b-instruct", ZERO3, 80, 24),
    ("qwen3-4b", ZERO3, 80, 16),
    ("qwen3-4b-thinking", ZERO3, 80, 16),
    ("llama-3.2-1b-instruct", ONE, 80, 24),
    ("gemma-3-1b-it", ONE, 80, 16),
]
CHATML = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
THINKS = CHATML + "{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}"
NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + CHATML
FOLDS = (  # as Gemma 3 does it itself
    "{% set first = messages[0]['content'] + '\n\n' if messages[0]['role'] == 'system' else '' %}"
    "{% for m in messages if m.role != 'system' %}<{{ m.role }}>{{ first if loop.first else '' }}{{ m.content }}"
    "{% endfor %}<assistant>"
)


@pytest.fixture
def _here(monkeypatch):
    monkeypatch.chdir(HERE.parents[1])


def layers(name, more=()):
    return [
        "--config",
        "conf/prime.yaml",
        "--config",
        f"conf/model/{name}.yaml",
        *more,
        "--config",
        "conf/data/gsm8k.yaml",
    ]


def test_every_model_is_here():
    named = {p.stem for p in (HERE.parents[1] / "conf" / "model").glob("*.yaml")}
    assert {name for name, *_ in PLANS} == named - {
        "lora",
        "qwen2.5-0.5b-instruct",
        "smollm2-135m",
    }  # other tests have these


@pytest.mark.usefixtures("_here")
@pytest.mark.parametrize(
    ("name", "more", "enough", "little"), PLANS, ids=[f"{name}-{gib}" for name, _, gib, _ in PLANS]
)
def test_the_plan_says_what_the_file_says(name, more, enough, little, tmp_path, capsys):
    config = parsed(layers(name, more))
    model = PUBLISHED[config.model.policy]
    file = tmp_path / "config.json"
    file.write_text(json.dumps(model["config"]))
    shape = shape_of(read_config(config.model.policy, str(file)), config.model.loading.attention)  # on the meta device
    assert shape.parameters == model["parameters"]
    setup = setup_of(config, None, {"": str(file)})
    assert {role: shape.parameters for role, shape in setup.shapes.items()}.keys() == {"policy", "prm", "reference"}
    assert setup.prompt_tokens + setup.response_tokens <= model["config"]["max_position_embeddings"]
    assert main(["plan", *layers(name, more), "--model-config", str(file), "--gpu-memory", str(enough)]) == 0
    said = capsys.readouterr().out
    assert f"{model['parameters']:,} parameters" in said
    (peak,) = re.findall(r"at the peak +([\d.]+)  of .*: fits", said)
    assert little < float(peak) <= enough


@pytest.mark.usefixtures("_here")
@pytest.mark.parametrize(("name", "thinks"), [("qwen3-4b", False), ("qwen3-4b-thinking", True)])
def test_thinking_is_a_variable_of_the_chat_template(name, thinks, tmp_path):
    rows = write_jsonl(tmp_path / "rows.jsonl", [{"problem": "1+1=", "answer": "2"}])
    config = parsed(layers(name))
    tokenizer = build_tokenizer()
    tokenizer.chat_template = THINKS
    own = Template(user="{problem}", chat_template_kwargs={"enable_thinking": not thinks})
    mixed = MixedPrompts([DatasetPrompts(rows), DatasetPrompts(rows, template=own)])
    plain = DatasetPrompts(rows, template=Template(user="{problem}", chat=False))
    tiny.data("none", train=mixed, validation=plain, chat_template_kwargs=config.data.chat_template_kwargs)
    texts = [mixed.prompt(draw, tokenizer).text for draw in (0, 1)]
    assert ["<think></think>" in text for text in texts] == [not thinks, thinks]  # a template's own word goes before
    assert plain.prompt(0, tokenizer).text == "1+1="


@pytest.mark.parametrize("template", [NO_SYSTEM, FOLDS])
def test_without_a_system_role_the_message_leads_the_users(template, tmp_path, recwarn):
    rows = write_jsonl(tmp_path / "rows.jsonl", [{"problem": "1+1=", "answer": "2"}])
    tokenizer = build_tokenizer()
    tokenizer.chat_template = template
    prompts = DatasetPrompts(rows, template=Template(user="{problem}", system="Be brief."))
    assert prompts.prompt(0, tokenizer).text == "<user>Be brief.\n\n1+1=<assistant>"
    assert any("no system role" in str(warning.message) for warning in recwarn) is (template is NO_SYSTEM)
