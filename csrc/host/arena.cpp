#include "arena.h"

#include <sys/mman.h>
#include <sys/resource.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <stdexcept>

namespace cgpt {
namespace {

constexpr int64_t kMost = int64_t(1) << 46;    // half of what 47 bits of addresses reach
constexpr size_t kPiece = size_t(1) << 30;     // drivers have refused larger registrations that two of these pass
constexpr size_t kHugePage = size_t(2) << 20;  // x86-64's and, mostly, arm64's; only an alignment

size_t rounded_up(size_t x, size_t to) { return (x + to - 1) / to * to; }

[[noreturn]] void refuse(int64_t nbytes, int error) {
    throw OutOfMemory("HostArena: the system must give " + std::to_string(nbytes) + " bytes, got error " +
                      std::to_string(error) + " (" + std::strerror(error) + ")");
}

#if defined(CGPT_CUDA)
std::string lock_limit() {
    rlimit limit{};
    if (getrlimit(RLIMIT_MEMLOCK, &limit) != 0 || limit.rlim_cur == RLIM_INFINITY) return "RLIMIT_MEMLOCK is unlimited";
    return "RLIMIT_MEMLOCK is " + std::to_string(limit.rlim_cur) + " bytes";
}
#endif

}  // namespace

HostArena::HostArena(int64_t nbytes) : nbytes_(nbytes) {
    if (nbytes < 1 || nbytes > kMost)
        throw std::invalid_argument("HostArena: nbytes must be from 1 to " + std::to_string(kMost) + ", got " +
                                    std::to_string(nbytes));
    page_ = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    mapped_ = rounded_up(static_cast<size_t>(nbytes), page_);
    // Addresses alone, which cost nothing, with room to start on a huge page; what is over goes back below.
    const size_t slack = mapped_ >= kHugePage ? kHugePage : 0;
    const size_t wanted = mapped_ + 2 * page_ + slack;
    void* reserved = mmap(nullptr, wanted, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (reserved == MAP_FAILED) refuse(nbytes, errno);
    uint8_t* const begin = static_cast<uint8_t*>(reserved);
    uint8_t* data = begin + page_;
    if (slack) data += (kHugePage - reinterpret_cast<uintptr_t>(data) % kHugePage) % kHugePage;
    reserved_ = data - page_;
    reserved_bytes_ = mapped_ + 2 * page_;
    if (reserved_ > begin) munmap(begin, static_cast<size_t>(reserved_ - begin));
    uint8_t *const end = begin + wanted, *const own_end = reserved_ + reserved_bytes_;
    if (end > own_end) munmap(own_end, static_cast<size_t>(end - own_end));
    if (mprotect(data, mapped_, PROT_READ | PROT_WRITE) != 0) {  // here the memory is charged
        const int error = errno;
        munmap(reserved_, reserved_bytes_);
        refuse(nbytes, error);
    }
    data_ = data;
    huge_pages_ = mapped_ >= kHugePage && madvise(data_, mapped_, MADV_HUGEPAGE) == 0;
}

HostArena::~HostArena() {
#if defined(CGPT_CUDA)
    for (size_t piece = 0; piece < pinned_; piece += kPiece) unpin(data_ + piece, device_id_);
#endif
    munmap(reserved_, reserved_bytes_);
}

int64_t HostArena::pinned_of_nbytes() const { return std::min(nbytes_, static_cast<int64_t>(pinned_)); }

int64_t HostArena::pinned_bytes() const {
    std::lock_guard lock(pinning_);
    return pinned_of_nbytes();
}

std::string HostArena::why_not_pinned() const {
    std::lock_guard lock(pinning_);
    return why_not_pinned_;
}

int64_t HostArena::register_cuda(int device_id) {
    std::lock_guard lock(pinning_);
#if defined(CGPT_CUDA)
    why_not_pinned_.clear();
    while (pinned_ < mapped_) {
        const size_t piece = std::min(kPiece, mapped_ - pinned_);
        const std::string refusal = pin(data_ + pinned_, piece, device_id);
        if (!refusal.empty()) {
            why_not_pinned_ = "pinned " + std::to_string(pinned_of_nbytes()) + " of " + std::to_string(nbytes_) +
                              " bytes, the next " + std::to_string(piece) + " refused: " + refusal + "; " +
                              lock_limit();
            break;
        }
        pinned_ += piece;
        device_id_ = device_id;
    }
#else
    (void)device_id;
    why_not_pinned_ = "this build has no CUDA";
#endif
    return pinned_of_nbytes();
}

}  // namespace cgpt
