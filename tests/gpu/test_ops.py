"""Every op on the device: error budgets, layouts, gradients of the same bits, more than 2^31 values."""

import audiomae_kernels as ak
import pytest
import torch
from budget import assert_within_budget, evaluate
from gpu.cases import DTYPES, LAYOUTS, ONE_EACH, PUBLISHED, SHARED, inputs, laid_out, named
from kernel_cases import PARAMETERS, window_attention_case

pytestmark = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def judge(case, impl, draw):
    if case.op == "patch_gather":  # a gather has no error
        tensors = draw(0)
        assert torch.equal(case.call(impl)(**tensors), case.call("reference")(**tensors))
    else:
        assert_within_budget(case.call(impl), case.reference(), draw, case.wrt())


@pytest.mark.parametrize("case", **named(SHARED + PUBLISHED))
def test_error_budget(case, dtype, device, impl):
    judge(case, impl, lambda seed: inputs(case, dtype, device, seed))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", **named(ONE_EACH))
def test_layouts(case, dtype, layout, device, impl):
    def draw(seed):
        tensors = inputs(case, dtype, device, seed)
        return {name: laid_out(x, layout) for name, x in tensors.items()}

    given = draw(0)
    first = next(iter(given.values()))
    assert first.data_ptr() % 16 != 0 if layout == "unaligned" else not first.is_contiguous()
    judge(case, impl, draw)


@pytest.mark.parametrize("case", **named(PUBLISHED))
def test_two_runs_give_the_same_bits(case, dtype, device, impl):
    tensors = inputs(case, dtype, device)
    first, second = (evaluate(case.call(impl), tensors, case.wrt()) for _ in range(2))
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


@pytest.mark.parametrize("op", sorted({case.op for case in SHARED}))
def test_triton_is_the_choice(op, dtype, device, on_gpu, impl):
    (served,) = (line for line in ak.implementations(op, device, dtype) if line.chosen)
    if on_gpu:
        assert served.name == "triton"
    else:
        assert served.name in ("native", "reference")


def test_nan_stays_in_its_window(dtype, device, impl):
    case = window_attention_case("", (12, 8), (4, 4), (2, 1), H=4, d=32)
    clean = inputs(case, dtype, device)
    broken = clean | {"qkv": clean["qkv"].clone()}
    broken["qkv"][0, 37] = float("nan")
    expected, actual = case.call(impl)(**clean), case.call(impl)(**broken)
    hit = case.call("reference")(**broken).isnan().any(-1)
    assert 0 < hit.sum() <= 16
    assert actual[hit].isnan().all()
    assert torch.equal(actual[~hit], expected[~hit])


@pytest.mark.parametrize("case", **named(ONE_EACH))
def test_more_values_than_32_bits_count(case, dtype, device, on_gpu, impl):
    """Many copies of one clip: the last one's results are those of the clip alone."""
    if dtype != torch.bfloat16:
        pytest.skip("one dtype will do")
    tensors = inputs(case, dtype, device)
    clip = {name: x[:1] for name, x in tensors.items() if name not in PARAMETERS}
    wrt = [name for name in case.wrt() if name in clip]
    alone = evaluate(case.call(impl), tensors | clip, wrt)
    sizes = [x.numel() for x in (alone["output"], *clip.values())]
    clips = 2**31 // max(sizes) + 2 if on_gpu else 3
    if on_gpu:  # inputs, outputs, their gradients, and some
        needed, (free, _) = 3 * 2 * clips * sum(sizes), torch.cuda.mem_get_info(device)
        if needed > free:
            pytest.skip(f"it takes about {needed / 1e9:.0f} GB of memory, and {free / 1e9:.0f} GB are free")
    many = {name: x.expand(clips, *x.shape[1:]).contiguous() for name, x in clip.items()}
    results = evaluate(case.call(impl), tensors | many, wrt)
    if alone["output"].dim() == 0:  # a mean over all clips; its gradients are rounded to bfloat16
        torch.testing.assert_close(results["output"], alone["output"], rtol=1e-4, atol=0)
        for name in wrt:
            last, expected = results[f"grad of {name}"][-1], alone[f"grad of {name}"][0]
            torch.testing.assert_close(clips * last.float(), expected.float(), rtol=2**-6, atol=1e-9)
    else:
        for name, value in alone.items():
            assert torch.equal(results[name][-1], value[0]), name
