"""Painting: every pixel is a small integer label until the very end, when one gather turns labels into colours.

Label map: int32 [B, size * size + 1], the last column takes what falls outside the image or is transparent. Each label has its
environment's offset into the flattened palettes baked in, so colouring is a single ``index_select``. Objects are sprites,
cut once from formulas and scattered slot by slot in painter's order.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from simulators.tabletop_parts.domains import Domain
from simulators.tabletop_parts.language import COLOURS, SHAPES
from simulators.tabletop_parts.scene import BLOCK_HEIGHT, BLOCK_RADIUS, PICK_PLACE, ZONE_RADIUS, Layout, State

RGB = {
    "red": (222, 38, 38),
    "green": (30, 150, 50),
    "blue": (35, 70, 230),
    "yellow": (245, 220, 30),
    "purple": (150, 40, 190),
    "cyan": (40, 210, 220),
}
HEIGHT_SCALE = 0.5  # image height of one unit of z, relative to one unit of x
_LEVELS = 8  # brightness steps of the lighting gradient
_TONES = 2
_ZONE_LABEL = _LEVELS * _TONES  # per colour: fill, border
_BLOCK_LABEL = _ZONE_LABEL + 2 * len(COLOURS)  # per colour: top, side, mark
_GRIPPER_LABEL = _BLOCK_LABEL + 3 * len(COLOURS)  # fingers, outline
_SHADOW_LABEL = _GRIPPER_LABEL + 2
LABELS = 64  # size of a palette
_SPRITE_REACH = 0.16  # half the side of a block or gripper sprite, in workspace units
_ZONE_REACH = 0.15
_CLEAR = -1

Paint = Callable[[Tensor, Tensor], Tensor]  # (right, up) in workspace units as seen in the image -> label, or _CLEAR


@dataclass(frozen=True)
class Sprites:
    """Cut-outs of one size, R rows by C columns, and where those rows and columns lie relative to the object's pixel."""

    label_NRC: Tensor  # int32
    hidden_NRC: Tensor  # int64: 0 where painted, larger than any pixel index where transparent
    row_R: Tensor  # int64
    column_C: Tensor  # int64


def palette(domain: Domain, light_B: Tensor) -> Tensor:
    """The colours of every label under each environment's light: int32 [B, LABELS], bytes R, G, B, 255."""
    base = torch.zeros(LABELS, 3, device=light_B.device)
    shade_L = 1 - domain.gradient * torch.arange(_LEVELS, device=light_B.device) / (_LEVELS - 1)
    table_T3 = torch.tensor(domain.table, dtype=torch.float32, device=light_B.device)
    base[:_ZONE_LABEL] = (shade_L[:, None, None] * table_T3).view(-1, 3)
    solid = torch.tensor([RGB[name] for name in COLOURS], dtype=torch.float32, device=light_B.device)
    zones = torch.stack([solid * 0.55 + 255 * 0.45, solid * 0.75], dim=1)
    blocks = torch.stack([solid, solid * 0.5, solid * 0.3 + 255 * 0.7], dim=1)
    base[_ZONE_LABEL:_BLOCK_LABEL] = zones.view(-1, 3)
    base[_BLOCK_LABEL:_GRIPPER_LABEL] = blocks.view(-1, 3)
    base[_GRIPPER_LABEL] = 250.0
    base[_GRIPPER_LABEL + 1] = 20.0
    base[_SHADOW_LABEL] = table_T3[1] * 0.55
    gain_B3 = (1 + domain.gain_spread * light_B)[:, None] * base.new_tensor(domain.gain)
    rgb_BP3 = (base * gain_B3[:, None]).clamp(0, 255).to(torch.uint8)
    alpha_BP1 = torch.full_like(rgb_BP3[..., :1], 255)
    return torch.cat([rgb_BP3, alpha_BP1], dim=-1).view(torch.int32)[..., 0]


