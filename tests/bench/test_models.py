"""The models level end to end on models of toy size, and its command line."""

import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint

from bench import device, largest, memory, models, registry, report, results
from bench.__main__ import main
from bench.providers import build

TINY = {"width": 32, "depth": 2, "heads": 2}
OVERRIDES = {
    "audiomae_base": {**TINY, "decoder_width": 32, "decoder_depth": 2, "decoder_heads": 2},
    "mae_ast_patch_base": {**TINY, "decoder_width": 32, "decoder_depth": 1, "decoder_heads": 2},
    "ssast_patch_base": TINY,
}


@pytest.fixture
def tiny(monkeypatch):
    """Toy models, and ceilings from small buffers."""
    monkeypatch.setattr(models.Ceilings, "measure", quick_ceilings)
    monkeypatch.setattr(models, "cases", lambda m, d, at, p, o: registry.cases(m, d, at, p, OVERRIDES))


def quick_ceilings(self, rows, device, write):
    for shape, dtype in models._shapes(rows):
        for kind, rate in models.roofline.matmul_ceilings(shape, dtype, device, repeats=1).items():
            self.matmul.setdefault(dtype, {})[(*shape, kind)] = rate
            write.add("matmul_ceiling", rate, "FLOP/s", dtype=dtype, part=kind)
    self.copy = models.roofline.copy_ceiling(device, megabytes=1, repeats=1)
    write.add("copy_ceiling", self.copy, "bytes/s")


ARGUMENTS = ["models", "--frames", "64", "--batch-size", "2", "--rounds", "2", "--device", "cpu"]


def test_end_to_end(tiny, tmp_path, capsys):
    assert main([*ARGUMENTS, "--out", str(tmp_path)]) == 0
    records = results.read(tmp_path / "measurements.csv")
    rows = report.collect(records)
    assert len(rows) == 16 and not [row.error for row in rows if row.error]
    for row in rows:
        assert set(row.seconds) == {0, 1} and min(row.seconds.values()) > 0
        assert row.metrics["saved"] > 0 and row.metrics["peak"] > 0 and row.metrics["floor"] > 0
        assert (row.batch, row.frames, row.tokens) == (2, 64, 32)
    assert {r["torch"] for r in records} == {torch.__version__} and {r["preset"] for r in records} == {
        "quick"
    }
    one, two = (
        next(r for r in rows if r.passes == p and (r.model, r.provider) == ("ssast_patch_base", "plain"))
        for p in (1, 2)
    )
    assert (
        two.metrics["saved"] > 1.5 * one.metrics["saved"]
        and two.metrics["flops"] > 1.5 * one.metrics["flops"]
    )
    output = capsys.readouterr().out
    assert "## Architecture" in output and "## System" in output and "round 2 of 2" in output
    assert (tmp_path / "report.md").exists() and (tmp_path / "memory.png").exists()


@pytest.mark.parametrize("fault", ["loss", "gradient", "crash"])
def test_a_wrong_provider_gets_no_number(tiny, tmp_path, monkeypatch, fault):
    def broken(case):
        model = build(case)
        if case.provider == "ours":
            forward = model.forward

            def wrong(*args, **kwargs):
                if fault == "crash":
                    raise RuntimeError("kernel not found")
                out = forward(*args, **kwargs)
                loss = out.loss
                out["loss"] = 1.01 * loss if fault == "loss" else loss + 0.1 * (loss - loss.detach())
                return out

            model.forward = wrong
        return model

    monkeypatch.setattr(models, "build", broken)
    monkeypatch.setattr(models, "peak_bytes", lambda *_: 1)
    arguments = [*ARGUMENTS, "--out", str(tmp_path), "--dtypes", "fp32", "--models", "mae_ast_patch_base"]
    assert main(arguments) == 0
    records = results.read(tmp_path / "measurements.csv")
    plain, ours = report.collect(records)
    assert (plain.provider, plain.error) == ("plain", None) and plain.seconds
    expected = {"loss": "wrong loss", "gradient": "wrong gradient norm", "crash": "kernel not found"}[fault]
    assert expected in ours.error
    assert not [r for r in records if r["provider"] == "ours" and r["value"] is not None]


