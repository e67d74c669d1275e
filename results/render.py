"""Make what the READMEs say of logs and code: python results/render.py [--check].

Fills the tables of results/README.md from the logs beside it, puts the places of the code's tags
into README.md's tables of equations and choices, and draws the figures, which takes matplotlib.
Without a change in logs or code it changes nothing.
"""

import difflib
import io
import json
import re
import sys
from collections import defaultdict
from functools import cache
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
if __name__ == "__main__":  # run as a program, Python only looks beside this file
    sys.path.insert(0, str(ROOT))

import train  # noqa: E402
from results.bench import model_flops  # noqa: E402

KINDS = r"Eq\.|Alg\.|Choice:|Differs:"  # of tags
COLOURS = {1: "#888888", 2: "#2a6fbb", 3: "#3f9b57", 4: "#c4442b"}  # of N
FLOOR = {"color": "black", "lw": 0.8, "ls": "--"}
VARIANT = "results/variants.py"  # a row's command begins with it, where it is not train.py's
FREE = {*train.LEFT_OUT, "init", "seed", "loops", "eval_loops", "eval_every", "variant"}

SETTINGS = {  # name of the logs -> what tables and figures call it, its options
    "base": ("4 heads, 4e-3", "--n_head 4 --muon_lr 4e-3"),
    "m3": ("4 heads, 3e-3", "--n_head 4 --muon_lr 3e-3"),
    "m2": ("4 heads, 2e-3", "--n_head 4 --muon_lr 2e-3"),
    "h8": ("8 heads, 4e-3", "--n_head 8 --muon_lr 4e-3"),
    "factor": ("a factor for the scores, SLEEP_FACTOR=1", "--n_head 4 --muon_lr 4e-3"),
    "d20": ("rates fall later, SLEEP_DECAY=0.2", "--n_head 4 --muon_lr 4e-3")}
SETTINGS_T = {12: (2344, "base m3 m2 h8 factor d20"), 10: (782, "base m3 m2 factor")}  # t -> steps
FIG2A = {4: "converges", 8: "converges", **dict.fromkeys((10, 12, 14, 16), "ever more slowly")}
PAPER = "--paper --fast compile"
WINDOW = f"{VARIANT} position {PAPER} --n_head 4"
WORTH_T = 12, 16  # t of the runs with 160M tokens that WORTH compares with
SUPPLY = {  # what the passes supply, t = 8: variant, options
    "embed": ("four blocks, every pass from the embedding", "embed", "--loops 4"),
    "resetS": ("four blocks, every pass from the window's S", "reset_S", "--loops 4"),
    "blocks8": ("eight blocks", None, "--layout asasasas --loops 1"),
    "blocks2": ("two blocks", None, "--layout as --loops 1,2,4"),
    "blocks2-embed": ("two blocks, from the embedding", "embed", "--layout as --loops 2"),
    "blocks2-resetS": ("two blocks, from the window's S", "reset_S", "--layout as --loops 2"),
    "position-blocks2": ("two blocks, with a position", "position", "--layout as --loops 1,2,4"),
    "position-blocks2-embed": ("two blocks, with a position, from the embedding",
                               "position+embed", "--layout as --loops 2"),
    "position-blocks2-resetS": ("two blocks, with a position, from the window's S",
                                "position+reset_S", "--layout as --loops 2")}
WORTH = {  # other ways to spend compute: variant, options, steps
    "tokens": ("N = 1, four times the tokens", None, "--loops 1", 12500),
    "blocks8": ("N = 1, eight blocks", None, "--layout asasasas --loops 1", 3125),
    "blocks16": ("N = 1, sixteen blocks", None, "--layout asasasasasasasas --loops 1", 3125),
    "awake": ("the passes spent awake", "awake", "--loops 4", 3125)}
SMALL = {  # variants of the default run: variant, options
    "base": ("the default, N = 1, 2, 4", None, "--loops 1,2,4"),
    "position": ("with a position in the window", "position", "--loops 1,2"),
    "blocks4": ("twice the blocks", None, "--layout asas --loops 1"),
    "tokens2": ("twice the tokens", None, "--loops 1 --steps 1600"),
    "tokens4": ("four times the tokens", None, "--loops 1 --steps 3200"),
    "wake": ("the passes spent awake", "awake", "--loops 2,4"),
    "embed": ("every pass from the embedding", "embed", "--loops 2"),
    "resetS": ("every pass from the window's S", "reset_S", "--loops 2"),
    "last_pass": ("gradients through the last pass alone", "last_pass", "--loops 2,4"),
    "inject": ("every pass adds the embedding", "inject", "--loops 2,4"),
    "pass_vector": ("a learned vector for each pass", "pass_vector", "--loops 2,4"),
    "delta": ("update without decay (DeltaNet)", None, "--loops 1,2 --rule delta"),
    "mamba2": ("update without the delta rule (Mamba-2)", None, "--loops 1,2 --rule mamba2"),
    "kept": ("the cache is kept", None, "--eviction none --loops 1,2"),
    "attention": ("attention only", None, "--layout aa --loops 1,2"),
    "attention-kept": ("attention only, the cache is kept", None,
                       "--layout aa --eviction none --loops 1,2")}

