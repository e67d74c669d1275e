"""Draw the README's figures from the logs beside this file: python results/plot.py [DIR].

Needs matplotlib. Lines are means over seeds, bands reach from the worst seed to the best, dashed is
the floor: what always giving the same answer earns, in losses what a guess does. The SVG files go
to DIR, by default here.
"""

import json
import sys
from collections import defaultdict
from operator import itemgetter
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import numpy as np

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
COLOURS = {1: "#888888", 2: "#2a6fbb", 3: "#3f9b57", 4: "#c4442b"}  # of N


def read(pattern: str) -> list[list[dict]]:
    """Logs -> the lines of each; the first is its header."""
    logs = [[json.loads(line) for line in path.read_text().splitlines()]
            for path in sorted(HERE.glob(pattern))]
    if not logs:
        raise SystemExit(f"{HERE / pattern}: there is no such log")
    return logs


def band(axis, points: dict[float, list[float]], colour, label: str, **style):
    """x -> the y of all seeds: a line through their means, and the space from worst to best."""
    x, y = zip(*sorted(points.items()))
    axis.plot(x, [sum(at) / len(at) for at in y], color=colour, label=label, **style)
    axis.fill_between(x, [*map(min, y)], [*map(max, y)], color=colour, alpha=0.2, lw=0)


def exact(scores: dict) -> float:
    return 100 * scores["exact"]


def floor_line(axis, logs: list[list[dict]]):
    axis.axhline(100 * logs[0][1]["floor"], color="black", lw=0.8, ls="--", label="floor")


def millions(record: dict) -> float:
    """Training tokens, millions."""
    return record["tokens"] / 1e6


def against_tokens(axis, logs: list[list[dict]], n: int, colour, label: str, score=exact,
                   spent=millions, **style):
    """A score on held-out instances in the course of training, with N = n, by what was spent."""
    points = defaultdict(list)
    for _, *records in logs:
        for x, y in {spent(r): score(r) for r in records if r["loops"] == n}.items():
            points[x].append(y)
    band(axis, points, colour, label, **style)


def last(logs: list[list[dict]], n: int) -> list[dict]:
    """The last record with N = n of each log."""
    return [[record for record in records if record["loops"] == n][-1] for _, *records in logs]


def by_level(axis, logs: list[list[dict]], n: int, colour, label: str, score=exact, **style):
    """A score on held-out instances after training, with N = n, by level."""
    points = defaultdict(list)
    for record in last(logs, n):
        for level, scores in record["levels"].items():
            points[int(level)].append(score(scores))
    band(axis, points, colour, label, marker="o", ms=3, **style)
    axis.set(xticks=sorted(points))


def by_loops(axis, logs: list[list[dict]], colour, label: str, floor: bool = False):
    """Exact accuracy after training, by the N asked for; with floor also the floor of each."""
    points, floors = defaultdict(list), {}
    for _, *_, end in logs:
        for n, scores in {**end["eval_loops"], str(end["loops"]): end}.items():
            points[int(n)].append(exact(scores))
            floors[int(n)] = 100 * scores["floor"]
    band(axis, points, colour, label, marker="o", ms=3)
    if floor:
        axis.plot(*zip(*sorted(floors.items())), color=colour, lw=0.8, ls="--")
    axis.set(xlabel="N asked for", xticks=sorted(points))


def laptop(figure):
    """The default run: exact accuracy against tokens; and with another N than trained with."""
    axes, logs = figure.subplots(1, 2, sharey=True), read("laptop/seed*.jsonl")
    for n in (1, 2):
        against_tokens(axes[0], logs, n, COLOURS[n], f"N = {n}")
    for name, colour, label in (("laptop", COLOURS[2], "trained with N = 2"),
                                ("random", COLOURS[4], "with a random N of 1 and 2")):
        by_loops(axes[1], read(f"short/{name}-s*.jsonl"), colour, label)
    for axis in axes:
        floor_line(axis, logs)
        axis.legend()
    axes[0].set(title="the default run", xlabel="training tokens, millions", ylabel="exact, %",
                ylim=(0, 102))
    axes[1].set(title="another N than trained")


