"""Attention backends: packed batches against clips alone, the calls of flash-attn and xformers, every refusal,
and what is chosen where nothing is asked for.

flash-attn and xformers need a GPU. Here stand-ins with their documented signatures take their place, which check
each argument and compute by definition; where the packages are installed, the signatures are compared with theirs.
"""

import inspect
import json
import sys
import types
from functools import partial

import audiomae_kernels as ak
import pytest
import torch
from audiomae_kernels import _native
from budget import assert_within_budget
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from training import Calls

import audiomae
from audiomae import attention as module
from audiomae import cli
from audiomae.attention import Packed, best_backend, require_backend, why_not
from audiomae.attention import attention as attention_of_qkv
from audiomae.config import from_dict
from audiomae.model import Block, GlobalAttention

pytestmark = pytest.mark.usefixtures("one_thread")

LENGTHS = (3, 1, 7)
needs_library = pytest.mark.skipif(not _native.available(), reason=_native.why_not() or "loaded")
ON_A_CPU = [pytest.param("native", marks=needs_library), "sdpa"]
GPU = torch.device("cuda", 0)


def by_definition(q, k, v, dropout=0.0):
    """softmax(q kᵀ / √d) v of one clip, (L, H, d)."""
    weights = torch.einsum("qhd,khd->hqk", q, k).mul(q.shape[-1] ** -0.5).softmax(-1)
    return torch.einsum("hqk,khd->qhd", nn.functional.dropout(weights, dropout), v)


def clip_by_clip(q, k, v, lengths=LENGTHS, dropout=0.0):
    clips = zip(*(x.split(list(lengths)) for x in (q, k, v)), strict=True)
    return torch.cat([by_definition(*clip, dropout) for clip in clips])


def attention(q, k, v, **options):
    """`audiomae.attention.attention` of three tensors, which are one to it; (..., H, d)."""
    return attention_of_qkv(torch.stack((q, k, v), -3), **options).unflatten(-1, q.shape[-2:])


def tokens(*shape, dtype=torch.float64, device="cpu"):
    """q, k and v as views of one tensor, the way a fused projection gives them."""
    heads, channels = shape[-2:]
    return torch.randn(*shape[:-2], 3, heads, channels, dtype=dtype, device=device).unbind(-3)


# -- packed batches ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lengths", [LENGTHS, (5,), (4, 4, 4), (129, 2)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", ON_A_CPU)
def test_packed_clips_are_clips_alone(backend, lengths, dtype):
    def draw(seed):
        torch.manual_seed(seed)
        return dict(zip("qkv", tokens(sum(lengths), 2, 16, dtype=dtype), strict=True))

    def reference(q, k, v, upcast):
        return clip_by_clip(q, k, v, lengths)

    packed = Packed.of(lengths)

    def op(q, k, v):
        return attention(q, k, v, packed=packed, backend=backend)

    assert_within_budget(op, reference, draw, wrt="qkv")


@pytest.mark.parametrize("backend", ON_A_CPU)
def test_a_dense_batch_is_its_clips(backend):
    def draw(seed):
        torch.manual_seed(seed)
        return dict(zip("qkv", tokens(2, 5, 3, 16, dtype=torch.float32), strict=True))

    def reference(q, k, v, upcast):
        return torch.stack([by_definition(*clip) for clip in zip(q, k, v, strict=True)])

    assert_within_budget(partial(attention, backend=backend), reference, draw, wrt="qkv")


@pytest.mark.parametrize("lengths", [LENGTHS, (1, 1, 2), (4, 4)], ids=str)
def test_packed_in_float64(lengths):
    leaves = [x.requires_grad_() for x in tokens(sum(lengths), 2, 16)]
    out, expected = attention(*leaves, packed=Packed.of(lengths)), clip_by_clip(*leaves, lengths)
    cotangent = torch.randn_like(out)
    actual = (out, *torch.autograd.grad(out, leaves, cotangent))
    for a, e in zip(actual, (expected, *torch.autograd.grad(expected, leaves, cotangent)), strict=True):
        torch.testing.assert_close(a, e, rtol=0, atol=1e-14)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")], ids=str)