RECIPES = [  # what the paper does with trained models, and its sliding window: variant, options
    ("sliding window (Fig. 5)", None, "--eviction sliding --loops 1,2", "sliding"),
    ("middle blocks, 1: a hybrid, N = 1", None, "--layout asas --t 5 --loops 1", "middle"),
    *((f"2: its middle blocks, N = {n}", None,
       f"--layout asas --t 5 --loop_blocks 1:3 --loops {n} --init out/middle", f"middle-N{n}")
      for n in (1, 2)),
    *((f"grafted, {step}, N = {n}", variant, f"{options} --loops {n}", f"{name}-N{n}")
      for step, name, variant, options in (
          ("1: attention only", "looped", "awake", "--layout aa --window 26 --eviction none"),
          ("2: the new SSM block alone", "grafted", "graft",
           "--layout ama --init out/looped --steps 400"),
          ("3: everything, sliding window", "ouro", None,
           "--layout ama --init out/grafted --eviction sliding"))
      for n in (1, 2))]

DEPO, GSM = "depo/nodes8-s*.jsonl", "gsm/ops6-half-s*.jsonl"  # which the figures show
BY_LEVEL = {"depo": "k", "gsm": "operations"}  # table -> what a level is
OTHERS = "--layout asas --d_model 128 --batch 256 --fast compile"
NODES8 = f"--task depo --nodes 8 --hops 4 --questions 4 --names 4 --window 16 {OTHERS}"
OPS6 = f"--task gsm --ops 6 --statements 8 --modulus 5 --variables 8 {OTHERS}"
WITH_COMPUTE = "fig2b", "worth", "depo", "gsm", "scarce"  # tables that say what training took

SCARCE = [  # K, N, steps
    (640, "1,2", 800), (1600, "1,2", 800), (1600, "4", 800), (1600, "4", 1600), (1600, "2", 1600),
    (1600, "1", 3200), (1600, "1", 6400), (1600, "1", 9600), (2048, "1,2", 800),
    (2048, "4", 800), (2048, "4", 1600), (2048, "2", 1600), (2048, "1", 3200), (2048, "1", 6400),
    (3200, "1,2", 800), (3200, "4", 800), (3200, "1", 1600), (3200, "1", 3200), (6400, "1,2", 800),
    (6400, "4", 800), (6400, "1", 1600)]
LONGER_ROWS = {t: (f"t = {t}, 160M tokens", "-", f"{PAPER} --loops 1,2,4 --t {t} --steps 3125",
                   f"longer/t{t}-s*.jsonl") for t in (12, 14, 16)}

T32_RUNS = [  # billions of tokens, N, steps, logs
    (2, "1,2,3", 39063, "t32/N[1-3].jsonl"), (2, "4", 39063, "t32/N4*.jsonl"),
    (4, "2", 78126, "t32/N2-4B.jsonl"), (5, "1", 97656, "t32/N1-5B.jsonl"),
    (9, "1", 177100, "t32/N1-9B.jsonl")]
T32_POSITION = "window-position/t32-2B/N*.jsonl"
T32 = f"{PAPER} --t 32"
PAPERS_T32 = "after 4 to 5 billion tokens N = 1 about 10, N = 2 about 20, N = 3 and 4 above 30"


def command(variant: str | None, options: str) -> str:
    return f"{VARIANT} {variant} {options}" if variant else options


