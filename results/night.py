"""Watch a trained model read, sleep and answer: python results/night.py [DIR or FILE]

Behind each pass stands what the model would answer at the end if this sleep had stopped after that
pass and every other sleep had run all N. For that a copy of the memory is used; the run itself goes
on undisturbed.
"""

import glob
import os
import sys
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from model import Cache, Memory  # noqa: E402
from sleep import IGNORE, Stream, evict, sleep, wake  # noqa: E402
from train import Halt, Parser, in_one_line, load, reading, windows_of  # noqa: E402

LAPTOP = Path(__file__).resolve().parent / "laptop"  # weights of the default run
SEED = 20  # of the sequence that is shown


def find(given: Path | None) -> Path:
    """The checkpoint to show: a folder's largest N. None: of the newest run under out/, or, if
    there is none, the default run's that comes with the repository."""
    if given is None:
        found = glob.glob("out/**/N*.pt", recursive=True)  # rglob does not follow links
        given = Path(max(found, key=os.path.getmtime)).parent if found else LAPTOP
    checkpoints = sorted(given.glob("N*.pt"), key=lambda file: (len(file.stem), file.stem))
    path = checkpoints[-1] if checkpoints else given
    if not path.is_file():
        raise Halt(2, f"error: {path}: must hold a checkpoint N*.pt; python train.py makes one")
    return path


def held(memory: Memory) -> str:
    """How much a memory holds."""
    entries = [entry.k.shape[2] for entry in memory.cache if isinstance(entry, Cache)]
    return "cache {} entries, {cache:,} bytes; S {S:,} bytes".format(
        max(entries, default=0), **memory.bytes())


def moved(before: Memory, after: Memory) -> str:
    """How far a pass moved the S of each SSM block, as a share of what it is now."""
    return " ".join(f"{(S - old).norm() / S.norm():.2f}"
                    for old, S in zip(before.S, after.S) if S is not None)


@torch.no_grad()
def night(argv: list[str]):
    """Print how a trained model reads a held-out sequence, sleeps on it, forgets it and answers."""
    parser = Parser(prog="night.py", description="Watch a trained model read, sleep and answer.")
    parser.add_argument("run", nargs="?", type=Path, help="a run's folder, for its largest N, or a "
                        "checkpoint N*.pt; default: the newest run under out/, if there is one")
    path = find(parser.parse_args(argv).run)
    with reading(path, "a checkpoint that this train.py made"):
        task, model, loops = load(path)
    random, L, keep = torch.Generator().manual_seed(SEED), model.config.window, model.config.keep
    tokens, targets = task.batch(1, random, "held-out", task.levels[-1])
    windows = windows_of(task, L)
    asleep, asked = windows[:-1], windows[-1].start  # asked: where the last window begins
    if any(window.scored for window in asleep):
        raise Halt(2, f"error: {path}: window {L}: must leave all that is scored to one window, "
                      "to stream")
    labels, stream, logits = targets[targets != IGNORE], Stream(model, loops), []

    def answers(logits: Tensor) -> str:
        """The first 4 answers, their probabilities, and which are wrong: logits (1, P, ...)."""
        p, words = logits[0, targets[0, asked:] != IGNORE].softmax(-1).max(-1)
        said = [f"{task.words[word]} {x:.2f}" for x, word in zip(p[:4], words)]
        return ", ".join(x if word == label else f"{x} (no)"
                         for x, word, label in zip(said, words, labels))

    def at_the_end(memory: Memory, later) -> str:
        """What the model would answer if it slept on the later windows with all N passes."""
        memory = evict(memory, keep)
        for start, stop, _ in later:
            memory = evict(sleep(model, tokens[:, start:stop], memory, loops), keep)
        return answers(wake(model, tokens[:, asked:], memory)[0])

    print(f"run       {path}, N = {loops}\ntask      {task.title()}")
    for number, (start, stop, scored) in enumerate(windows, 1):
        here, begun, width = tokens[:, start:stop], stream.start, min(8, -(-L // 4))  # of a line
        for i, token in enumerate(here.T, 1):
            logits.append(stream.feed(token))
            if i % width == 0 or i == stop - start:
                memory = stream.memory
                if i == L:  # the stream has slept already: read again, to show what it held
                    memory = wake(model, here, begun)[1]
                    memory = memory if keep == 0 else evict(memory, keep)
                words = " ".join(task.words[x] for x in here[0, (i - 1) // width * width:i])
                print(f"window {number}  reads {words} -> {held(memory)}")
        if scored:
            break
        memory = begun
        print(f"night {number}   pass 0 -> would say {at_the_end(memory, asleep[number:])}")
        for n in range(1, loops + 1):
            before, memory = memory, sleep(model, here, begun, n)
            moves = moved(before, memory)
            print(f"night {number}   pass {n}{', S moves ' if moves else ''}{moves}"
                  f" -> would say {at_the_end(memory, asleep[number:])}")
        print(f"night {number}   over -> {held(stream.start)}")
    print(f"answers   {answers(torch.stack(logits[asked:], dim=1))}\n"
          f"truth     {', '.join(task.words[label] for label in labels[:4])}")


if __name__ == "__main__":
    sys.exit(in_one_line("night.py", night, sys.argv[1:]))