@pytest.mark.parametrize("backend", ON_A_CPU)
def test_a_poisoned_clip_stays_alone(backend, poison):
    def run(spoil):
        torch.manual_seed(0)
        q, k, v = (x.clone() for x in tokens(sum(LENGTHS), 2, 16, dtype=torch.float32))
        if spoil:
            for x in (q, k, v):
                x[3:4] = poison  # the second clip
        for x in (q, k, v):
            x.requires_grad_()
        out = attention(q, k, v, packed=Packed.of(LENGTHS), backend=backend)
        grads = torch.autograd.grad(out, (q, k, v), torch.ones_like(out))
        return out.detach(), *grads

    for clean, spoilt in zip(run(False), run(True), strict=True):
        assert torch.equal(clean[:3], spoilt[:3]) and torch.equal(clean[4:], spoilt[4:])
    assert run(True)[0][3:4].isnan().all()


def test_lengths_that_are_equal_make_a_dense_batch():
    q, k, v = tokens(12, 2, 16)
    dense = attention(*(x.unflatten(0, (3, 4)) for x in (q, k, v)))
    assert torch.equal(attention(q, k, v, packed=Packed.of((4, 4, 4))), dense.flatten(0, 1))


def test_packed_lengths():
    packed = Packed.of([3, 1, 7])
    assert packed.lengths == LENGTHS
    assert packed.cu_seqlens.dtype == torch.int32 and packed.cu_seqlens.tolist() == [0, 3, 4, 11]
    for lengths in ((), (3, 0), (3, -1), (2.0,), torch.tensor([3, 1])):
        with pytest.raises(ValueError, match="positive integers, one for each clip, got"):
            Packed.of(lengths)


@pytest.mark.parametrize("packed", [None, Packed.of((4, 7))], ids=["dense", "packed"])
@pytest.mark.parametrize("backend", ON_A_CPU)
def test_dropout_is_of_the_weights(backend, packed):
    ones = torch.ones(11, 64, 8)  # of L equal weights n stay, each 2 / L
    q, last = (ones[None], 11) if packed is None else (ones, 7)
    assert (attention(q, q, q, packed=packed, backend=backend) - 1).abs().max() < 1e-6
    out = attention(q, q, q, packed=packed, dropout=0.5, backend=backend).view_as(ones)[-last:]
    stay = out * last / 2
    assert (stay - stay.round()).abs().max() < 1e-5
    assert 0.9 < out.mean() < 1.1 and stay.round().unique().numel() > 3


def test_shapes_that_do_not_fit():
    q, k, v = tokens(11, 2, 16)
    packed = Packed.of(LENGTHS)
    with pytest.raises(
        ValueError, match=r"without packed=, qkv must be \(B, L, 3, H, d\), got \(11, 3, 2, 16\)"
    ):
        attention(q, k, v)
    for wrong in ((q[None], k[None], v[None]), (q[:10], k[:10], v[:10])):
        with pytest.raises(
            ValueError, match=r"qkv must be \(11, 3, H, d\) for packed clips of 11 tokens in all, got"
        ):
            attention(*wrong, packed=packed)
    elsewhere = Packed(LENGTHS, packed.cu_seqlens.to("meta"))
    with pytest.raises(ValueError, match=r"packed is on meta, the tokens on cpu: make it with Packed\.of"):
        attention(q, k, v, packed=elsewhere)


@pytest.mark.no_poison
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_to_one_graph(dynamic):
    compiled = torch.compile(attention, fullgraph=True, dynamic=dynamic, backend="eager")
    torch.testing.assert_close(compiled(*(qkv := tokens(2, 11, 2, 16))), attention(*qkv))
    for lengths in (LENGTHS, (5, 6)):
        qkv, packed = tokens(11, 2, 16), Packed.of(lengths)
        torch.testing.assert_close(compiled(*qkv, packed=packed), attention(*qkv, packed=packed))
    torch.compiler.reset()


