"""Fine-tuning and evaluation: tasks and their data sets, recipes, the loop's hooks, metrics."""

from .config import RECIPES, EvaluateConfig, TuneConfig
from .evaluate import Predictions, evaluate, predict
from .loop import Tuner, finetune
from .metrics import Report, average_precision, measure, write_report
from .tasks import TASKS, Task

__all__ = [
    "RECIPES",
    "TASKS",
    "EvaluateConfig",
    "Predictions",
    "Report",
    "Task",
    "TuneConfig",
    "Tuner",
    "average_precision",
    "evaluate",
    "finetune",
    "measure",
    "predict",
    "write_report",
]
