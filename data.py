"""The tasks. `python data.py` prints a worked example of each.

A task is a small class: batch(batch_size, random, split, level) -> tokens, targets; title() and
show(). levels are the difficulties that evaluation reports one by one; level = None is the
training mixture. No target before scored_from is ever scored. An instance belongs to the train or
to the held-out split by a hash of itself, so that evaluation is on instances never trained on.
"""

import numpy as np
import torch
from torch import Tensor

IGNORE = -100  # target of a token that is not scored, as F.cross_entropy has it
HELD_OUT = 8   # one instance in so many is held out
FLOOR = 3      # the stream of random numbers that floors are counted on
SPLITS = {"train": False, "held-out": True}


def generator(seed: int, stream: int, index: int = 0, device="cpu") -> torch.Generator:
    """A random generator of its own for every (seed, stream, index), so that none disturbs another.

    The CPU generator keeps only the low 32 bits of a seed, hence one well-mixed 32-bit word.
    """
    word = np.random.SeedSequence([seed, stream, index]).generate_state(1)[0]
    return torch.Generator(device).manual_seed(int(word))


def rule110(state: Tensor, steps: int, rule: int = 110) -> Tensor:
    """`steps` steps of a cellular automaton on a ring: integers 0/1 (..., cells) -> the same.

    The new cell is bit 4 left + 2 self + right of `rule`. With cells fixed at the ends, not on a
    ring, the first one would become constant and the task trivial.
    """
    dtype, state = state.dtype, state.byte()
    for _ in range(steps):
        neighbours = 4 * state.roll(1, -1) + 2 * state + state.roll(-1, -1)
        state = rule >> neighbours & 1  # Choice: periodic ring
    return state.to(dtype)


def check(name: str, value: int, low: int, high: int | None = None):
    """Raises ValueError, in one line that begins with the name, if value is out of bounds."""
    if value < low or high is not None and value > high:
        bounds = f"at least {low}" if high is None else f"from {low} to {high}"
        raise ValueError(f"{name} {value}: must be {bounds}")


def in_held_out(integers: Tensor) -> Tensor:
    """Which instances (..., size) are held out: about one in HELD_OUT, by a hash. -> bool (...)

    The integers are a polynomial's coefficients modulo 2^64, at a large odd point, and the sum is
    mixed once. They must be the same for all shufflings of one instance.
    """
    powers = [pow(6364136223846793005, i, 2**64) for i in range(1, integers.shape[-1] + 1)]
    weights = torch.from_numpy(np.array(powers, dtype=np.uint64).view(np.int64))
    x = (integers.long() * weights.to(integers.device)).sum(-1)
    x = (x ^ x >> 31) * 0x1CE4E5B9BF58476D
    return (x >> 40) % HELD_OUT == 0  # Choice: held-out states


def sample(given: Tensor, draw, held_out, split: str) -> Tensor:
    """draw(given (n, ...)) -> n instances, and again those that are not of the split."""
    instances, wrong = draw(given), torch.arange(len(given), device=given.device)
    while len(wrong := wrong[held_out(instances[wrong], given[wrong]) != SPLITS[split]]):
        instances[wrong] = draw(given[wrong])
    return instances


def floor(task, level: int | None = None) -> float:
    """Exact accuracy of always giving the same answer, the most frequent one; it takes no learning.

    Counted, in fixed held-out sequences: in few where no answer comes often. An answer is all that
    is scored in a sequence, in its order; the sequence that it is taken from does not count.
    """
    for size in (2**12, 2**16):
        targets = task.batch(size, generator(0, FLOOR), "held-out", level)[1]
        scored = (targets == IGNORE).byte().argsort(dim=1, stable=True)  # they come first
        answers = targets.gather(1, scored)[:, :(targets != IGNORE).sum(1).max()]
        share = (answers.unique(dim=0, return_counts=True)[1].max().item() - 1) / (size - 1)
        if share < 0.01:
            break
    return share


