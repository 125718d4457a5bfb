"""Textured objects from a seed: what the small generator and the elevation regressor learn from, and are measured on.

Everything here is made by this code; no asset, picture or shape of anyone else's goes in. An object is a triangle mesh with a colour at
each vertex, light included: a soft sky from straight above and a weaker sun from a direction of its own, both fixed to the object, so that
every view of it agrees with every other. Families are numbered; those in HELD_OUT are never trained on.
"""

from __future__ import annotations

import colorsys
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

Paint = Callable[[np.ndarray, np.ndarray], np.ndarray]  # places in the part's own frame and normals there -> sRGB


@dataclass(frozen=True)
class Object:
    """In the unit frame: Z up, the front faces -Y, inside the unit sphere. Each of its parts is closed; parts may run into each other."""

    vertices: Float[np.ndarray, "n 3"]  # float32; repeated where an edge is sharp
    faces: Int[np.ndarray, "f 3"]  # int32, counter-clockwise from outside
    colors: Float[np.ndarray, "n 3"]  # float32 sRGB in [0, 1], light included
    family: int


# --- shapes: grids of points [rows columns 3] with normals, joined to closed surfaces -----------------------------------------------------


def _grid_faces(rows: int, columns: int, first: int = 0) -> np.ndarray:
    a = first + (np.arange(rows - 1)[:, None] * columns + np.arange(columns - 1)).ravel()
    return np.concatenate([np.stack([a, a + 1, a + columns + 1], 1), np.stack([a, a + columns + 1, a + columns], 1)])


def box(size, steps: int = 7):
    """A box of the given edge lengths about the origin."""
    half = np.asarray(size, float) / 2
    u, v = np.meshgrid(np.linspace(-1, 1, steps), np.linspace(-1, 1, steps), indexing="ij")
    points, normals, faces = [], [], []
    for axis in range(3):
        for sign in (-1, 1):
            face = np.zeros((steps, steps, 3))
            face[..., axis], face[..., (axis + 1) % 3], face[..., (axis + 2) % 3] = sign, u, v
            normal = np.zeros(3)
            normal[axis] = sign
            grid = _grid_faces(steps, steps, len(points) * steps * steps)
            faces.append(grid if sign < 0 else grid[:, ::-1])
            points.append((face * half).reshape(-1, 3))
            normals.append(np.broadcast_to(normal, (steps * steps, 3)))
    return np.concatenate(points), np.concatenate(normals), np.concatenate(faces)


def ellipsoid(radii, square: float = 1.0, rows: int = 15, columns: int = 24):
    """An ellipsoid; `square` < 1 draws it out towards the box around it (a superellipsoid's exponent), which rounds a box's edges."""
    radii = np.asarray(radii, float)
    low, long = np.linspace(-math.pi / 2, math.pi / 2, rows)[:, None], np.linspace(-math.pi, math.pi, columns + 1)[None]

    def power(value, exponent):
        return np.sign(value) * np.abs(value) ** exponent

    def surface(e):
        across = power(np.where(np.abs(low) < 1.57, np.cos(low), 0), e)  # 0 at the poles, to the last bit
        return np.stack(
            np.broadcast_arrays(across * power(np.cos(long), e), across * power(np.sin(long), e), power(np.sin(low), e)), -1
        ).reshape(-1, 3)

    points, normals = surface(square), surface(2 - square)
    points[:: columns + 1] = points[columns :: columns + 1]  # the seam, to the last bit
    return points * radii, _unit(normals / radii), _grid_faces(rows, columns + 1)


def lathe(profile, smooth: bool = False, columns: int = 24):
    """A profile of (radius, height), from bottom to top and closed by a radius of 0 at both ends, turned about Z."""
    profile = np.asarray(profile, float)
    angle = np.linspace(0, 2 * math.pi, columns + 1)
    angle[-1] = 0
    around = np.stack([np.cos(angle), np.sin(angle)], 1)
    if smooth:
        slope = np.gradient(profile, axis=0)
        strips = [(profile, np.stack([slope[:, 1], -slope[:, 0]], 1))]
    else:
        strips = []
        for a, b in zip(profile[:-1], profile[1:], strict=True):
            steps = np.linspace(0, 1, max(2, min(9, 2 + int(np.linalg.norm(b - a) / 0.12))))[:, None]
            strips.append((a + (b - a) * steps, np.broadcast_to([b[1] - a[1], a[0] - b[0]], (len(steps), 2))))
    points, normals, faces, count = [], [], [], 0
    for line, outward in strips:
        rows = len(line)
        faces.append(_grid_faces(rows, columns + 1, count))
        count += rows * (columns + 1)
        points.append(np.concatenate([line[:, None, :1] * around, np.repeat(line[:, None, 1:], columns + 1, 1)], 2).reshape(-1, 3))
        turned = np.concatenate([outward[:, None, :1] * around, np.repeat(outward[:, None, 1:], columns + 1, 1)], 2)
        normals.append(_unit(turned.reshape(-1, 3)))
    return np.concatenate(points), np.concatenate(normals), np.concatenate(faces)


def torus(radius: float, thickness: float, rows: int = 12, columns: int = 24):
    """About Z."""
    long, across = np.linspace(0, 2 * math.pi, columns + 1), np.linspace(0, 2 * math.pi, rows + 1)[:, None]
    long[-1] = across[-1] = 0
    ring = np.stack(np.broadcast_arrays(np.cos(long), np.sin(long), np.zeros((rows + 1, 1))), -1)
    normals = np.cos(across)[..., None] * ring + np.sin(across)[..., None] * np.array([0, 0, 1.0])
    return (ring * radius + normals * thickness).reshape(-1, 3), normals.reshape(-1, 3), _grid_faces(rows + 1, columns + 1)


