"""Writes tests/golden/quickstart.json: the metrics that alarms look at, of a whole `prime-lightning quickstart`.

prime-lightning quickstart --out runs/quickstart && python tests/golden/make_quickstart.py runs/quickstart
"""

import csv
import json
import sys
from pathlib import Path

from prime_lightning.training.callbacks.alarms import MEANINGS


def main(run: Path) -> None:
    """Read the run's CSV log and write the file."""
    with max((run / "csv").glob("version_*/metrics.csv")).open() as file:
        rows = [row for row in csv.DictReader(file) if row.get("rollout/accuracy")]
    names = sorted({metric for meaning in MEANINGS.values() for metric in meaning.metrics})
    columns = {name: [float(f"{float(row[name]):.6g}") for row in rows] for name in names}
    Path(__file__).with_name("quickstart.json").write_text(json.dumps(columns) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
