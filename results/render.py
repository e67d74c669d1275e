"""Make what the READMEs say of logs and code: python results/render.py [--check].

Fills the tables of results/README.md from the logs that their rows name, puts the places of the
code's tags into README.md's tables of equations and choices, and draws the figures, which takes
matplotlib. Without a change in logs, rows or code it changes nothing. A new row needs its first
three cells.
"""

import difflib
import io
import json
import re
import sys
from collections import defaultdict
from functools import cache
from importlib.util import find_spec
from itertools import combinations, pairwise, product
from math import comb
from pathlib import Path
from typing import NamedTuple

import numpy as np

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
if __name__ == "__main__":  # run as a program, Python only looks beside this file
    sys.path.insert(0, str(ROOT))

import train  # noqa: E402
from results.bench import model_flops  # noqa: E402
from results.reach import PROTOCOL, reached  # noqa: E402

KINDS = r"Eq\.|Alg\.|Choice:|Differs:"  # of tags
COLOURS = {1: "#888888", 2: "#2a6fbb", 3: "#3f9b57", 4: "#c4442b"}  # of every N that was trained
FLOOR = {"color": "black", "lw": 0.8, "ls": "--"}
VARIANT = "results/variants.py"  # a row's command begins with it, where it is not train.py's
FREE = {*train.LEFT_OUT, "init", "seed", "loops", "eval_loops", "eval_every", "variant"}
BLOCK = re.compile(r"^<!-- table: (.*) -->\n((?:(?!<!-- ).*\n)*)<!-- end -->$", re.M)
RUNS = ("experiment | command: `python train.py` ... | logs | exact, % | floor | seeds | tokens | "
        "minutes | commit | PFLOPs")
COMPARED = "asked | first | second | exact, % of the first | of the second | p, % | ahead"
LAPTOP, BASE = "laptop/seed*.jsonl", "small/base-s*.jsonl"
STAIR, GSM = "depo/stair-N*-s*.jsonl", "gsm/ops6-half-s*.jsonl"


class Row(NamedTuple):
    """What a row of runs says by itself; the rest is made of its logs."""
    name: str
    command: str  # train.py's options, or a variant's whole command
    logs: str     # beside this file


def cells_of(lines: str) -> list[list[str]]:
    """The rows of a table, without its head, up to an empty line."""
    return [[name.strip(), *(cell.strip(" `") for cell in cells)] for name, *cells in (
        line[1:-1].split("|") for line in lines.split("\n\n")[0].splitlines()[2:])]


def rows_of(text: str) -> dict[str, list[Row]]:
    """Name -> rows of every table of runs in results/README.md."""
    tables = BLOCK.findall(text)
    rows = {name: [Row(*(*cells, "", "")[:3]) for cells in cells_of(lines)]
            for name, lines in tables if lines.startswith("| experiment |")}
    logs = [log for of in rows.values() for row in of for log in HERE.glob(row.logs)]
    if len({*logs}) < len(logs) or len(tables) < text.count("<!-- table: "):
        raise SystemExit("render.py: results/README.md: two rows name the same logs, or a table "
                         "has no <!-- end -->")
    return rows


TABLES = rows_of((HERE / "README.md").read_text("utf-8"))
ROWS = {row.logs: row for rows in TABLES.values() for row in rows}


# ----------------------------------------------------------------------------------------- the logs

class Log(NamedTuple):
    name: str
    header: dict
    records: list[dict]
    last: dict[int, dict]  # of each N


@cache
def read(pattern: str) -> list[Log]:
    logs = []
    for path in sorted(HERE.glob(pattern)):
        header, *records = map(json.loads, path.read_text("utf-8").splitlines())
        last = {record.get("loops"): record for record in records}
        logs.append(Log(path.name, header, records, last))
    return logs


def variant_of(config: dict) -> str | None:
    """The variant of a run, as its log says; in older logs variants were options."""
    if "variant" in config:
        return config["variant"]
    awake = config.get("sleep_at") == "wake"
    had = {"position": config.get("position", "window") == "window", "awake": awake,
           "embed": config.get("carry") == "embed",
           "reset_S": not config.get("carry_S", True) and not awake,
           "graft": config.get("train") == "new"}
    return "+".join(name for name in had if had[name]) or None


