// Attention over pages of which only some are in memory (plugins/offload/page_store.h).
//
// A step goes through its blocks in waves, in their order: a wave's units are locked before its tasks begin and unlocked
// after them. If all units of a step fit it is one wave. If not there are many small ones, of which some are being read
// while one is computed, and each task goes on where it stopped: the result is the same to the last bit.
#pragma once
#include <algorithm>

#include "plugins/paged_attention/cpu.h"

namespace edge {

constexpr int64_t kWavesAhead = 4;  // locked at once: one that is computed, the others being read
constexpr int64_t kWavePages = 16;  // of each head in a wave, at most: enough for reads of the largest size

struct Wave {
  int64_t end;  // its blocks come before this one, counted through all sequences
  PageUnits units;
};

inline int64_t block_place(const AttentionStep& s, int64_t sequence, int64_t block) {
  return sequence * s.table_width + block;
}

// Every unit that a tile needs, at most `most` a head and wave. needed: [places, kv_heads].
inline std::vector<Wave> make_waves(const AttentionStep& s, const std::vector<bool>& needed, int64_t most) {
  const int64_t places = s.sequences * s.table_width;
  std::vector<int64_t> counts(s.kv_heads);
  std::vector<Wave> waves{{places, {}}};
  for (int64_t at = 0; at < places; ++at) {
    bool is_full = false;
    for (int64_t head = 0; head < s.kv_heads; ++head)
      is_full |= needed[at * s.kv_heads + head] && counts[head] == most;
    if (is_full) {
      waves.back().end = at;
      waves.push_back({places, {}});
      std::fill(counts.begin(), counts.end(), 0);
    }
    for (int64_t head = 0; head < s.kv_heads; ++head) {
      if (!needed[at * s.kv_heads + head]) continue;
      waves.back().units.push_back({s.page_table[at], static_cast<int32_t>(head), false});
      ++counts[head];
    }
  }
  return waves;
}

inline PageUnits all_units(const std::vector<Wave>& waves) {
  PageUnits all;
  for (const Wave& wave : waves) all.insert(all.end(), wave.units.begin(), wave.units.end());
  return all;
}

// The waves of a step, and whether its units can all be in the pool at once.
template <class Choices>
std::pair<std::vector<Wave>, bool> plan_waves(const AttentionStep& s, const std::vector<TokenTile>& tiles,
                                              const Choices& choices) {
  std::vector<bool> needed(s.sequences * s.table_width * s.kv_heads);
  for (size_t i = 0; i < tiles.size(); ++i)
    for (const int64_t block : choices[i].blocks)
      needed[block_place(s, tiles[i].sequence, block) * s.kv_heads + tiles[i].head] = true;
  std::vector<int64_t> counts(s.kv_heads);
  for (size_t i = 0; i < needed.size(); ++i) counts[i % s.kv_heads] += needed[i];
  const int64_t slots = s.store->slots;
  const bool fits = *std::max_element(counts.begin(), counts.end()) <= slots;
  const int64_t some = std::clamp<int64_t>(slots / (4 * kWavesAhead), 1, kWavePages);
  return {make_waves(s, needed, fits ? slots : some), fits};
}

// All tasks of a step, as far as they have come.
template <class T, class E, class Choices>
class StoredTasks {
 public:
  StoredTasks(const AttentionStep& s, const Cache<T>& cache, const std::vector<TokenTile>& tiles,
              const Choices& choices, const std::vector<AttentionTask>& tasks)
      : s_(s), cache_(cache), tiles_(tiles), choices_(choices), tasks_(tasks), states_(tasks.size()) {
    for (size_t i = 0; i < tasks.size(); ++i) order_.push_back(i), reached_.push_back(tasks[i].begin);
    std::stable_sort(order_.begin(), order_.end(), [&](size_t a, size_t b) { return next(a) < next(b); });
  }

  // Every task over those of its blocks that come before `end`, in the order in which they are read.
  void run(int64_t end, Parallel parallel) {
    while (first_ < order_.size() && is_done(order_[first_])) ++first_;
    std::vector<size_t> active;
    for (size_t i = first_; i < order_.size(); ++i) {
      const size_t task = order_[i];
      if (reached_[task] == tasks_[task].begin && next(task) >= end) break;  // nor have those after it begun
      if (!is_done(task) && next(task) < end) active.push_back(task);
    }
    std::atomic<size_t> taken{0};
    parallel(active.size(), [&](size_t) { advance(active[taken++], end); });
  }

  std::vector<Partial> results() {
    std::vector<Partial> all;
    for (auto& state : states_)
      all.push_back({std::move(state.out), std::move(state.row_max), std::move(state.row_sum)});
    return all;
  }

 private:
  bool is_done(size_t task) const { return reached_[task] == tasks_[task].end; }
  int64_t next(size_t task) const { return place(task, reached_[task]); }
  int64_t place(size_t task, int64_t i) const {
    const size_t tile = tasks_[task].tile;
    return block_place(s_, tiles_[tile].sequence, choices_[tile].blocks[i]);
  }

  void advance(size_t task, int64_t end) {
    static thread_local Tile<E> buffer;
    const TokenTile& tile = tiles_[tasks_[task].tile];
    std::swap(static_cast<TileState<E>&>(buffer), states_[task]);
    if (reached_[task] == tasks_[task].begin)
      start_tile(s_, tile, buffer);
    else
      buffer.make_room((tile.last - tile.first) * s_.group(), s_.dim);
    int64_t stop = reached_[task];
    while (stop < tasks_[task].end && place(task, stop) < end) ++stop;
    attend_blocks(s_, cache_, tile, choices_[tasks_[task].tile], reached_[task], stop, buffer);
    reached_[task] = stop;
    std::swap(static_cast<TileState<E>&>(buffer), states_[task]);
  }

