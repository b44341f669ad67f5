"""What to draw: prompts from flags or files, checked; pictures written with what remakes them."""

import hashlib
import inspect
import json
import pathlib
import re
import shlex
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from absl import logging

import t2i_jax
from t2i_jax import errors, files, images, limits
from t2i_jax.quality import resize

FILE_LIMIT = 2**24  # bytes of prompts in one file
SHARED = (  # by a grid
    *("prediction", "options", "image", "lora", "load", "int8", "model", "step", "t2i_jax"),
)
PROMPT_KEPT = 4096  # characters of metadata; of a caption no more is ever read
_FLAG = r"\s--"  # what begins an option within a line
_LETTERS = {"n": "negative_prompt", "d": "seed", "l": "guidance", "s": "steps"}  # as kohya writes


class Source(NamedTuple):
    """An image that a prediction starts from, uint8 HWC; None where only its name is recorded."""

    name: str
    sha256: str
    image: np.ndarray | None = None


class Request(NamedTuple):
    """`count` examples of a prediction, numbered from `first` under `seed`, with its options.

    source: the image it starts from. Without a prompt, "", there is no caption either.
    """

    prompt: str
    seed: int
    count: int = 1
    negative_prompt: str | None = None
    options: tuple[tuple[str, object], ...] = ()
    first: int = 0
    prediction: str = "sample"
    source: Source | None = None


def check(request: Request, where: str = "") -> Request:
    """The request itself; ConfigError for empty, overlong or broken prompts, counts and seeds.

    where: the file and line it comes from; by default the flag at fault is named.
    """
    if request.prompt or not request.source:
        limits.check_prompt(request.prompt, where or "--prompt")
    if request.negative_prompt is not None:
        limits.check_text(request.negative_prompt, where or "--negative_prompt")
    if not limits.is_whole(request.count) or not 1 <= request.count <= limits.COUNT_LIMIT:
        raise errors.ConfigError(
            f"num_images is {request.count!r}",
            where=where or "--num_images",
            fix=f"give 1 to {limits.COUNT_LIMIT:,}",
        )
    limits.check_seed(request.seed, where or "--seed")
    return request


def read_image(path) -> Source:
    """An image file as what a prediction starts from. Raises DataError."""
    image_HWC = resize.load(path)
    sha256 = hashlib.sha256(pathlib.Path(path).read_bytes()).hexdigest()
    return Source(pathlib.Path(path).name, sha256, image_HWC)


def starting_from(requests, sources) -> list[Request]:
    """The requests with their images: one for each, or one for all. One request is for all, too."""
    requests = requests * len(sources) if len(requests) == 1 else requests
    if len(sources) not in (1, len(requests)):
        raise errors.ConfigError(
            f"{len(sources)} images for {len(requests)} prompts",
            where="--image",
            fix="give one for all, or one for each",
        )
    each = list(sources) * (len(requests) // len(sources))
    return [r._replace(source=s) for r, s in zip(requests, each, strict=True)]


def again(requests, sources) -> list[Request]:
    """Requests that a picture records, with the images they start from, which it does not hold."""
    opened = {source.sha256: source for source in sources}
    recorded = {r.source.sha256: r.source.name for r in requests if r.source}
    if opened.keys() != recorded.keys():
        names = [f"--image={name} of SHA-256 {key[:12]}…" for key, name in recorded.items()]
        lacking = [name for key, name in recorded.items() if key not in opened]
        what = f"from {', '.join(lacking)}, which is not given"
        raise errors.ConfigError(
            f"it was drawn {what if lacking else 'without the images that are given'}",
            where="--reproduce",
            fix=f"give {' '.join(names) or 'no --image'}",
        )
    return [r._replace(source=opened[r.source.sha256]) if r.source else r for r in requests]


def described(fn) -> tuple[str, dict[str, str]]:
    """The first line of a prediction's docstring, and what "Args:" there says of each option."""
    text = inspect.cleandoc(fn.__doc__ or "")
    _, _, listed = text.partition("\nArgs:\n")
    lines = re.findall(r"^  ([\w, ]+): (.*(?:\n    .*)*)", listed, re.MULTILINE)
    said = {name: " ".join(line.split()) for names, line in lines for name in names.split(", ")}
    parameters = inspect.signature(fn).parameters.values()
    options = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]
    first = text.partition("\n")[0].partition("   ->")[0]  # without what it gives
    return first, {name: said.get(name, "") for name in options}


