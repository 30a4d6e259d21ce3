// A CUDA device on a CPU, for one launch at a time: blocks one after another in a seeded order, each CUDA thread a
// fibre that runs until it has to wait (csrc/cuda/*.cu compiled as C++; include/ holds the stand-ins of the CUDA
// headers and of ptx.cuh). g++ -fsanitize=thread,alignment,bounds,... tells this runtime of every load and store a
// kernel makes and where it stands in the source; memory.cpp judges them by CUDA's rules instead of a process's.
//
// The first fault ends the launch: run() throws std::runtime_error "op: what, at file:line by block (x, y, z) thread
// t".
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <random>
#include <string>
#include <utility>
#include <vector>

namespace emulator {

struct Index {
    unsigned x = 0, y = 0, z = 0;
};

// When something was done: `clock` of the thread that did it. Threads are numbered through the launch.
struct Moment {
    uint32_t thread = 0, clock = 0, pc = 0;  // clock 0: never; pc: offset in this module
};

using Clocks = std::vector<uint32_t>;  // what each thread of a block has done that one knows of

struct Copy {  // a cp.async under way
    void* to;
    const void* from;  // null: zeros
    uint32_t pc;
    int group;
};

enum class State : uint8_t { ready, barrier, collective, done };

struct Thread {
    Index index;
    int id = 0, warp = 0, lane = 0;
    uint32_t number = 0;  // in the launch
    State state = State::done;
    uint32_t waits_at = 0;  // pc
    Clocks clocks;
    std::vector<Copy> copies;
    int group = 0;  // of the next cp.async
    char* stack = nullptr;
};

struct Collective {  // one instruction that the lanes of `mask` execute together
    uint32_t mask, arrived = 0;
    int kind;
    void* data[32];
    uint32_t pcs[32];
};

struct Launch {
    std::string op;
    const void* kernel = nullptr;
    Index grid, block;
    size_t shared_bytes = 0;
    const char* arguments = nullptr;  // the kernel and its arguments, which the threads may read
    size_t argument_bytes = 0;
};

struct Counters {  // of the launches since the last emulator_seed
    uint64_t mma = 0, ldmatrix = 0, bank_conflicts = 0, copies = 0, barriers = 0;
    uint32_t conflict_pc = 0;
};

inline constexpr size_t kStack = 256 * 1024;
inline constexpr int kMaxThreads = 1024;

extern Launch launch;
extern Index block_index;
extern Thread* current;  // null in host code
extern char* shared;     // launch.shared_bytes of it may be touched
extern Counters counters;

// Called by the stand-in of launch.cuh.
void run(const Launch& launch, void (*kernel)(const void* arguments));

// [from, from + bytes) is memory of the device for the calls that follow, until the next tensors after a launch.
void add_tensor(const void* from, size_t bytes);

// Ends the launch, or in host code the next one. The second place is where an earlier access stood.
[[noreturn]] void fault(const std::string& what, uint32_t pc);
[[noreturn]] void fault_at(const std::string& what, const std::string& place);
void remember(const std::string& failure);  // for the next launch to throw
std::string where(uint32_t pc);             // "csrc/cuda/x.cu:12", with the calls that were inlined around it
std::string who(uint32_t thread_number);
uint32_t offset(const void* pc);

// memory.cpp
void begin_launch();
void begin_block();
void access(const void* p, size_t bytes, bool write, uint32_t pc);
void begin_copy(const Copy& copy);
void land(const Copy& copy);
std::string writer_of(const void* p);

// warp.cpp: what the stand-ins call
// Value of the lane whose number differs in the bits of `lanes`, within groups of `width`.
uint64_t shuffle_xor(uint32_t mask, uint64_t value, int lanes, int width, uint32_t pc);
uint32_t vote(uint32_t mask, bool value, uint32_t pc);
void sync_warp(uint32_t mask, uint32_t pc);
void ldmatrix(uint32_t* registers, const void* row, int count, bool transposed, uint32_t pc);
void mma(float* d, const uint32_t* a, const uint32_t* b, bool bf16, uint32_t pc);
void cp_async(void* to, const void* from, uint32_t pc);
void cp_async_commit();
void cp_async_wait(int groups);

char* shared_base();

// scheduler.cpp
void wait_at_barrier(int id, int threads, uint32_t pc);
// Waits for all lanes of mask; the last to come calls combine(data of every lane, mask).
void together(uint32_t mask, int kind, void* data, uint32_t pc, void (*combine)(void* const* data, uint32_t mask));
void join(const std::vector<Thread*>& threads);  // what each knew before, all know after

}  // namespace emulator

// Where its caller's caller goes on: asked by code that is inlined into a kernel, the place in the kernel.
#define EMULATOR_PC emulator::offset(__builtin_return_address(0))
