"""Models and training steps with the Triton kernels traced on fake tensors: no GPU, no memory, no launches.

Fake CUDA tensors carry the forward pass alone, since PyTorch's autograd wants a driver; the whole step is
traced on fake CPU tensors.
"""

import pytest
import torch
from audiomae_kernels import _triton
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from training import STEP_OPS, Calls, tiny

import audiomae

pytestmark = [
    pytest.mark.no_poison,
    pytest.mark.skipif(not _triton.available(), reason=_triton.why_not() or "imports"),
]

FULL_SIZE = {
    "window": ("audiomae_base", {}),
    "hybrid": ("audiomae_base", {"decoder": "hybrid"}),
    "global": ("audiomae_base", {"decoder": "global"}),
    "overlapping": ("audiomae_base", {"stride": (10, 10)}),
    "mae_ast_patch": ("mae_ast_patch_base", {}),
    "mae_ast_frame": ("mae_ast_frame_base", {}),
    "ssast_patch": ("ssast_patch_base", {}),
    "ssast_frame": ("ssast_frame_base", {}),
    "ssast_two_passes": ("ssast_patch_base", {"passes": 2}),
}
FORWARDS = [
    *((case, None, torch.bfloat16) for case in FULL_SIZE),
    *((case, "triton", torch.float32) for case in ("window", "mae_ast_patch", "ssast_patch")),
]


def convert(model, dtype):
    """``model.to(dtype)``, which exchanges tensors in a way that fake ones refuse."""
    for module in model.modules():
        for name, p in module.named_parameters(recurse=False):
            setattr(module, name, torch.nn.Parameter(p.to(dtype)))
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_floating_point():
                setattr(module, name, buffer.to(dtype))


@pytest.fixture(autouse=True)
def machine_without_gpu(monkeypatch):
    """Wherever the test runs; and none is touched."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    # torch's own truncated normal looks at its values and draws again.
    monkeypatch.setattr(torch.nn.init, "trunc_normal_", torch.nn.init.normal_)
    before = torch.cuda.is_initialized()
    yield
    assert torch.cuda.is_initialized() == before


@pytest.mark.parametrize("case, impl, dtype", FORWARDS, ids=str)
def test_forward_on_a_fake_gpu(case, impl, dtype):
    """Triton is what a GPU gets, and nothing is computed on the CPU meanwhile."""
    name, overrides = FULL_SIZE[case]
    with FakeTensorMode():
        with torch.device("cuda"):
            model = audiomae.create_model(name, impl=impl, **overrides).train()
        convert(model, dtype)
        spectrogram = torch.empty(4, model.config.frames, 128, device="cuda")
        with torch.no_grad(), Calls() as calls:
            out = model(spectrogram)
    ops = {op for op in STEP_OPS[name.replace("frame", "patch")] if not op.endswith("_backward")}
    if case == "global":
        ops.remove("window_attention")
    assert calls.served == {op: {"triton"} for op in ops}
    assert calls.devices == {"cuda"}
    c, (rows, masked) = model.config, out.mask.ids_masked.shape
    assert (rows, masked) == (4, out.mask.num_tokens - out.mask.ids_keep.shape[1])
    assert out.pred.shape == (rows, masked, c.patch_values) and out.pred.dtype == dtype
    assert all(loss.dtype == torch.float32 and loss.shape == () for loss in (out.loss, *out.losses.values()))


@pytest.mark.parametrize(
    "create, autocast",
    [
        pytest.param(tiny, False, id="tiny, float32"),
        pytest.param(audiomae.create_model, True, id="full size, bfloat16 autocast"),
    ],
)
@pytest.mark.parametrize("name", STEP_OPS)
def test_step_on_fake_tensors(name, create, autocast):
    """Forward, backward and fused AdamW: shapes and dtypes, and nothing that waits for a value."""
    with FakeTensorMode(), _triton.allow_cpu():
        model = create(name, impl="triton")
        optimizer = torch.optim.AdamW(model.train().parameters(), fused=True)
        with Calls() as calls:
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                out = model(torch.randn(2, model.config.frames, model.config.mel_bins))
            out.loss.backward()
            optimizer.step()
    assert calls.served == {op: {"triton"} for op in STEP_OPS[name]}
    assert out.loss.shape == () and out.loss.dtype == torch.float32
    assert out.pred.dtype == (torch.bfloat16 if autocast else torch.float32)
    for parameter_name, p in model.named_parameters():
        assert (p.grad.shape, p.grad.dtype) == (p.shape, p.dtype), parameter_name
        assert optimizer.state[p]["exp_avg"].shape == p.shape


@pytest.mark.parametrize("look", [torch.Tensor.item, float, bool])
def test_fake_tensors_refuse_a_look_at_their_values(look):
    """What the other tests rely on."""
    with FakeTensorMode(), pytest.raises(DataDependentOutputException):
        look(torch.ones(()))
