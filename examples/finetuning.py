"""Is a pre-trained network better to fine-tune than a random one? A sanity check, and no figure of quality.

The small Audio-MAE of learning.py is pre-trained on its synthetic sounds without their labels. Then all weights are
fine-tuned on the same clips with their labels: the pre-trained ones, and those of a network that starts at random, with
the same steps, rates and regularisation. Accuracy is that on other clips, over three seeds.

    python examples/finetuning.py                      # the synthetic sounds
    python examples/finetuning.py --data recordings    # or a folder with a folder of recordings for each label

It prints a table and writes `results.json` into --out. Runs that --out has already, with the same settings, are not
made again.
"""

import argparse
import csv
import json
import shutil

import numpy as np
import yaml
from learning import FRAMES, MODEL, add_options, prepare, pretrain_on

from audiomae.finetune import EvaluateConfig, TuneConfig, evaluate, finetune

ENCODER = {name: MODEL[name] for name in ("width", "depth", "heads")}


def write_labels(path, recordings, **splits):
    """A CSV file for `--task custom`: the recordings of these numbers in each split."""
    with path.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(("path", "label", "split"))
        for split, numbers in splits.items():
            for i in numbers:
                rows.writerow((recordings.paths[i].resolve(), recordings.names[recordings.labels[i]], split))


def tune(recordings, table, size, out, seed, steps, lr, **start):
    """Test accuracy after all weights were fine-tuned on `size` clips; `start` says from which."""
    config = TuneConfig(
        task="custom",
        data=[str(table)],
        out=str(out),
        frames=FRAMES,
        mean=recordings.mean,
        std=recordings.std,
        steps=steps,
        batch_size=min(32, size),
        lr=lr,
        warmup_steps=steps // 10,
        layer_decay=1.0,  # which a random start would suffer from
        val_every=max(1, steps),
        seed=seed,
        log_every=25,
        workers=1,
        **start,
    )
    if not (out / "test").is_dir() or yaml.safe_load((out / "config.yaml").read_text()) != config.to_dict():
        shutil.rmtree(out, ignore_errors=True)
        if finetune(config) is None:
            raise SystemExit("fine-tuning was asked to end")
    return evaluate(EvaluateConfig(model=str(out), workers=1))[""].value


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add_options(parser, out="runs/finetuning", steps=400)
    parser.add_argument("--tune-steps", type=int, default=300, help="of fine-tuning; default: %(default)s")
    parser.add_argument("--lr", type=float, default=2e-3, help="of fine-tuning; default: %(default)s")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    recordings = prepare(options)

    results = {"random": [], "pre-trained": []}
    for seed in range(options.seeds):
        train, test = recordings.halves(seed)
        saved = options.out / f"run-{seed}" / "model"
        if not saved.is_dir():
            pretrain_on(recordings, train, options.out / f"run-{seed}", seed, options.steps)
        table = options.out / f"labels-{seed}.csv"
        write_labels(table, recordings, train=train, test=test)
        starts = {
            "random": {"model": "audiomae_small", "model_overrides": ENCODER},
            "pre-trained": {"pretrained": str(saved)},
        }
        for name, start in starts.items():
            out = options.out / f"tune-{name}-{seed}"
            found = tune(recordings, table, len(train), out, seed, options.tune_steps, options.lr, **start)
            results[name].append(found)
            print(f"seed {seed}: fine-tuned from {name} weights: {found:.1%}")

    print(
        f"\n{len(recordings.paths)} clips, {len(recordings.names)} classes, chance {recordings.chance:.1%}, "
        f"{options.steps} steps of pre-training, {options.tune_steps} of fine-tuning at a rate of {options.lr:g}"
    )
    print("A sanity check of the training code, not a figure of quality.\n")
    print("| fine-tuned from | mean accuracy | lowest | highest |")
    print("|-----------------|---------------|--------|---------|")
    for name, values in results.items():
        print(f"| {name:15} | {np.mean(values):13.1%} | {min(values):6.1%} | {max(values):7.1%} |")
    (options.out / "results.json").write_text(
        json.dumps({**results, "chance": recordings.chance}, indent=2) + "\n"
    )


if __name__ == "__main__":
    main()
