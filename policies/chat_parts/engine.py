"""Generation with the model that is trained itself: batched, with keys and values kept between the turns of a conversation.

A pass over what a conversation's rows have newly heard, then one token at a time. Rows that have finished leave the batch once
they are half of it. Rows that have heard exactly the same so far, as a group's have at first, are one row of that pass.

Keys and values of a turn are kept until the next turn of the same conversations, or until the weights change. A row's block of a
turn is padded behind, so there are holes between its turns, which the mask leaves out; positions do not count them.

Letters: B rows, K tokens a row may say, L tokens in the cache, H heads, D their width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from mmrl.messages import Message
from mmrl.numerics.draws import Draws
from mmrl.numerics.tokens import head_logits, token_log_probs
from policies.chat_parts.keeping import growing
from policies.chat_parts.network import Network
from policies.chat_parts.pieces import Piece, Rows, Said, lay_out

SESSIONS = 8  # batches of conversations whose keys and values are kept at most


@dataclass(frozen=True)
class Request:
    """A conversation that is to be continued. pieces: all of it, the last one heard. previous: the model's last message in it.

    limit: how many tokens it may say, at least 1.
    """

    pieces: tuple[Piece, ...]
    previous: Message | None
    limit: int


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn: temperature, tokens that are never drawn (int64) and tokens that end a turn."""

    temperature: float
    forbidden: Tensor | None
    ends: tuple[int, ...]


@dataclass(frozen=True)
class Generated:
    """What B rows said: ids and log_probs [B, K], 0 behind the ``count_B`` tokens of a row; whether its last token ends a turn.

    hidden_BW: the hidden state in which a row began to speak, for a critic; values_BK: what a critic said of the one that each
    token was drawn from. None where the engine does not show them, or nobody asked. version: of the weights that said it.
    """

    ids_BK: Tensor
    log_probs_BK: Tensor
    count_B: Tensor
    ended_B: Tensor
    hidden_BW: Tensor | None
    version: int = 0
    values_BK: Tensor | None = None


Critic = Callable[[Tensor], Tensor]  # values [R] of hidden states [R, W]


class Engine(Protocol):
    """Says what the model would say.

    rescores: whether its log-probabilities are those of another program (see mmrl.protocols.EnginePolicy).
    """

    sampling: Sampling
    rescores: bool

    def generate(
        self, requests: Sequence[Request], draws: Draws | None, version: int = 0, critic: Critic | None = None
    ) -> Generated:
        """Draw (or, without ``draws``, take the likeliest) tokens until each row ends its turn or is at its limit.

        version: of the model's weights as they are now, with which all of it is said. critic: asked before every token.
        """
        ...

    def keep(self, messages: Sequence[Message]) -> None:
        """The messages that were made of the rows last generated, by which their next requests will name them."""
        ...

    def forget(self) -> None:
        """The weights have changed, or nobody will go on."""
        ...


@dataclass
class _Kept:
    """Keys and values of B rows after a turn: mask [B, L]; what was said but not fed yet; the next position of each row."""

    layers: list[tuple[Tensor, Tensor]]
    mask_BL: Tensor
    unfed: list[Tensor]
    next_B: list[int]
    messages: tuple[Message, ...] = ()


