import datetime

from google.protobuf import duration_pb2 as _duration_pb2
from google.protobuf import timestamp_pb2 as _timestamp_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Adapter(_message.Message):
    __slots__ = ("name", "uuid", "generation", "digest", "method", "ranks", "target_modules", "bytes_disk", "bytes_host", "bytes_device", "residency", "pinned", "in_flight", "last_used_time", "base_model", "warnings", "state", "source", "invocation_token_ids", "labels", "vocab_size", "chat_template", "kept_generations")
    class Residency(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        RESIDENCY_UNSPECIFIED: _ClassVar[Adapter.Residency]
        DISK: _ClassVar[Adapter.Residency]
        HOST: _ClassVar[Adapter.Residency]
        DEVICE: _ClassVar[Adapter.Residency]
    RESIDENCY_UNSPECIFIED: Adapter.Residency
    DISK: Adapter.Residency
    HOST: Adapter.Residency
    DEVICE: Adapter.Residency
    class State(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        STATE_UNSPECIFIED: _ClassVar[Adapter.State]
        LOADING: _ClassVar[Adapter.State]
        ACTIVE: _ClassVar[Adapter.State]
        DELETING: _ClassVar[Adapter.State]
    STATE_UNSPECIFIED: Adapter.State
    LOADING: Adapter.State
    ACTIVE: Adapter.State
    DELETING: Adapter.State
    NAME_FIELD_NUMBER: _ClassVar[int]
    UUID_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    METHOD_FIELD_NUMBER: _ClassVar[int]
    RANKS_FIELD_NUMBER: _ClassVar[int]
    TARGET_MODULES_FIELD_NUMBER: _ClassVar[int]
    BYTES_DISK_FIELD_NUMBER: _ClassVar[int]
    BYTES_HOST_FIELD_NUMBER: _ClassVar[int]
    BYTES_DEVICE_FIELD_NUMBER: _ClassVar[int]
    RESIDENCY_FIELD_NUMBER: _ClassVar[int]
    PINNED_FIELD_NUMBER: _ClassVar[int]
    IN_FLIGHT_FIELD_NUMBER: _ClassVar[int]
    LAST_USED_TIME_FIELD_NUMBER: _ClassVar[int]
    BASE_MODEL_FIELD_NUMBER: _ClassVar[int]
    WARNINGS_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    INVOCATION_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    LABELS_FIELD_NUMBER: _ClassVar[int]
    VOCAB_SIZE_FIELD_NUMBER: _ClassVar[int]
    CHAT_TEMPLATE_FIELD_NUMBER: _ClassVar[int]
    KEPT_GENERATIONS_FIELD_NUMBER: _ClassVar[int]
    name: str
    uuid: str
    generation: int
    digest: str
    method: str
    ranks: _containers.RepeatedScalarFieldContainer[int]
    target_modules: _containers.RepeatedScalarFieldContainer[str]
    bytes_disk: int
    bytes_host: int
    bytes_device: int
    residency: Adapter.Residency
    pinned: bool
    in_flight: int
    last_used_time: _timestamp_pb2.Timestamp
    base_model: str
    warnings: _containers.RepeatedScalarFieldContainer[str]
    state: Adapter.State
    source: str
    invocation_token_ids: _containers.RepeatedScalarFieldContainer[int]
    labels: _containers.RepeatedScalarFieldContainer[str]
    vocab_size: int
    chat_template: str
    kept_generations: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, name: _Optional[str] = ..., uuid: _Optional[str] = ..., generation: _Optional[int] = ..., digest: _Optional[str] = ..., method: _Optional[str] = ..., ranks: _Optional[_Iterable[int]] = ..., target_modules: _Optional[_Iterable[str]] = ..., bytes_disk: _Optional[int] = ..., bytes_host: _Optional[int] = ..., bytes_device: _Optional[int] = ..., residency: _Optional[_Union[Adapter.Residency, str]] = ..., pinned: bool = ..., in_flight: _Optional[int] = ..., last_used_time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., base_model: _Optional[str] = ..., warnings: _Optional[_Iterable[str]] = ..., state: _Optional[_Union[Adapter.State, str]] = ..., source: _Optional[str] = ..., invocation_token_ids: _Optional[_Iterable[int]] = ..., labels: _Optional[_Iterable[str]] = ..., vocab_size: _Optional[int] = ..., chat_template: _Optional[str] = ..., kept_generations: _Optional[_Iterable[int]] = ...) -> None: ...

class AdapterWeight(_message.Message):
    __slots__ = ("name", "generation", "weight")
    NAME_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_FIELD_NUMBER: _ClassVar[int]
    name: str
    generation: int
    weight: float
    def __init__(self, name: _Optional[str] = ..., generation: _Optional[int] = ..., weight: _Optional[float] = ...) -> None: ...

class LoadAdapterRequest(_message.Message):
    __slots__ = ("name", "path", "pinned", "task", "chat_template")
    NAME_FIELD_NUMBER: _ClassVar[int]
    PATH_FIELD_NUMBER: _ClassVar[int]
    PINNED_FIELD_NUMBER: _ClassVar[int]
    TASK_FIELD_NUMBER: _ClassVar[int]
    CHAT_TEMPLATE_FIELD_NUMBER: _ClassVar[int]
    name: str
    path: str
    pinned: bool
    task: int
    chat_template: str
    def __init__(self, name: _Optional[str] = ..., path: _Optional[str] = ..., pinned: bool = ..., task: _Optional[int] = ..., chat_template: _Optional[str] = ...) -> None: ...

class FileInfo(_message.Message):
    __slots__ = ("path", "size_bytes", "sha256")
    PATH_FIELD_NUMBER: _ClassVar[int]
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    SHA256_FIELD_NUMBER: _ClassVar[int]
    path: str
    size_bytes: int
    sha256: str
    def __init__(self, path: _Optional[str] = ..., size_bytes: _Optional[int] = ..., sha256: _Optional[str] = ...) -> None: ...

class FileChunk(_message.Message):
    __slots__ = ("path", "data")
    PATH_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    path: str
    data: bytes
    def __init__(self, path: _Optional[str] = ..., data: _Optional[bytes] = ...) -> None: ...

class UploadHeader(_message.Message):
    __slots__ = ("name", "pinned", "replace", "files", "expected_generation", "task", "chat_template")
    NAME_FIELD_NUMBER: _ClassVar[int]
    PINNED_FIELD_NUMBER: _ClassVar[int]
    REPLACE_FIELD_NUMBER: _ClassVar[int]
    FILES_FIELD_NUMBER: _ClassVar[int]
    EXPECTED_GENERATION_FIELD_NUMBER: _ClassVar[int]
    TASK_FIELD_NUMBER: _ClassVar[int]
    CHAT_TEMPLATE_FIELD_NUMBER: _ClassVar[int]
    name: str
    pinned: bool
    replace: bool
    files: _containers.RepeatedCompositeFieldContainer[FileInfo]
    expected_generation: int
    task: int
    chat_template: str
    def __init__(self, name: _Optional[str] = ..., pinned: bool = ..., replace: bool = ..., files: _Optional[_Iterable[_Union[FileInfo, _Mapping]]] = ..., expected_generation: _Optional[int] = ..., task: _Optional[int] = ..., chat_template: _Optional[str] = ...) -> None: ...

class UploadAdapterRequest(_message.Message):
    __slots__ = ("header", "chunk")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    header: UploadHeader
    chunk: FileChunk
    def __init__(self, header: _Optional[_Union[UploadHeader, _Mapping]] = ..., chunk: _Optional[_Union[FileChunk, _Mapping]] = ...) -> None: ...

class ReplaceAdapterRequest(_message.Message):
    __slots__ = ("name", "path", "expected_generation", "task", "chat_template")
    NAME_FIELD_NUMBER: _ClassVar[int]
    PATH_FIELD_NUMBER: _ClassVar[int]
    EXPECTED_GENERATION_FIELD_NUMBER: _ClassVar[int]
    TASK_FIELD_NUMBER: _ClassVar[int]
    CHAT_TEMPLATE_FIELD_NUMBER: _ClassVar[int]
    name: str
    path: str
    expected_generation: int
    task: int
    chat_template: str
    def __init__(self, name: _Optional[str] = ..., path: _Optional[str] = ..., expected_generation: _Optional[int] = ..., task: _Optional[int] = ..., chat_template: _Optional[str] = ...) -> None: ...

class RollbackAdapterRequest(_message.Message):
    __slots__ = ("name", "generation", "expected_generation")
    NAME_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    EXPECTED_GENERATION_FIELD_NUMBER: _ClassVar[int]
    name: str
    generation: int
    expected_generation: int
    def __init__(self, name: _Optional[str] = ..., generation: _Optional[int] = ..., expected_generation: _Optional[int] = ...) -> None: ...

class GetAdapterRequest(_message.Message):
    __slots__ = ("name", "generation")
    NAME_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    name: str
    generation: int
    def __init__(self, name: _Optional[str] = ..., generation: _Optional[int] = ...) -> None: ...

class ListAdaptersRequest(_message.Message):
    __slots__ = ("page_size", "page_token", "method", "residency")
    PAGE_SIZE_FIELD_NUMBER: _ClassVar[int]
    PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    METHOD_FIELD_NUMBER: _ClassVar[int]
    RESIDENCY_FIELD_NUMBER: _ClassVar[int]
    page_size: int
    page_token: str
    method: str
    residency: Adapter.Residency
    def __init__(self, page_size: _Optional[int] = ..., page_token: _Optional[str] = ..., method: _Optional[str] = ..., residency: _Optional[_Union[Adapter.Residency, str]] = ...) -> None: ...

class ListAdaptersResponse(_message.Message):
    __slots__ = ("adapters", "next_page_token", "total_size")
    ADAPTERS_FIELD_NUMBER: _ClassVar[int]
    NEXT_PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    TOTAL_SIZE_FIELD_NUMBER: _ClassVar[int]
    adapters: _containers.RepeatedCompositeFieldContainer[Adapter]
    next_page_token: str
    total_size: int
    def __init__(self, adapters: _Optional[_Iterable[_Union[Adapter, _Mapping]]] = ..., next_page_token: _Optional[str] = ..., total_size: _Optional[int] = ...) -> None: ...

class UnloadAdapterRequest(_message.Message):
    __slots__ = ("name", "mode", "timeout", "expected_generation")
    class Mode(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        MODE_UNSPECIFIED: _ClassVar[UnloadAdapterRequest.Mode]
        DRAIN: _ClassVar[UnloadAdapterRequest.Mode]
        FORCE: _ClassVar[UnloadAdapterRequest.Mode]
    MODE_UNSPECIFIED: UnloadAdapterRequest.Mode
    DRAIN: UnloadAdapterRequest.Mode
    FORCE: UnloadAdapterRequest.Mode
    NAME_FIELD_NUMBER: _ClassVar[int]
    MODE_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_FIELD_NUMBER: _ClassVar[int]
    EXPECTED_GENERATION_FIELD_NUMBER: _ClassVar[int]
    name: str
    mode: UnloadAdapterRequest.Mode
    timeout: _duration_pb2.Duration
    expected_generation: int
    def __init__(self, name: _Optional[str] = ..., mode: _Optional[_Union[UnloadAdapterRequest.Mode, str]] = ..., timeout: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., expected_generation: _Optional[int] = ...) -> None: ...

class UnloadAdapterResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class PinAdapterRequest(_message.Message):
    __slots__ = ("name",)
    NAME_FIELD_NUMBER: _ClassVar[int]
    name: str
    def __init__(self, name: _Optional[str] = ...) -> None: ...

class UnpinAdapterRequest(_message.Message):
    __slots__ = ("name",)
    NAME_FIELD_NUMBER: _ClassVar[int]
    name: str
    def __init__(self, name: _Optional[str] = ...) -> None: ...

class AliasTarget(_message.Message):
    __slots__ = ("name", "generation", "weight")
    NAME_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_FIELD_NUMBER: _ClassVar[int]
    name: str
    generation: int
    weight: float
    def __init__(self, name: _Optional[str] = ..., generation: _Optional[int] = ..., weight: _Optional[float] = ...) -> None: ...

class Alias(_message.Message):
    __slots__ = ("name", "targets")
    NAME_FIELD_NUMBER: _ClassVar[int]
    TARGETS_FIELD_NUMBER: _ClassVar[int]
    name: str
    targets: _containers.RepeatedCompositeFieldContainer[AliasTarget]
    def __init__(self, name: _Optional[str] = ..., targets: _Optional[_Iterable[_Union[AliasTarget, _Mapping]]] = ...) -> None: ...

class SetAliasRequest(_message.Message):
    __slots__ = ("name", "targets")
    NAME_FIELD_NUMBER: _ClassVar[int]
    TARGETS_FIELD_NUMBER: _ClassVar[int]
    name: str
    targets: _containers.RepeatedCompositeFieldContainer[AliasTarget]
    def __init__(self, name: _Optional[str] = ..., targets: _Optional[_Iterable[_Union[AliasTarget, _Mapping]]] = ...) -> None: ...

class DeleteAliasRequest(_message.Message):
    __slots__ = ("name",)
    NAME_FIELD_NUMBER: _ClassVar[int]
    name: str
    def __init__(self, name: _Optional[str] = ...) -> None: ...

class DeleteAliasResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListAliasesRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListAliasesResponse(_message.Message):
    __slots__ = ("aliases",)
    ALIASES_FIELD_NUMBER: _ClassVar[int]
    aliases: _containers.RepeatedCompositeFieldContainer[Alias]
    def __init__(self, aliases: _Optional[_Iterable[_Union[Alias, _Mapping]]] = ...) -> None: ...

class FuseAdaptersRequest(_message.Message):
    __slots__ = ("name", "adapters", "combination", "rank", "energy", "density", "majority_sign_method", "seed")
    NAME_FIELD_NUMBER: _ClassVar[int]
    ADAPTERS_FIELD_NUMBER: _ClassVar[int]
    COMBINATION_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    ENERGY_FIELD_NUMBER: _ClassVar[int]
    DENSITY_FIELD_NUMBER: _ClassVar[int]
    MAJORITY_SIGN_METHOD_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    name: str
    adapters: _containers.RepeatedCompositeFieldContainer[AdapterWeight]
    combination: str
    rank: int
    energy: float
    density: float
    majority_sign_method: str
    seed: int
    def __init__(self, name: _Optional[str] = ..., adapters: _Optional[_Iterable[_Union[AdapterWeight, _Mapping]]] = ..., combination: _Optional[str] = ..., rank: _Optional[int] = ..., energy: _Optional[float] = ..., density: _Optional[float] = ..., majority_sign_method: _Optional[str] = ..., seed: _Optional[int] = ...) -> None: ...

class ModuleError(_message.Message):
    __slots__ = ("module", "relative_error", "rank")
    MODULE_FIELD_NUMBER: _ClassVar[int]
    RELATIVE_ERROR_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    module: str
    relative_error: float
    rank: int
    def __init__(self, module: _Optional[str] = ..., relative_error: _Optional[float] = ..., rank: _Optional[int] = ...) -> None: ...

class FuseAdaptersResponse(_message.Message):
    __slots__ = ("adapter", "relative_error", "modules")
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    RELATIVE_ERROR_FIELD_NUMBER: _ClassVar[int]
    MODULES_FIELD_NUMBER: _ClassVar[int]
    adapter: Adapter
    relative_error: float
    modules: _containers.RepeatedCompositeFieldContainer[ModuleError]
    def __init__(self, adapter: _Optional[_Union[Adapter, _Mapping]] = ..., relative_error: _Optional[float] = ..., modules: _Optional[_Iterable[_Union[ModuleError, _Mapping]]] = ...) -> None: ...

class MergeAdaptersRequest(_message.Message):
    __slots__ = ("adapters", "precision")
    class Precision(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        PRECISION_UNSPECIFIED: _ClassVar[MergeAdaptersRequest.Precision]
        NF4: _ClassVar[MergeAdaptersRequest.Precision]
        BF16: _ClassVar[MergeAdaptersRequest.Precision]
        AUTO: _ClassVar[MergeAdaptersRequest.Precision]
    PRECISION_UNSPECIFIED: MergeAdaptersRequest.Precision
    NF4: MergeAdaptersRequest.Precision
    BF16: MergeAdaptersRequest.Precision
    AUTO: MergeAdaptersRequest.Precision
    ADAPTERS_FIELD_NUMBER: _ClassVar[int]
    PRECISION_FIELD_NUMBER: _ClassVar[int]
    adapters: _containers.RepeatedCompositeFieldContainer[AdapterWeight]
    precision: MergeAdaptersRequest.Precision
    def __init__(self, adapters: _Optional[_Iterable[_Union[AdapterWeight, _Mapping]]] = ..., precision: _Optional[_Union[MergeAdaptersRequest.Precision, str]] = ...) -> None: ...

class UnmergeAdaptersRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetMergeStateRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class MergedAdapter(_message.Message):
    __slots__ = ("name", "uuid", "generation", "weight")
    NAME_FIELD_NUMBER: _ClassVar[int]
    UUID_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_FIELD_NUMBER: _ClassVar[int]
    name: str
    uuid: str
    generation: int
    weight: float
    def __init__(self, name: _Optional[str] = ..., uuid: _Optional[str] = ..., generation: _Optional[int] = ..., weight: _Optional[float] = ...) -> None: ...

class MergeState(_message.Message):
    __slots__ = ("active", "base_generation", "adapters", "precision", "merge_time", "relative_error", "modules", "update_error")
    ACTIVE_FIELD_NUMBER: _ClassVar[int]
    BASE_GENERATION_FIELD_NUMBER: _ClassVar[int]
    ADAPTERS_FIELD_NUMBER: _ClassVar[int]
    PRECISION_FIELD_NUMBER: _ClassVar[int]
    MERGE_TIME_FIELD_NUMBER: _ClassVar[int]
    RELATIVE_ERROR_FIELD_NUMBER: _ClassVar[int]
    MODULES_FIELD_NUMBER: _ClassVar[int]
    UPDATE_ERROR_FIELD_NUMBER: _ClassVar[int]
    active: bool
    base_generation: int
    adapters: _containers.RepeatedCompositeFieldContainer[MergedAdapter]
    precision: MergeAdaptersRequest.Precision
    merge_time: _timestamp_pb2.Timestamp
    relative_error: float
    modules: _containers.RepeatedCompositeFieldContainer[ModuleError]
    update_error: float
    def __init__(self, active: bool = ..., base_generation: _Optional[int] = ..., adapters: _Optional[_Iterable[_Union[MergedAdapter, _Mapping]]] = ..., precision: _Optional[_Union[MergeAdaptersRequest.Precision, str]] = ..., merge_time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., relative_error: _Optional[float] = ..., modules: _Optional[_Iterable[_Union[ModuleError, _Mapping]]] = ..., update_error: _Optional[float] = ...) -> None: ...

class ExportAdapterRequest(_message.Message):
    __slots__ = ("name", "generation")
    NAME_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    name: str
    generation: int
    def __init__(self, name: _Optional[str] = ..., generation: _Optional[int] = ...) -> None: ...

class ExportHeader(_message.Message):
    __slots__ = ("adapter", "files")
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    FILES_FIELD_NUMBER: _ClassVar[int]
    adapter: Adapter
    files: _containers.RepeatedCompositeFieldContainer[FileInfo]
    def __init__(self, adapter: _Optional[_Union[Adapter, _Mapping]] = ..., files: _Optional[_Iterable[_Union[FileInfo, _Mapping]]] = ...) -> None: ...

class ExportAdapterResponse(_message.Message):
    __slots__ = ("header", "chunk")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    header: ExportHeader
    chunk: FileChunk
    def __init__(self, header: _Optional[_Union[ExportHeader, _Mapping]] = ..., chunk: _Optional[_Union[FileChunk, _Mapping]] = ...) -> None: ...
