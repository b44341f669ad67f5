"""Faults of storage: checkpoints damaged, disks full, workdirs contested."""

import contextlib
import gc
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t2i_jax import errors, step
from t2i_jax.run import checkpoint, owner
from tests.faults.lab import ROOT, assert_error, row, rows, steps

MEANT = {"data": "abc", "evaluated": True}


def state(n: int, *, scale=1.0, size=300):
    """A state of n updates; its numbers follow from n."""
    w = scale * jax.random.normal(jax.random.key(n), (size, 40))
    params = {"w": w, "b": jnp.arange(7.0) + n}
    return step.State(
        jnp.int32(n),
        {"model": {"params": params}},
        {"model": {"mu": params, "count": jnp.int32(n)}},
        {"model": jax.tree.map(lambda x: x / 2, params)},
        jnp.int32(0),
    )


def abstract(like):
    where = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), like)


def saved(folder, *numbers, **options):
    """Checkpoints of those steps, all written."""
    checkpoints = checkpoint.Checkpoints(folder, **options)
    for n in numbers:
        checkpoints.save(state(n), MEANT)
    checkpoints.wait()
    return checkpoints


def same(a, b) -> bool:
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(np.array_equal(x, y) for x, y in pairs)


def newest(folder):
    """What a start would go on from, read afresh."""
    return checkpoint.Checkpoints(folder).restore_newest(abstract(state(0)))


def files(folder, n: int):
    return [p for p in sorted((folder / "checkpoints" / str(n)).rglob("*")) if p.is_file()]


