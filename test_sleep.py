"""Every equation against its literal, slow form, and the README against code and logs.

The literal forms are written from the formulas alone, in float64, one token at a time. Run with
`pytest`.
"""

import importlib.util
import json
import math
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import train
from data import (GSM, IGNORE, TASKS, Depo, Rule110, floor, generator, in_held_out, rule110)
import model as model_file
from model import (KERNELS, ROPE_BASE, RULES, Config, GatedDeltaNet, Hybrid, Memory, attention,
                   form, gated_delta_rule, prepare, update)
from results import render
from sleep import Stream, Window, algorithm1, cut, evict, night, passes, sleep, wake

HERE = Path(__file__).parent
torch.set_num_threads(1)  # the tensors are tiny: more threads only wait for each other
TINY = ("--cells 4 --t 1 --d_model 16 --n_head 2 --batch 8 --eval_size 32 --device cpu").split()


FLOORS = {}  # counted once for all tests


@pytest.fixture(autouse=True)
def the_same_for_every_test(monkeypatch):
    def remembered(task, level):
        key = f"{task.title()} {level} {vars(task)}"
        FLOORS[key] = FLOORS[key] if key in FLOORS else floor(task, level)
        return FLOORS[key]

    monkeypatch.setattr(train, "floor", remembered)
    torch.manual_seed(0)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it


def hybrid(layout="asas", window=5, d_model=16, vocab_size=3, dtype="float64", **variant):
    """A small model in float64, no matrix of it zero: with zeros nothing would show."""
    model = Hybrid(Config(vocab_size, window, layout, d_model, n_head=2, dtype=dtype, **variant))
    for matrix in [model.out, *(layer.mixer.out for layer in model.layers)]:
        torch.nn.init.normal_(matrix.weight, std=0.3)
    return model.to(getattr(torch, dtype))


def sequences(B=2, windows=3, window=5, rest=3, scored=2):
    """Random tokens and targets: full windows unscored, then a short one, its end scored."""
    T = windows * window + rest
    tokens = torch.randint(3, (B, T))
    targets = torch.full((B, T), IGNORE)
    targets[:, -scored:] = torch.randint(2, (B, scored))
    return tokens, targets


# -------------------------------------------------------------------------------- the literal forms

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
    assert LITERAL_RULES.keys() == RULES.keys(), "add the rule's literal form to LITERAL_RULES"


def literal_rotary(x, position):
    """x (..., size) as size/2 complex numbers, each turned by frequency times position."""
    half = x.shape[-1] // 2
    z = torch.complex(x[..., :half], x[..., half:])
    frequency = torch.tensor([ROPE_BASE ** (-i / half) for i in range(half)], dtype=x.dtype)
    z = z * torch.exp(1j * position * frequency)
    return torch.cat([z.real, z.imag], dim=-1)


def literal_attention(q, k, v, first=0, span=10**9):
    """Eq. (2), a query at a time: o_t = V_t^T softmax(K_t q_t / sqrt(d)) over at most `span` keys.

    Positions count from `first`; the queries belong to the last keys.
    """
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
    convolution; returned with the window's own behind.
    """
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


def literal_algorithm1(model, tokens, targets, loops):
    """Algorithm 1, from the paper's words. -> the mean cross-entropy of the scored tokens."""
    c, L, B, H = model.config, model.config.window, len(tokens), model.config.n_head
    zero = torch.zeros(B, H, c.d_model // H, c.d_model // H).double()
    S, past = [None if kind == "a" else zero for kind in c.layout], [None] * len(c.layout)
    losses, (i, j) = [], c.core
    while tokens.shape[1]:
        window, scored = tokens[:, :L], targets[:, :L]
        tokens, targets = tokens[:, L:], targets[:, L:]
        consolidation = (scored == IGNORE).all()
        N = loops if consolidation == (c.sleep_at == "sleep") else 1
        embedded = model.embedding[window]
        if c.position == "window":
            embedded = embedded + model.position[:window.shape[1]]
        embedded, S, new_past = literal_blocks(model, embedded, S, past, 0, i)
        h, S_before = embedded, S
        for n in range(N):
            if c.carry == "embed":
                h = embedded
            if not c.carry_S:
                S = S_before
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


# ------------------------------------------------------------------------------ 1. the update rules

def rule_inputs(L, dtype=torch.float64, collinear=False, B=2, H=3, K=4, V=5):
    q, k, v = torch.randn(B, H, L, K), torch.randn(B, H, L, K), torch.randn(B, H, L, V)
    log_alpha, beta = -torch.rand(B, H, L), torch.rand(B, H, L)
    if collinear:
        k, log_alpha, beta = torch.randn(B, H, 1, K) + 1e-3 * k, 1e-3 * log_alpha, 1 - 1e-3 * beta
    inputs = q, F.normalize(k, dim=-1), v, log_alpha, beta, torch.randn(B, H, V, K)
    return [x.to(dtype).requires_grad_() for x in inputs]


def assert_same_values_and_gradients(ours, literal, inputs, tolerance=1e-9):
    cotangents = [torch.randn_like(x) for x in literal]
    gradients = [torch.autograd.grad(x, inputs, cotangents, allow_unused=True,
                                     materialize_grads=True) for x in (ours, literal)]
    for a, b in zip((*ours, *gradients[0]), (*literal, *gradients[1]), strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def close(ours, literal, tolerance):
    """Relative distances of tensors, each in its norm; NaN is never close."""
    for a, b in zip(ours, literal, strict=True):
        assert (a.double() - b).norm() <= tolerance * b.norm() + 1e-9


def in_layers_layout(rule, q, k, v, log_alpha, beta, S):
    """`update`, with inputs and outputs as a rule has them."""
    qkv = torch.stack([x.transpose(1, 2) for x in (q, k, v)], dim=2)
    o, S = update(rule, qkv, log_alpha.mT, beta.mT, S)
    return o.transpose(1, 2), S


@pytest.mark.parametrize("collinear", [False, True])
@pytest.mark.parametrize("L", [1, 4, 24, 75])
@pytest.mark.parametrize("rule", RULES)
def test_rules_equal_token_loop(rule, L, collinear):
    """Guards Eq. (3): a wrong decay, a transposed S, a mask after exp, an inverse that explodes."""
    inputs = rule_inputs(L, collinear=collinear)
    assert_same_values_and_gradients(RULES[rule](*inputs), LITERAL_RULES[rule](*inputs), inputs)


@pytest.mark.parametrize("L", [32, 33, 75, 130, 512])
@pytest.mark.parametrize("rule", RULES)
def test_pieces_of_a_long_window_equal_token_loop(rule, L):
    """Guards windows of more than 32 tokens: pieces that each start from S = 0, or in disorder."""
    inputs = rule_inputs(L, V=4)
    assert_same_values_and_gradients(in_layers_layout(rule, *inputs), LITERAL_RULES[rule](*inputs),
                                     inputs)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.bfloat16, 0.02)])
@pytest.mark.parametrize("decay", [0.0, -1e-6, -1.0, -1e4])
@pytest.mark.parametrize("L", [1, 24, 130])
@pytest.mark.parametrize("rule", RULES)
def test_rules_at_their_limits(rule, L, decay, dtype, tolerance):
    """Guards a window of one and the same key, nothing forgotten or everything, beta next to 1."""
    q, k, v, log_alpha, beta, S = (x.detach() for x in rule_inputs(L, V=4))
    inputs = [q, k[:, :, :1].expand_as(k), v, torch.full_like(log_alpha, decay),
              1 - 1e-3 * beta, S]
    rounded = [x.to(dtype if i < 3 else torch.float32).requires_grad_()
               for i, x in enumerate(inputs)]
    exact = [x.detach().double().requires_grad_() for x in rounded]
    ours, literal = in_layers_layout(rule, *rounded), LITERAL_RULES[rule](*exact)
    cotangents = [torch.randn_like(x) for x in literal]
    gradients = [torch.autograd.grad(out, of, [c.to(x) for c, x in zip(cotangents, out)],
                                     allow_unused=True, materialize_grads=True)
                 for out, of in ((ours, rounded), (literal, exact))]
    close([*ours, *gradients[0]], [*literal, *gradients[1]], tolerance)


def test_delta_rule_in_float32_with_collinear_keys():
    """Guards the training precision: powers of the matrix reach 1e11 here, substitution not."""
    inputs = [x.detach() for x in rule_inputs(75, torch.float32, collinear=True)]
    for a, b in zip(gated_delta_rule(*inputs), literal_rule(*(x.double() for x in inputs))):
        torch.testing.assert_close(a.double(), b, rtol=1e-3, atol=1e-3)


def test_only_their_own_rules_reach_the_kernels(monkeypatch):
    """Guards a new rule on a GPU: it must not run another one's kernel."""
    qkv = torch.zeros(1, 4, 3, 1, 16)
    monkeypatch.setitem(RULES, "new", literal_rule)
    for fits in (False, True):
        monkeypatch.setattr(model_file, "fits_kernels", lambda *_: fits)
        for rule, plain in RULES.items():
            ours = form(rule, qkv)
            if fits and rule in ("gdn", "delta"):
                assert ours is KERNELS[rule]
            else:
                assert ours.func is model_file.plain_form and ours.args == (plain,)
    seen = []
    monkeypatch.setattr(model_file, "fused_rule", lambda *x: seen.append(x[1]) or (None,) * 3)
    for rule in ("gdn", "delta"):
        KERNELS[rule](qkv, torch.ones(1, 4, 1), None, None)
    assert seen[0].all() and not seen[1].any()  # delta: alpha = 1


# ------------------------------------------------------------------------------------- 2. attention

