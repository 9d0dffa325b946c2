"""Batches of clips of different lengths, packed one after the other: nothing padded is computed.

The ops know dense batches only, and one row serves them: the clips' frames, each clip filled up with zeros to whole
patches, make one long spectrogram (`Clips.join`), in whose grid every token has an id. So the patches of all rows are
gathered, put back among the mask tokens and scored in one call each. Rows lie in the order of their number of tokens,
so that those of equal length are neighbours: for attention in windows, and for InfoNCE, they are a dense batch without
a copy (`Rows.runs`). All sizes are known on the host, and nothing waits for a device.

Shapes as in `model.py`; `total` counts the tokens of all rows, those of the prefix included where there is one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby

import torch
from audiomae_kernels import info_nce
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from .attention import on_device
from .config import EncoderConfig
from .masking import Grid, Mask, RaggedMask


@dataclass(frozen=True)
class Clips:
    """The clips of a ragged batch.

    Attributes:
        frames: valid frames of each.
        grids: (T', F') of each, filled up to whole patches.
        spans: frames of each in the long spectrogram: whole patches, and a whole number of steps between patches.
        step: frames from patch to patch.
    """

    frames: tuple[int, ...]
    grids: tuple[Grid, ...]
    spans: tuple[int, ...]
    step: int

    @classmethod
    def of(cls, lengths: Sequence[int], c: EncoderConfig, max_steps: int | None) -> Clips:
        """Frames that would begin a patch beyond the last position are left out, as in a clip of full length."""
        grids = tuple(c.grid_of_filled(n) for n in lengths)
        if max_steps is not None:
            grids = tuple((min(steps, max_steps), bands) for steps, bands in grids)
        step = c.step[0]
        whole = -(-c.patch[0] // step) * step
        return cls(tuple(lengths), grids, tuple((t - 1) * step + whole for t, _ in grids), step)

    @property
    def tokens(self) -> tuple[int, ...]:
        return tuple(steps * bands for steps, bands in self.grids)

    def valid(self, spectrogram: Tensor) -> Tensor:
        """(B, T, F) -> (frames, F): all that is no padding."""
        return torch.cat([clip[:n] for clip, n in zip(spectrogram, self.frames, strict=True)])

    def join(self, spectrogram: Tensor) -> Tensor:
        """(B, T, F) -> (1, frames, F): the long spectrogram. What padding held is nowhere in it."""
        pieces = []
        for clip, frames, span in zip(spectrogram, self.frames, self.spans, strict=True):
            clip = clip[: min(frames, span)]
            pieces += [clip, clip.new_zeros(span - clip.shape[0], clip.shape[1])]
        return torch.cat(pieces)[None]


class Rows:
    """The packed rows of a ragged batch: R = B * m rows of a mask, row i of clip i // m.

    Attributes:
        grids: (T', F') of each row; this and all below in packed order.
        kept, masked: tokens of each row.
        ids_keep, ids_masked: (1, total) places of these among all tokens of all rows.
        patches_keep, patches_masked: (1, total) the same tokens in the grid of the long spectrogram.
    """

    def __init__(self, clips: Clips, mask: RaggedMask):
        rows, device = len(mask.kept), mask.ids_keep.device
        clip_of = [row * len(clips.grids) // rows for row in range(rows)]
        tokens = [clips.tokens[clip] for clip in clip_of]
        self.order = sorted(range(rows), key=lambda row: (tokens[row], mask.kept[row]))
        self.grids = [clips.grids[clip_of[row]] for row in self.order]
        self.kept = [mask.kept[row] for row in self.order]
        self.masked = [mask.masked[row] for row in self.order]

        bands = clips.grids[0][1]
        first_steps = [0, *accumulate(span // clips.step for span in clips.spans)]
        in_spectrogram = [first_steps[clip] * bands for clip in clip_of]
        places = accumulate((tokens[row] for row in self.order), initial=0)
        in_batch = [place for _, place in sorted(zip(self.order, places, strict=False))]

        def packed(ids: Tensor, counts: Sequence[int], first: Sequence[int]) -> Tensor:
            ids = ids + on_device(first, torch.int64, device)[:, None]
            return torch.cat([ids[row, :n] for row, n in zip(self.order, counts, strict=True)])[None]

        self.ids_keep = packed(mask.ids_keep, self.kept, in_batch)
        self.ids_masked = packed(mask.ids_masked, self.masked, in_batch)
        self.patches_keep = packed(mask.ids_keep, self.kept, in_spectrogram)
        self.patches_masked = packed(mask.ids_masked, self.masked, in_spectrogram)

    @property
    def tokens(self) -> list[int]:
        return [steps * bands for steps, bands in self.grids]

    def masked_after(self, prefix: int) -> Tensor:
        """(total,) places of the masked tokens among all, where `prefix` tokens stand before each row's."""
        ids = self.ids_masked[0]
        if not prefix:
            return ids
        return torch.cat([x + prefix * row for row, x in enumerate(ids.split(self.masked), start=1)])

    @staticmethod
    def add_prefix(prefix: Sequence[Tensor], x: Tensor, counts: Sequence[int]) -> Tensor:
        """(P, D) of each row before its `counts[i]` tokens of x (total, D)."""
        pairs = zip(prefix, x.split(list(counts)), strict=True)
        return torch.cat([piece for pair in pairs for piece in pair])

    @staticmethod
    def cut_prefix(x: Tensor, counts: Sequence[int], prefix: int) -> tuple[Sequence[Tensor], Tensor]:
        """Undoes `add_prefix`."""
        if not prefix:
            return [x[:0]] * len(counts), x
        pieces = x.split([n for count in counts for n in (prefix, count)])
        return pieces[::2], torch.cat(pieces[1::2])

    def unpack_masked(self, x: Tensor | None) -> Tensor | None:
        """(1, total, V) of the masked tokens -> (R, M, V)."""
        return None if x is None else self.unpack(x[0], self.masked)

    def unpack(self, x: Tensor, counts: Sequence[int]) -> Tensor:
        """(total, ...) -> (R, most of a row, ...) in the order of the mask's rows, zeros after a row's own."""
        rows = x.split(list(counts))
        return pad_sequence([rows[place] for place in self._places], batch_first=True)

    @property
    def _places(self) -> list[int]:
        return sorted(range(len(self.order)), key=self.order.__getitem__)


