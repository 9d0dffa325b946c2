"""window_attention's Triton kernels, interpreted."""

import itertools
from functools import partial

import audiomae_kernels as ak
import pytest
import torch
from audiomae_kernels import _library
from audiomae_kernels._triton import interpreting, tl, triton
from audiomae_kernels.window_attention import clip_window, window_index
from budget import assert_within_budget, compare, evaluate, to_exact
from interpreter import DTYPES, guarded_allocations, in_the_middle, needs_interpreter
from kernel_cases import CASES, window_attention_case
from torch._subclasses.fake_tensor import FakeTensorMode

pytestmark = needs_interpreter

if interpreting():
    from audiomae_kernels.window_attention import triton_kernels

    @triton.jit
    def places_kernel(
        out_ptr,
        T,
        F: tl.constexpr,
        WT: tl.constexpr,
        WF: tl.constexpr,
        ST: tl.constexpr,
        SF: tl.constexpr,
        WINDOWS: tl.constexpr,
        NP: tl.constexpr,
    ):
        o_window, o_place = tl.arange(0, WINDOWS)[:, None], tl.arange(0, NP)[None, :]
        token, exists, past = triton_kernels.token_places(o_window, o_place, T, F, WT, WF, ST, SF)
        p_out = out_ptr + o_window * NP + o_place
        tl.store(p_out, token)
        tl.store(p_out + WINDOWS * NP, exists.to(tl.int32))
        tl.store(p_out + 2 * WINDOWS * NP, past)


GEOMETRIES = {  # grid, window
    (64, 8): (4, 4),
    (6, 4): (2, 2),
    (12, 10): (4, 2),
    (6, 3): (4, 4),  # clipped in frequency
    (7, 5): (4, 3),  # padded
}
SHIFTS = ((0, 0), (2, 0), (0, 1), (1, 3))
WRT = ("qkv", "tau", "bias")


def fits(grid, shift):
    return all(s < w for s, w in zip(shift, GEOMETRIES[grid], strict=True))


@pytest.mark.parametrize("grid", [*GEOMETRIES, (63, 8), (3, 8), (1, 1)])
@pytest.mark.parametrize("shift", SHIFTS)
def test_index_arithmetic_is_roll_and_partition(grid, shift):
    window, shift = clip_window(grid, (4, 4), shift)
    index, region = window_index(grid, window, shift)
    windows, N = index.shape
    out = torch.zeros(3, 128, 16, dtype=torch.int32)
    places_kernel[(1,)](out, *grid, *window, *shift, 128, 16)
    token, exists, past = out
    inside = torch.zeros(128, 16, dtype=torch.bool)
    inside[:windows, :N] = index < grid[0] * grid[1]
    assert torch.equal(exists.bool(), inside)
    assert torch.equal(token[inside], index[index < grid[0] * grid[1]].int())
    same = past[:windows, :N, None] == past[:windows, None, :N]
    assert torch.equal(same, region[:, :, None] == region[:, None, :])


# Padded values of q in a case, what its time grows with. The larger limit is that of the published case, 16
# heads of 32 channels in a clip of 64x8 tokens; the 54 of 384 shapes beyond it would take nearly three times as
# long as all others.
FAST, SLOW = 6400, 16384


def product(limit):
    """(grid, shift, d, H, B, dtype, scoring): all whose shift fits and that are not larger than `limit`."""
    for grid, shift, d, H, B, dtype, scoring in itertools.product(
        GEOMETRIES, SHIFTS, (16, 32, 64, 80), (1, 3, 16), (1, 3), DTYPES, ("cosine", "dot")
    ):
        windows = len(window_index(grid, GEOMETRIES[grid])[0])
        if fits(grid, shift) and windows * H * B * triton.next_power_of_2(d) <= limit:
            yield grid, shift, d, H, B, dtype, scoring


