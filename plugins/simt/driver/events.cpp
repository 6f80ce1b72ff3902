// Events: names for the moment when the work that was queued before them is done.
#include "plugins/simt/driver/driver.h"

namespace driver {

Table<Event> events;

namespace {

// The moment to wait for; null if there is nothing.
std::shared_ptr<Moment> moment_of(const Event& event) {
  require(!event.capture, CUDA_ERROR_CAPTURED_EVENT);
  return event.moment;
}

void record(Event& event, Stream& stream) {
  if (stream.capture) {
    event.moment = nullptr;
    event.capture = stream.capture;
    event.nodes = stream.last;
    return;
  }
  enqueue(stream, CU_GRAPH_NODE_TYPE_EVENT_RECORD, nullptr);
  event.capture = nullptr;
  event.moment = stream.queue.back().finished;
}

// A captured event takes the stream into its capture.
void join(Stream& stream, const Event& event) {
  require(!event.capture->invalid, CUDA_ERROR_STREAM_CAPTURE_INVALIDATED);
  if (stream.capture && stream.capture != event.capture) spoil(*stream.capture, CUDA_ERROR_STREAM_CAPTURE_MERGE);
  if (!stream.capture) stream.last.clear();
  stream.capture = event.capture;
  stream.last.insert(stream.last.end(), event.nodes.begin(), event.nodes.end());
}

double milliseconds(const Moment& start, const Moment& end) {
  return std::chrono::duration<double, std::milli>(end.when - start.when).count();
}

}  // namespace
}  // namespace driver

using namespace driver;

extern "C" {

CUresult cuEventCreate(CUevent* handle, unsigned flags) {
  return call(Needs::context, [=] {
    auto event = std::make_shared<Event>();
    event->context = &current_context();
    event->flags = flags;
    *handle = events.add<CUevent>(event);
  });
}

CUresult cuEventDestroy(CUevent handle) {
  return call(Needs::context, [=] { events.take(handle); });
}

CUresult cuEventRecord(CUevent handle, CUstream stream) {
  return call(Needs::context, [=] { record(*events.at(handle), *find_stream(stream)); });
}

CUresult cuEventRecordWithFlags(CUevent handle, CUstream stream, unsigned) { return cuEventRecord(handle, stream); }

CUresult cuEventQuery(CUevent handle) {
  return call(Needs::no_capture, [=] {
    const auto moment = moment_of(*events.at(handle));
    if (!moment || moment->done) return;
    advance(*moment->stream);
    require(current_context().failure == CUDA_SUCCESS, current_context().failure);
    throw CUDA_ERROR_NOT_READY;
  });
}

CUresult cuEventSynchronize(CUevent handle) {
  return call(Needs::no_capture, [=] {
    const auto moment = moment_of(*events.at(handle));
    ++waits;
    while (moment && !moment->done) advance(*moment->stream);
    require(current_context().failure == CUDA_SUCCESS, current_context().failure);
  });
}

CUresult cuEventElapsedTime(float* time, CUevent start, CUevent end) {
  return call(Needs::context, [=] {
    const auto first = events.at(start), last = events.at(end);
    require(!((first->flags | last->flags) & CU_EVENT_DISABLE_TIMING), CUDA_ERROR_INVALID_HANDLE);
    const auto from = moment_of(*first), to = moment_of(*last);
    require(from && to, CUDA_ERROR_INVALID_HANDLE);
    require(from->done && to->done, CUDA_ERROR_NOT_READY);
    *time = static_cast<float>(milliseconds(*from, *to));
  });
}

CUresult cuStreamWaitEvent(CUstream handle, CUevent event_handle, unsigned) {
  return call(Needs::context, [=] {
    const auto stream = find_stream(handle);
    const auto event = events.at(event_handle);
    if (event->capture) return join(*stream, *event);
    if (stream->capture && event->moment) spoil(*stream->capture, CUDA_ERROR_STREAM_CAPTURE_ISOLATION);
    if (event->moment && !event->moment->done)
      enqueue(*stream, CU_GRAPH_NODE_TYPE_WAIT_EVENT, nullptr, {event->moment});
  });
}

}  // extern "C"