def fig2a(figure):
    """The paper's Fig. 2a, and the same for N > 1: Rule 110 in its size, by t."""
    axes, ends, floors = figure.subplots(1, 2, sharey=True), defaultdict(dict), {}
    for i, t in enumerate((4, 8, 10, 12, 14, 16)):
        logs = read(f"fig2a/t{t}-s*.jsonl")
        against_tokens(axes[0], logs, 1, matplotlib.colormaps["viridis"](i / 6), f"t = {t}")
        floors[t] = 100 * logs[0][1]["floor"]
        for n in (1, 2, 4):
            ends[n][t] = [exact(record) for record in last(logs, n)]
    for n, points in ends.items():
        band(axes[1], points, COLOURS[n], f"N = {n}", marker="o", ms=3)
    axes[1].plot(*zip(*floors.items()), color="black", lw=0.8, ls="--", label="floor")
    axes[0].set(title="N = 1", xlabel="training tokens, millions", ylabel="exact, %", ylim=(0, 102))
    axes[1].set(title="after 40 million tokens", xlabel="t, steps of the automaton")
    axes[0].legend(loc="upper left", bbox_to_anchor=(1, 1))
    axes[1].legend()


def two_blocks(figure):
    """Rule 110 in the paper's size but for half the blocks: what N adds where depth is short."""
    def compute(blocks: int):
        return lambda record: blocks * record["token_passes"] / 1e6

    axes = figure.subplots(1, 3, sharey=True)
    for axis, t, two, four in ((axes[0], 8, millions, millions), (axes[1], 10, millions, millions),
                               (axes[2], 10, compute(2), compute(4))):
        logs = read(f"two-blocks/t{t}-s*.jsonl")
        for n in (1, 2, 4):
            against_tokens(axis, logs, n, COLOURS[n], f"two blocks, N = {n}", spent=two)
        against_tokens(axis, read(f"fig2a/t{t}-s*.jsonl"), 1, "black", "four blocks, N = 1",
                       spent=four, ls=":")
        floor_line(axis, logs)
        axis.set(title=f"t = {t}", xlabel="tokens, millions", ylim=(0, 102))
    axes[0].set(ylabel="exact, %")
    axes[2].set(xlabel="token passes x blocks, millions")
    axes[2].legend(loc="upper left", bbox_to_anchor=(1, 1), fontsize=7)


def truth_table(cells: int, t: int, rule: int) -> np.ndarray:
    """The first cell after t steps from each of all 2^cells states: uint8 0/1 (2^cells,).

    In state i, cell j is bit j of i. On the way every cell is a table with 64 states in a word, so
    that a step of all 2^24 states is a few operations on 2 MiB arrays. With fewer than 6 cells the
    states repeat, to fill a word; beyond 24 cells, 2^24 random states stand for all.
    """
    if cells <= 24:
        states = np.arange(max(2**cells, 64))
        tables = [np.packbits(states >> i & 1 == 1).view(np.uint64) for i in range(cells)]
    else:
        words = np.random.default_rng(0).integers(2**64, size=(cells, 2**18), dtype=np.uint64)
        tables = list(words)
    for _ in range(t):
        new = []
        for i in range(cells):
            left, here, right = tables[i - 1], tables[i], tables[(i + 1) % cells]
            table = np.zeros_like(here)
            for pattern in range(8):
                if rule >> pattern & 1:
                    table |= ((left if pattern & 4 else ~left) & (here if pattern & 2 else ~here)
                              & (right if pattern & 1 else ~right))
            new.append(table)
        tables = new
    return np.unpackbits(tables[0].view(np.uint8))


