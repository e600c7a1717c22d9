"""What ``mmrl check-policy`` tries on a policy that talks: whatever a model, its tokenizer or its template may get wrong.

Conversations of three turns with pictures of awkward sizes (none for models without eyes), whatever the policy says in them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import torch
from PIL import Image
from torch import Tensor

from mmrl.errors import MMRLError
from mmrl.messages import Message, Picture
from mmrl.numerics.draws import Draws
from mmrl.numerics.tokens import head_logits
from mmrl.protocols import Check
from mmrl.types import Conversation
from policies.chat_parts.ears import Ears
from policies.chat_parts.engine import Engine, Generated, Request, Sampling
from policies.chat_parts.network import Network
from policies.chat_parts.pieces import Heard, Piece, Said, lay_out
from policies.chat_parts.scoring import score

LIMIT, TURNS = 6, 3
SIZES = ((40, 30), (1, 1), (10, 400), (300, 20), (33, 70))
# How far log-probabilities may lie apart, by the type of the weights.
TOLERANCE = {torch.float64: 1e-8, torch.float32: 2e-3, torch.bfloat16: 0.25}


class Talker(Protocol):
    """The parts of a policy that are tried."""

    network: Network
    ears: Ears
    engine: Engine

    def messages(self, made: Generated) -> list[Message]: ...


def checks(policy: Talker) -> Iterator[Check]:
    """One after the other; what fails with an error is a check that failed."""
    for name, trial in _TRIALS.items():
        try:
            yield trial(name, policy)
        except (MMRLError, RuntimeError, ValueError) as error:
            yield Check(name, False, " ".join(str(error).split())[:300])


# -- conversations -----------------------------------------------------------------------------------------------------


def _picture(number: int) -> Picture:
    return Picture(Image.linear_gradient("L").rotate(40 * number).resize(SIZES[number % len(SIZES)]).convert("RGB"))


def _shown(policy: Talker, *numbers: int) -> tuple[Picture, ...]:
    return () if policy.ears.image_id is None else tuple(map(_picture, numbers))


def _openings(policy: Talker) -> list[Conversation]:
    shown = (_shown(policy), _shown(policy, 0), _shown(policy, 1, 2, 3, 4, 0), _shown(policy, 0))
    return [(Message("user", (*pictures, f"Is it {row % 3}? Think, then answer.")),) for row, pictures in enumerate(shown)]


def _answer(policy: Talker, row: int, turn: int) -> Message:
    return Message("tool", (f"Turn {turn} of {row}.", *_shown(policy, *range(turn, turn + (row + turn) % 3))))


def _scripted(policy: Talker) -> Conversation:
    """As a person would write it, so that a tokenizer splits it at the same places together and apart."""
    talk = [*_openings(policy)[1]]
    for turn, text in enumerate(("The answer is 12.", "No, it is 7.")):
        ids: list[int] = policy.ears.tokenizer(text, add_special_tokens=False)["input_ids"]  # type: ignore[assignment]
        said = Message("assistant", (text,), token_ids=(*ids, policy.ears.end), finish="stop")
        talk += [said, Message("user", (*_shown(policy, *range(turn + 1)), "Are you sure?"))]
    return tuple(talk)


def _converse(policy: Talker, turns: int = TURNS, *, forget: bool = False) -> tuple[list[tuple[Piece, ...]], list[list[Tensor]]]:
    """What conversations became, up to what was said last, and the log-probabilities of each turn of each of them."""
    talks, log_probs = _openings(policy), [[] for _ in _openings(policy)]
    for turn in range(turns):
        if forget:
            policy.engine.forget()
        heard = [policy.ears.listen(talk) for talk in talks]
        rows = torch.arange(len(talks), device=policy.network.device)
        made = policy.engine.generate([Request(*each, LIMIT) for each in heard], Draws.of(0, rows, turn))
        messages = policy.messages(made)
        policy.engine.keep(messages)
        for row, count in enumerate(made.count_B.tolist()):
            log_probs[row].append(made.log_probs_BK[row, :count])
        talks = [(*talk, messages[row], _answer(policy, row, turn)) for row, talk in enumerate(talks)]
    return [policy.ears.listen(talk)[0][:-1] for talk in talks], log_probs


def _ids(pieces: Sequence[Piece]) -> Tensor:
    return torch.cat([piece.ids for piece in pieces])


def _scores(policy: Talker, rows: Sequence[Sequence[Piece]], pack: int | None = None) -> Tensor:
    with torch.no_grad():
        return score(policy.network, rows, policy.engine.sampling, 1024, pack).log_probs_M


def _close(name: str, policy: Talker, ours: Tensor, theirs: Tensor, what: str) -> Check:
    apart = float((ours - theirs).abs().max())
    allowed = TOLERANCE.get(policy.network.model.dtype, TOLERANCE[torch.bfloat16])
    return Check(name, apart <= allowed, f"{what}: {apart:.1e} apart at most ({allowed:.0e} allowed)")


def refuse_unpackable(network: Network, checkpoint: str) -> None:
    """Raise MMRLError where the model reads conversations that stand end to end otherwise than alone, as some old ones do."""
    words = network.head.weight.shape[0]
    ids = [torch.arange(length) * 7919 % words for length in (5, 7)]
    first, second = (Heard(some, torch.arange(len(some)).expand(network.axes, -1), len(some)) for some in ids)
    rows = [(first, Said(ids[1][2:])), (first, Said(ids[1][5:])), (second, Said(ids[0][2:])), (second, Said(ids[0][1:]))]
    sampling, why = Sampling(1.0, None, ()), ""
    alone = torch.cat([score(network, [row], sampling, 1024).log_probs_M for row in rows])
    allowed = TOLERANCE.get(network.model.dtype, TOLERANCE[torch.bfloat16])
    try:
        apart = float((score(network, rows, sampling, 1024, 1024).log_probs_M - alone).abs().max())
        why = "" if apart <= allowed else f"{apart:.1e} apart"
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        why = " ".join(str(error).split())[:200]
    if why:
        raise MMRLError(
            f"policy.pack_tokens: {checkpoint} reads conversations that stand end to end otherwise than alone ({why}); omit it"
        )


# -- trials ------------------------------------------------------------------------------------------------------------


def _prefix(name: str, policy: Talker) -> Check:
    talk, shown = _scripted(policy), torch.zeros(0, dtype=torch.long)
    for end in range(1, len(talk) + 1, 2):
        now = _ids(policy.ears.listen(talk[:end])[0])
        if not torch.equal(now[: len(shown)], shown):
            return Check(name, False, f"after {end} messages it no longer begins with the {len(shown)} tokens shown before")
        shown = now
    return Check(name, True, f"{len(talk)} messages, {len(shown)} tokens")


def _drift(name: str, policy: Talker) -> Check:
    talk = _scripted(policy)
    whole: list[int] = policy.ears.tokenizer(policy.ears.template.opening(talk), add_special_tokens=False)["input_ids"]  # type: ignore
    ours: list[int] = []
    for piece in policy.ears.listen(talk)[0]:
        pictures = iter(piece.pictures if isinstance(piece, Heard) else ())
        flat, at = piece.ids.tolist(), 0
        while at < len(flat):
            ours.append(flat[at])
            at += next(pictures).tokens if flat[at] == policy.ears.image_id else 1
    if ours == whole:
        return Check(name, True, f"0 of {len(whole)} tokens differ from the whole conversation rendered at once")
    at = next((i for i, (a, b) in enumerate(zip(ours, whole, strict=False)) if a != b), min(len(ours), len(whole)))
    texts = [policy.ears.text(ids[at : at + 8]) for ids in (whole, ours)]
    return Check(name, False, f"from token {at} on the template writes {texts[0]!r}, but in pieces {texts[1]!r}")


def _pictures(name: str, policy: Talker) -> Check:
    if policy.ears.image_id is None:
        return Check(name, True, "has no eyes")
    counts = []
    for count in range(len(SIZES) + 1):
        message = Message("user", (*_shown(policy, *range(count)), "Well?"))
        heard = policy.ears.listen((message,))[0][0]
        assert isinstance(heard, Heard)
        with torch.no_grad():
            sights = policy.network.sights(heard.pictures)
        made = [len(part) for part in sights["mm_encoder_outputs"]["image"].pooler_output] if sights else []
        placed = int((heard.ids == policy.ears.image_id).sum())
        if made != [seen.tokens for seen in heard.pictures] or placed != sum(made):
            return Check(name, False, f"{count} pictures become {made} vectors, but have {placed} places")
        counts.append(placed)
    return Check(name, True, f"0 to {len(SIZES)} pictures have {', '.join(map(str, counts))} tokens, as many as vectors")


def _truncation(name: str, policy: Talker) -> Check:
    pieces = policy.ears.listen(_openings(policy)[1])[0]
    draws = Draws.of(0, torch.zeros(1, dtype=torch.long, device=policy.network.device))
    whole: list[int] | None = None
    for limit in range(LIMIT, 0, -1):
        policy.engine.forget()
        made = policy.engine.generate([Request(pieces, None, limit)], draws.select(torch.tensor([0])))
        ids = made.ids_BK[0].tolist()
        whole = ids if whole is None else whole
        if ids != whole[:limit] or not _scores(policy, [(*pieces, Said(made.ids_BK[0].cpu()))]).isfinite().all():
            return Check(name, False, f"cut after {limit} tokens it says {ids}, not the beginning of {whole}")
        after = policy.ears.listen((Message("user", ("a",)), policy.messages(made)[0], Message("user", ("b",))))[0]
        if _ids(after).tolist().count(policy.ears.end) < 2:
            return Check(name, False, f"a turn cut after {limit} tokens is not closed")
    return Check(name, True, f"after 1 to {LIMIT} tokens: the same tokens, scored, and the turn is closed")


def _positions(name: str, policy: Talker) -> Check:
    rows, _ = _converse(policy, 2)
    own = getattr(policy.network.model.base_model, "get_rope_index", None)
    worst = 0
    for pieces in rows:
        laid = lay_out([pieces], [0], policy.network.axes, policy.network.pad, policy.network.device)
        theirs = torch.arange(laid.ids_NL.shape[1], device=policy.network.device)
        if own is not None:
            grids = [seen.grid for seen in laid.pictures]
            grid = torch.tensor(grids, device=policy.network.device) if grids else None
            theirs = own(laid.ids_NL, (laid.ids_NL == policy.ears.image_id).int(), image_grid_thw=grid)[0]
        worst = max(worst, int((laid.positions_ANL - theirs).abs().max()))
    return Check(name, worst == 0, f"{len(rows)} conversations: {worst} from the model's own at most")


def _own_forward(policy: Talker, pieces: Sequence[Piece], padding: int) -> Tensor:
    """Log-probabilities of what was said, by the model's whole forward pass with its own positions, padded in front."""
    network, sampling = policy.network, policy.engine.sampling
    base = network.model.base_model
    if hasattr(base, "rope_deltas"):
        base.rope_deltas = None
    ids_L = torch.cat([torch.full((padding,), network.pad), _ids(pieces)]).to(network.device)
    inputs = {
        "input_ids": ids_L[None],
        "attention_mask": (torch.arange(len(ids_L), device=network.device) >= padding)[None].long(),
    }
    pictures = [seen for piece in pieces if isinstance(piece, Heard) for seen in piece.pictures]
    if pictures:
        inputs["pixel_values"] = torch.cat([seen.patches for seen in pictures]).to(network.device)
        inputs["image_grid_thw"] = torch.tensor([seen.grid for seen in pictures], device=network.device)
        inputs["mm_token_type_ids"] = (ids_L == policy.ears.image_id).int()[None]
    elif policy.ears.image_id is None:
        inputs["position_ids"] = (torch.arange(len(ids_L), device=network.device) - padding).clamp(min=0)[None]
    with torch.no_grad():
        logits_LV = network.model(**inputs, use_cache=False).logits[0].to(torch.promote_types(network.model.dtype, torch.float32))
    logits_LV = logits_LV / sampling.temperature
    if sampling.forbidden is not None:
        logits_LV = logits_LV.index_fill(-1, sampling.forbidden, -torch.inf)
    said = torch.cat([torch.full((len(piece),), isinstance(piece, Said)) for piece in pieces]).nonzero()[:, 0].to(network.device)
    places = said + padding
    return logits_LV.log_softmax(-1)[places - 1].gather(1, ids_L[places, None])[:, 0]


