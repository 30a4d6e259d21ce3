#include "disk.h"

#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>

namespace cgpt {
namespace {

constexpr int64_t kBlock = DiskFile::kBlock;
constexpr int64_t kBounce = int64_t(1) << 20;
constexpr int64_t kMostAtOnce = int64_t(1) << 30;    // Linux moves at most 2 GiB - 4096 a call
constexpr int64_t kCachedAtOnce = int64_t(8) << 20;  // of the page cache, that a buffered transfer takes up, twice
constexpr int64_t kMost = int64_t(1) << 60;
constexpr char kMagic[] = "CGPTDISK";
constexpr uint32_t kVersion = 1;
constexpr size_t kIdentityAt = 24, kChecksumAt = kBlock - 8, kMostIdentity = 4000;

struct Free {
    void operator()(void* p) const { std::free(p); }
};
using Block = std::unique_ptr<char, Free>;

Block aligned(int64_t nbytes) {
    void* p = std::aligned_alloc(kBlock, static_cast<size_t>(nbytes));
    if (p == nullptr) throw std::bad_alloc();
    std::memset(p, 0, static_cast<size_t>(nbytes));
    return Block(static_cast<char*>(p));
}

int64_t whole_blocks(int64_t n) { return (n + kBlock - 1) / kBlock * kBlock; }

uint64_t fnv1a(const char* data, size_t n) {
    uint64_t hash = 0xcbf29ce484222325u;
    for (size_t i = 0; i < n; ++i) hash = (hash ^ static_cast<uint8_t>(data[i])) * 0x100000001b3u;
    return hash;
}

void put_number(char* at, uint64_t x, int bytes) {
    for (int i = 0; i < bytes; ++i) at[i] = static_cast<char>(x >> (8 * i));
}

uint64_t get_number(const char* at, int bytes) {
    uint64_t x = 0;
    for (int i = 0; i < bytes; ++i) x |= static_cast<uint64_t>(static_cast<uint8_t>(at[i])) << (8 * i);
    return x;
}

// The identity of another file may be anything: shown as far as one line goes.
std::string shown(const std::string& text) {
    std::string line;
    for (char c : text.substr(0, 200)) line += c >= ' ' && c <= '~' ? c : '?';
    return "'" + line + (text.size() > 200 ? "...'" : "'");
}

[[noreturn]] void refuse(const std::string& what, const std::string& wanted, const std::string& got) {
    throw std::invalid_argument("DiskFile: " + what + " must be " + wanted + ", got " + got);
}

template <class Call>
auto again(Call call) {  // for as long as a signal interrupts it
    for (;;) {
        const auto result = call();
        if (result != -1 || errno != EINTR) return result;
    }
}

}  // namespace

void DiskFile::fail(int code, const std::string& what) const {
    throw FileError(code, what + ": " + std::strerror(code), path_);
}

DiskFile::DiskFile(const std::string& path, int64_t nbytes, const std::string& identity, bool direct)
    : path_(path), identity_(identity), nbytes_(nbytes), blocks_(0) {
    if (nbytes < 1 || nbytes > kMost) refuse("nbytes", "from 1 to " + std::to_string(kMost), std::to_string(nbytes));
    if (identity.size() > kMostIdentity)
        refuse("identity", "at most " + std::to_string(kMostIdentity) + " bytes", std::to_string(identity.size()));
    blocks_ = whole_blocks(nbytes);
    file_ = again([&] { return ::open(path.c_str(), O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0600); });
    created_ = file_ >= 0;
    if (!created_ && errno == EEXIST) file_ = again([&] { return ::open(path.c_str(), O_RDWR | O_CLOEXEC); });
    if (file_ < 0) fail(errno, "cannot open the disk file");
    bool ours = false;  // to remove again where making it fails
    try {
        struct stat status{};
        if (fstat(file_, &status) != 0) fail(errno, "cannot ask for the disk file's size");
        if (!S_ISREG(status.st_mode)) refuse(path_, "a regular file", "another kind");
        // Not every network file system has locks; there the user has to see to it.
        if (again([&] { return flock(file_, LOCK_EX | LOCK_NB); }) != 0 && errno == EWOULDBLOCK)
            fail(EWOULDBLOCK, "another DiskFile has this file open");
        ours = created_;
        if (created_ || status.st_size == 0) {
            create();
            created_ = true;
        } else {
            check_header();
        }
        if (direct)
            go_direct();
        else
            why_buffered_ = "direct I/O was not asked for";
    } catch (...) {
        if (ours) unlink(path.c_str());
        ::close(file_);
        throw;
    }
}

DiskFile::~DiskFile() {
    if (file_ >= 0) ::close(file_);
}

void DiskFile::create() {
    const int64_t wanted = kBlock + blocks_;
    struct statvfs system{};
    const bool known = fstatvfs(file_, &system) == 0;
    const uint64_t free = known ? static_cast<uint64_t>(system.f_bavail) * system.f_frsize : 0;
    const std::string sizes = "the disk file takes " + std::to_string(wanted) + " bytes, free are " +
                              (known ? std::to_string(free) : std::string("an unknown number"));
    // Asked first: an allocation that fails at the end has taken the last block from everybody else meanwhile.
    if (known && free < static_cast<uint64_t>(wanted)) fail(ENOSPC, sizes);
    int error;
    do error = posix_fallocate(file_, 0, wanted);
    while (error == EINTR);
    if (error != 0) {
        (void)!ftruncate(file_, 0);
        fail(error, sizes);
    }
    Block header = aligned(kBlock);
    std::memcpy(header.get(), kMagic, 8);
    put_number(header.get() + 8, kVersion, 4);
    put_number(header.get() + 12, identity_.size(), 4);
    put_number(header.get() + 16, static_cast<uint64_t>(nbytes_), 8);
    std::memcpy(header.get() + kIdentityAt, identity_.data(), identity_.size());
    put_number(header.get() + kChecksumAt, fnv1a(header.get(), kChecksumAt), 8);
    move(true, -kBlock, header.get(), kBlock);
    if (fsync(file_) != 0) fail(errno, "cannot sync the disk file");
}

void DiskFile::check_header() {
    struct stat status{};
    if (fstat(file_, &status) != 0) fail(errno, "cannot ask for the disk file's size");
    if (status.st_size < kBlock) refuse(path_, "a disk file", std::to_string(status.st_size) + " bytes");
    Block header = aligned(kBlock);
    move(false, -kBlock, header.get(), kBlock);
    const char* const h = header.get();
    if (std::memcmp(h, kMagic, 8) != 0)
        refuse(path_, "a disk file", "one that does not begin with " + std::string(kMagic));
    if (fnv1a(h, kChecksumAt) != get_number(h + kChecksumAt, 8))
        refuse(path_, "a disk file with a whole header", "a damaged one: its checksum does not fit");
    const uint64_t version = get_number(h + 8, 4), length = get_number(h + 12, 4), size = get_number(h + 16, 8);
    if (version != kVersion)
        refuse(path_, "a disk file of version " + std::to_string(kVersion), std::to_string(version));
    if (length > kMostIdentity) refuse(path_, "a disk file with a whole header", "an identity of no possible length");
    const std::string identity(h + kIdentityAt, length);
    if (identity != identity_) refuse(path_, "the disk file of " + shown(identity_), "that of " + shown(identity));
    if (size != static_cast<uint64_t>(nbytes_))
        refuse(path_, "a disk file of " + std::to_string(nbytes_) + " bytes of records", std::to_string(size));
    if (status.st_size != kBlock + blocks_)
        refuse(path_, std::to_string(kBlock + blocks_) + " bytes long", std::to_string(status.st_size));
}

void DiskFile::go_direct() {
#if defined(STATX_DIOALIGN)
    struct statx status{};
    if (statx(file_, "", AT_EMPTY_PATH, STATX_DIOALIGN, &status) == 0 && (status.stx_mask & STATX_DIOALIGN)) {
        if (status.stx_dio_offset_align == 0) {
            why_buffered_ = "the file system has no direct I/O";
            return;
        }
        if (kBlock % status.stx_dio_offset_align != 0) {
            why_buffered_ = "the file system's direct I/O wants blocks of " +
                            std::to_string(status.stx_dio_offset_align) + " bytes";
            return;
        }
        if (status.stx_dio_mem_align != 0 && kBlock % status.stx_dio_mem_align == 0)
            memory_alignment_ = status.stx_dio_mem_align;
    }
#endif
    // Some file systems take the flag and refuse the first transfer, so one is tried.
    Block block = aligned(kBlock);
    const int flags = fcntl(file_, F_GETFL);
    if (flags == -1) fail(errno, "cannot ask for the disk file's flags");
    errno = 0;
    if (fcntl(file_, F_SETFL, flags | O_DIRECT) == 0 &&
        again([&] { return pread(file_, block.get(), kBlock, 0); }) == kBlock)
        return;
    why_buffered_ = std::string("the file system refuses direct I/O: ") + (errno ? std::strerror(errno) : "short read");
    if (fcntl(file_, F_SETFL, flags) != 0) fail(errno, "cannot leave direct I/O");
}

void DiskFile::check_call(const char* what, int64_t offset, int64_t nbytes) const {
    const std::string name = std::string("DiskFile.") + what + ": ";
    if (closed()) throw std::invalid_argument(name + "the file must be open, got a closed one");
    if (offset < 0 || offset % kBlock != 0)
        throw std::invalid_argument(name + "offset must be a multiple of " + std::to_string(kBlock) + ", got " +
                                    std::to_string(offset));
    if (offset > nbytes_ || nbytes > nbytes_ - offset)
        throw std::invalid_argument(name + "offset and length must end within " + std::to_string(nbytes_) +
                                    " bytes, got " + std::to_string(offset) + " and " + std::to_string(nbytes));
}

void DiskFile::read(int64_t offset, void* data, int64_t nbytes) const {
    std::shared_lock lock(open_);
    check_call("read", offset, nbytes);
    transfer(false, offset, static_cast<char*>(data), nbytes);
}

void DiskFile::write(int64_t offset, const void* data, int64_t nbytes) {
    std::shared_lock lock(open_);
    check_call("write", offset, nbytes);
    transfer(true, offset, const_cast<char*>(static_cast<const char*>(data)), nbytes);  // which writing only reads
}

void DiskFile::transfer(bool writing, int64_t offset, char* data, int64_t nbytes) const {
    if (direct()) {
        const bool fits = reinterpret_cast<uintptr_t>(data) % static_cast<uintptr_t>(memory_alignment_) == 0;
        const int64_t whole = fits ? nbytes / kBlock * kBlock : 0;
        for (int64_t done = 0; done < whole; done += kMostAtOnce)
            move(writing, offset + done, data + done, std::min(kMostAtOnce, whole - done));
        if (nbytes > whole) bounce(writing, offset + whole, data + whole, nbytes - whole);
        return;
    }
    // Two pieces are in the page cache at a time: one on its way to the disk, one being copied. All from the start is
    // dropped each time, as the cache keeps runs of pages that lie across two pieces until it is told of the whole run.
    for (int64_t done = 0; done < nbytes;) {
        const int64_t piece = std::min(kCachedAtOnce, nbytes - done);
        move(writing, offset + done, data + done, piece);
        if (writing) (void)sync_file_range(file_, kBlock + offset + done, piece, SYNC_FILE_RANGE_WRITE);
        if (done > 0) drop_cached(offset, done, writing);
        done += piece;
    }
    drop_cached(offset, nbytes, writing);
}

// Through memory that direct I/O takes, in whole blocks: the bytes of a last block that are not the caller's stay.
void DiskFile::bounce(bool writing, int64_t offset, char* data, int64_t nbytes) const {
    const int64_t size = std::min(kBounce, whole_blocks(nbytes));
    Block block = aligned(size);
    for (int64_t done = 0; done < nbytes; done += size) {
        const int64_t piece = std::min(size, nbytes - done), blocks = whole_blocks(piece);
        if (writing) {
            if (piece < blocks) move(false, offset + done + blocks - kBlock, block.get() + blocks - kBlock, kBlock);
            std::memcpy(block.get(), data + done, static_cast<size_t>(piece));
            move(true, offset + done, block.get(), blocks);
        } else {
            move(false, offset + done, block.get(), blocks);
            std::memcpy(data + done, block.get(), static_cast<size_t>(piece));
        }
    }
}

void DiskFile::move(bool writing, int64_t offset, char* data, int64_t nbytes) const {
    for (int64_t done = 0; done < nbytes;) {
        const size_t left = static_cast<size_t>(nbytes - done);
        const off_t at = kBlock + offset + done;
        const ssize_t moved =
            again([&] { return writing ? pwrite(file_, data + done, left, at) : pread(file_, data + done, left, at); });
        const auto place = [&] {
            return std::to_string(left) + " bytes at offset " + std::to_string(offset + done) + " of the records";
        };
        const int error = errno;
        if (moved < 0) fail(error, (writing ? "cannot write " : "cannot read ") + place());
        if (moved == 0) fail(EIO, (writing ? "the disk takes none of " : "the file ends before ") + place());
        done += moved;
        // Direct I/O goes on at a whole block only: what the disk took of the last one is moved again.
        if (direct() && done < nbytes && done % kBlock != 0) {
            if (moved < kBlock)
                fail(EIO, (writing ? "the disk takes only a part of " : "the file ends within ") + place());
            done = done / kBlock * kBlock;
        }
    }
}

void DiskFile::drop_cached(int64_t offset, int64_t nbytes, bool written) const {
    const off_t at = kBlock + offset;
    if (written) {
        const unsigned all = SYNC_FILE_RANGE_WAIT_BEFORE | SYNC_FILE_RANGE_WRITE | SYNC_FILE_RANGE_WAIT_AFTER;
        const int failed = again([&] { return sync_file_range(file_, at, nbytes, all); });
        // Some file systems know no ranges: then the cache keeps what it has until it is written.
        const int error = failed != 0 ? errno : 0;
        if (error != 0 && error != EINVAL && error != ENOSYS && error != ESPIPE)
            fail(error, "cannot write " + std::to_string(nbytes) + " bytes back");
    }
    (void)posix_fadvise(file_, at, nbytes, POSIX_FADV_DONTNEED);  // advice
}

void DiskFile::sync() {
    std::shared_lock lock(open_);
    check_call("sync", 0, 0);
    if (again([&] { return fsync(file_); }) != 0) fail(errno, "cannot sync the disk file");
}

void DiskFile::close() {
    std::unique_lock lock(open_);
    const int file = file_.exchange(-1);
    if (file >= 0 && ::close(file) != 0 && errno != EINTR) fail(errno, "cannot close the disk file");
}

}  // namespace cgpt
