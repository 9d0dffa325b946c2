"""The kernels level: its registry, its providers, and small runs end to end."""

import logging
import os
import subprocess
import sys
import types
import warnings
from functools import partial
from pathlib import Path

import audiomae_kernels as ak
import pytest
import torch
from torch.nn import functional

from bench import device as devices
from bench import results, timing
from bench.__main__ import main
from bench.kernels import cases, providers, report, run

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
SMALL = {
    "GRID": (8, 4),
    "HEADS": 2,
    "HEAD_DIM": 8,
    "FRAMES": 64,
    "BINS": 32,
    "TOKENS": 8,
    "KEPT": 3,
    "WIDTH": 16,
}


@pytest.fixture
def small(monkeypatch, one_thread):
    """Every shape of the registry at toy size, one copy of the inputs more than none, no ceilings to wait for."""
    for name, value in {**SMALL, "MASKED": SMALL["TOKENS"] - SMALL["KEPT"]}.items():
        monkeypatch.setattr(cases, name, value)
    shapes = tuple(
        cases._window_attention(scoring, shift, quick=scoring == "cosine")
        for scoring in ("cosine", "dot")
        for shift in ((0, 0), (2, 0))
    )
    shapes += (
        cases._patch_gather((16, 16)),
        cases._patch_gather((10, 10)),
        cases._unshuffle(),
        cases._masked_mse(),
    )
    shapes += (cases._info_nce(12, 8), *(cases._attention(8, rate, True, 2, 8) for rate in (0.0, 0.1)))
    monkeypatch.setattr(cases, "SHAPES", shapes)
    monkeypatch.setattr(devices, "cache_bytes", lambda device: 1)
    monkeypatch.setattr(run, "measure_ceilings", quick_ceilings)


def quick_ceilings(dtypes, device, write):
    for dtype in dtypes:
        write.add("matmul_ceiling", 1e11, "FLOP/s", dtype=dtype, part="8x8x8 forward")
    write.add("copy_ceiling", 1e10, "bytes/s")


def bench(out, *arguments):
    assert (
        main(
            [
                "kernels",
                "--device",
                "cpu",
                "--rounds",
                "2",
                "--batch-size",
                "2",
                "--out",
                str(out),
                *arguments,
            ]
        )
        == 0
    )
    return report.collect(results.read(out / "measurements.csv", results.KERNEL_COLUMNS))


def attention_cases(dtypes=("fp32",)):
    return cases.cases(("window_attention",), dtypes, (2,), quick=False)


# --- the registry -----------------------------------------------------------------------------------


def test_every_op_has_a_case_and_its_providers():
    assert set(cases.OPS) == set(ak.OPS) == set(cases.REFERENCES)
    assert {shape.op for shape in cases.SHAPES if shape.quick} == set(ak.OPS)
    for op in ak.OPS:
        other = "sdpa" if op == "attention" else "triton"
        assert {"eager", "compiled", "native", other} <= set(providers.serving(op))
    assert set(providers.serving("window_attention")) == set(providers.PROVIDERS)


def test_least_bytes_and_flops():
    """The figures of kernels/README.md: per token of width 512 in bf16, and per patch."""
    first = {shape.op: shape for shape in reversed(cases.SHAPES)}
    first["attention"] = cases._attention(512, 0.0, quick=True)
    work = {op: (c := cases.Case(shape, "bf16", 2)).work(c.tensors(0)) for op, shape in first.items()}
    attention = work["window_attention"]
    assert attention["forward"] == (4096 * 1024, 32768 * 1024)
    assert attention["backward"] == (7168 * 1024, 65536 * 1024)  # 81920 less S computed again
    assert attention["forward+backward"] == (11264 * 1024, 98304 * 1024)
    assert work["patch_gather"] == {"forward": ((2 * 256 * 2 + 8) * 102 * 2, 0)}
    assert work["unshuffle"]["backward"].bytes == 2 * ((102 + 512) * 512 * 2 + 8 * 102)
    assert work["masked_mse"]["backward"].bytes == (3 * 256 * 2 + 8) * 410 * 2
    assert work["info_nce"]["forward"] == (2 * 384 * 256 * 2 * 2, 2 * 384 * 384 * 256 * 2)
    tokens, width = 2 * 512, 768
    assert work["attention"]["forward"] == (4 * 2 * width * tokens, 4 * 512 * width * tokens)
    assert work["attention"]["backward"] == (7 * 2 * width * tokens, 8 * 512 * width * tokens)


