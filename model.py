"""The hybrid: attention blocks with a short-term cache, SSM blocks with fast weights S.

The letters are explained at the top of sleep.py. The mathematics stands in plain functions of
tensors, `attention` and the update rules of S; the modules around them only hold weights. What
stands below the line *for speed only* may be skipped.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Rotary wavelengths are 2 pi ROPE_BASE^(i / pairs) tokens, i = 0, 1, ... With the usual 10,000 most
# pairs of coordinates would hardly turn within a window of 24.
ROPE_BASE = 100.0


# ------------------------------------------------------------------------------ what is remembered

class Cache(NamedTuple):
    """Short-term memory of an attention block: keys and values of the latest tokens."""
    k: Tensor  # (B, H, C, K)
    v: Tensor  # (B, H, C, V)


class Tail(NamedTuple):
    """Short-term memory of an SSM block: the latest inputs of its short convolution."""
    x: Tensor  # (B, 3, 3 d)


class Memory(NamedTuple):
    """All that a model remembers. Each tuple has one entry a block, None where there is nothing.
    Where "the cache" is said, the tails of the convolutions are meant as well."""
    cache: tuple[Cache | Tail | None, ...]  # short-term: grows with every token, evicted
    S: tuple[Tensor | None, ...]  # fast weights (B, H, V, K) of SSM blocks: fixed size, kept

    def bytes(self) -> dict[str, int]:
        """Bytes held at this moment by each of the two memories."""
        cached = [x for entry in self.cache if entry is not None for x in entry]
        return {"cache": sum(x.nbytes for x in cached),
                "S": sum(S.nbytes for S in self.S if S is not None)}


@dataclass(frozen=True)
class Config:
    """A model's shape. Raises ValueError, one line that begins with the field, if impossible."""
    vocab_size: int
    window: int             # L: tokens between evictions
    layout: str = "asas"    # one letter a block, a = attention, s = SSM; "asas" is the paper's
    d_model: int = 256      # d
    n_head: int = 4         # H; K = V = d / H  # Choice: heads
    dtype: str = "float32"  # of activations inside the blocks; parameters, h and S stay in float32
    rule: str = "gdn"       # update of S, a name in RULES
    eviction: str = "hard"  # hard: the whole cache; sliding: all but L - 1 tokens; none
    loop_blocks: tuple[int, int] | None = None  # only blocks i to j - 1 are looped; None: all

    def __post_init__(self):
        check_config(self)

    @property
    def looped(self) -> tuple[int, int]:
        """i, j: the blocks i to j - 1 are looped."""
        i, j = self.loop_blocks or (0, len(self.layout))
        return i, j

    @property
    def keep(self) -> int | None:
        """Tokens whose keys and values an eviction keeps; None: all."""
        return {"hard": 0, "sliding": self.window - 1, "none": None}[self.eviction]


# -------------------------------------------------------------------------- the two sequence mixers

