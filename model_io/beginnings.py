"""A picture computed once, for all that is asked about it.

A picture takes most of a prompt (576 of some 650 positions), and what is asked about it follows:
the question alone, with its options, with candidates to be scored, the next turn of a dialog. So
the keys and values of a prompt up to its last picture are kept, and a prompt that begins the same
goes on from a copy of them.

in: prompts, their pictures
out: a KVCache that holds the beginning of each prompt; generate() and the like compute the rest
"""

import hashlib
from collections import OrderedDict
from dataclasses import dataclass

import torch
from torch import Tensor

from qilin_min import IMAGE_TOKEN_INDEX, KVCache, Qilin, check_room, new_cache, pad_rows


@dataclass
class Beginning:
    """The ids of a prompt up to its last picture, these pictures, and what tells both from all
    others."""

    ids: list[int]
    pixels: Tensor  # (m, 3, H, W)
    key: tuple[str, str]


def beginning_of(prompt: list[int], pixels: Tensor) -> Beginning:
    """Of a prompt and its own pictures (m, 3, H, W)."""
    end = max(i for i, token in enumerate(prompt) if token == IMAGE_TOKEN_INDEX) + 1
    ids = prompt[:end]
    numbers = pixels.detach().float().cpu().contiguous().numpy()
    key = (repr(ids), hashlib.sha256(numbers.tobytes()).hexdigest())
    return Beginning(ids, pixels, key)


class Beginnings:
    """Keys and values of the beginnings of prompts, those asked for last.

    n_kept: how many stay between two calls, each of them as large as its part of a KVCache: some
    0.5 GB at 13B in 16 bits. One call may need more, for as long as it lasts.
    """

    def __init__(self, model: Qilin, n_kept: int = 4):
        self.model = model
        self.n_kept = n_kept
        # key of a Beginning -> its keys and its values, (L, H_kv, n, D) each; the last used last
        self.kept: OrderedDict[tuple[str, str], tuple[Tensor, Tensor]] = OrderedDict()

    @torch.no_grad()
    def cache_for(self, prompts: list[list[int]], pixels: Tensor | None, room: int) -> KVCache:
        """A cache for B prompts, lists of int, and `room` more tokens, which holds of each prompt
        what ends with its last picture; of a prompt without one, nothing.

        pixels float (M, 3, H, W): the pictures of all prompts in reading order, or None. ValueError
        where they are not as many as the prompts have places for, or a prompt fills the positions.
        """
        check_room(self.model.config.text, prompts)
        cache = new_cache(self.model.config.text, prompts, room)
        rows = self._beginnings(prompts, pixels)
        wanted = {row.key: row for row in rows if row is not None}
        self._compute([row for key, row in wanted.items() if key not in self.kept])
        for key in wanted:
            self.kept.move_to_end(key)
        if wanted:
            self._fill(cache, rows)
        while len(self.kept) > self.n_kept:
            self.kept.popitem(last=False)
        return cache

    def _beginnings(
        self, prompts: list[list[int]], pixels: Tensor | None
    ) -> list[Beginning | None]:
        """Of each prompt its Beginning, None where it has no picture."""
        n_given = 0 if pixels is None else len(pixels)
        n_tokens = self.model.config.n_image_tokens
        n_each = [prompt.count(IMAGE_TOKEN_INDEX) // n_tokens for prompt in prompts]
        if sum(n_each) != n_given:
            raise ValueError(f"the prompts have places for {sum(n_each)} pictures, not {n_given}")
        rows: list[Beginning | None] = []
        start = 0
        for prompt, n in zip(prompts, n_each, strict=True):
            if n == 0 or pixels is None:
                rows.append(None)
                continue
            rows.append(beginning_of(prompt, pixels[start : start + n]))
            start += n
        return rows

    def _compute(self, beginnings: list[Beginning]) -> None:
        """Keys and values of what is not kept, all in one pass."""
        if not beginnings:
            return
        device = next(self.model.parameters()).device
        ids = pad_rows([row.ids for row in beginnings], 0).to(device)  # (b, T)
        pixels = torch.cat([row.pixels for row in beginnings]).to(device)  # (m, 3, H, W)
        cache = KVCache(self.model.config.text.num_hidden_layers, ids.shape[1])
        self.model.model(self.model.embed(ids, pixels), cache)
        assert cache.k is not None and cache.v is not None, "a pass stores its keys and values"
        for i, row in enumerate(beginnings):
            n = len(row.ids)
            # copies, without the padding, so that the whole cache need not stay
            self.kept[row.key] = (cache.k[:, i, :, :n].clone(), cache.v[:, i, :, :n].clone())

    def _fill(self, cache: KVCache, rows: list[Beginning | None]) -> None:
        """Copy into each row of an empty cache what is kept for it."""
        some_k, _ = next(reversed(self.kept.values()))
        n_layers, n_heads, _, head_dim = some_k.shape
        shape = (n_layers, len(rows), n_heads, cache.max_length, head_dim)
        cache.k = some_k.new_zeros(shape)
        cache.v = some_k.new_zeros(shape)
        lengths = [0 if row is None else len(row.ids) for row in rows]
        for i, row in enumerate(rows):
            if row is not None:
                k, v = self.kept[row.key]
                cache.k[:, i, :, : k.shape[2]] = k
                cache.v[:, i, :, : v.shape[2]] = v
        cache.lengths = torch.tensor(lengths, device=some_k.device)
        cache.n_positions = max(lengths)