def oracle(table: np.ndarray, seen: int) -> float:
    """Exact accuracy with four states, in %, of the best answers from `seen` neighbouring cells.

    table (2^cells,) holds the right answers. Over all states, and for the best place of those cells
    on the ring.
    """
    cells, right = len(table).bit_length() - 1, []
    for i in range(cells):  # the unseen cells begin here; cell j is axis cells - 1 - j
        unseen = tuple(cells - 1 - (i + j) % cells for j in range(cells - seen))
        p = table.reshape((2,) * cells).mean(axis=unseen, dtype=np.float32)
        right.append(np.maximum(p, 1 - p).mean(dtype=np.float64))
    return 100 * max(right)**4


def fig2b(figure):
    """The paper's Fig. 2b: t = 32, with what the paper prints after 4 to 5 billion tokens."""
    axis, table = figure.subplots(), truth_table(24, 32, 110)
    for pattern, style in (("t32/N*.jsonl", {"lw": 0.8}), ("t32-2B/N*.jsonl", {"lw": 2})):
        logs = read(pattern)  # thin: rates that fall towards 0.5 billion tokens; thick: 2 billion
        length = f"{logs[0][-1]['tokens'] / 1e9:.1f} billion tokens"
        for n in sorted({record["loops"] for _, *records in logs for record in records}):
            against_tokens(axis, logs, n, COLOURS[n], f"N = {n}, {length}", **style)
    for n, exact, label in ((1, 10, "N = 1: about 10"), (2, 20, "N = 2: about 20"),
                            (4, 30, "N = 3, 4: above 30")):
        axis.plot(4500, exact, "s", color=COLOURS[n], ms=4)
        axis.annotate(f"paper, {label}", (4500, exact), (6, 2), textcoords="offset points",
                      fontsize=7)
    floor_line(axis, logs)
    for seen in (16, 20, 22):
        exact = oracle(table, seen)
        axis.axhline(exact, color="black", lw=0.5, ls=":")
        axis.annotate(f"best from {seen} neighbouring cells of 24", (40, exact), (0, 2),
                      textcoords="offset points", fontsize=7)
    axis.set(title="t = 32", xlabel="training tokens, millions", ylabel="exact, %",
             xlim=(38, 30000), ylim=(0, 40))
    axis.set_xscale("log", nonpositive="mask")
    axis.xaxis.set_major_formatter("{x:,.0f}")
    axis.legend(loc="upper left", bbox_to_anchor=(1, 1))


def dream(figure):
    """Passes that say what they compute: t = 32 at the paper's size, and other N and t asked."""
    axes, logs = figure.subplots(1, 2, sharey=True), read("dream/paper-s*.jsonl")
    against_tokens(axes[0], logs, 16, "black", "N = 16, a dream")
    against_tokens(axes[0], read("dream/untold-paper-s*.jsonl"), 16, "black", "N = 16, not told",
                   lambda record: exact(record["levels"]["32"]), ls=":")
    for n in (1, 4):
        against_tokens(axes[0], read(f"t32-2B/N{n}.jsonl"), n, COLOURS[n], f"N = {n}, not told")
    floor_line(axes[0], logs)
    axes[1].set_xscale("log")
    for name, colour, label in (("paper", "black", "24 cells, 4 states, t = 2 N, N up to 16"),
                                ("two", "tab:purple", "12 cells, 2 states, t = N up to 16"),
                                ("one", "tab:olive", "12 cells, 1 state, t = N up to 4")):
        by_loops(axes[1], read(f"dream/{name}-s*.jsonl"), colour, label, floor=True)
    axes[0].set_xscale("log", nonpositive="mask")
    for axis in axes:
        axis.xaxis.set_major_formatter("{x:,.0f}")
        axis.minorticks_off()
    axes[0].set(title="t = 32, the paper's size", xlabel="training tokens, millions",
                ylabel="exact, %", ylim=(0, 102), xlim=(15, None))
    axes[0].legend(loc="center right", fontsize=7)
    axes[1].set(title="other N and t than trained")
    axes[1].legend(loc="upper left", bbox_to_anchor=(1, 1), title="trained with", fontsize=7)


