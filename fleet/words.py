"""The sentences of errors that only a fleet has; the others are the server's."""

from turret.server import words as server
from turret.words import sayer

TEXTS = {
    # The registry.
    "REGISTRY_AWAY": "the fleet's registry cannot be reached; loaded adapters are still served",
    "REGISTRY_FAILED": "the fleet's registry did not {action}: {cause}",
    "REGISTRY_RESTARTED": (
        "the fleet's registry was restarted during the call; check whether the change was made"
    ),
    "FLEET_ELSEWHERE": "this Ray cluster already has a fleet, with --state-dir {state_dir}",
    "ADAPTER_IN_BASE": "adapter {adapter!q} is merged into the base; unmerge it first",
    "ADAPTER_LOADED_AGAIN": "adapter {adapter!q} was unloaded and loaded again during this call",
    "COMPONENT_MISSING": (
        "the component with digest {digest} is not registered, or is being unloaded"
    ),
    # A replica.
    "MERGE_FAILED": "a replica failed to compute the merged weights; see its log",
    "MERGE_WITHDRAWN": "the merge was cancelled",
    "REPLICA_FAILED": "the replica cannot apply the fleet's changes",
    "REPLICA_CUT_OFF": "the replica has lost its connection to the fleet's registry",
    # Ray and its ingress.
    "INGRESS_FOLDER": "cannot use {folder} for the files of the ingress: {cause}",
    "INGRESS_FOLDER_FOREIGN": "{folder}, the directory for the files of the ingress, is a link or"
    " belongs to another user",
    "HAPROXY_MISSING": "HAProxy is not installed; {fix}",
    "RAY_FAILED": "Ray failed: {cause}",
    "RAY_NOT_JOINED": (
        "--ray-address: no Ray cluster can be joined at {address} ({cause}); `ray start --head`"
        " starts one and prints its address"
    ),
    "SOCKET_FOLDER": (
        "TMPDIR: cannot create a directory for the fleet's sockets ({cause}); choose a short path"
        " that this user can write to"
    ),
    "REPLICAS_FAILED": "the replicas failed to start: {cause}",
    "REPLICAS_NOT_STARTED": "no replica has started within {seconds} s; see Ray's log",
    "FLEETS_MANY": "{count} fleets are running here; choose one with --state-dir: {state_dirs}",
    "FLEET_STARTING": "the fleet on {state_dir} is still starting",
    "FLEET_MISSING": (
        "no fleet is running on {state_dir}; start one with `turret cluster serve --state-dir"
        " {state_dir}`"
    ),
    "FLEET_KILLED": (
        "the fleet on {state_dir} was killed; start it again with `turret cluster serve --state-dir"
        " {state_dir}`"
    ),
    "FLEET_NOT_JOINED": (
        "no Ray cluster is running on this machine or at RAY_ADDRESS; choose a fleet with"
        " --state-dir or --ray-address"
    ),
    # Settings of ``turret cluster serve``.
    "FLEET_NO_PRELOAD": "is not supported in a fleet; load adapters with `turret adapters load`",
    "FLEET_ONE_ADDRESS": "is not supported in a fleet, which has no separate admin address; the"
    " token file decides who may change adapters",
    "FLEET_NO_TRAINING": "is not supported in a fleet; train on a single server",
    "FLEET_NO_TLS": "is not supported in a fleet, which listens without TLS; terminate TLS in a"
    " proxy",
    "FLEET_EXPOSED": "{address} can be reached from other machines, and a fleet listens without"
    " TLS; terminate TLS in a proxy, and set --insecure",
    "FLEET_NEEDS_TOKENS": "is required when the fleet joins an existing Ray cluster, because other"
    " machines can reach the replicas; set it, or set --insecure",
    "FLEET_NEEDS_STATE": "is required in a fleet; every replica must be able to read it",
    "FLEET_NEEDS_PORT": "must be HOST:PORT in a fleet",
    "FLEET_ONE_HOST": "must use the host of --address ({host}) in a fleet",
    "FLEET_TWO_PORTS": "must use a different port from --address, and neither port may be 0",
    "NOT_A_RAY_ADDRESS": "must be HOST:PORT, as `ray start --head` prints it, or auto, not"
    " {value!q}",
}

say = sayer(server.TEXTS, TEXTS)