def tube(path, radii, columns: int = 12):
    """A round tube along a path of points with a radius at each, its ends rounded off."""
    path = np.asarray(path, float)
    radii = np.broadcast_to(np.asarray(radii, float), len(path))
    along = _unit(np.gradient(path, axis=0))
    cap = np.array([1.0, 0.8, 0.4])
    start = [path[0] - along[0] * radii[0] * reach for reach in cap]
    end = [path[-1] + along[-1] * radii[-1] * reach for reach in cap[::-1]]
    path = np.concatenate([start, path, end])
    radii = np.concatenate([radii[0] * np.sqrt(1 - cap**2), radii, radii[-1] * np.sqrt(1 - cap[::-1] ** 2)])
    tilt = np.concatenate([cap * -1, np.zeros(len(along)), cap[::-1]])
    along = np.concatenate([along[:1].repeat(3, 0), along, along[-1:].repeat(3, 0)])
    side = np.cross(along[0], [0.3, 0.9, 0.2] if abs(along[0, 1]) < 0.8 else [0.9, 0.3, 0.2])
    angle = np.linspace(0, 2 * math.pi, columns + 1)
    angle[-1] = 0
    rings, normals = [], []
    for centre, radius, forward, lean in zip(path, radii, along, tilt, strict=True):
        side = _unit(side - forward * (side @ forward))
        up = np.cross(forward, side)
        around = np.cos(angle)[:, None] * side + np.sin(angle)[:, None] * up
        rings.append(centre + around * radius)
        normals.append(around * math.sqrt(1 - lean**2) + forward * lean)
    return np.concatenate(rings), np.concatenate(normals), _grid_faces(len(path), columns + 1)


def cone(radius: float, height: float, top: float = 0.0, columns: int = 24):
    """Or a cylinder, where the top is as wide as the foot. Stands on its foot's centre."""
    return lathe([(0, 0), (radius, 0), (top, height), (0, height)], columns=columns)


def _unit(vectors):
    return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-9)


# --- paint ------------------------------------------------------------------------------------------------------------------------------


def _paint(rng: np.random.Generator, palette: np.ndarray, base: int, plain: float = 0.45) -> Paint:
    """A colour of the palette, plain or with a pattern of a second one."""
    first, second = palette[base % len(palette)], palette[(base + 1 + int(rng.integers(len(palette) - 1))) % len(palette)]
    if rng.random() < plain:
        return lambda points, normals: np.broadcast_to(first, points.shape)
    kind, axis = int(rng.integers(6)), int(rng.integers(3))
    count, phase, share = rng.uniform(1.0, 3.0), rng.uniform(0, 1), rng.uniform(0.3, 0.6)
    centres, reach = rng.uniform(-1, 1, (int(rng.integers(5, 14)), 3)), rng.uniform(0.2, 0.4)

    def mask(points, normals):
        low, high = points.min(0), points.max(0)
        place = 2 * (points - low) / np.maximum(high - low, 1e-6) - 1  # the part's own box
        if kind == 0:  # stripes
            return ((place[:, axis] * count + phase) % 1 < share).astype(float)
        if kind == 1:  # checks
            return (np.floor(place * count + phase).sum(1) % 2).astype(float)
        if kind == 2:  # spots
            return (np.linalg.norm(place[:, None] - centres, axis=2).min(1) < reach).astype(float)
        if kind == 3:  # a gradient
            return (place[:, 2 if axis == 0 else axis] + 1) / 2
        if kind == 4:  # two halves
            return (place[:, axis] > 2 * phase - 1).astype(float)
        return ((place[:, 1] < 0) & (np.abs(place[:, 0]) < share + 0.1) & (np.abs(place[:, 2]) < share)).astype(float)  # a label in front

    return lambda points, normals: first + (second - first) * mask(points, normals)[:, None]


def _palette(rng: np.random.Generator) -> np.ndarray:
    """Five colours: two or three strong hues, a dark and a light one in a random order."""
    hue, colors = rng.uniform(), []
    for _ in range(3):
        colors.append(colorsys.hsv_to_rgb(hue, rng.uniform(0.35, 1.0), rng.uniform(0.45, 1.0)))
        hue = (hue + rng.choice([0.08, 0.33, 0.5, 0.66]) + rng.uniform(-0.05, 0.05)) % 1
    colors.append(colorsys.hsv_to_rgb(rng.uniform(), rng.uniform(0, 0.5), rng.uniform(0.1, 0.35)))
    colors.append(colorsys.hsv_to_rgb(rng.uniform(), rng.uniform(0, 0.3), rng.uniform(0.75, 0.95)))
    return np.asarray(colors)[rng.permutation(5)]


class Maker:
    """Parts as they are put together."""

    def __init__(self, rng: np.random.Generator):
        self.rng, self.palette = rng, _palette(rng)
        self.vertices: list[np.ndarray] = []
        self.normals: list[np.ndarray] = []
        self.colors: list[np.ndarray] = []
        self.faces: list[np.ndarray] = []
        self.count = 0

    def paint(self, base: int, plain: float = 0.45) -> Paint:
        return _paint(self.rng, self.palette, base, plain)

    def flat(self, color) -> Paint:
        return lambda points, normals: np.broadcast_to(np.asarray(color, float), points.shape)

    def u(self, low: float, high: float) -> float:
        return float(self.rng.uniform(low, high))

    def put(self, shape, paint: Paint, at=(0, 0, 0), turn: tuple[str, float] | None = None) -> None:
        """turn: an axis and degrees, about the shape's own origin."""
        points, normals, faces = shape
        color = paint(points, normals)
        if turn is not None:
            c, s = math.cos(math.radians(turn[1])), math.sin(math.radians(turn[1]))
            i, j = {"x": (1, 2), "y": (2, 0), "z": (0, 1)}[turn[0]]
            matrix = np.eye(3)
            matrix[i, i], matrix[i, j], matrix[j, i], matrix[j, j] = c, -s, s, c
            points, normals = points @ matrix.T, normals @ matrix.T
        self.vertices.append(points + np.asarray(at, float))
        self.normals.append(normals)
        self.colors.append(np.array(color))
        self.faces.append(faces + self.count)
        self.count += len(points)

    def wheel(self, radius: float, width: float, at, paint: Paint) -> None:
        """Its axle along X."""
        self.put(lathe([(0, -width / 2), (radius, -width / 2), (radius, width / 2), (0, width / 2)], columns=18), paint, at, ("y", 90))

    def eyes(self, at, apart: float, size: float) -> None:
        for side in (-1, 1):
            self.put(
                ellipsoid((size, size * 0.7, size), rows=9, columns=12), self.flat((0.05, 0.05, 0.08)), np.add(at, (side * apart, 0, 0))
            )


