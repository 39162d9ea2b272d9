// SPDX-License-Identifier: Apache-2.0
// Every kernel of the native tests, for nvcc: compiled by tests/test_nvcc.py, translated by
// ptx/ptx2cpp.py.
#include "kernels/row_reduce.cuh"
#include "kernels/tile_product.cuh"
#include "kernels/wrappers.cuh"

namespace dlm::cuda {

template __global__ void row_reduce_kernel<RowFault::kNone>(
    const __grid_constant__ RowReduceParams);
template __global__ void row_reduce_kernel<RowFault::kMissingBarrier>(
    const __grid_constant__ RowReduceParams);
template __global__ void row_reduce_kernel<RowFault::kOverread>(
    const __grid_constant__ RowReduceParams);
template __global__ void row_reduce_kernel<RowFault::kSmemOverrun>(
    const __grid_constant__ RowReduceParams);
template __global__ void row_reduce_kernel<RowFault::kUnmaskedTail>(
    const __grid_constant__ RowReduceParams);
template __global__ void row_reduce_kernel<RowFault::kWrongSplits>(
    const __grid_constant__ RowReduceParams);
template __global__ void row_reduce_kernel<RowFault::kRelaxedCounter>(
    const __grid_constant__ RowReduceParams);
template __global__ void row_reduce_kernel<RowFault::kDivergentShuffle>(
    const __grid_constant__ RowReduceParams);
template __global__ void row_reduce_kernel<RowFault::kEarlyExit>(
    const __grid_constant__ RowReduceParams);
template __global__ void row_reduce_kernel<RowFault::kWrongMask>(
    const __grid_constant__ RowReduceParams);

template __global__ void tile_product_kernel<TileFault::kNone>(
    const __grid_constant__ TileProductParams);
template __global__ void tile_product_kernel<TileFault::kNoBarrierAfterWait>(
    const __grid_constant__ TileProductParams);
template __global__ void tile_product_kernel<TileFault::kNoBarrierBeforeReuse>(
    const __grid_constant__ TileProductParams);
template __global__ void tile_product_kernel<TileFault::kLaxWait>(
    const __grid_constant__ TileProductParams);
template __global__ void tile_product_kernel<TileFault::kSwappedRegisters>(
    const __grid_constant__ TileProductParams);
template __global__ void tile_product_kernel<TileFault::kOverread>(
    const __grid_constant__ TileProductParams);
template __global__ void tile_product_kernel<TileFault::kSmemOverrun>(
    const __grid_constant__ TileProductParams);
template __global__ void tile_product_kernel<TileFault::kUnmaskedTail>(
    const __grid_constant__ TileProductParams);
template __global__ void tile_product_kernel<TileFault::kMissingSyncwarp>(
    const __grid_constant__ TileProductParams);
template __global__ void tile_product_kernel<TileFault::kDivergentBarrier>(
    const __grid_constant__ TileProductParams);
template __global__ void tile_product_kernel<TileFault::kNoSwizzle>(
    const __grid_constant__ TileProductParams);

template __global__ void ldmatrix_kernel<1, false>(const __grid_constant__ WrapperParams);
template __global__ void ldmatrix_kernel<2, false>(const __grid_constant__ WrapperParams);
template __global__ void ldmatrix_kernel<4, false>(const __grid_constant__ WrapperParams);
template __global__ void ldmatrix_kernel<1, true>(const __grid_constant__ WrapperParams);
template __global__ void ldmatrix_kernel<2, true>(const __grid_constant__ WrapperParams);
template __global__ void ldmatrix_kernel<4, true>(const __grid_constant__ WrapperParams);
template __global__ void mma_kernel<true>(const __grid_constant__ WrapperParams);
template __global__ void mma_kernel<false>(const __grid_constant__ WrapperParams);

}  // namespace dlm::cuda
