"""attention: its definition, its dropout, the native kernel, what is refused."""

import sys
from functools import partial
from itertools import product

import audiomae_kernels as ak
import pytest
import torch
from audiomae_kernels import _native
from audiomae_kernels.attention import attention_ref, dropout_mask, philox, rounded_rate
from budget import assert_within_budget, compare, evaluate
from kernel_cases import CASES, attention_case, cases
from tiers import OTHER_TIERS, check_in_tier
from torch.nn import functional

DTYPES = (torch.float32, torch.bfloat16)
EPS = torch.finfo(torch.float32).eps

needs_library = pytest.mark.skipif(not _native.available(), reason=_native.why_not() or "loaded")
IMPLS = [pytest.param("native", marks=needs_library), "reference"]


@pytest.fixture
def poisoned_memory():
    """Memory that C++ asks for is NaN too, so that an element which no kernel wrote shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


# --- the definition --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_reference_is_the_definition(dropout):
    """One weight at a time; the second clip's random numbers are its own."""
    B, L, H, d = 2, 11, 2, 4
    qkv, seed = torch.randn(B, L, 3, H, d, dtype=torch.float64), torch.tensor(77)
    out = ak.attention(qkv, dropout=dropout, seed=seed, impl="reference").view(B, L, H, d)
    keep = dropout_mask(seed, B, H, L, dropout)
    for b, i, h in product(range(B), range(L), range(H)):
        scores = torch.stack([qkv[b, i, 0, h] @ qkv[b, j, 1, h] / d**0.5 for j in range(L)])
        weights = scores.exp() / scores.exp().sum() * keep[b, h, i] / (1 - dropout)
        expected = sum(weights[j] * qkv[b, j, 2, h] for j in range(L))
        torch.testing.assert_close(out[b, i, h], expected, rtol=0, atol=1e-14)


def test_reference_is_sdpa():
    qkv = torch.randn(2, 13, 3, 4, 8, dtype=torch.float64)
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    expected = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    torch.testing.assert_close(ak.attention(qkv), expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_packed_clips_are_a_dense_batch(impl, dropout):
    qkv, seed = torch.randn(3, 19, 3, 2, 16), torch.tensor(5)
    ends = torch.arange(4, dtype=torch.int32) * 19
    options = {"dropout": dropout, "seed": seed, "impl": impl}
    dense = evaluate(partial(ak.attention, **options), {"qkv": qkv}, ["qkv"])
    packed = evaluate(partial(ak.attention, cu_seqlens=ends, **options), {"qkv": qkv.flatten(0, 1)}, ["qkv"])
    for name, value in dense.items():
        assert torch.equal(packed[name], value.flatten(0, 1)), name


# --- dropout ---------------------------------------------------------------------------------------------


def test_philox_has_the_published_values():
    """Known answers of Random123's authors for Philox-4x32."""

    def words(*values):
        return tuple(torch.tensor(value) for value in values)

    zeros, ones = words(0, 0, 0, 0), words(*[0xFFFFFFFF] * 4)
    for counter, rounds, expected in (
        (zeros, 7, (0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48)),
        (zeros, 10, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        (ones, 10, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    ):
        assert tuple(int(x) for x in philox(counter, counter[:2], rounds)) == expected


def kept(qkv_like, dropout, seed, impl):
    """Which weights stay, by the op itself: equal weights, and values that are rows of the identity."""
    B, L, H = qkv_like
    qkv = torch.zeros(B, L, 3, H, L)
    qkv[:, :, 2] = torch.eye(L)[:, None]
    out = ak.attention(qkv, dropout=dropout, seed=seed, impl=impl).view(B, L, H, L)
    weights = out.transpose(1, 2) * L * (1 - rounded_rate(dropout))
    torch.testing.assert_close(weights, weights.round(), rtol=0, atol=8 * EPS)
    return weights.round().bool()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 7, 3), (3, 17, 2), (1, 150, 2), (1, 300, 1)], ids=str)
