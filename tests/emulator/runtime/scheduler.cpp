// Fibres, barriers and warp-wide instructions. A fibre is started by makecontext once and then switched by
// _setjmp/_longjmp, which save no signal mask: about 10 ns a switch where swapcontext takes 300.
#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <map>
#include <set>
#include <stdexcept>

#include "emulator.h"

namespace emulator {

Launch launch;
Index block_index;
Thread* current = nullptr;
Counters counters;

namespace {

struct Fibre {
    jmp_buf point;
    ucontext_t start;
    bool started = false;
};

struct Barrier {
    std::vector<Thread*> waiting;
    int threads = 0;
};

Thread threads[kMaxThreads];
Fibre fibres[kMaxThreads];
jmp_buf scheduler;
void (*body)(const void*) = nullptr;
std::vector<Thread*> ready;
std::map<int, Barrier> barriers;
std::map<int, std::vector<Collective>> collectives;  // by warp
int alive = 0, size = 0;
std::mt19937_64 order;
std::string failure;
std::set<uint32_t> launched;  // kernels that have run to their end

void leave() {
    if (!_setjmp(fibres[current->id].point)) _longjmp(scheduler, 1);
}

void fibre_main() {
    for (;;) {
        body(launch.arguments);
        current->state = State::done;
        leave();
    }
}

void enter(Thread* thread) {
    current = thread;
    Fibre& fibre = fibres[thread->id];
    if (!_setjmp(scheduler)) {
        if (fibre.started) _longjmp(fibre.point, 1);
        fibre.started = true;
        getcontext(&fibre.start);
        fibre.start.uc_stack.ss_sp = thread->stack;
        fibre.start.uc_stack.ss_size = kStack;
        fibre.start.uc_link = nullptr;
        makecontext(&fibre.start, fibre_main, 0);
        setcontext(&fibre.start);
    }
    current = nullptr;
}

void wake(Thread* thread) {
    thread->state = State::ready;
    ready.push_back(thread);
}

bool same_place(uint32_t a, uint32_t b) { return a == b || where(a) == where(b); }

// A barrier opens when those it waits for are there; 0 waits for every thread that has not returned.
void open_if_full(int id) {
    Barrier& b = barriers[id];
    const int wanted = id == 0 ? alive : b.threads;
    if (b.waiting.empty() || static_cast<int>(b.waiting.size()) < wanted) return;
    for (const Thread* t : b.waiting)
        if (id == 0 && !same_place(t->waits_at, b.waiting[0]->waits_at))
            fault_at("divergent __syncthreads: " + who(t->number) + " waits at " + where(t->waits_at),
                     where(b.waiting[0]->waits_at) + " by " + who(b.waiting[0]->number));
    join(b.waiting);
    std::vector<Thread*> all;
    all.swap(b.waiting);
    ++counters.barriers;
    for (Thread* t : all) wake(t);
}

// Why nobody can go on.
std::string stuck() {
    bool divergent = false;
    std::map<std::string, std::pair<int, std::string>> places;
    for (int i = 0; i < size; ++i) {
        const Thread& t = threads[i];
        if (t.state != State::barrier && t.state != State::collective) continue;
        divergent = divergent || t.state == State::collective;
        const char* what = t.state == State::barrier ? "a barrier at " : "the rest of their warp at ";
        auto& [count, first] = places[what + where(t.waits_at)];
        if (count++ == 0) first = who(t.number);
    }
    std::string text = divergent ? "deadlock of a divergent warp" : "deadlock";
    for (const auto& [place, found] : places)
        text +=
            "; " + std::to_string(found.first) + " threads wait for " + place + ", the first of them " + found.second;
    return alive == size ? text : text + "; " + std::to_string(size - alive) + " have returned";
}

void run_block(uint32_t first_number) {
    ready.clear();
    barriers.clear();
    collectives.clear();
    alive = size;
    begin_block();
    for (int i = 0; i < size; ++i) {
        Thread& t = threads[i];
        t.id = i;
        t.warp = i / 32;
        t.lane = i % 32;
        t.number = first_number + i;
        t.index = {i % launch.block.x, i / launch.block.x % launch.block.y, i / (launch.block.x * launch.block.y)};
        t.clocks.assign(size, 0);
        t.clocks[i] = 1;
        t.copies.clear();
        t.group = 0;
        wake(&t);
    }
    while (alive > 0 && failure.empty()) {
        if (ready.empty()) {
            failure = stuck();
            break;
        }
        std::swap(ready[order() % ready.size()], ready.back());
        Thread* next = ready.back();
        ready.pop_back();
        enter(next);
        if (next->state == State::done && failure.empty()) {
            --alive;
            open_if_full(0);
        }
    }
}

}  // namespace

void fault_at(const std::string& what, const std::string& place) {
    if (failure.empty()) failure = what + (place.empty() ? "" : ", at " + place);
    if (!current) throw std::runtime_error(launch.op + ": " + std::exchange(failure, {}));
    current->state = State::done;
    _longjmp(scheduler, 1);
}

void remember(const std::string& what) {
    if (failure.empty()) failure = what;
}

void fault(const std::string& what, uint32_t pc) {
    fault_at(what, where(pc) + (current ? " by " + who(current->number) : " in host code"));
}

std::string who(uint32_t number) {
    const uint32_t block = number / kMaxThreads, x = block % launch.grid.x, y = block / launch.grid.x % launch.grid.y;
    const uint32_t z = block / (launch.grid.x * launch.grid.y);
    return "block (" + std::to_string(x) + ", " + std::to_string(y) + ", " + std::to_string(z) + ") thread " +
           std::to_string(number % kMaxThreads);
}

void join(const std::vector<Thread*>& all) {
    Clocks known(size, 0);
    for (const Thread* t : all)
        for (int i = 0; i < size; ++i) known[i] = std::max(known[i], t->clocks[i]);
    for (Thread* t : all) {
        t->clocks = known;
        ++t->clocks[t->id];
    }
}

void wait_at_barrier(int id, int wanted, uint32_t pc) {
    Barrier& b = barriers[id];
    if (id != 0) {
        if (wanted <= 0 || wanted % 32 || wanted > size)
            fault("a named barrier for " + std::to_string(wanted) + " threads, which must be whole warps of the block",
                  pc);
        if (!b.waiting.empty() && b.threads != wanted)
            fault("barrier " + std::to_string(id) + " is waited at for " + std::to_string(b.threads) +
                      " threads and for " + std::to_string(wanted),
                  pc);
        b.threads = wanted;
    }
    current->state = State::barrier;
    current->waits_at = pc;
    b.waiting.push_back(current);
    open_if_full(id);
    leave();  // also where it has just opened: this thread is in line again like the others
}

void together(uint32_t mask, int kind, void* data, uint32_t pc, void (*combine)(void* const* data, uint32_t mask)) {
    const int lane = current->lane;
    const int lanes = std::min(32, size - current->warp * 32);
    if (lanes < 32 && mask == ~0u) mask = (1u << lanes) - 1;  // the last warp of a block that is not whole warps
    if (!(mask >> lane & 1)) fault("a warp's instruction by a lane that its mask leaves out", pc);
    std::vector<Collective>& pending = collectives[current->warp];
    for (Collective& c : pending)
        if ((c.mask & mask) && (c.mask != mask || c.kind != kind)) {
            const int other = __builtin_ctz(c.arrived);
            fault("divergent warp: lane " + std::to_string(other) + " waits at " + where(c.pcs[other]) +
                      " for another instruction",
                  pc);
        }
    size_t at = 0;
    while (at < pending.size() && pending[at].mask != mask) ++at;
    if (at == pending.size()) {
        Collective fresh{};
        fresh.mask = mask;
        fresh.kind = kind;
        pending.push_back(fresh);
    }
    Collective& c = pending[at];
    c.arrived |= 1u << lane;
    c.data[lane] = data;
    c.pcs[lane] = pc;
    current->state = State::collective;
    current->waits_at = pc;
    if (c.arrived == mask) {
        const Collective all = c;
        pending.erase(pending.begin() + static_cast<std::ptrdiff_t>(at));
        for (int i = 0; i < 32; ++i)
            if ((mask >> i & 1) && !same_place(all.pcs[i], pc))
                fault("divergent warp: lane " + std::to_string(i) + " is at " + where(all.pcs[i]), pc);
        if (combine) combine(all.data, mask);
        for (int i = 0; i < 32; ++i)
            if (mask >> i & 1) wake(&threads[current->warp * 32 + i]);
    }
    leave();
}

void run(const Launch& asked, void (*kernel)(const void*)) {
    launch = asked;
    const uint64_t count = uint64_t(launch.block.x) * launch.block.y * launch.block.z;
    const uint64_t blocks = uint64_t(launch.grid.x) * launch.grid.y * launch.grid.z;
    auto refuse = [&](const std::string& what) { throw std::runtime_error(launch.op + ": " + what); };
    if (!failure.empty()) refuse(std::exchange(failure, {}));
    if (count == 0 || count > kMaxThreads) refuse("a block of " + std::to_string(count) + " threads");
    if (blocks == 0 || blocks > (1u << 21)) refuse("a grid of " + std::to_string(blocks) + " blocks");
    if (launch.grid.y > 65535 || launch.grid.z > 65535) refuse("a grid of more than 65535 blocks in y or z");
    if (launch.shared_bytes > 227 * 1024)
        refuse(std::to_string(launch.shared_bytes) + " bytes of shared memory, past the 232448 of a block");
    size = static_cast<int>(count);
    body = kernel;
    for (int i = 0; i < size; ++i) {
        if (threads[i].stack) continue;
        void* stack = mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (stack == MAP_FAILED) refuse("no memory for the threads' stacks");
        threads[i].stack = static_cast<char*>(stack);
    }
    begin_launch();
    std::vector<uint32_t> line(blocks);
    for (uint32_t i = 0; i < blocks; ++i) line[i] = i;
    std::shuffle(line.begin(), line.end(), order);
    for (uint32_t b : line) {
        block_index = {b % launch.grid.x, b / launch.grid.x % launch.grid.y, b / (launch.grid.x * launch.grid.y)};
        run_block(b * kMaxThreads);
        if (failure.empty()) continue;
        for (Fibre& fibre : fibres) fibre.started = false;  // their stacks are left as they are
        refuse(std::exchange(failure, {}));
    }
    launched.insert(offset(launch.kernel));
}

}  // namespace emulator

extern "C" __attribute__((visibility("default"))) void emulator_seed(uint64_t value) {
    emulator::order.seed(value);
    emulator::counters = {};
}

// The offsets in this module of all kernels that have run, up to `room` of them; returns how many there are.
extern "C" __attribute__((visibility("default"))) size_t emulator_launched(uint32_t* out, size_t room) {
    for (const uint32_t kernel : emulator::launched)
        if (room-- > 0) *out++ = kernel;
    return emulator::launched.size();
}