def pairwise(rows):
    """A selection of `rows` with every pair of values that occurs in any of them, small rows first."""
    rows = sorted(rows, key=lambda row: row[0][0] * row[0][1] * row[2] * row[3] * row[4])
    pairs = [set(itertools.combinations(enumerate(row), 2)) for row in rows]
    missing, chosen = set().union(*pairs), []
    while missing:
        best = max(range(len(rows)), key=lambda i: len(pairs[i] & missing))
        chosen.append(rows[best])
        missing -= pairs[best]
    return chosen


def budget_params():
    """The product, a pairwise cover now and the rest marked slow; other cases, now in one dtype each."""
    params, fast = [], set(pairwise(product(FAST)))
    for row in product(SLOW):
        grid, shift, d, H, B, dtype, scoring = row
        name = f"{grid[0]}x{grid[1]} by {shift}, {B}x{H}x{d}, {str(dtype)[6:]}, {scoring}"
        case = window_attention_case(name, grid, GEOMETRIES[grid], shift, scoring, B, H, d, bias=d != 64)
        params.append(pytest.param(case, dtype, id=name, marks=() if row in fast else pytest.mark.slow))
    others = [
        window_attention_case("as published", (64, 8), (4, 4), (2, 0), B=1, H=16, d=32),
        window_attention_case("32 tokens, padded", (6, 16), (4, 8), (2, 3), B=1, H=2, d=32),
        window_attention_case("64 tokens", (8, 16), (8, 8), (2, 3), B=1, H=1, d=80),
        window_attention_case("64 tokens, clipped", (10, 6), (8, 8), (3, 3), "dot", B=2, H=1, d=64),
        window_attention_case("49 tokens, no bias", (7, 8), (7, 7), (0, 2), B=1, H=2, d=24, bias=False),
        window_attention_case("wide heads", (4, 4), (4, 4), (0, 0), B=1, H=2, d=128),
        *(case for case in CASES if case.op == "window_attention" and case.make()["qkv"].numel()),
    ]
    for i, case in enumerate(others):
        for j, dtype in enumerate(DTYPES):
            marks = () if (i + j) % 3 == 1 else pytest.mark.slow
            params.append(pytest.param(case, dtype, id=f"{case.name}, {str(dtype)[6:]}", marks=marks))
    return params


@pytest.mark.parametrize("case, dtype", budget_params())
def test_error_budget(case, dtype, monkeypatch):
    # The gradient of a few taus needs many draws: `test_error_budget_of_tau`.
    wrt = [name for name in case.wrt() if name != "tau"]
    with guarded_allocations(monkeypatch):
        assert_within_budget(case.call("triton"), case.reference(), partial(case.tensors, dtype), wrt)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("H", [16, *(pytest.param(H, marks=pytest.mark.slow) for H in (1, 3))])
@pytest.mark.parametrize("shift", [(1, 0), pytest.param((0, 0), marks=pytest.mark.slow)])
def test_error_budget_of_tau(dtype, H, shift):
    case = window_attention_case("", (4, 3), (2, 2), shift, B=1, H=H, d=16)
    assert_within_budget(case.call("triton"), case.reference(), partial(case.tensors, dtype), ["tau"])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("grid, window, scoring", [((6, 4), (2, 2), "cosine"), ((7, 5), (4, 3), "dot")])
