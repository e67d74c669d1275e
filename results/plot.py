"""Draw the README's figures from the logs beside this file: python results/plot.py [DIR].

Needs matplotlib. Lines are means over seeds, bands reach from the worst seed to the best, dashed is
the floor: what always giving the same answer earns. The SVG files go to DIR, by default here.
"""

import json
import sys
from collections import defaultdict
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt

HERE = Path(__file__).parent
COLOURS = {1: "#888888", 2: "#2a6fbb", 4: "#c4442b"}  # of N


def read(pattern: str) -> list[list[dict]]:
    """Logs -> the lines of each; the first is its header."""
    logs = [[json.loads(line) for line in path.read_text().splitlines()]
            for path in sorted(HERE.glob(pattern))]
    if not logs:
        raise SystemExit(f"{HERE / pattern}: there is no such log")
    return logs


def band(axis, curves: list[list[tuple[float, float]]], colour: str, label: str):
    """Curves of (x, y) with the same x, one a seed: their mean, and the space between them."""
    x = [point[0] for point in curves[0]]
    y = [[point[1] for point in at] for at in zip(*curves, strict=True)]
    axis.plot(x, [sum(at) / len(at) for at in y], color=colour, label=label)
    axis.fill_between(x, [*map(min, y)], [*map(max, y)], color=colour, alpha=0.2, lw=0)


def laptop(figure):
    """The default run on two machines: exact accuracy on held-out states against tokens."""
    axes = figure.subplots(1, 2, sharey=True)
    for axis, pattern, title in ((axes[0], "laptop/seed*.jsonl", "two CPU cores, float32"),
                                 (axes[1], "laptop/h100-s*.jsonl", "H100, bfloat16")):
        logs, curves = read(pattern), defaultdict(list)
        for _, *records in logs:
            for n in {record["loops"] for record in records}:
                curves[n].append([(record["tokens"] / 1e6, 100 * record["exact"])
                                  for record in records if record["loops"] == n])
        for n in sorted(curves):
            band(axis, curves[n], COLOURS[n], f"N = {n}")
        axis.axhline(100 * logs[0][1]["floor"], color="black", lw=0.8, ls="--", label="floor")
        axis.set(title=f"{title}, {len(logs)} seeds", xlabel="training tokens, millions")
    axes[0].set(ylabel="exact, %", ylim=(0, 100))
    axes[0].legend(loc="upper left")


def speed(figure):
    """The paper's Fig. 6: throughput against N and against L, on an H100."""
    rows = [row for row in read("bench/h100.jsonl")[0][1:] if "ms" in row]
    axes = figure.subplots(1, 2)
    window = rows[0]["window"]
    by_N = [row for row in rows if row["window"] == window and not row["recompute"]]
    by_L = sorted((row for row in rows if row["loops"] == 1), key=lambda row: row["window"])
    for axis, points, x, label in ((axes[0], by_N, "loops", f"passes N (L = {window})"),
                                   (axes[1], by_L, "window", "window L, tokens (N = 1)")):
        axis.plot([row[x] for row in points], [row["tokens_per_s"] / 1e6 for row in points], "o-",
                  color=COLOURS[2], label="measured")
        axis.set(xscale="log", xlabel=label, ylim=(0, 6.5), xticks=[row[x] for row in points])
        axis.xaxis.set_major_formatter("{x:.0f}")
        axis.minorticks_off()
    axes[0].plot([row["loops"] for row in by_N],
                 [by_N[0]["tokens_per_s"] / 1e6 / row["loops"] for row in by_N],
                 color="black", lw=0.8, ls="--", label="1/N")
    axes[0].legend()
    axes[0].set(ylabel="training, million tokens/s")


def main():
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else HERE
    matplotlib.use("Agg")
    matplotlib.rcParams.update({"svg.hashsalt": "sleep", "svg.fonttype": "none", "font.size": 9,
                                "axes.spines.top": False, "axes.spines.right": False,
                                "legend.frameon": False})
    for draw in (laptop, speed):
        figure = plt.figure(figsize=(7, 2.8), layout="constrained")
        draw(figure)
        figure.savefig(folder / f"{draw.__name__}.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
