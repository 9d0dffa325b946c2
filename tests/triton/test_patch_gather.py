"""patch_gather's Triton kernel, interpreted: copies are compared bit for bit."""

import audiomae_kernels as ak
import pytest
import torch
from interpreter import cases_and_dtypes, guarded_allocations, in_the_middle, needs_interpreter
from kernel_cases import patch_case

pytestmark = needs_interpreter

LARGE = (
    patch_case("patch_gather", "more values than a block", 40, 90, (16, 80), (4, 5), K=5),
    patch_case("patch_gather", "more tokens than a block", 64, 64, (4, 4), K=200, B=1),
)


@pytest.mark.parametrize("case, dtype", cases_and_dtypes(*LARGE, op="patch_gather"))
def test_copies_bits(case, dtype, monkeypatch):
    tensors = case.tensors(dtype)
    expected = case.call("reference")(**tensors)
    with guarded_allocations(monkeypatch):
        actual = case.call("triton")(**tensors)
    assert actual.dtype == dtype
    assert actual.is_contiguous()
    assert torch.equal(actual, expected)


def test_ids_out_of_range_give_zeros_and_read_nothing():
    spectrogram = in_the_middle(torch.randn(2, 8, 8))
    ids = torch.tensor([[-1, 3, 4, 2**40 + 1], [2**32, 0, -(2**40), 3]])
    actual = ak.patch_gather(spectrogram, ids, patch=(4, 4), impl="triton")
    inside = (ids >= 0) & (ids < 4)
    expected = ak.patch_gather(spectrogram, ids.where(inside, 0), patch=(4, 4), impl="reference")
    assert torch.equal(actual, expected * inside[..., None])


def test_strided_ids():
    spectrogram, ids = torch.randn(2, 8, 8), torch.tensor([[3, 9, 1, 9], [0, 9, 2, 9]])[:, ::2].expand(2, 2)
    options = {"patch": (4, 4)}
    expected = ak.patch_gather(spectrogram, ids, **options, impl="reference")
    assert torch.equal(ak.patch_gather(spectrogram, ids, **options, impl="triton"), expected)


def test_nan_is_copied_and_stays_in_its_patch():
    spectrogram, ids = torch.randn(1, 8, 8), torch.tensor([[0, 1, 2, 3]])
    spectrogram[0, 5, 5] = float("nan")
    actual = ak.patch_gather(spectrogram, ids, patch=(4, 4), impl="triton")
    assert actual.isnan().any(-1).tolist() == [[False, False, False, True]]