@cache
def experiment(pattern: str) -> tuple[list[int], list[Log]]:
    """The N and the logs of a row. Exits in one line if they are not what its command makes."""
    given, variant = ROWS[pattern].command.split(), None
    if given[:1] == [VARIANT]:
        _, variant, *given = given
    parser, logs = train.get_parser(), read(pattern)
    default = vars(parser.parse_args([]))
    options = train.parse(parser, given)
    task, _ = train.build(options | {"dtype": "float32"})
    for values, of in ((options, task), (default, type(task)())):
        values |= {name: getattr(of, name) for name in of.options}
    wrong = [] if logs else ["there is no such log"]
    for log in logs:
        had = default | log.header["config"]
        if variant_of(log.header["config"]) != variant:
            wrong.append(f"{log.name} is of variant {variant_of(log.header['config'])}, "
                         f"not {variant}")
        wrong += [f"{log.name} has {name} {had[name]}, not {value}"
                  for name, value in options.items()
                  if name not in FREE and value not in ("auto", had[name])]
        wrong += [f"{log.name} ends at step {record['step']} for N = {n}, not {options['steps']}"
                  for n, record in log.last.items() if record["step"] != options["steps"]]
    ran = [(log.header["config"]["seed"], n) for log in logs for n in log.last]
    if sorted(ran) != sorted(product({seed for seed, _ in ran}, options["loops"])):
        wrong.append("its logs must have each N of --loops once for each seed")
    if wrong:
        raise SystemExit(f"render.py: {pattern}: {wrong[0]} (command: {ROWS[pattern].command})")
    return options["loops"], logs


def ends(pattern: str, n: int) -> list[dict]:
    """The last records with N = n, of every seed."""
    return [log.last[n] for log in experiment(pattern)[1] if n in log.last]


def asked_after(pattern: str, n: int) -> dict[str, list[dict]]:
    """Passes asleep -> the scores with so many of every seed's model, trained with N = n."""
    of = [record["eval_loops"] for record in ends(pattern, n)]
    return {passes: [scores[passes] for scores in of] for passes in of[0]}


def exact(records: list[dict], level: str | None = None) -> list[float]:
    """Of each record, in %: at one level, or over all held-out sequences."""
    return [100 * (record.get("levels", {})[level] if level else record)["exact"]
            for record in records]


def card(header: dict) -> str:
    """"4 x NVIDIA H100 80GB HBM3" -> "4 x H100"; "CPU, 2 threads" -> "CPU"."""
    name = header["hardware"].split(",")[0].replace("NVIDIA ", "")
    return re.sub(r" \d+GB.*", "", name)


def joined(values) -> str:
    return ", ".join(sorted(set(values)))


# --------------------------------------------------------------------------------------- the tables

def median_and_range(values: list[float]) -> str:
    """[63.1, 57.2, 58.0] -> "58.0 [57.2, 63.1]"; one value alone as it is."""
    middle, low, high = (f"{x:.1f}" for x in (np.median(values), min(values), max(values)))
    return middle if len(values) == 1 else f"{middle} [{low}, {high}]"


def scored(pattern: str, n: int, level: str | None = None) -> str:
    """Exact accuracy of the seeds with N = n, and each other N that they are ahead of."""
    ours, theirs = exact(ends(pattern, n), level), {
        m: exact(ends(pattern, m), level) for m in experiment(pattern)[0] if m != n}
    behind = ", ".join(f"{m}" for m in theirs if ahead(ours, theirs[m]))
    return median_and_range(ours) + (behind and f" > N = {behind}")


def row_of(row: Row) -> list[str]:
    """A row of runs, whole."""
    loops, logs = experiment(row.logs)
    last = [record for n in loops for record in ends(row.logs, n)]
    seeds, minutes = len(last) // len(loops), sum(record["seconds"] for record in last) / 60
    by_level = "levels" in last[0]
    return [row.name, f"`{row.command}`", f"`{row.logs}`",
            "below" if by_level else "; ".join(
                f"N = {n}: {scored(row.logs, n)}" for n in loops),
            "below" if by_level else joined(f"{100 * record['floor']:.1f}" for record in last),
            f"{seeds}", f"{last[0]['tokens'] / 1e6:.1f}M",
            f"{minutes / seeds:.1f} {joined(card(log.header) for log in logs)}",
            joined(log.header["commit"] for log in logs),
            "; ".join(f"N = {n}: {flops(row.logs, n) * last[0]['step'] / 1e15:.3g}"
                      for n in loops)]


