"""`audiomae finetune` and `audiomae evaluate`."""

from __future__ import annotations

from collections.abc import Sequence

from ..train.command import parse
from .config import EvaluateConfig, TuneConfig
from .evaluate import evaluate
from .loop import finetune

_FINETUNE = (
    "Fine-tunes a classifier on labelled recordings. A task brings published settings (--recipe gives others), a file "
    "given with --config replaces them, and the command line replaces both; --print-config shows the outcome. The last "
    "weights or the best ones are saved to OUT/model and tested. Signals and --resume are as for audiomae pretrain."
)
_EVALUATE = (
    "Measures a fine-tuned model on its task's test set, or on another split: prints a table, writes results per class "
    "and a picture of the confusions."
)


def run_finetune(arguments: Sequence[str]) -> None:
    """`audiomae finetune` with these arguments."""
    finetune(parse(arguments, TuneConfig, "finetune", _FINETUNE))


def run_evaluate(arguments: Sequence[str]) -> None:
    """`audiomae evaluate` with these arguments."""
    evaluate(parse(arguments, EvaluateConfig, "evaluate", _EVALUATE))
