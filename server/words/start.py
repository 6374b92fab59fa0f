"""Errors that keep a command from starting: arguments, settings, files and addresses."""

TEXTS = {
    # Arguments of the command.
    "UNKNOWN_COMMAND": "unknown command {value!q}",
    "UNKNOWN_FLAG": "unknown flag {flag!q}",
    "NEEDS_VALUE": "requires a value",
    "TAKES_NO_VALUE": "takes no value",
    "NOT_A_CAPABILITY": "must have the form MAJOR.MINOR, such as 9.0, not {value!q}",
    "UNEXPECTED_ARGUMENTS": "{count!n:unexpected argument}: {values}",
    "UNQUOTED_TEXT": "{count!n:unexpected argument}: {values}; put text that contains spaces in"
    " quotes",
    # Settings, files and addresses.
    "INVALID": "{why}",
    "UNKNOWN_VARIABLE": "unknown setting",
    "NOT_A_TABLE": "must be a table, not {value}",
    "NOT_A_SIZE": "must be a size such as 512MiB, 2GB or 1048576, not {value!q}",
    "NOT_A_DURATION": "must be a duration such as 2.5, 30s or 5min, not {value}",
    "NOT_AN_ADDRESS": "must be HOST:PORT with a port from 0 to 65535 (and brackets around an"
    " IPv6 host), not {value!q}",
    "NOT_NAME_PATH": "must be NAME=PATH, not {value!q}",
    "NOT_OF_FORM": "must be * or {form}, not {value!q}",
    "NOT_A_REMOTE": "must begin with s3:// and a bucket, or oci:// and a host, not {value!q}",
    "NOT_AN_ORGANISATION": "must be * or the name of an organisation or user, not {value!q}",
    "NOT_A_HUB_PATH": "must be a path or hub:org/name[@revision], not {value!q}",
    "BELOW_OTHER": "must be at least {other} ({least}), not {value}",
    "NOT_BELOW": "must be less than {bound}, not {value}",
    "ADDRESS_EXPOSED": "{value} can be reached from other machines; set --tls-cert, --tls-key and"
    " --token-file, or --insecure",
    "NOT_TOML": "is not valid TOML: {why}",
    "ABOVE_MEMORY": "must be at most this machine's memory, {most!b}, not {value!b}",
    "TORCH_WITHOUT_CUDA": "the installed torch supports only CPUs; for NVIDIA GPUs, run"
    " `pip install --force-reinstall torch`",
    "STATE_DIR_IN_USE": "{path} is in use by another server; choose another directory",
    "TLS_FILES_UNUSABLE": "cannot be loaded: {why}; --tls-cert, --tls-key and --tls-client-ca"
    " must be PEM, and the key must match the certificate and have no password",
    "NOT_A_SOCKET": "{path} exists and is not a socket",
    "ADDRESS_OF_OTHER": "{value} is already used by {other}",
    "ADDRESS_TAKEN": "{value} is in use by another process",
    "HOST_NOT_RESOLVED": "cannot resolve the host {host}",
    "ADDRESS_OF_ANOTHER_MACHINE": "{value} is not an address of this machine; use 0.0.0.0 to"
    " listen on all addresses of this machine",
    "NOT_INSTALLED": "missing packages: {packages}; {step}",
    "ADDRESS_UNUSABLE": "cannot listen on {value}: {why}",
}