def rotation(length: int, size: int, dtype: torch.dtype, device: torch.device):
    """cos (length, 1, size / 2); -sin, sin (length, 2, size / 2) of rotary angles at 0, 1, ..."""
    frequency = ROPE_BASE ** (-torch.arange(0, size, 2, dtype=dtype, device=device) / size)
    angle = torch.arange(length, dtype=dtype, device=device)[:, None, None] * frequency
    return angle.cos(), torch.cat([-angle.sin(), angle.sin()], dim=1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs (x_i, x_{i + size/2}) of x (..., length, size) by their position's angles."""
    pairs = x.unflatten(-1, (2, -1))
    return (pairs * cos + pairs.flip(-2) * sin).flatten(-2).to(x.dtype)


def attention(q: Tensor, k: Tensor, v: Tensor, cache: Cache | None = None,
              span: int | None = None) -> tuple[Tensor, Cache]:
    """Causal softmax attention (Eq. 2) over the cache and then these L tokens.

    q, k (B, H, L, K), v (B, H, L, V) -> o (B, H, L, V) and the cache grown by L. A query sees the
    `span` latest tokens, itself included; None: all. Only differences of rotary positions matter,
    so they are counted from the oldest token in the cache, and keys are cached unrotated.
    """
    if cache is not None:
        k, v = torch.cat([cache.k, k], dim=2), torch.cat([cache.v, v], dim=2)
    L, C = q.shape[2], k.shape[2]
    cos, sin = rotation(C, q.shape[3], torch.promote_types(q.dtype, torch.float32), q.device)
    q, turned = rotate(q, cos[C - L:], sin[C - L:]), rotate(k, cos, sin)  # Choice: rotary positions
    visible = torch.ones(L, C, dtype=torch.bool, device=q.device).tril(C - L)
    if span is not None and C > span:
        visible = visible.triu(C - L - span + 1)  # Choice: sliding window
    scores = (q @ turned.mT / math.sqrt(q.shape[3])).masked_fill(~visible, -math.inf)
    return scores.softmax(-1) @ v, Cache(k, v)                            # Eq. (2)


# A rule's window form. Token t multiplies S by alpha_t and adds u_t k_t^T. Unrolled from the start,
#     S_t = gamma_t S_0 + sum over j <= t of D_tj u_j k_j^T,
# with gamma_t = alpha_1 ... alpha_t and D_tj = alpha_{j+1} ... alpha_t. So o_t = S_t q_t, for all t
# at once, is two products of matrices; only the vectors u_t are different from rule to rule.

def decays(log_alpha: Tensor) -> tuple[Tensor, Tensor]:
    """log_alpha (B, H, L) -> gamma (B, H, L, 1), the share of the starting S that is left at token
    t, and D (B, H, L, L), the share of what token j wrote: 1 for j = t, 0 for j > t."""
    L = log_alpha.shape[2]
    g = log_alpha.cumsum(-1)  # log gamma
    future = torch.ones(L, L, dtype=torch.bool, device=g.device).triu(1)
    # Masked before exp: after it gradients would be NaN.
    D = (g[..., :, None] - g[..., None, :]).masked_fill(future, -math.inf).exp()
    return g.exp()[..., None], D


def write_and_read(q: Tensor, k: Tensor, u: Tensor, gamma: Tensor, D: Tensor, S: Tensor):
    """Every token t writes u_t k_t^T, and then reads with q_t. -> o (B, H, L, V), the last S"""
    o = gamma * (q @ S.mT) + (q @ k.mT * D) @ u                   # Eq. (3): read
    S = gamma[:, :, -1:] * S + (D[:, :, -1, :, None] * u).mT @ k  # Eq. (3): write
    return o, S


def gated_rule(q: Tensor, k: Tensor, v: Tensor, log_alpha: Tensor, beta: Tensor, S: Tensor):
    """Eq. (3) as printed (Mamba-2's), a whole window at once:

        S_t = alpha_t S_{t-1} + beta_t v_t k_t^T,    o_t = S_t q_t

    q, k (B, H, L, K), v (B, H, L, V), log_alpha <= 0 and beta in (0, 1) (B, H, L), S (B, H, V, K)
    -> o (B, H, L, V) and the S after the window. All of one dtype. The caller normalises k.
    """
    gamma, D = decays(log_alpha)
    return write_and_read(q, k, beta[..., None] * v, gamma, D, S)


def gated_delta_rule(q: Tensor, k: Tensor, v: Tensor, log_alpha: Tensor, beta: Tensor, S: Tensor):
    """The same with the delta rule (Gated DeltaNet, arXiv 2412.06464), as in the paper's runs:

        S_t = alpha_t S_{t-1} (I - beta_t k_t k_t^T) + beta_t v_t k_t^T

    Token t really writes u_t k_t^T with u_t = beta_t (v_t - alpha_t S_{t-1} k_t). With S_{t-1}
    unrolled as above, the L vectors u are the solution of a lower triangular system. Solve it by
    substitution only: the keys of a window of bits are nearly collinear, so that the sum of
    A's powers explodes.
    """
    (gamma, D), beta = decays(log_alpha), beta[..., None]
    u = beta * v
    A = beta * (k @ k.mT) * D                                     # (B, H, L, L), diagonal not read
    u = torch.linalg.solve_triangular(A, u - beta * gamma * (k @ S.mT), upper=False,
                                      unitriangular=True)         # Eq. (3): delta rule
    return write_and_read(q, k, u, gamma, D, S)


def delta_rule(q: Tensor, k: Tensor, v: Tensor, log_alpha: Tensor, beta: Tensor, S: Tensor):
    """The delta rule without decay (DeltaNet): alpha = 1."""
    return gated_delta_rule(q, k, v, torch.zeros_like(log_alpha), beta, S)


RULES = {"gdn": gated_delta_rule, "delta": delta_rule, "mamba2": gated_rule}


# ------------------------------------------------------------------------------------------ modules

def norm(x: Tensor) -> Tensor:
    """RMS norm over the last axis, without a weight: the matrix that follows can hold it."""
    return F.rms_norm(x, x.shape[-1:])


class Matrices(nn.Module):
    """n linear maps d_in -> d_out without bias as one product: x (..., d_in) -> (..., n d_out).

    The weight is a stack (n, d_out, d_in), so that Muon orthogonalises each map by itself. It is
    cast to the dtype of x.
    """

    def __init__(self, d_in: int, d_out: int, n: int = 1):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(n, d_out, d_in) / math.sqrt(d_in))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.flatten(0, 1).to(x.dtype))


class Attention(nn.Module):
    """x (B, L, d), its cache -> output (B, L, d), the grown cache."""

    def __init__(self, config: Config):
        super().__init__()
        self.n_head = config.n_head
        self.span = None if config.eviction == "none" else config.window
        self.qkv = Matrices(config.d_model, config.d_model, 3)
        self.out = Matrices(config.d_model, config.d_model)

    def forward(self, x: Tensor, cache: Cache | None, S: None):
        B, L, d = x.shape
        heads = self.qkv(x).view(B, L, 3, self.n_head, -1)  # Eq. (1)
        # `attention` of norm(q), norm(k) and v; a fast form, on a GPU by a kernel.
        o, cache = attend(heads, cache, self.span)  # Choice: normed q and k
        return self.out(o.reshape(B, L, d)), cache, S


def short_convolution(x: Tensor, w: Tensor, n_head: int) -> Tensor:
    """What stands before the rule: a causal depthwise convolution, SiLU, unit q and k.

    x (B, L, 3 d), w (4, 3 d) -> q, k, v (B, L, 3, H, K). A fast form: shifted products take less
    time than conv1d at these sizes.
    """
    L, w, x = x.shape[1], w.to(x.dtype), F.pad(x, (0, 0, 3, 0))
    y = x[:, 3:] * w[3]
    for i in range(3):
        y = torch.addcmul(y, x[:, i:i + L], w[i])
    q, k, v = F.silu(y).view(*y.shape[:2], 3, n_head, -1).unbind(2)
    root = math.sqrt(q.shape[-1])
    return torch.stack([norm(q) / root, norm(k) / root, v], dim=2)