def test_a_process_that_dies_costs_one_row(tiny, tmp_path, monkeypatch):
    def peak(case, *_):
        if case.provider == "ours":
            raise MemoryError("killed, out of memory")
        return 1

    monkeypatch.setattr(models, "peak_bytes", peak)
    assert main([*ARGUMENTS, "--out", str(tmp_path), "--dtypes", "fp32", "--models", "ssast_patch_base"]) == 0
    rows = report.collect(results.read(tmp_path / "measurements.csv"))
    assert [row.error for row in rows] == [None, "killed, out of memory"] * 2


def test_a_run_that_is_interrupted_leaves_its_report(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(models, "peak_bytes", lambda *_: 1)
    measure, runs = models.timing.measure_cpu, []

    def interrupted(function):
        runs.append(function)
        if len(runs) == 4:
            raise KeyboardInterrupt
        return measure(function)

    monkeypatch.setattr(models.timing, "measure_cpu", interrupted)
    arguments = [*ARGUMENTS, "--out", str(tmp_path), "--dtypes", "fp32", "--models", "mae_ast_patch_base"]
    assert main(arguments) == 130
    assert f"interrupted; what was measured is in {tmp_path}, with its report." in capsys.readouterr().err
    rows = report.collect(results.read(tmp_path / "measurements.csv"))
    assert [len(row.seconds) for row in rows] == [1, 2] and all(row.metrics["floor"] for row in rows)
    assert (
        "**The run was interrupted: this is what it measured until then.**"
        in (tmp_path / "report.md").read_text()
    )


def test_a_run_that_is_interrupted_before_its_first_row_says_so(tiny, tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(models, "peak_bytes", interrupted)
    assert main([*ARGUMENTS, "--out", str(tmp_path)]) == 130
    text = (tmp_path / "report.md").read_text()
    assert "The run was interrupted" in text and "No row was measured." in text


def test_saved_bytes_counts_storages_once_and_no_parameters():
    weight = torch.nn.Parameter(torch.ones(8, 8))
    x = torch.ones(4, 8)

    def forward():
        y = x @ weight.T  # saves x (and the weight)
        return (y.exp() + y.view(8, 4).T.reshape(4, 8).sin()).sum()  # saves exp's result, and a copy of y

    saved, _ = memory.saved_bytes(forward, [weight])
    assert saved == 3 * 4 * 8 * 4


def test_saved_bytes_counts_what_a_checkpoint_holds():
    weight = torch.nn.Parameter(torch.ones(8, 8))
    x = torch.ones(4, 8)

    def forward():
        y = x @ weight.T  # saves x
        return checkpoint(
            lambda y: y.exp().sin().sum(), y, use_reentrant=False
        )  # y alone: two are recomputed

    saved, _ = memory.saved_bytes(forward, [weight])
    assert saved == 2 * 4 * 8 * 4


def test_peak_contains_weights_gradients_and_moments():
    case = registry.Case("ssast_patch_tiny", "plain", "fp32", 1, frames=64)
    parameters = sum(p.numel() for p in build(case).parameters())
    peak = memory.peak_bytes(case, "cpu", 1, torch.randn(1, 64, 128))
    assert 16 * parameters < peak < 16 * parameters + 300e6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["models", "--models", "resnet"], "there is no 'resnet' here"),
        (
            ["models", "--dtypes", "fp8"],
            "--dtypes: there is no 'fp8' here; choose from fp32 or float32, bf16 or",
        ),
        (["models", "--rounds", "0"], "expected a positive whole number"),
        (["models", "--frames", "100"], "multiple of 16"),
        (["models", "--mask-ratios", "1.5"], "expected a share between 0 and 1, got '1.5'"),
        (["models", "--modes", "sleeping"], "choose from training, inference, embeddings"),
        (["models", "--providers", "jax"], "choose from plain, ours, compiled"),
        (["models", "--memory-budget", "2"], "--memory-budget is for --largest-batch"),
        (["models", "--largest-batch", "--memory-budget", "0"], "expected a positive number of gigabytes"),
        (["models", "--largest-batch", "--batch-size", "2"], "finds its own batches"),
        (["models", "--quick", "--full"], "not allowed with"),
        ([], "required: LEVEL"),
    ],
)
def test_bad_arguments_are_refused(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_an_unusable_gpu_stops_the_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(device, "gpu_is_present", lambda: True)
    monkeypatch.setattr(device, "_why_unusable", lambda: "the driver is too old")
    assert main([*ARGUMENTS[:-2], "--out", str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert "This machine has a GPU, but PyTorch cannot use it: the driver is too old." in error
    assert not (tmp_path / "out").exists()
    assert device.select("cpu") == torch.device("cpu")


def test_too_little_memory_is_said_before_it_runs_out(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(models, "peak_bytes", lambda *_: 10**6)
    monkeypatch.setattr(device, "free_memory", lambda _: 10**6)
    arguments = [*ARGUMENTS, "--out", str(tmp_path), "--dtypes", "fp32", "--models", "ssast_patch_base"]
    assert main(arguments) == 1
    assert "0.0 GB are free. Choose fewer models" in capsys.readouterr().err


def test_module_runs_from_the_root():
    result = subprocess.run(
        [sys.executable, "-m", "bench", "models", "--rounds", "many"], capture_output=True, text=True
    )
    assert result.returncode == 2 and "expected a positive whole number, got 'many'" in result.stderr


POINTS = [registry.Point(2, 64), registry.Point(1, 80, "training", 0.5), registry.Point(1, 64, "embeddings")]


@pytest.fixture
def three_groups(tiny, monkeypatch):
    monkeypatch.setattr(models, "full_points", lambda *_: POINTS)
    monkeypatch.setattr(models, "spectrograms", lambda batch, frames: torch.randn(batch, frames, 128))
    monkeypatch.setattr(models, "peak_bytes", lambda *_: 10**6)


FULL = [
    "models",
    "--full",
    "--models",
    "mae_ast_patch_base",
    "--dtypes",
    "fp32",
    "--rounds",
    "2",
    "--device",
    "cpu",
]


def test_a_full_run_resumes_where_it_was_stopped(three_groups, tmp_path, monkeypatch, capsys):
    whole, measured = models.measure_group, []

    def stopped(group, *rest):
        measured.append(group.number)
        if len(measured) == 2:
            raise KeyboardInterrupt
        return whole(group, *rest)

    monkeypatch.setattr(models, "measure_group", stopped)
    arguments = [*FULL, "--out", str(tmp_path)]
    assert main(arguments) == 130
    path = tmp_path / "measurements.csv"
    first = [line for line in results.lines(path) if line["group"] == "0"]
    with path.open("a") as file:
        file.write("2026-01-01,full,models,1,mae_as")  # the machine went down
    assert main(arguments) == 0
    assert measured == [0, 1, 1, 2]
    assert "going on: 1 of 3 groups were finished before" in capsys.readouterr().out
    assert [line for line in results.lines(path) if line["group"] == "0"] == first
    rows = report.collect(results.read(path))
    assert [row.error for row in rows] == [None] * 6
    assert [(row.mode, row.batch, row.frames, row.mask_ratio) for row in rows[::2]] == [
        ("training", 2, 64, 0.75),
        ("training", 1, 80, 0.5),
        ("embeddings", 1, 64, None),
    ]
    assert main(arguments) == 0 and measured == [0, 1, 1, 2]  # nothing is left to do


def test_a_full_record_of_something_else_is_kept(three_groups, tmp_path, monkeypatch, capsys):
    assert main([*FULL, "--out", str(tmp_path)]) == 0
    path = tmp_path / "measurements.csv"
    before = path.read_text()

    def refused(*arguments):
        with pytest.raises(SystemExit) as stop:
            main([*arguments, "--out", str(tmp_path)])
        assert stop.value.code == 2 and path.read_text() == before
        return capsys.readouterr().err

    other = [*FULL[:-3], "3", *FULL[-2:]]
    assert "cannot be gone on from: it was measured with other rounds." in refused(*other)
    assert "the record of a --full run, which a quick run does not replace" in refused(*ARGUMENTS)
    monkeypatch.setattr(device, "commit", lambda: "0123456789ab")
    assert "and now it is 0123456789ab. Choose another --out, or delete that file" in refused(*FULL)


def test_a_full_run_replaces_a_quick_record(three_groups, tmp_path):
    with results.Writer(tmp_path / "measurements.csv", dict.fromkeys(results.COLUMNS, "quick")) as write:
        write.add("copy_ceiling", 1.0)
    assert main([*FULL, "--out", str(tmp_path)]) == 0
    assert {line["preset"] for line in results.lines(tmp_path / "measurements.csv")} == {"full"}


def test_quick_adds_modes_as_time_allows(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(models, "peak_bytes", lambda *_: 10**6)
    monkeypatch.setattr(models, "choose_batch", lambda *_: 1)
    arguments = ["models", "--models", "mae_ast_patch_base", "--dtypes", "fp32", "--device", "cpu"]
    for seconds, modes, left in ((120, registry.MODES, False), (0, ("training",), True)):
        monkeypatch.setattr(models, "QUICK_SECONDS", seconds)
        assert main([*arguments, "--out", str(tmp_path)], started=time.perf_counter()) == 0
        records = results.read(tmp_path / "measurements.csv")
        assert tuple(dict.fromkeys(row.mode for row in report.collect(records))) == modes
        text = (tmp_path / "report.md").read_text()
        assert ("Left out, for there was no time: inference, embeddings" in text) == left
        assert ("## Embeddings" in text) != left


def test_full_points_vary_one_axis_at_a_time():
    points = registry.full_points(None, None, None, None)
    training = [point for point in points if point.mode == "training"]
    assert training[0] == registry.Point(8) and len(set(points)) == len(points)
    assert {point.frames for point in training} == set(registry.FULL_FRAMES)
    assert {point.mask_ratio for point in training} == {None, *registry.FULL_MASK_RATIOS}
    for point in training:
        base = (point.frames == 1024, point.mask_ratio is None, point.batch in (8, registry.SWEEP_BATCH))
        assert sum(base) >= 2
    chosen = registry.full_points(["training"], [2048], [0.5], [4])
    assert chosen == [registry.Point(4, 2048, "training", 0.5)]
    tokens = [
        registry.Case("audiomae_base", "ours", "fp32", 1, frames=f).num_tokens for f in registry.FULL_FRAMES
    ]
    assert tokens == [496, 512, 1024, 2048]


SMALL = {
    **OVERRIDES,
    "mae_ast_frame_base": OVERRIDES["mae_ast_patch_base"],
    "ssast_frame_base": TINY,
    **{
        name: OVERRIDES["audiomae_base"] | ({"global_blocks": 1} if name.endswith("hybrid") else {})
        for name in registry.MODELS
        if name.startswith("audiomae_base/")
    },
}


@pytest.mark.parametrize("mode", registry.MODES)
@pytest.mark.parametrize(("frames", "ratio"), [(80, 0.5), (992, 0.75)])  # windows tile neither
def test_every_case_is_right(mode, frames, ratio):
    """All decoders, token shapes and passes agree with their references; the mask is shared."""
    rows = registry.cases(SMALL, ["fp32"], registry.Point(2, frames, mode, ratio), overrides=SMALL)
    steps, failed = models.prepare(rows, torch.device("cpu"), torch.randn(2, frames, 128))
    good, wrong = models.check(steps, lambda text: None, rows)
    assert not failed and not wrong and list(good) == rows
    assert {row.model for row in rows if row.provider == "plain"} == {
        row.model for row in rows if row.has_baseline
    }


def test_a_model_without_a_baseline_is_held_to_the_references(monkeypatch):
    monkeypatch.setattr(registry.Case, "has_baseline", False)
    rows = registry.cases(["audiomae_base"], ["fp32", "bf16"], registry.Point(2, 64), overrides=OVERRIDES)
    assert [row.provider for row in rows] == ["ours", "ours"]
    steps, _ = models.prepare(rows, torch.device("cpu"), torch.randn(2, 64, 128))
    good, wrong = models.check(steps, lambda text: None, rows)
    assert len(good) == 2 and not wrong
    monkeypatch.setattr(
        models, "build_reference", lambda case, model: build(case).train()
    )  # of other weights
    _, wrong = models.check(steps, lambda text: None, rows)
    assert wrong[rows[0]].startswith("wrong loss")


def test_wrong_embeddings_are_found():
    expected = models.Probe(1.0, embedding=torch.ones(2, 4))
    models.judge(models.Probe(1.0, embedding=torch.ones(2, 4) + 5e-5), expected, "fp32")
    for off in (1e-3, float("nan")):
        with pytest.raises(models.ProviderError, match="wrong embeddings"):
            models.judge(models.Probe(1.0, embedding=torch.ones(2, 4) + off), expected, "fp32")


@pytest.mark.slow
def test_compiled_blocks():
    rows = registry.cases(
        ["audiomae_base"], ["bf16"], registry.Point(2, 64), registry.PROVIDERS, overrides=OVERRIDES
    )
    steps, failed = models.prepare(rows, torch.device("cpu"), torch.randn(2, 64, 128))
    counters.clear()
    good, wrong = models.check(steps, lambda text: None, rows)
    assert not failed and not wrong and counters["stats"]["unique_graphs"] > 0
    assert good[rows[2]][1].saved > 0


def linear_memory(weights, per_clip, limit=None):
    tried = []

    def measure(case):
        tried.append(case.batch)
        peak = weights + per_clip * case.batch
        if limit and peak > limit:
            raise MemoryError
        return peak

    return measure, tried


CASE = registry.Case("ssast_patch_tiny", "plain", "fp32", 1, frames=64)


@pytest.mark.parametrize("fails", [False, True], ids=["too large a peak", "no memory"])
@pytest.mark.parametrize(("budget", "expected"), [(99, 0), (110, 1), (125, 2), (209, 10), (10**5, 9990)])
def test_the_largest_batch_is_found_in_few_trials(budget, expected, fails):
    measure, tried = linear_memory(100, 10, budget if fails else None)
    found = largest.search(CASE, budget, measure)
    assert expected * (1 - largest.PRECISION) <= found.largest <= expected
    assert len(tried) == len(set(tried)) <= 12


def test_the_largest_batch_where_the_line_misleads():
    """Beyond 50 clips a clip takes ten times as much."""
    found = largest.search(CASE, 1000, lambda case: 100 + case.batch + 9 * max(0, case.batch - 50))
    assert 133 <= found.largest <= 135


def test_largest_batch_end_to_end(tmp_path, capsys):
    arguments = ["models", "--largest-batch", "--memory-budget", "0.5", "--models", "ssast_patch_tiny"]
    arguments += [
        "--dtypes",
        "fp32",
        "--frames",
        "1024",
        "--providers",
        "plain",
        "--device",
        "cpu",
        "--threads",
        "1",
    ]
    assert main([*arguments, "--out", str(tmp_path)]) == 0
    records = results.read(tmp_path / "measurements.csv")
    value = {(r["metric"], r["passes"]): r["value"] for r in records}
    assert value["largest_batch", 1] >= value["largest_batch", 2] >= 1
    assert value["largest_peak", 1] <= 0.5e9 == value["budget", None]
    outcomes = {r["batch"]: r["value"] for r in records if r["metric"] == "trial" and r["passes"] == 1}
    refused = [b for b, peak in outcomes.items() if peak is None or peak > 0.5e9]
    assert min(refused) > value["largest_batch", 1]
    output = capsys.readouterr().out
    assert "# Benchmark: the largest batch" in output and "does not fit" in output


def test_a_budget_limits_the_process():
    with pytest.raises(MemoryError):
        memory.peak_bytes(replace(CASE, batch=64, frames=1024), "cpu", 1, 1024, 10**8)


def test_a_budget_beyond_what_is_free_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(device, "free_memory", lambda _: 10**9)
    with pytest.raises(SystemExit):
        main(["models", "--largest-batch", "--memory-budget", "2", "--device", "cpu", "--out", str(tmp_path)])
    assert "--memory-budget is 2.0 GB, but 1.0 GB are free" in capsys.readouterr().err
