// A unit's working memory: a thread keeps its own from unit to unit, in the caches and out of malloc's hands.
#pragma once

#include <cstddef>

namespace mnet::cpu {

constexpr size_t kScratchAlignment = 64;

// Uninitialised, aligned to kScratchAlignment.  A thread gives back what it took in the reverse order, which makes the
// memory a stack; what does not fit comes from operator new.
void* scratch_take(size_t bytes);
void scratch_give(void* memory);

}  // namespace mnet::cpu