# -- PyTorch's kernel for packed clips -----------------------------------------------------------------------


@pytest.fixture
def fake_gpu(monkeypatch):
    """Fake tensors on a GPU of compute capability 8.0."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 0))
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    monkeypatch.setattr(torch.version, "hip", None)
    with FakeTensorMode():
        yield


@pytest.mark.no_poison
def test_varlen_attn_on_a_gpu(fake_gpu, monkeypatch):
    from torch.nn.attention import varlen

    calls = []

    def varlen_attn(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k):
        calls.append((query, key, value, cu_seq_q, cu_seq_k, max_q, max_k))
        return real(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k)

    real = varlen.varlen_attn
    monkeypatch.setattr(varlen, "varlen_attn", varlen_attn)
    packed = Packed.of(LENGTHS, GPU)
    for dtype in (torch.float16, torch.bfloat16):
        q, k, v = tokens(11, 2, 32, dtype=dtype, device="cuda")
        out = attention(q, k, v, packed=packed)
        assert out.shape == q.shape and out.dtype == dtype and out.device == GPU
        ends = packed.cu_seqlens
        assert ends.dtype == torch.int32 and ends.shape == (4,) and ends.device == GPU
        *parts, first, second, longest, other = calls.pop()
        assert first is second is ends and longest == other == 7
        qkv = torch.stack((q, k, v), -3)
        for i, part in enumerate(parts):  # in place
            assert part.shape == q.shape and part.stride() == qkv.stride()[:1] + qkv.stride()[2:]
            assert part.storage_offset() == qkv[:, i].storage_offset()


@pytest.mark.no_poison
@pytest.mark.parametrize("case", ["float32", "dropout", "head_dim", "capability", "rocm", "dense"])
def test_varlen_attn_where_it_does_not_serve(fake_gpu, monkeypatch, case):
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", None)
    if case == "capability":
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    if case == "rocm":
        monkeypatch.setattr(torch.version, "hip", "7.0")
    dtype = torch.float32 if case == "float32" else torch.bfloat16
    q, k, v = tokens(11, 2, 36 if case == "head_dim" else 32, dtype=dtype, device="cuda")
    packed = Packed.of(LENGTHS, GPU)
    if case == "dense":
        q, k, v, packed = q[None], k[None], v[None], None
    out = attention(q, k, v, packed=packed, dropout=0.1 if case == "dropout" else 0.0)
    assert out.shape == q.shape and out.dtype == dtype and out.device == GPU


# -- flash-attn and xformers, by stand-ins -------------------------------------------------------------------


class FlashAttn(types.ModuleType):
    """flash-attn 2: fp16 and bf16 on a GPU there, any float on a CPU here."""

    def __init__(self):
        super().__init__("flash_attn")
        self.calls = []

    def flash_attn_func(self, q, k, v, dropout_p=0.0, softmax_scale=None, causal=False):
        self._check(q, k, v, 4, softmax_scale, causal)
        self.calls.append(("dense", dropout_p))
        return torch.stack([by_definition(*clip, dropout_p) for clip in zip(q, k, v, strict=True)])

    def flash_attn_varlen_func(
        self, q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
        dropout_p=0.0, softmax_scale=None, causal=False,
    ):  # fmt: skip
        self._check(q, k, v, 3, softmax_scale, causal)
        for ends, longest in ((cu_seqlens_q, max_seqlen_q), (cu_seqlens_k, max_seqlen_k)):
            assert ends.dtype == torch.int32 and ends.is_contiguous() and ends.device == q.device
            assert ends[0] == 0 and ends[-1] == q.shape[0]
            assert type(longest) is int and longest == ends.diff().max()
        self.calls.append(("packed", dropout_p))
        return clip_by_clip(q, k, v, cu_seqlens_q.diff().tolist(), dropout_p)

    @staticmethod
    def _check(q, k, v, ndim, softmax_scale, causal):
        assert q.shape == k.shape == v.shape and q.ndim == ndim and q.shape[-1] <= 256
        assert all(x.stride(-1) == 1 for x in (q, k, v))
        assert softmax_scale in (None, q.shape[-1] ** -0.5) and causal is False

    def install(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "flash_attn", self)


class BlockDiagonalMask:
    @classmethod
    def from_seqlens(cls, q_seqlen, kv_seqlen=None, *, device=None):
        assert kv_seqlen is None and all(type(n) is int for n in q_seqlen)
        mask = cls()
        mask.lengths, mask.device = q_seqlen, torch.device(device)
        return mask


class Xformers(types.ModuleType):
    """xformers 0.0.35: tensors are [B, M, H, K], B is 1 with a BlockDiagonalMask."""

    def __init__(self):
        super().__init__("xformers.ops")
        self.calls = []

    def memory_efficient_attention(
        self, query, key, value, attn_bias=None, p=0.0, scale=None, *, op=None, output_dtype=None
    ):
        assert query.shape == key.shape == value.shape and query.ndim == 4 and query.shape[-1] % 8 == 0
        assert all(x.stride(-1) == 1 and x.stride(-2) % 8 == 0 for x in (query, key, value))
        assert scale in (None, query.shape[-1] ** -0.5) and op is None and output_dtype is None
        if attn_bias is None:
            self.calls.append(("dense", p))
            return torch.stack([by_definition(*clip, p) for clip in zip(query, key, value, strict=True)])
        assert type(attn_bias) is BlockDiagonalMask and attn_bias.device == query.device
        assert query.shape[:2] == (1, sum(attn_bias.lengths))
        self.calls.append(("packed", p))
        return clip_by_clip(query[0], key[0], value[0], attn_bias.lengths, p)[None]

    def install(self, monkeypatch):
        names = ("xformers", "xformers.ops", "xformers.ops.fmha", "xformers.ops.fmha.attn_bias")
        package, _, fmha, attn_bias = (types.ModuleType(name) for name in names)
        attn_bias.BlockDiagonalMask = BlockDiagonalMask
        for name, part in zip(names, (package, self, fmha, attn_bias), strict=True):
            monkeypatch.setitem(sys.modules, name, part)


STAND_INS = {"flash_attn": FlashAttn, "xformers": Xformers}
OTHERS = sorted(STAND_INS)


@pytest.fixture(params=OTHERS)
def other(request, monkeypatch):
    """A backend's name and its stand-in, which is allowed to serve tensors on the CPU."""
    stand_in = STAND_INS[request.param]()
    stand_in.install(monkeypatch)
    monkeypatch.setattr(module, "why_not", lambda *asked: "")
    return request.param, stand_in


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("lengths", [None, LENGTHS], ids=["dense", "packed"])
def test_other_backends_are_called_as_documented(other, lengths, dropout):
    backend, stand_in = other
    q, k, v = tokens(*((2, 5) if lengths is None else (11,)), 2, 16)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    packed = lengths and Packed.of(lengths)
    options = {"packed": packed, "dropout": dropout}
    out = attention(q, k, v, **options, backend=backend)
    assert stand_in.calls == [("dense" if lengths is None else "packed", dropout)]
    assert out.shape == q.shape
    if dropout:
        return
    torch.testing.assert_close(out, attention(q, k, v, **options), rtol=0, atol=1e-14)
    cotangent = torch.randn_like(out)
    actual = torch.autograd.grad(out, leaves, cotangent)
    expected = torch.autograd.grad(attention(q, k, v, **options), leaves, cotangent)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=0, atol=1e-13)


