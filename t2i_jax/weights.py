"""Where nets come from: exported models, runs and pretrained encoders, by one name."""

import functools
import json
import os
import pathlib
from collections.abc import Callable, Mapping

import jax
import ml_collections
import numpy as np
import safetensors.numpy
from absl import logging
from flax import traverse_util

from t2i_jax import errors, files, images, int8, objective, sharding
from t2i_jax.pretrained import folder as folders
from t2i_jax.pretrained import hf, opener, tensors
from t2i_jax.run import checkpoint, fingerprint
from t2i_jax.text import words

BUILTIN = pathlib.Path(__file__).parent / "builtin"
KINDS = {  # of what every config.json holds and nets are built from
    **{"objective": str, "res": int, "text_length": int, "batch_size": int, "seed": int},
    **{"model": dict, "load": dict, "optim": dict, "ema": dict, "loss": dict, "sample": dict},
    **{"evaluators": dict, "size": list},
}
SENSELESS = (  # what building by a senseless config.json raises
    *(TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError),
)
ALWAYS = {"index": "int32", "weight": "float32"}  # in every batch, beside the family's inputs
EXPORTED = "model.safetensors"  # of an exported model, beside its config.json and README.md


def locate(source: str) -> pathlib.Path:
    """The folder of a run or an exported model: `builtin:name`, a path or `hf:org/name[@revision]`.

    Raises:
      ConfigError: there is no such folder, or it holds neither checkpoints nor an exported model.
      DataError: the hub has no such model.
    """
    source = os.fspath(source)
    if source.startswith("hf:"):
        return hf.locate(source)
    if source.startswith("builtin:"):
        folder = BUILTIN / source.removeprefix("builtin:")
        known = sorted(p.name for p in BUILTIN.iterdir() if (p / "config.json").exists())
        # The parent counts as well: `builtin:../x/shapes` ends in a known name, too.
        if folder.name not in known or folder.parent != BUILTIN:
            name = source.removeprefix("builtin:")
            raise errors.unknown("built-in model", name, known, where=source)
        return folder
    folder = pathlib.Path(source)
    if folder.suffix == ".safetensors" and folder.is_file():
        raise errors.ConfigError(
            "one file of weights, which says neither sizes nor words",
            where=source,
            fix=f"write it as a folder: python -m t2i_jax convert single --input={source} "
            "--like=DIR --output_dir=NEW",
        )
    if not folder.is_dir():
        raise errors.ConfigError(
            "no such folder",
            where=str(folder),
            fix="give the --workdir of a run, the folder of an exported model or of a pipeline, "
            "hf:org/name, or builtin:shapes",
        )
    if not (folder / "config.json").exists():
        raise errors.ConfigError(
            "no config.json there",
            where=str(folder),
            fix="give the folder that train.py wrote (its --workdir), t2i_jax export made, or a "
            "whole pipeline; adapters go with --lora beside theirs",
        )
    return folder


def read_config(folder: pathlib.Path) -> ml_collections.ConfigDict:
    """The config of a run: plain values from its config.json."""
    path = folder / "config.json"
    hf.check_regular(path)
    fix, of = "restore the file from a copy of the run", (ValueError, RecursionError)
    with errors.explained(errors.DataError, "not JSON", where=path, fix=fix, of=of):
        values = json.loads(files.read_text(path))
    if not isinstance(values, dict) or "objective" not in values:
        raise errors.DataError(
            "no key 'objective' in it",
            where=str(path),
            fix="give a folder that train.py wrote, or of a pipeline the folder above",
        )
    # Not isinstance, by which True would be a whole number.
    if wrong := [key for key in KINDS if key in values and type(values[key]) is not KINDS[key]]:
        what = f"{wrong[0]!r} is {values[wrong[0]]!r:.50} in it, not {KINDS[wrong[0]].__name__}"
        raise errors.DataError(what, where=str(path), fix=fix)
    _check_size(values, path)
    with describes(path):
        return config_of(values)


