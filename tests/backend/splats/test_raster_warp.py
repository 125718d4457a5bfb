"""The wheel-only rasteriser for NVIDIA GPUs draws, differentiates and fits what the CPU path does. Its kernels run on the CPU here; what is
compiled for a GPU alone (the exchange between neighbouring threads) is compiled here too, and run by 32 threads of the CPU."""

import dataclasses
import importlib.util
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from backend.splats import fit as fit_module
from backend.splats import gpu, loss
from backend.splats.fit import SCHEDULE, fit
from backend.splats.model import Splats
from backend.splats.raster_cpu import Rasteriser, camera_numbers, pack
from backend.views.ball import ball
from backend.views.cameras import look_at
from protocol import recipes
from protocol.errors import Cancelled
from tests.backend.splats import reference
from tests.backend.splats.test_fit import psnr
from tests.backend.splats.test_raster_cpu import camera, scene

if importlib.util.find_spec("warp") is None:
    pytest.skip("NOT RUN: the rasteriser for NVIDIA GPUs needs warp-lang (requirements/development.txt)", allow_module_level=True)

from backend.splats import loss_warp, raster_warp

ROOT = Path(__file__).resolve().parents[3]
CPU = torch.device("cpu")
WARP = gpu._loaded_warp()


def several(count: int):
    """Cameras of one size on different sides; the last stands in the middle of the scene, with Gaussians behind it."""
    views = [camera()]
    for i in range(1, count):
        eye = (0.05, 0, 0) if i == count - 1 else (2.5 * np.sin(i), -2.5 * np.cos(i), 0.4)
        views.append(dataclasses.replace(look_at(eye, (0.3, 0.4, 0.1), 44, 0.9), height=37, cy=19.2))
    return views


def matrix_of(splats: Splats, device: torch.device = CPU) -> torch.Tensor:
    return torch.tensor(pack(splats)[:, : len(splats)].copy(), device=device, requires_grad=True)


def numbers_of(views) -> torch.Tensor:
    return torch.tensor(np.stack([camera_numbers(view) for view in views]))


def on_the_cpu(splats: Splats, views, pulls: np.ndarray):
    """Planes of each view, the gradient matrix summed over views, and each view's lengths of the gradient by the place."""
    parameters, planes, lengths = pack(splats), [], []
    total = np.zeros_like(parameters)
    for view, pull in zip(views, pulls, strict=True):
        rasteriser, gradients = Rasteriser(2), np.zeros_like(parameters)
        rasteriser.project(parameters, len(splats), view)
        padded = rasteriser.compose()
        planes.append(rasteriser.cropped(padded).copy())
        given = np.zeros_like(padded)
        given[:, : view.height, : view.width] = pull
        lengths.append(rasteriser.backward(given, np.zeros(3), gradients).copy())
        total += gradients
    return np.stack(planes), total[:, : len(splats)], np.stack(lengths)


@pytest.mark.parametrize("degree", [0, 1, 2, 3])
def test_pictures_and_gradients_of_several_views_are_those_of_the_cpu(degree):
    splats, views = scene(degree, degree), several(3)
    pulls = np.random.default_rng(1).normal(0, 1, (3, 5, 37, 44)).astype(np.float32)
    planes, gradients, lengths = on_the_cpu(splats, views, pulls)
    matrix, pulled = matrix_of(splats), torch.zeros(2, len(splats))
    ours = raster_warp.draw(matrix, numbers_of(views), 44, 37, pulled)
    assert planes[:, 4].max() > 0.99 and planes[:, 4].min() < 0.5 and np.ptp(planes[2, 3]) > 0.02  # every view shows something
    assert np.abs(ours.detach().numpy() - planes).max() < 1e-4
    (ours * torch.tensor(pulls)).sum().backward()
    found = matrix.grad.numpy()
    assert np.isfinite(found).all()
    for row, truth in zip(found, gradients, strict=True):
        assert np.linalg.norm(row - truth) <= 1e-3 * np.linalg.norm(truth)
    assert np.abs(pulled[0].numpy() - lengths.sum(0)).max() <= 1e-3 * lengths.sum(0).max()
    assert np.array_equal(pulled[1].numpy() > 0, (lengths > 0).any(0))


