"""Train the sleeping hybrid on a synthetic task and see what N passes asleep are worth.

One model is trained for each N of --loops, from the same seed on the same data, and a table
compares them on held-out instances. A run's folder gets log.jsonl (a header, then a line for every
evaluation) and a checkpoint for each N; --resume DIR goes on exactly where it stopped.
"""

import argparse
import contextlib
import functools
import gc
import inspect
import io
import itertools
import json
import math
import os
import pickle
import platform
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from dataclasses import fields
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from data import IGNORE, TASKS, floor, generator
from model import PIECE, Config, Hybrid
from sleep import Cache, Window, algorithm1, check_dream, cut, evict, sleep, wake

TASK_OPTIONS = {  # parameters of the tasks' constructors, where their defaults stand
    "t": "rule110: steps of the automaton, the difficulty (5; the paper: up to 32)",
    "cells": "rule110: cells in a state (12; the paper: 24)",
    "states": "rule110: states in a sequence (2; the paper: 4)",
    "automaton": "rule110: number of the elementary rule (110)",
    "nodes": "depo: nodes of the largest cycle (75, as the paper)",
    "hops": "depo: hops at most (16, as the paper)",
    "questions": "depo: questions in a sequence (10, as the paper)",
    "names": "depo: tokens that end a name, and as many that begin one (50, as the paper)",
    "ops": "gsm: needed operations at most (8)",
    "statements": "gsm: statements in a problem, needed or not (16)",
    "modulus": "gsm: a prime; answers are 0 to modulus - 1 (11)",
    "variables": "gsm: names for variables (26)",
    "question": "gsm: asked first or last (first)"}
TRAIN, EVAL, PASSES = 0, 1, 2  # streams of random numbers
CHUNK = 64          # training batches drawn in one call
MOST = 2**31 - 1    # as an option's value
UNREADABLE = (RuntimeError, ValueError, LookupError, TypeError, AttributeError, EOFError, OSError,
              pickle.UnpicklingError)  # what reading a damaged checkpoint raises
CHECK_EVERY = 10    # steps between looks at the loss, each of which waits for the device
FAST = {"eager": "a step as written; a CPU would gain nothing from more",
        "graph": "a step recorded once and replayed; compiling only pays in a long run",
        "compile": "blocks compiled, a step recorded once and replayed; for a long run"}
LONG = 5e15         # model FLOPs of a run that earns it
PAPER = {"layout": "asas", "d_model": 256, "cells": 24, "states": 4, "batch": 512, "steps": 782}
BENCH = PAPER | {"batch": None, "loops": [1, 2, 4, 8]}  # what --bench measures if not told
LEFT_OUT = "out", "resume", "bench", "paper"  # of a run's configuration
BENCH_SECONDS, BENCH_STEPS = 4.0, 5  # of training in each row, at least


# ------------------------------------------------------------------------------------------ options

class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        """One line and exit code 2, without the usage before it."""
        self.exit(2, f"{self.prog}: error: {message} (see --help)\n")


def whole(low: int = -MOST):
    """An argparse type: whole numbers from `low` on."""
    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = None
        if value is None or not low <= value <= MOST:
            raise argparse.ArgumentTypeError(
                f"{text!r}: must be a whole number from {low} to {MOST}")
        return value
    return parse


