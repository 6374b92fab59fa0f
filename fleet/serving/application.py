"""The application for a Ray Serve config file, which KubeRay's ``RayService`` applies.

    import_path: turret.fleet.serving.application:application
    args: {min_replicas: 2, max_replicas: 8}

Everything else is in ``TURRET_…`` variables of the containers. HAProxy mode is in variables too:
``python -m turret.fleet.serving.ingress`` prints them.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from typing import Any

from ray.serve import Application

from turret.fleet.serving.plan import ClusterPlan, fleet_config
from turret.fleet.serving.registry_actor import start_registry
from turret.fleet.serving.serve import deployment
from turret.server.command.flags import read_settings


def application(args: Mapping[str, Any]) -> Application:
    """Starts the registry, or finds it, and describes the deployment.

    Args:
        args: ``min_replicas``, ``max_replicas``, ``lease_seconds``, ``stops_alone``; see
            ``ClusterPlan``.

    Raises:
        ValueError: A value or variable that makes no sense; names it.
        UnavailableError: The registry does not start.
    """
    plan = ClusterPlan(ray_address="auto", **args)
    settings = read_settings(argparse.Namespace(), os.environ)
    config = fleet_config(settings.config(), joins=True)
    assert config.adapters.state_dir is not None
    start_registry(config.adapters.state_dir, plan.lease_seconds)
    return deployment(config, plan)
