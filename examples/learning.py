"""Does pre-training learn anything? A sanity check in minutes on two cores, and no figure of quality.

Twelve classes of synthetic sounds, each clip with its own pitch, level, onset, and background noise. A small Audio-MAE
is pre-trained on them without labels; then a linear classifier on frozen embeddings (the mean over the patch tokens)
is compared with one on the embeddings of the same network with random weights, over three seeds.

    python examples/learning.py                      # the synthetic sounds
    python examples/learning.py --data recordings    # or a folder with a folder of recordings for each label

It prints a table and writes `results.json` and `learning.png` into --out.
"""

import argparse
import json
import math
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
import torch
from matplotlib.figure import Figure
from torch.nn import functional

import audiomae
from audiomae.data import labelled_folder, load_batch
from audiomae.train import TrainConfig, pretrain

RATE = 16_000
FRAMES = 128  # 1.28 s
MODEL = {
    "frames": FRAMES, "width": 128, "depth": 4, "heads": 4,
    "decoder_width": 64, "decoder_depth": 4, "decoder_heads": 4, "mask_ratio": 0.75,
}  # fmt: skip


# -- sounds --------------------------------------------------------------------------------------------------


def tone(t, pitch, random):
    return np.sin(2 * np.pi * pitch * t)


def chirp_up(t, pitch, random):
    return np.sin(2 * np.pi * pitch * (t + random.uniform(0.5, 1.5) * t**2 / t[-1]))


def chirp_down(t, pitch, random):
    return chirp_up(t, pitch, random)[::-1]


def vibrato(t, pitch, random):
    rate = random.uniform(4, 8)
    return np.sin(2 * np.pi * pitch * t + 0.06 * pitch / rate * np.sin(2 * np.pi * rate * t))


def tremolo(t, pitch, random):
    return (1 + np.sin(2 * np.pi * random.uniform(5, 12) * t)) * np.sin(2 * np.pi * pitch * t)


def siren(t, pitch, random):
    high = np.sin(2 * np.pi * random.uniform(2, 4) * t) > 0
    return np.sin(2 * np.pi * pitch * np.cumsum(np.where(high, 1.4, 1.0)) / RATE)


def harmonics(t, pitch, random):
    return sum(np.sin(2 * np.pi * k * pitch / 4 * t) / k for k in range(1, 12))


def ping(t, pitch, random):
    return np.sin(2 * np.pi * pitch * t) * np.exp(-t * random.uniform(15, 30))


def clicks(t, pitch, random):
    """Short bursts, evenly spaced."""
    phase = (t * random.uniform(6, 14)) % 1.0
    return np.where(phase < 0.03, random.standard_normal(len(t)), 0.0)


def crackle(t, pitch, random):
    """The same bursts at random moments."""
    starts = random.random(len(t)) < random.uniform(6, 14) / RATE
    return np.convolve(starts, np.ones(50), mode="same") * random.standard_normal(len(t))


def noise_band(t, pitch, random):
    spectrum = np.fft.rfft(random.standard_normal(len(t)))
    frequency = np.fft.rfftfreq(len(t), 1 / RATE)
    return np.fft.irfft(np.where(abs(frequency / pitch - 1) < 0.2, spectrum, 0), len(t)) * 5


def pulsed_noise(t, pitch, random):
    """A band of noise whose level goes up and down."""
    return noise_band(t, pitch, random) * (1 + np.sin(2 * np.pi * random.uniform(5, 12) * t))


SOUNDS = (
    tone, chirp_up, chirp_down, vibrato, tremolo, siren,
    harmonics, ping, clicks, crackle, noise_band, pulsed_noise,
)  # fmt: skip