def test_overlapping_patches_are_read_once(small):
    case = cases.Case(cases._patch_gather((10, 10)), "fp32", 1)
    tensors = case.tensors(0)
    tensors["ids"] = torch.tensor([[0, 1]])  # 16 x 16 at columns 0 and 10
    assert case.work(tensors)["forward"].bytes == 4 * 16 * 26 + (256 * 4 + 8) * 2


def test_inputs_are_rounded_and_parameters_are_not(small):
    case = attention_cases(("bf16",))[0]
    tensors = case.tensors(0)
    assert (
        tensors["qkv"].dtype == torch.bfloat16
        and tensors["bias"].dtype == tensors["tau"].dtype == torch.float32
    )
    assert torch.equal(case.tensors(0)["qkv"], tensors["qkv"])
    assert not torch.equal(case.tensors(1)["qkv"], tensors["qkv"])


# --- providers --------------------------------------------------------------------------------------


def wrong(case, name):
    """What `check` has against the provider; empty if it is right."""
    functions = {name: providers.build(name, case, CPU)}
    return run.check(case, functions, CPU)[1].get(name, "")


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_native_and_sdpa_are_right(small, dtype):
    for case in cases.cases(cases.OPS, (dtype,), (2,), quick=False):
        for name in sorted({"native", "sdpa"} & set(providers.serving(case.op))):
            if name == "native" and not ak.implementations(case.op, "cpu")[0].available:
                continue
            assert not wrong(case, name), (case.label, name)


