"""Pre-training: configuration and recipes, the loop, checkpoints, many processes."""

from .checkpoints import Checkpoints
from .config import RECIPES, TrainConfig
from .loop import Trainer, TrainingError, pretrain
from .picture import draw_reconstruction, reconstruct

__all__ = [
    "RECIPES",
    "Checkpoints",
    "TrainConfig",
    "Trainer",
    "TrainingError",
    "draw_reconstruction",
    "pretrain",
    "reconstruct",
]
