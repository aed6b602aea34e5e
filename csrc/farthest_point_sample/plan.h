// The launch parameters of the batched kernels: plain arithmetic, so that it can be tested for GPUs that are
// not there.
#pragma once

#include <stdint.h>

#include <initializer_list>

namespace any2point {

// What a launch depends on of a GPU.
struct DeviceLimits {
  int capability;    // 10 * major + minor
  int processors;    // all can run a block at once
  int64_t shared;    // bytes of shared memory a block can have
  bool cooperative;  // launches whose blocks are all resident
};

constexpr int kBatchedThreads = 1024, kBatchedWarps = 32;
constexpr int kBatchedParts = 256;   // blocks a cloud at most
constexpr int kBatchedFixed = 4096;  // bytes of shared memory for variables that are not arrays of the plan

struct BatchedPlan {
  int parts = 0;   // blocks a cloud; 0: do not use this kernel
  int held = 1;    // points a thread: 1, 2, 4, 6 (cluster) or 8
  int bits = 3;    // of a cell of the sort, an axis
  int most = 0;    // candidates a round at most
  int wanted = 0;  // aimed at, at most
  int slots = 0;   // candidates a warp settles
  int listed = 0;  // neighbours listed a candidate
  int steps = 0;   // picks made one by one at the start
  int few = 0;     // picks of a poor round; after it come `few` steps
  int warps = 32;  // a block
  int words = 0;   // 32 candidates each, of batched_cluster.cu; 0: the kernel of batched.cu
  // What follows from these:
  int64_t capacity = 0;  // points that a cloud may have
  int segment = 0;       // candidates that one of several blocks may have in a round
  int64_t shared = 0;    // bytes a block
};

inline BatchedPlan finish_plan(BatchedPlan plan) {
  plan.capacity = int64_t(plan.held) * plan.parts * kBatchedThreads;
  plan.slots = (plan.most + kBatchedWarps * plan.parts - 1) / (kBatchedWarps * plan.parts);
  const int spread = 4 * plan.most / plan.parts + 64;
  plan.segment = plan.most < spread ? plan.most : spread;
  const int64_t points = int64_t(plan.held) * kBatchedThreads;
  const int64_t boxes = 2 * kBatchedWarps * (plan.held >= 4 ? plan.held + 1 : plan.held);
  const int64_t settling = int64_t(kBatchedWarps) * plan.slots;
  plan.shared = 16 * (points + boxes + plan.most + 8) + settling * (plan.listed * 8 + 4) + 8 * plan.most +
                kBatchedFixed;
  return plan;
}

constexpr int kClusterParts = 8;  // blocks of a cluster at most

inline BatchedPlan finish_cluster_plan(BatchedPlan plan) {
  const int64_t threads = plan.warps * 32, most = plan.words * 32;
  plan.capacity = plan.held * plan.parts * threads;
  plan.most = static_cast<int>(most);
  plan.wanted = plan.most * 3 / 4;
  const int64_t boxes = 2 * plan.warps * (plan.held >= 4 ? plan.held + 1 : plan.held);
  const int64_t fixed = 16 * (plan.held * threads + boxes) + 40 * plan.warps * plan.parts + 1024;
  int64_t masks = 8 * plan.words * most;
  const int64_t lists = 512 * plan.warps * (plan.warps == 32 || plan.held == 1 ? 1 : 2);
  if (masks < lists) masks = lists;
  int64_t round = 36 * most + masks + 32 * plan.words + (plan.parts > 1 ? 40 * plan.parts * most : 0);
  const int64_t cells = plan.parts > 1 ? 0 : int64_t(4) << 3 * plan.bits, taken = plan.capacity / 8 + 4;
  if (round < cells) round = cells;
  if (round < taken) round = taken;
  plan.shared = fixed + round;
  return plan;
}

// One block a cloud, or from sm_90 on a cluster, for up to 8,192 points.
inline BatchedPlan cluster_plan(const DeviceLimits& device, int64_t clouds, int64_t count) {
  BatchedPlan plan;
  plan.parts = 1;
  plan.steps = 8;
  plan.few = 2;
  if (count > 2048 && device.capability >= 90) {
    // A cluster lies within one of the groups of 16 to 18 processors that a GPU is made of; all clusters are
    // to run at once.
    const int64_t groups = device.processors / 18;
    for (int parts : {8, 4, 3, 2}) {
      if (plan.parts == 1 && parts <= (count + 1023) / 1024 && clouds <= groups * (16 / parts)) {
        plan.parts = parts;
      }
    }
  }
  const int64_t each = (count + plan.parts - 1) / plan.parts;
  plan.warps = plan.parts == 1 && each > 2048 ? 32 : 16;
  const int64_t held = (each + plan.warps * 32 - 1) / (plan.warps * 32);
  plan.held = held <= 2 ? 2 : held <= 4 ? 4 : held <= 6 && plan.parts > 1 ? 6 : 8;
  plan.words = plan.parts == 1 && each <= 1024 ? 3 : 4;
  plan.bits = count <= 2048 ? 3 : 4;
  plan = finish_cluster_plan(plan);
  if (plan.shared > device.shared) plan.parts = 0;
  return plan;
}

// `count`: points of the largest cloud to serve (plan.capacity may be less); `samples`: picks. For few picks
// the sequential kernels are faster: the sort and the first picks, which come one by one, cost as much as
// that.
inline BatchedPlan batched_plan(const DeviceLimits& device, int64_t clouds, int64_t count, int64_t samples) {
  BatchedPlan plan;
  if (device.capability < 80 || clouds < 1 || samples < (count <= 8192 ? 384 : 256)) return plan;
  if (count <= 2048 && clouds > device.processors) return plan;  // sequential blocks share processors
  int64_t parts = device.cooperative ? device.processors / clouds : 1;
  if (parts > (count + 1023) / 1024) parts = (count + 1023) / 1024;
  if (parts > kBatchedParts) parts = kBatchedParts;
  const BatchedPlan cluster = cluster_plan(device, clouds, count);
  if (count <= 2048 || parts < 2 || (count <= 8192 && cluster.parts > 1)) return cluster;

  const int64_t held = (count + parts * kBatchedThreads - 1) / (parts * kBatchedThreads);
  plan.held = held <= 1 ? 1 : held <= 2 ? 2 : held <= 4 ? 4 : 8;
  plan.steps = 20;
  plan.few = 4;
  plan.parts = static_cast<int>(parts);
  plan.bits = count <= 16384 ? 4 : 5;
  plan.most = count <= 8192 ? 256 : count <= 16384 ? 512 : count <= 135168 ? 2048 : 4096;
  if (plan.held == 8 && plan.most > 2560) plan.most = 2560;      // shared memory
  if (plan.most > 64 * plan.parts) plan.most = 64 * plan.parts;  // two a warp
  plan.wanted = count <= 16384 ? plan.most * 5 / 8 : plan.most * 3 / 4;
  plan.listed = 64;
  plan = finish_plan(plan);
  while (plan.shared > device.shared && plan.listed > 16) {
    plan.listed /= 2;
    plan = finish_plan(plan);
  }
  if (plan.shared > device.shared) plan.parts = 0;
  return plan;
}

// Which kernel takes which clouds: launch i those that have more points than `above` of launch i, and at most
// `above` of launch i + 1 (or all).
struct Launch {
  enum Kernel { registers, batched, large } kernel;  // large: sequential, for any size
  int64_t above;
  int64_t up_to;  // points of a cloud at most
  BatchedPlan plan;
};
struct Launches {
  int count = 0;
  Launch launch[4];

