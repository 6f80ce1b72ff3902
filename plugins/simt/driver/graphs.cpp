// Stream capture and graphs: what is queued on a capturing stream becomes nodes, which a launch runs in that order.
#include <algorithm>
#include <set>
#include <utility>

#include "plugins/simt/driver/driver.h"

namespace driver {

Table<Graph> graphs;
Table<GraphExec> graph_execs;
size_t graph_launches;

namespace {

std::vector<std::shared_ptr<Capture>> captures;  // that have begun and not ended
thread_local CUstreamCaptureMode thread_mode = CU_STREAM_CAPTURE_MODE_GLOBAL;
cuuint64_t last_capture;
std::map<CUgraphNode, CUgraphNodeType> node_kinds;  // of live graphs

bool forbids(const Capture& capture) {
  if (thread_mode == CU_STREAM_CAPTURE_MODE_RELAXED) return false;
  if (capture.thread == std::this_thread::get_id()) return capture.mode != CU_STREAM_CAPTURE_MODE_RELAXED;
  return capture.mode == CU_STREAM_CAPTURE_MODE_GLOBAL && thread_mode == CU_STREAM_CAPTURE_MODE_GLOBAL;
}

// Whether all work of a capture comes before the end of its first stream.
bool is_joined(const Capture& capture) {
  std::set<size_t> before(capture.origin->last.begin(), capture.origin->last.end());
  for (size_t i = capture.nodes.size(); i-- > 0;)
    if (before.count(i)) before.insert(capture.nodes[i].after.begin(), capture.nodes[i].after.end());
  return before.size() == capture.nodes.size();
}

void begin(Stream& stream, CUstreamCaptureMode mode) {
  require(!stream.capture, CUDA_ERROR_ILLEGAL_STATE);
  require(!stream.legacy, CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED);
  stream.capture =
      std::make_shared<Capture>(Capture{&stream, mode, std::this_thread::get_id(), ++last_capture, false, {}});
  stream.last.clear();
  captures.push_back(stream.capture);
}

CUgraph end(Stream& stream) {
  const auto capture = stream.capture;
  require(capture.get(), CUDA_ERROR_ILLEGAL_STATE);
  require(capture->origin == &stream, CUDA_ERROR_STREAM_CAPTURE_UNMATCHED);
  const bool own = capture->thread == std::this_thread::get_id();
  require(own || capture->mode == CU_STREAM_CAPTURE_MODE_RELAXED, CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD);
  const bool joined = is_joined(*capture);
  leave(capture);
  require(!capture->invalid, CUDA_ERROR_STREAM_CAPTURE_INVALIDATED);
  require(joined, CUDA_ERROR_STREAM_CAPTURE_UNJOINED);
  for (const Node& node : capture->nodes) node_kinds[node.handle] = node.kind;
  return graphs.add<CUgraph>(std::make_shared<Graph>(Graph{stream.context, std::move(capture->nodes)}));
}

}  // namespace

void leave(const std::shared_ptr<Capture>& capture) {
  for (const auto& stream : all_streams())
    if (stream->capture == capture) stream->capture = nullptr, stream->last.clear();
  std::erase(captures, capture);
}

void spoil(Capture& capture, CUresult error) {
  capture.invalid = true;
  throw error;
}

void require_no_capture(const Stream& stream) {
  if (stream.capture) spoil(*stream.capture, CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED);
}

void forbid_in_capture() {
  bool forbidden = false;
  for (const auto& capture : captures)
    if (forbids(*capture)) capture->invalid = forbidden = true;
  require(!forbidden, CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED);
}

void drop_captures(const Context& context) {
  const auto open = captures;
  for (const auto& capture : open)
    if (capture->origin->context == &context) leave(capture);
}

void add_node(Stream& stream, CUgraphNodeType kind, std::function<void()> run) {
  Capture& capture = *stream.capture;
  require(!capture.invalid, CUDA_ERROR_STREAM_CAPTURE_INVALIDATED);
  capture.nodes.push_back({kind, std::move(run), stream.last, reinterpret_cast<CUgraphNode>(new_handle())});
  stream.last = {capture.nodes.size() - 1};
}

}  // namespace driver