def describes(path: pathlib.Path):
    """Turns what a senseless config.json makes of the body, which builds its nets, into one error.

    Raises:
      DataError: names the file.
    """
    what = "it describes no model that can be built"
    fix = "restore the file from a copy, or see --debug"
    say = lambda e: f"{errors.named(e)} in {errors.place(e)}"
    return errors.explained(errors.DataError, what, where=path, fix=fix, of=SENSELESS, say=say)


def config_at(source: str) -> ml_collections.ConfigDict:
    """The config of a run, an exported model or a pretrained pipeline."""
    if is_pipeline(source):
        return config_of(folders.described(source))
    return read_config(locate(source))


def is_pipeline(source: str) -> bool:
    """Whether it is a pretrained pipeline. The hub has models of ours, too."""
    return folders.is_pipeline(source) and not is_ours(source)


def config_of(values: dict) -> ml_collections.ConfigDict:
    """A config of the values that a run wrote, perhaps before some keys were known."""
    younger = {"lora": {}, "text": {}, "best": "", "watch": {}, "rollbacks": 0}
    younger |= {"minutes": 0.0, "save_minutes": 0.0, "size": (), "attention": "auto", "int8": ""}
    values = younger | values
    values["size"] = tuple(values["size"])
    values["text"] = {"dtype": "float32"} | values["text"]
    if values.keys() >= {"objective", "model", "load"}:
        values["model"] = objective.model_by_net(values)
    return ml_collections.ConfigDict(values)


def _check_size(values, path) -> None:
    """Raises ConfigError for networks that are no sensible size, before any time goes into one."""
    limits = {"depth": 512}
    sizes = [("res", values.get("res"), hf.LARGEST["res"])]
    sizes += [("size", side, hf.LARGEST["res"]) for side in values.get("size", ())]
    sizes += [("text_length", values.get("text_length"), hf.LARGE)]
    rest = [("model", values.get("model"))]
    while rest:
        name, value = rest.pop()
        if isinstance(value, dict):
            rest += [(f"{name}.{key}", inner) for key, inner in value.items()]
        else:
            sizes.append((name, value, limits.get(name.rpartition(".")[2], hf.LARGE)))
    for name, value, limit in sizes:
        # Not `value > limit`, which NaN would pass. JSON of Python may hold NaN.
        if isinstance(value, int | float) and not value <= limit:
            raise errors.ConfigError(
                f"{name} is {value!r:.50}", where=str(path), fix=f"it should be at most {limit}"
            )


def abstract_batch(family: objective.Objective, batch_size: int):
    """Shapes and types of a batch as losses see it, without data."""
    one = {name: jax.ShapeDtypeStruct((), kind) for name, kind in ALWAYS.items()}
    one |= {key: shape for each in family.inputs for key, shape in each.shapes.items()}
    kind = lambda s: "float32" if sharding.is_image(s.dtype, len(s.shape) + 1) else s.dtype
    return jax.tree.map(lambda s: jax.ShapeDtypeStruct((batch_size, *s.shape), kind(s)), one)


def abstract_nets(family: objective.Objective, config):
    """net -> shapes of its variables, trained and frozen."""
    # The key is abstract, too: shapes need no device.
    key = jax.eval_shape(lambda: jax.random.key(0))
    return jax.eval_shape(family.init, key, abstract_batch(family, config.batch_size))


def frozen_shapes(family: objective.Objective, config, *, except_nets=(), shapes=None):
    """The shapes of the frozen nets, in the types that their files store, or in eight bits as
    `config.int8` says. Checks that every net that `config.load` names has a readable source; nets
    in `except_nets` are not checked.

    Args:
      shapes: what `abstract_nets` gave, where it is known: it takes a second.
    Raises:
      ConfigError: `config.load` or `config.int8` names an unknown net, or a run that there is not,
        or a frozen net has no source.
      DataError: a pretrained encoder's checkpoint lacks tensors or has others.
    """
    found = _frozen_shapes(family, config, except_nets, shapes)
    named = _in_eight_bits(found, config.int8, "config.int8")
    return found | {name: jax.eval_shape(int8.stored, found[name]) for name in named}