def read_file(path, default: Request) -> list[Request]:
    """Requests of a file, one a line: plain prompts, with `--n --d --l --s` behind them, or JSONL.

    A JSON line has "prompt" and may have "negative_prompt", "seed", "num_images" and sampling
    options. Empty lines and lines that start with # are passed over.
    """
    fix = f"give a UTF-8 text file of at most {FILE_LIMIT:,} bytes"
    with errors.explained(errors.ConfigError, "cannot read the prompts", where=path, fix=fix):
        # Not splitlines, which also cuts at separators that may stand within a caption.
        lines = files.read_text(path, limit=FILE_LIMIT).replace("\r\n", "\n").split("\n")
    found = []
    for number, line in enumerate(lines, 1):
        where = f"{path}:{number}"
        if not line.strip() or line.startswith("#"):
            continue
        values = _json_line(line, where) if line.lstrip().startswith("{") else _plain(line, where)
        # `draw` groups requests by their options, and a list cannot be part of a key.
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


def line(prompt: str) -> str:
    """The line of a file that `read_file` reads as this prompt: plain where that is the same."""
    plain = prompt and prompt == prompt.strip() and prompt.isprintable()
    if plain and not prompt.startswith(("#", "{")) and not re.search(_FLAG, prompt):
        return prompt
    return json.dumps({"prompt": prompt})


def _json_line(line, where):
    fix, of = 'write {"prompt": "…"}', (TypeError, *errors.UNREADABLE)
    with errors.explained(errors.ConfigError, "not a JSON object", where=where, fix=fix, of=of):
        return dict(json.loads(line))


def _plain(line, where):
    prompt, *flags = re.split(_FLAG, line.strip())
    values = {"prompt": prompt}
    for flag in flags:
        letter, _, text = flag.partition(" ")
        if letter not in _LETTERS:
            raise errors.ConfigError(
                f"unknown option --{letter}", where=where, fix="use --n, --d, --l or --s"
            )
        name = _LETTERS[letter]
        try:
            # An apostrophe in a negative prompt would be an open quote to shlex.
            text = text if letter == "n" else " ".join(shlex.split(text))
            values[name] = {"seed": int, "steps": int, "guidance": float}.get(name, str)(text)
        except ValueError as e:
            raise errors.ConfigError(
                f"--{letter} is {text!r}", where=where, fix="give a number"
            ) from e
    return values


class Recorded(NamedTuple):
    """What a picture's metadata says: requests, the model's name, and its step.

    grid: it is of several pictures.   frames: of a way between pictures, or 0.
    lora: "name", "sha256" and "weight" of each file of adapters.
    int8: nets whose kernels had eight bits, with commas.
    load: what `replaced` gave.
    """

    requests: list[Request]
    model: str
    step: int | str | None
    grid: bool = False
    frames: int = 0
    lora: Sequence[Mapping] = ()
    int8: str = ""
    load: Sequence[Mapping] = ()