@pytest.mark.parametrize("L", [1, 7, 24])
def test_attention_equals_eq2(L):
    """Guards Eq. (2): mask off by one, wrong scale, rotation by absolute positions."""
    inputs = [torch.randn(2, 3, L, 8, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    o, _ = attention(*inputs)
    cotangent = torch.randn_like(o)
    for first in (0, 1000):
        literal = literal_attention(*inputs, first=first)
        torch.testing.assert_close(o, literal)
        for a, b in zip(torch.autograd.grad(o, inputs, cotangent, retain_graph=True),
                        torch.autograd.grad(literal, inputs, cotangent)):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("pieces", [[1] * 9, [4, 5], [1, 6, 2]])
def test_attention_with_cache_equals_all_at_once(pieces):
    """Guards the cache: positions or masks that forget how much is cached already."""
    q, k, v = torch.randn(3, 2, 3, 9, 8, dtype=torch.float64)
    whole, _ = attention(q, k, v)
    cache, parts = None, []
    for piece in zip(*(x.split(pieces, dim=2) for x in (q, k, v))):
        o, cache = attention(*piece, cache)
        parts.append(o)
    torch.testing.assert_close(torch.cat(parts, dim=2), whole)
    assert cache.k.shape[2] == 9


# ----------------------------------------------------------------------------------- 3. Algorithm 1

@pytest.mark.parametrize("layout, loops, variant", [
    ("asas", 1, {}), ("asas", 2, {}), ("as", 4, {}), ("aaaa", 2, {}), ("sa", 3, {}), ("ama", 2, {}),
    ("asas", 2, {"eviction": "sliding"}), ("as", 2, {"eviction": "none"}),
    ("asas", 3, {"loop_blocks": (1, 3)}), ("sas", 2, {"carry": "embed"}),
    ("sa", 3, {"carry_S": False}), ("sas", 2, {"carry_S": False, "loop_blocks": (1, 3)}),
    ("asas", 2, {"sleep_at": "wake", "carry_S": False}), ("aa", 2, {"sleep_at": "wake"}),
    ("as", 2, {"rule": "delta"}), ("as", 2, {"rule": "mamba2"}),
    ("as", 2, {"position": "window"}),
    ("asam", 2, {"eviction": "sliding", "loop_blocks": (1, 4), "carry": "embed"})])
def test_algorithm1_equals_its_words(layout, loops, variant):
    """Guards Eq. (1) to (6), Algorithm 1 and its variants: values, gradients of every parameter."""
    model, (tokens, targets) = hybrid(layout, **variant), sequences(rest=4, scored=3)
    loss = algorithm1(model, tokens, targets, loops)[0]
    literal = literal_algorithm1(model, tokens, targets, loops)
    torch.testing.assert_close(loss, literal)
    parameters = list(model.parameters())
    for a, b in zip(*(torch.autograd.grad(x, parameters, allow_unused=True, materialize_grads=True)
                      for x in (loss, literal))):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)


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


@pytest.mark.parametrize("tokens, targets, windows, named", [
    ((2, 12), (2, 10), None, "targets"), ((2, 12), (1, 12), None, "targets"),
    ((0, 12), (0, 12), None, "targets"), ((2, 0), (2, 0), None, "targets"),
    ((2, 12), (2, 12), [Window(0, 12, False)], "windows"),
    ((2, 12), (2, 12), [Window(0, 10, True)], "windows")])
def test_algorithm1_refuses_what_does_not_fit(tokens, targets, windows, named):
    """Guards silence: rows or tokens left out, a mean over nothing."""
    tokens, targets = (torch.zeros(size, dtype=torch.long) for size in (tokens, targets))
    with pytest.raises(ValueError, match=f"^{named} .*: must "):
        algorithm1(hybrid(), tokens, targets, 1, windows)


def test_targets_without_any_score_are_refused():
    """Guards a loss that is not a number."""
    with pytest.raises(ValueError, match="some token must be scored"):
        algorithm1(hybrid(), torch.zeros(1, 7).long(), torch.full((1, 7), IGNORE), 1)


def test_last_window_may_hold_context_query_and_answer():
    """Guards tasks whose length is no multiple of L: such a window is read once, whatever N is."""
    model, (tokens, targets) = hybrid(window=50), sequences()
    one, four = (algorithm1(model, tokens, targets, loops)[1] for loops in (1, 4))
    assert torch.equal(one, four)


# ------------------------------------------------------------------------------------- 4. streaming

@pytest.mark.parametrize("loops, loop_blocks", [(1, None), (2, None), (4, None), (3, (1, 3))])
@pytest.mark.parametrize("eviction", ["hard", "sliding", "none"])
@pytest.mark.parametrize("rule", RULES)
def test_stream_equals_algorithm1(loops, loop_blocks, eviction, rule):
    """Guards "train on windows, use token by token": state that differs between the two."""
    model = hybrid("asas", eviction=eviction, loop_blocks=loop_blocks, rule=rule)
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


@pytest.mark.parametrize("eviction", ["sliding", "none"])
def test_one_loop_with_a_cache_is_one_long_reading(eviction):
    """Guards the sliding window: N = 1 is sliding-window attention and SSM over the whole text."""
    model, (tokens, targets) = hybrid(eviction=eviction), sequences()
    memory = model.empty_memory(len(tokens))
    h = torch.cat([model.embed(window) for window in tokens.split(5, dim=1)], dim=1)
    h, *_ = literal_blocks(model, h, memory.S, [None] * 4)
    logits = literal_norm(h) @ model.out.weight[0].T
    torch.testing.assert_close(algorithm1(model, tokens, targets, 1)[1], logits[:, -3:])


@pytest.mark.parametrize("variant, loops, named", [
    ({"sleep_at": "wake", "carry_S": False}, 2, "loops 2"), ({}, 0, "loops 0"),
    ({"position": "window"}, 1, "position window")])
def test_stream_refuses_what_it_cannot_read(variant, loops, named):
    """Guards a silent mismatch: passes awake, or positions that a token by itself has not."""
    with pytest.raises(ValueError, match=f"{named}: must be"):
        Stream(hybrid(**variant), loops)


def test_sliding_cache_is_bounded(monkeypatch):
    """Guards the sliding window's memory: at most L keys in a cache, L - 1 between tokens."""
    model, sizes, seen = hybrid(eviction="sliding"), [], {1: [], 5: []}

    def watched(q, k, v, *rest):
        o, cache = attention(q, k, v, *rest)
        seen[q.shape[2]].append(cache.k.shape[2])
        return o, cache

    monkeypatch.setattr("model.attention", watched)
    stream = Stream(model, loops=1)
    for token in torch.zeros(23, 1, dtype=torch.long):
        stream.feed(token)
        sizes.append((stream.memory.cache[0].k.shape[2], stream.bytes()["cache"]))
    assert [size for size, _ in sizes] == [1, 2, 3] + [4] * 20
    assert max(seen[1]) == 5 and max(seen[5]) == 9  # awake L; asleep L - 1 kept and L of its own
    assert max(size for _, size in sizes) == sizes[6][1]  # full, provisional and retained


def test_stream_memory_is_bounded():
    """Guards "constant in size": bytes that grow with the text, or a cache longer than L."""
    stream = Stream(hybrid(), loops=2)
    sizes = []
    for _ in range(40):
        stream.feed(torch.zeros(1, dtype=torch.long))
        sizes.append(stream.bytes())
    one_token = 2 * 2 * 16 * 8  # two attention blocks, keys and values, d = 16, 8 bytes each
    tails = 2 * 3 * 3 * 16 * 8  # two SSM blocks, three inputs of q, k and v
    expected = [n and one_token * n + tails for n in [1, 2, 3, 4, 0] * 8]
    assert [size["cache"] for size in sizes] == expected
    one_S = 2 * 2 * 8 * 8 * 8  # two blocks, two heads of 8 x 8; within a window a second one
    assert [size["S"] for size in sizes] == [2 * one_S if n else one_S for n in [1, 2, 3, 4, 0] * 8]
    assert [size["tokens"] for size in sizes] == [8 * n for n in [1, 2, 3, 4, 0] * 8]


def test_a_sliding_window_lets_go_of_what_it_evicts():
    """Guards Stream.bytes: no key or value that is kept is a view of more than is kept."""
    stream = Stream(hybrid(eviction="sliding"), loops=2)
    for _ in range(12):
        stream.feed(torch.zeros(1, dtype=torch.long))
        held = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes()
                for memory in (stream.start, stream.memory) for entry in memory.cache
                for x in entry or ()}
        assert sum(held.values()) <= stream.bytes()["cache"]


# -------------------------------------------------------------------------- 5. the information path

def test_only_S_crosses_the_boundary():
    """Guards the claim itself: evicted tokens reach the future through S only."""
    model, window = hybrid(), torch.randint(3, (2, 5))
    query = torch.randint(3, (2, 2))
    first, second = (evict(sleep(model, tokens, model.empty_memory(2), 2))
                     for tokens in (window, (window + 1) % 3))
    held = second._replace(S=first.S)
    logits = [wake(model, query, memory)[0] for memory in (first, second, held)]
    assert torch.equal(logits[0], logits[2])
    assert (logits[0] - logits[1]).abs().max() > 1e-3


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
    directions = torch.randn(3, 1, 5, 16, dtype=torch.float64)

    def answer(shift):  # the embedding of the window enters pass n displaced by shift_n
        memory = model.empty_memory(1)
        original = model.blocks
        displacements = iter([*(shift[:, None, None, None] * directions), 0])
        model.blocks = lambda h, memory, i, j, **needed: original(
            h + next(displacements) if i < j else h, memory, i, j, **needed)
        try:
            return wake(model, query, evict(sleep(model, window, memory, 3)))[0][0, 0, 0]
        finally:
            del model.blocks

    shift = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    gradient, = torch.autograd.grad(answer(shift), shift)
    for n, step in enumerate(1e-6 * torch.eye(3, dtype=torch.float64)):
        with torch.no_grad():
            difference = (answer(step) - answer(-step)) / 2e-6
        torch.testing.assert_close(gradient[n], difference, rtol=1e-5, atol=1e-9)
        assert gradient[n].abs() > 1e-6


# ---------------------------------------------------------------------------------- 6. independence

@pytest.mark.parametrize("loops", [1, 3])
def test_causality(loops):
    """Guards the future: a token's logits and every earlier one's do not depend on later tokens,
    also where the passes are spent awake: S carried from pass to pass would tell the answers."""
    model, tokens = hybrid(window=9, sleep_at="wake", carry_S=False), torch.randint(3, (2, 9))
    changed = tokens.clone()
    changed[:, 6] = (changed[:, 6] + 1) % 3
    a, b = (wake(model, x, model.empty_memory(2), loops)[0] for x in (tokens, changed))
    assert torch.equal(a[:, :6], b[:, :6]) and not torch.isclose(a[:, 6:], b[:, 6:]).all(-1).any()


def test_rows_of_a_batch_are_independent():
    """Guards mixing of sequences: a norm or a state shared over the batch."""
    model, (tokens, targets) = hybrid(), sequences(B=3)
    together = algorithm1(model, tokens, targets, 2)[1]
    for row, token, target in zip(together, tokens, targets):
        torch.testing.assert_close(row[None], algorithm1(model, token[None], target[None], 2)[1])


# -------------------------------------------------------------------------------------- 7. Rule 110

@pytest.mark.parametrize("rule", [0, 30, 90, 110, 255])
@pytest.mark.parametrize("cells", [3, 8])
def test_rule110_equals_double_loop(rule, cells):
    """Guards the automaton: left and right swapped, fixed ends, another bit order of the rule."""
    state = torch.randint(2, (2, 5, cells))
    table = f"{rule:08b}"[::-1]
    for steps in (0, 1, 7):
        expected = state.clone()
        for a, b in product(range(2), range(5)):
            row = expected[a, b].tolist()
            for _ in range(steps):
                row = [int(table[4 * row[i - 1] + 2 * row[i] + row[(i + 1) % cells]])
                       for i in range(cells)]
            expected[a, b] = torch.tensor(row)
        assert torch.equal(rule110(state, steps, rule), expected)


def test_rule110_by_hand():
    """Guards the definition: 111 110 101 100 011 010 001 000 give 0 1 1 0 1 1 1 0."""
    state = torch.tensor([0, 0, 0, 1, 0, 0, 0, 0])
    assert rule110(state, 1).tolist() == [0, 0, 1, 1, 0, 0, 0, 0]
    assert rule110(state, 2).tolist() == [0, 1, 1, 1, 0, 0, 0, 0]
    assert rule110(state, 3).tolist() == [1, 1, 0, 1, 0, 0, 0, 0]
    assert rule110(torch.tensor([1, 0, 0, 0]), 1).tolist() == [1, 0, 0, 1]  # over the ring's edge


@pytest.mark.parametrize("automaton", [110, 30])
def test_batch_layout_and_labels(automaton):
    """Guards the labels: of another state, shifted by one, or among their own inputs."""
    task = Rule110(cells=6, states=3, t=5, automaton=automaton)
    tokens, targets = task.batch(50, generator(0, 0))
    assert tokens.shape == targets.shape == (50, task.length)
    assert (targets[:, :-3] == IGNORE).all() and (tokens[:, 18] == task.QUERY).all()
    for row, target in zip(tokens, targets):
        answers = [rule110(row[6 * i:6 * i + 6], 5, automaton)[0].item() for i in range(3)]
        assert target[-3:].tolist() == answers and row[19:].tolist() == answers[:-1]


def test_labels_of_the_worked_example():
    """Guards the example in Rule110's docstring, worked by hand."""
    task = Rule110(cells=4, states=2, t=2)
    tokens, targets = task.batch(2000, generator(0, 0))
    examples = dict(zip(map(tuple, tokens[:, :8].tolist()), targets[:, -2:].tolist()))
    assert examples[0, 1, 0, 0, 0, 1, 1, 1] == [1, 0]


@pytest.mark.parametrize("cells", [3, 4, 5])
def test_small_worlds_have_both_splits(cells):
    """Guards an endless search: with few cells the hash must still leave states on both sides."""
    for split in ("train", "held-out"):
        assert Rule110(cells, 1, 1).batch(3, generator(0, 0), split)[0].shape == (3, cells + 1)


def test_train_and_held_out_states_are_disjoint():
    """Guards "evaluated on states never trained on"; the hash keeps about one in eight."""
    task = Rule110(cells=8, states=2, t=3)
    seen = {split: {tuple(state) for state in
                    task.batch(4000, generator(0, 0), split)[0][:, :16].reshape(-1, 8).tolist()}
            for split in ("train", "held-out")}
    assert not seen["train"] & seen["held-out"] and len(seen["train"] | seen["held-out"]) == 256
    held_out = in_held_out(torch.randint(2, (100_000, 24))).double().mean().item()
    assert abs(held_out - 1 / 8) < 0.005


@pytest.mark.parametrize("cells, t, rule",
                         [(3, 2, 110), (7, 9, 110), (8, 3, 30), (11, 4, 110), (6, 0, 90)])
def test_floor_equals_enumeration(cells, t, rule):
    """Guards the floor: without the right one a figure misleads. Of held-out states only."""
    states = torch.tensor(list(product([0, 1], repeat=cells)))
    p = rule110(states[in_held_out(states)], t, rule)[:, 0].double().mean().item()
    best = max(p, 1 - p) ** 3
    assert abs(floor(Rule110(cells, 3, t, rule)) - best) <= 5 * math.sqrt(best * (1 - best)) / 2**8


def test_floor_of_the_paper():
    """Guards the numbers beside the paper's: t = 4, 12, 32, with 24 cells, 4 states."""
    for t, known in ((4, 0.0820), (12, 0.0872), (32, 0.0995)):
        assert floor(Rule110(24, 4, t)) == pytest.approx(known, abs=0.005)


def test_floor_counts_whole_answers():
    """Guards the floor of other tasks: GSM's one answer; two answers that Depo never repeats."""
    task = GSM(ops=3, statements=5, modulus=5)
    answers = Counter(task.batch(20_000, generator(1, 0), "held-out", 2)[1][:, -1].tolist())
    assert floor(task, 2) == pytest.approx(max(answers.values()) / 20_000, abs=0.02)
    assert floor(Depo(nodes=5, hops=2, questions=5, names=5), 1) < 0.001
    one = Depo(nodes=5, hops=2, questions=1, names=5)
    names = Counter(tuple(row[row != IGNORE].tolist())
                    for row in one.batch(20_000, generator(1, 0), "held-out", 1)[1])
    assert floor(one, 1) == pytest.approx(max(names.values()) / 20_000, abs=0.02)


def test_levels_of_rule110():
    """Guards evaluation at a level: answers of another t than the one that is asked for."""
    task, other = Rule110(cells=6, states=3, t=5), Rule110(cells=6, states=3, t=2)
    for ours, expected in zip(task.batch(20, generator(0, 0), "held-out", level=2),
                              other.batch(20, generator(0, 0), "held-out")):
        assert torch.equal(ours, expected)
    assert floor(task, 2) == floor(other) and task.levels == (5,)


# ------------------------------------------------------------------------------------ 7a. Depo, GSM

def read_depo(task, tokens, targets):
    """Everything that a sequence of Depo says, from its tokens alone: successor of each name, edges
    in their order, questions as (start, k). Asserts the layout, and targets found by walking."""
    A, hops = task.names, task.hops
    ANSWER, PAD = 2 * A + hops, 2 * A + hops + 1
    graph, asked = tokens[:4 * task.nodes], tokens[4 * task.nodes:]
    while graph[0] == PAD:
        graph = graph[1:]

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