def make_sound(sound, random):
    """(samples,) float32: 1.3 s with a sound of 0.6 to 1 s in it."""
    samples = np.zeros(int(1.3 * RATE))
    t = np.arange(int(random.uniform(0.6, 1.0) * RATE)) / RATE
    pitch = math.exp(random.uniform(math.log(300), math.log(3000)))
    body = sound(t, pitch, random)
    fade = np.minimum(1, np.minimum(t, t[::-1]) / 0.01)
    onset = random.integers(len(samples) - len(t))
    samples[onset : onset + len(t)] = body * fade / (np.sqrt(np.mean(body**2)) + 1e-9)
    background = random.standard_normal(len(samples)) * 10 ** (random.uniform(-30, -10) / 20)
    level = 10 ** (random.uniform(-30, -15) / 20)
    return (level * (samples + background)).clip(-1, 1).astype(np.float32)


def write_sounds(folder, clips):
    """A folder of `clips` recordings for each class."""
    random = np.random.default_rng(0)
    for sound in SOUNDS:
        (folder / sound.__name__).mkdir(parents=True)
        for i in range(clips):
            soundfile.write(folder / sound.__name__ / f"{i:03}.wav", make_sound(sound, random), RATE)


# -- measuring -----------------------------------------------------------------------------------------------


@torch.inference_mode()
def spectrograms(paths, frontend):
    """(clips, frames, 128)."""
    parts = [load_batch(paths[i : i + 64], frontend) for i in range(0, len(paths), 64)]
    return torch.cat([frontend(*part) for part in parts])


@torch.inference_mode()
def embed(model, inputs):
    """(clips, width): the mean over the patch tokens."""
    model.eval()
    return torch.cat([model.encode(part)[:, model.num_prefix_tokens :].mean(1) for part in inputs.split(64)])


