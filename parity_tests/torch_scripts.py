"""Ten small PyTorch scripts, as they are written without regjax.

Each trains a model for two epochs, and returns its initial parameters, its losses and its final
parameters. `parity_tests.torch_script_ports` reproduces them.
"""

# ruff: noqa: D101, D102, D103  the scripts are as their authors write them

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

SIZE, BATCH, EPOCHS, CLASSES, WORDS = 24, 8, 2, 3, 20
RNG = np.random.default_rng(0)
VECTORS = RNG.normal(size=(SIZE, 10)).astype(np.float32)
SEQUENCES = RNG.normal(size=(SIZE, 5, 8)).astype(np.float32)
IMAGES = RNG.normal(size=(SIZE, 3, 8, 8)).astype(np.float32)
TOKENS = RNG.integers(0, WORDS, (SIZE, 6))
LABELS = RNG.integers(0, CLASSES, SIZE)

Run = tuple[dict[str, torch.Tensor], list[float], dict[str, torch.Tensor]]


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    inputs: np.ndarray,
    forward: Callable[[torch.Tensor], torch.Tensor] | None = None,
    evaluate: Callable[[], Any] | None = None,
) -> Run:
    data = TensorDataset(torch.from_numpy(inputs), torch.from_numpy(LABELS))
    loader = DataLoader(data, BATCH, shuffle=True)
    initial = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    losses = []
    for _ in range(EPOCHS):
        for x, y in loader:
            optimizer.zero_grad()
            loss = F.cross_entropy((forward or model)(x).float(), y)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        if evaluate:
            evaluate()
    return initial, losses, model.state_dict()


def mlp(seed: int) -> Run:
    torch.manual_seed(seed)
    model = nn.Sequential(
        *(nn.Linear(10, 32), nn.Tanh(), nn.Dropout(0.5)),
        *(nn.Linear(32, 16), nn.Tanh(), nn.Dropout(0.2)),
        nn.Linear(16, CLASSES),
    )
    return train(model, torch.optim.AdamW(model.parameters(), lr=1e-2), VECTORS)


def cnn(seed: int) -> Run:
    torch.manual_seed(seed)
    model = nn.Sequential(
        *(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Dropout2d(0.3)),
        *(nn.Conv2d(8, 8, 3, stride=2), nn.ReLU(), nn.Dropout2d(0.3)),
        *(nn.Flatten(), nn.Linear(32, CLASSES)),
    )
    return train(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), IMAGES)


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.batch_first = nn.TransformerEncoderLayer(8, 2, 16, 0.1, batch_first=True)
        self.sequence_first = nn.TransformerEncoderLayer(8, 2, 16, 0.2, activation="gelu")
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.batch_first(x)
        x = self.sequence_first(x.transpose(0, 1).contiguous())
        return self.head(x.mean(0))


def transformer(seed: int) -> Run:
    torch.manual_seed(seed)
    model = Encoder()
    return train(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), SEQUENCES)


class Tagger(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, 8)
        self.lstm = nn.LSTM(8, 6, 3, dropout=0.3, bidirectional=True, batch_first=True)
        self.dropout = nn.Dropout(0.2)
        self.head = nn.Linear(12, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x, _ = self.lstm(self.dropout(self.embedding(x)))
        return self.head(self.dropout(x).mean(1))


def lstm(seed: int) -> Run:
    torch.manual_seed(seed)
    model = Tagger()
    return train(model, torch.optim.SGD(model.parameters(), lr=0.5), TOKENS)


def alpha_dropout(seed: int) -> Run:
    torch.manual_seed(seed)
    model = nn.Sequential(
        *(nn.Linear(10, 32), nn.SELU(), nn.AlphaDropout(0.1)),
        *(nn.Linear(32, 16), nn.SELU(), nn.AlphaDropout(0.3)),
        nn.Linear(16, CLASSES),
    )
    return train(model, torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=1e-3), VECTORS)


def checkpointing(seed: int) -> Run:
    torch.manual_seed(seed)
    blocks = [nn.Sequential(nn.Linear(10, 10), nn.GELU(), nn.Dropout(0.4)) for _ in range(3)]
    model = nn.Sequential(*blocks, nn.Linear(10, CLASSES))

    def forward(x: torch.Tensor) -> torch.Tensor:
        for block in blocks:
            x = checkpoint(block, x, use_reentrant=False)
        return model[-1](x)

    return train(model, torch.optim.AdamW(model.parameters(), lr=1e-2), VECTORS, forward)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.projections = nn.Linear(8, 24, bias=False)
        self.output = nn.Linear(8, 8)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        heads = self.projections(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        rate = 0.3 if self.training else 0.0
        y = F.scaled_dot_product_attention(*heads, dropout_p=rate, is_causal=True)
        y = F.dropout(self.output(y.transpose(1, 2).flatten(2)), 0.1, self.training)
        return self.head((x + y).mean(1))


def sdpa(seed: int) -> Run:
    torch.manual_seed(seed)
    model = Attention()
    return train(model, torch.optim.SGD(model.parameters(), lr=0.5), SEQUENCES)


def channels_last(seed: int) -> Run:
    torch.manual_seed(seed)
    model = nn.Sequential(
        *(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Dropout(0.3)),
        *(nn.Conv2d(8, 8, 3, stride=2), nn.ReLU(), nn.Dropout(0.1)),
        *(nn.Flatten(), nn.Linear(32, CLASSES)),
    )
    model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]  a missing overload

    def forward(x: torch.Tensor) -> torch.Tensor:
        return model(x.contiguous(memory_format=torch.channels_last))

    return train(model, torch.optim.SGD(model.parameters(), lr=0.1), IMAGES, forward)


def bfloat16(seed: int) -> Run:
    torch.manual_seed(seed)
    model = nn.Sequential(
        *(nn.Linear(10, 32), nn.Tanh(), nn.Dropout(0.3)),
        *(nn.Linear(32, 16), nn.Tanh(), nn.Dropout(0.1)),
        nn.Linear(16, CLASSES),
    ).bfloat16()

    def forward(x: torch.Tensor) -> torch.Tensor:
        return model(x.bfloat16())

    return train(model, torch.optim.SGD(model.parameters(), lr=0.25), VECTORS, forward)


def nested(seed: int) -> Run:
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Sequential(
            nn.Linear(10, 16),
            nn.Sequential(nn.LayerNorm(16), nn.SiLU(), nn.Dropout(0.25, inplace=True)),
        ),
        nn.Sequential(nn.Dropout(0.1), nn.Sequential(nn.Linear(16, 16, bias=False), nn.Tanh())),
        nn.Linear(16, CLASSES),
    )
    tests = DataLoader(TensorDataset(torch.from_numpy(VECTORS)), BATCH)

    def evaluate() -> None:
        model.eval()
        with torch.no_grad():
            for (x,) in tests:
                model(x)
        model.train()

    optimizer = torch.optim.RMSprop(model.parameters(), lr=1e-3)
    return train(model, optimizer, VECTORS, evaluate=evaluate)


SCRIPTS: dict[str, Callable[[int], Run]] = {
    script.__name__: script
    for script in (
        *(mlp, cnn, transformer, lstm, alpha_dropout),
        *(checkpointing, sdpa, channels_last, bfloat16, nested),
    )
}