def runs_table(rows: list[Row]) -> str:
    """A table of runs; where a task has levels, exact by level in a second one below."""
    text = table(RUNS, map(row_of, rows))
    had = {row: read(row.logs)[0].records[0].get("levels", {}) for row in rows}
    if levels := dict.fromkeys(level for of in had.values() for level in of):
        text += "\n\n" + table(" | ".join(["exact, % by level", *levels]), [
            *([f"{row.name}, N = {n}",
               *(scored(row.logs, n, level) if level in of else "-" for level in levels)]
              for row, of in had.items() for n in experiment(row.logs)[0]),
            ["floor", *(joined(f"{100 * of[level]['floor']:.1f}"
                               for of in had.values() if level in of) for level in levels)]])
    return text


def table(head: str, rows) -> str:
    lines = [head.split(" | "), ["---"] * len(head.split(" | ")), *rows]
    return "\n".join("| " + " | ".join(row) + " |" for row in lines)


@cache
def flops(pattern: str, n: int) -> float:
    """Training FLOPs of a step of a row's runs with N = n."""
    config = experiment(pattern)[1][0].header["config"]
    return config["batch"] * flops_of_a_sequence(config, n)[0]


def flops_of_a_sequence(config: dict, n: int) -> tuple[float, int]:
    """Training FLOPs of a sequence with N = n, as results/bench.py counts them; its tokens."""
    task, model = train.build(config | {"dtype": "float32"})
    windows = train.windows_of(task, model.config.window)
    return model_flops(model, windows, n, variant_of(config) == "awake"), task.length


def asked_table() -> str:
    """Exact accuracy of models trained with one N and asked after another number of passes: of the
    default task, and of GSM's problems of three operations."""
    rows, others = [], ["1", "2", "3", "4", "8"]
    for n in experiment(BASE)[0]:
        after = asked_after(BASE, n)
        rows.append([f"N = {n}", *(median_and_range(exact(after[other])) for other in others)])
    after = asked_after(GSM, 4)
    rows.append(["N = 4, GSM, three operations",
                 *(median_and_range(exact(after[other], "3")) for other in others)])
    return table(" | ".join(["trained with", *(f"asked after {n}" for n in others)]), rows)


def coin_table() -> str:
    """Training tokens, in millions, until 90 % of the held-out sequences are exact: the median, the
    fewest and the most, how many times the fewest the most are, p against N = 1, and the number of
    seeds if it is not 5. Of settings that were tried with more passes than one."""
    rows, runs = [], [*map(json.loads, (HERE / "coin.jsonl").read_text("utf-8").splitlines())]
    for setting in dict.fromkeys(run["setting"] for run in runs if run["loops"] > 1):
        cells, of = [], {n: [run["tokens_to"]["90"] / 1e6 for run in runs
                             if (run["setting"], run["loops"]) == (setting, n)] for n in (1, 2, 4)}
        for n, x in of.items():
            p = f", p {100 * mann_whitney(x, of[1]):.2g} %" if n > 1 else ""
            cells.append("{:.1f} [{:.1f}, {:.1f}] {:.2f}".format(
                np.median(x), min(x), max(x), max(x) / min(x)) + p
                + f" ({len(x)} seeds)" * (len(x) != 5))
        rows.append([setting, *cells])
    return table("setting | N = 1 | N = 2 | N = 4", rows)


def reach_logs(t: int, n: int) -> list[Log]:
    """The logs of results/reach.py. Exits in one line if those of t differ in more than N and the
    seed."""
    if len({json.dumps(log.header["config"] | {"seed": 0, "loops": 0})
            for log in read(f"reach/t{t}-*.jsonl")}) > 1:
        raise SystemExit(f"render.py: reach/t{t}-*.jsonl: must differ in N and the seed alone")
    return read(f"reach/t{t}-N{n}-s*.jsonl")


