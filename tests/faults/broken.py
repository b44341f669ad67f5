"""Breaks each guarantee once, in a copy, and wants its row to fail.   python -m tests.faults.broken

A row that survives a break proves nothing about what it promises. Numbers of breaks choose some.
"""

import os
import pathlib
import shutil
import signal
import subprocess
import sys
import tempfile
from typing import NamedTuple

ROOT = pathlib.Path(__file__).parent.parent.parent
LIMIT = 1800  # seconds of a row: one that does not end has seen its break, too
COPIED = ("t2i_jax", "configs", "tests", "train.py", "sample.py", "setup.py", "pyproject.toml")


class Break(NamedTuple):
    """A line of the package made wrong, and the row that has to see it."""

    row: str
    file: str
    right: str
    wrong: str


BREAKS = (
    # G1: what a resumed run needs is restored.
    Break("P4", "loop.py", "iterate(start, config.steps)", "iterate(0, config.steps)"),
    Break(
        "P4",
        "run/checkpoint.py",
        'opt, skipped = items["opt"]["opt"],',
        'opt, skipped = jax.tree.map(jnp.zeros_like, items["opt"]["opt"]),',
    ),
    Break("P4", "run/checkpoint.py", "jnp.int32(step), target", "jnp.int32(step - 1), target"),
    Break("B1", "run/metrics.py", 'kept = row["step"] <= start', "kept = True"),
    # G2, G3: examples and noise belong to a slot of the global batch.
    Break("T2", "data/loader.py", "int(step) * self._batch_size + slot", "int(step) * 4 + slot"),
    Break(
        "T2", "data/loader.py", "np.array(self._slots, np.int32)", "np.arange(b, dtype=np.int32)"
    ),
    Break("T1", "step.py", "return jax.lax.psum(sums, axes), ", "return sums, "),
    # G4: damage is found, and nothing starts over by itself.
    Break("C6", "run/checkpoint.py", "if prints[name] != arrays[name]]", "if False]"),
    Break("C5", "run/checkpoint.py", "reason = _difference(folder, step, manifest)", 'reason = ""'),
    Break("C13", "run/fingerprint.py", "else _mixed\n", "else _weighted\n"),
    Break(
        "C15",
        "run/checkpoint.py",
        "restored, format=manifest",
        "restored, format=FORMAT or manifest",
    ),
    Break("C8", "run/checkpoint.py", "        if reasons:\n", "        if False:\n"),
    Break("C9", "run/checkpoint.py", ">= ATTEMPTS:", ">= 99:"),
    Break("C10", "run/checkpoint.py", "p.name.isdecimal() and not p.is_symlink()", "True"),
    Break("T7", "run/checkpoint.py", "if wanted != saved:", "if False:"),
    Break("T5", "run/rundir.py", "    if differences:\n", "    if False:\n"),
    # G5: what is not finite reaches neither weights nor disk.
    Break("N1", "step.py", "jnp.where(finite, a, b)", "a"),
    Break("N2", "run/health.py", "if self._skips.over(row):", "if False:"),
    Break("N6", "run/health.py", "if not distributed.as_first(older):", "if False:"),
    Break("N7", "errors.py", "the checkpoints hold finite values", "the last checkpoint is sound"),
    Break("N3", "run/checkpoint.py", "        if bad:\n", "        if False:\n"),
    # G6: a signal is heard in every phase.
    Break("P4", "run/interrupt.py", "return bool(self.requested)", "return False"),
    Break("P5", "run/interrupt.py", "multihost_utils.reached_preemption_sync_point(n)", "False"),
    Break("P13", "run/interrupt.py", "training is None or training.idle", "False"),
    Break(
        "P14",
        "run/interrupt.py",
        "self._at_once = self._at_once, self._alone",
        "self._at_once = False, False",
    ),
    # G7: nothing waits for ever.
    Break("P9", "run/watchdog.py", "if time.monotonic() > deadline:", "if False:"),
    Break("P9", "run/distributed.py", "    _watch_others(heartbeat_timeout)\n", ""),
    Break("P17", "run/distributed.py", "if shared.client is None:\n        return", "return"),
    Break("P15", "loop.py", 'with watchdog.phase("reading data"), ', "with "),
    Break("P16", "loop.py", " or self._late(n, since)", ""),
    Break("B5", "run/metrics.py", "            self._told = True\n", ""),
    Break("B6", "errors.py", "if e.errno not in OF_DISKS:", "if True:"),
    # G8: one writer, who looks before each commit whether it still is.
    Break("C11", "run/owner.py", "if holder is None or self._dead(holder) or", "if True or"),
    Break(
        "C11",
        "run/owner.py",
        'holder = self._read()\n        if holder is None or holder["id"] != self._me["id"]:',
        "holder = self._read()\n        if False:",
    ),
    # G10: a broken example costs its slot, and too many the run.
    Break("D1", "data/loader.py", "weight_B = np.zeros(b", "weight_B = np.ones(b"),
    Break("D7", "data/loader.py", "(broken == n or broken > max(", "(0 > max("),
    Break("D13", "loop.py", "if self.batches.quarantine[record][:2] == (n, slot):", "if True:"),
    Break("D13", "data/loader.py", 'if hasattr(source, "where")', "if False"),
    Break("D14", "data/folder.py", '== (split == "test")', "or True"),
    # What a stranger's files say takes neither memory nor time nor the network.
    Break("X14", "pretrained/hf.py", "x > limit for x in entries)", "False for x in entries)"),
    Break("X14", "weights.py", "isinstance(value, int | float) and not value <= limit:", "False:"),
    Break("X15", "text/fast.py", "if growth > GROWTH:", "if False:"),
    Break("X16", "pretrained/tensors.py", "not in hf.FLOATS:", "== 'none':"),
    Break("X17", "pretrained/hf.py", "local = allowed is not None and", "local = False and"),
    # G11: errors name the fix.
    Break("C3", "errors.py", "Fix: {fix}", "{fix}"),
)


