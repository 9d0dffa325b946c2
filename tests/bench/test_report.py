"""From the CSV to the report, with figures that can be checked by hand."""

import csv
from pathlib import Path

import pytest

from bench import report, results

COMMON = dict.fromkeys(results.COLUMNS, "") | {
    "device_name": "A machine", "threads": 2, "cores": 2, "torch": "2.0", "commit": "abc", "preset": "quick",
}  # fmt: skip


def case(model, provider, passes=1, dtype="fp32", **other):
    sizes = {"batch": 2, "frames": 1024, "mask_ratio": 0.8, "tokens": 512, "kept": 100, "mode": "training"}
    return {
        "group": 0,
        "model": model,
        "provider": provider,
        "passes": passes,
        "dtype": dtype,
        **sizes,
        **other,
    }


def add_row(write, columns, seconds, saved=4e6, peak=8e6, flops=1e9):
    sizes = {"weights": 16e6, "gradients": 16e6, "optimizer": 32e6}
    for metric, value in {"saved": saved, "peak": peak, "flops": flops, "floor": 0.25, **sizes}.items():
        write.add(metric, value, **columns)
    write.add("recomputed", None, note="activations" if columns["provider"] == "ours" else "none", **columns)
    for i, value in enumerate(seconds):
        write.add("seconds", value, round=i, **columns)


@pytest.fixture
def record(tmp_path):
    """The machine is three times slower in round 1: the ratios must not notice."""
    path = tmp_path / "measurements.csv"
    with results.Writer(path, COMMON) as write:
        write.add("matmul_ceiling", 2e11, "FLOP/s", dtype="fp32", part="8x8x8 forward")
        write.add("copy_ceiling", 1e10, "bytes/s")
        add_row(write, case("ssast_patch_base", "plain"), (2.0, 6.0, 2.0), flops=4e9)
        add_row(write, case("ssast_patch_base", "plain", 2), (4.0, 12.0, 4.0), flops=8e9)
        add_row(write, case("mae_ast_patch_base", "plain"), (1.0, 3.0, 1.0), saved=2e6)
        add_row(write, case("mae_ast_patch_base", "ours"), (0.5, 1.5, 0.5), saved=1e6, peak=2e6)
        wrong = case("audiomae_base", "ours")
        add_row(write, wrong, (0.001, 0.001, 0.001))
        write.add("error", None, note="wrong loss: 7, but the reference has 8", round=2, **wrong)
    return path


def test_ratios_are_taken_within_rounds(record):
    rows = report.collect(results.read(record))

    def found(ratios):
        return {(r.fast.model, r.fast.provider, r.slow.model, r.slow.passes): r.time() for r in ratios}

    architecture = found(report.architecture_ratios(rows))
    assert architecture == {
        ("mae_ast_patch_base", "plain", "ssast_patch_base", 1): (2.0, 2.0, 2.0),
        ("mae_ast_patch_base", "plain", "ssast_patch_base", 2): (4.0, 4.0, 4.0),
    }
    system = found(report.system_ratios(rows))
    assert system == {
        ("mae_ast_patch_base", "ours", "mae_ast_patch_base", 1): (2.0, 2.0, 2.0),
        ("mae_ast_patch_base", "ours", "ssast_patch_base", 1): (4.0, 4.0, 4.0),
        ("mae_ast_patch_base", "ours", "ssast_patch_base", 2): (8.0, 8.0, 8.0),
    }
    first = report.architecture_ratios(rows)[0]
    assert (first.metric("flops"), first.metric("saved"), first.metric("peak")) == (4.0, 2.0, 1.0)


def test_a_wrong_row_has_an_error_and_no_number(record):
    rows = report.collect(results.read(record))
    wrong = next(row for row in rows if row.model == "audiomae_base")
    assert not wrong.seconds and not wrong.metrics and wrong.error.startswith("wrong loss")
    text = report.text(results.read(record))
    line = next(line for line in text.splitlines() if line.startswith("| audiomae_base"))
    assert set(line.split("|")[4:-1]) == {cell for cell in line.split("|")[4:-1] if cell.strip() == "—"}
    assert "audiomae_base, ours, fp32, 2 clips of 512 tokens: wrong loss: 7, but the reference has 8" in text


