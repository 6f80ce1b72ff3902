// One layer's KV pages: the bound pool has room for some, a file for all of them.
//
// A unit is what one KV head keeps of a page. Heads choose their blocks for themselves, so each has a cache of its own,
// over the same slots of the pool. Units in use are locked. Of the others the one not used for longest gives way, and is
// written back if it was changed. What a step streams because it needs more than fits gives way first, the last one
// read before all: so the rest stays, where "least recently used" would read everything again in every step.
#pragma once
#include <cstring>

#include "plugins/offload/page_file.h"

namespace edge {

constexpr int64_t kDiskBlock = 4096;         // units begin at multiples of it, as O_DIRECT wants
constexpr int64_t kLargestRead = 256 << 10;  // of neighbours in one request; larger ones are no faster

struct PageUnit {
  int32_t page, head;
  bool fresh;  // nothing of it is needed: it will be written anew
};
typedef std::vector<PageUnit> PageUnits;

// A tensor [slots, planes, heads, slice_bytes], of which a unit owns the planes of one page and head.
struct PagePart {
  char* data;
  int64_t planes, slice_bytes;
};

class PageStore {
 public:
  const int64_t slots, heads, unit_bytes;

  // The file has `pages` * heads units from `offset` on. All pages are zeros to begin with, as in a new file.
  PageStore(PageFile& file, int64_t layer, int64_t heads, int64_t pages, int64_t slots, int64_t offset,
            std::vector<PagePart> parts)
      : slots(slots),
        heads(heads),
        unit_bytes((stored_bytes(parts) + kDiskBlock - 1) / kDiskBlock * kDiskBlock),
        file_(file),
        layer_(layer),
        pages_(pages),
        offset_(offset),
        parts_(std::move(parts)),
        slot_of_(heads * pages, kNowhere),
        lost_(heads * pages, 0),
        places_(heads * (slots + 1)),
        states_(new std::atomic<uint8_t>[heads * slots]),
        free_(heads),
        idle_(heads),
        unlocked_(heads, slots),
        padding_(2 * kDiskBlock) {
    for (int64_t head = 0; head < heads; ++head) {
      place(head, slots).previous = place(head, slots).next = slots;
      for (int64_t slot = slots; slot-- > 0;) {
        state(head, slot) = kReady;
        free_[head].push_back(slot);
      }
    }
  }

  // Where in the pool a unit lies that is locked.
  int64_t slot(int64_t page, int64_t head) const { return slot_of_[head * pages_ + page]; }

  // Keeps units in the pool until they are unlocked, and begins to read those that are not there. If one cannot be had
  // none is locked, the result is false and the file knows why. Not to be called by two threads at once.
  bool lock(const PageUnits& units) {
    PageUnits locked, missing;
    for (const PageUnit& unit : units)
      if (slot(unit.page, unit.head) != kNowhere) {
        take(unit.head, slot(unit.page, unit.head));
        locked.push_back(unit);
      }
    file_.hits += locked.size();
    Transfers writes;
    const bool possible = make_room(units, locked.size(), locked, missing, writes);
    write_back(std::move(writes));
    if (possible) {
      file_.misses += missing.size();
      start_reads(std::move(missing));
    } else {
      for (const PageUnit& unit : missing) state(unit.head, slot(unit.page, unit.head)) = kFailed;
      unlock(locked, false, false);
    }
    return possible;
  }

  // Waits until a locked unit can be read; false if it never can. Any thread.
  bool wait(int64_t page, int64_t head) {
    const std::atomic<uint8_t>& now = state(head, slot(page, head));
    if (now.load(std::memory_order_acquire) == kReading)
      file_.wait_until([&] { return now.load(std::memory_order_acquire) != kReading; });
    return now.load(std::memory_order_acquire) == kReady;
  }

  // Locks units and waits until all can be read. If one never can none is locked, and the result is false.
  bool hold(const PageUnits& units) {
    if (!lock(units)) return false;
    bool usable = true;
    for (const PageUnit& unit : units) usable &= wait(unit.page, unit.head);
    if (!usable) unlock(units, false, false);
    return usable;
  }

