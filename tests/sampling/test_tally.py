"""Counts of sampled groups and sums of measures, against plain sums."""

import math
import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from toys import rollout

from prime_lightning.algorithms.measures import Measures
from prime_lightning.rollout import Finish, Label
from prime_lightning.sampling.acceptance import Tally

scores = st.sampled_from([0.0, 0.25, 1.0, None])
groups = st.lists(st.tuples(scores, st.integers(1, 9), st.sampled_from(list(Finish))), min_size=1, max_size=6)
reasons = st.sampled_from([None, None, "too_hard", "too_easy"])
LABELS = {0.0: Label.WRONG, 0.25: Label.PARTIAL, 1.0: Label.CORRECT, None: Label.UNKNOWN}


@given(st.lists(st.tuples(groups, reasons), min_size=1, max_size=8))
def test_a_tally_is_plain_counting(sampled):
    tally = Tally()
    for group, reason in sampled:
        tally.add([rollout(response=[2] * n, score=score, finish=finish) for score, n, finish in group], reason)
    rows = [row for group, _ in sampled for row in group]
    known = [score for score, _, _ in rows if score is not None]
    summary = tally.measures().means()
    mean = sum(known) / len(known) if known else 0.0
    assert summary["rollout/accuracy"] == pytest.approx(mean)
    assert summary["rollout/acceptance"] == sum(reason is None for _, reason in sampled) / len(sampled)
    assert (summary["rollout/groups"], summary["rollout/responses"]) == (len(sampled), len(rows))
    assert summary["rollout/tokens"] == sum(n for _, n, _ in rows)
    assert summary["rollout/length"] == pytest.approx(sum(n for _, n, _ in rows) / len(rows))
    assert summary["rollout/truncated"] == pytest.approx(sum(f is Finish.LENGTH for _, _, f in rows) / len(rows))
    assert summary["rollout/unknown"] == pytest.approx(1 - len(known) / len(rows))
    for score, label in LABELS.items():
        assert summary.get(f"verdict/sums/{label}", 0) == sum(s == score for s, _, _ in rows)
    for reason in ("too_hard", "too_easy"):
        assert summary.get(f"filter/{reason}", 0) == sum(r == reason for _, r in sampled)
    assert all(isinstance(value, float) and math.isfinite(value) for value in summary.values())


def test_rejections_are_named_with_their_counts():
    tally = Tally()
    assert tally.rejected() == "none"
    for reason in ("too_hard", None, "too_hard", "truncated"):
        tally.add([rollout()], reason)
    assert tally.rejected() == "too_hard 2, truncated 1"


def test_time_adds_up_by_phase():
    tally = Tally()
    tally.add([rollout(response=[2] * 50)], None)
    assert tally.measures().means()["rollout/tokens_per_second"] == 0
    for phase in ("sample", "verify", "sample"):
        with tally.timed(phase):
            time.sleep(0.02)
    summary = tally.measures().means()
    assert summary["time/sample"] > summary["time/verify"] >= 0.02
    assert summary["rollout/tokens_per_second"] == pytest.approx(50 / summary["time/sample"])


parts = st.lists(st.tuples(st.floats(-1e6, 1e6), st.integers(0, 1000)), min_size=1, max_size=9)


@given(parts)
def test_means_are_sums_over_counts(numbers):
    measures = Measures()
    for total, count in numbers:
        measures.add("prm/ce", torch.tensor(total, dtype=torch.double), count)
    total, count = sum(t for t, _ in numbers), sum(c for _, c in numbers)
    assert measures.means() == {"prm/ce": pytest.approx(total / count if count else total)}


def test_maxima_are_told_by_their_name():
    measures = Measures()
    for high, low in ((1.0, -3.0), (4.0, -1.0), (2.0, -2.0)):
        totals = {"ratio_max": torch.tensor(high), "low_max": torch.tensor(low), "clipped": torch.tensor(high)}
        measures.add_all(totals, torch.tensor(10))
    assert measures.means() == {"ratio_max": 4.0, "low_max": -1.0, "clipped": 7.0 / 30}


def test_means_of_two_ranks_are_those_of_one_that_has_seen_all():
    ranks = [Measures(), Measures()]
    whole = Measures()
    for i, (total, count) in enumerate([(3.0, 2), (8.0, 5), (1.0, 1)]):
        totals = {"loss": torch.tensor(total), "ratio_max": torch.tensor(total)}
        for measures in (ranks[i % 2], whole):
            measures.add_all(totals, torch.tensor(count))
    # What the other rank contributes is recorded first, in the order of the calls.
    sent = []
    ranks[1].means(lambda tensor, how: (sent.append(tensor), tensor)[1])
    join = {"sum": torch.add, "max": torch.maximum}
    assert ranks[0].means(lambda tensor, how: join[how](tensor, sent.pop(0))) == whole.means()


def test_nothing_measured_is_nothing_reported():
    assert Measures().means() == {}
    assert Measures().means(lambda tensor, how: tensor) == {}


def test_measures_keep_no_graph_and_show_what_is_not_finite():
    measures = Measures()
    x = torch.tensor(2.0, requires_grad=True)
    measures.add("loss", x * 3, torch.tensor(2))
    measures.add("broken", torch.tensor(torch.nan), 4)
    assert measures.means()["loss"] == 3.0
    assert math.isnan(measures.means()["broken"])
