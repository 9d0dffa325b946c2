"""Where ops run besides the plain case: another device, a side stream, a captured graph, full memory."""

import audiomae_kernels as ak
import pytest
import torch
from budget import assert_within_budget, evaluate
from gpu.cases import DTYPES, ONE_EACH, inputs, named
from training import Calls

from bench import timing

each_op = pytest.mark.parametrize("case", **named(ONE_EACH))


def assert_same_bits(actual, expected):
    for name, value in expected.items():
        assert torch.equal(actual[name], value), name


@pytest.fixture
def second_device(device, on_gpu):
    if not on_gpu:
        return device
    if torch.cuda.device_count() < 2:
        pytest.skip("this machine has one GPU")
    return torch.device("cuda", 1)


@each_op
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_second_device(case, dtype, second_device, on_gpu, impl):
    """Tensors on one device while another is the current one."""
    current = torch.cuda.current_device() if on_gpu else None
    assert_within_budget(
        case.call(impl), case.reference(), lambda seed: inputs(case, dtype, second_device, seed), case.wrt()
    )
    results = evaluate(case.call(impl), inputs(case, dtype, second_device), case.wrt())
    assert {value.device for value in results.values()} == {second_device}
    if on_gpu:
        assert torch.cuda.current_device() == current != second_device.index


@each_op
def test_tensors_on_two_devices_are_refused(case, on_gpu, device):
    tensors = inputs(case, torch.float32, device)
    last = [name for name, x in tensors.items() if x is not None][-1]
    elsewhere = "cpu" if on_gpu else "meta"
    with pytest.raises(ValueError, match=f"must be on the device of .*, but it is on {elsewhere}"):
        case.call()(**tensors | {last: tensors[last].to(elsewhere)})


@each_op
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_side_stream(case, dtype, device, on_gpu, impl, side_stream, wait):
    """The kernels run in the current stream: there alone the inputs are ready, after a while."""
    source = inputs(case, dtype, device)
    expected = evaluate(case.call(impl), source, case.wrt())
    late = {name: x if x is None else torch.zeros_like(x) for name, x in source.items()}
    wait()
    with side_stream() as stream:
        if on_gpu:
            torch.cuda._sleep(50_000_000)  # cycles: tens of milliseconds
        for name, x in source.items():
            if x is not None:
                late[name].copy_(x)
        actual = evaluate(case.call(impl), late, case.wrt())
    if on_gpu:
        stream.synchronize()
    assert_same_bits(actual, expected)


@each_op
def test_inputs_freed_while_a_side_stream_reads_them(case, device, on_gpu, impl, side_stream, wait):
    """`record_stream` keeps the memory of tensors that another stream still reads."""
    source = inputs(case, torch.float32, device)
    expected = evaluate(case.call(impl), source)
    wait()
    borrowed = {name: x if x is None else x.clone() for name, x in source.items()}
    with side_stream() as stream:
        if on_gpu:
            torch.cuda._sleep(50_000_000)
        actual = evaluate(case.call(impl), borrowed)
    sizes = [x.shape for x in borrowed.values() if x is not None]
    for x in borrowed.values():
        if on_gpu and x is not None:
            x.record_stream(stream)
    del x, borrowed
    overwritten = [torch.full(size, 1e4, device=device) for size in sizes for _ in range(4)]
    wait()
    assert len(overwritten) == 4 * len(sizes)
    assert_same_bits(actual, expected)


@each_op
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_graph(case, dtype, device, impl, captured, wait):
    """Forward and backward captured once, replayed on other values."""
    static = inputs(case, dtype, device)
    output = case.call(impl)(**static)
    cotangent = torch.randn_like(output)
    names = list(evaluate(case.call(impl), static, case.wrt(), cotangent))

    def step():
        return tuple(evaluate(case.call(impl), static, case.wrt(), cotangent).values())

    results, replay = captured(step)
    for seed in (1, 2):
        fresh = inputs(case, dtype, device, seed)
        expected = evaluate(case.call(impl), fresh, case.wrt(), cotangent)
        for name, x in fresh.items():
            if x is not None:
                static[name].copy_(x)
        replay()
        wait()
        assert_same_bits(dict(zip(names, results, strict=True)), expected)


@each_op
def test_nobody_waits(case, device, impl, no_waiting):
    tensors = inputs(case, torch.bfloat16, device)
    evaluate(case.call(impl), tensors, case.wrt())
    with no_waiting():
        evaluate(case.call(impl), tensors, case.wrt())


def test_waiting_is_noticed(gpu, no_waiting):
    with no_waiting(), pytest.raises(RuntimeError, match="synchroniz"):
        torch.zeros(1, device=gpu).item()


@each_op
def test_pinned_inputs(case, device, on_gpu, impl):
    """Batches as a loader hands them over: pinned, copied without waiting."""
    expected = evaluate(case.call(impl), inputs(case, torch.float32, device), case.wrt())
    host = inputs(case, torch.float32, torch.device("cpu"))
    if on_gpu:
        host = {name: x if x is None else x.pin_memory() for name, x in host.items()}
    tensors = {name: x if x is None else x.to(device, non_blocking=True) for name, x in host.items()}
    assert_same_bits(evaluate(case.call(impl), tensors, case.wrt()), expected)


@each_op
def test_default_implementation(case, device, impl):
    with Calls() as calls:
        case.call()(**inputs(case, torch.bfloat16, device))
    chosen = [line.name for line in ak.implementations(case.op, device, torch.bfloat16) if line.chosen]
    assert calls.served == {case.op: set(chosen)}


def test_out_of_memory(gpu):
    """A call that does not fit raises PyTorch's error, and the next one works."""
    tokens, ids = torch.randn(2, 4, 512, device=gpu), torch.arange(4, device=gpu).expand(2, 4)
    mask_token, pos = torch.randn(512, device=gpu), torch.randn(65536, 512, device=gpu)
    expected = ak.unshuffle(tokens, ids, mask_token, pos, impl="triton").sum()
    torch.cuda.empty_cache()
    allowed = torch.cuda.memory_reserved(gpu) + (512 << 20)  # the large call wants 2 GiB
    torch.cuda.set_per_process_memory_fraction(allowed / torch.cuda.mem_get_info(gpu)[1], gpu)
    try:
        many = (tokens.repeat(8, 1, 1), ids.repeat(8, 1), mask_token, pos)
        with pytest.raises(torch.OutOfMemoryError):
            ak.unshuffle(*many, impl="triton")
        again = ak.unshuffle(tokens, ids, mask_token, pos, impl="triton").sum()
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, gpu)
    assert torch.equal(again, expected)


def test_benchmark_survives_a_row_that_does_not_fit(device, on_gpu, impl):
    case = ONE_EACH[0]
    tensors = inputs(case, torch.bfloat16, device)
    variants = {
        "too large": lambda: torch.empty(1 << 50, dtype=torch.uint8, device=device),
        "fits": lambda: case.call(impl)(**tensors),
    }
    measure = timing.measure_cuda if on_gpu else timing.measure_cpu
    samples = list(timing.interleave(variants, 2, measure))
    (failed,) = (sample.error for sample in samples if sample.variant == "too large")
    assert failed == "out of memory" or not on_gpu
    assert [sample.seconds > 0 for sample in samples if sample.variant == "fits"] == [True, True]
