// The pool: ranges never overlap, neighbours merge, the lowest fit is taken, pages go back; the peak; threads, and a child of fork.
#include <sys/wait.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstring>
#include <random>
#include <thread>
#include <vector>

#include "../cpu/map_pool.h"

using namespace mnet::cpu;

static int failures = 0;

static void expect(const char* what, bool holds) {
  if (holds) return;
  std::printf("%s\n", what);
  ++failures;
}

struct Held {
  unsigned char* data;
  size_t bytes;
  unsigned char mark;
};

static bool intact(const Held& held) {
  for (size_t i = 0; i < held.bytes; i += 509) {
    if (held.data[i] != held.mark) return false;
  }
  return held.data[held.bytes - 1] == held.mark;
}

// Random requests and returns, each range filled with a mark of its own that must still be there when it goes back.
static bool churn(unsigned seed, int steps) {
  std::mt19937 random(seed);
  std::vector<Held> held;
  bool good = true;
  for (int step = 0; step < steps; ++step) {
    if (held.size() < 24 && random() % 5 < 3) {
      const size_t bytes = 1 + random() % (300 << 10);
      Held made{static_cast<unsigned char*>(pool_allocate(bytes)), bytes, static_cast<unsigned char>(random())};
      good = good && made.data != nullptr && reinterpret_cast<uintptr_t>(made.data) % 4096 == 0;
      if (made.data == nullptr) continue;
      std::memset(made.data, made.mark, bytes);
      held.push_back(made);
    } else if (!held.empty()) {
      const size_t which = random() % held.size();
      good = good && intact(held[which]);
      pool_free(held[which].data);
      held.erase(held.begin() + static_cast<std::ptrdiff_t>(which));
    }
  }
  for (const Held& each : held) {
    good = good && intact(each);
    pool_free(each.data);
  }
  return good;
}

int main() {
  const PoolUse start = pool_use();
  if (start.reserved == 0) {
    std::printf("no pool on this system\n");
    return pool_allocate(1) != nullptr;
  }
  expect("empty at first", start.in_use == 0 && start.peak == 0 && start.kept == 0);
  if (!churn(1, 20000)) {
    std::printf("a range overlaps another\n");
    return 1;  // what follows would touch memory it does not have
  }
  expect("all came back", pool_use().in_use == 0 && pool_use().peak > 0);
  pool_trim();
  pool_reset_peak();
  expect("a peak anew", pool_use().peak == 0);
  expect("no room for more than all", pool_allocate(start.reserved + 1) == nullptr && pool_allocate(0) == nullptr);

  constexpr size_t kMega = size_t{1} << 20;
  auto* a = static_cast<char*>(pool_allocate(kMega));
  auto* b = static_cast<char*>(pool_allocate(2 * kMega));
  auto* c = static_cast<char*>(pool_allocate(kMega));
  expect("one after another", b == a + kMega && c == b + 2 * kMega);
  std::memset(b, 1, 2 * kMega);
  pool_free(b);
  expect("kept", pool_use().kept == 2 * kMega && pool_use().in_use == 2 * kMega);
  expect("the peak stays", pool_use().peak == 4 * kMega);
  pool_reset_peak();
  expect("the peak begins with what is in use", pool_use().peak == 2 * kMega);
  expect("its pages too", b[2 * kMega - 1] == 1);
  expect("the lowest that fits", pool_allocate(3 * kMega) == c + kMega && pool_allocate(kMega + 1) == b);
  expect("the peak of both", pool_use().peak == 6 * kMega + (size_t{1} << 16));
  pool_free(b);
  pool_free(c + kMega);
  expect("trimmed", pool_trim() == 5 * kMega && pool_use().kept == 2 * kMega && b[2 * kMega - 1] == 0);
  pool_free(a);
  pool_free(c);
  expect("all back", pool_use().in_use == 0);
  void* all = pool_allocate(start.reserved);  // addresses alone: nothing of it is touched
  expect("neighbours merged", all == a && pool_allocate(1) == nullptr);
  if (all != nullptr) pool_free(all);
  pool_trim();
  expect("nothing kept", pool_use().kept == 0);

  std::vector<std::thread> threads;
  bool good[4] = {};
  for (unsigned i = 0; i < 4; ++i) threads.emplace_back([&good, i] { good[i] = churn(i + 2, 4000); });
  for (std::thread& thread : threads) thread.join();
  expect("no range of a thread overlaps another's", good[0] && good[1] && good[2] && good[3] && pool_use().in_use == 0);

  std::thread busy([] { churn(9, 4000); });
  for (int i = 0; i < 20; ++i) {
    const pid_t child = fork();
    if (child == 0) _exit(churn(10, 20) ? 0 : 1);
    int status = -1;
    waitpid(child, &status, 0);
    expect("in a child of fork", WIFEXITED(status) && WEXITSTATUS(status) == 0);
  }
  busy.join();
  std::printf("%d failures\n", failures);
  return failures != 0;
}