@pytest.mark.parametrize("dropout", [0.1, 0.5, 2**-16, 1 - 2**-16], ids=str)
def test_weights_that_drop(impl, shape, dropout):
    for seed in (0, -1, 2**63 - 1, 0x123456789ABCDEF):
        seed = torch.tensor(seed)
        mask = dropout_mask(seed, shape[0], shape[2], shape[1], dropout)
        assert torch.equal(kept(shape, dropout, seed, impl), mask)


@needs_library
@pytest.mark.parametrize("shape", [(2, 7, 3), (1, 161, 2)], ids=str)
def test_the_backward_pass_drops_the_same_weights(shape):
    """With equal weights the gradient of v is the sum of what stays in its column."""
    B, L, H = shape
    qkv, seed = torch.zeros(B, L, 3, H, L), torch.tensor(99)
    cotangent = torch.eye(L)[:, None].expand(L, H, L).flatten(1).expand(B, L, H * L)
    grad = evaluate(
        partial(ak.attention, dropout=0.5, seed=seed, impl="native"), {"qkv": qkv}, ["qkv"], cotangent
    )["grad of qkv"][:, :, 2]  # (B, key, H, query)
    weights = grad.permute(0, 2, 3, 1) * L / 2
    torch.testing.assert_close(weights, weights.round(), rtol=0, atol=8 * EPS)
    assert torch.equal(weights.round().bool(), dropout_mask(seed, B, H, L, 0.5))


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_the_rate(rate):
    """Over all weights, and by query, key, head and clip: within five standard deviations of the binomial."""
    mask = dropout_mask(torch.tensor(3), 8, 12, 128, rate).double()
    for dims in ((0, 1, 2, 3), (0, 1, 2), (0, 1, 3), (0, 2, 3), (1, 2, 3)):
        mean = mask.mean(dims)
        deviation = (rate * (1 - rate) * mean.numel() / mask.numel()) ** 0.5
        assert ((mean - (1 - rate)).abs() < 5 * deviation).all()


def test_neighbours_and_seeds_are_independent():
    masks = [dropout_mask(torch.tensor(seed), 2, 4, 128, 0.5).double() * 2 - 1 for seed in (0, 1, 2**32)]
    first = masks[0]
    pairs = [(first, masks[1]), (first, masks[2])]
    for dim, step in product(range(4), (1, 2, 8, 16)):
        if step < first.shape[dim]:
            pairs.append(
                (
                    first.narrow(dim, step, first.shape[dim] - step),
                    first.narrow(dim, 0, first.shape[dim] - step),
                )
            )
    for a, b in pairs:
        assert (a * b).mean().abs() < 5 / a.numel() ** 0.5


@pytest.mark.parametrize("impl", IMPLS)
def test_the_expected_output_is_that_without_dropout(impl):
    qkv = torch.randn(1, 20, 3, 2, 8)
    torch.manual_seed(0)
    draws = torch.stack([ak.attention(qkv, dropout=0.3, impl=impl) for _ in range(400)])
    deviation = draws.std(0) / len(draws) ** 0.5
    assert ((draws.mean(0) - ak.attention(qkv, impl=impl)).abs() < 5 * deviation).all()


def test_the_seed_comes_from_the_generator():
    qkv = torch.randn(2, 9, 3, 2, 8)
    torch.manual_seed(1)
    first, second = (ak.attention(qkv, dropout=0.5) for _ in range(2))
    torch.manual_seed(1)
    assert torch.equal(ak.attention(qkv, dropout=0.5), first) and not torch.equal(first, second)
    state = torch.get_rng_state()
    drawn = [ak.attention(qkv, dropout=0.5, generator=torch.Generator().manual_seed(7)) for _ in range(2)]
    assert torch.equal(*drawn) and torch.equal(torch.get_rng_state(), state)
    ak.attention(qkv)  # without dropout nothing is drawn
    assert torch.equal(torch.get_rng_state(), state)


def test_checkpointed_layers_drop_the_same_weights():
    from torch.utils.checkpoint import checkpoint

    def layer(qkv):
        return ak.attention(qkv, dropout=0.5)

    qkv = torch.randn(1, 9, 3, 2, 8)
    grads = []
    for function in (layer, partial(checkpoint, layer, use_reentrant=False)):
        torch.manual_seed(0)
        grads.append(evaluate(lambda qkv, function=function: function(qkv), {"qkv": qkv}, ["qkv"]))
    for name, value in grads[0].items():
        assert torch.equal(grads[1][name], value), name