def positive(text: str) -> float:
    """An argparse type: finite numbers above 0."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r}: must be a number above 0")
    return value


def several(text: str) -> list[int]:
    """An argparse type: "2" or "1,2,4"."""
    parts = text.split(",")
    if (not all(part.isdecimal() and 1 <= int(part) <= MOST for part in parts)
            or len(set(map(int, parts))) < len(parts)):
        raise argparse.ArgumentTypeError(f"{text!r}: must be whole numbers, at least 1, "
                                         "with commas between them and none of them twice")
    return [int(part) for part in parts]


def span(text: str) -> list[int]:
    """An argparse type: "1:3"."""
    parts = text.split(":")
    if len(parts) != 2 or not all(part.isdecimal() for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r}: must be i:j, two whole numbers")
    return [int(part) for part in parts]


def get_parser() -> argparse.ArgumentParser:
    p = Parser(prog="train.py", allow_abbrev=False, description=__doc__.split("\n\n")[0],
               formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    task = p.add_argument_group("task", "python data.py shows an example of each")
    task.add_argument("--task", choices=TASKS, default="rule110", help="what to learn")
    task.add_argument("--paper", action="store_true",
                      help="the size of the paper's Rule 110 runs, where not given: "
                           + " ".join(f"--{name} {value}" for name, value in PAPER.items())
                           + " (40M tokens, as in Fig. 2a; wants a GPU)")
    for name, text in TASK_OPTIONS.items():
        task.add_argument(f"--{name}", type=str if name == "question" else whole(),
                          default=argparse.SUPPRESS, help=text)
    model = p.add_argument_group("model")
    model.add_argument("--layout", default="as",
                       help="a letter a block: a attention, s SSM (the paper: asas), m SSM without "
                            "MLP, for insertion into a trained model")
    model.add_argument("--d_model", type=whole(), default=64, help="width d (the paper: 256)")
    model.add_argument("--n_head", type=whole(), default=4, help="heads H of every block")
    model.add_argument("--rule", choices=["gdn", "delta", "mamba2"], default="gdn",
                       help="update of S: Gated DeltaNet, or without its decay, or its delta rule")
    model.add_argument("--position", choices=["none", "window"], default="none",
                       help="window: a learned vector for each place in the window, which the "
                            "paper does not name, is added to the embedding; such a model does "
                            "not stream")
    sleep = p.add_argument_group("sleep")
    sleep.add_argument("--loops", type=several, default="1,2", metavar="N[,N...]",
                       help="passes over each window asleep; a list trains one model for each")
    sleep.add_argument("--window", type=whole(), metavar="L",
                       help="tokens between evictions of the cache; None: the task's own")
    sleep.add_argument("--eviction", choices=["hard", "sliding", "none"], default="hard",
                       help="what goes: the whole cache, all but the latest L - 1 tokens, nothing")
    sleep.add_argument("--loop_blocks", type=span, metavar="i:j",
                       help="loop only the blocks i to j - 1; the others run once; None: loop all")
    sleep.add_argument("--carry", choices=["h", "embed"], default="h",
                       help="a pass starts from the h of the one before, or from the embedding "
                            "(behind the blocks that are not looped)")
    sleep.add_argument("--carry_S", action=argparse.BooleanOptionalAction, default=True,
                       help="a pass starts from the S of the one before, or from the window's")
    sleep.add_argument("--sleep_at", choices=["sleep", "wake"], default="sleep",
                       help="wake: spend the N passes in the scored windows instead")
    sleep.add_argument("--dream", action=argparse.BooleanOptionalAction, default=False,
                       help="not in the paper; rule110, even N: sleep in N / 2 rounds of two "
                            "passes. A round is trained to say the state 2 t / N steps on, and the "
                            "next one reads what it said instead of the window. With another N "
                            "(--loops_schedule, --eval_loops) t changes in proportion")
    sleep.add_argument("--loops_schedule", type=several, metavar="N[,N...]",
                       help="train with these passes in equal parts of the run; None: N throughout")
    sleep.add_argument("--loops_random", action=argparse.BooleanOptionalAction, default=False,
                       help="take one of --loops_schedule at random in each step instead")
    sleep.add_argument("--eval_loops", type=several, metavar="N[,N...]",
                       help="at the end, evaluate with other numbers of passes as well")
    run = p.add_argument_group("training")
    run.add_argument("--steps", type=whole(0), default=800,
                     help="optimizer steps; 0 only evaluates")
    run.add_argument("--batch", type=whole(1), default=32, help="sequences a step (the paper: 512)")
    run.add_argument("--muon_lr", type=positive, default=4e-3,
                     help="rate of Muon, for the matrices of the blocks")
    run.add_argument("--lr", type=positive, default=1e-3,
                     help="rate of AdamW, for all other parameters")
    run.add_argument("--curriculum", type=several, metavar="LEVEL[,LEVEL...]",
                     help="train on these levels (t, hops or operations) in equal parts of the "
                          "run; None: on the task's own mixture")
    run.add_argument("--init", metavar="DIR",
                     help="start from the weights of another run: a folder with one checkpoint, "
                          "or a file N*.pt, of the same task and vocabulary; its layout may lack "
                          "the m blocks")
    run.add_argument("--train", choices=["all", "new"], default="all",
                     help="new: train only the blocks that the checkpoint of --init lacks")
    run.add_argument("--seed", type=whole(0), default=1, help="of start values and training data")
    run.add_argument("--eval_every", type=whole(1), default=200,
                     help="steps between evaluations, each followed by a checkpoint")
    run.add_argument("--eval_size", type=whole(1), default=2048,
                     help="held-out sequences in an evaluation, shared equally among its "
                          "levels; the same for every N and seed")
    run.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto",
                     help="auto: cuda where there is one")
    run.add_argument("--dtype", choices=["auto", "float32", "bfloat16"], default="auto",
                     help="of matrix products. auto: bfloat16 on cuda; float32 on a CPU, where "
                          "bfloat16 is slow. Parameters and fast weights are always float32")
    run.add_argument("--fast", choices=["auto", *FAST], default="auto",
                     help="eager: as written; graph: on cuda, record a step once and replay it; "
                          "compile: compile its blocks as well, which takes half a minute or more. "
                          "auto: eager on a CPU; on cuda graph for short runs, compile for long")
    run.add_argument("--recompute", action=argparse.BooleanOptionalAction, default=False,
                     help="make activations again in the backward pass, window by window and "
                          "pass by pass: much less memory, two thirds more time")
    run.add_argument("--out", type=Path, metavar="DIR",
                     help="folder of the run; None: a new one under out/")
    run.add_argument("--resume", type=Path, metavar="DIR",
                     help="go on with the run in DIR, with its options; takes no other option")
    run.add_argument("--bench", action="store_true",
                     help="measure speed and memory for each N of --loops and several L instead of "
                          "training; options not given are then the paper's")
    return p


def parse(parser: Parser, argv: list[str]) -> dict:
    """The options of a command line; those not given may be --paper's or --bench's."""
    options = vars(parser.parse_args(argv))
    if options["paper"] and options["task"] != "rule110":
        parser.error(f"--paper: must come with --task rule110, not {options['task']}")
    preset = BENCH if options["bench"] else PAPER if options["paper"] else {}
    parser.set_defaults(**{name: value for name, value in preset.items()
                           if name not in TASK_OPTIONS or options["task"] == "rule110"})
    return vars(parser.parse_args(argv))


# --------------------------------------------------------------------------------------- optimizers

def orthogonalize(x: Tensor) -> Tensor:
    """Newton-Schulz: a batch of matrices (n, rows, cols) = U S V^T -> roughly their U V^T.

    In bfloat16 on a GPU, in float32 on a CPU, where bfloat16 is some eighty times slower.
    """
    tall = x.shape[1] > x.shape[2]
    x = (x.mT if tall else x).to(torch.bfloat16 if x.is_cuda else x.dtype)
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        a = x @ x.mT
        b = torch.baddbmm(a, a, a, beta=-4.7750, alpha=2.0315)
        x = torch.baddbmm(x, b, x, beta=3.4445)
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Muon (Jordan 2024) for parameters that are stacks of matrices (n, rows, cols).

    The update of torch.optim.Muon without weight decay; but matrices of one shape go through
    `orthogonalize` together, and in float32 on a CPU.
    """

    def __init__(self, params, lr: float, momentum: float = 0.95):
        super().__init__(params, {"lr": lr, "momentum": momentum})
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["mean"] = torch.zeros_like(p)

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for shape in sorted({p.shape[1:] for p in group["params"]}):
                params = [p for p in group["params"] if p.shape[1:] == shape]
                grads = [p.grad for p in params]
                means = [self.state[p]["mean"] for p in params]
                torch._foreach_lerp_(means, grads, 1 - group["momentum"])
                ahead = torch._foreach_lerp(grads, means, group["momentum"])  # Nesterov
                update = orthogonalize(torch.cat(ahead)).to(params[0].dtype)
                update *= group["lr"] * max(1, shape[0] / shape[1]) ** 0.5
                torch._foreach_sub_(params, update.split([len(p) for p in params]))


