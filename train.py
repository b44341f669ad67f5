"""Trains a model.   python train.py --config=configs/shapes_flow.py --workdir=runs/flow"""

import runpy

if __name__ == "__main__":
    runpy.run_module("t2i_jax.commands.train", run_name="__main__", alter_sys=True)
