"""What a program will need: memory, operations and traffic, also on TPUs that are not at hand."""

import collections
import math
import os
import pathlib
import re
from typing import NamedTuple

import jax

from t2i_jax import errors, loop
from t2i_jax.pretrained import hf

# Memory of one chip, bytes. Google Cloud's documentation of TPU v4, v5e, v5p, v6e.
HBM = {"v4": 32 * 2**30, "v5e": 16 * 2**30, "v5p": 95 * 2**30, "v6e": 32 * 2**30}
UNITS = (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10), ("bytes", 1))
CALLS = "body|calls|to_apply|true_computation|false_computation"
KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
# Operations that compute. Traffic while one of them runs is hidden.
WORK = ("fusion", "convolution", "dot", "custom-call", "while", "call")


def slice_devices(name: str):
    """The devices of a TPU slice by name, such as "v5e:2x4". Programs can be compiled for them.

    Raises:
      ConfigError: libtpu is not installed, or it has no such slice.
    """
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # there is no metadata server to ask
    from jax.experimental import topologies

    # By default hosts have four chips, but there are some of a single one.
    host = {"chips_per_host_bounds": (1, 1, 1)} if name.endswith(":1x1") else {}
    what, where = f"cannot compile for {name!r}", "--topology"
    fix = 'pip install ".[tpu-aot]", and name a slice such as v5e:1x1, v5e:2x4, v5p:2x2x1'
    # Exception: the plugin raises many kinds.
    with errors.explained(errors.ConfigError, what, where=where, fix=fix, of=Exception):
        return topologies.get_topology_desc(platform="tpu", topology_name=name, **host).devices


class Traffic(NamedTuple):
    """All collectives of one kind in one run of a program.

    count: how many there are.
    bytes: the size of their results on one device.
    hidden: the bytes that travel while something is computed, by the compiler's schedule.
    """

    count: int
    bytes: int
    hidden: int


class Needs(NamedTuple):
    """What one program needs. Sizes are bytes on each device.

    donated: the arguments whose memory is used again for results.
    peak: arguments, temporaries and results together.
    flops: operations of all devices together.
    traffic: kind of collective -> `Traffic`.
    fits: whether the peak fits the memory; None where that is unknown.
    """

    arguments: int
    donated: int
    temporaries: int
    peak: int
    flops: int
    traffic: dict[str, Traffic]
    fits: bool | None


def needs(traced, *, memory: int | None = None) -> Needs:
    """Compiles a program and reads what it needs.

    Args:
      traced: the result of `jax.jit(f).trace(…)`.
      memory: bytes of one device, if known.
    Raises:
      DoesNotFit: the compiler refuses the program, as it needs more memory than the device has.
    """
    try:
        compiled = traced.lower().compile()
    except jax.errors.JaxRuntimeError as e:
        if "RESOURCE_EXHAUSTED" not in str(e):  # JAX has no type of its own for this error
            raise
        raise DoesNotFit(str(e)) from e
    m = compiled.memory_analysis()
    # Results that take the memory of donated arguments (aliases) would count twice.
    peak = (
        m.argument_size_in_bytes
        + m.temp_size_in_bytes
        + m.output_size_in_bytes
        - m.alias_size_in_bytes
    )
    return Needs(
        arguments=m.argument_size_in_bytes,
        donated=m.alias_size_in_bytes,
        temporaries=m.temp_size_in_bytes,
        peak=peak,
        flops=flops(traced.jaxpr),
        traffic=traffic(compiled.as_text()),
        fits=None if memory is None else peak <= memory,
    )


