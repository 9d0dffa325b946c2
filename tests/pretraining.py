"""Tiny pre-training runs, in this process or in processes of their own."""

import logging
import multiprocessing
import os
import shutil
import socket
import traceback
from pathlib import Path

import numpy as np
import soundfile
import torch
from faults import fault

from audiomae.train import Checkpoints, TrainConfig, Trainer, pretrain
from audiomae.train.checkpoints import read_state
from audiomae.train.loop import STATE
from audiomae.train.processes import Processes

SIZES = {"width": 32, "depth": 2, "heads": 2, "mlp_ratio": 2.0}
MODELS = {
    "audiomae_small": {**SIZES, "decoder_width": 32, "decoder_depth": 2, "decoder_heads": 2, "frames": 64},
    "mae_ast_patch_base": {**SIZES, "decoder_width": 32, "decoder_depth": 1, "decoder_heads": 2},
    "ssast_patch_tiny": {**SIZES, "frames": 64, "passes": 2, "mask_ratio": 0.75},
}

# The imports are paid for once: children are forks of a server that has them. A fork of the test process would
# inherit its threads' locks.
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["pretraining", "torch.utils.tensorboard"])


def make_clips(folder, count=12, seconds=0.8):
    """Tones in noise, 16 kHz."""
    folder.mkdir(parents=True)
    random = np.random.default_rng(1)
    time = np.arange(int(seconds * 16000)) / 16000
    for i in range(count):
        tone = 0.3 * np.sin(2 * np.pi * random.uniform(100, 4000) * time)
        samples = tone + 0.05 * random.standard_normal(len(time))
        soundfile.write(folder / f"{i:02}.wav", samples.astype(np.float32), 16000)
    return folder


def tiny(data, out, model="audiomae_small", overrides=None, **settings):
    """A run of 8 steps of 2 x 2 of 12 clips, an epoch of 3 steps."""
    defaults = {"steps": 8, "batch_size": 2, "accumulate": 2, "lr": 1e-3, "warmup_steps": 2, "workers": 0}
    defaults |= {"log_every": 1, "save_every": 3, "picture_every": 0, "device": "cpu"}
    overrides = MODELS[model] | (overrides or {})
    return TrainConfig(
        model=model, model_overrides=overrides, data=[str(data)], out=str(out), **{**defaults, **settings}
    )


def state_of(out, step):
    return read_state(Checkpoints(Path(out) / "checkpoints").folder / f"step-{step:08d}" / STATE)


def leaves(value, name=""):
    """(name, value) of all that nested containers hold."""
    if isinstance(value, dict):
        return [leaf for key, v in value.items() for leaf in leaves(v, f"{name}.{key}")]
    if isinstance(value, (list, tuple)):
        return [leaf for i, v in enumerate(value) for leaf in leaves(v, f"{name}[{i}]")]
    return [(name, value)]


def assert_same_bits(found, expected):
    found, expected = leaves(found), leaves(expected)
    assert [name for name, _ in found] == [name for name, _ in expected]
    for (name, one), (_, other) in zip(found, expected, strict=True):
        if isinstance(one, torch.Tensor):
            assert torch.equal(one, other), f"{name}: {(one != other).sum()} of {one.numel()} values differ"
        else:
            assert one == other, name


def start(config, **environment):
    """`pretrain(config)` in a process of its own."""
    process = _context.Process(target=_child, args=(config, environment))
    process.start()
    return process


def torchrun(function, world_size, *arguments):
    """function(rank, *arguments) in so many processes, in the environment that torchrun gives them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    queue = _context.SimpleQueue()
    processes = []
    for rank in range(world_size):
        environment = {"RANK": rank, "WORLD_SIZE": world_size, "LOCAL_RANK": rank}
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "GLOO_SOCKET_IFNAME": "lo"}
        process = _context.Process(target=_rank, args=(queue, function, rank, environment, arguments))
        process.start()
        processes.append(process)
    for process in processes:
        process.join(180)
        if process.is_alive():
            process.kill()
    assert [process.exitcode for process in processes] == [0] * world_size, (
        queue.get() if not queue.empty() else ""
    )


def _child(config, environment):
    torch.set_num_threads(1)
    os.environ.update({name: str(value) for name, value in environment.items()})
    pretrain(config)


def _rank(queue, function, rank, environment, arguments):
    torch.set_num_threads(1)
    os.environ.update({name: str(value) for name, value in environment.items()})
    try:
        function(rank, *arguments)
    except BaseException:
        queue.put(f"process {rank}:\n{traceback.format_exc()}")
        raise


def run(rank, config):
    pretrain(config)


def run_and_note(rank, config, path):
    """`run`, with what is said of recordings in a file for each process."""
    handler = logging.FileHandler(f"{path}.{rank}")
    logging.getLogger("audiomae.data").addHandler(handler)
    pretrain(config)


def gradients(config, processes):
    """{name: gradient} of the first step, in every process the same."""
    trainer = Trainer(config, processes)
    trainer._restart_interval()
    batches = trainer._batches()
    trainer.optimizer.zero_grad = lambda set_to_none: None
    trainer._step([next(batches) for _ in range(config.accumulate)])
    found = {name: parameter.grad for name, parameter in trainer.model.named_parameters()}
    return {name: g.full_tensor() if hasattr(g, "full_tensor") else g for name, g in found.items()}


def save_with_faults(rank, config, kinds, every):
    """Saves again and again, each time with a fault of the first process's disk `every` operations later."""
    with Processes("cpu") as processes:
        trainer = Trainer(config, processes)
        trainer.metric, consumed = None, trainer.sampler.state_dict()
        trainer._restart_interval()
        trainer._step([next(trainer._batches())])  # the optimizer has something to save
        trainer.step = 1
        trainer._save(consumed)
        for kind in kinds:
            trainer.step, number, error = 2, 1 - every, True
            while error:
                number, error = number + every, None
                with fault(trainer.checkpoints.folder, kind, number if rank == 0 else 10**9):
                    try:
                        trainer._save(consumed)
                    except OSError as caught:
                        error = str(caught)
                last = trainer.checkpoints.latest()
                written = not error or "was written, but not synced" in error
                assert processes.gather(last.step) == [1 + written] * 2, (kind, number, error)
                assert not error or f"the last complete one is {last.path}" in error, (kind, number, error)
                processes.gather(None)
                if rank == 0 and written:
                    shutil.rmtree(last.path)
            assert number > 8, (kind, number)


def write_gradients(rank, configs, path):
    """Of each of the configurations {name: configuration}."""
    with Processes("cpu") as processes:
        found = {name: gradients(config, processes) for name, config in configs.items()}
    if rank == 0:
        torch.save(found, path)
