"""A conversation as a model takes it: pieces it has heard and pieces it has said, in turns, and rows of them side by side.

What was heard is tokenised once, when it is heard; what was said is the tokens that were drawn. So nothing is ever tokenised
again, and a conversation's tokens are those of its pieces, one after the other.

Letters: N rows, L tokens, A axes of positions (3 where pictures have height and width, else 1).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence


@dataclass(frozen=True, eq=False)
class Seen:
    """A picture in patches, float32 [P, numbers]. grid: how many in time, height and width. tokens: how many it becomes.

    key: a name for the patches, equal where they are.
    """

    patches: Tensor
    grid: tuple[int, int, int]
    tokens: int
    key: str = ""

    @property
    def nbytes(self) -> int:
        return self.patches.nbytes


@dataclass(frozen=True, eq=False)
class Heard:
    """What the model did not say: ids int64 [L], and each token's position counted from the piece's first, int64 [A, L].

    span: how far positions go on over the piece. pictures: one for each run of image tokens, in order.
    """

    ids: Tensor
    offsets: Tensor
    span: int
    pictures: tuple[Seen, ...] = ()

    @property
    def nbytes(self) -> int:
        return self.ids.nbytes + self.offsets.nbytes + sum(picture.nbytes for picture in self.pictures)

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True, eq=False)
class Said:
    """What the model said: ids int64 [L]. weights: float32 [L], of each token in imitation; None: all alike."""

    ids: Tensor
    weights: Tensor | None = None

    def __len__(self) -> int:
        return len(self.ids)


Piece = Heard | Said


@dataclass(frozen=True)
class Rows:
    """N sequences of tokens side by side, padded behind: ids and mask [N, L], positions [A, N, L].

    next_N: the position that follows a row's last token. pictures: of all rows, in order.
    """

    ids_NL: Tensor
    mask_NL: Tensor
    positions_ANL: Tensor
    next_N: Tensor
    pictures: tuple[Seen, ...] = field(default=())

    @property
    def lengths_N(self) -> Tensor:
        return self.mask_NL.sum(1)


def lay_out(rows: Sequence[Sequence[Piece]], start_N: Sequence[int], axes: int, pad: int, device: torch.device) -> Rows:
    """The pieces of each row one after the other; a row's first token has position ``start_N``."""
    ids, positions, ends = [], [], []
    for pieces, start in zip(rows, start_N, strict=True):
        at, parts = start, []
        for piece in pieces:
            if isinstance(piece, Heard):
                parts.append(piece.offsets + at)
                at += piece.span
            else:
                parts.append((torch.arange(len(piece)) + at).expand(axes, -1))
                at += len(piece)
        ids.append(torch.cat([piece.ids for piece in pieces]))
        positions.append(torch.cat(parts, 1).T)
        ends.append(at)
    lengths_N1 = torch.tensor([len(row) for row in ids])[:, None]
    ids_NL = pad_sequence(ids, batch_first=True, padding_value=pad)
    return Rows(
        ids_NL.to(device),
        (torch.arange(ids_NL.shape[1]) < lengths_N1).to(device),
        pad_sequence(positions, batch_first=True).permute(2, 0, 1).to(device),
        torch.tensor(ends, device=device),
        tuple(seen for pieces in rows for piece in pieces if isinstance(piece, Heard) for seen in piece.pictures),
    )
