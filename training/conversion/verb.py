"""``turret convert``. Heavy modules are imported only when it runs."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from turret.server.basics.names import model_place
from turret.training.verbs import with_errors
from turret.training.words import say

_DTYPES = ("bfloat16", "float16", "float32")


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser], text: str) -> None:
    """Add the verb; ``text`` is its line in the help."""
    parser = subparsers.add_parser(
        "convert",
        help=text,
        description="Convert a PSOFT or AdaMSS adapter to an equivalent LoRA. The adapter's files"
        " lack the parts that PEFT computes from the base's weights, so pass the base in full"
        " precision with --base. For an X-LoRA, gather the parts that PEFT saves in several"
        " directories: a classifier, and LoRAs that are loaded one by one.",
    )
    parser.add_argument("adapter", type=Path, metavar="DIR", help="the adapter as saved by PEFT")
    parser.add_argument(
        "--base",
        type=model_place,
        metavar="DIR|ORG/NAME",
        help="the model that the adapter was trained on, not quantised (not needed for an X-LoRA)",
    )
    parser.add_argument(
        "--lora",
        type=Path,
        action="append",
        default=[],
        metavar="DIR",
        help="a LoRA of the X-LoRA, if the LoRAs have moved since training; pass all, in order",
    )
    parser.add_argument(
        "--output", type=Path, required=True, metavar="DIR", help="directory for the result"
    )
    parser.add_argument(
        "--dtype",
        choices=_DTYPES,
        help="dtype of the base during training (default: that of its files)",
    )
    parser.add_argument(
        "--device",
        choices=("cpu", "cuda"),
        default="cpu",
        help="device that was used in training, if this machine has it, because the results of a"
        " decomposition depend on the device (default: %(default)s)",
    )
    parser.add_argument("-q", "--quiet", action="store_true", help="show no progress")
    parser.set_defaults(func=with_errors(_convert))


def _convert(args: argparse.Namespace) -> None:
    from turret.server.command.entry import ending_at_interrupts
    from turret.server.command.preflight import without_cuda
    from turret.training.conversion.kinds import check_conversion
    from turret.training.words import ConfigError, RunError

    if args.device == "cuda" and (why := without_cuda()):
        raise ConfigError.of("--device", why)
    check_conversion(args.adapter, args.base, args.output)

    from turret.training.run.progress import training_progress

    with training_progress("convert", stays=False, is_quiet=args.quiet) as listen:
        with ending_at_interrupts("stopped"):
            import torch

            from turret.training.conversion.converter import convert
        if args.device == "cuda" and not torch.cuda.is_available():
            raise RunError(say("NO_CUDA_DEVICE", device="--device cuda"))
        done, notes = convert(
            args.adapter,
            args.base,
            args.output,
            loras=args.lora,
            dtype=None if args.dtype is None else getattr(torch, args.dtype),
            device=args.device,
            progress=lambda what, *counts: listen(
                {"kind": "phase", "text": "{}: {} of {}".format(what, *counts)}
            ),
        )
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    print(done)