def _padding(name: str, policy: Talker) -> Check:
    rows, _ = _converse(policy)
    together = _scores(policy, rows)
    alone = torch.cat([_scores(policy, [pieces]) for pieces in rows])
    in_front = torch.cat([_own_forward(policy, pieces, 5 + row) for row, pieces in enumerate(rows)])
    worse = max((alone, in_front), key=lambda other: float((together - other).abs().max()))
    return _close(name, policy, together, worse, "padded behind, in front, and alone")


def _packing(name: str, policy: Talker) -> Check:
    rows, _ = _converse(policy)
    tokens = sum(len(piece) for pieces in rows for piece in pieces)
    alone = torch.cat([_scores(policy, [pieces]) for pieces in rows])
    return _close(name, policy, _scores(policy, rows, tokens), alone, f"{len(rows)} end to end, {tokens} tokens, and alone")


def _log_probs(name: str, policy: Talker) -> Check:
    rows, log_probs = _converse(policy)
    acted = torch.cat([part for row in log_probs for part in row])
    return _close(name, policy, _scores(policy, rows), acted, f"{len(acted)} tokens of {TURNS} turns, said and scored again")


def _model(name: str, policy: Talker) -> Check:
    rows, _ = _converse(policy)
    theirs = torch.cat([_own_forward(policy, pieces, 0) for pieces in rows])
    return _close(name, policy, _scores(policy, rows), theirs, "scored here and by transformers' own pass")


