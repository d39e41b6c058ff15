"""maj@K: is the answer that most samples give a right one."""

from prime_lightning.evaluation import metrics
from prime_lightning.evaluation.statistics import majority
from prime_lightning.verifiers import VOTING, final_answer


class MajorityVote(metrics.ProblemMetric):
    """`majK` over all K samples of a problem; a tie is decided by lot, so its value is a probability."""

    about = "Share of problems whose most frequent answer is right (self-consistency, arXiv 2203.11171)."

    def problem(self, texts, scores):
        """Unknown samples do not vote; NaN where none is known, and for a kind without final answers (programs)."""
        voters = [(text, score) for text, score in zip(texts, scores, strict=True) if score is not None]
        answers = [final_answer(text, self.kind, self.answer) for text, _ in voters]
        value = majority(answers, [score == 1.0 for _, score in voters])
        return {f"maj{len(texts)}": value if voters and self.kind in VOTING else float("nan")}
