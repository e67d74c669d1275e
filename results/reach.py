"""How many tokens does a model need? python results/reach.py 1,2,3 --paper --t 8 --loops 4,2,1

Trains a model for each seed of the list and each N, at a constant rate, until enough of the
held-out sequences are exact in two evaluations on end, or until the tokens are spent: PROTOCOL has
both for each t. Other options are those of train.py. results/reach/tT-NN-sS.jsonl gets a header and
every evaluation. A log that is there is not made again, and a run that was stopped goes on. On
several GPUs give each process one (CUDA_VISIBLE_DEVICES) and all the same command: they share the
runs.
"""

import gc
import json
import re
import shlex
import sys
import time
from itertools import pairwise, product
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import train  # noqa: E402
from sleep import IGNORE, algorithm1  # noqa: E402

# t -> millions of tokens at most, steps between evaluations, the level that ends a run
PROTOCOL = {4: (100, 20, 0.9), 8: (100, 20, 0.9), 10: (200, 40, 0.9), 12: (400, 100, 0.9),
            16: (1000, 100, 0.5), 32: (5000, 1000, 0.3)}
CONSTANT = 0.6   # the part of a run whose rate is constant: train.lr_factor
SAVE_EVERY = 60  # seconds between checkpoints


def reached(records: list[dict], level: float) -> dict | None:
    """The first of two evaluations on end with so many sequences exact; None: there is none."""
    return next((one for one, two in pairwise(records)
                 if min(one["exact"], two["exact"]) >= level), None)


class Done(Exception):
    """The last level is reached, or the tokens are spent."""


class Reach(train.Run):
    """A run with many evaluations, made by a recorded step, which ends at the last level."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        recorded = train.capture if self.options.device == "cuda" else lambda step: step
        self.score, self.saved = recorded(self.count), time.monotonic()

    def count(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """-> loss, bit, exact as in train.evaluate. With gradients, as training is compiled."""
        loss, logits, labels = algorithm1(self.model, tokens, targets, self.loops, self.windows)
        right, scored = logits.argmax(-1) == labels, labels != IGNORE
        bit, exact = (right & scored).sum() / scored.sum(), (right | ~scored).all(1).float().mean()
        return torch.stack([loss.detach(), bit, exact])

    def keep(self, record: dict):
        """Ends the run at its last level, and else saves it now and then."""
        self.records.append(record)
        last = PROTOCOL[self.task.t][2]
        if reached(self.records[-2:], last) or self.step >= CONSTANT * self.options.steps:
            raise Done
        if time.monotonic() > self.saved + SAVE_EVERY:
            self.save()
            self.saved = time.monotonic()


def evaluation(run: Reach, held_out: dict) -> dict:
    """In place of train.evaluation."""
    [(tokens, targets, guessed)] = held_out.values()
    parts = zip(tokens.split(run.options.batch), targets.split(run.options.batch))
    loss, bit, exact = torch.stack([run.score(*part) for part in parts]).mean(0).tolist()
    return {"loops": run.loops, "step": run.step,
            "tokens": run.step * run.options.batch * run.task.length, "loss": loss, "bit": bit,
            "exact": exact, "floor": guessed, "seconds": round(time.monotonic() - run.began, 2)}


def reach(argv: list[str], log: Path):
    """Trains one model -> its log, a header and every evaluation."""
    options, folder, header = train.open_run(argv)
    header["command"] = f"python results/reach.py {shlex.join(sys.argv[1:])}"
    with train.locked(folder), train.gentle_signals() as stop:
        if log.exists():  # another process was faster
            return
        task, _ = train.build(vars(options))
        [loops] = options.loops
        run = Reach(loops, options, folder, header, [])
        try:
            train.train_model(run, train.draw_held_out(task, options), stop)
        except Done:
            lines = "".join(json.dumps(x) + "\n" for x in [header, *run.records])
            train.write(log, lines.encode())
            train.write_log(folder, header, [])  # as the checkpoint goes
            run.checkpoint.unlink(missing_ok=True)
        except train.Halt as halt:
            if halt.code != 130:  # it diverged
                raise
            raise train.Halt(130, "saved; the same command goes on") from None
    last = run.records[-1]
    tqdm.write("{}: step {step}, {:.1f}M tokens, exact {exact:.1%}, {seconds:.0f} s".format(
        log.stem, last["tokens"] / 1e6, **last))


def main(argv: list[str]):
    parser = train.get_parser()
    parser.prog = "reach.py"
    if not re.fullmatch(r"\d+(,\d+)*", (argv or [""])[0]):
        parser.error("the seeds must come first, whole numbers with commas between them")
    options = train.parse(parser, argv[1:])
    try:
        task, _ = train.build(options | {"dtype": "float32", "loops": options["loops"][:1]})
    except ValueError as error:
        parser.error(f"--{error}")
    t, loops = getattr(task, "t", None), options["loops"]
    if t not in PROTOCOL:
        parser.error(f"--t must be one of {', '.join(map(str, PROTOCOL))}")
    millions, every, _ = PROTOCOL[t]
    steps = round(millions * 1e6 / CONSTANT / (options["batch"] * task.length))
    for seed, N in product(argv[0].split(","), loops):
        log = Path(__file__).parent / f"reach/t{t}-N{N}-s{seed}.jsonl"
        log.parent.mkdir(exist_ok=True)
        if not log.exists():
            try:
                reach([*argv[1:], f"--loops={N}", f"--seed={seed}", f"--steps={steps}",
                       f"--eval_every={every}", "--eval_size=4096",
                       f"--out=out/reach/{log.stem}"], log)
            except train.Halt as halt:
                if "in use" not in str(halt):
                    raise
                tqdm.write(f"{log.stem}: left to the process that makes it")
            gc.collect()  # a graph's memory goes with the graph


if __name__ == "__main__":
    train.evaluation = evaluation
    sys.exit(train.in_one_line("reach.py", main, sys.argv[1:]))