@pytest.mark.no_poison
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_dropout(dynamic):
    torch.compiler.reset()

    def function(qkv):
        return ak.attention(qkv, dropout=0.5)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for B in (2, 3) if dynamic else (2,):
        qkv, results = torch.randn(B, 9, 3, 2, 8), []
        for f in (function, compiled):
            torch.manual_seed(0)
            results.append(evaluate(f, {"qkv": qkv}, ["qkv"]))
        for name, value in results[0].items():
            assert torch.equal(results[1][name], value), name


# --- precision -------------------------------------------------------------------------------------------


@needs_library
@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("case", cases("attention"))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_error_budget(case, dtype):
    assert_within_budget(case.call("native"), case.reference(), partial(case.tensors, dtype), case.wrt())


SHAPES = [
    attention_case(f"{L} tokens, {H} heads of {d}", B=1, L=L, H=H, d=d, dropout=dropout)
    for (L, H), (d, dropout) in zip(
        product((7, 103, 129, 512), (1, 3, 12)),
        [*zip((16, 32, 64, 80, 128, 100), (0.0, 0.1) * 3, strict=True)] * 2,
        strict=True,
    )
]


@needs_library
@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("case", SHAPES, ids=lambda case: case.name)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_error_budget_of_shapes(case, dtype):
    """Over three draws: a gradient's largest error is that of a row with two large weights, which are few."""
    assert_within_budget(case.call("native"), case.reference(), partial(case.tensors, dtype), case.wrt(), 3)


@needs_library
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_token_is_its_own_value(dtype):
    qkv, cotangent = torch.randn(2, 1, 3, 3, 16).to(dtype), torch.randn(2, 1, 48).to(dtype)
    results = evaluate(partial(ak.attention, impl="native"), {"qkv": qkv}, ["qkv"], cotangent)
    torch.testing.assert_close(results["output"], qkv[:, :, 2].flatten(2), rtol=4 * EPS, atol=0)
    d_q, d_k, d_v = results["grad of qkv"].flatten(3).unbind(2)
    torch.testing.assert_close(d_v, cotangent, rtol=4 * EPS, atol=0)
    # Differences of two sums of 16 products of normal variables, times a key or a query over 4.
    assert max(d_q.abs().max(), d_k.abs().max()) < 100 * EPS


