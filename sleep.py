"""Language models need sleep (arXiv 2605.26099): the sleep loop, Algorithm 1 and a token-by-token reader.

A model with attention and SSM blocks has two memories. The *cache* (keys and values of attention) is
short-term: it grows with every token and is evicted every L tokens. The *fast weights* S of the SSM
blocks are long-term: their size is fixed and they survive. Just before the cache goes, the model sleeps:
it runs N passes over the window it still remembers, and each pass refines S. Nothing else changes;
answering later is one ordinary forward pass. With N = 1 this is the plain hybrid: no special case below.

Letters, here and in model.py (code name in parentheses where it differs):
    B  batch                          D  number of blocks (len(layout))   N  passes asleep (loops)
    T  tokens in a sequence           d  width (d_model)                  S  fast weights of a block
    L  tokens in a window (window)    H  heads (n_head)                   h  hidden states (B, L, d)
    C  keys and values in the cache   K, V  size of a key, of a value
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Cache(NamedTuple):
    """Short-term memory of one attention block: what it has seen since the last eviction."""
    k: Tensor  # (B, H, C, K)
    v: Tensor  # (B, H, C, V)


class Memory(NamedTuple):
    """All that a model remembers. Each tuple has D entries, None where a block has no such memory."""
    cache: tuple[Cache | None, ...]  # attention blocks: short-term, grows to L, evicted
    S: tuple[Tensor | None, ...]     # SSM blocks: fast weights (B, H, V, K), fixed size, kept

    def bytes(self) -> dict[str, int]:
        """Bytes held at this moment by each of the two memories."""
        kept = [t for cache in self.cache if cache is not None for t in cache]
        return {"cache": sum(t.nbytes for t in kept),
                "S": sum(S.nbytes for S in self.S if S is not None)}


def wake(model, tokens: Tensor, memory: Memory) -> tuple[Tensor, Memory]:
    """One ordinary forward pass: tokens (B, L) -> logits (B, L, vocabulary) and the grown memory."""
    h, memory = model.blocks(model.embed(tokens), memory)
    return model.unembed(h), memory


def sleep(model, tokens: Tensor, memory: Memory, loops: int) -> Memory:
    """N = loops passes over one window (Eq. 6), before its cache is evicted.

    tokens (B, L) is the window and memory what held when the window began, not what reading it awake has
    made of S since: that S is provisional, and for N = 1 this function computes it again exactly.
    h and S go on from pass to pass, keys and values are made anew in each. What is dropped at the end is
    h, so S is the only road from this window to the future, and the only road for gradients back to it.
    """
    h, (cache, S) = model.embed(tokens), memory  # Choice: sleep starts from the S at the window's start
    for _ in range(loops):
        h, after = model.blocks(h, Memory(cache, S))  # Eq. (6)
        S = after.S
    return after


def evict(memory: Memory) -> Memory:
    """Hard eviction: the whole cache goes, only S crosses the window's boundary (Sec. 3, Alg. 1)."""
    return memory._replace(cache=(None,) * len(memory.cache))


class Window(NamedTuple):
    start: int
    stop: int
    scored: bool  # True: some token is scored, a prediction window. False: a consolidation window


def cut(targets: Tensor, length: int) -> list[Window]:
    """Cut targets (B, T), -100 where not scored, into windows of at most `length` tokens.

    A task's layout is fixed, so a window's kind is one for the whole batch and for every batch: training
    calls this once, and no step has to wait for the device to learn which window is scored.
    """
    scored = (targets != -100).any(0).tolist()
    starts = range(0, len(scored), length)
    return [Window(i, min(i + length, len(scored)), any(scored[i:i + length])) for i in starts]


def algorithm1(model, tokens: Tensor, targets: Tensor, loops: int, windows: list[Window] | None = None):
    """Algorithm 1: read sequences window by window, asleep where nothing is asked, awake where it is.

    tokens, targets (B, T), targets -100 where not scored; windows = cut(targets, L), once for all batches.
    Returns the mean cross-entropy of the scored tokens, and for the P tokens of all prediction windows
    the logits (B, P, vocabulary) and targets (B, P). Backpropagation goes through everything.
    """
    memory = model.empty_memory(len(tokens))                             # Alg. 1: S = 0
    asked = []
    for start, stop, scored in windows or cut(targets, model.config.window):  # Alg. 1: windows
        window = tokens[:, start:stop]
        if scored:
            logits, memory = wake(model, window, memory)                 # Alg. 1: prediction
            asked.append((logits, targets[:, start:stop]))
        else:
            memory = sleep(model, window, memory, loops)                 # Alg. 1: consolidation
        memory = evict(memory)                                           # Alg. 1: eviction
    logits, labels = (torch.cat(parts, dim=1) for parts in zip(*asked))
    loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten())  # Alg. 1: loss
    return loss, logits, labels


class Stream:
    """Read one token at a time, as a model in use does: every window full of tokens ends in a sleep.

    Each token costs one single-token pass, whatever N is, and memory never exceeds one window's cache plus
    S, however long the text. The logits are those of `algorithm1` to rounding, as long as no window that
    is asked a question is followed by another: training wakes for such a window, a stream sleeps on it.
    """

    def __init__(self, model, loops: int, batch_size: int = 1):
        self.model, self.loops = model, loops
        self.start = self.memory = model.empty_memory(batch_size)  # start: held when the window began
        self.window: list[Tensor] = []                             # its tokens so far, each (B,)

    @torch.no_grad()
    def feed(self, token: Tensor) -> Tensor:
        """token (B,) -> logits (B, vocabulary) for the token after it; then sleeps if the window is full."""
        logits, self.memory = wake(self.model, token[:, None], self.memory)
        self.window.append(token)
        if len(self.window) == self.model.config.window:
            slept = sleep(self.model, torch.stack(self.window, dim=1), self.start, self.loops)
            self.start = self.memory = evict(slept)
            self.window = []
        return logits[:, -1]
