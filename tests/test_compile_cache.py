"""Compiled programs are kept between starts: the same numbers, and no harm from what lies there."""

import json
import os
import pathlib
import subprocess
import sys

import jax
import pytest

from t2i_jax.run import compile_cache

ROOT = pathlib.Path(__file__).parent.parent
KEPT = pathlib.Path("t2i_jax", "compiled")
STEPS = """
import collections, json, os, sys
import jax, jax.numpy as jnp
if "late" in sys.argv:  # a notebook has used JAX before
    jax.jit(jnp.sin)(1.0).block_until_ready()
from t2i_jax.run import compile_cache, fingerprint
from t2i_jax import optim, step
from tests import toys

compile_cache.enable()
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
seen = collections.Counter()
jax.monitoring.register_event_listener(lambda event, **_: seen.update([event.split("/")[-1]]))
family = toys.gan()
spec = dict(name="adamw", learning_rate=1e-2)
optimisers = {net: optim.make(spec, steps=9, where="") for net in family.trained}
state = step.init(family, optimisers, {}, jax.random.key(0), toys.batch())
update = jax.jit(step.make_update(family, optimisers, ema={}), donate_argnums=0)
compiled = update.lower(state, {}, toys.batch()).compile()
losses = []
for _ in range(5):
    before, (state, values) = state, compiled(state, {}, toys.batch())
    losses.append(float(values["gen/loss"]).hex())
print(json.dumps({
    "state": fingerprint.of(state.nets)[0],
    "losses": losses,
    "donated": compiled.memory_analysis().alias_size_in_bytes,
    "gone": all(x.is_deleted() for x in jax.tree.leaves(before)),
    "hits": seen["cache_hits"],
    "misses": seen["cache_misses"],
}))
"""


def run(home, *arguments, **environment):
    """What five steps in a process of their own saw, and what it told."""
    names = ("JAX_COMPILATION_CACHE_DIR", "JAX_ENABLE_COMPILATION_CACHE")
    whole = {name: value for name, value in os.environ.items() if name not in names}
    whole |= {"XDG_CACHE_HOME": str(home), **environment}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", STEPS, *arguments],
        cwd=ROOT,
        env=whole,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1]), done.stderr


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def first(home):
    return run(home)[0]


def test_a_second_start_compiles_nothing_and_computes_the_same_to_the_bit(home, first):
    """Also in a notebook that used JAX before, and as without a cache."""
    assert first["misses"] > 0
    assert first["hits"] == 0
    second, told = run(home, "late")
    assert second["misses"] <= 1  # what was compiled before the cache was asked for
    assert second["hits"] >= first["misses"]
    assert not told
    off, _ = run(home, JAX_ENABLE_COMPILATION_CACHE="0")
    assert off["hits"] == off["misses"] == 0
    for name in ("state", "losses", "donated", "gone"):
        assert first[name] == second[name] == off[name], name
    assert first["donated"] > 0
    assert first["gone"]


def test_a_damaged_entry_is_compiled_and_written_again(home, first):
    entries = sorted((home / KEPT).iterdir())
    whole = [entry.read_bytes() for entry in entries]
    for i, entry in enumerate(entries):
        flipped = bytearray(whole[i])
        flipped[len(flipped) // 2] ^= 4
        entry.write_bytes((b"", flipped, flipped[: len(flipped) // 2])[i % 3])
    again, told = run(home)
    assert again["misses"] == first["misses"]
    assert (again["state"], again["losses"]) == (first["state"], first["losses"])
    assert not told
    assert sorted((home / KEPT).iterdir()) == entries
    third, _ = run(home)
    assert third["misses"] == 0


@pytest.fixture
def no_cache(monkeypatch):
    """JAX as it starts without the variable that these tests have set."""
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    before = (
        jax.config.jax_compilation_cache_dir,
        jax.config.jax_persistent_cache_min_compile_time_secs,
    )
    jax.config.update("jax_compilation_cache_dir", None)
    told = []
    monkeypatch.setattr(compile_cache.logging, "warning", lambda text, *a: told.append(text % a))
    yield told
    jax.config.update("jax_compilation_cache_dir", before[0])
    jax.config.update("jax_persistent_cache_min_compile_time_secs", before[1])
    compile_cache.compilation_cache.reset_cache()


def test_the_folder_is_the_users_alone(no_cache, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    compile_cache.enable()
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / KEPT)
    assert (tmp_path / KEPT).stat().st_mode & 0o777 == 0o700
    assert not no_cache


def _writable(path):
    path.mkdir(parents=True)
    path.chmod(0o770)


def _writable_above(path):
    path.mkdir(parents=True, mode=0o700)
    path.parent.chmod(0o770)


def _link(path):
    path.parent.mkdir(parents=True)
    (path.parent / "elsewhere").mkdir(mode=0o700)
    path.symlink_to(path.parent / "elsewhere")


def _file(path):
    path.parent.mkdir(parents=True)
    path.touch()


def _foreign(path):
    path.mkdir(mode=0o700, parents=True)
    try:
        os.chown(path, 12345, -1)
    except PermissionError:
        pytest.skip("only root can give a folder away")


@pytest.mark.parametrize("spoil", [_writable, _writable_above, _link, _file, _foreign])
def test_a_folder_that_others_could_write_to_is_told_and_not_used(
    no_cache, monkeypatch, tmp_path, spoil
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    spoil(tmp_path / KEPT)
    compile_cache.enable()
    assert jax.config.jax_compilation_cache_dir is None
    assert len(no_cache) == 1
    assert str(tmp_path) in no_cache[0]


def test_a_folder_that_is_named_and_a_cache_that_is_off_stay_so(no_cache, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for name, value in (("COMPILATION_CACHE_DIR", ""), ("COMPILATION_CACHE_DIR", "/named")):
        monkeypatch.setenv(f"JAX_{name}", value)
        compile_cache.enable()
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    jax.config.update("jax_enable_compilation_cache", False)
    compile_cache.enable()
    jax.config.update("jax_enable_compilation_cache", True)
    assert jax.config.jax_compilation_cache_dir is None
    assert not list(tmp_path.iterdir())


def test_the_size_is_bounded_and_what_was_not_used_goes_first(tmp_path):
    folder = compile_cache.Folder(tmp_path, limit=1000)
    for i in range(4):
        folder.put(f"{i}", bytes(200))
        os.utime(folder._file(f"{i}"), (i, i))
    assert folder.get("0") == bytes(200)  # used now
    folder.put("4", bytes(200))
    assert [folder.get(f"{i}") is not None for i in range(5)] == [True, False, True, True, True]
    folder.put("large", bytes(2000))
    assert folder.get("large") is None
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) <= 1000


def test_no_failure_of_the_folder_comes_out(tmp_path, monkeypatch):
    folder = compile_cache.Folder(tmp_path / "gone", limit=1000)
    folder.put("a", b"1")
    assert folder.get("a") is None
    folder = compile_cache.Folder(tmp_path, limit=1000)
    folder.put("n" * 400, b"1")  # a name that is too long
    folder._file("b").mkdir()
    assert folder.get("b") is None
    folder.put("b", b"1")


def test_another_processor_does_not_get_this_ones_code(tmp_path, monkeypatch):
    folder = compile_cache.Folder(tmp_path, limit=1000)
    folder.put("a", b"1")
    monkeypatch.setattr(compile_cache, "processor", lambda: "another")
    assert folder.get("a") is None
    folder.put("a", b"2")
    assert folder.get("a") == b"2"
    monkeypatch.undo()
    assert folder.get("a") == b"1"