def from_picture(path) -> Recorded:
    """The requests that made a picture, a grid or a strip of ours, out of its metadata."""
    fix = "give a picture that sample.py wrote"
    with errors.explained(errors.DataError, "cannot read it", where=path, fix=fix):
        found = images.read_metadata(path)
    rows = found.get("pictures", [found]) if found else []
    # What all pictures share stands beside their list, see `_together`.
    shared = {k: found[k] for k in ("options", "prediction", "image") if k in (found or {})}
    frames, step = (found or {}).get("interpolate", 0), (found or {}).get("step")
    lora, load, int8 = (
        (found or {}).get(k, d) for k, d in (("lora", []), ("load", []), ("int8", ""))
    )
    fits = (
        isinstance(int8, str)
        and isinstance(found, dict)
        and isinstance(found.get("model"), str)
        and rows
    )
    fits = fits and _all_have(rows) and _all_have(lora, name=str, sha256=str, weight=int | float)
    fits = fits and _all_have(load, net=str, name=str, sha256=str)
    rows = [{"prediction": "sample", **shared, **row} for row in rows] if fits else []
    fits = fits and _all_have(rows, prompt=str, seed=int, index=int, options=dict, prediction=str)
    starts = [row["image"] for row in rows if "image" in row]
    fits = fits and _all_have(starts, name=str, sha256=str)
    if not fits or not limits.is_whole(frames) or not 0 <= frames <= limits.COUNT_LIMIT:
        raise errors.DataError(
            "the picture holds no settings of ours",
            where=str(path),
            fix="give a picture that sample.py wrote with --metadata",
        )
    requests = [check(_request(row), str(path)) for row in rows]
    last = max(r.first + r.count for r in requests)
    if (
        min(r.first for r in requests) < 0
        or max(last, sum(r.count for r in requests)) > limits.INDEX_LIMIT
    ):
        raise errors.DataError(
            "the picture's number, or how many there are, is out of bounds",
            where=str(path),
            fix="give a picture that sample.py wrote",
        )
    step = step if isinstance(step, int) else None
    grid = "pictures" in found and not frames
    return Recorded(requests, found["model"], step, grid, frames, lora, int8, load)


def _all_have(rows, **kinds) -> bool:
    """Whether it is a list of objects with entries of these types: a picture may say anything."""
    return isinstance(rows, list) and all(
        isinstance(row, dict) and all(isinstance(row.get(k), kind) for k, kind in kinds.items())
        for row in rows
    )


def replaced(pipe) -> list[dict]:
    """What a pretrained pipeline took in place of its own nets: "net", "name", "sha256" of each.

    A run needs none of this: it knows the digests of its frozen nets, and takes no others.
    """
    from t2i_jax import weights
    from t2i_jax.pretrained import opener, tensors

    if not weights.is_pipeline(pipe.source):
        return []
    own, found = weights.sources(weights.config_at(pipe.source)), []
    for net, source in sorted(weights.sources(pipe.config).items()):
        for one in opener.each(source) if source != own.get(net) else ():
            if weights.is_ours(one):
                sha256 = weights.digests({net: pipe.nets[net]})[net]
            else:
                sha256 = tensors.digest(opener.open(one).folder)
            found.append({"net": net, "name": _public_name(one), "sha256": sha256})
    return found


def check_model(recorded: Recorded, pipe) -> None:
    """Warns where a picture may have been drawn with another model.

    Raises:
      ConfigError: it was drawn with other adapters or nets than the model has.
    """
    if recorded.model != (name := _public_name(pipe.source)):
        logging.warning("the picture was drawn with %s, and this is %s", recorded.model, name)
    check_adapters(recorded, pipe.adapters)
    known = lambda given: [(one["net"], one["sha256"]) for one in given]
    given, names = replaced(pipe), {}
    if given and not recorded.load:
        # A picture of an older version says none, and a net may only have moved.
        logging.warning("--load gives other nets than the model's, and the picture names none")
    elif known(recorded.load) != known(given):
        for one in recorded.load:
            names.setdefault(one["net"], []).append(one["name"])
        named = [f"--load={net}={','.join(each)}" for net, each in names.items()]
        raise errors.ConfigError(
            "the picture was drawn with other nets",
            where="--reproduce",
            fix=f"give {' '.join(named)} of then",
        )


