"""Train the sleeping hybrid on a synthetic task and see what N passes asleep are worth.

One model is trained for each N of --loops, from the same seed on the same data, and a table
compares them on held-out instances. A run's folder gets log.jsonl (a header, then a line for every
evaluation) and a checkpoint for each N; --resume DIR goes on exactly where it stopped.
"""

import argparse
import atexit
import contextlib
import fcntl
import functools
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
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from data import IGNORE, TASKS, floor, generator
from model import CHOICES, Config, Hybrid
from sleep import Window, algorithm1, cut

TASK_OPTIONS = {  # parameters of the tasks' constructors, where their defaults stand
    "t": "rule110: steps of the automaton, the difficulty (4; the paper: up to 32)",
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
TRAIN, EVAL = 0, 1  # streams of random numbers
CHUNK = 64          # training batches drawn in one call
MOST = 2**31 - 1    # as an option's value
CHECK_EVERY = 10    # steps between looks at the loss, each of which waits for the device
FAST = {"eager": "a step as written; a CPU would gain nothing from more",
        "graph": "a step recorded once and replayed; compiling only pays in a long run",
        "compile": "blocks compiled, a step recorded once and replayed; for a long run"}
LONG = 8e14         # parameters x token passes of a run that earns it
PAPER = {"layout": "asas", "d_model": 256, "n_head": 8, "cells": 24, "states": 4, "batch": 512,
         "steps": 782, "muon_lr": 4e-3}
START = "start.pt"  # what --init gave, kept in the run's folder
LEFT_OUT = "out", "resume", "paper"  # of a run's configuration
TORCHRUN = os.environ if "TORCHELASTIC_RUN_ID" in os.environ else {"RANK": 0, "WORLD_SIZE": 1}
RANK, RANKS = int(TORCHRUN["RANK"]), int(TORCHRUN["WORLD_SIZE"])


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


def several(most: int, why: str = ""):
    return checked(lambda text: [*map(int, text.split(","))],
                   lambda x: 1 <= min(x) and max(x) <= most and len(set(x)) == len(x),
                   f"whole numbers from 1 to {most}{why}, commas between them, none of them twice")


positive = checked(float, lambda x: 0 < x < math.inf, "a number above 0")
span = checked(lambda text: [*map(int, text.split(":"))], lambda x: len(x) == 2,
               "i:j, two whole numbers")
counts = several(1024, " (a step takes as many times as long, and as much memory)")


def get_parser() -> argparse.ArgumentParser:
    p = Parser(prog="train.py", allow_abbrev=False, description=(__doc__ or "").split("\n\n")[0],
               formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = p.add_argument_group("task", "python data.py shows an example of each").add_argument
    add("--task", choices=TASKS, default="rule110", help="what to learn")
    add("--paper", action="store_true",
        help="the size of the paper's Rule 110 runs, where not given: "
             + " ".join(f"--{name} {value}" for name, value in PAPER.items())
             + " (40M tokens, as in Fig. 2a; wants a GPU)")
    for name, text in TASK_OPTIONS.items():
        add(f"--{name}", type=str if name == "question" else whole(0), default=argparse.SUPPRESS,
            help=text)

    add = p.add_argument_group("model").add_argument
    add("--layout", default="as", help="a letter a block: a attention, s SSM (the paper: asas), m "
                                       "SSM without MLP, for insertion into a trained model")
    add("--d_model", type=whole(1), default=64, help="width d (the paper: 256)")
    add("--n_head", type=whole(1), default=4, help="heads H of every block")
    add("--rule", choices=CHOICES["rule"], default="gdn",
        help="update of S: Gated DeltaNet, or without its decay, or without its delta rule")
    add("--position", choices=CHOICES["position"], default="none",
        help="window: add a learned vector for each place in the window, which the paper does not "
             "name; such a model does not stream")

    add = p.add_argument_group("sleep").add_argument
    add("--loops", type=counts, default="1,2", metavar="N[,N...]",
        help="passes over each window asleep; a list trains one model for each")
    add("--window", type=whole(1), metavar="L",
        help="tokens between evictions of the cache; None: the task's own")
    add("--eviction", choices=CHOICES["eviction"], default="hard",
        help="what goes: the whole cache, all but the latest L - 1 tokens, nothing")
    add("--loop_blocks", type=span, metavar="i:j",
        help="loop only the blocks i to j - 1; the others run once; None: loop all")
    add("--carry", choices=CHOICES["carry"], default="h",
        help="a pass starts from the h of the one before, or from the embedding (behind the blocks "
             "that are not looped)")
    add("--carry_S", action=argparse.BooleanOptionalAction, default=True,
        help="a pass starts from the S of the one before, or from the window's")
    add("--sleep_at", choices=CHOICES["sleep_at"], default="sleep",
        help="wake: spend the N passes in the scored windows instead (with --no-carry_S)")
    add("--loops_schedule", type=counts, metavar="N[,N...]",
        help="train with these passes in equal parts of the run; None: N throughout")
    add("--eval_loops", type=counts, metavar="N[,N...]",
        help="at the end, evaluate with other numbers of passes as well")

    add = p.add_argument_group("training").add_argument
    add("--steps", type=whole(0), default=800, help="optimizer steps; 0 only evaluates")
    add("--batch", type=whole(1), default=64, help="sequences a step (the paper: 512)")
    add("--sequences", type=whole(1), metavar="K",
        help="train on the first K sequences again and again, a multiple of --batch; None: on new "
             "ones throughout")
    add("--muon_lr", type=positive, default=3e-3, help="rate of Muon, for the blocks' matrices")
    add("--lr", type=positive, default=1e-3, help="rate of AdamW, for all other parameters")
    add("--curriculum", type=several(MOST), metavar="LEVEL[,LEVEL...]",
        help="train on these levels (t, hops or operations) in equal parts of the run; None: on "
             "the task's own mixture")
    add("--init", metavar="DIR",
        help="start from the weights of another run: a folder with one checkpoint, or a file "
             "N*.pt, of the same task and vocabulary; its layout may lack the m blocks")
    add("--train", choices=["all", "new"], default="all",
        help="new: train only the blocks that the checkpoint of --init lacks")
    add("--seed", type=whole(0), default=1, help="of start values and training data")
    add("--eval_every", type=whole(1), default=200,
        help="steps between evaluations, each followed by a checkpoint")
    add("--eval_size", type=whole(1), default=2048,
        help="held-out sequences in an evaluation, shared equally among its levels; the same for "
             "every N and seed")
    add("--device", choices=["auto", "cpu", "cuda"], default="auto",
        help="auto: cuda where there is one")
    add("--dtype", choices=["auto", "float32", "bfloat16"], default="auto",
        help="of matrix products. auto: bfloat16 on cuda; float32 on a CPU, where bfloat16 is "
             "slow. Parameters and fast weights are always float32")
    add("--fast", choices=["auto", *FAST], default="auto",
        help="eager: as written; graph: on cuda, record a step once and replay it; compile: "
             "compile its blocks as well, which takes half a minute or more. auto: eager on a "
             "CPU; on cuda graph for short runs, compile for long")
    add("--out", type=Path, metavar="DIR", help="folder of the run; None: a new one under out/")
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


def make_optimizers(model: Hybrid, muon_lr: float, lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks, AdamW for the rest."""
    matrices = [p for p in model.layers.parameters() if p.requires_grad and p.ndim == 3]
    taken = set(matrices)
    rest = [p for p in model.parameters() if p.requires_grad and p not in taken]
    return [Muon(matrices, lr=muon_lr),
            torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True,
                              capturable=rest[0].is_cuda)]


def lr_factor(step: int, steps: int) -> float:
    """Full rate for 60 % of the run, then down a straight line towards 0."""
    return min(1.0, (steps - step) / (0.4 * steps))  # Choice: schedule


# ----------------------------------------------------------------------------------- one fast step

def make_step(model: Hybrid, optimizers: list[torch.optim.Optimizer], windows: list[Window],
              loops: int):
    """-> step(tokens, targets): one optimizer step -> loss and gradient norm, on the device."""
    def step(*batch: Tensor) -> Tensor:
        tokens, targets = (x.chunk(RANKS)[RANK] for x in batch)  # this process's rows
        loss, _, labels = algorithm1(model, tokens, targets, loops, windows)
        loss.backward()
        if RANKS > 1:
            loss = of_all_ranks(model, loss, (labels != IGNORE).sum())
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)  # Choice: clipping
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        return torch.stack([loss.detach(), norm])
    return step


def of_all_ranks(model: Hybrid, loss: Tensor, scored: Tensor) -> Tensor:
    """Makes gradients and loss, means over the tokens `scored` here, those of the whole batch."""
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    flat = torch.cat([loss.detach().view(1), *(x.flatten() for x in grads), loss.new_ones(1)])
    dist.all_reduce(flat := flat * scored)
    loss, *means, _ = (flat / flat[-1]).split([1, *(x.numel() for x in grads), 1])
    torch._foreach_copy_(grads, [x.view_as(grad) for x, grad in zip(means, grads)])
    return loss[0]


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
               fast: str):
    """-> step_of(N), the training step with N passes, as fast as --fast asks.

    One N at a time keeps its recording, and the memory it works in.
    """
    if fast == "compile":
        torch._dynamo.config.recompile_limit = 64  # of forms a block takes: kind, L, what is needed
        for block in model.layers:  # blocks of one kind and one L share what is compiled
            block.compile(dynamic=False)

    @functools.lru_cache(maxsize=1)
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


def batches(task, options: argparse.Namespace, step: int):
    """Endless training batches from `step` on, each a function of the options and the step."""
    size = 1 if options.curriculum else CHUNK
    period = options.sequences // options.batch if options.sequences else MOST
    while True:
        chunk, first = divmod(step % period, size)
        last = min(size, period - chunk * size)
        data = task.batch(size * options.batch,
                          generator(options.seed, TRAIN, chunk, options.device), "train",
                          stage(options.curriculum, step, options.steps))
        for i in range(first, last):
            yield tuple(x[i * options.batch:(i + 1) * options.batch] for x in data)
        step += last - first


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


def draw_held_out(task, options: argparse.Namespace) -> dict[int, tuple[Tensor, Tensor, float]]:
    """What every evaluation is on, by level: tokens, targets and the floor."""
    levels = sorted({*task.levels, *(options.curriculum or [])})
    size = -(-options.eval_size // len(levels))
    return {level: (*task.batch(size, generator(0, EVAL, i, options.device), "held-out", level),
                    floor(task, level))
            for i, level in enumerate(tqdm(levels, "held-out", disable=None, leave=False))}


def evaluate_levels(model: Hybrid, held_out: dict, loops: int, windows: list[Window]) -> dict:
    """The means over the task's levels, and, where there are several, each level by itself."""
    levels = {level: {**evaluate(model, *data, loops, windows), "floor": guessed}
              for level, (*data, guessed) in held_out.items()}
    means = {name: sum(scores[name] for scores in levels.values()) / len(levels)
             for name in ("loss", "bit", "exact", "floor")}
    return means if len(levels) == 1 else {**means, "levels": levels}


# ----------------------------------------------------------------------------------- a run's folder

def write(path: Path, data: bytes):
    """To a temporary file, then rename: path holds the old file or the new one, never half."""
    if RANK > 0:
        return
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())  # else a power cut could leave the name without the data
    os.replace(temporary, path)


def as_file(state: dict) -> bytes:
    torch.save(state, buffer := io.BytesIO())  # into a file it would hide why writing failed
    return buffer.getvalue()


def write_log(folder: Path, header: dict, records: list[dict]):
    text = "".join(json.dumps(x, allow_nan=False) + "\n" for x in [header, *records])
    path = folder / "log.jsonl"
    if not path.exists() or path.read_text() != text:  # else the folder may be read-only
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


def make_header(argv: list[str], options: dict, program: str = "train.py") -> dict:
    """First line of the log: what it takes to get the same numbers again."""
    def git(*arguments):
        return subprocess.run(["git", *arguments], cwd=Path(__file__).parent, text=True,
                              capture_output=True)
    commit = ""
    with contextlib.suppress(OSError):  # no git; or a copy inside another repository
        if git("ls-files", "--error-unmatch", Path(__file__).name).returncode == 0:
            commit = git("describe", "--always", "--dirty", "--abbrev=10").stdout.strip()
    hardware = (torch.cuda.get_device_name() if options["device"] == "cuda"
                else f"CPU, {torch.get_num_threads()} threads")
    return {"command": shlex.join(["python", program, *argv]),
            "commit": os.environ.get("COMMIT") or commit or "unknown",  # COMMIT: copies without git
            "versions": {"python": platform.python_version(), "torch": torch.__version__,
                         "numpy": np.__version__},
            "hardware": f"{RANKS} x " * (RANKS > 1) + hardware, "config": options}


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
        for record in records:
            (folder / f"N{record['loops']}.pt").stat()  # the log has results of it
    except OSError as error:
        parser.error(f"{option} {folder}: must be a folder that train.py wrote; no "
                     f"{Path(error.filename or 'log.jsonl').name} to read there: {error.strerror}")
    except (ValueError, LookupError, AttributeError, TypeError):
        parser.error(f"{option} {folder}: its log.jsonl is damaged or of another version")
    return header


@contextlib.contextmanager
def reading(source: Path | str, must: str = "a checkpoint of this run; it is missing, truncated, "
                                            "damaged or of another model"):
    """A context in which a checkpoint that cannot be used ends the run."""
    try:
        yield
    except (RuntimeError, ValueError, LookupError, TypeError, AttributeError, EOFError, OSError,
            pickle.UnpicklingError):  # what reading a damaged one raises
        raise Halt(2, f"error: {source}: must be {must}") from None


class Halt(Exception):
    """Ends the run with one line on stderr and an exit code."""

    def __init__(self, code: int, message: str):
        super().__init__(message)
        self.code = code


def read_init(options: dict) -> bytes:
    """The start that --init asks for, as a file: weights, and the names of those it lacks.

    It may lack m blocks: they keep their start, the identity. Raises Halt if it does not fit.
    """
    _, model = build(options)
    path, new = Path(options["init"]), model.config.layout
    if path.is_dir() and len(found := list(path.glob("N*.pt"))) == 1:
        path = found[0]
    with reading(f"--init {options['init']}",
                 "a checkpoint, or a folder with one, of the same task and vocabulary, width, "
                 "heads, --position (with a window no longer) and layout, m blocks aside"):
        saved = torch.load(path, map_location="cpu", weights_only=True)
        old = saved["config"]["layout"]
        kept = [i for i, kind in enumerate(new) if old == new or kind != "m"]
        weights = {re.sub(r"^layers\.(\d+)", lambda match: f"layers.{kept[int(match[1])]}", name): x
                   for name, x in saved["model"].items()}
        if "position" in weights:
            weights["position"] = weights["position"][:model.config.window]
        fresh = [name for i, block in enumerate(model.layers) if i not in kept
                 for name, _ in block.named_parameters(f"layers.{i}")]
        model.load_state_dict(weights | {name: model.get_parameter(name) for name in fresh})
        # equal weights do not tell heads, nor which words a vocabulary has
        if "".join(new[i] for i in kept) != old or any(
                saved["config"].get(name) != options.get(name)
                for name in ("task", "n_head", "modulus", "names")):
            raise ValueError
    if options["train"] == "new" and not fresh:
        raise Halt(2, f"error: --train new: must come with m blocks in --layout that {path} lacks")
    return as_file({"config": options, "loops": None, "model": model.state_dict(), "fresh": fresh})


def build(options: dict):
    """The task and the model at its start. Raises ValueError where an option is impossible.

    The caller's random numbers go on as if nothing had been drawn.
    """
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
    if options["train"] == "new" and options["init"] is None:
        raise ValueError("train new: must come with --init")
    if given.get("sequences", 0) % options["batch"]:
        raise ValueError(f"sequences {given['sequences']}: must be a multiple of --batch, "
                         f"{options['batch']}")
    if options["loops_schedule"] and options["loops"] != options["loops_schedule"][-1:]:
        schedule = ",".join(map(str, options["loops_schedule"]))
        raise ValueError(f"loops_schedule {schedule}: must end in the only N of --loops")
    shape = {field.name: given[field.name] for field in fields(Config) if field.name in given}
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(options["seed"])
        return task, Hybrid(Config(**{"vocab_size": task.vocab_size, "window": task.window,
                                      **shape}))


def load(path: Path | str):
    """A checkpoint N*.pt, on any machine -> the task, the trained model, its N."""
    saved = torch.load(path, map_location="cpu", weights_only=True)
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


def settle(parser: Parser, options: dict, source: str = "--device cuda"):
    """Settles what is left open, in place: device, dtype, the task's sizes, --fast.

    Exits with 2 if impossible. source: what asks for a device that may be missing.
    """
    gpu = torch.cuda.is_available()
    if options["device"] == "auto":
        options["device"] = "cuda" if gpu else "cpu"
    if options["device"] == "cuda" and not gpu:
        parser.error(f"{source}: must have a GPU, and there is none here")
    if options["dtype"] == "auto":
        options["dtype"] = "bfloat16" if options["device"] == "cuda" else "float32"
    if options["device"] == "cpu" and options["fast"] not in ("auto", "eager"):
        parser.error(f"--fast {options['fast']}: must be eager or auto on a CPU")
    try:
        task, model = build(options)
    except ValueError as error:
        parser.error(f"--{error}")
    if options["batch"] % RANKS:
        parser.error(f"--batch {options['batch']}: must be a multiple of the {RANKS} processes")
    options |= {name: getattr(task, name) for name in TASK_OPTIONS if hasattr(task, name)}
    if options["fast"] == "auto":
        work = parameters_of(model) * options["steps"] * options["batch"] * passes_over(
            windows_of(task, model.config.window), max(options["loops"]), model.config)
        # With eviction none no two windows have the same shapes, and compiling never ends.
        long = work > LONG and options["eviction"] != "none"
        options["fast"] = ("eager" if options["device"] == "cpu" else
                           "compile" if long else "graph")


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
    begun = out and (out / "log.jsonl").exists()
    start = read_init(options) if options["init"] is not None and not begun else None
    header = make_header(argv, options)
    try:
        out = out or new_folder(options["task"])
        out.mkdir(parents=True, exist_ok=True)
        with locked(out):
            if any(path.suffix != ".tmp" and path.name != START for path in out.iterdir()):
                header = read_header(parser, "--out", out)
                if header["config"] != options:
                    parser.error(f"--out {out}: must be new, it has a run of another configuration")
            else:
                if start:  # read once: what becomes of it later does not change the run
                    write(out / START, start)
                write_log(out, header, [])
    except OSError as error:
        parser.error(f"--out {error.filename or out}: {error.strerror}; must be a writable folder")
    return argparse.Namespace(**options), out, header


# ----------------------------------------------------------------------------------------- training

def parameters_of(model: Hybrid) -> int:
    return sum(p.numel() for p in model.parameters())


def windows_of(task, length: int) -> list[Window]:
    """The windows of every sequence of a task: scored are those that reach scored_from."""
    targets = torch.full((1, task.length), IGNORE)
    targets[:, task.scored_from:] = 0
    return cut(targets, length)


def passes_over(windows: list[Window], loops: int, config: Config) -> float:
    """Tokens times passes over all blocks, in one sequence: what N costs."""
    i, j = config.core
    more = (loops - 1) * (j - i) / len(config.layout)
    return sum((stop - start) * (1 + more * (scored == (config.sleep_at == "wake")))
               for start, stop, scored in windows)


class Run:
    """The training of one model, that sleeps N = loops passes: all that a checkpoint holds.

    It is at its start, or where the folder's checkpoint stopped. log: evaluations of earlier N.
    """

    def __init__(self, loops: int, options: argparse.Namespace, folder: Path, header: dict,
                 held_out: dict, log: list[dict]):
        self.loops, self.options, self.folder, self.header = loops, options, folder, header
        self.held_out, self.log = held_out, log
        self.step, self.token_passes, self.records = 0, 0, []
        self.train_loss, self.unchecked = None, []  # unchecked: loss and norm, still on the device
        self.checkpoint = folder / f"N{loops}.pt"
        self.task, self.model = build(vars(options))
        self.windows = windows_of(self.task, self.model.config.window)
        self.model.to(options.device)
        saved, self.fresh = self.checkpoint.exists(), None  # fresh: parameters that --init lacks
        path, of = (self.checkpoint, loops) if saved else (folder / START, None)
        if saved or options.init is not None:
            with reading(path):
                start = torch.load(path, map_location=options.device, weights_only=True)
                if (start["config"], start["loops"], type(start["fresh"])) != (
                        header["config"], of, type(None) if options.init is None else list):
                    raise ValueError
                self.fresh = start["fresh"]
                self.model.load_state_dict(start["model"])
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(options.train == "all" or name in self.fresh)
        self.optimizers = make_optimizers(self.model, options.muon_lr, options.lr)
        self.began = time.monotonic()
        if saved:
            with reading(path):
                for optimizer, state in zip(self.optimizers, start["optimizers"], strict=True):
                    optimizer.load_state_dict(state)
                self.step, self.token_passes = start["step"], start["token_passes"]
                self.began -= start["seconds"]
                self.records = [record | {"step": record["step"]}  # raises if it is no record
                                for record in start["records"]]
                if self.step not in range(options.steps + 1):
                    raise ValueError
        self.groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]
        for group in self.groups:
            group["lr"] = torch.zeros((), device=options.device)  # a captured step reads it there

    def save(self):
        if not all(parameter.isfinite().all() for parameter in self.model.parameters()):
            self.diverged(self.step)
        state = {"config": self.header["config"], "loops": self.loops, "fresh": self.fresh,
                 "step": self.step, "token_passes": self.token_passes, "records": self.records,
                 "seconds": time.monotonic() - self.began, "model": self.model.state_dict(),
                 "optimizers": [optimizer.state_dict() for optimizer in self.optimizers]}
        write(self.checkpoint, as_file(state))
        write_log(self.folder, self.header, self.log + self.records)

    def diverged(self, step: int):
        kept = self.checkpoint if self.checkpoint.exists() else "none yet"
        raise Halt(1, f"N = {self.loops}: loss, gradient or weights not finite at step {step}; "
                      f"last checkpoint: {kept}; try a smaller --muon_lr or --lr")

    def check(self):
        """Look at the losses and gradient norms of the last steps, which waits for the device."""
        values = torch.stack(self.unchecked).tolist() if self.unchecked else []
        for i, pair in enumerate(values, self.step + 1 - len(values)):
            if not all(map(math.isfinite, pair)):
                self.diverged(i)
            self.train_loss = pair[0]
        self.unchecked.clear()

    def evaluate(self):
        """Appends this step's record and saves, unless that is done."""
        if self.records and self.records[-1]["step"] == self.step:
            return
        options, last, again = self.options, self.step == self.options.steps, None
        others = (options.eval_loops or []) if last else []
        with uncompiled(options.fast):
            scores = {n: evaluate_levels(self.model, self.held_out, n, self.windows)
                      for n in {self.loops, *others}}
            if last and self.step > 0 and not options.curriculum:  # that trains on other levels
                size = -(-options.eval_size // len(self.held_out))
                again = evaluate(self.model, *seen(self.task, options, size), self.loops,
                                 self.windows)
        if not math.isfinite(scores[self.loops]["loss"]):
            self.diverged(self.step)
        record = {"loops": self.loops, "step": self.step,
                  "tokens": self.step * options.batch * self.task.length,
                  "token_passes": self.token_passes, "train_loss": self.train_loss,
                  **scores[self.loops], "seconds": round(time.monotonic() - self.began, 2)}
        if others:
            record["eval_loops"] = {n: scores[n] for n in others
                                    if math.isfinite(scores[n]["loss"])}
        if again and math.isfinite(again["loss"]):
            record["seen"] = again
        self.records.append(record)
        tqdm.write(line(record))
        sys.stdout.flush()
        self.save()


def train_model(run: Run, stop: threading.Event) -> list[dict]:
    """Train to the last step -> all evaluations. Raises Halt once `stop` is set, when the step in
    progress is done and saved, and at a loss or gradient that is not finite, without saving."""
    options, tokens = run.options, run.options.batch * run.task.length  # tokens of a step
    step_of = fast_steps(run.model, run.optimizers, run.windows, options.fast)
    data = batches(run.task, options, run.step)
    with tqdm(desc=f"N = {run.loops}", total=options.steps * tokens, initial=run.step * tokens,
              unit="tok", unit_scale=True, disable=bool(RANK) or None, leave=False) as bar:
        while True:
            evaluating = run.step % options.eval_every == 0 or run.step == options.steps
            if evaluating or stop.is_set() or len(run.unchecked) == CHECK_EVERY:
                run.check()
            if evaluating:
                run.evaluate()
            if run.step == options.steps:
                return run.records
            if stop.is_set():
                run.save()
                raise Halt(130, "saved; go on with: python train.py --resume "
                                + shlex.quote(str(run.folder)))
            factor = lr_factor(run.step, options.steps)
            for group, rate in zip(run.groups, (options.muon_lr, options.lr)):
                group["lr"].fill_(rate * factor)
            N = stage(options.loops_schedule, run.step, options.steps, run.loops)
            run.unchecked.append(step_of(N)(*next(data)))
            run.step += 1
            run.token_passes += options.batch * passes_over(run.windows, N, run.model.config)
            bar.set_postfix(loss=run.train_loss, exact=run.records[-1]["exact"], refresh=False)
            bar.update(tokens)


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


def print_facts(options: argparse.Namespace, folder: Path, header: dict, task, model: Hybrid):
    c, tokens = model.config, options.batch * task.length
    why = {("cpu", "float32"): "bfloat16 is slow there", ("cuda", "bfloat16"): "for tensor cores"}
    why = why.get((options.device, options.dtype), "as asked")
    print(f"task    {task.title()}\n"
          f"model   {c.layout}, d = {c.d_model}, {c.n_head} heads, L = {c.window}: "
          f"{parameters_of(model):,} parameters\n"
          f"run     N = {', '.join(map(str, options.loops))}, seed {options.seed}, "
          f"{options.steps:,} steps of {options.batch} x {task.length} = {tokens:,} tokens\n"
          f"device  {header['hardware']}; matrix products in {options.dtype} ({why}), "
          f"parameters and S in float32\n"
          f"step    {options.fast}: {FAST[options.fast]} (--fast)\n"
          f"folder  {folder}", flush=True)
    if options.sleep_at == "sleep" and (c.keep == 0 and set(c.layout) == {"a"} or all(
            window.scored for window in windows_of(task, c.window))):
        print("note    N makes no difference: L leaves no window to sleep on, or the layout no S")


def print_table(log: list[dict]):
    """The last evaluation of every N; token passes = tokens times passes over all blocks."""
    print(f"\n{'N':>3}{'loss':>9}{'bit':>9}{'exact':>9}{'floor':>9}{'tokens':>9}{'seconds':>9}"
          f"{'token passes':>14}")
    for record in {record["loops"]: record for record in log}.values():
        print("{loops:3d}{loss:9.4f}{bit:9.2%}{exact:9.2%}{floor:9.2%}{tokens:9.2e}{seconds:9.1f}"
              "{token_passes:14.2e}".format(**record))


@contextlib.contextmanager
def gentle_signals():
    """A context with an event that the first Ctrl-C or SIGTERM sets, so that the step in progress
    can end; the second acts as it did before. What the parent process ignores stays ignored."""
    stop, before = threading.Event(), {}

    def note(*_):
        stop.set()
        restore()

    def restore():
        for number, handler in before.items():
            signal.signal(number, handler)

    # No other thread may ask for signals, and torchrun ends all its processes itself.
    if threading.current_thread() is threading.main_thread() and RANKS == 1:
        for number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) not in (signal.SIG_IGN, None):
                before[number] = signal.signal(number, note)
    try:
        yield stop
    finally:
        restore()


def train_all(argv: list[str]):
    """Every N of --loops, one after the other."""
    options, folder, header = by_first_rank(open_run, argv)
    with contextlib.nullcontext() if RANK else locked(folder):
        task, model = build(vars(options))
        print_facts(options, folder, header, task, model)
        held_out, log = draw_held_out(task, options), []
        guessed = sum(earned for *_, earned in held_out.values()) / len(held_out)
        print(f"floor   always the same answer is {guessed:.2%} exact: the floor", flush=True)
        with gentle_signals() as stop:
            for loops in options.loops:
                log += train_model(Run(loops, options, folder, header, held_out, log), stop)
        write_log(folder, header, log)
        print_table(log)


def in_one_line(program: str, function, *arguments) -> int:
    """function(*arguments) -> exit code; what ends it is said in one line, unless it is a bug."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by the shell, >&-: what is said is lost, no more
            setattr(sys, name, open(os.devnull, "w"))
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
        print(f"{program}: {text}", file=sys.stderr)
    return code


def main(argv: list[str] | None = None) -> int:
    return in_one_line("train.py", train_all, sys.argv[1:] if argv is None else argv)


if __name__ == "__main__":
    sys.exit(main())
