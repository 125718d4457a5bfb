"""What a job will take grows with what makes it slow, and is there for every recipe and preset."""

import pytest

from protocol import estimates, recipes

JOBS = [(name, preset) for name, recipe in recipes.RECIPES.items() for preset in recipe.PRESETS]


def values(recipe, preset="standard", **changes):
    return recipes.values(recipes.make(recipe, {name.replace("_", ".", 1): value for name, value in changes.items()}, preset))


@pytest.mark.parametrize(("recipe", "preset"), JOBS)
def test_every_preset_has_an_estimate_whose_stages_all_count(recipe, preset):
    given = values(recipe, preset)
    stages = estimates.stage_seconds(recipe, given)
    assert all(seconds > 0 for seconds in stages.values())
    whole = estimates.estimate(recipe, given)
    assert whole.seconds == pytest.approx(sum(stages.values()))
    assert whole.seconds == pytest.approx(estimates.backend_seconds(recipe, given) + estimates.blender_seconds(recipe, given))
    assert whole.bytes > 1e8


@pytest.mark.parametrize("recipe", recipes.RECIPES)
def test_a_higher_preset_takes_longer_and_more_memory(recipe):
    draft, standard, high = (estimates.estimate(recipe, values(recipe, preset)) for preset in ("draft", "standard", "high"))
    assert draft.seconds < standard.seconds < high.seconds
    assert draft.bytes < standard.bytes < high.bytes


@pytest.mark.parametrize(
    "change", [{"capture_views": 48}, {"capture_size": 1024}, {"fit_iterations": 2000}, {"fit_splats": 40_000}, {"surface_grid": 448},
               {"surface_faces": 80_000}, {"texture_size": 4096}],
)  # fmt: skip
def test_each_parameter_that_makes_a_job_slower_raises_its_estimate(change):
    assert estimates.estimate("reconstruct", values("reconstruct", **change)).seconds > estimates.estimate(
        "reconstruct", values("reconstruct")
    ).seconds  # fmt: skip


@pytest.mark.parametrize("recipe", ["reconstruct", "mesh_splats", "im3d"])
def test_a_file_for_an_engine_takes_longer_and_more_of_it_longer_still(recipe):
    asked = [{}, {"game_engine": "godot"}, {"game_engine": "godot", "game_hulls": 64}, {"game_engine": "godot", "game_lods": 6}]
    none, some, hulls, lods = (estimates.estimate(recipe, values(recipe, **change)).seconds for change in asked)
    assert none < some < hulls and some < lods


def test_a_faster_machine_shortens_what_the_backend_does_and_not_what_blender_does():
    given = values("reconstruct")
    one, two = (estimates.estimate("reconstruct", given, speed).seconds for speed in (1.0, 2.0))
    assert one - two == pytest.approx(estimates.backend_seconds("reconstruct", given) / 2)


def test_a_gpu_shortens_the_fit_unless_the_cpu_is_asked_for():
    fits = [
        estimates.stage_seconds("reconstruct", values("reconstruct", fit_device=device), gpu)["fit"]
        for device, gpu in (("auto", False), ("auto", True), ("cpu", True))
    ]
    assert fits[1] < fits[0] == fits[2]


def test_more_splats_in_the_file_take_longer():
    given = values("mesh_splats")
    few, unknown, many = (estimates.estimate("mesh_splats", given, splats=count) for count in (10_000, None, 3_000_000))
    assert few.seconds < unknown.seconds < many.seconds and few.bytes < many.bytes


def test_more_cores_help_less_and_less():
    speeds = [estimates.speed_of({"cores": cores}) for cores in (1, 2, 4, 64)]
    assert speeds[0] < 1 == speeds[1] < speeds[2] < speeds[3] < 4
    assert estimates.speed_of({}) == 1


def test_a_turntable_costs_what_its_model_does_and_views_alone_cost_less():
    assert set(estimates.MODELS) == set(recipes.TURNTABLES)
    given = recipes.values(recipes.make("im3d", {"generate.model": "kiln-tiny-turntable"}))
    whole, wan = estimates.estimate("im3d", given), estimates.estimate("im3d", {**given, "generate.model": "wan2.1-orbit"})
    assert whole.seconds < wan.seconds and whole.bytes < wan.bytes
    assert estimates.estimate("im3d", {**given, "generate.only": True}).seconds < whole.seconds
    assert estimates.evaluations(given) == 2 * (given["generate.steps"] + given["iterate.rounds"] * given["iterate.steps"]) <= 80
    assert estimates.estimate("im3d", {**given, "refine.on": True}).seconds > whole.seconds
