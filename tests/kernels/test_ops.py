"""What holds for every op: gradients, registration, tracing, precision, determinism."""

from functools import partial

import pytest
import torch
from budget import assert_within_budget, evaluate
from kernel_cases import CASES, GRADIENTS, cases, patch_case, unshuffle_case
from torch.library import opcheck

SMALL = 1200  # values in the inputs of a case that gradcheck can afford


def small(param):
    tensors = param.values[0].tensors()
    return sum(tensor.numel() for tensor in tensors.values() if tensor is not None) < SMALL


@pytest.mark.parametrize("case", [c for c in cases() if small(c) and GRADIENTS[c.values[0].op]])
def test_gradcheck(case):
    tensors, wrt = case.tensors(), case.wrt()

    def function(*leaves):
        return case.call("reference")(**tensors | dict(zip(wrt, leaves, strict=True)))

    assert torch.autograd.gradcheck(function, [tensors[name].requires_grad_() for name in wrt])


@pytest.mark.parametrize("case", cases())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_error_budget(case, dtype):
    assert_within_budget(case.call("reference"), case.reference(), partial(case.tensors, dtype), case.wrt())


@pytest.mark.parametrize("case", cases())
def test_gradients_have_the_dtype_and_shape_of_their_inputs(case):
    tensors = case.tensors(torch.bfloat16)
    results = evaluate(case.call(), tensors, case.wrt())
    for name in case.wrt():
        assert results[f"grad of {name}"].dtype == tensors[name].dtype
        assert results[f"grad of {name}"].shape == tensors[name].shape


@pytest.mark.no_poison
@pytest.mark.parametrize("case", cases()[::2])
def test_opcheck(case):
    op = getattr(torch.ops.audiomae, case.op).default
    tensors = case.tensors(torch.float32)
    inputs = tuple(
        x.requires_grad_() if x is not None and x.is_floating_point() else x for x in tensors.values()
    )
    opcheck(op, inputs, case.op_options())


@pytest.mark.parametrize("case", [c for c in cases()[::2] if GRADIENTS[c.values[0].op]])
@pytest.mark.parametrize("wanted", [True, False])
def test_opcheck_of_the_backward_op(case, wanted):
    op = getattr(torch.ops.audiomae, f"{case.op}_backward").default
    inputs, options = tuple(case.tensors(torch.float32).values()), case.op_options()
    result = getattr(torch.ops.audiomae, case.op)(*inputs, **options)
    if case.op == "info_nce":
        loss, lse = result
        inputs = (torch.randn_like(loss), *inputs, lse)
        options |= {"output_mask": (True, wanted)}
    elif case.op == "masked_mse":
        inputs = (torch.randn_like(result), *inputs)
    elif case.op == "attention":
        out, lse = result
        inputs = (torch.randn_like(out), inputs[0], out, lse, *inputs[1:])
    else:
        grad = torch.randn_like(result)
        inputs = (grad, *(inputs if case.op == "window_attention" else inputs[1:]))
        options |= {"output_mask": (True, wanted and inputs[2] is not None, wanted and inputs[3] is not None)}
    opcheck(op, inputs, options, test_utils=("test_schema", "test_faketensor"))


def everything(qkv, tau, bias, spectrogram, ids, pred, target, tokens, ids_keep, mask_token, pos):
    import audiomae_kernels as ak

    patches = ak.patch_gather(spectrogram, ids, patch=(3, 2))
    return (
        ak.window_attention(qkv, tau, bias, grid=(6, 4), window=(4, 4), shift=(2, 0)).sum()
        + ak.attention(qkv.unflatten(-1, (3, 2, 8))).square().sum()
        + ak.masked_mse(pred, spectrogram, ids, patch=(3, 2))
        + ak.info_nce(pred, target, over="prediction")
        + ak.info_nce(pred, patches)
        + ak.unshuffle(tokens, ids_keep, mask_token, pos).square().sum()
    )