  void add(Launch::Kernel kernel, int64_t up_to, const BatchedPlan& plan = {}) {
    launch[count] = {kernel, count ? launch[count - 1].up_to : -1, up_to, plan};
    count++;
  }
};

constexpr int64_t kRegisterPoints = 8192;  // that the sequential kernel holds in the registers of one block

// `most`: points of the largest cloud, as far as the host knows; `packed`: `most` is their sum, and clouds
// are as a rule much smaller; `ragged`: sizes differ.
inline Launches farthest_point_launches(const DeviceLimits& device, int64_t clouds, int64_t most, bool packed,
                                        bool ragged, int64_t samples) {
  Launches all;
  const int64_t usual = packed && clouds > 1 ? most / clouds * 2 < 4096 ? 4096 : most / clouds * 2 : most;
  const int64_t first = usual < most ? usual : most;
  BatchedPlan plan = batched_plan(device, clouds, first, samples);
  if (packed && clouds > 1 && plan.parts) {
    all.add(Launch::registers, 2048 < most ? 2048 : most);
    if (most > 2048) all.add(Launch::batched, plan.capacity, plan);
    if (most > plan.capacity) {
      const BatchedPlan larger = batched_plan(device, clouds, most, samples);
      if (larger.parts && larger.capacity > plan.capacity) all.add(Launch::batched, larger.capacity, larger);
    }
    if (most > all.launch[all.count - 1].up_to) all.add(Launch::large, most);
    return all;
  }
  if (plan.parts && plan.capacity >= most) {
    all.add(Launch::batched, most, plan);
    return all;
  }
  if (most <= kRegisterPoints || ragged) {
    if (packed && most > kRegisterPoints) all.add(Launch::registers, 2048);
    all.add(Launch::registers, kRegisterPoints < most ? kRegisterPoints : most);
  }
  if (most > kRegisterPoints) all.add(Launch::large, most);
  return all;
}

}  // namespace any2point