# table -> its rows: experiment, what the paper has, command (train.py's options alone), logs
TABLES = {
    "laptop": [("Rule 110, every option at its default", "-", "--t 4", "laptop/seed*.jsonl")],
    "settings": [
        (f"t = {t}: {SETTINGS[name][0]}", "-",
         f"--paper {SETTINGS[name][1]} --fast compile --loops 1,4 --t {t} --steps {steps}",
         f"settings/{name}-t{t}-s*.jsonl")
        for t, (steps, names) in SETTINGS_T.items() for name in names.split()],
    "fig2a": [
        *((f"t = {t} (Fig. 2a)", f"N = 1 {paper}", f"{PAPER} --loops 1,2,4 --t {t}",
           f"fig2a/t{t}-s*.jsonl") for t, paper in FIG2A.items()),
        *LONGER_ROWS.values()],
    "fig2b": [
        *((f"t = 32, {billions} billion tokens", PAPERS_T32 if billions < 9 else "-",
           f"{T32} --steps {steps} --loops {loops}", logs)
          for billions, loops, steps, logs in T32_RUNS),
        *((f"t = 32, 512M tokens, {gpus}", "-", f"{T32} --steps 10000 --loops 1",
           f"t32/N1-short-{key}-s*.jsonl")
          for key, gpus in (("one", "one GPU"), ("two", "two GPUs")))],
    "supply": [(name, "-", command(variant, f"{PAPER} {options} --t 8"),
                f"supply/t8-{key}-s*.jsonl") for key, (name, variant, options) in SUPPLY.items()],
    "worth": [*(LONGER_ROWS[t] for t in WORTH_T),
              *((f"t = {t}: {name}", "-",
                 command(variant, f"{PAPER} {options} --t {t} --steps {steps}"),
                 f"worth/t{t}-{key}-s*.jsonl")
                for t in WORTH_T for key, (name, variant, options, steps) in WORTH.items())],
    "small": [(name, "-", command(variant, options), f"small/{key}-s*.jsonl")
              for key, (name, variant, options) in SMALL.items()],
    "scarce": [
        *((f"{K:,} sequences, {steps:,} steps", "-",
           f"--loops {N} --t 4 --sequences {K} --steps {steps}",
           f"small/scarce{K}-N{N.replace(',', '')}-for{steps}-s*.jsonl") for K, N, steps in SCARCE),
        ("1,600 sequences, 1,600 steps, eight blocks", "-", "--loops 1 --t 4 --sequences 1600 "
         "--steps 1600 --layout asasasas", "small/scarce1600-blocks8-for1600-s*.jsonl")],
    "recipes": [(name, "-", command(variant, options), f"small/{key}-s*.jsonl")
                for name, variant, options, key in RECIPES],
    "depo": [
        ("rate 4e-3 (Fig. 3)", "N = 1 little from k = 4 on, N = 2 stalls from 8",
         f"{NODES8} --muon_lr 4e-3 --steps 6000 --loops 1,2,4", DEPO),
        ("rate 2e-3", "-", f"{NODES8} --muon_lr 2e-3 --steps 6000 --loops 1,2,4",
         "depo/nodes8-half-s*.jsonl"),
        *(("rate 4e-3, four times the tokens", "-",
           f"{NODES8} --muon_lr 4e-3 --steps 24000 --loops {n}", f"depo/nodes8-N{n}x4-s*.jsonl")
          for n in (1, 2)),
        ("rate 2e-3, four times the tokens", "-",
         f"{NODES8} --muon_lr 2e-3 --steps 24000 --loops 1", "depo/nodes8-half-N1x4-s*.jsonl")],
    "gsm": [
        ("rate 2e-3 (Fig. 4)", "more passes, more right",
         f"{OPS6} --window 50 --muon_lr 2e-3 --steps 12000 --loops 1,2,4", GSM),
        ("rate 2e-3, four times the tokens", "-",
         f"{OPS6} --window 50 --muon_lr 2e-3 --steps 48000 --loops 1",
         "gsm/ops6-half-N1x4-s*.jsonl"),
        ("rate 4e-3", "-", f"{OPS6} --window 50 --muon_lr 4e-3 --steps 12000 --loops 1,2,4",
         "gsm/ops6-s?.jsonl"),
        ("rate 4e-3, four times the tokens", "-",
         f"{OPS6} --window 50 --muon_lr 4e-3 --steps 48000 --loops 1", "gsm/ops6-N1x4-s*.jsonl"),
        *(("sliding window (Fig. 5)", "N = 4 ahead of N = 1",
           f"{OPS6} --window 10 --eviction sliding --muon_lr 2e-3 --steps 12000 --loops {loops}",
           f"gsm/ops6-sliding-N{of}-s*.jsonl") for loops, of in (("1,2", "[12]"), ("4", "4")))],
    "position": [
        *((f"t = {t} (Fig. 2a)", f"N = 1 {paper}", f"{WINDOW} --loops 1,2,4 --t {t}",
           f"window-position/fig2a/t{t}-s*.jsonl") for t, paper in FIG2A.items()),
        *((f"t = {t}, eight heads", "-", f"{VARIANT} position {PAPER} --loops 1,4 --t {t}",
           f"window-position/heads8/t{t}-s*.jsonl") for t in (10, 12)),
        *((f"t = {t}, two blocks", "-", f"{WINDOW} --layout as --loops 1,2,4 --t {t}",
           f"window-position/two-blocks/t{t}-s*.jsonl") for t in (8, 10)),
        ("t = 32 (Fig. 2b)", PAPERS_T32, f"{WINDOW} --loops 1,2,3,4 --t 32 --steps 9766",
         "window-position/t32/N*.jsonl"),
        ("t = 32, 2 billion tokens", "the same", f"{WINDOW} --loops 1,4 --t 32 --steps 39063",
         T32_POSITION)]}
ROWS = {row[-1]: row for rows in TABLES.values() for row in rows}


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
    row, _, arguments, _ = ROWS[pattern]
    given, variant = arguments.split(), None
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
        patch = {f"{knob}={value}" for knob, value in log.header.get("patch", {}).items()}
        wrong += [f"{log.name}: its patch and its row's name differ in {switch}"
                  for switch in patch ^ {*re.findall(r"[A-Za-z_]+=\S+", row)}]
        wrong += [f"{log.name} ends at step {record['step']} for N = {n}, not {options['steps']}"
                  for n, record in log.last.items() if record["step"] != options["steps"]]
    ran = [(log.header["config"]["seed"], n) for log in logs for n in log.last]
    if sorted(ran) != sorted(product({seed for seed, _ in ran}, options["loops"])):
        wrong.append("its logs must have each N of --loops once for each seed")
    if wrong:
        raise SystemExit(f"render.py: {pattern}: {wrong[0]} (command: {arguments})")
    return options["loops"], logs


