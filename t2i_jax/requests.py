"""What to draw: prompts from flags or files, checked; pictures written with what remakes them."""

import json
import pathlib
import shlex
from typing import NamedTuple

import numpy as np
from absl import logging

import t2i_jax
from t2i_jax import errors, images

PROMPT_LIMIT = 10_000  # characters
COUNT_LIMIT = 100_000
_LETTERS = {"n": "negative_prompt", "d": "seed", "l": "guidance", "s": "steps"}  # as kohya writes


class Request(NamedTuple):
    """`count` pictures of a prompt, numbered from `first` under `seed`; options for the family."""

    prompt: str
    seed: int
    count: int = 1
    negative_prompt: str | None = None
    options: tuple[tuple[str, object], ...] = ()
    first: int = 0


def check(request: Request, where: str) -> Request:
    """The request itself; ConfigError for empty, overlong or broken prompts, counts and seeds."""
    for text in (request.prompt, request.negative_prompt or ""):
        if not isinstance(text, str):
            raise errors.ConfigError(f"a prompt is {text!r}", where=where, fix="give a string")
        if len(text) > PROMPT_LIMIT:
            raise errors.ConfigError(
                f"a prompt has {len(text):,} characters",
                where=where,
                fix=f"shorten it; {PROMPT_LIMIT:,} is the limit",
            )
        if any("\ud800" <= c <= "\udfff" for c in text):
            raise errors.ConfigError(
                "a prompt is not valid Unicode", where=where, fix="write it in UTF-8"
            )
    if not request.prompt.strip():
        raise errors.ConfigError("a prompt is empty", where=where, fix="say what to draw")
    if not isinstance(request.count, int) or not 1 <= request.count <= COUNT_LIMIT:
        raise errors.ConfigError(
            f"num_images is {request.count!r}", where=where, fix=f"give 1 to {COUNT_LIMIT:,}"
        )
    if not isinstance(request.seed, int) or not 0 <= request.seed < 2**32:
        raise errors.ConfigError(
            f"seed is {request.seed!r}", where=where, fix="give a whole number from 0 to 2³² − 1"
        )
    return request


def read_file(path, default: Request) -> list[Request]:
    """Requests of a file, one a line: plain prompts, with `--n --d --l --s` behind them, or JSONL.

    A JSON line has "prompt" and may have "negative_prompt", "seed", "num_images" and sampling
    options. Empty lines and lines that start with # are passed over.
    """
    path = pathlib.Path(path)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as e:
        raise errors.ConfigError(
            f"cannot read the prompts: {e}", where=str(path), fix="give a UTF-8 text file"
        ) from e
    found = []
    for number, line in enumerate(lines, 1):
        where = f"{path}:{number}"
        if not line.strip() or line.startswith("#"):
            continue
        values = _json_line(line, where) if line.lstrip().startswith("{") else _plain(line, where)
        values = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        options = dict(default.options)
        request = default._replace(prompt=values.pop("prompt", ""))
        request = request._replace(
            negative_prompt=values.pop("negative_prompt", request.negative_prompt),
            seed=values.pop("seed", request.seed),
            count=values.pop("num_images", request.count),
            options=tuple(sorted((options | values).items())),
        )
        found.append(check(request, where))
    if not found:
        raise errors.ConfigError("no prompt in the file", where=str(path), fix="one prompt a line")
    return found


def _json_line(line, where):
    try:
        return dict(json.loads(line))
    except (json.JSONDecodeError, TypeError, ValueError) as e:
        raise errors.ConfigError(
            f"not a JSON object: {e}", where=where, fix='write {"prompt": "…"}'
        ) from e


def _plain(line, where):
    prompt, *flags = line.strip().split(" --")
    values = {"prompt": prompt}
    for flag in flags:
        letter, _, text = flag.partition(" ")
        if letter not in _LETTERS:
            raise errors.ConfigError(
                f"unknown option --{letter}", where=where, fix="use --n, --d, --l or --s"
            )
        name = _LETTERS[letter]
        try:
            text = text if letter == "n" else " ".join(shlex.split(text))
            values[name] = {"seed": int, "steps": int, "guidance": float}.get(name, str)(text)
        except ValueError as e:
            raise errors.ConfigError(
                f"--{letter} is {text!r}", where=where, fix="give a number"
            ) from e
    return values


def from_picture(path) -> tuple[Request, str, int | None]:
    """The request that made a picture, the model's name and its step, out of its metadata."""
    try:
        found = images.read_metadata(path)
    except (OSError, ValueError) as e:
        raise errors.DataError(
            f"cannot read it: {e}", where=str(path), fix="give a PNG that sample.py wrote"
        ) from e
    needed = {"prompt": str, "seed": int, "index": int, "options": dict, "model": str}
    if not found or any(not isinstance(found.get(k), t) for k, t in needed.items()):
        raise errors.DataError(
            "the picture holds no settings of ours",
            where=str(path),
            fix="give a PNG that sample.py wrote with --metadata",
        )
    options = {k: tuple(v) if isinstance(v, list) else v for k, v in found["options"].items()}
    request = Request(
        found["prompt"],
        found["seed"],
        1,
        found.get("negative_prompt"),
        tuple(sorted(options.items())),
        found["index"],
    )
    step = found.get("step")
    return check(request, str(path)), found["model"], step if isinstance(step, int) else None


