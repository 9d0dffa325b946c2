"""The recipe behind tests/golden: weights and inputs are drawn, not stored (see tests/golden/README.md).

>>> golden = load_golden("ssast_patch_base")          # the npz's arrays and the state dict's shapes
>>> state = fill_weights(golden.shapes, golden.seed)  # by upstream name, float64 on the float32 grid
>>> spectrogram = arr((2, 1024, 128), 1, golden.seed)
"""

import json
from dataclasses import dataclass
from pathlib import Path
from zlib import crc32

import numpy as np
import torch

GOLDEN_DIR = Path(__file__).parent / "golden"

# What upstream initialises itself, so that the recipe leaves it alone: fixed position tables and buffers.
FIXED = {"pos_embed", "decoder_pos_embed", "p_input_fdim", "p_input_tdim"}


def is_fixed(name):
    """True for a tensor that the recipe does not fill. SSAST's `v.pos_embed` is a parameter: it is filled."""
    return name in FIXED or name.startswith("batch_norm.") or name.endswith("_sine_pos_embed.pe")


def fill_weights(keys, seed=1):
    """Fill parameters by the golden recipe.

    Args:
        keys: mapping of upstream's names to shapes (or to tensors); what upstream fixes itself is skipped.
        seed: the seed stored in the golden file.

    Returns:
        dict of name to float64 CPU tensor, every value exactly representable in float32.
    """
    state = {}
    for name, shape in keys.items():
        if is_fixed(name):
            continue
        shape = tuple(getattr(shape, "shape", shape))
        rng = np.random.RandomState((crc32(name.encode()) + seed) % 2**32)
        value = rng.standard_normal(shape) * 0.05
        if len(shape) == 1 and name.endswith(("weight", "tau")):
            value = 1 + value
        state[name] = torch.from_numpy(np.asarray(value).astype(np.float32).astype(np.float64))
    return state


def arr(shape, k, seed=1):
    """Input number k: standard normal, float64 tensor of `shape` on the float32 grid."""
    values = np.random.RandomState(seed * 1000 + k).standard_normal(shape)
    return torch.from_numpy(values.astype(np.float32).astype(np.float64))


def uni(shape, k, seed=1):
    """Noise number k: uniform on [0, 1), float64 tensor of `shape` on the float32 grid."""
    values = np.random.RandomState(seed * 1000 + k).rand(*shape)
    return torch.from_numpy(values.astype(np.float32).astype(np.float64))


def keep_smallest(noise, count):
    """(B, L) noise -> (B, count) ids of the smallest values, in stable sorted order: Audio-MAE's mask."""
    return noise.argsort(dim=1, stable=True)[:, :count]


def permutations(batch, num_tokens=512, seed=1):
    """(batch, num_tokens) int64: clip i's permutation `RandomState(seed * 1000 + 2 + i)` (SSAST, MAE-AST)."""
    rows = [np.random.RandomState(seed * 1000 + 2 + i).permutation(num_tokens) for i in range(batch)]
    return torch.from_numpy(np.stack(rows)).long()


def ssast_ids(ids, frequency=8, time=64):
    """SSAST's frequency-major token ids f * time + t as time-major ones, t * frequency + f."""
    return ids % time * frequency + ids // time


@dataclass(frozen=True)
class Golden:
    """One golden file: `values` by name (numpy arrays), `shapes` of upstream's state dict, `seed`."""

    name: str
    values: dict
    shapes: dict
    seed: int

    def __getitem__(self, key):
        return self.values[key]

    def gradients(self):
        """name -> (norm, sum) of each parameter's gradient, by upstream's name."""
        columns = (self[key].tolist() for key in ("grad_names", "grad_l2", "grad_sum"))
        return {name: (norm, total) for name, norm, total in zip(*columns, strict=True)}


def load_golden(name):
    """Read tests/golden/<name>.npz and <name>.keys.json."""
    with np.load(GOLDEN_DIR / f"{name}.npz") as file:
        values = {key: file[key] for key in file.files}
    shapes = json.loads((GOLDEN_DIR / f"{name}.keys.json").read_text())
    return Golden(name, values, {key: tuple(shape) for key, shape in shapes.items()}, int(values["seed"]))


def gradient_errors(gradients, golden, rtol):
    """Gradients whose norm is off by more than `rtol * max(golden, 1e-3 * the file's largest)`.

    Args:
        gradients: name -> gradient tensor, by upstream's names.

    Returns:
        list of sentences, empty when every golden gradient is present and agrees.
    """
    expected = golden.gradients()
    floor = 1e-3 * max(norm for norm, _ in expected.values())
    errors = []
    for name, (norm, _) in expected.items():
        if name not in gradients:
            errors.append(f"{name}: no gradient")
            continue
        ours = gradients[name].double().norm().item()
        if not abs(ours - norm) <= rtol * max(norm, floor):
            errors.append(f"{name}: gradient norm {ours:.9g}, expected {norm:.9g}")
    return errors
