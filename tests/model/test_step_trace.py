"""What a training step does not do, read off a trace of its operations on fake tensors.

No roll, no copy of all tokens into windows or back, no embedding of patches that the encoder does not see, and no
M x M logits. The frozen baselines in bench/plain do each of these: the same checks find it there.
"""

from dataclasses import dataclass

import pytest
import torch
from audiomae_kernels import _native, _triton
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import audiomae
from audiomae.config import DECODERS
from bench.data import visible_tokens
from bench.providers import build_plain
from bench.registry import Case

pytestmark = pytest.mark.no_poison

BATCH = 3  # no product of it is the size of something else
CASES = {
    "window": "audiomae_base",
    "hybrid": "audiomae_base/hybrid",
    **({"cross": "audiomae_base/cross"} if "cross" in DECODERS else {}),
    "mae_ast_patch": "mae_ast_patch_base",
    "mae_ast_frame": "mae_ast_frame_base",
    "ssast_patch": "ssast_patch_base",
}
WASTE = {  # of the baselines
    "window": {"roll", "window copy", "full-token embedding"},
    "hybrid": {"roll", "full-token embedding"},
    "mae_ast_patch": {"M x M logits"},
    "mae_ast_frame": {"M x M logits"},
    "ssast_patch": {"full-token embedding", "M x M logits"},
}
COPIES = {"clone", "copy_", "copy", "_to_copy", "contiguous", "_unsafe_view"}
GATHERS = {"gather", "index", "index_select", "take_along_dim", "embedding"}
PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "linear", "_linear"}


@dataclass
class Sizes:
    """L tokens and M masked ones of a clip, V values of a patch, widths of encoder and decoder."""

    tokens: int
    masked: int
    values: int
    width: int
    window_width: int | None  # None where attention over all tokens may copy them, too

    @classmethod
    def of(cls, case: Case) -> "Sizes":
        c = case.config()
        window = c.decoder_width if getattr(c, "decoder", None) == "window" else None
        return cls(case.num_tokens, case.num_tokens - case.kept, c.patch_values, c.width, window)


class Waste(TorchDispatchMode):
    """Notes which of the wasteful operations run, by name."""

    def __init__(self, sizes: Sizes):
        super().__init__()
        self.sizes, self.found, self.calls = sizes, set(), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        given, made = (
            [x for x in tree_leaves(tree) if isinstance(x, torch.Tensor)] for tree in ((args, kwargs), result)
        )
        self.calls += 1
        self.found |= self._judge(func._opname, given, made)
        if func.namespace == "audiomae" and (kwargs or {}).get("impl") == "reference":
            self.found.add("reference op")  # what it does inside is not seen here
        return result

    def _judge(self, op, given, made):
        s, names = self.sizes, set()
        if op == "roll":
            names.add("roll")
        if s.window_width is not None:
            full = BATCH * s.tokens * s.window_width
            copied = op in COPIES and given and not given[-1].is_contiguous() and made[0].numel() >= full
            if copied or (op in GATHERS and made[0].numel() >= full):
                names.add("window copy")
        if op == "convolution" or (
            op in PRODUCTS
            and any(x.shape[-1] == s.values and x.numel() >= BATCH * s.tokens * s.values for x in given)
            and any(x.shape[-1] == s.width for x in made)
        ):
            names.add("full-token embedding")
        if any(x.ndim >= 2 and x.shape[-2:] == (s.masked, s.masked) for x in made):
            names.add("M x M logits")
        return names


def trace(case, model, spectrogram, *mask):
    with Waste(Sizes.of(case)) as waste:
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(spectrogram, *mask).loss
        loss.backward()
        torch.optim.AdamW(model.parameters(), fused=True).step()
    assert waste.calls > 500  # it was a whole step that was looked at
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    return waste.found


@pytest.fixture(autouse=True)
def fake(monkeypatch):
    # torch's own truncated normal looks at its values and draws again.
    monkeypatch.setattr(torch.nn.init, "trunc_normal_", torch.nn.init.normal_)
    with FakeTensorMode():
        yield


def at(name, provider):
    return Case(CASES[name], provider, "bf16", BATCH)


@pytest.mark.parametrize("impl", [None, "triton"])
@pytest.mark.parametrize("recompute", ["none", "activations", "blocks"])
@pytest.mark.parametrize("name", CASES)
def test_a_step_wastes_nothing(name, recompute, impl):
    if impl is None and not _native.available():
        pytest.skip(_native.why_not())
    if impl == "triton" and not _triton.available():
        pytest.skip(_triton.why_not() or "Triton imports as an interpreter")
    case = Case(CASES[name], "ours", "bf16", BATCH, overrides={"impl": impl, "recompute": recompute})
    with _triton.allow_cpu():
        model = audiomae.pretrained.build(case.config()).train()
        assert trace(case, model, torch.randn(BATCH, 1024, 128)) == set()


def test_the_references_are_found():
    case = Case(CASES["window"], "ours", "bf16", BATCH, overrides={"impl": "reference"})
    model = audiomae.pretrained.build(case.config()).train()
    assert "reference op" in trace(case, model, torch.randn(BATCH, 1024, 128))


@pytest.mark.parametrize("name", WASTE)
def test_the_baselines_waste_what_is_looked_for(name):
    case = at(name, "plain")
    ids = visible_tokens(BATCH, case.num_tokens, case.kept)
    assert trace(case, build_plain(case).train(), torch.randn(BATCH, 1024, 128), ids) == WASTE[name]


@pytest.mark.parametrize(
    ("waste", "operation"),
    [
        ("roll", lambda x: x.view(BATCH, 64, 8, 512).roll(-2, dims=1)),
        ("window copy", lambda x: x.view(BATCH, 16, 4, 2, 4, 512).transpose(2, 3).reshape(-1, 16, 512)),
        ("window copy", lambda x: x[:, torch.arange(512).view(16, 4, 2, 4).transpose(1, 2).flatten()]),
        ("full-token embedding", lambda x: x[:, :, :256].reshape(-1, 256) @ x.new_ones(256, 768)),
        ("M x M logits", lambda x: x[:, :410] @ x[:, :410].mT),
    ],
)
def test_each_check_finds_its_operation(waste, operation):
    with Waste(Sizes(tokens=512, masked=410, values=256, width=768, window_width=512)) as mode:
        operation(torch.randn(BATCH, 512, 512))
    assert mode.found >= {waste}
