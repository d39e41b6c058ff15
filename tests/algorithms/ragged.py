"""Random batches for the tests of the algorithms: the general kind, and the kind the released code can take."""

from types import SimpleNamespace

import torch


def batch(seed, *, sizes=(2, 3, 4, 3), length=7, holes=True, invalid=True):
    """Shuffled groups of unequal size with arbitrary ids, ragged masks with holes, NaN wherever nobody may look."""
    rng = torch.Generator().manual_seed(seed)
    count = sum(sizes)
    ids = torch.randperm(1000, generator=rng)[: len(sizes)] - 500
    order = torch.randperm(count, generator=rng)
    group_B = torch.repeat_interleave(ids, torch.tensor(sizes))[order]
    lengths_B = torch.randint(1, length + 1, (count,), generator=rng)
    mask_BT = torch.arange(length) < lengths_B[:, None]
    if holes:
        mask_BT &= torch.rand(count, length, generator=rng) < 0.8
    valid_B = torch.rand(count, generator=rng) < 0.8 if invalid else torch.ones(count, dtype=torch.bool)
    outcome_B = torch.randint(0, 5, (count,), generator=rng) / 4
    noise = [torch.randn(count, length, generator=rng) for _ in range(4)]
    process_BT, values_BT, policy_BT, proximal_BT = (torch.where(mask_BT, x_BT, torch.nan) for x_BT in noise)
    process_BT[~valid_B] = torch.nan
    reward_B = torch.randn(count, generator=rng)
    return SimpleNamespace(
        outcome_B=torch.where(valid_B, outcome_B, torch.nan),
        process_BT=process_BT,
        mask_BT=mask_BT,
        group_B=group_B,
        valid_B=valid_B,
        values_BT=values_BT,
        policy_BT=policy_BT - 2,
        proximal_BT=proximal_BT - 2,
        reward_B=torch.where(valid_B, reward_B, torch.nan),
        order=order,
    )


def dense(seed, *, groups=3, samples=4, length=9, binary=False):
    """Adjacent groups of one size, right-padded with zeros, everyone valid: what the release takes for granted."""
    rng = torch.Generator().manual_seed(seed)
    count = groups * samples
    lengths_B = torch.randint(1, length + 1, (count,), generator=rng)
    mask_BT = torch.arange(length) < lengths_B[:, None]
    labels_B = torch.randint(0, 2, (count,), generator=rng) if binary else torch.randint(0, 5, (count,), generator=rng)
    tokens = [torch.randn(count, length, generator=rng) * mask_BT for _ in range(4)]
    return SimpleNamespace(
        outcome_B=labels_B.float() / (1 if binary else 4),
        process_BT=tokens[0],
        values_BT=tokens[1],
        policy_BT=0.3 * tokens[2],
        proximal_BT=0.3 * tokens[3],
        mask_BT=mask_BT,
        group_B=torch.arange(count) // samples,
        valid_B=torch.ones(count, dtype=torch.bool),
        samples=samples,
    )
