"""Evaluates a model, or a folder of images.

python -m t2i_jax evaluate --checkpoint=builtin:shapes --protocol=shapes
python -m t2i_jax evaluate --images=out/theirs --protocol=coco-fid-30k --data=coco/val2014

prints one row, a JSON object with everything that is needed to repeat it. The metrics are also
printed as a table, to standard error. The row is appended to results.jsonl in the --workdir, or to
the file that --output names. --evaluators runs files of t2i_jax/evaluators, such as `shapes` or
`held_out_loss`, with the options of the run's config. --captions=FILE writes the protocol's
captions, for other systems to draw.
"""

import datetime
import inspect
import json
import math
import pathlib
import subprocess
import sys
import time

from absl import flags, logging

from t2i_jax.commands import cli

MODEL = cli.model_flags()
IMAGES = flags.DEFINE_string("images", None, "Pictures of any system, in place of a model.")
PROTOCOL = flags.DEFINE_string("protocol", None, "evaluators/protocols/<name>.json, or a file.")
DATA = flags.DEFINE_string(
    "data", None, "A folder of captioned pictures: a protocol's, or in place of the held-out ones."
)
REFERENCE = flags.DEFINE_string("reference", None, "An .npz with mu and sigma, for fid alone.")
EXTRACTOR = flags.DEFINE_string("extractor", None, "In place of the protocol's.")
CLIP = flags.DEFINE_string("clip", None, "In place of the protocol's: folder or hf:org/name.")
CAPTIONS = flags.DEFINE_string("captions", None, "Write the protocol's captions there, no more.")
OUTPUT = flags.DEFINE_string("output", None, "A .jsonl file for the row.")
EVALUATORS = flags.DEFINE_list("evaluators", [], "Files of t2i_jax/evaluators; without --protocol.")
NUM_IMAGES = flags.DEFINE_integer("num_images", None, "Pictures to draw.", lower_bound=1)
BATCH_SIZE = flags.DEFINE_integer("batch_size", 64, "Pictures drawn together.", lower_bound=1)
SEED = flags.DEFINE_integer("seed", None, "Of prompts and noise.", lower_bound=0)
OPTIONS = cli.sampling_flags()
NO_METRICS = ("step", "seconds")  # numbers of a row that are no metrics


def main():
    from t2i_jax import errors, images

    if bool(PROTOCOL.value) == bool(EVALUATORS.value):
        raise errors.misused(
            "one of --protocol and --evaluators is needed",
            "add --protocol=shapes, or the name of another in t2i_jax/evaluators/protocols",
        )
    drawing = (*MODEL.values(), *OPTIONS.values(), EVALUATORS, NUM_IMAGES, SEED, CAPTIONS)
    unused = [f"--{flag.name}" for flag in drawing if flag.value not in (None, [])]
    if IMAGES.value and unused:
        raise errors.ConfigError(
            f"{', '.join(unused)} with pictures that are drawn already",
            where="--images",
            fix=f"leave out {', '.join(unused)}",
        )
    if CAPTIONS.value:
        if not PROTOCOL.value:
            raise errors.ConfigError(
                "no protocol", where="--captions", fix="add --protocol=…, whose captions they are"
            )
        images.check_file(CAPTIONS.value, "--captions")
        _write_captions()
        return
    output = OUTPUT.value or (MODEL["workdir"].value and f"{MODEL['workdir'].value}/results.jsonl")
    if OUTPUT.value:  # before hours of drawing
        images.check_file(output, "--output")
    row = _by_protocol() if PROTOCOL.value else _by_evaluators()
    text = json.dumps({k: v if _is_json(v) else None for k, v in row.items()})
    print(text)
    print(_table(row), file=sys.stderr)
    if output:
        with images.writing(output, "--output"), pathlib.Path(output).open("a") as f:
            f.write(text + "\n")


def _is_json(value) -> bool:
    """JSON has neither infinities nor NaN, for which `json` writes words that others refuse."""
    return not isinstance(value, float) or math.isfinite(value)


def _table(row: dict) -> str:
    """The metrics of a row as a table of one line each."""
    metrics = {k: v for k, v in row.items() if type(v) in (int, float) and k not in NO_METRICS}
    width = max(map(len, metrics), default=0)
    return "\n".join(f"{name:{width}}  {value:.4g}" for name, value in metrics.items())


def _protocol():
    from t2i_jax.quality import protocol

    return protocol.read(
        PROTOCOL.value,
        path=DATA.value,
        num_images=NUM_IMAGES.value,
        seed=SEED.value,
        sample=cli.given(OPTIONS),
        extractor=EXTRACTOR.value,
        clip=CLIP.value,
    )


def _write_captions() -> None:
    from t2i_jax import images
    from t2i_jax.commands import prompts

    lines = "".join(f"{prompts.line(caption)}\n" for caption in _protocol().captions())
    images.write_whole(CAPTIONS.value, lines.encode())


def _logged(batches, total: int):
    """Yields the batches, and logs every ten seconds how many images are done."""
    done, logged = 0, time.perf_counter()
    for pictures, texts in batches:
        yield pictures, texts
        done += len(pictures)
        if time.perf_counter() - logged > 10:
            logged = time.perf_counter()
            logging.info("%d of %d pictures", done, total)