class ShortConv(nn.Module):
    """`short_convolution` with a memory: x (B, L, 3 d), tail -> q, k, v (B, L, 3, H, K), new tail.

    The tail, the 3 inputs before these, is short-term memory. A hard eviction drops it with the
    keys and values, and each pass asleep makes it anew."""

    def __init__(self, config: Config):
        super().__init__()
        self.n_head = config.n_head
        self.weight = nn.Parameter(torch.empty(4, 3 * config.d_model).uniform_(-0.5, 0.5))

    def forward(self, x: Tensor, tail: Tail | None) -> tuple[Tensor, Tail]:
        seen = x if tail is None else torch.cat([tail.x, x], dim=1)
        qkv = prepare(seen, self.weight, self.n_head)
        last = seen[:, -3:]
        last = Tail(F.pad(last, (0, 0, 3 - last.shape[1], 0)).clone())
        return qkv if tail is None else qkv[:, 3:], last


class GatedDeltaNet(nn.Module):
    """GDN's mixer with any rule: x (B, L, d), tail, S -> output (B, L, d), new tail, new S."""

    def __init__(self, config: Config):
        super().__init__()
        d, self.n_head, self.rule = config.d_model, config.n_head, config.rule
        self.qkv = Matrices(d, d, 3)
        self.gate = Matrices(d, d)
        self.conv = ShortConv(config)  # Choice: short convolution
        self.ab = Matrices(d, self.n_head, 2)
        self.out = Matrices(d, d)
        # GDN's start values: alpha = exp(-A dt), A uniform in (0.01, 16), dt log-uniform in
        # (0.001, 0.1). Weight decay would spoil them; there is none.
        A = torch.empty(self.n_head).uniform_(0.01, 16)
        dt = torch.empty(self.n_head).uniform_(math.log(1e-3), math.log(1e-1)).exp()
        self.A_log = nn.Parameter(A.log())
        self.dt_bias = nn.Parameter(dt.expm1().log())  # softplus(dt_bias) = dt

    def forward(self, x: Tensor, cache: Tail | None, S: Tensor):
        B, L, d = x.shape
        qkv, cache = self.conv(self.qkv(x), cache)
        gate, ab = in_one_product(x, self.gate, self.ab)
        a, b = ab.to(S.dtype).chunk(2, dim=-1)  # (B, L, H)
        log_alpha = -self.A_log.exp() * F.softplus(a + self.dt_bias)
        o, S = update(self.rule, qkv, log_alpha, b.sigmoid(), S)  # RULES[self.rule]
        return self.out(norm(o).view(B, L, d) * F.silu(gate)), cache, S


class Block(nn.Module):
    """Sequence mixer, then MLP, each with a norm before it and a residual around it.

    Kind m, an SSM block without MLP, is grafted into a trained model: it starts as identity.
    """

    def __init__(self, config: Config, kind: str):
        super().__init__()
        self.dtype, self.keep = getattr(torch, config.dtype), config.keep
        self.mixer = Attention(config) if kind == "a" else GatedDeltaNet(config)
        self.mlp = kind != "m"
        if self.mlp:
            self.up = Matrices(config.d_model, 4 * config.d_model)
            self.down = Matrices(4 * config.d_model, config.d_model)
        else:
            nn.init.zeros_(self.mixer.out.weight)

    def forward(self, h: Tensor, cache: Cache | Tail | None, S: Tensor | None, *, need_h: bool):
        """h (B, L, d), the block's cache and S -> the same after these L tokens.

        need_h = False: the new h is not needed. It is None, and what only it needs is left out."""
        o, cache, S = self.mixer(norm(h).to(self.dtype), cache, S)
        if self.keep == 0:
            cache = without_gradient(cache)
        if not need_h:
            return None, cache, S
        h = h + o
        if not self.mlp:
            return h, cache, S
        up = F.relu(self.up(norm(h).to(self.dtype))).square()  # Choice: squared ReLU
        return h + self.down(up), cache, S


