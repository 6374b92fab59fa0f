"""How routing by mix does against dealing evenly, on simulated replicas with measured step costs.

    python bench/fleet.py [--adapters 10000] [--replicas 1 2 4 8 16 32 64] [--svg FILE]

The trace is S-LoRA's (arXiv 2311.03285, section 7): Gamma arrivals, Zipf popularity. Its rate grows
with the fleet. Of its second half, when memories are full, is told: requests/s that end on each
replica, the share of requests whose adapter had to be read, the share whose first token came within
six seconds (S-LoRA's SLO), and the 99th percentile of the time to it, undisturbed and while a
replica is lost and comes back.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from html import escape
from pathlib import Path

from scale.fleet_model import Costs, Job, Route, Run, by_mix, evenly, simulate
from scale.workload import LENGTHS, Workload, draw

SLO_SECONDS = 6.0
ROUTES: Mapping[str, Callable[[int], Route]] = {"by mix": by_mix, "evenly": evenly}


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One fleet under one way of routing."""

    replicas: int
    route: str
    requests_per_second: float
    cold_share: float
    slo_share: float
    p99_seconds: float
    p99_killed_seconds: float | None


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that a share of all does not exceed."""
    ordered = sorted(values)
    return ordered[min(int(share * len(ordered)), len(ordered) - 1)]


def second_half(run: Run) -> list[Job]:
    """The requests that came when memories were full."""
    return [job for job in run.jobs if job.asked >= run.seconds * 500]


def first_tokens(run: Run) -> list[float]:
    """Seconds to each one's first token; what it has waited so far where none came."""
    end = run.seconds * 1e3
    return [
        ((end if job.first is None else job.first) - job.asked) / 1e3 for job in second_half(run)
    ]


def measure(args: argparse.Namespace, count: int, name: str) -> Row:
    """One fleet under one way of routing."""
    adapters = [f"adapter{number}" for number in range(args.adapters)]
    rate = args.rate * count
    prompt, new = LENGTHS[args.lengths]
    trace = draw(
        Workload(
            int(rate * args.seconds),
            rate,
            exponent=args.exponent,
            prompt_tokens=prompt,
            new_tokens=new,
        ),
        adapters,
    )
    costs = Costs(cold=args.cold_ms)
    run = simulate(trace, count, ROUTES[name](count), room=args.room, costs=costs)
    asked, times = second_half(run), first_tokens(run)
    killed = None
    if count > 1:
        middle = args.seconds * 0.6
        lost = simulate(
            trace, count, ROUTES[name](count), room=args.room, costs=costs, kill_at=middle
        )
        killed = percentile(first_tokens(lost), 0.99)
    return Row(
        replicas=count,
        route=name,
        requests_per_second=sum(t >= run.seconds / 2 for t in run.ends) / (run.seconds / 2) / count,
        cold_share=sum(job.is_cold for job in asked) / len(asked),
        slo_share=sum(time <= SLO_SECONDS for time in times) / len(times),
        p99_seconds=percentile(times, 0.99),
        p99_killed_seconds=killed,
    )


def shown(rows: Sequence[Row]) -> str:
    """A table for a person."""
    lines = ["replicas  route    req/s each   cold    in SLO   p99 first   while one is killed"]
    for row in rows:
        killed = "" if row.p99_killed_seconds is None else f"{row.p99_killed_seconds:.2f} s"
        lines.append(
            f"{row.replicas:>8}  {row.route:<8}{row.requests_per_second:>10.2f}"
            f"{row.cold_share:>8.1%}{row.slo_share:>9.1%}{row.p99_seconds:>10.2f} s{killed:>18}"
        )
    return "\n".join(lines)


def draw_svg(rows: Sequence[Row], caption: str) -> str:
    """Cold share and requests/s by number of replicas, both ways of routing."""
    counts = sorted({row.replicas for row in rows})
    colors = dict(zip(ROUTES, ("#3b6ea5", "#b5563b"), strict=True))
    body: list[str] = []
    panels: Sequence[tuple[float, str, Callable[[Row], float]]] = (
        (60.0, "requests whose adapter had to be read", lambda row: row.cold_share),
        (500.0, "requests/s on each replica", lambda row: row.requests_per_second),
    )
    for left, title, value in panels:
        top = 1.15 * max(max(map(value, rows)), 1e-9)
        body.append(f'<text x="{left + 150}" y="32" text-anchor="middle">{escape(title)}</text>')
        xs = {c: left + 300 * i / max(len(counts) - 1, 1) for i, c in enumerate(counts)}
        for name, color in colors.items():
            points = [
                (xs[row.replicas], 272 - 216 * value(row) / top)
                for row in rows
                if row.route == name
            ]
            path = "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
            body.append(f'<path d="M{path}" fill="none" stroke="{color}" stroke-width="2"/>')
        for count, x in xs.items():
            body.append(f'<text x="{x:.1f}" y="290" text-anchor="middle">{count}</text>')
        body.append(
            f'<text x="{left + 150}" y="308" text-anchor="middle" fill="#777">replicas</text>'
        )
        for part in (0.0, 0.5, 1.0):
            text, y = f"{part * top / 1.15:.2g}", 272 - 216 * part / 1.15
            body.append(f'<text x="{left - 8}" y="{y:.1f}" text-anchor="end">{text}</text>')
    for index, (name, color) in enumerate(colors.items()):
        body.append(f'<text x="{380 + 60 * index}" y="60" fill="{color}">{name}</text>')
    body.append(f'<text x="430" y="328" text-anchor="middle" fill="#777">{escape(caption)}</text>')
    head = (
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 860 340" font-family="sans-serif"'
        ' font-size="12"><rect width="860" height="340" fill="#fff"/>'
    )
    return "\n".join([head, *body, "</svg>\n"])


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    made.add_argument("--replicas", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64])
    made.add_argument("--adapters", type=int, default=10_000)
    made.add_argument("--room", type=int, default=150, help="adapters that a replica keeps")
    made.add_argument("--rate", type=float, default=8.0, help="requests/s for each replica")
    made.add_argument("--seconds", type=float, default=200.0, help="of the trace")
    made.add_argument("--exponent", type=float, default=1.0, help="of the adapters' popularity")
    made.add_argument("--lengths", choices=sorted(LENGTHS), default="short")
    made.add_argument(
        "--cold-ms", type=float, default=Costs().cold, help="what a cold adapter takes"
    )
    made.add_argument("--json", type=Path, help="where to write the rows")
    made.add_argument("--svg", type=Path, help="where to draw them")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    rows = [measure(args, count, name) for count in args.replicas for name in ROUTES]
    print(shown(rows))
    if args.json is not None:
        args.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    if args.svg is not None:
        caption = (
            f"{args.adapters:,} adapters, Zipf {args.exponent:g}; {args.room} in the memory of a"
            f" replica; {args.rate:g} requests/s for each; simulated"
        )
        args.svg.write_text(draw_svg(rows, caption))
    return 0


if __name__ == "__main__":
    sys.exit(main())
