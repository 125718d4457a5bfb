"""game.glb: a finished mesh as a game engine wants it. Levels of detail, collision hulls and one material, named as the engine's importer
reads them, around the pivot that was asked for.

What importers make of names: Godot 4, "Node type customization using name suffixes"; Unity, "Import a mesh with LOD settings" (of FBX; no
Unity importer of glTF but UnityGLTF reads MSFT_lod); Unreal, Interchange's "import collision according to mesh name".
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from backend.mesh import glb
from backend.mesh.hulls import FAR, Hulls
from backend.mesh.lods import Level, switches
from backend.mesh.mesh import Mesh, TexturedMesh
from backend.views.views import Frame
from protocol import recipes

HULL_NAMES = {
    "gltf": "{name}-collision-{number:02}",
    "godot": "{name}-{number:02}-convcolonly",
    "unity": "{name}_Collider_{number:02}",
    "unreal": "UCX_{first}_{number:02}",
}
# What Godot takes for orders at the end of a name, after - or _
ORDERS = ("alpha", "col", "colonly", "convcol", "convcolonly", "cycle", "loop", "navmesh", "noimp", "occ", "occonly", "rigid", "vcol",
          "vehicle", "wheel")  # fmt: skip
CHANNELS = {"color": 3, "opacity": 1, "normals": 3, "surface": 2, "emission": 3}  # of each map, in the order of their worth


@dataclass(frozen=True)
class GameAsset:
    """A mesh and what is made of it for an engine, unit frame. mesh: with the maps that fit into the channels, the first level. warnings:
    sentences on what was asked for and could not be had."""

    mesh: TexturedMesh
    levels: list[Level]  # further ones
    hulls: Hulls | None
    p: recipes.Game
    name: str
    warnings: list[str]

    def save(self, path: Path, frame: Frame) -> dict[str, Any]:
        """Writes the file; returns what the report says of it (SPEC.md, "report.json")."""
        pivot = pivot_of(self.mesh, frame, self.p.pivot)
        first = Level(self.mesh.vertices, self.mesh.normals, self.mesh.uv, self.mesh.faces, self.mesh.tangents, 0.0)
        chain = [first, *self.levels]
        names = level_names(self.name, len(chain), self.p.engine)
        sizes = recipes.lod_sizes(self.p) or [*switches(self.mesh, self.levels), 0.0]
        hulls = [] if self.hulls is None else self.hulls.hulls
        hull_names = [
            HULL_NAMES[self.p.engine].format(name=self.name, first=names[0], number=number) for number in range(1, len(hulls) + 1)
        ]
        unit = self.p.scale / frame.scale  # of the file, for one of the unit frame

        def placed(points: Float[np.ndarray, "n 3"]) -> Float[np.ndarray, "n 3"]:
            return turned((frame.to_world(points) - pivot) * self.p.scale, self.p.up)

        laid = {}
        for name, level in zip(names, chain, strict=True):
            tangents = level.tangents
            if tangents is not None:
                tangents = np.concatenate([turned(tangents[:, :3], self.p.up), tangents[:, 3:]], 1)
            laid[name] = replace(level, vertices=placed(level.vertices), normals=turned(level.normals, self.p.up), tangents=tangents)
        shapes = {name: Mesh(placed(hull.vertices), hull.faces) for name, hull in zip(hull_names, hulls, strict=True)}
        glb.save_game(path, self.mesh, laid, sizes, shapes, f"{self.name}_material")
        return {
            "engine": self.p.engine,
            "name": self.name,
            "levels": [
                {"name": name, "faces": len(level.faces), "error": round(level.error * unit, 6), "until": size}
                for name, level, size in zip(names, chain, sizes, strict=True)
            ],
            "hulls": hull_names,
            "hull_error": None if self.hulls is None else self.hulls.error,
            "texture_size": len(self.mesh.base_color),
            "channels": used_channels(self.mesh),
            "pivot": [round(float(value), 6) for value in pivot],
            "up": self.p.up,
            "scale": self.p.scale,
        }


def shortfalls(hulls: Hulls | None, most: int) -> list[str]:
    """What the hulls fall short of, in a sentence."""
    if hulls is None or hulls.error <= FAR:
        return []
    return [
        f"The collision hulls differ from the mesh's volume by {hulls.error:.0%}: allow more than {most} (game.hulls), or let the engine"
        " collide with the mesh itself, as thin and hollow shapes want it."
    ]


def asset_name(pattern: str, title: str) -> str:
    """The pattern with {name} filled in, in letters, digits and underscores alone: every engine and file system takes them."""
    return re.sub(r"\W+", "_", pattern.replace("{name}", title)).strip("_") or "asset"


def level_names(name: str, count: int, engine: str) -> list[str]:
    if count > 1:
        return [f"{name}_LOD{number}" for number in range(count)]
    ordered = engine == "godot" and re.split("[-_$]", name.rstrip("0123456789 ").lower())[-1] in ORDERS
    return [f"{name}_mesh" if ordered else name]


def pivot_of(mesh: TexturedMesh, frame: Frame, choice: str) -> Float[np.ndarray, "3"]:
    """The place in the world, metres, Z up, that becomes the file's origin."""
    low, high = frame.to_world(np.stack([mesh.vertices.min(0), mesh.vertices.max(0)]))
    middle = (low + high) / 2
    if choice == "world":
        return np.zeros(3)
    if choice == "source" and frame.pivot is not None:
        return np.asarray(frame.pivot, np.float64)
    return middle if choice == "centre" else np.array([middle[0], middle[1], low[2]])


def turned(vectors: Float[np.ndarray, "n 3"], up: str) -> Float[np.ndarray, "n 3"]:
    """Vectors that the writer's turn to Y up leaves as they should be: it turns all."""
    return vectors if up == "y" else np.stack([vectors[:, 0], -vectors[:, 2], vectors[:, 1]], 1)


def used_channels(mesh: TexturedMesh) -> dict[str, int]:
    """The 8-bit texture channels of each map that is more than one value."""
    maps = {
        "color": mesh.base_color,
        "opacity": mesh.opacity,
        "normals": mesh.normal_map,
        "surface": mesh.material,
        "emission": mesh.emission,
    }
    factors = [name for name in ("surface", "emission") if maps[name] is not None and glb.constant(maps[name]) is not None]
    return {name: CHANNELS[name] for name, pixels in maps.items() if pixels is not None and name not in factors}


def budgeted(mesh: TexturedMesh, channels: int) -> tuple[TexturedMesh, list[str]]:
    """The mesh with the maps that fit into so many channels, and what became of the others, in sentences."""
    left, warnings = channels, []
    for name, count in used_channels(mesh).items():
        if count <= left:
            left -= count
        elif name == "opacity":
            mesh = replace(mesh, opacity=None)
            warnings.append(f"Opacity is left out, and all is opaque: {channels} texture channels are too few (game.channels).")
        elif name == "normals":
            mesh = replace(mesh, normal_map=None, tangents=None)
            warnings.append(f"The normal map is left out: {channels} texture channels are too few (game.channels).")
        elif name == "surface":
            mean = mesh.material.reshape(-1, 2).mean(0)
            mesh = replace(mesh, material=np.full((1, 1, 2), mean + 0.5, np.uint8))
            warnings.append(f"Roughness and metallic are one value each: {channels} texture channels are too few (game.channels).")
        else:
            mesh = replace(mesh, emission=None, emission_strength=1.0)
            warnings.append(f"Emission is left out: {channels} texture channels are too few (game.channels).")
    return mesh, warnings
