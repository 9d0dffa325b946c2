"""Random calls of the native ops: shapes, strides, offsets and dtypes drawn from a seed, judged by the references.

`python -m native_fuzz FIRST LAST` runs the seeds [FIRST, LAST) of every op in the process's ISA tier.
"""

import sys
from functools import partial
from itertools import accumulate

import audiomae_kernels as ak
import torch
from audiomae_kernels import _native
from audiomae_kernels.attention import attention_ref
from audiomae_kernels.window_attention import clip_window, window_attention_ref, window_index
from budget import evaluate, to_exact
from kernel_cases import GRADIENTS, REFERENCES, info_nce_case, patch_case, unshuffle_case

DTYPES = (torch.float32, torch.bfloat16)
COPIED = (*DTYPES, torch.float16, torch.float64)  # patch_gather copies any of these
EPS = torch.finfo(torch.float32).eps


def integer(low, high):
    return int(torch.randint(low, high + 1, ()))


def one_of(*choices):
    return choices[integer(0, len(choices) - 1)]


def laid_out(x):
    """The same values with other strides or another offset; what is around them is NaN."""
    kind = one_of(
        "contiguous", "permuted", "gaps", "last dimension apart", "offset", "expanded", "misaligned"
    )
    if kind == "permuted":
        order = torch.randperm(x.dim()).tolist()
        return x.permute(order).contiguous().permute([order.index(i) for i in range(x.dim())])
    if kind == "gaps":
        buffer = torch.full([size + 2 for size in x.shape], float("nan"), dtype=x.dtype)
        return buffer[tuple(slice(1, size + 1) for size in x.shape)].copy_(x)
    if kind == "last dimension apart":
        return torch.stack([x, torch.full_like(x, float("nan"))], -1)[..., 0]
    if kind == "offset":
        buffer = torch.full((x.numel() + 5,), float("nan"), dtype=x.dtype)
        return buffer[3 : 3 + x.numel()].view(x.shape).copy_(x)
    if kind == "expanded":
        return x[:1].expand_as(x)
    if kind == "misaligned" and x.numel():  # memory of others, not even aligned to an element
        raw = bytearray(b"\xff" + x.contiguous().view(torch.uint8).numpy().tobytes() + b"\xff\xff")
        return torch.frombuffer(raw, dtype=x.dtype, offset=1, count=x.numel()).view(x.shape)
    return x


def ids_laid_out(ids):
    return one_of(lambda: ids, lambda: ids.T.contiguous().T, lambda: ids.repeat_interleave(2, 1)[:, ::2])()


# --- window_attention ----------------------------------------------------------------------------------


def window_attention():
    dtype, scoring = one_of(*DTYPES), one_of("cosine", "cosine", "dot")
    grid = (integer(1, 11), integer(1, 9))
    window = one_of((4, 4), (integer(1, 7), integer(1, 7)))
    shift = tuple(integer(0, size - 1) for size in window)
    # One channel would make every cosine 1 or -1 and the gradients of q and k differences of equal numbers.
    B, H, d = integer(0, 3) or integer(0, 1), integer(1, 4), one_of(32, 32, 16, 64, integer(2, 50))
    (wt, wf), _ = clip_window(grid, window, shift)
    tokens = grid[0] * grid[1]
    qkv = laid_out(torch.randn(B, tokens, 3, H, d).to(dtype))
    tau = (torch.rand(H) + 0.5).to(one_of(torch.float32, dtype))
    bias = torch.randn(H, wt * wf, wt * wf).to(one_of(torch.float32, torch.float16, dtype))
    tensors = {
        "qkv": qkv,
        "tau": laid_out(tau) if scoring == "cosine" else None,
        "bias": one_of(None, laid_out(bias)),
    }
    options = {"grid": grid, "window": window, "shift": shift, "scoring": scoring}
    cotangent = laid_out(torch.randn(B, tokens, H * d).to(dtype))

    wrt = [name for name, tensor in tensors.items() if tensor is not None]
    actual = evaluate(partial(ak.window_attention, **options, impl="native"), tensors, wrt, cotangent)
    reference = partial(window_attention_ref, **options)
    eager = evaluate(reference, tensors, wrt, cotangent)
    exact = evaluate(reference, to_exact(tensors), wrt, cotangent)
    windows = len(window_index(grid, window)[0])
    judge_window_attention(actual, eager, exact, {"tau": B * tokens, "bias": B * windows}, options)


