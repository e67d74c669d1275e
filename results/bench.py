"""Speed and memory in training and in use: python results/bench.py [--out FILE.jsonl] [OPTIONS].

OPTIONS are those of train.py, by default the size of the paper's Rule 110 runs and N = 1, 2, 4, 8.
--out is a new file here, not a folder; without it the tables are only printed. On several GPUs:
torchrun --nproc_per_node=4 results/bench.py ...; --batch is of all of them together.
"""

import argparse
import gc
import json
import sys
from functools import partial
from pathlib import Path
from timeit import default_timer, repeat

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import train  # noqa: E402
from model import PIECE, Hybrid  # noqa: E402
from sleep import Window, evict, sleep, wake  # noqa: E402

SECONDS, STEPS = 4.0, 5      # of training in each row, at least
CONTEXTS = 1, 10, 100, 1000  # windows read before bytes are counted


def model_flops(model: Hybrid, windows: list[Window], loops: int, awake: bool = False) -> float:
    """FLOPs of a training step for one sequence: 6 for each weight a token meets in each pass.

    2 in the forward and 4 in the backward pass; the products of a mixer among the L tokens of the
    window (L x L, masked or not) and with S count alike. The last block of the last pass asleep
    only has to write S. Not counted: keys of earlier windows, what is no product, the optimizers.
    awake: the N passes are spent in the scored windows, as by the variant of that name.
    """
    c, (i, j), total = model.config, model.config.looped, 0
    for b, (kind, block) in enumerate(zip(c.layout, model.layers)):
        matrices = sum(p.numel() for p in block.parameters() if p.ndim == 3)
        for start, stop, scored in windows:
            L = stop - start
            N = loops if i <= b < j and scored == awake else 1
            # q k^T, P v; or q k^T, k k^T, P U, T R in pieces and the three products with S
            piece = -(-L // -(-L // PIECE))
            mixer = c.d_model * (2 * L if kind == "a" else 4 * piece + 3 * c.d_model // c.n_head)
            spared = 0
            if block is model.layers[-1] and not scored:
                spared = matrices + (mixer if kind == "a" else -block.mixer.qkv.weight.numel())
            total += 6 * L * (N * (matrices + mixer) - spared)
    return total + 6 * model.out.weight.numel() * sum(
        stop - start for start, stop, scored in windows if scored)


def fastest(function, device: str, times: int) -> float:
    """Seconds of the fastest of some calls, the device's work included: what disturbs only adds."""
    wait = torch.cuda.synchronize if device == "cuda" else bool  # bool() does nothing
    return min(repeat(lambda: (function(), wait()), number=1, repeat=times))


@torch.no_grad()
def bench_use(model: Hybrid, device: str, loops: int) -> dict:
    """Latency of one token awake, of one window's sleep, at batch 1, uncompiled."""
    c = model.config
    window = torch.randint(c.vocab_size, (1, c.window), device=device)
    begun = evict(sleep(model, window, model.empty_memory(1), loops), c.keep)
    half = wake(model, window[:, :(c.window + 1) // 2], begun)[1]
    return {"wake_ms": 1e3 * fastest(lambda: wake(model, window[:, :1], half), device, 99),
            "sleep_ms": 1e3 * fastest(lambda: sleep(model, window, begun, loops), device, 20)}


def bench_row(options: argparse.Namespace, loops: int) -> dict:
    """Speed and memory with N = loops: in use, then in training, data and optimizers included."""
    task, model = train.build(vars(options))
    device, windows = options.device, train.windows_of(task, model.config.window)
    use = bench_use(model.to(device), device, loops)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    began, ready = default_timer(), []
    optimizers = train.make_optimizers(model, options.muon_lr, options.lr)
    step = train.recorded(partial(train.training_step, model, optimizers, loops, windows), model,
                          options.fast)
    data = train.batches(task, options, 0)
    for _ in range(5 if device == "cuda" else 2):  # up to and beyond the capture
        step(*next(data)).tolist()
        ready.append(default_timer() - began)
    steps, spent, began = 0, 0, default_timer()
    at_once = train.CHECK_EVERY if device == "cuda" else 1
    while steps < STEPS or spent < SECONDS:
        torch.stack([step(*next(data)) for _ in range(at_once)]).tolist()  # waits for the device
        steps, spent = steps + at_once, train.by_first_rank(lambda: default_timer() - began)
    peak = {"peak_bytes": torch.cuda.max_memory_allocated()} if device == "cuda" else {}
    return {"loops": loops, "window": model.config.window, "ms": 1e3 * spent / steps,
            "tokens_per_s": options.batch * task.length * steps / spent,
            "flops": (options.batch / train.RANKS * model_flops(model, windows, loops)
                      * steps / spent),
            "first_step_s": ready[0], "ready_s": ready[-1], **peak, **use}


@torch.no_grad()
def bench_bytes(model: Hybrid, device: str):
    """Bytes of both memories, just before the cache is evicted; never_evicted is computed."""
    c, memory = model.config, model.empty_memory(1)
    vector, attention = c.d_model * getattr(torch, c.dtype).itemsize, c.layout.count("a")
    keys, tails = 2 * c.window * vector * attention, 9 * vector * (len(c.layout) - attention)
    for windows in range(1, max(CONTEXTS) + 1):
        tokens = torch.randint(c.vocab_size, (1, c.window), device=device)
        memory = wake(model, tokens, memory)[1]
        if windows in CONTEXTS:
            yield {"windows": windows, "tokens": windows * c.window, **memory.bytes(),
                   "never_evicted": windows * keys + tails}
        memory = evict(memory, c.keep)


def run_bench(options: argparse.Namespace, hardware: str):
    """Prints both tables and yields their records: every N at one L, then N = 1 at several L."""
    size, times = (8192, 300) if options.device == "cuda" else (2048, 8)
    a, b = torch.randn(2, size, size, device=options.device).to(getattr(torch, options.dtype))
    rate = 2 * size**3 / fastest(lambda: a @ b, options.device, times)
    del a, b  # they would count among the peak bytes
    yield {"matrix_rate": rate}
    task, model = train.build(vars(options))
    print(f"{task.title()}; {options.layout}, d = {options.d_model}, batch {options.batch}\n"
          f"{hardware}, {options.dtype}, {options.fast}; peak = {rate:.3g} FLOP/s, measured\n"
          "share of it: 6 x weights x tokens x passes, and the mixers'; ready: graph recorded\n\n"
          f"{'N':>3}{'L':>5}{'ms/step':>10}{'tokens/s':>12}{'share':>8}{'peak MiB':>10}"
          f"{'first step':>14}{'ready':>9}{'wake ms':>9}{'sleep ms':>10}", flush=True)
    L = model.config.window
    lengths = {L // 4, L // 2, min(2 * L, task.length), task.length} - {0, 1, L}  # sliding: L > 1
    if train.RANKS > 1:  # one GPU has told what L does
        lengths = set()
    for n, window in [*((n, L) for n in options.loops), *((1, x) for x in sorted(lengths))]:
        row = bench_row(argparse.Namespace(**vars(options) | {"window": window}), n)
        gc.collect()  # a graph's memory goes with the graph
        peak = f"{row['peak_bytes'] / 2**20:.0f}" if "peak_bytes" in row else "-"
        print("{loops:3d}{window:5d}{ms:10.2f}{tokens_per_s:12,.0f}{share:8.1%}{peak:>10}"
              "{first_step_s:12.1f} s{ready_s:7.1f} s{wake_ms:9.2f}{sleep_ms:10.2f}"
              .format(**row, share=row["flops"] / rate, peak=peak), flush=True)
        yield row
    print("\n windows   tokens    S, bytes  cache, bytes  never evicted")
    for row in bench_bytes(model.to(options.device), options.device):
        print("{windows:8,d}{tokens:9,d}{S:12,d}{cache:14,d}{never_evicted:15,d}".format(**row))
        yield row


def main(argv: list[str] | None = None) -> int:
    argv, parser = sys.argv[1:] if argv is None else argv, train.get_parser()
    parser.prog, parser.description = "bench.py", __doc__
    given = parser.parse_args(argv)
    for name in ("init", "eval_loops", "resume"):
        if getattr(given, name) != parser.get_default(name):
            parser.error(f"--{name}: must not be given to results/bench.py")
    if given.out and (given.out.exists() or not given.out.parent.is_dir()):
        parser.error(f"--out {given.out}: must be a new file, in a folder that is there")
    parser.set_defaults(**{name: value for name, value in train.PAPER.items()
                           if given.task == "rule110" or name not in ("cells", "states")})
    parser.set_defaults(loops=[1, 2, 4, 8])
    if given.device == "cpu" or not torch.cuda.is_available():
        parser.set_defaults(batch=64)
    elif given.eviction != "none":  # no shape would recur
        parser.set_defaults(fast="compile")
    options = train.parse(parser, argv)
    for name in train.LEFT_OUT:
        del options[name]
    train.settle(parser, options)
    header = train.make_header(argv, options, "results/bench.py")
    log, options = [header], argparse.Namespace(**options)

    def measure():
        train.by_first_rank(bool)  # torchrun's processes meet here
        for record in run_bench(options, header["hardware"]):
            log.append(record)
            if given.out:  # after every row, so that what ends the bench loses none
                train.write(given.out, "".join(json.dumps(x) + "\n" for x in log).encode())

    return train.in_one_line("bench.py", measure)


if __name__ == "__main__":
    sys.exit(main())