def _by_protocol() -> dict:
    """The row of an evaluation by --protocol, of a model or of --images."""
    from t2i_jax import errors
    from t2i_jax.data import pictures
    from t2i_jax.evaluators import protocol as judge
    from t2i_jax.run import compile_cache

    # Loading a pipeline enables it, too, but with --images there is none.
    compile_cache.enable()
    ours = _protocol()
    started = time.perf_counter()
    if IMAGES.value:
        folder, drawing = pictures.Pictures(IMAGES.value), ours
        ours = ours._replace(name=f"{ours.name} on pictures", num_images=len(folder))
    nets = judge.Networks(ours)
    uses = ((EXTRACTOR, nets.extract), (CLIP, nets.dual), (REFERENCE, "fid" in ours.metrics))
    _check_used(ours, uses)
    if IMAGES.value:
        judge.check_captions(ours, nets, folder.captions)
        judge.check_places(drawing, nets, folder.captions)
        batches = folder.batches(judge.whole_captions(ours, BATCH_SIZE.value))
        measure = judge.Measure(ours, nets, _logged(batches, len(folder)), REFERENCE.value)
        by_place = sorted(nets.drawn & (judge.OF_PAIRS.keys() | judge.OF_GROUPS.keys()))
        if folder.broken and by_place:
            # Whatever comes behind a gap counts for another caption.
            raise errors.DataError(
                f"{', '.join(by_place)} go by the places of pictures, and "
                f"{', '.join(sorted(folder.broken)[:5])} cannot be read",
                where=IMAGES.value,
                fix="draw these again, or choose other metrics",
            )
        model = {
            "images": IMAGES.value,
            "images_sha256": folder.fingerprint,
            # Only after `Measure` has read all images `broken` is complete.
            "num_images": len(folder) - len(folder.broken),
            "broken": len(folder.broken),
        }
    else:
        pipe = _pipeline(averaged=ours.ema)
        model = {"model": pipe.source, "step": pipe.step, "weights": _digest(pipe)}
        model |= {"sample": pipe.predictor.check("sample", **ours.sample)}
        drawn = judge.drawn(
            pipe.predictor.bound, pipe.nets, ours, ours.captions(), BATCH_SIZE.value
        )
        measure = judge.Measure(ours, nets, _logged(drawn, ours.num_images), REFERENCE.value)
    return {
        "protocol": ours.name,
        **model,
        # Evaluators give floats alone, counts among them.
        **{k: int(v) if "num_" in k else v for k, v in measure.metrics().items()},
        **measure.provenance,
        "definition": ours._asdict(),
        "definition_sha256": ours.sha256,
        **_circumstances(started),
    }


def _check_used(ours, uses) -> None:
    """Raises ConfigError for a flag that no metric of the protocol uses."""
    from t2i_jax import errors

    for flag, use in uses:
        if flag.value and not use:
            raise errors.ConfigError(
                f"no metric of the protocol {ours.name!r} uses it",
                where=f"--{flag.name}",
                fix="leave it out, or choose another protocol",
            )


def _by_evaluators() -> dict:
    """The row of an evaluation by --evaluators, with the options of each."""
    pipe, started = _pipeline(), time.perf_counter()
    options = cli.given(OPTIONS)
    result = {"model": pipe.source, "step": pipe.step, "weights": _digest(pipe)}
    if "sample" in pipe.predictor.objective.predict:
        result["sample"] = pipe.predictor.check("sample", **options)
    flagged = {"num_images": NUM_IMAGES.value, "seed": SEED.value}
    flagged = {name: value for name, value in flagged.items() if value is not None}
    for name in EVALUATORS.value:
        own = pipe.config.evaluators.to_dict().get(name, {})  # as in the training
        if options:  # a flag changes one option, not all
            own = {**own, "sample": {**(own.get("sample") or {}), **options}}
        sizes = {"batch_size": BATCH_SIZE.value} if _goes_to(name, BATCH_SIZE) else {}
        # What a flag says comes before the config, and its default behind it.
        asked = {**sizes, **own, **flagged, **(sizes if BATCH_SIZE.present else {})}
        if DATA.value and _goes_to(name, DATA):
            res = pipe.config.size or pipe.config.res
            asked["data"] = {"source": "folder", "path": DATA.value, "res": res}
        asked = pipe.predictor.evaluator_options(name, asked)
        metrics = pipe.evaluate(name, **asked)
        numbers = {k: v for k, v in metrics.items() if not getattr(v, "ndim", 0)}  # no images
        result |= {f"{name}/{k}": v for k, v in numbers.items()}
        result[f"{name}/options"] = asked
    return {**result, **_circumstances(started)}


def _goes_to(name: str, flag) -> bool:
    """Whether a flag goes to an evaluator: it takes the option, or none of the chosen ones does."""
    from t2i_jax import plugins

    make = lambda one: plugins.load("evaluators", one).make
    takes = lambda one: flag.name in inspect.signature(make(one)).parameters
    # In the second case each gets what was set and refuses it. Ignoring a flag would be silent.
    return takes(name) or (flag.present and not any(map(takes, EVALUATORS.value)))


def _pipeline(**options):
    source = cli.model(MODEL, hint=", or --images=…" if PROTOCOL.value else "")
    from t2i_jax import pipeline  # imports JAX: errors of flags should not wait for that

    return pipeline.Pipeline.load(source, **cli.opened(MODEL), **options)


def _digest(pipe) -> str:
    from t2i_jax.run import fingerprint

    # Widened: weights of equal values are one model, whatever type they are stored in.
    return fingerprint.digest(pipe.nets, widened=True)


def _circumstances(started: float) -> dict:
    """The time, versions and devices of a row."""
    import jax

    import t2i_jax

    here = str(pathlib.Path(t2i_jax.__file__).parent)
    # --exclude=* passes over tags, so that the answer is always the hash of the commit.
    asked = ["git", "-C", here, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        commit = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = None  # an installed package
    device = jax.devices()[0]
    return {
        "seconds": round(time.perf_counter() - started, 1),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "t2i_jax": t2i_jax.__version__,
        "commit": commit,
        "jax": jax.__version__,
        "devices": f"{jax.device_count()} × {device.platform} {device.device_kind}",
    }


if __name__ == "__main__":
    cli.run(main)
