"""The hybrid: attention blocks with a short-term cache, SSM blocks with fast weights S.

The letters are explained at the top of sleep.py. The mathematics stands in two plain functions of
tensors, `attention` and `gated_delta_rule`; the modules around them only hold weights.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sleep import Cache, Memory, Tail

# Rotary wavelengths are 2 pi ROPE_BASE^(i / pairs) tokens, i = 0, 1, ... Within a window of 24 the
# usual 10,000 would leave most pairs of coordinates unrotated; 100 lets them tell positions.
ROPE_BASE = 100.0


@dataclass
class Config:
    """A model's shape. Raises ValueError, one line that begins with the field, if impossible."""
    vocab_size: int
    window: int             # L: tokens between evictions
    layout: str = "asas"    # one letter a block, a = attention, s = SSM; "asas" is the paper's
    d_model: int = 256      # d
    n_head: int = 4         # H; K = V = d / H
    dtype: str = "float32"  # of activations inside the blocks; parameters, h and S stay in float32
    # Variants of the sleep, each read at one place; the defaults are Algorithm 1.
    eviction: str = "hard"       # hard: the whole cache; sliding: all but L - 1 tokens; none
    loop_blocks: tuple[int, int] | None = None  # only blocks i to j - 1 are looped; None: all
    carry: str = "h"             # a pass starts from the last one's h, or again from the first's
    carry_S: bool = True         # ... and from its S, or again from the S at the window's start
    sleep_at: str = "sleep"      # where the N passes are spent: asleep, or awake in scored windows
    rule: str = "gdn"            # gdn, delta (no decay), mamba2 (Eq. 3 as printed: no delta rule)

    def __post_init__(self):
        if not self.layout or set(self.layout) - set("asm"):
            raise ValueError(f"layout {self.layout!r}: must be letters a (attention), s (SSM) and "
                             "m (SSM without MLP), one a block, such as asas")
        if self.d_model < 1:
            raise ValueError(f"d_model {self.d_model}: must be at least 1")
        if self.n_head < 1 or self.d_model % (2 * self.n_head):
            raise ValueError(f"n_head {self.n_head}: must divide d_model {self.d_model} "
                             "into heads of even size")
        if self.window < 1:
            raise ValueError(f"window {self.window}: must be at least 1")
        if self.window == 1 and self.eviction == "sliding":
            raise ValueError("window 1: must be at least 2 for sliding eviction")
        for name, valid in (("dtype", "float32 bfloat16 float64"), ("rule", "gdn delta mamba2"),
                            ("eviction", "hard sliding none"), ("carry", "h embed"),
                            ("sleep_at", "sleep wake")):
            if getattr(self, name) not in valid.split():
                raise ValueError(f"{name} {getattr(self, name)!r}: must be one of {valid}")
        self.loop_blocks = i, j = self.loop_blocks or (0, len(self.layout))
        if not 0 <= i < j <= len(self.layout):
            raise ValueError(f"loop_blocks {i}:{j}: must be i:j with 0 <= i < j <= "
                             f"{len(self.layout)}, the number of blocks")

    @property
    def keep(self) -> int | None:
        """Tokens whose keys and values an eviction keeps; None: all."""
        return {"hard": 0, "sliding": self.window - 1, "none": None}[self.eviction]


# -------------------------------------------------------------------------- the two sequence mixers

def rotation(length: int, size: int, dtype: torch.dtype, device: torch.device):
    """cos and sin, each (length, size / 2), of the rotary angles at positions 0, 1, ..."""
    frequency = ROPE_BASE ** (-torch.arange(0, size, 2, dtype=dtype, device=device) / size)
    angle = torch.arange(length, dtype=dtype, device=device)[:, None] * frequency
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs (x_i, x_{i + size/2}) of x (..., length, size) by their position's angles."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1).to(x.dtype)