def tokens_to(t: int, n: int, level: float) -> list[float]:
    """Training tokens of each seed until the level is reached; infinite if it is not."""
    at = [reached(log.records, level) for log in reach_logs(t, n)]
    return [record["tokens"] if record else np.inf for record in at]


@cache
def flops_of_a_token(t: int, n: int) -> float:
    """Training FLOPs of a token in the runs of results/reach.py."""
    total, tokens = flops_of_a_sequence(reach_logs(t, n)[0].header["config"], n)
    return total / tokens


def seconds_to(t: int, n: int, level: float) -> list[float]:
    """Of each seed: seconds of training and evaluation until the level is reached, start and
    compiling aside: the median seconds of a step times the steps."""
    seconds = []
    for log in reach_logs(t, n):
        at, of_a_step = reached(log.records, level), [
            (two["seconds"] - one["seconds"]) / (two["step"] - one["step"])
            for one, two in pairwise(log.records)]
        seconds.append(at["step"] * np.median(of_a_step) if at else np.inf)
    return seconds


def reach_table() -> str:
    """Tokens until a share of the held-out sequences is exact, by t and N; p against each smaller N
    that was trained, for the first level and the last."""
    rows = []
    for t, n in product(PROTOCOL, COLOURS):
        if logs := reach_logs(t, n):
            less, last = [m for m in COLOURS if m < n and reach_logs(t, m)], PROTOCOL[t][2]
            of = {level: tokens_to(t, n, level) for level in (0.3, 0.5, 0.9)}
            rows.append([
                f"{t}", f"{n}", f"{len(logs)}",
                *(median_and_range([x / 1e6 for x in of[level]]) if level <= last else "-"
                  for level in of),
                f"{np.median(tokens_to(t, 1, 0.3)) / np.median(of[0.3]):.2f}",
                f"{flops_of_a_token(t, n) / flops_of_a_token(t, 1):.2f}",
                *("; ".join(f"N = {m}: {100 * mann_whitney(of[level], tokens_to(t, m, level)):.2g}"
                            for m in less) or "-" for level in (0.3, last)),
                median_and_range(seconds_to(t, n, last)), joined(card(log.header) for log in logs),
                joined(log.header["commit"] for log in logs)])
    return table("t | N | seeds | tokens to 30 %, millions | to 50 % | to 90 % | times fewer to "
                 "30 % than N = 1 | FLOPs of a token, times those of N = 1 | p of 30 %, % | p of "
                 "the last level, % | seconds to the last level | device | commit", rows)


@cache
def deals(total: int, size: int) -> np.ndarray:
    """All ways to choose so many of the first `total` numbers, a row each."""
    return np.array([*combinations(range(total), size)])


def mann_whitney(ours: list[float], theirs: list[float]) -> float:
    """The p of the exact two-sided Mann-Whitney test: of all ways to deal these values to two
    groups of these sizes, the share whose rank sum is as far from its mean, or farther."""
    values = np.array([*ours, *theirs])
    ranks = (values[:, None] > values).sum(1) + (values[:, None] == values).sum(1) / 2
    sums = ranks[deals(len(values), len(ours))].sum(1)
    far = abs(sums - sums.mean())
    return (far >= abs(ranks[:len(ours)].sum() - sums.mean()) - 1e-9).mean()


def ahead(ours: list[float], theirs: list[float]) -> bool:
    """Are ours ahead of theirs, by the test at 1 %?"""
    wins = np.sign(np.subtract.outer(ours, theirs)).sum()
    return bool(wins > 0 and mann_whitney(ours, theirs) <= 0.01)


def side_of(cell: str) -> list[float]:
    """Exact accuracy of the seeds that a comparison names, in %: "LOGS N = 4"; with ", level 2" at
    this level; with ", FLOPs of N = 1" at the last evaluation within those of such a run."""
    [(logs, n, level, most)] = re.findall(
        r"^(\S+) N = (\d+)(?:, level (\d+))?(?:, FLOPs of N = (\d+))?$", cell)
    most = int(most or n)
    limit = flops(logs, most) * ends(logs, most)[0]["step"]
    _, cost, scores = spent(logs, int(n), level)
    return [seeds for x, seeds in zip(cost, scores) if x <= limit][-1]