def example(task, level: int | None = None) -> tuple[list[str], list[str]]:
    """A sequence as words, and the first lines of show(): title, then window, token and target."""
    tokens, targets = (x[0].tolist() for x in task.batch(1, generator(0, 0), level=level))
    words = [task.words[x] for x in tokens]
    rows = {"window": [str(i // task.window + 1) for i in range(task.length)], "tokens": words,
            "targets": ["." if x == IGNORE else task.words[x] for x in targets]}
    width = max(map(len, rows["window"] + words))
    lines = [f"{name:8}" + " ".join(f"{cell:{width}}" for cell in row).rstrip()
             for name, row in rows.items()]
    return words, [f"{task.title()}; floor {floor(task):.2%}", *lines]


# ----------------------------------------------------------------------------------------- Rule 110

class Rule110:
    """Rule 110 (Sec. 4, Fig. 2): unrelated states in a row, then the first bit of each, t steps on.

    With 4 cells, 2 states and t = 2 (0100 -> 1100 -> 1101, 0111 -> 1101 -> 0111), windows L = 4:

        window     1 1 1 1   2 2 2 2   3 3
        tokens     0 1 0 0   0 1 1 1   ? 1
        targets    . . . .   . . . .   1 0

    The prediction window's inputs are the query and all answers but the last, so that no answer is
    predicted inside a consolidation window.
    """
    words = "01?"  # the vocabulary: 0, 1 and the query
    QUERY, vocab_size = 2, 3
    MOST_STEPS = 10_000

    def __init__(self, cells: int = 12, states: int = 2, t: int = 4, automaton: int = 110):
        check("cells", cells, 3)
        check("states", states, 1)
        check("t", t, 0, self.MOST_STEPS)
        check("automaton", automaton, 0, 255)
        self.cells, self.states, self.t, self.automaton = cells, states, t, automaton
        self.levels = (t,)
        self.window = cells                 # L: the model sees one state at a time
        self.length = states * (cells + 1)  # T
        self.scored_from = self.length - states

    def batch(self, batch_size: int, random: torch.Generator, split: str = "train",
              level: int | None = None) -> tuple[Tensor, Tensor]:
        """tokens, targets: int64 (B, T) on the device of `random`. split: "train" or "held-out".
        level: another t."""
        device, t = random.device, self.t if level is None else level
        check("level", t, 0, self.MOST_STEPS)

        def draw(given):
            return torch.randint(2, (len(given), self.cells), generator=random, device=device)

        state = sample(torch.empty(batch_size * self.states, 0, device=device), draw,
                       lambda state, _: in_held_out(state), split)
        answers = rule110(state, t, self.automaton)[:, 0].view(batch_size, self.states)
        query = torch.full((batch_size, 1), self.QUERY, device=device)
        tokens = torch.cat([state.view(batch_size, -1), query, answers[:, :-1]],
                           dim=1)  # Choice: label slots
        targets = torch.full_like(tokens, IGNORE)
        targets[:, -self.states:] = answers
        return tokens, targets

    def title(self) -> str:
        return (f"rule {self.automaton}: the first bit of each of {self.states} states of "
                f"{self.cells} cells after t = {self.t} steps")

    def show(self) -> str:
        """One worked example: the tokens as the model reads them, and how the answers arise."""
        words, lines = example(self)
        for i in range(self.states):
            state = torch.tensor(list(map(int, words[i * self.cells:(i + 1) * self.cells])))
            steps = ["".join(map(str, rule110(state, s, self.automaton).tolist()))
                     for s in range(self.t + 1)]
            shown = steps if len(steps) <= 6 else steps[:2] + ["..."] + steps[-1:]
            lines.append(f"state {i + 1}: {' -> '.join(shown)}, first bit {steps[-1][0]}")
        return "\n".join(lines)


# --------------------------------------------------------------------------------------------- Depo

class Depo:
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
    fixed level it is nodes. Questions start at distinct nodes: min(n, questions) of them are asked.
    """

    def __init__(self, nodes: int = 75, hops: int = 16, questions: int = 10, names: int = 50,
                 window: int | None = None):
        check("names", names, 2, 1000)
        check("nodes", nodes, 3, names + names**2)
        check("hops", hops, 1)
        check("questions", questions, 1, nodes)
        self.nodes, self.hops, self.questions, self.names = nodes, hops, questions, names
        self.window = nodes if window is None else window  # L: None: the graph spans 4 windows
        check("window", self.window, 1)
        self.length = 4 * nodes + 6 * questions            # T
        self.scored_from = 4 * nodes + 1                   # behind a hop and a name's only token
        self.levels = tuple(2**i for i in range(hops.bit_length()))
        self.words = ([f"{i}-" for i in range(names)] + [f"{i}" for i in range(names)]
                      + [f"k{k + 1}" for k in range(hops)] + ["=", "_"])
        self.vocab_size = len(self.words)
        self.ANSWER, self.PAD = self.vocab_size - 2, self.vocab_size - 1

    def sizes(self, level: int | None = None) -> np.ndarray:
        """P(the cycle has n nodes), n = 0, ..., nodes."""
        n = np.arange(self.nodes + 1)
        weights = n == self.nodes if level else (n >= 3) / (n + self.nodes**0.5)
        return weights / weights.sum()

    def batch(self, batch_size: int, random: torch.Generator, split: str = "train",
              level: int | None = None) -> tuple[Tensor, Tensor]:
        """tokens, targets: int64 (B, T) on the device of `random`. level: hops of each question."""
        low, high = (1, self.hops) if level is None else (level, level)
        check("level", low, 1, self.hops)
        source = {"generator": random, "device": random.device}
        i, total = torch.arange(self.nodes, device=random.device), self.names + self.names**2

        def shuffle(n):  # (B, 1) -> (B, nodes): 0, ..., n - 1 in random order, then the others
            return (torch.rand(len(n), self.nodes, **source) + (i >= n)).argsort(dim=1)

        def draw(n):  # (B, 1) -> names (B, nodes), of which the first n are the cycle, in order
            # The original draws length and tokens of a name, again if it has been there. That is
            # a race of exponential clocks: half of the time some name of one token is the next.
            clocks = torch.empty(len(n), total, device=n.device).exponential_(generator=random)
            clocks[:, :self.names] /= self.names
            return clocks.topk(self.nodes, largest=False).indices.gather(1, shuffle(n))

        def after(cycle, n):
            return cycle.gather(1, (i + 1) % n)

        def held_out(cycle, n):  # the sorted edges are the same from wherever the cycle starts
            edges = torch.where(i < n, cycle * total + after(cycle, n), -1)
            return in_held_out(edges.sort(dim=1).values)  # Choice: held-out cycles

        def spell(name):  # (...) -> tokens (..., 2), the first of them padding for a short name
            first = torch.where(name < self.names, self.PAD, name // self.names - 1)
            return torch.stack([first, self.names + name % self.names], dim=-1)

        def lay(rows, n):  # (B, rows, slots) -> (B, rows * slots): padding instead of rows from n
            return rows.masked_fill((i[:rows.shape[1]] >= n)[..., None], self.PAD).flatten(1)

        sizes = torch.tensor(self.sizes(level), device=random.device)
        n = sizes.multinomial(batch_size, replacement=True, generator=random)[:, None]
        cycle = sample(n, draw, held_out, split)
        order = shuffle(n)
        ends = cycle.gather(1, order), after(cycle, n).gather(1, order)
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

    def title(self) -> str:
        return (f"depo: {self.questions} questions, 1 to {self.hops} hops on, "
                f"about a cycle of up to {self.nodes} nodes")

    def show(self) -> str:
        """One worked example: the tokens as the model reads them, and the walk to each answer."""
        words, lines = example(self)
        text = " ".join(word for word in words if word != "_").replace("- ", "-").split()
        first = next(i for i, word in enumerate(text) if word[0] == "k")
        after = dict(zip(text[:first:2], text[1:first:2]))
        for k, name, _, answer in zip(*(text[first + i::4] for i in range(4))):
            walk = [name]
            for _ in range(int(k[1:])):
                walk.append(after[walk[-1]])
            lines.append(f"{k} from {name}: {' -> '.join(walk)}, answer {answer}")
        return "\n".join(lines)


# ---------------------------------------------------------------------------------------------- GSM

class GSM:
    """The symbolic analogue of GSM-Infinite (Sec. 4, Fig. 4 and 5): arithmetic in shuffled order.

    With 2 operations, 4 statements, the question first (t = 1 + 3 = 4, d = 5 * 4 = 6 modulo 7),
    windows L = 9:

        window   1 1 1 1 1 1 1 1 1   2 2 2 2 2 2 2 2 2   3 3 3 3 3 3 3 3 3
        tokens   ? d d = 5 * t ; a   = 3 * 6 ; p = t -   d ; t = 1 + 3 ; A
        targets  . . . . . . . . .   . . . . . . . . .   . . . . . . . . 6

    Exactly `level` statements are needed, in a chain: the operands of each are the one before it
    and either a constant or the one before that, so that no step can be taken before the last one.
    The others are distractors, one half a chain like the first that shares no variable with it, the
    other half statements with operands of the first that lead nowhere. The number of statements is
    always the same: no padding, and the length does not tell the level.
    """

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
        self.vocab_size = len(self.words)

    def batch(self, batch_size: int, random: torch.Generator, split: str = "train",
              level: int | None = None) -> tuple[Tensor, Tensor]:
        """tokens, targets: int64 (B, T) on the device of `random`. level: statements needed."""
        low, high = (1, self.ops) if level is None else (level, level)
        check("level", low, 1, self.ops)
        source = {"generator": random, "device": random.device}
        S, p, plus = self.statements, self.modulus, self.modulus + self.variables
        i = torch.arange(S, device=random.device)

        def draw(level):  # (B, 1) -> (B, S, 4): variable, operand, operator, operand
            # Operands are statements before i, or -1: a constant. Three parts: the needed chain,
            # i < level; the chain apart; those that reuse what is needed.
            B = len(level)
            place = torch.where(i < level, i, i - level)  # in its chain
            reuses = i >= S - (S - level) // 2
            near, far = (torch.where(place >= back, i - back, -1) for back in (1, 2))
            needed = torch.rand(2, B, S, **source) * level
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

        def held_out(problem, level):  # by what is needed, whatever the distractors and the order
            needed = torch.where((i < level)[..., None], problem, 0)
            return in_held_out(needed.flatten(1))  # Choice: held-out problems

        level = torch.randint(low, high + 1, (batch_size, 1), **source)
        problem = sample(level, draw, held_out, split)
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

    def title(self) -> str:
        return (f"gsm: a variable that takes 1 to {self.ops} of {self.statements} statements "
                f"modulo {self.modulus}, question {self.question}")

    def show(self) -> str:
        """One worked example of the hardest kind: the tokens, and how the answer comes about."""
        words, lines = example(self, self.ops)
        start, values = 2 if self.question == "first" else 0, {}
        means = {words[i]: words[i + 2:i + 5]
                 for i in range(start, start + 6 * self.statements, 6)}

        def value(word):
            if word not in means:
                return int(word)
            left, operator, right = means[word]
            u, v = value(left), value(right)
            values[word] = {"+": u + v, "-": u - v, "*": u * v}[operator] % self.modulus
            return values[word]

        answer = value(words[words.index("?") + 1])
        lines += [f"{word} = {' '.join(means[word])} = {x}" for word, x in values.items()]
        return "\n".join([*lines, f"answer {answer}"])


TASKS = {"rule110": Rule110, "depo": Depo, "gsm": GSM}

if __name__ == "__main__":
    print(Rule110().show(),
          Depo(nodes=4, hops=3, questions=2, names=9, window=8).show(),
          GSM(ops=3, statements=6, modulus=7, window=13).show(), sep="\n\n")
