// The device that kernels see: an sm_80 with few multiprocessors, so that small launches use them more than once.
#include "cuda_runtime.h"

namespace emulator {

uint3 thread_index() { return {current->index.x, current->index.y, current->index.z}; }
uint3 block_index_now() { return {block_index.x, block_index.y, block_index.z}; }
dim3 block_size() { return {launch.block.x, launch.block.y, launch.block.z}; }
dim3 grid_size() { return {launch.grid.x, launch.grid.y, launch.grid.z}; }
char* shared_base() { return shared; }
const void* here() { return __builtin_return_address(0); }
int multiprocessors() { return 3; }

}  // namespace emulator
