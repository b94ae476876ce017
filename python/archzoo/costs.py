"""What a model costs, from its config alone: parameters, FLOPs, bytes of weights and decode state."""

from __future__ import annotations

from dataclasses import dataclass

from archzoo.configuration import ModelConfig
from archzoo.errors import ConfigError

ITEMSIZE = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Cost:
    """Counts for one model, sequence length and batch; FLOPs are 2 per multiply-add.

    training_flops: one token of a sequence of seq_len, forward and twice that backward. prefill_flops: the
    whole prompt of every sequence, logits of its last token. decode_flops: the token that follows, for every
    sequence. cache_bytes: the whole decode state of all layers and sequences at seq_len = what
    `model.new_cache(batch_size, seq_len)` allocates. cache_bytes_per_token: growth by one token of one
    sequence. state_bytes: the constant part of one sequence.
    """

    params: int
    active_params: int
    training_flops: int
    prefill_flops: int
    decode_flops: int
    cache_bytes: int
    cache_bytes_per_token: int
    state_bytes: int
    weight_bytes: int


def cost(config: ModelConfig, seq_len: int = 4096, batch_size: int = 1, dtype: str = "bfloat16") -> Cost:
    """Cost of `config`; a Mixture-of-Depths layer counts its share of the tokens."""
    if dtype not in ITEMSIZE:
        raise ConfigError(f"dtype '{dtype}': expected one of {', '.join(ITEMSIZE)}")
    if seq_len < 1 or batch_size < 1:
        raise ConfigError(f"seq_len and batch_size must be at least 1, found {seq_len} and {batch_size}")
    size, d = ITEMSIZE[dtype], config.hidden_size
    table = config.vocab_size * d
    head = 2 * table
    outer = table * (1 if config.tie_embeddings else 2) + d
    active = outer
    params = outer + config.mtp_params  # which plain decoding does not use
    prefill, decode, growing, constant, per_token = head, head, 0, 0, 0
    for spec in config.specs:
        params += spec.params(d)
        active += spec.active_params(d)
        tokens, after = spec.depth.tokens(seq_len), spec.depth.tokens(seq_len + 1)
        router = 2 * spec.depth.params(d)
        prefill += spec.mixer.flops(d, tokens, tokens) + router * seq_len
        step = spec.mixer.flops(d, 1, after)
        if spec.ffn is not None:
            prefill += spec.ffn.flops(d, tokens)
            step += spec.ffn.flops(d, 1)
        decode += round(step * after / (seq_len + 1)) + router
        growing += spec.mixer.cache_bytes(d, tokens, size)
        constant += spec.mixer.state_bytes(d, size)
        grown = spec.mixer.cache_bytes(d, tokens + 1, size) - spec.mixer.cache_bytes(d, tokens, size)
        per_token += round(grown * tokens / seq_len)
    return Cost(
        params=params,
        active_params=active,
        training_flops=round(3 * ((prefill - head) / seq_len + head)),
        prefill_flops=prefill * batch_size,
        decode_flops=decode * batch_size,
        cache_bytes=(growing + constant) * batch_size,
        cache_bytes_per_token=per_token,
        state_bytes=constant,
        weight_bytes=params * size,
    )