class Painter:
    """Draws a batch of tables at one image size. ``zoom`` magnifies; a following camera keeps the gripper centred."""

    def __init__(self, domain: Domain, size: int, device: torch.device, *, zoom: float = 1.0, following: bool = False) -> None:
        self.domain, self.size, self.following = domain, size, following
        self.scale = domain.zoom * size * zoom  # pixels per workspace unit
        self.pixels = size * size
        self.table_P = _table_labels(domain, size, device)
        self.zones = self._cut(
            [_zone_paint(c, round_) for round_ in (False, True) for c in range(len(COLOURS))], _ZONE_REACH, device
        )
        blocks = [_block_paint(c, s, domain.squash) for c in range(len(COLOURS)) for s in range(len(SHAPES))]
        others = [_gripper_paint(opening=False), _gripper_paint(opening=True), _shadow_paint(0.035), _shadow_paint(BLOCK_RADIUS)]
        self.closed_id = len(blocks)
        self.things = self._cut(blocks + others, _SPRITE_REACH, device)

    def background(self, layout: Layout) -> Tensor:
        """The label map of table and zones, which a fixed camera sees unchanged for a whole episode."""
        offset_B1 = self._palette_offset(layout)
        canvas = torch.nn.functional.pad(self.table_P, (0, 1)) + offset_B1
        return canvas if self.following else self._paint_zones(canvas, layout, None)

    def labels(self, background: Tensor, layout: Layout, state: State) -> Tensor:
        """The whole scene on top of ``background``."""
        canvas = background.clone()
        centre_B3 = state.gripper_B3 if self.following else None
        if self.following:
            canvas = self._paint_zones(canvas, layout, centre_B3)
        ids_BN, place_BN3 = self._things(layout, state)
        self._stamp(canvas, self.things, ids_BN, self._project(place_BN3, centre_B3), self._palette_offset(layout))
        return canvas

    def colour(self, canvas: Tensor, palette_BP: Tensor) -> Tensor:
        """Labels to pixels: uint8 [B, size, size, 3], a view that skips the fourth byte."""
        rgba = palette_BP.reshape(-1).index_select(0, canvas.view(-1)).view(canvas.shape)
        return rgba[:, : self.pixels].unflatten(1, (self.size, self.size)).unsqueeze(-1).view(torch.uint8)[..., :3]

    def _palette_offset(self, layout: Layout) -> Tensor:
        b = layout.task_B.shape[0]
        return (torch.arange(b, dtype=torch.int32, device=layout.task_B.device) * LABELS)[:, None]

    def _things(self, layout: Layout, state: State) -> tuple[Tensor, Tensor]:
        """Sprite numbers [B, N] and places [B, N, 3] from back to front: shadows, blocks (low and far ones first), gripper."""
        blocks_BK3 = state.blocks_BK3
        order_BK = (blocks_BK3[..., 2] * 16 - blocks_BK3[..., 1]).argsort(dim=1, stable=True)
        sorted_BK3 = blocks_BK3.gather(1, order_BK[..., None].expand_as(blocks_BK3))
        gripper_B13 = state.gripper_B3[:, None]
        ground_3 = blocks_BK3.new_tensor((1.0, 1.0, 0.0))
        place_BN3 = torch.cat([sorted_BK3[:, -1:] * ground_3, gripper_B13 * ground_3, sorted_BK3, gripper_B13], dim=1)
        shadow_B2 = torch.tensor([self.closed_id + 3, self.closed_id + 2], device=order_BK.device).expand(order_BK.shape[0], 2)
        gripper_B1 = self.closed_id + (state.open_B > 0.5).long()[:, None]
        return torch.cat([shadow_B2, layout.combination_BK.gather(1, order_BK), gripper_B1], dim=1), place_BN3

    def _paint_zones(self, canvas: Tensor, layout: Layout, centre_B3: Tensor | None) -> Tensor:
        ids_B2 = (layout.zone_colour_2B + len(COLOURS) * (layout.family_B == PICK_PLACE).long()).t()
        place_B23 = layout.zone_B23
        self._stamp(canvas, self.zones, ids_B2, self._project(place_B23, centre_B3), self._palette_offset(layout))
        return canvas

    def _project(self, place_BN3: Tensor, centre_B3: Tensor | None) -> Tensor:
        """Pixel column and row of points in space: int64 [B, N, 2]."""
        x, y, z = place_BN3.unbind(-1)
        right, up = x, y * self.domain.squash + z * HEIGHT_SCALE
        left, bottom = self.size * self.domain.left, self.size * self.domain.bottom
        if centre_B3 is not None:  # it hangs above the gripper, so it follows in the plane but not in height
            left = bottom = self.size * 0.5
            right, up = right - centre_B3[:, None, 0], up - centre_B3[:, None, 1] * self.domain.squash
        return torch.stack([left + right * self.scale, bottom - up * self.scale], dim=-1).floor().long()

    def _stamp(self, canvas: Tensor, sprites: Sprites, ids_BN: Tensor, pixel_BN2: Tensor, offset_B1: Tensor) -> None:
        """Scatter sprites onto the canvas, one slot after another; what is outside or transparent goes to the last column."""
        outside = self.pixels
        column_BNC = self._inside(pixel_BN2[..., :1] + sprites.column_C, 1)
        row_BNR = self._inside(pixel_BN2[..., 1:] + sprites.row_R, self.size)
        index = (
            sprites.hidden_NRC[ids_BN].add_(row_BNR[..., :, None]).add_(column_BNC[..., None, :]).clamp_(max=outside).flatten(2)
        )
        label = sprites.label_NRC[ids_BN].flatten(2).add_(offset_B1[..., None])
        for slot in range(ids_BN.shape[1]):
            canvas.scatter_(1, index[:, slot], label[:, slot])

    def _inside(self, coordinate: Tensor, stride: int) -> Tensor:
        """The coordinate's part of a pixel index, or more than any pixel index where it is outside the image."""
        return torch.where((coordinate >= 0) & (coordinate < self.size), coordinate * stride, self.pixels)

    def _cut(self, paints: list[Paint], reach: float, device: torch.device) -> Sprites:
        """Paint every sprite on a square of half width ``reach`` and keep the rectangle that any of them needs."""
        half = int(reach * self.scale) + 1
        offset_S = torch.arange(-half, half + 1)
        right, up = torch.meshgrid(offset_S / self.scale, -offset_S / self.scale, indexing="xy")
        label_NSS = torch.stack([paint(right, up) for paint in paints]).to(torch.int32)
        used_SS = (label_NSS != _CLEAR).any(0)
        row_R, column_C = (used_SS.any(axis).nonzero()[:, 0] for axis in (1, 0))
        label_NRC = label_NSS[:, row_R][:, :, column_C]
        hidden_NRC = (label_NRC == _CLEAR).long() * self.pixels
        parts = (label_NRC.clamp(min=0), hidden_NRC, offset_S[row_R], offset_S[column_C])
        return Sprites(*(part.to(device) for part in parts))