def _kept(name: str, policy: Talker) -> Check:
    """The distributions with which a second turn begins, after keys and values that were kept and after fresh ones."""
    policy.engine.forget()
    talks = _openings(policy)
    draws = Draws.of(0, torch.arange(len(talks), device=policy.network.device))
    made = policy.engine.generate([Request(*policy.ears.listen(talk), LIMIT) for talk in talks], draws)
    if made.hidden_BW is None:
        return Check(name, True, "are the engine's, which does not show what it reads from them")
    said = policy.messages(made)
    policy.engine.keep(said)
    requests = [Request(*policy.ears.listen((*talk, said[row], _answer(policy, row, 0))), 1) for row, talk in enumerate(talks)]
    found = []
    for _ in range(2):
        hidden_BW = policy.engine.generate(requests, None).hidden_BW
        assert hidden_BW is not None
        logits = head_logits(
            hidden_BW, policy.network.head.weight, temperature=policy.engine.sampling.temperature, forbidden=None
        )
        found.append(logits.log_softmax(-1))
        policy.engine.forget()
    return _close(name, policy, found[0], found[1], "keys and values kept from the last turn, and fresh ones")


_TRIALS: dict[str, Callable[[str, Talker], Check]] = {
    "prefix preservation": _prefix,
    "drift": _drift,
    "image count": _pictures,
    "truncation": _truncation,
    "position ids": _positions,
    "padding": _padding,
    "packing": _packing,
    "log-probs of turns": _log_probs,
    "log-probs of the model": _model,
    "kept keys and values": _kept,
}
