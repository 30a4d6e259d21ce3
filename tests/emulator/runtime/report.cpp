// Naming places in the source, the faults that the compiler's own checks find (alignment, array bounds, overflow and
// shifts: -fsanitize=alignment,bounds,signed-integer-overflow,shift), and what Python asks the emulator.
#include <dlfcn.h>

#include <cstdio>
#include <map>

#include "emulator.h"

namespace emulator {
namespace {

const Dl_info& module() {
    static const Dl_info info = [] {
        Dl_info found{};
        dladdr(reinterpret_cast<const void*>(&where), &found);
        return found;
    }();
    return info;
}

// The stand-ins and the library's own headers say nothing about a kernel.
bool stands_in(const std::string& place) {
    for (const char* part : {"tests/emulator/include", "/ptx.cuh:", "/launch.cuh:", "/usr/"})
        if (place.find(part) != std::string::npos) return true;
    return false;
}

}  // namespace

// From the sources' own folder on: "/tmp/build/csrc/cuda/x.cu" is csrc/cuda/x.cu.
static std::string shortened(const std::string& path) {
    for (const char* root : {"csrc/", "tests/emulator/"}) {
        const size_t at = path.rfind(root);
        if (at != std::string::npos) return path.substr(at);
    }
    return path;
}

uint32_t offset(const void* pc) {
    return static_cast<uint32_t>(static_cast<const char*>(pc) - static_cast<const char*>(module().dli_fbase));
}

std::string where(uint32_t pc) {
    static std::map<uint32_t, std::string> known;
    const auto found = known.find(pc);
    if (found != known.end()) return found->second;
    char command[4096];  // the return address is the instruction after the one in question
    std::snprintf(command, sizeof command, "addr2line -i -e '%s' 0x%x 2>/dev/null", module().dli_fname, pc - 1);
    std::string text;
    if (FILE* pipe = popen(command, "r")) {
        char line[4096];
        while (std::fgets(line, sizeof line, pipe)) {
            std::string place = shortened(line);
            place.erase(place.find_first_of(" \n"));  // addr2line may add "(discriminator 2)"
            if (stands_in(place)) continue;
            text += text.empty() ? place : (text.find(" (from ") == std::string::npos ? " (from " : ", ") + place;
        }
        pclose(pipe);
    }
    if (text.find(" (from ") != std::string::npos) text += ")";
    return known[pc] = text.empty() ? "an unknown place" : text;
}

}  // namespace emulator

// The layouts are those of GCC's and LLVM's ubsan runtime, which this file stands in for.
namespace {

struct Location {
    const char* file;
    uint32_t line, column;
};
struct TypeMismatch {
    Location location;
    const void* type;
    unsigned char log_alignment, kind;
};
struct Any {
    Location location;
};

void found(const Location& at, const std::string& what) {
    const std::string path = emulator::shortened(at.file) + ":" + std::to_string(at.line);
    if (emulator::current) emulator::fault_at(what, path + " by " + emulator::who(emulator::current->number));
    emulator::remember(what + ", at " + path + " in host code");  // these handlers may not throw
}

}  // namespace

#define EMULATOR_FINDS(handler, Parameters, what) \
    extern "C" void handler Parameters { found(data->location, what); }
extern "C" void __ubsan_handle_type_mismatch_v1(TypeMismatch* data, uintptr_t p) {
    found(data->location, (p ? "misaligned access: " + std::to_string(1u << data->log_alignment) +
                                   " bytes wanted, the address is a multiple of " + std::to_string(p & -p)
                             : std::string("null pointer followed")));
}
EMULATOR_FINDS(__ubsan_handle_out_of_bounds, (Any * data, uintptr_t index),
               "index " + std::to_string(static_cast<intptr_t>(index)) + " outside its array")
EMULATOR_FINDS(__ubsan_handle_add_overflow, (Any * data, uintptr_t, uintptr_t), "overflow of a signed sum")
EMULATOR_FINDS(__ubsan_handle_sub_overflow, (Any * data, uintptr_t, uintptr_t), "overflow of a signed difference")
EMULATOR_FINDS(__ubsan_handle_mul_overflow, (Any * data, uintptr_t, uintptr_t), "overflow of a signed product")
EMULATOR_FINDS(__ubsan_handle_negate_overflow, (Any * data, uintptr_t), "overflow of a negation")
EMULATOR_FINDS(__ubsan_handle_divrem_overflow, (Any * data, uintptr_t, uintptr_t), "division by zero or overflow")
EMULATOR_FINDS(__ubsan_handle_shift_out_of_bounds, (Any * data, uintptr_t, uintptr_t),
               "shift by more than the type has")

#define EMULATOR_API extern "C" __attribute__((visibility("default")))

EMULATOR_API void emulator_add_tensor(const void* from, size_t bytes) { emulator::add_tensor(from, bytes); }

// Where the bytes at p were last written in the latest launches, or "".
EMULATOR_API const char* emulator_writer(const void* p) {
    static std::string text;
    text = emulator::writer_of(p);
    return text.c_str();
}

// mma, ldmatrix, bank conflicts of ldmatrix, asynchronous copies and barriers of the launches since the seed.
EMULATOR_API void emulator_counters(uint64_t* out) {
    const emulator::Counters& c = emulator::counters;
    out[0] = c.mma, out[1] = c.ldmatrix, out[2] = c.bank_conflicts, out[3] = c.copies, out[4] = c.barriers;
}

EMULATOR_API const char* emulator_conflict() {
    static std::string text;
    text = emulator::counters.conflict_pc ? emulator::where(emulator::counters.conflict_pc) : "";
    return text.c_str();
}
