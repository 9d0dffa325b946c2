"""Which implementation serves a call, what is said when one cannot, and the asserts of AUDIOMAE_CHECK."""

import importlib

import audiomae_kernels as ak
import pytest
import torch
from audiomae_kernels import _checks, _library, _native
from kernel_cases import CASES

FIRST = {op: next(case for case in CASES if case.op == op) for op in ak.OPS}


@pytest.fixture
def stand_in(monkeypatch):
    """Register an implementation of unshuffle for one test; it answers with a constant."""

    def add(name, **limits):
        def constant(tokens, ids_keep, mask_token, pos):
            return torch.full((tokens.shape[0], *pos.shape), 7.0, dtype=tokens.dtype)

        table = dict(_library._table["unshuffle"])
        monkeypatch.setitem(_library._table, "unshuffle", table)
        _library.register("unshuffle", name, constant, **limits)

    return add


def unshuffle(impl=None, dtype=torch.float32):
    return ak.unshuffle(**FIRST["unshuffle"].tensors(dtype), impl=impl).mean().item()


@pytest.mark.parametrize("op", ak.OPS)
def test_every_implementation_is_listed_and_one_is_chosen(op):
    for device in ("cpu", "cuda"):
        served = ak.implementations(op, device)
        assert [line.name for line in served] == list(ak.IMPLEMENTATIONS)
        assert sum(line.chosen for line in served) == 1
        assert all(line.available for line in served if line.chosen)
        assert all(line.available != bool(line.reason) for line in served)
    assert ak.implementations(op, "cpu", torch.float64)[-1].chosen, "fp64 is the reference's"


@pytest.mark.parametrize("op", ak.OPS)
@pytest.mark.parametrize("impl", ak.IMPLEMENTATIONS)
def test_an_implementation_asked_for_runs_or_says_why_not(op, impl):
    case = FIRST[op]
    (line,) = (line for line in ak.implementations(op) if line.name == impl)
    if line.available:
        assert case.call(impl)(**case.tensors(torch.float32)).isfinite().all()
    else:
        with pytest.raises(RuntimeError) as error:
            case.call(impl)(**case.tensors(torch.float32))
        assert str(error.value) == f"{op}: impl='{impl}' cannot run. {line.reason}"
        assert line.reason.endswith(".")


def test_what_does_not_exist_is_named_beside_what_does(monkeypatch):
    monkeypatch.setitem(
        _library._table, "unshuffle", {"reference": _library._table["unshuffle"]["reference"]}
    )
    with pytest.raises(
        RuntimeError, match=r"There is no triton implementation of unshuffle, only: reference\."
    ):
        unshuffle("triton")


def test_native_serves_patch_gather_on_the_cpu_if_it_is_there():
    native = ak.implementations("patch_gather")[0]
    assert native.name == "native"
    assert native.available == (_native.available() and "patch_gather" in _native.ops())
    assert native.available or native.reason
    assert native.chosen == native.available
    assert not ak.implementations("patch_gather", "cuda")[0].available


def test_unknown_op_is_refused():
    with pytest.raises(
        ValueError, match="There is no op 'convolution'; the ops are fbank, attention, window_attention"
    ):
        ak.implementations("convolution")


def test_best_implementation_is_taken_and_fp64_is_left_to_the_reference(stand_in):
    stand_in("native", device_types=("cpu",))
    assert unshuffle() == unshuffle("native") == 7
    assert unshuffle("reference") != 7
    assert unshuffle(dtype=torch.float64) != 7
    assert unshuffle("native", torch.float64) == 7


def test_limits_on_device_and_dtype(stand_in):
    stand_in("native", device_types=("cuda",))
    assert unshuffle() != 7
    with pytest.raises(RuntimeError, match=r"cannot run\. It serves tensors on cuda, not on cpu\."):
        unshuffle("native")
    stand_in("native", dtypes=(torch.float16, torch.bfloat16))
    assert unshuffle() != 7
    assert unshuffle(dtype=torch.bfloat16) == 7
    with pytest.raises(RuntimeError, match=r"cannot run\. It serves float16, bfloat16, not float32\."):
        unshuffle("native")
    stand_in("native", unavailable="There is no compiler.")
    assert unshuffle() != 7
    with pytest.raises(RuntimeError, match=r"impl='native' cannot run\. There is no compiler\."):
        unshuffle("native")


def test_limits_on_the_call(stand_in):
    """A width that the kernel has no code for: impl=None passes it by, impl="native" says so."""
    stand_in(
        "native", refuses=lambda tokens, *_: "It serves widths up to 16." if tokens.shape[2] > 16 else ""
    )
    assert FIRST["unshuffle"].tensors()["tokens"].shape[2] > 16
    assert unshuffle() != 7
    with pytest.raises(RuntimeError, match=r"It serves widths up to 16\."):
        unshuffle("native")


@pytest.mark.parametrize("value, expected", [("1", True), ("0", False), ("", False)])
def test_asserts_are_switched_by_the_environment(monkeypatch, value, expected):
    monkeypatch.setenv("AUDIOMAE_CHECK", value)
    importlib.reload(_checks)
    switched = _checks.ASSERTS
    monkeypatch.undo()
    importlib.reload(_checks)
    assert switched is expected


@pytest.mark.parametrize(
    "op, name", [("patch_gather", "ids"), ("masked_mse", "ids_masked"), ("unshuffle", "ids_keep")]
)
@pytest.mark.parametrize("bad", [-1, 10**6])
def test_asserts_find_ids_out_of_range(monkeypatch, op, name, bad):
    monkeypatch.setattr(_checks, "ASSERTS", True)
    case = FIRST[op]
    tensors = case.tensors(torch.float32)
    case.call()(**tensors)
    tensors[name][-1, -1] = bad
    with pytest.raises(RuntimeError, match=f"{op}: {name} holds ids outside the grid's tokens"):
        case.call()(**tensors)


@pytest.mark.parametrize("op", ["masked_mse", "info_nce"])
def test_asserts_find_nan_losses(monkeypatch, op):
    monkeypatch.setattr(_checks, "ASSERTS", True)
    case = FIRST[op]
    tensors = case.tensors(torch.float32)
    case.call()(**tensors)
    tensors["pred"][0, 0, 0] = float("nan")
    with pytest.raises(RuntimeError, match=f"{op}: the loss is NaN"):
        case.call()(**tensors)


@pytest.mark.no_poison
def test_asserts_can_be_compiled(monkeypatch):
    monkeypatch.setattr(_checks, "ASSERTS", True)
    torch._dynamo.reset()
    tensors = FIRST["unshuffle"].tensors(torch.float32)
    compiled = torch.compile(ak.unshuffle, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(**tensors), ak.unshuffle(**tensors))


def test_meta_tensors_give_shapes():
    for op, case in FIRST.items():
        tensors = case.tensors(torch.bfloat16)
        meta = {name: None if t is None else t.to("meta") for name, t in tensors.items()}
        actual, expected = case.call()(**meta), case.call()(**tensors)
        assert (actual.shape, actual.dtype, actual.device.type) == (expected.shape, expected.dtype, "meta"), (
            op
        )
