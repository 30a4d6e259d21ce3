#include "isa.h"

#include <atomic>
#include <stdexcept>

namespace cgpt {
namespace {

struct Candidate {
    const char* name;
    Isa isa;
    bool runs;
};

std::vector<Candidate> candidates() {
    std::vector<Candidate> all = {{"scalar", Isa::scalar, true}};
#if defined(__x86_64__)
    all.push_back({"avx2", Isa::avx2,
                   __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")});
    all.push_back({"avx512", Isa::avx512,
                   all.back().runs && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                       __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")});
#endif
    return all;
}

Isa best() {
    Isa isa = Isa::scalar;
    for (const Candidate& c : candidates())
        if (c.runs) isa = c.isa;
    return isa;
}

std::atomic<Isa>& chosen() {
    static std::atomic<Isa> isa{best()};
    return isa;
}

}  // namespace

Isa cpu_isa() { return chosen().load(std::memory_order_relaxed); }

std::string cpu_isa_name() {
    for (const Candidate& c : candidates())
        if (c.isa == cpu_isa()) return c.name;
    return "";
}

std::vector<std::string> cpu_isas() {
    std::vector<std::string> names;
    for (const Candidate& c : candidates())
        if (c.runs) names.push_back(c.name);
    return names;
}

void set_cpu_isa(const std::string& name) {
    std::string known;
    for (const Candidate& c : candidates()) {
        if (!c.runs) continue;
        if (name == c.name) {
            chosen() = c.isa;
            return;
        }
        known += (known.empty() ? "" : ", ") + std::string(c.name);
    }
    throw std::invalid_argument("cpu_isa: name must be one of " + known + " on this machine, got " + name);
}

}  // namespace cgpt