def p_drawn(nodes: int, names: int) -> np.ndarray:
    """P(a given one-token name is among the first n that are drawn), n = 0, ..., nodes."""
    i = np.arange(min(nodes, names) + 1)
    p, expected = (i == 0).astype(float), [0.0]  # P(i of the names so far have one token)
    for drawn in range(nodes):
        one, two = names * (names - i), names**2 - (drawn - i)  # what is left, by weight
        p_one_token = one / (one + two)
        p = p * (1 - p_one_token) + np.roll(p * p_one_token, 1)
        expected.append(p @ i)
    return np.array(expected) / names


def guess(nodes: int, questions: int, names: int) -> float:
    """Depo's loss, nats a scored token, of who names any node that no answer before was."""
    scored = 3 - names * p_drawn(nodes, names)[nodes] / nodes  # the marker, a name of 1 or 2 tokens
    return np.log(nodes - np.arange(questions)).mean() / scored


def fig3(figure):
    """The paper's Fig. 3, Depo: test loss by k; in the small, and on the way with 75 nodes."""
    axes, small = figure.subplots(1, 2), read("depo/two*.jsonl")
    large = read("depo/nodes75-N*.jsonl")
    for n in (1, 2, 4):
        by_level(axes[0], small, n, COLOURS[n], f"two blocks, N = {n}", itemgetter("loss"))
        for k, style in (("1", "-"), ("2", ":")):
            against_tokens(axes[1], large, n, COLOURS[n], f"k = {k}, N = {n}",
                           lambda record: record["levels"][k]["loss"], ls=style)
    by_level(axes[0], read("depo/four*.jsonl"), 1, "black", "four blocks, N = 1",
             itemgetter("loss"), ls=":")
    for axis, logs, corner in ((axes[0], small, "lower right"), (axes[1], large, "lower left")):
        config = logs[0][0]["config"]
        axis.axhline(guess(config["nodes"], config["questions"], config["names"]), color="black",
                     lw=0.8, ls="--", label="a guess")
        axis.legend(loc=corner, fontsize=7)
        axis.set(title=f"{config['nodes']} nodes")
    axes[0].set(xlabel="k, hops", ylabel="test loss, nats a scored token", ylim=(0, 0.8))
    axes[1].set(xlabel="training tokens, millions", ylim=(0, 2))


def fig4(figure):
    """The paper's Fig. 4 and 5, GSM: exact accuracy by number of operations."""
    axes = figure.subplots(1, 3, sharey=True)
    for axis, pattern, title in ((axes[0], "gsm/two*.jsonl", "two blocks"),
                                 (axes[1], "gsm/sliding*.jsonl", "two blocks, sliding"),
                                 (axes[2], "gsm/ops6.jsonl", "four blocks, up to 6")):
        logs = read(pattern)
        for n in (1, 2, 4):
            by_level(axis, logs, n, COLOURS[n], f"N = {n}")
        floors = {int(k): 100 * level["floor"] for k, level in logs[0][1]["levels"].items()}
        axis.plot(*zip(*floors.items()), color="black", lw=0.8, ls="--", label="floor")
        axis.set(title=title, xlabel="operations", ylim=(0, 102))
    by_level(axes[0], read("gsm/four*.jsonl"), 1, "black", "four blocks, N = 1", ls=":")
    axes[0].set(ylabel="exact, %")
    axes[0].legend(loc="center left", fontsize=7)


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
    for draw in (laptop, fig2a, two_blocks, fig2b, dream, fig3, fig4, speed):
        figure = plt.figure(figsize=(7, 2.8), layout="constrained")
        draw(figure)
        figure.savefig(folder / f"{draw.__name__}.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
