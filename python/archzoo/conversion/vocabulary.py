"""Another tokenizer for a pretrained model: the embedding and the head in the new vocabulary."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from archzoo.configuration import ModelConfig
from archzoo.conversion.surgery import filled
from archzoo.errors import InputError
from archzoo.model import CausalLM


@torch.no_grad()
def swap_vocabulary(
    model: CausalLM, old_tokenizer: str | Path, new_tokenizer: str | Path, name: str | None = None
) -> CausalLM:
    """A new model for the tokenizer `new_tokenizer`; it needs training to be as good as the old one.

    A token that both vocabularies have keeps its rows of the embedding and, unless tied, the head. Any other
    one starts as the mean of the rows of the pieces into which the old tokenizer cuts its bytes. The config's
    bos, eos and pad tokens keep their text, and become null where the new vocabulary lacks it.

    Args:
        model: any model of the zoo.
        old_tokenizer: the model's tokenizer.json, byte-level BPE.
        new_tokenizer: another one, such as `archzoo.train_bpe` writes.
        name: of the new config.
    """
    old, new = _Vocabulary(old_tokenizer), _Vocabulary(new_tokenizer)
    if model.config.vocab_size < old.size:
        raise InputError(f"{old_tokenizer}: {old.size} ids, the model has {model.config.vocab_size}")
    pieces: list[list[int]] = [[] for _ in range(new.size)]
    for token, i in new.ids.items():
        pieces[i] = [old.ids[token]] if token in old.ids else old.pieces(new.byte_text(token))
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    for key in ("embed.weight", "lm_head.weight"):
        if key in state:
            state[key] = _means(state[key], pieces, old.size)

    def renamed(i: int) -> int | None:
        return new.ids.get(old.tokens.get(i, ""))

    config = model.config
    eos = config.eos_token_id
    ends = [renamed(i) for i in (eos if isinstance(eos, tuple) else () if eos is None else (eos,))]
    kept = tuple(i for i in ends if i is not None)
    data = config.model_dump() | {
        "name": name or f"{config.name}-vocabulary-{new.size}",
        "vocab_size": new.size,
        "bos_token_id": None if config.bos_token_id is None else renamed(config.bos_token_id),
        "eos_token_id": kept[0] if len(kept) == 1 else kept or None,
        "pad_token_id": None if config.pad_token_id is None else renamed(config.pad_token_id),
        "source": f"vocabulary swapped in {config.name}",
    }
    return filled(ModelConfig.from_dict(data, data["name"]), state, model.training)


class _Vocabulary:
    """A byte-level BPE tokenizer.json."""

    def __init__(self, path: str | Path) -> None:
        from tokenizers import Tokenizer, models, pre_tokenizers

        if not Path(path).is_file():
            raise InputError(f"{path}: no such file")
        self.tokenizer: Any = Tokenizer.from_file(str(path))
        self.ids: dict[str, int] = self.tokenizer.get_vocab(with_added_tokens=True)
        if not isinstance(self.tokenizer.model, models.BPE) or "Ġ" not in self.ids:  # a blank
            raise InputError(f"{path}: expected a byte-level BPE")
        self.tokens = {i: token for token, i in self.ids.items()}
        self.size = max(self.tokens) + 1
        self._added = {t.content for t in self.tokenizer.get_added_tokens_decoder().values()}
        self._byte_level: Any = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)

    def byte_text(self, token: str) -> str:
        """A token as the vocabulary writes bytes; added ones are kept as plain text."""
        return (
            "".join(t for t, _ in self._byte_level.pre_tokenize_str(token)) if token in self._added else token
        )

    def pieces(self, byte_text: str) -> list[int]:
        return [piece.id for piece in self.tokenizer.model.tokenize(byte_text)]


def _means(rows: Tensor, pieces: list[list[int]], used: int) -> Tensor:
    """Row i is the mean of the rows pieces[i]; of the `used` first ones where there are none."""
    wide = rows.to(torch.promote_types(rows.dtype, torch.float32))
    out = torch.empty(len(pieces), rows.shape[1], dtype=rows.dtype, device=rows.device)
    everything = wide[:used].mean(0)
    for i, ids in enumerate(pieces):
        out[i] = rows[ids[0]] if len(ids) == 1 else wide[ids].mean(0) if ids else everything
    return out
