"""Frozen baselines: the three systems in plain PyTorch with SDPA, under upstream's parameter names.

They are what a competent person writes today without custom kernels. They stay as they are, so that
measurements taken years apart share a yardstick; tests/bench/test_plain.py holds them to the golden values.

Each is `model(spectrogram, ids_keep) -> Losses`, and `model.embeddings(spectrogram)` encodes every token:
    spectrogram: (B, T, F) normalised log-mel.
    ids_keep: (B, K) int64 ids of the visible tokens, time-major (t * F' + f).
"""

from .audiomae import AudioMAE
from .layers import Losses
from .mae_ast import MAEAST
from .ssast import SSAST

__all__ = ["MAEAST", "SSAST", "AudioMAE", "Losses"]