def check_adapters(recorded: Recorded, adapters) -> None:
    """Raises ConfigError unless a picture was drawn with these adapters, whatever their files'
    names.
    """
    known = lambda given: sorted((one["sha256"], one["weight"]) for one in given)
    if known(recorded.lora) != known(adapters):
        named = [f"--lora={one['name']}:{one['weight']}" for one in recorded.lora]
        raise errors.ConfigError(
            "the picture was drawn with other adapters",
            where="--reproduce",
            fix=f"give {' '.join(named)} of then" if named else "leave out --lora",
        )


def _request(row) -> Request:
    options = {k: tuple(v) if isinstance(v, list) else v for k, v in row["options"].items()}
    source = row.get("image")
    return Request(
        row["prompt"],
        row["seed"],
        row.get("count", 1),
        row.get("negative_prompt"),
        tuple(sorted(options.items())),
        row["index"],
        row["prediction"],
        Source(source["name"], source["sha256"]) if source else None,
    )


def draw(pipe, requests, *, batch_size: int, strict: bool = False, callback=None):
    """Draws all requests, those with equal options together.   -> [(result, metadata), …]

    A result is a picture, uint8 HWC, or a text. The callback is that of `Pipeline`.

    Raises:
      ConfigError: a prediction or an option that the family does not have; with `strict`, a prompt
        longer than the model reads.
    """
    settings = check_options(pipe, requests)
    # `check_options` has refused a negative prompt without an option `guidance`.
    if any(
        r.negative_prompt and o["guidance"] == 1 for r, o in zip(requests, settings, strict=True)
    ):
        logging.warning("guidance 1 is none: the negative prompt changes nothing")
    cuts = _cut(pipe, requests, strict)
    texts = [text for r in requests for text in (r.prompt, r.negative_prompt) if text]
    pipe.tell_unknown_words(texts)
    groups: dict[tuple, list[int]] = {}
    for i, r in enumerate(requests):
        # A batch with other kinds of examples is another program, even with equal options.
        examples = (bool(r.prompt), bool(r.source), bool(r.negative_prompt))
        key = (r.prediction, *examples, tuple(settings[i].items()))
        groups.setdefault(key, []).append(i)
    drawn = {}
    for (prediction, *examples, options), members in groups.items():
        jobs = [(i, k) for i in members for k in range(requests[i].count)]
        each = [requests[i] for i, _ in jobs]
        columns = {
            "caption": [r.prompt for r in each],
            "image": [r.source and r.source.image for r in each],
            "negative_prompt": [r.negative_prompt for r in each],
        }
        found = pipe.draw(
            prediction,
            {name: columns[name] for name, asked in zip(columns, examples, strict=True) if asked},
            seed=[r.seed for r in each],
            index=[requests[i].first + k for i, k in jobs],
            batch_size=batch_size,
            callback=callback,
            **dict(options),
        )
        drawn |= dict(zip(jobs, found, strict=True))
    out, load = [], replaced(pipe)
    # Groups are drawn in turn. Sorting restores the order of the requests.
    for i, k in sorted(drawn):
        metadata = _settings(pipe, requests[i], settings[i], k, load)
        if cut := cuts.get(requests[i].prompt):
            metadata["cut"] = cut
        out.append((drawn[i, k], metadata))
    return out


def _settings(pipe, request: Request, options: dict, k: int, load) -> dict:
    """All that draws the request's k-th picture again. `load`: what `replaced` gave."""
    source = request.source
    return {
        "prompt": request.prompt[:PROMPT_KEPT],
        "negative_prompt": request.negative_prompt and request.negative_prompt[:PROMPT_KEPT],
        "seed": request.seed,
        "index": request.first + k,
        "prediction": request.prediction,
        "options": options,
        **({"image": dict(name=source.name, sha256=source.sha256)} if source else {}),
        **({"lora": pipe.adapters} if pipe.adapters else {}),
        **({"load": load} if load else {}),
        **({"int8": pipe.int8} if pipe.int8 else {}),
        "model": _public_name(pipe.source),
        "step": pipe.step,
        "t2i_jax": t2i_jax.__version__,
    }


