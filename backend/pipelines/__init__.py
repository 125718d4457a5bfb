"""One file a recipe: a straight-line function from inputs to an asset.

`PIPELINES` says where each recipe's function lies, by name, so that only a worker imports it and what it needs. The worker calls
`function(run, inputs_folder, recipe)` and then `save(results_folder)` of what it returned; every file in there becomes a result. A
pipeline's module may define `warm_up()`, which an idle worker calls ahead of the first job.

The environment variable KILN_PIPELINES names modules (comma between them) that the server, its workers and the command line import and that
enter recipes of their own here and in `protocol.recipes.RECIPES`: for recipes kept outside this repository, and for the tests.
"""

import importlib
import os

PIPELINES: dict[str, tuple[str, str]] = {
    "reconstruct": ("backend.pipelines.reconstruct", "reconstruct"),
    "animate": ("backend.pipelines.animate", "animate"),
    "im3d": ("backend.pipelines.im3d", "im3d"),
    "mesh_splats": ("backend.pipelines.mesh_splats", "mesh_splats"),
}

for _name in filter(None, os.environ.get("KILN_PIPELINES", "").split(",")):
    importlib.import_module(_name.strip())
