"""A GPT-2 in plain PyTorch, as people write it for a training loop of their own.

`training.py` trains it as a peer: in the manner of nanoGPT, float32 parameters under autocast,
torch's own attention, embeddings tied to the head, the loss over all logits at once. It shares
nothing with Penstock.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTH, HEADS, LAYERS, POSITIONS = 768, 12, 12, 1024
VOCABULARY = 50304
"""GPT-2's 50,257 tokens, filled up to a multiple of 128."""


class Layer(nn.Module):
    """Attention and MLP, norms before them."""

    def __init__(self) -> None:
        super().__init__()
        self.attention_norm, self.mlp_norm = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.query_key_value = nn.Linear(WIDTH, 3 * WIDTH)
        self.attention_output = nn.Linear(WIDTH, WIDTH)
        self.inner = nn.Linear(WIDTH, 4 * WIDTH)
        self.mlp_output = nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """X (B, T, D) → (B, T, D)."""
        projected = self.query_key_value(self.attention_norm(x))
        query, key, value = (
            part.unflatten(2, (HEADS, -1)).transpose(1, 2) for part in projected.split(WIDTH, 2)
        )
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.attention_output(mixed.transpose(1, 2).flatten(2))
        return x + self.mlp_output(F.gelu(self.inner(self.mlp_norm(x)), approximate="tanh"))


class PlainGPT(nn.Module):
    """GPT-2 124M without dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions = (
            nn.Embedding(VOCABULARY, WIDTH),
            nn.Embedding(POSITIONS, WIDTH),
        )
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.head.weight = self.tokens.weight
        for parameter in self.parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """The mean cross entropy of targets (B, T) after tokens (B, T), ()."""
        x = self.tokens(tokens) + self.positions(torch.arange(tokens.shape[1]))
        for layer in self.layers:
            x = layer(x)
        logits = self.head(self.norm(x))
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def optimizer_for(model: nn.Module) -> torch.optim.Optimizer:
    """Fused AdamW that decays matrices only, as nanoGPT's."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": 0.1},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=6e-4, betas=(0.9, 0.95), fused=True)