def show(config, workdir, *, topology=None, memory_gb=None) -> dict:
    """Compiles the step of a run and prints what it needs. Nothing is written, and of pretrained
    checkpoints only the configs are read.

    Args:
      topology: the TPU slice to compile for, see `slice_devices`. By default the devices at hand.
      memory_gb: memory of one device in GiB. By default that of the topology's chip.
    Returns:
      The printed values by name, as of `training`.
    Raises:
      ConfigError: a memory that is not positive, or an unknown topology.
    """
    # Written so that it fails for NaN, too, of which every comparison is false.
    if memory_gb is not None and not 0 < memory_gb < math.inf:
        raise errors.ConfigError(
            f"memory_gb is {memory_gb}",
            where="--memory_gb",
            fix="give one device's GiB, such as 16",
        )
    devices = slice_devices(topology) if topology else None
    memory = int(memory_gb * 2**30) if memory_gb else HBM.get((topology or "").split(":")[0])
    if config.data.get("path") == "":  # the program is the same for any pictures
        config.data = dict(source="shapes", size=1)
    with hf.configs_alone():
        values = training(loop.Run(config, pathlib.Path(workdir), devices), memory)
    for name, value in values.items():
        print(f"{name.removesuffix('_bytes'):28} {_readable(name, value):>20}")
    return values


def check_fits(values: dict) -> None:
    """Raises ConfigError where the values of `show` say that the step does not fit the memory."""
    if values.get("fits") is False:
        raise errors.ConfigError(
            "a step needs more memory than one device has",
            where="--memory_gb or --topology",
            fix="take a smaller config.batch_size, a larger config.accumulate, "
            "--config.strategy=fsdp, or more devices",
        )


def _readable(name: str, value) -> str:
    """A value of `show` as text, with its unit."""
    if isinstance(value, bool | None):
        return str(value)
    if not name.endswith("bytes"):
        return f"{value:,}"
    unit, size = next((u, s) for u, s in UNITS if value >= s or s == 1)
    return f"{value / size:,.2f} {unit}" if size > 1 else f"{value} {unit}"


def training(run, memory: int | None = None) -> dict:
    """What one step of a `loop.Run` needs, by name. Bytes are those of each device.

    Args:
      memory: bytes of one device. With it the values say whether the step "fits".
    """
    size = lambda tree: sum(math.prod(x.shape) for x in jax.tree.leaves(tree))
    values = {f"parameters/{name}": size(net["params"]) for name, net in run.shapes.nets.items()}
    values |= {f"frozen/{name}": size(net) for name, net in run.frozen.items()}
    values["devices"] = run.layout.mesh.size
    try:
        need = needs(run.trace(), memory=memory)
    except DoesNotFit as e:
        return values | {"peak_bytes": e.used, "fits": False}
    values |= {
        # The step donates its state and nothing else (`loop.Run`).
        "state_bytes": need.donated,
        "argument_bytes": need.arguments,
        "temporary_bytes": need.temporaries,
        "peak_bytes": need.peak,
        "flops_per_image": need.flops // run.config.batch_size,
    }
    for kind, moved in need.traffic.items():
        values |= {f"{kind}/count": moved.count, f"{kind}/bytes": moved.bytes}
        values |= {f"{kind}/hidden_bytes": moved.hidden} if moved.hidden else {}
    return values if memory is None else values | {"memory_bytes": memory, "fits": need.fits}


class DoesNotFit(Exception):
    """The compiler refused a program. used: the bytes it wanted, or None if it did not say."""

    def __init__(self, message: str):
        super().__init__(message)
        used = re.search(r"Used ([\d.]+)([KMG]) of [\d.]+[KMG] hbm", message) or re.search(
            r"required for HLO temporaries \(([\d.]+)([KMG])\)", message
        )
        scale = {"K": 2**10, "M": 2**20, "G": 2**30}
        self.used = int(float(used[1]) * scale[used[2]]) if used else None