# --- families ----------------------------------------------------------------------------------------------------------------------------


def _mug(m: Maker):
    r, h, wall = m.u(0.35, 0.6), m.u(0.6, 1.2), m.u(0.05, 0.09)
    flare = m.u(0.8, 1.2)
    m.put(lathe([(0, 0), (r, 0), (r * flare, h), (r * flare - wall, h), (r - wall, wall), (0, wall)]), m.paint(0, 0.25))
    angle = np.linspace(-1.4, 1.4, 9)
    side = m.rng.choice([-1, 1])
    reach = m.u(0.2, 0.35)
    middle = r * (1 + flare) / 2
    path = np.stack([side * (middle - 0.03 + reach * np.cos(angle)), 0 * angle, h / 2 + h * 0.3 * np.sin(angle)], 1)
    m.put(tube(path, m.u(0.05, 0.09)), m.paint(1, 0.9))


def _lamp(m: Maker):
    foot, h = m.u(0.25, 0.45), m.u(0.8, 1.4)
    m.put(cone(foot, m.u(0.06, 0.15), foot * m.u(0.5, 1)), m.paint(0))
    m.put(tube([(0, 0, 0.05), (0, 0, h / 2), (0, 0, h)], m.u(0.03, 0.07)), m.paint(1, 0.8))
    wide, tall = m.u(0.35, 0.6), m.u(0.35, 0.7)
    m.put(cone(wide, tall, wide * m.u(0.3, 0.9)), m.paint(2, 0.3), (0, 0, h - tall * 0.4))


def _table(m: Maker):
    w, d, h, thick = m.u(0.7, 1.4), m.u(0.6, 1.1), m.u(0.5, 0.9), m.u(0.06, 0.14)
    top = m.paint(0, 0.3)
    if m.rng.random() < 0.3:
        m.put(cone(w / 2, thick, w / 2), top, (0, 0, h))
        d = w
        inset = 0.3
    else:
        m.put(box((w, d, thick)), top, (0, 0, h + thick / 2))
        inset = 0.42
    legs, thin = m.paint(1, 0.7), m.u(0.04, 0.08)
    for x in (-1, 1):
        for y in (-1, 1):
            m.put(box((thin * 2, thin * 2, h), 4), legs, (x * w * inset, y * d * inset, h / 2))
    if m.rng.random() < 0.5:
        m.put(ellipsoid((0.14, 0.14, m.u(0.1, 0.25))), m.paint(2), (m.u(-0.25, 0.25) * w, m.u(-0.25, 0.25) * d, h + thick + 0.1))


def _chair(m: Maker):
    w, d, h, thick, thin = m.u(0.5, 0.8), m.u(0.5, 0.7), m.u(0.4, 0.6), m.u(0.07, 0.14), m.u(0.035, 0.06)
    m.put(box((w, d, thick)), m.paint(0, 0.4), (0, 0, h))
    legs = m.paint(1, 0.8)
    for x in (-1, 1):
        for y in (-1, 1):
            m.put(box((thin * 2, thin * 2, h), 4), legs, (x * (w / 2 - thin), y * (d / 2 - thin), h / 2))
    back = m.u(0.5, 0.8)
    m.put(box((w, thick, back)), m.paint(2, 0.3), (0, d / 2 - thick / 2, h + back / 2))
    if m.rng.random() < 0.4:
        for x in (-1, 1):
            m.put(box((thin * 2, d, thin * 2), 4), legs, (x * (w / 2), 0, h + 0.28))
            m.put(box((thin * 2, thin * 2, 0.28), 4), legs, (x * (w / 2), -d / 2 + thin, h + 0.14))


def _house(m: Maker):
    w, d, h, roof = m.u(0.7, 1.2), m.u(0.7, 1.2), m.u(0.5, 0.9), m.u(0.3, 0.7)
    m.put(box((w, d, h)), m.paint(0, 0.5), (0, 0, h / 2))
    over, cover = m.u(1.05, 1.2), m.paint(1, 0.4)
    if m.rng.random() < 0.5:  # a pyramid
        m.put(lathe([(0, 0), (w * over * 0.707, 0), (0, roof)], columns=4), cover, (0, 0, h), ("z", 45))
    else:  # a ridge: three sides turned, stretched to the house
        points, normals, faces = lathe([(0, 0), (1, 0), (1, 1), (0, 1)], columns=3)
        points = np.stack([points[:, 1] / 1.732 * w * over, (points[:, 2] - 0.5) * d * over, (points[:, 0] + 0.5) / 1.5 * roof], 1)
        normals = _unit(np.stack([normals[:, 1] / w, normals[:, 2], normals[:, 0] / roof], 1))
        m.put((points, normals, faces), cover, (0, 0, h))
    m.put(box((m.u(0.15, 0.25), 0.06, h * 0.55), 4), m.paint(2, 0.9), (m.u(-0.2, 0.2) * w, -d / 2, h * 0.275))
    panes = m.paint(3, 1)
    for x in (-0.32, 0.32):
        for y in (-1, 1):
            m.put(box((0.14, 0.05, 0.16), 3), panes, (x * w, y * d / 2, h * 0.65))
    if m.rng.random() < 0.5:
        m.put(box((0.12, 0.12, roof * 0.8), 4), m.paint(4, 0.8), (w * 0.25 * m.rng.choice([-1, 1]), d * 0.15, h + roof * 0.6))


