"""Compares runs by quality and cost.

python -m t2i_jax compare runs/flow runs/gan --output=report

writes report.md and report.html with these parts:

- a table of the newest results by each protocol, and of the last evaluation
- curves over images seen and over core-hours
- the newest images of each run, and those of its fixed prompts over the training

--into=docs/results.md also puts the tables there, between lines <!-- runs --> and <!-- /runs -->.
"""

import base64
import collections
import contextlib
import html
import io
import itertools
import json
import math
import os
import pathlib
from typing import NamedTuple

import numpy as np
from absl import flags
from PIL import Image

from t2i_jax import errors, files, images
from t2i_jax.commands import cli
from t2i_jax.quality import protocol
from t2i_jax.run import metrics

OUTPUT = flags.DEFINE_string("output", "report", "The folder to write; it is made.")
METRIC = flags.DEFINE_string("metric", None, 'What to rank by; "-x" says that less x is better.')
CURVES = flags.DEFINE_list("curves", [], "Metrics to draw; by default the ranked one and losses.")
INTO = flags.DEFINE_string("into", None, "A Markdown file that the tables are put into, too.")
MARKS = ("<!-- runs -->", "<!-- /runs -->")
SHOWN = (
    "full_match",
    "accuracy",
    "diversity",
    "fid",
    "fd-",
    "kid",
    "kd-",
    "precision",
    "recall",
    "clip_score",
    "mean",
)
NO_METRICS = ("step", "seconds", "num_images", "broken")  # numbers of a row that are no metrics
DIGITS = 4  # significant digits of a metric
ENVIRONMENT = 2**20  # bytes of the largest env.txt, which names every device
PROGRESS = 6  # most grids side by side
TITLE = "Runs compared"
STYLE = """body{font-family:sans-serif} td,th{padding:.2em .6em;text-align:right}
figure{display:inline-block;vertical-align:top} figcaption{max-width:400px}
img:not([alt=curves]){min-width:400px;image-rendering:pixelated}"""


class Run(NamedTuple):
    """The content of a workdir.

    cores: CPU cores or accelerators, for core-hours.
    seconds: (step, core-seconds of training since the row before), from times.jsonl.
    events: rows of evaluations during the training.
    results: protocol -> its newest row of results.jsonl.
    losses: rows of metrics.jsonl.
    pictures: the files of fixed prompts, by step.
    """

    name: str
    config: dict
    cores: int
    seconds: list[tuple[int, float]]
    events: list[dict]
    results: dict[str, dict]
    losses: list[dict]
    pictures: list[pathlib.Path]

    @property
    def steps(self) -> int:
        return self.losses[-1]["step"] if self.losses else 0

    def images_at(self, step: int) -> int:
        """The number of images that training has seen by then."""
        return step * self.config["batch_size"]

    def hours_at(self, step: int) -> float:
        """Core-hours of training by then, without compiling and evaluating."""
        # Rows are apart by `log_every` steps. Between two of them time is taken as even.
        before, total = 0, 0.0
        for at, seconds in self.seconds:
            if at >= step:
                total += seconds * (step - before) / (at - before)
                break
            before, total = at, total + seconds
        return total / 3600

    def values(self) -> dict[str, float]:
        """Metric, as "protocol/name" or "evaluator/name" -> its newest value."""
        # Rows are in the order of steps, so later values replace earlier ones.
        values = {k: v for row in self.events for k, v in row.items() if k != "step"}
        for name, row in self.results.items():
            values |= {f"{name}/{k}": v for k, v in row.items() if k not in NO_METRICS}
        # `type`, as `isinstance` would take True for an int.
        return {k: v for k, v in values.items() if type(v) in (int, float)}