def _frozen_shapes(family, config, except_nets, shapes):
    """As `frozen_shapes`, of what is read."""
    shapes = checked_shapes(config, shapes or abstract_nets(family, config), except_nets)
    found = {name: shape for name, shape in shapes.items() if name not in family.trained}
    for name in found:
        if name not in sources(config) and not config.allow_random:
            raise errors.ConfigError(
                f"frozen net {name!r} has no weights",
                where="config.load",
                fix=f"set config.load.{name} to a checkpoint, or train with a :debug config",
            )
    return found


def checked_shapes(config, shapes, except_nets=()):
    """The shapes of nets, of those that pretrained checkpoints hold in the types stored there.

    Raises: as `frozen_shapes`, where a source that `config.load` names is not readable.
    """
    shapes = dict(shapes)
    for name, source in sources(config).items():
        errors.check_known("net", name, shapes, where="config.load")
        if name in except_nets:
            continue
        if is_ours(source):
            folder, theirs = _trained(source, name)
            _check_output(name, config, theirs, read_config(folder))
            if name in config.lora and (res := read_config(folder).res) != config.res:
                raise errors.ConfigError(
                    f"adapters for pictures of {config.res} pixels a side, of a net for {res}",
                    where="config.res",
                    fix=f"set it to {res}, or train the net itself (config.init_from) instead",
                )
            check_trained(folder, {theirs: shapes[name]}, where=f"config.load.{name}")
        else:
            _check_there(name, source)
            shapes[name] = opener.check(source, shapes[name])
    return shapes


def _check_output(name: str, config, theirs: str, trained) -> None:
    """Raises ConfigError where a net's output means something else here than it was trained for."""
    here, there = objective.outputs(config).get(name), objective.outputs(trained).get(theirs)
    if here and there and here != there:
        raise errors.ConfigError(
            f"its output is read as {here!r}, and it was trained as {there!r}",
            where=f"config.load.{name}",
            fix=f"set its prediction to {there!r}",
        )


def frozen(family: objective.Objective, config, shardings=None, *, except_nets=(), shapes=None):
    """The nets no loss trains, filled from `config.load`, or random where the config allows it.

    Args:
      shardings: of a tree of shapes, such as `Layout.nets`; default: this process's first device.
      except_nets: names of nets that come from elsewhere.
      shapes: as of `frozen_shapes`.
    """
    shapes = _frozen_shapes(family, config, except_nets, shapes)
    wanted = {name: shape for name, shape in shapes.items() if name not in except_nets}
    eight = _in_eight_bits(shapes, config.int8, "config.int8")
    return dict(_filled(family, config, wanted, shardings, eight))


def pretrained(family: objective.Objective, config, shardings=None):
    """The trained nets that `config.load` names, as they are there; `shardings` as in `frozen`."""
    shapes = abstract_nets(family, config)
    named = sources(config).keys() & set(family.trained)
    wanted = {name: shapes[name] for name in sorted(named)}
    return dict(_filled(family, config, wanted, shardings))


class OnDemand(Mapping):
    """Nets that are loaded each time one asks for them, and not kept.

    makers: net -> a function that gives its variables.
    """

    def __init__(self, makers: Mapping[str, Callable]):
        self._makers = makers

    def __getitem__(self, name):
        return self._makers[name]()

    def __iter__(self):
        return iter(self._makers)

    def __len__(self):
        return len(self._makers)

    def __or__(self, nets):
        """With more nets, which are kept."""
        return OnDemand(self._makers | {name: lambda net=net: net for name, net in nets.items()})