def compared(lines: str) -> str:
    """The table of comparisons: each row names logs and N of a first and a second."""
    rows = []
    for asked, *pair in (cells[:3] for cells in cells_of(lines)):
        ours, theirs = map(side_of, pair)
        if comb(len(ours + theirs), len(ours)) < 200:
            raise SystemExit(f"render.py: results/README.md: {asked}: {len(ours)} and "
                             f"{len(theirs)} seeds are too few to tell")
        rows.append([asked, *(f"`{side}`" for side in pair),
                     *(f"{median_and_range(x)} ({len(x)})" for x in (ours, theirs)),
                     f"{100 * mann_whitney(ours, theirs):.3g}", "the first" if ahead(ours, theirs)
                     else "the second" if ahead(theirs, ours) else "neither"])
    return table(COMPARED, rows)


def dream_table() -> str:
    """The last evaluation of results/dream.py: every N that it ended with."""
    [(_, header, records, _)] = read("dream/*.jsonl")
    steps = records[-1]["step"]
    return table("N | t | said right, % | exact, % | floor | tokens | minutes | commit", [
        [f"{x['loops']}", f"{x['t']}", *(f"{100 * x[name]:.2f}" for name in (
            "said", "exact", "floor")), f"{x['tokens'] / 1e6:.1f}M",
         f"{x['seconds'] / 60:.1f} {card(header)}", header["commit"]]
        for x in records if x["step"] == steps])


def speed_tables() -> str:
    """The rows of results/bench.py's logs with their first L (the figure has the others); the bytes
    of both memories in bfloat16."""
    rows, held = [], []
    for _, header, (first, *records), _ in read("bench/**/*.jsonl"):
        for row in records:
            if row.get("window") == records[0]["window"]:
                peak = f"{row['peak_bytes'] / 2**20:,.0f}" if "peak_bytes" in row else "-"
                rows.append([card(header), f"{header['config']['batch']}", f"{row['loops']}",
                             f"{row['ms']:,.1f}", f"{row['tokens_per_s']:,.0f}",
                             f"{row['flops'] / first['matrix_rate']:.1%}", peak,
                             *(f"{row[name]:.1f}" for name in (
                                 "first_step_s", "wake_ms", "sleep_ms")), header["commit"]])
            elif row.get("windows") in (1, 1000) and header["config"]["dtype"] == "bfloat16":
                held.append(tuple(f"{row[name]:,}" for name in (
                    "windows", "tokens", "S", "cache", "never_evicted")))
    return "\n\n".join([
        table("device | batch | N | ms a step | tokens/s | share of peak | peak MiB | "
              "first step, s | wake, ms | sleep, ms | commit", rows),
        table("windows read | tokens | S, bytes | cache, bytes | cache if never evicted, bytes "
              "(computed)", dict.fromkeys(held))
    ])


def filled(text: str) -> str:
    """results/README.md with every table as the logs have it."""
    made = {"asked": asked_table, "coin": coin_table, "dream": dream_table, "reach": reach_table,
            "speed": speed_tables}
    rows = rows_of(text)
    agree("results/README.md: table", [name for name, _ in BLOCK.findall(text)],
          "results/render.py", [*rows, *made, "comparisons"])

    def fill(match) -> str:
        name, lines = match.groups()
        try:
            content = (runs_table(rows[name]) if name in rows else
                       made[name]() if name in made else compared(lines))
        except (LookupError, TypeError, ValueError) as error:
            raise SystemExit(f"render.py: results/README.md: table {name!r}: a row names what is "
                             f"not there: {error!r}") from None
        return f"<!-- table: {name} -->\n{content}\n<!-- end -->"
    return BLOCK.sub(fill, text)


def tags() -> dict[str, str]:
    """Every tag in the code and its place: {"Eq. (2)": "model.py:121"}. It ends its statement."""
    found = [(match[1], f"{name}:{number}")
             for name in ("sleep.py", "model.py", "data.py", "train.py")
             for number, line in enumerate((ROOT / name).read_text("utf-8").splitlines(), 1)
             if (match := re.search(rf"\S.*# ((?:{KINDS})\S* .*)$", line))]
    for tag, place in found:
        if places := [other for name, other in found if name == tag and other != place]:
            raise SystemExit(f"render.py: {tag} is tagged twice, at {place} and {places[0]}")
    return dict(found)