def read(workdirs) -> list[Run]:
    """Reads workdirs. Runs are named by the shortest ends of their paths that differ.

    Raises:
      ConfigError: a folder is named twice or holds no run.
      DataError: a file of a run is broken.
    """
    folders = [pathlib.Path(os.path.abspath(workdir)) for workdir in workdirs]
    if len(set(folders)) < len(folders):
        raise errors.misused("a run is given twice", "name each folder once")
    runs = [_read(folder, _name(folder, folders)) for folder in folders]
    # Results by one protocol with two definitions, such as other seeds, do not compare. They get
    # columns of their own, protocol@definition.
    definitions = {key for run in runs for key in run.results}
    count = collections.Counter(name for name, _ in definitions)
    label = {key: "@".join(key) if count[key[0]] > 1 else key[0] for key in definitions}
    return [r._replace(results={label[k]: row for k, row in r.results.items()}) for r in runs]


def _name(folder: pathlib.Path, folders) -> str:
    """The shortest end of a path that no other path has."""
    # It ends: `read` refuses equal folders, and absolute paths differ as a whole at the latest.
    for n in itertools.count(1):
        end = folder.parts[-n:]
        if [other.parts[-n:] for other in folders].count(end) == 1:
            return str(pathlib.Path(*end))


def _read(folder: pathlib.Path, name: str) -> Run:
    """A run. The keys of its results are (protocol, first digits of its definition)."""
    needed = [folder / "config.json", folder / "metrics.jsonl"]
    lacking = next((file.name for file in needed if not file.is_file()), None)
    fix = "give the --workdir of a training, not an exported model"
    of = (*errors.UNREADABLE, KeyError, TypeError)
    with errors.explained(errors.ConfigError, "no run", where=folder, fix=fix, of=of):
        if lacking:
            raise ValueError(f"no {lacking} in it" if folder.is_dir() else "no such folder")
        config = json.loads(files.read_text(needed[0]))
        # A KeyError here means no run. Later it would look like a fault of this command.
        config["batch_size"], config["objective"]
    # A run may go on elsewhere, so rows have cores of their own; older ones have none.
    cores, losses = _cores(folder / "env.txt"), _rows(needed[1])
    timed = [
        (r["step"], r["seconds"] * r.get("cores", cores)) for r in _rows(folder / "times.jsonl")
    ]
    steps = losses[-1]["step"] if losses else 0
    return Run(
        name,
        config,
        cores,
        timed,
        _rows(folder / "events.jsonl"),
        {
            (row["protocol"], _definition(row)[:6]): row
            for row in _rows(folder / "results.jsonl")
            # Those of a run that was begun again are of steps that the new one has not done.
            if "protocol" in row and (row.get("step") or 0) <= steps
        },
        losses,
        sorted((folder / "samples").glob(f"step_{'[0-9]' * 8}.png"), key=_step),
    )


def _cores(path: pathlib.Path) -> int:
    """The cores of env.txt; 1 where an older version did not note them."""
    with _reading(path):
        if not path.exists():
            return 1
        environment = json.loads(files.read_text(path, limit=ENVIRONMENT))
        cores = environment.get("cores", 1) if isinstance(environment, dict) else None
        if type(cores) is not int or cores < 1:
            raise ValueError(f"cores is {cores!r:.50}")
        return cores


def _definition(row: dict) -> str:
    """The hash of the protocol of a row of results."""
    if isinstance(row.get("definition"), dict):
        return protocol.digest(row["definition"])
    return str(row.get("definition_sha256", "?"))


def about(runs: list[Run], metric: str, less: bool) -> str:
    """A note on the tables: the ranking metric, the columns, and images judged by protocol."""
    judged = collections.defaultdict(set)
    for run in runs:
        for name, row in run.results.items():
            judged[name].add(int(row.get("num_images") or row["definition"]["num_images"]))
    counts = [f"{' or '.join(map(str, sorted(n)))} by {k}" for k, n in sorted(judged.items())]
    ranked = f"Ranked by {metric}, {'less' if less else 'more'} is better."
    text = ranked if metric else "Not ranked: the runs have no metric in common."
    columns = collections.defaultdict(list)
    for name in _columns(runs, metric):
        source, _, short = name.partition("/")
        columns[source].append(short)
    shown = [f"{', '.join(shorts)} by {source}" for source, shorts in columns.items()]
    text += f" Columns: {'; '.join(shown)}." if shown else ""
    return f"{text} Pictures judged: {', '.join(counts)}." if counts else text