# How to read a task's sequence from its tokens alone, and assert its targets without its own code.
READ = {Rule110: read_rule110, Depo: read_depo, GSM: read_gsm}


@pytest.mark.parametrize("name", TASKS)
def test_every_task_keeps_its_promises(name):
    """Guards a new task: targets that are wrong, a layout that moves, a split that overlaps."""
    task = TASKS[name]()
    assert type(task) in READ, f"add a function that reads {type(task).__name__} to READ"
    assert len(task.words) == task.vocab_size and isinstance(task.title(), str)
    seen = {}
    for split, level in product(("train", "held-out"), (None, *task.levels)):
        state = torch.get_rng_state()
        tokens, targets = task.batch(40, generator(1, 0), split, level)
        assert all(map(torch.equal, (tokens, targets),
                       task.batch(40, generator(1, 0), split, level)))
        assert torch.equal(state, torch.get_rng_state()), "draw from the generator given only"
        assert tokens.shape == targets.shape == (40, task.length)
        assert (targets[:, :task.scored_from] == IGNORE).all() and (targets != IGNORE).any(1).all()
        for row in zip(tokens.tolist(), targets.tolist()):
            READ[type(task)](task, *row)
        seen.setdefault(split, set()).update(map(tuple, tokens[:, :task.scored_from].tolist()))
    assert not seen["train"] & seen["held-out"]


def kind(task):
    return type(task).__name__


def read(task, count, split="train", level=None):
    rows = zip(*(x.tolist() for x in task.batch(count, generator(0, 0), split, level)))
    return [READ[type(task)](task, *row) for row in rows]


@pytest.mark.parametrize("split", ["train", "held-out"])
@pytest.mark.parametrize("task", [Depo(), Depo(8, 5, 3, 3), Depo(3, 7, 3, 2), Depo(6, 1, 1, 2)],
                         ids=kind)
def test_depo_equals_walking(task, split):
    """Guards the answers, off by one hop or of another question; a name that occurs twice; two
    cycles for one; padding between tokens; targets that are not the next token."""
    read(task, 200, split)
    for level in task.levels:
        for after, _, questions in read(task, 20, split, level):
            assert len(after) == task.nodes and {k for _, k in questions} == {level}


@pytest.mark.parametrize("split", ["train", "held-out"])
@pytest.mark.parametrize("task", [GSM(), GSM(question="last"), GSM(3, 5, 3, 5, "last"),
                                  GSM(ops=1, statements=40, modulus=23, variables=40)], ids=kind)
def test_gsm_equals_recursion(task, split):
    """Guards the answers, the number of needed statements and its depth; a variable defined twice
    or never; a circle; a distractor that is needed after all, or of one kind only."""
    read(task, 100, split)
    for level in task.levels:
        assert {len(needed) for _, needed, _ in read(task, 10, split, level)} == {level}


@pytest.mark.parametrize("make", [Depo, GSM], ids=["Depo", "GSM"])
def test_worked_examples_of_depo_and_gsm(make):
    """Guards the examples in the docstrings, which are worked by hand."""
    task = Depo(3, 2, 2, 9, window=6) if make is Depo else GSM(2, 4, 7, 26, window=9)
    rows = re.findall(r"^ +(window|tokens|targets) (.*)", make.__doc__, re.M)
    window, tokens, targets = (row.split() for _, row in rows)
    assert [int(x) for x in window] == [i // task.window + 1 for i in range(task.length)]
    READ[make](task, [task.words.index(x) for x in tokens],
               [IGNORE if x == "." else task.words.index(x) for x in targets])


def test_only_the_last_windows_are_scored():
    """Guards the paper's layouts: four windows of graph and one of questions; 1.65 windows."""
    for task, length, kinds in ((Depo(), 360, [False] * 4 + [True]), (GSM(), 99, [False, True])):
        windows = cut(task.batch(100, generator(0, 0))[1], task.window)
        assert [w.scored for w in windows] == kinds and windows[-1].stop == task.length == length


def assert_shares(counts, shares):
    """Counts of independent draws agree with their probabilities, to five standard deviations."""
    total = sum(counts.values())
    assert set(counts) <= {x for x, p in shares.items() if p}
    for x, p in shares.items():
        assert abs(counts[x] / total - p) < 5 * math.sqrt(p * (1 - p) / total), (x, counts, shares)


def test_depo_draws_what_it_says():
    """Guards the mixture: sizes with weight 1/(n + sqrt(nodes)), hops uniform, and edges, starts
    and places in the cycle that say nothing about one another."""
    task, level = Depo(nodes=10, hops=5, questions=4, names=5), 3
    sequences = read(task, 3000)
    weights = {n: 1 / (n + math.sqrt(10)) for n in range(3, 11)}
    assert_shares(Counter(len(after) for after, *_ in sequences),
                  {n: w / sum(weights.values()) for n, w in weights.items()})
    assert_shares(Counter(k for *_, questions in sequences for _, k in questions),
                  dict.fromkeys(range(1, 6), 0.2))
    follow, first, between = Counter(), Counter(), Counter()
    for after, edges, ((a, _), (b, _), *_) in read(task, 2000, level=level):
        follow.update(left[1] == right[0] for left, right in zip(edges, edges[1:]))
        first[[start for start, _ in edges].index(a)] += 1
        hops = 0
        while a != b:
            a, hops = after[a], hops + 1
        between[hops] += 1
    assert abs(follow[True] / follow.total() - 1 / 9) < 0.01
    assert_shares(first, dict.fromkeys(range(10), 1 / 10))
    assert_shares(between, dict.fromkeys(range(1, 10), 1 / 9))


def test_depo_names_are_drawn_as_in_the_original():
    """Guards the share of names with one token, and that the cycle does not begin with them: draw a
    length, then tokens, anew if it was had."""
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
    """Guards the mixture: levels uniform, statements in any order, an operand that is always the
    left one, constants never 0."""
    task = GSM(ops=4, statements=6, modulus=5, variables=6)
    problems = read(task, 3000)
    assert_shares(Counter(len(needed) for _, needed, _ in problems),
                  dict.fromkeys(range(1, 5), 0.25))
    places, sides, constants = Counter(), Counter(), Counter()
    for statements, needed, asked in problems:
        places[[x for x, *_ in statements].index(asked)] += 1
        for x, _, left, _, right, _ in statements:
            constants.update(y for y in (left, right) if isinstance(y, int))
            if isinstance(left, int) != isinstance(right, int):
                sides[isinstance(left, int)] += 1
    assert_shares(places, dict.fromkeys(range(6), 1 / 6))
    assert_shares(sides, {True: 0.5, False: 0.5})
    assert_shares(constants, dict.fromkeys(range(1, 5), 0.25))


def canonical(task, sequence):
    """What is held out, as a set: the edges of a cycle, or the needed statements."""
    if isinstance(task, Depo):
        return frozenset(sequence[0].items())
    statements, needed, _ = sequence
    return frozenset(tuple(x) for x in statements if x[0] in needed)


@pytest.mark.parametrize("task, instances",
                         [(Depo(nodes=3, hops=2, questions=2, names=2), 40),
                          (Depo(nodes=4, hops=1, questions=1, names=2), 40 + 90),
                          (GSM(ops=1, statements=3, modulus=3, variables=3), 36)], ids=kind)
def test_train_and_held_out_instances_are_disjoint(task, instances):
    """Guards the split: a hash of the order of edges or statements, or of distractors, would put
    one instance into both."""
    train, held_out = ({canonical(task, sequence) for sequence in read(task, 3000, split)}
                       for split in ("train", "held-out"))
    assert train and held_out and not train & held_out
    assert len(train | held_out) == instances


def test_one_instance_in_eight_is_held_out():
    """Guards the hash on integers that are not bits."""
    for high, size in ((2550 * 2550, 75), (44, 4), (9, 3)):
        x = torch.randint(high, (50_000, size), generator=generator(0, 0))
        assert abs(in_held_out(x).double().mean().item() - 1 / 8) < (0.02 if high == 9 else 0.008)


@pytest.mark.parametrize("task", [Rule110(5, 2, 3), Depo(6, 3, 2, 4), GSM(2, 5, 5)], ids=kind)
def test_batches_come_from_the_generator_alone(task):
    """Guards (seed, step) -> data: a draw from the global generator, a tensor on another device."""
    state, batches = torch.get_rng_state(), []
    for device in ("cpu", "meta"):  # meta: what is made without naming the device is of no use
        numbers = generator(3, 0)
        with torch.device(device):
            batches.append([task.batch(50, numbers, split, level) for split, level in
                            product(("train", "held-out"), (None, task.levels[-1]))])
    assert torch.equal(state, torch.get_rng_state())
    for a, b in zip(*batches):
        assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])
    assert not torch.equal(a[0], task.batch(50, numbers, "held-out", task.levels[-1])[0])


@pytest.mark.parametrize("make, name, value", [
    *((Depo, *x) for x in (("nodes", 2), ("nodes", 2551), ("hops", 0), ("questions", 0),
                           ("questions", 76), ("names", 1), ("window", 0))),
    *((GSM, *x) for x in (("ops", 0), ("statements", 9), ("modulus", 9), ("modulus", 2),
                          ("modulus", -7), ("variables", 15), ("question", "middle"),
                          ("window", 0)))])
def test_impossible_tasks(make, name, value):
    """Guards against endless draws and silence: one line, first the parameter and its value."""
    with pytest.raises(ValueError, match=rf"^{name} {value}: must be [^\n]*$"):
        make(**{name: value})


@pytest.mark.parametrize("task, level", [(Depo(), 0), (Depo(), 17), (GSM(), 0), (GSM(), 9)])
def test_impossible_levels(task, level):
    """Guards tokens of another kind: 17 hops would be spelled as the answer marker."""
    with pytest.raises(ValueError, match=rf"^level {level}: must be from 1 to \d+$"):
        task.batch(1, generator(0, 0), level=level)


def test_generators_differ():
    """Guards the seeding: the CPU generator drops the high half of a seed."""
    draws = [torch.randint(2**60, (), generator=generator(*key)).item()
             for key in product(range(4), range(2), range(4))]
    assert len(set(draws)) == len(draws)


@pytest.mark.parametrize("level", [-1, 10_001])
def test_impossible_steps(level):
    """Guards a curriculum of Rule 110: a level that would run for ever."""
    with pytest.raises(ValueError, match=rf"^level {level}: must be from 0 to 10000$"):
        Rule110().batch(1, generator(0, 0), level=level)


