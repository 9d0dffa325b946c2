"""The encoder's attention backends on the device: dense and packed batches, forward and backward."""

from itertools import accumulate

import pytest
import torch
from budget import assert_within_budget

from audiomae.attention import BACKENDS, Packed, attention, why_not

LENGTHS = (102, 1, 37, 102)


def plain(q, k, v, lengths):
    """Clip by clip."""
    clips = []
    for end, length in zip(accumulate(lengths), lengths, strict=True):
        a, b, c = (x[end - length : end].transpose(0, 1) for x in (q, k, v))  # (H, L, d)
        clips.append(((a @ b.mT * a.shape[-1] ** -0.5).softmax(-1) @ c).transpose(0, 1))
    return torch.cat(clips)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("lengths", [LENGTHS, (102, 102, 102)], ids=["ragged", "even"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_packed(backend, lengths, dtype, device):
    if reason := why_not(backend, device, dtype, 64):
        pytest.skip(reason)
    packed = Packed.of(lengths, device)

    def draw(seed):
        torch.manual_seed(seed)
        shape = (sum(lengths), 3, 64)
        return {name: torch.randn(shape, device=device).to(dtype) for name in "qkv"}

    def op(q, k, v):
        return attention(torch.stack((q, k, v), 1), packed=packed, backend=backend).unflatten(-1, (3, 64))

    def reference(q, k, v, upcast):  # the inputs are float64 if it is set
        return plain(q, k, v, lengths)

    assert_within_budget(op, reference, draw, ("q", "k", "v"))


@pytest.mark.parametrize("backend", BACKENDS)
def test_packing_does_not_wait(backend, device, no_waiting):
    if reason := why_not(backend, device, torch.bfloat16, 64):
        pytest.skip(reason)
    qkv = torch.randn(sum(LENGTHS), 3, 3, 64, device=device, dtype=torch.bfloat16)
    attention(qkv, packed=Packed.of(LENGTHS, device), backend=backend)
    with no_waiting():
        packed = Packed.of(LENGTHS, device)
    if backend == "xformers":
        # Its mask copies the lengths from pageable memory, which waits: once for a batch, not in every layer.
        assert packed.block_diagonal is not None
    with no_waiting():
        attention(qkv, packed=packed, backend=backend)
