"""All commands by one name: t2i_jax <command> --flag=…, or python -m t2i_jax <command> …"""

import runpy
import sys

from t2i_jax import errors

COMMANDS = {
    "train": ("t2i_jax.commands.train", "trains a model"),
    "sample": ("t2i_jax.commands.sample", "draws pictures"),
    "evaluate": ("t2i_jax.commands.evaluate", "judges a model, or a folder of pictures"),
    "compare": ("t2i_jax.commands.compare", "compares runs"),
    "export": ("t2i_jax.commands.export", "writes a run's weights as a model"),
    "cache": ("t2i_jax.commands.cache", "runs frozen nets once for all captions and pictures"),
    "verify": ("t2i_jax.commands.verify", "says what each network of a pipeline computes"),
    "convert": ("t2i_jax.commands.convert", "makes image networks from files of torch"),
}


def main() -> None:
    """Runs the command that the first argument names. The other arguments are its flags."""
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in ("-h", "--help", "help"):
        print(
            __doc__, "", *(f"  {name:10}{does}" for name, (_, does) in COMMANDS.items()), sep="\n"
        )
        print("\nt2i_jax <command> --help shows its flags.")
    elif name not in COMMANDS:
        e = errors.unknown("command", name, COMMANDS, where="the command line")
        print(f"t2i_jax: {e}", file=sys.stderr)
        sys.exit(e.exit_code)
    else:
        # The command reads sys.argv itself, where its own name would be no flag.
        del sys.argv[1]
        runpy.run_module(COMMANDS[name][0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
