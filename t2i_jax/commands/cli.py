"""The command line of all commands: flags, and errors as one line with an exit code.

--debug shows tracebacks. Nothing here imports JAX, so that errors of flags come at once.
"""

import ast
import importlib.util
import pathlib
import re
import sys
import threading

from absl import flags, logging

from t2i_jax import errors
from t2i_jax.run import distributed, logs

PATHS = (  # flags that name a file or folder
    *(
        "workdir",
        "checkpoint",
        "load",
        "lora",
        "images",
        "data",
        "reference",
        "protocol",
        "extractor",
    ),
    *("clip", "captions", "output", "output_dir", "into", "card", "prompts_file", "reproduce"),
    *("input", "image", "like", "preview"),
)
_DEBUG = flags.DEFINE_bool("debug", False, "Show tracebacks.")
HELP = ("-h", "--help", "-help")
WANTED = {  # type of a flag -> its values in words
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "step": 'a number or "best"',
    "config dict": "a dictionary, such as '{\"name\": 1}'",
}


def sampling_flags() -> dict:
    """Flags of sampling options. A family refuses those that its sampler does not have."""
    return {
        "guidance": flags.DEFINE_float("guidance", None, "Guidance scale, 1 is none."),
        "steps": flags.DEFINE_integer("steps", None, "Sampling steps."),
        "sampler": flags.DEFINE_string("sampler", None, "Sampler, such as heun or euler."),
        "shift": flags.DEFINE_float("shift", None, "Above 1, more steps in noise; flow models."),
        "truncation": flags.DEFINE_float("truncation", None, "GANs."),
    }


def model_flags() -> dict:
    """Flags that name a model, for `model`."""
    return {
        "workdir": flags.DEFINE_string("workdir", None, "A run of train.py."),
        "checkpoint": flags.DEFINE_string(
            "checkpoint",
            None,
            "builtin:<name>, the folder of an exported model or of a pipeline, or hf:org/name.",
        ),
        "step": step_flag(),
        "load": load_flag(),
        "strategy": flags.DEFINE_enum(
            "strategy", None, ["data", "fsdp"], "fsdp: each of several devices holds a part."
        ),
    }


def opened(options: dict) -> dict:
    """What the flags of `model_flags` ask `Pipeline.load` for, beside the model's name."""
    wanted = {"step": options["step"].value, "load": loads(options["load"])}
    return wanted | given({"strategy": options["strategy"]})


def step_flag():
    """The flag --step: a number, "best" or None."""
    text = 'A run\'s checkpoint, a number or "best"; the newest by default.'
    return flags.DEFINE(_Step(), "step", None, text)


def load_flag():
    """The flag --load, for `loads`."""
    text = "net=DIR: where a pretrained net lies now, such as text=DIR."
    return flags.DEFINE_multi_string("load", [], text)


def loads(flag) -> dict[str, str]:
    """Net -> source, from --load. Raises ConfigError for another form than net=DIR."""
    sources = {}
    for text in flag.value:
        name, equals, source = text.partition("=")
        if not (name and equals and source):
            raise errors.ConfigError(
                f"it is {text!r}", where="--load", fix="give net=DIR, such as text=DIR"
            )
        sources[name] = source
    return sources


def settings(flag, options: dict) -> dict:
    """Options by name, from --set name=value and from the flags of `sampling_flags`.

    Raises:
      ConfigError: another form than name=value, or an option that is set twice.
    """
    values = given(options)
    for text in flag.value:
        name, equals, value = text.partition("=")
        if not (name and equals):
            raise errors.ConfigError(f"it is {text!r}", where="--set", fix="give name=value")
        if name in values:
            raise errors.ConfigError(
                f"{name} is set twice", where=f"--set {text}", fix="give it once"
            )
        try:
            # As flags write a switch, and as Python does.
            value = {"true": "True", "false": "False"}.get(value, value)
            values[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):  # no literal of Python: a plain string
            values[name] = value
    return values


