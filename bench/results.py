"""The long-format CSV: one row per measurement per round. The report reads nothing else."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

# fmt: off
_RUN = ["started", "preset", "level"]
_MEASUREMENT = ["round", "metric", "part", "value", "unit", "note"]
_ENVIRONMENT = [
    "device", "device_name", "cpu", "cores", "threads", "torch", "python", "system", "commit",
]
COLUMNS = [
    *_RUN, "group", "model", "passes", "provider", "dtype", "mode", "batch", "frames", "mask_ratio", "tokens", "kept",
    *_MEASUREMENT, *_ENVIRONMENT,
]
_NEW = {"group", "mask_ratio"}  # records made before these columns are read too
KERNEL_COLUMNS = [*_RUN, "op", "shape", "provider", "dtype", "mode", "batch", *_MEASUREMENT, *_ENVIRONMENT]
# fmt: on
_WHOLE_NUMBERS = ("group", "batch", "frames", "tokens", "kept", "passes", "round", "threads")


class Writer:
    """Writes rows as they are measured; a run that is interrupted leaves what it had.

    Args:
        common: the columns that are the same in every row.
        columns: all columns, of the level that is measured.
        kept: lines of an earlier run, as `lines` gives them, that the record goes on from. They are in the file
            before anything of the old one is gone.
    """

    def __init__(self, path: Path, common: dict, columns: Sequence[str] = COLUMNS, kept: Sequence[dict] = ()):
        self.common = common
        partial = path.with_suffix(".partial")
        with partial.open("w", newline="") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(kept)
        partial.replace(path)
        self.file = path.open("a", newline="")
        self.csv = csv.DictWriter(self.file, columns)

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        if kind is KeyboardInterrupt:
            self.add("interrupted", None)
        self.file.close()

    def add(self, metric: str, value: float | None, unit: str = "", **columns) -> None:
        value = "" if value is None else repr(value)
        self.csv.writerow({**self.common, **columns, "metric": metric, "value": value, "unit": unit})
        self.file.flush()


def lines(path: Path, columns: Sequence[str] = COLUMNS) -> list[dict[str, str]]:
    """Rows as text; a last line that was not written to its end is left out.

    Raises:
        ValueError: the file is not such a CSV.
    """
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        missing = sorted(set(columns) - _NEW - set(reader.fieldnames or ()))
        if missing:
            raise ValueError(f"{path} is not a benchmark record: it lacks the columns {', '.join(missing)}.")
        return [row for row in reader if None not in row.values()]


def read(path: Path, columns: Sequence[str] = COLUMNS) -> list[dict]:
    """Rows with numbers as numbers; an empty value is None.

    Raises:
        ValueError: the file is not such a CSV, or holds no rows.
    """
    rows = lines(path, columns)
    if not rows:
        raise ValueError(f"{path} holds no measurements.")
    for row in rows:
        if "model" in columns:
            row.update({name: row.get(name) or "" for name in _NEW})
            row["mask_ratio"] = float(row["mask_ratio"]) if row["mask_ratio"] else None
        row["value"] = float(row["value"]) if row["value"] else None
        for name in row.keys() & set(_WHOLE_NUMBERS):
            row[name] = int(row[name]) if row[name] else None
    return rows