def test_no_clip(dtype, grid, window, scoring):
    case = window_attention_case("", grid, window, (0, 1), scoring, B=0)
    results = evaluate(case.call("triton"), case.tensors(dtype), case.wrt())
    assert results["output"].shape == (0, grid[0] * grid[1], 64) and results["output"].dtype == dtype
    assert results["grad of qkv"].shape == (0, grid[0] * grid[1], 3, 4, 16)
    for name in ("tau", "bias") if scoring == "cosine" else ("bias",):
        assert (results[f"grad of {name}"] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_in_tau_is_nan_in_its_head(dtype):
    case = window_attention_case("", (4, 4), (2, 2), H=3)
    tensors = case.tensors(dtype)
    tensors["tau"] = torch.tensor([0.5, float("nan"), 0.2])
    actual, expected = (evaluate(case.call(impl), tensors, WRT) for impl in ("triton", "reference"))
    for name, value in expected.items():
        assert value.isnan().any(), name
        assert torch.equal(actual[name].isnan(), value.isnan()), name


@pytest.mark.parametrize("multiprocessors", [1, 3, 30])
def test_programs_of_the_backward(monkeypatch, multiprocessors):
    """Fewer programs than tiles, and more: the same gradients, and as many partial sums for any batch."""
    monkeypatch.setattr(triton_kernels, "PROGRAMS", 1)
    monkeypatch.setattr(triton_kernels, "multiprocessors", lambda device: multiprocessors)
    rows = []

    def sum_partials(partials, out, sum_=triton_kernels.sum_partials):
        rows.append(partials.shape[0])
        return sum_(partials, out)

    monkeypatch.setattr(triton_kernels, "sum_partials", sum_partials)
    for B in (1, 3):
        case = window_attention_case("", (8, 4), (4, 4), (2, 0), B=B, H=1)
        actual = evaluate(case.call("triton"), case.tensors(torch.float32), WRT)
        again = evaluate(case.call("triton"), case.tensors(torch.float32), WRT)
        expected = evaluate(case.call("reference"), case.tensors(torch.float32), WRT)
        for name, value in expected.items():
            torch.testing.assert_close(actual[name], value)
            assert torch.equal(actual[name], again[name]), name
    assert set(rows) == {multiprocessors}


STRIDES = {
    "transposed": lambda qkv: qkv.permute(2, 1, 0, 4, 3).contiguous().permute(2, 1, 0, 4, 3),
    "apart": lambda qkv: torch.stack([qkv.select(2, i) for i in range(3)]).permute(1, 2, 0, 3, 4),
    "misaligned": lambda qkv: torch.nn.functional.pad(qkv, (1, 2), value=float("nan"))[..., 1:-2],
    "in the middle": in_the_middle,
}


@pytest.mark.parametrize("view", STRIDES)
@pytest.mark.parametrize("d", [16, 80])
def test_strides(view, d):
    case = window_attention_case("", (5, 4), (2, 2), (1, 0), B=2, H=3, d=d)
    tensors = case.tensors(torch.bfloat16)
    qkv = STRIDES[view](tensors["qkv"])
    assert torch.equal(qkv, tensors["qkv"])
    cotangent = torch.randn(2, 20, 3 * d)
    expected = evaluate(case.call("triton"), tensors, WRT, cotangent)
    cotangent = cotangent.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    actual = evaluate(case.call("triton"), tensors | {"qkv": qkv}, WRT, cotangent)
    for name, value in expected.items():
        assert torch.equal(actual[name], value), name


def test_expanded_inputs():
    case = window_attention_case("", (5, 4), (2, 2), (1, 0), B=2, H=3)
    tensors = case.tensors(torch.float32)
    tensors["qkv"] = tensors["qkv"][:1].expand(2, -1, -1, -1, -1)
    tensors["bias"] = tensors["bias"][:1].expand(3, -1, -1)
    tensors["tau"] = tensors["tau"][:1].expand(3)
    cotangent = torch.ones(1).expand(2, 20, 48)
    actual = evaluate(case.call("triton"), tensors, WRT, cotangent)
    packed = {name: tensor.contiguous() for name, tensor in tensors.items()}
    expected = evaluate(case.call("triton"), packed, WRT, cotangent.contiguous())
    for name, value in expected.items():
        assert torch.equal(actual[name], value), name


def test_parameters_in_half_precision_get_gradients_in_it():
    case = window_attention_case("", (4, 4), (2, 2))
    tensors = case.tensors(torch.float32)
    tensors |= {"tau": tensors["tau"].bfloat16(), "bias": tensors["bias"].half()}
    actual = evaluate(case.call("triton"), tensors, WRT)
    expected = evaluate(case.call("reference"), tensors, WRT)
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value)


