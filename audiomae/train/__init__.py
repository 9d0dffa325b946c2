"""Training: configuration and recipes, the loop, checkpoints, many processes; pre-training."""

from ..picture import draw_reconstruction, reconstruct
from .checkpoints import Checkpoints
from .config import RECIPES, TrainConfig
from .loop import Loop, TrainingError
from .pretraining import Trainer, pretrain

__all__ = [
    "RECIPES",
    "Checkpoints",
    "Loop",
    "TrainConfig",
    "Trainer",
    "TrainingError",
    "draw_reconstruction",
    "pretrain",
    "reconstruct",
]