def _animal(m: Maker):
    """Four legs, along Y, the head in front."""
    long, r, leg, thin = m.u(0.4, 0.65), m.u(0.22, 0.36), m.u(0.25, 0.6), m.u(0.06, 0.11)
    coat = m.paint(0, 0.35)
    m.put(ellipsoid((r, long, r * m.u(0.9, 1.15)), m.u(0.8, 1)), coat, (0, 0, leg + r))
    feet = m.paint(1, 0.5)
    for x in (-1, 1):
        for y in (-1, 1):
            place = (x * r * 0.6, y * long * 0.65)
            m.put(tube([(*place, leg + r * 0.6), (*place, leg / 2), (*place, thin)], thin), feet)
    head, rise = m.u(0.18, 0.3), m.u(0.1, 0.6)
    nose = np.array([0, -long - head * 0.5, leg + r + rise])
    m.put(tube([(0, -long * 0.6, leg + r), nose], head * 0.55), coat)
    m.put(ellipsoid((head, head * m.u(1, 1.4), head)), m.paint(0, 0.7), nose)
    m.put(ellipsoid((head * 0.5, head * 0.5, head * 0.4)), m.paint(2, 1), nose + (0, -head * 1.1, -head * 0.25))
    m.eyes(nose + (0, -head * 0.85, head * 0.35), head * 0.5, head * 0.2)
    ear = m.u(0.1, 0.4)
    for x in (-1, 1):
        m.put(ellipsoid((0.07, 0.05, ear), rows=9, columns=12), m.paint(1, 1), nose + (x * head * 0.7, 0.05, head * 0.6 + ear * 0.5))
    m.put(tube([(0, long * 0.85, leg + r), (0, long * 1.2, leg + r * m.u(0.8, 1.8)), (0, long * 1.3, leg + r * m.u(0.4, 2.4))], 0.05), coat)


def _car(m: Maker):
    w, d, h, wheel = m.u(0.5, 0.75), m.u(1.0, 1.7), m.u(0.22, 0.4), m.u(0.15, 0.25)
    body, square = m.paint(0, 0.5), m.u(0.15, 0.6)
    if m.rng.random() < 0.5:
        m.put(box((w, d, h)), body, (0, 0, wheel + h / 2))
        m.put(box((w * 0.85, d * m.u(0.4, 0.6), h * m.u(0.8, 1.1))), m.paint(1, 0.6), (0, d * m.u(-0.05, 0.2), wheel + h * 1.4))
    else:
        m.put(ellipsoid((w / 2, d / 2, h * 0.65), square), body, (0, 0, wheel + h / 2))
        m.put(ellipsoid((w * 0.42, d * m.u(0.2, 0.33), h * 0.8), square + 0.2), m.paint(1, 0.6), (0, d * m.u(-0.05, 0.15), wheel + h))
    tyres, lights = m.flat((0.08, 0.08, 0.09)) if m.rng.random() < 0.6 else m.paint(3, 0.8), m.flat((0.95, 0.9, 0.5))
    for x in (-1, 1):
        for y in (-1, 1):
            m.wheel(wheel, 0.12, (x * w * 0.48, y * d * 0.32, wheel), tyres)
        m.put(ellipsoid((0.06, 0.05, 0.06), rows=9, columns=12), lights, (x * w * 0.33, -d / 2 + 0.02, wheel + h * 0.55))


def _truck(m: Maker):
    w, d, wheel, cab, load = m.u(0.5, 0.7), m.u(1.2, 1.7), m.u(0.13, 0.2), m.u(0.4, 0.6), m.u(0.3, 0.8)
    m.put(box((w * 0.9, d, 0.12)), m.paint(3, 0.9), (0, 0, wheel + 0.06))
    m.put(box((w, d * 0.28, cab)), m.paint(0, 0.6), (0, -d * 0.36, wheel + 0.12 + cab / 2))
    m.put(box((w * 0.8, 0.04, cab * 0.35), 4), m.flat((0.55, 0.75, 0.9)), (0, -d * 0.5, wheel + 0.12 + cab * 0.7))
    if m.rng.random() < 0.6:
        m.put(box((w, d * 0.66, load)), m.paint(1, 0.25), (0, d * 0.16, wheel + 0.12 + load / 2))
    else:
        m.put(
            lathe([(0, -d * 0.33), (w / 2, -d * 0.33), (w / 2, d * 0.33), (0, d * 0.33)]),
            m.paint(1, 0.2),
            (0, d * 0.16, wheel + 0.1 + w / 2),
            ("x", 90),
        )
    for x in (-1, 1):
        for y in (-0.36, 0.1, 0.38):
            m.wheel(wheel, 0.12, (x * w * 0.46, y * d, wheel), m.flat((0.08, 0.08, 0.09)))


def _bottle(m: Maker):
    r, h, neck, tall = m.u(0.2, 0.4), m.u(0.6, 1.1), m.u(0.06, 0.14), m.u(0.15, 0.5)
    shoulder = m.u(0.1, 0.35)
    m.put(lathe([(0, 0), (r, 0), (r, h), (neck, h + shoulder), (neck, h + shoulder + tall), (0, h + shoulder + tall)]), m.paint(0, 0.5))
    m.put(cone(neck * 1.25, 0.12, neck * 1.25), m.paint(1, 1), (0, 0, h + shoulder + tall - 0.04))
    m.put(cone(r * 1.03, h * m.u(0.3, 0.6), r * 1.03), m.paint(2, 0.1), (0, 0, h * m.u(0.15, 0.35)))


def _tree(m: Maker):
    h, r = m.u(0.4, 0.8), m.u(0.06, 0.12)
    m.put(cone(r * 1.4, h, r), m.flat(np.array([0.4, 0.26, 0.13]) * m.u(0.6, 1.4)))
    leaves = m.paint(0, 0.6) if m.rng.random() < 0.4 else m.flat((m.u(0.1, 0.5), m.u(0.4, 0.8), m.u(0.05, 0.3)))
    if m.rng.random() < 0.5:
        levels, wide, z = int(m.rng.integers(1, 4)), m.u(0.35, 0.6), h * 0.7
        for k in range(levels):
            m.put(cone(wide * (1 - 0.25 * k), 0.6, columns=18), leaves, (0, 0, z))
            z += 0.33
    else:
        for _ in range(int(m.rng.integers(1, 6))):
            size = m.u(0.22, 0.45)
            m.put(ellipsoid((size, size, size * m.u(0.7, 1))), leaves, (m.u(-0.3, 0.3), m.u(-0.3, 0.3), h + m.u(0.05, 0.45)))


