"""One source for every vector unit: the kernels' LLVM code compiled for processors that this machine need not be."""

import inspect
import os
import platform
import re
import subprocess
import sys

import llvmlite.binding as llvm
import numba
import numpy as np
import pytest

from backend.splats.loss import Weights, loss_and_gradients
from backend.splats.raster_cpu import Rasteriser, compose, compose_back, pack, project, project_back
from backend.views.cameras import look_at
from tests.backend.splats import reference

PROCESSORS = {  # triple, processor, a packed multiplication, a scalar one
    "NEON, Apple": ("arm64-apple-macosx11", "apple-m1", r"\bf(mul|mla|mls)(\.4s|\s+v\d+\.4s)", r"\b(fmul|fn?madd|fn?msub)\s+s\d"),
    "NEON, Linux": ("aarch64-unknown-linux-gnu", "generic", r"\bf(mul|mla|mls)(\.4s|\s+v\d+\.4s)", r"\b(fmul|fn?madd|fn?msub)\s+s\d"),
    "AVX2": ("x86_64-unknown-linux-gnu", "haswell", r"\bv(mul|fn?m(add|sub)\d+)ps\b.*ymm", r"\bv(mul|fn?m(add|sub)\d+)ss\b"),
    "AVX-512": ("x86_64-unknown-linux-gnu", "x86-64-v4", r"\bv(mul|fn?m(add|sub)\d+)ps\b.*zmm", r"\bv(mul|fn?m(add|sub)\d+)ss\b"),
}
X86 = platform.machine().lower() in ("x86_64", "amd64")


@pytest.fixture(scope="module")
def code() -> dict[str, str]:
    """LLVM code of the kernels that a training step spends its time in. (Compiled afresh: what comes from the cache has no listing.)"""
    splats, camera = reference.cloud(50, 0, 0), look_at((0, -3, 0.5), (0, 0, 0), 32, 0.7)
    rasteriser, parameters = Rasteriser(1), pack(splats)
    rasteriser.project(parameters, len(splats), camera)
    planes = rasteriser.compose()
    rasteriser.backward(np.zeros_like(planes), np.zeros(3), np.zeros_like(parameters))
    found = {}
    for name, worker in (("project", project), ("compose", compose), ("compose_back", compose_back), ("project_back", project_back)):
        fresh = numba.njit(worker.py_func, nogil=True, error_model="numpy")
        fresh.compile(worker.signatures[0])
        found[name] = next(iter(fresh.inspect_llvm().values()))
    return found


def assembly(code: str, triple: str, processor: str) -> str:
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    machine = llvm.Target.from_triple(triple).create_target_machine(cpu=processor, opt=3)
    code = re.sub(r"target (datalayout|triple).*\n", "", code)
    code = re.sub(r'"target-(cpu|features)"="[^"]*"', "", code)
    code = code.replace("llvm.x86.atomic", "x86_atomic").replace("immarg", "")  # of numba's reference counts alone
    module = llvm.parse_assembly(code)
    module.triple, module.data_layout = triple, str(machine.target_data)
    return machine.emit_assembly(module)


@pytest.mark.parametrize("processor", PROCESSORS)
def test_kernels_are_vector_code_on_every_processor(code, processor):
    """A kernel that fell back to scalars would multiply lane by lane."""
    triple, cpu, packed, scalar = PROCESSORS[processor]
    for name, text in code.items():
        listing = assembly(text, triple, cpu)
        many, single = len(re.findall(packed, listing)), len(re.findall(scalar, listing))
        assert many > 20 and many > 4 * single, f"{name}: {many} packed multiplications, {single} scalar ones"


def step(parameters, count):
    """Picture and gradients of one step."""
    camera, rasteriser = look_at((0, -3, 0.5), (0, 0, 0), 90, 0.7), Rasteriser(2)
    rasteriser.project(parameters, count, camera)
    planes = rasteriser.compose().copy()
    target = np.random.default_rng(0).random(planes.shape, dtype=np.float32)
    _, pulls = loss_and_gradients(rasteriser, planes, target, (0, 0, 6, 6), np.zeros(3), Weights(0.2, 0.5, 0.1))
    gradients = np.zeros_like(parameters)
    rasteriser.backward(pulls, np.zeros(3), gradients)
    return planes, gradients


PROGRAM = f"""
import sys
import numpy as np
from backend.splats.loss import Weights, loss_and_gradients
from backend.splats.raster_cpu import Rasteriser
from backend.views.cameras import look_at
{inspect.getsource(step)}
planes, gradients = step(np.load(sys.argv[1]), 800)
np.savez(sys.argv[2], planes=planes, gradients=gradients)
"""


@pytest.mark.skipif(not X86, reason="runs x86 code")
def test_a_processor_with_avx2_alone_draws_the_same(tmp_path):
    """The kernels as an AVX2 processor runs them, on this one: the same picture and gradients.

    Compiled code is kept by processor as well as by source, so a second run of this test compiles nothing.
    """
    parameters = pack(reference.cloud(800, 2, 3, size=0.05))
    np.save(tmp_path / "in.npy", parameters)
    environment = {**os.environ, "NUMBA_CPU_NAME": "haswell", "NUMBA_CPU_FEATURES": ""}
    command = [sys.executable, "-c", PROGRAM, str(tmp_path / "in.npy"), str(tmp_path / "out.npz")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    theirs, (planes, gradients) = np.load(tmp_path / "out.npz"), step(parameters, 800)
    assert np.abs(planes - theirs["planes"]).max() < 1e-5
    scale = np.abs(gradients).max(1, keepdims=True)
    assert scale[:10].min() > 0 and (np.abs(gradients - theirs["gradients"]) <= 1e-4 * scale + 1e-12).all()
