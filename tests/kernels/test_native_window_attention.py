"""window_attention of the native CPU library: the reference's values and gradients, in every ISA tier."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import audiomae_kernels as ak
import pytest
import torch
from audiomae_kernels import _native
from audiomae_kernels.window_attention import window_index
from budget import assert_within_budget, evaluate, to_exact
from kernel_cases import cases, window_attention_case

ROOT = Path(__file__).parents[2]
DTYPES = (torch.float32, torch.bfloat16)
TIERS = [name for name, _, reason in _native.cpu_tiers() if "lacks" not in reason]

pytestmark = pytest.mark.skipif(not _native.available(), reason=_native.why_not() or "loaded")

# Where the kernels take other paths: sizes known at compile time, several tiles of queries, other widths.
SHAPES = [
    window_attention_case("published", (16, 8), (4, 4), (2, 0), H=3, d=32),
    window_attention_case("published, padded", (9, 7), (4, 4), (1, 2), H=2, d=32),
    window_attention_case("published, dot", (8, 8), (4, 4), (2, 2), "dot", B=1, d=32),
    window_attention_case("published, no bias", (8, 4), (4, 4), d=32, bias=False),
    window_attention_case("16 tokens, three tiles wide", (8, 4), (2, 8), (1, 0), d=48),
    window_attention_case("16 tokens, two tiles wide", (4, 8), (4, 4), (0, 2), d=64),
    window_attention_case("16 tokens, odd width", (8, 4), (8, 2), (3, 1), H=2, d=13),
    window_attention_case("49 tokens", (14, 7), (7, 7), (3, 0), H=2, d=32),
    window_attention_case("49 tokens, padded, dot", (9, 12), (7, 7), (2, 3), "dot", B=1, H=2, d=20),
    window_attention_case("all tokens", (13, 5), (13, 5), B=1, H=2, d=8),
    window_attention_case("no head", (4, 4), (2, 2), H=0),
]


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Memory that C++ asks for is NaN too, so that an element which no kernel wrote shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def assert_case(case, dtype):
    """The error budget; tau a little above what the case has: the error of its gradient grows like tau^-3, and that
    of the smallest of few values would decide."""

    def draw(seed):
        tensors = case.tensors(dtype, seed)
        return tensors if tensors["tau"] is None else tensors | {"tau": tensors["tau"] + 0.4}

    assert_within_budget(case.call("native"), case.reference(), draw, case.wrt())


@pytest.mark.parametrize("case", [*cases("window_attention"), *(pytest.param(c, id=c.name) for c in SHAPES)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_error_budget(case, dtype):
    assert_case(case, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_results_past_the_caches(dtype):
    """Large results, and only those, are stored past the caches."""
    case = window_attention_case(
        "large", (64, 8), (4, 4), (2, 0), B=8 if dtype == torch.bfloat16 else 4, H=16, d=32
    )
    tensors = case.tensors(dtype)
    assert tensors["qkv"].numel() // 3 * dtype.itemsize >= 4 << 20
    assert_case(case, dtype)
    parts = [tensors | {"qkv": qkv} for qkv in tensors["qkv"].split(1)]  # each too small for that
    whole = evaluate(case.call("native"), tensors, ["qkv"])
    for i, part in enumerate(parts):
        for name, value in evaluate(case.call("native"), part, ["qkv"]).items():
            assert torch.equal(value[0], whole[name][i]), name


# --- tiers ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tier", TIERS)
def test_forced_tier(tier):
    """Every tier that this machine runs."""
    path = os.pathsep.join([str(ROOT / "kernels"), str(ROOT / "tests"), str(Path(__file__).parent)])
    environment = {**os.environ, "AUDIOMAE_CPU_TIER": tier, "PYTHONPATH": path}
    code = """
import torch
from test_native_window_attention import *
from test_native_window_attention import _native
torch.set_num_threads(1)
torch.use_deterministic_algorithms(True)
print([name for name, chosen, _ in _native.cpu_tiers() if chosen])
for case in SHAPES:
    for dtype in DTYPES:
        assert_case(case, dtype)
for dtype in DTYPES:
    test_threads(dtype)