def draw(pipe, requests, *, batch_size: int, strict: bool = False):
    """Draws all requests, those with equal settings together.   -> [(picture u8_HWC, metadata), …]

    Raises:
      ConfigError: an option the family does not take; with `strict`, a prompt longer than the
        model reads.
    """
    settings = [pipe.predictor.check("sample", **dict(r.options)) for r in requests]
    cuts = _cut(pipe, requests, strict)
    groups: dict[tuple, list[int]] = {}
    for i, r in enumerate(requests):
        key = (r.seed, r.negative_prompt, tuple(settings[i].items()))
        groups.setdefault(key, []).append(i)
    drawn = {}
    for (seed, negative, options), members in groups.items():
        jobs = [(i, k) for i in members for k in range(requests[i].count)]
        pictures = pipe(
            [requests[i].prompt for i, _ in jobs],
            seed=seed,
            index=np.array([requests[i].first + k for i, k in jobs]),
            negative=negative,
            batch_size=batch_size,
            **dict(options),
        )
        drawn |= dict(zip(jobs, pictures, strict=True))
    out = []
    for i, k in sorted(drawn):
        r = requests[i]
        metadata = {
            "prompt": r.prompt,
            "negative_prompt": r.negative_prompt,
            "seed": r.seed,
            "index": r.first + k,
            "options": settings[i],
            "model": _public_name(pipe.source),
            "step": pipe.step,
            "t2i_jax": t2i_jax.__version__,
        }
        if cuts.get(r.prompt):
            metadata["cut"] = cuts[r.prompt]
        out.append((drawn[i, k], metadata))
    return out


def draw_between(pipe, requests, frames: int):
    """Pictures on the way from each of the requests' pictures to the next.   -> uint8 NHWC

    Raises:
      ConfigError: a family without such a way, or requests with unequal seeds or options.
    """
    settings = {(r.seed, r.negative_prompt, r.options) for r in requests}
    if len(settings) > 1 or requests[0].negative_prompt:
        raise errors.ConfigError(
            "the pictures have other seeds, negative prompts or options",
            where="--interpolate",
            fix="give prompts alone, and more pictures of one by --num_images",
        )
    jobs = [(r.prompt, r.first + k) for r in requests for k in range(r.count)]
    return pipe.predictor.between(
        pipe.nets,
        [prompt for prompt, _ in jobs],
        frames,
        seed=requests[0].seed,
        index=np.array([index for _, index in jobs]),
        **dict(requests[0].options),
    )


def save_between(drawn, folder, frames: int) -> list[pathlib.Path]:
    """Writes them as a strip, a row from each picture to the next, and as an animation."""
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    strip = images.claim(folder, "strip.png")
    rows = [drawn[i : i + frames + 1] for i in range(0, len(drawn) - 1, frames)]
    images.save(strip, images.grid(np.concatenate(rows), columns=frames + 1))
    animation = images.claim(folder, "animation.webp")
    images.save_animation(animation, drawn)
    return [strip, animation]


def _cut(pipe, requests, strict):
    prompts = sorted({r.prompt for r in requests})
    cuts = dict(zip(prompts, pipe.predictor.tokenize(prompts)[2], strict=True))
    for prompt, cut in cuts.items():
        if cut:
            text = f"longer than the {pipe.config.text_length} tokens that the model reads"
            if hasattr(pipe.predictor.tokenize, "fixed"):  # several encoders, each with its limit
                text = "longer than what one of the model's text encoders reads"
            text += f"; cut off: {cut[:200]!r}"
            if strict:
                raise errors.ConfigError(text, where=f"prompt {prompt[:60]!r}…", fix="shorten it")
            logging.warning("%s", text)
    return cuts


def _public_name(source: str) -> str:
    """builtin:name, or the folder's name: pictures tell nobody where a run lies."""
    return source if source.startswith("builtin:") else pathlib.Path(source).resolve().name


def parameters_text(metadata: dict, size: int) -> str:
    """The settings in the form that existing picture viewers show."""
    lines = [metadata["prompt"].replace("\n", " ")]
    if metadata["negative_prompt"]:
        lines.append(f"Negative prompt: {metadata['negative_prompt']}")
    options = metadata["options"]
    names = {"steps": "Steps", "sampler": "Sampler", "guidance": "CFG scale"}
    shown = [f"{label}: {options[name]}" for name, label in names.items() if name in options]
    shown += [f"Seed: {metadata['seed']}", f"Size: {size}x{size}", f"Model: {metadata['model']}"]
    return "\n".join([*lines, ", ".join(shown)])


def save(
    drawn, folder, *, grid: bool, metadata: bool, extension: str = "png"
) -> list[pathlib.Path]:
    """Writes the pictures as {number:05d}_s{seed}.<extension>, never over an existing file."""
    folder = pathlib.Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        paths = []
        for picture, info in drawn:
            path = images.claim(folder, f"s{info['seed']}.{extension}")
            text = parameters_text(info, picture.shape[0]) if metadata else None
            images.save(path, picture, info if metadata else None, text)
            paths.append(path)
        if grid:
            path = images.claim(folder, f"grid.{extension}")
            images.save(path, images.grid(np.stack([picture for picture, _ in drawn])))
            paths.append(path)
    except OSError as e:
        raise errors.StorageError(
            f"cannot write pictures: {e.strerror}", where=str(folder), fix="choose --output_dir"
        ) from e
    return paths
