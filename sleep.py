"""Language models need sleep (arXiv 2605.26099): the sleep loop, Algorithm 1, reading as a stream.

A model with attention and SSM blocks has two memories. The *cache* (keys and values of attention)
is short-term: it grows with every token and is evicted every L tokens. The *fast weights* S of the
SSM blocks are long-term: their size is fixed and they survive. Just before the cache goes, the
model sleeps: it runs N passes over the window it still remembers, and each pass refines S. Nothing
else changes; answering later is one ordinary forward pass. N = 1 is the plain hybrid, and no
special case below.

Letters, here and in model.py (code name in parentheses where it differs):
    B  batch                          d  width (d_model)                N  passes asleep (loops)
    T  tokens in a sequence           H  heads (n_head)                 S  fast weights of a block
    L  tokens in a window (window)    K, V  size of a key, of a value   h  hidden states (B, L, d)
    C  keys and values in the cache
"""

import os
import sys
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from model import Cache, Hybrid, Memory


def passes(model: Hybrid, tokens: Tensor, memory: Memory, loops: int, *,
           need_h: bool = True) -> tuple[Tensor | None, Memory]:
    """`loops` passes over one window: tokens (B, L) -> h (B, L, d) and the memory after the last.

    memory is what held before the window. h and S go on from pass to pass; keys and values are made
    anew in each, beside those kept from earlier windows. Only the blocks i to j - 1 of loop_blocks,
    by default all, are looped; those before and after them run once. need_h = False saves the last
    block the work on a last h that nobody needs; it is None then. Raises ValueError if loops is no
    whole number from 1 on.
    """
    check_loops(loops)
    c, (i, j), end = model.config, model.config.core, len(model.config.layout)
    first, prelude = model.blocks(model.embed(tokens), memory, 0, i)  # nothing more, by default
    h, after = first, prelude
    for n in range(loops):
        h = h if c.carry == "h" else first
        S = after.S if c.carry_S else prelude.S
        h, after = model.blocks(h, Memory(prelude.cache, S), i, j,  # Eq. (6)
                                need_h=need_h or n < loops - 1 or j < end)
    return model.blocks(h, after, j, end, need_h=need_h)              # nothing, by default


def check_loops(loops: int):
    if not isinstance(loops, int) or loops < 1:
        raise ValueError(f"loops {loops}: must be a whole number, at least 1")


def wake(model: Hybrid, tokens: Tensor, memory: Memory, loops: int = 1) -> tuple[Tensor, Memory]:
    """Read: tokens (B, L) -> logits (B, L, vocabulary) and the memory after it. One ordinary pass.

    A window may be read in pieces, but for a model with positions in the window. loops > 1 is for
    the comparison that spends the passes awake (sleep_at = "wake", carry_S = False: the S that a
    pass leaves has read answers that the next one must not see).
    """
    h, memory = passes(model, tokens, memory, loops)
    return model.unembed(h), memory


def sleep(model: Hybrid, tokens: Tensor, memory: Memory, loops: int) -> Memory:
    """N = loops passes over one window (Eq. 6), before its cache is evicted: only memory remains.

    tokens (B, L) is the window; memory is what held when the window began, not what reading it
    awake has made of S since. That S is provisional, and for N = 1 computed again, to rounding.
    h is dropped, so that S (and what `evict` keeps of the cache) is the only road from this window
    to the future, and for gradients back into it.
    """
    return passes(model, tokens, memory, loops, need_h=False)[1]  # Choice: start of sleep


def evict(memory: Memory, keep: int | None = 0) -> Memory:
    """Drop all but the latest `keep` tokens from the cache; None: drop nothing.

    0 is hard eviction: only S remains. L - 1 is the sliding window: the next pass sees those tokens
    beside its own L, and the tails of the convolutions stay too.
    """
    if keep is None:
        return memory
    if keep == 0:
        return memory._replace(cache=(None,) * len(memory.cache))
    return memory._replace(cache=tuple(  # clones: a view would hold on to what is dropped
        Cache(*(x[:, :, -keep:].clone() for x in entry)) if isinstance(entry, Cache) else entry
        for entry in memory.cache))


class Window(NamedTuple):
    start: int
    stop: int
    scored: bool  # True: some token is scored, a prediction window. False: a consolidation window


