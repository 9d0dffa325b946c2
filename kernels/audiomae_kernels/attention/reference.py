"""Multi-head self-attention with dropout of its weights, in plain PyTorch, and the random numbers of that dropout."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from audiomae_kernels._library import loss_dtype

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_LOW = 0xFFFFFFFF
_STEPS = 1 << 16  # of a rate: a weight's fate takes 16 random bits


def philox(counter: tuple[Tensor, ...], key: tuple[Tensor, Tensor], rounds: int = 7) -> tuple[Tensor, ...]:
    """Philox-4x32 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011).

    Args:
        counter: four int64 tensors that broadcast, each in [0, 2^32).
        key: two more.
        rounds: 7 is the fewest that the authors found to pass BigCrush.

    Returns:
        Four int64 tensors, random in [0, 2^32).
    """
    a, b, c, d = counter
    for i in range(rounds):
        k0, k1 = ((k + i * step) & _LOW for k, step in zip(key, _WEYL, strict=True))
        p0, p1 = a * _MULTIPLIERS[0], c * _MULTIPLIERS[1]  # modulo 2^64: the bits are those of uint64
        a, b, c, d = (p1 >> 32) & _LOW ^ b ^ k0, p1 & _LOW, (p0 >> 32) & _LOW ^ d ^ k1, p0 & _LOW
    return a, b, c, d


def rounded_rate(dropout: float) -> float:
    """The rate in force: a multiple of 2^-16, less than 1."""
    return min(round(dropout * _STEPS), _STEPS - 1) / _STEPS


def dropout_mask(seed: Tensor, clips: int | range, heads: int, length: int, dropout: float) -> Tensor:
    """(clips, H, L, L) bool: which weights (of queries x keys) stay.

    A weight stays if 16 random bits are not less than ``dropout * 2^16``. They are of `philox` with the counter
    ``(key, query // 8, head, clip)`` under the seed's low and high word as key: ``query % 8`` names one of
    the halves of its four words, low half first.
    """
    device = seed.device
    clips = (
        torch.arange(clips, device=device) if isinstance(clips, int) else torch.tensor(clips, device=device)
    )
    keys, groups = torch.arange(length, device=device), torch.arange(-(-length // 8), device=device)
    seed = seed.reshape(())
    words = philox(
        (
            keys,
            groups[:, None],
            torch.arange(heads, device=device)[:, None, None],
            clips[:, None, None, None],
        ),
        (seed & _LOW, (seed >> 32) & _LOW),
    )
    bits = torch.stack([half for word in words for half in (word & 0xFFFF, word >> 16)], 3)
    return bits.flatten(2, 3)[:, :, :length] >= rounded_rate(dropout) * _STEPS


def attention_ref(
    qkv: Tensor,
    cu_seqlens: Tensor | None = None,
    seed: Tensor | None = None,
    *,
    dropout: float = 0.0,
    upcast: bool = True,
) -> Tensor:
    """`audiomae_kernels.attention`, in float32 (float64) or, without `upcast`, in the dtype of qkv."""
    return attention_forward_ref(qkv, cu_seqlens, seed, dropout=dropout, upcast=upcast)[0]


def attention_forward_ref(
    qkv: Tensor, cu_seqlens: Tensor | None, seed: Tensor | None, *, dropout: float, upcast: bool = True
) -> tuple[Tensor, Tensor]:
    """The output and, for the backward pass, the (..., H, 2) statistics of each row of scores: the highest one, and the
    logarithm of the sum of e^(score - highest). Added up they would lose digits where scores are large.
    """
    outs, statistics = [], []
    for clips, part in _clips(cu_seqlens, qkv):
        q, k, v = _heads(part, upcast)
        scores = q @ k.mT * max(1, q.shape[-1]) ** -0.5
        weights = _drop(scores.softmax(-1), seed, clips, dropout)
        outs.append((weights @ v).transpose(1, 2).flatten(2).to(qkv.dtype))
        scores = scores.to(loss_dtype(qkv))
        highest = (
            scores.amax(-1, keepdim=True) if scores.shape[-1] else scores.new_empty(*scores.shape[:-1], 1)
        )
        of_rows = torch.cat([highest, (scores - highest).exp().sum(-1, keepdim=True).log()], -1)
        statistics.append(of_rows.transpose(1, 2))
    return tuple(_joined(parts, cu_seqlens) for parts in (outs, statistics))


def attention_backward_ref(
    grad: Tensor,
    qkv: Tensor,
    out: Tensor,
    statistics: Tensor,
    cu_seqlens: Tensor | None,
    seed: Tensor | None,
    *,
    dropout: float,
) -> Tensor:
    """Gradient of qkv; the weights are computed again from the statistics."""
    grads = []
    H, d = qkv.shape[-2:]
    for (clips, part), *parts in zip(
        *(
            _clips(cu_seqlens, x)
            for x in (qkv, grad.unflatten(-1, (H, d)), out.unflatten(-1, (H, d)), statistics)
        ),
        strict=True,
    ):
        q, k, v = _heads(part, upcast=True)
        d_out, o = (x.to(q.dtype).transpose(1, 2) for _, x in parts[:2])
        scale = max(1, d) ** -0.5
        highest, log_sum = parts[2][1].transpose(1, 2).split(1, dim=-1)
        weights = (q @ k.mT * scale - highest - log_sum).exp()
        d_v = _drop(weights, seed, clips, dropout).mT @ d_out
        d_weights = _drop(d_out @ v.mT, seed, clips, dropout)
        d_scores = weights * (d_weights - (d_out * o).sum(-1, keepdim=True)) * scale
        d_part = torch.stack([d_scores @ k, d_scores.mT @ q, d_v], 2)  # (B, H, 3, L, d)
        grads.append(d_part.permute(0, 3, 2, 1, 4).to(qkv.dtype))
    return _joined(grads, cu_seqlens).contiguous()


def _clips(cu_seqlens: Tensor | None, x: Tensor) -> list[tuple[int | range, Tensor]]:
    """Batches of clips of one length, and the numbers of these clips: all of a dense batch, one of a packed one."""
    if cu_seqlens is None:
        return [(x.shape[0], x)]
    ends = cu_seqlens.tolist()
    if not ends or ends[0] != 0 or ends[-1] != x.shape[0] or ends != sorted(ends):
        raise RuntimeError(
            f"attention expects cu_seqlens that rise from 0 to the number of tokens, {x.shape[0]}."
        )
    clips = [(range(i, i + 1), x[None, a:b]) for i, (a, b) in enumerate(pairwise(ends))]
    return clips or [(range(1), x[None])]


def _joined(parts: list[Tensor], cu_seqlens: Tensor | None) -> Tensor:
    return parts[0].contiguous() if cu_seqlens is None else torch.cat(parts, 1)[0]


def _heads(qkv: Tensor, upcast: bool) -> tuple[Tensor, ...]:
    """(B, L, 3, H, d) -> three of (B, H, L, d)."""
    return qkv.to(loss_dtype(qkv) if upcast else qkv.dtype).permute(2, 0, 3, 1, 4).unbind(0)


def _drop(weights: Tensor, seed: Tensor | None, clips: int | range, dropout: float) -> Tensor:
    if dropout == 0.0:
        return weights
    mask = dropout_mask(seed, clips, *weights.shape[1:3], dropout).to(weights.device)
    return weights * mask / (1 - rounded_rate(dropout))
