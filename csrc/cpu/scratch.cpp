#include "scratch.h"

#include <algorithm>
#include <new>

namespace mnet::cpu {

namespace {

constexpr std::align_val_t kAlignment{kScratchAlignment};
constexpr size_t kMost = size_t{8} << 20;  // that a thread keeps; the deepest V3 layer's unit takes less than one MiB
constexpr size_t kAlone = ~size_t{0};      // from operator new

// Before every piece, on a cache line of its own.
struct alignas(kScratchAlignment) Header {
  size_t before;  // the stack's height without the piece, or kAlone
};
static_assert(sizeof(Header) == kScratchAlignment, "a piece starts on a cache line");

struct Stack {
  char* base = nullptr;
  size_t size = 0, height = 0;
  size_t wanted = 0;  // bytes that would have been enough

  ~Stack() { release(); }
  void release() {
    ::operator delete(base, kAlignment);
    base = nullptr;
    size = 0;
  }
};

thread_local Stack stack;

#if defined(__SANITIZE_ADDRESS__)
constexpr bool kKeeps = false;  // the sanitizer shall know every piece's borders
#else
constexpr bool kKeeps = true;
#endif

}  // namespace

void* scratch_take(size_t bytes) {
  const size_t needed = sizeof(Header) + (bytes + kScratchAlignment - 1) / kScratchAlignment * kScratchAlignment;
  stack.wanted = std::max(stack.wanted, stack.height + needed);
  if (kKeeps && stack.height == 0 && stack.wanted > stack.size && stack.wanted <= kMost) {
    stack.release();
    stack.base = static_cast<char*>(::operator new(stack.wanted, kAlignment));
    stack.size = stack.wanted;
  }
  const bool fits = stack.height + needed <= stack.size;
  char* const at = fits ? stack.base + stack.height : static_cast<char*>(::operator new(needed, kAlignment));
  auto* const header = new (at) Header{fits ? stack.height : kAlone};
  if (fits) stack.height += needed;
  return header + 1;
}

void scratch_give(void* memory) {
  Header* const header = static_cast<Header*>(memory) - 1;
  if (header->before == kAlone) {
    ::operator delete(header, kAlignment);
  } else {
    stack.height = header->before;
  }
}

}  // namespace mnet::cpu
