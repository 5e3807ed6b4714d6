"""Try hfkd on what users may bring: recipes, data folders and run folders, changed at random.

python scripts/fuzz.py [--recipes 1000] [--data 200] [--runs 200] [--seed 0] [--jobs N] [--log FILE] [--case JSON]

Each case is one command in a process of its own, on tiny networks and images and for two steps. It must end in one of
two ways: the command does what was asked, with right results, or it refuses with one message. Everything else is a
failure: a traceback, a hang, too much memory, a mistake that passes in silence, a message that comes only after
training, a wrong result, or a change of files that are not hfkd's.

The script prints a table of the outcomes, and for each kind of failure the smallest example with the command that
repeats it. The exit code is 1 if there is a failure. Needs hypothesis: pip install -e ".[fuzz]".
"""

import argparse
import collections
import json
import multiprocessing
import os
import shlex
import sys
import tempfile
import time
from multiprocessing.pool import Pool
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"  # processes are forked, and share the cores

from fuzzing import data_folders, recipes, run_folders  # noqa: E402
from fuzzing.cases import FAILURES, GOOD, Outcome, run_case  # noqa: E402
from fuzzing.ground import build_ground, import_all  # noqa: E402
from hypothesis import HealthCheck, Phase, given, seed, settings  # noqa: E402
from hypothesis.strategies import SearchStrategy  # noqa: E402

SORTS = {"recipes": recipes, "data": data_folders, "runs": run_folders}


def draw(strategy: SearchStrategy, number: int, first_seed: int) -> list[dict]:
    """Return different cases; each holds a list of changes."""
    found: dict[str, dict] = {}
    for attempt in range(20):

        @seed(first_seed * 1000 + attempt)
        @settings(
            max_examples=number,
            database=None,
            deadline=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(strategy)
        def collect(case):
            found.setdefault(json.dumps(case), case)

        if len(found) < number:
            collect()
    return list(found.values())[:number]


def run(job: tuple[str, dict, Path]) -> Outcome:
    sort, case, ground = job
    with tempfile.TemporaryDirectory(dir=ground.parent) as folder:
        return run_case(SORTS[sort], case, ground, Path(folder))


def smallest(sort: str, outcomes: list[tuple[dict, Outcome]], ground: Path) -> dict:
    """Return the case with the fewest changes, of which none can be left out without another outcome."""
    case, outcome = min(outcomes, key=lambda pair: (len(pair[0]["changes"]), len(json.dumps(pair[0]))))
    for change in list(case["changes"]):
        fewer = case | {"changes": [other for other in case["changes"] if other is not change]}
        if len(case["changes"]) > 1 and run((sort, fewer, ground)).kind == outcome.kind:
            case = fewer
    return case


def run_sort(sort: str, number: int, args: argparse.Namespace, ground: Path, pool: Pool) -> list[tuple[dict, Outcome]]:
    """Run the cases of one sort, print their row of the table, and return them with their outcomes."""
    start = time.perf_counter()
    cases = draw(SORTS[sort].cases(), number, args.seed)
    outcomes = []
    for case, outcome in zip(cases, pool.imap(run, [(sort, case, ground) for case in cases]), strict=True):
        outcomes.append((case, outcome))
        if args.log:
            entry = {"sort": sort, "outcome": outcome.name, "detail": outcome.detail, "case": case}
            with open(args.log, "a") as log:
                log.write(json.dumps(entry) + "\n")
    counts = collections.Counter(outcome.name for _, outcome in outcomes)
    cells = [sort, len(cases), *(counts[name] for name in (*GOOD, *FAILURES))]
    cells += [f"{time.perf_counter() - start:.0f}", max(outcome.peak for _, outcome in outcomes) >> 20]
    print("| " + " | ".join(map(str, cells)) + " |", flush=True)
    return outcomes


def report(sort: str, outcomes: list[tuple[dict, Outcome]], ground: Path) -> None:
    """Print each kind of failure with its smallest example."""
    kinds = collections.defaultdict(list)
    for case, outcome in outcomes:
        if outcome.name not in GOOD:
            kinds[outcome.kind].append((case, outcome))
    for (name, detail), found in sorted(kinds.items()):
        example = smallest(sort, found, ground)
        print(f"\n{sort}, {name}, {len(found)} of {len(outcomes)}: {detail}")
        print(f"  python scripts/fuzz.py --case {shlex.quote(json.dumps({'sort': sort} | example))}")


def repeat(text: str, ground: Path) -> Outcome:
    """Run one case and show all that it prints; its folder is left behind."""
    case = json.loads(text)
    folder = Path(tempfile.mkdtemp(prefix="fuzz-case-"))
    outcome = run_case(SORTS[case.pop("sort")], case, ground, folder)
    print(f"{outcome.printed}\nOutcome: {outcome.name}. {outcome.detail}\nThe folder of the case: {folder}")
    return outcome


def main(argv: list[str] | None = None) -> int:
    """Run the cases that the command line asks for, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for sort, number in (("recipes", 1000), ("data", 200), ("runs", 200)):
        parser.add_argument(f"--{sort}", type=int, default=number, help=f"number of cases (default: {number})")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes (default: one a core)")
    parser.add_argument("--log", help="file to which each outcome is added, as a line of JSON")
    parser.add_argument("--case", help="run this case only")
    args = parser.parse_args(argv)
    import_all()
    with tempfile.TemporaryDirectory(prefix="fuzz-") as scratch:
        ground = Path(scratch).resolve() / "ground"
        build_ground(ground)
        if args.case:
            return int(repeat(args.case, ground).name not in GOOD)
        print("| sort | cases | " + " | ".join((*GOOD, *FAILURES)) + " | seconds | peak MiB |")
        print("|---" * (4 + len(GOOD) + len(FAILURES)) + "|")
        with multiprocessing.get_context("fork").Pool(args.jobs) as pool:
            numbers = {sort: getattr(args, sort) for sort in SORTS}
            ran = {sort: run_sort(sort, number, args, ground, pool) for sort, number in numbers.items() if number}
        for sort, outcomes in ran.items():
            report(sort, outcomes, ground)
    return int(any(outcome.name not in GOOD for outcomes in ran.values() for _, outcome in outcomes))


if __name__ == "__main__":
    exit_code = main()
    sys.stdout.flush()
    os._exit(exit_code)  # Python's own end reports objects of C++ libraries that `gc.freeze` keeps
