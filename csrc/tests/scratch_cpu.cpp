// The units' working memory: pieces that are aligned, apart and what was written into them, in every order of sizes, also
// beyond what a thread keeps and in several threads.
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <thread>
#include <vector>

#include "../cpu/scratch.h"

using namespace mnet::cpu;

static bool nested(unsigned seed) {
  struct Piece {
    unsigned char* at;
    size_t bytes;
  };
  bool good = true;
  for (int round = 0; round < 40; ++round) {
    std::vector<Piece> pieces;
    const int depth = 1 + round % 7;
    for (int i = 0; i < depth; ++i) {
      seed = seed * 1664525u + 1013904223u;
      const size_t bytes = i == 3 ? 0 : (round % 11 == 10 ? size_t{3} << 20 : size_t{1} << 12) + seed % 4096;
      auto* at = static_cast<unsigned char*>(scratch_take(bytes));
      good = good && reinterpret_cast<uintptr_t>(at) % kScratchAlignment == 0;
      std::memset(at, i + 1, bytes);
      pieces.push_back({at, bytes});
    }
    for (int i = depth - 1; i >= 0; --i) {
      for (size_t k = 0; k < pieces[i].bytes; k += 61) good = good && pieces[i].at[k] == i + 1;
      if (pieces[i].bytes > 0) good = good && pieces[i].at[pieces[i].bytes - 1] == i + 1;
      scratch_give(pieces[i].at);
      void* next = scratch_take(5000);  // must not lie in the pieces that are left
      std::memset(next, 0xff, 5000);
      scratch_give(next);
    }
  }
  return good;
}

// What was taken once lies in the same place when it is taken again.
static bool kept() {
#if defined(__SANITIZE_ADDRESS__)
  return true;  // every piece is operator new's there
#else
  void* places[3];
  for (void*& place : places) {
    void* outer = scratch_take(10000);
    void* inner = scratch_take(100);
    place = inner;
    scratch_give(inner);
    scratch_give(outer);
  }
  return places[1] == places[2];
#endif
}

int main() {
  bool good[4] = {};
  std::vector<std::thread> threads;
  for (unsigned i = 0; i < 4; ++i) threads.emplace_back([&good, i] { good[i] = nested(i) && kept(); });
  for (auto& thread : threads) thread.join();
  int failures = 0;
  for (const bool each : good) failures += !each;
  failures += !nested(17) || !kept();
  std::printf("%d failures\n", failures);
  return failures != 0;
}
