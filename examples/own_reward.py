"""A reward of one's own in one call: a tiny random model learns to write even digits. A minute on a laptop."""

import prime_lightning
from prime_lightning.prompts.arithmetic import write_model

EVEN = set("02468")


def reward(prompt, completion, row):
    """The share of digits that are even; 0 without a digit."""
    digits = [c for c in completion if c.isdigit()]
    return sum(c in EVEN for c in digits) / max(len(digits), 1)


if __name__ == "__main__":
    model = str(write_model("runs/even/init", seed=0))  # or one of the hub: "Qwen/Qwen2.5-0.5B-Instruct"
    rows = [{"problem": f"^{a}+{b}=", "answer": "even"} for a in range(10) for b in range(10)]
    run = prime_lightning.train(
        model,
        rows,
        reward,
        folder="runs/even/prime",
        max_steps=20,
        sampling={"max_tokens": 12},
        accuracy_filter={"low": 0.0, "high": 1.0},
        policy_optimizer={"class_path": "torch.optim.AdamW", "init_args": {"lr": 3e-3}},
        prm_optimizer={"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-3}},
    )
    print(run.metrics[["rollout/accuracy", "prm/accuracy"]].iloc[[0, -1]])
    print("Report:", run.report())