def _table_labels(domain: Domain, size: int, device: torch.device) -> Tensor:
    """Texture and lighting of the bare table: int32 [size * size]. Tones alternate in cells of a sixteenth of the image."""
    cell = torch.arange(size) * 16 // size
    tone = (cell[:, None] // 2 if domain.stripes else cell[:, None] // 2 + cell[None] // 2) % _TONES
    level = torch.arange(size) * _LEVELS // size
    return (level[None] * _TONES + tone).expand(size, size).to(torch.int32).flatten().to(device)


def _layers(*layers: tuple[Tensor, int]) -> Tensor:
    """Later layers cover earlier ones."""
    out = torch.full_like(layers[0][0], _CLEAR, dtype=torch.int64)
    for mask, label in layers:
        out = torch.where(mask, label, out)
    return out


def _zone_paint(colour: int, round_: bool) -> Paint:
    label = _ZONE_LABEL + 2 * colour

    def paint(right: Tensor, up: Tensor) -> Tensor:
        flat = up / 0.84  # lying on the table: seen squashed
        distance = (right * right + flat * flat).sqrt() if round_ else torch.maximum(right.abs(), flat.abs())
        return _layers((distance <= ZONE_RADIUS, label + 1), (distance <= ZONE_RADIUS * 0.82, label))

    return paint


def _square(right: Tensor, up: Tensor) -> Tensor:
    return torch.maximum(right.abs(), up.abs()) <= BLOCK_RADIUS * 0.92


def _disc(right: Tensor, up: Tensor) -> Tensor:
    return right * right + up * up <= BLOCK_RADIUS**2 * 1.1


def _triangle(right: Tensor, up: Tensor) -> Tensor:
    return (up >= -BLOCK_RADIUS) & (up <= BLOCK_RADIUS * 1.3 - right.abs() * 2)


def _nowhere(right: Tensor, up: Tensor) -> Tensor:
    return torch.zeros_like(right, dtype=torch.bool)


def _hole(right: Tensor, up: Tensor) -> Tensor:
    return right * right + up * up <= (BLOCK_RADIUS * 0.45) ** 2


_SILHOUETTES = {"cube": (_square, _nowhere), "disc": (_disc, _hole), "prism": (_triangle, _nowhere)}


def _block_paint(colour: int, shape: int, squash: float) -> Paint:
    """A prism over the shape's outline: the bright top, raised, above the dark side that faces the camera."""
    label = _BLOCK_LABEL + 3 * colour
    outline, mark = _SILHOUETTES[SHAPES[shape]]
    rise = BLOCK_HEIGHT * HEIGHT_SCALE

    def paint(right: Tensor, up: Tensor) -> Tensor:
        swept = [outline(right, (up - rise * part) / squash) for part in (0.0, 0.25, 0.5, 0.75, 1.0)]
        side = torch.stack(swept).any(0)
        top = (up - rise) / squash
        return _layers((side, label + 1), (outline(right, top), label), (mark(right, top), label + 2))

    return paint


def _gripper_paint(*, opening: bool) -> Paint:
    """Two upright fingers under a dark bar, wide apart when open."""
    spread = 0.095 if opening else 0.03

    def paint(right: Tensor, up: Tensor) -> Tensor:
        fingers = ((right.abs() - spread).abs() <= 0.018) & (up >= -0.02) & (up <= 0.10)
        bar = (right.abs() <= spread + 0.03) & (up > 0.075) & (up <= 0.125)
        return _layers((fingers, _GRIPPER_LABEL), (bar, _GRIPPER_LABEL + 1))

    return paint


def _shadow_paint(radius: float) -> Paint:
    def paint(right: Tensor, up: Tensor) -> Tensor:
        return _layers((right * right + (up / 0.84) ** 2 <= radius * radius, _SHADOW_LABEL))

    return paint