using namespace driver;

extern "C" {

CUresult cuStreamBeginCapture(CUstream handle, CUstreamCaptureMode mode) {
  return call(Needs::context, [=] { begin(*find_stream(handle), mode); });
}

CUresult cuStreamEndCapture(CUstream handle, CUgraph* graph) {
  return call(Needs::context, [=] {
    *graph = nullptr;
    *graph = end(*streams.at(handle));
  });
}

CUresult cuStreamIsCapturing(CUstream handle, CUstreamCaptureStatus* status) {
  return call(Needs::context, [=] {
    const auto capture = find_stream(handle)->capture;
    *status = !capture           ? CU_STREAM_CAPTURE_STATUS_NONE
              : capture->invalid ? CU_STREAM_CAPTURE_STATUS_INVALIDATED
                                 : CU_STREAM_CAPTURE_STATUS_ACTIVE;
  });
}

// The graph has no handle before the end of its capture.
CUresult cuStreamGetCaptureInfo(CUstream handle, CUstreamCaptureStatus* status, cuuint64_t* id, CUgraph* graph,
                                const CUgraphNode** nodes, const CUgraphEdgeData** edges, size_t* count) {
  const CUresult result = cuStreamIsCapturing(handle, status);
  if (result != CUDA_SUCCESS || *status != CU_STREAM_CAPTURE_STATUS_ACTIVE) return result;
  return call(Needs::context, [=] {
    const auto stream = find_stream(handle);
    stream->asked.clear();
    for (const size_t i : stream->last) stream->asked.push_back(stream->capture->nodes[i].handle);
    if (id) *id = stream->capture->id;
    if (graph) *graph = nullptr;
    if (nodes) *nodes = stream->asked.data();
    stream->asked_edges.resize(stream->asked.size());
    if (edges) *edges = stream->asked_edges.data();
    if (count) *count = stream->asked.size();
  });
}

CUresult cuThreadExchangeStreamCaptureMode(CUstreamCaptureMode* mode) {
  std::swap(*mode, thread_mode);
  return CUDA_SUCCESS;
}

CUresult cuGraphGetNodes(CUgraph handle, CUgraphNode* nodes, size_t* count) {
  return call(Needs::context, [=] {
    const auto graph = graphs.at(handle);
    const size_t room = nodes ? *count : 0;
    for (size_t i = 0; i < room; ++i) nodes[i] = i < graph->nodes.size() ? graph->nodes[i].handle : nullptr;
    *count = nodes ? std::min(room, graph->nodes.size()) : graph->nodes.size();
  });
}

CUresult cuGraphNodeGetType(CUgraphNode node, CUgraphNodeType* kind) {
  return call(Needs::context, [=] {
    const auto found = node_kinds.find(node);
    require(found != node_kinds.end(), CUDA_ERROR_INVALID_VALUE);
    *kind = found->second;
  });
}

CUresult cuGraphInstantiate(CUgraphExec* exec, CUgraph handle, unsigned long long) {
  return call(Needs::context, [=] {
    const auto graph = graphs.at(handle);
    *exec = graph_execs.add<CUgraphExec>(std::make_shared<GraphExec>(GraphExec{graph->context, graph->nodes}));
  });
}

CUresult cuGraphUpload(CUgraphExec exec, CUstream stream) {
  return call(Needs::context, [=] { graph_execs.at(exec), find_stream(stream); });
}

CUresult cuGraphLaunch(CUgraphExec handle, CUstream stream) {
  return call(Needs::context, [=] {
    const auto exec = graph_execs.at(handle);
    enqueue(*find_stream(stream), CU_GRAPH_NODE_TYPE_GRAPH, [exec] {
      ++graph_launches;
      for (const Node& node : exec->nodes)
        if (node.run) node.run();
    });
  });
}

CUresult cuGraphDestroy(CUgraph handle) {
  return call(Needs::context, [=] {
    for (const Node& node : graphs.take(handle)->nodes) node_kinds.erase(node.handle);
  });
}

CUresult cuGraphExecDestroy(CUgraphExec handle) {
  return call(Needs::context, [=] { graph_execs.take(handle); });
}

}  // extern "C"