@needs_library
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", [30, 300, 3e4, 3e5])
def test_large_logits(scale, dtype):
    """Scores of 3e3, 3e5 and up to 1e11, where a row is its best key: the gradient of v is exact, and what is left of
    those of q and k are roundings of dP and of rowsum(do o), which cancel.
    """
    qkv = torch.randn(2, 40, 3, 2, 32)
    qkv[:, :, :2] *= scale
    qkv, cotangent = qkv.to(dtype), torch.randn(2, 40, 64).to(dtype)
    actual = evaluate(partial(ak.attention, impl="native"), {"qkv": qkv}, ["qkv"], cotangent)
    eager = evaluate(attention_ref, {"qkv": qkv}, ["qkv"], cotangent)
    exact = evaluate(attention_ref, {"qkv": qkv.double()}, ["qkv"], cotangent.double())
    judged = [{"output": r["output"], "grad of v": r["grad of qkv"][:, :, 2]} for r in (actual, eager, exact)]
    compare(*([results] for results in judged))
    # |dP| is at most |do| |v|; of the two terms one is summed in float32, the other rounded with the output.
    grads = (
        cotangent.double().unflatten(-1, (2, 32)).norm(dim=-1).max()
        * qkv[:, :, 2].double().norm(dim=-1).max()
    )
    budget = 2 * torch.finfo(dtype).eps * grads * qkv[:, :, :2].abs().max() / 32**0.5
    error = (actual["grad of qkv"].double() - exact["grad of qkv"])[:, :, :2].abs().max()
    assert error <= budget + 2 * (eager["grad of qkv"].double() - exact["grad of qkv"])[:, :, :2].abs().max()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("poison", [float("nan"), float("inf")], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_poisoned_clip_stays_alone(impl, poison, dtype):
    ends, seed = torch.tensor([0, 30, 50, 81], dtype=torch.int32), torch.tensor(1)
    function = partial(ak.attention, cu_seqlens=ends, dropout=0.1, seed=seed, impl=impl)
    clean = torch.randn(81, 3, 2, 16).to(dtype)
    spoilt = clean.clone()
    spoilt[37, :, 1] = poison  # a token of the second clip, in the second head
    expected, actual = (evaluate(function, {"qkv": x}, ["qkv"]) for x in (clean, spoilt))
    for name, value in expected.items():
        other = actual[name]
        assert torch.equal(other[:30], value[:30]) and torch.equal(other[50:], value[50:]), name
        heads = (x[30:50].reshape(20, -1, 2, 16)[:, :, 0] for x in (other, value))
        assert torch.equal(*heads), name
    assert actual["output"].view(81, 2, 16)[30:50, 1].isnan().all()


# --- determinism, tiers ------------------------------------------------------------------------------------

LARGE = [
    attention_case("dense", B=3, L=130, H=5, d=64, dropout=0.1),
    attention_case("ragged", lengths=(200, 3, 64, 1, 40), H=5, d=40),
]


def check_threads(case, dtype):
    before, results = torch.get_num_threads(), []
    for count in (1, 2, 3, 7):
        torch.set_num_threads(count)
        results.append(evaluate(case.call("native"), case.tensors(dtype), case.wrt()))
    torch.set_num_threads(before)
    for other in results[1:]:
        for name, value in results[0].items():
            assert torch.equal(other[name], value), name


@needs_library
@pytest.mark.parametrize("case", LARGE, ids=lambda case: case.name)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_number_of_threads_changes_no_bit(case, dtype):
    check_threads(case, dtype)


def check_everything():
    """Run in a process of its own, once per tier."""
    import resource

    qkv = torch.randn(1, 8192, 3, 1, 8).requires_grad_()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    ak.attention(qkv, dropout=0.1, impl="native").sum().backward()
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before  # KiB on Linux, bytes on macOS
    assert grown * (1 if sys.platform == "darwin" else 1024) < 8192 * 8192, "The weights were stored."
    torch.use_deterministic_algorithms(True)
    for dtype in DTYPES:
        for case in (*(case for case in CASES if case.op == "attention"), *SHAPES[3:9]):
            assert_within_budget(
                case.call("native"), case.reference(), partial(case.tensors, dtype), case.wrt()
            )
        for case in LARGE:
            check_threads(case, dtype)
    for shape in ((2, 7, 3), (1, 150, 2)):
        seed = torch.tensor(-3)
        assert torch.equal(
            kept(shape, 0.1, seed, "native"), dropout_mask(seed, shape[0], shape[2], shape[1], 0.1)
        )


@pytest.mark.parametrize("tier", OTHER_TIERS)
def test_every_tier(tier):
    check_in_tier("test_attention", tier)


# --- autocast, what is kept, what is refused -----------------------------------------------------------------


@pytest.mark.parametrize("impl", IMPLS)
def test_autocast_decides_the_dtype(impl):
    qkv = torch.randn(2, 9, 3, 2, 16).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        out = ak.attention(qkv, impl=impl)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, ak.attention(qkv.bfloat16(), impl=impl))
    out.sum().backward()
    assert qkv.grad.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert ak.attention(qkv.double(), impl="reference").dtype == torch.float64