def test_flex_is_right(small, monkeypatch):
    """Its masks and scores, uncompiled."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    for case in attention_cases():
        assert not wrong(case, "flex"), case.label


@pytest.mark.slow
@pytest.mark.no_poison
@pytest.mark.parametrize("name", ["compiled", "flex"])
def test_compiled_providers_are_right(small, name):
    for case in attention_cases(("fp32", "bf16")):
        assert not wrong(case, name), case.label
        torch.compiler.reset()


def stand_in(monkeypatch, module, **functions):
    """A module of that name with these functions, and no GPU asked for."""
    parent = module.split(".")[0]
    monkeypatch.setitem(sys.modules, parent, types.ModuleType(parent))
    monkeypatch.setitem(sys.modules, module, types.ModuleType(module))
    for name, function in functions.items():
        monkeypatch.setattr(sys.modules[module], name, function, raising=False)
    monkeypatch.setattr(providers, "_require_gpu", lambda name, device: None)


def test_xformers_is_called_right(small, monkeypatch):
    """Stood in for by PyTorch: tokens come before heads."""

    def memory_efficient_attention(q, k, v, attn_bias=None, scale=None):
        B, N, heads, _ = q.shape
        assert attn_bias is None or attn_bias.shape == (B, heads, N, N)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return functional.scaled_dot_product_attention(q, k, v, attn_bias, scale=scale).transpose(1, 2)

    stand_in(monkeypatch, "xformers.ops", memory_efficient_attention=memory_efficient_attention)
    for case in attention_cases(("fp32", "bf16")):
        assert not wrong(case, "xformers"), case.label


def test_flash_attn_is_called_right(small, monkeypatch):
    """Stood in for by PyTorch, one packed sequence at a time."""
    lengths = set()

    def varlen(qkv, cu_seqlens, max_seqlen):
        assert cu_seqlens.dtype == torch.int32 and cu_seqlens[-1] == len(qkv)
        outputs = []
        for start, end in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True):
            lengths.add(end - start)
            q, k, v = (x.transpose(0, 1) for x in qkv[start:end].unbind(1))
            outputs.append(functional.scaled_dot_product_attention(q, k, v).transpose(0, 1))
        assert max(lengths) <= max_seqlen
        return torch.cat(outputs)

    stand_in(monkeypatch, "flash_attn", flash_attn_varlen_qkvpacked_func=varlen)
    for case in attention_cases(("bf16",)):
        if case.shape.options["scoring"] == "cosine":
            with pytest.raises(providers.Unable, match="takes no bias"):
                providers.build("flash-attn", case, CPU)
        else:
            assert not wrong(case, "flash-attn"), case.label
    assert lengths == {16, 8}
    with pytest.raises(providers.Unable, match="bf16 and fp16 only"):
        providers.build("flash-attn", attention_cases()[-1], CPU)


# --- runs -------------------------------------------------------------------------------------------


def test_small_run_end_to_end(small, tmp_path, capsys):
    names = ("eager", "native", "sdpa", "triton")
    groups = bench(tmp_path, "--providers", *names, "--full")
    assert len(groups) == 2 * 11
    for group in groups:
        assert group.rows["eager"].error is None and len(group.copy.seconds["forward"]) == 2
        assert "triton" not in group.rows or "would say nothing" in group.rows["triton"].error
        for row in group.rows.values():
            if row.error is None:
                assert set(row.seconds) == set(group.modes)
                assert all(set(seconds) == {0, 1} for seconds in row.seconds.values())
                forward, *rest = (row.seconds[mode] for mode in group.modes)
                assert not rest or rest[1][0] == pytest.approx(forward[0] + rest[0][0])
    text = capsys.readouterr().out
    assert "2 interleaved rounds a case" in text and "the lowest and the highest" in text
    assert (
        "- triton: Triton's kernels run on a GPU; times from its interpreter would say nothing. (18 of 22 cases)"
        in text
    )
    assert (tmp_path / "kernels.png").read_bytes().startswith(b"\x89PNG")
    assert text.count("## window_attention: ") == 4


def test_flex_on_a_cpu_has_a_forward_pass_only(small, tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    arguments = ["--ops", "window_attention", "--dtypes", "fp32", "--providers", "eager", "flex"]
    for group in bench(tmp_path, *arguments):
        assert set(group.rows["flex"].seconds) == {"forward"}
        assert "no backward pass on a CPU" in group.rows["flex"].notes["backward"]
        assert group.against("eager", group.rows["flex"], "forward") and not group.against(
            "eager", group.rows["flex"], "backward"
        )


class WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return 1.01 * grad


def faulty(fault):
    def provider(case, device):
        right, calls = case.reference(upcast=False), []

        def function(**tensors):
            calls.append(1)
            if fault == "crash":
                raise AssertionError("kernel not found")
            if fault == "memory" and len(calls) > 3:
                raise torch.OutOfMemoryError("...")
            if fault == "gradient":
                tensors["tokens"] = WrongGradient.apply(tensors["tokens"])
            output = right(**tensors)
            return {"output": output * 1.01, "nan": output * float("nan"), "shape": output[..., :-1]}.get(
                fault, output
            )

        return function

    return provider


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("output", "wrong output: error"),
        ("gradient", "wrong grad of tokens: error"),
        ("nan", "wrong output: error nan"),
        ("shape", "shape"),
        ("crash", "AssertionError: kernel not found"),
        ("memory", "out of memory"),
    ],
)
def test_a_wrong_provider_gets_no_number(small, tmp_path, monkeypatch, fault, message):
    monkeypatch.setitem(providers.PROVIDERS, "native", (faulty(fault), cases.OPS))
    arguments = ["--ops", "unshuffle", "--dtypes", "fp32", "--providers", "eager", "native"]
    (group,) = bench(tmp_path, *arguments)
    assert message in group.rows["native"].error and not group.rows["native"].seconds
    assert group.rows["eager"].error is None and set(group.rows["eager"].seconds) == set(cases.MODES)
    text = (tmp_path / "report.md").read_text()
    assert f"- native: {group.rows['native'].error} (unshuffle" in text
    assert "| native" not in text


def test_what_is_not_installed_is_listed_with_its_reason(small, tmp_path, monkeypatch):
    for module in ("xformers.ops", "flash_attn"):
        monkeypatch.setitem(sys.modules, module, None)
    names = ["eager", "xformers", "flash-attn"]
    bench(tmp_path, "--ops", "window_attention", "--dtypes", "bf16", "--providers", *names, "--full")
    text = (tmp_path / "report.md").read_text()
    assert (
        "- xformers: xformers does not import: " in text
        and "- flash-attn: flash-attn does not import: " in text
    )
    assert "- flash-attn: flash-attn takes no bias. (" in text


@pytest.mark.no_poison
def test_compiled_providers_are_measured(small, tmp_path, monkeypatch):
    """With gradients and their memory, whatever the compiler makes of the op."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    (group,) = bench(tmp_path, "--ops", "unshuffle", "--dtypes", "fp32", "--providers", "eager", "compiled")
    row = group.rows["compiled"]
    assert not row.error and row.seconds and row.metrics["saved"] > 0


