// Virtual projection: positions and cells of the centres on virtual lines or in virtual images, and the
// source's position table read there. Torch-free.
//
// The roundings of the plain PyTorch composition are written out (place.h), so positions, cells and encodings
// have its bits, on the CPU and on CUDA.
#pragma once

#include <stdint.h>

#include "common/dtype.h"
#include "common/layout.h"

namespace any2point {

struct VirtualProject {
  Dtype dtype;            // of table and encoding; not float64
  const float* centers;   // [B, S, 3]
  const float* views;     // [V, 3], or [V, 3, 3] for images
  const void* table;      // [H, W, C]; H = 1 for lines
  int64_t count;          // S > 0
  int64_t view_count;     // V
  int64_t channels;       // C
  int64_t height, width;  // H, W: positions of the table
  bool image;
  bool wrap;  // images: positions modulo the image
  float cell;
  float camera;                     // images: its distance, or 0: each cloud is seen as a whole
  int64_t rows, columns;            // extent of the positions,
  int64_t cell_rows, cell_columns;  // how many cells that is, and
  float down, across;               // positions of the table per position
  // What is asked for; the others are null.
  float* position;  // [B, V, S, 1], or [B, V, S, 2] for images: column and row
  int64_t* cells;   // [B, V, S]
  void* encoding;   // [B, S, C]
  int64_t* corner;  // [B, S, V * corners()]: rows of the table [H W, C], and
  float* weight;    // their weights

  // Entries of the table that make up an encoding, per view.
  A2P_HOST_DEVICE int64_t corners() const { return image ? 4 : 2; }
};

// What is known of a cloud before its centres are placed: for every line a Span, for images one Frame.
struct Span {
  float direction[3];  // of length one
  float low, extent;
  bool flat;  // all centres are in the middle
};
struct Frame {
  float middle[3];
  float scale;     // divisor of the coordinates about the middle
  float distance;  // of the camera
};

// Spans [B, V] or frames [B] of the clouds [begin, end).
void virtual_measure_cpu(const VirtualProject& args, Span* spans, Frame* frames, int64_t begin, int64_t end);
// Centres [begin, end) of the B * S. corner, weight: room for the V * corners() entries of one.
void virtual_project_cpu(const VirtualProject& args, const Span* spans, const Frame* frames, int64_t* corner,
                         float* weight, int64_t begin, int64_t end);

// Entries of the table for one centre (V * corners) that the CUDA kernel has room for.
constexpr int64_t kMostCorners = 1024;
// All clouds in one kernel. Returns a cudaError_t.
int virtual_project_cuda(const VirtualProject& args, int64_t clouds, void* stream);

}  // namespace any2point