def placed(*texts: str) -> list[str]:
    """The READMEs with the place of each tag in the row that begins with the tag."""
    places, row = tags(), re.compile(rf"^\| ((?:{KINDS})[^|]*?) \| `[^`]*` \|", re.M)
    agree("READMEs: row", row.findall("\n".join(texts)), "the code", [*places])
    return [row.sub(lambda match: f"| {match[1]} | `{places[match[1]]}` |", text)
            for text in texts]


def counted(text: str) -> str:
    """A README with the number of lines of each file in the row that begins with the file."""
    return re.sub(r"^\| `(\S+\.py)` \| \d+ \|", lambda match: "| `{}` | {} |".format(
        match[1], len((ROOT / match[1]).read_text("utf-8").splitlines())), text, flags=re.M)


def agree(place: str, there: list[str], source: str, wanted: list[str]):
    """Exits in one line unless each that is wanted is there, once."""
    for name in sorted({*there, *wanted}):
        if there.count(name) != 1 or name not in wanted:
            why = (f"not in {source}" if name not in wanted else
                   "missing" if name not in there else "there twice")
            raise SystemExit(f"render.py: {place} {name!r}: {why}")


def rendered() -> dict[Path, str]:
    """Each file that is made, in part, from logs and code -> the text that it should have."""
    lesson, results = ROOT / "README.md", HERE / "README.md"
    texts = placed(lesson.read_text("utf-8"), filled(results.read_text("utf-8")))
    return dict(zip((lesson, results), map(counted, texts)))


# -------------------------------------------------------------------------------------- the figures
# A line goes through the medians of the seeds, each of which is a dot.

def dotted(axis, points: dict[float, list[float]], colour, label: str):
    """x -> the y of all seeds."""
    x, y = zip(*sorted(points.items()))
    axis.plot(x, [*map(np.median, y)], color=colour, label=label, lw=1.2)
    for at, seeds in zip(x, y):
        axis.plot([at] * len(seeds), seeds, "o", ms=2.5, mew=0, alpha=0.6, color=colour)


def spent(pattern: str, n: int, level: str | None = None
          ) -> tuple[list[int], list[float], list[list[float]]]:
    """In the course of training with N = n: tokens, FLOPs, exact accuracy of all seeds in %, at one
    level or over all held-out sequences."""
    points = defaultdict(list)
    for log in experiment(pattern)[1]:
        for record in log.records:
            if record["loops"] == n:
                cost = flops(pattern, n) * record["step"]
                points[record["tokens"], cost] += exact([record], level)
    tokens, cost = map(list, zip(*points))
    return tokens, cost, [*points.values()]


def floor_line(axis, pattern: str):
    floor = experiment(pattern)[1][0].records[0]["floor"]
    axis.axhline(100 * floor, **FLOOR, label="floor")


def outside(axis):
    """A legend to the right of the axes."""
    axis.legend(loc="upper left", bbox_to_anchor=(1, 1))


def laptop(figure):
    """The default run: exact accuracy against tokens."""
    axis = figure.subplots()
    for n in experiment(LAPTOP)[0]:
        tokens, _, seeds = spent(LAPTOP, n)
        dotted(axis, {x / 1e6: y for x, y in zip(tokens, seeds)}, COLOURS[n], f"N = {n}")
    floor_line(axis, LAPTOP)
    axis.set(xlabel="training tokens, millions", ylabel="exact, %", ylim=(0, 102))
    outside(axis)


