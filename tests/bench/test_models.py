"""The models level end to end on models of toy size, and its command line."""

import subprocess
import sys

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from bench import device, memory, models, registry, report, results
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
    monkeypatch.setattr(models, "cases", lambda m, d, b, f, o: registry.cases(m, d, b, f, OVERRIDES))


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
        (["models", "--frames", "100"], "multiple of 64"),
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
