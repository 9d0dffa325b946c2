"""Which tokens the encoder sees: the Mask and every published masking strategy.

Polarity, stated once for the whole project: *kept* tokens are visible to the encoder, *masked* tokens are
the ones to be reconstructed. Tokens are time-major: token (t, f) of a grid (T', F') has the id t * F' + f.

Shapes: B clips, L tokens, K kept, M = L - K masked. Every strategy is vectorised over the batch, draws from
the `torch.Generator` it is given, runs on any device, and gives each clip the same number of kept tokens. Clips of
different lengths have a `RaggedMask`, where each keeps its own share of its own tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils import _pytree as pytree

from .words import plural

Grid = tuple[int, int]


@dataclass(frozen=True, eq=False)
class Mask:
    """The visible and the masked tokens of each clip.

    Build one with `Mask.from_keep` (which validates) or with a strategy; the constructor trusts its input.

    Attributes:
        ids_keep: (B, K) int64, the tokens the encoder sees, in the order in which it sees them.
        ids_masked: (B, L - K) int64, all others, ascending.
        num_tokens: L.
    """

    ids_keep: Tensor
    ids_masked: Tensor
    num_tokens: int

    @classmethod
    def from_keep(cls, ids_keep: Tensor | Sequence[Tensor], num_tokens: int | Sequence[int]) -> Mask:
        """The mask that keeps `ids_keep` (B, K), in that order. Waits for the device once, to validate.

        For clips of different lengths: a sequence of (K,) tensors and the number of tokens of each, which gives a
        `RaggedMask` and waits once for each clip.

        Raises:
            TypeError: `ids_keep` is not an int64 tensor, or not a sequence of them where `num_tokens` is one.
            ValueError: its shape is not (B, K) with 1 <= K <= L, an id is outside [0, L), or a clip keeps a
                token twice.
        """
        if isinstance(num_tokens, Sequence):
            return RaggedMask.from_rows(ids_keep, num_tokens)
        if not isinstance(ids_keep, Tensor) or ids_keep.dtype != torch.int64:
            given = ids_keep.dtype if isinstance(ids_keep, Tensor) else type(ids_keep).__name__
            raise TypeError(f"ids_keep must be an int64 tensor of token ids, got {given}")
        if not isinstance(num_tokens, int):
            raise TypeError(f"num_tokens must be an integer, got {type(num_tokens).__name__}")
        if ids_keep.ndim != 2 or ids_keep.shape[0] == 0 or not 1 <= ids_keep.shape[1] <= num_tokens:
            raise ValueError(
                f"ids_keep must have shape (B, K) with B >= 1 and 1 <= K <= {num_tokens}, the number of tokens; "
                f"got {tuple(ids_keep.shape)}"
            )
        low, high = ids_keep.aminmax()
        if low < 0 or high >= num_tokens:
            raise ValueError(
                f"ids_keep must lie in [0, {num_tokens}), got ids from {low.item()} to {high.item()}"
            )
        ordered = ids_keep.sort(dim=1).values
        repeated = (ordered[:, 1:] == ordered[:, :-1]).any(dim=1)
        if repeated.any():
            raise ValueError(
                f"each clip may keep a token once only; clip {int(repeated.nonzero()[0])} keeps one twice"
            )
        return cls._complete(ids_keep, num_tokens)

    @classmethod
    def _complete(cls, ids_keep: Tensor, num_tokens: int) -> Mask:
        kept = torch.zeros(ids_keep.shape[0], num_tokens, dtype=torch.uint8, device=ids_keep.device)
        kept.scatter_(1, ids_keep, 1)
        ids_masked = kept.argsort(dim=1, stable=True)[:, : num_tokens - ids_keep.shape[1]]
        return cls(ids_keep, ids_masked, num_tokens)

    @classmethod
    def _from_masked(cls, masked: Tensor, num_masked: int) -> Mask:
        """From flags (B, L), True = masked, with `num_masked` set in every row. Both id lists ascend."""
        order = masked.to(torch.uint8).argsort(dim=1, stable=True)
        num_tokens = masked.shape[1]
        return cls(order[:, : num_tokens - num_masked], order[:, num_tokens - num_masked :], num_tokens)

    def dense(self) -> Tensor:
        """(B, L) bool, True where a token is masked."""
        masked = torch.ones(
            self.ids_keep.shape[0], self.num_tokens, dtype=torch.bool, device=self.ids_keep.device
        )
        return masked.scatter(1, self.ids_keep, False)

    def to(self, device: torch.device | str) -> Mask:
        return replace(self, ids_keep=self.ids_keep.to(device), ids_masked=self.ids_masked.to(device))

    # -- strategies ------------------------------------------------------------------------------------------

    @classmethod
    def random(
        cls,
        batch: int,
        num_tokens: int,
        ratio: float,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        *,
        shared: bool = False,
    ) -> Mask:
        """Uniformly random tokens, kept in shuffled order (He et al. 2022; Audio-MAE, section 3.1).

        Keeps max(1, int(L * (1 - ratio))) tokens of each clip. `shared` draws one mask for the whole batch
        (MAE-AST's `random_mask_batched`).
        """
        keep = num_kept(num_tokens, ratio)
        noise = _rand(1 if shared else batch, num_tokens, generator, device, batch)
        shuffled = noise.argsort(dim=1)
        ids_keep, ids_masked = shuffled[:, :keep], shuffled[:, keep:].sort(dim=1).values
        if shared:
            ids_keep, ids_masked = ids_keep.repeat(batch, 1), ids_masked.repeat(batch, 1)
        return cls(ids_keep, ids_masked, num_tokens)

    @classmethod
    def time(
        cls,
        batch: int,
        grid: Grid,
        ratio: float,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
    ) -> Mask:
        """Whole time steps: keeps int(T' * (1 - ratio)) columns of the spectrogram, ascending."""
        return cls._rectangle(batch, grid, ratio, None, generator, device)

    @classmethod
    def frequency(
        cls,
        batch: int,
        grid: Grid,
        ratio: float,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
    ) -> Mask:
        """Whole frequency bands: keeps int(F' * (1 - ratio)) rows of the spectrogram, ascending."""
        return cls._rectangle(batch, grid, None, ratio, generator, device)

    @classmethod
    def time_frequency(
        cls,
        batch: int,
        grid: Grid,
        time_ratio: float,
        frequency_ratio: float,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
    ) -> Mask:
        """Audio-MAE's structured masking: time steps and frequency bands at once, kept in ascending order.

        Keeps int(T' * (1 - time_ratio)) * int(F' * (1 - frequency_ratio)) tokens: 95 of a 64x8 grid at
        0.7/0.3, 220 at 0.3/0.3.
        """
        return cls._rectangle(batch, grid, time_ratio, frequency_ratio, generator, device)

    @classmethod
    def _rectangle(cls, batch, grid, time_ratio, frequency_ratio, generator, device) -> Mask:
        def draw(size: int, ratio: float | None) -> Tensor:  # (B, kept) ascending
            keep = size if ratio is None else num_kept(size, ratio)
            return _rand(batch, size, generator, device).argsort(dim=1)[:, :keep].sort(dim=1).values

        times, bands = draw(grid[0], time_ratio), draw(grid[1], frequency_ratio)
        ids_keep = (times[:, :, None] * grid[1] + bands[:, None, :]).flatten(1)
        return cls._complete(ids_keep, grid[0] * grid[1])

    @classmethod
    def cluster(
        cls,
        batch: int,
        grid: Grid,
        ratio: float,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        *,
        upstream: bool = False,
    ) -> Mask:
        """SSAST's patch clusters: squares of 3, 4 or 5 tokens (one size per clip) at random places.

        Squares are drawn until more than the wanted number of tokens is covered; what is too much is taken
        from the last square. `upstream=True` does as the published code: squares run over the upper edge of
        the time axis into the next frequency row, token 0 is never masked, and what is too much is taken from
        the highest bands (Gong et al. 2022, section 2.2, and its code).
        """
        frames, bands = grid
        start = _starts(batch, frames * bands, generator, device)
        size = torch.randint(3, 6, (batch, 1, 1), generator=generator, device=start.device)
        if not upstream:
            return cls._grown(_squares(start, size, grid), grid, ratio)
        # Upstream numbers tokens frequency-major: f * T' + t.
        cells = _square_cells(start, size, frames)
        cells = torch.where((cells > 0) & (cells < frames * bands), cells, -1)
        masked = cls._upstream_flags(cells, frames * bands, ratio)  # (B, F' * T')
        masked = masked.view(batch, bands, frames).transpose(1, 2).flatten(1)
        return cls._from_masked(masked, _num_masked(frames * bands, ratio))

    @classmethod
    def chunk(
        cls,
        batch: int,
        grid: Grid,
        ratio: float,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        *,
        upstream: bool = False,
    ) -> Mask:
        """MAE-AST's chunks: squares of 3, 4 or 5 tokens, as in `cluster` (Baade et al. 2022, section 2.2).

        `upstream=True` does as the published code: one mask for the whole batch, squares run over the upper
        edge of the frequency axis into the next time step, and what is too much is taken from the end of the
        clip.
        """
        frames, bands = grid
        rows = min(batch, 1) if upstream else batch
        start = _starts(rows, frames * bands, generator, device)
        size = torch.randint(3, 6, (rows, 1, 1), generator=generator, device=start.device)
        if not upstream:
            return cls._grown(_squares(start, size, grid), grid, ratio)
        cells = _square_cells(start, size, bands)
        masked = cls._upstream_flags(torch.where(cells < frames * bands, cells, -1), frames * bands, ratio)
        return cls._from_masked(masked.expand(batch, -1), _num_masked(frames * bands, ratio))

    @classmethod
    def spans(
        cls,
        batch: int,
        num_tokens: int,
        ratio: float,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        *,
        length: int = 10,
        upstream: bool = False,
    ) -> Mask:
        """Spans of `length` consecutive tokens, drawn until the wanted number of tokens is masked.

        This is the documented meaning of MAE-AST's `retain_spans` (its README: 75 % masked). The published
        code has it the other way round: `upstream=True` marks spans that start anywhere with density
        1.45 / `length`, about 76.5 % of the tokens, and *keeps* what is marked, cut to the least number over
        the batch (which waits for the device); `ratio` plays no part in it.
        """
        if upstream:
            return cls._retained_spans(batch, num_tokens, length, generator, device)
        start = _starts(batch, num_tokens, generator, device)
        cells = start[:, :, None] + torch.arange(length, device=start.device)
        return cls._grown(torch.where(cells < num_tokens, cells, -1), (num_tokens, 1), ratio)

    @classmethod
    def _retained_spans(cls, batch, num_tokens, length, generator, device) -> Mask:
        if num_tokens <= length:
            raise ValueError(f"spans of {length} tokens need more than {length} tokens, got {num_tokens}")
        # One rounding for the whole batch, at least two spans: fairseq's static span masking, p = 1.45.
        jitter = _rand(1, 1, generator, device).item()
        spans = min(max(2, int(1.45 * num_tokens / length + jitter)), num_tokens - length)
        start = _rand(batch, num_tokens - length, generator, device).argsort(dim=1)[:, :spans]
        cells = (start[:, :, None] + torch.arange(length, device=start.device)).flatten(1)
        marked = torch.zeros(batch, num_tokens, device=start.device).scatter(1, cells, 1.0)
        keep = int(marked.sum(dim=1).min())
        noise = _rand(batch, num_tokens, generator, device)
        ids_keep = (marked + noise).topk(keep, dim=1).indices.sort(dim=1).values
        return cls._complete(ids_keep, num_tokens)

    @classmethod
    def _grown(cls, cells: Tensor, grid: Grid, ratio: float) -> Mask:
        """Masks shape after shape (cells (B, S, C), -1 = nothing) until the number of tokens is reached."""
        num_tokens = grid[0] * grid[1]
        num_masked = _num_masked(num_tokens, ratio)
        order = _first_covered(cells, num_tokens).argsort(dim=1, stable=True)
        masked = torch.zeros(cells.shape[0], num_tokens, dtype=torch.bool, device=cells.device)
        return cls._from_masked(masked.scatter(1, order[:, :num_masked], True), num_masked)

    @staticmethod
    def _upstream_flags(cells: Tensor, num_tokens: int, ratio: float) -> Tensor:
        """As published: whole shapes until *more* than enough is covered, then without the highest ids."""
        num_masked = _num_masked(num_tokens, ratio)
        first = _first_covered(cells, num_tokens)
        enough = first.sort(dim=1).values[:, min(num_masked, num_tokens - 1), None]
        covered = (first <= enough) & (first < cells.shape[1])
        return covered & (covered.cumsum(dim=1) <= num_masked)

    @classmethod
    def draw(
        cls,
        strategy: str,
        batch: int,
        grid: Grid | Sequence[Grid],
        ratio: float | tuple[float, float],
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
    ) -> Mask:
        """A mask by the name of its strategy, one of `STRATEGIES`.

        `time_frequency` takes a pair of ratios; a single number serves both axes. A sequence of `batch` grids gives
        a `RaggedMask`: clips of one grid are drawn together, so that what a strategy shares within a batch is
        shared among them.
        """
        check_ratio(strategy, ratio)
        if not isinstance(grid[0], int):
            if len(grid) != batch:
                raise ValueError(f"a mask for {plural(batch, 'clip')} needs as many grids, got {len(grid)}")
            return RaggedMask.drawn(
                grid, lambda rows, size: cls.draw(strategy, rows, size, ratio, generator, device)
            )
        upstream = strategy.endswith(UPSTREAM)
        kind = strategy.removesuffix(UPSTREAM)
        common = {"generator": generator, "device": device}
        if kind == "time_frequency":
            times, bands = ratio if isinstance(ratio, tuple) else (ratio, ratio)
            return cls.time_frequency(batch, grid, times, bands, **common)
        if kind in ("random", "random_shared"):
            return cls.random(batch, grid[0] * grid[1], ratio, shared=kind == "random_shared", **common)
        if kind == "spans":
            return cls.spans(batch, grid[0] * grid[1], ratio, upstream=upstream, **common)
        if kind in ("cluster", "chunk"):
            return getattr(cls, kind)(batch, grid, ratio, upstream=upstream, **common)
        return getattr(cls, kind)(batch, grid, ratio, **common)


@dataclass(frozen=True, eq=False)
class RaggedMask(Mask):
    """The visible and the masked tokens of clips with different numbers of tokens.

    Build one with `Mask.from_keep` or `Mask.draw`, given the number of tokens, or the grid, of each clip.

    Attributes:
        ids_keep: (B, K) int64, K that of the clip with most; a row's own `kept[i]` tokens, then -1.
        ids_masked: (B, M) int64, likewise with `masked[i]`.
        num_tokens: L of the longest clip.
        kept, masked: how many tokens of each clip are, on the host.
    """

    kept: tuple[int, ...]
    masked: tuple[int, ...]

    @property
    def tokens(self) -> tuple[int, ...]:
        """L of each clip."""
        return tuple(k + m for k, m in zip(self.kept, self.masked, strict=True))

    @classmethod
    def join(cls, masks: Sequence[Mask]) -> RaggedMask:
        """Of masks of one row each."""
        keep, masked = [mask.ids_keep[0] for mask in masks], [mask.ids_masked[0] for mask in masks]
        return cls(
            pad_sequence(keep, batch_first=True, padding_value=-1),
            pad_sequence(masked, batch_first=True, padding_value=-1),
            max(mask.num_tokens for mask in masks),
            tuple(map(len, keep)),
            tuple(map(len, masked)),
        )

    @classmethod
    def from_rows(cls, ids_keep: Sequence[Tensor], num_tokens: Sequence[int]) -> RaggedMask:
        """`Mask.from_keep` clip by clip."""
        if isinstance(ids_keep, Tensor) or not all(isinstance(ids, Tensor) for ids in ids_keep):
            raise TypeError(
                "with num_tokens for each clip, ids_keep must be a sequence of int64 tensors (K,)"
            )
        if len(ids_keep) != len(num_tokens) or not len(ids_keep):
            raise ValueError(
                f"a number of tokens belongs to each clip, got {len(num_tokens)} for {plural(len(ids_keep), 'clip')}"
            )
        return cls.join([Mask.from_keep(ids[None], n) for ids, n in zip(ids_keep, num_tokens, strict=True)])

    @classmethod
    def drawn(cls, grids: Sequence[Grid], draw: Callable[[int, Grid], Mask]) -> RaggedMask:
        """`draw(number of clips, grid)` for the clips of each grid."""
        masks: dict[int, Mask] = {}
        for grid in dict.fromkeys(grids):
            clips = [i for i, other in enumerate(grids) if other == grid]
            mask = draw(len(clips), grid)
            rows = zip(mask.ids_keep.split(1), mask.ids_masked.split(1), strict=True)
            masks |= {i: Mask(*ids, mask.num_tokens) for i, ids in zip(clips, rows, strict=True)}
        return cls.join([masks[i] for i in range(len(grids))])

    @classmethod
    def everything(cls, tokens: Sequence[int], device: torch.device | str | None = None) -> RaggedMask:
        """Keeps all tokens of each clip, ascending."""
        ids = torch.arange(max(tokens), device=device)
        nothing = ids[:0]
        return cls.join([Mask(ids[None, :n], nothing[None], n) for n in tokens])

    def dense(self) -> Tensor:
        """(B, L) bool, True where a token is masked; False beyond a clip's end."""
        shape = (self.ids_keep.shape[0], self.num_tokens + 1)  # the last place takes the -1
        masked = torch.zeros(shape, dtype=torch.bool, device=self.ids_keep.device)
        ids = torch.where(self.ids_masked < 0, self.num_tokens, self.ids_masked)
        return masked.scatter(1, ids, True)[:, :-1]


UPSTREAM = "_upstream"
STRATEGIES = (
    "random",
    "random_shared",
    "time",
    "frequency",
    "time_frequency",
    "cluster",
    "chunk",
    "spans",
    "cluster_upstream",
    "chunk_upstream",
    "spans_upstream",
)
SHARED = ("random_shared", "chunk_upstream")  # one mask for the whole batch

pytree.register_pytree_node(
    Mask,
    lambda mask: ([mask.ids_keep, mask.ids_masked], mask.num_tokens),
    lambda ids, num_tokens: Mask(*ids, num_tokens),
    serialized_type_name="audiomae.Mask",
    flatten_with_keys_fn=lambda mask: (
        [(pytree.GetAttrKey(name), getattr(mask, name)) for name in ("ids_keep", "ids_masked")],
        mask.num_tokens,
    ),
)

pytree.register_pytree_node(
    RaggedMask,
    lambda mask: ([mask.ids_keep, mask.ids_masked], (mask.num_tokens, mask.kept, mask.masked)),
    lambda ids, sizes: RaggedMask(*ids, *sizes),
    serialized_type_name="audiomae.RaggedMask",
    flatten_with_keys_fn=lambda mask: (
        [(pytree.GetAttrKey(name), getattr(mask, name)) for name in ("ids_keep", "ids_masked")],
        (mask.num_tokens, mask.kept, mask.masked),
    ),
)


def check_ratio(strategy: str, ratio: float | tuple[float, float]) -> None:
    """Refuses an unknown strategy, and a ratio that leaves nothing to see or nothing to predict."""
    if strategy not in STRATEGIES:
        raise ValueError(f"unknown masking strategy {strategy!r}; there are {', '.join(STRATEGIES)}")
    pair = " or a pair (time, frequency)" if strategy == "time_frequency" else ""
    values = ratio if isinstance(ratio, tuple) else (ratio,)
    if len(values) not in ((1, 2) if pair else (1,)) or not all(isinstance(v, (int, float)) for v in values):
        raise ValueError(f"masking strategy {strategy!r} takes one ratio{pair}, got {ratio!r}")
    for value in values:
        _check_ratio(value)


def _check_ratio(ratio: float) -> None:
    if not 0.0 < ratio < 1.0:
        raise ValueError(f"the mask ratio must lie between 0 and 1, both excluded, got {ratio}")


def num_kept(num_tokens: int, ratio: float) -> int:
    """Visible tokens at a mask ratio: max(1, int(L * (1 - ratio))), as published."""
    _check_ratio(ratio)
    return max(1, int(num_tokens * (1.0 - ratio)))


def _num_masked(num_tokens: int, ratio: float) -> int:
    return num_tokens - num_kept(num_tokens, ratio)


def _device(generator: torch.Generator | None, device: torch.device | str | None):
    return generator.device if device is None and generator is not None else device


def _rand(rows: int, columns: int, generator, device, batch: int | None = None) -> Tensor:
    if (rows if batch is None else batch) < 1 or columns < 1:
        raise ValueError(f"a mask needs at least one clip and one token, got {rows} and {columns}")
    return torch.rand(rows, columns, generator=generator, device=_device(generator, device))


def _starts(rows: int, num_tokens: int, generator, device) -> Tensor:
    """(rows, 2L) places at which shapes begin: L uniform draws, as published, then each token once.

    The tail makes sure that enough is covered at any ratio, without a loop that waits for the device.
    """
    tail = _rand(rows, num_tokens, generator, device).argsort(dim=1)
    draws = torch.randint(num_tokens, (rows, num_tokens), generator=generator, device=tail.device)
    return torch.cat([draws, tail], dim=1)


def _offsets(device) -> tuple[Tensor, Tensor]:
    cells = torch.arange(25, device=device)
    return cells // 5, cells % 5


def _squares(start: Tensor, size: Tensor, grid: Grid) -> Tensor:
    """(B, S, 25) token ids of squares that end at the grid's edges, -1 where a cell is not in the square."""
    i, j = _offsets(start.device)
    t = start[:, :, None] // grid[1] + i
    f = start[:, :, None] % grid[1] + j
    inside = (i < size) & (j < size) & (t < grid[0]) & (f < grid[1])
    return torch.where(inside, t * grid[1] + f, -1)


def _square_cells(start: Tensor, size: Tensor, row: int) -> Tensor:
    """(B, S, 25) ids start + row * i + j, edges ignored; far too large where not in the square."""
    i, j = _offsets(start.device)
    return torch.where((i < size) & (j < size), start[:, :, None] + row * i + j, torch.iinfo(torch.int64).max)


def _first_covered(cells: Tensor, num_tokens: int) -> Tensor:
    """(B, L): the number of the first shape that covers a token; the number of shapes where none does."""
    rows, shapes, _ = cells.shape
    number = torch.arange(shapes, device=cells.device)[None, :, None].expand_as(cells)
    first = torch.full((rows, num_tokens + 1), shapes, device=cells.device)
    slot = torch.where(cells < 0, num_tokens, cells)  # the extra slot takes what covers nothing
    return first.scatter_reduce(1, slot.flatten(1), number.flatten(1), "amin")[:, :num_tokens]
