"""Draws pictures.

python sample.py --checkpoint=builtin:shapes --prompt="a red circle on a white background"
"""

import functools
import math
import pathlib

from absl import flags, logging

from t2i_jax import errors
from t2i_jax.commands import cli

MODEL = cli.model_flags()
PROMPT = flags.DEFINE_multi_string("prompt", [], "What to draw; repeatable.")
PROMPTS_FILE = flags.DEFINE_string("prompts_file", None, "Prompts, one a line, or JSONL.")
NEGATIVE_PROMPT = flags.DEFINE_string("negative_prompt", None, "What to be guided away from.")
NUM_IMAGES = flags.DEFINE_integer("num_images", 1, "Pictures per prompt.")
BATCH_SIZE = flags.DEFINE_integer("batch_size", 16, "Pictures drawn together.", lower_bound=1)
SEED = flags.DEFINE_integer("seed", 0, "Same seed, same pictures, whatever the batch size.")
OUTPUT_DIR = flags.DEFINE_string("output_dir", "out", "Where pictures go; nothing is overwritten.")
GRID = flags.DEFINE_bool("grid", False, "Also all pictures as one, a row for each prompt.")
FORMAT = flags.DEFINE_enum("format", "png", ["png", "jpg", "webp"], "File format.")
METADATA = flags.DEFINE_bool("metadata", True, "Write prompt and settings into the files.")
STRICT = flags.DEFINE_bool("strict", False, "Fail where a prompt is longer than the model reads.")
PREDICT = flags.DEFINE_string("predict", "sample", "What the model makes; --help lists it.")
IMAGE = flags.DEFINE_multi_string(
    "image", [], "What a prediction starts from: one picture for all prompts, or one for each."
)
SET = flags.DEFINE_multi_string("set", [], "name=value: any option of the prediction; repeatable.")
LORA = flags.DEFINE_multi_string(
    "lora", [], "A file of adapters for a pretrained pipeline, or FILE:weight; repeatable."
)
INT8 = flags.DEFINE_string(
    "int8", "", "Nets whose kernels are kept in eight bits, with commas: model,text,vae."
)
INTERPOLATE = flags.DEFINE_integer(
    "interpolate",
    0,
    "Frames from each picture to the next, as a strip and a WebP; GANs.",
    lower_bound=0,
)
REPRODUCE = flags.DEFINE_string(
    "reproduce", None, "A picture, grid or strip of ours, to be drawn again."
)
LOW_MEMORY = flags.DEFINE_bool(
    "low_memory", False, "Load the networks of a pretrained pipeline in turn, when each is needed."
)
PREVIEW = flags.DEFINE_string(
    "preview", None, "A small autoencoder, DIR or hf:madebyollin/taesd: shows each step in a file."
)
OPTIONS = cli.sampling_flags()


def main():
    from t2i_jax import images
    from t2i_jax.commands import prompts

    _check_together()
    default = prompts.Request(
        prompt="",
        seed=SEED.value,
        count=NUM_IMAGES.value,
        negative_prompt=NEGATIVE_PROMPT.value,
        options=tuple(sorted(cli.settings(SET, OPTIONS).items())),
        prediction=PREDICT.value,
    )
    sources, adapters = [prompts.read_image(path) for path in IMAGE.value], _adapters()
    step, default_model, hint = MODEL["step"].value, None, ""
    grid, frames = GRID.value, INTERPOLATE.value
    asked = [default._replace(prompt=p) for p in PROMPT.value]
    wanted = [prompts.check(request) for request in asked]
    if PROMPTS_FILE.value:
        wanted += prompts.read_file(PROMPTS_FILE.value, default)
    if REPRODUCE.value:
        recorded = prompts.from_picture(REPRODUCE.value)
        step = recorded.step if step is None else step
        # Only a built-in name is a place. Of a run a picture records the folder's name alone.
        default_model = recorded.model if recorded.model.startswith("builtin:") else None
        hint = f"; the picture was drawn with {recorded.model}"
        wanted, grid, frames = recorded.requests, grid or recorded.grid, recorded.frames
        wanted = prompts.again(wanted, sources)
    elif sources:
        wanted = prompts.starting_from(wanted or [default] * len(sources), sources)
    if not wanted:
        raise errors.misused("nothing to draw", 'add --prompt="…" or --prompts_file=…')
    # This look makes nothing: a model that does not load must leave no empty folder.
    images.check_folder(OUTPUT_DIR.value, "--output_dir")
    source = cli.model(MODEL, default=default_model, hint=hint)
    from t2i_jax import pipeline  # brings JAX: bad flags should not wait for it

    int8 = recorded.int8 if REPRODUCE.value else INT8.value
    options = {**cli.opened(MODEL), "step": step, "lora": adapters, "int8": int8}
    options |= {"low_memory": LOW_MEMORY.value, "preview": PREVIEW.value}
    pipe = pipeline.Pipeline.load(source, **options)
    if REPRODUCE.value:
        prompts.check_model(recorded, pipe)
    if frames:
        prompts.check_way(pipe)
        wanted = [r._replace(prediction="between") for r in wanted]
    prompts.check_options(pipe, wanted)
    images.make_folder(OUTPUT_DIR.value, "--output_dir")
    if frames:
        drawn, settings = prompts.draw_between(pipe, wanted, frames)
        options = dict(metadata=METADATA.value)
        paths = prompts.save_between(drawn, settings, OUTPUT_DIR.value, **options)
    else:
        options = dict(strict=STRICT.value, callback=_previews() if PREVIEW.value else None)
        drawn = prompts.draw(pipe, wanted, batch_size=BATCH_SIZE.value, **options)
        options = dict(grid=grid, metadata=METADATA.value, extension=FORMAT.value)
        paths = prompts.save(drawn, OUTPUT_DIR.value, **options)
    for path in paths:
        print(path)
    for result, _ in () if frames else drawn:
        if isinstance(result, str):
            print(result)