def test_no_compiler_costs_a_row_and_not_the_run(small, tmp_path, monkeypatch):
    def no_compiler(function, **_):
        raise RuntimeError("InvalidCxxCompiler: no working C++ compiler found")

    monkeypatch.setattr(torch, "compile", no_compiler)
    (group,) = bench(tmp_path, "--ops", "info_nce", "--dtypes", "fp32", "--providers", "eager", "compiled")
    assert "no working C++ compiler" in group.rows["compiled"].error and group.rows["eager"].seconds


def test_when_the_quick_time_is_spent_the_rest_says_so(small, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "QUICK_SECONDS", 0)
    (group,) = bench(tmp_path, "--ops", "unshuffle", "--dtypes", "fp32", "--providers", "eager", "native")
    assert all("time was spent" in row.error for row in group.rows.values())


def test_a_run_that_is_interrupted_leaves_its_report(small, tmp_path, monkeypatch, capsys):
    measure_case, begun = run.measure_case, []

    def interrupted(case, *arguments):
        begun.append(case)
        if len(begun) == 3:
            raise KeyboardInterrupt
        measure_case(case, *arguments)

    monkeypatch.setattr(run, "measure_case", interrupted)
    arguments = ["--device", "cpu", "--rounds", "2", "--batch-size", "2", "--providers", "eager"]
    assert main(["kernels", *arguments, "--dtypes", "fp32", "--out", str(tmp_path)]) == 130
    assert f"interrupted; what was measured is in {tmp_path}, with its report." in capsys.readouterr().err
    text = (tmp_path / "report.md").read_text()
    planned = len(cases.cases(cases.OPS, ("fp32",), (2,), quick=True))
    assert f"**The run ended early: 2 of {planned} cases were begun.**" in text
    assert "**The run was interrupted: this is what it measured until then.**" in text
    assert text.count("## window_attention: ") == 2
    assert (tmp_path / "kernels.png").exists()


@pytest.mark.skipif(os.name == "nt", reason="SIGTERM cannot be handled there.")
def test_a_run_that_is_terminated_leaves_its_report(tmp_path):
    """Even one that has no case yet: it is ended during the ceilings."""
    script = f"""if True:
        import os, runpy, signal, sys
        from bench import roofline
        roofline.matmul_ceilings = lambda *_: os.kill(os.getpid(), signal.SIGTERM)
        sys.argv = ["bench", "kernels", "--device", "cpu", "--out", {str(tmp_path)!r}]
        runpy.run_module("bench", run_name="__main__", alter_sys=True)
    """
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 130, done.stderr
    text = (tmp_path / "report.md").read_text()
    assert "The run ended early: 0 of" in text


