"""Hostile input by the hundred thousand: mutated files through every reader.

Each file is a valid one with one to four changes, made from its number, so any of them can be
made again (``--reader cif --only 4711``). A worker process with a limited address space reads them;
a file may take so many seconds of processor time, after which the worker is ended. Counted are
crashes, hangs, exceptions that leave ``read_file``, code that was run (an audit hook: processes,
sockets, pickles, files opened for writing, the import of a module that only the files name), and
structures that no second library reads the same way. Files at fault are kept in a folder.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import re
import resource
import signal
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from _fuzz_oracles import second_opinion
from _fuzz_seeds import CANARY, all_seeds, mutated
from _table import RESULTS, Table, write_tables

from matxfer.crystal import CrystalError
from matxfer.readers import read_file

if TYPE_CHECKING:
    from collections.abc import Iterator
    from multiprocessing.connection import Connection

#: Share of the files by reader; the careful CIF path takes 10 ms a file, so it has fewer.
SHARES = {"cif": 8, "extxyz": 4, "poscar": 4, "pymatgen json": 2, "cif without operations": 1}
#: A worker that does nothing for so long has gone to sleep for good.
_ASLEEP_S = 600.0
#: Files between two words with a worker: on a busy machine every word waits for its turn.
BATCH = 500
#: Audit events that no file may cause.
_FORBIDDEN = ("pickle.find_class", "os.system", "subprocess.Popen", "os.exec", "os.posix_spawn",
              "os.fork", "socket.connect", "socket.bind", "ctypes.dlopen", "os.remove", "os.rename",
              "shutil.rmtree", "os.symlink", "code.__new__")  # fmt: skip


@dataclass
class Tally:
    """What became of the files of one reader."""

    files: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)
    opinions: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    seconds: float = 0.0
    slowest: tuple[float, int] = (0.0, -1)
    peak_mib: float = 0.0


# -- the worker -----------------------------------------------------------------------------------
class Watch:
    """An audit hook that writes down what reading a file may never do."""

    def __init__(self, folder: Path) -> None:
        self.seen: list[str] = []
        self.on, self.folder = False, str(folder)
        sys.addaudithook(self._hook)

    def _hook(self, event: str, words: tuple[Any, ...]) -> None:
        if not self.on:
            return
        if event in _FORBIDDEN or (event == "import" and CANARY in str(words[0])):
            self.seen.append(f"{event} {words!r:.200}")
        writing = event == "open" and isinstance(words[1], str) and set(words[1]) & set("wax+")
        if writing and not str(words[0]).startswith(("/dev/null", self.folder)):
            self.seen.append(f"open for writing {words!r:.200}")


def work(pipe: Connection, current: Any, memory_mib: int, limit_s: float) -> None:
    """Read the files of the batches that the pipe names; ``current`` holds the file in hand."""
    # The default action ends the process, in whatever library it is; of its own time, since the
    # machine may be busy with others.
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (memory_mib * 2**20,) * 2)
    sys.stderr = Path(os.devnull).open("w")  # noqa: SIM115 - for the life of the process
    seeds = all_seeds()
    with tempfile.TemporaryDirectory(dir=_memory_folder()) as folder:
        watch = Watch(Path(folder))
        for one in seeds.values():  # whatever is imported on first use is now
            for content in one.contents:
                _read(Path(folder) / one.name, content)
        pipe.send("ready")
        while (batch := pipe.recv()) is not None:
            reader, numbers = batch
            path = Path(folder) / seeds[reader].name
            answers = []
            for number in numbers:
                current.value = number
                answers.append(_one(path, mutated(seeds[reader], number), watch, limit_s))
            pipe.send(answers)


def _one(path: Path, data: bytes, watch: Watch, limit_s: float) -> tuple[Any, ...]:
    signal.setitimer(signal.ITIMER_PROF, limit_s)
    start = time.process_time()
    watch.on = True
    entries, failure = _read(path, data)
    watch.on = False
    seconds = time.process_time() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    crystals, reasons, seen = [], [], watch.seen[:]
    watch.seen.clear()
    for entry in entries:
        if entry.error is not None:
            reasons.append(entry.error.reason)
            continue
        try:
            entry.crystal.check_distances()  # as the graph does
            crystals.append(entry.crystal)
        except CrystalError as error:
            reasons.append(error.reason)
    signal.setitimer(signal.ITIMER_PROF, 0)
    opinion = ""
    if crystals and not reasons and not failure:
        try:
            opinion = second_opinion(path, data, crystals)
        except Exception as error:  # noqa: BLE001 - memory, mostly
            opinion = f"the comparison fails: {type(error).__name__}"
    return failure, reasons, len(crystals), opinion, seen, seconds, peak


def _memory_folder() -> str | None:
    return "/dev/shm" if Path("/dev/shm").is_dir() else None


def _read(path: Path, data: bytes) -> tuple[list[Any], str]:
    path.write_bytes(data)
    entries = []
    try:
        entries.extend(read_file(path))
    except BaseException as error:  # noqa: BLE001 - this is what we look for
        return entries, f"{type(error).__name__}: {error}"
    if not entries:
        return entries, "neither a structure nor an error"
    return entries, ""


# -- this process ---------------------------------------------------------------------------------
class Worker:
    """A worker process and its pipe; a new one takes the place of one that has died."""

    def __init__(self, memory_mib: int, limit_s: float) -> None:
        self.limits = memory_mib, limit_s
        self._start()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.current = context.Value("q", -1, lock=False)
        words = (theirs, self.current, *self.limits)
        self.process = context.Process(target=work, args=words, daemon=True)
        self.process.start()
        theirs.close()
        self.pipe.recv()  # it has imported everything

    def answers(self, reader: str, numbers: range) -> Iterator[tuple[int, Any]]:
        """Yield each number and its answer, or the words for how it ended the worker."""
        if not numbers:
            return
        self.pipe.send((reader, numbers))
        try:
            if self.pipe.poll(_ASLEEP_S):
                yield from zip(numbers, self.pipe.recv(), strict=True)
                return
            self.process.kill()
        except (EOFError, ConnectionError):
            pass
        self.process.join()
        code, culprit = self.process.exitcode, int(self.current.value)
        ends = {-signal.SIGPROF: "hang", -signal.SIGKILL: "hang, asleep"}
        self._start()
        yield culprit, ends.get(code, f"crash, exit code {code}")
        yield from self.answers(reader, range(numbers.start, culprit))
        yield from self.answers(reader, range(culprit + 1, numbers.stop))


def kind_of_reason(reason: str) -> str:
    """Return a reason without what is of this file only."""
    reason = re.sub(r"'[^']*'|\"[^\"]*\"|\([^)]*\)?|\d[\d.e+-]*", "…", reason)
    return " ".join(reason.split()[:7])


def run(numbers: dict[str, range], args: argparse.Namespace) -> dict[str, Tally]:
    """Read all files; return the tallies by reader."""
    worker = Worker(args.memory, args.seconds)
    tallies = {reader: Tally() for reader in numbers}
    seeds = all_seeds()
    args.faults.mkdir(parents=True, exist_ok=True)
    for reader, these in numbers.items():
        tally = tallies[reader]
        batches = [these[k : k + BATCH] for k in range(0, len(these), BATCH)]
        for number, answer in (a for batch in batches for a in worker.answers(reader, batch)):
            tally.files += 1
            if isinstance(answer, str):
                fault = answer
                tally.outcomes[answer] += 1
            else:
                failure, reasons, n, opinion, leftover, seconds, peak = answer
                fault = failure or "; ".join(leftover)
                if opinion.startswith("DIFFERENT"):
                    fault = fault or opinion
                tally.outcomes[_outcome(failure, reasons, n)] += 1
                tally.reasons.update({kind_of_reason(reason) for reason in reasons})
                if n and not reasons and not failure:
                    tally.opinions[opinion.split(":")[0] if opinion else "the same"] += 1
                tally.seconds += seconds
                tally.slowest = max(tally.slowest, (seconds, number))
                tally.peak_mib = max(tally.peak_mib, peak)
            if fault:
                tally.faults.append(f"{number}: {fault}")
                path = args.faults / f"{reader.replace(' ', '-')}-{number}-{seeds[reader].name}"
                path.write_bytes(mutated(seeds[reader], number))
                print(f"{reader} {number}: {fault[:300]}", flush=True)
        print(f"{reader}: {tally.files} files, {dict(tally.outcomes)}, {dict(tally.opinions)}, "
              f"slowest {tally.slowest}, peak {tally.peak_mib:.0f} MiB", flush=True)  # fmt: skip
    worker.pipe.send(None)
    return tallies


def _outcome(failure: str, reasons: list[str], n: int) -> str:
    if failure:
        return "exception"
    return "read" if not reasons else "partly read" if n else "refused"


def main() -> None:
    """Run the campaign and write the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--files", type=int, default=100_000, help="files in all")
    parser.add_argument("--first", type=int, default=0, help="number of the first file per reader")
    parser.add_argument("--reader", action="append", help="this reader only; may be repeated")
    parser.add_argument("--only", type=int, help="this file only")
    parser.add_argument("--seconds", type=float, default=10.0, help="of processor time per file")
    parser.add_argument("--memory", type=int, default=3072, help="address space of a worker, MiB")
    parser.add_argument(
        "--faults", type=Path, default=Path("fuzz-faults"), help="folder of files at fault"
    )
    parser.add_argument("--output", type=Path, default=RESULTS / "fuzz_readers.md")
    args = parser.parse_args()
    readers = args.reader or list(all_seeds())
    total = sum(SHARES.get(reader, 1) for reader in readers)
    numbers = {
        reader: range(args.first, args.first + -(-args.files * SHARES.get(reader, 1) // total))
        for reader in readers
    }
    if args.only is not None:
        numbers = dict.fromkeys(readers, range(args.only, args.only + 1))
    start = time.perf_counter()
    tallies = run(numbers, args)
    if args.only is None:
        report(tallies, args, time.perf_counter() - start)


def report(tallies: dict[str, Tally], args: argparse.Namespace, seconds: float) -> None:
    """Write the tables."""
    good = ("read", "partly read", "refused")
    opinions = ("the same", "DIFFERENT")
    rows = []
    for reader, t in tallies.items():
        rows.append([
            reader, f"{t.files:,}", *(f"{t.outcomes[name]:,}" for name in good),
            f"{sum(n for name, n in t.outcomes.items() if name not in good)}",
            f"{t.opinions['the same']:,}",
            f"{sum(n for name, n in t.opinions.items() if name not in opinions):,}",
            f"{t.opinions['DIFFERENT']}", f"{1e3 * t.seconds / max(t.files, 1):.1f}",
            f"{t.slowest[0]:.2f} (no. {t.slowest[1]})", f"{t.peak_mib:.0f}",
        ])  # fmt: skip
    columns = ["reader", "files", *good, "crash, hang, exception", "second library the same",
               "no second opinion", "different", "ms per file", "slowest, s",
               "peak MiB"]  # fmt: skip
    reasons: Counter[str] = Counter()
    for tally in tallies.values():
        reasons.update(tally.reasons)
    tables = [
        Table("Files", columns, rows),
        Table("Reasons of refusal, the most frequent", ["reason", "files"],
              [[reason, f"{n:,}"] for reason, n in reasons.most_common(30)]),
    ]  # fmt: skip
    faults = [[reader, text] for reader, t in tallies.items() for text in t.faults]
    if faults:
        tables.append(
            Table("At fault", ["reader", "file and fault"], [[a, b[:160]] for a, b in faults[:60]])
        )
    n = sum(t.files for t in tallies.values())
    watched = (
        "Watched by an audit hook: no process, socket, pickle, dynamic library, file written or "
        "module imported at the word of a file; a breach would count as at fault."
    )
    asked = (
        "A second opinion is asked for where a file is read whole: for CIF gemmi's own expansion, "
        "then pymatgen, then ASE (one has to agree on sites, composition, volume and distances up "
        "to 4 Å); for the others another way through pymatgen, ASE, pandas or pyarrow. 'No second "
        "opinion': the other reader fails, or there is none (archives, ASE's own formats)."
    )
    facts = [
        f"{n:,} mutated files in {seconds / 60:.0f} minutes, one process; {len(faults)} at fault.",
        f"Limits: {args.seconds:g} s of processor time a file, {args.memory} MiB of address space.",
        watched,
        asked,
    ]
    write_tables(args.output, "Mutated files through every reader", facts, tables)


if __name__ == "__main__":
    main()