def test_the_mask_of_a_batch_is_made_once(other, monkeypatch):
    made = []
    real = BlockDiagonalMask.from_seqlens
    monkeypatch.setattr(BlockDiagonalMask, "from_seqlens", lambda *a, **k: made.append(1) or real(*a, **k))
    packed = Packed.of(LENGTHS)
    for _ in range(3):
        attention(*tokens(11, 2, 16), packed=packed, backend=other[0])
    assert len(made) == (other[0] == "xformers")


MODELS = {
    "audiomae": ("audiomae_base", {"decoder": "hybrid", "global_blocks": 1}, 2 + 1),
    "mae_ast": ("mae_ast_patch_base", {}, 2 + 2),
    "ssast": ("ssast_patch_base", {}, 2),
}
ENCODER = {"width": 32, "heads": 2, "depth": 2, "frames": 64}
DECODER = {"decoder_width": 32, "decoder_heads": 2, "decoder_depth": 2}


def build(name, overrides, **more):
    sizes = ENCODER if name.startswith("ssast") else ENCODER | DECODER
    torch.manual_seed(0)
    return audiomae.create_model(name, **sizes | overrides | more).double()


@pytest.mark.parametrize("family", MODELS)
def test_a_model_on_another_backend(other, family):
    backend, stand_in = other
    name, overrides, attentions = MODELS[family]
    plain, model = build(name, overrides).eval(), build(name, overrides, attention=backend).eval()
    model.load_state_dict(plain.state_dict())
    x = torch.randn(2, 64, 128, dtype=torch.float64)
    mask = plain.draw_mask(2, 64)
    actual, expected = model(x, mask), plain(x, mask)
    assert stand_in.calls == [("dense", 0.0)] * attentions
    torch.testing.assert_close(actual.loss, expected.loss, rtol=1e-12, atol=0)
    actual.loss.backward()
    expected.loss.backward()
    for (key, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=0, atol=1e-11, msg=lambda m, key=key: f"{key}: {m}")


