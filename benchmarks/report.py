"""The results page: `python -m benchmarks.report` makes RESULTS.md and plots from `results/<device>/<date>.json`.

For each stage of a device, the newest measurement is shown, with its commit. What was not measured is shown as missing;
all numbers come from those files. The table between the two marks in README.md is made along with it.
"""

from __future__ import annotations

import argparse
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

from benchmarks import results
from benchmarks.gates import GATES, rows_of
from benchmarks.measure import Row

COMMAND = "python -m benchmarks.report"
HEADLINE = (  # what README shows for a device: the first row that matches each pattern
    "attention forward .*T=1024 ", "attention backward .*T=1024 ", "add_layer_norm forward", "linear ",
    "linear_cross_entropy",
    "paged decode batch=(384|8) ", "decode \\S+ batch=8 ", "batch job", "training step",
)  # fmt: skip
BEGIN, END = "<!-- made by python -m benchmarks.report -->", "<!-- end -->"


def load(folder: Path) -> dict[str, dict[str, dict[str, Any]]]:
    """Device -> stage -> its newest measurement, with its date: GPUs first, then the most recently measured."""
    found: dict[str, dict[str, dict[str, Any]]] = defaultdict(dict)
    for path in sorted(folder.glob("*/*.json"), key=lambda path: path.stem):
        content = results.read(path)
        for stage, entry in content["stages"].items():
            found[content["device"]][stage] = {**entry, "date": content["date"]}
    newest = {device: max(stage["date"] for stage in stages.values()) for device, stages in found.items()}
    return dict(sorted(found.items(), key=lambda item: (_is_gpu(item[1]), newest[item[0]], item[0]), reverse=True))


def _is_gpu(stages: dict[str, dict[str, Any]]) -> bool:
    return any(entry["sizes"] == "gpu" for entry in stages.values())


# --- the page -------------------------------------------------------------------------------------------------------


def page(devices: dict[str, dict[str, dict[str, Any]]], plots: dict[str, list[str]]) -> str:
    lines = [
        "# Measured results",
        "",
        f"Made by `{COMMAND}` from the files in `results/`; how it is measured is in [README.md](README.md). A time is",
        "the median over turns (20th to 80th percentile); `x` is how many times as long as ours a rival takes.",
        "",
        "## Goals",
        "",
        *goals({device: stages for device, stages in devices.items() if _is_gpu(stages)}),
    ]
    for device, stages in devices.items():
        lines += ["", f"## {device}", "", *_facts(stages)]
        lines += [f"\n![{Path(plot).stem}]({plot})" for plot in plots.get(device, [])]
        for stage, entry in stages.items():
            rows = [row for row in entry["rows"] if "rivals" in row]
            if rows:
                lines += ["", f"### {stage}", "", _origin(entry), "", *table(rows)]
                if entry["note"]:
                    lines += ["", f"Ended early: {entry['note']}."]
            elif any("passed" in row or "failed" in row for row in entry["rows"]):
                lines += ["", f"### {stage}", "", _origin(entry), "", *_tests(entry["rows"])]
    return "\n".join(lines) + "\n"


def goals(devices: dict[str, dict[str, dict[str, Any]]]) -> list[str]:
    """One table per GPU; without any, one in which everything is missing."""
    lines = []
    if not devices:
        lines += ["No GPU has been measured: every line is missing.", ""]
    for device, stages in (devices or {"no GPU": {}}).items():
        rows = rows_of(stages)
        lines += [f"| # | item | {device} | gate | goal | |", "|--:|---|--:|--:|--:|---|"]
        for gate in GATES:
            value, status = gate.judge(rows)
            shown = "missing" if value is None else f"{_number(value)} {gate.what}"
            sign = "<= " if gate.at_most else ">= "
            levels = ["" if level is None else sign + _number(level) for level in (gate.gate, gate.goal)]
            unit = "" if value is not None else f" ({gate.what})"
            lines.append(f"| {gate.number} | {gate.item}{unit} | {shown} | {levels[0]} | {levels[1]} | {status} |")
        lines.append("")
    return lines[:-1]


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _facts(stages: dict[str, dict[str, Any]]) -> list[str]:
    newest = max(stages.values(), key=lambda entry: entry["environment"]["time"])
    environment, ceilings = newest["environment"], newest["ceilings"]
    versions = [
        f"{name} {environment.get(name)}" for name in ("python", "torch", "triton", "cuda") if name in environment
    ]
    packages = environment["packages"]
    there = [f"{name} {version}" for name, version in packages.items() if version]
    lines = [
        ", ".join(versions + there) + ". Not installed: " + (", ".join(n for n in packages if not packages[n]) or "-")
    ]
    if "copy" in ceilings:
        reached = [f"copy {ceilings['copy'] / 1e9:,.1f} GB/s", f"matmul {ceilings['matmul'] / 1e12:,.3g} TFLOP/s"]
        if "launch" in ceilings:
            reached.append(f"an empty replay {1e6 * ceilings['launch']:.1f} us")
        lines.append(f"Ceilings: {', '.join(reached)}.")
    if "nvidia_smi" in environment:
        lines.append(f"`{' / '.join(environment['nvidia_smi'].splitlines()[-1:])}`")
    return ["  \n".join(lines)]


