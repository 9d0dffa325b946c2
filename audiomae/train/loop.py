"""The loop of a run, whatever it trains: steps, signals, checkpoints, many processes."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed.checkpoint as dcp
import yaml
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.checkpoint import DefaultSavePlanner
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.utils.data import DataLoader

from ..data import Batch, ClipDataset, ClipSampler, make_loader
from ..masking import Mask
from ..model import SpectrogramModel
from ..pretrained import Record, build, check_weights
from ..words import plural
from .checkpoints import Checkpoint, Checkpoints, read_state, replace_file, replace_folder, write_state
from .config import RunConfig
from .log import Failures, Log
from .processes import Processes, StopSignal, distribute, ignore_signals, synchronise

STATE = "state.pt"

#: Shortest crop, in samples, where a front end leaves the length free: MAE-AST's `min_sample_size`.
MIN_SAMPLES = 32_000

_OPTIMIZERS = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam}
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}

# What a random stream is for; crops and order are the data's.
MASKS, VALIDATION_MASKS, DROPOUT, PICTURE = 3, 4, 5, 6


class TrainingError(RuntimeError):
    """Training cannot go on; the sentence says why, and what to do."""


@dataclass
class Plateau:
    """SSAST's schedule (`ReduceLROnPlateau` with factor 0.5 and patience 2), of the validation loss."""

    factor: float = 1.0
    best: float = math.inf
    bad: int = 0

    def update(self, loss: float) -> None:
        if loss < self.best * (1 - 1e-4):
            self.best, self.bad = loss, 0
        else:
            self.bad += 1
        if self.bad > 2:
            self.factor, self.bad = self.factor / 2, 0


def schedule(kind: str, step: int, total: int, warmup: int, lr: float, min_lr: float) -> float:
    """Learning rate of a step, counted from 0: a line from 0 to `lr` over the warm-up, then what `kind` says."""
    if step < warmup:
        return lr * step / warmup
    if kind in ("constant", "plateau"):
        return lr
    done = (step - warmup) / max(1, total - warmup)
    share = 0.5 * (1 + math.cos(math.pi * done)) if kind == "cosine" else 1 - done
    return min_lr + (lr - min_lr) * share


def autocast(device: torch.device, precision: str) -> AbstractContextManager:
    """Products in bf16 or fp16; nothing for fp32."""
    dtype = _DTYPES.get(precision)
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)


# Settings of this machine, which the record of a model that may be published leaves out.
_LOCAL = ("data", "val_data", "out", "resume", "device", "workers", "recipe")


