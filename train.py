"""Train the sleeping hybrid on a synthetic task. `python train.py` shows in minutes that sleep helps.

One model is trained for each N of --loops, from the same seed on the same data, and a table compares them
on held-out instances. Every run writes DIR/log.jsonl and one checkpoint per N; --resume DIR goes on exactly.
"""

import argparse
import json
import math
import os
import pickle
import platform
import shlex
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from data import IGNORE, TASKS, generator
from model import Config, Hybrid
from sleep import algorithm1, cut

TRAIN, EVAL = 0, 1  # streams of random numbers
CHUNK = 64          # batches drawn in one call
CHECK_EVERY = 10    # steps between looks at the loss


# ---------------------------------------------------------------------------------------------- options

class Parser(argparse.ArgumentParser):
    def error(self, message):
        """One line and exit code 2, without the usage in front."""
        self.exit(2, f"{self.prog}: error: {message} (see --help)\n")


def whole(low: int):
    def parse(text: str) -> int:
        if not text.lstrip("-").isdigit() or int(text) < low:
            raise argparse.ArgumentTypeError(f"{text!r}: must be a whole number, at least {low}")
        return int(text)
    return parse


def positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r}: must be a number above 0")
    return value


def loops_list(text: str) -> list[int]:
    loops = [whole(1)(part.strip()) for part in text.split(",")]
    if len(set(loops)) < len(loops):
        raise argparse.ArgumentTypeError(f"{text!r}: names one number of passes twice")
    return loops


def get_parser() -> argparse.ArgumentParser:
    p = Parser(prog="train.py", description=__doc__.splitlines()[0],
               formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    task = p.add_argument_group("task")
    task.add_argument("--task", choices=TASKS, default="rule110", help="what to learn; see python data.py")
    task.add_argument("--t", type=int, default=4, help="steps of the automaton: the difficulty")
    task.add_argument("--cells", type=int, default=12, help="cells in a state")
    task.add_argument("--states", type=int, default=2, help="states in a sequence")
    task.add_argument("--rule", type=int, default=110, help="elementary rule, 0 to 255")
    model = p.add_argument_group("model")
    model.add_argument("--loops", type=loops_list, default="1,2", metavar="N[,N...]",
                       help="passes over each window asleep; a list trains and compares several models")
    model.add_argument("--window", type=int, help="L, tokens between evictions; default: one state")
    model.add_argument("--layout", default="as", help="one letter a block: a attention, s SSM; the paper's: asas")
    model.add_argument("--d_model", type=int, default=64, help="width d")
    model.add_argument("--n_head", type=int, default=4, help="heads H")
    run = p.add_argument_group("training")
    run.add_argument("--steps", type=whole(1), default=1600, help="optimizer steps")
    run.add_argument("--batch", type=whole(1), default=32, help="sequences a step")
    run.add_argument("--muon_lr", type=positive, default=4e-3, help="Muon's rate, for the matrices of the blocks")
    run.add_argument("--lr", type=positive, default=1e-3, help="AdamW's rate, for all other parameters")
    run.add_argument("--seed", type=whole(0), default=1, help="of start values and data")
    run.add_argument("--eval_every", type=whole(1), default=200, help="steps between evaluations and checkpoints")
    run.add_argument("--eval_size", type=whole(1), default=2048, help="held-out sequences in an evaluation")
    run.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="auto: cuda where there is one")
    run.add_argument("--dtype", choices=["auto", "float32", "bfloat16"], default="auto",
                     help="of matrix products; auto: bfloat16 on cuda, float32 on a CPU, where bfloat16 is slow")
    run.add_argument("--out", type=Path, help="folder of the run; default: a new one under out/")
    run.add_argument("--resume", type=Path, metavar="DIR", help="go on with the run in DIR; takes no other option")
    return p


# ------------------------------------------------------------------------------------------- optimizers

def orthogonalize(x: Tensor) -> Tensor:
    """Newton-Schulz, five steps, for a batch of matrices (n, rows, cols): their U V^T, roughly.

    In bfloat16 on a GPU; in float32 on a CPU, where bfloat16 is eighty times slower.
    """
    wide = x.shape[1] <= x.shape[2]
    x = (x if wide else x.mT).to(torch.bfloat16 if x.is_cuda else x.dtype)
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        a = x @ x.mT
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x if wide else x.mT


