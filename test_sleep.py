"""The code against its slow, literal forms, and the READMEs against code and logs.

The literal forms are written from the formulas alone, in float64, one token at a time. They come
first; then a section for each file. Run with `pytest`.
"""

import contextlib
import inspect
import io
import json
import math
import os
import random
import re
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections import Counter
from dataclasses import FrozenInstanceError, replace
from functools import partial
from itertools import permutations, product
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

import data as data_file
import model as model_file
import sleep as sleep_file
import train
from data import GSM, TASKS, Depo, Rule110, floor, generator, in_held_out, rule110
from model import KERNELS, RULES, Cache, Config, Hybrid, Memory, attention, prepare, update
from results import bench, dream, night, reach, render, variants
from sleep import IGNORE, Stream, Window, algorithm1, cut, evict, passes, sleep, wake

HERE = Path(__file__).parent
torch.set_num_threads(1)  # the tensors are tiny: more threads only wait for each other
TINY = ("--cells 4 --t 1 --d_model 16 --n_head 2 --batch 8 --eval_size 32 --device cpu").split()
cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture(autouse=True)
def the_same_for_every_test(monkeypatch):
    # What takes long: a run's floors, here only other ones for other levels; to wait for the disk.
    monkeypatch.setattr(train, "floor", lambda task, level: 0.2 + level / 100)
    monkeypatch.setattr(os, "fsync", lambda _: None)
    torch.manual_seed(0)
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it


def hybrid(layout="asas", window=5, d_model=16, vocab_size=3, dtype="float64", **shape):
    """A small model, a variant's if one is applied; none of it is zero: nothing would show."""
    model = train.Hybrid(Config(vocab_size, window, layout, d_model, 2, dtype, **shape))
    for name, parameter in model.named_parameters():
        if name.endswith("out.weight") or name == "vectors":
            torch.nn.init.normal_(parameter, std=0.3)
    return model.to(getattr(torch, dtype))


def sequences(B=2, windows=3, window=5, rest=3, scored=2):
    """Random tokens and targets: full windows unscored, then a short one, its end scored."""
    T = windows * window + rest
    tokens = torch.randint(3, (B, T))
    targets = torch.full((B, T), IGNORE)
    targets[:, -scored:] = torch.randint(2, (B, scored))
    return tokens, targets


def apply(monkeypatch, names):
    """Makes the changes of variants, "a" or "a+b", until the test ends."""
    for name in filter(None, names.split("+")):
        for change in variants.VARIANTS[name]():
            monkeypatch.setattr(*change)


def with_gradients(outputs, inputs):
    """Outputs, then the gradients of the inputs, from the same random cotangents at each call."""
    torch.manual_seed(1)
    cotangents = [torch.randn(x.shape, device=x.device).bfloat16().to(x) for x in outputs]
    return [*outputs, *torch.autograd.grad(outputs, inputs, cotangents, allow_unused=True,
                                           materialize_grads=True)]


def assert_same_values_and_gradients(ours, literal, inputs):
    for a, b in zip(*(with_gradients(x, inputs) for x in (ours, literal)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def assert_close_to_literal(ours, literal, inputs, tolerance):
    """Values and gradients, the literal ones in float64, in their norms; NaN is never close."""
    results = []
    for function, dtype in ((ours, None), (literal, torch.float64)):
        leaves = [x.detach().to(dtype or x.dtype).requires_grad_() for x in inputs]
        results.append(with_gradients(function(*leaves), leaves))
    outputs = len(results[0]) - len(inputs)
    for i, (a, b) in enumerate(zip(*results, strict=True)):
        assert (a.double() - b).norm() <= tolerance * b.norm() + 1e-9, (
            f"output {i}" if i < outputs else f"the gradient of input {i - outputs}"
        ) + ", counted from 0, is not the literal one"


# ================================================================================ the literal forms

def literal_rule(q, k, v, log_alpha, beta, S, delta=True, decay=True):
    """Eq. (3), with the delta rule or as printed, with decay or without, one token at a time."""
    outputs = []
    for t in range(q.shape[2]):
        alpha_t = (log_alpha[:, :, t] * decay).exp()[..., None, None]
        beta_t = beta[:, :, t][..., None, None]
        k_t, v_t, q_t = (x[:, :, t, :, None] for x in (k, v, q))  # columns
        I = torch.eye(k.shape[-1]).to(S)
        S = alpha_t * S @ (I - delta * beta_t * k_t @ k_t.mT) + beta_t * v_t @ k_t.mT
        outputs.append((S @ q_t)[..., 0])
    return torch.stack(outputs, dim=2), S


LITERAL_RULES = {"gdn": literal_rule, "delta": partial(literal_rule, decay=False),
                 "mamba2": partial(literal_rule, delta=False)}


def test_every_rule_has_a_literal_form():
    """Guards a new rule: without a literal form here nothing says that it is right."""
    assert LITERAL_RULES.keys() == RULES.keys(), "name each rule in RULES and in LITERAL_RULES"


def literal_rotary(x, position):
    """x (..., size) as size/2 complex numbers, each turned by frequency times position."""
    half = x.shape[-1] // 2
    z = torch.complex(x[..., :half], x[..., half:])
    frequency = 100 ** (-torch.arange(half, dtype=x.dtype) / half)
    z = z * torch.exp(1j * position * frequency)
    return torch.cat([z.real, z.imag], dim=-1)


def literal_attention(q, k, v, first=0, span=10**9):
    """Eq. (2), a query at a time: o_t = V_t^T softmax(K_t q_t / sqrt(d)) over at most `span` keys.
    Positions count from `first`; the queries belong to the last keys."""
    outputs = []
    for t in range(k.shape[2] - q.shape[2], k.shape[2]):
        seen = range(max(0, t + 1 - span), t + 1)
        q_t = literal_rotary(q[:, :, t - k.shape[2]], first + t)
        K_t = torch.stack([literal_rotary(k[:, :, i], first + i) for i in seen], dim=2)
        weights = torch.softmax((K_t @ q_t[..., None])[..., 0] / math.sqrt(q.shape[-1]), dim=-1)
        outputs.append((v[:, :, seen[0]:t + 1].mT @ weights[..., None])[..., 0])
    return torch.stack(outputs, dim=2)


def literal_norm(x):
    return x / (x.square().mean(-1, keepdim=True) + torch.finfo(x.dtype).eps).sqrt()


def literal_conv(x, w):
    """y_t = silu(sum_i w_i x_{t-3+i}), nothing before the first x."""
    y = [sum(w[i] * x[:, t - 3 + i] for i in range(4) if t - 3 + i >= 0) for t in range(x.shape[1])]
    y = torch.stack(y, dim=1)
    return y / (1 + torch.exp(-y))


def literal_blocks(model, h, S, past, start=0, stop=None):
    """One pass of Eq. (5), or of some of its blocks, from the weights and the literal forms alone.
    past: for each block what it was given before this window: keys and values, or the inputs of its
    convolution; returned with the window's own behind."""
    c, H, S, past = model.config, model.config.n_head, list(S), list(past)
    span = 10**9 if c.eviction == "none" else c.window

    def heads(x, W):  # (B, L, d) -> (B, H, L, size)
        return (x @ W.T).unflatten(-1, (H, -1)).transpose(1, 2)

    def behind(i, *new):  # what is past, then the new, along the tokens
        past[i] = new if past[i] is None else tuple(
            torch.cat(pair, dim=-2) for pair in zip(past[i], new))
        return past[i]

    for i in range(start, len(c.layout) if stop is None else stop):
        layer = model.layers[i]
        x, mixer = literal_norm(h), layer.mixer
        if model.config.layout[i] == "a":
            q, k, v = (heads(x, W) for W in mixer.qkv.weight)  # Eq. (1)
            o = literal_attention(literal_norm(q), *behind(i, literal_norm(k), v), span=span)
        else:
            inputs = behind(i, *(x @ W.T for W in mixer.qkv.weight))
            q, k, v = (heads(literal_conv(y, w)[:, -x.shape[1]:], torch.eye(x.shape[-1]).to(x))
                       for y, w in zip(inputs, mixer.conv.weight.chunk(3, dim=1)))
            gate = heads(x, mixer.gate.weight[0])
            a, b = ((x @ W.T).transpose(1, 2) for W in mixer.ab.weight)
            dt = torch.log(1 + torch.exp(a + mixer.dt_bias[:, None]))
            q, k = q / q.norm(dim=-1, keepdim=True), k / k.norm(dim=-1, keepdim=True)
            log_alpha, beta = -mixer.A_log.exp()[:, None] * dt, 1 / (1 + torch.exp(-b))
            o, S[i] = LITERAL_RULES[c.rule](q, k, v, log_alpha, beta, S[i])
            o = literal_norm(o) * gate / (1 + torch.exp(-gate))
        h = h + o.transpose(1, 2).flatten(2) @ mixer.out.weight[0].T
        if c.layout[i] != "m":
            up = (literal_norm(h) @ layer.up.weight[0].T).clamp(min=0) ** 2
            h = h + up @ layer.down.weight[0].T
    return h, S, past


def literal_algorithm1(model, tokens, targets, loops, variant=""):
    """Algorithm 1, from the paper's words; a variant ("a", "a+b") from what it says. -> the loss"""
    c, L, B, H = model.config, model.config.window, len(tokens), model.config.n_head
    zero = torch.zeros(B, H, c.d_model // H, c.d_model // H).double()
    S, past = [None if kind == "a" else zero for kind in c.layout], [None] * len(c.layout)
    losses, (i, j), changed = [], c.looped, variant.split("+")
    while tokens.shape[1]:
        window, scored = tokens[:, :L], targets[:, :L]
        tokens, targets = tokens[:, L:], targets[:, L:]
        consolidation = (scored == IGNORE).all()
        h = model.embedding[window]
        if "position" in changed:
            h = h + model.position[:window.shape[1]]
        h, S, new_past = literal_blocks(model, h, S, past, 0, i)
        first, start, N = h, S, loops if consolidation == ("awake" not in changed) else 1
        for n in range(N):
            if "embed" in changed:
                h = first
            if "reset_S" in changed or "awake" in changed:
                S = start
            if "inject" in changed and n > 0:
                h = h + first
            if "pass_vector" in changed and n < 16:
                h = h + model.vectors[n]
            if "last_pass" in changed and 0 < n == N - 1:
                h = h.detach()
                S = [None if x is None else x + (y - x).detach() for x, y in zip(start, S)]
            h, S, new_past = literal_blocks(model, h, S, new_past[:i] + past[i:], i, j)
        h, S, past = literal_blocks(model, h, S, new_past, j)
        if c.eviction == "hard":
            past = [None] * len(c.layout)
        elif c.eviction == "sliding":
            past = [tuple(x[..., -(L - 1):, :] for x in entry) if kind == "a" else entry
                    for kind, entry in zip(c.layout, past)]
        if not consolidation:
            log_p = torch.log_softmax(literal_norm(h) @ model.out.weight[0].T, dim=-1)
            losses += [-log_p[b, t, scored[b, t]]
                       for b, t in product(range(B), range(window.shape[1]))
                       if scored[b, t] != IGNORE]
    return torch.stack(losses).mean()


def assert_is_literal(model, tokens, targets, loops, variant=""):
    """Training's loss and its gradient with respect to every parameter are the literal ones."""
    ours, logits, labels = train.algorithm1(model, tokens, targets, loops)
    literal = literal_algorithm1(model, tokens, targets, loops, variant)
    assert_same_values_and_gradients([ours], [literal], [*model.parameters()])
    scored = [targets[:, w.start:w.stop] for w in cut(targets, model.config.window) if w.scored]
    assert torch.equal(labels, torch.cat(scored, dim=1)) and logits.shape == (*labels.shape, 3)


# ======================================================================================== sleep.py

def test_sleep_py_holds_the_paper_alone():
    """Guards the reader of sleep.py, who needs model.py and nothing else of ours."""
    imported = re.findall(r"^\s*(?:from|import) (\w+)", (HERE / "sleep.py").read_text(), re.M)
    ours = {"results", *(path.stem for folder in (HERE, HERE / "results")
                         for path in folder.glob("*.py"))}
    assert {*imported} & ours == {"model"}


@pytest.mark.parametrize("layout, loops, shape", [
    ("asas", 1, {}), ("asas", 2, {}), ("as", 4, {}), ("aaaa", 2, {}), ("sa", 3, {}), ("ama", 2, {}),
    ("asas", 2, {"eviction": "sliding"}), ("as", 2, {"eviction": "none"}),
    ("asas", 3, {"loop_blocks": (1, 3)}), ("as", 2, {"rule": "delta"}),
    ("as", 2, {"rule": "mamba2"}), ("asam", 2, {"eviction": "sliding", "loop_blocks": (1, 4)}),
    ("sa", 2, {"eviction": "sliding"}), ("asas", 4, {"window": 50})])
def test_algorithm1_equals_its_words(layout, loops, shape):
    """Guards Eq. (1) to (6) and Algorithm 1: values, gradients of every parameter; rows of a batch
    that mix; a window of context, query and answer, which is read once, whatever N is."""
    assert_is_literal(hybrid(layout, **shape), *sequences(rest=4, scored=3), loops)


def test_one_loop_is_the_plain_hybrid():
    """Guards "N = 1 is no special case": awake passes give the same logits, bitwise."""
    model, (tokens, targets) = hybrid(), sequences()
    memory = model.empty_memory(len(tokens))
    for window in tokens.split(5, dim=1):
        logits, memory = wake(model, window, memory)
        memory = evict(memory)
    assert torch.equal(algorithm1(model, tokens, targets, 1)[1], logits)
    assert not torch.equal(algorithm1(model, tokens, targets, 2)[1], logits)


def test_cut_finds_the_scored_windows():
    """Guards the kind of a window: one scored token anywhere makes it a prediction window."""
    targets = torch.full((2, 12), IGNORE)
    targets[1, 6] = targets[0, 11] = 1
    assert cut(targets, 5) == [(0, 5, False), (5, 10, True), (10, 12, True)]


@pytest.mark.parametrize("eviction", ["hard", "sliding"])
def test_every_scored_window_counts(eviction):
    """Guards scored windows in the middle: their loss, and their cache, which goes as any other."""
    model, (tokens, targets) = hybrid(eviction=eviction), sequences()
    targets[:, 6:9] = torch.randint(2, (2, 3))
    assert_is_literal(model, tokens, targets, 2)


@pytest.mark.parametrize("tokens, targets, windows, named", [
    ((2, 12), (2, 10), None, "targets"), ((2, 12), (1, 12), None, "targets"),
    ((0, 12), (0, 12), None, "targets"), ((2, 0), (2, 0), None, "targets"),
    *(((2, 12), (2, 12), [window], "windows") for window in (
        Window(0, 12, False), Window(0, 10, True), Window(0, 14, True))),
    ((2, 12), (2, 12), None, "windows")])
def test_algorithm1_refuses_what_does_not_fit(tokens, targets, windows, named):
    """Guards silence: rows or tokens left out, windows of another task, a mean over nothing."""
    fill = 0 if windows or named == "targets" else IGNORE
    tokens, targets = torch.zeros(tokens).long(), torch.full(targets, fill)
    with pytest.raises(ValueError, match=f"^{named} .*: must "):
        algorithm1(hybrid(), tokens, targets, 1, windows)


@pytest.mark.parametrize("rule, eviction, loops", [*product(
    RULES, ("hard", "sliding", "none"), (1, 2, 3, 4))])
def test_stream_equals_algorithm1(rule, eviction, loops):
    """Guards "train on windows, use token by token": state that differs between the two."""
    blocks = (1, 3) if loops == 3 else None
    model = hybrid("asas", eviction=eviction, loop_blocks=blocks, rule=rule)
    tokens, targets = sequences()
    stream = Stream(model, loops, batch_size=len(tokens))
    logits = torch.stack([stream.feed(token) for token in tokens.T], dim=1)
    torch.testing.assert_close(logits[:, -3:], algorithm1(model, tokens, targets, loops)[1])


def test_one_loop_repeats_the_provisional_state():
    """Guards "the S read awake is provisional; for N = 1 sleep computes it again"."""
    model, window = hybrid(), torch.randint(3, (2, 5))
    start = memory = model.empty_memory(2)
    for token in window.T:
        _, memory = wake(model, token[:, None], memory)
    slept = [sleep(model, window, start, loops).S[1] for loops in (1, 2)]
    torch.testing.assert_close(slept[0], memory.S[1])
    assert (slept[1] - memory.S[1]).abs().max() > 1e-3
    for model in (model, hybrid(loop_blocks=(1, 3))):  # asleep, h is dropped
        assert passes(model, window, start, 2, need_h=False)[0] is None


@pytest.mark.parametrize("eviction", ["sliding", "none"])
def test_one_loop_with_a_cache_is_one_long_reading(eviction):
    """Guards the sliding window: N = 1 is sliding-window attention and SSM over the whole text."""
    model, (tokens, targets) = hybrid(eviction=eviction), sequences(rest=2)  # one more than L seen
    h = torch.cat([model.embed(window) for window in tokens.split(5, dim=1)], dim=1)
    h, *_ = literal_blocks(model, h, model.empty_memory(2).S, [None] * 4)
    logits = literal_norm(h) @ model.out.weight[0].T
    torch.testing.assert_close(algorithm1(model, tokens, targets, 1)[1], logits[:, -2:])


@pytest.mark.parametrize("eviction, through", [("hard", False), ("sliding", True)])
def test_gradients_take_the_road_that_memory_takes(eviction, through):
    """Guards "S is the only road for gradients": under hard eviction the cache bears none."""
    model = hybrid(eviction=eviction)
    memory = sleep(model, torch.randint(3, (2, 5)), model.empty_memory(2), 2)
    assert all(x.requires_grad == through for entry in memory.cache for x in entry)
    assert all(S.requires_grad for S in memory.S if S is not None)


@pytest.mark.parametrize("make, token, named", [
    ({"loops": 0}, [0], "loops 0"), ({"loops": 1.5}, [0], "loops 1.5"),
    ({"batch_size": 0}, [], "batch_size 0"), ({"batch_size": 2}, [0], "token"),
    ({}, [0, 1, 2], "token"), ({}, [0.0], "tokens"), ({}, [3], "token"), ({}, [-1], "token"),
    ({}, 0, "token"), ({"batch_size": 2}, [0, 3], "token")])
def test_stream_refuses_what_it_cannot_read(make, token, named):
    """Guards shapes that broadcast on a CPU and write beyond S on a GPU, and unknown words."""
    with pytest.raises(ValueError, match=rf"^{named}.*: must be"):
        Stream(hybrid(), **{"loops": 2} | make).feed(torch.tensor(token))


def test_a_memory_of_another_batch_is_refused():
    """Guards the same below the stream, before a kernel is reached."""
    model = hybrid()
    with pytest.raises(ValueError, match="^S .*: must be of 3 sequences"):
        wake(model, torch.zeros(3, 2).long(), model.empty_memory(1))
    with pytest.raises(ValueError, match="^tokens .*: must be"):
        wake(model, torch.zeros(5).long(), model.empty_memory(1))
    with pytest.raises(ValueError, match="^loops 0: must be"):
        sleep(model, torch.zeros(1, 5).long(), model.empty_memory(1), 0)
    with pytest.raises(ValueError, match="^S .*: must be"):  # one beta for two tokens
        update("gdn", *map(torch.zeros, ((1, 2, 3, 1, 4), (1, 2, 1), (1, 1, 1), (1, 1, 4, 4))))
    for w, n_head in ((torch.zeros(4, 6), 2), (torch.zeros(4, 12), 3)):
        with pytest.raises(ValueError, match="^w .*: must be .4, 12."):
            prepare(torch.zeros(1, 5, 12), w, n_head)


def test_sliding_cache_is_bounded(monkeypatch):
    """Guards the sliding window: at most L keys in a cache, L - 1 between tokens, no view of more.
    """
    def watched(q, k, v, *rest):
        o, cache = attention(q, k, v, *rest)
        seen[q.shape[2]].append(cache.k.shape[2])
        return o, cache

    monkeypatch.setattr(model_file, "attention", watched)
    stream, sizes, seen = Stream(hybrid(eviction="sliding"), loops=2), [], {1: [], 5: []}
    for token in torch.zeros(23, 1, dtype=torch.long):
        stream.feed(token)
        sizes.append((stream.memory.cache[0].k.shape[2], stream.bytes()["cache"]))
        held = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes()
                for memory in (stream.start, stream.memory) for entry in memory.cache
                for x in entry or ()}
        assert sum(held.values()) <= sizes[-1][1]
    assert [size for size, _ in sizes] == [1, 2, 3] + [4] * 20
    assert max(seen[1]) == 5 and max(seen[5]) == 9  # awake L; asleep L - 1 kept and L of its own
    assert max(size for _, size in sizes) == sizes[6][1]  # full, provisional and retained


def test_stream_memory_is_bounded():
    """Guards "constant in size": bytes that grow with the text, or a cache longer than L."""
    stream, sizes = Stream(hybrid(), loops=2), []
    for _ in range(40):
        stream.feed(torch.zeros(1, dtype=torch.long))
        sizes.append(stream.bytes())
    one_token = 2 * 2 * 16 * 8  # two attention blocks, keys and values, d = 16, 8 bytes each
    tails = 2 * 3 * 3 * 16 * 8  # two SSM blocks, three inputs of q, k and v
    one_S = 2 * 2 * 8 * 8 * 8   # two blocks, two heads of 8 x 8; within a window a second one
    assert sizes == [{"cache": n and one_token * n + tails, "S": 2 * one_S if n else one_S,
                      "tokens": 8 * n} for n in [1, 2, 3, 4, 0] * 8]


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.inference_mode, torch.no_grad,
                                  lambda: torch.autocast("cpu", torch.bfloat16)])
