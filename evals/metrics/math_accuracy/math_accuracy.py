"""Share of right answers, by the verifier that is the training reward."""

from prime_lightning.evaluation import metrics


class MathAccuracy(metrics.ProblemMetric):
    """`accuracy` of one sample a problem, `avgK` of K samples: the mean over samples, then over problems."""

    about = "Share of right final answers; avg@K over K samples of each problem."

    def problem(self, texts, scores):
        """Mean of the known scores; NaN where none is known."""
        known = metrics.known_scores(scores)
        name = "accuracy" if len(texts) == 1 else f"avg{len(texts)}"
        return {name: sum(known) / len(known) if known else float("nan")}