def make_optimizers(model: Hybrid, muon_lr: float, lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks, AdamW for the rest."""
    trained = [p for p in model.parameters() if p.requires_grad]
    matrices = [p for p in model.layers.parameters() if p.requires_grad and p.ndim == 3]
    taken = set(matrices)
    rest = [p for p in trained if p not in taken]
    assert len(matrices) + len(rest) == len(trained), \
        "every trained parameter must be in exactly one optimizer group"
    return [Muon(matrices, lr=muon_lr),
            torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True,
                              capturable=rest[0].is_cuda)]


def lr_factor(step: int, steps: int) -> float:
    """Full rate for 60 % of the run, then down a straight line towards 0."""
    return min(1.0, (steps - step) / (0.4 * steps))  # Choice: schedule


# ----------------------------------------------------------------------------------- one fast step

def make_step(model: Hybrid, optimizers: list[torch.optim.Optimizer], windows: list[Window],
              loops: int):
    """-> step(tokens, targets[, dreams]), one optimizer step -> loss and gradient norm, still on
    the device."""
    def step(tokens: Tensor, targets: Tensor, dreams: Tensor | None = None) -> Tensor:
        loss, *_ = algorithm1(model, tokens, targets, loops, windows, dreams)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)  # Choice: clipping
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        return torch.stack([loss.detach(), norm])
    return step


def capture(step, warm_up: int = 3):
    """The same step for a GPU: its kernels are recorded once as a CUDA graph, then replayed.

    A step is thousands of small kernels; started one by one from Python they leave the GPU idle
    most of the time. The first `warm_up` calls run as they are, for real, on a stream of their own:
    state and workspaces come into being. The next call records, and from then on Python does
    nothing but copy the batch and press play. Hence a captured step may not look at a value on the
    device (.item(), if), nor depend on a Python number that changes: shapes and N are fixed, rates
    live in tensors. Gradients must be None as it is recorded, to be born in the graph's memory.
    """
    graph, stream, calls, inputs, output = torch.cuda.CUDAGraph(), torch.cuda.Stream(), 0, [], None

    def replay(*batch: Tensor) -> Tensor:
        nonlocal calls, inputs, output
        calls += 1
        if calls <= warm_up:
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                result = step(*batch)
            torch.cuda.current_stream().wait_stream(stream)
            return result
        if output is None:
            inputs = [x.clone() for x in batch]
            with torch.cuda.graph(graph):
                output = step(*inputs)
        for mine, new in zip(inputs, batch):
            mine.copy_(new)
        graph.replay()
        return output.clone()
    return replay


def fast_steps(model: Hybrid, optimizers: list[torch.optim.Optimizer], windows: list[Window],
               fast: str, kept: int = 1):
    """-> step_of(N), the training step with N passes, as fast as --fast asks.

    `kept` N keep their recording, and the memory it works in, at once.
    """
    if fast == "compile":
        torch._dynamo.config.recompile_limit = 64  # of forms a block takes: kind, L, what is needed
        for block in model.layers:  # blocks of one kind and one L share what is compiled
            block.compile(dynamic=False)

    @functools.lru_cache(maxsize=kept)
    def step_of(loops: int):
        step = make_step(model, optimizers, windows, loops)
        return step if fast == "eager" else capture(step)
    return step_of


def uncompiled(fast: str):
    """A context in which nothing is compiled: what runs once is not worth it."""
    return torch.compiler.set_stance("force_eager") if fast == "compile" \
        else contextlib.nullcontext()


# ----------------------------------------------------------------------------- data and evaluation

def stage(values: list | None, step: int, steps: int, default=None):
    """Which of `values` holds at `step`, each for an equal part of the run."""
    return values[step * len(values) // steps] if values else default


def steps_a_round(t: int, loops: int) -> int:
    """What each round of a dream is worth to the model of `loops` passes, whatever N it is asked
    with. Raises ValueError if it is not whole."""
    if 2 * t % loops:
        raise ValueError(f"t {t}: must be a multiple of N / 2 with --dream, which is {loops // 2}")
    return 2 * t // loops


def batches(task, options: argparse.Namespace, step: int, loops: int = 1):
    """Endless training batches from `step` on, each a function of the options and the step.

    tokens, targets and, where the model of `loops` passes dreams, what it is to say.
    """
    size = 1 if options.curriculum or options.dream else CHUNK
    while True:
        chunk, first = divmod(step, size)
        if options.dream:
            rounds, steps = passes_of(options, step, loops) // 2, steps_a_round(options.t, loops)
            level = rounds * steps
        else:
            level = stage(options.curriculum, step, options.steps)
        data = task.batch(size * options.batch,
                          generator(options.seed, TRAIN, chunk, options.device), "train", level)
        if options.dream:
            data = *data, task.dreams(data[0], rounds, steps)
        for i in range(first, size):
            yield tuple(x[i * options.batch:(i + 1) * options.batch] for x in data)
        step = (chunk + 1) * size


def seen(task, options: argparse.Namespace, size: int) -> list[Tensor]:
    """The first sequences trained on, at most `size`: do they fare better than held-out ones?

    They are of the training mixture, which for depo is easier than what is evaluated.
    """
    steps = min(options.steps, -(-size // options.batch))
    return [torch.cat(x)[:size] for x in zip(*itertools.islice(batches(task, options, 0), steps))]


@torch.no_grad()
def evaluate(model: Hybrid, tokens: Tensor, targets: Tensor, loops: int, windows: list[Window]):
    """loss; bit: share of scored tokens right; exact: share of sequences with all of them right."""
    loss, logits, labels = algorithm1(model, tokens, targets, loops, windows)
    right, scored = logits.argmax(-1) == labels, labels != IGNORE
    return {"loss": loss.item(), "bit": right[scored].float().mean().item(),
            "exact": (right | ~scored).all(1).float().mean().item()}


def evaluate_levels(model: Hybrid, task, held_out: dict, loops: int, windows: list[Window]):
    """The means over the task's levels, and, where there are several, each level by itself."""
    levels = {level: {**evaluate(model, *data, loops, windows), "floor": floor(task, level)}
              for level, data in held_out.items()}
    means = {name: sum(scores[name] for scores in levels.values()) / len(levels)
             for name in ("loss", "bit", "exact", "floor")}
    return means if len(levels) == 1 else {**means, "levels": levels}


# ----------------------------------------------------------------------------------- a run's folder

def write(path: Path, data: bytes):
    """To a temporary file, then rename: path holds the old file or the new one, never half."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(data)
    os.replace(temporary, path)


def write_log(folder: Path, header: dict, records: list[dict]):
    text = "".join(json.dumps(line, allow_nan=False) + "\n" for line in [header, *records])
    write(folder / "log.jsonl", text.encode())


def make_header(argv: list[str], options: dict) -> dict:
    """First line of the log: what it takes to get the same numbers again."""
    try:
        describe = ["git", "describe", "--always", "--dirty", "--abbrev=10"]
        commit = subprocess.run(describe, cwd=Path(__file__).parent, text=True,
                                capture_output=True).stdout.strip()
    except OSError:  # no git
        commit = ""
    hardware = (torch.cuda.get_device_name() if options["device"] == "cuda"
                else f"CPU, {torch.get_num_threads()} threads")
    return {"command": shlex.join(["python", "train.py", *argv]),
            "commit": os.environ.get("COMMIT") or commit or "unknown",  # COMMIT: copies without git
            "versions": {"python": platform.python_version(), "torch": torch.__version__,
                         "numpy": np.__version__},
            "hardware": hardware, "config": options}


def as_arguments(config: dict) -> list[str]:
    """The command line that asks for a configuration."""
    def text(name, value):
        if isinstance(value, bool):
            return f"--{name}" if value else f"--no-{name}"
        if isinstance(value, list):
            value = (":" if name == "loop_blocks" else ",").join(map(str, value))
        return f"--{name}={value}"
    return [text(name, value) for name, value in config.items() if value is not None]


def read_header(parser: Parser, option: str, folder: Path) -> dict:
    """First line of the run's log. Exits with 2 if it is no run, damaged or incomplete."""
    try:
        header, *records = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
        parsed = vars(get_parser().parse_args(as_arguments(header["config"])))
        if {name: x for name, x in parsed.items() if name not in LEFT_OUT} \
                != header["config"] or not {"command", "commit", "hardware"} <= header.keys():
            raise ValueError
        if "bench" in header:
            parser.error(f"{option} {folder}: must be a folder of a training run, not of --bench")
        lost = {name for record in records
                if not (folder / (name := f"N{record['loops']}.pt")).exists()}
    except (FileNotFoundError, NotADirectoryError):
        parser.error(f"{option} {folder}: must be a folder that train.py wrote; no log.jsonl there")
    except OSError as error:
        parser.error(f"{option} {folder}: its log.jsonl cannot be read: {error.strerror}")
    except (ValueError, LookupError, AttributeError, TypeError):
        parser.error(f"{option} {folder}: its log.jsonl is damaged or of another version")
    if lost:
        parser.error(f"{option} {folder}: {', '.join(sorted(lost))} must be there, its log has "
                     "results of it")
    return header


class Halt(Exception):
    """Ends the run with one line on stderr and an exit code."""

    def __init__(self, code: int, message: str):
        super().__init__(message)
        self.code = code


def initialize(model: Hybrid, options: dict) -> list[str] | None:
    """Weights from the checkpoint of --init -> names of the parameters that it lacks.

    It may lack m blocks: they keep their start, the identity. Raises Halt if it does not fit.
    """
    if options["init"] is None:
        return None
    path, new = Path(options["init"]), model.config.layout
    if path.is_dir() and len(found := list(path.glob("N*.pt"))) == 1:
        path = found[0]
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        old = saved["config"]["layout"]
        kept = [i for i, kind in enumerate(new) if old == new or kind != "m"]
        weights = {re.sub(r"^layers\.(\d+)", lambda match: f"layers.{kept[int(match[1])]}", name): x
                   for name, x in saved["model"].items()}
        if "position" in weights:
            weights["position"] = weights["position"][:model.config.window]
        fresh = model.load_state_dict(weights, strict=False).missing_keys
        if ("".join(new[i] for i in kept) != old
                or any(not name.startswith("layers.") or int(name.split(".")[1]) in kept
                       for name in fresh)
                # equal weights do not tell heads, nor which words a vocabulary has
                or any(saved["config"].get(name) != options.get(name)
                       for name in ("task", "n_head", "modulus", "names", "position"))):
            raise ValueError
    except UNREADABLE:
        raise Halt(2, f"error: --init {options['init']}: must be a checkpoint, or a folder with "
                      "one, of the same task and vocabulary, width, heads and layout, m blocks "
                      "aside, of no shorter window, with or without --dream alike") from None
    if options["train"] == "new" and not fresh:
        raise Halt(2, f"error: --train new: must come with m blocks in --layout that {path} lacks")
    return fresh


def build(options: dict):
    """The task and the model at its start. Raises ValueError where an option is impossible."""
    given = {name: value for name, value in options.items() if value is not None}
    has = inspect.signature(TASKS[options["task"]]).parameters
    for name in TASK_OPTIONS:
        if name in given and name not in has:
            raise ValueError(f"{name} {given[name]}: must not be given, "
                             f"task {options['task']} has {', '.join(has)}")
    task = TASKS[options["task"]](**{name: given[name] for name in has if name in given})
    for level in options["curriculum"] or []:
        try:
            task.batch(1, generator(0, TRAIN), level=level)
        except ValueError as error:
            raise ValueError(f"curriculum: {error}") from None
    model = {field.name: given[field.name] for field in fields(Config) if field.name in given}
    if options["train"] == "new" and options["init"] is None:
        raise ValueError("train new: must come with --init")
    if options["loops_schedule"] and options["loops"] != options["loops_schedule"][-1:]:
        schedule = ",".join(map(str, options["loops_schedule"]))
        raise ValueError(f"loops_schedule {schedule}: must end in the only N of --loops")
    if options["loops_random"] and not options["loops_schedule"]:
        raise ValueError("loops_random: must come with --loops_schedule")
    if options["dream"]:
        if options["task"] != "rule110" or given.get("window", task.window) != task.window:
            raise ValueError("dream: must come with --task rule110, a state in each window")
        if options["curriculum"]:
            raise ValueError("curriculum: must not be given with --dream, where t goes with N")
        for name, loops in itertools.product(("loops", "loops_schedule", "eval_loops"),
                                             options["loops"]):
            for N in options[name] or []:
                check_dream(N, name)
                if (t := N // 2 * steps_a_round(task.t, loops)) > task.MOST_STEPS:
                    raise ValueError(f"{name} {N}: must ask for at most {task.MOST_STEPS} "
                                     f"steps, not {t}")
    torch.manual_seed(options["seed"])
    return task, Hybrid(Config(**{"vocab_size": task.vocab_size, "window": task.window, **model}))


def new_folder(task: str) -> Path:
    """out/TASK-001, or the first number that is free."""
    Path("out").mkdir(exist_ok=True)
    for number in itertools.count(1):
        with contextlib.suppress(FileExistsError):
            (folder := Path("out") / f"{task}-{number:03d}").mkdir()
            return folder


def open_run(argv: list[str]) -> tuple[argparse.Namespace, Path, dict]:
    """Options, folder and log header of a run. Exits with 2 if impossible."""
    parser = get_parser()
    options = parse(parser, argv)
    if options["bench"]:
        for name in ("init", "curriculum", "loops_schedule", "loops_random", "eval_loops",
                     "dream"):
            if options[name]:
                parser.error(f"--{name}: must not be given with --bench")
    out, resume, bench, _ = (options.pop(name) for name in LEFT_OUT)
    if resume:
        if len(argv) > 2 or any(re.match("--(?!resume)", argument) for argument in argv):
            parser.error(f"--resume {resume}: takes no other option, the run has its own")
        header = read_header(parser, "--resume", resume)
        options = header["config"]
    gpu = torch.cuda.is_available()
    if options["device"] == "auto":
        options["device"] = "cuda" if gpu else "cpu"
    if options["device"] == "cuda" and not gpu:
        parser.error(f"--resume {resume}: runs on cuda, and there is none here" if resume else
                     "--device cuda: there is none here; valid are cpu and auto")
    if options["dtype"] == "auto":
        options["dtype"] = "bfloat16" if options["device"] == "cuda" else "float32"
    options["batch"] = options["batch"] or (512 if options["device"] == "cuda" else 64)
    if options["device"] == "cpu" and options["fast"] not in ("auto", "eager"):
        parser.error(f"--fast {options['fast']}: must be eager or auto on a CPU")
    try:
        task, model = build(options)
        options |= {name: getattr(task, name) for name in TASK_OPTIONS if hasattr(task, name)}
        if not resume:
            initialize(model, options)
        if options["fast"] == "auto":
            work = options["steps"] * options["batch"] * model_flops(
                model, windows_of(task, model.config.window), max(options["loops"]))
            # With eviction none no two windows have the same shapes, and compiling never ends.
            long = (bench or work > LONG) and options["eviction"] != "none"
            options["fast"] = ("eager" if options["device"] == "cpu" else
                               "compile" if long else "graph")
    except ValueError as error:
        parser.error(f"--{error}")
    if resume:
        return argparse.Namespace(**options), resume, header

    header = make_header(argv, options) | ({"bench": True} if bench else {})
    try:
        out = out or new_folder(options["task"])
        out.mkdir(parents=True, exist_ok=True)
        if any(path.suffix != ".tmp" for path in out.iterdir()):
            if bench:
                parser.error(f"--out {out}: must be a new or an empty folder for --bench")
            header = read_header(parser, "--out", out)
            if header["config"] != options:
                parser.error(f"--out {out}: has a run of another configuration; give a new folder")
        else:
            write_log(out, header, [])
    except OSError as error:
        parser.error(f"--out {error.filename}: {error.strerror}; must be a folder that can be made")
    return argparse.Namespace(**options), out, header


# ----------------------------------------------------------------------------------------- training

@contextlib.contextmanager
def reading(path: Path):
    """A context in which a checkpoint that is damaged or of another run ends this one."""
    try:
        yield
    except UNREADABLE:
        raise Halt(2, f"error: --resume {path.parent}: {path.name} is truncated, damaged or of "
                      "another model") from None


def levels_of(task, options: argparse.Namespace) -> list[int]:
    """The difficulties that are evaluated: the task's own and those of the curriculum."""
    return sorted({*task.levels, *(options.curriculum or [])})


def windows_of(task, length: int) -> list[Window]:
    """The windows of every sequence of a task: scored are those that reach scored_from."""
    targets = torch.full((1, task.length), IGNORE)
    targets[:, task.scored_from:] = 0
    return cut(targets, length)


def passes_over(windows: list[Window], loops: int, config: Config) -> float:
    """Tokens times passes over all blocks, in one sequence: what N costs."""
    i, j = config.loop_blocks
    more = (loops - 1) * (j - i) / len(config.layout)
    return sum((stop - start) * (1 + more * (scored == (config.sleep_at == "wake")))
               for start, stop, scored in windows)


def model_flops(model: Hybrid, windows: list[Window], loops: int) -> float:
    """FLOPs of a training step for one sequence: 6 for each weight a token meets in each pass.

    2 in the forward and 4 in the backward pass; the products of a mixer among the L tokens of the
    window (L x L, masked or not) and with S count alike. The last block of the last pass asleep
    only has to write S. Not counted: keys kept from earlier windows, what is no matrix product, the
    optimizers, and what --recompute computes again.
    """
    c, total = model.config, 0
    i, j = c.loop_blocks
    for b, (kind, block) in enumerate(zip(c.layout, model.layers)):
        matrices = sum(p.numel() for p in block.parameters() if p.ndim == 3)
        for start, stop, scored in windows:
            L = stop - start
            N = loops if i <= b < j and scored == (c.sleep_at == "wake") else 1
            # q k^T, P v; or q k^T, k k^T, P U, T R in pieces and the three products with S
            piece = -(-L // -(-L // PIECE))
            mixer = c.d_model * (2 * L if kind == "a" else 4 * piece + 3 * c.d_model // c.n_head)
            spared = 0
            if block is model.layers[-1] and not scored and not c.dream:
                spared = matrices + (mixer if kind == "a" else -block.mixer.qkv.weight.numel())
            total += 6 * L * (N * (matrices + mixer) - spared)
    return total + 6 * model.out.weight.numel() * sum(
        (stop - start) * (scored or c.dream * loops // 2) for start, stop, scored in windows)


def passes_of(options: argparse.Namespace, step: int, loops: int) -> int:
    """The N that this step trains with."""
    values = options.loops_schedule
    if options.loops_random:
        draw = generator(options.seed, PASSES, step)
        return values[torch.randint(len(values), (), generator=draw).item()]
    return stage(values, step, options.steps, loops)


def line(record: dict) -> str:
    """One evaluation, to be read and to be grepped."""
    text = ("N {loops:<2d} step {step:6d}  tokens {tokens:.2e}  loss {loss:.4f}  bit {bit:7.2%}  "
            "exact {exact:7.2%}  floor {floor:.2%}  {seconds:7.1f} s").format(**record)
    for name in ("levels", "eval_loops"):
        if name in record:
            text += f"\n     exact by {name}: " + "  ".join(
                f"{key}: {scores['exact']:.1%}" for key, scores in record[name].items())
    if "seen" in record:
        text += f"\n     exact on the first sequences trained on: {record['seen']['exact']:.1%}"
    return text


def train_model(loops: int, options: argparse.Namespace, folder: Path, header: dict,
                log: list[dict], stop: threading.Event):
    """Train the model that sleeps N = loops passes, from its checkpoint if the folder has one.

    Appends its evaluations to `log`. Raises Halt once `stop` is set, when the step in progress is
    done and saved, and at a loss or gradient that is not finite, without saving.
    """
    task, model = build(vars(options))
    checkpoint = folder / f"N{loops}.pt"
    if resumed := checkpoint.exists():
        with reading(checkpoint):
            saved = torch.load(checkpoint, weights_only=True)
            if (saved["config"], saved["loops"]) != (header["config"], loops):
                raise ValueError
            fresh = saved["fresh"]
            model.load_state_dict(saved["model"])
    else:
        fresh = initialize(model, vars(options))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(options.train == "all" or name in fresh)
    model.to(options.device)
    optimizers = make_optimizers(model, options.muon_lr, options.lr)
    rates = [group["lr"] for optimizer in optimizers for group in optimizer.param_groups]
    step, token_passes, seconds, records, train_loss = 0, 0, 0.0, [], None
    if resumed:
        with reading(checkpoint):
            for optimizer, state in zip(optimizers, saved["optimizers"], strict=True):
                optimizer.load_state_dict(state)
        step, token_passes, seconds, records = (
            saved[name] for name in ("step", "token_passes", "seconds", "records"))
        log.extend(records)
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    for group in groups:
        group["lr"] = torch.zeros((), device=options.device)  # a captured step reads it there

    levels = levels_of(task, options)
    size = -(-options.eval_size // len(levels))

    @functools.cache
    def held_out(N: int) -> dict[int, tuple[Tensor, Tensor]]:
        """The sequences of an evaluation with N passes, by level. Only a dream's depend on N."""
        chosen = [N // 2 * steps_a_round(options.t, loops)] if options.dream else levels
        return {level: task.batch(size, generator(0, EVAL, i, options.device), "held-out", level)
                for i, level in enumerate(chosen)}

    windows = windows_of(task, model.config.window)
    step_of = fast_steps(model, optimizers, windows, options.fast,
                         len(options.loops_schedule) if options.loops_random else 1)
    tokens_a_step = options.batch * task.length
    began = time.time() - seconds
    unchecked = []  # losses and gradient norms that are still on the device

    def save():
        if not all(parameter.isfinite().all() for parameter in model.parameters()):
            diverged(step)
        state = {"config": header["config"], "loops": loops, "fresh": fresh, "records": records,
                 "step": step, "token_passes": token_passes, "seconds": time.time() - began,
                 "model": model.state_dict(),
                 "optimizers": [optimizer.state_dict() for optimizer in optimizers]}
        torch.save(state, buffer := io.BytesIO())  # into a file it would hide why it failed
        write(checkpoint, buffer.getvalue())
        write_log(folder, header, log)

    def diverged(step):
        kept = checkpoint if checkpoint.exists() else "none yet"
        raise Halt(1, f"N = {loops}: loss, gradient or weights not finite at step {step}; last "
                      f"checkpoint: {kept}; try a smaller --muon_lr or --lr")

    def check():
        """Look at the losses and norms of the last steps; the loss of the last one."""
        values = torch.stack(unchecked).tolist()
        for i, pair in enumerate(values, step + 1 - len(values)):
            if not all(map(math.isfinite, pair)):
                diverged(i)
        unchecked.clear()
        return values[-1][0]

    bar = tqdm(desc=f"N = {loops}", total=options.steps * tokens_a_step, disable=None, leave=False,
               initial=step * tokens_a_step, unit="tok", unit_scale=True)
    data = batches(task, options, step, loops)
    with bar:
        while True:
            evaluating = step % options.eval_every == 0 or step == options.steps
            if unchecked and (evaluating or stop.is_set() or len(unchecked) == CHECK_EVERY):
                train_loss = check()
                bar.set_postfix(loss=f"{train_loss:.3f}", exact=f"{records[-1]['exact']:.1%}")
            if evaluating and (not records or records[-1]["step"] < step):
                last, again = step == options.steps, None
                others = options.eval_loops or [] if last else []
                with uncompiled(options.fast):
                    scores = {n: evaluate_levels(
                        model, task, held_out(n if options.dream else loops), n, windows)
                        for n in {loops, *others}}
                    mixed = options.curriculum or options.dream  # other t, other N than evaluated
                    if last and step > 0 and not mixed:
                        again = evaluate(model, *seen(task, options, size), loops, windows)
                if not math.isfinite(scores[loops]["loss"]):
                    diverged(step)
                record = {"loops": loops, "step": step, "tokens": step * tokens_a_step,
                          "token_passes": token_passes, "train_loss": train_loss, **scores[loops],
                          "seconds": round(time.time() - began, 2)}
                if others:
                    record["eval_loops"] = {n: scores[n] for n in others
                                            if math.isfinite(scores[n]["loss"])}
                if again and math.isfinite(again["loss"]):
                    record["seen"] = again
                records.append(record)
                log.append(record)
                tqdm.write(line(record))
                save()
            if step == options.steps:
                break
            if stop.is_set():
                save()
                raise Halt(130, "saved; go on with: python train.py --resume "
                                + shlex.quote(str(folder)))

            batch, N = next(data), passes_of(options, step, loops)
            for group, rate in zip(groups, rates):
                group["lr"].fill_(rate * lr_factor(step, options.steps))
            unchecked.append(step_of(N)(*batch))
            step += 1
            token_passes += options.batch * passes_over(windows, N, model.config)
            bar.update(tokens_a_step)


def print_facts(options: argparse.Namespace, folder: Path, header: dict):
    task, model = build(vars(options))
    config, parameters = model.config, sum(p.numel() for p in model.parameters())
    why = {("cpu", "float32"): "bfloat16 is slow there", ("cuda", "bfloat16"): "for tensor cores"}
    why = why.get((options.device, options.dtype), "as asked")
    windows, levels = windows_of(task, config.window), levels_of(task, options)
    guessed = sum(floor(task, level) for level in levels) / len(levels)
    print(f"task    {task.title()}\n"
          f"        always the same answer is {guessed:.2%} exact: the floor\n"
          f"model   {config.layout}, d = {config.d_model}, {config.n_head} heads, "
          f"L = {config.window}: {parameters:,} parameters\n"
          f"run     N = {', '.join(map(str, options.loops))}, seed {options.seed}, "
          f"{options.steps:,} steps of {options.batch} x {task.length} = "
          f"{options.batch * task.length:,} tokens\n"
          f"device  {header['hardware']}; matrix products in {options.dtype} ({why}), "
          f"parameters and S in float32\n"
          f"step    {options.fast}: {FAST[options.fast]} (--fast)\n"
          f"folder  {folder}", flush=True)
    if options.sleep_at == "sleep" and (all(window.scored for window in windows)
                                        or config.keep == 0 and set(config.layout) == {"a"}):
        print("note    N makes no difference: L leaves no window to sleep on, or the layout no S")


def print_table(log: list[dict]):
    """The last evaluation of every N; token passes = tokens times passes over all blocks."""
    print(f"\n{'N':>3}{'loss':>9}{'bit':>9}{'exact':>9}{'floor':>9}{'tokens':>9}{'seconds':>9}"
          f"{'token passes':>14}")
    for record in {record["loops"]: record for record in log}.values():
        print("{loops:3d}{loss:9.4f}{bit:9.2%}{exact:9.2%}{floor:9.2%}{tokens:9.2e}{seconds:9.1f}"
              "{token_passes:14.2e}".format(**record))


# ------------------------------------------------------------------------------------------ --bench

def matrix_rate(device: str, dtype: torch.dtype, seconds: float = 0.5) -> float:
    """FLOP/s of this machine's own product of two large random matrices: the peak, as measured."""
    size = 8192 if device == "cuda" else 2048
    a, b = torch.randn(2, size, size, device=device).to(dtype)
    one = timed(lambda: a @ b, device, 3)
    return 2 * size**3 / timed(lambda: a @ b, device, 3 + int(seconds / one))


def timed(function, device: str, times: int) -> float:
    """Seconds of the fastest of some calls, the device's work included: what disturbs only adds."""
    seconds = []
    for _ in range(times):
        began = time.perf_counter()
        function()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return min(seconds)


def bench_training(options: argparse.Namespace, loops: int) -> dict:
    """Speed and memory of training with N = loops passes, data and optimizers included."""
    began, device = time.perf_counter(), options.device
    task, model = build(vars(options))
    model.to(device)
    optimizers = make_optimizers(model, options.muon_lr, options.lr)
    windows = windows_of(task, model.config.window)
    step = fast_steps(model, optimizers, windows, options.fast)(loops)
    data = batches(task, options, 0)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    step(*next(data)).tolist()
    first = time.perf_counter() - began
    for _ in range(4 if device == "cuda" else 1):  # up to and beyond the capture
        step(*next(data)).tolist()
    ready, steps, spent, began = time.perf_counter() - began, 0, 0, time.perf_counter()
    while steps < BENCH_STEPS or spent < BENCH_SECONDS:
        for _ in range(CHECK_EVERY if device == "cuda" else 1):
            values = step(*next(data))
            steps += 1
        values.tolist()  # waits for the device
        spent = time.perf_counter() - began
    tokens = options.batch * task.length
    record = {"loops": loops, "window": model.config.window, "ms": 1e3 * spent / steps,
              "tokens_per_s": tokens * steps / spent, "first_step_s": first, "ready_s": ready,
              "flops": options.batch * model_flops(model, windows, loops) * steps / spent}
    if device == "cuda":
        record["peak_bytes"] = torch.cuda.max_memory_allocated()
    return record


@torch.no_grad()
def bench_use(options: argparse.Namespace, loops: int) -> dict:
    """Latency of one token awake, of one window's sleep, at batch 1, as the code stands."""
    task, model = build(vars(options))
    model.to(options.device)
    L = model.config.window
    window = torch.randint(task.vocab_size, (1, L), device=options.device)
    asleep, awake = (loops, 1) if options.sleep_at == "sleep" else (1, loops)
    begun = evict(sleep(model, window, model.empty_memory(1), asleep), model.config.keep)
    half = wake(model, window[:, :(L + 1) // 2], begun)[1]
    return {"wake_ms": 1e3 * timed(lambda: wake(model, window[:, :1], half, awake),
                                   options.device, 99),
            "sleep_ms": 1e3 * timed(lambda: sleep(model, window, begun, asleep),
                                    options.device, 20)}


@torch.no_grad()
def bench_bytes(options: argparse.Namespace, contexts=(1, 10, 100, 1000)):
    """Bytes of both memories, just before the cache is evicted, after 1 to 1000 windows.

    never_evicted is computed: the keys and values of one window, times the windows.
    """
    task, model = build(vars(options))
    model.to(options.device)
    memory, L = model.empty_memory(1), model.config.window
    for windows in range(1, max(contexts) + 1):
        tokens = torch.randint(task.vocab_size, (1, L), device=options.device)
        memory = wake(model, tokens, memory)[1]
        if windows == 1:
            keys = sum(x.nbytes for kept in memory.cache if isinstance(kept, Cache) for x in kept)
            first = memory.bytes()["cache"]
        if windows in contexts:
            yield {"windows": windows, "tokens": windows * L, **memory.bytes(),
                   "never_evicted": first + (windows - 1) * keys}
        memory = evict(memory, model.config.keep)


def run_bench(options: argparse.Namespace, folder: Path, header: dict, stop: threading.Event):
    """The tables of --bench: every N at one L, the largest with --recompute, N = 1 at several L."""
    rate = matrix_rate(options.device, getattr(torch, options.dtype))
    task, model = build(vars(options))
    L, log = model.config.window, [{"matrix_rate": rate}]
    print(f"peak    {rate:.3g} FLOP/s, measured: the product of two large matrices in "
          f"{options.dtype}\n        share = model FLOPs / peak; model FLOPs = 6 x weights x "
          "tokens x passes, and the mixers' products\n        first step, ready: seconds until the "
          "first step is done, until its graph is recorded;\n        later rows find compiled what "
          "an earlier row compiled\n")
    print(f"{'N':>3}{'L':>5}{'recompute':>11}{'ms/step':>10}{'tokens/s':>12}{'share':>8}"
          f"{'peak MiB':>10}{'first step':>12}{'ready':>9}{'wake ms':>9}{'sleep ms':>10}")
    shortest = 2 if options.eviction == "sliding" else 1
    lengths = sorted({length for length in (L // 4, L // 2, 2 * L, task.length)
                      if shortest <= length <= task.length and length != L})
    points = ([(n, L, options.recompute) for n in options.loops]
              + [(max(options.loops), L, True)]
              + [(1, length, options.recompute) for length in lengths])
    for n, window, recompute in dict.fromkeys(points):
        point = argparse.Namespace(**vars(options) | {"window": window, "recompute": recompute})
        with uncompiled(options.fast):
            use = bench_use(point, n)
        log.append({**bench_training(point, n), **use, "recompute": recompute})
        gc.collect()  # a graph's memory goes with the graph
        row = {**log[-1], "share": log[-1]["flops"] / rate, "recompute": str(recompute),
               "memory": f"{log[-1]['peak_bytes'] / 2**20:.0f}" if "peak_bytes" in log[-1] else "-"}
        print("{loops:3d}{window:5d}{recompute:>11}{ms:10.2f}{tokens_per_s:12,.0f}{share:8.1%}"
              "{memory:>10}{first_step_s:10.1f} s{ready_s:7.1f} s{wake_ms:9.2f}{sleep_ms:10.2f}"
              .format(**row), flush=True)
        write_log(folder, header, log)
        if stop.is_set():
            raise Halt(130, f"stopped; the rows so far are in {folder / 'log.jsonl'}")
    print(f"\n{'windows':>8}{'tokens':>9}{'S, bytes':>12}{'cache, bytes':>14}"
          f"{'never evicted':>15}")
    with uncompiled(options.fast):
        for row in bench_bytes(options):
            log.append(row)
            print("{windows:8,d}{tokens:9,d}{S:12,d}{cache:14,d}{never_evicted:15,d}".format(**row))
    write_log(folder, header, log)


def main(argv: list[str] | None = None) -> int:
    log, stop = [], threading.Event()

    def interrupt(*_):  # the first Ctrl-C lets the step in progress end; the second does not
        stop.set()
        signal.signal(signal.SIGINT, default)

    default = signal.signal(signal.SIGINT, interrupt)
    try:
        options, folder, header = open_run(sys.argv[1:] if argv is None else argv)
        print_facts(options, folder, header)
        if "bench" in header:
            run_bench(options, folder, header, stop)
            return 0
        for loops in options.loops:
            train_model(loops, options, folder, header, log, stop)
        write_log(folder, header, log)
        print_table(log)
        return 0
    except Halt as halt:
        print(f"train.py: {halt}", file=sys.stderr)
        return halt.code
    except (RuntimeError, MemoryError) as error:
        if not isinstance(error, (MemoryError, torch.OutOfMemoryError)) \
                and "allocate memory" not in str(error):
            raise
        print("train.py: error: not enough memory for this --batch, --eval_size, model or task; "
              "smaller ones must do, or --recompute", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"train.py: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("train.py: stopped at once; what was saved before stands", file=sys.stderr)
        return 130
    finally:
        signal.signal(signal.SIGINT, default)


if __name__ == "__main__":
    sys.exit(main())
