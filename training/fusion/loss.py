"""The loss of a learned fusion: cross entropy, and a penalty on leaving the best component.

Cross entropy alone leaves most gates near the mean. Once an answer is right there is nothing more
to gain on the examples at hand, and on others a task's update at half its strength is worse than at
all of it. So each example also pulls every gate towards the component that answers it best by
itself::

    loss = CE + guidance · mean(−log α_best)

over the modules and over the positions up to the last one that is learned. Which component that is
comes from the components' own losses, not from a label.
"""

from __future__ import annotations

import torch

from turret.training.data.batch import IGNORED, Batch
from turret.training.fusion.model import FusionModel
from turret.training.loss import LossFunction


class FusionLoss(LossFunction):
    """Sum over a batch's targets; without gradients it is the cross entropy alone.

    Args:
        model: The fusion.
        head: The base's ``lm_head``.
        device: Of the model.
        guidance: Weight of the penalty, nats per learned token and nat of a gate.
    """

    def __init__(
        self, model: FusionModel, head: torch.nn.Module, device: str, guidance: float
    ) -> None:
        super().__init__(model, head, device)
        self._fusion = model
        self._guidance = guidance
        # Components do not change, so an example is asked about once: row → of each example.
        self._best: dict[bytes, torch.Tensor] = {}

    def __call__(self, batch: Batch) -> torch.Tensor:
        if not self._guidance or not torch.is_grad_enabled():
            return super().__call__(batch)
        best = self._best_components(batch).to(self._device)
        is_read = _is_read(batch).to(self._device)
        with self._fusion.watching_gates() as log_gates:
            loss = super().__call__(batch)
        # Mean over all modules: [rows, positions, components].
        penalty = -torch.stack(log_gates).mean(0).gather(-1, best[..., None]).squeeze(-1)
        share = (penalty * is_read).sum() / is_read.sum()
        return loss + self._guidance * batch.num_targets * share

    def _best_components(self, batch: Batch) -> torch.Tensor:
        """Of every position's example, ``[rows, positions]`` int64."""
        examples = _examples(batch)
        keys = [
            _key_of(tokens, targets)
            for tokens, targets in zip(batch.tokens, batch.targets, strict=True)
        ]
        if any(key not in self._best for key in keys):
            losses = torch.stack(
                [self._component_losses(batch, examples, k) for k in range(self._num_components)]
            )
            self._best.update(zip(keys, losses.argmin(0).unbind(), strict=True))
        found = [self._best[key] for key in keys]
        # Padding is numbered as one more example, which a row may not have had when it was asked.
        pairs = zip(found, examples, strict=True)
        return torch.stack([best[numbers.clamp(max=len(best) - 1)] for best, numbers in pairs])

    @property
    def _num_components(self) -> int:
        return len(self._fusion.components)

    @torch.no_grad()
    def _component_losses(self, batch: Batch, examples: torch.Tensor, number: int) -> torch.Tensor:
        """Cross entropy of every example by one component alone, ``[rows, examples]``."""
        with self._fusion.component_alone(number):
            losses = self.of_targets(batch).cpu()
        rows, positions = (batch.targets != IGNORED).nonzero().unbind(1)
        sums = torch.zeros(batch.targets.shape[0], int(examples.max()) + 1)
        return sums.index_put_((rows, examples[rows, positions]), losses, accumulate=True)


def _examples(batch: Batch) -> torch.Tensor:
    """The number of each position's example within its row, ``[rows, positions]`` int64."""
    if batch.positions is None:
        return torch.zeros_like(batch.targets)
    return (batch.positions == 0).cumsum(1) - 1


def _is_read(batch: Batch) -> torch.Tensor:
    """1.0 up to an example's last target, ``[rows, positions]``: what follows it has no part."""
    examples, places = _examples(batch), torch.arange(batch.targets.shape[1])
    targets = torch.where(batch.targets != IGNORED, places, -1)
    last = torch.full((len(targets), int(examples.max()) + 1), -1)
    last.scatter_reduce_(1, examples, targets, "amax")
    return (places <= last.gather(1, examples)).float()


def _key_of(tokens: torch.Tensor, targets: torch.Tensor) -> bytes:
    """What a row is known by, however far it is padded: up to the last token that is learned."""
    learned = (targets != IGNORED).nonzero()
    end = int(learned.max()) + 2 if len(learned) else None
    return torch.stack((tokens, targets))[:, :end].numpy().tobytes()
