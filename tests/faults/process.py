"""Faults of processes: killed, asked to stop, struck by numbers that are not finite, moved."""

import json
import os
import pathlib
import random
import signal
import socket
import time

from tests.faults.lab import assert_error, assert_same, prints, row, rows, steps

INTERVAL = 4  # steps between two saves


@row("P1", "SIGKILL at random moments: every loss and the last state equal an uninterrupted run's")
def p1(lab):
    rng, folder, kills, most = random.Random(1), lab.folder(), 20 if lab.long else 2, 0
    for _ in range(kills):
        process = lab.start(folder)
        if rng.random() < 0.25:
            time.sleep(rng.uniform(0.5, 6))  # while it starts
        else:
            lab.wait_for(process, "compiled in")
            time.sleep(rng.uniform(0, 0.6))
        process.send_signal(signal.SIGKILL)
        process.wait()
        reached = max([r["step"] for r in rows_of(folder)], default=0)
        most = max(most, reached - max(steps(folder), default=0))
    lab.finish(folder)
    assert most <= 2 * INTERVAL  # an interval, and the steps while the last save was in flight
    return f"{kills} kills, at most {most} steps done again"


def rows_of(folder):
    """Rows of a file that may end in half a line."""
    found = []
    path = folder / "metrics.jsonl"
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


@row(
    "P3",
    "SIGKILL between a save's commit and what is due after it: it is done on resume",
    long=True,
)
def p3(lab):
    flags = (
        "--config.sample_every=8",
        "--config.prompts=('a red circle',)",
        "--config.sample.steps=1",
    )
    oracle = lab.folder()
    assert lab.run(oracle, *flags).code == 0
    for point in ("hooks.before:8=kill", "save.started:8=kill"):
        folder = lab.folder()
        assert lab.run(folder, *flags, failpoint=point).code == -signal.SIGKILL
        assert lab.run(folder, *flags).code == 0
        assert rows(folder) == rows(oracle)
        names = sorted(p.name for p in (oracle / "samples").iterdir())
        assert names == sorted(p.name for p in (folder / "samples").iterdir())
        for name in names:
            ours, theirs = ((f / "samples" / name).read_bytes() for f in (folder, oracle))
            assert ours == theirs, name


PHASES = {  # where the signal comes: failpoint, and the steps then saved
    "restore": "restore.before:1=term",
    "hooks": "hooks.before:6=term",
    "step": "step.before:6=term",
    "save": "save.started:4=term",
    "before a save": "save.before:4=term",
}


@row("P4", "SIGTERM in every phase: exit 75, no step lost", long=True)
def p4(lab):
    phases = PHASES if lab.long else {"step": PHASES["step"]}
    for phase, point in phases.items():
        folder = lab.folder()
        ended = lab.run(folder, failpoint=point)
        assert_error(ended, 75, "start the same command again")
        reached = max([r["step"] for r in rows_of(folder)], default=0)
        assert reached == max(steps(folder), default=0), phase
        lab.finish(folder)
    if not lab.long:
        return "1 phase"
    folder = lab.folder()  # while a picture is drawn: it is abandoned and drawn on resume
    flags = (
        "--config.sample_every=6",
        "--config.prompts=('a red circle',)",
        "--config.sample.steps=1",
    )
    ended = lab.run(folder, *flags, failpoint="hooks.before:6=term")
    assert_error(ended, 75)
    assert not (folder / "samples" / "step_00000006.png").exists()
    assert lab.run(folder, *flags).code == 0
    assert (folder / "samples" / "step_00000006.png").exists()
    process = lab.start(lab.folder())
    lab.wait_for(process, "compiling")
    process.send_signal(signal.SIGTERM)
    assert_error(lab.end(process), 75)
    return f"{len(PHASES) + 2} phases"