def test_other_features_are_composed_and_differentiated_alike():
    splats, views, random = scene(1, 6), several(2), np.random.default_rng(2)
    features = random.normal(0, 1, (2, len(splats), 4)).astype(np.float32)
    pulls = random.normal(0, 1, (2, 5, 37, 44)).astype(np.float32)
    matrix, given = matrix_of(splats), torch.tensor(features, requires_grad=True)
    ours = raster_warp.draw(matrix, numbers_of(views), 44, 37, features=given)
    (ours * torch.tensor(pulls)).sum().backward()
    total = np.zeros_like(pack(splats))
    for index, view in enumerate(views):
        rasteriser, gradients = Rasteriser(), np.zeros_like(total)
        rasteriser.project(pack(splats), len(splats), view)
        padded = rasteriser.compose(features=features[index])
        assert np.abs(rasteriser.cropped(padded) - ours[index].detach().numpy()).max() < 1e-4
        pull = np.zeros_like(padded)
        pull[:, :37, :44] = pulls[index]
        by_features = rasteriser.backward(pull, np.zeros(3), gradients, more=True)
        assert np.linalg.norm(by_features - given.grad[index].numpy()) <= 1e-3 * np.linalg.norm(by_features)
        total += gradients
    for row, truth in zip(matrix.grad.numpy(), total[:, : len(splats)], strict=True):
        assert np.linalg.norm(row - truth) <= 1e-3 * np.linalg.norm(truth)


def test_gaussians_that_nothing_can_be_drawn_of_do_no_harm():
    splats, views = scene(0, 3), several(2)
    splats.means[50], splats.log_scales[51], splats.log_scales[52], splats.opacity_logits[53] = np.nan, 40, -60, -40
    splats.quaternions[54], splats.means[55] = 0, 1e30
    matrix = matrix_of(splats)
    planes = raster_warp.draw(matrix, numbers_of(views), 44, 37)
    planes[:, :3].sum().backward()
    alone = np.r_[0:50, 56:200]
    assert torch.isfinite(planes).all() and torch.isfinite(matrix.grad[:, alone]).all()
    nothing = matrix_of(scene(0, 3))
    with torch.no_grad():
        nothing[10] = -30
    assert raster_warp.draw(nothing, numbers_of(views), 44, 37).abs().max() == 0


def test_more_room_than_entries_changes_no_bit():
    splats, views, room = scene(1, 4), several(2), raster_warp.Room()
    exact = raster_warp.draw(matrix_of(splats), numbers_of(views), 44, 37)
    roomy = raster_warp.draw(matrix_of(splats), numbers_of(views), 44, 37, room=room)
    assert room.entries > 5000 and torch.equal(exact, roomy)
    room.make(torch.tensor(10 * room.entries))
    assert room.entries > 50_000


def test_too_little_room_leaves_out_gaussians_and_nothing_else():
    """What a step of a fit meets whose entries grew by more than half since they were last counted."""
    splats, views = scene(0, 4), several(2)

    class Small(raster_warp.Room):
        def make(self, needed):
            return int(needed) // 2

    whole = raster_warp.draw(matrix_of(splats), numbers_of(views), 44, 37)
    matrix = matrix_of(splats)
    part = raster_warp.draw(matrix, numbers_of(views), 44, 37, room=Small())
    part.sum().backward()
    assert torch.isfinite(part).all() and torch.isfinite(matrix.grad).all() and (part[:, 4] <= 1).all()
    assert part[0, 4].mean() > 0.9 * whole[0, 4].mean()  # room runs out in the last view
    assert part[1, 4].mean() < whole[1, 4].mean()