class Muon(torch.optim.Optimizer):
    """Muon (Jordan 2024) for parameters that are stacks of matrices (n, rows, cols).

    The same update as torch.optim.Muon without weight decay, but all matrices of one shape are orthogonalized
    in one batch, in float32 on a CPU.
    """

    def __init__(self, params, lr: float, momentum: float = 0.95):
        super().__init__(params, dict(lr=lr, momentum=momentum))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for shape in sorted({p.shape[1:] for p in group["params"]}):
                params = [p for p in group["params"] if p.shape[1:] == shape]
                grads = [p.grad for p in params]
                momenta = [self.state[p].setdefault("momentum", torch.zeros_like(p)) for p in params]
                torch._foreach_lerp_(momenta, grads, 1 - group["momentum"])
                nesterov = torch._foreach_lerp(grads, momenta, group["momentum"])
                update = orthogonalize(torch.cat(nesterov)).to(params[0].dtype)
                update *= group["lr"] * max(1, shape[0] / shape[1]) ** 0.5
                torch._foreach_sub_(params, list(update.split([len(p) for p in params])))


def make_optimizers(model: Hybrid, muon_lr: float, lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks, AdamW for the rest. No weight decay anywhere."""
    matrices = [p for p in model.layers.parameters() if p.ndim == 3]
    rest = [p for p in model.parameters() if all(p is not q for q in matrices)]
    assert len(matrices) + len(rest) == len(list(model.parameters())), \
        "every parameter is in exactly one optimizer group"
    return [Muon(matrices, lr=muon_lr),
            torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)]


def lr_factor(step: int, steps: int) -> float:
    """Full rate for 60 % of the run, then down a straight line towards 0."""
    return min(1.0, (steps - step) / (0.4 * steps))


# ----------------------------------------------------------------------------------------- data and loss

def batches(task, seed: int, batch_size: int, device: str, step: int):
    """Endless training batches from `step` on: a function of (seed, step), drawn CHUNK at a time."""
    while True:
        chunk, first = divmod(step, CHUNK)
        data = task.batch(CHUNK * batch_size, generator(seed, TRAIN, chunk, device), "train")
        for i in range(first, CHUNK):
            yield tuple(x[i * batch_size:(i + 1) * batch_size] for x in data)
        step = (chunk + 1) * CHUNK


@torch.no_grad()
def evaluate(model: Hybrid, data: tuple[Tensor, Tensor], loops: int, windows) -> dict[str, float]:
    """loss, bit (share of scored tokens right) and exact (share of sequences with all of them right)."""
    loss, logits, labels = algorithm1(model, *data, loops, windows)
    right, scored = logits.argmax(-1) == labels, labels != IGNORE
    return {"loss": loss.item(), "bit": right[scored].float().mean().item(),
            "exact": (right | ~scored).all(1).float().mean().item()}


# ------------------------------------------------------------------------------------------------ a run

def write(path: Path, save):
    """save(temporary file), then rename: whoever reads path finds the old file or the new, never half."""
    temporary = path.with_name(path.name + ".tmp")
    save(temporary)
    os.replace(temporary, path)


def write_log(folder: Path, header: dict, records: list[dict]):
    text = "".join(json.dumps(line) + "\n" for line in [header, *records])
    write(folder / "log.jsonl", lambda path: path.write_text(text))


def make_header(argv: list[str], options: dict) -> dict:
    """First line of the log: all that is needed to get the same numbers again."""
    git = subprocess.run(["git", "describe", "--always", "--dirty", "--abbrev=10"], text=True,
                         cwd=Path(__file__).parent, capture_output=True)
    gpu = options["device"] == "cuda"
    return {"command": shlex.join(["python", "train.py", *argv]), "commit": git.stdout.strip() or "unknown",
            "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__},
            "hardware": torch.cuda.get_device_name() if gpu else f"CPU, {torch.get_num_threads()} threads",
            "config": options}


def build(options: argparse.Namespace):
    """The task and the model's configuration; ValueError in one line where an option is impossible."""
    task = TASKS[options.task](options.cells, options.states, options.t, options.rule)
    config = Config(task.vocab_size, options.window or task.window, options.layout, options.d_model,
                    options.n_head, options.dtype)
    return task, config


def read_header(parser: Parser, option: str, folder: Path) -> dict:
    try:
        header = json.loads((folder / "log.jsonl").read_text().splitlines()[0])
        assert set(header["config"]) == set(vars(parser.parse_args([]))) - {"out", "resume"}
        return header
    except FileNotFoundError:
        parser.error(f"{option} {folder}: holds no run (no log.jsonl); give a folder that train.py has written")
    except (OSError, ValueError, LookupError, TypeError, AssertionError):
        parser.error(f"{option} {folder}: log.jsonl is damaged or of another version")


def open_run(argv: list[str]) -> tuple[argparse.Namespace, Path, dict]:
    """Options, folder and log header of the run that argv asks for, new or resumed; exits 2 if it cannot be."""
    parser = get_parser()
    options = vars(parser.parse_args(argv))
    out, resume = options.pop("out"), options.pop("resume")
    if resume:
        if len(argv) > 2:
            parser.error(f"--resume {resume}: takes no other option, the run's own are restored")
        header = read_header(parser, "--resume", resume)
        options, out = header["config"], resume
    if options["device"] == "auto":
        options["device"] = "cuda" if torch.cuda.is_available() else "cpu"
    if options["device"] == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: there is none here; valid: cpu, auto")
    if options["dtype"] == "auto":
        options["dtype"] = "bfloat16" if options["device"] == "cuda" else "float32"
    try:
        build(argparse.Namespace(**options))
    except ValueError as error:
        parser.error(f"--{error}")
    if not resume:
        header = make_header(argv, options)
        try:
            if out is None:
                number = 1 + max([0] + [int(p.name[-3:]) for p in Path("out").glob(f"{options['task']}-???")])
                out = Path("out") / f"{options['task']}-{number:03d}"
            out.mkdir(parents=True, exist_ok=True)
            occupied = any(out.iterdir())
        except OSError as error:
            parser.error(f"--out {out}: {error.strerror}")
        if occupied:
            old = read_header(parser, "--out", out)
            if old["config"] != options:
                parser.error(f"--out {out}: holds a run with another configuration; give a new folder")
            header = old
        else:
            write_log(out, header, [])
    return argparse.Namespace(**options), out, header


class Halt(Exception):
    """Ends the run with one line on stderr and an exit code."""

    def __init__(self, code: int, message: str):
        super().__init__(message)
        self.code = code


def load(path: Path, header: dict, loops: int, model: Hybrid, optimizers: list) -> tuple[int, float, list[dict]]:
    """Fill model and optimizers from a checkpoint. -> step, seconds, records. Halt(2) if it does not fit."""
    try:
        saved = torch.load(path, weights_only=True)
        if (saved["config"], saved["loops"]) != (header["config"], loops):
            raise ValueError
        model.load_state_dict(saved["model"])
        for optimizer, state in zip(optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        return saved["step"], saved["seconds"], saved["records"]
    except (RuntimeError, ValueError, LookupError, TypeError, EOFError, OSError, pickle.UnpicklingError):
        raise Halt(2, f"--resume {path.parent}: {path.name} is truncated, damaged or of another model") from None


def train_model(loops: int, options: argparse.Namespace, folder: Path, header: dict, log: list[dict],
                stop: threading.Event):
    """Train the model that sleeps N = loops passes, from its checkpoint in `folder` if there is one.

    Its evaluations are appended to `log`. `stop`, set at any moment, saves after the step in progress and
    raises Halt; so does a loss that is not finite, without saving.
    """
    task, config = build(options)
    torch.manual_seed(options.seed)
    model = Hybrid(config).to(options.device)
    optimizers = make_optimizers(model, options.muon_lr, options.lr)
    rates = [group["lr"] for optimizer in optimizers for group in optimizer.param_groups]
    step, seconds, records = 0, 0.0, []
    checkpoint = folder / f"N{loops}.pt"
    if checkpoint.exists():
        step, seconds, records = load(checkpoint, header, loops, model, optimizers)
        log.extend(records)
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]

    held_out = task.batch(options.eval_size, generator(0, EVAL, device=options.device), "held-out")
    windows = cut(held_out[1], config.window)
    passes = sum((w.stop - w.start) * (1 if w.scored else loops) for w in windows)  # tokens x passes, a sequence
    floor = task.floor()
    tokens_a_step = options.batch * task.length
    began = time.time() - seconds
    unchecked = []  # losses and gradient norms still on the device: looking at them waits for it

    def save():
        state = {"config": header["config"], "loops": loops, "step": step, "seconds": time.time() - began,
                 "records": records, "model": model.state_dict(),
                 "optimizers": [optimizer.state_dict() for optimizer in optimizers]}
        write(checkpoint, lambda path: torch.save(state, path))
        write_log(folder, header, log)

    bar = tqdm(total=options.steps * tokens_a_step, initial=step * tokens_a_step, desc=f"N = {loops}", unit="tok",
               unit_scale=True, disable=None, leave=False)
    with bar:
        for tokens, targets in batches(task, options.seed, options.batch, options.device, step):
            if step == options.steps:
                break
            for group, rate in zip(groups, rates):
                group["lr"] = rate * lr_factor(step, options.steps)
            loss, *_ = algorithm1(model, tokens, targets, loops, windows)
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            step += 1
            unchecked.append(torch.stack([loss.detach(), norm]))
            bar.update(tokens_a_step)

            evaluating = step % options.eval_every == 0 or step == options.steps
            if evaluating or stop.is_set() or len(unchecked) == CHECK_EVERY:
                values = torch.stack(unchecked).tolist()
                for i, pair in enumerate(values, step + 1 - len(values)):
                    if not all(map(math.isfinite, pair)):
                        kept = f"the last good checkpoint is {checkpoint}" if checkpoint.exists() else "no checkpoint yet"
                        raise Halt(1, f"N = {loops}: loss or gradient is not finite at step {i}; {kept}. "
                                      f"Try a smaller --muon_lr or --lr.")
                unchecked = []
                bar.set_postfix(loss=f"{values[-1][0]:.3f}", exact=f"{records[-1]['exact']:.1%}" if records else "-")
            if evaluating:
                record = {"loops": loops, "step": step, "tokens": step * tokens_a_step,
                          "token_passes": step * options.batch * passes, "train_loss": values[-1][0],
                          **evaluate(model, held_out, loops, windows), "floor": floor,
                          "seconds": round(time.time() - began, 2)}
                records.append(record)
                log.append(record)
                tqdm.write(f"N {loops:<2} step {step:6d}  tokens {record['tokens'] / 1e6:8.2f}M  "
                           f"loss {record['loss']:.4f}  bit {record['bit']:7.2%}  exact {record['exact']:7.2%}  "
                           f"floor {floor:.2%}  {record['seconds']:7.1f} s")
            if evaluating or stop.is_set():
                save()
            if stop.is_set():
                raise Halt(130, f"stopped and saved; go on with: python train.py --resume {folder}")


def print_facts(options: argparse.Namespace, folder: Path, header: dict):
    task, config = build(options)
    model = Hybrid(config)
    matrices, rest = (sum(p.numel() for group in o.param_groups for p in group["params"])
                      for o in make_optimizers(model, options.muon_lr, options.lr))
    tokens = options.batch * task.length
    why = ("tensor cores multiply it fastest; parameters and S stay in float32" if options.dtype == "bfloat16"
           else "bfloat16 is slow there" if options.device == "cpu" else "as asked")
    print(f"task    {options.task}: {task.states} states of {task.cells} cells, t = {task.t}; always the same answer is "
          f"{task.floor():.2%} exact (floor)\n"
          f"model   {config.layout}, d = {config.d_model}, {config.n_head} heads, L = {config.window}: "
          f"{matrices + rest:,} parameters ({matrices:,} by Muon, {rest:,} by AdamW)\n"
          f"run     {options.steps:,} steps of {options.batch} x {task.length} = {tokens:,} tokens, "
          f"N = {', '.join(map(str, options.loops))}, seed {options.seed}\n"
          f"device  {header['hardware']}; products in {options.dtype} ({why})\n"
          f"folder  {folder}")


def print_table(log: list[dict]):
    """The last evaluation of every N."""
    print(f"\n{'N':>3} {'loss':>8} {'bit':>8} {'exact':>8} {'floor':>8} {'tokens':>8} {'seconds':>8} "
          f"{'tokens x passes':>16}")
    for r in {record["loops"]: record for record in log}.values():
        print(f"{r['loops']:3d} {r['loss']:8.4f} {r['bit']:8.2%} {r['exact']:8.2%} {r['floor']:8.2%} "
              f"{r['tokens'] / 1e6:7.2f}M {r['seconds']:8.1f} {r['token_passes'] / 1e6:15.2f}M")


def main(argv: list[str] | None = None) -> int:
    options, folder, header = open_run(sys.argv[1:] if argv is None else argv)
    print_facts(options, folder, header)
    log: list[dict] = []
    stop = threading.Event()
    default = signal.signal(signal.SIGINT, lambda *_: stop.set())  # finish the step, then save
    try:
        for loops in options.loops:
            train_model(loops, options, folder, header, log, stop)
    except Halt as halt:
        print(f"train.py: {halt}", file=sys.stderr)
        return halt.code
    finally:
        signal.signal(signal.SIGINT, default)
    write_log(folder, header, log)
    print_table(log)
    return 0


if __name__ == "__main__":
    sys.exit(main())