def _filled(family, config, shapes, shardings, eight_bits=()) -> OnDemand:
    """Nets of these shapes, of `config.load` where it names them, else random.

    eight_bits: names of nets whose kernels are stored so.
    """
    given = sources(config)

    def fill(name, target):
        if name in given:
            net = load_net(given[name], name, target)
        else:
            # The run's seed: a random frozen net must be the same at each start.
            key = jax.random.key(config.seed)
            batch = abstract_batch(family, 1)
            zeros = jax.tree.map(lambda s: np.zeros(s.shape, s.dtype), batch)
            # Within jit, what computes the other nets is dropped as unused.
            net = jax.jit(lambda k, b: family.init(k, b)[name])(key, zeros)
        if name in eight_bits:
            net = int8.stored(net)
            target = _placed({name: jax.eval_shape(lambda: net)}, shardings)[name]
        return jax.device_put(net, jax.tree.map(lambda s: s.sharding, target))

    targets = _placed(shapes, shardings)
    return OnDemand({name: functools.partial(fill, name, s) for name, s in targets.items()})


def imported(family: objective.Objective, config, shardings=None) -> OnDemand:
    """All nets of a pipeline that was opened as it is, in the types that its files store, or in
    eight bits where `config.int8` says so; `shardings` as in `frozen`.
    """
    shapes = checked_shapes(config, abstract_nets(family, config))
    eight = _in_eight_bits(shapes, config.int8, "int8")
    return _filled(family, config, shapes, shardings, eight)


def in_eight_bits(nets, names: str):
    """The nets, with the kernels of those that are named in eight bits; see `int8`."""
    names = _in_eight_bits(nets, names, "int8")
    return nets | {name: int8.stored(nets[name]) for name in names}


def _in_eight_bits(nets, names: str, where: str) -> list[str]:
    """The nets that an option names with commas; ConfigError for one that there is not."""
    named = [name.strip() for name in names.split(",") if name.strip()]
    for name in named:
        errors.check_known("net", name, nets, where=where)
    return named


def sources(config) -> dict:
    """net -> where its weights come from, of `config.load`, without empty entries."""
    found = {name: opener.parse(source) for name, source in config.load.items()}
    return {name: source for name, source in found.items() if source}


def named(load) -> list[str]:
    """All sources of `net -> source or sources`."""
    parsed = map(opener.parse, (load or {}).values())
    return [one for source in parsed for one in opener.each(source)]


def override(config, given) -> None:
    """Puts net -> source in place of what a read config says.

    Raises:
      ConfigError: a net that it does not load.
    """
    for name, source in given.items():
        errors.check_known("net", name, config.load, where="--load", say="the model loads no")
        # A ConfigDict refuses another type, such as a text in place of several.
        with config.ignore_type():
            config.load[name] = source


def frozen_digests(folder: pathlib.Path, step: int | None) -> dict[str, str] | str | None:
    """Of the frozen nets that a run's checkpoint or an exported model was trained with.

    net -> digest; of older ones a single digest of all nets, or None.
    """
    if not (folder / EXPORTED).exists():
        return checkpoint.Checkpoints(folder, create=False).meta(step).get("frozen")
    note = _stored(folder)[1].get("frozen")
    what, fix = "its note of the frozen nets is not JSON", "copy or export the model again"
    with errors.explained(errors.DataError, what, where=folder / EXPORTED, fix=fix):
        return json.loads(note) if note and note.startswith("{") else note


def load_net(source, name: str, target):
    """One net's variables from a run, an exported model, or a pretrained checkpoint.

    A run's net of another name stands after "#": "runs/flow#model".
    """
    logging.info("%s: %s", name, source)
    if not isinstance(source, str) and any(map(is_ours, source)):
        raise errors.ConfigError(
            f"a run of ours among several encoders: {source}",
            where=f"config.load.{name}",
            fix="give pretrained checkpoints, or the run alone",
        )
    if is_ours(source):
        folder, theirs = _trained(source, name)
        return load_trained(folder, {theirs: target}, step=None)[0][theirs]
    return opener.load(source, target)


def mark(source: str) -> str:
    """A string that tells the weights at a source of `config.load` from others there: of a run, its
    newest checkpoint's; else see `tensors.mark`.
    """
    if not is_ours(source):
        return tensors.mark(hf.locate(source))
    folder = locate(str(hf.split(source)[0]))
    if (folder / EXPORTED).exists():
        return tensors.mark(folder)
    checkpoints = checkpoint.Checkpoints(folder, create=False)
    return checkpoints.mark(checkpoints.choose())