def flops(jaxpr) -> int:
    """Operations of all matrix products and convolutions of a jaxpr. A multiply-add counts as two.

    The body of a scan counts as often as it runs. Rematerialised operations count again. Of several
    branches the most expensive one counts.
    """
    # The jaxpr and not the compiled program: XLA's own count takes the body of a loop once.
    total = 0
    for eqn in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        name, shape = eqn.primitive.name, lambda v: v.aval.shape
        if name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            # Each entry of the result is a sum over the contracted axes: 2 m n k in all.
            inner = math.prod(shape(eqn.invars[0])[i] for i in contracted)
            total += 2 * math.prod(shape(eqn.outvars[0])) * inner
        elif name == "conv_general_dilated":
            # `rhs_spec` begins with the axis of output channels. A grouped kernel has its group's
            # inputs alone.
            kernel, out = eqn.invars[1], eqn.params["dimension_numbers"].rhs_spec[0]
            inner = math.prod(shape(kernel)) // shape(kernel)[out]
            total += 2 * math.prod(shape(eqn.outvars[0])) * inner
        else:
            inside = [flops(sub) for sub in _inside(eqn)]
            times = eqn.params.get("length", 1) if name == "scan" else 1
            if name == "pallas_call":  # its body is that of one block
                times = math.prod(eqn.params["grid_mapping"].grid)
            if name == "shard_map":  # its body has the shapes of one device
                sizes = dict(eqn.params["mesh"].shape)
                times = math.prod(sizes[axis] for axis in eqn.params["manual_axes"])
            total += times * (max(inside, default=0) if name == "cond" else sum(inside))
    return total


def _inside(eqn):
    for value in eqn.params.values():
        for leaf in value if isinstance(value, tuple | list) else (value,):
            if hasattr(leaf, "eqns") or hasattr(leaf, "jaxpr"):
                yield leaf


def traffic(text: str) -> dict[str, Traffic]:
    """Collectives by kind in a compiled program. Loop bodies count as often as they run.

    Args:
      text: the program as HLO, from `compiled.as_text()`.
    """
    program = _Program(text)
    totals = collections.defaultdict(lambda: Traffic(0, 0, 0))
    for name, times in program.runs().items():
        for i, line in enumerate(program.computations[name]):
            match = re.search(rf" = (.*?) ({'|'.join(KINDS)})(-start)?\(", line)
            channel = re.search(r"channel_id=\d+,", line)
            # A fused collective appears in several fusions. It counts in the one that starts it.
            fused = bool(channel) and channel[0] in program.fused
            if not match or (fused and name not in program.starts):
                continue
            # The type of a start also holds the operands, except for an all-reduce.
            result, kind, start = match.groups()
            size = times * _size(result, halved=bool(start) and kind != "all-reduce")
            if fused:
                hidden = program.works_in_fusions(channel[0])
            else:
                hidden = bool(start) and program.works_beside(name, i)
            old = totals[kind]
            totals[kind] = Traffic(old.count + times, old.bytes + size, old.hidden + size * hidden)
    return dict(totals)


