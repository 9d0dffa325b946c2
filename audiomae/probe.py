"""`audiomae probe`: how well frozen embeddings tell labelled recordings apart, by a linear layer and by neighbours.

Both are deterministic: the clips of each class are dealt out to the folds by a seeded permutation, and the linear
layer's objective is convex.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .data import labelled_folder
from .embedding import Embedder
from .options import (
    Recording,
    add_any_length,
    add_model,
    check_device,
    check_writable,
    layer,
    load_batches,
    open_model,
    positive,
    replacing,
)
from .words import plural

__all__ = ["LinearProbe", "folds", "nearest_neighbours", "probe"]

DECAYS = tuple(10.0**k for k in range(-4, 0))


def folds(labels: Tensor, number: int, seed: int = 0, groups: Sequence[str] | None = None) -> Tensor:
    """(N,) the fold of each clip: each class is spread over all folds as evenly as can be.

    Args:
        labels: (N,) class numbers.
        number: of folds.
        groups: N names; clips of one name, such as those cut from one recording, stay in one fold.

    Raises:
        ValueError: fewer than two folds, or a class with fewer clips, or groups, than folds.
    """
    what = "recordings" if groups is None else "groups of recordings"
    if groups is None:
        counts = labels.bincount()
    else:
        names = {name: i for i, name in enumerate(dict.fromkeys(groups))}
        group = torch.tensor([names[name] for name in groups])
        held = torch.zeros(len(names), int(labels.max()) + 1, dtype=torch.int64)
        held.index_put_((group, labels), torch.ones_like(labels), accumulate=True)
        counts = (held > 0).sum(dim=0)
    fewest = int(counts[counts > 0].min())
    if not 2 <= number <= fewest:
        raise ValueError(
            f"{number} folds were asked for, and they should be at least 2 and no more than the {what} of each class: "
            f"the rarest has {fewest}"
        )
    generator = torch.Generator().manual_seed(seed)
    if groups is not None:
        return _grouped(held, number, generator)[group]
    fold = torch.empty_like(labels)
    for label in range(len(counts)):
        members = (labels == label).nonzero().flatten()
        shuffled = members[torch.randperm(len(members), generator=generator)]
        # Each class begins where the last one ended, so that the folds are of one size.
        fold[shuffled] = (torch.arange(len(members)) + int(counts[:label].sum())) % number
    return fold


def _grouped(held: Tensor, number: int, generator: torch.Generator) -> Tensor:
    """(G, classes) clips of each class in each group -> (G,) its fold, large groups first."""
    fold = torch.empty(len(held), dtype=torch.int64)
    filled = held.new_zeros(number, held.shape[1])
    order = torch.randperm(len(held), generator=generator)
    for i in order[held.sum(dim=1)[order].argsort(descending=True, stable=True)].tolist():
        # Where there is least of what it brings; of equal ones the smallest fold.
        shares = zip((filled * held[i]).sum(dim=1).tolist(), filled.sum(dim=1).tolist(), strict=True)
        fold[i] = min(enumerate(shares), key=lambda each: each[1])[0]
        filled[fold[i]] += held[i]
    return fold


class LinearProbe:
    """Multinomial logistic regression on standardised features, by L-BFGS in float64.

    Attributes:
        weight: (D + 1, classes), the bias last.
    """

    def __init__(self, features: Tensor, labels: Tensor, classes: int, decay: float):
        self.mean, self.scale = features.mean(0), features.std(0) + 1e-6
        self.weight = torch.zeros(features.shape[1] + 1, classes, dtype=torch.float64, requires_grad=True)
        x = self._standardised(features)
        optimizer = torch.optim.LBFGS([self.weight], max_iter=100, line_search_fn="strong_wolfe")

        def loss() -> Tensor:
            optimizer.zero_grad()
            value = F.cross_entropy(x @ self.weight, labels) + decay * self.weight[:-1].square().sum()
            value.backward()
            return value

        optimizer.step(loss)
        self.weight.requires_grad_(False)

    def _standardised(self, features: Tensor) -> Tensor:
        return F.pad((features - self.mean) / self.scale, (0, 1), value=1.0).double()

    def __call__(self, features: Tensor) -> Tensor:
        """(N, D) -> (N,) class numbers."""
        return (self._standardised(features) @ self.weight).argmax(dim=1)

    @classmethod
    def best(cls, features: Tensor, labels: Tensor, classes: int) -> LinearProbe:
        """With the weight decay that does best on every fourth clip of each class, held out."""
        held = torch.zeros(len(labels), dtype=torch.bool)
        for label in labels.unique():
            held[(labels == label).nonzero().flatten()[3::4]] = True
        scores = []
        if held.any():
            for decay in DECAYS:
                model = cls(features[~held], labels[~held], classes, decay)
                scores.append((model(features[held]) == labels[held]).double().mean())
        # With too few clips to choose by, the strongest; of equally good ones the strongest too.
        chosen = max(range(len(scores)), key=lambda i: (scores[i], i)) if scores else len(DECAYS) - 1
        return cls(features, labels, classes, DECAYS[chosen])


def nearest_neighbours(features: Tensor, labels: Tensor, queries: Tensor, classes: int, k: int) -> Tensor:
    """(N, D), (N,), (M, D) -> (M,): the vote of the k most similar clips, weighted by their cosine similarity."""
    mean = features.mean(dim=0)
    near, index = (F.normalize(queries - mean) @ F.normalize(features - mean).T).topk(min(k, len(features)))
    votes = near.new_zeros(len(queries), classes).scatter_add(1, labels[index], near.clamp(min=0) + 1e-6)
    return votes.argmax(dim=1)


def probe(
    features: Tensor,
    labels: Sequence[int],
    *,
    method: str = "linear",
    number: int = 5,
    k: int = 10,
    seed: int = 0,
    groups: Sequence[str] | None = None,
) -> list[float]:
    """Accuracy on each fold of a classifier fitted to the other folds.

    Args:
        features: (N, D), one embedding a clip.
        labels: N class numbers from 0.
        method: "linear" or "knn" (of the `k` nearest).
        number: of folds.
        seed, groups: of the folds, see `folds`.

    Raises:
        ValueError: an unknown method, or too many folds for the rarest class.
    """
    if method not in ("linear", "knn"):
        raise ValueError(f"method must be 'linear' or 'knn', got {method!r}")
    features, labels = features.cpu().float(), torch.as_tensor(labels)
    classes, fold = int(labels.max()) + 1, folds(labels, number, seed, groups)
    accuracies = []
    for i in range(number):
        test = fold == i
        if method == "linear":
            predicted = LinearProbe.best(features[~test], labels[~test], classes)(features[test])
        else:
            predicted = nearest_neighbours(features[~test], labels[~test], features[test], classes, k)
        accuracies.append((predicted == labels[test]).double().mean().item())
    return accuracies


# -- the command ---------------------------------------------------------------------------------------------


def add_command(commands: Any) -> None:
    parser = commands.add_parser(
        "probe",
        help="how well frozen embeddings tell the classes of a folder apart",
        description="Embeds a folder that holds a folder of recordings for each class, and measures the accuracy of "
        "a linear layer or of the nearest neighbours on frozen embeddings by cross-validation. Folds are drawn clip "
        "by clip: where several clips were cut from one recording, the figure is too good without --group.",
    )
    parser.add_argument(
        "folder", type=Path, metavar="FOLDER", help="with a folder of recordings for each class"
    )
    parser.add_argument("--method", choices=("linear", "knn"), default="linear", help="default: %(default)s")
    parser.add_argument("--folds", type=positive, default=5, help="default: %(default)s")
    parser.add_argument("--neighbours", type=positive, default=10, help="of knn; default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="of the folds; default: %(default)s")
    parser.add_argument(
        "--group",
        type=_pattern,
        metavar="REGEX",
        help="found in each path below FOLDER; clips in which its first group (or all of it) is the same text stay in "
        "one fold: '(.*)-' for dog/park-1.wav and dog/park-2.wav",
    )
    parser.add_argument("--layer", type=layer, default="last", help="as of embed; default: %(default)s")
    parser.add_argument("--out", type=Path, metavar="JSON", help="write the figures here too")
    add_any_length(parser)
    add_model(parser)
    parser.set_defaults(run=_probe)


def _pattern(text: str) -> re.Pattern:
    try:
        return re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no regular expression: {error}") from None


def _groups(recordings: Sequence[Recording], folder: Path, pattern: re.Pattern | None) -> list[str] | None:
    """What the pattern finds in each recording's path below the folder."""
    if pattern is None:
        return None
    found = []
    for recording in recordings:
        path = str(Path(recording.name).relative_to(folder))
        match = pattern.search(path)
        if match is None:
            raise ValueError(f"--group {pattern.pattern!r} finds nothing in {path}")
        found.append(match[1] if pattern.groups and match[1] is not None else match[0])
    return found