def _together(each) -> dict:
    """The settings of several pictures as one: what all share, and "pictures" with the rest.

    Pictures of a prompt that follow each other are one entry with a "count".
    """
    common = {k: v for k, v in each[0].items() if all(k in one and one[k] == v for one in each)}
    # Prompt, seed and index stay in each entry even where they are equal: `from_picture` wants
    # them.
    common = {k: common[k] for k in SHARED if k in common}
    pictures = []
    for one in each:
        entry = {k: v for k, v in one.items() if k not in common and v is not None}
        last = pictures[-1] if pictures else {}
        follows = {**entry, "index": last.get("index"), "count": last.get("count")} == last
        if follows and entry["index"] == last["index"] + last["count"]:
            last["count"] += 1
        else:
            pictures.append({**entry, "count": 1})
    return {"pictures": pictures, **common}


def check_options(pipe, requests) -> list[dict]:
    """All options of each request, as `Predictor.check` gives them.

    Raises:
      ConfigError: the family does not have the prediction or an option, or takes no negative
        prompt, or the prediction gives neither pictures nor texts.
    """
    settings = [pipe.predictor.check(r.prediction, **dict(r.options)) for r in requests]
    for request, options in zip(requests, settings, strict=True):
        if request.negative_prompt:
            pipe.predictor.check_negative(options)
        if not pipe.predictor.draws(request.prediction):
            raise errors.ConfigError(
                f"{request.prediction!r} gives arrays, no pictures and no texts",
                where=f"--predict={request.prediction}",
                fix="call it from Python, by pipeline.Pipeline.draw",
            )
    return settings


def check_way(pipe) -> None:
    """Raises ConfigError for a family without a way from one picture to the next."""
    if "between" not in pipe.predictor.objective.predict:
        raise errors.ConfigError(
            f"objective {pipe.config.objective!r} has no way between pictures",
            where="--interpolate",
            fix="leave it out, or choose a model that has one, such as builtin:shapes-gan",
        )


def draw_between(pipe, requests, frames: int):
    """Pictures on the way from each of the requests' pictures to the next.

    Returns:
      uint8 NHWC, and the settings they came from.
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
    requests = [r._replace(prediction="between") for r in requests]
    if "share" in dict(requests[0].options):
        raise errors.ConfigError(
            "share goes from 0 to 1 along the way", where="--interpolate", fix="leave share out"
        )
    options = check_options(pipe, requests)[0]
    pipe.tell_unknown_words([r.prompt for r in requests])
    jobs = [(r.prompt, r.first + k) for r in requests for k in range(r.count)]
    drawn = pipe.predictor.between(
        pipe.nets,
        [prompt for prompt, _ in jobs],
        frames,
        seed=requests[0].seed,
        index=np.array([index for _, index in jobs]),
        **dict(requests[0].options),
    )
    del options["share"]  # it runs from 0 to 1
    load = replaced(pipe)
    each = [_settings(pipe, r, options, k, load) for r in requests for k in range(r.count)]
    return drawn, _together(each) | {"interpolate": frames}


def save_between(drawn, settings: dict, folder, *, metadata: bool) -> list[pathlib.Path]:
    """Writes them as a strip, a row from each picture to the next, and as an animation.

    settings: those of `draw_between`, which the files hold with `metadata`.
    """
    folder, frames = pathlib.Path(folder), settings["interpolate"]
    images.make_folder(folder, "--output_dir")
    text = _parameters_of(settings, drawn.shape[1]) if metadata else None
    settings = settings if metadata else None
    with images.writing(folder, "--output_dir"):
        strip = images.claim(folder, "strip.png")
        # Neighbouring rows share an image: where one way ends, the next begins.
        rows = [drawn[i : i + frames + 1] for i in range(0, len(drawn) - 1, frames)]
        images.save(strip, images.rows(rows), settings, text)
        animation = images.claim(folder, "animation.webp")
        images.save_animation(animation, drawn, settings, text)
    return [strip, animation]


def _cut(pipe, requests, strict):
    prompts = sorted({text for r in requests for text in (r.prompt, r.negative_prompt) if text})
    cuts = dict(zip(prompts, pipe.predictor.cuts(prompts), strict=True))
    each = pipe.predictor.tokenizers.values()
    for prompt, cut in cuts.items():
        if cut:
            text = f"longer than the {pipe.config.text_length} tokens that the model reads"
            if len(each) > 1 or any(isinstance(one, dict) for one in each):  # of unequal limits
                text = "longer than what one of the model's text encoders reads"
            text += f"; cut off: {cut[:200]!r}"
            if strict:
                raise errors.ConfigError(text, where=f"prompt {prompt[:60]!r}…", fix="shorten it")
            logging.warning("%s", text)
    return cuts


def _public_name(source: str) -> str:
    """builtin:name, or the folder's name: pictures tell nobody where a run lies."""
    return source if source.startswith("builtin:") else pathlib.Path(source).resolve().name