def _check_there(name: str, source) -> None:
    """Raises ConfigError for a path that is no folder, which may have been a run's."""
    for one in opener.each(source):
        path, part = hf.split(one)
        name_alone = len(path.parts) < 2 and not part  # such as "minilm"
        if one.startswith("hf:") or name_alone or path.is_dir():
            continue
        several = "" if isinstance(source, str) else "; commas separate several checkpoints"
        raise errors.ConfigError(
            f"no such folder{several}",
            where=f"config.load.{name}={one}",
            fix="give a run's --workdir or an exported model (#net behind it names another of its "
            "nets), builtin:…, or a pretrained checkpoint's folder or hf:org/name",
        )


def digests(nets) -> dict[str, str]:
    """net -> the digest of its variables."""
    # Widened: a net is the same, whichever type its file stores the numbers in.
    return {name: fingerprint.digest({name: net}, widened=True) for name, net in nets.items()}


def check_frozen(nets, known: dict[str, str] | str | None, found=None) -> None:
    """Raises ConfigError unless the frozen nets are those of which digests are known, if any are.

    known: what `frozen_digests` gave.   found: what `digests` gave of `nets`, where it was asked.
    """
    if not known:
        return
    if isinstance(known, str):
        changed = [] if fingerprint.matches(nets, known) else sorted(nets)
    else:
        found = found or digests(nets)
        changed = [name for name in sorted(nets) if known.get(name) != found[name]]
    if changed:
        raise errors.ConfigError(
            f"the frozen nets {changed} are not those the run was trained with",
            where="config.load",
            fix="bring their files back, or use a new --workdir with --config.init_from",
        )


def _trained(source: str, name: str) -> tuple[pathlib.Path, str]:
    """The folder of a run or model of ours, and the name there of the net that is `name` here.

    Raises:
      ConfigError: no such folder, or it has no such net of its own.
    """
    whole, theirs = hf.split(source)
    folder, theirs = locate(str(whole)), theirs or name
    config = read_config(folder)
    if theirs not in (known := {*config.optim, *nets_in(folder)}):
        if origin := sources(config).get(theirs):
            message, fix = "did not train its", f"give what it was loaded from: {origin!r}"
        else:
            message, fix = "has no", errors.nearest(theirs, known)
        raise errors.ConfigError(
            f"that run {message} net {theirs!r}", where=f"config.load.{name}={source}", fix=fix
        )
    return folder, theirs


def _placed(shapes, shardings):
    where = shardings(shapes) if shardings else jax.tree.map(lambda _: _here(), shapes)
    return sharding.on(shapes, where)


def _here():
    # Local: the first of all devices may belong to another process.
    return jax.sharding.SingleDeviceSharding(jax.local_devices()[0])


def is_ours(source) -> bool:
    """Whether it is a run or a model of this project: its config.json names an objective."""
    if not isinstance(source, str):
        return False  # several pretrained encoders
    if source.startswith("builtin:"):
        return True
    hub, (folder, net) = source.startswith("hf:"), hf.split(source)
    try:
        path = (hf.described(source) if hub else folder) / "config.json"
        return path.is_file() and "objective" in json.loads(files.read_text(path))
    except (OSError, ValueError, TypeError, RecursionError):
        # A run's net, whose broken config.json `read_config` will tell; of the hub it is a part's
        # name, and what cannot be fetched is told where it is opened.
        return bool(net) and not hub


