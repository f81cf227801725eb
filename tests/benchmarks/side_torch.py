"""PyTorch's side: the plain model that a PyTorch user writes (SDPA, fused AdamW), and PEFT's LoRA."""

from __future__ import annotations

from collections.abc import Callable

import torch
from cases import ALPHA, BOTTLENECK, CLASSES, PREFIX, RANK, Case, batch
from torch import Tensor, nn
from torch.nn import functional as F


class Attention(nn.Module):
    def __init__(self, c: Case, fused: bool):
        super().__init__()
        self.H = c.H
        self.fused = fused
        self.causal = c.model == "gpt"
        self.prefix = None
        if fused:  # one product for q, k, v, as in a plain model to which nothing is attached
            self.qkv = nn.Linear(c.C, 3 * c.C)
        else:
            self.q = nn.Linear(c.C, c.C)
            self.k = nn.Linear(c.C, c.C)
            self.v = nn.Linear(c.C, c.C)
        self.o = nn.Linear(c.C, c.C)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        B, T, C = x.shape
        q, k, v = self.qkv(x).split(C, 2) if self.fused else (self.q(x), self.k(x), self.v(x))
        q, k, v = (t.view(B, T, self.H, C // self.H).transpose(1, 2) for t in (q, k, v))
        if self.prefix is not None:
            K, V = (P.expand(B, -1, -1, -1) for P in self.prefix)
            k = torch.cat([K, k], 2)
            v = torch.cat([V, v], 2)
            p = K.shape[2]
            if self.causal:
                mask = torch.ones(T, T + p, dtype=torch.bool).tril(p)
            else:
                mask = F.pad(mask, (p, 0), value=True)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=self.causal and mask is None)
        return self.o(y.transpose(1, 2).reshape(B, T, C))


class Houlsby(nn.Module):
    def __init__(self, inner: nn.Module, c: int):
        super().__init__()
        self.inner = inner
        self.down = nn.Linear(c, BOTTLENECK)
        self.up = nn.Linear(BOTTLENECK, c)

    def forward(self, *args: Tensor) -> Tensor:
        y = self.inner(*args)
        return y + self.up(F.gelu(self.down(y)))


class Block(nn.Module):
    def __init__(self, c: Case, fused: bool):
        super().__init__()
        self.pre = c.model == "gpt"
        eps = 1e-5 if self.pre else 1e-12
        self.norm1 = nn.LayerNorm(c.C, eps)
        self.attn = Attention(c, fused)
        self.norm2 = nn.LayerNorm(c.C, eps)
        gelu = nn.GELU("tanh" if self.pre else "none")
        self.mlp = nn.Sequential(nn.Linear(c.C, 4 * c.C), gelu, nn.Linear(4 * c.C, c.C))

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        if self.pre:
            x = x + self.attn(self.norm1(x), mask)
            return x + self.mlp(self.norm2(x))
        x = self.norm1(x + self.attn(x, mask))
        return self.norm2(x + self.mlp(x))


class Model(nn.Module):
    def __init__(self, c: Case):
        super().__init__()
        self.case = c
        gpt = c.model == "gpt"
        self.embed = nn.Embedding(c.V, c.C)
        self.pos = nn.Embedding(c.T + PREFIX, c.C)
        self.blocks = nn.ModuleList(Block(c, fused=c.method == "full") for _ in range(c.L))
        self.norm = nn.LayerNorm(c.C, 1e-5 if gpt else 1e-12)
        if not gpt:
            self.token_types = nn.Embedding(2, c.C)
            self.dense = nn.Linear(c.C, c.C)
            self.norm_head = nn.LayerNorm(c.C, 1e-12)
            self.bias = nn.Parameter(torch.zeros(c.V))
        if c.method == "head":
            self.pooler = None if gpt else nn.Linear(c.C, c.C)
            self.head = nn.Linear(c.C, CLASSES, bias=not gpt)
        for p in self.parameters():
            if p.ndim == 2:
                nn.init.normal_(p, std=0.02)

    def forward(self, ids: Tensor, mask: Tensor | None, logit_positions: Tensor | None) -> Tensor:
        c = self.case
        x = self.embed(ids) + self.pos.weight[:ids.shape[1]]
        if c.model == "bert":
            x = self.norm(x + self.token_types.weight[0])
        for block in self.blocks:
            x = block(x, None if mask is None else mask[:, None, None, :])
        if c.model == "gpt":
            x = self.norm(x)
        if c.method == "head":
            return self.head(x[:, -1]) if self.pooler is None else self.head(torch.tanh(self.pooler(x[:, 0])))
        if c.model == "gpt":
            return x @ self.embed.weight.T
        rows = x.flatten(0, 1)[logit_positions]  # logits only at labelled positions, as in tinyft
        return F.linear(self.norm_head(F.gelu(self.dense(rows))), self.embed.weight, self.bias)


def build(c: Case) -> nn.Module:
    torch.manual_seed(0)
    model = Model(c)
    if c.method == "full":
        return model
    model.requires_grad_(requires_grad=False)
    if c.method.startswith("lora"):
        from peft import LoraConfig, inject_adapter_in_model
        targets = ["q", "v"] if c.method == "lora_qv" else ["q", "k", "v", "o", "mlp.0", "mlp.2"]
        model = inject_adapter_in_model(LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=targets), model)
    elif c.method == "bitfit":
        for name, p in model.named_parameters():
            p.requires_grad_(name.split(".")[-1] == "bias")
    elif c.method == "houlsby":
        for b in model.blocks:
            b.attn, b.mlp = Houlsby(b.attn, c.C), Houlsby(b.mlp, c.C)
        for name, p in model.named_parameters():
            p.requires_grad_(p.requires_grad or "norm" in name)
    elif c.method == "prefix":
        for b in model.blocks:
            prefixes = [torch.randn(c.H, PREFIX, c.C // c.H) * 0.02 for _ in range(2)]
            b.attn.prefix = nn.ParameterList(map(nn.Parameter, prefixes))
    else:
        for part in (model.pooler, model.head):
            if part is not None:
                part.requires_grad_(requires_grad=True)
    return model


def compute_loss(
    model: nn.Module, ids: Tensor, mask: Tensor | None, logit_positions: Tensor | None, labels: Tensor
) -> Tensor:
    """The mean cross-entropy. labels: one for each row of the logits."""
    logits = model(ids, mask, logit_positions)
    return F.cross_entropy(logits.flatten(0, -2), labels)


def start(
    model: nn.Module, c: Case, compute_loss: Callable[..., Tensor] = compute_loss
) -> tuple[Callable[[], float], int]:
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, fused=True)
    b = {name: torch.from_numpy(array) for name, array in batch(c).items()}
    labels = b["labels"].flatten()
    logit_positions = None
    if c.model == "bert" and c.method != "head":
        logit_positions = (labels != -100).nonzero()[:, 0]
        labels = labels[logit_positions]

    def step() -> float:
        optimizer.zero_grad()
        loss = compute_loss(model, b["ids"], b.get("mask"), logit_positions, labels)
        loss.backward()
        optimizer.step()
        return loss.item()

    return step, sum(p.numel() for p in trained)


def threads(n: int) -> None:
    torch.set_num_threads(n)