  // `changed`: the units were written to. `streamed`: those that were not here before give way first.
  void unlock(const PageUnits& units, bool changed, bool streamed) {
    for (const PageUnit& unit : units) {
      const bool usable = wait(unit.page, unit.head);
      const int64_t at = slot(unit.page, unit.head);
      Place& p = place(unit.head, at);
      p.changed |= changed;
      if (--p.locks != 0) continue;
      ++unlocked_[unit.head];
      if (usable) {
        insert(unit.head, at, streamed && p.is_new ? slots : place(unit.head, slots).previous);
      } else {
        forget(unit.head, at);
        free_[unit.head].push_back(at);
      }
      p.is_new = false;
    }
  }

  // For a step that does not fit and will lock `wanted`, part after part: what is here for nothing gives way before all
  // else, and what comes in its place is kept like what was here. Without units: no such step any more.
  void set_idle(const PageUnits& wanted) {
    for (auto& idle : idle_) idle.clear();
    if (wanted.empty()) return;
    std::vector<bool> is_wanted(heads * pages_);
    for (const PageUnit& unit : wanted) is_wanted[unit.head * pages_ + unit.page] = true;
    for (int64_t head = 0; head < heads; ++head)
      for (int64_t at = place(head, slots).previous; at != slots; at = place(head, at).previous)
        if (!is_wanted[head * pages_ + place(head, at).page]) idle_[head].push_back(at);
  }

  // Copies a whole page to or from `values`, part after part as the pool has it -> 0, an errno or kShort. Not while
  // units are locked.
  int copy(int64_t page, char* values, bool is_write) {
    for (int64_t head = 0; head < heads; ++head)
      if (const int error = copy_unit(page, head, values, is_write)) return error;
    return 0;
  }

  PageFile& file() { return file_; }
  const void* address() const { return parts_[0].data; }

 private:
  enum State : uint8_t { kReady, kReading, kFailed };
  static constexpr int32_t kNowhere = -1;

  // Of a slot and head: whose unit it holds, and its neighbours among the unlocked units, those to give way first in
  // front.
  struct Place {
    int32_t page = kNowhere, previous = 0, next = 0, locks = 0;
    bool changed = false, is_new = false;
  };

  static int64_t stored_bytes(const std::vector<PagePart>& parts) {
    int64_t bytes = 0;
    for (const PagePart& part : parts) bytes += part.planes * part.slice_bytes;
    return bytes;
  }

  Place& place(int64_t head, int64_t slot) { return places_[head * (slots + 1) + slot]; }
  std::atomic<uint8_t>& state(int64_t head, int64_t slot) { return states_[head * slots + slot]; }
  int64_t unit_offset(int64_t page, int64_t head) const { return offset_ + (page * heads + head) * unit_bytes; }

  // Into the list of the unlocked, after `previous`; the list's end is `slots`, and so what comes before its first.
  void insert(int64_t head, int64_t slot, int64_t previous) {
    Place &p = place(head, slot), &before = place(head, previous);
    p.previous = previous;
    p.next = before.next;
    place(head, before.next).previous = slot;
    before.next = slot;
  }

  void remove(int64_t head, int64_t slot) {
    const Place& p = place(head, slot);
    place(head, p.previous).next = p.next;
    place(head, p.next).previous = p.previous;
  }

  void take(int64_t head, int64_t slot) {
    Place& p = place(head, slot);
    if (p.locks++ != 0) return;
    remove(head, slot);
    --unlocked_[head];
  }

  void forget(int64_t head, int64_t slot) {
    Place& p = place(head, slot);
    slot_of_[head * pages_ + p.page] = kNowhere;
    p.page = kNowhere;
    p.changed = false;
    state(head, slot) = kReady;
  }