def test_dropout_reaches_the_backend_in_training_only(other):
    backend, stand_in = other
    layer = GlobalAttention(32, 2, dropout=0.25, backend=backend)
    layer(torch.randn(2, 5, 32))
    layer.eval()(torch.randn(2, 5, 32))
    assert stand_in.calls == [("dense", 0.25), ("dense", 0.0)]


@pytest.mark.parametrize("norm", ["pre", "post"])
@pytest.mark.parametrize("backend", ["sdpa", *OTHERS])
def test_a_block_takes_packed_tokens(backend, norm, monkeypatch):
    if backend in STAND_INS:
        STAND_INS[backend]().install(monkeypatch)
        monkeypatch.setattr(module, "why_not", lambda *asked: "")
    block = Block(GlobalAttention(32, 2, backend=backend), 32, 4.0, norm, 1e-6, nn.Identity()).double()
    x = torch.randn(sum(LENGTHS), 32, dtype=torch.float64)
    out = block(x, Packed.of(LENGTHS))
    alone = torch.cat([block(clip[None])[0] for clip in x.split(LENGTHS)])
    torch.testing.assert_close(out, alone, rtol=0, atol=1e-13)


@pytest.mark.parametrize("backend", OTHERS)
def test_the_stand_ins_have_the_real_signatures(backend):
    if backend == "flash_attn":
        real = pytest.importorskip("flash_attn", exc_type=ImportError)
        pairs = [
            (getattr(real, n), getattr(FlashAttn, n)) for n in ("flash_attn_func", "flash_attn_varlen_func")
        ]
    else:
        real = pytest.importorskip("xformers.ops", exc_type=ImportError)
        pairs = [
            (real.memory_efficient_attention, Xformers.memory_efficient_attention),
            (real.fmha.attn_bias.BlockDiagonalMask.from_seqlens, BlockDiagonalMask.from_seqlens),
        ]
    for function, ours in pairs:
        actual = inspect.signature(function).parameters
        for name, parameter in inspect.signature(ours).parameters.items():
            if name != "self":
                assert (actual[name].kind, actual[name].default) == (parameter.kind, parameter.default), name
    if backend == "xformers":
        mask = Packed.of(LENGTHS).block_diagonal
        blocks = [torch.zeros(n, n) for n in LENGTHS]
        outside = torch.block_diag(*(block + 1 for block in blocks)) == 0
        expected = torch.zeros(11, 11).masked_fill(outside, -torch.inf)
        assert torch.equal(mask.materialize((11, 11)), expected)


