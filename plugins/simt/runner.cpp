// A child process of emulator.py: reads a job (buffers and launches), runs it, writes the buffers back.
//
// Job: lines `seed N`, `buffer NAME BYTES`, `launch LIBRARY SYMBOL GRID_X GRID_Y GRID_Z THREADS SHARED_BYTES
// POINTERS (OFFSET BUFFER)... STRUCT_IN_HEX`, then `data` and the buffers' bytes. Result: lines of statistics, `data`,
// bytes.
#include <dlfcn.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iostream>
#include <sstream>

#include "plugins/simt/block.h"

namespace {

using simt::Buffer;

struct Launch {
  std::string library, symbol;
  simt::Dim3 grid;
  unsigned threads;
  size_t shared_bytes;
  std::vector<std::pair<size_t, size_t>> pointers;
  std::vector<unsigned char> arguments;
};

struct Job {
  std::vector<Buffer> buffers;
  std::vector<Launch> launches;
};

Launch read_launch(std::istringstream& line) {
  Launch l;
  size_t pointers;
  std::string hex;
  line >> l.library >> l.symbol >> l.grid.x >> l.grid.y >> l.grid.z >> l.threads >> l.shared_bytes >> pointers;
  l.pointers.resize(pointers);
  for (auto& [offset, buffer] : l.pointers) line >> offset >> buffer;
  line >> hex;
  for (size_t i = 0; i + 1 < hex.size(); i += 2)
    l.arguments.push_back(static_cast<unsigned char>(std::stoi(hex.substr(i, 2), nullptr, 16)));
  return l;
}

Job read_job(const char* path) {
  Job job;
  std::ifstream file(path, std::ios::binary);
  std::string text, word, name;
  while (std::getline(file, text) && text != "data") {
    std::istringstream line(text);
    line >> word;
    size_t bytes;
    if (word == "seed") line >> simt::seed;
    if (word == "buffer" && line >> name >> bytes) job.buffers.push_back(simt::allocate("buffer " + name, bytes));
    if (word == "launch") job.launches.push_back(read_launch(line));
  }
  for (Buffer& b : job.buffers)
    if (!file.read(reinterpret_cast<char*>(b.start), static_cast<std::streamsize>(b.bytes)))
      simt::fail("the job's data end early");
  return job;
}

#if defined(SIMT_RACE)
std::vector<std::vector<unsigned char>> contents_of(const std::vector<Buffer>& buffers) {
  std::vector<std::vector<unsigned char>> contents;
  for (const Buffer& b : buffers) contents.emplace_back(b.start, b.start + b.bytes);
  return contents;
}
#endif

void fail_on_races() {
  const auto races = static_cast<unsigned long long>(simt::statistics.races);
  if (races) simt::fail("%llu data races", races);
}

void run(Job& job, Launch& launch) {
  simt::kernel_name = launch.symbol.c_str();
  void* library = dlopen(launch.library.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (!library) simt::fail("%s", dlerror());
  auto entry = reinterpret_cast<simt::Entry>(dlsym(library, (launch.symbol + "__run").c_str()));
  auto bytes = static_cast<const size_t*>(dlsym(library, (launch.symbol + "__bytes").c_str()));
  if (!entry || !bytes) simt::fail("%s has no such kernel", launch.library.c_str());
  if (*bytes != launch.arguments.size())
    simt::fail("the kernel takes a struct of %zu bytes, the launch has %zu", *bytes, launch.arguments.size());
  for (const auto& [offset, buffer] : launch.pointers)
    memcpy(&launch.arguments[offset], &job.buffers[buffer].start, sizeof(void*));
  const auto go = [&] {
    simt::watch(job.buffers);
    simt::run_grid(entry, launch.arguments.data(), launch.grid, launch.threads, launch.shared_bytes);
  };
#if defined(SIMT_RACE)
  // Only what a launch writes can race: a first run, which is undone, tells which buffers need the costly check.
  const auto before = job.buffers;
  const auto contents = contents_of(before);
  const auto statistics = simt::statistics;
  go();
  fail_on_races();
  for (size_t i = 0; i < before.size(); ++i) {
    Buffer& b = job.buffers[i];
    const bool is_written = b.written != before[i].written;
    b = before[i];
    b.is_checked = is_written;
    memcpy(b.start, contents[i].data(), b.bytes);
  }
  simt::statistics = statistics;
#endif
  go();
  for (const Buffer& b : job.buffers) simt::check_guards(b);
  fail_on_races();
}

void write_result(const Job& job, const char* path) {
  std::ofstream file(path, std::ios::binary);
  file << "mma " << simt::statistics.mma << "\nbank_conflicts " << simt::statistics.bank_conflicts << "\n";
  for (const Buffer& b : job.buffers) file << "buffer " << b.read << " " << b.written << "\n";
  file << "data\n";
  for (const Buffer& b : job.buffers)
    file.write(reinterpret_cast<const char*>(b.start), static_cast<std::streamsize>(b.bytes));
  file.close();
  if (!file) simt::fail("%s cannot be written", path);
}

}  // namespace

int main(int, char** argv) try {
  Job job = read_job(argv[1]);
  for (Launch& launch : job.launches) run(job, launch);
  write_result(job, argv[2]);
  _Exit(0);
} catch (const simt::Failure& failure) {
  fprintf(stderr, "%s\n", failure.message.c_str());
  fflush(stderr);
  _Exit(3);
}
