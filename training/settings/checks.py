"""Checks that a config can be trained, made before torch is loaded."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from turret.server.adapters.component import MAX_COMPONENTS, MIN_COMPONENTS
from turret.server.adapters.methods import hra, miss
from turret.server.adapters.methods.loha import highest_rank
from turret.server.basics.files import read_regular, unreadable
from turret.server.basics.names import closest, model_place
from turret.server.basics.settings import Violation
from turret.server.command.preflight import without_cuda
from turret.server.config import AdapterConfig
from turret.server.models.decoding import ROUTER, Projections
from turret.server.models.sources.check import check_model
from turret.server.training import MAX_SEQUENCE_TOKENS, METHODS
from turret.training.settings import (
    DECLARED,
    BaseConfig,
    DataConfig,
    MethodConfig,
    TrainConfig,
)
from turret.training.words import ConfigError, say

# The server's default --max-rank.
SERVED_RANK = AdapterConfig().max_rank
# (last part of the module path, out_features, in_features).
Size = tuple[str, int, int]


def module_sizes(projections: Projections, targets: Sequence[str]) -> Iterator[Size]:
    """Each kind of adapted module: the last part of its path, its outputs and its inputs.

    Args:
        projections: The projections of the base.
        targets: The result of ``expand_targets``.
    """
    for slices in projections.linears().values():
        for path, out, inner in slices:
            name = path.rpartition(".")[2]
            if name in targets:
                yield name, out, inner
    if projections.experts is None:
        return
    for projection, (_, out, inner) in projections.expert_linears().items():
        templates = projections.experts.modules[projection]
        for name in (template.removeprefix("{}.") for template in templates):
            if name in targets:
                yield name, out // len(templates), inner


# The highest rank, by the inputs and outputs of a module. The rank of an update ``B A`` is at most
# that of the weight. SHiRA trains rank · (out + in) of a weight's out · in entries.
_HIGHEST: Mapping[str, Callable[[int, int], int] | None] = {
    **dict.fromkeys(("lora", "rslora", "dora", "alora", "vblora"), min),
    **{method.name: method.most_rank for method in (hra.METHOD, miss.METHOD)},
    "loha": highest_rank,
    "shira": lambda inner, out: out * inner // (out + inner),
}


PRESETS = ("attention", "mlp", "all-linear")
_ATTENTION_GROUPS = ("qkv", "o")


def check_names(model_type: str, known: Sequence[str], targets: Sequence[str]) -> None:
    """Reject unknown names of modules.

    Args:
        model_type: The model type of the base.
        known: Its linear modules.
        targets: One preset, or module names.

    Raises:
        ConfigError: A preset is combined with others, or the architecture lacks a name.
    """
    if len(targets) == 1 and targets[0] in PRESETS:
        return
    for name in targets:
        if name in PRESETS:
            raise ConfigError.of("method.targets", say("PRESET_NOT_ALONE", value=name))
        if name not in known:
            text = say(
                "UNKNOWN_TARGET",
                value=name,
                model_type=model_type,
                choices=", ".join(known),
                presets=", ".join(PRESETS),
                closest=closest(name, (*known, *PRESETS)),
            )
            raise ConfigError.of("method.targets", text)


# Methods that put a prompt before the text, and methods with factors A and B.
PROMPTS = ("prefix_tuning", "prompt_tuning", "p_tuning")
WITH_FACTORS = ("lora", "rslora", "dora", "alora")
# Methods that the server supports on the experts of a mixture.
ON_EXPERTS = ("lora", "rslora")
# Methods that cannot be trained to classify: the first learns a gate, and the second does not
# change the text before its invocation.
_WITHOUT_HEAD = ("learned_fusion", "alora")
# The name of training on a server, in errors.
_SERVER = "--server"


def check_fit(config: TrainConfig) -> None:
    """Reject settings that have no meaning for the method.

    Args:
        config: The config as read.

    Raises:
        ConfigError: A setting has no meaning; the error names the first key.
    """
    name, keys = config.method.name, DECLARED[config.method.name].defaults
    for entry in dataclasses.fields(config.method):
        given = getattr(config.method, entry.name) is not None
        if given and entry.name != "name" and entry.name not in keys:
            text = say("KEY_UNSUPPORTED_BY", method=name, choices=", ".join(keys))
            raise ConfigError.of(f"method.{entry.name}", text)
    if name == "hra" and (config.method.rank or 0) % 2:
        # HRA starts from pairs of reflections that cancel out, so its rank must be even.
        raise ConfigError.of("method.rank", say("ODD_RANK", value=config.method.rank))
    # These methods take effect at one position of a row; a packed row has several such positions.
    if config.data.packing and name in (*PROMPTS, "alora"):
        raise ConfigError(_unsupported("data.packing", "true", name))
    if config.data.task == "classification" and name in _WITHOUT_HEAD:
        raise ConfigError(_unsupported("data.task", "classification", name))
    # Checkpointing switches off the cache, through which a prefix passes its keys and values.
    if config.run.gradient_checkpointing and name == "prefix_tuning":
        raise ConfigError(_unsupported("run.gradient_checkpointing", "true", name))
    ratio = config.optimizer.lora_plus_ratio
    if ratio is not None and name not in WITH_FACTORS:
        raise ConfigError(_unsupported("optimizer.lora_plus_ratio", ratio, name))


def check_served(config: TrainConfig) -> None:
    """Reject settings that only a run in this process supports.

    Args:
        config: The config as read, for a run on a server.

    Raises:
        ConfigError: A setting is not supported; the error has all of them.
    """
    found = unserved(config)
    if config.base.device is not None:
        found.append(_unsupported("base.device", config.base.device, _SERVER))
    if found:
        raise ConfigError(*found)


def unserved(config: TrainConfig) -> list[Violation]:
    """The settings that the engine of a server does not support."""
    base, method, optimizer = config.base, config.method, config.optimizer
    allowed: dict[str, tuple[object, tuple[object, ...]]] = {
        "base.weights": (base.weights, (None, "nf4")),
        "method.name": (method.name, METHODS),
        "method.dropout": (method.dropout, (None, 0.0)),
        "method.init_text": (method.init_text, (None,)),
        "method.decompose_both": (method.decompose_both, (None, False)),
        "method.decompose_factor": (method.decompose_factor, (None, -1)),
        "data.task": (config.data.task, ("generation",)),
        "optimizer.name": (optimizer.name, ("adamw",)),
        "optimizer.lora_plus_ratio": (optimizer.lora_plus_ratio, (None, 1.0)),
        "run.gradient_checkpointing": (config.run.gradient_checkpointing, (False,)),
    }
    found = [
        _unsupported(key, value, _SERVER)
        for key, (value, values) in allowed.items()
        if value not in values
    ]
    # The last token of an example is only a target, so one more token is possible.
    if config.data.max_length > MAX_SEQUENCE_TOKENS + 1:
        most = MAX_SEQUENCE_TOKENS + 1
        text = say("NOT_IN_RANGE", least=2, most=most, value=config.data.max_length)
        found.append(Violation("data.max_length", text))
    return found


def _unsupported(key: str, value: object, method: str) -> Violation:
    return Violation(key, say("VALUE_UNSUPPORTED_BY", value=value, method=method))


def module_names(projections: Projections, preset: str) -> tuple[str, ...]:
    """The modules of a preset, by the last part of their path, in the layer's order.

    Args:
        projections: The projections of the base.
        preset: One of ``PRESETS``.
    """
    names: list[str] = []
    for group, slices in projections.linears().items():
        is_attention = group in _ATTENTION_GROUPS
        is_selected = preset == "all-linear" or is_attention == (preset == "attention")
        # In transformers, the router is a parameter, not a linear module.
        if is_selected and group != ROUTER:
            names += [path.rpartition(".")[2] for path, _, _ in slices]
    if preset != "attention":
        names += expert_names(projections)
    return tuple(dict.fromkeys(names))


def expert_names(projections: Projections) -> tuple[str, ...]:
    """The modules of experts that can be trained, by the last part of their path.

    Empty if the modules have other paths in the trained model than in the server and PEFT.
    """
    experts = projections.experts
    if experts is None or experts.path != experts.checkpoint_path:
        return ()
    templates = [name for names in experts.modules.values() for name in names]
    if not all(template.startswith("{}.") for template in templates):
        return ()
    return tuple(template.removeprefix("{}.") for template in templates)


def expand_targets(projections: Projections, targets: Sequence[str]) -> tuple[str, ...]:
    """The names of the modules that the config selects.

    Args:
        projections: The projections of the base.
        targets: One preset, or module names.

    Raises:
        ConfigError: A preset is combined with others or selects nothing, or the architecture lacks
            a name.
    """
    if len(targets) == 1 and targets[0] in PRESETS:
        found = module_names(projections, targets[0])
        if not found:
            text = say("NO_TARGETS", value=targets[0], model_type=projections.model_type)
            raise ConfigError.of("method.targets", text)
        return found
    check_names(projections.model_type, module_names(projections, "all-linear"), targets)
    return tuple(dict.fromkeys(targets))


# Default targets of every method that has a rank.
_ALL = ("all-linear",)


def check_modules(
    method: str, projections: Projections, targets: Sequence[str], rank: int | None
) -> tuple[str, ...]:
    """Names of the modules that are adapted.

    Args:
        method: The name of the method.
        projections: The projections of the base.
        targets: The value of ``method.targets``.
        rank: The value of ``method.rank``; None for a method without a rank.

    Raises:
        ConfigError: The base lacks a module, or the method cannot adapt it at this rank.
    """
    names = expand_targets(projections, targets)
    of_experts = [name for name in expert_names(projections) if name in names]
    if of_experts and method not in ON_EXPERTS:
        about = {"module": of_experts[0], "method": method, "choices": ", ".join(ON_EXPERTS)}
        raise ConfigError.of("method.targets", say("EXPERTS_UNSUPPORTED_BY", **about))
    limit = _HIGHEST.get(method)
    if rank is not None and limit is not None:
        sizes = module_sizes(projections, names)
        limits = [(limit(inner, out), name) for name, out, inner in sizes]
        most, module = min(limits, key=lambda each: each[0], default=(rank, ""))
        if rank > most:
            text = say("RANK_TOO_HIGH", most=most, method=method, value=rank, module=module)
            raise ConfigError.of("method.rank", text)
    return names


def check_method(config: MethodConfig, projections: Projections) -> None:
    """Check a config as read, as far as its keys are set.

    Args:
        config: The config, with keys of its method only.
        projections: The projections of the base.

    Raises:
        ConfigError: See :func:`check_modules`; or the method does not support experts.
    """
    if config.name == "learned_fusion" and projections.experts is not None:
        raise ConfigError.of("method.name", say("FUSION_OF_EXPERTS"))
    has_modules = "targets" in DECLARED[config.name].defaults
    if has_modules and (config.targets or config.rank) is not None:
        check_modules(config.name, projections, config.targets or _ALL, config.rank)


_COMPONENTS = "method.components"


def check_inputs(config: TrainConfig, folder: Path) -> None:
    """Reject unreadable paths, and settings that do not fit together.

    Args:
        config: The config as read.
        folder: The directory to which its paths are relative.

    Raises:
        ConfigError: A file or directory is missing or used twice, torch has no CUDA, or a setting
            has no meaning for the method.
    """
    for key, name in (("train", config.data.train), ("validation", config.data.validation)):
        if name is None:
            continue
        path = (folder / name).absolute()
        try:
            # This also rejects pipes, which cannot be read twice.
            read_regular(path)
        except OSError as error:
            raise ConfigError.of(f"data.{key}", unreadable(path, error)) from None
    validation = config.data.validation
    if validation is not None and (folder / validation).samefile(folder / config.data.train):
        text = say("IS_TRAINING_FILE", path=folder / validation)
        raise ConfigError.of("data.validation", text)
    if config.base.device == "cuda" and (why := without_cuda()):
        raise ConfigError.of("base.device", why)
    check_fit(config)
    if config.method.name == "learned_fusion":
        check_components(config.method.components or (), folder)


def check_bases(configs: Sequence[TrainConfig], folder: Path) -> None:
    """Reject bases that are not supported, or do not fit the method; queries the hub if needed.

    Args:
        configs: See :func:`check_inputs`.
        folder: The directory to which their paths are relative.

    Raises:
        ConfigError: The base lacks the modules, the rank is too high for them, or the context is
            shorter than ``data.max_length``.
        InvalidRequestError: The base is not a supported model.
    """
    places = [base_place(config.base, folder) for config in configs]
    models = {place: check_model(place) for place in dict.fromkeys(places)}
    for config, place in zip(configs, places, strict=True):
        base = models[place]
        if base.num_positions is not None:
            check_max_length(config.data, base.num_positions)
        if (projections := base.projections()) is not None:
            check_method(config.method, projections)


def check_max_length(config: DataConfig, context: int) -> None:
    """Reject examples that are longer than the base's context.

    Args:
        config: The config with ``max_length``.
        context: The maximum number of positions that the base was made for.

    Raises:
        ConfigError: ``max_length`` exceeds the context.
    """
    if config.max_length > context:
        text = say("EXCEEDS_CONTEXT", most=context, value=config.max_length)
        raise ConfigError.of("data.max_length", text)


def component_directories(entries: Sequence[str], folder: Path = Path()) -> dict[str, Path]:
    """Component names → directories.

    Args:
        entries: ``NAME=DIRECTORY``, or ``DIRECTORY`` with the name as its last part.
        folder: The directory to which relative directories refer.
    """
    directories = {}
    for entry in entries:
        name, equals, directory = entry.partition("=")
        path = folder / (directory if equals else name)
        directories[name if equals else path.name] = path
    return directories


def check_components(entries: Sequence[str], folder: Path) -> None:
    """Reject components that a learned fusion cannot use.

    Args:
        entries: See :func:`component_directories`.
        folder: The directory to which relative directories refer.

    Raises:
        ConfigError: There are too few or too many components, or one is not a directory.
    """
    directories = component_directories(entries, folder)
    if len(directories) < len(entries):
        raise ConfigError.of(_COMPONENTS, say("SAME_COMPONENT_NAME"))
    if not MIN_COMPONENTS <= len(directories) <= MAX_COMPONENTS:
        limits = {"least": MIN_COMPONENTS, "most": MAX_COMPONENTS}
        text = say("ENTRIES_NOT_IN_RANGE", found=len(directories), **limits)
        raise ConfigError.of(_COMPONENTS, text)
    for path in directories.values():
        if not path.is_dir():
            raise ConfigError.of(_COMPONENTS, say("FOLDER_MISSING", path=path))


def base_place(config: BaseConfig, folder: Path) -> Path | None:
    """The path of the base, or its id on the hub as a path; None for the bundled model."""
    if config.model is None:
        return None
    return model_place(config.model, folder)