def _origin(entry: dict[str, Any]) -> str:
    environment = entry["environment"]
    ceilings = entry["ceilings"]
    at = (
        f"; copy {ceilings['copy'] / 1e9:,.1f} GB/s, matmul {ceilings['matmul'] / 1e12:,.3g} TFLOP/s"
        if ceilings
        else ""
    )
    load = f"; {environment['load']} processes were waiting or running before" if "load" in environment else ""
    return f"{environment['time']}, commit {environment['commit']}, sizes: {entry['sizes']}{at}{load}"


def table(rows: list[Row]) -> list[str]:
    """One line per row: ours with its share of a ceiling, and every rival."""
    lines = ["| case | ours, us | of a ceiling | rate | peak, MB | rivals |", "|---|--:|--:|--:|--:|---|"]
    for row in rows:
        ours = row["rivals"].get("ours", {})
        time = (
            f"{_number(ours['us'])} ({_number(ours['us_low'])}-{_number(ours['us_high'])})"
            if "us" in ours
            else "missing"
        )
        if "wrong" in row and "ours" in row["wrong"]:
            time = "WRONG"
        shares = [f"{100 * ours[key]:.1f} % {key[3:]}" for key in ("of_matmul", "of_copy") if key in ours]
        if len(shares) == 2:  # the ceiling it comes closer to is the one that bounds it
            shares = [max(zip((ours["of_matmul"], ours["of_copy"]), shares))[1]]
        rate = f"{_number(ours['per_second'])} {row['unit']}/s" if "per_second" in ours else ""
        if not rate and ours.get("tflops"):
            rate = f"{ours['tflops']:.3g} TFLOP/s" if ours["tflops"] >= 0.1 else f"{1e3 * ours['tflops']:.3g} GFLOP/s"
        elif not rate and "gb_s" in ours:
            rate = f"{ours['gb_s']:,.1f} GB/s"
        peak = f"{ours['peak_bytes'] / 1e6:,.1f}" if "peak_bytes" in ours else ""
        rivals = [f"{name} {times:.2f}x" for name, times in row.get("faster_than", {}).items()]
        rivals += [f"{name}: not run ({why[:60]})" for name, why in row.get("not_run", {}).items()]
        rivals += [f"{name}: WRONG" for name in row.get("wrong", {}) if name != "ours"]
        cells = [row["name"], time, ", ".join(shares), rate, peak, "; ".join(rivals)]
        lines.append("| " + " | ".join(cell.replace("|", "/") for cell in cells) + " |")
    return lines


def _tests(rows: list[Row]) -> list[str]:
    total = {what: sum(row.get(what, 0) for row in rows) for what in ("passed", "failed", "skipped")}
    lines = [", ".join(f"{n} {what}" for what, n in total.items())]
    lines += [f"- {row['name']}: {', '.join(row.get('failures', []))}" for row in rows if row.get("failed")]
    lines += [f"- {row['name']}: not run ({row['not_run']['all']})" for row in rows if row.get("not_run")]
    return lines


def headline(devices: dict[str, dict[str, dict[str, Any]]]) -> list[str]:
    """README's table: a few rows of the first device, a GPU if one was measured."""
    if not devices:
        return ["Nothing has been measured yet."]
    device, stages = next(iter(devices.items()))
    rows = [row for name, entry in stages.items() if name != "tuner" for row in entry["rows"] if "rivals" in row]
    chosen = [next((row for row in rows if re.match(pattern, row["name"])), None) for pattern in HEADLINE]
    dates = sorted({entry["date"] for entry in stages.values()})
    command = "python -m benchmarks.gpu" if _is_gpu(stages) else "pytest benchmarks/ --out benchmarks/results"
    lines = [f"{device}, {' and '.join(dates)}, by `{command}`; all of it is in `benchmarks/RESULTS.md`:", ""]
    return lines + table([row for row in chosen if row is not None])


# --- plots ----------------------------------------------------------------------------------------------------------


