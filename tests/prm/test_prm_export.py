"""Models of checkpoints as folders: the weights, what stands beside them, and what is refused."""

import json
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import tiny
import torch
from huggingface_hub import ModelCard
from prm_rows import CONF
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, Qwen2Config, Qwen2ForCausalLM

from prime_lightning.__main__ import main
from prime_lightning.models.options import Lora
from prime_lightning.models.pretrained import load_tokenizer, save
from prime_lightning.models.prm_folder import PRMConfig, write_model
from prime_lightning.prm import ImplicitPRM
from prime_lightning.training.strategies.checkpoint import AtomicCheckpointIO, Folder, read_metadata, role_weights


def export(ckpt, role, out, *more):
    return main(["export", f"--ckpt={ckpt}", f"--role={role}", f"--out={out}", *map(str, more)])


def weights_of(folder):
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


@pytest.mark.parametrize("role", ["policy", "prm"])
def test_a_checkpoints_models_are_those_of_the_end_of_the_run(prime_run, tmp_path, role):
    assert (
        export(prime_run / "checkpoints" / "last.ckpt", role, tmp_path / role, f"--reference={prime_run / 'policy'}")
        == 0
    )
    mine, at_the_end = weights_of(tmp_path / role), weights_of(prime_run / role)
    assert mine.keys() == at_the_end.keys()
    assert all(torch.equal(tensor, at_the_end[name]) for name, tensor in mine.items())
    assert AutoTokenizer.from_pretrained(tmp_path / role).get_vocab()
    assert GenerationConfig.from_pretrained(tmp_path / role).eos_token_id == 1
    text = (tmp_path / role / "README.md").read_text()
    assert ModelCard.load(tmp_path / role / "README.md").data.library_name == "transformers"
    assert f"prime-lightning fit --config {CONF / 'quickstart.yaml'}" in text
    assert "after 10 iterations" in text
    accuracy = re.search(r"\| rollout/accuracy \| (\S+) \|", text)
    assert 0 <= float(accuracy[1]) <= 1
    assert text == (prime_run / role / "README.md").read_text().replace(str(prime_run / role), str(tmp_path / role))


def test_the_prm_says_beta_reference_and_steps(prime_run, tmp_path):
    config = PRMConfig.read(prime_run / "prm")
    assert (config.beta, config.reference, config.steps.separator) == (0.5, "../policy", ";")
    assert config.loss == "prime_lightning.algorithms.prm_loss.ce"
    assert (config.granularity, config.normalise) == ("token", "batch_max")
    assert config.normalise_scale > 0
    assert ImplicitPRM.from_pretrained(prime_run / "prm").score(["^1+2="], ["3;#3"])[0].reward != 0
    out = tmp_path / "prm"  # the checkpoint's run had no reference of its own, and nothing says where its policy is
    assert export(prime_run / "checkpoints" / "last.ckpt", "prm", out) == 0
    assert json.loads((out / "implicit_prm.json").read_text())["reference"] is None
    with pytest.raises(ValueError, match=r"Expected the PRM in .* to name its reference, got none"):
        ImplicitPRM.from_pretrained(out)
    assert ImplicitPRM.from_pretrained(out, reference=None).score(["^1+2="], ["3;#3"])[0].reward < 0


def test_the_reference_is_the_frozen_model(prm_run, warm_model, tmp_path):
    ckpt = prm_run / "checkpoints" / "last.ckpt"
    assert export(ckpt, "reference", tmp_path / "reference") == 0
    start = weights_of(warm_model)
    assert all(torch.equal(tensor, start[name]) for name, tensor in weights_of(tmp_path / "reference").items())
    assert export(ckpt, "prm", tmp_path / "prm", "--dtype=bfloat16") == 0
    exported, trained = weights_of(tmp_path / "prm"), weights_of(prm_run / "prm")
    assert all(torch.equal(tensor, trained[name].bfloat16()) for name, tensor in exported.items())
    (tmp_path / "moved").mkdir()
    for name in ("prm", "reference"):  # both can be moved together
        (tmp_path / name).rename(tmp_path / "moved" / name)
    facts = json.loads((tmp_path / "moved" / "prm" / "implicit_prm.json").read_text())
    (tmp_path / "moved" / "prm" / "implicit_prm.json").write_text(json.dumps({**facts, "reference": "../reference"}))
    assert PRMConfig.read(tmp_path / "moved" / "prm").reference_beside(tmp_path / "moved" / "prm")


def test_tied_weights_and_adapters(chat_model, warm_model, tmp_path):
    from prime_lightning.models.pretrained import load_causal_lm

    tied = load_causal_lm(str(chat_model))
    write_model(tmp_path / "tied", str(chat_model), tied.state_dict().items())
    assert all(torch.equal(t, tied.state_dict()[n]) for n, t in weights_of(tmp_path / "tied").items())
    adapted = tiny.module(warm_model, policy_lora=Lora(rank=2, alpha=4.0), prm=None)
    checkpoint = tmp_path / "lora.ckpt"
    trainer = tiny.trainer(tmp_path, 2)
    trainer.fit(adapted, tiny.data(warm_model))
    trainer.save_checkpoint(checkpoint)
    assert export(checkpoint, "policy", tmp_path / "merged") == 0
    merged = weights_of(tmp_path / "merged")
    from prime_lightning.models.lora import merged_parameters

    for name, tensor in merged_parameters(adapted.policy.model):
        assert_close(merged[name], tensor)


