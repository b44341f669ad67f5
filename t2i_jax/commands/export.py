"""Exports a run.   python -m t2i_jax export --workdir=runs/flow --output=models/flow

--format=diffusers writes a run that began with a diffusers folder as such a folder again; of
adapters pytorch_lora_weights.safetensors alone, or with --merge the whole folder. It writes a
trained autoencoder as the folder of one.
"""

import pathlib

from absl import flags

from t2i_jax.commands import cli

WORKDIR = flags.DEFINE_string("workdir", None, "A run of train.py.")
STEP, LOAD = cli.step_flag(), cli.load_flag()
OUTPUT = flags.DEFINE_string("output", None, "A new folder.")
CARD = flags.DEFINE_string("card", None, "A Markdown file to go with the weights.")
DTYPE = flags.DEFINE_enum("dtype", "float16", ["float16", "float32"], "Type of the stored weights.")
FORMAT = flags.DEFINE_enum("format", "own", ["own", "diffusers"], "Layout of what is written.")
MERGE = flags.DEFINE_bool("merge", False, "Add LoRA adapters to the nets they adapt.")


def main():
    from t2i_jax import errors, images

    output = pathlib.Path(OUTPUT.value)
    images.check_folder(output, "--output")
    if output.exists() and any(output.iterdir()):
        raise errors.ConfigError("the folder is not empty", where=str(output), fix="name a new one")
    card = _read_card(CARD.value) if CARD.value else ""
    from t2i_jax import lora, pipeline, weights

    # The export holds the trained nets. Frozen ones stay where they are, known by their digests.
    pipe = pipeline.Pipeline.load(WORKDIR.value, step=STEP.value, load=cli.loads(LOAD))
    nets, config, names = pipe.nets, pipe.config, pipe.predictor.objective.trained
    if MERGE.value and not config.lora:
        raise errors.ConfigError("no adapters to merge", where=WORKDIR.value, fix="omit --merge")
    if MERGE.value:
        nets, config = lora.merge_run(nets, config)
        names = [name.removesuffix(lora.SUFFIX) for name in names]
    exported = {name: nets[name] for name in names}
    if FORMAT.value == "diffusers":
        _to_diffusers(output, exported, config)
        return print(output)
    frozen = {
        name: net
        for name, net in nets.items()
        if name not in exported and name in weights.sources(config)
    }
    needed = [f"{name} from {weights.sources(config).get(name)}" for name in frozen]
    card = card or _card(needed)
    options = dict(card=card, dtype=DTYPE.value, frozen=weights.digests(frozen), known=pipe.words)
    weights.export(output, exported, config, **options)
    print(output)


def _to_diffusers(output, nets, config) -> None:
    from t2i_jax import errors, lora, objective, plugins, weights
    from t2i_jax.pretrained import lora_files, opener, writer

    family = plugins.load("objectives", config.objective)
    if hasattr(family, "diffusers"):
        name, module = family.diffusers(config)
        return writer.autoencoder(module, nets[name]["params"], output, DTYPE.value)
    opened = writer.of_run(config)
    params = {name.removesuffix(lora.SUFFIX): net["params"] for name, net in nets.items()}
    if not config.lora:
        parts, others = opened.by_part(params), writer.elsewhere(opened, weights.sources(config))
        # A run of ours has no file's names for what was trained further.
        others = {p: s for p, s in others.items() if not (p in parts and weights.is_ours(s))}
        return writer.pipeline(opened, output, parts, DTYPE.value, others)
    if whole := sorted(nets.keys() - {f"{name}{lora.SUFFIX}" for name in config.lora}):
        raise errors.ConfigError(
            f"a file of adapters has no room for {', '.join(whole)}, which the run trained whole",
            where="--format=diffusers",
            fix="add --merge, which writes the whole folder",
        )
    adapters = opened.by_part(lora.scaled(params, config.lora))
    plain = config.copy_and_resolve_references()
    plain.lora = {}
    # The names of tensors come from a plan of the whole nets. An adapter has no tensor in the
    # folder.
    shapes = weights.abstract_nets(objective.make(plain), plain)
    shapes = opened.by_part({name: net["params"] for name, net in shapes.items()})
    plans = {
        part: opener.open(opened.part(part)).plan({"params": shapes[part]}) for part in adapters
    }
    lora_files.write(output, adapters, plans, DTYPE.value)


def _read_card(path: str) -> str:
    from t2i_jax import errors, files

    where, fix = f"--card={path}", "name a text file"
    with errors.explained(errors.ConfigError, "cannot read it", where=where, fix=fix):
        return files.read_text(path)


def _card(needed) -> str:
    text = "# A model made with t2i_jax\n"
    return text + f"\nIt needs {', '.join(needed)} beside it.\n" * bool(needed)


if __name__ == "__main__":
    cli.run(main, required=("workdir", "output"))
