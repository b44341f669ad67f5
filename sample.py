"""Draws pictures.

python sample.py --checkpoint=builtin:shapes --prompt="a red circle on a white background"
"""

import runpy

if __name__ == "__main__":
    runpy.run_module("t2i_jax.commands.sample", run_name="__main__", alter_sys=True)
