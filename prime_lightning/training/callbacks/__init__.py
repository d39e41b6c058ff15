"""What happens between iterations: alarms, progress, exports, tables of samples."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prime_lightning import lazily

if TYPE_CHECKING:
    from prime_lightning.training.callbacks.alarms import Alarms
    from prime_lightning.training.callbacks.outputs import HuggingFaceExport, RolloutLog, SampleTable
    from prime_lightning.training.callbacks.progress import PrimeProgress

__all__ = ["Alarms", "HuggingFaceExport", "PrimeProgress", "RolloutLog", "SampleTable"]
HOMES = {
    "Alarms": "alarms",
    "HuggingFaceExport": "outputs",
    "RolloutLog": "outputs",
    "PrimeProgress": "progress",
    "SampleTable": "outputs",
}
"""Files of the names that users write; each is imported when it is first asked for."""

__getattr__ = lazily(__name__, HOMES)
