"""What is measured: sums and counts on their way to loggers, and figures of merit of PRM, credit and responses.

Sums and counts stay on the device where they were computed until the logging edge, where they become means once: to
read a number, the host waits for all work before it.

Shapes in names: `B` responses, `T` response tokens. `reward_B` is `beta * sum_t log(prm / reference)`; `outcome_B` the
outcome reward in [0, 1], NaN allowed where invalid; `valid_B` False = no known verdict; `mask_BT` True = a token we
train on. Figures are detached scalar tensors. What comes as `(sum, count)` is summed over micro-batches and ranks and
then divided; what comes as one number needs the responses of all ranks in one call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from prime_lightning.algorithms.masked import AllReduce, group_pairs, masked_sum

NOTHING = torch.zeros((), dtype=torch.double)


class Measures:
    """What one iteration measures.

    Example:
        >>> measures = Measures()
        >>> measures.add("prm/ce", torch.tensor(3.0), torch.tensor(4))
        >>> measures.add("prm/ce", torch.tensor(1.0), torch.tensor(4))
        >>> measures.means()
        {'prm/ce': 0.5}
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Begin anew."""
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, Tensor] = {}
        self._totals: dict[str, Tensor] = {}
        self._maxima: dict[str, Tensor] = {}

    def add(self, name: str, total: Tensor | float, count: Tensor | float = 1.0) -> None:
        """Add a sum over `count` things; with a count of 0 throughout, the sum itself is reported."""
        self._sums[name] = self._sums.get(name, NOTHING) + _number(total)
        self._counts[name] = self._counts.get(name, NOTHING) + _number(count)

    def add_all(self, totals: dict[str, Tensor], count: Tensor) -> None:
        """Add sums over the same things; a name that ends in `_max` is a maximum instead."""
        for name, total in totals.items():
            if name.endswith("_max"):
                value = _number(total)
                self._maxima[name] = torch.maximum(self._maxima.get(name, value), value)
            else:
                self.add(name, total, count)

    def total(self, name: str, value: Tensor | float) -> None:
        """Add to what happens on all ranks at once, such as seconds; that of the rank with the most is reported."""
        self._totals[name] = self._totals.get(name, NOTHING) + _number(value)

    def update(self, other: Measures) -> None:
        """Take over what another one measured, under names of its own."""
        for name in ("_sums", "_counts", "_totals", "_maxima"):
            getattr(self, name).update(getattr(other, name))

    def means(
        self, all_reduce: AllReduce | None = None, gather: Callable[[Any], list[Any]] | None = None
    ) -> dict[str, float]:
        """All means, sums, totals and maxima, over all ranks.

        Args:
            all_reduce: Reduces over ranks.
            gather: Gives what each rank has: their names, as one rank may have had nothing to measure.
        """
        sums, counts, highest = _read(self._sums, self._counts, self._totals | self._maxima)
        added, tops = sorted(sums), sorted(highest)
        if gather is not None:
            named = set().union(*gather({f"+{name}" for name in added} | {f"<{name}" for name in tops}))
            added, tops = ([name[1:] for name in sorted(named) if name[0] == kind] for kind in "+<")
        table = torch.stack([NOTHING, *(d.get(n, NOTHING) for n in added for d in (sums, counts))])
        maxima = torch.stack([NOTHING, *(highest.get(n, -torch.inf * (NOTHING + 1)) for n in tops)])
        if all_reduce is not None:
            table, maxima = all_reduce(table, "sum"), all_reduce(maxima, "max")
        pairs = zip(added, table[1:].view(-1, 2).tolist(), strict=True)
        return {n: s / c if c else s for n, (s, c) in pairs} | dict(zip(tops, maxima[1:].tolist(), strict=True))


def _number(value: Tensor | float) -> Tensor:
    return torch.as_tensor(value).detach().double()


def _read(*tables: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """The same numbers on the host, by one transfer from each device that has some."""
    numbers = [number for table in tables for number in table.values()]
    read = {
        device: iter(torch.stack([number for number in numbers if number.device == device]).cpu())
        for device in {number.device for number in numbers}
    }
    return [{name: next(read[number.device]) for name, number in table.items()} for table in tables]


def pairwise_accuracy(reward_B: Tensor, outcome_B: Tensor, group_B: Tensor, valid_B: Tensor) -> tuple[Tensor, Tensor]:
    """Pairs of one group that the PRM orders as the verifier does: `sum_{(i,j): o_i > o_j} [r_i > r_j]`.

    The accuracy plotted in PRIME, arXiv 2502.01456, Fig. 4 (`compute_dpo_accuracy`). A tie in reward counts one half.
    For outcomes 0 and 1, `sum / count` of one group without ties is the released number of that group. The released
    code differs in three ways: it averages over groups instead of over pairs, with 0.5 for a group that has none; it
    weighs a pair by `o_i - o_j`; and a tie is right or wrong by the order in which the two stand in the batch, so a
    PRM that still equals its reference may score anything from 0 to 1.

    Args:
        reward_B: `[B]` sequence rewards.
        outcome_B: `[B]` outcome rewards.
        group_B: `[B]` int group ids; all members of a group in one call.
        valid_B: `[B]` bool.

    Returns:
        `[]` number of pairs ordered rightly and `[]` number of pairs; sum both over calls and ranks, then divide.

    Example:
        >>> outcome_B, group_B = torch.tensor([1.0, 0.0, 0.0]), torch.tensor([0, 0, 0])
        >>> pairwise_accuracy(torch.tensor([2.0, 1.0, 2.0]), outcome_B, group_B, torch.tensor([True] * 3))
        (tensor(1.5000), tensor(2))
    """
    better, worse = group_pairs(outcome_B, group_B, valid_B)
    difference = reward_B.detach().float()[better] - reward_B.detach().float()[worse]
    right = (difference > 0).float() + 0.5 * (difference == 0).float()
    return right.sum(), valid_B.new_tensor(better.numel(), dtype=torch.long)


def auc(reward_B: Tensor, outcome_B: Tensor, valid_B: Tensor) -> Tensor:
    """Chance that a right response outranks a wrong one, of whatever prompts: `P(r_+ > r_-) + P(r_+ = r_-) / 2`.

    The area under the ROC curve of the sequence reward of PRIME, arXiv 2502.01456, Eq. 3. Unlike
    `pairwise_accuracy` it compares across prompts, so it also sees the constant per prompt that the group baseline
    cancels. Right is an outcome above 0.5.

    Args:
        reward_B: `[B]` sequence rewards; gather them first where there are several ranks.
        outcome_B: `[B]` outcome rewards.
        valid_B: `[B]` bool.

    Returns:
        `[]` in [0, 1]; NaN where one of the two kinds is missing.

    Example:
        >>> reward_B, outcome_B = torch.tensor([2.0, 1.0, 0.0]), torch.tensor([1.0, 0.0, 1.0])
        >>> auc(reward_B, outcome_B, torch.tensor([True, True, True]))
        tensor(0.5000)
    """
    from torchmetrics.functional.classification import binary_auroc  # here, because it takes as long as torch

    right_N = outcome_B[valid_B] > 0.5
    if right_N.all() or not right_N.any():
        return reward_B.new_tensor(torch.nan, dtype=torch.float32)
    _, rank_N = reward_B.detach().float()[valid_B].unique(return_inverse=True)  # it takes others for log-odds
    return binary_auroc(rank_N / len(rank_N), right_N.long(), validate_args=False)


def calibration_error(reward_B: Tensor, outcome_B: Tensor, valid_B: Tensor, bins: int = 10) -> Tensor:
    """Expected calibration error of `p = sigmoid(r)`: `sum_b (n_b / n) |mean_b(p) - mean_b(o)|` over equal-width bins.

    `sigmoid(r)` is what CE trains to be the chance of a right answer (PRIME, arXiv 2502.01456, L_CE).

    Args:
        reward_B: `[B]` sequence rewards; gather them first where there are several ranks.
        outcome_B: `[B]` outcome rewards, fractions allowed.
        valid_B: `[B]` bool.
        bins: How many bins [0, 1] is cut into.

    Returns:
        `[]` in [0, 1]; NaN where no response is valid.

    Raises:
        ValueError: If there is not at least one bin.

    Example:
        >>> reward_B, outcome_B = torch.zeros(4), torch.tensor([1.0, 1.0, 1.0, 0.0])
        >>> calibration_error(reward_B, outcome_B, torch.tensor([True] * 4))  # |0.5 - 0.75|
        tensor(0.2500)
    """
    if bins < 1:
        raise ValueError(f"Expected at least 1 in `bins`, got {bins}.")
    chance = reward_B.detach().float()[valid_B].sigmoid()
    gap = chance - outcome_B.float()[valid_B]
    index = (chance * bins).long().clamp(0, bins - 1)
    gap_of_bin = chance.new_zeros(bins).index_add(0, index, gap)
    return gap_of_bin.abs().sum() / gap.numel() if gap.numel() else chance.new_tensor(torch.nan)


def correlation(x_B: Tensor, y_B: Tensor, valid_B: Tensor) -> Tensor:
    """Pearson's correlation over the valid responses: `sum (x - mx)(y - my) / sqrt(sum (x - mx)^2 sum (y - my)^2)`.

    Of the process return with the outcome it says how much of the outcome the PRM of PRIME, arXiv 2502.01456, Eq. 3,
    has learned; of the process return with the length, how much it pays for mere length.

    Args:
        x_B: `[B]` numbers, of any unit.
        y_B: `[B]` numbers, of any unit.
        valid_B: `[B]` bool.

    Returns:
        `[]` float64 in [-1, 1]; NaN where either is constant to rounding, or fewer than two responses are valid.

    Raises:
        IndexError: From torch, when the shapes differ.

    Example:
        >>> x_B, y_B = torch.tensor([1.0, 2.0, 3.0, 9.0]), torch.tensor([1.0, 0.0, 2.0, -9.0])
        >>> correlation(x_B, y_B, torch.tensor([True, True, True, False]))
        tensor(0.5000, dtype=torch.float64)
    """
    x, y = x_B.detach().double()[valid_B], y_B.detach().double()[valid_B]
    if x.numel() < 2 or any(_is_constant(values) for values in (x, y)):
        return x.new_tensor(torch.nan)
    return torch.corrcoef(torch.stack([x, y]))[0, 1]


def _is_constant(values: Tensor) -> bool:
    """Whether numbers differ from their mean by its rounding only."""
    return bool((values - values.mean()).abs().max() <= 1e-12 * values.abs().max())


def last_token_share(reward_BT: Tensor, mask_BT: Tensor) -> tuple[Tensor, Tensor]:
    """Share of the absolute process reward that stands on the last tokens: `sum_i |r_iT| / sum_i sum_t |r_it|`.

    An implicit PRM (arXiv 2412.01981, Prop. 3.1) may put all it knows into the end token: it is then an outcome
    reward model and gives no credit to steps. Evenly spread rewards come to one over the mean length.

    Args:
        reward_BT: `[B, T]` process reward, before it is normalised or paid out per step.
        mask_BT: `[B, T]` bool.

    Returns:
        `[]` sum over last tokens under the mask and `[]` sum over all tokens, both of the absolute reward.

    Example:
        >>> last_token_share(torch.tensor([[1.0, -3.0, 9.0]]), torch.tensor([[True, True, False]]))
        (tensor(3.), tensor(4.))
    """
    size_BT = torch.where(mask_BT, reward_BT.detach().float().abs(), 0.0)
    last_BT = mask_BT & (mask_BT.flip(1).cumsum(1).flip(1) == 1)
    return masked_sum(size_BT, last_BT), size_BT.sum()


def advantage_share(process_BT: Tensor, outcome_BT: Tensor, mask_BT: Tensor) -> tuple[Tensor, Tensor]:
    """Share of the advantage that comes from process reward: `sum |A_p| / sum (|A_p| + |A_o|)`.

    The two sums of PRIME, arXiv 2502.01456, Eq. 5, apart, before anything is whitened.

    Args:
        process_BT: `[B, T]` credit of the process reward, weighted.
        outcome_BT: `[B, T]` credit of the outcome, weighted.
        mask_BT: `[B, T]` bool.

    Returns:
        `[]` absolute sum of the process part and `[]` absolute sum of both parts.

    Example:
        >>> mask_BT = torch.tensor([[True, True]])
        >>> advantage_share(torch.tensor([[0.5, -0.5]]), torch.tensor([[1.0, 1.0]]), mask_BT)
        (tensor(1.), tensor(3.))
    """
    process = masked_sum(process_BT.detach().abs(), mask_BT)
    return process, process + masked_sum(outcome_BT.detach().abs(), mask_BT)


def repetition(tokens_BT: Tensor, mask_BT: Tensor, n: int = 4) -> tuple[Tensor, Tensor]:
    """N-grams of a response that it has said before: `sum_i (N_i - distinct_i) / sum_i N_i`, `N_i = T_i - n + 1`.

    The `seq-rep-n` of Welleck et al., arXiv 1908.04319, over tokens. Exact: n-grams get numbers, not hashes.

    Args:
        tokens_BT: `[B, T]` token ids of 0 or more.
        mask_BT: `[B, T]` bool; an n-gram counts if all its tokens are under the mask.
        n: Tokens of an n-gram.

    Returns:
        `[]` n-grams that came before in their response and `[]` all n-grams.

    Raises:
        ValueError: If n is not at least 1.

    Example:
        >>> tokens_BT = torch.tensor([[5, 6, 5, 6, 5]])  # 56 65 56 65
        >>> repetition(tokens_BT, torch.ones(1, 5).bool(), n=2)
        (tensor(2), tensor(4))
    """
    if n < 1:
        raise ValueError(f"Expected `n` of at least 1, got {n}.")
    B, T = tokens_BT.shape
    width = T - n + 1
    if width < 1 or not B:
        return mask_BT.new_zeros((), dtype=torch.long), mask_BT.new_zeros((), dtype=torch.long)
    whole_BT = mask_BT.unfold(1, n, 1).all(-1)
    number_BT = torch.arange(B, device=tokens_BT.device)[:, None].expand(B, width)
    for start in range(n):  # number of (response, tokens so far), so that no two n-grams share one
        _, word_BT = torch.unique(tokens_BT[:, start : start + width], return_inverse=True)
        _, number_BT = torch.unique(number_BT * (word_BT.max() + 1) + word_BT, return_inverse=True)
    total = whole_BT.sum()
    return total - number_BT[whole_BT].unique().numel(), total