# -- our own kernel, and the choice ---------------------------------------------------------------------------


@needs_library
@pytest.mark.parametrize("lengths", [None, LENGTHS, (4, 7, 4)], ids=["dense", "packed", "another"])
@pytest.mark.parametrize("impl", [None, "native", "reference"])
def test_a_model_on_a_cpu_has_our_own_kernel_unless_it_asks_for_references(impl, lengths):
    name, overrides, _ = MODELS["mae_ast"]
    model = build(name, overrides, impl=impl, attention_dropout=0.0).float()
    x = torch.randn(*((2, 5) if lengths is None else (sum(lengths),)), 32, requires_grad=True)
    context = () if lengths is None else (Packed.of(lengths),)
    with Calls() as calls:
        model.encoder.blocks[0](x, *context).sum().backward()
    expected = {} if impl == "reference" else {"attention": {"native"}, "attention_backward": {"native"}}
    assert calls.served == expected


@needs_library
def test_what_is_best():
    cpu = torch.device("cpu")
    assert best_backend(cpu, torch.float32) == best_backend(cpu, torch.bfloat16) == "native"
    for device, dtype in ((cpu, torch.float16), (cpu, torch.float64), (GPU, torch.bfloat16)):
        assert best_backend(device, dtype) == "sdpa"
    meta = torch.empty(2, 5, 3, 2, 16, device="meta")
    assert attention_of_qkv(meta).shape == (2, 5, 32)


def test_without_the_library_it_is_sdpa(monkeypatch):
    monkeypatch.setitem(ak._library._table, "attention", dict(ak._library._table["attention"]))
    missing = "The native CPU library is not built: do so."
    ak._library.register("attention", "native", None, unavailable=missing)
    assert best_backend(torch.device("cpu"), torch.float32) == "sdpa"
    q = torch.randn(1, 4, 2, 16)
    assert torch.equal(attention(q, q, q), attention(q, q, q, backend="sdpa"))
    for refused in (
        lambda: attention(q, q, q, backend="native"),
        lambda: audiomae.create_model("audiomae_base", **ENCODER, attention="native"),
    ):
        with pytest.raises(RuntimeError) as error:
            refused()
        assert str(error.value) == (
            'attention="native" cannot run. The native CPU library is not built: do so, or choose attention="sdpa"'
        )


@needs_library
@pytest.mark.parametrize(
    "device, dtype, reason",
    [
        ("cpu", torch.float16, "It serves float32, bfloat16, not float16"),
        ("meta", torch.float32, "It serves tensors on cpu, not on meta"),
    ],
)
def test_what_our_own_kernel_does_not_serve(device, dtype, reason):
    q = torch.zeros(1, 4, 2, 16, dtype=dtype, device=device)
    with pytest.raises(
        RuntimeError, match=f'attention="native" cannot run. {reason}, or choose attention="sdpa"'
    ):
        attention(q, q, q, backend="native")


@needs_library
def test_dropout_in_a_model_follows_the_seed():
    name, overrides, _ = MODELS["mae_ast"]
    model = build(name, overrides).float().train()
    x, mask = torch.randn(2, 64, 128), model.draw_mask(2, 64)

    def loss(seed):
        torch.manual_seed(seed)
        return model(x, mask).loss

    with Calls() as calls:
        first = loss(1)
    assert calls.served["attention"] == {"native"}
    assert loss(1) == first and loss(2) != first


# -- refusals ------------------------------------------------------------------------------------------------


def stand_in_for(monkeypatch, backend, capability=(9, 0), hip=None):
    STAND_INS[backend]().install(monkeypatch)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(torch.version, "hip", hip)


def hide(monkeypatch, backend):
    for name in [name for name in sys.modules if name.split(".")[0] == backend]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Hidden(backend), *sys.meta_path])


class Hidden:
    """Makes a package look as if it were not installed, or as if its import failed with `error`."""

    def __init__(self, name, error=None):
        self.name, self.error = name, error

    def find_spec(self, name, path=None, target=None):
        if name == self.name:
            raise self.error or ModuleNotFoundError(f"No module named {name!r}", name=name)