def test_inputs_are_out_of_the_cache(monkeypatch):
    monkeypatch.setattr(devices, "cache_bytes", lambda device: 2**20)
    case = cases.Case(cases._info_nce(32, 64), "fp32", 2)
    inputs = run.Inputs(case, CPU, torch.zeros(()))
    size = 2 * 2 * 32 * 64 * 4 + 4
    assert (len(inputs.sets) - 1) * size >= 2 * 2**20
    seen = [next(inputs)[0]["pred"] for _ in inputs.sets]
    assert len({x.data_ptr() for x in seen}) == len(seen) and next(inputs)[0]["pred"] is seen[0]
    assert all(torch.equal(x, seen[0]) and x.requires_grad for x in seen)
    assert run.copies(1, CPU) == 1000


def test_copy_moves_the_bytes_of_the_passes():
    copy = run.Copy([cases.Work(8000.0), cases.Work(16000.0)], CPU)
    assert 2 * copy.forward().nbytes == 8000 and 2 * copy.backward(None).nbytes == 16000
    assert run.Copy([cases.Work(8000.0)], CPU).backward is None


# --- the report -------------------------------------------------------------------------------------


@pytest.fixture
def record(tmp_path):
    """Round 1 runs on a machine three times slower: ratios must not notice."""
    common = dict.fromkeys(results.KERNEL_COLUMNS, "") | {
        "device_name": "A machine", "threads": 2, "cores": 2, "torch": "2.10", "preset": "quick",
    }  # fmt: skip
    path = tmp_path / "measurements.csv"
    key = {"op": "unshuffle", "shape": "102 to 512", "dtype": "fp32", "batch": 8}
    with results.Writer(path, common, results.KERNEL_COLUMNS) as write:
        write.add("others_running", 1.5)
        write.add("matmul_ceiling", 1e9, "FLOP/s", dtype="fp32", part="forward")
        write.add("copy_ceiling", 1e10)
        for mode, moved, flops in zip(cases.MODES, (4e6, 6e6, 10e6), (1e5, 5e6, 5.1e6), strict=True):
            write.add("bytes", moved, mode=mode, **key)
            write.add("flops", flops, mode=mode, **key)
        for name, forward, backward in (
            ("copy", 1e-3, 2e-3), ("eager", 4e-3, 16e-3), ("native", 2e-3, 8e-3), ("triton", 1e-6, 1e-6),
        ):  # fmt: skip
            for i, slow in enumerate((1, 3, 1)):
                for mode, value in zip(cases.MODES, (forward, backward, forward + backward), strict=True):
                    write.add("seconds", slow * value, round=i, mode=mode, provider=name, **key)
        write.add("saved", 2.5e6, provider="native", **key)
        write.add("first_call", 1.25, provider="native", **key)
        write.add("error", None, note="wrong output: error 7", provider="triton", **key)
        write.add("copy_ceiling", 0.7e10)
    return path


