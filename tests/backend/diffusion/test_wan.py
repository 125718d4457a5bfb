"""The denoising loop against diffusers' own pipeline, and what only ours can: starting in the middle, and keeping frames."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from backend.diffusion import loading, turntable
from backend.views import turning
from backend.views.orbit import Orbit
from protocol import recipes
from protocol.errors import Cancelled, KilnError
from tests.backend.diffusion.small_models import FRAMES, SIZE


def rendered(picture, seed=5):
    """The picture, then a disk that moves: [n s s 3]."""
    y, x = np.mgrid[:SIZE, :SIZE] / SIZE
    places = 0.5 + 0.2 * np.sin(np.linspace(0, 2 * np.pi, FRAMES))
    disks = [np.hypot(x - place, y - 0.5) < 0.25 for place in places]
    color = np.random.default_rng(seed).uniform(0, 0.8, 3)
    return np.stack([picture[..., :3], *(np.where(disk[..., None], color, 1.0) for disk in disks[1:])]).astype(np.float32)


def through_the_vae(pipe, frames):
    video = torch.from_numpy(frames).permute(3, 0, 1, 2)[None] * 2 - 1
    with torch.no_grad():
        made = pipe.vae.decode(pipe.vae.encode(video).latent_dist.mode()).sample
    return (made[0].permute(1, 2, 3, 0).numpy() + 1) / 2


def embedded(pipe, text):
    """As the pipeline does it; its own function needs ftfy, which changes no plain words."""
    told = pipe.tokenizer(text, padding="max_length", max_length=512, truncation=True, return_tensors="pt")
    words = int(told.attention_mask.sum())
    with torch.no_grad():
        found = pipe.text_encoder(told.input_ids, told.attention_mask).last_hidden_state
    found[:, words:] = 0
    return found


@pytest.mark.parametrize("model", ["plain", "video"])
def test_a_whole_schedule_makes_what_diffusers_own_pipeline_makes(installed, picture, model):
    ours = loading.load(model)
    made = ours.generate(picture, "a red ball", None, 4, 2.0, 7)
    pipe = installed[model]
    latent = (1, 4, FRAMES if model == "plain" else 3, SIZE // 4, SIZE // 4)
    noise = torch.randn(latent, generator=torch.Generator().manual_seed(7))
    asked = FRAMES - 1 if model == "plain" else FRAMES  # where a latent frame is one frame, the pipeline adds one to what it is asked for
    theirs = pipe(
        image=Image.fromarray((picture[..., :3] * 255 + 0.5).astype(np.uint8)),
        prompt_embeds=embedded(pipe, "a red ball"), negative_prompt_embeds=embedded(pipe, "blurry"),
        height=SIZE, width=SIZE, num_frames=asked, num_inference_steps=4, guidance_scale=2.0, latents=noise, output_type="np",
    ).frames[0]  # fmt: skip
    assert np.abs(made[1:] - theirs[1:]).max() < 1e-4
    assert np.array_equal(made[0], picture[..., :3])  # but for the view that is given
    assert theirs.std() > 0.02


def test_one_seed_is_one_turntable(installed, picture):
    model = loading.load("plain")
    first, again, other = (model.generate(picture, "", None, 3, 1.0, seed) for seed in (1, 1, 2))
    assert np.array_equal(first, again)
    assert np.abs(first - other)[1:].max() > 0.01


def test_hardly_any_noise_leaves_the_frames_and_all_of_it_nothing_of_them(installed, picture):
    model, frames = loading.load("video"), rendered(picture)
    coded = through_the_vae(installed["video"], frames)
    errors = [
        np.abs(model.refine(frames, picture, "", None, 3, strength, 1.0, 7)[1:] - coded[1:]).mean() for strength in (1e-4, 0.05, 0.3, 0.8)
    ]
    assert errors[0] < 1e-3 and errors == sorted(errors) and errors[-1] > 10 * errors[0]
    assert np.array_equal(model.refine(frames, picture, "", None, 3, 1.0, 1.0, 7), model.generate(picture, "", None, 3, 1.0, 7))


def test_a_model_that_refines_in_few_steps_takes_no_more(installed, picture, monkeypatch):
    model, frames = loading.load("plain"), rendered(picture)
    monkeypatch.setattr(model, "spec", replace(model.spec, again=1))

    def refined(steps, strength):
        before = model.evaluations
        return model.refine(frames, picture, "", None, steps, strength, 1.0, 7), model.evaluations - before

    many, count = refined(10, 0.5)
    assert count == 1 and np.array_equal(many, refined(1, 0.5)[0])
    assert refined(3, 1.0)[1] == 3  # views that are made anew come from noise alone


def test_the_input_view_stays_the_input(installed, picture):
    model = loading.load("plain")
    some = model.refine(rendered(picture, 1), picture, "", None, 2, 0.5, 1.0, 7)
    other_first = rendered(picture, 1)
    other_first[0] = 0.2
    assert np.array_equal(some[0], picture[..., :3])
    assert np.array_equal(some, model.refine(other_first, picture, "", None, 2, 0.5, 1.0, 7))


def test_kept_frames_come_back_and_steer_the_others(installed, picture):
    model, frames, keep = loading.load("plain"), rendered(picture), np.ones(FRAMES, bool)
    keep[4] = False
    made = model.refine(frames, picture, "", None, 3, 1.0, 1.0, 7, keep)
    assert np.array_equal(made[keep], frames[keep])
    assert np.abs(made[4] - model.generate(picture, "", None, 3, 1.0, 7)[4]).max() > 1e-3
    changed = frames.copy()
    changed[4] = 0
    # The VAE codes a frame with the two before it, so what stood in the frame's place shows a little in the latents after it.
    assert np.abs(made[4] - model.refine(changed, picture, "", None, 3, 1.0, 1.0, 7, keep)[4]).mean() < 0.02


def test_a_frame_that_is_made_anew_takes_those_of_its_latent_frame_along_and_no_other(installed, picture):
    model, frames, keep = loading.load("video"), rendered(picture), np.ones(FRAMES, bool)
    keep[6] = False
    assert model._latent_frames(keep).tolist() == [True, True, False]
    made = model.refine(frames, picture, "", None, 2, 1.0, 1.0, 7, keep)
    assert np.array_equal(made[keep], frames[keep]) and np.abs(made[6] - frames[6]).max() > 0.01


def test_evaluations_are_counted_and_a_pair_is_two(installed, picture):
    model, calls = loading.load("plain"), []
    before = model.evaluations
    hook = model.pipe.transformer.register_forward_hook(lambda *_: calls.append(1))
    model.generate(picture, "", None, 5, 1.0, 1)
    assert model.evaluations - before == len(calls) == 5
    model.generate(picture, "", None, 5, 3.0, 1)
    assert model.evaluations - before == len(calls) == 15
    model.refine(rendered(picture), picture, "", None, 2, 0.5, 3.0, 1)
    assert model.evaluations - before == len(calls) == 19
    hook.remove()


def test_defaults_stay_within_eighty_evaluations():
    """With a guidance pair at every step, as the default model has."""
    p = recipes.Im3d()
    assert 2 * (p.generate.steps + p.iterate.rounds * p.iterate.steps) <= 80


def test_a_cancelled_turntable_stops_within_an_evaluation_and_the_next_one_runs(installed, picture):
    model, fractions = loading.load("plain"), []
    before = model.evaluations

    def cancel(fraction, text="", preview=None):
        fractions.append(fraction)
        if model.evaluations == before + 2:
            raise Cancelled

    with pytest.raises(Cancelled):
        model.generate(picture, "", None, 50, 1.0, 1, cancel)
    assert model.evaluations == before + 2
    assert fractions == sorted(fractions)
    after = model.generate(picture, "", None, 2, 1.0, 1)
    loading.release()
    assert np.array_equal(after, loading.load("plain").generate(picture, "", None, 2, 1.0, 1))


def test_previews_come_while_it_denoises(installed, picture):
    shown = []
    loading.load("plain").generate(picture, "", None, 6, 1.0, 1, lambda fraction, text="", preview=None: shown.append(preview))
    shown = [preview for preview in shown if preview is not None]
    assert len(shown) >= 3 and all(preview.shape == (SIZE, 4 * SIZE, 3) and np.isfinite(preview).all() for preview in shown)


def generated(picture, **values):
    return turntable.generate(picture, recipes.Generate(model="plain", steps=2, guidance=1.0, **values), 3)


def test_a_turn_is_the_asked_views_evenly_around_and_no_direction_twice(installed, picture):
    turn = generated(picture, views=4)
    assert turn.orbit.azimuths.tolist() == [0, 90, 180, 270] and not turn.calibrated and turn.evaluations == 2
    assert np.array_equal(turn.frames[0], picture[..., :3])
    most = generated(picture, views=64)
    assert len(most.frames) == FRAMES - 1 and most.orbit.azimuths[-1] == 315


def test_where_nobody_knows_the_steps_they_are_taken_from_the_frames(installed, picture):
    turn = turntable.generate(picture, recipes.Generate(model="video", steps=2, guidance=1.0, views=4), 3)
    np.testing.assert_allclose(turn.shown.azimuths, turning.azimuths(turn.film.astype(np.float32) / 255))
    assert np.array_equal(turn.orbit.azimuths, turn.shown.azimuths[turn.chosen]) and turn.chosen[0] == 0


def test_a_view_is_made_anew_alone_and_each_draw_differs(installed, picture):
    p = recipes.Generate(model="plain", steps=2, guidance=1.0, views=4)
    turn = turntable.generate(picture, p, 3)
    first, again, second = (turntable.reroll(turn, 2, draw, picture, p, 3) for draw in (1, 1, 2))
    others = [0, 1, 3]
    assert np.array_equal(first.frames[others], turn.frames[others])
    assert np.array_equal(first.frames, again.frames)
    assert np.abs(first.frames[2] - turn.frames[2]).max() > 1e-3 and np.abs(first.frames[2] - second.frames[2]).max() > 1e-3
    assert first.evaluations == 4
    for view, code in ((0, "bad-parameter"), (4, "bad-parameter")):
        with pytest.raises(KilnError) as refused:
            turntable.reroll(turn, view, 1, picture, p, 3)
        assert refused.value.code == code


def test_refined_views_come_from_renders_of_the_whole_film(installed, picture):
    p = recipes.Generate(model="plain", steps=2, guidance=1.0, views=4)
    turn = turntable.generate(picture, p, 3)
    refined = turntable.refine(turn, rendered(picture), picture, p, 0.3, 2, 9)
    assert refined.frames.shape == turn.frames.shape and refined.evaluations == 4
    assert np.array_equal(refined.chosen, turn.chosen)


def test_the_film_is_seen_from_between_the_views_estimated_cameras():
    azimuths = np.arange(9) * 45.0
    film, chosen = np.zeros((9, 2, 2, 3), np.uint8), np.array([0, 2, 4, 6])
    shown = Orbit(azimuths, 15.0, 40.0, 3.0)
    orbit = Orbit(azimuths[chosen], 15.0, 40.0, 3.0)
    turn = turntable.Turn(film[chosen].astype(np.float32), orbit, False, 0, "plain", film, shown, chosen)
    estimated = Orbit(np.array([0.0, 94.0, 180.0, 266.0]), 22.0, 35.0, 4.0)
    path = turn.path(estimated)
    assert (path.elevation, path.fov, path.distance) == (22.0, 35.0, 4.0)
    np.testing.assert_allclose(path.azimuths, [0, 47, 94, 137, 180, 223, 266, 313, 360])


@pytest.mark.parametrize(
    ("azimuths", "views", "expected"),
    [
        (np.arange(17) * 22.5, 16, list(range(16))),
        (np.arange(81) * 4.5, 16, list(range(0, 80, 5))),
        (np.linspace(0, 360, 22)[1:], 7, [20, 2, 5, 8, 11, 14, 17]),
        (np.array([30.0, 90, 150, 210, 270, 330]), 16, [0, 1, 2, 3, 4, 5]),
    ],
)
def test_views_are_chosen_evenly_in_azimuth(azimuths, views, expected):
    assert turntable.choose(azimuths, views).tolist() == expected
