// HostArena: one stretch of host memory of exactly the size asked for (rounded up to whole pages), with a page that
// nobody may touch before it and another behind it, so that a transfer past either end stops at once and not in
// somebody else's tensor.
//
// The memory comes from mmap: zero, and taken from the machine page by page as it is first written. Huge pages are
// asked for. A CUDA device reads and writes it without a copy once it is pinned (register_cuda).
#pragma once

#include <cstddef>
#include <cstdint>
#include <mutex>
#include <new>
#include <string>
#include <utility>

namespace cgpt {

// Becomes Python's MemoryError with its text.
class OutOfMemory : public std::bad_alloc {
  public:
    explicit OutOfMemory(std::string message) : message_(std::move(message)) {}
    const char* what() const noexcept override { return message_.c_str(); }

  private:
    std::string message_;
};

class HostArena {
  public:
    // std::invalid_argument for a size that is none, OutOfMemory with the bytes wanted where the system refuses them.
    explicit HostArena(int64_t nbytes);
    ~HostArena();
    HostArena(const HostArena&) = delete;
    HostArena& operator=(const HostArena&) = delete;

    // Pins the memory from its start for every CUDA device, in pieces of at most 1 GiB, and stops at the first refusal.
    // Returns how many bytes are pinned; why_not_pinned() then says what stopped it. Called again, it goes on.
    int64_t register_cuda(int device_id);

    uint8_t* data() const { return data_; }
    int64_t nbytes() const { return nbytes_; }
    int64_t mapped_bytes() const { return static_cast<int64_t>(mapped_); }  // whole pages, the guards not counted
    bool huge_pages() const { return huge_pages_; }  // the kernel took the advice; it promises nothing by that
    int64_t pinned_bytes() const;
    std::string why_not_pinned() const;  // empty where all is

  private:
    int64_t pinned_of_nbytes() const;

    uint8_t* data_ = nullptr;
    int64_t nbytes_;
    size_t mapped_ = 0, page_ = 0, pinned_ = 0;
    int device_id_ = 0;  // that it was pinned through
    uint8_t* reserved_ = nullptr;
    size_t reserved_bytes_ = 0;
    bool huge_pages_ = false;
    mutable std::mutex pinning_;
    std::string why_not_pinned_ = "register_cuda() was not called";
};

#if defined(CGPT_CUDA)
// csrc/cuda/pin.cpp. Returns why the driver refuses, or nothing where it pinned the piece.
std::string pin(void* data, size_t nbytes, int device_id);
void unpin(void* data, int device_id);
#endif

}  // namespace cgpt