@pytest.mark.parametrize("impl", IMPLS)
def test_what_is_kept_for_the_backward_pass(impl):
    kept_bytes = {}

    def pack(x):
        kept_bytes[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    qkv = torch.randn(2, 64, 3, 2, 16).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        ak.attention(qkv, dropout=0.1, impl=impl)
    assert sum(kept_bytes.values()) == 4 * 2 * 64 * (4 * 32 + 2 * 2) + 8  # qkv, out, the statistics; the seed


def test_there_is_no_triton_implementation():
    for device in ("cpu", "cuda"):
        line = ak.implementations("attention", device)[1]
        assert not line.available
        assert line.reason == "There is no triton implementation of attention, only: native and reference."
    assert ak.implementations("attention", "cuda")[2].chosen


QKV = torch.zeros(2, 4, 3, 1, 8)
ENDS = torch.tensor([0, 1, 4], dtype=torch.int32)


@pytest.mark.parametrize(
    "arguments, options, error, message",
    [
        (QKV[0], {}, ValueError, r"qkv must have shape \(B, L, 3, H, d\)"),
        (QKV, {"cu_seqlens": ENDS}, ValueError, r"shape \(total, 3, H, d\) with cu_seqlens"),
        (QKV[:, :, :2], {}, ValueError, r"here \(any, any, 3, any, any\)"),
        (QKV.int(), {}, TypeError, "must be float32, bfloat16, float16 or float64"),
        (QKV[0], {"cu_seqlens": ENDS.long()}, TypeError, "cu_seqlens must be int32, but it is torch.int64"),
        (QKV[0], {"cu_seqlens": ENDS[None]}, ValueError, r"cu_seqlens must have shape \(B \+ 1,\)"),
        (QKV[0], {"cu_seqlens": ENDS.to("meta")}, ValueError, "must be on the device of qkv, cpu"),
        (QKV, {"dropout": 1.0}, ValueError, r"dropout must lie in \[0, 1\), got 1.0"),
        (QKV, {"dropout": -0.1}, ValueError, r"dropout must lie in \[0, 1\), got -0.1"),
        (QKV, {"dropout": 0.1, "seed": torch.tensor(1.0)}, TypeError, "the seed must be int64"),
        (
            QKV,
            {"dropout": 0.1, "seed": torch.zeros(2).long()},
            ValueError,
            "the seed must be one value on the CPU",
        ),
        (
            QKV,
            {"dropout": 0.1, "seed": torch.tensor(1), "generator": torch.Generator()},
            ValueError,
            "give one or the other",
        ),
    ],
)
def test_refusals(arguments, options, error, message):
    with pytest.raises(error, match=message):
        ak.attention(arguments, **options)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    "ends", [(0, 1, 3), (1, 4), (0, 3, 2, 4), (0, -1, 4), (0, 5, 4), (0, 2**30, 4), ()], ids=str
)
def test_cu_seqlens_that_are_wrong(impl, ends):
    with pytest.raises(RuntimeError, match="cu_seqlens"):
        ak.attention(QKV[0], cu_seqlens=torch.tensor(ends, dtype=torch.int32), impl=impl)


STATISTICS, OUT = torch.zeros(2, 4, 1, 2), torch.zeros(2, 4, 8)


@needs_library
@pytest.mark.parametrize(
    "op, arguments, message",
    [
        ("attention", (QKV[0], None, None, 0.0), r"qkv of shape \(batch, tokens, 3, heads, channels\)"),
        ("attention", (QKV.double(), None, None, 0.0), "float32 or bfloat16 qkv, got Double"),
        ("attention", (QKV, None, None, 0.1), "one int64 as the seed"),
        ("attention", (QKV, None, None, 1.0), r"a dropout in \[0, 1\), got 1"),
        ("attention", (QKV[0], ENDS.long(), None, 0.0), "int32 cu_seqlens"),
        (
            "attention_backward",
            (OUT[:1], QKV, OUT, STATISTICS, None, None, 0.0),
            "a gradient of the output's shape and dtype",
        ),
        (
            "attention_backward",
            (OUT, QKV, OUT.bfloat16(), STATISTICS, None, None, 0.0),
            "an output of the shape and dtype that it has",
        ),
        (
            "attention_backward",
            (OUT, QKV, OUT, OUT, None, None, 0.0),
            "two float32 statistics of each token and head",
        ),
    ],
)
def test_the_library_checks_its_arguments(op, arguments, message):
    with pytest.raises(RuntimeError, match=message):
        getattr(torch.ops.audiomae_native, op)(*arguments)
