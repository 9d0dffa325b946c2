"""What a training step has to compute and move, derived from a model's configuration.

Counted: the matrix products of the published algorithm (2 FLOPs per multiply-add), with prediction heads on
masked tokens and embeddings of the tokens that need one. Not counted: norms, activations, losses. A training
step is three forward passes: each product has two more in the backward pass, for its input and its weight.
Inference and embeddings are one.
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


def transformer(
    tokens: int,
    width: int,
    depth: int,
    window: int | None = None,
    mlp_ratio: float = 4,
    last: int | None = None,
) -> Part:
    """`depth` blocks over `tokens` tokens; each attends `window` tokens (None: all).

    Args:
        last: tokens whose output of the last block is read (None: all of them): its other tokens leave after the
            attention.
    """
    hidden = round(mlp_ratio * width)
    qkv, tail = (width, 3 * width), [(width, width), (width, hidden), (hidden, width)]
    last = tokens if last is None else last
    linears = Counter({(tokens, *qkv): depth})
    for k, n in tail:
        linears[tokens, k, n] += depth - 1
        linears[last, k, n] += 1
    return Part(+linears, 4.0 * depth * tokens * (window or tokens) * width)


def cross_attention(
    decoded: int, kept: int, width: int, memory: int, depth: int, layers: int, mlp_ratio: float
) -> Part:
    """`depth` blocks in which `decoded` tokens attend `kept` ones and pass an MLP.

    Each reads a weighted sum of the outputs of `layers` encoder blocks of width `memory`, counted with attention's.
    """
    hidden = round(mlp_ratio * width)
    shapes = [(decoded, width, width)] * 2 + [(kept, memory, 2 * width)]
    shapes += [(decoded, width, hidden), (decoded, hidden, width)]
    linears = Counter()
    for shape in shapes:
        linears[shape] += depth
    return Part(linears, 4.0 * depth * decoded * kept * width + 2.0 * depth * layers * kept * memory)


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


def cost(config, kept: int, frames: int, least: bool = False) -> Cost:
    """The forward pass of one clip, with its losses' predictions.

    Args:
        config: an `MAEConfig` with a decoder, or an `SSASTConfig`. Of `decode_ratio` a cross decoder alone: how many
            masked tokens a share of the windows holds depends on the mask.
        kept: visible tokens.
        frames: of the clip.
        least: leave out what nobody reads: the visible tokens after the last attention of a decoder. The published
            algorithms compute it.
    """
    rows, columns = config.grid(frames)
    tokens = rows * columns
    masked, values, width = tokens - kept, config.patch_values, config.width
    if config.family == "ssast":
        encoder = transformer(
            tokens + config.prefix_tokens,
            width,
            config.depth,
            mlp_ratio=config.mlp_ratio,
            last=masked if least else None,
        )
        return Cost(
            {
                "embed": linear(kept, values, width, config.passes),
                "encoder": encoder.scaled(config.passes),
                "heads": Part(linears=Counter({(masked, width, width): 2, (masked, width, values): 2})),
            }
        )
    prefix = config.prefix_tokens
    if config.decoder == "window" and config.decode_ratio < 1.0:
        raise ValueError("the cost model knows no share of the windows: decode_ratio must be 1.0.")
    if config.decoder == "cross":
        masked = min(masked, max(1, int(masked * config.decode_ratio)))
    parts = {
        "embed": linear(kept, values, width),
        "encoder": transformer(kept + prefix, width, config.depth, mlp_ratio=config.mlp_ratio),
        "decoder": _decoder(config, tokens, kept, masked, masked if least else None),
        "heads": linear(masked, config.decoder_width, values, 2 if config.info_nce_weight > 0 else 1),
    }
    # The cross decoder's blocks read the encoder's output through projections of their own.
    if config.decoder != "cross" and (config.decoder_width != width or config.norm == "pre"):
        parts["bridge"] = linear(kept + prefix, width, config.decoder_width)
    return Cost(parts)


def _decoder(config, tokens: int, kept: int, masked: int, last: int | None) -> Part:
    width, depth, prefix = config.decoder_width, config.num_decoder_blocks, config.prefix_tokens
    window = config.window[0] * config.window[1]
    ratio = config.mlp_ratio
    if config.decoder == "window":
        return transformer(tokens, width, depth, window, ratio, last)
    if config.decoder == "global":
        return transformer(tokens + prefix, width, depth, None, ratio, last)
    if config.decoder == "hybrid":
        local = transformer(tokens, width, depth - config.global_blocks, window, ratio)
        wide = transformer(tokens, width, config.global_blocks, None, ratio, last)
        return Part(local.linears + wide.linears, local.attention + wide.attention)
    if config.decoder == "cross":
        return cross_attention(masked, kept + prefix, width, config.width, depth, config.depth, ratio)
    raise ValueError(f"the cost model knows no decoder {config.decoder!r}.")


def encoding_cost(config, frames: int) -> Cost:
    """One clip's embeddings: every token embedded and through the encoder."""
    rows, columns = config.grid(frames)
    tokens = rows * columns
    encoder = transformer(
        tokens + config.prefix_tokens, config.width, config.depth, mlp_ratio=config.mlp_ratio
    )
    return Cost({"embed": linear(tokens, config.patch_values, config.width), "encoder": encoder})
