// Many reads and writes of one file at once. Linux AIO: one system call starts a batch, no thread waits for each, and
// containers that forbid io_uring allow it. With O_DIRECT the system's page cache holds nothing of the file.
#pragma once
#include <fcntl.h>
#include <linux/aio_abi.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

namespace edge {

constexpr int kShort = -1;  // stands where an errno would: fewer bytes than were asked for
constexpr int kMostInFlight = 256;
constexpr int kPolls = 400;  // before a wait: a read takes about as long as being put to sleep and woken

struct Transfer {
  bool is_write;
  int64_t offset, bytes;
  std::vector<iovec> memory;
  // Called once with 0, an errno or kShort, by whichever thread notices; the last two are the caller's own.
  void (*done)(Transfer& transfer, int error);
  void* owner;
  std::vector<int64_t> places;
};
typedef std::vector<std::unique_ptr<Transfer>> Transfers;

class PageFile {
 public:
  std::atomic<uint64_t> hits{0}, misses{0}, bytes_read{0}, bytes_written{0};
  const std::string folder;  // for messages

  // The file stays the caller's. `direct`: it was opened so; otherwise what was moved is dropped from the page cache.
  PageFile(int fd, bool direct, const char* folder) : folder(folder), fd_(fd), direct_(direct) {
    if (syscall(SYS_io_setup, kMostInFlight, &aio_) != 0) aio_ = 0;  // not here: one transfer after the other, then
  }
  ~PageFile() {
    wait_until([&] { return in_flight_ == 0; });
    if (aio_ != 0) syscall(SYS_io_destroy, aio_);
  }
  PageFile(const PageFile&) = delete;
  PageFile& operator=(const PageFile&) = delete;

  void start(Transfers transfers) {
    std::lock_guard<std::mutex> lock(mutex_);
    for (size_t first = 0; first < transfers.size();) {
      while (in_flight_ == kMostInFlight) reap();
      const size_t room = kMostInFlight - in_flight_;
      const size_t queued = aio_ == 0 ? 0 : submit(&transfers[first], std::min(room, transfers.size() - first));
      first += queued;
      if (queued == 0) {  // refused, and the plain call will say why
        Transfer& t = *transfers[first++];
        t.done(t, transfer(t.is_write, t.offset, t.memory));
      }
    }
  }

  // Returns when done() is true; whoever waits takes note of all that is finished.
  template <class Done>
  void wait_until(Done done) {
    while (!done()) {
      std::lock_guard<std::mutex> lock(mutex_);
      if (!done()) reap();
    }
  }

  // One transfer on the caller's thread -> 0, an errno or kShort.
  int transfer(bool is_write, int64_t offset, const std::vector<iovec>& memory) {
    int64_t bytes = 0, moved;
    for (const iovec& part : memory) bytes += part.iov_len;
    do moved = (is_write ? pwritev : preadv)(fd_, memory.data(), memory.size(), offset);
    while (moved < 0 && errno == EINTR);
    const int error = moved < 0 ? errno : moved == bytes ? 0 : kShort;
    note(is_write, offset, bytes, error);
    return error;
  }

  // The first failure since it was taken, a sentence without an end; "" if there was none.
  std::string failure() {
    std::lock_guard<std::mutex> lock(failure_mutex_);
    return failure_;
  }
  std::string take_failure() {
    std::lock_guard<std::mutex> lock(failure_mutex_);
    return std::exchange(failure_, "");
  }
  bool failed() { return !failure().empty(); }
  void fail(const std::string& what) {
    std::lock_guard<std::mutex> lock(failure_mutex_);
    if (failure_.empty()) failure_ = what;
  }

 private:
  size_t submit(std::unique_ptr<Transfer>* transfers, size_t count) {
    std::vector<iocb> blocks(count);
    std::vector<iocb*> pointers(count);
    for (size_t i = 0; i < count; ++i) {
      const Transfer& t = *transfers[i];
      blocks[i] = {};
      blocks[i].aio_data = reinterpret_cast<uint64_t>(&t);
      blocks[i].aio_lio_opcode = t.is_write ? IOCB_CMD_PWRITEV : IOCB_CMD_PREADV;
      blocks[i].aio_fildes = fd_;
      blocks[i].aio_buf = reinterpret_cast<uint64_t>(t.memory.data());
      blocks[i].aio_nbytes = t.memory.size();
      blocks[i].aio_offset = t.offset;
      pointers[i] = &blocks[i];
    }
    const int64_t queued = std::max<int64_t>(0, syscall(SYS_io_submit, aio_, count, pointers.data()));
    for (int64_t i = 0; i < queued; ++i) transfers[i].release();  // reap() takes it back
    in_flight_ += queued;
    return queued;
  }

  // Waits for at least one transfer and takes note of all that are finished.
  void reap() {
    io_event events[64];
    int64_t count = 0;
    timespec now{};
    for (int i = 0; i < kPolls && count <= 0; ++i) count = syscall(SYS_io_getevents, aio_, 0, 64, events, &now);
    if (count <= 0) count = syscall(SYS_io_getevents, aio_, 1, 64, events, nullptr);
    for (int64_t i = 0; i < count; ++i) {
      const std::unique_ptr<Transfer> t(reinterpret_cast<Transfer*>(events[i].data));
      const int64_t result = events[i].res;
      const int error = result < 0 ? static_cast<int>(-result) : result == t->bytes ? 0 : kShort;
      note(t->is_write, t->offset, t->bytes, error);
      t->done(*t, error);
      --in_flight_;
    }
  }

  void note(bool is_write, int64_t offset, int64_t bytes, int error) {
    if (error == 0) (is_write ? bytes_written : bytes_read) += bytes;
    if (!direct_) posix_fadvise(fd_, offset, bytes, POSIX_FADV_DONTNEED);
  }

  const int fd_;
  const bool direct_;
  aio_context_t aio_ = 0;
  std::mutex mutex_, failure_mutex_;
  std::atomic<int> in_flight_{0};
  std::string failure_;
};

}  // namespace edge
