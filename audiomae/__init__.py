"""Masked-autoencoder pre-training on audio spectrograms: Audio-MAE, MAE-AST and SSAST on custom kernels."""

from .classifier import Classifier
from .config import ClassifierConfig, MAEConfig, SSASTConfig, list_models
from .create import create_classifier, create_model, load
from .embedding import Embedder, Tagger
from .frontend import Frontend, fbank
from .masking import Mask
from .model import MaskedAutoencoder, Output
from .ssast import SSAST
from .upstream import from_upstream, to_upstream

__all__ = [
    "SSAST",
    "Classifier",
    "ClassifierConfig",
    "Embedder",
    "Frontend",
    "MAEConfig",
    "Mask",
    "MaskedAutoencoder",
    "Output",
    "SSASTConfig",
    "Tagger",
    "create_classifier",
    "create_model",
    "fbank",
    "from_upstream",
    "list_models",
    "load",
    "to_upstream",
]