class LocalEngine:
    """See the module."""

    rescores = False

    def __init__(self, network: Network, sampling: Sampling) -> None:
        self.network, self.sampling = network, sampling
        self._kept: list[_Kept] = []
        self._last: _Kept | None = None

    def forget(self) -> None:
        self._kept, self._last = [], None

    def keep(self, messages: Sequence[Message]) -> None:
        if self._last is not None:
            self._last.messages = tuple(messages)
            self._kept = [*self._kept[1 - SESSIONS :], self._last]
            self._last = None

    @torch.no_grad()
    def generate(
        self, requests: Sequence[Request], draws: Draws | None, version: int = 0, critic: Critic | None = None
    ) -> Generated:
        batch, hidden_BW = self._begin(requests)
        limits_B = torch.tensor([request.limit for request in requests], device=self.network.device)
        return replace(self._speak(batch, hidden_BW, limits_B, draws, critic), version=version)

    # -- hearing -------------------------------------------------------------------------------------------------------

    def _begin(self, requests: Sequence[Request]) -> tuple[_Batch, Tensor]:
        """Keys and values of all that was heard, and the hidden state [B, W] from which each row speaks."""
        found = [self._find(request.previous) for request in requests]
        if all(place is None for place in found):
            return self._from_scratch(requests)
        past = self._gather(found)
        new: list[list[Piece]] = []
        for row, request in enumerate(requests):
            unfed = past.unfed[row]
            said: list[Piece] = [Said(unfed)] if len(unfed) else []
            new.append([*said, request.pieces[-1]] if found[row] is not None else list(request.pieces))
        rows = lay_out(new, past.next_B, self.network.axes, self.network.pad, self.network.device)
        cache = growing(past.layers)
        hidden_BLW = self.network.hidden(rows, cache=cache, past_NP=past.mask_BL)
        used = {id(kept) for place in found if place is not None for kept in (place[0],)}
        self._kept = [kept for kept in self._kept if id(kept) not in used]
        return _Batch(cache, torch.cat([past.mask_BL, rows.mask_NL], 1), rows.next_N), _last(hidden_BLW, rows)

    def _from_scratch(self, requests: Sequence[Request]) -> tuple[_Batch, Tensor]:
        keys = [tuple(id(piece) for piece in request.pieces) for request in requests]
        first = {key: row for row, key in reversed(list(enumerate(keys)))}
        unique = sorted(first.values())
        pieces = [requests[row].pieces for row in unique]
        rows = lay_out(pieces, [0] * len(unique), self.network.axes, self.network.pad, self.network.device)
        cache = growing()
        hidden_UW = _last(self.network.hidden(rows, cache=cache), rows)
        batch = _Batch(cache, rows.mask_NL, rows.next_N)
        if len(unique) == len(requests):
            return batch, hidden_UW
        places = {row: place for place, row in enumerate(unique)}
        index_B = torch.tensor([places[first[key]] for key in keys], device=self.network.device)
        return batch.select(index_B), hidden_UW[index_B]

    def _find(self, message: Message | None) -> tuple[_Kept, int] | None:
        """Where the keys and values of the conversation are that ``message`` was the model's last word in."""
        if message is None:
            return None
        places = ((kept, row) for kept in reversed(self._kept) for row, known in enumerate(kept.messages) if known is message)
        return next(places, None)

    def _gather(self, found: Sequence[tuple[_Kept, int] | None]) -> _Kept:
        """The rows that were found, side by side in a batch; a row that was not has nothing in the cache."""
        first = next(place[0] for place in found if place is not None)
        if all(place is not None and place[0] is first for place in found):
            rows = [place[1] for place in found if place is not None]
            index = torch.tensor(rows, device=self.network.device)
            whole = rows == list(range(len(first.unfed)))
            layers = first.layers if whole else [(k[index], v[index]) for k, v in first.layers]
            return _Kept(layers, first.mask_BL[index], [first.unfed[row] for row in rows], [first.next_B[row] for row in rows])
        longest = max(place[0].mask_BL.shape[1] for place in found if place is not None)

        def padded(x: Tensor, axis_from_behind: int) -> Tensor:
            return F.pad(x, (*(0, 0) * axis_from_behind, 0, longest - x.shape[-1 - axis_from_behind]))

        def row_of(place: tuple[_Kept, int] | None, layer: int, which: int) -> Tensor:
            if place is None:
                like = first.layers[layer][which]
                return like.new_zeros(like.shape[1], longest, like.shape[3])
            return padded(place[0].layers[layer][which][place[1]], 1)

        def mask_of(place: tuple[_Kept, int] | None) -> Tensor:
            nothing = first.mask_BL.new_zeros(longest)
            return nothing if place is None else padded(place[0].mask_BL[place[1]], 0)

        layers = [
            (torch.stack([row_of(place, i, 0) for place in found]), torch.stack([row_of(place, i, 1) for place in found]))
            for i in range(len(first.layers))
        ]
        nothing = torch.zeros(0, dtype=torch.long)
        return _Kept(
            layers,
            torch.stack([mask_of(place) for place in found]),
            [nothing if place is None else place[0].unfed[place[1]] for place in found],
            [0 if place is None else place[0].next_B[place[1]] for place in found],
        )

    # -- speaking ------------------------------------------------------------------------------------------------------

    def _speak(self, batch: _Batch, hidden_BW: Tensor, limits_B: Tensor, draws: Draws | None, critic: Critic | None) -> Generated:
        size, most, device = len(limits_B), int(limits_B.max()), self.network.device
        ids_BK = torch.zeros(size, most, dtype=torch.long, device=device)
        log_probs_BK = torch.zeros(size, most, dtype=torch.promote_types(hidden_BW.dtype, torch.float32), device=device)
        values_BK = torch.zeros_like(log_probs_BK)
        count_B, ended_B = torch.zeros_like(limits_B), torch.zeros_like(limits_B, dtype=torch.bool)
        ends = torch.tensor(self.sampling.ends, device=device)
        rows_R = torch.arange(size, device=device)  # of all, those in the batch
        running_R = torch.ones_like(rows_R, dtype=torch.bool)
        limits_R = limits_B
        speaking, hidden_RW, archive = batch, hidden_BW, _Archive(size)
        for k in range(most):
            chosen_R, log_probs_R = self._choose(hidden_RW, draws)
            chosen_R = torch.where(running_R, chosen_R, self.network.pad)
            ids_BK[rows_R, k], log_probs_BK[rows_R, k] = chosen_R, log_probs_R
            if critic is not None:
                values_BK[rows_R, k] = critic(hidden_RW).to(values_BK.dtype)
            count_B[rows_R] += running_R
            over_R = running_R & torch.isin(chosen_R, ends)
            ended_B[rows_R] |= over_R
            running_R = running_R & ~over_R & (k + 1 < limits_R)
            left = int(running_R.sum())
            if left == 0:
                break
            if 2 * left <= len(rows_R):  # half have finished: they leave
                archive.add(speaking, rows_R, ~running_R)
                stay = running_R.nonzero()[:, 0]
                speaking, rows_R, chosen_R, limits_R = speaking.select(stay), rows_R[stay], chosen_R[stay], limits_R[stay]
                draws = None if draws is None else draws.select(stay)
                running_R = running_R[stay]
            hidden_RW = self._feed(speaking, chosen_R, running_R)
        archive.add(speaking, rows_R, torch.ones_like(running_R))
        unfed = [ids_BK[row, count - 1 : count].cpu() for row, count in enumerate(count_B.tolist())]
        self._last = archive.kept(unfed)
        spent = int(count_B.max())
        behind_BK = torch.arange(spent, device=device) >= count_B[:, None]  # what a row that had finished would have said
        ids_BK, log_probs_BK, values_BK = (x[:, :spent].masked_fill(behind_BK, 0) for x in (ids_BK, log_probs_BK, values_BK))
        return Generated(ids_BK, log_probs_BK, count_B, ended_B, hidden_BW, values_BK=None if critic is None else values_BK)

    def _choose(self, hidden_RW: Tensor, draws: Draws | None) -> tuple[Tensor, Tensor]:
        """A token of each row, and its log-probability."""
        sampling = self.sampling
        logits_RV = head_logits(
            hidden_RW, self.network.head.weight, temperature=sampling.temperature, forbidden=sampling.forbidden
        )
        chosen_R = logits_RV.argmax(-1) if draws is None else draws.categorical(logits_RV)
        return chosen_R, token_log_probs(logits_RV[:, None], chosen_R[:, None])[:, 0]

    def _feed(self, batch: _Batch, chosen_R: Tensor, running_R: Tensor) -> Tensor:
        """Hidden states [R, W] after one more token of each row that runs."""
        positions = batch.next_B.expand(self.network.axes, -1)[..., None]
        rows = Rows(chosen_R[:, None], running_R[:, None], positions, batch.next_B)
        hidden = self.network.hidden(rows, cache=batch.cache, past_NP=batch.mask_BL)[:, 0]
        batch.mask_BL = torch.cat([batch.mask_BL, running_R[:, None]], 1)
        batch.next_B = batch.next_B + running_R
        return hidden