def ends(pattern: str, n: int) -> list[dict]:
    """The last records with N = n, of every seed."""
    return [log.last[n] for log in experiment(pattern)[1] if n in log.last]


def config_of(pattern: str) -> dict:
    """The configuration of the first log of a row."""
    return experiment(pattern)[1][0].header["config"]


def asked_after(pattern: str, n: int) -> dict[str, list[dict]]:
    """Passes asleep -> the scores with so many of every seed's model, trained with N = n."""
    of = [record["eval_loops"] for record in ends(pattern, n)]
    return {passes: [scores[passes] for scores in of] for passes in of[0]}


def exact(records: list[dict], level: str | None = None) -> list[float]:
    """Of each record, in %: at a level, or at the hardest one, where there are several."""
    by_level = [record.get("levels", {"only": record}) for record in records]
    return [100 * levels[level or [*levels][-1]]["exact"] for levels in by_level]


def card(header: dict) -> str:
    """"4 x NVIDIA H100 80GB HBM3" -> "4 x H100"; "CPU, 2 threads" -> "CPU"."""
    name = header["hardware"].split(",")[0].replace("NVIDIA ", "")
    return re.sub(r" \d+GB.*", "", name)


def joined(values) -> str:
    return ", ".join(sorted(set(values)))


# --------------------------------------------------------------------------------------- the tables

def mean_and_range(values: list[float], digits: int = 1) -> str:
    """[63.1, 57.2] -> "60.2 [57.2, 63.1]"; one value alone as it is."""
    mean, low, high = (f"{x:.{digits}f}" for x in (sum(values) / len(values), min(values),
                                                   max(values)))
    return mean if len(values) == 1 else f"{mean} [{low}, {high}]"


def levels(records: list[dict], score: str, scale: float = 100, digits: int = 1) -> list[str]:
    """A score over the seeds' records, of each level: in %, unless scaled otherwise."""
    by_level = zip(*(record.get("levels", {0: record}).values() for record in records))
    return [mean_and_range([scale * level[score] for level in seeds], digits)
            for seeds in by_level]


def row_of(name: str, paper: str, arguments: str, pattern: str) -> list[str]:
    """What a table's row says of an experiment."""
    loops, logs = experiment(pattern)
    last = [record for n in loops for record in ends(pattern, n)]
    seeds, minutes = len(last) // len(loops), sum(record["seconds"] for record in last) / 60
    return [name, paper, f"`{arguments}`",
            "; ".join(f"N = {n}: {' / '.join(levels(ends(pattern, n), 'exact'))}" for n in loops),
            joined(" / ".join(levels([record], "floor")) for record in last), f"{seeds}",
            f"{last[0]['tokens'] / 1e6:.1f}M",
            f"{minutes / seeds:.1f} {joined(card(log.header) for log in logs)}",
            joined(log.header["commit"] for log in logs), f"`{pattern}`"]


def level_table(name: str) -> str:
    """Exact accuracy in a table's experiments, by level, for every N; the floors; in the first
    experiment the loss."""
    rows = [[f"{title}, N = {n}", *levels(ends(pattern, n), "exact")]
            for title, _, _, pattern in TABLES[name] for n in experiment(pattern)[0]]
    title, _, _, pattern = TABLES[name][0]
    losses = [[f"loss: {title}, N = {n}", *levels(ends(pattern, n), "loss", 1, 3)]
              for n in experiment(pattern)[0]]
    first = read(pattern)[0].records[0]
    return table(" | ".join([f"exact, % by {BY_LEVEL[name]}", *first["levels"]]),
                 [*rows, ["floor", *levels([first], "floor")], *losses])


def table(head: str, rows: list[list[str]]) -> str:
    lines = [head.split(" | "), ["---"] * len(head.split(" | ")), *rows]
    return "\n".join("| " + " | ".join(row) + " |" for row in lines)


@cache
def flops(pattern: str, n: int) -> list[float]:
    """FLOPs of the first 0, 1, ... steps of a row's training with N = n, as results/bench.py counts
    them."""
    config = config_of(pattern)
    task, model = train.build(config | {"dtype": "float32"})
    windows, awake = train.windows_of(task, model.config.window), variant_of(config) == "awake"
    of_a_step = config["batch"] * model_flops(model, windows, n, awake)
    return [of_a_step * step for step in range(config["steps"] + 1)]


def compute(pattern: str) -> str:
    """What the training of each N took, in 10^15 FLOPs."""
    return "; ".join(f"N = {n}: {flops(pattern, n)[-1] / 1e15:.3g}"
                     for n in experiment(pattern)[0])


def asked_table() -> str:
    """Exact accuracy of models trained with one N and asked after another number of passes: of the
    default task, and of GSM by operations."""
    rows, others = [], ["1", "2", "3", "4", "8"]
    for n in experiment(pattern := "small/base-s*.jsonl")[0]:
        after = asked_after(pattern, n)
        rows.append([f"N = {n}", *(mean_and_range(exact(after[other])) for other in others)])
    after = asked_after(GSM, 4)
    rows += [[f"N = 4, GSM, {level} needed",
              *(mean_and_range(exact(after[other], level)) for other in others)]
             for level in "1234"]
    return table(" | ".join(["trained with", *(f"asked after {n}" for n in others)]), rows)