def attention(q: Tensor, k: Tensor, v: Tensor, cache: Cache | None = None,
              span: int | None = None) -> tuple[Tensor, Cache]:
    """Causal softmax attention (Eq. 2) over the cache and then these L tokens.

    q, k (B, H, L, K), v (B, H, L, V) -> o (B, H, L, V) and the cache grown by L. A query sees the
    `span` latest tokens, itself included; None: all. Only differences of rotary positions matter,
    so they are counted from the oldest token in the cache, keys are cached unrotated, and no
    absolute position outlives an eviction.
    """
    if cache is not None:
        k, v = torch.cat([cache.k, k], dim=2), torch.cat([cache.v, v], dim=2)
    L, C = q.shape[2], k.shape[2]
    cos, sin = rotation(C, q.shape[3], torch.promote_types(q.dtype, torch.float32), q.device)
    q, turned = rotate(q, cos[C - L:], sin[C - L:]), rotate(k, cos, sin)  # Choice: rotary positions
    visible = torch.ones(L, C, dtype=torch.bool, device=q.device).tril(C - L)
    if span is not None and C > span:
        visible = visible.triu(C - L - span + 1)
    o = F.scaled_dot_product_attention(q, turned, v, attn_mask=visible)   # Eq. (2)
    return o, Cache(k, v)


def gated_delta_rule(q: Tensor, k: Tensor, v: Tensor, log_alpha: Tensor, beta: Tensor,
                     S: Tensor, delta: bool = True) -> tuple[Tensor, Tensor]:
    """Eq. (3) with the delta rule (Gated DeltaNet, arXiv 2412.06464), a whole window at once:

        S_t = alpha_t S_{t-1} (I - beta_t k_t k_t^T) + beta_t v_t k_t^T,    o_t = S_t q_t

    q, k (B, H, L, K), v (B, H, L, V), log_alpha <= 0 and beta in (0, 1) (B, H, L), S (B, H, V, K)
    -> o (B, H, L, V) and the S after the window. All of one dtype. The caller normalises k.

    Token t really writes u_t k_t^T with u_t = beta_t (v_t - alpha_t S_{t-1} k_t). Unrolling S_{t-1}
    into the starting S and the earlier writes makes the L vectors u a lower triangular system.
    Solve it by substitution only: its keys are nearly collinear, and an inverse by powers explodes.
    Without the delta rule, Eq. (3) as printed (Mamba-2's), u_t = beta_t v_t.
    """
    L = q.shape[2]
    g = log_alpha.cumsum(-1)                                    # (B, H, L), log gamma
    future = torch.ones(L, L, dtype=torch.bool, device=q.device).triu(1)
    # D_ij = product of alpha over (j, i], 0 for j > i. Masked after exp, gradients would be NaN.
    D = (g[..., :, None] - g[..., None, :]).masked_fill(future, -math.inf).exp()    # (B, H, L, L)
    gamma, beta = g.exp()[..., None], beta[..., None]           # (B, H, L, 1): decay from the start
    u = beta * v                                                # (B, H, L, V)
    if delta:
        A = beta * (k @ k.mT) * D                               # (B, H, L, L), diagonal not read
        u = torch.linalg.solve_triangular(A, u - beta * gamma * (k @ S.mT), upper=False,
                                          unitriangular=True)
    o = gamma * (q @ S.mT) + (q @ k.mT * D) @ u                   # Eq. (3): read
    S = gamma[:, :, -1:] * S + (D[:, :, -1, :, None] * u).mT @ k  # Eq. (3): delta rule
    return o, S


# ------------------------------------------------------------------------------------------ modules

def norm(x: Tensor) -> Tensor:
    """RMS norm over the last axis, without a weight: the matrix that follows can hold it."""
    return F.rms_norm(x, x.shape[-1:])