@dataclass
class _Batch:
    """Rows that speak: cache, mask [B, L] and the position of each row's next token."""

    cache: Any
    mask_BL: Tensor
    next_B: Tensor

    def select(self, index: Tensor) -> _Batch:
        layers = [(layer.keys[index], layer.values[index]) for layer in self.cache.layers]
        return _Batch(growing(layers), self.mask_BL[index], self.next_B[index])


class _Archive:
    """Rows that have left the batch, for their next turn."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._parts: list[tuple[Tensor, _Batch]] = []

    def add(self, batch: _Batch, rows_R: Tensor, which_R: Tensor) -> None:
        index = which_R.nonzero()[:, 0]
        whole = len(index) == len(rows_R)
        self._parts.append((rows_R[index], batch if whole else batch.select(index)))

    def kept(self, unfed: list[Tensor]) -> _Kept:
        """All rows in their order, as long as the longest."""
        rows = torch.cat([rows for rows, _ in self._parts])
        if len(self._parts) == 1:
            batch = self._parts[0][1]
            layers = [(layer.keys, layer.values) for layer in batch.cache.layers]
            return _Kept(layers, batch.mask_BL, unfed, batch.next_B.tolist())
        longest, order = max(batch.mask_BL.shape[1] for _, batch in self._parts), rows.argsort()

        def side_by_side(tensors: Sequence[Tensor]) -> Tensor:
            """[B, H, L, D] each; L grows to the longest."""
            return torch.cat([F.pad(x, (0, 0, 0, longest - x.shape[2])) for x in tensors])[order]

        caches = [batch.cache for _, batch in self._parts]
        layers = [
            (side_by_side([c.layers[i].keys for c in caches]), side_by_side([c.layers[i].values for c in caches]))
            for i in range(len(caches[0].layers))
        ]
        masks = [F.pad(batch.mask_BL, (0, longest - batch.mask_BL.shape[1])) for _, batch in self._parts]
        next_B = torch.cat([batch.next_B for _, batch in self._parts])[order]
        return _Kept(layers, torch.cat(masks)[order], unfed, next_B.tolist())


def _last(hidden_NLW: Tensor, rows: Rows) -> Tensor:
    """The hidden state of each row's last token: [N, W]."""
    return hidden_NLW[torch.arange(len(hidden_NLW), device=hidden_NLW.device), rows.lengths_N - 1]
