"""Trains the adapter of a run on a server with ``--training``."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from turret.clients.client import TurretClient
from turret.clients.errors import NotFoundError, TurretRpcError
from turret.clients.requests import AdapterWeight, TrainingDatum
from turret.server.adapters.adapter import CONFIG_FILE, TENSORS_FILE
from turret.server.basics.files import replace_file
from turret.server.training import AdamParams, LearnerConfig
from turret.training.adapter_folder import write_adapter
from turret.training.base_model import DTYPES, empty_model, peak_memory_bytes
from turret.training.batches import BatchRow
from turret.training.engine import attach_to, trainable
from turret.training.examples import Encoded
from turret.training.run import SERVER_SUFFIX, checkpoint_path
from turret.training.run.samples import Progress, draw_samples
from turret.training.settings.resolve import Resolved

# The default of torch's AdamW, which runs in this process use, too.
_EPSILON = 1e-8


class SharedEngine(ABC):
    """Trains an adapter on a base that serves requests and other adapters in training.

    Attributes and methods are those of ``PeftEngine``.

    Args:
        resolved: The run, which ``check_served`` has accepted.
    """

    facts: Mapping[str, Any] = {}

    def __init__(self, resolved: Resolved) -> None:
        self._resolved = resolved
        self._config = resolved.config
        shapes = attach_to(empty_model(resolved.base, "nf4-dense", torch.float32, "cpu"), resolved)
        self.num_parameters = sum(p.numel() for p in trainable(shapes).values())

    @property
    def _learner(self) -> LearnerConfig:
        method = self._config.method
        return LearnerConfig(
            method=method.name,
            # A rank is required; IA3 ignores it.
            rank=method.rank or method.num_virtual_tokens or 1,
            seed=self._config.run.seed,
            alpha=method.alpha,
            targets=method.targets or (),
        )

    @abstractmethod
    def _pass(self, data: Sequence[TrainingDatum], *, has_grad: bool) -> float:
        """The sum of the losses of sequences; adds their gradients to those of the step."""

    @abstractmethod
    def _optimize(self, adam: AdamParams) -> float:
        """Apply a step; returns the norm of the gradients before clipping."""

    @abstractmethod
    def _publish(self) -> Any:
        """Make the current weights an adapter for ``_answer``."""

    @abstractmethod
    def _answer(self, prompt: Sequence[int], adapter: Any, most: int) -> list[int]:
        """The tokens of a greedy answer, with the end-of-text token if the model generated it."""

    @abstractmethod
    def _export(self, folder: Path) -> None:
        """Write the adapter in PEFT's layout to a new directory."""

    def backward(self, parts: Sequence[Sequence[BatchRow]]) -> float:
        examples = [example for rows in parts for row in rows for example in row]
        weight = 1.0 / sum(sum(example.learned[1:]) for example in examples)
        return self._pass([_datum(example, weight) for example in examples], has_grad=True)

    def step(self, learning_rate: float) -> float:
        optimizer = self._config.optimizer
        return self._optimize(
            AdamParams(
                learning_rate=learning_rate,
                beta1=optimizer.beta1,
                beta2=optimizer.beta2,
                eps=_EPSILON,
                weight_decay=optimizer.weight_decay,
                grad_clip_norm=optimizer.max_grad_norm,
            )
        )

    def loss(self, rows: Sequence[BatchRow]) -> float:
        data = [_datum(example, 1.0) for row in rows for example in row]
        return self._pass(data, has_grad=False)

    def write(self, folder: Path) -> None:
        with tempfile.TemporaryDirectory() as scratch:
            made = Path(scratch) / "adapter"
            self._export(made)
            config = json.loads((made / CONFIG_FILE).read_text(encoding="utf-8"))
            dtype = DTYPES[self._config.run.adapter_dtype]
            write_adapter(folder, config, load_file(made / TENSORS_FILE), dtype)

    def scores(self, rows: Sequence[BatchRow]) -> dict[str, Any]:
        return {}

    def samples(self, rows: Sequence[BatchRow], on_progress: Progress) -> list[dict[str, Any]]:
        adapter = self._publish()
        longest = self._resolved.base.arch.max_model_len

        def answer(prompt: Sequence[int], _: Encoded, most: int, is_adapted: bool) -> list[int]:
            most = min(most, longest - len(prompt))
            return self._answer(prompt, adapter if is_adapted else None, most)

        examples = [example for row in rows for example in row]
        return draw_samples(answer, self._resolved.base.tokenizer, examples, on_progress)

    def peak_memory(self) -> int:
        """The peak of this process."""
        return peak_memory_bytes("cpu")


