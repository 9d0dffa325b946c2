"""`make gpu`: its steps survive each other, its file holds everything, and its tests hold together."""

import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
import torch
from gpu import environment
from gpu import run as runner
from gpu.run import Result, Step

ROOT = Path(__file__).parents[1]
ENVIRONMENT = {"device": "ACME X-1 (80 GB)", "commit": "abc123", "dirty": False, "target": "sm_90"}
ENVIRONMENT |= {
    "why_no_table": "",
    "sanitizers": dict.fromkeys(("overflow", "consan", "gsan", "memcheck", "racecheck"), ""),
}

# What the step "environment" does.
WRITE = f"open('gpu-results/environment.json', 'w').write({json.dumps(ENVIRONMENT)!r})"


def python(name, code, **options):
    return Step(name, [sys.executable, "-c", code], **options)


def is_alive(process):
    try:
        return Path(f"/proc/{process}/stat").read_text().split()[2] != "Z"
    except OSError:
        return False


def in_checkout(*command, **environment):
    return subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=os.environ | environment, capture_output=True, text=True
    )


def test_steps_survive_each_other(tmp_path):
    steps = [
        python("good", "print('first'); print('3 passed')"),
        python("bad", "import sys; print('why'); sys.exit(3)"),
        python("killed", "import os; os.abort()"),
        python("slow", "print('begun', flush=True); import time; time.sleep(60)", seconds=1),
        Step("missing", ["/nonexistent/program"]),
        Step("elsewhere", skip="it is for other machines"),
        python("last", "print('done')", environment={"ANSWER": "42"}),
    ]
    results = runner.run(steps, tmp_path)
    assert [(r.name, r.outcome) for r in results] == [
        ("good", "ok"),
        ("bad", "failed"),
        ("killed", "failed"),
        ("slow", "timed out"),
        ("missing", "failed"),
        ("elsewhere", "skipped"),
        ("last", "ok"),
    ]
    notes = [r.note for r in results]
    assert notes[:2] == ["3 passed", "exit code 3; why"]
    assert notes[3] == "ended after 1 s" and results[3].seconds < 15
    assert notes[4].startswith("it did not start: ") and notes[5] == "it is for other machines"
    assert (tmp_path / "slow.log").read_text() == "begun\n"
    lines = runner.table(results).splitlines()
    assert len(lines) == 8 and lines[2].split() == ["bad", "failed", "0", "exit", "code", "3;", "why"]


def test_the_environment_of_a_step(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    code = "import os; print(os.environ['MODE'], os.environ.get('TRITON_INTERPRET'))"
    (result,) = runner.run([python("step", code, environment={"MODE": "gsan"})], tmp_path)
    assert result.note == "gsan None"


def test_output_of_its_own(tmp_path):
    code = "import sys; print('table'); print('warning', file=sys.stderr)"
    runner.run([python("step", code, output="table.md")], tmp_path)
    assert (tmp_path / "table.md").read_text() == "table\n"
    assert (tmp_path / "step.log").read_text() == "warning\n"


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="It looks at /proc.")
def test_a_step_that_takes_too_long_leaves_no_process(tmp_path, monkeypatch):
    """Not even one that ignores the friendly signal."""
    monkeypatch.setattr(runner, "GRACE", 1)
    script = "trap '' TERM; sleep 60 & echo $!; wait"
    (result,) = runner.run([Step("stubborn", ["bash", "-c", script], seconds=1)], tmp_path)
    assert result.outcome == "timed out"
    child = int((tmp_path / "stubborn.log").read_text())
    for _ in range(50):
        if not is_alive(child):
            return
        time.sleep(0.1)
    pytest.fail("The step's child is still there.")


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_interrupted(tmp_path, sent):
    """What was done is packed; nothing else is run."""
    script = f"""if True:
        import signal, sys
        from pathlib import Path
        from gpu import run as runner
        signal.signal({int(sent)}, signal.{"SIG_IGN" if sent == signal.SIGINT else "SIG_DFL"})
        folder = Path({str(tmp_path)!r})
        runner.ROOT = folder
        def python(name, code):
            return runner.Step(name, [sys.executable, "-c", code])
        interrupt = "import os, time; os.kill(os.getppid(), {int(sent)}); time.sleep(60)"
        runner.preparation = lambda rehearse: [python("environment", {WRITE!r})]
        runner.measurements = lambda *_: [
            python("first", "print('one')"), python("second", interrupt), python("third", "print('three')")
        ]
        sys.exit(runner.main([]))
    """
    done = in_checkout("-c", script, PYTHONPATH=str(ROOT / "tests"))
    assert done.returncode == 1, done.stderr
    assert done.stdout.splitlines()[-1] == "gpu-results-acme-x-1-80-gb-abc123.tar.gz"
    with tarfile.open(tmp_path / "gpu-results-acme-x-1-80-gb-abc123.tar.gz") as tar:
        summary = json.load(tar.extractfile("gpu-results-acme-x-1-80-gb-abc123/summary.json"))
    assert [(r["name"], r["outcome"]) for r in summary] == [
        ("environment", "ok"),
        ("first", "ok"),
        ("second", "interrupted"),
    ]


