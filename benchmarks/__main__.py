"""Whether every benchmark still runs.   python -m benchmarks

Runs `--check` of every module of this folder that is no library, two at a time, so that one that
does not know it fails. They share compiled programs.
"""

import concurrent.futures
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time

LIBRARIES = {"__init__", "__main__", "cases", "harness", "peers"}
LIMIT = 900  # seconds of one on a crowded machine; a quiet one needs a tenth


def names(folder: pathlib.Path) -> list[str]:
    return sorted({path.stem for path in folder.glob("*.py")} - LIBRARIES)


def check(name: str, folder: pathlib.Path, env: dict) -> str:
    """Runs a benchmark's check.   -> what is wrong, or nothing"""
    module = f"{folder.name}.{name}"
    try:
        done = subprocess.run(
            [sys.executable, "-m", module, "--check"],
            cwd=folder.parent,
            env=env,
            timeout=LIMIT,
            stdout=subprocess.PIPE,
            text=True,
        )
    except subprocess.TimeoutExpired:
        return f"has not ended after {LIMIT} s"
    print(done.stdout, end="", flush=True)
    if done.returncode:
        return f"ended with {done.returncode}"
    end = json.dumps({"checked": module})
    return "" if done.stdout.endswith(end + "\n") else "does not know --check: see harness.main"


def main() -> None:
    folder, failed = pathlib.Path(__file__).parent, {}
    with tempfile.TemporaryDirectory() as compiled:
        env = {"JAX_COMPILATION_CACHE_DIR": compiled, "TF_CPP_MIN_LOG_LEVEL": "3", **os.environ}

        def one(name):
            started = time.perf_counter()
            if wrong := check(name, folder, env):
                failed[name] = wrong
            print(f"{name}: {wrong or 'sound'}, {time.perf_counter() - started:.0f} s", flush=True)

        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            list(pool.map(one, names(folder)))
    if failed:
        raise SystemExit("\n".join(f"benchmarks.{name} {wrong}" for name, wrong in failed.items()))


if __name__ == "__main__":
    main()