def heard(process) -> None:
    """Returns when the process has its own handler of SIGTERM."""
    until = time.monotonic() + 30
    while time.monotonic() < until:
        status = pathlib.Path(f"/proc/{process.pid}/status").read_text()
        caught = int(status.partition("SigCgt:")[2].split()[0], 16)
        if caught >> (signal.SIGTERM - 1) & 1:
            return
        time.sleep(0.002)
    raise AssertionError("no handler after 30 s")


@row("P13", "SIGTERM or Ctrl-C in the first seconds: exit 75 at once, and the next start goes on")
def p13(lab):
    delays = (0, 0.05, 0.2, 0.5, 1, 1.5, 2, 3) if lab.long else (0, 0.5)
    folder = lab.folder()
    for number in (signal.SIGTERM, signal.SIGINT):
        for delay in delays:
            process = lab.start(folder)
            heard(process)
            time.sleep(delay)
            process.send_signal(number)
            since = time.monotonic()
            assert_error(lab.end(process), 75, f"stopped by {number.name}")
            assert time.monotonic() - since < 15, delay
    if lab.long:
        lab.finish(folder)
    return f"{2 * len(delays)} signals"


@row("P14", "SIGTERM while something hangs or compiles: exit 75 at once, no step lost", long=True)
def p14(lab):
    for point, kept in {
        "frozen.before:1=sleep600": [],
        "restore.before:1=sleep600": [],
        "compile:1=sleep600": [],
        "data.before:7=sleep600": [4, 6],
    }.items():
        folder = lab.folder()
        process = lab.start(folder, failpoint=point)
        lab.wait_for(process, f"failpoint {point.partition(':')[0]}")
        process.send_signal(signal.SIGTERM)
        since = time.monotonic()
        assert_error(lab.end(process), 75, "stopped by SIGTERM")
        assert time.monotonic() - since < 30, point
        assert steps(folder) == kept, point
        assert not (folder / "lock").exists(), point
        lab.finish(folder)
    return "4 phases"


@row("P15", "a data source or frozen net that hangs: exit 70, which names the phase", long=True)
def p15(lab):
    limit = {"T2I_PHASE_SECONDS": "30"}
    for point, phase in {
        "frozen.before:1=sleep600": "reading frozen nets",
        "data.before:3=sleep600": "reading data",
    }.items():
        ended = lab.run(lab.folder(), failpoint=point, env=limit)
        assert ended.code == 70, ended.log[-2000:]
        assert f"{phase} did not end in 30 s" in ended.log


@row("P16", "saves by time: the run is the same to the last bit, wherever it was saved", long=True)
def p16(lab):
    by_time = ("--config.save_every=1000", "--config.save_minutes=1e-4")
    folder = lab.folder()
    assert lab.run(folder, *by_time, failpoint="step.before:15=kill").code == -signal.SIGKILL
    assert steps(folder), "nothing was saved"
    lab.finish(folder, *by_time)
    flags = (*by_time, "--config.log_every=2")
    folder = lab.folder()
    ended = [lab.end(p) for p in together(lab, folder, *flags)]
    assert all(e.code == 0 for e in ended), [e.log[-1500:] for e in ended]
    assert rows(folder)[-1]["step"] == 24


@row("P18", "SIGKILL while a pretrained pipeline is tuned on eight devices: as P1", long=True)
def p18(lab):
    for config, strategy in (("finetune", "fsdp"), ("finetune_lora", "zero1")):
        options = dict(config=f"configs/{config}.py:debug", devices=8)
        flags = ("--config.log_every=1", "--config.save_every=2", f"--config.strategy={strategy}")
        oracle, folder = lab.folder(), lab.folder()
        assert lab.run(oracle, *flags, **options).code == 0
        for point in ("step.before:3=kill", "save.started:4=kill"):
            ended = lab.run(folder, *flags, failpoint=point, **options)
            assert ended.code == -signal.SIGKILL, ended.log[-2000:]
        assert steps(folder), "nothing was saved"
        ended = lab.run(folder, *flags, **options)
        assert ended.code == 0, ended.log[-2000:]
        assert f"resuming {folder} after" in ended.log
        assert_same(folder, oracle)