def table(text, heading):
    lines = text.split(heading)[1].split("\n\n")[1].splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_figures_of_the_report(record, tmp_path):
    out = tmp_path / "elsewhere"
    out.mkdir()
    text = report.write(record, out)
    header, _, eager, native, floor = table(text, "Forward and backward:")
    assert header[:8] == [
        "dtype",
        "batch",
        "provider",
        "ms",
        "against eager",
        "against compiled",
        "GB/s",
        "of floor",
    ]
    assert eager[2:] == ["eager", "20.0 (20.0 to 60.0)", "1.00", "—", "0.5", "30 %", "—", "—"]
    # The floor: a copy of 1 ms forward; backward 5 MFLOP at 1 GFLOP/s, longer than the copy.
    assert native[2:] == ["native", "10.0 (10.0 to 30.0)", "2.00", "—", "1.0", "60 %", "2.5", "1.25"]
    assert floor[2:] == ["*floor*", "6.00", "—", "—", "1.7", "100 %", "—", "—"]
    assert table(text, "Forward:")[3][2:] == ["native", "2.00 (2.00 to 6.00)", "2.00", "—", "2.0", "50 %"]
    assert table(text, "## This project's kernels")[2][:5] == [
        "unshuffle",
        "102 to 512",
        "fp32",
        "8",
        "native",
    ]
    assert "- triton: wrong output: error 7 (unshuffle 102 to 512 fp32 x8)" in text
    assert text in (out / "report.md").read_text() and (out / "kernels.png").exists()


def test_a_busy_machine_is_said(record):
    text = report.text(results.read(record, results.KERNEL_COLUMNS))
    assert "**The machine was busy at the start: 1.5 other processes were running on 2 cores." in text
    assert "copied at 10.0 GB/s before the timing and at 7.0 GB/s after it.**" in text


def test_late_launches_are_said(small, tmp_path, monkeypatch):
    """By a stand-in for a GPU's timing, whose host falls behind in the second round."""
    calls, on_cpu = [], timing.measure_passes_cpu

    def measure(call):
        calls.append(1)
        return on_cpu(call)[0], timing.Launches(1e-4, 2e-4, 0.2 if len(calls) <= 2 else 0.6)

    monkeypatch.setattr(timing, "measure_passes_cpu", measure)
    bench(tmp_path, "--ops", "unshuffle", "--dtypes", "fp32", "--providers", "eager")
    rows = results.read(tmp_path / "measurements.csv", results.KERNEL_COLUMNS)
    found = [(r["metric"], r["provider"], r["round"], r["value"]) for r in rows if r["metric"] == "late"]
    assert sorted(found) == [
        ("late", "copy", 0, 0.2), ("late", "copy", 1, 0.6), ("late", "eager", 0, 0.2), ("late", "eager", 1, 0.6),
    ]  # fmt: skip
    (warning,) = (line for line in (tmp_path / "report.md").read_text().split("\n") if "upper bounds" in line)
    assert warning.startswith("**The host took longer") and "fp32 x2 eager (1 of 2 rounds)" in warning
    assert "fp32 x2 copy (1 of 2 rounds)" in warning


def test_a_record_of_models_is_refused(tmp_path):
    path = tmp_path / "measurements.csv"
    with results.Writer(path, dict.fromkeys(results.COLUMNS, "")) as write:
        write.add("copy_ceiling", 1.0)
    with pytest.raises(ValueError, match="lacks the columns op, shape"):
        results.read(path, results.KERNEL_COLUMNS)


# --- the command line -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ops", "conv"], "--ops: there is no 'conv' here; choose from window_attention, "),
        (["--providers", "cudnn"], "there is no 'cudnn' here; choose from eager, "),
        (
            ["--dtypes", "fp8"],
            "--dtypes: there is no 'fp8' here; choose from fp32 or float32, bf16 or bfloat16, fp16",
        ),
        (["--batch-size", "8", "0"], "expected a positive whole number, got '0'"),
    ],
)
def test_bad_arguments_show_the_usage_of_their_own_level(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["kernels", *arguments])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and message in error
    assert error.startswith("usage: python -m bench kernels")


@pytest.mark.parametrize("level", ["kernels", "models"])
def test_a_folder_that_cannot_be_written_is_refused_before_anything_is_measured(level, tmp_path, capsys):
    file = tmp_path / "file"
    file.touch()
    for out, reason in ((file, "File exists"), (file / "below", "Not a directory")):
        with pytest.raises(SystemExit) as stop:
            main([level, "--device", "cpu", "--out", str(out)])
        said = capsys.readouterr()
        assert stop.value.code == 2 and not said.out
        sentence = f"--out must be a folder that can be written to, which {out} is not: {reason}."
        assert said.err.endswith(f"python -m bench {level}: error: {sentence}\n")


