"""The loop on a :debug config: it trains, resumes bit for bit, and keeps its books."""

import functools
import json
import pathlib
import shutil

import jax
import ml_collections
import numpy as np
import pytest

from t2i_jax import errors, loop, pipeline, weights
from t2i_jax.commands import plan
from t2i_jax.data import cache, shapes
from t2i_jax.pretrained import opener
from t2i_jax.run import health, minutes, rundir
from tests import test_cache
from tests.runs import config, rows, small

ROOT = pathlib.Path(__file__).parent.parent


def test_a_run_leaves_what_users_expect(run):
    names = {p.name for p in run.iterdir()}
    wanted = {"config.json", "checkpoints", "metrics.jsonl", "tb", "samples", "log.txt", "env.txt"}
    assert wanted <= names
    assert [row["step"] for row in rows(run)] == [1, 2, 3, 4, 5, 6]
    assert (run / "samples" / "step_00000006.png").exists()
    saved = run / "checkpoints" / "6"
    assert {"params", "ema", "opt", "meta"} <= {p.name for p in saved.iterdir()}
    assert not any("text" in p.name for p in (saved / "params").rglob("*"))  # frozen: not saved


def test_the_first_step_is_the_golden_one(run, update_golden):
    """Loss and gradient of a :debug run; --update-golden after a change that was wanted."""
    path = ROOT / "tests" / "goldens" / "shapes_flow.json"
    found = {name: rows(run)[0][name] for name in ("model/loss", "model/grad_norm")}
    if update_golden:
        path.write_text(json.dumps(found, indent=1) + "\n")
    assert found == pytest.approx(json.loads(path.read_text()), rel=1e-3)


def test_a_finished_run_is_left_alone(run):
    before = (run / "metrics.jsonl").read_text()
    assert loop.train(config(sample_every=6), run) == {}
    assert (run / "metrics.jsonl").read_text() == before


@pytest.mark.slow
def test_a_run_without_averages_saves_resumes_and_draws(tmp_path):
    loop.train(small(ema={}, steps=3), tmp_path)
    loop.train(small(ema={}, steps=4), tmp_path)  # goes on
    assert [row["step"] for row in rows(tmp_path)] == [1, 2, 3, 4]
    assert pipeline.Pipeline.load(str(tmp_path))(["a red circle"], steps=1).shape[0] == 1


def test_caption_states_from_the_cache_are_the_encoders(run):
    """To float16, zero beyond the caption, whatever the bucket; and the objective takes them."""
    pipe = pipeline.Pipeline.load(str(run))
    source = shapes.make(size=40, res=16)
    encode = functools.partial(pipe.predictor.run, "encode", pipe.nets)
    rows = cache.Captions(source, pipe.predictor.tokenizers["text"], batch=16)
    extra = cache.precompute(encode, rows)
    records = np.array([7, 0, 7, 39])
    tokens, _ = pipe.predictor.tokenizers["text"]([source[i]["caption"] for i in records])
    direct = encode({"text": tokens})
    cached = test_cache.given(extra, records, tokens)
    assert {name: array.dtype for name, array in cached.items()} == dict.fromkeys(
        ("cond_seq", "cond_pooled"), np.float16
    )
    np.testing.assert_allclose(cached["cond_seq"], direct.seq_BLD, atol=3e-3)
    np.testing.assert_allclose(cached["cond_pooled"], direct.pooled_BD, atol=3e-3)
    assert not cached["cond_seq"][~tokens.mask_BL].any()
    others = tokens._replace(ids_BL=0 * tokens.ids_BL)
    again = pipe.predictor.run("encode", pipe.nets, {"text": others, **cached})
    np.testing.assert_array_equal(again.seq_BLD, cached["cond_seq"].astype(np.float32))


