// Instructions of a warp and asynchronous copies, as the PTX manual defines them (PTX ISA 8: shfl, vote, bar.warp.sync,
// ldmatrix, mma.m16n8k16, cp.async). Fragment layouts are stated in csrc/cuda/ptx.cuh.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <set>

#include "emulator.h"
#include "halves.h"

namespace emulator {
namespace {

enum Kind { kShuffle, kVote, kSync, kMatrix, kProduct };

struct Shuffle {
    uint64_t value, result;
    int lanes, width;
    uint32_t pc;
};

void shuffle_all(void* const* data, uint32_t mask) {
    for (int lane = 0; lane < 32; ++lane) {
        if (!(mask >> lane & 1)) continue;
        Shuffle& s = *static_cast<Shuffle*>(data[lane]);
        const int from = lane ^ s.lanes;
        if (from / s.width != lane / s.width || !(mask >> from & 1))
            fault("shuffle from lane " + std::to_string(from) + ", which the mask or the width leaves out", s.pc);
        s.result = static_cast<Shuffle*>(data[from])->value;
    }
}

struct Vote {
    bool value;
    uint32_t result;
};

void vote_all(void* const* data, uint32_t mask) {
    uint32_t result = 0;
    for (int lane = 0; lane < 32; ++lane)
        if ((mask >> lane & 1) && static_cast<Vote*>(data[lane])->value) result |= 1u << lane;
    for (int lane = 0; lane < 32; ++lane)
        if (mask >> lane & 1) static_cast<Vote*>(data[lane])->result = result;
}

void join_all(void* const* data, uint32_t mask) {
    std::vector<Thread*> threads;
    for (int lane = 0; lane < 32; ++lane)
        if (mask >> lane & 1) threads.push_back(static_cast<Thread*>(data[lane]));
    join(threads);
}

struct Matrix {
    uint32_t* registers;
    const char* row;
    int count;
    bool transposed;
    uint32_t pc;
};

// A pass over the banks serves 128 bytes: eight rows of 16 bytes that start at different multiples of 16 modulo 128.
void count_conflicts(void* const* data, int first, uint32_t pc) {
    std::set<const char*> groups[8];
    size_t passes = 1;
    for (int r = 0; r < 8; ++r) {
        const char* row = static_cast<Matrix*>(data[first + r])->row;
        std::set<const char*>& group = groups[(row - shared) / 16 % 8];
        group.insert(row);
        passes = std::max(passes, group.size());
    }
    counters.bank_conflicts += passes - 1;
    if (passes > 1) counters.conflict_pc = pc;
}

void load_matrices(void* const* data, uint32_t) {
    const Matrix& all = *static_cast<Matrix*>(data[0]);
    for (int i = 0; i < all.count; ++i) {
        uint16_t values[8][8];
        for (int r = 0; r < 8; ++r) std::memcpy(values[r], static_cast<Matrix*>(data[8 * i + r])->row, 16);
        count_conflicts(data, 8 * i, all.pc);
        for (int lane = 0; lane < 32; ++lane) {
            const int g = lane / 4, t = lane % 4;
            const uint16_t low = all.transposed ? values[2 * t][g] : values[g][2 * t];
            const uint16_t high = all.transposed ? values[2 * t + 1][g] : values[g][2 * t + 1];
            static_cast<Matrix*>(data[lane])->registers[i] = low | uint32_t(high) << 16;
        }
    }
    ++counters.ldmatrix;
}

struct Product {
    float* d;
    const uint32_t *a, *b;
    bool bf16;
};

void multiply(void* const* data, uint32_t) {
    const bool bf16 = static_cast<Product*>(data[0])->bf16;
    float a[16][16], b[16][8];
    for (int lane = 0; lane < 32; ++lane) {
        const Product& p = *static_cast<Product*>(data[lane]);
        const int g = lane / 4, t = lane % 4;
        for (int i = 0; i < 4; ++i)
            for (int half = 0; half < 2; ++half)
                a[g + i % 2 * 8][2 * t + i / 2 * 8 + half] = from_half(p.a[i] >> 16 * half, bf16);
        for (int i = 0; i < 2; ++i)
            for (int half = 0; half < 2; ++half) b[2 * t + 8 * i + half][g] = from_half(p.b[i] >> 16 * half, bf16);
    }
    for (int lane = 0; lane < 32; ++lane) {
        float* d = static_cast<Product*>(data[lane])->d;
        const int g = lane / 4, t = lane % 4;
        for (int i = 0; i < 4; ++i) {
            double sum = d[i];
            for (int k = 0; k < 16; ++k) sum += double(a[g + i / 2 * 8][k]) * b[k][2 * t + i % 2];
            d[i] = static_cast<float>(sum);
        }
    }
    ++counters.mma;
}

}  // namespace

uint64_t shuffle_xor(uint32_t mask, uint64_t value, int lanes, int width, uint32_t pc) {
    Shuffle s = {value, 0, lanes, width, pc};
    together(mask, kShuffle, &s, pc, shuffle_all);
    return s.result;
}

uint32_t vote(uint32_t mask, bool value, uint32_t pc) {
    Vote v = {value, 0};
    together(mask, kVote, &v, pc, vote_all);
    return v.result;
}

void sync_warp(uint32_t mask, uint32_t pc) { together(mask, kSync, current, pc, join_all); }

void ldmatrix(uint32_t* registers, const void* row, int count, bool transposed, uint32_t pc) {
    if (current->lane < 8 * count) {
        if (reinterpret_cast<uintptr_t>(row) % 16)
            fault("misaligned ldmatrix: rows start at multiples of 16 bytes", pc);
        access(row, 16, false, pc);
    }
    Matrix m = {registers, static_cast<const char*>(row), count, transposed, pc};
    together(~0u, kMatrix, &m, pc, load_matrices);
}

void mma(float* d, const uint32_t* a, const uint32_t* b, bool bf16, uint32_t pc) {
    Product p = {d, a, b, bf16};
    together(~0u, kProduct, &p, pc, multiply);
}

void cp_async(void* to, const void* from, uint32_t pc) {
    current->copies.push_back({to, from, pc, current->group});
    begin_copy(current->copies.back());
}

void cp_async_commit() { ++current->group; }

void cp_async_wait(int groups) {
    std::vector<Copy> later;
    for (const Copy& copy : current->copies) {
        if (copy.group < current->group - groups)
            land(copy);
        else
            later.push_back(copy);
    }
    current->copies = later;
}

}  // namespace emulator