def cut(targets: Tensor, length: int) -> list[Window]:
    """Cut targets (B, T), -100 where not scored, into windows of at most `length` tokens.

    A task's layout is fixed, so a window's kind is one for the whole batch and for every batch:
    training calls this once, and no step waits for the device to learn which window is scored.
    """
    scored = (targets != -100).any(0).tolist()
    starts = range(0, len(scored), length)
    return [Window(i, min(i + length, len(scored)), any(scored[i:i + length])) for i in starts]


def algorithm1(model: Hybrid, tokens: Tensor, targets: Tensor, loops: int,
               windows: list[Window] | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Algorithm 1: read window by window, asleep where nothing is scored, awake where it is.

    tokens, targets (B, T), targets -100 where not scored; windows = cut(targets, L), once for all
    batches. Returns the mean cross-entropy of the scored tokens, and for the P tokens of all
    prediction windows the logits (B, P, vocabulary) and targets (B, P). Backpropagation goes
    through everything. Raises ValueError if the sizes do not match or nothing is scored.
    """
    if not tokens.numel() or tokens.shape != targets.shape:
        raise ValueError(f"targets {tuple(targets.shape)}: must have the shape of the tokens, "
                         f"{tuple(tokens.shape)}, and one token at least")
    asleep, awake = (loops, 1) if model.config.sleep_at == "sleep" else (1, loops)
    memory, scores = model.empty_memory(len(tokens)), []         # Alg. 1: S = 0
    windows = windows or cut(targets, model.config.window)       # Alg. 1: windows
    if windows[-1].stop != tokens.shape[1] or not any(window.scored for window in windows):
        raise ValueError(f"windows {windows}: must end with the {tokens.shape[1]} tokens, and some "
                         "token must be scored")
    for start, stop, scored in windows:
        window = tokens[:, start:stop]
        if scored:
            logits, memory = wake(model, window, memory, awake)  # Alg. 1: prediction
            scores.append((logits, targets[:, start:stop]))
        else:
            memory = sleep(model, window, memory, asleep)        # Alg. 1: consolidation
        memory = evict(memory, model.config.keep)                # Alg. 1: eviction
    logits, labels = (torch.cat(parts, dim=1) for parts in zip(*scores))
    loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten())  # Alg. 1: loss
    return loss, logits, labels


class Stream:
    """Read one token at a time, as a model in use does; every full window ends in a sleep.

    A token costs one single-token pass, whatever N is. Between tokens the stream holds the window's
    tokens and two memories, the provisional one and that of the window's start: bounded, however
    long the text, unless nothing is ever evicted. The logits are those of `algorithm1` to rounding
    as long as only the last window is scored: training only wakes for a scored window in the
    middle, while a stream, which cannot know, also sleeps on it. Raises ValueError if loops or
    batch_size is less than 1, if the model spends its passes awake, where each would need a cache
    of its own, or if it has positions in the window, which a token by itself does not tell.
    """

    def __init__(self, model: Hybrid, loops: int, batch_size: int = 1):
        check_loops(loops)
        if batch_size < 1:
            raise ValueError(f"batch_size {batch_size}: must be at least 1")
        if model.config.sleep_at == "wake" and loops > 1:
            raise ValueError(f"loops {loops}: must be 1 to stream a model with sleep_at wake")
        if model.config.position != "none":
            raise ValueError(f"position {model.config.position}: must be none to stream")
        self.model, self.loops, self.batch_size = model, loops, batch_size
        with torch.no_grad():  # start: when the window began
            self.start = self.memory = model.empty_memory(batch_size)
        self.window: list[Tensor] = []  # its tokens so far, each (B,)

    @torch.no_grad()
    def feed(self, token: Tensor) -> Tensor:
        """token (B,) -> logits (B, vocabulary) for the next one; sleeps if the window is full.

        Raises ValueError if it is not batch_size tokens of the vocabulary.
        """
        keep, words = self.model.config.keep, self.model.config.vocab_size
        if token.shape != (self.batch_size,) or not ((0 <= token) & (token < words)).all():
            raise ValueError(f"token {token.tolist()}: must be (batch_size,) = ({self.batch_size},)"
                             f" whole numbers from 0 to {words - 1}")
        logits, self.memory = wake(self.model, token[:, None], self.memory)
        if keep:  # a sliding window slides with every token
            self.memory = evict(self.memory, keep)
        self.window.append(token.clone())
        if len(self.window) == self.model.config.window:
            slept = sleep(self.model, torch.stack(self.window, dim=1), self.start, self.loops)
            self.start = self.memory = evict(slept, keep)
            self.window = []
        return logits[:, -1]

    def bytes(self) -> dict[str, int]:
        """Bytes held between two tokens, by the provisional memory and the one at the start."""
        held = [self.start.bytes()] + [self.memory.bytes()] * (self.memory is not self.start)
        return {"cache": sum(memory["cache"] for memory in held),
                "S": sum(memory["S"] for memory in held),
                "tokens": sum(token.nbytes for token in self.window)}


# ----------------------------------------------------------------------- to watch: python sleep.py

@torch.no_grad()
def night(argv: list[str]):
    """Print how a trained model reads a held-out sequence, sleeps on it, forgets it and answers.

    Behind each pass stands what it would answer at the end, had that night ended there: from a copy
    of the memory, with all other nights as they are. The run itself goes on undisturbed.
    """
    from train import Halt, Parser, load, reading, windows_of  # nothing above knows of a run
    parser = Parser(prog="sleep.py", description="Watch a trained model read, sleep and answer.")
    parser.add_argument("run", nargs="?", type=Path, help="a run's folder, for its largest N, or a "
                        "checkpoint N*.pt; default: the newest run under out/")
    path = parser.parse_args(argv).run or max(
        Path("out").rglob("N*.pt"), key=os.path.getmtime, default=Path("out/none")).parent
    path = max(path.glob("N*.pt"), key=lambda file: (len(file.stem), file.stem), default=path)
    if not path.is_file():
        raise Halt(2, f"error: {path}: must hold a checkpoint N*.pt; python train.py makes one")
    with reading(path, "a checkpoint that this train.py made"):
        task, model, loops = load(path)
    random, L, keep = torch.Generator().manual_seed(0), model.config.window, model.config.keep
    tokens, targets = task.batch(1, random, "held-out", task.levels[-1])
    *asleep, (asked, _, _) = windows = windows_of(task, L)
    labels, logits = targets[targets >= 0], []
    try:
        stream = Stream(model, loops)
        if any(window.scored for window in asleep):
            raise ValueError(f"window {L}: must leave all that is scored to one window, to stream")
    except ValueError as error:
        raise Halt(2, f"error: {path}: {error}") from None

    def answers(logits: Tensor) -> str:
        """The first 4 answers, their probabilities, and which are wrong: logits (1, P, ...)."""
        p, words = logits[0, targets[0, asked:] >= 0].softmax(-1).max(-1)
        return ", ".join(f"{task.words[word]} {x:.2f}" + " (no)" * bool(word != label)
                         for x, word, label in zip(p[:4], words, labels))

    def held(memory: Memory) -> str:
        entries = max((x.k.shape[2] for x in memory.cache if isinstance(x, Cache)), default=0)
        return "cache {} entries, {cache:,} bytes; S {S:,} bytes".format(entries, **memory.bytes())

    print(f"run       {path}, N = {loops}\ntask      {task.title()}")
    for number, (start, stop, scored) in enumerate(windows, 1):
        window, begun, line = tokens[:, start:stop], stream.start, min(8, -(-L // 4))
        for i, token in enumerate(window.T, 1):
            logits.append(stream.feed(token))
            if i % line == 0 or i == stop - start:
                memory = stream.memory
                if i == L:  # as it was before the sleep
                    memory = evict(wake(model, window, begun)[1], keep or None)
                words = " ".join(task.words[x] for x in window[0, (i - 1) // line * line:i])
                print(f"window {number}  reads {words} -> {held(memory)}")
        memory = begun
        for n in range(0 if scored else loops + 1):
            before, memory = memory, sleep(model, window, begun, n) if n else begun
            moves = "".join(f" {(S - old).norm() / S.norm():.2f}"  # of each SSM block
                            for old, S in zip(before.S, memory.S) if n and S is not None)
            end = evict(memory, keep)
            for later, until, _ in asleep[number:]:
                end = evict(sleep(model, tokens[:, later:until], end, loops), keep)
            end = wake(model, tokens[:, asked:], end)[0]
            print(f"night {number}   pass {n}" + f", S moves{moves}" * bool(moves)
                  + f" -> would say {answers(end)}")
        if not scored:
            print(f"night {number}   over -> {held(stream.start)}")
    print(f"answers   {answers(torch.stack(logits[asked:], dim=1))}\n"
          f"truth     {', '.join(task.words[label] for label in labels[:4])}")


if __name__ == "__main__":
    from train import in_one_line
    sys.exit(in_one_line("sleep.py", night, sys.argv[1:]))
