"""Errors about adapters, and about requests that concern adapters."""

_MERGE_FIRST = "merge the adapter into the resized base model and serve the result"

TEXTS: dict[str, str] = {
    # Everything that is wrong with one adapter, or with one request.
    "ADAPTER_UNUSABLE": "adapter {path!q:.200} cannot be served: {found}",
    "ADAPTER_MISFIT": "adapter {path!q:.200} does not fit base model {base_model!q:.200}: {found}",
    "FINDINGS": "{found}",
    "FINDING": "{field}: {why}",
    "FINDING_AND_MORE": "{field}: {why} (and {count} more: {fields})",
    # Keys and values of a config.
    "INVALID_VALUE": "must be {wanted}, not {value!q:.60}",
    "INVALID_ENTRY": "{entry!q:.60}: {why}",
    "UNSUPPORTED_VALUE": "{value!q:.60} is not supported: {why}",
    "UNKNOWN_METHOD": "unknown method {value!q:.60}; docs/adapters.md lists those supported",
    "SET_EXACTLY_ONE": "exactly one of {keys} must be 0",
    "NOT_DIVISIBLE": "the number of {what}, {size}, is not divisible by {by}",
    "WRONG_COUNT": "has {found} {what}, expected {expected}",
    "SELECTS_NOTHING": "selects no module that this method can adapt",
    "SELECTED_TWICE": "selects {module!q:.120}, which {other} also selects",
    "NOT_ADAPTABLE": "method {method} cannot adapt module {module!q:.120}",
    "SLOW_PATTERN": "pattern {pattern!q:.120} takes too much time or memory to match",
    "UNTRIED_PATTERN": "pattern {pattern!q:.120} was not tried because another one is too slow",
    "TOO_MANY_PATTERNS": "matching {count} patterns against {modules} modules would take too long",
    "NO_TASKS": "a {method} adapter has no tasks; omit the task",
    "MISSING_TASK": "is required; choose a task from 0 to {most}",
    # Tensors.
    "NO_TENSORS": "has no tensors of this method",
    "WRONG_SHAPE": "has shape {shape}, expected {expected}",
    "WRONG_DTYPE": "has dtype {dtype}, expected {expected}",
    "WRONG_RANK": "has rank {rank}, but {by} has {expected}; use the config saved with the weights",
    "MISSING_TENSOR": "is missing, but {by} requires it",
    "UNEXPECTED_TENSOR": "is in the file, but {by} excludes it; use the config saved with the file",
    "UNKNOWN_TENSOR": "unknown tensor; every tensor in the file must be used",
    "LYCORIS_LAYOUT": "has a name in LyCORIS layout; convert the adapter as"
    " docs/bring-your-adapter.md shows",
    "WHOLE_WEIGHT": "is a full weight matrix, which is supported only for embed_tokens and lm_head",
    "DUPLICATE_TENSOR": "duplicates {other!q:.200}",
    "DIFFERENT_COPY": "must be equal to {other!q:.200}",
    "CHANGED_BASE_WEIGHT": "differs from the base model's weight; if it was trained, add the module"
    " to modules_to_save",
    "NOT_FINITE": "contains NaN or infinity in {dtype}",
    "INVALID_INDICES": "contains an index that is negative or not below {limits}",
    "INVALID_TENSOR": "is invalid: {why}",
    "NO_HEAD_TENSOR": "is {value}, but the file has no score.weight",
    "ADAPTS_EXPERT": "adapts an expert, which only LoRA supports",
    # Differences from the base model.
    "NO_SUCH_MODULE": "the base model has no module {module!q:.200}",
    "NO_BASE_BIAS": "the base model has no bias in this module",
    "ZERO_BASE_WEIGHT": "the base model's weight contains zeros, which no gain can change",
    "DIFFERS_FROM_BASE": "is {value}, but the base model has {expected}",
    "WRONG_MODEL_TYPE": "is for {expected} models, but the base model is of type {model_type}",
    "WRONG_WIDTH": "maps {inputs} to {outputs} features, but the base model's module maps"
    " {base_inputs} to {base_outputs}",
    "WRONG_INPUTS": "its {module} takes {found} features, but the base model's takes {expected}",
    "TOO_MANY_LAYERS": "it is for a model with at least {found} layers, but the base model has"
    " {expected}",
    "ADAPTS_VISION": "it adapts {part!q}, but only the language model is served; train it without"
    " the vision layers",
    "TRAINED_FOR": "it was trained for {trained!q:.200}, but the base is {served!q:.200}",
    "OTHER_BASE": "adapter {path!q:.200} was trained for {trained_for!q:.200}, not for"
    " {base_model!q:.200}; if both have the same weights, start the server with --allow-other-base",
    # Rows of embedding and head.
    "UNEQUAL_ROWS": "has {rows!n:row}, but {other} has {expected}",
    "TOO_MANY_ADDED_ROWS": "has {rows} rows, but at most {most} more than the base model's"
    f" {{base_rows}} are supported; {_MERGE_FIRST}",
    "NEEDS_ALL_TOKENS": "is not supported if the adapter changes the size of the vocabulary; "
    + _MERGE_FIRST,
    "MISSING_ROWS": "the rows of tokens {first} to {last}, which the base model lacks, are not in"
    " the file; add {module} to modules_to_save as well",
    "ADAPTER_LACKS_TOKENIZER": "is missing, but the adapter has rows for {rows} tokens and the"
    " base model for only {base_rows}; save the adapter's tokenizer alongside its weights",
    "CHAT_TEMPLATE_TOO_LARGE": "has a chat template of more than {most} bytes",
    "CHAT_TEMPLATE_INVALID": "invalid chat template: {problem}",
    "TOKENIZER_CODE": "tokenizers with custom code are not supported",
    # Files.
    "BAD_PATH": "adapter path {path!q:.200} {why}",
    "BAD_FILE": "file {file!q:.200} {why}",
    "PATH_LENGTH": "must have 1 to {most} characters, not {found}",
    "PATH_CHARACTERS": "must not contain control characters or backslashes",
    "PATH_OUTSIDE_ROOT": 'must be relative to the adapter root, without ".."',
    "LINK_OUTSIDE_ROOT": "leaves the adapter root through a symbolic link",
    "NO_ADAPTER_ROOT": "needs a server with --adapter-root",
    "NO_SUCH_PATH": "does not exist in the adapter root {root}",
    "MISSING_FILE": "does not exist",
    "NOT_A_FILE": "is not a regular file",
    "NOT_A_DIRECTORY": "is not a directory; use the one that contains adapter_config.json",
    "NOT_AN_ADAPTER": "contains no adapter_config.json",
    "WHOLE_MODEL": "is a model, not an adapter; serve it with `turret serve --model`",
    "PICKLE": "is a pickle file, which is never read because it can run code; save the adapter with"
    " safe_serialization=True",
    "CANNOT_READ": "cannot be read: {why}",
    "READ_FORBIDDEN": "cannot be read by the server's user {user}; allow it with `chmod -R a+rX`",
    "NO_FILE_OPENS": "the server cannot open files: {why}",
    # JSON files.
    "JSON_DUPLICATE_KEY": "is not valid JSON: key {key!q:.80} appears twice",
    "JSON_NOT_FINITE": "is not valid JSON: it contains {value}",
    "JSON_TOO_NESTED": "is not valid JSON: it is nested too deeply",
    "JSON_KEY_TOO_LONG": "has a key with more than {most} characters, {key!q:.80}",
    "JSON_HALF_CHARACTER": "contains half of a surrogate pair in key {key!q:.80}",
    # Tensor files.
    "HEADER_TOO_LARGE": "its header has {found} bytes, more than the limit of {most}",
    "METADATA_NOT_AN_OBJECT": "__metadata__ must be an object",
    "TENSOR_ENTRY_INVALID": "tensor {name!q:.200} has an invalid dtype, shape or data_offsets",
    "TENSOR_DTYPE_UNSUPPORTED": "tensor {name!q:.200} has dtype {value!q:.30}; supported"
    " dtypes are {choices}",
    "TENSORS_NOT_CONTIGUOUS": "tensor {name!q:.200} starts at byte {found}, expected {expected}",
    "TENSOR_DATA_LEFT": "its tensors end at byte {found}, but its data ends at byte {expected}",
    "INVALID_SAFETENSORS": "is not a valid safetensors file: {why}",
    "FILE_TOO_LARGE": "has more than {most} bytes",
    "FILE_CUT_SHORT": "ends after {found} of {needed} bytes; copy it again",
    "FILE_CHANGED": "changed while it was being read",
    # Limits of the server.
    "RANK_OVER_LIMIT": "{name} is {rank}, but the server's --max-rank is {max_rank}",
    "RANK_TOO_COSTLY": "LoHa rank {rank} is too large for {modules!n:module}; convert the adapter"
    " with PEFT's save_as_lora",
    "OVER_HOST_MEMORY": "adapter {path!q:.200} needs {bytes!b} of host memory, but all"
    " adapters together may use {host_bytes!b}; raise --adapter-host-bytes",
    "PINNED_LEAVE_NO_ROOM": "loading {adapters} needs {bytes!b} of host memory, but the pinned"
    " adapters leave only {free_bytes!b}; raise --adapter-host-bytes or unpin an adapter",
    "NO_ROOM_TO_PIN": "no room in host memory to pin adapter {adapter!q} ({bytes!b})",
    "DENSE_NOT_ALLOWED": "{method} adapter {path!q:.200} has updates as large as the weights that"
    " they change ({bytes!b}); start the server with {flag} to serve it",
    # Warnings about an adapter that is served.
    "AMBIGUOUS_PATTERNS": "{field}: {count} patterns match {module!q:.120} ({patterns}); the first"
    " one is used",
    "TRAINED_FOR_ANOTHER_BASE": "trained for base model {trained!q:.200}, served on"
    " {served!q:.200}: the shapes fit, but the weights may differ",
    "OTHER_WEIGHTS": "trained on base weights with digest {trained}, but served on {served}",
    "STORED_OTHERWISE": "the server's base and the base that the adapter was trained on keep"
    " different modules in 16 bits; where they differ, the server has {modules}",
    "OTHER_QUANTIZATION": "trained on {trained!q:.200}, whose weights are stored as {value}, but"
    " served on {served!q:.200}: the weights may differ",
    "BASE_DIFFERS": "adapter {path!q:.200} is rejected by --strict-base: {problem}",
    "IS_TASK": "serves task {task} of the {count} tasks in its files",
    "DRAWN_AGAIN": "{names}: not in the file, so regenerated from {seed}, as PEFT does",
    "SOLVED_FROM_BASE": "{names} is not in the file, so it was computed from the 4-bit weights,"
    " whose error changes the update by about {share:.0%}",
    "NOISY_UPDATE": "cannot be used with the 4-bit weights, whose error changes the update by"
    " {share:.0%}",
    "DECOMPOSED_FROM_BASE": "its untrained singular values are not in the file, so they were"
    " computed from the 4-bit weights",
    "ARROW_WITHOUT_SEED": "rng_seed is null; this server always uses 0, while PEFT draws a new seed"
    " at every load",
    "COMPONENTS_ADAPT_MORE": "its components also adapt {count!n:module} that it does not target;"
    " only the base is used there",
    "LARGE_UPDATES": "its updates are as large as the weights that they change: {bytes!b} in"
    " host memory, and the same on the device",
    "NO_CONV1D": "fan_in_fan_out is true but has no effect on the base model's linear modules",
    # Adapters that others are built from.
    "COMPONENTS_MISSING": "adapter {path!q:.200} needs its components: {found}",
    "COMPONENT_UNLISTED": "component {component!q:.130} is not listed in {by}",
    "COMPONENT_NOT_REGISTERED": "component {component!q} is not registered; load the adapter with"
    " digest {digest}",
    "COMPONENT_LEAVING": "component {component!q} is being unloaded or replaced",
    "COMPONENT_IS_OTHER": "component {component!q} has digest {found}, expected {digest}",
    "UNFIT_COMPONENT": "component {component!q} ({method}) cannot be used: {why}",
    "NESTED_COMPONENT": "component {component!q} is itself built from components, which is not"
    " supported",
    "UNEQUAL_RANKS": "components have different ranks ({ranks}) in {module}, but use_gks requires"
    " equal ranks",
    "PART_OF_XLORA": "is missing: PEFT saves X-LoRA in parts; join them with `turret convert`",
    # Fusions and merges.
    "WRONG_COMBINATION": "applies only to {owners}, not to {found}",
    "NOT_FUSABLE": "adapter {adapter!q} ({method}) cannot be fused: {why}",
    "NOT_MERGEABLE": "adapter {adapter!q} ({method}) cannot be merged: a merge cannot include its"
    " {parts}",
    "MERGE_OVERFLOWS": "the merged weights of {module} are not finite",
    "NOTHING_TO_FUSE": "no adapter of the mix changes any module",
    "NAME_IS_MEMBER": "{adapter!q} is a member of the mix; choose another name",
    "RANK_REQUIRED": "set rank or energy, because no member has a rank",
    "UNEQUAL_MEMBERS": "members have different ranks in {module} ({ranks}); use the combination"
    " {other} instead",
    "FUSED_RANK": "the fusion needs rank {rank} in {module}, but the server's --max-rank is"
    " {max_rank}",
    "MEMBERS_OVER_BUDGET": "the members need {bytes!b} in fp32, but adapters may use"
    " {host_bytes!b}; raise --adapter-host-bytes",
    "FUSION_UNDER_WAY": "another fusion is running; try again when it has ended",
    "UNLOADED_WHILE_FUSED": "adapter {adapter!q} was unloaded while it was being fused",
    "EMPTY_MIX": "must name at least one adapter",
    "MERGE_ACTIVE": "a merge is active",
    "NOT_MERGED": "no merge is active",
    "MERGED_TWICE": "the weights of adapter {adapter!q} are already merged into the base; omit the"
    " adapter from the request",
    "MERGE_UNDER_WAY": "another merge or unmerge is running",
    # Registered adapters.
    "ADAPTER_NOT_FOUND": "adapter not found: {adapters}",
    "OTHER_GENERATION": "adapter {adapters!q} has no generation {generation}; the current one is"
    " {current_generation}",
    "IS_ALIAS": "{alias!q} is an alias; use the name of the adapter that it stands for",
    "NOT_AN_ALIAS": "alias not found: {alias}",
    "ALIAS_GENERATION": "{alias!q} is an alias and has no generations of its own; omit the"
    " generation",
    "NAME_OF_ALIAS": "{value!q:.130} is the name of an alias; choose another name",
    "NAME_OF_ADAPTER": "{value!q:.130} is the name of an adapter; choose another name",
    "ADAPTER_IS_TARGET": "adapter {adapter!q} is a target of an alias; change or delete {aliases}"
    " first",
    "TOO_MANY_ALIASES": "there are {most} aliases already; delete one first",
    "REGISTERED_AGAIN": "adapter {adapters!q} was registered again after the alias was set",
    "NO_EARLIER_GENERATION": "the server keeps no generation of adapter {adapters!q} earlier than"
    " {current_generation}; --keep-generations sets how many it keeps",
    "BEING_UNLOADED": "adapter {adapters!q} is being unloaded",
    "ADAPTER_EXISTS": "adapter {adapter!q} already exists with different content",
    "ADAPTER_GENERATION": "adapter {adapter!q} has generation {generation}, expected {expected}",
    "ADAPTER_PINNED": "adapter {adapter!q} is pinned",
    "ADAPTER_HELD": "adapter {adapter!q} is still in use after {seconds} s; running"
    " requests: {requests}",
    "ADAPTER_IS_COMPONENT": "adapter {adapter!q} is a component of another adapter; unload"
    " {fusions} first",
    "FILES_CHANGED": "the files of adapter {adapter!q} ({path}) changed after it was loaded;"
    " replace the adapter to serve the new files",
    "FILES_LOST": "the files of adapter {adapter!q} ({path}) are missing or damaged; restore them,"
    " or replace the adapter",
    "CHANGED_DURING_EXPORT": "{path} changed while it was being exported",
    # Uploads and the state directory.
    "STATE_DIR_REQUIRED": "uploaded and fused adapters need a server with --state-dir",
    "STATE_OF_OTHER_BASE": "--state-dir: {path} contains adapters of base model {found!q} with"
    " digest {digest:.12}, but the server has {base_model!q} with digest {base_digest:.12}; use"
    " another directory",
    "STATE_BASE_DAMAGED": "--state-dir: {path} is damaged; restore it, or remove it if the base"
    " model is still the same",
    "STATE_DISK_FULL": "the disk of --state-dir has {free_bytes!b} free, but {needed_bytes!b} are"
    " needed",
    "UPLOAD_TOO_LARGE": "the files take {bytes!b}, but the server's --max-upload-bytes is"
    " {max_upload_bytes!b}",
    "UPLOAD_OVER": "the upload has ended",
    "LONGER_THAN_ANNOUNCED": "has more than the {size} bytes announced",
    "FILES_INTERLEAVE": "starts before {other!q} is complete; send one file at a time",
    "FILE_NOT_ANNOUNCED": "is not in the header, or was already sent",
    "WRONG_SHA256": "does not have the announced SHA-256; send it again",
}
