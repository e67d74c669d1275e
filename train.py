"""Train the sleeping hybrid on a synthetic task and see what N passes asleep are worth.

One model is trained for each N of --loops, from the same seed on the same data, and a table
compares them on held-out instances. A run's folder gets log.jsonl (a header, then a line for every
evaluation) and a checkpoint for each N; --resume DIR goes on exactly where it stopped.

To read: optimizers, one step, evaluation, the loop, a model for each N. What stands below the line
*what a run needs besides* may be skipped.
"""

import argparse
import atexit
import contextlib
import fcntl
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
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from data import EVAL, TASKS, TRAIN, Task, floor, generator
from model import CHOICES, Config, Hybrid, rotation
from sleep import IGNORE, Window, algorithm1, cut

CHUNK = 64        # training batches drawn in one call
CHECK_EVERY = 10  # steps between looks at the loss, each of which waits for the device
TORCHRUN = {"TORCHELASTIC_RUN_ID", "RANK", "WORLD_SIZE"} <= os.environ.keys()  # it runs this
RANK, RANKS = (int(os.environ[x]) if TORCHRUN else n for x, n in (("RANK", 0), ("WORLD_SIZE", 1)))


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

    The update is that of torch.optim.Muon without weight decay. Matrices of one shape go through
    `orthogonalize` together, on a CPU in float32.
    """

    def __init__(self, params, lr: float, momentum: float = 0.95):
        super().__init__(params, {"lr": lr, "momentum": momentum})
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["mean"] = torch.zeros_like(p)

    @torch.no_grad()
    def step(self, closure=None):
        with torch.enable_grad():
            loss = closure() if closure else None
        for group in self.param_groups:
            trained = [p for p in group["params"] if p.grad is not None]
            for shape in sorted({p.shape[1:] for p in trained}):
                params = [p for p in trained if p.shape[1:] == shape]
                grads = [p.grad for p in params]
                means = [self.state[p]["mean"] for p in params]
                torch._foreach_lerp_(means, grads, 1 - group["momentum"])
                ahead = torch._foreach_lerp(grads, means, group["momentum"])  # Nesterov
                update = orthogonalize(torch.cat(ahead)).to(params[0].dtype)
                update *= group["lr"] * max(1, shape[0] / shape[1]) ** 0.5
                torch._foreach_sub_(params, update.split([len(p) for p in params]))
        return loss


def make_optimizers(model: Hybrid, muon_lr: float, lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks, AdamW for the rest. Rates are tensors, so that a step
    that is recorded as a CUDA graph reads them anew."""
    matrices = [p for p in model.layers.parameters() if p.requires_grad and p.ndim == 3]
    taken = set(matrices)
    rest = [p for p in model.parameters() if p.requires_grad and p not in taken]
    muon_lr, lr = (torch.tensor(x, device=rest[0].device) for x in (muon_lr, lr))
    return [Muon(matrices, lr=muon_lr),
            torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True,
                              capturable=rest[0].is_cuda)]


def lr_factor(step: int, steps: int) -> float:
    """Full rate for 60 % of the run, then down a straight line towards 0."""
    return min(1.0, (steps - step) / (0.4 * steps))  # Choice: schedule


def set_rates(optimizers: list[torch.optim.Optimizer], options: argparse.Namespace, factor: float):
    """Both rates, times the factor."""
    for optimizer, rate in zip(optimizers, (options.muon_lr, options.lr)):
        for group in optimizer.param_groups:
            group["lr"].fill_(rate * factor)


# ----------------------------------------------------------------------------------------- one step

def training_step(model: Hybrid, optimizers: list[torch.optim.Optimizer], loops: int,
                  windows: list[Window], tokens: Tensor, targets: Tensor) -> Tensor:
    """One step on a batch (B, T) -> its loss and its gradient's norm (2,), still on the device."""
    tokens, targets = (x.chunk(RANKS)[RANK] for x in (tokens, targets))  # this process's rows
    loss, _, labels = algorithm1(model, tokens, targets, loops, windows)
    loss.backward()
    if RANKS > 1:
        loss = of_all_ranks(model, loss, (labels != IGNORE).sum())
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)  # Choice: clipping
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()
    return torch.stack([loss.detach(), norm])