class Loop:
    """A run: everything that a checkpoint holds, and the loop around it.

    What is trained, on what, and how it is measured are the subclass's: `_create`, `_open_data`, `_losses`,
    `_weights`, `_validate`.

    Attributes:
        config, processes, device: of the run.
        model: as it was created; `wrapped` is what training calls (DDP or FSDP2 may be around it).
        step: optimizer steps made.
        total, warmup, lr: of the whole run.
    """

    def __init__(self, config: RunConfig, processes: Processes):
        config.check()
        self.config, self.processes, self.device = config, processes, processes.device
        self.checkpoints = Checkpoints(config.folder / "checkpoints", config.keep)
        if not config.resume and self.checkpoints.started():
            raise ValueError(
                f"{config.out} holds a run already: go on with it with --resume, or choose another --out"
            )
        _seed(config.seed)  # the same weights in every process
        self.model = self._create()
        self.frontend = self.model.config.frontend
        self.sampler, self.loader, self.val_loader = self._open_data()
        self.model.to(self.device).train()
        self.wrapped = distribute(self.model, processes, config.fsdp)
        self.optimizer = self._optimizer()
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=config.precision == "fp16")
        self.plateau = Plateau()
        self.step, self.saved = 0, None
        self.changed = ""  # what is set otherwise than before --resume
        self.total = config.total_steps(len(self.sampler))
        self.warmup = config.warmup(len(self.sampler))
        self.lr = config.learning_rate(processes.world_size)
        self.failures = Failures(processes, config.folder / "failures.jsonl")
        self.metric: float | None = None  # of the weights as they are, where measured; the lower the better
        _seed(_entropy(config.seed, DROPOUT, processes.rank))  # and different dropout

    def _create(self) -> SpectrogramModel:
        """The model, on the CPU."""
        raise NotImplementedError

    def _open_data(self) -> tuple[ClipSampler, DataLoader, DataLoader | None]:
        """Of training: sampler and loader; of validation: a loader, or None."""
        raise NotImplementedError

    def _losses(self, batch: Batch, inputs: tuple) -> dict[str, Tensor]:
        """`loss`, which is minimised, and what else is logged with it; calls `wrapped`."""
        raise NotImplementedError

    def _weights(self, masks: list) -> list[float]:
        """Of the micro-batches' losses, such that the mean over the processes is the joined batch's."""
        return [1 / len(masks)] * len(masks)

    def _validate(self) -> None:
        """Measure on `val_loader`; sets `metric`."""
        raise NotImplementedError

    def _draw(self) -> None:
        """Pictures for people, every `picture_every` steps."""

    @property
    def _ranks(self) -> dict[str, int]:
        """What a sampler needs to know of the processes."""
        processes = self.processes
        return {
            "batch_size": self.config.batch_size, "rank": processes.rank, "world_size": processes.world_size,
        }  # fmt: skip

    def _loader(self, dataset: ClipDataset, sampler: ClipSampler) -> DataLoader:
        loader = make_loader(dataset, sampler, self.config.workers, pin_memory=self.device.type == "cuda")
        loader.worker_init_fn = ignore_signals
        return loader

    def _optimizer(self) -> torch.optim.Optimizer:
        c = self.config
        return _OPTIMIZERS[c.optimizer](self._groups(), lr=0.0, betas=c.betas, eps=c.eps, fused=True)

    def _groups(self) -> list[dict[str, Any]]:
        """The optimizer's groups of parameters; `lr_scale` of a group scales the schedule's rate."""
        skip = self.model.no_weight_decay()
        named = [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]
        groups = [
            {
                "params": [p for name, p in named if name not in skip],
                "weight_decay": self.config.weight_decay,
            },
            {"params": [p for name, p in named if name in skip], "weight_decay": 0.0},
        ]
        return [group for group in groups if group["params"]]

    # -- the loop --------------------------------------------------------------------------------------------

    def train(self, stop: StopSignal) -> Path | None:
        """To the last step, or to a signal.

        Returns:
            The folder with the model; None if the run was asked to end before its last step, and has saved.

        Raises:
            OSError: the folder of the run cannot be written.
            TrainingError: the loss is NaN or infinite.
        """
        c = self.config
        if c.resume:
            self._resume()
        try:
            batches = self._batches()
            if self.step < self.total:  # data that cannot be read at all leave no folder behind
                ahead: list[Batch] = []
                self._together(lambda: ahead.append(next(batches)), everywhere=True)
                batches = chain(ahead, batches)
            self._together(self._prepare_folder)  # a run that cannot go on keeps its configuration
            self.failures.open(self.step)
            self.log = Log(c.folder, self.step, self.total, active=self.processes.first)
            with closing(self.log):
                self._announce()
                finished = self._train(stop, batches)
                if finished:
                    self._finish()
                self.failures.share()
        finally:
            # They ignore the signal by which Python ends its children, and an error's traceback keeps them alive.
            for loader in filter(None, (self.loader, self.val_loader)):
                loader.close()
            self.failures.flush()
        return c.folder / "model" if finished else None

    def _train(self, stop: StopSignal, batches: Iterator[Batch]) -> bool:
        c = self.config
        val_every, save_every, picture_every = self._every()
        self._began = self._restart_interval()
        while self.step < self.total:
            consumed = self.sampler.state_dict()
            micro = [self._take(batches) for _ in range(c.accumulate)]
            if self.processes.any(stop.requested is not None):
                if self.step and self.step != self.saved:  # before the first step starting anew is the same
                    if self.step > self._first and self.processes.any(self._diverged()):
                        self._log_interval()  # which says so, and ends the run
                    self._save(consumed)
                saved = "nothing to save" if self.saved is None else f"{self._path()} is complete"
                self.log.say(
                    f"asked to end ({stop.requested or 'another process'}) at step {self.step}: {saved}"
                )
                return False
            self._step(micro)
            self.step, self.metric = self.step + 1, None
            last = self.step == self.total
            side = False
            validates = self.val_loader is not None and (last or self.step % val_every == 0)
            saves = last or self.step % save_every == 0
            if saves or self.step % c.log_every == 0:
                self._log_interval()
            if validates:
                side = True
                self._validate()
            if saves:
                side = True
                self._save(self.sampler.state_dict())
            if picture_every and (last or self.step % picture_every == 0):
                side = True
                self._draw()
            if side:
                self._restart_interval()
        return True

    def _every(self) -> tuple[int, int, int]:
        """Steps between validations, checkpoints and pictures; 0 pictures are none."""
        c = self.config
        return c.val_every or c.save_every, c.save_every, 0

    def _batches(self) -> Iterator[Batch]:
        """Of one epoch after the other, if the sampler has been advanced when the next is asked for."""
        while True:
            yield from self.loader

    def _take(self, batches: Iterator[Batch]) -> Batch:
        batch = next(batches)
        self.sampler.advance()
        return batch

    def _step(self, micro: list[Batch]) -> None:
        self.rate = self._rate()
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate * group.get("lr_scale", 1.0)
        inputs = [self._inputs(batch, MASKS, self.step, i) for i, batch in enumerate(micro)]
        weights = self._weights([mask for _, mask, _ in inputs])
        for i, (batch, weight) in enumerate(zip(micro, weights, strict=True)):
            self.failures.add(batch.failures)
            with synchronise(self.wrapped, last=i == len(micro) - 1):
                with self._autocast():
                    losses = self._losses(batch, inputs[i])
                self.scaler.scale(losses["loss"] * weight).backward()
            for name, value in losses.items():
                value = value.detach().double() * weight
                self._sums[name] = self._sums[name] + value if name in self._sums else value
            self._clips += len(batch)
        self.scaler.unscale_(self.optimizer)
        self._norm = self._gradient_norm()
        if (limit := self.config.clip_grad) is not None:
            torch.nn.utils.clip_grads_with_norm_(self.model.parameters(), limit, self._norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)

    def _rate(self) -> float:
        """The learning rate of this step."""
        c = self.config
        lr = self.lr * self.plateau.factor
        return schedule(c.schedule, self.step, self.total, self.warmup, lr, c.min_lr)

    def _gradient_norm(self) -> Tensor:
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.model.parameters() if p.grad is not None])
        return norm.full_tensor() if hasattr(norm, "full_tensor") else norm

    def _inputs(
        self, batch: Batch, *stream: int, random_start: bool = True
    ) -> tuple[Tensor, Mask | tuple[Mask, ...], list[int]]:
        """What the model takes: (B, T, F) on the device, masks, and each clip's number of valid frames."""
        spectrogram, frames = self._spectrogram(batch, random_start)
        return spectrogram, self._mask(spectrogram, frames, *stream), frames

    def _spectrogram(self, batch: Batch, random_start: bool = False) -> tuple[Tensor, list[int]]:
        waveform, lengths = batch.waveform.to(self.device, non_blocking=True), batch.lengths
        if self.frontend.frames is None and self.model.config.pad == "attend":
            waveform, lengths = _cut_to_shortest(waveform, lengths, batch.seeds if random_start else None)
        spectrogram = self.frontend(waveform, lengths)
        return spectrogram, self.frontend.num_frames(lengths).tolist()

    def _mask(self, spectrogram: Tensor, frames: list[int], *stream: int) -> Mask | tuple[Mask, ...]:
        """This process's rows of the masks of all processes: they do not depend on how many there are.

        Unless masks depend on the clips' lengths (`pad="exclude"`), of which a process knows its own only.
        """
        clips, ranks, rank = len(spectrogram), self.processes.world_size, self.processes.rank
        if self.model.config.pad == "exclude":
            stream, ranks, rank = (*stream, rank), 1, 0
        generator = torch.Generator(self.device).manual_seed(_entropy(self.config.seed, *stream))
        lengths = frames if self.model.config.pad == "exclude" else None

        def draw() -> Mask:
            mask = self.model.draw_mask(
                clips * ranks, spectrogram.shape[1], generator, self.device, lengths=lengths
            )
            size = len(mask.ids_keep) // ranks  # several masks of each clip, perhaps
            rows = slice(rank * size, (rank + 1) * size)
            return replace(mask, ids_keep=mask.ids_keep[rows], ids_masked=mask.ids_masked[rows])

        passes = getattr(self.model.config, "passes", 1)
        return draw() if passes == 1 else tuple(draw() for _ in range(passes))

    def _autocast(self) -> AbstractContextManager:
        return autocast(self.device, self.config.precision)

    # -- what it tells ---------------------------------------------------------------------------------------

    def _announce(self) -> None:
        c, ranks = self.config, self.processes.world_size
        count = sum(p.numel() for p in self.model.parameters()) / 1e6
        start = f"from step {self.step} " if self.step else ""
        how = "" if ranks == 1 else f" in {ranks} processes ({'FSDP2' if c.fsdp else 'DDP'})"
        self.log.say(
            f"{c.start}, {count:.1f} M parameters, {plural(sum(self.sampler.sizes), 'clip')}, {start}to step "
            f"{self.total}, {plural(c.batch_size * c.accumulate * ranks, 'clip')} per step, on {self.device}, "
            f"{c.precision}{how}"
        )
        if self.changed:
            self.log.say(f"settings that were changed: {self.changed}")
        if 0 < self.total <= self.warmup:
            self.log.say(
                f"the warm-up, {plural(self.warmup, 'step')}, is no shorter than the run: the rate never reaches "
                f"{self.lr:.3g}. Give --warmup-steps or --warmup-epochs"
            )

    def _restart_interval(self) -> float:
        self._sums: dict[str, Tensor] = {}
        self._clips, self._first = 0, self.step
        self._mark = time.perf_counter()
        return self._mark

    def _diverged(self) -> bool:
        """Whether a loss or gradient since the last line was not finite in this process."""
        norms = [] if self.scaler.is_enabled() else [self._norm]
        return not all(math.isfinite(value) for value in (*self._sums.values(), *norms))

    def _log_interval(self) -> None:
        """One line about the steps since the last one. The only place in a step that waits for the device."""
        steps = self.step - self._first
        names = list(self._sums)
        values = torch.stack([self._sums[name] for name in names]) / steps
        extra = [self._clips, self.failures.total, len(self.failures.news)]
        extra = torch.tensor(extra, dtype=values.dtype, device=values.device)
        *summed, clips, failures, news = self.processes.sum(torch.cat([values, extra])).tolist()
        if news:
            self.failures.share()
        losses = {n: v / self.processes.world_size for n, v in zip(names, summed, strict=True)}
        norm = self._norm.item()
        lr = self.rate
        speed = clips / (time.perf_counter() - self._mark)
        finite = all(math.isfinite(loss) for loss in losses.values())
        self.log.metrics(
            self.step,
            epoch=self.sampler.epoch,
            lr=lr,
            **losses,
            grad_norm=norm,
            clips_per_second=speed,
            failures=int(failures),
            seconds=time.perf_counter() - self._began,
            **({"loss_scale": self.scaler.get_scale()} if self.scaler.is_enabled() else {}),
        )
        self.log.progress(self.step, losses["loss"], lr, speed)
        # A loss scale that was too high gives infinite gradients, which the scaler has left out.
        if not finite or not (math.isfinite(norm) or self.scaler.is_enabled()):
            what = f"the loss is {losses['loss']}" if not finite else f"the gradient norm is {norm}"
            saved = (
                "nothing was saved yet" if self.saved is None else f"{self._path()} is the last checkpoint"
            )
            raise TrainingError(
                f"{what} in steps {self._first + 1} to {self.step}; {saved}. Lower the learning rate ({lr:.3g} "
                "here), lengthen the warm-up, clip gradients (--clip-grad), or use --precision bf16 in place of fp16"
            )
        if self.val_loader is None:
            self.metric = losses["loss"]
        self._restart_interval()

    @contextmanager
    def _aside(self) -> Iterator[None]:
        """For evaluation between steps: leaves the random streams and the mode of training alone."""
        devices = [self.device] if self.device.type == "cuda" else []
        self.model.eval()
        with torch.no_grad(), torch.random.fork_rng(devices), self._autocast():
            torch.manual_seed(self.config.seed)
            yield
        self.model.train()

    # -- what it keeps ---------------------------------------------------------------------------------------

    def _together(self, function: Callable[[], object], everywhere: bool = False) -> None:
        """Call it in the first process, or in all; what goes wrong in one is raised in all."""
        error = None
        if everywhere or self.processes.first:
            try:
                function()
            except Exception as caught:
                error = caught
        self.processes.agree(error)

    def _own_state(self) -> dict[str, Any]:
        """What a subclass adds to a checkpoint."""
        return {}

    def _load_own_state(self, state: dict[str, Any]) -> None:
        """Likewise, taken back."""

    def _path(self) -> Path:
        return self.checkpoints.folder / f"step-{self.saved:08d}"

    def _save(self, consumed: dict[str, Any]) -> None:
        """A checkpoint of this step; `consumed` is the sampler's state."""
        ranks = self.processes.gather((_random_state(self.device), self.failures.total))
        state = {
            "step": self.step,
            "sampler": consumed,
            "scaler": self.scaler.state_dict(),
            "plateau": vars(self.plateau),
            "random": [random for random, _ in ranks],
            "failures": sum(failures for _, failures in ranks),
            "fsdp": self.config.fsdp,
            **self._own_state(),
        }
        folder, partial = self.checkpoints, self.checkpoints.partial(self.step)

        def explained(function: Callable, *arguments: Any, **keywords: Any) -> Callable[[], None]:
            def call() -> None:
                with folder.explained(self.step):
                    function(*arguments, **keywords)

            return call

        self._together(explained(folder.begin, self.step))
        if self.config.fsdp:
            model, optimizer = get_state_dict(self.model, self.optimizer)
            sharded = {"model": model, "optimizer": optimizer}
            # Running statistics are each process's own: the first one's are kept, as elsewhere.
            plan = DefaultSavePlanner(dedup_save_to_lowest_rank=True)
            save = explained(dcp.save, sharded, checkpoint_id=partial, planner=plan)
            self._together(save, everywhere=True)
        else:
            state |= {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        self._together(explained(write_state, partial / STATE, state))
        self._together(explained(folder.finish, self.step, self.metric))
        self.saved = self.step

    def _resume(self) -> None:
        """Go on where the newest complete checkpoint was taken, if there is one.

        Raises:
            ValueError: there are some, and all of them are damaged or those of another run, or it is beyond the end.
        """
        found = self.checkpoints.latest() if self.processes.first else None
        found = self.processes.gather(found)[0]
        if found is None:
            if self.checkpoints.started():
                raise ValueError(
                    f"no checkpoint in {self.checkpoints.folder} is intact: choose another --out, or remove that "
                    "folder to start anew"
                )
            return
        state = read_state(found.path / STATE)
        if state["fsdp"] != self.config.fsdp:
            one, other = ("with", "leave it out") if not state["fsdp"] else ("without", "add it")
            raise ValueError(f"{found.path} was not written {one} --fsdp: {other}, or choose another --out")
        own = [{k: v for k, v in g.items() if k != "params"} for g in self.optimizer.param_groups]
        self._load_weights(found, state)
        for group, settings in zip(self.optimizer.param_groups, own, strict=True):
            group.update(settings)  # this run's, which may have been changed
        self.sampler.load_state_dict(state["sampler"])
        self.scaler.load_state_dict(state["scaler"])
        self.plateau = Plateau(**state["plateau"])
        self._load_own_state(state)
        self.step = self.saved = state["step"]
        self.metric = found.metric
        if self.step > self.total:
            raise ValueError(
                f"{found.path} is beyond step {self.total}, the end that was asked for: give more --steps or --epochs"
            )
        if self.processes.first:  # one process counts on for all
            self.failures.total = state.get("failures", 0)  # earlier versions did not save it
        if len(state["random"]) == self.processes.world_size:  # with another number dropout starts anew
            _set_random_state(state["random"][self.processes.rank], self.device)

    def _load_weights(self, found: Checkpoint, state: dict[str, Any]) -> None:
        if self.config.fsdp:
            model, optimizer = get_state_dict(self.model, self.optimizer)
            sharded = {"model": model, "optimizer": optimizer}
            dcp.load(sharded, checkpoint_id=found.path)
            set_state_dict(
                self.model,
                self.optimizer,
                model_state_dict=sharded["model"],
                optim_state_dict=sharded["optimizer"],
            )
            return
        check_weights(self.model, state["model"], found.path)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])

    def _prepare_folder(self) -> None:
        """Makes the folder of the run and writes its configuration, or says why it cannot."""
        c = self.config
        path = c.folder / "config.yaml"
        settings = c.to_dict() | {"resume": False}
        if self.step and path.exists():
            before = yaml.safe_load(path.read_text())
            changed = [name for name, value in settings.items() if before.get(name, value) != value]
            self.changed = ", ".join(f"{name} {before[name]} -> {settings[name]}" for name in changed)
        try:
            c.folder.mkdir(parents=True, exist_ok=True)
            replace_file(path, yaml.safe_dump(settings, sort_keys=False))
        except OSError as error:
            raise ValueError(
                f"--out {c.out} cannot be written: {error.strerror}; choose another folder"
            ) from error

    def _finish(self) -> None:
        """What comes after the last step."""
        self._write_model()
        self.log.say(f"wrote {self.config.folder / 'model'}")

    def _metrics(self) -> dict[str, float]:
        """What the model's record says of how good it is."""
        name = "training loss" if self.val_loader is None else "validation loss"
        return {} if self.metric is None else {name: self.metric}

    def _settings(self) -> dict[str, Any]:
        """What the run was made with."""
        return self.config.to_dict()

    def _write_model(self) -> None:
        """Write the model for others to load, with a record of the run."""
        model = self.model
        if self.config.fsdp:
            state = get_model_state_dict(
                model, options=StateDictOptions(full_state_dict=True, cpu_offload=True)
            )
            if self.processes.first:
                model = build(model.config)
                model.load_state_dict(state)
        settings = {name: value for name, value in self._settings().items() if name not in _LOCAL}
        model.record = Record(self.config.recipe, settings, self._metrics())
        folder = self.config.folder / "model"

        def write() -> None:
            try:
                replace_folder(folder, model.save_pretrained)
            except (OSError, SafetensorError) as error:
                reason = getattr(error, "strerror", None) or error
                raise OSError(
                    f"{folder} could not be written: {reason}; {self._path()} is complete: make room, then go on with "
                    "--resume"
                ) from error

        self._together(write)


