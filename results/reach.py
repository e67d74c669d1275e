"""How many training tokens does a model need? python results/reach.py 1,2,3 --t 8 --loops 4

Trains at the paper's size, at a constant rate, one model for each seed of the list, until 90 % of
the held-out sequences are exact in two evaluations on end, or until the tokens of t's row in
PROTOCOL are spent. Other options are those of train.py. results/reach/tT-NN-sS.jsonl gets a header
and every evaluation; a log that is there is not made again, and a run that was stopped goes on.
"""

import gc
import json
import signal
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import train  # noqa: E402
from data import IGNORE  # noqa: E402
from sleep import algorithm1  # noqa: E402

PROTOCOL = {4: (100, 20), 8: (100, 20), 10: (200, 40), 12: (400, 100), 16: (1000, 100),
            32: (5000, 1000)}  # t -> millions of tokens at most, steps between evaluations
LAST = 0.9                     # the level that ends a run
CONSTANT = 0.6                 # the part of a run whose rate is constant: train.lr_factor
SAVE_EVERY = 60                # seconds between checkpoints


class Done(Exception):
    """The last level is reached, or the tokens are spent."""


class Reach(train.Run):
    """A run that evaluates often, by a recorded step, and ends at the last level."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        recorded = train.capture if self.options.device == "cuda" else lambda step: step
        self.score, self.saved = recorded(self.count), time.monotonic()

    def count(self, tokens, targets):
        """-> how many sequences are exact, and the loss. With a gradient, as training is compiled.
        """
        loss, logits, labels = algorithm1(self.model, tokens, targets, self.loops, self.windows)
        exact = ((logits.argmax(-1) == labels) | (labels == IGNORE)).all(1).sum()
        return torch.stack([exact.float(), loss.detach()])

    def evaluate(self):
        options, ((tokens, targets, guessed),) = self.options, self.held_out.values()
        if not self.records or self.records[-1]["step"] < self.step:
            parts = zip(tokens.split(options.batch), targets.split(options.batch))
            exact, loss = torch.stack([self.score(*part) for part in parts]).mean(0).tolist()
            self.records.append({
                "loops": self.loops, "step": self.step,
                "tokens": self.step * options.batch * self.task.length,
                "loss": loss, "exact": exact / options.batch, "floor": guessed,
                "seconds": round(time.monotonic() - self.began, 2)})
        if (all(record["exact"] >= LAST for record in self.records[-2:])
                or self.step >= CONSTANT * options.steps):
            raise Done
        if time.monotonic() > self.saved + SAVE_EVERY:
            self.save()
            self.saved = time.monotonic()


def reach(argv: list[str], log: Path):
    """Trains one model -> its log, a header and every evaluation."""
    options, folder, header = train.open_run(argv)
    with train.locked(folder), train.gentle_signals() as stop:
        task, _ = train.build(vars(options))
        [loops] = options.loops
        run = Reach(loops, options, folder, header, train.draw_held_out(task, options), [])
        try:
            train.train_model(run, stop)
        except Done:
            lines = [header | {"command": f"python results/{Path(__file__).name} "
                                          + " ".join(sys.argv[1:])}, *run.records]
            train.write(log, "".join(json.dumps(x) + "\n" for x in lines).encode())
            run.checkpoint.unlink(missing_ok=True)
    tqdm.write(f"{log.stem}: step {run.step}, {run.records[-1]['tokens'] / 1e6:.1f}M tokens, "
               f"exact {run.records[-1]['exact']:.1%}, {run.records[-1]['seconds']:.0f} s")


def main(argv: list[str]):
    seeds, *given = argv
    options = train.parse(train.get_parser(), given)
    million, every = PROTOCOL[options["t"]]
    tokens_a_step = options.get("batch") * 100
    for seed in seeds.split(","):
        name = f"t{options['t']}-N{options['loops'][0]}-s{seed}"
        log = Path(__file__).parent / "reach" / f"{name}.jsonl"
        if not log.exists():
            log.parent.mkdir(exist_ok=True)
            steps = round(million * 1e6 / CONSTANT / tokens_a_step)
            reach([*given, "--seed", seed, "--steps", str(steps), "--eval_every", str(every),
                   "--eval_size", "4096", "--out", f"out/reach/{name}"], log)
            gc.collect()  # a graph's memory goes with the graph


if __name__ == "__main__":
    sys.exit(train.in_one_line("reach.py", main, sys.argv[1:]))