def table(runs: list[Run], metric: str, less: bool) -> list[list[str]]:
    """Rows of text, first the head. The best run by `metric` comes first, if there is a metric."""
    names = _columns(runs, metric)
    sign = 1 if less else -1
    shorts = [_short(name) for name in names]
    heads = [s if shorts.count(s) == 1 else n for n, s in zip(names, shorts, strict=True)]
    head = ["run", "family", "steps", "images seen", "core-hours", "images / core-s", *heads]
    rows = [head]
    # Sign · sign · ∞ is ∞: a run without the metric comes last in either direction.
    # So does one whose metric is NaN, which no order knows.
    rank = lambda value: sign * value if math.isfinite(value) else math.inf
    for run in sorted(runs, key=lambda r: rank(r.values().get(metric, math.inf))):
        hours, seen = run.hours_at(run.steps), run.images_at(run.steps)
        cost = [_three(hours), _three(seen / hours / 3600)] if hours else ["", ""]
        newest = run.values()
        values = [f"{newest[n]:.{DIGITS}g}" if n in newest else "" for n in names]
        rows.append(
            [run.name, run.config["objective"], f"{run.steps:,}", f"{seen:,}", *cost, *values]
        )
    return rows


def _columns(runs: list[Run], metric: str) -> list[str]:
    """The metrics that a table shows, the ranked one first."""
    measured = {name for run in runs for name in run.values()}
    names = sorted(n for n in measured if any(_short(n).startswith(s) for s in SHOWN))
    return ([metric] if metric else []) + [name for name in names if name != metric]


def economy(runs: list[Run], metric: str, less: bool) -> list[list[str]]:
    """A table of the core-hours until each run reaches shares of the best value of all runs."""
    reached = {
        run.name: [
            (run.hours_at(row["step"]), row[metric])
            for row in run.events
            if metric in row and math.isfinite(row[metric])
        ]
        for run in runs
    }
    values = [v for points in reached.values() for _, v in points]
    best = (min if less else max)(values, default=0)
    if best <= 0 or min(values) == max(values):
        return []  # shares of such a value would say nothing
    shares = (2.0, 1.5, 1.2, 1.0) if less else (0.5, 0.8, 0.9, 1.0)
    sign = "≤" if less else "≥"
    rows = [["core-hours until", *(f"{metric} {sign} {best * s:.3g}" for s in shares)]]
    for run, points in reached.items():
        good = lambda v, s: v <= best * s if less else v >= best * s
        first = [min((h for h, v in points if good(v, s)), default=None) for s in shares]
        rows.append([run, *("never" if h is None else _three(h) for h in first)])
    return rows


def curves(runs: list[Run], names: list[str]) -> bytes | None:
    """A PNG of each metric over images seen and over core-hours; None without any points.

    Raises:
      ConfigError: matplotlib is not installed.
    """
    what, where, fix = "curves need matplotlib", "t2i_jax compare", 'pip install ".[report]"'
    with errors.explained(errors.ConfigError, what, where=where, fix=fix, of=ImportError):
        from matplotlib import figure
    points = {
        name: {
            run.name: [
                (run.images_at(row["step"]), run.hours_at(row["step"]), row[name])
                for row in _thinned([r for r in (*run.losses, *run.events) if name in r])
            ]
            for run in runs
        }
        for name in names
    }
    points = {name: by_run for name, by_run in points.items() if any(by_run.values())}
    if not points:
        return None
    drawing = figure.Figure(figsize=(10, 3 * len(points)), layout="constrained")
    for (name, by_run), axes in zip(
        points.items(), drawing.subplots(len(points), 2, squeeze=False), strict=True
    ):
        for column, label in enumerate(("images seen", "core-hours")):
            for run, line in by_run.items():
                axes[column].plot([p[column] for p in line], [p[2] for p in line], label=run)
            axes[column].set(xlabel=label, ylabel=name)
            axes[column].grid(alpha=0.3)
            if name.endswith("/loss"):
                axes[column].set_yscale("log")
        axes[0].legend()
    # `figure.Figure` without pyplot needs no display and keeps no global state.
    buffer = io.BytesIO()
    drawing.savefig(buffer, format="png", dpi=80)
    return buffer.getvalue()


