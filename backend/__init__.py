"""Kiln's compute backend: a service in its own process that runs recipes. See CONTRIBUTING.md for its rooms."""

import os

# torch's and numba's threads take turns. By default those that wait for work spin, on the cores that the others need: on a computer that is
# busy, with Blender say, the same fit then takes several times as long. Read when the libraries are loaded, so set before.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # GNU's OpenMP
os.environ.setdefault("KMP_BLOCKTIME", "0")  # Intel's and LLVM's