class _Step(flags.ArgumentParser):
    """Parses --step."""

    def parse(self, argument):
        # absl makes an IllegalFlagValueError of int's ValueError, and `_bad_flag` reads that.
        return argument if argument == "best" else int(argument)

    def flag_type(self):
        return "step"


def model(options: dict, *, default: str | None = None, hint: str = "") -> str:
    """The workdir or checkpoint that the flags of `model_flags` name, else the default.

    Args:
      hint: an addition to the fix of the error for no model.
    Raises:
      ConfigError: two models are named, or none and there is no default.
    """
    named = [options[name].value for name in ("workdir", "checkpoint") if options[name].value]
    if len(named) > 1:
        raise errors.misused("two models", "give --workdir or --checkpoint, not both")
    if not (named or default):
        raise errors.misused("no model", f"add --workdir=… or --checkpoint=builtin:shapes{hint}")
    return named[0] if named else default


def process_flags() -> dict:
    """Flags of `distributed.start`."""
    return {
        "distributed": flags.DEFINE_bool(
            "distributed", None, "Join the others of a TPU pod slice, SLURM or Open MPI job."
        ),
        "coordinator": flags.DEFINE_string("coordinator", None, "host:port of process 0."),
        "num_processes": flags.DEFINE_integer("num_processes", None, "Processes in all."),
        "process_id": flags.DEFINE_integer("process_id", None, "This process's number, from 0."),
        "join_timeout": flags.DEFINE_integer("join_timeout", None, "Seconds to wait for all."),
        "heartbeat_timeout": flags.DEFINE_integer(
            "heartbeat_timeout", None, "Seconds of silence after which a process counts as dead."
        ),
    }


def given(options: dict) -> dict:
    """The values of the flags that the command line sets."""
    return {name: flag.value for name, flag in options.items() if flag.value is not None}


def run(main, *, required=(), arguments: str = "", argv=None, more_help=None) -> None:
    """Parses the flags and runs `main()`. An error ends the process with its exit code.

    Args:
      required: names of flags that must be set.
      arguments: the name of arguments without a flag. If set, there must be at least one, and
        `main` gets the list of them.
      argv: by default sys.argv.
      more_help: a function that --help calls after the flags, to print the text that it returns.
    """
    argv = sys.argv if argv is None else argv
    # Before absl parses the flags: that itself can fail.
    debug = any(a.lstrip("-") in ("debug", "debug=true", "debug=1") for a in argv[1:])
    wanted = any(a in HELP for a in argv[1:])
    if wanted:
        # absl files a flag under the module that defines it. Those of `sampling_flags` and the like
        # are this module's.
        ours = (flags.FLAGS.main_module_help(), flags.FLAGS.module_help(sys.modules[__name__]))
        print(sys.modules["__main__"].__doc__, *ours, sep="\n")
    try:
        # absl's own app.run, which would set up its handler, is not used.
        logging.use_absl_handler()
        logging.set_verbosity(logging.INFO)
        logging.set_stderrthreshold(logging.INFO)
        logging.get_absl_handler().addFilter(logs.of_interest)
        if not debug:
            threading.excepthook = _in_background
        if wanted:
            if more_help:
                logging.set_verbosity(logging.ERROR)
                # Nothing is required here: who asks for help may not know yet what is.
                _parse([a for a in argv if a not in HELP], (), arguments="")
                print(more_help())
            sys.exit(0)
        rest = _parse(argv, required, arguments)
        # For a write that no command wraps itself, such as that of a library.
        with errors.of_storage("the file that was being written"):
            main(*[rest] if arguments else [])
    except errors.Error as e:
        if debug:
            raise
        _fail(str(e), e.exit_code)
    except KeyboardInterrupt:
        # 75 is EX_TEMPFAIL, as of `errors.Preempted`: another start goes on.
        _fail("interrupted (at the terminal). Fix: start the same command again to go on", 75)
    except Exception as e:
        if debug:
            raise
        # The death of another process shows as an error of the next exchange with it.
        if lost := distributed.lost_peer(e):
            _fail(lost, 70)
        fix = "mend that line if it is yours; else run again with --debug and report it"
        _fail(f"{errors.named(e)} (at {errors.place(e)}). Fix: {fix}", 70)


