"""What a config and the shapes of tensors say of an adapter's rank, without the base and torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, TypeGuard

from turret.server.adapters.checkpoint.findings import Findings
from turret.server.adapters.checkpoint.no_adapter import OTHER_TRAINING
from turret.server.adapters.checkpoint.safetensors_header import SafetensorsHeader
from turret.server.adapters.checkpoint.tensor_names import canonical_name
from turret.server.adapters.peft_format.refusals.limits import check_rank
from turret.server.adapters.peft_format.refusals.unserved import peft_type_of

# Types whose ``r`` is the rank of all that they adapt, where no pattern says otherwise.
_RANKED_BY_R = frozenset(
    {
        *("DELORA", "HRA", "LOHA", "PEANUT", "POLY", "PVERA", "TINYLORA", "UNILORA", "VBLORA"),
        "VERA",
    }
)
# Type → tensors whose extent in a dimension is the rank of their module.
_RANKED_BY_SHAPE: Mapping[str, tuple[tuple[str, int], ...]] = {
    "LORA": ((".lora_A.weight", 0),),
    "ADALORA": ((".lora_E", 0),),
    "DEFT": ((".deft_P", 1),),
    "HIRA": ((".hira_A", 0),),
    "LOHA": ((".hada_w1_b", 0),),
    "LOKR": ((".lokr_w1_a", 1), (".lokr_w2_a", 1)),
}
# Keys of a LoRA whose ``lora_A`` has other rows than those of one rank.
_OTHER_ROWS = ("target_parameters", "arrow_config")
_PATTERN = "rank_pattern"


def check_r(
    config: Mapping[str, Any], header: SafetensorsHeader | None, findings: Findings
) -> None:
    """Note an ``r`` that is another than a LoRA's factors have."""
    rank = config.get("r")
    if peft_type_of(config) != "LORA" or config.get(_PATTERN) or not _is_rank(rank):
        # Which rank a module has by a pattern, the base's modules decide.
        return
    for name, rows in _ranks(config, header):
        if rows != rank:
            findings.add(name, f"has rank {rows}, the config says {rank}; {OTHER_TRAINING}")


def check_early_rank(
    path: str, config: Mapping[str, Any], header: SafetensorsHeader | None, max_rank: int | None
) -> None:
    """Refuse what is over ``--max-rank``, as far as that shows.

    Raises:
        BudgetExceededError: It is over.
    """
    ranks = [rank for _, rank in _ranks(config, header)]
    # Its factors are served beside those of the base's own values.
    times = 2 if isinstance(config.get("kasa_config"), Mapping) else 1
    check_rank(path, max([times * max(ranks, default=0), _rank_of_all(config)]), max_rank)
    check_rank(path, _block_size(config, header), max_rank, name="block size")


def _ranks(
    config: Mapping[str, Any], header: SafetensorsHeader | None
) -> Iterable[tuple[str, int]]:
    """Names of tensors that tell their module's rank, and that rank."""
    kind = peft_type_of(config)
    if header is None or (kind == "LORA" and any(config.get(key) for key in _OTHER_ROWS)):
        return
    for entry in header.entries:
        name = canonical_name(entry.name)
        for suffix, axis in _RANKED_BY_SHAPE.get(kind, ()):
            if name.endswith(suffix) and len(entry.shape) == 2:
                yield name, entry.shape[axis]


def _rank_of_all(config: Mapping[str, Any]) -> int:
    """What a config alone says of the rank of every adapted module; 0 where it does not."""
    rank, kind = config.get("r"), peft_type_of(config)
    if not _is_rank(rank) or config.get(_PATTERN):
        return 0
    if kind == "GRALORA":
        blocks, whole = config.get("gralora_k"), config.get("hybrid_r")
        return blocks * rank + whole if _is_rank(blocks) and type(whole) is int else 0
    is_told = (
        kind in _RANKED_BY_R
        or (kind in {"MISS", "BONE"} and config.get("init_weights") != "bat")
        or (kind == "GLORA" and config.get("config_A_B") == "lora")
    )
    return rank if is_told else 0


def _block_size(config: Mapping[str, Any], header: SafetensorsHeader | None) -> int:
    """Of what turns inputs block by block; 0 where the base has a say in it, as with OFT."""
    if peft_type_of(config) != "BOFT" or header is None:
        return 0
    shapes = [entry.shape for entry in header.entries if entry.name.endswith(".boft_R")]
    # As many blocks are one as the butterfly's factors join.
    return max((s[2] << (s[0] - 1) for s in shapes if len(s) == 4 and 0 < s[0] < 32), default=0)


def _is_rank(value: object) -> TypeGuard[int]:
    return type(value) is int and value >= 1
