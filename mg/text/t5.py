"""The T5 encoder (arXiv 1910.10683): one vector per token; any size, versions 1.0 and 1.1.

The defaults are T5 v1.1 XXL, which Open-Sora, PixArt and DeepFloyd IF encode prompts with. Layer names, and so the
names in a checkpoint, are transformers'.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, mint, nn, ops
from mindspore.common.initializer import initializer

from mg.models.config import StoredConfig, is_above_0
from mg.models.layers.precision import set_precision
from mg.models.registry import merge_config
from mg.text.layers import Dense, Embedding, MultiHeadAttention, WideDense

FEED_FORWARDS = ("relu", "gelu", "silu", "gated-relu", "gated-gelu", "gated-silu")
_MASKED = -1e9  # added to scores; exactly 0 after the softmax in fp32


@dataclass(frozen=True, eq=False)
class T5Config(StoredConfig):
    """Config of the T5 encoder, under transformers' names.

    Attributes:
        vocab_size: tokens of the embedding table.
        d_model: channels of a token.
        d_kv: channels per head.
        d_ff: channels within a feed-forward layer.
        num_layers, num_heads: blocks, and heads in each.
        relative_attention_num_buckets, relative_attention_max_distance: see `relative_position_buckets`.
        layer_norm_epsilon: of the norms.
        feed_forward_proj: one of `FEED_FORWARDS`; relu in version 1.0.
    """

    vocab_size: int = 32128
    d_model: int = 4096
    d_kv: int = 64
    d_ff: int = 10240
    num_layers: int = 24
    num_heads: int = 64
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    layer_norm_epsilon: float = 1e-6
    feed_forward_proj: str = "gated-gelu"

    def __post_init__(self):
        self.check_positive("vocab_size", "d_model", "d_kv", "d_ff", "num_layers", "num_heads")
        self.check_positive("relative_attention_num_buckets", "relative_attention_max_distance")
        buckets, distance = self.relative_attention_num_buckets, self.relative_attention_max_distance
        self.check("relative_attention_num_buckets", buckets >= 4, "at least 4")
        single = buckets // 4
        wanted = f"above {single}, the distances that have a bucket each"
        self.check("relative_attention_max_distance", distance > single, wanted)
        self.check("layer_norm_epsilon", is_above_0(self.layer_norm_epsilon), "above 0")
        self.check("feed_forward_proj", self.feed_forward_proj in FEED_FORWARDS, f"one of {', '.join(FEED_FORWARDS)}")


def relative_position_buckets(length: int, buckets: int, max_distance: int) -> np.ndarray:
    """The relative position bucket of each query and key -> (query, key), int32.

    Half of the buckets are for keys at or before the query, half for keys after it. In each half, the first half are
    for single distances, the rest for distances that grow logarithmically, up to `max_distance` and beyond. The
    logarithm is in fp32, as in the original: its rounding decides for distances at the edge of a bucket.
    """
    position = np.arange(length)
    offset = position[None, :] - position[:, None]  # from the query to the key
    half, distance = buckets // 2, np.abs(offset)
    exact = half // 2
    ratio = np.log(np.maximum(distance, 1).astype(np.float32) / np.float32(exact))
    steps = ratio / np.float32(np.log(max_distance / exact)) * np.float32(half - exact)
    far = np.minimum(exact + steps.astype(np.int64), half - 1)
    return (np.where(distance < exact, distance, far) + half * (offset > 0)).astype(np.int32)


class RMSNorm(nn.Cell):
    """x / sqrt(mean(x^2) + eps) * weight over the last axis, in fp32, without subtracting the mean and without bias."""

    def __init__(self, channels: int, eps: float):
        super().__init__()
        self.weight = Parameter(initializer("ones", (channels,)), name="weight")
        self.eps = eps

    def construct(self, x):
        return x * mint.rsqrt(mint.mean(x.square(), dim=-1, keepdim=True) + self.eps) * self.weight


class SelfAttention(nn.Cell):
    """Attention without scaling, which the weights include. The first block's has the position bias for all blocks."""

    def __init__(self, config: T5Config, dtype: str, has_bias: bool):
        super().__init__()
        width, inner = config.d_model, config.num_heads * config.d_kv
        self.q, self.k, self.v = (Dense(width, inner, dtype) for _ in range(3))
        self.o = Dense(inner, width, dtype)
        self.attention = MultiHeadAttention(config.num_heads, scale=1.0)
        if has_bias:
            self.relative_attention_bias = Embedding(config.relative_attention_num_buckets, config.num_heads)

    def construct(self, x, bias):
        return self.o(self.attention(self.q(x), self.k(x), self.v(x), bias))