def damages(lab):
    """(file, name of the damage, function) of one checkpoint's files."""
    rng = random.Random(0)
    folder = lab.folder()
    saved(folder, 1, 2)
    count = len(files(folder, 2))

    def flip(path):
        data = bytearray(path.read_bytes())
        if data:
            place = rng.randrange(len(data))
            data[place] ^= 1 << rng.randrange(8)
        path.write_bytes(data)

    kinds = {
        "empty": lambda p: p.write_bytes(b""),
        "half": lambda p: p.write_bytes(p.read_bytes()[: p.stat().st_size // 2]),
        "one byte short": lambda p: p.write_bytes(p.read_bytes()[:-1]),
        "one byte more": lambda p: p.write_bytes(p.read_bytes() + b"x"),
        "bit flipped": flip,
        "removed": lambda p: p.unlink(),
    }
    for i in range(count):
        for name, damage in kinds.items():
            yield folder, i, name, damage


def detected(lab, wanted) -> str:
    tried = 0
    for folder, i, name, damage in damages(lab):
        if name not in wanted:
            continue
        copy = lab.folder()
        shutil.copytree(folder, copy)
        path = files(copy, 2)[i]
        if path.stat().st_size == 0 and name in ("empty", "half", "one byte short", "bit flipped"):
            continue
        if not lab.long and path.stat().st_size == 0:
            continue
        damage(path)
        found, n = newest(copy)
        where = f"{name}: {path.relative_to(copy)}"
        assert n == 1, f"silent: {where}"
        assert same(found, state(1)), where
        if path.name != checkpoint.MANIFEST or name != "removed":
            assert (copy / "checkpoints" / "2.corrupt").is_dir(), where
        shutil.rmtree(copy)
        tried += 1
    return f"{tried} damages, all found"


@row("C5", "a truncated file: the checkpoint before is used, the damaged one set aside", long=True)
def c5(lab):
    return detected(lab, ("empty", "half", "one byte short", "one byte more"))


@row("C6", "one bit flipped in any file is found before the first step")
def c6(lab):
    text = detected(lab, ("bit flipped",))
    folder = lab.folder()
    small, checkpoint.SMALL = checkpoint.SMALL, 0  # as if no file had its hash in the manifest
    try:
        saved(folder, 1, 2)
        data = max(files(folder, 2), key=lambda p: p.stat().st_size)
        content = bytearray(data.read_bytes())
        content[len(content) // 2] ^= 1
        data.write_bytes(content)
        assert newest(folder)[1] == 1, "silent: the fingerprint"
    finally:
        checkpoint.SMALL = small
    return f"{text}; one by its fingerprint alone"


@row("C7", "a file missing, or swapped with another step's, is found")
def c7(lab):
    text = detected(lab, ("removed",))
    folder = lab.folder()
    saved(folder, 1, 2)
    one, two = files(folder, 1), files(folder, 2)
    data = [p for p in one if p.stat().st_size > 2000 and "/d/" in str(p)]
    assert data
    for path in data:
        twin = max((p for p in two if p.parent.name == "d"), key=lambda p: p.stat().st_size)
        twin.write_bytes(path.read_bytes())
        break
    assert newest(folder)[1] == 1
    folder = lab.folder()
    saved(folder, 1, 2)
    shutil.rmtree(folder / "checkpoints" / "2")
    shutil.copytree(folder / "checkpoints" / "1", folder / "checkpoints" / "2")
    assert newest(folder)[1] == 1  # a whole other step under its name
    return text


@row("C8", "all checkpoints damaged: an error lists each; nothing starts over by itself")
def c8(lab):
    folder = lab.folder()
    saved(folder, 1, 2)
    for n in (1, 2):
        files(folder, n)[0].write_bytes(b"")
    for _ in range(2):  # the second start finds them set aside
        with pytest.raises(errors.DataError) as caught:
            newest(folder)
        assert caught.value.exit_code == 65
        assert "1" in caught.value.what
        assert "2" in caught.value.what
        assert "--restart_from_scratch" in str(caught.value)
    checkpoints = checkpoint.Checkpoints(folder)
    checkpoints.set_all_aside()
    assert checkpoints.restore_newest(abstract(state(0))) is None


@row(
    "C9",
    "starts that die in their first step: after three, the checkpoint before; then an error",
)
def c9(lab):
    folder = lab.folder()
    saved(folder, 1, 2)

    def died():
        checkpoints = checkpoint.Checkpoints(folder)
        _, step = checkpoints.restore_newest(abstract(state(0)))
        checkpoints.begins(step)
        return step

    assert [died() for _ in range(6)] == [2, 2, 2, 1, 1, 1]
    with pytest.raises(errors.DataError) as caught:
        newest(folder)
    assert "died in their first step" in caught.value.what
    assert "attempts.json" in caught.value.fix
    (folder / "checkpoints" / "attempts.json").unlink()  # as it says
    again = lab.folder()
    saved(again, 1, 2)
    checkpoints = checkpoint.Checkpoints(again)
    for _ in range(checkpoint.ATTEMPTS):
        checkpoints.begins(2)
    checkpoints = checkpoint.Checkpoints(again)
    assert checkpoints.restore_newest(abstract(state(0)))[1] == 1
    checkpoints.progressed()  # from the older one: what failed may not come back as the newest
    assert checkpoints.steps() == [1]
    for _ in range(6):  # a death that comes before the state is used says nothing about it
        assert newest(folder)[1] == 2
    folder = lab.folder()
    saved(folder, 1, 2)
    for _ in range(6):  # starts that come further count for nothing
        checkpoints = checkpoint.Checkpoints(folder)
        assert checkpoints.restore_newest(abstract(state(0)))[1] == 2
        checkpoints.begins(2)
        checkpoints.progressed()


@row("C10", "leftovers, foreign folders, files and links named like a step are cleaned or ignored")
def c10(lab):
    folder, outside = lab.folder(), lab.folder()
    saved(folder, 1, 2)
    where = folder / "checkpoints"
    outside.mkdir()
    (outside / "precious").write_text("x")
    shutil.copytree(where / "2", outside / "3")  # whole, but not ours to follow
    (where / "9").symlink_to(outside / "3")
    shutil.copytree(where / "2", where / "2.bak")
    (where / "7").write_text("a file")
    (where / "5.orbax-checkpoint-tmp-123" / "params").mkdir(parents=True)
    (where / "6" / "params").mkdir(parents=True)  # committed, but without a manifest
    (where / "notes").mkdir()
    (where / "00002").mkdir()
    (where / "4.removed" / "params").mkdir(parents=True)
    assert newest(folder)[1] == 2
    assert (outside / "precious").read_text() == "x"
    left = {p.name for p in where.iterdir()}
    assert {"1", "2", "2.bak", "notes"} <= left
    assert not left & {"5.orbax-checkpoint-tmp-123", "6", "4.removed"}
    checkpoints = saved(folder, 7, 9)
    assert checkpoints.steps() == [7, 9]
    assert (outside / "precious").read_text() == "x"


def large_files(monkey):
    """As if no file were small enough to have its hash in the manifest."""
    monkey.setattr(checkpoint, "SMALL", 0)


@row("C13", "two sign bits flipped, or an array negated, in a file without a hash: found")
def c13(lab):
    base, tried = lab.folder(), 0
    with pytest.MonkeyPatch.context() as monkey:
        large_files(monkey)
        saved(base, 1, 2)
        weights = np.asarray(state(2).nets["model"]["params"]["w"])
        signs = np.ones(weights.size, np.float32)
        for damage in ("two signs", "negated", "two rows"):
            changed = weights.copy()
            if damage == "two signs":
                signs[[17, 4096]] = -1
                changed *= signs.reshape(weights.shape)
            elif damage == "negated":
                changed = -changed
            else:
                changed[[3, 200]] = changed[[200, 3]]
            copy = lab.folder()
            shutil.copytree(base, copy)
            for path in files(copy, 2):
                content = path.read_bytes()
                if weights.tobytes() in content:
                    path.write_bytes(content.replace(weights.tobytes(), changed.tobytes()))
                    tried += 1
            found, n = newest(copy)
            assert n == 1, f"silent: {damage}"
            assert same(found, state(1))
    assert tried >= 3
    return f"{tried} files changed, all found"


@row("C15", "a checkpoint of the format before opens, checked by the sums it was written with")
def c15(lab):
    folder = lab.folder()
    with pytest.MonkeyPatch.context() as monkey:
        large_files(monkey)
        monkey.setattr(checkpoint, "FORMAT", 2)
        saved(folder, 1, 2)
    with pytest.MonkeyPatch.context() as monkey:
        large_files(monkey)  # as when it was written, so that only the sums can tell
        assert same(newest(folder)[0], state(2))
        data = max(files(folder, 2), key=lambda p: p.stat().st_size)
        content = bytearray(data.read_bytes())
        content[len(content) // 2] ^= 1
        data.write_bytes(content)
        assert newest(folder)[1] == 1


@row("C14", "a checkpoint copied, moved, or zipped and unzipped restores")
def c14(lab):
    folder, moved, unzipped = lab.folder(), lab.folder(), lab.folder()
    saved(folder, 3)
    archive = shutil.make_archive(str(lab.folder()), "zip", folder)
    shutil.unpack_archive(archive, unzipped)
    shutil.copytree(folder, moved)
    shutil.rmtree(folder)
    for path in (moved, unzipped):
        for empty in sorted(path.rglob("*"), reverse=True):
            if empty.is_dir() and not any(empty.iterdir()):
                empty.rmdir()
        found, n = newest(path)
        assert n == 3, path
        assert same(found, state(3)), path


@row("C16", "a reader beside a writer sees a whole step or a clear error")
def c16(lab):
    folder = lab.folder()
    checkpoints = saved(folder, 1)
    seen = gone = 0
    target = {"model": abstract(state(0).nets["model"])}
    for n in range(2, 12):
        checkpoints.save(state(n), MEANT)
        reader = checkpoint.Checkpoints(folder, create=False)
        try:
            at = reader.choose()
            nets = reader.restore_nets(at, target, ["model"])
        except errors.ConfigError as e:
            gone += "gone" in e.what
        else:
            assert same(nets["model"]["params"], state(at).ema["model"])
            seen += 1
    checkpoints.close()
    assert seen >= 5
    assert seen + gone == 10
    assert checkpoints.steps() == [10, 11]
    return f"{seen} reads, {gone} told it was gone"


@row("N3", "a state that is not finite is not saved, and healthy checkpoints stay")
def n3(lab):
    folder = lab.folder()
    checkpoints = saved(folder, 1, 2)
    sick = state(3)
    sick.ema["model"]["w"] = sick.ema["model"]["w"].at[3, 3].set(jnp.nan)
    with pytest.raises(errors.NonFiniteError) as caught:
        checkpoints.save(sick, MEANT)
    assert caught.value.exit_code == 76
    assert "ema/model/w" in caught.value.what
    assert checkpoints.steps() == [1, 2]
    assert same(newest(folder)[0], state(2))


@row("T7", "arrays missing, extra, of another shape or type: named with both, never half loaded")
def t7(lab):
    folder = lab.folder()
    checkpoints = saved(folder, 1)
    target = abstract(state(0))
    params = target.nets["model"]["params"]
    for name, change in {
        "missing": {k: v for k, v in params.items() if k != "b"},
        "extra": {**params, "c": params["b"]},
        "shape": {**params, "w": jax.ShapeDtypeStruct((3, 3), jnp.float32)},
        "type": {**params, "w": jax.ShapeDtypeStruct(params["w"].shape, jnp.bfloat16)},
    }.items():
        other = target._replace(nets={"model": {"params": change}})
        with pytest.raises(errors.DataError) as caught:
            checkpoints.restore(1, other)
        assert caught.value.exit_code == 65, name
        assert "params/model/params/" in caught.value.what, name
        assert not isinstance(caught.value, checkpoint.Damaged)


WRITER = """
import sys, pathlib
from tests.faults import storage
from t2i_jax.run import checkpoint
folder, first, last = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
checkpoints = checkpoint.Checkpoints(folder)
found = checkpoints.restore_newest(storage.abstract(storage.state(0)))
checkpoints.progressed()
print("at", found and found[1], flush=True)
assert not found or storage.same(found[0], storage.state(found[1]))
for n in range(first, last + 1):
    checkpoints.save(storage.state(n), storage.MEANT)
checkpoints.close()
print("done", checkpoints.steps(), flush=True)
"""


def write(folder, first, last, *, prefix=(), **options):
    command = [*prefix, sys.executable, "-c", WRITER, str(folder), str(first), str(last)]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240, **options
    )


CALLS = "openat,rename,renameat,renameat2,unlink,unlinkat,mkdir,mkdirat,fsync,fdatasync,rmdir"


@row(
    "P2", "SIGKILL at the file-system calls of a save: the newest valid step is restored", long=True
)
def p2(lab):
    if not shutil.which("strace"):
        return "skipped: no strace here"
    base = lab.folder()
    saved(base, 1, 2)
    log = lab.folder()
    copy = lab.folder()
    shutil.copytree(base, copy)
    prefix = ["strace", "-f", "-o", str(log), "-e", f"trace={CALLS}"]
    done = write(copy, 3, 3, prefix=prefix)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = log.read_text().splitlines()
    inside = [line for line in lines if str(copy) in line or "ckpt" in line]
    calls = {name: sum(f" {name}(" in line for line in lines) for name in CALLS.split(",")}
    ours = {name: sum(f" {name}(" in line for line in inside) for name in calls}
    struck = survived = 0
    rng = random.Random(0)
    for name, total in calls.items():
        numbers = range(total - 3 * ours[name], total + 1) if ours[name] else ()
        numbers = [n for n in numbers if n > 0]
        for n in numbers if len(numbers) < 12 else sorted(rng.sample(numbers, 12)):
            copy = lab.folder()
            shutil.copytree(base, copy)
            kill = ["-e", f"inject={name}:signal=SIGKILL:when={n}"]
            write(
                copy, 3, 3, prefix=["strace", "-f", "-o", "/dev/null", "-e", f"trace={name}", *kill]
            )
            struck += 1
            again = write(copy, 4, 4)
            assert again.returncode == 0, (name, n, again.stderr[-2000:])
            at = int(again.stdout.split()[1])
            assert at in (2, 3), (name, n, at)
            assert same(newest(copy)[0], state(4)), (name, n)
            survived += 1
            shutil.rmtree(copy)
    return f"{survived} of {struck} kills survived"


@contextlib.contextmanager
def small_disk(lab, megabytes: float):
    """A real file system of that size; None where mounting is not allowed."""
    folder = lab.folder()
    folder.mkdir()
    size = f"size={int(megabytes * 1024)}k"
    mount = ["mount", "-t", "tmpfs", "-o", size, "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True).returncode:
        yield None
        return
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(disk, leave=40_000):
    """Takes all room but so many bytes."""
    with contextlib.suppress(OSError):  # somebody was faster
        (disk / "filler").write_bytes(b"x" * (shutil.disk_usage(disk).free - leave))


@row(
    "C1",
    "disk full while saving: older checkpoints stay, training goes on, three failures end it",
    long=True,
)
def c1(lab):
    with small_disk(lab, 2.5) as disk:
        if disk is None:
            return "skipped: mounting is not allowed here"
        checkpoints = saved(disk / "run", 1)
        fill(disk)
        checkpoints.save(state(2), MEANT)
        checkpoints.wait()
        assert checkpoints.steps() == [1]
        checkpoints.save(state(3), MEANT)
        checkpoints.wait()
        assert same(newest(disk / "run")[0], state(1))
        (disk / "filler").unlink()  # room again: the next save works, and the count begins anew
        checkpoints.save(state(4), MEANT)
        checkpoints.wait()
        assert checkpoints.steps() == [1, 4]
        fill(disk)

        def fail_three_times():
            for n in (5, 6, 7):
                checkpoints.save(state(n), MEANT)
                checkpoints.wait()

        with pytest.raises(errors.StorageError) as caught:
            fail_three_times()
        gc.collect()  # what TensorStore's threads leave belongs to this row
        assert caught.value.exit_code == 74
        assert "from step 4" in str(caught.value)
        assert same(newest(disk / "run")[0], state(4))


@row(
    "C2", "disk full at the last save: exit 74, which says where to go on; never success", long=True
)
def c2(lab):
    with small_disk(lab, 12) as disk:
        if disk is None:
            return "skipped: mounting is not allowed here"
        process = lab.start(disk / "run", failpoint="step.before:22=sleep2")
        lab.wait_for(process, "step 21/")
        fill(disk)
        ended = lab.end(process)
        assert_error(ended, 74, "goes on from step", noise=True)  # of TensorStore's threads
        (disk / "filler").unlink()
        lab.finish(disk / "run")


@row(
    "B5",
    "the disk fills between two saves: told once, training goes on; SIGTERM is heard",
    long=True,
)
def b5(lab):
    with small_disk(lab, 12) as disk:
        if disk is None:
            return "skipped: mounting is not allowed here"
        folder = disk / "run"
        rare = ("--config.save_every=1000", "--config.steps=90")
        slow = "step.before:5=sleep2,step.before:80=sleep4"
        for room in (False, True) if lab.long else (True,):
            process = lab.start(folder, *rare, failpoint=slow)
            lab.wait_for(process, "step 4/")
            fill(disk, leave=0)
            lab.wait_for(process, "step 79/")
            told = [line for line in lab.log(process).splitlines() if "cannot write" in line]
            assert any("metrics.jsonl" in line for line in told), told
            assert any("tfevents" in line for line in told), told
            paths = [line.partition("cannot write ")[2].partition(",")[0] for line in told]
            assert len(paths) == len(set(paths)), told  # each once
            if room:
                (disk / "filler").unlink()
            process.send_signal(signal.SIGTERM)
            ended = lab.end(process)
            if room:
                assert_error(ended, 75)
                kept = steps(folder)[-1]
                assert [r["step"] for r in rows(folder)] == list(range(1, kept + 1))
            else:
                assert_error(ended, 74, "cannot be written", str(disk), noise=True)
                (disk / "filler").unlink()
                shutil.rmtree(folder)


@row("B6", "a full disk at a start, for samples or for the best: exit 74 with the path", long=True)
def b6(lab):
    with small_disk(lab, 12) as disk:
        if disk is None:
            return "skipped: mounting is not allowed here"
        folder = disk / "run"
        assert lab.run(folder, "--config.steps=8").code == 0
        fill(disk, leave=0)
        ended = lab.run(folder)
        assert_error(ended, 74, str(folder), "No space left")
        assert_error(lab.run(disk / "other"), 74, str(disk / "other"))
        (disk / "filler").unlink()
        drawn = ("--config.sample_every=9", "--config.prompts=('a red circle',)")
        process = lab.start(folder, *drawn, failpoint="hooks.before:9=sleep2")
        lab.wait_for(process, "step 9/")
        fill(disk, leave=0)
        assert_error(lab.end(process), 74, str(folder / "samples"), noise=True)
    assert_error(lab.run(lab.folder() / ("n" * 300)), 74, "File name too long", "nnn")


@row("C3", "a workdir that cannot be written: exit 74 before anything is compiled")
def c3(lab):
    with small_disk(lab, 1) as disk:
        if disk is None:
            return "skipped: mounting is not allowed here"
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        ended = lab.run(disk / "run")
        assert_error(ended, 74, "cannot write there", str(disk))
        assert "compiling" not in ended.log


@row(
    "C4",
    "a save that fails in the background is told at the next step, not listed, not fatal",
    long=True,
)
def c4(lab):
    folder = lab.folder()
    ended = lab.run(folder, failpoint="manifest.before:1=raise,step.before:5-24=sleep0.2")
    assert ended.code == 0, ended.log[-2000:]
    lines = ended.log.splitlines()
    told = next(i for i, line in enumerate(lines) if "the save of step 4 failed" in line)
    assert any("step 7/" in line for line in lines[told:])  # before the next save
    assert steps(folder) == steps(lab.oracle)
    assert rows(folder) == rows(lab.oracle)


@row(
    "C11",
    "one writer: a second start exits 77; a dead owner's workdir is taken over at once",
    long=True,
)
def c11(lab):
    folder = lab.folder()
    process = lab.start(folder, failpoint="step.before:6=sleep600")
    lab.wait_for(process, "step 5/")
    second = lab.run(folder)
    assert_error(second, 77, "trains there", f"process {process.pid}")
    process.send_signal(signal.SIGKILL)
    process.wait()
    lab.finish(folder)

    other = (
        lab.folder()
    )  # an owner on another host, as its lock shows it, that stopped giving signs
    other.mkdir()
    paused = owner.Owner(other, beat=0.1, stale=0.5)
    paused._me["machine"] = "elsewhere"
    paused.acquire()
    mine = owner.Owner(other, beat=0.1, stale=0.5)
    with pytest.raises(errors.OwnerError) as caught:
        mine.acquire()
    assert caught.value.exit_code == 77
    paused._ended.set()  # as SIGSTOP does
    time.sleep(0.3)
    mine.acquire()
    with pytest.raises(errors.OwnerError) as caught:
        paused.check()
    assert "taken over" in caught.value.what
    sleeping = checkpoint.Checkpoints(other, guard=paused.check)
    try:
        sleeping.save(state(1), MEANT)
    except errors.OwnerError:
        assert sleeping.steps() == []
    else:
        raise AssertionError("the old owner wrote")
    mine.release()
    assert not (other / "lock").exists()


@row(
    "B3",
    "no stdout, a plain C locale, a log that cannot grow: the training is unaffected",
    long=True,
)
def b3(lab):
    folder = lab.folder()
    ended = lab.run(folder, wrap='exec "$@" >&- 2>&-', env={"LANG": "C", "LC_ALL": "C"})
    assert ended.code == 0
    from tests.faults.lab import assert_same

    assert_same(folder, lab.oracle)
