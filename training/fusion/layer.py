"""A linear module with a trained gate over frozen low-rank updates.

AdapterFusion (arXiv 2005.00247, section 3.2) in rank space, as the server computes it
(``kernels/adapters/fusion_gate.py``), with gradients for the query and the key alone::

    v_k = A_k x          α = softmax_k((Wq x) · (Wk B_k) v_k)          y = W x + b + Σ_k α_k B_k v_k
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

# (A, B) of a component: ``[rank, in]`` and ``[out, rank]`` with the scale folded in; None where the
# component does not adapt the module.
Update = tuple[torch.Tensor, torch.Tensor] | None


class FusionLayer(nn.Module):
    """Called like the module it wraps; the wrapped module must be frozen.

    The key starts at zero and the query at random, so that training starts from the mean of the
    components (as LoRA starts from the base, and for the same reason not from two zeros).

    Args:
        base: A linear module, also a quantised one.
        updates: Of the components, in their order; at least one is not None.
        in_features: Of the module.
        out_features: Of the module.
        d_k: Width of queries and keys.

    Attributes:
        query: ``Wq``, ``[d_k, in]`` fp32.
        key: ``Wk``, ``[d_k, out]`` fp32.
        is_enabled: Whether there is anything but the base's result.
        alone: Number of the component whose update is added as it is, without a gate; or None.
        log_gates: Where every call appends ``log α``, ``[…, components]``; or None.
    """

    a: torch.Tensor
    b: torch.Tensor
    members: torch.Tensor

    def __init__(
        self,
        base: nn.Module,
        updates: Sequence[Update],
        in_features: int,
        out_features: int,
        d_k: int,
    ) -> None:
        super().__init__()
        self.base = base
        self.is_enabled = True
        self.alone: int | None = None
        self.log_gates: list[torch.Tensor] | None = None
        held = [update for update in updates if update is not None]
        self.register_buffer("a", torch.cat([a for a, _ in held]).float(), persistent=False)
        self.register_buffer("b", torch.cat([b.T for _, b in held]).float(), persistent=False)
        # [components, ranks]: 1 where a rank is the component's.
        ranks = [0 if update is None else update[0].shape[0] for update in updates]
        owners = [k for k, rank in enumerate(ranks) for _ in range(rank)]
        members = torch.tensor([[float(k == owner) for owner in owners] for k in range(len(ranks))])
        self.register_buffer("members", members, persistent=False)
        self.query = nn.Parameter(torch.randn(d_k, in_features) / in_features**0.5)
        self.key = nn.Parameter(torch.zeros(d_k, out_features))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[…, in]`` → ``[…, out]`` in the dtype of the base's result."""
        y = self.base(x)
        if not self.is_enabled:
            return y
        wide = x.to(self.a.dtype)
        v = wide @ self.a.T
        if self.alone is not None:
            return y + (self.members[self.alone] * v @ self.b).to(y.dtype)
        # The same operations with and without a listener: a checkpointed layer runs again without.
        log_gates = self.scores(wide, v).log_softmax(-1)
        if self.log_gates is not None:
            self.log_gates.append(log_gates)
        return y + ((log_gates.exp() @ self.members) * v @ self.b).to(y.dtype)

    def scores(self, x: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """``(Wq x) · (Wk B_k) v_k``, ``[…, components]``, of inputs and their rank activations."""
        keys = self.b @ self.key.T
        return (x @ self.query.T @ keys.T * v) @ self.members.T
