"""Which run gives most for its cost.   python -m t2i_jax.compare runs/flow runs/gan --output=report

writes report.md and report.html with a table of the newest results by each protocol and of the last
evaluation, curves over images seen and over core-hours, and the newest pictures side by side.
--into=docs/results.md puts the tables there, too, between lines <!-- runs --> and <!-- /runs -->.
"""

import base64
import html
import io
import json
import pathlib
from typing import NamedTuple

from absl import flags

from t2i_jax import cli, errors, images

OUTPUT = flags.DEFINE_string("output", "report", "The folder to write; it is made.")
METRIC = flags.DEFINE_string("metric", None, 'What to rank by, "-" before it where less is better.')
CURVES = flags.DEFINE_list("curves", [], "Metrics to draw; by default the ranked one and losses.")
INTO = flags.DEFINE_string("into", None, "A Markdown file that the tables are put into, too.")
MARKS = ("<!-- runs -->", "<!-- /runs -->")
SHOWN = ("full_match", "fid", "fd-", "kid", "kd-", "precision", "recall", "clip_score", "mean")
LESS = ("fid", "fd-", "kid", "kd-", "mean")  # is better; of SHOWN
NO_METRICS = ("step", "seconds", "num_images", "broken")  # numbers of a row that judge nothing
DIGITS = 4


class Run(NamedTuple):
    """What a workdir tells.

    seconds: [(step, seconds of training up to it)]. results: by what measured them, the newest.
    events: rows of evaluations during the training.
    """

    name: str
    config: dict
    cores: int
    seconds: list[tuple[int, float]]
    events: list[dict]
    results: dict[str, dict]
    losses: list[dict]
    picture: pathlib.Path | None

    @property
    def steps(self) -> int:
        return self.losses[-1]["step"] if self.losses else 0

    def images_at(self, step: int) -> int:
        """Images seen in training."""
        return step * self.config["batch_size"]

    def hours_at(self, step: int) -> float:
        """Core-hours of training, without compiling and evaluating."""
        before, total = 0, 0.0
        for at, seconds in self.seconds:
            if at >= step:
                total += seconds * (step - before) / (at - before)
                break
            before, total = at, total + seconds
        return total * self.cores / 3600

    def values(self) -> dict[str, float]:
        """Metric -> its newest value, by protocol or by evaluator."""
        found = {k: v for row in self.events for k, v in row.items() if k != "step"}
        for protocol, row in self.results.items():
            found |= {f"{protocol}/{k}": v for k, v in row.items() if k not in NO_METRICS}
        return {k: v for k, v in found.items() if type(v) in (int, float)}


def read(workdir: str) -> Run:
    """Raises ConfigError where there is no run."""
    folder = pathlib.Path(workdir)
    try:
        config = json.loads((folder / "config.json").read_text())
        config["batch_size"], config["objective"]
    except (OSError, ValueError, KeyError) as e:
        raise errors.ConfigError(
            f"no run: {e}", where=str(folder), fix="give the --workdir of a training"
        ) from e
    try:
        environment = json.loads((folder / "env.txt").read_text())
    except (OSError, ValueError):
        environment = {}
    seconds = [(row["step"], row["seconds"]) for row in _rows(folder / "times.jsonl")]
    made = [row for row in _rows(folder / "results.jsonl") if "protocol" in row]
    results = {row["protocol"]: row for row in made}
    drawn = sorted((folder / "samples").glob("step_*.png"))
    return Run(
        folder.name,
        config,
        environment.get("cores", 1),
        seconds,
        _rows(folder / "events.jsonl"),
        results,
        _rows(folder / "metrics.jsonl"),
        drawn[-1] if drawn else None,
    )


def table(runs: list[Run], metric: str | None) -> list[list[str]]:
    """Rows of text, the first the head; sorted by the metric, the best first."""
    common = {name for run in runs for name in run.values()}
    names = sorted(n for n in common if any(_short(n).startswith(s) for s in SHOWN))
    key = (metric or "").removeprefix("-")
    names = ([key] if key else []) + [name for name in names if name != key]
    sign = -1 if (metric or "").startswith("-") else 1
    ranked = sorted(runs, key=lambda r: -sign * r.values().get(key, -sign * float("inf")))
    head = ["run", "family", "steps", "images seen", "core-hours", "images / core-s", *names]
    rows = [head]
    for run in ranked if key else runs:
        hours, seen = run.hours_at(run.steps), run.images_at(run.steps)
        cost = [f"{hours:.2f}", f"{seen / hours / 3600:.1f}"] if hours else ["", ""]
        found = run.values()
        values = [f"{found[n]:.{DIGITS}g}" if n in found else "" for n in names]
        rows.append(
            [run.name, run.config["objective"], f"{run.steps:,}", f"{seen:,}", *cost, *values]
        )
    return rows


def economy(runs: list[Run], metric: str) -> list[list[str]]:
    """Core-hours until a run first reaches shares of the best value that any of them reached."""
    name, less = metric.removeprefix("-"), metric.startswith("-")
    reached = {
        run.name: [(run.hours_at(row["step"]), row[name]) for row in run.events if name in row]
        for run in runs
    }
    values = [v for points in reached.values() for _, v in points]
    if not values:
        return []
    best = min(values) if less else max(values)
    shares = (2.0, 1.5, 1.2, 1.0) if less else (0.5, 0.8, 0.9, 1.0)
    sign = "≤" if less else "≥"
    rows = [["core-hours until", *(f"{name} {sign} {best * s:.3g}" for s in shares)]]
    for run, points in reached.items():
        good = lambda v, s: v <= best * s if less else v >= best * s
        first = [min((h for h, v in points if good(v, s)), default=None) for s in shares]
        rows.append([run, *("never" if h is None else f"{h:.2f}" for h in first)])
    return rows


