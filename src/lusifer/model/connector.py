"""The connector, which turns encoder states into soft tokens of the LLM, and the head behind the LLM."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from lusifer.model.configuration import LusiferConfig


class FeedForwardConnector(nn.Module):
    """Two linear layers per token, and trainable tokens appended to each text (arXiv 2501.00874, section 3.1).

    An optional linear residual beside the two layers takes the ridge solution of stage 0, so that the layers start as a
    zero correction to it.

    Args:
        encoder_dim: Width of the encoder states.
        hidden_dim: Width between the two layers.
        llm_dim: Width of the LLM's input embeddings.
        num_added_tokens: How many trainable tokens follow a text.
        residual: Whether to add the linear residual; its tensors are called ``shortcut`` in checkpoints.
    """

    def __init__(
        self, encoder_dim: int, hidden_dim: int, llm_dim: int, num_added_tokens: int = 1, residual: bool = True
    ) -> None:
        super().__init__()
        self.up = nn.Linear(encoder_dim, hidden_dim)
        self.down = nn.Linear(hidden_dim, llm_dim)
        self.shortcut = nn.Linear(encoder_dim, llm_dim) if residual else None
        self.added_tokens = nn.Parameter(torch.zeros(num_added_tokens, llm_dim))

    @torch.no_grad()
    def scale_to(self, mean: Tensor, std: float, encoder_std: float = 1.0) -> None:
        """Random start whose soft tokens match the LLM's input embeddings in mean and spread.

        An LLM's embeddings are far smaller than the outputs of a default initialisation
        (SmolLM2: standard deviation 0.1), and soft tokens ten times too large drown its attention.

        Args:
            mean: (llm_dim,) mean of the LLM's input embeddings.
            std: Their standard deviation per component.
            encoder_std: Standard deviation of the encoder states per component.
        """
        nn.init.normal_(self.up.weight, std=self.up.in_features**-0.5 / encoder_std)
        nn.init.zeros_(self.up.bias)
        # A ReLU of a unit normal has second moment 1/2.
        nn.init.normal_(self.down.weight, std=std * (self.down.in_features / 2) ** -0.5)
        self.down.bias.copy_(mean)
        if self.shortcut is not None:
            nn.init.zeros_(self.shortcut.weight)
            nn.init.zeros_(self.shortcut.bias)
        self.added_tokens.copy_(mean + std * torch.randn_like(self.added_tokens))

    @torch.no_grad()
    def start_linear(self, weight: Tensor, bias: Tensor) -> None:
        """Makes the connector exactly ``states @ weight.T + bias``, every layer still trainable.

        Args:
            weight: (llm_dim, encoder_dim) float32.
            bias: (llm_dim,) float32.

        Raises:
            ValueError: If the connector has no residual.
        """
        if self.shortcut is None:
            raise ValueError("a linear start needs a connector with residual=True")
        self.shortcut.weight.copy_(weight)
        self.shortcut.bias.copy_(bias)
        nn.init.zeros_(self.down.weight)
        nn.init.zeros_(self.down.bias)

    def forward(self, states: Tensor) -> Tensor:
        """Maps states (batch, seq, encoder_dim) to soft tokens (batch, seq, llm_dim), without the added ones."""
        soft = self.down(torch.relu(self.up(states)))
        if self.shortcut is not None:
            soft = soft + self.shortcut(states)
        return soft


class ResidualHead(nn.Module):
    """What the LLM adds to an adapted encoder's embedding: a linear map of its standardised vector, zero at the start.

    Adam's first steps move all weights of an output by the learning rate, most of them the same way: without the scale
    they would add up to more than the embedding itself.

    Args:
        llm_dim: Width of the LLM's vector.
        dimension: Width of the embedding.
    """

    def __init__(self, llm_dim: int, dimension: int) -> None:
        super().__init__()
        self.linear = nn.Linear(llm_dim, dimension)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, vectors: Tensor) -> Tensor:
        """Maps the LLM's vectors (batch, llm_dim) to differences of embeddings (batch, dimension)."""
        width = vectors.shape[-1]
        return self.linear(nn.functional.layer_norm(vectors, (width,)) / math.sqrt(width))


def build_head(config: LusiferConfig) -> nn.Module | None:
    """The module between the LLM's pooled vector and the embedding; None where that vector is the embedding."""
    llm_dim = config.llm_config.hidden_size
    if config.adapted:
        return ResidualHead(llm_dim, config.hidden_size)
    if config.head_dim is None:
        return None
    return nn.Sequential(nn.Linear(llm_dim, llm_dim), nn.ReLU(), nn.Linear(llm_dim, config.head_dim))


def connector_shapes(config: LusiferConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of a connector's main tensors, as a checkpoint names them."""
    encoder_dim, llm_dim = config.token_config.hidden_size, config.llm_config.hidden_size
    inner = config.connector_dim or llm_dim
    return {
        "connector.up.weight": (inner, encoder_dim),
        "connector.down.weight": (llm_dim, inner),
        "connector.added_tokens": (config.num_added_tokens, llm_dim),
    }
