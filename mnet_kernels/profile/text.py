"""The words and numbers that table, page and picture share."""

MARKS = {"faster": "", "within noise": " ~", "slower": " !"}


def amount(value):
    """A number with three significant digits, and none of them after a point above 100."""
    return f"{value:.0f}" if value >= 99.95 else f"{value:.1f}" if value >= 9.995 else f"{value:.2f}"


def milliseconds(value):
    """The same, with a digit more below 1."""
    return f"{value:.3f}" if value < 0.9995 else amount(value)


def size(count):
    """Bytes in MB."""
    return f"{amount(count / 1e6)} MB"


def interval(entry):
    """An entry's speed-up with its 95 % interval."""
    return "{:.2f} ({:.2f} to {:.2f})".format(*entry.speedup) if entry.speedup else ""


def what(profile):
    """What was timed."""
    return "training step" if profile.settings["direction"] == "train" else "inference"


def title(profile):
    """What was compared."""
    s = profile.settings
    return f"{s['target']}: {s['fused']} against {s['unfused']}, {what(profile)}, batch {s['batch']}, {s['dtype']}"


def versions(profile):
    """Torch, package and, on a card, CUDA and driver."""
    h = profile.header
    found = [f"torch {h['torch']}", f"mnet-kernels {h['package']}"]
    if h["commit"]:
        found.append(f"commit {h['commit'][:10]}{'+changes' * h['commit'].endswith('+changes')}")
    if profile.settings["device"].startswith("cuda"):
        found += [f"CUDA {h['cuda']}", f"cuDNN {h['cudnn']}", f"driver {h['driver']}"]
    return ", ".join(found)


def machine(profile):
    """Where it was measured, and what that machine can do."""
    h, m = profile.header, profile.machine
    where = h["device"]
    if not profile.settings["device"].startswith("cuda"):
        where += f", {h['threads']} thread" + "s" * (h["threads"] != 1)
        if profile.settings["clock"] == "thread":
            where += " (its CPU time)"
        if h["load"][0] is not None:
            where += f", load average {h['load'][0]:g} to {h['load'][1]:g}"
    copy, matrix = m["copy_bytes_per_s"] / 1e9, m["matrix_flops_per_s"] / 1e9
    return f"{where}; measured rates: copy {amount(copy)} GB/s, matrix product {amount(matrix)} GFLOP/s"


def subtitle(profile):
    """Machine, versions and date."""
    return f"{machine(profile)}\n{versions(profile)}, {profile.header['date']}"


def verdict(profile):
    """How the figures are to be read, and which differences are only noise."""
    compared = [e for e in profile.entries if e.noise is not None]
    if not compared:
        return "nothing could be compared"
    floors = sorted(e.noise for e in compared)
    lines = [
        f"times as fast: {profile.settings['unfused']} time / {profile.settings['fused']} time, median over "
        "rounds and 95 % interval (bootstrap)",
        f"noise floor: two runs of the same differed by up to {100 * floors[0]:.1f} to {100 * floors[-1]:.1f} %",
    ]
    for found in ("within noise", "slower"):
        numbers = [str(i) for i, e in enumerate(profile.entries, 1) if e.verdict == found]
        if numbers:
            lines.append(f"{found} (marked{MARKS[found]}): {', '.join(numbers)}")
    return "\n".join(lines)


def name(entry):
    """A block's input size and layers, without its model and activation; a model is called by its name."""
    if entry.level == "model":
        return "whole model"
    words = entry.name.split()
    words = words[1:] if "x" not in words[0] else words
    return " ".join(w for w in words if w[:4] not in ("relu", "hard"))


def short(entry, number):
    """An entry's number and name, for a chart."""
    return f"{number}  {name(entry)}"
