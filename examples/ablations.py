"""The questions of the papers, asked of sounds of your own: what does a choice cost, and what does it bring?

Each row changes one thing of the small Audio-MAE of learning.py (16 x 16 patches, 75 % masked at random, 4 window
blocks of width 64), pre-trains it in the same way, and fits a linear classifier on frozen embeddings. Beside its
accuracy stand the seconds of the training steps and the FLOPs of their matrix products, counted in one step of the
reference implementation.

    python examples/ablations.py --only ratio loss           # the rows of two questions, on learning.py's sounds
    python examples/ablations.py --data recordings           # all, on a folder with a folder of them for each label

Rows that --out has already are not run again: ended early, the same command goes on. It leaves `ablations.csv` (a line
for each row and seed), `ablations.md` (the table that it prints) and `ablations.png`.
"""

import argparse
import csv
import json
import shutil

import numpy as np
import torch
from learning import MODEL, add_options, embed, prepare, pretrain_on, probe
from matplotlib.figure import Figure
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import audiomae

BASE = "as it is"
#: question -> {row: fields of the model that differ}. Each question is about the base row too.
QUESTIONS = {
    "ratio": {f"{ratio:.0%} masked": {"mask_ratio": ratio} for ratio in (0.3, 0.5, 0.65, 0.85, 0.95)},
    "mask": {
        "time": {"masking": "time"},
        "frequency": {"masking": "frequency"},
        "time and frequency": {"masking": "time_frequency", "mask_ratio": (0.5, 0.5)},  # 75 % together
        "clusters": {"masking": "cluster"},
        "chunks": {"masking": "chunk"},
    },
    "decoder": {
        "global": {"decoder": "global"},
        "hybrid": {"decoder": "hybrid", "global_blocks": 1},
        "cross": {"decoder": "cross"},
    },
    "depth": {f"decoder depth {depth}": {"decoder_depth": depth} for depth in (1, 2, 8)},
    "width": {f"decoder width {width}": {"decoder_width": width} for width in (32, 128)},
    "patch": {
        "patch 8 x 16": {"patch": (8, 16)},
        "patch 32 x 16": {"patch": (32, 16)},
        "stride 10 x 10": {"stride": (10, 10)},
        "frames, 2 x 128": {"patch": (2, 128), "window": (16, 1), "window_shift": (8, 0)},
    },
    "loss": {
        "InfoNCE": {"reconstruction_weight": 0.0, "info_nce_weight": 1.0},
        "reconstruction and InfoNCE": {"reconstruction_weight": 10.0, "info_nce_weight": 1.0},
    },
    "masks": {"4 masks per clip": {"masks_per_clip": 4}},
    "decoded": {
        "half of the windows": {"decode_ratio": 0.5},
        "cross, a quarter": {"decoder": "cross", "decode_ratio": 0.25},
    },
}
COLUMNS = ("question", "row", "seed", "steps", "recordings", "accuracy", "seconds", "gflop")


def chosen(only):
    """(question, row, fields) of the rows asked for: questions or rows by name, all without a name."""
    rows = [(question, row, fields) for question, rows in QUESTIONS.items() for row, fields in rows.items()]
    known = {*QUESTIONS, *(row for _, row, _ in rows)}
    if unknown := [name for name in only if name not in known]:
        raise SystemExit(
            f"there is no question and no row {unknown[0]!r}; there are {', '.join(sorted(known))}"
        )
    rows = [r for r in rows if not only or r[0] in only or r[1] in only]
    return [("", "not trained", None), ("", BASE, {}), *rows]


def gflop(fields, frames):
    """Of the matrix products of one step, forward and backward, per clip."""
    model = audiomae.create_model("audiomae_small", **fields, impl="reference", recompute="none")
    # The fused kernels of attention on a CPU are not counted; the same products one by one are.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(torch.zeros(1, frames, 128)).loss.backward()
    return counter.get_total_flops() / 1e9


def measure(recordings, fields, run, seed, steps):
    """Accuracy of the linear probe, seconds of the training steps, GFLOP per clip and step."""
    train, test = recordings.halves(seed)
    if fields is None:
        torch.manual_seed(seed)
        model, seconds, work = audiomae.create_model("audiomae_small", **MODEL), 0.0, 0.0
    else:
        fields = MODEL | fields
        model = audiomae.load(pretrain_on(recordings, train, run, seed, steps, fields))
        seconds = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["seconds"]
        work = gflop(fields, recordings.inputs.shape[1])
        shutil.rmtree(run)
    return probe(embed(model, recordings.inputs), recordings.labels, train, test), seconds, work


