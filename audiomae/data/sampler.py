"""Which clips an epoch has, in which order, on which rank."""

import hashlib
import itertools
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from torch.utils.data import Sampler

from audiomae.data.sources import Source
from audiomae.words import plural

__all__ = ["BalancedSampler", "ClipSampler", "RepeatingSampler"]

_log = logging.getLogger("audiomae.data")


class ClipSampler(Sampler[list[tuple[int, int]]]):
    """A batch sampler of keys (pass, index) for :class:`ClipDataset`: each clip goes to one rank per epoch.

    An epoch is cut into global batches of ``batch_size * world_size`` clips, and rank r takes rows
    ``r * batch_size`` to ``(r + 1) * batch_size`` of each: what all ranks see together is what one process
    would see with the joined batch, and a run can go on with another number of ranks.

    Where the workers prefetch, what was drawn is not what was trained on. So iterating changes nothing: it goes
    from `position` to the end of `epoch`, as both are when it starts. The training loop calls :meth:`advance`
    after each batch; after the epoch's last it sets `epoch` to the next and `position` to 0. Without it every
    iteration is the same epoch again, which is what validation wants.

    Args:
        sources: of the :class:`ClipDataset`, in its order; `index` counts through all of them.
        batch_size: clips per batch and rank.
        weights: how many times an epoch goes over each source; default: once. With 2 a source is gone over
            twice (in crops drawn anew); with 0.5 half of it, and the other half in the next epoch.
        seed: of the order.
        rank, world_size: of this process.
        drop_last: leave out what fills no global batch, other clips in each epoch. If False, that rest is dealt
            out evenly: batches whose sizes differ by at most one. Where it is less than one clip per rank, it
            joins the batch before it. Every rank has the same number of batches in either case, none empty.
        shuffle: if False, clips come in the order of the sources.

    Raises:
        ValueError: a setting out of range, or an epoch in which some rank would have no batch.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        *,
        batch_size: int,
        weights: Sequence[float] | None = None,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        drop_last: bool = True,
        shuffle: bool = True,
    ):
        if not sources:
            raise ValueError("sources is empty, but at least one was expected")
        if batch_size < 1 or world_size < 1 or seed < 0:
            raise ValueError(
                f"batch_size is {batch_size}, world_size {world_size} and seed {seed}; expected positive numbers, "
                "and a seed of at least 0"
            )
        if not 0 <= rank < world_size:
            raise ValueError(f"rank is {rank}, but 0 to {world_size - 1} were expected")
        weights = [1.0] * len(sources) if weights is None else [float(weight) for weight in weights]
        if len(weights) != len(sources) or not all(0 < weight < float("inf") for weight in weights):
            raise ValueError(
                f"weights are {weights}; expected a positive number for each of {plural(len(sources), 'source')}"
            )
        self.sizes = [len(source) for source in sources]
        self.weights = weights
        self.batch_size, self.rank, self.world_size = batch_size, rank, world_size
        self.seed, self.drop_last, self.shuffle = seed, drop_last, shuffle
        self.epoch = self.position = 0
        # Of each source per epoch: the same in every epoch, so that all have the same number of batches.
        self._counts = [
            max(1, round(size * weight)) for size, weight in zip(self.sizes, weights, strict=True)
        ]
        ends = np.cumsum([0, *self.sizes])
        self._members = [np.arange(*pair) for pair in itertools.pairwise(ends)]
        self._divide(sum(self._counts))

    def _divide(self, clips: int) -> None:
        """An epoch of so many clips, in global batches."""
        batch_size, world_size = self.batch_size, self.world_size
        self._whole, self._rest = divmod(clips, batch_size * world_size)
        if clips < world_size:
            raise ValueError(
                f"an epoch has {plural(clips, 'clip')} for {plural(world_size, 'process')}; expected at least one "
                "each. Start fewer processes, or give more data"
            )
        if self.drop_last and not self._whole:
            raise ValueError(
                f"an epoch of {plural(clips, 'clip')} does not fill one batch of {batch_size} in "
                f"{plural(world_size, 'process')}; choose a smaller batch size, or give more data"
            )

    def __len__(self) -> int:
        """Batches per epoch, the same on every rank."""
        return self._whole + (not self.drop_last and self._rest >= self.world_size)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        keys = self._order(self.epoch)
        for number in range(self.position, len(self)):
            yield [(int(turn), int(index)) for turn, index in self._batch(keys, number)]

    def advance(self) -> None:
        """Count a batch as trained on."""
        self.position += 1
        if self.position == len(self):
            self.epoch, self.position = self.epoch + 1, 0

    def state_dict(self) -> dict[str, Any]:
        """Where training is, and what that place depends on; JSON-able."""
        return {
            "epoch": self.epoch,
            "position": self.position,
            "global_batch": self.batch_size * self.world_size,
            "sizes": self.sizes,
            "weights": self.weights,
            "seed": self.seed,
            "shuffle": self.shuffle,
            "drop_last": self.drop_last,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken; the number of ranks may differ.

        Raises:
            ValueError: the data, the order or the global batch are not those of `state`.
        """
        own = self.state_dict()
        if missing := sorted(own.keys() - state.keys()):
            raise ValueError(f"the sampler's state lacks {', '.join(missing)}")
        for name, value in own.items():
            if name not in ("epoch", "position", "global_batch") and state[name] != value:
                what = "clips per source" if name == "sizes" else name
                raise ValueError(
                    f"the place in the data was saved with {what} = {state[name]}, but it is {value} now: the order of "
                    "the clips would be another. Resume with the same data and settings, or start a new run"
                )
        position, rest = divmod(state["position"] * state["global_batch"], own["global_batch"])
        if rest or not 0 <= position < len(self) or state["epoch"] < 0:
            raise ValueError(
                f"the run was saved {plural(state['position'], 'batch')} of {state['global_batch']} clips (of all "
                f"processes together) into epoch {state['epoch']}, which is no whole number of batches of "
                f"{own['global_batch']} in an epoch of {len(self)}; resume with the same product of batch size and "
                "processes"
            )
        self.epoch, self.position = state["epoch"], position

    def _order(self, epoch: int) -> np.ndarray:
        """(clips, 2) int64: the keys of an epoch on all ranks.

        Each source is an endless row of passes over it, and an epoch the next `count` clips of that row. The
        first half of a key is the number of the pass, so that no key ever comes twice.
        """
        parts = []
        for number, (members, count) in enumerate(zip(self._members, self._counts, strict=True)):
            size = len(members)
            places = np.arange(epoch * count, (epoch + 1) * count)
            turns = places // size
            indices = places % size
            if self.shuffle:
                for turn in np.unique(turns):
                    order = np.random.default_rng((self.seed, 1, number, turn)).permutation(size)
                    indices[turns == turn] = order[indices[turns == turn]]
            parts.append(np.stack((turns, members[indices]), axis=1))
        keys = np.concatenate(parts)
        if self.shuffle:
            np.random.default_rng((self.seed, 2, epoch)).shuffle(keys)
        return keys

    def _batch(self, keys: np.ndarray, number: int) -> np.ndarray:
        size, ranks = self.batch_size, self.world_size
        first = number * size * ranks
        batch = keys[first + self.rank * size : first + (self.rank + 1) * size]
        if self.drop_last or number + 1 < len(self) or not self._rest:
            return batch
        rest = np.array_split(keys[self._whole * size * ranks :], ranks)[self.rank]
        return rest if number == self._whole else np.concatenate((batch, rest))