def reach(figure):
    """Tokens, and FLOPs, until 30 % of the held-out sequences are exact, by t: a dot for each seed,
    a triangle for one that was not there when the tokens were spent, a line through the medians."""
    axes = figure.subplots(1, 2)
    for axis, name, price in ((axes[0], "training tokens, millions", lambda t, n: 1e-6),
                              (axes[1], "training PFLOPs",
                               lambda t, n: 1e-15 * flops_of_a_token(t, n))):
        for n, colour in COLOURS.items():
            needed = {t: tokens_to(t, n, 0.3) for t in PROTOCOL if reach_logs(t, n)}
            beside = 1 + (n - 2.5) / 50
            if needed:
                dotted(axis, {t * beside: [price(t, n) * x for x in seeds]
                              for t, seeds in needed.items()}, colour, f"N = {n}")
            for t, seeds in needed.items():
                if np.inf in seeds:
                    axis.plot(t * beside, price(t, n) * PROTOCOL[t][0] * 1e6, "^", ms=3.5, mew=0,
                              alpha=0.6, color=colour)
        axis.set(xlabel="t, steps of the automaton", ylabel=f"{name},\nto 30 % exact", xscale="log",
                 yscale="log", xticks=[*PROTOCOL],
                 xticklabels=["" if t == 10 else t for t in PROTOCOL])  # 10 is too near 12
        axis.yaxis.get_major_locator().set_params(subs=(1, 2, 5))
        axis.yaxis.set_major_formatter("{x:g}")
        axis.minorticks_off()
    axes[1].plot([], [], "k^", ms=3.5, label="not reached")
    outside(axes[1])


def fig2b(figure):
    """The paper's Fig. 2b, t = 32: a line for each run, squares what the paper prints after 4 to 5
    billion tokens."""
    figure.set_size_inches(7, 3.4)
    left, right = figure.subplots(1, 2, sharey=True)
    for row in TABLES["t32"]:
        for n in experiment(row.logs)[0]:
            tokens, cost, seeds = spent(row.logs, n)
            left.plot([x / 1e9 for x in tokens], seeds, color=COLOURS[n], lw=1.2)
            right.plot([x / 1e15 for x in cost], seeds, color=COLOURS[n], lw=1.2)
    for n in (1, 2, 3, 4):
        right.plot([], [], color=COLOURS[n], label=f"N = {n}")
    for n, y, label in ((1, 10, "N = 1"), (2, 20, "N = 2"), (4, 30, "3, 4: above")):
        left.plot(4.5, y, "s", color=COLOURS[n], ms=4)
        left.annotate(label, (4.5, y), (5, -3), textcoords="offset points", fontsize=7)
    right.plot([], [], "ks", ms=4, label="the paper's")
    for axis, label in ((left, "training tokens, billions"), (right, "training PFLOPs")):
        floor_line(axis, row.logs)
        axis.set(xlabel=label, ylim=(0, 75))
    left.set(ylabel="exact, %, t = 32")
    outside(right)


def small(figure):
    """The variants of the default run: a dot for each seed, a dash for their median."""
    figure.set_size_inches(7, 4.2)
    axis = figure.subplots()
    for y, row in enumerate(TABLES["small"]):
        for n in experiment(row.logs)[0]:
            x = exact(ends(row.logs, n))
            shift = {1: -0.2, 2: 0, 4: 0.2}[n]
            axis.plot(x, [y + shift] * len(x), "o", ms=3.5, mew=0, alpha=0.7, color=COLOURS[n])
            axis.plot(np.median(x), y + shift, "|", ms=8, color=COLOURS[n])
    for n in (1, 2, 4):
        axis.plot([], [], "o", ms=4, color=COLOURS[n], label=f"N = {n}")
    axis.axvline(100 * ends(BASE, 1)[0]["floor"], **FLOOR, label="floor")
    axis.set(xlabel="exact, %", xlim=(0, 102), yticks=range(y + 1), ylim=(y + 1, -1))
    axis.set_yticklabels([row.name for row in TABLES["small"]], fontsize=8)
    outside(axis)


def scarce(figure):
    """Training on 1,600 sequences again and again: exact accuracy against training FLOPs."""
    axis = figure.subplots()
    for n, name, colour, label in (
            (1, "N1-for9600", COLOURS[1], "N = 1"), (4, "N[24]-for1600", COLOURS[4], "N = 4"),
            (1, "blocks8-for1600", "tab:purple", "N = 1, eight blocks")):
        _, cost, y = spent(pattern := f"small/scarce1600-{name}-s*.jsonl", n)
        dotted(axis, {x / 1e12: seeds for x, seeds in zip(cost, y)}, colour, label)
    floor_line(axis, pattern)
    axis.set(xlabel="training TFLOPs", ylabel="exact, %", ylim=(0, 102))
    outside(axis)


