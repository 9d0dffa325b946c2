"""window_attention against loops over tokens, and its index arithmetic against roll and partition."""

import math

import audiomae_kernels as ak
import pytest
import torch
from audiomae_kernels.window_attention import window_attention_ref, window_index
from budget import evaluate
from kernel_cases import cases, window_attention_case


def by_loops(qkv, tau, bias, grid, window, shift, scoring):
    """One query and one key at a time; a token's place in the rolled, padded grid says which it may see."""
    B, L, _, H, d = qkv.shape
    clipped = [(w, s) if w < g else (g, 0) for g, w, s in zip(grid, window, shift, strict=True)]

    def places(token):
        """Per axis: window, place inside the window, whether the roll carried it round the end."""
        for position, size, (w, s) in zip(divmod(token, grid[1]), grid, clipped, strict=True):
            padded = math.ceil(size / w) * w
            rolled = (position - s) % padded
            yield rolled // w, rolled % w, position < s

    where = [tuple(zip(*places(token), strict=True)) for token in range(L)]  # (window, place, wrapped) pairs
    out = torch.zeros(B, L, H, d, dtype=torch.float64)
    for b in range(B):
        for h in range(H):
            for i in range(L):
                weights = {}
                for j in range(L):
                    if where[i][0] != where[j][0]:
                        continue
                    q, k = qkv[b, i, 0, h], qkv[b, j, 1, h]
                    across = where[i][2] != where[j][2]
                    if scoring == "cosine":
                        score = float(q @ k) / max(float(q.norm() * k.norm()), 1e-6)
                        score = score / max(float(tau[h]), 0.01) - 100 * across
                    elif across:
                        continue
                    else:
                        score = float(q @ k) / math.sqrt(d)
                    if bias is not None:
                        (ti, fi), (tj, fj), wf = where[i][1], where[j][1], clipped[1][0]
                        score += float(bias[h, ti * wf + fi, tj * wf + fj])
                    weights[j] = score
                highest = max(weights.values())
                weights = {j: math.exp(score - highest) for j, score in weights.items()}
                for j, weight in weights.items():
                    out[b, i, h] += weight / sum(weights.values()) * qkv[b, j, 2, h]
    return out.reshape(B, L, H * d)


@pytest.mark.parametrize(
    "case",
    [
        window_attention_case("shifted", (6, 4), (3, 2), (1, 1), B=1, H=2, d=4),
        window_attention_case("shifted in time", (8, 4), (4, 4), (2, 0), B=1, H=1, d=4),
        window_attention_case("padded and shifted", (5, 5), (3, 2), (2, 1), B=2, H=2, d=3),
        window_attention_case("clipped", (5, 3), (2, 4), (1, 3), B=1, H=2, d=4),
        window_attention_case("dot", (6, 4), (3, 2), (2, 1), scoring="dot", B=1, H=2, d=4),
        window_attention_case("dot, padded", (5, 5), (2, 2), (1, 1), "dot", B=1, H=1, d=3, bias=False),
        window_attention_case("no bias", (4, 3), (2, 2), (1, 0), B=1, H=2, d=4, bias=False),
    ],
    ids=lambda case: case.name,
)
def test_definition(case):
    tensors = case.tensors()
    expected = by_loops(**tensors, **case.options)
    actual = case.call("reference")(**tensors)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def test_border_is_exactly_minus_100():
    """A bias of 100 between the rows of a window: across the border it cancels, elsewhere it decides."""
    case = window_attention_case("", (4, 2), (2, 2), (1, 0), B=1, H=2, d=4)
    tensors = case.tensors()
    row = torch.arange(4) // 2
    tensors["bias"] += 100 * (row[:, None] != row)
    expected = by_loops(**tensors, **case.options)
    torch.testing.assert_close(case.call("reference")(**tensors), expected, rtol=1e-11, atol=1e-11)


GEOMETRIES = [
    ((64, 8), (4, 4), (0, 0)),
    ((64, 8), (4, 4), (2, 0)),
    ((64, 8), (4, 4), (2, 2)),
    ((63, 8), (4, 4), (2, 0)),
    ((7, 10), (3, 4), (1, 3)),
    ((3, 8), (4, 4), (2, 2)),
    ((1, 1), (4, 4), (0, 0)),
]