def test_use_then_training(mode):
    """Guards what outlives a call: a graph, a buffer of the caller's, a table without gradients."""
    model, (tokens, targets) = hybrid("as", window=7, dtype="float32"), sequences(window=7)
    with mode():
        streams, buffer = [Stream(model, 2, batch_size=2) for _ in range(2)], tokens[:, 0].clone()
        for token in tokens.T:
            a, b = streams[0].feed(token), streams[1].feed(buffer.copy_(token))
            assert torch.equal(a, b) and a.isfinite().all()
            assert not any(x.requires_grad for x in (
                a, streams[0].memory.S[1], streams[0].start.S[1]))
        assert algorithm1(model, tokens, targets, 2)[0].isfinite()
    algorithm1(model, tokens, targets, 2)[0].backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_an_error_in_feed_changes_nothing(monkeypatch):
    """Guards a stream that is fed through Ctrl-C or a full memory: it is as it was before."""
    tokens, model = torch.randint(3, (11, 1)), hybrid()
    whole, broken = Stream(model, 2), Stream(model, 2)
    for token in tokens:
        expected = whole.feed(token)
        if len(broken.tokens) == 4:
            with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
                patch.setattr(sleep_file, "sleep", lambda *_: 1 / 0)
                broken.feed(token)
        assert torch.equal(broken.feed(token), expected)


def test_numbers_of_numpy_and_a_config_that_stays():
    """Guards numpy's integers as N, and a Config of which half is changed."""
    model, tokens = hybrid(), torch.zeros(1, 5).long()
    one, two = (sleep(model, tokens, model.empty_memory(1), N).S[1] for N in np.arange(1, 3))
    assert not torch.equal(one, two)
    assert Stream(model, np.int64(2)).feed(tokens[:, 0]).shape == (1, 3)
    assert torch.equal(model.embed(tokens.int()), model.embed(tokens))
    with pytest.raises(FrozenInstanceError):
        model.config.window = 8
    with pytest.raises(ValueError, match="^vocab_size 0: must be"):
        Config(0, 5)


def test_a_mode_leaves_nothing_behind():
    """Guards what is kept by one mode and is wrong in another: tables made of fake tensors."""
    model, (tokens, targets) = hybrid("as", dtype="float32"), sequences()
    with FakeTensorMode(allow_non_fake_inputs=True):
        wake(model, tokens[:, :5], model.empty_memory(2))
    algorithm1(model, tokens, targets, 2)[0].backward()
    assert all(type(p.grad) is torch.Tensor and p.grad.isfinite().all()
               for p in model.parameters())


def test_only_S_crosses_the_boundary():
    """Guards the claim itself: evicted tokens reach the future through S only."""
    model, window, query = hybrid(), torch.randint(3, (2, 5)), torch.randint(3, (2, 2))
    first, second = (evict(sleep(model, tokens, model.empty_memory(2), 2))
                     for tokens in (window, (window + 1) % 3))
    a, b, c = (wake(model, query, memory)[0] for memory in (first, second._replace(S=first.S),
                                                            second))
    assert torch.equal(a, b) and (a - c).abs().max() > 1e-3


def test_gradients_reach_sleep_through_S_only():
    """Guards backpropagation: attached, it reaches the window; detached, it does not."""
    model, window, query = hybrid(), torch.randint(3, (1, 5)), torch.tensor([[2]])
    for attached in (True, False):
        embedded, embed = [], Hybrid.embed
        model.embed = lambda *inputs: embedded.append(embed(model, *inputs)) or embedded[-1]
        memory = evict(sleep(model, window, model.empty_memory(1), 2))
        if not attached:
            memory = Memory(memory.cache, tuple(S if S is None else S.detach() for S in memory.S))
        logits, _ = wake(model, query, memory)
        embedded[0].retain_grad()
        logits.sum().backward()
        assert (embedded[0].grad is not None and embedded[0].grad.abs().max() > 0) == attached


def test_every_pass_contributes_its_gradient():
    """Guards a detach between passes: a derivative for each pass, by finite differences."""
    model, window, query = hybrid(), torch.randint(3, (1, 5)), torch.tensor([[2]])
    directions, core = torch.randn(3, 1, 5, 16, dtype=torch.float64), model.core

    def answer(shift):  # what enters pass n is displaced by shift_n
        displacements = iter([*(shift[:, None, None, None] * directions), 0])
        model.core = lambda h, *rest: core(h + next(displacements), *rest)
        return wake(model, query, evict(sleep(model, window, model.empty_memory(1), 3)))[0][0, 0, 0]

    shift = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    gradient, = torch.autograd.grad(answer(shift), shift)
    for n, step in enumerate(1e-6 * torch.eye(3, dtype=torch.float64)):
        with torch.no_grad():
            difference = (answer(step) - answer(-step)) / 2e-6
        torch.testing.assert_close(gradient[n], difference, rtol=1e-5, atol=1e-9)
        assert gradient[n].abs() > 1e-6


@pytest.mark.parametrize("loops, variant", [(1, ""), (3, "awake")])
def test_causality(monkeypatch, loops, variant):
    """Guards the future: no logits depend on later tokens, also where passes are spent awake."""
    apply(monkeypatch, variant)
    model, tokens = hybrid(window=9), torch.randint(3, (2, 9))
    changed = tokens.clone()
    changed[:, 6] = (changed[:, 6] + 1) % 3
    once, a, b = (train.algorithm1(model, x, torch.zeros_like(x), n)[1]
                  for x, n in ((tokens, 1), (tokens, loops), (changed, loops)))
    assert torch.equal(a[:, :6], b[:, :6]) and not torch.isclose(a[:, 6:], b[:, 6:]).all(-1).any()
    assert torch.equal(once, a) == (loops == 1)



# ======================================================================================== model.py

def rule_inputs(L, dtype=torch.float64, collinear=False, B=2, H=3, K=4, V=5):
    q, k, v = torch.randn(B, H, L, K), torch.randn(B, H, L, K), torch.randn(B, H, L, V)
    log_alpha, beta = -torch.rand(B, H, L), torch.rand(B, H, L)
    if collinear:
        k, log_alpha, beta = torch.randn(B, H, 1, K) + 1e-3 * k, 1e-3 * log_alpha, 1 - 1e-3 * beta
    inputs = q, F.normalize(k, dim=-1), v, log_alpha, beta, torch.randn(B, H, V, K)
    return [x.to(dtype).requires_grad_() for x in inputs]


def as_a_rule(rule, q, k, v, log_alpha, beta, S):
    """`update`, with inputs and outputs as a rule has them."""
    qkv = torch.stack([x.transpose(1, 2) for x in (q, k, v)], dim=2)
    o, S = update(rule, qkv, log_alpha.mT, beta.mT, S)
    return o.transpose(1, 2), S


def literal_update(rule, qkv, log_alpha, beta, S):
    """The literal form, with inputs and outputs as `update` has them."""
    q, k, v = (x.transpose(1, 2) for x in qkv.unbind(2))
    o, S = LITERAL_RULES[rule](q, k, v, log_alpha.mT, beta.mT, S)
    return o.transpose(1, 2), S


@pytest.mark.parametrize("rule, L, collinear", [*product(RULES, (1, 4, 24, 75), (False, True))])
def test_rules_equal_token_loop(rule, L, collinear):
    """Guards Eq. (3): a wrong decay, a transposed S, a mask after exp, an inverse that explodes."""
    inputs = rule_inputs(L, collinear=collinear)
    assert_same_values_and_gradients(RULES[rule](*inputs), LITERAL_RULES[rule](*inputs), inputs)


@pytest.mark.parametrize("rule, L", [*product(RULES, (32, 33, 75, 130, 512))])
def test_pieces_of_a_long_window_equal_token_loop(rule, L):
    """Guards windows of more than 32 tokens: pieces that each start from S = 0, or in disorder."""
    inputs = rule_inputs(L, V=4)
    assert_same_values_and_gradients(as_a_rule(rule, *inputs), LITERAL_RULES[rule](*inputs), inputs)


@pytest.mark.parametrize("rule, L, decay, dtype", [*product(
    RULES, (1, 24, 130), (0.0, -1e-6, -1.0, -1e4), (torch.float32, torch.bfloat16))])
def test_rules_at_their_limits(rule, L, decay, dtype):
    """Guards a window of one and the same key, nothing forgotten or everything, beta next to 1: a
    rule must not lose float32's precision there."""
    q, k, v, log_alpha, beta, S = (x.detach() for x in rule_inputs(L, V=4))
    inputs = [q, k[:, :, :1].expand_as(k), v, torch.full_like(log_alpha, decay), 1 - 1e-3 * beta, S]
    rounded = [x.to(dtype if i < 3 else torch.float32) for i, x in enumerate(inputs)]
    assert_close_to_literal(partial(as_a_rule, rule), LITERAL_RULES[rule], rounded,
                            0.02 if dtype == torch.bfloat16 else 1e-4)


@pytest.mark.parametrize("rule", RULES)
def test_autocast_leaves_the_rule_alone(rule):
    """Guards the fast weights under autocast: their products stay in the dtype of S."""
    _, _, _, log_alpha, beta, S = rule_inputs(40, torch.float32, K=8, V=8)
    qkv = torch.randn(2, 40, 3, 3, 8)
    with torch.autocast("cpu", torch.bfloat16):
        ours = update(rule, qkv, log_alpha.mT, beta.mT, S)
    for a, b in zip(ours, update(rule, qkv, log_alpha.mT, beta.mT, S)):
        assert a.dtype == torch.float32 and torch.equal(a, b)


def test_only_their_own_rules_reach_the_kernels(monkeypatch):
    """Guards a new rule on a GPU: it must not run another one's kernel."""
    used, alphas, kernels, L = [], [], KERNELS.copy(), 4
    inputs = [x.double() for x in (torch.randn(1, L, 3, 1, 16), -torch.rand(1, L, 1),
                                   torch.rand(1, L, 1), torch.randn(1, 1, 16, 16))]
    monkeypatch.setitem(RULES, "new", literal_rule)
    monkeypatch.setitem(LITERAL_RULES, "new", literal_rule)
    for rule in kernels:
        monkeypatch.setitem(KERNELS, rule, lambda *x, rule=rule: used.append(rule) or (None, None))
    for fits, rule in product((False, True), RULES):
        monkeypatch.setattr(model_file, "fits_kernels", lambda *_: fits)
        outputs = update(rule, *inputs)
        assert used == [rule] * (fits and rule in ("gdn", "delta"))
        if not used:
            torch.testing.assert_close(outputs, literal_update(rule, *inputs))
        used.clear()
    monkeypatch.setattr(model_file, "fused_rule", lambda *x: alphas.append(x[1]) or (None,) * 3)
    for rule in ("gdn", "delta"):
        kernels[rule](None, torch.ones(1, L, 1), None, None)
    assert alphas[0].all() and not alphas[1].any()  # delta: alpha = 1
    monkeypatch.setattr(model_file, "fused_attention", lambda *_: 1 / 0)
    model_file.attend(torch.randn(1, L, 3, 1, 16), None, L - 1)  # a span that no kernel has


@pytest.mark.parametrize("L", [1, 7, 24])
def test_attention_equals_eq2(L):
    """Guards Eq. (2): mask off by one, wrong scale, absolute positions, a cache not counted in."""
    inputs = [torch.randn(2, 3, L, 8, dtype=torch.float64, requires_grad=True) for _ in range(3)]

    def in_pieces(size):
        cache, parts = None, []
        for piece in zip(*(x.split(size, dim=2) for x in inputs)):
            o, cache = attention(*piece, cache)
            parts.append(o)
        return torch.cat(parts, dim=2)

    for first, size in ((0, L), (1000, L), (0, 1), (0, 5)):
        assert_same_values_and_gradients(
            [in_pieces(size)], [literal_attention(*inputs, first=first)], inputs)


def test_rotary_angles_are_exact_in_bfloat16():
    """Guards positions in low precision: bfloat16 cannot count beyond 256."""
    q, k, v = (torch.randn(1, 2, 300, 16).bfloat16() for _ in range(3))
    q = q[:, :, -1:]
    ours = attention(q, k[:, :, -1:], v[:, :, -1:], Cache(k[:, :, :-1], v[:, :, :-1]))[0]
    literal = literal_attention(*(x.double() for x in (q, k, v)))
    assert (ours.double() - literal).norm() < 0.02 * literal.norm()


