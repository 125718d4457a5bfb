"""Makes an asset without Blender: a folder of pictures with their cameras goes to the backend, and a mesh comes back.

    .venv/backend/bin/kiln serve --until-idle &
    .venv/backend/bin/python examples/without_blender.py views assets/mug '{"preset": "draft", "surface.faces": 2000}'

The folder holds a transforms.json as NeRF tools write it (protocol/SPEC.md, "Views"). `protocol` needs pyzmq and msgpack and nothing else,
so that these lines work in any Python, on this machine or on another one that was given the backend's connection file.
"""

import json
import sys
from pathlib import Path

from protocol import connection, recipes, views
from protocol.client import Client
from protocol.errors import KilnError

folder, out = Path(sys.argv[1]), Path(sys.argv[2])
settings = json.loads(sys.argv[3]) if len(sys.argv) > 3 else {}

try:
    recipe = recipes.make("reconstruct", preset=settings.pop("preset", "standard"), values=settings)  # refuses what is out of range
    inputs = views.files(folder, views.names(folder))
    with Client(connection.Connection.load(connection.default_path())) as client:
        job = client.submit("reconstruct", recipes.values(recipe), inputs, title=folder.name)
        for event in client.watch(job["id"]):  # survives a restart of the backend
            if event["kind"] == "stage":
                print(event["stage"])
        job = client.job(job["id"])
        if job["state"] != "done":
            raise KilnError.from_wire(job["error"] or {"code": "cancelled", "message": "Somebody cancelled the job."})
        for name, result in job["results"].items():
            client.download(result["hash"], out / name)
        client.remove(job["id"])  # the backend would keep it
except KilnError as error:
    sys.exit(f"[{error.code}] {error.message} {error.hint}")

report = json.loads((out / "report.json").read_text("utf-8"))
print(f"{report['faces']:,} faces, {report['mesh_psnr']:.1f} dB, in {out}")