@pytest.mark.parametrize("grid, window, shift", GEOMETRIES)
def test_window_index_is_roll_and_partition(grid, window, shift):
    T, F = grid
    L = T * F
    (wt, wf) = (min(w, g) for w, g in zip(window, grid, strict=True))
    st, sf = (s if w < g else 0 for g, w, s in zip(grid, window, shift, strict=True))
    PT, PF = math.ceil(T / wt) * wt, math.ceil(F / wf) * wf

    def partition(x):
        return x.view(PT // wt, wt, PF // wf, wf).transpose(1, 2).reshape(-1, wt * wf)

    tokens = torch.full((PT, PF), L)
    tokens[:T, :F] = torch.arange(L).view(T, F)
    regions = torch.zeros(PT, PF, dtype=torch.int64)
    for n, t in enumerate((slice(0, PT - wt), slice(PT - wt, PT - st), slice(PT - st, PT))):
        for m, f in enumerate((slice(0, PF - wf), slice(PF - wf, PF - sf), slice(PF - sf, PF))):
            regions[t, f] = 3 * n + m
    regions = partition(regions)  # Swin's region numbers are laid out on the rolled grid

    index, region = window_index(grid, window, shift)
    assert torch.equal(index, partition(tokens.roll((-st, -sf), (0, 1))))
    same, expected = region[:, :, None] == region[:, None, :], regions[:, :, None] == regions[:, None, :]
    assert torch.equal(same, expected)


def test_published_shift_masks_the_last_window_row_only():
    """Audio-MAE's 64 x 8 grid, shift (2, 0): in the last 2 of 32 windows rows {0, 1} do not see {2, 3}."""
    _, region = window_index((64, 8), (4, 4), (2, 0))
    parted = (region != region[:, :1]).any(1)
    assert parted.nonzero().flatten().tolist() == [30, 31]
    assert (region[30:, :8] == region[30:, :1]).all() and (region[30:, 8:] == region[30:, 8:9]).all()


def test_flat_and_split_qkv_agree_bit_for_bit():
    case = window_attention_case("", (6, 4), (4, 4), (2, 0))
    tensors = case.tensors(torch.float32)
    flat = tensors | {"qkv": tensors["qkv"].flatten(2)}
    assert torch.equal(case.call()(**flat), case.call()(**tensors))
    no_tau = {**flat, "tau": None}
    options = case.options | {"scoring": "dot"}
    expected = ak.window_attention(**no_tau | {"qkv": tensors["qkv"]}, **options)
    assert torch.equal(ak.window_attention(**no_tau, **options), expected)


@pytest.mark.parametrize("case", cases("window_attention")[:3])
def test_strided_qkv(case):
    tensors = case.tensors(torch.float32)
    expected = case.call()(**tensors)
    qkv = tensors["qkv"].permute(2, 1, 0, 4, 3).contiguous().permute(2, 1, 0, 4, 3)
    assert not qkv.is_contiguous()
    assert torch.equal(case.call()(**tensors | {"qkv": qkv}), expected)
    one_clip = tensors["qkv"][:1].expand_as(tensors["qkv"])
    actual = case.call()(**tensors | {"qkv": one_clip})
    assert torch.equal(actual, case.call()(**tensors | {"qkv": one_clip.contiguous()}))


@pytest.mark.parametrize("scoring", ["cosine", "dot"])
def test_zero_tokens_have_finite_gradients(scoring):
    """Zeros appear as padding; the norm of a zero key must not turn into NaN."""
    case = window_attention_case("", (5, 3), (2, 2), (1, 1), scoring=scoring)
    tensors = case.tensors(torch.float32)
    tensors["qkv"][:, ::2] = 0
    leaves = [tensors[name].requires_grad_() for name in case.wrt()]
    for function in (case.call("reference"), case.reference()):
        for grad in torch.autograd.grad(function(**tensors).square().sum(), leaves):
            assert grad.isfinite().all()


def test_gradients_of_norms_below_their_minimum():
    """|q||k| straddles 1e-6; autograd through the plain formula knows what clamp lets through."""
    case = window_attention_case("", (4, 4), (2, 2), (1, 0), H=2)
    tensors = case.tensors()
    tensors["qkv"] *= torch.logspace(-4, -1, 16, dtype=torch.float64)[:, None, None, None]
    actual = evaluate(case.call("reference"), tensors, case.wrt())
    expected = evaluate(case.reference(), tensors, case.wrt())
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=1e-10, atol=1e-12, msg=name)