class FeedForward(nn.Cell):
    """wo(f(wi x)) or, gated, wo(f(wi_0 x) * wi_1 x), with the activation in fp32.

    GELU is exact without a gate and the tanh approximation with one, as in the released models.
    """

    def __init__(self, config: T5Config, dtype: str):
        super().__init__()
        width, inner = config.d_model, config.d_ff
        self.activation = config.feed_forward_proj.removeprefix("gated-")
        self.gated = self.activation != config.feed_forward_proj
        if self.gated:
            self.wi_0, self.wi_1 = Dense(width, inner, dtype), Dense(width, inner, dtype)
        else:
            self.wi = Dense(width, inner, dtype)
        self.wo = WideDense(inner, width, dtype)

    def construct(self, x):
        if self.gated:
            return self.wo(self.activate(self.wi_0(x)) * self.wi_1(x).astype(ms.float32))
        return self.wo(self.activate(self.wi(x)))

    def activate(self, x):
        x = x.astype(ms.float32)
        if self.activation == "gelu":
            return ops.gelu(x, approximate="tanh" if self.gated else "none")
        return ops.relu(x) if self.activation == "relu" else x * mint.sigmoid(x)


class AttentionLayer(nn.Cell):
    def __init__(self, config: T5Config, dtype: str, has_bias: bool):
        super().__init__()
        self.SelfAttention = SelfAttention(config, dtype, has_bias)
        self.layer_norm = RMSNorm(config.d_model, config.layer_norm_epsilon)

    def construct(self, x, bias):
        return x + self.SelfAttention(self.layer_norm(x), bias).astype(ms.float32)


class FeedForwardLayer(nn.Cell):
    def __init__(self, config: T5Config, dtype: str):
        super().__init__()
        self.DenseReluDense = FeedForward(config, dtype)
        self.layer_norm = RMSNorm(config.d_model, config.layer_norm_epsilon)

    def construct(self, x):
        return x + self.DenseReluDense(self.layer_norm(x)).astype(ms.float32)


class Block(nn.Cell):
    def __init__(self, config: T5Config, dtype: str, has_bias: bool):
        super().__init__()
        self.layer = nn.CellList([AttentionLayer(config, dtype, has_bias), FeedForwardLayer(config, dtype)])

    def construct(self, x, bias):
        return self.layer[1](self.layer[0](x, bias))


class Stack(nn.Cell):
    """The blocks and the final norm."""

    def __init__(self, config: T5Config, dtype: str):
        super().__init__()
        self.block = nn.CellList([Block(config, dtype, number == 0) for number in range(config.num_layers)])
        self.final_layer_norm = RMSNorm(config.d_model, config.layer_norm_epsilon)

    def construct(self, x, bias):
        for block in self.block:
            x = block(x, bias)
        return self.final_layer_norm(x)


class T5Encoder(nn.Cell):
    """Token IDs to the states after the final norm.

    Args:
        config: overrides of `T5Config`.
        max_length: tokens per text, which the position buckets are computed for.
        dtype: fp32 | fp16 | bf16, of matrix products and their weights.

    Raises:
        ValueError: a config that cannot be built.
    """

    default_config = T5Config()

    def __init__(self, config: Mapping, max_length: int, dtype: str = "fp32"):
        super().__init__()
        self.config = merge_config(self.default_config, config, "t5")
        self.output_dim = self.config.d_model
        self.shared = Embedding(self.config.vocab_size, self.config.d_model)
        self.encoder = Stack(self.config, dtype)
        buckets, distance = self.config.relative_attention_num_buckets, self.config.relative_attention_max_distance
        self.buckets = Tensor(relative_position_buckets(max_length, buckets, distance))
        set_precision(self, dtype)

    def construct(self, ids, mask):
        """ids (B, L) int32, mask (B, L) float32: 1 for tokens, 0 for padding -> (B, L, d_model) float32, L = max_length

        Padding rows are included, and are meaningless.
        """
        b, length = ids.shape
        bias = self.position_bias() + (1.0 - mask).reshape(b, 1, 1, length) * _MASKED
        return self.encoder(self.shared(ids), bias)

    def position_bias(self):
        """The bias that every layer adds to its heads' scores, (1, heads, L, L)."""
        table = self.encoder.block[0].layer[0].SelfAttention.relative_attention_bias
        return table(self.buckets).transpose(2, 0, 1).expand_dims(0)