def measured(path):
    """The lines of the CSV; one that a killed process left half is taken out."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        lines = [line for line in csv.DictReader(file) if None not in line and None not in line.values()]
    write(path, lines)
    return lines


def write(path, lines):
    partial = path.with_suffix(".partial")
    with partial.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(lines)
    partial.replace(path)


def summary(lines):
    """{row: (accuracies, median seconds, GFLOP)} in the order of the rows."""
    rows = {}
    for line in lines:
        rows.setdefault(line["row"], []).append(line)
    order = [row for _, row, _ in chosen([]) if row in rows]
    return {
        row: (
            [float(line["accuracy"]) for line in rows[row]],
            float(np.median([float(line["seconds"]) for line in rows[row]])),
            float(rows[row][0]["gflop"]),
        )
        for row in order
    }


def table(rows):
    """In Markdown."""
    head = ("question", "row", "accuracy", "lowest", "highest", "seconds", "GFLOP/clip")
    question_of = {row: question for question, row, _ in chosen([])}
    cells = [
        (question_of[row], row, f"{np.mean(values):.1%}", f"{min(values):.1%}", f"{max(values):.1%}")
        + ((f"{seconds:.0f}", f"{work:.3f}") if work else ("", ""))
        for row, (values, seconds, work) in rows.items()
    ]
    widths = [max(len(line[i]) for line in (head, *cells)) for i in range(len(head))]
    lines = [head, tuple("-" * width for width in widths), *cells]
    return "\n".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |"
        for line in lines
    )


def draw(path, rows, chance):
    """Accuracy against the FLOPs and the seconds of training."""
    figure = Figure(figsize=(11, 5), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for axis, place, name in zip(
        axes, (2, 1), ("GFLOP per clip and step", "seconds of training"), strict=True
    ):
        for row, found in rows.items():
            if found[2]:
                mean, color = np.mean(found[0]), "C3" if row == BASE else "C0"
                spread = [[mean - min(found[0])], [max(found[0]) - mean]]
                axis.errorbar(found[place], mean, yerr=spread, fmt="o", markersize=4, color=color, alpha=0.7)
                axis.annotate(
                    row, (found[place], mean), fontsize=7, xytext=(4, 3), textcoords="offset points"
                )
        axis.axhline(chance, color="grey", linestyle=":", label="chance")
        if "not trained" in rows:
            axis.axhline(np.mean(rows["not trained"][0]), color="grey", linestyle="--", label="not trained")
        axis.set(xlabel=name)
        axis.margins(x=0.35)  # the rows' names stand to the right of their points
    axes[0].set(ylabel="accuracy of a linear probe")
    axes[0].legend()
    figure.suptitle("A sanity check on few sounds and few steps, not a figure of quality")
    figure.savefig(path, dpi=120)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add_options(parser, out="runs/ablations", steps=400)
    parser.add_argument(
        "--only",
        nargs="+",
        default=[],
        metavar="NAME",
        help=f"questions ({', '.join(QUESTIONS)}) or rows; default: all",
    )
    options = parser.parse_args()
    rows = chosen(options.only)
    options.out.mkdir(parents=True, exist_ok=True)
    of = str(options.data or f"{options.clips} synthetic per class")
    path = options.out / "ablations.csv"
    lines = measured(path)
    if strange := [line for line in lines if (line["steps"], line["recordings"]) != (str(options.steps), of)]:
        raise SystemExit(
            f"{path} holds rows of {strange[0]['steps']} steps on {strange[0]['recordings']}, not of {options.steps} "
            f"steps on {of}: choose another --out"
        )
    recordings = prepare(options)
    done = {(line["row"], line["seed"]) for line in lines}
    for seed in range(options.seeds):
        for question, row, fields in rows:
            if (row, str(seed)) in done:
                continue
            print(f"\n{row}, seed {seed}")
            accuracy, seconds, work = measure(recordings, fields, options.out / "run", seed, options.steps)
            values = (question, row, seed, options.steps, of, accuracy, seconds, work)
            lines.append(dict(zip(COLUMNS, values, strict=True)))
            write(path, lines)
            print(f"linear probe: {accuracy:.1%}")
    found = summary(lines)
    text = table(found)
    print(
        f"\n{len(recordings.paths)} clips of {len(recordings.names)} classes, chance {recordings.chance:.1%}"
    )
    print("A sanity check, not a figure of quality.\n\n" + text)
    (options.out / "ablations.md").write_text(text + "\n")
    draw(options.out / "ablations.png", found, recordings.chance)


if __name__ == "__main__":
    main()