@pytest.mark.parametrize("name", TASKS)
def test_show_aligns_tokens_and_targets(name):
    """Guards the worked example: aligned columns, one for each token."""
    task = TASKS[name]()
    window, tokens, targets = (line.split()[1:] for line in task.show().splitlines()[1:4])
    assert len(window) == len(tokens) == len(targets) == task.length
    assert window[-1] == str(-(-task.length // task.window)) and "." in targets


# ------------------------------------------------------------------------------------ 8. optimizers

def test_every_parameter_is_in_one_group():
    """Guards training by halves: a parameter without optimizer, with two, or in the wrong."""
    model = hybrid()
    optimizers = train.make_optimizers(model, 1e-3, 1e-3)
    ids = [[id(p) for group in o.param_groups for p in group["params"]] for o in optimizers]
    assert sorted(sum(ids, [])) == sorted(id(p) for p in model.parameters())
    names = {id(p): name for name, p in model.named_parameters()}
    assert {names[i].split(".")[-1] for i in ids[1]} == {
        "embedding", "weight", "A_log", "dt_bias"}
    assert all(group["weight_decay"] == 0 for group in optimizers[1].param_groups)


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


def test_start_values_survive_construction():
    """Guards GDN's own start values against a generic initialisation pass."""
    model = Hybrid(Config(3, 24, "s", d_model=512, n_head=128))
    layer = model.layers[0].mixer
    assert isinstance(layer, GatedDeltaNet)
    assert 0.9 < model.embedding.std() < 1.1 and not model.out.weight.any()
    assert model.position is None
    assert 0.45 < Hybrid(Config(3, 24, d_model=512, position="window")).position.std() < 0.55
    A, dt = layer.A_log.exp(), F.softplus(layer.dt_bias)
    assert 0.01 <= A.min() < 1 < 15 < A.max() <= 16
    assert 1e-3 * 0.999 <= dt.min() < 2e-3 and 5e-2 < dt.max() <= 1e-1 * 1.001


# ------------------------------------------------------------------------------- 9. reproducibility

def lines_of(folder):
    """The log without the one thing that may differ, wall-clock time."""
    lines = [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("seconds", "command")} for line in lines]


def weights_of(folder, loops):
    return torch.load(Path(folder) / f"N{loops}.pt", weights_only=True)["model"]


def same_weights(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_same_seed_same_numbers_and_evaluation_disturbs_nothing(tmp_path):
    """Guards reproducibility: global randomness, an evaluation that draws training's."""
    base = [*TINY, "--steps", "12", "--loops", "2"]
    for name, extra in (("a", ""), ("b", ""), ("often", "--eval_every 1"), ("seed", "--seed 2")):
        assert train.main([*base, *extra.split(), "--out", str(tmp_path / name)]) == 0
    assert lines_of(tmp_path / "a") == lines_of(tmp_path / "b")
    weights = {name: weights_of(tmp_path / name, 2) for name in ("a", "b", "often", "seed")}
    assert same_weights(weights["a"], weights["b"]) and same_weights(weights["a"], weights["often"])
    assert not same_weights(weights["a"], weights["seed"])


def test_threads_change_rounding_only():
    """Guards "other numbers on another machine are rounding": in float64 nothing is left of it."""
    task, ends = Rule110(), []
    data = task.batch(64 * 6, generator(1, 0))
    for threads in (1, 2):
        torch.set_num_threads(threads)
        torch.manual_seed(1)
        model = Hybrid(Config(task.vocab_size, task.window, "as", 64, dtype="float64")).double()
        step = train.make_step(model, train.make_optimizers(model, 4e-3, 1e-3),
                               train.windows_of(task, task.window), 2)
        ends.append(torch.stack([step(*batch) for batch in zip(*(x.split(64) for x in data))]))
    torch.set_num_threads(1)
    torch.testing.assert_close(*ends, rtol=1e-9, atol=1e-9)


def test_library_calls_leave_the_random_state_alone(tmp_path):
    """Guards a caller's own draws: build and load start from a seed of their own."""
    folder, _ = run_of(tmp_path, "run", "--loops 2")
    options = train.parse(train.get_parser(), TINY) | {"dtype": "float32"}
    for call in (lambda: train.build(options), lambda: train.load(folder / "N2.pt")):
        draws = []
        for _ in range(2):
            torch.manual_seed(5)
            torch.rand(3)
            if draws:
                call()
            draws.append(torch.rand(3))
        assert torch.equal(*draws)


def test_load_gives_the_trained_model(tmp_path):
    """Guards `load`: task, weights and N of the checkpoint, not of the start."""
    folder, records = run_of(tmp_path, "run", "--loops 1,2 --t 2 --seed 3 --lr 0.1")
    task, model, loops = train.load(str(folder / "N2.pt"))
    assert (task.t, task.cells, loops) == (2, 4, 2)
    assert same_weights(model.state_dict(), weights_of(folder, 2))
    held_out = task.batch(32, generator(0, train.EVAL), "held-out", 2)
    assert algorithm1(model, *held_out, loops)[0].item() == pytest.approx(records[-1]["loss"])


def interrupt(patch, step):
    """Ctrl-C in the step-th training step, counted over every N."""
    calls, factor = iter(range(1, 100)), train.lr_factor  # called once a step

    def interrupting(*arguments):
        if next(calls) == step:
            os.kill(os.getpid(), signal.SIGINT)
        return factor(*arguments)

    patch.setattr(train, "lr_factor", interrupting)


def test_ctrl_c_twice_stops_at_once(tmp_path, monkeypatch, capsys):
    """Guards the second Ctrl-C: one line instead of a traceback."""
    interrupt(monkeypatch, 3)
    interrupt(monkeypatch, 3)  # one around the other, in the same step
    arguments = [*TINY, "--steps", "5", "--loops", "1", "--out", str(tmp_path / "run")]
    assert train.main(arguments) == 130
    assert capsys.readouterr().err.startswith("train.py: stopped at once")


@pytest.mark.parametrize("when, code", [("print_facts", 130), ("batches", 0)])
def test_ctrl_c_after_the_end_changes_nothing(tmp_path, monkeypatch, when, code):
    """Guards a finished run that is resumed and stopped: its log and checkpoints stay."""
    folder = tmp_path / "run"
    arguments = [*TINY, "--steps", "2", "--loops", "1,2", "--out", str(folder)]
    assert train.main(arguments) == 0
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    once = iter([signal.SIGINT])
    monkeypatch.setattr(train, when, lambda *_: os.kill(os.getpid(), next(once, 0)))
    assert train.main(["--resume", str(folder)]) == code
    assert files == {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("loops, stop_after", [(1, 3), (1, 10), (2, 7)])
def test_resume_is_exact(tmp_path, monkeypatch, capsys, loops, stop_after):
    """Guards --resume: Ctrl-C after any step, in either model, then on: bitwise the same."""
    base = [*TINY, "--steps", "10", "--eval_every", "4", "--loops", "1,2"]
    assert train.main([*base, "--out", str(tmp_path / "whole")]) == 0
    with monkeypatch.context() as patch:
        interrupt(patch, 10 * (loops - 1) + stop_after)
        assert train.main([*base, "--out", str(tmp_path / "cut")]) == 130
    assert f"--resume {tmp_path / 'cut'}" in capsys.readouterr().err
    saved = torch.load(tmp_path / f"cut/N{loops}.pt", weights_only=True)
    assert saved["step"] == stop_after
    assert train.main(["--resume", str(tmp_path / "cut")]) == 0
    assert lines_of(tmp_path / "whole")[1:] == lines_of(tmp_path / "cut")[1:]
    assert [line["step"] for line in lines_of(tmp_path / "cut")[1:]] == [0, 4, 8, 10] * 2
    seconds = [json.loads(line)["seconds"] for line in (tmp_path / "cut/log.jsonl").open()
               if "seconds" in line]
    assert seconds[:4] == sorted(seconds[:4]) and seconds[4:] == sorted(seconds[4:])
    for loops in (1, 2):
        assert same_weights(*(weights_of(tmp_path / name, loops) for name in ("whole", "cut")))
    assert not list(tmp_path.glob("*/*.tmp"))


def test_training_equals_a_plain_loop(tmp_path, monkeypatch):
    """Guards the training step: clipping, schedule, rates, splits, order and seeds of the data."""
    monkeypatch.setattr(train, "CHUNK", 2)
    options = "--seed 3 --loops 2 --automaton 30 --steps 5 --lr 0.05 --muon_lr 0.02"
    arguments = [*TINY, *options.split()]
    assert train.main([*arguments, "--out", str(tmp_path)]) == 0
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
    for name, weight in weights_of(tmp_path, 2).items():
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


def test_write_leaves_no_half_file(tmp_path, monkeypatch):
    """Guards the files that were there: a save that dies halfway changes nothing."""
    path = tmp_path / "file"
    path.write_text("old")

    def dying(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", dying)
    with pytest.raises(KeyboardInterrupt):
        train.write(path, b"new")
    assert path.read_text() == "old"


def test_disk_full_is_one_line(tmp_path, monkeypatch, capsys):
    """Guards a checkpoint that can't be written: one line, exit code 2."""
    def full(path, data, write=train.write):
        if path.suffix == ".pt":
            raise OSError(28, "No space left on device", str(path))
        write(path, data)

    arguments = [*TINY, "--steps", "1", "--loops", "1", "--out", str(tmp_path / "run")]
    monkeypatch.setattr(train, "write", full)
    assert train.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "No space left on device" in error and "N1.pt" in error


def test_bfloat16_products():
    """Guards the dtypes on a GPU: products in bfloat16, S, gradients and loss in float32."""
    model, (tokens, targets) = hybrid(dtype="float32"), sequences(B=16)
    low = Hybrid(Config(3, 5, "asas", 16, 2, dtype="bfloat16"))
    low.load_state_dict(model.state_dict())
    inside = []
    low.layers[1].up.register_forward_hook(lambda *hook: inside.append(hook[2].dtype))
    loss, exact = (algorithm1(m, tokens, targets, 2)[0] for m in (low, model))
    loss.backward()
    assert set(inside) == {torch.bfloat16} and loss.dtype == torch.float32
    assert all(p.grad.dtype == torch.float32 for p in low.parameters())
    assert sleep(low, tokens[:, :5], low.empty_memory(16), 2).S[1].dtype == torch.float32
    assert 0 < abs(loss - exact) < 0.05 * exact


def run_of(tmp_path, name, *options):
    """A short run on the command line: its folder and the records of its log."""
    assert train.main([*TINY, "--steps", "3", "--out", str(tmp_path / name),
                       *(word for option in options for word in option.split())]) == 0
    return tmp_path / name, lines_of(tmp_path / name)[1:]


def test_init_goes_on_from_a_trained_model(tmp_path):
    """Guards the Jet-Nemotron recipe: train with N = 1, go on with N = 2 in the middle blocks."""
    first, records = run_of(tmp_path, "first", "--layout asas --loops 1")
    options = f"--layout asas --loops 1,2 --loop_blocks 1:3 --init {first}"
    _, more = run_of(tmp_path, "more", options)
    assert more[0]["loss"] == records[-1]["loss"]  # N = 1, step 0
    assert more[2]["step"] == 0 and more[2]["loss"] != records[-1]["loss"]
    long, _ = run_of(tmp_path, "long", "--position window --loops 1")
    short, _ = run_of(tmp_path, "short", f"--position window --window 3 --loops 1 --init {long}")
    start = torch.load(short / "start.pt", weights_only=True)["model"]["position"]
    assert torch.equal(start, weights_of(long, 1)["position"][:3])


def test_inserted_memories_start_as_the_identity(tmp_path, capsys):
    """Guards the Ouro recipe: new blocks change nothing at first, and --train new only them."""
    options = "--loops 2 --window 10 --sleep_at wake --no-carry_S"
    looped, records = run_of(tmp_path, "looped", options, "--layout aa")
    options += f" --layout ama --train new --init {looped}"
    _, same = run_of(tmp_path, "same", options)
    assert same[0]["loss"] == pytest.approx(records[-1]["loss"], abs=1e-6)
    options = f"--layout ama --loops 2 --train new --init {looped}"  # hard eviction, real sleeps
    grafted, more = run_of(tmp_path, "grafted", options)
    assert more[-1]["step"] == 3
    old, new = weights_of(looped, 2), weights_of(grafted, 2)
    moved = {name: name.replace("layers.1.", "layers.2.") for name in old}
    assert all(torch.equal(old[name], new[moved[name]]) for name in old)
    assert new["layers.1.mixer.out.weight"].any()
    options = f"--layout ama --loops 2 --eviction sliding --init {grafted}"
    _, both = run_of(tmp_path, "both", options)
    assert len(both) == 2
    (looped / "N2.pt").unlink()  # a run goes on without the one that it came from,
    (grafted / "N2.pt").unlink()  # even before its first checkpoint
    (grafted / "log.jsonl").write_text((grafted / "log.jsonl").read_text().splitlines()[0])
    assert train.main(["--resume", str(grafted)]) == 0
    assert same_weights(weights_of(grafted, 2), new)


def test_init_that_does_not_fit(tmp_path, capsys):
    """Guards --init: another layout, width, window or vocabulary, two models, nothing new."""
    two, _ = run_of(tmp_path, "two", "--layout aa --loops 1,2")
    for options in (f"{two}", f"{two}/N1.pt", f"{two}/N1.pt --layout aa --d_model 32",
                    f"{two}/N1.pt --layout aa --train new", f"{two}/log.jsonl",
                    f"{two}/N1.pt --layout aa --n_head 4", f"{two}/N1.pt --layout aaa",
                    f"{two}/N1.pt --layout aa --position window"):
        options = "--init " + options
        assert "must " in refused(capsys, [*TINY, "--out", str(tmp_path / "new"), *options.split()])
    for task, words, others in (  # as many words, but others
            ("gsm --ops 1 --statements 3", "--modulus 5 --variables 8",
             "--modulus 7 --variables 6"),
            ("depo --nodes 4 --questions 2", "--names 4 --hops 4", "--names 3 --hops 6")):
        run = [*f"--task {task} --loops 1 --steps 1".split(), *TINY[4:]]
        old, new = str(tmp_path / task[:3]), str(tmp_path / "new")
        assert train.main([*run, *words.split(), "--out", old]) == 0
        assert "vocabulary" in refused(capsys, [*run, *others.split(), "--init", old, "--out", new])
    assert not (tmp_path / "new").exists()


def test_curriculum_and_schedule(tmp_path):
    """Guards the stages: each value for an equal part of the run, in the order given."""
    assert [train.stage([1, 2, 4], step, 7) for step in range(7)] == [1, 1, 1, 2, 2, 4, 4]
    assert train.stage(None, 3, 7, default=5) == 5
    options = train.get_parser().parse_args([*TINY, "--curriculum", "1,3", "--steps", "4"])
    task, data = Rule110(4, 2, 1), train.batches(Rule110(4, 2, 1), options, 0)
    for step in range(4):
        expected = task.batch(8, generator(1, 0, step), "train", level=[1, 1, 3, 3][step])
        assert all(torch.equal(a, b) for a, b in zip(next(data), expected))
    _, records = run_of(tmp_path, "run", "--loops 4 --loops_schedule 1,2,4")
    assert records[-1]["token_passes"] == 8 * (8 * (1 + 2 + 4) + 3 * 2)


def recorded(monkeypatch):
    """What algorithm1 is called with from now on: loops, tokens, in training?"""
    used, algorithm = [], train.algorithm1

    def recording(model, tokens, targets, loops, windows):
        used.append((loops, tokens, torch.is_grad_enabled()))
        return algorithm(model, tokens, targets, loops, windows)

    monkeypatch.setattr(train, "algorithm1", recording)
    return used


def test_loops_of_a_schedule_and_seen_batches(tmp_path, monkeypatch):
    """Guards two promises: each N for its part of the run; `seen` are the first sequences read."""
    used = recorded(monkeypatch)
    arguments = "--loops 2 --loops_schedule 1,2 --steps 6 --batch 4 --eval_size 16"
    _, records = run_of(tmp_path, "run", arguments)
    trained = [(loops, tokens) for loops, tokens, training in used if training]
    assert [loops for loops, _ in trained] == [1, 1, 1, 2, 2, 2]
    assert records[-1]["token_passes"] == 4 * (8 * 9 + 6 * 2)
    assert "seen" in records[-1] and "seen" not in records[0]
    assert torch.equal(used[-1][1], torch.cat([tokens for _, tokens in trained[:4]]))
    one = train.get_parser().parse_args(TINY)
    one.batch, one.steps = 4, 9
    tokens, targets = train.seen(Rule110(4, 2, 1), one, 7)
    data = train.batches(Rule110(4, 2, 1), one, 0)
    expected = [torch.cat(pair)[:7] for pair in zip(next(data), next(data))]
    assert torch.equal(tokens, expected[0]) and torch.equal(targets, expected[1])


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


def test_evaluation_with_other_loops_and_by_level(tmp_path):
    """Guards --eval_loops and the levels: another N is used, the mean is that of the levels."""
    folder, records = run_of(tmp_path, "run", "--loops 2 --eval_loops 1,2 --lr 0.1")
    others = records[-1]["eval_loops"]
    assert others["2"] == {name: records[-1][name] for name in ("loss", "bit", "exact", "floor")}
    assert others["1"]["loss"] != others["2"]["loss"] and "eval_loops" not in records[0]
    arguments = "--task gsm --ops 2 --statements 4 --variables 4 --modulus 3 --window 9 --steps 0"
    folder = tmp_path / "gsm"
    assert train.main([*TINY[4:], *arguments.split(), "--loops", "1", "--out", str(folder)]) == 0
    record, = lines_of(folder)[1:]
    assert record["step"] == 0 and set(record["levels"]) == {"1", "2"}
    assert record["exact"] == pytest.approx(
        sum(scores["exact"] for scores in record["levels"].values()) / 2)


# ------------------------------------------------------------------------------- 9a. speed, memory

cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize("layout, eviction", [("asas", "hard"), ("sa", "sliding"), ("as", "none")])
def test_what_a_sleep_leaves_out_is_not_needed(layout, eviction):
    """Guards the shortcut asleep: without its last h the same memory remains."""
    model, window = hybrid(layout, eviction=eviction), torch.randint(3, (2, 5))
    memory = sleep(model, window, model.empty_memory(2), 2)
    assert passes(model, window, model.empty_memory(2), 2, need_h=False)[0] is None
    h = model.embed(window)
    h, first = model.blocks(h, model.empty_memory(2), 0, len(layout))
    h, expected = model.blocks(h, model.empty_memory(2)._replace(S=first.S), 0, len(layout))
    for a, b in zip(memory.cache + memory.S, expected.cache + expected.S):
        assert type(a) is type(b)
        for x, y in zip(*((e,) if isinstance(e, torch.Tensor) else e or () for e in (a, b))):
            assert torch.equal(x, y)


@pytest.fixture
def bench():
    """results/bench.py as a module of its own, made fast."""
    spec = importlib.util.spec_from_file_location("bench", HERE / "results/bench.py")
    spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
    module.SECONDS, module.CONTEXTS = 1e-9, (1, 10, 50)
    return module


@pytest.mark.parametrize("layout, loops, variant", [
    ("asas", 1, {}), ("sa", 3, {}), ("as", 2, {"sleep_at": "wake", "carry_S": False}),
    ("asas", 3, {"loop_blocks": (1, 3)}), ("asas", 3, {"loop_blocks": (2, 4)})])
def test_model_flops_by_counting(bench, layout, loops, variant):
    """Guards the share of the peak: the formula against torch's own count of a step's products."""
    from torch.utils.flop_counter import FlopCounterMode
    model = Hybrid(Config(2, 64, layout, 64, n_head=2, **variant))
    tokens, targets = sequences(windows=2, window=64, rest=64)
    windows = cut(targets, 64)
    with FlopCounterMode(display=False) as counter:
        loss, *_ = algorithm1(model, tokens % 2, targets.clamp(max=1), loops, windows)
        loss.backward()
    counted, ours = counter.get_total_flops(), 2 * bench.model_flops(model, windows, loops)
    assert 0.85 < counted / ours < 1.15, (counted, ours)


def test_bench(bench, tmp_path, monkeypatch, capsys):
    """Guards the bench: bytes that depend on the context, a row without its facts, lost rows."""
    out = tmp_path / "bench.jsonl"
    command = [*TINY, "--states=2", "--loops=1,2", f"--out={out}"]
    assert bench.main(command) == 0
    header, rate, *rows = map(json.loads, out.read_text().splitlines())
    speed, memory = rows[:-3], rows[-3:]
    config = header["config"]
    assert header["command"].startswith("python results/bench.py --cells 4 ")
    assert (config["layout"], config["fast"], config["dtype"]) == ("asas", "eager", "float32")
    assert rate["matrix_rate"] > 0
    assert [(row["loops"], row["window"]) for row in speed] == [
        (1, 4), (2, 4), (1, 2), (1, 8), (1, 10)]
    assert all(row[key] > 0 for row in speed for key in (
        "ms", "tokens_per_s", "first_step_s", "ready_s", "flops", "wake_ms", "sleep_ms"))
    assert [row["windows"] for row in memory] == [1, 10, 50]
    assert len({(row["S"], row["cache"]) for row in memory}) == 1
    first, _, last = (row["never_evicted"] for row in memory)
    keys = 2 * 2 * 4 * 16 * 4  # two blocks, keys and values, L, d, bytes
    assert first == memory[0]["cache"] and last == first + 49 * keys
    assert len(capsys.readouterr().out.splitlines()) == 5 + len(speed) + 2 + len(memory)

    with pytest.raises(SystemExit) as halt:
        bench.main(command)
    assert halt.value.code == 2 and "must be a new file" in capsys.readouterr().err

    def interrupted(options, loops):
        if loops == 2:
            raise KeyboardInterrupt
        return speed[0]
    monkeypatch.setattr(bench, "bench_row", interrupted)
    command[-1] = f"--out={(half := tmp_path / 'half.jsonl')}"
    assert bench.main(command) == 130 and "bench.py: stopped" in capsys.readouterr().err
    assert json.loads(half.read_text().splitlines()[-1]) == speed[0]


@pytest.mark.parametrize("options, named", [
    ("--init x", "--init: must"), ("--curriculum 1,2", "--curriculum: must"),
    ("--loops_schedule 1,2", "--loops_schedule: must"), ("--eval_loops 4", "--eval_loops: must"),
    ("--resume x", "--resume: must"),
    ("--cells 2", "--cells 2: must"), ("--out missing/bench.jsonl", "--out missing/bench.jsonl: "),
    ("--task gsm --cells 4", "--cells 4: must"), ("--fast graph", "--fast graph: must")])
def test_what_the_bench_refuses(bench, capsys, options, named):
    """Guards options that the bench would silently ignore, and tracebacks."""
    with pytest.raises(SystemExit) as halt:
        bench.main(["--device=cpu", *options.split()])
    error = capsys.readouterr().err
    assert halt.value.code == 2 and named in error and error.count("\n") == 1


def test_fast_needs_a_gpu(tmp_path, capsys):
    """Guards a promise that cannot be kept: graphs on a CPU."""
    for fast in ("graph", "compile"):
        with pytest.raises(SystemExit) as halt:
            train.main([*TINY, f"--fast={fast}", f"--out={tmp_path / 'run'}"])
        assert halt.value.code == 2
        assert f"--fast {fast}: must be eager or auto on a CPU" in capsys.readouterr().err


def literal_in_layers_layout(rule, qkv, log_alpha, beta, S):
    q, k, v = (x.transpose(1, 2) for x in qkv.unbind(2))
    o, S = LITERAL_RULES[rule](q, k, v, log_alpha.mT, beta.mT, S)
    return o.transpose(1, 2), S


def both_ways(ours, literal, inputs):
    """Outputs and gradients of `ours` at these inputs, and of `literal` at the same in float64."""
    results = []
    for function, dtype in ((ours, None), (literal, torch.float64)):
        leaves = [x.detach().to(dtype or x.dtype).requires_grad_() for x in inputs]
        outputs = function(*leaves)
        torch.manual_seed(1)
        cotangents = [torch.randn(x.shape, device=x.device).bfloat16().to(x) for x in outputs]
        results.append([*outputs, *torch.autograd.grad(
            outputs, leaves, cotangents, allow_unused=True, materialize_grads=True)])
    return results


@cuda
@pytest.mark.parametrize("L", [1, 2, 3, 4, 24, 32, 75, 130])
@pytest.mark.parametrize("H, K", [(4, 64), (3, 32), (2, 16)])
@pytest.mark.parametrize("collinear", [False, True])
def test_kernels_equal_the_literal_form(L, H, K, collinear):
    """Guards the Triton kernels, values and gradients: bfloat16 factors allow 1 %, a bug does not.

    Nearly collinear keys, where an inverse by powers explodes, make a small beta gradient noisy.
    """
    x = torch.randn(5, L, 3 * H * K + 8, device="cuda")
    w = torch.rand(4, 3 * H * K, device="cuda") - 0.5

    def literal_prepare(x, w):
        y = literal_conv(x[..., :3 * H * K], w).unflatten(-1, (3, H, K))
        return [torch.stack([F.normalize(y[:, :, 0], dim=-1), F.normalize(y[:, :, 1], dim=-1),
                             y[:, :, 2]], dim=2)]

    ours, literal = both_ways(lambda x, w: [prepare(x[..., :3 * H * K], w, H)], literal_prepare,
                              [x.bfloat16(), w])
    close(ours, literal, 0.01)
    qkv = literal[0].detach().float().clone()
    log_alpha, beta = -torch.rand(5, L, H, device="cuda"), torch.rand(5, L, H, device="cuda")
    if collinear:
        qkv[:, :, 1] = F.normalize(qkv[:, :1, 1] + 1e-2 * qkv[:, :, 1], dim=-1)
        log_alpha, beta = 1e-3 * log_alpha, 1 - 1e-3 * beta
    inputs = [qkv.bfloat16(), log_alpha, beta, torch.randn(5, H, K, K, device="cuda")]
    for rule in KERNELS:
        assert form(rule, inputs[0]) is KERNELS[rule]
        close(*both_ways(partial(update, rule), partial(literal_in_layers_layout, rule), inputs),
              0.05 if collinear else 0.01)


def gpu_run(folder, fast, *options):
    """A run of 20 steps on the GPU -> the records of its log."""
    assert train.main(["--layout=asas", "--d_model=64", "--steps=20", "--eval_every=5",
                       "--batch=64", "--loops=2", "--device=cuda", f"--fast={fast}",
                       f"--out={folder}", *options]) == 0
    return lines_of(folder)[1:]


@cuda
@pytest.mark.parametrize("fast, options", [
    ("graph", []), ("graph", ["--loops_schedule=1,2"]), ("graph", ["--eviction=sliding"]),
    ("graph", ["--layout=asmas", "--train=new"]), ("compile", []),
    ("compile", ["--loops_schedule=1,2", "--eviction=sliding"])])
def test_fast_steps_equal_eager_steps(tmp_path, monkeypatch, fast, options):
    """Guards the captured step: the same losses over 20 steps, also when resumed in the middle."""
    if "--train=new" in options:
        gpu_run(tmp_path / "old", "graph")
        options = [*options, f"--init={tmp_path / 'old'}"]
    eager = gpu_run(tmp_path / "eager", "eager", *options)
    ours = gpu_run(tmp_path / fast, fast, *options)
    assert eager[-1]["loss"] < eager[0]["loss"]
    with monkeypatch.context() as patch:
        interrupt(patch, 10)
        with pytest.raises(AssertionError):
            gpu_run(tmp_path / "resumed", fast, *options)
    assert torch.load(tmp_path / "resumed/N2.pt", weights_only=True)["step"] == 10
    resumed = gpu_run(tmp_path / "resumed", fast, *options)
    for records in (ours, resumed):
        for a, b in zip(records, eager, strict=True):
            assert a["step"] == b["step"]
            assert math.isclose(a["loss"], b["loss"], rel_tol=1e-4 if fast == "graph" else 2e-2)


@cuda
@pytest.mark.parametrize("fast", ["graph", "compile"])
def test_rates_act_inside_the_graph(fast):
    """Guards the schedule: a rate that the recording froze. And evaluation compiles nothing."""
    from torch._dynamo.utils import counters
    task = Rule110()
    model = Hybrid(Config(task.vocab_size, task.window, dtype="bfloat16", d_model=64)).cuda()
    optimizers = train.make_optimizers(model, 1e-3, 1e-3)
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    for group in groups:
        group["lr"] = torch.full((), 1e-3, device="cuda")
    windows = train.windows_of(task, task.window)
    step, batch = train.fast_steps(model, optimizers, windows, fast)(2), task.batch(
        32, generator(1, 0, 0, "cuda"))
    states = []
    for rate in (1e-3, 1e-3, 1e-3, 1e-3, 1e-3, 0.0, 0.0, 1e-3):
        for group in groups:
            group["lr"].fill_(rate)
        step(*batch)
        states.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.equal(states[4], states[5]) and torch.equal(states[5], states[6])
    assert not torch.equal(states[3], states[4]) and not torch.equal(states[6], states[7])
    graphs = dict(counters["stats"])
    with train.uncompiled(fast):
        train.evaluate(model, *batch, 2, windows)
    assert dict(counters["stats"]) == graphs


# ---------------------------------------------------------------------- 9b. a fork: the dream

def test_a_dream_reads_what_it_said_and_is_told_the_states(monkeypatch):
    """Guards results/dream.py: a round that reads, or is told, another window than the next state,
    h or a cache handed on between rounds, S or its gradient not."""
    monkeypatch.syspath_prepend(HERE / "results")
    import dream
    k, R, B = 2, 3, 4
    tokens, answers, states = dream.draw(Rule110(5, 2, R * k), k, B, generator(0, 0), "train")
    for b, w, r in product(range(B), range(2), range(R)):
        assert torch.equal(states[b, w, r], rule110(tokens[b, 5 * w:5 * w + 5], k * (r + 1)))
    assert torch.equal(answers, states[:, :, -1, 0])

    model = dream.dreamer(Config(3, 5, "asas", 16, 2, "float64", position="window")).double()
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
    torch.testing.assert_close((loss, logits), (literal, answered))
    parameters = list(model.parameters())
    torch.testing.assert_close(*(torch.autograd.grad(x, parameters) for x in (loss, literal)))


def test_a_dream_is_asked_in_proportion(tmp_path, monkeypatch, capsys):
    """Guards results/dream.py as a program: N passes dream N / 2 times k steps, a line for each."""
    monkeypatch.syspath_prepend(HERE / "results")
    import dream
    used, algorithm1 = [], dream.algorithm1

    def recording(model, tokens, answers, states):
        expected = rule110(tokens[:, :4], 3 * states.shape[2])
        assert torch.equal(states[:, 0, -1], expected) and torch.equal(answers, expected[:, :1])
        used.append(2 * states.shape[2])
        return algorithm1(model, tokens, answers, states)

    monkeypatch.setattr(dream, "algorithm1", recording)
    dream.main("--t 6 --loops 4 --schedule 2,4 --eval_loops 8 --cells 4 --states 1 --layout as "
               "--d_model 16 --n_head 2 --batch 8 --steps 4 --eval_size 16 --device cpu --out "
               f"{tmp_path}/log.jsonl".split())
    assert used == [2, 2, 2, 4, 4, 4, 2, 4, 8]
    header, *records = map(json.loads, (tmp_path / "log.jsonl").read_text().splitlines())
    assert {"command", "commit", "versions", "hardware", "config"} == header.keys()
    assert [(x["loops"], x["t"], x["step"]) for x in records] == [
        (2, 3, 2), (4, 6, 2), (2, 3, 4), (4, 6, 4), (8, 12, 4)]
    assert len(capsys.readouterr().out.splitlines()) == len(records)


# ------------------------------------------------------------------------- several GPUs: torchrun

def torchrun(*arguments, ranks=2):
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}",
         str(HERE / "train.py"), *arguments], text=True, capture_output=True, timeout=200)


def assert_close_runs(a, b):
    for name, weight in weights_of(a, 2).items():
        torch.testing.assert_close(weights_of(b, 2)[name], weight, rtol=1e-4, atol=1e-5)
    for one, other in zip(lines_of(a)[1:], lines_of(b)[1:], strict=True):
        assert one["step"] == other["step"]
        for name in ("loss", *["train_loss"] * (one["step"] > 0)):
            assert one[name] == pytest.approx(other[name], rel=1e-4)


def test_ranks_together_are_one_process(tmp_path):
    """Guards torchrun: two processes (gloo, on a CPU) do what one does, to rounding; here their
    halves of a batch do not have the same number of scored tokens."""
    line = [*"--task depo --nodes 4 --hops 2 --questions 2 --names 4 --window 16".split(),
            *TINY[4:], "--loops=2", "--steps=20", "--eval_every=10"]
    assert train.main([*line, f"--out={tmp_path / 'one'}"]) == 0
    run = torchrun(*line, f"--out={tmp_path / 'two'}")
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("N 2  step ") == 3 and run.stdout.count("floor   always") == 1
    assert_close_runs(tmp_path / "one", tmp_path / "two")


def test_resume_with_more_ranks(tmp_path, monkeypatch):
    base = [*TINY, "--steps", "20", "--eval_every", "10", "--loops", "2"]
    assert train.main([*base, "--out", str(tmp_path / "whole")]) == 0
    with monkeypatch.context() as patch:
        interrupt(patch, 7)
        assert train.main([*base, "--out", str(tmp_path / "cut")]) == 130
    run = torchrun("--resume", str(tmp_path / "cut"))
    assert run.returncode == 0 and run.stdout.count("N 2  step ") == 2  # 10 and 20, not 0
    assert_close_runs(tmp_path / "whole", tmp_path / "cut")


def test_ranks_must_divide_the_batch(tmp_path):
    run = torchrun(*TINY, "--batch=7", "--steps=1", f"--out={tmp_path / 'new'}")
    assert run.returncode != 0 and not (tmp_path / "new").exists()
    assert re.findall(r"^train.py: .*", run.stderr, re.M) == [
        "train.py: error: --batch 7: must be a multiple of the 2 processes (see --help)"]


# ----------------------------------------------------------------------------- a night: sleep.py

@pytest.mark.parametrize("options", [
    "", "--states 3 --eviction sliding", "--layout asas --loop_blocks 1:3", "--layout aa",
    "--eviction none", "--task depo --nodes 4 --hops 2 --questions 2 --names 4 --window 16",
    "--task gsm --ops 1 --statements 3 --modulus 3 --variables 3 --window 8"])
def test_a_night_is_what_algorithm1_does(options, tmp_path, capsys, monkeypatch):
    """Guards `python sleep.py`: its answers are those of training, and behind a pass stands what
    comes of a night that ends there, all others as they are."""
    monkeypatch.chdir(tmp_path)
    size = TINY[4:] if "--task" in options else TINY
    assert train.main([*size, *options.split(), "--loops=1,2", "--steps=3", "--muon_lr=0.1"]) == 0
    task, model, N = train.load(next(Path("out").glob("*/N2.pt")))
    tokens, targets = task.batch(1, torch.Generator().manual_seed(0), "held-out", task.levels[-1])
    *asleep, asked = cut(targets, model.config.window)

    def answers(nights):
        memory = model.empty_memory(1)
        for passes_there, (start, stop, _) in zip(nights, asleep, strict=True):
            if passes_there:
                memory = sleep(model, tokens[:, start:stop], memory, passes_there)
            memory = evict(memory, model.config.keep)
        p = wake(model, tokens[:, asked.start:], memory)[0].softmax(-1)[0]
        return ", ".join(f"{task.words[x.argmax()]} {x.max():.2f}" + " (no)" * (x.argmax() != y)
                         for x, y in zip(p, targets[0, asked.start:].tolist()) if y >= 0).split(
                             ", ")[:4]

    capsys.readouterr()
    with torch.no_grad():
        night([])
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


@pytest.mark.parametrize("options, named", [
    ("--position=window", "position window: must be none"),
    ("--sleep_at=wake --no-carry_S", "loops 2: must be 1"),
    ("--task=depo --nodes=4 --hops=2 --questions=2 --names=4 --window=8", "window 8: must leave")])
def test_a_night_that_cannot_be_shown_is_refused(options, named, tmp_path, capsys):
    size = TINY[4:] if "--task" in options else TINY
    assert train.main([*size, *options.split(), "--loops=2", "--steps=0", f"--out={tmp_path}"]) == 0
    capsys.readouterr()
    assert train.in_one_line("sleep.py", night, [str(tmp_path)]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"sleep.py: error: {tmp_path}") and named in err and err.count("\n") == 1


def test_a_night_needs_a_run(tmp_path, monkeypatch, capsys):
    run = subprocess.run([sys.executable, HERE / "sleep.py"], text=True, cwd=tmp_path,
                         capture_output=True, timeout=100)
    assert run.returncode == 2 and run.stdout == "" and run.stderr == (
        "sleep.py: error: out: must hold a checkpoint N*.pt; python train.py makes one\n")
    monkeypatch.chdir(tmp_path)
    Path("N1.pt").write_text("damaged")
    for argument, named in (("none", "none: must hold"), (".", "N1.pt: must be a checkpoint")):
        assert train.in_one_line("sleep.py", night, [argument]) == 2
        out, err = capsys.readouterr()
        assert out == "" and named in err and err.count("\n") == 1


# -------------------------------------------------------------- 10. it learns, 11. the command line

def test_a_tiny_batch_is_overfitted():
    """Guards learning as a whole: a gradient that is zero or points elsewhere somewhere."""
    model = hybrid("as", window=4, dtype="float32")
    tokens, targets = Rule110(4, 2, 2).batch(8, generator(0, 0))
    optimizers = train.make_optimizers(model, 1e-2, 1e-2)
    for _ in range(60):
        loss, logits, labels = algorithm1(model, tokens, targets, 2)
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    assert loss < 0.01


def command(*arguments, cwd=HERE):
    return subprocess.run([sys.executable, str(HERE / "train.py"), *arguments], text=True, cwd=cwd,
                          capture_output=True, timeout=100)


def test_command_line_run(tmp_path):
    """Guards `python train.py`: facts, a line per evaluation, a table; each time a new folder."""
    for number in (1, 2):
        run = command(*TINY, "--steps", "4", "--eval_every", "2", cwd=tmp_path)
        assert run.returncode == 0 and run.stderr == ""
        assert run.stdout.count("exact") == 1 + 2 * (3 + 1) + 1 and "the floor" in run.stdout
        header, *records = lines_of(tmp_path / f"out/rule110-00{number}")
        assert set(header) == {"commit", "versions", "hardware", "config"}
        assert [(r["loops"], r["step"]) for r in records] == [*product([1, 2], [0, 2, 4])]
        assert set(records[0]) == {"loops", "step", "tokens", "token_passes", "train_loss", "loss",
                                   "bit", "exact", "floor"}
        assert records[-1]["tokens"] == 4 * 8 * 10 and records[-1]["token_passes"] == 4 * 8 * 18


def refused(capsys, arguments):
    """The one line that train.py prints when it refuses a value."""
    with pytest.raises(SystemExit) as exit:
        sys.exit(train.main(arguments))
    out, err = capsys.readouterr()
    assert exit.value.code == 2 and err.count("\n") == 1 and "Traceback" not in err, err
    return err


@pytest.mark.parametrize("flag, value", [
    ("--loops", "0"), ("--loops", "-1"), ("--loops", "a,b"), ("--loops", "2,2"), ("--loops", ""),
    ("--loops", "2147483647"), ("--eval_loops", "1025"),
    ("--t", "-1"), ("--t", "x"), ("--cells", "2"), ("--states", "0"), ("--automaton", "256"),
    ("--rule", "mamba3"), ("--nodes", "9"), ("--loop_blocks", "1:3"), ("--loop_blocks", "1"),
    ("--loop_blocks", "1:1"), ("--loops_schedule", "1,4"), ("--init", ""), ("--eviction", "soft"),
    ("--sleep_at", "wake"),
    ("--carry", "S"), ("--curriculum", "4,,8"),
    ("--curriculum", "hard"), ("--eval_loops", "0"), ("--init", "nowhere"), ("--train", "new"),
    ("--layout", "axs"), ("--layout", ""), ("--n_head", "3"), ("--n_head", "0"), ("--d_model", "0"),
    ("--window", "0"), ("--task", "sudoku"), ("--device", "tpu"), ("--dtype", "int8"),
    ("--steps", "-1"), ("--batch", "1.5"), ("--lr", "0"), ("--muon_lr", "nan"), ("--seed", "-1"),
    ("--eval_every", "0"), ("--eval_size", "0")])
def test_impossible_values(tmp_path, capsys, flag, value):
    """Guards against tracebacks and silence: the line names the flag and the value."""
    line = refused(capsys, [*TINY, "--out", str(tmp_path / "run"), f"{flag}={value}"])
    assert flag in line and repr(value) in line or f"{flag} {value}: " in line
    assert "must " in line or "choose from" in line
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="cuda is not missing here")
def test_missing_cuda(tmp_path, capsys):
    """Guards a crash deep inside torch."""
    assert "--device cuda" in refused(capsys, [*TINY[:-1], "cuda", "--out", str(tmp_path / "run")])