@row("P6", "SIGTERM, then SIGKILL before the save ends: as a kill", long=True)
def p6(lab):
    folder = lab.folder()
    process = lab.start(folder, failpoint="manifest.before:2=sleep600")
    lab.wait_for(process, "step 10/")
    process.send_signal(signal.SIGTERM)
    time.sleep(0.2)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert steps(folder) == [4]
    lab.finish(folder)


@row("P7", "two SIGTERMs, Ctrl-C, Ctrl-C twice while saving: what was saved stays sound", long=True)
def p7(lab):
    for signals in ((signal.SIGTERM,) * 2, (signal.SIGINT,), (signal.SIGINT,) * 2):
        folder = lab.folder()
        process = lab.start(folder, failpoint="step.before:7=sleep1")
        lab.wait_for(process, "step 6/")
        for number in signals:
            process.send_signal(number)
            time.sleep(0.2)
        ended = lab.end(process)
        assert_error(ended, 75)
        lab.finish(folder)


def port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def together(lab, folder, *flags, count=2, failpoints=None, devices=1, heartbeat=10, address=None):
    """Starts that many processes as one program."""
    address = address or f"127.0.0.1:{port()}"
    common = (f"--coordinator={address}", f"--num_processes={count}", *flags)
    common += (f"--heartbeat_timeout={heartbeat}", "--join_timeout=60")
    failpoints = failpoints or {}
    return [
        lab.start(
            folder, *common, f"--process_id={i}", devices=devices, failpoint=failpoints.get(i, "")
        )
        for i in range(count)
    ]


def traced(folder):
    """step -> records of all processes, in the order of the slots; each step seen once or alike."""
    found = {}
    for path in sorted(folder.glob("trace.*.jsonl")):
        for line in path.read_text().splitlines():
            entry = json.loads(line)
            key = (entry["step"], entry["first_slot"])
            assert found.setdefault(key, entry["records"]) == entry["records"]
    merged = {}
    for (n, _), records in sorted(found.items()):
        merged.setdefault(n, []).extend(records)
    return merged