INSTALL = {"flash_attn": "pip install flash-attn --no-build-isolation", "xformers": "pip install xformers"}


@pytest.mark.parametrize("backend", OTHERS)
def test_a_package_that_is_not_installed(backend, monkeypatch):
    hide(monkeypatch, backend)
    package = backend.replace("_", "-")
    expected = (
        f'attention="{backend}" cannot run. The package {package} is not installed: {INSTALL[backend]}, or '
        'choose attention="sdpa"'
    )
    q = torch.randn(1, 4, 2, 16)
    for refused in (
        lambda: require_backend(backend),
        lambda: audiomae.create_model("audiomae_base", **ENCODER, attention=backend),
        lambda: audiomae.create_classifier("ssast_patch_base", 3, **ENCODER, attention=backend),
        lambda: attention(q, q, q, backend=backend),
    ):
        with pytest.raises(RuntimeError) as error:
            refused()
        assert str(error.value) == expected


@pytest.mark.parametrize("backend", OTHERS)
@pytest.mark.parametrize(
    "error",
    [
        ImportError("flash_attn_2_cuda.so: undefined symbol: _ZN3c105ErrorC2E\nmore"),
        OSError("libcudart.so.12: cannot open shared object file"),
        ModuleNotFoundError("No module named 'einops'", name="einops"),
    ],
    ids=lambda e: type(e).__name__,
)
def test_a_package_that_does_not_import(backend, error, monkeypatch):
    hide(monkeypatch, backend)
    sys.meta_path[0].error = error
    reason = why_not(backend)
    assert reason == (
        f"{backend.replace('_', '-')} is installed but does not import with torch {torch.__version__} "
        f"({str(error).splitlines()[0]}): reinstall it, {INSTALL[backend]}"
    )


def test_a_package_without_the_functions(monkeypatch):
    monkeypatch.setitem(sys.modules, "flash_attn", types.ModuleType("flash_attn"))
    reason = why_not("flash_attn")
    assert "is installed but does not import" in reason and "flash_attn_func" in reason and "pip" in reason


@pytest.mark.parametrize("backend", OTHERS)
@pytest.mark.parametrize(
    "packed",
    [None, pytest.param(Packed.of(LENGTHS), id="packed")],
    ids=lambda p: "dense" if p is None else "",
)
def test_tokens_on_a_cpu(backend, packed, monkeypatch):
    stand_in_for(monkeypatch, backend)
    q, k, v = tokens(*((2, 5) if packed is None else (11,)), 2, 16)
    name = backend.replace("_", "-")
    with pytest.raises(
        RuntimeError, match=f"{name} runs on GPUs only, not on cpu: move model and input to a GPU"
    ):
        attention(q, k, v, packed=packed, backend=backend)
    model = audiomae.create_model("ssast_patch_base", **ENCODER, attention=backend)  # it may move to a GPU
    with pytest.raises(RuntimeError, match=f"{name} runs on GPUs only"):
        model(torch.randn(1, 64, 128))


F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64