def test_the_size_of_the_paper(tmp_path, capsys):
    """Guards --paper: what is given wins, and it is no size for other tasks."""
    options = train.parse(train.get_parser(), "--paper --d_model 64 --t 8".split())
    task, model = train.build(options | {"dtype": "float32"})
    assert (task.length, model.config.layout, model.config.d_model) == (100, "asas", 64)
    assert (options["batch"], options["steps"], options["loops"]) == (512, 782, [1, 2])
    assert "--paper: must " in refused(capsys, ["--paper", "--task", "gsm"])
    gsm = "--task gsm --ops 2 --statements 4 --variables 4 --steps 0 --d_model 16 --loops 1"
    assert train.main([*gsm.split(), "--eval_size", "8", "--out", str(tmp_path)]) == 0
    assert "another configuration" in refused(capsys, ["--paper", "--out", str(tmp_path)])


def test_what_was_there_is_kept(tmp_path, capsys):
    """Guards results: an --out in use is refused, the same command goes on, nothing is lost."""
    run, other = str(tmp_path / "run"), tmp_path / "other"
    base = [*TINY, "--steps", "2", "--loops", "1", "--out"]
    assert train.main([*base, run]) == 0
    files = {path: path.read_bytes() for path in Path(run).iterdir()}
    assert "another configuration" in refused(capsys, [*base, run, "--seed", "2"])
    assert train.main([*base, run]) == 0  # finished already: prints its table
    assert files == {path: path.read_bytes() for path in Path(run).iterdir()}
    other.mkdir()
    (other / "thesis.tex").write_text("years of work")
    assert "--out" in refused(capsys, [*base, str(other)])
    assert "--out" in refused(capsys, [*base, str(other / "thesis.tex")])
    assert [path.name for path in other.iterdir()] == ["thesis.tex"]


