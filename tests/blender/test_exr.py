"""The EXR reader against files that Blender wrote and against files written here by the specification."""

import struct
import zlib

import bpy
import numpy as np
import pytest
from bl_ext.kiln_test.kiln import exr


def write_exr(path, channels, compression, lines_per_block):
    """A scan-line file by the book; channels {name: H x W array of float32, float16 or uint32}."""
    kinds = {"uint32": 0, "float16": 1, "float32": 2}
    names = sorted(channels)
    height, width = channels[names[0]].shape

    def attribute(name, kind, value):
        return name.encode() + b"\0" + kind.encode() + b"\0" + struct.pack("<i", len(value)) + value

    table = b"".join(n.encode() + b"\0" + struct.pack("<iiii", kinds[str(channels[n].dtype)], 0, 1, 1) for n in names) + b"\0"
    window = struct.pack("<4i", 5, -3, 5 + width - 1, -3 + height - 1)  # windows need not start at 0
    header = struct.pack("<II", 20000630, 2)
    header += attribute("channels", "chlist", table) + attribute("compression", "compression", bytes([compression]))
    header += attribute("dataWindow", "box2i", window) + b"\0"
    blocks = []
    for top in range(0, height, lines_per_block):
        rows = range(top, min(top + lines_per_block, height))
        raw = b"".join(channels[n][row].tobytes() for row in rows for n in names)
        packed = raw
        if compression:
            split = raw[0::2] + raw[1::2]
            steps = bytes([split[0]]) + bytes((b - a + 128) & 255 for a, b in zip(split, split[1:]))
            packed = zlib.compress(steps)
        blocks.append(struct.pack("<ii", top - 3, min(len(packed), len(raw))) + (packed if len(packed) < len(raw) else raw))
    offsets, position = b"", len(header) + 8 * len(blocks)
    for block in blocks:
        offsets += struct.pack("<Q", position)
        position += len(block)
    path.write_bytes(header + offsets + b"".join(blocks))


@pytest.mark.parametrize(("compression", "lines"), [(0, 1), (2, 1), (3, 16)])
def test_reads_every_sample_type_uncompressed_and_zipped(tmp_path, compression, lines):
    random = np.random.default_rng(0)
    channels = {
        "Layer.Depth.Z": np.linspace(0, 1, 37 * 21, dtype=np.float32).reshape(37, 21),
        "Layer.Noise.X": random.normal(size=(37, 21)).astype(np.float32),  # does not shrink: such blocks are stored as they are
        "Layer.Half.Y": random.normal(size=(37, 21)).astype(np.float16),
        "Layer.Index.X": np.arange(37 * 21, dtype=np.uint32).reshape(37, 21),
    }
    write_exr(tmp_path / "a.exr", channels, compression, lines)
    read = exr.read(tmp_path / "a.exr")
    assert set(read) == set(channels)
    for name, values in channels.items():
        assert read[name].dtype == values.dtype
        assert np.array_equal(read[name], values)


@pytest.mark.oldest
def test_reads_what_blender_renders(tmp_path):
    """A plane seen from above by an orthographic camera: its depth is the camera's height, row 0 is at the top."""
    bpy.ops.mesh.primitive_plane_add(size=2, location=(0, 1, 0))  # fills the upper half of the picture
    camera = bpy.data.objects.new("camera", bpy.data.cameras.new("camera"))
    camera.data.type, camera.data.ortho_scale, camera.location.z = "ORTHO", 4, 3.5
    scene = bpy.context.scene
    scene.collection.objects.link(camera)
    scene.camera, scene.render.engine, scene.cycles.samples = camera, "CYCLES", 1
    scene.cycles.use_denoising = False  # not every Blender is built with a denoiser
    scene.render.resolution_x, scene.render.resolution_y = 20, 20
    scene.view_layers[0].use_pass_z = True
    scene.cycles.pixel_filter_type, scene.cycles.filter_width = "BOX", 0.01
    settings = scene.render.image_settings
    if hasattr(settings, "media_type"):
        settings.media_type = "MULTI_LAYER_IMAGE"
    settings.file_format, settings.exr_codec, settings.color_depth = "OPEN_EXR_MULTILAYER", "ZIP", "32"
    if hasattr(settings, "use_exr_interleave"):
        settings.use_exr_interleave = True
    scene.render.filepath = str(tmp_path / "a.exr")
    bpy.ops.render.render(write_still=True)
    depth = exr.read(tmp_path / "a.exr")[f"{scene.view_layers[0].name}.Depth.Z"]
    there = np.zeros((20, 20), bool)
    there[:10, 5:15] = True
    assert np.allclose(depth[there], 3.5, atol=1e-5)
    assert (depth[~there] > 1e9).all()


def test_says_what_it_cannot_read(tmp_path):
    path = tmp_path / "a.exr"
    write_exr(path, {"Z": np.zeros((20, 20), np.float32)}, 3, 16)
    good = path.read_bytes()
    for damaged, sentence in [
        (b"\x89PNG" + good[4:], "not an OpenEXR file"),
        (good[:-5], "a.exr is damaged or cut short"),
        (good[:60], "a.exr is damaged or cut short"),
        (good.replace(b"compression\0compression\0\1\0\0\0\3", b"compression\0compression\0\1\0\0\0\4"), "compression 4 is not supported"),
    ]:
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=sentence):
            exr.read(path)
