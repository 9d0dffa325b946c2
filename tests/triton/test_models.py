"""Whole models on the Triton kernels, in the interpreter: the curves of twenty training steps."""

from functools import partial

import pytest
import torch
from interpreter import needs_interpreter
from training import STEP_OPS, Calls, assert_curves_within_budget, batches, tiny, train

pytestmark = needs_interpreter


@pytest.mark.parametrize("name", STEP_OPS)
def test_triton_serves_every_op_of_the_step(name):
    model = tiny(name, impl="triton")
    with Calls() as calls:
        train(model, [next(batches(model))], 1e-3)
    assert calls.served == {op: {"triton"} for op in STEP_OPS[name]}


@pytest.mark.parametrize(
    "name, autocast",
    [
        pytest.param("audiomae_base", None, id="Audio-MAE, float32"),
        pytest.param("audiomae_base", torch.bfloat16, id="Audio-MAE, bfloat16 autocast"),
        pytest.param("mae_ast_patch_base", None, id="MAE-AST, float32", marks=pytest.mark.slow),
    ],
)
def test_the_loss_curve_is_the_references(name, autocast):
    assert_curves_within_budget(partial(tiny, name), "triton", 3e-3, autocast, draws=1)