def test_damaged_resume(tmp_path, capsys):
    """Guards --resume: missing, empty, truncated, of another model, or with other options."""
    base = [*TINY, "--steps", "2", "--loops", "1", "--out"]
    for name, extra in (("a", ""), ("wide", "--d_model 32"), ("seed", "--seed 2")):
        assert train.main([*base, str(tmp_path / name), *extra.split()]) == 0
    log, weights = tmp_path / "a/log.jsonl", tmp_path / "a/N1.pt"
    kept = weights.read_bytes()
    resume = ["--resume", str(tmp_path / "a")]
    assert "no log.jsonl" in refused(capsys, ["--resume", str(tmp_path / "missing")])
    assert "no other option" in refused(capsys, [*resume, "--steps", "9"])
    others = [(tmp_path / name / "N1.pt").read_bytes() for name in ("wide", "seed")]
    others += [train.as_file(torch.load(weights, weights_only=True) | wrong)
               for wrong in ({"records": [{}]}, {"records": 5}, {"fresh": []}, {"optimizers": []},
                             {"step": 3}, {"step": None}, {"seconds": None})]
    for damaged in (kept[:1000], kept[:-100], b"", *others):
        weights.write_bytes(damaged)
        before = log.read_bytes()
        assert "N1.pt" in refused(capsys, resume)
        assert log.read_bytes() == before and weights.read_bytes() == damaged
    weights.unlink()
    assert "N1.pt" in refused(capsys, resume)
    header = json.loads(log.read_text().splitlines()[0])
    wrong = [("cells", "4"), ("task", "zzz"), ("dtype", "float8"), ("loops", [0]), ("t", None)]
    texts = [json.dumps(header | {"config": header["config"] | {name: x}}) for name, x in wrong]
    for text in ("", "{", "{}\n", '{"config": {}}\n', *texts, '{"config": %s}' % texts[0]):
        log.write_text(text)
        refused(capsys, resume)