def draw(device: str, stages: dict[str, dict[str, Any]], folder: Path) -> list[str]:
    """Draws the plots that there is data for, as SVG files in `folder`; returns their names."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    matplotlib.rcParams.update({"svg.hashsalt": "gpt2-kernels", "figure.figsize": (7, 4.2), "axes.grid": True})
    rows = [row for name, entry in stages.items() if name != "tuner" for row in entry["rows"] if row.get("rivals")]
    drawn = []
    for name, plot in (("roofline", _roofline), ("attention", _attention), ("tokens", _tokens)):
        figure, axes = pyplot.subplots()
        if plot(axes, rows, stages):
            axes.set_title(device, fontsize=9)
            axes.legend(fontsize=7)
            figure.tight_layout()
            folder.mkdir(parents=True, exist_ok=True)
            figure.savefig(folder / f"{name}.svg", metadata={"Date": None})
            drawn.append(f"{name}.svg")
        pyplot.close(figure)
    return drawn


def _roofline(axes: Any, rows: list[Row], stages: dict[str, dict[str, Any]]) -> bool:
    """FLOP/s against FLOPs per byte, under the ceilings."""
    points: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for row in rows:
        if {"flops", "moved"} <= row.keys() and "tflops" in row["rivals"].get("ours", {}):
            operator = re.sub(r"( \S*\d).*", "", row["name"])
            points[operator].append((row["flops"] / row["moved"], row["rivals"]["ours"]["tflops"]))
    measured = [entry["ceilings"] for entry in stages.values() if "copy" in entry["ceilings"]]
    if not points or not measured:
        return False
    copy, matmul = (max(ceilings[name] for ceilings in measured) / 1e12 for name in ("copy", "matmul"))
    most = max(x for found in points.values() for x, _ in found)
    xs = [0.1, matmul / copy, max(10 * matmul / copy, 2 * most)]
    axes.loglog(xs, [min(x * copy, matmul) for x in xs], color="black", linewidth=1, label="copy, matmul")
    for operator, found in points.items():
        axes.loglog(*zip(*found), "o", markersize=4, label=operator)
    axes.set(xlabel="FLOPs a byte", ylabel="TFLOP/s")
    return True


def _attention(axes: Any, rows: list[Row], stages: dict[str, dict[str, Any]]) -> bool:
    """TFLOP/s by sequence length, for ours and all rivals, at 12 heads."""
    lines: dict[str, list[tuple[int, float]]] = defaultdict(list)
    for row in rows:
        if found := re.match(r"attention forward B=\d+ T=(\d+) H=12 ", row["name"]):
            for name, facts in row["rivals"].items():
                if "tflops" in facts:
                    lines[name].append((int(found.group(1)), facts["tflops"]))
    for name, found in lines.items():
        axes.plot(*zip(*sorted(found)), "o-", markersize=4, label=name)
    axes.set_xscale("log", base=2)
    axes.set(xlabel="sequence length", ylabel="causal attention forward, TFLOP/s", ylim=(0, None))
    return bool(lines)


def _tokens(axes: Any, rows: list[Row], stages: dict[str, dict[str, Any]]) -> bool:
    """Decoded tokens/s by batch size, for the model that was measured at the most sizes."""
    lines: dict[str, dict[str, list[tuple[int, float]]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        if found := re.match(r"decode (\S+) batch=(\d+) ", row["name"]):
            for name, facts in row["rivals"].items():
                if "per_second" in facts:
                    lines[found.group(1)][name].append((int(found.group(2)), facts["per_second"]))
    if not lines:
        return False
    model = max(lines, key=lambda model: max(map(len, lines[model].values())))
    for name, found in lines[model].items():
        axes.loglog(*zip(*sorted(found)), "o-", markersize=4, label=name, base=2)
    axes.set(xlabel="batch size", ylabel=f"{model}, decoded tokens/s")
    return True


# --- writing --------------------------------------------------------------------------------------------------------


def write(folder: Path, out: Path, readme: Path | None) -> None:
    devices = load(folder)
    plots = {}
    for device, stages in devices.items():
        home = folder / results.slug(device)
        plots[device] = [f"{folder.name}/{home.name}/{name}" for name in draw(device, stages, home)]
    out.write_text(page(devices, plots), encoding="utf-8")
    if readme is not None:
        text = readme.read_text(encoding="utf-8")
        before, mark, rest = text.partition(BEGIN)
        _, end, after = rest.partition(END)
        if not mark or not end:
            raise ValueError(f"report: {readme} must hold the marks {BEGIN} and {END}")
        block = "\n".join([BEGIN, "", *headline(devices), "", END])
        readme.write_text(before + block + after, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(prog=COMMAND, description=__doc__.split("\n")[0])
    parser.add_argument(
        "--results", type=Path, default=results.FOLDER, metavar="DIR", help="default benchmarks/results"
    )
    parser.add_argument("--out", type=Path, default=results.FOLDER.with_name("RESULTS.md"), metavar="FILE")
    parser.add_argument("--readme", type=Path, default=results.ROOT / "README.md", metavar="FILE")
    options = parser.parse_args()
    try:
        write(options.results, options.out, options.readme)
    except (ValueError, OSError) as problem:
        parser.error(str(problem))


if __name__ == "__main__":
    main()
