#include "map_pool.h"

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <iterator>
#include <map>
#include <mutex>

#if defined(__linux__)
#include <pthread.h>
#include <sys/mman.h>
#include <unistd.h>
#endif

#include "../common/plant.h"

namespace mnet::cpu {

namespace {

// Ranges are whole multiples of this, which keeps them on pages and few.
constexpr size_t kGrain = size_t{1} << 16;
constexpr size_t kHugePage = size_t{2} << 20;

struct Pool {
  std::mutex mutex;
  char* base = nullptr;
  size_t reserved = 0;
  size_t in_use = 0;
  size_t peak = 0;
  size_t touched = 0;             // no page lies at or behind this offset
  std::map<size_t, size_t> free;  // offset -> bytes; neighbours are merged
  std::map<size_t, size_t> taken;
};

bool wanted() {
  const char* wish = std::getenv("MNET_CPU_POOL");
  return wish == nullptr || std::strcmp(wish, "0") != 0;
}

#if defined(__linux__)

void reserve(Pool& pool) {
  const long pages = sysconf(_SC_PHYS_PAGES), page = sysconf(_SC_PAGE_SIZE);
  if (pages <= 0 || page <= 0) return;
  const size_t bytes = static_cast<size_t>(pages) * static_cast<size_t>(page) / kHugePage * kHugePage;
  if (bytes == 0) return;
  // Addresses only: nothing is held before it is touched.  Refused (a limit on address space): no pool.
  void* data = mmap(nullptr, bytes + kHugePage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (data == MAP_FAILED) return;
  const auto address = reinterpret_cast<uintptr_t>(data);
  pool.base = static_cast<char*>(data) + ((kHugePage - address % kHugePage) % kHugePage);
  pool.reserved = bytes;
#if defined(MADV_HUGEPAGE)
  madvise(pool.base, bytes, MADV_HUGEPAGE);
#endif
  pool.free.emplace(0, bytes);
}

void release_pages(char* data, size_t bytes) { madvise(data, bytes, MADV_DONTNEED); }

#else

void reserve(Pool&) {}
void release_pages(char*, size_t) {}

#endif

// Never destroyed: maps may be freed after the statics are gone.
Pool& pool() {
  static Pool* const instance = [] {
    auto* made = new Pool;
    if (wanted()) reserve(*made);
#if defined(__linux__)
    // A child of fork inherits the lock as it is: nobody may hold it then.
    static Pool* held = made;
    pthread_atfork([] { held->mutex.lock(); }, [] { held->mutex.unlock(); }, [] { held->mutex.unlock(); });
#endif
    return made;
  }();
  return *instance;
}

}  // namespace

void* pool_allocate(size_t bytes) {
  Pool& a = pool();
  if (bytes == 0 || bytes > a.reserved) return nullptr;
  const size_t size = MNET_PLANT(1, (bytes + kGrain - 1) / kGrain, 1 + bytes / (2 * kGrain)) * kGrain;
  const std::lock_guard<std::mutex> lock(a.mutex);
  const auto fits = std::find_if(a.free.begin(), a.free.end(), [&](const auto& range) { return range.second >= size; });
  if (fits == a.free.end()) return nullptr;
  const auto [offset, room] = *fits;
  a.free.erase(fits);
  if (room > size) a.free.emplace(offset + size, room - size);
  a.taken.emplace(offset, size);
  a.in_use += size;
  a.peak = std::max(a.peak, MNET_PLANT(5, a.in_use, size));
  a.touched = std::max(a.touched, offset + size);
  return a.base + offset;
}

void pool_free(void* data) {
  Pool& a = pool();
  const std::lock_guard<std::mutex> lock(a.mutex);
  const auto found = a.taken.find(static_cast<size_t>(static_cast<char*>(data) - a.base));
  if (found == a.taken.end()) std::abort();  // not of this pool, or given back twice
  const auto [offset, bytes] = *found;
  a.taken.erase(found);
  a.in_use -= bytes;
  auto range = a.free.emplace(offset, bytes).first;
  const auto next = std::next(range);
  if (next != a.free.end() && offset + bytes == next->first && MNET_PLANT(2, true, false)) {
    range->second += next->second;
    a.free.erase(next);
  }
  if (range == a.free.begin() || MNET_PLANT(3, false, true)) return;
  const auto before = std::prev(range);
  if (before->first + before->second == offset) {
    before->second += range->second;
    a.free.erase(range);
  }
}

size_t pool_trim() {
  Pool& a = pool();
  const std::lock_guard<std::mutex> lock(a.mutex);
  size_t bytes = 0;
  for (const auto& [offset, room] : a.free) {
    if (offset >= a.touched) break;
    const size_t held = std::min(room, a.touched - offset);
    release_pages(a.base + offset, MNET_PLANT(4, held, held / 2));
    bytes += held;
  }
  a.touched = a.taken.empty() ? 0 : a.taken.rbegin()->first + a.taken.rbegin()->second;
  return bytes;
}

PoolUse pool_use() {
  Pool& a = pool();
  const std::lock_guard<std::mutex> lock(a.mutex);
  return {a.in_use, a.peak, a.touched - a.in_use, a.reserved};
}

void pool_reset_peak() {
  Pool& a = pool();
  const std::lock_guard<std::mutex> lock(a.mutex);
  a.peak = MNET_PLANT(6, a.in_use, 0);
}

}  // namespace mnet::cpu
