#!/usr/bin/env bash
# The primitive suite under AddressSanitizer and UndefinedBehaviorSanitizer, on a build of its own:
#     tests/backends/sanitize.sh [pytest arguments]
# Needs GCC and the Python environment in which the tests run. Leaks are not looked for: Python and torch keep memory.
set -euo pipefail
root=$(cd "$(dirname "$0")/../.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

cp -r "$root"/{setup.py,pyproject.toml,README.md,xent} "$work"
rm -f "$work"/xent/_backends/native/_native.*.so
cd "$work"
export CC=${CC:-gcc} CXX=${CXX:-g++}
CFLAGS="-fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer -g" \
LDFLAGS="-fsanitize=address,undefined" \
    python setup.py --quiet build_ext --inplace

# libasan must come first in the process; libstdc++ beside it, or it finds no exceptions to intercept in torch.
export LD_PRELOAD="$($CC -print-file-name=libasan.so) $($CXX -print-file-name=libstdc++.so)"
export ASAN_OPTIONS=detect_leaks=0:detect_stack_use_after_return=1 UBSAN_OPTIONS=print_stacktrace=1
export PYTHONPATH=$work XENT_BACKEND=native PYTHONMALLOC=malloc  # so that every Python object lies between guards as well
python -m pytest -n 0 -q -p no:cacheprovider --rootdir "$work" -c "$work/pyproject.toml" \
    "$root"/tests/backends/test_{native,native_calls,native_formula,primitives,primitives_edges,layouts}.py \
    "$root"/tests/rows/test_candidates.py "$root"/tests/head/test_{logits,sparse_samples}.py "$@"