@pytest.mark.parametrize("weights", [loss.Weights(0.2, 0.5, 0.1), loss.Weights(0.0, 0.5, 0.0)], ids=["all terms", "no SSIM, no depth"])
@pytest.mark.parametrize("masked", [False, True], ids=["all pixels", "some pixels"])
def test_the_loss_and_its_gradient_are_those_of_the_cpu_and_of_plain_torch(weights, masked):
    splats, random = reference.cloud(300, 0, 1), np.random.default_rng(0)
    views = several(2)
    targets = random.random((2, 5, 37, 44)).astype(np.float32)
    targets[:, 4] = np.where(targets[:, 4] < 0.5, 0, 3 * targets[:, 4])
    backgrounds = random.random((2, 3)).astype(np.float32)
    counts = np.maximum(random.random((2, 37, 44)) - 0.3, 0).astype(np.float32) if masked else None
    planes, gradients, losses = [], [], []
    for number, (view, target, background) in enumerate(zip(views, targets, backgrounds, strict=True)):
        rasteriser, parameters = Rasteriser(), pack(splats)
        rasteriser.project(parameters, len(splats), view)
        padded = rasteriser.compose()
        wanted = np.zeros((5, *padded.shape[1:]), np.float32)
        wanted[:, :37, :44] = target
        tiles = (0, 0, rasteriser.tiles_x, rasteriser.tiles_y)
        shares = None if counts is None else np.pad(counts[number], [(0, a - b) for a, b in zip(padded.shape[1:], (37, 44), strict=True)])
        value, gradient = loss.loss_and_gradients(rasteriser, padded, wanted, tiles, background, weights, shares)
        gradient = rasteriser.cropped(gradient).copy()
        gradient[4] -= np.einsum("c,chw->hw", background, gradient[:3])  # the CPU's backward pass takes the background itself
        planes.append(rasteriser.cropped(padded).copy())
        gradients.append(gradient / 2)
        losses.append(value)
    for loss_of in (loss_warp.loss_of, gpu.loss_in_torch):
        drawn = torch.tensor(np.stack(planes), requires_grad=True)
        found = loss_of(drawn, torch.tensor(targets), torch.tensor(backgrounds), weights, None if counts is None else torch.tensor(counts))
        (2 * found).backward()
        assert float(found.detach()) == pytest.approx(np.mean(losses), rel=1e-5)
        off = np.abs(drawn.grad.numpy() / 2 - np.stack(gradients))
        assert (off.max((0, 2, 3)) <= 1e-4 * np.abs(gradients).max((0, 2, 3)) + 1e-12).all()


@pytest.mark.parametrize("masked", [False, True], ids=["all pixels", "some pixels"])
def test_views_too_large_for_one_array_are_compared_one_after_another(masked, monkeypatch):
    """Warp counts the values of an array in 32 bits: 4 views of 8192 pixels a side need 3.2 billion between the kernels."""
    assert loss_warp.MOST_VALUES == 2**31 - 1 and loss_warp.MAPS * 8192**2 < loss_warp.MOST_VALUES  # the largest view that is read
    random = np.random.default_rng(0)
    planes, targets = (torch.tensor(random.random((5, 5, 20, 24)).astype(np.float32)) for _ in range(2))
    backgrounds = torch.tensor(random.random((5, 3)).astype(np.float32))
    counts = torch.tensor(random.random((5, 20, 24)).astype(np.float32)) if masked else None
    launched, found = [], []
    launch = loss_warp.launch
    monkeypatch.setattr(loss_warp, "launch", lambda kernel, threads, *rest: launched.append(threads) or launch(kernel, threads, *rest))
    for most in (2**31 - 1, 2 * loss_warp.MAPS * 20 * 24 + 1):
        monkeypatch.setattr(loss_warp, "MOST_VALUES", most)
        drawn = planes.clone().requires_grad_()
        value = loss_warp.loss_of(drawn, targets, backgrounds, loss.Weights(0.2, 0.5, 0.1), counts)
        value.backward()
        found.append((value.item(), drawn.grad))
    assert found[0][0] == found[1][0] and torch.equal(found[0][1], found[1][1])
    assert launched[3::4] == [pixels * 20 * 24 for pixels in (5, 2, 2, 1)]