@pytest.fixture
def make_gpu(tmp_path, monkeypatch, capsys):
    """``make_gpu(preparation, measurements)``: (exit code, what it printed, by line)."""
    monkeypatch.setattr(runner, "ROOT", tmp_path)
    monkeypatch.setattr(runner.signal, "signal", lambda *_: None)

    def make_gpu(preparation, measurements):
        monkeypatch.setattr(runner, "preparation", lambda rehearse: preparation)
        monkeypatch.setattr(runner, "measurements", lambda environment, rehearse: measurements)
        return runner.main([]), capsys.readouterr().out.splitlines()

    return make_gpu


def test_the_file_holds_everything(make_gpu, tmp_path):
    bench = "import os; os.mkdir('gpu-results/bench'); open('gpu-results/bench/measurements.csv', 'w')"
    steps = [python("benchmark", bench), python("device tests", "print('2 passed')")]
    code, said = make_gpu([python("install", ""), python("environment", WRITE)], steps)
    assert code == 0
    assert "attach this file to an issue" in said[-2]
    (archive,) = tmp_path.glob("*.tar.gz")
    assert said[-1] == archive.name
    with tarfile.open(archive) as tar:
        names = {name.partition("/")[2] for name in tar.getnames()}
        summary = tar.extractfile(f"{tar.getnames()[0]}/summary.txt").read().decode()
    assert names >= {
        "environment.json",
        "summary.json",
        "install.log",
        "environment.log",
        "benchmark.log",
        "device-tests.log",
        "bench/measurements.csv",
    }
    assert [line.split()[:2] for line in summary.splitlines()[1:3]] == [
        ["install", "ok"],
        ["environment", "ok"],
    ]
    assert not list(tmp_path.glob("*.part"))


@pytest.mark.parametrize("broken", ["install", "benchmark"])
def test_a_failure_is_the_exit_code(make_gpu, tmp_path, broken):
    fails = "raise SystemExit(1)"
    preparation = [python("install", fails * (broken == "install")), python("environment", WRITE)]
    code, _ = make_gpu(preparation, [python("benchmark", fails * (broken == "benchmark"))])
    assert code == 1
    assert len(list(tmp_path.glob("*.tar.gz"))) == 1


def test_an_installation_that_fails_is_named_with_its_log(make_gpu):
    steps = [python("install", "raise SystemExit(2)"), Step("environment", ["/nonexistent/python"])]
    code, said = make_gpu(steps, [])
    assert code == 1
    assert (
        said[-1]
        == "Nothing was measured, because of the step 'install': failed (see gpu-results/install.log)."
    )


def test_without_a_gpu_the_reason_comes_last(make_gpu, tmp_path):
    refuse = "import sys; print('There is no GPU here.'); sys.exit(1)"
    code, said = make_gpu([python("environment", refuse)], [python("never", "open('ran', 'w')")])
    assert code == 1 and said[-1] == "There is no GPU here."
    assert len(said) == 3 and said[0].startswith(
        "environment (gpu-results/environment.log) ... failed after "
    )
    assert not list(tmp_path.glob("*.tar.gz")) and not (tmp_path / "ran").exists()


