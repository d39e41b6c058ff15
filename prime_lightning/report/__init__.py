"""`prime-lightning report`: runs as one HTML file, and `credit_view`, its view of token rewards, for notebooks."""

from prime_lightning.report.page import CreditView, credit_view, write_report

__all__ = ["CreditView", "credit_view", "write_report"]
