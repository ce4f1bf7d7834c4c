"""The phases that measure: stages, blocks, models."""

import torch

from mnet_kernels.bench import card, compare, providers, shapes, stage_subjects, table
from mnet_kernels.bench.subjects import Setting

# Seconds that must be left to begin a subject.
RESERVE = {"stage": 15, "block": 40, "model": 90}
# Compilation may not use up the last seconds, in which the rows are timed and written.
TIMING_RESERVE = 10


def stages(session):
    """Every stage of the models' blocks; those that a fused backend has a kernel for come first."""
    fused = stage_subjects.runnable(session.device)
    subjects = stage_subjects.stages(session.args.models, session.args.width, session.args.resolution)
    subjects.sort(key=lambda subject: not any(subject.runs_on(p) for p in fused))
    _announce(session, fused, "has a kernel for any stage")
    _measure(session, subjects, _wanted(session, ("nchw", "eager", "compile"), fused, stage_subjects.parse))


def blocks(session):
    """Every distinct block of the models."""
    _networks(session, shapes.blocks)


def models(session):
    """The models' training steps."""
    _networks(session, shapes.models)


def _networks(session, list_subjects):
    args = session.args
    subjects = list_subjects(args.models, args.width, args.resolution)
    fused = providers.runnable(session.device)
    _announce(session, fused, "is whole: only plain torch is measured")
    _measure(session, subjects, _wanted(session, ("nchw", "eager", "compile"), fused, providers.parse), ["train"])
    if not args.providers:  # what takes longest comes last
        _measure(session, subjects, [providers.NATIVE["max-autotune"]], ["train"])
        _measure(session, subjects, _wanted(session, ("eager", "compile"), fused, providers.parse), ["forward"])


def _announce(session, fused, what):
    names = ", ".join(p.name for p in fused)
    session.say(f"fused: {names}" if fused else f"no fused backend {what} on {session.device.type}")


def _wanted(session, native, fused, parse):
    asked = session.args.providers
    if not asked:
        return [providers.NATIVE[name] for name in native] + fused
    rest = [name for name in asked if name not in providers.NATIVE]
    return [providers.NATIVE[name] for name in asked if name in providers.NATIVE] + parse(rest, session.device)


def _rates(session):
    """The card's own rates, measured once a header."""
    if "card" not in session.results.header:
        sizes = card.REHEARSAL if session.device.type == "cpu" else None
        session.results.header["card"] = card.rates(session.device, min(1.0, session.args.seconds), sizes)
        session.results.write()
        found = session.results.header["card"]
        matrix = ", ".join(f"{name} {rate / 1e12:.1f}" for name, rate in found["matrix_flops"].items())
        session.say(f"copy {found['copy_bytes_per_s'] / 1e9:.0f} GB/s; matrix product, TFLOP/s: {matrix}")
    return session.results.header["card"]


def _measure(session, subjects, wanted, directions=None):
    args = session.args
    rates = session.part("the card's rates", lambda: _rates(session))
    torch.backends.cudnn.benchmark = True
    setting = Setting(session.device, args.batch, args.amp)
    subjects = [s for s in subjects if args.only is None or args.only in s.name][: args.first]
    launches = compare.LAUNCHES if session.device.type == "cuda" else compare.LAUNCHES[:1]
    for subject in subjects:
        todo = [
            (direction, launch)
            for direction in directions or subject.directions
            for launch in launches
            if any(
                session.results.find(compare.key(subject, setting, direction, launch, p.name)) is None
                for p in wanted
                if subject.runs_on(p)
            )
        ]
        if not todo:
            continue
        if not session.time_for(subject.name, RESERVE[subject.level]):
            return
        session.part(
            subject.name, lambda subject=subject, todo=todo: _one(session, subject, wanted, setting, todo, rates)
        )
        if session.device.type == "cuda":
            torch.cuda.empty_cache()


def _one(session, subject, wanted, setting, todo, rates):
    args = session.args
    directions = list(dict.fromkeys(direction for direction, _ in todo))
    prepared = compare.prepare(subject, wanted, setting, directions, limit=session.remaining() - TIMING_RESERVE)
    for direction, launch in todo:
        bounds = {"seconds": args.seconds, "max_rounds": 50}
        rows = compare.measure(subject, prepared, setting, direction, launch, **bounds)
        session.say(table.table(rows))
        for row in rows:
            if "error" in row:
                session.fail(f"{subject.name} by {row['provider']}", row["error"])
            key = compare.key(subject, setting, direction, launch, row["provider"])
            values = {name: value for name, value in row.items() if name not in key}
            if subject.level == "stage" and rates:
                work = {"bytes": subject.bytes(setting), "flops": subject.flops(setting)}
                values |= work | {"floor_ms": card.floor_ms(rates, work["bytes"], work["flops"], setting.amp)}
            session.results.add(key, **values)