def test_packed_name_says_that_the_checkout_was_changed(tmp_path):
    folder = tmp_path / "results"
    folder.mkdir()
    results = [Result("a", "ok", 1.0, "")]
    assert runner.pack(folder, results, ENVIRONMENT | {"dirty": True}, tmp_path).name == (
        "gpu-results-acme-x-1-80-gb-abc123-dirty.tar.gz"
    )


@pytest.mark.parametrize("rehearse", [True, False])
def test_the_steps(rehearse):
    reasons = ENVIRONMENT["sanitizers"] | {"gsan": "it needs a C++ compiler"}
    steps = {step.name: step for step in runner.measurements(ENVIRONMENT | {"sanitizers": reasons}, rehearse)}
    files = {path.name for path in (ROOT / "tests/gpu").glob("test_*.py")}
    assert {Path(s.command[-1]).name for s in steps.values() if s.name.startswith("device tests")} == files
    assert {name for name, step in steps.items() if step.skip} == {"sanitizer: gsan"}
    assert steps["sanitizer: memcheck"].command[:3] == ["compute-sanitizer", "--tool", "memcheck"]
    assert {
        "benchmark: kernels",
        "benchmark: models",
        "benchmark: models, all",
        "table of binaries",
    } <= steps.keys()
    for name, step in steps.items():
        if "--device" in step.command:
            assert step.command[step.command.index("--device") + 1] == ("cpu" if rehearse else "cuda"), name
    junit = [part for step in steps.values() for part in step.command if part.startswith("--junitxml")]
    assert len(junit) == len(set(junit)) == len(files) + 4


def test_environment_without_a_gpu(tmp_path, monkeypatch, capsys):
    file = tmp_path / "environment.json"
    monkeypatch.setattr(environment.devices, "select", lambda name: torch.device("cpu"))
    assert environment.main([str(file)]) == 1
    said = capsys.readouterr().out
    assert (
        said.startswith("No CUDA or ROCm GPU was found")
        and "nothing was measured and nothing rehearsed" in said
    )
    assert not file.exists()


def test_environment_with_a_gpu_that_does_not_work(tmp_path, monkeypatch, capsys):
    def select(name):
        raise environment.devices.DeviceError("The driver is too old.")

    monkeypatch.setattr(environment.devices, "select", select)
    assert environment.main([str(tmp_path / "environment.json")]) == 1
    assert capsys.readouterr().out == "The driver is too old.\n"


def test_environment_of_a_rehearsal(tmp_path):
    file = tmp_path / "environment.json"
    assert environment.main([str(file), "--rehearse"]) == 0
    found = json.loads(file.read_text())
    assert found.keys() >= ENVIRONMENT.keys() | {"driver", "cuda", "hip", "python", "versions", "cpu"}
    assert found["sanitizers"].keys() == ENVIRONMENT["sanitizers"].keys()
    assert all(found["sanitizers"][tool] for tool in ("consan", "gsan", "memcheck", "racecheck"))
    assert list(runner.measurements(found, rehearse=True))


class FakeProperties:
    name, total_memory, multi_processor_count = "ACME", 80 << 30, 132
    major, minor, gcnArchName = 9, 0, "gfx942:sramecc+:xnack-"


@pytest.mark.parametrize("hip, target", [(None, "sm_90"), ("7.0", "gfx942")])
def test_environment_of_a_gpu(monkeypatch, hip, target):
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: FakeProperties)
    found = environment.environment(torch.device("cuda"))
    assert found["target"] == target and len(found["gpus"]) == 2
    assert found["backend"] == ("hip" if hip else "cuda")
    assert found["sanitizers"]["overflow"] == ""
    assert bool(found["sanitizers"]["consan"]) == bool(hip)
    assert found["why_no_table"] == ""
    assert environment.why_no_table("sm_75").endswith("not for sm_75")


def test_device_tests_are_skipped_without_a_gpu():
    file = "tests/gpu/test_compilation.py"
    done = in_checkout("-m", "pytest", "-n", "0", "-rs", file, CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "passed" not in done.stdout
    assert "there is no GPU; `pytest tests/gpu --device cpu` rehearses it" in done.stdout


@pytest.mark.slow
def test_device_tests_rehearsed():
    done = in_checkout("-m", "pytest", "-n", "0", "tests/gpu", "--device", "cpu")
    assert done.returncode == 0, done.stdout + done.stderr
