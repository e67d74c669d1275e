"""The tasks. `python data.py` prints a worked example of each.

A task is a small class: batch(batch_size, generator, split) -> tokens, targets; floor(); show().
Its layout is fixed, which tokens are scored is the same in every sequence, and an instance belongs
to the train or to the held-out split by a hash of itself, so that evaluation is on states that
training never saw.
"""

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

IGNORE = -100  # target of a token that is not scored, as F.cross_entropy has it
HELD_OUT = 8   # one instance in so many is held out


def generator(seed: int, stream: int, index: int = 0, device="cpu") -> torch.Generator:
    """A random generator of its own for every (seed, stream, index): nobody disturbs anybody's
    numbers.

    The CPU generator keeps only the low 32 bits of a seed, hence one well-mixed 32-bit word.
    """
    word = np.random.SeedSequence([seed, stream, index]).generate_state(1)[0]
    return torch.Generator(device).manual_seed(int(word))


def rule110(state: Tensor, steps: int, rule: int = 110) -> Tensor:
    """`steps` steps of an elementary cellular automaton on a ring: integers 0/1 (..., cells), same
    back.

    The new cell is bit 4 left + 2 self + right of `rule`. With cells fixed at the ends, not on a
    ring, the first one would become constant and the task trivial.
    """
    for _ in range(steps):
        neighbours = 4 * state.roll(1, -1) + 2 * state + state.roll(-1, -1)
        state = rule >> neighbours & 1  # Choice: periodic ring
    return state


def in_held_out(bits: Tensor) -> Tensor:
    """Which states (..., cells) are held out: about one in HELD_OUT, by a hash. -> bool (...)

    The bits are a polynomial's coefficients modulo 2^64, at a large odd point, and the sum is mixed
    once.
    """
    powers = [pow(6364136223846793005, i, 2**64) for i in range(1, bits.shape[-1] + 1)]
    weights = torch.from_numpy(np.array(powers, dtype=np.uint64).view(np.int64)).to(bits.device)
    x = (bits.long() * weights).sum(-1)
    x = (x ^ x >> 31) * 0x1CE4E5B9BF58476D
    return (x >> 40) % HELD_OUT == 0  # Choice: held-out states


@lru_cache
def p_one(cells: int, t: int, rule: int) -> float:
    """P(the first cell is 1 after t steps), over all 2^cells states.

    Every cell is kept as a truth table: one bit for each state, 64 states in a word, so that a step
    of all 2^24 states is a few operations on 2 MiB arrays. Only cells at most t away matter; where
    even those are more than 24, 2^24 random states stand for all.
    """
    cells = min(cells, 2 * t + 1)
    if cells <= 24:
        states = np.arange(max(2**cells, 64))  # with few cells repeated, to fill a word
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
    return float(np.unpackbits(tables[0].view(np.uint8)).mean())


class Rule110:
    """Rule 110 (Sec. 4, Fig. 2): unrelated states in a row, then the first bit of each, t steps on.

    With 4 cells, 2 states and t = 2 (0100 -> 1100 -> 1101, 0111 -> 1101 -> 0111), windows L = 4:

        window     1 1 1 1   2 2 2 2   3 3
        tokens     0 1 0 0   0 1 1 1   ? 1
        targets    . . . .   . . . .   1 0

    The prediction window's inputs are the query and all answers but the last, so that no answer is
    predicted inside a consolidation window.
    """
    QUERY, vocab_size = 2, 3  # tokens: 0, 1 and the query

    def __init__(self, cells: int = 24, states: int = 4, t: int = 32, rule: int = 110):
        for name, value, low, high in (("cells", cells, 3, None), ("states", states, 1, None),
                                       ("t", t, 0, None), ("rule", rule, 0, 255)):
            if value < low or high is not None and value > high:
                bounds = f"at least {low}" if high is None else f"from {low} to {high}"
                raise ValueError(f"{name} {value}: must be {bounds}")
        self.cells, self.states, self.t, self.rule = cells, states, t, rule
        self.window = cells                 # L: the model sees one state at a time
        self.length = states * (cells + 1)  # T

    def batch(self, batch_size: int, generator: torch.Generator,
              split: str = "train") -> tuple[Tensor, Tensor]:
        """tokens, targets: int64 (B, T) on the generator's device. split: "train" or "held-out"."""
        device = generator.device

        def draw(n):
            return torch.randint(2, (n, self.cells), generator=generator, device=device)

        state = draw(batch_size * self.states)
        while (wrong := in_held_out(state) != (split == "held-out")).any():
            state[wrong] = draw(int(wrong.sum()))
        answers = rule110(state, self.t, self.rule)[:, 0].view(batch_size, self.states)
        query = torch.full((batch_size, 1), self.QUERY, device=device)
        tokens = torch.cat([state.view(batch_size, -1), query, answers[:, :-1]],
                           dim=1)  # Choice: label slots
        targets = torch.full_like(tokens, IGNORE)
        targets[:, -self.states:] = answers
        return tokens, targets

    def floor(self) -> float:
        """Exact accuracy of the best constant answer: what a model that learned nothing reaches."""
        p = p_one(self.cells, self.t, self.rule)
        return max(p, 1 - p) ** self.states

    def title(self) -> str:
        return (f"rule {self.rule}: the first bit of each of {self.states} states of {self.cells} "
                f"cells after t = {self.t} steps")

    def show(self) -> str:
        """One worked example: the tokens as the model reads them, and how the answers come
        about."""
        tokens, targets = (x[0].tolist() for x in self.batch(1, generator(0, 0)))
        rows = [("window", [str(i // self.window + 1) for i in range(self.length)]),
                ("tokens", ["01?"[x] for x in tokens]),
                ("targets", ["." if x == IGNORE else str(x) for x in targets])]
        lines = [f"{self.title()}; floor {self.floor():.2%}"]
        lines += [f"{name:8}" + " ".join(cells) for name, cells in rows]
        for i in range(self.states):
            state = torch.tensor(tokens[i * self.cells:(i + 1) * self.cells])
            steps = ["".join(map(str, rule110(state, s, self.rule).tolist()))
                     for s in range(self.t + 1)]
            shown = steps if len(steps) <= 6 else steps[:2] + ["..."] + steps[-1:]
            lines.append(f"state {i + 1}: {' -> '.join(shown)}, first bit {steps[-1][0]}")
        return "\n".join(lines)


TASKS = {"rule110": Rule110}

if __name__ == "__main__":
    print(Rule110(cells=12, states=2, t=4).show())