def test_table_figures(record):
    text = report.text(results.read(record))
    line = next(line for line in text.splitlines() if "mae_ast_patch_base" in line and "ours" in line)
    cells = [cell.strip() for cell in line.split("|")[1:-1]]
    # rounds 0.5, 0.5, 1.5 s: too few for quantiles; 2 clips per step
    assert cells == [
        "mae_ast_patch_base", "ours", "fp32", "4.00 (1.33 to 4.00)", "500", "1.0", "250", "50 %",
    ]  # fmt: skip
    memory = text[text.index("### Memory") :]
    line = next(line for line in memory.splitlines() if "mae_ast_patch_base" in line and "ours" in line)
    assert [cell.strip() for cell in line.split("|")[1:-1]] == [
        "mae_ast_patch_base", "ours", "fp32", "16", "16", "32", "1", "2", "activations",
    ]  # fmt: skip


def test_report_needs_the_csv_only(record, tmp_path):
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    text = report.write(record, moved)
    assert text in (moved / "report.md").read_text()
    for plot in ("throughput.png", "memory.png"):
        assert (moved / plot).read_bytes().startswith(b"\x89PNG")


def test_unfinished_rows_have_no_number(tmp_path):
    path = tmp_path / "m.csv"
    with results.Writer(path, COMMON) as write:
        write.add("saved", 1.0, **case("audiomae_base", "ours"))
    (row,) = report.collect(results.read(path))
    assert "not finished" in row.error
    report.write(path, tmp_path)


def test_a_csv_of_something_else_is_refused(tmp_path):
    path = tmp_path / "other.csv"
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([["a", "b"], ["1", "2"]])
    with pytest.raises(ValueError, match="not a benchmark record"):
        results.read(path)
    with results.Writer(path, COMMON):
        pass
    with pytest.raises(ValueError, match="no measurements"):
        results.read(path)


def test_lengths_and_mask_ratios(tmp_path):
    """Rows of several points: each table says where, ratios stay within a group, and the curves are drawn."""
    path = tmp_path / "m.csv"
    points = [(0, 1024, 512, 100, 0.8), (1, 2048, 1024, 200, 0.8), (2, 1024, 512, 256, 0.5)]
    with results.Writer(path, COMMON) as write:
        for group, frames, tokens, kept, ratio in points:
            where = {"group": group, "frames": frames, "tokens": tokens, "kept": kept, "mask_ratio": ratio}
            slow = 1.0 if ratio == 0.8 else 10.0
            for provider, seconds in (("plain", 2 * slow), ("ours", slow)):
                add_row(write, case("audiomae_base", provider, **where), (seconds, seconds))
    rows = report.collect(results.read(path))
    assert [ratio.time()[0] for ratio in report.system_ratios(rows)] == [2.0, 2.0, 2.0]
    found = report.series(rows, "tokens")
    assert [[row.tokens for row in line] for line in found.values()] == [[512, 1024]] * 2
    found = report.series(rows, "mask ratio")
    assert [[row.kept for row in line] for line in found.values()] == [[256, 100]] * 2
    text = report.write(path, tmp_path)
    assert "several lengths" in text and "| tokens | masked |" in text
    assert "![mask ratios](mask_ratios.png)" in (tmp_path / "report.md").read_text()
    for plot in ("lengths.png", "mask_ratios.png"):
        assert (tmp_path / plot).read_bytes().startswith(b"\x89PNG")


def test_modes_have_sections_of_their_own(tmp_path):
    path = tmp_path / "m.csv"
    with results.Writer(path, COMMON) as write:
        add_row(write, case("audiomae_base", "ours"), (1.0, 1.0))
        columns = case("audiomae_base", "ours", mode="embeddings", mask_ratio=None, group=1)
        for metric, value in {"peak": 8e6, "flops": 1e9, "floor": 0.5, "weights": 4e6}.items():
            write.add(metric, value, **columns)
        write.add("seconds", 1.0, round=0, **columns)
        write.add("reference", 1.0, note="reference ops", **columns)
    text = report.write(path, tmp_path)
    training, embeddings = text.split("## Embeddings")
    assert "optimizer state, MB" in training and "optimizer state, MB" not in embeddings
    assert "forward products alone" in embeddings and "50 %" in embeddings
    assert "audiomae_base has no plain baseline, and so no system ratio" in text
    assert "### System" not in text


def test_records_from_before_lengths_and_mask_ratios_are_read():
    record = Path(report.__file__).parent / "results" / "amd-epyc-zen4-2-cores" / "measurements.csv"
    rows = report.collect(results.read(record))
    assert rows and not [row.error for row in rows if row.error]
    assert "### Architecture" in report.text(results.read(record))
