"""Several processes as one program, each for real."""

import json
import signal
import subprocess
import sys

import pytest

from tests.faults.lab import ROOT
from tests.faults.process import port

PROGRAM = """
import functools, os, sys, time
import jax
from t2i_jax.commands import cli
from t2i_jax.run import distributed

jax.distributed.initialize = functools.partial(
    jax.distributed.initialize, shutdown_timeout_seconds=1
)
number, first = int(sys.argv[1]), sys.argv[3]


def main():
    distributed.start(
        coordinator=sys.argv[2], num_processes=2, process_id=number, heartbeat_timeout=3
    )
    if number == 0:
        time.sleep(4)
    if number == 0 and first == "dies":
        os._exit(9)
    distributed.wait_for_first()


cli.run(main, argv=["program"])
"""


def ended(first: str):
    """Exit codes and logs of two processes, of which the first works for longer or dies."""
    command = [sys.executable, "-c", PROGRAM]
    rest = [f"127.0.0.1:{port()}", first]
    processes = [
        subprocess.Popen([*command, str(i), *rest], cwd=ROOT, stderr=subprocess.PIPE, text=True)
        for i in range(2)
    ]
    logs = [process.communicate(timeout=120)[1] for process in processes]
    return [(p.returncode, log) for p, log in zip(processes, logs, strict=True)]


def test_all_wait_at_the_end_for_what_the_first_does_alone():
    """For longer than JAX's own barrier at the exit would."""
    assert [code for code, _ in ended("works")] == [0, 0]


def test_who_waits_for_the_first_hears_that_it_died():
    (first, _), (second, log) = ended("dies")
    assert first == 9
    assert second in (70, -signal.SIGABRT)  # JAX may be faster to abort than we to say it
    assert second != 70 or "process 0 died or cannot be reached" in log


HANGS = """
import concurrent.futures, threading
from t2i_jax.run import distributed

distributed.LEAVING = 1
concurrent.futures.ThreadPoolExecutor(1).submit(threading.Event().wait)
distributed.leave(75)
"""


def test_a_thread_that_hangs_keeps_no_process_that_has_saved():
    """Python waits at its end for the threads of pools, whatever they do."""
    done = subprocess.run([sys.executable, "-c", HANGS], cwd=ROOT, timeout=60)
    assert done.returncode == 75


PLACES = """
import json, sys
import jax, numpy as np
from t2i_jax import sharding
from t2i_jax.data import loader
from tests.test_loader import Source, make

number = int(sys.argv[1])
jax.config.update("jax_num_cpu_devices", int(sys.argv[4]))
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(sys.argv[2], 2, number)
layout = sharding.Layout(json.loads(sys.argv[3]))
batch = make(Source(64), batch_size=8, share=layout.share).batch(0)
placed = layout.place({"index": batch.arrays["index"]})["index"]
print(json.dumps([placed.shape[0], int(jax.jit(lambda x: x.sum())(placed))]))
"""


@pytest.mark.parametrize(
    ("axes", "devices"),
    [({"data": 2}, 1), ({"data": -1, "tensor": 2}, 1), ({"tensor": 2, "data": -1}, 2)],
)
def test_a_tensor_axis_may_join_processes(axes, devices):
    """Those that it joins load the same examples, and all together the whole batch."""
    rest = [f"127.0.0.1:{port()}", json.dumps(axes), str(devices)]
    command = [sys.executable, "-c", PLACES]
    processes = [
        subprocess.Popen([*command, str(i), *rest], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        for i in range(2)
    ]
    found = [json.loads(p.communicate(timeout=120)[0].splitlines()[-1]) for p in processes]
    assert found == [[8, sum(range(8))]] * 2


BEGINS = """
import sys
import jax
from t2i_jax import loop
from tests import runs

jax.config.update("jax_num_cpu_devices", 2)
first, second = sys.argv[1:]
loop.train(runs.small(steps=1), first)
loop.train(runs.small(steps=1, init_from=first, strategy="fsdp"), second)
"""


@pytest.mark.slow
def test_a_run_on_several_devices_may_begin_with_another(tmp_path):
    command = [sys.executable, "-c", BEGINS, str(tmp_path / "a"), str(tmp_path / "b")]
    subprocess.run(command, cwd=ROOT, check=True, timeout=300)
    assert (tmp_path / "b" / "checkpoints" / "1").is_dir()