@pytest.mark.parametrize("every", ["4", "100"])
@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, monkeypatch, capsys, what, every):
    """Guards the last good checkpoint: the step is named, nothing is saved after it."""
    original, calls = train.algorithm1, iter(range(1, 100))

    def diverging(model, *rest):
        loss, *others = original(model, *rest)
        if next(calls) == 9:  # the root has value 0 and no derivative
            loss = loss * math.nan if what == "loss" else loss + (0 * loss).sqrt()
        return (loss, *others)

    folder = tmp_path / "run"
    monkeypatch.setattr(train, "algorithm1", diverging)
    monkeypatch.setattr(train, "evaluate", lambda *_: {"loss": 1.0, "bit": 0.5, "exact": 0.1})
    arguments = [*TINY, *f"--steps 40 --eval_every {every} --loops 1 --out {folder}".split()]
    assert train.main(arguments) == 1
    line = capsys.readouterr().err
    assert "step 9;" in line and str(folder / "N1.pt") in line and line.count("\n") == 1
    saved = torch.load(folder / "N1.pt", weights_only=True)
    assert saved["step"] == (8 if every == "4" else 0) and next(calls) < 22
    assert all(x.isfinite().all() for x in saved["model"].values())


def test_weights_that_overflow_are_not_saved(tmp_path):
    """Guards the last update before an evaluation, whose loss nobody has seen yet."""
    arguments = [*TINY, *"--steps 30 --eval_every 1 --loops 1 --muon_lr 1e30".split()]
    assert train.main([*arguments, "--out", str(tmp_path)]) == 1
    assert all(math.isfinite(record["loss"]) for record in lines_of(tmp_path)[1:])
    assert all(x.isfinite().all() for x in weights_of(tmp_path, 1).values())


# ------------------------------------------------------------------- 12. what a user might also do

def test_killed_at_any_moment_a_run_ends_where_it_would_have(tmp_path):
    """Guards the files against SIGKILL, writing included: on with the same command, bitwise."""
    start, _ = run_of(tmp_path, "start", "--loops 1")
    base = [*TINY, *"--steps 120 --eval_every 2 --loops 1,2 --seed 4".split(), f"--init={start}"]
    assert train.main([*base, f"--out={tmp_path / 'whole'}"]) == 0
    line = [sys.executable, HERE / "train.py", *base, f"--out={tmp_path / 'cut'}"]
    codes, chance = [], random.Random(0)
    while codes.count(-signal.SIGKILL) < 2:
        with subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                              env=os.environ | {"OMP_NUM_THREADS": "1"}) as process:
            for _ in range(chance.randrange(1, 12)):  # lines read before it dies
                process.stdout.readline()
            time.sleep(chance.uniform(0, 0.02))
            process.kill()
        codes.append(process.returncode)
        (start / "N1.pt").unlink(missing_ok=True)  # what it started from is not needed again
    assert train.main(["--resume", str(tmp_path / "cut")]) == 0
    assert lines_of(tmp_path / "cut")[1:] == lines_of(tmp_path / "whole")[1:]
    for loops in (1, 2):
        assert same_weights(*(weights_of(tmp_path / name, loops) for name in ("cut", "whole")))


def test_lines_arrive_and_sigterm_saves(tmp_path):
    """Guards output that waits in a buffer, and a run that a queue ends with SIGTERM."""
    environment = {x: y for x, y in os.environ.items() if x != "PYTHONUNBUFFERED"}
    options = f"--steps 100000 --eval_every 5 --loops 1 --out {tmp_path / 'run'}".split()
    with subprocess.Popen([sys.executable, HERE / "train.py", *TINY, *options], text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                          env=environment) as process:
        while "step     10" not in process.stdout.readline():
            assert process.poll() is None
        process.terminate()
        assert "--resume" in process.communicate(timeout=60)[1] and process.returncode == 130
    saved = torch.load(tmp_path / "run/N1.pt", weights_only=True)
    assert saved["step"] >= 10 and len(lines_of(tmp_path / "run")) == 2 + saved["step"] // 5


def test_a_folder_is_one_run_s(tmp_path, capsys):
    """Guards a log against two writers: the second is refused before it writes anything."""
    folder, _ = run_of(tmp_path, "run", "--loops 1")
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    with train.locked(folder):
        for arguments in ([*TINY, "--out", str(folder)], ["--resume", str(folder)]):
            assert "in use" in refused(capsys, arguments)
    assert files == {path.name: path.read_bytes() for path in folder.iterdir()}
    assert train.main(["--resume", str(folder)]) == 0


def test_signals_of_others_are_left_alone(tmp_path, monkeypatch):
    """Guards notebooks, whose threads may not ask for signals, and a parent's ignored SIGINT."""
    codes, seen = [], []
    arguments = [*TINY, "--steps", "1", "--loops", "1", "--out"]
    thread = threading.Thread(target=lambda: codes.append(
        train.main([*arguments, str(tmp_path / "thread")])))
    thread.start()
    thread.join()
    monkeypatch.setattr(train, "lr_factor", lambda *_: seen.append(
        signal.getsignal(signal.SIGINT)) or 1.0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    codes.append(train.main([*arguments, str(tmp_path / "ignored")]))
    assert codes == [0, 0] and seen == [signal.SIG_IGN] == [signal.getsignal(signal.SIGINT)]


def test_a_finished_run_is_read_where_nothing_can_be_written(tmp_path, monkeypatch, capsys):
    """Guards results on a read-only disk: --resume shows their table."""
    folder, _ = run_of(tmp_path, "run", "--loops 1,2")
    capsys.readouterr()
    monkeypatch.setattr(train, "write", lambda *_: 1 / 0)
    assert train.main(["--resume", str(folder)]) == 0
    assert "token passes" in capsys.readouterr().out


def test_closed_output_loses_words_only(tmp_path, monkeypatch):
    """Guards `>&- 2>&-`, where Python has no stdout and no stderr."""
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    assert train.main([*TINY, "--steps", "1", "--loops", "1", "--out", str(tmp_path)]) == 0


def test_the_facts_come_first(tmp_path, monkeypatch, capsys):
    """Guards silence: what takes long comes after the first lines, and Ctrl-C ends it at once."""
    monkeypatch.setattr(train, "floor", lambda *_: os.kill(os.getpid(), signal.SIGINT))
    assert train.main([*TINY, "--out", str(tmp_path / "run")]) == 130
    out, err = capsys.readouterr()
    assert out.startswith("task") and err.count("\n") == 1


@pytest.mark.parametrize("error, named", [
    (RuntimeError("Failed to find C compiler. Please specify via CC"), "no C compiler"),
    (torch.OutOfMemoryError("CUDA out of memory"), "not enough memory")])
def test_what_the_machine_lacks_is_one_line(tmp_path, monkeypatch, capsys, error, named):
    """Guards a traceback from deep inside torch or Triton."""
    monkeypatch.setattr(train, "train_model", lambda *_: (_ for _ in ()).throw(error))
    assert named in refused(capsys, [*TINY, "--out", str(tmp_path / "run")])


def test_the_commit_is_this_repository_s(tmp_path, monkeypatch):
    """Guards a copy without .git in another repository: that one's commit says nothing."""
    subprocess.run("git init -q && git -c user.name=a -c user.email=b commit -q --allow-empty -m c",
                   shell=True, check=True, cwd=tmp_path)
    monkeypatch.delenv("COMMIT", raising=False)
    monkeypatch.setattr(train, "__file__", str(tmp_path / "train.py"))
    assert train.make_header([], {"device": "cpu"})["commit"] == "unknown"


def test_help_without_docstrings(monkeypatch):
    """Guards `python -OO`, which has none."""
    monkeypatch.setattr(train, "__doc__", None)
    assert "--loops" in train.get_parser().format_help()


# --------------------------------------------------------------------------- 13. use as a library

@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad,
                                  lambda: torch.autocast("cpu", torch.bfloat16)])
def test_use_then_training(mode):
    """Guards what outlives a call: tables that were made where nothing has gradients."""
    model, (tokens, targets) = hybrid("as", window=7, dtype="float32"), sequences(window=7)
    with mode():
        stream = Stream(model, 2, batch_size=2)
        assert all(stream.feed(token).isfinite().all() for token in tokens.T)
        assert algorithm1(model, tokens, targets, 2)[0].isfinite()
    model_file._rotation.cache_clear()
    with mode():
        wake(model, tokens[:, :7], model.empty_memory(2))
    algorithm1(model, tokens, targets, 2)[0].backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("default", [False, True])
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


@pytest.mark.parametrize("make, token, named", [
    ({}, [0, 1, 2], "token"), ({"batch_size": 2}, [0], "token"), ({}, [0.0], "tokens"),
    ({}, [3], "token"), ({}, [-1], "token"), ({"loops": 1.5}, [0], "loops 1.5"),
    ({"batch_size": 0}, [], "batch_size 0")])
def test_stream_refuses_other_tokens(make, token, named):
    """Guards shapes that broadcast on a CPU and write beyond S on a GPU, and unknown words."""
    with pytest.raises(ValueError, match=rf"^{named}.*: must be"):
        Stream(hybrid(), **{"loops": 2} | make).feed(torch.tensor(token))


def test_a_memory_of_another_batch_is_refused():
    """Guards the same below the stream, before a kernel is reached."""
    model = hybrid()
    with pytest.raises(ValueError, match="^S .*: must be of 3 sequences"):
        wake(model, torch.zeros(3, 2).long(), model.empty_memory(1))
    with pytest.raises(ValueError, match="^w .*: must be .4, 12."):
        prepare(torch.zeros(1, 5, 12), torch.zeros(4, 6), 2)


def test_a_frozen_block_stays():
    """Guards a parameter without a gradient: skipped, as torch's own optimizers do."""
    model, (tokens, targets) = hybrid("as"), sequences()
    optimizers = train.make_optimizers(model, 0.1, 0.1)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    model.layers[0].requires_grad_(False)
    algorithm1(model, tokens, targets, 1)[0].backward()
    for optimizer in optimizers:
        optimizer.step()
    for name, x in model.state_dict().items():
        assert torch.equal(x, before[name]) == name.startswith("layers.0."), name


def test_a_copied_config_means_the_same():
    """Guards dataclasses.replace: all blocks are looped, also of another layout."""
    config = replace(Config(3, 5, "asas"), layout="as")
    assert config.core == (0, 2) and replace(config, layout="asasas").core == (0, 6)


# ----------------------------------------------------------- 13a. found by breaking the code

@pytest.mark.parametrize("eviction", ["hard", "sliding"])
def test_every_scored_window_counts(eviction):
    """Guards scored windows in the middle: their loss, and their cache, which goes as any other."""
    model, (tokens, targets) = hybrid(eviction=eviction), sequences()
    targets[:, 6:9] = torch.randint(2, (2, 3))
    loss, logits, labels = algorithm1(model, tokens, targets, 2)
    torch.testing.assert_close(loss, literal_algorithm1(model, tokens, targets, 2))
    assert torch.equal(labels, torch.cat([targets[:, 5:10], targets[:, 15:]], dim=1))
    assert logits.shape == (2, 8, 3)


def test_stream_takes_no_part_in_training_nor_keeps_the_caller_s_tensor():
    """Guards a stream against memory that grows with a graph, and tokens fed from one buffer."""
    model, tokens = hybrid(), torch.randint(3, (12, 2))
    streams, buffer = [Stream(model, 2, batch_size=2) for _ in range(2)], torch.empty(2).long()
    for token in tokens:
        a, b = streams[0].feed(token), streams[1].feed(buffer.copy_(token))
        assert torch.equal(a, b) and not a.requires_grad
        assert not any(S.requires_grad for S in streams[0].memory.S if S is not None)


def test_windows_of_longer_tokens_are_refused():
    """Guards windows that belong to another task: they must end where the tokens do."""
    tokens = torch.zeros(2, 12).long()
    with pytest.raises(ValueError, match="^windows .*: must end with the 12 tokens"):
        algorithm1(hybrid(), tokens, tokens, 1, [Window(0, 14, True)])


def test_bfloat16_stays_bfloat16():
    """Guards the speed of a GPU: no product of a block falls back to float32 behind a rule."""
    model, (tokens, targets) = Hybrid(Config(3, 5, "as", 16, 2, dtype="bfloat16")), sequences()
    inside = {}
    for name, part in model.named_modules():
        part.register_forward_hook(lambda _, x, out, name=name: inside.update({name: x[0].dtype}))
    algorithm1(model, tokens, targets, 2)
    products = {name: dtype for name, dtype in inside.items() if name.endswith(
        ("qkv", "mixer.out", "up", "down"))}
    assert len(products) == 8 and set(products.values()) == {torch.bfloat16}, products