def judge_window_attention(actual, eager, exact, rows, options):
    """Twice the error of eager, which computes in float32 and rounds once, and one rounding of the result's dtype.

    For P and dS are rounded to bfloat16 for their products: each of a sum's terms by half a unit of its own, and a
    sum of such errors stays below one unit of the largest result. The gradient of a parameter has few values, and
    may be far smaller than what it is summed from: `rows` of scores of about 1 each, a random walk of that many
    steps. It is kept in float32 up to its end: four roundings of that size.
    """
    for name, value in actual.items():
        assert value.dtype == eager[name].dtype and value.shape == eager[name].shape, name
        if not value.numel():
            continue
        size, roundings = exact[name].abs().max(), 1
        if (steps := rows.get(name.removeprefix("grad of "))) is not None:
            size, roundings = size + steps**0.5, 4
        budget = 2 * (eager[name].double() - exact[name]).abs().max()
        budget += roundings * torch.finfo(value.dtype).eps * size
        error = (value.double() - exact[name]).abs().max()
        assert error <= budget, f"{name}: error {error:.3g}, budget {budget:.3g}, {options}"


# --- attention -----------------------------------------------------------------------------------------


def attention():
    dtype, dropout = one_of(*DTYPES), one_of(0.0, 0.1, 0.75)
    H, d = integer(1, 4), one_of(16, 32, 64, 80, integer(1, 70))
    lengths = one_of(None, [one_of(integer(0, 40), integer(0, 200)) for _ in range(integer(1, 5))])
    tokens = (integer(0, 3), one_of(integer(0, 40), integer(120, 300)))
    if lengths is not None:
        tokens = (sum(lengths),)
    ends = None if lengths is None else torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
    tensors = {
        "qkv": laid_out(torch.randn(*tokens, 3, H, d).to(dtype)),
        "cu_seqlens": ends,
        "seed": torch.randint(-(2**63), 2**63 - 1, ()),
    }
    cotangent = laid_out(torch.randn(*tokens, H * d).to(dtype))
    actual = evaluate(partial(ak.attention, dropout=dropout, impl="native"), tensors, ["qkv"], cotangent)
    reference = partial(attention_ref, dropout=dropout)
    eager = evaluate(reference, tensors, ["qkv"], cotangent)
    exact = evaluate(reference, to_exact(tensors), ["qkv"], cotangent)
    judge_attention(actual, eager, exact, tensors["qkv"], cotangent, f"{tokens} {H} {d} {dropout} {lengths}")


def judge_attention(actual, eager, exact, qkv, cotangent, what):
    """Four times the error of eager, whose largest of one draw is a matter of luck, and four roundings of the result.

    In bfloat16 eager computes in float32 and rounds once, where the kernel rounds P and dS for their products. And
    rowsum(do o) is as right as o is, and dP as a sum of d products in float32: errors of three standard deviations of
    these sums go on to dq and dk, which are small beside them where a clip has few tokens, or equal ones.
    """
    (*_, d), eps = qkv.shape, torch.finfo(qkv.dtype).eps
    results = [
        dict(zip("oqkv", (r["output"], *r["grad of qkv"].unbind(-3)), strict=True))
        for r in (actual, eager, exact)
    ]
    for name, (value, of_eager, truth) in ((name, [r[name] for r in results]) for name in "oqkv"):
        assert value.dtype == qkv.dtype and value.shape == truth.shape, name
        if not value.numel():
            continue
        errors = [(x.double() - truth).abs().max().item() for x in (value, of_eager)]
        budget = 4 * errors[1] + 4 * eps * truth.abs().max().item()
        if name in "qk":
            rounding = eps * results[2]["o"].abs().max() + EPS * d**0.5 * qkv.double().abs().max()
            do = cotangent.double().unflatten(-1, (-1, d)).norm(dim=-1).max()
            budget += (3 * rounding * do * qkv.double().abs().max() / d**0.5).item()
        assert errors[0] <= budget, f"{name}: error {errors[0]:.3g}, budget {budget:.3g}, {what}"


