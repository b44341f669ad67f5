"""Draws pictures.

python sample.py --checkpoint=builtin:shapes --prompt="a red circle on a white background"
"""

from absl import flags

from t2i_jax import cli

WORKDIR = flags.DEFINE_string("workdir", None, "A run of train.py.")
CHECKPOINT = flags.DEFINE_string(
    "checkpoint", None, "builtin:<name> or an exported model's folder."
)
STEP = flags.DEFINE_integer("step", None, "A run's checkpoint; the newest by default.")
PROMPT = flags.DEFINE_multi_string("prompt", [], "What to draw; repeatable.")
PROMPTS_FILE = flags.DEFINE_string("prompts_file", None, "Prompts, one a line, or JSONL.")
NEGATIVE_PROMPT = flags.DEFINE_string("negative_prompt", None, "What to be guided away from.")
NUM_IMAGES = flags.DEFINE_integer("num_images", 1, "Pictures per prompt.")
BATCH_SIZE = flags.DEFINE_integer("batch_size", 16, "Pictures drawn together.", lower_bound=1)
SEED = flags.DEFINE_integer("seed", 0, "Same seed, same pictures, whatever the batch size.")
OUTPUT_DIR = flags.DEFINE_string("output_dir", "out", "Where pictures go; nothing is overwritten.")
GRID = flags.DEFINE_bool("grid", False, "Also write all pictures as one.")
FORMAT = flags.DEFINE_enum("format", "png", ["png", "jpg", "webp"], "File format.")
METADATA = flags.DEFINE_bool("metadata", True, "Write prompt and settings into PNG files.")
STRICT = flags.DEFINE_bool("strict", False, "Fail where a prompt is longer than the model reads.")
REPRODUCE = flags.DEFINE_string("reproduce", None, "A PNG of ours, to be drawn again.")
OPTIONS = cli.sampling_flags()


def main():
    from t2i_jax import errors, requests

    default = requests.Request(
        prompt="",
        seed=SEED.value,
        count=NUM_IMAGES.value,
        negative_prompt=NEGATIVE_PROMPT.value,
        options=tuple(sorted(cli.given(OPTIONS).items())),
    )
    if WORKDIR.value and CHECKPOINT.value:
        raise errors.ConfigError(
            "two models", where="the command line", fix="give --workdir or --checkpoint, not both"
        )
    source = WORKDIR.value or CHECKPOINT.value
    step = STEP.value
    wanted = [requests.check(default._replace(prompt=p), "--prompt") for p in PROMPT.value]
    if PROMPTS_FILE.value:
        wanted += requests.read_file(PROMPTS_FILE.value, default)
    if REPRODUCE.value:
        request, model, drawn_at = requests.from_picture(REPRODUCE.value)
        step = drawn_at if step is None else step
        source = source or (model if model.startswith("builtin:") else None)
        wanted.append(request)
    if not wanted:
        raise errors.ConfigError(
            "nothing to draw", where="the command line", fix='add --prompt="…" or --prompts_file=…'
        )
    if not source:
        raise errors.ConfigError(
            "no model",
            where="the command line",
            fix="add --workdir=… or --checkpoint=builtin:shapes"
            + (f"; the picture was drawn with {model}" if REPRODUCE.value else ""),
        )
    from t2i_jax import pipeline  # brings JAX: bad flags should not wait for it

    pipe = pipeline.Pipeline.load(source, step=step)
    drawn = requests.draw(pipe, wanted, batch_size=BATCH_SIZE.value, strict=STRICT.value)
    for path in requests.save(
        drawn,
        OUTPUT_DIR.value,
        grid=GRID.value,
        metadata=METADATA.value,
        extension=FORMAT.value,
    ):
        print(path)


if __name__ == "__main__":
    cli.run(main)
