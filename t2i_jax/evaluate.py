"""Judges a model.   python -m t2i_jax.evaluate --checkpoint=builtin:shapes --evaluators=shapes"""

import json
import time

from absl import flags

from t2i_jax import cli

MODEL = cli.model_flags()
EVALUATORS = flags.DEFINE_list("evaluators", ["shapes"], "Files of t2i_jax/evaluators.")
NUM_IMAGES = flags.DEFINE_integer("num_images", 512, "Pictures to draw and judge.", lower_bound=1)
BATCH_SIZE = flags.DEFINE_integer("batch_size", 64, "Pictures drawn together.", lower_bound=1)
SEED = flags.DEFINE_integer("seed", 0, "Of prompts and noise.", lower_bound=0)
OPTIONS = cli.sampling_flags()


def main():
    source = cli.model(MODEL)
    from t2i_jax import pipeline  # brings JAX: bad flags should not wait for it

    pipe = pipeline.Pipeline.load(source, step=MODEL["step"].value)
    options = cli.given(OPTIONS)
    result = {"model": source, "step": pipe.step, **pipe.predictor.check("sample", **options)}
    for name in EVALUATORS.value:
        started = time.perf_counter()
        found = pipe.evaluate(
            name,
            num_images=NUM_IMAGES.value,
            batch_size=BATCH_SIZE.value,
            seed=SEED.value,
            sample=options,
        )
        result |= {f"{name}/{k}": v for k, v in found.items()}
        result[f"{name}/seconds"] = round(time.perf_counter() - started, 1)
    print(json.dumps(result))


if __name__ == "__main__":
    cli.run(main)
