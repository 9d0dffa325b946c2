"""The long-format CSV: one row per measurement per round. The report reads nothing else."""

from __future__ import annotations

import csv
from pathlib import Path

# fmt: off
COLUMNS = [
    "started", "preset", "level",
    "model", "passes", "provider", "dtype", "mode", "batch", "frames", "tokens", "kept",
    "round", "metric", "part", "value", "unit", "note",
    "device", "device_name", "cpu", "cores", "threads", "torch", "python", "system", "commit",
]
# fmt: on


class Writer:
    """Writes rows as they are measured; a run that is interrupted leaves what it had.

    Args:
        common: the columns that are the same in every row.
    """

    def __init__(self, path: Path, common: dict):
        self.common = common
        self.file = path.open("w", newline="")
        self.csv = csv.DictWriter(self.file, COLUMNS)
        self.csv.writeheader()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()

    def add(self, metric: str, value: float | None, unit: str = "", **columns) -> None:
        value = "" if value is None else repr(value)
        self.csv.writerow({**self.common, **columns, "metric": metric, "value": value, "unit": unit})
        self.file.flush()


def read(path: Path) -> list[dict]:
    """Rows with numbers as numbers; an empty value is None.

    Raises:
        ValueError: the file is not such a CSV, or holds no rows.
    """
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        missing = sorted(set(COLUMNS) - set(reader.fieldnames or ()))
        if missing:
            raise ValueError(f"{path} is not a benchmark record: it lacks the columns {', '.join(missing)}.")
        rows = list(reader)
    if not rows:
        raise ValueError(f"{path} holds no measurements.")
    for row in rows:
        row["value"] = float(row["value"]) if row["value"] else None
        for name in ("batch", "frames", "tokens", "kept", "passes", "round", "threads"):
            row[name] = int(row[name]) if row[name] else None
    return rows