def coin_table() -> str:
    """Training tokens, in millions, until 90 % of the held-out sequences are exact: the median of
    the seeds, the fewest and the most, and how many times the fewest the most are."""
    runs, rows = [json.loads(x) for x in (HERE / "coin.jsonl").read_text("utf-8").splitlines()], []
    for setting in dict.fromkeys(run["setting"] for run in runs):
        cells = []
        for n in (1, 2, 4):
            x = [run["tokens_to"]["90"] / 1e6 for run in runs
                 if (run["setting"], run["loops"]) == (setting, n)]
            cells.append("{:.1f} [{:.1f}, {:.1f}] {:.2f}".format(
                np.median(x), min(x), max(x), max(x) / min(x))
                + f" ({len(x)} seeds)" * (len(x) != 5) if x else "-")
        rows.append([setting, *cells])
    return table("setting | N = 1 | N = 2 | N = 4", rows)


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
    """The rows of every log of results/bench.py that is here, and the figure of them."""
    rows, held = [], []
    for _, header, (first, *records), _ in read("bench/*.jsonl"):
        for row in records:
            if "ms" in row:
                peak = f"{row['peak_bytes'] / 2**20:,.0f}" if "peak_bytes" in row else "-"
                rows.append([card(header), f"{header['config']['batch']}", f"{row['loops']}",
                             f"{row['window']}", f"{row['ms']:,.1f}", f"{row['tokens_per_s']:,.0f}",
                             f"{row['flops'] / first['matrix_rate']:.1%}", peak,
                             *(f"{row[name]:.1f}" for name in (
                                 "first_step_s", "wake_ms", "sleep_ms")), header["commit"]])
            else:
                held.append([card(header), *(f"{row[name]:,}" for name in (
                    "windows", "tokens", "S", "cache", "never_evicted"))])
    return "\n\n".join([
        table("device | batch | N | L | ms a step | tokens/s | share of peak | peak MiB | "
              "first step, s | wake, ms | sleep, ms | commit", rows),
        table("device | windows read | tokens | S, bytes | cache, bytes | "
              "cache if never evicted, bytes (computed)", held),
        "![Training tokens a second, against N and against L](speed.svg)"
    ])


def several_table() -> str:
    """Training on several GPUs, each N beside one GPU with a batch of 512."""
    rows = {}
    for _, header, (_, *records), _ in read("bench/several/*.jsonl"):
        count, kind = re.fullmatch(r"(?:(\d+) x )?(.*)", card(header)).groups("1")
        for row in records:
            if "ms" in row:
                rows[kind, row["loops"], int(count), header["config"]["batch"]] = row, header
    return table("devices | batch | N | ms a step | tokens/s | times one GPU | commit", [
        [card(header), f"{batch}", f"{n}", f"{row['ms']:.1f}", f"{row['tokens_per_s']:,.0f}",
         f"{row['tokens_per_s'] / rows[kind, n, 1, 512][0]['tokens_per_s']:.2f}", header["commit"]]
        for (kind, n, _, batch), (row, header) in sorted(rows.items())])


def filled(text: str) -> str:
    """results/README.md with every table as the logs have it."""
    head = ("experiment | paper | command: `python train.py` ... | exact, % | floor | seeds | "
            "tokens | minutes | commit | logs")
    made = {}
    for name, of in TABLES.items():
        columns, rows = head, [row_of(*row) for row in of]
        if name in WITH_COMPUTE:
            columns += " | PFLOPs"
            rows = [[*row, compute(pattern)] for row, (*_, pattern) in zip(rows, of)]
        if name in BY_LEVEL:
            rows = [[*row[:3], "below", "below", *row[5:]] for row in rows]  # exact, floor
        made[name] = table(columns, rows)
    for name in BY_LEVEL:
        made[name] += f"\n\n{level_table(name)}"
    made |= {"asked": asked_table(), "coin": coin_table(), "dream": dream_table(),
             "speed": speed_tables(),
             "several": several_table()}
    block = re.compile(r"^<!-- table: (.*) -->\n(?:.*\n)*?<!-- end -->$", re.M)
    agree("results/README.md: table", block.findall(text), "results/render.py", [*made])
    return block.sub(lambda match: f"<!-- table: {match[1]} -->\n{made[match[1]]}\n<!-- end -->",
                     text)


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
    return dict(zip((lesson, results), texts))


# -------------------------------------------------------------------------------------- the figures
# Lines are means over seeds, bands reach from the worst seed to the best.

def band(axis, points: dict[float, list[float]], colour, label: str, **style):
    """x -> the y of all seeds: a line through their means, and the space from worst to best."""
    x, y = zip(*sorted(points.items()))
    axis.plot(x, [sum(at) / len(at) for at in y], color=colour, label=label, **style)
    axis.fill_between(x, [*map(min, y)], [*map(max, y)], color=colour, alpha=0.2, lw=0)