class BalancedSampler(ClipSampler):
    """Rare classes as often as common ones: clips drawn by weight, the sum over their labels of 1000 / (count + 0.01).

    The counts are those of the labels in the sources, and the weights those of AST, SSAST and Audio-MAE. An epoch is a
    draw anew. Its clips come in crops and augmentations of their own, however often one is drawn.

    Args:
        sources: labelled ones.
        clips: drawn per epoch; None draws as many as there are.
        replacement: draw a clip several times in an epoch, perhaps. Without it each comes once at most, so that
            `clips` must be less than there are for the draw to balance anything.
        batch_size, seed, rank, world_size, drop_last: as for :class:`ClipSampler`.

    Raises:
        ValueError: nothing is labelled, or there is nothing to choose from.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        *,
        clips: int | None = None,
        replacement: bool = False,
        **options: Any,
    ):
        super().__init__(sources, **options)
        total, self.replacement = sum(self.sizes), replacement
        self.clips = total if clips is None else clips
        if not all(source.label_names for source in sources):
            raise ValueError("balanced sampling needs labels, and a source has none")
        counts = sum(source.label_counts() for source in sources)
        shares = np.divide(1000.0, counts + 0.01)
        self._weight = np.concatenate([source.label_sums(shares) for source in sources])
        drawable = int(np.count_nonzero(self._weight))
        if not replacement and self.clips >= drawable:
            raise ValueError(
                f"{self.clips} of {drawable} labelled clips per epoch, each once at most, leave nothing to balance; "
                "draw fewer, or with replacement"
            )
        if not drawable:
            raise ValueError("balanced sampling needs labels, and no clip has any")
        if drawable < total:
            _log.warning(
                "balanced sampling never draws clips without a label: %d of %d", total - drawable, total
            )
        self._divide(self.clips)

    def state_dict(self) -> dict[str, Any]:
        digest = hashlib.sha256(self._weight.tobytes()).hexdigest()
        return super().state_dict() | {
            "clips": self.clips, "replacement": self.replacement, "balance": digest,
        }  # fmt: skip

    def _order(self, epoch: int) -> np.ndarray:
        random = np.random.default_rng((self.seed, 3, epoch))
        if self.replacement:
            ends = self._weight.cumsum()
            drawn = ends.searchsorted(random.random(self.clips) * ends[-1], side="right")
        else:  # the first of exponential waiting times: a weighted draw without replacement
            with np.errstate(divide="ignore"):
                times = random.exponential(size=len(self._weight)) / self._weight
            drawn = np.argsort(times, kind="stable")[: self.clips]
        # No two draws have the same key, or they would have the same crop.
        turns = np.arange(epoch * self.clips, (epoch + 1) * self.clips)
        return np.stack((turns, drawn), axis=1)


class RepeatingSampler(ClipSampler):
    """Small classes again and again, until each has `share` of the largest one's clips in an epoch.

    Huang et al. 2022, Table 3: "We repeat and balance each class to 50% of the size of the unknown class". An epoch
    goes over a class whole as often as it can, and then over a part of it, which is another one in the next epoch.
    What is repeated comes in crops and augmentations of its own.

    Args:
        sources: labelled ones, one label a clip.
        share: of the largest class's clips that each other class has in an epoch, in (0, 1]; a class that has more
            already is left as it is.
        batch_size, seed, rank, world_size, drop_last: as for :class:`ClipSampler`.

    Raises:
        ValueError: a clip has no label or several, or the share is out of range.
    """

    def __init__(self, sources: Sequence[Source], *, share: float, **options: Any):
        super().__init__(sources, **options)
        if not 0 < share <= 1:
            raise ValueError(f"share is {share}, but a share in (0, 1] of the largest class was expected")
        classes = max(len(source.label_names) for source in sources)
        labels = np.concatenate([source.label_sums(np.arange(classes)) for source in sources])
        counts = np.concatenate([source.label_sums(np.ones(classes)) for source in sources])
        if len(odd := np.flatnonzero(counts != 1)):
            raise ValueError(
                "classes are repeated where each clip has one label; with none or several there are "
                f"{len(odd)} of {len(counts)} clips"
            )
        of_class = [members for c in range(classes) if len(members := np.flatnonzero(labels == c))]
        least = round(share * max(map(len, of_class)))
        self._members, self._counts = [], []
        for members in of_class:
            rest = max(least, len(members)) % len(members)
            for count in (max(least, len(members)) - rest, rest):
                self._members.append(members)
                self._counts.append(count)
        self.share, self._classes = share, [len(members) for members in of_class]
        self._divide(sum(self._counts))

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"share": self.share, "classes": self._classes}

    def _order(self, epoch: int) -> np.ndarray:
        keys = super()._order(epoch)
        # No two repetitions have the same key, or they would have the same crop.
        keys[:, 0] = np.arange(epoch * len(keys), (epoch + 1) * len(keys))
        return keys