  // Gives a slot to each unit that has none. `locked` and `missing` tell what was done, even if not all could be.
  bool make_room(const PageUnits& units, size_t hits, PageUnits& locked, PageUnits& missing, Transfers& writes) {
    if (hits == units.size()) return true;
    std::vector<bool> is_hit(units.size());
    size_t hit = 0;
    for (size_t i = 0; i < units.size() && hit < hits; ++i)
      if (units[i].page == locked[hit].page && units[i].head == locked[hit].head) is_hit[i] = true, ++hit;
    for (size_t i = 0; i < units.size(); ++i) {
      const PageUnit& unit = units[i];
      if (is_hit[i]) continue;
      if (slot(unit.page, unit.head) == kNowhere) {
        if (!can_be_had(unit)) return false;
        settle(unit, writes);
        missing.push_back(unit);
      } else {
        take(unit.head, slot(unit.page, unit.head));  // named twice
      }
      locked.push_back(unit);
    }
    return true;
  }

  bool can_be_had(const PageUnit& unit) {
    const int error = lost_[unit.head * pages_ + unit.page];
    if (error != 0 && !unit.fresh) {
      file_.fail(sentence(unit.page, "could not be written to", error));
      return false;
    }
    if (unlocked_[unit.head] > 0) return true;
    file_.fail("all " + std::to_string(slots) + " KV pages that layer " + std::to_string(layer_) +
               " may hold in memory are in use");
    return false;
  }

  // The unit gets a free slot, or that of the first to give way, which is written back; it is locked.
  void settle(const PageUnit& unit, Transfers& writes) {
    std::vector<int32_t>&free = free_[unit.head], &idle = idle_[unit.head];
    const bool is_kept = free.empty() && !idle.empty();
    const int64_t at = !free.empty() ? free.back() : is_kept ? idle.back() : place(unit.head, slots).next;
    Place& p = place(unit.head, at);
    if (p.page != kNowhere) {
      if (p.changed) writes.push_back(transfer(true, p.page, unit.head, at));
      remove(unit.head, at);
      forget(unit.head, at);
    }
    if (!free.empty())
      free.pop_back();
    else if (is_kept)
      idle.pop_back();
    --unlocked_[unit.head];
    p.locks = 1;
    p.page = unit.page;
    p.is_new = !is_kept;
    slot_of_[unit.head * pages_ + unit.page] = at;
    lost_[unit.head * pages_ + unit.page] = 0;
  }

  std::unique_ptr<Transfer> transfer(bool is_write, int64_t page, int64_t head, int64_t slot) {
    auto t = std::make_unique<Transfer>();
    t->is_write = is_write;
    t->offset = unit_offset(page, head);
    t->bytes = unit_bytes;
    add_memory(t->memory, head, slot);
    t->done = is_write ? written : read;
    t->owner = this;
    t->places = {head * slots + slot, head * pages_ + page};
    return t;
  }

  // The unit's slices in the pool, in the file's order, and what fills up its last disk block.
  void add_memory(std::vector<iovec>& memory, int64_t head, int64_t slot) {
    int64_t bytes = 0;
    for (const PagePart& part : parts_)
      for (int64_t plane = 0; plane < part.planes; ++plane, bytes += part.slice_bytes)
        memory.push_back({part.data + ((slot * part.planes + plane) * heads + head) * part.slice_bytes,
                          static_cast<size_t>(part.slice_bytes)});
    if (bytes < unit_bytes) memory.push_back({padding(), static_cast<size_t>(unit_bytes - bytes)});
  }

  char* padding() {
    const uintptr_t address = reinterpret_cast<uintptr_t>(padding_.data());
    return padding_.data() + (kDiskBlock - address % kDiskBlock) % kDiskBlock;
  }

  // Their slots are wanted, so this waits. A unit that cannot be written is lost: whoever needs it will be told.
  void write_back(Transfers writes) {
    if (writes.empty()) return;
    writing_ = writes.size();
    file_.start(std::move(writes));
    file_.wait_until([&] { return writing_ == 0; });
  }

  static void written(Transfer& t, int error) {
    auto& store = *static_cast<PageStore*>(t.owner);
    store.lost_[t.places[1]] = error;
    --store.writing_;
  }

