"""The services, and what every protocol needs to serve them."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from turret.server.api.access import MOST_CONNECTIONS, Shares, TokenTable
from turret.server.api.admin import Adapters
from turret.server.api.call import MAX_FAILURES, Failures
from turret.server.api.gate import ServingGate
from turret.server.api.inference import Inference
from turret.server.metrics import Metrics

if TYPE_CHECKING:
    from turret.server.api.tenants import Tenants


@dataclass(slots=True, kw_only=True)
class Services:
    """The services behind one gate, with the accepted tokens and the metrics that count calls.

    Attributes:
        gate: The gate.
        metrics: The metrics that count calls.
        tokens: Accepted bearer tokens; None lets every caller in.
        shares: The limits on the open requests of one party, over all protocols.
        failures: The last failed calls, the newest last.
        most_connections: The maximum number of open connections of a listening address.
        training: The directory of checkpoints of adapters in training; None if clients cannot
            train.
        tenants: The clients' training sessions and checkpoints; None if clients cannot train.
        inference: The Inference service.
        adapters: The Adapters service.
    """

    gate: ServingGate
    metrics: Metrics = field(default_factory=Metrics)
    tokens: TokenTable | None = None
    shares: Shares = field(default_factory=Shares)
    failures: Failures = field(default_factory=lambda: Failures(maxlen=MAX_FAILURES))
    most_connections: int = MOST_CONNECTIONS
    training: Path | None = None
    tenants: Tenants | None = field(init=False, default=None)
    inference: Inference = field(init=False)
    adapters: Adapters = field(init=False)

    def __post_init__(self) -> None:
        if self.training is not None:
            # Imported here because the import takes time, and few servers train.
            from turret.server.api.tenants import Tenants

            self.tenants = Tenants(self.gate, self.training, self.tokens)
        self.inference = Inference(self.gate)
        self.adapters = Adapters(self.gate)