def course(pattern: str, n: int) -> dict[tuple[int, int], list[float]]:
    """In the course of training with N = n: step, tokens -> exact accuracy of all seeds, in %."""
    points = defaultdict(list)
    for log in experiment(pattern)[1]:
        for record in log.records:
            if record["loops"] == n:
                points[record["step"], record["tokens"]] += exact([record])
    return points


def spent(pattern: str, n: int) -> tuple[list[int], list[float], list[list[float]]]:
    """In the course of training with N = n: tokens, FLOPs, exact accuracy of all seeds in %."""
    points, of_step = course(pattern, n), flops(pattern, n)
    return ([tokens for _, tokens in points], [of_step[step] for step, _ in points],
            [*points.values()])


def against_tokens(axis, pattern: str, n: int, label: str):
    points = {tokens / 1e6: y for (_, tokens), y in course(pattern, n).items()}
    band(axis, points, COLOURS[n], label)


def floor_line(axis, pattern: str):
    floor = experiment(pattern)[1][0].records[0]["floor"]
    axis.axhline(100 * floor, **FLOOR, label="floor")


def floors_by(axis, floors: dict[int, float]):
    """x -> the floor there."""
    axis.plot([*floors], [100 * y for y in floors.values()], **FLOOR, label="floor")


def outside(axis, **style):
    """A legend to the right of the axes."""
    axis.legend(loc="upper left", bbox_to_anchor=(1, 1), **style)


def laptop(figure):
    """The default run: exact accuracy against tokens."""
    axis, pattern = figure.subplots(), "laptop/seed*.jsonl"
    for n in experiment(pattern)[0]:
        against_tokens(axis, pattern, n, f"N = {n}")
    floor_line(axis, pattern)
    axis.set(xlabel="training tokens, millions", ylabel="exact, %", ylim=(0, 102))
    outside(axis)


def fig2a(figure):
    """The paper's Fig. 2a: exact accuracy by t after 40M tokens, and in the course of longer runs.
    """
    left, *right = figure.subplots(1, 1 + len(LONGER_ROWS), sharey=True)
    for n in (1, 2, 4):
        band(left, {t: exact(ends(f"fig2a/t{t}-s*.jsonl", n)) for t in FIG2A}, COLOURS[n],
             f"N = {n}", marker="o", ms=3)
        for axis, (*_, pattern) in zip(right, LONGER_ROWS.values()):
            against_tokens(axis, pattern, n, f"N = {n}")
    floors_by(left, {t: ends(f"fig2a/t{t}-s*.jsonl", 1)[0]["floor"] for t in FIG2A})
    left.set(title="40M tokens", xlabel="t, steps", xticks=[4, 8, 12, 16],
             ylabel="exact, %", ylim=(0, 102))
    for axis, (t, (*_, pattern)) in zip(right, LONGER_ROWS.items()):
        floor_line(axis, pattern)
        axis.set(title=f"t = {t}", xlabel="tokens, millions")
    outside(right[-1])


def fig2b(figure):
    """The paper's Fig. 2b, t = 32: exact accuracy against tokens and against training FLOPs.

    Squares are what the paper prints after 4 to 5 billion tokens; thin is with a position in the
    window, dotted the best that can be done from some neighbouring cells.
    """
    figure.set_size_inches(7, 4)
    left, right = figure.subplots(1, 2, sharey=True)
    thick, thin = {"lw": 1.5}, {"lw": 0.7}
    runs = [*((logs, n, thick | {"ls": {2: "-", 4: "--", 5: "--", 9: "-."}[billions]},
               f"N = {n}, {billions} billion tokens")
              for billions, loops, _, logs in T32_RUNS for n in map(int, loops.split(","))),
            *((T32_POSITION, n, thin, f"N = {n}, with a position") for n in (1, 4))]
    for pattern, n, look, name in runs:
        tokens, cost, seeds = spent(pattern, n)
        lines = left.plot([x / 1e9 for x in tokens], seeds, color=COLOURS[n], **look)
        right.plot([x / 1e15 for x in cost], seeds, color=COLOURS[n], **look,
                   label=[name] + [None] * (len(lines) - 1))
    for n, y, label in ((1, 10, "N = 1"), (2, 20, "N = 2"), (4, 30, "3, 4: above")):
        left.plot(4.5, y, "s", color=COLOURS[n], ms=4)
        left.annotate(label, (4.5, y), (5, -3), textcoords="offset points", fontsize=7)
    right.plot([], [], "ks", ms=4, label="the paper's")
    answers = truth_table(24, 32, 110)
    for seen in (16, 20, 22, 23):
        y = oracle(answers, seen)
        for axis in (left, right):
            axis.axhline(y, color="black", lw=0.5, ls=":")
        right.annotate(f"{seen} of 24 cells known", (1, y), (4, -2), fontsize=7,
                       xycoords=("axes fraction", "data"), textcoords="offset points")
    for axis, label in ((left, "training tokens, billions"), (right, "training PFLOPs")):
        floor_line(axis, T32_RUNS[0][-1])
        axis.set(xlabel=label, ylim=(0, 75))
    left.set(ylabel="exact, %, t = 32")
    outside(right, fontsize=7)