@pytest.mark.parametrize("wanted", [("qkv",), ("tau",), ("bias",)])
def test_gradients_that_are_wanted_alone(wanted):
    case = window_attention_case("", (4, 4), (2, 2), H=2)
    tensors = case.tensors(torch.float32)
    actual = evaluate(case.call("triton"), tensors, wanted)
    expected = evaluate(case.call("triton"), tensors, WRT)
    for name, value in actual.items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("scoring", ["cosine", "dot"])
@pytest.mark.parametrize(
    "what, value, dtype, window, d",
    [
        ("q", "nan", torch.bfloat16, (4, 3), 16),
        ("k", "inf", torch.bfloat16, (4, 3), 16),
        ("v", "nan", torch.float32, (4, 3), 16),
        ("k", "nan", torch.float16, (6, 3), 48),
    ],
)
def test_a_bad_token_stays_in_its_window(what, value, dtype, window, d, scoring):
    """In forward and backward: all other outputs and gradients keep their bits."""
    case = window_attention_case("", (7, 5), window, (2, 1), scoring, B=2, H=3, d=d)
    tensors = case.tensors(dtype)
    cotangent = torch.randn(2, 35, 3 * d)
    clean = evaluate(case.call("triton"), tensors, ("qkv",), cotangent)
    token = 17
    tensors["qkv"] = tensors["qkv"].detach().clone()
    tensors["qkv"][1, token, "qkv".index(what)] = float(value)
    dirty = evaluate(case.call("triton"), tensors, ("qkv",), cotangent)

    index, _ = window_index((7, 5), window, (2, 1))
    elsewhere = torch.ones(2, 35, dtype=torch.bool)
    (members,) = index[(index == token).any(1)]
    elsewhere[1, members[members < 35]] = False
    assert clean["output"].isfinite().all() and clean["grad of qkv"].isfinite().all()
    for name in clean:
        assert torch.equal(dirty[name][elsewhere], clean[name][elsewhere]), name
        assert not dirty[name][~elsewhere].isfinite().all()


def assert_extreme(q, k, window, shift, grid):
    """Within windows, products of norms are 0, clamped and free, and scores as large and as low as can be."""
    index, _ = window_index(grid, window, shift)
    together = (index[:, :, None] == torch.arange(grid[0] * grid[1])).any(1).double()
    together = (together.mT @ together).bool()  # (L, L)
    norms = (q.norm(dim=-1)[:, :, None] * k.norm(dim=-1)[:, None])[:, together]
    scores = torch.einsum("bihd,bjhd->bijh", q, k)[:, together] / norms.clamp(min=1e-6) / 0.01
    clamped = (norms > 0) & (norms < 1e-6)
    assert (norms == 0).any() and clamped.any() and (norms > 1).any()
    assert ((norms > 1e-6) & (norms < 1e-2)).any(), "no tiny token meets a larger one"
    assert ((norms / 1e-6 - 1).abs() > 0.1).all(), "rounding decides whether the clamp holds"
    assert scores.max() > 99 and scores.min() < -99


@pytest.mark.parametrize(
    "dtype, grid, window, d",
    [*((dtype, (5, 3), (2, 2), 16) for dtype in DTYPES), (torch.float32, (7, 3), (6, 3), 24)],
)
def test_extreme_scores(dtype, grid, window, d):
    """Tokens of zeros, as padding has, tiny ones whose norms are clamped, large ones; tau at its clamp."""
    case = window_attention_case("", grid, window, (1, 1), H=4, d=d)
    tensors = case.tensors(dtype)
    q, k, _ = tensors["qkv"].unbind(2)
    tensors["qkv"][:, ::3] = 0
    tensors["qkv"][:, 1::3, :2] *= 1e-4
    tensors["qkv"][:, 2] *= 100
    k[:, 2], k[:, 5] = q[:, 2], -q[:, 5]  # cosines of 1 and -1
    tensors["tau"] = torch.tensor([0.0, 0.001, 0.01, 0.5])
    assert_extreme(q.double(), k.double(), *clip_window(grid, window, (1, 1)), grid)
    actual = evaluate(case.call("triton"), tensors, WRT)
    expected = evaluate(case.call("reference"), tensors, WRT)
    assert actual["output"].isfinite().all() and actual["grad of bias"].isfinite().all()
    assert (actual["grad of tau"][:2] == 0).all() and (actual["grad of tau"][2:] != 0).all()
    # Gradients of zero vectors are as large as 1e8; float16 cannot hold them, bfloat16 can.
    finite = expected["grad of qkv"].isfinite()
    assert torch.equal(actual["grad of qkv"].isfinite(), finite)
    assert finite.all() or dtype == torch.float16
    if dtype == torch.float32:
        results = [actual, expected, evaluate(case.reference(), to_exact(tensors), WRT)]
        for result in results:
            del result["grad of tau"]
            for i, tokens in enumerate(("zero", "tiny", "other")):
                result[f"grad of {tokens} qkv"] = result["grad of qkv"][:, i::3]
        compare(*([result] for result in results))


