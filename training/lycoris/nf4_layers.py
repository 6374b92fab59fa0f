"""LoHa and LoKr on an NF4 base (QLoRA, arXiv 2305.14314), which PEFT has no layers for.

PEFT takes a ``Linear4bit`` for a linear layer, reads the shape of its packed weight, and adds a
dense update of that shape. The layers here take the shape from the features and add the update as
a product of its factors (``hadamard_product``, ``kronecker_product``). All else (targets, patterns,
initial values, saving and loading) stays PEFT's, so the checkpoints are PEFT's too.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from bitsandbytes.nn.modules import Linear4bit
from peft.tuners.loha import layer as loha
from peft.tuners.loha.model import LoHaModel
from peft.tuners.lokr import layer as lokr
from peft.tuners.lokr.model import LoKrModel

from turret.training.lycoris.hadamard_product import hadamard_product
from turret.training.lycoris.kronecker_product import kronecker_product


class Nf4LohaLinear(loha.Linear):
    """A ``Linear4bit`` with LoHa adapters on it."""

    def create_adapter_parameters(self, adapter_name: str, r: int, shape: tuple[int, ...]) -> None:
        """As PEFT's, for the shape of the weight and not of its packed form.

        Raises:
            ValueError: A dense update would be cheaper than this rank; the server refuses it too.
        """
        wide, high = self.in_features, self.out_features
        assert wide is not None
        assert high is not None
        if r * r * (wide + high) >= wide * high:
            raise ValueError(
                f"LoHa rank {r} on a module of {wide} inputs and {high} outputs costs more than a "
                "dense update (rank² · (in + out) must be less than in · out); choose a lower one"
            )
        super().create_adapter_parameters(adapter_name, r, (high, wide))

    def get_delta_weight(
        self, adapter_name: str, *, apply_rank_dropout: bool = False
    ) -> torch.Tensor:
        """The update as a matrix, ``[out, in]``; nothing here needs it, PEFT's conversions do."""
        w1a, w1b, w2a, w2b = self._factors(adapter_name)
        delta = (w1a @ w1b) * (w2a @ w2b) * self.scaling[adapter_name]
        return _dropped(self, adapter_name, delta.T).T if apply_rank_dropout else delta

    def _factors(self, name: str) -> tuple[torch.Tensor, ...]:
        factors = (self.hada_w1_a, self.hada_w1_b, self.hada_w2_a, self.hada_w2_b)
        return tuple(factor[name] for factor in factors)

    def _get_delta_activations(
        self, adapter_name: str, input: torch.Tensor, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        w1a, w1b, w2a, w2b = self._factors(adapter_name)
        y = hadamard_product(input, w1a, w1b, w2a, w2b, self.scaling[adapter_name])
        return _dropped(self, adapter_name, y) if self.training else y

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> NoReturn:
        _refuse_merge()


class Nf4LokrLinear(lokr.Linear):
    """A ``Linear4bit`` with LoKr adapters on it."""

    def get_delta_weight(
        self, adapter_name: str, *, apply_rank_dropout: bool = False
    ) -> torch.Tensor:
        """The update as a matrix, ``[out, in]``; nothing here needs it, PEFT's conversions do."""
        w1, w2 = self._factors(adapter_name)
        whole = w2[0] @ w2[1] if len(w2) == 2 else w2[0]
        delta = torch.kron(w1, whole) * self.scaling[adapter_name]
        return _dropped(self, adapter_name, delta.T).T if apply_rank_dropout else delta

    def _factors(self, name: str) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        # The first factor is the small one: multiplied out it costs next to nothing.
        if name in self.lokr_w1:
            w1 = self.lokr_w1[name]
        else:
            w1 = self.lokr_w1_a[name] @ self.lokr_w1_b[name]
        if name in self.lokr_w2:
            return w1, (self.lokr_w2[name],)
        return w1, (self.lokr_w2_a[name], self.lokr_w2_b[name])

    def _get_delta_activations(
        self, adapter_name: str, input: torch.Tensor, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        w1, w2 = self._factors(adapter_name)
        y = kronecker_product(input, w1, w2, self.scaling[adapter_name])
        return _dropped(self, adapter_name, y) if self.training else y

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> NoReturn:
        _refuse_merge()


def register_nf4_layers() -> None:
    """Make PEFT use these layers wherever it puts LoHa or LoKr on a ``Linear4bit``. Idempotent."""
    # Before torch.nn.Linear, which a Linear4bit is as well: PEFT takes the first that fits.
    LoHaModel.layers_mapping = {Linear4bit: Nf4LohaLinear, **LoHaModel.layers_mapping}
    LoKrModel.layers_mapping = {Linear4bit: Nf4LokrLinear, **LoKrModel.layers_mapping}


def _dropped(layer: Nf4LohaLinear | Nf4LokrLinear, name: str, y: torch.Tensor) -> torch.Tensor:
    """PEFT's ``rank_dropout``: drops rows of the update, which are outputs, for all tokens alike.

    Args:
        layer: The layer.
        name: Of the adapter.
        y: ``[..., out]``.
    """
    share = layer.rank_dropout[name]
    if not share:
        return y
    kept = (torch.rand(y.shape[-1], device=y.device) > share).to(y.dtype)
    # LoHa always keeps the mean (and has no such switch); LoKr if told to.
    is_mean_kept = layer.rank_dropout_scale.get(name, True)
    return y * (kept / kept.mean() if is_mean_kept else kept)


def _refuse_merge() -> NoReturn:
    raise NotImplementedError(
        "an adapter is not merged into 4-bit weights; load it on the plain base and merge there"
    )