@pytest.fixture(scope="module")
def views():
    return ball(size=32, count=14)


QUICK = recipes.Fit(splats=600, iterations=60, device="cpu")


def test_a_whole_fit_is_as_good_as_the_cpus(views):
    """The loop of the GPU, growth and previews included, with a quarter of its views a step on the CPU's account."""
    heard = []
    theirs = fit(views, QUICK, 0)
    ours = gpu.fit_with(WARP, CPU, views.for_fitting, QUICK, 0, lambda *said: heard.append(said), SCHEDULE)
    assert len(ours) <= QUICK.splats and psnr(ours, views) > psnr(theirs, views) - 0.3
    assert psnr(ours, views) > 16
    pictures = [said[2] for said in heard if len(said) > 2 and said[2] is not None]
    assert pictures and pictures[0].shape == (32, 32, 3) and np.ptp(pictures[0]) > 0.2
    assert "GPU (Warp)" in heard[-1][1]


def test_a_fit_looks_past_pixels_that_do_not_count(views):
    """They are black and solid once `fit` has taken their content away; the same fit that looks at them shows so."""
    counts = np.ones(views.alpha.shape, np.float32)
    counts[::2, :16, :16] = 0
    spoilt, kept = fit_module._counted(views, counts)
    looked, looked_past = (gpu.fit_with(WARP, CPU, spoilt, QUICK, 0, gpu.silent, SCHEDULE, given) for given in (None, kept))
    assert psnr(looked_past, views) > psnr(looked, views) + 0.1


def test_a_fit_stops_where_it_reports(views):
    def stop(fraction, text="", preview=None):
        if fraction > 0.02:
            raise Cancelled

    with pytest.raises(Cancelled):
        gpu.fit_with(WARP, CPU, views.for_fitting, recipes.Fit(splats=500, iterations=100_000), 0, stop, SCHEDULE)


def test_an_engine_that_draws_other_pictures_is_not_used():
    assert gpu._wrong(raster_warp.draw, "cpu") == ""
    assert "pictures" in gpu._wrong(lambda *given: raster_warp.draw(*given) * 1.1, "cpu")

    def half_asleep(parameters, *given):
        return raster_warp.draw(torch.cat([parameters[:3].detach(), parameters[3:]]), *given)

    assert "gradients" in gpu._wrong(half_asleep, "cpu")


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> dict[tuple[str, int], str]:
    """Code of the kernels for GPUs, by the compiler in Warp's wheel: (file, architecture) -> PTX."""
    import warp

    if not warp.is_cuda_available() and warp.get_cuda_supported_archs() == []:
        pytest.skip("NOT RUN: this build of Warp has no compiler for NVIDIA GPUs")
    found = {}
    for module in (raster_warp, loss_warp):
        for architecture in (75, 90):  # Turing, the oldest that this Warp runs on, and Hopper
            folder = tmp_path_factory.mktemp("code")
            (path,) = warp.compile_aot_module(module, arch=architecture, module_dir=folder, use_ptx=True)
            found[module.__name__.rpartition(".")[2], architecture] = path.read_text("utf-8", errors="replace")
    return found


def body(code: str, kernel: str) -> str:
    """The PTX of one kernel."""
    found = re.search(rf"\.entry {kernel}_\w+\(.*?\n}}\n", code, re.DOTALL)
    assert found, kernel
    return found[0]


