"""Checks and times every Triton kernel and a whole decode step on the GPU of this machine.

It needs only Python, torch, triton and numpy; ``bench/gpu.sh`` sets the paths and runs it. Each
part first checks its result against float64, and is not measured if the check fails; the other
parts still run. Each row is appended to ``<results>/<gpu>.jsonl`` as soon as it is measured.
Examples::

    bench/gpu.sh --only step    one part
    bench/gpu.sh --tune         search launch parameters
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import torch
from cuda.kernels import KERNELS
from cuda.setting import ROOT, Setting
from cuda.steps import one_step, prefill, same_bits, time_step, time_wide_step
from cuda.tune import tune
from cuda.verdict import verdict
from interpreter import adapt_interpreter

from turret.server.engine.step import gpu_executor as executor

# The step comes first, because it matters most if the time runs out.
PARTS: dict[str, Callable[[Setting], None]] = {
    "step": time_step,
    "wide-step": time_wide_step,
    "prefill": prefill,
    "bits": same_bits,
    **KERNELS,
}
# Parts that run only on request.
BY_NAME: dict[str, Callable[[Setting], None]] = {"one-step": one_step}


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Check and time the Triton kernels on this GPU.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--only", nargs="+", choices=sorted(PARTS | BY_NAME), metavar="PART", help="run these parts"
    )
    parser.add_argument("--list", action="store_true", help="print the names of all parts")
    parser.add_argument("--tune", action="store_true", help="search launch parameters instead")
    parser.add_argument("--verdict", action="store_true", help="judge the results of bench/gpu.sh")
    parser.add_argument("--dry", action="store_true", help="tiny shapes in Triton's interpreter")
    parser.add_argument(
        "--results", type=Path, default=ROOT / "bench" / "results", help="folder for the rows"
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    if args.list:
        print(*PARTS)
        return 0
    if args.verdict:
        return verdict(args.results, is_dry=args.dry)
    if not args.dry and not torch.cuda.is_available():
        print("no CUDA device here; --dry tries everything in the interpreter", file=sys.stderr)
        return 2
    with contextlib.ExitStack() as stack:
        if args.dry:
            # The interpreter takes seconds for each step, so run few.
            adapt_interpreter()
            stack.enter_context(patch.object(executor, "SIGHTS", 2))
        return run((Setting.tiny if args.dry else Setting.full)(args.results), args)


def run(setting: Setting, args: argparse.Namespace) -> int:
    """Run what the arguments ask for; returns the exit status."""
    print(f"{setting.report.name}, torch {torch.__version__}")
    if args.tune:
        tune(setting)
        return 0
    failed = run_parts(setting, args.only or list(PARTS))
    print(f"{setting.report.num_rows} rows in {setting.report.path}")
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def run_parts(setting: Setting, names: list[str]) -> list[str]:
    """Run the parts, independently of failures of earlier ones.

    Returns:
        The failed parts. After a fault that makes the device unusable, no more parts are run.
    """
    failed = []
    for name in names:
        torch.manual_seed(0)
        try:
            (PARTS | BY_NAME)[name](setting)
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