def worth(figure):
    """Ways to spend compute: means over seeds against training FLOPs and tokens in the course of
    training, and a dot for each seed at its end against parameters."""
    figure.set_size_inches(7, 4.6)
    styles = {"tokens": "--", "blocks8": "-.", "blocks16": ":", "awake": ":"}
    for row, t in zip(figure.subplots(2, 3, sharey=True, sharex="col"), WORTH_T):
        runs = [(f"N = {n}", LONGER_ROWS[t][-1], n, "-") for n in (1, 2, 4)]
        runs += [(name, f"worth/t{t}-{key}-s*.jsonl", int(options[-1]), styles[key])
                 for key, (name, _, options, _) in WORTH.items()]
        for name, pattern, n, style in runs:
            tokens, cost, seeds = spent(pattern, n)
            y = np.mean(seeds, axis=1)
            look = {"color": COLOURS[n], "ls": style, "lw": 1.2}
            row[0].plot([x / 1e15 for x in cost], y, **look)
            row[1].plot([x / 1e6 for x in tokens], y, **look, label=name)
            _, model = train.build(config_of(pattern) | {"dtype": "float32"})
            last = exact(ends(pattern, n))
            row[2].plot([train.parameters_of(model) / 1e6] * len(last), last, "o", ms=4, mew=0,
                        alpha=0.7, color=COLOURS[n])
        row[0].set(ylabel=f"exact, %, t = {t}", ylim=(0, 103), xlim=(0.5, 16))
        row[1].set(xlim=(20, 800))
        for axis in row[:2]:
            axis.set_xscale("log", nonpositive="mask")
        for axis in row:
            floor_line(axis, pattern)
    figure.legend(*figure.axes[1].get_legend_handles_labels(), loc="outside right upper",
                  fontsize=7)
    for axis, label in zip(row, ("training PFLOPs", "tokens, millions", "parameters, millions")):
        axis.set(xlabel=label)
        axis.xaxis.set_major_formatter("{x:.0f}")
    row[0].set_xticks([1, 2, 4, 8, 16])
    row[1].set_xticks([40, 160, 640])
    for axis in figure.axes:
        axis.minorticks_off()


def small(figure):
    """The variants of the default run: a dot for each seed, a dash for their mean."""
    figure.set_size_inches(7, 4.2)
    axis = figure.subplots()
    for y, key in enumerate(SMALL):
        loops, _ = experiment(pattern := f"small/{key}-s*.jsonl")
        for n in loops:
            x = exact(ends(pattern, n))
            shift = {1: -0.2, 2: 0, 4: 0.2}[n]
            axis.plot(x, [y + shift] * len(x), "o", ms=3.5, mew=0, alpha=0.7, color=COLOURS[n])
            axis.plot(sum(x) / len(x), y + shift, "|", ms=8, color=COLOURS[n])
    for n in (1, 2, 4):
        axis.plot([], [], "o", ms=4, color=COLOURS[n], label=f"N = {n}")
    axis.axvline(100 * ends("small/base-s*.jsonl", 1)[0]["floor"], **FLOOR, label="floor")
    axis.set(xlabel="exact, %", xlim=(0, 102), yticks=range(len(SMALL)), ylim=(len(SMALL), -1))
    axis.set_yticklabels([name for name, *_ in SMALL.values()], fontsize=8)
    outside(axis)


def scarce(figure):
    """Training on 1,600 sequences again and again: exact accuracy against training FLOPs."""
    axis = figure.subplots()
    for n, name, colour, label in (
            (1, "N1-for9600", COLOURS[1], "N = 1"), (4, "N4-for1600", COLOURS[4], "N = 4"),
            (1, "blocks8-for1600", "tab:purple", "N = 1, eight blocks")):
        _, cost, y = spent(pattern := f"small/scarce1600-{name}-s*.jsonl", n)
        band(axis, {x / 1e12: seeds for x, seeds in zip(cost, y)}, colour, label)
    floor_line(axis, pattern)
    axis.set(xlabel="training TFLOPs", ylabel="exact, %", ylim=(0, 102))
    outside(axis)


def asked(figure):
    """Models asked after fewer passes than trained with, and more: the default task's by N, GSM's
    by operations, with a dot for each seed."""
    axes, pattern = figure.subplots(1, 2, sharey=True), "small/base-s*.jsonl"
    for n in experiment(pattern)[0]:
        band(axes[0], {int(passes): exact(records) for passes, records
                       in asked_after(pattern, n).items()}, COLOURS[n], f"trained with N = {n}",
             marker="o", ms=3)
    after = asked_after(GSM, 4)
    for level, shade in (("1", "#9ecae1"), ("2", "#4292c6"), ("3", "#08519c"), ("4", "black")):
        passes, y = [*map(int, after)], [exact(records, level) for records in after.values()]
        axes[1].plot(passes, np.mean(y, axis=1), color=shade, label=f"{level} needed")
        axes[1].plot(passes, y, "o", ms=3, mew=0, alpha=0.6, color=shade)
        axes[1].axhline(100 * after["4"][0]["levels"][level]["floor"], **FLOOR | {"color": shade})
    axes[0].set(title="the default task", ylabel="exact, %", ylim=(0, 102))
    axes[1].set(title="GSM by operations, N = 4")
    floor_line(axes[0], pattern)
    for axis in axes:
        axis.set(xlabel="passes asleep", xticks=[1, 2, 3, 4, 8])
    named = {label: line for axis in axes for line, label in zip(*axis.get_legend_handles_labels())}
    figure.legend(named.values(), named.keys(), loc="outside right upper", fontsize=7)