def made_wrong(break_: Break, root: pathlib.Path = ROOT) -> str:
    """The file's text after the break. Raises ValueError if the right line is not there once."""
    text = (root / "t2i_jax" / break_.file).read_text()
    if text.count(break_.right) != 1:
        raise ValueError(f"{break_.right!r} is not once in {break_.file}")
    return text.replace(break_.right, break_.wrong)


def _tried(row: str, folder: str) -> tuple[bool, str]:
    """Whether a row came to its end in a copy, and what it printed."""
    with subprocess.Popen(
        [sys.executable, "-m", "tests.faults", "--long", row],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": folder},
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            return True, process.communicate(timeout=LIMIT)[0]
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # with all that it has started
            return False, ""


def main(argv) -> int:
    chosen = [int(a) for a in argv] or range(len(BREAKS))
    missed = 0
    for i in chosen:
        break_ = BREAKS[i]
        with tempfile.TemporaryDirectory() as folder:
            for name in COPIED:
                copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
                copy(ROOT / name, pathlib.Path(folder, name))
            pathlib.Path(folder, "t2i_jax", break_.file).write_text(made_wrong(break_))
            ended, said = _tried(break_.row, folder)
        seen = not ended or f"{break_.row:4} FAILED" in said
        missed += not seen
        last = [line for line in said.splitlines() if line and "survived" not in line][-1:]
        print(
            f"{i:2} {break_.row:4} {'seen' if seen else 'MISSED'}  "
            f"{break_.file}: {break_.wrong.strip()!r}  "
            f"{last[0][:100] if seen and last else ''}{'' if ended else f'no end in {LIMIT} s'}",
            flush=True,
        )
    print(f"{len(chosen) - missed}/{len(chosen)} breaks seen")
    return int(bool(missed))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
