"""The tasks. `python data.py` prints a worked example of each.

An instance (a state, a cycle, a problem) belongs to the train or to the held-out split by a hash of
itself, so that evaluation is on instances never trained on."""

import numpy as np
import torch
from torch import Tensor

from sleep import IGNORE

HELD_OUT = 8                  # one instance in so many is held out
TRAIN, EVAL, FLOOR = 0, 1, 3  # streams of random numbers
SPLITS = {"train": False, "held-out": True}


def generator(seed: int, stream: int, index: int = 0, device="cpu") -> torch.Generator:
    """A random generator of its own for every (seed, stream, index), so that none disturbs another.

    The CPU generator keeps only the low 32 bits of a seed, hence one well-mixed 32-bit word."""
    word = np.random.SeedSequence([seed, stream, index]).generate_state(1)[0]
    return torch.Generator(device).manual_seed(int(word))


def rule110(state: Tensor, steps: int, automaton: int = 110) -> Tensor:
    """`steps` steps of an elementary automaton on a ring: integers 0/1 (..., cells) -> the same.

    The automaton's number is its table: the new cell is its bit 4 left + 2 self + right. With cells
    fixed at the ends, not on a ring, the first one would become constant and the task trivial."""
    dtype, state = state.dtype, state.byte()
    for _ in range(steps):
        bit = 4 * state.roll(1, -1) + 2 * state + state.roll(-1, -1)  # 0 to 7
        state = (automaton >> bit) & 1  # Choice: periodic ring
    return state.to(dtype)


def check(name: str, value: int, low: int, high: int | None = None):
    """Raises ValueError, in one line that begins with the name, if value is out of bounds."""
    if value < low or high is not None and value > high:
        bounds = f"at least {low}" if high is None else f"from {low} to {high}"
        raise ValueError(f"{name} {value}: must be {bounds}")


def in_held_out(integers: Tensor) -> Tensor:
    """Which instances (..., size) are held out: about one in HELD_OUT, by a hash. -> bool (...)

    The integers must be the same for all shufflings of one instance. The hash is their sum, each
    times its own odd number, modulo 2^64; then the high bits are mixed into the low ones."""
    powers = [pow(6364136223846793005, i, 2**64) for i in range(1, integers.shape[-1] + 1)]
    weights = torch.from_numpy(np.array(powers, dtype=np.uint64).view(np.int64))
    x = (integers.long() * weights.to(integers.device)).sum(-1)
    x = (x ^ x >> 31) * 0x1CE4E5B9BF58476D
    return (x >> 40) % HELD_OUT == 0  # Choice: held-out states


def sample(count: int, draw, split: str, device, key=lambda instances, rows: instances) -> Tensor:
    """`count` instances of a split: draw(rows) makes those of some rows (n,), and is called again
    for rows of the other split. key(instances, rows) -> integers (n, size) for `in_held_out`."""
    rows = torch.arange(count, device=device)
    instances = draw(rows)
    while True:
        rows = rows[in_held_out(key(instances[rows], rows)) != SPLITS[split]]
        if not len(rows):
            return instances
        instances[rows] = draw(rows)


def floor(task, level: int | None = None) -> float:
    """Exact accuracy of always giving the same answer, the most frequent one; it takes no learning.

    An answer is all that is scored in a sequence, in its order. It is counted in fixed held-out
    sequences; the one that it is taken from does not count."""
    for size in (2**12, 2**16):  # few are enough where no answer is frequent
        targets = task.batch(size, generator(0, FLOOR), "held-out", level)[1]
        scored = (targets == IGNORE).byte().argsort(dim=1, stable=True)  # they come first
        answers = targets.gather(1, scored)[:, :(targets != IGNORE).sum(1).max()]
        share = (answers.unique(dim=0, return_counts=True)[1].max().item() - 1) / (size - 1)
        if share < 0.01:
            break
    return share


