"""Errors of the hub: repositories, revisions, files and downloads."""

_SIGN_IN = "set HF_TOKEN or run `hf auth login`"

TEXTS = {
    # Adapters that may be loaded from the hub.
    "HUB_NOT_ALLOWED": "needs a server with --adapter-hub, which lists the organisations whose"
    " adapters it may load",
    "HUB_ORGANISATION_NOT_ALLOWED": "belongs to {organisation}; --adapter-hub allows {choices}",
    "ADAPTER_BELOW_TOP": "contains no adapter_config.json at its top level, only in {folder};"
    " download that directory and load it from --adapter-root",
    "TOO_MANY_DOWNLOADS": "{most} downloads from the hub are already under way",
    # Adapters in buckets and registries.
    "REMOTE_UNSUPPORTED": "needs a server with --adapter-remote, which lists where it may load"
    " adapters from",
    "REMOTE_NOT_ALLOWED": "is not below a location that --adapter-remote allows ({choices})",
    "REMOTE_LACKS_FILE": "contains no {file}",
    "REMOTE_MISSING": "there is no adapter at {path}",
    "REMOTE_FORBIDDEN": "access to {path} was denied; check the server's credentials",
    "REMOTE_NEEDS_PACKAGE": "the server lacks the package {package}; install turret's extra s3"
    " or oci",
    "REMOTE_NOT_REACHED": "{path} cannot be read ({problem}); check the network and the server's"
    " credentials",
    "REMOTE_DAMAGED": "the download of {path} is incomplete or damaged: {problem}",
    "REMOTE_TOO_SLOW": "{path} did not arrive in time; try again",
    # Repositories.
    "HUB_OFFLINE": "{repository} is not in the cache {folder}, and HF_HUB_OFFLINE is set; unset"
    " it, or download the files with `hf download {name}`",
    "HUB_GATED": f"{{name}} is gated; accept its terms at {{hub}}/{{name}}, then {_SIGN_IN}",
    "HUB_DISABLED": "{name} has been disabled on {hub}",
    "HUB_NO_REVISION": "{name} has no revision {revision!q}; see {hub}/{name}",
    "HUB_NO_REPOSITORY": "{hub} has no model {name!q} that this machine can access; check the"
    f" name, or {_SIGN_IN} if it is private",
    "HUB_FORBIDDEN": f"{{hub}} denied access to {{name}} (status {{status}}); {_SIGN_IN}",
    "HUB_STATUS": "{hub} answered a request for {repository} with status {status}",
    "HUB_NOT_REACHED": "{hub} cannot be reached for {repository} ({problem}); check the network,"
    " HF_ENDPOINT and the proxy settings",
    "HUB_NO_COMMIT": "{hub} reports no commit for {repository}",
    # Downloads.
    "HUB_FILE_GONE": "{repository} lists a file that {hub} does not have",
    "HUB_FILE_INCOMPLETE": "the download of {file} from {repository} is incomplete: {problem}",
    "HUB_SENT_TOO_MUCH": "{path}: the hub sent more bytes than it announced",
    "HUB_TOO_SLOW": "{path}: only {found} of {needed} bytes arrived within {seconds:.0f} seconds;"
    " try again, or run `hf download {name}` on the server's machine",
}