def fit(features, labels, decay):
    """Multinomial logistic regression; features (clips, width) are standardised already."""
    weight = torch.zeros(features.shape[1] + 1, int(labels.max()) + 1, requires_grad=True)
    features = functional.pad(features, (0, 1), value=1.0)
    optimizer = torch.optim.LBFGS([weight], max_iter=200, line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        value = functional.cross_entropy(features @ weight, labels) + decay * weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    return weight.detach()


def accuracy(features, labels, weight):
    scores = functional.pad(features, (0, 1), value=1.0) @ weight
    return (scores.argmax(1) == labels).float().mean().item()


def probe(features, labels, train, test):
    """Test accuracy of a linear classifier, its decay chosen on a quarter of the training clips."""
    scale = features[train].std(0) + 1e-6
    features = (features - features[train].mean(0)) / scale
    held, rest = train[: len(train) // 4], train[len(train) // 4 :]
    decays = [10.0**k for k in range(-6, 0)]
    scores = [accuracy(features[held], labels[held], fit(features[rest], labels[rest], d)) for d in decays]
    weight = fit(features[train], labels[train], decays[int(np.argmax(scores))])
    return accuracy(features[test], labels[test], weight)


@dataclass
class Recordings:
    """What is learned from: a folder with a folder of recordings for each label.

    Attributes:
        folder, paths, names: where they are; the names of the labels.
        labels: (clips,) int64, the number of each recording's label.
        mean, std: of all log-mel values.
        inputs: (clips, frames, 128), normalised.
    """

    folder: Path
    paths: list
    labels: torch.Tensor
    names: list
    mean: float
    std: float
    inputs: torch.Tensor

    @property
    def chance(self):
        return self.labels.bincount().max().item() / len(self.labels)

    def halves(self, seed):
        """Numbers of the clips to pre-train and train the probe on, and of those to test on."""
        order = torch.randperm(len(self.paths), generator=torch.Generator().manual_seed(seed))
        return order[: len(order) // 2], order[len(order) // 2 :]


def add_options(parser, out, steps):
    parser.add_argument("--data", type=Path, help="a folder with a folder of recordings for each label")
    parser.add_argument("--out", type=Path, default=Path(out), help="default: %(default)s")
    parser.add_argument(
        "--clips", type=int, default=120, help="synthetic clips per class; default: %(default)s"
    )
    parser.add_argument("--steps", type=int, default=steps, help="of pre-training; default: %(default)s")
    parser.add_argument("--seeds", type=int, default=3, help="default: %(default)s")


def prepare(options):
    """The recordings of --data, or synthetic ones in --out."""
    folder = options.data
    if folder is None:
        folder = options.out / "sounds"
        shutil.rmtree(folder, ignore_errors=True)
        write_sounds(folder, options.clips)
    source = labelled_folder(folder)
    paths = [Path(clip.path) for clip in source]
    labels = torch.tensor([clip.labels[0] for clip in source])
    # Clip by clip: recordings have lengths of their own.
    raw = torch.cat(
        [spectrograms([path], audiomae.Frontend())[0] for path in paths[:: max(1, len(paths) // 300)]]
    )
    mean, std = raw.mean().item(), raw.std().item()
    inputs = spectrograms(paths, audiomae.Frontend(mean=mean, std=std, frames=FRAMES))
    return Recordings(folder, paths, labels, list(source.label_names), mean, std, inputs)


def pretrain_on(recordings, train, run, seed, steps, fields=MODEL):
    """Pre-train on the recordings of these numbers, without labels; the folder of the model."""
    unlabelled = run.with_name(f"{run.name}.tsv")
    lines = [
        f"{recordings.paths[i].relative_to(recordings.folder)}\t{soundfile.info(recordings.paths[i]).frames}\n"
        for i in train
    ]
    unlabelled.write_text(f"{recordings.folder.resolve()}\n" + "".join(lines))
    shutil.rmtree(run, ignore_errors=True)
    config = TrainConfig(
        model="audiomae_small",
        model_overrides=fields,
        mean=recordings.mean,
        std=recordings.std,
        data=[str(unlabelled)],
        out=str(run),
        steps=steps,
        batch_size=min(32, len(train)),
        lr=1e-3,
        weight_decay=0.05,
        seed=seed,
        log_every=50,
        picture_every=0,
        workers=1,
    )
    saved = pretrain(config)
    if saved is None:
        raise SystemExit("pre-training was asked to end")
    return saved


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add_options(parser, out="runs/learning", steps=400)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    recordings = prepare(options)
    labels, inputs = recordings.labels, recordings.inputs

    results = {"random": [], "pre-trained": []}
    for seed in range(options.seeds):
        train, test = recordings.halves(seed)
        saved = pretrain_on(recordings, train, options.out / f"run-{seed}", seed, options.steps)
        torch.manual_seed(seed)
        models = {
            "random": audiomae.create_model("audiomae_small", **MODEL),
            "pre-trained": audiomae.load(saved),
        }
        for name, model in models.items():
            results[name].append(probe(embed(model, inputs), labels, train, test))
            print(f"seed {seed}: linear probe on {name} weights: {results[name][-1]:.1%}")

    chance = recordings.chance
    print(
        f"\n{len(labels)} clips, {len(recordings.names)} classes, chance {chance:.1%}, "
        f"{options.steps} steps of pre-training"
    )
    print("A sanity check of the training code, not a figure of quality.\n")
    print(
        "| encoder     | mean accuracy | lowest | highest |\n|-------------|---------------|--------|---------|"
    )
    for name, values in results.items():
        print(f"| {name:11} | {np.mean(values):13.1%} | {min(values):6.1%} | {max(values):7.1%} |")
    (options.out / "results.json").write_text(json.dumps({**results, "chance": chance}, indent=2) + "\n")
    draw(options.out / "learning.png", results, chance)


def draw(path, results, chance):
    figure = Figure(figsize=(4.5, 4), layout="constrained")
    axis = figure.subplots()
    for i, values in enumerate(results.values()):
        axis.bar(i, np.mean(values), color=f"C{i}", alpha=0.5)
        axis.plot([i] * len(values), values, "k.")
    axis.axhline(chance, color="grey", linestyle=":", label="chance")
    axis.set_xticks(range(len(results)), list(results))
    axis.set(
        ylabel="accuracy of a linear probe", ylim=(0, 1), title="A sanity check, not a figure of quality"
    )
    axis.legend()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