@row("T2", "1 process, 2, 4, then 1: every example exactly once and in its place", long=True)
def t2(lab):
    folder, marks = lab.folder(), (6, 12, 18, 24)
    trace = {"T2I_TRACE": "1"}
    os.environ |= trace
    try:
        for count, stop in zip((1, 2, 4, 1), marks, strict=True):
            flags = (f"--config.steps={stop}",)
            if count == 1:
                ended = [lab.run(folder, *flags)]
            else:
                ended = [lab.end(p) for p in together(lab, folder, *flags, count=count)]
            assert all(e.code == 0 for e in ended), [e.log[-1500:] for e in ended]
        alone = lab.folder()
        assert lab.run(alone).code == 0
    finally:
        del os.environ["T2I_TRACE"]
    assert traced(folder) == traced(alone)
    seen = [r for n in sorted(traced(alone)) for r in traced(alone)[n]]
    for epoch in range(len(seen) // 64):
        assert sorted(seen[epoch * 64 : epoch * 64 + 64]) == list(range(64))
    ours, theirs = rows(folder), rows(alone)
    assert [r["step"] for r in ours] == [r["step"] for r in theirs]
    worst = max(
        abs(a["model/loss"] / b["model/loss"] - 1) for a, b in zip(ours, theirs, strict=True)
    )
    assert worst < 1e-3, worst
    return f"{len(seen)} positions, losses within {worst:.0e}"


@row("P5", "SIGTERM to one of two processes: both save the same step and exit 75", long=True)
def p5(lab):
    folder = lab.folder()
    processes = together(lab, folder, "--config.steps=2000", "--config.save_every=1000")
    lab.wait_for(processes[0], "step 20/")
    processes[1].send_signal(signal.SIGTERM)
    ended = [lab.end(p) for p in processes]
    for e in ended:
        assert_error(e, 75)
    (kept,) = steps(folder)
    assert rows(folder)[-1]["step"] == kept


@row("P8", "a process dies: the others stop within the heartbeat and name it", long=True)
def p8(lab):
    for victim in (1, 0):
        folder = lab.folder()
        flags = ("--config.steps=4000", "--config.save_every=10")
        processes = together(lab, folder, *flags, heartbeat=5)
        lab.wait_for(processes[0], "step 30/")
        processes[victim].send_signal(signal.SIGKILL)
        processes[victim].wait()
        since = time.monotonic()
        ended = lab.end(processes[1 - victim], limit=60)
        took = time.monotonic() - since
        assert ended.code not in (0, None)
        assert took < 5 + 30, took
        assert_error(ended, 70, f"process {victim} died or cannot be reached")
        kept = steps(folder)[-1]
        again = [
            lab.end(p)
            for p in together(lab, folder, f"--config.steps={kept + 5}", "--config.save_every=10")
        ]
        assert all(e.code == 0 for e in again), again[0].log[-2000:]
        assert f"after {kept} steps" in again[0].log


@row(
    "P9", "a process that hangs: the others do not wait for ever, and say in which phase", long=True
)
def p9(lab):
    for victim in (1, 0):
        processes = together(lab, lab.folder(), "--config.steps=4000", heartbeat=8)
        lab.wait_for(processes[0], "step 20/")
        processes[victim].send_signal(signal.SIGSTOP)
        ended = lab.end(processes[1 - victim], limit=60)
        processes[victim].send_signal(signal.SIGKILL)
        processes[victim].wait()
        assert_error(ended, 70, f"process {victim} gave no sign of life for 8 s")
    slow = lab.start(
        lab.folder(), failpoint="restore.before:1=sleep600", env={"T2I_PHASE_SECONDS": "30"}
    )
    ended = lab.end(slow, limit=90)
    assert ended.code == 70
    assert "restore did not end in 30 s" in ended.log


@row("P11", "a coordinator's port taken, processes missing: an error within the limit", long=True)
def p11(lab):
    flags = ("--num_processes=2", "--join_timeout=10", "--heartbeat_timeout=10")
    address = f"127.0.0.1:{port()}"
    for number in (0, 1):  # the other one never comes
        one = lab.start(lab.folder(), f"--coordinator={address}", f"--process_id={number}", *flags)
        assert_error(lab.end(one, limit=60), 78, f"process {number} of 2 at {address}")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        first = lab.start(lab.folder(), f"--coordinator={address}", "--process_id=0", *flags)
        assert_error(lab.end(first, limit=60), 78, "cannot listen on port", address)


@row(
    "T1",
    "8 devices → 4 → 2 → 1 → 8 over pmap, data, zero1, fsdp: the same state, data and losses",
    long=True,
)
def t1(lab):
    path = ((8, "fsdp"), (4, "zero1"), (2, "pmap"), (1, "data"), (8, "fsdp"))
    path = path if lab.long else ((8, "fsdp"), (2, "pmap"), (8, "zero1"))
    folder, kept = lab.folder(), None
    for i, (devices, strategy) in enumerate(path):
        flags = (f"--config.strategy={strategy}", f"--config.steps={4 * (i + 1)}")
        ended = lab.run(folder, *flags, "--config.keep=9", devices=devices)
        assert ended.code == 0, ended.log[-2000:]
        if kept:
            assert f"resuming {folder} after {4 * i} steps" in ended.log  # fingerprints agreed
        kept = prints(folder, 4 * (i + 1))
    ours, theirs = rows(folder), rows(lab.oracle)[: 4 * len(path)]
    first = abs(ours[0]["model/loss"] / theirs[0]["model/loss"] - 1)
    worst = max(
        abs(a["model/loss"] / b["model/loss"] - 1) for a, b in zip(ours, theirs, strict=True)
    )
    assert first <= 1e-6, first
    assert worst <= 1e-4, worst
    return f"losses within {first:.0e} at first, {worst:.0e} in the end"


@row("N1", "a number that is not finite on one device: the step is dropped on all alike", long=True)
def n1(lab):
    folder = lab.folder()
    ended = lab.run(
        folder,
        "--config.keep=9",
        "--config.save_every=1",
        "--config.steps=8",
        devices=2,
        failpoint="batch.nan:5=on",
    )
    assert ended.code == 0, ended.log[-2000:]
    drop = lambda n: {k: v for k, v in prints(folder, n).items() if k != "opt/skipped"}
    assert drop(5) == drop(4)
    assert drop(6) != drop(5)
    assert [r["skipped"] for r in rows(folder)] == [
        0,
        0,
        0,
        0,
        1,
        0,
        0,
        0,
    ]  # N4: the next is applied
    assert [r["step"] for r in rows(folder)] == list(range(1, 9))


@row(
    "N2",
    "ten such steps in a row end the run: exit 76, which names the step and the records",
    long=True,
)
def n2(lab):
    folder = lab.folder()
    ended = lab.run(folder, failpoint="batch.nan:6-30=on")
    assert_error(ended, 76, "step 15", "records", "model/params/")
    found = json.loads((folder / "nonfinite.json").read_text())
    assert found["step"] == 15
    assert len(found["records"]) == 8
    assert lab.run(folder).code == 0  # goes on with what is healthy
    assert [r["step"] for r in rows(folder)] == list(range(1, 25))


@row("N4", "after a dropped step the next one counts as ever, and the schedule goes on", long=True)
def n4(lab):
    folder = lab.folder()
    assert lab.run(folder, failpoint="batch.nan:3=on").code == 0
    ours, theirs = rows(folder), rows(lab.oracle)
    assert ours[:2] == theirs[:2]
    assert ours[2]["skipped"] == 1
    assert all(r["skipped"] == 0 for r in ours[3:])
    rate = lambda table: [r["model/learning_rate"] for r in table]
    assert rate(ours) == rate(theirs)


@row("N6", "a run that diverges before its first save never begins again by itself", long=True)
def n6(lab):
    folder = lab.folder()
    flags = ("--config.rollbacks=1", "--config.watch={'model/loss': 1e-9}", "--config.steps=40")
    ended = lab.run(folder, *flags)
    assert_error(ended, 76, "model/loss is", "above 1e-09")
    kept = steps(folder)
    assert kept, "the checkpoints were set aside"
    again = lab.run(folder, *flags)
    assert f"after {kept[-1]} steps" in again.log
    assert_error(again, 76)
    assert steps(folder)[0] >= kept[0]
    for n in steps(folder):  # as versions before set them aside
        (folder / "checkpoints" / str(n)).rename(folder / "checkpoints" / f"{n}.diverged")
    assert_error(lab.run(folder, *flags), 65, "set aside", "--restart_from_scratch")


@row("N7", "after exit 76 the message says what is finite, and where to go on from", long=True)
def n7(lab):
    folder = lab.folder()
    ended = lab.run(folder, failpoint="batch.nan:9-40=on")
    assert_error(ended, 76, "hold finite values", "config.rollbacks")
    ended = lab.run(folder, "--config.rollbacks=1", "--config.steps=30")
    assert ended.code == 0, ended.log[-2000:]
    assert [r["step"] for r in rows(folder)] == list(range(1, 31))


@row("B1", "after any number of kills metrics have exactly one row a step", long=True)
def b1(lab):
    folder = lab.folder()
    for point in ("step.before:7=kill", "step.before:12=kill", "save.started:16=kill"):
        assert lab.run(folder, failpoint=point).code == -signal.SIGKILL
    ended = lab.finish(folder)
    assert [r["step"] for r in rows(folder)] == list(range(1, 25))
    assert ended.code == 0


@row("B2", "half a line of metrics, left by a kill, is dropped on resume", long=True)
def b2(lab):
    folder = lab.folder()
    assert lab.run(folder, failpoint="step.before:11=kill").code == -signal.SIGKILL
    with (folder / "metrics.jsonl").open("a") as f:
        f.write('{"step": 11, "model/lo')
    lab.finish(folder)
    assert_same(folder, lab.oracle)
