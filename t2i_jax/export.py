"""Exports a run.   python -m t2i_jax.export --workdir=runs/flow --output=models/flow"""

import pathlib

from absl import flags

from t2i_jax import cli

WORKDIR = flags.DEFINE_string("workdir", None, "A run of train.py.")
STEP = flags.DEFINE_integer("step", None, "Its checkpoint; the newest by default.")
OUTPUT = flags.DEFINE_string("output", None, "A new folder.")
CARD = flags.DEFINE_string("card", None, "A Markdown file to go with the weights.")
DTYPE = flags.DEFINE_enum("dtype", "float16", ["float16", "float32"], "Type of the stored weights.")


def main():
    from t2i_jax import errors, pipeline, weights

    output = pathlib.Path(OUTPUT.value)
    if output.exists() and any(output.iterdir()):
        raise errors.ConfigError("the folder is not empty", where=str(output), fix="name a new one")
    pipe = pipeline.Pipeline.load(WORKDIR.value, step=STEP.value)
    card = pathlib.Path(CARD.value).read_text() if CARD.value else "# A model made with t2i_jax\n"
    trained = {name: pipe.nets[name] for name in pipe.predictor.objective.trained}
    weights.export(output, trained, pipe.config, card=card, dtype=DTYPE.value)
    print(output)


if __name__ == "__main__":
    cli.run(main, required=("workdir", "output"))