def everything_inputs(B=2):
    qkv = torch.randn(B, 24, 3 * 2 * 8)
    pred, target = torch.randn(B, 5, 6), torch.randn(B, 5, 6)
    ids = torch.randint(0, 12, (B, 5))
    ids_keep = torch.stack([torch.randperm(7)[:3] for _ in range(B)])
    tensors = (qkv, torch.rand(2) + 0.1, torch.randn(2, 16, 16), torch.randn(B, 9, 8), ids, pred, target)
    tensors += (torch.randn(B, 3, 4), ids_keep, torch.randn(4), torch.randn(7, 4))
    return [t.requires_grad_() if t.is_floating_point() else t for t in tensors]


@pytest.mark.no_poison
@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(dynamic):
    torch._dynamo.reset()
    compiled = torch.compile(everything, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for B in (2, 3) if dynamic else (2,):
        inputs = everything_inputs(B)
        differentiable = [t for i, t in enumerate(inputs) if t.is_floating_point() and i != 3]
        expected, actual = everything(*inputs), compiled(*inputs)
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)
        for a, e in zip(
            torch.autograd.grad(actual, differentiable),
            torch.autograd.grad(expected, differentiable),
            strict=True,
        ):
            # Sums of several gradients of one tensor may be taken in another order.
            torch.testing.assert_close(a, e, rtol=1e-6, atol=1e-6)


@pytest.mark.no_poison
def test_export_holds_plain_aten_ops():
    class Everything(torch.nn.Module):
        def forward(self, *tensors):
            return everything(*tensors)

    inputs = tuple(t.detach() for t in everything_inputs())
    program = torch.export.export(Everything(), inputs)
    assert not [node for node in program.graph.nodes if "audiomae" in str(node.target)]
    torch.testing.assert_close(program.module()(*inputs), everything(*inputs))


@pytest.mark.parametrize("case", cases())
def test_repeats_bit_for_bit(case):
    tensors, wrt = case.tensors(torch.float32), case.wrt()
    first, second = evaluate(case.call(), tensors, wrt), evaluate(case.call(), tensors, wrt)
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def test_losses_and_sums_do_not_depend_on_the_number_of_threads():
    """Large enough for PyTorch to split the work (its grain is 32768 values); one loss may agree by luck."""
    mse = patch_case("masked_mse", "large", 160, 128, (16, 16), B=4, K=40)
    for case, seed in ((unshuffle_case("large", 8, 20, 100, 64), 0), *((mse, seed) for seed in range(8))):
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(evaluate(case.call("reference"), case.tensors(torch.float32, seed), case.wrt()))
        for other in results[1:]:
            for name, value in results[0].items():
                assert torch.equal(value, other[name]), (case.op, name)


@pytest.mark.parametrize("op", ["window_attention", "info_nce"])
def test_autocast_does_not_reach_inside(op):
    case = next(case for case in CASES if case.op == op)
    tensors, wrt = case.tensors(torch.float32), case.wrt()
    expected = evaluate(case.call("reference"), tensors, wrt)
    with torch.autocast("cpu", torch.bfloat16):
        actual = evaluate(case.call("reference"), tensors, wrt)
    for name, value in expected.items():
        assert torch.equal(actual[name], value), name


@pytest.mark.parametrize("op", ["attention", "window_attention", "unshuffle", "masked_mse", "info_nce"])
def test_second_derivatives_are_refused(op):
    case = next(case for case in CASES if case.op == op)
    tensors = case.tensors()
    leaf = tensors[case.wrt()[0]].requires_grad_()
    (grad,) = torch.autograd.grad(case.call()(**tensors).sum(), leaf, create_graph=True)
    if op == "unshuffle":  # linear: its gradient does not depend on the tokens
        assert not grad.requires_grad
        return
    with pytest.raises(NotImplementedError, match=f"{op} has no second derivatives"):
        grad.sum().backward()
