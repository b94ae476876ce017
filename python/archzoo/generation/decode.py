"""The decode loop."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from archzoo.cache import Cache
from archzoo.errors import InputError
from archzoo.generation.sampling import check_sampling, probabilities
from archzoo.generation.speculative import check_mtp, mtp_steps
from archzoo.model import CausalLM


@torch.inference_mode()
def generate(
    model: CausalLM,
    input_ids: Tensor | Sequence[Sequence[int]],
    max_new_tokens: int = 64,
    *,
    attention_mask: Tensor | None = None,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    stop_tokens: Sequence[int] | None = None,
    pad_token_id: int | None = None,
    seed: int | None = None,
    prefill_chunk: int | None = None,
    use_mtp: bool = False,
    callback: Callable[[Tensor], None] | None = None,
) -> Tensor:
    """Continue prompts: ids [B, T] -> [B, T + new].

    Prompts of different lengths are a list of lists (padded on the left here), or a tensor padded on the
    left with its attention_mask [B, T]. temperature 0 is greedy. A row ends at a stop token (default: the
    config's eos_token_id; an empty list never stops) and is filled with pad_token_id; the loop ends when
    all rows have. `callback` gets the new ids [B] of each step; `prefill_chunk` bounds the memory of long
    prompts and does not change the result. `use_mtp` lets the model's MTP modules draft tokens that the model
    then verifies several at a time (greedy only; the same tokens).
    """
    check_sampling(temperature, top_k, top_p, min_p)
    config, device = model.config, model.embed.weight.device
    stops = stops_of(config.eos_token_id) if stop_tokens is None else list(stop_tokens)
    pad = next((t for t in (pad_token_id, config.pad_token_id, *stops) if t is not None), 0)
    ids, positions = _prompt(input_ids, attention_mask, pad, device)
    batch, length = ids.shape
    if length + max_new_tokens > config.max_positions:
        raise InputError(
            f"{length} prompt tokens and {max_new_tokens} new ones exceed the model's "
            f"{config.max_positions} positions"
        )
    check_ids(ids, config.vocab_size)
    if max_new_tokens < 1:
        return ids
    was_training = model.training
    model.eval()
    generator = None if seed is None else torch.Generator(device=device).manual_seed(seed)
    stop = torch.tensor(stops, device=device, dtype=torch.long)
    ended = torch.zeros(batch, dtype=torch.bool, device=device)
    cache = model.new_cache(batch, length + max_new_tokens)
    if use_mtp:
        check_mtp(model, cache, temperature)
    step = prefill_chunk or length
    chunks = []
    for start in range(0, length, step):
        part = slice(start, min(start + step, length))
        at = None if positions is None else positions[:, part]
        hidden = model.backbone(ids[:, part], cache, at)
        if use_mtp:
            chunks.append(hidden)

    def pick(logits: Tensor) -> Tensor:
        if temperature == 0:
            return logits.argmax(-1)
        probs = probabilities(logits, temperature, top_k, top_p, min_p)
        return torch.multinomial(probs, 1, generator=generator).squeeze(1)

    if use_mtp:
        steps = mtp_steps(model, ids, positions, torch.cat(chunks, 1), cache, max_new_tokens, ended)
    else:
        steps = _steps(model, hidden, cache, max_new_tokens, pick)
    out = ids.new_full((batch, length + max_new_tokens), pad)
    out[:, :length] = ids
    for i, new in enumerate(steps, length):
        new = torch.where(ended, pad, new)
        out[:, i] = new
        if callback is not None:
            callback(new)
        if stops:
            ended |= torch.isin(new, stop)
            if bool(ended.all()):
                out = out[:, : i + 1]
                break
    model.train(was_training)
    return out


def _steps(
    model: CausalLM, hidden: Tensor, cache: Cache, count: int, pick: Callable[[Tensor], Tensor]
) -> Iterator[Tensor]:
    """`count` times the next token [B] of each row, one pass of the model each."""
    for left in reversed(range(count)):
        new = pick(model.head(hidden[:, -1]))
        yield new
        if left:
            hidden = model.backbone(new[:, None], cache)


def stops_of(eos: int | tuple[int, ...] | None) -> list[int]:
    """Stop tokens as a list."""
    if eos is None:
        return []
    return [eos] if isinstance(eos, int) else list(eos)


def _prompt(
    input_ids: Tensor | Sequence[Sequence[int]], mask: Tensor | None, pad: int, device: torch.device
) -> tuple[Tensor, Tensor | None]:
    """ids [B, T] and positions [B, T] (-1 at padding), or None when nothing is padded."""
    if not isinstance(input_ids, Tensor):
        rows = [list(row) for row in input_ids]
        width = max((len(row) for row in rows), default=0)
        ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows], dtype=torch.long)
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    else:
        ids = input_ids
    if ids.dim() != 2 or ids.shape[1] == 0:
        raise InputError(
            f"input_ids must be [batch, tokens] with at least one token, found {list(ids.shape)}"
        )
    ids = ids.to(device)
    if mask is None or bool(mask.all()):
        return ids, None
    if mask.shape != ids.shape:
        raise InputError(
            f"attention_mask {list(mask.shape)} must have the shape of input_ids {list(ids.shape)}"
        )
    seen = mask.to(device).bool()
    if bool((seen[:, :-1] & ~seen[:, 1:]).any()) or not bool(seen[:, -1].all()):
        raise InputError("padding must stand on the left, and every row needs at least one token")
    return ids, (seen.cumsum(1) - 1).masked_fill(~seen, -1)


def check_ids(ids: Tensor, vocab_size: int) -> None:
    """InputError for a token id [B, T] outside the vocabulary."""
    bad = ((ids < 0) | (ids >= vocab_size)).nonzero()
    if bad.numel():
        row, at = bad[0].tolist()
        raise InputError(
            f"token id {int(ids[row, at])} at [{row}, {at}] is outside the vocabulary of {vocab_size}"
        )