def test_start_values():
    """Guards GDN's own start values against a generic pass; matrices keep their input's size."""
    model = Hybrid(Config(3, 24, "s", d_model=512, n_head=128))
    layer = model.layers[0]
    assert 0.9 < model.embedding.std() < 1.1 and not model.out.weight.any()
    for matrix in (layer.up, layer.down):
        assert 0.95 < matrix(torch.randn(64, matrix.weight.shape[2])).std() < 1.05
    w = layer.mixer.conv.weight
    assert -0.5 <= w.min() < -0.49 and 0.49 < w.max() <= 0.5
    A, dt = layer.mixer.A_log.exp(), F.softplus(layer.mixer.dt_bias)
    assert 0.01 <= A.min() < 1 < 15 < A.max() <= 16
    assert 1e-3 * 0.999 <= dt.min() < 2e-3 and 5e-2 < dt.max() <= 1e-1 * 1.001
    many = Hybrid(Config(3, 5, 20 * "m", 128, 64)).layers
    assert 0.097 < F.softplus(torch.cat([x.mixer.dt_bias for x in many])).max() < 0.1001


def test_bfloat16_products(monkeypatch):
    """Guards the dtypes on a GPU: every product in bfloat16, S, gradients and loss in float32."""
    exact_ones = set()
    monkeypatch.setattr(model_file, "update", lambda rule, qkv, *x: exact_ones.update(
        y.dtype for y in x) or update(rule, qkv, *x))  # log_alpha, beta, S
    model, (tokens, targets) = hybrid(dtype="float32"), sequences(B=16)
    low, inside = Hybrid(Config(3, 5, "asas", 16, 2, dtype="bfloat16")), {}
    low.load_state_dict(model.state_dict())
    for name, part in low.named_modules():
        part.register_forward_hook(lambda _, x, out, name=name: inside.update({name: x[0].dtype}))
    loss, exact = (algorithm1(m, tokens, targets, 2)[0] for m in (low, model))
    loss.backward()
    products = {name: dtype for name, dtype in inside.items() if name.endswith(
        ("qkv", "mixer.out", "up", "down"))}
    assert len(products) == 16 and set(products.values()) == {torch.bfloat16}, products
    assert all(x.dtype == torch.float32 for x in (loss, *(p.grad for p in low.parameters())))
    assert sleep(low, tokens[:, :5], low.empty_memory(16), 2).S[1].dtype == torch.float32
    assert 0 < abs(loss - exact) < 0.05 * exact
    assert exact_ones == {torch.float32}