def _in_background(args) -> None:
    """Logs the exception of a thread as one line. Code that waits for the thread gets it, too."""
    name = args.thread.name if args.thread else "?"
    logging.warning("thread %s: %s", name, errors.named(args.exc_value))


def _parse(argv, required, arguments) -> list[str]:
    argv = _with_config_files(argv)
    try:
        rest = flags.FLAGS(argv)
        for name in required:  # a config file that failed to load raises only when it is used
            getattr(flags.FLAGS[name].value, "lock", None)
    except Exception as e:  # absl and ml_collections raise many kinds for a bad flag or override
        *_, last = str(e).strip().splitlines() or [type(e).__name__]  # of a config file's traceback
        # An error of a config file arrives as the text of its traceback, without its type.
        if "ConfigError: " in last:
            raise errors.ConfigError(last.partition("ConfigError: ")[2]) from e
        if bad := _bad_flag(e):
            raise bad from e
        # ml_collections gives the key, then perhaps: Did you mean "learning_rate"?
        words = re.findall(r"\w{2,}", str(e.args[0]).replace("\\n", " ")) if e.args else []
        if isinstance(e, KeyError | AttributeError) and words:
            key, *hint = words
            last = f"the config has no key {key!r}"
            last += f"; did you mean {hint[3]!r}?" if len(hint) > 3 else ""
        where = _flag_of(str(e.args[0]), argv) if e.args else "the command line"
        raise errors.ConfigError(
            last[:600],
            where=where,
            fix=f"see {pathlib.Path(argv[0]).name} --help; of a config, flags set the keys that it "
            f"names (a network's sizes by net: {_sizes(argv, where)}), others a config file of "
            "your own",
        ) from e
    # Addresses such as gs:// are refused before a command makes a folder of that name.
    for name in PATHS:
        value = flags.FLAGS[name].value if name in flags.FLAGS else None
        for path in value if isinstance(value, list) else [value or ""]:
            # Of --load, which is net=DIR, only the part behind the equals sign is a path.
            errors.check_local(path.rpartition("=")[2], f"--{name}")
    for path in rest[1:]:
        errors.check_local(path, "the command line")
    if rest[1:] and not arguments:
        raise errors.misused(f"unexpected argument {rest[1]!r}", "flags start with --")
    if arguments and not rest[1:]:
        raise errors.misused(f"no {arguments}", f"name one {arguments} at least")
    for name in required:
        if not flags.FLAGS[name].value:
            raise errors.misused(f"--{name} is missing", f"add --{name}=…")
    return rest[1:]


def _sizes(argv, where: str) -> str:
    """How a flag names a network's size.

    where: the flag at fault. If it is of config.model, the nets of that config are named.
    """
    nets = ["<net>"]
    if where.startswith("--config.model."):
        for argument, after in zip(argv, [*argv[1:], ""], strict=True):
            # Both --config=FILE and --config FILE are allowed.
            flag, equals, text = argument.partition("=")
            if flag.lstrip("-") == "config":
                # The config that failed is gone with its flag, so it is made once more.
                model = flags.FLAGS["config"].parser.parse(text if equals else after).model
                nets = [net for net, sizes in model.items() if hasattr(sizes, "items")] or nets
    return " or ".join(f"--config.model.{net}.width" for net in nets)