def _probe(options: argparse.Namespace) -> int:
    if options.out is not None:
        check_writable(options.out)
    source = labelled_folder(options.folder)
    recordings = [Recording(clip.path, source, i) for i, clip in enumerate(source)]
    labels, names = [clip.labels[0] for clip in source], source.label_names
    groups = _groups(recordings, options.folder, options.group)
    folds(torch.tensor(labels), options.folds, options.seed, groups)
    device = check_device(options.device)
    embedder = Embedder(
        open_model(options.model, options, random="a baseline").float(),
        layer=options.layer,
        long=options.long,
        batch_size=options.batch_size,
        device=device,
    )
    number = {recording.name: i for i, recording in enumerate(recordings)}
    failed: list[str] = []
    rows, kept = [], []
    for good, waveforms in load_batches(
        recordings, embedder.sample_rate, options.batch_size, "probe", failed
    ):
        rows.append(embedder(waveforms).cpu())
        kept += [number[recording.name] for recording in good]
    if not rows:
        raise ValueError(f"none of {plural(len(recordings), 'recording')} in {options.folder} could be used")
    groups = None if groups is None else [groups[i] for i in kept]
    kept = [labels[i] for i in kept]
    accuracies = probe(
        torch.cat(rows),
        kept,
        method=options.method,
        number=options.folds,
        k=options.neighbours,
        seed=options.seed,
        groups=groups,
    )
    mean, std = torch.tensor(accuracies).mean().item(), torch.tensor(accuracies).std().item()
    chance = max(kept.count(label) for label in set(kept)) / len(kept)
    for i, accuracy in enumerate(accuracies):
        print(f"fold {i + 1}  {accuracy:.1%}")
    print(
        f"{options.method}: {mean:.1%} (standard deviation over folds {std:.1%}) of {len(kept)} clips in "
        f"{len(names)} classes; the largest class alone is {chance:.1%}"
    )
    if options.out is not None:
        figures = {
            "folder": str(options.folder),
            "model": options.model,
            "method": options.method,
            "layer": options.layer,
            "seed": options.seed,
            "group": options.group and options.group.pattern,
            "clips": len(kept),
            "classes": list(names),
            "left_out": failed,
            "accuracies": accuracies,
            "accuracy": mean,
            "largest_class": chance,
        }
        with replacing(options.out) as temporary:
            temporary.write_text(json.dumps(figures, indent=2) + "\n")
        print(f"wrote {options.out}")
    return 1 if failed else 0