class ServerEngine(SharedEngine):
    """Trains an adapter on a server.

    Args:
        resolved: See ``SharedEngine``.
        address: The address of the server, for ``run.json``.
        connect: Makes a client of the server.

    Raises:
        TurretRpcError: The server does not train the adapter.
    """

    def __init__(
        self, resolved: Resolved, address: str, connect: Callable[[], TurretClient]
    ) -> None:
        super().__init__(resolved)
        self._connect = connect
        self._client = connect()
        self._training = self._client.training
        new = self._learner
        self._model_id = self._training.create_model(
            method=new.method, rank=new.rank, seed=new.seed, alpha=new.alpha, targets=new.targets
        ).model_id
        self.facts = {"server": address}

    def _pass(self, data: Sequence[TrainingDatum], *, has_grad: bool) -> float:
        passed = self._training.forward_backward(self._model_id, data, forward_only=not has_grad)
        return passed.loss

    def _optimize(self, adam: AdamParams) -> float:
        return self._training.optim_step(self._model_id, **dataclasses.asdict(adam)).grad_norm

    def _publish(self) -> AdapterWeight:
        return self._training.publish_model(self._model_id)

    def _answer(self, prompt: Sequence[int], adapter: Any, most: int) -> list[int]:
        found = self._client.generate(
            list(prompt),
            adapters=[] if adapter is None else [adapter],
            max_tokens=most,
            temperature=0,
            token_ids=True,
        )
        is_ended = found.finish_reason == "STOP"
        end = self._resolved.base.tokenizer.eos_token_id
        return [*found.token_ids, *([end] if is_ended else [])]

    def save(self, checkpoints: Path, step: int) -> None:
        """Save a checkpoint on the server, and its path in the directory."""
        saved = self._training.save_checkpoint(self._model_id, f"step-{step:08d}", overwrite=True)
        checkpoints.mkdir(exist_ok=True)
        content = json.dumps({"path": saved.path, "step": step}).encode()
        replace_file(checkpoint_path(checkpoints, step, SERVER_SUFFIX), content)

    def restore(self, checkpoint: Path) -> int:
        found = json.loads(checkpoint.read_text(encoding="utf-8"))
        self._training.load_checkpoint(self._model_id, found["path"])
        return found["step"]

    def discard(self, checkpoint: Path) -> None:
        self._delete(json.loads(checkpoint.read_text(encoding="utf-8"))["path"])
        checkpoint.unlink()

    def _delete(self, path: str) -> None:
        with contextlib.suppress(NotFoundError):
            self._training.delete_checkpoint(path)

    def _export(self, folder: Path) -> None:
        saved = self._training.save_checkpoint(self._model_id, "result", overwrite=True)
        try:
            self._training.export_checkpoint(saved.path, folder)
        finally:
            self._delete(saved.path)

    def end(self, checkpoints: Sequence[Path]) -> None:
        for checkpoint in checkpoints:
            if checkpoint.suffix == SERVER_SUFFIX:
                self.discard(checkpoint)

    def cancel(self) -> None:
        """Make the call that runs in another thread, and all later ones, fail."""
        self._client.close()

    def close(self) -> None:
        """Drop the adapter on the server, which may have gone."""
        self._client.close()
        with contextlib.suppress(TurretRpcError), self._connect() as another:
            another.training.delete_model(self._model_id)


def _datum(example: Encoded, weight: float) -> TrainingDatum:
    """A sequence whose learned tokens have this weight in the loss, and others none."""
    return TrainingDatum(
        example.tokens[:-1],
        example.tokens[1:],
        [weight if is_learned else 0.0 for is_learned in example.learned[1:]],
    )
