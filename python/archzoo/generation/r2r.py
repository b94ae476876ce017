"""Decoding with two models: a router lets the large one replace tokens of the small one (R2R, 2505.21600)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from archzoo.errors import InputError
from archzoo.generation.decode import check_ids, stops_of
from archzoo.model import CausalLM


class Block(nn.Module):
    """x + MLP(LayerNorm(x)), four times as wide inside."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """x [N, width] -> [N, width]."""
        inner = self.dropout(nn.functional.gelu(self.up(self.norm(x))))
        return x + self.dropout(self.down(inner))


class R2RRouter(nn.Module):
    """How likely the small model's token leads astray, by what that model knows of it; fp32.

    `embedding` [V, d] is the small model's: a frozen copy is kept, so that finetuning the model does not
    change what the router sees. 56,302,081 parameters are trained where d = 1536.
    """

    def __init__(
        self, embedding: Tensor, top: int = 100, width: int = 1024, depth: int = 6, dropout: float = 0.1
    ) -> None:
        super().__init__()
        d = embedding.shape[1]
        self.top = top
        self.embed = nn.Embedding.from_pretrained(embedding.detach().to(torch.float32, copy=True))
        self.logits_proj = nn.Linear(top, d)
        self.input_proj = nn.Linear(3 * d, width)
        self.hidden_proj = nn.Linear(width, width)
        self.blocks = nn.ModuleList(Block(width, dropout) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.out = nn.Linear(width, 1)

    def score(self, hidden: Tensor, embedded: Tensor, logits: Tensor) -> Tensor:
        """The logit [N] of `forward`, which training takes.

        hidden [N, d] after the small model's final norm, its token's embedding [N, d], the `top` largest of
        its logits [N, top] in descending order.
        """
        x = torch.cat((self.logits_proj(logits.float()), hidden.float(), embedded.float()), -1)
        x = self.hidden_proj(self.input_proj(x))
        for block in self.blocks:
            x = block(x)
        out: Tensor = self.out(self.norm(x))
        return out.squeeze(-1)

    def forward(self, hidden: Tensor, embedded: Tensor, logits: Tensor) -> Tensor:
        """The probability [N] that the large model should choose the token; inputs as of `score`."""
        return self.score(hidden, embedded, logits).sigmoid()


class Routed(NamedTuple):
    """ids [1, T + new], and for each new token whether the large model chose it, bool [new]: its calls."""

    ids: Tensor
    replaced: Tensor


@torch.inference_mode()
def r2r_generate(
    small: CausalLM,
    large: CausalLM,
    router: R2RRouter,
    input_ids: Tensor,
    max_new_tokens: int = 64,
    threshold: float = 0.5,
    stop_tokens: Sequence[int] | None = None,
) -> Routed:
    """Continue one prompt [1, T] greedily with the small model's tokens; where the router's probability is
    above `threshold`, with the large model's.

    The large model runs for those tokens only; each run first takes in the tokens since its last one.
    Generation ends at a stop token (default: the small model's eos_token_id).
    """
    _check(small, large, router, input_ids, max_new_tokens)
    vocab = min(small.config.vocab_size, large.config.vocab_size)  # one tokenizer, padded differently
    stops = stops_of(small.config.eos_token_id) if stop_tokens is None else list(stop_tokens)
    modules: tuple[nn.Module, ...] = (small, large, router)
    training = [module.training for module in modules]
    for module in modules:
        module.eval()
    length = input_ids.shape[1] + max_new_tokens
    ids = input_ids.to(small.embed.weight.device)
    cache, behind = small.new_cache(1, length), large.new_cache(1, length)
    replaced: list[bool] = []
    while len(replaced) < max_new_tokens:
        hidden = small.backbone(ids[:, cache.length :], cache)[:, -1]  # [1, d]
        logits = small.head(hidden)[:, :vocab]
        new = logits.argmax(-1)
        chance = router(hidden, router.embed(new), logits.topk(router.top, -1).values)
        replaced.append(bool(chance > threshold))
        if replaced[-1]:
            missed = ids[:, behind.length :].to(large.embed.weight.device)
            theirs = large.head(large.backbone(missed, behind)[:, -1])[:, :vocab]
            new = theirs.argmax(-1).to(ids.device)
        ids = torch.cat((ids, new[:, None]), 1)
        if int(new) in stops:
            break
    for module, was in zip(modules, training, strict=True):
        module.train(was)
    return Routed(ids, torch.tensor(replaced, dtype=torch.bool))


def _check(small: CausalLM, large: CausalLM, router: R2RRouter, ids: Tensor, count: int) -> None:
    """InputError for what does not go together."""
    if ids.dim() != 2 or ids.shape[0] != 1 or ids.shape[1] == 0:
        raise InputError(f"input_ids must be [1, tokens] with at least one token, found {list(ids.shape)}")
    for model in (small, large):
        check_ids(ids, model.config.vocab_size)
        if ids.shape[1] + count > model.config.max_positions:
            raise InputError(
                f"{ids.shape[1]} prompt tokens and {count} new ones exceed the "
                f"{model.config.max_positions} positions of '{model.config.name}'"
            )
    expected, found = (small.config.vocab_size, small.config.hidden_size), router.embed.weight.shape
    if tuple(found) != expected:
        raise InputError(f"the router's embedding {list(found)} is not that of a model {list(expected)}")
    vocab = min(small.config.vocab_size, large.config.vocab_size)
    if router.top > vocab:
        raise InputError(f"the router wants {router.top} logits, the models share {vocab}")
