"""What a training step has to compute and move, derived from a model's configuration.

Counted: the matrix products of the published algorithm (2 FLOPs per multiply-add), with prediction heads on
masked tokens and embeddings of the tokens that need one. Not counted: norms, activations, losses. A training
step is three forward passes: each product has two more in the backward pass, for its input and its weight.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

# AdamW in fp32 reads the parameter, its gradient and both moments, and writes all but the gradient.
OPTIMIZER_BYTES = 7 * 4


@dataclass
class Part:
    """Products of one part of a model, per clip.

    Attributes:
        linears: (rows, inputs, outputs) -> how often: (rows, inputs) x (inputs, outputs) products.
        attention: FLOPs of the scores and of the weighted sums.
    """

    linears: Counter = field(default_factory=Counter)
    attention: float = 0.0

    @property
    def flops(self) -> float:
        return sum(2.0 * m * k * n * count for (m, k, n), count in self.linears.items()) + self.attention

    def scaled(self, times: int) -> Part:
        return Part(
            Counter({shape: count * times for shape, count in self.linears.items()}), self.attention * times
        )


def transformer(tokens: int, width: int, depth: int, window: int | None = None, mlp_ratio: float = 4) -> Part:
    """`depth` blocks over `tokens` tokens; each attends `window` tokens (None: all)."""
    hidden = int(mlp_ratio * width)
    shapes = [(width, 3 * width), (width, width), (width, hidden), (hidden, width)]
    linears = Counter({(tokens, k, n): depth for k, n in shapes})
    return Part(linears, 4.0 * depth * tokens * (window or tokens) * width)


def cross_transformer(
    queries: int, width: int, depth: int, memory: int, memory_width: int, layers: int, mlp_ratio: float = 4
) -> Part:
    """`depth` blocks in which `queries` tokens attend to `memory` tokens, mixed anew from `layers` for each block."""
    hidden = int(mlp_ratio * width)
    shapes = [(width, width), (width, width), (width, hidden), (hidden, width)]
    linears = Counter()
    for k, n in shapes:
        linears[queries, k, n] += depth
    linears[memory, memory_width, 2 * width] += depth
    linears[memory * memory_width, layers, depth] += 1
    return Part(linears, 4.0 * depth * queries * memory * width)


@dataclass(frozen=True)
class Cost:
    """A model's parts, per clip, by name ("embed", "encoder", "decoder", "heads")."""

    parts: dict[str, Part]

    @property
    def flops(self) -> float:
        """FLOPs of one clip's forward pass."""
        return sum(part.flops for part in self.parts.values())

    @property
    def attention(self) -> float:
        return sum(part.attention for part in self.parts.values())

    @property
    def linears(self) -> Counter:
        return sum((part.linears for part in self.parts.values()), Counter())


def linear(rows: int, inputs: int, outputs: int, times: int = 1) -> Part:
    return Part(Counter({(rows, inputs, outputs): times}))


def cost(config, kept: int, frames: int) -> Cost:
    """The forward pass of one clip.

    Args:
        config: an `MAEConfig` with a window, global or cross decoder, or an `SSASTConfig`. Of `decode_ratio` a
            cross decoder alone: how many masked tokens a share of the windows holds depends on the mask.
        kept: visible tokens.
        frames: of the clip.
    """
    rows, columns = config.grid(frames)
    tokens = rows * columns
    masked, values, width = tokens - kept, config.patch_values, config.width
    if config.family == "ssast":
        heads = Part(linears=Counter({(masked, width, width): 2, (masked, width, values): 2}))
        return Cost(
            {
                "embed": linear(kept, values, width, config.passes),
                "encoder": transformer(
                    tokens + config.prefix_tokens, width, config.depth, mlp_ratio=config.mlp_ratio
                ).scaled(config.passes),
                "heads": heads,
            }
        )
    if config.decoder not in ("window", "global", "cross"):
        raise ValueError(
            f'the cost model knows the decoders "window", "global" and "cross", not {config.decoder!r}.'
        )
    if config.decoder == "window" and config.decode_ratio < 1.0:
        raise ValueError("the cost model knows no share of the windows: decode_ratio must be 1.0.")
    prefix = config.prefix_tokens
    if config.decoder == "cross":
        masked = min(masked, max(1, int(masked * config.decode_ratio)))
    if config.decoder == "window":
        window, decoded = config.window[0] * config.window[1], tokens
    else:
        window, decoded = None, tokens + prefix
    parts = {
        "embed": linear(kept, values, width),
        "encoder": transformer(kept + prefix, width, config.depth, mlp_ratio=config.mlp_ratio),
        "decoder": cross_transformer(
            masked,
            config.decoder_width,
            config.num_decoder_blocks,
            kept + prefix,
            width,
            config.depth,
            config.mlp_ratio,
        )
        if config.decoder == "cross"
        else transformer(decoded, config.decoder_width, config.num_decoder_blocks, window, config.mlp_ratio),
        "heads": linear(masked, config.decoder_width, values, 2 if config.info_nce_weight > 0 else 1),
    }
    if config.decoder_width != width and config.decoder != "cross":
        parts["bridge"] = linear(kept + prefix, width, config.decoder_width)
    return Cost(parts)