  // Neighbours in the file are read together.
  void start_reads(PageUnits missing) {
    missing.erase(std::remove_if(missing.begin(), missing.end(), [](const PageUnit& u) { return u.fresh; }),
                  missing.end());
    std::sort(missing.begin(), missing.end(), [](const PageUnit& a, const PageUnit& b) {
      return std::make_pair(a.page, a.head) < std::make_pair(b.page, b.head);
    });
    Transfers reads;
    for (const PageUnit& unit : missing) {
      const int64_t at = slot(unit.page, unit.head);
      state(unit.head, at) = kReading;
      Transfer* last = reads.empty() ? nullptr : reads.back().get();
      if (last != nullptr && last->offset + last->bytes == unit_offset(unit.page, unit.head) &&
          last->bytes + unit_bytes <= kLargestRead) {
        last->bytes += unit_bytes;
        add_memory(last->memory, unit.head, at);
        last->places.insert(last->places.end(), {unit.head * slots + at, unit.head * pages_ + unit.page});
      } else {
        reads.push_back(transfer(false, unit.page, unit.head, at));
      }
    }
    file_.start(std::move(reads));
  }

  static void read(Transfer& t, int error) {
    auto& store = *static_cast<PageStore*>(t.owner);
    if (error != 0) store.file_.fail(store.sentence(t.places[1] % store.pages_, "cannot be read back from", error));
    for (size_t i = 0; i < t.places.size(); i += 2)
      store.states_[t.places[i]].store(error == 0 ? kReady : kFailed, std::memory_order_release);
  }

  std::string sentence(int64_t page, const char* what, int error) const {
    const char* reason = error == kShort ? "the file is shorter than it should be" : strerror(error);
    return "KV page " + std::to_string(page) + " of layer " + std::to_string(layer_) + " " + what + " " +
           file_.folder + " (" + reason + ")";
  }

  int copy_unit(int64_t page, int64_t head, char* values, bool is_write) {
    int16_t& lost = lost_[head * pages_ + page];
    if (lost != 0 && !is_write) return lost;
    const int64_t at = slot(page, head);
    std::vector<char> buffer(unit_bytes + kDiskBlock);
    const uintptr_t address = reinterpret_cast<uintptr_t>(buffer.data());
    char* unit = buffer.data() + (kDiskBlock - address % kDiskBlock) % kDiskBlock;
    const std::vector<iovec> memory{{unit, static_cast<size_t>(unit_bytes)}};
    if (at == kNowhere && !is_write)
      if (const int error = file_.transfer(false, unit_offset(page, head), memory)) return error;
    for (const PagePart& part : parts_)
      for (int64_t plane = 0; plane < part.planes; ++plane, unit += part.slice_bytes) {
        char* in_pool = part.data + ((at * part.planes + plane) * heads + head) * part.slice_bytes;
        char *ours = at == kNowhere ? unit : in_pool, *theirs = values + plane_offset(part, plane, head);
        memcpy(is_write ? ours : theirs, is_write ? theirs : ours, part.slice_bytes);
      }
    if (!is_write) return 0;
    if (at != kNowhere) return place(head, at).changed = true, 0;
    lost = file_.transfer(true, unit_offset(page, head), memory);
    return lost;
  }

  // Where a slice lies in `values` of copy().
  int64_t plane_offset(const PagePart& part, int64_t plane, int64_t head) const {
    int64_t before = 0;
    for (const PagePart* p = parts_.data(); p != &part; ++p) before += p->planes * heads * p->slice_bytes;
    return before + (plane * heads + head) * part.slice_bytes;
  }

  PageFile& file_;
  const int64_t layer_, pages_, offset_;
  const std::vector<PagePart> parts_;
  std::vector<int32_t> slot_of_;  // [heads, pages]
  std::vector<int16_t> lost_;     // [heads, pages]: why a unit could not be written back, 0 if nothing is wrong
  std::vector<Place> places_;     // [heads, slots + 1]
  std::unique_ptr<std::atomic<uint8_t>[]> states_;  // [heads, slots]
  std::vector<std::vector<int32_t>> free_;          // by head: slots that hold nothing
  std::vector<std::vector<int32_t>> idle_;          // by head: slots whose units the present step has no use for
  std::vector<int64_t> unlocked_;                   // by head: slots that hold nothing or may give way
  std::atomic<size_t> writing_{0};
  std::vector<char> padding_;
};

}  // namespace edge