def _bad_flag(e: Exception) -> errors.ConfigError | None:
    """The error for an unknown flag or a bad value, from absl's. None for other errors of absl."""
    if isinstance(e, flags.UnrecognizedFlagError):
        names = [name for name in flags.FLAGS if flags.FLAGS[name].help and "." not in name]
        lists = "see --help for all"
        if "set" in flags.FLAGS:
            lists += f"; an option of the model's is --set {e.flagname}=…"
        return errors.misused(
            f"no flag --{e.flagname}",
            errors.nearest(e.flagname.split(".")[0], names, else_say=lists),
        )
    text = " ".join(str(e).split())
    if lacks := re.fullmatch(r"Missing value for flag -*(\S+)", text):
        return errors.ConfigError("no value", where=f"--{lacks[1]}", fix=f"write --{lacks[1]}=…")
    if not (parts := re.match(r"flag --([\w.]+)=(.*?): (.*)", text)):
        return None
    name, value, reason = parts.groups()
    parser = flags.FLAGS[name].parser if name in flags.FLAGS else None
    wanted = WANTED.get(parser.flag_type() if parser else "", "")
    if " as a ConfigDict: " in reason:
        wanted = WANTED["config dict"]
    if isinstance(parser, flags.EnumParser):
        wanted = errors.nearest(value, parser.enum_values)
    elif wanted and (least := getattr(parser, "lower_bound", None)) is not None:
        wanted = f"give {wanted}, {least} or more"
    elif wanted:
        wanted = f"give {wanted}"
    what = f"{name.rpartition('.')[2]} is {value[:200]!r}" if wanted else reason[:300]
    return errors.ConfigError(what, where=f"--{name}", fix=wanted or "see --help")


def configs_folder() -> pathlib.Path:
    """The folder of experiments: inside an installed package, next to it in a checkout."""
    package = pathlib.Path(__file__).parent.parent
    return package / "configs" if (package / "configs").is_dir() else package.parent / "configs"


def import_configs() -> pathlib.Path:
    """Makes `from configs import …` work, also in an installed package.   -> `configs_folder`"""
    folder = configs_folder()
    # Config files import `configs.common`. In an installed package `configs` is on no import path.
    if "configs" not in sys.modules and (folder / "__init__.py").is_file():
        spec = importlib.util.spec_from_file_location(
            "configs", folder / "__init__.py", submodule_search_locations=[str(folder)]
        )
        sys.modules["configs"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules["configs"])
    return folder


def _with_config_files(argv) -> list[str]:
    """The arguments with the name of a config replaced by its file. Makes `configs` importable.

    Raises:
      ConfigError: there is no such file.
    """
    if "config" not in flags.FLAGS:
        return argv
    folder, out = import_configs(), list(argv)
    for i, argument in enumerate(argv[1:], 1):
        flag, equals, value = argument.partition("=")
        if flag in ("--config", "-config") and equals:
            out[i] = f"{flag}={_config_file(value, folder)}"
        elif argument in ("--config", "-config") and i + 1 < len(argv):
            out[i + 1] = _config_file(argv[i + 1], folder)
    return out


def _config_file(text: str, folder: pathlib.Path) -> str:
    """The argument as "file.py:options", from "name:options" or "file.py:options"."""
    name, colon, options = text.partition(":")
    path, ours = pathlib.Path(name), folder / f"{pathlib.Path(name).stem}.py"
    if not path.is_file() and ours.is_file() and str(path.parent) in (".", "configs"):
        path = ours
    if path.is_file():
        # The text is searched, since importing another script would run it.
        if "get_config" not in path.read_text(errors="replace"):
            raise errors.ConfigError(
                "it has no function get_config", where=str(path), fix="name one of configs/"
            )
        return f"{path}{colon}{options}"
    files = [*folder.glob("*.py"), *path.parent.glob("*.py")]
    # In a checkout's root lie scripts that are no configs.
    names = {p.stem for p in files} - {"__init__", "common", "train", "sample", "setup"}
    raise errors.ConfigError(
        f"no config {name!r}", where="--config", fix=errors.nearest(path.stem, names)
    )


def _flag_of(message: str, argv) -> str:
    """The --config.… argument whose key the message mentions, else "the command line"."""
    for argument in argv[1:]:
        key = argument.partition("=")[0].rpartition(".")[2]
        if argument.startswith("--config.") and re.search(rf"\b{re.escape(key)}\b", message):
            return argument[:200]
    return "the command line"


def _fail(text: str, code: int) -> None:
    print(f"t2i_jax: {text}", file=sys.stderr)
    distributed.leave(code)
