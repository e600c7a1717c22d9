"""A conversation as a model takes it: pieces it has heard and pieces it has said, in turns; rows of them side by side, or a line.

What was heard is tokenised once, when it is heard; what was said is the tokens that were drawn. So nothing is ever tokenised
again, and a conversation's tokens are those of its pieces, one after the other.

Letters: N rows, L tokens of a row, T tokens of a line, A axes of positions (3 where pictures have height and width, else 1).
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


@dataclass(frozen=True)
class Stretch:
    """Pieces that stand together in a line. after: the stretch that they continue, which stands before them; None: they begin."""

    pieces: Sequence[Piece]
    after: int | None = None


@dataclass(frozen=True)
class Line:
    """Conversations end to end in one row of T tokens, without padding; what several of them begin with may stand there once.

    positions [A, T] are those that tokens have in their conversations. places_T: of tokens in their stretches. stretch_T: which
    stretch a token is in. before_T: the one that this continues, or itself. branches: whether any continues another. pictures:
    of all stretches, in order.
    """

    ids_T: Tensor
    positions_AT: Tensor
    places_T: Tensor
    stretch_T: Tensor
    before_T: Tensor
    branches: bool
    pictures: tuple[Seen, ...]


def lay_out(rows: Sequence[Sequence[Piece]], start_N: Sequence[int], axes: int, pad: int, device: torch.device) -> Rows:
    """The pieces of each row one after the other; a row's first token has position ``start_N``."""
    ids, positions, ends = [], [], []
    for pieces, start in zip(rows, start_N, strict=True):
        positions_AL, end = _positions(pieces, start, axes)
        ids.append(torch.cat([piece.ids for piece in pieces]))
        positions.append(positions_AL.T)
        ends.append(end)
    lengths_N1 = torch.tensor([len(row) for row in ids])[:, None]
    ids_NL = pad_sequence(ids, batch_first=True, padding_value=pad)
    return Rows(
        ids_NL.to(device),
        (torch.arange(ids_NL.shape[1]) < lengths_N1).to(device),
        pad_sequence(positions, batch_first=True).permute(2, 0, 1).to(device),
        torch.tensor(ends, device=device),
        _pictures(rows),
    )


def line_up(stretches: Sequence[Stretch], axes: int, device: torch.device) -> Line:
    """Stretches end to end, the positions of each counted on from those of the stretch that it continues."""
    positions: list[Tensor] = []
    ends: list[int] = []
    for stretch in stretches:
        positions_AL, end = _positions(stretch.pieces, 0 if stretch.after is None else ends[stretch.after], axes)
        positions.append(positions_AL)
        ends.append(end)
    lengths_S = torch.tensor([part.shape[1] for part in positions])
    before_S = torch.tensor([number if stretch.after is None else stretch.after for number, stretch in enumerate(stretches)])
    return Line(
        torch.cat([piece.ids for stretch in stretches for piece in stretch.pieces]).to(device),
        torch.cat(positions, 1).to(device),
        torch.cat([torch.arange(part.shape[1]) for part in positions]).to(device),
        torch.arange(len(stretches)).repeat_interleave(lengths_S).to(device),
        before_S.repeat_interleave(lengths_S).to(device),
        any(stretch.after is not None for stretch in stretches),
        _pictures([stretch.pieces for stretch in stretches]),
    )


def _positions(pieces: Sequence[Piece], start: int, axes: int) -> tuple[Tensor, int]:
    """Of the pieces' tokens, from ``start`` on: int64 [A, L], and the one that follows."""
    parts, at = [torch.zeros(axes, 0, dtype=torch.long)], start
    for piece in pieces:
        if isinstance(piece, Heard):
            parts.append(piece.offsets + at)
            at += piece.span
        else:
            parts.append((torch.arange(len(piece)) + at).expand(axes, -1))
            at += len(piece)
    return torch.cat(parts, 1), at


def _pictures(rows: Sequence[Sequence[Piece]]) -> tuple[Seen, ...]:
    return tuple(seen for pieces in rows for piece in pieces if isinstance(piece, Heard) for seen in piece.pictures)
