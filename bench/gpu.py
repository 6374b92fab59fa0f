"""Checks and times every Triton kernel and a whole decode step on the GPU of this machine.

It takes less than nine minutes on a machine with only Python, torch, triton and numpy
(``bench/gpu.sh`` sets the paths and also runs the kernel tests). Each part first checks its result
against float64, and is not measured if the check fails; the other parts still run. Rows are
appended to ``bench/results/<gpu>.jsonl`` at once::

    bench/gpu.sh                     everything
    python bench/gpu.py --only step  one part
    python bench/gpu.py --dry-run    tiny shapes in Triton's interpreter, to test the benchmark
"""

from __future__ import annotations

import argparse
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
from cuda.kernels import KERNELS
from cuda.setting import ROOT, Setting
from cuda.steps import one_step, time_step
from cuda.tune import tune

# The step comes first, because it matters most if the time runs out.
PARTS: dict[str, Callable[[Setting], None]] = {"step": time_step, **KERNELS}
# Parts that run only on request.
BY_NAME: dict[str, Callable[[Setting], None]] = {"one step": one_step}


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Check and time the Triton kernels on this GPU.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--only", choices=sorted(PARTS | BY_NAME), help="run one part")
    parser.add_argument(
        "--budget-seconds", type=float, default=480, help="time after which no part is started"
    )
    parser.add_argument("--tune", action="store_true", help="search launch parameters instead")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes in the interpreter")
    parser.add_argument(
        "--results", type=Path, default=ROOT / "bench" / "results", help="folder for the rows"
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    if not args.dry_run and not torch.cuda.is_available():
        print("no CUDA device here; --dry-run tries everything in the interpreter", file=sys.stderr)
        return 2
    setting = (Setting.tiny if args.dry_run else Setting.full)(args.results)
    print(f"{setting.report.name}, torch {torch.__version__}")
    if args.tune:
        tune(setting)
        return 0
    failed = run_parts(setting, args.only, args.budget_seconds)
    print(f"{setting.report.num_rows} rows in {setting.report.path}")
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def run_parts(setting: Setting, only: str | None, budget_seconds: float) -> list[str]:
    """Run the parts, independently of failures of earlier ones.

    Returns:
        The failed parts. After a fault that makes the device unusable, no more parts are run.
    """
    start, failed = time.monotonic(), []
    for name, part in PARTS.items() if only not in BY_NAME else BY_NAME.items():
        if only not in (None, name):
            continue
        if time.monotonic() - start > budget_seconds:
            print(f"{name}: skipped, over {budget_seconds:.0f} s")
            continue
        torch.manual_seed(0)
        try:
            part(setting)
        except AssertionError as error:
            failed.append(name)
            print(f"{name}: WRONG, not timed: {error}", file=sys.stderr)
        except Exception:
            failed.append(name)
            print(f"{name}: failed", file=sys.stderr)
            traceback.print_exc()
            if not _is_usable(setting.device):
                print("the device is unusable now: no more parts", file=sys.stderr)
                break
    return failed


def _is_usable(device: torch.device) -> bool:
    if device.type != "cuda":
        return True
    try:
        torch.cuda.empty_cache()
        torch.cuda.synchronize(device)
    except RuntimeError:
        return False
    return True


if __name__ == "__main__":
    sys.exit(main())