class Task:
    """What the tasks share. A task of your own sets what stands below; in its constructor it sets
    an attribute for each option, and

        window, length  L, the tokens between two evictions, and T, those of every sequence
        scored_from     the first place that may be scored. Its window, every later one and every
                        sequence have a scored place; for a Stream all are in the last window

    It defines batch(batch_size, random, split, level) -> tokens, targets: int64 (B, T) on the
    device of `random`, where all that is drawn comes from. Targets are IGNORE where not scored."""
    words: str | list[str]           # the vocabulary, a word for each token
    options: dict[str, str] = {}     # its parameters, with their help: whole numbers or text, named
                                     # as no other option is
    levels: tuple[int, ...] = (0,)   # for evaluation one by one; level = None is training's mixture
    shown: dict = {}                 # options of the example that `python data.py` prints

    def title(self) -> str:
        sizes = ", ".join(f"{name} {getattr(self, name)}" for name in self.options)
        return f"{type(self).__name__}: {sizes}"

    def solution(self, words: list[str]):
        """Lines that say how the answers of a sequence come about."""
        return []

    def show(self) -> str:
        """One worked example: the tokens as the model reads them, and how the answers arise."""
        example = self.batch(1, generator(0, TRAIN), level=self.levels[-1])
        tokens, targets = (x[0].tolist() for x in example)
        words = [self.words[x] for x in tokens]
        rows = {"window": [str(i // self.window + 1) for i in range(self.length)], "tokens": words,
                "targets": ["." if x == IGNORE else self.words[x] for x in targets]}
        width = max(map(len, rows["window"] + words))
        lines = [f"{name:8}" + " ".join(f"{cell:{width}}" for cell in row).rstrip()
                 for name, row in rows.items()]
        first = f"{self.title()}; floor {floor(self):.2%}"
        return "\n".join([first, *lines, *self.solution(words)])


# ----------------------------------------------------------------------------------------- Rule 110

class Rule110(Task):
    """Rule 110 (Sec. 4, Fig. 2): unrelated states in a row, then the first bit of each, t steps on.

    With 4 cells, 2 states and t = 2 (0100 -> 1100 -> 1101, 0111 -> 1101 -> 0111), windows L = 4:

        window     1 1 1 1   2 2 2 2   3 3
        tokens     0 1 0 0   0 1 1 1   ? 1
        targets    . . . .   . . . .   1 0

    The prediction window's inputs are the query and all answers but the last, so that no answer is
    predicted inside a consolidation window."""
    words, QUERY = "01?", 2
    options = {"t": "steps of the automaton, the difficulty; the paper: up to 32",
               "cells": "cells in a state; the paper: 24",
               "states": "states in a sequence; the paper: 4",
               "automaton": "number of the elementary rule"}

    def __init__(self, cells: int = 12, states: int = 2, t: int = 4, automaton: int = 110):
        check("cells", cells, 3)
        check("states", states, 1)
        check("t", t, 0, 10_000)
        check("automaton", automaton, 0, 255)
        self.cells, self.states, self.t, self.automaton = cells, states, t, automaton
        self.levels = (t,)
        self.window = cells                 # L: the model sees one state at a time
        self.length = states * (cells + 1)  # T
        self.scored_from = self.length - states

    def batch(self, batch_size, random, split="train", level=None):
        """See Task. level: another t."""
        device, t = random.device, self.t if level is None else level
        check("level", t, 0, 10_000)

        def draw(rows):
            return torch.randint(2, (len(rows), self.cells), generator=random, device=device)

        state = sample(batch_size * self.states, draw, split, device)
        answers = rule110(state, t, self.automaton)[:, 0].view(batch_size, self.states)
        query = torch.full((batch_size, 1), self.QUERY, device=device)
        tokens = torch.cat([state.view(batch_size, -1), query, answers[:, :-1]],
                           dim=1)  # Choice: label slots
        targets = torch.full_like(tokens, IGNORE)
        targets[:, -self.states:] = answers
        return tokens, targets

    def title(self):
        return (f"rule {self.automaton}: the first bit of each of {self.states} states of "
                f"{self.cells} cells after t = {self.t} steps")

    def solution(self, words):
        for i in range(self.states):
            state = torch.tensor(list(map(int, words[i * self.cells:(i + 1) * self.cells])))
            steps = ["".join(map(str, rule110(state, s, self.automaton).tolist()))
                     for s in range(self.t + 1)]
            shown = steps if len(steps) <= 6 else steps[:2] + ["..."] + steps[-1:]
            yield f"state {i + 1}: {' -> '.join(shown)}, first bit {steps[-1][0]}"


# --------------------------------------------------------------------------------------------- Depo

class Depo(Task):
    """Depo (Sec. 4, Fig. 3): k hops along a shuffled directed cycle, after Allen-Zhu's generator.

    With 3 nodes (4 -> 6 -> 2-1 -> 4), 2 hops and 2 questions, windows L = 6:

        window   1  1  1  1  1  1    2  2  2  2  2  2    3  3  3  3  3  3    4  4  4  4  4  4
        tokens   _  _  _  _  4  6    2- 1  4  6  2- 1    k2 4  =  2- 1  k1   2- 1  =  4  _  _
        targets  .  .  .  .  .  .    .  .  .  .  .  .    .  =  2- 1  .  .    .  =  4  .  .  .

    A name is one token or two, the first with "-" here; first and last tokens are separate halves
    of the vocabulary, so that the end of a name shows. An edge is two names without an arrow. Hops
    k1, k2, ..., the answer marker = and padding _ are tokens of their own. Scored are the marker
    and the name after it; targets are the inputs moved by one.

    Padding is read like any token. It fills the graph on the left to 4 nodes tokens, the questions
    on the right to 6 questions tokens. Training draws the size n of the cycle from 3 to nodes; at a
    level it is nodes. min(n, questions) questions are asked, which start at distinct nodes."""
    options = {"nodes": "nodes of the largest cycle, as the paper",
               "hops": "hops at most, as the paper",
               "questions": "questions in a sequence, as the paper",
               "names": "tokens that end a name, and as many that begin one, as the paper"}
    shown = {"nodes": 4, "hops": 2, "questions": 2, "names": 9, "window": 8}

    def __init__(self, nodes: int = 75, hops: int = 16, questions: int = 10, names: int = 50,
                 window: int | None = None):
        check("names", names, 2, 1000)
        check("nodes", nodes, 3, names + names**2)
        check("hops", hops, 1, 1000)
        check("questions", questions, 1, nodes)
        self.nodes, self.hops, self.questions, self.names = nodes, hops, questions, names
        self.window = nodes if window is None else window  # L: None: the graph spans 4 windows
        check("window", self.window, 1)
        self.length = 4 * nodes + 6 * questions            # T
        self.scored_from = 4 * nodes + 1                   # behind a hop and a name's only token
        self.levels = tuple(2**i for i in range(hops.bit_length()))
        self.words = ([f"{i}-" for i in range(names)] + [f"{i}" for i in range(names)]
                      + [f"k{k + 1}" for k in range(hops)] + ["=", "_"])
        self.ANSWER, self.PAD = len(self.words) - 2, len(self.words) - 1

    def batch(self, batch_size, random, split="train", level=None):
        """See Task. level: hops of each question."""
        low, high = (1, self.hops) if level is None else (level, level)
        check("level", low, 1, self.hops)
        source = {"generator": random, "device": random.device}
        i, total = torch.arange(self.nodes, device=random.device), self.names + self.names**2

        def shuffle(n):  # (B, 1) -> (B, nodes): 0, ..., n - 1 in random order, then the others
            return (torch.rand(len(n), self.nodes, **source) + (i >= n)).argsort(dim=1)

        def draw(rows):  # -> names (B, nodes), of which the first n are the cycle, in order
            # The original draws length and tokens of a name, again if it has been there. That is
            # a race of exponential clocks: half of the time some name of one token is the next.
            clocks = torch.empty(len(rows), total, device=n.device).exponential_(generator=random)
            clocks[:, :self.names] /= self.names
            return clocks.topk(self.nodes, largest=False).indices.gather(1, shuffle(n[rows]))

        def edges(cycle, rows):  # sorted, they do not tell where the cycle starts
            after = cycle.gather(1, (i + 1) % n[rows])
            edges = torch.where(i < n[rows], cycle * total + after, -1)
            return edges.sort(dim=1).values  # Choice: held-out cycles

        def spell(name):  # (...) -> tokens (..., 2), the first of them padding for a short name
            first = torch.where(name < self.names, self.PAD, name // self.names - 1)
            return torch.stack([first, self.names + name % self.names], dim=-1)

        def lay(rows, n):  # (B, rows, slots) -> (B, rows * slots): padding instead of rows from n
            return rows.masked_fill((i[:rows.shape[1]] >= n)[..., None], self.PAD).flatten(1)

        size = np.arange(self.nodes + 1)
        weight = size == self.nodes if level else (size >= 3) / (size + self.nodes**0.5)
        n = torch.tensor(weight / weight.sum(), device=random.device).multinomial(
            batch_size, replacement=True, generator=random)[:, None]
        cycle = sample(batch_size, draw, split, random.device, key=edges)
        order = shuffle(n)
        ends = cycle.gather(1, order), cycle.gather(1, (order + 1) % n)
        graph = lay(torch.cat([spell(end) for end in ends], dim=-1), n)
        graph = graph.gather(1, (graph != self.PAD).byte().argsort(dim=1, stable=True))

        start = shuffle(n)[:, :self.questions]
        k = torch.randint(low, high + 1, start.shape, **source)
        name, answer = (spell(cycle.gather(1, x)) for x in (start, (start + k) % n))
        hop, marker = 2 * self.names - 1 + k, torch.full_like(k, self.ANSWER)
        asked = lay(torch.cat([hop[..., None], name, marker[..., None], answer], dim=-1), n)
        slot = (asked == self.PAD).byte().argsort(dim=1, stable=True)
        asked = asked.gather(1, slot)
        scored = (slot % 6 >= 3) & (asked != self.PAD)

        tokens = torch.cat([graph, asked], dim=1)
        targets = torch.full_like(tokens, IGNORE)
        targets[:, graph.shape[1] - 1:-1] = asked.where(scored, IGNORE)  # one to the left
        return tokens, targets

    def solution(self, words):
        text = " ".join(word for word in words if word != "_").replace("- ", "-").split()
        first = next(i for i, word in enumerate(text) if word[0] == "k")
        after = dict(zip(text[:first:2], text[1:first:2]))
        for k, name, _, answer in zip(*(text[first + i::4] for i in range(4))):
            walk = [name]
            for _ in range(int(k[1:])):
                walk.append(after[walk[-1]])
            yield f"{k} from {name}: {' -> '.join(walk)}, answer {answer}"


# ---------------------------------------------------------------------------------------------- GSM

class GSM(Task):
    """The symbolic analogue of GSM-Infinite (Sec. 4, Fig. 4 and 5): arithmetic in shuffled order.

    With 2 operations and 4 statements (t = 1 + 3 = 4, d = 5 * 4 = 6 modulo 7), windows L = 9:

        window   1 1 1 1 1 1 1 1 1   2 2 2 2 2 2 2 2 2   3 3 3 3 3 3 3 3 3
        tokens   ? d d = 5 * t ; a   = 3 * 6 ; p = t -   d ; t = 1 + 3 ; A
        targets  . . . . . . . . .   . . . . . . . . .   . . . . . . . . 6

    Exactly `level` statements are needed, in a chain: the operands of each are the one before it
    and either a constant or the one before that, so that no step can be taken before the last one.
    The others are distractors, one half a chain like the first that shares no variable with it, the
    other half statements with operands of the first that lead nowhere. The number of statements is
    always the same: no padding, and the length does not tell the level."""
    options = {"ops": "needed operations at most",
               "statements": "statements in a problem, needed or not",
               "modulus": "a prime; answers are 0 to modulus - 1",
               "variables": "names for variables",
               "question": "asked first or last"}
    shown = {"ops": 3, "statements": 6, "modulus": 7, "window": 13}

    def __init__(self, ops: int = 8, statements: int = 16, modulus: int = 11, variables: int = 26,
                 question: str = "first", window: int = 60):
        check("ops", ops, 1)
        check("statements", statements, ops + 2)  # a distractor of each kind
        check("variables", variables, statements, 1000)
        check("window", window, 1)
        if not 3 <= modulus < 100 or any(modulus % i == 0 for i in range(2, modulus)):
            raise ValueError(f"modulus {modulus}: must be a prime from 3 to 97")
        if question not in ("first", "last"):
            raise ValueError(f"question {question}: must be first or last")
        self.ops, self.statements, self.question = ops, statements, question
        self.modulus, self.variables = modulus, variables
        self.window = window              # L
        self.length = 6 * statements + 3  # T: by default 1.65 L, as the paper's longest
        self.scored_from = self.length - 1
        self.levels = tuple(range(1, ops + 1))
        letters = [chr(ord("a") + i % 26) + str(i // 26 or "") for i in range(variables)]
        self.words = [str(i) for i in range(modulus)] + letters + list("+-*=;?A")

    def batch(self, batch_size, random, split="train", level=None):
        """See Task. level: statements needed."""
        low, high = (1, self.ops) if level is None else (level, level)
        check("level", low, 1, self.ops)
        source = {"generator": random, "device": random.device}
        S, p, plus = self.statements, self.modulus, self.modulus + self.variables
        i = torch.arange(S, device=random.device)

        def draw(rows):  # -> (B, S, 4): variable, operand, operator, operand
            # Operands are statements before i, or -1: a constant. Three parts: the needed chain,
            # i < steps; the chain apart; those that reuse what is needed.
            B, steps = len(rows), level[rows]
            place = torch.where(i < steps, i, i - steps)  # in its chain
            reuses = i >= S - (S - steps) // 2
            near, far = (torch.where(place >= back, i - back, -1) for back in (1, 2))
            needed = torch.rand(2, B, S, **source) * steps
            near, far = torch.stack([near, far]).where(~reuses, needed.long())
            far = far.where(torch.rand(B, S, **source) < 0.5, -1)
            operands = torch.stack([near, far], dim=-1)
            operands = operands.where(torch.rand(B, S, 1, **source) < 0.5, operands.flip(-1))

            variable = p + torch.rand(B, self.variables, **source).argsort(dim=1)[:, :S]
            names = variable.gather(1, operands.clamp(min=0).flatten(1)).view_as(operands)
            constants = torch.randint(1, p, operands.shape, **source)  # 0 would cut the chain
            left, right = names.where(operands >= 0, constants).unbind(-1)
            operator = torch.randint(plus, plus + 3, (B, S), **source)
            return torch.stack([variable, left, operator, right], dim=-1)

        def needed(problem, rows):  # whatever the distractors and the order
            needed = torch.where((i < level[rows])[..., None], problem, 0)
            return needed.flatten(1)  # Choice: held-out problems

        level = torch.randint(low, high + 1, (batch_size, 1), **source)
        problem = sample(batch_size, draw, split, random.device, key=needed)
        values = torch.arange(plus, device=i.device).repeat(batch_size, 1)  # a constant's is itself
        for statement in problem[:, :self.ops].unbind(1):  # each after those it depends on
            variable, left, operator, right = statement.split(1, dim=1)
            u, v = values.gather(1, left), values.gather(1, right)
            results = torch.cat([u + v, u - v, u * v], dim=1) % p
            values.scatter_(1, variable, results.gather(1, operator - plus))

        marks = torch.arange(plus + 3, plus + 7, device=i.device).repeat(batch_size, 1)
        equals, end, ask, answer = marks.split(1, dim=1)
        asked = problem[:, :, 0].gather(1, level - 1)
        order = torch.rand(batch_size, S, **source).argsort(dim=1)[..., None].expand_as(problem)
        variable, left, operator, right = problem.gather(1, order).unbind(-1)
        statement = variable, equals.expand(-1, S), left, operator, right, end.expand(-1, S)
        parts = [torch.stack(statement, dim=-1).flatten(1), torch.cat([ask, asked], dim=1)]
        tokens = torch.cat([*parts[::-1 if self.question == "first" else 1], answer], dim=1)
        targets = torch.full_like(tokens, IGNORE)
        targets[:, -1:] = values.gather(1, asked)
        return tokens, targets

    def solution(self, words):
        means = {words[i - 1]: words[i + 1:i + 4] for i, x in enumerate(words) if x == "="}
        values = {}

        def value(word):
            if word not in means:
                return int(word)
            left, operator, right = means[word]
            u, v = value(left), value(right)
            values[word] = {"+": u + v, "-": u - v, "*": u * v}[operator] % self.modulus
            return values[word]

        value(words[words.index("?") + 1])
        for word, x in values.items():  # the last is the answer
            yield f"{word} = {' '.join(means[word])} = {x}"


TASKS = {"rule110": Rule110, "depo": Depo, "gsm": GSM}

if __name__ == "__main__":
    print(*(task(**task.shown).show() for task in TASKS.values()), sep="\n\n")
