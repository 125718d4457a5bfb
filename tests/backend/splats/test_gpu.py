"""Which engine draws on a GPU, and, where there is one, that it draws and fits what the CPU does. Without one that part is skipped, and
says why."""

import dataclasses
import sys

import numpy as np
import pytest
import torch

from backend.splats import gpu
from backend.splats.fit import SCHEDULE, fit
from backend.splats.raster_cpu import Rasteriser, camera_numbers, pack
from backend.views.cameras import look_at
from protocol import recipes
from protocol.errors import Cancelled, KilnError
from tests.backend.splats import reference, sphere
from tests.backend.splats.test_fit import psnr

on_a_gpu = pytest.mark.skipif(
    bool(gpu.why_no_cuda()), reason=f"NOT RUN: the GPU path needs an NVIDIA GPU with torch for CUDA, and {gpu.why_no_cuda()}"
)
ENGINES = {"gsplat": (gpu.why_no_gsplat, gpu._gsplat), "Warp": (gpu.why_no_warp, gpu._warp)}


@pytest.fixture(params=list(ENGINES))
def engine(request):
    why, load = ENGINES[request.param]
    if why():
        pytest.skip(f"NOT RUN: {why()}")
    return load(gpu.silent)


@on_a_gpu
@pytest.mark.parametrize("degree", [0, 3])
def test_pictures_and_gradients_are_those_of_the_cpu(engine, degree):
    splats = reference.cloud(2000, degree, 0, size=0.04)
    views = [look_at((3 * np.sin(i), -3 * np.cos(i), 0.5), (0, 0, 0), 128, 0.7) for i in range(3)]
    parameters = pack(splats)
    matrix = torch.tensor(parameters[:, : len(splats)].copy(), device="cuda", requires_grad=True)
    cameras = torch.tensor(np.stack([camera_numbers(view) for view in views]), device="cuda")
    theirs = engine.draw(matrix, cameras, 128, 128)
    pulls = np.random.default_rng(0).normal(0, 1, theirs.shape).astype(np.float32)
    (theirs * torch.tensor(pulls, device="cuda")).sum().backward()
    total = np.zeros_like(parameters)
    for view, planes, pull in zip(views, theirs.detach().cpu().numpy(), pulls, strict=True):
        rasteriser, gradients = Rasteriser(), np.zeros_like(parameters)
        rasteriser.project(parameters, len(splats), view)
        assert np.abs(rasteriser.cropped(rasteriser.compose()) - planes).max() < 1e-3
        rasteriser.backward(pull, np.zeros(3), gradients)
        total += gradients
    for row, truth in zip(matrix.grad.cpu().numpy(), total[:, : len(splats)], strict=True):
        assert np.linalg.norm(row - truth) <= 1e-2 * np.linalg.norm(truth)


@on_a_gpu
def test_a_fit_is_as_good_as_the_cpus(engine):
    views = sphere.views()
    p = recipes.Fit(splats=1500, iterations=300, device="cuda")
    ours = fit(views, dataclasses.replace(p, device="cpu"), 0)
    theirs = gpu.fit_with(engine, torch.device("cuda"), views.for_fitting, p, 0, gpu.silent, SCHEDULE)
    assert psnr(theirs, views) > psnr(ours, views) - 0.3


@pytest.fixture
def forgotten(monkeypatch):
    """No engine has failed yet, and none will be remembered."""
    monkeypatch.setattr(gpu, "_FAILED", {})


def test_without_a_gpu_a_sentence_says_so(monkeypatch, forgotten):
    assert gpu.sentence("cpu") == "The splats are fitted on the CPU, as asked."
    monkeypatch.setattr(gpu, "why_no_cuda", lambda: "there is no NVIDIA driver")
    assert gpu.sentence("auto") == "The splats are fitted on the CPU. The GPU is not used: there is no NVIDIA driver."
    monkeypatch.setattr(gpu, "why_no_cuda", lambda: "")
    monkeypatch.setattr(gpu, "why_no_gsplat", lambda: "gsplat is not installed")
    monkeypatch.setattr(gpu, "why_no_warp", lambda: "NVIDIA Warp is not installed")
    assert gpu.why_not() == "gsplat is not installed and NVIDIA Warp is not installed"
    monkeypatch.setattr(gpu, "why_no_warp", lambda: "")
    assert gpu.why_not() == "" and gpu.sentence("auto") == "The splats are fitted on the GPU."


