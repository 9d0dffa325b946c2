"""unshuffle against assignments of one token at a time."""

import audiomae_kernels as ak
import pytest
import torch
from kernel_cases import cases


def by_tokens(tokens, ids_keep, mask_token, pos):
    out = torch.stack([mask_token] * pos.shape[0])[None].repeat(tokens.shape[0], 1, 1)
    for b in range(tokens.shape[0]):
        for k in range(tokens.shape[1]):
            out[b, ids_keep[b, k]] = tokens[b, k]
    return out + pos


@pytest.mark.parametrize("case", cases("unshuffle"))
def test_definition(case):
    tensors = case.tensors()
    assert torch.equal(case.call("reference")(**tensors), by_tokens(**tensors))


def test_undoes_a_shuffle():
    x = torch.randn(3, 10, 4)
    order = torch.stack([torch.randperm(10) for _ in range(3)])
    tokens = x.gather(1, order[..., None].expand_as(x))
    assert torch.equal(ak.unshuffle(tokens, order, torch.zeros(4), torch.zeros(10, 4)), x)


def test_half_precision_tokens_are_added_in_float32():
    """1 + 2^-8 lies half way between two bfloat16 and goes to the even one, 1; a little more goes up."""
    tokens = torch.ones(1, 1, 1, dtype=torch.bfloat16)
    pos = torch.full((1, 1), 2**-8 + 2**-20)
    ids = torch.zeros(1, 1, dtype=torch.int64)
    out = ak.unshuffle(tokens, ids, torch.zeros(1), pos)
    assert out.dtype == torch.bfloat16
    assert out.item() == 1 + 2**-7
    assert ak.unshuffle(tokens, ids, torch.zeros(1), pos.bfloat16()).item() == 1


def test_strided_tokens():
    tokens = torch.randn(4, 3, 2).permute(2, 1, 0)
    ids = torch.tensor([[4, 0, 2]]).expand(2, 3)
    pos, mask_token = torch.randn(4, 5).t(), torch.randn(1).expand(4)
    actual = ak.unshuffle(tokens, ids, mask_token, pos)
    assert actual.is_contiguous()
    assert torch.equal(actual, by_tokens(tokens, ids, mask_token, pos))


def test_only_wanted_gradients_are_computed():
    tensors = cases("unshuffle")[0].values[0].tensors(torch.float32)
    pos = tensors["pos"].requires_grad_()
    ak.unshuffle(**tensors).sum().backward()
    assert tensors["tokens"].grad is None and tensors["mask_token"].grad is None
    assert torch.equal(pos.grad, torch.full_like(pos, 2.0))


TOKENS, IDS = torch.zeros(2, 3, 4), torch.zeros(2, 3, dtype=torch.int64)
GOOD = {"tokens": TOKENS, "ids_keep": IDS, "mask_token": torch.zeros(4), "pos": torch.zeros(7, 4)}


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"tokens": TOKENS[0]}, ValueError, r"tokens must have shape \(B, K, D\)"),
        ({"ids_keep": IDS[:, :2]}, ValueError, r"ids_keep must have shape \(B, K\), here \(2, 3\)"),
        ({"mask_token": torch.zeros(1, 1, 4)}, ValueError, r"mask_token must have shape \(D,\), here \(4\)"),
        ({"pos": torch.zeros(7, 5)}, ValueError, r"pos must have shape \(L, D\), here \(any, 4\)"),
        ({"pos": torch.zeros(2, 4)}, ValueError, "3 kept tokens do not fit into the 2 positions"),
        ({"tokens": TOKENS.int()}, TypeError, "tokens must be float32"),
        ({"ids_keep": IDS.int()}, TypeError, "ids_keep must be int64"),
        ({"mask_token": torch.zeros(4).int()}, TypeError, "mask_token must be float32"),
        ({"pos": torch.zeros(7, 4).int()}, TypeError, "pos must be float32"),
        ({"ids_keep": IDS.to("meta")}, ValueError, "ids_keep must be on the device of tokens, cpu"),
        ({"mask_token": torch.zeros(4, device="meta")}, ValueError, "mask_token must be on the device"),
        ({"pos": torch.zeros(7, 4, device="meta")}, ValueError, "pos must be on the device"),
        ({"impl": "cuda"}, ValueError, "impl must be None, .* got 'cuda'"),
    ],
)
def test_errors(change, error, message):
    ak.unshuffle(**GOOD)
    with pytest.raises(error, match=message):
        ak.unshuffle(**GOOD | change)
