"""Writes the data sets for ``turret train`` and ``turret eval``, and the demo prompts.

Run from anywhere::

    python examples/write_data.py            # write
    python examples/write_data.py --check    # exit with 1 if a file is not what would be written

``data/<task>.train.jsonl``, ``data/<task>.test.jsonl`` and the training set of a fusion come from
disjoint pools. The script also rewrites the rows of ``prompts.jsonl`` for the adapters that were
made by ``turret train``.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from tasks import DATA, Example

HERE = Path(__file__).resolve().parent
# Adapter, whose config is train/<adapter>.toml → task
ADAPTERS = {
    "headline-rslora": "headline",
    "headline-loha": "headline",
    "language-lora": "language",
    "language-lokr": "language",
    "label-ia3": "label",
    "label-prefix": "label",
    "sentiment-dora": "sentiment",
    "sentiment-prompt": "sentiment",
    "sentiment-ptuning": "sentiment",
}
# Fusion, whose config is train/<fusion>.toml → the tasks that its training set mixes
FUSIONS = {"json-sql": ("json", "sql")}
TRAIN_EXAMPLES = 400
FUSION_EXAMPLES = 2000
TEST_EXAMPLES = 48
DEMO_EXAMPLES = 3
SEED = 0


def to_jsonl(examples: list[Example]) -> str:
    """Returns rows of ``prompt`` and ``completion``."""
    rows = [{"prompt": e.prompt, "completion": e.completion} for e in examples]
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def data_files() -> dict[Path, str]:
    """Returns path → content: every test set, and the training sets for ``turret train``."""
    contents = {}
    for task in DATA.values():
        examples = {"test": task.examples("test", TEST_EXAMPLES, SEED)}
        if task.name in ADAPTERS.values():
            examples["train"] = task.examples("train", TRAIN_EXAMPLES, SEED)
        for split, drawn in examples.items():
            contents[HERE / "data" / f"{task.name}.{split}.jsonl"] = to_jsonl(drawn)
    for fusion, tasks in FUSIONS.items():
        share = FUSION_EXAMPLES // len(tasks)
        drawn = [DATA[task].examples("fusion", share, SEED) for task in tasks]
        mixed = [example for row in zip(*drawn, strict=True) for example in row]
        contents[HERE / "data" / f"{fusion}.train.jsonl"] = to_jsonl(mixed)
    return contents


def demo_rows() -> list[dict[str, str]]:
    """Returns the rows of ``prompts.jsonl`` of these adapters: their tasks' first test examples."""
    return [
        {
            "adapter": adapter,
            "prompt": example.prompt,
            "expected": example.completion,
            "check": "equals",
        }
        for adapter, task in ADAPTERS.items()
        for example in DATA[task].examples("test", TEST_EXAMPLES, SEED)[:DEMO_EXAMPLES]
    ]


def prompts_file() -> tuple[Path, str]:
    """Returns path and content of ``prompts.jsonl``; rows of other adapters stay."""
    path = HERE / "prompts.jsonl"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    rows = [row for row in rows if row["adapter"] not in ADAPTERS] + demo_rows()
    return path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def main() -> int:
    parser = argparse.ArgumentParser(description="Writes the examples' data and prompts.")
    parser.add_argument("--check", action="store_true", help="write nothing, compare")
    arguments = parser.parse_args()
    prompts, content = prompts_file()
    differing = 0
    for path, text in {**data_files(), prompts: content}.items():
        if arguments.check:
            is_same = path.exists() and path.read_text(encoding="utf-8") == text
            differing += not is_same
            if not is_same:
                print(f"{path.relative_to(HERE)} is not what {Path(__file__).name} writes")
        else:
            path.parent.mkdir(exist_ok=True)
            path.write_text(text, encoding="utf-8")
    return 1 if differing else 0


if __name__ == "__main__":
    sys.exit(main())