@pytest.mark.parametrize(
    ("chosen", "why"),
    [
        (["--providers", "sdpa", "--ops", "patch_gather"], "sdpa: It serves window_attention and attention only."),
        (["--providers", "triton"], "triton: Triton's kernels run on a GPU"),
        (["--providers", "flash-attn", "sdpa", "--ops", "info_nce"], "flash-attn: It serves window_attention only."),
        (["--providers", "flash-attn", "--ops", "window_attention"], "flash-attn: flash-attn takes no bias."),
    ],
)  # fmt: skip
def test_providers_that_can_run_nothing_are_refused(small, tmp_path, monkeypatch, capsys, chosen, why):
    monkeypatch.setattr(run, "measure_ceilings", lambda *_: pytest.fail("it measured"))
    with pytest.raises(SystemExit) as stop:
        main(["kernels", "--device", "cpu", "--out", str(tmp_path), *chosen])
    assert stop.value.code == 2
    assert (
        f"None of the chosen providers can run any of the chosen cases here. {why}" in capsys.readouterr().err
    )
    assert not list(tmp_path.iterdir())


def test_an_op_that_no_chosen_provider_serves_is_left_out(small, tmp_path):
    groups = bench(tmp_path, "--providers", "sdpa", "--dtypes", "float32")
    assert {(group.op, group.dtype) for group in groups} == {
        ("window_attention", "fp32"),
        ("attention", "fp32"),
    }


def test_either_spelling_of_a_dtype(small, tmp_path, capsys):
    arguments = ["--ops", "unshuffle", "--providers", "eager", "--dtypes", "bfloat16", "bf16", "float16"]
    assert [group.dtype for group in bench(tmp_path, *arguments)] == ["bf16", "fp16"]
    assert capsys.readouterr().out.count("fp16 is slow on most CPUs") == 1


@pytest.mark.no_poison
def test_compiling_is_announced_and_the_compiler_is_quiet(small, tmp_path, monkeypatch, capfd):
    def compiled(function, **_):
        logging.getLogger("torch.utils.cpp_extension").warning("No CUDA runtime is found")
        warnings.warn("deprecated", FutureWarning, stacklevel=1)
        return function

    monkeypatch.setattr(torch, "compile", compiled)
    bench(tmp_path, "--ops", "unshuffle", "--dtypes", "fp32", "--providers", "eager", "compiled")
    said = capfd.readouterr()
    assert said.out.count("compiling compiled ...") == 1 and not said.err


def test_help_tells_the_defaults(capsys):
    for level, told in (
        ("models", ("bench/results/latest", "clips per step; default: 8, on a CPU", "up to 5 as", "default: 1024")),
        ("kernels", ("bench/results/latest/kernels", "clips; default: 8, with --full 1, 8, 32", "up to 40, for 4 s")),
    ):  # fmt: skip
        with pytest.raises(SystemExit):
            main([level, "--help"])
        text = " ".join(capsys.readouterr().out.split())
        assert all(words in text for words in told), text


def test_help_lists_the_names(capsys):
    for level, names in (
        ("models", ("audiomae_base", "ssast_patch_tiny")),
        ("kernels", ("flash-attn", "info_nce")),
    ):
        with pytest.raises(SystemExit):
            main([level, "--help"])
        text = capsys.readouterr().out
        assert all(name in text for name in names)


def test_make_test_leaves_the_benchmarks_alone():
    command = [sys.executable, "-m", "pytest", "tests/benchmarks", "--collect-only", "-p", "no:cacheprovider"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 5, done.stdout + done.stderr  # nothing collected