@pytest.mark.parametrize("default", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_parameters_of_half_precision(dtype, default):
    """Guards model.half(): S and its triangular solve stay in float32."""
    torch.set_default_dtype(dtype if default else torch.float32)
    try:
        model = Hybrid(Config(3, 5, "as", 16, 2)).to(dtype)
        tokens, targets = sequences()
        loss = algorithm1(model, tokens, targets, 2)[0]
        loss.backward()
    finally:
        torch.set_default_dtype(torch.float32)
    assert loss.isfinite() and model.empty_memory(2).S[1].dtype == torch.float32


@cuda
@pytest.mark.parametrize("L", [1, 2, 3, 4, 24, 32, 75, 130])
@pytest.mark.parametrize("H, K", [(4, 64), (3, 32), (2, 16)])
@pytest.mark.parametrize("collinear", [False, True])
def test_kernels_equal_the_literal_form(monkeypatch, L, H, K, collinear):
    """Guards the Triton kernels, values and gradients: bfloat16 factors allow 1 %, a bug does not.
    Nearly collinear keys, where an inverse by powers explodes, make a small beta gradient noisy."""
    x = torch.randn(5, L, 3 * H * K + 8, device="cuda")
    w = torch.rand(4, 3 * H * K, device="cuda") - 0.5
    used, fused, kernels = [], model_file.fused_prepare, KERNELS.copy()

    def literal_prepare(x, w):
        q, k, v = literal_conv(x[..., :3 * H * K], w).unflatten(-1, (3, H, K)).unbind(2)
        return [torch.stack([F.normalize(q, dim=-1), F.normalize(k, dim=-1), v], dim=2)]

    monkeypatch.setattr(model_file, "fused_prepare", lambda *x: used.append("prepare") or fused(*x))
    assert_close_to_literal(lambda x, w: [prepare(x[..., :3 * H * K], w, H)], literal_prepare,
                            [x.bfloat16(), w], 0.01)
    qkv = literal_prepare(x, w)[0].clone()
    log_alpha, beta = -torch.rand(5, L, H, device="cuda"), torch.rand(5, L, H, device="cuda")
    if collinear:
        qkv[:, :, 1] = F.normalize(qkv[:, :1, 1] + 1e-2 * qkv[:, :, 1], dim=-1)
        log_alpha, beta = 1e-3 * log_alpha, 1 - 1e-3 * beta
    inputs = [qkv.bfloat16(), log_alpha, beta, torch.randn(5, H, K, K, device="cuda")]
    for rule, kernel in kernels.items():
        monkeypatch.setitem(KERNELS, rule, lambda *x: used.append(rule) or kernel(*x))
        assert_close_to_literal(partial(update, rule), partial(literal_update, rule), inputs,
                                0.05 if collinear else 0.01)
    assert used == ["prepare", *(rule for rule in KERNELS for _ in range(-(-L // 32)))]


@cuda
@pytest.mark.parametrize("L", [1, 7, 16, 24, 32, 33])
@pytest.mark.parametrize("H, K", [(8, 32), (3, 32), (4, 64), (2, 16), (2, 8)])
def test_attention_s_kernel_equals_the_literal_form(monkeypatch, L, H, K):
    """Guards the kernel of attention over one window: values, gradients, and where it is used."""
    used, fused = [], model_file.fused_attention

    def literal(qkv):
        q, k, v = (x.transpose(1, 2) for x in qkv.cpu().unbind(2))
        q, k = literal_norm(q), literal_norm(k)
        return [x.cuda() for x in (literal_attention(q, k, v).transpose(1, 2), k, v)]

    def ours(qkv):
        o, cache = model_file.attend(qkv, None, L)
        return [o, *cache]

    monkeypatch.setattr(model_file, "fused_attention", lambda *x: used.append(1) or fused(*x))
    qkv = torch.randn(5, L, 3, H, K, device="cuda").bfloat16()
    assert_close_to_literal(ours, literal, [qkv], 0.01)
    assert len(used) == (L <= 32 and K >= 16)


# ========================================================================================= data.py

def read_rule110(task, tokens, targets):
    """The states of a sequence. Asserts the layout, and targets found cell by cell."""
    n, states = task.cells, tokens[:task.states * task.cells]
    states = [states[i:i + n] for i in range(0, len(states), n)]
    answers = []
    for state in states:
        for _ in range(task.t):
            state = [task.automaton >> (4 * state[i - 1] + 2 * state[i] + state[(i + 1) % n]) & 1
                     for i in range(n)]
        answers.append(state[0])
    assert tokens[n * task.states:] == [task.QUERY, *answers[:-1]]
    assert targets == [IGNORE] * (n * task.states) + answers
    return states


def read_depo(task, tokens, targets):
    """Everything that a sequence of Depo says, from its tokens alone: successor of each name, edges
    in their order, questions as (start, k). Asserts the layout, and targets found by walking."""
    A, hops = task.names, task.hops
    ANSWER, PAD = 2 * A + hops, 2 * A + hops + 1
    graph, asked = tokens[:4 * task.nodes], tokens[4 * task.nodes:]
    graph = graph[graph.count(PAD):]

    def name(tokens):  # takes it off the front
        taken = tuple(tokens.pop(0) for _ in range(1 if A <= tokens[0] < 2 * A else 2))
        assert A <= taken[-1] < 2 * A and all(0 <= x < A for x in taken[:-1])
        return taken

    edges = []
    while graph:
        edges.append((name(graph), name(graph)))
    after, questions, expected = dict(edges), [], [IGNORE] * (4 * task.nodes - 1)
    assert len(after) == len(edges) == len(set(after.values()))
    while asked and asked[0] != PAD:
        k, start = asked.pop(0) - 2 * A + 1, name(asked)
        assert 1 <= k <= hops and asked.pop(0) == ANSWER
        node = start
        for _ in range(k):
            node = after[node]
        assert name(asked) == node
        questions.append((start, k))
        expected += [IGNORE] * (1 + len(start)) + [ANSWER, *node]
    assert set(asked) <= {PAD}
    assert targets == expected + [IGNORE] * (task.length - len(expected))
    assert len({start for start, _ in questions}) == len(questions)
    walk = [edges[0][0]]
    while after[walk[-1]] != walk[0]:
        walk.append(after[walk[-1]])
    assert len(walk) == len(edges)  # one cycle, not two
    assert len(questions) == min(len(edges), task.questions)
    return after, edges, questions


def read_gsm(task, tokens, targets):
    """Everything that a problem of GSM says, from its tokens alone: the statements in their order,
    the set of needed variables. Asserts the layout, what is needed, and the answer modulo p."""
    p, V = task.modulus, task.variables
    words = [*range(p), *(f"x{i}" for i in range(V)), *"+-*=;?A"]
    *text, marker = [words[x] for x in tokens]
    assert marker == "A" and targets[:-1] == [IGNORE] * (task.length - 1)
    question, text = ((text[:2], text[2:]) if task.question == "first" else (text[-2:], text[:-2]))
    assert question[0] == "?" and len(text) == 6 * task.statements
    statements = [text[i:i + 6] for i in range(0, len(text), 6)]
    assert all(equals == "=" and end == ";" for _, equals, *_, end in statements)
    means = {x: (left, op, right) for x, _, left, op, right, _ in statements}
    assert len(means) == task.statements  # each defined once

    def variables(x):
        return [y for y in means[x][::2] if isinstance(y, str)]

    def walk_back(x, above=()):
        assert x not in above  # no circle
        return {x}.union(*(walk_back(y, (*above, x)) for y in variables(x)))

    def depth(x):
        return 1 + max(map(depth, variables(x)), default=0)

    def value(x):
        if isinstance(x, int):
            return x
        left, op, right = means[x]
        assert op in list("+-*")
        return eval(f"{value(left)} {op} {value(right)}") % p

    needed = walk_back(question[1])
    assert targets[-1] == value(question[1]) and depth(question[1]) == len(needed)
    reuse = [x for x in means if x not in needed and set(variables(x)) & needed]
    apart = [x for x in means if not walk_back(x) & needed]
    assert reuse and apart and len(needed) + len(reuse) + len(apart) == task.statements
    assert abs(len(reuse) - len(apart)) <= 1
    return statements, needed, question[1]


# How to read a task's sequence from its tokens alone, and assert its targets without its own code.
READ = {Rule110: read_rule110, Depo: read_depo, GSM: read_gsm}


def read(task, count, split="train", level=None):
    rows = zip(*(x.tolist() for x in task.batch(count, generator(0, 0), split, level)))
    return [READ[type(task)](task, *row) for row in rows]


def sizes():
    """Every task at its defaults, and with one whole number of them greater, where it may be."""
    for name, make in TASKS.items():
        yield name, {}
        for option, parameter in inspect.signature(make).parameters.items():
            with contextlib.suppress(TypeError, ValueError):  # no number; out of bounds
                make(**(given := {option: parameter.default + 1}))
                yield name, given


@pytest.mark.parametrize("name, given", [*sizes()])
def test_every_task_keeps_its_promises(name, given):
    """Guards a new task: wrong targets or layout, splits that overlap, draws from elsewhere."""
    task, seen, state = TASKS[name](**given), {}, torch.get_rng_state()
    assert type(task) in READ, f"add a function that reads {type(task).__name__} to READ"
    levels = () if given else task.levels  # once is enough, and quicker
    for split, level in product(("train", "held-out"), (None, *levels)):
        tokens, targets = task.batch(40, numbers := generator(1, 0), split, level)
        assert not torch.equal(tokens, task.batch(40, numbers, split, level)[0]), "draw anew"
        assert torch.equal(state, torch.get_rng_state()), "draw from the generator given only"
        try:
            with torch.device("meta"):  # what is made without naming the device is of no use
                again = task.batch(40, generator(1, 0), split, level)
        except RuntimeError as error:
            raise AssertionError("make every tensor on random.device") from error
        assert all(map(torch.equal, (tokens, targets), again)), "the same numbers, the same batch"
        assert tokens.shape == targets.shape == (40, task.length)
        assert max(tokens.max(), targets.max()) < len(task.words)
        scored = targets != IGNORE
        assert not scored[:, :task.scored_from].any(), "score nothing before scored_from"
        assert scored.any(1).all(), "score something in every sequence"
        assert train.windows_of(task, task.window) == cut(targets, task.window), (
            "scored_from is the first scored place, and every later window has some")
        for row in zip(tokens.tolist(), targets.tolist()):
            READ[type(task)](task, *row)
        seen.setdefault(split, set()).update(map(tuple, tokens[:, :task.scored_from].tolist()))
    assert not seen["train"] & seen["held-out"], "what is told before scored_from has one split"


@pytest.mark.parametrize("name", TASKS)
def test_every_parameter_of_a_task_is_an_option(name):
    """Guards a parameter that no command line sets, or no log has; --window is the model's."""
    make, parameters = TASKS[name], inspect.signature(TASKS[name]).parameters
    assert {*make.options} == {*parameters} - {"window"}, f"name them in {make.__name__}.options"
    default = {option: parameters[option].default for option in make.options}
    assert all(make.options.values()), "give each option its help"
    assert all(type(x) in (int, str) for x in default.values()), "options are whole numbers or text"
    for given in ({}, {option: x for option, x in make.shown.items() if option in default}):
        task = make(**given)
        assert {option: getattr(task, option) for option in default} == default | given


def test_every_task_is_whole(monkeypatch):
    """Guards a task of one's own: it is in TASKS and in READ, no option has another one's name."""
    assert {*READ} == {*TASKS.values()}, "name the task in TASKS, and what reads it in READ"
    names = [name for kind in TASKS.values() for name in kind.options]
    monkeypatch.setattr(train, "TASKS", {})
    names += [action.dest for action in train.get_parser()._actions]
    twice = {name for name in names if names.count(name) > 1}
    assert not twice, f"{twice}: give a task's option a name that nothing else has"


def test_data_py_shows_every_task(monkeypatch, capsys):
    """Guards `python data.py`: a task not shown, columns not aligned, another answer explained."""
    monkeypatch.setattr(data_file, "floor", lambda task: 0.125)
    monkeypatch.setitem(TASKS, "new", Rule110)
    program = (HERE / "data.py").read_text().split('if __name__ == "__main__":')[1]
    exec(program.strip(), vars(data_file))
    shown = capsys.readouterr().out.split("\n\n")
    for make, text in zip(TASKS.values(), shown, strict=True):
        task, (title, *table) = make(**make.shown), text.splitlines()
        window, tokens, targets = (line.split()[1:] for line in table[:3])
        assert title == f"{task.title()}; floor 12.50%"
        assert len(window) == len(tokens) == len(targets) == task.length
        assert window[-1] == str(-(-task.length // task.window)) and "." in targets
        answers = "".join(word for word in targets if word not in (".", "="))
        explained = "".join(line.split()[-1] for line in table[3:])
        assert explained.endswith(answers) or not explained
        for steps, _, said in (line.rpartition(", ") for line in table[3:] if "->" in line):
            assert steps.split()[-1].startswith(said.split()[-1])  # where they end


@pytest.mark.parametrize("split", ["train", "held-out"])
@pytest.mark.parametrize("task", [
    Rule110(6, 3, 5), Rule110(6, 3, 5, 30), Depo(), Depo(8, 5, 3, 3), Depo(3, 7, 3, 2),
    Depo(6, 1, 1, 2), GSM(), GSM(question="last"), GSM(3, 5, 3, 5, "last"),
    GSM(ops=1, statements=40, modulus=23, variables=40)], ids=lambda x: type(x).__name__)
def test_sequences_say_what_is_right(task, split):
    """Guards the answers; a name or a variable twice; two cycles for one; a needed distractor."""
    assert len(set(task.words)) == len(task.words)
    count = 10 if isinstance(task, GSM) else 20
    read(task, 10 * count, split)
    for level in task.levels:
        for first, second, *rest in read(task, count, split, level):
            if isinstance(task, Depo):
                assert len(first) == task.nodes and {k for _, k in rest[0]} == {level}
            elif isinstance(task, GSM):
                assert len(second) == level


@pytest.mark.parametrize("task", [Rule110(4, 2, 2), Depo(3, 2, 2, 9, window=6),
                                  GSM(2, 4, 7, 26, window=9)], ids=lambda x: type(x).__name__)
def test_worked_examples(task):
    """Guards the examples in the docstrings, which are worked by hand."""
    rows = re.findall(r"^ +(window|tokens|targets) (.*)", type(task).__doc__, re.M)
    window, tokens, targets = (row.split() for _, row in rows)
    assert [int(x) for x in window] == [i // task.window + 1 for i in range(task.length)]
    READ[type(task)](task, [task.words.index(x) for x in tokens],
                     [IGNORE if x == "." else task.words.index(x) for x in targets])


def canonical(task, sequence):
    """What is held out: states, the edges of a cycle as a set, or the needed statements."""
    if isinstance(task, Rule110):
        return {tuple(state) for state in sequence}
    if isinstance(task, Depo):
        return {frozenset(sequence[0].items())}
    statements, needed, _ = sequence
    return {frozenset(tuple(x) for x in statements if x[0] in needed)}


@pytest.mark.parametrize("task, instances",
                         [*((Rule110(cells, 2, 3), 2**cells) for cells in (3, 4, 5, 8)),
                          (Depo(nodes=3, hops=2, questions=2, names=2), 40),
                          (Depo(nodes=4, hops=1, questions=1, names=2), 40 + 90),
                          (GSM(ops=1, statements=3, modulus=3, variables=3), 36)],
                         ids=lambda x: type(x).__name__)
def test_train_and_held_out_instances_are_disjoint(task, instances):
    """Guards the split: a hash of an order or of distractors; splits swapped; an endless search."""
    train, held_out = (set().union(*(canonical(task, x) for x in read(task, 3000, split)))
                       for split in ("train", "held-out"))
    assert held_out and len(train) > 2 * len(held_out) and not train & held_out
    assert len(train | held_out) == instances


def test_one_instance_in_eight_is_held_out():
    """Guards the hash, on bits and on other integers."""
    for high, size, tolerance in ((2, 24, 5e-3), (2550**2, 75, 5e-3), (44, 4, 5e-3), (9, 3, 0.02)):
        x = torch.randint(high, (50_000, size), generator=generator(0, 0))
        assert in_held_out(x).double().mean().item() == pytest.approx(1 / 8, abs=tolerance)


def test_generators_differ():
    """Guards the seeding: the CPU generator drops the high half of a seed."""
    draws = [torch.randint(2**60, (), generator=generator(*key)).item()
             for key in product(range(4), range(2), range(4))]
    assert len(set(draws)) == len(draws)


@pytest.mark.parametrize("task, length, kinds", [
    (Rule110(4, 3, 1), 15, "---?"), (Depo(6, 3, 2, 4), 36, "----??"), (Depo(), 360, "----?"),
    (GSM(2, 5, 5, window=7), 33, "----?"), (GSM(), 99, "-?")], ids=lambda x: type(x).__name__)
def test_windows_of_a_task_are_those_of_its_batches(task, length, kinds):
    """Guards scored_from: windows told from it alone are a large batch's; the paper's layouts."""
    for split in ("train", "held-out"):
        targets = task.batch(500, generator(0, 0), split)[1]
        windows = train.windows_of(task, task.window)
        assert windows == cut(targets, task.window) and windows[-1].stop == task.length == length
        assert "".join("-?"[window.scored] for window in windows) == kinds
    assert (targets != IGNORE).any(0).nonzero()[0].item() == task.scored_from


@pytest.mark.parametrize("make, name, value", [
    *((Depo, *x) for x in (("nodes", 2), ("nodes", 2551), ("hops", 0), ("hops", 1001),
                           ("questions", 0), ("questions", 76), ("names", 1), ("window", 0))),
    *((GSM, *x) for x in (("ops", 0), ("statements", 9), ("modulus", 9), ("modulus", 2),
                          ("modulus", -7), ("variables", 15), ("question", "middle"),
                          ("window", 0))),
    *((make, "level", level) for make, level in (
        (Rule110, -1), (Rule110, 10_001), (Depo, 0), (Depo, 17), (GSM, 0), (GSM, 9)))])
def test_impossible_tasks(make, name, value):
    """Guards against endless draws and silence: one line, first the parameter and its value."""
    with pytest.raises(ValueError, match=rf"^{name} {value}: must be [^\n]*$"):
        make().batch(1, generator(0, 0), level=value) if name == "level" else make(**{name: value})


@pytest.mark.parametrize("rule", [0, 30, 90, 110, 255])
@pytest.mark.parametrize("cells", [3, 8])
def test_rule110_equals_double_loop(rule, cells):
    """Guards the automaton: left and right swapped, fixed ends, another bit order of the rule."""
    state, table = torch.randint(2, (2, 5, cells)), f"{rule:08b}"[::-1]
    for steps in (0, 1, 7):
        after = rule110(state, steps, rule)
        for row, expected in zip(state.flatten(0, 1).tolist(), after.flatten(0, 1).tolist()):
            for _ in range(steps):
                row = [int(table[4 * row[i - 1] + 2 * row[i] + row[(i + 1) % cells]])
                       for i in range(cells)]
            assert row == expected


def test_rule110_by_hand():
    """Guards the definition: 111 110 101 100 011 010 001 000 give 0 1 1 0 1 1 1 0."""
    state = torch.tensor([0, 0, 0, 1, 0, 0, 0, 0])
    assert rule110(state, 1).tolist() == [0, 0, 1, 1, 0, 0, 0, 0]
    assert rule110(state, 2).tolist() == [0, 1, 1, 1, 0, 0, 0, 0]
    assert rule110(state, 3).tolist() == [1, 1, 0, 1, 0, 0, 0, 0]
    assert rule110(torch.tensor([1, 0, 0, 0]), 1).tolist() == [1, 0, 0, 1]  # over the ring's edge


@pytest.mark.parametrize("cells, t, rule",
                         [(3, 2, 110), (7, 9, 110), (8, 3, 30), (11, 4, 110), (6, 0, 90)])
def test_floor_equals_enumeration(cells, t, rule):
    """Guards the floor: without the right one a figure misleads. Of held-out states only."""
    states = torch.tensor(list(product([0, 1], repeat=cells)))
    p = rule110(states[in_held_out(states)], t, rule)[:, 0].double().mean().item()
    best = max(p, 1 - p) ** 3
    assert abs(floor(Rule110(cells, 3, t, rule)) - best) <= 5 * math.sqrt(best * (1 - best)) / 2**8


def test_floor_of_the_paper():
    """Guards the numbers beside the paper's: t = 4 and 32, with 24 cells, 4 states."""
    for t, known in ((4, 0.0820), (32, 0.0995)):
        share = floor(Rule110(24, 4, t))
        assert share == pytest.approx(known, abs=0.005)
        assert share * (2**16 - 1) % 1 == pytest.approx(0)  # of the larger draw


def test_floor_counts_whole_answers():
    """Guards the floor of other tasks: GSM's one answer; two answers that Depo never repeats."""
    assert floor(Depo(nodes=5, hops=2, questions=5, names=12), 1) == 0
    for task, level in ((GSM(ops=3, statements=5, modulus=5), 2),
                        (Depo(nodes=5, hops=2, questions=1, names=5), 1)):
        answers = Counter(tuple(row[row != IGNORE].tolist())
                          for row in task.batch(20_000, generator(1, 0), "held-out", level)[1])
        assert floor(task, level) == pytest.approx(max(answers.values()) / 20_000, abs=0.02)


def test_levels():
    """Guards evaluation at a level: answers of another t; the easiest and the hardest are there."""
    task, other = Rule110(cells=6, states=3, t=5), Rule110(cells=6, states=3, t=2)
    for ours, expected in zip(task.batch(20, generator(0, 0), "held-out", level=2),
                              other.batch(20, generator(0, 0), "held-out")):
        assert torch.equal(ours, expected)
    assert floor(task, 2) == floor(other) and task.levels == (5,)
    assert Depo().levels == (1, 2, 4, 8, 16) and Depo(hops=5).levels == (1, 2, 4)
    assert GSM().levels == tuple(range(1, 9))


def assert_shares(counts, shares):
    """Counts agree with their probabilities (alike, if no dict), to five standard deviations."""
    shares = shares if isinstance(shares, dict) else dict.fromkeys(shares, 1 / len(shares))
    total = sum(counts.values())
    assert set(counts) <= {x for x, p in shares.items() if p}
    for x, p in shares.items():
        assert abs(counts[x] / total - p) < 5 * math.sqrt(p * (1 - p) / total), (x, counts, shares)


def test_depo_draws_what_it_says():
    """Guards the mixture: sizes, hops; edges, starts and places say nothing about one another."""
    task, level = Depo(nodes=10, hops=5, questions=4, names=5), 3
    sequences = read(task, 3000)
    weights = {n: 1 / (n + math.sqrt(10)) for n in range(3, 11)}
    assert_shares(Counter(len(after) for after, *_ in sequences),
                  {n: w / sum(weights.values()) for n, w in weights.items()})
    assert_shares(Counter(k for *_, questions in sequences for _, k in questions), range(1, 6))
    follow, first, between = Counter(), Counter(), Counter()
    for after, edges, ((a, _), (b, _), *_) in read(task, 2000, level=level):
        follow.update(left[1] == right[0] for left, right in zip(edges, edges[1:]))
        first[[start for start, _ in edges].index(a)] += 1
        hops = 0
        while a != b:
            a, hops = after[a], hops + 1
        between[hops] += 1
    assert abs(follow[True] / follow.total() - 1 / 9) < 0.01
    assert_shares(first, range(10))
    assert_shares(between, range(1, 10))


def test_depo_names_are_drawn_as_in_the_original():
    """Guards the share of names with one token: draw a length, then tokens, anew if it was had."""
    literal, task = random.Random(0), Depo(nodes=7, hops=1, questions=1, names=3)

    def draw():
        names = set()
        while len(names) < 7:
            names.add(tuple(literal.randrange(3) for _ in range(literal.choice([1, 2]))))
        return sum(len(name) == 1 for name in names)

    counts = Counter(draw() for _ in range(20_000))
    sequences = read(task, 2000, level=1)
    assert_shares(Counter(sum(len(name) == 1 for name in after) for after, *_ in sequences),
                  {x: c / counts.total() for x, c in counts.items()})
    everyone = read(Depo(12, 1, 1, 3), 500, level=1)
    neighbours = Counter(len(a) == len(b) == 1 for after, *_ in everyone for a, b in after.items())
    assert abs(neighbours[True] / neighbours.total() - 3 / 12 * 2 / 11) < 0.015


def test_gsm_draws_what_it_says():
    """Guards the mixture: levels, order, operators, constants (never 0), sides, two variables."""
    task = GSM(ops=4, statements=6, modulus=5, variables=6)
    places, sides, constants, operators, both, reused = (Counter() for _ in range(6))
    problems = read(task, 3000)
    assert_shares(Counter(len(needed) for _, needed, _ in problems), range(1, 5))
    for statements, needed, asked in problems:
        places[[x for x, *_ in statements].index(asked)] += 1
        for x, _, left, operator, right, _ in statements:
            operators[operator] += 1
            constants.update(y for y in (left, right) if isinstance(y, int))
            if isinstance(left, int) != isinstance(right, int):
                sides[isinstance(left, int)] += 1
    for statements, needed, asked in read(task, 1500, level=4):
        reused.update(y == asked for x, _, left, _, right, _ in statements if x not in needed
                      for y in (left, right) if y in needed)
        both[sum(x in needed and isinstance(left, str) and isinstance(right, str)
                 for x, _, left, _, right, _ in statements)] += 1
    assert_shares(places, range(6))
    assert_shares(sides, [True, False])
    assert_shares(constants, range(1, 5))
    assert_shares(operators, "+-*")
    assert_shares(both, {0: 1 / 4, 1: 1 / 2, 2: 1 / 4})
    assert_shares(reused, {True: 1 / 4, False: 3 / 4})  # any of the four


# ========================================================================================= train.py

@pytest.mark.parametrize("shape", [(16, 16), (64, 16), (16, 64)])
def test_muon_equals_torch_muon(shape):
    """Guards momentum, Nesterov, coefficients, scale; torch's rounds to bfloat16, 2 %."""
    ours = torch.nn.Parameter(torch.randn(3, *shape))
    theirs = [torch.nn.Parameter(x.clone()) for x in ours.data]
    a, b = train.Muon([ours], lr=0.1), torch.optim.Muon(theirs, lr=0.1, weight_decay=0)
    start = ours.detach().clone()
    for _ in range(3):
        ours.grad = torch.randn_like(ours)
        for p, g in zip(theirs, ours.grad):
            p.grad = g.clone()
        a.step()
        b.step()
    difference = torch.stack(theirs).detach() - ours.detach()
    assert difference.norm() < 0.02 * (ours.detach() - start).norm()


def test_muon_takes_a_closure():
    """Guards torch's interface: a loop that is written for any optimizer."""
    p = torch.nn.Parameter(torch.randn(1, 4, 4))

    def closure():
        p.grad = None
        (loss := p.square().sum()).backward()
        return loss

    losses = [train.Muon([p], lr=0.1).step(closure) for _ in range(2)]
    assert losses[1] < losses[0]


def test_a_frozen_block_stays():
    """Guards a parameter without a gradient: skipped, as by torch's own optimizers; others move."""
    model, batch = hybrid(), sequences()
    optimizers = train.make_optimizers(model, 0.1, 0.1)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    model.layers[0].requires_grad_(False)
    loss_and_norm = train.training_step(model, optimizers, 1, cut(batch[1], 5), *batch)
    assert not loss_and_norm.requires_grad  # kept for some steps, it would keep their graphs
    for name, x in model.state_dict().items():
        assert torch.equal(x, before[name]) == name.startswith("layers.0."), name


def test_a_tiny_batch_is_overfitted():
    """Guards learning as a whole: a gradient that is zero or points elsewhere somewhere."""
    model = hybrid("as", window=4, dtype="float32")
    batch = Rule110(4, 2, 2).batch(8, generator(0, 0))
    optimizers = train.make_optimizers(model, 1e-2, 1e-2)
    for _ in range(60):
        loss, _ = train.training_step(model, optimizers, 2, cut(batch[1], 4), *batch)
    assert loss < 0.01


def test_threads_change_rounding_only():
    """Guards "other numbers on another machine are rounding": in float64 nothing is left of it."""
    task, ends = Rule110(), []
    batch, windows = task.batch(16, generator(1, 0)), train.windows_of(task, task.window)
    for threads in (1, 2):
        torch.set_num_threads(threads)
        torch.manual_seed(1)
        model = hybrid("as", task.window, 64)
        optimizers = train.make_optimizers(model, 4e-3, 1e-3)
        step = train.training_step(model, optimizers, 1, windows, *batch)
        ends.append((step, algorithm1(model, *batch, 1, windows)[0]))  # the loss after it
    torch.testing.assert_close(*ends, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("cores, d, given, threads", [(2, 64, None, 1), (4, 64, None, 2),
                                                      (16, 64, "3", 3), (2, 128, None, 2)])
def test_a_small_model_takes_few_threads(monkeypatch, cores, d, given, threads):
    """Guards the time beside other work; a larger model and OMP_NUM_THREADS keep their threads."""
    monkeypatch.setattr(train, "CORES", cores)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if given:
        monkeypatch.setenv("OMP_NUM_THREADS", given)
    torch.set_num_threads(3)
    parser = train.get_parser()
    train.settle(parser, train.parse(parser, ["--device=cpu", f"--d_model={d}"]))
    assert torch.get_num_threads() == threads


def lines_of(folder):
    """The log without the one thing that may differ, wall-clock time."""
    lines = [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("seconds", "command")} for line in lines]


def files_in(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def weights_of(folder, loops=2):
    return torch.load(Path(folder) / f"N{loops}.pt", weights_only=True)["model"]


def same_weights(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def assert_same_runs(a, b):
    """Bitwise the same evaluations and checkpoints."""
    assert lines_of(a)[1:] == lines_of(b)[1:]
    for checkpoint in a.glob("N*.pt"):
        assert same_weights(*(weights_of(x, checkpoint.stem[1:]) for x in (a, b)))


def interrupt(patch, step):
    """Ctrl-C in the step-th training step, counted over every N."""
    calls, factor = iter(range(1, 1000)), train.lr_factor  # called once a step

    def interrupting(*arguments):
        if next(calls) == step:
            os.kill(os.getpid(), signal.SIGINT)
        return factor(*arguments)

    patch.setattr(train, "lr_factor", interrupting)


def run_of(folder, options="", size=TINY, main=train.main, ctrl_c=None):
    """A run of three steps, or as the options say, or until Ctrl-C: the records of its log."""
    with pytest.MonkeyPatch.context() as patch:
        interrupt(patch, ctrl_c)
        arguments = ["--steps=3", *size, *f"--out={folder} {options}".split()]
        assert main(arguments) == (130 if ctrl_c else 0)
    return lines_of(folder)[1:]


def refused(capsys, arguments, main=train.main):
    """The one line that a program prints when it refuses a value."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit:
        sys.exit(main(arguments))
    out, err = capsys.readouterr()
    assert exit.value.code == 2 and err.count("\n") == 1 and "Traceback" not in err, err
    return err


STARTER = """
import json, os, runpy, signal, sys, time, torch._dynamo
for line in sys.stdin:
    folder, errors, number, lines, wait, *sys.argv = json.loads(line)
    out, into = os.pipe()
    if not (child := os.fork()):
        signal.alarm(200)  # nothing may hang
        os.dup2(into, 1)
        os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT), 2)
        os.chdir(folder)
        sys.path[0] = os.path.dirname(sys.argv[0])
        try:
            runpy.run_path(sys.argv[0], run_name="__main__")
        except SystemExit as end:
            if not isinstance(end.code, int):
                raise
            sys.stdout.flush()
            os._exit(end.code)  # at once: to take torch down takes long
        sys.exit()
    os.close(into)
    with open(out) as file:
        said = [file.readline() for _ in range(lines)]
        time.sleep(wait)
        os.kill(child, number)  # 0 does nothing
        said += file
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    print(json.dumps([code, "".join(said)]), flush=True)
"""


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """start(program, *arguments) -> exit code, stdout, stderr, as of python PROGRAM ...; but torch,
    which takes seconds, is imported once for all. signal: what is sent after some lines."""
    environment = os.environ | {"PYTHONUNBUFFERED": "", "OMP_NUM_THREADS": "1"}
    with subprocess.Popen([sys.executable, "-c", STARTER], text=True, stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE, env=environment) as of:
        def start(program, *arguments, folder=HERE, signal=0, lines=0, wait=0):
            errors = tmp_path_factory.mktemp("start") / "errors"
            job = [folder, errors, int(signal), lines, wait, HERE / program, *arguments]
            print(json.dumps(job, default=str), file=of.stdin, flush=True)
            return *json.loads(of.stdout.readline()), errors.read_text()
        yield start


def test_command_line_run(tmp_path, start):
    """Guards `python train.py`: facts, a line per evaluation, a table; each time a new folder."""
    for number in (1, 2):
        code, out, err = start("train.py", *TINY, "--steps=4", "--eval_every=2", folder=tmp_path)
        assert code == 0 and err == ""
        assert out.count("exact") == 1 + 2 * (3 + 1) + 1 and "the floor" in out
        header, *records = lines_of(tmp_path / f"out/rule110-00{number}")
        assert set(header) == {"commit", "versions", "hardware", "config"}
        assert [(r["loops"], r["step"]) for r in records] == [*product([1, 2], [0, 2, 4])]
        assert set(records[0]) == {"loops", "step", "tokens", "token_passes", "train_loss", "loss",
                                   "bit", "exact", "floor"}
        assert records[-1]["tokens"] == 4 * 8 * 10 and records[-1]["token_passes"] == 4 * 8 * 18


def test_training_equals_a_plain_loop(tmp_path, monkeypatch):
    """Guards the training step: clipping, schedule, rates, optimizers, order and seeds of data."""
    monkeypatch.setattr(train, "CHUNK", 2)
    run_of(tmp_path, "--seed 3 --loops 2 --automaton 30 --steps 5 --lr 0.05 --muon_lr 0.02")
    torch.manual_seed(3)
    task, model = Rule110(4, 2, 1, 30), Hybrid(Config(3, 4, "as", 16, 2))
    matrices = [p for p in model.layers.parameters() if p.ndim == 3]
    rest = [p for p in model.parameters() if all(p is not matrix for matrix in matrices)]
    muon = train.Muon(matrices, lr=0.02, momentum=0.95)
    adam = torch.optim.AdamW(rest, lr=0.05, betas=(0.9, 0.95), eps=1e-8, weight_decay=0)
    norms = []
    for step in range(5):
        tokens, targets = task.batch(16, generator(3, 0, step // 2), "train")
        half = slice(8 * (step % 2), 8 * (step % 2) + 8)
        algorithm1(model, tokens[half], targets[half], 2)[0].backward()
        norms.append(torch.cat([p.grad.flatten() for p in model.parameters()]).norm())
        for p in model.parameters():
            p.grad /= max(norms[-1], 1)
        factor = [1, 1, 1, 1, 0.5][step]
        for optimizer, rate in ((muon, 0.02), (adam, 0.05)):
            optimizer.param_groups[0]["lr"] = rate * factor
            optimizer.step()
            optimizer.zero_grad()
    assert max(norms) > 1, "nothing was clipped, so that clipping is not tested"
    for name, weight in weights_of(tmp_path).items():
        torch.testing.assert_close(weight, model.state_dict()[name], rtol=1e-3, atol=1e-4)
    loss = algorithm1(model, *task.batch(32, generator(0, 1), "held-out"), 2)[0].item()
    assert lines_of(tmp_path)[-1]["loss"] == pytest.approx(loss, rel=1e-4)


def test_scores_by_hand(monkeypatch):
    """Guards the two accuracies: bit counts scored tokens, exact sequences without any mistake."""
    guesses = torch.tensor([[0, 1, 1], [1, 1, 1], [0, 0, 1]])
    labels = torch.tensor([[IGNORE, 1, 1], [IGNORE, 1, 0], [0, 0, 1]])
    logits = F.one_hot(guesses).float()
    monkeypatch.setattr(train, "algorithm1", lambda *_: (torch.tensor(0.5), logits, labels))
    scores = train.evaluate(None, None, None, 1, None)
    assert scores == {"loss": 0.5, "bit": pytest.approx(6 / 7), "exact": pytest.approx(2 / 3)}


def test_evaluation_with_other_loops_and_by_level(tmp_path, monkeypatch):
    """Guards --eval_loops and the levels: another N is used; the means are of the levels."""
    records = run_of(tmp_path / "run", "--loops 2 --eval_loops 1,2 --lr 0.1")
    others = records[-1]["eval_loops"]
    assert others["2"] == {name: records[-1][name] for name in ("loss", "bit", "exact", "floor")}
    assert others["1"]["loss"] != others["2"]["loss"] and "eval_loops" not in records[0]
    [record] = run_of(tmp_path / "gsm", "--task gsm --ops 2 --statements 4 --variables 4 "
                      "--modulus 3 --window 9 --steps 0 --loops 1", TINY[4:])
    one, two = record["levels"].values()
    assert record["step"] == 0 and two["floor"] - one["floor"] == pytest.approx(0.01)
    for name in ("exact", "floor"):
        assert record[name] == pytest.approx((one[name] + two[name]) / 2)
    held_out = train.draw_held_out(Depo(4, 2, 2, 4), train.get_parser().parse_args(TINY))
    assert not torch.equal(*(tokens[:, :16] for tokens, *_ in held_out.values()))  # other graphs
    monkeypatch.setattr(train, "evaluate", lambda *x: {
        "loss": math.inf if x[3] == 3 else 1.0, "bit": 0, "exact": 0})
    [record] = run_of(tmp_path / "inf", "--loops 2 --steps 0 --eval_loops 1,3")
    assert [*record["eval_loops"]] == ["1"]  # 3 passes diverge: that is no end of the run


@pytest.mark.parametrize("variant, some, all", [("", 5 * 2 + 3, 5 * 3 + 3),
                                                ("awake", 5 + 3 * 2, 5 + 3 * 3)])
def test_cost_of_loops_by_hand(monkeypatch, variant, some, all):
    """Guards token passes: N counts in the looped blocks alone, also of a copied config."""
    apply(monkeypatch, variant)
    windows, half = [Window(0, 5, False), Window(5, 8, True)], Config(3, 5, loop_blocks=(1, 3))
    assert train.passes_over(windows, 3, half) == some
    for config in (Config(3, 5, "as"), replace(half, loop_blocks=None, layout="aaa")):
        assert train.passes_over(windows, 3, replace(config, layout="asasas")) == all


def test_trained_and_seen_batches(tmp_path, monkeypatch):
    """Guards what is trained on, N passes, new sequences; the loss that is logged; `seen`."""
    used, algorithm = [], train.algorithm1

    def watched(model, tokens, targets, loops, windows):
        used.append((torch.is_grad_enabled(), loops, torch.cat([tokens, targets], dim=1)))
        return algorithm(model, tokens, targets, loops, windows)

    monkeypatch.setattr(train, "algorithm1", watched)
    records = run_of(tmp_path, "--loops 2 --steps 6 --batch 4 --eval_size 14 --eval_every 1")
    trained = [batch for training, loops, batch in used if training and loops == 2]
    assert len(trained) == 6 and records[-1]["token_passes"] == 6 * 4 * (8 * 2 + 2)
    assert [record["train_loss"] for record in records[:2]] == [None, pytest.approx(math.log(3))]
    assert "seen" in records[-1] and "seen" not in records[0]
    assert torch.equal(used[-1][2], torch.cat(trained)[:14])
    assert len(torch.cat(trained).unique(dim=0)) > 12  # always new ones


def test_the_first_sequences_again_and_again(monkeypatch, capsys):
    """Guards --sequences: the same in the same order, from whatever step a run goes on."""
    monkeypatch.setattr(train, "CHUNK", 3)
    new, again = (train.get_parser().parse_args([*TINY, *given]) for given in (
        [], ["--sequences=40"]))  # 5 batches of 8
    task = Rule110(4, 2, 1)
    first = [tokens for (tokens, _), _ in zip(train.batches(task, new, 0), range(5))]
    for step in (0, 4, 13):
        batches = [tokens for (tokens, _), _ in zip(train.batches(task, again, step), range(12))]
        assert all(torch.equal(x, first[(step + i) % 5]) for i, x in enumerate(batches))
    assert "--sequences 41: must be a multiple of --batch, 8" in refused(
        capsys, [*TINY, "--sequences=41"])


def test_load_gives_the_trained_model(tmp_path):
    """Guards `load`: task, weights, N of the checkpoint, not of the start; a caller's own draws."""
    records = run_of(tmp_path, "--loops 1,2 --t 2 --seed 3 --lr 0.1")
    options, state = train.parse(train.get_parser(), TINY), torch.get_rng_state()
    task, model, loops = train.load(str(tmp_path / "N2.pt"))
    train.build(options | {"dtype": "float32"})
    assert torch.equal(state, torch.get_rng_state())
    assert (task.t, task.cells, loops) == (2, 4, 2)
    assert same_weights(model.state_dict(), weights_of(tmp_path))
    held_out = task.batch(32, generator(0, train.EVAL), "held-out", 2)
    assert algorithm1(model, *held_out, loops)[0].item() == pytest.approx(records[-1]["loss"])


def test_a_caller_s_defaults_change_nothing(tmp_path):
    """Guards `build` and `load`: the same start whatever the default device and dtype are."""
    run_of(tmp_path, "--loops 2")
    options = train.parse(train.get_parser(), TINY) | {"dtype": "float32"}
    plain = train.build(options)[1].state_dict(), train.load(tmp_path / "N2.pt")[1].state_dict()
    torch.set_default_device("meta")
    torch.set_default_dtype(torch.float64)
    try:
        ours = train.build(options)[1].state_dict(), train.load(tmp_path / "N2.pt")[1].state_dict()
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
    assert all(map(same_weights, plain, ours))


def test_same_seed_same_numbers_and_evaluation_disturbs_nothing(tmp_path):
    """Guards reproducibility: global randomness, an evaluation that draws training's."""
    for name, extra in (("a", ""), ("b", ""), ("often", "--eval_every 1"), ("seed", "--seed 2")):
        run_of(tmp_path / name, f"--steps 12 --loops 2 {extra}")
    assert_same_runs(tmp_path / "a", tmp_path / "b")
    a, often, seed = (weights_of(tmp_path / name) for name in ("a", "often", "seed"))
    assert same_weights(a, often) and not same_weights(a, seed)


@pytest.mark.parametrize("flag, value", [
    ("--loops", "0"), ("--loops", "-1"), ("--loops", "a,b"), ("--loops", "2,2"), ("--loops", ""),
    ("--loops", "2147483647"), ("--eval_loops", "1025"), ("--eval_loops", "0"), ("--t", "-1"),
    ("--t", "x"), ("--cells", "2"), ("--states", "0"), ("--automaton", "256"), ("--nodes", "9"),
    ("--loop_blocks", "1"), ("--loop_blocks", "1:1"), ("--loop_blocks", "1:3"), ("--layout", "axs"),
    ("--loop_blocks", "-1:1"),
    ("--layout", ""), ("--n_head", "3"), ("--n_head", "0"), ("--n_head", "16"), ("--d_model", "0"),
    ("--window", "0"), ("--window", "1 --eviction=sliding"), ("--eviction", "soft"),
    ("--rule", "mamba3"), ("--task", "sudoku"), ("--device", "tpu"), ("--dtype", "int8"),
    ("--fast", "graph"), ("--fast", "compile"), ("--steps", "-1"), ("--batch", "1.5"),
    ("--lr", "0"), ("--muon_lr", "nan"), ("--seed", "-1"), ("--eval_every", "0"),
    ("--eval_size", "0"), ("--init", ""), ("--init", "nowhere"),
    *([] if torch.cuda.is_available() else [("--device", "cuda")])])
def test_impossible_values(tmp_path, capsys, flag, value):
    """Guards against tracebacks and silence: the line names the flag and the value."""
    run, value, *others = tmp_path / "run", *value.split(" ")
    line = refused(capsys, [*TINY, "--loops=1", f"--out={run}", f"{flag}={value}", *others])
    assert flag in line and repr(value) in line or f"{flag} {value}: " in line
    assert ("must " in line or "choose from" in line) and not run.exists()


def test_the_size_of_the_paper(tmp_path, monkeypatch, capsys):
    """Guards --paper: what is given wins, and it is no size for other tasks. And `python -OO`."""
    monkeypatch.setattr(train, "__doc__", None)
    assert "--paper" in train.get_parser().format_help()
    options = train.parse(train.get_parser(), "--paper --d_model 64 --t 8".split())
    task, model = train.build(options | {"dtype": "float32"})
    assert (task.length, model.config.layout, model.config.d_model) == (100, "asas", 64)
    assert (options["batch"], options["steps"], options["loops"]) == (512, 782, [1, 2])
    assert "--paper: must " in refused(capsys, ["--paper", "--task", "gsm"])
    run_of(tmp_path, "--task gsm --ops 2 --statements 4 --variables 4 --steps 0 --d_model 16 "
           "--loops 1 --eval_size 8", [])
    assert "another configuration" in refused(capsys, ["--paper", "--out", str(tmp_path)])


def test_init_goes_on_from_a_trained_model(tmp_path, capsys):
    """Guards the Jet-Nemotron recipe; the old file is needed until the first checkpoint only."""
    first, more, layout = tmp_path / "first", tmp_path / "more", "--layout asas --loops"
    records = run_of(first, f"{layout} 1")
    start = f"--loop_blocks 1:3 --init {first}"
    assert run_of(tmp_path / "same", f"{layout} 1 {start}")[0]["loss"] == records[-1]["loss"]
    assert run_of(more, f"{layout} 2 {start}")[0]["loss"] != records[-1]["loss"]
    (first / "N1.pt").unlink()
    run_of(more, f"{layout} 2 {start}")
    (more / "N2.pt").unlink()
    (more / "log.jsonl").write_text((more / "log.jsonl").read_text().splitlines()[0])
    assert f"--init {first}: must be" in refused(capsys, ["--resume", str(more)])


def test_init_that_does_not_fit(tmp_path, capsys):
    """Guards --init: another layout, width or vocabulary, two models, a start for several N."""
    two, new = tmp_path / "two", tmp_path / "new"
    run_of(two, "--layout aa --loops 1,2")
    for file, options, named in (
            ("", "", f"--init {two}/: must be"), ("log.jsonl", "", "log.jsonl: must be"),
            *(("N1.pt", f"--layout {other}", "N1.pt: must be") for other in (
                "as", "aa --d_model 32", "aa --n_head 4", "aaa", "ama")),
            ("N1.pt", "--layout aa --loops 1,2", "--loops 1,2: must be one N")):
        line = [*TINY, *f"--loops 1 --out {new} --init {two}/{file} {options}".split()]
        assert named in refused(capsys, line)
    for task, words, others in (  # as many words, but others
            ("gsm --ops 1 --statements 3", "--modulus 5 --variables 8",
             "--modulus 7 --variables 6"),
            ("depo --nodes 4 --questions 2", "--names 4 --hops 4", "--names 3 --hops 6")):
        old, line = tmp_path / task[:3], f"--task {task} --loops 1 --steps 1"
        run_of(old, f"{line} {words}", TINY[4:])
        line = [*TINY[4:], *f"{line} {others} --init {old} --out {new}".split()]
        assert "vocabulary" in refused(capsys, line)
    assert not new.exists()


@pytest.mark.parametrize("loops, stop_after", [(1, 3), (1, 10), (2, 7)])
def test_resume_is_exact(tmp_path, capsys, loops, stop_after):
    """Guards --resume: Ctrl-C after any step, in either model, then on: bitwise the same."""
    whole, cut_off, options = tmp_path / "whole", tmp_path / "cut", "--steps 10 --eval_every 4"
    records = run_of(whole, options)
    run_of(cut_off, options, ctrl_c=10 * (loops - 1) + stop_after)
    assert f"python train.py --resume {cut_off}" in capsys.readouterr().err
    assert torch.load(cut_off / f"N{loops}.pt", weights_only=True)["step"] == stop_after
    log = lines_of(cut_off)[1:]
    assert log == records[:len(log)]  # of the first model too
    assert train.main(["--resume", str(cut_off)]) == 0
    assert_same_runs(whole, cut_off)
    assert [record["step"] for record in records] == [0, 4, 8, 10] * 2
    seconds = [json.loads(line)["seconds"] for line in (cut_off / "log.jsonl").open()
               if "seconds" in line]
    assert seconds[:4] == sorted(seconds[:4]) and seconds[4:] == sorted(seconds[4:])
    assert not list(tmp_path.glob("*/*.tmp"))
    log = cut_off / "log.jsonl"
    log.write_text(log.read_text().rpartition('{"loops')[0])  # killed before its last line
    assert train.main(["--resume", str(cut_off)]) == 0
    assert_same_runs(whole, cut_off)


def test_killed_at_any_moment_a_run_ends_where_it_would_have(tmp_path, monkeypatch, start):
    """Guards the files against SIGKILL, writing included: on with the same command, bitwise."""
    monkeypatch.setattr(train, "floor", floor)
    run_of(tmp_path / "start", "--loops 1")
    options = f"--steps 40 --eval_every 2 --loops 2 --seed 4 --init {tmp_path / 'start'}"
    run_of(tmp_path / "whole", options)
    codes, chance = [], random.Random(0)
    while codes.count(-signal.SIGKILL) < 3:
        codes.append(start(
            "train.py", *TINY, *options.split(), "--out", tmp_path / "cut", signal=signal.SIGKILL,
            lines=chance.randrange(1, 16), wait=chance.uniform(0, 0.02))[0])
    assert train.main(["--resume", str(tmp_path / "cut")]) == 0
    assert_same_runs(tmp_path / "whole", tmp_path / "cut")


def test_lines_arrive_and_sigterm_saves(tmp_path, start):
    """Guards output that waits in a buffer, of 400 steps; a run that a queue ends with SIGTERM."""
    options = f"--steps 100000 --eval_every 5 --loops 1 --out {tmp_path / 'run'}".split()
    code, out, err = start("train.py", *TINY, *options, signal=signal.SIGTERM, lines=10)
    assert code == 130 and "--resume" in err and "step      5" in out
    step = torch.load(tmp_path / "run/N1.pt", weights_only=True)["step"]
    assert 5 <= step < 250 and len(lines_of(tmp_path / "run")) == 2 + step // 5


@pytest.mark.parametrize("waits, says", [([0], "saved; go on with"), ([0.6], "stopped at once"),
                                         ([0.3, 0.3], "stopped at once")])
def test_ctrl_c_twice_stops_at_once(tmp_path, monkeypatch, capsys, waits, says):
    """Guards the second Ctrl-C: one line, no traceback. At once it may be the first, sent twice."""
    for wait in waits:  # [0.3, 0.3]: a key that is held down
        interrupt(monkeypatch, 2)
        monkeypatch.setattr(train, "lr_factor", lambda *x, wait=wait, later=train.lr_factor: (
            time.sleep(wait), later(*x))[1])
    run_of(tmp_path, "--loops 1", ctrl_c=2)  # the first, in the same step
    assert capsys.readouterr().err.startswith(f"train.py: {says}")


@pytest.mark.parametrize("when, code, facts", [("print_facts", 130, 0), ("floor", 130, 7),
                                               ("batches", 0, 8)])
def test_ctrl_c_after_the_end_changes_nothing(tmp_path, monkeypatch, capsys, when, code, facts):
    """Guards a finished run that is resumed and stopped; and silence before what takes long."""
    run_of(tmp_path, "--loops 1,2")
    files, once = files_in(tmp_path), iter([signal.SIGINT])
    capsys.readouterr()
    monkeypatch.setattr(train, when, lambda *_: os.kill(os.getpid(), next(once, 0)))
    assert train.main(["--resume", str(tmp_path)]) == code
    out, err = capsys.readouterr()
    assert files == files_in(tmp_path) and err.count("\n") == bool(code)
    assert out.startswith("task" * bool(facts)) and bool(out) == bool(facts)


def test_a_closed_terminal_saves(tmp_path, monkeypatch, capsys):
    """Guards SIGHUP: the run is saved, though nothing can be printed any more."""
    def closed(*_):
        os.kill(os.getpid(), signal.SIGHUP)
        monkeypatch.setattr(sys.stdout, "write", lambda _: 1 / 0)
        return 1.0

    monkeypatch.setattr(train, "lr_factor", closed)
    assert train.main([*TINY, "--steps=9", "--loops=1", "--out", str(tmp_path)]) == 130
    assert torch.load(tmp_path / "N1.pt", weights_only=True)["step"] == 1


def test_signals_of_others_are_left_alone(tmp_path, monkeypatch):
    """Guards notebooks, whose threads may not ask for signals, and a parent's ignored SIGINT."""
    seen = []
    thread = threading.Thread(target=run_of, args=(tmp_path / "thread", "--loops 1"))
    thread.start()
    thread.join()
    assert len(lines_of(tmp_path / "thread")) == 1 + 2
    monkeypatch.setattr(train, "lr_factor", lambda *_: seen.append(
        signal.getsignal(signal.SIGINT)) or 1.0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    run_of(tmp_path / "ignored", "--loops 1 --steps 1")
    assert seen == [signal.SIG_IGN] == [signal.getsignal(signal.SIGINT)]


def test_what_was_there_is_kept(tmp_path, monkeypatch, capsys):
    """Guards results: an --out in use is refused, one log has one writer, a table is only shown."""
    run, other = tmp_path / "run", tmp_path / "other"
    other.mkdir()
    (other / "thesis.tex").write_text("years of work")
    for folder in (run, other):
        run_of(folder, "--loops 1")
    files, base = files_in(run), [*TINY, "--steps=3", "--loops=1", "--out"]
    assert "another configuration" in refused(capsys, [*base, str(run), "--seed", "2"])
    with train.locked(run):
        for arguments in ([*base, str(run)], ["--resume", str(run)]):
            assert "in use" in refused(capsys, arguments)
    monkeypatch.setattr(train, "write", lambda *_: 1 / 0)
    for arguments in ([*base, str(run)], ["--resume", str(run)], [f"--resume={run}"]):
        assert train.main(arguments) == 0 and "token passes" in capsys.readouterr().out
    assert files == files_in(run)
    assert "--out" in refused(capsys, [*base, str(other / "thesis.tex")])
    assert files_in(other)["thesis.tex"] == b"years of work"
    (other / "log.jsonl").unlink()
    assert "N1.pt without its log" in refused(capsys, [*base, str(other)])


def test_damaged_resume(tmp_path, capsys):
    """Guards --resume: missing, empty, truncated, of another model or N, or with other options."""
    for name, extra in (("a", ""), ("wide", "--d_model 32"), ("seed", "--seed 2")):
        run_of(tmp_path / name, f"--loops 1,2 {extra}")
    log, weights = tmp_path / "a/log.jsonl", tmp_path / "a/N1.pt"
    kept, saved = weights.read_bytes(), torch.load(weights, weights_only=True)
    resume = ["--resume", str(tmp_path / "a")]
    assert "no log.jsonl" in refused(capsys, ["--resume", str(tmp_path / "missing")])
    assert "no other option" in refused(capsys, [*resume, "--steps", "9"])
    others = [tmp_path / name for name in ("a/N2.pt", "wide/N1.pt", "seed/N1.pt")]
    damaged = [kept[:1000], kept[:-100], b"", *(path.read_bytes() for path in others)]
    for wrong in ({"records": [{}]}, {"records": [{"step": 0}]}, {"records": 5},
                  {"optimizers": []}, {"step": 4}, {"step": None}, {"seconds": None}):
        torch.save(saved | wrong, weights)
        damaged.append(weights.read_bytes())
    for content in damaged:
        weights.write_bytes(content)
        before = log.read_bytes()
        assert "N1.pt: must be" in refused(capsys, resume)
        assert log.read_bytes() == before and weights.read_bytes() == content
    weights.unlink()
    assert "N1.pt" in refused(capsys, resume)
    header = json.loads(log.read_text().splitlines()[0])
    wrong = [("cells", "4"), ("task", "zzz"), ("dtype", "float8"), ("loops", [0]), ("t", None),
             ("cells", 2)]
    texts = [json.dumps(header | {"config": header["config"] | {name: x}}) for name, x in wrong]
    for text in ("", "{", "{}\n", '{"config": {}}\n', *texts, '{"config": %s}' % texts[0],
                 100_000 * "["):
        log.write_text(text)
        refused(capsys, resume)


@pytest.mark.parametrize("what, every, ctrl_c", [
    *product(("loss", "gradient"), (4, 100), (None, 10))])
def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, monkeypatch, capsys, what, every,
                                                 ctrl_c):
    """Guards the last good checkpoint: the step is named, nothing is saved after it."""
    original, calls = train.algorithm1, iter(range(1, 100))

    def diverging(model, *rest):
        loss, *others = original(model, *rest)
        if next(calls) == 9:  # the root has value 0 and no derivative
            loss = loss * math.nan if what == "loss" else loss + (0 * loss).sqrt()
        return (loss, *others)

    monkeypatch.setattr(train, "algorithm1", diverging)
    monkeypatch.setattr(train, "evaluate", lambda *_: {"loss": 1.0, "bit": 0.5, "exact": 0.1})
    arguments = [*TINY, *f"--steps 40 --eval_every {every} --loops 1 --out {tmp_path}".split()]
    interrupt(monkeypatch, ctrl_c)
    assert train.main(arguments) == 1
    line = capsys.readouterr().err
    assert "step 9;" in line and str(tmp_path / "N1.pt") in line and line.count("\n") == 1
    saved = torch.load(tmp_path / "N1.pt", weights_only=True)
    assert saved["step"] == (8 if every == 4 else 0) and next(calls) < 22
    assert all(x.isfinite().all() for x in saved["model"].values())


def test_weights_that_overflow_are_not_saved(tmp_path):
    """Guards the last update before an evaluation, whose loss nobody has seen yet."""
    arguments = [*TINY, *"--steps 30 --eval_every 1 --loops 1 --muon_lr 1e30".split()]
    assert train.main([*arguments, "--out", str(tmp_path)]) == 1
    assert all(math.isfinite(record["loss"]) for record in lines_of(tmp_path)[1:])
    assert all(x.isfinite().all() for x in weights_of(tmp_path, 1).values())


@pytest.mark.parametrize("where, error, says", [
    ((train, "train_model"), RuntimeError("Failed to find C compiler"), "no C compiler"),
    ((train, "train_model"), torch.OutOfMemoryError("CUDA out of memory"), "not enough memory"),
    ((train, "train_model"), RuntimeError("can't allocate memory"), "not enough memory"),
    ((os, "fsync"), OSError(28, "No space left on device"), "No space left on device: '{}/N1.pt'")])
def test_what_the_machine_lacks_is_one_line(tmp_path, monkeypatch, capsys, where, error, says):
    """Guards a traceback from deep inside torch or Triton; the old checkpoint is whole."""
    run_of(tmp_path, "--loops 1", ctrl_c=2)
    files = files_in(tmp_path)
    monkeypatch.setattr(*where, lambda *_: (_ for _ in ()).throw(error))
    assert says.format(tmp_path) in refused(capsys, ["--resume", str(tmp_path)])
    (tmp_path / "N1.pt.tmp").unlink(missing_ok=True)
    assert files_in(tmp_path) == files


def test_closed_output_loses_words_only(tmp_path, monkeypatch):
    """Guards `>&- 2>&-`, where Python has no stdout and no stderr."""
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    run_of(tmp_path, "--loops 1")


def test_a_terminal_gets_what_it_can_show(tmp_path, monkeypatch):
    """Guards a terminal of ASCII alone, and names that it cannot show."""
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), "ascii"))
    run_of(tmp_path / "ünï", "--loops 1")
    sys.stdout.seek(0)
    assert r"\xfcn\xef" in sys.stdout.read()


def test_files_are_utf_8():
    """Guards files against the locale, whatever it is: each program names their encoding."""
    for path in (*HERE.glob("[!t]*.py"), HERE / "train.py", *HERE.glob("results/*.py")):
        assert not re.search(r"(read_text|write_text|\bopen)\(\)", path.read_text("utf-8")), path


def test_half_a_launcher_is_none(monkeypatch):
    """Guards TORCHELASTIC_RUN_ID alone in the environment: the run is as without torchrun."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    monkeypatch.delenv("RANK", raising=False)
    assert runpy.run_path(train.__file__)["RANKS"] == 1


def test_the_commit_is_this_repository_s(tmp_path, monkeypatch):
    """Guards a copy without .git in another repository: that one's commit says nothing."""
    for name in [name for name in os.environ if name.startswith("GIT_") or name == "COMMIT"]:
        monkeypatch.delenv(name)  # GIT_DIR would lead to the user's own repository
    subprocess.run("git init -q && git -c user.name=a -c user.email=b commit -q --allow-empty -m c",
                   shell=True, check=True, cwd=tmp_path)
    monkeypatch.setattr(train, "__file__", str(tmp_path / "train.py"))
    assert train.make_header([], {"device": "cpu"}, "train.py")["commit"] == "unknown"


def test_ranks_together_are_one_process(tmp_path, start):
    """Guards torchrun: two processes (gloo, on a CPU) do what one does, to rounding, with as many
    scored tokens or not, or where one began; they must divide the batch. All in one launch."""
    depo = "--task depo --nodes 4 --hops 2 --questions 2 --names 4 --window 16".split() + TINY[4:]
    options = "--loops 2 --steps 20 --eval_every 10"
    run_of(tmp_path / "depo", options, depo)
    run_of(tmp_path / "whole", options)
    run_of(tmp_path / "cut", options, ctrl_c=7)
    lines = [[*depo, *options.split(), "--out", str(tmp_path / "two")],
             ["--resume", str(tmp_path / "cut")], [*TINY, "--batch=7", f"--out={tmp_path / 'new'}"]]
    (tmp_path / "ranks.py").write_text(
        f"import sys\nsys.path.insert(0, {str(HERE)!r})\nimport train\n"
        f"train.floor = lambda *_: 0\nassert not any(train.main(line) for line in {lines!r})\n")
    launcher = Path(torch.__file__).parent / "distributed/run.py"
    code, out, err = start(launcher, "--standalone", "--nproc_per_node=2", tmp_path / "ranks.py")
    for a, b in ((tmp_path / "depo", tmp_path / "two"), (tmp_path / "whole", tmp_path / "cut")):
        for name, weight in weights_of(a).items():
            torch.testing.assert_close(weights_of(b)[name], weight, rtol=1e-4, atol=1e-5)
        for one, other in zip(lines_of(a)[1:], lines_of(b)[1:], strict=True):
            assert one["step"] == other["step"]
            for name in ("loss", *["train_loss"] * (one["step"] > 0)):
                assert one[name] == pytest.approx(other[name], rel=1e-4)
    assert out.count("floor   always") == 2 and out.count("N 2  step ") == 3 + 2  # 2: not 0 again
    assert code != 0 and not (tmp_path / "new").exists()
    assert re.findall(r"^train.py: .*", err, re.M) == [
        "train.py: error: --batch 7: must be a multiple of the 2 processes (see --help)"]


@cuda
@pytest.mark.parametrize("fast, variant, options", [
    ("graph", "", ""), ("graph", "", "--eviction=sliding"), ("graph", "last_pass", ""),
    ("graph", "graft", "--layout=asmas --init={old}"), ("compile", "", ""),
    ("compile", "pass_vector", ""), ("compile", "", "--eviction=sliding")])
def test_fast_steps_equal_eager_steps(tmp_path, monkeypatch, fast, variant, options):
    """Guards the captured step: the same losses over 20 steps, also when resumed in the middle."""
    size = "--layout=asas --d_model=64 --eval_every=5 --batch=64 --loops=2 --steps=20 --device=cuda"
    run, old, resumed = partial(run_of, size=size.split()), tmp_path / "old", tmp_path / "resumed"
    if variant == "graft":
        run(old)
    apply(monkeypatch, variant)
    options = options.format(old=old)
    eager, ours = (run(tmp_path / x, f"--fast={x} {options}") for x in ("eager", fast))
    assert eager[-1]["loss"] < eager[0]["loss"]
    run(resumed, f"--fast={fast} {options}", ctrl_c=10)
    assert torch.load(resumed / "N2.pt", weights_only=True)["step"] == 10
    for records in (ours, run(resumed, f"--fast={fast} {options}")):
        for a, b in zip(records, eager, strict=True):
            assert a["step"] == b["step"]
            assert math.isclose(a["loss"], b["loss"], rel_tol=1e-4 if fast == "graph" else 2e-2)


@cuda
@pytest.mark.parametrize("fast", ["graph", "compile"])
def test_rates_act_inside_the_graph(fast):
    """Guards the schedule: a rate that the recording froze. And evaluation compiles nothing."""
    from torch._dynamo.utils import counters
    task, rates = Rule110(), train.get_parser().parse_args(["--muon_lr=1e-3", "--lr=1e-3"])
    model = Hybrid(Config(len(task.words), task.window, dtype="bfloat16", d_model=64)).cuda()
    optimizers, windows = train.make_optimizers(model, 1e-3, 1e-3), train.windows_of(task, 12)
    step = train.recorded(partial(train.training_step, model, optimizers, 2, windows), model, fast)
    batch, states = task.batch(32, generator(1, 0, 0, "cuda")), []
    for factor in (1, 1, 1, 1, 1, 0, 0, 1):
        train.set_rates(optimizers, rates, factor)
        step(*batch)
        states.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.equal(states[4], states[5]) and torch.equal(states[5], states[6])
    assert not torch.equal(states[3], states[4]) and not torch.equal(states[6], states[7])
    graphs = dict(counters["stats"])
    with train.uncompiled(fast):
        train.evaluate(model, *batch, 2, windows)
    assert dict(counters["stats"]) == graphs


# ========================================================================================= results/

@pytest.mark.parametrize("program, line, says", [
    ("train.py", "--loops 0", "train.py: error: argument --loops: '0': must be"),
    ("results/dream.py", "--loops 3", "dream.py: error: every N must be even"),
    ("results/dream.py", "--steps 3", "dream.py: error: --steps 3: must be at least one for each"),
    ("results/night.py", "out", "night.py: error: out: must hold a checkpoint N*.pt; python "
     "train.py makes one\n"),
    ("results/reach.py", "1 --loops 0", "reach.py: error: argument --loops: '0': must be"),
    ("results/reach.py", "", "reach.py: error: the seeds must come first"),
    ("results/reach.py", "1 --t 5", "reach.py: error: --t must be one of"),
    ("results/reach.py", "1 --t 8 --cells 2", "reach.py: error: --cells 2: must be"),
    ("results/render.py", "--all", "render.py: error: unrecognized arguments: --all"),
    *(("results/bench.py", f"--device=cpu {line}", f"bench.py: error: {says}") for line, says in (
        ("--init x", "--init: must"), ("--eval_loops 4", "--eval_loops: must"),
        ("--resume x", "--resume: must"), ("--cells 2", "--cells 2: must"),
        ("--task gsm --cells 4", "--cells 4: must"), ("--fast graph", "--fast graph: must"),
        ("--out missing/x.jsonl", "--out missing/x.jsonl: "))),
    *(("results/variants.py", line, says) for line, says in (
        ("", "variants.py: error: '': must be one of position, embed, "),
        ("what", "'what': must be one of"), ("embed+", "'embed+': must be one of"),
        ("--loops=2", "'--loops=2': must be one of"), ("embed+reset_S", "must not change the "),
        ("embed+embed", "variants.py: error: 'embed+embed': must not change the same thing twice"),
        ("embed --loops=0", "variants.py embed: error: argument --loops: '0': must be")))])
def test_every_program_starts_anywhere(tmp_path, start, program, line, says):
    """Guards `python results/X.py` in any folder: its imports; one line for what is wrong."""
    code, out, err = start(program, *line.split(), folder=tmp_path)
    assert (code, out, err.count("\n")) == (2, "", 1) and says in err, err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("layout, loops, variant, shape", [
    ("asas", 1, "", {}), ("sa", 3, "", {}), ("as", 2, "awake", {}),
    ("asas", 3, "", {"loop_blocks": (1, 3)}), ("asas", 3, "", {"loop_blocks": (2, 4)})])
def test_model_flops_by_counting(monkeypatch, layout, loops, variant, shape):
    """Guards the share of the peak: the formula against torch's own count of a step's products."""
    from torch.utils.flop_counter import FlopCounterMode
    apply(monkeypatch, variant)
    model = Hybrid(Config(2, 64, layout, 64, n_head=2, **shape))
    tokens, targets = sequences(windows=2, window=64, rest=64)
    windows = cut(targets, 64)
    with FlopCounterMode(display=False) as counter:
        loss, *_ = train.algorithm1(model, tokens % 2, targets.clamp(max=1), loops, windows)
        loss.backward()
    ours = 2 * bench.model_flops(model, windows, loops, awake=variant == "awake")
    assert 0.85 < counter.get_total_flops() / ours < 1.15, (counter.get_total_flops(), ours)


def test_bench(tmp_path, monkeypatch, capsys):
    """Guards the bench: bytes that depend on the context, a row without its facts, lost rows."""
    fastest = bench.fastest
    monkeypatch.setattr(bench, "fastest", lambda function, device, _: fastest(function, device, 1))
    monkeypatch.setattr(bench, "SECONDS", 1e-9)
    monkeypatch.setattr(bench, "CONTEXTS", (1, 10, 50))
    command = [*TINY, "--states=2", "--loops=1,2", f"--out={tmp_path / 'bench.jsonl'}"]
    assert bench.main(command) == 0
    header, rate, *rows = map(json.loads, (tmp_path / "bench.jsonl").read_text().splitlines())
    speed, memory, config = rows[:-3], rows[-3:], header["config"]
    assert header["command"].startswith("python results/bench.py --cells 4 ")
    assert (config["layout"], config["fast"], config["dtype"]) == ("asas", "eager", "float32")
    assert rate["matrix_rate"] > 0 and [(row["loops"], row["window"]) for row in speed] == [
        (1, 4), (2, 4), (1, 2), (1, 8), (1, 10)]
    assert all(row[key] > 0 for row in speed for key in (
        "ms", "tokens_per_s", "first_step_s", "ready_s", "flops", "wake_ms", "sleep_ms"))
    assert [row["windows"] for row in memory] == [1, 10, 50]
    assert len({(row["S"], row["cache"]) for row in memory}) == 1
    first, _, last = (row["never_evicted"] for row in memory)
    keys = 2 * 2 * 4 * 16 * 4  # two blocks, keys and values, L, d, bytes
    assert first == memory[0]["cache"] and last == first + 49 * keys
    assert len(capsys.readouterr().out.splitlines()) == 5 + len(speed) + 2 + len(memory)
    assert "must be a new file" in refused(capsys, command, bench.main)
    monkeypatch.setattr(bench, "bench_row", lambda options, loops: speed[0] if loops == 1
                        else os.kill(os.getpid(), signal.SIGINT))
    command[-1] = f"--out={(half := tmp_path / 'half.jsonl')}"
    assert bench.main(command) == 130 and "bench.py: stopped" in capsys.readouterr().err
    assert json.loads(half.read_text().splitlines()[-1]) == speed[0]


def test_a_dream_reads_what_it_said_and_is_told_the_states():
    """Guards a round that reads or is told another window, or hands on h, a cache, no S."""
    k, R, B = 2, 3, 4
    tokens, answers, states = dream.draw(Rule110(5, 2, R * k), k, B, generator(0, 0), "train")
    for b, w, r in product(range(B), range(2), range(R)):
        assert torch.equal(states[b, w, r], rule110(tokens[b, 5 * w:5 * w + 5], k * (r + 1)))
    assert torch.equal(answers, states[:, :, -1, 0])
    model = dream.dreamer(Config(3, 5, "asas", 16, 2, "float64")).double()
    torch.nn.init.normal_(model.out.weight, std=0.3)
    S, told, dreamt = model.empty_memory(B).S, 0, []

    def one_pass(h):
        nonlocal S
        h, (_, S) = model.blocks(h, Memory((None,) * 4, S), 0, 4)
        return h

    for w in range(2):
        read = tokens[:, 5 * w:5 * w + 5]
        for r in range(R):
            said = model.unembed(one_pass(one_pass(model.embedding[read] + model.position)))
            told += F.cross_entropy(said.mT, states[:, w, r]) / (2 * R)
            read = 3 + said.argmax(-1)
            dreamt.append(read)
    answered = model.unembed(one_pass(model.embedding[tokens[:, 10:]] + model.position[:2]))
    literal = F.cross_entropy(answered.mT, answers) + told
    assert len(torch.cat(dreamt).unique(dim=0)) > 6  # else a wrong window might look right
    loss, logits, _ = dream.algorithm1(model, tokens, answers, states)
    torch.testing.assert_close(logits, answered)
    assert_same_values_and_gradients([loss], [literal], [*model.parameters()])


def test_a_dream_is_asked_in_proportion(tmp_path, monkeypatch, capsys):
    """Guards results/dream.py as a program: N passes dream N / 2 times k steps, a line for each."""
    used, algorithm1 = [], dream.algorithm1

    def watched(model, tokens, answers, states):
        expected = rule110(tokens[:, :4], 3 * states.shape[2])
        assert torch.equal(states[:, 0, -1], expected) and torch.equal(answers, expected[:, :1])
        used.append(2 * states.shape[2])
        return algorithm1(model, tokens, answers, states)

    monkeypatch.setattr(dream, "algorithm1", watched)
    dream.main("--t 6 --loops 4 --schedule 2,4 --eval_loops 8 --cells 4 --states 1 --layout as "
               "--d_model 16 --n_head 2 --batch 8 --steps 4 --eval_size 16 --device cpu --out "
               f"{tmp_path}/log.jsonl".split())
    assert used == [2, 2, 2, 4, 4, 4, 2, 4, 8]
    header, *records = lines_of(tmp_path)
    assert {"commit", "versions", "hardware", "config"} == header.keys()
    assert [(x["loops"], x["t"], x["step"]) for x in records] == [
        (2, 3, 2), (4, 6, 2), (2, 3, 4), (4, 6, 4), (8, 12, 4)]
    assert len(capsys.readouterr().out.splitlines()) == len(records)


@pytest.mark.parametrize("options", [
    "", "--states 3 --eviction sliding", "--layout asas --loop_blocks 1:3", "--layout aa",
    "--eviction none", "--task depo --nodes 4 --hops 2 --questions 2 --names 4 --window 16",
    "--task gsm --ops 1 --statements 3 --modulus 3 --variables 3 --window 8"])
def test_a_night_is_what_algorithm1_does(options, tmp_path, capsys, monkeypatch):
    """Guards results/night.py: its answers, and those behind each pass, are those of training."""
    monkeypatch.chdir(tmp_path)
    run_of("out/new", f"{options} --muon_lr=0.1", TINY[4:] if "--task" in options else TINY)
    task, model, N = train.load("out/new/N2.pt")
    tokens, targets = task.batch(1, torch.Generator().manual_seed(night.SEED), "held-out",
                                 task.levels[-1])
    *asleep, asked = cut(targets, model.config.window)

    def answers(nights):
        memory = model.empty_memory(1)
        for passes_there, (start, stop, _) in zip(nights, asleep, strict=True):
            if passes_there:
                memory = sleep(model, tokens[:, start:stop], memory, passes_there)
            memory = evict(memory, model.config.keep)
        p = wake(model, tokens[:, asked.start:], memory)[0].softmax(-1)[0]
        said = [f"{task.words[x.argmax()]} {x.max():.2f}" + " (no)" * (x.argmax() != y)
                for x, y in zip(p, targets[0, asked.start:].tolist()) if y >= 0]
        return said[:4]

    capsys.readouterr()
    with torch.no_grad():
        night.night([])
        out = capsys.readouterr().out
        shown = [(int(i), int(n), said.split(", ")) for i, n, said in
                 re.findall(r"^night (\d+)   pass (\d+).* -> would say (.*)$", out, re.M)]
        assert shown == [(i + 1, n, answers([N] * i + [n] + [N] * (len(asleep) - i - 1)))
                         for i in range(len(asleep)) for n in range(N + 1)]
        assert re.search("^answers   (.*)$", out, re.M)[1].split(", ") == answers([N] * len(asleep))
        one, two = (sleep(model, tokens[:, :asleep[0].stop], model.empty_memory(1), n).S
                    for n in (1, 2))
    moved = [f"{(b - a).norm() / b.norm():.2f}" for a, b in zip(one, two) if b is not None]
    assert re.findall(r"^night 1   pass 2, S moves (.*) ->", out, re.M) == [" ".join(moved)] * (
        moved != [])
    truth = [task.words[x] for x in targets[targets >= 0]][:4]
    assert out.splitlines()[-1] == "truth     " + ", ".join(truth)
    read = " ".join(re.findall(r"^window \d+  reads (.*) -> ", out, re.M)).split()
    assert read == [task.words[x] for x in tokens[0]] and max(map(len, out.splitlines())) <= 100
    kept = {"hard": 0, "sliding": task.window - 1}.get(model.config.eviction, len(tokens[0]))
    assert f"over -> cache {min(kept, asleep[-1].stop)} entries" in out
    if "a" in model.config.layout:
        assert f"-> cache {model.config.keep or model.config.window} entries" in out


def show_night(path):
    return train.in_one_line("night.py", night.night, [str(path)])


def test_a_night_that_cannot_be_shown_is_refused(tmp_path, capsys):
    """Guards tracebacks: what is scored in two windows, no checkpoint, a damaged one."""
    two = tmp_path / "two"
    run_of(two, "--task=depo --nodes=4 --hops=2 --questions=2 --names=4 --window=8 --loops=2 "
           "--steps=0", TINY[4:])
    (tmp_path / "N1.pt").write_text("damaged")
    for path, says in ((two, f"{two / 'N2.pt'}: window 8: must leave"),
                       (tmp_path / "none", f"{tmp_path / 'none'}: must hold a checkpoint"),
                       (tmp_path, f"{tmp_path / 'N1.pt'}: must be a checkpoint")):
        assert refused(capsys, path, show_night).startswith(f"night.py: error: {says}")


def test_the_night_of_the_readme(tmp_path, monkeypatch, capsys):
    """Guards the weights that come with the repository: they load, solve the task, and their night
    is the README's."""
    monkeypatch.chdir(tmp_path)  # nothing is under out/
    night.night([])
    said = re.sub(r"[01]\.\d\d", "0.00", capsys.readouterr().out)
    [shown] = re.findall(r"^```\n(window 2 .*?)^```", README, re.M | re.S)
    assert re.sub(r"[01]\.\d\d", "0.00", shown) in said
    task, model, loops = train.load(night.LAPTOP / "N2.pt")
    batch = task.batch(256, generator(0, train.EVAL), "held-out")
    scores = train.evaluate(model, *batch, loops, train.windows_of(task, model.config.window))
    assert scores["exact"] > 0.95 and (night.LAPTOP / "N2.pt").stat().st_size < 500_000


def vary(name):
    """`python results/variants.py NAME`, in this process, which is as before after it."""
    def main(arguments):
        with pytest.MonkeyPatch.context() as patch:
            for module, attribute, _ in sum((make() for make in variants.VARIANTS.values()), []):
                patch.setattr(module, attribute, getattr(module, attribute))
            patch.setattr(train, "VARIANT", None)
            return variants.main([name, *arguments])
    return main


WORDS = [  # every variant but graft, whose words are those of its own tests
    ("position", "as", 2, {}), ("embed", "sas", 2, {}), ("reset_S", "sa", 3, {}),
    ("reset_S", "sas", 2, {"loop_blocks": (1, 3)}), ("awake", "asas", 2, {}),
    ("awake", "aa", 2, {}),
    ("embed", "asam", 2, {"eviction": "sliding", "loop_blocks": (1, 4)}),
    ("last_pass", "asas", 3, {}), ("last_pass", "sas", 2, {"loop_blocks": (1, 3)}),
    ("inject", "asas", 3, {}), ("inject", "sas", 2, {"loop_blocks": (1, 3), "eviction": "sliding"}),
    ("pass_vector", "as", 17, {}), ("pass_vector", "sas", 3, {"loop_blocks": (1, 3)}),
    ("embed+position", "sa", 2, {})]
OF_GRADIENTS = {"last_pass"}  # variants with the plain loss
OF_ONE_PASS = {"position", "pass_vector", "graft"}  # variants that change N = 1 too


def test_every_variant_has_its_words():
    """Guards a variant of one's own: `literal_algorithm1` says what it does, and is compared."""
    named = {name for names, *_ in WORDS for name in names.split("+")}
    assert named | {"graft"} == {*variants.VARIANTS}, "name each in VARIANTS and in WORDS"
    for name in named:
        assert f'"{name}" in changed' in inspect.getsource(literal_algorithm1), (
            f'literal_algorithm1 must say what {name} changes: if "{name}" in changed')


@pytest.mark.parametrize("variant, layout, loops, shape", WORDS)
def test_variants_equal_their_words(monkeypatch, variant, layout, loops, shape):
    """Guards what a variant is: values, gradients of every parameter; that it is not plain."""
    apply(monkeypatch, variant)
    model, batch = hybrid(layout, **shape), sequences(windows=2, rest=4, scored=3)
    assert_is_literal(model, *batch, loops, variant)
    ours, plain = (with_gradients([loss], [*model.parameters()]) for loss in (
        train.algorithm1(model, *batch, loops)[0], literal_algorithm1(model, *batch, loops)))
    assert torch.isclose(ours[0], plain[0], rtol=1e-9) == (variant in OF_GRADIENTS), (
        "it changes nothing, or gradients alone: name it in OF_GRADIENTS then")
    assert not all(map(partial(torch.allclose, rtol=1e-9), ours, plain)), "it changes nothing"


@pytest.mark.parametrize("variant", [x for x in variants.VARIANTS if x not in OF_ONE_PASS])
def test_one_pass_of_a_variant_is_the_plain_hybrid(monkeypatch, variant):
    """Guards comparisons: with N = 1 a variant changes nothing, bitwise, gradients included."""
    model, batch, ends = hybrid(), sequences(), []
    for name in ("", variant):
        apply(monkeypatch, name)
        ends.append(with_gradients([train.algorithm1(model, *batch, 1)[0]], [*model.parameters()]))
    assert all(map(torch.equal, *ends)), "it changes N = 1: name it in OF_ONE_PASS then"


def test_the_last_pass_alone_still_trains_every_window(monkeypatch):
    """Guards the S of a window's start, detached: no window but the last would learn anything."""
    apply(monkeypatch, "last_pass")
    model, kept, core = hybrid(), [], train.Hybrid.core
    model.core = lambda *arguments: kept.append(core(model, *arguments)) or kept[-1]
    loss = train.algorithm1(model, *sequences(windows=3), 3)[0]
    S = [after.S[1] for _, after in kept]
    assert [x.requires_grad for x in S] == [False, False, True] * 3 + [True]
    for gradient in torch.autograd.grad(loss, [S[i] for i in (2, 5, 8)]):
        assert gradient.abs().max() > 1e-6


def test_a_variant_s_run(tmp_path, capsys):
    """Guards `python results/variants.py NAME`: its log, going on, who takes it for a plain run."""
    plain, whole, embed = tmp_path / "plain", tmp_path / "whole", vary("embed")
    options = [*TINY, "--steps=3", "--loops=2", "--out"]
    run_of(plain, "--loops 2")
    run_of(whole, "--loops 2", main=embed)
    out = capsys.readouterr().out
    assert "variant embed (results/variants.py)" in out and "token passes" in out
    config = lines_of(plain)[0]["config"]
    assert lines_of(whole)[0]["config"] == config | {"variant": "embed"}
    assert not same_weights(weights_of(plain), weights_of(whole))
    for goes_on in (options, ["--resume"]):
        run_of(folder := tmp_path / goes_on[0], "--loops 2", main=embed, ctrl_c=2)
        assert f"python results/variants.py embed --resume {folder}" in capsys.readouterr().err
        assert embed([*goes_on, str(folder)]) == 0
        assert_same_runs(whole, folder)
    for main, given, right in (
            (partial(train.in_one_line, "load", train.load), whole / "N2.pt", "embed"),
            (show_night, whole, "embed"),
            (train.main, ["--resume", str(whole)], "embed"),
            (train.main, [*options, str(whole)], "embed"),
            (vary("reset_S"), ["--resume", str(whole)], "embed"),
            (embed, ["--resume", str(plain)], ""), (embed, [*options, str(plain)], "")):
        right = f"results/variants.py {right}" if right else "train.py"
        assert f"it takes python {right}\n" in refused(capsys, given, main)
    start = run_of(tmp_path / "start", f"--loops 2 --init {whole}")  # its weights fit
    assert start[0]["loss"] != run_of(tmp_path / "fresh", "--loops 2")[0]["loss"]
    run_of(tmp_path / "position", "--loops 2", main=vary("position"))
    line = [*options, str(tmp_path / "new"), f"--init={tmp_path / 'position'}"]
    assert "--init" in refused(capsys, line)


def test_grafted_memories_start_as_the_identity(tmp_path, capsys):
    """Guards the Ouro recipe: new blocks change nothing at first, and only they are trained."""
    looped, grafted, graft = tmp_path / "looped", tmp_path / "grafted", vary("graft")
    at_once, start = "--loops 2 --window 10", f"--loops 2 --layout ama --init {looped}"
    records = run_of(looped, f"{at_once} --layout aa", main=vary("awake"))
    same = run_of(tmp_path / "same", f"{at_once} {start}", main=vary("awake+graft"))
    assert same[0]["loss"] == pytest.approx(records[-1]["loss"], abs=1e-6)
    run_of(grafted, start, main=graft)  # hard eviction, real sleeps
    old, new = weights_of(looped), weights_of(grafted)
    assert all(torch.equal(x, new[name.replace("layers.1.", "layers.2.")])
               for name, x in old.items())
    assert new["layers.1.mixer.out.weight"].any()
    (looped / "N2.pt").unlink()
    run_of(grafted, start, main=graft)  # a finished run needs it no more
    start = f"--loops 2 --layout ama --init {grafted}"
    run_of(tmp_path / "again", start, main=graft)  # a model that has the blocks already
    run_of(tmp_path / "both", f"{start} --eviction sliding")
    assert not torch.equal(weights_of(tmp_path / "both")["embedding"], old["embedding"])
    for options, says in ((f"--layout aa --init {looped}", "--layout aa: must have blocks m"),
                          ("--layout ama", "--init None: must name the trained model")):
        assert says in refused(capsys, [*TINY, "--loops=2", *options.split()], graft)


def test_reach(tmp_path, monkeypatch, capsys):
    """Guards results/reach.py: a constant rate until the tokens are spent, or until the level is
    reached in two evaluations; what was stopped goes on; a log that is there stays, a run that
    another process makes is left to it."""
    rates, factor, logs = [], train.lr_factor, tmp_path / "reach"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "lr_factor", lambda *x: rates.append(factor(*x)) or rates[-1])
    monkeypatch.setattr(reach, "__file__", f"{logs}.py")
    monkeypatch.setattr(reach, "PROTOCOL", {1: (6 * 512 * 10 / 1e6, 2, 0.9)})  # six steps
    arguments = [*TINY, "--batch=512", "--loops=2", "--layout=aa"]
    [same] = run_of(tmp_path, "--seed=1 --steps=0 --eval_size=4096", arguments)
    monkeypatch.setattr(train, "evaluation", lambda *x: reach.evaluation(*x))
    with monkeypatch.context() as patch:
        interrupt(patch, 6 + 3)  # the second run's third step
        assert train.in_one_line("reach.py", reach.main, ["1,2", *arguments]) == 130
    assert capsys.readouterr().err == "reach.py: saved; the same command goes on\n"
    first = files_in(logs)
    reach.main(["1,2", *arguments])
    assert len(first) == 1 and first.items() <= files_in(logs).items()
    monkeypatch.setattr(reach, "evaluation", lambda run, data, of=reach.evaluation: of(
        run, data) | {"exact": float(run.step > 0)})
    with train.locked(Path("out/reach/t1-N2-s2")):
        (logs / "t1-N2-s2.jsonl").rename(kept := tmp_path / "kept")
        capsys.readouterr()
        reach.main(["2,3", *arguments])
        assert "t1-N2-s2: left to the process that makes it" in capsys.readouterr().out
        assert not (logs / "t1-N2-s2.jsonl").exists()
    kept.rename(logs / "t1-N2-s2.jsonl")
    (logs / "t1-N2-s3.jsonl").unlink()
    reach.main(["3", *arguments])  # made again
    for seed, steps in ((3, [0, 2, 4]), (2, [0, 2, 4, 6]), (1, [0, 2, 4, 6])):
        header, *records = map(json.loads, (logs / f"t1-N2-s{seed}.jsonl").open())
        assert header["config"]["seed"] == seed and [x["step"] for x in records] == steps
    assert set(rates) == {1.0}
    for name in ("loss", "bit", "exact"):
        assert records[0][name] == pytest.approx(same[name])


def test_rendered_is_what_is_there():
    """Guards honest results, and the map from paper to code: tables and line numbers are made."""
    stale = [str(path.relative_to(HERE)) for path, text in render.rendered().items()
             if path.read_text() != text]
    assert not stale, f"{', '.join(stale)}: out of date, run: python results/render.py"


def test_every_number_of_a_row_is_of_its_logs(tmp_path, monkeypatch):
    """Guards the tables themselves: a row's numbers by hand, and logs of another command."""
    monkeypatch.setattr(render, "HERE", tmp_path)
    row = render.Row("a row", "--t 4 --steps 8", "x*.jsonl")
    monkeypatch.setitem(render.ROWS, row.logs, row)
    config = {"t": 4, "steps": 8, "position": "none", "seed": 1, "gone": "an option of old",
              "layout": "as", "task": "rule110", "batch": 64, "loops": [1, 2]}

    def log(seed, exact, **other):
        header = {"hardware": "NVIDIA H200", "commit": "c",
                  "config": config | {"seed": seed} | other}
        records = [{"loops": n, "step": step, "tokens": 3e6, "floor": 0.25, "seconds": 90.0,
                    "exact": exact * n if step else 0} | levels for n in (1, 2) for step in (0, 8)]
        (tmp_path / f"x{seed}.jsonl").write_text("\n".join(map(json.dumps, [header, *records])))
        render.read.cache_clear()
        render.experiment.cache_clear()

    levels = {}
    for seed, score in enumerate((0.25, 0.5, 0.3), 1):
        log(seed, score)
    monkeypatch.setattr(render, "flops", lambda logs, n: n * 1e15 / 8)
    assert render.row_of(row) == [
        "a row", "`--t 4 --steps 8`", "`x*.jsonl`",
        "N = 1: 30.0 [25.0, 50.0]; N = 2: 60.0 [50.0, 100.0]", "25.0", "3", "3.0M", "3.0 H200",
        "c", "N = 1: 1; N = 2: 2"]
    pair = "head\n---\n| a | `x*.jsonl N = 2` | `x*.jsonl N = 1` |"
    with pytest.raises(SystemExit, match="a: 3 and 3 seeds are too few to tell"):
        render.compared(pair)
    for seed, score in enumerate((0.31, 0.29, 0.32, 0.33, 0.34), 1):
        log(seed, score)
    assert render.row_of(row)[3] == "N = 1: 32.0 [29.0, 34.0]; N = 2: 64.0 [58.0, 68.0] > N = 1"
    assert render.compared(pair).endswith(
        "| a | `x*.jsonl N = 2` | `x*.jsonl N = 1` | 64.0 [58.0, 68.0] (5) | "
        "32.0 [29.0, 34.0] (5) | 0.794 | the first |")
    assert render.side_of("x*.jsonl N = 2, FLOPs of N = 1") == [0] * 5  # half of its steps
    levels["levels"] = {"4": {"exact": 0.75}}
    for seed in range(1, 6):
        log(seed, 0.5)
    assert render.side_of("x*.jsonl N = 2, level 4") == [75] * 5
    for wrong, says in (({"t": 5}, "has t 5, not 4"), ({"position": "window"}, "position"),
                        ({"steps": 9}, "has steps 9")):
        log(2, 0.5, **wrong)
        with pytest.raises(SystemExit, match=says):
            render.experiment("x*.jsonl")
    del config["position"]  # an old log had one
    log(2, 0.5)
    with pytest.raises(SystemExit, match="is of variant position, not None"):
        render.experiment("x*.jsonl")


def test_who_is_ahead_is_told_by_the_test():
    """Guards the comparisons: the test's p, counted again by pairs over all deals. Five seeds that
    are ahead of five do not overlap with them; three and three are too few."""
    assert render.mann_whitney([6, 7, 8, 9, 10], [1, 2, 3, 4, 5]) == pytest.approx(2 / 252)
    assert render.mann_whitney([5, 7, 8, 9, 10], [1, 2, 3, 4, 6]) > 0.01
    assert render.mann_whitney([4, 5, 6], [1, 2, 3]) == pytest.approx(0.1)
    assert render.ahead([6, 7, 8, 9, 10], [1, 2, 3, 4, 5])
    assert not render.ahead([1, 2, 3, 4, 5], [6, 7, 8, 9, 10])
    assert not render.ahead([5, 7, 8, 9, 10], [1, 2, 3, 4, 6])
    values, right = [3, 1, 4, 1, 5, 9, 2], []
    for ours in permutations(range(7), 3):
        wins = sum((values[i] > values[j]) + (values[i] == values[j]) / 2
                   for i in ours for j in set(range(7)) - set(ours))
        right.append(abs(wins - 6))  # of 12 pairs
    assert render.mann_whitney(values[:3], values[3:]) == pytest.approx(
        sum(x >= right[0] for x in right) / len(right))


def test_a_level_is_reached_by_two_evaluations_on_end(tmp_path, monkeypatch):
    """Guards tokens to a score: one lucky evaluation is none, and the cap is infinite."""
    monkeypatch.setattr(render, "HERE", tmp_path)
    monkeypatch.setattr(render, "read", render.read.__wrapped__)
    (tmp_path / "reach").mkdir()
    for seed, scores in enumerate(((0, 0.4, 0.2, 0.3, 0.5), (0, 0.4, 0.2, 0.4, 0.2)), 1):
        records = [{"exact": x, "step": i, "tokens": 100 * i, "seconds": 60 + 2 * i + 9 * (i == 4)}
                   for i, x in enumerate(scores)]  # the last step began anew
        (tmp_path / f"reach/t8-N2-s{seed}.jsonl").write_text(
            "\n".join(map(json.dumps, [{"config": {"seed": seed}}, *records])))
    assert render.tokens_to(8, 2, 0.3) == [300, math.inf]
    assert render.seconds_to(8, 2, 0.3) == [6, math.inf]
    (tmp_path / "reach/t8-N1-s1.jsonl").write_text('{"config": {"seed": 1, "batch": 9}}')
    with pytest.raises(SystemExit, match="must differ in N and the seed alone"):
        render.tokens_to(8, 2, 0.3)


def test_figures_are_drawn(tmp_path):
    """Guards the figures: each one that the READMEs show, no other."""
    pytest.importorskip("matplotlib")
    render.draw(tmp_path)
    shown = {Path(name).name for page in (HERE / "README.md", HERE / "results/README.md")
             for name in re.findall(r"\]\((\S+\.svg)\)", page.read_text())}
    assert {path.name for path in tmp_path.iterdir()} == shown
    assert {path.name for path in (HERE / "results").glob("*.svg")} == shown


# ======================================================================================== README.md

README = (HERE / "README.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```", README, re.M | re.S)


def test_the_readme_s_loop_is_the_code_s():
    """Guards "How it works": its first block is the loop of sleep.passes, to the letter."""
    how = README.split("\n## How it works\n")[1]
    loop = re.search(r"^```python\n(.*?)^```", how, re.M | re.S)[1]
    assert textwrap.indent(textwrap.dedent(loop), "    ") in inspect.getsource(sleep_file.passes)
    assert "for n in range(loops)" in loop


def test_commands_of_the_readme_parse():
    """Guards documents that drift from the code."""
    commands = re.findall(r"^\s*(?:\$ )?(?:.*&& )?python (\S+\.py.*?)(?: *#.*)?$", README, re.M)
    assert len(commands) >= 3
    for script, *arguments in map(shlex.split, commands):
        assert (HERE / script).exists()
        if script == "results/variants.py":
            assert {*arguments.pop(0).split("+")} <= variants.VARIANTS.keys()
            script = "train.py"
        if script == "train.py" and arguments != ["--help"]:
            options = train.parse(train.get_parser(), arguments)
            train.build(options | {"init": None, "dtype": "float32"})


def test_a_trained_model_is_used_as_the_readme_says(tmp_path, monkeypatch):
    """Guards the three statements with which a run's model reads a token."""
    monkeypatch.chdir(tmp_path)
    run_of("out/rule110-001", "--loops 2")
    names = {"train": train, "sleep": sleep_file, "token": torch.tensor([1])}
    exec("\n".join(re.findall(r"`(\w+(?:, \w+)* = \w+\.\w+\([^`]*\))`", README)), names)
    model = names["model"]
    awake, _ = wake(model, names["token"][:, None], model.empty_memory(1))
    assert names["loops"] == 2 and torch.equal(names["logits"], awake[:, 0])


def test_additions_of_the_readme_work(tmp_path, start):
    """Guards "add a task" and "add an update rule": in a copy, made as the README says."""
    there = tmp_path / "copy"
    shutil.copytree(HERE, there, ignore=shutil.ignore_patterns(".*", "out", "__pycache__"))
    (task, of_task), (rule, of_rule) = (
        re.split("# at the end of test_sleep.py.*", block) for block in BLOCKS
        if re.search("class|def", block))
    for name, line, new in (
            ("data.py", "\nTASKS = {", f'\n{task}\n\nTASKS = {{"parity": Parity, '),
            ("model.py", "\nRULES = {", f'\n{rule}\n\nRULES = {{"linear": linear, ')):
        text = (there / name).read_text()
        assert text.count(line) == 1
        (there / name).write_text(text.replace(line, new))
    text = (there / "test_sleep.py").read_text()
    (there / "test_sleep.py").write_text(f"{text}\n\n{of_task}\n{of_rule}")
    (there / "everything.py").write_text(  # in one process, since imports take long
        "import pytest, train\n"
        "from results import render\n"
        "render.draw = lambda folder: None  # figures take long, and are the same\n"
        "assert render.main([]) == 0\n"
        "assert pytest.main(['-q', '-p', 'no:cacheprovider', 'test_sleep.py', '-k', 'parity or "
        "linear or literal_form or rendered']) == 0\n"
        "raise SystemExit(train.main('--task=parity --coins=6 --rule=linear --steps=2 --batch=4 "
        "--d_model=16 --device=cpu'.split()))\n")
    code, out, err = start(there / "everything.py", folder=there)
    assert code == 0 and re.search(r"\d+ passed", out) and "token passes" in out, out + err


def test_tests_of_the_readme_exist():
    """Guards the promise that each equation has its numeric test."""
    named = set(re.findall(r"`(test_\w+)`", README)) - {"test_sleep"}
    assert named and not named - set(globals())
    equations = [row for row in README.splitlines() if re.match(r"\| (Eq|Alg)\.", row)]
    assert all("`test_" in row for row in equations)


def test_numbers_of_the_readme_stand_in_the_results():
    """Guards verdicts and findings: every score that is told is one of a table made from logs."""
    results = (HERE / "results/README.md").read_text()
    tables = "\n".join(re.findall(r"^\|.*", results, re.M))
    said = README + re.sub(r"^\|.*", "", results, flags=re.M)
    numbers = re.findall(r"(?<![\d.])\d+\.\d(?=\s%|\smillion|,\s+N\s=|\sand\s\d+\.\d\s%)", said)
    missing = [x for x in numbers if not re.search(rf"(?<![\d.]){x}(?![\d.])", tables)]
    assert len(numbers) > 15 and not missing


def test_links_lead_somewhere():
    """Guards links of the READMEs and of variants: to a file here, to one of its headings."""
    links = 0
    for page in (HERE / "README.md", HERE / "results/README.md", HERE / "results/variants.py"):
        text = re.sub(r"results/(README.md#[\w-]+)\"", r"](\1)", page.read_text())
        for name, anchor in re.findall(r"\]\((?!http)([^)#\s]*)#?([^)\s]*)\)", text):
            target, links = page.parent / name if name else page, links + 1
            assert target.exists(), f"{page}: {name}"
            if anchor:
                titles = re.findall(r"^#+ (.*)", target.read_text(), re.M)
                assert anchor in [re.sub(r"[^\w -]", "", x.lower()).replace(" ", "-")
                                  for x in titles], f"{page}: #{anchor}"
    assert links > 20