MEASURED = """
    import sys, threading
    from prime_lightning.__main__ import main

    def held():  # memory that no file stands behind
        return int(open("/proc/self/status").read().split("RssAnon:")[1].split()[0]) * 1024

    def watch():
        global peak
        while not over.wait(0.002):
            peak = max(peak, held())

    import prime_lightning.cli.commands.export, transformers.models.qwen2.modeling_qwen2
    over, peak, before = threading.Event(), 0, held()
    threading.Thread(target=watch, daemon=True).start()
    for ckpt in sys.argv[1:]:
        assert main(["export", f"--ckpt={ckpt}", "--role=policy", f"--out={ckpt}.out"]) == 0
    over.set()
    print("grown by", peak - before)
"""


def test_export_holds_no_copy_of_the_weights(tmp_path, model_folder):
    """From a file and from a sharded run's folder, whose tensors stay on disk until each is written."""
    tokenizer = load_tokenizer(model_folder)
    size = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 6, "num_attention_heads": 8}
    model = Qwen2ForCausalLM(Qwen2Config(vocab_size=len(tokenizer), num_key_value_heads=8, **size))
    save(model, tokenizer, tmp_path / "start")
    weights = {f"policy.model.{name}": weight.detach() for name, weight in model.named_parameters()}
    run = {"metadata": {"names": {"policy": str(tmp_path / "start")}, "iterations": 1, "command": "", "numbers": {}}}
    AtomicCheckpointIO().save_checkpoint({"state_dict": weights, "prime": run}, tmp_path / "file.ckpt")
    folder = Folder(tmp_path / "folder.ckpt", "a", 0, 1)
    folder.begin()
    keys = {name: folder.add(id(weight), lambda weight=weight: weight) for name, weight in weights.items()}
    folder.flush()
    folder.commit({"state_dict": keys, "prime": run})
    there = [str(tmp_path / "file.ckpt"), str(tmp_path / "folder.ckpt")]
    words = [sys.executable, "-c", textwrap.dedent(MEASURED), *there]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    total = sum(weight.nbytes for weight in weights.values())
    assert int(done.stdout.split()[-1]) < total / 2, (done.stdout, total)
    assert_close(weights_of(f"{there[1]}.out"), {name: w.detach() for name, w in model.state_dict().items()})


def test_nothing_is_overwritten_and_what_is_no_checkpoint_is_refused(prime_run, tmp_path, capsys):
    ckpt = prime_run / "checkpoints" / "last.ckpt"
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    (tmp_path / "torn.ckpt").write_bytes(ckpt.read_bytes()[:5000])
    torch.save({"state_dict": {}}, tmp_path / "other.ckpt")
    torch.save([1], tmp_path / "list.ckpt")
    for arguments, words in (
        ((ckpt, "policy", tmp_path / "full"), "Expected a new or empty folder"),
        (
            (ckpt, "reference", tmp_path / "a"),
            r"with \['policy', 'prm'\]. Its reference was the policy of each",
        ),
        ((tmp_path / "none.ckpt", "policy", tmp_path / "a"), "none.ckpt"),
        ((tmp_path / "torn.ckpt", "policy", tmp_path / "a"), "torn.ckpt"),
        ((tmp_path / "other.ckpt", "policy", tmp_path / "a"), "names the models of its run"),
        ((tmp_path / "list.ckpt", "policy", tmp_path / "a"), "got .* with a list in it"),
    ):
        assert export(*arguments) == 2
        said = capsys.readouterr().err
        assert re.search(words, said), said
    assert [p.name for p in (tmp_path / "full").iterdir()] == ["mine.txt"]
    assert not (tmp_path / "a").exists()


def test_a_run_whose_models_are_not_here_says_which_and_where_it_looked(tmp_path, capsys):
    """A run that named its model by a relative path, exported from another folder."""
    run = {"metadata": {"names": {"policy": "runs/warm/policy"}, "iterations": 1, "command": "", "numbers": {}}}
    weights = {"policy.model.lm_head.weight": torch.zeros(1)}
    AtomicCheckpointIO().save_checkpoint({"state_dict": weights, "prime": run}, tmp_path / "last.ckpt")
    assert export(tmp_path / "last.ckpt", "policy", tmp_path / "out") == 2
    said = capsys.readouterr().err
    assert "'runs/warm/policy': there is no such folder here" in said
    assert str(Path.cwd()) in said


def test_weights_of_another_model_leave_nothing_behind(prime_run, chat_model, tmp_path):
    weights = dict(role_weights(prime_run / "checkpoints" / "last.ckpt", "policy"))
    with pytest.raises(ValueError, match=r"Expected the weights of '.*', got others in \d+ places"):
        write_model(tmp_path / "out", str(chat_model), weights.items())
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match=r"Expected a checkpoint with a critic, got .* with \['policy', 'prm'\]"):
        dict(role_weights(prime_run / "checkpoints" / "last.ckpt", "critic"))
    assert read_metadata(prime_run / "checkpoints" / "last.ckpt")["names"]["reference"] is None


def test_a_second_run_says_that_it_will_replace_models(prime_run, warm_model, tmp_path):
    from prime_lightning.training.callbacks.outputs import HuggingFaceExport

    (tmp_path / "policy").mkdir()
    with pytest.warns(UserWarning, match="When training ends, new models will replace those in .*policy"):
        tiny.trainer(tmp_path, 1, HuggingFaceExport(str(tmp_path))).fit(
            tiny.module(warm_model, prm=None), tiny.data(warm_model)
        )


def test_the_card_of_a_warm_start(warm_model):
    text = (warm_model / "README.md").read_text()
    assert "after 300 iterations" in text
    assert "(not started by a command)" in text
    assert "| loss |" in text