def batches(task: Task, options: argparse.Namespace, step: int):
    """Endless training batches (tokens, targets) from `step` on; each depends on seed and step.
    With --sequences the same ones come round again after `period` steps."""
    period = options.sequences // options.batch if options.sequences else sys.maxsize
    while True:
        chunk, first = divmod(step % period, CHUNK)
        last = min(CHUNK, period - chunk * CHUNK)
        data = task.batch(CHUNK * options.batch,
                          generator(options.seed, TRAIN, chunk, options.device), "train")
        for i in range(first, last):
            yield tuple(x[i * options.batch:(i + 1) * options.batch] for x in data)
        step += last - first


# --------------------------------------------------------------------------------------- evaluation

@torch.no_grad()
def evaluate(model: Hybrid, tokens: Tensor, targets: Tensor, loops: int, windows: list[Window]):
    """loss; bit: share of scored tokens right; exact: share of sequences with all of them right."""
    loss, logits, labels = algorithm1(model, tokens, targets, loops, windows)
    right, scored = logits.argmax(-1) == labels, labels != IGNORE
    return {"loss": loss.item(), "bit": right[scored].float().mean().item(),
            "exact": (right | ~scored).all(1).float().mean().item()}


def draw_held_out(task: Task, options: argparse.Namespace) -> dict:
    """Draws what every evaluation uses: level -> tokens, targets and the floor."""
    size = -(-options.eval_size // len(task.levels))
    return {level: (*task.batch(size, generator(0, EVAL, i, options.device), "held-out", level),
                    floor(task, level))
            for i, level in enumerate(tqdm(task.levels, "held-out", leave=False,
                                           disable=bool(RANK) or None))}


def evaluate_levels(model: Hybrid, held_out: dict, loops: int, windows: list[Window]) -> dict:
    """The means over the task's levels, and, where there are several, each level by itself."""
    levels = {level: {**evaluate(model, *data, loops, windows), "floor": share}
              for level, (*data, share) in held_out.items()}
    means = {name: sum(scores[name] for scores in levels.values()) / len(levels)
             for name in ("loss", "bit", "exact", "floor")}
    return means if len(levels) == 1 else {**means, "levels": levels}


def seen(task: Task, options: argparse.Namespace, size: int) -> list[Tensor]:
    """The first sequences trained on, at most `size`, to compare with held-out ones.

    They are of the training mixture, which for depo is easier than what is evaluated.
    """
    steps = min(options.steps, -(-size // options.batch))
    return [torch.cat(x)[:size] for x in zip(*itertools.islice(batches(task, options, 0), steps))]


def evaluation(run: "Run", held_out: dict) -> dict:
    """What the log says of this step. At the last step it adds other numbers of passes and the
    first sequences trained on."""
    options, last, more = run.options, run.step == run.options.steps, {}
    with uncompiled(options.fast):
        scores = evaluate_levels(run.model, held_out, run.loops, run.windows)
        if last and options.eval_loops:
            others = {n: evaluate_levels(run.model, held_out, n, run.windows)
                      for n in options.eval_loops}
            more["eval_loops"] = {n: x for n, x in others.items() if math.isfinite(x["loss"])}
        if last and run.step > 0:
            size = -(-options.eval_size // len(held_out))
            again = evaluate(run.model, *seen(run.task, options, size), run.loops, run.windows)
            more |= {"seen": again} if math.isfinite(again["loss"]) else {}
    tokens = run.step * options.batch * run.task.length
    return {"loops": run.loops, "step": run.step, "tokens": tokens,
            "token_passes": run.step * options.batch * run.cost, "train_loss": run.train_loss,
            **scores, "seconds": round(time.monotonic() - run.began, 2), **more}


# ----------------------------------------------------------------------------------------- the loop

def windows_of(task: Task, length: int) -> list[Window]:
    """The windows of every sequence of a task. Those that reach scored_from are scored."""
    targets = torch.full((1, task.length), IGNORE)
    targets[:, task.scored_from:] = 0
    return cut(targets, length)


def passes_over(windows: list[Window], loops: int, config: Config) -> float:
    """What N costs: the token passes of one sequence. A token counts once where it is read awake,
    and N times asleep; a pass over some of the blocks counts as their share."""
    i, j = config.looped
    asleep = 1 + (loops - 1) * (j - i) / len(config.layout)
    return sum((stop - start) * (1 if scored else asleep) for start, stop, scored in windows)


def train_model(run: "Run", held_out: dict, stop: threading.Event) -> list[dict]:
    """Train to the last step -> all evaluations. Once `stop` is set it saves after the step in
    progress and raises Halt. If a loss or gradient is not finite, it raises Halt unsaved."""
    options, tokens = run.options, run.options.batch * run.task.length  # tokens of a step
    step = recorded(partial(training_step, run.model, run.optimizers, run.loops, run.windows),
                    run.model, options.fast)
    data, losses = batches(run.task, options, run.step), []  # losses: still on the device
    with tqdm(desc=f"N = {run.loops}", total=options.steps * tokens, initial=run.step * tokens,
              unit="tok", unit_scale=True, disable=bool(RANK) or None, leave=False,
              dynamic_ncols=True) as bar:
        while True:
            if run.evaluates() or stop.is_set() or len(losses) == CHECK_EVERY:
                run.check(losses)  # and empties the list
            if run.evaluates():
                run.keep(evaluation(run, held_out))
            if run.step == options.steps:
                return run.records
            if stop.is_set():
                run.save()
                raise Halt(130, f"saved; go on with: python {program(VARIANT)} --resume "
                                + shlex.quote(str(run.folder)))
            set_rates(run.optimizers, options, lr_factor(run.step, options.steps))
            losses.append(step(*next(data)))
            run.step += 1
            bar.set_postfix(loss=run.train_loss, exact=run.records[-1]["exact"], refresh=False)
            bar.update(tokens)


def train_all(argv: list[str]):
    """A model for each N of --loops, one after the other, and the table that compares them."""
    options, folder, header = by_first_rank(open_run, argv)
    with contextlib.nullcontext() if RANK else locked(folder):
        task, model = build(vars(options))
        print_facts(options, folder, header, task, model)
        held_out, log = draw_held_out(task, options), []
        share = sum(share for *_, share in held_out.values()) / len(held_out)
        print(f"floor   always the same answer is {share:.2%} exact: the floor", flush=True)
        with gentle_signals() as stop:
            for loops in options.loops:
                log += train_model(Run(loops, options, folder, header, log), held_out, stop)
        write_log(folder, header, log)
        print_table(log)


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


def print_table(log: list[dict]):
    """The last evaluation of every N; token passes = tokens times passes over all blocks."""
    print(f"\n{'N':>3}{'loss':>9}{'bit':>9}{'exact':>9}{'floor':>9}{'tokens':>9}{'seconds':>9}"
          f"{'token passes':>14}")
    for record in {record["loops"]: record for record in log}.values():
        print("{loops:3d}{loss:9.4f}{bit:9.2%}{exact:9.2%}{floor:9.2%}{tokens:9.2e}{seconds:9.1f}"
              "{token_passes:14.2e}".format(**record))


# ========================================================================= what a run needs besides

# Options, a run's folder and checkpoints, a fast step, several processes, early endings.

VARIANT = None    # the name of a variant, while results/variants.py trains it
MOST = 2**31 - 1  # as an option's value
LONG = 8e14       # parameters x token passes of a run that earns compiling
CORES = torch.get_num_threads()  # as torch counts them
PAPER = {"layout": "asas", "d_model": 256, "n_head": 8, "cells": 24, "states": 4, "batch": 512,
         "steps": 782, "muon_lr": 4e-3}
LEFT_OUT = "out", "resume", "paper"  # of a run's configuration


# ------------------------------------------------------------------------------------------ options

class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        """One line and exit code 2, without the usage before it."""
        self.exit(2, f"{self.prog}: error: {message} (see --help)\n")


def checked(convert, valid, must: str):
    """An argparse type: convert(text) where that is valid, else one line with what it must be."""
    def parse(text: str):
        with contextlib.suppress(ValueError):
            if valid(value := convert(text)):
                return value
        raise argparse.ArgumentTypeError(f"{text!r}: must be {must}")
    return parse


def whole(low: int):
    return checked(int, lambda x: low <= x <= MOST, f"a whole number from {low} to {MOST}")


positive = checked(float, lambda x: 0 < x < math.inf, "a number above 0")
span = checked(lambda text: [*map(int, text.split(":"))], lambda x: len(x) == 2,
               "i:j, two whole numbers")
counts = checked(lambda text: [*map(int, text.split(","))],
                 lambda x: 1 <= min(x) and max(x) <= 1024 and len(set(x)) == len(x),
                 "whole numbers from 1 to 1024 (a step takes as many times as long, and as much "
                 "memory), commas between them, none of them twice")


def get_parser() -> argparse.ArgumentParser:
    p = Parser(prog=program(VARIANT), allow_abbrev=False,
               description=(__doc__ or "").split("\n\n")[0],
               formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.set_defaults(variant=VARIANT)
    add = p.add_argument_group("task", "python data.py shows an example of each").add_argument
    add("--task", choices=TASKS, default="rule110", help="what to learn")
    add("--paper", action="store_true",
        help="the size of the paper's Rule 110 runs, where not given: "
             + " ".join(f"--{name} {value}" for name, value in PAPER.items())
             + " (40M tokens, as in Fig. 2a; wants a GPU)")
    for task, kind in TASKS.items():
        for name, text in kind.options.items():
            default = inspect.signature(kind).parameters[name].default
            add(f"--{name}", type=str if isinstance(default, str) else whole(0),
                default=argparse.SUPPRESS, help=f"{task}: {text} (default: {default})")

    add = p.add_argument_group("model").add_argument
    add("--layout", default="as",
        help="a letter a block: a attention, s SSM, m SSM without MLP (the paper: asas)")
    add("--d_model", type=whole(1), default=64, help="width d (the paper: 256)")
    add("--n_head", type=whole(1), default=4, help="heads H of every block")
    add("--rule", choices=CHOICES["rule"], default="gdn",
        help="update of S: Gated DeltaNet (gdn), or without its decay, or without its delta rule")

    add = p.add_argument_group("sleep").add_argument
    add("--loops", type=counts, default="1,2", metavar="N[,N...]",
        help="passes over each window asleep; a list trains one model for each")
    add("--window", type=whole(1), metavar="L", help="tokens between evictions; None: the task's")
    add("--eviction", choices=CHOICES["eviction"], default="hard",
        help="what goes: the whole cache, all but the latest L - 1 tokens, nothing")
    add("--loop_blocks", type=span, metavar="i:j",
        help="loop only the blocks i to j - 1; the others run once; None: loop all")
    add("--eval_loops", type=counts, metavar="N[,N...]",
        help="at the end, evaluate with other numbers of passes as well")

    add = p.add_argument_group("training").add_argument
    add("--steps", type=whole(0), default=800, help="optimizer steps; 0 only evaluates")
    add("--batch", type=whole(1), default=64, help="sequences a step (the paper: 512)")
    add("--sequences", type=whole(1), metavar="K",
        help="train on the first K again and again, a multiple of --batch; None: always new ones")
    add("--muon_lr", type=positive, default=3e-3, help="rate of Muon, for the blocks' matrices")
    add("--lr", type=positive, default=1e-3, help="rate of AdamW, for all other parameters")
    add("--init", metavar="DIR",
        help="start from the weights of another run of this task: a folder with one checkpoint, "
             "or a file N*.pt; --loops must be one N")
    add("--seed", type=whole(0), default=1, help="of start values and training data")
    add("--eval_every", type=whole(1), default=200,
        help="steps between evaluations, each followed by a checkpoint")
    add("--eval_size", type=whole(1), default=2048,
        help="held-out sequences in an evaluation, the same for every N and seed")
    add("--device", choices=["auto", "cpu", "cuda"], default="auto", help="auto: cuda, if any")
    add("--dtype", choices=["auto", "float32", "bfloat16"], default="auto",
        help="of matrix products; parameters and S are float32. auto: bfloat16 on cuda")
    add("--fast", choices=["auto", "eager", "graph", "compile"], default="auto",
        help="eager: a step as written; graph: on cuda, record it once and replay it; compile: "
             "compile its blocks as well, which takes half a minute. auto: by device and length")
    add("--out", type=Path, metavar="DIR", help="folder of the run; None: a new one "
        "under out/. The same command goes on with a run that is there")
    add("--resume", type=Path, metavar="DIR",
        help="go on with the run in DIR, with its options; takes no other option")
    return p


def parse(parser: Parser, argv: list[str]) -> dict:
    """The options of a command line; those not given may be --paper's."""
    if "--paper" in argv:
        parser.set_defaults(**PAPER)
    options = parser.parse_args(argv)
    if options.paper and options.task != "rule110":
        parser.error(f"--paper: must come with --task rule110, not {options.task}")
    return vars(options)


def build(options: dict) -> tuple[Task, Hybrid]:
    """The task and the model at its start. Raises ValueError where an option is impossible.

    The caller's random numbers go on as if nothing had been drawn, and his default device and dtype
    change nothing.
    """
    given = {name: value for name, value in options.items() if value is not None}
    has = inspect.signature(TASKS[options["task"]]).parameters
    for name in itertools.chain(*(kind.options for kind in TASKS.values())):
        if name in given and name not in has:
            raise ValueError(f"{name} {given[name]}: must not be given, "
                             f"task {options['task']} has {', '.join(has)}")
    task = TASKS[options["task"]](**{name: given[name] for name in has if name in given})
    batch, loops = options["batch"], options["loops"]
    if given.get("sequences", 0) % batch:
        raise ValueError(f"sequences {given['sequences']}: must be a multiple of --batch, {batch}")
    if batch % RANKS:
        raise ValueError(f"batch {batch}: must be a multiple of the {RANKS} processes")
    if "init" in given and len(loops) > 1:
        raise ValueError(f"loops {','.join(map(str, loops))}: must be one N with --init")
    shape = {field.name: given[field.name] for field in fields(Config) if field.name in given}
    config = {"vocab_size": len(task.words), "window": task.window, **shape}
    dtype = torch.get_default_dtype()
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(options["seed"])
        torch.set_default_dtype(torch.float32)
        try:
            return task, Hybrid(Config(**config))
        finally:
            torch.set_default_dtype(dtype)


def settle(parser: Parser, options: dict, source: str = "--device cuda"):
    """Settles what is left open, in place: device, dtype, the task's sizes, --fast; and threads.

    Exits with 2 if impossible. source: what asks for a device that may be missing.
    """
    def choose(name: str, value: str):
        options[name] = value if options[name] == "auto" else options[name]

    choose("device", "cuda" if torch.cuda.is_available() else "cpu")
    if options["device"] == "cuda" and not torch.cuda.is_available():
        parser.error(f"{source}: must have a GPU, and there is none here")
    choose("dtype", "bfloat16" if options["device"] == "cuda" else "float32")
    if options["device"] == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        few = 2 if CORES >= 4 else 1  # threads wait for one that has lost its core to other work
        torch.set_num_threads(few if options["d_model"] <= 64 else CORES)
    if options["device"] == "cpu" and options["fast"] not in ("auto", "eager"):
        parser.error(f"--fast {options['fast']}: must be eager or auto on a CPU")
    try:
        task, model = build(options)
    except ValueError as error:
        parser.error(f"--{error}")
    options |= {name: getattr(task, name) for name in task.options}
    work = parameters_of(model) * options["steps"] * options["batch"] * passes_over(
        windows_of(task, model.config.window), max(options["loops"]), model.config)
    # With eviction none no two windows have the same shapes, and compiling never ends.
    long = work > LONG and options["eviction"] != "none"
    choose("fast", "eager" if options["device"] == "cpu" else "compile" if long else "graph")


def parameters_of(model: Hybrid) -> int:
    return sum(p.numel() for p in model.parameters())


def print_facts(options: argparse.Namespace, folder: Path, header: dict, task: Task,
                model: Hybrid):
    c, tokens = model.config, options.batch * task.length
    print(f"task    {task.title()}\n"
          f"model   {c.layout}, d = {c.d_model}, {c.n_head} heads, L = {c.window}: "
          f"{parameters_of(model):,} parameters\n"
          f"run     N = {', '.join(map(str, options.loops))}, seed {options.seed}, "
          f"{options.steps:,} steps of {options.batch} x {task.length} = {tokens:,} tokens\n"
          f"device  {header['hardware']}; matrix products in {options.dtype} (a GPU is fast in "
          "bfloat16, a CPU slow), parameters and S in float32\n"
          f"step    {options.fast} (--fast; compiling pays in a long run on a GPU)\n"
          f"folder  {folder}", flush=True)
    if VARIANT:
        print(f"variant {VARIANT} (results/variants.py)")
    elif c.keep == 0 and set(c.layout) == {"a"} or all(
            window.scored for window in windows_of(task, c.window)):
        print("note    N makes no difference: L leaves no window to sleep on, or the layout no S")


# ----------------------------------------------------------------------------------- a run's folder

def write(path: Path, data: bytes):
    """To a temporary file, then rename: path holds the old file or the new one, never half."""
    if RANK > 0:
        return
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())  # else a power cut could leave the name without the data
        os.replace(temporary, path)
    except OSError as error:  # a full disk does not name the file
        raise OSError(error.errno, error.strerror, str(path)) from None


def write_log(folder: Path, header: dict, records: list[dict]):
    text = "".join(json.dumps(x, allow_nan=False) + "\n" for x in [header, *records])
    path = folder / "log.jsonl"
    if not path.exists() or path.read_text("utf-8") != text:  # else the folder may be read-only
        write(path, text.encode())


@contextlib.contextmanager
def locked(folder: Path):
    """A context in which no other process trains in this folder. The lock ends with its owner,
    however that ends, and leaves no file. Raises Halt if another one has it."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Halt(2, f"error: {folder}: must not be in use by another process") from None
        yield
    finally:
        os.close(handle)


def program(variant: str | None) -> str:
    """What a command line begins with, after "python"."""
    return f"results/variants.py {variant}" if variant else "train.py"


def make_header(argv: list[str], options: dict, name: str) -> dict:
    """First line of the log: what it takes to get the same numbers again."""
    def git(*arguments):
        return subprocess.run(["git", *arguments], cwd=Path(__file__).parent, text=True,
                              capture_output=True).stdout.strip()
    commit = os.environ.get("COMMIT")  # for copies without git
    with contextlib.suppress(OSError):  # there is no git; or this is a copy in another repository
        if not commit and git("ls-files", Path(__file__).name):
            commit = git("describe", "--always", "--dirty", "--abbrev=10")
    hardware = (torch.cuda.get_device_name() if options["device"] == "cuda"
                else f"CPU, threads: {torch.get_num_threads()}")
    return {"command": f"python {name} {shlex.join(argv)}".rstrip(), "commit": commit or "unknown",
            "versions": {"python": platform.python_version(), "torch": torch.__version__,
                         "numpy": np.__version__},
            "hardware": f"{RANKS} x {hardware}" if RANKS > 1 else hardware, "config": options}


def as_arguments(config: dict) -> list[str]:
    """The command line that asks for a configuration."""
    def text(value):
        return ",".join(map(str, value)) if isinstance(value, list) else str(value)
    return [f"--{name}=" + (text(x) if name != "loop_blocks" else "{}:{}".format(*x))
            for name, x in config.items() if x is not None and name != "variant"]


def read_header(parser: Parser, option: str, folder: Path) -> dict:
    """First line of the run's log. Exits with 2 if it is no run, damaged or incomplete."""
    try:
        header, *records = map(
            json.loads, (folder / "log.jsonl").read_text("utf-8").splitlines())
        refuse_variant(header["config"], f"{option} {folder}")
        parsed = vars(get_parser().parse_args(as_arguments(header["config"])))
        if {name: x for name, x in parsed.items() if name not in LEFT_OUT} \
                != header["config"] or not {"command", "commit", "hardware"} <= header.keys():
            raise ValueError
        for record in records:
            (folder / f"N{record['loops']}.pt").stat()  # the log has results of it
    except OSError as error:
        parser.error(f"{option} {folder}: must be a folder that train.py wrote; no "
                     f"{Path(error.filename or 'log.jsonl').name} to read there: {error.strerror}")
    except (ValueError, LookupError, AttributeError, TypeError, RecursionError):
        parser.error(f"{option} {folder}: its log.jsonl is damaged or of another version")
    return header


def refuse_variant(config: dict, source: str):
    """Raises Halt if a run or a checkpoint is of another variant than what runs."""
    if config["variant"] != VARIANT:
        raise Halt(2, f"error: {source}: is not of {program(VARIANT)}; it takes "
                      f"python {program(config['variant'])}")


@contextlib.contextmanager
def reading(source: Path | str, must: str = "a checkpoint of this run; it is missing, truncated, "
                                            "damaged or of another model"):
    """A context in which a checkpoint that cannot be used ends the run."""
    try:
        yield
    except (RuntimeError, ValueError, LookupError, TypeError, AttributeError, EOFError, OSError,
            pickle.UnpicklingError):  # what reading a damaged one raises
        raise Halt(2, f"error: {source}: must be {must}") from None


def load_init(options: dict, model: Hybrid):
    """Gives the model the weights that --init names. Raises Halt if they do not fit."""
    path = Path(options["init"])
    if path.is_dir() and len(found := list(path.glob("N*.pt"))) == 1:
        path = found[0]
    with reading(f"--init {options['init']}", "a checkpoint, or a folder with one, of the same "
                                              "task and vocabulary, width, heads and layout"):
        saved = torch.load(path, map_location="cpu", weights_only=True)
        model.load_state_dict(saved["model"])
        if any(saved["config"].get(name) != options.get(name)  # the weights do not tell these
               for name in ("task", "n_head", "modulus", "names")):
            raise ValueError


def load(path: Path | str) -> tuple[Task, Hybrid, int]:
    """A checkpoint N*.pt, on any machine -> the task, the trained model, its N."""
    saved = torch.load(path, map_location="cpu", weights_only=True)
    refuse_variant(saved["config"], str(path))
    task, model = build(saved["config"])
    model.load_state_dict(saved["model"])
    return task, model, saved["loops"]


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
    out, resume, _ = (options.pop(name) for name in LEFT_OUT)
    if resume:
        if [x.partition("=")[0] for x in argv if x.startswith("--")] != ["--resume"]:
            parser.error(f"--resume {resume}: takes no other option, the run has its own")
        header = read_header(parser, "--resume", resume)
        settle(parser, header["config"], f"--resume {resume}: runs on cuda, which")
        return argparse.Namespace(**header["config"]), resume, header

    settle(parser, options)
    if options["init"] is not None and not (out and (out / "log.jsonl").exists()):
        load_init(options, build(options)[1])
    header = make_header(argv, options, program(VARIANT))
    try:
        out = out or new_folder(options["task"])
        out.mkdir(parents=True, exist_ok=True)
        with locked(out):
            if (out / "log.jsonl").exists():
                header = read_header(parser, "--out", out)
                if header["config"] != options:
                    parser.error(f"--out {out}: must be new, it has a run of another configuration")
            elif strays := sorted(out.glob("N*.pt")):
                parser.error(f"--out {out}: must be new, it has {strays[0].name} without its log")
            else:
                write_log(out, header, [])
    except OSError as error:
        parser.error(f"--out {error.filename or out}: {error.strerror}; must be a writable folder")
    return argparse.Namespace(**options), out, header


class Run:
    """The training of one model, which sleeps N = loops passes, and its checkpoint: it is at its
    start, or where the checkpoint stopped. log: the evaluations of earlier N."""

    def __init__(self, loops: int, options: argparse.Namespace, folder: Path, header: dict,
                 log: list[dict]):
        self.loops, self.options, self.folder = loops, options, folder
        self.header, self.log = header, log
        self.task, self.model = build(vars(options))
        self.windows = windows_of(self.task, self.model.config.window)
        self.cost = passes_over(self.windows, loops, self.model.config)
        self.model.to(options.device)
        self.optimizers = make_optimizers(self.model, options.muon_lr, options.lr)
        self.step, self.records, self.train_loss = 0, [], None
        self.began, self.checkpoint = time.monotonic(), folder / f"N{loops}.pt"
        if self.checkpoint.exists():
            with reading(self.checkpoint):
                self.restore()
        elif options.init is not None:
            load_init(vars(options), self.model)

    def restore(self):
        saved = torch.load(self.checkpoint, map_location=self.options.device, weights_only=True)
        if (saved["config"], saved["loops"]) != (self.header["config"], self.loops):
            raise ValueError
        self.model.load_state_dict(saved["model"])
        for optimizer, state in zip(self.optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        self.step, self.began = saved["step"], self.began - saved["seconds"]
        self.records = saved["records"]
        if self.step not in range(self.options.steps + 1) or not all(map(line, self.records)):
            raise ValueError

    def save(self):
        if not all(parameter.isfinite().all() for parameter in self.model.parameters()):
            self.diverged(self.step)
        torch.save({"config": self.header["config"], "loops": self.loops, "step": self.step,
                    "records": self.records, "seconds": time.monotonic() - self.began,
                    "model": self.model.state_dict(),
                    "optimizers": [optimizer.state_dict() for optimizer in self.optimizers]},
                   buffer := io.BytesIO())  # into a file it would hide why writing failed
        write(self.checkpoint, buffer.getvalue())
        write_log(self.folder, self.header, self.log + self.records)

    def evaluates(self) -> bool:
        """Whether this step is to be evaluated, and has not been."""
        due = self.step % self.options.eval_every == 0 or self.step == self.options.steps
        return due and not (self.records and self.records[-1]["step"] == self.step)

    def keep(self, record: dict):
        """Saves an evaluation, and prints it."""
        if not math.isfinite(record["loss"]):
            self.diverged(self.step)
        self.records.append(record)
        self.save()  # before it is printed: the terminal may be closed
        tqdm.write(line(record))
        sys.stdout.flush()

    def check(self, losses: list[Tensor]):
        """Looks at the losses and gradient norms of the last steps, and empties the list."""
        values = torch.stack(losses).tolist() if losses else []
        for i, pair in enumerate(values, self.step + 1 - len(values)):
            if not all(map(math.isfinite, pair)):
                self.diverged(i)
            self.train_loss = pair[0]
        losses.clear()

    def diverged(self, step: int):
        kept = self.checkpoint if self.checkpoint.exists() else "none yet"
        raise Halt(1, f"N = {self.loops}: loss, gradient or weights not finite at step {step}; "
                      f"last checkpoint: {kept}; try a smaller --muon_lr or --lr")


# -------------------------------------------------------------------------------------- a fast step

def recorded(step, model: Hybrid, fast: str):
    """The training step, as fast as --fast asks."""
    if fast == "compile":
        torch._dynamo.config.recompile_limit = 64  # of forms a block takes: kind, L, need_h
        torch.compiler.assume_constant_result(rotation)  # not at the import: it takes a second
        for block in model.layers:  # blocks of one kind and one L share what is compiled
            block.compile(dynamic=False)
    return step if fast == "eager" else capture(step)


def uncompiled(fast: str):
    """A context in which nothing is compiled: what runs once is not worth it."""
    return torch.compiler.set_stance("force_eager") if fast == "compile" \
        else contextlib.nullcontext()


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


# -------------------------------------------------------------------------------- several processes

def by_first_rank(function, *arguments):
    """function(*arguments), called in one process for all. torchrun starts RANKS of them, on one
    host, a GPU for each; each trains its rows of every batch, the first alone writes and speaks."""
    if RANKS == 1:
        return function(*arguments)
    if not dist.is_initialized():
        if torch.cuda.is_available():
            torch.cuda.set_device(RANK % torch.cuda.device_count())
        dist.init_process_group()
        atexit.register(dist.destroy_process_group)
        sys.stdout = open(os.devnull, "w") if RANK else sys.stdout
    dist.broadcast_object_list(result := [None if RANK else function(*arguments)])
    return result[0]


def of_all_ranks(model: Hybrid, loss: Tensor, scored: Tensor) -> Tensor:
    """Makes gradients and loss, means over the tokens `scored` here, those of the whole batch."""
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    flat = torch.cat([loss.detach().view(1), *(x.flatten() for x in grads), loss.new_ones(1)])
    dist.all_reduce(flat := flat * scored)
    loss, *means, _ = (flat / flat[-1]).split([1, *(x.numel() for x in grads), 1])
    torch._foreach_copy_(grads, [x.view_as(grad) for x, grad in zip(means, grads)])
    return loss[0]


# ------------------------------------------------------------------------------------ early endings

class Halt(Exception):
    """Ends the run with one line on stderr and an exit code."""

    def __init__(self, code: int, message: str):
        super().__init__(message)
        self.code = code


@contextlib.contextmanager
def gentle_signals():
    """A context with an event that the first Ctrl-C, SIGTERM or SIGHUP sets, so that the step in
    progress can end. One that comes later than half a second after it ends the run at once: what
    forwards signals may send one twice. What the parent process ignores stays ignored."""
    stop, before, first = threading.Event(), {}, 0.0

    def note(*_):
        nonlocal first
        if stop.is_set() and time.monotonic() > first + 0.5:
            raise KeyboardInterrupt
        first = first if stop.is_set() else time.monotonic()
        stop.set()

    # No other thread may ask for signals, and torchrun ends all its processes itself.
    if threading.current_thread() is threading.main_thread() and RANKS == 1:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) not in (signal.SIG_IGN, None):
                before[number] = signal.signal(number, note)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def in_one_line(name: str, function, *arguments) -> int:
    """function(*arguments) -> exit code; what ends it is said in one line, unless it is a bug."""
    for stream in ("stdout", "stderr"):
        if getattr(sys, stream) is None:  # closed by the shell, >&-: what is said is lost, no more
            setattr(sys, stream, open(os.devnull, "w"))
        with contextlib.suppress(AttributeError):  # the terminal gets what it can show
            getattr(sys, stream).reconfigure(errors="backslashreplace")
    try:
        function(*arguments)
        return 0
    except Halt as halt:
        code, text = halt.code, "" if RANK else str(halt)
    except KeyboardInterrupt:
        code, text = 130, "" if RANK else "stopped at once; what was saved before stands"
    except OSError as error:
        code, text = 2, f"error: {error}"
    except (RuntimeError, MemoryError) as error:
        code, text = 2, str(error)
        if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "allocate memory" in text:
            text = ("error: not enough memory for this --batch, --eval_size, model or task; "
                    "smaller ones must do")
        elif re.search(r"C(\+\+)? compiler", text):
            text = ("error: Triton finds no C compiler for its kernels; --dtype float32 --fast "
                    "graph, or --device cpu, must do without")
        elif RANKS > 1 and re.search("onnection (closed|reset)", text):
            text = ""  # another process of this run ended, and says why
        else:
            raise
    if text:
        with contextlib.suppress(OSError):  # the terminal may be closed
            print(f"{name}: {text}", file=sys.stderr)
    return code


def main(argv: list[str] | None = None) -> int:
    return in_one_line(program(VARIANT), train_all, sys.argv[1:] if argv is None else argv)


if __name__ == "__main__":
    sys.exit(main())