def test_tau_below_its_minimum_is_clamped_and_takes_no_gradient():
    case = window_attention_case("", (4, 4), (2, 2), H=2)
    tensors = case.tensors()
    tensors["tau"] = torch.tensor([0.001, 0.5], dtype=torch.float64, requires_grad=True)
    out = case.call()(**tensors)
    (grad,) = torch.autograd.grad(out.square().sum(), tensors["tau"])
    assert grad[0] == 0 and grad[1] != 0
    with torch.no_grad():
        expected = case.call()(**tensors | {"tau": torch.tensor([0.01, 0.5], dtype=torch.float64)})
    torch.testing.assert_close(out, expected, rtol=0, atol=0)


def test_dot_scoring_is_scaled_dot_product_attention():
    qkv = torch.randn(2, 6, 3, 2, 8, dtype=torch.float64)
    bias = torch.randn(2, 6, 6, dtype=torch.float64)
    actual = ak.window_attention(qkv, None, bias, grid=(3, 2), window=(3, 2), scoring="dot")
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, bias).transpose(1, 2).flatten(2)
    torch.testing.assert_close(actual, expected)


def test_reference_without_upcast_stays_in_its_dtype():
    case = window_attention_case("", (5, 5), (4, 2), (1, 1))
    tensors = case.tensors(torch.bfloat16)
    low, high = case.reference()(**tensors, upcast=False), case.reference()(**tensors)
    assert low.dtype == high.dtype == torch.bfloat16
    assert not torch.equal(low, high)


QKV = torch.zeros(2, 24, 3, 2, 8)
GOOD = {
    "qkv": QKV,
    "tau": torch.ones(2),
    "bias": torch.zeros(2, 16, 16),
    "grid": (6, 4),
    "window": (4, 4),
}


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"scoring": "cos"}, ValueError, "scoring must be 'cosine' or 'dot', got 'cos'"),
        ({"tau": None}, ValueError, "scoring='cosine' needs tau"),
        ({"scoring": "dot"}, ValueError, "pass tau=None with scoring='dot'"),
        ({"grid": 24}, ValueError, r"grid must be a pair \(time, frequency\), got 24"),
        ({"window": (0, 4)}, ValueError, r"window must be a pair of integers of at least 1, got \(0, 4\)"),
        ({"shift": (-1, 0)}, ValueError, r"shift must be a pair of integers of at least 0, got \(-1, 0\)"),
        ({"shift": (4, 0)}, ValueError, r"shift \(4, 0\) must be smaller than the window \(4, 4\)"),
        ({"grid": (5, 4)}, ValueError, r"qkv must have shape .*20.* but it has shape \(2, 24, 3, 2, 8\)"),
        ({"qkv": QKV[:, :, :2]}, ValueError, "qkv must have shape"),
        ({"qkv": QKV[0, 0, 0]}, ValueError, r"qkv must have shape \(B, L, 3 \* H \* d\)"),
        ({"qkv": torch.zeros(2, 24, 47)}, ValueError, "3 \\* H \\* d with H = 2 heads .* but it is 47"),
        (
            {"qkv": QKV.flatten(2), "tau": None, "bias": None, "scoring": "dot"},
            ValueError,
            "the number of heads is unknown",
        ),
        ({"tau": torch.ones(3)}, ValueError, r"tau must have shape \(H,\), here \(2\)"),
        (
            {"bias": torch.zeros(2, 24, 24)},
            ValueError,
            r"bias must have shape \(H, N, N\), here \(2, 16, 16\)",
        ),
        ({"qkv": QKV.int()}, TypeError, "qkv must be float32, .* but it is torch.int32"),
        ({"tau": torch.ones(2).int()}, TypeError, "tau must be float32"),
        ({"bias": torch.zeros(2, 16, 16).int()}, TypeError, "bias must be float32"),
        ({"tau": torch.ones(2, device="meta")}, ValueError, "tau must be on the device of qkv, cpu"),
        ({"bias": torch.ones(2, 16, 16, device="meta")}, ValueError, "bias must be on the device of qkv"),
        ({"impl": "cuda"}, ValueError, "impl must be None, .* got 'cuda'"),
    ],
)
def test_errors(change, error, message):
    ak.window_attention(**GOOD)
    with pytest.raises(error, match=message):
        ak.window_attention(**GOOD | change)


def test_reference_is_importable_from_both_places():
    from audiomae_kernels.window_attention import reference

    assert reference.window_attention_ref is window_attention_ref