# --- the other ops -------------------------------------------------------------------------------------


def draw_patches(op, **options):
    patch = one_of((16, 16), (4, 8), (integer(1, 9), integer(2, 40)))
    stride = one_of(None, (integer(1, 9), integer(1, 20)))
    T, F = patch[0] + integer(0, 30), patch[1] + integer(0, 40)
    st, sf = stride or patch
    tokens = ((T - patch[0]) // st + 1) * ((F - patch[1]) // sf + 1)
    B, m, K = integer(0, 3), integer(0, 3), integer(0, tokens)
    case = patch_case(op, "", T, F, patch, stride, B, m, K, **options)
    return case.make(), case.options


def draw_unshuffle():
    B, L, D = integer(0, 19), integer(1, 40), one_of(integer(1, 70), 64, 128)
    tensors = unshuffle_case("", B, integer(0, L), L, D).make()
    for name in ("mask_token", "pos"):
        tensors[name] = tensors[name].to(one_of(torch.float32, torch.bfloat16, torch.float16))
    return tensors, {}


def draw_info_nce():
    over = one_of("target", "prediction")
    M, V = one_of(integer(0, 30), integer(240, 300)), one_of(integer(1, 40), integer(250, 270))
    case = info_nce_case("", integer(0, 3), M, V, over)
    return case.make(), case.options


def patch_gather():
    tensors, options = draw_patches("patch_gather")
    spectrogram, ids = laid_out(tensors["spectrogram"].to(one_of(*COPIED))), ids_laid_out(tensors["ids"])
    actual = ak.patch_gather(spectrogram, ids, **options, impl="native")
    expected = REFERENCES["patch_gather"](spectrogram, ids, **options)
    assert actual.dtype == expected.dtype and torch.equal(actual, expected), options


def judge(op, tensors, options):
    """Against the reference in float64."""
    for name, x in tensors.items():
        if not x.is_floating_point():
            tensors[name] = ids_laid_out(x)
        else:
            tensors[name] = laid_out(x.to(one_of(*DTYPES)) if x.dtype == torch.float64 else x)
    function, wrt = partial(getattr(ak, op), **options, impl="native"), GRADIENTS[op]
    with torch.no_grad():
        shape = function(**tensors).shape
    # A loss by its own size, or the gradients would be denormal beside the float64 ones.
    cotangent = laid_out(torch.randn(shape)) if shape else torch.tensor(1.5)
    actual = evaluate(function, tensors, wrt, cotangent)
    rounded = cotangent.to(actual["output"].dtype)
    exact = evaluate(partial(REFERENCES[op], **options), to_exact(tensors), wrt, rounded)
    for name, value in actual.items():
        truth, error = exact[name], (value.double() - exact[name]).abs()
        assert value.shape == truth.shape, name
        if value.numel():
            # One rounding to the dtype, and the float32 arithmetic: sums of up to 760 terms, products of 270 values.
            bound = torch.finfo(value.dtype).eps * truth.abs() + 100 * EPS * truth.abs().amax()
            if op == "info_nce" and truth.ndim and tensors["pred"].dtype == tensors["target"].dtype:
                # softmax - I may be rounded to the dtype for its product, as in the eager version.
                bound = bound + torch.finfo(value.dtype).eps * truth.abs().amax()
            assert (error <= bound).all(), (
                f"{name}: error {error.max():.3g} of {truth.abs().max():.3g}, {options}"
            )


def fbank():
    """Against float64, beside the reference's own error; frames of any size, whole and misaligned clips."""
    rate = one_of(16000, 8000, 44100, integer(300, 50000))
    frame_length = one_of(25.0, integer(2, 40) + 0.5)
    size = int(rate * frame_length * 0.001)
    if size < 2:
        rate, frame_length, size = 16000, 25.0, 400
    settings = {
        "sample_rate": rate,
        "frame_length": frame_length,
        "frame_shift": max(1000.0 / rate, one_of(10.0, frame_length / 3, frame_length * 1.5)) + 1e-6,
        "window": one_of("hanning", "povey"),
        "mel_bins": one_of(128, integer(1, 150)),
        "low_freq": one_of(20.0, 0.0),
        "preemphasis": one_of(0.97, 0.0),
        "remove_dc_offset": one_of(True, False),
    }
    samples = size + one_of(integer(0, 3 * size), integer(0, 60 * size))
    waveform = laid_out(torch.randn(integer(0, 3), min(samples, 40000 + size)) * 0.1 + one_of(0.0, 0.2))
    actual = ak.fbank(waveform, **settings, impl="native")
    truth, eager = (ak.fbank(x, **settings, impl="reference") for x in (waveform.double(), waveform))
    assert actual.dtype == eager.dtype and actual.shape == eager.shape, settings
    if actual.numel():
        # Of powers, whose errors are those of the strongest bins: in the log domain the weakest decide.
        errors = [(x.double().exp() - truth.exp()).abs().max().item() for x in (actual, eager)]
        budget = 4 * errors[1] + 4 * EPS * truth.exp().max().item()
        assert errors[0] <= budget, f"error {errors[0]:.3g}, budget {budget:.3g}, {settings}"
        # Where no strong bin is near, the log of a value that is right to a few units.
        logs = [(x.double() - truth).abs().mean().item() for x in (actual, eager)]
        budget = 1.5 * logs[1] + EPS * truth.abs().max().item()
        assert logs[0] <= budget, f"mean error {logs[0]:.3g}, budget {budget:.3g}, {settings}"


def any_ids():
    """Ids out of range and duplicates: a bug of the caller, which reads and writes nothing that is not its own.

    What lies around the inputs is NaN, and so is a result that nobody wrote.
    """
    op = one_of("patch_gather", "masked_mse", "unshuffle")
    tensors, options = draw_unshuffle() if op == "unshuffle" else draw_patches(op)
    for name, x in tensors.items():
        if x.is_floating_point():
            tensors[name] = laid_out(x.to(one_of(*DTYPES)))
            continue
        limits = torch.iinfo(torch.int64)
        foul = torch.tensor([-1, -(2**31), 2**31, 2**60, limits.min, limits.max])
        near = torch.randint(-3, 2 * x.shape[1] + 4, x.shape)
        tensors[name] = ids_laid_out(torch.where(torch.rand(x.shape) < 0.3, foul[near % len(foul)], near))
    results = evaluate(partial(getattr(ak, op), **options, impl="native"), tensors, GRADIENTS[op])
    for name, value in results.items():
        assert value.isfinite().all(), f"{name} of {op}, {options}"


FUZZ = {
    "window_attention": window_attention,
    "patch_gather": patch_gather,
    "unshuffle": lambda: judge("unshuffle", *draw_unshuffle()),
    "masked_mse": lambda: judge("masked_mse", *draw_patches("masked_mse", normalize=one_of(True, False))),
    "info_nce": lambda: judge("info_nce", *draw_info_nce()),
    "attention": attention,
    "fbank": fbank,
    "any ids": any_ids,
}


def fuzz(first, last, ops=tuple(FUZZ)):
    """Number of cases run; AssertionError names the op and the seed."""
    torch.use_deterministic_algorithms(True)  # memory that C++ asks for is NaN: an unwritten element shows
    for op in ops:
        for seed in range(first, last):
            torch.manual_seed(seed)
            torch.set_num_threads(one_of(1, 2))
            try:
                FUZZ[op]()
            except AssertionError as error:
                raise AssertionError(f"{op}, seed {seed}: {error}") from None
    return len(ops) * (last - first)


if __name__ == "__main__":
    count = fuzz(*map(int, sys.argv[1:]))
    print(*(name for name, chosen, _ in _native.cpu_tiers() if chosen), count)
