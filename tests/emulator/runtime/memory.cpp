// What a kernel's loads and stores are held to. Every two bytes of shared and global memory have a cell: who wrote them
// last, and up to three who have read them since. An access is a race with an earlier one of another thread, one of
// them a write, that no barrier orders before it: happens-before by vector clocks (Flanagan & Freund 2009,
// FastTrack). Shared memory is allotted to the byte, holds NaNs when a block starts, and may not be read unwritten. The
// bytes of an asynchronous copy may not be touched from its start until its thread has waited for it.
//
// Two bytes are the smallest thing that threads may share out: neighbouring single bytes count as one.
#include <dlfcn.h>
#include <link.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <unordered_map>

#include "emulator.h"

namespace emulator {

char* shared = nullptr;

namespace {

constexpr size_t kShared = 256 * 1024;  // reserved; launch.shared_bytes of it may be touched
constexpr uintptr_t kPage = 4096, kCell = 2;
constexpr uint64_t kPatience = 20'000'000;  // accesses without a switch before a fibre counts as spinning

struct alignas(64) Cell {
    uint32_t stamp = 0;  // the block (shared memory) or launch (global) that the rest is about
    bool written = false;
    bool copying = false;   // by the cp.async that `write` is about
    Moment write, read[3];  // read[1] of another warp than read[0], read[2] of another lane of its warp
};

struct Page {
    Cell cells[kPage / kCell];
};

struct Range {
    const char *begin, *end;
};

std::unordered_map<uintptr_t, std::unique_ptr<Page>> pages;
uintptr_t last_page = 0;
Page* last = nullptr;
std::vector<Range> tensors;
Range hit{};
bool launched = false;
uint32_t launch_stamp = 0, block_stamp = 0;
uint64_t accesses = 0;
Thread* accessing = nullptr;

Cell& cell_of(uintptr_t address) {
    const uintptr_t page = address / kPage;
    if (page != last_page || !last) {
        std::unique_ptr<Page>& found = pages[page];
        if (!found) found = std::make_unique<Page>();
        last = found.get();
        last_page = page;
    }
    return last->cells[address % kPage / kCell];
}

bool in_shared(const char* p) { return p >= shared && p < shared + kShared; }

bool in_tensor(const char* p, size_t bytes) {
    if (p >= hit.begin && p + bytes <= hit.end) return true;
    const auto next = std::upper_bound(tensors.begin(), tensors.end(), p,
                                       [](const char* at, const Range& range) { return at < range.begin; });
    if (next == tensors.begin()) return false;
    hit = *(next - 1);
    return p + bytes <= hit.end;
}

bool in_module(const char* p) {  // constants
    static const Range image = [] {
        Range found{};
        dl_iterate_phdr(
            [](dl_phdr_info* info, size_t, void* out) {
                const char *low = nullptr, *high = nullptr;
                for (int i = 0; i < info->dlpi_phnum; ++i) {
                    if (info->dlpi_phdr[i].p_type != PT_LOAD) continue;
                    const char* begin = reinterpret_cast<const char*>(info->dlpi_addr + info->dlpi_phdr[i].p_vaddr);
                    if (!low || begin < low) low = begin;
                    high = std::max(high, begin + info->dlpi_phdr[i].p_memsz);
                }
                const char* here = reinterpret_cast<const char*>(&in_module);
                if (here < low || here >= high) return 0;
                *static_cast<Range*>(out) = {low, high};
                return 1;
            },
            &found);
        return found;
    }();
    return p >= image.begin && p < image.end;
}

bool before_me(const Moment& m) {
    if (m.clock == 0 || m.thread == current->number) return true;
    const uint32_t block = m.thread / kMaxThreads, id = m.thread % kMaxThreads;
    if (block == current->number / kMaxThreads) return current->clocks[id] >= m.clock;
    return false;
}

Moment now(uint32_t pc) { return {current->number, current->clocks[current->id], pc}; }

void note_read(Cell& cell, const Moment& m) {
    const auto warp = [](const Moment& x) { return x.thread / 32; };
    if (cell.read[0].clock && cell.read[0].thread != m.thread)
        (warp(cell.read[0]) == warp(m) ? cell.read[2] : cell.read[1]) = cell.read[0];
    cell.read[0] = m;
}

std::string kind(const char* p) { return in_shared(p) ? "shared" : "global"; }

[[noreturn]] void race(const char* p, const char* now_is, const char* was, const Moment& m, uint32_t pc) {
    fault("race on " + kind(p) + " memory: " + was + " at " + where(m.pc) + " by " + who(m.thread) +
              " and, with nothing between, " + now_is,
          pc);
}

void touch(const char* p, size_t bytes, bool write, uint32_t pc) {
    const bool in_block = in_shared(p);
    const uint32_t stamp = in_block ? block_stamp : launch_stamp;
    const Moment moment = now(pc);
    const auto begin = reinterpret_cast<uintptr_t>(p) / kCell * kCell;
    for (uintptr_t at = begin; at < reinterpret_cast<uintptr_t>(p) + bytes; at += kCell) {
        Cell& cell = cell_of(at);
        if (cell.stamp != stamp) {
            cell = Cell{};
            cell.stamp = stamp;
        }
        if (cell.copying)
            fault(std::string(write ? "written" : "read") + " before the wait for its asynchronous copy, started at " +
                      where(cell.write.pc) + " by " + who(cell.write.thread),
                  pc);
        if (!before_me(cell.write)) race(p, write ? "written" : "read", "written", cell.write, pc);
        if (write) {
            for (const Moment& m : cell.read)
                if (!before_me(m)) race(p, "written", "read", m, pc);
            cell.write = moment;
            cell.read[0] = cell.read[1] = cell.read[2] = {};
            cell.written = true;
        } else {
            if (in_block && !cell.written)
                fault("uninitialised read of byte " + std::to_string(p - shared) + " of shared memory", pc);
            note_read(cell, moment);
        }
    }
}

void check_bounds(const char* p, size_t bytes, bool write, uint32_t pc) {
    const std::string what = std::string(write ? "write" : "read") + " of " + std::to_string(bytes) + " bytes ";
    if (in_shared(p)) {
        if (p + bytes > shared + launch.shared_bytes)
            fault(what + "past the end of shared memory: at byte " + std::to_string(p - shared) + " of " +
                      std::to_string(launch.shared_bytes),
                  pc);
        return;
    }
    if (in_tensor(p, bytes)) return;
    std::string nearest;
    std::ptrdiff_t best = 1 << 20;
    for (const Range& range : tensors) {
        const std::ptrdiff_t size = range.end - range.begin;
        const std::ptrdiff_t away =
            p >= range.end - bytes ? p + static_cast<std::ptrdiff_t>(bytes) - range.end : range.begin - p;
        if (away <= 0 || away >= best) continue;
        best = away;
        nearest = p < range.begin ? std::to_string(range.begin - p) + " bytes before the start of"
                                  : "at byte " + std::to_string(p - range.begin) + " past the end of";
        nearest += " a tensor of " + std::to_string(size) + " bytes";
    }
    fault(what + (nearest.empty() ? "outside every tensor" : nearest), pc);
}

}  // namespace

void add_tensor(const void* from, size_t bytes) {
    if (launched) {
        tensors.clear();
        launched = false;
    }
    if (bytes == 0) return;
    const char* begin = static_cast<const char*>(from);
    tensors.push_back({begin, begin + bytes});
}

void begin_launch() {
    if (!shared) {
        void* memory = mmap(nullptr, kShared, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (memory == MAP_FAILED) throw std::bad_alloc();
        shared = static_cast<char*>(memory);
    }
    launched = true;
    ++launch_stamp;
    hit = {};
    if (launch_stamp % 64 == 0) pages.clear(), last = nullptr;  // tensors come and go
    std::sort(tensors.begin(), tensors.end(), [](const Range& a, const Range& b) { return a.begin < b.begin; });
    std::vector<Range> merged;  // views of one tensor overlap
    for (const Range& range : tensors) {
        if (!merged.empty() && range.begin < merged.back().end)
            merged.back().end = std::max(merged.back().end, range.end);
        else
            merged.push_back(range);
    }
    tensors = merged;
}

void begin_block() {
    ++block_stamp;
    std::memset(shared, 0xff, launch.shared_bytes);
}

void access(const void* address, size_t bytes, bool write, uint32_t pc) {
    if (!current) return;
    const char* p = static_cast<const char*>(address);
    if (p >= current->stack && p < current->stack + kStack) return;
    if (accessing != current) accessing = current, accesses = 0;
    if (++accesses > kPatience) fault("spinning: no wait in " + std::to_string(kPatience) + " loads and stores", pc);
    if (!write && p >= launch.arguments && p + bytes <= launch.arguments + launch.argument_bytes) return;
    if (!in_shared(p) && !in_tensor(p, bytes) && !write && in_module(p)) return;
    check_bounds(p, bytes, write, pc);
    touch(p, bytes, write, pc);
}

void begin_copy(const Copy& copy) {
    char* to = static_cast<char*>(copy.to);
    if (!in_shared(to)) fault("cp.async to an address outside shared memory", copy.pc);
    if (reinterpret_cast<uintptr_t>(to) % 16 || reinterpret_cast<uintptr_t>(copy.from) % 16)
        fault("misaligned cp.async: both ends must be at multiples of 16 bytes", copy.pc);
    if (copy.from) access(copy.from, 16, false, copy.pc);
    access(to, 16, true, copy.pc);  // it may arrive at once
    std::memset(to, 0xff, 16);      // or late
    for (int i = 0; i < 16; i += kCell) cell_of(reinterpret_cast<uintptr_t>(to + i)).copying = true;
    ++counters.copies;
}

void land(const Copy& copy) {
    char* to = static_cast<char*>(copy.to);
    for (int i = 0; i < 16; i += kCell) cell_of(reinterpret_cast<uintptr_t>(to + i)).copying = false;
    access(to, 16, true, copy.pc);
    if (copy.from)
        std::memcpy(to, copy.from, 16);
    else
        std::memset(to, 0, 16);
}

std::string writer_of(const void* p) {
    const auto found = pages.find(reinterpret_cast<uintptr_t>(p) / kPage);
    if (found == pages.end()) return "";
    const Cell& cell = found->second->cells[reinterpret_cast<uintptr_t>(p) % kPage / kCell];
    if (!cell.write.clock) return "";
    return where(cell.write.pc) + " by " + who(cell.write.thread);
}

}  // namespace emulator

#define EMULATOR_ACCESS(name, bytes, write) \
    extern "C" void name(void* p) { emulator::access(p, bytes, write, EMULATOR_PC); }
#define EMULATOR_ACCESSES(bytes)                                \
    EMULATOR_ACCESS(__tsan_read##bytes, bytes, false)           \
    EMULATOR_ACCESS(__tsan_write##bytes, bytes, true)           \
    EMULATOR_ACCESS(__tsan_unaligned_read##bytes, bytes, false) \
    EMULATOR_ACCESS(__tsan_unaligned_write##bytes, bytes, true)
EMULATOR_ACCESSES(1)
EMULATOR_ACCESSES(2)
EMULATOR_ACCESSES(4)
EMULATOR_ACCESSES(8)
EMULATOR_ACCESSES(16)
extern "C" void __tsan_init() {}
extern "C" void __tsan_read_range(void* p, size_t n) { emulator::access(p, n, false, EMULATOR_PC); }
extern "C" void __tsan_write_range(void* p, size_t n) { emulator::access(p, n, true, EMULATOR_PC); }
extern "C" void __tsan_vptr_update(void**, void*) {}
extern "C" void __tsan_vptr_read(void**) {}

// Host code's own atomics (the launchers live in the same files).
#define EMULATOR_ATOMICS(bits, T)                                                                                      \
    extern "C" T __tsan_atomic##bits##_load(const volatile T* p, int) { return __atomic_load_n(p, __ATOMIC_SEQ_CST); } \
    extern "C" void __tsan_atomic##bits##_store(volatile T* p, T x, int) { __atomic_store_n(p, x, __ATOMIC_SEQ_CST); } \
    extern "C" T __tsan_atomic##bits##_exchange(volatile T* p, T x, int) {                                             \
        return __atomic_exchange_n(p, x, __ATOMIC_SEQ_CST);                                                            \
    }                                                                                                                  \
    extern "C" T __tsan_atomic##bits##_fetch_add(volatile T* p, T x, int) {                                            \
        return __atomic_fetch_add(p, x, __ATOMIC_SEQ_CST);                                                             \
    }                                                                                                                  \
    extern "C" T __tsan_atomic##bits##_fetch_sub(volatile T* p, T x, int) {                                            \
        return __atomic_fetch_sub(p, x, __ATOMIC_SEQ_CST);                                                             \
    }
EMULATOR_ATOMICS(8, uint8_t)
EMULATOR_ATOMICS(32, uint32_t)
EMULATOR_ATOMICS(64, uint64_t)
