// cudaHostRegister's bookkeeping: which host memory is pinned, up to a limit that a test sets.
#include <cstddef>
#include <map>
#include <mutex>

namespace {

std::mutex mutex;
std::map<const void*, size_t> pinned;
size_t total = 0, most = ~size_t(0);

}  // namespace

namespace emulator {

bool pin(const void* data, size_t bytes) {
    std::lock_guard lock(mutex);
    if (bytes > most - total || !pinned.emplace(data, bytes).second) return false;
    total += bytes;
    return true;
}

bool unpin(const void* data) {
    std::lock_guard lock(mutex);
    const auto found = pinned.find(data);
    if (found == pinned.end()) return false;
    total -= found->second;
    pinned.erase(found);
    return true;
}

}  // namespace emulator

#define EMULATOR_API extern "C" __attribute__((visibility("default")))

EMULATOR_API size_t emulator_pinned_pieces() {
    std::lock_guard lock(mutex);
    return pinned.size();
}
EMULATOR_API size_t emulator_pinned_bytes() {
    std::lock_guard lock(mutex);
    return total;
}
EMULATOR_API void emulator_pin_at_most(size_t bytes) {
    std::lock_guard lock(mutex);
    most = bytes;
}
