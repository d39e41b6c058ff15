"""pass@k by the unbiased estimator, for programs that pass all of their tests and for answers."""

from prime_lightning.evaluation import metrics
from prime_lightning.evaluation.statistics import pass_at_k, powers_of_two


class PassAtK(metrics.ProblemMetric):
    """`pass1`, `pass2`, `pass4`, ... up to the number of samples; a partly right program is wrong."""

    about = "Probability that one of k samples is right (arXiv 2107.03374, unbiased)."
    kind = "code"

    def problem(self, texts, scores):
        """The estimate for each k; unknown samples are left out, and NaN stands where fewer than k are known."""
        known = metrics.known_scores(scores)
        right = sum(score == 1.0 for score in known)
        return {
            f"pass{k}": pass_at_k(right, len(known), k) if k <= len(known) else float("nan")
            for k in powers_of_two(len(texts))
        }
