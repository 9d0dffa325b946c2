"""The binaries of every kernel, compiled for GPUs that are not there, obey the rules and the baseline.

Processes of their own: one compiles, one interprets, and Triton cannot do both in one.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from audiomae_kernels import _triton

pytestmark = pytest.mark.skipif(not _triton.available(), reason=_triton.why_not())

HERE = Path(__file__).parent
BASELINE = HERE / "baseline.json"
TARGETS = ("sm_90", "sm_120", "gfx942")  # of the broken kernels: in bfloat16, float32, bfloat16

# What `survey.compile_rows` says of a binary that breaks no rule.
CLEAN = dict.fromkeys(("spills", "local", "atomics", "narrow", "reduced"), 0)
CLEAN |= {"matrix": "HMMA", "products": 4}
CLEAN |= {"launch": "op", "kernel": "k", "function": "k", "target": "sm_90", "dtype": "bfloat16"}
CLEAN |= {"aligned": True, "loads": {}, "stores": {}}


def inspect(tmp_path, *arguments):
    """The report of ``python -m audiomae_kernels.inspect``, from an empty compile cache."""
    report = tmp_path / "report.json"
    paths = os.pathsep.join([*filter(None, [os.environ.get("PYTHONPATH")]), str(HERE)])
    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path / "cache"), "PYTHONPATH": paths}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-m", "audiomae_kernels.inspect", "--json", str(report), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert report.exists(), done.stderr
    found = json.loads(report.read_text())
    assert done.returncode == bool(found["findings"])
    return found


def test_quick_selection(tmp_path):
    report = inspect(tmp_path, "--quick", "--baseline", str(BASELINE))
    assert not report["findings"], "\n".join(report["findings"])
    assert {row["target"] for row in report["rows"]} == {"sm_80", "sm_90", "sm_100", "sm_120", "gfx942"}
    assert {row["dtype"] for row in report["rows"]} == {"float32", "bfloat16", "float16"}
    from audiomae_kernels.inspect import lint

    reviewed = lint.binaries_in(json.loads(BASELINE.read_text()))
    assert reviewed == len(report["rows"]), "the baseline holds binaries that no longer exist"


@pytest.mark.slow
def test_every_target_dtype_and_alignment(tmp_path):
    report = inspect(tmp_path)
    assert not report["findings"], "\n".join(report["findings"])


@pytest.fixture(scope="module")
def broken(tmp_path_factory):
    """Findings about deliberately broken kernels: of their binaries by target and kernel, and of traffic."""
    report = inspect(
        tmp_path_factory.mktemp("broken"),
        *("--launches", "broken_launches", "--targets", ",".join(TARGETS), "--quick", "--processes", "1"),
    )
    found = {place: {row["launch"]: [] for row in report["rows"]} for place in (*TARGETS, "traffic")}
    for text in report["findings"]:
        launch, *_, target = text.split(": ")[0].split(" | ")
        found[target if target in found else "traffic"][launch].append(text)
    return found


@pytest.mark.parametrize(
    "launch, message, targets",
    [
        ("spilling", "it spills", ["sm_90"]),  # 16,384 values fit into the registers of an AMD wave
        ("atomic", "atomic instructions", ["sm_90", "gfx942"]),
        ("tf32", "round float32 to TF32", ["sm_120"]),
        ("scalar", "streaming operand x is accessed 16 bits at a time", ["sm_90", "gfx942"]),
        ("narrow", "multiplied with a run-time argument in 32 bits", ["sm_90", "gfx942"]),
        ("scalar_dot", "its dots do not run on tensor cores", ["sm_90", "gfx942"]),
    ],
)
def test_broken_kernels_are_found(broken, launch, message, targets):
    for target in targets:
        assert any(message in text for text in broken[target][launch]), broken[target][launch]


def test_bytes_beyond_the_fewest_are_found(broken):
    assert any("moves 1.50 times the fewest bytes" in text for text in broken["traffic"]["twice"])


def test_a_fine_kernel_passes(broken):
    assert all(broken[place]["fine"] == [] for place in broken)


def test_differences_from_the_baseline_are_found(tmp_path):
    from audiomae_kernels.inspect import lint

    row = {"launch": "op", "kernel": "k", "target": "sm_90", "dtype": "bfloat16", "aligned": True}
    row |= {"registers": 40, "shared": 0, "matrix": "HMMA", "products": 24}
    row |= {"loads": {"x": [32, 128]}, "stores": {}}
    other = row | {"target": "sm_80", "registers": 48}
    lint.write_baseline([row, other], tmp_path / "baseline.json")
    reviewed = json.loads((tmp_path / "baseline.json").read_text())
    assert lint.binaries_in(reviewed) == 2
    assert lint.compare([row, other], reviewed) == []
    (found,) = lint.compare([row | {"registers": 48}], reviewed)
    assert found.endswith("registers is 48, and was 40 when reviewed")
    (found,) = lint.compare([row | {"products": 8}], reviewed)  # the others fell back to scalar arithmetic
    assert found.endswith("products is 8, and was 24 when reviewed")
    (found,) = lint.compare([row | {"loads": {"x": [128]}}], reviewed)
    assert found.endswith("loads is x 128, and was x 32/128 when reviewed")
    (found,) = lint.compare([row | {"target": "sm_86"}], reviewed)
    assert found.endswith("nobody has reviewed it")
    assert lint.compare([row | {"registers": 48}], reviewed | {"triton": "0"}) == []


@pytest.mark.parametrize("dtype, allowed", [("float32", False), ("bfloat16", False), ("float16", True)])
def test_tf32_is_for_float16_alone(dtype, allowed):
    from audiomae_kernels.inspect import lint
    from audiomae_kernels.inspect.launches import Launch

    row = CLEAN | {"reduced": 4, "dtype": dtype}
    assert (lint.violations(row, Launch("op", print)) == []) == allowed


@pytest.mark.parametrize(
    "loads, message",
    [
        ({"x": [128]}, None),
        ({"x|y": [128], "y": [32]}, None),
        ({"x|y": [16, 128]}, "its streaming operand x is accessed 16 bits at a time"),
        ({"xy|y": [128]}, "no access of its streaming operand x was found"),
        ({"x": [128], "?": [128]}, "some of its loads could not be followed back to an operand"),
    ],
)
def test_accesses_that_may_be_of_several_operands_or_of_any(loads, message):
    from audiomae_kernels.inspect import lint
    from audiomae_kernels.inspect.launches import Launch

    found = lint.violations(CLEAN | {"loads": loads}, Launch("op", print, {"k": {"x": 1}}))
    assert [text.split(": ")[1] for text in found] == ([] if message is None else [message])


def test_kernels_that_a_launch_names_have_to_be_found():
    from audiomae_kernels.inspect import lint
    from audiomae_kernels.inspect.launches import Launch

    launches, jobs = [Launch("op", print, {"k": {"x": 64}}, {"product": 1})], [("sm_90", "bfloat16", True)]
    (found,) = lint.missing([CLEAN], launches, jobs)
    assert found.startswith("op | product | bfloat16 | aligned | sm_90: the launch names this kernel")
    assert len(lint.missing([], launches, jobs)) == 2
    assert len(lint.missing([CLEAN, CLEAN | {"function": "product"}], launches, jobs * 2)) == 0

    report = {"op | k | bfloat16": {"programs": 1, "operands": {"x": 128}}}
    (found,) = lint.traffic_violations(report, launches, ["bfloat16"])
    assert found.startswith("op | product | bfloat16: the launch names this kernel")
    assert len(lint.traffic_violations({}, launches, ["bfloat16", "float32"])) == 4


def test_the_table_is_printed_where_the_interpreter_fails(monkeypatch, capsys):
    from audiomae_kernels.inspect import __main__ as command
    from audiomae_kernels.inspect import survey, traffic

    row = CLEAN | {"launch": "patch_gather", "registers": 40, "shared": 0, "occupancy": 0.5, "warps": 4}
    monkeypatch.setattr(survey, "compile_all", lambda module, wanted, processes: [[row] for _ in wanted])

    def measure(*_):
        raise RuntimeError("The interpreter failed.")

    monkeypatch.setattr(traffic, "measure", measure)
    assert command.main(["--quick"]) == 1
    printed = capsys.readouterr()
    assert printed.out.splitlines()[-1].startswith("| patch_gather | k | sm_90 | bfloat16 |")
    assert "No bytes were counted, and no times are predicted. The interpreter failed." in printed.err


@pytest.fixture
def asked(monkeypatch):
    """(launch, target, dtype, aligned) of what was to be compiled, and dtypes of what was to be counted."""
    from audiomae_kernels.inspect import survey, traffic

    seen = {"compiled": [], "counted": []}

    def compile_all(module, wanted, processes):
        seen["compiled"] += wanted
        return [[] for _ in wanted]

    def measure(dtypes, launches, quick, progress):
        seen["counted"] += dtypes
        progress("window_attention", dtypes[0])
        return {}

    monkeypatch.setattr(survey, "compile_all", compile_all)
    monkeypatch.setattr(traffic, "measure", measure)
    return seen


@pytest.mark.parametrize(
    "given",
    [["bf16", "fp32"], ["bfloat16", "float32"], ["bf16,float32"], ["bf16,fp32", "bfloat16"]],
    ids=" ".join,
)
def test_dtypes_have_two_names_and_two_separators(asked, given):
    from audiomae_kernels.inspect import __main__ as command

    command.main(["--targets", "sm_90", "gfx942", "--dtypes", *given])
    chosen = {(target, dtype) for _, target, dtype, _ in asked["compiled"]}
    assert chosen == {(target, dtype) for target in ("sm_90", "gfx942") for dtype in ("bfloat16", "float32")}
    assert sorted(asked["counted"]) == ["bfloat16", "float32"]


def test_inspection_knows_the_dtypes_of_the_benchmark(asked):
    from audiomae_kernels.inspect import __main__ as command

    from bench.registry import DTYPES

    command.main(["--targets", "sm_90", "--dtypes", *DTYPES])
    assert {dtype for *_, dtype, _ in asked["compiled"]} == {str(dtype)[6:] for dtype in DTYPES.values()}


def test_progress_counts_to_the_end(asked, capsys):
    from audiomae_kernels.inspect import __main__ as command

    command.main(["--quick"])
    said = [line for line in capsys.readouterr().err.splitlines() if "compiled: " in line]
    total = len(asked["compiled"])
    assert len(said) == total
    assert said[0] == f"1 of {total} compiled: window_attention / sm_80 / bfloat16 / aligned"
    assert said[-1].startswith(f"{total} of {total} compiled: ")


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("--clips 0", "--clips: it has to be a positive integer, not '0'"),
        ("--clips -1", "--clips: it has to be a positive integer, not '-1'"),
        ("--clips many", "--clips: it has to be a positive integer, not 'many'"),
        ("--processes 0", "--processes: it has to be a positive integer, not '0'"),
        ("--targets sm_90,sm_70", "--targets: there is no 'sm_70'; choose from sm_80, sm_86, "),
        ("--targets=", "--targets: there is no ''; choose from sm_80, "),
        ("--dtypes fp64", "--dtypes: there is no 'fp64'; choose from bf16, fp16, fp32, bfloat16, "),
        (
            "--quick --targets sm_86",
            "--quick has none of these --targets in these --dtypes; it has sm_80 in ",
        ),
        ("--launches no_such_module", "--launches: No module named 'no_such_module'"),
        ("--json no/such/report.json", "--json: there is no folder no/such to write report.json to"),
        ("--baseline no/such.json", "--baseline: no/such.json cannot be read"),
    ],
)
def test_refused_before_anything_is_compiled(asked, capsys, arguments, message):
    from audiomae_kernels.inspect import __main__ as command

    with pytest.raises(SystemExit) as exit:
        command.main(arguments.split())
    assert exit.value.code == 2
    assert message in capsys.readouterr().err
    assert asked == {"compiled": [], "counted": []}


def test_every_option_is_explained(capsys):
    from audiomae_kernels.inspect import __main__ as command
    from audiomae_kernels.inspect.targets import TARGETS

    with pytest.raises(SystemExit):
        command.main(["--help"])
    text = capsys.readouterr().out
    assert "Compiles the Triton kernels" in text and "see the package" not in text
    for name in (*TARGETS, *command.DTYPES):
        assert name in text
    for option in text.partition("options:")[2].split("\n  -")[1:]:
        assert len(option.split()) > 5, option


def test_tables_label_predictions():
    from audiomae_kernels.inspect import __main__ as command
    from audiomae_kernels.inspect.launches import Launch

    launch = Launch("op", lambda tensor, clips: None, {"k": {"x": 10**6}}, {"k": 10**9})
    report = {"op | k | bfloat16": {"programs": 4, "operands": {"x": 2_200_000, "ids": 800}}}
    header, _, row = command.traffic_table(report, [launch], clips=1000).splitlines()
    cells = dict(zip(*([cell.strip() for cell in line.split("|")] for line in (header, row)), strict=True))
    assert cells["fewest bytes a clip"] == "2000000"
    assert cells["moved / fewest"] == "1.100"
    assert cells["bytes a program"] == "550200"
    # 1 TFLOP at 312 TFLOP/s, and at 989; 2 GB at the data sheets' bandwidths take less
    assert cells["A100, predicted us"] == "3205.1"
    assert cells["H100, predicted us"] == "1011.1"
