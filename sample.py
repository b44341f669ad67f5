"""Draws pictures.

python sample.py --checkpoint=builtin:shapes --prompt="a red circle on a white background"
"""

from absl import flags

from t2i_jax import cli

MODEL = cli.model_flags()
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
INTERPOLATE = flags.DEFINE_integer(
    "interpolate",
    0,
    "Frames from each picture to the next, as a strip and a WebP; GANs.",
    lower_bound=0,
)
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
    step, default_model, hint = MODEL["step"].value, None, ""
    wanted = [requests.check(default._replace(prompt=p), "--prompt") for p in PROMPT.value]
    if PROMPTS_FILE.value:
        wanted += requests.read_file(PROMPTS_FILE.value, default)
    if REPRODUCE.value:
        request, model, drawn_at = requests.from_picture(REPRODUCE.value)
        step = drawn_at if step is None else step
        default_model = model if model.startswith("builtin:") else None
        hint = f"; the picture was drawn with {model}"
        wanted.append(request)
    if not wanted:
        raise errors.ConfigError(
            "nothing to draw", where="the command line", fix='add --prompt="…" or --prompts_file=…'
        )
    source = cli.model(MODEL, default=default_model, hint=hint)
    from t2i_jax import pipeline  # brings JAX: bad flags should not wait for it

    pipe = pipeline.Pipeline.load(source, step=step, load=cli.loads(MODEL["load"]))
    if INTERPOLATE.value:
        drawn = requests.draw_between(pipe, wanted, INTERPOLATE.value)
        for path in requests.save_between(drawn, OUTPUT_DIR.value, INTERPOLATE.value):
            print(path)
        return
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
