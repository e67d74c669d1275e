"""Doubts about the paper, each in a few lines: python results/variants.py NAME [OPTIONS]

A variant replaces a function or a class of ours and then trains, logs, goes on with --resume and
shows its table like train.py, whose OPTIONS it takes. Join several with +: embed+position. To try
an idea of your own, copy a variant: it returns what it replaces as (module, name, new). After the
last pass asleep h may be None. The docstrings name each doubt, and where its answer stands.
"""

import argparse
import re
import sys
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import sleep  # noqa: E402
import train  # noqa: E402
from model import Hybrid, Memory  # noqa: E402


def position():
    """A learned vector for each place in the window, which the paper does not name. (A token that
    is read by itself gets the first place's: not for a Stream.)
    Doubt: does N = 1 only lack positions? results/README.md#what-does-a-position-do"""
    class Positioned(Hybrid):
        def __init__(self, config):
            super().__init__(config)
            self.position = nn.Parameter(0.5 * torch.randn(config.window, config.d_model))

        def embed(self, tokens):
            return super().embed(tokens) + self.position[:tokens.shape[1]]
    return [(train, "Hybrid", Positioned)]


def embed():
    """Every pass starts from the embedding, not from the h of the pass before.
    Doubt: is it S or h that passes refine? results/README.md#what-does-a-pass-supply"""
    def passes(model, tokens, memory, loops, *, need_h=True):
        first, memory = model.prelude(model.embed(tokens), memory)
        S = memory.S
        for n in range(loops):
            h, after = model.core(first, Memory(memory.cache, S), need_h or n < loops - 1)
            S = after.S
        return model.coda(h, after, need_h)
    return [(sleep, "passes", passes)]


def reset_S():
    """Every pass starts from the S of the window's start, not from that of the pass before.
    Doubt: is it S or h that passes refine? results/README.md#what-does-a-pass-supply"""
    def passes(model, tokens, memory, loops, *, need_h=True):
        h, memory = model.prelude(model.embed(tokens), memory)
        for n in range(loops):
            h, after = model.core(h, memory, need_h or n < loops - 1)
        return model.coda(h, after, need_h)
    return [(sleep, "passes", passes)]


def awake():
    """The N passes are spent awake, each from the S of the window's start: what a pass leaves has
    read the answers. Doubt: must they be asleep? results/README.md#is-a-pass-worth-its-compute"""
    [(_, _, repeat)], count = reset_S(), train.passes_over

    def wake(model, tokens, memory):
        h, memory = repeat(model, tokens, memory, wake.loops)
        return model.unembed(h), memory

    def algorithm1(model, tokens, targets, loops, windows=None):
        wake.loops = loops
        return sleep.algorithm1(model, tokens, targets, 1, windows)
    return [(sleep, "wake", wake), (sleep, "passes", sleep.passes),  # no other variant's passes
            (train, "algorithm1", algorithm1), (train, "passes_over", lambda windows, *rest: count(
                [x._replace(scored=not x.scored) for x in windows], *rest))]


def last_pass():
    """Gradients through the final pass of a sleep alone, so that memory does not grow with N.
    Doubt: must training see all passes? results/README.md#every-variant-on-the-small-task"""
    def passes(model, tokens, memory, loops, *, need_h=True):
        h, (cache, start) = model.prelude(model.embed(tokens), memory)
        S = start
        with torch.no_grad():  # S is then of pass N - 1 in value, of the window's start in gradient
            for _ in range(loops - 1):
                h, (_, S) = model.core(h, Memory(cache, S))
        S = tuple(x if x is None else x + (y - x).detach() for x, y in zip(start, S))
        return model.coda(*model.core(h, Memory(cache, S), need_h), need_h)
    return [(sleep, "passes", passes)]


def inject():
    """Every pass but the first adds the embedding to the h that it gets.
    Doubt: do passes forget the window? results/README.md#every-variant-on-the-small-task"""
    def passes(model, tokens, memory, loops, *, need_h=True):
        first, memory = model.prelude(model.embed(tokens), memory)
        h, S = 0, memory.S
        for n in range(loops):
            h, after = model.core(h + first, Memory(memory.cache, S), need_h or n < loops - 1)
            S = after.S
        return model.coda(h, after, need_h)
    return [(sleep, "passes", passes)]


def pass_vector():
    """A learned vector for each of the first 16 passes, added to the h that the pass gets.
    Doubt: must passes be alike? results/README.md#every-variant-on-the-small-task"""
    class Counting(Hybrid):
        def __init__(self, config):
            super().__init__(config)
            self.vectors = nn.Parameter(torch.zeros(16, config.d_model))

        def embed(self, tokens):
            self.left = iter(self.vectors)
            return super().embed(tokens)

        def core(self, h, memory, need_h=True):
            return super().core(h + next(self.left, 0), memory, need_h)
    return [(train, "Hybrid", Counting)]


def graft():
    """SSM blocks without MLP (m in --layout), put into the model of --init and trained alone.
    The second step of the paper's recipe for Ouro; the first is `awake` with --layout aa, the third
    is train.py. results/README.md#a-sliding-window-and-recipes-for-trained-models"""
    class Grafted(Hybrid):
        def __init__(self, config):
            super().__init__(config)
            self.requires_grad_(False)
            for kind, layer in zip(config.layout, self.layers):
                layer.requires_grad_(kind == "m")
            if "m" not in config.layout:
                raise ValueError(f"layout {config.layout}: must have blocks m to graft")

        def load_state_dict(self, weights, *rest):
            """Also of a model without the m blocks, which then keep their start, the identity."""
            kept = [i for i, kind in enumerate(self.config.layout) if kind != "m"]
            if f"layers.{len(kept)}.mixer.out.weight" not in weights:  # as many as are no m
                weights = self.state_dict() | {
                    re.sub(r"^layers\.(\d+)", lambda x: f"layers.{kept[int(x[1])]}", name): w
                    for name, w in weights.items()}
            return super().load_state_dict(weights, *rest)

    def build(options, plain=train.build):
        if options["init"] is None:
            raise ValueError("init None: must name the trained model to graft into")
        return plain(options)
    return [(train, "Hybrid", Grafted), (train, "build", build)]


VARIANTS = {make.__name__: make for make in (position, embed, reset_S, awake, last_pass, inject,
                                             pass_vector, graft)}


def main(argv: list[str]) -> int:
    parser = train.Parser(prog="variants.py", add_help=False, description=__doc__,
                          formatter_class=argparse.RawDescriptionHelpFormatter)
    names = argv[0].split("+") if argv else []
    if argv[:1] in (["-h"], ["--help"]):
        parser.epilog = "\n".join(f"{name:12} {make.__doc__}" for name, make in VARIANTS.items())
        parser.exit(message=parser.format_help())
    if not names or set(names) - set(VARIANTS):
        parser.error(f"{' '.join(argv[:1])!r}: must be one of {', '.join(VARIANTS)}, or two as a+b")
    changes = [change for name in names for change in VARIANTS[name]()]
    if len({change[:2] for change in changes}) < len(changes):
        parser.error(f"{argv[0]!r}: must not change the same thing twice")
    for change in changes:
        setattr(*change)
    train.VARIANT = argv[0]
    return train.main(argv[1:])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
