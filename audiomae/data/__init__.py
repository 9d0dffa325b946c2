"""Audio files and datasets."""

from audiomae.data.audio import AudioError, decode, load_audio, load_batch, recordings

__all__ = ["AudioError", "decode", "load_audio", "load_batch", "recordings"]
