"""Pre-training: masks, the models' own losses, pictures of reconstructions."""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from ..config import is_name
from ..create import create_model, load
from ..data import Batch, ClipDataset, ClipSampler, collate, open_source
from ..masking import Mask
from ..model import MaskedAutoencoder, SpectrogramModel
from ..picture import draw_reconstruction, reconstruct
from ..ssast import SSAST
from .config import TrainConfig
from .loop import PICTURE, VALIDATION_MASKS, Loop
from .processes import Processes, StopSignal


def pretrain(config: TrainConfig) -> Path | None:
    """Run or go on with a pre-training.

    Returns:
        The folder with the model; None if the run was asked to end before its last step, and has saved.

    Raises:
        ValueError: a setting, a source or a model is wrong.
        OSError: the folder of the run cannot be written.
        TrainingError: the loss is NaN or infinite.
    """
    config.check()
    with StopSignal() as stop, Processes(config.device) as processes:
        return Trainer(config, processes).train(stop)


class Trainer(Loop):
    """A pre-training run."""

    config: TrainConfig

    def _create(self) -> SpectrogramModel:
        settings = self.config
        make = create_model if is_name(settings.model) else load
        model = make(settings.model, **settings.model_overrides)
        c = model.config
        if not isinstance(model, (MaskedAutoencoder, SSAST)) or getattr(c, "decoder", None) == "none":
            raise ValueError(
                f"{settings.model} is a {type(model).__name__} without a decoder or heads to pre-train"
            )
        if settings.mean is not None:
            c.frontend = replace(c.frontend, mean=settings.mean, std=settings.std)
        return model

    def _open_data(self) -> tuple[ClipSampler, DataLoader, DataLoader | None]:
        c, ranks = self.config, self._ranks
        sources = [_unlabelled(spec) for spec in c.data]
        dataset = ClipDataset(sources, self.frontend, augment=c.augment, seed=c.seed)
        sampler = ClipSampler(sources, weights=c.data_weight or None, seed=c.seed, **ranks)
        loader = self._loader(dataset, sampler)
        val_loader, shown = None, sources
        if c.val_data:
            shown = [_unlabelled(spec) for spec in c.val_data]
            dataset = ClipDataset(shown, self.frontend, random_crop=False, seed=c.seed)
            val_loader = self._loader(dataset, ClipSampler(shown, shuffle=False, drop_last=False, **ranks))
        self.shown = ClipDataset(shown, self.frontend, random_crop=False, seed=c.seed)
        return sampler, loader, val_loader

    def _losses(self, batch: Batch, inputs: tuple) -> dict[str, Tensor]:
        out = self.wrapped(*inputs)
        return {"loss": out.loss, **out.losses}

    def _weights(self, masks: list[Mask | tuple[Mask, ...]]) -> list[float]:
        """Of the micro-batches' losses, such that the mean over the processes is the joined batch's.

        Losses are means over masked tokens. These are equally many in each micro-batch, unless clips keep their own
        lengths.
        """
        if self.model.config.pad == "attend":
            return super()._weights(masks)
        last = [mask[-1] if isinstance(mask, tuple) else mask for mask in masks]
        counts = [sum(mask.masked) for mask in last]
        total = self.processes.sum(torch.tensor(sum(counts))).item()
        return [count * self.processes.world_size / max(1, total) for count in counts]

    def _every(self) -> tuple[int, int, int]:
        c = self.config
        validations, checkpoints, _ = super()._every()
        return validations, checkpoints, checkpoints if c.picture_every is None else c.picture_every

    def _announce(self) -> None:
        super()._announce()
        if self.processes.first and self.config.picture_every != 0 and find_spec("matplotlib") is None:
            self.log.say("no pictures: matplotlib is not installed")

    def _validate(self) -> None:
        total: dict[str, Tensor] = {}
        clips = 0
        with self._aside():
            for number, batch in enumerate(self.val_loader):
                self.failures.add(batch.failures)
                out = self.model(*self._inputs(batch, VALIDATION_MASKS, number, random_start=False))
                for name, value in {"loss": out.loss, **out.losses}.items():
                    total[name] = total.get(name, 0.0) + value.double() * len(batch)
                clips += len(batch)
        values = torch.stack(list(total.values()))
        values = self.processes.sum(torch.cat([values, values.new_tensor([clips])])).tolist()
        losses = {f"val_{name}": value / values[-1] for name, value in zip(total, values, strict=False)}
        self.metric = losses["val_loss"]
        self.plateau.update(self.metric)
        self.log.metrics(self.step, **losses)
        self.log.say(f"step {self.step}: validation loss {self.metric:.4f}")

    def _draw(self) -> None:
        """A picture of what the model makes of the first clips. Under FSDP2 every process takes part."""
        if not self.model.config.reconstruction_weight or not (self.config.fsdp or self.processes.first):
            return
        if self.processes.first and find_spec("matplotlib") is None and not self.config.fsdp:
            return
        batch = collate([self.shown[0, i] for i in range(min(3, len(self.shown)))])
        with self._aside():
            spectrogram, _, _ = self._inputs(batch, PICTURE, random_start=False)
            images = reconstruct(self.model, spectrogram)
        if self.processes.first and find_spec("matplotlib") is not None:
            picture = self.config.folder / "pictures" / f"step-{self.step:08d}.png"
            try:
                picture.parent.mkdir(exist_ok=True)
                draw_reconstruction(picture, *images, title=f"step {self.step}")
            except OSError as error:
                raise OSError(
                    f"{picture} cannot be written: {error.strerror or error}; go on with --resume"
                ) from error


def _unlabelled(spec: str) -> Any:
    """A source; sources with different label names may be joined, since labels are not used."""
    source = open_source(spec)
    source.label_names = ()
    return source