def test_shift_borders_cost_100_and_exclude_nothing():
    case = window_attention_case("", (8, 4), (4, 4), (2, 0), B=1, H=2)
    tensors = case.tensors(torch.float32)
    _, region = window_index((8, 4), (4, 4), (2, 0))
    tensors["bias"] += 100.0 * (region[-1, :, None] != region[-1, None, :])  # levels the last window
    actual = evaluate(case.call("triton"), tensors, WRT)
    expected = evaluate(case.call("reference"), tensors, WRT)
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=1e-4, atol=1e-4)


def test_refusals(monkeypatch):
    tensors = {"qkv": torch.randn(1, 16, 3, 1, 144), "tau": torch.ones(1), "bias": None}
    options = {"grid": (4, 4), "window": (4, 4)}
    message = "windows of up to 64 tokens and heads of up to 128 channels, not "
    with pytest.raises(RuntimeError, match=f"{message}16 and 144"):
        ak.window_attention(**tensors, **options, impl="triton")
    monkeypatch.setitem(_library._PREFERRED, "cpu", "triton")
    expected = ak.window_attention(**tensors, **options, impl="reference")
    assert torch.equal(ak.window_attention(**tensors, **options), expected)
    tensors["qkv"] = torch.zeros(1, 16, 3, 1, 32, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="It serves float32, bfloat16, float16, not float64"):
        ak.window_attention(**tensors, **options, impl="triton")
    tensors["qkv"] = torch.zeros(1, 66, 3, 1, 32)
    with pytest.raises(RuntimeError, match=f"{message}66 and 32"):
        ak.window_attention(**tensors, grid=(11, 6), window=(11, 6), impl="triton")


def test_under_fake_tensors_nothing_runs():
    case = window_attention_case("", (6, 4), (2, 2), (0, 1))
    with FakeTensorMode() as mode:
        tensors = {name: mode.from_tensor(tensor) for name, tensor in case.tensors(torch.bfloat16).items()}
        results = evaluate(case.call("triton"), tensors, WRT)
    assert results["output"].shape == (2, 24, 64)
    for name in WRT:
        assert results[f"grad of {name}"].shape == tensors[name].shape


@pytest.mark.no_poison
def test_opcheck():
    case = window_attention_case("", (4, 2), (2, 2), (1, 0), B=1, H=1)
    tensors = [tensor.requires_grad_() for tensor in case.tensors(torch.float32).values()]
    torch.library.opcheck(
        torch.ops.audiomae.window_attention.default, tensors, case.op_options() | {"impl": "triton"}
    )


@pytest.mark.no_poison
def test_compile():
    torch._dynamo.reset()
    case = window_attention_case("", (4, 2), (2, 2), (1, 0), B=1, H=1)
    tensors = case.tensors(torch.float32)
    compiled = torch.compile(case.call("triton"), fullgraph=True, backend="aot_eager")
    actual = evaluate(compiled, tensors, WRT)
    expected = evaluate(case.call("triton"), tensors, WRT)
    for name, value in expected.items():
        assert torch.equal(actual[name], value), name