class Hybrid(nn.Module):
    """Embed -> blocks as the layout orders them -> OutProj: "aaaa" is Eq. (4), "asas" Eq. (5)."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.embedding = nn.Parameter(torch.randn(config.vocab_size, config.d_model))
        self.layers = nn.ModuleList(Block(config, kind) for kind in config.layout)  # Eq. (4), (5)
        self.out = Matrices(config.d_model, config.vocab_size)
        nn.init.zeros_(self.out.weight)  # Choice: start values

    def empty_memory(self, batch_size: int) -> Memory:
        """What a model remembers at the start: nothing is cached, S = 0."""
        c, parameter = self.config, self.out.weight
        size = c.d_model // c.n_head  # Differs: V = K
        dtype = torch.promote_types(parameter.dtype, torch.float32)
        S = tuple(None if kind == "a" else like_later_S(torch.zeros(
            batch_size, c.n_head, size, size, dtype=dtype, device=parameter.device))
            for kind in c.layout)
        return Memory((None,) * len(c.layout), S)

    def embed(self, tokens: Tensor) -> Tensor:
        """tokens (B, L) -> h (B, L, d). Raises ValueError if tokens are no whole numbers.

        A fast form: one product, since the gradient of a lookup sorts the tokens.
        """
        if tokens.is_floating_point() or tokens.ndim != 2:
            raise ValueError(f"tokens {tuple(tokens.shape)}, {tokens.dtype}: must be whole numbers "
                             "(B, L)")
        one_hot = F.one_hot(tokens.long(), len(self.embedding))
        return one_hot.to(self.embedding.dtype) @ self.embedding  # Choice: no window position

    def prelude(self, h: Tensor, memory: Memory) -> tuple[Tensor, Memory]:
        """The blocks before the looped ones: h (B, L, d), memory -> the same after them."""
        return self.blocks(h, memory, 0, self.config.looped[0])

    def core(self, h: Tensor, memory: Memory, need_h: bool = True) -> tuple[Tensor | None, Memory]:
        """One pass over the looped blocks. need_h = False: the h after it may be None."""
        i, j = self.config.looped
        return self.blocks(h, memory, i, j, need_h or j < len(self.layers))

    def coda(self, h: Tensor, memory: Memory, need_h: bool = True) -> tuple[Tensor | None, Memory]:
        """The blocks after the looped ones."""
        return self.blocks(h, memory, self.config.looped[1], len(self.layers), need_h)

    def blocks(self, h: Tensor | None, memory: Memory, start: int, stop: int,
               need_h: bool = True) -> tuple[Tensor | None, Memory]:
        """The blocks start to stop - 1, in their order: h (B, L, d), memory -> the same after them.

        need_h = False: nobody needs the last h, it is None."""
        cache, S = list(memory.cache), list(memory.S)
        for i in range(start, stop):
            h, cache[i], S[i] = self.layers[i](h, cache[i], S[i], need_h=need_h or i < stop - 1)
        return h, Memory(tuple(cache), tuple(S))

    def unembed(self, h: Tensor) -> Tensor:
        """OutProj: h (B, L, d) -> logits (B, L, vocabulary)."""
        return self.out(norm(h))


CHOICES = {"dtype": ("float32", "bfloat16", "float64"), "rule": RULES,
           "eviction": ("hard", "sliding", "none")}


def check_config(c: Config):
    """Raises ValueError, one line that begins with the field, if a shape is impossible."""
    i, j = c.looped
    for name, possible, must in (
            ("layout", c.layout and not set(c.layout) - set("asm"), "be letters a (attention), "
             "s (SSM) and m (SSM without MLP), one a block, such as asas"),
            *((name, getattr(c, name) >= 1, "be at least 1")
              for name in ("vocab_size", "window", "d_model")),
            ("n_head", c.n_head >= 1 and c.d_model % (2 * max(c.n_head, 1)) == 0,
             f"divide d_model {c.d_model} into heads of even size"),
            ("window", c.window > 1 or c.eviction != "sliding",
             "be at least 2 for sliding eviction"),
            *((name, getattr(c, name) in valid, "be one of " + ", ".join(valid))
              for name, valid in CHOICES.items()),
            ("loop_blocks", 0 <= i < j <= len(c.layout),
             f"be i:j with 0 <= i < j <= {len(c.layout)}, the number of blocks")):
        if not possible:
            value = f"{i}:{j}" if name == "loop_blocks" else repr(getattr(c, name))
            raise ValueError(f"{name} {value}: must {must}")


# -------------------------------------------------------------------------------- for speed only

def like_later_S(S: Tensor) -> Tensor:
    """The start's S asks for a gradient as any later S does: to a compiler the first window then
    looks like the others."""
    return S.requires_grad_(torch.is_grad_enabled())


def without_gradient(cache: Cache | Tail) -> Cache | Tail:
    """Under hard eviction no other window reads the cache, so that no gradient goes through it. A
    compiled block would carry one of zeros. Written out, as `_make` is not compiled before 2.13."""
    if isinstance(cache, Tail):
        return Tail(cache.x.detach())
    return Cache(cache.k.detach(), cache.v.detach())


def in_one_product(x: Tensor, *maps: Matrices) -> tuple[Tensor, ...]:
    """The maps of x, made as one product. Their weights are used directly: hooks on them are not
    called."""
    weight = torch.cat([m.weight.flatten(0, 1) for m in maps])
    y = F.linear(x, weight.to(x.dtype))
    return y.split([m.weight.shape[:2].numel() for m in maps], dim=-1)


PIECE = 32  # tokens that go through a rule at once: its work grows with their square


def update(rule: str, qkv: Tensor, log_alpha: Tensor, beta: Tensor, S: Tensor):
    """RULES[rule] with the modules' order of axes, a long window in pieces, which changes nothing.

    qkv (B, L, 3, H, K), log_alpha, beta (B, L, H), S (B, H, V, K) -> o (B, L, H, V) and the S after
    the window. Raises ValueError if the sizes do not match.
    """
    B, L, _, H, K = qkv.shape
    if not log_alpha.shape == beta.shape == (B, L, H) or S.shape != (B, H, K, K):
        raise ValueError(f"S {tuple(S.shape)}: must be of {B} sequences, {H} heads and keys of {K},"
                         f" as q, k and v are, {tuple(qkv.shape)}, with an alpha and beta for each")
    has_kernel = rule in KERNELS and fits_kernels(qkv, K)
    run = KERNELS[rule] if has_kernel else plain_form(RULES[rule])
    pieces = -(-L // PIECE)
    if pieces == 1:
        return run(qkv, log_alpha, beta, S)
    outputs = []
    for piece in zip(*(x.split(-(-L // pieces), dim=1) for x in (qkv, log_alpha, beta))):
        o, S = run(*piece, S)
        outputs.append(o)
    return torch.cat(outputs, dim=1), S


def plain_form(rule):
    """A rule with the modules' order of axes, in the dtype of S: the solve takes no lower one."""
    def run(qkv: Tensor, log_alpha: Tensor, beta: Tensor, S: Tensor):
        q, k, v = (x.to(S.dtype).transpose(1, 2).contiguous() for x in qkv.unbind(2))
        with torch.autocast(S.device.type, enabled=False):
            o, S = rule(q, k, v, log_alpha.to(S.dtype).mT, beta.to(S.dtype).mT, S)
        return o.transpose(1, 2).to(qkv.dtype), S
    return run