"""
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"['{tier}']"


# --- determinism ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_threads(dtype):
    """The same bits for any number of threads, from several Python threads at once too."""
    case = window_attention_case("large", (64, 8), (4, 4), (2, 0), B=3, H=5, d=32)
    tensors, wrt = case.tensors(dtype), case.wrt()

    def results():
        return evaluate(case.call("native"), tensors, wrt)

    expected, others = results(), []
    for count in (2, 3, 7):
        torch.set_num_threads(count)
        others.append(results())
    workers = [threading.Thread(target=lambda: others.append(results())) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(others) == 6
    for other in others:
        for name, value in expected.items():
            assert torch.equal(other[name], value), name


# --- values --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scoring", ["cosine", "dot"])
@pytest.mark.parametrize("d", [32, 24])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_nan_stays_in_its_window(dtype, d, scoring):
    grid, window, shift = (7, 6), (4, 4), (2, 1)  # with padding
    case = window_attention_case("nan", grid, window, shift, scoring, B=2, H=2, d=d)
    tensors = case.tensors(dtype)
    clean = evaluate(case.call("native"), tensors, ["qkv"])
    index, _ = window_index(grid, window, shift)
    for token in (0, 20, 41):
        for part in range(3):
            qkv = tensors["qkv"].clone()
            qkv[0, token, part, 1, 3] = float("nan")
            results = evaluate(case.call("native"), tensors | {"qkv": qkv}, ["qkv"])
            own = index[(index == token).any(1)].flatten()
            elsewhere = [i for i in range(42) if i not in own.tolist()]
            for name, value in results.items():
                assert torch.equal(value[1], clean[name][1]), name
                assert torch.equal(value[0, elsewhere], clean[name][0, elsewhere]), name
                heads = value[0].view(42, -1, 2, d)
                assert torch.equal(heads[:, :, 0], clean[name][0].view(42, -1, 2, d)[:, :, 0]), name
            assert results["output"][0, token, d + 3].isnan()


@pytest.mark.parametrize("d", [32, 24])
def test_zero_vectors_and_clamps(d):
    """|q||k| below 1e-6, tau below 0.01, and borders of -100 that scores of 1 / tau reach over."""
    case = window_attention_case("clamps", (8, 4), (4, 4), (2, 0), B=1, H=4, d=d)
    tensors = case.tensors(torch.float32)
    tensors["tau"][:] = torch.tensor([0.002, 0.011, -1.0, 0.3])
    tensors["qkv"][:, 3, 0] = 0
    tensors["qkv"][:, 7, 1] = 0
    tensors["qkv"][:, 12, :2] = 0
    tensors["qkv"][:, 17, :2] *= 1e-5
    tensors["qkv"][:, 29, :2] *= 1e-12
    actual = evaluate(case.call("native"), tensors, case.wrt())
    exact = evaluate(case.reference(), to_exact(tensors), case.wrt())
    assert not actual["grad of tau"][[0, 2]].any()
    eager = evaluate(case.reference(), tensors, case.wrt())
    for name, value in actual.items():
        # Gradients of q and k go up to 1 / (0.01 * 1e-6), so that each row is judged by its own size. Scores of up to
        # 100 are known to 1e-5, and so are probabilities.
        error, eager_error, size = (
            x.abs().amax(-1) for x in (value - exact[name], eager[name] - exact[name], exact[name])
        )
        assert (error <= 2 * eager_error + 1e-4 * (1 + size)).all(), name


@pytest.mark.parametrize("d", [32, 24])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_misaligned_memory(dtype, d):
    """Tensors over the memory of others: the same bits, and nothing for the sanitized library to notice."""
    case = window_attention_case("usual", (8, 4), (4, 4), (2, 0), d=d)
    tensors = case.tensors(dtype)

    def misaligned(x):
        raw = bytearray(b"\0" + x.view(torch.uint8).numpy().tobytes())
        return torch.frombuffer(raw, dtype=x.dtype, offset=1).view(x.shape)

    expected = evaluate(case.call("native"), tensors, case.wrt())
    moved = {name: misaligned(x) for name, x in tensors.items()}
    assert all(x.data_ptr() % x.element_size() for x in moved.values())
    for name, value in evaluate(case.call("native"), moved, case.wrt()).items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_nobody_wants(dtype):
    case = window_attention_case("usual", (8, 4), (4, 4), (2, 0), d=32)
    tensors = case.tensors(dtype)
    every = evaluate(case.call("native"), tensors, case.wrt())
    for wrt in (["qkv"], ["tau"], ["bias"], ["tau", "bias"]):
        for name, value in evaluate(case.call("native"), tensors, wrt).items():
            assert torch.equal(value, every[name]), (wrt, name)


# --- what it refuses -----------------------------------------------------------------------------------


def test_dtypes():
    served = {
        dtype: ak.implementations("window_attention", "cpu", dtype)[0] for dtype in (*DTYPES, torch.float16)
    }
    assert [line.chosen for line in served.values()] == [True, True, False]
    qkv = torch.randn(1, 4, 3, 1, 4).half()
    options = {"grid": (2, 2), "window": (2, 2), "scoring": "dot"}
    assert ak.window_attention(qkv, None, None, **options).dtype == torch.float16
    with pytest.raises(RuntimeError, match="serves float32, bfloat16, not float16"):
        ak.window_attention(qkv, None, None, **options, impl="native")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"qkv": torch.zeros(2, 15, 3, 2, 4)}, r"\(batch, 16, 3, heads, channels\), got \(2, 15, 3, 2, 4\)"),
        ({"qkv": torch.zeros(2, 16, 24)}, r"qkv of shape .*, got \(2, 16, 24\)"),
        ({"qkv": torch.zeros(2, 16, 3, 2, 4).half()}, "float32 or bfloat16 qkv, got Half"),
        ({"tau": torch.ones(3)}, r"tau of shape \(2,\), got \(3,\)"),
        ({"bias": torch.ones(2, 4, 3)}, r"bias of shape \(2, 4, 4\), got \(2, 4, 3\)"),
        ({"window": (5, 2)}, "window that fits the grid, got a window of 5 x 2 and a grid of 4 x 4"),
        ({"shift": (0, 2)}, r"shift smaller than the window of 2 x 2, got \(0, 2\)"),
        ({"grad": torch.zeros(2, 16, 9)}, r"gradient of shape \(2, 16, 8\) of Float, got \(2, 16, 9\)"),
    ],
)  # fmt: skip
def test_refuses(change, message):
    call = {
        "grad": torch.zeros(2, 16, 8),
        "qkv": torch.zeros(2, 16, 3, 2, 4),
        "tau": torch.ones(2),
        "bias": None,
    }
    call |= {"grid": (4, 4), "window": (2, 2), "shift": (0, 0)} | change
    grad, *tensors = (call[name] for name in ("grad", "qkv", "tau", "bias"))
    geometry = [*call["grid"], *call["window"], *call["shift"]]
    with pytest.raises(RuntimeError, match=message):
        if "grad" in change:
            torch.ops.audiomae_native.window_attention_backward(grad, *tensors, *geometry, True, True, True)
        else:
            torch.ops.audiomae_native.window_attention(*tensors, *geometry)