@pytest.mark.parametrize("architecture", [75, 90])
def test_the_kernels_compile_for_gpus_and_load_and_add_as_they_should(compiled, architecture):
    forward, back = (body(compiled["raster_warp", architecture], name) for name in ("compose", "compose_back"))
    assert forward.count("ld.global.v4.f32") >= 3 and back.count("ld.global.v4.f32") >= 3  # a Gaussian in three loads
    assert back.count("shfl.sync") == 5 + 13 and back.count("atom.global") + back.count("red.global") == 1 and "vote.sync.any" in back
    assert "ex2.approx" in forward and "ex2.approx" in back
    assert "st.local" not in forward + back  # nothing lives in memory that should live in registers
    assert "ld.global.v4.f32" in body(compiled["loss_warp", architecture], "look_down")


LOCKSTEP = """
#include <barrier>
#include <cstdio>
#include <mutex>
#include <thread>
#include <vector>
#define __CUDA_ARCH__ 900
static std::barrier<> together(32);
static std::mutex alone;
static float exchanged[32], given[32][12];
struct Number { int x; };
static thread_local Number threadIdx;
struct Array { float data[64]; };
static Array slots;
static float __shfl_xor_sync(unsigned, float value, int other) {
    exchanged[threadIdx.x & 31] = value;
    together.arrive_and_wait();
    const float found = exchanged[(threadIdx.x & 31) ^ other];
    together.arrive_and_wait();
    return found;
}
static void atomicAdd(float* place, float value) { std::lock_guard<std::mutex> guard(alone); *place += value; }
static void add(int slot, const float* d) {
    const float d0 = d[0], d1 = d[1], d2 = d[2], d3 = d[3], d4 = d[4], d5 = d[5];
    const float d6 = d[6], d7 = d[7], d8 = d[8], d9 = d[9], d10 = d[10], d11 = d[11];
    SNIPPET
}
int main() {
    for (int lane = 0; lane < 32; ++lane)
        for (int k = 0; k < 12; ++k) given[lane][k] = (lane * 7 % 5 + 1) * (k + 1) + (lane == 13 ? 100 * k : 0);
    std::vector<std::thread> threads;
    for (int lane = 0; lane < 32; ++lane) threads.emplace_back([lane] { threadIdx.x = 64 + lane; add(1, given[lane]); });
    for (auto& thread : threads) thread.join();
    for (float total : slots.data) std::printf("%.0f ", total);
}
"""


def test_neighbouring_threads_add_up_their_shares(tmp_path):
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("NOT RUN: the exchange between a GPU's threads is run on CPU threads, which takes a C++ compiler")
    snippet = raster_warp.add_of_threads.native_snippet.replace("#pragma unroll", "")
    (tmp_path / "lockstep.cpp").write_text(LOCKSTEP.replace("SNIPPET", snippet))
    command = [compiler, "-std=c++20", "-O1", "-pthread", "lockstep.cpp", "-o", "lockstep"]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    said = subprocess.run([tmp_path / "lockstep"], capture_output=True, text=True, check=True, timeout=60).stdout
    lanes = np.arange(32)
    shares = (lanes * 7 % 5 + 1)[:, None] * np.arange(1, 13) + np.where(lanes == 13, 100, 0)[:, None] * np.arange(12)
    wanted = np.zeros(64)
    wanted[16:28] = shares.sum(0)
    assert np.array_equal(np.array(said.split(), float), wanted)


def test_the_version_that_users_get_is_the_one_that_is_tested():
    """Users get it beside the lock file, where there is a GPU; a checkout gets it always, from its development lock."""
    wanted = re.search(r'^WARP, WARP_FOR_CUDA_12 = "(.+?)"', (ROOT / "blender_addon" / "environment.py").read_text("utf-8"), re.MULTILINE)
    tested = re.search(r"^(warp-lang==\S+)", (ROOT / "requirements" / "development.txt").read_text("utf-8"), re.MULTILINE)
    assert wanted[1] == tested[1]
