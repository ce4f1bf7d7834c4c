#!/usr/bin/env bash
# Measure on a machine with a CUDA card, a part of under nine minutes at a time:
#
#   bench/gpu.sh PHASE OUT_DIR [options of bench/gpu.py]
#
# build     compile the extension in place (no isolation, no network)
# test      the tests that need a card: pytest -m gpu
# sanitize  the compiled stages under compute-sanitizer: memcheck, racecheck
# tune      Triton's configurations on this card, into OUT_DIR/tune: MNET_TUNE_DIR=OUT_DIR/tune makes the later phases use them
# stages    single stages against the torch layers they stand for
# blocks    whole blocks: plain torch in its forms, and the fused backends that are whole
# models    whole models, training steps
#
# Each phase writes OUT_DIR/PHASE.json as it goes (test and sanitize also logs).  Called again with the same OUT_DIR it goes
# on where it stopped; rows measured with other sources, another card or other versions are put aside and measured anew.
# Needed: torch, triton, pytest, and nvcc for build.  PYTHON chooses the Python (default: python3).
#
# Exit codes: 0 all done, 1 a part failed (the others ran), 2 wrong arguments, 3 no CUDA card: nothing was measured,
# 4 out of time: call again, 124 or 137 stopped by the outer time limit (what was measured is in OUT_DIR).
set -u
cd "$(dirname "$0")/.." || exit 2
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
exec timeout --kill-after=10 530 "${PYTHON:-python3}" bench/gpu.py "$@"
