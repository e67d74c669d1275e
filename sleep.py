"""Language models need sleep (arXiv 2605.26099): the sleep loop, Algorithm 1, reading as a stream.

A hybrid of attention and SSM blocks has two memories. The *cache* is short-term: the keys and
values of attention and the latest inputs of the SSM blocks' convolutions. It grows with every
token, and it is evicted every L tokens. The *fast weights* S of the SSM blocks are long-term: their
size is fixed, and they survive. Just before the cache goes, the model sleeps: it runs N passes over
the tokens of the window, and each pass refines S. Nothing else changes: answering later is one
ordinary forward pass. N = 1 is the plain hybrid; the code has no special case for it.

Letters, here and in model.py (the code's name in parentheses where it differs):
    B  batch                          d  width (d_model)                N  passes asleep (loops)
    T  tokens in a sequence           H  heads (n_head)                 S  fast weights of a block
    L  tokens in a window (window)    K, V  size of a key, of a value   h  hidden states (B, L, d)
    C  keys and values in the cache
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from model import Cache, Hybrid, Memory

IGNORE = -100  # the target of a token that is not scored, as F.cross_entropy has it


def passes(model: Hybrid, tokens: Tensor, memory: Memory, loops: int, *,
           need_h: bool = True) -> tuple[Tensor | None, Memory]:
    """N = loops passes over one window: tokens (B, L) -> h (B, L, d), memory after the final pass.

    memory is that from before the window. h and S go on from pass to pass. Each pass makes the
    window's keys and values anew and reads them beside those kept from earlier windows. The prelude
    and the coda are blocks that run once; by default there are none, and the core is all blocks.
    need_h = False: the final h is not needed; the last block leaves it out, and it is None.
    Raises ValueError if loops is no whole number from 1 on.
    """
    check_loops(loops)
    h, memory = model.prelude(model.embed(tokens), memory)
    S = memory.S
    for n in range(loops):
        h, after = model.core(h, Memory(memory.cache, S), need_h or n < loops - 1)  # Eq. (6)
        S = after.S
    return model.coda(h, after, need_h)


def check_loops(loops: int):
    if not hasattr(loops, "__index__") or loops < 1:
        raise ValueError(f"loops {loops}: must be a whole number, at least 1")


def wake(model: Hybrid, tokens: Tensor, memory: Memory) -> tuple[Tensor, Memory]:
    """Read: tokens (B, L) -> logits (B, L, vocabulary) and the memory after it. One ordinary pass.

    A window may be read in pieces. To train, read it at once: hard eviction detaches the cache.
    """
    h, memory = passes(model, tokens, memory, 1)
    return model.unembed(h), memory


def sleep(model: Hybrid, tokens: Tensor, memory: Memory, loops: int) -> Memory:
    """N = loops passes over one window (Eq. 6), before its cache is evicted: only memory remains.

    tokens (B, L) are the window's; memory is that of the window's start, not what reading it
    awake has made of S since. That S is provisional; for N = 1 a sleep computes it again, up to
    rounding. h is dropped. So S (and what `evict` keeps of the cache) is the only road from this
    window to the future, and the only road for gradients back into it.
    """
    return passes(model, tokens, memory, loops, need_h=False)[1]  # Choice: start of sleep


def evict(memory: Memory, keep: int | None = 0) -> Memory:
    """Drop all but the latest `keep` tokens from the cache; None: drop nothing.

    0 is hard eviction: only S remains. L - 1 is the sliding window: the next pass sees those tokens
    beside its own L, and the convolutions keep their latest inputs.
    """
    if keep is None:
        return memory
    if keep == 0:
        return memory._replace(cache=(None,) * len(memory.cache))
    return memory._replace(cache=tuple(  # clones: a view would hold on to what is dropped
        Cache(*(x[:, :, -keep:].clone() for x in entry)) if isinstance(entry, Cache) else entry
        for entry in memory.cache))


class Window(NamedTuple):
    """The tokens from start to stop - 1 of every sequence."""
    start: int
    stop: int
    scored: bool  # True: some token is scored, a prediction window. False: a consolidation window


def cut(targets: Tensor, length: int) -> list[Window]:
    """Cut targets (B, T), IGNORE where not scored, into windows of at most `length` tokens.

    A task's windows are of one kind in every batch. So training calls this once, and no step waits
    for the device to tell which window is scored.
    """
    scored = (targets != IGNORE).any(0).tolist()
    starts = range(0, len(scored), length)
    return [Window(i, min(i + length, len(scored)), any(scored[i:i + length])) for i in starts]


def algorithm1(model: Hybrid, tokens: Tensor, targets: Tensor, loops: int,
               windows: list[Window] | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Algorithm 1: read window by window, asleep where nothing is scored, awake where it is.

    tokens, targets (B, T), targets IGNORE where not scored; windows = cut(targets, L), once for all
    batches. Returns the mean cross-entropy of the scored tokens, and for the P tokens of all
    prediction windows the logits (B, P, vocabulary) and the targets (B, P). Backpropagation goes
    through everything. Raises ValueError if the sizes do not match or nothing is scored.
    """
    if not tokens.numel() or tokens.shape != targets.shape:
        raise ValueError(f"targets {tuple(targets.shape)}: must have the shape of the tokens, "
                         f"{tuple(tokens.shape)}, and one token at least")
    memory, scores = model.empty_memory(len(tokens)), []         # Alg. 1: S = 0
    windows = windows or cut(targets, model.config.window)       # Alg. 1: windows
    if windows[-1].stop != tokens.shape[1] or not any(window.scored for window in windows):
        raise ValueError(f"windows {windows}: must end with the {tokens.shape[1]} tokens, and some "
                         "token must be scored")
    for start, stop, scored in windows:
        if scored:
            logits, memory = wake(model, tokens[:, start:stop], memory)  # Alg. 1: prediction
            scores.append((logits, targets[:, start:stop]))
        else:
            memory = sleep(model, tokens[:, start:stop], memory, loops)  # Alg. 1: consolidation
        memory = evict(memory, model.config.keep)                # Alg. 1: eviction
    logits, labels = (torch.cat(parts, dim=1) for parts in zip(*scores))
    loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten())  # Alg. 1: loss
    return loss, logits, labels