def _stack(m: Maker):
    """Any shapes, one upon the other."""
    z = 0.0
    for k in range(int(m.rng.integers(2, 6))):
        r, h = m.u(0.2, 0.55), m.u(0.2, 0.5)
        paint, at = m.paint(k, 0.35), (m.u(-0.12, 0.12), m.u(-0.12, 0.12))
        kind = int(m.rng.integers(5))
        if kind == 0:
            m.put(box((r * 1.6, r * m.u(0.9, 1.8), h)), paint, (*at, z + h / 2), ("z", m.u(0, 90)))
        elif kind == 1:
            m.put(ellipsoid((r, r * m.u(0.7, 1), h / 2), m.u(0.4, 1)), paint, (*at, z + h / 2), ("z", m.u(0, 90)))
        elif kind == 2:
            m.put(cone(r, h, r * m.u(0.2, 1)), paint, (*at, z))
        elif kind == 3:
            m.put(torus(r * 0.75, h / 2.5), paint, (*at, z + h / 2.5))
        else:
            m.put(lathe([(0, 0), (r, 0), (r, h), (0, h)], columns=int(m.rng.integers(3, 8))), paint, (*at, z), ("z", m.u(0, 120)))
        z += h * 0.95


def _blobs(m: Maker):
    """Ellipsoids and tubes in any place."""
    for k in range(int(m.rng.integers(3, 8))):
        at = (m.u(-0.5, 0.5), m.u(-0.5, 0.5), m.u(-0.5, 0.5))
        if m.rng.random() < 0.7:
            m.put(ellipsoid((m.u(0.12, 0.45), m.u(0.12, 0.45), m.u(0.12, 0.45)), m.u(0.3, 1)), m.paint(k, 0.4), at, ("z", m.u(0, 180)))
        else:
            m.put(tube([(0, 0, 0), at, np.multiply(at, m.u(1.2, 1.8))], m.u(0.05, 0.14)), m.paint(k, 0.6))


def _doll(m: Maker):
    leg, body, r, head = m.u(0.3, 0.55), m.u(0.4, 0.6), m.u(0.18, 0.3), m.u(0.16, 0.3)
    skin = m.flat(np.array([0.95, 0.75, 0.6]) * m.u(0.4, 1)) if m.rng.random() < 0.6 else m.paint(2, 0.9)
    trousers, shirt = m.paint(0, 0.6), m.paint(1, 0.25)
    for x in (-1, 1):
        m.put(tube([(x * r * 0.5, 0, leg), (x * r * 0.55, 0, leg / 2), (x * r * 0.6, 0, 0.08)], r * 0.38), trousers)
        m.put(ellipsoid((0.09, 0.16, 0.07)), m.flat((0.15, 0.1, 0.1)), (x * r * 0.6, -0.06, 0.06))
        hand = (x * (r + m.u(0.1, 0.4)), m.u(-0.3, 0.1), leg + body * m.u(0.1, 1.1))
        m.put(tube([(x * r * 0.8, 0, leg + body * 0.85), hand], 0.08), shirt)
        m.put(ellipsoid((0.09, 0.09, 0.09), rows=9, columns=12), skin, hand)
    m.put(ellipsoid((r, r * 0.75, body * 0.6), 0.7), shirt, (0, 0, leg + body / 2))
    top = leg + body + head * 0.85
    m.put(ellipsoid((head, head, head * m.u(1, 1.2))), skin, (0, 0, top))
    m.put(ellipsoid((head * 1.05, head * 1.02, head * 0.8)), m.paint(3, 0.8), (0, head * 0.22, top + head * 0.4))
    m.eyes((0, -head * 0.92, top + head * 0.05), head * 0.38, head * 0.14)


def _vase(m: Maker):
    count = 7
    radii = np.clip(0.4 + np.cumsum(m.rng.normal(0, 0.16, count)), 0.12, 0.65)
    heights = np.linspace(0, m.u(0.8, 1.5), count)
    z = np.linspace(0, heights[-1], 19)
    curve = np.interp(z, heights, radii)
    curve = np.convolve(np.pad(curve, 2, mode="edge"), [0.1, 0.25, 0.3, 0.25, 0.1], mode="valid")
    outside = np.stack([curve, z], 1)
    m.put(lathe([(0, 0), *outside, (curve[-1] - 0.06, z[-1]), (curve[-1] - 0.08, z[-1] - 0.2), (0, z[-1] - 0.22)]), m.paint(0, 0.15))


def _rocket(m: Maker):
    r, h = m.u(0.18, 0.35), m.u(0.7, 1.2)
    m.put(cone(r, h, r * m.u(0.8, 1)), m.paint(0, 0.3), (0, 0, 0.2))
    m.put(cone(r, m.u(0.3, 0.6)), m.paint(1, 0.7), (0, 0, 0.2 + h - 0.02))
    fins, wide = m.paint(2, 0.7), m.u(0.15, 0.35)
    count = int(m.rng.integers(3, 5))
    for k in range(count):
        angle = 360 / count * k
        c, s = math.cos(math.radians(angle)), math.sin(math.radians(angle))
        m.put(box((wide, 0.06, 0.45), 4), fins, ((r + wide * 0.35) * c, (r + wide * 0.35) * s, 0.25), ("z", angle))
    m.put(ellipsoid((r * 0.5, 0.06, r * 0.5)), m.paint(3, 1), (0, -r * 0.95, 0.2 + h * 0.7))
    m.put(cone(r * 0.6, 0.2, r * 0.4), m.flat((0.2, 0.2, 0.22)), (0, 0, 0.02))