def runs(x: Tensor, sizes: Sequence, counts: Sequence[int]) -> Iterator[tuple]:
    """Rows of x (total, ...) that are neighbours and have equal `sizes`: (size, (rows, count, ...)) for each."""
    lengths = dict(zip(sizes, counts, strict=True))
    equal = [(size, len(list(rows))) for size, rows in groupby(sizes)]
    parts = x.split([rows * lengths[size] for size, rows in equal])
    for (size, rows), part in zip(equal, parts, strict=True):
        yield size, part.unflatten(0, (rows, lengths[size]))


def ragged_info_nce(
    pred: Tensor, target: Tensor, counts: Sequence[int], over: str, impl: str | None
) -> Tensor:
    """`info_nce` within each row's own tokens; pred and target (total, V). One call for each run of equal counts.

    Mean over all tokens of all rows, as for rows of one length.
    """
    loss = pred.new_zeros((), dtype=torch.promote_types(pred.dtype, torch.float32))
    for (_, x), (_, y) in zip(runs(pred, counts, counts), runs(target, counts, counts), strict=True):
        share = x.shape[0] * x.shape[1] / max(1, sum(counts))
        loss = loss + share * info_nce(x, y, over=over, impl=impl)
    return loss


def as_ragged(mask: Mask) -> RaggedMask:
    """A dense mask serves where all clips have the same number of tokens."""
    if isinstance(mask, RaggedMask):
        return mask
    rows, kept = mask.ids_keep.shape
    return RaggedMask(
        mask.ids_keep, mask.ids_masked, mask.num_tokens, (kept,) * rows, (mask.num_tokens - kept,) * rows
    )
