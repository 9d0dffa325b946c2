"""What holds for every op with impl="triton": registration, and graphs that torch.compile captures whole."""

import pytest
import torch
from audiomae_kernels import OPS, _library, _partials
from budget import evaluate
from functorch.compile import make_boxed_func
from interpreter import needs_interpreter
from kernel_cases import (
    CASES,
    GRADIENTS,
    info_nce_case,
    patch_case,
    unshuffle_case,
    window_attention_case,
)
from torch._dynamo.backends.common import aot_autograd
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode

pytestmark = [needs_interpreter, pytest.mark.no_poison]

ODD = ("window clipped to the grid", "overlapping", "three masks a clip", "transposed", "odd")
SOME = [
    pytest.param(case, id=f"{case.op}: {case.name}")
    for case in CASES
    if case.op != "attention" and case.name in (*ODD, "over target, odd", "over prediction, odd")
]


class Recorder(TorchDispatchMode):
    """Keeps the calls of the package's ops: (op, arguments, keywords)."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "audiomae":
            self.calls.append((func, args, kwargs))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("case", SOME)
def test_opcheck(case):
    with Recorder() as recorder:
        evaluate(case.call("triton"), case.tensors(torch.float32), case.wrt())
    assert [op._opname for op, _, _ in recorder.calls] == calls_of(case.op)
    for op, args, options in recorder.calls:
        assert options["impl"] == "triton"
        checks = {}
        if op._opname == case.op:
            args = [x.detach().requires_grad_(x.is_floating_point()) if x is not None else x for x in args]
        else:  # no second derivatives
            checks = {"test_utils": ("test_schema", "test_faketensor")}
        opcheck(op, tuple(args), options, **checks)


@pytest.mark.parametrize("op", [op for op in OPS if "triton" in _library._table[op]])
def test_compile(op):
    """One graph, without a break, that holds the op, and the same bits, forward and backward."""
    torch.compiler.reset()
    case = next(param.values[0] for param in SOME if param.values[0].op == op)
    call, called = case.call("triton"), []

    def function(**tensors):
        return call(**tensors)

    def compiler(graph, inputs):
        called.extend(
            (node.target._opname, node.kwargs["impl"]) for node in graph.graph.nodes if "impl" in node.kwargs
        )
        return make_boxed_func(graph.forward)

    compiled = torch.compile(function, fullgraph=True, backend=aot_autograd(fw_compiler=compiler))
    tensors = case.tensors(torch.float32)
    actual = evaluate(compiled, tensors, case.wrt())
    expected = evaluate(call, tensors, case.wrt())
    assert called == [(name, "triton") for name in calls_of(op)]
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(actual[name], value), name


FOR_B_CLIPS = {
    "window_attention": lambda B: window_attention_case("", (4, 4), (2, 2), B=B, H=1),
    "unshuffle": lambda B: unshuffle_case("", B, 2, 5, 4),
    "masked_mse": lambda B: patch_case("masked_mse", "", 8, 8, (4, 4), K=3, B=B),
    "info_nce": lambda B: info_nce_case("", B, 3, 4),
}


@pytest.mark.parametrize("op", FOR_B_CLIPS)
def test_partial_sums_do_not_grow_with_the_batch(op, monkeypatch):
    """One clip is fewer than the programs that step through the clips, 40 are more."""
    shapes = {1: [], 40: []}
    second_stage = _partials.sum_partials_kernel

    class Recorder:
        def __getitem__(self, grid):
            def launch(partials, *args, **options):
                assert partials.isfinite().all()
                shapes[B].append(partials.shape)
                return second_stage[grid](partials, *args, **options)

            return launch

    monkeypatch.setattr(_partials, "sum_partials_kernel", Recorder())
    for B in shapes:
        case = FOR_B_CLIPS[op](B)
        evaluate(case.call("triton"), case.tensors(torch.float32), case.wrt())
    assert shapes[1] == shapes[40] and shapes[1]


def calls_of(op):
    """Names of the op and, if it has gradients, of its backward op."""
    return [op, f"{op}_backward"] if GRADIENTS[op] else [op]