def _robot(m: Maker):
    w, d, h, head = m.u(0.4, 0.7), m.u(0.3, 0.5), m.u(0.4, 0.7), m.u(0.25, 0.45)
    leg, limbs = m.u(0.2, 0.5), m.paint(1, 0.7)
    m.put(box((w, d, h)), m.paint(0, 0.4), (0, 0, leg + h / 2))
    m.put(box((w * 0.6, 0.05, h * 0.5), 4), m.paint(2, 0.3), (0, -d / 2, leg + h * 0.55))
    m.put(box((head * 1.2, head, head)), m.paint(3, 0.6), (0, 0, leg + h + head / 2 + 0.05))
    m.put(cone(0.06, 0.12, 0.06), limbs, (0, 0, leg + h - 0.02))
    m.eyes((0, -head * 0.5, leg + h + head * 0.6), head * 0.3, head * 0.15)
    m.put(tube([(0, 0, leg + h + head), (0, 0, leg + h + head + 0.2)], 0.02), limbs)
    m.put(ellipsoid((0.05, 0.05, 0.05), rows=9, columns=12), m.paint(4, 1), (0, 0, leg + h + head + 0.25))
    for x in (-1, 1):
        m.put(box((0.14, 0.16, leg), 4), limbs, (x * w * 0.28, 0, leg / 2))
        m.put(box((0.2, 0.3, 0.1), 4), m.paint(0, 1), (x * w * 0.28, -0.05, 0.05))
        m.put(tube([(x * w / 2, 0, leg + h * 0.85), (x * (w / 2 + 0.18), m.u(-0.3, 0), leg + h * m.u(0.2, 0.9))], 0.07), limbs)


def _mushroom(m: Maker):
    r, h, cap = m.u(0.1, 0.25), m.u(0.4, 0.8), m.u(0.4, 0.7)
    m.put(cone(r * m.u(1, 1.5), h, r), m.paint(0, 0.7))
    tall = m.u(0.25, 0.6)
    angle = np.linspace(0, math.pi / 2, 9)
    dome = [(cap * math.cos(a), tall * math.sin(a)) for a in angle[:-1]]
    m.put(lathe([(0, 0.05), *dome, (0, tall)]), m.paint(1, 0.1), (0, 0, h - 0.05))


def _plane(m: Maker):
    long, r, span, chord = m.u(0.6, 0.9), m.u(0.12, 0.22), m.u(0.6, 1.0), m.u(0.2, 0.35)
    m.put(ellipsoid((r, long, r), m.u(0.6, 1)), m.paint(0, 0.4))
    wings = m.paint(1, 0.4)
    m.put(box((span * 2, chord, 0.05)), wings, (0, m.u(-0.2, 0.1), m.u(-0.1, 0.12)))
    m.put(box((span * 0.7, chord * 0.6, 0.04)), wings, (0, long * 0.85, 0.04))
    m.put(box((0.05, chord * 0.8, 0.35), 4), m.paint(2, 0.6), (0, long * 0.85, 0.18))
    m.put(ellipsoid((r * 0.7, r * 1.6, r * 0.6)), m.flat((0.5, 0.7, 0.9)), (0, -long * 0.35, r * 0.75))
    if m.rng.random() < 0.5:
        m.put(box((0.5, 0.03, 0.06), 4), m.flat((0.1, 0.1, 0.1)), (0, -long - 0.02, 0), ("y", m.u(0, 90)))
    else:
        for x in (-1, 1):
            m.put(ellipsoid((0.09, 0.22, 0.09)), m.paint(3, 0.8), (x * span * 0.5, -0.1, -0.1))


def _fish(m: Maker):
    long, r = m.u(0.5, 0.8), m.u(0.15, 0.3)
    tall = r * m.u(1, 1.9)
    m.put(ellipsoid((r, long, tall)), m.paint(0, 0.2))
    fins = m.paint(1, 0.5)
    m.put(ellipsoid((0.05, 0.22, m.u(0.25, 0.45))), fins, (0, long * 1.1, 0))
    m.put(ellipsoid((0.05, 0.3, 0.2)), fins, (0, 0.05, tall * 1.05))
    for x in (-1, 1):
        m.put(ellipsoid((0.2, 0.12, 0.04)), fins, (x * (r + 0.1), -long * 0.2, -tall * 0.2), ("y", x * 25))
        m.put(ellipsoid((0.05, 0.07, 0.07), rows=9, columns=12), m.flat((0.05, 0.05, 0.08)), (x * r * 0.72, -long * 0.66, tall * 0.25))


def _snowman(m: Maker):
    z, r = 0.0, m.u(0.35, 0.5)
    shrink = m.u(0.65, 0.85)
    for k in range(3):
        m.put(ellipsoid((r, r, r)), m.paint(0 if k < 2 else 4, 0.7), (0, 0, z + r))
        top, z, r = z + r, z + r * 1.7, r * shrink
    r /= shrink
    m.eyes((0, -r * 0.9, top + r * 0.25), r * 0.35, r * 0.13)
    m.put(cone(r * 0.18, r * 1.1, columns=12), m.flat((0.95, 0.5, 0.1)), (0, -r * 0.9, top), ("x", 90))
    m.put(cone(r * 0.7, r * m.u(0.6, 1.2), r * m.u(0.5, 0.7)), m.paint(1, 0.5), (0, 0, top + r * 0.8))
    m.put(torus(r * 0.8, r * 0.2), m.paint(2, 0.4), (0, 0, top - r * 0.85))


def _train(m: Maker):
    w, d, wheel = m.u(0.4, 0.55), m.u(1.1, 1.6), m.u(0.12, 0.2)
    m.put(box((w, d, 0.14)), m.paint(3, 0.8), (0, 0, wheel + 0.1))
    r = w * m.u(0.38, 0.5)
    m.put(lathe([(0, -d * 0.3), (r, -d * 0.3), (r, d * 0.3), (0, d * 0.3)]), m.paint(0, 0.3), (0, -d * 0.15, wheel + 0.15 + r), ("x", 90))
    m.put(box((w, d * 0.3, r * 3)), m.paint(1, 0.5), (0, d * 0.33, wheel + 0.15 + r * 1.5))
    m.put(box((w * 1.2, d * 0.36, 0.07)), m.paint(2, 0.7), (0, d * 0.33, wheel + 0.15 + r * 3))
    m.put(cone(0.08, m.u(0.25, 0.45), m.u(0.08, 0.14)), m.paint(4, 0.8), (0, -d * 0.33, wheel + 0.1 + 2 * r))
    for x in (-1, 1):
        for y in np.linspace(-0.38, 0.38, int(m.rng.integers(2, 5))):
            m.wheel(wheel, 0.1, (x * w * 0.48, y * d, wheel), m.paint(2, 0.9))


