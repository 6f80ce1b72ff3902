// Streams: what is queued runs when something waits for it, on the thread that waits, and not before.
#include <algorithm>

#include "plugins/simt/driver/driver.h"

namespace driver {

Table<Stream> streams;
size_t waits;

namespace {

std::vector<std::shared_ptr<Stream>> all;  // also the default ones, and destroyed ones with work in them

void run(Stream& stream, const Item& item) {
  try {
    if (item.run && stream.context->failure == CUDA_SUCCESS) item.run();
  } catch (CUresult error) {
    stream.context->failure = error;
  }
  item.finished->done = true;
  item.finished->when = std::chrono::steady_clock::now();
}

void run_first(Stream& stream) {
  for (const auto& moment : stream.queue.front().after)
    while (!moment->done) run_first(*moment->stream);
  const Item item = std::move(stream.queue.front());
  stream.queue.pop_front();
  run(stream, item);
}

std::shared_ptr<Stream> add_stream(unsigned flags, int priority, bool legacy) {
  auto stream = std::make_shared<Stream>();
  stream->context = &current_context();
  stream->flags = flags;
  stream->priority = priority;
  stream->legacy = legacy;
  all.push_back(stream);
  return stream;
}

// The default stream and those that take part in its order wait for each other.
void follow_default(const Stream& stream, After& after) {
  for (const auto& other : all) {
    const bool ordered = stream.legacy ? other->blocking() : stream.blocking() && other->legacy;
    if (ordered && other->context == stream.context && !other->queue.empty())
      after.push_back(other->queue.back().finished);
  }
}

CUresult create(CUstream* handle, unsigned flags, int priority) {
  return call(Needs::context, [=] {
    require(flags <= CU_STREAM_NON_BLOCKING, CUDA_ERROR_INVALID_VALUE);
    *handle = streams.add<CUstream>(add_stream(flags, priority, false));
  });
}

}  // namespace

const std::vector<std::shared_ptr<Stream>>& all_streams() { return all; }

Stream& legacy_stream() {
  const Context& context = current_context();
  for (const auto& stream : all) {
    if (stream->context != &context || !stream->capture || !stream->blocking()) continue;
    spoil(*stream->capture, CUDA_ERROR_STREAM_CAPTURE_IMPLICIT);
  }
  for (const auto& stream : all)
    if (stream->context == &context && stream->legacy) return *stream;
  return *add_stream(0, 0, true);
}

// The per-thread default stream is the legacy one here.
std::shared_ptr<Stream> find_stream(CUstream handle) {
  if (handle && handle != CU_STREAM_LEGACY && handle != CU_STREAM_PER_THREAD) return streams.at(handle);
  const Stream& legacy = legacy_stream();
  return *std::find_if(all.begin(), all.end(), [&](const auto& s) { return s.get() == &legacy; });
}

void drop_streams(const Context& context) {
  streams.remove_of(context);
  std::erase_if(all, [&](const auto& stream) {
    if (stream->context != &context) return false;
    for (const Item& item : stream->queue) item.finished->done = true;
    return true;
  });
}

void enqueue(Stream& stream, CUgraphNodeType kind, std::function<void()> run, After after) {
  if (stream.capture) return add_node(stream, kind, std::move(run));
  follow_default(stream, after);
  auto moment = std::make_shared<Moment>(Moment{&stream});
  stream.queue.push_back({std::move(run), std::move(moment), std::move(after)});
}

void drain(Stream& stream) {
  while (!stream.queue.empty()) run_first(stream);
}

void drain(const Context& context) {
  for (const auto& stream : all)
    if (stream->context == &context) drain(*stream);
  std::erase_if(all, [](const auto& s) { return s.use_count() == 1 && s->queue.empty() && !s->legacy; });
}

void advance(Stream& stream) {
  for (const auto& moment : stream.queue.front().after)
    if (!moment->done) return advance(*moment->stream);
  run_first(stream);
}

size_t count_pending() {
  size_t sum = 0;
  for (const auto& stream : all) sum += stream->queue.size();
  return sum;
}

}  // namespace driver

using namespace driver;

extern "C" {

CUresult cuStreamCreate(CUstream* handle, unsigned flags) { return create(handle, flags, 0); }

CUresult cuStreamCreateWithPriority(CUstream* handle, unsigned flags, int priority) {
  return create(handle, flags, priority);
}

CUresult cuStreamDestroy(CUstream handle) {
  return call(Needs::context, [=] {
    const auto stream = streams.at(handle);
    if (stream->capture) stream->capture->invalid = true;
    if (stream->capture && stream->capture->origin == stream.get()) leave(std::shared_ptr(stream->capture));
    streams.take(handle);
  });
}

CUresult cuStreamSynchronize(CUstream handle) {
  return call(Needs::context, [=] {
    const auto stream = find_stream(handle);
    require_no_capture(*stream);
    ++waits;
    drain(*stream);
    require(stream->context->failure == CUDA_SUCCESS, stream->context->failure);
  });
}

CUresult cuStreamQuery(CUstream handle) {
  return call(Needs::context, [=] {
    const auto stream = find_stream(handle);
    require_no_capture(*stream);
    if (stream->queue.empty()) return;
    advance(*stream);
    require(stream->context->failure == CUDA_SUCCESS, stream->context->failure);
    throw CUDA_ERROR_NOT_READY;
  });
}

CUresult cuStreamGetFlags(CUstream handle, unsigned* flags) {
  return call(Needs::context, [=] { *flags = find_stream(handle)->flags; });
}

CUresult cuStreamGetPriority(CUstream handle, int* priority) {
  return call(Needs::context, [=] { *priority = find_stream(handle)->priority; });
}

CUresult cuStreamGetCtx(CUstream handle, CUcontext* context) {
  return call(Needs::context, [=] { *context = find_stream(handle)->context->handle; });
}

CUresult cuStreamGetDevice(CUstream handle, CUdevice* of) {
  return call(Needs::context, [=] {
    find_stream(handle);
    *of = 0;
  });
}

CUresult cuLaunchHostFunc(CUstream handle, CUhostFn function, void* data) {
  return call(Needs::context, [=] {
    require(function, CUDA_ERROR_INVALID_VALUE);
    enqueue(*find_stream(handle), CU_GRAPH_NODE_TYPE_HOST, [=] {
      in_host_function = true;
      function(data);
      in_host_function = false;
    });
  });
}

}  // extern "C"
