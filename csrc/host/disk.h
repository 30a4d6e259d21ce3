// DiskFile: a file of a fixed size that holds records, behind a header that says whose they are.
//
//   bytes 0-7      "CGPTDISK"
//   bytes 8-11     version, 1                   \.
//   bytes 12-15    length of the identity        | little-endian
//   bytes 16-23    bytes of records             /
//   bytes 24-...   the identity, then zeros
//   bytes 4088-    FNV-1a, 64 bits, of the 4088 bytes before (http://www.isthe.com/chongo/tech/comp/fnv/)
//   bytes 4096-    the records, whole blocks of 4096 bytes; offset 0 of read() and write() is here
//
// The blocks are allocated when the file is made, so no write can find the disk full. Records go past the page cache
// (O_DIRECT) where the file system takes that; where it does not, what was written and read is dropped from the cache
// again, which is charged to the process's memory limit.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <shared_mutex>
#include <stdexcept>
#include <string>

namespace cgpt {

// Becomes Python's OSError with errno, text and file name.
struct FileError : std::runtime_error {
    FileError(int code, const std::string& text, std::string path)
        : std::runtime_error(text), code(code), path(std::move(path)) {}
    int code;
    std::string path;
};

class DiskFile {
  public:
    static constexpr int64_t kBlock = 4096;

    // Makes the file at `path`, or opens the one that is there if it is of this size and identity and no other process
    // has it open. `direct`: whether to go past the page cache where that can be done.
    // std::invalid_argument for a foreign or damaged file, FileError where the system refuses.
    DiskFile(const std::string& path, int64_t nbytes, const std::string& identity, bool direct);
    ~DiskFile();
    DiskFile(const DiskFile&) = delete;
    DiskFile& operator=(const DiskFile&) = delete;

    // All of [offset, offset + nbytes) or an exception; `offset` in whole blocks. Any number of threads at once, of
    // which no two may write the same block.
    void read(int64_t offset, void* data, int64_t nbytes) const;
    void write(int64_t offset, const void* data, int64_t nbytes);

    void sync();   // returns once the disk has what was written
    void close();  // waits for calls under way; without sync() the system may still hold what was written

    const std::string& path() const { return path_; }
    const std::string& identity() const { return identity_; }
    int64_t nbytes() const { return nbytes_; }
    bool created() const { return created_; }
    bool direct() const { return why_buffered_.empty(); }
    const std::string& why_buffered() const { return why_buffered_; }
    bool closed() const { return file_ < 0; }

  private:
    void create();
    void check_header();
    void go_direct();
    void check_call(const char* what, int64_t offset, int64_t nbytes) const;
    void transfer(bool writing, int64_t offset, char* data, int64_t nbytes) const;
    void bounce(bool writing, int64_t offset, char* data, int64_t nbytes) const;
    void move(bool writing, int64_t offset, char* data, int64_t nbytes) const;
    void drop_cached(int64_t offset, int64_t nbytes, bool written) const;
    [[noreturn]] void fail(int code, const std::string& what) const;

    std::string path_, identity_;
    int64_t nbytes_, blocks_;  // of the records; blocks_ in bytes
    std::atomic<int> file_{-1};
    bool created_ = false;
    int64_t memory_alignment_ = kBlock;
    std::string why_buffered_;
    mutable std::shared_mutex open_;  // shared: a call is under way
};

}  // namespace cgpt