def _cactus(m: Maker):
    r, h = m.u(0.14, 0.25), m.u(0.7, 1.2)
    skin = m.flat((m.u(0.1, 0.4), m.u(0.4, 0.75), m.u(0.1, 0.35))) if m.rng.random() < 0.5 else m.paint(0, 0.3)
    m.put(tube([(0, 0, 0.3), (0, 0, 0.3 + h / 2), (0, 0, 0.3 + h)], r, 14), skin)
    for _ in range(int(m.rng.integers(1, 4))):
        c, s, reach, z = *(lambda a: (math.cos(a), math.sin(a)))(m.u(0, 2 * math.pi)), m.u(0.3, 0.5), 0.3 + h * m.u(0.2, 0.6)
        path = [
            (0, 0, z),
            (reach * 0.8 * c, reach * 0.8 * s, z),
            (reach * c, reach * s, z + 0.1),
            (reach * c, reach * s, z + m.u(0.2, 0.5)),
        ]
        m.put(tube(path, r * 0.6), skin)
    m.put(lathe([(0, 0), (0.25, 0), (0.36, 0.35), (0, 0.35)]), m.paint(1, 0.3))
    if m.rng.random() < 0.5:
        m.put(ellipsoid((0.1, 0.1, 0.08)), m.paint(2, 1), (0, 0, 0.3 + h + r))


def _shelf(m: Maker):
    """A cupboard or a shelf with things on it."""
    w, d, h, thick = m.u(0.6, 1.1), m.u(0.25, 0.5), m.u(0.8, 1.4), 0.06
    wood, floors = m.paint(0, 0.6), int(m.rng.integers(2, 5))
    for x in (-1, 1):
        m.put(box((thick, d, h)), wood, (x * w / 2, 0, h / 2))
    m.put(box((w, 0.03, h)), m.paint(1, 0.6), (0, d / 2, h / 2))
    for k in range(floors):
        z = thick / 2 + k * (h - thick) / (floors - 1)
        m.put(box((w, d, thick)), wood, (0, 0, z))
        for _ in range(int(m.rng.integers(0, 3)) if k < floors - 1 else 1):
            size = m.u(0.12, 0.5) * h / floors
            at = (m.u(-0.35, 0.35) * w, m.u(-0.2, 0.1) * d, z + size)
            m.put(ellipsoid((size * 0.6, size * 0.5, size), m.u(0.2, 1), 11, 16), m.paint(int(m.rng.integers(5)), 0.6), at)


def _sign(m: Maker):
    """A board on a post, a pattern on its front."""
    h, w, tall = m.u(0.6, 1.1), m.u(0.5, 1.0), m.u(0.35, 0.7)
    m.put(cone(m.u(0.15, 0.3), 0.08, 0.1), m.paint(0, 0.9))
    m.put(tube([(0, 0, 0.05), (0, 0, h)], m.u(0.04, 0.08)), m.paint(0, 0.6))
    if m.rng.random() < 0.5:
        m.put(box((w, m.u(0.06, 0.2), tall), 9), m.paint(1, 0.05), (0, 0, h + tall / 2))
    else:
        thick = m.u(0.08, 0.2)
        m.put(lathe([(0, 0), (w / 2, 0), (w / 2, thick), (0, thick)]), m.paint(1, 0.05), (0, thick / 2, h + w / 2), ("x", 90))


def _teapot(m: Maker):
    r = m.u(0.4, 0.55)
    tall = r * m.u(0.7, 1.0)
    body = m.paint(0, 0.3)
    m.put(ellipsoid((r, r, tall)), body, (0, 0, tall))
    m.put(ellipsoid((0.08, 0.08, 0.08)), m.paint(1, 1), (0, 0, tall * 2 + 0.05))
    m.put(ellipsoid((r * 0.5, r * 0.5, 0.1)), m.paint(2, 0.7), (0, 0, tall * 1.93))
    m.put(tube([(r * 0.7, 0, tall * 0.8), (r * 1.25, 0, tall * 1.1), (r * 1.5, 0, tall * 1.8)], [0.13, 0.09, 0.06]), m.paint(1, 0.8))
    angle = np.linspace(-1.4, 1.4, 9)
    m.put(tube(np.stack([-r * 0.85 - 0.35 * np.cos(angle), 0 * angle, tall + tall * 0.55 * np.sin(angle)], 1), 0.06), m.paint(1, 0.8))


def _boat(m: Maker):
    long, w, h = m.u(0.7, 0.95), m.u(0.25, 0.4), m.u(0.2, 0.35)
    points, normals, faces = ellipsoid((w, long, h), 0.8)
    m.put(
        (points * np.where(points[:, 2:] > 0, (1, 1, 0.05), 1), np.where(points[:, 2:] > 0, (0, 0, 1), normals), faces),
        m.paint(0, 0.4),
        (0, 0, h),
    )
    if m.rng.random() < 0.6:
        m.put(tube([(0, 0, h), (0, 0, h + 1.1)], 0.035), m.paint(1, 1))
        for side, reach in ((1, m.u(0.3, 0.6)), (-1, m.u(0.2, 0.5))):
            points, normals, faces = lathe([(0, 0), (1, 0), (1, 1), (0, 1)], columns=3)
            sail = np.stack(
                [(points[:, 2] - 0.5) * 0.05, side * (points[:, 0] + 0.5) / 1.5 * reach, (points[:, 1] / 1.732 + 0.5) * 0.85], 1
            )
            m.put(
                (sail, np.broadcast_to((1.0, 0, 0), sail.shape), faces if side > 0 else faces[:, ::-1]),
                m.paint(2, 0.3),
                (0, side * 0.05, h + 0.2),
            )
    else:
        m.put(box((w * 1.1, long * 0.7, 0.3)), m.paint(1, 0.5), (0, 0.1, h + 0.15))
        m.put(cone(0.1, 0.4, 0.1), m.paint(2, 0.3), (0, 0.15, h + 0.25))