def test_rotary_angles_are_exact_in_bfloat16():
    """Guards positions in low precision: bfloat16 cannot count beyond 256."""
    q, k, v = (torch.randn(1, 2, 300, 16).bfloat16() for _ in range(3))
    q = q[:, :, -1:]
    ours = attention(q, k[:, :, -1:], v[:, :, -1:], model_file.Cache(k[:, :, :-1], v[:, :, :-1]))[0]
    literal = literal_attention(*(x.double() for x in (q, k, v)))
    assert (ours.double() - literal).norm() < 0.02 * literal.norm()


@pytest.mark.parametrize("change, named", [
    ({"window": 1, "eviction": "sliding"}, "window 1"), ({"n_head": 16}, "n_head 16")])
def test_impossible_shapes(change, named):
    """Guards a sliding window that keeps nothing, and heads of odd size, which cannot be turned."""
    with pytest.raises(ValueError, match=f"^{named}: must "):
        Config(**{"vocab_size": 3, "window": 5, "d_model": 16, "n_head": 2} | change)


def test_start_values_have_their_scale():
    """Guards start values: a matrix keeps the size of its input; softplus(dt_bias) up to 0.1."""
    model = Hybrid(Config(3, 5, "s", d_model=128, n_head=64))
    up, down = model.layers[0].up, model.layers[0].down
    for matrix in (up, down):
        y = matrix(torch.randn(64, matrix.weight.shape[2]))
        assert 0.95 < y.std() < 1.05
    dt = F.softplus(torch.cat([Hybrid(Config(3, 5, "m", 128, 64)).layers[0].mixer.dt_bias
                               for _ in range(20)]))
    assert 0.097 < dt.max() < 0.1001


@pytest.mark.parametrize("task", [Rule110(4, 3, 1), Depo(6, 3, 2, 4),
                                  GSM(2, 5, 5, window=7)], ids=kind)
def test_windows_of_a_task_are_those_of_its_batches(task):
    """Guards scored_from: windows told from it alone are those that a large batch shows."""
    for split in ("train", "held-out"):
        targets = task.batch(500, generator(0, 0), split)[1]
        assert train.windows_of(task, task.window) == cut(targets, task.window)
    assert (targets != IGNORE).any(0).nonzero()[0].item() == task.scored_from


@pytest.mark.parametrize("task", [Depo(nodes=4, hops=1, questions=1, names=2),
                                  GSM(ops=1, statements=3, modulus=3, variables=3)], ids=kind)
def test_the_smaller_split_is_held_out(task):
    """Guards swapped splits: training would be left with one instance in eight."""
    train, held_out = (len({canonical(task, sequence) for sequence in read(task, 1000, split)})
                       for split in ("train", "held-out"))
    assert train > 2 * held_out


def test_levels_reach_the_hardest():
    """Guards what evaluation reports: the easiest and the hardest level are among it."""
    assert Depo().levels == (1, 2, 4, 8, 16) and Depo(hops=5).levels == (1, 2, 4)
    assert GSM().levels == tuple(range(1, 9))


def test_gsm_draws_every_kind_of_statement():
    """Guards the mixture: +, - and * alike; from the third needed one on, half have two operands
    that are variables."""
    task = GSM(ops=4, statements=6, modulus=5, variables=6)
    operators, both = Counter(), Counter()
    for statements, needed, _ in read(task, 1500, level=4):
        operators.update(operator for _, _, _, operator, *_ in statements)
        both[sum(x in needed and isinstance(left, str) and isinstance(right, str)
                 for x, _, left, _, right, _ in statements)] += 1
    assert_shares(operators, dict.fromkeys("+-*", 1 / 3))
    assert_shares(both, {0: 1 / 4, 1: 1 / 2, 2: 1 / 4})


def test_cost_of_loops_by_hand():
    """Guards token passes: N counts in the looped blocks alone, asleep or awake."""
    windows = [Window(0, 5, False), Window(5, 8, True)]
    half = Config(3, 5, "asas", loop_blocks=(1, 3))
    assert train.passes_over(windows, 3, half) == 5 * 2 + 3
    assert train.passes_over(windows, 3, replace(half, sleep_at="wake",
                                                     carry_S=False)) == 5 + 3 * 2
    assert train.passes_over(windows, 3, replace(half, loop_blocks=None)) == 5 * 3 + 3


def test_train_loss_is_the_loss_trained_on(tmp_path):
    """Guards the log: the last batch's loss, which starts at chance, not its gradient's norm."""
    _, records = run_of(tmp_path, "run", "--steps 1 --loops 1")
    assert [record["train_loss"] for record in records] == [None, pytest.approx(math.log(3))]


def test_levels_of_the_curriculum_are_evaluated(tmp_path):
    """Guards --curriculum: evaluation is on its levels too, each with its own floor."""
    _, records = run_of(tmp_path, "run", "--loops 1 --curriculum 2,3 --steps 0")
    assert list(records[0]["levels"]) == ["1", "2", "3"]


def test_a_checkpoint_of_another_N_is_refused(tmp_path, capsys):
    """Guards --resume: N1.pt under the name of N2.pt would pass for a model that sleeps twice."""
    folder, _ = run_of(tmp_path, "run", "--loops 1,2 --steps 0")
    (folder / "N2.pt").write_bytes((folder / "N1.pt").read_bytes())
    assert "N2.pt: must be" in refused(capsys, ["--resume", str(folder)])


@pytest.mark.parametrize("rule", RULES)
def test_autocast_leaves_the_rule_alone(rule):
    """Guards the fast weights under autocast: their products stay in the dtype of S."""
    _, _, _, log_alpha, beta, S = rule_inputs(40, torch.float32, K=8, V=8)
    qkv = torch.randn(2, 40, 3, 3, 8)
    with torch.autocast("cpu", torch.bfloat16):
        ours = update(rule, qkv, log_alpha.mT, beta.mT, S)
    for a, b in zip(ours, update(rule, qkv, log_alpha.mT, beta.mT, S)):
        assert a.dtype == torch.float32 and torch.equal(a, b)


# ----------------------------------------------------------------------------------- 14. the README

README = (HERE / "README.md").read_text()


def test_commands_of_the_readme_parse():
    """Guards documents that drift from the code."""
    commands = re.findall(r"^\s*(?:\$ )?(?:.*&& )?python (\S+\.py.*?)(?: *#.*)?$", README, re.M)
    assert len(commands) >= 3
    for script, *arguments in map(shlex.split, commands):
        assert (HERE / script).exists()
        if script == "train.py" and arguments != ["--help"]:
            options = train.parse(train.get_parser(), arguments)
            train.build(options | {"init": None, "train": "all", "dtype": "float32"})


def test_example_of_the_readme_runs(tmp_path, monkeypatch, capsys):
    """Guards the example of a trained model in use."""
    monkeypatch.chdir(tmp_path)
    run_of(tmp_path, "out/rule110-001", "--loops 2")
    [example] = re.findall(r"^```python\n(import .*?)^```", README, re.M | re.S)
    capsys.readouterr()
    exec(example, {})
    *_, bytes, answer = capsys.readouterr().out.splitlines()
    assert "'cache'" in bytes and re.fullmatch("last answer [01] of [01]", answer)


def test_additions_of_the_readme_work(tmp_path):
    """Guards "add a task" and "add an update rule": in a copy, made as the README says."""
    for path in (*HERE.glob("*.py"), HERE / "README.md", HERE / "results"):
        copy = shutil.copytree if path.is_dir() else shutil.copy
        copy(path, tmp_path / path.name)
    blocks = re.findall(r"^```python\n(.*?)^```", README, re.M | re.S)
    task, reader, rule, literal = (block for block in blocks if "def " in block)
    for name, line, new in (
            ("data.py", "\nTASKS = {", f'\n{task}\n\nTASKS = {{"parity": Parity, '),
            ("train.py", "OPTIONS = {  #", 'OPTIONS = {"bits": "parity: bits to read (12)",  #'),
            ("model.py", "\nRULES = {", f'\n{rule}\n\nRULES = {{"longhorn": longhorn, ')):
        text = (tmp_path / name).read_text()
        assert text.count(line) == 1
        (tmp_path / name).write_text(text.replace(line, new))
    with (tmp_path / "test_sleep.py").open("a") as tests:
        tests.write(f"\n\n{reader}\n\n{literal}")

    def run(*arguments):
        done = subprocess.run([sys.executable, *arguments], cwd=tmp_path, text=True,
                              capture_output=True, timeout=200)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    run("results/render.py")
    tests = run("-m", "pytest", "-q", "-p", "no:cacheprovider", "test_sleep.py", "-k",
                "promises or literal_form or rules_equal or stream_equals or rendered")
    assert re.search(r"\d+ passed", tests) and "failed" not in tests
    run("train.py", "--task=parity", "--bits=6", "--rule=longhorn", "--steps=2", "--batch=4",
        "--d_model=16", "--device=cpu")


def test_tests_of_the_readme_exist():
    """Guards the promise that each equation has its numeric test."""
    named = set(re.findall(r"`(test_\w+)`", README)) - {"test_sleep"}
    assert named and not named - set(globals())
    equations = [row for row in README.splitlines() if re.match(r"\| (Eq|Alg)\.", row)]
    assert all("`test_" in row for row in equations)


def test_rendered_is_what_is_there():
    """Guards honest results, and the map from paper to code: tables and line numbers are made."""
    stale = [str(path.relative_to(HERE)) for path, text in render.rendered().items()
             if path.read_text() != text]
    assert not stale, f"{', '.join(stale)}: out of date, run: python results/render.py"


def test_every_number_of_a_row_is_of_its_logs(tmp_path, monkeypatch):
    """Guards the tables themselves: a row's numbers by hand, and logs of another command."""
    monkeypatch.setattr(render, "HERE", tmp_path)
    monkeypatch.setitem(render.ROWS, "x*.jsonl", ("K=1", "-", "--t 4 --steps 8", "x*.jsonl"))
    config = {"t": 4, "steps": 8, "position": "none", "seed": 1, "gone": "an option of old"}

    def log(seed, exact, **other):
        header = {"hardware": "NVIDIA H200", "commit": "c", "config": config | {"seed": seed}}
        records = [{"loops": n, "step": step, "tokens": 3e6, "floor": 0.25, "seconds": 90.0,
                    "exact": exact * n if step else 0} for n in (1, 2) for step in (0, 8)]
        header |= {name: other.pop(name) for name in ("patch", "hardware") if name in other}
        header["config"].update(other)
        (tmp_path / f"x{seed}.jsonl").write_text("\n".join(map(json.dumps, [header, *records])))
        render.read.cache_clear(), render.experiment.cache_clear()

    log(1, 0.25, patch={"K": "1"}), log(2, 0.5, patch={"K": "1"})
    assert render.row_of(*render.ROWS["x*.jsonl"]) == [
        "K=1", "-", "`--t 4 --steps 8`", "N = 1: 37.5 [25.0, 50.0]; N = 2: 75.0 [50.0, 100.0]",
        "25.0", "2", "3.0M", "3.0 H200", "c", "`x*.jsonl`"]
    for wrong, says in (({"t": 5}, "has t 5, not 4"), ({"position": "window"}, "position"),
                        ({"steps": 9}, "has steps 9"), ({"patch": {}}, "K=1")):
        log(2, 0.5, **{"patch": {"K": "1"}} | wrong)
        with pytest.raises(SystemExit, match=says):
            render.experiment("x*.jsonl")
    del config["position"]  # an old log had one
    log(2, 0.5, patch={"K": "1"})
    with pytest.raises(SystemExit, match="has position window, not none"):
        render.experiment("x*.jsonl")


def test_numbers_of_the_readme_stand_in_the_results():
    """Guards verdicts and findings: every mean with its range is one of a table made from logs."""
    results = (HERE / "results/README.md").read_text()
    tables = "\n".join(re.findall(r"^\|.*", results, re.M))
    said = README + re.sub(r"^\|.*", "", results, flags=re.M)
    numbers = re.findall(r"\d+\.\d\s\[\d+\.\d,\s\d+\.\d\]", said)
    missing = [x for x in (re.sub(r"\s", " ", x) for x in numbers) if x not in tables]
    assert len(numbers) > 20 and not missing


def test_links_lead_somewhere():
    """Guards links of the READMEs: to a file that is here, and to a heading that it has."""
    pages, links = (HERE / "README.md", HERE / "results/README.md"), 0
    for page in pages:
        for name, anchor in re.findall(r"\]\((?!http)([^)#\s]*)#?([^)\s]*)\)", page.read_text()):
            target, links = page.parent / name if name else page, links + 1
            assert target.exists(), f"{page}: {name}"
            if anchor:
                titles = re.findall(r"^#+ (.*)", target.read_text(), re.M)
                assert anchor in [re.sub(r"[^\w -]", "", x.lower()).replace(" ", "-")
                                  for x in titles], f"{page}: #{anchor}"
    assert links > 20


def test_figures_are_drawn(tmp_path):
    """Guards the figures: the logs draw each one that the READMEs show, and no other."""
    pytest.importorskip("matplotlib")
    render.draw(tmp_path)
    shown = {Path(name).name for page in (HERE / "README.md", HERE / "results/README.md")
             for name in re.findall(r"\]\((\S+\.svg)\)", page.read_text())}
    assert {path.name for path in tmp_path.iterdir()} == shown
    assert {path.name for path in (HERE / "results").glob("*.svg")} == shown