def test_a_run_with_cached_captions_trains(tmp_path):
    cached = small(cache="encode", steps=1, prompts=(), save_every=5)
    cached.data.size = 64
    former, others = ("step_00000001.png", "step_100000000_x.png"), ("a.png", "step_00000000.png")
    (tmp_path / "samples").mkdir()
    for name in (*former, *others):
        (tmp_path / "samples" / name).write_bytes(b"")
    loop.train(cached, tmp_path)
    assert np.isfinite(rows(tmp_path)[0]["model/loss"])
    # What a former run drew at steps that this one has not done is not taken for its own.
    assert sorted(path.name for path in (tmp_path / "samples").iterdir()) == sorted(others)


@pytest.mark.slow
def test_a_run_started_from_another_has_its_averages_and_a_fresh_optimiser(run, tmp_path):
    still = config(init_from=str(run), steps=1)
    still.optim.model = dict(name="adamw", learning_rate=1e-12)
    loop.train(still, tmp_path)
    before, after = (pipeline.Pipeline.load(str(path)).nets["model"] for path in (run, tmp_path))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), before, after)


def test_paths_and_numbers_of_numpy_are_plain_in_config_json(tmp_path):
    inner = ml_collections.ConfigDict({"path": pathlib.Path("a/b")})
    held = dict(n=np.int64(3), part=(np.float32(0.5), np.bool_(True), None), more=dict(x=[inner]))
    found = json.loads(weights.to_json(ml_collections.ConfigDict(held)))
    assert found == {"n": 3, "part": [0.5, True, None], "more": {"x": [{"path": "a/b"}]}}
    assert opener.parse(pathlib.Path("a,b")) == ("a", "b")
    with pytest.raises(errors.ConfigError, match=r"a set, which.* .at config\.watch\.x\[1\]"):
        loop.train(small(watch={"x": [1, {2}]}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_another_config_in_the_same_workdir_is_refused_with_the_difference(run):
    other = config(batch_size=16)
    with pytest.raises(errors.ConfigError, match="batch_size: 8 → 16"):
        loop.train(other, run)


def test_another_config_is_refused_though_config_json_is_gone(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run/config.json").unlink()
    for other, message in (
        (config(batch_size=16), "batch_size: 8 → 16"),
        (config(data={"source": "shapes", "size": 80}), r"data.size: \d+ → 80"),
    ):
        with pytest.raises(errors.ConfigError, match=message):
            loop.Run(other, tmp_path / "run")
    loop.Run(config(), tmp_path / "run")
    with pytest.raises(errors.ConfigError, match="checkpoints lie there without"):
        rundir._config_before(tmp_path / "run", {"data": "of an older version"})


def test_a_run_whose_sizes_were_written_without_a_net_goes_on(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    path = tmp_path / "run/config.json"
    saved = json.loads(path.read_text())
    saved["model"] = saved["model"]["model"]
    path.write_text(json.dumps(saved))
    loop.Run(config(), tmp_path / "run")
    other = config()
    other.model.model.width *= 2
    with pytest.raises(errors.ConfigError, match=r"model\.model\.width: 16 → 32"):
        loop.Run(other, tmp_path / "run")


def test_a_death_counts_against_a_checkpoint_only_in_the_first_step(run, tmp_path, monkeypatch):
    shutil.copytree(run, tmp_path / "run")
    longer = config(steps=config().steps + 2, prompts=())
    attempts = tmp_path / "run/checkpoints/attempts.json"

    def killed(*_, **__):
        raise RuntimeError("as a kill would")

    with monkeypatch.context() as patched:
        patched.setattr(loop.compile_cache, "compile_step", killed)
        with pytest.raises(RuntimeError):
            loop.train(longer, tmp_path / "run")
    assert not attempts.exists()
    with monkeypatch.context() as patched:
        patched.setattr(loop.compile_cache, "compile_step", lambda *_, **__: killed)
        with pytest.raises(RuntimeError):
            loop.train(longer, tmp_path / "run")
    assert json.loads(attempts.read_text()) == {str(config().steps): 1}


def test_a_start_draws_what_is_due_unless_the_picture_is_there(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    (picture,) = (tmp_path / "run/samples").iterdir()
    before, written = picture.read_bytes(), picture.stat().st_mtime_ns
    drawing = config(sample_every=config().steps)
    loop.train(drawing, tmp_path / "run")
    assert picture.stat().st_mtime_ns == written
    picture.unlink()
    loop.train(drawing, tmp_path / "run")
    assert picture.read_bytes() == before


def test_damaged_rows_of_rollbacks_still_count(tmp_path):
    assert rundir.rollbacks(tmp_path) == 0
    rundir.note_rollback(tmp_path, {"step": 8, "why": "not finite"})
    path = tmp_path / rundir.ROLLBACKS
    path.write_bytes(path.read_bytes() + b'{"step": 4, "wh\xff')
    assert rundir.rollbacks(tmp_path) == 2
    rundir.note_rollback(tmp_path, {"step": 2, "why": "again"})
    assert rundir.rollbacks(tmp_path) == 3
    first, damaged, last = path.read_bytes().splitlines()
    assert [json.loads(line)["step"] for line in (first, last)] == [8, 2]
    assert damaged.startswith(b'{"step": 4')


def test_the_sampler_draws_from_a_run_whatever_the_batch_size(run):
    pipe = pipeline.Pipeline.load(str(run))
    captions = ["a red circle", "a blue square", "a green star"]
    together = pipe(captions, seed=3)
    alone = pipe(captions[2:], seed=3, index=[2])
    assert together.shape == (3, 16, 16, 3)
    assert together.dtype == np.uint8
    assert np.abs(together[2].astype(int) - alone[0]).max() <= 1
    assert np.abs(together.astype(int) - pipe(captions, seed=4)).max() > 10


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps is 0"),
        ({"guidance": float("nan")}, "guidance is nan"),
        ({"seed": -1}, "seed is -1"),
        ({"top_k": 3}, "unknown option 'top_k'"),
        ({"sampler": "huen"}, "heun"),
        ({"steps": 2.5}, "steps is 2.5"),
        ({"steps": "ten"}, "steps is 'ten'"),
        ({"guidance": None}, "guidance is None"),
        ({"interval": (0.5,)}, "give 2 finite numbers"),
    ],
)
def test_bad_sampling_options_are_refused(run, options, message):
    pipe = pipeline.Pipeline.load(str(run))
    with pytest.raises(errors.ConfigError, match=message):
        pipe(["a red circle"], **options)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps is 0"),
        ({"batch_size": 7, "accumulate": 2}, "does not divide"),
        ({"objective": "flwo"}, "did you mean 'flow'"),
        ({"data": {"source": "shape"}}, "did you mean 'shapes"),
        ({"data": {"source": "shapes", "sise": 3}}, "unknown option 'sise'"),
        ({"model": {"model": {"backbone": "unett"}}}, "did you mean 'unet'"),
        ({"loss": {"predicton": "v"}}, "prediction"),
        ({"ema": {"modle": 0.9}}, "trained nets are"),
        ({"ema": {"model": 1.5}}, "model is 1.5 .at config.ema.model"),
        ({"load": {"txt": "minilm"}}, "unknown net 'txt'"),
        ({"allow_random": False}, "'text' has no weights"),
        ({"mesh": {"data": 3}}, "does not fit"),
        ({"sample": {"guidanse": 2.0}}, "unknown option 'guidanse'"),
        ({"sample": {"sampler": "huen"}}, "did you mean 'heun'"),
        ({"sample": {"steps": 0}}, "steps is 0"),
        ({"sample": {"shift": 0.0}}, "shift is 0.0 .at config.sample.shift"),
        ({"evaluators": {"shapes": {"num_imagse": 3}}}, "did you mean 'num_images'"),
        ({"evaluators": {"shapes": {"sample": {"steps": 0}}}}, "steps is 0"),
        ({"res": 18}, "use 16 or 20"),
        ({"model": {"model": {"backbone": "unet", "width": 18, "heads": 2}}}, "use 16 or 20"),
        ({"model": {"model": {"backbone": "layers"}}}, "no models named 'layers'"),
        ({"model": {"width": 16}}, "set config.model.model.width"),
        (
            {"data": {"source": "inputs"}},
            r"no data named 'inputs' .*one of \['digits', .*'shapes', 'subject', 'tfds'\]",
        ),
        ({"init_from": "nowhere"}, "no such folder"),
        ({"load": {"model": "nowhere#model"}}, "no such folder"),
        ({"init_from": "builtin:shapes"}, "tensors do not fit: .* describe the nets in"),
        (
            {"load": {"model": "builtin:shapes#model"}, "loss": {"prediction": "x"}},
            "tensors do not fit: .*config.load.model, .*shapes.* describe the nets in config.model",
        ),
    ],
)
def test_a_bad_config_is_refused_before_anything_is_written(tmp_path, changes, message):
    with pytest.raises(errors.ConfigError, match=message):
        loop.train(config(**changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_run_is_not_made_shorter(run):
    before = (run / "config.json").read_bytes()
    with pytest.raises(errors.ConfigError, match="has done 6 steps, the config asks for 5"):
        loop.train(config(steps=5, sample_every=6), run)
    assert (run / "config.json").read_bytes() == before


@pytest.mark.parametrize("size", [0.0, -1.0, float("nan"), float("inf")])
def test_a_memory_that_is_none_is_refused(tmp_path, size):
    with pytest.raises(errors.ConfigError, match="memory_gb"):
        plan.show(config(), tmp_path / "run", memory_gb=size)


def test_a_dry_run_reports_and_writes_nothing(tmp_path, capsys):
    found = plan.show(config(), tmp_path / "run", memory_gb=1e-3)
    assert found["parameters/model"] > 1000
    assert found["flops_per_image"] > 6 * found["parameters/model"]
    assert not found["fits"]
    assert found["state_bytes"] >= 3 * 4 * found["parameters/model"]  # params, moment, average
    assert not (tmp_path / "run").exists()
    told = capsys.readouterr().out
    assert "parameters/model" in told
    assert f"{found['peak_bytes'] / 2**20:,.2f} MiB" in told
    with pytest.raises(errors.ConfigError, match="more memory than one device has"):
        plan.check_fits(found)
    plan.check_fits(found | {"fits": True})
    plan.check_fits({"peak_bytes": 3})  # of a memory that is not known


def test_a_key_that_nobody_reads_does_not_exist():
    """Every key of configs/common.py is read somewhere in the package."""
    from configs import common

    text = "".join(p.read_text() for p in (ROOT / "t2i_jax").rglob("*.py"))
    for key in common.base():
        assert f"config.{key}" in text or f'"{key}"' in text, key


@pytest.mark.slow
def test_minutes_become_steps_before_the_first_and_stay_what_they_are(tmp_path, monkeypatch):
    monkeypatch.setattr(minutes, "TIMED", 3)
    plain = dict(prompts=(), save_every=5, log_every=2)
    loop.train(small(steps=0, minutes=1e-9, **plain), tmp_path / "timed")
    assert json.loads((tmp_path / "timed" / "config.json").read_text())["steps"] == 2
    loop.train(small(steps=2, **plain), tmp_path / "told")
    assert rows(tmp_path / "timed") == rows(tmp_path / "told")  # the timed steps left no trace
    assert loop.train(small(steps=0, minutes=1e-9, **plain), tmp_path / "timed") == {}
    with pytest.raises(errors.ConfigError, match="is of 2 steps, fixed for another time"):
        loop.train(small(steps=0, minutes=1.0, **plain), tmp_path / "timed")
    loop.train(small(steps=3, minutes=1.0, **plain), tmp_path / "timed")
    assert len(rows(tmp_path / "timed")) == 3


@pytest.mark.parametrize("changes", [{"minutes": -1.0}, {"save_minutes": float("nan")}])
def test_times_are_finite(tmp_path, changes):
    with pytest.raises(errors.ConfigError, match="minutes is"):
        loop.train(config(**changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


# --- runs that diverge ----------------------------------------------------------------------------


def diverging(**changes):
    return small(**dict(steps=30, save_every=4, keep=9, prompts=(), log_every=2) | changes)


@pytest.mark.slow
def test_a_run_that_goes_beyond_a_limit_stops_with_the_reason(tmp_path):
    watched = diverging(watch={"model/grad_norm": 1e-6})
    with pytest.raises(errors.DivergedError, match=r"model/grad_norm is .* above 1e-06") as caught:
        loop.train(watched, tmp_path)
    assert caught.value.step == 1
    assert caught.value.where == f"step {health.BEYOND_IN_A_ROW}"
    saved = {p.parent.name for p in (tmp_path / "checkpoints").glob("*/manifest.json")}
    assert saved
    with pytest.raises(errors.DivergedError):  # nothing is older: it does not begin again
        loop.train(diverging(watch={"model/grad_norm": 1e-6}, rollbacks=3), tmp_path)
    assert saved <= {p.name for p in (tmp_path / "checkpoints").iterdir()}


@pytest.mark.parametrize(
    ("watch", "message"),
    [
        ({"model/grad_nrm": 1.0}, "did you mean 'model/grad_norm'"),
        ({"model/loss": "much"}, "the limit is 'much'"),
    ],
)
def test_what_cannot_be_watched_is_said_before_anything(tmp_path, watch, message):
    with pytest.raises(errors.ConfigError, match=message):
        loop.train(diverging(watch=watch), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_run_goes_back_to_before_it_diverged_and_on_with_other_noise(
    tmp_path, monkeypatch, readers
):
    """Batches of NaN come from step 11 on, until the run has gone back once."""
    monkeypatch.setattr(
        loop.failpoints,
        "hit",
        lambda name, n=None: name == "batch.nan" and n >= 11 and not rundir.rollbacks(tmp_path),
    )
    with pytest.raises(errors.NonFiniteError) as caught:
        loop.train(diverging(steps=22), tmp_path)
    assert not readers(wait=5), caught
    assert not rundir.rollbacks(tmp_path)
    loop.train(diverging(steps=22, rollbacks=1), tmp_path)
    row = json.loads((tmp_path / rundir.ROLLBACKS).read_text())
    assert row["step"] == 8
    assert "not finite" in row["why"]
    kept = rows(tmp_path)
    assert [r["step"] for r in kept] == list(range(1, 23))
    assert not any(r["skipped"] for r in kept)
    names = sorted(p.name for p in (tmp_path / "checkpoints").iterdir() if "diverged" in p.name)
    assert names[0].startswith("12")
    plain = tmp_path / "plain"
    loop.train(diverging(steps=10), plain)
    losses = lambda found: [r["model/loss"] for r in found]
    assert losses(kept[:8]) == losses(rows(plain))[:8]
    assert losses(kept[8:10]) != losses(rows(plain))[8:]
    with pytest.raises(errors.NonFiniteError):  # again, for it forgets that it went back
        loop.train(diverging(steps=22), tmp_path, restart=True)
    assert not rundir.rollbacks(tmp_path)


def test_an_error_waits_for_the_save_that_it_overtakes(tmp_path, monkeypatch):
    """A checkpoint is whole only once its manifest is written, under the run's own lock."""
    monkeypatch.setenv("T2I_ENABLE_FAILPOINTS", "1")
    monkeypatch.setenv("T2I_FAILPOINT", "manifest.before=sleep2,data.before:3=raise")
    with pytest.raises(RuntimeError, match=r"data\.before"):
        loop.train(small(save_every=2, sample_every=0), tmp_path)
    assert (tmp_path / "checkpoints/2/manifest.json").exists()
