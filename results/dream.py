"""A dream, a fork in one file: python results/dream.py --t 32 --loops 16 --steps 3200

Not the paper's. A sleep goes in rounds of two passes: what stands ahead of it a cell learns only
from the S of the pass before. The tokens that OutProj makes of a round's last h are the window that
the next round reads, with embeddings of their own; h is dropped after each round, S goes on. Every
round is told in training what to say: the state k steps on, k = 2 t / N of --loops: 768 labels a
sequence beside 4 answers, no comparison with the paper. Each N of --schedule has a part of --steps.
"""

import argparse
import json
import sys
import time
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data import Rule110, floor, generator, rule110
from model import Config, Hybrid, Memory
from results.variants import position
from sleep import evict, passes, wake
from train import (EVAL, TRAIN, Halt, Parser, counts, in_one_line, lr_factor, make_header,
                   make_optimizers, positive, recorded, set_rates, uncompiled, whole, write)

[(_, _, Positioned)] = position()  # a hybrid with a learned vector for each place in the window


def dreamer(config: Config) -> Hybrid:
    """A hybrid with V more embeddings: a dreamt token's is not that of the same token read."""
    model = Positioned(config)
    model.embedding = nn.Parameter(torch.randn(2 * config.vocab_size, config.d_model))
    return model


def dream(model: Hybrid, tokens: Tensor, memory: Memory, rounds: int) -> tuple[list, Memory]:
    """tokens (B, L) -> what each round says, logits (B, L, V), and S, all that remains."""
    said = []
    for _ in range(rounds):
        h, memory = passes(model, tokens, memory, 2)
        memory = evict(memory)  # the next round reads another window
        said.append(model.unembed(h))
        tokens = said[-1].argmax(-1) + model.config.vocab_size
    return said, memory


def algorithm1(model: Hybrid, tokens: Tensor, answers: Tensor,
               states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Algorithm 1 with dreams. The last window asks, answers (B, P); states (B, W, R, L) are what
    R rounds are to say in each of the W before it. -> the mean cross-entropy of the answers, plus
    that of all that is said; the logits of both, (B, P, V) and (B, W, R, L, V).
    """
    memory, said = model.empty_memory(len(tokens)), []
    *windows, question = tokens.split(model.config.window, dim=1)
    for window in windows:
        spoken, memory = dream(model, window, memory, states.shape[2])
        said.append(torch.stack(spoken, dim=1))
    logits, said = wake(model, question, memory)[0], torch.stack(said, dim=1)
    loss = F.cross_entropy(logits.flatten(0, 1), answers.flatten())
    return loss + F.cross_entropy(said.flatten(0, 3), states.flatten()), logits, said


def draw(task: Rule110, k: int, batch: int, random: torch.Generator, split: str):
    """tokens (B, T), answers (B, W), and the W states after k, 2 k, ..., t steps, (B, W, R, L)."""
    tokens, targets = task.batch(batch, random, split)
    states = [tokens[:, :task.scored_from].view(batch, task.states, task.cells)]
    for _ in range(task.t // k):
        states.append(rule110(states[-1], k, task.automaton))
    return tokens, targets[:, task.scored_from:], torch.stack(states[1:], dim=2)


def training_step(model: Hybrid, optimizers: list[torch.optim.Optimizer], *batch: Tensor) -> Tensor:
    loss = algorithm1(model, *batch)[0]
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()
    return loss.detach()


@torch.no_grad()
def evaluate(model: Hybrid, tokens: Tensor, answers: Tensor, states: Tensor) -> dict[str, float]:
    """said: share of the cells that the rounds say right; bit and exact as in train.evaluate."""
    loss, logits, said = algorithm1(model, tokens, answers, states)
    right = logits.argmax(-1) == answers
    shares = {"said": said.argmax(-1) == states, "bit": right, "exact": right.all(1)}
    return {"loss": loss.item(), **{name: x.float().mean().item() for name, x in shares.items()}}


def get_options(argv: list[str]) -> argparse.Namespace:
    parser = Parser(prog="dream.py", description=__doc__, allow_abbrev=False)
    for name, value in {
            "t": 32, "loops": 16, "schedule": [2, 4, 8, 16], "eval_loops": [32], "cells": 24,
            "states": 4, "layout": "asas", "d_model": 256, "n_head": 4,
            "steps": 3200, "batch": 512, "muon_lr": 4e-3, "lr": 1e-3, "seed": 1, "eval_size": 2048,
            "out": "out/dream.jsonl", "device": "cuda" if torch.cuda.is_available() else "cpu",
    }.items():
        parser.add_argument(f"--{name}", default=value, help="%(default)s", type={
            int: whole(1), float: positive, list: counts, str: str}[type(value)])
    o = parser.parse_args(argv)
    if any(N % 2 for N in [o.loops, *o.schedule, *o.eval_loops]) or 2 * o.t % o.loops:
        parser.error("every N must be even, and --t a multiple of half of --loops")
    if o.steps < len(o.schedule):
        parser.error(f"--steps {o.steps}: must be at least one for each N of --schedule, "
                     f"{len(o.schedule)}")
    return o


def main(argv: list[str]):
    o, began, records = get_options(argv), time.monotonic(), []
    header = make_header(argv, vars(o), "results/dream.py")
    k, gpu = 2 * o.t // o.loops, o.device == "cuda"
    torch.manual_seed(o.seed)
    try:
        tasks = {N: Rule110(o.cells, o.states, N // 2 * k) for N in o.schedule + o.eval_loops}
        model = dreamer(Config(len(Rule110.words), o.cells, o.layout, o.d_model, o.n_head,
                               "bfloat16" if gpu else "float32")).to(o.device)
    except (ValueError, RuntimeError) as error:
        raise Halt(2, f"error: --{error}") from None
    Path(o.out).parent.mkdir(parents=True, exist_ok=True)
    Path(o.out).touch(exist_ok=False)  # never over another log
    fast, optimizers = "compile" if gpu else "eager", make_optimizers(model, o.muon_lr, o.lr)
    for i, N in enumerate(o.schedule, 1):
        step_of_N = recorded(partial(training_step, model, optimizers), model, fast)
        steps = range(o.steps * (i - 1) // len(o.schedule), o.steps * i // len(o.schedule))
        for step in tqdm(steps, f"N = {N}", disable=None, leave=False):
            set_rates(optimizers, o, lr_factor(step, o.steps))
            random = generator(o.seed, TRAIN, step, o.device)
            loss = step_of_N(*draw(tasks[N], k, o.batch, random, "train"))
        for n in tasks if steps.stop == o.steps else o.schedule:
            random = generator(0, EVAL, 0, o.device)
            with uncompiled(fast):
                scores = evaluate(model, *draw(tasks[n], k, o.eval_size, random, "held-out"))
            records.append({"loops": n, "t": tasks[n].t, "step": steps.stop,
                            "tokens": steps.stop * o.batch * tasks[n].length,
                            "train_loss": loss.item(), **scores, "floor": floor(tasks[n]),
                            "seconds": round(time.monotonic() - began, 2)})
            print("  ".join(f"{name} {x:<8.5g}" for name, x in records[-1].items()), flush=True)
            text = "".join(json.dumps(x, allow_nan=False) + "\n" for x in [header, *records])
            write(Path(o.out), text.encode())


if __name__ == "__main__":
    sys.exit(in_one_line("dream.py", main, sys.argv[1:]))