def _bird(m: Maker):
    r, long, leg = m.u(0.22, 0.32), m.u(0.35, 0.5), m.u(0.15, 0.4)
    coat, z = m.paint(0, 0.4), leg + r
    m.put(ellipsoid((r, long, r * 0.95)), coat, (0, 0, z))
    head = r * m.u(0.55, 0.75)
    at = np.array([0, -long * 0.9, z + r * m.u(0.7, 1.8)])
    m.put(tube([(0, -long * 0.5, z), at], head * 0.6), coat)
    m.put(ellipsoid((head, head, head)), m.paint(1, 0.7), at)
    m.put(cone(head * 0.4, head * 1.4, columns=12), m.flat((0.95, 0.65, 0.1)), at + (0, -head * 0.8, 0), ("x", 90))
    m.eyes(at + (0, -head * 0.6, head * 0.3), head * 0.65, head * 0.2)
    for x in (-1, 1):
        m.put(ellipsoid((0.06, long * 0.7, r * 0.6)), m.paint(2, 0.4), (x * r * 0.95, 0.08, z + 0.03))
        m.put(tube([(x * r * 0.4, 0, z), (x * r * 0.4, 0, 0.03)], 0.035), m.flat((0.95, 0.6, 0.1)))
        m.put(ellipsoid((0.08, 0.13, 0.03)), m.flat((0.95, 0.6, 0.1)), (x * r * 0.4, -0.06, 0.03))
    m.put(ellipsoid((r * 0.5, long * 0.5, 0.06)), m.paint(2, 0.5), (0, long * 1.1, z + r * 0.3), ("x", 20))


def _tower(m: Maker):
    r, h = m.u(0.3, 0.45), m.u(0.8, 1.2)
    columns = 24 if m.rng.random() < 0.6 else 6
    m.put(lathe([(0, 0), (r, 0), (r, h), (0, h)], columns=columns), m.paint(0, 0.3))
    m.put(lathe([(0, h), (r * 1.2, h), (r * 1.2, h + 0.15), (0, h + 0.15)], columns=columns), m.paint(1, 0.6))
    if m.rng.random() < 0.6:
        m.put(cone(r * 1.15, m.u(0.3, 0.7)), m.paint(2, 0.4), (0, 0, h + 0.14))
    else:
        for k in range(8):
            c, s = math.cos(k * math.pi / 4), math.sin(k * math.pi / 4)
            m.put(box((0.14, 0.14, 0.16), 3), m.paint(1, 1), (r * 1.08 * c, r * 1.08 * s, h + 0.22), ("z", 45 * k))
    m.put(box((0.2, 0.12, 0.35), 4), m.paint(3, 1), (0, -r, 0.17))
    for z in (0.5, 0.75):
        m.put(box((0.1, 0.1, 0.16), 3), m.flat((0.15, 0.15, 0.2)), (0, -r * 0.97, h * z))


FAMILIES: tuple[tuple[str, Callable[[Maker], None]], ...] = (
    ("mug", _mug),
    ("lamp", _lamp),
    ("table", _table),
    ("chair", _chair),
    ("house", _house),
    ("animal", _animal),
    ("car", _car),
    ("truck", _truck),
    ("bottle", _bottle),
    ("tree", _tree),
    ("stack", _stack),
    ("blobs", _blobs),
    ("doll", _doll),
    ("vase", _vase),
    ("rocket", _rocket),
    ("robot", _robot),
    ("mushroom", _mushroom),
    ("plane", _plane),
    ("fish", _fish),
    ("snowman", _snowman),
    ("train", _train),
    ("cactus", _cactus),
    ("shelf", _shelf),
    ("sign", _sign),
    ("teapot", _teapot),
    ("boat", _boat),
    ("bird", _bird),
    ("tower", _tower),
)
HELD_OUT = (24, 25, 26, 27)
TRAINING = tuple(k for k in range(len(FAMILIES)) if k not in HELD_OUT)


def make(seed: int, family: int | None = None) -> Object:
    """The object of a seed, of one family or of any that is trained on."""
    rng = np.random.default_rng([seed, len(FAMILIES) if family is None else family])
    chosen = int(rng.choice(TRAINING)) if family is None else family
    maker = Maker(rng)
    FAMILIES[chosen][1](maker)
    vertices = np.concatenate(maker.vertices) * np.append(rng.uniform(0.85, 1.15, 2), rng.uniform(0.85, 1.15))
    faces, normals = np.concatenate(maker.faces), np.concatenate(maker.normals)
    centre = (vertices.min(0) + vertices.max(0)) / 2
    vertices = vertices - centre
    vertices *= rng.uniform(0.86, 0.97) / np.linalg.norm(vertices, axis=1).max()
    corner = vertices[faces]
    area = np.linalg.norm(np.cross(corner[:, 1] - corner[:, 0], corner[:, 2] - corner[:, 0]), axis=1)
    colors = np.concatenate(maker.colors) * _light(normals, rng)[:, None]
    return Object(vertices.astype(np.float32), faces[area > 0].astype(np.int32), np.clip(colors, 0, 1).astype(np.float32), chosen)


def _light(normals: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """How bright each vertex is: a sky, and a sun half the time, at any azimuth, that wraps around so that no side is black."""
    sky = 0.80 + 0.20 * normals[:, 2]
    azimuth, strength = rng.uniform(0, 2 * math.pi), rng.uniform(0, 0.18)
    sun = np.array([math.cos(azimuth) * 0.8, math.sin(azimuth) * 0.8, 0.6])
    return sky * (1 - strength) + 2 * strength * np.clip(0.3 + 0.7 * normals @ sun, 0, 1)