@pytest.mark.parametrize(
    ("backend", "machine", "dtype", "head_dim", "reason"),
    [
        ("flash_attn", {}, F16, 64, ""),
        ("flash_attn", {}, BF16, 256, ""),
        (
            "flash_attn",
            {},
            F32,
            64,
            "flash-attn computes in float16 and bfloat16 here, not in float32: run under",
        ),
        (
            "flash_attn",
            {},
            F64,
            64,
            "flash-attn computes in float16 and bfloat16 here, not in float64: run under",
        ),
        ("flash_attn", {}, F16, 264, "flash-attn takes head dimensions up to 256, not 264"),
        ("flash_attn", {"capability": (8, 0)}, BF16, 64, ""),
        (
            "flash_attn",
            {"capability": (7, 5)},
            F16,
            64,
            "flash-attn needs compute capability 8.0 for float16, and this GPU has 7.5",
        ),
        (
            "flash_attn",
            {"capability": (7, 5)},
            None,
            None,
            "flash-attn needs compute capability 8.0, and this GPU has 7.5",
        ),
        ("flash_attn", {"capability": (7, 5), "hip": "7.0"}, F16, 64, ""),
        ("flash_attn", {"hip": "7.0"}, F32, 64, "flash-attn computes in float16 and bfloat16 here"),
        ("xformers", {}, F32, 64, ""),
        ("xformers", {"capability": (6, 0)}, F16, 64, ""),
        ("xformers", {"capability": (7, 5)}, None, None, ""),
        (
            "xformers",
            {"capability": (7, 5)},
            BF16,
            64,
            "xformers needs compute capability 8.0 for bfloat16, and this GPU has 7.5",
        ),
        (
            "xformers",
            {},
            F64,
            64,
            "xformers computes in float32 and float16 and bfloat16 here, not in float64",
        ),
        ("xformers", {}, BF16, 36, "xformers takes head dimensions multiples of 8 up to 256, not 36"),
        (
            "xformers",
            {"hip": "7.0"},
            F32,
            64,
            "xformers computes in float16 and bfloat16 here, not in float32",
        ),
        ("xformers", {"hip": "7.0"}, BF16, 64, ""),
        ("sdpa", {}, F64, 36, ""),
    ],
)
def test_what_a_gpu_serves(backend, machine, dtype, head_dim, reason, monkeypatch):
    if backend != "sdpa":
        stand_in_for(monkeypatch, backend, **machine)
    actual = why_not(backend, GPU, dtype, head_dim)
    assert actual.startswith(reason) if reason else actual == ""
    if reason and dtype is not None:
        with FakeTensorMode():
            q = torch.empty(1, 4, 2, head_dim, dtype=dtype, device=GPU)
            with pytest.raises(RuntimeError, match=f"cannot run. {reason}.*, or choose attention=.sdpa."):
                attention(q, q, q, backend=backend)


def test_an_unknown_backend():
    q = torch.randn(1, 4, 2, 16)
    for refused in (
        lambda: attention(q, q, q, backend="flash"),
        lambda: audiomae.create_model("audiomae_base", attention="flash"),
    ):
        with pytest.raises(
            ValueError,
            match=r"attention must be one of (None, )?'native', 'sdpa', 'flash_attn', 'xformers', got 'flash'",
        ):
            refused()


def test_the_backend_is_saved_and_can_be_changed(tmp_path, monkeypatch):
    STAND_INS["flash_attn"]().install(monkeypatch)
    name, overrides, _ = MODELS["mae_ast"]
    model = build(name, overrides, attention="flash_attn")
    assert model.config.attention == "flash_attn" and from_dict(model.config.to_dict()) == model.config
    assert model.state_dict().keys() == build(name, overrides).state_dict().keys()
    model.save_pretrained(tmp_path)
    hide(monkeypatch, "flash_attn")
    with pytest.raises(RuntimeError, match="flash-attn is not installed"):
        audiomae.load(tmp_path)
    assert audiomae.load(tmp_path, attention="sdpa").config.attention == "sdpa"
    old = json.loads((tmp_path / "config.json").read_text())
    del old["attention"]  # written before there was a choice
    (tmp_path / "config.json").write_text(json.dumps(old))
    assert audiomae.load(tmp_path).config.attention is None


def test_doctor_lists_the_backends(monkeypatch, capsys):
    hide(monkeypatch, "xformers")
    FlashAttn().install(monkeypatch)
    assert cli.main(["doctor"]) == 0
    section = capsys.readouterr().out.split("Attention on cpu\n")[1].splitlines()
    native = _native.why_not().removesuffix(".") or "available"
    assert section[0].split() == ["native", *native.split()]
    assert section[1].split() == ["sdpa", "available"]
    assert "flash-attn runs on GPUs only, not on cpu" in section[2]
    assert "The package xformers is not installed: pip install xformers" in section[3]
