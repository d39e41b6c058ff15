"""What the released code of PRIME computes, transcribed for comparison; slow and plain on purpose.

Sources: PRIME-RL/PRIME, training/verl: `trainer/ppo/core_algos.py`, `utils/torch_functional.py`,
`workers/actor/dp_prime.py`; verl's recipe/prime/`prime_core_algos.py` for the detached DPO loss. Behaviour is kept,
code is not; every docstring names the release's function and what it takes for granted about its input.
"""

import torch


def rloo_returns(outcome_B, process_BT, mask_BT, samples, gamma_outcome, gamma_process):
    """`compute_rloo_returns` up to the whitening. Takes for granted: groups of one size, adjacent, dense masks, no
    response without tokens (its mean would be NaN), everyone valid."""
    total_BT = torch.zeros_like(process_BT)
    last_only_BT = torch.zeros_like(mask_BT)
    for i, length in enumerate(mask_BT.sum(1).tolist()):
        last_only_BT[i, length - 1] = True
    outcome_BT = torch.where(last_only_BT, outcome_B[:, None], 0.0)
    for reward_BT, where_BT, gamma in ((process_BT, mask_BT, gamma_process), (outcome_BT, last_only_BT, gamma_outcome)):
        shifted_BT = torch.zeros_like(reward_BT)
        for start in range(0, len(reward_BT), samples):
            members = range(start, start + samples)
            baseline = sum(reward_BT[j][where_BT[j]].mean() for j in members) / (samples - 1)
            for j in members:
                shifted_BT[j][where_BT[j]] = reward_BT[j][where_BT[j]] * (samples / (samples - 1)) - baseline
        running_B = torch.zeros(len(reward_BT))
        for t in range(reward_BT.shape[1] - 1, -1, -1):
            running_B = shifted_BT[:, t] + gamma * running_B
            total_BT[:, t] += running_B
    return total_BT


def whiten(x_BT, mask_BT):
    """`masked_whiten`: a product with the mask (NaN leaks in), unbiased variance, and no zeroing of the padding."""
    weight_BT = mask_BT.float()
    n = weight_BT.sum()
    mean = (x_BT * weight_BT).sum() / n
    variance = ((x_BT - mean) ** 2 * weight_BT).sum() / n * (n / (n - 1))
    return (x_BT - mean) * torch.rsqrt(variance + 1e-8)


def ce(log_ratio_BT, outcome_B, mask_BT, beta):
    """`compute_ce_dpo_loss_rm`: the mean over a micro-batch of BCE after a sigmoid."""
    chance_B = torch.sigmoid((log_ratio_BT * mask_BT).sum(1) * beta)
    return torch.nn.functional.binary_cross_entropy(chance_B, outcome_B)


def group_accuracies(log_ratio_BT, outcome_B, mask_BT, samples):
    """`compute_dpo_accuracy` before its final mean: one number per group. Takes for granted: no ties in the score."""
    score_B = (log_ratio_BT * mask_BT).sum(1)
    shares = []
    for start in range(0, len(score_B), samples):
        agreed = weight = 0.0
        for a in range(start, start + samples):
            for b in range(a + 1, start + samples):
                gap = float(outcome_B[a] - outcome_B[b])
                agreed += abs(gap) * float((score_B[a] - score_B[b] > 0) == (gap > 0))
                weight += abs(gap)
        shares.append(agreed / weight if weight else 0.5)
    return shares


def policy_loss(policy_BT, old_BT, advantage_BT, mask_BT, clip):
    """`compute_policy_loss`: loss, clip fraction and old-to-new KL (k1), each a token mean over the micro-batch."""
    count = mask_BT.float().sum()
    ratio_BT = torch.exp(policy_BT - old_BT)
    plain_BT = -advantage_BT * ratio_BT
    bounded_BT = -advantage_BT * ratio_BT.clamp(1 - clip, 1 + clip)
    loss = (torch.max(plain_BT, bounded_BT) * mask_BT).sum() / count
    return loss, ((bounded_BT > plain_BT) * mask_BT).sum() / count, ((old_BT - policy_BT) * mask_BT).sum() / count


def value_loss(values_BT, old_BT, returns_BT, mask_BT, clip):
    """`compute_value_loss`: loss and clip fraction, each a token mean."""
    near_BT = torch.max(torch.min(values_BT, old_BT + clip), old_BT - clip)
    free_BT, bounded_BT = (values_BT - returns_BT) ** 2, (near_BT - returns_BT) ** 2
    count = mask_BT.float().sum()
    loss = 0.5 * (torch.max(free_BT, bounded_BT) * mask_BT).sum() / count
    return loss, ((bounded_BT > free_BT) * mask_BT).sum() / count


def gae(reward_BT, values_BT, mask_BT, gamma, lam):
    """`compute_gae_advantage_return`. The mask reaches only the whitening, so it takes for granted that rewards and
    values are zero after the last token: any other value there is bootstrapped from."""
    advantage_BT, running_B, after_B = torch.zeros_like(reward_BT), 0.0, 0.0
    for t in range(reward_BT.shape[1] - 1, -1, -1):
        running_B = reward_BT[:, t] + gamma * after_B - values_BT[:, t] + gamma * lam * running_B
        advantage_BT[:, t], after_B = running_B, values_BT[:, t]
    return whiten(advantage_BT, mask_BT), advantage_BT + values_BT


def batch_norm(score_BT):
    """`prime_norm: batch_norm`: over the rank's padded matrix, so it takes for granted zeros in the padding."""
    suffix_BT = torch.stack([score_BT[:, t:].sum(1) for t in range(score_BT.shape[1])], 1)
    return score_BT / (suffix_BT.abs().max() + 1e-6)


def whole(log_ratio_BT, mask_BT):
    """`prime_granularity: whole`: the response's sum on its last token."""
    score_BT = torch.zeros_like(log_ratio_BT)
    for i, length in enumerate(mask_BT.sum(1).tolist()):
        score_BT[i, length - 1] = log_ratio_BT[i, :length].sum()
    return score_BT


def detached_dpo(log_ratio_BT, outcome_B, mask_BT, beta, samples):
    """The recipe's `compute_detach_dpo_loss_rm` of mode `none`; its batch-wide Q values are of the same forward."""
    score_B = (log_ratio_BT * mask_BT).sum(1)
    losses = []
    for i in range(len(score_B)):
        group = slice(i // samples * samples, i // samples * samples + samples)
        others, labels = score_B[group].detach(), outcome_B[group]
        against = others[labels < outcome_B[i]] if outcome_B[i] > 0 else others[labels > outcome_B[i]]
        margin = score_B[i] * beta - (against.mean() * beta if len(against) else 0.0)
        losses.append(-torch.log(torch.sigmoid(margin if outcome_B[i] > 0 else -margin)))
    return torch.stack(losses).mean()