def _thinned(rows, most: int = 200):
    """About `most` rows at even distances, the last of each stretch."""
    step = max(len(rows) // most, 1)
    return rows[step - 1 :: step]


def _short(name: str) -> str:
    return name.partition("/")[2]


def _three(value: float) -> str:
    """A number with three significant digits, or whole from 100 on."""
    return f"{value:.3g}" if value < 100 else f"{value:,.0f}"


def _rows(path: pathlib.Path) -> list[dict]:
    with _reading(path):
        data = path.read_bytes() if path.exists() else b""
        # A kill may have cut the last line. The next start removes it.
        lines = data[: data.rfind(b"\n") + 1].splitlines()
        rows = [json.loads(line) for line in lines]
        if not all(isinstance(row, dict) for row in rows):
            raise ValueError("a row is no object")
        return rows


@contextlib.contextmanager
def _reading(path: pathlib.Path):
    """Makes one error, which names the file, of all that reading a run's file raises."""
    fix = "restore it from a copy of the run"
    with errors.explained(errors.DataError, "not readable", where=path, fix=fix):
        if path.exists() and not path.is_file():  # opening a named pipe would block
            raise ValueError("it is no file")
        yield


def markdown(note, tables, pictures=()) -> str:
    """The report as Markdown.

    Args:
      note: a paragraph.
      tables: lists of rows.
      pictures: (name of a file in the same folder, its PNG, title, prompts).
    """
    parts = [f"{note}\n"]
    for head, *rows in filter(None, tables):
        lines = ["| " + " | ".join(row) + " |" for row in (head, *rows)]
        parts.append("\n".join([lines[0], "|" + "---|" * len(head), *lines[1:]]) + "\n")
    for name, _, title, prompts in pictures:
        items = "".join(f"{i}. {prompt}\n" for i, prompt in enumerate(prompts, 1))
        parts.append(f"**{title}**\n\n![{title}]({name})\n\n{items}")
    return "\n".join(parts)


def page(note, tables, pictures) -> str:
    """The report as one HTML file that holds its images. For the arguments see `markdown`."""
    parts = [
        f'<!doctype html><meta charset="utf-8"><title>{TITLE}</title><style>{STYLE}</style>',
        f"<h1>{TITLE}</h1><p>{html.escape(note)}</p>",
    ]
    for rows in filter(None, tables):
        # Names and prompts are text from anywhere. Unescaped they could bring tags into the page.
        cells = [
            "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in row)
            for row, tag in zip(rows, ["th", *["td"] * (len(rows) - 1)], strict=True)
        ]
        parts.append("<table>" + "".join(f"<tr>{row}</tr>" for row in cells) + "</table>")
    for _, data, title, prompts in pictures:
        source = f"data:image/png;base64,{base64.b64encode(data).decode()}"
        picture = f'<img src="{source}" alt="{html.escape(title)}">'
        items = "".join(f"<li>{html.escape(prompt)}</li>" for prompt in prompts)
        caption = f"<b>{html.escape(title)}</b><ol>{items}</ol>"
        parts.append(f"<figure>{picture}<figcaption>{caption}</figcaption></figure>")
    return "\n".join(parts)


def main(workdirs):
    # ---- Read the runs and check the flags ----
    images.check_folder(OUTPUT.value, "--output")
    runs = read(workdirs)
    asked = METRIC.value or _main_metric(runs)
    metric = asked.removeprefix("-")
    less = asked.startswith("-") or metrics.falls(metric)
    there = {name for run in runs for name in run.values()}
    if metric:
        errors.check_known("metric", metric, there, where="--metric")
    measured = {name for run in runs for row in (*run.losses, *run.events) for name in row}
    for name in CURVES.value:
        errors.check_known("metric", name, measured - {"step"}, where="--curves")
    # Read before anything is written, as the file may lack the marks.
    into = _marked(INTO.value) if INTO.value else None
    # ---- Images, notes and tables ----
    losses = sorted({k for run in runs for row in run.losses[-1:] for k in row if "/loss" in k})
    png = curves(runs, CURVES.value or [metric, *losses])
    pictures = [("curves.png", png, "curves", [])] if png else []
    for i, run in enumerate(runs, 1):
        for new in run.pictures[-1:]:
            title = f"{run.name}, step {_step(new)}"
            pictures += [(f"run{i}.png", new.read_bytes(), title, _prompts(new))]
        pictures += filter(None, [_progress(run, f"progress{i}.png")])
    note = about(runs, metric, less)
    tables = [table(runs, metric, less), economy(runs, metric, less)]
    # ---- Write them ----
    folder = pathlib.Path(OUTPUT.value)
    text = f"# {TITLE}\n\n{markdown(note, tables, pictures)}"
    with images.writing(folder, "--output"):
        folder.mkdir(parents=True, exist_ok=True)
        for name, data, *_ in pictures:
            images.write_whole(folder / name, data)
        images.write_whole(folder / "report.md", text.encode())
        images.write_whole(folder / "report.html", page(note, tables, pictures).encode())
        if into:
            text = f"{into[0]}{MARKS[0]}\n{markdown(note, tables)}{MARKS[1]}{into[1]}"
            images.write_whole(INTO.value, text.encode())
    print(folder / "report.md", folder / "report.html")


def _step(picture: pathlib.Path) -> int:
    return int(picture.stem.removeprefix("step_"))


def _prompts(picture: pathlib.Path) -> list:
    return (images.read_metadata(picture) or {}).get("prompts", [])


def _progress(run: Run, name: str):
    """Grids of fixed prompts over the training, side by side; None of fewer than two.

    Each comes after about twice as many steps as the one before. Grids of other prompts than the
    newest are left out.
    """
    # From the newest backwards, each at half the steps of the one after it or at fewer.
    chosen, grids = [], []
    for picture in reversed(run.pictures):
        if chosen and (len(chosen) == PROGRESS or 2 * _step(picture) > _step(chosen[0])):
            continue
        with Image.open(picture, formats=["PNG"]) as image:
            grid = np.asarray(image.convert("RGB"))
        if not grids or (grid.shape, _prompts(picture)) == (grids[0].shape, _prompts(chosen[0])):
            chosen.insert(0, picture)
            grids.insert(0, grid)
    if len(grids) < 2:
        return None
    data = io.BytesIO()
    Image.fromarray(images.grid(np.stack(grids), len(grids), gap=8)).save(data, "png")
    steps = ", ".join(str(_step(picture)) for picture in chosen)
    return name, data.getvalue(), f"{run.name} after steps {steps}", []


def _main_metric(runs) -> str:
    """The first metric of SHOWN that all runs have; "" if there is none."""
    common = sorted(set.intersection(*(set(run.values()) for run in runs)))
    return next((n for s in SHOWN for n in common if _short(n).startswith(s)), "")


def _marked(path: str) -> tuple[str, str]:
    """The text of a Markdown file before and after the marks."""
    fix = "name a Markdown file"
    with errors.explained(errors.ConfigError, "not readable", where=path, fix=fix):
        text = files.read_text(path)
    before, _, rest = text.partition(MARKS[0])
    _, end, after = rest.partition(MARKS[1])
    if not end:
        raise errors.ConfigError(
            "no place for the tables", where=path, fix=f"write {MARKS[0]} and {MARKS[1]} into it"
        )
    return before, after


if __name__ == "__main__":
    cli.run(main, arguments="workdir")