def parameters_text(metadata: dict, size: str) -> str:
    """The settings in the form that existing picture viewers show; size: width x height."""
    lines = [metadata["prompt"].replace("\n", " ")]
    if metadata["negative_prompt"]:
        lines.append(f"Negative prompt: {metadata['negative_prompt']}")
    options = metadata["options"]
    names = {"steps": "Steps", "sampler": "Sampler", "guidance": "CFG scale"}
    shown = [f"{label}: {options[name]}" for name, label in names.items() if name in options]
    shown += [f"Seed: {metadata['seed']}", f"Size: {size}", f"Model: {metadata['model']}"]
    return "\n".join([*lines, ", ".join(shown)])


def _parameters_of(settings: dict, size: str) -> str:
    """The same of several pictures: all prompts, and the settings of the first."""
    rows = settings["pictures"]
    # Defaults come first, as `_together` leaves out what is None.
    first = {"options": {}, "negative_prompt": None, **settings, **rows[0]}
    prompts = " | ".join(dict.fromkeys(row["prompt"] for row in rows))
    return parameters_text({**first, "prompt": prompts}, size)


def save(
    drawn, folder, *, grid: bool, metadata: bool, extension: str = "png"
) -> list[pathlib.Path]:
    """Writes the pictures as {number:05d}_s{seed}.<extension>, never over an existing file; texts
    as files .txt.

    grid: also all as one picture, see `in_rows`.
    """
    folder = pathlib.Path(folder)
    images.make_folder(folder, "--output_dir")
    paths = []
    with images.writing(folder, "--output_dir"):
        for picture, info in drawn:
            kind = "txt" if isinstance(picture, str) else extension
            path = images.claim(folder, f"s{info['seed']}.{kind}")
            paths.append(path)
            if isinstance(picture, str):
                images.write_whole(path, f"{picture}\n".encode())
                continue
            text = parameters_text(info, _size(picture)) if metadata else None
            images.save(path, picture, info if metadata else None, text)
        drawn = [(picture, info) for picture, info in drawn if not isinstance(picture, str)]
        if grid and drawn:
            whole = images.enlarged(in_rows(drawn))
            if max(whole.shape) > images.LONGEST.get(extension, max(whole.shape)):
                logging.warning("the grid is too large for %s, and becomes a PNG", extension)
                extension = "png"
            settings = _together([info for _, info in drawn]) if metadata else None
            text = _parameters_of(settings, _size(drawn[0][0])) if metadata else None
            path = images.claim(folder, f"grid.{extension}")
            images.save(path, whole, settings, text)
            paths.append(path)
    return paths


def _size(image_HWC) -> str:
    height, width, _ = image_HWC.shape
    return f"{width}x{height}"


def in_rows(drawn):
    """All pictures as one: a row for each prompt, its pictures along it.

    Where no prompt has more than one picture, as many rows as columns.
    """
    rows: dict[str, list] = {}
    for picture, info in drawn:
        rows.setdefault(info["prompt"], []).append(picture)
    if len(rows) == len(drawn):
        return images.grid([picture for picture, _ in drawn])
    return images.rows(list(rows.values()))
