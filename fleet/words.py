"""The sentences of errors that only a fleet has; the others are the server's."""

from turret.server.words import adapters, http, requests, serving
from turret.words import sayer

TEXTS = {
    # The registry
    "REGISTRY_AWAY": "the fleet's registry cannot be reached; adapters that are loaded are served",
    "REGISTRY_FAILED": "the fleet's registry does not {action}: {cause}",
    "REGISTRY_RESTARTED": (
        "the fleet's registry was restarted meanwhile; check whether the change was made"
    ),
    "FLEET_ELSEWHERE": "this Ray cluster already has a fleet, with --state-dir {state_dir}",
    "ADAPTER_IN_BASE": "adapter {adapter!q} is merged into the base",
    "ADAPTER_LOADED_AGAIN": "adapter {adapter!q} was unloaded and loaded again meanwhile",
    "COMPONENT_MISSING": "the component with digest {digest} is not registered, or does not stay",
    # A replica
    "MERGE_FAILED": "a replica failed to make the merged weights; see its log",
    "MERGE_WITHDRAWN": "the merge was given up",
    "REPLICA_FAILED": "the replica cannot follow the fleet",
    "REPLICA_CUT_OFF": "the replica has lost the fleet's registry",
    "MESSAGE_TOO_LARGE": "the message has {bytes} bytes, the server takes {max_bytes}",
    # Ray and its ingress
    "INGRESS_FOLDER": "{folder}, for the files of the ingress: {cause}",
    "INGRESS_FOLDER_FOREIGN": "{folder}, for the files of the ingress, is another user's or a link",
    "HAPROXY_MISSING": "HAProxy is not installed; {fix}",
    "RAY_FAILED": "Ray: {cause}",
    "RAY_DEAF": (
        "--ray-address: no Ray cluster listens at {address} ({cause}); `ray start --head` starts"
        " one and prints its address"
    ),
    "RAY_NOT_JOINED": (
        "--ray-address: no Ray cluster can be joined at {address}; `ray start --head` starts one"
        " and prints its address"
    ),
    "SOCKET_FOLDER": (
        "TMPDIR: no folder for the fleet's sockets can be made ({cause}); choose a short path that"
        " this user may write to"
    ),
    "REPLICAS_FAILED": "the replicas do not start: {cause}",
    "FLEETS_MANY": "{count} fleets run here; choose one with --state-dir: {state_dirs}",
    "FLEET_STARTING": "the fleet on {state_dir} is still starting",
    "FLEET_MISSING": (
        "no fleet runs on {state_dir}; `turret cluster serve --state-dir {state_dir}` starts one"
    ),
    "FLEET_KILLED": (
        "the fleet on {state_dir} was killed; start it again with `turret cluster serve --state-dir"
        " {state_dir}`"
    ),
    "FLEET_NOT_JOINED": (
        "no fleet can be joined here ({cause}); --state-dir and --ray-address say where one is"
    ),
    # Settings of ``turret cluster serve``
    "FLEET_NO_PRELOAD": (
        "--{flag}: a fleet does not preload; load adapters once with `turret adapters load`"
    ),
    "FLEET_ONE_ADDRESS": "--{flag}: a fleet has one address; tokens say who may change it",
    "FLEET_NO_TLS": "--{flag}: Ray Serve listens in plain text; let TLS end in front of it",
    "FLEET_EXPOSED": (
        "--{flag}: {address} is reachable from other machines, and a fleet listens in plain text;"
        " set --insecure, and let TLS end in front of it"
    ),
    "FLEET_NEEDS_TOKENS": (
        "--token-file: replicas on a Ray cluster that the fleet joins are reachable from other"
        " machines; set it, or set --insecure"
    ),
    "FLEET_NEEDS_STATE": "a fleet needs --state-dir, which all replicas can read",
    "FLEET_NEEDS_PORT": "--address: a fleet listens on HOST:PORT",
    "FLEET_ONE_HOST": "--http-address: a fleet listens on one host, that of --address ({host})",
    "FLEET_TWO_PORTS": "--address and --http-address need a port each, and not the same",
    "FLAG_TOO_SMALL": "--{flag} must be at least {least}, not {found}",
    "REPLICAS_CROSSED": "--max-replicas must be at least --min-replicas ({most} < {fewest})",
    "REPLICAS_TWICE": "--replicas: give either it or --min-replicas and --max-replicas",
    "REPLICAS_HALF": "--min-replicas and --max-replicas need each other",
    "NOT_A_RAY_ADDRESS": (
        "--ray-address: {address!q} is neither HOST:PORT, as `ray start --head` prints it, nor auto"
    ),
}

say = sayer(requests.TEXTS, adapters.TEXTS, serving.TEXTS, http.TEXTS, TEXTS)