class Stream:
    """Read one token at a time, as a model in use does; every full window ends in a sleep.

    A token costs one single-token pass, whatever N is. Between tokens the stream holds the window's
    tokens and two memories, the provisional one and that of the window's start: bounded, however
    long the text, except with eviction none. The logits are those of `algorithm1` up to
    rounding as long as only the last window is scored: training does not sleep on a scored window
    in the middle, but a stream, which cannot know, does. Raises ValueError if loops or batch_size
    is less than 1.
    """

    def __init__(self, model: Hybrid, loops: int, batch_size: int = 1):
        check_loops(loops)
        if batch_size < 1:
            raise ValueError(f"batch_size {batch_size}: must be at least 1")
        self.model, self.loops, self.batch_size = model, loops, batch_size
        with torch.no_grad():  # start: when the window began
            self.start = self.memory = model.empty_memory(batch_size)
        self.tokens: list[Tensor] = []  # those of the window so far, each (B,)

    @torch.no_grad()
    def feed(self, token: Tensor) -> Tensor:
        """token (B,) -> logits (B, vocabulary) for the next one; sleeps if the window is full.

        Raises ValueError if it is not batch_size tokens of the vocabulary.
        """
        c = self.model.config
        if token.shape != (self.batch_size,) or not ((0 <= token) & (token < c.vocab_size)).all():
            raise ValueError(f"token {token.tolist()}: must be (batch_size,) = ({self.batch_size},)"
                             f" whole numbers from 0 to {c.vocab_size - 1}")
        logits, memory = wake(self.model, token[:, None], self.memory)
        if c.eviction == "sliding":  # a sliding window slides with every token
            memory = evict(memory, c.keep)
        start, tokens = self.start, [*self.tokens, token.clone()]
        if len(tokens) == c.window:
            slept = sleep(self.model, torch.stack(tokens, dim=1), start, self.loops)
            start, tokens = evict(slept, c.keep), []
            memory = start
        self.start, self.memory, self.tokens = start, memory, tokens  # only once all is computed
        return logits[:, -1]

    def bytes(self) -> dict[str, int]:
        """Bytes held between two tokens: both memories' cache and S, and the window's tokens."""
        held = [self.start] if self.memory is self.start else [self.start, self.memory]
        return {"cache": sum(memory.bytes()["cache"] for memory in held),
                "S": sum(memory.bytes()["S"] for memory in held),
                "tokens": sum(token.nbytes for token in self.tokens)}
