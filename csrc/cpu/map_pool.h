// Memory of the maps that the CPU stages write.
//
// A training step asks for the same tens of megabytes, map by map, in every step.  glibc's malloc maps each of them
// anew and unmaps it afterwards, so that the kernel zeroes every page again at its first touch: a fifth to a third of a
// step.  The pool reserves addresses once, hands out the lowest free range that fits (so that what is in use stays
// compact) and keeps the pages of what comes back.  Its pages are huge ones where the system lets a process ask for them.
#pragma once

#include <cstddef>

namespace mnet::cpu {

struct PoolUse {
  size_t in_use;    // bytes of the ranges handed out
  size_t peak;      // the most that in_use was since the start or pool_reset_peak
  size_t kept;      // bytes of free ranges whose pages may still be held, at most
  size_t reserved;  // bytes of address space; 0 where there is no pool
};

// Smaller requests are malloc's: it keeps those by itself.
constexpr size_t kSmallestInPool = size_t{1} << 18;

// A range of at least this many bytes, aligned to a page; nullptr where there is no pool or no room left: take another
// allocator's.  Thread-safe.
void* pool_allocate(size_t bytes);

// Gives back what pool_allocate returned.
void pool_free(void* data);

// Returns the pages of all free ranges to the system; returns how many bytes they may have held.
size_t pool_trim();

PoolUse pool_use();

// From now on the peak is that of what follows: it starts at what is in use.
void pool_reset_peak();

}  // namespace mnet::cpu
