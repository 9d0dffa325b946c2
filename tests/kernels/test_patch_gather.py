"""patch_gather against slices of the spectrogram, bit for bit."""

import audiomae_kernels as ak
import pytest
import torch
from kernel_cases import by_slices, cases


@pytest.mark.parametrize("case", cases("patch_gather"))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_definition(case, dtype):
    tensors = case.tensors(dtype)
    actual = case.call("reference")(**tensors)
    assert actual.dtype == dtype and actual.is_contiguous()
    assert torch.equal(actual, by_slices(**tensors, **case.options))
    for upcast in (True, False):
        assert torch.equal(case.reference()(**tensors, upcast=upcast), actual)


def test_all_ids_in_order_are_the_unfolded_spectrogram():
    spectrogram = torch.randn(2, 32, 24)
    ids = torch.arange(4 * 6).expand(2, -1)
    expected = torch.nn.functional.unfold(spectrogram[:, None], (8, 4), stride=(8, 4)).mT
    assert torch.equal(ak.patch_gather(spectrogram, ids, patch=(8, 4)), expected)


def test_ids_may_repeat_and_be_strided():
    spectrogram = torch.randn(1, 6, 4)
    ids = torch.tensor([[3, 3], [0, 3]]).t()
    actual = ak.patch_gather(spectrogram, ids, patch=(3, 2))
    assert torch.equal(actual, by_slices(spectrogram, ids, (3, 2)))


def test_a_spectrogram_that_requires_grad_gets_none():
    spectrogram = torch.randn(1, 6, 4, requires_grad=True)
    for out in (
        ak.patch_gather(spectrogram, torch.tensor([[0]]), patch=(3, 2)),
        ak.masked_mse(torch.randn(1, 1, 6), spectrogram, torch.tensor([[0]]), patch=(3, 2)),
    ):
        assert not out.requires_grad


S, IDS = torch.zeros(2, 9, 8), torch.zeros(4, 3, dtype=torch.int64)
GOOD = {"spectrogram": S, "ids": IDS, "patch": (3, 2)}


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"spectrogram": S[None]}, ValueError, r"spectrogram must have shape \(B, T, F\).*\(1, 2, 9, 8\)"),
        ({"spectrogram": S.int()}, TypeError, "spectrogram must be float32"),
        ({"ids": IDS[0]}, ValueError, "ids must have shape"),
        ({"ids": IDS.int()}, TypeError, "ids must be int64 token ids, but it is torch.int32"),
        ({"ids": IDS[:3]}, ValueError, "3 rows for 2 spectrograms"),
        ({"spectrogram": S[:0]}, ValueError, "4 rows for 0 spectrograms"),
        ({"ids": IDS.to("meta")}, ValueError, "ids must be on the device of spectrogram, cpu"),
        ({"patch": (10, 2)}, ValueError, r"a patch of 10 x 2 .* does not fit into a spectrogram of 9 x 8"),
        ({"patch": 3}, ValueError, r"patch must be a pair \(time, frequency\), got 3"),
        ({"stride": (1, 0)}, ValueError, "stride must be a pair of integers of at least 1"),
        ({"impl": "cuda"}, ValueError, "impl must be None, .* got 'cuda'"),
    ],
)
def test_errors(change, error, message):
    ak.patch_gather(**GOOD)
    with pytest.raises(error, match=message):
        ak.patch_gather(**GOOD | change)