def curves(runs: list[Run], names: list[str]) -> bytes | None:
    """A PNG: each metric over images seen and over core-hours."""
    try:
        from matplotlib import figure
    except ImportError as e:
        raise errors.ConfigError(
            "curves need matplotlib", where="t2i_jax.compare", fix='pip install ".[report]"'
        ) from e
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
            for run, found in by_run.items():
                axes[column].plot([p[column] for p in found], [p[2] for p in found], label=run)
            axes[column].set(xlabel=label, ylabel=name)
            axes[column].grid(alpha=0.3)
            if name.endswith("/loss"):
                axes[column].set_yscale("log")
        axes[0].legend()
    buffer = io.BytesIO()
    drawing.savefig(buffer, format="png", dpi=80)
    return buffer.getvalue()


def _thinned(rows, most: int = 200):
    """At most so many rows, each the mean of its stretch's last step."""
    step = max(len(rows) // most, 1)
    return rows[step - 1 :: step]


def _short(name: str) -> str:
    return name.partition("/")[2]


def _rows(path: pathlib.Path) -> list[dict]:
    try:
        return [json.loads(line) for line in path.read_text().splitlines()]
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as e:
        raise errors.DataError(
            f"not readable: {e}", where=str(path), fix="restore it from a copy of the run"
        ) from e


def markdown(tables, pictures) -> str:
    """Tables, and pictures by the names of files beside it."""
    parts = []
    for head, *rows in filter(None, tables):
        lines = ["| " + " | ".join(row) + " |" for row in (head, *rows)]
        parts.append("\n".join([lines[0], "|" + "---|" * len(head), *lines[1:]]) + "\n")
    parts += [f"![{name.removesuffix('.png')}]({name})\n" for name in pictures]
    return "\n".join(parts)


def page(tables, pictures) -> str:
    """The same as one HTML file that holds its pictures."""
    parts = [
        '<!doctype html><meta charset="utf-8"><title>Runs compared</title>',
        "<style>body{font-family:sans-serif}td,th{padding:.2em .6em;text-align:right}",
        "figure{display:inline-block}</style>",
    ]
    for rows in filter(None, tables):
        cells = [
            "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in row)
            for row, tag in zip(rows, ["th", *["td"] * (len(rows) - 1)], strict=True)
        ]
        parts.append("<table>" + "".join(f"<tr>{row}</tr>" for row in cells) + "</table>")
    for name, data in pictures.items():
        source = f"data:image/png;base64,{base64.b64encode(data).decode()}"
        title = html.escape(name.removesuffix(".png"))
        picture = f'<img src="{source}" alt="{title}"><figcaption>{title}</figcaption>'
        parts.append(f"<figure>{picture}</figure>")
    return "\n".join(parts)


def main(workdirs):
    runs = [read(workdir) for workdir in workdirs]
    names = [run.name for run in runs]
    if len(set(names)) < len(names):
        raise errors.ConfigError(
            f"two runs are called alike: {names}", where="the command line", fix="rename a folder"
        )
    metric = METRIC.value or _main_metric(runs)
    known = {name for run in runs for name in run.values()}
    if metric and metric.removeprefix("-") not in known:
        raise errors.ConfigError(
            f"no run has {metric!r}", where="--metric", fix=errors.nearest(metric, known)
        )
    into = _marked(INTO.value) if INTO.value else None
    losses = sorted({k for run in runs for row in run.losses[-1:] for k in row if "/loss" in k})
    drawn = CURVES.value or [*([metric.removeprefix("-")] if metric else []), *losses]
    tables = [table(runs, metric), economy(runs, metric) if metric else []]
    png = curves(runs, drawn)
    pictures = {"curves.png": png} if png else {}
    pictures |= {f"{r.name}.png": r.picture.read_bytes() for r in runs if r.picture}
    folder = pathlib.Path(OUTPUT.value)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, data in pictures.items():
            images.write_whole(folder / name, data)
        images.write_whole(folder / "report.md", markdown(tables, pictures).encode())
        images.write_whole(folder / "report.html", page(tables, pictures).encode())
        if into:
            text = f"{into[0]}{MARKS[0]}\n{markdown(tables, ())}{MARKS[1]}{into[1]}"
            images.write_whole(INTO.value, text.encode())
    except OSError as e:
        raise errors.StorageError(
            f"cannot write there: {e.strerror}", where=str(folder), fix="choose another --output"
        ) from e
    print(folder / "report.md", folder / "report.html")


def _main_metric(runs) -> str | None:
    """One that all runs have, with its sign."""
    common = sorted(set.intersection(*(set(run.values()) for run in runs)))
    found = next((n for s in SHOWN for n in common if _short(n).startswith(s)), None)
    return f"-{found}" if found and _short(found).startswith(LESS) else found


def _marked(path: str) -> tuple[str, str]:
    """The text before and after the marks."""
    try:
        text = pathlib.Path(path).read_text()
    except OSError as e:
        raise errors.ConfigError(
            f"not readable: {e.strerror}", where=path, fix="name a Markdown file"
        ) from e
    before, _, rest = text.partition(MARKS[0])
    _, found, after = rest.partition(MARKS[1])
    if not found:
        raise errors.ConfigError(
            "no place for the tables", where=path, fix=f"write {MARKS[0]} and {MARKS[1]} into it"
        )
    return before, after


if __name__ == "__main__":
    cli.run(main, arguments="workdir")