def load_trained(folder: pathlib.Path, targets, *, step: int | str | None, averaged: bool = True):
    """Trained nets (averaged where the run averages them) and the step they are of.

    The nets have the shapes of `targets`; an exported model has no step: None.

    Args:
      step: a number, "best", or None for the newest.
      averaged: False for the parameters themselves.
    """
    if (folder / EXPORTED).exists():
        if step is not None:
            raise errors.ConfigError(
                f"an exported model has no step {step}", where=str(folder), fix="leave out --step"
            )
        hf.check_regular(folder / EXPORTED)
        return tensors.load(tensors.match(folder, targets, tensors.OURS)), None
    checkpoints = checkpoint.Checkpoints(folder, create=False)
    step = checkpoints.choose(step)
    placed = sharding.on(targets, jax.tree.map(lambda s: s.sharding or _here(), targets))
    ema = _averaged(folder, targets) if averaged else []
    return checkpoints.restore_nets(step, placed, ema), step


def check_trained(folder: pathlib.Path, shapes, *, where: str) -> None:
    """Raises ConfigError where the newest nets there have other arrays than these.

    It reads no more than the names and shapes of what is stored.

    where: the key of the config that names the run or model.
    """
    exported = nets_in(folder)  # a file that cannot be read has advice of its own
    try:
        if exported:
            tensors.match(folder, shapes, tensors.OURS)
        else:
            checkpoints = checkpoint.Checkpoints(folder, create=False)
            checkpoints.check_nets(checkpoints.choose(None), shapes, _averaged(folder, shapes))
    except checkpoint.Damaged:
        raise
    except errors.DataError as e:  # whose advice is for a start of that run itself
        fix = f"describe the nets in config.model as {folder / 'config.json'} does"
        raise errors.ConfigError(e.what, where=f"{where}, {folder}", fix=fix) from e


def _averaged(folder: pathlib.Path, nets) -> list[str]:
    """Those of the nets whose parameters the run averages."""
    return [name for name in read_config(folder).ema if name in nets]


def nets_in(folder: pathlib.Path) -> list[str]:
    """The nets that an exported model's file holds; none if the folder is a run's."""
    if not (folder / EXPORTED).exists():
        return []
    stored, _ = _stored(folder)
    return sorted({name.partition("/")[0] for name in stored})


def export(
    folder: pathlib.Path,
    nets,
    config,
    *,
    card: str,
    dtype="float16",
    frozen: dict[str, str] | None = None,
    known=None,
) -> None:
    """Writes model.safetensors, config.json and README.md: what sampling needs beside the frozen
    nets, of which it notes the digests `frozen`; and words.txt of the `known` words.
    """
    flat = traverse_util.flatten_dict(dict(nets), sep="/")
    note = {"frozen": json.dumps(frozen)} if frozen else None
    flat = {name: np.asarray(jax.device_get(v)) for name, v in flat.items()}
    tensors.check_room(flat, dtype)
    arrays = {name: x.astype(dtype) for name, x in flat.items()}
    folder.mkdir(parents=True, exist_ok=True)
    # The config comes after the weights: by it a folder counts as a model, see `locate`.
    images.write_whole(folder / EXPORTED, safetensors.numpy.save(arrays, note))
    images.write_whole(folder / "config.json", to_json(config).encode())
    images.write_whole(folder / "README.md", card.encode())
    if known:
        words.write(folder, known)


def to_json(config) -> str:
    """A config as its file: paths become texts, numbers of numpy Python's.

    Raises:
      ConfigError: a value that JSON has no form for.
    """
    return json.dumps(_plain(config.to_dict(), "config"), indent=2, sort_keys=True) + "\n"


def _plain(value, where: str):
    if hasattr(value, "items"):
        return {str(key): _plain(child, f"{where}.{key}") for key, child in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(child, f"{where}[{i}]") for i, child in enumerate(value)]
    if isinstance(value, pathlib.PurePath):
        return str(value)
    if isinstance(value, np.generic):
        value = value.item()
    if not isinstance(value, str | int | float | None):
        raise errors.ConfigError(
            f"{value!r:.100} is a {type(value).__name__}, which config.json cannot hold",
            where=where,
            fix="give texts, numbers, lists and dictionaries of them",
        )
    return value


def _stored(folder: pathlib.Path):
    """The tensors of an exported model's file, by name, and its notes."""
    hf.check_regular(folder / EXPORTED)
    return tensors.header(folder / EXPORTED)