  const AttentionStep& s_;
  const Cache<T>& cache_;
  const std::vector<TokenTile>& tiles_;
  const Choices& choices_;
  const std::vector<AttentionTask>& tasks_;
  std::vector<TileState<E>> states_;
  std::vector<int64_t> reached_;  // the next block of each task
  std::vector<size_t> order_;     // of the tasks, by their first block
  size_t first_ = 0;              // in `order_`: all before it are done
};

// Locks the units of one tile after the other, so that they are read while the next one chooses its blocks.
class EarlyLocks {
 public:
  explicit EarlyLocks(const AttentionStep& s) : s_(s), counts_(s.kv_heads) {}

  // If the tiles need more than there is room for, or a page cannot be had, nothing stays locked.
  void lock(const TokenTile& tile, const Buffer<int32_t>& blocks) {
    if (s_.store == nullptr || gave_up_) return;
    PageUnits units;
    for (const int64_t block : blocks)
      units.push_back({static_cast<int32_t>(s_.page(tile.sequence, block)), static_cast<int32_t>(tile.head), false});
    counts_[tile.head] += units.size();
    gave_up_ = counts_[tile.head] > s_.store->slots || !s_.store->lock(units);
    if (gave_up_)
      s_.store->unlock(std::exchange(units_, {}), false, false);
    else
      units_.insert(units_.end(), units.begin(), units.end());
  }

  const PageUnits& units() const { return units_; }

 private:
  const AttentionStep& s_;
  std::vector<int64_t> counts_;  // by head
  PageUnits units_;
  bool gave_up_ = false;
};

// If a page cannot be had, what all tasks found is empty, and the file knows why.
template <class T, class E, class Choices>
std::vector<Partial> attend_stored(const AttentionStep& s, const Cache<T>& cache,
                                   const std::vector<TokenTile>& tiles, const Choices& choices, const std::vector<AttentionTask>& tasks,
                                   Parallel parallel, const PageUnits& already_locked) {
  const bool is_early = !already_locked.empty();
  const auto [waves, fits] =
      is_early ? std::make_pair(std::vector<Wave>{{s.sequences * s.table_width, already_locked}}, true)
               : plan_waves(s, tiles, choices);
  StoredTasks<T, E, Choices> stored(s, cache, tiles, choices, tasks);
  PageFile& file = s.store->file();
  // The disk sets the pace of tokens that each go their own way through many waves, and waking others costs more than
  // one core needs.
  const bool is_decode = s.is_decode();
  const Parallel spread = is_decode && !fits ? Parallel::serial() : parallel;
  if (!fits) s.store->set_idle(all_units(waves));
  size_t wave = 0, locked = is_early ? 1 : 0;
  while (wave < waves.size()) {
    while (locked < std::min(wave + kWavesAhead, waves.size()) && s.store->lock(waves[locked].units)) ++locked;
    if (file.failed()) break;
    stored.run(waves[wave].end, spread);
    if (file.failed()) break;
    s.store->unlock(waves[wave++].units, false, !fits);
  }
  for (; wave < locked; ++wave) s.store->unlock(waves[wave].units, false, !fits);
  s.store->set_idle({});
  return file.failed() ? std::vector<Partial>(tasks.size()) : stored.results();
}

// Tokens [first, last) of one sequence as a step of their own; `query_start` [2] is its, and there is no output.
inline AttentionStep part_of(const AttentionStep& s, int64_t sequence, int64_t first, int64_t last,
                             int32_t* query_start) {
  AttentionStep part = s;
  query_start[0] = 0, query_start[1] = last - first;
  part.qkv += first * s.row_stride();
  part.cos += first * s.dim / 2;
  part.sin += first * s.dim / 2;
  part.positions += first;
  part.slots += first;
  part.tree_start += sequence;
  part.tree_mask += first;
  part.page_table += sequence * s.table_width;
  part.query_start = query_start;
  part.sequences = 1;
  part.out = nullptr;
  return part;
}

// The units of all heads of blocks [first, last); `fresh`: those of blocks from this one on need not be read.
inline PageUnits units_of(const AttentionStep& s, int64_t sequence, int64_t first, int64_t last, int64_t fresh) {
  PageUnits units;
  for (int64_t block = first; block < last; ++block)
    for (int64_t head = 0; head < s.kv_heads; ++head)
      units.push_back({static_cast<int32_t>(s.page(sequence, block)), static_cast<int32_t>(head), block >= fresh});
  return units;
}

template <class Work>
void in_stored_parts(const AttentionStep& s, int64_t before, Work work) {
  const int64_t most = std::clamp<int64_t>(s.store->slots / (2 * kWavesAhead), 1, kWavePages);
  for (int64_t b = 0; b < s.sequences; ++b)
    for (int64_t first = s.query_start[b], last; first < s.query_start[b + 1]; first = last) {
      const int64_t block = s.slots[first] / kPage, end = block + most;
      for (last = first; last < s.query_start[b + 1] && s.slots[last] / kPage < end;) ++last;
      const PageUnits read = units_of(s, b, std::max<int64_t>(0, block - before), block, block);
      const PageUnits written = units_of(s, b, block, s.slots[last - 1] / kPage + 1,
                                         s.slots[first] % kPage == 0 ? block : block + 1);
      if (!s.store->lock(read)) return;
      if (s.store->lock(written)) {
        bool usable = true;
        for (const auto* units : {&read, &written})
          for (const PageUnit& unit : *units) usable &= s.store->wait(unit.page, unit.head);
        int32_t query_start[2];
        if (usable) work(part_of(s, b, first, last, query_start));
        s.store->unlock(written, true, false);
      }
      s.store->unlock(read, false, false);
      if (s.store->file().failed()) return;
    }
}

}  // namespace edge