def attend(qkv: Tensor, cache: Cache | None, span: int | None) -> tuple[Tensor, Cache]:
    """`attention` with the modules' order of axes, of normed q and k; by a kernel if C is 0.

    qkv (B, L, 3, H, K) -> o (B, L, H, V) and the cache grown by L.
    """
    q, k, v = (x.transpose(1, 2) for x in qkv.unbind(2))  # each (B, H, L, K)
    L, K = qkv.shape[1], qkv.shape[4]
    if cache is None and L <= min(PIECE, span or PIECE) and fits_kernels(qkv, K):
        return fused_attention(qkv, *rotation(L, K, torch.float32, qkv.device)), Cache(norm(k), v)
    o, cache = attention(norm(q), norm(k), v, cache, span)
    return o.transpose(1, 2), cache


def prepare(x: Tensor, w: Tensor, n_head: int) -> Tensor:
    """`short_convolution`, on a GPU by a kernel. Raises ValueError if the sizes do not match."""
    if w.shape != (4, x.shape[2]) or x.shape[2] % (3 * n_head):
        raise ValueError(f"w {tuple(w.shape)}: must be (4, {x.shape[2]}), as x is "
                         f"{tuple(x.shape)}, for q, k and v of {n_head} heads")
    if fits_kernels(x, x.shape[2] // n_head // 3):
        return fused_prepare(x, w, n_head).view(*x.shape[:2], 3, n_head, -1)
    return short_convolution(x, w, n_head)


def fits_kernels(x: Tensor, K: int) -> bool:
    """Whether the kernels can take x, with heads of size K."""
    return (bool(triton) and x.is_cuda and x.dtype == torch.bfloat16 and K in (16, 32, 64)
            and x.numel() * max(1, K // x.shape[1]) < 2**31)  # offsets are int32


# The kernels: `short_convolution`, `gated_delta_rule` and `attention` once more, letters as there;
# but T is the inverse of I + A, and C is L rounded up to 16 or 32. The tests compare both forms.
# What plain torch writes to memory and reads again in some thirty kernels stays on chip. Decays,
# sums and S are float32, I + A is inverted in tf32, other factors of products in bfloat16.

try:
    import triton
    import triton.language as tl
    jit = triton.jit
except ImportError:  # torch for CPUs comes without Triton: the kernels are defined, but never run
    from types import SimpleNamespace
    triton, tl = None, SimpleNamespace(constexpr=int)

    def jit(kernel):
        return kernel


@jit
def channels(w, H, K: tl.constexpr, G: tl.constexpr):  # G heads of q, k or v, and their weights
    head, n = tl.program_id(1) * G + tl.arange(0, G)[:, None], 3 * H * K
    c = head * K + tl.arange(0, K)
    return (tl.program_id(0), c, n, head < 2 * H, tl.load(w + c), tl.load(w + n + c),
            tl.load(w + 2 * n + c), tl.load(w + 3 * n + c))


@jit
def silu_and_scale(x, is_unit, K: tl.constexpr):
    s = tl.sigmoid(x)
    u = x * s
    scale = tl.rsqrt(tl.sum(u * u, 1) + K * 1.1920929e-7)[:, None]  # the eps of norm()
    return u, s + u * (1 - s), tl.where(is_unit, scale, 1.0)


@jit
def prepare_forward(x, w, y, L, H, K: tl.constexpr, G: tl.constexpr):
    b, c, n, is_unit, w0, w1, w2, w3 = channels(w, H, K, G)
    x += b * L * n + c
    x1, x2, x3 = 0 * w1, 0 * w2, 0 * w3  # zeros; Triton 3.6 takes equal ones for one variable
    ahead = tl.load(x)
    for t in range(L):  # a program takes some heads of a sequence, a token after the other
        x0 = ahead.to(tl.float32)
        ahead = tl.load(x + (t + 1) * n, t + 1 < L, 0.0)
        u, _, scale = silu_and_scale(w3 * x0 + w2 * x1 + w1 * x2 + w0 * x3, is_unit, K)
        tl.store(y + (b * L + t) * n + c, u * scale)
        x3, x2, x1 = x2, x1, x0


@jit
def prepare_backward(x, w, dy, dx, dw, L, H, K: tl.constexpr, G: tl.constexpr):
    b, c, n, is_unit, w0, w1, w2, w3 = channels(w, H, K, G)
    x += b * L * n + c
    dy += b * L * n + c
    x0, x1 = tl.load(x + (L - 1) * n), tl.load(x + (L - 2) * n, L > 1, 0.0)
    x2, x3 = tl.load(x + (L - 3) * n, L > 2, 0.0), tl.load(x + (L - 4) * n, L > 3, 0.0)
    d1, d2, d3, dw0, ahead = 0 * w1, 0 * w2, 0 * w3, 0 * w0, tl.load(dy + (L - 1) * n)
    dw1, dw2, dw3 = dw0, dw0, dw0
    for i in range(L):
        t, d0 = L - 1 - i, ahead.to(tl.float32)
        x4, ahead = tl.load(x + (t - 4) * n, t > 3, 0.0), tl.load(dy + (t - 1) * n, t > 0, 0.0)
        u, slope, scale = silu_and_scale(w3 * x0 + w2 * x1 + w1 * x2 + w0 * x3, is_unit, K)
        u *= tl.where(is_unit, scale, 0.0)
        d0 = slope * scale * (d0 - u * tl.sum(u * d0, 1)[:, None])
        tl.store(dx + (b * L + t) * n + c, w3 * d0 + w2 * d1 + w1 * d2 + w0 * d3)
        dw0, dw1, dw2, dw3 = dw0 + d0 * x3, dw1 + d0 * x2, dw2 + d0 * x1, dw3 + d0 * x0
        x0, x1, x2, x3, d3, d2, d1 = x1, x2, x3, x4, d2, d1, d0
    dw += 4 * b * n + c
    tl.store(dw, dw0)
    tl.store(dw + n, dw1)
    tl.store(dw + 2 * n, dw2)
    tl.store(dw + 3 * n, dw3)


@jit
def dot(a, b, c=None):
    return tl.dot(a.to(tl.bfloat16), b.to(tl.bfloat16), c)


@jit
def window(qkv, cos, sin, L, H, C: tl.constexpr, K: tl.constexpr):
    # A program takes the window of one head n of a sequence: C tokens t, zeros from L on. Offsets:
    # at of q in qkv, LV of o. A coordinate x is turned together with the one at far.
    n, t, x = tl.program_id(0), tl.arange(0, C), tl.arange(0, K)
    row = t[:, None]
    at = (n // H * L + row) * 3 * H * K + n % H * K
    c = tl.load(cos + row * (K // 2) + x % (K // 2), row < L, 0.0)
    s = tl.load(sin + row * K + x, row < L, 0.0)
    v = tl.load(qkv + at + 2 * H * K + x, row < L, 0.0)
    return t, row, at + x, at + (x + K // 2) % K, ((n // H * L + row) * H + n % H) * K + x, c, s, v


@jit
def turned(x, far, c, s, K: tl.constexpr):  # x normed, 1 over its norm, x turned, far turned
    x, far = x.to(tl.float32), far.to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x, 1) / K + 1.1920929e-7)[:, None]
    x, far = x * scale, far * scale
    return x, scale, x * c + far * s, far * c - x * s


@jit
def weights(q, k, t, K: tl.constexpr):
    scores = tl.where(t[:, None] >= t, dot(q, tl.trans(k)) / tl.sqrt(K * 1.0), -float("inf"))
    p = tl.exp(scores - tl.max(scores, 1)[:, None])
    return p / tl.sum(p, 1)[:, None]


@jit
def attention_forward(qkv, cos, sin, o, L, H, C: tl.constexpr, K: tl.constexpr):
    t, row, at, far, LV, c, s, v = window(qkv, cos, sin, L, H, C, K)
    _, _, q, _ = turned(tl.load(qkv + at, row < L, 0.0), tl.load(qkv + far, row < L, 0.0), c, s, K)
    qkv += H * K
    _, _, k, _ = turned(tl.load(qkv + at, row < L, 0.0), tl.load(qkv + far, row < L, 0.0), c, s, K)
    tl.store(o + LV, dot(weights(q, k, t, K), v), row < L)


@jit
def attention_backward(qkv, cos, sin, do, dqkv, L, H, C: tl.constexpr, K: tl.constexpr):
    t, row, at, far, LV, c, s, v = window(qkv, cos, sin, L, H, C, K)
    qn, q_scale, q, q_far = turned(tl.load(qkv + at, row < L, 0.0),
                                   tl.load(qkv + far, row < L, 0.0), c, s, K)
    qkv += H * K
    kn, k_scale, k, k_far = turned(tl.load(qkv + at, row < L, 0.0),
                                   tl.load(qkv + far, row < L, 0.0), c, s, K)
    p, do = weights(q, k, t, K), tl.load(do + LV, row < L, 0.0)
    tl.store(dqkv + at + 2 * H * K, dot(tl.trans(p), do), row < L)
    dp = dot(do, tl.trans(v))
    ds = p * (dp - tl.sum(p * dp, 1)[:, None]) / tl.sqrt(K * 1.0)
    dq = dot(ds, k) * c - dot(ds, k_far) * s  # turned back
    dk = dot(tl.trans(ds), q) * c - dot(tl.trans(ds), q_far) * s
    tl.store(dqkv + at, q_scale * (dq - qn * tl.sum(dq * qn, 1)[:, None] / K), row < L)
    tl.store(dqkv + at + H * K, k_scale * (dk - kn * tl.sum(dk * kn, 1)[:, None] / K), row < L)


@jit
def tile(qkv, log_alpha, beta, L, H, C: tl.constexpr, K: tl.constexpr):
    # A program takes the window of one head n of a sequence: C tokens t, zeros from L on. Offsets:
    # i in (B, L, H), at of q in qkv, and those of (L, V), (L, C) and (V, K) tiles.
    n, t, x = tl.program_id(0), tl.arange(0, C), tl.arange(0, K)
    row, column, i = t[:, None], t[None, :], (n // H * L + t) * H + n % H
    at = ((i - n % H) * 3 + n % H)[:, None] * K + x
    q, k = tl.load(qkv + at, row < L, 0.0), tl.load(qkv + at + H * K, row < L, 0.0)
    v = tl.load(qkv + at + 2 * H * K, row < L, 0.0)
    log_alpha, beta = tl.load(log_alpha + i, t < L, 0.0), tl.load(beta + i, t < L, 0.0)[:, None]
    g, end = tl.cumsum(log_alpha, 0)[:, None], tl.sum(log_alpha, 0)
    D = tl.exp(tl.where(row >= column, g - tl.trans(g), -float("inf")))
    return (t, row, column, i, at, i[:, None] * K + x, i[:, None] * C + column,
            n * K * K + x[:, None] * K + x, q, k, v, beta, D, tl.exp(g), tl.exp(end),
            tl.exp(end - g))


@jit
def rule_forward(qkv, log_alpha, beta, S, o, after, inverse, L, H,
                 C: tl.constexpr, K: tl.constexpr):
    _, row, column, _, _, LV, CC, VK, q, k, v, beta, D, gamma, end, to_end = tile(
        qkv, log_alpha, beta, L, H, C, K)
    A = tl.where(row > column, beta * dot(k, tl.trans(k)) * D, 0.0)
    T = tl.where(row == column, 1.0, 0.0) - tl.where(row ^ column == 1, A, 0.0)
    for e in tl.static_range(1, 5):  # T: I + A inverted in blocks of 2^e, here of the next size, by
        corner = tl.where((row ^ column) >> e == 1, A, 0.0)  # block substitution: no powers of A
        T -= tl.dot(tl.dot(T, corner), T)  # Choice: products on a GPU
    tl.store(inverse + CC, T, row < L)
    was = tl.load(S + VK).to(tl.bfloat16)
    U = dot(T, beta * (v - gamma * dot(k, tl.trans(was))))
    tl.store(o + LV, dot(dot(q, tl.trans(k)) * D, U, gamma * dot(q, tl.trans(was))), row < L)
    tl.store(after + VK, dot(tl.trans(to_end * U), k, end * tl.load(S + VK)))


@jit
def rule_backward(qkv, log_alpha, beta, S, inverse, do, dafter, dqkv, dlog_alpha, dbeta, dS, L, H,
                  C: tl.constexpr, K: tl.constexpr):
    t, row, column, i, at, LV, CC, VK, q, k, v, beta, D, gamma, end, to_end = tile(
        qkv, log_alpha, beta, L, H, C, K)
    S, T, da = tl.load(S + VK), tl.load(inverse + CC, row < L, 0.0), tl.load(dafter + VK)
    last = end * tl.sum(S * da)  # last: gradient of end's exponent
    S, da, do = S.to(tl.bfloat16), da.to(tl.bfloat16), tl.load(do + LV, row < L, 0.0)
    miss, QKD = v - gamma * dot(k, tl.trans(S)), dot(q, tl.trans(k)) * D
    U = dot(T, beta * miss).to(tl.bfloat16)  # U = T R
    dR = dot(tl.trans(T), dot(tl.trans(QKD), do, to_end * dot(k, tl.trans(da))))
    tl.store(dqkv + at + 2 * H * K, beta * dR, row < L)
    dP, dA = dot(do, tl.trans(U)), tl.where(row > column, -dot(dR, tl.trans(U)) * D, 0.0)
    AdA = dA * dot(k, tl.trans(k))  # over beta
    tl.store(dbeta + i, tl.sum(dR * miss, 1) + tl.sum(AdA, 1), t < L)
    dA, dg, dP = beta * dA, QKD * dP + beta * AdA, dP * D
    dq, kept = gamma * dot(do, S), to_end * dot(U, da)
    dk = kept - beta * gamma * dot(dR, S)
    dg = tl.sum(dg, 1) - tl.sum(dg, 0) + tl.sum(dq * q - (2 * kept - dk) * k, 1)
    tl.store(dlog_alpha + i, tl.cumsum(dg, 0, reverse=True) + last + tl.sum(kept * k), t < L)
    tl.store(dqkv + at, dot(dP, k, dq), row < L)
    dk = dot(tl.trans(dP), q, dot(dA + tl.trans(dA), k, dk))
    tl.store(dqkv + at + H * K, dk, row < L)
    dS_q = dot(tl.trans(gamma * do), q, end * tl.load(dafter + VK))
    tl.store(dS + VK, dot(tl.trans(-beta * gamma * dR), k, dS_q))


@torch.library.custom_op("sleep::fused_attention", mutates_args=())
def fused_attention(qkv: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    (B, L, _, H, K), qkv = qkv.shape, qkv.contiguous()
    o = qkv.new_empty(B, L, H, K)
    attention_forward[B * H,](qkv, cos, sin, o, L, H, 16 if L <= 16 else 32, K, num_warps=1)
    return o


@torch.library.custom_op("sleep::fused_attention_backward", mutates_args=())
def fused_attention_backward(qkv: Tensor, cos: Tensor, sin: Tensor, do: Tensor) -> Tensor:
    (B, L, _, H, K), qkv = qkv.shape, qkv.contiguous()
    dqkv = torch.empty_like(qkv)
    attention_backward[B * H,](qkv, cos, sin, do.contiguous(), dqkv, L, H, 16 if L <= 16 else 32, K,
                               num_warps=max(1, K // 32))  # measured
    return dqkv


fused_attention.register_fake(lambda qkv, cos, sin: qkv.new_empty(*qkv.shape[:2], *qkv.shape[3:]))
fused_attention_backward.register_fake(lambda qkv, cos, sin, do: qkv.new_empty(qkv.shape))
fused_attention.register_autograd(
    lambda ctx, do: (fused_attention_backward(*ctx.saved_tensors, do), None, None),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs))


def tile_of(n: int, n_head: int) -> tuple[int, int]:
    """The size K of a head, and how many of them a program of one warp takes: 128 channels."""
    K = n // n_head // 3
    return K, math.gcd(n_head, 128 // K)


@torch.library.custom_op("sleep::fused_prepare", mutates_args=())
def fused_prepare(x: Tensor, w: Tensor, n_head: int) -> Tensor:
    (B, L, n), y = x.shape, x.new_empty(x.shape)
    K, G = tile_of(n, n_head)
    prepare_forward[B, 3 * n_head // G](x.contiguous(), w, y, L, n_head, K, G, num_warps=1)
    return y


@torch.library.custom_op("sleep::fused_prepare_backward", mutates_args=())
def fused_prepare_backward(x: Tensor, w: Tensor, n_head: int, dy: Tensor) -> tuple[Tensor, Tensor]:
    (B, L, n), dx, dw = x.shape, x.new_empty(x.shape), w.new_empty(len(x), *w.shape)
    K, G = tile_of(n, n_head)
    prepare_backward[B, 3 * n_head // G](x.contiguous(), w, dy.contiguous(), dx, dw, L, n_head,
                                         K, G, num_warps=1)
    return dx, dw


@torch.library.custom_op("sleep::fused_rule", mutates_args=())
def fused_rule(qkv: Tensor, log_alpha: Tensor, beta: Tensor,
               S: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    qkv, log_alpha, beta, S = (x.contiguous() for x in (qkv, log_alpha, beta, S))
    (B, L, _, H, K), outputs = qkv.shape, rule_outputs(qkv, log_alpha, beta, S)
    rule_forward[B * H,](qkv, log_alpha, beta, S, *outputs, L, H, outputs[2].shape[3], K,
                         num_warps=2)
    return outputs


@torch.library.custom_op("sleep::fused_rule_backward", mutates_args=())
def fused_rule_backward(qkv: Tensor, log_alpha: Tensor, beta: Tensor, S: Tensor, inverse: Tensor,
                        do: Tensor, dafter: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    inputs = [x.contiguous() for x in (qkv, log_alpha, beta, S, inverse, do, dafter)]
    (B, L, _, H, K), gradients = qkv.shape, tuple(map(torch.empty_like, inputs[:4]))
    rule_backward[B * H,](*inputs, *gradients, L, H, inverse.shape[3], K,
                         num_warps=max(1, K // 16))  # measured: 2 for heads of 32, 4 for 64
    return gradients


def rule_outputs(qkv: Tensor, log_alpha: Tensor, beta: Tensor, S: Tensor):
    B, L, _, H, K = qkv.shape
    return (qkv.new_empty(B, L, H, K), S.new_empty(S.shape),
            qkv.new_empty(B, L, H, 16 if L <= 16 else 32))


fused_prepare.register_fake(lambda x, w, n_head: x.new_empty(x.shape))
fused_prepare_backward.register_fake(
    lambda x, w, n_head, dy: (x.new_empty(x.shape), w.new_empty(len(x), *w.shape)))


def prepare_gradients(ctx, dy: Tensor):
    dx, dw = fused_prepare_backward(*ctx.saved_tensors, ctx.n_head, dy)
    return dx, dw.sum(0), None


fused_prepare.register_autograd(prepare_gradients, setup_context=lambda ctx, inputs, output: (
    ctx.save_for_backward(*inputs[:2]), setattr(ctx, "n_head", inputs[2])))
fused_rule.register_fake(rule_outputs)
fused_rule_backward.register_fake(lambda *x: tuple(y.new_empty(y.shape) for y in x[:4]))
fused_rule.register_autograd(
    lambda ctx, do, dafter, _: fused_rule_backward(*ctx.saved_tensors, do, dafter),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs, output[2]))


def kernel_form(qkv: Tensor, log_alpha: Tensor, beta: Tensor, S: Tensor):
    return fused_rule(qkv, log_alpha, beta, S)[:2]


KERNELS = {"gdn": kernel_form,  # a rule that is not here takes its plain form
           "delta": lambda qkv, log_alpha, beta, S: kernel_form(
               qkv, torch.zeros_like(log_alpha), beta, S)}