class _Program:
    """The text of a compiled program, cut into computations.

    computations: name -> lines. The entry computation has the name "".
    starts, ends: fusions into which XLA:TPU wrote the start or the end of a collective.
    fused: channel of such a collective -> the names of all its fusions.
    """

    def __init__(self, text: str):
        self.computations, current = {}, None
        for line in text.splitlines():
            if head := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line):
                current = self.computations.setdefault("" if head[1] else head[2], [])
            elif current is not None and " = " in line:
                current.append(line)
        self.starts, self.ends = set(), set()
        channels = collections.defaultdict(set)
        for name, lines in self.computations.items():
            whole = "\n".join(lines)
            if "AsyncCollectiveStart" in whole:
                self.starts.add(name)
            if "AsyncCollectiveDone" in whole:
                self.ends.add(name)
            for channel in re.findall(r"channel_id=\d+,", whole):
                channels[channel].add(name)
        self.fused = {c: names for c, names in channels.items() if names & self.starts}

    def runs(self) -> dict[str, int]:
        """Computation -> how often it runs in one run of the program."""
        runs = collections.Counter()

        def visit(name, times):
            runs[name] += times
            for line in self.computations[name]:
                called = re.findall(rf"({CALLS})=%?([\w.\-]+)", line)
                # Of a conditional one branch runs. All count, as nobody knows which.
                for branches in re.findall(r"branch_computations=\{(.*?)\}", line):
                    called += [("branch", name) for name in re.findall(r"[\w.\-]+", branches)]
                for key, name in called:
                    if name in self.computations:
                        visit(name, times * (self._trips(line) if key == "body" else 1))

        visit("", 1)
        return runs

    def works_beside(self, name: str, i: int) -> bool:
        """Whether anything is computed between the start of a collective in line i and its end."""
        lines = self.computations[name][i:]
        for line in lines[1:]:
            if re.search(rf"-done\(.*{re.escape(_name(lines[0]))}\b", line):
                return False
            if _works(line):
                return True
        return False

    def works_in_fusions(self, channel: str) -> bool:
        """The same as `works_beside`, for a collective whose start and end are fusions."""
        starts, ends = self.fused[channel] & self.starts, self.fused[channel] & self.ends
        for lines in self.computations.values() if starts and ends else ():
            at = [i for i, x in enumerate(lines) if _calls(x, starts)]
            to = [i for i, x in enumerate(lines) if _calls(x, ends)]
            if at and to:
                return any(map(_works, lines[at[0] + 1 : to[-1]]))
        return False

    def _trips(self, line: str) -> int:
        """How often a while loop runs its body; 1 where the text does not tell."""
        # XLA notes it on some loops. On others the condition compares a counter with a constant,
        # and the body adds a constant to that counter.
        if noted := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', line):
            return int(noted[1])
        parts = [re.search(rf"{key}=%?([\w.\-]+)", line)[1] for key in ("condition", "body")]
        condition, body = ({_name(x): x for x in self.computations[p]} for p in parts)
        for test in condition.values():
            if ask := re.search(r"compare\((%[\w.\-]+), (%[\w.\-]+)\), direction=LT", test):
                limit, place = _number(condition, ask[2]), _index(condition, ask[1])
                roots = [x for x in body.values() if "ROOT" in x and " tuple(" in x]
                if limit is None or place is None or not roots:
                    continue
                counter = re.findall(r"%[\w.\-]+", roots[0].split(" tuple(")[1])[place]
                added = re.search(r" add\((%[\w.\-]+), (%[\w.\-]+)\)", body.get(counter, ""))
                steps = [_number(body, x) for x in added.groups()] if added else []
                # A scan counts from 0. Its last step may pass the limit, so the division rounds up.
                return -(-limit // next((x for x in steps if x), 1))
        return 1


def _name(line: str) -> str:
    return re.match(r"\s*(?:ROOT )?(%?[\w.\-]+) = ", line)[1]


def _number(lines, name: str) -> int | None:
    constant = re.search(r" constant\((\d+)\)", lines.get(name, ""))
    return int(constant[1]) if constant else None


def _index(lines, name: str) -> int | None:
    element = re.search(r" get-tuple-element\(.*\), index=(\d+)", lines.get(name, ""))
    return int(element[1]) if element else None


def _works(line: str) -> bool:
    return bool(re.search(rf" ({'|'.join(WORK)})\(", line))


def _calls(line: str, names) -> bool:
    call = re.search(r"calls=%?([\w.\-]+)", line)
    return bool(call) and call[1] in names


def _size(result: str, *, halved: bool) -> int:
    """Bytes of a result's type in HLO.

    halved: the type is that of a start, (operands, results, flags). Only the results count.
    """
    sizes = [
        _width(kind) * math.prod(int(n) for n in dims.split(",") if n)
        for kind, dims in re.findall(r"(\w+)\[([\d,]*)\]", result)
        # The start of a collective-permute also has u32 scalars, which are no data.
        if not (halved and kind == "u32" and not dims)
    ]
    return sum(sizes[len(sizes) // 2 :]) if halved else sum(sizes)


def _width(kind: str) -> int:
    """Bytes of one number of a type in HLO, such as bf16, f8e4m3fn or pred."""
    bits = re.search(r"\d+", kind)
    return max(int(bits[0]) // 8, 1) if bits else 1
