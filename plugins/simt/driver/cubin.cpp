// What the driver wants to know of a cubin: its architecture, and its kernels with their launch bounds and sizes.
#include <elf.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>

#include "plugins/simt/driver/driver.h"

namespace driver {
namespace {

constexpr unsigned MACHINE_CUDA = 190;
constexpr unsigned KERNEL_SYMBOL = 0x10;  // of st_other
constexpr size_t MOST_BYTES = size_t{1} << 30;
enum Format : uint8_t { HALF_WORD = 3, SIZED = 4 };                           // of an attribute in .nv.info
enum Key : uint8_t { MAX_THREADS = 0x05, STACK_BYTES = 0x23, PARAMETER_BYTES = 0x19, REGISTERS = 0x2f };

void must(bool holds) { require(holds, CUDA_ERROR_INVALID_IMAGE); }

// Bytes of an image whose size nobody gives: reads what is there, by way of a file, where a bad address is no fault.
std::string bytes_at(const void* start, size_t bytes) {
  must(bytes <= MOST_BYTES);
  const int file = memfd_create("image", MFD_CLOEXEC);
  size_t done = 0;
  for (ssize_t n = 1; n > 0 && done < bytes; done += n > 0 ? static_cast<size_t>(n) : 0)
    n = write(file, static_cast<const char*>(start) + done, bytes - done);
  std::string text(done, '\0');
  const ssize_t read = pread(file, text.data(), done, 0);
  close(file);
  must(done == bytes && read == static_cast<ssize_t>(bytes));
  return text;
}

template <class T>
T value_at(const std::string& bytes, size_t offset) {
  T value;
  must(offset <= bytes.size() && sizeof value <= bytes.size() - offset);
  memcpy(&value, bytes.data() + offset, sizeof value);
  return value;
}

std::string name_at(const std::string& names, size_t offset) {
  must(offset < names.size() && names.find('\0', offset) != std::string::npos);
  return names.c_str() + offset;
}

struct Section {
  Elf64_Shdr header;
  std::string name;
};

struct Image {
  Elf64_Ehdr header;
  std::string bytes;
  std::vector<Section> sections;

  std::string contents(const Section& s) const {
    if (s.header.sh_type == SHT_NOBITS) return {};
    must(s.header.sh_offset <= bytes.size() && s.header.sh_size <= bytes.size() - s.header.sh_offset);
    return bytes.substr(s.header.sh_offset, s.header.sh_size);
  }
  const Section* find(const std::string& name) const {
    const auto found = std::find_if(sections.begin(), sections.end(), [&](const Section& s) { return s.name == name; });
    return found == sections.end() ? nullptr : &*found;
  }
};

Image read_image(const void* start) {
  Image image;
  image.header = value_at<Elf64_Ehdr>(bytes_at(start, sizeof(Elf64_Ehdr)), 0);
  const Elf64_Ehdr& h = image.header;
  must(!memcmp(h.e_ident, ELFMAG, SELFMAG) && h.e_ident[EI_CLASS] == ELFCLASS64 && h.e_machine == MACHINE_CUDA);
  must(h.e_shentsize == sizeof(Elf64_Shdr) && h.e_shstrndx < h.e_shnum && h.e_shoff <= MOST_BYTES);
  image.bytes = bytes_at(start, std::max(h.e_shoff + h.e_shnum * sizeof(Elf64_Shdr),
                                         h.e_phoff + h.e_phnum * sizeof(Elf64_Phdr)));
  for (size_t i = 0; i < h.e_shnum; ++i)
    image.sections.push_back({value_at<Elf64_Shdr>(image.bytes, h.e_shoff + i * sizeof(Elf64_Shdr)), {}});
  const std::string names = image.contents(image.sections[h.e_shstrndx]);
  for (Section& section : image.sections) section.name = name_at(names, section.header.sh_name);
  return image;
}

int architecture_of(const Elf64_Ehdr& header) {
  const unsigned in_flags = header.e_ident[EI_ABIVERSION] >= 8 ? header.e_flags >> 8 : header.e_flags;
  return static_cast<int>(in_flags & 0xff);
}

// Calls visit(key, data) for every attribute that has data.
template <class Visit>
void for_each_attribute(const std::string& info, Visit visit) {
  for (size_t at = 0; at + 4 <= info.size();) {
    const auto format = value_at<uint8_t>(info, at), key = value_at<uint8_t>(info, at + 1);
    const auto word = value_at<uint16_t>(info, at + 2);
    must(format != SIZED || word <= info.size() - at - 4);
    if (format == SIZED) visit(key, info.substr(at + 4, word));
    if (format == HALF_WORD) visit(key, info.substr(at + 2, 2));
    at += format == SIZED ? 4 + word : 4;
  }
}

KernelFacts facts_of(const Image& image, const std::string& name, int architecture) {
  KernelFacts facts;
  if (const Section* shared = image.find(".nv.shared." + name)) {
    const auto bytes = static_cast<unsigned>(shared->header.sh_size);
    const bool with_system = architecture >= 90 && bytes >= SYSTEM_SHARED;
    facts.shared_bytes = with_system ? bytes - SYSTEM_SHARED : bytes;
  }
  const Section* info = image.find(".nv.info." + name);
  must(info);
  for_each_attribute(image.contents(*info), [&](uint8_t key, const std::string& data) {
    if (key == MAX_THREADS) facts.threads = value_at<uint32_t>(data, 0);
    if (key == PARAMETER_BYTES) facts.struct_bytes = value_at<uint16_t>(data, 0);
  });
  return facts;
}

}  // namespace

Cubin read_cubin(const void* start) {
  const Image image = read_image(start);
  Cubin cubin{architecture_of(image.header), {}};
  const Section* symbols = image.find(".symtab");
  must(symbols && symbols->header.sh_link < image.sections.size());
  const std::string table = image.contents(*symbols);
  const std::string names = image.contents(image.sections[symbols->header.sh_link]);
  std::map<uint32_t, KernelFacts*> by_symbol;
  for (size_t i = 0; i < table.size() / sizeof(Elf64_Sym); ++i) {
    const auto symbol = value_at<Elf64_Sym>(table, i * sizeof(Elf64_Sym));
    if (ELF64_ST_TYPE(symbol.st_info) != STT_FUNC || !(symbol.st_other & KERNEL_SYMBOL)) continue;
    const std::string name = name_at(names, symbol.st_name);
    by_symbol[static_cast<uint32_t>(i)] = &(cubin.kernels[name] = facts_of(image, name, cubin.architecture));
  }
  const Section* info = image.find(".nv.info");
  must(info);
  for_each_attribute(image.contents(*info), [&](uint8_t key, const std::string& data) {
    if (key != REGISTERS && key != STACK_BYTES) return;
    const auto found = by_symbol.find(value_at<uint32_t>(data, 0));
    if (found == by_symbol.end()) return;
    (key == REGISTERS ? found->second->registers : found->second->stack_bytes) = value_at<uint32_t>(data, 4);
  });
  return cubin;
}

}  // namespace driver