def tasks(figure):
    """Exact accuracy on Depo by hops, and at four hops against FLOPs; on GSM by operations."""
    axes = figure.subplots(1, 3, sharey=True)
    for axis, pattern, label in ((axes[0], STAIR, "Depo, 12 nodes: hops"),
                                 (axes[2], GSM, "GSM: operations")):
        for n in experiment(pattern)[0]:
            records = ends(pattern, n)
            floors = {int(x): level["floor"] for x, level in records[0]["levels"].items()}
            dotted(axis, {x: exact(records, str(x)) for x in floors}, COLOURS[n], f"N = {n}")
        axis.plot([*floors], [100 * y for y in floors.values()], **FLOOR, label="floor")
        axis.set(xlabel=label, ylim=(-3, 102), xticks=[*floors])
    for n in reversed(experiment(STAIR)[0]):  # the lowest on top
        _, cost, seeds = spent(STAIR, n, "4")
        dotted(axes[1], {x / 1e15: y for x, y in zip(cost, seeds)}, COLOURS[n], f"N = {n}")
    axes[0].set(ylabel="exact, %")
    axes[1].set(xlabel="12 nodes, four hops:\ntraining PFLOPs")
    outside(axes[2])


def speed(figure):
    """The paper's Fig. 6: throughput against N, and against L for N = 1; dotted is 1 / N."""
    axes = figure.subplots(1, 2, sharey=True)
    for colour, log in zip(("black", "tab:purple", "tab:olive"), read("bench/*.jsonl")):
        rows = [row for row in log.records if "ms" in row]
        by_N = {row["loops"]: row["tokens_per_s"] for row in rows
                if row["window"] == rows[0]["window"]}
        by_L = {row["window"]: row["tokens_per_s"] for row in rows if row["loops"] == 1}
        axes[0].plot(by_N.keys(), [by_N[1] / n for n in by_N], color=colour, lw=0.8, ls=":")
        for axis, points, label in ((axes[0], by_N, f"N (L = {rows[0]['window']})"),
                                    (axes[1], by_L, "L, tokens (N = 1)")):
            axis.plot(*zip(*sorted(points.items())), "o-", ms=3, color=colour,
                      label=card(log.header))
            axis.set(xscale="log", yscale="log", xlabel=label, xticks=[*points])
            axis.xaxis.set_major_formatter("{x:.0f}")
            axis.minorticks_off()
    axes[0].set(ylabel="training tokens/s")
    outside(axes[1])


def draw(folder: Path):
    """The figures of all logs that are here, into folder. Takes matplotlib."""
    import matplotlib
    from matplotlib.figure import Figure
    look = {"svg.hashsalt": "sleep", "svg.fonttype": "none", "font.size": 9,
            "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False}
    for make in (laptop, reach, fig2b, small, scarce, tasks, speed):
        with matplotlib.rc_context(look):
            make(figure := Figure(figsize=(7, 2.8), layout="constrained"))
            figure.savefig(svg := io.BytesIO(), format="svg",
                           metadata={"Date": None, "Creator": None})
        path = folder / f"{make.__name__}.svg"
        if not path.exists() or path.read_bytes() != svg.getvalue():
            train.write(path, svg.getvalue())


def main(argv: list[str] | None = None) -> int:
    parser = train.Parser(prog="render.py", description=__doc__.split("\n\n")[0])
    parser.add_argument("--check", action="store_true",
                        help="write nothing; print what would change, and exit with 1 if it would")
    check = parser.parse_args(argv).check
    stale = {path: text for path, text in rendered().items() if path.read_text("utf-8") != text}
    for path, text in stale.items():
        if check:
            name = str(path.relative_to(ROOT))
            before = path.read_text("utf-8").splitlines()
            print("\n".join(difflib.unified_diff(
                before, text.splitlines(), name, name, n=0, lineterm="")))
        else:
            train.write(path, text.encode())
    if check:
        return int(bool(stale))
    if find_spec("matplotlib"):
        draw(HERE)
    else:
        print("The figures are not drawn: there is no matplotlib here.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