class Matrices(nn.Module):
    """n linear maps d_in -> d_out without bias as one product: x (..., d_in) -> (..., n d_out).

    The weight is a stack (n, d_out, d_in), so that Muon orthogonalises each map by itself, and is
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
        q, k, v = heads.permute(2, 0, 3, 1, 4)              # each (B, H, L, K)
        o, cache = attention(norm(q), norm(k), v, cache, self.span)  # Choice: normed q and k
        return self.out(o.transpose(1, 2).reshape(B, L, d)), cache, S


class ShortConv(nn.Module):
    """Causal depthwise convolution over 4 tokens and SiLU: x (B, L, channels), tail -> y, new tail.

    Written as four shifted products: faster than conv1d at these sizes. The tail, the 3 inputs
    before these, is short-term memory: like keys and values it is evicted after the window and made
    anew in each pass asleep.
    """
    SIZE = 4

    def __init__(self, channels: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(self.SIZE, channels).uniform_(-0.5, 0.5))

    def forward(self, x: Tensor, tail: Tail | None) -> tuple[Tensor, Tail]:
        before = x.new_zeros(len(x), self.SIZE - 1, x.shape[2]) if tail is None else tail.x
        x, L = torch.cat([before, x], dim=1), x.shape[1]
        y = sum(x[:, i:i + L] * w for i, w in enumerate(self.weight.to(x.dtype)))
        return F.silu(y), Tail(x[:, L:])


class GatedDeltaNet(nn.Module):
    """x (B, L, d), its convolution's tail and S -> output (B, L, d), the new tail and the new S."""

    def __init__(self, config: Config):
        super().__init__()
        d, self.n_head, self.rule = config.d_model, config.n_head, config.rule
        self.qkvg = Matrices(d, d, 4)
        self.conv = ShortConv(3 * d)  # Choice: short convolution
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
        qkv, gate = self.qkvg(x).split([3 * d, d], dim=-1)
        qkv, cache = self.conv(qkv, cache)
        q, k, v = qkv.view(B, L, 3, self.n_head, -1).permute(2, 0, 3, 1, 4)           # (B, H, L, K)
        gate = gate.view(B, L, self.n_head, -1).transpose(1, 2)
        a, b = self.ab(x).view(B, L, 2, self.n_head).permute(2, 0, 3, 1).to(S.dtype)  # (B, H, L)
        log_alpha = -self.A_log.exp()[:, None] * F.softplus(a + self.dt_bias[:, None])
        q, k = F.normalize(q.to(S.dtype), dim=-1), F.normalize(k.to(S.dtype), dim=-1)
        log_alpha = torch.zeros_like(log_alpha) if self.rule == "delta" else log_alpha
        o, S = gated_delta_rule(q, k, v.to(S.dtype), log_alpha, b.sigmoid(), S,
                                delta=self.rule != "mamba2")
        o = norm(o).to(x.dtype) * F.silu(gate)
        return self.out(o.transpose(1, 2).reshape(B, L, d)), cache, S


class Block(nn.Module):
    """Sequence mixer, then MLP, each with a norm before it and a residual around it.

    Kind m, an SSM block without MLP, is for insertion into a trained model: it starts as identity.
    """

    def __init__(self, config: Config, kind: str):
        super().__init__()
        self.dtype = getattr(torch, config.dtype)
        self.mixer = Attention(config) if kind == "a" else GatedDeltaNet(config)
        self.mlp = kind != "m"
        if self.mlp:
            self.up = Matrices(config.d_model, 4 * config.d_model)
            self.down = Matrices(4 * config.d_model, config.d_model)
        else:
            nn.init.zeros_(self.mixer.out.weight)

    def forward(self, h: Tensor, cache: Cache | Tail | None, S: Tensor | None):
        """h (B, L, d), what the block remembers -> the same after these L tokens."""
        o, cache, S = self.mixer(norm(h).to(self.dtype), cache, S)
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
        self.embed = nn.Embedding(config.vocab_size, config.d_model)  # tokens (B, L) -> h (B, L, d)
        self.layers = nn.ModuleList(Block(config, kind) for kind in config.layout)  # Eq. (4), (5)
        self.out = Matrices(config.d_model, config.vocab_size)
        nn.init.zeros_(self.out.weight)  # Choice: start values

    def empty_memory(self, batch_size: int) -> Memory:
        """Nothing cached, S = 0."""
        c, parameter = self.config, self.out.weight
        size = c.d_model // c.n_head  # Differs: V = K
        S = tuple(None if kind == "a" else parameter.new_zeros(batch_size, c.n_head, size, size)
                  for kind in c.layout)
        return Memory((None,) * len(c.layout), S)

    def blocks(self, h: Tensor, memory: Memory, start: int, stop: int) -> tuple[Tensor, Memory]:
        """One pass over the blocks start to stop - 1: h (B, L, d), memory -> the same after it."""
        cache, S = list(memory.cache), list(memory.S)
        for i in range(start, stop):
            h, cache[i], S[i] = self.layers[i](h, cache[i], S[i])
        return h, Memory(tuple(cache), tuple(S))

    def unembed(self, h: Tensor) -> Tensor:
        """OutProj: h (B, L, d) -> logits (B, L, vocabulary)."""
        return self.out(norm(h))
