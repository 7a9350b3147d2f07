"""The page of a study: a table, a plot, differences, and what a reader has to know."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from muco.base.files import write_text
from muco.base.tables import markdown_table, print_whole, table_of_numbers
from muco.study.design import Study
from muco.study.plots import plot
from muco.study.results import Estimate, differences, point_values, table

if TYPE_CHECKING:
    from rich.console import Console


def write_report(study: Study, found: Mapping[str, Any], output: Path, command: str) -> Path:
    """Writes ``plot.svg`` and ``README.md`` and returns the latter."""
    write_text(output / "plot.svg", plot(study, found))
    page = output / "README.md"
    write_text(page, _page(study, found, command))
    return page


def print_study(study: Study, found: Mapping[str, Any], console: Console) -> None:
    shown = table_of_numbers(study.question, ["run", *(column.title for column in study.columns)])
    for row in table(study, found):
        shown.add_row(row["name"], *_cells(study, row["columns"]))
    print_whole(shown, console)


def _cells(study: Study, estimates: Mapping[str, Estimate]) -> list[str]:
    return [estimates[column.title].text(column.digits) for column in study.columns]


def _page(study: Study, found: Mapping[str, Any], command: str) -> str:
    titles = [column.title for column in study.columns]
    rows = [
        [r["name"], *_cells(study, r["columns"]), f"{r['steps']:.0f}", f"{r['tflops']:.1f}", f"{r['seconds']:.0f}"]
        for r in table(study, found)
    ]
    lines = [f"# {study.question}", "", _made(found, command), ""]
    if study.registered:
        lines += ["Written down before the runs:", "", *(f"- {line}" for line in study.registered), ""]
    lines += [
        "hit@1 in % on held-out images, mean over seeds ± half of the 95 % interval (Student's t).",
        "",
        *markdown_table(["run", *titles, "steps", "TFLOP", "seconds"], rows),
        "",
        "![The table as a plot](plot.svg)",
        "",
    ]
    if study.points:
        lines += [*_points(study, found), ""]
    if study.compared:
        rows = [[f"{d['a']} − {d['b']}", *_cells(study, d["columns"])] for d in differences(study, found)]
        lines += ["Differences in points, paired by seed:", "", *markdown_table(["difference", *titles], rows), ""]
    if found.get("costs"):
        lines += [*_costs(found["costs"]), ""]
    lines += [f"- {note}" for note in study.notes]
    lines.append("- Seconds are of training, on the machine and beside whatever else it did; operations are counted.")
    return "\n".join(lines) + "\n"


def _made(found: Mapping[str, Any], command: str) -> str:
    asked = found["asked"]
    seeds, first, scale = asked["seeds"], asked.get("first_seed", 0), asked["scale"]
    result = found["runs"][0]["result"]
    versions = ", ".join(f"{name} {number}" for name, number in result["versions"].items() if number)
    which = f"{seeds} seed{'s' if seeds > 1 else ''}" + (f", from {first} on" if first else "")
    data = f" of `{asked['data']}`, tested on `{asked['test']}`" if asked.get("data") else ""
    how_much = "all data and steps" if scale == 1 else f"{scale:g} × {'the steps' if data else 'data and steps'}"
    return f"Made by `{command}`; {which}, {how_much}{data}. {versions}."


def _points(study: Study, found: Mapping[str, Any]) -> list[str]:
    rows = [
        [point["series"], point["label"], f"{point['ratio']:.2f} ×", str(point["difference"])]
        for point in point_values(study, found)
    ]
    head = ["start", "image", "seconds of a step", f"{study.columns[0].title}, difference"]
    return ["Points of the plot:", "", *markdown_table(head, rows)]


def _costs(costs: Mapping[str, Mapping[str, float]]) -> list[str]:
    rows = [
        [name, f"{cost['pairs']:.0f}", f"{cost['flops'] / 1e9:.1f}", f"{cost['seconds']:.3f}", f"{cost['spread']:.0%}"]
        for name, cost in costs.items()
    ]
    said = (
        "A step of each, taken before the runs with nothing beside; it sets the steps of runs that equal others. The "
        "runs had three rounds of the same steps, and of each step the quickest try counts. The spread is how much "
        "longer the slowest round took than the quickest: what else the machine did. The seconds of the table above "
        "show how equal the trainings became:"
    )
    return [said, "", *markdown_table(["run", "pairs", "GFLOP", "seconds", "spread"], rows)]