def test_an_engine_that_fails_gives_way_to_the_next_and_is_remembered(monkeypatch, forgotten):
    """The order of the engines; what they draw is made up, since there may be no GPU here."""
    wrong = {}

    def breaks(progress):
        raise RuntimeError("Error building extension 'gsplat_cuda'")

    monkeypatch.setattr(gpu, "why_no_cuda", lambda: "")
    monkeypatch.setattr(gpu, "gsplat_is_built", lambda: True)
    monkeypatch.setattr(gpu, "_wrong", lambda draw, device: wrong.get(draw, ""))
    monkeypatch.setattr(gpu, "why_no_warp", lambda: gpu._FAILED.get("Warp", ""))
    monkeypatch.setattr(gpu, "_warp", lambda progress: gpu.Engine("Warp", "warp", None))
    monkeypatch.setattr(gpu, "_gsplat", lambda progress: gpu.Engine("gsplat", "gsplat", None))
    assert gpu.engine_for_this_gpu().name == "gsplat"
    monkeypatch.setattr(gpu, "_gsplat", breaks)
    assert gpu.engine_for_this_gpu().name == "Warp" and gpu.why_not() == ""
    assert "gsplat_cuda" in gpu._FAILED["gsplat"]
    wrong["warp"] = "draws other pictures than the CPU (by 0.5)"
    assert gpu.engine_for_this_gpu() is None
    assert "could not be built" in gpu.why_not() and "Warp draws other pictures" in gpu.why_not()


def test_gsplat_does_without_warp_where_warp_is_broken(monkeypatch, forgotten):
    """Warp's loss is only the quicker one: plain torch does as well."""
    warp = pytest.importorskip("backend.splats.loss_warp")

    def breaks(progress):
        raise RuntimeError("Failed to load the shared library warp.so")

    monkeypatch.setattr(gpu, "why_no_warp", lambda: gpu._FAILED.get("Warp", ""))
    monkeypatch.setattr(gpu, "_wrong_loss", lambda loss, device, compare=gpu._wrong_loss: compare(loss, "cpu"))
    monkeypatch.setattr(gpu, "_warp", lambda progress: gpu.Engine("Warp", None, warp.loss_of))
    assert gpu._loss_beside_gsplat(gpu.silent) is warp.loss_of and not gpu._FAILED
    monkeypatch.setattr(gpu, "_warp", lambda progress: gpu.Engine("Warp", None, lambda *given: 1.1 * warp.loss_of(*given)))
    assert gpu._loss_beside_gsplat(gpu.silent) is gpu.loss_in_torch and "another loss" in gpu._FAILED.pop("Warp")
    monkeypatch.setattr(gpu, "_warp", breaks)
    assert gpu._loss_beside_gsplat(gpu.silent) is gpu.loss_in_torch and "warp.so" in gpu._FAILED["Warp"]
    assert gpu._loss_beside_gsplat(gpu.silent) is gpu.loss_in_torch  # and is not tried again


def test_a_gpu_without_room_is_said_and_no_engine_is_blamed(monkeypatch, forgotten):
    def full(draw, device):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB")

    monkeypatch.setattr(gpu, "why_no_cuda", lambda: "")
    monkeypatch.setattr(gpu, "gsplat_is_built", lambda: True)
    monkeypatch.setattr(gpu, "_gsplat", lambda progress: gpu.Engine("gsplat", "gsplat", None))
    monkeypatch.setattr(gpu, "_wrong", full)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (2**30, 12 * 2**30))
    with pytest.raises(KilnError, match=r"memory is full \(1.0 of 12.0 GB free\)") as refused:
        gpu.fit_on_cuda(sphere.views().for_fitting, recipes.Fit(), 0, gpu.silent, SCHEDULE)
    assert refused.value.code == "out-of-memory" and gpu.why_no_gsplat() == ""


def test_where_gsplat_cannot_keep_what_it_compiles_it_counts_as_not_compiled(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "file" / "below"))
    assert gpu.gsplat_is_built() is False


def test_compiling_gsplat_is_announced_and_can_be_stopped(monkeypatch):
    heard = []

    def listen(fraction, text="", preview=None):
        heard.append(text)
        if len(heard) == 3:
            raise Cancelled

    slow = [sys.executable, "-c", "import time; time.sleep(600)"]
    started = []
    popen = gpu.subprocess.Popen

    def start(command, **options):
        started.append(popen(slow, **options))
        return started[0]

    monkeypatch.setattr(gpu.subprocess, "Popen", start)
    with pytest.raises(Cancelled):
        gpu._compile_gsplat(listen)
    assert all("Compiling gsplat" in text for text in heard)
    assert started[0].poll() is not None  # nothing runs on


def test_a_compilation_that_fails_says_what_the_compiler_said_last(monkeypatch):
    popen = gpu.subprocess.Popen
    fails = [sys.executable, "-c", "print('nvcc fatal: no such architecture'); raise SystemExit(1)"]
    monkeypatch.setattr(gpu.subprocess, "Popen", lambda command, **options: popen(fails, **options))
    with pytest.raises(ImportError, match="nvcc fatal"):
        gpu._compile_gsplat(gpu.silent)