def tasks(figure):
    """Exact accuracy on Depo by hops and on GSM by operations."""
    axes = figure.subplots(1, 2, sharey=True)
    for axis, pattern, label in zip(axes, (DEPO, GSM), (
            "Depo: k, hops along the cycle", "GSM: operations")):
        for n in experiment(pattern)[0]:
            records = ends(pattern, n)
            floors = {int(x): level["floor"] for x, level in records[0]["levels"].items()}
            band(axis, {x: exact(records, str(x)) for x in floors}, COLOURS[n], f"N = {n}",
                 marker="o", ms=3)
        floors_by(axis, floors)
        axis.set(xlabel=label, ylim=(0, 102), xticks=[*floors])
    axes[0].set(ylabel="exact, %")
    outside(axes[1])


def settings(figure):
    """The settings at t = 12: a dot for each seed, a dash for their mean."""
    axis, names = figure.subplots(), SETTINGS_T[12][1].split()
    for x, name in enumerate(names):
        for n, shift in ((1, -0.12), (4, 0.12)):
            y = exact(ends(pattern := f"settings/{name}-t12-s*.jsonl", n))
            axis.plot([x + shift] * len(y), y, "o", ms=4, mew=0, alpha=0.7, color=COLOURS[n],
                      label=f"N = {n}" if x == 0 else None)
            axis.plot(x + shift, sum(y) / len(y), "_", ms=12, color=COLOURS[n])
    floor_line(axis, pattern)
    labels = [re.sub(r", | for ", lambda match: match[0].rstrip() + "\n", SETTINGS[name][0])
              for name in names]
    axis.set(ylabel="exact, %", ylim=(0, 102), xticks=range(len(names)))
    axis.set_xticklabels(labels, fontsize=7)
    outside(axis)


def position(figure):
    """With a vector for the place in the window: by t with four blocks, with two."""
    axes = figure.subplots(1, 2, sharey=True, width_ratios=[2, 1])
    for axis, name, ts, title in ((axes[0], "fig2a", [*FIG2A], "four blocks"),
                                  (axes[1], "two-blocks", [8, 10], "two blocks")):
        pattern = f"window-position/{name}/t{{}}-s*.jsonl"
        for n in (1, 2, 4):
            band(axis, {t: exact(ends(pattern.format(t), n)) for t in ts}, COLOURS[n],
                 f"N = {n}", marker="o", ms=3)
        floors_by(axis, {t: ends(pattern.format(t), 1)[0]["floor"] for t in ts})
        axis.set(title=f"{title}, 40M tokens", xlabel="t, steps of the automaton", xticks=ts,
                 ylim=(0, 102))
    for n in (1, 4):
        y = exact(ends("settings/base-t10-s*.jsonl", n))
        axes[0].plot([10 + n / 10] * len(y), y, "o", ms=3, mfc="none", color=COLOURS[n],
                     label=f"N = {n}, without")
    axes[0].set(ylabel="exact, %")
    axes[0].legend(loc="center left", fontsize=7)


def truth_table(cells: int, t: int, rule: int) -> np.ndarray:
    """The first cell after t steps from each of all 2^cells states: uint8 0/1 (2^cells,).

    In state i, cell j is bit j of i. On the way every cell is a table with 64 states in a word, so
    that a step of all 2^24 states is a few operations on 2 MiB arrays. With fewer than 6 cells the
    states repeat, to fill a word.
    """
    states = np.arange(max(2**cells, 64))
    tables = [np.packbits(states >> i & 1 == 1).view(np.uint64) for i in range(cells)]
    for _ in range(t):
        new = []
        for i in range(cells):
            left, here, right = tables[i - 1], tables[i], tables[(i + 1) % cells]
            new.append(table := np.zeros_like(here))
            for pattern in range(8):
                if rule >> pattern & 1:
                    table |= ((left if pattern & 4 else ~left) & (here if pattern & 2 else ~here)
                              & (right if pattern & 1 else ~right))
        tables = new
    return np.unpackbits(tables[0].view(np.uint8))


def oracle(answers: np.ndarray, seen: int) -> float:
    """Exact accuracy with four states, in %, of the best answers from `seen` neighbouring cells.

    answers (2^cells,) are the right ones. Over all states, and for the best place of those cells on
    the ring.
    """
    cells, right = len(answers).bit_length() - 1, []
    for i in range(cells):  # the unseen cells begin here; cell j is axis cells - 1 - j
        unseen = tuple(cells - 1 - (i + j) % cells for j in range(cells - seen))
        p = answers.reshape((2,) * cells).mean(axis=unseen, dtype=np.float32)
        right.append(np.maximum(p, 1 - p).mean(dtype=np.float64))
    return 100 * max(right)**4


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
    for make in (laptop, asked, fig2a, fig2b, worth, small, scarce, tasks, settings, position,
                 speed):
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