def _adapters() -> dict[str, float]:
    """File -> weight, of --lora. Raises ConfigError for a file twice, or a weight of no size."""
    found = {}
    for text in LORA.value:
        name, _, weight = text.rpartition(":")
        try:
            name, weight = (name, float(weight)) if name else (text, 1.0)
        except ValueError:
            name, weight = text, 1.0  # the colon belongs to the name
        where = f"--lora={text}"
        if name in found:
            raise errors.ConfigError(f"{name} is named twice", where=where, fix="give it once")
        if not math.isfinite(weight):
            raise errors.ConfigError(
                f"its weight is {weight}", where=where, fix="give a finite number"
            )
        found[name] = weight
    return found


def _previews():
    """A callback that writes what the pictures would be after each step into one file."""
    from t2i_jax import images

    @functools.cache
    def path():
        claimed = images.claim(pathlib.Path(OUTPUT_DIR.value), "preview.png")
        logging.info("previews: %s", claimed)
        return claimed

    def write(step, image_BHWC):
        with images.writing(OUTPUT_DIR.value, "--output_dir"):
            images.save(path(), images.grid(image_BHWC))

    return write


def predictions() -> str:
    """What the model that the flags name predicts: names, and options with their defaults."""
    if not (MODEL["workdir"].value or MODEL["checkpoint"].value):
        return "With --checkpoint or --workdir, --help lists what that model predicts."
    from t2i_jax import pipeline, weights
    from t2i_jax.commands import prompts

    source = cli.model(MODEL)
    # The config says it all, so no weights are read for a help text.
    predictor = pipeline.Predictor(weights.config_at(source))
    lines = [f"predictions of {source}:"]
    for name, fn in predictor.objective.predict.items():
        if predictor.draws(name):
            about, options = prompts.described(fn)
            lines.append(f"  --predict={name}  {about}")
            defaults = predictor.check(name)
            lines += [f"    --set {k}={defaults[k]}  {text}" for k, text in options.items()]
    return "\n".join(line.rstrip() for line in lines)  # an option may have no text


def _check_together() -> None:
    """Options that another one makes void are errors, as nothing is ignored in silence."""
    asked = (PROMPT, PROMPTS_FILE, NEGATIVE_PROMPT, NUM_IMAGES, SEED, INTERPOLATE)
    for main_flag, void in (
        (INTERPOLATE, (GRID, FORMAT, STRICT, BATCH_SIZE, PREDICT, IMAGE, PREVIEW)),
        (REPRODUCE, (*asked, PREDICT, SET, INT8, *OPTIONS.values())),
    ):
        # `present` and not the value: a default was asked for by nobody.
        given = [f"--{flag.name}" for flag in void if flag.present]
        if main_flag.value and given:
            raise errors.misused(
                f"{', '.join(given)} beside --{main_flag.name}", f"leave out {', '.join(given)}"
            )


if __name__ == "__main__":
    cli.run(main, more_help=predictions)