def _cut_to_shortest(waveform: Tensor, lengths: Tensor, seeds: Tensor | None) -> tuple[Tensor, Tensor]:
    """MAE-AST's batches: all clips cut to the length of the shortest, from a random place where there are seeds.

    No shorter than `MIN_SAMPLES`: clips below it are filled up with zeros, where the published code leaves them out.
    """
    size = max(MIN_SAMPLES, int(lengths.min()))
    if waveform.shape[1] < size:
        waveform = torch.nn.functional.pad(waveform, (0, size - waveform.shape[1]))
    free = (lengths - size).clamp(min=0)
    starts = torch.zeros_like(lengths) if seeds is None else seeds % (free + 1)
    places = starts[:, None].to(waveform.device, non_blocking=True) + torch.arange(
        size, device=waveform.device
    )
    return waveform.gather(1, places), lengths.clamp(max=size)


def _entropy(*numbers: int) -> int:
    """A seed for each tuple of numbers, the same everywhere."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)


def _seed(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def _random_state(device: torch.device) -> dict[str, Any]:
    """Every global random stream, as tensors and plain values."""
    name, keys, position, has_gauss, cached = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": [name, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, cached],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
    }


def _set_random_state(state: dict[str, Any], device: torch.device) -> None:
    name, keys, *rest = state["numpy"]
    random.setstate(state["python"])
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"], device)
